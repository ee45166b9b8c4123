"""Gradients: gradcheck, lse, sink and bias, dtypes, and the ways of calling that are refused."""

from __future__ import annotations

import contextlib
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
from anyattn import Packing, Unsupported
from cases import Case, Target
from test_conformance import run
from test_padding import padded_case

INF = float("inf")
F64 = {"dtype": torch.float64, "requires_grad": True}


def float64_targets() -> list[str]:
    return [t.name for t in cases.targets("cpu") if "float64" in t.capability.dtypes]


def leaves(rows: tuple[int, ...], keys: tuple[int, ...], dim_v: int | None = None) -> list[Tensor]:
    """q, k, v in float64."""
    q, k = torch.randn(rows, **F64), torch.randn(keys, **F64)
    return [q, k, torch.randn(*keys[:-1], dim_v or keys[-1], **F64)]


GRADCHECKS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window": (1, 1)},
    "softcap": {"softcap": 0.7},
    "alibi": {"causal": True, "alibi_slopes": torch.tensor([0.3, 0.7], dtype=torch.float64)},
    "mask": {"mask": torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])},
}


@pytest.mark.parametrize("name", float64_targets())
@pytest.mark.parametrize("what", GRADCHECKS)
@pytest.mark.parametrize("lse", [False, True])
def test_gradcheck_dense(name: str, what: str, lse: bool) -> None:
    arguments = GRADCHECKS[what]
    q, k, v = leaves((2, 3, 2, 3), (2, 4, 1, 3), 2)
    sink = torch.randn(2, **F64)

    def call(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> tuple[Tensor, ...]:
        got = anyattn.attention(q, k, v, sink=sink, backend=name, return_lse=lse, **arguments)
        # lse is float32: too coarse for finite differences, so it is checked against the oracle instead
        return (got[0],) if lse else (got,)

    try:
        anyattn.attention(q, k, v, backend=name, **arguments)
    except anyattn.NoBackend:
        pytest.skip(f"{name} has no {what}")
    assert torch.autograd.gradcheck(call, (q, k, v, sink))


@pytest.mark.parametrize("name", float64_targets())
@pytest.mark.parametrize("gap", [1, 4])
def test_gradcheck_packed(name: str, gap: int) -> None:
    packing, keys = Packing.from_lengths([2, 0, 3], gap), Packing.from_lengths([4, 2, 3], gap)
    q, k, v = leaves((packing.rows + 1, 2, 3), (keys.rows, 1, 3))
    call = lambda *x: anyattn.attention(*x, causal=True, packing=packing, packing_kv=keys, backend=name)  # noqa: E731
    assert torch.autograd.gradcheck(call, (q, k, v))


def test_gradcheck_bias() -> None:
    q, k, v = leaves((2, 3, 2, 3), (2, 4, 2, 3))
    for shape in ((2, 2, 3, 4), (3, 4), (1, 2, 1, 4), (2, 1, 3, 1), ()):
        bias = torch.randn(shape, **F64)
        call = lambda *x: anyattn.attention(*x[:3], bias=x[3], backend="reference")  # noqa: E731
        assert torch.autograd.gradcheck(call, (q, k, v, bias))


@pytest.mark.parametrize("form", ["bshd", "thd_gaps", "bhsd_left"])
@pytest.mark.parametrize("scores", ["plain", "sink"])
def test_the_gradient_of_lse_alone(target: Target, form: str, scores: str) -> None:
    """A loss of lse only: dv is zero, dq and dk and dsink are the oracle's."""
    case = Case(target, form, "any", "causal", scores, target.capability.dtypes[0], "4", "64", "lse_grad")
    case = first_taken(case, replace(case, relation="equal"))
    problem = cases.build(case)
    assert problem.dout is not None
    problem.dout = torch.zeros_like(problem.dout)
    _, _, grads = run(problem)
    expected = problem.expected()
    for name, grad in grads.items():
        actual = cases.to_bshd(grad, problem.layout) if name in "qkv" else grad
        oracle.check(f"d{name}", actual, expected)
    assert not grads["v"].any()
    assert grads["q"].any()


def test_an_unused_lse_costs_no_gradient(target: Target) -> None:
    """return_lse=True without a gradient of lse gives what return_lse=False gives."""
    case = padded_case(target, "thd_gaps") if "packed" in target.capability.features else padded_bshd(target)
    problem = cases.build(case)
    assert problem.dout is not None
    dout = cases.from_bshd(problem.dout, problem.layout)
    inputs = list(problem.leaves.values())
    out = problem.call()
    first = torch.autograd.grad(out, inputs, dout)
    also, lse = problem.call(return_lse=True)
    assert lse.requires_grad
    second = torch.autograd.grad(also, inputs, dout)
    assert torch.equal(out, also)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


def first_taken(*wanted: Case) -> Case:
    """The first that its kernel takes."""
    for case in wanted:
        if cases.takes(case):
            return case
    pytest.skip(f"{wanted[0].target.name} does not take {wanted[0].form}")


def padded_bshd(target: Target) -> Case:
    """A dense case."""
    return Case(target, dtype=target.capability.dtypes[0], dims="64")


@pytest.mark.needs("packed")
def test_lse_of_a_row_without_keys_takes_any_gradient(target: Target) -> None:
    """-inf may receive an infinite or NaN gradient: it goes nowhere."""
    case = padded_case(target, "thd", relation="any", asks="lse_grad")
    problem = cases.build(case)
    out, lse = problem.call()
    dead = lse == -INF
    assert dead.any()
    dlse = torch.where(dead, torch.full_like(lse, float("nan")), torch.ones_like(lse))
    for grad in torch.autograd.grad((out, lse), list(problem.leaves.values()), (torch.zeros_like(out), dlse)):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("which", ["q", "k", "v", "sink", "bias"])
def test_each_gradient_alone(which: str) -> None:
    """Only what asks gets one; the others stay None."""
    given = {n: torch.randn(2, 5, 4, 8) for n in "qkv"} | {"sink": torch.randn(4), "bias": torch.randn(4, 5, 5)}
    every = {n: x.clone().requires_grad_() for n, x in given.items()}
    one = {n: x.clone().requires_grad_(n == which) for n, x in given.items()}
    for tensors in (every, one):
        out, lse = anyattn.attention(**tensors, causal=True, return_lse=True, backend="reference")
        (out.square().sum() + lse.sum()).backward()
    assert all((x.grad is not None) == (n == which) for n, x in one.items())
    torch.testing.assert_close(one[which].grad, every[which].grad)


def test_no_gradient_wanted_none_made() -> None:
    q, k, v = torch.randn(3, 2, 5, 4, 8).unbind()
    assert not anyattn.attention(q, k, v).requires_grad
    q.requires_grad_()
    with torch.no_grad():
        assert not anyattn.attention(q, k, v).requires_grad
    with torch.inference_mode():
        assert not anyattn.attention(q, k, v).requires_grad
    assert anyattn.attention(q, k, v).requires_grad


def test_inference_tensors_may_enter_without_gradients() -> None:
    with torch.inference_mode():
        q, k, v = torch.randn(3, 2, 5, 4, 8).unbind()
        packing = Packing.from_lengths([5, 3])
        inside = anyattn.attention(q, k, v, packing=packing)
    with torch.no_grad():
        assert torch.equal(anyattn.attention(q, k, v, packing=packing), inside)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("leaf", ["float16", "bfloat16", "float32", "float64"])
def test_sinks_of_any_dtype(dtype: str, leaf: str) -> None:
    """Used in float32, or float64 when q is; the gradient comes in the sink's own dtype."""
    q, k, v = (torch.randn(2, 5, 4, 8, dtype=cases.DTYPES[dtype]) for _ in range(3))
    sink = torch.randn(4, dtype=cases.DTYPES[leaf]).requires_grad_()
    out = anyattn.attention(q, k, v, sink=sink)
    assert out.dtype == q.dtype
    (grad,) = torch.autograd.grad(out.double().square().sum(), [sink])
    assert grad.dtype == sink.dtype
    tensors = {"q": q, "k": k, "v": v, "sink": sink}
    dout = 2 * out.detach()
    expected = oracle.Expected(q.dtype, tensors, oracle.dense_spans(2, 5, 5), oracle.Terms(), dout)
    oracle.check("dsink", grad, expected)


def test_a_sink_of_minus_infinity_is_none() -> None:
    q, k, v = torch.randn(3, 1, 5, 2, 8).unbind()
    sink = torch.full((2,), -INF, requires_grad=True)
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    out, lse = anyattn.attention(q, k, v, sink=sink, mask=mask, return_lse=True)
    plain, plain_lse = anyattn.attention(q, k, v, mask=mask, return_lse=True)
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(lse, plain_lse)
    (grad,) = torch.autograd.grad(out.sum(), [sink])
    assert not grad.any()


# --- strides and layouts -------------------------------------------------------------------------------------------


def strided(x: Tensor, kind: str) -> Tensor:
    """The same values in other strides."""
    if kind == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "every second row":
        return x.repeat_interleave(2, dim=0)[::2]
    if kind == "last dim strided":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    if kind == "slice of qkv":
        return torch.cat([x, x, x], dim=-2)[..., : x.shape[-2], :]
    return x[:1].expand(x.shape)


STRIDES = ["transposed", "every second row", "last dim strided", "slice of qkv", "expanded"]


@pytest.mark.parametrize("kind", STRIDES)
@pytest.mark.parametrize("form", ["bshd", "thd_gaps"])
def test_strides_do_not_matter(target: Target, kind: str, form: str) -> None:
    """q, k, v and the incoming gradient of any strides give what contiguous ones give."""
    case = Case(target, form, mask="causal", dtype=target.capability.dtypes[0], dims="64", asks="lse_grad")
    case = first_taken(case)
    problem = cases.build(case, garbage=1.0)
    assert problem.dout is not None
    given = [strided(x.detach(), kind) for x in (problem.q, problem.k, problem.v)]
    dout = strided(cases.from_bshd(problem.dout, problem.layout), kind)
    results = []
    for make in (lambda x: x, Tensor.contiguous):
        inputs = [make(x).detach().requires_grad_() for x in given]
        out, lse = anyattn.attention(*inputs, **problem.arguments)
        results.append((out, lse, *torch.autograd.grad(out, inputs, make(dout))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_gradient_of_sum_is_expanded_and_taken(target: Target) -> None:
    """out.sum().backward() hands over a gradient with strides of 0."""
    case = Case(target, "bshd", dtype=target.capability.dtypes[0], dims="64")
    if not cases.takes(case):
        case = Case(target, "thd", dtype=target.capability.dtypes[0], dims="64")
    problem = cases.build(case)
    inputs = list(problem.leaves.values())
    first = torch.autograd.grad(problem.call().sum(), inputs)
    second = torch.autograd.grad(out := problem.call(), inputs, torch.ones_like(out))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of torch's own forward mode
def test_forward_derivatives_are_refused() -> None:
    """By two backward passes, where the first one's gradient is what is differentiated; and in forward mode."""
    q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2, 8)
    with pytest.raises(Unsupported, match="double backward"):
        torch.autograd.functional.jvp(lambda x: anyattn.attention(x, k, k), q, torch.ones_like(q))
    with torch.autograd.forward_ad.dual_level():
        anyattn.attention(q, k, k)  # nothing to lose
        dual = torch.autograd.forward_ad.make_dual(k, torch.ones_like(k))
        with pytest.raises(Unsupported, match="forward-mode"):
            anyattn.attention(q, k, dual)


def test_a_sink_that_is_nan_is_seen() -> None:
    q = torch.randn(1, 4, 2, 8)
    out = anyattn.attention(q, q, q, sink=torch.tensor([float("nan"), 0.0]))
    assert out[:, :, 0].isnan().all()
    assert out[:, :, 1].isfinite().all()


@pytest.mark.parametrize("scale", [torch.tensor(0.5, requires_grad=True), torch.tensor([0.5, 0.5])], ids=["one", "two"])
def test_a_tensor_is_no_number_however_often_the_number_was_given(scale: torch.Tensor) -> None:
    q = torch.randn(1, 4, 2, 8)
    for _ in range(3):
        anyattn.attention(q, q, q, scale=0.5)
    with pytest.raises(anyattn.InvalidArgument, match="scale"):
        anyattn.attention(q, q, q, scale=scale)  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [(1 << 31, 0), (None, 1 << 31), (10**30, 10**30), (6, 6)], ids=str)
def test_windows_that_hide_nothing_are_none(window: tuple[int | None, int | None]) -> None:
    """Kernels add them to positions, in 32 bits."""
    q, k = torch.randn(1, 6, 2, 8), torch.randn(1, 5, 2, 8)
    causal = window[1] == 0
    expected = anyattn.attention(q, k, k, causal=causal)
    assert torch.equal(anyattn.attention(q, k, k, causal=causal, window=window), expected)
    x = torch.empty(1, 6, 2, 64, dtype=torch.bfloat16, device="meta")
    assert anyattn.explain(x, x, x, window=window, on="sm90", backend="torch:cudnn").chosen
    assert not anyattn.explain(x, x, x, window=(5, 5), on="sm90", backend="torch:cudnn").chosen


def test_inputs_are_left_as_they_were(target: Target) -> None:
    case = Case(target, "bshd", scores="sink", dtype=target.capability.dtypes[0], dims="64", asks="lse_grad")
    if not cases.takes(case):
        case = Case(target, "thd_gaps", scores="sink", dtype=target.capability.dtypes[0], dims="64", asks="lse_grad")
    problem = cases.build(case)
    before = [x.detach().clone() for x in problem.leaves.values()]
    run(problem)
    for x, old in zip(problem.leaves.values(), before, strict=True):
        assert torch.equal(x, old)


def test_results_may_be_changed_in_place_only_with_an_error() -> None:
    """Saved tensors are guarded by autograd: never a silently wrong gradient."""
    q, k, v = (torch.randn(1, 5, 2, 8, requires_grad=True) for _ in range(3))
    out = anyattn.attention(q, k, v)
    with pytest.raises(RuntimeError, match="inplace"):  # at once where out is a view, else in backward
        out.mul_(2).sum().backward()


@pytest.mark.parametrize("kept", ["plainly", "on_the_cpu", "recomputed"])
@pytest.mark.parametrize("biased", [False, True])
def test_refilling_a_packing_before_backward_is_an_error(kept: str, biased: bool) -> None:
    """However forward keeps what backward needs: a copy of the offsets would not tell."""
    packing = Packing.from_lengths([2, 2], max_sequences=3, max_rows=8, max_seqlen=4)
    x = torch.randn(8, 2, 8, requires_grad=True)
    sink = torch.zeros(2, requires_grad=True) if biased else None

    def attend(x: torch.Tensor) -> torch.Tensor:
        return anyattn.attention(x, x, x, packing=packing, sink=sink)

    with torch.autograd.graph.save_on_cpu() if kept == "on_the_cpu" else contextlib.nullcontext():
        out = checkpoint(attend, x, use_reentrant=False) if kept == "recomputed" else attend(x)
    packing.copy_(Packing.from_lengths([1, 3]))
    with pytest.raises(anyattn.PackingError, match="refilled by copy_"):
        out.sum().backward()


# --- ways of calling that are refused, and autocast ----------------------------------------------------------------


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("unused", [False, True])
def test_double_backward_raises(layout: str, unused: bool) -> None:
    q, k, v = (torch.randn(1, 5, 5, 8, requires_grad=True) for _ in range(3))
    out = anyattn.attention(q, k, v, layout=layout)
    for loss in (out.square().sum(), out.sum()):
        (grad,) = torch.autograd.grad(loss, [q], create_graph=True)
        with pytest.raises(anyattn.Unsupported, match="no double backward"):
            torch.autograd.grad(grad.sum(), [q], retain_graph=True, allow_unused=unused)
        with pytest.raises(anyattn.Unsupported, match="no double backward"):
            (loss + grad.square().sum()).backward(retain_graph=True)  # a gradient penalty


def transforms() -> dict[str, Callable[[Tensor], Any]]:
    call = lambda x: anyattn.attention(x, x, x)  # noqa: E731
    return {
        "vmap": torch.func.vmap(call),
        "grad": torch.func.grad(lambda x: call(x).sum()),
        "jvp": lambda x: torch.func.jvp(call, (x,), (x,)),
        "vjp": lambda x: torch.func.vjp(call, x)[1],
        "jacrev": torch.func.jacrev(call),
        "functionalize": torch.func.functionalize(call),
    }


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.usefixtures("no_kernel")
@pytest.mark.parametrize("name", transforms())
def test_torch_func_transforms_raise(name: str) -> None:
    x = torch.randn(1, 5, 2, 8) if name != "vmap" else torch.randn(3, 1, 5, 2, 8)
    with pytest.raises(Unsupported, match=r"does not run under torch\.func transforms"):
        transforms()[name](x)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("needs_grad", [False, True])
def test_forward_mode_raises(needs_grad: bool) -> None:
    """Forward-mode autograd would lose the tangent."""
    import torch.autograd.forward_ad as forward_ad

    x = torch.randn(1, 5, 2, 8, requires_grad=needs_grad)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises((RuntimeError, NotImplementedError)):
            anyattn.attention(dual, dual, dual)


@pytest.mark.usefixtures("no_kernel")
def test_dtensor_is_refused() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        mesh = init_device_mesh("cpu", (1,))
        x = distribute_tensor(torch.randn(1, 5, 2, 8), mesh, [Replicate()])
        with pytest.raises(Unsupported, match=r"q is a DTensor: call attention on q.to_local\(\)"):
            anyattn.attention(x, x, x)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("device_type", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_sdpa_does(device_type: str, low: torch.dtype) -> None:
    """float32 q, k, v are cast and gradients come back in float32; float64 is left alone."""
    x = [torch.randn(2, 5, 4, 8, device=device_type, requires_grad=True) for _ in range(3)]
    sink = torch.randn(4, device=device_type, requires_grad=True)
    with torch.autocast(device_type, low):
        out, lse = anyattn.attention(*x, causal=True, sink=sink, return_lse=True)
        sdpa = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in x), is_causal=True)
    assert out.dtype == sdpa.dtype == low
    assert lse.dtype == torch.float32
    out.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in (*x, sink))
    given = [t.detach().to(low).requires_grad_() for t in x]
    plain, _ = anyattn.attention(*given, causal=True, sink=sink, return_lse=True)
    assert torch.equal(out, plain)
    wide = [t.detach().double() for t in x]
    if device_type == "cpu":
        with torch.autocast(device_type, low):
            assert anyattn.attention(*wide).dtype == torch.float64


def test_autocast_unifies_mixed_dtypes() -> None:
    q = torch.randn(2, 5, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert anyattn.attention(q, q.bfloat16(), q).dtype == torch.bfloat16
    with pytest.raises(anyattn.DtypeError):
        anyattn.attention(q, q.bfloat16(), q)


def test_autocast_off_inside_is_off() -> None:
    q = torch.randn(2, 5, 4, 8)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert anyattn.attention(q, q, q).dtype == torch.float32


def test_parameters_and_subclasses_of_tensor() -> None:
    x = torch.randn(1, 5, 2, 8)
    plain = anyattn.attention(x, x, x)
    parameter = torch.nn.Parameter(x)
    assert torch.equal(anyattn.attention(parameter, parameter, parameter), plain)


@pytest.mark.parametrize("least", [-1e4, float(torch.finfo(torch.float32).min)])
def test_biases_of_the_least_number_average(least: float) -> None:
    """Where a bias hides every key of a row by a huge number, all scores are that number, and out is an average."""
    q, k, v = (torch.randn(1, 3, 2, 8, requires_grad=True) for _ in "qkv")
    bias = torch.zeros(1, 1, 3, 3)
    bias[..., 1, :] = least
    out = anyattn.attention(q, k, v, bias=bias, backend="reference")
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 8**-0.5 + bias
    wanted = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-3)
    found, expected = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, wanted))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
