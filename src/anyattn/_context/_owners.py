"""Who owns which tokens while a placement is sought, and the first owners: whole documents, or equal parts of them.

A *shard* is what one rank holds, or one group of ranks that share heads. Area is the number of pairs of a query and a
key that it sees: the work of attention.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from operator import mul
from typing import NamedTuple

from anyattn._context._data import Mask
from anyattn._context._geometry import seen_before

EVEN = 1.1
"""Pieces whose largest area is within this of their mean need no zigzag."""


class Span(NamedTuple):
    """Tokens begin to end of a document."""

    document: int
    begin: int
    end: int

    @property
    def size(self) -> int:
        """How many tokens."""
        return self.end - self.begin


def _triangle(at: int) -> int:
    return at * (at + 1) // 2


class Shards:
    """Spans by shard, with each shard's tokens and area; changes as a placement is sought."""

    def __init__(self, lengths: Sequence[int], lengths_k: Sequence[int], mask: Mask, count: int) -> None:
        self.lengths, self.lengths_k, self.mask, self.count = lengths, lengths_k, mask, count
        self.triangles = mask.left is None and mask.right == 0 and tuple(lengths) == tuple(lengths_k)
        """Plain causal, whose areas need no general formula; they are asked for most."""
        self.spans: list[list[Span]] = [[] for _ in range(count)]
        self.tokens = [0] * count
        self.areas = [0] * count
        self.total = sum(self.size(Span(d, 0, n)) for d, n in enumerate(lengths))
        self.capacity = -(-sum(lengths) // count)
        """Most tokens of a shard when all is level."""
        self.mean = self.total / count
        """Area of a shard when all is level."""

    def copy(self) -> Shards:
        """Another with the same spans, that changes apart."""
        other = Shards.__new__(Shards)
        other.__dict__.update(self.__dict__)
        other.spans = [list(own) for own in self.spans]
        other.tokens, other.areas = list(self.tokens), list(self.areas)
        return other

    def before(self, document: int) -> Callable[[int], int]:
        """What tells the area of a document's queries before a point, but for a constant: differences tell areas."""
        if self.triangles:
            return _triangle
        mask, keys = self.mask, self.lengths_k[document]
        if mask.left is None and mask.right is None:
            return partial(mul, keys)
        return partial(seen_before, mask, self.lengths[document], keys)

    def size(self, span: Span) -> int:
        """Area of the queries of a span."""
        document, begin, end = span
        if self.triangles:
            return (end - begin) * (begin + end + 1) // 2
        before = self.before(document)
        return before(end) - before(begin)

    def give(self, shard: int, span: Span) -> None:
        """Add a span that no shard owns."""
        self.spans[shard].append(span)
        self.tokens[shard] += span.end - span.begin
        self.areas[shard] += self.size(span)

    def move(self, donor: int, receiver: int, span: Span, part: Span) -> None:
        """Move the head, the tail or all of a span of the donor; part may be empty."""
        if not part.size:
            return
        self.spans[donor].remove(span)
        self.tokens[donor] -= span.size
        self.areas[donor] -= self.size(span)
        for rest in (Span(span.document, span.begin, part.begin), Span(span.document, part.end, span.end)):
            if rest.size:
                self.give(donor, rest)
        self.give(receiver, part)

    def may_cut(self, document: int, at: int) -> bool:
        """Whether a cut keeps out of the rows near a document's ends, where a window's right side would be split."""
        right, length = self.mask.right, self.lengths[document]
        return not right or at in (0, length) or right <= at <= length - right


def contiguous(shards: Shards) -> None:
    """Give equal runs of the tokens in global order; the first shards are full."""
    shard = 0
    for document, length in enumerate(shards.lengths):
        begin = 0
        while begin < length:
            if shards.tokens[shard] == shards.capacity:
                shard += 1
            end = min(length, begin + shards.capacity - shards.tokens[shard])
            shards.give(shard, Span(document, begin, end))
            begin = end


def zigzag(shards: Shards) -> None:
    """Give every document in two chunks per shard."""
    owners = zigzag_owners(range(shards.count))
    for document in range(len(shards.lengths)):
        cut(shards, document, owners)


def zigzag_owners(shards: Sequence[int]) -> list[int]:
    """Owners of twice as many chunks: the first shard has the first and the last chunk, and so on inwards."""
    return [*shards, *reversed(shards)]


def cut(shards: Shards, document: int, owners: Sequence[int]) -> None:
    """Give a document in as many chunks as there are owners, in order, of sizes that differ by one at most.

    The longer chunks go to the owners with the fewest tokens, so that many such documents stay level together.
    """
    base, longer = divmod(shards.lengths[document], len(owners))
    chunks: dict[int, list[int]] = {}
    for chunk, owner in enumerate(owners):
        chunks.setdefault(owner, []).append(chunk)
    emptiest = sorted(chunks, key=lambda shard: (shards.tokens[shard], shard))
    in_turn = [chunks[owner][i] for i in range(max(map(len, chunks.values()))) for owner in emptiest]
    extra = set(in_turn[:longer])
    begin = 0
    for chunk, owner in enumerate(owners):
        end = begin + base + (chunk in extra)
        if end > begin:
            shards.give(owner, Span(document, begin, end))
        begin = end


def weights(shards: Shards) -> list[float]:
    """By document: the larger of its shares of area and of tokens, in shards."""
    mean, capacity = max(1.0, shards.total / shards.count), max(1, shards.capacity)
    return [max(shards.size(Span(d, 0, n)) / mean, n / capacity) for d, n in enumerate(shards.lengths)]


def heaviest_first(shards: Shards, weight: Sequence[float]) -> list[int]:
    """Documents in the order in which they are given to shards; empty ones are left out."""
    keyed = [(-heavy, -length, d) for d, (heavy, length) in enumerate(zip(weight, shards.lengths, strict=True))]
    return [d for _, length, d in sorted(keyed) if length]


def widths_of(shards: Shards, weight: Sequence[float], long: float, factor: float | None) -> tuple[int, ...]:
    """Over how many shards each document is cut.

    Documents that weigh ``long`` at most are not; the others in proportion to their weight, or, where factor is None,
    over all. Pieces are no shorter than the right side of a window.
    """
    right = shards.mask.right or 0
    result = []
    for heavy, length in zip(weight, shards.lengths, strict=True):
        width = 1
        if heavy > long:
            width = shards.count if factor is None else min(shards.count, math.ceil(heavy * factor))
            width = max(1, min(width, length // max(1, right)))
        result.append(width)
    return tuple(result)


def spread(shards: Shards, order: Sequence[int], widths: Sequence[int]) -> None:
    """Give every document, in this order, to as many shards as is its width: to those with the least area."""
    heap = [(0, 0, shard) for shard in range(shards.count)]
    areas, tokens, capacity = shards.areas, shards.tokens, shards.capacity
    for document in order:
        length, width = shards.lengths[document], widths[document]
        if width == 1 and heap[0][1] + length <= capacity:
            shard = heap[0][2]
            shards.give(shard, Span(document, 0, length))
            heapq.heapreplace(heap, (areas[shard], tokens[shard], shard))
            continue
        chosen = _emptiest(heap, width, -(-length // width), capacity)
        if width == 1:
            shards.give(chosen[0], Span(document, 0, length))
        else:
            cut(shards, document, _owners(shards, document, chosen))
        for shard in chosen:
            heapq.heappush(heap, (areas[shard], tokens[shard], shard))


def _emptiest(heap: list[tuple[int, int, int]], width: int, size: int, capacity: int) -> list[int]:
    """Take from the heap the shards with the least area, by preference such as have room for size tokens."""
    fit: list[tuple[int, int, int]] = []
    tight: list[tuple[int, int, int]] = []
    while heap and len(fit) < width and len(tight) < 16:
        top = heapq.heappop(heap)
        (fit if top[1] + size <= capacity else tight).append(top)
    while len(fit) < width and tight:
        fit.append(tight.pop(0))
    while len(fit) < width:
        fit.append(heapq.heappop(heap))
    for other in tight:
        heapq.heappush(heap, other)
    return sorted(shard for _, _, shard in fit)


def _owners(shards: Shards, document: int, chosen: list[int]) -> list[int]:
    """One chunk per shard where that is even in area, as for windows and for no mask; else zigzag."""
    length, width = shards.lengths[document], len(chosen)
    bounds = [length * i // width for i in range(width + 1)]
    areas = [shards.size(Span(document, a, b)) for a, b in pairwise(bounds)]
    even = max(areas) * width <= EVEN * sum(areas)
    short = length // (2 * width) < (shards.mask.right or 0)
    return chosen if even or short else zigzag_owners(chosen)
