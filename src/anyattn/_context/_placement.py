"""Placement: which tokens each rank owns.

Legend: a *shard* is what one rank holds or, where ``members`` ranks share heads, what a group of them holds together.
Under "auto" several placements are made and the one with the lowest estimated time is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from anyattn._context._data import Comm, Layout, Mask, Piece, Placement, Shape
from anyattn._context._gpu import Gpu, default_gpu
from anyattn._context._owners import Shards, Span, contiguous, heaviest_first, spread, weights, zigzag
from anyattn._context._search import Search
from anyattn._errors import ContextError

Order = Literal["document", "slot", "local"]


def place(
    lengths: Sequence[int],
    ranks: int,
    mask: Mask,
    how: Placement = "auto",
    *,
    multiple: int = 1,
    order: Order = "document",
    members: int = 1,
    shape: Shape | None = None,
    comm: Comm = "all_gather",
    gpu: Gpu | None = None,
    lengths_k: Sequence[int] | None = None,
    search: Search | None = None,
) -> Layout:
    """Divide documents over ranks. Depends on its arguments alone: every rank finds the same layout.

    Args:
        lengths: tokens of each document; any number, 0 included.
        ranks: how many shards the layout has.
        mask: which keys a query sees; what "auto" levels is the number of pairs.
        how: "contiguous" cuts the tokens in global order in equal runs; "zigzag" cuts every document in twice as many
            chunks as there are shards, the first and the last for the first shard and so on; "documents" cuts none;
            "auto" cuts long ones, keeps short ones whole, and levels tokens, then work. Under all but "documents" no
            rank has more than ceil(total / ranks) tokens, rounded up to ``multiple`` where ``members`` share a shard.
        multiple: rows of a rank are rounded up to it.
        order: of a shard's pieces in memory: "document"; "slot", the first piece of every document, then the second of
            each that has one, and so on; or "local", whole documents before pieces.
        members: so many neighbouring ranks share heads: the tokens are divided over ranks // members groups, then the
            rows of each group are cut in order, the first members full.
        shape: heads and dims, for estimates.
        comm: the scheme that the estimates are for.
        gpu: the device that they are for.
        lengths_k: keys of each document, where they are not the queries'; estimates take them as placed "contiguous".
        search: of this very batch and mask, so that what other schemes found for it need not be found again.

    Raises:
        ContextError: numbers of which no layout can be made.
    """
    lengths = tuple(map(int, lengths))
    keys = lengths if lengths_k is None else tuple(lengths_k)
    _check(lengths, keys, ranks, multiple, members)
    if how == "auto":
        if search is None:
            search = Search(lengths, mask, keys)
        found = search.best(comm, ranks, shape or Shape(), gpu or default_gpu(), members)
        return _layout(lengths, found.shards.spans, members, multiple, order)
    shards = Shards(lengths, keys, mask, ranks // members)
    if how == "zigzag":
        zigzag(shards)
    elif how == "documents":
        spread(shards, heaviest_first(shards, weights(shards)), [1] * len(lengths))
    elif how == "contiguous":
        contiguous(shards)
    else:
        raise ContextError(f"unknown placement {how!r}; allowed: 'auto', 'contiguous', 'zigzag', 'documents'")
    return _layout(lengths, shards.spans, members, multiple, order)


def _check(lengths: Sequence[int], keys: Sequence[int], ranks: int, multiple: int, members: int) -> None:
    if ranks < 1 or multiple < 1 or members < 1 or ranks % members:
        raise ContextError(
            f"ranks, multiple and members must be >= 1 and members divide ranks: got {ranks}, {multiple}, {members}"
        )
    if len(keys) != len(lengths) or any(n < 0 for n in (*lengths, *keys)):
        raise ContextError("lengths of queries and keys must be as many, and none negative")


def _layout(
    lengths: tuple[int, ...], spans: Sequence[Sequence[Span]], members: int, multiple: int, order: Order
) -> Layout:
    """Rows for the spans of every shard."""
    shards = [_ordered(own, order, lengths) for own in spans]
    most = max(sum(span.size for span in own) for own in shards)
    share = -(-most // members)
    rows = -(-share // multiple) * multiple
    pieces = [member for own in shards for member in _members(own, members, rows)]
    return Layout(lengths, tuple(pieces), rows)


def _ordered(spans: Sequence[Span], order: Order, lengths: Sequence[int]) -> list[Span]:
    """Spans as they lie in memory, those that continue one another made one.

    By slot: a document's first piece on the shard before its second. "local": whole documents, which need no other
    rank, before all pieces, and those at a document's beginning, which may need none either, before the rest. Each
    kernel call then has rows without gaps.
    """
    merged: list[Span] = []
    for span in sorted(spans):
        if merged and merged[-1].document == span.document and merged[-1].end == span.begin:
            merged[-1] = merged[-1]._replace(end=span.end)
        else:
            merged.append(span)
    if order == "document":
        return merged
    slots: dict[int, int] = {}
    keyed = []
    for span in merged:
        slot = slots[span.document] = slots.get(span.document, -1) + 1
        local = order == "local"
        whole = span.begin == 0 and span.end == lengths[span.document]
        keyed.append((local and not whole, slot, local and span.begin > 0, span))
    return [span for *_, span in sorted(keyed)]


def _members(spans: Sequence[Span], members: int, rows: int) -> list[tuple[Piece, ...]]:
    """The rows of a shard cut in order: full shards of its members, then what is left."""
    shards: list[list[Piece]] = [[] for _ in range(members)]
    at = 0
    for document, begin, end in spans:
        while begin < end:
            member, row = divmod(at, rows)
            taken = min(end - begin, rows - row)
            shards[member].append(Piece(document, begin, begin + taken, row))
            begin, at = begin + taken, at + taken
    return [tuple(own) for own in shards]
