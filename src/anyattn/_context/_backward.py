"""Backward of a plan's stages. out and lse are the final ones, so each kernel call only adds.

Keys are fetched again, unless forward kept them. What a unit owes to other ranks sets out as soon as it is known, and
arrives while the next unit computes; the local stage comes last. Sums are made in float32, and rounded once; what
travels is rounded to the type of its tensor first.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from anyattn._call import Saved
from anyattn._context import _rows
from anyattn._context._exchange import Arrival, exchange
from anyattn._context._kernel import NOWHERE, Places, Terms
from anyattn._context._schedule import (
    Answer,
    Heads,
    Job,
    Unit,
    Wire,
    fewer,
    finest,
    kernel_of,
    settle,
    terms_of,
    units_of,
    with_keys,
    within,
)
from anyattn._context._tables import CallTables

T = TypeVar("T")


class Gradients(NamedTuple):
    """What backward returns."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None


class Given(NamedTuple):
    """What backward starts from."""

    q: Tensor
    k: Tensor
    v: Tensor
    terms: Terms
    answer: Answer
    dout: Tensor
    dlse: Tensor | None


def backward(job: Job, x: Given) -> Gradients:
    """Gradients of this rank's rows; rows of no call are zero."""
    tables = job.tables
    if tables.direct:
        call = tables.stages[0].calls[0]
        mine = terms_of(x.terms, slice(0, x.q.shape[1]), 0)
        saved = Saved(x.answer.out, x.answer.lse, x.answer.rngs[0])
        return Gradients(
            *kernel_of(job, call).run_backward(x.answer.kernels[0], x.q, x.k, x.v, mine, saved, x.dout, x.dlse)
        )
    work = _Gathered(job, x) if tables.exclusive else _Merged(job, x)
    for unit, keys, values in with_keys(job, units_of(job, x.q, x.k, backward=True), x.k, x.v, x.answer.keys):
        (work.local if unit.local else work.remote)(unit, keys, values)
        del keys, values
    return work.result()


class _Part(NamedTuple):
    """What one kernel call gives, in the rows that it got."""

    dq: Tensor
    dk: Tensor
    dv: Tensor


class _Work:
    """What both kinds of plans share: the kernel calls, and what travels."""

    def __init__(self, job: Job, x: Given) -> None:
        self.job, self.tables, self.x = job, job.tables, x
        self.wide = torch.float64 if x.q.dtype == torch.float64 else torch.float32
        self.dq, self.dk, self.dv = (t.new_empty(t.shape) for t in (x.q, x.k, x.v))
        bias = x.terms.bias if job.options.bias_grad else None
        self.dbias = None if bias is None else torch.zeros_like(bias, dtype=self.wide)
        self.travelling: list[tuple[Unit, Arrival]] = []

    def calls(self, unit: Unit, k: Tensor, v: Tensor) -> list[tuple[CallTables, _Part]]:
        """The calls of a unit; k and v are its key buffer."""
        x, found = self.x, []
        heads = unit.heads.q
        for i, call in enumerate(unit.stage.calls):
            (q0, q1), (k0, k1), number = call.q, call.k, unit.number + i
            lse = x.answer.lse[heads, q0:q1].contiguous()  # kernels read it as it lies in memory
            saved = Saved(x.answer.out[q0:q1, heads], lse, x.answer.rngs[number])
            dlse = None if x.dlse is None else x.dlse[heads, q0:q1].contiguous()
            kernel, terms = kernel_of(self.job, call), terms_of(x.terms, heads, number)
            dq, dk, dv, dbias = kernel.run_backward(
                x.answer.kernels[number],
                x.q[q0:q1, heads],
                k[k0:k1],
                v[k0:k1],
                terms,
                saved,
                x.dout[q0:q1, heads],
                dlse,
                self.places(unit, call),
            )
            if dbias is not None and self.dbias is not None:
                whole = self.dbias[:, heads] if self.dbias.shape[1] > 1 else self.dbias
                kernel.cut(whole).add_(dbias)
            found.append((call, _Part(dq, dk, dv)))
        return found

    def places(self, unit: Unit, call: CallTables) -> Places:
        """Where gradients of a call are to be."""
        return NOWHERE

    def owe(self, unit: Unit, parts: list[_Part], heads: int) -> None:
        """Send what others' keys got; take in what has come back so far."""
        stage, k, v = unit.stage, self.x.k, self.x.v
        dims, own = (k.shape[2], v.shape[2]), stage.kept.shape[0]
        wire = Wire.empty(k, stage.back.shape[0], heads, *dims)
        grads = fewer([p.dk for p in parts]), fewer([p.dv for p in parts])
        _sum(wire, grads, stage.back)
        self.arrived()
        counts = stage.receive_counts, stage.send_counts
        arrival = exchange(self.job.group, wire.rows, *counts, room=own, head_start=self.job.head_start)
        if own:
            _sum(Wire(arrival.rows[-own:], *dims), grads, stage.kept)
        self.travelling.append((unit, arrival))

    def arrived(self) -> None:
        """Take in everything that is on its way."""
        for unit, arrival in self.travelling:
            self.take(unit, Wire(arrival.wait(), self.x.k.shape[2], self.x.v.shape[2]))
        self.travelling.clear()

    def take(self, unit: Unit, wire: Wire) -> None:
        """Take in what came back for a unit."""
        raise NotImplementedError

    def gradients(self) -> Gradients:
        """All of them."""
        bias = self.x.terms.bias
        dbias = None if self.dbias is None or bias is None else self.dbias.to(bias.dtype)
        return Gradients(self.dq, self.dk, self.dv, dbias)


class _Gathered(_Work):
    """No query row is in two calls, and there is at most one remote stage: little is added up.

    Where the calls' rows do not interleave, gradients go where they belong, by the kernel itself if it can: dq of all
    calls; dk and dv of local ones, to which what comes back is added. Elsewhere they are put together. Both are done
    for a group of heads as soon as all of it is there: what is held is on its way, or the next to leave.
    """

    def __init__(self, job: Job, x: Given) -> None:
        super().__init__(job, x)
        whole = Heads(slice(0, x.q.shape[1]), slice(0, x.k.shape[1]))
        self.open = finest(job, x.q, x.k) if job.tables.remote else [whole]
        """Groups of heads whose gradients are not put together."""
        self.ran = [] if any(stage.calls for stage in job.tables.local) else [whole]
        """Heads whose local units are done."""
        self.own: list[tuple[Unit, list[_Part]]] = []
        self.dqs: list[tuple[Unit, list[Tensor]]] = []
        self.home: list[tuple[Unit, Wire]] = []

    def places(self, unit: Unit, call: CallTables) -> Places:
        """Where gradients of a call are to be."""
        dq = self.dq[call.q[0] : call.q[1], unit.heads.q] if self.tables.apart else None
        if not (unit.local and self.tables.apart_k):
            return Places(dq)
        rows = slice(*call.k), unit.heads.k
        return Places(dq, self.dk[rows], self.dv[rows])

    def _parts(self, unit: Unit, k: Tensor, v: Tensor) -> list[_Part]:
        """Of a unit's calls, settled or kept."""
        found = self.calls(unit, k, v)
        for call, part in found:
            for place, gradient in zip(self.places(unit, call), part, strict=True):
                if place is not None:
                    settle(place, gradient)
        if not self.tables.apart:
            self.dqs.append((unit, [part.dq for _, part in found]))
        return [part for _, part in found]

    def remote(self, unit: Unit, k: Tensor, v: Tensor) -> None:
        """A unit over others' keys."""
        self.owe(unit, self._parts(unit, k, v), k.shape[1])

    def take(self, unit: Unit, wire: Wire) -> None:
        """What came back."""
        self.home.append((unit, wire))
        self._close()

    def local(self, unit: Unit, k: Tensor, v: Tensor) -> None:
        """A unit over this rank's own keys."""
        parts = self._parts(unit, k, v)
        if not self.tables.apart_k:
            self.own.append((unit, parts))
        self.ran.append(unit.heads)
        self._close()

    def result(self) -> Gradients:
        """All of them; dq is zero in rows of no call."""
        self.arrived()
        assert not self.open, f"gradients of {self.open} are missing"
        if self.tables.apart and self.tables.blank.shape[0]:
            self.dq.index_fill_(0, self.tables.blank.long(), 0)
        return self.gradients()

    def _close(self) -> None:
        """Put together the groups of heads of which all is there, and let go of what they were made of."""
        for heads in list(filter(self._is_there, self.open)):
            if not self.tables.apart:
                dqs = [x[:, inner.q] for inner, parts in _of(heads, self.dqs) for x in parts]
                _fill(self.dq[:, heads.q], dqs, self.tables.out)
            home = [(inner, wire) for inner, wire in _of(heads, self.home)]
            if self.tables.apart_k:
                self._join(heads, home)
            else:
                self._put_together(heads, home)
            self.open.remove(heads)
        self.own, self.dqs, self.home = (self._wanted(x) for x in (self.own, self.dqs, self.home))

    def _is_there(self, heads: Heads) -> bool:
        """Everything of a group of heads: of the local stage, and of what comes back if anything does."""
        back = not self.tables.remote or _of(heads, self.home)
        return bool(back) and any(within(heads, done) for done in self.ran)

    def _wanted(self, found: list[tuple[Unit, T]]) -> list[tuple[Unit, T]]:
        """What some group of heads still needs."""
        return [(unit, x) for unit, x in found if any(within(heads, unit.heads) for heads in self.open)]

    def _join(self, heads: Heads, home: list[tuple[Heads, Wire]]) -> None:
        """Add what came back to what local calls wrote; rows of neither are zero."""
        rows = slice(*self.tables.hull)
        if rows.start == rows.stop:
            return
        keys, values = [wire.k[:, i.k] for i, wire in home], [wire.v[:, i.k] for i, wire in home]
        for whole, came in ((self.dk, keys), (self.dv, values)):
            into = whole[rows, heads.k]
            _rows.sum_rows(into, [into, *came], self.tables.join)

    def _put_together(self, heads: Heads, home: list[tuple[Heads, Wire]]) -> None:
        """Gradients of keys and values of a group of heads; tables count calls in forward's order."""
        own = [(inner, p) for inner, parts in _of(heads, self.own) for p in parts]
        table = self.tables.own_and_home if home else self.tables.own
        keys = [*(wire.k[:, i.k] for i, wire in home), *(p.dk[:, i.k] for i, p in own)]
        values = [*(wire.v[:, i.k] for i, wire in home), *(p.dv[:, i.k] for i, p in own)]
        _fill(self.dk[:, heads.k], keys, table)
        _fill(self.dv[:, heads.k], values, table)


def _of(heads: Heads, found: list[tuple[Unit, T]]) -> list[tuple[Heads, T]]:
    """What units that have these heads brought, in forward's order, with where the heads are in it."""
    ordered = sorted(found, key=lambda pair: pair[0].number)
    return [(inner, x) for unit, x in ordered if (inner := within(heads, unit.heads)) is not None]


class _Merged(_Work):
    """Query rows are in many calls: sums in float32, of one group of heads at a time."""

    def __init__(self, job: Job, x: Given) -> None:
        super().__init__(job, x)
        self.sums: _Part | None = None

    def _sums(self, heads: Heads) -> _Part:
        """The sums of a group of heads, begun where there are none."""
        if self.sums is None:
            x, cut = self.x, (heads.q, heads.k, heads.k)
            zeros = [
                t.new_zeros(t.shape[0], c.stop - c.start, t.shape[2], dtype=self.wide)
                for t, c in zip((x.q, x.k, x.v), cut, strict=True)
            ]
            self.sums = _Part(*zeros)
        return self.sums

    def _add(self, unit: Unit, k: Tensor, v: Tensor) -> list[_Part]:
        sums, parts = self._sums(unit.heads), []
        for call, part in self.calls(unit, k, v):
            _rows.sum_rows(sums.dq, [part.dq], call.q_rows, base=sums.dq)
            parts.append(part)
        return parts

    def remote(self, unit: Unit, k: Tensor, v: Tensor) -> None:
        """A unit over others' keys."""
        self.owe(unit, self._add(unit, k, v), k.shape[1])

    def take(self, unit: Unit, wire: Wire) -> None:
        """Add what came back."""
        sums = self._sums(unit.heads)
        for total, rows in ((sums.dk, wire.k), (sums.dv, wire.v)):
            _rows.sum_rows(total, [rows], unit.stage.home, base=total)

    def local(self, unit: Unit, k: Tensor, v: Tensor) -> None:
        """The unit over this rank's own keys, the last of its group of heads."""
        own = self._add(unit, k, v)
        self.arrived()
        sums, heads = self._sums(unit.heads), unit.heads
        self.dq[:, heads.q] = sums.dq
        for into, total, parts in (
            (self.dk[:, heads.k], sums.dk, [p.dk for p in own]),
            (self.dv[:, heads.k], sums.dv, [p.dv for p in own]),
        ):
            if parts:
                _rows.sum_rows(into, fewer(parts), self.tables.own, base=total)
            else:
                into.copy_(total)
        self.sums = None

    def result(self) -> Gradients:
        """All of them."""
        return self.gradients()


def _sum(wire: Wire, grads: tuple[list[Tensor], list[Tensor]], table: Tensor) -> None:
    """Gradients of k and of v, by a table."""
    for into, sources in zip((wire.k, wire.v), grads, strict=True):
        _fill(into, sources, table)


def _fill(into: Tensor, sources: list[Tensor], table: Tensor) -> None:
    if sources:
        _rows.sum_rows(into, fewer(sources), table)
    else:
        into.zero_()
