"""Markdown tables, and the kernels that they speak of."""

from __future__ import annotations

from collections.abc import Sequence

from anyattn._capability import Capability
from anyattn.backends import get


def package(name: str) -> str:
    """The distribution whose versions are meant."""
    return kernels(name)[0][1].package


def kernels(name: str) -> list[tuple[str, Capability]]:
    """(as ``backend=`` takes it, declaration) of each kernel of a backend."""
    return [(f"{name}:{c.kernel}" if c.kernel else name, c) for c in get(name).CAPABILITIES]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first one the head, as a markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """The same, for those who read it as text."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = markdown(
        [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    ).splitlines()
    lines[1] = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join(lines)


def linked(words: str, link: str) -> str:
    """The words, as a link where there is one."""
    return f"[{words}]({link})" if link else words
