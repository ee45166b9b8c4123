"""Single calls over ranks: with dropout, repeated, refilled, with heads in groups.

Nothing is asserted here: the jobs return what a rank found, and tests/test_context_training.py judges it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import anyattn
import context_ranks
from anyattn._context import _backward, _door, _estimate
from anyattn._context._exchange import exchange
from context_cases import ContextCase, build
from context_pool import Seat


def with_determinism(seat: Seat, case: ContextCase, deterministic: bool | None) -> context_ranks.Found:
    """A case with ``deterministic=``, whatever torch's flag is."""
    whole = build(case)
    local = context_ranks.localize(whole, context_ranks.plan_of(case, seat.group, whole), "cpu")
    local.arguments["deterministic"] = deterministic
    return context_ranks.measure(whole, local, context_ranks.attend(local))


class Dropping(NamedTuple):
    """What a rank's part adds to, and saw of, a call with dropout."""

    dout_out: float
    v_dv: float
    slope: float
    """Of <dout, out> along a direction of all inputs, by differences."""
    along: float
    """The same by gradients."""
    repeats: bool
    """The same torch seed gave the same bits, forward and backward."""
    differs: bool
    """Another torch seed did not, nor a second call."""


def dropping(seat: Seat, case: ContextCase, rate: float) -> Dropping:
    """Forward, backward and differences with one seed."""
    whole = build(case)
    assert whole.dout is not None
    plan = context_ranks.plan_of(case, seat.group, whole)
    local = context_ranks.localize(whole, plan, "cpu")
    local.arguments |= {"dropout": rate, "return_lse": False}
    names = [n for n in ("q", "k", "v", "sink", "bias") if n in local.leaves]
    given: dict[str, Tensor] = {**local.arguments, **local.given}
    inputs = [given[n].detach().double().requires_grad_() for n in names]
    dout = plan.shard(whole.dout[0] if case.is_packed else whole.dout, dim=local.dim)

    def run(seed: int | None, *tensors: Tensor) -> Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        q, k, v, *rest = tensors
        arguments: dict[str, Any] = local.arguments | dict(zip(names[3:], rest, strict=True))
        out: Tensor = anyattn.attention(q, k, v, **arguments)
        return out

    out = run(3, *inputs)
    grads = torch.autograd.grad(out, inputs, dout)
    again = run(3, *inputs)
    repeats = torch.equal(out, again) and all(map(torch.equal, grads, torch.autograd.grad(again, inputs, dout)))
    torch.manual_seed(seat.rank)  # a direction of sharded inputs; replicated ones have the same on all ranks
    ways = [torch.randn_like(x) for x in inputs[:3]]
    torch.manual_seed(99)
    ways += [torch.randn_like(x) for x in inputs[3:]]
    with torch.no_grad():
        run(3, *inputs)
        differs = not any(torch.equal(out, run(seed, *inputs)) for seed in (None, 4))
        ends = [run(3, *(x + h * w for x, w in zip(inputs, ways, strict=True))) for h in (1e-6, -1e-6)]
    slope = (dout * (ends[0] - ends[1])).sum().item() / 2e-6
    along = sum((w * g).sum().item() for w, g in zip(ways, grads, strict=True))
    return Dropping((dout * out).sum().item(), (inputs[2] * grads[2]).sum().item(), slope, along, repeats, differs)


class Masks(NamedTuple):
    """Probabilities after dropout, (documents, heads, queries, keys)."""

    forward: Tensor
    backward: Tensor
    """This rank's part, as its backward has them."""


def dropped_masks(seat: Seat, case: ContextCase, rate: float, grouped: bool) -> Masks:
    """Read off out and dv, where values and incoming gradients are unit vectors; documents are as long as wide."""
    assert isinstance(case.lengths, tuple)
    parts = mock.patch.object(_door, "LEAST", 0.0) if grouped else contextlib.nullcontext()
    with context_ranks.machine(case), parts:
        whole = build(case)
        plan = context_ranks.plan_of(case, seat.group, whole)
        q, k, v = (x[0] for n in "qkv" if (x := whole.tensors[n]) is not None)
        unit = torch.eye(v.shape[2], dtype=v.dtype).repeat(len(case.lengths), 1)[:, None].repeat(1, v.shape[1], 1)
        v = unit.clone().requires_grad_()
        torch.manual_seed(3)  # on all ranks
        q, k = (plan.shard(x).requires_grad_() for x in (q, k))
        arguments: dict[str, Any] = {"scale": case.terms.scale, "backend": case.backend}
        out = anyattn.attention(q, k, plan.shard(v), dropout=rate, plan=plan, **arguments)
        out.backward(plan.shard(unit))
        assert v.grad is not None
        forward, backward = (
            x.detach().unflatten(0, (len(case.lengths), -1)).transpose(1, 2) for x in (plan.unshard(out), v.grad)
        )
        return Masks(forward, backward.transpose(2, 3))


class Capacity(NamedTuple):
    """Of a packing."""

    sequences: int
    rows: int
    longest: int

    def packing(self, lengths: Sequence[int]) -> anyattn.Packing:
        """A batch in it."""
        return anyattn.Packing.from_lengths(
            list(lengths), max_sequences=self.sequences, max_rows=self.rows, max_seqlen=self.longest
        )


class Refilled(NamedTuple):
    """A rank's part of one batch of many that went through one plan."""

    found: context_ranks.Found
    tokens: Tensor
    """Which rows of the batch lie here."""
    positions: Tensor
    beyond: int
    """How many values are not zero, of lse not -inf, in rows beyond the batch."""


def refilled(seat: Seat, case: ContextCase, capacity: Capacity, batches: Sequence[tuple[int, ...]]) -> list[Refilled]:
    """One plan for all batches."""
    cp = anyattn.ContextParallel(seat.group, comm=case.comm)
    arguments, results = context_ranks.plan_arguments(case), []
    plan = cp.plan(capacity.packing((5, 4)), **arguments)
    for i, lengths in enumerate(batches):
        one = replace(case, lengths=lengths, seed=i, tail=capacity.rows - sum(lengths))
        assert plan.copy_(cp.plan(capacity.packing(lengths), **arguments)) is plan
        tokens = plan.shard(torch.arange(capacity.rows), fill=-1)
        whole = build(one)
        whole.dout = _longer(whole.dout, 1, capacity.rows)
        whole.dlse = _longer(whole.dlse, 2, capacity.rows)
        local = context_ranks.localize(whole, plan, "cpu")
        found = context_ranks.measure(whole, local, context_ranks.attend(local))
        assert found.lse is not None
        n = sum(lengths)
        beyond = found.out[:, n:].count_nonzero() + (found.lse[..., n:] != -math.inf).count_nonzero()
        found.out, found.lse = found.out[:, :n], found.lse[..., :n]
        results.append(Refilled(found, tokens[plan.valid], plan.position_ids[plan.valid], int(beyond)))
    return results


def _longer(x: Tensor | None, dim: int, rows: int) -> Tensor | None:
    """With zeros up to so many rows."""
    if x is None:
        return None
    shape = list(x.shape)
    shape[dim] = rows - shape[dim]
    return torch.cat([x, x.new_zeros(shape)], dim)


#: How forward may keep what backward needs.
KEEPING = ("plainly", "on_the_cpu", "recomputed")


def refilled_too_early(seat: Seat, comm: str, capacity: Capacity, keeping: str) -> str:
    """Forward, a refill, and backward: what the error says."""
    cp = anyattn.ContextParallel(seat.group, comm=comm)
    plan = cp.plan(capacity.packing((40, 20)), num_heads=4)
    q = torch.randn(plan.rows, 4, 8, dtype=torch.float64, requires_grad=True)

    def attend(x: Tensor) -> Tensor:
        return anyattn.attention(x, x, x, plan=plan, backend="reference")

    with torch.autograd.graph.save_on_cpu() if keeping == "on_the_cpu" else contextlib.nullcontext():
        out = checkpoint(attend, q, use_reentrant=False) if keeping == "recomputed" else attend(q)
    plan.copy_(cp.plan(capacity.packing((3, 9, 30)), num_heads=4))
    try:
        out.square().sum().backward()
    except anyattn.ContextError as error:
        return str(error)
    return ""


def dropped_again(seat: Seat, comm: str, kept: float) -> tuple[float, float]:
    """A forward without gradients, and one with them for backward: <dout, out> and <v, dv>, this rank's parts.

    Both are the same sum over all ranks where the second forward drops what the first one dropped.
    """
    with mock.patch.multiple(_door, LEAST=-1.0), mock.patch.multiple(_estimate, KEPT=kept):
        plan = anyattn.ContextParallel(seat.group, comm=comm).plan(anyattn.Packing.from_lengths([40, 9, 13]))
        q, k, v = (torch.randn(plan.rows, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return anyattn.attention(q, k, v, plan=plan, dropout=0.4, backend="reference")

        torch.manual_seed(3)
        out = checkpoint(attend, q, k, v, use_reentrant=True)
        weights = torch.randn_like(out)
        (out * weights).sum().backward()
        assert v.grad is not None
        return float((out * weights).sum()), float((v * v.grad).sum())


def with_saved_tensors_transposed(seat: Seat, comm: str) -> list[bool]:
    """Hooks that give back what was saved, with other strides: whether gradients are the same."""
    plan = anyattn.ContextParallel(seat.group, comm=comm).plan(anyattn.Packing.from_lengths([40, 9, 13]), num_heads=4)
    leaves = [torch.randn(plan.rows, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def gradients() -> Sequence[Tensor]:
        out = anyattn.attention(*leaves, plan=plan, backend="reference")
        return torch.autograd.grad(out.square().sum(), leaves)

    wanted = gradients()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: x.detach().transpose(0, -1).contiguous() if x.ndim > 1 else x.detach().clone(),
        lambda x: x.transpose(0, -1) if x.ndim > 1 else x,
    ):
        found = gradients()
    return [torch.equal(a, b) for a, b in zip(found, wanted, strict=True)]


def moved_by_heads(seat: Seat, lengths: tuple[int, ...], multiple: int) -> tuple[int, int]:
    """Bytes that come from other ranks in forward under a2a, and what the plan says."""
    plan = anyattn.ContextParallel(seat.group, comm="a2a").plan(
        anyattn.Packing.from_lengths(lengths), num_heads=6, num_kv_heads=3, head_dim=16, head_dim_v=8,
        pad_to_multiple_of=multiple,
    )  # fmt: skip
    q, k, v = (torch.randn(plan.rows, h, d, dtype=torch.bfloat16) for h, d in ((6, 16), (3, 16), (3, 8)))
    with mock.patch("anyattn._context._heads.exchange", wraps=exchange) as travels:
        anyattn.attention(q, k, v, plan=plan, backend="reference")
    came = 0
    for _, wire, receive, *_ in (call.args for call in travels.call_args_list):
        row = wire.element_size() * wire[0].numel()
        came += (sum(receive) - receive[seat.rank]) * row
    return came, plan.bytes_moved


def keeping(seat: Seat, case: ContextCase, share: float) -> tuple[context_ranks.Found, int, int]:
    """A case where keys are kept for backward up to a share, and how often keys and gradients of keys travelled."""
    with (
        mock.patch.multiple(_door, LEAST=0.0),
        mock.patch.multiple(_estimate, KEPT=share),
        mock.patch("anyattn._context._schedule.exchange", wraps=exchange) as keys,
        mock.patch("anyattn._context._backward.exchange", wraps=exchange) as gradients,
    ):
        return context_ranks.run(seat, case), keys.call_count, gradients.call_count


def in_groups(seat: Seat, case: ContextCase) -> tuple[context_ranks.Found, int]:
    """A case with as many groups of heads as there can be, and how many there were."""
    counts = [1]

    def groups(*arguments: Any) -> int:
        counts.append(_groups(*arguments))
        return counts[-1]

    _groups = _door._groups
    with mock.patch.multiple(_door, LEAST=0.0, _groups=groups):
        return context_ranks.run(seat, case), max(counts)


def held(seat: Seat, case: ContextCase) -> tuple[context_ranks.Found, int, int]:
    """A case in groups of heads: how often gradients came back, and how many of them waited at most."""
    waiting: list[int] = []

    def take(work: Any, unit: Any, wire: Any) -> None:
        _take(work, unit, wire)
        waiting.append(len(work.home))

    _take = _backward._Gathered.take
    with (
        mock.patch.multiple(_door, LEAST=0.0),
        mock.patch.multiple(_estimate, KEPT=-1.0),
        mock.patch.object(_backward._Gathered, "take", take),
    ):
        found = context_ranks.run(seat, case)
    return found, len(waiting), max(waiting, default=0)
