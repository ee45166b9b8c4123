"""What is wrong with a call under a plan is found here, before anything runs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn import _environment, _select
from anyattn._context._plan import ContextPlan, check_planned, normal_mask
from anyattn._context._topology import ON_FLAT_MESH, Members
from anyattn._errors import ContextError, DeviceError, ShapeError, Unsupported
from anyattn._packing import Packing
from anyattn._request import Request, Tensors, autocast_dtype, describe, describe_optional, is_block_mask
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
    num_splits: int = 1


def checked(t: Tensors, asked: Asked, plan: ContextPlan) -> Sizes:
    """Sizes of this rank's shards.

    Raises:
        ContextError: arguments that are not the plan's, or that its scheme cannot do.
        InvalidArgument: as ``anyattn.attention``.
    """
    _check_same(t, asked, plan)
    if t.mask is not None and is_block_mask(t.mask):
        raise Unsupported(
            "a BlockMask speaks of the whole sequence, and this call of a part: "
            + (
                "pass mask= as a bool tensor of this rank's queries by all keys, under comm='all_gather'"
                if plan._data.memory_q.entries
                else "a plan from a Packing keeps documents apart by itself: leave mask= out"
            )
        )
    if t.mask is not None and not isinstance(t.mask, Tensor):
        raise ContextError(f"mask must be a bool tensor or None, got {type(t.mask).__name__}")
    request = request_of(t, asked, plan)
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
    check_planned(plan._data, frozenset(features))
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
        if packing is None or is_known(packing, plan):
            continue
        if not isinstance(packing, Packing) or packing.host_lengths()[0] != lengths:
            raise ContextError(f"{name} has other lengths than the plan: leave it out, or make the plan from it")
        plan._packings[packing] = _version(packing)


def is_known(packing: Any, plan: ContextPlan) -> bool:
    """Whether a packing was found equal to the plan's, and neither was refilled since."""
    return (
        isinstance(packing, Packing)
        and (version := _version(packing)) is not None
        and (plan._packings.get(packing) == version)
    )


def _version(packing: Packing) -> int | None:
    """Counts how often its offsets were written to; None where nothing counts."""
    table = packing._rows.table
    return None if table.is_inference() else table._version


def request_of(t: Tensors, asked: Asked, plan: ContextPlan) -> Request:
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
        asked.return_lse, autocast_dtype(q.device.type), _environment.flash_override(), asked.num_splits,
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
            f"{f'; {ON_FLAT_MESH}' if data.topology.sequence > 1 else ''}"
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
