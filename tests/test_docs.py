"""The examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import anyattn

SOURCE = Path(anyattn.__file__).parent
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
