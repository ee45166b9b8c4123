"""What the device does while one case runs: kernels by time, and how much of communication nothing hides."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from context_timing import Seat, Thunk

Span = tuple[float, float]
#: How names of spans begin that are no kernels, but notes about them.
NOTES = ("nccl:", "ProfilerStep")


class Kernel(NamedTuple):
    """One run of a kernel, in microseconds."""

    name: str
    start: float
    end: float

    @property
    def moves(self) -> bool:
        """It carries data between ranks."""
        return "nccl" in self.name.lower() or "Memcpy PtoP" in self.name


def union(spans: Iterable[Span]) -> list[Span]:
    """Spans without overlap, in order, that cover the same time."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def covered(spans: Sequence[Span]) -> float:
    """Time that they cover together."""
    return sum(end - start for start, end in union(spans))


def summary(kernels: Sequence[Kernel], calls: int, lines: int = 40) -> list[str]:
    """Where the time of these calls went, a call's share of it each."""
    if not kernels:
        return ["no kernel ran on the device"]
    spans = [(k.start, k.end) for k in kernels]
    computing = covered([(k.start, k.end) for k in kernels if not k.moves])
    busy, whole = covered(spans), max(end for _, end in spans) - min(start for start, _ in spans)
    ms = 1e-3 / calls
    found = [
        f"per call: {whole * ms:.3f} ms = computing {computing * ms:.3f} + only communicating "
        f"{(busy - computing) * ms:.3f} + idle {(whole - busy) * ms:.3f}",
        "longest gaps (us), and the kernels around them:",
    ]
    found += [f"  {size:8.1f}  {before[:44]} -> {after[:44]}" for size, before, after in _gaps(kernels)[:6]]
    found.append(f"{'ms a call':>10} {'runs':>6}  kernel")
    by_name: dict[str, list[float]] = defaultdict(list)
    for k in kernels:
        by_name[k.name].append(k.end - k.start)
    ranked = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    room = lines - len(found) - 1
    found += [f"{sum(us) * ms:10.4f} {len(us) / calls:6.1f}  {name[:95]}" for name, us in ranked[:room]]
    if ranked[room:]:
        rest = [us for _, each in ranked[room:] for us in each]
        found.append(f"{sum(rest) * ms:10.4f} {len(rest) / calls:6.1f}  {len(ranked) - room} others")
    return found


def _gaps(kernels: Sequence[Kernel]) -> list[tuple[float, str, str]]:
    """Times at which nothing ran, longest first, with what ended before and what began after."""
    found, last = [], None
    for k in sorted(kernels, key=lambda k: k.start):
        if last is not None and k.start > last.end:
            found.append((k.start - last.end, last.name, k.name))
        if last is None or k.end > last.end:
            last = k
    return sorted(found, reverse=True)


def profiled(seat: Seat, thunk: Thunk, calls: int = 5) -> list[str]:
    """The summary of some calls, as this rank saw them; the others make the same calls."""
    for _ in range(3):
        thunk()
    seat.together()
    seat.wait()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if seat.on_gpu else [])]) as taken:
        for _ in range(calls):
            thunk()
        seat.wait()
    kind = "CUDA" if seat.on_gpu else "CPU"
    events: Any = taken.profiler.kineto_results.events() if taken.profiler else []
    kernels = [
        Kernel(e.name(), e.start_ns() / 1e3, (e.start_ns() + e.duration_ns()) / 1e3)
        for e in events
        if e.device_type().name == kind and e.duration_ns() > 0 and not e.name().startswith(NOTES)
    ]
    if seat.on_gpu:
        torch.cuda.synchronize()
    return summary(kernels, calls)
