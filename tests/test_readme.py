"""The documentation is true: its code runs, its generated parts are current, what it links to and cites exists."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
#: Pages whose code is run from top to bottom, each in a namespace of its own.
RUN = ("README.md", "docs/choosing.md", "docs/padding.md", "docs/transformers.md")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """docs/generate.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
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
    """(file, test) for each test that docs/invariants.md names."""
    text = (ROOT / "docs" / "invariants.md").read_text("utf-8")
    return re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)


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
