"""The Triton kernels of ``_rows``. Imported only where a CUDA tensor needs them.

Both kernels work through *units*: a row's head, or a whole row where heads follow one another in every tensor. Within a
unit memory is one run, which is what lets the compiler move 16 bytes at a time.
"""

# Triton's language is not Python's: its kernels have no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from anyattn._context._rows import is_copy, is_run
from anyattn._launch import Launcher

#: Bytes, as summed or merged, that a program of 4 warps handles: enough loads in flight to keep memory busy, few
#: enough for registers.
_SUM_BLOCK = 16384
_MERGE_BLOCK = 8192


@triton.jit
def _place(at, index, begin, x, x_row, x_head, head):
    """``at``, but for rows that the source beginning at ``begin`` holds: where they lie in it."""
    return tl.where(index >= begin, x + (index - begin) * x_row + head * x_head, at)


@triton.jit
def _named(
    index, head, column, mask, a, a_row, a_head, b, b_row, b_head, c, c_row, c_head, d, d_row, d_head,
    a_end, b_end, c_end, SOURCES: tl.constexpr,
):  # fmt: skip
    """The units that ``index`` names of the sources laid end to end, or 0 where it is negative."""
    at = a + index * a_row + head * a_head
    if SOURCES > 1:
        at = _place(at, index, a_end, b, b_row, b_head, head)
    if SOURCES > 2:
        at = _place(at, index, b_end, c, c_row, c_head, head)
    if SOURCES > 3:
        at = _place(at, index, c_end, d, d_row, d_head, head)
    return tl.load(at[:, None] + column[None, :], mask=mask & (index >= 0)[:, None], other=0.0)


@triton.jit(do_not_specialize=["units", "columns", "a_end", "b_end", "c_end"])
def _sum_rows(
    out, out_row, out_head, base, base_row, base_head, table, columns, units, heads, dim,
    a, a_row, a_head, b, b_row, b_head, c, c_row, c_head, d, d_row, d_head, a_end, b_end, c_end,
    SOURCES: tl.constexpr, COPY: tl.constexpr, HAS_BASE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(dim, BLOCK_C)
    unit = tl.program_id(0) // chunks * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(0) % chunks * BLOCK_C + tl.arange(0, BLOCK_C)
    real = unit < units
    mask = real[:, None] & (column < dim)[None, :]
    row = (unit // heads).to(tl.int64)
    head = (unit % heads).to(tl.int64)
    to = out + (row * out_row + head * out_head)[:, None] + column[None, :]
    if COPY:
        index = tl.load(table + row, mask=real, other=-1).to(tl.int64)
        value = _named(index, head, column, mask, a, a_row, a_head, b, b_row, b_head, c, c_row, c_head,
                       d, d_row, d_head, a_end, b_end, c_end, SOURCES)  # fmt: skip
        tl.store(to, value.to(out.dtype.element_ty), mask=mask)
    else:
        wide: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
        if HAS_BASE:
            at = base + (row * base_row + head * base_head)[:, None] + column[None, :]
            total = tl.load(at, mask=mask, other=0).to(wide)
        else:
            total = tl.zeros((BLOCK_R, BLOCK_C), wide)
        for i in range(columns):
            index = tl.load(table + row * columns + i, mask=real, other=-1).to(tl.int64)
            value = _named(index, head, column, mask, a, a_row, a_head, b, b_row, b_head, c, c_row, c_head,
                           d, d_row, d_head, a_end, b_end, c_end, SOURCES)  # fmt: skip
            total += value.to(wide)
        tl.store(to, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["units", "lse_row", "lse_head", "part_lse_row", "part_lse_head"])
def _merge_rows(
    rows, rows_part, units, heads, dim, out, out_row, out_head, lse, lse_row, lse_head,
    part, part_row, part_head, part_lse, part_lse_row, part_lse_head, final, final_row, final_head,
    FRESH: tl.constexpr, HAS_FINAL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    real = unit < units
    column = tl.arange(0, BLOCK_C)[None, :]
    mask = real[:, None] & (column < dim)
    head = (unit % heads).to(tl.int64)
    row = tl.load(rows + unit // heads, mask=real, other=0).to(tl.int64)
    row_part = tl.load(rows_part + unit // heads, mask=real, other=0).to(tl.int64)
    wide: tl.constexpr = out.dtype.element_ty
    nothing: tl.constexpr = float("-inf")

    # Values of a row that saw no key are not loaded: they count as 0 even where they are NaN.
    new = tl.load(part_lse + row_part * part_lse_row + head * part_lse_head, mask=real, other=nothing).to(wide)
    at = part + (row_part * part_row + head * part_head)[:, None] + column
    value = tl.load(at, mask=mask & (new != nothing)[:, None], other=0).to(wide)
    to = out + (row * out_row + head * out_head)[:, None] + column
    lse_to = lse + row * lse_row + head * lse_head
    if FRESH:
        merged = value
        merged_lse = new
    else:
        old = tl.load(lse_to, mask=real, other=nothing)
        before = tl.load(to, mask=mask & (old != nothing)[:, None], other=0)
        merged = before + tl.sigmoid(new - old)[:, None] * (value - before)
        # A GPU's quick division need not make the sigmoid exactly 1 or 0.
        merged = tl.where((old == nothing)[:, None], value, merged)
        merged = tl.where((new == nothing)[:, None], before, merged)
        # old - logsigmoid(old - new): either is a finite number here, or the sum is not taken.
        merged_lse = tl.maximum(old, new) + tl.log(1 + tl.exp(-tl.abs(new - old)))
        merged_lse = tl.where(old == nothing, new, tl.where(new == nothing, old, merged_lse))
        tl.debug_barrier()  # several warps may share a row: all have read its lse before one writes it
    tl.store(lse_to, merged_lse, mask=real)
    tl.store(to, merged, mask=mask)
    if HAS_FINAL:
        final_to = final + (row * final_row + head * final_head)[:, None] + column
        tl.store(final_to, merged.to(final.dtype.element_ty), mask=mask)


_launch_sum, _launch_merge = Launcher(_sum_rows), Launcher(_merge_rows)


def _chunk(dim: int) -> int:
    """Columns of a program: a power of two that divides dim, if it has one worth the name."""
    exact = dim & -dim
    return min(1024, exact if exact >= 128 else _power_of_2(dim))


def _power_of_2(n: int) -> int:
    """The least that is at least n."""
    return 1 << (n - 1).bit_length()


def _on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def sum_rows(
    out: Tensor, sources: Sequence[Tensor], table: Tensor, base: Tensor | None, check: Callable[[], None]
) -> None:
    """See ``_rows.sum_rows``; nothing is empty but perhaps sources. ``check`` is called for a new kind of arguments."""
    assert table.shape[0] == out.shape[0], f"table {table.shape} for out {out.shape}"
    if not 1 <= len(sources) <= 4:
        check()  # says what is wrong
    ends = [0] * 4
    for i, source in enumerate(sources):
        ends[i] = ends[i - 1] + source.shape[0]
    tensors = (out, *sources) if base is None else (out, base, *sources)
    if all(map(is_run, tensors)):
        heads, dim = 1, out.numel() // out.shape[0]
    else:
        if out.ndim != 3:
            check()  # says what is wrong
        heads, dim = out.shape[1:]

    def with_strides(x: Tensor | None) -> tuple[Tensor | None, int, int]:
        return (x, 0, 0) if x is None else (x, x.stride(0), x.stride(1) if heads > 1 else 0)

    a, b, c, d = map(with_strides, (*sources, None, None, None)[:4])
    units, block_c = out.shape[0] * heads, _chunk(dim)
    block_r = min(256, _SUM_BLOCK // (block_c * max(4, out.itemsize)))
    o, start, constants = with_strides(out), with_strides(base), (len(sources), is_copy(table, base), base is not None)
    kind = (*o[1:], *start[1:], heads, dim, *a[1:], *b[1:], *c[1:], *d[1:], *constants, block_r, block_c)
    sizes = (table.shape[1], units, *ends[:3])
    arguments = (
        *o, *start, table, *sizes[:2], heads, dim, *a, *b, *c, *d, *ends[:3], *constants, block_r, block_c
    )  # fmt: skip
    with _on_device_of(out):
        programs = -(-units // block_r) * -(-dim // block_c)
        _launch_sum(programs, (*tensors, table), kind, sizes, arguments, num_warps=4, first=check)


def merge_rows(
    out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, rows: Tensor, rows_part: Tensor, final: Tensor | None,
    fresh: bool,
) -> None:  # fmt: skip
    """See ``_rows.merge_rows``; nothing is empty."""
    heads, dim = out.shape[1:]
    units, block_c = rows.shape[0] * heads, _power_of_2(dim)
    block_r = max(1, min(256, _MERGE_BLOCK // (block_c * out.itemsize)))
    strides = (0, 0) if final is None else (final.stride(0), final.stride(1))
    wide = (*out.stride()[:2], *part.stride()[:2])
    narrow = (lse.stride(1), lse.stride(0), part_lse.stride(1), part_lse.stride(0))
    constants = (fresh, final is not None, block_r, block_c)
    arguments = (
        rows, rows_part, units, heads, dim, out, *wide[:2], lse, *narrow[:2], part, *wide[2:], part_lse, *narrow[2:],
        final, *strides, *constants,
    )  # fmt: skip
    pointers = (rows, rows_part, out, lse, part, part_lse, *(() if final is None else (final,)))
    with _on_device_of(out):
        kind = (heads, dim, *wide, *strides, *constants)
        _launch_merge(-(-units // block_r), pointers, kind, (units, *narrow), arguments, num_warps=4)
