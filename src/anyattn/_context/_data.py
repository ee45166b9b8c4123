"""What a context-parallel plan is made of: pure host data, no tensor.

Legend: R ranks, a *document* is one sequence of the batch, a *piece* is a run of one document's tokens on one rank, a
*shard* is the rows of one rank. Keys of cross-attention have a layout of their own; else queries' and keys' are one.

Everything a schedule does follows from three things: *placement* (:class:`Layout`: which tokens each rank owns),
*entries* (:class:`KernelCall`: which runs of queries meet which runs of keys, and how they are masked) and *moves*
(:class:`Stage`: which rows travel from whom to whom, and when).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Comm = Literal["p2p", "all_gather", "a2a", "a2a+p2p"]
Placement = Literal["auto", "contiguous", "zigzag", "documents"]


class Mask(NamedTuple):
    """Which keys a query sees, by position. Causal is ``right == 0``; None is unbounded.

    Query i of a document stands at i + len_k - len_q, or at i with ``top_left``, and sees the keys at positions from
    its own - left to its own + right.
    """

    left: int | None = None
    right: int | None = None
    top_left: bool = False


class Piece(NamedTuple):
    """Tokens begin to end of a document, in rows row to row + end - begin of one shard."""

    document: int
    begin: int
    end: int
    row: int


class Run(NamedTuple):
    """Rows row to row + rows."""

    row: int
    rows: int


class Entry(NamedTuple):
    """Rows q to q + len_q of the query shard meet rows k to k + len_k of a stage's key buffer, aligned bottom-right."""

    q: int
    len_q: int
    k: int
    len_k: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Which tokens each rank owns, and where in its shard they lie."""

    lengths: tuple[int, ...]
    """Real tokens of each document."""
    pieces: tuple[tuple[Piece, ...], ...]
    """By rank; rows increase and are disjoint, and no piece is empty. Together they are every token once."""
    rows: int
    """Rows of every shard, the same on all ranks; rows in no piece are padding."""

    @property
    def ranks(self) -> int:
        """How many shards there are."""
        return len(self.pieces)


@dataclass(frozen=True, slots=True)
class KernelCall:
    """One call of a kernel: entries with one effective window.

    Rows of the entries increase and are disjoint, in q and in k. Every query row sees at least one key of its entry,
    and every key row is seen by at least one query row.
    """

    left: int | None
    """Effective, under bottom-right alignment within each entry; None: unbounded."""
    right: int | None
    entries: tuple[Entry, ...]
    documents: tuple[int, ...]
    """The document of each entry."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Keys that arrive together, and the calls that use them. Stages run in order; the local one, if any, is first.

    The key buffer of a stage is ``order`` applied to what was received, ranks one after the other; that of a local
    stage is this rank's own key shard.
    """

    calls: tuple[KernelCall, ...]
    local: bool
    """Nothing travels. The next four fields are empty then."""
    send: tuple[tuple[Run, ...], ...] = ()
    """By rank: rows of this rank's key shard that go there (its own index included)."""
    receive: tuple[int, ...] = ()
    """By rank: how many rows come from there."""
    order: tuple[Run, ...] | None = None
    """The key buffer as runs of the received rows; None: as they came."""
    rows: int = 0
    """Rows of the key buffer."""


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What one rank does."""

    stages: tuple[Stage, ...]
    """On every rank of a plan there are as many, and the same ones are local, so that all ranks meet."""
    exclusive: bool
    """No query row is in two calls: their results need no merging."""


class Capacity(NamedTuple):
    """What a plan has room for, whose tables can be refilled with another batch."""

    sequences: int
    max_seqlen: int


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that the cost of a plan depends on, beside lengths."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    head_dim_v: int = 128
    itemsize: int = 2
    """Bytes per element on the wire."""
