"""Signatures of the functions that a C++ extension offers to Python: pybind11's, and torch operators' schemas."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_TYPES = {
    "at::Tensor": "Tensor", "torch::Tensor": "Tensor", "Tensor": "Tensor", "float": "float", "double": "float",
    "int": "int", "int64_t": "int", "int32_t": "int", "bool": "bool", "std::string": "str",
    "at::Generator": "Generator", "at::ScalarType": "ScalarType",
}  # fmt: skip
_NAMES = r"(?:varlen_)?(?:fwd|bwd)"
_SCHEMA = re.compile(rb"(?:fwd|bwd)\((?:[ -~]+?)\) -> [ -~]+")


def read(text: str, module: str) -> dict[str, dict[str, Any]]:
    """Its entry points for forward and backward: ``module.name`` of pybind11, ``namespace::name`` of an operator.

    schema: names and types as in torch's schemas. A pybind11 function takes positional arguments only, has no
    defaults, and returns as many values as its return statements give ("returns").
    """
    text = _without_comments(text)
    found: dict[str, dict[str, Any]] = {}
    for name, function in re.findall(rf'm\.def\("({_NAMES})",\s*&(?:\w+::)*(\w+)', text):
        found[f"{module}.{name}"] = _function(text, name, function)
    namespace = re.search(r"TORCH_LIBRARY\((\w+),", text)
    for literals in re.findall(rf'm\.def\((\s*"{_NAMES}\((?:[^"]*"\s*")*[^"]*")\)', text):
        schema = "".join(re.findall(r'"([^"]*)"', literals))
        if namespace and "->" in schema:
            found[f"{namespace[1]}::{schema.partition('(')[0]}"] = {"schema": _tidy(schema)}
    return found


def read_binary(content: bytes, namespace: str) -> dict[str, dict[str, Any]]:
    """The schemas of fwd and bwd among the strings of a compiled extension."""
    schemas = [_tidy(x.decode()) for x in _SCHEMA.findall(content)]
    return {f"{namespace}::{schema.partition('(')[0]}": {"schema": schema} for schema in sorted(set(schemas))}


def _tidy(schema: str) -> str:
    """With one spelling of blanks."""
    return re.sub(r" = ", "=", re.sub(r",\s*", ", ", schema))


def _without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def _function(text: str, name: str, function: str) -> dict[str, Any]:
    """The definition of a function, as a schema."""
    for start in re.finditer(rf"\b{function}\s*\(", text):
        end = _closing(text, start.end() - 1)
        rest = re.match(r"\s*\{", text[end + 1 :])
        if rest:
            body = end + rest.end()
            arguments = [_argument(x) for x in split(text[start.end() : end])]
            returns = sorted(set(_returned(text[body : _closing(text, body)])))
            return {"schema": f"{name}({', '.join(arguments)})", "returns": returns}
    raise ValueError(f"{function} is not defined in this source")


def _closing(text: str, opening: int) -> int:
    """Where the bracket that opens at a place closes."""
    pairs = {"(": ")", "{": "}", "[": "]", "<": ">"}
    depth, mine, other = 0, text[opening], pairs[text[opening]]
    for i in range(opening, len(text)):
        depth += (text[i] == mine) - (text[i] == other)
        if not depth:
            return i
    raise ValueError(f"{mine} at {opening} does not close")


def split(text: str) -> list[str]:
    """At commas outside every bracket."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "([{<") - (c in ")]}>")
        if c == "," and not depth:
            parts.append("")
        else:
            parts[-1] += c
    return [p.strip() for p in parts if p.strip()]


def _argument(text: str) -> str:
    """``const std::optional<at::Tensor> &x_ = y`` as ``Tensor? x``."""
    declared, _, _ = text.partition("=")
    kind, name = re.split(r"[\s&]+(?=\w+\s*$)", declared.replace("const ", "").strip())
    optional = re.fullmatch(r"(?:std|c10)::optional<(.*)>", kind.strip())
    return f"{_TYPES[optional[1].strip() if optional else kind.strip()]}{'?' if optional else ''} {name}"


def _returned(body: str) -> Iterator[int]:
    for found in re.finditer(r"\breturn\s*(?:\{|std::make_tuple\s*\()", body):
        opening = found.end() - 1
        yield len(split(body[opening + 1 : _closing(body, opening)]))
