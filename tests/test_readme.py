"""The documentation is true: its code runs, its generated parts are current, what it links to and cites exists."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
#: Pages whose code is run from top to bottom, each in a namespace of its own.
RUN = (
    "README.md",
    "docs/choosing.md",
    "docs/padding.md",
    "docs/torchtitan.md",
    "docs/transformers-context-parallel.md",
    "docs/transformers.md",
)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """docs/generate.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs")
        spec.loader.exec_module(module)
    return module


def blocks(text: str) -> list[str]:
    """The python blocks of a page, but those that say they need a GPU."""
    found = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [block for block in found if not block.startswith("# on a GPU")]


@pytest.mark.parametrize("page", RUN)
def test_code_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = blocks((ROOT / page).read_text("utf-8"))
    assert code
    namespace: dict[str, object] = {"__name__": "page"}
    for block in code:
        exec(compile(block, page, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_generated_parts_are_current(page: Path, generate: ModuleType) -> None:
    text = page.read_text("utf-8")
    assert text == generate.regenerate(text), "run: make docs"


def test_every_generated_part_is_shown(generate: ModuleType) -> None:
    """A marker that was mistyped would leave its part stale for ever."""
    text = "".join(page.read_text("utf-8") for page in PAGES)
    assert [name for name in generate.PARTS if f"<!-- {name} -->" not in text] == []


def _row(name: str, ours: float, theirs: float, unit: str, against: str = "the raw kernel") -> dict[str, object]:
    return {"name": name, "ours": ours, "theirs": theirs, "unit": unit, "against": against}


#: Rows as benchmarks/gpu.py names them, with figures that nobody measured.
SHAPE = "16 x 1k, heads 16/16, dim 128, causal"
ROWS = [
    _row(f"forward, packed, {SHAPE}, fa2", 300.0, 400.0, "TFLOP/s"),
    _row(f"backward, packed, {SHAPE}, fa2", 200.0, 200.0, "TFLOP/s"),
    _row(f"forward, {SHAPE}, 10% gaps, fa2", 0.9, 1.0, "1/ms", "the raw kernel, compact"),
    _row("host time, tiny packed call, fa2", 60.0, 50.0, "us", "its raw entry point"),
    _row("peak memory, forward and backward, 4 x 4k, fa2", 389.0, 389.0, "MiB", "the raw calls"),
    _row("waits for the device, tiny packed call, forward, fa2", 0, 0, "waits"),
    _row("waits for the device, tiny padded call, forward, fa2", 1, 0, "waits"),
]
LEFT_OUT = [{"what": "backward, fa2", "because": "refused", "why": "it has none"}]


def test_figures_come_from_the_newest_file(
    generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = {"gpu": "Some GPU", "torch": "2.11.0", "backends": {"fa2": "2.8.3"}, "cudnn": 91900}
    for day, rows in (("2026-01-01", [{**ROWS[0], "ours": 1.0}]), ("2026-01-02", ROWS), ("2026-01-03", [])):
        content = {"date": day, "machine": machine, "rows": rows, "left_out": LEFT_OUT}
        (tmp_path / f"{day}-some-gpu-fa2.json").write_text(json.dumps(content))
    figures = generate.figures
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    figures._results.cache_clear()
    try:
        text, table, summary = figures.measured("fa2"), figures.speed(), figures.speed_summary()
        assert figures.measured("fa4") == "No figures are on file."
    finally:
        figures._results.cache_clear()
    assert text.startswith("Some GPU, torch 2.11.0, flash-attn 2.8.3, cuDNN 9.19, 2026-01-02 ([file](")
    for expected in (
        f"| packed, {SHAPE} | 300 (0.75) | 200 (1.00) |",
        f"| {SHAPE} | 0.90 |",
        "| tiny packed call | 60 | 50 | its raw entry point |",
        "389 MiB, 1.00 of the raw calls'",
        "Calls that wait for the device: tiny padded call, forward.",
        "Not measured: backward (refused): it has none.",
    ):
        assert expected in text
    assert re.search(r"\| `fa2` +\| 0.75 +\| 1.00 +\| 0.90 +\| 1.00 +\| 60, raw 50 +\|", table)
    assert "On one Some GPU, torch 2.11.0, kernels: 1." in summary
    assert "- forward: 0.75\n" in summary


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    assert broken == []


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as they are made from their words."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def cited() -> list[tuple[str, str]]:
    """(file, test) for each test that docs/invariants.md names; "::test" is of the file named before."""
    text = (ROOT / "docs" / "invariants.md").read_text("utf-8")
    found, file = [], ""
    for named, test in re.findall(r"`(tests/[\w/]+\.py)?::(\w+)`", text):
        file = named or file
        found.append((file, test))
    return found


def test_cited_tests_exist() -> None:
    assert cited()
    missing = []
    for file, test in cited():
        path = ROOT / file
        tree = ast.parse(path.read_text("utf-8")) if path.exists() else ast.Module([], [])
        if test not in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}:
            missing.append(f"{file}::{test}")
    assert missing == []


def test_every_promise_cites_a_test() -> None:
    """The nine promises are the numbered headings of docs/invariants.md."""
    sections = re.split(r"^## ", (ROOT / "docs" / "invariants.md").read_text("utf-8"), flags=re.MULTILINE)
    promises = [section for section in sections if re.match(r"\d+\. ", section)]
    assert [int(p.partition(".")[0]) for p in promises] == list(range(1, 10))
    assert [p.splitlines()[0] for p in promises if not re.search(r"`tests/[\w/]+\.py::\w+`", p)] == []
