"""``attention(..., plan=...)``: checks, flattening, and what a plan keeps for the calls of its layers."""

from __future__ import annotations

from dataclasses import replace
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn import _core, _environment, _select
from anyattn._context import _cost, _kernel, _schedule, _tables
from anyattn._context._agreement import OthersFailed
from anyattn._context._attention import ContextAttention, Run
from anyattn._context._heads import HeadExchange, shares
from anyattn._context._kernel import Options, Terms
from anyattn._context._plan import ContextPlan, normal_mask
from anyattn._context._plan_data import check_features
from anyattn._context._schedule import Job
from anyattn._context._shards import check_not_captured
from anyattn._context._tables import CallTables, Tables
from anyattn._context._topology import Members
from anyattn._errors import ContextError, DeviceError, ShapeError, Unsupported
from anyattn._explanation import Explanation
from anyattn._packing import Packing
from anyattn._request import (
    Request,
    Tensors,
    as_tuple,
    autocast_dtype,
    describe,
    describe_optional,
    is_block_mask,
    refuse_transforms,
)
from anyattn._validate import Sizes, validate


class Asked(NamedTuple):
    """The arguments of a call that are no tensors."""

    causal: Any
    window: Any
    scale: Any
    softcap: Any
    dropout: Any
    layout: Any
    backend: Any
    deterministic: Any
    return_lse: bool


def attention(t: Tensors, asked: Asked, plan: Any) -> Any:
    """Attention of this rank's shards; see ``anyattn.attention``."""
    refuse_transforms()
    if not isinstance(plan, ContextPlan):
        raise ContextError(f"plan must be a ContextPlan, got {type(plan).__name__}: make one with ContextParallel.plan")
    plan.connected()
    kind = _kind(t, asked, plan)
    if kind is None or kind not in plan._agreed:
        _agree(t, asked, plan, kind)
    sizes = _checked(t, asked, plan)
    batch, seed = sizes.batch, _seed(asked, plan._data.rank)
    cast = autocast_dtype(t.q.device.type)
    q, k, v = (x.to(cast) if cast is not None and x.dtype == torch.float32 else x for x in (t.q, t.k, t.v))
    q, k, v = (_enter(x if x.stride(-1) == 1 else x.contiguous(), sizes.layout) for x in (q, k, v))
    if (t.bias is not None or t.mask is not None) and batch:
        out, lse = _entry_by_entry(plan, t, asked, (q, k, v), batch, seed)
    else:
        run = _run(plan, t._replace(bias=None, mask=None), asked, (q, k, v), batch, seed)
        out, lse = ContextAttention.apply(run, *(x.flatten(0, 1) for x in (q, k, v)), t.sink, None)  # type: ignore[no-untyped-call]
        out = out.unflatten(0, (batch, plan.rows))
        if t.bias is not None:  # an empty batch: its gradient is zero, and not missing
            out = out + 0 * t.bias.sum().to(out.dtype)
        lse = None if lse is None else lse.unflatten(1, (batch, plan.rows)).transpose(0, 1)
    out = _leave(out, sizes.layout)
    if not asked.return_lse:
        return out
    assert lse is not None
    return out, lse[0] if sizes.layout == "thd" else lse


def _kind(t: Tensors, asked: Asked, plan: ContextPlan) -> Any:
    """What calls that are checked and agreed about together have in common; None where that cannot be told."""
    try:
        kind = (_request(t, asked, plan), asked, describe_optional(t.bias, True), describe_optional(t.mask, True))
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
        for request in requests:
            _kernel.prepared(request)
    except Exception as error:  # whatever it is, the others must hear of it
        failure = error
    try:
        plan.agree(kind, _alike(t, asked), failure)
    except OthersFailed as others:
        _fail_alike(t, asked, plan, others)


def _alike(t: Tensors, asked: Asked) -> object:
    """What must be alike on all ranks: all but devices and data."""
    tensors = (t.q, t.k, t.v, t.sink, t.alibi_slopes, t.bias, t.mask)
    described = [
        (tuple(x.shape), str(x.dtype), x.requires_grad and torch.is_grad_enabled()) if isinstance(x, Tensor) else None
        for x in tensors
    ]
    return described, asked, autocast_dtype(t.q.device.type) if isinstance(t.q, Tensor) else None


def _fail_alike(t: Tensors, asked: Asked, plan: ContextPlan, others: OthersFailed) -> None:
    """Raise what another rank raises; a rank that computes nothing has found nothing wrong by itself."""
    there = ContextPlan(replace(plan._data, rank=others.ranks[0]), plan._members)
    for request in _requests(t, asked, there)[1]:
        _kernel.prepared(request)
    raise others


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
    if layout == "thd":
        return x[0]
    return x.transpose(0, 1) if layout == "sbhd" else x.transpose(1, 2) if layout == "bhsd" else x


def _entry_by_entry(
    plan: ContextPlan, t: Tensors, asked: Asked, qkv: tuple[Tensor, ...], batch: int, seed: int | None
) -> tuple[Tensor, Tensor | None]:
    """Terms over (seq_q, seq_k): a batch entry at a time, for kernels take them with 4-D tensors only."""
    outs: list[Tensor] = []
    lses: list[Any] = []
    for i in range(batch):
        one = t._replace(bias=_entry(t.bias, i), mask=_entry(t.mask, i))
        q, k, v = (x[i] for x in qkv)
        run = _run(plan, one, asked, (q[None], k[None], v[None]), 1, None if seed is None else seed + (i << 30))
        out, lse = ContextAttention.apply(run, q, k, v, t.sink, one.bias)  # type: ignore[no-untyped-call]
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs), None if lses[0] is None else torch.stack(lses)


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
    return _core.explain(requests[sizes.index(max(sizes))], installed, arch)


def _requests(t: Tensors, asked: Asked, plan: ContextPlan) -> tuple[list[CallTables], list[Request]]:
    """This rank's kernel calls, and what each asks of the choice of a kernel; checked."""
    sizes = _checked(t, asked, plan)
    if not sizes.batch:
        return [], []
    q, k, v = (_enter(x, sizes.layout) for x in (t.q, t.k, t.v))
    cast = autocast_dtype(t.q.device.type)
    dtype = cast if cast is not None and q.dtype == torch.float32 else q.dtype
    one = t._replace(bias=_entry(t.bias, 0), mask=_entry(t.mask, 0))
    dense = one.bias is not None or one.mask is not None
    run = _run(plan, one, asked, (q, k, v), 1 if dense else sizes.batch)
    calls, requests = [], []
    for stage in run.job.tables.stages:
        groups = 1 if stage.stage.local and run.job.tables.exclusive else run.job.groups
        heads = (q.shape[2] // groups, k.shape[2] // groups)
        if run.heads is not None:
            heads = (run.heads.share.heads, run.heads.share.slots)
        terms = _schedule.terms_of(run.terms._replace(seed=None), slice(0, heads[0]), 0)
        for call in stage.calls:
            rows = (call.q[1] - call.q[0], call.k[1] - call.k[0])
            parts = [
                torch.empty(1, dtype=dtype, device=x.device).expand(rows[at], heads[at], x.shape[-1])
                for x, at in ((q, 0), (k, 1), (v, 1))
            ]
            calls.append(call)
            requests.append(_schedule.kernel_of(run.job, call).request(parts[0], parts[1], parts[2], terms))
    return calls, requests


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
    )
    shape = data.topology
    groups = (plan._members.groups if plan._members is not None else None) or (None, None)
    sequence_group = groups[0] if shape.sequence > 1 else None
    heads = None
    if shape.heads > 1:
        wanted = 2 if shape.sequence == 1 and _seconds(plan, batch, q, v) > 2 * LEAST else 1
        share = shares(shape.heads, q.shape[2], k.shape[2], wanted)
        heads = HeadExchange(share, groups[-1])
    job = Job(tables, options, sequence_group, _groups(plan, batch, q, k, v) if heads is None else 1, dense=dense)
    job = replace(job, head_start=q.is_cuda and _seconds(plan, batch, q, v) > LEAST)
    slopes = None if t.alibi_slopes is None else t.alibi_slopes.detach()
    assert t.mask is None or isinstance(t.mask, Tensor)
    terms = Terms(slopes, t.bias, t.mask, seed)
    return Run(job, heads, data.rank % shape.heads, terms, asked.return_lse)


#: A part that computes for less than this many seconds takes the host longer than the device.
LEAST = 4e-4


def _seconds(plan: ContextPlan, batch: int, q: Tensor, v: Tensor) -> float:
    """Roughly, of a rank's forward; the same on all ranks."""
    flops = 2 * plan.mean_area * batch * q.shape[2] * (q.shape[-1] + v.shape[-1])
    return flops / _cost.default_gpu().forward


def _groups(plan: ContextPlan, batch: int, q: Tensor, k: Tensor, v: Tensor) -> int:
    """In how many parts the key heads of a stage travel, so that one arrives while another is used; alike on all ranks.

    A window moves little: one part. Where short documents stay whole, only those that are cut count.
    """
    data = plan._data
    if data.topology.sequence == 1 or data.mask.left is not None:
        return 1
    share = plan.travelling * _seconds(plan, batch, q, v)
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


# --- checks ---


def _checked(t: Tensors, asked: Asked, plan: ContextPlan) -> Sizes:
    """Sizes of this rank's shards.

    Raises:
        ContextError: arguments that are not the plan's, or that its scheme cannot do.
        InvalidArgument: as ``anyattn.attention``.
    """
    _check_same(t, asked, plan)
    if t.mask is not None and is_block_mask(t.mask):
        raise Unsupported(
            "a BlockMask speaks of the whole sequence, and this call of a part: pass mask= as a bool tensor of this "
            "rank's queries by all keys, under comm='all_gather'"
        )
    if t.mask is not None and not isinstance(t.mask, Tensor):
        raise ContextError(f"mask must be a bool tensor or None, got {type(t.mask).__name__}")
    request = _request(t, asked, plan)
    found = plan._checked.get(request) if t.bias is None and t.mask is None else None
    if found is not None:
        return found  # type: ignore[no-any-return]
    sizes = validate(request)
    features = {
        name
        for name, used in (
            ("alibi", t.alibi_slopes is not None), ("bias", t.bias is not None), ("mask", t.mask is not None),
        )
        if used
    }  # fmt: skip
    check_features(plan._data, frozenset(features))
    _check_sizes(t, sizes, plan)
    if t.bias is None and t.mask is None:
        plan._checked[request] = sizes
    return sizes


def _check_same(t: Tensors, asked: Asked, plan: ContextPlan) -> None:
    """causal, window and packing are left out, or are the plan's."""
    data = plan._data
    equal = data.queries.lengths == data.keys.lengths
    if asked.causal is not None or asked.window is not None:
        causal = plan.causal if asked.causal is None else asked.causal
        window = plan.window if asked.window is None else asked.window
        if normal_mask(causal, window, equal) != data.mask:
            raise ContextError(
                f"the plan is for causal={plan.causal!r}, window={plan.window!r}; the call asks "
                f"causal={asked.causal!r}, window={asked.window!r}: leave them out, or use plan.with_mask(...)"
            )
    for name, packing, lengths in (
        ("packing", t.packing, data.queries.lengths),
        ("packing_kv", t.packing_kv, data.keys.lengths),
    ):
        if packing is None or packing in plan._packings:
            continue
        if not isinstance(packing, Packing) or packing.host_lengths()[0] != lengths:
            raise ContextError(f"{name} has other lengths than the plan: leave it out, or make the plan from it")
        plan._packings.add(packing)


def _request(t: Tensors, asked: Asked, plan: ContextPlan) -> Request:
    """The call as any other, for the checks that every call gets; bias and mask are checked apart."""
    q, k, v = t.q, t.k, t.v
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise ContextError(f"{name} must be a tensor, got {type(x).__name__}")
    data = plan._data
    packed = q.ndim == 3
    sequences = len(data.queries.lengths)
    rows = (sequences, 0, None, True, None, False, q.device, False)  # how many is checked apart
    grad = torch.is_grad_enabled()
    return Request(
        describe(q, grad), describe(k, grad), describe(v, grad), None, None, asked.scale, asked.softcap,
        describe_optional(t.sink, grad), describe_optional(t.alibi_slopes, grad), None, None, asked.dropout,
        asked.layout, rows if packed else None, rows if packed else None, "any",
        asked.backend, _select.default_preference(), asked.deterministic, torch.are_deterministic_algorithms_enabled(),
        asked.return_lse, autocast_dtype(q.device.type), _environment.flash_override(),
    )  # fmt: skip


def _check_sizes(t: Tensors, sizes: Sizes, plan: ContextPlan) -> None:
    data, members = plan._data, plan._members
    entries = data.memory_q.entries
    if (sizes.layout == "thd") == entries:
        wanted = "4-D tensors (batch, rows, heads, dim)" if entries else "3-D tensors (rows, heads, dim)"
        raise ShapeError(
            f"the plan was made from {'a plain length' if entries else 'a Packing'} and takes {wanted}; q has shape "
            f"{tuple(t.q.shape)}"
        )
    if (sizes.seq_q, sizes.seq_k) != (data.queries.rows, data.keys.rows):
        raise ShapeError(
            f"this rank's shards have {sizes.seq_q} query and {sizes.seq_k} key rows; the plan's have "
            f"{data.queries.rows} and {data.keys.rows}: make them with plan.shard and plan.kv.shard"
        )
    if members is not None and members.groups is not None and t.q.device.type not in _kinds(members):
        raise DeviceError(f"q is on {t.q.device}, and the plan's group connects {members.device.type} tensors")
    given = zip(
        ("num_heads", "num_kv_heads", "head_dim", "head_dim_v"), data.given,
        (sizes.num_heads, sizes.num_kv_heads, sizes.head_dim, sizes.head_dim_v), strict=True,
    )  # fmt: skip
    for name, planned, got in given:
        if planned is not None and planned != got:
            raise ShapeError(f"the plan was made for {name}={planned}, the tensors have {got}")
    if sizes.num_heads % data.topology.heads:
        raise ShapeError(
            f"{sizes.num_heads} query heads do not divide over the {data.topology.heads} ranks that share heads under "
            f"comm={data.comm!r}: use comm='p2p' or 'all_gather', or as many ranks as divide them"
        )
    for name, x in (("bias", t.bias), ("mask", t.mask)):
        if isinstance(x, Tensor):
            _check_term(name, x, sizes, data.keys.lengths[0])


def _kinds(members: Members) -> set[str]:
    """Of devices whose tensors a group carries; explain() has none."""
    assert members.groups is not None
    return {"meta", members.device.type, *(device.type for device in members.groups[0]._device_types)}


def _check_term(name: str, x: Tensor, sizes: Sizes, keys: int) -> None:
    full = (sizes.batch, sizes.num_heads, sizes.seq_q, keys)
    shape = (1,) * (4 - x.ndim) + tuple(x.shape)
    if len(shape) != 4 or any(a not in (1, b) for a, b in zip(shape, full, strict=True)):
        raise ShapeError(
            f"{name} must broadcast to (batch, num_heads, this rank's rows, all keys) = {full}, got {tuple(x.shape)}"
        )
    if name == "mask" and x.dtype != torch.bool:
        raise ContextError(f"mask must be bool, True meaning attend, got {x.dtype}: additive masks go to bias=")
