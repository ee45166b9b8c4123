"""What holds for every double: padding that is not finite, several generations at once, and nothing that stays.

That every adapter gives the oracle's answer over its double is in test_conformance.py and its neighbours, whose targets
the doubles are. A double refuses what its kernel refuses and leaves NaN where its kernel writes nothing, so that a
declaration that promises too much, a keyword that a version lacks and a row that nobody zeroes all fail there.
"""

from __future__ import annotations

import pytest
import torch

import anyattn
import cases
from anyattn import _api, _environment
from anyattn.backends import fa4
from cases import Case, Target
from doubles import pretend
from test_conformance import check, run
from versions import double

NEWEST = fa4.NEWEST


# --- padding that is not finite ------------------------------------------------------------------------------------


def _with_nan_padding(case: Case, *, sanitize: bool) -> cases.Problem:
    """The case with NaN in every padding row of q, k, v and dout."""
    problem = cases.build(case)
    packing = problem.arguments["packing"]
    problem.arguments["packing"] = anyattn.Packing(
        packing.cu_seqlens, packing.cu_seqlens_padded, rows=packing.rows, sanitize=sanitize
    )
    for x, real in ((problem.q, problem.real_q), (problem.k, problem.real_k), (problem.v, problem.real_k)):
        x.detach()[~real[0]] = float("nan")
    if problem.dout is not None:
        problem.dout[:, ~problem.real_q[0]] = float("nan")
    return problem


FORMS = ("thd_gaps", "thd_tail", "thd_offset")


def _case(target: Target, form: str, asks: str) -> Case:
    case = Case(target, form, mask="causal", dtype="bfloat16", heads="4/2", dims="64", asks=asks)
    if not cases.takes(case):
        pytest.skip(f"{target.name} does not take {form}")
    return case


@pytest.mark.needs("gaps")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("asks", ["forward", "grad", "lse_grad"])
def test_nan_in_padding_with_sanitize(target: Target, form: str, asks: str) -> None:
    problem = _with_nan_padding(_case(target, form, asks), sanitize=True)
    check(problem, *run(problem))


@pytest.mark.needs("gaps")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("asks", ["forward", "grad", "lse_grad"])
def test_nan_in_padding_without_sanitize(target: Target, form: str, asks: str) -> None:
    """Kernels of FlashAttention 2 read no row outside their sequences: gaps as sequences of their own suffice."""
    if target.backend not in ("fa2", "varlen"):
        pytest.skip("its kernels load whole tiles, or it does not say")
    problem = _with_nan_padding(_case(target, form, asks), sanitize=False)
    check(problem, *run(problem))


@pytest.mark.parametrize(("name", "version"), [("fa4", "4.0.0b36"), ("fa3", "3.0.0")])
def test_nan_in_padding_needs_sanitize(name: str, version: str) -> None:
    """The doubles are as hostile as the kernels: else the tests above would prove nothing."""
    case = Case(double(name, version), "thd_gaps", mask="causal", dtype="bfloat16", dims="64")
    with case.target.machine():
        problem = _with_nan_padding(case, sanitize=False)
        out, _, grads = run(problem)
        assert out[problem.real_q[0]].isnan().any()
        assert not out[~problem.real_q[0]].any(), "padding is zero all the same"
        assert grads["q"][problem.real_q[0]].isnan().any()


# --- pretending ----------------------------------------------------------------------------------------------------


def test_nothing_pretended_stays() -> None:
    q = torch.randn(1, 4, 2, 32, dtype=torch.bfloat16)
    with pretend("sm90", fa4=NEWEST):
        assert anyattn.explain(q, q, q).chosen == "fa4"
        anyattn.attention(q, q, q)
    assert anyattn.explain(q, q, q).chosen == "torch"
    assert not _api._prepared
    assert _environment.arch_of(q.device) == 0
    with pytest.raises(NotImplementedError):
        torch.ops.aten._flash_attention_forward(q, q, q, None, None, 4, 4, 0.0, False, False)


# --- queries long before the first key -----------------------------------------------------------------------------


@pytest.mark.needs("packed", "window")
@pytest.mark.parametrize("window", [(4, None), (None, 3), (3, 5), (40, 3), (2, 40)])
def test_windows_of_queries_long_before_the_first_key(target: Target, window: tuple[int | None, int | None]) -> None:
    """A kernel that takes the longest key length for unbounded, or the other way round, shows or hides keys."""
    queries, keys = (anyattn.Packing.from_lengths(x, device=target.device) for x in ([30, 6, 5], [4, 2, 5]))
    dtype = cases.DTYPES["bfloat16" if "bfloat16" in target.capability.dtypes else "float32"]
    shapes = [(p.rows, 2, 64) for p in (queries, keys, keys)]
    inputs = [torch.randn(shape, dtype=dtype, device=target.device, requires_grad=True) for shape in shapes]
    arguments = {"window": window, "packing": queries, "packing_kv": keys, "return_lse": True}
    if anyattn.explain(*inputs, backend=target.name, **arguments).chosen is None:
        pytest.skip(f"{target.name} does not take it")
    found, exact = [], [x.detach().double().requires_grad_() for x in inputs]
    for given, backend in ((inputs, target.name), (exact, "reference")):
        out, lse = anyattn.attention(*given, backend=backend, **arguments)
        grads = torch.autograd.grad(out.sum(), given)
        found.append([x.detach().double() for x in (out, lse, *grads)])
    assert torch.equal(found[0][1] == float("-inf"), found[1][1] == float("-inf"))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, atol=5e-2, rtol=2e-2)
