"""Under ``torch.compile``: masks computed on the device, for nothing may be read from tensors there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyattn.integrations._layout import Pattern, Shape, may_restart


def traced_documents(shape: Shape, pattern: Pattern, positions: Any) -> Tensor | None:
    """A mask that keeps documents apart, or None where positions cannot restart."""
    if not may_restart(positions, shape) or shape.queries != shape.keys:
        return None
    assert isinstance(positions, Tensor)
    step = positions[:, 1:] - positions[:, :-1]
    documents = torch.nn.functional.pad((step != 1).cumsum(1), (1, 0))
    row = torch.arange(shape.queries, device=positions.device)
    return (documents[:, None, :, None] == documents[:, None, None, :]) & _visible(pattern, row, row)


def traced_padding(mask: Tensor, shape: Shape, pattern: Pattern) -> Tensor:
    """A complete mask from a 2-D one that was made outside: ``generate`` does so for static caches.

    The last query stands where the last real token does, for the rest of a static cache holds nothing yet. Rows of an
    integer mask see those of their own number.
    """
    numbers = torch.nn.functional.pad(mask[:, -shape.keys :], (0, max(shape.keys - mask.shape[1], 0)))
    real = numbers != 0
    key = torch.arange(shape.keys, device=mask.device)
    last = torch.where(real.any(0), key, -1).max()
    query = torch.arange(shape.queries, device=mask.device) + last + 1 - shape.queries
    visible = real[:, None, None] & _visible(pattern, query, key)
    if mask.dtype == torch.bool:
        return visible
    own = numbers.index_select(1, query.clamp(min=0))
    return visible & (own[:, None, :, None] == numbers[:, None, None])


def _visible(pattern: Pattern, query: Tensor, key: Tensor) -> Tensor:
    """(Q, K): what position allows."""
    distance = key[None] - query[:, None]
    visible = torch.ones_like(distance, dtype=torch.bool)
    if pattern.causal:
        visible = visible & (distance <= 0)
    return visible if pattern.window is None else visible & (distance.abs() <= pattern.window)
