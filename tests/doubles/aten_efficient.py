"""Doubles of torch's memory-efficient attention ops, for CPU tensors.

Conventions measured on an H200 with torch 2.11: tensors are (B, S, H, D), with as many kv heads as heads; lse is
padded with +inf to a multiple of 32; a bias row begins at a multiple of 8 elements; custom_mask_type is 0 for none, 1
for top-left and 2 for bottom-right causal; window_size is left + 1 and counts only with a causal type, and wrongly so
in backward unless lengths are equal; bottom-right causal with more queries than keys is wrong for rows without keys.

Read in torch's C++ (attention.cu, attention_backward.cu, mem_eff_attention/kernel_forward.h and kernel_backward.h):

- Packed, the batch is 1 and lse (N, H, max_seqlen_q), padded. A sequence without keys gets no out where head_dim_v is
  wide, and no dq. Backward divides by the number of a sequence's queries where it splits keys. No bias.
- Dropout draws from torch's generator; its state is two int64 scalars, on the CPU outside of CUDA graphs. The packed
  forward takes the number of keys as 0 where it indexes random numbers, and its backward does not.
- A block of one query against keys with stride 0 for heads, without lse, is taken for one query in all: reads past the
  last of more than 32 heads, and (measured: 65 queries, blocks of 64) is wrong where other blocks came before it.
- The keys may have stride 0 for heads. out is read as contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from doubles import plain
from doubles.aten_flash import check_aligned
from doubles.rows import Sequence, flat, is_offsets, sequences

INF, NAN = float("inf"), float("nan")


def register(library: torch.library.Library) -> None:
    """Give the ops a CPU implementation, as long as the library lives."""
    library.impl("_efficient_attention_forward", forward, "CPU")
    library.impl("_efficient_attention_backward", backward, "CPU")


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None) -> None:
    assert q.dtype in (torch.float16, torch.bfloat16, torch.float32)
    assert q.dtype == k.dtype == v.dtype
    assert q.shape[0] == k.shape[0] == v.shape[0]
    assert q.shape[2] == k.shape[2] == v.shape[2], "as many kv heads as heads"
    assert q.shape[-1] == k.shape[-1]
    check_aligned(q, k, v)
    assert 0 not in (*q.shape, *k.shape), "an empty problem"
    count = q.shape[0]
    assert (cu_q is None) == (cu_k is None)
    if cu_q is not None and cu_k is not None:
        assert q.shape[0] == 1, "cu_seqlen only supports batch_size=1"
        count = cu_q.shape[0] - 1
        assert is_offsets(cu_q, sequences=count)
        assert is_offsets(cu_k, sequences=count)
        assert bias is None, "cu seqlen + bias not supported"
    assert count <= 65535, "invalid configuration argument"
    if bias is not None:
        assert bias.dtype == q.dtype, "invalid dtype for bias - should match query's dtype"
        assert bias.shape == (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        assert bias.stride(2) % 8 == 0, "attn_bias is not correctly aligned (strideM)"
        assert bias.stride(3) == 1


def _seen(rows: int, keys: int, kind: int, window: int | None) -> Tensor:
    assert kind in (0, 1, 2)
    right = None if kind == 0 else 0
    left = None
    if window is not None:
        assert kind != 0, "a window counts only with a causal type"
        left = window - 1
    return plain.visible(rows, keys, left, right, top_left=kind == 1)


Pair = tuple[int, Sequence, Sequence]


def _pairs(
    q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int
) -> Iterator[Pair]:  # fmt: skip
    both = zip(sequences(q, cu_q, None, max_q), sequences(k, cu_k, None, max_k), strict=True)
    return ((i, one, two) for i, (one, two) in enumerate(both))


def _factor(q: Tensor, pair: Pair, state: tuple[int, ...], dropout_p: float) -> Tensor | None:
    if not dropout_p:
        return None
    i, one, two = pair
    return plain.dropout((*state, i), (q.shape[2], one.length, two.length), dropout_p)


def forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, max_seqlen_q: int | None, max_seqlen_k: int | None, dropout_p: float,
    custom_mask_type: int, compute_log_sumexp: bool = False, *, scale: float | None = None,
    seqlen_k: Tensor | None = None, window_size: int | None = None,
) -> tuple[object, ...]:  # fmt: skip
    """aten::_efficient_attention_forward."""
    _check(query, key, value, bias, cu_seqlens_q, cu_seqlens_k)
    assert seqlen_k is None, "not for training"
    packed, (batch, rows, heads, _) = cu_seqlens_q is not None, query.shape
    shares_keys = key.stride(2) == value.stride(2) == 0 and heads > 1
    if shares_keys and (packed or rows == 1) and not compute_log_sumexp and window_size is None:
        assert heads <= 32, "reads past the last head"
    state = torch.randint(2**31, (2,)) if dropout_p else torch.tensor([3, 5])
    longest = max_seqlen_q if packed else rows
    assert longest is not None
    count, width = (batch if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1), -(-longest // 32) * 32
    out = plain.poisoned(batch * rows, heads, value.shape[-1], dtype=query.dtype)
    lse = plain.poisoned(count, heads, width, dtype=torch.float32)
    drawn = (*state.tolist(), *((0,) if packed else ()))
    for pair in _pairs(query, key, cu_seqlens_q, cu_seqlens_k, longest, key.shape[1]):
        i, one, two = pair
        o, l = plain.forward(
            flat(query)[one.rows], flat(key)[two.rows], flat(value)[two.rows],
            _seen(one.length, two.length, custom_mask_type, window_size), scale or query.shape[-1] ** -0.5,
            bias=None if bias is None else bias[i], factor=_factor(query, pair, drawn, dropout_p),
        )  # fmt: skip
        if shares_keys and not compute_log_sumexp and window_size is None and one.length % 64 == 1 and one.length > 1:
            o[-1] = NAN
        o[(l == -INF).t()], l[l == -INF] = NAN, NAN  # 0 / 0 for a row that sees no key
        if custom_mask_type == 2 and one.length > two.length:
            o[: one.length - two.length] = 1.0
        out[one.covered] = o[: one.written].to(out.dtype)
        lse[i, :, : one.written] = l[:, : one.written]
        lse[i, :, one.written : -(-one.written // 32) * 32] = INF
    if not compute_log_sumexp:
        lse = lse[..., :0]
    return out.view(*query.shape[:3], -1), lse, state[0], state[1], longest, max_seqlen_k or key.shape[1]


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, out: Tensor,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, logsumexp: Tensor,
    dropout_p: float, philox_seed: Tensor, philox_offset: Tensor, custom_mask_type: int, bias_requires_grad: bool, *,
    scale: float | None = None, num_splits_key: int | None = None, window_size: int | None = None,
    shared_storage_dqdkdv: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """aten::_efficient_attention_backward."""
    _check(query, key, value, bias, cu_seqlens_q, cu_seqlens_k)
    assert out.is_contiguous()
    assert 0 < max_seqlen_q <= query.shape[1]
    assert 0 < max_seqlen_k <= key.shape[1]
    packed = cu_seqlens_q is not None
    count = query.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    if packed:
        assert num_splits_key == 1, "divides by the queries of a sequence that may have none"
    else:
        assert (max_seqlen_q, max_seqlen_k) == (query.shape[1], key.shape[1])
    assert (philox_seed.dtype, philox_offset.dtype) == (torch.int64, torch.int64)
    assert philox_seed.shape == philox_offset.shape == ()
    assert logsumexp.shape == (count, query.shape[2], -(-max_seqlen_q // 32) * 32)
    assert logsumexp.stride(2) == 1
    assert all(s % 8 == 0 for s in logsumexp.stride()[:2]), "LSE is not correctly aligned"
    check_aligned(grad_out)
    assert not bias_requires_grad or bias is not None
    state = (int(philox_seed), int(philox_offset), *((max_seqlen_k,) if packed else ())) if dropout_p else ()
    grads = [plain.poisoned(*flat(x).shape, dtype=x.dtype) for x in (query, key, value)]
    dbias = query.new_empty(0) if bias is None else plain.poisoned(*bias.shape, dtype=bias.dtype)
    for pair in _pairs(query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        i, one, two = pair
        lse = logsumexp[i, :, : one.length]
        lse = torch.nn.functional.pad(lse, (0, one.length - lse.shape[-1]), value=INF)
        *got, ds = plain.backward(
            flat(query)[one.rows], flat(key)[two.rows], flat(value)[two.rows], flat(out)[one.rows], lse,
            flat(grad_out)[one.rows], _seen(one.length, two.length, custom_mask_type, window_size),
            scale or query.shape[-1] ** -0.5, bias=None if bias is None else bias[i],
            factor=_factor(query, pair, state, dropout_p),
        )  # fmt: skip
        if (lse == -INF).any() or (window_size is not None and one.length != two.length):
            got = [x * NAN for x in got]
        if two.length:
            grads[0][one.covered] = got[0][: one.written].to(query.dtype)
        for grad, x in zip(grads[1:], got[1:], strict=True):
            grad[two.rows] = x.to(query.dtype)
        if bias is not None:
            dbias[i] = ds.to(bias.dtype)
    dq, dk, dv = (grad.view(x.shape) for grad, x in zip(grads, (query, key, value), strict=True))
    if not bias_requires_grad:
        return dq, dk, dv, query.new_empty(0)
    hidden = ~_seen(query.shape[1], key.shape[1], custom_mask_type, window_size)
    dbias = dbias.masked_fill(hidden, NAN)  # not written
    return dq, dk, dv, torch.nn.functional.pad(dbias, (0, -dbias.shape[-1] % 16))[..., : dbias.shape[-1]]
