"""Dropout: its distribution, its seed, and a backward with forward's own mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import anyattn
import cases
import oracle
from anyattn import _traced
from anyattn._request import Tensors
from cases import Target
from test_gpu import capture

#: What no kernel rounds: kernels compare 8 random bits, or 4.
RATE = 0.25
FORMS = ("dense", "packed", "padded")


class Batch:
    """A batch for one kernel, whose mask can be read off: as many keys as head dims, and v the identity."""

    def __init__(self, target: Target, form: str = "dense", heads: str = "4", sequences: int = 2) -> None:
        self.target, self.form = target, form
        self.dtype = torch.float32 if "float32" in target.capability.dtypes else torch.bfloat16
        self.keys = 16 if target.device == "cpu" else 96
        self.lengths = [self.keys, self.keys - 3][:sequences] if form != "dense" else [self.keys] * sequences
        self.heads, self.kv_heads = int(heads[0]), int(heads[-1])
        self.arguments: dict[str, Any] = {"backend": target.name}
        self.starts = [0] * sequences
        if form != "dense":
            self.arguments["packing"] = anyattn.Packing.from_lengths(self.lengths, device=target.device)
        if form == "packed":
            self.arguments["layout"] = "thd"
            self.starts = [0, self.keys][:sequences]

    def rows(self, heads: int, *, grad: bool = False) -> Tensor:
        """Normal numbers, as q, k or v."""
        shape = (sum(self.lengths),) if self.form == "packed" else (len(self.lengths), self.keys)
        x = torch.randn(*shape, heads, self.keys, dtype=self.dtype, device=self.target.device)
        return x.requires_grad_(grad)

    def identity(self) -> Tensor:
        """As v: row j of a sequence is the j-th unit vector."""
        unit = torch.eye(self.keys, dtype=self.dtype, device=self.target.device)
        parts = [unit[:n] for n in (self.lengths if self.form == "packed" else [self.keys] * len(self.lengths))]
        v = torch.cat(parts) if self.form == "packed" else torch.stack(parts)
        return v.unsqueeze(-2).repeat(*(1,) * (v.ndim - 1), self.kv_heads, 1)

    def takes(self, **more: Any) -> bool:
        """Whether the kernel takes dropout here, with gradients."""
        q, k = self.rows(self.heads, grad=True), self.rows(self.kv_heads)
        explanation = anyattn.explain(q, k, k, dropout=RATE, return_lse=True, **self.arguments, **more)
        return explanation.chosen == self.target.backend

    def keep(self, seed: int, call: Callable[..., Any] = anyattn.attention, **more: Any) -> Tensor:
        """Dropout's factor of every score under a seed, (sequences, H, K, K), 0 where there is none.

        With q zero the probabilities are those of the bias alone, which lse tells; v shows what is left of them.
        """
        torch.manual_seed(seed)
        q, k = torch.zeros_like(self.rows(self.heads)), torch.zeros_like(self.rows(self.kv_heads))
        torch.manual_seed(seed)
        out, lse = call(q, k, self.identity(), dropout=RATE, return_lse=True, **self.arguments, **more)
        scores = torch.zeros(()) if more.get("bias") is None else more["bias"].detach().float().cpu()
        out, lse = self.by_sequence(out), self.lse_by_sequence(lse)
        p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, torch.inf)[..., None])
        return torch.where(out > 0.5 * p, 1 / (1 - RATE), 0.0)

    def by_sequence(self, x: Tensor) -> Tensor:
        """(sequences, H, K, D) on the CPU, zero where there is no row."""
        return self._stacked(x.detach().float().cpu() if self.form != "packed" else x.detach().float().cpu()[None], 1)

    def lse_by_sequence(self, x: Tensor) -> Tensor:
        """(sequences, H, K) on the CPU."""
        x = x.detach().cpu()
        x = x.T[None] if self.form == "packed" else x.transpose(1, 2)
        return self._stacked(x[..., None], 1, -torch.inf)[..., 0]

    def _stacked(self, x: Tensor, dim: int, fill: float = 0.0) -> Tensor:
        found = torch.full((len(self.lengths), self.keys, *x.shape[2:]), fill)
        for i, (start, n) in enumerate(zip(self.starts, self.lengths, strict=True)):
            found[i, :n] = x[0 if self.form == "packed" else i].narrow(0, start, n)
        return found.transpose(dim, dim + 1)

    def expected(self, tensors: dict[str, Tensor], keep: Tensor, causal: bool, *incoming: Tensor) -> oracle.Expected:
        """The oracle's answer with this very mask; ``incoming`` are dout and dlse, as the call has them."""
        packed, lengths = self.form == "packed", self.lengths
        spans = [
            oracle.Span(*((0, s, n, s, n) if packed else (i, 0, n, 0, n)))
            for i, (s, n) in enumerate(zip(self.starts, lengths, strict=True))
        ]
        dout, dlse = (x[None] if packed else x for x in incoming)
        given = {n: x[None] if packed and n in "qkv" else x for n, x in tensors.items()}
        if packed:
            whole = torch.zeros(1, self.heads, sum(lengths), sum(lengths))
            for i, span in enumerate(spans):
                rows = slice(span.start_q, span.start_q + span.len_q)
                whole[0, :, rows, rows] = keep[i, :, : span.len_q, : span.len_k]
            keep = whole
        dlse = dlse.cpu().masked_fill(~torch.isfinite(dlse.cpu()), 0)
        found = oracle.Expected(self.dtype, given, spans, oracle.Terms(causal=causal), dout, dlse, None, keep)
        name = str(self.dtype).removeprefix("torch.")
        found.product_error = self.target.capability.product_error.get(name, 0.0)
        return found


def through_the_op(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, **given: Any) -> Any:
    """``attention`` as torch.compile sees it: through the custom op, its seed drawn outside of the kernel."""
    tensors = Tensors(q, k, v, None, None, given.get("bias"), None, given.get("packing"), None)
    return _traced.attention(
        tensors, given.get("causal"), None, None, None, given["dropout"], given.get("layout"), given["backend"], None,
        return_lse,
    )  # fmt: skip


WAYS: dict[str, Callable[..., Any]] = {"eager": anyattn.attention, "op": through_the_op}


@pytest.fixture(params=FORMS)
def batch(request: pytest.FixtureRequest, target: Target, _machine: None) -> Batch:
    """A batch of each form that the kernel takes with dropout."""
    found = Batch(target, request.param)
    if not found.takes():
        pytest.skip(f"{target.name} has no dropout there")
    return found


def test_every_kernel_that_declares_dropout_is_tested(target: Target) -> None:
    """Else everything below might be skipped."""
    if "dropout" in target.capability.features:
        assert any(Batch(target, form).takes() for form in FORMS)


@pytest.mark.needs("dropout")
def test_dropout_has_its_distribution(batch: Batch) -> None:
    """Each weight is 0 with the probability asked, else scaled by 1 / (1 - p), and they are independent."""
    if batch.form != "dense":
        pytest.skip("shown by dense batches") if Batch(batch.target).takes() else None
        batch = Batch(batch.target, batch.form, sequences=1)
    torch.manual_seed(0)
    q, k, v = torch.zeros_like(batch.rows(4)), batch.rows(4), batch.identity()
    draws = []
    for seed in range(12):
        torch.manual_seed(seed)
        draws.append(batch.by_sequence(anyattn.attention(q, k, v, dropout=RATE, **batch.arguments)) * batch.keys)
    found = torch.stack(draws).double()
    kept = found > 0
    torch.testing.assert_close(found[kept], torch.full_like(found[kept], 1 / (1 - RATE)), rtol=1e-2, atol=0)
    n = kept.numel()
    sigma = (RATE * (1 - RATE) / n) ** 0.5
    assert abs((~kept).double().mean() - RATE) < 5 * sigma
    centred = kept.double() - (1 - RATE)
    for dim in range(centred.ndim):
        if centred.shape[dim] > 1:
            correlation = (centred * centred.roll(1, dim)).mean() / (RATE * (1 - RATE))
            assert abs(correlation) < 5 / n**0.5, f"neighbours along dim {dim} are correlated"


@pytest.mark.needs("dropout")
def test_dropout_keeps_the_mean(batch: Batch) -> None:
    torch.manual_seed(0)
    q, k, v = (batch.rows(4) for _ in range(3))
    plain = batch.by_sequence(anyattn.attention(q, k, v, **batch.arguments))
    draws = torch.stack(
        [batch.by_sequence(anyattn.attention(q, k, v, dropout=RATE, **batch.arguments)) for _ in range(200)]
    )
    error = (draws.mean(0) - plain).abs()
    rounding = 2 * torch.finfo(batch.dtype).eps * plain.abs().max()
    assert (error < 5.5 * draws.std(0) / 200**0.5 + rounding).all()


@pytest.mark.needs("dropout")
def test_dropout_leaves_lse_alone(batch: Batch) -> None:
    """It comes after the softmax."""
    q, k, v = (batch.rows(4) for _ in range(3))
    _, lse = anyattn.attention(q, k, v, dropout=RATE, return_lse=True, **batch.arguments)
    _, plain = anyattn.attention(q, k, v, return_lse=True, **batch.arguments)
    torch.testing.assert_close(lse, plain)


@pytest.mark.needs("dropout")
@pytest.mark.parametrize("way", WAYS)
def test_dropout_repeats_by_seed(batch: Batch, way: str) -> None:
    first, again, other = (batch.keep(seed, WAYS[way]) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.needs("dropout")
@pytest.mark.parametrize("way", WAYS)
def test_dropout_differs_from_call_to_call(batch: Batch, way: str) -> None:
    q, k = batch.rows(4), batch.rows(4)
    one, two = (WAYS[way](q, k, k, dropout=RATE, **batch.arguments) for _ in range(2))
    assert not torch.equal(one, two)


def test_dropout_of_0_drops_nothing(target: Target) -> None:
    case = cases.Case(target, "bshd", dtype=target.capability.dtypes[0], dims="64", asks="out")
    if not cases.takes(case):
        case = replace(case, form="thd")
    problem = cases.build(case)
    assert torch.equal(problem.call(dropout=0.0), problem.call())


@pytest.mark.needs("dropout")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("heads", "terms"), [("4", "full"), ("4/2", "causal"), ("4", "causal"), ("4", "bias")])
def test_dropout_gradients_use_the_mask_of_forward(batch: Batch, heads: str, terms: str, way: str) -> None:
    """Against the oracle with the very mask that forward used, shown by a call with the same seed."""
    batch, call, causal = Batch(batch.target, batch.form, heads), WAYS[way], terms != "full"
    tensors = {n: batch.rows(h, grad=True) for n, h in (("q", batch.heads), ("k", batch.kv_heads))}
    tensors["v"] = batch.rows(batch.kv_heads, grad=True)
    more: dict[str, Any] = {"causal": causal}
    if terms == "bias":
        bias = torch.randn(batch.heads, batch.keys, batch.keys, dtype=batch.dtype, device=batch.target.device)
        more["bias"] = tensors["bias"] = bias.requires_grad_("bias_grad" in batch.target.capability.features)
    if (terms == "bias" and batch.form == "packed") or not batch.takes(**more):
        pytest.skip("the kernel does not take it")
    keep = batch.keep(7, call, **more)
    torch.manual_seed(7)
    out, lse = call(*(tensors[n] for n in "qkv"), dropout=RATE, return_lse=True, **batch.arguments, **more)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse).masked_fill(~torch.isfinite(lse), 0)
    wanted = {n: x for n, x in tensors.items() if x.requires_grad}
    grads = torch.autograd.grad((out, lse), list(wanted.values()), (dout, dlse))
    expected = batch.expected(tensors, keep, causal, dout, dlse)
    oracle.check("out", out[None] if batch.form == "packed" else out, expected)
    for name, grad in zip(wanted, grads, strict=True):
        oracle.check(f"d{name}", grad[None] if batch.form == "packed" and name in "qkv" else grad, expected)


@pytest.mark.needs("dropout")
@pytest.mark.parametrize("way", WAYS)
def test_a_checkpointed_dropout_repeats_its_mask(batch: Batch, way: str) -> None:
    """What activation checkpointing computes again is what was computed before."""
    leaves = [batch.rows(4, grad=True) for _ in range(3)]

    def call(*qkv: Tensor) -> Tensor:
        return WAYS[way](*qkv, dropout=RATE, **batch.arguments)

    def gradients(out: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(out, leaves, torch.ones_like(out))
        return [batch.by_sequence(x) for x in found]

    torch.manual_seed(5)
    plain = call(*leaves)
    torch.manual_seed(5)
    again = checkpoint(call, *leaves, use_reentrant=False)
    assert torch.equal(plain, again)
    torch.manual_seed(6)  # whatever is drawn in between
    for found, wanted in zip(gradients(again), gradients(plain), strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.needs("dropout")
@pytest.mark.parametrize("form", ["dense", "packed"])
def test_a_captured_dropout_draws_anew_at_every_replay(cuda_target: Target, form: str) -> None:
    """v is the identity, so that out shows what was kept, and dv must be that, transposed, times dout."""
    batch = Batch(cuda_target, form)
    if not batch.takes():
        pytest.skip(f"{cuda_target.name} has no dropout there")
    q, k, v = torch.zeros_like(batch.rows(4)), batch.rows(4), batch.identity().requires_grad_()
    dout = torch.randn_like(q)

    def work() -> tuple[Tensor, Tensor]:
        out = anyattn.attention(q, k, v, dropout=RATE, **batch.arguments)
        return out, torch.autograd.grad(out, v, dout)[0]

    graph, (out, dv) = capture(work)
    seen = []
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        seen.append(batch.by_sequence(out))
        wanted = seen[-1].transpose(2, 3) @ batch.by_sequence(dout)
        torch.testing.assert_close(batch.by_sequence(dv), wanted, rtol=2e-2, atol=2e-2)
    assert not torch.equal(*seen)


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
