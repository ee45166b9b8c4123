"""The arithmetic of the doubles: plain float32 attention of one sequence, knowing nothing of the package under test.

A kernel's conventions (layouts, lse of empty rows, what is not written) are each double's own affair.
Legend: S query rows, K key rows, H heads, G kv heads, D head_dim, V head_dim_v.
"""

from __future__ import annotations

from itertools import count

import torch
from torch import Tensor

INF = float("inf")


def visible(rows: int, keys: int, left: int | None, right: int | None, *, top_left: bool = False) -> Tensor:
    """bool (S, K): keys from ``left`` before to ``right`` after a row's position; None is unbounded."""
    position = torch.arange(rows)[:, None] + (0 if top_left else keys - rows)
    distance = torch.arange(keys)[None, :] - position
    seen = torch.ones(rows, keys, dtype=torch.bool)
    if left is not None:
        seen &= distance >= -left
    if right is not None:
        seen &= distance <= right
    return seen


def _heads_first(x: Tensor, heads: int) -> Tensor:
    """(S, G, D) to float32 (H, S, D), each kv head as often as it is used."""
    return x.float().transpose(0, 1).repeat_interleave(heads // x.shape[1], dim=0)


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(before, after) softcap and bias, (H, S, K)."""
    raw = _heads_first(q, q.shape[1]) @ _heads_first(k, q.shape[1]).transpose(1, 2) * scale
    scores = softcap * torch.tanh(raw / softcap) if softcap else raw
    return raw, scores if bias is None else scores + bias.float()


def forward(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float = 0.0, sink: Tensor | None = None,
    bias: Tensor | None = None, factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) as (S, H, V) and (H, S); lse is -inf and out 0 for a row that sees no key.

    factor is dropout's, (H, S, K): 0, or 1 / (1 - p).
    """
    _, scores = _scores(q, k, scale, softcap, bias)
    scores = scores.masked_fill(~seen, -INF)
    lse = torch.logsumexp(scores, -1)
    if sink is not None:
        lse = torch.logaddexp(lse, sink.float()[:, None])
    p = torch.exp(scores - lse.masked_fill(lse == -INF, 0.0).unsqueeze(-1))
    p = p if factor is None else p * factor
    return (p @ _heads_first(v, q.shape[1])).transpose(0, 1), lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, seen: Tensor, scale: float,
    softcap: float = 0.0, dlse: Tensor | None = None, bias: Tensor | None = None, factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dscores). lse is what the kernel was given, (H, S); with +inf a row counts for nothing."""
    heads, kv_heads = q.shape[1], k.shape[1]
    raw, scores = _scores(q, k, scale, softcap, bias)
    p = torch.exp(scores - lse.float().unsqueeze(-1)).masked_fill(~seen, 0.0)
    do, values = _heads_first(dout, heads), _heads_first(v, heads)
    delta = (dout.float() * out.float()).sum(-1).transpose(0, 1)
    if dlse is not None:
        delta = delta - dlse.float()
    dp = do @ values.transpose(1, 2)
    dscores = p * ((dp if factor is None else dp * factor) - delta.unsqueeze(-1))
    draw = dscores * (1 - torch.tanh(raw / softcap) ** 2) if softcap else dscores
    draw = draw * scale
    dq = draw @ _heads_first(k, heads)
    dk = draw.transpose(1, 2) @ _heads_first(q, heads)
    dv = (p if factor is None else p * factor).transpose(1, 2) @ do
    dk, dv = (x.unflatten(0, (kv_heads, -1)).sum(1) for x in (dk, dv))
    return dq.transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1), dscores


def alibi(slopes: Tensor, rows: int, keys: int, *, columns_only: bool = False) -> Tensor:
    """The bias of ALiBi, (H, S, K), for bottom-right positions; or slope * column, alike in every row."""
    column = torch.arange(keys)
    if columns_only:
        return (slopes[:, None] * column)[:, None].expand(-1, rows, -1)
    position = torch.arange(rows)[:, None] + keys - rows
    return -slopes[:, None, None] * (position - column).abs()


def dropout(seed: tuple[int, ...], shape: tuple[int, int, int], rate: float) -> Tensor:
    """Factors (H, S, K) that the seed alone decides. Kernels compare 8 random bits: the rate is rounded to that."""
    generator = torch.Generator().manual_seed(hash(seed) & 0x7FFFFFFFFFFFFFFF)
    bits = torch.randint(0, 256, shape, generator=generator)
    return (bits <= int((1.0 - rate) * 255)).float() / (1.0 - rate)


_runs = count()


def jitter(x: Tensor) -> Tensor:
    """x as sums in no fixed order leave it: a little different at every call."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(next(_runs)))
    return x * (1 + 5e-5 * noise)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """What an allocator hands out, at its worst."""
    return torch.full(shape, float("nan"), dtype=dtype)
