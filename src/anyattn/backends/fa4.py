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
from anyattn._capability import ALWAYS, Capability, HeadDims, Support
from anyattn._environment import Probe, distribution_version
from anyattn.backends import _fa4_kept as kept_kernels
from anyattn.backends import _fa4_rules as rules

NAME = "fa4"
TITLE = "FlashAttention 4"
INSTALL = "pip install -U flash-attn-4"
NEWEST = "4.0.0b36"

#: nvidia-cutlass-dsl releases with which backward does not return.
_HANGING_DSL = ("4.6.0", "4.6.1")
_CACHE_SWITCH = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
_CACHE_FOLDER = "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"

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
        native_sink_when=rules.takes_sink,
        rows=rules.ROWS,
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
        link, fix = f"{rules.ISSUES}/issues/2797", 'pip install -U "nvidia-cutlass-dsl>=4.6.2"'
        return Probe(version, f"backward may never return with nvidia-cutlass-dsl {dsl} ({link}): {fix}")
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
