"""``anyattn doctor``: what is installed, what runs on this machine and why the rest does not, and what to do next."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import torch
import typer
from rich.console import RenderableType
from rich.table import Table

import anyattn
from anyattn import _select, _support
from anyattn._api import BackendTable
from anyattn._environment import arch_name, arch_of, distribution_version, one_line
from anyattn._errors import InvalidArgument
from anyattn.backends import get
from anyattn.cli import _render

_VARIABLES = {
    "ANYATTN_BACKEND": 'which backends backend="auto" may be: names with commas',
    "ANYATTN_LOG": "what is logged to standard error: debug, info, warning or error",
    "ANYATTN_CACHE_DIR": "where compiled kernels are kept; without it, where their packages do",
}
#: Packages that more of anyattn needs: (distribution, the extra, what for).
_EXTRAS = (
    ("transformers", "transformers", 'attn_implementation="anyattn", and anyattn demo'),
    ("matplotlib", "plot", "the plot of anyattn demo"),
)
_GIB = 1 << 30


# --- facts ---


def _devices() -> tuple[list[dict[str, Any]], str]:
    """The CUDA devices, or why there is none."""
    if not torch.backends.cuda.is_built():
        return [], "this torch is built without CUDA"
    with warnings.catch_warnings(record=True) as caught:  # torch tells only so why a driver does not answer
        warnings.simplefilter("always")
        try:
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        except Exception as error:
            return [], one_line(error)
    if not count:
        return [], str(caught[0].message).splitlines()[0] if caught else "torch finds no CUDA device"
    found = []
    for index in range(count):
        device = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": device.name,
                "arch": arch_name(arch_of(torch.device("cuda", index))),
                "memory_gib": round(device.total_memory / _GIB, 1),
            }
        )
    return found, ""


def _cudnn() -> str | None:
    number = torch.backends.cudnn.version()
    if number is None:
        return None
    major, minor = (number // 10000, number // 100 % 100) if number >= 90000 else (number // 1000, number // 100 % 10)
    return f"{major}.{minor}.{number % 100}"


def _machine() -> dict[str, Any]:
    devices, why = _devices()
    return {
        "anyattn": anyattn.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": _cudnn(),
        "triton": distribution_version("triton"),
        "cpu_threads": torch.get_num_threads(),
        "devices": devices,
        "no_device": why,
    }


def _variables() -> list[dict[str, str | None]]:
    """The environment variables: value, what each is for, and what is wrong with it."""
    found = []
    for name, use in _VARIABLES.items():
        value = os.environ.get(name) or None
        wrong = ""
        if name == "ANYATTN_BACKEND" and value:
            try:
                _select.parse_preference(value)
            except InvalidArgument as error:
                wrong = str(error)
        if name == "ANYATTN_LOG" and value and not isinstance(logging.getLevelName(value.strip().upper()), int):
            wrong = f"{value} is no level, info is taken"
        found.append({"name": name, "value": value, "use": use, "wrong": wrong})
    return found


def _families(machine: dict[str, Any]) -> set[int]:
    """The generations of this machine's GPUs; {0} where there is none."""
    return {int(device["arch"][2:]) // 10 for device in machine["devices"]} or {0}


def _next_steps(machine: dict[str, Any], statuses: BackendTable) -> list[tuple[str, str]]:
    """(command, what for): what would make more of anyattn work here."""
    families = _families(machine)
    steps = []
    for status in statuses.values():
        able = {family for capability in get(status.name).CAPABILITIES for family in capability.families}
        if status.runs_here or not able & families:
            continue
        step = (status.install, f"{status.name}: {status.title}")
        if status.version is None:
            steps.append(step)
        elif status.install not in [install for install, _ in steps]:
            steps.append((status.install, f"{status.name}, which is installed and does not work: {status.reason}"))
    for package, extra, use in _EXTRAS:
        if distribution_version(package) is None:
            steps.append((f"pip install 'anyattn[{extra}]'", use))
    if not machine["devices"]:
        steps.append(("anyattn explain --on sm90", "what a GPU would run, and why: from any machine"))
    steps.append(("anyattn demo", "trains a small model on packed documents"))
    return steps


# --- tables ---


def _machine_table(machine: dict[str, Any]) -> Table:
    none = "none"
    rows = [
        ("python", f"{machine['python']}, {machine['platform']}"),
        ("torch", machine["torch"]),
        ("CUDA", machine["cuda"] or none),
        ("cuDNN", machine["cudnn"] or none),
        ("triton", machine["triton"] or none),
    ]
    rows += [
        (f"GPU {place}", f"{d['name']}, {d['arch']}, {d['memory_gib']} GiB")
        for place, d in enumerate(machine["devices"])
    ]
    if not machine["devices"]:
        rows.append(("GPU", f"none: {machine['no_device']}"))
    rows.append(("CPU", f"{machine['cpu_threads']} threads for torch"))
    return _render.facts(rows)


def _kept_kernels(statuses: BackendTable) -> dict[str, str]:
    """Where the backends that run here, and compile their kernels, keep them."""
    found = {}
    for name, status in statuses.items():
        where: Callable[[], str | None] | None = getattr(get(name), "kernel_cache", None)
        if status.runs_here and where is not None:
            found[name] = where() or "not kept: every process compiles them again"
    return found


def _kept_table(kept: dict[str, str]) -> Iterator[RenderableType]:
    if kept:
        yield ""
        yield _render.facts([(f"kernels compiled for {name}", where) for name, where in kept.items()])


def _backend_table(statuses: BackendTable) -> Table:
    rows = []
    for s in statuses.values():
        why = s.reason if s.version else f"{s.reason}: {s.install}"
        rows.append((s.name, s.version or "-", "yes" if s.runs_here else "no", "" if s.runs_here else why, s.title))
    return _render.table(("backend", "version", "runs here", "why not", "what it is"), rows)


def _support_tables() -> Iterator[RenderableType]:
    """Features x kernels, in as many tables as the width asks for; then the legend, and the kernels."""
    rows, facts = _support.support_rows(), _support.kernel_facts()
    columns = [
        (kernel.replace(":", ":\n"), [row.cells[place][1] for row in rows])
        for place, kernel in enumerate(fact.kernel for fact in facts)
    ]
    room = _render.console().width
    titles = [row.title for row in rows]
    wide = min(max(map(len, titles)), room // 3)
    groups: list[list[tuple[str, list[str]]]] = [[]]
    used = wide
    for head, cells in columns:
        width = 2 + max(map(_render.longest_word, (head, *cells)))
        if groups[-1] and used + width > room:
            groups.append([])
            used = wide
        groups[-1].append((head, cells))
        used += width
    for group in groups:
        yield _render.table(
            ("feature", *(head for head, _ in group)),
            zip(titles, *(cells for _, cells in group), strict=True),
        )
        yield ""
    yield _render.facts(_support.legend())
    yield ""
    yield _render.table(
        ("kernel", "runs on", "dtypes", "head_dim", "backward"),
        [(fact.kernel, fact.devices, fact.dtypes, fact.head_dims, fact.backward) for fact in facts],
    )


def _rules(families: set[int], everything: bool) -> Iterator[RenderableType]:
    """Rules and known defects: of the kernels for this machine's devices, or of all."""
    facts = [fact for fact in _support.kernel_facts() if fact.notes]
    shown = [fact for fact in facts if everything or families & set(fact.families)]
    if shown:
        yield ""
        rules = [(fact.kernel, note) for fact in shown for note in fact.notes]
        yield _render.table(("kernel", "rule or known defect"), rules)
    hidden = [fact.kernel for fact in facts if fact not in shown]
    if hidden:
        yield ""
        yield f"More rules hold for {', '.join(hidden)}, on other devices: anyattn doctor --all shows them."


def _section(title: str, *parts: RenderableType) -> tuple[RenderableType, ...]:
    return (_render.heading(title), *parts, "")


def _variable_table(variables: Sequence[dict[str, str | None]]) -> Table:
    rows = [
        (str(v["name"]), v["value"] or "not set", f"{v['use']}" + (f"; WRONG: {v['wrong']}" if v["wrong"] else ""))
        for v in variables
    ]
    return _render.table(("variable", "value", "what it says"), rows)


def doctor(
    everything: Annotated[bool, typer.Option("--all", help="Rules of kernels for other devices too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Show what is installed and runs here, why the rest does not, what each kernel can do, and what to do next."""
    with contextlib.redirect_stdout(sys.stderr):  # packages print while they are imported
        machine, statuses, variables = _machine(), anyattn.backends(), _variables()
    steps, kept = _next_steps(machine, statuses), _kept_kernels(statuses)
    if as_json:
        support = {row.feature: dict(row.cells) for row in _support.support_rows()}
        _render.show_json(
            {
                "machine": machine,
                "backends": [dataclasses.asdict(status) for status in statuses.values()],
                "compiled_kernels": kept,
                "support": support,
                "kernels": [dataclasses.asdict(fact) for fact in _support.kernel_facts()],
                "environment": variables,
                "next_steps": [{"command": command, "use": use} for command, use in steps],
            }
        )
        return
    _render.show(
        *_section(f"anyattn {machine['anyattn']} on this machine", _machine_table(machine)),
        *_section("Backends, the preferred first", _backend_table(statuses), *_kept_table(kept)),
        *_section("What each kernel can do", *_support_tables(), *_rules(_families(machine), everything)),
        *_section("Environment", _variable_table(variables)),
        _render.heading("Next steps"),
        _render.facts(steps),
    )
