"""``attention`` under ``torch.compile``: one custom op for forward and one for backward.

The op takes flat tensors, ints and a string, and does at run time what eager does: validate, choose, run. So every
backend works under ``fullgraph=True``, and lengths compile twice at most: once as numbers, once as symbols. Tensors
enter as (B, S, H, D) or (T, H, D).
"""

from __future__ import annotations

import ast
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from anyattn import _core, _preparation, _select
from anyattn._call import Result, Rows, Saved
from anyattn._environment import flash_override
from anyattn._errors import PackingError
from anyattn._packing import Packing, check_entries
from anyattn._preparation import Inputs, Prepared
from anyattn._request import Meta, Request, Tensors, is_block_mask
from anyattn._rows import build_table, host_of_table, rows_of_table

_SWAP = {"sbhd": (0, 1), "bhsd": (1, 2)}


# --- what Dynamo traces ---


def attention(
    t: Tensors,
    causal: Any,
    window: Any,
    scale: Any,
    softcap: Any,
    dropout: Any,
    layout: str | None,
    backend: Any,
    deterministic: bool | None,
    return_lse: bool,
    num_splits: int = 1,
) -> Any:
    """``attention`` in terms of traceable torch and the custom op."""
    q, k, v = t.q, t.k, t.v
    for p in (t.packing, t.packing_kv):
        if p is not None and p._holes is not None:
            raise PackingError(
                "a packing from a mask with holes cannot enter a compiled region: use mask=, or pack first"
            )
    device = q.device.type
    if torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        q, k, v = (x.to(low) if x.dtype == torch.float32 else x for x in (q, k, v))
    swap = _SWAP.get(layout or "") if q.ndim == 4 else None
    if swap is not None:
        q, k, v = q.transpose(*swap), k.transpose(*swap), v.transpose(*swap)
    if is_block_mask(t.mask):  # no custom op takes its function
        from anyattn._traced_block_mask import attention as with_block_mask
        from anyattn._traced_block_mask import check_values

        t = t._replace(q=q, k=k, v=v)
        check_values(t, causal, window, softcap, layout)
        got = with_block_mask(t, causal, window, scale, softcap, dropout, backend, deterministic, return_lse)
        if swap is None:
            return got
        return (got[0].transpose(*swap), got[1]) if return_lse else got.transpose(*swap)
    grad = torch.is_grad_enabled()
    preference = _select.traced_preference
    # Comparing two packings' lengths here would make every length a guard: other keys count as of any length.
    relation = "equal" if t.packing is not None and t.packing_kv in (None, t.packing) else "any"
    left, right = (None, None) if window is None else window
    # What may vary from call to call is an argument, so that it can become symbolic.
    counts, factors = [_side(left), _side(right), num_splits], [scale or 0.0, softcap or 0.0, dropout]
    given = scale is not None, softcap is not None
    # Drawn here, where activation checkpointing keeps it the same in the recomputation; on the host, for kernels whose
    # generator only the host can set.
    seed = torch.randint(-(1 << 62), 1 << 62, (2,), dtype=torch.int64, device="cpu") if dropout else None
    static = repr((
        causal, "bshd" if swap is not None else layout, given,
        backend if isinstance(backend, str) else tuple(backend), preference, deterministic,
        torch.are_deterministic_algorithms_enabled(), return_lse, relation,
        grad and (q.requires_grad or k.requires_grad or v.requires_grad),
        grad and t.alibi_slopes is not None and t.alibi_slopes.requires_grad,
        grad and t.sink is not None and t.sink.requires_grad, grad and t.bias is not None and t.bias.requires_grad,
    ))  # fmt: skip
    table_q, sizes_q = _flat(t.packing)
    table_k, sizes_k = _flat(t.packing_kv)
    out, lse, _ = torch.ops.anyattn.attention(
        q, k, v, t.sink, t.alibi_slopes, t.bias, t.mask, table_q, table_k, sizes_q, sizes_k, counts, factors, static,
        seed,
    )  # fmt: skip
    if swap is not None:
        out = out.transpose(*swap)
    return (out, lse.float()) if return_lse else out


def _side(side: int | None) -> int:
    """A side of the window as an int: -1 is None, and negative ones stay wrong."""
    if side is None:
        return -1
    return side if side >= 0 else side - 1


def _flat(packing: Packing | None) -> tuple[Tensor | None, list[int]]:
    """A packing as a tensor and ints, as ``_packing_key`` and ``_rows`` read them."""
    if packing is None:
        return None, []
    facts = packing._facts
    rows = -1 if facts.rows is None else facts.rows
    shape = packing._shape or (-1, -1)
    flags = [int(facts.gaps), int(packing.sanitize)]
    numbers = [facts.sequences, facts.max_seqlen, packing._longest, rows, *flags, packing._entry_rows, *shape]
    return packing._table, numbers


# --- what runs ---


@lru_cache(maxsize=1024)
def _parse(static: str) -> tuple[Any, ...]:
    parsed: tuple[Any, ...] = ast.literal_eval(static)
    return parsed


def _meta(x: Tensor | None, grad: bool) -> Any:
    return None if x is None else Meta(x.shape, x.dtype, x.device, x.__class__, grad)


def _packing_key(q: Tensor, table: Tensor | None, sizes: list[int]) -> tuple[Any, ...] | None:
    """What ``Packing._key`` holds, for the rows that the tensor has."""
    if table is None:
        return None
    sequences, bound, longest, rows, gaps, sanitize, entry_rows, *shape = sizes
    if q.ndim == 4:
        if shape[0] >= 0 and tuple(shape) != q.shape[:2]:
            raise PackingError(
                f"the packing was made from a mask of shape {tuple(shape)}, the batch is {tuple(q.shape[:2])}"
            )
        if sequences != q.shape[0] or longest > q.shape[1]:
            raise PackingError(
                f"with 4-D tensors sequence i lies in batch entry i: the packing has {sequences} sequences of up to "
                f"{longest}, the batch {q.shape[0]} entries of {q.shape[1]}"
            )
        check_entries(entry_rows)
        in_place = rows == q.shape[0] * q.shape[1] and entry_rows == q.shape[1]
        rows, gaps = q.shape[0] * q.shape[1], gaps if in_place else True
        bound = min(bound, q.shape[1])
    return sequences, bound, None if rows < 0 else rows, bool(gaps), None, bool(sanitize), table.device, False


def _request(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    alibi: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    table_q: Tensor | None,
    table_k: Tensor | None,
    sizes_q: list[int],
    sizes_k: list[int],
    counts: list[int],
    factors: list[float],
    static: str,
) -> Request:
    causal, layout, given, backend, preference, *more = _parse(static)
    *sides, num_splits = counts
    left, right = (None if side == -1 else side + (side < 0) for side in sides)
    window = None if left is None and right is None else (left, right)
    scale, softcap = (factor if there else None for factor, there in zip(factors[:2], given, strict=True))
    dropout = factors[2]
    deterministic, torch_deterministic, return_lse, relation, grad, alibi_grad, sink_grad, bias_grad = more
    return Request(
        _meta(q, grad), _meta(k, grad), _meta(v, grad), causal, window, scale, softcap, _meta(sink, sink_grad),
        _meta(alibi, alibi_grad), _meta(bias, bias_grad), _meta(mask, False), dropout, layout,
        _packing_key(q, table_q, sizes_q), _packing_key(k, table_k, sizes_k), relation, backend,
        preference or _select.environment_preference(), deterministic, torch_deterministic, return_lse, None,
        flash_override(), num_splits,
    )  # fmt: skip


def _rows(x: Tensor, table: Tensor | None, sizes: list[int], gaps: bool) -> Rows | None:
    if table is None:
        return None
    sequences, longest, _, rows, _, _, entry_rows, *_ = sizes
    if x.ndim == 4:
        longest = min(longest, x.shape[1])
    if x.ndim == 4 and not (rows == x.shape[0] * x.shape[1] and entry_rows == x.shape[1]):
        lengths = rows_of_table(table, sequences, longest, True, None).lengths
        cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)])
        starts = torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device) * x.shape[1]
        table = build_table(cu, starts, x.shape[0] * x.shape[1])
    return rows_of_table(table, sequences, longest, gaps, host_of_table(table, sequences))


_prepared: dict[Request, Prepared] = {}
#: What forward ran last for a request: backward must not choose anew, whatever has become of the choice since.
_ran: dict[Request, Prepared] = {}
_select.caches.append(_prepared)


def _prepare(request: Request) -> Prepared:
    prepared = _prepared.get(request)
    if prepared is None:
        if len(_prepared) >= 4096:
            _prepared.clear()
        prepared = _prepared[request] = _preparation.prepare(request)
    return prepared


def _drop(request: Request) -> None:
    """Choose anew for a request."""
    _prepared.pop(request, None)


def _inputs(
    request: Request,
    q: Tensor,
    k: Tensor,
    alibi: Tensor | None,
    mask: Tensor | None,
    table_q: Tensor | None,
    table_k: Tensor | None,
    sizes_q: list[int],
    sizes_k: list[int],
    seed: Tensor | None,
) -> Inputs:
    if request.packing is None:
        return Inputs(None, None, alibi, _four_dims(mask), None, seed)
    rows_q = _rows(q, table_q, sizes_q, request.packing[3])
    rows_k = rows_q
    if request.packing_kv is not None:
        rows_k = _rows(k, table_k, sizes_k, request.packing_kv[3])
    return Inputs(rows_q, rows_k, alibi, _four_dims(mask), None, seed)


def _four_dims(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape((1,) * (4 - x.ndim) + tuple(x.shape))


@torch.library.custom_op("anyattn::attention", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    alibi: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    table_q: Tensor | None,
    table_k: Tensor | None,
    sizes_q: list[int],
    sizes_k: list[int],
    counts: list[int],
    factors: list[float],
    static: str,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    request = _request(q, k, v, sink, alibi, bias, mask, table_q, table_k, sizes_q, sizes_k, counts, factors, static)
    x = _inputs(request, q, k, alibi, mask, table_q, table_k, sizes_q, sizes_k, seed)

    def run(p: Prepared) -> tuple[Prepared, Result]:
        enter = p.layout.enter
        call = _core.make_call(p, enter(q), enter(k), enter(v), sink, _four_dims(bias), x)
        return p, _core.forward(p, call, sink)

    p, (out, lse, rng, _) = _preparation.run_accepted(lambda: _prepare(request), run, lambda: _drop(request))
    if len(_ran) >= 4096:
        _ran.clear()
    _ran[request] = p
    layout = p.layout
    lse = out.new_empty(_lse_shape(q), dtype=p.lse_dtype) if lse is None else layout.leave_lse(lse).contiguous()
    rng = out.new_empty(2, dtype=torch.int64) if rng is None else rng.to(out.device, non_blocking=True, copy=True)
    return layout.leave(out).contiguous(), lse, rng


def _lse_shape(q: Tensor) -> tuple[int, ...]:
    return (q.shape[1], q.shape[0]) if q.ndim == 3 else (q.shape[0], q.shape[2], q.shape[1])


@_forward_op.register_fake
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    alibi: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    table_q: Tensor | None,
    table_k: Tensor | None,
    sizes_q: list[int],
    sizes_k: list[int],
    counts: list[int],
    factors: list[float],
    static: str,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return out, q.new_empty(_lse_shape(q), dtype=dtype), q.new_empty(2, dtype=torch.int64)


@torch.library.custom_op("anyattn::attention_backward", mutates_args=())
def _backward_op(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    alibi: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    table_q: Tensor | None,
    table_k: Tensor | None,
    sizes_q: list[int],
    sizes_k: list[int],
    counts: list[int],
    factors: list[float],
    static: str,
    out: Tensor,
    lse: Tensor,
    rng: Tensor,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    request = _request(q, k, v, sink, alibi, bias, mask, table_q, table_k, sizes_q, sizes_k, counts, factors, static)
    p = _ran.get(request) or _prepare(request)
    x = _inputs(request, q, k, alibi, mask, table_q, table_k, sizes_q, sizes_k, seed)
    enter, layout = p.layout.enter, p.layout
    call = _core.make_call(p, enter(q), enter(k), enter(v), None, _four_dims(bias), x)
    saved = Saved(enter(out), p.layout.enter_lse(lse), rng)
    dout = enter(dout)
    dlse = None if dlse is None else p.layout.enter_lse(dlse)
    dq, dk, dv, dbias = _core.backward(p, call, saved, dout, dlse)
    none = q.new_empty(0)
    dsink = none
    if sink is not None and request.sink is not None and request.sink.requires_grad:
        dsink = _core.sink_gradient(sink, saved, dout, dlse)
    wanted = request.bias is not None and request.bias.requires_grad
    shaped = dbias.reshape(bias.shape) if wanted and dbias is not None and bias is not None else none.clone()
    dq, dk, dv = layout.leave(dq).contiguous(), layout.leave_keys(dk).contiguous(), layout.leave_keys(dv).contiguous()
    return dq, dk, dv, dsink, shaped.contiguous()


@_backward_op.register_fake
def _backward_fake(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    alibi: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    table_q: Tensor | None,
    table_k: Tensor | None,
    sizes_q: list[int],
    sizes_k: list[int],
    counts: list[int],
    factors: list[float],
    static: str,
    out: Tensor,
    lse: Tensor,
    rng: Tensor,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, sink_grad, bias_grad = _parse(static)
    dsink = sink.new_empty(sink.shape) if sink is not None and sink_grad else q.new_empty(0)
    dbias = bias.new_empty(bias.shape) if bias is not None and bias_grad else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsink, dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, sink, alibi, bias, mask, table_q, table_k, sizes_q, sizes_k, counts, factors, static, seed = inputs
    ctx.save_for_backward(q, k, v, sink, alibi, bias, mask, table_q, table_k, *output, seed)
    ctx.sizes_q, ctx.sizes_k, ctx.counts, ctx.factors, ctx.static = sizes_q, sizes_k, counts, factors, static


def _backward(ctx: Any, dout: Tensor, dlse: Tensor | None, drng: Tensor | None) -> tuple[Any, ...]:
    q, k, v, sink, alibi, bias, mask, table_q, table_k, out, lse, rng, seed = ctx.saved_tensors
    static = _parse(ctx.static)
    return_lse, *_, sink_grad, bias_grad = static[7:]
    dlse = dlse if return_lse else None
    dq, dk, dv, dsink, dbias = torch.ops.anyattn.attention_backward(
        dout,
        dlse,
        q,
        k,
        v,
        sink,
        alibi,
        bias,
        mask,
        table_q,
        table_k,
        ctx.sizes_q,
        ctx.sizes_k,
        ctx.counts,
        ctx.factors,
        ctx.static,
        out,
        lse,
        rng,
        seed,
    )
    return dq, dk, dv, dsink if sink_grad else None, None, dbias if bias_grad else None, *(None,) * 9


_forward_op.register_autograd(_backward, setup_context=_setup_context)
