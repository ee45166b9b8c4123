"""Tables with rich: coloured on a terminal; in a pipe plain ASCII, 120 columns (or COLUMNS), nothing cut off."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

_PIPE_WIDTH = 120
#: Blanks between columns.
_GAP = 2
#: A line under the head, and no other: readable in a log, and in ASCII.
_PLAIN = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
_STYLES = {
    "chosen": "bold green",
    "able": "green",
    "rejected": "yellow",
    "yes": "green",
    "no": "dim",
    "forward": "yellow",
    "-": "dim",
}


def console() -> Console:
    """Where everything is printed: standard output. NO_COLOR, FORCE_COLOR and COLUMNS count."""
    found = Console(markup=False, emoji=False, highlight=False)
    if found.is_terminal:
        return found
    columns = os.environ.get("COLUMNS", "")
    width = int(columns) if columns.isdigit() and int(columns) else _PIPE_WIDTH
    return Console(markup=False, emoji=False, highlight=False, width=width)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table that fits: cells wrap between words, and are never cut. Words that mean a verdict get a colour."""
    to = console()
    cells = [tuple(head), *(tuple(row) for row in rows)]
    lines = box.SIMPLE_HEAD if to.is_terminal else _PLAIN
    made = Table(box=lines, pad_edge=False, padding=(0, _GAP - 1, 0, 0), show_edge=False, header_style="bold")
    for name, width in zip(head, _widths(cells, to.width), strict=True):
        made.add_column(name, overflow="fold", width=width)
    for row in cells[1:]:
        made.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    return made


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and values, without a head."""
    cells = list(rows)
    made = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), show_header=False)
    for width in _widths(cells, console().width):
        made.add_column(overflow="fold", width=width)
    for name, value in cells:
        made.add_row(Text(name), Text(value))
    return made


def longest_word(text: str) -> int:
    """What a column needs to break this text between words only."""
    return max(map(len, text.split()), default=0)


def _widths(rows: Sequence[Sequence[str]], room: int) -> list[int]:
    """The columns' widths: the widest give way first, none below its longest word as long as that is possible."""
    columns = list(zip(*rows, strict=True))
    widths = [max(1, *(len(line) for cell in column for line in [*cell.split("\n"), ""])) for column in columns]
    least = [max(1, *(longest_word(cell) for cell in [*column, ""])) for column in columns]
    room = max(len(widths), room - _GAP * (len(widths) - 1))
    while sum(widths) > room:
        wide = [i for i, width in enumerate(widths) if width > least[i]] or range(len(widths))
        widths[max(wide, key=lambda i: widths[i])] -= 1
    return widths


def heading(text: str) -> Text:
    """A line above a table."""
    return Text(text, style="bold")


def show(*parts: RenderableType) -> None:
    """Print, without the blanks at the ends of lines where nobody would see their colour."""
    to = console()
    if to.is_terminal:
        for part in parts:
            to.print(part)
        return
    with to.capture() as captured:
        for part in parts:
            to.print(part)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def show_json(data: Any) -> None:
    """Print for machines."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")
