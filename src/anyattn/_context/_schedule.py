"""Forward and backward of a plan's stages: what arrives meets this rank's queries, while the next part travels.

A *unit* is a stage for one group of key heads. While a unit computes, the next one's keys arrive; in backward the
remote units come first, and what they owe to other ranks travels while the rest computes. Nothing here knows a kernel,
and nothing a scheme: p2p, all_gather and halos differ in their stages alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn._call import Saved
from anyattn._context import _rows
from anyattn._context._exchange import Arrival, exchange
from anyattn._context._kernel import Kernel, Options, Terms
from anyattn._context._tables import CallTables, StageTables, Tables

NEG_INF = float("-inf")


@dataclass(frozen=True, slots=True)
class Job:
    """One attention call over the sequence ranks."""

    tables: Tables
    options: Options
    group: Any
    """Connects the sequence ranks; None for one."""
    head_groups: int
    """In how many parts the keys of a stage travel."""
    dense: bool = False
    """Terms over (seq_q, seq_k): every call has 4-D tensors."""


class Heads(NamedTuple):
    """A group of heads: slices of the query heads and of the key heads."""

    q: slice
    k: slice


class Unit(NamedTuple):
    """A stage for one group of heads."""

    number: int
    """Among the remote units, from 0; -1 for a local one."""
    stage: StageTables
    group: int
    heads: Heads


class Answer(NamedTuple):
    """What forward returns."""

    out: Tensor
    lse: Tensor
    rngs: tuple[Tensor | None, ...]
    """Per kernel call, in order: what backward needs to repeat dropout."""


class Gradients(NamedTuple):
    """What backward returns."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None


def _split(heads: int, groups: int) -> list[slice]:
    size = heads // groups
    return [slice(i * size, (i + 1) * size) for i in range(groups)]


def _head_groups(job: Job, q: Tensor, k: Tensor) -> list[Heads]:
    """The groups in which remote stages travel."""
    pairs = zip(_split(q.shape[1], job.head_groups), _split(k.shape[1], job.head_groups), strict=True)
    return [Heads(a, b) for a, b in pairs]


def _remote_units(job: Job, q: Tensor, k: Tensor) -> list[Unit]:
    groups = _head_groups(job, q, k)
    pairs = [(stage, i, heads) for stage in job.tables.remote for i, heads in enumerate(groups)]
    return [Unit(n, *pair) for n, pair in enumerate(pairs)]


def _local_units(job: Job, q: Tensor, k: Tensor) -> list[Unit]:
    whole = Heads(slice(0, q.shape[1]), slice(0, k.shape[1]))
    return [Unit(-1, stage, 0, whole) for stage in job.tables.local]


# --- keys on their way ---


class _Wire(NamedTuple):
    """Rows that hold the heads of k, then those of v."""

    rows: Tensor
    dim: int
    dim_v: int

    @staticmethod
    def empty(like: Tensor, count: int, heads: int, dim: int, dim_v: int) -> _Wire:
        return _Wire(like.new_empty(count, heads * (dim + dim_v)), dim, dim_v)

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
    wire = _Wire.empty(k, stage.send.shape[0], heads.stop - heads.start, k.shape[2], v.shape[2])
    _rows.sum_rows(wire.k, [k[:, heads]], stage.send)
    _rows.sum_rows(wire.v, [v[:, heads]], stage.send)
    return exchange(job.group, wire.rows, stage.send_counts, stage.stage.receive)


def _keys(unit: Unit, arrival: Arrival, dim: int, dim_v: int) -> tuple[Tensor, Tensor]:
    """The key buffer of a unit."""
    rows = arrival.wait()
    if unit.stage.order is not None:
        ordered = rows.new_empty(unit.stage.order.shape[0], rows.shape[1])
        _rows.sum_rows(ordered, [rows], unit.stage.order)
        rows = ordered
    wire = _Wire(rows, dim, dim_v)
    return wire.k, wire.v


def _pipelined(job: Job, units: list[Unit], k: Tensor, v: Tensor) -> Any:
    """Units with their keys; the next unit's are on their way while one is used."""
    arrival = _fetch(job, units[0], k, v) if units else None
    yield None  # the first is on its way
    for i, unit in enumerate(units):
        following = _fetch(job, units[i + 1], k, v) if i + 1 < len(units) else None
        assert arrival is not None
        yield unit, *_keys(unit, arrival, k.shape[2], v.shape[2])
        arrival = following


# --- the terms of one call ---


def _kernel(job: Job, call: CallTables) -> Kernel:
    keys = None
    if job.dense:
        keys = call.key_positions
    return Kernel(call, job.options, not job.tables.direct, keys)


def _terms(terms: Terms, heads: slice, number: int) -> Terms:
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
        out, lse, rng, _ = _kernel(job, call).run(q, k, v, _terms(terms, slice(0, q.shape[1]), 0))
        assert lse is not None
        return Answer(out, lse, (rng,))
    into: _Parts | _Sums = _Parts(job, q, k, v) if tables.exclusive else _Sums(job, q, v)
    rngs: list[Tensor | None] = []
    arriving = _pipelined(job, _remote_units(job, q, k), k, v)
    next(arriving)
    for unit in _local_units(job, q, k):
        _compute(job, unit, q, k, v, terms, into, rngs)
    for unit, keys, values in arriving:
        _compute(job, unit, q, keys, values, terms, into, rngs)
    return Answer(*into.result(), tuple(rngs))


def _compute(
    job: Job, unit: Unit, q: Tensor, k: Tensor, v: Tensor, terms: Terms, into: _Parts | _Sums,
    rngs: list[Tensor | None],
) -> None:  # fmt: skip
    """The calls of a unit; k and v are its key buffer."""
    for call in unit.stage.calls:
        (q0, q1), (k0, k1) = call.q, call.k
        mine = _terms(terms, unit.heads.q, len(rngs))
        out, lse, rng, _ = _kernel(job, call).run(q[q0:q1, unit.heads.q], k[k0:k1], v[k0:k1], mine)
        assert lse is not None
        rngs.append(rng)
        into.add(unit, call, out, lse)


class _Parts:
    """Results of calls that share no query row: kept, and put together at the end."""

    def __init__(self, job: Job, q: Tensor, k: Tensor, v: Tensor) -> None:
        self._groups = _head_groups(job, q, k)
        self._outs: list[list[Tensor]] = [[] for _ in self._groups]
        self._lses: list[list[Tensor]] = [[] for _ in self._groups]
        self._tables, self._like = job.tables, q.new_empty(0, q.shape[1], v.shape[2])

    def add(self, unit: Unit, call: CallTables, out: Tensor, lse: Tensor) -> None:
        """Keep a result. A local one has all heads."""
        if not unit.stage.stage.local:
            self._outs[unit.group].append(out)
            self._lses[unit.group].append(lse)
            return
        for i, heads in enumerate(self._groups):
            self._outs[i].append(out[:, heads.q])
            self._lses[i].append(lse[heads.q])

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


def fewer(sources: list[Tensor]) -> list[Tensor]:
    """As many sources as one launch takes."""
    return sources if len(sources) <= _rows.MAX_SOURCES else [torch.cat(sources)]


def _columns(parts: list[Tensor], index: Tensor) -> Tensor:
    """Columns of (heads, t) parts laid side by side, by index; -inf where it is -1."""
    whole = torch.cat([*parts, parts[0].new_full((parts[0].shape[0], 1), NEG_INF)], dim=1)
    return whole.index_select(1, torch.where(index < 0, whole.shape[1] - 1, index))


class _Sums:
    """Results of calls that share query rows: merged as they come, in float32."""

    def __init__(self, job: Job, q: Tensor, v: Tensor) -> None:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        rows, heads = job.tables.rows_q, q.shape[1]
        self._out = q.new_zeros(rows, heads, v.shape[2], dtype=wide)
        self._lse = q.new_full((heads, rows), NEG_INF, dtype=wide)
        self._dtype = q.dtype

    def add(self, unit: Unit, call: CallTables, out: Tensor, lse: Tensor) -> None:
        """Merge a result."""
        heads = unit.heads.q
        mine = self._out[:, heads], self._lse[heads]
        _rows.merge_rows(*mine, out, lse, call.rows, call.part_rows, fresh=call.fresh)

    def result(self) -> tuple[Tensor, Tensor]:
        """(out, lse)."""
        return self._out.to(self._dtype), self._lse


# --- backward ---


def backward(
    job: Job, q: Tensor, k: Tensor, v: Tensor, terms: Terms, answer: Answer, dout: Tensor, dlse: Tensor | None
) -> Gradients:
    """Gradients of this rank's rows, from the final out and lse."""
    tables = job.tables
    if tables.direct:
        call = tables.stages[0].calls[0]
        mine = _terms(terms, slice(0, q.shape[1]), 0)
        saved = Saved(answer.out, answer.lse, answer.rngs[0])
        return Gradients(*_kernel(job, call).run_backward(q, k, v, mine, saved, dout, dlse))
    work = _Backward(job, q, k, v, terms, answer, dout, dlse)
    arriving = _pipelined(job, _remote_units(job, q, k), k, v)
    next(arriving)
    for unit, keys, values in arriving:
        work.remote(unit, keys, values)
    for unit in _local_units(job, q, k):
        work.local(unit)
    return work.result()


class _Backward:
    """The sums of a backward: each call only adds, for out and lse are the final ones."""

    def __init__(
        self, job: Job, q: Tensor, k: Tensor, v: Tensor, terms: Terms, answer: Answer, dout: Tensor, dlse: Tensor | None
    ) -> None:
        self.job, self.tables = job, job.tables
        self.q, self.k, self.v, self.terms, self.answer = q, k, v, terms, answer
        self.dout, self.dlse = dout, dlse
        self.groups = _head_groups(job, q, k)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        #: Parts of dq by group, where no row is in two calls; else the sum itself.
        self.dq_parts: list[list[tuple[int, Tensor]]] = [[] for _ in self.groups]
        self.dq = None if self.tables.exclusive else q.new_zeros(q.shape, dtype=wide)
        self.dbias = (
            None if terms.bias is None or not job.options.bias_grad else torch.zeros_like(terms.bias, dtype=wide)
        )
        self.wide = wide
        #: What comes back: not yet there, and (for one remote stage) by group.
        self.travelling: list[tuple[Unit, Arrival]] = []
        self.home: list[_Wire | None] = [None for _ in self.groups]
        self.sums: tuple[Tensor, Tensor] | None = None
        self.own: list[tuple[Tensor, Tensor]] = []
        #: Kernel calls are numbered as forward made them.
        self.first_remote = sum(len(s.calls) for s in self.tables.local)

    def _number(self, unit: Unit) -> int:
        """Of a unit's first call."""
        if unit.stage.stage.local:
            return 0
        groups = len(self.groups)
        before = self.tables.remote[: unit.number // groups]
        return self.first_remote + sum(len(s.calls) for s in before) * groups + len(unit.stage.calls) * unit.group

    def _calls(self, unit: Unit, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(dk, dv) per call, in the rows that the call got."""
        found = []
        for i, call in enumerate(unit.stage.calls):
            number = self._number(unit) + i
            (q0, q1), (k0, k1), heads = call.q, call.k, unit.heads.q
            answer = self.answer
            saved = Saved(answer.out[q0:q1, heads], answer.lse[heads, q0:q1], answer.rngs[number])
            dlse = None if self.dlse is None else self.dlse[heads, q0:q1]
            kernel, terms = _kernel(self.job, call), _terms(self.terms, heads, number)
            dq, dk, dv, dbias = kernel.run_backward(
                self.q[q0:q1, heads], k[k0:k1], v[k0:k1], terms, saved, self.dout[q0:q1, heads], dlse
            )
            self._add_dq(unit, call, dq)
            if dbias is not None and self.dbias is not None:
                whole = self.dbias[:, heads] if self.dbias.shape[1] > 1 else self.dbias
                kernel.cut(whole).add_(dbias)
            found.append((dk, dv))
        return found

    def _add_dq(self, unit: Unit, call: CallTables, dq: Tensor) -> None:
        if self.dq is not None:
            whole = self.dq[:, unit.heads.q]
            _rows.sum_rows(whole, [dq], call.q_rows, base=whole)
        elif unit.stage.stage.local:
            for i, heads in enumerate(self.groups):
                self.dq_parts[i].append((-1, dq[:, heads.q]))
        else:
            self.dq_parts[unit.group].append((unit.number, dq))

    def remote(self, unit: Unit, k: Tensor, v: Tensor) -> None:
        """A unit whose keys are others': what it owes them starts to travel."""
        parts = self._calls(unit, k, v)
        stage = unit.stage
        wire = _Wire.empty(self.k, stage.back.shape[0], k.shape[1], k.shape[2], v.shape[2])
        if parts:
            _rows.sum_rows(wire.k, fewer([dk for dk, _ in parts]), stage.back)
            _rows.sum_rows(wire.v, fewer([dv for _, dv in parts]), stage.back)
        self._arrived()
        self.travelling.append((unit, exchange(self.job.group, wire.rows, stage.stage.receive, stage.send_counts)))

    def _arrived(self) -> None:
        """Take in what has come back so far: kept where one stage's comes back, else added up."""
        for unit, arrival in self.travelling:
            wire = _Wire(arrival.wait(), self.k.shape[2], self.v.shape[2])
            if len(self.tables.remote) == 1:
                self.home[unit.group] = wire
                continue
            if self.sums is None:
                self.sums = (
                    torch.zeros_like(self.k, dtype=self.wide, memory_format=torch.contiguous_format),
                    torch.zeros_like(self.v, dtype=self.wide, memory_format=torch.contiguous_format),
                )
            for total, rows in zip(self.sums, (wire.k, wire.v), strict=True):
                whole = total[:, unit.heads.k]
                _rows.sum_rows(whole, [rows], unit.stage.home, base=whole)
        self.travelling.clear()

    def local(self, unit: Unit) -> None:
        """A unit over this rank's own keys."""
        self.own += self._calls(unit, self.k, self.v)

    def result(self) -> Gradients:
        """The gradients; rows of no call are zero."""
        self._arrived()
        dq = self.q.new_empty(self.q.shape) if self.dq is None else self.dq.to(self.q.dtype)
        dk, dv = self.k.new_empty(self.k.shape), self.v.new_empty(self.v.shape)
        for i, heads in enumerate(self.groups):
            if self.dq is None:
                # As forward made them: local calls first, then the remote ones.
                parts = [part for _, part in sorted(self.dq_parts[i], key=lambda pair: pair[0])]
                _fill(dq[:, heads.q], parts, self.tables.out)
            for which, into in enumerate((dk, dv)):
                self._keys(i, heads, which, into[:, heads.k])
        bias = self.terms.bias
        return Gradients(dq, dk, dv, None if self.dbias is None or bias is None else self.dbias.to(bias.dtype))

    def _keys(self, group: int, heads: Heads, which: int, into: Tensor) -> None:
        """Dk or dv of a group of heads: what came back and this rank's own, rounded once."""
        own = [pair[which][:, heads.k] for pair in self.own]
        wire = self.home[group]
        if wire is not None:
            returned = wire.k if which == 0 else wire.v
            _fill(into, [returned, *own], self.tables.own_and_home)
        elif self.sums is None:
            _fill(into, own, self.tables.own)
        elif own:
            _rows.sum_rows(into, fewer(own), self.tables.own, base=self.sums[which][:, heads.k])
        else:
            into.copy_(self.sums[which][:, heads.k])


def _fill(into: Tensor, sources: list[Tensor], table: Tensor) -> None:
    if sources:
        _rows.sum_rows(into, fewer(sources), table)
    else:
        into.zero_()
