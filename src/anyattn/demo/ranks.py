"""The packed way on two ranks: every batch is divided between two processes, by context parallelism.

Both ranks hold the whole model. Each takes its rows of the packed batch by a plan, and attends through
``anyattn.attention(..., plan=plan)``; losses and gradients are summed over the ranks, so both take the step that one
process would take. The three schemes that two ranks can use serve in turn, a step each.

The ranks are processes of their own: over gloo on the CPU, over NCCL on two GPUs. What they find comes back step by
step. A rank that fails ends the run with its error; one that falls silent, too.
"""

from __future__ import annotations

import multiprocessing
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from anyattn._api import attention
from anyattn._context._parallel import ContextParallel
from anyattn._context._plan import ContextPlan
from anyattn.demo import model

COUNT = 2
SCHEMES = ("p2p", "all_gather", "a2a")
_IMPLEMENTATION = "anyattn_context_parallel"
#: Modules that take long to import, among them one that optimizers need at their first step.
_PRELOADED = ["anyattn.demo.ranks", "torch._dynamo", "transformers.models.llama.modeling_llama"]
#: Tokens of the documents that ranks warm up with.
_WARM = (64, 48)
#: Seconds in which the other rank's error follows the first.
_GRACE = 5.0


@dataclass(frozen=True, slots=True)
class Task:
    """What the ranks train: the same model as the packed way."""

    sizes: model.Sizes
    longest: int
    multiple: int
    """Each document's room, and each rank's rows, are rounded up to it."""
    seed: int
    learning_rate: float
    dtype: str
    """One of model.DTYPES."""
    device: str
    """Type of the device: cpu or cuda."""
    threads: int
    """Of each rank."""
    patience: float = 120.0
    """Seconds that a rank waits for the other; twice as many without a word from any of them end the run."""

    @property
    def backend(self) -> str:
        """What connects the ranks."""
        return "nccl" if self.device == "cuda" else "gloo"


class Step(NamedTuple):
    """One step of both ranks."""

    loss: float
    comm: str
    rows: int
    """Of each rank."""
    imbalance: float
    """Attention work of the busier rank over the mean."""
    bytes_moved: int
    """That the rank that receives most receives in one layer's forward."""
    seconds: float


class _Failure(NamedTuple):
    """What a rank says before it ends in an error."""

    when: float
    words: str
    trace: str


class RankFailed(RuntimeError):
    """A rank ended in an error, or fell silent; the text says what every rank did."""


def why_not(device: str) -> str | None:
    """Why ranks cannot run with this type of device here; None if they can."""
    if not dist.is_available():
        return "this torch has no torch.distributed"
    if device == "cpu":
        return None if dist.is_gloo_available() else "this torch has no gloo, which connects processes on the CPU"
    if device != "cuda":
        return f"ranks are connected by gloo on the CPU or NCCL on GPUs, and this run is on {device}"
    if torch.cuda.device_count() < COUNT:
        return f"a rank needs a GPU of its own, and {torch.cuda.device_count()} is here; --device cpu needs none"
    return None if dist.is_nccl_available() else "this torch has no NCCL, which connects GPUs"


# --- here ---

Main = Callable[[int, Task, Path, Connection], None]


def train(
    task: Task,
    batches: Sequence[Sequence[Tensor]],
    weights: dict[str, Tensor],
    on_step: Callable[[Step], None],
    main: Main | None = None,
) -> None:
    """Train on two ranks.

    Args:
        task: what to train.
        batches: one per step; int64 documents, on the CPU.
        weights: what the model starts from.
        on_step: called with each step as it comes.
        main: what a rank runs; default: :func:`rank_main`.

    Raises:
        RankFailed: a rank ended in an error, was killed, or nothing was heard for too long.
    """
    start = _starting()
    with tempfile.TemporaryDirectory(prefix="anyattn-demo-") as name:
        folder = Path(name)
        torch.save({"batches": [list(batch) for batch in batches], "weights": weights}, folder / "start.pt")
        processes, pipes = [], []
        try:
            for rank in range(COUNT):
                here, there = start.Pipe(duplex=False)
                process = start.Process(target=main or rank_main, args=(rank, task, folder, there), daemon=True)
                process.start()
                there.close()  # so that the end of the process is the end of the pipe
                processes.append(process)
                pipes.append(here)
            _follow(processes, pipes, on_step, 2 * task.patience)
        finally:
            for process in processes:
                process.kill()
                process.join()
            for pipe in pipes:
                pipe.close()


def _starting() -> Any:
    """How ranks are started: forked from a clean process that has imported what they need once, where there is such."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    start = multiprocessing.get_context("forkserver")
    start.set_forkserver_preload(_PRELOADED)
    return start


def _follow(processes: Sequence[Any], pipes: Sequence[Any], on_step: Callable[[Step], None], silence: float) -> None:
    """Pass on steps until all ranks have ended."""
    running: dict[Any, Any] = dict(zip(pipes, processes, strict=True))
    failures: dict[int, _Failure] = {}
    while running:
        ready: list[Any] = wait(list(running), silence if not failures else _GRACE)
        if not ready:
            break
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                message = pipe.recv()
            except EOFError:
                process = running.pop(pipe)
                process.join(silence)
                if process.exitcode != 0 and rank not in failures:
                    failures[rank] = _Failure(0.0, _ending(process.exitcode), "")
                continue
            if isinstance(message, _Failure):
                failures[rank] = message
            elif not failures:
                on_step(message)
    if failures or running:
        raise RankFailed(_told(failures, [pipes.index(pipe) for pipe in running], silence))


def _ending(status: int | None) -> str:
    if status is None:
        return "did not end"
    if status >= 0:
        return f"ended with exit status {status}"
    return f"was ended by {signal.Signals(-status).name}"


def _told(failures: dict[int, _Failure], waiting: Sequence[int], silence: float) -> str:
    """What every rank did, and the whole error of the first."""
    in_order = sorted(failures, key=lambda rank: failures[rank].when)
    lines = [f"rank {rank} {failures[rank].words}" for rank in in_order]
    if waiting:
        names = " and ".join(map(str, waiting))
        lines.append(f"rank {names} did not end" if failures else f"rank {names} said nothing for {silence:.0f} s")
    trace = failures[in_order[0]].trace if in_order else ""
    return "; ".join(lines) + (f"\n{trace}" if trace else "")


# --- in the ranks ---


def rank_main(rank: int, task: Task, folder: Path, pipe: Connection) -> None:
    """What a rank's process runs: train, and say what came of each step (rank 0) or what went wrong (both)."""
    try:
        _train_rank(rank, task, folder, pipe)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        pipe.send(_Failure(time.time(), f"failed: {type(error).__name__}: {first}", traceback.format_exc()))
        raise SystemExit(1) from None


def _train_rank(rank: int, task: Task, folder: Path, pipe: Connection) -> None:
    torch.set_num_threads(task.threads)
    device = torch.device(f"cuda:{rank}" if task.device == "cuda" else task.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    start = torch.load(folder / "start.pt", weights_only=True)
    store = dist.FileStore(  # type: ignore[attr-defined]
        str(folder / "store"), COUNT
    )
    patience = timedelta(seconds=task.patience)
    dist.init_process_group(task.backend, store=store, rank=rank, world_size=COUNT, timeout=patience)
    way = _Divided(task, {comm: ContextParallel(dist.group.WORLD, comm=comm) for comm in SCHEMES})
    trainer = _trainer(task, start["weights"], way, device)
    short = [torch.zeros(count, dtype=torch.int64) for count in _WARM]
    for way.comm in SCHEMES:  # kernels are loaded, and connections made, at their first call
        trainer.look(short)
    for number, documents in enumerate(start["batches"]):
        way.comm = SCHEMES[number % len(SCHEMES)]
        begin = time.perf_counter()
        loss = trainer.step(documents)
        seconds = time.perf_counter() - begin
        if rank == 0:
            pipe.send(way.step(loss, seconds))
    dist.destroy_process_group()


def _trainer(task: Task, weights: dict[str, Tensor], way: _Divided, device: torch.device) -> model.Trainer:
    import transformers

    transformers.AttentionInterface.register(_IMPLEMENTATION, _attention_forward)
    whole = model.build(task.sizes, task.longest, _IMPLEMENTATION, task.seed)
    whole.load_state_dict(weights)
    precision = partial(model.computing_in, model.DTYPES[task.dtype], device.type)
    return model.Trainer.of(whole.to(device), way, task.learning_rate, precision)


def _attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: ContextPlan,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as a transformers model calls it, of one row that is this rank's shard; the plan says the mask."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return attention(q, k, v, scale=scaling, plan=plan)[None], None


def _sum(gradients: Sequence[Tensor]) -> None:
    """Add up the ranks' gradients, in place, in one exchange."""
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


class _Divided:
    """The way of a rank: forward and backward of its rows; loss and gradients are those of the whole batch."""

    def __init__(self, task: Task, parts: dict[str, ContextParallel]) -> None:
        self.task, self.parts = task, parts
        self.comm = SCHEMES[0]
        """The scheme of the next call."""
        self.plan: ContextPlan | None = None
        """Of the last call."""

    def __call__(self, whole: Any, documents: Sequence[Tensor]) -> float:
        multiple, sizes = self.task.multiple, self.task.sizes
        row = model.in_one_row(documents, multiple, whole.device)
        self.plan = plan = self.parts[self.comm].plan(
            row.packing, num_heads=sizes.heads, num_kv_heads=sizes.kv_heads, head_dim=sizes.head_dim,
            pad_to_multiple_of=multiple,
        )  # fmt: skip
        inputs, targets = plan.shard(row.inputs), plan.shard(row.targets, fill=model.IGNORED)
        positions = plan.position_ids
        logits = whole(input_ids=inputs[None], position_ids=positions[None], plan=plan, use_cache=False).logits
        mine = model.backward(logits[0], targets, model.count(documents))
        _sum([parameter.grad for parameter in whole.parameters()])
        total = torch.tensor(mine, dtype=torch.float64, device=whole.device)
        dist.all_reduce(total)
        return float(total)

    def step(self, loss: float, seconds: float) -> Step:
        """What to say of the last call."""
        plan = self.plan
        assert plan is not None
        received = plan.bytes_moved * model.DTYPES[self.task.dtype].itemsize // 2  # plans count two bytes a number
        return Step(loss, plan.comm, plan.rows, plan.imbalance, received, seconds)
