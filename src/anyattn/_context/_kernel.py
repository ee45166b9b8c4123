"""One call of a kernel within a plan: chosen once per plan and kind of call, run as any other call is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn import _core, _preparation, _select
from anyattn._call import Result, Saved
from anyattn._context._tables import CallTables
from anyattn._preparation import Inputs, Prepared
from anyattn._request import Meta, Request


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
    """One call of a plan, with what it asks; ``run`` and ``run_backward`` take slices of this rank's tensors."""

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
        q, k, v = self._shaped(q), self._shaped(k), self._shaped(v)
        x, bias = self._inputs(terms)
        kind = self._kind(q, k, v, x, bias)

        def settle() -> Prepared:
            found = _settled.get(kind)
            if found is None:
                if len(_settled) >= 4096:
                    _settled.clear()
                found = _settled[kind] = _prepare(self._request(q, k, v, x, bias), self.bare)
            return found

        def drop() -> None:
            _settled.pop(kind, None)
            _drop(self._request(q, k, v, x, bias), self.bare)

        def run(p: Prepared) -> tuple[Prepared, Result]:
            call = _core.make_call(p, q, k, v, None, bias, x)
            if place is not None and self.keys is None and p.dims is None:
                call = call._replace(out=place)
            return p, _core.forward(p, call, None)

        p, (out, lse, rng, _) = _preparation.run_accepted(settle, run, drop)
        return p, Result(self._flat(out), self._flat_lse(lse), rng)

    def request(self, q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Request:
        """What is asked of the choice of a kernel."""
        x, bias = self._inputs(terms)
        return self._request(self._shaped(q), self._shaped(k), self._shaped(v), x, bias)

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
        q, k, v = self._shaped(q), self._shaped(k), self._shaped(v)
        x, bias = self._inputs(terms)
        call = _core.make_call(p, q, k, v, None, bias, x)
        if places is not NOWHERE and self.keys is None and p.dims is None:
            call = call._replace(dq=places.dq, dk=places.dk, dv=places.dv)
        if self.keys is not None:
            saved = saved._replace(out=saved.out[None], lse=saved.lse[None])
            dlse = None if dlse is None else dlse[None]
        found = _core.backward(p, call, saved, self._shaped(dout), dlse)
        return self._flat(found.dq), self._flat(found.dk), self._flat(found.dv), found.dbias

    # --- layouts ---

    def _shaped(self, x: Tensor) -> Tensor:
        return x if self.keys is None else x[None]

    def _flat(self, x: Tensor) -> Tensor:
        return x if self.keys is None else x[0]

    def _flat_lse(self, lse: Tensor | None) -> Tensor | None:
        return lse if self.keys is None or lse is None else lse[0]

    def _inputs(self, terms: Terms) -> tuple[Inputs, Tensor | None]:
        """What the call carries beside q, k and v."""
        alibi = terms.alibi
        if alibi is not None and alibi.ndim == 2:
            alibi = alibi.index_select(0, self.tables.documents)
        seed = None if terms.seed is None else torch.tensor([terms.seed, 0], dtype=torch.int64, device="cpu")
        if self.keys is None:
            rows_q, rows_k = self.tables.packing_q._rows, self.tables.packing_k._rows
            return Inputs(rows_q, rows_k, alibi, None, None, seed), None
        mask = None if terms.mask is None else self.cut(terms.mask)
        return Inputs(None, None, alibi, mask, None, seed), None if terms.bias is None else self.cut(terms.bias)

    def cut(self, term: Tensor) -> Tensor:
        """A term's part for this call; dims of size 1 stay."""
        assert self.keys is not None
        if term.shape[2] > 1:
            term = term[:, :, self.tables.q[0] : self.tables.q[1]]
        return term[..., self.keys[0] : self.keys[1]] if term.shape[3] > 1 else term

    # --- what is asked ---

    def _kind(self, q: Tensor, k: Tensor, v: Tensor, x: Inputs, bias: Tensor | None) -> tuple[Any, ...]:
        """All that the request depends on, quicker to look up than it is."""
        added = tuple(None if t is None else (t.shape, t.dtype) for t in (x.alibi, x.mask, bias))
        return self.tables.serial, self.bare, self.keys, self.options, q.shape, k.shape, v.shape, q.dtype, added

    def _request(self, q: Tensor, k: Tensor, v: Tensor, x: Inputs, bias: Tensor | None) -> Request:
        o, call = self.options, self.tables.call
        packed = self.keys is None
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
            None if x.alibi is None else _meta(x.alibi, False),
            None if bias is None else _meta(bias, o.bias_grad),
            None if x.mask is None else _meta(x.mask, False),
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


def prepared(request: Request) -> None:
    """Choose a kernel for a request ahead of time.

    Raises:
        NoBackend: nothing that is allowed takes it.
    """
    _prepare(request, True)


def _drop(request: Request, bare: bool) -> None:
    _prepared.pop((request, bare), None)
