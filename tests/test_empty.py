"""Empty is legal (promise 7): no kernel runs, zeros come out, and gradients are zero, not missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import anyattn
import cases
from cases import Case, Problem, Target
from test_conformance import check, run
from test_padding import padded_case

INF = float("inf")


def dtype_of(target: Target) -> torch.dtype:
    return cases.DTYPES["bfloat16" if "bfloat16" in target.capability.dtypes else "float32"]


def tensors(target: Target, q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> list[Tensor]:
    make = {"dtype": dtype_of(target), "device": target.device, "requires_grad": True}
    return [torch.randn(shape, **make) for shape in (q_shape, k_shape, k_shape)]


DENSE = {
    "no batch": ((0, 5, 2, 64), (0, 5, 2, 64)),
    "no queries": ((2, 0, 2, 64), (2, 5, 2, 64)),
    "no keys": ((2, 5, 2, 64), (2, 0, 2, 64)),
    "nothing": ((0, 0, 2, 64), (0, 0, 2, 64)),
    "no heads": ((2, 5, 0, 64), (2, 5, 0, 64)),
}


@pytest.fixture
def counted(target: Target, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernel's entry points, as they are reached."""
    reached: list[str] = []
    backend = cases.BACKENDS.get(target.backend)
    for way in ("forward", "backward"):
        original = getattr(backend, way)

        def record(*given: Any, way: str = way, original: Any = original) -> Any:
            reached.append(way)
            return original(*given)

        monkeypatch.setattr(backend, way, record)
    return reached


@pytest.mark.needs("dense")
@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("layout", ["bshd", "sbhd", "bhsd"])
def test_empty_dense(target: Target, name: str, layout: str, counted: list[str]) -> None:
    swap = cases._SWAPS[layout]
    shapes = [torch.empty(s).transpose(*swap).shape for s in DENSE[name]]
    q, k, v = tensors(target, *shapes)
    sink = torch.zeros(DENSE[name][0][2], device=target.device, requires_grad=True)
    out, lse = anyattn.attention(q, k, v, layout=layout, sink=sink, backend=target.name, return_lse=True)
    assert out.shape == q.shape
    assert not out.any()
    batch, seq, heads, _ = DENSE[name][0]
    assert lse.shape == (batch, heads, seq)
    assert (lse == 0).all(), "a row that sees no key has the sink's value"
    grads = torch.autograd.grad(out.sum() + lse.sum(), [q, k, v, sink])
    for grad, x in zip(grads, (q, k, v, sink), strict=True):
        assert grad.shape == x.shape
    assert not any(g.any() for g in grads[:3])
    rows = batch * seq
    assert torch.equal(grads[3], torch.full_like(sink, float(rows))), "the sink's gradient is that of its lse"
    assert counted == []


@pytest.mark.needs("dense")
@pytest.mark.parametrize("name", DENSE)
def test_empty_dense_without_a_sink(target: Target, name: str, counted: list[str]) -> None:
    q, k, v = tensors(target, *DENSE[name])
    out, lse = anyattn.attention(q, k, v, backend=target.name, return_lse=True)
    assert not out.any()
    assert (lse == -INF).all()
    grads = torch.autograd.grad(out.sum(), [q, k, v])
    assert not any(g.any() for g in grads)
    assert counted == []


@pytest.mark.needs("packed")
@pytest.mark.parametrize(
    ("q_lengths", "k_lengths"),
    [
        ([], []),
        ([0], [0]),
        ([0, 0, 0], [0, 0, 0]),
        ([0, 0, 0], [3, 2, 4]),
        ([3, 2, 4], [0, 0, 0]),
        ([3, 2, 4], [3, 2, 4]),
    ],
    ids=str,
)
@pytest.mark.parametrize("room", [1, 4])
def test_empty_packed(target: Target, q_lengths: list[int], k_lengths: list[int], room: int) -> None:
    packing, keys = (anyattn.Packing.from_lengths(n, room, device=target.device) for n in (q_lengths, k_lengths))
    more = 3 if room > 1 else 0
    q, k, v = tensors(target, (packing.rows + more, 2, 64), (keys.rows + more, 2, 64))
    out, lse = anyattn.attention(q, k, v, packing=packing, packing_kv=keys, backend=target.name, return_lse=True)
    grads = torch.autograd.grad(out.float().sum(), [q, k, v])
    assert out.shape == q.shape
    assert lse.shape == (2, q.shape[0])
    assert [g.shape for g in grads] == [x.shape for x in (q, k, v)]
    if not (sum(q_lengths) and sum(k_lengths)):
        assert not out.any()
        assert (lse == -INF).all()
        assert not any(g.any() for g in grads)
    else:
        assert torch.isfinite(lse[:, packing.valid.nonzero().flatten()]).all()


@pytest.mark.needs("packed")
@pytest.mark.parametrize("relation", ["equal", "keys_longer"])
def test_one_token_sequences(target: Target, relation: str) -> None:
    """Decoding: every query sequence is one token."""
    case = padded_case(target, "thd", relation=relation, asks="lse_grad")
    problem = cases.build(case)
    lengths_k = [1] * 4 if relation == "equal" else [1, 7, 3, 12]
    packing = anyattn.Packing.from_lengths([1] * 4, device=target.device)
    keys = anyattn.Packing.from_lengths(lengths_k, device=target.device)
    starts = [sum(lengths_k[:i]) for i in range(4)]
    make = {"dtype": problem.dtype, "device": target.device, "requires_grad": True}
    q = torch.randn(4, *problem.q.shape[1:], **make)
    k, v = (torch.randn(sum(lengths_k), *problem.k.shape[1:], **make) for _ in range(2))
    one = Problem(
        q, k, v, {"causal": True, "packing": packing, "packing_kv": keys, "backend": target.name, "return_lse": True},
        [cases.Span(0, i, 1, s, n) for i, (s, n) in enumerate(zip(starts, lengths_k, strict=True))],
        problem.terms, "thd", problem.dtype, None, torch.randn(1, 4, q.shape[1], v.shape[2]),
        torch.randn(1, q.shape[1], 4),
        {"q": q, "k": k, "v": v},
    )  # fmt: skip
    one.dout = one.dout.to(problem.dtype).to(target.device) if one.dout is not None else None
    one.dlse = one.dlse.to(target.device) if one.dlse is not None else None
    check(one, *run(one))


@pytest.mark.needs("dense", "bias", "bias_grad")
def test_empty_bias_and_mask(target: Target) -> None:
    """Where a bias takes part in nothing its gradient is zero."""
    q, k, v = tensors(target, (2, 5, 2, 64), (2, 0, 2, 64))
    bias = torch.zeros(1, 2, 5, 1, dtype=q.dtype, device=q.device, requires_grad=True)
    for shape in ((1, 2, 5, 0), (1, 2, 5, 1)):
        bias = torch.zeros(shape, dtype=q.dtype, device=q.device, requires_grad=True)
        try:
            out = anyattn.attention(q, k, v, bias=bias, backend=target.name)
        except anyattn.ShapeError:
            assert shape[-1] == 1  # 1 broadcasts to 0 keys or is refused; either is fine, silence is not
            continue
        (grad,) = torch.autograd.grad(out.sum(), [bias])
        assert grad.shape == bias.shape
        assert not grad.any()


@pytest.mark.needs("packed")
@pytest.mark.parametrize("form", ["bshd_right", "bhsd_left"])
def test_entries_without_real_rows(target: Target, form: str) -> None:
    """A padded batch in which every entry is all padding."""
    case: Case = padded_case(target, form, asks="lse_grad")
    problem = cases.build(case)
    batch = problem.q.shape[0]
    packing = anyattn.Packing.from_lengths([0] * batch, device=target.device)
    out, lse = problem.call(packing=packing)
    grads = torch.autograd.grad(out.float().sum(), [problem.q, problem.k, problem.v])
    assert not out.any()
    assert (lse == -INF).all()
    assert not any(g.any() for g in grads)


@pytest.mark.needs("packed")
@pytest.mark.parametrize("layout", ["bshd", "sbhd", "bhsd"])
def test_an_empty_padded_batch(target: Target, layout: str) -> None:
    """No entries, of five rows each, and a packing of no sequences: shapes stay what they are."""
    swap = cases._SWAPS[layout]
    q, k, v = tensors(target, *(torch.empty(0, n, 2, 64).transpose(*swap).shape for n in (5, 7)))
    packing = anyattn.Packing.from_lengths([], device=target.device)
    arguments = {
        "layout": layout,
        "packing": packing,
        "packing_kv": packing,
        "backend": target.name,
        "return_lse": True,
    }
    out, lse = anyattn.attention(q, k, v, **arguments)
    assert out.shape == q.shape
    assert lse.shape == (0, 2, 5)
    for grad, x in zip(torch.autograd.grad(out.sum() + lse.sum(), [q, k, v]), (q, k, v), strict=True):
        assert grad.shape == x.shape
