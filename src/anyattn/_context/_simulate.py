"""What plans would cost on machines that are not here: from the very plans, and the figures of ``_gpu``.

Exact are rows, pairs, documents, and what a single rank does (:func:`facts_of`, from its stages). Estimated are
seconds, and where they depend on all ranks, calls and bytes too (``_estimate``).
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple

from anyattn._context import _cost, _placement
from anyattn._context._data import Comm, Layout, Mask, Shape
from anyattn._context._estimate import Estimate
from anyattn._context._gpu import Gpu
from anyattn._context._parallel import ContextParallel
from anyattn._context._plan import ContextPlan, normal_mask
from anyattn._context._plan_data import PlanData, check_features
from anyattn._errors import ContextError
from anyattn._packing import Packing

# ---- what one rank does


class RankFacts(NamedTuple):
    """What one rank owns, computes and receives, from its own stages."""

    rank: int
    tokens: int
    pairs: int
    """Of a query and a key that it sees, for each head of the model."""
    stages: int
    """In which it computes, sends or receives."""
    calls: int
    """Kernel calls of a forward, for one group of heads."""
    bytes_forward: int
    """Received."""
    bytes_backward: int
    forward: float
    """Seconds, estimated for this rank alone."""
    backward: float


def facts_of(data: PlanData, rank: int, gpu: Gpu) -> RankFacts:
    """The facts of any rank of a plan."""
    alibi = "alibi" in data.features
    stages = data.stages_of(rank, alibi=alibi)
    comm: Comm = "all_gather" if alibi else data.comm  # positions matter: keys lie in global order under every scheme
    cost = _cost.of_rank(
        stages, rank, data.queries, data.mask, comm, data.shape, gpu, members=data.topology.heads, keys=_keys(data),
        keep=_keeps(data),
    )  # fmt: skip
    active = sum(1 for s in stages.stages if s.calls or any(s.receive) or any(s.send))
    calls = sum(len(s.calls) for s in stages.stages)
    tokens = sum(p.end - p.begin for p in data.queries.pieces[rank])
    moved = cost.bytes_forward, cost.bytes_backward
    return RankFacts(rank, tokens, data.areas()[rank], active, calls, *moved, cost.forward, cost.backward)


def _keys(data: PlanData) -> Layout | None:
    return data.keys if data.cross else None


def _keeps(data: PlanData) -> bool:
    """Whether backward finds the keys of forward, for tensors of the shape that the plan was given."""
    shape = data.shape
    heads = shape.num_heads, shape.num_kv_heads
    return "alibi" not in data.features and data.keeps(heads, shape.head_dim + shape.head_dim_v)


def estimate(data: PlanData, gpu: Gpu) -> Estimate:
    """The plan as a whole: its slowest rank, and the one that receives most."""
    shared = data.topology.heads
    return _cost.quick(
        data.queries, data.mask, data.comm, data.shape, gpu, members=shared, keys=_keys(data), keep=_keeps(data)
    )  # fmt: skip


def busiest(data: PlanData) -> int:
    """The first of the ranks with most pairs."""
    areas = data.areas()
    return areas.index(max(areas))


def whole_and_cut(layout: Layout) -> tuple[int, int]:
    """How many documents lie whole on one rank, and how many are cut; empty ones are neither."""
    holders: dict[int, set[int]] = {}
    for rank, pieces in enumerate(layout.pieces):
        for piece in pieces:
            holders.setdefault(piece.document, set()).add(rank)
    cut = sum(1 for ranks in holders.values() if len(ranks) > 1)
    return len(holders) - cut, cut


# ---- what other schemes would do


def refusal(data: PlanData, comm: Comm) -> str:
    """Why a scheme cannot serve this batch on these ranks; empty if it can."""
    if comm == "a2a+p2p" and data.comm != comm:
        return "it needs ranks in two dims: a mesh of (p2p, a2a)"
    shared = {"a2a": data.topology.world, "a2a+p2p": data.topology.heads}.get(comm, 1)
    if data.shape.num_heads % shared:
        assumed = "" if data.given[0] is not None else " (assumed: num_heads= was not given)"
        return f"{data.shape.num_heads} query heads{assumed} do not divide over {shared} ranks"
    try:
        check_features(replace(data, comm=comm), frozenset(data.features))
    except ContextError as error:
        return str(error)
    return ""


def alternatives(data: PlanData, gpu: Gpu) -> tuple[dict[Comm, Estimate], dict[Comm, str]]:
    """Estimates of all schemes that can serve the batch, each with its best placement; and why others cannot."""
    reasons = {comm: refusal(data, comm) for comm in _cost.PREFERRED}
    refused = {comm: why for comm, why in reasons.items() if why and comm != data.comm}
    allowed = [comm for comm, why in reasons.items() if not why]
    if not allowed:  # this plan's own heads are assumed ones that its ranks do not divide
        return {}, refused
    choice = _cost.choose(
        data.queries.lengths, data.topology.world, data.mask, data.shape, gpu, allowed,
        members=data.topology.heads if data.comm == "a2a+p2p" else 1, keys=_keys(data),
    )  # fmt: skip
    return choice.estimates, refused


# ---- many ranks


@dataclass(frozen=True, slots=True)
class Machine:
    """Ranks, and what connects them."""

    ranks: int
    gpu: Gpu
    per_host: int = 8
    network: float = 50e9
    """Bytes per second that a GPU receives from other hosts."""
    hierarchical: bool = False
    """Ranks of a host share heads, hosts share the sequence."""

    @property
    def several_hosts(self) -> bool:
        """Whether anything travels between hosts."""
        return self.ranks > self.per_host

    def gpu_for(self, comm: Comm) -> Gpu:
        """The figures for a scheme: what travels between hosts, some of it or all, is as fast as the network."""
        if not self.several_hosts:
            return self.gpu
        slow = ((1.0, self.network),)
        across = replace(self.gpu, ring=slow, all_gather=slow)
        return across if comm == "a2a+p2p" else replace(across, all_to_all=slow)


@dataclass(frozen=True, slots=True)
class Batch:
    """What is asked of a plan."""

    lengths: tuple[int, ...]
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    shape: Shape = field(default_factory=Shape)
    placement: str = "auto"

    @property
    def mask(self) -> Mask:
        """Causality and window in one."""
        return normal_mask(self.causal, self.window, True)


@dataclass(frozen=True, slots=True)
class Scheme:
    """A plan under one scheme."""

    plan: ContextPlan
    estimate: Estimate
    busiest: RankFacts


@dataclass(frozen=True, slots=True)
class Simulation:
    """All schemes that were asked for."""

    schemes: dict[Comm, Scheme]
    refused: dict[Comm, str]
    chosen: Comm
    """The cheapest, forward and backward together."""
    auto: str
    """What ``ContextParallel(comm="auto")`` takes, deciding for the default GPU within a host; empty: not asked."""
    one_gpu: float
    """Seconds of forward and backward on one GPU."""

    def share(self, comm: Comm) -> float:
        """One GPU's time over all ranks' together: 1.0 is a perfect division."""
        scheme = self.schemes[comm]
        taken = scheme.estimate.forward + scheme.estimate.backward
        ranks = len(scheme.plan._data.queries.pieces)
        return self.one_gpu / ranks / taken if taken else 1.0


def simulate(batch: Batch, machine: Machine, comm: str = "auto") -> Simulation:
    """Plan a batch under one scheme or under all, and estimate each.

    Raises:
        ContextError: no scheme can serve it.
    """
    comms = _comms(machine, comm)
    schemes: dict[Comm, Scheme] = {}
    refused: dict[Comm, str] = {}
    packing = Packing.from_lengths(batch.lengths)
    for each in comms:
        try:
            plan = _plan(batch, machine, each, packing)
        except ContextError as error:
            if len(comms) == 1:
                raise
            refused[each] = str(error)
            continue
        data, gpu = plan._data, machine.gpu_for(each)
        schemes[each] = Scheme(plan, estimate(data, gpu), facts_of(data, busiest(data), gpu))
    if not schemes:
        raise ContextError("no scheme can serve this batch: " + "; ".join(sorted(set(refused.values()))))
    chosen = min(schemes, key=lambda c: schemes[c].estimate.forward + schemes[c].estimate.backward)
    return Simulation(schemes, refused, chosen, _auto(schemes, batch, machine, comm), _alone(batch, machine.gpu))


def _comms(machine: Machine, comm: str) -> tuple[Comm, ...]:
    """The schemes to plan, those that cost the same in the order in which they are preferred."""
    hosts = machine.ranks // machine.per_host
    if machine.hierarchical and machine.ranks % machine.per_host:
        fitting = " or ".join(str(n * machine.per_host) for n in (hosts, hosts + 1) if n)
        raise ContextError(
            f"--hierarchical divides the ranks into hosts: {machine.ranks} ranks are no multiple of --gpus-per-node "
            f"{machine.per_host}; use {fitting} ranks, or another --gpus-per-node"
        )
    named: tuple[Comm, ...] = tuple(c for c in _cost.PREFERRED if machine.hierarchical or c != "a2a+p2p")
    if comm == "auto":
        return named
    if comm == "a2a+p2p" and not machine.hierarchical:
        raise ContextError("--comm a2a+p2p needs --hierarchical: ranks of a host share heads, hosts the sequence")
    found = tuple(c for c in named if c == comm)
    if not found:
        raise ContextError(f"--comm must be one of auto, {', '.join(_cost.PREFERRED)}; got {comm!r}")
    return found


def _plan(batch: Batch, machine: Machine, comm: Comm, packing: Packing) -> ContextPlan:
    ranks: int | tuple[int, int] = machine.ranks
    if comm == "a2a+p2p":
        ranks = (machine.ranks // machine.per_host, machine.per_host)
    shape = batch.shape
    return ContextParallel((ranks, 0), comm=comm).plan(
        packing, causal=batch.causal, window=batch.window, num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim, head_dim_v=shape.head_dim_v,
        placement=batch.placement,
    )  # fmt: skip


def _auto(schemes: dict[Comm, Scheme], batch: Batch, machine: Machine, comm: str) -> str:
    if comm != "auto" or batch.placement != "auto":
        return ""
    if machine.hierarchical:
        return "a2a+p2p" if "a2a+p2p" in schemes else ""
    costs = {c: estimate(s.plan._data, _cost.default_gpu()) for c, s in schemes.items()}
    return min(costs, key=lambda c: costs[c].forward + costs[c].backward)


def _alone(batch: Batch, gpu: Gpu) -> float:
    """Seconds on one GPU."""
    layout = _placement.place(batch.lengths, 1, batch.mask)
    cost = _cost.quick(layout, batch.mask, "all_gather", batch.shape, gpu)
    return cost.forward + cost.backward


# ---- where a token lies


class Owners:
    """Documents, positions and ranks of the tokens of a batch, by their number in it."""

    def __init__(self, layout: Layout) -> None:
        self.lengths = layout.lengths
        self.starts = [0, *accumulate(layout.lengths)]
        spans = sorted((self.starts[d] + b, r) for r, own in enumerate(layout.pieces) for d, b, _, _ in own)
        self._begins, self._ranks = [b for b, _ in spans], [r for _, r in spans]

    def at(self, token: int) -> tuple[int, int, int]:
        """(document, position, rank)."""
        document = bisect_right(self.starts, token) - 1
        return document, token - self.starts[document], self._ranks[bisect_right(self._begins, token) - 1]


def sampled(data: PlanData, rows: int, columns: int) -> list[tuple[int, list[int | None]]]:
    """A coarse picture of which queries see which keys: per row the rank of its query, and the ranks of the keys seen.

    Looks at one token in the middle of each row and column; None: the query does not see that key.
    """
    queries = Owners(data.queries)
    keys = queries if data.keys is data.queries else Owners(data.keys)
    total_q, total_k = queries.starts[-1], keys.starts[-1]
    if not total_q or not total_k:
        return []
    ends = [keys.at((2 * c + 1) * total_k // (2 * columns)) for c in range(columns)]
    picture = []
    for r in range(rows):
        document, position, rank = queries.at((2 * r + 1) * total_q // (2 * rows))
        n, m = queries.lengths[document], keys.lengths[document]
        here = position + (0 if data.mask.top_left else m - n)
        cells = [owner if d == document and _sees(data.mask, k - here) else None for d, k, owner in ends]
        picture.append((rank, cells))
    return picture


def _sees(mask: Mask, distance: int) -> bool:
    """Whether a query sees a key at this distance from its own position."""
    return (mask.left is None or -distance <= mask.left) and (mask.right is None or distance <= mask.right)
