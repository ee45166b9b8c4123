"""Autograd, written once over every backend: the eager path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyattn import _core
from anyattn._call import Saved
from anyattn._core import Inputs, Prepared
from anyattn._errors import Unsupported


class Attention(torch.autograd.Function):
    """Forward and backward around one kernel, in the caller's layout."""

    @staticmethod
    def forward(
        ctx: Any,
        p: Prepared,
        x: Inputs,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (out, lse or None)."""
        enter = p.layout.enter
        call = _core.make_call(p, enter(q), enter(k), enter(v), sink, _four_dims(bias), x)
        out, lse, rng, held = _core.forward(p, call, sink)
        # Hooks (activation checkpointing, offloading) decide what is kept of tensors saved here; a graph keeps all.
        ctx.held = None if held is None or _hooks_are_active() else held
        ctx.prepared, ctx.inputs = p, x
        if x.alibi is not None or x.mask is not None:
            ctx.inputs = x._replace(alibi=None, mask=None)  # those two are saved, where hooks see them
        ctx.set_materialize_grads(False)
        # The offsets are saved too, so that refilling a Packing before backward is an error and not a wrong gradient.
        offsets = [None if rows is None else rows.starts for rows in (x.rows_q, x.rows_k)]
        ctx.save_for_backward(q, k, v, sink, bias, out, lse, rng, x.alibi, x.mask, *offsets)
        returned = p.layout.leave_lse(lse).float() if p.return_lse and lse is not None else None
        return p.layout.leave(out), returned

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v, sink and bias, in the caller's layout."""
        saved = ctx.saved_tensors  # once: under activation checkpointing a second look raises
        with torch.no_grad():
            found = Attention.gradients(ctx, saved, dout, dlse)
        if torch.is_grad_enabled():  # create_graph=True
            anchors = [x for x in saved[:5] if x is not None and x.requires_grad]
            once: Any = NoSecondBackward.apply
            return tuple(None if g is None else once(g, *anchors) for g in found)
        return found

    @staticmethod
    def gradients(
        ctx: Any, saved_tensors: tuple[Any, ...], dout: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """The work of backward."""
        p: Prepared = ctx.prepared
        x: Inputs = ctx.inputs
        q, k, v, sink, bias, out, lse, rng, alibi, mask, *_ = saved_tensors
        if alibi is not None or mask is not None:
            x = x._replace(alibi=alibi, mask=mask)
        if dout is None and dlse is None:
            return (None,) * 7
        dout = torch.zeros_like(out) if dout is None else p.layout.enter(dout)
        dlse = None if dlse is None else p.layout.enter_lse(dlse)
        saved, ctx.held = Saved(out, lse, rng, ctx.held), None  # for one backward; another does without
        enter = p.layout.enter
        call = _core.make_call(p, enter(q), enter(k), enter(v), None, _four_dims(bias), x)
        dq, dk, dv, dbias = _core.backward(p, call, saved, dout, dlse)
        dsink = None
        if sink is not None and ctx.needs_input_grad[5]:
            dsink = _core.sink_gradient(sink, saved, dout, dlse)
        leave, leave_keys = p.layout.leave, p.layout.leave_keys
        shaped = None if dbias is None or bias is None else dbias.reshape(bias.shape)
        return None, None, leave(dq), leave_keys(dk), leave_keys(dv), dsink, shaped


def _hooks_are_active() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class NoSecondBackward(torch.autograd.Function):
    """A gradient that cannot be differentiated again, and says so: nothing drops a second-order term silently."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *anchors: Tensor) -> Tensor:
        """The gradient itself; anchors tie it to what it would be differentiated by."""
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        """Raise."""
        raise Unsupported(
            "attention() has no double backward: leave out create_graph=True, or call F.scaled_dot_product_attention "
            "under torch.nn.attention.sdpa_kernel(SDPBackend.MATH) where second-order gradients are needed"
        )


def _four_dims(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.reshape((1,) * (4 - bias.ndim) + tuple(bias.shape))


def run(p: Prepared, x: Inputs, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, bias: Tensor | None) -> Any:
    """(out, lse or None) in the caller's layout, through autograd only where a gradient is needed."""
    if p.cast is not None:
        q, k, v = (t.to(p.cast) if t.dtype == torch.float32 else t for t in (q, k, v))
    if p.needs_backward:
        return Attention.apply(p, x, q, k, v, sink, bias)  # type: ignore[no-untyped-call]
    layout = p.layout
    if not layout.is_identity:
        q, k, v = layout.enter(q), layout.enter(k), layout.enter(v)
    out, lse, _, _ = _core.forward(p, _core.make_call(p, q, k, v, sink, _four_dims(bias), x), sink)
    returned = layout.leave_lse(lse).float() if p.return_lse and lse is not None else None
    return out if layout.is_identity else layout.leave(out), returned
