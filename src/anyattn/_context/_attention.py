"""Attention over the ranks of a plan: one autograd function around the exchange of heads and the schedule of stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn import _core
from anyattn._autograd import NoSecondBackward
from anyattn._call import Saved
from anyattn._context import _schedule
from anyattn._context._backward import Given, backward
from anyattn._context._heads import HeadExchange
from anyattn._context._kernel import Terms
from anyattn._context._schedule import Answer, Job
from anyattn._context._tables import Tables
from anyattn._errors import ContextError


@dataclass(frozen=True, slots=True)
class Run:
    """One call: what to do, and what it carries beside the tensors that get gradients."""

    job: Job
    heads: HeadExchange | None
    head_rank: int
    terms: Terms
    """Over all heads."""
    return_lse: bool


class _Part(NamedTuple):
    """The heads that this rank computes."""

    q: Tensor
    k: Tensor
    v: Tensor
    answer: Answer


class ContextAttention(torch.autograd.Function):
    """Forward and backward of this rank's rows, (rows, heads, dim)."""

    @staticmethod
    def forward(
        ctx: Any, run: Run, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (out, lse or None)."""
        part, out, lse = (_whole if run.heads is None else _by_heads)(run, q, k, v, sink, bias)
        ctx.set_materialize_grads(False)
        ctx.run, terms = run, run.terms
        kept = part.q, part.k, part.v, part.answer.out, part.answer.lse, *part.answer.keys, *part.answer.rngs
        ctx.like = tuple((x.shape, x.dtype) for x in (q, k, v))
        ctx.save_for_backward(sink, bias, terms.alibi, terms.mask, *kept)
        ctx.version = run.job.tables.version
        ctx.kernels, ctx.buffers = part.answer.kernels, len(part.answer.keys)
        return out, lse.float() if run.return_lse and lse is not None else None

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v, sink and bias."""
        if dout is None and dlse is None:
            return (None,) * 6
        saved = ctx.saved_tensors
        if ctx.version != ctx.run.job.tables.version:
            raise ContextError(
                "the plan was refilled by copy_() between forward and backward, which needs it as it was: refill it "
                "after backward, or make a plan for each batch that is under way"
            )
        with torch.no_grad():
            found = _gradients(ctx, saved, dout, dlse)
        if torch.is_grad_enabled():  # create_graph=True
            anchors = [x for x in (*saved, dout, dlse) if x is not None and x.requires_grad]
            once: Any = NoSecondBackward.apply
            return tuple(None if g is None else once(g, *anchors) for g in found)
        return found


def terms_of(run: Run, alibi: Tensor | None, bias: Tensor | None, mask: Tensor | None, heads: slice) -> Terms:
    """For this rank's heads."""
    return Terms(None if alibi is None else alibi[..., heads], bias, mask, run.terms.seed)


def _with_sink(answer: Answer, sink: Tensor | None, tables: Tables) -> Answer:
    """The final out and lse."""
    if sink is None:
        return answer
    lse = answer.lse
    if tables.unseeing.shape[0]:
        lse = lse.masked_fill(tables.unseeing.bool(), _schedule.NEG_INF)
    out, lse = _core.apply_sink(answer.out, lse, sink)
    return answer._replace(out=out, lse=lse.masked_fill_(tables.padding.bool(), _schedule.NEG_INF))


# --- one rank has all heads ---


def _whole(
    run: Run, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, bias: Tensor | None
) -> tuple[_Part, Tensor, Tensor | None]:
    heads = slice(0, q.shape[1])
    terms = terms_of(run, run.terms.alibi, bias, run.terms.mask, heads)
    answer = _with_sink(_schedule.forward(run.job, q, k, v, terms), sink, run.job.tables)
    return _Part(q, k, v, answer), answer.out, answer.lse


# --- heads are exchanged ---


def _by_heads(
    run: Run, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, bias: Tensor | None
) -> tuple[_Part, Tensor, Tensor | None]:
    heads, tables = run.heads, run.job.tables
    assert heads is not None
    order_q, order_k = tables.order_q, tables.order_k
    arrivals = _send_inputs(heads, q, k, v, together=tables.alike)
    mine = _inputs(heads, arrivals, q, k, v, order_q and order_q[0], order_k and order_k[0])
    own = heads.share.of_rank(run.head_rank)
    terms = terms_of(run, run.terms.alibi, None, None, own)
    answer = _with_sink(
        _schedule.forward(run.job, mine[0], mine[1], mine[2], terms),
        None if sink is None else sink[own],
        tables,
    )
    back = heads.send_back([answer.out], order_q and order_q[1])
    out, lse = q.new_empty(*q.shape[:2], v.shape[2]), None
    if run.return_lse:
        back_lse = heads.send_back([answer.lse.t().unsqueeze(2)], order_q and order_q[1])
        by_row = q.new_empty(q.shape[0], q.shape[1], 1, dtype=_wide(q))
        heads.take_back(back_lse, [(by_row, False)])
        lse = by_row.squeeze(2).t().contiguous()
    heads.take_back(back, [(out, False)])
    return _Part(mine[0], mine[1], mine[2], answer), out, lse


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _send_inputs(heads: HeadExchange, q: Tensor, k: Tensor, v: Tensor, *, together: bool) -> list[Any]:
    """q, k and v in one exchange, where their rows are alike."""
    keys = [(k, True), (v, True)]
    if together:
        return [heads.send([(q, False), *keys])]
    return [heads.send([(q, False)]), heads.send(keys)]


def _inputs(
    heads: HeadExchange, arrivals: list[Any], q: Tensor, k: Tensor, v: Tensor, order_q: Any, order_k: Any
) -> list[Tensor]:
    share = heads.share
    widths = [(share.heads, q.shape[2]), (share.slots, k.shape[2]), (share.slots, v.shape[2])]
    if len(arrivals) == 1:
        return heads.take(arrivals[0], widths, order_q)
    return heads.take(arrivals[0], widths[:1], order_q) + heads.take(arrivals[1], widths[1:], order_k)


# --- backward ---


def _gradients(ctx: Any, saved: tuple[Any, ...], dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    """The work of backward."""
    run: Run = ctx.run
    sink, bias, alibi, mask, *kept = saved
    q, k, v, out, lse, *more = (x if x is None or x.ndim < 2 or x.stride(-1) == 1 else x.contiguous() for x in kept)
    keys, rngs = tuple(more[: ctx.buffers]), tuple(more[ctx.buffers :])
    part = _Part(q, k, v, Answer(out, lse, rngs, ctx.kernels, keys))
    dsink = torch.zeros_like(sink, dtype=_wide(sink)) if sink is not None and ctx.needs_input_grad[4] else None
    if dlse is not None:
        dlse = dlse.to(_wide(q))
    if run.heads is not None:
        found = _gradients_by_heads(ctx, run, part, alibi, sink, dsink, dout, dlse)
        return None, *found, None if dsink is None else dsink.to(sink.dtype), None
    dout = torch.zeros_like(part.answer.out) if dout is None else dout
    terms = terms_of(run, alibi, bias, mask, slice(0, q.shape[1]))
    got = backward(run.job, Given(part.q, part.k, part.v, terms, part.answer, dout, dlse))
    if dsink is not None:
        dsink += _core.sink_gradient(sink, Saved(part.answer.out, part.answer.lse, None), dout, dlse)
    return None, got.dq, got.dk, got.dv, None if dsink is None else dsink.to(sink.dtype), got.dbias


def _gradients_by_heads(
    ctx: Any, run: Run, part: _Part, alibi: Tensor | None, sink: Tensor | None, dsink: Tensor | None,
    dout: Tensor | None, dlse: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    heads, tables = run.heads, run.job.tables
    assert heads is not None
    order_q = tables.order_q
    like, dtype = part.q, ctx.like[0][1]
    shape_q, shape_k, shape_v = (shape for shape, _ in ctx.like)
    if dout is None:
        dout = like.new_zeros(*shape_q[:2], shape_v[2])
    if dlse is None and run.return_lse:  # another rank's may have a gradient, and all take part in its exchange
        dlse = like.new_zeros(shape_q[1], shape_q[0], dtype=_wide(like))
    grads = _receivers(like, dtype, (shape_q, shape_k, shape_v), heads.share.plain)
    arrivals, own = _send_gradients(heads, dout, dlse), heads.share.of_rank(run.head_rank)
    into = order_q and order_q[0]
    (mine,) = heads.take(arrivals[0], [(heads.share.heads, dout.shape[2])], into)
    mine_lse = None
    if dlse is not None:
        (by_row,) = heads.take(arrivals[1], [(heads.share.heads, 1)], into)
        mine_lse = by_row.squeeze(2).t()
    terms = terms_of(run, alibi, None, None, own)
    got = backward(run.job, Given(part.q, part.k, part.v, terms, part.answer, mine, mine_lse))
    if dsink is not None and sink is not None:
        final = Saved(part.answer.out, part.answer.lse, None)
        dsink[own] += _core.sink_gradient(sink[own], final, mine, mine_lse)
    back = _send_back(heads, tables, got)
    queries, keys = [(grads[0], False)], [(grads[1], True), (grads[2], True)]
    if len(back) == 1:
        heads.take_back(back[0], queries + keys)
    else:
        heads.take_back(back[0], queries)
        heads.take_back(back[1], keys)
    return tuple(g.to(dtype) for g in grads)


def _receivers(like: Tensor, dtype: torch.dtype, shapes: Any, plain: bool) -> list[Tensor]:
    """dq, dk and dv; those of repeated key heads are sums in float32."""
    dq = like.new_empty(shapes[0], dtype=dtype)
    if plain:
        return [dq, *(like.new_empty(shape, dtype=dtype) for shape in shapes[1:])]
    return [dq, *(like.new_zeros(shape, dtype=_wide(like)) for shape in shapes[1:])]


def _send_gradients(heads: HeadExchange, dout: Tensor, dlse: Tensor | None) -> list[Any]:
    sent = [heads.send([(dout, False)])]
    if dlse is not None:
        sent.append(heads.send([(dlse.t().unsqueeze(2), False)]))
    return sent


def _send_back(heads: HeadExchange, tables: Any, got: Any) -> list[Any]:
    back_q, back_k = (None if order is None else order[1] for order in (tables.order_q, tables.order_k))
    if tables.alike:
        return [heads.send_back([got.dq, got.dk, got.dv], back_q)]
    return [heads.send_back([got.dq], back_q), heads.send_back([got.dk, got.dv], back_k)]
