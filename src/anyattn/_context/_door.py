"""``attention(..., plan=...)``: agreement, flattening, and what a plan keeps for the calls of its layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn import _environment, _preparation, _select
from anyattn._context import _cost, _kernel, _schedule, _tables
from anyattn._context._agreement import OthersFailed
from anyattn._context._attention import ContextAttention, Run
from anyattn._context._checks import Asked, checked, is_known, request_of
from anyattn._context._exchange import head_start_of
from anyattn._context._heads import HeadExchange, HeadShares
from anyattn._context._kernel import Options, Terms
from anyattn._context._plan import ContextPlan
from anyattn._context._schedule import Job
from anyattn._context._shards import check_not_captured
from anyattn._context._tables import CallTables, Tables
from anyattn._errors import ContextError, DeviceError
from anyattn._explanation import Explanation
from anyattn._request import (
    Request,
    Tensors,
    as_tuple,
    autocast_dtype,
    describe_optional,
    refuse_transforms,
)
from anyattn._validate import Sizes


def attention(t: Tensors, asked: Asked, plan: Any) -> Any:
    """Attention of this rank's shards; see ``anyattn.attention``."""
    refuse_transforms(*t)
    if not isinstance(plan, ContextPlan):
        raise ContextError(f"plan must be a ContextPlan, got {type(plan).__name__}: make one with ContextParallel.plan")
    plan._connected()
    kind = _kind(t, asked, plan)
    if kind is None or kind not in plan._agreed:
        _agree(t, asked, plan, kind)
    if (t.bias is not None or t.mask is not None) and (sizes := checked(t, asked, plan)).batch:
        out, lse = _entry_by_entry(plan, t, asked, sizes)
    else:
        out, lse = _at_once(plan, t, asked, kind)
    return (out, lse) if asked.return_lse else out


def _at_once(plan: ContextPlan, t: Tensors, asked: Asked, kind: Any) -> tuple[Tensor, Tensor | None]:
    """All batch entries in one run, in the caller's layout."""
    settled: _Settled | None = plan._checked.get(kind) if kind is not None and _same_packings(t, plan) else None
    if settled is None:
        sizes = checked(t, asked, plan)
        run = _run(plan, t._replace(bias=None, mask=None), asked, _entered(t, sizes.layout), sizes.batch)
        settled = _Settled(sizes, replace(run, terms=Terms()))
        if len(plan._checked) >= KINDS:
            plan._checked.clear()
        if kind is not None and t.bias is None and t.mask is None:
            plan._checked[kind] = settled
    sizes, run = settled
    slopes = None if t.alibi_slopes is None else t.alibi_slopes.detach()
    run = replace(run, terms=Terms(slopes, None, None, _seed(asked, plan._data.rank)))
    rows = _rows_of(t, sizes.layout)
    out: Tensor
    out, lse = ContextAttention.apply(run, *rows, t.sink, None)  # type: ignore[no-untyped-call]
    if t.bias is not None:  # an empty batch: its gradient is zero, and not missing
        out = out + 0 * t.bias.sum().to(out.dtype)
    if sizes.layout == "thd":
        return out, lse
    entries = (sizes.batch, plan.rows)
    lse = None if lse is None else lse.unflatten(1, entries).transpose(0, 1)
    return _leave(out.unflatten(0, entries), sizes.layout), lse


#: Of calls, that a plan remembers.
KINDS = 1024


class _Settled(NamedTuple):
    """What calls of one kind under a plan have in common."""

    sizes: Sizes
    run: Run


def _same_packings(t: Tensors, plan: ContextPlan) -> bool:
    """Packings, where given, are known to be the plan's."""
    return all(x is None or is_known(x, plan) for x in (t.packing, t.packing_kv))


def _cast(t: Tensors) -> Iterator[Tensor]:
    """q, k and v in the dtype to compute in, the head dim in one run."""
    cast = autocast_dtype(t.q.device.type)
    for x in (t.q, t.k, t.v):
        y = x.to(cast) if cast is not None and x.dtype == torch.float32 else x
        yield y if y.stride(-1) == 1 else y.contiguous()


def _entered(t: Tensors, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as (batch, rows, heads, dim)."""
    q, k, v = (_enter(x, layout) for x in _cast(t))
    return q, k, v


def _rows_of(t: Tensors, layout: str) -> tuple[Tensor, ...]:
    """q, k and v as (batch * rows, heads, dim)."""
    return tuple(_cast(t)) if layout == "thd" else tuple(_enter(x, layout).flatten(0, 1) for x in _cast(t))


def _kind(t: Tensors, asked: Asked, plan: ContextPlan) -> Any:
    """What calls that are checked and agreed about together have in common; None where that cannot be told."""
    try:
        kind = (request_of(t, asked, plan), asked, describe_optional(t.bias, True), describe_optional(t.mask, True))
        hash(kind)
    except (TypeError, AttributeError, ContextError):
        return None
    return kind


def _agree(t: Tensors, asked: Asked, plan: ContextPlan, kind: Any) -> None:
    """Check and choose everything, then hear whether all ranks can go on; before anything travels.

    Raises:
        AnyattnError: on every rank, if any of them finds something wrong.
    """
    failure: Exception | None = None
    try:
        requests = _requests(t, asked, plan)[1]
        if t.q.is_meta:
            raise DeviceError("q is on meta, which explain() takes; attention() computes: move the tensors to a device")
        for asks in requests:
            _kernel.prepared(asks)
    except Exception as error:  # whatever it is, the others must hear of it
        failure = error
    try:
        plan._agree_on(kind, _alike(t, asked), failure)
    except OthersFailed as others:
        _fail_alike(t, asked, plan, others)


def _alike(t: Tensors, asked: Asked) -> dict[str, object]:
    """What must be alike on all ranks, by name: all but devices and data."""
    tensors = [x if isinstance(x, Tensor) else None for x in (t.q, t.k, t.v, t.sink, t.alibi_slopes, t.bias, t.mask)]
    grad = torch.is_grad_enabled()
    found: dict[str, object] = {
        "shapes": [None if x is None else tuple(x.shape) for x in tensors],
        "dtypes": [None if x is None else str(x.dtype) for x in tensors],
        "requires_grad": [x is not None and grad and x.requires_grad for x in tensors],
        "autocast": str(autocast_dtype(t.q.device.type)) if isinstance(t.q, Tensor) else None,
    }
    return found | asked._asdict()


def _fail_alike(t: Tensors, asked: Asked, plan: ContextPlan, others: OthersFailed) -> None:
    """Raise what another rank raises; a rank that computes nothing has found nothing wrong by itself."""
    there = ContextPlan(replace(plan._data, rank=others.ranks[0]), plan._members)
    for asks in _requests(t, asked, there)[1]:
        _kernel.prepared(asks)
    raise ContextError(str(others)) from None


@torch._dynamo.disable(  # type: ignore[untyped-decorator]
    reason="attention(plan=...) communicates, which is not for the compiler: leave out fullgraph=True"
)
def breaking(t: Tensors, asked: Asked, plan: Any) -> Any:
    """The same from a compiled region, which breaks here: what travels is not for the compiler."""
    return attention(t, asked, plan)


def _enter(x: Tensor, layout: str) -> Tensor:
    """(batch, rows, heads, dim) of any layout."""
    if layout == "thd":
        return x[None]
    return x.transpose(0, 1) if layout == "sbhd" else x.transpose(1, 2) if layout == "bhsd" else x


def _leave(x: Tensor, layout: str) -> Tensor:
    """To a 4-D layout."""
    return x.transpose(0, 1) if layout == "sbhd" else x.transpose(1, 2) if layout == "bhsd" else x


def _entry_by_entry(plan: ContextPlan, t: Tensors, asked: Asked, sizes: Sizes) -> tuple[Tensor, Tensor | None]:
    """Terms over (seq_q, seq_k): a batch entry at a time, for kernels take them with 4-D tensors only."""
    outs: list[Tensor] = []
    lses: list[Any] = []
    seed = _seed(asked, plan._data.rank)
    for i, (q, k, v) in enumerate(zip(*(x.unbind() for x in _entered(t, sizes.layout)), strict=True)):
        one = _only(t, i)
        run = _run(plan, one, asked, (q[None], k[None], v[None]), 1, None if seed is None else seed + (i << 30))
        out, lse = ContextAttention.apply(run, q, k, v, t.sink, one.bias)  # type: ignore[no-untyped-call]
        outs.append(out)
        lses.append(lse)
    return _leave(torch.stack(outs), sizes.layout), None if lses[0] is None else torch.stack(lses)


def _only(t: Tensors, i: int) -> Tensors:
    """What belongs to one batch entry, of all but q, k and v."""
    slopes = t.alibi_slopes
    slopes = slopes[i : i + 1] if slopes is not None and slopes.ndim == 2 else slopes
    return t._replace(alibi_slopes=slopes, bias=_entry(t.bias, i), mask=_entry(t.mask, i))


def _entry(term: Any, i: int) -> Any:
    """One batch entry of a term, 4-D."""
    if term is None:
        return None
    whole = term.reshape((1,) * (4 - term.ndim) + tuple(term.shape))
    return whole[i : i + 1] if whole.shape[0] > 1 else whole


def explain(t: Tensors, asked: Asked, plan: Any, installed: Any, arch: int | None) -> Explanation:
    """Which kernel runs this rank's largest call, and why no other."""
    if not isinstance(plan, ContextPlan):
        raise ContextError(f"plan must be a ContextPlan, got {type(plan).__name__}: make one with ContextParallel.plan")
    calls, requests = _requests(t, asked, plan)
    if not calls:
        raise ContextError("this rank has nothing to compute under this plan: no kernel is chosen")
    sizes = [sum(e.len_q * e.len_k for e in call.call.entries) for call in calls]

    def choose(request: Request) -> tuple[Explanation, Explanation]:
        told = _preparation.explain(request, installed, arch)
        return told, told

    return _kernel.chosen(requests[sizes.index(max(sizes))], choose)


def _requests(t: Tensors, asked: Asked, plan: ContextPlan) -> tuple[list[CallTables], list[tuple[Request, ...]]]:
    """This rank's kernel calls, and what each asks of the choice of a kernel; checked."""
    sizes = checked(t, asked, plan)
    if not sizes.batch:
        return [], []
    q, k, v = (_enter(x, sizes.layout) for x in (t.q, t.k, t.v))
    cast = autocast_dtype(t.q.device.type)
    dtype = cast if cast is not None and q.dtype == torch.float32 else q.dtype
    dense = t.bias is not None or t.mask is not None
    one = _only(t, 0) if dense else t
    run = _run(plan, one, asked, (q, k, v), 1 if dense else sizes.batch)
    heads = (q.shape[2], k.shape[2]) if run.heads is None else (run.heads.share.heads, run.heads.share.slots)
    parts = [
        torch.empty(1, dtype=dtype, device=x.device).expand(1, of, x.shape[-1])
        for x, of in ((q, heads[0]), (k, heads[1]), (v, heads[1]))
    ]
    found: dict[tuple[Request, ...], CallTables] = {}
    for unit in _schedule.units_of(run.job, parts[0], parts[1]):
        terms = _schedule.terms_of(run.terms._replace(seed=None), unit.heads.q, 0)
        for call in unit.stage.calls:
            rows = (call.q[1] - call.q[0], call.k[1] - call.k[0])
            mine = parts[0][:, unit.heads.q].expand(rows[0], -1, -1)
            keys, values = (x[:, unit.heads.k].expand(rows[1], -1, -1) for x in parts[1:])
            asks = _schedule.kernel_of(run.job, call).requests(mine, keys, values, terms)
            found.setdefault(asks, call)
    return list(found.values()), list(found)


# --- one call ---


def _run(
    plan: ContextPlan, t: Tensors, asked: Asked, qkv: tuple[Tensor, ...], batch: int, seed: int | None = None
) -> Run:
    q, k, v = qkv
    data = plan._data
    alibi = t.alibi_slopes is not None
    dense = t.bias is not None or t.mask is not None
    tables = tables_of(plan, q.device, batch, alibi=alibi, dense=dense)
    grad = torch.is_grad_enabled()
    needs = grad and any(x is not None and x.requires_grad for x in (q, k, v, t.sink, t.bias))
    torch_deterministic = torch.are_deterministic_algorithms_enabled()
    options = Options(
        q.shape[-1] ** -0.5 if asked.scale is None else float(asked.scale),
        asked.softcap,
        asked.dropout,
        asked.backend if isinstance(asked.backend, str) else as_tuple(asked.backend),
        _select.default_preference(),
        asked.deterministic,
        torch_deterministic,
        needs,
        grad and t.bias is not None and t.bias.requires_grad,
        needs and asked.return_lse,
        _environment.flash_override(),
        asked.num_splits,
    )
    shape = data.topology
    groups = (plan._members.groups if plan._members is not None else None) or (None, None)
    sequence_group = groups[0] if shape.sequence > 1 else None
    heads = None
    if shape.heads > 1:
        heads = HeadExchange(HeadShares(shape.heads, q.shape[2], k.shape[2]), groups[-1])
    few = not alibi and data.keeps((q.shape[2], k.shape[2]), q.shape[3] + v.shape[3])
    parts = _groups(plan, batch, q, k, v) if heads is None else 1
    job = Job(tables, options, sequence_group, parts, few=few, keep=few and needs, dense=dense)
    if _seconds(plan, batch, q, v) > LEAST:
        halves = heads is None and not few and k.shape[2] % 2 == 0
        job = replace(job, halves=halves, head_start=head_start_of(sequence_group, q.device))
    slopes = None if t.alibi_slopes is None else t.alibi_slopes.detach()
    assert t.mask is None or isinstance(t.mask, Tensor)
    terms = Terms(slopes, t.bias, t.mask, seed)
    return Run(job, heads, data.rank % shape.heads, terms, asked.return_lse)


#: A part that computes for less than this many seconds takes the host longer than the device.
LEAST = 4e-4


def _seconds(plan: ContextPlan, batch: int, q: Tensor, v: Tensor) -> float:
    """Roughly, of a rank's forward; the same on all ranks."""
    flops = 2 * plan._mean_area * batch * q.shape[2] * (q.shape[-1] + v.shape[-1])
    return flops / _cost.default_gpu().forward


def _groups(plan: ContextPlan, batch: int, q: Tensor, k: Tensor, v: Tensor) -> int:
    """In how many parts the key heads of a stage travel, so that one arrives while another is used; alike on all ranks.

    A window moves little: one part. Where short documents stay whole, only those that are cut count.
    """
    data = plan._data
    if data.topology.sequence == 1 or data.mask.left is not None:
        return 1
    share = plan._travelling * _seconds(plan, batch, q, v)
    stages = data.topology.sequence if data.is_ring else 1
    return gcd(k.shape[2], 4 if share > 8 * LEAST * stages * 4 else 2 if share > 4 * LEAST * stages else 1)


def _seed(asked: Asked, rank: int) -> int | None:
    """Drawn from torch's generator on the host; no two ranks drop alike."""
    if not asked.dropout:
        return None
    drawn = int(torch.randint(0, 1 << 40, (), dtype=torch.int64, device="cpu"))
    return drawn * 8191 + rank * 1000003


def tables_of(plan: ContextPlan, device: torch.device, batch: int, *, alibi: bool, dense: bool) -> Tables:
    """A plan on a device, made at the first call that needs it so."""
    key = (device, batch, alibi, dense)
    found = plan._tables.get(key)
    if found is None:
        check_not_captured(device)
        with torch.inference_mode(False):
            data = plan._data.batched(batch)
            found = plan._tables[key] = _tables.build(data, device, alibi=alibi, dense=dense)
    return found
