"""Doubles of torch's cuDNN attention ops, for CPU tensors.

Conventions measured on an H200 with torch 2.11 and cuDNN 9.19: tensors are (B, H, S, D); causal is top-left; lse is
(B, H, S, 1), float32. GQA is taken as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from doubles import plain


def register(library: torch.library.Library) -> None:
    """Give the ops a CPU implementation, as long as the library lives."""
    library.impl("_scaled_dot_product_cudnn_attention", forward, "CPU")
    library.impl("_scaled_dot_product_cudnn_attention_backward", backward, "CPU")


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout_p: float) -> None:
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.dtype == k.dtype == v.dtype
    assert q.shape[-1] == k.shape[-1]
    assert q.shape[-1] % 8 == v.shape[-1] % 8 == 0
    assert max(q.shape[-1], v.shape[-1]) <= 256
    assert q.shape[1] % k.shape[1] == 0
    assert bias is None
    assert dropout_p == 0.0
    assert 0 not in (*q.shape, *k.shape), "an empty problem"


def _seen(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    return plain.visible(q.shape[2], k.shape[2], None, 0 if causal else None, top_left=True)


def forward(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None, compute_log_sumexp: bool,
    dropout_p: float = 0.0, is_causal: bool = False, return_debug_mask: bool = False, *, scale: float | None = None,
) -> tuple[object, ...]:  # fmt: skip
    """aten::_scaled_dot_product_cudnn_attention."""
    _check(query, key, value, attn_bias, dropout_p)
    assert not return_debug_mask
    seen, factor = _seen(query, key, is_causal), scale or query.shape[-1] ** -0.5
    pieces = [
        plain.forward(*(x[i].transpose(0, 1) for x in (query, key, value)), seen, factor) for i in range(query.shape[0])
    ]
    out = torch.stack([o.transpose(0, 1) for o, _ in pieces]).to(query.dtype)
    lse = torch.stack([l for _, l in pieces]).unsqueeze(-1) if compute_log_sumexp else query.new_empty(0)
    seed, offset, none = torch.tensor(3), torch.tensor(5), query.new_empty(0)
    return out, lse, none.clone(), none.clone(), query.shape[2], key.shape[2], seed, offset, none


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, philox_seed: Tensor,
    philox_offset: Tensor, attn_bias: Tensor | None, cum_seq_q: Tensor | None, cum_seq_k: Tensor | None, max_q: int,
    max_k: int, dropout_p: float, is_causal: bool, *, scale: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """aten::_scaled_dot_product_cudnn_attention_backward."""
    # Seen on an H200 under torch.compile: the op keeps a plan by the strides of q, k and v alone.
    order = sorted(range(4), key=query.stride, reverse=True)
    for x in (out, grad_out):
        assert x.permute(order).is_contiguous(), "out and its gradient are laid out in memory as q"
    _check(query, key, value, attn_bias, dropout_p)
    assert cum_seq_q is cum_seq_k is None
    assert (max_q, max_k) == (query.shape[2], key.shape[2])
    assert (philox_seed.dtype, philox_offset.dtype) == (torch.int64, torch.int64)  # read only with dropout
    assert logsumexp.shape == (*query.shape[:3], 1)
    assert logsumexp.dtype == torch.float32
    assert grad_out.shape == out.shape == (*query.shape[:3], value.shape[-1])
    seen, factor = _seen(query, key, is_causal), scale or query.shape[-1] ** -0.5
    found = []
    for i in range(query.shape[0]):
        q, k, v, o, do = (x[i].transpose(0, 1) for x in (query, key, value, out, grad_out))
        found.append(plain.backward(q, k, v, o, logsumexp[i, ..., 0], do, seen, factor)[:3])
    return tuple(torch.stack([x.transpose(0, 1) for x in side]).to(query.dtype) for side in zip(*found, strict=True))
