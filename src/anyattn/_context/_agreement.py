"""Ranks agree about a plan before anything travels, or all of them raise.

Plans are compared over a gloo group, made once beside the group they serve: a rank that holds another plan would
otherwise wait in a collective for data that never comes, or read other data than were sent.
"""

from __future__ import annotations

import atexit
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from anyattn._context._plan_data import PlanData, number
from anyattn._context._topology import Members
from anyattn._errors import ContextError

#: How many values besides the plan's are compared, at most.
SLOTS = 16
_DONE = "what is done: a call of attention(plan=...), or another use of the plan"
#: Stands for what has not come.
_NOTHING = -(1 << 63)

#: By group and ranks: the group beside it, or why there is none any more.
_sides: WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = WeakKeyDictionary()
atexit.register(_sides.clear)  # gloo's threads end before the interpreter does
#: By ranks, how many were made in this process: part of their names, for groups come and go.
_made: Counter[tuple[int, ...]] = Counter()


def side_group(members: Members) -> Any:
    """A gloo group of all members; made at the first call, in which all of them take part.

    Raises:
        ContextError: a comparison over it has failed before.
    """
    assert members.groups is not None
    found = _sides.setdefault(members.groups[0], {})
    if members.ranks not in found:
        found[members.ranks] = _new_group(members)
    side = found[members.ranks]
    if isinstance(side, RanksMissing):
        raise ContextError(
            f"plans can no longer be compared in this group, for an earlier comparison failed: {side}. Start the "
            "processes anew, or make another group and another ContextParallel of it"
        )
    return side


def _new_group(members: Members) -> Any:
    """Made among the members alone.

    ``new_group`` either needs every rank of the job, or names the group by how many groups a rank knows, which differs
    between ranks in a job of many parts.
    """
    name = f"anyattn/{'_'.join(map(str, members.ranks))}/{_made[members.ranks]}"
    _made[members.ranks] += 1
    store = dist.distributed_c10d.PrefixStore(name, dist.distributed_c10d._get_default_store())
    return dist.ProcessGroupGloo(store, members.rank, members.world, _timeout(members))


def _timeout(members: Members) -> timedelta:
    """The group's own timeout."""
    assert members.groups is not None
    options = getattr(members.groups[0]._get_backend(members.device), "options", None)
    return getattr(options, "_timeout", None) or dist.distributed_c10d.default_pg_timeout


class RanksMissing(ContextError):
    """Ranks that did not take part in a comparison.

    Args:
        ranks: of the group.
        members: all that compare.
        seconds: how long they were waited for.
        gone: those whose connection closed, and after how many seconds.
    """

    def __init__(
        self, ranks: list[int], members: Members, seconds: float, gone: Mapping[int, float] | None = None
    ) -> None:
        self.ranks = ranks
        gone = gone or {}
        late = [rank for rank in ranks if rank not in gone]

        def named(which: Iterable[int]) -> str:
            names = [f"{rank} (of the job: {members.ranks[rank]})" for rank in sorted(which)]
            return f"rank{'s' if len(names) > 1 else ''} {', '.join(names)}"

        subject, what = named(late or gone), [f" did not answer within {seconds:.1f} s"] if late else []
        own = "their own" if len(ranks) > 1 else "its own"
        if gone:
            whose = "their connections" if len(gone) > 1 else "its connection"
            what.append(f", and {named(gone)}" if late else "")
            what.append(f" ended or broke off: {whose} closed after {max(gone.values()):.1f} s")
        super().__init__(
            f"{subject} of a context-parallel group of {members.world}"
            f"{''.join(what)}, when plans were compared before a first use: look for {own} error, or what kept it from "
            "the same call; all ranks of the group make the same calls in the same order. How long ranks wait is the "
            "timeout of the group that ContextParallel was given"
        )


def _listed(ranks: list[int]) -> str:
    """As in a sentence: rank 2, or ranks 1, 2."""
    return f"rank{'' if len(ranks) == 1 else 's'} {', '.join(map(str, ranks))}"


class OthersFailed(ContextError):
    """Other ranks cannot run a call that this one could."""

    def __init__(self, ranks: list[int], text: str) -> None:
        super().__init__(text)
        self.ranks = ranks


def _gathered(group: Any, members: Members, numbers: Tensor) -> Tensor:
    """The numbers of all ranks; each goes straight from rank to rank, so that it is known whose are missing.

    Raises:
        RanksMissing: some did not come within the group's timeout, or their ranks are gone.
    """
    begin = time.monotonic()
    limit = _timeout(members).total_seconds()
    everyone = torch.full((members.world, *numbers.shape), _NOTHING, dtype=numbers.dtype, device="cpu")
    everyone[members.rank] = numbers
    others = [rank for rank in range(members.world) if rank != members.rank]
    works: list[tuple[int, Any]] = []
    missing: dict[int, RuntimeError] = {}
    gone: dict[int, float] = {}

    def attempt(rank: int, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except RuntimeError as error:
            text = str(error).lower()
            if rank not in missing and "timed out" not in text and "timeout" not in text:  # gloo says so
                gone[rank] = time.monotonic() - begin
            missing.setdefault(rank, error)

    for rank in others:
        works.append((rank, attempt(rank, partial(group.recv, [everyone[rank]], rank, 0))))
    for rank in others:
        works.append((rank, attempt(rank, partial(group.send, [numbers], rank, 0))))
    for rank, work in works:
        left = timedelta(seconds=max(0.001, begin + limit - time.monotonic()))
        if work is not None:
            attempt(rank, partial(work.wait, left))
    if missing:
        waited = time.monotonic() - begin
        raise RanksMissing(sorted(missing), members, waited, gone) from next(iter(missing.values()))
    return everyone


def check(data: PlanData, members: Members, call: Mapping[str, object], failure: Exception | None) -> None:
    """Compare a plan and a call on all ranks, and hear whether all can go on; a collective call on the host.

    Raises:
        ContextError: on every rank, naming the fields and the ranks that differ, or the ranks that cannot go on.
        Exception: the failure, on the rank that has it.
    """
    if members.groups is None or members.world == 1:
        if failure is not None:
            raise failure
        return
    group = side_group(members)
    plan = data.fingerprint()
    assert len(call) <= SLOTS, sorted(call)
    # One length, whatever is done: a message of another would end the process.
    slots = [*call, *(f"nothing {i}" for i in range(SLOTS - len(call)))]
    values = {name: 0 if failure or name not in call else number(call[name]) for name in slots}
    mine = plan | {_DONE: number(tuple(call))} | values
    numbers = torch.tensor([*mine.values(), failure is not None], dtype=torch.int64, device="cpu")
    try:
        everyone = _gathered(group, members, numbers)
    except RanksMissing as error:
        assert members.groups is not None
        _sides[members.groups[0]][members.ranks] = error  # some connections are closed, and answers may be under way
        if failure is not None:  # the others, which made no such call, are not waited for
            raise failure from error
        raise
    if failure is not None:
        raise failure
    failed = everyone[:, -1].nonzero().flatten().tolist()
    if failed:
        say = "says" if len(failed) == 1 else "say"
        raise OthersFailed(
            failed,
            f"this call cannot run on {_listed(failed)} of the group, which {say} why; nothing has run here",
        )
    if (everyone == everyone[0]).all():
        return
    lines = [_line(name, everyone[:, i].tolist()) for i, name in enumerate(mine)]
    plans, calls = (
        "; ".join(line for line, name in zip(lines, mine, strict=True) if line and (name in plan) == of_plan)
        for of_plan in (True, False)
    )
    if plans:
        raise ContextError(
            f"the ranks of the group hold different plans, which differ in {plans}: make the plan from the same "
            "lengths and arguments on every rank"
        )
    raise ContextError(
        f"the ranks of the group make different calls, which differ in {calls}: call with tensors of one kind and the "
        "same arguments on every rank"
    )


def _line(name: str, values: list[int]) -> str:
    """A field in which ranks differ, with those that hold the same; empty if none does."""
    found: dict[int, list[int]] = {}
    for rank, value in enumerate(values):
        found.setdefault(value, []).append(rank)
    if len(found) == 1:
        return ""
    groups = sorted(found.values(), key=len)
    return f"{name} (ranks {' against '.join(', '.join(map(str, ranks)) for ranks in groups)})"
