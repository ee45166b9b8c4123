"""The recorded signatures of kernel packages (tests/signatures/*.json, written by tools/record_signatures.py).

Each file holds one package: ``fa2`` (flash-attn), ``fa3`` (flash-attn-3, whose versions are the days on which commits
landed, and the commits), ``fa3_fwd`` (fa3-fwd), ``fa4`` (flash-attn-4), ``torch``, ``cudnn`` (nvidia-cudnn-frontend)::

    {"source": what was read,
     "versions": {version: what else is noted of it, ...},                         oldest first
     "functions": {name: [{"versions": [...], ...}, ...], ...}}                    one entry per distinct signature

A Python function's entry has
    signature   its parameters as source text, e.g. "q, k, v, softmax_scale=None, *, scale=None"
    returns     the numbers of values that its return statements give, without what a star stands for; 1 where that
                cannot be told
    op, mutates, annotated      of one that is made a custom operator: its name, the arguments that it writes, and how
                many values its annotation says it returns
    calls       the functions of the compiled module that it calls, each with its number of positional arguments

A compiled function is named "module.name" (pybind11) or "namespace::name" (a torch operator; "(stable ABI)" after it
where the other build of FlashAttention 3 is meant). Its entry has
    schema      as torch writes it; a pybind11 function takes positional arguments only, and has no defaults
    returns     only for pybind11: the numbers of values

>>> recorded("fa2").signature("_flash_attn_varlen_forward", "2.5.8").bind(*arguments)
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "signatures"
KINDS = inspect.Parameter


class Recorded:
    """What is recorded of one package."""

    def __init__(self, name: str) -> None:
        self._content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
        self.functions: dict[str, list[dict[str, Any]]] = self._content["functions"]

    def versions(self, function: str | None = None) -> list[str]:
        """Every version, or every one that has a function; oldest first."""
        return [v for v in self._content["versions"] if function is None or self.has(function, v)]

    def noted(self, version: str) -> dict[str, Any]:
        """What else is noted of a version: build flags, requirements, the commit."""
        noted: dict[str, Any] = self._content["versions"][version]
        return noted

    def has(self, function: str, version: str) -> bool:
        """Whether a version has a function."""
        return any(version in e["versions"] for e in self.functions.get(function, ()))

    def entry(self, function: str, version: str) -> dict[str, Any]:
        """What is recorded of one function of one version."""
        return next(e for e in self.functions[function] if version in e["versions"])

    def signature(self, function: str, version: str) -> inspect.Signature:
        """A function's signature in one version; defaults are source text."""
        entry = self.entry(function, version)
        return _python(entry["signature"]) if "signature" in entry else _compiled(entry["schema"])

    def returns(self, function: str, version: str) -> list[int]:
        """How many values it may return."""
        entry = self.entry(function, version)
        return entry["returns"] if "returns" in entry else [_values(entry["schema"])]


@cache
def recorded(name: str) -> Recorded:
    """A package by the name of its file."""
    return Recorded(name)


@cache
def _python(text: str) -> inspect.Signature:
    """From parameters as Python writes them."""
    function = ast.parse(f"def f({text}): ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    given = function.args
    named = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(named) - len(given.defaults)) + list(given.defaults)
    kinds = [KINDS.POSITIONAL_ONLY] * len(given.posonlyargs) + [KINDS.POSITIONAL_OR_KEYWORD] * len(given.args)
    made = [_parameter(*each) for each in zip(named, defaults, kinds, strict=True)]
    if given.vararg:
        made.append(_parameter(given.vararg, None, KINDS.VAR_POSITIONAL))
    for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        made.append(_parameter(argument, default, KINDS.KEYWORD_ONLY))
    if given.kwarg:
        made.append(_parameter(given.kwarg, None, KINDS.VAR_KEYWORD))
    return inspect.Signature(made)


def _parameter(argument: ast.arg, default: ast.expr | None, kind: Any) -> inspect.Parameter:
    text = KINDS.empty if default is None else ast.unparse(default)
    return inspect.Parameter(argument.arg, kind, default=text)


@cache
def _compiled(schema: str) -> inspect.Signature:
    """From a schema; one that says nothing of what it returns is pybind11's, whose arguments are positional only."""
    text, _, returned = schema.partition(" -> ")
    kind = KINDS.POSITIONAL_OR_KEYWORD if returned else KINDS.POSITIONAL_ONLY
    made = []
    for argument in re.sub(r"\([a-z_]*!\)", "", text).partition("(")[2].removesuffix(")").split(", "):
        if argument == "*":
            kind = KINDS.KEYWORD_ONLY
        else:
            declared, _, default = argument.partition("=")
            made.append(inspect.Parameter(declared.split()[-1], kind, default=default or KINDS.empty))
    return inspect.Signature(made)


def _values(schema: str) -> int:
    returned = schema.partition(" -> ")[2]
    return len(returned.split(", ")) if returned.startswith("(") else 1
