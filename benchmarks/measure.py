"""Timing and reporting shared by the benchmarks. Every figure is a ratio of two things measured in one run."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
import traceback
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
    """What ours / theirs should be, "<= 2.0", or ours - theirs, "<= +30 us". Empty where the figure is for scale."""
    ratio: float | None = field(init=False)
    """None where theirs is 0."""
    difference: float = field(init=False)
    met: bool | None = field(init=False)

    def __post_init__(self) -> None:
        self.ratio = round(self.ours / self.theirs, 4) if self.theirs else None
        self.difference = round(self.ours - self.theirs, 5)
        self.met = self._met() if self.target else None

    def _met(self) -> bool:
        comparison, _, rest = self.target.partition(" ")
        bound, _, unit = rest.partition(" ")
        is_difference = bound.startswith("+")
        if comparison not in ("<=", ">=") or not bound or unit != (self.unit if is_difference else ""):
            raise ValueError(f'a target is "<= 0.5", ">= 0.99" or "<= +30 {self.unit}"; got {self.target!r}')
        value = self.difference if is_difference else self.ratio
        if value is None:
            raise ValueError(f"{self.name}: no ratio to {self.theirs}; give a difference as its target")
        return value <= float(bound) if comparison == "<=" else value >= float(bound)


def reasons(explanation: Any) -> str:
    """Why the backend that was asked for refuses, without the others, which say that they were not asked for."""
    found = (reason for told in explanation.rejected.values() for reason in told if reason.what != "backend")
    return "; ".join(map(str, found)) or "no kernel takes it"


@dataclass
class Report:
    """The rows of one kind of benchmark, and what has none and why, written anew whenever something was added.

    Whatever one measurement raises is kept in its place: it takes no other one with it.
    """

    kind: str
    folder: Path
    rows: list[Row] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)
    """What was not measured, each with "what", "why", and "because": "absent", "refused" or "error"."""
    machine: dict[str, Any] = field(default_factory=lambda: machine())

    def attempt(self, what: str, measure: Callable[[], list[Row]]) -> None:
        """Add the rows of one measurement, or why there are none."""
        from anyattn import NoBackend

        print(f"{what} ...", flush=True)
        try:
            self.rows += measure()
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # an error of the device belongs here, and not to what comes next
                torch.cuda.empty_cache()
        except NoBackend as refused:
            self.leave_out(what, "refused", reasons(refused.explanation))
        except Exception as error:
            traceback.print_exc()
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {str(error)[:500]} ({Path(place.filename).name}:{place.lineno})"
            self.leave_out(what, "error", text)
        self.write()

    def leave_out(self, what: str, because: str, why: str) -> None:
        """Say why something was not measured."""
        self.left_out.append({"what": what, "because": because, "why": why})

    @property
    def path(self) -> Path:
        """``<date>-<gpu or cpu>-<kind>.json``."""
        gpu = self.machine.get("gpu", "cpu").lower().replace("nvidia ", "").replace(" ", "-")
        return self.folder / f"{date.today().isoformat()}-{gpu}-{self.kind}.json"

    def write(self) -> None:
        """Write the file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "date": date.today().isoformat(),
            "machine": self.machine,
            "rows": [asdict(row) for row in self.rows],
            "left_out": self.left_out,
        }
        self.path.write_text(json.dumps(content, indent=1) + "\n")

    def show(self) -> None:
        """Print a line for each row, and for each thing left out."""
        width = max((len(row.name) for row in self.rows), default=0)
        for row in self.rows:
            verdict = {None: "", True: "met", False: "NOT MET"}[row.met]
            ratio = "" if row.ratio is None else row.ratio
            figures = f"{row.ours:>10} {row.unit:<7} {row.theirs:>10}  {ratio:>7} {row.target:<9} {verdict:<8}"
            print(f"{row.name:<{width}}  {figures} {row.against}")
        for item in self.left_out:
            print(f"left out ({item['because']}): {item['what']}: {item['why']}")
        print(f"written to {self.path}")


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


def device_ms(*thunks: Thunk, rounds: int = 25, least: int = 9, seconds: float = 0.25) -> list[float]:
    """Milliseconds of device time per call of each, interleaved, median of rounds.

    The device is kept busy first, so that the calls are queued when they are timed: host time does not enter. Calls
    that take long are made fewer times, to take about these seconds each, but ``least`` rounds at least.
    """
    for thunk in thunks:
        for _ in range(3):
            thunk()
    once = [_queued_ms(thunk, 1) for thunk in thunks]
    inner = [min(4, max(1, round(4 / ms))) for ms in once]
    round_ms = sum(ms * calls + 4 for ms, calls in zip(once, inner, strict=True))  # the sleep, and some host time
    rounds = min(rounds, max(least, round(seconds * 1e3 * len(thunks) / round_ms)))
    times: list[list[float]] = [[] for _ in thunks]
    for _ in range(rounds):
        for thunk, calls, taken in zip(thunks, inner, times, strict=True):
            taken.append(_queued_ms(thunk, calls))
    return [round(statistics.median(taken), 5) for taken in times]


def _queued_ms(thunk: Thunk, calls: int) -> float:
    """Milliseconds of device time per call, of this many calls."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(6_000_000)  # about 3 ms
    start.record()
    for _ in range(calls):
        thunk()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / calls


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


def synchronises(thunk: Thunk) -> int:
    """1 if a call makes the host wait for the device, as far as torch sees, else 0. It is called once before."""
    thunk()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        thunk()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return 0


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
