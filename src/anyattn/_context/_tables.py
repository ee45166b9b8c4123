"""A plan on a device: its entries as packings and its moves as row tables, uploaded once, in one copy.

Tables index rows. Those with several columns name, per row of the result, the rows whose sum it is; -1 is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn._context import _geometry, _indices
from anyattn._context._data import Capacity, Entry, KernelCall, Piece, RankPlan, Run, Stage
from anyattn._context._plan_data import PlanData
from anyattn._context._upload import Upload
from anyattn._packing import Packing


@dataclass(frozen=True, slots=True)
class CallTables:
    """One call of a kernel on a device."""

    call: KernelCall
    q: tuple[int, int]
    """Rows of the query shard that the kernel gets."""
    k: tuple[int, int]
    """Rows of the key buffer that it gets."""
    packing_q: Packing
    packing_k: Packing
    documents: Tensor
    """int32: the document of each sequence."""
    rows: Tensor
    """int32: the query shard's rows that the call computes, and in ``part_rows`` where they lie in what it returns."""
    part_rows: Tensor
    q_rows: Tensor
    """int32 (rows of the query shard, 1): where each lies in what the call returns."""
    fresh: bool
    """No call before has a query row of this one."""
    key_positions: tuple[int, int] | None = None
    """For terms over (seq_q, seq_k): the positions of the keys that the call sees."""
    even: int | None = None
    """So many sequences, all alike, fill both sides: tensors may be 4-D. None in plans that are not from a length."""
    serial: int = field(default_factory=count().__next__)
    """Tells it from all others: for what is settled once per call."""


@dataclass(frozen=True, slots=True)
class StageTables:
    """One stage on a device."""

    stage: Stage
    calls: tuple[CallTables, ...]
    send: Tensor
    """int32 (sent rows, 1): rows of the key shard, in the order in which they are sent to other ranks."""
    send_counts: tuple[int, ...]
    """By rank; to this one none: its own rows do not travel."""
    receive_counts: tuple[int, ...]
    order: Tensor | None
    """int32 (rows, 1): the key buffer's rows among those received, followed by the key shard."""
    back: Tensor
    """int32 (received rows, calls): per received row, its gradient among the calls' key rows."""
    kept: Tensor
    """int32 (own rows used, calls): the same for this rank's own rows."""
    home: Tensor
    """int32 (rows of the key shard, n): per own row, its gradient among the rows that come back and then those kept."""


@dataclass(frozen=True, slots=True)
class Tables:
    """A rank's part of a plan on a device."""

    stages: tuple[StageTables, ...]
    exclusive: bool
    direct: bool
    """One local call takes all rows as they are: nothing is moved, merged or put together."""
    rows_q: int
    rows_k: int
    apart: bool
    """Exclusive, and the calls' query rows do not interleave: each has a range of its own."""
    blank: Tensor
    """int32 (n,): query rows of no call, if so."""
    out: Tensor
    """int32 (rows_q, 1): per query row, where it lies among the parts of all calls, if exclusive."""
    apart_k: bool
    """The local calls' key rows do not interleave either, and at most one stage's gradients come back."""
    hull: tuple[int, int]
    """The range of key rows, if so, that local calls alone do not settle."""
    join: Tensor
    """int32 (rows of it, n): per row, itself where a local call has written it, and then, after so many, what comes
    back."""
    own: Tensor
    """int32 (rows_k, n): per own key row, its gradient among the local stage's calls' key rows. Like the next one, of
    no columns if ``apart_k``."""
    own_and_home: Tensor
    """int32 (rows_k, n): the same, after the rows that come back, where one stage's do."""
    padding: Tensor
    """int32 (rows_q,): 1 in rows that hold no token."""
    unseeing: Tensor
    """int32 (rows_q,): 1 in rows of no call, if ``direct``: what the kernel leaves there is anything. Empty where those
    are padding and stay so."""
    order_q: tuple[Tensor, Tensor] | None
    """int32 (united rows, 1) each: into order, and back; None where head ranks' rows are in order as they come."""
    order_k: tuple[Tensor, Tensor] | None
    alike: bool
    """Queries and keys have as many rows, and one order."""
    tensors: tuple[Tensor, ...] = ()
    """All of the above, in the order in which they were made: what is refilled."""

    @property
    def version(self) -> int:
        """Another number after each refill. Saved tensors do not tell: hooks may have put copies in their places."""
        return self.padding._version

    @property
    def local(self) -> tuple[StageTables, ...]:
        """Stages that need nothing from others."""
        return tuple(s for s in self.stages if s.stage.local)

    @property
    def remote(self) -> tuple[StageTables, ...]:
        """Stages that do."""
        return tuple(s for s in self.stages if not s.stage.local)


def build(data: PlanData, device: torch.device, *, alibi: bool, dense: bool) -> Tables:
    """Tables for a device.

    Args:
        data: the plan, for as many batch entries as the call has.
        device: where.
        alibi: keys in global order, nothing fused.
        dense: every entry a call of its own, for terms over (seq_q, seq_k).
    """
    plan = data.alibi_stages if alibi else data.stages
    queries, keys = data.inner
    rows_q, rows_k = queries.rows, keys.rows
    up = Upload()
    direct = _is_direct(plan) and not dense
    place = data.rank // data.topology.heads
    frame = _Frame(
        place,
        rows_q,
        rows_k,
        data,
        queries.pieces[place],
        dense,
        direct,
        torch.zeros(rows_q, dtype=torch.bool, device="cpu"),
    )
    stages = tuple(_stage(s, frame, up) for s in plan.stages)
    calls = [c for s in stages for c in s.calls]
    fixed = data.capacity is not None
    order_q, order_k = (_indices.order(runs, rows) for runs, rows in zip(data.order, (rows_q, rows_k), strict=True))
    apart = plan.exclusive and not fixed and _indices.are_apart([c.q for c in calls])
    ours = _of_own_keys(stages, rows_k, plan.exclusive, fixed)
    padding = _indices.padding(queries, data.rank // data.topology.heads)
    unseeing = (~_indices.used(rows_q, [c.rows for c in calls])).to(torch.int32)
    made = Tables(
        stages,
        plan.exclusive,
        direct,
        rows_q,
        rows_k,
        apart,
        up.add(_indices.unused(rows_q if apart else 0, [c.rows for c in calls])),
        up.add(
            _indices.table(
                rows_q, [c.rows for c in calls], [c.q[1] - c.q[0] for c in calls], [c.part_rows for c in calls]
            )[:, :1]
        ),
        ours.apart,
        ours.hull,
        up.add(ours.join),
        up.add(ours.own),
        up.add(ours.both),
        up.add(padding),
        up.add(unseeing if direct and (fixed or bool((unseeing > padding).any())) else unseeing[:0]),
        None if order_q is None else (up.add(order_q[0]), up.add(order_q[1])),
        None if order_k is None else (up.add(order_k[0]), up.add(order_k[1])),
        rows_q == rows_k and (data.keys is data.queries or (not fixed and data.order[0] == data.order[1])),
    )
    made, tensors = up.moved(made, device)
    return replace(made, tensors=tensors)


class _OwnKeys(NamedTuple):
    """Tables of what this rank's own keys get; those that are not used are empty."""

    apart: bool
    hull: tuple[int, int]
    join: Tensor
    own: Tensor
    both: Tensor


def _of_own_keys(stages: Sequence[StageTables], rows: int, exclusive: bool, fixed: bool) -> _OwnKeys:
    none = torch.empty(rows, 0, dtype=torch.int32, device="cpu")
    calls = [c for s in stages if s.stage.local for c in s.calls]
    remote = [s for s in stages if not s.stage.local]
    used, ranges = [_key_rows(c) for c in calls], [c.k for c in calls]
    if exclusive and not fixed and len(remote) <= 1 and _indices.are_apart(ranges):
        settled = _indices.used(rows, used)
        return _OwnKeys(True, *_indices.joined(settled, remote[0].home if remote else None), none, none)
    own = _indices.table(rows, used, ranges, fixed=fixed)
    if len(remote) != 1:
        return _OwnKeys(False, (0, 0), none, own, none)
    back = remote[0].send.shape[0] + remote[0].kept.shape[0]
    both = torch.cat([remote[0].home, *_indices.shifted(own, back)], 1)
    return _OwnKeys(False, (0, 0), none, own, both)


def refill(tables: Tables, other: Tables) -> None:
    """Copy another batch's tables of the same shapes over these; nothing waits."""
    for mine, theirs in zip(tables.tensors, other.tensors, strict=True):
        mine.copy_(theirs, non_blocking=True)
    for stage in tables.stages:
        for call in stage.calls:
            call.packing_q._set_rows()
            call.packing_k._set_rows()


def _is_direct(plan: RankPlan) -> bool:
    """Whether one local call is all there is; what it leaves out is padding."""
    return len(plan.stages) == 1 and plan.stages[0].local and len(plan.stages[0].calls) == 1


# --- one stage ---


@dataclass(frozen=True, slots=True)
class _Frame:
    """What all stages of a plan share."""

    place: int
    """This rank among the sequence ranks."""
    rows_q: int
    rows_k: int
    data: PlanData
    pieces: tuple[Piece, ...]
    """This rank's queries."""
    dense: bool
    direct: bool
    seen: Tensor
    """bool (rows_q,): query rows of the calls so far."""

    def take(self, rows: Tensor) -> bool:
        """Mark rows as seen; whether none was before."""
        index = rows.long()
        fresh = not bool(self.seen[index].any())
        self.seen[index] = True
        return fresh


def _stage(stage: Stage, frame: _Frame, up: Upload) -> StageTables:
    calls = stage.calls
    if frame.dense:
        calls = tuple(KernelCall(c.left, c.right, (e,), (d,)) for c in calls for e, d in _entries(c))
    rows_k = frame.rows_k
    size = rows_k if stage.local else stage.rows
    made = tuple(_call(c, frame, size, up) for c in calls)
    if stage.local:
        none = torch.empty(0, 1, dtype=torch.int32, device="cpu")
        home = none.new_empty(rows_k, 0)
        return StageTables(stage, made, up.add(none), (), (), None, up.add(none), up.add(none), up.add(home))
    fixed = frame.data.capacity is not None
    back = _indices.table(size, [_key_rows(c) for c in made], [c.k for c in made], fixed=fixed)
    order, back, kept = _own_apart(stage, frame.place, back)
    sent = [_indices.expand(runs if rank != frame.place else ()) for rank, runs in enumerate(stage.send)]
    counts = tuple(rows.numel() for rows in sent)
    own = _indices.expand(stage.send[frame.place])
    home = _indices.table(rows_k, [*sent, own], [*counts, own.numel()])
    return StageTables(
        stage,
        made,
        up.add(torch.cat(sent)[:, None]),
        counts,
        tuple(0 if rank == frame.place else n for rank, n in enumerate(stage.receive)),
        None if order is None else up.add(order[:, None]),
        up.add(back),
        up.add(kept),
        up.add(home),
    )


def _own_apart(stage: Stage, place: int, back: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """Order, back and kept of a stage; ``back`` is given by rows of the key buffer."""
    received, own = sum(stage.receive), stage.receive[place]
    begin = sum(stage.receive[:place])
    order = None if stage.order is None else _indices.expand(stage.order)
    if order is not None:
        # A gradient row of the buffer goes back to where the row came from.
        inverse = torch.full((received,), -1, dtype=torch.int32, device="cpu")
        inverse[order.long()] = torch.arange(order.numel(), dtype=torch.int32, device="cpu")
        back = torch.where(inverse[:, None] < 0, -1, back[inverse.long().clamp(min=0)])
    if not own:
        return order, back, back[:0]
    where = torch.arange(received, dtype=torch.int32, device="cpu")
    where[begin + own :] -= own
    where[begin : begin + own] = _indices.expand(stage.send[place]) + (received - own)
    order = where if order is None else where[order.long()]
    return order, torch.cat([back[:begin], back[begin + own :]]), back[begin : begin + own].contiguous()


def _entries(call: KernelCall) -> Iterable[tuple[Any, int]]:
    return zip(call.entries, call.documents, strict=True)


def _call(call: KernelCall, frame: _Frame, rows_k: int, up: Upload) -> CallTables:
    rows_q, sanitize, capacity = frame.rows_q, frame.data.sanitize, frame.data.capacity
    q, k = (0, rows_q), (0, rows_k)
    if not (frame.direct or capacity):
        q = _bounds([Run(e.q, e.len_q) for e in call.entries])
        k = _bounds([Run(e.k, e.len_k) for e in call.entries])
    rows = _indices.expand(Run(e.q, e.len_q) for e in call.entries)
    q_rows = torch.full((rows_q,), -1, dtype=torch.int32, device="cpu")
    q_rows[rows.long()] = rows - q[0]
    packing_q = up.packing(_packing([Run(e.q - q[0], e.len_q) for e in call.entries], q[1] - q[0], sanitize, capacity))
    packing_k = packing_q
    if q != k or any((e.q, e.len_q) != (e.k, e.len_k) for e in call.entries):
        runs = [Run(e.k - k[0], e.len_k) for e in call.entries]
        packing_k = up.packing(_packing(runs, k[1] - k[0], sanitize, capacity))
    return CallTables(
        call,
        q,
        k,
        packing_q,
        packing_k,
        up.add(_documents(call, capacity)),
        rows if capacity else up.add(rows),
        rows - q[0] if capacity else up.add(rows - q[0]),
        up.add(q_rows[:, None]),
        frame.take(rows),
        _key_positions(call.entries[0], frame) if frame.dense else None,
        _even(call.entries, q, k) if frame.data.memory_q.entries and not frame.dense else None,
    )


def _even(entries: Sequence[Entry], q: tuple[int, int], k: tuple[int, int]) -> int | None:
    """How many entries there are, if they are of one size and fill these rows."""
    count, (_, len_q, _, len_k) = len(entries), entries[0]
    alike = all(e == (q[0] + i * len_q, len_q, k[0] + i * len_k, len_k) for i, e in enumerate(entries))
    return count if alike and (q[1] - q[0], k[1] - k[0]) == (count * len_q, count * len_k) else None


def _key_positions(entry: Entry, frame: _Frame) -> tuple[int, int]:
    """The keys of a single entry, as positions in the document."""
    data = frame.data
    (piece,) = (p for p in frame.pieces if p.row <= entry.q < p.row + p.end - p.begin)
    begin = piece.begin + entry.q - piece.row
    len_q, len_k = (layout.lengths[piece.document] for layout in (data.queries, data.keys))
    return _geometry.needed(data.mask, len_q, len_k, begin, begin + entry.len_q)


def _bounds(runs: Sequence[Run]) -> tuple[int, int]:
    """First row, and the row after the last."""
    return runs[0].row, runs[-1].row + runs[-1].rows


def _documents(call: KernelCall, capacity: Capacity | None) -> Tensor:
    missing = capacity.sequences - len(call.documents) if capacity else 0
    return torch.tensor([*call.documents, *[0] * missing], dtype=torch.int32, device="cpu")


def _packing(runs: Sequence[Run], rows: int, sanitize: bool, capacity: Capacity | None) -> Packing:
    """Sequences at these runs; in a plan of fixed capacity, with empty ones up to it."""
    total, cu = 0, [0]
    for run in runs:
        total += run.rows
        cu.append(total)
    starts = [*(run.row for run in runs), rows]
    if capacity is None:
        both = torch.tensor([cu, starts], dtype=torch.int32, device="cpu")
        return Packing(both[0], both[1], rows=rows, sanitize=sanitize)
    missing = capacity.sequences - len(runs)
    both = torch.tensor([cu + cu[-1:] * missing, starts + starts[-1:] * missing], dtype=torch.int32, device="cpu")
    longest = min(rows, capacity.max_seqlen)
    return Packing(both[0], both[1], max_seqlen=longest, rows=rows, sanitize=sanitize, check=False)


def _key_rows(call: CallTables) -> Tensor:
    """The rows of the key buffer that a call uses."""
    return _indices.expand(Run(e.k, e.len_k) for e in call.call.entries)
