"""FlashAttention 2 (the flash-attn package, 2.3 to 2.8), through its raw functions.

Its conventions were read in the Python and C++ sources of every tag from 2.3.0 to 2.8.3.post1. torch bundles the same
kernels: what is said of them in ``_aten_flash`` was measured on an H200.

- Bottom-right alignment. A window is two ints, -1 for unbounded: one argument until 2.6, two from 2.7 on. Other
  arguments came with the versions that ``CAPABILITIES`` names; ``load`` looks at the signatures that are there.
- lse is float32, natural log, +inf for a row that sees no key. Dense it is (B, H, S). Packed it is (H, T) from 2.6 on,
  and (N, H, max_seqlen_q) before. From 2.7 on the raw functions are torch custom ops, and backward returns no gradient:
  what they wrap is called, with gradients made here.
- ALiBi is the true distance, except where the mask is causal and nothing else: there slope * column is added, which
  leaves lse too large by slope * the query's position. It is taken off here, and put back for backward.
- Beside a bounded side of a window, an unbounded one becomes the longest key length, and (from 2.4.1 on) a side of at
  least that length becomes unbounded. Both are wrong for queries that lie before the first key
  (csrc/flash_attn/flash_api.cpp:141 and :608 of 2.8.3): packed batches may say that their keys are longer.
- Rows outside cu_seqlens are neither read nor written. A sequence without keys, or without queries, comes out zero
  (2.3.4 and later), so that gaps go in as sequences of their own. No kernel knows used lengths in backward.
- ``max_seqlen_q`` of 1 with fewer kv heads makes the packed forward take each row of q as a sequence, which it need
  not be: it is never below 2 here.
- Dropout draws from torch's generator, and backward wants the state that forward returned.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn._call import Call, Gradients, Result, Saved
from anyattn._capability import ALWAYS, Capability, HeadDims, Support
from anyattn._derived import derived
from anyattn._environment import Probe, distribution_version, one_line
from anyattn._errors import Refused
from anyattn._random import seeded
from anyattn.backends import _fa2_rules as rules
from anyattn.backends._raw import Entry, aligned, check_batch, entry

NAME = "fa2"
TITLE = "FlashAttention 2"
INSTALL = rules.INSTALL
NEWEST = "2.8.3.post2"

INF = float("inf")

CAPABILITIES = (
    Capability(
        families=(8, 9, 10, 12),
        dtypes=("float16", "bfloat16"),
        head_dims=HeadDims(maximum=256, multiple_of=8, pads=True, equal=True),
        features={
            "dense": ALWAYS,
            "packed": ALWAYS,
            "gaps": ALWAYS,
            "causal": ALWAYS,
            "window": ALWAYS,
            "bottom_right": ALWAYS,
            "gqa": ALWAYS,
            "unequal_head_dims": ALWAYS,
            # Forward came first: issues/1065.
            "softcap": Support(since="2.6.0", backward_since="2.6.2"),
            "alibi": Support(since="2.4.0"),
            "alibi_per_sequence": Support(since="2.4.0"),
            "dropout": ALWAYS,
            "deterministic": Support(since="2.4.1"),
        },
        package="flash-attn",
        upgrade=INSTALL,
        writes_gaps=True,
        ignores_gaps=True,
        rows=rules.ROWS,
    ),
)


# --- the contract --------------------------------------------------------------------------------------------------

_SHAPES = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_NUMBERS = (
    "dropout_p", "softmax_scale", "causal", "window_size_left", "window_size_right", "window_size", "softcap",
    "alibi_slopes",
)  # fmt: skip
_FORWARD = ("q", "k", "v", *_SHAPES, *_NUMBERS, "return_softmax")
_BACKWARD = ("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv", *_SHAPES, *_NUMBERS, "deterministic",
             "rng_state")  # fmt: skip
#: What a version may lack: a version without it is rejected where it is asked for.
_OPTIONAL = frozenset(("softcap", "alibi_slopes", "deterministic"))

_dense: tuple[Entry, Entry]
_packed: tuple[Entry, Entry]
#: The C++ function under the packed forward, which takes a place for out, as the Python one does not.
_placed: Callable[..., Any] | None = None
#: Whether packed lse is (N, H, max_seqlen_q): it became (H, T) in the version that brought softcap.
_lse_is_padded = False


def probe() -> Probe:
    """The installed flash-attn, where torch has CUDA.

    The distribution is asked, for flash-attn-4 has the same top-level module and may be there alone.
    """
    version = distribution_version("flash-attn")
    if version is None:
        return Probe(None)
    if version.startswith("3."):  # betas from 2025-01-07 to 2025-02-17
        return Probe(version, "it is a beta of FlashAttention 3, from when that had the same name")
    if torch.version.hip is not None:
        return Probe(version, "builds for ROCm are other kernels, which nobody has tried")
    return Probe(version, "" if torch.backends.cuda.is_built() else "this build of torch has no CUDA")


def load() -> frozenset[str]:
    """Import the raw functions and look at what they take. The flags name what they lack: "no_softcap"."""
    global _dense, _packed, _placed, _lse_is_padded
    module: Any = importlib.import_module("flash_attn.flash_attn_interface")
    _dense = entry(module._flash_attn_forward, _FORWARD), entry(module._flash_attn_backward, _BACKWARD)
    _packed = (
        entry(module._flash_attn_varlen_forward, _FORWARD),
        entry(module._flash_attn_varlen_backward, _BACKWARD),
    )
    window = {"window_size"} if "window_size_left" not in _dense[0].lacks else {"window_size_left", "window_size_right"}
    for one, allowed in ((_dense, window | {*_SHAPES}), (_packed, window)):
        if unknown := (one[0].lacks | one[1].lacks) - allowed - _OPTIONAL:
            raise TypeError(f"flash_attn's raw functions take no {', '.join(sorted(unknown))}")
    _lse_is_padded = "softcap" in _packed[0].lacks
    _placed = _cuda_forward(module._flash_attn_varlen_forward)
    lacks = _dense[0].lacks | _dense[1].lacks | _packed[0].lacks | _packed[1].lacks
    return frozenset(f"no_{name}" for name in _OPTIONAL & lacks)


#: All that the raw packed forward has taken in Python since 2.6.1, which brought ``leftpad_k``, to 2.8.3.
_SINCE_LEFTPAD = {*_FORWARD, "block_table", "leftpad_k", "seqused_k", "zero_tensors"}


def _cuda_forward(function: Any) -> Callable[..., Any] | None:
    """What that function calls, where the order of its arguments is known: it is one as long as nothing was added."""
    taken = inspect.signature(getattr(function, "_init_fn", function)).parameters.keys()
    known = "leftpad_k" in taken and taken <= _SINCE_LEFTPAD
    return getattr(sys.modules.get("flash_attn_2_cuda"), "varlen_fwd", None) if known else None


def _forward_into(
    place: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, dropout: float,
    scale: float, causal: bool, left: int, right: int, _: Any, softcap: float, slopes: Tensor | None, softmax: bool,
) -> Any:  # fmt: skip
    """``_placed``, called with what ``_FORWARD`` names, and a place for out."""
    assert _placed is not None
    return _placed(
        q, k, v, place, cu_q, cu_k, None, None, None, slopes, max_q, max_k, dropout, scale, False, causal, left, right,
        softcap, softmax, None,
    )  # fmt: skip


def forward(call: Call) -> Result:
    """See ``Backend.forward``."""
    spec, shapes = call.spec, _shapes(call)
    numbers = _numbers(call, shapes)
    q, k, v = aligned(call.q), aligned(call.k), aligned(call.v)
    run = (_dense if call.rows_q is None else _packed)[0].call
    if call.out is not None and call.rows_q is not None and _placed is not None:
        run = functools.partial(_forward_into, aligned(call.out))
    try:
        if spec.dropout:
            with seeded(call):
                got = run(q, k, v, *shapes, *numbers, False)
        else:
            got = run(q, k, v, *shapes, *numbers, False)
    except RuntimeError as error:
        if "build does not support" in str(error):  # features can be left out when it is compiled
            raise Refused(one_line(error)) from None
        raise
    # (out, lse, S_dmask, rng_state), and until 2.6 (out, q, k, v, out_padded, lse, S_dmask, rng_state)
    rng = got[-1] if spec.dropout else None
    if not spec.need_lse:
        return Result(got[0], None, rng)
    return Result(got[0], _canonical(call, shapes, numbers, got[-3]), rng)


def backward(call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None) -> Gradients:
    """See ``Backend.backward``."""
    spec, shapes = call.spec, _shapes(call)
    numbers = _numbers(call, shapes)
    q, k, v = aligned(call.q), aligned(call.k), aligned(call.v)
    # Kernels go by their strides; with fewer kv heads, what they wrote is summed into dk and dv at the end.
    dq = torch.empty_like(q) if call.dq is None else aligned(call.dq)
    dk = torch.empty_like(k) if call.dk is None else aligned(call.dk)
    dv = torch.empty_like(v) if call.dv is None else aligned(call.dv)
    (_dense if call.rows_q is None else _packed)[1].call(
        aligned(dout), q, k, v, aligned(saved.out), _own(call, shapes, numbers, saved.lse), dq, dk, dv, *shapes,
        *numbers, spec.deterministic, saved.rng,
    )  # fmt: skip
    return Gradients(dq, dk, dv)


class _Shapes(NamedTuple):
    """(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k); dense batches have none."""

    cu_q: Tensor | None
    cu_k: Tensor | None
    max_q: int
    max_k: int


class _Numbers(NamedTuple):
    """What ``_NUMBERS`` names."""

    dropout: float
    scale: float
    causal: bool
    left: int
    right: int
    window: tuple[int, int]
    softcap: float
    slopes: Tensor | None

    @property
    def distance_is_column(self) -> bool:
        """ALiBi in the kernel's causal branch, which the mask alone chooses."""
        return self.slopes is not None and self.causal and self.left < 0


def _shapes(call: Call) -> _Shapes:
    q, k, spec = call.rows_q, call.rows_k, call.spec
    if q is None or k is None:
        check_batch(call.q.shape[0])
        return _Shapes(None, None, call.q.shape[1], call.k.shape[1])
    max_q, max_k = max(q.max_seqlen, 2), k.max_seqlen
    if not spec.sees_key and spec.right != 0 and (spec.right or spec.left is not None):
        max_k += max_q
    gapped = q.gaps or k.gaps
    if gapped and _lse_is_padded:  # a gap may be longer: the kernel writes lse of whole blocks, of at most 128 rows
        max_q = -(-max_q // 128) * 128
    cu_q, cu_k = (q.as_queries, k.as_keys) if gapped else (q.starts, k.starts)
    check_batch(cu_q.shape[0] - 1)
    return _Shapes(cu_q, cu_k, max_q, max_k)


def _numbers(call: Call, shapes: _Shapes) -> _Numbers:
    spec = call.spec
    causal = spec.right == 0
    # The kernel takes a left side that long as unbounded too, but only from 2.4.1 on.
    left = -1 if spec.left is None or spec.left >= shapes.max_k else spec.left
    right = -1 if causal or spec.right is None else spec.right
    slopes = None if call.alibi is None else _slopes(call, call.alibi)
    return _Numbers(spec.dropout, spec.scale, causal, left, right, (left, right), spec.softcap, slopes)


# --- ALiBi ---------------------------------------------------------------------------------------------------------


def _slopes(call: Call, alibi: Tensor) -> Tensor:
    """float32 (H,), or (sequences as the kernel counts them, H)."""
    slopes = alibi.detach().float().contiguous()
    q, k = call.rows_q, call.rows_k
    if slopes.ndim == 1 or q is None or k is None or not (q.gaps or k.gaps):
        return slopes
    spread = slopes.new_zeros(q.as_queries.shape[0] - 1, slopes.shape[1])
    spread[2 : 3 * slopes.shape[0] : 3] = slopes  # two sequences for the gap before each one, and for the last gap
    return spread


def _excess(call: Call, shapes: _Shapes, slopes: Tensor) -> Tensor:
    """How much lse is too large in the kernel's causal branch: slope * position, (B or 1, H, S) or (H, T)."""
    if call.rows_q is None:
        rows = call.q.shape[1]
        positions = torch.arange(rows, device=slopes.device, dtype=torch.float32) + (call.k.shape[1] - rows)
        return slopes.reshape(-1, call.q.shape[2], 1) * positions
    where = _where(call, shapes)
    return (slopes[where.sequence].T if slopes.ndim == 2 else slopes[:, None]) * where.position


# --- lse -----------------------------------------------------------------------------------------------------------


class _Where(NamedTuple):
    """Where each row of a packed q lies, by cu_seqlens as the kernel gets them: (T,) each."""

    sequence: Tensor
    place: Tensor
    """Rows since the sequence's first, at most max_seqlen_q - 1."""
    position: Tensor
    """float32: where the query stands among its keys."""


def _where(call: Call, shapes: _Shapes) -> _Where:
    q, k = call.rows_q, call.rows_k
    assert q is not None
    assert k is not None
    total = call.q.shape[0]
    key = (NAME, total, shapes.max_q, q.gaps or k.gaps)
    return derived(q, k, key, lambda: _find(shapes, total))


def _find(shapes: _Shapes, total: int) -> _Where:
    cu_q, cu_k = shapes.cu_q, shapes.cu_k
    assert cu_q is not None
    assert cu_k is not None
    rows = torch.arange(total, device=cu_q.device, dtype=torch.int32)
    sequence = (torch.searchsorted(cu_q, rows, right=True) - 1).clamp_(0, cu_q.shape[0] - 2)
    place = rows - cu_q[sequence]
    lengths = cu_k.diff() - cu_q.diff()
    return _Where(sequence, place.clamp(0, shapes.max_q - 1).long(), (place + lengths[sequence]).float())


def _canonical(call: Call, shapes: _Shapes, numbers: _Numbers, lse: Tensor) -> Tensor:
    """From the kernel's lse."""
    if _lse_is_padded and call.rows_q is not None:
        where = _where(call, shapes)
        lse = lse[where.sequence, :, where.place].T.contiguous()
    if not call.spec.sees_key:
        lse.masked_fill_(lse == INF, -INF)
    if numbers.distance_is_column:
        assert numbers.slopes is not None
        lse = lse - _excess(call, shapes, numbers.slopes)
    return lse


def _own(call: Call, shapes: _Shapes, numbers: _Numbers, lse: Tensor) -> Tensor:
    """The kernel's lse."""
    if numbers.distance_is_column:
        assert numbers.slopes is not None
        lse = lse + _excess(call, shapes, numbers.slopes)
    if not call.spec.sees_key:
        lse = lse.masked_fill(lse == -INF, INF)
    return _padded(shapes, lse) if _lse_is_padded and call.rows_q is not None else lse


def _padded(shapes: _Shapes, lse: Tensor) -> Tensor:
    """(H, T) as (N, H, max_seqlen_q); what lies beyond a sequence's end is not read."""
    assert shapes.cu_q is not None
    rows = shapes.cu_q[:-1, None] + torch.arange(shapes.max_q, device=lse.device, dtype=torch.int32)
    return lse[:, rows.clamp_(max=lse.shape[1] - 1)].transpose(0, 1).contiguous()
