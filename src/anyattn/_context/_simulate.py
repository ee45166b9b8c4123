"""What plans would cost on machines that are not here: from the very plans, and the figures of ``_gpu``.

Exact are rows, pairs, documents, and what a single rank does (:func:`facts_of`, from its stages). Estimated are
seconds, and where they depend on all ranks, calls and bytes too (``_estimate``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from anyattn._context import _cost, _placement
from anyattn._context._data import Comm, KernelCall, Layout, Mask, Shape, Stage
from anyattn._context._estimate import Estimate
from anyattn._context._gpu import Gpu
from anyattn._context._heads import HeadShares
from anyattn._context._indices import are_apart
from anyattn._context._loads import loads
from anyattn._context._parallel import ContextParallel
from anyattn._context._plan import ContextPlan, normal_mask
from anyattn._context._plan_data import PlanData
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


# ---- memory

_MOST_UNITS = 16
_OF_MANY = 4


class Memory(NamedTuple):
    """Bytes held at once beside inputs, outputs and gradients of a call; without the kernel's own workspace."""

    keys: int = 0
    """Key buffers in use and on their way, and gradients of keys on their way."""
    results: int = 0
    """What kernels return and is not in its place yet, its sums in float32, and lse, kept for backward."""
    exchanged: int = 0
    """q, k, v, out and their gradients, where heads are exchanged."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.keys + self.results + self.exchanged


class _Flow(NamedTuple):
    """Rows of a stage: of the key buffer, of what travels, and of what the kernel calls return."""

    rows: int = 0
    received: int = 0
    sent: int = 0
    own: int = 0
    """Of this rank itself, in the key buffer."""
    ordered: bool = False
    """The key buffer is a copy of what was received."""
    q: int = 0
    k: int = 0


def _flow(stage: Stage, place: int) -> _Flow:
    own = stage.receive[place] if stage.receive else 0
    sent = sum(run.rows for rank, runs in enumerate(stage.send) if rank != place for run in runs)
    spans = [_spans(call) for call in stage.calls]
    q, k = (sum(end - begin for begin, end in side) for side in zip(*spans, strict=True)) if spans else (0, 0)
    return _Flow(stage.rows, sum(stage.receive) - own, sent, own, bool(own or stage.order), q, k)


def _spans(call: KernelCall) -> tuple[tuple[int, int], tuple[int, int]]:
    """The rows of queries and of keys that a kernel gets."""
    first, last = call.entries[0], call.entries[-1]
    return (first.q, last.q + last.len_q), (first.k, last.k + last.len_k)


@dataclass(frozen=True, slots=True)
class _Held:
    """What a rank's schedule holds, heads being exchanged already: the order of ``_schedule`` and ``_backward``.

    The most of a forward and of its backward, of results that are merged in float32 (``_Sums``, ``_Merged``), or of
    those that are put in their places (``_InPlace``, ``_Parts``, ``_Gathered``).
    """

    flows: tuple[_Flow, ...]
    """The local stage's, then those of remote ones."""
    groups: int
    keep: bool
    """Keys that are fetched stay for backward."""
    rows: tuple[int, int]
    """Of queries and keys."""
    widths: tuple[int, int, int]
    """Bytes of one group of heads in a row of queries, of keys and values, and of out."""
    wide: int
    """How many times as large as a result its sum is."""
    loose: tuple[bool, bool]
    """Kernels cannot write gradients of queries, and local ones those of keys, where they belong."""

    def merged(self) -> list[Memory]:
        """Both directions; in the first group of heads nothing of another one is under way, in the next all is."""
        (q, kv, out), (local, *remote) = self.widths, self.flows
        sums = self.wide * self.rows[0] * out
        kept = sum(flow.rows for flow in remote) * kv * self.groups if self.keep else 0
        travel = [(flow.received + flow.sent) * kv for flow in remote]
        again = travel[0] if remote and self.groups > 1 else 0
        earlier = kept * (self.groups - 1) // self.groups
        found = [
            Memory(max(travel[:1], default=0), sums + local.q * out),
            Memory(again + earlier, sums * min(2, self.groups) + local.q * out),
        ]
        sums = self.wide * (self.rows[0] * q + self.rows[1] * kv)
        before = 0
        for flow, following in zip(remote, (*travel[1:], again), strict=False):
            buffer = flow.rows * kv
            found.append(Memory(max(buffer, kept) + following, self.wide * self.rows[0] * out + flow.q * out))
            owing = flow.received * kv + max(before, (flow.sent + flow.own) * kv)
            held = kept if self.keep else buffer + following
            found.append(Memory(held + owing, sums + flow.q * q + flow.k * kv))
            before = (flow.received + flow.sent + flow.own) * kv
        held = before + (kept if self.keep else again)
        return [*found, Memory(held, sums + local.q * q + local.k * kv)]

    def placed(self) -> list[Memory]:
        """Both directions. There is one remote stage at most."""
        (q, kv, out), (local, far) = self.widths, (*self.flows, _Flow())[:2]
        kept = far.rows * kv * self.groups if self.keep else 0
        own = self.loose[0] * local.q * q + self.loose[1] * local.k * kv
        home = (far.sent + far.own) * kv
        found = []
        for group in range(self.groups):
            following = (far.received + far.sent) * kv if group + 1 < self.groups else 0
            outs = self.loose[0] * out * (self.groups * local.q + (group + 1) * far.q)
            arriving = (far.rows + far.ordered * far.received) * kv
            found.append(Memory(max(kept, arriving) + following, outs))
            held = kept if self.keep else far.rows * kv + following
            owing = far.received * kv + max(home + far.received * kv if group else 0, home)
            early, parts = (home * max(0, group - 1), group + 1) if self.keep else (0, 1)
            others = 0 if self.keep else own * (self.groups - 1)
            found.append(Memory(held + owing + early, others + (self.loose[0] * far.q * q) * parts + far.k * kv))
        whole = self.groups if self.keep else 1  # the local stage is one part then, and the last
        late = Memory(kept + home * whole + far.received * kv, (own + self.loose[0] * far.q * q) * whole)
        return [*found, late]


def memory_of(plan: ContextPlan, rank: int) -> Memory:
    """The most that a rank holds in a forward and its backward, with a kernel that writes results where it is told."""
    from anyattn._context import _door  # a mistake in arguments is told without it

    data, shape = plan._data, plan._data.shape
    members, place = data.topology.heads, rank // data.topology.heads
    share = HeadShares(members, shape.num_heads, shape.num_kv_heads)
    stages, both = data.stages_of(rank, alibi=False), shape.head_dim + shape.head_dim_v
    groups = 1 if members > 1 else _door._groups(plan, 1, *_tensors(shape))
    per_row = share.heads * shape.head_dim, share.slots * both, share.heads * shape.head_dim_v
    q, kv, out = (size * shape.itemsize for size in per_row)
    inner = data.inner[0].rows, data.inner[1].rows
    spans = [[_spans(call) for call in stage.calls] for stage in stages.stages]
    loose = not are_apart([s[0] for of in spans for s in of]), not are_apart([s[1] for s in spans[0]])
    held = _Held(
        tuple(_flow(stage, place) for stage in stages.stages), groups, _keeps(data), inner,
        (q // groups, kv // groups, out // groups), max(4, shape.itemsize) // shape.itemsize, loose,
    )  # fmt: skip
    lse = inner[0] * share.heads * 4
    direct = len(spans) == 1 and len(spans[0]) == 1  # one kernel call on all rows, as they are
    found = [Memory()] if direct else held.placed() if stages.exclusive else held.merged()
    found = [memory._replace(results=memory.results + lse) for memory in found]
    if members > 1:  # what is sent, what arrives, and a copy where rows are not in order
        copies = 2 + (data._united[0][1][place] is not None)
        inputs, answer = inner[0] * q + inner[1] * kv, inner[0] * out
        again = 0 if share.plain else data.keys.rows * shape.num_kv_heads * both * 4
        forward = copies * inputs + answer
        backward = inputs + answer + copies * answer + inputs + again
        found = [memory._replace(exchanged=max(forward, backward)) for memory in found]
        found += [Memory(0, lse, forward + (copies - 1) * answer), Memory(0, lse, backward + 2 * inputs)]
    return max(found, key=lambda memory: memory.total)


def _tensors(shape: Shape) -> list[torch.Tensor]:
    """q, k and v of a row, without values."""
    keys = shape.num_kv_heads
    sizes = (shape.num_heads, shape.head_dim), (keys, shape.head_dim), (keys, shape.head_dim_v)
    return [torch.empty(1, 1, heads, dim, device="meta") for heads, dim in sizes]


def most_memory(plan: ContextPlan) -> Memory:
    """That of the rank that holds most: of all up to 16, of more the busiest and those whose keys travel most."""
    data = plan._data
    members = data.topology.heads
    units = loads(data.queries, data.mask, members, _keys(data))
    looked_at = sorted(range(len(units)), key=lambda unit: -(units[unit].received + units[unit].sent))
    if len(units) > _MOST_UNITS:
        looked_at = looked_at[:_OF_MANY]
    found = (memory_of(plan, rank) for rank in {busiest(data), *(unit * members for unit in looked_at)})
    return max(found, key=lambda memory: memory.total)


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
    memory: Memory
    """Of the rank that holds most."""


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
        schemes[each] = Scheme(plan, estimate(data, gpu), facts_of(data, busiest(data), gpu), most_memory(plan))
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
    if machine.hierarchical and comm != "a2a+p2p":
        raise ContextError(
            f"--hierarchical divides the ranks in two dims, which --comm {comm} does not take: leave it out"
        )
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
