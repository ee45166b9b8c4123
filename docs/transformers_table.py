"""The table of docs/transformers.md: what each implementation of attention makes of each case.

``python docs/transformers_table.py`` measures on the CPU and writes a dated file under benchmarks/results;
``cases()`` makes the table from the newest of them. The cases are those of tests/test_transformers_table.py.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
KIND = "cpu-transformers-cases"
IMPLEMENTATIONS = ("anyattn", "eager", "sdpa")


def measure() -> Path:
    """Run every case through every implementation and architecture; write what came of it."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    import transformers

    import anyattn
    from transformers_cases import FORWARD
    from transformers_generation import GENERATION
    from transformers_images import IMAGES
    from transformers_judge import TOLERANCE, judge
    from transformers_models import ARCHITECTURES

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    anyattn.integrations.transformers.register()
    outcomes = []
    for case in (*FORWARD, *IMAGES, *GENERATION):
        for architecture in filter(case.suits, ARCHITECTURES):
            for implementation in IMPLEMENTATIONS:
                found = judge(case, architecture, implementation)
                outcomes.append(
                    {
                        "group": case.group, "case": case.name, "architecture": architecture.name,
                        "implementation": implementation, "verdict": found.verdict,
                        "error": float(f"{found.error:.3g}"), "told": found.told[:200], "tokens": case.exactly,
                    }
                )  # fmt: skip
        print(case.name, flush=True)
    content = {
        "date": date.today().isoformat(),
        "machine": {
            "python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__,
            "anyattn": anyattn.__version__,
        },
        "tolerance": TOLERANCE,
        "architectures": {a.name: a.special for a in ARCHITECTURES},
        "outcomes": outcomes,
    }  # fmt: skip
    path = RESULTS / f"{date.today().isoformat()}-{KIND}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    return path


def cases() -> str:
    """The newest measurement as Markdown."""
    path = max(RESULTS.glob(f"*-{KIND}.json"))
    content = json.loads(path.read_text("utf-8"))
    outcomes: list[dict[str, Any]] = content["outcomes"]
    closed = {name: _closed(outcomes, name) for name in IMPLEMENTATIONS}
    lines = ["| what is passed | models | " + " | ".join(f"`{name}`" for name in IMPLEMENTATIONS) + " |"]
    lines.append("|---" * (2 + len(IMPLEMENTATIONS)) + "|")
    group = ""
    for case in dict.fromkeys(outcome["case"] for outcome in outcomes):
        rows = [outcome for outcome in outcomes if outcome["case"] == case]
        if rows[0]["group"] != group:
            group = rows[0]["group"]
            lines.append(f"| **{group}** |" + " |" * (1 + len(IMPLEMENTATIONS)))
        cells = [_cell([r for r in rows if r["implementation"] == i], closed[i]) for i in IMPLEMENTATIONS]
        models = len({row["architecture"] for row in rows})
        lines.append(f"| {case} | {models} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_notes(content, closed, path)])


def _closed(outcomes: Sequence[dict[str, Any]], implementation: str) -> list[str]:
    """The architectures that refuse an implementation in every case."""
    verdicts: dict[str, set[str]] = {}
    for outcome in outcomes:
        if outcome["implementation"] == implementation:
            verdicts.setdefault(outcome["architecture"], set()).add(outcome["verdict"])
    return [name for name, found in verdicts.items() if found == {"refused"}]


def _cell(rows: Sequence[dict[str, Any]], closed: Sequence[str]) -> str:
    """What one implementation made of one case, over all architectures that let it in."""
    rows = [row for row in rows if row["architecture"] not in closed]
    by_verdict = {v: [r for r in rows if r["verdict"] == v] for v in ("wrong", "crashed", "refused")}
    if not rows:
        return "-"
    told = []
    for verdict, found in by_verdict.items():
        if not found:
            continue
        where = "" if len(found) == len(rows) else f" in {_names(found) if len(found) <= 2 else len(found)}"
        told.append(f"{verdict}{where}{_by(found) if verdict == 'wrong' else ''}")
    return "right" if not told else "**" + "; ".join(told) + "**"


def _names(rows: Sequence[dict[str, Any]]) -> str:
    return ", ".join(row["architecture"] for row in rows)


def _by(rows: Sequence[dict[str, Any]]) -> str:
    worst = max(row["error"] for row in rows)
    if rows[0]["tokens"]:
        return f", up to {worst:.0f} tokens"
    return f", by up to {worst:.2g}"


def _notes(content: dict[str, Any], closed: dict[str, list[str]], path: Path) -> list[str]:
    machine = content["machine"]
    notes = [
        f"Measured {content['date']} on a CPU with transformers {machine['transformers']} and torch "
        f"{machine['torch']}, float32; figures are relative to the largest value, or absolute below 1, and "
        f"{content['tolerance']:g} counts as right ([the file](../benchmarks/results/{path.name})).",
    ]
    for name, architectures in closed.items():
        if architectures:
            notes.append(
                f"transformers refuses `{name}` for {' and '.join(architectures)}; they are not counted there."
            )
    kinds = ", ".join(f"{name} ({special})" for name, special in content["architectures"].items())
    return [" ".join(notes), "", f"The models: {kinds}."]


def main() -> None:
    """Measure, and print the table."""
    print(measure())
    print(cases())


if __name__ == "__main__":
    main()
