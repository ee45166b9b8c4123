"""The table of a packing: one int32 tensor that holds everything a kernel may ask for, by number N of sequences.

    starts (N + 1) | lengths (N) | as_queries (3 N + 3) | as_keys (3 N + 3)        each padded to a multiple of 4

``as_queries`` and ``as_keys`` are for kernels that do not know used lengths: each gap becomes two sequences, its rows
as queries without keys, then as keys without queries (docs/padding.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyattn._call import Rows

Host = tuple[tuple[int, int], ...]


def _aligned(n: int) -> int:
    return -(-n // 4) * 4


def _sections(n: int) -> tuple[int, int, int, int]:
    """Where starts, lengths, as_queries and as_keys begin in the table, by N."""
    lengths = _aligned(n + 1)
    queries = lengths + _aligned(n)
    keys = queries + _aligned(3 * n + 3)
    return lengths, queries, keys, keys + _aligned(3 * n + 3)


def build_table(cu_seqlens: Tensor, starts: Tensor, rows: int | None) -> Tensor:
    """The table, computed on the offsets' device without waiting for it."""
    n = cu_seqlens.numel() - 1
    lengths_at, queries_at, keys_at, size = _sections(n)
    table = torch.zeros(size, dtype=torch.int32, device=cu_seqlens.device)
    table[: n + 1] = starts
    lengths = table[lengths_at : lengths_at + n]
    torch.sub(cu_seqlens[1:], cu_seqlens[:-1], out=lengths)
    begin = starts[:-1]
    end = begin + lengths
    before = torch.cat([torch.zeros_like(starts[:1]), end])  # where the previous sequence ends, and the last one
    queries, keys = (table[at + 1 : at + 1 + 3 * n].view(n, 3) for at in (queries_at, keys_at))
    queries[:, 0] = begin
    queries[:, 1] = begin
    queries[:, 2] = end
    keys[:, 0] = before[:-1]
    keys[:, 1] = begin
    keys[:, 2] = end
    last = starts[-1:] if rows is None else torch.full_like(starts[-1:], rows)
    table[queries_at + 1 + 3 * n : queries_at + 3 + 3 * n] = last
    table[keys_at + 1 + 3 * n : keys_at + 2 + 3 * n] = before[-1:]
    table[keys_at + 2 + 3 * n : keys_at + 3 + 3 * n] = last
    return table


def rows_of_table(table: Tensor, n: int, max_seqlen: int, gaps: bool, host: Host | None) -> Rows:
    """The views of a table that a kernel call takes."""
    lengths_at, queries_at, keys_at, _ = _sections(n)
    return Rows(
        table=table,
        starts=table[: n + 1],
        lengths=table[lengths_at : lengths_at + n],
        as_queries=table[queries_at : queries_at + 3 * n + 3],
        as_keys=table[keys_at : keys_at + 3 * n + 3],
        max_seqlen=max_seqlen,
        gaps=gaps,
        host=host,
    )


def host_of_table(table: Tensor, n: int) -> Host | None:
    """(start, length) per sequence, where the table lies on the CPU."""
    if table.device.type != "cpu":
        return None
    lengths_at, *_ = _sections(n)
    numbers = table[: lengths_at + n].tolist()
    return tuple(zip(numbers[:n], numbers[lengths_at:], strict=True))


def valid_rows(rows: Rows, total_rows: int) -> Tensor:
    """Bool (total_rows,): which rows belong to a sequence. Computed on the device, without waiting for it."""
    marks = torch.zeros(total_rows + 1, dtype=torch.int32, device=rows.starts.device)
    begin = rows.starts[:-1].long()
    one = torch.ones_like(rows.lengths)
    marks.index_add_(0, begin, one)
    marks.index_add_(0, begin + rows.lengths, -one)
    return marks[:-1].cumsum(0, dtype=torch.int32) > 0
