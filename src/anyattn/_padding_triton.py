"""The Triton kernel of ``_padding``. Imported only where a CUDA tensor needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from anyattn._call import Rows

if TYPE_CHECKING:
    from anyattn._padding import Fill

#: Programs of a launch, about: enough to fill any GPU, few enough to cost nothing where there is nothing to write.
_PROGRAMS = 2048


@triton.jit
def _fill(
    x, row_stride, head_stride, heads, dim, value, row, inside, DENSE: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Write value into some rows of one (rows, heads, dim) tensor; lse is (rows, heads, 1)."""
    width = heads * dim
    for start in range(0, width, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        # Told that heads follow one another, the compiler writes 16 bytes at a time.
        column = c if DENSE else (c // dim) * head_stride + c % dim
        offset = row.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :]
        filling = tl.full(offset.shape, value, x.dtype.element_ty)
        tl.store(x + offset, filling, mask=inside[:, None] & (c < width)[None, :])


@triton.jit
def _gap(starts, lengths, num_sequences, total_rows):
    """(begin, end): gap i lies between sequence i - 1 and sequence i, the last one before the end of the tensor."""
    gap = tl.program_id(0)
    before = gap > 0
    begin = tl.load(starts + gap - 1, mask=before, other=0) + tl.load(lengths + gap - 1, mask=before, other=0)
    end = tl.minimum(tl.load(starts + gap, mask=gap < num_sequences, other=total_rows), total_rows)
    return begin, end


@triton.jit(do_not_specialize=["num_sequences", "total_rows"])
def _zero_gaps(
    starts, lengths, num_sequences, total_rows, a, a_row, a_width, b, b_row, b_width, c, c_row, c_width,
    TENSORS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """As ``_fill_gaps``, for one to three tensors and zeros alone: fewer arguments for the host to bind."""
    begin, end = _gap(starts, lengths, num_sequences, total_rows)
    for first in range(begin + tl.program_id(1) * BLOCK_R, end, tl.num_programs(1) * BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        inside = row < end
        _fill(a, a_row, 0, 1, a_width, 0.0, row, inside, True, BLOCK_C)
        if TENSORS > 1:
            _fill(b, b_row, 0, 1, b_width, 0.0, row, inside, True, BLOCK_C)
        if TENSORS > 2:
            _fill(c, c_row, 0, 1, c_width, 0.0, row, inside, True, BLOCK_C)


@triton.jit(do_not_specialize=["num_sequences", "total_rows"])
def _fill_gaps(
    starts, lengths, num_sequences, total_rows,
    a, a_row, a_head, a_heads, a_dim, a_value,
    b, b_row, b_head, b_heads, b_dim, b_value,
    HAS_B: tl.constexpr, A_DENSE: tl.constexpr, B_DENSE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    begin, end = _gap(starts, lengths, num_sequences, total_rows)
    for first in range(begin + tl.program_id(1) * BLOCK_R, end, tl.num_programs(1) * BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        inside = row < end
        _fill(a, a_row, a_head, a_heads, a_dim, a_value, row, inside, A_DENSE, BLOCK_C)
        if HAS_B:
            _fill(b, b_row, b_head, b_heads, b_dim, b_value, row, inside, B_DENSE, BLOCK_C)


def _strides(x: Tensor, rows_dim: int) -> tuple[int, int, int, int]:
    """Row stride, head stride, heads, dim: of (rows, heads, dim), or of lse (heads, rows)."""
    if rows_dim == 1:
        return x.stride(1), x.stride(0), x.shape[0], 1
    return x.stride(0), x.stride(1), x.shape[1], x.shape[2]


def _is_plain(fill: Fill) -> bool:
    """Zeros, in (rows, heads, dim) whose rows have no gaps within."""
    x, rows_dim, value = fill
    return rows_dim == 0 and value == 0.0 and x.stride(1) == x.shape[2] and x.stride(2) == 1


def _grid(rows: Rows, total: int) -> tuple[int, int]:
    gaps = rows.lengths.shape[0] + 1
    return gaps, max(1, min(triton.cdiv(total, 8), _PROGRAMS // gaps))


def _zero_all(rows: Rows, tensors: list[Tensor]) -> None:
    total, count = tensors[0].shape[0], len(tensors)
    a, b, c = (tensors * 3)[:3]
    _zero_gaps[_grid(rows, total)](
        rows.starts, rows.lengths, rows.lengths.shape[0], total,
        a, a.stride(0), a.shape[1] * a.shape[2], b, b.stride(0), b.shape[1] * b.shape[2],
        c, c.stride(0), c.shape[1] * c.shape[2], TENSORS=count, BLOCK_R=8, BLOCK_C=1024, num_warps=4,
    )  # fmt: skip


def fill_gaps(rows: Rows, fills: tuple[Fill, ...]) -> None:
    """One launch, for up to three tensors with the same rows; see ``_padding.fill_gaps``."""
    if len(fills) <= 3 and all(map(_is_plain, fills)):
        if fills[0][0].shape[0]:
            _zero_all(rows, [x for x, _, _ in fills])
        return
    for first in range(0, len(fills), 2):
        (a, a_dim, a_value), *rest = fills[first : first + 2]
        b, b_dim, b_value = rest[0] if rest else (a, a_dim, a_value)
        total = a.shape[a_dim]
        if total == 0:
            continue
        of_a, of_b = _strides(a, a_dim), _strides(b, b_dim)
        _fill_gaps[_grid(rows, total)](
            rows.starts, rows.lengths, rows.lengths.shape[0], total, a, *of_a, a_value, b, *of_b, b_value,
            HAS_B=bool(rest), A_DENSE=of_a[1] == of_a[3], B_DENSE=of_b[1] == of_b[3],
            BLOCK_R=8, BLOCK_C=1024, num_warps=4,
        )  # fmt: skip
