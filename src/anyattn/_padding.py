"""Zeroing what lies outside every sequence, and nothing else.

No kernel writes those rows: they hold whatever the allocator left there. On CUDA, small tensors get a masked write
each, by masks made once per packing and kind of tensor: nothing costs the host less. Large ones get one small Triton
launch for all tensors of a direction; blocks that hold no such row end after a look at the offsets.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from anyattn._call import Rows
from anyattn._derived import derived, kept
from anyattn._rows import valid_rows

Fill = tuple[Tensor, int, float]
"""A tensor, which of its dims counts rows (0, or 1 for lse), and the value that padding gets."""

#: Bytes that a tensor may have to be read and written whole: a microsecond or two of a GPU.
SMALL = 4 << 20
#: Elements up to which a mask is kept as wide as its tensor: a quarter of a MiB for each kind of tensor of a packing.
WHOLE = 1 << 18


def fill_gaps(rows: Rows, *fills: Fill) -> None:
    """Write each tensor's value into its rows outside every sequence, in place.

    All have the same number of rows, and none is much larger than the first.
    """
    first, dim, _ = fills[0]
    if first.is_cuda:
        if first.nbytes > SMALL or not fill_by_masks(rows, fills):
            _fill_in_one_launch(rows, fills)
        return
    if rows.host is not None:
        _fill_between(rows.host, fills)
        return
    padding = ~valid_rows(rows, first.shape[dim])
    for x, dim, value in fills:
        x.masked_fill_(padding.view((-1,) + (1,) * (x.ndim - 1 - dim)), value)


def fill_by_masks(rows: Rows, fills: tuple[Fill, ...]) -> bool:
    """A masked write for each tensor. False, and nothing written, where masks are not kept from call to call."""
    for x, dim, value in fills:
        mask = kept(rows, rows, ("padding", dim, x.shape), partial(_mask, rows, x.shape, dim))
        if mask is None:  # as for all of them
            return False
        x.masked_fill_(mask, value)
    return True


def _mask(rows: Rows, shape: torch.Size, dim: int) -> Tensor:
    """True outside every sequence: as wide as the tensor, where that is little, for broadcast it costs the host more.

    All of a number of rows are made from one.
    """
    mask = derived(rows, rows, ("padding", shape[dim]), partial(_outside, rows, shape[dim]))
    mask = mask.view(-1, *(1,) * (len(shape) - 1 - dim))
    return mask.expand(shape).contiguous() if shape.numel() <= WHOLE else mask


def _outside(rows: Rows, total: int) -> Tensor:
    """Bool (total,): where as many sequences have begun as have ended."""
    begin = rows.starts[:-1]
    row = torch.arange(total, dtype=torch.int32, device=begin.device)
    begun, ended = (torch.searchsorted(x, row, out_int32=True, right=True) for x in (begin, begin + rows.lengths))
    return begun == ended


def _fill_in_one_launch(rows: Rows, fills: tuple[Fill, ...]) -> None:
    from anyattn import _padding_triton

    device = fills[0][0].device
    if device.index == torch.cuda.current_device():
        _padding_triton.fill_gaps(rows, fills)
        return
    with torch.cuda.device(device):  # Triton launches on the current one
        _padding_triton.fill_gaps(rows, fills)


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
