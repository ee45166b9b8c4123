"""diffusers' ``enable_parallelism``, by anyattn's context parallelism.

diffusers gives every rank an equal, contiguous part of each entry: of one sequence, or of several (text and image) that
it joins afterwards. The whole sequence, for positions and masks, is the ranks' parts one after the other.

Legend: B batch, H heads; Q and K rows of this rank's queries and keys; R ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from anyattn._api import attention
from anyattn._context._data import Layout, Piece
from anyattn._context._parallel import ContextParallel
from anyattn._context._plan import ContextPlan
from anyattn._errors import AnyattnError, ContextError, ShapeError, Unsupported
from anyattn._packing import Packing
from anyattn._request import is_block_mask
from anyattn.integrations._diffusers_agreement import Hearing
from anyattn.integrations._diffusers_masks import Habits, Shape, as_four_dims, check_fits, keep, recalled

_PLANS = 256
_numbers = itertools.count()


class Team:
    """The ranks of one configuration of diffusers, and the plans made for them."""

    def __init__(self, config: Any) -> None:
        self.ring, self.ulysses = config.ring_degree, config.ulysses_degree
        self.mesh: DeviceMesh = config._flattened_mesh
        self._both: DeviceMesh = config._mesh["ring", "ulysses"]
        self._members: dict[str, ContextParallel] = {}
        self._plans: dict[Any, ContextPlan] = {}
        self.number = next(_numbers)
        """Among all teams of this process."""
        self.hearing = Hearing(self.mesh)
        self.looks = 0
        """At masks, by all ranks together."""

    @property
    def size(self) -> int:
        """How many ranks."""
        return self.mesh.size()

    @property
    def rank(self) -> int:
        """This one among them."""
        return self.mesh.get_local_rank()

    def comm(self, cross: bool) -> str:
        """The scheme without a mask. A ring takes keys of another length than the queries by gathering them."""
        if self.ring == 1:
            return "a2a"
        if cross:
            return "all_gather"
        return "p2p" if self.ulysses == 1 else "a2a+p2p"

    def plan(self, comm: str, queries: int, keys: int, **options: Any) -> ContextPlan:
        """A plan for sequences of these lengths, over all ranks; made once."""
        self._check_heads(comm, options["num_heads"])
        key = (comm, queries, keys, *options.items())
        if key not in self._plans:
            self._make_room()
            packing_kv = None if keys == queries else keys
            self._plans[key] = self._parallel(comm).plan(
                queries, packing_kv=packing_kv, placement="contiguous", **options
            )
        return self._plans[key]

    def plan_of_keys(
        self, comm: str, queries: tuple[int, int], counts: tuple[tuple[int, ...], ...], q: Tensor, k: Tensor, v: Tensor
    ) -> ContextPlan:
        """A plan for flattened entries whose keys are not all real.

        Args:
            comm: "all_gather" or "a2a".
            queries: entries, and rows of each that a rank holds.
            counts: real keys, by rank and entry; on a rank they follow one another.
            q: for the sizes of heads.
            k: the same.
            v: the same.
        """
        self._check_heads(comm, q.shape[2])
        key = (comm, queries, counts, q.shape[1:], k.shape[2:], v.shape[2:])
        if key not in self._plans:
            self._make_room()
            batch, rows = queries
            held = _layout([[rows] * batch] * self.size)
            keys = _layout(counts)
            if keys.rows == held.rows:  # an exchange of heads takes as many rows to lie alike
                keys = replace(keys, rows=keys.rows + 1)
            plan = self._parallel(comm).plan(
                Packing.from_lengths(held.lengths), packing_kv=Packing.from_lengths(keys.lengths), causal=False,
                placement="contiguous", num_heads=q.shape[2], num_kv_heads=k.shape[2], head_dim=q.shape[3],
                head_dim_v=v.shape[3],
            )  # fmt: skip
            self._plans[key] = ContextPlan(replace(plan._data, queries=held, keys=keys, cross=True), plan._members)
        return self._plans[key]

    def _check_heads(self, comm: str, heads: int) -> None:
        if "a2a" in comm and heads % self.ulysses:
            raise ContextError(
                f"{heads} query heads do not divide over ulysses_degree={self.ulysses}: take an ulysses_degree that "
                f"divides them and the rest as ring_degree, as ContextParallelConfig(ring_degree={self.size})"
            )

    def _make_room(self) -> None:
        if len(self._plans) >= _PLANS:  # alike on all ranks, which make the same calls
            self._plans.clear()

    def _parallel(self, comm: str) -> ContextParallel:
        if comm not in self._members:
            self._members[comm] = ContextParallel(self._named() if comm == "a2a+p2p" else self.mesh, comm=comm)
        return self._members[comm]

    def _named(self) -> DeviceMesh:
        """The same groups, under the names that ContextParallel knows."""
        mesh = self._both
        return DeviceMesh.from_group(
            [mesh.get_group("ring"), mesh.get_group("ulysses")], mesh.device_type, mesh=mesh.mesh,
            mesh_dim_names=("p2p", "a2a"),
        )  # fmt: skip


def _layout(counts: Sequence[Sequence[int]]) -> Layout:
    """Documents of which each rank holds so many tokens, by rank and document: documents in order, rank after rank."""
    ends = [0] * len(counts[0])
    shards = []
    for own in counts:
        pieces, row = [], 0
        for document, count in enumerate(own):
            if count:
                pieces.append(Piece(document, ends[document], ends[document] + count, row))
            ends[document] += count
            row += count
        shards.append(tuple(pieces))
    return Layout(tuple(ends), tuple(shards), max(map(sum, counts)))


_teams: Any = WeakIdKeyDictionary()


def team_of(config: Any) -> Team:
    """The team of a ContextParallelConfig, for as long as its mesh lives."""
    if config._flattened_mesh is None:
        raise Unsupported("the ContextParallelConfig was not set up: use model.enable_parallelism(config=...)")
    for name in ("ulysses_anything", "ring_anything"):
        if getattr(config, name, False):
            raise Unsupported(
                f"anyattn does not take {name}=True, under which ranks hold parts of different length: pad the "
                f"sequences to a multiple of the {config._flattened_mesh.size()} ranks, hide the padding with an "
                "attn_mask, and leave it out"
            )
    found = _teams.get(config)
    if found is None:
        found = _teams[config] = Team(config)
    return found  # type: ignore[no-any-return]


class Real(NamedTuple):
    """Which keys are real, of all ranks."""

    counts: tuple[tuple[int, ...], ...]
    """By rank and entry."""
    rows: Tensor
    """int64: rows of this rank's flattened keys."""


class Hidden(NamedTuple):
    """What a mask hides, under context parallelism; holds nothing of the mask itself."""

    anything: bool
    gathered: Tensor | None = None
    """The mask over all keys, where ranks hold theirs."""
    real: Real | None = None
    """Where the mask says no more than which keys are real."""
    look: int = 0
    """The number of the look by which all ranks found this."""


@torch._dynamo.disable(  # type: ignore[untyped-decorator]
    reason="attention over several ranks communicates, which is not for the compiler: leave out fullgraph=True"
)
def parallel_attention(
    config: Any, qkv: tuple[Tensor, Tensor, Tensor], mask: Any, causal: Any, window: Any, habits: Habits,
    options: dict[str, Any],
) -> Any:  # fmt: skip
    """This rank's queries by all ranks' keys.

    Args:
        config: diffusers' ContextParallelConfig, set up.
        qkv: this rank's parts, (batch, rows, heads, dim).
        mask: of this rank's keys, (B, K) or (B, 1, 1, K), or of all keys, (..., 1 or Q or R * Q, R * K).
        causal: as ``attention``.
        window: as ``attention``.
        habits: what is done with masks.
        options: other arguments of ``attention``.
    """
    q, k, v = qkv
    team = team_of(config)
    shape = Shape(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    term, real = _term(team, mask, shape, habits)
    if real is not None and not causal and window is None:
        return _by_real_keys(team, qkv, real, options)
    queries, keys = shape.queries * team.size, shape.keys * team.size
    comm = "all_gather" if term is not None else team.comm(queries != keys)
    plan = team.plan(
        comm, queries, keys, causal=causal, window=window, num_heads=q.shape[2], num_kv_heads=k.shape[2],
        head_dim=q.shape[3], head_dim_v=v.shape[3],
    )  # fmt: skip
    if term is not None:
        options = options | {"mask" if term.dtype == torch.bool else "bias": term}
    return attention(q, k, v, plan=plan, **options)


def _by_real_keys(team: Team, qkv: tuple[Tensor, Tensor, Tensor], real: Real, options: dict[str, Any]) -> Any:
    """All queries by the real keys, which alone travel: every entry is a sequence, whose keys are fewer."""
    q, k, v = qkv
    batch, queries = q.shape[:2]
    plan = team.plan_of_keys("a2a" if team.ring == 1 else "all_gather", (batch, queries), real.counts, q, k, v)
    room = plan.kv.rows - real.rows.numel()
    k, v = (F.pad(x.flatten(0, 1).index_select(0, real.rows), (0, 0, 0, 0, 0, room)) for x in (k, v))
    got = attention(q.flatten(0, 1), k, v, plan=plan, **options)
    if not options["return_lse"]:
        return got.unflatten(0, (batch, queries))
    out, lse = got
    return out.unflatten(0, (batch, queries)), lse.unflatten(1, (batch, queries)).transpose(0, 1)


def _term(team: Team, mask: Any, shape: Shape, habits: Habits) -> tuple[Tensor | None, Real | None]:
    """This rank's rows of a mask, by all keys, None if it hides nothing on any rank; and which keys are real."""
    given, failure = None, None
    try:
        given = None if mask is None else _given(team, mask, shape)
    except AnyattnError as error:  # the others must hear of it
        failure = error
    if given is None:
        team.hearing.same(None, 0, failure)
        return None, None
    whole = given.whole
    read = habits.read and not whole.requires_grad
    key = ("ranks", shape, team.number)
    hidden: Hidden | None = recalled(whole, key) if read else None
    form = (tuple(whole.shape), str(whole.dtype), whole.requires_grad, *habits)
    same = team.hearing.same(form, hidden.look if hidden else 0, None)
    if read and (hidden is None or not same):
        team.looks += 1
        with torch.inference_mode(False):  # what is made in validation serves training too
            hidden = _look(team, whole, shape, given.local)._replace(look=team.looks)
        keep(whole, key, hidden)
    if hidden is not None and not hidden.anything:
        return None, None
    gathered = hidden.gathered if hidden is not None else _gathered(team, whole) if given.local else None
    real = None if hidden is None else hidden.real
    if gathered is not None:
        return gathered, real
    if not habits.whole and (whole.shape[3] == shape.keys * team.size or (given.every_row and whole.shape[2] != 1)):
        raise Unsupported(
            f"attn_mask is over the {shape.keys * team.size} keys of all ranks, and nothing says in which order: where "
            "text and image are divided apart and joined afterwards, it is not that of the undivided sequence. Pass "
            f"every rank the part of its own {shape.keys} keys; or, where the mask takes the ranks' parts one after "
            "the other (as for a sequence that is divided as one), register(..., whole_masks=True)"
        )
    if given.every_row and whole.shape[2] != 1:
        whole = whole.narrow(2, team.rank * shape.queries, shape.queries)
    return whole, real


class Given(NamedTuple):
    """A mask of a call, found to fit."""

    whole: Tensor
    """4-D."""
    local: bool
    """It is over this rank's keys."""
    every_row: bool
    """It is over the queries of all ranks."""


def _given(team: Team, mask: Any, shape: Shape) -> Given:
    if is_block_mask(mask):
        raise Unsupported(
            "a BlockMask does not go with context parallelism: pass a tensor over all keys, or do not enable "
            "parallelism for this model"
        )
    everyone = shape.keys * team.size
    whole = as_four_dims(mask, shape.batch, (shape.keys, everyone))
    local = whole.shape[3] == shape.keys != everyone
    rows = whole.shape[2]
    if local and rows != 1:
        raise ShapeError(
            f"attn_mask has {rows} rows by this rank's {shape.keys} keys, which does not say what its queries see of "
            f"the other ranks' keys: pass it over all {everyone} keys, or with one row"
        )
    every_row = rows == shape.queries * team.size
    queries = rows if every_row else shape.queries
    check_fits(whole, shape._replace(queries=queries, keys=shape.keys if local else everyone))
    if local and whole.requires_grad:
        raise Unsupported(
            "an attn_mask of this rank's keys that needs a gradient would have to be gathered, and the gradient "
            f"scattered: pass it over all {everyone} keys, or detach it"
        )
    return Given(whole, local, every_row)


def _look(team: Team, whole: Tensor, shape: Shape, local: bool) -> Hidden:
    """What a mask hides on any rank, which all of them find alike."""
    additive = whole.dtype != torch.bool
    shown = (whole == 0) if additive else whole
    exact = (shown | (whole == -torch.inf)).all() if additive else torch.ones_like(shown.all())
    if not whole.shape[1] == whole.shape[2] == 1:
        hides = shown.all().logical_not().to(torch.int32)
        dist.all_reduce(hides, op=dist.ReduceOp.MAX, group=team.mesh.get_group())
        anything = bool(hides)  # the one copy
        return Hidden(anything, _gathered(team, whole) if local and anything else None)
    real = shown[:, 0, 0]
    if not local:
        real = real.expand(-1, shape.keys * team.size).narrow(1, team.rank * shape.keys, shape.keys)
    real = real.expand(shape.batch, shape.keys)
    mine = torch.cat([exact.reshape(1), real.flatten()]).to(torch.uint8)
    found = torch.stack(_of_all(team, mine)).cpu()  # the one copy
    if bool(found.all()):
        return Hidden(False)
    gathered = _gathered(team, whole) if local else None
    if not bool(found[:, 0].all()):
        return Hidden(True, gathered)
    by_rank = found[:, 1:].view(team.size, shape.batch, shape.keys)
    if not bool(by_rank.any()):
        return Hidden(True, gathered)
    counts = tuple(tuple(row) for row in by_rank.sum(2, dtype=torch.int64).tolist())
    index = by_rank[team.rank].flatten().nonzero().flatten().to(whole.device)
    return Hidden(True, gathered, Real(counts, index))


def _of_all(team: Team, mine: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(mine) for _ in range(team.size)]
    dist.all_gather(parts, mine, group=team.mesh.get_group())
    return parts


def _gathered(team: Team, whole: Tensor) -> Tensor:
    """All ranks' keys of a mask, in the order of the ranks."""
    mine = (whole.to(torch.uint8) if whole.dtype == torch.bool else whole).contiguous()
    return torch.cat(_of_all(team, mine), dim=-1).to(whole.dtype)
