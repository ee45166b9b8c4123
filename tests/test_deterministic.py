"""``deterministic=True`` means bitwise (promise 6), forward and backward, or no kernel is found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import anyattn
import cases
from cases import Case, Target
from test_padding import everything

FORMS = ("bshd", "thd_gaps", "bhsd_left")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scores", ["plain", "sink", "bias_grad", "softcap"])
def test_deterministic_repeats_bit_by_bit(target: Target, form: str, scores: str) -> None:
    """With other work in between, and memory handed out anew."""
    dtype = target.capability.dtypes[0]
    case = Case(target, form, mask="causal", scores=scores, dtype=dtype, heads="4/2", dims="64", asks="deterministic")
    if not cases.takes(case) and not cases.takes(case := replace(case, heads="4")):
        pytest.skip(f"{target.name} does not take {form} with {scores} deterministically")
    problem = cases.build(case)
    with cases.deterministic_flag(case):
        assert problem.explain().problem.deterministic
        first = everything(problem)
        for _ in range(5):
            junk = torch.randn(1 << 16, device=target.device).sort()
            assert all(map(torch.equal, first, everything(problem)))
            del junk


def test_a_kernel_that_reads_torchs_flag_is_a_candidate_only_while_it_is_on(target: Target) -> None:
    """torch's kernels look at it in backward by themselves; the reason's remedy names it."""
    if not target.capability.reads_torch_flag:
        pytest.skip("it takes determinism as an argument, or has nothing else")
    form = "bshd" if "dense" in target.capability.features else "thd"
    case = Case(target, form, dtype=target.capability.dtypes[0], dims="64", asks="deterministic")
    problem = cases.build(case)
    with pytest.raises(anyattn.NoBackend, match=r"torch\.use_deterministic_algorithms"):
        problem.call()
    torch.use_deterministic_algorithms(True)
    problem.call()


def test_a_kernel_without_a_deterministic_backward_is_refused(target: Target) -> None:
    if "deterministic" in target.capability.features:
        pytest.skip("it has one")
    form = "bshd" if "dense" in target.capability.features else "thd"
    problem = cases.build(Case(target, form, dtype=target.capability.dtypes[0], dims="64", asks="deterministic"))
    torch.use_deterministic_algorithms(True)
    with pytest.raises(anyattn.NoBackend, match="deterministic"):
        problem.call()


def test_the_default_is_torchs_flag() -> None:
    x = torch.randn(1, 5, 2, 8, requires_grad=True)
    assert not anyattn.explain(x, x, x).problem.deterministic
    torch.use_deterministic_algorithms(True)
    assert anyattn.explain(x, x, x).problem.deterministic
    assert not anyattn.explain(x, x, x, deterministic=False).problem.deterministic
