"""What masks, bias and positions come to as one tensor added to the scores: for kernels that take only that.

Legend: B batch, S query rows, K key rows, H heads; Bb and Hb are B and H, or 1 where all are alike.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anyattn._call import Call, Spec

INF = float("inf")


class Additive(NamedTuple):
    """Values added to the scores, and what they leave without a key."""

    values: Tensor
    """(Bb, Hb, S, K), -inf where nothing may be seen; rows begin at a multiple of 8 elements."""
    dead: Tensor
    """bool (Bb, Hb, S): rows that see no key, causality counted in."""


def distance(spec: Spec, rows: int, keys: int, device: torch.device) -> Tensor:
    """(S, K): key position - query position."""
    shift = 0 if spec.top_left else keys - rows
    return torch.arange(keys, device=device)[None] - torch.arange(rows, device=device)[:, None] - shift


def position_mask(spec: Spec, rows: int, keys: int, device: torch.device) -> Tensor:
    """(S, K): what causal and window let through."""
    found = distance(spec, rows, keys, device)
    visible = torch.ones_like(found, dtype=torch.bool)
    if spec.left is not None:
        visible &= found >= -spec.left
    if spec.right is not None:
        visible &= found <= spec.right
    return visible


def additive(call: Call) -> Additive | None:
    """Bias and mask of a dense call, in q's dtype; None without either. Positions are the kernel's to mask."""
    if call.bias is None and call.mask is None:
        return None
    rows, keys = call.q.shape[1], call.k.shape[1]
    alike = torch.broadcast_shapes(*(x.shape for x in (call.bias, call.mask) if x is not None))
    values = torch.zeros(*alike[:2], rows, -(-keys // 8) * 8, dtype=call.q.dtype, device=call.q.device)[..., :keys]
    if call.bias is not None:
        values += call.bias
    if call.mask is not None:
        values.masked_fill_(~call.mask, -INF)
    visible = values != -INF
    if call.spec.left is not None or call.spec.right is not None:
        visible = visible & position_mask(call.spec, rows, keys, call.q.device)
    return Additive(values, ~visible.any(-1))


def without_dead_rows(out: Tensor, dead: Tensor) -> Tensor:
    """(B, S, H, D) with zeros in the rows that see no key."""
    return out.masked_fill(dead.transpose(1, 2).unsqueeze(-1), 0.0)
