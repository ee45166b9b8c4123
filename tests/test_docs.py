"""The examples in docstrings run, and what docs/adding-a-backend.md tells to do works."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import anyattn
import fresh

SOURCE = Path(anyattn.__file__).parent
ROOT = Path(__file__).resolve().parent.parent
#: Modules that need nothing but torch.
PLAIN = sorted(
    ".".join(["anyattn", *f.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")
    for f in SOURCE.rglob("*.py")
    if ">>>" in f.read_text() and f.relative_to(SOURCE).parts[0] not in ("cli", "integrations")
)


@pytest.mark.parametrize("name", PLAIN)
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    names = {"torch": torch, "anyattn": anyattn, "Packing": anyattn.Packing}
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in finder.find(module, extraglobs=names):
        result = runner.run(test)
        assert result.failed == 0, f"{test.name}: see the output above"
    assert runner.tries


@pytest.mark.parametrize("name", [n for n in anyattn.__all__ if callable(getattr(anyattn, n)) and n[0].islower()])
def test_every_public_function_has_an_example(name: str) -> None:
    assert ">>>" in (getattr(anyattn, name).__doc__ or ""), f"{name} shows no example"


# --- docs/adding-a-backend.md --------------------------------------------------------------------------------------

#: The generated tests of the toy, without collecting those of every other kernel.
TESTS_OF_THE_TOY = """
import cases, test_conformance
target = next(t for t in cases.targets("cpu") if t.name == "toy")
found = cases.pairwise(target)
for case in found:
    test_conformance.test_same_answer(case)
test_conformance.test_every_declared_feature_is_tested(target)
print(len(found))
"""


class Clone:
    """A copy of the sources, in which a page is followed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("src", "tests", "docs", "benchmarks"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "pyproject.toml"):
            shutil.copy(ROOT / file, folder)

    def run(self, *command: str) -> str:
        """What a command prints; it must succeed."""
        return self._printed(subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=300))

    def python(self, code: str) -> str:
        """What a piece of Python prints."""
        return self._printed(fresh.run(code, self._path))

    def script(self, name: str, *options: str) -> str:
        """What a file of Python prints."""
        return self._printed(fresh.script(self.folder / name, *options, path=self._path))

    @property
    def _path(self) -> list[Path]:
        return [self.folder / name for name in ("src", "tests")]

    @staticmethod
    def _printed(done: subprocess.CompletedProcess[str]) -> str:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout


def test_the_page_about_adding_a_backend_works(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "adding-a-backend.md").read_text("utf-8")
    clone = Clone(tmp_path)

    code, example = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    file = re.findall(r"^`(src/\S+)`:$", page, re.MULTILINE)[0]
    (clone.folder / file).write_text(code, "utf-8")
    order, shown = re.findall(r"^\$ (sed .*|\.venv/bin/python -c .*\n.*)$", page, re.MULTILINE)
    clone.run(*shlex.split(order))
    command, printed = shown.split("\n")
    _, option, piece = shlex.split(command)
    assert option == "-c"
    got = clone.python(piece)
    assert got.split()[0] == printed.split()[0] == "toy"
    assert got.split()[2:] == printed.split()[2:]  # between them is torch's version

    ran, refused = clone.python(example).split("\nNo backend takes ")
    assert ran.startswith("toy ")
    assert "head_dim 20 is padded with zeros to 24" in ran
    assert "toy  rejected  softcap: this kernel does not have it" in refused

    assert int(clone.python(TESTS_OF_THE_TOY)) > 10

    clone.script("docs/generate.py")
    clone.script("docs/generate.py", "--check")
    written = (clone.folder / "docs" / "backends" / "toy.md").read_text("utf-8")
    assert "| heads | at most 64 | all |" in written
    assert "toy" in (clone.folder / "docs" / "support.md").read_text("utf-8")
