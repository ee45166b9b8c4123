"""What the context-parallel benchmark computes: batches, their visible area, and the calls of anyattn on them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import anyattn
from anyattn import ContextPlan, Packing
from context_timing import Seat
from measure import reasons

Window = tuple[int, int]


@dataclass(frozen=True)
class Problem:
    """A batch: causal sequences, packed or one alone."""

    name: str
    lengths: tuple[int, ...]
    packed: bool = False
    window: Window | None = None
    heads: tuple[int, int] = (32, 8)
    """Of queries and of keys."""
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def area(self) -> int:
        """Pairs of a query and a key that it sees."""
        return sum(area(n, self.window) for n in self.lengths)

    @property
    def flops(self) -> int:
        """Of the two products in forward, for what is visible. Forward and backward together are 3.5 times as many."""
        return 4 * self.area * self.heads[0] * self.dim

    @property
    def key_row_bytes(self) -> int:
        """A row of keys and values."""
        return 2 * self.heads[1] * self.dim * self.dtype.itemsize

    def alone(self, ranks: int) -> Problem:
        """For one GPU: the whole batch where it is packed, else one sequence with as many FLOPs as each rank has."""
        if self.packed or ranks == 1:
            return self
        wanted, low, high = self.area / ranks, 1, self.lengths[0]
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if area(middle, self.window) >= wanted else (middle + 1, high)
        step = 64 if low > 4096 else 1
        return replace(self, lengths=(-(-low // step) * step,))

    def small(self) -> Problem:
        """One of the same kind on which results are compared."""
        lengths: tuple[int, ...] = (700, 33, 512, 1, 290) if self.packed else (1536,)
        if self.heads[0] < 32:  # a trial
            lengths = tuple(-(-n // 16) for n in lengths)
        window = self.window and (max(1, lengths[0] // 8), 0)
        return replace(self, lengths=lengths, window=window)

    def rounded(self, multiple: int) -> Problem:
        """One whose lengths are multiples, as some peers need."""
        return replace(self, lengths=tuple(max(1, round(n / multiple)) * multiple for n in self.lengths))

    def given(self, device: torch.device) -> Any:
        """What a plan is made from: a Packing, or a length."""
        return Packing.from_lengths(list(self.lengths), device=device) if self.packed else self.lengths[0]


def area(length: int, window: Window | None) -> int:
    """Pairs of a query and a key before it or at it, within the window's left side."""
    seen = length if window is None else min(length, window[0] + 1)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def documents(total: int, mean: int, longest: int, seed: int = 0) -> tuple[int, ...]:
    """Lengths of packed documents: one of the longest, the others lognormal (sigma 1), with this mean over all."""
    count = total // mean
    drawn = random.Random(seed)
    draws = [drawn.lognormvariate(0.0, 1.0) for _ in range(count - 1)]
    scale = (total - longest) / sum(draws)
    lengths = [max(1, min(longest, round(x * scale))) for x in draws]
    lengths[-1] += total - longest - sum(lengths)
    lengths.insert(count // 2, longest)
    if min(lengths) < 1 or max(lengths) > longest:
        raise ValueError(f"no {count} documents of up to {longest} tokens make {total}")
    return tuple(lengths)


class Call:
    """Tensors of some rows, as leaves, and a call of anyattn on them."""

    def __init__(self, problem: Problem, shape: Sequence[int], device: torch.device, arguments: dict[str, Any]) -> None:
        heads, kv_heads = problem.heads
        options: Any = {"device": device, "dtype": problem.dtype}
        self.q, self.k, self.v = (
            torch.randn(*shape, h, problem.dim, requires_grad=True, **options) for h in (heads, kv_heads, kv_heads)
        )
        self.dout = torch.randn_like(self.q, requires_grad=False)
        self.arguments = arguments

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    def forward(self) -> Tensor:
        out: Tensor = anyattn.attention(*self.leaves, **self.arguments)
        return out

    def infer(self) -> Tensor:
        """Forward, nothing kept for backward."""
        with torch.no_grad():
            return self.forward()

    def both(self) -> list[Tensor]:
        """Out and the gradients."""
        out = self.forward()
        return [out, *torch.autograd.grad(out, self.leaves, self.dout)]


def alone(problem: Problem, backend: str, device: torch.device) -> Call:
    """The problem on this rank's device, without the others: dense if that backend takes dense tensors.

    Raises:
        anyattn.NoBackend: it does not take the problem.
    """
    arguments: dict[str, Any] = {"causal": True, "window": problem.window, "backend": backend}
    if not problem.packed:
        call = Call(problem, (1, problem.lengths[0]), device, arguments)
        if anyattn.explain(*call.leaves, **arguments).forward is not None:
            return call
    packing = Packing.from_lengths(list(problem.lengths), device=device)
    call = Call(problem, (sum(problem.lengths),), device, {**arguments, "packing": packing})
    found = anyattn.explain(*call.leaves, **call.arguments)
    if found.forward is None:
        raise LookupError(f"refused: {reasons(found)}")
    return call


def sharded(problem: Problem, backend: str, plan: ContextPlan, device: torch.device) -> Call:
    """This rank's part of the problem, with values of its own."""
    shape = (plan.rows,) if problem.packed else (1, plan.rows)
    return Call(problem, shape, device, {"plan": plan, "backend": backend})


def compare(problem: Problem, backend: str, plan: ContextPlan, seat: Seat) -> None:
    """Out and gradients of this rank's shards equal those of the whole, computed on this device alone.

    Raises:
        AssertionError: they do not: nothing that follows would mean anything.
    """
    torch.manual_seed(1)  # the same values on all ranks
    whole = alone(problem, backend, seat.device)
    found = sharded(problem, backend, plan, seat.device)
    with torch.no_grad():
        for mine, all_rows in zip((*found.leaves, found.dout), (*whole.leaves, whole.dout), strict=True):
            mine.copy_(_shard(plan, problem, all_rows))
    for name, got, want in zip(("out", "dq", "dk", "dv"), found.both(), whole.both(), strict=True):
        wanted = _shard(plan, problem, want).float()
        error = float((got.float() - wanted).abs().max() / want.float().abs().max())
        if not error < 2e-2:
            raise AssertionError(f"{name} differs from one GPU's by {error:.1e} of its largest value")


def _shard(plan: ContextPlan, problem: Problem, x: Tensor) -> Tensor:
    """This rank's part of a tensor of the whole problem, which may be packed only because the kernel wants it."""
    rows = x.flatten(0, -3)
    return plan.shard(rows) if problem.packed else plan.shard(rows[None], 1)
