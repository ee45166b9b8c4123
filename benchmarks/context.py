"""Measure context parallelism on all GPUs of a machine, against one GPU and against other packages.

    torchrun --nproc-per-node 4 benchmarks/context.py --out FOLDER [--backends fa3,fa4] [--cases 32k,packed]
    torchrun --nproc-per-node 4 benchmarks/context.py --profile 32k:p2p:fa3
    torchrun --nproc-per-node 2 benchmarks/context.py --device cpu --tiny --backends reference

Cases: 16k, 32k, 64k, 128k (one causal sequence), packed, window, memory, host, ring (ring-flash-attn), torch
(torch's context_parallel). On a CPU, over gloo, only the script itself is tried: with --tiny, and the figures mean
nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import anyattn
import context_peers as peers
import context_problems as problems
from context_bench import BOTH, Bench, RankReport
from context_problems import Problem, documents
from context_profile import profiled
from context_timing import Seat
from measure import RESULTS

LENGTHS = {"16k": 16384, "32k": 32768, "64k": 65536, "128k": 131072}
#: In the order in which they are measured: what matters most first, for time may end.
CASES = ("32k", "128k", "packed", "window", "ring", "memory", "host", "torch", "64k", "16k")
#: Lets what NCCL starts go before what else waits for the GPU; for peers too.
HIGH_PRIORITY = "TORCH_NCCL_HIGH_PRIORITY"
BACKENDS = ("fa3", "fa4", "cudnn", "varlen")


def batches(tiny: bool) -> dict[str, Problem]:
    """By case; the tiny ones have the same names and fit a CPU."""
    found = {name: Problem(name, (length,)) for name, length in LENGTHS.items()}
    found["packed"] = Problem("packed 64k", documents(65536, 2048, 16384), packed=True)
    found["window"] = Problem("window 4k, 128k", (131072,), window=(4095, 0))
    found["host"] = Problem("sequence", (256,))
    if not tiny:
        return found
    small = {name: replace(one, heads=(4, 2), dim=64, lengths=(one.lengths[0] // 512,)) for name, one in found.items()}
    small["packed"] = replace(small["packed"], lengths=documents(128, 16, 48))
    small["window"] = replace(small["window"], window=(31, 0))
    return small | {"host": replace(small["host"], lengths=(64,))}


class Run:
    """The cases of a run."""

    def __init__(self, bench: Bench, backends: list[str], tiny: bool) -> None:
        self.bench, self.backends, self.problems = bench, backends, batches(tiny)

    def case(self, name: str) -> None:
        """Measure one."""
        special: dict[str, Callable[[], None]] = {
            "memory": self._memory, "host": self._host, "ring": self._ring, "torch": self._torch
        }  # fmt: skip
        if name in special:
            special[name]()
            return
        more = ["auto"] if name == "packed" else []
        for backend in self.backends:
            self.bench.throughput(self.problems[name], backend, [*self.bench.schemes(), *more])

    def _memory(self) -> None:
        bench, problem = self.bench, self.problems["128k"]
        for backend in self.backends:
            for comm in bench.schemes():
                bench.attempt(f"memory, {comm}, {backend}", partial(bench.memory, problem, backend, comm))

    def _host(self) -> None:
        bench, tiny = self.bench, self.problems["host"]
        for backend in self.backends:
            for comm in bench.schemes():
                bench.attempt(f"host time, {comm}, {backend}", partial(bench.host, tiny, backend, comm))
        for problem in (tiny, self.problems["packed"]):
            for comm in bench.schemes():
                what = f"plan, {problem.name}, {comm}"
                bench.attempt(what, partial(bench.planning, problem, self.backends[0], comm))

    def _ring(self) -> None:
        bench, packed, ranks = self.bench, self.problems["packed"], self.bench.seat.size
        rounded = packed.rounded(2 * ranks)
        served = [name for name in ("fa3", "varlen") if name in self.backends][:1]  # one kernel tells of the schedule
        if not served:
            bench.report.leave_out("ring-flash-attn", "absent", "its kernel calls are served by fa3 or varlen only")
        for backend in served:
            cases: list[tuple[str, type[peers.Peer], Problem]] = [
                ("zigzag", peers.Zigzag, self.problems["32k"]), ("zigzag", peers.Zigzag, self.problems["128k"]),
                ("llama3", peers.Llama3, self.problems["32k"]), ("llama3", peers.Llama3, self.problems["128k"]),
                ("zigzag varlen, lengths rounded", peers.Zigzag, rounded), ("llama3", peers.Llama3, packed),
                ("llama3", peers.Llama3, self.problems["window"]),
            ]  # fmt: skip
            for name, kind, problem in cases:
                what = f"ring-flash-attn {name}, {problem.name}, {backend}"
                bench.attempt(what, partial(bench.ring, name, kind, problem, backend))

    def _torch(self) -> None:
        bench = self.bench
        wanted = {"varlen": "flash", "cudnn": "cudnn"}
        if not bench.seat.on_gpu:
            bench.report.leave_out("torch context_parallel", "absent", "it has no kernel for a CPU")
            return
        for kernel in [wanted[name] for name in self.backends if name in wanted]:
            for rotate in ("allgather", "alltoall"):
                for length in ("32k", "128k"):
                    self._torch_kernel(kernel, rotate, self.problems[length])

    def _torch_kernel(self, kernel: str, rotate: str, problem: Problem) -> None:
        """With few key heads, and where that fails with keys repeated, which the caller then has to do."""
        bench = self.bench
        for more in ("", ", keys repeated"):
            what = f"torch context_parallel {rotate}, {problem.name}, {kernel}{more}"
            bench.attempt(what, partial(bench.torch_own, kernel, rotate, problem, bool(more)))
            if all(item["what"] != what for item in bench.report.left_out):
                return


def seated(options: argparse.Namespace) -> Seat:
    """Join the other ranks that torchrun started."""
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        os.environ.setdefault(HIGH_PRIORITY, "1")
        dist.init_process_group("nccl", timeout=timedelta(seconds=120), device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    return Seat(dist.get_rank(), dist.get_world_size(), device, options.tiny)


def more_of_the_machine(seat: Seat) -> dict[str, Any]:
    """What figures over ranks depend on beside."""
    facts: dict[str, Any] = {"ranks": seat.size}
    with contextlib.suppress(PackageNotFoundError):
        facts["ring-flash-attn"] = version("ring-flash-attn")
    if seat.on_gpu:
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        facts[HIGH_PRIORITY] = os.environ[HIGH_PRIORITY]
    return facts


def finish(bench: Bench) -> None:
    """Write and show what there is."""
    if bench.seat.rank == 0:
        bench.report.write()
        bench.report.show()


def add_options(parser: argparse.ArgumentParser, seconds: float) -> None:
    """What every benchmark over ranks takes."""
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result")
    parser.add_argument("--seconds", type=float, default=seconds, help="what has not begun by then is left out")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="problems for a CPU, few repetitions: a trial")


def show_profile(bench: Bench, asked: str, tiny: bool) -> None:
    """What rank 0's device does in forward and backward of ``CASE:SCHEME:BACKEND``."""
    case, comm, backend = asked.split(":", 2)
    problem = batches(tiny)[case]
    plan = bench.plan(problem, comm)
    lines = profiled(bench.seat, problems.sharded(problem, backend, plan, bench.seat.device).both)
    if bench.seat.rank == 0:
        print(f"{asked}, {BOTH}, rank 0 of {bench.seat.size}, {plan!r}", *lines, sep="\n", flush=True)
    bench.seat.exchange()


def parsed() -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, 230.0)
    parser.add_argument("--backends", default=",".join(BACKENDS), help=f"default: {','.join(BACKENDS)}, as installed")
    parser.add_argument("--cases", default=",".join(CASES), help=f"default: {','.join(CASES)}, in this order")
    parser.add_argument("--profile", action="append", default=[], metavar="CASE:SCHEME:BACKEND", help="show what "
                        "the device does, and measure nothing; may be repeated")  # fmt: skip
    options = parser.parse_args()
    options.backends, options.cases = (given.split(",") for given in (options.backends, options.cases))
    known = batches(tiny=True)
    cases = [*options.cases, *(name for name in (given.partition(":")[0] for given in options.profile))]
    if unknown := [name for name in cases if name not in CASES]:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    if wrong := [x for x in options.profile if x.count(":") < 2 or x.partition(":")[0] not in known]:
        parser.error(f"--profile takes CASE:SCHEME:BACKEND with one of {', '.join(known)}; got {', '.join(wrong)}")
    return options


def main() -> None:
    """Measure, print, and write one dated file."""
    options = parsed()
    seat = seated(options)
    report = RankReport("context", options.out, ranks=seat.size)
    report.machine |= more_of_the_machine(seat)
    bench = Bench(seat, report, options.seconds)
    for asked in options.profile:
        show_profile(bench, asked, options.tiny)
    if not options.profile:
        status = anyattn.backends()
        for name in [name for name in options.backends if name not in status or not status[name].runs_here]:
            why = status[name].reason if name in status else "anyattn has no such backend"
            report.leave_out(name, "absent", why.replace("not installed", "not installed here"))
            options.backends.remove(name)
        run = Run(bench, options.backends, options.tiny)
        for name in options.cases if options.backends else ():
            run.case(name)
        finish(bench)
    seat.exchange()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
