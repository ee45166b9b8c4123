"""Doubles of torch's own FlashAttention 2 ops, for CPU tensors.

Conventions measured on an H200 with torch 2.11: lse is float32, (B, H, S) or (H, T), +inf for a row that sees no key;
alignment is bottom-right; -1 and None are unbounded; what lies outside cu_seqlens is neither read nor written, nor are
rows of a sequence beyond max_q or max_k. Backward with lse = -inf gives NaN.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from doubles import plain

NAN = float("nan")


def register(library: torch.library.Library) -> None:
    """Give the ops a CPU implementation, as long as the library lives."""
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")


def _check(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, left: int | None, right: int | None) -> None:
    assert q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type"
    assert q.dtype == k.dtype == v.dtype, "query and key must have the same dtype"
    assert q.shape[-1] == k.shape[-1] == v.shape[-1], "one head_dim"
    assert q.shape[-1] % 8 == 0, "head_size must be a multiple of 8"
    assert q.shape[-1] <= 256, "FlashAttention forward only supports head dimension at most 256"
    assert q.shape[-2] % k.shape[-2] == 0, "Number of heads in key/value must divide number of heads in query"
    assert all(x.stride(-1) == 1 for x in (q, k, v)), "Input tensor must have contiguous last dimension"
    assert dropout_p == 0.0
    assert all(side is None or side >= -1 for side in (left, right))
    assert 0 not in (*q.shape, *k.shape), "an empty problem"


def _bound(side: int | None) -> int | None:
    return None if side is None or side < 0 else side


def _window(left: int | None, right: int | None, causal: bool) -> tuple[int | None, int | None]:
    return _bound(left), 0 if causal else _bound(right)


def _pieces(
    q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int
) -> list[tuple[slice, slice]]:
    """Rows of queries and keys, in flattened tensors."""
    if cu_q is None or cu_k is None:
        assert cu_q is cu_k
        assert (max_q, max_k) == (q.shape[1], k.shape[1])
        return [(slice(i * max_q, (i + 1) * max_q), slice(i * max_k, (i + 1) * max_k)) for i in range(q.shape[0])]
    bounds = []
    for cu, longest in ((cu_q, max_q), (cu_k, max_k)):
        assert cu.dtype == torch.int32, "cu_seqlens must have dtype int32"
        assert cu.is_contiguous(), "cu_seqlens must be contiguous"
        at = cu.tolist()
        bounds.append([slice(a, min(b, a + longest)) for a, b in pairwise(at)])
    return list(zip(*bounds, strict=True))


def _rows(x: Tensor) -> Tensor:
    return x if x.ndim == 3 else x.flatten(0, 1)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cum_seq_q: Tensor | None, cum_seq_k: Tensor | None, max_q: int, max_k: int,
    dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None, **others: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """aten::_flash_attention_forward."""
    assert not return_debug_mask
    assert all(x is None for x in others.values()), f"not for training: {others}"
    _check(q, k, v, dropout_p, window_size_left, window_size_right)
    sides = _window(window_size_left, window_size_right, is_causal)
    total = _rows(q).shape[0]
    out = plain.poisoned(total, *q.shape[-2:], dtype=q.dtype)
    lse = plain.poisoned(q.shape[-2], total, dtype=torch.float32)
    for rows, keys in _pieces(q, k, cum_seq_q, cum_seq_k, max_q, max_k):
        seen = plain.visible(rows.stop - rows.start, keys.stop - keys.start, *sides)
        o, l = plain.forward(_rows(q)[rows], _rows(k)[keys], _rows(v)[keys], seen, scale or q.shape[-1] ** -0.5)
        out[rows], lse[:, rows] = o.to(q.dtype), l.masked_fill(l == -plain.INF, plain.INF)
    rng, unused = torch.tensor([7, 11]).view(torch.uint64), torch.zeros((), dtype=torch.uint64)
    if q.ndim == 4:
        out, lse = out.view(q.shape), lse.unflatten(1, q.shape[:2]).transpose(0, 1).contiguous()
    return out, lse, rng, unused, q.new_empty(0)


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None, max_q: int, max_k: int, dropout_p: float, is_causal: bool, rng_state: Tensor,
    unused: Tensor, *, scale: float | None = None, window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """aten::_flash_attention_backward."""
    _check(q, k, v, dropout_p, window_size_left, window_size_right)
    assert (rng_state.dtype, rng_state.shape) == (torch.uint64, (2,))
    assert (unused.dtype, unused.shape) == (torch.uint64, ())
    assert grad_out.dtype == out.dtype == q.dtype
    assert grad_out.shape == out.shape == q.shape
    assert grad_out.stride(-1) == out.stride(-1) == 1, "dout must have contiguous last dimension"
    heads, packed = q.shape[-2], q.ndim == 3
    assert logsumexp.shape == ((heads, q.shape[0]) if packed else (q.shape[0], heads, q.shape[1]))
    assert logsumexp.dtype == torch.float32
    lse = logsumexp if packed else logsumexp.transpose(0, 1).flatten(1, 2)
    grads = [plain.poisoned(*_rows(x).shape, dtype=x.dtype) for x in (q, k, v)]
    sides = _window(window_size_left, window_size_right, is_causal)
    for rows, keys in _pieces(q, k, cum_seq_q, cum_seq_k, max_q, max_k):
        seen = plain.visible(rows.stop - rows.start, keys.stop - keys.start, *sides)
        dq, dk, dv, _ = plain.backward(
            _rows(q)[rows], _rows(k)[keys], _rows(v)[keys], _rows(out)[rows], lse[:, rows], _rows(grad_out)[rows], seen,
            scale or q.shape[-1] ** -0.5,
        )  # fmt: skip
        # exp(masked score + inf) is not 0; a sequence without keys has no score, and its dq was measured to be 0.
        if keys.stop > keys.start and (lse[:, rows] == -plain.INF).any():
            dq, dk, dv = dq * NAN, dk * NAN, dv * NAN
        for grad, where, x in zip(grads, (rows, keys, keys), (dq, dk, dv), strict=True):
            grad[where] = x.to(grad.dtype)
    return tuple(grad.view(x.shape) for grad, x in zip(grads, (q, k, v), strict=True))
