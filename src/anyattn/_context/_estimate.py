"""How long a plan takes, from what each rank computes and receives: enough to compare plans, not a promise.

Legend: a *unit* is a rank, or a group of ranks that share heads. *Tile pairs* are pairs of a query and a key that
kernels compute: whole tiles of 128 by 128, of which the mask may hide a part.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from anyattn._context._data import Comm, Layout, Mask, Shape
from anyattn._context._geometry import Span, area, needed
from anyattn._context._gpu import Gpu
from anyattn._context._scene import union

TILE = 128
MERGE_BYTES = 10
"""Device memory traffic per element of out that a merge of two partial results touches."""
BACKWARD = 2.5
"""Backward's FLOPs, in forward's."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a plan costs on the rank that takes longest."""

    comm: Comm
    forward: float
    """Seconds."""
    backward: float
    bytes_forward: int
    """Received by the rank that receives most."""
    bytes_backward: int
    calls: int
    """Kernel calls of one forward."""
    groups: int
    """Into how many groups the kv heads are divided, so that one group's keys arrive while another's are computed."""
    imbalance: float
    """Largest area of a rank over the mean: pairs of a query and a key that sees it."""


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


class Heads(NamedTuple):
    """What one rank holds of a model's heads."""

    query: int
    key: int


def heads_of(shape: Shape, members: int) -> Heads:
    """Heads of one rank where so many share them; kv heads are repeated as far as its query heads need.

    Sizes may be assumed ones that the ranks do not divide: the largest share is taken.
    """
    query = -(-shape.num_heads // members)
    return Heads(query, query // math.gcd(query, shape.num_heads // shape.num_kv_heads))


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


def is_ring(comm: Comm, mask: Mask) -> bool:
    """Whether keys go round in stages; with a finite window a halo in global order is fetched instead."""
    return comm in ("p2p", "a2a+p2p") and mask.left is None and not mask.right


# ---- from pieces alone


def _documents(layout: Layout, members: int) -> dict[int, dict[int, list[Span]]]:
    """By document and unit, the ranges that lie there, in order."""
    runs: dict[int, dict[int, list[Span]]] = {}
    for rank, pieces in enumerate(layout.pieces):
        for document, begin, end, _ in pieces:
            runs.setdefault(document, {}).setdefault(rank // members, []).append((begin, end))
    for by_unit in runs.values():
        for unit, own in by_unit.items():
            if len(own) > 1:
                by_unit[unit] = union(own)
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
    return sum(max(0, min(e, high) - max(b, low)) for b, e in spans for low, high in others)


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

    def _queries(self, n: int, m: int, unit: int, own: list[Span], keys: list[Span]) -> list[Span]:
        """Add the queries of one unit; returns the keys that they fetch, own ones included."""
        far: list[Span] = []
        pairs = 0.0
        for span in own:
            seen = needed(self.mask, n, m, *span)
            if seen[0] == seen[1] or any(b <= seen[0] and seen[1] <= e for b, e in keys):
                self.whole[unit] += tile_pairs(self.mask, n, m, *span)
                continue
            pairs += tile_pairs(self.mask, n, m, *span)
            self.merged[unit] += span[1] - span[0]
            far.append(seen)
            if self.mask.right:
                self.windows[unit].add(seen[1] - span[1] - (0 if self.mask.top_left else m - n))
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


def loads(layout: Layout, mask: Mask, members: int = 1, keys: Layout | None = None) -> list[Load]:
    """What each unit computes and receives."""
    found = _Loads(mask, layout.ranks // members)
    runs = _documents(layout, members)
    key_runs = runs if keys is None or keys is layout else _documents(keys, members)
    lengths_k = layout.lengths if keys is None else keys.lengths
    for document in sorted(runs):
        found.add(layout.lengths[document], lengths_k[document], runs[document], key_runs.get(document, {}))
    return found.all()


def imbalance(layout: Layout, mask: Mask, members: int = 1, keys: Layout | None = None) -> float:
    """Largest area of a unit over the mean."""
    len_k = layout.lengths if keys is None else keys.lengths
    areas = [0] * (layout.ranks // members)
    for rank, pieces in enumerate(layout.pieces):
        areas[rank // members] += sum(area(mask, layout.lengths[d], len_k[d], b, e) for d, b, e, _ in pieces)
    return max(areas) * len(areas) / sum(areas) if sum(areas) else 1.0


def quick(
    layout: Layout,
    mask: Mask,
    comm: Comm,
    shape: Shape,
    gpu: Gpu,
    *,
    members: int = 1,
    keys: Layout | None = None,
) -> Estimate:
    """Estimate from the pieces of all ranks.

    Args:
        layout: of all ranks.
        mask: which keys a query sees.
        comm: the scheme.
        shape: heads and dims.
        gpu: the figures.
        members: neighbouring ranks that share heads, under "a2a+p2p"; under "a2a" all do.
        keys: their layout, where it is not the queries'.
    """
    cost = timed(layout, mask, comm, shape, gpu, members=members, keys=keys)
    sharing = sharers(comm, layout.ranks, members)
    return Estimate(comm, *cost, imbalance=imbalance(layout, mask, sharing, keys))


def sharers(comm: Comm, ranks: int, members: int) -> int:
    """How many ranks share heads under a scheme."""
    return ranks if comm == "a2a" else members if comm == "a2a+p2p" else 1


def timed(
    layout: Layout, mask: Mask, comm: Comm, shape: Shape, gpu: Gpu, *, members: int = 1, keys: Layout | None = None
) -> Cost:
    """Seconds and bytes of :func:`quick`; arguments as there."""
    members = sharers(comm, layout.ranks, members)
    units = loads(layout, mask, members, keys)
    found = scheduled(units, is_ring(comm, mask), heads_of(shape, members), shape, gpu)
    return combined(found, exchanged(layout, members, shape, gpu, keys))


# ---- schedules


class Cost(NamedTuple):
    """Seconds and bytes of a part of a plan."""

    forward: float = 0.0
    backward: float = 0.0
    bytes_forward: int = 0
    bytes_backward: int = 0
    calls: int = 1
    groups: int = 1


def scheduled(units: Sequence[Load], ring: bool, heads: Heads, shape: Shape, gpu: Gpu) -> Cost:
    """What attention over the units costs, heads being exchanged already."""
    row = heads.key * (shape.head_dim + shape.head_dim_v) * shape.itemsize
    received = max(unit.received for unit in units)
    calls = max(unit.calls + (unit.peers if ring else 0) for unit in units)
    moved = received * row, max(unit.received + unit.sent for unit in units) * row
    groups = [1] if ring or not received else [g for g in (1, 2, 4, 8) if heads.key % g == 0]
    schedule = _ring if ring else _gather
    costs = []
    for g in groups:
        forward, backward = schedule(units, g, row, heads, shape, gpu)
        host = calls * g * gpu.call
        costs.append(Cost(max(forward, host), max(backward, host), *moved, calls * g, g))
    return min(costs, key=lambda cost: cost.forward + cost.backward)


def combined(attention: Cost, exchange: Cost) -> Cost:
    """Attention between exchanges of heads."""
    return attention._replace(
        forward=attention.forward + exchange.forward,
        backward=attention.backward + exchange.backward,
        bytes_forward=attention.bytes_forward + exchange.bytes_forward,
        bytes_backward=attention.bytes_backward + exchange.bytes_backward,
    )


def _pair_seconds(heads: Heads, shape: Shape, gpu: Gpu) -> tuple[float, float]:
    """Seconds per tile pair, forward and backward."""
    flops = 2 * (shape.head_dim + shape.head_dim_v) * heads.query
    return flops / gpu.forward, BACKWARD * flops / gpu.backward


def _beside(compute: float, moving: float, gpu: Gpu) -> float:
    """Seconds of computing and moving at once."""
    return max(compute, moving) + gpu.contention * min(compute, moving)


def _gather(units: Sequence[Load], groups: int, row: int, heads: Heads, shape: Shape, gpu: Gpu) -> tuple[float, float]:
    """Keys of one head group arrive while another's are computed; what needs none of them runs first, or last."""
    rows = max(max(unit.received, unit.sent) for unit in units)
    moving = gpu.seconds(gpu.all_gather, rows * row / groups)
    times = []
    for seconds, ways in zip(_pair_seconds(heads, shape, gpu), (1, 2), strict=True):
        slowest = 0.0
        for unit in units:
            near, far = unit.whole * seconds, unit.cut * seconds / gpu.gathered / groups
            middle = (groups - 1) * _beside(far, ways * moving, gpu)
            first = moving if ways == 2 else 0.0
            slowest = max(slowest, first + _beside(near, moving, gpu) + middle + far)
        times.append(slowest)
    return times[0], times[1]


def _ring(units: Sequence[Load], groups: int, row: int, heads: Heads, shape: Shape, gpu: Gpu) -> tuple[float, float]:
    """Keys of one unit arrive while another's are computed; own keys first, in backward last."""
    steps = max(unit.peers for unit in units)
    times = []
    for seconds, ways in zip(_pair_seconds(heads, shape, gpu), (1, 2), strict=True):
        slowest = 0.0
        for unit in units:
            stages = max(1, unit.peers)
            moving = gpu.seconds(gpu.ring, max(unit.received, unit.sent) * row / stages)
            near = (unit.whole + unit.cut * unit.here / gpu.circled) * seconds
            far = unit.cut * (1 - unit.here) / gpu.circled * seconds / stages
            if ways == 1:
                far += unit.merged * heads.query * shape.head_dim_v * MERGE_BYTES / gpu.memory
            first = moving if ways == 2 else 0.0
            middle = (stages - 1) * _beside(far, ways * moving, gpu) + (steps - unit.peers) * gpu.exchange
            slowest = max(slowest, first + _beside(near, moving, gpu) + middle + far)
        times.append(slowest)
    return times[0], times[1]


def exchanged(layout: Layout, members: int, shape: Shape, gpu: Gpu, keys: Layout | None = None) -> Cost:
    """What exchanging heads for tokens costs, before and after attention: half of it is hidden, beside computing."""
    if members == 1:
        return Cost()
    heads = heads_of(shape, members)
    tokens = _fullest(layout, members)
    own = -(-tokens // members)
    key_rows = tokens if keys is None else _fullest(keys, members)
    own_keys = -(-key_rows // members)
    both = shape.head_dim + shape.head_dim_v
    others = shape.num_heads - heads.query
    forward = (
        (tokens - own) * heads.query * shape.head_dim + (key_rows - own_keys) * heads.key * both,
        own * others * shape.head_dim_v,
    )
    backward = (
        (tokens - own) * heads.query * shape.head_dim_v,
        own * others * shape.head_dim + own_keys * (members - 1) * heads.key * both,
    )
    shown = (1 + gpu.contention) / 2
    seconds = [
        shown * sum(gpu.seconds(gpu.all_to_all, part * shape.itemsize) for part in parts)
        for parts in (forward, backward)
    ]
    moved = [sum(parts) * shape.itemsize for parts in (forward, backward)]
    return Cost(seconds[0], seconds[1], moved[0], moved[1])


def _fullest(layout: Layout, members: int) -> int:
    """Most tokens of a unit."""
    units = (layout.pieces[i : i + members] for i in range(0, layout.ranks, members))
    return max(sum(p.end - p.begin for own in unit for p in own) for unit in units)
