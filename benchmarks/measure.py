"""Timing and reporting shared by the benchmarks. Every figure is a ratio of two things measured in one run."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
Thunk = Callable[[], Any]


@dataclass
class Row:
    """One comparison."""

    name: str
    ours: float
    theirs: float
    unit: str
    against: str
    target: str = ""
    """What the ratio ours / theirs should be, "<= 2.0"; empty where the figure is for scale only."""
    ratio: float = field(init=False)
    met: bool | None = field(init=False)

    def __post_init__(self) -> None:
        self.ratio = round(self.ours / self.theirs, 4)
        comparison, _, bound = self.target.partition(" ")
        self.met = None
        if bound:
            self.met = self.ratio <= float(bound) if comparison == "<=" else self.ratio >= float(bound)


def host_us(*thunks: Thunk, calls: int = 400, rounds: int = 9, warm_up: int = 50) -> list[float]:
    """Microseconds of host time per call of each, interleaved, median of rounds."""
    for thunk in thunks:
        for _ in range(warm_up):
            thunk()
    times: list[list[float]] = [[] for _ in thunks]
    for _ in range(rounds):
        for thunk, taken in zip(thunks, times, strict=True):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                thunk()
            taken.append((time.perf_counter() - start) / calls * 1e6)
    return [round(statistics.median(taken), 2) for taken in times]


def device_ms(*thunks: Thunk, rounds: int = 25, inner: int = 4) -> list[float]:
    """Milliseconds of device time per call of each, interleaved, median of rounds.

    The device is kept busy first, so that the calls are queued when they are timed: host time does not enter.
    """
    for thunk in thunks:
        for _ in range(3):
            thunk()
    times: list[list[float]] = [[] for _ in thunks]
    for _ in range(rounds):
        for thunk, taken in zip(thunks, times, strict=True):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(6_000_000)  # about 3 ms
            start.record()
            for _ in range(inner):
                thunk()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / inner)
    return [round(statistics.median(taken), 5) for taken in times]


def peak_mib(thunk: Thunk) -> float:
    """Peak device memory above what is held before, in MiB, results included."""
    thunk()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = thunk()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return round(peak / 2**20, 3)


def machine() -> dict[str, Any]:
    """Hardware and versions that a figure depends on."""
    from anyattn import __version__, backends

    facts: dict[str, Any] = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "anyattn": __version__,
        "backends": {name: status.version for name, status in backends().items() if status.runs_here},
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
    return facts


def report(kind: str, rows: list[Row], folder: Path = RESULTS) -> Path:
    """Print the rows and write them, dated, with the machine they were measured on."""
    width = max(len(row.name) for row in rows)
    for row in rows:
        verdict = {None: "", True: "met", False: "NOT MET"}[row.met]
        figures = f"{row.ours:>10} {row.unit:<7} {row.theirs:>10}  {row.ratio:>7} {row.target:<9} {verdict:<8}"
        print(f"{row.name:<{width}}  {figures} {row.against}")
    gpu = (
        torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-")
        if torch.cuda.is_available()
        else "cpu"
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{date.today().isoformat()}-{gpu}-{kind}.json"
    content = {"date": date.today().isoformat(), "machine": machine(), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {path}")
    return path
