"""cuDNN's attention through nvidia-cudnn-frontend: dense, packed and padded batches, windows, bias, masks, dropout.

cuDNN runs graphs: one is built for each kind of call, kept, and run ever after (``_cudnn_graph``); which one a call
needs, ``_cudnn_calls`` says. What cuDNN has no kernel for shows when a graph is built, so forward builds the graph of
the backward that will follow too, and raises ``Refused`` before anything has run.

Measured on an H200 with 1.32.0 and cuDNN 9.19: lse is canonical, also where masks hide every key of a row; only rows of
sequences without keys are left unwritten. NaN between sequences reaches no other row. Dense tensors of a shape never
seen cost about 30 ms in each direction, and up to a second where another kernel must be compiled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyattn._call import Call, Gradients, Result, Saved
from anyattn._capability import ALWAYS, Capability, HeadDims, Reason, Row
from anyattn._environment import Probe, distribution_version
from anyattn._log import logger
from anyattn._problem import Problem
from anyattn._random import seeded
from anyattn.backends import _cudnn_calls as calls
from anyattn.backends import _cudnn_graph as graphs

NAME = "cudnn"
TITLE = "cuDNN (nvidia-cudnn-frontend)"
INSTALL = "pip install -U nvidia-cudnn-frontend"
NEWEST = "1.32.0"

#: The oldest cuDNN whose attention the frontend takes with windows, bias and dropout alike.
_OLDEST_LIBRARY = "9.10.2"
#: Versions of the library before which something is missing: each is a flag, "cudnn<9.18.0".
_STEPS = ("9.18.0", "9.23.0")
_WRONG_WINDOWS = "9.14.0"


# --- which problems a rule speaks of -------------------------------------------------------------------------------


def _any(p: Problem) -> bool:
    return True


def _family(p: Problem) -> int:
    return p.arch // 10


def _added(p: Problem) -> bool:
    """Something is added to the scores as a tensor."""
    return p.bias is not None or p.mask is not None


def _from_end(p: Problem) -> bool:
    """Positions count from the end of the keys, and cannot be turned into positions from their start."""
    unequal = p.relation != "equal" and not p.top_left and (p.causal or p.left or p.right)
    return unequal and (p.form == "packed" or p.relation == "any" or p.left)


def _decode(p: Problem) -> bool:
    """Few queries over a long cache, which it does not split as torch's own kernels do."""
    return p.seqlen_q <= 16 and p.seqlen_k >= 2048 and not p.needs_backward


def _slow(p: Problem) -> bool:
    """Where others are faster: few queries over a long cache, and the backward of a window over more keys than queries.

    The latter takes several times as long as with equal lengths, dense and packed: seen on an H200 with cuDNN 9.19.
    """
    return _decode(p) or (p.left and p.relation != "equal" and p.needs_backward)


def _blackwell_dims(p: Problem) -> bool:
    dims = p.head_dim, p.head_dim_v
    return _family(p) == 10 and max(dims) > 128 and dims not in ((192, 128), (256, 256))


# --- the rules -----------------------------------------------------------------------------------------------------

_ELSE = "choose another backend"
_NO_GRAD = "call it under torch.no_grad(), or choose another backend"
_LIBRARY = 'upgrade cuDNN: pip install -U "nvidia-cudnn-cu13"'

#: Read in the frontend's own checks (1.32.0), which make them when a graph is built; those of sm90 were met on an H200
#: as well. Whatever else the checks refuse there is a ``Refused``.
_ROWS = (
    Row(
        _any,
        Reason("version", "nvidia-cudnn-frontend >= 1.14.0", "an older version", INSTALL),
        fixed="1.14.0",
    ),
    Row(
        lambda p: p.bias not in (None, p.dtype),
        Reason("bias's dtype", "that of q", "another", "cast bias, or choose another backend"),
    ),
    Row(
        lambda p: p.form == "packed" and _added(p),
        Reason("a bias or mask", "dense batches", "a packed one", _ELSE),
    ),
    Row(
        lambda p: _from_end(p) and (_added(p) or p.dropout),
        Reason(
            "bias, masks and dropout", "queries that see all keys, or equal lengths, or positions from the start",
            "bottom-right alignment", 'use causal="top_left" if that is meant, or choose another backend',
        ),
    ),
    Row(
        lambda p: p.form == "dense" and p.seqlen_q == p.seqlen_k == 1,
        Reason("one token in backward", "more than one query or key", "one of each", _NO_GRAD),
        direction="backward",
    ),
    Row(
        lambda p: p.left and not p.causal,
        Reason("sliding windows that are not causal", "a cuDNN other than 9.14.0, where they are wrong", "9.14.0",
               _LIBRARY),
        flag=f"cudnn=={_WRONG_WINDOWS}",
    ),
    # --- other GPUs than sm90: read, not run
    Row(
        _blackwell_dims,
        Reason("head_dim in backward", "at most 128, or 192/128, or 256/256, on sm10x", "another", _NO_GRAD),
        direction="backward",
    ),
    Row(
        lambda p: _family(p) == 10 and (p.head_dim, p.head_dim_v) == (256, 256),
        Reason("head_dim 256 in backward on sm10x", "cuDNN >= 9.23", "an older one", _LIBRARY),
        direction="backward", flag="cudnn<9.23.0",
    ),
    Row(
        lambda p: _family(p) in (11, 12) and max(p.head_dim, p.head_dim_v) > 128,
        Reason("head_dim in backward", "at most 128 on sm11x and sm12x", "more", _NO_GRAD),
        direction="backward",
    ),
    Row(
        lambda p: _family(p) == 10 and p.deterministic,
        Reason("a deterministic backward on sm10x", "cuDNN >= 9.18", "an older one", _LIBRARY),
        direction="backward", flag="cudnn<9.18.0",
    ),
    Row(
        lambda p: _family(p) == 10 and p.deterministic and (p.dropout or p.bias is not None),
        Reason("a deterministic backward on sm10x", "no dropout and no bias", "one of them", _ELSE),
        direction="backward",
    ),
    Row(
        lambda p: _family(p) == 12 and p.form == "packed",
        Reason("packed batches", "a GPU other than sm12x: it has no packed lse there", "sm12x", _ELSE),
    ),
)  # fmt: skip

CAPABILITIES = (
    Capability(
        families=(9, 10, 11, 12),
        dtypes=("float16", "bfloat16"),
        head_dims=HeadDims(maximum=256, multiple_of=8, pads=True),
        features={
            "dense": ALWAYS,
            "packed": ALWAYS,
            "gaps": ALWAYS,
            "causal": ALWAYS,
            "window": ALWAYS,
            "bottom_right": ALWAYS,
            "top_left": ALWAYS,
            "gqa": ALWAYS,
            "unequal_head_dims": ALWAYS,
            "bias": ALWAYS,
            "bias_grad": ALWAYS,
            "mask": ALWAYS,
            "dropout": ALWAYS,
            "deterministic": ALWAYS,
        },
        package="nvidia-cudnn-frontend",
        upgrade=INSTALL,
        ignores_gaps=True,
        slow_at=_slow,
        dense_is_quicker=True,
        rows=_ROWS,
    ),
)


# --- the contract --------------------------------------------------------------------------------------------------


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in version.split(".")[:3])


def _flags(library: str) -> frozenset[str]:
    """What a version of the library lacks, as the rows name it."""
    older = {f"cudnn<{step}" for step in _STEPS if _numbers(library) < _numbers(step)}
    return frozenset(older | {f"cudnn=={_WRONG_WINDOWS}"} if library == _WRONG_WINDOWS else older)


def _too_old(library: str) -> str:
    if _numbers(library) >= _numbers(_OLDEST_LIBRARY):
        return ""
    return f"cuDNN {library} is older than {_OLDEST_LIBRARY}: {_LIBRARY}"


def probe() -> Probe:
    """The installed frontend, and cuDNN as its distribution says: asking torch for its version initialises CUDA."""
    version = distribution_version("nvidia-cudnn-frontend")
    if version is None:
        return Probe(None)
    if not torch.backends.cuda.is_built():
        return Probe(version, "this build of torch has no CUDA")
    library = distribution_version(f"nvidia-cudnn-cu{(torch.version.cuda or '').partition('.')[0]}")
    if library is None:
        return Probe(version)
    library = ".".join(library.split(".")[:3])
    return Probe(version, _too_old(library), _flags(library), f"cuDNN {library}")


def load() -> frozenset[str]:
    """Import the package, which finds torch's cuDNN where both are installed alike; says so where it found another."""
    library = graphs.load()
    if problem := _too_old(library):
        raise ImportError(problem)
    version = torch.backends.cudnn.version()
    if version is not None and (of_torch := graphs.version_text(version)) != library:
        logger.warning("nvidia-cudnn-frontend found cuDNN %s, and torch has %s: both are in use", library, of_torch)
    return _flags(library)


def forward(call: Call) -> Result:
    """See ``Backend.forward``."""
    spec, packed = call.spec, call.rows_q is not None
    recipes, tensors, by_token = calls.describe(call)
    graph = recipes.forward_graph()
    if spec.needs_backward:
        # A caller with a place for out has its gradient laid out alike.
        place = None if packed or call.out is None else call.out
        recipes.backward_graph(place, place)
    q, dim_v = call.q, call.v.shape[-1]
    if call.out is not None and _declared(call.out):
        out = call.out
    elif q.shape[-1] == dim_v:  # one allocation like another costs the host least
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    else:
        out = q.new_empty(*q.shape[:-1], dim_v)
    tensors[graphs.OUT] = out
    stats = None
    if spec.need_lse:
        stats = tensors[graphs.STATS] = _fresh_lse(q, by_token)
    if packed and not spec.sees_key:  # a sequence without keys is left unwritten
        out.zero_()
        if stats is not None:
            stats.fill_(float("-inf"))
    rng = None
    if spec.dropout:
        with seeded(call):
            rng = torch.randint(0, 1 << 31, (2,), dtype=torch.int64, device=q.device)
        tensors[graphs.SEED], tensors[graphs.OFFSET] = rng[:1], rng[1:]
    graph.run(tensors, q.device)
    return Result(out, stats, rng)


def _declared(place: Tensor) -> bool:
    """Whether a result may be written there: graphs declare results without holes.

    Others would need graphs of their own, and cuDNN minds the strides of a result: see calls.recipes_of.
    """
    return place.is_contiguous() and place.data_ptr() % 16 == 0


def _fresh_lse(q: Tensor, by_token: bool) -> Tensor:
    """Memory for lse: (H, T), or (B, H, S). By token, the heads of a row follow one another in it."""
    if q.ndim == 3:
        rows, heads, _ = q.shape
        return q.new_empty_strided((heads, rows), (1, heads), dtype=torch.float32)
    batch, seq, heads, _ = q.shape
    if by_token:
        return q.new_empty_strided((batch, heads, seq), (seq * heads, 1, heads), dtype=torch.float32)
    return q.new_empty(batch, heads, seq, dtype=torch.float32)


def backward(call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None) -> Gradients:
    """See ``Backend.backward``."""
    packed = call.rows_q is not None
    if packed:
        call = call._replace(q=call.q.contiguous())  # and so it must be: see calls.recipes_of
        out, dout = (calls.aligned(x.contiguous()) for x in (saved.out, dout))
        stats = saved.lse.t().contiguous()
    else:
        out, dout, stats = calls.aligned(saved.out), calls.aligned(dout), saved.lse.contiguous()
    recipes, tensors, _ = calls.describe(call, backward=True)
    graph = recipes.backward_graph() if packed else recipes.backward_graph(dout, out)
    dq, dk, dv = (
        place if place is not None and _declared(place) else x.new_empty(x.shape)
        for x, place in ((call.q, call.dq), (call.k, call.dk), (call.v, call.dv))
    )
    tensors.update(
        {graphs.OUT: out, graphs.DOUT: dout, graphs.STATS: stats, graphs.DQ: dq, graphs.DK: dk, graphs.DV: dv}
    )
    if call.spec.dropout:
        assert saved.rng is not None
        rng = saved.rng.to(dout.device)
        tensors[graphs.SEED], tensors[graphs.OFFSET] = rng[:1], rng[1:]
    dbias = None
    if call.spec.bias_grad:
        dbias = tensors[graphs.DBIAS] = torch.empty_like(tensors[graphs.BIAS])
    graph.run(tensors, dout.device)
    if dbias is not None and call.bias is not None:
        dbias = dbias.sum_to_size(call.bias.shape)
    return Gradients(dq, dk, dv, dbias)
