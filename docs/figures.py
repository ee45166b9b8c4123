"""The measured parts of the documentation, from the newest files of ``benchmarks/results`` and nothing else.

The benchmarks name their rows "<what>, <kernel>" (``benchmarks/gpu.py``); each kernel is shown from the newest file
that has rows of it.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from anyattn.backends import ORDER
from tables import aligned, kernels, markdown, package

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def labels(name: str) -> list[str]:
    """What rows of a backend may end with: its kernels, or its own name."""
    return list(dict.fromkeys([*(kernel for kernel, _ in kernels(name)), name]))


class Figures:
    """The newest rows of one kernel, and where they come from."""

    def __init__(self, kernel: str, path: Path, content: dict[str, Any]) -> None:
        self.kernel, self.path, self.machine, self.date = kernel, path, content["machine"], content["date"]
        self.rows = [row for row in content["rows"] if is_of(row, kernel)]
        self.left_out = [x for x in content.get("left_out", ()) if x["what"].endswith(f", {kernel}")]

    def pick(self, pattern: str, **equal: str) -> list[tuple[re.Match[str], dict[str, Any]]]:
        """Rows whose name, without the kernel's, matches, with these values."""
        found = []
        for row in self.rows:
            match = re.fullmatch(pattern, row["name"].removesuffix(f", {self.kernel}"))
            if match and all(row[key] == value for key, value in equal.items()):
                found.append((match, row))
        return found


def is_of(row: dict[str, Any], kernel: str) -> bool:
    """Whether a row of a benchmark speaks of a kernel."""
    return bool(row["name"].endswith(f", {kernel}"))


@cache
def _results(kind: str) -> tuple[tuple[Path, dict[str, Any]], ...]:
    """Every file of a kind of benchmark, newest first."""
    paths = sorted(RESULTS.glob(f"*-{kind}*.json"), key=lambda p: (p.name[:10], len(p.name)), reverse=True)
    return tuple((path, json.loads(path.read_text("utf-8"))) for path in paths)


def newest(kernel: str) -> Figures | None:
    """The newest figures of a kernel on a GPU."""
    for path, content in _results("gpu"):
        if any(is_of(row, kernel) for row in content["rows"]):
            return Figures(kernel, path, content)
    return None


def ratio(row: dict[str, Any]) -> str:
    """Ours over theirs, to two digits."""
    return f"{row['ours'] / row['theirs']:.2f}"


def measured(name: str) -> str:
    """Figures of each kernel, newest first, and how its tests ended on that machine."""
    found = [(kernel, got) for kernel in labels(name) if (got := newest(kernel)) is not None]
    if not found:
        return "No figures are on file."
    sections = []
    for kernel, got in found:
        lines = [f"**{kernel}**, {provenance(name, got)}."] if len(labels(name)) > 1 else [provenance(name, got) + "."]
        sections += lines + [table for make in (_throughput, _gaps, _host, _others) if (table := make(got))]
    return "\n\n".join(sections + list(_outcomes(name)))


def provenance(name: str, got: Figures) -> str:
    """Hardware, versions, date and file."""
    machine = got.machine
    version = machine["backends"].get(name, "")
    words = f"{machine['gpu']}, torch {machine['torch']}"
    if version and not machine["torch"].startswith(version):
        words += f", {package(name)} {version}"
    if "cudnn" in machine:
        words += f", cuDNN {machine['cudnn'] // 10000}.{machine['cudnn'] // 100 % 100}"
    return f"{words}, {got.date} ([file](../../benchmarks/results/{got.path.name}))"


def _throughput(got: Figures) -> str:
    cells: dict[str, dict[str, str]] = {}
    for match, row in got.pick(r"(forward|backward|forward and backward), (.*)", unit="TFLOP/s"):
        cells.setdefault(match[2], {})[match[1]] = f"{row['ours']:.0f} ({ratio(row)})"
    ways = [w for w in ("forward", "backward", "forward and backward") if any(w in c for c in cells.values())]
    rows = [("TFLOP/s, and over those of the raw kernel", *ways)]
    rows += [(what, *(c.get(way, "") for way in ways)) for what, c in cells.items()]
    return markdown(rows) if cells else ""


def _gaps(got: Figures) -> str:
    cells: dict[str, dict[str, str]] = {}
    for match, row in got.pick(r"(forward|backward), (.*), (\d+% gaps)", against="the raw kernel, compact"):
        cells.setdefault(match[2], {})[f"{match[1]}, {match[3]}"] = ratio(row)
    heads = list(dict.fromkeys(head for c in cells.values() for head in c))
    rows = [("speed with gaps, over the raw kernel's without", *heads)]
    rows += [(what, *(c.get(head, "") for head in heads)) for what, c in cells.items()]
    return markdown(rows) if cells else ""


def _host(got: Figures) -> str:
    rows = [("host time, microseconds", "here", "there", "compared with")]
    for match, row in got.pick(r"host time(?: with gradients)?, (.*)", unit="us"):
        rows.append((match[1], f"{row['ours']:.0f}", f"{row['theirs']:.0f}", row["against"]))
    return markdown(rows) if len(rows) > 1 else ""


def _others(got: Figures) -> str:
    lines = []
    for match, row in got.pick(r"(peak memory, .*)", unit="MiB"):
        lines.append(f"- {match[1]}: {row['ours']:.0f} MiB, {ratio(row)} of {row['against']}'.")
    waits = got.pick(r"waits for the device, (.*)", unit="waits")
    if waits:
        some = [match[1] for match, row in waits if row["ours"]]
        lines.append(f"- Calls that wait for the device: {'; '.join(some) or 'none'}.")
    for item in got.left_out:
        lines.append(
            f"- Not measured: {item['what'].removesuffix(f', {got.kernel}')} ({item['because']}): {item['why']}."
        )
    return "\n".join(lines)


def _outcomes(name: str) -> Iterator[str]:
    """How the tests of the newest run on a GPU ended, version by version."""
    for path, content in _results("tests"):
        counts = [
            f"`{kernel}` {machine(content, run)['backends'].get(name, '')} "
            + ", ".join(f"{n} {outcome}" for outcome, n in sorted(found.items()))
            for run in content.get("runs", {}).values()
            for kernel in labels(name)
            if (found := run["kernels"].get(kernel, {}).get("outcomes"))
        ]
        if counts:
            link = f"[file](../../benchmarks/results/{path.name})"
            yield f"Tests on that kind of GPU, {content['date']} ({link}): {'; '.join(counts)}."
            return
    yield "No tests of it on a GPU are on file: hostile doubles stand in for it."


def machine(content: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """Hardware and versions of one run."""
    found: dict[str, Any] = run.get("machine") or content["machine"]
    return found


MEASURES = ("forward", "backward", "with 10% of padding", "peak memory")


def ratios(got: Figures) -> dict[str, list[float]]:
    """Ours over the raw kernel's, over all shapes: speeds, and memory."""
    found = {
        "forward": got.pick(r"forward, .*", unit="TFLOP/s"),
        "backward": got.pick(r"(?:forward and )?backward, .*", unit="TFLOP/s"),
        "with 10% of padding": got.pick(r"(?:forward|backward), .*, 10% gaps", against="the raw kernel, compact"),
        "peak memory": got.pick(r"peak memory, .*"),
    }
    return {what: [r["ours"] / r["theirs"] for _, r in rows if r["theirs"]] for what, rows in found.items()}


def _all_newest() -> list[Figures]:
    return [got for name in ORDER for kernel in labels(name) if (got := newest(kernel)) is not None]


def speed() -> str:
    """Each kernel against itself called directly: the range over all shapes."""
    rows = [("kernel", *MEASURES, "host time of a tiny call, us")]
    sources: dict[Path, str] = {}
    for got in _all_newest():
        spans = [
            " to ".join(dict.fromkeys(f"{x:.2f}" for x in (min(v), max(v)))) if v else "" for v in ratios(got).values()
        ]
        host = got.pick(r"host time, tiny (?:packed |dense )?call", against="its raw entry point")
        rows.append(
            (f"`{got.kernel}`", *spans, "".join(f"{r['ours']:.0f}, raw {r['theirs']:.0f}" for _, r in host[:1]))
        )
        words = f"{got.machine['gpu']}, torch {got.machine['torch']}, {got.date}"
        sources[got.path] = f"[{words}](../../benchmarks/results/{got.path.name})"
    return f"{aligned(rows)}\n\n{'; '.join(sources.values())}."


def speed_summary() -> str:
    """The same over all kernels, the worst of them named."""
    lines = []
    for what in MEASURES:
        found = sorted((x, got.kernel) for got in _all_newest() for x in ratios(got)[what])
        if found:
            (low, slowest), (high, largest) = found[0], found[-1]
            worst = (slowest, "") if what != "peak memory" else ("", largest)
            ends = [f"{x:.2f}" + (f" (`{k}`)" if k else "") for x, k in zip((low, high), worst, strict=True)]
            lines.append(f"- {what}: {ends[0]} to {ends[1]}" if low != high else f"- {what}: {low:.2f}")
    machines = sorted(
        {f"{got.machine['gpu']}, torch {got.machine['torch'].partition('+')[0]}" for got in _all_newest()}
    )
    head = f"On one {'; '.join(machines)}, kernels: {len(_all_newest())}. Over all shapes:"
    return "\n".join([head, "", *lines, *_tiny_on_the_cpu()])


def _tiny_on_the_cpu() -> Iterator[str]:
    for path, content in _results("host"):
        for row in content["rows"]:
            if row["against"] == "F.scaled_dot_product_attention":
                link = f"[host](benchmarks/results/{path.name})"
                yield f"- a tiny call on the CPU: {ratio(row)} times as long as `{row['against']}` ({link})"
                return


# --- context parallelism -------------------------------------------------------------------------------------------

_CONTEXT = re.compile(r"forward and backward, (?P<case>.+?), (?P<scheme>p2p|all_gather|a2a|a2a\+p2p), (?P<kernel>\S+)$")
_PEER = re.compile(r"forward and backward, (?P<case>.+?), (?P<peer>ring-flash-attn .+|torch context_parallel .+)$")


def context() -> str:
    """Speed of every scheme against one GPU, and of others' context parallelism in the same runs, by number of GPUs."""
    files = [(path, content) for path, content in _results("context") if "rows" in content and not _is_replay(content)]
    ranks = sorted({content["machine"]["ranks"] for _, content in files}, reverse=True)
    return "\n\n".join(_on_ranks([x for x in files if x[1]["machine"]["ranks"] == n]) for n in ranks)


def _on_ranks(files: list[tuple[Path, dict[str, Any]]]) -> str:
    cells: dict[tuple[str, str], str] = {}
    links = []
    for path, content in files:
        links.append(_link(path))
        for row in content["rows"]:
            if found := _CONTEXT.match(row["name"]):
                way = f"`{found['scheme']}`, {found['kernel']}"
                if found["kernel"] == _words(path):  # a file of this kernel's own
                    cells[found["case"], way] = _speed(row)
                cells.setdefault((found["case"], way), _speed(row))
            elif found := _PEER.match(row["name"]):
                cells.setdefault((found["case"], found["peer"]), _speed(row))
    machine = files[0][1]["machine"]
    head = (
        f"Forward and backward on {machine['ranks']} {machine['gpu']}, torch {machine['torch'].partition('+')[0]}, "
        "heads 32/8, head_dim 128, bfloat16, causal: TFLOP/s per GPU, and in brackets the ratio to the same kernel on "
        "one GPU in the same run, at the same FLOPs as one sequence, or for the packed batch on all of it."
    )
    return "\n".join([*textwrap.wrap(head, 120), "", _by_case(cells), "", f"From {', '.join(dict.fromkeys(links))}."])


def replayed() -> str:
    """The same of the ranks of a larger group that two GPUs played, by turns."""
    files = [(path, content) for path, content in _results("context") if "rows" in content and _is_replay(content)]
    cells: dict[tuple[str, str], str] = {}
    links = []
    for path, content in files:
        rows = [(found, row) for row in content["rows"] if (found := _REPLAYED.match(row["name"]))]
        links += [_link(path)] if rows else []
        for found, row in rows:
            cells.setdefault((found["case"], f"`{found['scheme']}`, {found['kernel']}"), _speed(row))
    return "\n".join([_by_case(cells), "", f"From {', '.join(links)}."])


_REPLAYED = re.compile(_CONTEXT.pattern.replace(", (?P<kernel>", r", \d+ ranks replayed, (?P<kernel>"))


def _words(path: Path) -> str:
    """What tells a file from others of its day and kind."""
    return path.stem.partition("-context")[2].replace("-replay", "").strip("-") or "fa3"


def _link(path: Path) -> str:
    return f"[{_words(path)}](../benchmarks/results/{path.name})"


def _is_replay(content: dict[str, Any]) -> bool:
    return "replayed" in content["machine"]


def _speed(row: dict[str, Any]) -> str:
    return f"{row['ours']:.0f} ({row['ratio']:.3f})"


def _by_case(cells: dict[tuple[str, str], str]) -> str:
    """A table of cells by (case, way)."""
    cases = [case for case in ("32k", "128k", "packed 64k", "window 4k, 128k") if case in {c for c, _ in cells}]
    ways = sorted({way for _, way in cells}, key=_order_of)
    return markdown([("", *cases), *((way, *(cells.get((c, way), "") for c in cases)) for way in ways)])


SCHEMES = ("p2p", "all_gather", "a2a", "a2a+p2p")


def _order_of(way: str) -> tuple[bool, str, int, str]:
    """Ours first, by kernel and scheme."""
    scheme, _, kernel = way.partition(", ")
    ours = scheme.strip("`") in SCHEMES
    return not ours, kernel if ours else "", SCHEMES.index(scheme.strip("`")) if ours else 0, way


# --- transformers --------------------------------------------------------------------------------------------------

_MODEL = re.compile(r"(?P<what>step|host time of attention per layer|decode step), .*, (?P<name>anyattn:\S+)$")
_PEERS = {
    "sdpa with the block-diagonal mask": "sdpa, masked",
    "sdpa without a mask (leaks between documents)": "sdpa, leaking",
    "flash_attention_3": "flash_attention_3",
    "flash_attention_4": "flash_attention_4",
    "sdpa": "sdpa",
}


def transformers_speed() -> str:
    """A model's step, the host's time and a decoding step, against what transformers has itself."""
    path, content = next((p, c) for p, c in _results("transformers") if "gpu" in c.get("machine", {}))
    found: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for row in content["rows"]:
        if told := _MODEL.match(row["name"]):
            found.setdefault(told["name"], {})[told["what"], row["against"]] = row
    shown = (("step", "ms"), ("host time of attention per layer", "us"), ("decode step", "ms"))
    columns = [(what, unit, against) for what, unit in shown for against in _PEERS
               if any((what, against) in rows for rows in found.values())]  # fmt: skip
    head = [""]
    for what, unit in shown:
        head += [f"{what}, {unit}", *(f"of {_PEERS[a]}" for w, _, a in columns if w == what)]
    lines = [tuple(head)]
    for name, rows in found.items():
        cells = [f'`"{name}"`']
        for what, _ in shown:
            own = next((f"{row['ours']:.4g}" for (w, _), row in rows.items() if w == what), "")
            of = [rows.get((what, a)) for w, _, a in columns if w == what]
            cells += [own, *("" if row is None else ratio(row) for row in of)]
        lines.append(tuple(cells))
    machine = content["machine"]
    words = (
        f"A Llama of a billion parameters (random weights, bfloat16) on one {machine['gpu']}, torch "
        f"{machine['torch'].partition('+')[0]}: forward and backward of 16k tokens of packed documents, the host's "
        "time in each layer's attention, and a decoding step of 8 prompts padded on the left; beside each its part of "
        "what transformers' own implementations take in the same run."
    )
    link = f"From [file](../benchmarks/results/{path.name})."
    return "\n".join([*textwrap.wrap(words, 120), "", markdown(lines), "", link])
