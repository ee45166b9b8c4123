"""A plan's stages: what arrives meets this rank's queries, while the next part travels. Forward; and for _backward too.

A *unit* is a stage for one group of key heads. While a unit computes, the next one's keys arrive; in backward the
remote units come first, and what they owe to other ranks travels while the rest computes. Nothing here knows a kernel,
and nothing a scheme: p2p, all_gather and halos differ in their stages alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn._context import _rows
from anyattn._context._exchange import Arrival, exchange
from anyattn._context._kernel import Kernel, Options, Terms
from anyattn._context._tables import CallTables, StageTables, Tables
from anyattn._preparation import Prepared

NEG_INF = float("-inf")


@dataclass(frozen=True, slots=True)
class Job:
    """One attention call over the sequence ranks."""

    tables: Tables
    options: Options
    group: Any
    """Connects the sequence ranks; None for one."""
    groups: int
    """In how many parts the keys of a stage travel."""
    halves: bool = False
    """Where results are not merged, the local stage is computed in two parts: what travels has both to hide behind."""
    head_start: int = 0
    """Cycles by which what travels is let begin before a kernel fills the GPU."""
    few: bool = False
    """Few keys are fetched: the local stage is one part. Alike with and without a backward, as all that numbers kernel
    calls must be: a forward that runs again, under activation checkpointing, drops what the first one dropped."""
    keep: bool = False
    """What arrives in forward is kept for backward, which then fetches nothing: few keys, and a backward follows."""
    dense: bool = False
    """Terms over (seq_q, seq_k): every call has 4-D tensors."""


class Heads(NamedTuple):
    """A group of heads: slices of the query heads and of the key heads."""

    q: slice
    k: slice


class Unit(NamedTuple):
    """A stage for one group of heads."""

    number: int
    """Of its first kernel call."""
    stage: StageTables
    group: int
    heads: Heads

    @property
    def local(self) -> bool:
        """Its keys are this rank's own."""
        return self.stage.stage.local


class Answer(NamedTuple):
    """What forward returns."""

    out: Tensor
    lse: Tensor
    rngs: tuple[Tensor | None, ...]
    """Per kernel call, in order: what backward needs to repeat dropout."""
    kernels: tuple[Prepared, ...]
    """Per kernel call: what ran, and what backward runs too."""
    keys: tuple[Tensor, ...] = ()
    """Keys and values of each remote unit, one after the other, where they are kept."""


def _split(heads: int, groups: int) -> list[slice]:
    size = heads // groups
    return [slice(i * size, (i + 1) * size) for i in range(groups)]


def head_groups(job: Job, q: Tensor, k: Tensor) -> list[Heads]:
    """The groups in which remote stages travel."""
    pairs = zip(_split(q.shape[1], job.groups), _split(k.shape[1], job.groups), strict=True)
    return [Heads(a, b) for a, b in pairs]


def units_of(job: Job, q: Tensor, k: Tensor, *, backward: bool = False) -> list[Unit]:
    """All units in the order in which they run; each direction's numbers of kernel calls are forward's.

    Where results are merged, a group of heads runs through all stages before the next one: accumulators in float32 are
    then needed for one group only. Elsewhere the local stage takes all heads at once, or in parts: in backward, keys
    arrive during the first, and the last group's gradients travel during the last. What is between runs early, so that
    a group's gradients are put together as they come. Where few keys are fetched, they are kept, and all of it has
    gradients to hide.
    """
    groups = list(enumerate(head_groups(job, q, k)))
    local, remote = job.tables.local, job.tables.remote
    if job.tables.exclusive:
        parts = [(stage, 0, heads) for stage in local for heads in _local_heads(job, q, k)]
        parts += [(stage, i, heads) for stage in remote for i, heads in groups]
    else:
        parts = [(stage, i, heads) for i, heads in groups for stage in (*local, *remote)]
    units, number = [], 0
    for stage, i, heads in parts:
        units.append(Unit(number, stage, i, heads))
        number += len(stage.calls)
    if not backward:
        return units
    if job.tables.exclusive:
        own, theirs = [u for u in units if u.local], [u for u in units if not u.local]
        early = 0 if job.few else len(own) - 1
        return own[: min(1, early)] + theirs[:1] + own[1:early] + theirs[1:] + own[early:]
    return [u for i, _ in groups for local in (False, True) for u in units if u.group == i and u.local == local]


def _local_heads(job: Job, q: Tensor, k: Tensor) -> list[Heads]:
    """The parts of the local stage: the heads that travel first, those between, and the last ones; or all at once."""
    parts = finest(job, q, k)
    if job.few or not job.tables.remote or len(parts) == 1:
        return [Heads(slice(0, q.shape[1]), slice(0, k.shape[1]))]
    first, last = parts[0], parts[-1]
    between = Heads(slice(first.q.stop, last.q.start), slice(first.k.stop, last.k.start))
    return [first, between, last] if len(parts) > 2 else [first, last]


def finest(job: Job, q: Tensor, k: Tensor) -> list[Heads]:
    """Groups of heads of which those of every unit are made, where results are not merged."""
    groups = max(job.groups, 2 if job.halves else 1)
    return [Heads(a, b) for a, b in zip(_split(q.shape[1], groups), _split(k.shape[1], groups), strict=True)]


# --- keys on their way ---


class Wire(NamedTuple):
    """Rows that hold the heads of k, then those of v."""

    rows: Tensor
    dim: int
    dim_v: int

    @staticmethod
    def empty(like: Tensor, count: int, heads: int, dim: int, dim_v: int) -> Wire:
        return Wire(like.new_empty(count, heads * (dim + dim_v)), dim, dim_v)

    @property
    def k(self) -> Tensor:
        heads = self.rows.shape[1] // (self.dim + self.dim_v)
        keys: Tensor = self.rows[:, : heads * self.dim].unflatten(1, (heads, self.dim))
        return keys

    @property
    def v(self) -> Tensor:
        heads = self.rows.shape[1] // (self.dim + self.dim_v)
        values: Tensor = self.rows[:, heads * self.dim :].unflatten(1, (heads, self.dim_v))
        return values


def _fetch(job: Job, unit: Unit, k: Tensor, v: Tensor) -> Arrival:
    """Send the rows of k and v that others need of this unit, and receive theirs."""
    stage, heads = unit.stage, unit.heads.k
    wire = Wire.empty(k, stage.send.shape[0], heads.stop - heads.start, k.shape[2], v.shape[2])
    _rows.sum_rows(wire.k, [k[:, heads]], stage.send)
    _rows.sum_rows(wire.v, [v[:, heads]], stage.send)
    return exchange(job.group, wire.rows, stage.send_counts, stage.receive_counts, head_start=job.head_start)


def _keys(unit: Unit, arrival: Arrival, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The key buffer of a unit: what has arrived, and what of this rank's own rows it needs too."""
    wire, order = Wire(arrival.wait(), k.shape[2], v.shape[2]), unit.stage.order
    if order is None:
        return wire.k, wire.v
    keys, values = (x.new_empty(order.shape[0], x.shape[1], x.shape[2]) for x in (wire.k, wire.v))
    _rows.sum_rows(keys, [wire.k, k[:, unit.heads.k]], order)
    _rows.sum_rows(values, [wire.v, v[:, unit.heads.k]], order)
    return keys, values


def with_keys(
    job: Job, units: list[Unit], k: Tensor, v: Tensor, kept: tuple[Tensor, ...] = ()
) -> Iterator[tuple[Unit, Tensor, Tensor]]:
    """Units with their key buffers. The first remote unit's keys set out at once, the next one's before one is used.

    Where they were ``kept``, in the order of remote units, which is that of both directions, nothing travels.
    """
    if kept:
        buffers = iter(kept)
        for unit in units:
            if unit.local:
                yield unit, k[:, unit.heads.k], v[:, unit.heads.k]
            else:
                yield unit, next(buffers), next(buffers)
        return
    waiting = [u for u in units if not u.local][::-1]
    arrival = _fetch(job, waiting.pop(), k, v) if waiting else None
    for unit in units:
        if unit.local:
            yield unit, k[:, unit.heads.k], v[:, unit.heads.k]
            continue
        assert arrival is not None
        following = _fetch(job, waiting.pop(), k, v) if waiting else None
        keys, values = _keys(unit, arrival, k, v)
        arrival = following
        yield unit, keys, values
        del keys, values


# --- the terms of one call ---


def kernel_of(job: Job, call: CallTables) -> Kernel:
    keys = None
    if job.dense:
        keys = call.key_positions
    return Kernel(call, job.options, not job.tables.direct, keys)


def terms_of(terms: Terms, heads: slice, number: int) -> Terms:
    """For a group of heads and one of the kernel calls."""
    cut = [None if x is None else (x[:, heads] if x.shape[1] > 1 else x) for x in (terms.bias, terms.mask)]
    alibi = None if terms.alibi is None else terms.alibi[..., heads]
    seed = None if terms.seed is None else terms.seed + number
    return Terms(alibi, cut[0], cut[1], seed)


# --- forward ---


def forward(job: Job, q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Answer:
    """Out (rows, heads, head_dim_v) and lse (heads, rows) of this rank's queries over all keys; padding is exact."""
    tables = job.tables
    if tables.direct:
        call = tables.stages[0].calls[0]
        p, (out, lse, rng, _) = kernel_of(job, call).run(q, k, v, terms_of(terms, slice(0, q.shape[1]), 0))
        assert lse is not None
        return Answer(out, lse, (rng,), (p,))
    into = _Sums(job, q, v) if not tables.exclusive else _InPlace(job, q, v) if tables.apart else _Parts(job, q, k, v)
    ran: list[tuple[Tensor | None, Prepared]] = []
    kept: list[Tensor] = []
    for unit, keys, values in with_keys(job, units_of(job, q, k), k, v):
        _compute(job, unit, q, keys, values, terms, into, ran)
        if job.keep and not unit.local:
            kept += keys, values
        del keys, values
    return Answer(*into.result(), tuple(rng for rng, _ in ran), tuple(p for _, p in ran), tuple(kept))


def _compute(
    job: Job, unit: Unit, q: Tensor, k: Tensor, v: Tensor, terms: Terms, into: _InPlace | _Parts | _Sums,
    ran: list[tuple[Tensor | None, Prepared]],
) -> None:  # fmt: skip
    """The calls of a unit; k and v are its key buffer."""
    for call in unit.stage.calls:
        (q0, q1), (k0, k1) = call.q, call.k
        mine = terms_of(terms, unit.heads.q, len(ran))
        own = q[q0:q1, unit.heads.q], k[k0:k1], v[k0:k1]
        p, (out, lse, rng, _) = kernel_of(job, call).run(*own, mine, into.place(unit, call))
        assert lse is not None
        ran.append((rng, p))
        into.add(unit, call, out, lse)


class _InPlace:
    """Results of calls whose rows do not interleave: each goes where it belongs, by the kernel itself if it can."""

    def __init__(self, job: Job, q: Tensor, v: Tensor) -> None:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        self._out = q.new_empty(*q.shape[:2], v.shape[2])
        self._lse = q.new_empty(q.shape[1], q.shape[0], dtype=wide)
        self._blank = job.tables.blank

    def place(self, unit: Unit, call: CallTables) -> Tensor:
        """Where out of a call is to be."""
        return self._out[call.q[0] : call.q[1], unit.heads.q]

    def add(self, unit: Unit, call: CallTables, out: Tensor, lse: Tensor) -> None:
        """Take a result."""
        settle(self.place(unit, call), out)
        self._lse[unit.heads.q, call.q[0] : call.q[1]] = lse

    def result(self) -> tuple[Tensor, Tensor]:
        """(out, lse); rows of no call are 0 and -inf."""
        if self._blank.shape[0]:
            rows = self._blank.long()
            self._out.index_fill_(0, rows, 0)
            self._lse.index_fill_(1, rows, NEG_INF)
        return self._out, self._lse


def settle(place: Tensor, result: Tensor) -> None:
    """Copy a result to its place, unless it is there already."""
    if place.data_ptr() != result.data_ptr():
        place.copy_(result)


class _Parts:
    """Results of calls that share no query row, though their rows interleave: put together at the end."""

    def __init__(self, job: Job, q: Tensor, k: Tensor, v: Tensor) -> None:
        self._groups = finest(job, q, k)
        self._outs: list[list[Tensor]] = [[] for _ in self._groups]
        self._lses: list[list[Tensor]] = [[] for _ in self._groups]
        self._tables, self._like = job.tables, q.new_empty(0, q.shape[1], v.shape[2])

    def place(self, unit: Unit, call: CallTables) -> None:
        """Anywhere."""

    def add(self, unit: Unit, call: CallTables, out: Tensor, lse: Tensor) -> None:
        """Keep a result, by groups of heads: a local one has several."""
        for i, heads in enumerate(self._groups):
            if (inner := within(heads, unit.heads)) is not None:
                self._outs[i].append(out[:, inner.q])
                self._lses[i].append(lse[inner.q])

    def result(self) -> tuple[Tensor, Tensor]:
        """(out, lse); rows of no call are 0 and -inf."""
        rows, like = self._tables.rows_q, self._like
        out = like.new_empty(rows, *like.shape[1:])
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        lse = like.new_empty(like.shape[1], rows, dtype=wide)
        for heads, outs, lses in zip(self._groups, self._outs, self._lses, strict=True):
            if not outs:
                out[:, heads.q], lse[heads.q] = 0, NEG_INF
                continue
            _rows.sum_rows(out[:, heads.q], fewer(outs), self._tables.out)
            lse[heads.q] = _columns(lses, self._tables.out[:, 0])
        return out, lse


def within(heads: Heads, outer: Heads) -> Heads | None:
    """A group of heads in the numbering of one that has it; None if it does not."""
    if not (outer.q.start <= heads.q.start and heads.q.stop <= outer.q.stop):
        return None
    q, k = outer.q.start, outer.k.start
    return Heads(slice(heads.q.start - q, heads.q.stop - q), slice(heads.k.start - k, heads.k.stop - k))


def fewer(sources: list[Tensor]) -> list[Tensor]:
    """As many sources as one launch takes."""
    return sources if len(sources) <= _rows.MAX_SOURCES else [torch.cat(sources)]


def _columns(parts: list[Tensor], index: Tensor) -> Tensor:
    """Columns of (heads, t) parts laid side by side, by index; -inf where it is -1."""
    whole = torch.cat([*parts, parts[0].new_full((parts[0].shape[0], 1), NEG_INF)], dim=1)
    return whole.index_select(1, torch.where(index < 0, whole.shape[1] - 1, index))


class _Sums:
    """Results of calls that share query rows: merged as they come, in float32, for one group of heads at a time."""

    def __init__(self, job: Job, q: Tensor, v: Tensor) -> None:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        rows, heads = job.tables.rows_q, q.shape[1]
        self._final = q.new_empty(rows, heads, v.shape[2])
        self._lse = q.new_full((heads, rows), NEG_INF, dtype=wide)
        self._heads, self._wide, self._last = slice(0, 0), wide, job.groups - 1
        self._out = q.new_empty(0, dtype=wide)

    def place(self, unit: Unit, call: CallTables) -> None:
        """Anywhere."""

    def add(self, unit: Unit, call: CallTables, out: Tensor, lse: Tensor) -> None:
        """Merge a result."""
        if unit.heads.q != self._heads:
            self._begin(unit.heads.q)
        mine = self._out, self._lse[self._heads]
        _rows.merge_rows(*mine, out, lse, call.rows, call.part_rows, fresh=call.fresh)

    def _begin(self, heads: slice) -> None:
        """Finish a group of heads, and start another."""
        self._finish()
        self._heads = heads
        rows, _, dim = self._final.shape
        self._out = self._final.new_zeros(rows, heads.stop - heads.start, dim, dtype=self._wide)

    def _finish(self) -> None:
        if self._heads.stop:
            self._final[:, self._heads] = self._out

    def result(self) -> tuple[Tensor, Tensor]:
        """(out, lse)."""
        self._finish()
        return (self._final if self._heads.stop else self._final.zero_()), self._lse
