"""All ranks' results against the oracle's answer for the whole batch, which knows nothing of ranks."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

import oracle
from cases import DTYPES
from context_cases import ContextCase, build
from context_ranks import Found

INF = float("inf")


@functools.lru_cache(maxsize=256)
def _expected(case: ContextCase, device: str) -> oracle.Expected:
    whole = build(case)
    dout, dlse = whole.dout, whole.dlse
    real = whole.real(whole.q_side)
    if dlse is not None:  # the oracle multiplies before it masks
        dlse = dlse.masked_fill(~real[:, None], 0)
    clean = {
        n: x.masked_fill(~whole.real(side)[..., None, None], 0)
        for n, side in (("q", whole.q_side), ("k", whole.k_side), ("v", whole.k_side))
        if (x := whole.tensors[n]) is not None
    }
    tensors = {n: None if x is None else x.to(device) for n, x in {**whole.tensors, **clean}.items()}
    return oracle.Expected(DTYPES[case.dtype], tensors, whole.spans, case.terms, dout, dlse, whole.mask)


def expected(case: ContextCase, device: str = "cpu") -> oracle.Expected:
    """The oracle's answer for the whole batch. The plain implementation's errors are those of the device."""
    plain = ContextCase()
    kept = ("lengths", "keys", "batch", "gap", "first", "terms", "scores", "heads", "dims", "dtype", "seed")
    asks = {"deterministic": "grad", "out": "forward"}.get(case.asks, case.asks)
    return _expected(replace(plain, asks=asks, **{n: getattr(case, n) for n in kept}), device)


def judge(case: ContextCase, found: list[Found], device: str = "cpu", product_error: float = 0.0) -> None:
    """All ranks' results against the oracle.

    Args:
        case: what they ran.
        found: by rank.
        device: where the plain implementation runs, whose error sets the tolerance.
        product_error: of a kernel whose products are coarser than the dtype, as it declares.

    Raises:
        AssertionError: with what differs.
    """
    whole, answer = build(case), expected(case, device)
    answer.product_error = product_error
    for rank, other in enumerate(found):
        assert not other.unclean, f"rank {rank}: padding of {other.unclean} is not exact"
        assert torch.equal(other.out, found[0].out), f"ranks 0 and {rank} see another whole"
        assert other.rows == found[0].rows
    _exact("out", found[0].out, whole.real(whole.q_side), 0.0)
    oracle.check("out", found[0].out, answer)
    if case.asks in ("lse_grad", "forward"):
        lse = found[0].lse
        assert lse is not None
        assert lse.dtype == torch.float32
        _exact("lse", lse.transpose(1, 2)[..., None], whole.real(whole.q_side), -INF)
        oracle.check("lse", lse, answer)
    if whole.dout is None:
        return
    for name in found[0].grads:
        grad = summed([f.grads[name] for f in found])
        if name in "qkv":
            side = whole.q_side if name == "q" else whole.k_side
            if case.is_packed:
                assert not grad[side.rows :].any(), f"d{name} is not zero beyond the packing"
                grad = grad[None, : side.rows]
            _exact(f"d{name}", grad, whole.real(side), 0.0)
        else:
            parts = torch.stack([f.grads[name].double() for f in found])
            grad = _without_roundings(parts, answer.field(f"d{name}"), found[0].grads[name].dtype)
        oracle.check(f"d{name}", grad, answer)


def _without_roundings(parts: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of parts of a replicated tensor's gradient, less what the rounding of each part explains."""
    allowed = parts.abs().sum(0) * (torch.finfo(dtype).eps / 2)
    error = parts.sum(0) - exact
    return (exact + error - torch.minimum(torch.maximum(error, -allowed), allowed)).to(dtype)


def summed(parts: list[Tensor]) -> Tensor:
    """The sum of all ranks' parts, rounded once."""
    return torch.stack([x.double() for x in parts]).sum(0).to(parts[0].dtype)


def _exact(name: str, x: Tensor, real: Tensor, value: float) -> None:
    padding = x[~real]
    assert (padding == value).all(), f"{name} is not exactly {value} in padding"
