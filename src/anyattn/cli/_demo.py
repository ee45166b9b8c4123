"""``anyattn demo``: train on packed documents and on one at a time, and see that nothing but speed differs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from anyattn._environment import module_exists
from anyattn._errors import MissingExtra
from anyattn.cli import _explain, _render


def demo(
    output: Annotated[Path, typer.Option(help="Folder for losses.png and demo.json.")] = Path("demo-output"),
    steps: Annotated[int, typer.Option(metavar="N", help="Training steps.")] = 60,
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens per step, at least.")] = 3072,
    seed: Annotated[int, typer.Option(metavar="N", help="Chooses weights and documents.")] = 0,
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(metavar="NAME", help="float32, or bfloat16 by autocast.")] = "float32",
) -> int:
    """Train a small Llama on packed documents through anyattn, beside one document at a time through eager attention.

    Documents are docstrings and sources of Python's standard library, with padding between them where they are packed.

    Exit status: 0 if the losses are the same but for rounding, 1 if not, or 2 if an argument makes no sense.
    """
    missing = [name for name in ("transformers", "matplotlib") if not module_exists(name)]
    if missing:
        raise MissingExtra("anyattn demo", "cli,plot,transformers", " and ".join(missing))
    from anyattn.demo import run as running

    settings = running.Settings(steps=steps, tokens=tokens, seed=seed, device=device, dtype=dtype)
    _render.show(
        f"Training a small Llama on Python's own documentation, {steps} steps: packed through anyattn, one document",
        "at a time through eager attention, and that again in float64, which shows what rounding explains.",
        "",
    )
    report = _run(running, settings)
    head = ("kernel", "verdict", "version", "why not", "what would lift it")
    _render.show(
        "",
        _render.heading("Which kernel ran the packed attention, and why no other"),
        "",
        _render.table(head, _explain._rows(report.kernel)),
        "",
        _render.heading("Losses"),
        "",
        _render.table(("step", "packed", "one at a time", "difference", "rounding explains"), _losses(report)),
        "",
        _render.heading("Speed, forward and backward"),
        "",
        _render.table(("documents", "tokens per second", "times one at a time", "padding"), _paces(report)),
        "",
    )
    written = running.write(report, output)
    _render.show(*(f"wrote {path}" for path in written), "", *_verdict(report))
    return 1 if report.failures else 0


def _run(running: Any, settings: Any) -> Any:
    """With a progress bar; in a pipe a line now and then."""
    console = _render.console()
    if not console.is_terminal:
        every = max(1, settings.steps // 4)

        def say(report: Any) -> None:
            if len(report.packed) % every == 0 or len(report.packed) == 1:
                _render.show(f"step {len(report.packed)} of {settings.steps}  {_state(report)}")

        return running.run(settings, say)
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("warming up", total=settings.steps)
        return running.run(settings, lambda r: progress.update(task, advance=1, description=_state(r)))


def _state(report: Any) -> str:
    apart = max(report.differences)
    return f"packed {report.packed[-1]:.4f} alone {report.one_at_a_time[-1]:.4f} apart at most {apart:.0e}"


def _losses(report: Any) -> list[tuple[str, ...]]:
    """A few steps of the run, the last one and the worst one included."""
    last = len(report.packed) - 1
    worst = max(range(last + 1), key=lambda step: report.differences[step] / report.bounds[step])
    chosen = sorted({0, last // 4, last // 2, 3 * last // 4, last, worst})
    return [
        (
            f"{step + 1}", f"{report.packed[step]:.6f}", f"{report.one_at_a_time[step]:.6f}",
            f"{report.differences[step]:.1e}", f"{report.bounds[step]:.1e}",
        )
        for step in chosen
    ]  # fmt: skip


def _paces(report: Any) -> list[tuple[str, ...]]:
    names = {
        "packed": "packed, anyattn",
        "padded": "padded to the longest, anyattn",
        "one at a time": "one at a time, eager",
    }
    slowest = report.pace["one at a time"].tokens_per_second
    rows: list[tuple[str, ...]] = []
    for key, name in names.items():
        pace = report.pace[key]
        if pace.tokens:
            speed = pace.tokens_per_second
            rows.append((name, f"{speed:,.0f}", f"{speed / slowest:.1f}", f"{1 - pace.tokens / pace.rows:.0%}"))
    return rows


def _verdict(report: Any) -> list[Text]:
    if not report.failures:
        largest = max(report.differences)
        words = (
            f"The losses are the same: in {len(report.packed)} steps they differ by {largest:.1e} at most, "
            f"and rounding explains {max(report.bounds):.1e}."
        )
        return [Text(words, style="bold green")]
    lines = [
        f"The losses differ by more than rounding explains, on {len(report.failures)} occasions:",
        *report.failures[:5],
    ]
    return [Text(line, style="bold red") for line in lines]
