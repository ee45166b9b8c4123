"""The recorded signatures themselves (tests/signatures): complete, and read right by more than one way."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from packaging.version import Version

from anyattn.backends import cudnn, fa2, fa4
from doubles.signatures import recorded


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("fa2", 36, "2.3.0", fa2.NEWEST),
        ("fa3", 25, "2024-07-11+7f67966c", "2026-02-04+e2743ab5"),
        ("fa3_fwd", 3, "0.0.1", "0.0.3"),
        ("fa4", 33, "4.0.0b3", fa4.NEWEST),
        ("torch", 7, "2.11.0", "2.15.0"),
        ("cudnn", 31, "1.7.0", cudnn.NEWEST),
    ],
)
def test_what_is_recorded(name: str, count: int, first: str, last: str) -> None:
    versions = recorded(name).versions()
    assert (len(versions), versions[0], versions[-1]) == (count, first, last)


@pytest.mark.parametrize("name", ["fa2", "fa3", "fa3_fwd"])
def test_the_packages_own_calls_bind(name: str) -> None:
    """Python and C++ are read by two readers: they must agree on how many arguments there are."""
    package, seen = recorded(name), 0
    calls = [(f, e, c) for f, entries in package.functions.items() for e in entries for c in e.get("calls", {}).items()]
    for function, entry, (called, count) in calls:
        for version in entry["versions"]:
            compiled = [f for f in package.functions if f.endswith((f".{called}", f"::{called}"))]
            (there,) = [f for f in compiled if package.has(f, version)]
            package.signature(there, version).bind(*range(count))
            assert len(package.signature(there, version).parameters) == count, (version, function)
            seen += 1
    assert seen >= 2 * len(package.versions()) - 1


@pytest.mark.parametrize("name", ["fa2", "fa3", "fa3_fwd", "torch"])
def test_operators_return_what_they_announce(name: str) -> None:
    found = [e for entries in recorded(name).functions.values() for e in entries if "op" in e]
    assert found
    assert [[e["annotated"]] for e in found] == [e["returns"] for e in found]


# --- against the torch that is installed ---------------------------------------------------------------------------


def _installed() -> str:
    version = Version(torch.__version__).base_version
    if version not in recorded("torch").versions():
        pytest.skip(f"torch {version} is not recorded")
    return version


def _shape(signature: inspect.Signature) -> list[tuple[str, Any, bool]]:
    """Names, kinds, and which have a default."""
    return [(p.name, p.kind, p.default is p.empty) for p in signature.parameters.values()]


@pytest.mark.parametrize("function", [f for f in recorded("torch").functions if f.startswith("aten::")])
def test_the_installed_operators_are_as_recorded(function: str) -> None:
    package, version = recorded("torch"), _installed()
    if not package.has(function, version):
        pytest.skip(f"{version} has none")
    name, _, overload = function.removeprefix("aten::").partition(".")
    schema = getattr(getattr(torch.ops.aten, name), overload or "default")._schema
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    expected = [(a.name, kinds[a.kwarg_only], not a.has_default_value()) for a in schema.arguments]
    assert _shape(package.signature(function, version)) == expected
    assert package.returns(function, version) == [len(schema.returns)]


@pytest.mark.parametrize("function", ["varlen_attn", "flex_attention", "create_block_mask", "BlockMask.from_kv_blocks"])
def test_the_installed_functions_are_as_recorded(function: str) -> None:
    from torch.nn.attention import flex_attention, varlen

    found: Any = varlen if function == "varlen_attn" else flex_attention
    for name in function.split("."):
        found = getattr(found, name)
    found = getattr(found, "__func__", found)
    assert _shape(recorded("torch").signature(function, _installed())) == _shape(inspect.signature(found))
