"""Autograd, written once over every backend: the eager path."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn import _core
from anyattn._call import Call, Result, Saved
from anyattn._errors import PackingError, Unsupported
from anyattn._preparation import Inputs, Prepared


class Kept(NamedTuple):
    """What the graph keeps, beside tensors."""

    p: Prepared
    x: Inputs
    held: Any
    """For one backward."""
    more: bool
    """There are saved tensors of a sink, bias, dropout, ALiBi or a mask."""
    versions: tuple[int, int] | None
    """Of the packings' tables, as :func:`_versions` says."""


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
        sink: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns out, or (out, lse) where lse is asked for."""
        out, lse, rng, held = _run_kernel(p, x, q, k, v, sink, bias)
        # Hooks (activation checkpointing, offloading) decide what is kept of tensors saved here; a graph keeps all.
        held = None if held is None or _hooks_are_active() else held
        if sink is None and bias is None and rng is None and x.alibi is None and x.mask is None:
            ctx.kept = Kept(p, x, held, False, _versions(x))
            ctx.save_for_backward(q, k, v, out, lse)
        else:
            kept = x._replace(alibi=None, mask=None)  # those two are saved, where hooks see them
            ctx.kept = Kept(p, kept, held, True, _versions(x))
            ctx.save_for_backward(q, k, v, out, lse, sink, bias, rng, x.alibi, x.mask)
        layout = p.layout
        if not layout.is_identity:
            out = layout.leave(out)
        if not p.return_lse or lse is None:
            return out
        ctx.set_materialize_grads(False)
        return out, layout.leave_lse(lse).float()

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v, sink and bias, in the caller's layout."""
        saved = ctx.saved_tensors  # once: under activation checkpointing a second look raises
        if not torch.is_grad_enabled():
            return Attention.gradients(ctx, saved, dout, dlse)
        with torch.no_grad():  # create_graph=True
            found = Attention.gradients(ctx, saved, dout, dlse)
        leaves = (*saved[:3], *saved[5:7]) if ctx.kept.more else saved[:3]
        anchors = [x for x in (*leaves, dout, dlse) if x is not None and x.requires_grad]
        once: Any = NoSecondBackward.apply
        return tuple(None if g is None else once(g, *anchors) for g in found)

    @staticmethod
    def gradients(
        ctx: Any, saved_tensors: tuple[Any, ...], dout: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """The work of backward: a gradient, or None, for each argument that forward was given."""
        kept: Kept = ctx.kept
        p, x, held, more, versions = kept
        if versions != _versions(x):
            raise PackingError(
                "the packing was refilled by copy_() between forward and backward, which needs it as it was: refill it "
                "after backward, or make a Packing for each batch that is under way"
            )
        q, k, v, out, lse, *_ = saved_tensors
        sink, bias, rng, alibi, mask = saved_tensors[5:10] if more else (None,) * 5
        given = len(ctx.needs_input_grad)
        if alibi is not None or mask is not None:
            x = x._replace(alibi=alibi, mask=mask)
        if dout is None and dlse is None:
            return (None,) * given
        dout = torch.zeros_like(out) if dout is None else p.layout.enter(dout)
        dlse = None if dlse is None else p.layout.enter_lse(dlse)
        saved, ctx.kept = Saved(out, lse, rng, held), kept._replace(held=None)  # another backward does without
        enter = p.layout.enter
        call = _core.make_call(p, enter(q), enter(k), enter(v), None, _four_dims(bias), x)
        dq, dk, dv, dbias = _core.backward(p, call, saved, dout, dlse)
        leave, leave_keys = p.layout.leave, p.layout.leave_keys
        found = None, None, leave(dq), leave_keys(dk), leave_keys(dv)
        if given == len(found):
            return found
        dsink = None
        if sink is not None and ctx.needs_input_grad[5]:
            dsink = _core.sink_gradient(sink, saved, dout, dlse)
        return *found, dsink, None if dbias is None or bias is None else dbias.reshape(bias.shape)


#: ``Attention.apply`` as it is below Python. What is above it cares for torch.func transforms alone, which the door
#: refuses, at a cost of several microseconds.
_apply: Any = getattr(super(torch.autograd.Function, Attention), "apply", Attention.apply)
_unwrapped: Any = torch._C._functorch.unwrap_if_dead


def _run_kernel(
    p: Prepared, x: Inputs, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, bias: Tensor | None
) -> Result:
    """Forward, in the kernel's layout."""
    if p.direct and bias is None:
        call = Call(q, k, v, p.recorded, p.kernel.name, x.rows_q, x.rows_k, None, x.alibi, None, x.mask, x.block_mask)
    else:
        enter = p.layout.enter
        call = _core.make_call(p, enter(q), enter(k), enter(v), sink, _four_dims(bias), x)
        if p.recorded is not p.spec:
            call = call._replace(spec=p.recorded)
    return _core.forward(p, call, sink)


def _versions(x: Inputs) -> tuple[int, int] | None:
    """Other numbers after a refill of either packing.

    Saved tensors would not tell: hooks may have put copies in their places.
    """
    if x.rows_q is None or x.rows_k is None:
        return None
    return x.rows_q.table._version, x.rows_k.table._version


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
    if not p.needs_backward:
        out, lse, _, _ = _run_kernel(p, x, q, k, v, sink, bias)
        returned = p.layout.leave_lse(lse).float() if p.return_lse and lse is not None else None
        return out if p.layout.is_identity else p.layout.leave(out), returned
    q, k, v = _unwrapped(q), _unwrapped(k), _unwrapped(v)  # of a transform that has ended
    if sink is None and bias is None:
        found = _apply(p, x, q, k, v)
    else:
        sink, bias = None if sink is None else _unwrapped(sink), None if bias is None else _unwrapped(bias)
        found = _apply(p, x, q, k, v, sink, bias)
    return found if isinstance(found, tuple) else (found, None)
