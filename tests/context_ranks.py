"""What a rank does with a case, on any group, mesh and device: plan, shard, attention, unshard, backward.

Every row of a shard that holds no token is spoiled on the way, in q, k, v and the incoming gradients. Nothing is
asserted here: what a rank found is judged where all ranks' results are (context_judge.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import anyattn
from anyattn import _core
from context_cases import ContextCase, Whole, build, pair
from context_pool import Seat
from doubles import frontend, pretend

INF = float("inf")


@dataclass
class Found:
    """What a rank computed, on the CPU."""

    out: Tensor
    """Of the whole batch, in its memory layout."""
    lse: Tensor | None
    grads: dict[str, Tensor]
    """Of the whole tensors, as this rank has them: all ranks' are to be added."""
    unclean: list[str]
    """What is not exactly zero (-inf for lse) in this rank's padding."""
    comm: str
    rows: int


@contextlib.contextmanager
def machine(case: ContextCase) -> Iterator[None]:
    """The machine whose kernels' doubles run, where it is an imagined one; torch's flag where kernels read it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(case.asks == "deterministic")
    try:
        if case.imagined is None:
            yield
        elif version := dict(case.imagined.packages).get("cudnn"):
            with frontend.machine(version, on=case.imagined.on):
                yield
        else:
            with pretend(case.imagined.on, without=case.imagined.without, **dict(case.imagined.packages)):
                yield
    finally:
        torch.use_deterministic_algorithms(before)


def plan_of(case: ContextCase, group: Any, whole: Whole) -> Any:
    """The plan of a case."""
    return anyattn.ContextParallel(group, comm=case.comm).plan(
        whole.q_side.given, whole.k_side.given if case.keys is not None else None, **plan_arguments(case)
    )


def plan_arguments(case: ContextCase) -> dict[str, Any]:
    """What ``ContextParallel.plan`` is told beside lengths."""
    terms = case.terms
    arguments: dict[str, Any] = {"causal": terms.causal or False, "window": terms.window}
    arguments |= {"placement": case.placement, "pad_to_multiple_of": case.pad_to_multiple_of}
    if case.told:
        (heads, kv_heads), (dim, dim_v) = pair(case.heads), pair(case.dims)
        arguments |= {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim, "head_dim_v": dim_v}
        names = {"sink_low": "sink", "alibi_sequences": "alibi", "bias_row": "bias"}
        features = {names.get(part, part) for part in case.parts}
        features |= {"lse"} if case.asks in ("lse_grad", "forward") else set()
        arguments["features"] = tuple(sorted(features | ({"softcap"} if terms.softcap else set())))
    return arguments


class _Spoiled(torch.autograd.Function):
    """Values in rows that hold no token; their gradient passes as it is, to be looked at."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, padding: Tensor, garbage: float) -> Tensor:
        return x.masked_fill(padding, garbage)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


@dataclass
class Local:
    """A case on one rank: leaves are whole tensors, and what goes into ``attention`` is this rank's part."""

    case: ContextCase
    plan: Any
    leaves: dict[str, Tensor]
    given: dict[str, Tensor]
    arguments: dict[str, Any]

    @property
    def dim(self) -> int:
        """Which dim of q, k, v and out counts rows."""
        return 0 if self.case.is_packed else 1

    def padding(self, shards: Any) -> Tensor:
        """bool, to be broadcast to q, k, v, out."""
        padding: Tensor = ~shards.valid
        return padding.view(*(1 for _ in range(self.dim)), -1, 1, 1)


def localize(whole: Whole, plan: Any, device: torch.device | str) -> Local:
    """Shard everything, and spoil what holds no token."""
    case, leaves = whole.case, {}
    for name, x in whole.tensors.items():
        if x is None:
            continue
        if case.is_packed and name in "qkv":
            beyond = x.new_full((case.tail, *x.shape[2:]), case.garbage)
            x = torch.cat([x[0], beyond])
        leaves[name] = x.to(device).requires_grad_(case.asks not in ("forward", "out") and name != "alibi_slopes")
    arguments: dict[str, Any] = {"backend": case.backend, "plan": plan}
    terms = case.terms
    arguments |= {n: x for n in ("scale", "softcap") if (x := getattr(terms, n)) is not None}
    arguments["return_lse"] = case.asks in ("lse_grad", "forward")
    if case.asks == "deterministic":
        arguments["deterministic"] = True
    local = Local(case, plan, leaves, {}, arguments)
    for name, shards in (("q", plan), ("k", plan.kv), ("v", plan.kv)):
        x = shards.shard(leaves[name], dim=local.dim)
        x = _Spoiled.apply(x, local.padding(shards), case.garbage)  # type: ignore[no-untyped-call]
        if x.requires_grad:
            x.retain_grad()
        local.given[name] = x
    arguments |= {n: leaves[n] for n in ("sink", "alibi_slopes") if n in leaves}
    if "bias" in leaves:
        bias = leaves["bias"]
        arguments["bias"] = plan.shard(bias, dim=bias.ndim - 2) if bias.shape[-2] > 1 else bias
    if whole.mask is not None:
        arguments["mask"] = plan.shard(whole.mask.to(device), dim=2)
    return local


def run(seat: Seat, case: ContextCase, device: torch.device | str = "cpu") -> Found:
    """A case on one rank: plan, shard, attention, unshard, backward."""
    with machine(case):
        whole = build(case, device)
        local = localize(whole, plan_of(case, seat.group, whole), device)
        return measure(whole, local, attend(local))


def run_and_see_forms(seat: Seat, case: ContextCase) -> tuple[Found, set[str]]:
    """The same, and in which forms kernels got their tensors."""
    forms: set[str] = set()

    def make_call(p: Any, *tensors: Any) -> Any:
        forms.add("packed" if p.packed else "dense")
        return _make_call(p, *tensors)

    _make_call = _core.make_call
    with mock.patch.object(_core, "make_call", make_call):
        return run(seat, case), forms


Result = tuple[Tensor, Tensor | None]


def attend(local: Local) -> Result:
    found = anyattn.attention(local.given["q"], local.given["k"], local.given["v"], **local.arguments)
    return found if isinstance(found, tuple) else (found, None)


def measure(whole: Whole, local: Local, result: Result) -> Found:
    """Unshard, go back, and look at the padding."""
    case, plan, (out, lse) = local.case, local.plan, result
    padding = local.padding(plan)
    unclean = [] if _is_all(out, padding, 0.0) else ["out"]
    if lse is not None and not _is_all(lse, padding[..., 0].transpose(-1, -2), -INF):
        unclean.append("lse")
    whole_out = plan.unshard(out, dim=local.dim)
    whole_lse = None if lse is None else plan.unshard(lse, dim=-1, fill=-INF)
    if whole.dout is not None:
        _backward(whole, local, result, (whole_out, whole_lse))
        for name, shards in (("q", plan), ("k", plan.kv), ("v", plan.kv)):
            if not _is_all(local.given[name].grad, local.padding(shards), 0.0):
                unclean.append(f"d{name}")
    grads = {}
    for name, leaf in local.leaves.items():
        if leaf.requires_grad:
            assert leaf.grad is not None, f"no gradient for {name}"
            grads[name] = leaf.grad.cpu()
    whole_out = whole_out.unsqueeze(0) if case.is_packed else whole_out
    if whole_lse is not None:
        whole_lse = (whole_lse.unsqueeze(0) if case.is_packed else whole_lse).detach().cpu()
    return Found(whole_out.detach().cpu(), whole_lse, grads, unclean, plan.comm, plan.rows)


def _backward(whole: Whole, local: Local, parts: Result, wholes: Result) -> None:
    """From the whole result, and into padding rows of this rank's part, which no gradient may come back from."""
    (out, lse), (whole_out, whole_lse), garbage = parts, wholes, local.case.garbage
    assert whole.dout is not None
    padding = local.padding(local.plan)
    dout = (whole.dout[0] if local.case.is_packed else whole.dout).to(out.device)
    results, incoming = [whole_out, out], [dout, torch.zeros_like(out).masked_fill(padding, garbage)]
    if whole.dlse is not None:
        assert lse is not None
        assert whole_lse is not None
        dlse = (whole.dlse[0] if local.case.is_packed else whole.dlse).to(out.device)
        spoiled = torch.zeros_like(lse).masked_fill(padding[..., 0].transpose(-1, -2), garbage)
        results += [whole_lse, lse]
        incoming += [dlse, spoiled]
    torch.autograd.backward(results, incoming)


def _is_all(x: Tensor | None, where: Tensor, value: float) -> bool:
    """Whether x is there, and has the value everywhere where ``where``, to be broadcast, is True."""
    return x is not None and bool(((x == value) | ~where).all())
