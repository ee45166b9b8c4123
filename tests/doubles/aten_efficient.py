"""Doubles of torch's memory-efficient attention ops, for CPU tensors.

Conventions measured on an H200 with torch 2.11: tensors are (B, S, H, D), with as many kv heads as heads; lse is
padded with +inf to a multiple of 32; a bias row begins at a multiple of 8 elements; custom_mask_type is 0 for none, 1
for top-left and 2 for bottom-right causal; window_size is left + 1 and counts only with a causal type, and wrongly so
in backward unless lengths are equal; bottom-right causal with more queries than keys is wrong for rows without keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from doubles import plain

NAN = float("nan")


def register(library: torch.library.Library) -> None:
    """Give the ops a CPU implementation, as long as the library lives."""
    library.impl("_efficient_attention_forward", forward, "CPU")
    library.impl("_efficient_attention_backward", backward, "CPU")


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout_p: float) -> None:
    assert q.dtype in (torch.float16, torch.bfloat16, torch.float32)
    assert q.dtype == k.dtype == v.dtype
    assert q.shape[2] == k.shape[2] == v.shape[2], "as many kv heads as heads"
    assert q.shape[-1] == k.shape[-1]
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    assert dropout_p == 0.0
    assert 0 not in (*q.shape, *k.shape), "an empty problem"
    if bias is not None:
        assert bias.dtype == q.dtype, "invalid dtype for bias - should match query's dtype"
        assert bias.shape == (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        assert bias.stride(2) % 8 == 0, "attn_bias is not correctly aligned (strideM)"
        assert bias.stride(3) == 1


def _seen(q: Tensor, k: Tensor, kind: int, window: int | None) -> Tensor:
    assert kind in (0, 1, 2)
    right = None if kind == 0 else 0
    left = None
    if window is not None:
        assert kind != 0, "a window counts only with a causal type"
        left = window - 1
    return plain.visible(q.shape[1], k.shape[1], left, right, top_left=kind == 1)


def _wrong(q: Tensor, k: Tensor, kind: int) -> bool:
    return kind == 2 and q.shape[1] > k.shape[1]


def forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, max_seqlen_q: int | None, max_seqlen_k: int | None, dropout_p: float,
    custom_mask_type: int, compute_log_sumexp: bool = False, *, scale: float | None = None,
    seqlen_k: Tensor | None = None, window_size: int | None = None,
) -> tuple[object, ...]:  # fmt: skip
    """aten::_efficient_attention_forward."""
    _check(query, key, value, bias, dropout_p)
    assert cu_seqlens_q is cu_seqlens_k is seqlen_k is None
    seen, factor = _seen(query, key, custom_mask_type, window_size), scale or query.shape[-1] ** -0.5
    pieces = [
        plain.forward(query[i], key[i], value[i], seen, factor, bias=None if bias is None else bias[i])
        for i in range(query.shape[0])
    ]
    out = torch.stack([o for o, _ in pieces]).to(query.dtype)
    lse = torch.stack([l for _, l in pieces])
    out[(lse == -plain.INF).transpose(1, 2)] = NAN  # 0 / 0 for a row that sees no key
    lse = lse.masked_fill(lse == -plain.INF, NAN)
    if _wrong(query, key, custom_mask_type):
        out[:, : query.shape[1] - key.shape[1]] = 1.0
    rows = query.shape[1]
    lse = torch.nn.functional.pad(lse, (0, -rows % 32), value=plain.INF)
    if not compute_log_sumexp:
        lse = lse[..., :0]
    return out, lse, torch.tensor(3), torch.tensor(5), rows, key.shape[1]


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, out: Tensor,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, logsumexp: Tensor,
    dropout_p: float, philox_seed: Tensor, philox_offset: Tensor, custom_mask_type: int, bias_requires_grad: bool, *,
    scale: float | None = None, num_splits_key: int | None = None, window_size: int | None = None,
    shared_storage_dqdkdv: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """aten::_efficient_attention_backward."""
    _check(query, key, value, bias, dropout_p)
    assert cu_seqlens_q is cu_seqlens_k is None
    assert (max_seqlen_q, max_seqlen_k) == (query.shape[1], key.shape[1])
    assert (philox_seed.dtype, philox_offset.dtype) == (torch.int64, torch.int64)  # read only with dropout
    assert logsumexp.shape == (query.shape[0], query.shape[2], -(-query.shape[1] // 32) * 32)
    assert (logsumexp[..., query.shape[1] :] == plain.INF).all()
    assert grad_out.stride(-1) == 1
    assert not bias_requires_grad or bias is not None
    seen, factor = _seen(query, key, custom_mask_type, window_size), scale or query.shape[-1] ** -0.5
    found = []
    for i in range(query.shape[0]):
        lse = logsumexp[i, :, : query.shape[1]]
        got = plain.backward(
            query[i], key[i], value[i], out[i], lse, grad_out[i], seen, factor, bias=None if bias is None else bias[i]
        )
        if (lse == -plain.INF).any() or (window_size is not None and query.shape[1] != key.shape[1]):
            got = tuple(x * NAN for x in got)
        found.append(got)
    dq, dk, dv, dbias = (torch.stack(list(side)).to(query.dtype) for side in zip(*found, strict=True))
    if not bias_requires_grad:
        return dq, dk, dv, query.new_empty(0)
    return dq, dk, dv, torch.nn.functional.pad(dbias, (0, -dbias.shape[-1] % 16))[..., : dbias.shape[-1]]
