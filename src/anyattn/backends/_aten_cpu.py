"""torch's flash attention for the CPU, through its raw op: every mask and bias it lacks goes in as values to add.

Conventions, measured with torch 2.13: causal is top-left; lse is 0 for a row that sees no key, and -inf there gives NaN
in backward; it dies on empty input, reads on as if the last stride were 1, and refuses dropout. A packed batch runs a
sequence at a time, so no (total x total) mask exists.

Legend: B batch, S query rows, K key rows, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn._call import Call, Gradients, Result, Rows, Saved
from anyattn.backends._aten_terms import INF, distance, position_mask

#: torch's own binding of the raw op costs 2 us less per call than the one under torch.ops.
_op: Any = getattr(
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
        values = values - slopes * distance(spec, rows, keys, call.q.device).abs()
    if call.bias is not None:
        values = values + _cut(call, piece, call.bias).to(dtype)
    if spec.left is not None or spec.right is not None:
        values = values.masked_fill(~position_mask(spec, rows, keys, call.q.device), -INF)
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


def _with_contiguous_rows(call: Call) -> Call:
    """The op takes any strides but the last dim's, and does not say so."""
    if call.q.stride(-1) == call.k.stride(-1) == call.v.stride(-1) == 1:
        return call
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (call.q, call.k, call.v))
    return call._replace(q=q, k=k, v=v)


def _forward_piece(call: Call, piece: _Piece) -> tuple[Tensor, Tensor]:
    """(out, lse) as (B, H, S, D) and (B, H, S), canonical."""
    q = _rows_first(call, call.q, piece.start_q, piece.len_q)
    k, v = (_rows_first(call, x, piece.start_k, piece.len_k) for x in (call.k, call.v))
    added = _additive(call, piece)
    if added is None:
        out, lse = _op(q, k, v, 0.0, call.spec.right == 0, scale=call.spec.scale)
        return out, lse
    out, lse = _op(q, k, v, 0.0, False, attn_mask=added.values, scale=call.spec.scale)
    return out.masked_fill(added.dead.unsqueeze(-1), 0.0), lse.masked_fill(added.dead, -INF)


def forward(call: Call) -> Result:
    """See ``Backend.forward``."""
    call = _with_contiguous_rows(call)
    if call.rows_q is None and _plain(call, call.spec.equal_lengths):
        q, k, v = call.q.transpose(1, 2), call.k.transpose(1, 2), call.v.transpose(1, 2)
        plain, lse = _op(q, k, v, 0.0, call.spec.right == 0, scale=call.spec.scale)
        return Result(plain.transpose(1, 2), lse)
    if call.rows_q is None:
        out, lse = _forward_piece(call, _whole(call))
        return Result(out.transpose(1, 2), lse)
    rows, heads, _ = call.q.shape
    packed = torch.zeros_like(call.q, memory_format=torch.contiguous_format)
    precise = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    lses = torch.full((heads, rows), -INF, dtype=precise, device=call.q.device)
    for piece in _pieces(call):
        out, lse = _forward_piece(call, piece)
        place = slice(piece.start_q, piece.start_q + piece.len_q)
        packed[place] = out[0].transpose(0, 1)
        lses[:, place] = lse[0]
    return Result(packed, lses)


def _backward_piece(call: Call, piece: _Piece, saved: Saved, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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


def backward(call: Call, saved: Saved, dout: Tensor) -> Gradients:
    """See ``Backend.backward``."""
    call = _with_contiguous_rows(call)
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    if call.rows_q is None:
        dq, dk, dv = (x.transpose(1, 2) for x in _backward_piece(call, _whole(call), saved, dout))
        return Gradients(dq, dk, dv)
    grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (call.q, call.k, call.v)]
    for piece in _pieces(call):
        places = [(piece.start_q, piece.len_q), (piece.start_k, piece.len_k), (piece.start_k, piece.len_k)]
        for grad, x, (start, length) in zip(grads, _backward_piece(call, piece, saved, dout), places, strict=True):
            grad[start : start + length] = x[0].transpose(0, 1)
    return Gradients(grads[0], grads[1], grads[2])
