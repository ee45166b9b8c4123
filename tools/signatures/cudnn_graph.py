"""Signatures of nvidia-cudnn-frontend's graphs, which are C++ up to 1.26 and Python around C++ since.

What C++ offers exists only at run time, in docstrings: the compiled module is loaded in a process of its own, which
needs neither cuDNN nor a GPU, but the Python that the wheel was made for.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from typing import Any

from signatures import python_source
from signatures.cpp_source import split

GRAPH = (
    "__init__", "tensor", "validate", "build_operation_graph", "create_execution_plans", "deselect_engines",
    "check_support", "build_plans", "get_workspace_size", "execute", "sdpa", "sdpa_backward",
)  # fmt: skip
TENSOR = ("set_uid", "set_output", "set_dim", "set_stride", "set_data_type", "set_ragged_offset")
MODULE = ("create_handle", "set_stream")
#: What cudnn/__init__.py adds to the C++ classes, under which name.
ADDED = {
    "_tensor": "pygraph.tensor", "_execute": "pygraph.execute", "_set_data_type": "tensor.set_data_type",
    "create_handle": "create_handle", "set_stream": "set_stream",
}  # fmt: skip
NODES = ("sdpa", "sdpa_backward")
_READER = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("_compiled_module", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
places = {"pygraph": getattr(module, "pygraph", None) or module.backend_graph, "tensor": module.tensor, "": module}
found = {}
for name in sys.argv[2:]:
    place, _, function = name.rpartition(".")
    found[name] = getattr(getattr(places[place], function, None), "__doc__", None)
print(json.dumps({name: doc for name, doc in found.items() if doc}))
"""


def read(archive: zipfile.ZipFile) -> dict[str, dict[str, Any]]:
    """What a wheel offers: ``pygraph.<method>``, ``tensor.<method>`` and the functions of the module."""
    names = [*(f"pygraph.{x}" for x in GRAPH), *(f"tensor.{x}" for x in TENSOR), *MODULE]
    found = {name: _from_docstring(doc) for name, doc in _docstrings(archive, names).items()}
    init = archive.read("cudnn/__init__.py").decode()
    found |= {ADDED[name]: entry for name, entry in python_source.read(init, ADDED).items()}
    if "cudnn/_pygraph.py" in archive.namelist():
        text = archive.read("cudnn/_pygraph.py").decode()
        nodes = {f"pygraph.{name}": _node(name, found[f"pygraph.{name}"], text) for name in NODES}
        tensor = python_source.read(
            archive.read("cudnn/graph_types.py").decode(), [f"Tensor.{name}" for name in TENSOR]
        )
        found = {name: entry for name, entry in found.items() if name in MODULE}
        found |= python_source.read(text, names) | nodes
        found |= {name.replace("Tensor", "tensor"): entry for name, entry in tensor.items()}
    for entry in found.values():
        entry["signature"] = re.sub(r"^self(?:, |$)", "", entry["signature"])
    return {name: found[name] for name in names if name in found}


def _docstrings(archive: zipfile.ZipFile, names: list[str]) -> dict[str, str]:
    binary = next(n for n in archive.namelist() if re.fullmatch(r"cudnn/_compiled_module.*\.so", n))
    with tempfile.TemporaryDirectory() as folder:
        path = archive.extract(binary, folder)
        command = [sys.executable, "-c", _READER, path, *names]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = json.loads(printed)
    return found


def _from_docstring(text: str) -> dict[str, Any]:
    """From the last overload that a docstring of pybind11 or nanobind shows."""
    shown = re.findall(r"^(?:\d+\. )?\w+\((?!\*args)(.*)\) -> (.*)$", text, flags=re.MULTILINE)
    arguments, returned = shown[-1]
    parameters, unnamed = [], 0
    for argument in split(arguments.replace("->", "")):
        declared, _, default = re.sub(r"<([\w.]+): -?\d+>", r"\1", argument).partition(" = ")
        name = declared.partition(":")[0]
        unnamed += bool(re.fullmatch(r"arg\d+", name))
        parameters.append(f"{name}={default}" if default else name)
    if unnamed:
        parameters.insert(1 + unnamed, "/")
    fixed = re.search(r"FixedSize\((\d+)\)", returned)
    return {
        "signature": ", ".join(parameters),
        "returns": [int(fixed[1])] if fixed else [] if returned == "None" else [1],
    }


def _node(name: str, backend: dict[str, Any], text: str) -> dict[str, Any]:
    """A node of the Python graph: it takes the first tensors by position, and all that C++ takes by keyword."""
    table = next(x for x in ast.parse(text).body if isinstance(x, ast.Assign) and _assigns(x, "_CAPTURED_OPS"))
    assert isinstance(table.value, ast.Dict)
    for key, value in zip(table.value.keys, table.value.values, strict=True):
        if isinstance(key, ast.Constant) and key.value == name and isinstance(value, ast.Call):
            said = {k.arg: ast.literal_eval(k.value) for k in value.keywords if k.arg in ("pos", "outputs")}
            by_position = "self, " + ", ".join(said["pos"])
            signature = backend["signature"].replace(by_position, by_position + ", *", 1)
            return {"signature": signature, "returns": [len(said["outputs"])]}
    raise ValueError(f"no {name} among the nodes of the Python graph")


def _assigns(node: ast.Assign, name: str) -> bool:
    return any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
