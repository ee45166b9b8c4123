"""Gathering, adding and merging rows: what context parallelism does to tensors between kernels and wires.

A *row* is what a tensor holds for one token: (heads, dim). Tensors may be slices of bigger ones, in rows as well as in
heads. On CUDA, each call is one Triton launch that waits for nothing; elsewhere it is plain torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

INF = float("inf")

#: A launch takes each source as arguments of its own, so there is an end to them.
MAX_SOURCES = 4


def sum_rows(out: Tensor, sources: Sequence[Tensor], table: Tensor, base: Tensor | None = None) -> None:
    """Write to row i of ``out`` the sum of the rows that row i of ``table`` names, of the sources laid end to end.

    ``table`` is int32 (n, columns); a negative entry adds nothing, and a row of such entries is zero. Entries beyond
    the last source's end are the caller's error: they are not looked for. Rows that no entry names are not read.

    ``out`` is (n, heads, dim) and each of the one to four ``sources`` (m, heads, dim), of one dtype, which need not be
    out's. Each head is one run of memory; rows and heads may lie apart. Rows of another number of dims, (n, ...), are
    one run. ``base``, shaped as out, is added first; it may be out itself. So may the first source, if no row names
    another row of it than itself. Otherwise out overlaps no input.

    Sums are made in float32 (float64 for a float64 out), column after column, and rounded once, so they are
    repeatable. One column without a base is a plain copy, of any dtype.
    """
    if _on_triton(out) and out.numel():
        from anyattn._context import _rows_triton

        _rows_triton.sum_rows(out, sources, table, base, lambda: _check_sum(out, sources, table, base))
        return
    _check_sum(out, sources, table, base)
    if out.numel() == 0:
        return
    if is_copy(table, base):
        _copy(out, sources, table[:, 0])
    else:
        _add(out, sources, table, base)


def merge_rows(
    out: Tensor,
    lse: Tensor,
    part: Tensor,
    part_lse: Tensor,
    rows: Tensor,
    rows_part: Tensor,
    *,
    final: Tensor | None = None,
    fresh: bool = False,
) -> None:
    """Merge attention over some keys into attention over others, in place: row ``rows_part[i]`` into ``rows[i]``.

    ``out`` (T, heads, dim) and ``lse`` (heads, T) are the accumulators, both float32 or both float64; ``part``
    (t, heads, dim), of any dtype, and ``part_lse`` (heads, t) are what a kernel returned. ``rows`` and ``rows_part``
    are int32 (n,); those of ``rows`` differ from one another. No other row is read or written.

    A row whose lse is -inf has seen no key, and its values are not read, whatever they are: such a part changes
    nothing, such an accumulator takes the part as it is, and of two such the result is 0 and -inf.

    With ``fresh``, the accumulators of these rows hold nothing yet and are not read. ``final`` (T, heads, dim), of any
    dtype, gets the merged rows too: the last merge then needs no pass that converts.
    """
    _check_merge(out, lse, part, part_lse, rows, rows_part, final)
    if rows.shape[0] == 0 or out.numel() == 0:
        return
    if _on_triton(out):
        from anyattn._context import _rows_triton

        _rows_triton.merge_rows(out, lse, part, part_lse, rows, rows_part, final, fresh)
        return
    _merge(out, lse, part, part_lse, rows.long(), rows_part.long(), final, fresh)


def _on_triton(x: Tensor) -> bool:
    return x.is_cuda


def is_copy(table: Tensor, base: Tensor | None) -> bool:
    """Nothing is to be added: bytes may travel as they are."""
    return table.shape[1] == 1 and base is None


def is_run(x: Tensor) -> bool:
    """What follows dim 0 lies in one run of memory."""
    expected = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _has_rows(x: Tensor) -> bool:
    """Rows are runs, or made of heads that are."""
    return is_run(x) or (x.ndim == 3 and (x.shape[2] == 1 or x.stride(2) == 1))


def _check_index(name: str, x: Tensor, ndim: int) -> None:
    assert (x.dtype, x.ndim) == (torch.int32, ndim), f"{name} is int32 of {ndim} dims, not {x.dtype} of {x.ndim}"
    assert x.is_contiguous(), f"{name} is contiguous, unlike strides {x.stride()}"


def _check_sum(out: Tensor, sources: Sequence[Tensor], table: Tensor, base: Tensor | None) -> None:
    assert 1 <= len(sources) <= MAX_SOURCES, f"{len(sources)} sources; 1 to {MAX_SOURCES} are taken"
    _check_index("table", table, 2)
    assert table.shape[0] == out.shape[0], f"table {table.shape} for out {out.shape}"
    assert table.shape[1] > 0, "table has no column"
    for x in sources:
        assert x.shape[1:] == out.shape[1:], f"a row is {tuple(out.shape[1:])} in out, {tuple(x.shape[1:])} in a source"
        assert x.dtype == sources[0].dtype, f"sources of {sources[0].dtype} and {x.dtype}"
    assert base is None or base.shape == out.shape, "base is shaped as out"
    assert is_copy(table, base) or sources[0].is_floating_point(), f"{sources[0].dtype} cannot be summed"
    for x in (out, *sources, *(() if base is None else (base,))):
        assert _has_rows(x), f"rows are runs, or heads that are: shape {tuple(x.shape)}, strides {x.stride()}"


def _check_merge(
    out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, rows: Tensor, rows_part: Tensor, final: Tensor | None
) -> None:
    total, heads, dim = out.shape
    assert out.dtype in (torch.float32, torch.float64), f"accumulators are float32 or float64, not {out.dtype}"
    assert lse.dtype == out.dtype, f"out is {out.dtype}, lse {lse.dtype}"
    assert lse.shape == (heads, total), f"lse {tuple(lse.shape)} for out {tuple(out.shape)}"
    assert part.shape[1:] == (heads, dim), f"part {tuple(part.shape)} for out {tuple(out.shape)}"
    assert part_lse.shape == (heads, part.shape[0]), f"part_lse {tuple(part_lse.shape)} for part {tuple(part.shape)}"
    _check_index("rows", rows, 1)
    _check_index("rows_part", rows_part, 1)
    assert rows.shape == rows_part.shape, f"{rows.shape[0]} rows for {rows_part.shape[0]} of the part"
    assert final is None or final.shape == out.shape, "final is shaped as out"
    for x in (out, part, *(() if final is None else (final,))):
        assert dim == 1 or x.stride(2) == 1, f"a head is one run: shape {tuple(x.shape)}, strides {x.stride()}"


def _named(sources: Sequence[Tensor], column: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each source, the rows that a column names, and which rows of out they go to."""
    begin = 0
    for source in sources:
        end = begin + source.shape[0]
        to = ((column >= begin) & (column < end)).nonzero()[:, 0]
        yield to, source.index_select(0, column.index_select(0, to) - begin)
        begin = end


def _copy(out: Tensor, sources: Sequence[Tensor], column: Tensor) -> None:
    missing = (column < 0).nonzero()[:, 0]
    if len(sources) == 1 and missing.shape[0] == 0:
        out.copy_(sources[0].index_select(0, column))
        return
    out.index_fill_(0, missing, 0)
    for to, rows in _named(sources, column):
        out.index_copy_(0, to, rows.to(out.dtype))


def _add(out: Tensor, sources: Sequence[Tensor], table: Tensor, base: Tensor | None) -> None:
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    in_place = out.dtype == wide and sources[0].data_ptr() != out.data_ptr()
    total = out if in_place else torch.empty(out.shape, dtype=wide, device=out.device)
    if base is None:
        total.zero_()
    else:
        total.copy_(base)
    for column in table.unbind(1):
        for to, rows in _named(sources, column):
            if to.shape[0] == total.shape[0]:
                total.add_(rows.to(wide))
            else:
                total.index_add_(0, to, rows.to(wide))
    if total is not out:
        out.copy_(total)


def _merge(
    out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, rows: Tensor, rows_part: Tensor, final: Tensor | None,
    fresh: bool,
) -> None:  # fmt: skip
    """See ``merge_rows``; indices are int64."""

    def by_row(x: Tensor) -> Tensor:
        """(heads, n) as (n, heads, 1)."""
        return x.t().unsqueeze(2)

    new = part_lse.index_select(1, rows_part).to(lse.dtype)
    value = part.index_select(0, rows_part).to(out.dtype).masked_fill_(by_row(new == -INF), 0)
    if fresh:
        merged, merged_lse = value, new
    else:
        old = lse.index_select(1, rows)
        before = out.index_select(0, rows).masked_fill_(by_row(old == -INF), 0)
        merged = before + by_row(torch.sigmoid(new - old)) * (value - before)
        merged = torch.where(by_row(old == -INF), value, merged)
        merged = torch.where(by_row(new == -INF), before, merged)
        merged_lse = torch.where(new == -INF, old, old - torch.nn.functional.logsigmoid(old - new))
        merged_lse = torch.where(old == -INF, new, merged_lse)
    out.index_copy_(0, rows, merged)
    lse.index_copy_(1, rows, merged_lse)
    if final is not None:
        final.index_copy_(0, rows, merged.to(final.dtype))
