"""The Triton kernel of ``_padding``. Imported only where a CUDA tensor needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from anyattn._call import Rows

if TYPE_CHECKING:
    from anyattn._padding import Fill


@triton.jit
def _fill(x, row_stride, head_stride, heads, dim, value, padding, row, BLOCK_C: tl.constexpr):
    """Write value into the padding rows of one (rows, heads, dim) tensor; lse is (rows, heads, 1)."""
    column = tl.arange(0, BLOCK_C)
    width = heads * dim
    for start in range(0, width, BLOCK_C):
        c = start + column
        offset = row.to(tl.int64)[:, None] * row_stride + ((c // dim).to(tl.int64) * head_stride + c % dim)[None, :]
        tl.store(
            x + offset, tl.full(offset.shape, value, x.dtype.element_ty), mask=padding[:, None] & (c < width)[None, :]
        )


@triton.jit
def _fill_gaps(
    starts, lengths, num_sequences, total_rows,
    a, a_row, a_head, a_heads, a_dim, a_value,
    b, b_row, b_head, b_heads, b_dim, b_value,
    HAS_B: tl.constexpr, STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    # The last sequence that starts at or before each row: STEPS halvings of [low, high).
    low = tl.zeros([BLOCK_R], tl.int32)
    high = low + num_sequences
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        begins = tl.load(starts + middle, mask=middle < num_sequences, other=2147483647)
        before = (begins <= row) & (low < high)
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, tl.minimum(middle, high))
    sequence = low - 1
    begin = tl.load(starts + sequence, mask=sequence >= 0, other=0)
    length = tl.load(lengths + sequence, mask=sequence >= 0, other=0)
    padding = (row < total_rows) & ((sequence < 0) | (row >= begin + length))
    if tl.max(padding.to(tl.int32), 0) > 0:
        _fill(a, a_row, a_head, a_heads, a_dim, a_value, padding, row, BLOCK_C)
        if HAS_B:
            _fill(b, b_row, b_head, b_heads, b_dim, b_value, padding, row, BLOCK_C)


def _strides(x: Tensor, rows_dim: int) -> tuple[int, int, int, int]:
    """Row stride, head stride, heads, dim: of (rows, heads, dim), or of lse (heads, rows)."""
    if rows_dim == 1:
        return x.stride(1), x.stride(0), x.shape[0], 1
    return x.stride(0), x.stride(1), x.shape[1], x.shape[2]


def fill_gaps(rows: Rows, fills: tuple[Fill, ...]) -> None:
    """One launch for one or two tensors with the same rows; see ``_padding.fill_gaps``."""
    for first in range(0, len(fills), 2):
        (a, a_dim, a_value), *rest = fills[first : first + 2]
        b, b_dim, b_value = rest[0] if rest else (a, a_dim, a_value)
        total = a.shape[a_dim]
        sequences = rows.lengths.shape[0]
        if total == 0:
            continue
        # Empty sequences share their start with the next one: the search finds the last of them, which holds the rows.
        _fill_gaps[(triton.cdiv(total, 32),)](
            rows.starts, rows.lengths, sequences, total,
            a, *_strides(a, a_dim), a_value, b, *_strides(b, b_dim), b_value,
            HAS_B=bool(rest), STEPS=sequences.bit_length() + 1, BLOCK_R=32, BLOCK_C=256, num_warps=4,
        )  # fmt: skip
