"""Stages of context parallelism, as data: all ranks are simulated, and every pair of tokens is counted."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anyattn._context import _indices
from anyattn._context._calls import Part, calls, fused
from anyattn._context._data import Entry, KernelCall, Layout, Mask, Piece, RankPlan, Run, Stage
from anyattn._context._geometry import area, meet, needed
from anyattn._context._stages import gather_stages, ring_stages, united

Token = tuple[int, int]
"""Document, and position in it."""
Planner = Callable[[Layout, Layout, Mask, int, bool], RankPlan]
PLANNERS: dict[str, Planner] = {"gather": gather_stages, "ring": ring_stages}

CAUSAL = Mask(right=0)
FULL = Mask()


# ---- the specification, token by token


def sees(mask: Mask, len_q: int, len_k: int, i: int, j: int) -> bool:
    position = i if mask.top_left else i + len_k - len_q
    return (mask.left is None or j >= position - mask.left) and (mask.right is None or j <= position + mask.right)


def visible(mask: Mask, len_q: int, len_k: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(len_q) for j in range(len_k) if sees(mask, len_q, len_k, i, j)]


def tokens(layout: Layout, rank: int) -> list[Token | None]:
    """What lies in each row of a shard; None is padding."""
    rows: list[Token | None] = [None] * layout.rows
    for document, begin, end, row in layout.pieces[rank]:
        for x in range(begin, end):
            assert rows[row + x - begin] is None
            rows[row + x - begin] = (document, x)
    return rows


def chosen(rows: Sequence[Token | None], runs: Sequence[Run]) -> list[Token | None]:
    assert all(run.rows > 0 for run in runs)
    assert all(run.row >= 0 and run.row + run.rows <= len(rows) for run in runs)
    return [row for run in runs for row in rows[run.row : run.row + run.rows]]


@dataclass
class World:
    """The plans of all ranks, and what they compute together."""

    queries: Layout
    keys: Layout
    mask: Mask
    plans: list[RankPlan]
    fuse: bool = True

    def buffer(self, at: int, rank: int) -> list[Token | None]:
        """The key buffer of a stage, as the ranks' exchange fills it."""
        stage = self.plans[rank].stages[at]
        if stage.local:
            assert (stage.send, stage.receive, stage.order, stage.rows) == ((), (), None, 0)
            return tokens(self.keys, rank)
        received = []
        for source, plan in enumerate(self.plans):
            sent = chosen(tokens(self.keys, source), plan.stages[at].send[rank])
            assert len(sent) == stage.receive[source]
            received += sent
        assert len(stage.send) == len(stage.receive) == len(self.plans)
        assert None not in received
        if stage.order is not None:
            assert sorted(x for run in stage.order for x in range(run.row, run.row + run.rows)) == [
                *range(len(received))
            ]
            received = chosen(received, stage.order)
        assert len(received) == stage.rows
        return received

    def check(self) -> None:
        assert len({tuple(s.local for s in plan.stages) for plan in self.plans}) == 1
        assert self.plans[0].stages[0].local
        assert not any(stage.local for stage in self.plans[0].stages[1:])
        computed: Counter[tuple[Token, int]] = Counter()
        for rank, plan in enumerate(self.plans):
            rows = tokens(self.queries, rank)
            seen: Counter[int] = Counter()
            for at, stage in enumerate(plan.stages):
                buffer = self.buffer(at, rank)
                used: set[int] = set()
                for call in stage.calls:
                    used |= self.check_call(call, rows, buffer, computed)
                    seen.update(x for entry in call.entries for x in range(entry.q, entry.q + entry.len_q))
                assert stage.local or len(used) == stage.rows  # nothing travels in vain
            assert not plan.exclusive or not seen or max(seen.values()) == 1
        expected = {
            ((document, i), j)
            for document, (n, m) in enumerate(zip(self.queries.lengths, self.keys.lengths, strict=True))
            for i, j in visible(self.mask, n, m)
        }
        assert set(computed) == expected
        assert all(count == 1 for count in computed.values())

    def check_call(
        self,
        call: KernelCall,
        rows: list[Token | None],
        buffer: list[Token | None],
        computed: Counter[tuple[Token, int]],
    ) -> set[int]:
        """Add the pairs that a kernel would compute; return the rows of the buffer that it uses."""
        assert call.entries
        assert all(side is None or side >= 0 for side in (call.left, call.right))
        used: set[int] = set()
        q_end = k_end = 0
        for (q, len_q, k, len_k), document in zip(call.entries, call.documents, strict=True):
            assert q >= q_end
            assert k >= k_end
            q_end, k_end = q + len_q, k + len_k
            assert q_end <= len(rows)
            assert k_end <= len(buffer)
            pairs = visible(Mask(call.left, call.right), len_q, len_k)
            assert {i for i, _ in pairs} == set(range(len_q))
            assert {j for _, j in pairs} == set(range(len_k))
            distances = set()
            for i, j in pairs:
                query, key = rows[q + i], buffer[k + j]
                assert query is not None
                assert key is not None
                assert query[0] == key[0] == document
                computed[query, key[1]] += 1
                distances.add((query[1] - key[1]) - (i - j))
            assert self.fuse or len(distances) == 1
            used |= set(range(k, k_end))
        return used


def world(scheme: str, queries: Layout, keys: Layout, mask: Mask, fuse: bool = True) -> World:
    plans = [PLANNERS[scheme](queries, keys, mask, rank, fuse) for rank in range(queries.ranks)]
    return World(queries, keys, mask, plans, fuse)


# ---- placements


def zigzag(lengths: Sequence[int], ranks: int) -> Layout:
    """Every document in 2 * ranks chunks; rank r has chunks r and 2 * ranks - 1 - r."""
    shards = []
    for rank in range(ranks):
        pieces, row = [], 0
        for document, n in enumerate(lengths):
            for chunk in (rank, 2 * ranks - 1 - rank):
                begin, end = n * chunk // (2 * ranks), n * (chunk + 1) // (2 * ranks)
                if begin < end:
                    pieces.append(Piece(document, begin, end, row))
                    row += end - begin
        shards.append((tuple(pieces), row))
    return Layout(tuple(lengths), tuple(pieces for pieces, _ in shards), max(row for _, row in shards))


def whole(lengths: Sequence[int], ranks: int) -> Layout:
    """Document i on rank i % ranks."""
    shards: list[list[Piece]] = [[] for _ in range(ranks)]
    rows = [0] * ranks
    for document, n in enumerate(lengths):
        if n:
            shards[document % ranks].append(Piece(document, 0, n, rows[document % ranks]))
            rows[document % ranks] += n
    return Layout(tuple(lengths), tuple(map(tuple, shards)), max(rows))


def scattered(lengths: Sequence[int], ranks: int, chance: random.Random) -> Layout:
    """Random cuts to random ranks, in any order, with padding anywhere."""
    shards: list[list[Piece]] = [[] for _ in range(ranks)]
    pieces = []
    for document, n in enumerate(lengths):
        cuts = sorted({0, n, *(chance.randint(0, n) for _ in range(chance.choice([0, 0, 1, 2, 2 * ranks])))})
        pieces += [(document, a, b) for a, b in itertools.pairwise(cuts)]
    if chance.random() < 0.5:
        chance.shuffle(pieces)
    padded = chance.random() < 0.5
    rows = [0] * ranks
    for document, a, b in pieces:
        rank = chance.randrange(ranks)
        row = rows[rank] + (chance.choice([0, 0, 1, 3]) if padded else 0)
        shards[rank].append(Piece(document, a, b, row))
        rows[rank] = row + b - a
    return Layout(tuple(lengths), tuple(map(tuple, shards)), max(rows) + chance.choice([0, 1, 5]))


LENGTHS = st.one_of(st.sampled_from([0, 1, 2, 13, 37, 61]), st.integers(0, 20))
SIDES = st.one_of(st.none(), st.integers(0, 9), st.just(40))
MASKS = st.one_of(
    st.sampled_from([FULL, CAUSAL, Mask(right=0, top_left=True)]),
    st.builds(Mask, SIDES, SIDES, st.booleans()),
)
RANKS = st.sampled_from([1, 2, 3, 4, 8])


@st.composite
def placements(draw: st.DrawFn) -> tuple[Layout, Layout]:
    """Queries and keys; the same layout, or the keys' own."""
    ranks = draw(RANKS)
    lengths = draw(st.lists(LENGTHS, max_size=4))
    chance = random.Random(draw(st.integers(0, 2**32)))

    def place(lengths: Sequence[int]) -> Layout:
        match draw(st.sampled_from(["scattered", "scattered", "zigzag", "whole"])):
            case "zigzag":
                return zigzag(lengths, ranks)
            case "whole":
                return whole(lengths, ranks)
        return scattered(lengths, ranks, chance)

    queries = place(lengths)
    match draw(st.sampled_from(["same", "same", "elsewhere", "other"])):
        case "same":
            return queries, queries
        case "elsewhere":
            return queries, place(lengths)
    return queries, place([draw(LENGTHS) for _ in lengths])


# ---- geometry


@given(MASKS, LENGTHS, LENGTHS, st.data())
def test_area_and_needed_count_pairs(mask: Mask, len_q: int, len_k: int, data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, len_q))
    end = data.draw(st.integers(begin, len_q))
    pairs = [(i, j) for i, j in visible(mask, len_q, len_k) if begin <= i < end]
    assert area(mask, len_q, len_k, begin, end) == len(pairs)
    low, high = needed(mask, len_q, len_k, begin, end)
    assert set(range(low, high)) == {j for _, j in pairs}


def test_area_is_exact_where_floats_are_not() -> None:
    n = 10**9 + 7
    assert area(CAUSAL, n, n, 0, n) == n * (n + 1) // 2
    assert area(Mask(100, 0), n, n, 0, n) == n * 101 - 100 * 101 // 2


@pytest.mark.parametrize("mask", [Mask(0, -3), Mask(-3, 0), Mask(5, -3), Mask(-3, 5), Mask(None, -2), Mask(-2, None)])
def test_negative_sides_are_exact_too(mask: Mask) -> None:
    """A negative side hides a query's own position; the effective window is not negative all the same."""
    for len_q, len_k in [(7, 7), (4, 9), (9, 4)]:
        pairs = visible(mask, len_q, len_k)
        assert area(mask, len_q, len_k, 0, len_q) == len(pairs)
        world("ring", zigzag([len_q], 2), zigzag([len_k], 2), mask).check()
        world("gather", zigzag([len_q], 2), zigzag([len_k], 2), mask).check()


@given(MASKS, LENGTHS, LENGTHS, st.data())
def test_meet_is_exact(mask: Mask, len_q: int, len_k: int, data: st.DataObject) -> None:
    a, b = sorted(data.draw(st.tuples(st.integers(0, len_q), st.integers(0, len_q))))
    c, d = sorted(data.draw(st.tuples(st.integers(0, len_k), st.integers(0, len_k))))
    pairs = {(i, j) for i, j in visible(mask, len_q, len_k) if a <= i < b and c <= j < d}
    met = meet(mask, len_q, len_k, (a, b), (c, d))
    if met is None:
        assert not pairs
        return
    (a, b), (c, d), left, right = met
    assert {i for i, _ in pairs} == set(range(a, b))
    assert {j for _, j in pairs} == set(range(c, d))
    assert {(a + i, c + j) for i, j in visible(Mask(left, right), b - a, d - c)} == pairs
    for kept, other in ((left, Mask(None, right)), (right, Mask(left, None))):
        hides = len(visible(other, b - a, d - c)) > len(pairs)
        assert hides if kept is not None else not hides


# ---- calls


def pairs_of(parts: Iterable[Part]) -> Counter[tuple[int, int]]:
    """The rows that meet, as often as they do."""
    found: Counter[tuple[int, int]] = Counter()
    for _, q, len_q, k, len_k, left, right in parts:
        found.update((q + i, k + j) for i, j in visible(Mask(left, right), len_q, len_k))
    return found


@settings(max_examples=1000)
@given(st.data())
def test_fused_parts_are_exact(data: st.DataObject) -> None:
    """Whatever the parts, also such as no document gives, the fused ones compute the same pairs."""
    sides = st.one_of(st.none(), st.integers(0, 3))
    grid, q = [], 0
    for _ in range(data.draw(st.integers(1, 3))):
        q += data.draw(st.sampled_from([0, 0, 1]))
        len_q, row, k = data.draw(st.integers(1, 4)), [], 0
        for _ in range(data.draw(st.integers(1, 3))):
            k += data.draw(st.sampled_from([0, 0, 0, 1]))
            len_k, skipped = data.draw(st.integers(1, 4)), data.draw(st.integers(0, len_q - 1))
            right = data.draw(sides)
            if right is None or right >= len_q - skipped - len_k:  # every row sees a key
                left = data.draw(st.sampled_from([None, None, None, 1]))
                row.append(Part(0, q + skipped, len_q - skipped, k, len_k, left, right))
            k += len_k
        grid.append(row)
        q += len_q
    apart = [part for row in grid for part in row]
    made = fused(grid)
    assert len(made) <= len(apart)
    assert pairs_of(made) == pairs_of(apart)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 12), st.integers(1, 6)), max_size=8))
def test_calls_are_as_few_as_can_be(runs: list[tuple[int, int, int]]) -> None:
    """For one window: as many as there are parts no two of which fit in one call (Dilworth)."""
    starts = itertools.accumulate([n for n, _, _ in runs], initial=0)
    parts = [Part(0, q, n, k, m, 2, 1) for q, (n, k, m) in zip(starts, runs, strict=False)]
    made = calls(parts)
    assert sorted(e for call in made for e in call.entries) == [Entry(p.q, p.len_q, p.k, p.len_k) for p in parts]
    subsets = (c for n in range(len(parts) + 1) for c in itertools.combinations(parts, n))
    apart = [c for c in subsets if all(a.k + a.len_k > b.k for a, b in itertools.combinations(c, 2))]
    assert len(made) == len(apart[-1])  # the widest comes last


# ---- stages


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("scheme", PLANNERS)
@settings(max_examples=400)
@given(placements(), MASKS)
def test_every_visible_pair_is_computed_once(
    scheme: str, fuse: bool, placement: tuple[Layout, Layout], mask: Mask
) -> None:
    queries, keys = placement
    made = world(scheme, queries, keys, mask, fuse)
    made.check()
    assert all(plan.exclusive == (scheme == "gather") for plan in made.plans)


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("count", [1, 3])
def test_zigzag_causal_calls(ranks: int, count: int) -> None:
    """Two calls a rank if keys lie in global order, one a stage in the ring; however many documents there are."""
    layout = zigzag([50, 61, 48][:count], ranks)
    gather, ring = (world(scheme, layout, layout, CAUSAL) for scheme in PLANNERS)
    gather.check()
    ring.check()
    for rank in range(ranks):
        local, remote = (stage.calls for stage in gather.plans[rank].stages)
        # the head of rank 0 needs no other keys; the chunks of the last rank follow one another, and are one run
        assert (len(local), len(remote)) == ((1, 1) if rank == 0 else (0, 1) if rank == ranks - 1 else (0, 2))
        assert {(c.left, c.right) for c in (*local, *remote)} == {(None, 0)}
        assert [len(stage.calls) for stage in ring.plans[rank].stages] == [1] * ranks
        for stage in ring.plans[rank].stages:
            (call,) = stage.calls
            assert (call.left, call.right) == ((None, 0) if stage.local else (None, None))
            assert len(call.entries) == count


def test_zigzag_ring_entries() -> None:
    """Head and tail meet as one entry whatever the step."""
    layout = zigzag([80], 4)
    stages = ring_stages(layout, layout, CAUSAL, 1).stages
    assert [stage.calls[0].entries for stage in stages] == [
        (Entry(0, 20, 0, 20),),  # head and tail against both: causal
        (Entry(0, 20, 0, 10),),  # both against the head of rank 0
        (Entry(10, 10, 0, 20),),  # the tail against both of rank 3, which follow one another,
        (Entry(10, 10, 0, 20),),  # and against both of rank 2, which do not
    ]
    apart = ring_stages(layout, layout, CAUSAL, 1, fuse=False).stages
    assert [sum(len(call.entries) for call in stage.calls) for stage in apart] == [3, 2, 1, 2]


@pytest.mark.parametrize("scheme", PLANNERS)
def test_zigzag_without_a_mask_is_one_call_a_stage(scheme: str) -> None:
    queries, keys = zigzag([50, 61], 4), zigzag([37, 80], 4)
    made = world(scheme, queries, keys, FULL)
    made.check()
    for plan in made.plans:
        assert [len(stage.calls) for stage in plan.stages] == ([0, 1] if scheme == "gather" else [1, 1, 1, 1])


@pytest.mark.parametrize("mask", [CAUSAL, FULL, Mask(3, 0), Mask(3, 2)])
@pytest.mark.parametrize("scheme", PLANNERS)
def test_whole_documents_do_not_travel(scheme: str, mask: Mask) -> None:
    layout = whole([13, 1, 0, 29, 17, 5, 31], 3)
    made = world(scheme, layout, layout, mask)
    made.check()
    for plan in made.plans:
        (stage,) = plan.stages
        (call,) = stage.calls
        assert stage.local
        assert (call.left, call.right) == (mask.left, mask.right)
        assert sorted(call.documents) == list(call.documents)


def test_ring_leaves_out_steps_in_which_nothing_travels() -> None:
    """One document on ranks 1 and 2 of 4: only steps 1 and 3 have a sender and a receiver."""
    layout = Layout((8,), ((), (Piece(0, 0, 4, 0),), (Piece(0, 4, 8, 0),), ()), 4)
    made = world("ring", layout, layout, CAUSAL)
    made.check()
    assert [len(plan.stages) for plan in made.plans] == [3] * 4
    assert made.plans[2].stages[1].receive == (0, 4, 0, 0)
    assert made.plans[1].stages[2].receive == (0, 0, 0, 0)


def test_windows_move_a_halo_only() -> None:
    layout = Layout((40,), tuple((Piece(0, 10 * r, 10 * r + 10, 0),) for r in range(4)), 10)
    made = world("gather", layout, layout, Mask(3, 0))
    made.check()
    assert [plan.stages[1].receive for plan in made.plans] == [(0,) * 4, (3, 3, 0, 0), (0, 3, 3, 0), (0, 0, 3, 3)]
    ring = world("ring", layout, layout, Mask(3, 0))
    ring.check()
    assert [sum(sum(s.receive) for s in plan.stages) for plan in ring.plans] == [0, 3, 3, 3]


def test_what_sees_everything_joins_a_call_with_a_window() -> None:
    """One-token documents and short ones hide nothing, whatever the window."""
    layout = whole([1, 9, 3, 1, 7], 1)
    (stage,) = gather_stages(layout, layout, Mask(4, 0), 0).stages
    (call,) = stage.calls
    assert (call.left, call.right, call.documents) == (4, 0, (0, 1, 2, 3, 4))


def test_queries_that_see_no_key_are_in_no_entry() -> None:
    queries, keys = whole([9], 1), whole([4], 1)
    (stage,) = gather_stages(queries, keys, CAUSAL, 0).stages
    assert stage.calls == (KernelCall(None, 0, (Entry(5, 4, 0, 4),), (0,)),)
    (stage,) = gather_stages(queries, keys, Mask(right=0, top_left=True), 0).stages
    (call,) = stage.calls
    assert (call.left, call.right, call.entries) == (None, 5, (Entry(0, 9, 0, 4),))


def test_documents_in_another_order_need_no_more_calls() -> None:
    """The buffer follows the rows of the queries, so that both increase."""
    pieces = tuple(tuple(Piece(d, 8 * r, 8 * r + 8, 8 * at) for at, d in enumerate((2, 0, 1))) for r in range(2))
    layout = Layout((16, 16, 16), pieces, 24)
    made = world("gather", layout, layout, CAUSAL)
    made.check()
    assert [len(stage.calls) for stage in made.plans[1].stages] == [0, 1]


def test_empty_batches_and_ranks() -> None:
    for layout in (Layout((), ((), ()), 0), Layout((0, 0), ((), ()), 4)):
        for planner in PLANNERS.values():
            assert planner(layout, layout, CAUSAL, 1, True).stages == (Stage((), local=True),)


# ---- shards as one


@settings(max_examples=300)
@given(placements(), st.data())
def test_united_shards_hold_the_same_tokens_in_order(placement: tuple[Layout, Layout], data: st.DataObject) -> None:
    layout = placement[0]
    size = data.draw(st.sampled_from([n for n in (1, 2, 3, 4, 8) if layout.ranks % n == 0]))
    ranks = data.draw(st.permutations(range(layout.ranks)))
    groups = [ranks[i : i + size] for i in range(0, layout.ranks, size)]
    joined, orders = united(layout, groups)
    assert (joined.lengths, joined.rows, joined.ranks) == (layout.lengths, size * layout.rows, len(groups))
    for at, (group, order) in enumerate(zip(groups, orders, strict=True)):
        rows = [token for rank in group for token in tokens(layout, rank)]
        real = [token for token in rows if token is not None]
        wanted = [*sorted(real), *[None] * (len(rows) - len(real))]
        assert (order is None) == (rows == wanted)
        if order is not None:
            assert sorted(x for run in order for x in range(run.row, run.row + run.rows)) == list(range(len(rows)))
            assert all(a.row + a.rows != b.row for a, b in itertools.pairwise(order))
            rows = chosen(rows, order)
        assert rows == wanted
        assert tokens(joined, at) == wanted
        pairs = itertools.pairwise(joined.pieces[at])
        assert not any(a.document == b.document and a.end == b.begin for a, b in pairs)
    for planner in PLANNERS:
        world(planner, joined, joined, CAUSAL).check()


def test_united_zigzag_is_one_document() -> None:
    layout = zigzag([24], 3)
    joined, orders = united(layout, [range(3)])
    assert joined == Layout((24,), ((Piece(0, 0, 24, 0),),), 24)
    assert orders == ((Run(0, 4), Run(8, 4), Run(16, 8), Run(12, 4), Run(4, 4)),)
    joined, orders = united(layout, [[1], [0], [2]])
    assert joined.pieces == (layout.pieces[1], layout.pieces[0], (Piece(0, 8, 16, 0),))
    assert orders == (None, None, None)


def test_the_range_of_rows_that_local_calls_do_not_settle() -> None:
    """Rows to which something comes, or of which nothing is known; what comes is counted after the range."""
    settled = torch.tensor([True, True, True, False, True, True])
    home = torch.tensor([[-1, -1], [0, 2], [-1, -1], [-1, -1], [1, -1], [-1, -1]], dtype=torch.int32)
    hull, join = _indices.joined(settled, home)
    assert hull == (1, 5)
    assert join.tolist() == [[0, 4, 6], [1, -1, -1], [-1, -1, -1], [3, 5, -1]]
    alone, own = _indices.joined(settled, None)
    assert (alone, own.tolist()) == ((3, 4), [[-1]])
    assert _indices.joined(settled | True, None)[0] == (0, 0)
