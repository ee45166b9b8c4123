"""How long a plan takes, from what each rank computes and receives: enough to compare plans, not a promise.

Legend: a *unit* is a rank, or a group of ranks that share heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from anyattn._context._data import Comm, Layout, Mask, Shape
from anyattn._context._gpu import Gpu
from anyattn._context._loads import Load, imbalance, loads
from anyattn._context._scene import most_fetched

MERGE_BYTES = 10
"""Device memory traffic per element of out that a merge of two partial results touches."""
BACKWARD = 2.5
"""Backward's FLOPs, in forward's."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a plan costs on the rank that takes longest."""

    comm: Comm
    forward: float
    """Seconds."""
    backward: float
    bytes_forward: int
    """Received by the rank that receives most."""
    bytes_backward: int
    calls: int
    """Kernel calls of one forward."""
    groups: int
    """Into how many groups the kv heads are divided, so that one group's keys arrive while another's are computed."""
    imbalance: float
    """Largest area of a rank over the mean: pairs of a query and a key that sees it."""


class Heads(NamedTuple):
    """What one rank holds of a model's heads."""

    query: int
    key: int


def heads_of(shape: Shape, members: int) -> Heads:
    """Heads of one rank where so many share them; kv heads are repeated as far as its query heads need.

    Sizes may be assumed ones that the ranks do not divide: the largest share is taken.
    """
    query = -(-shape.num_heads // members)
    return Heads(query, query // math.gcd(query, shape.num_heads // shape.num_kv_heads))


def is_ring(comm: Comm, mask: Mask) -> bool:
    """Whether keys go round in stages; with a finite window a halo in global order is fetched instead."""
    return comm in ("p2p", "a2a+p2p") and mask.left is None and not mask.right


#: Key buffers are kept for backward up to this part of what autograd keeps of a rank's own rows.
KEPT = 1 / 3


def are_kept(fetched: int, rows: tuple[int, int], heads: tuple[int, int], dims: int) -> bool:
    """Whether backward finds the keys that forward fetched; alike on all ranks.

    Args:
        fetched: rows of the largest key buffers among the ranks.
        rows: of a rank's queries and keys.
        heads: of queries and keys.
        dims: head_dim and head_dim_v together.
    """
    own = sum(n * h for n, h in zip(rows, heads, strict=True)) * dims
    return fetched * heads[1] * dims <= KEPT * own


def quick(
    layout: Layout,
    mask: Mask,
    comm: Comm,
    shape: Shape,
    gpu: Gpu,
    *,
    members: int = 1,
    keys: Layout | None = None,
    keep: bool | None = None,
) -> Estimate:
    """Estimate from the pieces of all ranks.

    Args:
        layout: of all ranks.
        mask: which keys a query sees.
        comm: the scheme.
        shape: heads and dims.
        gpu: the figures.
        members: neighbouring ranks that share heads, under "a2a+p2p"; under "a2a" all do.
        keys: their layout, where it is not the queries'.
        keep: fetched keys are kept for backward; None: as a plan without ALiBi and of no fixed capacity does.
    """
    cost = timed(layout, mask, comm, shape, gpu, members=members, keys=keys, keep=keep)
    sharing = sharers(comm, layout.ranks, members)
    return Estimate(comm, *cost, imbalance=imbalance(layout, mask, sharing, keys))


def sharers(comm: Comm, ranks: int, members: int) -> int:
    """How many ranks share heads under a scheme."""
    return ranks if comm == "a2a" else members if comm == "a2a+p2p" else 1


def timed(
    layout: Layout, mask: Mask, comm: Comm, shape: Shape, gpu: Gpu, *, members: int = 1, keys: Layout | None = None,
    keep: bool | None = None,
) -> Cost:  # fmt: skip
    """Seconds and bytes of :func:`quick`; arguments as there."""
    members = sharers(comm, layout.ranks, members)
    others = layout if keys is None else keys
    united = members * layout.rows, members * others.rows
    if keep is None:
        keep = members == 1 and are_kept(
            most_fetched(layout, others, mask), (layout.rows, others.rows), (shape.num_heads, shape.num_kv_heads),
            shape.head_dim + shape.head_dim_v,
        )  # fmt: skip
    return weighed(loads(layout, mask, members, keys), united, members, comm, mask, shape, gpu, keep=keep)


def weighed(
    units: Sequence[Load], united: tuple[int, int], members: int, comm: Comm, mask: Mask, shape: Shape, gpu: Gpu,
    *, keep: bool = False,
) -> Cost:  # fmt: skip
    """Seconds and bytes from what each unit computes and receives.

    Args:
        units: all of them.
        united: rows of a unit, and rows of its keys: where heads are exchanged, padding travels too.
        members: ranks of a unit.
        comm: the scheme.
        mask: which keys a query sees.
        shape: heads and dims.
        gpu: the figures.
        keep: keys are kept for backward.
    """
    found = scheduled(units, is_ring(comm, mask), heads_of(shape, members), shape, gpu, keep=keep)
    return combined(found, _exchanged(*united, members, shape, gpu))


# ---- schedules


class Cost(NamedTuple):
    """Seconds and bytes of a part of a plan."""

    forward: float = 0.0
    backward: float = 0.0
    bytes_forward: int = 0
    bytes_backward: int = 0
    calls: int = 1
    groups: int = 1


def scheduled(units: Sequence[Load], ring: bool, heads: Heads, shape: Shape, gpu: Gpu, *, keep: bool = False) -> Cost:
    """What attention over the units costs, heads being exchanged already; ``keep``: keys are kept for backward."""
    row = heads.key * (shape.head_dim + shape.head_dim_v) * shape.itemsize
    received = max(unit.received for unit in units)
    calls = max(unit.calls + (unit.peers if ring else 0) for unit in units)
    moved = received * row, max((0 if keep else unit.received) + unit.sent for unit in units) * row
    groups = [1] if ring or not received else [g for g in (1, 2, 4, 8) if heads.key % g == 0]
    schedule = _ring if ring else _gather
    costs = []
    for g in groups:
        forward, backward = schedule(units, g, row, heads, shape, gpu, keep)
        host = calls * g * gpu.call
        costs.append(Cost(max(forward, host), max(backward, host), *moved, calls * g, g))
    return min(costs, key=lambda cost: cost.forward + cost.backward)


def combined(attention: Cost, exchange: Cost) -> Cost:
    """Attention between exchanges of heads."""
    return attention._replace(
        forward=attention.forward + exchange.forward,
        backward=attention.backward + exchange.backward,
        bytes_forward=attention.bytes_forward + exchange.bytes_forward,
        bytes_backward=attention.bytes_backward + exchange.bytes_backward,
    )


def _pair_seconds(heads: Heads, shape: Shape, gpu: Gpu) -> tuple[float, float]:
    """Seconds per tile pair, forward and backward."""
    flops = 2 * (shape.head_dim + shape.head_dim_v) * heads.query
    return flops / gpu.forward, BACKWARD * flops / gpu.backward


def _beside(compute: float, moving: float, gpu: Gpu) -> float:
    """Seconds of computing and moving at once."""
    return max(compute, moving) + gpu.contention * min(compute, moving)


def _gather(
    units: Sequence[Load], groups: int, row: int, heads: Heads, shape: Shape, gpu: Gpu, keep: bool
) -> tuple[float, float]:
    """Keys of one head group arrive while another's are computed; what needs none of them runs first, or last."""
    rows = max(max(unit.received, unit.sent) for unit in units)
    moving = gpu.seconds(gpu.all_gather, rows * row / groups)
    times = []
    for seconds, ways in zip(_pair_seconds(heads, shape, gpu), (1, 1 if keep else 2), strict=True):
        slowest = 0.0
        for unit in units:
            near, far = unit.whole * seconds, unit.cut * seconds / gpu.gathered / groups
            middle = (groups - 1) * _beside(far, ways * moving, gpu)
            first = moving if ways == 2 else 0.0
            slowest = max(slowest, first + _beside(near, moving, gpu) + middle + far)
        times.append(slowest)
    return times[0], times[1]


def _ring(
    units: Sequence[Load], groups: int, row: int, heads: Heads, shape: Shape, gpu: Gpu, keep: bool
) -> tuple[float, float]:
    """Keys of one unit arrive while another's are computed; own keys first, in backward last."""
    steps = max(unit.peers for unit in units)
    times: list[float] = []
    for seconds, ways in zip(_pair_seconds(heads, shape, gpu), (1, 1 if keep else 2), strict=True):
        slowest = 0.0
        for unit in units:
            stages = max(1, unit.peers)
            moving = gpu.seconds(gpu.ring, max(unit.received, unit.sent) * row / stages)
            near = (unit.whole + unit.cut * unit.here / gpu.circled) * seconds
            far = unit.cut * (1 - unit.here) / gpu.circled * seconds / stages
            if not times:  # forward
                far += unit.merged * heads.query * shape.head_dim_v * MERGE_BYTES / gpu.memory
            first = moving if ways == 2 else 0.0
            middle = (stages - 1) * _beside(far, ways * moving, gpu) + (steps - unit.peers) * gpu.exchange
            slowest = max(slowest, first + _beside(near, moving, gpu) + middle + far)
        times.append(slowest)
    return times[0], times[1]


def exchanged(layout: Layout, members: int, shape: Shape, gpu: Gpu, keys: Layout | None = None) -> Cost:
    """What exchanging heads for tokens costs, before and after attention: half of it is hidden, beside computing."""
    return _exchanged(members * layout.rows, members * (layout if keys is None else keys).rows, members, shape, gpu)


def _exchanged(rows: int, key_rows: int, members: int, shape: Shape, gpu: Gpu) -> Cost:
    if members == 1:
        return Cost()
    heads = heads_of(shape, members)
    own = rows // members
    own_keys = key_rows // members
    both = shape.head_dim + shape.head_dim_v
    others = shape.num_heads - heads.query
    forward = (
        (rows - own) * heads.query * shape.head_dim + (key_rows - own_keys) * heads.key * both,
        own * others * shape.head_dim_v,
    )
    backward = (
        (rows - own) * heads.query * shape.head_dim_v,
        own * others * shape.head_dim + own_keys * (members - 1) * heads.key * both,
    )
    shown = (1 + gpu.contention) / 2
    seconds = [
        shown * sum(gpu.seconds(gpu.all_to_all, part * shape.itemsize) for part in parts)
        for parts in (forward, backward)
    ]
    moved = [sum(parts) * shape.itemsize for parts in (forward, backward)]
    return Cost(seconds[0], seconds[1], moved[0], moved[1])
