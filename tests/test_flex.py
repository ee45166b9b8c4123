"""FlexAttention beyond the generated cases: its block tables, its compilations, its way to gradients."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import anyattn
import cases
from anyattn._call import Call, Saved, Spec
from anyattn._packing import Packing
from anyattn.backends import _flex_blocks, _flex_call, _flex_compiled, flex
from anyattn.backends._flex_blocks import Blocks

needs_compiler = pytest.mark.skipif(
    bool(flex.probe().flags & {"no_compiler", "no_avx2"}), reason="FlexAttention's CPU kernel cannot be compiled here"
)


def spec(left: int | None = None, right: int | None = None, top_left: bool = False, **more: Any) -> Spec:
    return Spec(0.25, 0.0, left, right, top_left, 0.0, False, True, **more)


WINDOWS = [(None, None), (None, 0), (5, 0), (0, 0), (30, 7), (None, 3), (9, None)]


# --- block tables --------------------------------------------------------------------------------------------------


def grouped(visible: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(any, all) by block of a (S, K) mask; what is beyond the edge is hidden."""
    rows, keys = visible.shape
    padded = torch.nn.functional.pad(visible, (0, -keys % block[1], 0, -rows % block[0]))
    tiles = padded.unflatten(0, (-1, block[0])).unflatten(2, (-1, block[1])).transpose(1, 2).flatten(2)
    return tiles.any(-1), tiles.all(-1)


def check_blocks(blocks: Blocks, visible: Tensor, block: tuple[int, int], *, exact: bool) -> None:
    """Full blocks are full, absent ones empty; where a block holds one sequence, partial ones are partial."""
    some, every = grouped(visible, block)
    assert not (blocks.partial & blocks.full).any()
    assert not (blocks.full & ~every).any(), "a block with hidden scores is called full"
    assert not (~blocks.partial & ~blocks.full & some).any(), "a block with visible scores is left out"
    if exact:
        assert torch.equal(blocks.full, every)
        assert torch.equal(blocks.partial, some & ~every)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("lengths", [(70, 70), (33, 90), (90, 33), (1, 65), (16, 8)], ids=str)
@pytest.mark.parametrize("top_left", [False, True])
def test_blocks_of_a_dense_batch(
    window: tuple[int | None, int | None], lengths: tuple[int, int], top_left: bool
) -> None:
    rows, keys = lengths
    wanted = spec(*window, top_left=top_left)
    blocks = _flex_blocks.dense_blocks(wanted, rows, keys, (16, 8), torch.device("cpu"))
    distance = torch.arange(keys)[None] - torch.arange(rows)[:, None] - (0 if top_left else keys - rows)
    check_blocks(Blocks(*(x[0, 0] for x in blocks)), hidden_by(wanted, distance), (16, 8), exact=True)


def hidden_by(wanted: Spec, distance: Tensor) -> Tensor:
    """What a window lets through."""
    left = distance >= -wanted.left if wanted.left is not None else torch.ones_like(distance, dtype=torch.bool)
    return left & (distance <= wanted.right) if wanted.right is not None else left


def random_packing(rng: random.Random, lengths: list[int]) -> Packing:
    starts, row = [], rng.choice((0, 3))
    for n in lengths:
        starts.append(row)
        row += n + rng.choice((0, 0, 5, 40))
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return Packing(cu, torch.tensor([*starts, row], dtype=torch.int32), rows=row + rng.choice((0, 9)))


@pytest.mark.parametrize("seed", range(40))
def test_blocks_of_a_packed_batch(seed: int) -> None:
    """Against a mask made row by row, gaps and empty sequences included."""
    rng = random.Random(seed)
    lengths_q = [rng.choice((0, 1, 5, 16, 33, 70)) for _ in range(rng.randint(1, 6))]
    lengths_k = lengths_q if rng.random() < 0.5 else [rng.choice((0, 1, 9, 40, 64)) for _ in lengths_q]
    queries, keys = random_packing(rng, lengths_q), random_packing(rng, lengths_k)
    if lengths_q is lengths_k and rng.random() < 0.5:
        keys = queries
    wanted = spec(*rng.choice(WINDOWS), top_left=rng.random() < 0.5)
    rows, columns = queries.rows, keys.rows
    if not rows or not columns:
        pytest.skip("nothing to see")
    side_q, side_k = _flex_blocks.sides(queries._rows, keys._rows, 1, rows, columns, wanted.top_left)
    visible = torch.zeros(rows, columns, dtype=torch.bool)
    for (start_q, n), (start_k, m) in zip(queries._rows.host, keys._rows.host, strict=True):
        distance = torch.arange(m)[None] - torch.arange(n)[:, None] - (0 if wanted.top_left else m - n)
        visible[start_q : start_q + n, start_k : start_k + m] = hidden_by(wanted, distance)
    same = side_q.sequence[0, :, None] == side_k.sequence[0, None]
    real = side_q.real[0, :, None] & side_k.real[0, None]
    told = same & real & hidden_by(wanted, side_k.position[0, None] - side_q.position[0, :, None])
    assert torch.equal(told, visible), "what mask_mod asks is not what the packing says"
    blocks = _flex_blocks.packed_blocks(wanted, side_q, side_k, (16, 8))
    check_blocks(Blocks(*(x[0, 0] for x in blocks)), visible, (16, 8), exact=len(lengths_q) == 1)


def test_documents_leave_most_blocks_out() -> None:
    """Eight documents of eight blocks each: a causal block mask visits their triangles and nothing else."""
    packing = Packing.from_lengths([128] * 8)
    side_q, side_k = _flex_blocks.sides(packing._rows, packing._rows, 1, 1024, 1024, False)
    blocks = _flex_blocks.packed_blocks(spec(None, 0), side_q, side_k, (16, 16))
    assert blocks.partial.sum() == 8 * 8
    assert blocks.full.sum() == 8 * (8 * 7 // 2)


def test_tables_and_back() -> None:
    present = torch.rand(2, 3, 5, 7) > 0.5
    blocks = Blocks(present, ~present & (torch.rand(2, 3, 5, 7) > 0.5))
    tables = _flex_blocks.ordered(blocks, backward=True)
    assert torch.equal(_flex_blocks.unordered(tables.kv_num_blocks, tables.kv_indices, 7), blocks.partial)
    assert tables.full_kv_num_blocks is not None
    assert tables.full_kv_indices is not None
    assert torch.equal(_flex_blocks.unordered(tables.full_kv_num_blocks, tables.full_kv_indices, 7), blocks.full)
    assert tables.q_num_blocks is not None
    assert tables.q_indices is not None
    assert torch.equal(_flex_blocks.unordered(tables.q_num_blocks, tables.q_indices, 5), blocks.partial.mT)


def test_a_block_mask_of_small_blocks_is_made_coarser() -> None:
    visible = torch.rand(1, 2, 50, 70) > 0.02
    fine = Blocks(*(torch.stack([torch.stack([f(x) for x in b]) for b in visible]) for f in (
        lambda x: grouped(x, (8, 4))[0] & ~grouped(x, (8, 4))[1], lambda x: grouped(x, (8, 4))[1],
    )))  # fmt: skip
    coarse = _flex_blocks.coarser(fine, (2, 4))
    for head in range(2):
        check_blocks(Blocks(coarse.partial[0, head], coarse.full[0, head]), visible[0, head], (16, 16), exact=True)


# --- the way to gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_dlse", [False, True])
def test_gradients_of_an_lse_that_is_not_the_kernels_own(with_dlse: bool) -> None:
    """A sink, or a merge, changes out and lse after the kernel: its graph gives the gradients all the same."""
    q, k, v, sink = (torch.randn(*shape).requires_grad_() for shape in ((2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 4), (3,)))
    dout, dlse = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5) if with_dlse else None
    scores = torch.einsum("bshd,bkhd->bhsk", q, k)

    def attend(extra: Tensor | None) -> tuple[Tensor, Tensor]:
        lse = torch.logsumexp(scores, -1)
        final = lse if extra is None else torch.logaddexp(lse, extra[:, None])
        return torch.einsum("bhsk,bkhd->bhsd", torch.exp(scores - final[..., None]), v), final

    held = flex._Held(*attend(None), (q, k, v))
    out, lse = (x.detach() for x in attend(sink))
    expected = torch.autograd.grad(
        attend(sink), (q, k, v), (dout, torch.zeros_like(lse) if dlse is None else dlse), retain_graph=True
    )
    incoming = flex._as_of_own(held, out, lse, dout, dlse)
    found = torch.autograd.grad((held.out, held.lse), (q, k, v), incoming)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_backward_without_an_lse_that_nobody_asked_for(packed: bool) -> None:
    """The graph is the kernel's own, and so are out and lse: dout goes through it as it is, once."""
    leaves = tuple(torch.randn(1, 5, 3, 8).requires_grad_() for _ in "qkv")
    graphs = [torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves)) for _ in "ab"]
    dout = torch.randn(1, 5, 3, 8)
    expected = torch.autograd.grad(graphs[0].transpose(1, 2), leaves, dout)
    nothing: Any = None  # as saved where spec.need_lse is False
    rows = Packing.from_lengths([5])._rows if packed else None
    out, given = (x[0] if packed else x for x in (graphs[1].detach().transpose(1, 2), dout))
    q, k, v = (x.detach()[0] if packed else x.detach() for x in leaves)
    held = flex._Held(graphs[1], None, leaves)
    call = Call(q, k, v, spec(needs_backward=True), "cuda", rows, rows)
    found = flex.backward(call, Saved(out, nothing, None, held), given, None)
    assert held.used
    for mine, theirs in zip(found[:3], expected, strict=True):
        torch.testing.assert_close(mine, theirs[0] if packed else theirs)


def test_rows_that_see_nothing_but_a_sink_have_no_gradient() -> None:
    out, nothing = torch.zeros(1, 1, 3, 4), torch.full((1, 1, 3), -torch.inf)
    held = flex._Held(out, nothing, ())
    for final in (nothing, torch.zeros(1, 1, 3)):
        for x in flex._as_of_own(held, out, final, torch.full_like(out, 1e30), torch.ones(1, 1, 3)):
            assert not x.any()


def test_a_graph_is_recorded_inside_a_custom_op() -> None:
    """Dispatch leaves autograd out there, and functorch in a compiled graph: FlexAttention needs both for a bias."""
    from torch.nn.attention.flex_attention import flex_attention

    def biased(x: Tensor, bias: Tensor) -> Any:
        return flex_attention(x, x, x, score_mod=lambda score, b, h, i, j: score + bias[h, i, j])

    traced = torch.compile(biased, backend="eager", fullgraph=True)

    @torch.library.custom_op("anyattn_test_flex::records", mutates_args=())
    def records(x: Tensor, bias: Tensor) -> Tensor:
        with flex._recording():
            out = traced(x, bias.detach().requires_grad_())
        return x.new_full((), out.requires_grad)

    records.register_fake(lambda x, bias: x.new_empty(()))
    x, bias = torch.randn(1, 2, 8, 16), torch.randn(2, 8, 8)
    assert records(x, bias)
    assert torch.compile(lambda x, bias: records(x * 1, bias), fullgraph=True, backend="aot_eager")(x, bias)


# --- on the CPU ----------------------------------------------------------------------------------------------------


def reference_too(*tensors: Tensor, **arguments: Any) -> None:
    found = anyattn.attention(*tensors, backend="flex", **arguments)
    torch.testing.assert_close(found, anyattn.attention(*tensors, backend="reference", **arguments))


@needs_compiler
def test_several_blocks_of_packed_rows() -> None:
    """Longer than a block: tables that leave blocks out, and full ones, reach the kernel."""
    packing = Packing.from_lengths([300, 0, 7, 200], pad_to_multiple_of=8)
    q, k, v = torch.randn(packing.rows, 2, 16), torch.randn(packing.rows, 1, 16), torch.randn(packing.rows, 1, 16)
    reference_too(q, k, v, packing=packing, causal=True)


@needs_compiler
def test_small_blocks_where_the_kernel_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where tiles are larger: a BlockMask with absent blocks that its mask_mod knows nothing of."""
    from torch.nn.attention.flex_attention import BlockMask

    monkeypatch.setattr(_flex_call, "smallest_block", lambda q: 128)
    counts = torch.tensor([[[1, 2, 3]]], dtype=torch.int32)
    order = torch.tensor([[[[2, 0, 1], [1, 2, 0], [0, 1, 2]]]], dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(counts, order, BLOCK_SIZE=16, seq_lengths=(40, 40))
    q, k, v = (torch.randn(2, 40, 2, 16) for _ in "qkv")
    reference_too(q, k, v, mask=mask, causal=True)


@needs_compiler
def test_inside_a_compiled_region() -> None:
    """The custom op compiles FlexAttention while the graph around it runs."""
    q, k, v = (torch.randn(2, 20, 2, 16) for _ in "qkv")
    mask = torch.rand(20, 20) > 0.3

    @torch.compile(fullgraph=True, backend="aot_eager")
    def around(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return anyattn.attention(q * 2, k, v, mask=mask, backend="flex") + 1

    with torch.no_grad():
        found = around(q, k, v)
    torch.testing.assert_close(found, anyattn.attention(q * 2, k, v, mask=mask, backend="reference") + 1)


@needs_compiler
def test_what_is_compiled_is_kept() -> None:
    from torch._dynamo.utils import counters

    q, k, v = (torch.randn(2, 9, 2, 16) for _ in "qkv")
    anyattn.attention(q, k, v, causal=True, backend="flex")
    before = counters["stats"]["unique_graphs"]
    for factor in (2.0, 3.0):
        anyattn.attention(q * factor, k, v, causal=True, backend="flex")
    assert counters["stats"]["unique_graphs"] == before


def test_the_unfused_kernel_never_runs(monkeypatch: pytest.MonkeyPatch, fresh_choice: Callable[[], None]) -> None:
    """Without torch.compile, FlexAttention would keep all scores in memory: it says no instead."""
    monkeypatch.setattr(_flex_compiled, "_compiled", {})
    monkeypatch.setattr(flex, "probe", lambda: flex.Probe("2.13.0"))
    q = torch.randn(1, 4, 2, 16)
    switched_off: Any = torch._dynamo.config.patch
    with switched_off(disable=True), pytest.raises(anyattn.NoBackend, match=r"torch\.compile is switched off"):
        anyattn.attention(q, q, q, backend="flex")


@pytest.mark.parametrize(("flag", "says"), [("no_compiler", "C\\+\\+ compiler"), ("no_avx2", "AVX2")])
def test_what_the_cpu_kernel_misses_is_a_reason(
    flag: str, says: str, monkeypatch: pytest.MonkeyPatch, fresh_choice: Callable[[], None]
) -> None:
    monkeypatch.setattr(flex, "probe", lambda: flex.Probe("2.13.0", flags=frozenset({flag})))
    fresh_choice()
    q = torch.randn(1, 4, 2, 16)
    with pytest.raises(anyattn.NoBackend, match=says):
        anyattn.attention(q, q, q, backend="flex")


def test_a_missing_compiler_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no_compiler" in flex.probe().flags


def test_the_cpu_kernel_is_the_last_choice() -> None:
    q = torch.randn(1, 4, 2, 16)
    names = [str(kernel) for kernel in anyattn.explain(q, q, q).candidates]
    assert names[-1] == "flex:cpu" or "flex:cpu" not in names


def test_the_cpu_kernel_has_no_gradient() -> None:
    q = torch.randn(1, 4, 2, 16, requires_grad=True)
    with pytest.raises(anyattn.NoBackend, match="backward"):
        anyattn.attention(q, q, q, backend="flex")


def test_which_rows_are_entries() -> None:
    """A mask tensor over padded 4-D tensors is per entry; a BlockMask over packed rows is over all rows."""
    rows = Packing.from_lengths([4, 4])._rows
    x = torch.randn(8, 2, 16)
    call = Call(x, x, x, spec(), "cpu", rows, rows)
    assert _flex_call.entries_of(call) == 1
    assert _flex_call.entries_of(call._replace(mask=torch.ones(2, 1, 4, 4, dtype=torch.bool))) == 2


@needs_compiler
@pytest.mark.parametrize("own", [None, lambda b, h, i, j: True], ids=["none", "a bool"])
def test_a_mask_mod_that_lets_all_through(own: Any) -> None:
    """Blocks alone say what is hidden: as partial ones, with torch's own function of no mask, or a bool for all."""
    from torch.nn.attention.flex_attention import BlockMask

    counts, order = torch.tensor([[[1, 2]]], dtype=torch.int32), torch.tensor([[[[1, 0], [0, 1]]]], dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(counts, order, BLOCK_SIZE=16, seq_lengths=(32, 32), mask_mod=own)
    q, k, v = torch.randn(3, 1, 32, 2, 16).unbind()
    visible = torch.ones(32, 32, dtype=torch.bool)
    visible[:16, :16] = False
    with torch.no_grad():
        out = anyattn.attention(q, k, v, mask=mask, backend="flex")
        exact = anyattn.attention(q, k, v, mask=visible[None, None], backend="reference")
    torch.testing.assert_close(out, exact)


# --- a BlockMask in a compiled region --------------------------------------------------------------------------------


def every_fifth(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i + 2 * j) % 5 != 0


def block_mask(rows: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(every_fifth, None, None, rows, rows, device="cpu")


@needs_compiler
@pytest.mark.parametrize("layout", ["bshd", "sbhd"])
def test_a_block_mask_in_a_compiled_region(layout: str) -> None:
    mask = block_mask(20)
    q, k, v = (torch.randn(20, 2, 2, 16) if layout == "sbhd" else torch.randn(2, 20, 2, 16) for _ in "qkv")

    def around(backend: str) -> Any:
        return anyattn.attention(q * 2, k, v, mask=mask, causal=True, layout=layout, backend=backend) + 1

    with torch.no_grad():
        found = torch.compile(around, fullgraph=True)("auto")
    torch.testing.assert_close(found, around("reference"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"return_lse": True}, "neither gradients nor lse"),
        ({"sink": torch.zeros(2)}, "neither gradients nor lse"),
        ({"dropout": 0.5}, "no dropout"),
        ({"backend": "reference"}, "allows reference only"),
        ({"packing": Packing.from_lengths([20, 20])}, "takes no packing"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_a_block_mask_in_a_compiled_region_does_not_take(arguments: dict[str, Any], says: str) -> None:
    mask, q = block_mask(20), torch.randn(2, 20, 2, 16)
    with pytest.raises(Exception, match=says):
        torch.compile(lambda: anyattn.attention(q, q, q, mask=mask, **arguments), fullgraph=True)()


def test_a_sink_that_joins_in_a_compiled_region() -> None:
    """As the core applies it, and differentiable."""
    from anyattn._core import apply_sink
    from anyattn._traced_block_mask import with_sink

    out, lse, sink = torch.randn(2, 5, 3, 4), torch.randn(2, 3, 5), torch.randn(3, requires_grad=True)
    lse[:, :, 1] = -torch.inf
    out[:, 1] = 0.0
    out.requires_grad_()
    found = with_sink(out, lse, sink)
    for mine, theirs in zip(found, apply_sink(out.detach().clone(), lse.clone(), sink), strict=True):
        torch.testing.assert_close(mine, theirs)
    gradients = torch.autograd.grad([x.sum() for x in found], (out, sink))
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"causal": "bottom_right"}, "causal must be"),
        ({"layout": "bhds"}, "unknown layout"),
        ({"window": (-5, None)}, "window must be"),
        ({"softcap": -3.0}, "softcap must be positive"),
        ({"alibi_slopes": torch.ones(5)}, "alibi_slopes must be"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_block_mask_hides_no_mistake(given: dict[str, Any], said: str) -> None:
    """What eager names is named in a compiled region too, whichever exception torch wraps it in."""
    q = torch.randn(1, 32, 2, 16)
    mask = cases.block_mask(32, 32, "cpu")
    with pytest.raises(anyattn.InvalidArgument):
        anyattn.attention(q, q, q, mask=mask, **given)
    torch._dynamo.reset()
    function = torch.compile(lambda q: anyattn.attention(q, q, q, mask=mask, **given), fullgraph=True)
    with pytest.raises(Exception, match=said):
        function(q)


def test_many_masks_of_one_function_do_not_end_flex() -> None:
    """Dynamo gives up after eight compilations of one code object."""
    from torch.nn.attention.flex_attention import create_block_mask

    def of(width: int) -> Any:
        return create_block_mask(lambda b, h, i, j: i - j < width, None, None, 32, 32, device="cpu", BLOCK_SIZE=16)

    q = torch.randn(1, 32, 2, 16)
    for width in range(1, 11):
        mask = of(width)
        out = anyattn.attention(q, q, q, mask=mask, backend="flex")
        torch.testing.assert_close(out, anyattn.attention(q, q, q, mask=mask, backend="reference"))


def test_a_packing_is_freed() -> None:
    """What flex derives from a packing must not keep it."""
    import gc

    from anyattn import _derived

    q = torch.randn(8, 2, 16)
    gc.collect()
    before = len(_derived._kept)
    for _ in range(3):
        packing = anyattn.Packing.from_lengths([3, 5])
        anyattn.attention(q, q, q, packing=packing, backend="flex")
        del packing
    gc.collect()
    assert len(_derived._kept) <= before
