"""Stages of one rank: which keys arrive when, and the kernel calls that use them.

Legend: R ranks, a *run* of a shard is a maximal range of tokens of a document whose rows follow one another. All that a
rank sends comes from the function that gives what the others receive, so the two agree on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from anyattn._context._calls import Part, calls, fused
from anyattn._context._data import KernelCall, Layout, Mask, Piece, RankPlan, Run, Stage
from anyattn._context._geometry import Meeting, Span
from anyattn._context._scene import Scene, append_run, clipped, merged, packed, runs_of, scene_of, union


def _part(queries: Piece, meeting: Meeting, row: int) -> Part:
    """The entry of a meeting whose first key lies in this row of the key buffer."""
    (begin, end), (low, high), left, right = meeting
    return Part(queries.document, queries.row + begin - queries.begin, end - begin, row, high - low, left, right)


def _calls(parts: Iterable[list[list[Part]]], fuse: bool) -> tuple[KernelCall, ...]:
    """By document and query piece, its parts in the order of key rows."""
    if fuse:
        return calls(part for pieces in parts for part in fused(pieces))
    return calls(part for pieces in parts for piece in pieces for part in piece)


# ---- keys in global order


def _anything_fetched(scene: Scene) -> bool:
    return any(scene.fetched(rank, d) for rank, shard in enumerate(scene.q.shards) for d in shard)


def _gathered_stage(scene: Scene, rank: int, fuse: bool) -> Stage:
    """The stage of all entries whose keys are not one run of this rank's own shard."""
    send: list[list[Piece]] = [[] for _ in range(scene.ranks)]
    for document, runs in scene.k.shards[rank].items():
        for other in scene.q.holders.get(document, ()):
            send[other].extend(clipped(runs, scene.fetched(other, document)))
    arriving: list[list[Piece]] = [[] for _ in range(scene.ranks)]
    remote: list[list[tuple[Piece, Meeting]]] = []
    firsts: dict[int, int] = {}
    for document in scene.q.shards[rank]:
        spans = scene.fetched(rank, document)
        if not spans:
            continue
        for other in scene.k.holders[document]:
            arriving[other].extend(clipped(scene.k.shards[other][document], spans))
        seen = scene.seen(rank, document)
        remote.append([(p, m) for p, m in seen if scene.own_row(rank, document, m.keys) is None])
        firsts[document] = remote[-1][0][0].row
    for pieces in (*send, *arriving):
        pieces.sort(key=lambda p: p.row)
    received = packed(piece for pieces in arriving for piece in pieces)
    # Documents lie in the order of the queries that see them here: then calls are fewest.
    ordered = sorted(received, key=lambda p: (firsts[p.document], p.begin))
    buffer: dict[int, list[Piece]] = {}
    for piece in merged(packed(ordered)):
        buffer.setdefault(piece.document, []).append(piece)
    parts = (
        [[_part(p, m, b.row + m.keys[0] - b.begin)] for p, m in seen for b in buffer[p.document] if _holds(b, m.keys)]
        for seen in remote
    )
    rows = sum(p.end - p.begin for p in received)
    order = runs_of(ordered)
    return Stage(
        calls=_calls(parts, fuse),
        local=False,
        send=tuple(runs_of(pieces) for pieces in send),
        receive=tuple(sum(p.end - p.begin for p in pieces) for pieces in arriving),
        order=None if order in ((), (Run(0, rows),)) else order,
        rows=rows,
    )


def _holds(piece: Piece, span: Span) -> bool:
    return piece.begin <= span[0] and span[1] <= piece.end


def gather_stages(queries: Layout, keys: Layout, mask: Mask, rank: int, fuse: bool = True) -> RankPlan:
    """Keys in global order: every run of queries meets all its keys at once, and nothing is merged.

    A local stage for the runs whose keys are one run of this rank's own key shard, then, unless that is so of all
    queries on all ranks, one stage for all others. Its key buffer holds, per document, exactly the tokens that they
    see, in order.

    Args:
        queries: placement of the queries.
        keys: placement of the keys; as many ranks and documents.
        mask: which keys a query sees.
        rank: whose plan.
        fuse: let runs of queries that do not follow one another in their document share an entry. Distances between
            queries and keys are then not those of the document.
    """
    scene = scene_of(queries, keys, mask)
    local: list[list[list[Part]]] = []
    for document in scene.q.shards[rank]:
        pieces = []
        for piece, meeting in scene.seen(rank, document):
            row = scene.own_row(rank, document, meeting.keys)
            if row is not None:
                pieces.append([_part(piece, meeting, row)])
        local.append(pieces)
    stages = [Stage(_calls(local, fuse), local=True)]
    if _anything_fetched(scene):
        stages.append(_gathered_stage(scene, rank, fuse))
    return RankPlan(tuple(stages), exclusive=True)


# ---- keys from one rank after the other


def _steps(scene: Scene) -> list[int]:
    """The steps s in which some rank r may see keys of rank r - s: both hold a part of one document."""
    ranks = scene.ranks
    pairs = set()
    for document, holders in scene.q.holders.items():
        pairs.add((tuple(holders), tuple(scene.k.holders.get(document, ()))))
    found, every = 0, (1 << ranks) - 1
    for at, sources in pairs:
        mirrored = sum(1 << (-source % ranks) for source in sources)
        for r in at:
            found |= mirrored << r
            found = (found | found >> ranks) & every
        if found | 1 == every:
            break
    return [s for s in range(1, ranks) if found >> s & 1]


def _taken(scene: Scene, rank: int, source: int) -> list[Piece]:
    """What a rank sees of the source's key shard, in the order of rows there."""
    here, there = scene.q.shards[rank], scene.k.shards[source]
    result: list[Piece] = []
    for document in here.keys() & there.keys():
        result.extend(clipped(there[document], union(scene.needed(rank, document))))
    return sorted(result, key=lambda p: p.row)


def _crossed(scene: Scene, rank: int, buffer: Iterable[Piece]) -> Iterator[list[list[Part]]]:
    """Every run of this rank's queries against every run of its document's keys in the buffer."""
    keys: dict[int, list[Piece]] = {}
    for piece in buffer:
        keys.setdefault(piece.document, []).append(piece)
    for document, runs in keys.items():
        pieces = []
        for piece in scene.q.shards[rank].get(document, ()):
            met = ((run, scene.meet(piece, run)) for run in runs)
            pieces.append([_part(piece, m, run.row + m.keys[0] - run.begin) for run, m in met if m is not None])
        yield pieces


def ring_stages(queries: Layout, keys: Layout, mask: Mask, rank: int, fuse: bool = True) -> RankPlan:
    """Keys of one other rank after another: a local stage, then one for each step in which anything may travel.

    In step s the keys come from rank (rank - s) % R, only the rows that this rank's queries see. Arguments are those
    of :func:`gather_stages`.
    """
    scene = scene_of(queries, keys, mask)
    own = (run for runs in scene.k.shards[rank].values() for run in runs)
    stages = [Stage(_calls(_crossed(scene, rank, own), fuse), local=True)]
    for step in _steps(scene):
        source, target = (rank - step) % scene.ranks, (rank + step) % scene.ranks
        send: list[tuple[Run, ...]] = [()] * scene.ranks
        receive = [0] * scene.ranks
        send[target] = runs_of(_taken(scene, target, rank))
        buffer = merged(packed(_taken(scene, rank, source)))
        receive[source] = sum(p.end - p.begin for p in buffer)
        made = _calls(_crossed(scene, rank, buffer), fuse)
        stages.append(Stage(made, False, tuple(send), tuple(receive), None, receive[source]))
    return RankPlan(tuple(stages), exclusive=False)


# ---- several shards as one


def united(layout: Layout, groups: Sequence[Sequence[int]]) -> tuple[Layout, tuple[tuple[Run, ...] | None, ...]]:
    """Groups of ranks as single ranks, for schemes that divide heads.

    Args:
        layout: of the ranks.
        groups: the ranks of each group, in the order in which their shards are concatenated. Together they are all
            ranks once, and all are of one size.

    Returns:
        The layout over groups, of len(group) * layout.rows rows, documents and tokens in order, padding last; and per
        group the runs of concatenated rows that bring them into that order, None where they are in it.
    """
    size = len(groups[0])
    assert sorted(rank for group in groups for rank in group) == list(range(layout.ranks))
    assert all(len(group) == size for group in groups)
    rows = size * layout.rows
    shards, orders = [], []
    for group in groups:
        found = [p._replace(row=p.row + i * layout.rows) for i, r in enumerate(group) for p in layout.pieces[r]]
        ordered = sorted(found)
        runs = list(runs_of(ordered))
        end = 0
        for piece in (*found, Piece(0, 0, 0, rows)):  # found is in the order of rows; what lies between is padding
            append_run(runs, end, piece.row - end)
            end = piece.row + piece.end - piece.begin
        shards.append(tuple(merged(packed(ordered))))
        orders.append(None if len(runs) <= 1 else tuple(runs))
    return Layout(layout.lengths, tuple(shards), rows), tuple(orders)
