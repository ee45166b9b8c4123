"""Several generations in one process: each is told from the others, runs beside them, and fails alone."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import anyattn
from anyattn import _select
from doubles import fa2, fa3, fa4, pretend

ALL = {"fa2": "2.8.3", "fa3": "3.0.0", "fa4": "4.0.0b36"}


@pytest.fixture
def qkv() -> list[Tensor]:
    return [torch.randn(2, 9, 4, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]


def test_generations_run_side_by_side(qkv: list[Tensor]) -> None:
    """One after the other, and again: none has taken another one's names, in sys.modules or in torch.ops."""
    exact = anyattn.attention(*(x.detach().double() for x in qkv), causal=True, backend="reference")
    with pretend("sm90", **ALL) as machine:
        for name in (*ALL, *reversed(ALL)):
            out = anyattn.attention(*qkv, causal=True, backend=name)
            torch.autograd.grad(out.float().sum(), qkv)
            torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=0)
        # fa4's forward kernel is called again without the raw function
        assert [len(double.calls) for double in (machine.fa2, machine.fa3, machine.fa4) if double] == [4, 4, 3]


@pytest.mark.parametrize("newer", ["2.7.0", "2.8.3"])
@pytest.mark.parametrize("state", ["2025-04-10", "2025-06-07", "2025-12-04", "0.0.3"])
def test_custom_ops_of_two_packages_do_not_meet(newer: str, state: str, qkv: list[Tensor]) -> None:
    with pretend("sm90", fa2=newer, fa3=state), torch.no_grad():
        for name in ("fa2", "fa3", "fa2"):
            anyattn.attention(*qkv, backend=name)


def test_every_generation_gives_its_reasons(qkv: list[Tensor]) -> None:
    with pretend("sm90", fa2="2.5.9", fa3="2025-04-10", fa4="4.0.0b8"):
        _select.load("fa3")  # its betas all have one version: what they take is seen when they are imported
        explanation = anyattn.explain(*qkv, softcap=9.0, deterministic=True)
        assert {"fa2", "fa3", "fa4"} <= set(explanation.rejected)
        for text in ("flash-attn >= 2.6", "flash-attn-3 >= 3.0.0", "flash-attn-4 >= 4.0.0b9"):
            assert text in " ".join(str(explanation).split())


# --- who is who ----------------------------------------------------------------------------------------------------


def test_flash_attn_4_alone_is_not_flash_attn_2(qkv: list[Tensor]) -> None:
    """They share the top-level module, which the newer one leaves without a file of its own."""
    with pretend("sm90", fa4=ALL["fa4"]):
        assert importlib.util.find_spec("flash_attn") is not None
        assert anyattn.backends()["fa2"].version is None
        assert anyattn.explain(*qkv).chosen == "fa4"
        with pytest.raises(anyattn.NoBackend, match="not installed"):
            anyattn.attention(*qkv, backend="fa2")


def test_flash_attn_2_alone_is_not_flash_attn_4(qkv: list[Tensor]) -> None:
    with pretend("sm90", fa2=ALL["fa2"]):
        assert anyattn.backends()["fa4"].version is None
        assert anyattn.backends()["fa3"].version is None
        assert anyattn.explain(*qkv, dropout=0.1).chosen is not None


@pytest.mark.parametrize("state", ["2025-01-07", "2025-02-15"])
def test_a_beta_of_3_that_calls_itself_flash_attn_is_not_flash_attn_2(state: str, qkv: list[Tensor]) -> None:
    """Its distribution has the name of FlashAttention 2, and the version 3.0.0b1."""
    with pretend("sm90", fa3=state):
        for name in ("fa2", "fa3"):
            assert anyattn.explain(*qkv, backend=name).chosen is None


def test_probing_imports_none_of_them(qkv: list[Tensor]) -> None:
    with pretend("sm90", **ALL):
        anyattn.explain(*qkv)
        tops = {name.partition(".")[0] for name in sys.modules}
        assert not tops & {"flash_attn", "flash_attn_2_cuda", "flash_attn_interface", "flash_attn_config", "fa3_fwd"}


# --- one of them does not load -------------------------------------------------------------------------------------

FAILURES = (
    ImportError("libc10.so: undefined symbol: _ZN3c1021throwNullDataPtrErrorEv"),
    ModuleNotFoundError("No module named 'einops'"),
    AttributeError("module 'cutlass' has no attribute 'range_constexpr'"),
    OSError("libcudart.so.12: cannot open shared object file"),
    TypeError("unexpected keyword\nsecond line of it"),
    RuntimeError("CUDA driver is too old"),
    AssertionError(),
    SystemExit(1),
)
#: What an import reaches first: the backend, its version, and where its double can fail.
BROKEN: dict[str, tuple[str, str, type, str]] = {
    "flash_attn_2_cuda": ("fa2", "2.8.3", fa2.Interface, "cuda_module"),
    "flash_attn.flash_attn_interface": ("fa2", "2.5.9", fa2.Interface, "python_module"),
    "flash_attn_3._C": ("fa3", "3.0.0", fa3.Interface, "cuda_module"),
    "flash_attn_3_cuda": ("fa3", "2025-04-10", fa3.Interface, "cuda_module"),
    "flash_attn_interface": ("fa3", "3.0.0", fa3.Interface, "python_module"),
    "fa3_fwd._C": ("fa3", "0.0.3", fa3.Interface, "cuda_module"),
    "flash_attn.cute.interface": ("fa4", "4.0.0b36", fa4.Interface, "module"),
}


def _raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object) -> None:
        sys.path.insert(0, "/a/folder/that/shadows/utils")
        raise error

    return fail


@pytest.mark.parametrize("error", FAILURES, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("module", BROKEN)
def test_a_package_that_does_not_import_is_a_reason(
    module: str, error: BaseException, monkeypatch: pytest.MonkeyPatch, qkv: list[Tensor]
) -> None:
    """The others run, the reason is one line of what went wrong, and sys.path is as it was."""
    name, version, interface, method = BROKEN[module]
    monkeypatch.setattr(interface, method, _raising(error))
    others = {n: v for n, v in ALL.items() if n != name}
    with pretend("sm90", **{name: version}, **others), torch.no_grad():
        before = list(sys.path)
        anyattn.attention(*qkv, backend=[name, "fa3" if name != "fa3" else "fa2"])
        assert sys.path == before
        assert type(error).__name__ in _select._broken[name]
        status = anyattn.backends()[name]
        assert not status.runs_here
        assert status.reason
        assert "\n" not in status.reason
        with pytest.raises(anyattn.NoBackend, match=type(error).__name__):
            anyattn.attention(*qkv, backend=name)
        assert anyattn.explain(*qkv).chosen in others


@pytest.mark.parametrize("missing", ["_flash_attn_varlen_forward", "_flash_attn_backward"])
def test_a_flash_attn_without_a_raw_function_is_a_reason(
    missing: str, monkeypatch: pytest.MonkeyPatch, qkv: list[Tensor]
) -> None:
    """A version to come, whose names are others."""
    whole = fa2.Interface.python_module
    monkeypatch.setattr(
        fa2.Interface, "python_module", lambda self: {n: x for n, x in whole(self).items() if n != missing}
    )
    with pretend("sm90", fa2="2.6.3"):
        with pytest.raises(anyattn.NoBackend, match=missing):
            anyattn.attention(*qkv, backend="fa2")
        assert anyattn.explain(*qkv).chosen != "fa2"
