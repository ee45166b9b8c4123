"""What lies where on all ranks, and which of it sees which: what the stages of every scheme are made from.

Legend: a *run* of a shard is a maximal range of tokens of a document whose rows follow one another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from anyattn._context._data import Layout, Mask, Piece, Run
from anyattn._context._geometry import Meeting, Span, meet, needed

# ---- pieces and runs


def merged(pieces: Iterable[Piece]) -> list[Piece]:
    """Pieces in the order of rows, those that continue one another made one."""
    result: list[Piece] = []
    for piece in pieces:
        if result:
            last = result[-1]
            follows = last.document == piece.document and last.end == piece.begin
            if follows and last.row + last.end - last.begin == piece.row:
                result[-1] = last._replace(end=piece.end)
                continue
        result.append(piece)
    return result


def append_run(runs: list[Run], row: int, count: int) -> None:
    """Add rows at the end: to the last run if they follow it, nothing if there are none."""
    if runs and runs[-1].row + runs[-1].rows == row:
        runs[-1] = Run(runs[-1].row, runs[-1].rows + count)
    elif count:
        runs.append(Run(row, count))


def runs_of(pieces: Iterable[Piece]) -> tuple[Run, ...]:
    """The rows of pieces in the order given, adjacent ones made one run."""
    result: list[Run] = []
    for piece in pieces:
        append_run(result, piece.row, piece.end - piece.begin)
    return tuple(result)


def packed(pieces: Iterable[Piece]) -> list[Piece]:
    """The same tokens in rows that follow one another from 0 on, in the order given."""
    result, row = [], 0
    for piece in pieces:
        result.append(Piece(piece.document, piece.begin, piece.end, row))
        row += piece.end - piece.begin
    return result


def union(spans: list[Span]) -> list[Span]:
    """Disjoint ranges, in order, that cover the same tokens."""
    if len(spans) < 2:
        return spans
    result: list[Span] = []
    for begin, end in sorted(spans):
        if result and begin <= result[-1][1]:
            result[-1] = result[-1][0], max(end, result[-1][1])
        else:
            result.append((begin, end))
    return result


def clipped(pieces: Iterable[Piece], spans: Sequence[Span]) -> Iterator[Piece]:
    """What lies within the disjoint, increasing ranges."""
    for piece in pieces:
        document, begin, end, row = piece
        for low, high in spans:
            if low <= begin and end <= high:
                yield piece
            elif low < end and begin < high:
                first = max(begin, low)
                yield Piece(document, first, min(end, high), row + first - begin)


# ---- all ranks


@dataclass(frozen=True, slots=True)
class Index:
    """The runs of a layout, by rank and document. Not to be changed: it is shared."""

    shards: tuple[dict[int, list[Piece]], ...]
    """By rank: the runs of each document, in the order of rows; documents in the order of their first rows."""
    holders: dict[int, list[int]]
    """The ranks that hold a part of a document."""


@lru_cache(maxsize=8)
def index(layout: Layout) -> Index:
    """The index of a layout; kept, since plans of several ranks and masks share layouts."""
    shards: list[dict[int, list[Piece]]] = []
    holders: dict[int, list[int]] = {}
    for rank, pieces in enumerate(layout.pieces):
        shard: dict[int, list[Piece]] = {}
        for piece in merged(pieces):
            shard.setdefault(piece.document, []).append(piece)
        for document in shard:
            holders.setdefault(document, []).append(rank)
        shards.append(shard)
    return Index(tuple(shards), holders)


@dataclass(frozen=True, slots=True)
class Scene:
    """Queries and keys of all ranks, and which see which."""

    mask: Mask
    len_q: tuple[int, ...]
    len_k: tuple[int, ...]
    q: Index
    k: Index

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return len(self.q.shards)

    def meet(self, queries: Piece, keys: Piece) -> Meeting | None:
        """The part of two runs of one document that see each other."""
        n, m = self.len_q[queries.document], self.len_k[queries.document]
        return meet(self.mask, n, m, (queries.begin, queries.end), (keys.begin, keys.end))

    def runs(self, rank: int, document: int) -> Iterator[Piece]:
        """The runs of a document's queries on a rank; under a window, the part that sees own keys alone is one of them.

        That part then computes while the keys of the rest arrive. It is cut off where it is the larger one.
        """
        for piece in self.q.shards[rank].get(document, ()):
            low, high = self._at_home(rank, piece)
            if (low, high) == (piece.begin, piece.end) or 2 * (high - low) <= piece.end - piece.begin:
                yield piece
                continue
            cuts = (piece.begin, low, high, piece.end)
            for begin, end in pairwise(cuts):
                if begin < end:
                    yield Piece(document, begin, end, piece.row + begin - piece.begin)

    def _at_home(self, rank: int, piece: Piece) -> Span:
        """The queries of a run whose keys are within the run of keys of this rank that lies with it."""
        left, right, top_left = self.mask
        length = self.len_k[piece.document]
        shift = 0 if top_left else length - self.len_q[piece.document]
        best = (piece.begin, piece.begin)
        for _, begin, end, _ in self.k.shards[rank].get(piece.document, ()):
            low, high = piece.begin, piece.end
            if begin > 0:
                low = piece.end if left is None else max(low, begin + left - shift)
            if end < length:
                high = piece.begin if right is None else min(high, end - right - shift)
            if high - low > best[1] - best[0]:
                best = (low, high)
        return best

    def seen(self, rank: int, document: int) -> Iterator[tuple[Piece, Meeting]]:
        """The runs of a document's queries on a rank, and all the keys that each sees."""
        whole = Piece(document, 0, self.len_k[document], 0)
        for piece in self.runs(rank, document):
            meeting = self.meet(piece, whole)
            if meeting is not None:
                yield piece, meeting

    def own_row(self, rank: int, document: int, keys: Span) -> int | None:
        """Where the rank's own key shard holds these tokens in one run; None if it does not."""
        for _, begin, end, row in self.k.shards[rank].get(document, ()):
            if begin <= keys[0] and keys[1] <= end:
                return row + keys[0] - begin
        return None

    def needed(self, rank: int, document: int) -> list[Span]:
        """The keys that each run of a document's queries on a rank sees, where it sees any."""
        n, m = self.len_q[document], self.len_k[document]
        runs = self.runs(rank, document)
        spans = [needed(self.mask, n, m, begin, end) for _, begin, end, _ in runs]
        return [span for span in spans if span[0] < span[1]]

    def fetched(self, rank: int, document: int) -> list[Span]:
        """The tokens of a document that a rank fetches: those of queries whose keys are not one run of its shard."""
        return union([s for s in self.needed(rank, document) if self.own_row(rank, document, s) is None])


def scene_of(queries: Layout, keys: Layout, mask: Mask) -> Scene:
    """Everything that plans are made from."""
    assert queries.ranks == keys.ranks
    assert len(queries.lengths) == len(keys.lengths)
    return Scene(mask, queries.lengths, keys.lengths, index(queries), index(keys))


def most_fetched(queries: Layout, keys: Layout, mask: Mask) -> int:
    """Rows of the key buffers of the rank that has the most, in one forward of a scheme that divides no heads."""
    scene = scene_of(queries, keys, mask)
    most = 0
    for rank, shard in enumerate(scene.q.shards):
        cut = (d for d in shard if scene.k.holders.get(d) != [rank])
        most = max(most, sum(end - begin for d in cut for begin, end in scene.fetched(rank, d)))
    return most
