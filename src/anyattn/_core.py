"""A prepared call: forward and backward around one kernel.

Everything that no kernel should have to know is here, once: layouts, padding, sinks, empty problems, the gradient of
lse. Legend: B batch, S seq, H heads, D head_dim, T rows of a packed batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyattn._call import Backend, Call, Gradients, Result, Saved
from anyattn._padding import fill_gaps, pad_dims, zero_padding
from anyattn._preparation import Inputs, Prepared
from anyattn._rows import valid_rows

NEG_INF = float("-inf")


def on_current_device(p: Prepared) -> bool:
    """Whether kernels launched now go to the tensors' device."""
    return p.device is None or p.device == torch.cuda.current_device()


# --- forward ---


def make_call(
    p: Prepared, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, bias: Tensor | None, x: Inputs
) -> Call:
    """What the kernel gets: tensors in its layouts and head dims, sanitized if asked."""
    if p.sanitize and x.rows_q is not None and x.rows_k is not None:
        valid_k = valid_rows(x.rows_k, k.shape[0])
        shared = x.rows_q is x.rows_k and q.shape[0] == k.shape[0]
        q = zero_padding(q, valid_k if shared else valid_rows(x.rows_q, q.shape[0]))
        k, v = zero_padding(k, valid_k), zero_padding(v, valid_k)
    if p.dims is not None:
        q, k, v = pad_dims(q, p.dims[0]), pad_dims(k, p.dims[0]), pad_dims(v, p.dims[1])
    return Call(
        q, k, v, p.spec, p.kernel.name, x.rows_q, x.rows_k,
        None if p.core_sink else sink, x.alibi, bias, x.mask, x.block_mask, x.seed,
    )  # fmt: skip


def forward(p: Prepared, call: Call, sink: Tensor | None) -> Result:
    """Run the kernel; apply the sink; make padding exact."""
    if p.final:
        return p.backend.forward(call)
    if p.empty:
        out, lse, rng, held = _empty_result(p, call)
    elif on_current_device(p):
        out, lse, rng, held = p.backend.forward(call)
    else:
        with torch.cuda.device(p.device):
            out, lse, rng, held = p.backend.forward(call)
    if sink is not None and (p.core_sink or p.empty):
        assert lse is not None
        out, lse = apply_sink(out, lse, sink, in_place=held is None)
    if p.dims is not None:
        out = _cut(out, p.layout.head_dim_v)
    if p.fill_q or p.fill_lse:
        assert call.rows_q is not None
        rows, of_out = call.rows_q, (_unversioned(out, held), 0, 0.0)
        if not p.fill_lse or lse is None:
            fill_gaps(rows, of_out)
        else:
            fill_gaps(rows, *((of_out,) if p.fill_q else ()), (_unversioned(lse, held), 1, NEG_INF))
    return Result(out, lse, rng, held)


def _unversioned(x: Tensor, held: object) -> Tensor:
    """The tensor as writes to padding see it: one that a held graph saved may have other rows of padding, not be newer.

    Nothing flows back through padding: its gradient is zero whatever it holds.
    """
    return x if held is None else x.data


def _cut(x: Tensor, dim: int) -> Tensor:
    """The first columns of x."""
    return x if x.shape[-1] == dim else x[..., :dim].contiguous()


def _empty_result(p: Prepared, call: Call) -> Result:
    q, heads = call.q, call.q.shape[-2]
    out = q.new_zeros(*q.shape[:-1], call.v.shape[-1])
    shape = (heads, q.shape[0]) if p.packed else (q.shape[0], heads, q.shape[1])
    return Result(out, q.new_full(shape, NEG_INF, dtype=p.lse_dtype))


def _per_row(x: Tensor) -> Tensor:
    """From lse's layout, (B, H, S) or (H, T), to out's with one column."""
    return x.transpose(-1, -2).unsqueeze(-1)


def apply_sink(out: Tensor, lse: Tensor, sink: Tensor, *, in_place: bool = True) -> tuple[Tensor, Tensor]:
    """Let one more logit without a value join a softmax. A row that sees no key gets the sink's lse."""
    logit = sink.detach().to(lse.dtype)[:, None]
    total = torch.logaddexp(lse, logit)
    share = torch.exp(lse - total).masked_fill_(~lse.isfinite(), 0.0)  # nothing seen, or padding; not a sink of NaN
    factor = _per_row(share)  # the product is computed in its precision, and rounded once
    return out.mul_(factor) if in_place else (out * factor).to(out.dtype), total


# --- backward ---


def backward(p: Prepared, call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None) -> Gradients:
    """Run the kernel's backward; make padding exact. out and lse are the final ones, so sinks need nothing more."""
    if p.empty:
        zeros = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (call.q, call.k, call.v)]
        none = Gradients(zeros[0], zeros[1], zeros[2], None if call.bias is None else torch.zeros_like(call.bias))
        return _cut_gradients(p, none)
    if p.sanitize and call.rows_q is not None:
        dout = zero_padding(dout, valid_rows(call.rows_q, dout.shape[0]))
    if 0 in dout.stride():  # expanded, as by sum(): not every kernel takes that
        dout = dout.contiguous()
    if p.dims is not None:
        saved, dout = saved._replace(out=pad_dims(saved.out, p.dims[1])), pad_dims(dout, p.dims[1])
    if on_current_device(p):
        gradients = _kernel_backward(p, call, saved, dout, dlse)
    else:
        with torch.cuda.device(p.device):
            gradients = _kernel_backward(p, call, saved, dout, dlse)
    gradients = _cut_gradients(p, gradients)
    _fill_gradients(p, call, gradients)
    return gradients


def _fill_gradients(p: Prepared, call: Call, g: Gradients) -> None:
    """Zeros in the gradients' gaps, in one launch where queries and keys have the same."""
    dq, dk, dv = ((x, 0, 0.0) for x in (g.dq, g.dk, g.dv))
    if p.fill_q and p.fill_k and call.rows_q is call.rows_k and g.dq.shape[0] == g.dk.shape[0]:
        assert call.rows_q is not None
        fill_gaps(call.rows_q, dq, dk, dv)
        return
    if p.fill_q:
        assert call.rows_q is not None
        fill_gaps(call.rows_q, dq)
    if p.fill_k:
        assert call.rows_k is not None
        fill_gaps(call.rows_k, dk, dv)


def _cut_gradients(p: Prepared, g: Gradients) -> Gradients:
    """Without the columns that were added to q, k and v."""
    if p.dims is None:
        return g
    head_dim, head_dim_v = p.layout.head_dim, p.layout.head_dim_v
    return Gradients(_cut(g.dq, head_dim), _cut(g.dk, head_dim), _cut(g.dv, head_dim_v), g.dbias)


def _kernel_backward(p: Prepared, call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None) -> Gradients:
    if dlse is not None:  # rows that see nothing: whatever arrives there (the gradient of -inf may be infinite)
        dlse = dlse.to(saved.lse.dtype).masked_fill(saved.lse == NEG_INF, 0.0)
    if dlse is None or p.kernel.native_lse_grad:
        return p.backend.backward(call, saved, dout, dlse)
    return _augmented_backward(p.backend, call, saved, dout, dlse)


def _augmented_backward(backend: Backend, call: Call, saved: Saved, dout: Tensor, dlse: Tensor) -> Gradients:
    """The gradient of lse through a kernel that knows none, exactly.

    A backward uses lse only through out . dout per row. One more column, zero in v, one in out and -dlse in dout,
    turns that into out . dout - dlse, and nothing else sees it. The dims grow by 8, which every kernel takes.
    """
    head_dim, head_dim_v = call.q.shape[-1], call.v.shape[-1]
    grown = pad_dims(dout, head_dim_v + 8)
    grown[..., head_dim_v] = -_per_row(dlse).squeeze(-1).to(dout.dtype)
    out = pad_dims(saved.out, head_dim_v + 8)
    out[..., head_dim_v] = 1.0
    wider = Call(
        pad_dims(call.q, head_dim + 8), pad_dims(call.k, head_dim + 8), pad_dims(call.v, head_dim_v + 8), call.spec,
        call.kernel, call.rows_q, call.rows_k, None, call.alibi, call.bias, call.mask, call.block_mask, call.seed,
    )  # fmt: skip
    got = backend.backward(wider, Saved(out, saved.lse, saved.rng), grown, None)
    cut = [x[..., :dim].contiguous() for x, dim in zip(got[:3], (head_dim, head_dim, head_dim_v), strict=True)]
    return Gradients(cut[0], cut[1], cut[2], got.dbias)


def sink_gradient(sink: Tensor, saved: Saved, dout: Tensor, dlse: Tensor | None) -> Tensor:
    """The sink's gradient from the final out and lse: its softmax share times (dlse - dout . out), summed over rows."""
    lse = saved.lse
    share = torch.exp(sink.detach().to(lse.dtype)[:, None] - lse)
    dot = (dout.to(lse.dtype) * saved.out.to(lse.dtype)).sum(-1).transpose(-1, -2)
    per_row = share * (-dot if dlse is None else dlse - dot)
    per_row = per_row.masked_fill(lse == NEG_INF, 0.0)  # padding, whatever dout holds there
    per_head = per_row.sum(-1)
    return (per_head.sum(0) if per_head.ndim == 2 else per_head).to(sink.dtype)
