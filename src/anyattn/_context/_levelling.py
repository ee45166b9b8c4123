"""Levelling of shards: tokens first, by whole spans and their ends, then area, by exchanging ends of spans.

The loops here are the most of what a plan costs the host, so they reckon with ints and make a :class:`Span` only of
what may be the best.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import NamedTuple

from anyattn._context._owners import Shards, Span

TILE = 128
"""Rows and keys that a kernel takes at a time."""
SAMPLE = 6
"""Spans that fit whole, and spans that are cut, among which a shard chooses what to give away."""
LEVEL = 1.005
"""Areas whose largest is within this of their mean are left as they are."""


class Offer(NamedTuple):
    """A part of a span for a shard, and what that gives in return; least is best."""

    distance: float
    """Area by which it misses the ideal, per token."""
    receiver: int
    span: Span
    part: Span
    other: Span | None = None
    counterpart: Span | None = None

    def accept(self, shards: Shards, donor: int) -> None:
        """Move both."""
        shards.move(donor, self.receiver, self.span, self.part)
        if self.other is not None and self.counterpart is not None:
            shards.move(self.receiver, donor, self.other, self.counterpart)


def _price(least: float, area: int, size: int, part: int) -> float:
    """Area of the tiles that a cut adds to a span of such an area and size; a row of ``least`` tiles at least.

    Nothing where all of the span moves.
    """
    if part == size:
        return 0.0
    more = -(-part // TILE) - (part - size) // TILE - -(-size // TILE)
    return (more if more > least else least) * TILE * area / size


# ---- tokens


def level(shards: Shards) -> None:
    """Bring every shard to its capacity in tokens, by whole spans or by heads and tails of spans.

    What moves is chosen so that areas come closest, per token; a cut counts as a row of tiles at least. Where so many
    tokens can be cut only near a document's end, more are given and some taken back; failing that, they are cut there.
    """
    while True:
        most = max(shards.tokens)
        excess = most - shards.capacity
        if excess <= 0:
            return
        donor = shards.tokens.index(most)
        ways = (
            _offers(shards, donor, excess, True),
            _returns(shards, donor, excess),
            _offers(shards, donor, excess, False),
        )
        next(filter(None, (min(offers, default=None) for offers in ways))).accept(shards, donor)


def _receivers(shards: Shards) -> list[int]:
    """Shards with room: those with the least area and those with the most room."""
    capacity = shards.capacity
    free = [shard for shard, tokens in enumerate(shards.tokens) if tokens < capacity]
    least = heapq.nsmallest(2, free, key=shards.areas.__getitem__)
    return sorted({*least, *heapq.nsmallest(2, free, key=shards.tokens.__getitem__)})


def _offers(shards: Shards, donor: int, excess: int, cautious: bool) -> Iterator[Offer]:
    """What a shard may give away: the longest spans that fit whole, ends of the longest of all.

    Of every receiver the offers that are the best so far, the best of all among them.
    """
    spans = sorted((span.end - span.begin, span) for span in shards.spans[donor])
    sizes = [size for size, _ in spans]
    areas: dict[Span, int] = {}
    cautious = cautious and bool(shards.mask.right)
    over = (shards.areas[donor] - shards.mean) / excess
    for receiver in _receivers(shards):
        room = shards.capacity - shards.tokens[receiver]
        under, most = (shards.mean - shards.areas[receiver]) / room, min(excess, room)
        fitting = bisect_right(sizes, most)
        best = float("inf")
        for size, span in (*spans[max(0, fitting - SAMPLE) : fitting], *spans[max(fitting, len(spans) - SAMPLE) :]):
            if span not in areas:
                areas[span] = shards.size(span)
            for tokens, moved, part in _ends(shards, span, size, areas[span], most, cautious):
                price = _price(1, areas[span], size, tokens)
                distance = (abs(moved - over * tokens) + abs(moved - under * tokens) + price) / tokens
                if distance <= best:
                    best = distance
                    yield Offer(distance, receiver, span, part)


def _ends(
    shards: Shards, span: Span, size: int, area: int, most: int, cautious: bool
) -> Iterator[tuple[int, int, Span]]:
    """(tokens, area, span): all of a span if it is that short, else its head and its tail, where they may be cut."""
    if size <= most:
        yield size, area, span
        return
    document, begin, end = span
    before = shards.before(document)
    head, tail = begin + most, end - most
    if not cautious or shards.may_cut(document, head):
        yield most, before(head) - before(begin), Span(document, begin, head)
    if not cautious or shards.may_cut(document, tail):
        yield most, before(end) - before(tail), Span(document, tail, end)


def _returns(shards: Shards, donor: int, excess: int) -> Iterator[Offer]:
    """What a shard may give away for somewhat fewer tokens, where all cuts are far enough from a document's end."""
    margin = shards.mask.right or 0
    longest = {
        shard: [(s, s.size, shards.size(s)) for s in heapq.nlargest(SAMPLE, shards.spans[shard], lambda s: (s.size, s))]
        for shard in {donor, *_receivers(shards)}
    }
    for receiver in _receivers(shards):
        net = min(excess, shards.capacity - shards.tokens[receiver])
        wanted = min(shards.areas[donor] - shards.mean, shards.mean - shards.areas[receiver])
        for span, size, area in longest[donor]:
            for other, other_size, other_area in longest[receiver]:
                for tokens in {size, margin, margin + net, other_size + net}:
                    if not 0 < tokens <= size or not 0 < tokens - net <= other_size:
                        continue
                    for _, given, part in _ends(shards, span, size, area, tokens, True):
                        for _, back, counterpart in _ends(shards, other, other_size, other_area, tokens - net, True):
                            distance = abs(given - back - wanted)
                            yield Offer(distance, receiver, span, part, other, counterpart)


# ---- area


class _End(NamedTuple):
    """A span of which an end may be exchanged."""

    wish: float
    span: Span
    size: int
    area: int
    first: int
    """Keys that its first row sees."""
    last: int

    def part(self, tokens: int, tail: bool) -> Span:
        """Its last or its first tokens."""
        document, begin, end = self.span
        return Span(document, end - tokens, end) if tail else Span(document, begin, begin + tokens)


def exchange(shards: Shards) -> bool:
    """Level areas: the fullest shard gives the dense end of a span for as many tokens of a sparse end.

    Ends when the fullest is within LEVEL of the mean, when no exchange pays for its cuts, or after one per shard.

    Returns:
        Whether anything moved.
    """
    for done in range(shards.count):
        most = max(shards.areas)
        if most <= LEVEL * shards.mean:
            return done > 0
        full = shards.areas.index(most)
        empty = heapq.nsmallest(2, range(shards.count), key=shards.areas.__getitem__)
        best = _best_swap(shards, full, [shard for shard in empty if shard != full])
        if best is None or best.distance >= 0:
            return done > 0
        best.accept(shards, full)
    return True


def _best_swap(shards: Shards, full: int, others: list[int]) -> Offer | None:
    """The exchange of equal token counts that gains most, if one gains; its distance is the negative of that."""
    best: Offer | None = None
    usual = shards.mean / shards.capacity
    dense = _wished(shards, full, usual, True)
    for empty in others:
        wanted = min(shards.areas[full] - shards.mean, (shards.areas[full] - shards.areas[empty]) / 2)
        sparse = _wished(shards, empty, usual, False)
        for one in dense:
            for other in sparse:
                for offer in _swaps(shards, one, other, empty, wanted, best.distance if best else 0.0):
                    if best is None or offer < best:
                        best = offer
    return best


def _wished(shards: Shards, shard: int, usual: float, dense: bool) -> list[_End]:
    """The spans of a shard whose densest, or sparsest, ends are the furthest from the usual."""
    found = []
    for span in shards.spans[shard]:
        document, begin, end = span
        size = end - begin
        if shards.triangles:
            first, last = begin + 1, end
        else:
            before = shards.before(document)
            first, last = before(begin + 1) - before(begin), before(end) - before(end - 1)
        wish = (max(first, last) - usual) * size if dense else (usual - min(first, last)) * size
        found.append((wish, span, size, first, last))
    found.sort(reverse=True)
    return [_End(wish, span, size, shards.size(span), first, last) for wish, span, size, first, last in found[:3]]


def _swaps(shards: Shards, one: _End, other: _End, receiver: int, wanted: float, bound: float) -> Iterator[Offer]:
    """The dense end of one span and the sparse end of another, as many tokens, that differ by the wanted area.

    Those that are no better than the bound are left out.
    """
    most = min(one.size, other.size)
    tail, other_tail = one.last >= one.first, other.last < other.first
    moved = _moved(shards, one.span, tail, other.span, other_tail)
    high = _fewest(moved, most, wanted)
    step = TILE if high >= 4 * TILE else max(1, TILE // 8)
    rest = one.size % step
    for tokens in {high, most, -(-high // step) * step, high // step * step, (high - rest) // step * step + rest}:
        if not 0 < tokens <= most:
            continue
        gain = moved(tokens)
        price = _price(0.25, one.area, one.size, tokens) + _price(0.25, other.area, other.size, tokens)
        distance = price - min(gain, 2 * wanted - gain)
        if distance > bound:
            continue
        part, counterpart = one.part(tokens, tail), other.part(tokens, other_tail)
        if not shards.mask.right or all(
            shards.may_cut(span.document, at) for span in (part, counterpart) for at in span[1:]
        ):
            yield Offer(distance, receiver, one.span, part, other.span, counterpart)


def _moved(shards: Shards, span: Span, tail: bool, other: Span, other_tail: bool) -> Callable[[int], int]:
    """The area of an end of one span over that of an end of another, by their number of tokens."""
    document, begin, end = span
    other_document, other_begin, other_end = other
    if shards.triangles:  # the tail of one and the head of the other
        return lambda tokens: tokens * (end - other_begin - tokens)
    before, other_before = shards.before(document), shards.before(other_document)
    whole, whole_other = before(end if tail else begin), other_before(other_end if other_tail else other_begin)

    def moved(tokens: int) -> int:
        part = whole - before(end - tokens) if tail else before(begin + tokens) - whole
        if other_tail:
            return part - whole_other + other_before(other_end - tokens)
        return part - other_before(other_begin + tokens) + whole_other

    return moved


def _fewest(moved: Callable[[int], int], most: int, wanted: float) -> int:
    """The fewest tokens that move so much area, where the area grows with them; else about those that move most."""
    low, high, half = 0, most, (most + 1) // 2
    if moved(most) < moved(half):
        high = half
    while high - low > 1:
        middle = (low + high) // 2
        if moved(middle) >= wanted:
            high = middle
        else:
            low = middle
    return high
