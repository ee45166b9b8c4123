"""Turn JUnit reports of the test suite into a dated result: for each kernel what ran, and with which outcome.

``python -m pytest -m gpu --junitxml=report.xml`` on the machine, then there
``python tools/summarise_tests.py report.xml --refused cuda --out benchmarks/results/<date>-<gpu>-tests.json``.

Several reports become one result, each under its label, such as one for each version of a package:
``summarise_tests.py "fa4 4.0.0b12=b12.xml,b12.json" "fa4 4.0.0b36=b36.xml" --out tests.json``. After a comma stands a
result of the benchmarks from the machine as it was then, whose hardware and versions are copied; without it, they are
those of this machine now, or of ``--machine``.

``--refused`` asks the library, as it is installed here, what each kernel of a device does not take, and why: the suite
makes no cases of that.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

#: A kernel in a test's name, "cuda-torch:flash-", or its double, "sm90-fa3@2025-09-12-".
_KERNEL = re.compile(
    r"(?:^|[\[-])(?P<device>cuda|cpu|sm\d+)-(?P<name>(?:fa\d|varlen|flex|cudnn|reference|torch)(?::[a-z]+)?)"
    r"(?P<version>(?:@(?:\d{4}-\d\d-\d\d|[\w.]+))*)(?=[\]-]|$)"
)


def kernel_of(test: str) -> str:
    """Which kernel a test's name speaks of: "fa4", "torch:cpu on cpu", "fa3@3.0.0, double on sm90"; "" for none."""
    found = _KERNEL.search(test)
    if found is None:
        return ""
    device, name, version = found["device"], found["name"], found["version"]
    if device == "cuda":
        return name
    return f"{name} on cpu" if device == "cpu" else f"{name}{version}, double on {device}"


def summarise(report: Path) -> dict[str, Any]:
    """Outcomes of one report: in all, per kernel and test with what was left out and why, and every failure by name."""
    outcomes = Counter[str]()
    kernels: dict[str, dict[str, Any]] = defaultdict(lambda: {"outcomes": Counter(), "tests": defaultdict(Counter)})
    failures = []
    for case in ET.parse(report).getroot().iter("testcase"):
        file = case.get("classname", "").removeprefix("tests.").split(".")[0]
        name = case.get("name", "")
        kernel = kernel_of(name)
        outcome, message = _outcome(case)
        if outcome == "skipped" and (why := _refusal(message, kernel)):
            outcome, message = "refused", why
        outcomes[outcome] += 1
        entry = kernels[kernel or "no kernel in particular"]
        entry["outcomes"][outcome] += 1
        entry["tests"][f"{file}::{name.partition('[')[0]}"][outcome] += 1
        if outcome in ("refused", "skipped"):
            entry.setdefault(f"{outcome} because", Counter())[message] += 1
        if outcome == "failed":
            failures.append({"test": f"{file}::{name}", "message": message})
    return {"outcomes": _sorted(outcomes), "kernels": _sorted(kernels), "failures": failures}


def _outcome(case: ET.Element) -> tuple[str, str]:
    """The outcome, and the first line of why."""
    for tag, outcome in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        found = case.find(tag)
        if found is not None:
            return outcome, (found.get("message") or "").split("\n")[0][:300]
    return "passed", ""


def _refusal(message: str, kernel: str) -> str:
    """What a test says that its kernel does not take, without the kernel's name; "" if it was skipped otherwise."""
    name = re.split("[@ ,]", kernel)[0]
    found = re.match(rf"{re.escape(name)}(?:@\S+)? (does not take|has no) (.*)", message) if name else None
    return f"{found[1]} {found[2]}" if found else ""


def _sorted(found: Any) -> Any:
    """Plain dicts, sorted by key, all the way down."""
    return {key: _sorted(found[key]) for key in sorted(found)} if isinstance(found, dict) else found


def refused(device: str) -> dict[str, dict[str, str]]:
    """For each kernel here, each value of the suite's parameters that a plain case of it is refused with, and why."""
    sys.path[:0] = [str(ROOT / "tests")]
    cases: Any = importlib.import_module("cases")
    found: dict[str, dict[str, str]] = {}
    for target in cases.targets(device):
        values = cases._values(target)
        base = cases._first(target, values)
        if base is None:
            found[target.name] = {"everything": "no plain case is taken"}
            continue
        tried = {(name, x): replace(base, **{name: x}) for name, options in values.items() for x in options}
        found[target.name] = {
            f"{name} {x}": _reason(cases, case) for (name, x), case in tried.items() if not cases.takes(case)
        }
    return found


def _reason(cases: Any, case: Any) -> str:
    """Why the library does not take a case, in its own words."""
    import anyattn

    try:
        with cases.deterministic_flag(case):
            if case.target.device == "cpu":
                explanation = cases.build(case, device="cpu").explain()
            else:
                problem = cases.build(case, device="meta")
                with cases._meta_is_this_gpu():
                    explanation = problem.explain()
    except anyattn.InvalidArgument as error:
        return str(error).split("\n")[0]
    reasons = explanation.rejected.get(case.target.backend, ())
    kernel = case.target.name.partition(":")[2]
    own = [str(reason) for reason in reasons if reason.kernel in ("", kernel)]
    return "; ".join(own) or "another kernel of the backend is chosen"


def machine_here() -> dict[str, Any]:
    """Hardware and versions of this machine."""
    sys.path[:0] = [str(ROOT / "benchmarks")]
    found: dict[str, Any] = importlib.import_module("measure").machine()
    return found


def read_machine(path: Path) -> dict[str, Any]:
    """Those that a result of the benchmarks has."""
    found: dict[str, Any] = json.loads(path.read_text())["machine"]
    return found


def collect(reports: list[str], machine: dict[str, Any]) -> dict[str, Any]:
    """A result from reports as the command line has them: ``[label=]report.xml[,machine.json]``."""
    runs: dict[str, Any] = {}
    for text in reports:
        label, _, files = text.rpartition("=")
        report, _, own = files.partition(",")
        label = label or Path(report).stem
        if label in runs:
            raise ValueError(f"two reports are labelled {label!r}: give each a label of its own, label=report.xml")
        runs[label] = {**({"machine": read_machine(Path(own))} if own else {}), **summarise(Path(report))}
    return {"date": date.today().isoformat(), "machine": machine, "runs": runs}


def main() -> None:
    """Print the result, or write it to ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", metavar="[label=]report.xml[,machine.json]")
    parser.add_argument("--machine", type=Path, help="a result of the benchmarks; default: this machine")
    parser.add_argument("--refused", choices=["cuda", "cpu"], help="add what the kernels of this device refuse")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    machine = machine_here() if chosen.machine is None else read_machine(chosen.machine)
    result = collect(chosen.reports, machine)
    if chosen.refused:
        result["refused by declaration"] = refused(chosen.refused)
    text = json.dumps(result, indent=1) + "\n"
    if chosen.out is None:
        print(text, end="")
    else:
        chosen.out.write_text(text)
        print(f"written to {chosen.out}")


if __name__ == "__main__":
    main()
