"""Taking a rank's rows of a batch, and putting the ranks' rows together again."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from anyattn._context._data import Layout
from anyattn._context._exchange import gather_rows
from anyattn._context._plan_data import Memory
from anyattn._context._topology import Members
from anyattn._derived import in_graph_memory
from anyattn._errors import ContextError, DtypeError, InvalidArgument, ShapeError


class Shards:
    """How the rows of a batch are divided over the ranks."""

    def __init__(self, layout: Layout, memory: Memory, rank: int, members: Members | None) -> None:
        self._layout, self._memory, self._rank, self._members = layout, memory, rank, members
        self._indices: dict[tuple[str, torch.device], Tensor] = {}

    @property
    def rows(self) -> int:
        """Rows of every rank's shard."""
        return self._layout.rows

    @property
    def valid(self) -> Tensor:
        """Bool (rows,): which of this rank's rows hold a token; on the device of the group."""
        return self._index("mine", self._device) >= 0

    @property
    def position_ids(self) -> Tensor:
        """int64 (rows,): positions within the document, 0 at padding; on the device of the group."""
        return self._index("positions", self._device)

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu") if self._members is None else self._members.device

    def shard(self, x: Tensor, dim: int = 0, fill: float = 0) -> Tensor:
        """This rank's rows of a batch that every rank holds whole.

        Args:
            x: any dtype; dim counts the rows of the packing in memory, or the positions of a plain length.
            dim: which dim counts rows.
            fill: what rows without a token get: -100 for labels.

        Returns:
            x with ``rows`` in place of dim. Its gradient is zero outside of this rank's rows; nothing is communicated.

        Raises:
            DtypeError: x's dtype cannot hold the fill.
            ShapeError: dim has fewer rows than the packing, or another size than the plain length.
        """
        dim = self._dim(x, dim)
        _check_fill("shard", x, fill)
        size, wanted = x.shape[dim], self._memory.rows
        if size < wanted or (self._memory.entries and size != wanted):
            raise self._misfit("shard", x, dim, f"the whole batch, {wanted} rows", wanted, "a shard already", self.rows)
        return _take(x, dim, self._index("mine", x.device), fill)

    def unshard(self, x: Tensor, dim: int = 0, fill: float = 0) -> Tensor:
        """The whole batch in its original memory layout, from every rank's shard; all ranks call it.

        Args:
            x: this rank's rows, of one shape and dtype on all ranks.
            dim: which dim counts rows.
            fill: what rows outside every sequence get.

        Returns:
            x with the memory layout's rows in place of dim. In backward each rank takes the gradient of its own rows:
            all ranks compute one value from the whole.

        Raises:
            ContextError: the plan was made without a group: see :meth:`ContextParallel.bind`; or, where this is the
                plan's first use, another rank's shard is wrong.
            DtypeError: x's dtype cannot hold the fill.
            ShapeError: dim has another size than :attr:`rows`. Once the plan was used this is found on this rank alone:
                the others wait for it as long as their group does.
        """
        failure: InvalidArgument | None = None
        try:
            dim = self._shard_dim(x, dim, fill)
        except InvalidArgument as error:
            failure = error
        self._connected()
        self._agree(failure)
        if failure is not None:
            raise failure
        whole: Tensor = _Unshard.apply(x, self, dim, fill)  # type: ignore[no-untyped-call]
        return whole

    def _agree(self, failure: Exception | None = None) -> None:
        """Compare with the other ranks, and tell them why this one cannot go on; a plan does."""

    def _shard_dim(self, x: Tensor, dim: int, fill: float) -> int:
        """The dim of this rank's rows, checked for unshard."""
        dim = self._dim(x, dim)
        _check_fill("unshard", x, fill)
        if x.shape[dim] != self.rows:
            given = "the whole batch", self._memory.rows
            raise self._misfit("unshard", x, dim, f"a shard, {self.rows} rows", self.rows, *given)
        return dim

    def _misfit(self, call: str, x: Tensor, dim: int, taken: str, rows: int, other: str, other_rows: int) -> ShapeError:
        """The error for a tensor with another number of rows than what a call takes."""
        text = f"{call}: dim {dim} of shape {tuple(x.shape)} has {x.shape[dim]} rows, and {call} takes {taken}"
        fitting = [i for i, size in enumerate(x.shape) if size == rows]
        if fitting:
            text += f": pass dim={fitting[0]}, which has as many"
        elif x.shape[dim] == other_rows:
            text += f"; this is {other}"
        return ShapeError(text)

    def _connected(self) -> Members:
        """Who the other ranks are.

        Raises:
            ContextError: the plan was made without a group.
        """
        members = self._members
        if members is None or (members.groups is None and members.world > 1):
            raise ContextError(
                "this plan was made without a process group, which attention and unshard need: connect it with "
                "ContextParallel(mesh_or_group).bind(plan)"
            )
        return members

    def _replace(self, layout: Layout, memory: Memory) -> None:
        """Another batch of as many rows, in place: what was made from these indices sees it."""
        self._layout, self._memory = layout, memory
        for (name, device), index in self._indices.items():
            index.copy_(_upload(getattr(self, f"_make_{name}")(), device), non_blocking=True)

    @staticmethod
    def _dim(x: Tensor, dim: int) -> int:
        if not isinstance(x, Tensor):
            raise ShapeError(f"x must be a tensor, got {type(x).__name__}")
        if not -x.ndim <= dim < x.ndim:
            raise ShapeError(f"dim {dim} is not one of a tensor of shape {tuple(x.shape)}")
        return dim % x.ndim

    def _index(self, name: str, device: torch.device) -> Tensor:
        """int64 rows on a device: "mine" and "positions" per row of the shard, "whole" per row in memory; -1: none."""
        key = (name, device)
        if key not in self._indices:
            check_not_captured(device)
            with torch.inference_mode(False):
                self._indices[key] = _upload(getattr(self, f"_make_{name}")(), device)
        return self._indices[key]

    def _make_mine(self) -> Tensor:
        index = torch.full((self.rows,), -1, dtype=torch.int64, device="cpu")
        for document, begin, end, row in self._layout.pieces[self._rank]:
            first = self._memory.starts[document]
            index[row : row + end - begin] = torch.arange(first + begin, first + end, device="cpu")
        return index

    def _make_positions(self) -> Tensor:
        index = torch.zeros(self.rows, dtype=torch.int64, device="cpu")
        for _, begin, end, row in self._layout.pieces[self._rank]:
            index[row : row + end - begin] = torch.arange(begin, end, device="cpu")
        return index

    def _make_whole(self) -> Tensor:
        index = torch.full((self._memory.rows,), -1, dtype=torch.int64, device="cpu")
        for rank, pieces in enumerate(self._layout.pieces):
            for document, begin, end, row in pieces:
                first = self._memory.starts[document]
                at = rank * self.rows + row
                index[first + begin : first + end] = torch.arange(at, at + end - begin, device="cpu")
        return index

    def _gathered(self, x: Tensor, dim: int, fill: float) -> Tensor:
        """What unshard returns."""
        members = self._connected()
        rows = x.movedim(dim, 0)
        if members.groups is not None:
            rows = gather_rows(members.groups[::-1], rows)
        return _take(rows, 0, self._index("whole", x.device), fill).movedim(0, dim)

    def _own_rows(self, device: torch.device) -> Tensor:
        """int64 (rows,): where this rank's rows lie in memory; -1 for those without a token."""
        return self._index("mine", device)


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards, dim: int, fill: float) -> Tensor:
        ctx.dim = dim
        # Saved, so that refilling the plan before backward is an error and not a wrong gradient.
        ctx.save_for_backward(shards._own_rows(x.device))
        return shards._gathered(x, dim, fill)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (mine,) = ctx.saved_tensors
        return _take(grad, ctx.dim, mine, 0), None, None, None


def _check_fill(call: str, x: Tensor, fill: float) -> None:
    """Refuse a fill that would come out as another number.

    Raises:
        DtypeError: it would.
    """
    dtype = x.dtype
    if fill == 0 or dtype.is_complex:
        return
    if dtype == torch.bool:
        fits, held = fill == 1, "False and True"
    elif dtype.is_floating_point:
        most = torch.finfo(dtype).max
        fits, held = not math.isfinite(fill) or abs(fill) <= most, f"numbers up to {most:g}"
    else:
        info = torch.iinfo(dtype)
        fits = math.isfinite(fill) and fill == int(fill) and info.min <= fill <= info.max
        held = f"ints from {info.min} to {info.max}"
    if not fits:
        raise DtypeError(
            f"{call}: fill={fill!r} and x of dtype {dtype}, which holds {held}: convert x, or fill with one"
        )


def check_not_captured(device: torch.device) -> None:
    """Refuse to put a plan on a device while a CUDA graph is captured: it would live in the graph's memory.

    Raises:
        ContextError: it is.
    """
    if device.type == "cuda" and in_graph_memory(torch.cuda.current_device() if device.index is None else device.index):
        raise ContextError(
            "a plan's first use cannot be captured in a CUDA graph: run the step once before, uncaptured"
        )


def _take(x: Tensor, dim: int, index: Tensor, fill: float) -> Tensor:
    """Rows of x by index along dim; ``fill`` where it is -1."""
    shape = [1] * x.ndim
    shape[dim] = -1
    missing = (index < 0).view(shape)
    if x.shape[dim] == 0:  # every row is missing; the result still belongs to x's graph
        size = list(x.shape)
        size[dim] = index.numel()
        return torch.cat([x, x.new_full(size, fill)], dim)
    return x.index_select(dim, index.clamp(min=0)).masked_fill(missing, fill)


def _upload(x: Tensor, device: torch.device) -> Tensor:
    """To a device without waiting for it."""
    if device.type == "cpu":
        return x
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
