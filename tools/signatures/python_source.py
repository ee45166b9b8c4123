"""Signatures of the functions in a piece of Python, from its syntax tree alone."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from typing import Any

COMPILED = (
    *("flash_attn_cuda", "flash_attn_gpu"),
    *("flashattn_hopper_cuda", "flash_attn_3_cuda", "flash_attn_3_gpu"),
    "fa3_fwd_cuda",
)
"""What the interfaces call their compiled module."""


def read(text: str, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What is to be known of each of the functions that the text has: ``name`` or ``Class.name``.

    signature: the parameters as source text. returns: how many values each return statement gives, without what a star
    stands for. op, mutates, annotated: of a function that is made a custom operator, its name, the arguments that it
    writes, and the number of values that its annotation says. calls: the compiled functions that it calls, with the
    number of positional arguments.
    """
    module = ast.parse(text)
    functions: dict[str, ast.FunctionDef] = {}
    for node in module.body:
        for name, function in _named(node):
            if name in names and not _is_overload(function):
                functions[name] = function
    return {name: _describe(function, module) for name, function in functions.items()}


def _named(node: ast.stmt) -> Iterator[tuple[str, ast.FunctionDef]]:
    if isinstance(node, ast.FunctionDef):
        yield node.name, node
    elif isinstance(node, ast.ClassDef):
        yield from ((f"{node.name}.{x.name}", x) for x in node.body if isinstance(x, ast.FunctionDef))


def _is_overload(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(d).endswith("overload") for d in function.decorator_list)


def _describe(function: ast.FunctionDef, module: ast.Module) -> dict[str, Any]:
    return {
        "signature": _parameters(function.args),
        "returns": sorted(_returns(function, module)),
        **_operator(function),
        **_calls(function),
    }


def _parameters(given: ast.arguments) -> str:
    """As source text, without annotations."""
    for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg):
        if argument is not None:
            argument.annotation = None
    return ast.unparse(given)


def _values(node: ast.expr, module: ast.Module) -> set[int]:
    """How many values an expression may give; one, where it cannot be told."""
    if isinstance(node, ast.IfExp):
        return _values(node.body, module) | _values(node.orelse, module)
    if isinstance(node, (ast.Tuple, ast.List)):
        return {sum(not isinstance(x, ast.Starred) for x in node.elts)}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "apply":
        for candidate in module.body:
            if isinstance(candidate, ast.ClassDef) and candidate.name == ast.unparse(node.func.value):
                forward = next(f for name, f in _named(candidate) if name.endswith(".forward"))
                return _returns(forward, module)
    return {1}


def _returns(function: ast.FunctionDef, module: ast.Module) -> set[int]:
    """How many values it returns, for each way to return; functions inside it are left out."""
    found: set[int] = set()
    stack: list[ast.AST] = list(function.body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Return) and node.value is not None:
            found |= _values(node.value, module)
        if not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            stack.extend(ast.iter_child_nodes(node))
    return found


def _operator(function: ast.FunctionDef) -> dict[str, Any]:
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and "custom_op" in ast.unparse(decorator.func):
            keywords = {k.arg: ast.literal_eval(k.value) for k in decorator.keywords if k.arg == "mutates_args"}
            annotation = function.returns
            several = isinstance(annotation, ast.Subscript) and "uple" in ast.unparse(annotation.value)
            values = annotation.slice if several and isinstance(annotation, ast.Subscript) else None
            return {
                "op": ast.literal_eval(decorator.args[0]),
                "mutates": sorted(keywords["mutates_args"]),
                "annotated": len(values.elts) if isinstance(values, ast.Tuple) else 1,
            }
    return {}


def _calls(function: ast.FunctionDef) -> dict[str, Any]:
    found: dict[str, int] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            module = ast.unparse(node.func.value)
            if module in COMPILED:
                found[node.func.attr] = len(node.args)
    return {"calls": found} if found else {}
