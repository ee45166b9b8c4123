"""Where FlexAttention need not look: block tables, made from offsets, causality and windows.

Nothing here makes a (rows x keys) tensor, and nothing waits for the device. Legend: B batch entries (1 for packed
rows), S query rows, K key rows of an entry, N sequences, R x C blocks.

A block of scores is *absent* if no query in it sees a key, *full* if every query sees every key, else *partial*: then
the kernel asks ``mask_mod`` for each score. Saying partial of an absent or full block costs time and changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anyattn._call import Rows, Spec


class Side(NamedTuple):
    """The rows of one side, queries or keys. Tensors are int32."""

    sequence: Tensor
    """(B, S): which sequence each row belongs to; the nearest one for rows outside every sequence."""
    position: Tensor
    """(B, S): where the row stands, so that key position - query position is what causality and windows ask about."""
    real: Tensor
    """bool (B, S)"""
    begin: Tensor
    """(N,): first row of each sequence within its entry."""
    length: Tensor
    """(N,)"""


class Tables(NamedTuple):
    """A BlockMask's tensors, int32 and contiguous: how many blocks each row of blocks has, and which."""

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor | None
    full_kv_indices: Tensor | None
    q_num_blocks: Tensor | None = None
    q_indices: Tensor | None = None
    full_q_num_blocks: Tensor | None = None
    full_q_indices: Tensor | None = None


class Blocks(NamedTuple):
    """Bool (B, H or 1, R, C) each."""

    partial: Tensor
    full: Tensor


# --- rows ---


def sides(rows_q: Rows, rows_k: Rows, entries: int, len_q: int, len_k: int, top_left: bool) -> tuple[Side, Side]:
    """Both sides of a packed batch, of ``entries`` entries of len_q and len_k rows: 1, or one entry per sequence."""
    queries = _side(rows_q, entries, len_q)
    keys = _side(rows_k, entries, len_k)
    if not top_left:
        shift = keys.length - queries.length
        queries = queries._replace(position=queries.position + shift[queries.sequence])
    return queries, keys


def _side(rows: Rows, entries: int, size: int) -> Side:
    begin, length = rows.starts[:-1].clone(), rows.lengths.clone()  # kept by derived(): no views of the table
    row = torch.arange(entries * size, dtype=torch.int32, device=begin.device).view(entries, size)
    found = torch.searchsorted(begin.contiguous(), row, right=True, out_int32=True) - 1
    sequence = found.clamp(min=0)
    position = row - begin[sequence]
    real = (found >= 0) & (position < length[sequence])
    if entries > 1:
        begin = begin - torch.arange(entries, dtype=torch.int32, device=begin.device) * size
    return Side(sequence, position, real, begin, length)


# --- blocks of scores ---


def _edges(size: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First and last-but-one row of each block."""
    first = torch.arange(0, size, block, dtype=torch.int32, device=device)
    return first, first + block


def dense_blocks(spec: Spec, len_q: int, len_k: int, block: tuple[int, int], device: torch.device) -> Blocks:
    """Of a batch without padding: (1, 1, R, C)."""
    zero = torch.zeros((1, 1, 1), dtype=torch.int32, device=device)
    ends = (zero + len_q, zero + len_k)
    shift = zero + (0 if spec.top_left else len_k - len_q)
    visible, full = _of_one_sequence(spec, len_q, len_k, block, (zero, zero), ends, shift)
    return Blocks((visible & ~full).unsqueeze(1), full.unsqueeze(1))


def packed_blocks(spec: Spec, queries: Side, keys: Side, block: tuple[int, int]) -> Blocks:
    """Of a packed batch: (B, 1, R, C), B above 1 only where each entry holds one sequence."""
    (entries, len_q), len_k = queries.real.shape, keys.real.shape[1]
    several = None
    if entries > 1:
        which = torch.arange(entries, device=queries.real.device)[:, None, None]
    else:
        (first_q, last_q), (first_k, last_k) = _span(queries, block[0]), _span(keys, block[1])
        low = torch.maximum(first_q[:, None], first_k[None])
        high = torch.minimum(last_q[:, None], last_k[None])
        several = (high > low)[None]
        which = low.clamp(max=queries.length.shape[0] - 1)[None]
    begin_q, begin_k = queries.begin[which], keys.begin[which]
    end_q, end_k = begin_q + queries.length[which], begin_k + keys.length[which]
    shift = torch.zeros_like(begin_q) if spec.top_left else keys.length[which] - queries.length[which]
    visible, full = _of_one_sequence(spec, len_q, len_k, block, (begin_q, begin_k), (end_q, end_k), shift)
    partial = visible & ~full
    if several is not None:
        partial = torch.where(several, True, partial)
        full = full & ~several
    return Blocks(partial.unsqueeze(1), full.unsqueeze(1))


def _span(side: Side, block: int) -> tuple[Tensor, Tensor]:
    """First and last sequence that has rows in each block of packed rows, (R,) each; first is above last where none."""
    pad = (0, -side.real.shape[1] % block)
    none = side.length.shape[0]
    first = torch.where(side.real, side.sequence, none)[0]
    last = torch.where(side.real, side.sequence, -1)[0]
    first, last = (torch.nn.functional.pad(x, pad, value=v) for x, v in ((first, none), (last, -1)))
    return first.view(-1, block).amin(1), last.view(-1, block).amax(1)


def _of_one_sequence(
    spec: Spec, len_q: int, len_k: int, block: tuple[int, int], begin: tuple[Tensor, Tensor],
    end: tuple[Tensor, Tensor], shift: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(visible, full), (B, R, C) each, of one sequence per block, whose begin, end and shift broadcast to that."""
    device = shift.device
    first_q, end_q = _edges(len_q, block[0], device)
    first_k, end_k = _edges(len_k, block[1], device)
    q0, q1 = torch.maximum(first_q[:, None], begin[0]), torch.minimum(end_q[:, None], end[0])
    k0, k1 = torch.maximum(first_k[None], begin[1]), torch.minimum(end_k[None], end[1])
    visible = (q1 > q0) & (k1 > k0)
    full = (q1 - q0 == block[0]) & (k1 - k0 == block[1])
    offset = begin[0] - begin[1] - shift
    nearest, farthest = k0 - (q1 - 1) + offset, (k1 - 1) - q0 + offset  # key position - query position
    if spec.left is not None:
        visible, full = visible & (farthest >= -spec.left), full & (nearest >= -spec.left)
    if spec.right is not None:
        visible, full = visible & (nearest <= spec.right), full & (farthest <= spec.right)
    return visible, full & visible


# --- tables ---


def ordered(blocks: Blocks, backward: bool) -> Tables:
    """Blocks as a BlockMask has them; those that backward needs, where it follows."""
    forward = (*_ordered(blocks.partial), *_ordered(blocks.full))
    if not backward:
        return Tables(*forward)
    return Tables(*forward, *_ordered(blocks.partial.mT), *_ordered(blocks.full.mT))


def _ordered(present: Tensor) -> tuple[Tensor, Tensor]:
    values = present.to(torch.int8)
    order = torch.argsort(values, dim=-1, descending=True, stable=True)
    return present.sum(-1, dtype=torch.int32).contiguous(), order.to(torch.int32).contiguous()


def unordered(num_blocks: Tensor, indices: Tensor, columns: int) -> Tensor:
    """The reverse: bool (B, H, R, C)."""
    listed = torch.arange(indices.shape[-1], device=indices.device) < num_blocks.unsqueeze(-1)
    place = torch.where(listed, indices, columns).long()
    present = torch.zeros((*indices.shape[:-1], columns + 1), dtype=torch.bool, device=indices.device)
    return present.scatter_(-1, place, True)[..., :columns]


def intersected(blocks: Blocks, other: Blocks) -> Blocks:
    """What two masks let through together."""
    full = blocks.full & other.full
    return Blocks((blocks.partial | blocks.full) & (other.partial | other.full) & ~full, full)


def coarser(blocks: Blocks, factor: tuple[int, int]) -> Blocks:
    """Blocks that are so many times as large."""
    rows, columns = blocks.full.shape[-2:]
    pad = (0, -columns % factor[1], 0, -rows % factor[0])

    def grouped(x: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x, pad)
        shaped: Tensor = padded.unflatten(-1, (-1, factor[1])).unflatten(-3, (-1, factor[0]))
        return shaped.movedim(-3, -2).flatten(-2)

    full = grouped(blocks.full).all(-1)
    return Blocks(grouped(blocks.partial | blocks.full).any(-1) & ~full, full)
