"""What travels: rows between ranks, by one primitive on every kind of group.

Nothing here waits on the host where the group is NCCL's: ``Arrival.wait`` makes the current stream wait.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

#: Its name from torch 2.13 on, and before.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


#: Cycles, some microseconds: where what the group starts waits its turn on the GPU, and where it goes first.
HEAD_START, SHORT_HEAD_START = 16_000, 4_000


def head_start_of(group: Any, device: torch.device) -> int:
    """Cycles that what travels needs to begin before a kernel that fills the GPU.

    Less where NCCL's streams have priority (``TORCH_NCCL_HIGH_PRIORITY``, or the group's own option): what it starts
    then goes before all that waits, and only has to be there.
    """
    if group is None or device.type != "cuda":
        return 0
    first = os.environ.get("TORCH_NCCL_HIGH_PRIORITY", "0").lower() in ("1", "y", "yes", "t", "true")
    options = getattr(group._get_backend(device), "options", None)
    return SHORT_HEAD_START if first or getattr(options, "is_high_priority_stream", False) else HEAD_START


class Arrival(NamedTuple):
    """Rows on their way."""

    rows: Tensor
    work: Any
    sent: Tensor | None = None
    """Kept until the rows are there."""

    def wait(self) -> Tensor:
        """The rows, once the current stream (the host, under gloo) has seen them arrive."""
        if self.work is not None:
            self.work.wait()
        return self.rows


def _bytes(x: Tensor) -> Tensor:
    """A tensor of a dtype that every group can carry."""
    return x.view(torch.uint8) if x.device.type == "cpu" else x


def exchange(
    group: Any,
    send: Tensor,
    send_counts: Sequence[int],
    receive_counts: Sequence[int],
    *,
    room: int = 0,
    head_start: int = 0,
) -> Arrival:
    """Send runs of rows of ``send`` (rows, width), one after the other by rank, and receive likewise.

    What arrives is followed by ``room`` rows that the caller fills.

    All ranks of the group take part, whatever their counts. What is enqueued next on a GPU starts ``head_start`` cycles
    later than it could: a kernel that fills the whole GPU would otherwise begin before the one that moves the rows,
    which then waits for its end.
    """
    arriving = sum(receive_counts)
    whole = send.new_empty(arriving + room, send.shape[1])
    received = whole[:arriving] if room else whole
    if group is None:
        received.copy_(send)
        return Arrival(whole, None)
    work = dist.all_to_all_single(
        _bytes(received), _bytes(send), list(receive_counts), list(send_counts), group=group, async_op=True
    )
    if head_start and send.is_cuda:
        with torch.cuda.device(send.device):
            torch.cuda._sleep(head_start)
    return Arrival(whole, work, send)


def gather_rows(groups: Sequence[Any], x: Tensor) -> Tensor:
    """Every rank's rows of x (rows, ...), ranks one after the other; ``groups`` from the inner dim to the outer."""
    for group in groups:
        whole = x.new_empty(dist.get_world_size(group) * x.shape[0], *x.shape[1:])
        if whole.numel():
            _all_gather(_carried(whole), _carried(x), group=group)
        x = whole
    return x


def _carried(x: Tensor) -> Tensor:
    """A tensor's elements in one run of memory, of a dtype that every group can carry: NCCL has no int16."""
    flat = x.contiguous().view(-1)
    return flat.view(torch.uint8) if x.device.type == "cpu" or x.dtype in (torch.bool, torch.int16) else flat
