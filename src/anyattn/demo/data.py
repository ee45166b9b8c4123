"""Documents that every machine has: docstrings and sources of Python's standard library, as bytes."""

from __future__ import annotations

import ast
import random
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from anyattn._errors import InvalidArgument

#: A token per byte, then one where a document begins and one where it ends.
BEGIN, END = 256, 257
VOCABULARY = 258

#: Folders of the standard library that are tests, or that not every installation has.
_LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "turtledemo", "__pycache__", "lib2to3"}
_PER_FILE = 12


def encode(text: str, longest: int) -> Tensor:
    """int64 (length,): a document's bytes between BEGIN and END, cut to ``longest`` tokens."""
    content = list(text.encode()[: longest - 2])
    return torch.tensor([BEGIN, *content, END], dtype=torch.int64)


def batches(count: int, tokens: int, shortest: int, longest: int, seed: int) -> list[list[Tensor]]:
    """Batches of documents; the same for the same arguments and version of Python.

    Args:
        count: how many batches.
        tokens: at least as many tokens in each: documents are added until they are reached.
        shortest: documents with fewer tokens are left out.
        longest: longer ones are cut.
        seed: chooses the documents.

    Raises:
        InvalidArgument: the standard library has not that many tokens, or sizes that make no sense.
    """
    if not 3 <= shortest <= longest or tokens < 1:
        raise InvalidArgument(f"need 3 <= shortest <= longest and tokens >= 1, got {shortest}, {longest}, {tokens}")
    documents = (encode(text, longest) for text in _texts(random.Random(seed)))
    long_enough = (document for document in documents if len(document) >= shortest)
    return [_batch(long_enough, tokens) for _ in range(count)]


def _batch(documents: Iterator[Tensor], tokens: int) -> list[Tensor]:
    batch: list[Tensor] = []
    while sum(map(len, batch)) < tokens:
        document = next(documents, None)
        if document is None:
            raise InvalidArgument("the standard library has no more documents: ask for fewer steps or tokens")
        batch.append(document)
    return batch


def _texts(choice: random.Random) -> Iterator[str]:
    """Docstrings, functions and classes of the library's modules, a few per module, in random order."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [path.relative_to(folder) for path in folder.rglob("*.py")]
    names = sorted(path.as_posix() for path in files if not _LEFT_OUT.intersection(path.parts))
    choice.shuffle(names)
    waiting: list[str] = []
    for name in names:
        texts = list(_of_module(folder / name))
        waiting += choice.sample(texts, min(_PER_FILE, len(texts)))
        if len(waiting) >= 20 * _PER_FILE:  # mix what comes from different modules
            choice.shuffle(waiting)
            yield from waiting[: len(waiting) // 2]
            del waiting[: len(waiting) // 2]
    choice.shuffle(waiting)
    yield from waiting


def _of_module(path: Path) -> Iterator[str]:
    """The docstrings of a module, and the sources of its functions, methods and classes."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like are no matter here
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):
        return
    lines = source.splitlines(keepends=True)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield "".join(lines[node.lineno - 1 : node.end_lineno])
