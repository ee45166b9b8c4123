"""``num_splits``: which kernels take it, and that calls with another one share nothing; compiled and planned too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import anyattn
import cases
from anyattn import _preparation, _select
from anyattn._api import attention_in_splits, make_request
from anyattn._capability import evaluate
from anyattn._context import _door
from anyattn._context._checks import Asked
from anyattn._explanation import Explanation
from anyattn._problem import Problem
from anyattn._request import Tensors
from cases import BACKENDS, Case
from doubles import fa3 as kernels
from doubles import pretend
from doubles.signatures import recorded
from test_conformance import check, run
from versions import double

STATES = [
    v.partition("+")[0] for v in recorded("fa3").versions() if recorded("fa3").noted(v)["package"] == "flash_attn_3"
]
VERSIONS = [*STATES, "3.0.0", *recorded("fa3_fwd").versions()]
UNSPLIT = "does not split keys in forward; leave num_splits at 1"


def qkv(rows: int = 37, keys: int = 53, *, grad: bool = False) -> list[Tensor]:
    """bfloat16, of more keys than queries."""
    shapes = ((2, rows, 4, 64), (2, keys, 2, 64), (2, keys, 2, 64))
    return [torch.randn(shape, dtype=torch.bfloat16, requires_grad=grad) for shape in shapes]


def asked(machine: Any) -> list[int]:
    """What forwards of FlashAttention 3 were called with."""
    return [given["num_splits"] for name, given in machine.fa3.calls if name == "fwd"]


def explain(num_splits: int, on: str = "sm90", backend: Any = "auto", **assume: str | None) -> Explanation:
    """What ``anyattn.explain`` says of a plain call with that many splits."""
    q, k, v = (x.to("meta") for x in qkv())
    t = Tensors(q, k, v, None, None, None, None, None, None)
    request = make_request(t, True, None, None, None, 0.0, None, backend, None, False, num_splits)
    world = _select.assumed_world(assume, newest=True)
    return _preparation.explain(request, world, anyattn._environment.TARGETS[on])


# --- who takes it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_splits", [0, 2])
def test_a_kernel_that_does_not_split_says_so(num_splits: int) -> None:
    """Every kernel that does not declare it, and none that does."""
    for name in BACKENDS.ORDER:
        for capability in BACKENDS.get(name).CAPABILITIES:
            form: Any = "dense" if "dense" in capability.features else "packed"
            plain = Problem(max(capability.families) * 10, capability.dtypes[0], form, 64, 64, 4, 4, 128, 128, "equal")
            version = BACKENDS.get(name).NEWEST
            found, _ = evaluate(capability, replace(plain, num_splits=num_splits), version)
            texts = [str(reason) for reason in found]
            assert any(UNSPLIT in text for text in texts) == (capability.most_splits == 1), name
            if capability.most_splits == 1:
                assert any(f"num_splits={num_splits}: this kernel" in text for text in texts)
            else:
                assert not texts
    able = {n for n in BACKENDS.ORDER if any(c.most_splits > 1 for c in BACKENDS.get(n).CAPABILITIES)}
    assert able == {"fa3"}


def test_explain_tells_it() -> None:
    found = explain(4)
    assert found.chosen == "fa3"
    assert found.problem.num_splits == 4
    assert ", num_splits 4, forward" in str(found)
    assert f"num_splits=4: this kernel {UNSPLIT}" in str(found)
    assert "num_splits" not in str(explain(1))
    assert explain(1).chosen == "fa3"
    assert explain(4, on="sm80").chosen is None
    assert explain(4, fa3=None).chosen is None


def test_more_than_the_kernel_has_room_for() -> None:
    assert explain(256).chosen == "fa3"
    found = explain(257)
    assert found.chosen is None
    assert "num_splits=257: needs at most 256, got 257; ask for fewer" in str(found)


def test_where_no_kernel_splits_all_are_named() -> None:
    x = torch.randn(1, 4, 2, 8)
    with pytest.raises(anyattn.NoBackend) as caught:
        attention_in_splits(4, x, x, x)
    for name in ("torch", "reference"):
        reasons = caught.value.explanation.rejected[name]
        assert any(UNSPLIT in str(reason) for reason in reasons), name
    assert torch.equal(attention_in_splits(1, x, x, x), anyattn.attention(x, x, x))


def test_wrong_arguments_are_named_as_elsewhere() -> None:
    x = torch.randn(1, 4, 2, 8)
    with pytest.raises(anyattn.InvalidArgument, match="window"):
        attention_in_splits(2, x, x, x, window=[-1, {}])
    with pytest.raises(anyattn.InvalidArgument, match="k must be a tensor"):
        attention_in_splits(2, x, None, x)  # type: ignore[arg-type]
    with pytest.raises(anyattn.Unsupported, match="transforms"):
        torch.vmap(lambda q: attention_in_splits(2, q, q, q))(x[None])


# --- every version -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_takes_it(version: str) -> None:
    """Each call binds against what is recorded of the version; results are the unsplit ones, rounded elsewhere."""
    grad = version not in recorded("fa3_fwd").versions()
    q, k, v = qkv(grad=grad)
    lengths = [anyattn.Packing.from_lengths(x, device="cpu") for x in ([9, 20], [30, 11])]
    places: dict[str, Any] = {"packing": lengths[0], "packing_kv": lengths[1]}
    packed = [x.flatten(0, 1)[:n] for x, n in ((q, 29), (k, 41), (v, 41))]
    with pretend("sm90", fa3=version) as machine:
        for tensors, more in (([q, k, v], {}), (packed, places)):
            whole, lse = anyattn.attention(*tensors, causal=True, backend="fa3", return_lse=True, **more)
            for num_splits in (2, 5, 64, 0):
                out, found = attention_in_splits(num_splits, *tensors, causal=True, return_lse=True, **more)
                torch.testing.assert_close(out, whole, rtol=0.01, atol=0.01)
                torch.testing.assert_close(found, lse, rtol=1e-5, atol=1e-5)
                if grad:
                    one, two = (
                        torch.autograd.grad(x.float().square().sum(), tensors, retain_graph=True) for x in (out, whole)
                    )
                    torch.testing.assert_close(one, two, rtol=0.05, atol=0.05)
    assert asked(machine) == [1, 2, 5, 64, 0] * 2
    assert all("num_splits" not in given for name, given in machine.fa3.calls if name == "bwd")  # type: ignore[union-attr]


@pytest.mark.parametrize("form", ["bshd", "thd_gaps", "bshd_left"])
@pytest.mark.parametrize("dims", ["32", "20"])
def test_what_surrounds_a_kernel(form: str, dims: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sinks, padding, layouts and head dims are as without: compared with the oracle."""
    case = Case(double("fa3", "3.0.0"), form, "any", "causal", "sink", "bfloat16", "4/2", dims)
    with pretend("sm90", fa3="3.0.0") as machine:
        problem = cases.build(case)
        with monkeypatch.context() as patch:
            patch.setattr(anyattn, "attention", lambda *args, **given: attention_in_splits(3, *args, **given))
            check(problem, *run(problem))
    assert set(asked(machine)) == {3}


def test_a_mask_with_holes() -> None:
    """Such a batch is packed first."""
    packing = anyattn.Packing.from_mask(torch.rand(2, 24) > 0.4)
    q, k, v = qkv(24, 24)
    with pretend("sm90", fa3="3.0.0") as machine:
        expected = anyattn.attention(q, k, v, packing=packing, causal=True, return_lse=True, backend="fa3")
        for _ in range(2):
            found = attention_in_splits(2, q, k, v, packing=packing, causal=True, return_lse=True)
            torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)
    assert asked(machine) == [1, 2, 2]


def test_a_build_without_splits() -> None:
    """Those that list what they lack are not asked; of others the kernel says it; a choice of its own is one part."""
    x = torch.randn(1, 8, 2, 64, dtype=torch.bfloat16)
    for version, text in (("3.0.0", "a build that has it"), ("2025-09-12", "does not support splits")):
        with pretend("sm90", fa3=version, without=("SPLIT",)) as machine:
            with pytest.raises(anyattn.NoBackend, match=text):
                attention_in_splits(2, x, x, x)
            torch.testing.assert_close(attention_in_splits(0, x, x, x), anyattn.attention(x, x, x, backend="fa3"))
        assert asked(machine)[-2:] == [0, 1]


def test_the_double_splits() -> None:
    """Else nothing here could fail: parts are merged in another order, and their memory comes back."""
    interface = kernels.Interface("3.0.0")
    q, k, v = qkv()
    names = interface._names("fwd")
    plain = {"causal": False, "window_size_left": -1, "window_size_right": -1, "attention_chunk": 0, "softcap": 0.0}

    def forward(num_splits: int) -> Any:
        given = {**plain, "q": q, "k": k, "v": v, "softmax_scale": 1.0, "num_splits": num_splits}
        return interface._compiled_function("fwd", *(given.get(name) for name in names))

    one, three = forward(1), forward(3)
    assert one[2] is None
    assert three[2].shape == (3, 2, 4, 37, 64)
    assert three[3].shape == (3, 2, 4, 37)
    assert not torch.equal(one[1], three[1]), "another order of sums"
    with pytest.raises(AssertionError):
        forward(257)


# --- what calls share ----------------------------------------------------------------------------------------------


def test_cached_calls_do_not_mix() -> None:
    q, k, v = qkv()
    wanted = (1, 4, 2, 4, 1, 0, 1, 2, 0)
    with pretend("sm90", fa3="3.0.0") as machine:
        for num_splits in wanted:
            attention_in_splits(num_splits, q, k, v, backend="fa3")
        anyattn.attention(q, k, v, backend="fa3")
    assert asked(machine) == [*wanted, 1]


def test_a_second_call_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv()
    slopes = torch.rand(4)
    with pretend("sm90", fa3="3.0.0") as machine:
        attention_in_splits(2, q, k, v)
        with monkeypatch.context() as patch:
            patch.setattr(_preparation, "prepare", lambda request: pytest.fail("chosen anew"))
            attention_in_splits(2, q.clone(), k, v)
        with pytest.raises(anyattn.NoBackend, match="ALiBi"):
            attention_in_splits(2, q, k, v, alibi_slopes=slopes)
    assert asked(machine) == [2, 2]


def test_under_the_custom_op() -> None:
    """The op carries it, forward and backward; several values in one region stay apart."""
    q, k, v = qkv(grad=True)

    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        whole = anyattn.attention(q, k, v, window=(5, 5), backend="fa3")
        parts: Tensor = attention_in_splits(3, q, k, v, window=(5, 5)) + attention_in_splits(2, q, k, v)
        return whole + parts

    with pretend("sm90", fa3="3.0.0") as machine:
        expected = both(q, k, v)
        grads = torch.autograd.grad(expected.sum(), (q, k, v))
        machine.fa3.calls.clear()  # type: ignore[union-attr]
        out = torch.compile(both, fullgraph=True, backend="aot_eager")(q, k, v)
        torch.testing.assert_close(out, expected)
        found = torch.autograd.grad(out.sum(), (q, k, v))
        torch.testing.assert_close(found, grads, rtol=0.02, atol=0.02)  # sums in no fixed order
    assert asked(machine) == [1, 3, 2]
    assert [name for name, _ in machine.fa3.calls].count("bwd") == 3  # type: ignore[union-attr]
    torch._dynamo.reset()


def test_a_compiled_call_that_no_kernel_takes() -> None:
    x = torch.randn(1, 4, 2, 8)
    compiled = torch.compile(lambda q: attention_in_splits(4, q, q, q), fullgraph=True, backend="eager")
    with pytest.raises(anyattn.NoBackend, match=f"num_splits=4: this kernel {UNSPLIT}"):
        compiled(x)
    torch._dynamo.reset()


def test_a_block_mask_in_a_compiled_region(monkeypatch: pytest.MonkeyPatch) -> None:
    """No custom op takes it, so there the choice is made without kernels that split."""
    x = torch.randn(1, 4, 2, 8)
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 4, 4, device="cpu")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(anyattn.Unsupported, match="num_splits=2 with a BlockMask"):
        attention_in_splits(2, x, x, x, mask=mask)


def test_a_plan_carries_it() -> None:
    """Every call under it is split: explained, and part of what its kernels are asked."""
    plan = anyattn.ContextParallel((2, 0), comm="all_gather").plan(64, causal=True)
    x = torch.empty(1, 32, 2, 64, dtype=torch.bfloat16, device="meta")
    t = Tensors(x, x, x, None, None, None, None, None, None)
    plain = Asked(None, None, None, None, 0.0, None, "auto", None, False)
    world = _select.assumed_world({}, newest=True)
    found = _door.explain(t, plain._replace(num_splits=4), plan, world, 90)
    assert found.chosen == "fa3"
    assert f"num_splits=4: this kernel {UNSPLIT}" in str(found)
    split = plain._replace(num_splits=4)
    assert {r.num_splits for asks in _door._requests(t, split, plan)[1] for r in asks} == {4}
    assert {r.num_splits for asks in _door._requests(t, plain, plan)[1] for r in asks} == {1}
    assert _door.explain(t, plain._replace(num_splits=4), plan, world, 80).chosen is None
