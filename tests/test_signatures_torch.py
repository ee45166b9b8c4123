"""Every call of torch's own kernels binds against every version of torch that is claimed (tests/signatures)."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from anyattn.backends import _flex_blocks, _flex_compiled, flex
from doubles import pretend
from doubles.signatures import recorded
from ways import WAYS, call

Calls = list[tuple[str, tuple[Any, ...], dict[str, Any]]]
#: torch's own binding of an op, which adapters call under a name of theirs.
BOUND = "_scaled_dot_product_flash_attention_for_cpu"
OPERATORS = {
    "_flash_attention_forward": 5,
    "_flash_attention_backward": 3,
    "_efficient_attention_forward": 6,
    "_efficient_attention_backward": 4,
    "_scaled_dot_product_cudnn_attention": 9,
    "_scaled_dot_product_cudnn_attention_backward": 3,
    BOUND: 2,
    f"{BOUND}_backward": 3,
}
"""How many values the adapters count on."""


@contextmanager
def watched() -> Iterator[Calls]:
    """The operators that adapters call, with what they pass."""
    found: Calls = []

    def watch(name: str, called: Callable[..., Any]) -> Callable[..., Any]:
        def watcher(*args: Any, **kwargs: Any) -> Any:
            found.append((f"aten::{name}", args, kwargs))
            return called(*args, **kwargs)

        return watcher

    torch.use_deterministic_algorithms(False)  # imports what looks at every op, the first time
    with ExitStack() as stack:
        for name in {f.removeprefix("aten::").partition(".")[0] for f in recorded("torch").functions if "::" in f}:
            if packet := getattr(torch.ops.aten, name, None):
                stack.enter_context(mock.patch.object(packet, "default", watch(name, packet.default)))
        bound = getattr(torch, BOUND)
        for module in [m for name, m in sys.modules.items() if name.startswith("anyattn.backends.")]:
            for name in [n for n, value in vars(module).items() if value is bound]:
                stack.enter_context(mock.patch.object(module, name, watch(BOUND, bound)))
        yield found


@pytest.fixture(scope="module")
def torch_calls() -> Calls:
    found = []
    for name in ("torch:flash", "torch:cudnn", "torch:efficient", "varlen", "torch:cpu"):
        with pretend("cpu" if name == "torch:cpu" else "sm90"), watched() as seen:
            for way in (*WAYS, {"scores": "bias_grad"}, {"scores": "mask"}, {"relation": "any", "mask": "causal"}):
                call(name, way)
                call(name, {**way, "heads": "4"})
            for form in ("bshd", "thd"):
                call(name, {"form": form}, dropout=0.5)
        found += seen
    return found


def test_every_operator_is_called(torch_calls: Calls) -> None:
    assert {name for name, _, _ in torch_calls} >= {f"aten::{name}" for name in OPERATORS}


@pytest.mark.parametrize("version", recorded("torch").versions())
def test_torch(torch_calls: Calls, version: str) -> None:
    for name, args, kwargs in torch_calls:
        recorded("torch").signature(name, version).bind(*args, **kwargs)
        assert name.removeprefix("aten::") in OPERATORS, "an operator whose results nobody counted"


@pytest.mark.parametrize("version", recorded("torch").versions())
@pytest.mark.parametrize("operator", OPERATORS)
def test_results_have_what_is_unpacked(operator: str, version: str) -> None:
    assert recorded("torch").returns(f"aten::{operator}", version) == [OPERATORS[operator]]


def _flex_calls() -> list[tuple[str, int, list[str]]]:
    """(function, number of positional arguments, keywords) of each call in the adapter's text: it runs compiled."""
    found = []
    for module in (_flex_compiled, _flex_blocks, flex):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            name = ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Call) and name in ("flex_attention", "BlockMask", "create_block_mask"):
                names = [k.arg for k in node.keywords if k.arg]
                for keyword in node.keywords:
                    if keyword.arg is None:
                        assert ast.unparse(keyword.value) == "tables._asdict()"
                        names += _flex_blocks.Tables._fields
                found.append((name, len(node.args), names))
    return found


@pytest.mark.parametrize("version", recorded("torch").versions())
def test_flex(version: str) -> None:
    found = _flex_calls()
    assert {"flex_attention", "BlockMask"} <= {name for name, _, _ in found}
    for name, count, names in found:
        function, receiver = ("BlockMask.__init__", 1) if name == "BlockMask" else (name, 0)
        recorded("torch").signature(function, version).bind(*range(receiver + count), **dict.fromkeys(names))
