"""The tests of context parallelism on GPUs: the cases and judges of test_context_parallel.py, over NCCL.

    torchrun --nproc-per-node 4 tests/context_gpu.py --backends fa4,varlen,cudnn,torch:flash --out results.json

prints and writes {backend: {scheme: {passed, failed: [...], refused: {reason: n}}}}, and what holds on CUDA alone: no
waiting for the device, and peak memory. Outcomes are written after every case, and a run that ended early goes on where
it was (--resume): a case that took the process down is one that failed. ``--cpu`` runs everything over gloo.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import anyattn
import cases
import context_judge
import context_ranks
import oracle
from context_cases import ContextCase, build, refusal
from context_features import FEATURES, for_gpu, scheme_on
from context_pool import Failure, Seat

SCHEMES = ("p2p", "all_gather", "a2a", "a2a+p2p")
#: Seconds that a collective of the device waits before its watchdog ends the process.
TIMEOUT = 90


def fast_visible_pairs(terms: oracle.Terms, len_q: int, len_k: int) -> Tensor:
    """``oracle.visible_pairs`` without a loop: batches are longer here."""
    left, right = terms.window or (None, None)
    if terms.causal:
        right = 0 if right is None else min(right, 0)
    shift = 0 if terms.causal == "top_left" else len_k - len_q
    distance = torch.arange(len_k)[None, :] - torch.arange(len_q)[:, None] - shift
    seen = torch.ones(len_q, len_k, dtype=torch.bool)
    if left is not None:
        seen &= distance >= -left
    if right is not None:
        seen &= distance <= right
    return seen


@dataclass
class World:
    """All ranks of this run."""

    rank: int
    size: int
    device: torch.device
    control: Any
    """A gloo group: what ranks tell one another about cases, whatever the GPU does."""
    groups: dict[Any, Any] = field(default_factory=dict)

    def seat(self, case: ContextCase) -> Seat:
        """Where a case runs."""
        if case.group not in self.groups:
            shape = case.ranks if isinstance(case.ranks, tuple) else (case.ranks,)
            names = ("p2p", "a2a") if isinstance(case.ranks, tuple) else ("cp",)
            self.groups[case.group] = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        return Seat(self.rank, self.size, self.groups[case.group])

    def all(self, mine: Any) -> list[Any]:
        """Everyone's, by rank; also a barrier on the host."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine, group=self.control)
        return found


def join(cpu: bool) -> World:
    """Meet the other ranks."""
    if cpu:
        device = torch.device("cpu")
        torch.set_num_threads(1)
    else:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo" if cpu else "nccl", timeout=timeout)
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=10 * TIMEOUT))
    return World(dist.get_rank(), dist.get_world_size(), device, control)


# --- cases ---------------------------------------------------------------------------------------------------------


def table(backend: str, ranks: int, only: str) -> Iterator[tuple[str, str, ContextCase]]:
    """(scheme, feature, case) for a backend."""
    for comm in SCHEMES:
        for feature, changes in FEATURES.items():
            if only and not re.search(only, f"{comm} {feature}"):
                continue
            yield comm, feature, for_gpu(ContextCase(**{**changes, **scheme_on(comm, ranks), "backend": backend}))


def attempt(world: World, case: ContextCase) -> Any:
    """What this rank found, or its failure."""
    try:
        return context_ranks.run(world.seat(case), case, world.device)
    except Exception as error:
        return Failure.of(error)
    finally:
        torch.use_deterministic_algorithms(False)


def verdict(case: ContextCase, everyone: list[Any], device: str, product_error: float) -> tuple[str, str]:
    """("passed" | "failed" | "refused", why)."""
    failed = [x for x in everyone if isinstance(x, Failure)]
    why = refusal(case)
    if not failed:
        if why is not None:
            return "failed", f"it ran, and {why}"
        try:
            context_judge.judge(case, everyone, device, product_error)
        except AssertionError as error:
            return "failed", str(error)
        return "passed", ""
    if len(failed) < len(everyone) or len({f.kinds for f in failed}) > 1:
        return "failed", "ranks differ: " + "; ".join(str(x)[:300] for x in failed)
    if why is not None and failed[0].is_a(anyattn.InvalidArgument):
        return "refused", why
    if failed[0].is_a(anyattn.NoBackend):
        return "refused", _reason(failed[0].message, case.backend)
    return "failed", failed[0].text[-1500:]


def _reason(message: str, backend: str) -> str:
    """The lines of a NoBackend that speak of the backend."""
    lines = [line.strip() for line in message.splitlines() if backend.partition(":")[0] in line]
    return " | ".join(lines)[:300] or message[:300]


def product_errors(device: str) -> dict[str, dict[str, float]]:
    """Of kernels, by dtype."""
    return {t.name: dict(t.capability.product_error) for t in cases.targets(device)}


# --- what holds on CUDA alone --------------------------------------------------------------------------------------


def steps(world: World, case: ContextCase) -> Any:
    """A function that runs one step of a case, from shards to the gradients of shards, with one plan."""
    whole = build(case, world.device)
    plan = context_ranks.plan_of(case, world.seat(case).group, whole)
    local = context_ranks.localize(whole, plan, world.device)
    leaves = [local.given[n].detach().requires_grad_() for n in "qkv"]
    leaves += [x for n in ("sink",) if (x := local.leaves.get(n)) is not None]

    def step() -> tuple[Tensor, ...]:
        out = anyattn.attention(*leaves[:3], **local.arguments)
        out = out[0] if isinstance(out, tuple) else out
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return step


def waits(world: World, case: ContextCase) -> str:
    """Whether the second call with a plan waits for the device: "" if it does not."""
    try:
        step = steps(world, case)
        for _ in range(2):
            step()
    except anyattn.AnyattnError as error:
        return f"refused: {str(error)[:200]}"
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error)[:300]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    return ""


def memory(world: World, case: ContextCase) -> dict[str, float]:
    """Peak bytes of a step beyond what it starts with and returns, in units of this rank's keys and values."""
    try:
        step = steps(world, case)
        kept = step()
    except anyattn.AnyattnError as error:
        return {"refused " + str(error)[:100]: 0.0}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    keys = kept[1].nbytes + kept[2].nbytes
    return {"peak over keys and values": round(peak / keys, 2), "MiB": round(peak / 2**20, 1)}


BATCHES = ((700, 0, 300, 513), (2048,), (64,) * 8, (1, 1999, 40), ())


def graphs(world: World, backend: str, comm: str) -> str:
    """Whether a captured step of a plan of fixed capacity answers for every batch put into it: "" if it does."""
    context = anyattn.ContextParallel(dist.group.WORLD, comm=comm)

    def packing(lengths: tuple[int, ...]) -> anyattn.Packing:
        return anyattn.Packing.from_lengths(lengths, max_sequences=8, max_rows=2048, max_seqlen=2048)

    def plan_of(lengths: tuple[int, ...]) -> anyattn.ContextPlan:
        return context.plan(packing(lengths))

    torch.manual_seed(0)
    whole = [torch.randn(2048, h, 64, device=world.device, dtype=torch.bfloat16) for h in (8, 4, 4, 8)]
    plan = plan_of(BATCHES[0])
    given = [plan.shard(x) for x in whole]

    def step(used: anyattn.ContextPlan, tensors: list[Tensor]) -> list[Tensor]:
        q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
        out = anyattn.attention(q, k, v, plan=used, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3])]

    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(plan, given)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            got = step(plan, given)
    except anyattn.AnyattnError as error:
        return f"refused: {str(error)[:200]}"
    for lengths in BATCHES[1:]:
        other = plan_of(lengths)
        plan.copy_(other)
        for mine, x in zip(given, whole, strict=True):
            mine.copy_(other.shard(x))
        graph.replay()
        wanted = step(plan_of(lengths), given)
        torch.cuda.synchronize()
        worst = max((a.float() - b.float()).abs().max().item() for a, b in zip(got, wanted, strict=True))
        if not worst <= 2**-6 * max(1.0, max(x.float().abs().max().item() for x in wanted)):
            return f"lengths {lengths}: off by {worst}"
    return ""


def on_cuda(world: World, backend: str) -> dict[str, Any]:
    """No waiting, and memory, per scheme."""
    found: dict[str, Any] = {}
    for comm in SCHEMES:
        plain = ContextCase(**scheme_on(comm, world.size), backend=backend, asks="grad", scores="sink", heads="8/4")
        small = for_gpu(plain)
        large = replace(plain, lengths=(8192 * world.size,), dims="128", dtype="bfloat16", scores="")
        found[comm] = {
            "waits": sorted(set(world.all(waits(world, small)))),
            "waits with a window": sorted(
                set(world.all(waits(world, replace(small, terms=oracle.Terms(causal=True, window=(100, 0))))))
            ),
            "memory": world.all(memory(world, large))[0],
        }
        if comm in ("all_gather", "a2a"):
            found[comm]["graphs"] = sorted(set(world.all(attempt_graphs(world, backend, comm))))
    return found


def attempt_graphs(world: World, backend: str, comm: str) -> str:
    """What ``graphs`` finds, or its failure."""
    try:
        return graphs(world, backend, comm)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"


# --- results -------------------------------------------------------------------------------------------------------


class Record:
    """Outcomes, on file after each case; rank 0 writes."""

    def __init__(self, path: Path, world: World, resume: bool) -> None:
        self.path, self.rank = path, world.rank
        self.data: dict[str, Any] = {"cases": {}, "cuda": {}, "about": {}}
        if resume and path.exists():
            self.data = json.loads(path.read_text())
        world.all(None)  # everyone has read it before anyone writes

    def begin(self, key: str) -> bool:
        """Whether the case is to be run. One that was begun and never ended took the process down."""
        known = self.data["cases"].get(key)
        if known is None:
            self.data["cases"][key] = ["running", ""]
            self._write()
            return True
        if known[0] == "running":
            self.data["cases"][key] = ["failed", "the process ended"]
        return False

    def end(self, key: str, outcome: tuple[str, str]) -> None:
        """Keep an outcome."""
        self.data["cases"][key] = list(outcome)
        self._write()

    def _write(self) -> None:
        if self.rank == 0:
            self.path.write_text(json.dumps(self.data | {"summary": self.summary()}, indent=1))

    def summary(self) -> dict[str, Any]:
        """{backend: {scheme: {passed, failed, refused}}}."""
        found: dict[str, Any] = {}
        for key, (what, why) in self.data["cases"].items():
            backend, comm, feature = key.split(" ", 2)
            cell = found.setdefault(backend, {}).setdefault(comm, {"passed": 0, "failed": [], "refused": {}})
            if what == "passed":
                cell["passed"] += 1
            elif what == "refused":
                cell["refused"][why] = cell["refused"].get(why, 0) + 1
            else:
                cell["failed"].append(f"{feature}: {why}")
        return found


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="auto", help="names with commas")
    parser.add_argument("--out", type=Path, default=Path("context_gpu.json"))
    parser.add_argument(
        "--only",
        default="",
        help="cases whose 'scheme feature' has this regular expression; 'cuda': what holds on CUDA alone",
    )
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no case after this")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    given = parser.parse_args()
    world = join(given.cpu)
    oracle.visible_pairs = fast_visible_pairs
    record = Record(given.out, world, given.resume)
    start, kind = time.monotonic(), world.device.type
    coarse = product_errors(kind)
    record.data["about"] = {"ranks": world.size, "torch": torch.__version__, "device": kind}
    if kind == "cuda":
        record.data["about"]["device"] = torch.cuda.get_device_name()
    record.data["about"]["backends"] = {n: str(b.version) for n, b in anyattn.backends().items()}
    for backend in given.backends.split(","):
        for comm, feature, case in table(backend, world.size, given.only):
            if max(world.all(time.monotonic() - start)) > given.seconds:
                break
            key = f"{backend} {comm} {feature}"
            if not record.begin(key):
                continue
            everyone = world.all(attempt(world, case))
            if world.rank == 0:
                outcome = verdict(case, everyone, kind, coarse.get(backend, {}).get(case.dtype, 0.0))
                record.end(key, outcome)
                if outcome[0] == "failed":
                    print(f"FAILED {key}: {outcome[1][:300]}", file=sys.stderr, flush=True)
        if kind == "cuda" and given.only in ("", "cuda"):
            record.data["cuda"][backend] = on_cuda(world, backend)
            record._write()
    world.all(None)
    if world.rank == 0:
        print(json.dumps({"summary": record.summary(), "cuda": record.data["cuda"]}, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
