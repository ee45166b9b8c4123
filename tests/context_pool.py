"""Ranks that stay: gloo processes which run one job after another, for all tests of a process.

A job is a function that pickles and its arguments. The first n workers run it, each with its :class:`Seat`; what comes
back is an :class:`Outcome` per rank. Nothing that depends on the rank may be asserted inside of a job: a rank that
raises alone leaves the others waiting. That ends before long all the same: the pool is thrown away, and the
next job gets a new one.

Workers are forked from a server that has imported once what they need, so a pool costs a second.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any, NamedTuple

# All of these bound what goes wrong, and none is a measure of speed: a busy machine must not fail a test.
#: Seconds that a collective waits, in groups; those of meshes wait for as long as torch has them wait.
TIMEOUT = 60.0
#: Seconds that a job has.
LIMIT = 120.0
#: Seconds that the others have after one rank has failed.
GRACE = 20.0
WORKERS = 8

#: What the server imports. A custom op's first call takes torch._dynamo, which is a second and a half per worker.
_PRELOADED = (
    "torch", "torch._dynamo", "torch.distributed.device_mesh", "torch.utils.checkpoint", "numpy", "pytest",
    "hypothesis", "anyattn",
)  # fmt: skip
#: The same for packages that this process has imported already.
_PRELOADED_IF_THERE = {
    "transformers": ("transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"),
    "diffusers": ("diffusers.models.modeling_utils",),
}


class Mesh(NamedTuple):
    """A DeviceMesh over the first ranks."""

    shape: tuple[int, ...]
    names: tuple[str, ...] | None = None
    order: tuple[int, ...] | None = None
    """The ranks as they stand in it; None: ascending."""

    @property
    def size(self) -> int:
        """How many ranks."""
        total = 1
        for n in self.shape:
            total *= n
        return total


Ranks = int | Mesh
"""The first n ranks as a ProcessGroup, or as a mesh."""


class Seat(NamedTuple):
    """Where a job runs."""

    rank: int
    size: int
    group: Any
    """A ProcessGroup, or a DeviceMesh."""


@dataclass(frozen=True)
class Failure:
    """An exception, as text: not all of them pickle."""

    kinds: tuple[str, ...]
    """Names of its class and of all bases."""
    message: str
    text: str
    """The traceback."""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Describe an exception."""
        kinds = tuple(f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__)
        return cls(kinds, str(error), "".join(traceback.format_exception(error)))

    def is_a(self, kind: type[BaseException]) -> bool:
        """As isinstance."""
        return f"{kind.__module__}.{kind.__qualname__}" in self.kinds

    def __str__(self) -> str:
        return f"{self.kinds[0]}: {self.message}"


@dataclass(frozen=True)
class Outcome:
    """What a rank returned or raised."""

    value: Any = None
    failure: Failure | None = None


class Stuck(Exception):
    """A rank that did not come back."""


class Died(Exception):
    """A rank whose process ended."""


def values(outcomes: Sequence[Outcome]) -> list[Any]:
    """What the ranks returned.

    Raises:
        AssertionError: some rank failed; with all tracebacks.
    """
    failed = [f"rank {i}: {o.failure.text}" for i, o in enumerate(outcomes) if o.failure is not None]
    assert not failed, "\n".join(failed)
    return [o.value for o in outcomes]


def failures(outcomes: Sequence[Outcome], kind: type[BaseException]) -> list[str]:
    """The messages with which all ranks failed alike.

    Raises:
        AssertionError: a rank returned, or raised something else.
    """
    for rank, outcome in enumerate(outcomes):
        assert outcome.failure is not None, f"rank {rank} returned {outcome.value!r}, others: {outcomes}"
        assert outcome.failure.is_a(kind), f"rank {rank}: {outcome.failure.text}"
    return [o.failure.message for o in outcomes if o.failure is not None]


@dataclass
class Pool:
    """Worker processes, started when the first job comes.

    Args:
        size: how many.
        timeout: seconds that their collectives wait.
    """

    size: int = WORKERS
    timeout: float = TIMEOUT
    started: int = 0
    """How often it was built."""
    _pipes: list[Connection] = field(default_factory=list, repr=False)
    _processes: list[Any] = field(default_factory=list, repr=False)
    _made: set[Ranks] = field(default_factory=set, repr=False)
    _folder: Any = field(default=None, repr=False)

    def run(
        self, ranks: Ranks, job: Callable[..., Any], *arguments: Any, grace: float = GRACE, lost: Collection[int] = ()
    ) -> list[Outcome]:
        """Run ``job(seat, *arguments)`` on the first ranks.

        Args:
            ranks: how many, or which mesh.
            job: a function of a module.
            arguments: they pickle.
            grace: seconds that the others have after one rank has failed, before they count as stuck.
            lost: ranks that are not expected back, and not waited for once all others are.
        """
        if not self._processes:
            self._start()
        if ranks not in self._made:
            values(self._ask(range(self.size), ("make", ranks), grace, ()))
            self._made.add(ranks)
        count = ranks if isinstance(ranks, int) else ranks.size
        return self._ask(range(count), ("run", ranks, job, arguments), grace, lost)

    def kill(self, rank: int) -> None:
        """End a worker's process at once."""
        self._processes[rank].kill()

    @property
    def pids(self) -> list[int]:
        """The workers' process ids."""
        return [p.pid for p in self._processes]

    def close(self) -> None:
        """End all workers."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._pipes, self._processes, self._made, self._folder = [], [], set(), None

    def _start(self) -> None:
        context = server()
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        for rank in range(self.size):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(rank, self.size, store, self.timeout, theirs, sys.path), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)
        self.started += 1

    def _ask(self, ranks: range, message: tuple[Any, ...], grace: float, lost: Collection[int]) -> list[Outcome]:
        data = pickle.dumps(message)
        for rank in ranks:
            with contextlib.suppress(OSError):  # it is dead: that shows below
                self._pipes[rank].send_bytes(data)
        found = self._collect(ranks, grace, lost)
        kinds = {None if o.failure is None else o.failure.kinds for o in found}
        if len(kinds) > 1 or any(o.failure and (o.failure.is_a(Stuck) or o.failure.is_a(Died)) for o in found):
            self.close()  # who knows what the ranks are waiting for
        return found

    def _collect(self, ranks: range, grace: float, lost: Collection[int]) -> list[Outcome]:
        found: dict[int, Outcome] = {}
        rank_of = {self._pipes[rank]: rank for rank in ranks}
        deadline = time.monotonic() + LIMIT
        while not set(ranks) <= {*found, *lost}:
            waiting = [pipe for pipe, rank in rank_of.items() if rank not in found]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                outcome = _received(pipe)  # type: ignore[arg-type]
                found[rank_of[pipe]] = outcome  # type: ignore[index]
                if outcome.failure is not None:
                    deadline = min(deadline, time.monotonic() + grace)
        return [found[rank] if rank in found else self._stuck(rank) for rank in ranks]

    def _stuck(self, rank: int) -> Outcome:
        """Ask a rank where it is."""
        os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.2)
        where = Path(self._folder.name, f"stack{rank}").read_text()
        failure = Failure.of(Stuck("it did not come back"))
        return Outcome(failure=replace(failure, text=f"it did not come back:\n{where}"))


def _received(pipe: Connection) -> Outcome:
    try:
        outcome = pickle.loads(pipe.recv_bytes())
    except (EOFError, OSError):
        return Outcome(failure=Failure.of(Died("its process ended")))
    assert isinstance(outcome, Outcome)
    return outcome


def server() -> ForkServerContext:
    """Processes of this context are forked from the server, which starts here if none has."""
    os.environ["OMP_NUM_THREADS"] = "1"  # also in the server, and in what it forks
    context = multiprocessing.get_context("forkserver")
    more = [names for package, names in _PRELOADED_IF_THERE.items() if package in sys.modules]
    context.set_forkserver_preload(list(itertools.chain(_PRELOADED, *more)))
    ensure_running()
    return context


_shared: list[Pool] = []


def shared() -> Pool:
    """The pool of this process; its workers end with it."""
    if not _shared:
        _shared.append(Pool())
    return _shared[0]


# --- in the workers ------------------------------------------------------------------------------------------------


def _work(rank: int, size: int, store: str, timeout: float, pipe: Connection, path: list[str]) -> None:
    """Serve until the pipe closes."""
    sys.path[:] = path
    stack = Path(store).with_name(f"stack{rank}").open("w")
    faulthandler.register(signal.SIGUSR1, file=stack)
    import torch
    import torch.distributed as dist

    warnings.simplefilter("ignore")  # pytest's own filter judges tests, not workers
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    groups: dict[Ranks, Any] = {}
    for message in _messages(pipe):
        try:
            torch.manual_seed(0)
            if message[0] == "make":
                groups[message[1]] = _make(message[1], size, timeout)
                outcome = Outcome()
            else:
                _, ranks, job, arguments = message
                count = ranks if isinstance(ranks, int) else ranks.size
                outcome = Outcome(job(Seat(rank, count, groups[ranks]), *arguments))
            data = pickle.dumps(outcome)
        except Exception as error:
            data = pickle.dumps(Outcome(failure=Failure.of(error)))
        pipe.send_bytes(data)


def _messages(pipe: Connection) -> Iterator[tuple[Any, ...]]:
    while True:
        try:
            data = pipe.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)  # the tests are over; nobody else is waited for
        try:
            message: tuple[Any, ...] = pickle.loads(data)
        except Exception as error:
            pipe.send_bytes(pickle.dumps(Outcome(failure=Failure.of(error))))
        else:
            yield message


def _make(ranks: Ranks, size: int, timeout: float) -> Any:
    """A group or mesh of the first ranks; all workers take part."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(ranks, int):
        return dist.new_group(list(range(ranks)), timeout=timedelta(seconds=timeout))
    numbers = torch.tensor(ranks.order or range(ranks.size)).view(ranks.shape)
    return DeviceMesh("cpu", numbers, mesh_dim_names=ranks.names)
