"""``num_splits`` of Transformer Engine's: what its values mean, which kernels run, and that results stay the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

import anyattn
from anyattn.integrations.transformer_engine import DotProductAttention
from doubles import pretend
from te_cases import TeCase
from test_transformer_engine import GAPS, PACKED, PADDED, judge_half


def asked(machine: Any) -> list[int]:
    """What forwards of FlashAttention 3 were called with."""
    return [given["num_splits"] for name, given in machine.fa3.calls if name == "fwd"]


CASES = [
    TeCase(dims=(64, 64)),
    TeCase(dims=(64, 64), window=(3, 0), layout="sbhd"),
    TeCase(dims=(64, 64), softmax="learnable"),
    *(TeCase(dims=(64, 64), **base) for base in (PADDED, PACKED, GAPS)),
    TeCase(dims=(64, 64), by="left", **PADDED),
    TeCase(dims=(64, 64), mask="no_mask", lengths=(5, 5), keys=(11, 11)),
]


def with_splits(option: TeCase, num_splits: int) -> TeCase:
    """The same, with that argument of forward."""
    return replace(option, more=(("num_splits", num_splits),))


@pytest.mark.parametrize("version", ["2025-04-10", "3.0.0"])
@pytest.mark.parametrize("num_splits", [2, 0])
@pytest.mark.parametrize("option", CASES, ids=lambda option: option.id)
def test_it_is_the_documented_answer(option: TeCase, num_splits: int, version: str) -> None:
    """Forward and backward, against the dense formula."""
    with pretend("sm90", fa3=version) as machine:
        judge_half(with_splits(option, num_splits), "cpu")
    assert set(asked(machine)) == {num_splits}
    assert machine.fa3 is not None
    assert {name for name, _ in machine.fa3.calls} == {"fwd", "bwd"}


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [2, 5, 0])
@pytest.mark.parametrize("option", CASES, ids=lambda option: option.id)
def test_it_is_the_documented_answer_on_a_gpu(option: TeCase, num_splits: int) -> None:
    status = anyattn.backends()["fa3"]
    if not status.runs_here or (status.version or "0").startswith("0."):
        pytest.skip("needs flash-attn-3, with its backward, on a Hopper GPU")
    with _or_skipped():
        judge_half(with_splits(option, num_splits), "cuda")


@contextmanager
def _or_skipped() -> Iterator[None]:
    """A build of FlashAttention 3 may leave splitting out."""
    try:
        yield
    except anyattn.NoBackend as error:
        if "keys in several splits: needs a build that has it" not in str(error):
            raise
        pytest.skip("this build of FlashAttention 3 does not split")


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [2, 5, 0])
def test_forward_on_a_gpu(num_splits: int) -> None:
    """Of builds without a backward too."""
    if not anyattn.backends()["fa3"].runs_here:
        pytest.skip("needs FlashAttention 3 on a Hopper GPU")
    torch.manual_seed(3)
    layer = DotProductAttention(4, 64, qkv_format="bshd")
    q, k, v = torch.randn(3, 2, 700, 4, 64, dtype=torch.bfloat16, device="cuda").unbind()
    with torch.no_grad(), _or_skipped():
        got, whole = layer(q, k, v, num_splits=num_splits), layer(q, k, v)
    assert float((got - whole).abs().max()) <= 2**-7 * float(whole.abs().max())


def call(num_splits: Any = "default", **options: Any) -> torch.Tensor:
    """A layer's result."""
    torch.manual_seed(3)
    layer = DotProductAttention(2, 64, qkv_format="bshd")
    q, k, v = torch.randn(3, 1, 12, 2, 64, dtype=torch.bfloat16).unbind()
    given = {} if num_splits == "default" else {"num_splits": num_splits}
    return layer(q, k, v, **given, **options)  # type: ignore[no-any-return]


def test_what_its_values_mean() -> None:
    """None and 1 are one part; 0 is the kernel's choice; values do not mix in what is remembered of calls."""
    with pretend("sm90", fa3="3.0.0") as machine, anyattn.use("fa3"):
        found = [call(n) for n in ("default", 4, None, 1, 0, 4)]
    assert asked(machine) == [1, 4, 1, 1, 0, 4]
    for x in found:
        torch.testing.assert_close(x, found[0], rtol=0.01, atol=0.01)
    assert torch.equal(found[0], found[3])


def test_kernels_that_do_not_split_are_passed_over() -> None:
    """Also where they are preferred; never another than those that are allowed."""
    with pretend("sm90", fa3="3.0.0", fa2="2.8.3") as machine:
        with anyattn.use(["fa2", "fa3"]):
            call()
            assert not asked(machine)
            call(2)
            assert asked(machine) == [2]
        with (
            anyattn.use("fa2"),
            pytest.raises(anyattn.NoBackend, match="num_splits=2: this kernel does not split keys"),
        ):
            call(2)


@pytest.mark.parametrize("num_splits", [0, 3])
def test_without_such_a_kernel_all_are_named(num_splits: int) -> None:
    with pytest.raises(anyattn.NoBackend) as caught:
        call(num_splits)
    text = str(caught.value)
    for name in ("torch:cpu", "reference"):
        lines = [line for line in text.splitlines() if line.split()[:1] == [name]]
        assert any(f"num_splits={num_splits}: this kernel does not split keys in forward" in line for line in lines)
        assert "leave num_splits at 1" in text


def test_policies_and_checkpoints_take_it() -> None:
    layer = DotProductAttention(2, 64, qkv_format="thd", attn_mask_type="padding_causal")
    q, k, v = (x.bfloat16().requires_grad_() for x in torch.randn(3, 20, 2, 64).unbind())
    offsets = torch.tensor([0, 8, 20], dtype=torch.int32)
    given = {"cu_seqlens_q": offsets, "cu_seqlens_kv": offsets}
    policies = [
        {"sequence_ids": torch.tensor([i]), "mask_type": kind, "window_size": None}
        for i, kind in enumerate(("padding", "padding_causal"))
    ]
    with pretend("sm90", fa3="3.0.0") as machine, anyattn.use("fa3"):
        for more in ({"thd_attention_policies": policies}, {"checkpoint_core_attention": True}):
            one, two = (layer(q, k, v, **given, **more, num_splits=n) for n in (1, 2))
            torch.testing.assert_close(one, two, rtol=0.01, atol=0.01)
            grads = [torch.autograd.grad(x.float().sum(), (q, k, v)) for x in (one, two)]
            torch.testing.assert_close(*grads, rtol=0.02, atol=0.02)
    assert asked(machine) == [1, 1, 2, 2, 1, 2, 1, 2]


def test_a_compiled_module() -> None:
    """The layer is traced whole, and another value is another call."""
    layer = DotProductAttention(2, 64, qkv_format="bshd")
    q, k, v = (x.bfloat16() for x in torch.randn(3, 1, 12, 2, 64).unbind())
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with pretend("sm90", fa3="3.0.0") as machine, anyattn.use("fa3"):
        expected = layer(q, k, v)
        for n in (1, 2, 3, 0, 5, None):
            torch.testing.assert_close(compiled(q, k, v, num_splits=n), expected, rtol=0.01, atol=0.01)
    assert asked(machine) == [1, 1, 2, 3, 0, 5, 1]
    torch._dynamo.reset()


@pytest.mark.parametrize("given", [-1, 2.5, "2", False, True, torch.tensor(2.5), torch.tensor([1, 2])], ids=str)
def test_what_is_no_number_of_splits_is_named(given: Any) -> None:
    with pytest.raises(anyattn.InvalidArgument, match="num_splits must be an int >= 0"):
        call(given)
