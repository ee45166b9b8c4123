"""The search behind placement "auto": several placements of a batch, made once, weighed for every scheme."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from anyattn._context._data import Comm, Mask, Shape
from anyattn._context._estimate import Cost, Estimate, weighed
from anyattn._context._gpu import Gpu
from anyattn._context._levelling import exchange, level
from anyattn._context._loads import Apart, Load, loads_of, whole_pairs
from anyattn._context._owners import Shards, contiguous, heaviest_first, spread, weights, widths_of

SPREADS: tuple[tuple[float, float | None], ...] = (
    (1.0, 1.0), (0.5, 2.0), (0.25, 4.0), (1.0, None), (0.5, None), (0.25, None)
)  # fmt: skip
"""What is tried: documents heavier than so many shards are long; they are cut over this many times their weight in
shards, or over all."""
REFINED = 3
"""So many of the best are levelled in area too."""
PIECES = 8
"""The most pieces of a placement, per shard and document, beyond a few thousand."""


class _Candidate:
    """One placement; what follows from it is found when it is first asked for."""

    def __init__(self, search: _Units, shards: Shards, refinable: bool) -> None:
        self._search, self.shards, self.refinable = search, shards, refinable

    @cached_property
    def loads(self) -> list[Load]:
        """What each unit computes and receives."""
        search = self._search
        return loads_of(self.shards.spans, search.lengths, search.mask, search.whole, search.apart)

    @cached_property
    def refined(self) -> _Candidate | None:
        """The same levelled in area; None: nothing moves."""
        shards = self.shards.copy()
        return _Candidate(self._search, shards, False) if exchange(shards) else None


class Found(NamedTuple):
    """The best placement for a scheme."""

    shards: Shards
    cost: Cost

    def estimate(self, comm: Comm) -> Estimate:
        """What it costs, and its imbalance."""
        areas = self.shards.areas
        return Estimate(comm, *self.cost, imbalance=max(areas) * len(areas) / sum(areas) if sum(areas) else 1.0)


class _Units:
    """Placements over so many units: ranks, or groups of ranks that share heads."""

    def __init__(self, lengths: Sequence[int], lengths_k: Sequence[int], mask: Mask, count: int) -> None:
        self.lengths, self.mask = lengths, mask
        self._blank = Shards(lengths, lengths_k, mask, count)
        self.apart: Apart | None = None
        if lengths_k != lengths:
            keys = Shards(lengths_k, lengths_k, Mask(), count)
            contiguous(keys)
            self.apart = Apart(lengths_k, keys.spans)
            self._most_keys = max(keys.tokens)

    @cached_property
    def whole(self) -> list[float]:
        """By document, the tile pairs of all of it."""
        return [] if self.apart else whole_pairs(self.lengths, self.mask)

    @cached_property
    def _candidates(self) -> list[_Candidate]:
        """All ways of spreading, levelled in tokens; last the tokens in global order."""
        blank = self._blank
        found: list[_Candidate] = []
        if blank.count > 1 and any(self.lengths):
            weight = weights(blank)
            order = heaviest_first(blank, weight)
            most = PIECES * (blank.count + len(weight)) + 4096
            tried: set[tuple[int, ...]] = set()
            for long, factor in SPREADS:
                widths = widths_of(blank, weight, long, factor)
                if widths in tried or (tried and 2 * sum(widths) > most):
                    continue
                tried.add(widths)
                shards = blank.copy()
                spread(shards, order, widths)
                level(shards)
                found.append(_Candidate(self, shards, True))
        simple = blank.copy()
        contiguous(simple)
        return [*found, _Candidate(self, simple, False)]

    def best(self, comm: Comm, shape: Shape, gpu: Gpu, members: int) -> Found:
        """The placement of the lowest estimate; of equal ones the first.

        All ways of spreading are levelled in tokens; in area the best of them alone, for that takes longest.
        """
        found: list[tuple[float, int, _Candidate, Cost]] = []

        def weigh(candidate: _Candidate) -> None:
            tokens = max(candidate.shards.tokens)
            rows, key_rows = (-(-n // members) * members for n in (tokens, self._most_keys if self.apart else tokens))
            cost = weighed(candidate.loads, (rows, key_rows), members, comm, self.mask, shape, gpu)
            found.append((cost.forward + cost.backward, len(found), candidate, cost))

        for candidate in self._candidates:
            weigh(candidate)
        for _, _, candidate, _ in sorted(found)[:REFINED]:
            if candidate.refinable and candidate.refined is not None:
                weigh(candidate.refined)
        best = min(found)
        return Found(best[2].shards, best[3])


class Search:
    """The placements of one batch under one mask, for any scheme and number of ranks.

    Args:
        lengths: tokens of each document.
        mask: which keys a query sees.
        lengths_k: keys of each document, where they are not the queries'; estimates take them in global order.
    """

    def __init__(self, lengths: Sequence[int], mask: Mask, lengths_k: Sequence[int] | None = None) -> None:
        self.lengths, self.mask = tuple(lengths), mask
        self.lengths_k = self.lengths if lengths_k is None else tuple(lengths_k)
        self._units: dict[int, _Units] = {}
        self._found: dict[tuple[Comm, int, int, Shape, Gpu], Found] = {}

    def best(self, comm: Comm, ranks: int, shape: Shape, gpu: Gpu, members: int = 1) -> Found:
        """The placement of the lowest estimate.

        Args:
            comm: the scheme.
            ranks: how many take part.
            shape: heads and dims.
            gpu: the figures.
            members: neighbouring ranks that share heads.
        """
        key = comm, ranks, members, shape, gpu
        if key not in self._found:
            count = ranks // members
            if count not in self._units:
                self._units[count] = _Units(self.lengths, self.lengths_k, self.mask, count)
            self._found[key] = self._units[count].best(comm, shape, gpu, members)
        return self._found[key]
