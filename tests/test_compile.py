"""``torch.compile(fullgraph=True)``: the same answers and gradients as eager, and no compile per length."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import anyattn
from anyattn import Packing
from doubles import pretend

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

Function = Callable[..., Any]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def backend_for(device: str) -> str:
    """Inductor on a GPU; on the CPU what needs no C++ compiler and takes no minutes."""
    return "inductor" if device == "cuda" else "aot_eager"


def tensor(device: str, *shape: int, grad: bool = True) -> Tensor:
    """A leaf: bfloat16 on a GPU, float32 on the CPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return torch.randn(shape, device=device, dtype=dtype, requires_grad=grad)


def compare(function: Function, leaves: list[Tensor], device: str, *others: Any, backend: str | None = None) -> None:
    """Compiled without a graph break, out, lse and gradients are eager's, to the bit on the CPU."""
    compiled = torch.compile(function, fullgraph=True, backend=backend or backend_for(device))
    results = []
    for call in (function, compiled):
        got = call(*leaves, *others)
        got = got if isinstance(got, tuple) else (got,)
        torch.manual_seed(1)
        # of a shape, not like a tensor: randn_like fills in the order of strides, which may differ
        incoming = [torch.randn(x.shape).to(x).masked_fill(~torch.isfinite(x), 0) for x in got]
        grads = torch.autograd.grad(got, leaves, incoming)
        results.append([x.detach() for x in (*got, *grads)])
    for number, (eager, traced) in enumerate(zip(*results, strict=True)):
        assert (eager.shape, eager.dtype) == (traced.shape, traced.dtype)
        torch.testing.assert_close(traced, eager, msg=lambda m, n=number: f"result or gradient {n}: {m}")


@pytest.mark.parametrize("layout", ["bshd", "sbhd", "bhsd"])
def test_compile_dense(device: str, layout: str) -> None:
    q, k, v = tensor(device, 2, 6, 4, 64), tensor(device, 2, 6, 4, 64), tensor(device, 2, 6, 4, 64)
    compare(lambda q, k, v: anyattn.attention(q * 1.5, k, v, causal=True, layout=layout), [q, k, v], device)


def test_compile_packed(device: str) -> None:
    packing = Packing.from_lengths([5, 0, 7], pad_to_multiple_of=4, device=device)
    leaves = [tensor(device, packing.rows + 3, n, 64) for n in (4, 2, 2)]
    compare(lambda q, k, v, p: anyattn.attention(q, k, v, causal=True, packing=p), leaves, device, packing)


def test_compile_packed_cross_attention(device: str) -> None:
    packing, keys = (Packing.from_lengths(n, 4, device=device) for n in ([5, 0, 2], [7, 3, 9]))
    leaves = [tensor(device, rows, 4, 64) for rows in (packing.rows, keys.rows, keys.rows)]

    def function(q: Tensor, k: Tensor, v: Tensor, p: Packing, pk: Packing) -> Tensor:
        return anyattn.attention(q, k, v, packing=p, packing_kv=pk)

    compare(function, leaves, device, packing, keys)


@pytest.mark.parametrize("side", ["right", "left", "compact"])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_compile_padded(device: str, side: str, layout: str) -> None:
    lengths = torch.tensor([6, 3, 0], device=device)
    if side == "compact":
        packing = Packing.from_lengths(lengths, device=device)
    else:
        mask = torch.arange(6, device=device)[None] < lengths[:, None]
        packing = Packing.from_mask(mask.flip(1) if side == "left" else mask)
    shape = (3, 6, 4, 64) if layout == "bshd" else (3, 4, 6, 64)
    leaves = [tensor(device, *shape) for _ in range(3)]

    def function(q: Tensor, k: Tensor, v: Tensor, p: Packing) -> tuple[Tensor, Tensor]:
        return anyattn.attention(q, k, v, causal=True, packing=p, layout=layout, return_lse=True)

    compare(function, leaves, device, packing)


def test_compile_sink_bias_and_mask(device: str) -> None:
    q, k, v = (tensor(device, 2, 6, 4, 64) for _ in range(3))
    sink = torch.randn(4, device=device, requires_grad=True)
    bias = torch.randn(4, 1, 6, device=device, requires_grad=True)
    mask = torch.rand(6, 6, device=device) > 0.3

    def function(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        return anyattn.attention(q, k, v, sink=sink, bias=bias.to(q.dtype), mask=mask, backend="reference")

    compare(function, [q, k, v, sink, bias], device, mask)


def test_compile_alibi_and_window(device: str) -> None:
    leaves = [tensor(device, 2, 6, 4, 64) for _ in range(3)]
    slopes = torch.rand(4, device=device)

    def function(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        return anyattn.attention(q, k, v, alibi_slopes=slopes, window=(2, 1), softcap=3.0, scale=0.2)

    compare(function, leaves, device, slopes)


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_compile_lse_with_its_gradient(device: str, form: str) -> None:
    packing = Packing.from_lengths([5, 7], 8, device=device) if form == "packed" else None
    leaves = [tensor(device, *((16,) if packing is not None else (2, 6)), 4, 64) for _ in range(3)]

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = anyattn.attention(q, k, v, causal=True, packing=packing, return_lse=True)
        return out, lse * 2

    compare(function, leaves, device)


def test_compile_of_part_of_the_gradients(device: str) -> None:
    """Keys and values without a gradient, and no gradient at all."""
    q = tensor(device, 2, 6, 4, 64)
    k, v = (tensor(device, 2, 6, 4, 64, grad=False) for _ in range(2))
    compare(lambda q, k, v: anyattn.attention(q, k, v), [q], device, k, v)
    compiled = torch.compile(lambda q: anyattn.attention(q, k, v), fullgraph=True, backend=backend_for(device))
    with torch.no_grad():
        torch.testing.assert_close(compiled(q), anyattn.attention(q, k, v))


def test_compile_under_use() -> None:
    """The preference is a constant of the graph, guarded: another one is another graph, not another answer."""
    ran: list[str] = []
    x = torch.randn(1, 6, 2, 8)
    from cases import BACKENDS

    compiled = torch.compile(lambda q: anyattn.attention(q, q, q), fullgraph=True, backend="aot_eager")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("torch", "reference"):
            backend = BACKENDS.get(name)

            def spy(call: Any, name: str = name, original: Any = backend.forward) -> Any:
                ran.append(name)
                return original(call)

            patch.setattr(backend, "forward", spy)
        compiled(x)
        with anyattn.use("reference"):
            compiled(x)
        compiled(x)
    assert ran == ["torch", "reference", "torch"]


def test_compile_with_use_inside() -> None:
    def function(q: Tensor) -> Tensor:
        with anyattn.use("reference"):
            return anyattn.attention(q, q, q, softcap=2.0)

    x = torch.randn(1, 6, 2, 8, requires_grad=True)
    expected = anyattn.attention(x, x, x, softcap=2.0)
    compiled = torch.compile(function, backend="aot_eager")  # a context manager may break the graph
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_compile_under_autocast(device: str, where: str) -> None:
    leaves = [torch.randn(2, 6, 4, 64, device=device, requires_grad=True) for _ in range(3)]

    def inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return anyattn.attention(q, k, v, causal=True)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return anyattn.attention(q, k, v, causal=True)

    if where == "inside":
        compare(inside, leaves, device)
        return
    with torch.autocast(device, torch.bfloat16):
        compare(plain, leaves, device)
        assert torch.compile(plain, backend="aot_eager")(*leaves).dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["dense", "packed", "padded"])
def test_lengths_compile_nothing_new(form: str) -> None:
    """Five lengths, at most two compiles: one for the first, one for all."""
    counter = CompileCounterWithBackend("aot_eager")

    def function(q: Tensor, packing: Packing | None) -> Tensor:
        return anyattn.attention(q * 2, q, q, causal=True, packing=packing).sin()

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for seq in (5, 9, 12, 7, 31):
        if form == "dense":
            x, packing = torch.randn(2, seq, 4, 8, requires_grad=True), None
        elif form == "packed":
            packing = Packing.from_lengths([seq, 3, seq - 2], 4)
            x = torch.randn(packing.rows, 4, 8, requires_grad=True)
        else:
            packing = Packing.from_lengths([seq, seq - 3])
            x = torch.randn(2, seq, 4, 8, requires_grad=True)
        out = compiled(x, packing)
        (grad,) = torch.autograd.grad(out.sum(), [x])
        expected = function(x, packing)
        (expected_grad,) = torch.autograd.grad(expected.sum(), [x])
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(grad, expected_grad)
    assert counter.frame_count <= 2


def test_empty_problems_compile(device: str) -> None:
    leaves = [tensor(device, 2, n, 4, 64) for n in (6, 0, 0)]
    compare(lambda q, k, v: anyattn.attention(q, k, v), leaves, device)


def test_dropout_compiles_and_repeats_by_seed() -> None:
    x = torch.randn(1, 6, 2, 8, requires_grad=True)
    compiled = torch.compile(lambda q: anyattn.attention(q, q, q, dropout=0.5), fullgraph=True, backend="aot_eager")

    def both(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        out = compiled(x)
        return out, *torch.autograd.grad(out.sum(), [x])

    first, again, other = both(1), both(1), both(2)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])


def test_a_mistake_in_a_compiled_region_is_named() -> None:
    compiled = torch.compile(lambda q, k: anyattn.attention(q, k, k), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="num_heads must be a multiple of num_kv_heads, got 3 and 2"):
        compiled(torch.randn(1, 4, 3, 8), torch.randn(1, 4, 2, 8))


def test_the_custom_op_passes_torchs_own_checks() -> None:
    """Schema, fake and autograd registration, by torch.library.opcheck on what attention() hands over."""
    calls: list[tuple[Any, tuple[Any, ...]]] = []

    class Recorder(torch.fx.Interpreter):
        def call_function(self, target: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
            if "anyattn" in str(target):
                calls.append((target, args))
            return super().call_function(target, args, kwargs)

    def function(q: Tensor, p: Packing) -> Tensor:
        return anyattn.attention(q, q, q, packing=p, return_lse=True)[0]

    x = torch.randn(2, 6, 2, 8, requires_grad=True)
    torch.compile(function, fullgraph=True, backend=lambda graph, _: Recorder(graph).run)(
        x, Packing.from_lengths([6, 3])
    )
    assert calls
    for op, args in calls:
        clean = [a.detach().clone().requires_grad_(a.is_floating_point()) if isinstance(a, Tensor) else a for a in args]
        checks = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(op, tuple(clean), test_utils=checks)


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("form", ["dense", "packed"])
def test_compile_with_inductor(form: str) -> None:
    packing = Packing.from_lengths([5, 7], 8) if form == "packed" else None
    leaves = [torch.randn(*((16,) if packing is not None else (2, 6)), 4, 8, requires_grad=True) for _ in range(3)]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return anyattn.attention(q.sin(), k, v, causal=True, packing=packing).cos()

    compare(function, leaves, "cpu", backend="inductor")


@pytest.mark.parametrize("backend", ["fa2", "fa3", "fa4", "varlen"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_batches_of_single_rows(backend: str, return_lse: bool) -> None:
    """Kernels read lse as it lies in memory: where entries are one row long, a flattened view is of other strides."""
    packing = Packing.from_mask(torch.tensor([[0], [1], [1]]))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = anyattn.attention(
            q, k, v, packing=packing, backend=backend, return_lse=return_lse, deterministic=backend != "varlen"
        )
        if isinstance(found, Tensor):
            return found.float().square().sum()
        return found[0].float().square().sum() + found[1].masked_fill(found[1].isinf(), 0.0).square().sum()

    with pretend("sm90", fa2="2.8.3", fa3="3.0.0", fa4="4.0.0b36"):
        leaves = [torch.randn(3, 1, 4, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        eager, compiled = (
            torch.autograd.grad(run(*leaves), leaves)
            for run in (loss, torch.compile(loss, backend="eager", fullgraph=True))
        )
    assert all(map(torch.equal, eager, compiled))
