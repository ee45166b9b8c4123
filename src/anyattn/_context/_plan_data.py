"""What a plan holds and what follows from it: pure host data, picklable, the same on every rank but for the rank."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

from anyattn._context import _geometry, _stages, _static
from anyattn._context._data import Capacity, Comm, Layout, Mask, Piece, Placement, RankPlan, Run, Shape
from anyattn._context._estimate import are_kept
from anyattn._context._scene import most_fetched
from anyattn._context._topology import Topology
from anyattn._errors import ContextError


@dataclass(frozen=True, slots=True)
class Memory:
    """Where the documents of an unsharded batch lie."""

    starts: tuple[int, ...]
    """First row of each document."""
    rows: int
    """Rows in memory."""
    entries: bool
    """One sequence of a plain length, for 4-D tensors of any batch size."""


@dataclass(frozen=True)
class PlanData:
    """The facts of a plan. What is derived is computed once, and not pickled."""

    comm: Comm
    topology: Topology
    rank: int
    mask: Mask
    queries: Layout
    keys: Layout
    memory_q: Memory
    memory_k: Memory
    cross: bool
    """Keys have lengths and a layout of their own."""
    placement: Placement
    multiple: int
    shape: Shape
    given: tuple[int | None, int | None, int | None, int | None]
    """num_heads, num_kv_heads, head_dim and head_dim_v, as far as the caller gave them."""
    features: tuple[str, ...] = ()
    sanitize: bool = False
    capacity: Capacity | None = None
    """Fixed: calls, moves and tables have one shape for every batch that fits, for captured CUDA graphs."""

    def __getstate__(self) -> dict[str, object]:
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}

    def batched(self, batch: int) -> PlanData:
        """The same for 4-D tensors of a batch, flattened to rows: each entry is a document."""
        if batch == 1:
            return self
        return replace(
            self,
            queries=_batched(self.queries, batch),
            keys=_batched(self.keys, batch),
            memory_q=_batched_memory(self.memory_q, batch),
            memory_k=_batched_memory(self.memory_k, batch),
        )

    @cached_property
    def inner(self) -> tuple[Layout, Layout]:
        """Layouts of queries and keys over the sequence ranks, once the heads of each group are exchanged."""
        return self._united[0][0], self._united[1][0]

    @property
    def order(self) -> tuple[tuple[Run, ...] | None, tuple[Run, ...] | None]:
        """How the united rows of this rank's group come into order, for queries and for keys; None: they are."""
        place = self.rank // self.topology.heads
        return self._united[0][1][place], self._united[1][1][place]

    @cached_property
    def _united(self) -> tuple[tuple[Layout, tuple[tuple[Run, ...] | None, ...]], ...]:
        if self.topology.heads == 1:
            nothing = (None,) * self.topology.sequence
            return (self.queries, nothing), (self.keys, nothing)
        groups = self.topology.groups()
        queries = _stages.united(self.queries, groups)
        return queries, queries if self.keys is self.queries else _stages.united(self.keys, groups)

    @cached_property
    def stages(self) -> RankPlan:
        """What this rank does."""
        return self.stages_of(self.rank, alibi=False)

    @cached_property
    def alibi_stages(self) -> RankPlan:
        """What this rank does where positions matter: keys in global order, nothing fused."""
        return self.stages_of(self.rank, alibi=True)

    def stages_of(self, rank: int, alibi: bool) -> RankPlan:
        """What a rank does."""
        queries, keys = self.inner
        place = rank // self.topology.heads
        if self.capacity is not None:
            return _static.stages(queries, self.mask, place)
        if self.is_ring and not alibi:
            return _stages.ring_stages(queries, keys, self.mask, place)
        return _stages.gather_stages(queries, keys, self.mask, place, fuse=not alibi)

    @property
    def is_ring(self) -> bool:
        """Keys go round in stages whose results are merged; with a finite window a halo in global order is exact."""
        return self.comm in ("p2p", "a2a+p2p") and self.mask.left is None and not self.mask.right

    def areas(self) -> list[int]:
        """Visible (query, key) pairs that each rank computes, per head of the model."""
        queries, _ = self.inner
        heads = self.topology.heads
        found = []
        for pieces in queries.pieces:
            total = sum(
                _geometry.area(
                    self.mask, self.queries.lengths[p.document], self.keys.lengths[p.document], p.begin, p.end
                )
                for p in pieces
            )
            found += [total // heads] * heads
        return found

    def mean_area(self) -> tuple[float, float]:
        """Visible pairs per rank and head on average, and the part that belongs to documents on several ranks."""
        held: dict[int, int] = {}
        for pieces in self.inner[0].pieces:
            for document in {p.document for p in pieces}:
                held[document] = held.get(document, 0) + 1
        total = cut = 0
        for document, holders in held.items():
            length = self.queries.lengths[document]
            size = _geometry.area(self.mask, length, self.keys.lengths[document], 0, length)
            total, cut = total + size, cut + (size if holders > 1 else 0)
        return total / self.topology.world, cut / total if total else 0.0

    @cached_property
    def most_fetched(self) -> int:
        """Rows of the largest key buffers among the ranks."""
        return most_fetched(*self.inner, self.mask)

    def keeps(self, heads: tuple[int, int], dims: int) -> bool:
        """Whether keys that are fetched in forward stay for backward; alike on all ranks.

        Args:
            heads: of queries and keys.
            dims: head_dim and head_dim_v together.
        """
        if self.capacity is not None or self.topology.heads > 1 or self.topology.sequence == 1:
            return False
        queries, keys = self.inner
        return are_kept(self.most_fetched, (queries.rows, keys.rows), heads, dims)

    def fingerprint(self) -> dict[str, int]:
        """A number for each field that all ranks must agree about."""
        fields: dict[str, object] = {
            "lengths": self.queries.lengths,
            "memory layout": self.memory_q,
            "key lengths": self.keys.lengths,
            "key memory layout": self.memory_k,
            "mask (causal, window)": self.mask,
            "comm": self.comm,
            "ranks": self.topology,
            "placement": (self.placement, self.queries.pieces, self.keys.pieces),
            "rows per rank": (self.queries.rows, self.keys.rows, self.multiple),
            "heads and head dims": self.given,
            "features": self.features,
            "capacity": self.capacity,
        }
        return {name: number(value) for name, value in fields.items()}


def number(value: object) -> int:
    """63 bits that depend on a value's text alone, on every machine."""
    digest = hashlib.blake2b(repr(value).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _batched(layout: Layout, batch: int) -> Layout:
    count = len(layout.lengths)
    pieces = tuple(
        tuple(
            Piece(p.document + entry * count, p.begin, p.end, p.row + entry * layout.rows)
            for entry in range(batch)
            for p in own
        )
        for own in layout.pieces
    )
    return Layout(layout.lengths * batch, pieces, layout.rows * batch)


def _batched_memory(memory: Memory, batch: int) -> Memory:
    starts = tuple(start + entry * memory.rows for entry in range(batch) for start in memory.starts)
    return Memory(starts, memory.rows * batch, memory.entries)


def _queries_are_longer(data: PlanData) -> bool:
    return any(q > k for q, k in zip(data.queries.lengths, data.keys.lengths, strict=True))


#: Why a scheme cannot do what a feature asks: physics, not effort.
_ONLY_GATHER = (
    "a bias or mask over this rank's queries and all keys needs all keys in their original order: use comm='all_gather'"
)


def check_features(data: PlanData, features: frozenset[str]) -> None:
    """Refuse what a scheme cannot do.

    Raises:
        ContextError: with what to do instead.
    """
    if features & {"bias", "mask"}:
        name = "bias" if "bias" in features else "mask"
        if not data.memory_q.entries:
            raise ContextError(
                f"a tensor {name} goes with 4-D tensors, whose plan is made from a plain length: this plan was made "
                "from a Packing, under which documents are told apart already"
            )
        if data.comm != "all_gather":
            raise ContextError(f"{name} under comm={data.comm!r}: {_ONLY_GATHER}")
    if "alibi" in features and data.mask.top_left and _queries_are_longer(data):
        raise ContextError(
            "ALiBi with causal='top_left' and more queries than keys: the last queries stand beyond all keys, "
            "and kernels measure distances from the end of the keys: use causal=True, or attention without a plan"
        )
    if "alibi" in features and data.comm != "a2a" and data.mask.right != 0:
        raise ContextError(
            f"ALiBi without causal under comm={data.comm!r}: kernels count distances from the end of the keys, which "
            "part of a sequence's queries cannot share without causal: use comm='a2a'"
        )
    if data.capacity is not None:
        _static.check(data.comm, data.mask, data.placement, data.cross)
    if data.cross and data.comm in ("p2p", "a2a+p2p"):
        raise ContextError(f"packing_kv under comm={data.comm!r}: use comm='all_gather' or 'a2a' for cross-attention")
