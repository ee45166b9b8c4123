"""What each rank computes, receives and sends under a placement, from the pieces of all ranks.

Legend: a *unit* is a rank, or a group of ranks that share heads. *Tile pairs* are pairs of a query and a key that
kernels compute: whole tiles of 128 by 128, of which the mask may hide a part.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from anyattn._context._data import Layout, Mask
from anyattn._context._geometry import Span, area, needed
from anyattn._context._scene import union

TILE = 128


class Load(NamedTuple):
    """What one unit computes, receives and sends."""

    whole: float = 0.0
    """Tile pairs of queries whose keys all lie here."""
    cut: float = 0.0
    """Tile pairs of the other queries."""
    here: float = 0.0
    """Share of these whose keys lie here."""
    received: int = 0
    """Key rows."""
    sent: int = 0
    merged: int = 0
    """Query rows whose result is merged in every remote stage."""
    peers: int = 0
    """Units from which keys come."""
    calls: int = 1


@lru_cache(maxsize=1 << 15)
def tile_pairs(mask: Mask, len_q: int, len_k: int, begin: int, end: int) -> float:
    """Tile pairs of the queries begin to end of a document, in expectation over how keys fall on tiles."""
    low, high = needed(mask, len_q, len_k, begin, end)
    if low == high:
        return 0.0
    tiles = -(-(end - begin) // TILE)
    span = -(-(high - low) // TILE) * TILE
    sides = (mask.left is not None) + (mask.right is not None)
    if tiles == 1 or not sides:
        return tiles * TILE * span
    ragged = sides == 2 or begin % TILE != 0
    keys = area(mask, len_q, len_k, begin, end) / (end - begin) + TILE / 2 * (sides + ragged)
    pairs = tiles * TILE * min(float(span), keys)
    if sides == 1:
        return pairs
    without = mask._replace(left=None), mask._replace(right=None)
    return min(pairs, *(tile_pairs(wider, len_q, len_k, begin, end) for wider in without))


# ---- from pieces alone


Spans = Sequence[Sequence[tuple[int, int, int]]]
"""By unit, (document, begin, end) in any order."""
Runs = dict[int, dict[int, list[Span]]]
"""By document and unit, the ranges that lie there, in order."""


class Apart(NamedTuple):
    """Keys that do not lie with the queries."""

    lengths: Sequence[int]
    spans: Spans


def spans_of(layout: Layout, members: int) -> Spans:
    """What every unit holds."""
    units: list[list[tuple[int, int, int]]] = [[] for _ in range(layout.ranks // members)]
    for rank, pieces in enumerate(layout.pieces):
        units[rank // members] += [piece[:3] for piece in pieces]
    return units


def _runs(spans: Spans) -> Runs:
    runs: Runs = {}
    for unit, own in enumerate(spans):
        for document, begin, end in own:
            runs.setdefault(document, {}).setdefault(unit, []).append((begin, end))
    for by_unit in runs.values():
        for unit, ranges in by_unit.items():
            if len(ranges) > 1:
                by_unit[unit] = union(ranges)
    return runs


class _Coverage:
    """How often the tokens below a point are covered by ranges, in all."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.begins, self.ends = sorted(s[0] for s in spans), sorted(s[1] for s in spans)
        self.sums = [0, *accumulate(self.begins)], [0, *accumulate(self.ends)]

    def below(self, at: int) -> int:
        """Sum over the ranges of their tokens below a point."""
        i, j = bisect_left(self.begins, at), bisect_left(self.ends, at)
        return (i * at - self.sums[0][i]) - (j * at - self.sums[1][j])


def _overlap(spans: Iterable[Span], others: Sequence[Span]) -> int:
    common = 0
    for begin, end in spans:
        for low, high in others:
            if low < end and begin < high:
                common += (end if end < high else high) - (begin if begin > low else low)
    return common


def _holds(spans: Iterable[Span], low: int, high: int) -> bool:
    """Whether one of the ranges holds all of a range."""
    for begin, end in spans:  # noqa: SIM110
        if begin <= low and high <= end:
            return True
    return False


class _Loads:
    """Loads of all units, summed document by document."""

    def __init__(self, mask: Mask, count: int) -> None:
        self.mask, self.count = mask, count
        self.whole, self.cut, self.here = [0.0] * count, [0.0] * count, [0.0] * count
        self.received, self.sent, self.merged, self.peers, self.most = ([0] * count for _ in range(5))
        # where a window's right side ends at the document's, queries of other distances from it go in other calls
        self.windows: list[set[int]] = [set() for _ in range(count)]

    def add(self, n: int, m: int, runs: dict[int, list[Span]], key_runs: dict[int, list[Span]]) -> None:
        """Add a document of n queries and m keys, by the units that hold a part of either."""
        wanted = {unit: self._queries(n, m, unit, own, key_runs.get(unit, [])) for unit, own in runs.items()}
        spans = [span for found in wanted.values() for span in found]
        if not spans:
            return
        coverage = _Coverage(spans)
        for unit, own in key_runs.items():
            covered = sum(coverage.below(e) - coverage.below(b) for b, e in own)
            self.sent[unit] += covered - _overlap(own, wanted.get(unit, []))
        begins = sorted(b for own in key_runs.values() for b, _ in own)
        for unit, found in wanted.items():
            sources = sum(bisect_left(begins, e) - max(0, bisect_left(begins, b + 1) - 1) for b, e in found)
            others = len(key_runs) - (unit in key_runs)
            self.peers[unit] = min(self.count - 1, self.peers[unit] + min(others, sources))

    def add_causal(self, n: int, runs: dict[int, list[Span]]) -> None:
        """The same for a document of n queries and keys that lie together, under plain causality, in fewer steps.

        Every query sees from the first key on: of a unit's ranges one that begins there needs no other unit, and the
        others together need all keys before their last one's end.
        """
        ends: dict[int, int] = {}
        for unit, own in runs.items():
            far = own
            if own[0][0] == 0:
                self.whole[unit] += tile_pairs(self.mask, n, n, *own[0])
                far = own[1:]
            if not far:
                continue
            ends[unit] = end = far[-1][1]
            pairs = 0.0
            for span in far:
                pairs += tile_pairs(self.mask, n, n, *span)
                self.merged[unit] += span[1] - span[0]
            held = sum(e - b for b, e in own)
            self.most[unit] = max(self.most[unit], len(far))
            self.cut[unit] += pairs
            self.received[unit] += end - held
            self.here[unit] += pairs * held / end
        ordered = sorted(ends.values())
        sums = [0, *accumulate(ordered)]

        def below(at: int) -> int:
            i = bisect_left(ordered, at)
            return sums[i] + (len(ordered) - i) * at

        begins = sorted(b for own in runs.values() for b, _ in own)
        for unit, own in runs.items():
            for b, e in own:
                self.sent[unit] += below(e) - below(b) - (e - b if unit in ends else 0)
        for unit, end in ends.items():
            sources = min(len(runs) - 1, bisect_left(begins, end))
            self.peers[unit] = min(self.count - 1, self.peers[unit] + sources)

    def _queries(self, n: int, m: int, unit: int, own: list[Span], keys: list[Span]) -> list[Span]:
        """Add the queries of one unit; returns the keys that they fetch, own ones included."""
        mask = self.mask
        far: list[Span] = []
        pairs = 0.0
        for begin, end in own:
            low, high = seen = needed(mask, n, m, begin, end)
            size = tile_pairs(mask, n, m, begin, end)
            if low == high or _holds(keys, low, high):
                self.whole[unit] += size
                continue
            pairs += size
            self.merged[unit] += end - begin
            far.append(seen)
            if mask.right:
                self.windows[unit].add(high - end - (0 if mask.top_left else m - n))
        if not far:
            return far
        wanted = union(far)
        rows, local = sum(e - b for b, e in wanted), _overlap(keys, wanted)
        self.most[unit] = max(self.most[unit], len(far))
        self.cut[unit] += pairs
        self.received[unit] += rows - local
        self.here[unit] += pairs * local / rows
        return wanted

    def all(self) -> list[Load]:
        """By unit."""
        calls = [most + max(0, len(windows) - 1) for most, windows in zip(self.most, self.windows, strict=True)]
        columns = self.whole, self.cut, self.here, self.received, self.sent, self.merged, self.peers, calls
        return [
            Load(whole, cut, here / cut if cut else 0.0, received, sent, merged, peers, (whole > 0) + far)
            for whole, cut, here, received, sent, merged, peers, far in zip(*columns, strict=True)
        ]


def whole_pairs(lengths: Sequence[int], mask: Mask) -> list[float]:
    """By document, the tile pairs of all of it."""
    return [tile_pairs(mask, n, n, 0, n) for n in lengths]


def loads_of(
    spans: Spans, lengths: Sequence[int], mask: Mask, whole: Sequence[float], apart: Apart | None
) -> list[Load]:
    """What each unit computes and receives.

    Args:
        spans: of the queries.
        lengths: of the queries' documents.
        mask: which keys a query sees.
        whole: :func:`whole_pairs`, where keys lie with the queries.
        apart: the keys, where they do not.
    """
    found = _Loads(mask, len(spans))
    if apart is not None:
        runs, key_runs = _runs(spans), _runs(apart.spans)
        for document in sorted(runs):
            found.add(lengths[document], apart.lengths[document], runs[document], key_runs.get(document, {}))
        return found.all()
    homes = {document: unit for unit, own in enumerate(spans) for document, b, e in own if e - b == lengths[document]}
    runs = _runs([[span for span in own if span[0] not in homes] for own in spans])
    plain = mask.left is None and mask.right == 0
    for document, length in enumerate(lengths):
        if document in homes:
            found.whole[homes[document]] += whole[document]
        elif document in runs and plain:
            found.add_causal(length, runs[document])
        elif document in runs:
            found.add(length, length, runs[document], runs[document])
    return found.all()


def loads(layout: Layout, mask: Mask, members: int = 1, keys: Layout | None = None) -> list[Load]:
    """What each unit computes and receives, from a layout."""
    spans, apart = spans_of(layout, members), None
    if keys is not None and keys is not layout:
        apart = Apart(keys.lengths, spans_of(keys, members))
    whole = [] if apart else whole_pairs(layout.lengths, mask)
    return loads_of(spans, layout.lengths, mask, whole, apart)


def imbalance(layout: Layout, mask: Mask, members: int = 1, keys: Layout | None = None) -> float:
    """Largest area of a unit over the mean."""
    len_k = layout.lengths if keys is None else keys.lengths
    areas = [0] * (layout.ranks // members)
    for rank, pieces in enumerate(layout.pieces):
        areas[rank // members] += sum(area(mask, layout.lengths[d], len_k[d], b, e) for d, b, e, _ in pieces)
    return max(areas) * len(areas) / sum(areas) if sum(areas) else 1.0
