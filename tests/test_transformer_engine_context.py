"""``DotProductAttention`` under context parallelism: Transformer Engine's layout, and one process's answer."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import anyattn
import context_pool
import te_cases
import te_ranks
from anyattn.integrations import _te_context
from anyattn.integrations._te_context import CPLoadBalancingStrategy, Room
from te_cases import TeCase
from te_ranks import Found

COMMS = ("p2p", "all_gather", "a2a", "a2a+p2p")
BOTTOM_RIGHT = "padding_causal_bottom_right"
DENSE: dict[str, Any] = {"lengths": (16, 16)}
GAPS: dict[str, Any] = {"layout": "thd", "mask": "padding_causal", "lengths": (13, 0, 7, 1), "rooms": (16, 8, 8, 8)}
PACKED: dict[str, Any] = {"layout": "thd", "mask": "padding_causal", "lengths": (16, 8, 24)}
PADDED: dict[str, Any] = {"mask": "padding_causal", "lengths": (16, 5, 0), "rooms": (16, 16, 16)}

#: By feature: run under every scheme.
FEATURES: dict[str, TeCase] = {
    "dense": TeCase(**DENSE),
    "sbhd": TeCase(layout="sbhd", mask="no_mask", **DENSE),
    "padded": TeCase(**PADDED),
    "left": TeCase(layout="sbhd", by="left", **{**PADDED, "mask": "padding"}),
    "thd": TeCase(**PACKED),
    "gaps": TeCase(**GAPS, max_logit=True),
    "gaps_full": TeCase(**{**GAPS, "mask": "padding"}, softmax="learnable", heads=(4, 4)),
    "gaps_window": TeCase(**GAPS, window=(3, 0), softcap=2.0),
    "window": TeCase(**DENSE, mask="no_mask", window=(2, 3), softmax="off-by-one"),
    "bottom_right": TeCase(**{**GAPS, "mask": BOTTOM_RIGHT}, dims=(12, 8)),
    "alibi": TeCase(**DENSE, bias="alibi", slopes="bh", max_logit=True),
    "alibi_gaps": TeCase(**GAPS, bias="alibi"),
    "sink": TeCase(**DENSE, softmax="learnable", max_logit=True),
    "again": TeCase(**GAPS, softmax="learnable", more=(("checkpoint_core_attention", True),)),
}


@pytest.fixture(scope="module")
def pool() -> context_pool.Pool:
    """Ranks."""
    return context_pool.shared()


def judge(case: TeCase, found: list[Found]) -> None:
    """Every rank's rows are the whole batch's, and padding is exactly zero."""
    batch = te_cases.build(case)
    expected = te_cases.answer(batch)
    dim = 1 if case.layout == "bshd" else 0
    sides = {"q": case.side(False), "k": case.side(True), "v": case.side(True)}
    real = {n: te_cases.pack(s.real()[..., None, None], s, case.layout) for n, s in sides.items()}
    if "padding" not in case.mask:
        real = {n: torch.ones_like(x) for n, x in real.items()}

    def compare(name: str, mine: Tensor, whole: Tensor, side: str, rows: Tensor) -> None:
        part = te_cases.pack(whole, sides[side], case.layout).index_select(dim, rows)
        torch.testing.assert_close(mine, part, rtol=1e-6, atol=1e-6, msg=lambda m: f"{name}: {m}")
        assert (mine.masked_fill(real[side].index_select(dim, rows), 0) == 0).all(), f"{name} in padding"

    for each in found:
        compare("out", each.out, expected.out, "q", each.rows)
        for name in "qkv":
            compare(f"d{name}", each.grads[name], expected.grads[name], name, each.rows if name == "q" else each.rows_k)
        assert each.same
        assert each.plans <= 1
        if case.max_logit:
            torch.testing.assert_close(each.largest.double(), expected.largest, rtol=1e-5, atol=1e-5)
    if case.softmax == "learnable":
        total = torch.stack([each.grads["sink"] for each in found]).double().sum(0)
        torch.testing.assert_close(total, expected.grads["sink"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(("comm", "ranks"), [*((comm, 2) for comm in COMMS[:3]), ("a2a+p2p", 4)])
def test_every_scheme_is_one_process(pool: context_pool.Pool, comm: str, ranks: int, feature: str) -> None:
    case = FEATURES[feature]
    judge(case, context_pool.values(pool.run(te_ranks.group_of(comm, ranks), te_ranks.run, case, comm)))


@pytest.mark.parametrize("feature", ["dense", "padded", "gaps", "gaps_full", "gaps_window", "alibi_gaps"])
@pytest.mark.parametrize("comm", COMMS[:3])
def test_four_ranks(pool: context_pool.Pool, comm: str, feature: str) -> None:
    case = FEATURES[feature]
    judge(case, context_pool.values(pool.run(4, te_ranks.run, case, comm)))


CROSS: dict[str, Any] = {"lengths": (8, 8), "keys": (16, 16)}
CROSS_GAPS: dict[str, Any] = {**GAPS, "keys": (3, 5, 24, 8), "key_rooms": (8, 8, 24, 8), "mask": BOTTOM_RIGHT}
#: What the core has under these schemes alone.
SOME: dict[str, tuple[tuple[str, ...], TeCase]] = {
    "bias": (("all_gather",), TeCase(**DENSE, bias="post_scale_bias", max_logit=True)),
    "arbitrary": (("all_gather",), TeCase(mask="arbitrary", lengths=(16,), layout="sbhd", max_logit=True)),
    "cross": (("all_gather", "a2a"), TeCase(**CROSS, mask="no_mask", max_logit=True)),
    "cross_gaps": (("all_gather", "a2a"), TeCase(**CROSS_GAPS, max_logit=True)),
    "alibi_full": (("a2a",), TeCase(**DENSE, mask="no_mask", bias="alibi")),
}  # fmt: skip


@pytest.mark.parametrize("feature", SOME)
@pytest.mark.parametrize(("comm", "ranks"), [*((comm, 2) for comm in COMMS[:3]), ("a2a+p2p", 4)])
def test_what_some_schemes_can(pool: context_pool.Pool, comm: str, ranks: int, feature: str) -> None:
    able, case = SOME[feature]
    outcomes = pool.run(te_ranks.group_of(comm, ranks), te_ranks.run, case, comm)
    if comm in able:
        found = context_pool.values(outcomes)
        judge(case, found)
        return
    (message,) = set(context_pool.failures(outcomes, anyattn.ContextError))
    assert f"under cp_comm_type='{comm}'" in message
    assert "use cp_comm_type=" in message


@pytest.mark.parametrize("comm", COMMS)
@pytest.mark.parametrize("rooms", [(16, 8, 8, 8), (5, 3, 24, 8)])
def test_no_load_balance(pool: context_pool.Pool, comm: str, rooms: tuple[int, ...]) -> None:
    """Equal runs of rows, wherever sequences begin."""
    for window in (None, (3, 0)):
        case = TeCase(**{**GAPS, "rooms": rooms, "lengths": (5, 0, 8, 3)}, window=window, max_logit=True)
        group = te_ranks.group_of(comm, 2)
        judge(case, context_pool.values(pool.run(group, te_ranks.run, case, comm, True)))


WRONG = [
    ("p2p", "two groups", "takes one group"),
    ("a2a+p2p", "one group", r"takes cp_group=\[a2a group, p2p group\]"),
    ("a2a+p2p", "ranks", "needs cp_global_ranks, all 4 of them"),
    ("a2a+p2p", "no ranks", r"got \[\]"),
    ("p2p", "strategy", "NO_LOAD_BALANCE goes with qkv_format='thd'"),
    ("a2a", "odd", r"has 6 rows from row 0 on, padding included, which 2 \* 2 chunks do not divide"),
    ("all_gather", "odd sequence", "sequence 0 has 6 rows from row 0"),
    ("p2p", "short", "take 32 rows, and 2 ranks have 8 each"),
    ("p2p", "whole", "tensors of 8 rows, and this rank's share of the 8 rows .* is 4 over 2 ranks"),
    ("all_gather", "tail", "tensors of 8 rows, and this rank's share of the 12 rows .* is 6 over 2 ranks"),
    ("a2a", "too few ranks", r"cp_global_ranks must list the 2 ranks of cp_group, \[0, 1\], or be None; got \[0\]"),
    ("p2p", "entries", "cu_seqlens_q: 2 sequences, and query_layer has 1 batch entries"),
    ("p2p", "long entry", "has 40 tokens, and an entry 16 rows over all ranks"),
    ("p2p", "policies", "thd_attention_policies under context parallelism"),
    ("p2p", "own mask", r"attention_mask speaks of .* \(1, 8\), and the batch has \(1, 16\) over all ranks"),
    ("all_gather", "short mask", r"\(1, 12\), and the batch has \(1, 16\) over all ranks"),
    ("a2a", "long mask", r"\(1, 24\), and the batch has \(1, 16\) over all ranks"),
    ("p2p", "mask with holes", "between the tokens of an entry, which goes with .* not with .* context parallelism"),
    ("p2p", "masks of two", "attention_mask: 2 sequences, and query_layer has 1 batch entries"),
    ("all_gather", "padding and bias", "core_attention_bias with padding, or with qkv_format='thd', under context"),
]


@pytest.mark.parametrize(("comm", "wrong", "text"), WRONG, ids=lambda x: x if " " not in x or len(x) < 15 else "")
def test_mistakes_are_named_on_every_rank(pool: context_pool.Pool, comm: str, wrong: str, text: str) -> None:
    outcomes = pool.run(te_ranks.group_of(comm, 2), te_ranks.refused, comm, wrong)
    for outcome in outcomes:
        assert outcome.failure is not None
        assert outcome.failure.is_a(anyattn.AnyattnError), outcome.failure.text
        assert re.search(text, outcome.failure.message), outcome.failure.message


@pytest.mark.parametrize("by", ["left", "both"])
@pytest.mark.parametrize("layout", ["bshd", "sbhd"])
def test_a_mask_beside_offsets_says_where_padding_is(pool: context_pool.Pool, layout: str, by: str) -> None:
    case = TeCase(layout=layout, by=by, also_offsets=True, **PADDED)
    judge(case, context_pool.values(pool.run(2, te_ranks.run, case, "all_gather")))


def test_heads_that_ranks_do_not_divide(pool: context_pool.Pool) -> None:
    outcomes = pool.run(2, te_ranks.run, TeCase(**DENSE, heads=(3, 3)), "a2a")
    (message,) = set(context_pool.failures(outcomes, anyattn.InvalidArgument))
    assert "3 query heads do not divide over the 2 ranks that share heads under cp_comm_type='a2a'" in message


def test_one_rank_is_no_context_parallelism(pool: context_pool.Pool) -> None:
    for both, plain in context_pool.values(pool.run(context_pool.WORKERS, te_ranks.alone)):
        assert torch.equal(both, plain.expand_as(both))


@pytest.mark.parametrize("comm", ["a2a", "p2p"])
def test_a_grid_of_one_row_is_a_simpler_scheme(pool: context_pool.Pool, comm: str) -> None:
    for grid, line in context_pool.values(pool.run(context_pool.WORKERS, te_ranks.halves, comm)):
        torch.testing.assert_close(grid, line)


@pytest.mark.parametrize("comm", ["p2p", "all_gather"])
def test_keys_in_several_parts(pool: context_pool.Pool, comm: str) -> None:
    """Every call of a kernel splits the keys it sees; the result is the same, but for rounding."""
    for found, asked in context_pool.values(pool.run(2, te_ranks.split, comm)):
        torch.testing.assert_close(found[:4], found[4:], rtol=0.02, atol=0.02)
        half = len(asked) // 2
        assert asked == [1] * half + [2] * half
        assert asked


def test_a_compiled_module_breaks_there(pool: context_pool.Pool) -> None:
    for compiled, plain in context_pool.values(pool.run(2, te_ranks.compiled)):
        assert torch.equal(compiled, plain)


# --- where rows lie, without processes ---


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("lengths", [(12, 24), (1, 0), (11, 13)])
def test_every_token_lies_where_its_chunk_does(ranks: int, lengths: tuple[int, ...]) -> None:
    rooms, start = [], 0
    for length in lengths:
        rooms.append(Room(start, 24, 24 - length if ranks == 3 else 0, length))
        start += 24
    found = _te_context.layout(tuple(rooms), ranks, start // ranks, CPLoadBalancingStrategy.DUAL_CHUNK_SWAP)
    held = torch.full((ranks, start // ranks, 2), -1)
    for rank, pieces in enumerate(found.pieces):
        rows = [(p.row, p.row + p.end - p.begin) for p in pieces]
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(rows))
        for document, begin, end, row in pieces:
            assert end > begin
            held[rank, row : row + end - begin, 0] = document
            held[rank, row : row + end - begin, 1] = torch.arange(begin, end)
    chunk = 24 // (2 * ranks)
    for number, room in enumerate(rooms):
        for at in range(24):
            place, slot = divmod(at, chunk)
            rank = min(place, 2 * ranks - 1 - place)
            row = number * 24 // ranks + (chunk if place >= ranks else 0) + slot
            token = at - room.first if 0 <= at - room.first < room.tokens else -1
            assert held[rank, row].tolist() == ([number, token] if token >= 0 else [-1, -1])


def test_chunks_that_follow_one_another_are_one_piece() -> None:
    found = _te_context.layout((Room(0, 16, 0, 16),), 2, 8, CPLoadBalancingStrategy.DUAL_CHUNK_SWAP)
    assert [len(pieces) for pieces in found.pieces] == [2, 1]


def test_a_batch_that_ranks_do_not_divide() -> None:
    rooms = (Room(0, 3, 0, 3), Room(3, 4, 0, 4))
    with pytest.raises(anyattn.PackingError, match="7 rows, padding included, which 2 ranks do not divide"):
        _te_context.layout(rooms, 2, 4, CPLoadBalancingStrategy.NO_LOAD_BALANCE)
