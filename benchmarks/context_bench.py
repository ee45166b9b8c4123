"""The sections of the context-parallel benchmark: what each measures, and against what."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import context_peers as peers
import context_problems as problems
from anyattn import ContextParallel, ContextPlan, NoBackend
from context_problems import Problem
from context_timing import CaseFailed, Seat, Stuck, Thunk, Times, extra_mib, host_microseconds, milliseconds
from measure import Report, Row, reasons

COMMS = ("p2p", "all_gather", "a2a", "a2a+p2p")
FORWARD, BOTH = "forward", "forward and backward"
FACTOR = {FORWARD: 1.0, BOTH: 3.5}
#: Speed of the best scheme over that of one GPU, forward and backward.
TARGETS = {"32k": ">= 0.9", "128k": ">= 0.96", "packed 64k": ">= 0.85", "window 4k, 128k": ">= 0.85"}
#: A peer's kernel, and the backend that is the same one.
SAME_KERNEL = {"flash": "varlen", "cudnn": "cudnn"}


@dataclass
class RankRow(Row):
    """A comparison over ranks, with what belongs beside it."""

    detail: dict[str, Any] = field(default_factory=dict)


@dataclass
class RankReport(Report):
    """A report named after all GPUs of the run."""

    ranks: int = 1

    @property
    def path(self) -> Path:
        """``<date>-<count>x<gpu or cpu>-<kind>.json``."""
        gpu = self.machine.get("gpu", "cpu").lower().replace("nvidia ", "").replace(" ", "-")
        return self.folder / f"{date.today().isoformat()}-{self.ranks}x{gpu}-{self.kind}.json"


@dataclass
class Bench:
    """One run over all ranks: measurements, each of which may fail, as long as the time lasts."""

    seat: Seat
    report: RankReport
    seconds: float
    """Of the whole run: what has not begun by then is left out."""
    begun: float = field(default_factory=time.monotonic)
    speeds: dict[tuple[str, str, str], float] = field(default_factory=dict)
    """TFLOP/s per GPU of one GPU alone, by (problem, backend, way)."""
    best: dict[tuple[str, str, str], tuple[float, str]] = field(default_factory=dict)
    """Of the best scheme, with its name."""
    _meshes: dict[bool, DeviceMesh] = field(default_factory=dict)
    _compared: set[tuple[Any, ...]] = field(default_factory=set)

    # --- measurements ---

    def attempt(self, what: str, measure: Callable[[], list[RankRow]]) -> None:
        """Add the rows of a measurement on all ranks, or why there are none.

        Raises:
            SystemExit: a device is stuck: nothing can be measured any more. What there is has been written.
        """
        spent = time.monotonic() - self.begun
        try:
            if any(self.seat.exchange(spent > self.seconds)):
                self.report.leave_out(what, "time", f"the run's {self.seconds:.0f} s were over")
                return
            self.report.rows += self._measured(measure)
        except CaseFailed as failed:
            told = str(failed)
            self.report.leave_out(what, "refused" if "refused: " in told else "error", told.replace("refused: ", ""))
            self._recover(what)
        if self.seat.rank == 0:
            print(f"[{spent:5.0f} s] {what}: {time.monotonic() - self.begun - spent:.1f} s", flush=True)
            self.report.write()

    def _measured(self, measure: Callable[[], list[RankRow]]) -> list[RankRow]:
        """Its rows, once all ranks have them.

        Raises:
            CaseFailed: on all ranks, if any failed.
        """
        error = ""
        rows: list[RankRow] = []
        try:
            rows = measure()
            self.seat.wait()
        except CaseFailed:
            raise
        except NoBackend as refused:
            error = f"refused: {reasons(refused.explanation)}"
        except Exception as broken:
            place = traceback.extract_tb(broken.__traceback__)[-1]
            text = str(broken)[:500]
            error = f"{type(broken).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"
            if text.startswith("refused: "):
                error = text
            else:
                traceback.print_exc()
        self.seat.exchange(error=error)
        return rows

    def _recover(self, what: str) -> None:
        """Go on if every device is at rest, else end."""
        try:
            self.seat.wait(10.0)
            stuck = False
        except (Stuck, RuntimeError):
            stuck = True
        if any(self.seat.exchange(stuck)):
            self.report.leave_out("everything after", "error", f"a device did not come to rest after: {what}")
            if self.seat.rank == 0:
                self.report.write()
                self.report.show()
            self.seat.exchange()
            os._exit(3)  # the communicator waits for ever
        if self.seat.on_gpu:
            torch.cuda.empty_cache()

    # --- plans and references ---

    def schemes(self) -> list[str]:
        """That this number of ranks allows."""
        return [comm for comm in COMMS if comm != "a2a+p2p" or self.seat.size % 2 == 0]

    def parallel(self, comm: str) -> ContextParallel:
        """The ranks, under a scheme."""
        return ContextParallel(self._mesh(two_dims=comm == "a2a+p2p"), comm=comm)

    def _mesh(self, *, two_dims: bool = False) -> DeviceMesh:
        """All ranks, made once."""
        if two_dims not in self._meshes:
            shape, names = ((self.seat.size // 2, 2), ("p2p", "a2a")) if two_dims else ((self.seat.size,), ("cp",))
            self._meshes[two_dims] = init_device_mesh(self.seat.device.type, shape, mesh_dim_names=names)
        return self._meshes[two_dims]

    def plan(self, problem: Problem, comm: str, parallel: ContextParallel | None = None) -> ContextPlan:
        """For a problem, placement left to it; by these ranks, or by others."""
        heads, kv_heads = problem.heads
        return (parallel or self.parallel(comm)).plan(
            problem.given(self.seat.device), window=problem.window, num_heads=heads, num_kv_heads=kv_heads,
            head_dim=problem.dim,
        )  # fmt: skip

    def speed(self, problem: Problem, times: Times, way: str, *, ranks: int, slowest: bool = True) -> float:
        """TFLOP/s per GPU."""
        ms = times.slowest if slowest else times.median
        return float(f"{problem.flops * FACTOR[way] / ranks / ms / 1e9:.4g}")

    def reference(self, problem: Problem, backend: str, ranks: int | None = None) -> dict[str, float]:
        """TFLOP/s of one GPU, by way, measured on all ranks at once and once per run; the median rank's.

        ``ranks``: as many as the problem is for, if not these.
        """
        keys = {way: (problem.name, backend, way) for way in FACTOR}
        if keys[BOTH] not in self.speeds:
            one = problem.alone(ranks or self.seat.size)
            call = problems.alone(one, backend, self.seat.device)
            ways: dict[str, Thunk] = {FORWARD: call.infer, BOTH: call.both}
            for way, thunk in ways.items():
                times = milliseconds(self.seat, thunk)
                self.speeds[keys[way]] = self.speed(one, times, way, ranks=1, slowest=False)
        return {way: self.speeds[key] for way, key in keys.items()}

    def compared(self, problem: Problem, backend: str, comm: str) -> None:
        """Once per kind: a smaller problem's results are one GPU's."""
        key = (problem.packed, problem.window is None, backend, comm)
        if key not in self._compared:
            small = problem.small()
            problems.compare(small, backend, self.plan(small, comm), self.seat)
            self._compared.add(key)

    # --- sections ---

    def throughput(self, problem: Problem, backend: str, schemes: Sequence[str]) -> None:
        """Every scheme's speed, and the best one's against its target."""
        for comm in schemes:
            self.attempt(f"{problem.name}, {comm}, {backend}", partial(self._scheme, problem, backend, comm))
        for way in FACTOR:
            if (key := (problem.name, backend, way)) not in self.best:
                continue
            value, comm = self.best[key]
            target = TARGETS.get(problem.name, "") if way == BOTH and not self.seat.tiny else ""
            what = f"{way}, {problem.name}, best scheme ({comm}), {backend}"
            self.report.rows.append(RankRow(what, value, self.speeds[key], "TFLOP/s", one_gpu(problem), target))

    def _scheme(self, problem: Problem, backend: str, comm: str) -> list[RankRow]:
        self.compared(problem, backend, comm)
        alone = self.reference(problem, backend)
        plan = self.plan(problem, comm)
        call = problems.sharded(problem, backend, plan, self.seat.device)
        chosen = f"{comm}: {plan.comm}" if comm == "auto" else comm
        facts = {"bytes_moved": plan.bytes_moved, "imbalance": round(plan.imbalance, 4), "rows": plan.rows}
        rows = []
        for way, thunk in ((FORWARD, call.infer), (BOTH, call.both)):
            times = milliseconds(self.seat, thunk)
            speed = self.speed(problem, times, way, ranks=self.seat.size)
            key = (problem.name, backend, way)
            self.best[key] = max(self.best.get(key, (0.0, "")), (speed, chosen))
            detail = {"ms": round(times.slowest, 4), "ms_by_rank": times.by_rank, **facts}
            what = f"{way}, {problem.name}, {chosen}, {backend}"
            rows.append(RankRow(what, speed, alone[way], "TFLOP/s", one_gpu(problem), detail=detail))
        if problem.window is not None and comm != "auto":
            halo = problem.window[0] * problem.key_row_bytes / 1e6
            what = f"bytes received, {problem.name}, {chosen}, {backend}"
            against = "one window's keys and values"
            rows.append(RankRow(what, round(plan.bytes_moved / 1e6, 3), round(halo, 3), "MB", against))
        return rows

    def memory(self, problem: Problem, backend: str, comm: str) -> list[RankRow]:
        """Peak of forward and backward beyond inputs, outputs and gradients."""
        plan = self.plan(problem, comm)
        rows = replace(problem, lengths=(plan.rows,))
        alone = extra_mib(self.seat, problems.alone(rows, backend, self.seat.device).both)
        ours = extra_mib(self.seat, problems.sharded(problem, backend, plan, self.seat.device).both)
        stage = plan.rows * problem.key_row_bytes / 2**20
        what = f"extra memory, {problem.name}, {comm}, {backend}"
        found = [RankRow(what, ours, alone, "MiB", "the kernel alone, as many rows")]
        bounds = {"p2p": ("two stages of keys and values", 2 * stage)}
        bounds["all_gather"] = ("the keys and values of all ranks, all heads", self.seat.size * stage)
        if comm in bounds:
            against, bound = bounds[comm]
            target = "<= 1.0" if self.seat.on_gpu and comm == "p2p" else ""
            more = f"extra memory over the kernel's, {problem.name}, {comm}, {backend}"
            found.append(RankRow(more, round(ours - alone, 3), round(bound, 3), "MiB", against, target))
        return found

    def host(self, problem: Problem, backend: str, comm: str) -> list[RankRow]:
        """Host time of a tiny call, and of a plan and its first use."""
        plan = self.plan(problem, comm)
        call = problems.sharded(problem, backend, plan, self.seat.device)
        rows = replace(problem, lengths=(plan.rows,), packed=False)
        plain = problems.alone(rows, backend, self.seat.device)
        us = host_microseconds(self.seat, call.infer, plain.infer, call.both, plain.both)
        what, against = f"tiny {problem.name}, {comm}, {backend}", "attention() without a plan, as many rows"
        return [
            RankRow(f"host time, {FORWARD}, {what}", us[0], us[1], "us", against),
            RankRow(f"host time, {BOTH}, {what}", us[2], us[3], "us", against),
        ]

    def planning(self, problem: Problem, backend: str, comm: str) -> list[RankRow]:
        """Milliseconds of making a plan, and of its first call over that of a later one."""
        given, seat, heads = problem.given(self.seat.device), self.seat, problem.heads
        parallel = self.parallel(comm)
        taken: dict[str, list[float]] = {"plan": [], "first": [], "later": []}
        for _ in range(2 if seat.tiny else 6):
            clock = [time.perf_counter()]
            plan = parallel.plan(given, num_heads=heads[0], num_kv_heads=heads[1], head_dim=problem.dim)
            clock.append(time.perf_counter())
            call = problems.sharded(problem, backend, plan, seat.device)
            for _ in range(2):
                seat.together()
                seat.wait()
                clock.append(time.perf_counter())
                call.infer()
                clock.append(time.perf_counter())
            for name, i in (("plan", 0), ("first", 2), ("later", 4)):
                taken[name].append((clock[i + 1] - clock[i]) * 1e3)
        every = seat.exchange({name: sorted(ms[1:])[len(ms[1:]) // 2] for name, ms in taken.items()})
        ms = {name: round(max(one[name] for one in every), 4) for name in taken}
        what, against = f"{problem.name}, {comm}, {backend}", "a later forward, enqueued"
        return [
            RankRow(f"making a plan, {what}", ms["plan"], ms["later"], "ms", against),
            RankRow(f"a plan's first forward, enqueued, {what}", ms["first"], ms["later"], "ms", against),
        ]

    # --- peers ---

    def peer(self, name: str, problem: Problem, backend: str, make: Callable[[Problem], peers.Peer]) -> list[RankRow]:
        """A peer's speed against one GPU's with the same kernel, and our best scheme's against the peer's."""
        small = problem.small().rounded(2 * self.seat.size)
        peers.compare(make(small), small, backend, self.seat.device)
        alone = self.reference(problem, backend)
        peer = make(problem)
        rows = []
        for way, thunk in ((FORWARD, peer.infer), (BOTH, peer.both)):
            times = milliseconds(self.seat, thunk, warm_up=4)  # some compile for the shapes that they see
            speed = self.speed(problem, times, way, ranks=self.seat.size)
            detail = {"ms": round(times.slowest, 4), "ms_by_rank": times.by_rank}
            what = f"{way}, {problem.name}, {name}"
            rows.append(RankRow(what, speed, alone[way], "TFLOP/s", one_gpu(problem), detail=detail))
            if found := self.best.get((problem.name, backend, way)):
                ours = f"{way}, {problem.name}, best scheme ({found[1]}), {backend}"
                rows.append(RankRow(ours, found[0], speed, "TFLOP/s", name))
        return rows

    def ring(self, name: str, kind: Callable[..., peers.Peer], problem: Problem, backend: str) -> list[RankRow]:
        """A function of ring-flash-attn."""
        package = peers.ring_flash_attn(backend)
        make = partial(kind, package, seat=self.seat)
        return self.peer(f"ring-flash-attn {name} ({backend})", problem, backend, make)

    def torch_own(self, kernel: str, rotate: str, problem: Problem, repeat_keys: bool) -> list[RankRow]:
        """The context_parallel of torch, with few key heads or with each repeated in the call."""
        mesh, device, rows = self._mesh(), self.seat.device, {}
        for length in (problem.lengths[0], problem.small().rounded(2 * self.seat.size).lengths[0]):
            with peers.torch_context_parallel(length, mesh, rotate, device) as places:
                rows[length] = places

        def make(one: Problem) -> peers.Peer:
            return peers.Sdpa(one, rows[one.lengths[0]], kernel, repeat_keys, device)

        more = ", keys repeated" if repeat_keys else ""
        with peers.torch_context_parallel(problem.lengths[0], mesh, rotate, device):
            return self.peer(f"torch context_parallel {rotate} ({kernel}{more})", problem, SAME_KERNEL[kernel], make)


def one_gpu(problem: Problem) -> str:
    """What a speed is compared with."""
    return "one GPU, the whole batch" if problem.packed else "one GPU, a sequence of as many FLOPs"
