"""Doubles of torch's cuDNN attention ops, for CPU tensors.

Conventions measured on an H200 with torch 2.11 and cuDNN 9.19: tensors are (B, H, S, D); causal is top-left; lse is
(B, H, S, 1), float32. GQA is taken as it is.

Read in torch's C++ (attention.cu, cudnn/MHA.cpp, sdp_utils.cpp): a bias is (B or 1, H or 1, S, K), in q's dtype, never
with causal, and -inf in it gives NaN; it gets no gradient. Dropout draws from torch's generator, its state is two int64
scalars on the device, and its rate is rounded to a multiple of 1/16. No single key; no single query with dropout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from doubles import plain
from doubles.aten_flash import check_aligned


def register(library: torch.library.Library) -> None:
    """Give the ops a CPU implementation, as long as the library lives."""
    library.impl("_scaled_dot_product_cudnn_attention", forward, "CPU")
    library.impl("_scaled_dot_product_cudnn_attention_backward", backward, "CPU")


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout_p: float, causal: bool) -> None:
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.dtype == k.dtype == v.dtype
    assert q.shape[-1] == k.shape[-1]
    assert q.shape[-1] % 8 == v.shape[-1] % 8 == 0
    assert max(q.shape[-1], v.shape[-1]) <= 256
    assert q.shape[1] % k.shape[1] == 0
    check_aligned(q, k, v)
    assert k.shape[2] > 1, "cudnn SDPA does not support key/value sequence length 1."
    assert not dropout_p or q.shape[2] > 1, "cudnn SDPA does not support query sequence length 1 with dropout."
    assert q.shape[0] <= 65535
    assert 0 not in (*q.shape, *k.shape), "an empty problem"
    if bias is not None:
        assert bias.dtype == q.dtype
        assert not causal
        assert bias.shape[2:] == (q.shape[2], k.shape[2])
        assert bias.shape[0] in (1, q.shape[0])
        assert bias.shape[1] in (1, q.shape[1])


def _seen(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    return plain.visible(q.shape[2], k.shape[2], None, 0 if causal else None, top_left=True)


def _terms(q: Tensor, k: Tensor, i: int, bias: Tensor | None, dropout_p: float, state: list[int]) -> dict[str, Any]:
    """Bias and dropout's factor of a batch entry."""
    factor = None
    if dropout_p:
        rounded = int(dropout_p * 16) / 16
        factor = plain.dropout((*state, i), (q.shape[1], q.shape[2], k.shape[2]), rounded) * (1 - rounded)
        factor = factor / (1 - dropout_p)
    if bias is not None:
        bias = bias[i % bias.shape[0]]
        bias = bias.masked_fill(bias == -plain.INF, float("nan"))
    return {"bias": bias, "factor": factor}


def forward(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None, compute_log_sumexp: bool,
    dropout_p: float = 0.0, is_causal: bool = False, return_debug_mask: bool = False, *, scale: float | None = None,
) -> tuple[object, ...]:  # fmt: skip
    """aten::_scaled_dot_product_cudnn_attention."""
    _check(query, key, value, attn_bias, dropout_p, is_causal)
    assert not return_debug_mask
    state = torch.randint(2**31, (2,)) if dropout_p else torch.tensor([3, 5])
    seen, factor = _seen(query, key, is_causal), scale or query.shape[-1] ** -0.5
    pieces = [
        plain.forward(
            *(x[i].transpose(0, 1) for x in (query, key, value)), seen, factor,
            **_terms(query, key, i, attn_bias, dropout_p, state.tolist()),
        )
        for i in range(query.shape[0])
    ]  # fmt: skip
    out = torch.stack([o.transpose(0, 1) for o, _ in pieces]).to(query.dtype)
    lse = torch.stack([l for _, l in pieces]).unsqueeze(-1) if compute_log_sumexp else query.new_empty(0)
    none = query.new_empty(0)
    return out, lse, none.clone(), none.clone(), query.shape[2], key.shape[2], state[0], state[1], none


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
    _check(query, key, value, attn_bias, dropout_p, is_causal)
    assert cum_seq_q is cum_seq_k is None
    assert (max_q, max_k) == (query.shape[2], key.shape[2])
    assert (philox_seed.dtype, philox_offset.dtype) == (torch.int64, torch.int64)
    assert philox_seed.shape == philox_offset.shape == ()
    assert logsumexp.isfinite().all(), "what cuDNN makes of an infinite lse nobody has read"
    assert logsumexp.shape == (*query.shape[:3], 1)
    assert logsumexp.dtype == torch.float32
    assert grad_out.shape == out.shape == (*query.shape[:3], value.shape[-1])
    seen, factor = _seen(query, key, is_causal), scale or query.shape[-1] ** -0.5
    found = []
    for i in range(query.shape[0]):
        q, k, v, o, do = (x[i].transpose(0, 1) for x in (query, key, value, out, grad_out))
        terms = _terms(query, key, i, attn_bias, dropout_p, [int(philox_seed), int(philox_offset)])
        found.append(plain.backward(q, k, v, o, logsumexp[i, ..., 0], do, seen, factor, **terms)[:3])
    return tuple(torch.stack([x.transpose(0, 1) for x in side]).to(query.dtype) for side in zip(*found, strict=True))
