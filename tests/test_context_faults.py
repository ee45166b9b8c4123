"""When a rank differs from the others, is slow, fails or dies: a clear end on all ranks, in bounded time."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import anyattn
import context_pool
import context_ranks
from anyattn import ContextError, ContextParallel, Packing
from anyattn._context import _agreement
from anyattn._context._topology import Members
from context_cases import ContextCase
from context_judge import judge
from context_pool import Mesh, Seat

#: Seconds that a collective of these tests waits for a rank.
TIMEOUT = 6.0
#: Seconds within which the others are back, however busy the machine is; torch's own groups wait for half an hour.
BOUND = 10 * TIMEOUT
COMMS = ("p2p", "all_gather", "a2a")


@pytest.fixture(scope="session")
def pool() -> context_pool.Pool:
    """Ranks."""
    return context_pool.shared()


@pytest.fixture
def mortal() -> Iterator[context_pool.Pool]:
    """Three ranks that wait for one another for a few seconds only; for this test alone."""
    pool = context_pool.Pool(3, timeout=TIMEOUT)
    pool.run(3, _warm)
    yield pool
    pool.close()


def _warm(seat: Seat) -> None:
    """Import what attention needs: ranks that wait for a few seconds begin together."""
    q = torch.zeros(1, 2, 2, 8)
    anyattn.attention(q, q, q)
    torch.distributed.barrier(group=seat.group)


# --- another plan --------------------------------------------------------------------------------------------------

PLAIN: dict[str, Any] = {"given": (9, 14, 0, 20), "comm": "all_gather", "num_heads": 6}
#: What one rank has otherwise: (what changes, the field that the error names).
DIFFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "lengths": ({"given": (9, 15, 0, 20)}, "lengths"),
    "one sequence more": ({"given": (9, 14, 0, 20, 3)}, "lengths"),
    "one empty sequence more": ({"given": (9, 14, 0, 20, 0)}, "lengths"),
    "causal": ({"causal": False}, "mask"),
    "window": ({"window": (7, 0)}, "mask"),
    "comm": ({"comm": "p2p"}, "comm"),
    "comm that exchanges heads": ({"comm": "a2a"}, "comm"),
    "placement": ({"placement": "zigzag"}, "placement"),
    "heads": ({"num_heads": 12}, "heads"),
    "rows": ({"pad_to_multiple_of": 8}, "rows"),
    "features": ({"features": ("sink",)}, "features"),
    "room in memory": ({"pad": 8}, "memory"),
    "keys": ({"keys": (9, 14, 1, 20)}, "key lengths"),
}


def plan_of(seat: Seat, given: tuple[int, ...], comm: str, pad: int = 1, keys: Any = None, **more: Any) -> Any:
    """A plan of these lengths."""
    packing = Packing.from_lengths(given, pad_to_multiple_of=pad)
    packing_kv = None if keys is None else Packing.from_lengths(keys)
    return ContextParallel(seat.group, comm=comm).plan(packing, packing_kv, **more)


def attend(plan: Any, heads: int) -> torch.Tensor:
    """Attention over any shards of a plan."""
    q, k = torch.randn(plan.rows, heads, 8), torch.randn(plan.kv.rows, heads, 8)
    out = anyattn.attention(q, k, k, plan=plan)
    assert isinstance(out, torch.Tensor)
    return out


def disagree(seat: Seat, odd: int, changes: dict[str, Any]) -> None:
    """Rank ``odd`` has another plan."""
    arguments = {**PLAIN, **(changes if seat.rank == odd else {})}
    attend(plan_of(seat, **arguments), arguments["num_heads"])


@pytest.mark.parametrize("name", DIFFERENCES)
def test_ranks_with_another_plan_are_named_with_the_field(pool: context_pool.Pool, name: str) -> None:
    changes, field = DIFFERENCES[name]
    messages = context_pool.failures(pool.run(3, disagree, 1, changes), ContextError)
    assert len(set(messages)) == 1
    assert field in messages[0]
    assert "ranks 1" in messages[0] or "rank 1" in messages[0]
    context_pool.values(pool.run(3, disagree, 9, {}))  # the group is as good as before


@pytest.mark.parametrize("odd", [0, 3])
def test_disagreement_on_a_mesh_of_two_dims(pool: context_pool.Pool, odd: int) -> None:
    changes = {"given": (9, 15, 0, 20), "comm": "a2a+p2p"}
    outcomes = pool.run(Mesh((2, 2), ("p2p", "a2a")), disagree_in_two_dims, odd, changes)
    messages = context_pool.failures(outcomes, ContextError)
    assert len(set(messages)) == 1
    assert "lengths" in messages[0]


def disagree_in_two_dims(seat: Seat, odd: int, changes: dict[str, Any]) -> None:
    """The same where heads are exchanged in one dim."""
    given = changes["given"] if seat.rank == odd else PLAIN["given"]
    attend(plan_of(seat, given, "a2a+p2p", num_heads=6), 6)


def unshard_first(seat: Seat) -> None:
    """The first use of a plan is not attention."""
    plan = plan_of(seat, (9, 14) if seat.rank else (9, 20), "all_gather")
    plan.unshard(torch.zeros(plan.rows, 2))


def test_a_plan_is_compared_where_it_is_first_used(pool: context_pool.Pool) -> None:
    messages = context_pool.failures(pool.run(3, unshard_first), ContextError)
    assert all("lengths" in m for m in messages)


def another_mask_later(seat: Seat) -> None:
    """Layers of another mask have a plan of their own."""
    plan = plan_of(seat, (9, 14), "p2p")
    attend(plan, 4)
    attend(plan.with_mask(causal=True, window=(3 + (seat.rank == 2), 0)), 4)


def test_a_plan_made_from_another_is_compared_too(pool: context_pool.Pool) -> None:
    messages = context_pool.failures(pool.run(3, another_mask_later), ContextError)
    assert all("mask" in m and "2" in m for m in messages)


def unlike_uses(seat: Seat, warm: bool) -> None:
    """One rank unshards where the others attend."""
    plan = plan_of(seat, (9, 14), "all_gather")
    if warm:
        plan.unshard(torch.zeros(plan.rows, 2))
        plan = plan.with_mask(causal=False)
    if seat.rank == 0:
        plan.unshard(torch.zeros(plan.rows, 2))
    else:
        attend(plan, 4)


@pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])
def test_ranks_that_do_different_things_hear_of_it(pool: context_pool.Pool, warm: bool) -> None:
    messages = context_pool.failures(pool.run(3, unlike_uses, warm), ContextError)
    assert all("what is done" in m and "0 against 1, 2" in m for m in messages)


def after_a_refill(seat: Seat) -> tuple[bool, bool]:
    """Packings that were the plan's are no longer known once either was refilled."""
    capacity = {"max_sequences": 3, "max_rows": 24, "max_seqlen": 20}
    first, second = (Packing.from_lengths(x, **capacity) for x in ([9, 14], [4, 4, 12]))
    cp = anyattn.ContextParallel(seat.group, comm="all_gather")
    plan, other = (cp.plan(x, num_heads=4) for x in (first, second))
    q = torch.zeros(plan.rows, 4, 8)

    def taken() -> bool:
        try:
            anyattn.attention(q, q, q, plan=plan, packing=first, backend="reference")
        except ContextError:
            return False
        return True

    before = taken()
    plan.copy_(other)
    return before, taken()


def test_packings_are_compared_anew_after_a_refill(pool: context_pool.Pool) -> None:
    assert context_pool.values(pool.run(2, after_a_refill)) == [(True, False)] * 2


# --- slow, failing and dying ranks ---------------------------------------------------------------------------------


def late(seat: Seat, case: ContextCase, seconds: float) -> context_ranks.Found:
    """One rank comes late."""
    if seat.rank == 1:
        time.sleep(seconds)
    return context_ranks.run(seat, case)


@pytest.mark.parametrize("comm", COMMS)
def test_a_slow_rank_is_waited_for(pool: context_pool.Pool, comm: str) -> None:
    case = ContextCase(comm=comm, ranks=3, heads="6/3", scores="sink")
    judge(case, context_pool.values(pool.run(3, late, case, 1.5)))


def step(seat: Seat, comm: str, fault: str) -> None:
    """A step goes well, and in the next one something happens to rank 1."""
    plan = plan_of(seat, (31, 14, 0, 20), comm)
    for number in range(2):
        q, k, v = (torch.randn(plan.rows, 6, 8, requires_grad=True) for _ in range(3))
        if number and seat.rank == 1 and fault != "backward":
            _happen(fault)
        out = anyattn.attention(q, k, v, plan=plan, backend="reference")
        assert isinstance(out, torch.Tensor)
        if number and seat.rank == 1 and fault == "backward":
            os._exit(9)
        out.sum().backward()


def _happen(fault: str) -> None:
    if fault == "exit":
        os._exit(9)
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    raise ValueError("this rank only")


@pytest.mark.parametrize("fault", ["exit", "stop", "raise", "backward"])
@pytest.mark.parametrize("comm", COMMS)
def test_a_rank_that_is_gone_ends_the_others_within_the_timeout(
    mortal: context_pool.Pool, comm: str, fault: str
) -> None:
    """Killed before or amid a step, stopped, or busy with an error of its own: nobody waits for half an hour."""
    outcomes = mortal.run(3, step, comm, fault, grace=BOUND, lost=[1] if fault == "stop" else [])
    for rank in (0, 2):
        failure = outcomes[rank].failure
        assert failure is not None
        assert failure.is_a(RuntimeError), failure.text
    gone = outcomes[1].failure
    assert gone is not None
    assert gone.is_a({"raise": ValueError, "stop": context_pool.Stuck}.get(fault, context_pool.Died))


def first_use(seat: Seat, comm: str) -> None:
    """A rank that never gets to its first use of the plan."""
    plan = plan_of(seat, (31, 14, 0, 20), comm)
    if seat.rank == 1:
        raise ValueError("this rank only")
    attend(plan, 6)


def test_a_rank_that_is_missing_when_plans_are_compared(mortal: context_pool.Pool) -> None:
    outcomes = mortal.run(3, first_use, "p2p", grace=BOUND)
    gone = outcomes[1].failure
    assert gone is not None
    assert gone.is_a(ValueError)
    for rank in (0, 2):
        failure = outcomes[rank].failure
        assert failure is not None
        assert failure.is_a(ContextError), failure.text
        named = re.match(r"rank 1 \(of the job: 1\) of a .* group of 3 did not answer within (\S+) s", failure.message)
        assert named, failure.message
        assert TIMEOUT <= float(named[1]) < 2 * TIMEOUT


def after_a_failed_comparison(seat: Seat) -> str:
    """Another plan, after a comparison has failed: by then some connections are closed."""
    first, second = (plan_of(seat, lengths, "p2p") for lengths in ((9, 14), (5, 8)))
    attend(first, 4)
    members = first._connected()
    assert members.groups is not None
    sides = _agreement._sides[members.groups[0]]
    kept, sides[members.ranks] = sides[members.ranks], _agreement.RanksMissing([1], members, 3.0)
    try:
        attend(second, 4)
    except ContextError as error:
        return str(error)
    finally:
        sides[members.ranks] = kept
    return ""


def test_a_comparison_after_a_failed_one_says_so(pool: context_pool.Pool) -> None:
    messages = context_pool.values(pool.run(2, after_a_failed_comparison))
    assert all("an earlier comparison failed: rank 1 (of the job: " in m for m in messages)


def first_use_of_the_dead(seat: Seat, odd: tuple[int, ...]) -> None:
    """Ranks that die before their first use of the plan."""
    plan = plan_of(seat, (31, 14, 0, 20), "all_gather")
    if seat.rank in odd:
        os._exit(9)
    attend(plan, 6)


def test_ranks_that_die_before_plans_are_compared(mortal: context_pool.Pool) -> None:
    outcomes = mortal.run(3, first_use_of_the_dead, (0, 2), grace=BOUND)
    failure = outcomes[1].failure
    assert failure is not None
    assert failure.is_a(ContextError), failure.text
    words = r"ranks 0 \(of the job: 0\), 2 \(of the job: 2\) of a .*: their connections closed after (\S+) s"
    named = re.match(words, failure.message)
    assert named, failure.message
    assert float(named[1]) < TIMEOUT
    assert "did not answer" not in failure.message


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        (
            {},
            "ranks 1 (of the job: 5), 2 (of the job: 6) of a context-parallel group of 3 did not answer within 6.0 s,",
        ),
        (
            {2: 0.04},
            "rank 1 (of the job: 5) of a context-parallel group of 3 did not answer within 6.0 s, and rank 2 (of the "
            "job: 6) ended or broke off: its connection closed after 0.0 s,",
        ),
    ],
    ids=["late", "late and gone"],
)
def test_late_ranks_and_gone_ones_are_told_apart(gone: dict[int, float], words: str) -> None:
    members = Members((3,), 0, (None,), torch.device("cpu"), (4, 5, 6))
    assert str(_agreement.RanksMissing([1, 2], members, 6.0, gone)).startswith(words)


# --- the pool itself -----------------------------------------------------------------------------------------------


def alone(seat: Seat) -> torch.Tensor:
    """A mistake in a test: one rank raises, the others wait."""
    x = torch.ones(1)
    if seat.rank == 1:
        raise ValueError("this rank only")
    torch.distributed.all_reduce(x, group=seat.group)
    return x


def test_the_pool_recovers() -> None:
    pool = context_pool.Pool(2, timeout=30)
    outcomes = pool.run(2, alone, grace=1.0)
    for outcome, kind in zip(outcomes, (context_pool.Stuck, ValueError), strict=True):
        assert outcome.failure is not None
        assert outcome.failure.is_a(kind)
    context_pool.values(pool.run(2, _warm))
    assert pool.started == 2
    pool.close()
