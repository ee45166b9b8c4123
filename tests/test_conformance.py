"""Every kernel gives the oracle's answer, for every pair of features that it declares (promise 1)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cases
import oracle
from cases import Case, Problem, Target, lse_to_bhs, to_bshd

INF = float("inf")


def check(problem: Problem, out: Tensor, lse: Tensor | None, grads: dict[str, Tensor]) -> None:
    """Everything that came back, against the oracle; padding exactly."""
    expected = problem.expected()
    out = to_bshd(out, problem.layout)
    oracle.check("out", out, expected)
    padding = ~problem.real_q.to(out.device)
    assert not out[padding].any(), "out is not exactly zero in padding"
    if lse is not None:
        assert lse.dtype == torch.float32
        lse = lse_to_bhs(lse, problem.layout)
        oracle.check("lse", lse, expected)
        assert (lse.transpose(1, 2)[padding] == -INF).all(), "lse is not exactly -inf in padding"
    for name, grad in grads.items():
        leaf = problem.leaves[name]
        assert grad is not None, f"no gradient for {name}"
        assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)
        if name in "qkv":
            grad = to_bshd(grad, problem.layout)
            real = problem.real_q if name == "q" else problem.real_k
            assert not grad[~real.to(grad.device)].any(), f"d{name} is not exactly zero in padding"
        oracle.check(f"d{name}", grad, expected)


def run(problem: Problem, **changes: object) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """(out, lse, gradients by name)."""
    got = problem.call(**changes)
    out, lse = got if isinstance(got, tuple) else (got, None)
    if problem.dout is None:
        return out, lse, {}
    results, incoming = [out], [cases.from_bshd(problem.dout, problem.layout)]
    if problem.dlse is not None:
        assert lse is not None
        results.append(lse)
        incoming.append(problem.dlse.squeeze(0) if problem.layout == "thd" else problem.dlse)
    found = torch.autograd.grad(results, list(problem.leaves.values()), incoming, allow_unused=True)
    return out, lse, dict(zip(problem.leaves, found, strict=True))


def test_same_answer(case: Case) -> None:
    problem = cases.build(case)
    with cases.deterministic_flag(case):
        check(problem, *run(problem))


@pytest.mark.forward_only
def test_every_declared_feature_is_tested(target: Target) -> None:
    """What a kernel declares occurs in a case, alone or with others; else nothing would notice that it is wrong."""
    reached: set[str] = set()
    if target.imagined is not None and not target.imagined.newest:
        pytest.skip("an older version may lack features")
    if target.device == "cuda" and not cases.has_backward(target):
        pytest.skip("a build without a backward may lack other features too")
    for case in cases.pairwise(target):
        with cases.deterministic_flag(case):
            reached |= set(cases.build(case).explain().problem.features())
    elsewhere = {"dropout"}  # test_dropout.py
    if not any(map(cases.takes, cases.with_other_head_dims(target))):
        elsewhere.add("unequal_head_dims")  # a build may lack them
    assert set(target.capability.features) - reached - elsewhere == set()


@pytest.mark.parametrize("scores", [s for s in cases.SCORES if s != "plain"])
def test_every_term_changes_the_answer(scores: str) -> None:
    """A term that changed nothing would let a kernel that drops it pass."""
    target = next(t for t in cases.targets("cpu") if t.name == "reference")
    plain, other = (cases.build(Case(target, scores=s, relation="any")).expected().exact for s in ("plain", scores))
    assert (plain.out - other.out).abs().max() > 1e-3


@pytest.mark.parametrize("mask", [m for m in cases.MASKS if m != "full"])
def test_every_mask_changes_the_answer(mask: str) -> None:
    target = next(t for t in cases.targets("cpu") if t.name == "reference")
    plain, other = (cases.build(Case(target, mask=m, relation="any")).expected().exact for m in ("full", mask))
    assert (plain.out - other.out).abs().max() > 1e-3
