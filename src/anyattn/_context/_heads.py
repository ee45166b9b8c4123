"""Exchanging heads for sequence: each rank of a head group gets all of the group's rows for a part of the heads.

Key heads are repeated only as far as that needs. With H query heads, Hk key heads and U ranks, a *slot* is a key head
of gcd(H / U, H / Hk) query heads, so that every rank has slots of one width: slot j of rank u is key head
(u * H / U + j * width) // (H / Hk).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Any

import torch
from torch import Tensor

from anyattn._context import _rows
from anyattn._context._exchange import Arrival, exchange


@dataclass(frozen=True)
class HeadShares:
    """Which heads each rank of a head group computes."""

    ranks: int
    num_heads: int
    num_kv_heads: int

    @property
    def heads(self) -> int:
        """Query heads of a rank."""
        return self.num_heads // self.ranks

    @cached_property
    def slots_of(self) -> tuple[tuple[int, ...], ...]:
        """By rank: the key head of each slot."""
        share, ratio = self.num_heads // self.ranks, self.num_heads // self.num_kv_heads
        width = gcd(share, ratio)
        return tuple(
            tuple((rank * share + j * width) // ratio for j in range(share // width)) for rank in range(self.ranks)
        )

    @property
    def slots(self) -> int:
        """Key heads of a rank."""
        return len(self.slots_of[0])

    @cached_property
    def plain(self) -> bool:
        """Every key head is in one slot, in order: nothing is repeated."""
        return [h for rank in self.slots_of for h in rank] == list(range(self.num_kv_heads))

    def of_rank(self, rank: int) -> slice:
        """The query heads of a rank."""
        return slice(rank * self.heads, (rank + 1) * self.heads)


@dataclass(frozen=True)
class HeadExchange:
    """The exchange of one call."""

    share: HeadShares
    group: Any
    """The process group of the head ranks."""

    # --- to the ranks that compute ---

    def send(self, rows: Sequence[tuple[Tensor, bool]]) -> Arrival:
        """Send tensors of equal rows, (rows, all heads, dim), cut by heads; True marks those of the key heads."""
        cut = [self._cut(x, of_keys) for x, of_keys in rows]
        width = sum(x.shape[2] * x.shape[3] for x in cut)
        ranks, count = self.share.ranks, rows[0][0].shape[0]
        wire = rows[0][0].new_empty(ranks, count, width)
        at = 0
        for x in cut:
            size = x.shape[2] * x.shape[3]
            _copy(wire[..., at : at + size].unflatten(2, x.shape[2:]), x)
            at += size
        counts = [count] * ranks
        return exchange(self.group, wire.flatten(0, 1), counts, counts)

    def _cut(self, x: Tensor, of_keys: bool) -> Tensor:
        """(ranks, rows, heads of a rank, dim)."""
        share = self.share
        if of_keys and not share.plain:
            x = torch.stack([x[:, head] for slots in share.slots_of for head in slots], 1)
        heads = share.slots if of_keys else share.heads
        cut: Tensor = x.unflatten(1, (share.ranks, heads)).transpose(0, 1)
        return cut

    def take(self, arrival: Arrival, widths: Sequence[tuple[int, int]], order: Tensor | None) -> list[Tensor]:
        """What ``send`` sent, as (all rows of the group, heads of this rank, dim), by document and position."""
        rows = arrival.wait()
        if order is not None:
            ordered = torch.empty_like(rows)
            _rows.sum_rows(ordered, [rows], order)
            rows = ordered
        found, at = [], 0
        for heads, dim in widths:
            found.append(rows[:, at : at + heads * dim].unflatten(1, (heads, dim)))
            at += heads * dim
        return found

    # --- and back ---

    def send_back(self, rows: Sequence[Tensor], back: Tensor | None) -> Arrival:
        """Send (all rows, heads of this rank, dim) tensors to the ranks that own the rows."""
        flat = [x.flatten(1) for x in rows]
        wire = flat[0].contiguous() if len(flat) == 1 else torch.cat(flat, 1)
        if back is not None:
            ordered = torch.empty_like(wire)
            _rows.sum_rows(ordered, [wire], back)
            wire = ordered
        counts = [wire.shape[0] // self.share.ranks] * self.share.ranks
        return exchange(self.group, wire, counts, counts)

    def take_back(self, arrival: Arrival, into: Sequence[tuple[Tensor, bool]]) -> None:
        """Write what came back into (rows, all heads, dim) tensors; those of key heads are added up in float32."""
        share = self.share
        rows = arrival.wait().unflatten(0, (share.ranks, -1))
        at = 0
        for x, of_keys in into:
            heads, dim = share.slots if of_keys else share.heads, x.shape[2]
            part = rows[..., at : at + heads * dim].unflatten(2, (heads, dim))
            at += heads * dim
            if of_keys and not share.plain:
                for rank, slots in enumerate(share.slots_of):
                    for j, head in enumerate(slots):
                        x[:, head] += part[rank, :, j]
                continue
            _copy(x.unflatten(1, (share.ranks, heads)), part.transpose(0, 1))


def _copy(into: Tensor, x: Tensor) -> None:
    """Copy between strided tensors of one dtype, 16 bytes at a time where both allow it."""
    size = 16 // x.element_size()
    if all(_in_units(t, size) for t in (into, x)):
        into, x = into.view(torch.complex128), x.view(torch.complex128)
    into.copy_(x)


def _in_units(x: Tensor, size: int) -> bool:
    """Whether every run of a tensor begins and ends at a multiple of so many elements."""
    steps = (*x.stride()[:-1], x.storage_offset(), x.shape[-1])
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and not any(n % size for n in steps)
