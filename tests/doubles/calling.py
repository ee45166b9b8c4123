"""How a package's functions are called: recorded signatures, made callable.

Arguments travel by the names that the Python functions give them, whatever the compiled ones call them.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from doubles.signatures import Recorded

Arguments = dict[str, Any]
#: How compiled functions call what raw Python functions call otherwise, over all versions.
PLAIN_NAMES = {
    "p_dropout": "dropout_p", "is_causal": "causal", "q_v": "qv", "is_rotary_interleaved": "rotary_interleaved",
    "sequed_q": "seqused_q", "sequed_k": "seqused_k",
}  # fmt: skip


@cache
def _literal(text: str) -> Any:
    """A default's value. Kept: Python 3.11 may fail to parse in several threads at once."""
    return ast.literal_eval(text)


def plain_name(name: str) -> str:
    """One name for an argument: "alibi_slopes_" and "alibi_slopes" are the same."""
    name = name.removesuffix("_")
    return PLAIN_NAMES.get(name, name)


def bind(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
    """Arguments by their plain names, defaults among them. Raises TypeError as the function would."""
    given = signature.bind(*args, **kwargs).arguments
    defaults = {n: p.default for n, p in signature.parameters.items() if p.default is not inspect.Parameter.empty}
    found = {n: _literal(text) for n, text in defaults.items()} | given
    return {plain_name(n): x for n, x in found.items()}


def evaluated(signature: inspect.Signature) -> inspect.Signature:
    """The signature with its defaults as values, as ``inspect`` gives it."""
    made = []
    for parameter in signature.parameters.values():
        default = parameter.default
        made.append(parameter if default is parameter.empty else parameter.replace(default=_literal(default)))
    return signature.replace(parameters=made)


def _types(schema: str) -> dict[str, str]:
    """Argument types in a compiled function's schema, by plain name."""
    inside = schema.partition("(")[2].partition(" -> ")[0].removesuffix(")")
    declared = [a.partition("=")[0].split() for a in re.sub(r"\([a-z_]*!\)", "", inside).split(", ")]
    return {plain_name(name): kind for kind, name in declared}


def custom_op(
    package: Recorded, function: str, compiled: str, version: str, body: Callable[..., Any]
) -> Any:  # fmt: skip
    """A raw Python function as the torch custom op that it is: its schema has the types of the compiled function."""
    entry = package.entry(function, version)
    types = _types(package.entry(compiled, version)["schema"])
    arguments = []
    for name, parameter in package.signature(function, version).parameters.items():
        kind = types[plain_name(name)].replace("int", "SymInt")
        if name in entry["mutates"]:
            kind = f"Tensor({name[1]}!)?"
        default = "" if parameter.default is parameter.empty else f"={parameter.default}"
        arguments.append(f"{kind} {name}{default}")
    count = entry["annotated"]
    returned = "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"
    text = f"({', '.join(arguments)}) -> {returned}"
    return torch.library.custom_op(entry["op"], body, mutates_args=tuple(entry["mutates"]), schema=text)


def python_function(package: Recorded, function: str, version: str, body: Callable[[Arguments], Any]) -> Any:
    """A function with a recorded signature, which ``inspect`` shows."""
    signature = package.signature(function, version)

    def called(*args: Any, **kwargs: Any) -> Any:
        return body(bind(signature, args, kwargs))

    called.__name__ = function
    called.__signature__ = evaluated(signature)  # type: ignore[attr-defined]
    return called
