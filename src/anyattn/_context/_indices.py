"""Index tables of plans, on the host: int32, by row; -1 is none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from anyattn._context._data import Layout, Run


def expand(runs: Iterable[Run]) -> Tensor:
    """The rows of runs, one after the other."""
    both = torch.tensor([tuple(run) for run in runs], dtype=torch.int64, device="cpu").view(-1, 2)
    first, count = both[:, 0], both[:, 1]
    ends = count.cumsum(0)
    total = int(ends[-1]) if ends.numel() else 0
    offset = torch.repeat_interleave(first - (ends - count), count, output_size=total)
    return (torch.arange(total, device="cpu") + offset).to(torch.int32)


def table(
    rows: int,
    used: Sequence[Tensor],
    parts: Sequence[int | tuple[int, int]],
    places: Sequence[Tensor] | None = None,
    fixed: bool = False,
) -> Tensor:
    """Per row, where it lies in each part that has it, parts one after the other; as many columns as the most have.

    ``used`` are the rows of each part; they lie there at ``places``, or at their distance from the part's first row, or
    one after the other where parts are given by their sizes alone. ``fixed`` keeps a column for every part.
    """
    filled = torch.zeros(rows, dtype=torch.int64, device="cpu")
    table = torch.full((rows, max(1, len(used))), -1, dtype=torch.int32, device="cpu")
    start = 0
    for i, (mine, part) in enumerate(zip(used, parts, strict=True)):
        if places is not None:
            at = places[i]
        elif isinstance(part, tuple):
            at = mine - part[0]
        else:
            at = torch.arange(mine.numel(), dtype=torch.int32, device="cpu")
        index = mine.long()
        table[index, filled[index]] = at + start
        filled[index] += 1
        start += part[1] - part[0] if isinstance(part, tuple) else part
    most = len(used) if fixed else int(filled.max()) if rows else 1
    return table[:, : max(1, most)].contiguous()


def padding(layout: Layout, place: int) -> Tensor:
    padding = torch.ones(layout.rows, dtype=torch.int32, device="cpu")
    for _, begin, end, row in layout.pieces[place]:
        padding[row : row + end - begin] = 0
    return padding


def shifted(table: Tensor, by: int) -> list[Tensor]:
    return [torch.where(table < 0, table, table + by)]


def order(runs: Sequence[Run] | None, rows: int) -> tuple[Tensor, Tensor] | None:
    """Into order, and back."""
    if runs is None:
        return None
    into = torch.full((rows,), -1, dtype=torch.int32, device="cpu")
    found = expand(runs)
    into[: found.numel()] = found
    back = torch.full((rows,), -1, dtype=torch.int32, device="cpu")
    back[found.long()] = torch.arange(found.numel(), dtype=torch.int32, device="cpu")
    return into[:, None].contiguous(), back[:, None].contiguous()


def used(rows: int, parts: Sequence[Tensor]) -> Tensor:
    """Which of so many rows a part has: bool (rows,)."""
    found = torch.zeros(rows, dtype=torch.bool, device="cpu")
    for mine in parts if rows else ():
        found[mine.long()] = True
    return found


def unused(rows: int, parts: Sequence[Tensor]) -> Tensor:
    """int32: those of so many rows that no part has."""
    return (~used(rows, parts)).nonzero()[:, 0].to(torch.int32)


def joined(settled: Tensor, home: Tensor | None) -> tuple[tuple[int, int], Tensor]:
    """The range of rows to which something is to be added, or of which nothing is settled, and the table for them.

    Args:
        settled: bool (rows,): those that hold something already.
        home: int32 (rows, n): what is to be added to each.

    Returns:
        The range, and int32 (its rows, 1 + n): the row itself, counted from the range's first, where it is settled,
        and what is added, counted from the range's end on.
    """
    none = torch.empty(settled.numel(), 0, dtype=torch.int32, device="cpu")
    home = none if home is None else home
    rows = (~settled | (home >= 0).any(1)).nonzero()[:, 0]
    first, end = (int(rows[0]), int(rows[-1]) + 1) if rows.numel() else (0, 0)
    here = torch.arange(end - first, dtype=torch.int32, device="cpu")
    own = torch.where(settled[first:end], here, -1)
    return (first, end), torch.cat([own[:, None], *shifted(home[first:end], end - first)], 1)


def are_apart(ranges: Sequence[tuple[int, int]]) -> bool:
    """Whether ranges of rows have none in common."""
    ordered = sorted(ranges)
    return all(a[1] <= b[0] for a, b in pairwise(ordered))
