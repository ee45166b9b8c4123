"""One call of a kernel within a plan: chosen once per plan and kind of call, run as any other call is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from anyattn import _core, _preparation, _select
from anyattn._call import Call, Result, Saved
from anyattn._context._tables import CallTables
from anyattn._errors import NoBackend
from anyattn._explanation import Explanation
from anyattn._preparation import Inputs, Prepared
from anyattn._request import Meta, Request

T = TypeVar("T")


class Options(NamedTuple):
    """What a call asks beside its tensors; hashable."""

    scale: float
    softcap: float | None
    dropout: float
    backend: Any
    preference: Any
    deterministic: bool | None
    torch_deterministic: bool
    grad: bool
    """A gradient is needed."""
    bias_grad: bool
    lse_grad: bool
    """A gradient may reach lse."""
    flash_override: str | None
    num_splits: int = 1


class Terms(NamedTuple):
    """What is added to the scores of one call."""

    alibi: Tensor | None = None
    """(heads,), or (documents, heads)."""
    bias: Tensor | None = None
    """4-D, over this rank's queries and all keys."""
    mask: Tensor | None = None
    """The same."""
    seed: int | None = None
    """For dropout."""


class Places(NamedTuple):
    """Where a caller would have gradients."""

    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None


NOWHERE = Places()


@dataclass(frozen=True, slots=True)
class Kernel:
    """One call of a plan, with what it asks; ``run`` and ``run_backward`` take slices of this rank's tensors.

    The kernel gets them packed, or as (entries, seq, heads, dim): for terms over (seq_q, seq_k), and where a plan from
    a plain length makes a call of equal entries, if the kernel is quicker so, or takes nothing else.
    """

    tables: CallTables
    options: Options
    bare: bool
    """What lies outside the entries need not be zero: nobody reads it."""
    keys: tuple[int, int] | None = None
    """For terms over (seq_q, seq_k): the key positions that the call sees; its tensors are 4-D then."""

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, terms: Terms, place: Tensor | None = None
    ) -> tuple[Prepared, Result]:
        """What ran, and (out, lse, rng) of rows q (rows, heads, dim) over a key buffer's, both cut to the call.

        out may be found in ``place``, or elsewhere.
        """
        added = self._cut(terms)
        kind = self._kind(q, k, v, added)

        def settle() -> Prepared:
            found = _settled.get(kind)
            if found is None:
                if len(_settled) >= 4096:
                    _settled.clear()
                found = _settled[kind] = _choose(self._requests(q, k, v, added), self.bare)
            return found

        def drop() -> None:
            _settled.pop(kind, None)
            for request in self._requests(q, k, v, added):
                _drop(request, self.bare)

        def run(p: Prepared) -> tuple[Prepared, Result]:
            call = self._call(p, q, k, v, added)
            if place is not None and self.keys is None and p.dims is None:
                call = call._replace(out=self._shaped(place, p))
            return p, _core.forward(p, call, None)

        p, (out, lse, rng, _) = _preparation.run_accepted(settle, run, drop)
        return p, Result(self._flat(out, p), self._flat_lse(lse, p), rng)

    def requests(self, q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> tuple[Request, ...]:
        """What is asked of the choice of a kernel, for ``chosen``."""
        return self._requests(q, k, v, self._cut(terms))

    def run_backward(
        self,
        p: Prepared,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        terms: Terms,
        saved: Saved,
        dout: Tensor,
        dlse: Tensor | None,
        places: Places = NOWHERE,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(dq, dk, dv, dbias) from the final out and lse, by what forward ran; in ``places``, or elsewhere."""
        call = self._call(p, q, k, v, self._cut(terms))
        placed = places is not NOWHERE and self.keys is None and p.dims is None
        if p.packed:
            if placed:
                call = call._replace(dq=places.dq, dk=places.dk, dv=places.dv)
            found = _core.backward(p, call, saved, dout, dlse)
            return found.dq, found.dk, found.dv, found.dbias
        if placed:
            dq, dk, dv = (None if x is None else self._shaped(x, p) for x in places)
            call = call._replace(dq=dq, dk=dk, dv=dv)
        dlse = None if dlse is None else self._entries_of_lse(dlse)
        saved = saved._replace(out=self._shaped(saved.out, p), lse=self._entries_of_lse(saved.lse))
        found = _core.backward(p, call, saved, self._shaped(dout, p), dlse)
        return self._flat(found.dq, p), self._flat(found.dk, p), self._flat(found.dv, p), found.dbias

    # --- layouts ---

    @property
    def _entries(self) -> int:
        """Of 4-D tensors."""
        return self.tables.even or 1

    def _shaped(self, x: Tensor, p: Prepared) -> Tensor:
        """(rows, heads, dim) as the kernel takes them."""
        return x if p.packed else x.unflatten(0, (self._entries, -1))

    def _flat(self, x: Tensor, p: Prepared) -> Tensor:
        return x if p.packed else x.flatten(0, 1)

    def _flat_lse(self, lse: Tensor | None, p: Prepared) -> Tensor | None:
        """(heads, rows)."""
        return lse if p.packed or lse is None else lse.transpose(0, 1).flatten(1)

    def _entries_of_lse(self, lse: Tensor) -> Tensor:
        """(entries, heads, rows) of (heads, rows), in one run of memory: kernels read it as it lies there."""
        entries: Tensor = lse.unflatten(1, (self._entries, -1)).transpose(0, 1)
        return entries.contiguous()

    def _call(self, p: Prepared, q: Tensor, k: Tensor, v: Tensor, added: _Added) -> Call:
        seed = None if added.seed is None else torch.tensor([added.seed, 0], dtype=torch.int64, device="cpu")
        if p.packed:
            rows_q, rows_k = self.tables.packing_q._rows, self.tables.packing_k._rows
            return _core.make_call(p, q, k, v, None, None, Inputs(rows_q, rows_k, added.alibi, None, None, seed))
        q, k, v = self._shaped(q, p), self._shaped(k, p), self._shaped(v, p)
        return _core.make_call(p, q, k, v, None, added.bias, Inputs(None, None, added.alibi, added.mask, None, seed))

    def _cut(self, terms: Terms) -> _Added:
        """What this call carries beside q, k and v."""
        alibi, bias, mask, seed = terms
        if alibi is not None and alibi.ndim == 2:
            alibi = alibi.index_select(0, self.tables.documents)
        if self.keys is None:
            return _Added(alibi, None, None, seed)
        return _Added(alibi, None if bias is None else self.cut(bias), None if mask is None else self.cut(mask), seed)

    def cut(self, term: Tensor) -> Tensor:
        """A term's part for this call; dims of size 1 stay."""
        assert self.keys is not None
        if term.shape[2] > 1:
            term = term[:, :, self.tables.q[0] : self.tables.q[1]]
        return term[..., self.keys[0] : self.keys[1]] if term.shape[3] > 1 else term

    # --- what is asked ---

    def _kind(self, q: Tensor, k: Tensor, v: Tensor, added: _Added) -> tuple[Any, ...]:
        """All that the requests depend on, quicker to look up than they are."""
        of = tuple(None if t is None else (t.shape, t.dtype) for t in (added.alibi, added.mask, added.bias))
        return self.tables.serial, self.bare, self.keys, self.options, q.shape, k.shape, v.shape, q.dtype, of

    def _requests(self, q: Tensor, k: Tensor, v: Tensor, added: _Added) -> tuple[Request, ...]:
        if self.keys is None and self.tables.even is None:
            return (self._request(q, k, v, added, packed=True),)
        entries_q, entries_k, entries_v = (x.unflatten(0, (self._entries, -1)) for x in (q, k, v))
        dense = self._request(entries_q, entries_k, entries_v, added, packed=False)
        return (dense,) if self.keys is not None else (self._request(q, k, v, added, packed=True), dense)

    def _request(self, q: Tensor, k: Tensor, v: Tensor, added: _Added, *, packed: bool) -> Request:
        o, call = self.options, self.tables.call
        packing_q, packing_k = self.tables.packing_q, self.tables.packing_k
        left, right = call.left, call.right
        causal = right == 0
        sides = (left, None if causal else right)
        return Request(
            _meta(q, o.grad),
            _meta(k, o.grad),
            _meta(v, o.grad),
            causal,
            None if sides == (None, None) else sides,
            o.scale,
            o.softcap,
            None,
            None if added.alibi is None else _meta(added.alibi, False),
            None if added.bias is None else _meta(added.bias, o.bias_grad),
            None if added.mask is None else _meta(added.mask, False),
            o.dropout,
            "thd" if packed else "bshd",
            packing_q._key if packed else None,
            packing_k._key if packed else None,
            packing_q.relation(packing_k) if packed else "any",
            o.backend,
            o.preference,
            o.deterministic,
            o.torch_deterministic,
            o.lse_grad or not o.grad,
            None,
            o.flash_override,
            o.num_splits,
        )


class _Added(NamedTuple):
    """What one call carries beside q, k and v."""

    alibi: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    seed: int | None


def _meta(x: Tensor, grad: bool) -> Meta:
    return Meta(x.shape, x.dtype, x.device, Tensor, grad)


_prepared: dict[tuple[Request, bool], Prepared] = {}
_settled: dict[tuple[Any, ...], Prepared] = {}
_select.caches += [_prepared, _settled]


def _prepare(request: Request, bare: bool) -> Prepared:
    """Choose a kernel, once per kind of call; the same one in backward."""
    key = (request, bare)
    found = _prepared.get(key)
    if found is None:
        if len(_prepared) >= 4096:
            _prepared.clear()
        found = _preparation.prepare(request)
        if bare:
            found = replace(found, fill_q=False, fill_k=False, fill_lse=False)
        _prepared[key] = found
    return found


def chosen(requests: Sequence[Request], choose: Callable[[Request], tuple[T, Explanation]]) -> T:
    """What is found for the request that a call is made by: the last, the dense one, where the kernel is quicker so.

    It has to be the kernel that takes the packed call, if one does: the form overrules no preference. Where neither has
    a kernel, it is what has fewer reasons against it: a packed call has one more against a kernel of dense batches, and
    the other way round.

    Args:
        requests: as ``Kernel.requests`` gives them.
        choose: what is found for a request, and why.
    """
    found, told = choose(requests[0])
    if len(requests) == 1 or (told.forward is not None and not told.forward.dense_is_quicker):
        return found
    dense, other = choose(requests[1])
    if told.forward is None and other.forward is None:
        against = [sum(map(len, x.rejected.values())) for x in (told, other)]
        return dense if against[1] < against[0] else found
    return dense if told.forward is None or _is_same(told.forward, other.forward) else found


def _is_same(kernel: _select.Kernel, other: _select.Kernel | None) -> bool:
    return other is not None and (kernel.backend, kernel.name) == (other.backend, other.name)


def _choose(requests: Sequence[Request], bare: bool) -> Prepared:
    """The kernel of a call.

    Raises:
        NoBackend: nothing that is allowed takes it.
    """

    def choose(request: Request) -> tuple[Prepared | NoBackend, Explanation]:
        try:
            p = _prepare(request, bare)
        except NoBackend as refused:
            return refused, refused.explanation
        return p, p.explanation

    found = chosen(requests, choose)
    if isinstance(found, NoBackend):
        raise found
    return found


def prepared(requests: Sequence[Request]) -> None:
    """Choose the kernel of a call ahead of time.

    Raises:
        NoBackend: nothing that is allowed takes it.
    """
    _choose(requests, True)


def _drop(request: Request, bare: bool) -> None:
    _prepared.pop((request, bare), None)
