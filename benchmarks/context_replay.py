"""What each rank of a larger group takes, measured on two GPUs: they play its ranks, two at a time.

    torchrun --nproc-per-node 2 benchmarks/context_replay.py --ranks 4 --out FOLDER [--cases packed:all_gather,...]
    torchrun --nproc-per-node 2 benchmarks/context_replay.py --device cpu --tiny --backends reference

A GPU that plays a rank makes all of that rank's kernel calls, and in every exchange receives as many rows as that rank
does, all of them from the other GPU; what they hold means nothing. The slowest rank's time stands for the group's.
Two things are not in it: a rank that waits for one that is not played beside it, and several peers that share a link.
So a replay is no measurement of the larger group; cases that were measured there tell how close it comes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

import anyattn
import context_problems as problems
from anyattn._context import _backward, _heads, _schedule
from anyattn._context._exchange import Arrival, exchange
from anyattn._context._topology import Members
from context import add_options, batches, finish, more_of_the_machine, seated
from context_bench import FACTOR, Bench, RankReport, RankRow, one_gpu
from context_problems import Problem
from context_timing import Seat, Times, extra_mib, milliseconds

T = TypeVar("T")
CASES = (
    "packed:all_gather,packed:p2p,32k:a2a,32k:all_gather,32k:p2p,128k:a2a,128k:all_gather,memory:p2p,memory:all_gather"
)


@dataclass
class Replay:
    """Exchanges of a larger group, played by this rank and one other."""

    seat: Seat
    rank: int
    """That is played here."""
    _wanted: list[int] = field(default_factory=list)
    """Rows that the other GPU receives in each exchange of a call, in order."""
    _at: int = 0
    _stock: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)

    def of(self, thunk: Callable[[], T]) -> Callable[[], T]:
        """A call whose exchanges are the same each time, and are learned at its first."""

        def replayed() -> T:
            self._at = 0
            self._put(self)
            try:
                return thunk()
            finally:  # a module that held this would keep its group beyond the end of the job
                self._put(exchange)

        self._wanted.clear()
        return replayed

    @staticmethod
    def _put(instead: Callable[..., Arrival]) -> None:
        """Let the schedules exchange by this."""
        for module in (_schedule, _backward, _heads):
            module.exchange = instead  # type: ignore[attr-defined]

    def __call__(
        self, group: Any, send: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], *, room: int = 0,
        head_start: int = 0,
    ) -> Arrival:  # fmt: skip
        """As ``anyattn``'s own exchange, with rows of no meaning."""
        width, own = send.shape[1], receive_counts[self.rank]
        arriving = sum(receive_counts)
        theirs = self._theirs(arriving - own)
        received = send.new_empty(arriving + room, width)
        given = self._rows(send, theirs + own)
        comes, goes = ([own, other] if self.seat.rank == 0 else [other, own] for other in (arriving - own, theirs))
        work = dist.all_to_all_single(received[:arriving], given, comes, goes, group=group, async_op=True)
        if head_start and send.is_cuda:
            torch.cuda._sleep(head_start)
        return Arrival(received, work, send)

    def _theirs(self, mine: int) -> int:
        if self._at == len(self._wanted):
            self._wanted.append(self.seat.exchange(mine)[1 - self.seat.rank])
        self._at += 1
        return self._wanted[self._at - 1]

    def _rows(self, like: Tensor, count: int) -> Tensor:
        kind = like.shape[1], like.dtype
        if kind not in self._stock or self._stock[kind].shape[0] < count:
            self._stock[kind] = torch.randn(count, like.shape[1], dtype=like.dtype, device=like.device)
        return self._stock[kind][:count]


class _Agreed(set[Any]):
    """Nobody is there to compare plans with."""

    def __contains__(self, kind: object) -> bool:
        return True


@dataclass
class Player:
    """Two GPUs that play a larger group."""

    bench: Bench
    ranks: int
    backend: str

    def call(self, problem: Problem, comm: str, rank: int) -> tuple[problems.Call, Replay]:
        """A rank's call, and what its exchanges are replaced with."""
        seat = self.bench.seat
        plan = self.bench.plan(problem, comm, anyattn.ContextParallel((self.ranks, rank), comm=comm))
        group = dist.group.WORLD
        members = Members((self.ranks,), rank, (group,), seat.device, tuple(range(self.ranks)))
        plan = plan._bound(members)
        plan._agreed = _Agreed()
        return problems.sharded(problem, self.backend, plan, seat.device), Replay(seat, rank)

    def pairs(self) -> list[int]:
        """The ranks that this GPU plays, one after the other."""
        return list(range(self.bench.seat.rank, self.ranks, 2))

    def throughput(self, problem: Problem, comm: str) -> list[RankRow]:
        """Speed of the slowest rank against one GPU's; all ranks are played."""
        seat = self.bench.seat
        alone = self.bench.reference(problem, self.backend, self.ranks)
        taken: dict[str, list[float]] = {way: [] for way in FACTOR}
        for rank in self.pairs():
            call, replay = self.call(problem, comm, rank)
            for way, thunk in zip(FACTOR, (call.infer, call.both), strict=True):
                taken[way] += milliseconds(seat, replay.of(thunk)).by_rank
        rows = []
        for way, ms in taken.items():
            times = Times(max(ms), statistics.median(ms), ms)
            speed = self.bench.speed(problem, times, way, ranks=self.ranks)
            what = f"{way}, {problem.name}, {comm}, {self.ranks} ranks replayed, {self.backend}"
            rows.append(RankRow(what, speed, alone[way], "TFLOP/s", one_gpu(problem), detail={"ms_by_rank": ms}))
        return rows

    def memory(self, problem: Problem, comm: str) -> list[RankRow]:
        """Peak of forward and backward beyond inputs, outputs and gradients, of the rank with most."""
        seat, found, rows = self.bench.seat, [], 0
        for rank in self.pairs():
            call, replay = self.call(problem, comm, rank)
            rows = call.q.shape[-3]
            found.append(extra_mib(seat, replay.of(call.both)))
        only = replace(problem, lengths=(rows,))
        alone = extra_mib(seat, problems.alone(only, self.backend, seat.device).both)
        what = f"extra memory, {problem.name}, {comm}, {self.ranks} ranks replayed, {self.backend}"
        return [RankRow(what, max(found), alone, "MiB", "the kernel alone, as many rows")]


def main() -> None:
    """Replay, print, and write one dated file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="of the group that is played: an even number")
    add_options(parser, 200.0)
    parser.add_argument("--backends", default="fa3", help="default: fa3")
    parser.add_argument("--cases", default=CASES, help="CASE:SCHEME, ...; the case memory is of 128k")
    options = parser.parse_args()
    seat = seated(options)
    if seat.size != 2 or options.ranks % 2:
        parser.error(f"two GPUs play an even number of ranks; got {seat.size} GPUs and {options.ranks} ranks")
    report = RankReport("context-replay", options.out, ranks=seat.size)
    report.machine |= more_of_the_machine(seat) | {"replayed": options.ranks}
    bench, known = Bench(seat, report, options.seconds), batches(options.tiny)
    for backend in options.backends.split(","):
        player = Player(bench, options.ranks, backend)
        for case in options.cases.split(","):
            name, comm = case.split(":")
            problem = known["128k" if name == "memory" else name]
            measure = player.memory if name == "memory" else player.throughput
            bench.attempt(f"{case}, {backend}", partial(measure, problem, comm))
    finish(bench)
    seat.exchange()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
