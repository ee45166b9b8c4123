"""Doubles of torch's own FlashAttention 2 ops, for CPU tensors.

Conventions measured on an H200 with torch 2.11: lse is float32, (B, H, S) or (H, T), +inf for a row that sees no key;
alignment is bottom-right; -1 and None are unbounded; what lies outside cu_seqlens is neither read nor written, nor are
rows of a sequence beyond max_q or max_k. Backward with lse = -inf gives NaN.

Read in torch's C++ (flash_attn/flash_api.cpp): a window side of at least max_k is unbounded; an unbounded side
beside a bounded one is max_k; max_q of 1 with fewer kv heads takes each row of a packed q as a sequence; the batch is a
dim of the grid; 16 bytes are loaded at a time. Dropout draws from torch's generator, and its state is uint64 (2,): what
backward is given there is what forward returned.

``Override`` is what ``torch.nn.attention.activate_flash_attention_impl`` puts in their place (torch/nn/attention/
_fa3.py and _fa4.py): no dropout, lse -inf for a row that sees no key.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import _registry

from doubles import plain
from doubles.rows import Sequence, flat, flat_lse, is_offsets, sequences, shaped_lse

NAN = float("nan")
OPS = ("_flash_attention_forward", "_flash_attention_backward")


def register(library: torch.library.Library) -> None:
    """Give the ops a CPU implementation, as long as the library lives."""
    for name, function in zip(OPS, (forward, backward), strict=True):
        library.impl(name, function, "CPU")


@dataclass
class Override:
    """What torch's registry takes for another implementation that is active. ``calls`` counts those of its forward."""

    name: str
    calls: int = 0
    library: torch.library.Library | None = None

    def activate(self) -> None:
        """Register it, and activate it as a user would."""
        _registry.register_flash_attention_impl(self.name, register_fn=self._register)
        _registry.activate_flash_attention_impl(self.name)

    def remove(self) -> None:
        """What torch calls to restore its own kernels."""
        if self.library is not None:
            self.library._destroy()
        self.library = None

    def _register(self) -> Override:
        self.library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that its kernel is overridden, which is the point
            self.library.impl("_flash_attention_forward", self._forward, "CPU", allow_override=True)
        return self

    def _forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        self.calls += 1
        if args[7] != 0.0:
            raise RuntimeError(f"{self.name} flash_attention forward unsupported: dropout_p must be 0")
        out, lse, *others = forward(*args, **kwargs)
        return out, lse.masked_fill(lse == plain.INF, -plain.INF), *others


def _check(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, left: int | None, right: int | None) -> None:
    assert q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type"
    assert q.dtype == k.dtype == v.dtype, "query and key must have the same dtype"
    assert q.shape[-1] == k.shape[-1] == v.shape[-1], "one head_dim"
    assert q.shape[-1] % 8 == 0, "head_size must be a multiple of 8"
    assert q.shape[-1] <= 256, "FlashAttention forward only supports head dimension at most 256"
    assert q.shape[-2] % k.shape[-2] == 0, "Number of heads in key/value must divide number of heads in query"
    check_aligned(q, k, v)
    assert 0.0 <= dropout_p < 1.0
    assert all(side is None or -1 <= side < 1 << 31 for side in (left, right)), "a window is two C ints"
    assert 0 not in (*q.shape, *k.shape), "an empty problem"


def check_aligned(*tensors: Tensor) -> None:
    """Every row begins at a multiple of 16 bytes: else the GPU reports a misaligned address, and is lost."""
    for x in tensors:
        assert x.stride(-1) == 1, "Input tensor must have contiguous last dimension"
        assert x.data_ptr() % 16 == 0, "misaligned address"
        assert all(s * x.element_size() % 16 == 0 for s, n in zip(x.stride()[:-1], x.shape, strict=False) if n > 1)


def _window(left: int | None, right: int | None, causal: bool, longest: int) -> tuple[int | None, int | None]:
    left, right = (-1 if side is None or side >= longest else side for side in (left, right))
    if causal:
        right = 0
    if left < 0 <= right:
        left = longest
    elif right < 0 <= left:
        right = longest
    return (None if left < 0 else left), (None if right < 0 else right)


def _pairs(
    q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int
) -> list[tuple[Sequence, Sequence]]:
    """Rows of queries and keys, in flattened tensors."""
    if cu_q is None or cu_k is None:
        assert cu_q is cu_k
        assert (max_q, max_k) == (q.shape[1], k.shape[1])
        assert q.shape[0] <= 65535, "invalid configuration argument"
    else:
        count = cu_q.shape[0] - 1
        assert 0 < count <= 65535, "invalid configuration argument"
        assert is_offsets(cu_q, sequences=count), "cu_seqlens_q must have dtype int32, and be contiguous"
        assert is_offsets(cu_k, sequences=count), "cu_seqlens_k must have dtype int32, and be contiguous"
    return list(zip(sequences(q, cu_q, None, max_q), sequences(k, cu_k, None, max_k), strict=True))


def _seen(one: Sequence, two: Sequence, sides: tuple[int | None, int | None]) -> Tensor:
    seen = plain.visible(one.length, two.length, *sides)
    seen[:, two.written :] = False
    return seen


def _factor(q: Tensor, i: int, one: Sequence, two: Sequence, rng: Tensor, dropout_p: float) -> Tensor | None:
    if not dropout_p:
        return None
    return plain.dropout((*rng.view(torch.int64).tolist(), i), (q.shape[-2], one.length, two.length), dropout_p)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cum_seq_q: Tensor | None, cum_seq_k: Tensor | None, max_q: int, max_k: int,
    dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None, **others: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """aten::_flash_attention_forward."""
    assert not return_debug_mask
    assert all(x is None for x in others.values()), f"not for training: {others}"
    _check(q, k, v, dropout_p, window_size_left, window_size_right)
    if cum_seq_q is not None and max_q == 1 and q.shape[-2] > k.shape[-2] and not dropout_p:
        batch = cum_seq_q.shape[0] - 1
        if q.shape[0] != batch:
            raise RuntimeError(f"shape '[{batch}, ...]' is invalid for input of {q.shape[0]} rows")
        cum_seq_q = torch.arange(batch + 1, dtype=torch.int32)
    sides = _window(window_size_left, window_size_right, is_causal, max_k)
    rng = (torch.randint(2**62, (2,)) if dropout_p else torch.tensor([7, 11])).view(torch.uint64)
    rows = flat(q)
    out = plain.poisoned(*rows.shape, dtype=q.dtype)
    lse = plain.poisoned(q.shape[-2], rows.shape[0], dtype=torch.float32)
    for i, (one, two) in enumerate(_pairs(q, k, cum_seq_q, cum_seq_k, max_q, max_k)):
        o, l = plain.forward(
            rows[one.rows], flat(k)[two.rows], flat(v)[two.rows], _seen(one, two, sides), scale or q.shape[-1] ** -0.5,
            factor=_factor(q, i, one, two, rng, dropout_p),
        )  # fmt: skip
        out[one.covered] = o[: one.written].to(q.dtype)
        lse[:, one.covered] = l.masked_fill(l == -plain.INF, plain.INF)[:, : one.written]
    unused = torch.zeros((), dtype=torch.uint64)
    return out.view(q.shape), shaped_lse(lse, q), rng, unused, q.new_empty(0)


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
    check_aligned(grad_out, out)
    assert logsumexp.shape == ((q.shape[-2], q.shape[0]) if q.ndim == 3 else (q.shape[0], q.shape[2], q.shape[1]))
    assert logsumexp.dtype == torch.float32
    assert logsumexp.is_contiguous(), "it is read as it lies in memory"
    lse = flat_lse(logsumexp)
    grads = [plain.poisoned(*flat(x).shape, dtype=x.dtype) for x in (q, k, v)]
    sides = _window(window_size_left, window_size_right, is_causal, max_k)
    for i, (one, two) in enumerate(_pairs(q, k, cum_seq_q, cum_seq_k, max_q, max_k)):
        dq, dk, dv, _ = plain.backward(
            flat(q)[one.rows], flat(k)[two.rows], flat(v)[two.rows], flat(out)[one.rows], lse[:, one.rows],
            flat(grad_out)[one.rows], _seen(one, two, sides), scale or q.shape[-1] ** -0.5,
            factor=_factor(q, i, one, two, rng_state, dropout_p),
        )  # fmt: skip
        # exp(masked score + inf) is not 0; a sequence without keys has no score, and its dq was measured to be 0.
        if two.length and (lse[:, one.rows] == -plain.INF).any():
            dq, dk, dv = dq * NAN, dk * NAN, dv * NAN
        for grad, where, x in zip(grads, (one, two, two), (dq, dk, dv), strict=True):
            grad[where.covered] = x[: where.written].to(grad.dtype)
    return tuple(grad.view(x.shape) for grad, x in zip(grads, (q, k, v), strict=True))
