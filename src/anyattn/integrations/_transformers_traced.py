"""Under ``torch.compile``: masks computed on the device, for nothing may be read from tensors there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyattn.integrations._layout import Pattern, Shape, may_restart


def traced_documents(shape: Shape, pattern: Pattern, positions: Any, real: Tensor | None = None) -> Tensor | None:
    """A mask that keeps documents apart, or None where positions cannot restart.

    Args:
        shape: of the call.
        pattern: what position allows beside.
        positions: of the queries, (B or 1, Q); other tensors and things tell no documents apart.
        real: bool (B, Q). Positions of padding are not looked at; a real row goes on where the last real row was, or as
            many rows later as it stands. None: no padding.
    """
    if not may_restart(positions, shape) or shape.queries != shape.keys:
        return None
    assert isinstance(positions, Tensor)
    row = torch.arange(shape.queries, device=positions.device)
    if real is None:
        new = positions[:, 1:] - positions[:, :-1] != 1
    else:
        positions = positions.expand(shape.batch, -1)
        last = torch.where(real, row, -1).cummax(1).values[:, :-1]  # the last real row before each but the first
        step = positions[:, 1:] - positions.gather(1, last.clamp(min=0))
        new = real[:, 1:] & (last >= 0) & (step != 1) & (step != row[1:] - last)
    documents = torch.nn.functional.pad(new.cumsum(1), (1, 0))
    return (documents[:, None, :, None] == documents[:, None, None, :]) & _visible(pattern, row, row)


def apart(mask: Tensor, shape: Shape, positions: Any) -> Tensor | None:
    """A complete mask made for position and padding, (B, 1, Q, K), that keeps documents apart too.

    None where positions cannot restart. What is padding the mask itself says: no row of it sees itself.
    """
    real = mask[:, 0].diagonal(dim1=-2, dim2=-1) if mask.shape[-1] == shape.queries else None
    documents = traced_documents(shape, Pattern(causal=False), positions, real)
    return None if documents is None else mask[..., : shape.keys] & documents


def traced_padding(mask: Tensor, shape: Shape, pattern: Pattern) -> Tensor:
    """A complete mask from a 2-D one that was made outside: layers that are compiled one by one are given such.

    The last query stands at the end of the mask, for the rest of a static cache holds nothing yet. Rows of an integer
    mask see those of their own number.
    """
    numbers = torch.nn.functional.pad(mask[:, -shape.keys :], (0, max(shape.keys - mask.shape[1], 0)))
    real = numbers != 0
    key = torch.arange(shape.keys, device=mask.device)
    end = keys_seen(mask.shape[1], shape)
    query = torch.arange(end - shape.queries, end, device=mask.device)
    visible = real[:, None, None] & _visible(pattern, query, key)
    if mask.dtype == torch.bool:
        return visible
    own = numbers.index_select(1, query.clamp(min=0))
    return visible & (own[:, None, :, None] == numbers[:, None, None])


def keys_seen(width: int, shape: Shape) -> int:
    """How many keys hold something, by the width of a 2-D mask that counts from the first token on.

    A static cache has more rows than that, a sliding cache has dropped the first keys. Queries are keys in
    self-attention, so there are no fewer: a mask that ends before them calls the last ones padding.
    """
    return max(min(width, shape.keys), min(shape.queries, shape.keys))


def _visible(pattern: Pattern, query: Tensor, key: Tensor) -> Tensor:
    """(Q, K): what position allows."""
    distance = key[None] - query[:, None]
    visible = torch.ones_like(distance, dtype=torch.bool)
    if pattern.causal:
        visible = visible & (distance <= 0)
    return visible if pattern.window is None else visible & (distance.abs() <= pattern.window)
