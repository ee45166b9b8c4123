"""What a plan costs, and which communication scheme is the cheapest for a batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from anyattn._context import _placement
from anyattn._context._data import Comm, KernelCall, Layout, Mask, RankPlan, Shape, Stage
from anyattn._context._estimate import (
    Estimate,
    combined,
    exchanged,
    heads_of,
    is_ring,
    quick,
    scheduled,
    sharers,
)
from anyattn._context._geometry import area
from anyattn._context._gpu import GPUS, Gpu, default_gpu
from anyattn._context._loads import Load, tile_pairs
from anyattn._context._search import Search
from anyattn._errors import ContextError

if TYPE_CHECKING:
    from anyattn._context._plan_data import PlanData

__all__ = ["GPUS", "Choice", "Estimate", "Gpu", "bytes_forward", "choose", "default_gpu", "of_rank", "quick"]

PREFERRED: tuple[Comm, ...] = ("all_gather", "a2a", "p2p", "a2a+p2p")
"""Of schemes that cost the same, the first is taken."""


class Choice(NamedTuple):
    """The cheapest scheme, and what each one would cost with its own best placement."""

    comm: Comm
    estimates: dict[Comm, Estimate]


def choose(
    lengths: Sequence[int],
    ranks: int,
    mask: Mask,
    shape: Shape,
    gpu: Gpu,
    allowed: Iterable[Comm],
    *,
    members: int = 1,
    keys: Layout | None = None,
    search: Search | None = None,
) -> Choice:
    """The scheme with the lowest estimate of forward and backward together.

    Args:
        lengths: tokens of each document.
        ranks: how many take part.
        mask: which keys a query sees.
        shape: heads and dims.
        gpu: the figures.
        allowed: the schemes to compare; "a2a" and "a2a+p2p" are left out where their ranks do not divide the heads.
        members: ranks that share heads under "a2a+p2p".
        keys: where the keys lie, if not with the queries.
        search: of this very batch and mask; what is found is kept there.

    Raises:
        ContextError: no scheme is left.
    """
    names = set(allowed)
    estimates: dict[Comm, Estimate] = {}
    search = search or Search(lengths, mask, None if keys is None else keys.lengths)
    for comm in PREFERRED:
        sharing = sharers(comm, ranks, members)
        if comm not in names or shape.num_heads % sharing or ranks % sharing:
            continue
        if keys is None:
            estimates[comm] = search.best(comm, ranks, shape, gpu, sharing).estimate(comm)
            continue
        layout = _placement.place(
            lengths, ranks, mask, members=sharing, shape=shape, comm=comm, gpu=gpu, lengths_k=keys.lengths,
            search=search,
        )  # fmt: skip
        estimates[comm] = quick(layout, mask, comm, shape, gpu, members=sharing, keys=keys)
    if not estimates:
        raise ContextError(
            f"no scheme among {sorted(names)} divides {shape.num_heads} query heads over {ranks} ranks: allow 'p2p' or "
            "'all_gather'"
        )
    best = min(estimates, key=lambda comm: estimates[comm].forward + estimates[comm].backward)
    return Choice(best, estimates)


def bytes_forward(data: PlanData) -> int:
    """Bytes that the rank that receives most receives in one forward of a plan."""
    keys = data.keys if data.cross else None
    heads = data.topology.heads
    return quick(data.queries, data.mask, data.comm, data.shape, default_gpu(), members=heads, keys=keys).bytes_forward


# ---- one rank, exactly


def of_rank(
    plan: RankPlan,
    rank: int,
    layout: Layout,
    mask: Mask,
    comm: Comm,
    shape: Shape,
    gpu: Gpu,
    *,
    members: int = 1,
    keys: Layout | None = None,
    keep: bool = False,
) -> Estimate:
    """Estimate for one rank from the very calls and rows of its stages.

    Args:
        plan: of the rank, or of its group where ranks share heads.
        rank: whose, in the layout of all ranks.
        layout: of all ranks.
        mask: which keys a query sees.
        comm: the scheme.
        shape: heads and dims.
        gpu: the figures.
        members: neighbouring ranks that share heads.
        keys: their layout, where it is not the queries'.
        keep: fetched keys are kept for backward.
    """
    unit = rank // members
    steps = [_step(stage, unit) for stage in plan.stages]
    near = [step for step, stage in zip(steps, plan.stages, strict=True) if stage.local]
    far = [step for step, stage in zip(steps, plan.stages, strict=True) if not stage.local]
    pairs = sum(step.pairs for step in far)
    ring = is_ring(comm, mask)
    peers = sum(1 for step in far if step.received or step.pairs)
    load = Load(
        whole=sum(step.pairs for step in near),
        cut=pairs,
        received=sum(step.received for step in far),
        sent=sum(step.sent for step in far),
        merged=sum(step.queries for step in far) // max(1, peers),
        peers=peers,
        calls=sum(step.calls for step in steps) - (peers if ring else 0),
    )
    cost = scheduled([load], ring, heads_of(shape, members), shape, gpu, keep=keep)
    cost = combined(cost, exchanged(layout, members, shape, gpu, keys))
    areas = sum(_area(call) for stage in plan.stages for call in stage.calls)
    lengths_k = layout.lengths if keys is None else keys.lengths
    total = sum(area(mask, n, m, 0, n) for n, m in zip(layout.lengths, lengths_k, strict=True))
    return Estimate(comm, *cost, imbalance=areas * (layout.ranks // members) / total if total else 1.0)


class _Step(NamedTuple):
    """What a rank does in one stage."""

    pairs: float
    received: int
    sent: int
    queries: int
    calls: int


def _step(stage: Stage, unit: int) -> _Step:
    received = sum(count for source, count in enumerate(stage.receive) if source != unit)
    sent = sum(run.rows for target, runs in enumerate(stage.send) if target != unit for run in runs)
    queries = sum(entry.len_q for call in stage.calls for entry in call.entries)
    pairs = sum(
        tile_pairs(Mask(call.left, call.right), e.len_q, e.len_k, 0, e.len_q)
        for call in stage.calls
        for e in call.entries
    )
    return _Step(pairs, received, sent, queries, len(stage.calls))


def _area(call: KernelCall) -> int:
    mask = Mask(call.left, call.right)
    return sum(area(mask, entry.len_q, entry.len_k, 0, entry.len_q) for entry in call.entries)
