"""Turn a JUnit report of the tests on a GPU into a dated result file.

``python -m pytest -m gpu --junitxml=report.xml`` there, then
``python tools/summarise_tests.py report.xml machine.json > benchmarks/results/<date>-<gpu>-tests.json``, where
machine.json is any result file of the benchmarks from the same machine: its hardware and versions are copied.
"""

from __future__ import annotations

import argparse
import json
import re
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

_KERNEL = re.compile(r"cuda-((?:fa\d|varlen|flex|cudnn|reference|torch):?[a-z]*)")


def summarise(report: Path, machine: Path) -> dict[str, Any]:
    """Counts of what passed, failed and was skipped, in all, per file and per kernel; every failure by name."""
    outcomes, files, kernels = Counter[str](), Counter[str](), Counter[str]()
    failures, skips = [], Counter[str]()
    for case in ET.parse(report).getroot().iter("testcase"):
        skipped = case.find("skipped")
        failed = case.find("failure") is not None or case.find("error") is not None
        outcome = "failed" if failed else "skipped" if skipped is not None else "passed"
        outcomes[outcome] += 1
        file = case.get("classname", "").removeprefix("tests.").split(".")[0]
        files[f"{file}: {outcome}"] += 1
        if named := _KERNEL.search(case.get("name", "")):
            kernels[f"{named[1]}: {outcome}"] += 1
        if failed:
            failures.append(f"{file}::{case.get('name')}")
        if skipped is not None:
            skips[(skipped.get("message") or "").split("\n")[0]] += 1
    known = json.loads(machine.read_text())
    return {
        "date": known["date"],
        "machine": known["machine"],
        "outcomes": dict(sorted(outcomes.items())),
        "kernels": dict(sorted(kernels.items())),
        "files": dict(sorted(files.items())),
        "failures": failures,
        "skipped because": dict(sorted(skips.items())),
    }


def main() -> None:
    """Print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("report", type=Path)
    parser.add_argument("machine", type=Path)
    chosen = parser.parse_args()
    print(json.dumps(summarise(chosen.report, chosen.machine), indent=1))


if __name__ == "__main__":
    main()
