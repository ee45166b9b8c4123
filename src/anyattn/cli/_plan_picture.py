"""The picture of a plan: who owns what, who meets whom, and how much each rank computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.colors import ListedColormap, hsv_to_rgb
from matplotlib.figure import Figure

from anyattn._context import _explain
from anyattn._context._explain import counted
from anyattn._context._plan_data import PlanData

_MOST_RANKS = 64
_CELLS = 256


def draw(target: Path, data: PlanData) -> None:
    """Write the picture, in the format that the file's name ends in."""
    with rc_context({"svg.hashsalt": "anyattn", "font.size": 8}):  # the same plan gives the same file
        figure = Figure(figsize=(12, 4.2), layout="constrained")
        owners, meets, work = figure.subplots(1, 3, width_ratios=(5, 4, 2))
        _owners(owners, data)
        _meets(meets, data)
        _work(work, data)
        ranks = data.topology.world
        figure.suptitle(
            f"{data.comm} over {counted(ranks, 'rank')}, {_explain.mask_words(data.mask)}: "
            f"{counted(sum(data.queries.lengths), 'token')} in {counted(len(data.queries.lengths), 'document')}"
        )
        figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)


def _shown(ranks: int) -> list[int]:
    """Ranks that are drawn: all, or some at equal distances."""
    count = min(ranks, _MOST_RANKS)
    return [i * ranks // count for i in range(count)]


def _colour(index: int, value: float) -> Any:
    """Neighbours differ: hues by the golden ratio."""
    return hsv_to_rgb((index * 0.618034 % 1.0, 0.55, value))


def _owners(axes: Any, data: PlanData) -> None:
    starts = _explain.Owners(data.queries).starts
    shown = _shown(data.topology.world)
    for line, rank in enumerate(shown):
        spans = [(starts[p.document] + p.begin, p.end - p.begin) for p in data.queries.pieces[rank]]
        colours = [_colour(p.document, 0.85) for p in data.queries.pieces[rank]]
        if spans:
            axes.broken_barh(spans, (line - 0.4, 0.8), facecolors=colours)
    step = max(1, len(shown) // 8)
    axes.set_yticks(range(0, len(shown), step), [str(rank) for rank in shown[::step]])
    axes.set(xlim=(0, max(1, starts[-1])), ylim=(len(shown) - 0.5, -0.5), xlabel="tokens of the batch", ylabel="rank")
    left_out = f" (every {data.topology.world // len(shown)}th rank)" if len(shown) < data.topology.world else ""
    axes.set_title(f"who owns what; a colour is a document{left_out}")


def _meets(axes: Any, data: PlanData) -> None:
    """Queries downwards, keys to the right; coloured by the queries' rank, pale where the keys are another's."""
    ranks = data.topology.world
    colours = [
        (1.0, 1.0, 1.0),
        *(_colour(r, 0.75) for r in range(ranks)),
        *(_pale(_colour(r, 0.75)) for r in range(ranks)),
    ]
    picture = _explain.sampled(data, _CELLS, _CELLS)
    cells = [[0 if key is None else 1 + rank + (key != rank) * ranks for key in row] for rank, row in picture]
    if cells:
        axes.imshow(cells, cmap=ListedColormap(colours), vmin=0, vmax=2 * ranks, interpolation="nearest", aspect="auto")
    axes.set(xticks=[], yticks=[], xlabel="keys", ylabel="queries")
    axes.set_title("who meets whom; a colour is a rank, pale: keys of others")


def _pale(colour: Any) -> Any:
    return tuple(1 - (1 - part) * 0.35 for part in colour)


def _work(axes: Any, data: PlanData) -> None:
    areas = data.areas()
    mean = sum(areas) / len(areas)
    axes.bar(range(len(areas)), [area / mean if mean else 0.0 for area in areas], width=1.0 if len(areas) > 32 else 0.8)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(xlabel="rank", title="pairs, over their mean")
