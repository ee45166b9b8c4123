"""Dropout: its distribution, its seed, and a backward with forward's own mask."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import anyattn
import cases
import oracle
from cases import Target

RATE = 0.3


@pytest.fixture
def dropping(target: Target) -> Target:
    """A kernel that drops."""
    return target


def factors(target: Target, seed: int, *, packing: anyattn.Packing | None = None, rows: int = 16) -> Tensor:
    """The factor of each probability, (B, H, S, K): with v the identity and equal scores, out times K shows it."""
    torch.manual_seed(seed)
    dtype = cases.DTYPES[target.capability.dtypes[-1]]
    q = torch.zeros(2, rows, 3, rows, dtype=dtype, device=target.device)
    v = torch.eye(rows, dtype=dtype, device=target.device)[None, :, None].expand(2, -1, 3, -1)
    out = anyattn.attention(q, q, v, dropout=RATE, backend=target.name, packing=packing)
    return out.transpose(1, 2) * rows


@pytest.mark.needs("dropout", "dense")
def test_dropout_has_its_distribution(dropping: Target) -> None:
    """Each weight is 0 with the probability asked, else scaled by 1 / (1 - p), and they are independent."""
    found = torch.stack([factors(dropping, seed) for seed in range(12)]).double().cpu()
    kept = found > 0
    torch.testing.assert_close(found[kept], torch.full_like(found[kept], 1 / (1 - RATE)), rtol=1e-2, atol=0)
    n = kept.numel()
    sigma = (RATE * (1 - RATE) / n) ** 0.5
    assert abs((~kept).double().mean() - RATE) < 5 * sigma
    centred = kept.double() - (1 - RATE)
    for dim in range(centred.ndim):
        other = centred.roll(1, dim)
        correlation = (centred * other).mean() / (RATE * (1 - RATE))
        assert abs(correlation) < 5 / n**0.5, f"neighbours along dim {dim} are correlated"


@pytest.mark.needs("dropout", "dense")
def test_dropout_keeps_the_mean(dropping: Target) -> None:
    q, k, v = (torch.randn(1, 6, 2, 16, device=dropping.device, dtype=torch.float32) for _ in range(3))
    plain = anyattn.attention(q, k, v, backend=dropping.name)
    torch.manual_seed(0)
    draws = torch.stack([anyattn.attention(q, k, v, dropout=RATE, backend=dropping.name) for _ in range(400)])
    error = (draws.mean(0) - plain).abs()
    assert (error < 5 * draws.std(0) / 20 + 1e-6).all()


@pytest.mark.needs("dropout", "dense")
def test_dropout_leaves_lse_alone(dropping: Target) -> None:
    """It comes after the softmax."""
    q, k, v = (torch.randn(1, 6, 2, 16, device=dropping.device) for _ in range(3))
    _, lse = anyattn.attention(q, k, v, dropout=RATE, backend=dropping.name, return_lse=True)
    _, plain = anyattn.attention(q, k, v, backend=dropping.name, return_lse=True)
    torch.testing.assert_close(lse, plain)


@pytest.mark.needs("dropout", "dense")
def test_dropout_repeats_by_seed(dropping: Target) -> None:
    first, again, other = (factors(dropping, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.needs("dropout", "dense")
def test_dropout_differs_from_call_to_call(dropping: Target) -> None:
    torch.manual_seed(3)
    q = torch.randn(1, 6, 2, 16, device=dropping.device)
    assert not torch.equal(*(anyattn.attention(q, q, q, dropout=RATE, backend=dropping.name) for _ in range(2)))


def test_dropout_of_0_drops_nothing(target: Target) -> None:
    case = cases.Case(target, "bshd", dtype=target.capability.dtypes[0], dims="64")
    if not cases.takes(case):
        case = replace(case, form="thd")
    problem = cases.build(case)
    assert torch.equal(problem.call(dropout=0.0), problem.call())


@pytest.mark.needs("dropout", "dense")
@pytest.mark.parametrize("packed", [False, True])
def test_dropout_gradients_use_the_mask_of_forward(dropping: Target, packed: bool) -> None:
    """Against the oracle with the very mask that forward used, shown by a call with the same seed."""
    rows = 8
    packing = anyattn.Packing.from_lengths([8, 5], device=dropping.device) if packed else None
    keep = _keep_mask(dropping, rows, packing)
    leaves = [torch.randn(2, rows, 3, rows, device=dropping.device, requires_grad=True) for _ in range(3)]
    bias = torch.randn(3, rows, rows, device=dropping.device, requires_grad="bias_grad" in dropping.capability.features)
    torch.manual_seed(7)
    out, lse = anyattn.attention(
        *leaves, bias=bias, causal=True, dropout=RATE, backend=dropping.name, packing=packing, return_lse=True
    )
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    finite = torch.isfinite(lse)
    wanted = [*leaves, bias] if bias.requires_grad else leaves
    grads = torch.autograd.grad((out, lse), wanted, (dout, torch.where(finite, dlse, 0)))
    spans = [oracle.Span(i, 0, n, 0, n) for i, n in enumerate([8, 5] if packed else [8, 8])]
    tensors = dict(zip(("q", "k", "v", "bias"), (*leaves, bias), strict=True))
    expected = oracle.Expected(torch.float32, tensors, spans, oracle.Terms(causal=True), dout, dlse, None, keep.cpu())
    oracle.check("out", out, expected)
    for name, grad in zip(("dq", "dk", "dv", "dbias"), grads, strict=False):
        oracle.check(name, grad, expected)


def _keep_mask(target: Target, rows: int, packing: anyattn.Packing | None) -> Tensor:
    """The factor of each score under seed 7, for 2 entries of these rows and 3 heads."""
    torch.manual_seed(7)
    q = torch.zeros(2, rows, 3, rows, device=target.device)
    v = torch.eye(rows, device=target.device)[None, :, None].expand(2, -1, 3, -1).contiguous()
    out, lse = anyattn.attention(q, q, v, dropout=RATE, backend=target.name, packing=packing, return_lse=True)
    keep = out.transpose(1, 2) * lse.exp().nan_to_num(posinf=0.0)[..., None]  # probabilities are exp(0 - lse)
    return keep


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_dropout_gradients_by_finite_differences(form: str) -> None:
    """With one seed, out is a differentiable function of q, k, v: its gradient is the reference's."""
    packing = anyattn.Packing.from_lengths([2, 0, 3], 4) if form == "packed" else None
    shape = (packing.rows, 2, 3) if packing is not None else (2, 4, 2, 3)
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(11)
        return anyattn.attention(q, k, v, dropout=0.4, packing=packing, backend="reference")

    assert torch.autograd.gradcheck(call, leaves)
