"""Timing on several ranks at once: they start together, and an error of one is an error of all.

Ranks talk over gloo, beside whatever carries the tensors. Every exchange carries a value or an error, so that a rank
whose measurement failed leaves no other waiting, wherever in theirs they are.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

Thunk = Callable[[], Any]
#: Seconds that a rank waits for the others, or for its device: the first calls of some kernels compile.
PATIENCE = 100.0
#: Milliseconds from which on a call is made less often.
LONG = 20.0


class CaseFailed(Exception):
    """A measurement failed on some rank; all ranks raise it."""


class Stuck(Exception):
    """The device did not finish in time: a collective, most likely, that some rank did not join."""


class Times(NamedTuple):
    """Milliseconds per call."""

    slowest: float
    """Of the rank that took longest: median of rounds."""
    median: float
    """Of the median rank."""
    by_rank: list[float]


@dataclass
class Seat:
    """This rank among the others."""

    rank: int
    size: int
    device: torch.device
    tiny: bool = False
    """Few repetitions: the figures mean nothing."""
    patience: float = PATIENCE
    side: Any = field(init=False)

    def __post_init__(self) -> None:
        self.side = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.patience + 20))
        self._flag = torch.zeros(1, device=self.device)

    @property
    def on_gpu(self) -> bool:
        """Calls only enqueue work."""
        return self.device.type == "cuda"

    def exchange(self, value: Any = None, error: str = "") -> list[Any]:
        """Every rank's value.

        Raises:
            CaseFailed: some rank brought an error instead.
        """
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, (value, error), group=self.side)
        failed = {rank: told for rank, (_, told) in enumerate(found) if told}
        if failed:
            rank, told = next(iter(failed.items()))
            also = "" if len(failed) == self.size else f" (ranks {', '.join(map(str, failed))} of {self.size})"
            raise CaseFailed(f"rank {rank}: {told}{also}" if also else told)
        return [got for got, _ in found]

    def wait(self, seconds: float | None = None) -> None:
        """Until the device has done what was enqueued.

        Raises:
            Stuck: not within these seconds.
        """
        if not self.on_gpu:
            return
        event = torch.cuda.Event()
        event.record()
        limit = self.patience if seconds is None else seconds
        end = time.monotonic() + limit
        while not event.query():
            if time.monotonic() > end:
                raise Stuck(f"the device did not finish within {limit:.0f} s")
            time.sleep(1e-4)

    def together(self) -> None:
        """All ranks and their devices have done what they had to, and go on at once."""
        self.wait()
        self.exchange()
        if self.on_gpu and self.size > 1:
            dist.all_reduce(self._flag)


def milliseconds(seat: Seat, thunk: Thunk, *, warm_up: int = 1) -> Times:
    """Device time per call in steady state, calls following one another as layers do; on a CPU, time of the wall.

    After warming up, 5 rounds of 10 calls; of those that take long 2 rounds of 5.
    """
    for _ in range(warm_up):
        thunk()
    once = max(seat.exchange(_round(seat, thunk, 1)))
    calls, rounds = (1, 2) if seat.tiny else (10, 5) if once < LONG else (5, 2)
    if once < LONG:
        thunk()
    mine = [_round(seat, thunk, calls) for _ in range(rounds)]
    by_rank: list[list[float]] = seat.exchange(mine)
    each = [statistics.median(taken) for taken in by_rank]
    slowest = statistics.median(max(taken) for taken in zip(*by_rank, strict=True))
    return Times(slowest, statistics.median(each), [round(ms, 4) for ms in each])


def _round(seat: Seat, thunk: Thunk, calls: int) -> float:
    """Milliseconds per call of some calls that all ranks begin together."""
    seat.together()
    if not seat.on_gpu:
        start = time.perf_counter()
        for _ in range(calls):
            thunk()
        return (time.perf_counter() - start) * 1e3 / calls
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        thunk()
    end.record()
    seat.wait()
    return float(begin.elapsed_time(end)) / calls


def host_microseconds(seat: Seat, *thunks: Thunk) -> list[float]:
    """Time that the host takes to enqueue a call of each, interleaved, all ranks at once; median of rounds and ranks.

    Few calls a round, so that the queue of the device does not fill.
    """
    calls, rounds = (2, 2) if seat.tiny else (20, 15)
    times: list[list[float]] = [[] for _ in thunks]
    for thunk in thunks:
        for _ in range(2 if seat.tiny else 20):
            thunk()
    for _ in range(rounds):
        for thunk, taken in zip(thunks, times, strict=True):
            seat.together()
            seat.wait()
            start = time.perf_counter()
            for _ in range(calls):
                thunk()
            taken.append((time.perf_counter() - start) / calls * 1e6)
    mine = [statistics.median(taken) for taken in times]
    return [round(statistics.median(each), 2) for each in zip(*seat.exchange(mine), strict=True)]


def extra_mib(seat: Seat, thunk: Callable[[], Sequence[torch.Tensor]]) -> float:
    """Peak device memory above what was held before and what the call returns, in MiB: of the rank with most.

    On a CPU nothing counts it, and it is 0.
    """
    thunk()
    seat.together()
    seat.wait()
    if not seat.on_gpu:
        seat.exchange()
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = thunk()
    seat.wait()
    peak = torch.cuda.max_memory_allocated() - before - sum(x.numel() * x.element_size() for x in kept)
    del kept
    return round(float(max(seat.exchange(peak / 2**20))), 3)
