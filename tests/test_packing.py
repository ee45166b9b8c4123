"""Packings: constructors, what they say, pack and unpack, refilling, moving, pickling."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import anyattn
from anyattn import Packing, PackingError
from anyattn._rows import valid_rows

LENGTHS = st.lists(st.integers(0, 6), max_size=6)
MASKS = st.integers(0, 4).flatmap(
    lambda b: st.integers(0, 6).flatmap(
        lambda s: st.lists(st.lists(st.booleans(), min_size=s, max_size=s), min_size=b, max_size=b)
    )
)


def cu(lengths: list[int]) -> torch.Tensor:
    """Offsets of these lengths."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def numbered(*shape: int) -> torch.Tensor:
    """Every element another number, none 0."""
    return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float64).view(shape)


# --- the layout in memory, by loops --------------------------------------------------------------------------------


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[int], list[int], int, int]:
    """(lengths, room of each, first row, rows after the end)."""
    lengths = draw(LENGTHS)
    room = [n + draw(st.integers(0, 3)) for n in lengths]
    return lengths, room, draw(st.integers(0, 3)), draw(st.integers(0, 3))


@given(layouts())
def test_offsets_say_where_tokens_are(layout: tuple[list[int], list[int], int, int]) -> None:
    lengths, room, first, tail = layout
    starts = [first, *(first + n for n in itertools.accumulate(room))]
    p = Packing(cu(lengths), torch.tensor(starts, dtype=torch.int32), rows=starts[-1] + tail)
    memory = [s + i for s, n in zip(starts, lengths, strict=False) for i in range(n)]
    assert (p.total, p.rows, p.num_sequences) == (sum(lengths), starts[-1] + tail, len(lengths))
    assert p.max_seqlen == max(lengths, default=0)
    assert p.lengths.tolist() == lengths
    assert p.lengths.dtype == torch.int32
    assert p.valid.dtype == torch.bool
    assert p.valid.nonzero().flatten().tolist() == memory
    assert p.valid.shape == (p.rows,)
    x = numbered(p.rows, 2)
    assert torch.equal(p.pack(x), x[memory])
    assert torch.equal(p.unpack(p.pack(x)), torch.where(p.valid[:, None], x, 0))
    assert torch.equal(p.pack(p.unpack(y := numbered(p.total, 3))), y)
    assert torch.equal(valid_rows(p._rows, p.rows + 2), torch.cat([p.valid, torch.zeros(2, dtype=torch.bool)]))


@given(layouts())
def test_gaps_become_sequences_of_their_own(layout: tuple[list[int], list[int], int, int]) -> None:
    """Offsets for kernels without used lengths: each row is a query once and a key once, and gaps meet nothing."""
    lengths, room, first, tail = layout
    starts = [first, *(first + n for n in itertools.accumulate(room))]
    rows = starts[-1] + tail
    p = Packing(cu(lengths), torch.tensor(starts, dtype=torch.int32), rows=rows)
    as_queries, as_keys = p._rows.as_queries.tolist(), p._rows.as_keys.tolist()
    for offsets in (as_queries, as_keys):
        assert offsets[0] == 0
        assert offsets[-1] == rows
        assert all(a <= b for a, b in itertools.pairwise(offsets))
    real = {(s, s + n) for s, n in zip(starts, lengths, strict=False) if n}
    met = set()
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(as_queries), itertools.pairwise(as_keys), strict=True):
        if q1 > q0 and k1 > k0:
            assert (q0, q1) == (k0, k1)
            met.add((q0, q1))
    assert met == real


@given(LENGTHS, st.integers(1, 5))
def test_from_lengths(lengths: list[int], multiple: int) -> None:
    p = Packing.from_lengths(lengths, pad_to_multiple_of=multiple)
    room = [-(-n // multiple) * multiple for n in lengths]
    assert p.cu_seqlens.tolist() == cu(lengths).tolist()
    assert p.cu_seqlens_padded.tolist() == cu(room).tolist()
    assert p.rows == sum(room)
    other = Packing.from_lengths(torch.tensor(lengths, dtype=torch.int64), multiple)
    assert other.cu_seqlens_padded.tolist() == p.cu_seqlens_padded.tolist()


@given(MASKS, st.sampled_from([torch.bool, torch.int64, torch.uint8]))
def test_from_mask(rows: list[list[bool]], dtype: torch.dtype) -> None:
    """Any 2-D mask, holes too."""
    mask = torch.tensor(rows, dtype=torch.bool).reshape(len(rows), len(rows[0]) if rows else 0)
    p = Packing.from_mask(mask.to(dtype))
    assert torch.equal(p.valid, mask)
    assert p.lengths.tolist() == mask.sum(1).tolist()
    assert (p.total, p.rows) == (int(mask.sum()), mask.numel())
    x = numbered(*mask.shape, 2)
    assert torch.equal(p.pack(x), x[mask])
    assert torch.equal(p.unpack(p.pack(x)), torch.where(mask[..., None], x, 0))


@given(st.lists(st.integers(1, 5), max_size=5), st.integers(1, 3))
def test_from_position_ids(lengths: list[int], batch: int) -> None:
    ids = torch.cat([torch.arange(n) for n in lengths]) if lengths else torch.empty(0, dtype=torch.int64)
    p = Packing.from_position_ids(ids)
    assert p.lengths.tolist() == lengths
    rows = Packing.from_position_ids(ids.expand(batch, -1))
    assert rows.lengths.tolist() == lengths * batch


def test_from_position_ids_starts_anew_wherever_an_id_does_not_follow() -> None:
    assert Packing.from_position_ids(torch.tensor([5, 6, 7, 9, 10, 0, 0, 1])).lengths.tolist() == [3, 2, 1, 2]
    assert Packing.from_position_ids(torch.tensor([[0, 1, 2], [3, 4, 5]])).lengths.tolist() == [3, 3]


def test_pack_and_unpack_are_differentiable() -> None:
    p = Packing.from_lengths([2, 0, 3], 4)
    assert torch.autograd.gradcheck(p.pack, torch.randn(p.rows + 1, 2, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(p.unpack, torch.randn(p.total, 2, dtype=torch.float64, requires_grad=True))


def test_pack_takes_any_trailing_dims() -> None:
    p = Packing.from_lengths([1, 2], 2)
    assert p.pack(torch.tensor([5, 0, 6, 7])).tolist() == [5, 6, 7]
    assert p.pack(torch.zeros(4, 2, 3, 5)).shape == (3, 2, 3, 5)
    m = Packing.from_mask(torch.tensor([[1, 0], [1, 1]]))
    assert m.pack(torch.tensor([[5, 0], [6, 7]])).tolist() == [5, 6, 7]
    assert m.unpack(torch.tensor([5, 6, 7])).tolist() == [[5, 0], [6, 7]]


# --- unchecked, fixed capacity, refilling --------------------------------------------------------------------------


def test_unchecked_offsets_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """With check=False and max_seqlen nothing is copied to the host."""
    offsets = cu([3, 4])
    for name in ("tolist", "item", "cpu", "nonzero"):

        def refuse(self: torch.Tensor, *_: object, name: str = name) -> None:
            raise AssertionError(f"Tensor.{name} waits for the device")

        monkeypatch.setattr(torch.Tensor, name, refuse)
    on_meta = Packing(offsets.to("meta"), max_seqlen=4, check=False)
    monkeypatch.undo()
    assert on_meta.max_seqlen == 4
    x = torch.randn(7, 2, 8)
    unchecked = Packing(offsets, max_seqlen=4, check=False)
    checked = Packing(offsets)
    a, b = (anyattn.attention(x, x, x, causal=True, packing=p) for p in (unchecked, checked))
    assert torch.equal(a, b)
    assert (unchecked.total, unchecked.rows) == (7, 7)


@given(layouts(), st.integers(0, 2), st.integers(0, 3))
def test_copy_refills_everything(layout: tuple[list[int], list[int], int, int], more: int, spare: int) -> None:
    """A packing of fixed capacity, refilled, is as good as one made for the batch: derived tensors included."""
    lengths, room, _, _ = layout
    starts = torch.tensor([0, *itertools.accumulate(room)], dtype=torch.int32)
    new = Packing(cu(lengths), starts)
    fixed = Packing.from_lengths([1], max_sequences=max(len(lengths), 1) + more, max_rows=max(new.rows, 1) + spare,
                                 max_seqlen=max(new.max_seqlen, 1))  # fmt: skip
    before = [t.data_ptr() for t in (fixed.cu_seqlens, fixed._rows.starts, fixed._rows.as_keys)]
    assert fixed.copy_(new) is fixed
    assert before == [t.data_ptr() for t in (fixed.cu_seqlens, fixed._rows.starts, fixed._rows.as_keys)]
    assert fixed.total == sum(lengths)
    assert fixed.rows == max(new.rows, 1) + spare
    assert fixed.lengths.tolist() == lengths + [0] * (fixed.num_sequences - len(lengths))
    assert fixed.valid[: new.rows].tolist() == new.valid.tolist()
    assert not fixed.valid[new.rows :].any()
    x = torch.randn(fixed.rows, 2, 8)
    out = anyattn.attention(x, x, x, causal=True, packing=fixed)
    exact = anyattn.attention(x, x, x, causal=True, packing=new)
    assert torch.equal(out, exact)


def test_copy_refills_the_packing_of_a_4d_batch() -> None:
    """What was derived for one shape of batch follows."""
    p = Packing.from_lengths([3, 5], max_seqlen=5)
    x = torch.randn(2, 5, 2, 8)
    for lengths in ([3, 5], [1, 4], [0, 2]):
        p.copy_(Packing.from_lengths(lengths))
        expected = anyattn.attention(x, x, x, packing=Packing.from_lengths(lengths))
        assert torch.equal(anyattn.attention(x, x, x, packing=p), expected)


def right_aligned() -> Packing:
    """Two sequences of two tokens, last in entries of four rows."""
    return Packing(cu([2, 2]), torch.tensor([2, 6, 8], dtype=torch.int32))


@pytest.mark.parametrize("compiled", [False, True])
def test_copy_keeps_tokens_in_their_rows_of_entries(compiled: bool) -> None:
    """Or refuses 4-D tensors: they are not first in their entries."""
    q = torch.randn(2, 4, 1, 8)

    def attend(x: torch.Tensor, p: Packing) -> torch.Tensor:
        return anyattn.attention(x, x, x, packing=p)

    run = torch.compile(attend, backend="eager", fullgraph=True) if compiled else attend
    expected = attend(q, right_aligned())
    same, roomy = right_aligned(), Packing.from_lengths([1, 1], max_rows=8, max_seqlen=4)
    run(q, same)
    same.copy_(right_aligned())
    assert torch.equal(run(q, same), expected)
    roomy.copy_(right_aligned())
    with pytest.raises(PackingError, match=r"first rows of each entry.*elsewhere"):
        run(q, roomy)
    assert torch.equal(run(q.flatten(0, 1), roomy), expected.flatten(0, 1))


def test_copy_refuses_what_its_4d_batches_would_read_wrongly() -> None:
    q = torch.randn(2, 4, 1, 8)
    roomy, placed = Packing.from_lengths([1, 1], max_rows=8, max_seqlen=4), right_aligned()
    for p in (roomy, placed):
        anyattn.attention(q, q, q, packing=p)
    with pytest.raises(PackingError, match="other rows of the entries"):
        roomy.copy_(right_aligned())
    with pytest.raises(PackingError, match="other rows of the entries"):
        placed.copy_(Packing.from_lengths([2, 1]))
    with pytest.raises(PackingError, match="sanitize"):
        roomy.copy_(Packing.from_lengths([2, 1], sanitize=True))


def test_a_copy_of_a_packing_has_tensors_of_its_own() -> None:
    p = Packing.from_lengths([3, 1], max_rows=8, max_seqlen=4)
    other, x = copy.copy(p), torch.randn(8, 1, 8)
    expected = anyattn.attention(x, x, x, packing=p)
    p.copy_(Packing.from_lengths([1, 4]))
    assert torch.equal(anyattn.attention(x, x, x, packing=other), expected)


def test_copy_does_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = Packing.from_lengths([3], max_sequences=3, max_rows=12, max_seqlen=6).to("meta")
    new = Packing.from_lengths([2, 4])
    for name in ("tolist", "item", "cpu", "nonzero"):

        def refuse(self: torch.Tensor, *_: object, name: str = name) -> None:
            raise AssertionError(f"Tensor.{name} waits for the device")

        monkeypatch.setattr(torch.Tensor, name, refuse)
    fixed.copy_(new)


# --- moving and pickling -------------------------------------------------------------------------------------------


def make_all() -> dict[str, Callable[[], Packing]]:
    return {
        "compact": lambda: Packing(cu([3, 0, 2])),
        "padded": lambda: Packing.from_lengths([3, 0, 2], 4),
        "offset": lambda: Packing(cu([3, 2]), torch.tensor([1, 5, 8], dtype=torch.int32), rows=9, sanitize=True),
        "unchecked": lambda: Packing(cu([3, 2]), max_seqlen=3, check=False),
        "capacity": lambda: Packing.from_lengths([3, 2], max_sequences=4, max_rows=8, max_seqlen=4),
        "mask": lambda: Packing.from_mask(torch.tensor([[0, 1, 1], [1, 1, 0]]), sanitize=True),
        "holes": lambda: Packing.from_mask(torch.tensor([[1, 0, 1], [1, 1, 0]])),
        "positions": lambda: Packing.from_position_ids(torch.tensor([[0, 1, 0], [0, 1, 2]])),
        "empty": lambda: Packing.from_lengths([]),
    }


def same(a: Packing, b: Packing) -> None:
    """Two packings say and do the same."""
    assert repr(a) == repr(b)
    assert a.sanitize == b.sanitize
    assert torch.equal(a.cu_seqlens, b.cu_seqlens)
    assert torch.equal(a.cu_seqlens_padded, b.cu_seqlens_padded)
    assert torch.equal(a.valid, b.valid)
    x = numbered(*a.valid.shape, 2)
    assert torch.equal(a.pack(x), b.pack(x))
    q = torch.randn(*(a.valid.shape if a.valid.ndim == 2 else (a.rows,)), 2, 8)
    assert torch.equal(anyattn.attention(q, q, q, packing=a), anyattn.attention(q, q, q, packing=b))


@pytest.mark.parametrize("name", make_all())
def test_packings_pickle(name: str) -> None:
    p = make_all()[name]()
    if p.valid.ndim == 1 and p.rows:
        p._entries.clear()
    same(p, pickle.loads(pickle.dumps(p)))


@pytest.mark.parametrize("name", make_all())
def test_to_the_same_device_is_itself(name: str) -> None:
    p = make_all()[name]()
    assert p.to("cpu") is p
    meta = p.to("meta")
    assert meta.device.type == "meta"
    assert meta.cu_seqlens.device.type == "meta"
    assert meta.max_seqlen == p.max_seqlen


def test_a_packing_says_what_it_is() -> None:
    assert (
        repr(Packing.from_lengths([3, 2], 4)) == "Packing(sequences=2, rows=8, max_seqlen=3, gaps=True, device='cpu')"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", make_all())
def test_packings_move_to_the_gpu_and_back(name: str) -> None:
    p = make_all()[name]()
    moved = p.pin_memory().to("cuda", non_blocking=True)
    assert moved.cu_seqlens.is_cuda
    assert moved.valid.is_cuda
    same(p, moved.to("cpu"))


# --- with 4-D tensors ----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=1, max_size=3))
def test_right_padding_three_ways_is_one(lengths: list[int]) -> None:
    """Compact offsets, offsets in place, and a mask."""
    batch, seq = len(lengths), 5
    mask = torch.arange(seq)[None] < torch.tensor(lengths)[:, None]
    in_place = Packing(cu(lengths), torch.arange(batch + 1, dtype=torch.int32) * seq)
    x = torch.randn(batch, seq, 2, 8)
    answers = [
        anyattn.attention(x, x, x, causal=True, packing=p)
        for p in (Packing.from_lengths(lengths), in_place, Packing.from_mask(mask))
    ]
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_one_packing_serves_several_shapes() -> None:
    p = Packing.from_lengths([3, 2])
    for seq in (3, 4, 7, 4):
        x = torch.randn(2, seq, 2, 8)
        out = anyattn.attention(x, x, x, packing=p)
        expected = anyattn.attention(x[1:, :2], x[1:, :2], x[1:, :2])
        torch.testing.assert_close(out[1:, :2], expected)
        assert not out[1, 2:].any()


def test_capacity_in_rows_is_not_exceeded_by_a_refill() -> None:
    fixed = Packing.from_lengths([1], max_sequences=2, max_rows=4, max_seqlen=4)
    with pytest.raises(PackingError, match="rows is 6, this packing was made for at most 4"):
        fixed.copy_(Packing.from_lengths([3, 3]))


@pytest.mark.parametrize("lengths", [[2, 0, 3], [0], [], [0, 0, 5, 0], [1, 1, 1]])
@pytest.mark.parametrize("multiple", [1, 4])
def test_positions_start_anew_in_every_sequence(lengths, multiple):
    packing = Packing.from_lengths(lengths, pad_to_multiple_of=multiple)
    wanted = [p for n in lengths for p in [*range(n), *[0] * (-n % multiple)]]
    assert packing.position_ids.tolist() == wanted
    roomy = Packing.from_lengths(lengths, max_sequences=6, max_rows=16, max_seqlen=9)
    found = roomy.position_ids.tolist()
    assert len(found) == roomy.rows
    assert found[: sum(lengths)] == [p for n in lengths for p in range(n)]
    assert not any(found[sum(lengths) :])


def test_a_packing_moved_in_inference_mode_serves_training() -> None:
    with torch.inference_mode():
        p = copy.copy(Packing.from_lengths([3, 1]).to("cpu"))
    x = torch.randn(4, 1, 8, requires_grad=True)
    anyattn.attention(x, x, x, packing=p).sum().backward()
    assert x.grad is not None
