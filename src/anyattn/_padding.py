"""Zeroing what lies outside every sequence, and nothing else.

No kernel writes those rows: they hold whatever the allocator left there. On CUDA one small Triton launch handles all
tensors of a direction; blocks that hold no such row end after a look at the offsets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyattn._call import Rows
from anyattn._packing import valid_rows

Fill = tuple[Tensor, int, float]
"""A tensor, which of its dims counts rows (0, or 1 for lse), and the value that padding gets."""


def fill_gaps(rows: Rows, *fills: Fill) -> None:
    """Write each tensor's value into its rows outside every sequence, in place."""
    if fills[0][0].is_cuda:
        from anyattn import _padding_triton

        _padding_triton.fill_gaps(rows, fills)
        return
    if rows.host is not None:
        _fill_between(rows.host, fills)
        return
    padding = ~valid_rows(rows, fills[0][0].shape[fills[0][1]])
    for x, dim, value in fills:
        x.masked_fill_(padding.view((-1,) + (1,) * (x.ndim - 1 - dim)), value)


def _fill_between(host: tuple[tuple[int, int], ...], fills: tuple[Fill, ...]) -> None:
    """On the CPU, where the offsets are at hand: a slice per gap."""
    total = fills[0][0].shape[fills[0][1]]
    end = 0
    for start, length in (*host, (total, 0)):
        if start > end:
            for x, dim, value in fills:
                x.narrow(dim, end, start - end).fill_(value)
        end = max(end, start + length)


def zero_padding(x: Tensor, valid: Tensor) -> Tensor:
    """A copy of (T, H, D) in which padding is zero whatever it held, NaN included."""
    return torch.where(valid[: x.shape[0], None, None], x, torch.zeros((), dtype=x.dtype, device=x.device))


def pad_dims(x: Tensor, width: int) -> Tensor:
    """Add zeros after the last dim of x, up to ``width``."""
    if x.shape[-1] == width:
        return x
    padded: Tensor = torch.nn.functional.pad(x, (0, width - x.shape[-1]))
    return padded
