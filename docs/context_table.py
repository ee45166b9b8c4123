"""The table of docs/context-kernels.md: what each kernel makes of each case under each scheme of context parallelism.

It is made from the files that tests/context_gpu.py wrote on GPUs (``*-context-suite*.json`` of benchmarks/results).
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tables import markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SCHEMES = ("p2p", "all_gather", "a2a", "a2a+p2p")
KERNELS = ("fa3", "fa4", "cudnn", "varlen", "torch:flash", "torch:efficient", "torch:cudnn", "flex")


class Outcome(NamedTuple):
    """What came of a case."""

    passed: bool
    why: str
    """Why it was refused, by the first reason."""


def table() -> str:
    """Cases by kernels, footnotes, and where all of it is from."""
    files = _files()
    found: dict[tuple[str, str, str], Outcome] = {}
    for _, content in files:
        for key, case in content["cases"].items():
            kernel, scheme, feature = key.split(" ", 2)
            if case["outcome"] == "failed":
                raise ValueError(f"{key} failed: {case['why']}")
            found.setdefault((feature, kernel, scheme), Outcome(case["outcome"] == "passed", _reason(case["why"])))
    notes: dict[str, int] = {}
    kernels = [name for name in KERNELS if any(kernel == name for _, kernel, _ in found)]
    rows = [("", *kernels)]
    for feature in dict.fromkeys(feature for feature, _, _ in found):
        by_kernel = [{s: o for s in SCHEMES if (o := found.get((feature, k, s))) is not None} for k in kernels]
        rows.append((feature.replace("_", " "), *(_cell(outcomes, notes) for outcomes in by_kernel)))
    links = [f"[{_words(content)}](../benchmarks/results/{path.name})" for path, content in files]
    told = textwrap.wrap(f"From the runs on {', '.join(links)}.", 120, break_long_words=False, break_on_hyphens=False)
    return "\n".join([markdown(rows), "", *_footnotes(notes), "", *told])


def _files() -> list[tuple[Path, dict[str, Any]]]:
    """Of most ranks first, and on most GPUs; a case counts as the first file that has it says."""
    files = [(path, json.loads(path.read_text("utf-8"))) for path in RESULTS.glob("*-context-suite*.json")]

    def order(file: tuple[Path, dict[str, Any]]) -> tuple[int, int, str]:
        about = file[1]["about"]
        return about["ranks"], about.get("gpus", about["ranks"]), file[0].name

    return sorted(files, key=order, reverse=True)


def _words(content: dict[str, Any]) -> str:
    about = content["about"]
    ranks, gpus = about["ranks"], about.get("gpus", about["ranks"])
    return f"{gpus} {about['device']}" if ranks == gpus else f"{ranks} ranks on {gpus} {about['device']}"


def _reason(why: str) -> str:
    """Without the kernel's name, what to do instead, and the kernels that were not asked for."""
    first = re.split(r"\s*[|;\n]", why.strip(), maxsplit=1)[0]
    return re.sub(r"^[a-z0-9:]+  +", "", first)


def _cell(outcomes: dict[str, Outcome], notes: dict[str, int]) -> str:
    passed = [scheme for scheme, outcome in outcomes.items() if outcome.passed]
    if len(passed) == len(SCHEMES):
        return "yes"
    whys = dict.fromkeys(outcome.why for outcome in outcomes.values() if not outcome.passed)
    numbers = ", ".join(str(notes.setdefault(why, len(notes) + 1)) for why in whys)
    missing = len(outcomes) < len(SCHEMES)
    ran = ", ".join(passed) + (" (others not run)" if missing and passed else "")
    return f"{ran}; {numbers}" if ran and numbers else ran or numbers


def _footnotes(notes: dict[str, int]) -> Iterator[str]:
    for why, number in notes.items():
        yield from textwrap.wrap(f"{number}. {why}", 120, subsequent_indent="   ")
