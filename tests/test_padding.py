"""Padding is exactly zero (promise 3) and never read into a result (promise 4)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import anyattn
import cases
import oracle
from anyattn import _padding
from anyattn._call import Call, Gradients, Result, Rows, Saved
from anyattn._rows import valid_rows
from anyattn.backends import reference
from cases import Case, Problem, Target, from_bshd, lse_to_bhs, to_bshd
from test_conformance import check, run

INF = float("inf")
PADDED = [f for f in cases.FORMS if "_" in f and f != "bshd_holes"]
pytestmark = pytest.mark.needs("packed")
NOT_FINITE = (float("nan"), INF, -INF)


def padded_case(target: Target, form: str, **more: str) -> Case:
    """A case of a padded form that the kernel takes; skips where it takes none."""
    dims = target.dims
    for dtype in ("bfloat16", "float32"):
        case = Case(target, form, dtype=dtype, heads="4/2", dims=dims, **{"mask": "causal", **more})
        for candidate in (case, replace(case, heads="4")):
            if dtype in target.capability.dtypes and cases.takes(candidate):
                return candidate
    pytest.skip(f"{target.name} does not take {form} with {more}")


def refill(problem: Problem, value: float) -> Problem:
    """The same problem with all padding of q, k, v and dout set to a value."""

    def fill(x: Tensor, real: Tensor) -> Tensor:
        return torch.where(real.to(x.device)[..., None, None], x, torch.full((), value, dtype=x.dtype, device=x.device))

    leaves = {}
    for name, real in (("q", problem.real_q), ("k", problem.real_k), ("v", problem.real_k)):
        x = to_bshd(getattr(problem, name).detach(), problem.layout)
        leaves[name] = from_bshd(fill(x, real), problem.layout).contiguous().requires_grad_(problem.dout is not None)
    dout = None if problem.dout is None else fill(problem.dout, problem.real_q)
    kept = {n: x for n, x in problem.leaves.items() if n not in "qkv"}
    return replace(problem, **leaves, dout=dout, leaves={**leaves, **kept} if problem.leaves else {})


def everything(problem: Problem, **changes: object) -> list[Tensor]:
    """out, lse and all gradients as (B, S, ...), for comparison bit by bit."""
    out, lse, grads = run(problem, **changes)
    got = [to_bshd(out, problem.layout)]
    if lse is not None:
        got.append(lse_to_bhs(lse, problem.layout))
    return got + [to_bshd(g, problem.layout) if n in "qkv" else g for n, g in grads.items()]


def poison(device: str) -> None:
    """Leave NaN in the memory that the allocator hands out next."""
    if device == "cuda":
        kept = [torch.full((1 << size,), float("nan"), device=device) for size in range(7, 24) for _ in range(4)]
        del kept


@pytest.mark.parametrize("form", PADDED)
@pytest.mark.parametrize("relation", ["equal", "any"])
def test_padding_is_exactly_zero(target: Target, form: str, relation: str) -> None:
    """out, dq, dk, dv are 0 and lse is -inf there, whatever finite garbage q, k, v and dout hold; values are right."""
    problem = cases.build(padded_case(target, form, relation=relation, asks="lse_grad"))
    assert not problem.real_q.all()
    poison(target.device)
    check(problem, *run(problem))


def scribble(x: Tensor, dim: int, rows: Rows) -> Tensor:
    """What a kernel may leave in rows that it was not asked for: anything."""
    padding = ~valid_rows(rows, x.shape[dim])
    return x.masked_fill(padding.view((-1,) + (1,) * (x.ndim - 1 - dim)), float("nan"))


@pytest.mark.gpu
@pytest.mark.parametrize("form", PADDED)
@pytest.mark.parametrize("scores", ["plain", "sink"])
def test_large_tensors_are_zeroed_as_exactly(
    cuda_target: Target, form: str, scores: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the Triton kernel: here every tensor counts as large."""
    monkeypatch.setattr(_padding, "SMALL", 0)
    problem = cases.build(padded_case(cuda_target, form, relation="any", scores=scores, asks="lse_grad"))
    poison("cuda")
    check(problem, *run(problem))


#: Lengths, first rows with the end of the last one's room, and rows.
BATCHES = {
    "between": ([3, 5], [0, 4, 12], 12),
    "before and after": ([2, 2], [1, 3, 5], 9),
    "none": ([3, 5], [0, 3, 8], 8),
    "empty sequences": ([0, 3, 0, 0, 2, 0], [0, 2, 5, 5, 6, 8, 9], 9),
    "nothing but padding": ([0, 0], [2, 2, 4], 6),
    "no sequence": ([], [0], 3),
}


def _batch(name: str) -> anyattn.Packing:
    lengths, starts, rows = BATCHES[name]
    cu = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    offsets = (torch.tensor(x, dtype=torch.int32) for x in (cu, starts))
    return anyattn.Packing(*offsets, rows=rows)


@pytest.mark.parametrize("whole", [_padding.WHOLE, 0])
@pytest.mark.parametrize("name", BATCHES)
def test_masks_say_what_is_padding(name: str, whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What serves small CUDA tensors writes what the CPU's slices do: in rows of any stride, and in lse."""
    monkeypatch.setattr(_padding, "WHOLE", whole)
    packing = _batch(name)
    out, lse = torch.randn(packing.rows + 1, 2, 3), torch.randn(2, packing.rows + 1)
    wide = torch.randn(packing.rows + 1, 2, 5)[..., :3]
    expected, filled = ([x.clone() for x in (out, lse, wide)] for _ in range(2))
    filled[2] = wide
    fills = [tuple((x, int(x.ndim == 2), -INF if x.ndim == 2 else 0.0) for x in xs) for xs in (expected, filled)]
    _padding.fill_gaps(packing._rows, *fills[0])
    assert _padding.fill_by_masks(packing._rows, fills[1])
    assert all(map(torch.equal, expected, filled))


def test_masks_follow_a_refilled_packing() -> None:
    packing = anyattn.Packing.from_lengths([6], max_sequences=3, max_rows=8, max_seqlen=8)
    for lengths in ([6], [1, 2], [], [8]):
        packing.copy_(anyattn.Packing.from_lengths(lengths, pad_to_multiple_of=4))
        x = torch.ones(8, 1, 1)
        assert _padding.fill_by_masks(packing._rows, ((x, 0, 0.0),))
        assert torch.equal(x.flatten() == 1, packing.valid)


def test_masks_are_made_once_per_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    made, mask = [], _padding._mask

    def counted(rows: Rows, shape: torch.Size, dim: int) -> Tensor:
        made.append((dim, tuple(shape)))
        return mask(rows, shape, dim)

    monkeypatch.setattr(_padding, "_mask", counted)
    packing = _batch("between")
    fills = ((12, 1, 1), 0, 0.0), ((12, 2, 1), 0, 0.0), ((1, 12), 1, -INF)
    for _ in range(3):
        _padding.fill_by_masks(packing._rows, tuple((torch.ones(shape), dim, x) for shape, dim, x in fills))
    assert made == [(dim, shape) for shape, dim, _ in fills]
    with torch.inference_mode():
        table = packing._table.clone()
    foreign = replace(packing._rows, table=table)  # a tensor without a version
    assert not _padding.fill_by_masks(foreign, ((torch.ones(12, 1, 1), 0, 0.0),))
    assert len(made) == len(fills)


@pytest.fixture
def hostile(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel, leaving NaN in every row outside the sequences, as real ones leave uninitialised memory."""
    if target.capability.writes_gaps:
        pytest.skip(f"{target.name} gets gaps as sequences of their own, and writes them")
    backend = cases.BACKENDS.get(target.backend)
    forward, backward = backend.forward, backend.backward

    def hostile_forward(call: Call) -> Result:
        result = forward(call)
        if call.rows_q is None:
            return result
        lse = None if result.lse is None else scribble(result.lse, 1, call.rows_q)
        return result._replace(out=scribble(result.out, 0, call.rows_q), lse=lse)

    def hostile_backward(call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None) -> Gradients:
        dq, dk, dv, *rest = backward(call, saved, dout, dlse)
        if call.rows_q is None or call.rows_k is None:
            return Gradients(dq, dk, dv, *rest)
        return Gradients(
            scribble(dq, 0, call.rows_q), scribble(dk, 0, call.rows_k), scribble(dv, 0, call.rows_k), *rest
        )

    monkeypatch.setattr(backend, "forward", hostile_forward)
    monkeypatch.setattr(backend, "backward", hostile_backward)


@pytest.mark.usefixtures("hostile")
@pytest.mark.parametrize("form", PADDED)
@pytest.mark.parametrize("scores", ["plain", "sink"])
@pytest.mark.parametrize("sanitize", [False, True])
def test_what_a_kernel_leaves_in_padding_never_comes_out(
    target: Target, form: str, scores: str, sanitize: bool
) -> None:
    problem = cases.build(padded_case(target, form, relation="any", scores=scores, asks="lse_grad"))
    if sanitize:
        problem.arguments.update({n: sanitizing(problem.arguments[n]) for n in ("packing", "packing_kv")})
    check(problem, *run(problem))


@pytest.mark.parametrize("form", PADDED)
def test_padding_is_exactly_zero_with_a_sink(target: Target, form: str) -> None:
    """A sink gives every real row an lse; padding keeps -inf, and adds nothing to the sink's gradient."""
    problem = cases.build(padded_case(target, form, scores="sink", asks="lse_grad"))
    check(problem, *run(problem))


@pytest.mark.parametrize("scores", ["plain", "sink", "mask"])
def test_rows_without_keys(target: Target, scores: str) -> None:
    """A real row that sees no key: out is 0, lse is -inf or the sink's value, and no gradient is NaN."""
    case = padded_case(
        target, "bshd_right" if scores == "mask" else "thd_gaps", relation="any", scores=scores, asks="lse_grad"
    )
    problem = cases.build(case)
    out, lse, grads = run(problem)
    check(problem, out, lse, grads)
    exact = problem.expected().exact
    dead = problem.real_q[:, None] & (exact.lse == -INF)
    if scores == "sink":
        assert not dead.any()
        alone = exact.out.abs().sum(-1).transpose(1, 2) == 0
        sink = problem.arguments["sink"].detach().cpu()[None, :, None].expand(alone.shape)
        rows = alone & problem.real_q[:, None]
        assert rows.any()
        assert lse is not None
        # To a few roundings: a kernel that takes sinks itself computes in powers of two.
        torch.testing.assert_close(
            lse_to_bhs(lse, problem.layout).cpu()[rows],
            sink[rows].float(),
            rtol=4 * torch.finfo(torch.float32).eps,
            atol=0,
        )
    else:
        assert dead.any()
        assert not to_bshd(out, problem.layout).cpu().transpose(1, 2)[dead].any()


@pytest.mark.parametrize("form", PADDED)
def test_finite_padding_changes_no_bit_of_forward(target: Target, form: str) -> None:
    problem = cases.build(padded_case(target, form, asks="forward"))
    results = [everything(refill(problem, value)) for value in (0.0, 1.0, -3e4)]
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("form", PADDED)
def test_finite_padding_changes_no_bit_of_a_deterministic_backward(target: Target, form: str) -> None:
    case = padded_case(target, form, asks="deterministic")
    problem = cases.build(case)
    with cases.deterministic_flag(case):
        results = [everything(refill(problem, value)) for value in (0.0, 1.0, -3e4)]
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("form", PADDED)
@pytest.mark.parametrize("value", NOT_FINITE)
def test_sanitize_keeps_what_is_not_finite_out(target: Target, form: str, value: float) -> None:
    """NaN or infinity in padding of q, k, v and dout, with sanitize=True: as if it were zero."""
    case = padded_case(target, form, asks="lse_grad", scores="sink")
    problem = refill(cases.build(case), value)
    for name in ("packing", "packing_kv"):
        if name in problem.arguments:
            problem.arguments[name] = sanitizing(problem.arguments[name])
    check(problem, *run(problem))


def sanitizing(packing: anyattn.Packing) -> anyattn.Packing:
    """The same packing, with sanitize=True, through public constructors."""
    if packing.valid.ndim == 2:
        return anyattn.Packing.from_mask(packing.valid, sanitize=True)
    return anyattn.Packing(packing.cu_seqlens, packing.cu_seqlens_padded, sanitize=True)


def test_holes_go_through_pack_and_unpack(target: Target) -> None:
    """A mask with holes gives each entry's real tokens the answer that they have next to each other."""
    case = padded_case(target, "bshd_left")
    dtype, dim = cases.DTYPES[case.dtype], int(case.dims)
    heads, _, kv_heads = case.heads.partition("/")
    mask = torch.tensor(
        [[0, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0]], dtype=torch.bool, device=target.device
    )
    q = torch.randn(3, 6, int(heads), dim, dtype=dtype, device=target.device)
    k, v = torch.randn(2, 3, 6, int(kv_heads or heads), dim, dtype=dtype, device=target.device)
    leaves = [x.masked_fill(~mask[..., None, None], float("nan")).requires_grad_() for x in (q, k, v)]
    packing = anyattn.Packing.from_mask(mask)
    for layout in ("bshd", "sbhd", "bhsd"):
        given = [from_bshd(x, layout) for x in leaves]
        out, lse = anyattn.attention(
            *given, layout=layout, causal=True, packing=packing, backend=target.name, return_lse=True
        )
        out = to_bshd(out, layout)
        grads = torch.autograd.grad(out.float().sum() + lse[lse > -INF].sum(), leaves)
        compact = anyattn.Packing.from_lengths(mask.sum(1), device=target.device)
        tokens = [x[mask].detach().requires_grad_() for x in (q, k, v)]
        flat, flat_lse = anyattn.attention(*tokens, causal=True, packing=compact, backend=target.name, return_lse=True)
        flat_grads = torch.autograd.grad(flat.float().sum() + flat_lse.sum(), tokens)
        assert torch.equal(out[mask], flat)
        assert not out[~mask].any()
        assert torch.equal(lse.transpose(1, 2)[mask], flat_lse.T)
        assert (lse.transpose(1, 2)[~mask] == -INF).all()
        for grad, flat_grad in zip(grads, flat_grads, strict=True):
            torch.testing.assert_close(grad[mask], flat_grad)
            assert not grad[~mask].any()


def test_padding_of_other_shapes_of_the_same_batch_agrees(target: Target) -> None:
    """Compact, padded between, after, before: one batch, the same bits in its real rows."""
    case = padded_case(target, "thd_gaps", asks="forward")
    problem = cases.build(case)
    real_q, real_k = (r[0].to(target.device) for r in (problem.real_q, problem.real_k))
    q, k, v = problem.q[real_q], problem.k[real_k], problem.v[real_k]
    lengths = [s.len_q for s in problem.spans]
    packing = anyattn.Packing.from_lengths(lengths, device=target.device)
    expected = anyattn.attention(q, k, v, causal=True, packing=packing, backend=target.name)
    got = problem.call(return_lse=False)
    if target.backend == "flex":  # its tiles lie at multiples of 128 rows in memory: sums are made in another order
        oracle.check("out", to_bshd(got, problem.layout), problem.expected())
    else:
        assert torch.equal(got[real_q], expected)


def test_padded_offsets_may_start_late_and_rows_may_exceed(target: Target) -> None:
    """cu_seqlens_padded[0] > 0, rows= beyond the offsets, and a tensor with more rows still: all of it is padding."""
    case = padded_case(target, "thd_offset", asks="forward")
    problem = cases.build(case)
    given = problem.arguments["packing"]
    roomy = anyattn.Packing(given.cu_seqlens, given.cu_seqlens_padded, rows=given.rows + 1)
    assert (roomy.rows, problem.q.shape[0]) == (given.rows + 1, given.rows + 2)
    out, lse = problem.call()
    again, again_lse = problem.call(packing=roomy)
    assert torch.equal(out, again)
    assert torch.equal(lse, again_lse)
    real = problem.real_q[0].to(target.device)
    assert not real[0]
    assert not out[~real].any()


def test_padding_is_written_into_what_a_held_graph_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel may differentiate by autograd, whose graph saves out and lse: zeroed padding must not void it."""
    packing = anyattn.Packing(*(torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 5], [0, 4, 8])))
    real = torch.tensor([True, True, True, False, True, True, False, False])
    held: list[tuple[Tensor, list[Tensor]]] = []

    def forward(call: Call) -> Result:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (call.q, call.k, call.v)]
            out = (leaves[0] + leaves[1] + leaves[2]).exp()  # exp saves what it returns
            lse = leaves[0].sum(-1).T.exp()
        held.append((out, leaves))
        return Result(out.detach(), lse.detach(), held=out)

    def backward(call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None) -> Gradients:
        out, leaves = held[0]
        assert saved.held is out
        return Gradients(*torch.autograd.grad(out, leaves, dout))

    monkeypatch.setattr(reference, "forward", forward)
    monkeypatch.setattr(reference, "backward", backward)
    q, k, v = (torch.randn(8, 2, 16, requires_grad=True) for _ in range(3))
    out, lse = anyattn.attention(q, k, v, packing=packing, backend="reference", return_lse=True)
    assert not out[~real].any()
    assert (lse.T[~real] == -INF).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    for grad in grads:
        torch.testing.assert_close(grad, torch.where(real[:, None, None], (q + k + v).exp(), 0.0).detach())
