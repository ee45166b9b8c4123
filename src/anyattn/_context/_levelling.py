"""Who owns which tokens while a placement is sought: spreading, levelling of tokens, exchange of area.

A *shard* is what one rank holds, or one group of ranks that share heads. Area is the number of pairs of a query and a
key that it sees: the work of attention.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from anyattn._context._data import Mask
from anyattn._context._geometry import area

TILE = 128
"""Rows and keys that a kernel takes at a time."""
EVEN = 1.1
"""Pieces whose largest area is within this of their mean need no zigzag."""
SAMPLE = 6
"""Spans that fit whole, and spans that are cut, among which a shard chooses what to give away."""
LEVEL = 1.005
"""Areas whose largest is within this of their mean are left as they are."""

_area = lru_cache(maxsize=1 << 15)(area)


class Span(NamedTuple):
    """Tokens begin to end of a document."""

    document: int
    begin: int
    end: int

    @property
    def size(self) -> int:
        """How many tokens."""
        return self.end - self.begin


class Shards:
    """Spans by shard, with each shard's tokens and area; changes as a placement is sought."""

    def __init__(self, lengths: Sequence[int], lengths_k: Sequence[int], mask: Mask, count: int) -> None:
        self.lengths, self.lengths_k, self.mask, self.count = lengths, lengths_k, mask, count
        self.triangles = mask.left is None and mask.right == 0
        """Plain causal, whose areas need no general formula; they are asked for most."""
        self.spans: list[list[Span]] = [[] for _ in range(count)]
        self.tokens = [0] * count
        self.areas = [0] * count
        self.total = sum(self.size(Span(d, 0, n)) for d, n in enumerate(lengths))
        self.capacity = -(-sum(lengths) // count)
        """Most tokens of a shard when all is level."""
        self.mean = self.total / count
        """Area of a shard when all is level."""

    def size(self, span: Span) -> int:
        """Area of the queries of a span."""
        document, begin, end = span
        len_q, len_k = self.lengths[document], self.lengths_k[document]
        if self.triangles and len_q == len_k:
            return (end - begin) * (begin + end + 1) // 2
        return _area(self.mask, len_q, len_k, begin, end)

    def give(self, shard: int, span: Span) -> None:
        """Add a span that no shard owns."""
        self.spans[shard].append(span)
        self.tokens[shard] += span.size
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
    mean = max(1.0, shards.total / shards.count)
    return [max(shards.size(Span(d, 0, n)) / mean, n / max(1, shards.capacity)) for d, n in enumerate(shards.lengths)]


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


def spread(shards: Shards, weight: Sequence[float], widths: Sequence[int]) -> None:
    """Give every document to as many shards as is its width, heaviest first: to those with the least area."""
    heap = [(0, 0, shard) for shard in range(shards.count)]
    for document in sorted(range(len(weight)), key=lambda d: (-weight[d], -shards.lengths[d], d)):
        length, width = shards.lengths[document], widths[document]
        if not length:
            continue
        chosen = _emptiest(heap, width, -(-length // width), shards.capacity)
        if width == 1:
            shards.give(chosen[0], Span(document, 0, length))
        else:
            cut(shards, document, _owners(shards, document, chosen))
        for shard in chosen:
            heapq.heappush(heap, (shards.areas[shard], shards.tokens[shard], shard))


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
    free = [shard for shard in range(shards.count) if shards.tokens[shard] < shards.capacity]
    least = heapq.nsmallest(2, free, key=shards.areas.__getitem__)
    return sorted({*least, *heapq.nsmallest(2, free, key=shards.tokens.__getitem__)})


def _offers(shards: Shards, donor: int, excess: int, cautious: bool) -> Iterator[Offer]:
    """What a shard may give away: the longest spans that fit whole, ends of the longest of all."""
    spans = sorted(shards.spans[donor], key=lambda s: (s.end - s.begin, s))
    over = (shards.areas[donor] - shards.mean) / excess
    for receiver in _receivers(shards):
        room = shards.capacity - shards.tokens[receiver]
        under, most = (shards.mean - shards.areas[receiver]) / room, min(excess, room)
        fitting = 0
        while fitting < len(spans) and spans[fitting].size <= most:
            fitting += 1
        sample = [*spans[max(0, fitting - SAMPLE) : fitting], *spans[max(fitting, len(spans) - SAMPLE) :]]
        for span in sample:
            for part in _ends(shards, span, most, cautious):
                tokens, moved = part.end - part.begin, shards.size(part)
                distance = abs(moved - over * tokens) + abs(moved - under * tokens) + _price(shards, span, part, 1)
                yield Offer(distance / tokens, receiver, span, part)


def _ends(shards: Shards, span: Span, most: int, cautious: bool) -> Iterator[Span]:
    """The span if it is that short, else its head and its tail, where they may be cut."""
    document, begin, end = span
    if span.size <= most:
        yield span
        return
    if not cautious or shards.may_cut(document, begin + most):
        yield Span(document, begin, begin + most)
    if not cautious or shards.may_cut(document, end - most):
        yield Span(document, end - most, end)


def _returns(shards: Shards, donor: int, excess: int) -> Iterator[Offer]:
    """What a shard may give away for somewhat fewer tokens, where all cuts are far enough from a document's end."""
    margin = shards.mask.right or 0
    for receiver in _receivers(shards):
        net = min(excess, shards.capacity - shards.tokens[receiver])
        wanted = min(shards.areas[donor] - shards.mean, shards.mean - shards.areas[receiver])
        for span in heapq.nlargest(SAMPLE, shards.spans[donor], key=lambda s: (s.size, s)):
            for other in heapq.nlargest(SAMPLE, shards.spans[receiver], key=lambda s: (s.size, s)):
                for tokens in {span.size, margin, margin + net, other.size + net}:
                    if not 0 < tokens <= span.size or not 0 < tokens - net <= other.size:
                        continue
                    for part in _ends(shards, span, tokens, True):
                        for counterpart in _ends(shards, other, tokens - net, True):
                            moved = shards.size(part) - shards.size(counterpart)
                            yield Offer(abs(moved - wanted), receiver, span, part, other, counterpart)


def _tiles(rows: int) -> int:
    return -(-rows // TILE)


def _price(shards: Shards, span: Span, part: Span, least: float) -> float:
    """Area of the tiles that a cut adds, of so many rows of tiles at least; nothing where all of a span moves."""
    if part == span:
        return 0.0
    more = _tiles(part.size) + _tiles(span.size - part.size) - _tiles(span.size)
    return max(more, least) * TILE * shards.size(span) / span.size


def exchange(shards: Shards) -> None:
    """Level areas: the fullest shard gives the dense end of a span for as many tokens of a sparse end.

    Ends when the fullest is within LEVEL of the mean, when no exchange pays for its cuts, or after one per shard.
    """
    for _ in range(shards.count):
        full = max(range(shards.count), key=shards.areas.__getitem__)
        if shards.areas[full] <= LEVEL * shards.mean:
            return
        empty = heapq.nsmallest(2, range(shards.count), key=shards.areas.__getitem__)
        swaps = (swap for shard in empty if shard != full for swap in _swaps(shards, full, shard))
        best = min(swaps, default=None)
        if best is None or best.distance >= 0:
            return
        best.accept(shards, full)


def _swaps(shards: Shards, full: int, empty: int) -> Iterator[Offer]:
    """Exchanges of equal token counts; their distance is the negative of what they gain."""
    wanted = min(shards.areas[full] - shards.mean, (shards.areas[full] - shards.areas[empty]) / 2)
    usual = shards.mean / shards.capacity
    dense = heapq.nlargest(3, shards.spans[full], key=lambda s: ((max(_densities(shards, s)) - usual) * s.size, s))
    sparse = heapq.nlargest(3, shards.spans[empty], key=lambda s: ((usual - min(_densities(shards, s))) * s.size, s))
    for span in dense:
        for other in sparse:
            for part, counterpart in _solve(shards, span, other, min(span.size, other.size), wanted):
                moved = shards.size(part) - shards.size(counterpart)
                price = _price(shards, span, part, 0.25) + _price(shards, other, counterpart, 0.25)
                yield Offer(price - min(moved, 2 * wanted - moved), empty, span, part, other, counterpart)


def _densities(shards: Shards, span: Span) -> tuple[int, int]:
    """Keys that the first and the last row of a span see."""
    document, begin, end = span
    return shards.size(Span(document, begin, begin + 1)), shards.size(Span(document, end - 1, end))


def _solve(shards: Shards, span: Span, other: Span, most: int, wanted: float) -> Iterator[tuple[Span, Span]]:
    """The dense end of one span and the sparse end of another, as many tokens, that differ by the wanted area."""
    first, last = _densities(shards, span)
    other_first, other_last = _densities(shards, other)

    def ends(tokens: int) -> tuple[Span, Span]:
        return _end(span, tokens, last >= first), _end(other, tokens, other_last < other_first)

    def moved(tokens: int) -> int:
        part, counterpart = ends(tokens)
        return shards.size(part) - shards.size(counterpart)

    low, high = 0, most
    if moved(most) < moved((most + 1) // 2):
        high = (most + 1) // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if moved(middle) >= wanted else (middle, high)
    step = TILE if high >= 4 * TILE else max(1, TILE // 8)
    rest = span.size % step
    aligned = {-(-high // step) * step, high // step * step, (high - rest) // step * step + rest}
    for tokens in sorted({high, most, *aligned}):
        part, counterpart = ends(tokens)
        cuts = (part.begin, part.end, counterpart.begin, counterpart.end)
        documents = (span.document, span.document, other.document, other.document)
        if 0 < tokens <= most and all(map(shards.may_cut, documents, cuts)):
            yield part, counterpart


def _end(span: Span, tokens: int, tail: bool) -> Span:
    """The last or the first tokens of a span."""
    document, begin, end = span
    return Span(document, end - tokens, end) if tail else Span(document, begin, begin + tokens)
