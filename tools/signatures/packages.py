"""What is read of each package: one generator per package, giving (version, what is noted of it, its functions)."""

from __future__ import annotations

import ast
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.version import Version

from signatures import cpp_source, cudnn_graph, python_source

Release = tuple[str, dict[str, Any], dict[str, dict[str, Any]]]

FLASH_ATTENTION = (
    "_flash_attn_forward", "_flash_attn_backward", "_flash_attn_varlen_forward", "_flash_attn_varlen_backward",
    "flash_attn_func", "flash_attn_varlen_func",
)  # fmt: skip
FA2 = ("flash_attn/flash_attn_interface.py", "csrc/flash_attn/flash_api.cpp")
FA4 = {
    "flash_attn/cute/interface.py": (
        "_flash_attn_fwd", "_flash_attn_bwd", "flash_attn_func", "flash_attn_varlen_func", "maybe_contiguous",
    ),
    "flash_attn/cute/cute_dsl_utils.py": ("maybe_contiguous",),  # where newer versions define it
}  # fmt: skip
TORCH = {
    "torch/nn/attention/varlen.py": (
        "varlen_attn", "varlen_attn_out", "_varlen_attn", "_varlen_attn_out", "_varlen_attn_backward",
    ),
    "torch/nn/attention/_fa3.py": ("register_flash_attention_fa3",),
    "torch/nn/attention/_fa4.py": ("register_flash_attention_fa4",),
    "torch/nn/attention/__init__.py": ("sdpa_kernel",),
    "torch/nn/attention/_registry.py": (
        "activate_flash_attention_impl", "current_flash_attention_impl", "restore_flash_attention_impl",
    ),
    "torch/nn/attention/flex_attention.py": (
        "flex_attention", "create_block_mask", "BlockMask.__init__", "BlockMask.from_kv_blocks",
    ),
}  # fmt: skip
_DPA = "transformer_engine/pytorch/attention/dot_product_attention/dot_product_attention.py"
TRANSFORMER_ENGINE = {
    _DPA: tuple(f"DotProductAttention.{m}" for m in ("__init__", "forward", "set_context_parallel_group")),
}
ATEN = re.compile(
    r"- func: ((?:_flash_attention|_efficient_attention|_cudnn_attention|_scaled_dot_product_(?:cudnn|flash|efficient"
    r"|fused)\w*|_fused_sdp_choice|scaled_dot_product_attention)\w*\(.*)"
)


def _sorted(folder: Path, pattern: str) -> list[tuple[str, Path]]:
    """(version, file) of each archive, oldest first."""
    names = re.compile(r"[\w.]*?-(\d[^-]*?)(?:-.*\.whl|\.tar\.gz)")
    found = [(m[1], path) for path in folder.glob(pattern) if (m := names.fullmatch(path.name))]
    return sorted(found, key=lambda pair: Version(pair[0]))


def fa2(folder: Path) -> Iterator[Release]:
    """Sdists of flash-attn."""
    for version, path in _sorted(folder, "flash_attn-2*.tar.gz"):
        python = compiled = ""
        with tarfile.open(path) as archive:
            for member in archive:
                if re.fullmatch(
                    r"[^/]*/(flash_attn/flash_attn_interface.py|csrc/flash_attn/flash_api.cpp)", member.name
                ):
                    text = archive.extractfile(member).read().decode()  # type: ignore[union-attr]
                    python, compiled = (text, compiled) if member.name.endswith(".py") else (python, text)
        functions = python_source.read(python, FLASH_ATTENTION)
        yield version, {}, functions | cpp_source.read(compiled, "flash_attn_2_cuda")


def fa4(folder: Path) -> Iterator[Release]:
    """Wheels of flash-attn-4."""
    for version, path in _sorted(folder, "flash_attn_4-*.whl"):
        functions: dict[str, dict[str, Any]] = {}
        with zipfile.ZipFile(path) as archive:
            for name, wanted in FA4.items():
                functions |= python_source.read(archive.read(name).decode(), wanted)
            needs = re.findall(r"^Requires-Dist: (nvidia-cutlass-dsl[^;\n]*)$", _metadata(archive), flags=re.MULTILINE)
        yield version, {"needs": needs}, functions


def fa3_fwd(folder: Path) -> Iterator[Release]:
    """Wheels of fa3-fwd."""
    for version, path in _sorted(folder, "fa3_fwd-*x86_64.whl"):
        with zipfile.ZipFile(path) as archive:
            functions = python_source.read(archive.read("fa3_fwd_interface.py").decode(), FLASH_ATTENTION)
            binary = archive.read(next(n for n in archive.namelist() if n.endswith(".so")))
            config = ast.parse(archive.read("fa3_fwd_config.py").decode()).body[0]
        assert isinstance(config, ast.Assign)
        flags: dict[str, bool] = ast.literal_eval(config.value)["build_flags"]
        functions |= cpp_source.read_binary(binary, "fa3_fwd")
        yield version, {"build_flags": sorted(name for name, on in flags.items() if on)}, functions


def torch(folder: Path) -> Iterator[Release]:
    """Wheels of torch: the Python and the schemas are the same for every platform."""
    for version, path in _sorted(folder, "torch-*.whl"):
        functions: dict[str, dict[str, Any]] = {}
        with zipfile.ZipFile(path) as archive:
            for name, wanted in TORCH.items():
                functions |= python_source.read(archive.read(name).decode(), wanted)
            listed = archive.read("torchgen/packaged/ATen/native/native_functions.yaml").decode()
        for schema in ATEN.findall(listed):
            functions["aten::" + schema.partition("(")[0]] = {"schema": schema}
        yield version, {}, functions


def transformer_engine(folder: Path) -> Iterator[Release]:
    """Wheels of transformer-engine: the Python is the same for every platform."""
    for version, path in _sorted(folder, "transformer_engine-*.whl"):
        functions: dict[str, dict[str, Any]] = {}
        with zipfile.ZipFile(path) as archive:
            for name, wanted in TRANSFORMER_ENGINE.items():
                found = python_source.read(archive.read(name).decode(), wanted)
                functions |= {n: {"signature": entry["signature"]} for n, entry in found.items()}
        yield version, {}, functions


def cudnn(folder: Path) -> Iterator[Release]:
    """Wheels of nvidia-cudnn-frontend, for the running Python."""
    for version, path in _sorted(folder, "nvidia_cudnn_frontend-*.whl"):
        with zipfile.ZipFile(path) as archive:
            python = "cudnn/_pygraph.py" in archive.namelist()
            yield version, {"graph": "Python" if python else "C++"}, cudnn_graph.read(archive)


def fa3(clone: Path) -> Iterator[Release]:
    """The states of hopper/ in a clone of flash-attention; a version is the day a commit landed, and the commit."""
    paths = [f"hopper/{x}" for x in ("flash_attn_interface.py", "flash_api.cpp", "flash_api_stable.cpp", "setup.py")]
    paths.append("hopper/__init__.py")
    before: object = None
    for line in _git(clone, "log", "--first-parent", "--reverse", "--format=%cs %H", "--", *paths).splitlines():
        date, commit = line.split()
        interface, compiled, stable, setup, init = (_git(clone, "show", f"{commit}:{path}") for path in paths)
        found = {
            "module": _first(r"^ *import (flash[\w.]+(?:_cuda|_C))", interface),
            "package": _first(r'^PACKAGE_NAME = "(.*)"', setup),
            "says": _first(r'^__version__ = "(.*)"', init),
        }
        functions = python_source.read(interface, FLASH_ATTENTION)
        functions |= cpp_source.read(compiled, found["module"])
        for name, entry in cpp_source.read(stable, "").items():
            functions[f"{name} (stable ABI)"] = entry
        if (functions, found) != before:
            yield f"{date}+{commit[:8]}", found, functions
        before = functions, found


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, flags=re.MULTILINE)
    if found is None:
        raise ValueError(f"no {pattern} in {text[:200]!r}...")
    return found[1]


def _git(clone: Path, *arguments: str) -> str:
    """What git prints, or nothing where it fails: a file that does not exist yet."""
    return subprocess.run(["git", "-C", str(clone), *arguments], capture_output=True, text=True, check=False).stdout


def _metadata(archive: zipfile.ZipFile) -> str:
    return archive.read(next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))).decode()
