"""FlashAttention 4 (the flash-attn-4 package), through its raw entry points.

One pair of functions serves dense and packed batches, takes used lengths, applies softcap and sinks, and takes the
gradient of lse. Its lse is canonical already. Every call is by keyword and every result is unpacked with a star: the
order of arguments and the number of results changed between betas. Kernels are compiled at first use, seconds each:
``load`` asks the package to keep them on disk.

The package also has a forward for sm8x. It is left out: no backward goes with it, and torch's FlashAttention 2 is
there already.
"""

from __future__ import annotations

import getpass
import importlib
import inspect
import os
import sys
import tempfile
from typing import Any

import torch
from torch import Tensor

from anyattn._call import Call, Gradients, Result, Saved, Spec
from anyattn._capability import ALWAYS, Capability, HeadDims, Reason, Row, Support
from anyattn._environment import Probe, distribution_version
from anyattn._problem import Problem
from anyattn.backends import _fa4_kept as kept_kernels

NAME = "fa4"
TITLE = "FlashAttention 4"
INSTALL = "pip install -U flash-attn-4"
NEWEST = "4.0.0b36"

_ISSUES = "https://github.com/Dao-AILab/flash-attention"
#: nvidia-cutlass-dsl releases with which backward does not return.
_HANGING_DSL = ("4.6.0", "4.6.1")
_CACHE_SWITCH = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
_CACHE_FOLDER = "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"


# --- which problems a rule speaks of -------------------------------------------------------------------------------


def _any(p: Problem) -> bool:
    return True


def _not_as_first(p: Problem) -> bool:
    """Other head dims than those of the first sm90 kernels, forward."""
    return _hopper(p) and (p.head_dim != p.head_dim_v or p.head_dim > 128)


def _backward_not_as_first(p: Problem) -> bool:
    """What the first sm90 backward did not take: packed batches, windows, determinism, most head dims."""
    taken = p.head_dim in (64, 128) and p.form == "dense" and not (p.left or p.right or p.deterministic)
    return _hopper(p) and not taken


def _hopper(p: Problem) -> bool:
    return p.arch // 10 == 9


def _blackwell(p: Problem) -> bool:
    return p.arch // 10 in (10, 11)


def _geforce(p: Problem) -> bool:
    return p.arch // 10 == 12


def _gqa(p: Problem) -> bool:
    return p.num_heads != p.num_kv_heads


def _dims(p: Problem) -> tuple[int, int]:
    return p.head_dim, p.head_dim_v


def _blackwell_256(p: Problem) -> bool:
    return _blackwell(p) and _dims(p) == (256, 256)


def _blackwell_dims_unknown(p: Problem) -> bool:
    return _blackwell(p) and max(_dims(p)) > 128 and _dims(p) not in ((192, 128), (256, 256))


def _hopper_dim_rounded(p: Problem) -> bool:
    """Rounding head_dim to 16, as the kernel does, and to 32, as its accumulator is laid out, differ."""
    return _hopper(p) and p.head_dim <= 128 and -(-p.head_dim // 16) % 2 == 1


_HOPPER_UNEQUAL = ((32, 64), (96, 64), (128, 64), (192, 128))


def _takes_sink(p: Problem) -> bool:
    return p.arch // 10 in (9, 10, 11) and not _blackwell_256(p)


# --- the rules -----------------------------------------------------------------------------------------------------

_ELSE = "choose another backend"
_NO_GRAD = "call it under torch.no_grad(), or choose another backend"


def _upgrade(version: str) -> str:
    return f'pip install -U "flash-attn-4>={version}"'


def _since(what: str, version: str, link: str = "") -> Reason:
    """A rule that an upgrade lifts."""
    return Reason(what, f"flash-attn-4 >= {version}", "an older version", _upgrade(version), link=link)


#: What the raw functions refuse, and what they get wrong, by version: read in every wheel from b3 to b36, and in the
#: issues linked. What is refused there by an assert or fails to compile is a rule as much as what is silently wrong.
_ROWS = (
    Row(_any, _since("version", "4.0.0b3"), fixed="4.0.0b3"),
    Row(_not_as_first, _since("head_dim above 128, or another head_dim_v, on sm90", "4.0.0b5"), fixed="4.0.0b5"),
    Row(
        _backward_not_as_first,
        _since("backward of packed batches, windows, and other head dims than 64 and 128, on sm90", "4.0.0b5"),
        fixed="4.0.0b5", direction="backward",
    ),
    Row(lambda p: p.lse_grad, _since("the gradient of lse", "4.0.0b5"), fixed="4.0.0b5", direction="backward"),
    # --- head dims
    Row(
        _blackwell_dims_unknown,
        Reason("head_dim", "at most 128, or 192/128, or 256/256, on sm10x and sm11x", "another", _ELSE),
    ),
    Row(_blackwell_256, _since("head_dim 256 on sm10x and sm11x", "4.0.0b11"), fixed="4.0.0b11"),
    Row(
        # Seen on an H200 with b36: these work, forward and backward; 64/128, 64/96 and 128/96 do not compile or launch.
        lambda p: _hopper(p) and p.head_dim != p.head_dim_v and _dims(p) not in _HOPPER_UNEQUAL,
        Reason(
            "head_dim_v", "that of q, or one of " + ", ".join(f"{d}/{v}" for d, v in _HOPPER_UNEQUAL) + " on sm90",
            "another", "pad v, or q and k, with zeros to one of them, or choose another backend",
        ),
    ),
    Row(
        lambda p: _geforce(p) and max(_dims(p)) > 128,
        Reason("head_dim", "at most 128 on sm12x, by its shared memory", "more", _ELSE),
    ),
    Row(
        lambda p: p.head_dim % 32 != 0 or p.head_dim_v % 32 != 0,
        _since("a head_dim that is no multiple of 32, in backward", "4.0.0b30", f"{_ISSUES}/issues/2492"),
        fixed="4.0.0b30", direction="backward",
    ),
    Row(
        _hopper_dim_rounded,
        Reason(
            "head_dim in backward", "a multiple of 32, or 8 less, on sm90", "another",
            "pad q and k with zeros to a multiple of 32, or choose another backend", link=f"{_ISSUES}/pull/2896",
        ),
        since="4.0.0b30", direction="backward",
    ),
    Row(
        lambda p: _hopper(p) and 128 < p.head_dim <= 160,
        _since("head_dim 136 to 160 in backward on sm90", "4.0.0b30"), fixed="4.0.0b30", direction="backward",
    ),
    Row(
        lambda p: _hopper(p) and p.head_dim > 192,
        _since("head_dim above 192 in backward on sm90", "4.0.0b31", f"{_ISSUES}/pull/2888"),
        fixed="4.0.0b31", direction="backward",
    ),
    Row(
        lambda p: _hopper(p) and p.head_dim > 128 and _gqa(p),
        _since("fewer kv heads with head_dim above 128, in backward on sm90", "4.0.0b31", f"{_ISSUES}/pull/2888"),
        fixed="4.0.0b31", direction="backward",
    ),
    Row(
        lambda p: _hopper(p) and p.head_dim != p.head_dim_v and _gqa(p),
        Reason(
            "fewer kv heads in backward", "head_dim_v equal to head_dim on sm90", "different ones",
            "pad v with zeros to head_dim, or choose another backend",
        ),
        direction="backward",
    ),
    Row(
        lambda p: _blackwell(p) and p.head_dim != p.head_dim_v and _dims(p) != (192, 128),
        Reason(
            "head_dim_v in backward", "that of q, or 192/128, on sm10x and sm11x: dv is wrong for others", "another",
            "pad v with zeros to head_dim, or choose another backend", link=f"{_ISSUES}/issues/2552",
        ),
        direction="backward",
    ),
    Row(
        # Wrong for batches of real activations in b11. No version is known to hold the fix.
        _blackwell_256,
        Reason(
            "head_dim in backward", "at most 192 on sm10x and sm11x: gradients of 256 were wrong", "256", _NO_GRAD,
            link="https://github.com/NVIDIA/TransformerEngine/issues/3216",
        ),
        direction="backward",
    ),
    Row(
        lambda p: p.arch // 10 == 11 and p.head_dim >= 128,
        _since("head_dim 128 and more in backward on sm11x", "4.0.0b15", f"{_ISSUES}/pull/2590"),
        fixed="4.0.0b15", direction="backward",
    ),
    # --- features
    Row(
        lambda p: _blackwell_256(p) and (p.left or p.right),
        _since("sliding windows with head_dim 256 on sm10x and sm11x", "4.0.0b34"), fixed="4.0.0b34",
    ),
    Row(
        lambda p: _blackwell_256(p) and p.softcap,
        _since("softcap with head_dim 256 on sm10x and sm11x", "4.0.0b34"), fixed="4.0.0b34",
    ),
    Row(
        lambda p: _blackwell_256(p) and p.gaps,
        _since("rows outside every sequence with head_dim 256 on sm10x and sm11x", "4.0.0b31"), fixed="4.0.0b31",
    ),
    Row(
        lambda p: p.softcap and p.form == "packed",
        _since("softcap of packed batches in backward", "4.0.0b24", f"{_ISSUES}/pull/2547"),
        fixed="4.0.0b24", direction="backward",
    ),
    Row(
        # The flag was taken, and dk and dv of a group were summed in any order all the same.
        lambda p: _hopper(p) and p.deterministic and _gqa(p),
        _since("a deterministic backward with fewer kv heads on sm90", "4.0.0b12"),
        fixed="4.0.0b12", direction="backward",
    ),
    # --- sm12x
    Row(
        _geforce,
        _since("sm12x, where older versions are silently wrong", "4.0.0b21", f"{_ISSUES}/pull/2553"), fixed="4.0.0b21",
    ),
    Row(
        lambda p: _geforce(p) and p.form == "packed",
        Reason(
            "packed batches", "a GPU other than sm12x: illegal memory accesses", "sm12x", _ELSE,
            link=f"{_ISSUES}/issues/2860",
        ),
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
            "gqa": ALWAYS,
            "unequal_head_dims": Support(families=(9, 10, 11)),
            # Until b8 the formula was another one, and backward left it out: issues/2396.
            "softcap": Support(since="4.0.0b9"),
            "deterministic": Support(backward_families=(9, 10, 11)),
        },
        package="flash-attn-4",
        upgrade=INSTALL,
        lse_grad="native",
        # Until b25 bfloat16 only: the core's sink is as right, so older versions need no rule of their own.
        native_sink=("float16", "bfloat16", "float32"),
        native_sink_since="4.0.0b26",
        native_sink_when=_takes_sink,
        rows=_ROWS,
    ),
)


# --- the contract --------------------------------------------------------------------------------------------------

_raw_forward: Any = None
_raw_backward: Any = None
#: Versions before b26 take pointers and strides as aligned to 16 bytes, whether they are or not.
_aligns_itself = True
#: Whether results are written to places that are given, by their strides. b26 was the first to look at the layout of a
#: given out; older versions take one too, but some kernels (head dim 256 on sm10x, to b19) write as if it had no holes.
_takes_places = False
#: Whether what the raw forward function calls may be called again without it: see ``_fa4_kept``.
_keeps = False


def probe() -> Probe:
    """The installed flash-attn-4, where torch has CUDA and the compiler under it is not one that hangs."""
    version = distribution_version("flash-attn-4")
    if version is None:
        return Probe(None)
    dsl = distribution_version("nvidia-cutlass-dsl")
    if dsl in _HANGING_DSL:
        fix = 'pip install -U "nvidia-cutlass-dsl>=4.6.2"'
        return Probe(version, f"backward may never return with nvidia-cutlass-dsl {dsl} ({_ISSUES}/issues/2797): {fix}")
    return Probe(version, "" if torch.backends.cuda.is_built() else "this build of torch has no CUDA")


def load() -> None:
    """Import the kernels' entry points, and leave sys.path as it was.

    One of the package's dependencies puts a folder on sys.path that holds a top-level ``utils``, which would shadow the
    caller's. Compiled kernels are kept on disk (``kernel_cache``), which the package itself does only when asked.
    """
    global _raw_forward, _raw_backward, _aligns_itself, _takes_places, _keeps
    folder = kernel_cache()
    os.environ.setdefault(_CACHE_SWITCH, "1" if folder and _is_ours(folder) else "0")
    if kernel_cache() and "ANYATTN_CACHE_DIR" in os.environ:
        os.environ.setdefault(_CACHE_FOLDER, os.path.join(os.environ["ANYATTN_CACHE_DIR"], NAME))
    path = list(sys.path)
    try:
        module: Any = importlib.import_module("flash_attn.cute.interface")
    finally:
        sys.path[:] = path
    _raw_forward, _raw_backward = module._flash_attn_fwd, module._flash_attn_bwd
    _aligns_itself = "align_bytes" in inspect.signature(module.maybe_contiguous).parameters  # b26 and later
    taken = [inspect.signature(raw).parameters for raw in (_raw_forward, _raw_backward)]
    _takes_places = _aligns_itself and "out" in taken[0] and {"dq", "dk", "dv"} <= set(taken[1])
    _keeps = kept_kernels.were_read(distribution_version("flash-attn-4")) and hasattr(_raw_forward, "compile_cache")


def _is_ours(folder: str | None) -> bool:
    """Whether nobody else can have put kernels there: the package loads what it finds."""
    while folder and folder != tempfile.gettempdir():
        if os.path.exists(folder):
            return os.stat(folder).st_uid == os.getuid()
        folder = os.path.dirname(folder) if folder != os.path.dirname(folder) else None
    return True


def _kept_by_the_package() -> bool:
    """False where the package was imported by someone else, with its switch off, before ``load`` could turn it on."""
    module = sys.modules.get("flash_attn.cute.cache_utils")
    return bool(getattr(module, "CUTE_DSL_CACHE_ENABLED", True))


def kernel_cache() -> str | None:
    """The folder in which compiled kernels are kept, or None: ``FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=0`` says no.

    It is ``FLASH_ATTENTION_CUTE_DSL_CACHE_DIR``, else ``fa4`` in ``ANYATTN_CACHE_DIR``, else the package's own choice,
    a folder per user among the temporary files.
    """
    if os.environ.get(_CACHE_SWITCH, "1") != "1" or not _kept_by_the_package():
        return None
    if _CACHE_FOLDER in os.environ:
        return os.environ[_CACHE_FOLDER]
    if "ANYATTN_CACHE_DIR" in os.environ:
        return os.path.join(os.environ["ANYATTN_CACHE_DIR"], NAME)
    try:
        return os.path.join(tempfile.gettempdir(), getpass.getuser(), "flash_attention_cute_dsl_cache")
    except (KeyError, OSError):  # a user without a name, as in containers: the package finds no folder either
        return None


def forward(call: Call) -> Result:
    """See ``Backend.forward``."""
    place = None
    if call.out is not None and _takes_places and _fits(call.out):
        place = call.out
    out, lse = (_kept_forward(call, place) if _keeps else None) or _raw(_forward_arguments(call, place))
    return Result(out, lse if call.spec.need_lse else None)


#: Neither a tensor without memory nor one that does more than a tensor.
_REAL = (Tensor, torch.nn.Parameter)


def _raw(arguments: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    out, lse, *_ = _raw_forward(**arguments)
    return out, lse


def _kept_forward(call: Call, place: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
    """By the kernel that the last call of the kind came to, or so that the next one finds it; None: by neither."""
    kind = kept_kernels.kind_of(call, place) if call.q.__class__ in _REAL else None
    if kind is None:
        return None
    kept = kept_kernels.find(_raw_forward, call, kind)
    if kept is None:
        return kept_kernels.note(_raw_forward, call, kind, _forward_arguments(call, place))
    return None if kept.kernel is None else kept_kernels.run(kept, call, place)


def _forward_arguments(call: Call, place: Tensor | None) -> dict[str, Any]:
    """What the raw function is given."""
    spec = call.spec
    q, k, v = (call.q, call.k, call.v) if _aligns_itself else map(_aligned, (call.q, call.k, call.v))
    numbers = spec.memo.get("forward") or spec.memo.setdefault("forward", _forward_numbers(spec))
    given = {"q": q, "k": k, "v": v, **_lengths(call), **numbers}
    if call.sink is not None:
        given["learnable_sink"] = call.sink.detach().contiguous()
    if place is not None:
        given["out"] = place
    return given


def _forward_numbers(spec: Spec) -> dict[str, Any]:
    """What forward gets of a spec. Arguments at their defaults are left out, for each costs a little on every call."""
    causal = spec.right == 0
    numbers = {"softmax_scale": spec.scale, "causal": causal, "return_lse": spec.need_lse}
    optional = {
        "softcap": spec.softcap or None,
        "window_size_left": spec.left,
        "window_size_right": None if causal else spec.right,
    }
    return numbers | {name: value for name, value in optional.items() if value is not None}


def backward(call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None) -> Gradients:
    """See ``Backend.backward``. The sink is in out and lse already."""
    spec = call.spec
    q, k, v = (call.q, call.k, call.v) if _aligns_itself else map(_aligned, (call.q, call.k, call.v))
    causal = spec.right == 0
    dq, dk, dv, *_ = _raw_backward(
        q=q,
        k=k,
        v=v,
        out=saved.out,
        dout=dout if _aligns_itself else _aligned(dout),
        lse=saved.lse,
        softmax_scale=spec.scale,
        causal=causal,
        softcap=spec.softcap,
        window_size_left=spec.left,
        window_size_right=None if causal else spec.right,
        deterministic=spec.deterministic,
        **(_NOTHING if dlse is None else {"dlse": dlse}),
        **_lengths(call),
        **_places(call),
    )
    return Gradients(dq, dk, dv)


_NOTHING: dict[str, Any] = {}


def _places(call: Call) -> dict[str, Any]:
    """Where the caller would have gradients, as far as they may be there: with fewer kv heads too, dk and dv are."""
    if (call.dq is None and call.dk is None) or not _takes_places:
        return _NOTHING
    given = {"dq": call.dq, "dk": call.dk, "dv": call.dv}
    return {name: _aligned(place) for name, place in given.items() if place is not None}


def _lengths(call: Call) -> dict[str, Any]:
    """Where the sequences of a packed batch lie. Used lengths only where rows lie between them."""
    q, k = call.rows_q, call.rows_k
    if q is None or k is None:
        return _NOTHING
    lengths = {
        "cu_seqlens_q": q.starts,
        "cu_seqlens_k": k.starts,
        "max_seqlen_q": q.max_seqlen,
        "max_seqlen_k": k.max_seqlen,
    }
    if q.gaps:
        lengths["seqused_q"] = q.lengths
    if k.gaps:
        lengths["seqused_k"] = k.lengths
    return lengths


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy whose rows begin at multiples of 16 bytes; and without holes, where older versions want none."""
    return x if _fits(x) else x.clone(memory_format=torch.contiguous_format)


def _fits(x: Tensor) -> bool:
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:-1])
    if not _aligns_itself and x.shape[-1] == 256:  # b11 to b18 read it on sm10x as if it were contiguous
        return fits and x.is_contiguous()
    return fits
