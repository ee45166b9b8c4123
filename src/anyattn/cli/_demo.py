"""``anyattn demo``: train on packed documents, the same on two ranks, and one document at a time: one loss."""

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
    rank_steps: Annotated[
        int, typer.Option(metavar="N", help="Of these steps, how many at most are trained on two ranks too; 0: none.")
    ] = 18,
    seed: Annotated[int, typer.Option(metavar="N", help="Chooses weights and documents.")] = 0,
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(metavar="NAME", help="float32, or bfloat16 by autocast.")] = "float32",
) -> int:
    """Train a small Llama on packed documents through anyattn, beside one document at a time through eager attention.

    The packed training is repeated on two ranks, each batch divided between them by context parallelism: two processes
    on the CPU, or two GPUs. Documents are docstrings and sources of Python's standard library, with padding between
    them where they are packed.

    Exit status: 0 if all losses are the same but for rounding, 1 if not or if a rank failed, 2 if an argument makes
    no sense.
    """
    missing = [name for name in ("transformers", "matplotlib") if not module_exists(name)]
    if missing:
        raise MissingExtra("anyattn demo", "cli,plot,transformers", " and ".join(missing))
    from anyattn.demo import run as running

    settings = running.Settings(
        steps=steps, rank_steps=rank_steps, tokens=tokens, seed=seed, device=device, dtype=dtype
    )
    _render.show(
        f"Training a small Llama on Python's own documentation, {steps} steps: packed through anyattn, one document",
        "at a time through eager attention, and that again in float64, which shows what rounding explains. Then the",
        "packed training once more on two ranks, which divide every batch between them.",
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
        _render.table(
            ("step", "one at a time", "packed", "apart", "two ranks", "apart", "rounding explains"), _losses(report)
        ),
        "",
        _render.heading("Speed, forward and backward"),
        "",
        _render.table(("documents", "tokens per second", "times one at a time", "padding"), _paces(report)),
        "",
        _render.heading("Two ranks: how batches were divided"),
        "",
        *_two_ranks(report),
        "",
    )
    written = running.write(report, output)
    _render.show(*(f"wrote {path}" for path in written), "", *_verdict(report))
    return 1 if report.failures else 0


def _run(running: Any, settings: Any) -> Any:
    """With a progress bar; in a pipe a line now and then."""
    console = _render.console()
    total = settings.steps + min(settings.steps, settings.rank_steps)
    if not console.is_terminal:
        every = max(1, settings.steps // 4)

        def say(report: Any) -> None:
            done, of, on = len(report.packed), settings.steps, ""
            if report.ranks:
                done, of, on = len(report.ranks), total - settings.steps, " on two ranks"
            if done % every == 0 or done == 1:
                _render.show(f"step {done} of {of}{on}  {_state(report)}")

        return running.run(settings, say)
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("warming up", total=total)
        return running.run(settings, lambda r: progress.update(task, advance=1, description=_state(r)))


def _state(report: Any) -> str:
    name, loss, apart = "packed", report.packed[-1], report.differences
    alone = report.one_at_a_time[-1]
    if report.ranks:
        name, loss, apart = "two ranks", report.ranks[-1].loss, report.rank_differences
        alone = report.one_at_a_time[len(report.ranks) - 1]
    return f"{name} {loss:.4f} alone {alone:.4f} apart at most {max(apart):.0e}"


def _losses(report: Any) -> list[tuple[str, ...]]:
    """A few steps of the run, the last one and the worst ones included."""
    last = len(report.packed) - 1
    chosen = {0, last // 4, last // 2, 3 * last // 4, last}
    for apart in (report.differences, report.rank_differences):
        if apart:
            chosen.add(max(range(len(apart)), key=lambda step, apart=apart: apart[step] / report.bounds[step]))  # type: ignore[misc]
    rows: list[tuple[str, ...]] = []
    for step in sorted(chosen):
        ranks = ("-", "-")
        if step < len(report.ranks):
            ranks = (f"{report.ranks[step].loss:.6f}", f"{report.rank_differences[step]:.1e}")
        packed = (f"{report.packed[step]:.6f}", f"{report.differences[step]:.1e}")
        rows.append((f"{step + 1}", f"{report.one_at_a_time[step]:.6f}", *packed, *ranks, f"{report.bounds[step]:.1e}"))
    return rows


def _two_ranks(report: Any) -> list[Any]:
    """A line per scheme, over the steps that it served; or why there is none."""
    if report.ranks_left_out is not None:
        return [f"left out: {report.ranks_left_out}"]
    rows = []
    for comm in sorted({step.comm for step in report.ranks}):
        steps = [step for step in report.ranks if step.comm == comm]
        share = sum(step.rows for step in steps) / len(steps)
        work = [step.imbalance for step in steps]
        received = sum(step.bytes_moved for step in steps) / len(steps) / 1e3
        rows.append(
            (comm, f"{len(steps)}", f"{share:,.0f}", f"{sum(work) / len(work):.2f}", f"{max(work):.2f}",
             f"{received:,.0f} kB")
        )  # fmt: skip
    head = ("scheme", "steps", "rows per rank", "busier rank's work over the mean", "at most", "received per layer")
    return [_render.table(head, rows)] if rows else ["no step was taken"]


def _paces(report: Any) -> list[tuple[str, ...]]:
    names = {
        "packed": "packed, anyattn",
        "two ranks": "packed, anyattn on two ranks",
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
        words = (
            f"The losses are the same: in {len(report.packed)} steps they differ by {max(report.differences):.1e} at "
            f"most, and rounding explains {max(report.bounds):.1e}."
        )
        if report.ranks:
            steps = f"in {len(report.ranks)} steps by {max(report.rank_differences):.1e} at most"
            words += f" On two ranks too: {steps}."
        return [Text(words, style="bold green")]
    lines = []
    if report.disagreements:
        lines.append(
            f"The losses differ by more than rounding explains, on {len(report.disagreements)} occasions:",
        )
        lines += report.disagreements[:5]
    if report.ranks_failed is not None:
        lines.append(f"Two ranks failed after {len(report.ranks)} steps: {report.ranks_failed}")
    return [Text(line, style="bold red") for line in lines]
