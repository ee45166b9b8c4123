"""FlashAttention 3 (the flash-attn-3 package, and fa3-fwd, which has its forward only), through its raw ops.

Its conventions were read in hopper/ of the repository, from 2025-02-18, when the package got its name, to 3.0.0, and in
the wheels of fa3-fwd 0.0.1 to 0.0.3. On an H200, the op ``flash_attn_3::fwd`` of 3.0.0 took 0.28 of the host time of
the package's own function (benchmarks/results).

- One pair of functions serves dense and packed batches. From 2025-05-21 on they are ops of torch, with a schema, and
  before that Python functions over a C++ module. All betas call themselves 3.0.0b1, so ``load`` looks at what is taken:
  a window as a pair or as two ints, ``causal`` or ``is_causal``. fa3-fwd has the same forward as ``fa3_fwd::fwd``.
- lse is float32, natural log, -inf for a row that sees no key, (B, H, S) or (H, T). (It is +inf where there is no row
  of keys at all: no such problem gets here.)
- Used lengths go with cu_seqlens always: without, backward leaves them out (flash_bwd_launch_template.h:303). Rows
  beyond them are not written. Whole tiles are loaded, so that values there must be finite.
- ``deterministic`` counts from 2025-09-17 on. Older betas take the flag and ignore it, and no signature tells which: no
  beta is asked for it.
- ``num_splits``: in how many parts forward takes the keys of a block of queries, up to 256, merged in float32; below 1
  the C++ code chooses by the lengths and the GPU, in every version. Backward has no such argument.
- A head dim is run as the next one that was compiled, 64, 96, 128, 192 or 256. What a build lacks is in its
  ``flash_attn_config``, from 2025-12-04 on; each kernel refuses what it was built without.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from anyattn._call import Call, Gradients, Result, Saved, Spec
from anyattn._capability import ALWAYS, Capability, HeadDims, Reason, Row
from anyattn._environment import Probe, distribution_version, one_line
from anyattn._errors import Refused
from anyattn._problem import Problem
from anyattn.backends._raw import Entry, aligned, check_batch, entry

NAME = "fa3"
TITLE = "FlashAttention 3"
INSTALL = "pip install fa3-fwd (forward only), or build flash-attn-3 from hopper/ of https://github.com/Dao-AILab/flash-attention"
NEWEST = "3.0.0"

_PACKAGE, _FORWARD_PACKAGE = "flash-attn-3", "fa3-fwd"
_REPOSITORY = "https://github.com/Dao-AILab/flash-attention"
_COMPILED = (64, 96, 128, 192, 256)


# --- which problems a rule speaks of -------------------------------------------------------------------------------


def _widest(p: Problem) -> int:
    return max(p.head_dim, p.head_dim_v)


def _unequal(p: Problem) -> bool:
    return p.head_dim != p.head_dim_v


def _narrow_pair(p: Problem) -> bool:
    """head_dim_v of another compiled width beside a head_dim of up to 64."""
    return p.head_dim <= 64 and _widest(p) > 64


def _wide_pair(p: Problem) -> bool:
    return _unequal(p) and p.head_dim > 64


def _pair(head_dim: int, head_dim_v: int) -> bool:
    """Whether forward takes two different head dims: flash_api.cpp:782."""
    return head_dim <= 64 or (128 < head_dim <= 192 and 96 < head_dim_v <= 128)


def _pair_unknown(p: Problem) -> bool:
    """Backward takes any pair, also one that the gradient of lse has made larger by 8."""
    grown = p.lse_grad and _pair(p.head_dim - 8, p.head_dim_v - 8)
    return _unequal(p) and not _pair(p.head_dim, p.head_dim_v) and not grown


def _widest_above(limit: int) -> Callable[[Problem], bool]:
    return lambda p: _widest(p) > limit


def _head_dim_above(limit: int) -> Callable[[Problem], bool]:
    return lambda p: p.head_dim > limit


def _deterministic_above(limit: int) -> Callable[[Problem], bool]:
    return lambda p: p.deterministic and _widest(p) > limit


def _several_splits(p: Problem) -> bool:
    """Asked for, and not left to the kernel, which chooses one where it was built without."""
    return p.num_splits > 1


# --- the rules -----------------------------------------------------------------------------------------------------

_ELSE = "choose another backend"
_NO_GRAD = "call it under torch.no_grad(), or choose another backend"


def _built_without(what: str, feature: str) -> Reason:
    """A rule that another build lifts."""
    return Reason(
        what, "a build that has it", "one without",
        f"build flash-attn-3 without FLASH_ATTENTION_DISABLE_{feature}, or choose another backend",
    )  # fmt: skip


def _newer(what: str) -> Reason:
    """A rule that a newer state of the main branch lifts: there is no other version to name."""
    return Reason(what, "flash-attn-3 >= 3.0.0", "an older beta", f"build {_PACKAGE} anew from {_REPOSITORY}")


def _other_package(what: str) -> Reason:
    return Reason(what, f"{_PACKAGE}", f"{_FORWARD_PACKAGE}, built without", f"build {_PACKAGE} from {_REPOSITORY}")


def _deterministic(limit: int) -> Reason:
    if limit == 0:
        needs, got = "a build with kernels for head dims below 256: in one without, all run as 256", "one without"
    else:
        needs, got = f"head_dim and head_dim_v of at most {limit}: larger ones run as 256", "more"
    return Reason(
        "a deterministic backward", needs, got, _ELSE,
        link=f"{_REPOSITORY}/blob/e2743ab5b3803bb672b16437ba98a3b1d4576c50/hopper/flash_api.cpp#L1370",
    )  # fmt: skip


#: What the wheels of fa3-fwd, to 0.0.3, were built without, as their fa3_fwd_config.py says.
_FORWARD_PACKAGE_LACKS = frozenset(("no_backward", "no_local", "no_fp16"))

_ROWS = (
    # --- fa3-fwd, whose versions are the lower ones
    Row(lambda p: True, _other_package("backward"), fixed="3.0.0b1", direction="backward"),
    Row(lambda p: p.left or p.right, _other_package("sliding windows"), fixed="0.0.4"),
    Row(lambda p: p.dtype == "float16", _other_package("float16"), fixed="0.0.4"),
    # --- what a build lacks
    Row(lambda p: True, _built_without("backward", "BACKWARD"), flag="no_backward", direction="backward"),
    Row(lambda p: p.left or p.right, _built_without("sliding windows", "LOCAL"), flag="no_local"),
    Row(lambda p: p.softcap, _built_without("softcap", "SOFTCAP"), flag="no_softcap"),
    Row(lambda p: p.dtype == "float16", _built_without("float16", "FP16"), flag="no_fp16"),
    Row(lambda p: p.form == "packed", _built_without("packed batches", "VARLEN"), flag="no_varlen"),
    Row(_several_splits, _built_without("keys in several splits", "SPLIT"), flag="no_split"),
    Row(_narrow_pair, _built_without("head_dim_v above 64 with head_dim to 64", "HDIMDIFF64"), flag="no_hdimdiff64"),
    Row(lambda p: _unequal(p) and p.head_dim <= 64, _built_without("another head_dim_v", "HDIM64"), flag="no_hdim64"),
    Row(_wide_pair, _built_without("head_dim 192 with head_dim_v 128", "HDIMDIFF192"), flag="no_hdimdiff192"),
    Row(_wide_pair, _built_without("head_dim 192 with head_dim_v 128", "HDIM192"), flag="no_hdim192"),
    *(
        Row(_head_dim_above(d), _built_without(f"head_dim above {d}", "HDIM*"), flag=f"head_dim_to_{d}")
        for d in _COMPILED[:-1]
    ),
    *(
        Row(
            _widest_above(d), _built_without(f"head_dim_v above {d} in backward", "HDIM*"), flag=f"head_dim_to_{d}",
            direction="backward",
        )
        for d in _COMPILED[:-1]
    ),
    *(
        Row(_deterministic_above(d), _deterministic(d), flag=f"deterministic_to_{d}", direction="backward")
        for d in (0, *_COMPILED[:-2])
    ),
    # --- head dims
    Row(
        _pair_unknown,
        Reason(
            "head_dim_v", "that of q; or any, with head_dim to 64; or 104 to 128, with head_dim 136 to 192", "another",
            "pad v, or q and k, with zeros to one of them, or choose another backend",
        ),
    ),
    Row(
        _widest_above(256),
        Reason("head_dim and head_dim_v in backward", "at most 256", "more", _NO_GRAD), direction="backward",
    ),
    Row(_deterministic_above(192), _deterministic(192), direction="backward"),
    # --- betas
    Row(
        lambda p: p.deterministic,
        # All betas have one version, and the flag counts from the middle of them on.
        _newer("a deterministic backward, for betas took the flag and ignored it"),
        fixed="3.0.0", direction="backward",
    ),
    Row(_unequal, _newer("another head_dim_v than head_dim in backward"), flag="no_schema", direction="backward"),
    Row(_narrow_pair, _newer("head_dim_v above 64 with head_dim to 64"), flag="no_schema"),
)  # fmt: skip

CAPABILITIES = (
    Capability(
        families=(9,),
        dtypes=("bfloat16", "float16"),  # a build may lack the second
        head_dims=HeadDims(maximum=256, maximum_v=512, multiple_of=8, pads=True),
        features=dict.fromkeys(
            (
                "dense",
                "packed",
                "gaps",
                "causal",
                "window",
                "bottom_right",
                "gqa",
                "unequal_head_dims",
                "softcap",
                "deterministic",
            ),
            ALWAYS,
        ),
        package=_PACKAGE,
        upgrade=INSTALL,
        most_splits=256,
        rows=_ROWS,
    ),
)


# --- what is installed ---------------------------------------------------------------------------------------------


def probe() -> Probe:
    """The installed flash-attn-3, else fa3-fwd, and what that build lacks."""
    version = distribution_version(_PACKAGE)
    name, config = _PACKAGE, "flash_attn_config"
    if version is None:
        version = distribution_version(_FORWARD_PACKAGE)
        name, config = _FORWARD_PACKAGE, "fa3_fwd_config"
    if version is None:
        return Probe(None)
    if torch.version.hip is not None:
        return Probe(version, "builds for ROCm are other kernels, which nobody has tried")
    if not torch.backends.cuda.is_built():
        return Probe(version, "this build of torch has no CUDA")
    flags = _flags(_build_flags(config))
    if name == _FORWARD_PACKAGE and Version(version) < Version("0.0.4"):
        flags -= _FORWARD_PACKAGE_LACKS  # rules of the version say so
    return Probe(version, flags=flags, note="" if name == _PACKAGE else f"of {name}")


def _build_flags(config: str) -> dict[str, bool]:
    """``CONFIG["build_flags"]`` of the module of that name, which is read and not imported; empty if there is none."""
    try:
        spec = importlib.util.find_spec(config)
        if spec is None or spec.origin is None:
            return {}
        for statement in ast.parse(Path(spec.origin).read_text()).body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "CONFIG":
                found: dict[str, bool] = ast.literal_eval(statement.value)["build_flags"]
                return found
    except (ImportError, OSError, SyntaxError, ValueError, KeyError, TypeError):
        pass  # from before there was such a file, or after it was changed: the kernels refuse by themselves
    return {}


def _flags(build: dict[str, bool]) -> frozenset[str]:
    """What a build lacks: "no_softcap", "head_dim_to_128", "deterministic_to_128"."""
    flags = {"no_" + name.partition("DISABLE_")[2].lower() for name, on in build.items() if on and "DISABLE_" in name}
    compiled = [d for d in _COMPILED if f"no_hdim{d}" not in flags]
    if compiled and compiled[-1] != 256:
        flags.add(f"head_dim_to_{compiled[-1]}")
    elif 192 not in compiled:
        flags.add(f"deterministic_to_{max(compiled[:-1], default=0)}")
    return frozenset(flags)


# --- the contract --------------------------------------------------------------------------------------------------

_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "max_seqlen_q", "max_seqlen_k")
_NUMBERS = ("softmax_scale", "causal", "window_size_left", "window_size_right", "window_size", "softcap")
_FORWARD = ("q", "k", "v", *_LENGTHS, *_NUMBERS, "num_splits", "out")
_BACKWARD = ("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv", *_LENGTHS, *_NUMBERS, "deterministic")
_ALSO_CALLED = {"out_": "out", "is_causal": "causal", "sequed_q": "seqused_q", "sequed_k": "seqused_k"}

#: Of a build from before there was a list of what it lacks; and of head dims, with the gradient of lse.
_REFUSALS = ("build does not support", "we only support Q/K headdim")

_raw_forward: Entry
_raw_backward: Entry | None


def load() -> frozenset[str]:
    """Import the kernels and look at what they take: "no_schema" marks betas without ops."""
    global _raw_forward, _raw_backward
    whole = distribution_version(_PACKAGE) is not None
    module: Any = importlib.import_module("flash_attn_interface" if whole else "fa3_fwd_interface")
    ops = torch.ops.flash_attn_3 if whole else torch.ops.fa3_fwd
    if not hasattr(ops, "fwd"):
        _raw_forward = _checked(entry(module._flash_attn_forward, _FORWARD, _ALSO_CALLED))
        _raw_backward = _checked(entry(module._flash_attn_backward, _BACKWARD, _ALSO_CALLED))
        return frozenset(("no_schema",))
    _raw_forward = _checked(entry(ops.fwd.default, _FORWARD, _ALSO_CALLED))
    _raw_backward = _checked(entry(ops.bwd.default, _BACKWARD, _ALSO_CALLED)) if whole else None
    return frozenset()


def _checked(raw: Entry) -> Entry:
    """Nothing that is asked of a function may be dropped."""
    window = {"window_size"} if "window_size" in raw.lacks else {"window_size_left", "window_size_right"}
    if unknown := raw.lacks - window - {"out"}:
        raise TypeError(f"FlashAttention 3's raw functions take no {', '.join(sorted(unknown))}")
    return raw


def forward(call: Call) -> Result:
    """See ``Backend.forward``."""
    spec, q, k, v = call.spec, _fit(call.q), _fit(call.k), _fit(call.v)
    check_batch(q.shape[0] if call.rows_q is None else call.rows_q.lengths.shape[0])
    try:
        out, lse, *_ = _raw_forward.call(q, k, v, *_lengths(call), *_numbers(call), spec.num_splits, call.out)
    except RuntimeError as error:
        if any(said in str(error) for said in _REFUSALS):
            raise Refused(one_line(error)) from None
        raise
    return Result(out, lse if spec.need_lse else None)


def backward(call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None) -> Gradients:
    """See ``Backend.backward``."""
    assert _raw_backward is not None
    q, k, v = _fit(call.q), _fit(call.k), _fit(call.v)
    dq = torch.empty_like(q) if call.dq is None else call.dq
    dk = torch.empty_like(k) if call.dk is None else call.dk
    dv = torch.empty_like(v) if call.dv is None else call.dv
    _raw_backward.call(
        _fit(dout), q, k, v, _fit(saved.out), saved.lse, dq, dk, dv, *_lengths(call), *_numbers(call),
        call.spec.deterministic,
    )  # fmt: skip
    return Gradients(dq, dk, dv)


def _fit(x: Tensor) -> Tensor:
    """As TMA wants it: rows at multiples of 16 bytes, and no two in one place."""
    if x.is_contiguous() and not x.data_ptr() % 16:
        return x
    return aligned(x) if x.is_contiguous() or 0 not in x.stride() else x.contiguous()


_NO_LENGTHS = (None,) * 6


def _lengths(call: Call) -> tuple[Any, ...]:
    """What ``_LENGTHS`` names. Used lengths only where rows lie between the sequences."""
    q, k = call.rows_q, call.rows_k
    if q is None or k is None:
        return _NO_LENGTHS
    return (
        q.starts, k.starts, q.lengths if q.gaps else None, k.lengths if k.gaps else None, q.max_seqlen, k.max_seqlen,
    )  # fmt: skip


def _numbers(call: Call) -> tuple[Any, ...]:
    """What ``_NUMBERS`` names."""
    numbers: tuple[Any, ...] | None = call.spec.memo.get("numbers")
    if numbers is None:
        numbers = call.spec.memo["numbers"] = _numbers_of(call.spec)
    return numbers


def _numbers_of(spec: Spec) -> tuple[Any, ...]:
    causal = spec.right == 0
    left = -1 if spec.left is None else spec.left
    right = -1 if causal or spec.right is None else spec.right
    return spec.scale, causal, left, right, (left, right), spec.softcap
