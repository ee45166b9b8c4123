"""Plans of fixed capacity: one shape of calls, moves and tables for every batch that fits, as CUDA graphs need it.

Under all_gather every rank sends its whole shard, and a document has at most two pieces on a rank, the first in one
call and the second in another. Under a2a there is one call. What differs between batches lies in tables on the device.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from anyattn._context import _geometry
from anyattn._context._data import Capacity, Comm, Entry, KernelCall, Layout, Mask, Piece, RankPlan, Run, Stage
from anyattn._errors import ContextError

if TYPE_CHECKING:
    from anyattn._context._data import Placement
    from anyattn._context._plan import ContextPlan

#: Pieces of a document on a rank, and so calls.
SLOTS = 2


def check(comm: Comm, mask: Mask, placement: Placement, cross: bool) -> None:
    """Refuse what has no fixed shape.

    Raises:
        ContextError: with what to do instead.
    """
    if comm not in ("all_gather", "a2a"):
        raise ContextError(
            f"a plan of fixed capacity needs comm='all_gather' or 'a2a', got {comm!r}: what travels in a ring differs "
            "from batch to batch, and is known to the host alone"
        )
    if mask.right:
        raise ContextError(
            "a plan of fixed capacity takes no window with a right side above 0: use causal=True, or None"
        )
    if cross:
        raise ContextError("a plan of fixed capacity has one packing: leave out packing_kv")
    if placement == "documents":
        raise ContextError(
            "placement='documents' fills ranks differently from batch to batch: use 'auto', 'contiguous' or 'zigzag' "
            "with a packing of fixed capacity"
        )


def roomy(layout: Layout, memory_rows: int, ranks: int, multiple: int, placement: str) -> Layout:
    """The layout with as many rows per rank as any batch of the capacity needs."""
    most = max((max(Counter(p.document for p in own).values()) for own in layout.pieces if own), default=0)
    if most > SLOTS:
        raise ContextError(
            f"a document has {most} pieces on one rank, and a plan of fixed capacity has room for {SLOTS}: use "
            "placement='contiguous' or 'zigzag'"
        )
    share = -(-memory_rows // ranks)
    if placement == "zigzag":  # chunks of unequal documents do not add up evenly
        share += 2 * len(layout.lengths)
    rows = -(-share // multiple) * multiple
    if placement == "in order":
        return _in_order(layout.lengths, rows, ranks)
    if layout.rows > rows:
        raise ContextError(f"a rank needs {layout.rows} rows, and the capacity gives {rows}")
    return replace(layout, rows=rows)


def _in_order(lengths: tuple[int, ...], rows: int, ranks: int) -> Layout:
    """Tokens in global order, every rank's rows full but the last ones'."""
    pieces: list[list[Piece]] = [[] for _ in range(ranks)]
    at = 0
    for document, length in enumerate(lengths):
        begin = 0
        while begin < length:
            rank, row = divmod(at, rows)
            end = min(length, begin + rows - row)
            pieces[rank].append(Piece(document, begin, end, row))
            at += end - begin
            begin = end
    return Layout(lengths, tuple(map(tuple, pieces)), rows)


def fullest(capacity: Capacity, rows: int) -> tuple[int, ...]:
    """The lengths of a batch that fills a capacity with the longest sequences it takes.

    By these ``comm="auto"`` chooses, so that plans which refill one another have one scheme.
    """
    longest = max(1, min(capacity.max_seqlen, rows))
    whole = min(capacity.sequences, rows // longest)
    rest = (rows - whole * longest,) if whole < capacity.sequences else ()
    return (longest,) * whole + rest


def stages(layout: Layout, mask: Mask, rank: int) -> RankPlan:
    """The one stage of a plan of fixed capacity."""
    if layout.ranks == 1:
        entries = [Entry(p.row, p.end - p.begin, p.row, p.end - p.begin) for p in layout.pieces[0]]
        call = KernelCall(mask.left, mask.right, tuple(entries), tuple(p.document for p in layout.pieces[0]))
        return RankPlan((Stage((call,), local=True),), exclusive=True)
    order, place = _global_order(layout)
    everything = (Run(0, layout.rows),)
    stage = Stage(
        _calls(layout, mask, rank, place),
        local=False,
        send=(everything,) * layout.ranks,
        receive=(layout.rows,) * layout.ranks,
        order=order,
        rows=layout.ranks * layout.rows,
    )
    return RankPlan((stage,), exclusive=True)


def _global_order(layout: Layout) -> tuple[tuple[Run, ...], dict[int, int]]:
    """Gathered rows by document and position, padding last; and where each document begins then."""
    pieces = sorted(
        (p.document, p.begin, rank * layout.rows + p.row, p.end) for rank, own in enumerate(layout.pieces) for p in own
    )
    runs: list[Run] = []
    place: dict[int, int] = {}
    at = 0
    for document, begin, row, end in pieces:
        place.setdefault(document, at)
        runs.append(Run(row, end - begin))
        at += end - begin
    for rank, own in enumerate(layout.pieces):
        last = 0
        for begin, end in [*((p.row, p.row + p.end - p.begin) for p in own), (layout.rows, layout.rows)]:
            if begin > last:
                runs.append(Run(rank * layout.rows + last, begin - last))
            last = end
    return tuple(runs), place


def _calls(layout: Layout, mask: Mask, rank: int, place: dict[int, int]) -> tuple[KernelCall, ...]:
    """A call for the first piece of every document on this rank, and one for the second."""
    found: list[list[tuple[Entry, int]]] = [[] for _ in range(SLOTS)]
    seen: Counter[int] = Counter()
    for piece in layout.pieces[rank]:
        length = layout.lengths[piece.document]
        begin, end = _geometry.needed(mask, length, length, piece.begin, piece.end)
        entry = Entry(piece.row, piece.end - piece.begin, place[piece.document] + begin, end - begin)
        found[seen[piece.document]].append((entry, piece.document))
        seen[piece.document] += 1
    return tuple(_call(mask, entries) for entries in found)


def _call(mask: Mask, entries: list[tuple[Entry, int]]) -> KernelCall:
    """Entries by their rows in the query shard, which is their order among the keys too."""
    entries = sorted(entries, key=lambda pair: pair[0].k)
    assert all(a.q < b.q for (a, _), (b, _) in pairwise(entries)), "rows of a call increase on both sides"
    return KernelCall(mask.left, mask.right, tuple(e for e, _ in entries), tuple(d for _, d in entries))


def refill(plan: ContextPlan, other: ContextPlan) -> None:
    """Put another batch into a plan of fixed capacity; see ``ContextPlan.copy_``.

    Raises:
        ContextError: it has none, or the other plan is of another kind.
    """
    if not isinstance(other, type(plan)):
        raise ContextError(f"copy_ takes a ContextPlan, got {type(other).__name__}: make one with ContextParallel.plan")
    mine, theirs = plan._data, other._data
    if mine.capacity is None:
        raise ContextError(
            "copy_ refills plans of fixed capacity: make the plan from Packing.from_lengths(..., max_sequences=..., "
            "max_rows=..., max_seqlen=...)"
        )
    if mine.comm != theirs.comm:
        raise ContextError(
            f"copy_: the other plan's comm is {theirs.comm!r}, this plan's is {mine.comm!r}: make all plans of a fixed "
            "capacity by one ContextParallel, with the same num_heads=; or name the scheme, as in "
            f"ContextParallel(..., comm={mine.comm!r})"
        )
    for name in ("topology", "rank", "mask", "capacity", "placement", "multiple", "sanitize"):
        if getattr(mine, name) != getattr(theirs, name):
            raise ContextError(f"copy_: {name} is {getattr(theirs, name)}, this plan's is {getattr(mine, name)}")
    if (mine.queries.rows, mine.memory_q.rows) != (theirs.queries.rows, theirs.memory_q.rows):
        raise ContextError(
            f"copy_: shards have {theirs.queries.rows} rows of {theirs.memory_q.rows}, this plan's "
            f"{mine.queries.rows} of {mine.memory_q.rows}"
        )
    plan._become(theirs)
