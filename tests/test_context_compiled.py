"""What a plan does inside of a compiled region: the same as outside, and nothing is compiled anew for a new plan."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import anyattn
import context_pool
from anyattn import ContextError, ContextParallel, Packing
from context_pool import Seat

#: Batches of unlike numbers of documents and rows: the second makes sizes dynamic, and the others compile nothing.
BATCHES: tuple[tuple[int, ...], ...] = ((9, 14), (30,), (5, 0, 7, 20), (1, 2, 3, 4, 5, 6), (40, 3), (11, 11, 11))


@pytest.fixture(scope="session")
def pool() -> context_pool.Pool:
    """Ranks."""
    return context_pool.shared()


def unshard(x: Tensor, plan: Any) -> Tensor:
    """The whole of a plan's first use."""
    whole: Tensor = plan.unshard(x * 2) + 1
    return whole


def everything(x: Tensor, plan: Any) -> Tensor:
    """From the whole batch to the whole batch, with all that a plan has on the way."""
    y = plan.shard(x * 2) + torch.sin(plan.position_ids)[:, None] * plan.valid[:, None]
    q = y[:, None].expand(-1, 2, -1)
    out = anyattn.attention(q, q, q, plan=plan, backend="reference")
    whole: Tensor = plan.unshard(out.flatten(1) + 1) * 3
    return whole


def said(x: Tensor, plan: Any) -> Tensor:
    """What needs nothing to travel."""
    return (x + plan.position_ids[:, None]) * plan.valid[:, None]


REGIONS: dict[str, tuple[Callable[..., Tensor], int]] = {"unshard": (unshard, 1), "everything": (everything, 3)}
"""By name: a function of rows and a plan, and how often it breaks."""


def compiled(seat: Seat, comm: str, name: str) -> tuple[list[bool], list[int]]:
    """For each batch: whether out and gradient are the eager ones, and how many graphs there were after it."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    region, _ = REGIONS[name]
    counter: Any = CompileCounterWithBackend("aot_eager")
    run: Any = torch.compile(region, backend=counter)
    cp, equal, graphs = ContextParallel(seat.group, comm=comm), [], []
    for lengths in BATCHES:
        packing = Packing.from_lengths(lengths, pad_to_multiple_of=4)
        found = []
        for function in (run, region):
            plan = cp.plan(packing)  # each one's first use
            rows = plan.rows if name == "unshard" else packing.rows
            x = torch.arange(rows * 8, dtype=torch.float64).view(rows, 8).div(rows * 8).requires_grad_()
            out = function(x, plan)
            (out * torch.arange(out.numel()).view_as(out)).sum().backward()
            found.append((out, x.grad))
        equal.append(all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(*found, strict=True)))
        graphs.append(counter.frame_count)
    return equal, graphs


@pytest.mark.parametrize("name", REGIONS)
@pytest.mark.parametrize("comm", ["p2p", "a2a"])
def test_a_region_around_a_plan_is_compiled_once(pool: context_pool.Pool, comm: str, name: str) -> None:
    breaks = REGIONS[name][1]
    for equal, graphs in context_pool.values(pool.run(2, compiled, comm, name)):
        assert all(equal)
        assert 0 < graphs[0] <= breaks + 1
        assert graphs[-1] == graphs[1] <= 2 * (breaks + 1), "a new plan compiles nothing"


def plan_of(lengths: tuple[int, ...], **capacity: int) -> Any:
    """On one process."""
    return ContextParallel((1, 0), comm="all_gather").plan(Packing.from_lengths(lengths, **capacity))


def test_positions_and_validity_are_parts_of_one_graph() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter: Any = CompileCounter()
    run: Any = torch.compile(said, backend=counter, fullgraph=True)
    for lengths in BATCHES:
        plan = plan_of(lengths)
        x = torch.randn(plan.rows, 3)
        assert torch.equal(run(x, plan), said(x, plan))
    assert counter.frame_count == 2


def test_a_graph_sees_a_refilled_plan() -> None:
    torch._dynamo.reset()
    capacity = {"max_sequences": 3, "max_rows": 24, "max_seqlen": 20}
    plan = plan_of((9, 14), **capacity)
    run: Any = torch.compile(said, backend="aot_eager", fullgraph=True)
    x = torch.randn(plan.rows, 3)
    for lengths in ((20,), (4, 4, 12)):
        run(x, plan)
        plan.copy_(plan_of(lengths, **capacity))
        assert torch.equal(run(x, plan), said(x, plan))


def test_a_graph_does_not_write_to_a_plan() -> None:
    torch._dynamo.reset()
    plan = plan_of((9, 14))
    before = plan.position_ids.clone()
    run: Any = torch.compile(lambda p: p.position_ids.add_(1), backend="aot_eager", fullgraph=True)
    assert torch.equal(run(plan), before + 1)
    assert torch.equal(plan.position_ids, before)


@pytest.mark.parametrize("call", ["shard", "unshard"])
def test_rows_in_one_graph_are_an_error_that_says_so(call: str) -> None:
    torch._dynamo.reset()
    run: Any = torch.compile(lambda x, p: getattr(p, call)(x), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=rf"plan\.{call}\(\).*fullgraph"):
        run(torch.zeros(23), plan_of((9, 14)))


def test_a_plan_that_is_gone_by_its_backward_is_an_error_that_says_so() -> None:
    """Activation checkpointing runs forward again then, and compiled code has no plan but the caller's."""
    torch._dynamo.reset()

    def block(x: Tensor, plan: Any) -> Tensor:
        return (x * plan.position_ids[:, None]).sin()

    run: Any = torch.compile(
        lambda x, plan: checkpoint(block, x, plan, use_reentrant=False), backend="aot_eager", fullgraph=True
    )
    x, plan = torch.randn(23, 3, requires_grad=True), plan_of((9, 14))
    out = run(x, plan)
    del plan
    gc.collect()
    with pytest.raises(ContextError, match="keep the plan until backward"):
        out.sum().backward()
