"""The picture of a run: the losses of every way, and their differences beside what rounding explains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyattn._errors import MissingExtra
from anyattn.demo.ranks import COUNT

if TYPE_CHECKING:
    from anyattn.demo.run import Report

_PACKED, _RANKS, _ONE, _EXACT, _BOUND, _GRAY = "#0b6fb8", "#15803d", "#e8871e", "#7d8793", "#c0392b", "#d9dde2"


def load() -> Any:
    """Matplotlib's Figure.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise MissingExtra("the plot of anyattn demo", "plot", "matplotlib") from None
    return Figure


def losses(report: Report, path: Path) -> None:
    """Draw a report to a PNG file."""
    figure = load()(figsize=(8.0, 6.4), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    steps = range(len(report.packed))
    kernel = report.kernel.forward
    upper.plot(steps, report.one_at_a_time, color=_ONE, lw=5, alpha=0.55, label="one document at a time, eager")
    upper.plot(steps, report.packed, color=_PACKED, lw=1.6, label=f"packed with padding, anyattn on {kernel}")
    if report.ranks:
        divided, label = [step.loss for step in report.ranks], f"packed, divided between {COUNT} ranks"
        upper.plot(range(len(divided)), divided, color=_RANKS, lw=0, marker="o", ms=2.5, label=label)
    upper.set_ylabel("loss (nats per byte)")
    upper.legend(frameon=False)
    verdict = "the same losses"
    if report.failures:
        verdict = "NOT the same losses" if report.disagreements else "two ranks failed"
    upper.set_title(f"{report.documents} documents, {report.pace['packed'].tokens:,} tokens: {verdict}", loc="left")

    floor = 1e-12  # of a logarithmic axis: losses may agree to the last bit
    lower.fill_between(steps, floor, report.bounds, color=_BOUND, alpha=0.07, lw=0)
    lower.plot(steps, report.bounds, color=_BOUND, lw=1.2, ls="--", label="what rounding explains")
    lower.plot(steps, _above(floor, report.rounding), color=_EXACT, lw=1.2, label="one at a time against exact")
    lower.plot(
        steps, _above(floor, report.differences), color=_PACKED, lw=1.6, marker="o", ms=3,
        label="packed against one at a time",
    )  # fmt: skip
    if report.ranks:
        lower.plot(
            range(len(report.ranks)), _above(floor, report.rank_differences), color=_RANKS, lw=1, marker="s", ms=2.5,
            label="two ranks against one at a time",
        )  # fmt: skip
    lower.set_yscale("log")
    drawn = (*report.differences, *report.rank_differences, *report.rounding, *report.bounds)
    values = [x for x in drawn if x > floor]
    lower.set_ylim(min(values, default=floor) / 2, max(values, default=1.0) * 40)
    lower.set_ylabel("difference of losses")
    lower.set_xlabel("step")
    lower.legend(frameon=False, ncols=2, loc="upper left", fontsize="small")
    for axes in (upper, lower):
        axes.grid(color=_GRAY, lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _above(floor: float, values: list[float]) -> list[float]:
    return [max(value, floor) for value in values]
