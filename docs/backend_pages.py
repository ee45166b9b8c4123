"""The generated parts of the backends' pages: what is declared, recorded and explained; ``figures`` has the measured.

For each backend ``generate.py`` asks ``parts(name)``: facts, versions, support, rules, explain, measured. Declarations
are those of ``anyattn.backends``, recorded versions lie in ``tests/signatures``, figures in ``benchmarks/results``.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

import anyattn
import figures
from anyattn import _support
from anyattn._capability import FAMILY_NAMES, FEATURE_NAMES, Capability, Row
from anyattn.backends import ORDER, get
from tables import aligned, kernels, linked, markdown, package

ROOT = Path(__file__).resolve().parent.parent
#: Where the versions of a backend's package are recorded, if its signatures change.
RECORDED = {
    "fa2": ("fa2",),
    "fa3": ("fa3", "fa3_fwd"),
    "fa4": ("fa4",),
    "cudnn": ("cudnn",),
    "varlen": ("torch",),
    "torch": ("torch",),
    "flex": ("torch",),
}
#: Calls whose explanation says something about a backend. What they may name is in ``_names``.
EXPLAINED = {
    "fa2": (
        'explain(q, k, k, causal=True, window=(1023, 0), softcap=30.0, on="sm80", backend="fa2")',
        'explain(q, k, k, softcap=30.0, on="sm80", backend="fa2", assume={"fa2": "2.5.9"})',
    ),
    "fa3": (
        'explain(q, k, k, causal=True, window=(1023, 0), on="sm90", backend="fa3", assume={"fa3": "0.0.3"})',
        'explain(wide, wide, wide, deterministic=True, on="sm90", backend="fa3")',
    ),
    "fa4": (
        'explain(wide, wide, wide, on="sm100", backend="fa4")',
        'explain(odd, odd, odd, causal=True, softcap=30.0, on="sm90", backend="fa4", assume={"fa4": "4.0.0b8"})',
    ),
    "cudnn": (
        'explain(q, k, k, causal=True, window=(1023, 0), on="sm90", backend="cudnn")',
        'explain(q, k, k, softcap=30.0, on="sm90", backend="cudnn")',
    ),
    "varlen": (
        'explain(rows, rows, rows, packing=packing, deterministic=True, on="sm90", backend="varlen")',
        'explain(q, k, k, on="sm90", backend="varlen")',
    ),
    "torch": ('explain(q, k, k, causal=True, window=(1023, 0), dropout=0.1, on="sm90", backend="torch")',),
    "flex": (
        'explain(q, k, k, softcap=30.0, alibi_slopes=slopes, on="sm90", backend="flex")',
        'explain(q.float(), k.float(), k.float(), softcap=30.0, return_lse=True, on="cpu", backend="flex")',
    ),
    "reference": ('explain(q.double(), k.double(), k.double(), softcap=30.0, dropout=0.1, on="sm90")',),
}


def parts(name: str) -> dict[str, Callable[[], str]]:
    """The parts of one backend's page, by marker."""
    makers = {"facts": facts, "versions": versions, "support": support, "rules": rules, "measured": figures.measured}
    if name in EXPLAINED:
        makers["explain"] = explained
    return {f"{name}-{part}": partial(make, name) for part, make in makers.items()}


#: The headings of a page, each with the part below it.
HEADINGS = {
    "## What it takes": "support",
    "### Rules and known defects": "rules",
    "### What versions bring": "versions",
    "## Conventions, and what becomes of them here": "",
    "## Reading `explain`": "explain",
    "## Measured": "measured",
}


def skeleton(name: str) -> str:
    """A page with markers and without prose."""
    found = [f"# {name}: {get(name).TITLE}", _empty(f"{name}-facts")]
    for heading, part in HEADINGS.items():
        marker = f"{name}-{part}"
        found += [heading, _empty(marker)] if marker in parts(name) else [heading] if not part else []
    return "\n\n".join(found) + "\n"


def _empty(marker: str) -> str:
    return f"<!-- {marker} -->\n<!-- /{marker} -->"


# --- facts and versions --------------------------------------------------------------------------------------------


def facts(name: str) -> str:
    """Title, installation, and which versions are known."""
    backend = get(name)
    rows = [("", backend.TITLE), ("installation", _command(backend.INSTALL))]
    if name in RECORDED:
        rows.append(("versions", "; ".join(_known(name))))
    rows.append(("`explain(on=...)` assumes", f"{package(name)} {backend.NEWEST}"))
    return markdown(rows)


def _command(install: str) -> str:
    return f"`{install}`" if install.startswith("pip ") and "(" not in install else install


def _oldest(name: str) -> str | None:
    """The version below which nothing is taken."""
    found = [r.fixed for _, c in kernels(name) for r in c.rows if r.reason.what == "version" and r.fixed]
    return max(found, key=Version, default=None)


def _known(name: str) -> Iterator[str]:
    """Which versions every call is bound against, in words."""
    oldest = _oldest(name)
    for file in RECORDED[name]:
        recorded = json.loads((ROOT / "tests" / "signatures" / f"{file}.json").read_text("utf-8"))["versions"]
        states = [v for v, noted in recorded.items() if noted.get("package") == "flash_attn_3"]
        if states:
            yield f"{package(name)}, {len(states)} states of its sources, {states[0][:10]} to {states[-1][:10]}"
            continue
        taken = [v for v in recorded if oldest is None or Version(v) >= Version(oldest)]
        distribution = "fa3-fwd" if file == "fa3_fwd" else package(name)
        yield f"{distribution} {taken[0]} to {taken[-1]} ({len(taken)} published versions)"


def versions(name: str) -> str:
    """What each version brings, as far as the declaration speaks of it."""
    brings: dict[str, list[str]] = {}
    for kernel, capability in kernels(name):
        prefix = f"`{kernel}`: " if len(kernels(name)) > 1 else ""
        for version, what in _brought(capability):
            brings.setdefault(version, []).append(prefix + what)
    if not brings:
        return "No feature depends on the version alone: the rules above say what does."
    rows = [("version", "what it brings")]
    rows += [(v, "; ".join(dict.fromkeys(brings[v]))) for v in sorted(brings, key=Version)]
    return markdown(rows)


def _brought(capability: Capability) -> Iterator[tuple[str, str]]:
    for feature, support_ in capability.features.items():
        if support_.since:
            yield support_.since, FEATURE_NAMES[feature]
        if support_.backward_since and support_.backward_since != support_.since:
            yield support_.backward_since, FEATURE_NAMES[feature] + " in backward"
    if capability.native_sink_since:
        yield capability.native_sink_since, "sinks, without the core's help"
    for row in capability.rows:
        if _is_lifted(row):
            assert row.fixed is not None
            yield row.fixed, linked(_what(row), row.reason.link)


def _is_lifted(row: Row) -> bool:
    """Whether a row is what a newer version of the same package brings."""
    return row.fixed is not None and row.fixed in row.reason.needs and row.reason.what != "version"


def _what(row: Row) -> str:
    backward = row.direction == "backward" and "backward" not in row.reason.what
    return row.reason.what + (" in backward" if backward else "")


# --- support and rules ---------------------------------------------------------------------------------------------


def support(name: str) -> str:
    """GPUs, dtypes, head dims and features of each kernel."""
    mine = [kernel for kernel, _ in kernels(name)]
    declared = {f.kernel: f for f in _support.kernel_facts()}
    rows = [["", *(f"`{kernel}`" for kernel in mine)]]
    for title in ("runs on", "dtypes", "head_dim", "backward"):
        values = [getattr(declared[k], {"runs on": "devices", "head_dim": "head_dims"}.get(title, title)) for k in mine]
        rows.append([title, *values])
    missing = []
    for row in _support.support_rows():
        cells = [dict(row.cells)[kernel] for kernel in mine]
        if set(cells) == {"no"}:
            missing.append(row.title)
        else:
            rows.append([row.title, *cells])
    return markdown(rows) + ("\n\n" + textwrap.fill(f"Not here: {', '.join(missing)}.", 120) if missing else "")


def rules(name: str) -> str:
    """What no column expresses: rules and defects that no version has lifted yet, and what a build may lack."""
    found = [(kernel, row) for kernel, c in kernels(name) for row in c.rows if not _is_lifted(row)]
    found = [(kernel, row) for kernel, row in found if row.reason.what != "version"]
    several = len(kernels(name)) > 1
    rows: dict[tuple[str, ...], list[str]] = {}
    for kernel, row in found:
        line = _any_limit(row, (_what(row), linked(row.reason.needs, row.reason.link), _when(row)))
        if f"`{kernel}`" not in (of := rows.setdefault(line, [])):
            of.append(f"`{kernel}`")
    if not rows:
        return "None is known."
    head = ("of", "needs", "versions or builds") + (("kernel",) if several else ())
    return markdown([head, *(line + ((", ".join(of),) if several else ()) for line, of in rows.items())])


def _any_limit(row: Row, line: tuple[str, ...]) -> tuple[str, ...]:
    """The line of a rule whose flag ends in a number, without that number: there is one for each."""
    limit = re.search(r"_to_(\d+)$", row.flag or "")
    return (
        line if limit is None else tuple(re.sub(rf"\b{limit[1]}\b|(?<=_to_){limit[1]}\b", "N", cell) for cell in line)
    )


def _when(row: Row) -> str:
    words = [f"those with `{row.flag}`"] if row.flag else []
    words += [f"from {row.since} on"] if row.since else []
    words += [f"before {row.fixed}"] if row.fixed else []
    return ", ".join(words) or "all"


# --- explanations --------------------------------------------------------------------------------------------------


def _names() -> dict[str, Any]:
    def on_meta(*shape: int, dim: int = 128) -> torch.Tensor:
        return torch.empty(*shape, dim, dtype=torch.bfloat16, device="meta", requires_grad=True)

    return {
        "explain": anyattn.explain, "q": on_meta(1, 4096, 32), "k": on_meta(1, 4096, 8), "rows": on_meta(4096, 8),
        "wide": on_meta(2, 4096, 8, dim=256), "odd": on_meta(2, 4096, 8, dim=100),
        "slopes": torch.ones(32, device="meta"),
        "packing": anyattn.Packing.from_lengths([1000, 3000], pad_to_multiple_of=64),
    }  # fmt: skip


def explained(name: str) -> str:
    """What ``explain`` says of a backend: the verdict, and this backend's lines."""
    shown = []
    for call in EXPLAINED[name]:
        verdict, *lines = str(eval(call, _names())).splitlines()
        starts = [i for i, line in enumerate(lines) if not line.startswith("   ")] + [len(lines)]
        blocks = [lines[i:j] for i, j in pairwise(starts)]
        mine = [line for block in blocks if re.match(rf"  {name}\b", block[0]) for line in block]
        shown.append("\n".join([f">>> print({call})", verdict, *mine]))
    return "```text\n" + "\n\n".join(shown) + "\n```"


# --- summaries -----------------------------------------------------------------------------------------------------


def table_of_backends(folder: str) -> str:
    """Every backend in the order of preference, with its installation and a link to its page."""
    rows = [("backend", "what it is", "installation")]
    rows += [(f"[`{n}`]({folder}{n}.md)", get(n).TITLE, _command(get(n).INSTALL)) for n in ORDER]
    return markdown(rows)


def matrix() -> str:
    """Features x backends: what the best kernel of each does on a GPU, in the newest version."""
    names = [name for name in ORDER if _gpu_kernels(name)]
    rows = [["", *(f"`{name}`" for name in names)]]
    rows.append(["GPUs", *(_gpus(name) for name in names)])
    rows.append(["head_dim to", *(_widest(name) for name in names)])
    everywhere = []
    for feature, title in FEATURE_NAMES.items():
        cells = [_cell(name, feature) for name in names]
        if feature in FROM_CORE or set(cells) == {"yes"}:
            everywhere.append(title)
        elif feature not in LEFT_OUT:
            rows.append([SHORT.get(feature, title), *cells])
    told = f"All take {', '.join(everywhere[:-1])} and {everywhere[-1]}. In part or not:"
    return f"{textwrap.fill(told, 120)}\n\n{aligned(rows)}"


#: What the core gives to every kernel.
FROM_CORE = ("sink", "lse_grad")
#: Too rare for a summary.
LEFT_OUT = ("alibi_per_sequence", "nonpositive_scale")
#: Features in fewer words than ``FEATURE_NAMES``.
SHORT = {
    "top_left": "top-left, any lengths",
    "bias_grad": "its gradient",
}


def _gpu_kernels(name: str) -> list[Capability]:
    return [c for _, c in kernels(name) if any(c.families)]


def _gpus(name: str) -> str:
    families = sorted({f for c in _gpu_kernels(name) for f in c.families if f})
    if families == list(range(families[0], 13)):
        return f"{FAMILY_NAMES[families[0]]}+"
    return "sm" + ", ".join(FAMILY_NAMES[f].removeprefix("sm") for f in families)


def _widest(name: str) -> str:
    widest = max((c.head_dims.maximum for c in _gpu_kernels(name)), default=0)
    return "any" if widest >= 1 << 16 else str(widest)


def _cell(name: str, feature: str) -> str:
    """What the best kernel of a backend says: "yes", "part" where something limits it, "forward", "CPU", or nothing."""
    order = ("yes", "part", "forward", "CPU", "")
    return min((_of_kernel(c, feature) for _, c in kernels(name)), key=order.index, default="")


def _of_kernel(capability: Capability, feature: str) -> str:
    declared = capability.features.get(feature)
    if declared is None:
        return ""
    if not any(capability.families):
        return "CPU"
    if not declared.backward or capability.backward_families == ():
        return "forward"
    fewer = _fewer(declared.families, capability) or _fewer(declared.backward_families, capability)
    flag = feature == "deterministic" and capability.reads_torch_flag
    return "part" if fewer or flag else "yes"


def _fewer(families: Iterable[int] | None, capability: Capability) -> bool:
    return families is not None and not set(capability.families) <= {0, *families}
