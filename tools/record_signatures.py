"""Record the signatures of a kernel package's raw functions from its published wheels, importing none of them.

    python tools/record_signatures.py FOLDER_OF_WHEELS

Reads every ``flash_attn_4-*.whl`` in the folder and writes tests/signatures/fa4.json: per function, each distinct
signature with the versions that have it. A parameter is its name and its default as source text (null: required);
``returns`` are the numbers of values that its return statements give, where they can be read off.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.version import Version

FUNCTIONS = {
    "flash_attn/cute/interface.py": ("_flash_attn_fwd", "_flash_attn_bwd", "maybe_contiguous"),
    "flash_attn/cute/cute_dsl_utils.py": ("maybe_contiguous",),  # where newer versions define it
}
TARGET = Path(__file__).parent.parent / "tests" / "signatures" / "fa4.json"


def parameters(function: ast.FunctionDef) -> list[list[str | None]]:
    """[name, default or null] of each parameter; keyword-only names have a star before them."""
    given = function.args
    named = given.posonlyargs + given.args
    defaults = [None] * (len(named) - len(given.defaults)) + [ast.unparse(d) for d in given.defaults]
    found: list[list[str | None]] = [[a.arg, d] for a, d in zip(named, defaults, strict=True)]
    for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        found.append(["*" + argument.arg, None if default is None else ast.unparse(default)])
    return found


def _values(node: ast.expr) -> Iterator[int]:
    if isinstance(node, ast.IfExp):
        yield from _values(node.body)
        yield from _values(node.orelse)
    elif isinstance(node, ast.Tuple):
        yield len(node.elts)
    else:
        yield 1


def returns(function: ast.FunctionDef) -> list[int]:
    """How many values it returns, for each way to return; functions inside it are left out."""
    found: set[int] = set()
    stack: list[ast.AST] = list(function.body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Return) and node.value is not None:
            found.update(_values(node.value))
        if not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            stack.extend(ast.iter_child_nodes(node))
    return sorted(found)


def read_wheel(wheel: Path) -> dict[str, Any]:
    """The signatures in one wheel, by function."""
    found: dict[str, Any] = {}
    with zipfile.ZipFile(wheel) as archive:
        for path, names in FUNCTIONS.items():
            for node in ast.parse(archive.read(path)).body:
                if isinstance(node, ast.FunctionDef) and node.name in names:
                    found[node.name] = {"parameters": parameters(node), "returns": returns(node)}
    return found


def record(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every distinct signature in a folder of wheels, by function, oldest first."""
    wheels = {Version(w.name.split("-")[1]): w for w in folder.glob("flash_attn_4-*.whl")}
    if not wheels:
        raise SystemExit(f"no flash_attn_4-*.whl in {folder}")
    recorded: dict[str, list[dict[str, Any]]] = {}
    for version in sorted(wheels):
        for name, signature in read_wheel(wheels[version]).items():
            entries = recorded.setdefault(name, [])
            same = [e for e in entries if {k: e[k] for k in signature} == signature]
            if same:
                same[0]["versions"].append(str(version))
            else:
                entries.append({"versions": [str(version)], **signature})
    return dict(sorted(recorded.items()))


def as_text(recorded: dict[str, list[dict[str, Any]]]) -> str:
    """JSON with one parameter list, and one list of versions, to a line: differences then read well."""
    lines = []
    for name, entries in recorded.items():
        inner = [
            "    {\n" + ",\n".join(f"      {json.dumps(k)}: {json.dumps(v)}" for k, v in entry.items()) + "\n    }"
            for entry in entries
        ]
        lines.append(f"  {json.dumps(name)}: [\n" + ",\n".join(inner) + "\n  ]")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(as_text(record(Path(sys.argv[1]))))
    print(TARGET)
