"""Taking a rank's rows of a batch, and putting the ranks' rows together again."""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from anyattn._context._data import Layout
from anyattn._context._exchange import gather_rows
from anyattn._context._plan_data import Memory
from anyattn._context._taking import as_bits, check_fill, taken
from anyattn._context._topology import Members, number_of
from anyattn._derived import in_graph_memory
from anyattn._errors import ContextError, InvalidArgument, ShapeError

#: Plans by numbers that are no other's in this process: compiled code holds the number.
by_handle: WeakValueDictionary[int, Shards] = WeakValueDictionary()
_handles = itertools.count(2)  # the compiler takes 0 and 1 for constants


class Shards:
    """How the rows of a batch are divided over the ranks."""

    def __init__(self, layout: Layout, memory: Memory, rank: int, members: Members | None) -> None:
        self._layout, self._memory, self._rank, self._members = layout, memory, rank, members
        self._handle = next(_handles)
        by_handle[self._handle] = self
        self._device = torch.device("cpu") if members is None else members.device
        self._indices: dict[tuple[str, torch.device], Tensor] = {}

    @property
    def rows(self) -> int:
        """Rows of every rank's shard."""
        return self._layout.rows

    @property
    def valid(self) -> Tensor:
        """Bool (rows,): which of this rank's rows hold a token; on the device of the group.

        The plan's own tensor, not to be written to; ``copy_`` refills it in place. Compiled code gets a copy.
        """
        return self._made("valid")

    @property
    def position_ids(self) -> Tensor:
        """int64 (rows,): positions within the document, 0 at padding; on the device of the group.

        The plan's own tensor, not to be written to; ``copy_`` refills it in place. Compiled code gets a copy.
        """
        return self._made("positions")

    def _made(self, name: str) -> Tensor:
        """An index on the device of the group."""
        if torch.compiler.is_compiling():
            from anyattn._context import _opaque

            made: Tensor = _opaque.index(self, name, self._device)
            return made
        return self._index(name, self._device)

    def shard(self, x: Tensor, dim: int = 0, fill: float = 0) -> Tensor:
        """This rank's rows of a batch that every rank holds whole; the same tokens on all ranks.

        Args:
            x: any dtype; dim counts the rows of the packing in memory, or the positions of a plain length. Rows after
                those of a packing are padding, as :func:`anyattn.attention` takes them to be: none is in any shard.
            dim: which dim counts rows.
            fill: what rows without a token get: -100 for labels.

        Returns:
            x with ``rows`` in place of dim. Its gradient is zero outside of this rank's rows; nothing is communicated.

        Raises:
            DtypeError: x's dtype cannot hold the fill.
            InvalidArgument: fill is no number.
            ShapeError: dim has fewer rows than the packing, or another size than the plain length.
        """
        if torch.compiler.is_compiling():
            from anyattn._context import _opaque

            mine: Tensor = _opaque.shard(self, x, dim, fill)
            return mine
        return self._shard(x, dim, fill)

    def _shard(self, x: Tensor, dim: int, fill: float) -> Tensor:
        dim = self._dim(x, dim)
        check_fill("shard", x, fill)
        size, wanted = x.shape[dim], self._memory.rows
        if size < wanted or (self._memory.entries and size != wanted):
            raise self._misfit("shard", x, dim, f"the whole batch, {wanted} rows", wanted, "a shard already", self.rows)
        return taken(x, dim, self._index("mine", x.device), fill)

    def unshard(self, x: Tensor, dim: int = 0, fill: float = 0) -> Tensor:
        """The whole batch in its original memory layout, from every rank's shard; all ranks call it.

        Args:
            x: this rank's rows, of one shape and dtype on all ranks.
            dim: which dim counts rows.
            fill: what rows outside every sequence get.

        Returns:
            x with the memory layout's rows in place of dim. In backward each rank takes its own rows of the gradient,
            and nothing is communicated: that is right where all ranks compute one loss, the same, from the whole. Where
            a layer over the whole batch is followed by :meth:`shard`, each rank has a part of the loss, and so of the
            gradient of every row: have the parts added up, by a hook on the whole that calls all_reduce
            (docs/context-parallel.md has it).

        Raises:
            ContextError: the plan was made without a group: see :meth:`ContextParallel.bind`; or, where this is the
                plan's first use, another rank's shard is wrong.
            DtypeError: x's dtype cannot hold the fill.
            InvalidArgument: fill is no number.
            ShapeError: dim has another size than :attr:`rows`. Once the plan was used this is found on this rank alone:
                the others wait for it as long as their group does.
        """
        if torch.compiler.is_compiling():
            from anyattn._context import _opaque

            whole: Tensor = _opaque.unshard(self, x, dim, fill)
            return whole
        return self._unshard(x, dim, fill)

    def _unshard(self, x: Tensor, dim: int, fill: float) -> Tensor:
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
        check_fill("unshard", x, fill)
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
    def _dim(x: Tensor, dim: Any) -> int:
        if not isinstance(x, Tensor):
            raise ShapeError(f"x must be a tensor, got {type(x).__name__}")
        place = number_of(dim)
        if place is None or not -x.ndim <= place < x.ndim:
            raise ShapeError(f"dim {dim!r} is not one of a tensor of shape {tuple(x.shape)}")
        return place % x.ndim

    def _index(self, name: str, device: torch.device) -> Tensor:
        """On a device: int64 "mine" and "positions" and bool "valid" by rows of the shard, "whole" by rows in memory.

        Where there is no token, "mine" and "whole" are -1.
        """
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

    def _make_valid(self) -> Tensor:
        return self._make_mine() >= 0

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
            rows = gather_rows(members.groups[::-1], as_bits(rows)).view(x.dtype)
        return taken(rows, 0, self._index("whole", x.device), fill).movedim(0, dim)

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
        return taken(grad, ctx.dim, mine, 0), None, None, None


def check_not_captured(device: torch.device) -> None:
    """Refuse to put a plan on a device while a CUDA graph is captured: it would live in the graph's memory.

    Raises:
        ContextError: it is.
    """
    if device.type == "cuda" and in_graph_memory(torch.cuda.current_device() if device.index is None else device.index):
        raise ContextError(
            "a plan's first use cannot be captured in a CUDA graph: run the step once before, uncaptured"
        )


def _upload(x: Tensor, device: torch.device) -> Tensor:
    """To a device without waiting for it."""
    if device.type == "cpu":
        return x
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
