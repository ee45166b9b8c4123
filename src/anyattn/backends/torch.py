"""torch's scaled-dot-product kernels through their raw ops: cuDNN, flash and efficient on CUDA, and the CPU kernel.

The raw ops give lse, and a backward from a given lse, which ``F.scaled_dot_product_attention`` does not. Conventions,
measured on an H200 with torch 2.11 (cuDNN 9.19) and on CPU with 2.13:

- cudnn: causal is top-left; lse has one more dim; never deterministic.
- flash: see ``_aten_flash``.
- efficient: float32 products are made of three TF32 ones; lse is padded to a multiple of 32; bottom-right causal is
  wrong for rows without keys, and its window is wrong in backward unless lengths are equal; a bias row must be padded
  in memory to a multiple of 8.
- cpu: causal is top-left; lse is 0 for a row that sees no key, and -inf there gives NaN in backward; dies on empty
  input. A packed batch runs a sequence at a time, so no (total x total) mask exists.

Legend: B batch, S query rows, K key rows, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn._call import Call, Gradients, Result, Rows, Saved, Spec
from anyattn._capability import ALWAYS, Capability, HeadDims, Reason, Row
from anyattn._environment import Probe, torch_version
from anyattn._padding import pad_dims
from anyattn._problem import Problem
from anyattn.backends import _aten_flash

NAME = "torch"
TITLE = "torch's scaled-dot-product kernels"
INSTALL = "pip install torch"
NEWEST = "2.13.0"
INF = float("inf")

_HALF = ("float16", "bfloat16")
_EFFICIENT_WINDOW = Reason(
    "sliding windows",
    "causal, with key lengths known equal to query lengths",
    "another window",
    "choose another backend",
)
_EFFICIENT_EMPTY = Reason(
    "bottom-right causal", "no query sequence longer than its keys", "lengths that may be",
    "choose another backend: rows without keys come out wrong",
)  # fmt: skip
_BIAS_DTYPE = Reason("bias's dtype", "that of q", "another", "cast bias, or choose another backend")


def _window_unfit(p: Problem) -> bool:
    return (p.left or p.right) and not (p.causal and p.relation == "equal")


def _rows_without_keys(p: Problem) -> bool:
    return p.causal and p.relation == "any" and not p.top_left


def _bias_differs(p: Problem) -> bool:
    return p.bias is not None and p.bias != p.dtype


CAPABILITIES = (
    Capability(
        kernel="cudnn",
        families=(9, 10, 11, 12),
        dtypes=_HALF,
        head_dims=HeadDims(maximum=256, multiple_of=8),
        features={"dense": ALWAYS, "causal": ALWAYS, "top_left": ALWAYS, "gqa": ALWAYS, "unequal_head_dims": ALWAYS},
    ),
    Capability(
        kernel="flash",
        families=(8, 9, 10, 11, 12),
        dtypes=_HALF,
        head_dims=HeadDims(maximum=256, multiple_of=8),
        features=dict.fromkeys(("dense", "causal", "window", "bottom_right", "gqa", "deterministic"), ALWAYS),
        reads_torch_flag=True,
        rows=(_aten_flash.OPEN_RIGHT,),
    ),
    Capability(
        kernel="efficient",
        families=(7, 8, 9, 10, 11, 12),
        dtypes=("float16", "bfloat16", "float32"),
        head_dims=HeadDims(maximum=1024, multiple_of=8),
        # Each factor is split in two TF32 parts of 11 bits, and the product of the small parts is dropped: 2 ** -22 for
        # each factor's remainder and as much for the dropped product. On an H200 the error was 2 ** -20.3.
        product_error={"float32": 3 * 2.0**-22},
        features=dict.fromkeys(
            (
                "dense",
                "causal",
                "window",
                "bottom_right",
                "top_left",
                "unequal_head_dims",
                "bias",
                "bias_grad",
                "mask",
                "deterministic",
            ),
            ALWAYS,
        ),
        reads_torch_flag=True,
        rows=(
            Row(_window_unfit, _EFFICIENT_WINDOW),
            Row(_rows_without_keys, _EFFICIENT_EMPTY),
            Row(_bias_differs, _BIAS_DTYPE),
        ),
    ),
    Capability(
        kernel="cpu",
        families=(0,),
        dtypes=("float16", "bfloat16", "float32", "float64"),
        head_dims=HeadDims(maximum=1 << 20),
        features=dict.fromkeys(
            (
                "dense",
                "packed",
                "gaps",
                "causal",
                "window",
                "bottom_right",
                "top_left",
                "gqa",
                "unequal_head_dims",
                "alibi",
                "alibi_per_sequence",
                "bias",
                "mask",
                "deterministic",
            ),
            ALWAYS,
        ),
    ),
)


def probe() -> Probe:
    """Torch itself."""
    return Probe(torch_version())


def load() -> None:
    """Nothing to import: the ops are torch's."""


def forward(call: Call) -> Result:
    """See ``Backend.forward``."""
    return _FORWARD[call.kernel](_with_contiguous_rows(call))


def backward(call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None) -> Gradients:
    """See ``Backend.backward``."""
    return _BACKWARD[call.kernel](_with_contiguous_rows(call), saved, _aten_flash._rowwise(dout))


def _with_contiguous_rows(call: Call) -> Call:
    """The kernels take any strides but the last dim's; the CPU's reads on as if that were 1, and says nothing."""
    if call.q.stride(-1) == call.k.stride(-1) == call.v.stride(-1) == 1:
        return call
    q, k, v = (_aten_flash._rowwise(x) for x in (call.q, call.k, call.v))
    return call._replace(q=q, k=k, v=v)


def _unused_rng(call: Call) -> Tensor:
    """What stands for seed and offset where there is no dropout; nothing reads it."""
    return torch.empty((), dtype=torch.int64, device=call.q.device)


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


# --- cudnn ---


def _cudnn_forward(call: Call) -> Result:
    spec = call.spec
    q, k, v = (_heads_first(x) for x in (call.q, call.k, call.v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention.default(
        q, k, v, None, spec.need_lse, 0.0, spec.right == 0, False, scale=spec.scale
    )
    return Result(_heads_first(out), lse.squeeze(-1) if spec.need_lse else None)


def _cudnn_backward(call: Call, saved: Saved, dout: Tensor) -> Gradients:
    q = call.q if 0 not in call.q.stride() else call.q.contiguous()  # an expanded dim has no place in an order
    out, dout = (x if x.stride() == q.stride() else _laid_out_as(x, q) for x in (saved.out, dout))
    tensors = [_heads_first(x) for x in (dout, q, call.k, call.v, out)]
    unused = _unused_rng(call)
    got = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default(
        *tensors, saved.lse.unsqueeze(-1), unused, unused, None, None, None, call.q.shape[1], call.k.shape[1], 0.0,
        call.spec.right == 0, scale=call.spec.scale,
    )  # fmt: skip
    dq, dk, dv = (_heads_first(x) for x in got)
    return Gradients(dq, dk, dv)


def _laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    """The same values with their dims in memory in the order of another tensor's, the last dim last.

    torch (2.11) keeps a built backward by the strides of q, k and v alone, and reads out and its gradient as they were
    laid out when it was built: in q's order, as its forward does. In another order dq and dk are silently wrong.
    """
    order = [*sorted(range(x.ndim - 1), key=like.stride, reverse=True), x.ndim - 1]
    return x.permute(order).contiguous().permute([order.index(dim) for dim in range(x.ndim)])


# --- flash ---


def _flash_backward(call: Call, saved: Saved, dout: Tensor) -> Gradients:
    return _aten_flash.backward(call, saved, dout)


# --- efficient ---


class _EfficientTerms(NamedTuple):
    """What its op takes in place of causal, window, bias and mask."""

    custom_mask_type: int
    window_size: int | None
    bias: Tensor | None
    dead: Tensor | None
    """(B or 1, H or 1, S): rows that see no key."""


def _efficient_terms(call: Call) -> _EfficientTerms:
    spec = call.spec
    equal = call.q.shape[1] == call.k.shape[1]
    kind = 0 if spec.right != 0 else (1 if spec.top_left or equal else 2)
    window = None if spec.left is None else spec.left + 1
    if call.bias is None and call.mask is None:
        return _EfficientTerms(kind, window, None, None)
    full = (call.q.shape[0], call.q.shape[2], call.q.shape[1], call.k.shape[1])
    shape = torch.broadcast_shapes(*(x.shape for x in (call.bias, call.mask) if x is not None))
    rows = (*shape[:2], full[2], -(-full[3] // 8) * 8)
    bias = torch.zeros(rows, dtype=call.q.dtype, device=call.q.device)[..., : full[3]]
    if call.bias is not None:
        bias += call.bias
    if call.mask is not None:
        bias.masked_fill_(~call.mask, -INF)
    visible = bias != -INF
    if spec.right == 0:
        visible = visible & _position_mask(spec, full[2], full[3], call.q.device)
    return _EfficientTerms(kind, window, bias.expand(full), ~visible.any(-1))


def _efficient_forward(call: Call) -> Result:
    terms = _efficient_terms(call)
    rows = call.q.shape[1]
    out, lse, *_ = torch.ops.aten._efficient_attention_forward.default(
        *(_aten_flash._rowwise(x) for x in (call.q, call.k, call.v)), terms.bias, None, None, rows, call.k.shape[1],
        0.0, terms.custom_mask_type, call.spec.need_lse, scale=call.spec.scale, window_size=terms.window_size,
    )  # fmt: skip
    if not call.spec.need_lse:
        lse = None
    else:
        lse = lse[..., :rows]
        lse = lse.contiguous() if terms.dead is None else lse.masked_fill(terms.dead, -INF)
    if terms.dead is not None:
        out = out.masked_fill(terms.dead.transpose(1, 2).unsqueeze(-1), 0.0)
    return Result(out, lse)


def _efficient_backward(call: Call, saved: Saved, dout: Tensor) -> Gradients:
    terms = _efficient_terms(call)
    rows = call.q.shape[1]
    lse = saved.lse.masked_fill(saved.lse == -INF, INF)
    lse = torch.nn.functional.pad(lse, (0, -rows % 32), value=INF)
    unused = _unused_rng(call)
    want_bias = call.bias is not None
    dq, dk, dv, dbias = torch.ops.aten._efficient_attention_backward.default(
        _aten_flash._rowwise(dout), *(_aten_flash._rowwise(x) for x in (call.q, call.k, call.v)), terms.bias, saved.out,
        None, None, rows, call.k.shape[1], lse, 0.0, unused, unused, terms.custom_mask_type, want_bias,
        scale=call.spec.scale, window_size=terms.window_size,
    )  # fmt: skip
    summed = None
    if call.bias is not None:
        dbias = dbias[..., : call.k.shape[1]].float()
        if call.spec.right is not None:  # what causal hides is not written
            hidden = ~_position_mask(call.spec, rows, call.k.shape[1], call.q.device)
            dbias = dbias.masked_fill(hidden, 0.0)
        summed = dbias.sum_to_size(call.bias.shape).to(call.bias.dtype)
    return Gradients(dq, dk, dv, summed)


# --- cpu ---

#: torch's own binding of the raw op costs 2 us less per call than the one under torch.ops.
_cpu_op: Any = getattr(
    torch,
    "_scaled_dot_product_flash_attention_for_cpu",
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


class _Piece(NamedTuple):
    """A dense problem cut out of the batch: slices of q's and k's rows, and which entry it is."""

    entry: int
    start_q: int
    len_q: int
    start_k: int
    len_k: int


class _Additive(NamedTuple):
    """What the CPU op takes in place of masks, bias and ALiBi."""

    values: Tensor
    dead: Tensor
    """Rows that see no key; broadcasts to (B, H, S)."""


def _position_mask(spec: Spec, rows: int, keys: int, device: torch.device) -> Tensor:
    """(S, K): what causal and window let through."""
    distance = _distance(spec, rows, keys, device)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if spec.left is not None:
        visible &= distance >= -spec.left
    if spec.right is not None:
        visible &= distance <= spec.right
    return visible


def _distance(spec: Spec, rows: int, keys: int, device: torch.device) -> Tensor:
    """(S, K): key position - query position."""
    shift = 0 if spec.top_left else keys - rows
    return torch.arange(keys, device=device)[None] - torch.arange(rows, device=device)[:, None] - shift


def _plain(call: Call, equal_lengths: bool) -> bool:
    """Whether the op's own causal flag, top-left aligned, says all."""
    if call.alibi is not None or call.bias is not None or call.mask is not None or call.spec.left is not None:
        return False
    return call.spec.right is None or (call.spec.right == 0 and (call.spec.top_left or equal_lengths))


def _additive(call: Call, piece: _Piece) -> _Additive | None:
    """Everything but plain or causal attention, as values added to the scores; None where the op's own causal does."""
    spec, rows, keys = call.spec, piece.len_q, piece.len_k
    if _plain(call, rows == keys):
        return None
    dtype = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    values = torch.zeros(1, 1, rows, keys, dtype=dtype, device=call.q.device)
    if call.alibi is not None:
        slopes = call.alibi if call.alibi.ndim == 1 else call.alibi[_entries(call, piece)]
        slopes = slopes.reshape(-1, call.q.shape[-2], 1, 1).to(dtype)
        values = values - slopes * _distance(spec, rows, keys, call.q.device).abs()
    if call.bias is not None:
        values = values + _cut(call, piece, call.bias).to(dtype)
    if spec.left is not None or spec.right is not None:
        values = values.masked_fill(~_position_mask(spec, rows, keys, call.q.device), -INF)
    if call.mask is not None:
        values = values.masked_fill(~_cut(call, piece, call.mask), -INF)
    return _Additive(values, (values == -INF).all(-1))


def _entries(call: Call, piece: _Piece) -> slice:
    return slice(None) if call.rows_q is None else slice(piece.entry, piece.entry + 1)


def _cut(call: Call, piece: _Piece, x: Tensor) -> Tensor:
    """The part of a (batch, heads, seq_q, seq_k) tensor that belongs to a piece; dims of size 1 are broadcast."""
    if call.rows_q is None:
        return x
    if x.shape[0] > 1:
        x = x[piece.entry : piece.entry + 1]
    for dim, start, length in ((2, piece.start_q, piece.len_q), (3, piece.start_k, piece.len_k)):
        if x.shape[dim] > 1:
            x = x.narrow(dim, start % x.shape[dim], length)
    return x


def _whole(call: Call) -> _Piece:
    """A dense batch as one piece."""
    return _Piece(0, 0, call.q.shape[1], 0, call.k.shape[1])


def _pieces(call: Call) -> Iterator[_Piece]:
    """A piece per sequence of a packed batch; those without rows or keys are left out."""
    assert call.rows_q is not None
    assert call.rows_k is not None
    for i, ((start_q, len_q), (start_k, len_k)) in enumerate(zip(_host(call.rows_q), _host(call.rows_k), strict=True)):
        if len_q and len_k:
            yield _Piece(i, start_q, len_q, start_k, len_k)


def _host(rows: Rows) -> tuple[tuple[int, int], ...]:
    assert rows.host is not None  # the offsets of a CPU batch lie on the CPU
    return rows.host


def _rows_first(call: Call, x: Tensor, start: int, length: int) -> Tensor:
    """A piece's rows as (B, H, S, D)."""
    if call.rows_q is None:
        return x.transpose(1, 2)
    return x[start : start + length].transpose(0, 1).unsqueeze(0)


def _widened(call: Call) -> Call:
    """The op wants one head dim: the smaller of q's and v's is padded with zeros, which changes no score or value."""
    width = max(call.q.shape[-1], call.v.shape[-1])
    if call.q.shape[-1] == call.v.shape[-1]:
        return call
    return call._replace(q=pad_dims(call.q, width), k=pad_dims(call.k, width), v=pad_dims(call.v, width))


def _cpu_forward_piece(call: Call, piece: _Piece) -> tuple[Tensor, Tensor]:
    """(out, lse) as (B, H, S, D) and (B, H, S), canonical."""
    q = _rows_first(call, call.q, piece.start_q, piece.len_q)
    k, v = (_rows_first(call, x, piece.start_k, piece.len_k) for x in (call.k, call.v))
    added = _additive(call, piece)
    if added is None:
        out, lse = _cpu_op(q, k, v, 0.0, call.spec.right == 0, scale=call.spec.scale)
        return out, lse
    out, lse = _cpu_op(q, k, v, 0.0, False, attn_mask=added.values, scale=call.spec.scale)
    return out.masked_fill(added.dead.unsqueeze(-1), 0.0), lse.masked_fill(added.dead, -INF)


def _cpu_forward(call: Call) -> Result:
    if call.rows_q is None and _plain(call, call.spec.equal_lengths) and call.q.size(-1) == call.v.size(-1):
        q, k, v = call.q.transpose(1, 2), call.k.transpose(1, 2), call.v.transpose(1, 2)
        plain, lse = _cpu_op(q, k, v, 0.0, call.spec.right == 0, scale=call.spec.scale)
        return Result(plain.transpose(1, 2), lse)
    dim_v = call.v.shape[-1]
    wide = _widened(call)
    if call.rows_q is None:
        out, lse = _cpu_forward_piece(wide, _whole(call))
        out = out.transpose(1, 2)
        return Result(out if wide is call else out[..., :dim_v], lse)
    rows, heads, _ = call.q.shape
    packed = call.q.new_zeros(rows, heads, dim_v)
    precise = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    lses = torch.full((heads, rows), -INF, dtype=precise, device=call.q.device)
    for piece in _pieces(call):
        out, lse = _cpu_forward_piece(wide, piece)
        place = slice(piece.start_q, piece.start_q + piece.len_q)
        packed[place] = out[0].transpose(0, 1)[..., :dim_v]
        lses[:, place] = lse[0]
    return Result(packed, lses)


def _cpu_backward_piece(call: Call, piece: _Piece, saved: Saved, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) as (B, H, S, D)."""
    q, out, do = (_rows_first(call, x, piece.start_q, piece.len_q) for x in (call.q, saved.out, dout))
    k, v = (_rows_first(call, x, piece.start_k, piece.len_k) for x in (call.k, call.v))
    lse = saved.lse
    if call.rows_q is not None:
        lse = lse[None, :, piece.start_q : piece.start_q + piece.len_q]
    added = _additive(call, piece)
    values = None
    if added is not None:
        values, lse = added.values, lse.masked_fill(lse == -INF, 0.0)
    causal = added is None and call.spec.right == 0
    got: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
        do, q, k, v, out, lse, 0.0, causal, attn_mask=values, scale=call.spec.scale
    )
    return got[0], got[1], got[2]


def _cpu_backward(call: Call, saved: Saved, dout: Tensor) -> Gradients:
    dims = (call.q.shape[-1], call.q.shape[-1], call.v.shape[-1])
    wide = _widened(call)
    width = wide.q.shape[-1]
    saved, dout = saved._replace(out=pad_dims(saved.out, width)), pad_dims(dout, width)
    if call.rows_q is None:
        got = _cpu_backward_piece(wide, _whole(call), saved, dout)
        dq, dk, dv = (x.transpose(1, 2)[..., :dim] for x, dim in zip(got, dims, strict=True))
        return Gradients(dq, dk, dv)
    grads = [torch.zeros_like(x) for x in (call.q, call.k, call.v)]
    for piece in _pieces(call):
        places = [(piece.start_q, piece.len_q), (piece.start_k, piece.len_k), (piece.start_k, piece.len_k)]
        for grad, x, (start, length), dim in zip(
            grads, _cpu_backward_piece(wide, piece, saved, dout), places, dims, strict=True
        ):
            grad[start : start + length] = x[0].transpose(0, 1)[..., :dim]
    return Gradients(grads[0], grads[1], grads[2])


_FORWARD = {
    "cudnn": _cudnn_forward,
    "flash": _aten_flash.forward,
    "efficient": _efficient_forward,
    "cpu": _cpu_forward,
}
_BACKWARD = {
    "cudnn": _cudnn_backward,
    "flash": _flash_backward,
    "efficient": _efficient_backward,
    "cpu": _cpu_backward,
}
