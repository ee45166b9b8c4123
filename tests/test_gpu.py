"""On a GPU: no waiting (promise 5), CUDA graphs, streams, torch.compile with every kernel."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import anyattn
import cases
import oracle
from anyattn import Packing, _padding
from anyattn.backends import _fa4_kept, fa4
from anyattn.backends import get as get_backend
from cases import Case, Problem, Span, Target
from oracle import Terms
from places import taken
from test_conformance import check, run

pytestmark = pytest.mark.gpu


@contextmanager
def no_waiting() -> Iterator[None]:
    """Any synchronisation or copy to the host is an error."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def case_for(target: Target, **wanted: str) -> Case:
    """A case with these values that the kernel takes."""
    for dtype in ("bfloat16", "float32"):
        for heads in ("4/2", "4"):
            case = Case(target, **{"dtype": dtype, "heads": heads, "dims": "64", **wanted})
            if dtype in target.capability.dtypes and cases.takes(case):
                return case
    pytest.skip(f"{target.name} does not take {wanted}")


@pytest.mark.parametrize("form", [f for f in cases.FORMS if f != "bshd_holes"])
@pytest.mark.parametrize("scores", ["plain", "sink"])
def test_no_synchronisation_in_eager(cuda_target: Target, form: str, scores: str) -> None:
    """After the first call of a kind, forward and backward copy nothing to the host."""
    problem = cases.build(case_for(cuda_target, form=form, mask="causal", scores=scores, asks="lse_grad"))
    expected = run(problem)
    with no_waiting():
        out, lse, grads = run(problem)
    torch.testing.assert_close(out, expected[0])
    check(problem, out, lse, grads)


@pytest.mark.parametrize("scores", [s for s in cases.SCORES if s not in ("plain", "sink")])
def test_no_synchronisation_with_any_term(cuda_target: Target, scores: str) -> None:
    form = "bshd" if "dense" in cuda_target.capability.features else "thd"
    problem = cases.build(case_for(cuda_target, form=form, scores=scores))
    run(problem)
    with no_waiting():
        run(problem)


def test_no_synchronisation_with_new_lengths(cuda_target: Target) -> None:
    """A batch of other lengths of one class: the packing is made before, and the call waits for nothing."""
    case = case_for(cuda_target, form="thd_gaps", mask="causal")
    heads, _, kv_heads = case.heads.partition("/")
    dtype = cases.DTYPES[case.dtype]
    for number, lengths in enumerate(([100, 257, 300], [120, 260, 290], [101, 400, 3])):
        packing = Packing.from_lengths(lengths, pad_to_multiple_of=64, device="cuda")
        q, k, v = (
            torch.randn(packing.rows, int(n), 64, device="cuda", dtype=dtype, requires_grad=True)
            for n in (heads, kv_heads or heads, kv_heads or heads)
        )
        dout = torch.randn_like(q)
        if number == 0:
            torch.autograd.grad(
                anyattn.attention(q, k, v, causal=True, packing=packing, backend=cuda_target.name), [q, k, v], dout
            )
            continue
        with no_waiting():
            out = anyattn.attention(q, k, v, causal=True, packing=packing, backend=cuda_target.name)
            torch.autograd.grad(out, [q, k, v], dout)


def test_no_synchronisation_with_unchecked_offsets(cuda_target: Target) -> None:
    """check=False: not even the making of the packing waits."""
    case = case_for(cuda_target, form="thd_gaps", mask="causal")
    problem = cases.build(case)
    offsets = problem.arguments["packing"].cu_seqlens, problem.arguments["packing"].cu_seqlens_padded
    expected = run(problem)
    unchecked = Packing(*offsets, max_seqlen=257, check=False)
    run(problem, packing=unchecked)
    with no_waiting():
        unchecked = Packing(*offsets, max_seqlen=257, check=False)
        out, _, grads = run(problem, packing=unchecked)
    torch.testing.assert_close(out, expected[0])
    check(problem, out, None, grads)


def test_no_synchronisation_when_a_packing_is_refilled() -> None:
    fixed = Packing.from_lengths([3], max_sequences=4, max_rows=64, max_seqlen=32, device="cuda")
    new = Packing.from_lengths([5, 17], 8).pin_memory()
    with no_waiting():
        fixed.copy_(new)
        fixed.copy_(new.to("cuda", non_blocking=True))
    assert fixed.lengths.tolist() == [5, 17, 0, 0]


@pytest.mark.parametrize("form", ["bshd", "thd_gaps"])
@pytest.mark.parametrize("scores", ["plain", "sink"])
def test_calls_again_give_the_same_bits(cuda_target: Target, form: str, scores: str) -> None:
    """What is kept from a first call, graphs and compiled kernels among it, changes nothing in later ones."""
    problem = cases.build(case_for(cuda_target, form=form, mask="causal", scores=scores, asks="lse_grad"))
    first, *others = (run(problem)[:2] for _ in range(3))
    assert all(map(torch.equal, first, found) for found in others)


@pytest.mark.parametrize("form", ["bshd", "thd_gaps"])
def test_fa4_calls_its_kernels_without_its_raw_function(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call of a kind finds the kernel; see anyattn/backends/_fa4_kept.py."""
    target = next((t for t in cases.all_targets("cuda") if t.name == "fa4"), None)
    if target is None or not _fa4_kept.were_read(anyattn.backends()["fa4"].version):
        pytest.skip("needs a release of flash-attn-4 whose kernels are kept")
    problem = cases.build(case_for(target, form=form, mask="causal", asks="lse_grad"))
    expected = run(problem)
    monkeypatch.setattr(fa4, "_raw", lambda _: pytest.fail("the raw function was called"))
    monkeypatch.setattr(_fa4_kept, "note", lambda *_: pytest.fail("nothing was kept"))
    out, lse, grads = run(problem)
    assert torch.equal(out, expected[0])
    check(problem, out, lse, grads)


# --- CUDA graphs ---------------------------------------------------------------------------------------------------


def capture(work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of ``work``, and what it returned."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph, result


@pytest.mark.parametrize("scores", ["plain", "sink"])
def test_a_captured_graph_replays_with_another_batch(cuda_target: Target, scores: str) -> None:
    """Forward and backward are captured once; copy_ refills the packing, and the graph replays the new batch."""
    case = case_for(cuda_target, form="thd_gaps", mask="causal", scores=scores, asks="lse_grad")
    heads, _, kv_heads = case.heads.partition("/")
    dtype, rows = cases.DTYPES[case.dtype], 1024
    packing = Packing.from_lengths([300], max_sequences=5, max_rows=rows, max_seqlen=512, device="cuda")
    make = {"device": "cuda", "dtype": dtype, "requires_grad": True}
    q, k, v = (torch.randn(rows, int(n), 64, **make) for n in (heads, kv_heads or heads, kv_heads or heads))
    leaves = {"q": q, "k": k, "v": v}
    arguments: dict[str, Any] = {"causal": True, "packing": packing, "backend": cuda_target.name, "return_lse": True}
    if scores == "sink":
        leaves["sink"] = arguments["sink"] = torch.randn(int(heads), device="cuda", requires_grad=True)
    dout, dlse = torch.randn_like(q), torch.randn(int(heads), rows, device="cuda")

    def work() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        out, lse = anyattn.attention(q, k, v, **arguments)
        grads = torch.autograd.grad((out, lse), list(leaves.values()), (dout, dlse))
        return out.detach(), lse.detach(), dict(zip(leaves, grads, strict=True))

    graph, (out, lse, grads) = capture(work)
    for lengths in ([300], [100, 257, 0, 64], [512, 1, 2], [], [17] * 5):
        new = Packing.from_lengths(lengths, pad_to_multiple_of=16)
        packing.copy_(new.to("cuda"))
        with torch.no_grad():
            for x in (q, k, v, dout, dlse):
                x.normal_()
        graph.replay()
        torch.cuda.synchronize()
        starts = new.cu_seqlens_padded.tolist()
        spans = [Span(0, s, n, s, n) for s, n in zip(starts, lengths, strict=False)]
        problem = Problem(
            q, k, v, arguments, spans, Terms(causal=True), "thd", dtype, None, dout[None], dlse[None], leaves
        )  # fmt: skip
        check(problem, out, lse, grads)


def test_a_packing_that_a_graph_refills_is_read_anew(cuda_target: Target) -> None:
    """The graph holds copy_ too: what was derived before it, or beside it, is not taken for the new batch."""
    case = case_for(cuda_target, form="thd_gaps", mask="causal", asks="lse_grad")
    heads, _, kv_heads = case.heads.partition("/")
    dtype, rows = cases.DTYPES[case.dtype], 1024
    capacity: dict[str, Any] = {"max_sequences": 5, "max_rows": rows, "max_seqlen": 512, "device": "cuda"}
    packing, source = (Packing.from_lengths([300], **capacity) for _ in range(2))
    make = {"device": "cuda", "dtype": dtype, "requires_grad": True}
    q, k, v = (torch.randn(rows, int(n), 64, **make) for n in (heads, kv_heads or heads, kv_heads or heads))
    dout, dlse = torch.randn_like(q), torch.randn(int(heads), rows, device="cuda")
    arguments: dict[str, Any] = {"causal": True, "packing": packing, "backend": cuda_target.name, "return_lse": True}

    def work(*leaves: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        out, lse = anyattn.attention(*leaves, **arguments)
        grads = torch.autograd.grad((out, lse), leaves, (dout, dlse))
        return out.detach(), lse.detach(), dict(zip("qkv", grads, strict=True))

    def refill_and_work() -> Any:
        packing.copy_(source)
        return work(q, k, v)

    others = [x.detach().clone().requires_grad_() for x in (q, k, v)]  # autograd ties a leaf to one stream
    work(*others)
    graph, captured = capture(refill_and_work)
    for lengths in ([100, 257, 0, 64], [512, 1, 2]):
        new = Packing.from_lengths(lengths, pad_to_multiple_of=16)
        source.copy_(new.to("cuda"))
        graph.replay()
        torch.cuda.synchronize()
        spans = [Span(0, s, n, s, n) for s, n in zip(new.cu_seqlens_padded.tolist(), lengths, strict=False)]
        leaves = {"q": q, "k": k, "v": v}
        problem = Problem(
            q, k, v, arguments, spans, Terms(causal=True), "thd", dtype, None, dout[None], dlse[None], leaves
        )  # fmt: skip
        check(problem, *captured)
        check(problem, *work(*others))


def test_a_captured_dense_graph_replays(cuda_target: Target) -> None:
    problem = cases.build(case_for(cuda_target, form="bshd", mask="causal", asks="lse_grad"))
    graph, (out, lse, grads) = capture(lambda: run(problem))
    with torch.no_grad():
        problem.q.normal_()
        problem.k.normal_()
    graph.replay()
    torch.cuda.synchronize()
    check(problem, out, lse, grads)


# --- streams, compiled regions, other devices ----------------------------------------------------------------------


@pytest.mark.parametrize("form", ["bshd", "thd_gaps"])
def test_kernels_run_on_the_current_stream(cuda_target: Target, form: str) -> None:
    """Work that the kernel must wait for is on a side stream, and so is the zeroing of padding."""
    problem = cases.build(case_for(cuda_target, form=form, mask="causal", asks="lse_grad"))
    run(problem)
    side = torch.cuda.Stream()
    value = problem.q.detach().clone()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        with torch.no_grad():
            problem.q.zero_()
            torch.cuda._sleep(50_000_000)
            problem.q.copy_(value)
        result = run(problem)
    side.synchronize()
    check(problem, *result)


@pytest.mark.needs("dense")
def test_the_layout_of_out_does_not_matter_to_backward(cuda_target: Target) -> None:
    """One set of shapes, in memory in every order, one after the other: a cached graph must not be read as another.

    torch's cuDNN backward is cached without out's strides (seen with torch 2.11: dq off by 8).
    """
    case = case_for(cuda_target, form="bhsd", mask="causal", heads="4")
    problem = cases.build(case)
    q, k, v = (x.detach() for x in (problem.q, problem.k, problem.v))
    results = []
    for layout in ("bshd", "bhsd", "sbhd", "bshd"):
        for other in ("bshd", "sbhd", "bhsd"):  # in memory as one layout, and called as another
            memory = [cases.from_bshd(cases.to_bshd(x, "bhsd"), other).contiguous() for x in (q, k, v)]
            given = [cases.from_bshd(cases.to_bshd(x, other), layout).requires_grad_() for x in memory]
            out = anyattn.attention(*given, causal=True, layout=layout, backend=cuda_target.name)
            dout = cases.from_bshd(problem.dout, layout).contiguous()
            grads = torch.autograd.grad(out, given, dout)
            results.append([cases.to_bshd(x, layout) for x in (out, *grads)])
    expected = problem.expected()
    for result in results:
        for name, x in zip(("out", "dq", "dk", "dv"), result, strict=True):
            oracle.check(name, x, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("form", ["bshd", "thd_gaps", "bhsd_left"])
def test_every_kernel_compiles_without_a_graph_break(cuda_target: Target, form: str) -> None:
    problem = cases.build(case_for(cuda_target, form=form, mask="causal", scores="sink", asks="lse_grad"))
    torch._dynamo.reset()
    arguments = problem.arguments

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return anyattn.attention(q, k, v, **arguments)

    compiled = torch.compile(function, fullgraph=True, backend="inductor")
    assert problem.dout is not None
    assert problem.dlse is not None
    incoming = [cases.from_bshd(problem.dout, problem.layout), problem.dlse]
    if problem.layout == "thd":
        incoming[1] = problem.dlse.squeeze(0)
    for _ in range(2):
        out, lse = compiled(problem.q, problem.k, problem.v)
        grads = torch.autograd.grad((out, lse), list(problem.leaves.values()), incoming)
    check(problem, out, lse, dict(zip(problem.leaves, grads, strict=True)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("form", ["bshd", "thd_gaps"])
def test_every_kernel_compiles_to_cuda_graphs(cuda_target: Target, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """mode="reduce-overhead": nothing that a kernel keeps from call to call may lie in a graph's memory."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # pytest keeps what it logs: tensors
    problem = cases.build(case_for(cuda_target, form=form, mask="causal"))
    torch._dynamo.reset()
    arguments, inputs = {**problem.arguments, "return_lse": False}, (problem.q, problem.k, problem.v)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return anyattn.attention(q * 1.0, k, v, **arguments)

    compiled = torch.compile(function, fullgraph=True, mode="reduce-overhead")
    assert problem.dout is not None
    dout = cases.from_bshd(problem.dout, problem.layout)
    for _ in range(4):  # compiled, run in the graph's memory, captured, replayed
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(*inputs)
        grads = torch.autograd.grad(out, inputs, dout)
        result = out.detach().clone(), [x.clone() for x in grads]
        del out, grads
    check(problem, result[0], None, dict(zip(problem.leaves, result[1], strict=True)))
    check(problem, *run(problem, return_lse=False))


@pytest.mark.parametrize("form", ["bshd", "thd_gaps"])
def test_a_kernel_runs_on_the_device_of_its_tensors(
    cuda_target: Target, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    monkeypatch.setattr(_padding, "SMALL", 0)  # Triton launches on the current device, unless told
    case = case_for(cuda_target, form=form, mask="causal")
    problem = cases.build(replace(case), device="cuda:1")
    assert torch.cuda.current_device() == 0
    out, lse, grads = run(problem)
    assert out.device.index == 1
    check(problem, out, lse, grads)


def test_errors_of_mixed_devices_are_named() -> None:
    q, k = torch.randn(1, 4, 2, 64, device="cuda"), torch.randn(1, 4, 2, 64)
    with pytest.raises(anyattn.DeviceError, match="must be on one device, got cpu, cuda:0"):
        anyattn.attention(q, k, k)
    packing = Packing.from_lengths([4])
    with pytest.raises(anyattn.DeviceError, match=r"packing is on cpu, the tensors on cuda:0: use packing.to"):
        anyattn.attention(q[0], q[0], q[0], packing=packing)


def test_what_one_stream_derives_is_not_taken_on_another() -> None:
    """It may not be written yet there."""
    from anyattn._derived import derived

    rows = Packing.from_lengths([3, 5], device="cuda")._rows
    made: list[int] = []

    def make() -> int:
        made.append(1)
        return len(made)

    assert [derived(rows, rows, "test", make) for _ in range(2)] == [1, 1]
    with torch.cuda.stream(torch.cuda.Stream()):
        assert derived(rows, rows, "test", make) == 2
    assert derived(rows, rows, "test", make) == 1


@pytest.mark.parametrize("form", ["thd", "thd_gaps"])
@pytest.mark.parametrize("heads", [False, True], ids=["rows", "rows and heads"])
def test_results_in_places_of_the_callers(cuda_target: Target, form: str, heads: bool) -> None:
    """Slices of larger tensors, as context parallelism has them: right there or elsewhere, and nothing beside them."""
    case = case_for(cuda_target, form=form, mask="causal", asks="lse_grad")
    kept = taken(case, get_backend(cuda_target.backend), heads=heads)
    assert not kept or cuda_target.backend in ("fa2", "fa3", "fa4", "cudnn")
