"""The run: the same training three times, what it measures, and when it counts as right.

Three models start from the same weights and see the same documents in the same order:

- *packed*: all documents of a batch in one row with padding between them, through ``anyattn.attention``;
- *one at a time*: a document after the other, through transformers' eager attention, in the same precision;
- *exact*: as that, but in float64 throughout (float32 for a run in half precision) and through torch's own attention.

The first two must give the same losses but for rounding. How much rounding matters here, on these data and this model,
the third one tells: the distance of *one at a time* from *exact* is rounding and nothing else, anyattn has no part in
it, and it grows over the steps just as training makes it grow. The packed run is another way to round the same
computation, so it may be as far from *exact* again, and twice as far from *one at a time*:

    |packed - one at a time|  <=  2 * (largest |one at a time - exact| so far + spacing of float32 at the loss)

"So far" means the first five steps at least, so that one lucky step makes no bound out of nothing. The same holds for
the padded batches, which are looked at on a few steps with the packed model's weights, and for the packed way on two
ranks, which is a training of its own (:mod:`anyattn.demo.ranks`).
"""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import anyattn
from anyattn._errors import InvalidArgument
from anyattn._packing import Packing
from anyattn._select import Explanation
from anyattn.demo import data, model, ranks

_AT_LEAST = 5
_LOOKS = 3


@dataclass(frozen=True, slots=True)
class Settings:
    """What to run."""

    steps: int = 60
    rank_steps: int = 18
    """So many of them, at most, are trained on two ranks too; 0: none."""
    tokens: int = 3072
    """At least as many tokens per step."""
    shortest: int = 32
    longest: int = 2048
    multiple: int = 16
    """Each document's room is rounded up to it."""
    seed: int = 0
    learning_rate: float = 1e-3
    device: str = "cpu"
    dtype: str = "float32"
    sizes: model.Sizes = field(default_factory=model.Sizes)

    def check(self) -> None:
        """Raise InvalidArgument if a setting makes no sense here."""
        for name, least in (("steps", 1), ("tokens", 1), ("multiple", 1), ("rank_steps", 0)):
            if getattr(self, name) < least:
                raise InvalidArgument(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.dtype not in model.DTYPES:
            raise InvalidArgument(f"unknown dtype {self.dtype!r}; allowed: {', '.join(model.DTYPES)}")
        try:
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            first = (str(error).splitlines() or [""])[0]
            raise InvalidArgument(f"device {self.device!r} cannot be used here: {first}") from None


@dataclass(slots=True)
class Pace:
    """How fast one way ran."""

    tokens: int = 0
    rows: int = 0
    """Tokens and padding."""
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Real tokens, forward and backward."""
        return self.tokens / self.seconds if self.seconds else math.nan


@dataclass(slots=True)
class Report:
    """What a run found."""

    settings: Settings
    kernel: Explanation
    """Of the packed attention."""
    documents: int
    packed: list[float] = field(default_factory=list)
    one_at_a_time: list[float] = field(default_factory=list)
    exact: list[float] = field(default_factory=list)
    padded: dict[int, float] = field(default_factory=dict)
    """By step."""
    ranks: list[ranks.Step] = field(default_factory=list)
    """Of the first steps."""
    ranks_left_out: str | None = None
    """Why there are none."""
    ranks_failed: str | None = None
    """The error that ended them."""
    pace: dict[str, Pace] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def differences(self) -> list[float]:
        """Of packed and one at a time, per step."""
        return [abs(a - b) for a, b in zip(self.packed, self.one_at_a_time, strict=True)]

    @property
    def rank_differences(self) -> list[float]:
        """Of two ranks and one at a time, per step of the ranks."""
        return [abs(step.loss - alone) for step, alone in zip(self.ranks, self.one_at_a_time, strict=False)]

    @property
    def rounding(self) -> list[float]:
        """Of one at a time and exact, per step."""
        return [abs(a - b) for a, b in zip(self.one_at_a_time, self.exact, strict=True)]

    @property
    def bounds(self) -> list[float]:
        """What rounding explains, per step."""
        eps = torch.finfo(torch.float32).eps
        largest = [max(self.rounding[: max(step + 1, _AT_LEAST)]) for step in range(len(self.exact))]
        return [2 * (far + eps * abs(loss)) for far, loss in zip(largest, self.exact, strict=True)]

    @property
    def failures(self) -> list[str]:
        """What went wrong, in words; empty if all is right."""
        failed = [] if self.ranks_failed is None else [f"two ranks: {self.ranks_failed}"]
        return self.disagreements + failed

    @property
    def disagreements(self) -> list[str]:
        """Where losses differ by more than rounding explains, in words."""
        pairs = [(step, "packed, one at a time", difference) for step, difference in enumerate(self.differences)]
        pairs += [(step, "padded, packed", abs(loss - self.packed[step])) for step, loss in self.padded.items()]
        pairs += [(step, "two ranks, one at a time", far) for step, far in enumerate(self.rank_differences)]
        return [
            f"step {step}: {what}: {difference:.2g} apart, by rounding {bound:.2g}"
            for step, what, difference in pairs
            if not difference <= (bound := self.bounds[step])  # NaN too
        ]


# --- running ---


def run(settings: Settings, on_step: Callable[[Report], None] | None = None) -> Report:
    """Train, measure and compare.

    Args:
        settings: what to run.
        on_step: called after every step, then after every step on two ranks, with what is known so far.

    Raises:
        InvalidArgument: settings that make no sense here.
        MissingExtra: transformers is not installed.
    """
    settings.check()
    start = time.perf_counter()
    batches = data.batches(settings.steps, settings.tokens, settings.shortest, settings.longest, settings.seed)
    trainers = _trainers(settings)
    weights = {name: x.detach().cpu().clone() for name, x in trainers["packed"].model.state_dict().items()}
    paces = {name: Pace() for name in ("packed", "two ranks", "padded", "one at a time")}
    report = Report(settings, explain(settings, batches[0]), sum(map(len, batches)), pace=paces)
    looks = {round((i + 1) * settings.steps / (_LOOKS + 1)) for i in range(_LOOKS)}
    _warm_up(trainers, batches[0])
    for step, documents in enumerate(batches):
        if step in looks:
            trainer = trainers["packed"]
            with _timed(settings, paces["padded"], documents, len(documents) * max(map(len, documents))):
                report.padded[step] = trainer.look(documents, model.padded)
        rows = Packing.from_lengths([len(d) for d in documents], settings.multiple).rows
        with _timed(settings, paces["packed"], documents, rows):
            report.packed.append(trainers["packed"].step(documents))
        with _timed(settings, paces["one at a time"], documents, sum(map(len, documents))):
            report.one_at_a_time.append(trainers["one at a time"].step(documents))
        report.exact.append(trainers["exact"].step(documents))
        report.seconds = time.perf_counter() - start
        if on_step is not None:
            on_step(report)
    _on_two_ranks(report, batches[: settings.rank_steps], weights, on_step)
    report.seconds = time.perf_counter() - start
    return report


def _on_two_ranks(
    report: Report,
    batches: Sequence[Sequence[Tensor]],
    weights: dict[str, Tensor],
    on_step: Callable[[Report], None] | None,
) -> None:
    """The same steps from the same weights, each batch divided between two ranks; or why not."""
    settings = report.settings
    kind = torch.device(settings.device).type
    report.ranks_left_out = ranks.why_not(kind) if batches else "no steps were asked of them"
    if report.ranks_left_out is not None:
        return
    pace = report.pace["two ranks"]

    def heard(step: ranks.Step) -> None:
        documents = batches[len(report.ranks)]
        report.ranks.append(step)
        pace.seconds += step.seconds
        pace.tokens += sum(map(len, documents))
        pace.rows += ranks.COUNT * step.rows
        if on_step is not None:
            on_step(report)

    threads = max(1, torch.get_num_threads() // ranks.COUNT)
    task = ranks.Task(
        settings.sizes, settings.longest, settings.multiple, settings.seed, settings.learning_rate, settings.dtype,
        kind, threads,
    )  # fmt: skip
    try:
        ranks.train(task, batches, weights, heard)
    except ranks.RankFailed as error:
        report.ranks_failed = str(error)


def _trainers(settings: Settings) -> dict[str, model.Trainer]:
    """The three models, from the same weights."""
    eager = model.build(settings.sizes, settings.longest, "eager", settings.seed).to(settings.device)
    through_anyattn = copy.deepcopy(eager)
    through_anyattn.set_attn_implementation("anyattn")
    low = model.DTYPES[settings.dtype]
    exact = model.exact_twin(eager, torch.float64 if low == torch.float32 else torch.float32)
    precision = partial(model.computing_in, low, torch.device(settings.device).type)
    packed = partial(model.packed, multiple=settings.multiple)
    rate = settings.learning_rate
    return {
        "packed": model.Trainer.of(through_anyattn, packed, rate, precision),
        "one at a time": model.Trainer.of(eager, model.one_at_a_time, rate, precision),
        "exact": model.Trainer.of(exact, model.one_at_a_time, rate),
    }


def _warm_up(trainers: dict[str, model.Trainer], documents: Sequence[Tensor]) -> None:
    """Run every way once, unmeasured: kernels are found, compiled and loaded at their first call."""
    for trainer in trainers.values():
        trainer.look(documents)
    trainers["packed"].look(documents, model.padded)


class _timed:
    """Add to a pace what runs inside."""

    def __init__(self, settings: Settings, pace: Pace, documents: Sequence[Tensor], rows: int) -> None:
        self.cuda = torch.device(settings.device).type == "cuda"
        self.pace, self.tokens, self.rows = pace, sum(map(len, documents)), rows

    def __enter__(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.pace.seconds += time.perf_counter() - self.start
        self.pace.tokens += self.tokens
        self.pace.rows += self.rows


def explain(settings: Settings, documents: Sequence[Tensor]) -> Explanation:
    """Which kernel the packed attention of such a batch runs on, and why no other."""
    sizes = settings.sizes
    device, dtype = torch.device(settings.device), model.DTYPES[settings.dtype]
    packing = Packing.from_lengths([len(d) for d in documents], settings.multiple, device=device)

    def rows(heads: int) -> Tensor:
        return torch.empty(packing.rows, heads, sizes.head_dim, dtype=dtype, device=device, requires_grad=True)

    q, k, v = rows(sizes.heads), rows(sizes.kv_heads), rows(sizes.kv_heads)
    return anyattn.explain(q, k, v, causal=True, packing=packing)


# --- writing ---


def as_data(report: Report) -> dict[str, Any]:
    """A report for machines."""
    import transformers

    settings = report.settings
    device = torch.device(settings.device)
    return {
        "versions": {
            "anyattn": anyattn.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu_count": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        },
        "settings": asdict(settings),
        "kernel": str(report.kernel.forward),
        "explain": str(report.kernel),
        "documents": report.documents,
        "two ranks": {
            "steps": [step._asdict() for step in report.ranks],
            "left out": report.ranks_left_out,
            "failed": report.ranks_failed,
        },
        "losses": {
            "packed": report.packed,
            "two ranks": [step.loss for step in report.ranks],
            "one at a time": report.one_at_a_time,
            "exact": report.exact,
            "padded, by step": report.padded,
        },
        "differences": report.differences,
        "differences of two ranks": report.rank_differences,
        "rounding": report.rounding,
        "bounds": report.bounds,
        "largest_difference": max(report.differences),
        "pace": {
            name: asdict(pace) | {"tokens_per_second": pace.tokens_per_second} for name, pace in report.pace.items()
        },
        "seconds": report.seconds,
        "failures": report.failures,
        "agrees": not report.failures,
    }


def write(report: Report, folder: Path) -> list[Path]:
    """Write ``demo.json`` and ``losses.png``; return where.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    from anyattn.demo import plot

    folder.mkdir(parents=True, exist_ok=True)
    table, picture = folder / "demo.json", folder / "losses.png"
    table.write_text(json.dumps(as_data(report), indent=2) + "\n")
    plot.losses(report, picture)
    return [table, picture]
