"""Ranks agree about a plan before anything travels, or all of them raise.

Plans are compared over a gloo group, made once beside the group they serve: a rank that holds another plan would
otherwise wait in a collective for data that never comes, or read other data than were sent.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from anyattn._context._plan_data import PlanData
from anyattn._context._topology import Members
from anyattn._errors import ContextError

_sides: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def side_group(members: Members) -> Any:
    """The gloo group of all members; made at the first call, in which all of them take part."""
    assert members.groups is not None
    first = members.groups[0]
    if first not in _sides:
        _sides[first] = {}
    found = _sides[first]
    if members.ranks not in found:
        plain = len(members.groups) == 1 and dist.get_backend(first) == "gloo"
        found[members.ranks] = first if plain else _new_group(members)
    return found[members.ranks]


def _new_group(members: Members) -> Any:
    return dist.new_group(
        sorted(members.ranks),
        timeout=_timeout(members),
        backend="gloo",
        use_local_synchronization=True,
        group_desc="anyattn plans",
    )


def _timeout(members: Members) -> Any:
    """The group's own timeout, None where it does not tell."""
    assert members.groups is not None
    options = getattr(members.groups[0]._get_backend(members.device), "options", None)
    return getattr(options, "_timeout", None)


def check(data: PlanData, members: Members) -> None:
    """Compare a plan on all ranks; a collective call on the host.

    Raises:
        ContextError: on every rank, naming the fields and the ranks that differ.
    """
    if members.groups is None or members.world == 1:
        return
    group = side_group(members)
    mine = data.fingerprint()
    numbers = torch.tensor(list(mine.values()), dtype=torch.int64)
    found = [torch.empty_like(numbers) for _ in range(members.world)]
    dist.all_gather(found, numbers, group=group)
    everyone = torch.stack(found)
    if (everyone == everyone[0]).all():
        return
    # In a group of its own, ranks are sorted by global rank.
    order = sorted(members.ranks) if group not in members.groups else list(members.ranks)
    place = {rank: members.ranks.index(rank) for rank in order}
    lines = []
    for column, name in enumerate(mine):
        values = everyone[:, column].tolist()
        usual = max(set(values), key=values.count)
        if len(set(values)) > 1:
            others = sorted(place[rank] for rank, value in zip(order, values, strict=True) if value != usual)
            lines.append(f"{name} (on ranks {', '.join(map(str, others))})")
    raise ContextError(
        f"the ranks of the context-parallel group hold different plans; they differ in {'; '.join(lines)}: make "
        "the plan from the same lengths and arguments on every rank"
    )
