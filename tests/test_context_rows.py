"""The row primitives of context parallelism, against plain sums and one softmax in float64.

The same tests run on the CPU, on CUDA with ``-m gpu``, and, where Triton is installed, with its interpreter in place of
torch: there TRITON_INTERPRET=1 sends CPU tensors to the kernels.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from anyattn._context import _rows
from anyattn._context._rows import merge_rows, sum_rows

INF, NAN = float("inf"), float("nan")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(_rows, "_on_triton", lambda x: True)


def test_with_tritons_interpreter() -> None:
    """This file again, through the kernels."""
    if INTERPRETED or importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, and no interpreter yet")
    if Version(version("triton")) < Version("3.7"):
        pytest.skip("needs Triton 3.7: older interpreters stop at numpy 2.4")
    # numpy, in which the interpreter computes, warns of -inf - -inf.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    folder = Path(__file__).parent.parent
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


# --- Sums ----------------------------------------------------------------------------------------------------------


def random_rows(rows: int, heads: int, dim: int, dtype: torch.dtype, device: str, layout: str = "dense") -> Tensor:
    """(rows, heads, dim) in one of the layouts that a schedule meets; what lies around it is NaN."""
    x = torch.randn(rows, heads, dim, dtype=torch.float64)
    if layout == "dense":
        return x.to(device, dtype)
    sizes = {"wide": (rows, heads + 3, dim + 8), "heads": (rows, heads + 3, dim), "rows": (rows, heads + 1, dim)}
    around = torch.full(sizes.get(layout, (heads, rows, dim)), NAN).to(device, dtype)
    view = {
        "wide": lambda: around[:, 2 : 2 + heads, 8:],
        "heads": lambda: around[:, 2 : 2 + heads],
        "rows": lambda: around[:, :heads],
        "transposed": lambda: around.transpose(0, 1),
    }[layout]()
    view.copy_(x.to(device, dtype))
    return view


def random_table(rows: int, columns: int, total: int, device: str, missing: float = 0.3) -> Tensor:
    """Every entry is a row of the sources, or negative."""
    table = torch.randint(total, (rows, columns), dtype=torch.int32)
    return torch.where(torch.rand(rows, columns) < missing, torch.tensor(-1, dtype=torch.int32), table).to(device)


def brute_force(sources: Sequence[Tensor], table: Tensor, base: Tensor | None) -> Tensor:
    """The definition, row by row in float64 on the CPU."""
    rows = torch.cat([x.detach().cpu().double() for x in sources])
    total = torch.zeros(table.shape[0], *rows.shape[1:], dtype=torch.float64)
    if base is not None:
        total += base.cpu().double()
    for i, entries in enumerate(table.tolist()):
        for entry in entries:
            if entry >= 0:
                total[i] += rows[entry]
    return total


def assert_rounded_once(got: Tensor, expected: Tensor, terms: int) -> None:
    """Within one rounding to got's dtype, and one to float32 for each term."""
    wide = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32)
    slack = terms * wide.eps * (terms + expected.abs().max().item())
    # The interpreter cuts float32 off to bfloat16.
    rounding = 1.01 if INTERPRETED and got.dtype == torch.bfloat16 else 0.501
    band = torch.finfo(got.dtype).eps * expected.abs() * rounding + slack
    error = (got.cpu().double() - expected).abs()
    assert (error <= band).all(), (error - band).max()


DTYPES = [
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
    (torch.float64, torch.float32),
]


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: f"{pair[0]}-{pair[1]}".replace("torch.", ""))
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("with_base", [False, True])
def test_sums_of_rows(
    device: str, dtypes: tuple[torch.dtype, torch.dtype], columns: int, count: int, with_base: bool
) -> None:
    """Any number of sources, one of them empty where there are three; -1 adds nothing."""
    heads, dim, rows = 2, 24, 37
    sources = [
        random_rows(0 if i == 1 and count == 3 else 9 + 5 * i, heads, dim, dtypes[1], device) for i in range(count)
    ]
    table = random_table(rows, columns, sum(x.shape[0] for x in sources), device)
    table[5] = -1
    base = random_rows(rows, heads, dim, dtypes[0], device) if with_base else None
    out = torch.full((rows, heads, dim), NAN, dtype=dtypes[0], device=device)
    sum_rows(out, sources, table, base)
    assert_rounded_once(out, brute_force(sources, table, base), columns + with_base)
    assert out[5].equal(torch.zeros_like(out[5]) if base is None else base[5])


LAYOUTS = ("dense", "wide", "heads", "rows", "transposed")


@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, repeat=2)), ids="-".join)
@pytest.mark.parametrize("columns", [1, 2])
def test_strided_rows(device: str, layouts: tuple[str, str], columns: int) -> None:
    """Rows and heads of out, base and sources may lie apart, and nothing between them is read or written."""
    out = random_rows(19, 3, 16, torch.float32, device, layouts[0])
    around = out._base if out._base is not None else out
    outside = around.isnan().sum()
    sources = [random_rows(11, 3, 16, torch.float32, device, layouts[1]), random_rows(4, 3, 16, torch.float32, device)]
    table = random_table(19, columns, 15, device)
    base = random_rows(19, 3, 16, torch.float32, device, layouts[1]) if columns == 2 else None
    sum_rows(out, sources, table, base)
    assert_rounded_once(out, brute_force(sources, table, base), 3)
    assert around.isnan().sum() == outside


def test_a_base_in_place(device: str) -> None:
    """Accumulating in float32 over stages gives what one sum gives."""
    total = torch.zeros(20, 2, 8, device=device)
    stages = [(random_rows(7, 2, 8, torch.bfloat16, device), random_table(20, 2, 7, device)) for _ in range(3)]
    for source, table in stages:
        sum_rows(total, [source], table, total)
    expected = sum((brute_force([source], table, None) for source, table in stages), torch.zeros(()))
    assert_rounded_once(total, expected, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 3])
def test_the_first_source_in_place(device: str, dtype: torch.dtype, columns: int) -> None:
    """Rows may be added to what out holds; a row that names nothing, not even itself, becomes zero."""
    whole = random_rows(20, 4, 8, dtype, device)
    out, came = whole[3:17, 1:3], random_rows(7, 2, 8, dtype, device)
    before, around = out.clone(), whole.clone()
    table = random_table(14, columns, 7, device)
    table = torch.where(table < 0, table, table + 14)
    table[:, 0] = torch.arange(14, device=device)
    table[5], table[9:11, 0] = -1, -1
    sum_rows(out, [out, came], table)
    assert_rounded_once(out, brute_force([before, came], table, None), columns)
    assert not out[5].any()
    around[3:17, 1:3] = out
    assert torch.equal(whole, around)


def test_sums_are_added_column_after_column(device: str) -> None:
    """Not in another order: 2**24 + 1 + 1 is 2**24 in float32, 1 + 1 + 2**24 is not. So a sum is repeatable."""
    big = float(1 << 24)
    source = torch.tensor([big, 1.0, 1.0], device=device).view(3, 1, 1).expand(3, 2, 4).contiguous()
    table = torch.tensor([[0, 1, 2], [1, 2, 0]], dtype=torch.int32, device=device)
    out = torch.empty(2, 2, 4, device=device)
    sum_rows(out, [source], table)
    assert out[0].eq(big).all()
    assert out[1].eq(big + 2).all()


def test_rows_that_are_not_named_are_not_read(device: str) -> None:
    """NaN there reaches nothing."""
    source = random_rows(6, 2, 8, torch.bfloat16, device)
    source[1::2] = NAN
    table = torch.tensor([[0, 4], [-1, 2], [2, -1], [-1, -1]], dtype=torch.int32, device=device)
    for columns in (1, 2):
        out = torch.full((4, 2, 8), NAN, dtype=torch.float32, device=device)
        sum_rows(out, [source], table[:, :columns].contiguous())
        assert_rounded_once(out, brute_force([source.nan_to_num()], table[:, :columns], None), 2)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 2, 3)], ids=str)
def test_a_gather_copies_any_dtype(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Bit by bit, also where float32 could not hold it, and for rows of any number of dims."""
    size = (8, *shape)
    source = torch.randint(1 << 40, size, device=device) if dtype == torch.int64 else torch.randn(size, device=device)
    source = source.to(dtype) if dtype != torch.uint8 else source.abs().to(dtype)
    for table in ([7, 0, 3, 3], [5, -1, 0, 2]):
        named = torch.tensor(table, dtype=torch.int32, device=device)
        out = torch.ones(4, *shape, dtype=dtype, device=device)
        sum_rows(out, [source], named[:, None])
        missing = (named < 0).view(-1, *(1,) * len(shape))
        assert out.equal(source[named.long().clamp_min(0)].masked_fill(missing, 0))


def test_lse_as_rows(device: str) -> None:
    """(heads, rows) is rows of heads of one number."""
    lse, out = torch.randn(3, 10, device=device), torch.empty(3, 4, device=device)
    table = torch.tensor([[9], [0], [4], [5]], dtype=torch.int32, device=device)
    sum_rows(out.t().unsqueeze(2), [lse.t().unsqueeze(2)], table)
    assert out.equal(lse[:, [9, 0, 4, 5]])


@pytest.mark.parametrize("dim", [1, 40, 128, 192, 1200])
@pytest.mark.parametrize("rows", [1, 65])
@pytest.mark.parametrize("layout", ["dense", "heads"])
def test_sums_of_all_sizes(device: str, dim: int, rows: int, layout: str) -> None:
    """More rows and columns than one program handles, and fewer."""
    sources = [random_rows(rows, 3, dim, torch.bfloat16, device, layout) for _ in range(2)]
    for columns in (1, 2):
        table = random_table(rows, columns, 2 * rows, device)
        out = torch.full((rows, 3, dim), NAN, device=device)
        sum_rows(out, sources, table)
        assert_rounded_once(out, brute_force(sources, table, None), columns)


def test_nothing_to_sum(device: str) -> None:
    """No rows, and rows of nothing but negative entries over empty sources."""
    empty = torch.empty(0, 2, 8, device=device)
    sum_rows(empty, [empty], torch.empty(0, 1, dtype=torch.int32, device=device))
    for columns in (1, 2):
        out = torch.full((3, 2, 8), NAN, device=device)
        sum_rows(out, [empty, empty], torch.full((3, columns), -1, dtype=torch.int32, device=device))
        assert out.eq(0).all()


def test_what_sum_rows_does_not_take(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers' mistakes are assertions. On a GPU, they are looked for where a kind of arguments is met first."""
    if device == "cuda":
        from anyattn._context import _rows_triton

        monkeypatch.setattr(_rows_triton._launch_sum, "_compiled", {})
    out, source = torch.zeros(4, 2, 8, device=device), torch.zeros(5, 2, 8, device=device)
    table = torch.zeros(4, 1, dtype=torch.int32, device=device)
    wrong = [
        (out, [], table, None),
        (out, [source] * 5, table, None),
        (out, [source, source.double()], table, None),
        (out, [source[:, :1]], table, None),
        (out, [source], table.long(), None),
        (out, [source], table[:3], None),
        (out, [source], table[:, :0], None),
        (out, [source], torch.zeros(4, 2, dtype=torch.int32, device=device)[:, :1], None),
        (out, [source], table, out[:, :1]),
        (out.long(), [source.long()], torch.cat([table, table], 1), None),
        (torch.zeros(4, 8, 2, device=device).transpose(1, 2), [source], table, None),
        (out.view(4, 2, 2, 4)[:, :, :1], [source.view(5, 2, 2, 4)[:, :, :1]], table, None),
    ]
    for arguments in wrong:
        with pytest.raises(AssertionError):
            sum_rows(*arguments)


# --- Merges --------------------------------------------------------------------------------------------------------


class Attention:
    """Softmax over keys in float64, of which parts can be taken."""

    def __init__(self, rows: int, heads: int, dim: int, keys: int, scale: float = 1.0) -> None:
        self.scores = scale * torch.randn(rows, heads, keys, dtype=torch.float64)
        self.values = torch.randn(keys, heads, dim, dtype=torch.float64)

    def over(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """out (rows, heads, dim) and lse (heads, rows) over some of the keys."""
        scores = self.scores[..., begin:end]
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp().nan_to_num(0.0)
        return torch.einsum("rhk,khd->rhd", weights, self.values[begin:end]), lse.t().contiguous()


def as_part(out: Tensor, lse: Tensor, dtype: torch.dtype, device: str, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What a kernel returns: these rows are right, the others NaN, and so are values of a row that saw no key."""
    out = out.masked_fill(lse.t()[..., None] == -INF, NAN)
    part, part_lse = torch.full_like(out, NAN), torch.full_like(lse, NAN)
    part[rows], part_lse[:, rows] = out[rows], lse[:, rows]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return part.to(device, dtype), part_lse.to(device, wide)


def indices(rows: Tensor, device: str) -> Tensor:
    """As the kernels take them."""
    return rows.to(device, torch.int32)


def accumulators(rows: int, heads: int, dim: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """out and lse of rows that have seen no key."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    lse = torch.full((heads, rows), -INF, dtype=wide, device=device)
    return torch.zeros(rows, heads, dim, dtype=wide, device=device), lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_merging_in_any_order_is_the_softmax_of_the_whole(
    device: str, dtype: torch.dtype, order: tuple[int, ...]
) -> None:
    """Parts of unlike weight; some rows have no key in some parts, and one has none in any."""
    rows, heads, dim, cuts = 13, 3, 24, (0, 4, 5, 30)
    attention = Attention(rows, heads, dim, cuts[-1], scale=4.0)
    attention.scores[::3, :, :4] = -INF
    attention.scores[1::3, 1, 5:] = -INF
    attention.scores[2] = -INF
    out, lse = accumulators(rows, heads, dim, dtype, device)
    final = torch.full_like(out, NAN, dtype=dtype)
    for i, piece in enumerate(order):
        part, part_lse = as_part(*attention.over(*cuts[piece : piece + 2]), dtype, device, torch.arange(rows))
        every = indices(torch.randperm(rows), device)
        merge_rows(out, lse, part, part_lse, every, every, final=final if i == 2 else None)
    expected, expected_lse = attention.over(0, cuts[-1])
    band = {torch.bfloat16: 8, torch.float32: 16, torch.float64: 64}[dtype] * torch.finfo(dtype).eps
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=band)
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=0, atol=64 * torch.finfo(lse.dtype).eps)
    assert_rounded_once(final, out.cpu().double(), 1)
    assert out[2].eq(0).all()
    assert lse[:, 2].eq(-INF).all()


@pytest.mark.parametrize("layout", ["dense", "wide", "heads", "transposed"])
def test_only_the_named_rows_are_merged(device: str, layout: str) -> None:
    """Row rows_part[i] of the part into row rows[i]; the rest stays, whatever the part holds elsewhere."""
    attention, others = Attention(9, 3, 16, 20), Attention(14, 3, 16, 20)
    to, of = torch.tensor([12, 3, 7, 0]), torch.tensor([2, 8, 0, 5])
    out = random_rows(14, 3, 16, torch.float32, device, layout)
    before, lse = others.over(0, 20)
    out.copy_(before)
    whole_lse = torch.full((5, 20), NAN, device=device)
    whole_lse[1:4, 2:16] = lse
    part, part_lse = as_part(*attention.over(0, 20), torch.float32, device, of)
    spread = random_rows(9, 3, 16, torch.float32, device, layout)
    spread.copy_(part)
    final = torch.full((14, 3, 16), NAN, dtype=torch.float16, device=device)
    merge_rows(out, whole_lse[1:4, 2:16], spread, part_lse, indices(to, device), indices(of, device), final=final)

    after, after_lse = attention.over(0, 20)
    expected, expected_lse = before.clone(), lse.clone()
    weight = torch.sigmoid(after_lse[:, of] - lse[:, to]).t()[..., None]
    expected[to] = (1 - weight) * before[to] + weight * after[of]
    expected_lse[:, to] = torch.logaddexp(lse[:, to], after_lse[:, of])
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(whole_lse[1:4, 2:16].cpu().double(), expected_lse, rtol=0, atol=2e-6)
    stays = torch.tensor([i for i in range(14) if i not in to.tolist()])
    assert out.cpu()[stays].equal(before.float()[stays])
    assert whole_lse.isnan().sum() == 5 * 20 - 3 * 14
    assert final.cpu()[to].equal(out.cpu()[to].half())
    assert final.cpu()[stays].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_that_saw_no_key(device: str, dtype: torch.dtype) -> None:
    """Exactly, bit by bit: nothing changes, the part is taken, 0 and -inf; and NaN values of such rows are not read."""
    out, lse = accumulators(4, 2, 8, dtype, device)
    part = torch.randn(4, 2, 8, device=device).to(dtype)
    part_lse = torch.randn(2, 4, device=device).to(lse.dtype)
    out[:2], lse[:, :2] = torch.randn(2, 2, 8, device=device).to(out.dtype), 0.7
    part[::2], part_lse[:, ::2] = NAN, -INF
    out[2:] = NAN
    before, before_lse = out.clone(), lse.clone()
    every = indices(torch.arange(4), device)
    final = torch.full_like(out, NAN)
    merge_rows(out, lse, part, part_lse, every, every, final=final)
    assert out[0].equal(before[0])
    assert lse[:, 0].equal(before_lse[:, 0])
    assert out[2].eq(0).all()
    assert lse[:, 2].eq(-INF).all()
    assert out[3].equal(part[3].to(out.dtype))
    assert lse[:, 3].equal(part_lse[:, 3])
    assert not out[1].isnan().any()
    assert final.equal(out)


def test_a_row_of_which_one_head_saw_no_key(device: str) -> None:
    """Heads are merged each for itself."""
    out, lse = torch.randn(3, 2, 8, device=device), torch.randn(2, 3, device=device)
    part, part_lse = torch.randn(3, 2, 8, device=device), torch.randn(2, 3, device=device)
    part[:, 1], part_lse[1] = NAN, -INF
    before, before_lse = out.clone(), lse.clone()
    every = indices(torch.arange(3), device)
    merge_rows(out, lse, part, part_lse, every, every)
    assert out[:, 1].equal(before[:, 1])
    assert lse[1].equal(before_lse[1])
    assert lse[0].gt(before_lse[0]).all()


def test_a_nan_that_a_row_made_stays_visible(device: str) -> None:
    """Where keys were seen, what the kernel found is passed on."""
    out, lse = torch.zeros(2, 1, 4, device=device), torch.zeros(1, 2, device=device)
    every = indices(torch.arange(2), device)
    part_lse = torch.tensor([[NAN, 0.0]], device=device)
    merge_rows(out, lse, torch.full((2, 1, 4), NAN, device=device), part_lse, every, every)
    assert out.isnan().all()
    assert lse.isnan().tolist() == [[True, False]]


def test_unlike_weights(device: str) -> None:
    """Differences that overflow exp change nothing but by rounding, in both directions."""
    for gap in (30.0, 200.0, 1e4):
        for low, high in ((0.0, gap), (-gap, 0.0)):
            a, b = torch.randn(5, 2, 8, device=device), torch.randn(5, 2, 8, device=device)
            every = indices(torch.arange(5), device)
            for old, new in ((low, high), (high, low)):
                out, lse = a.clone(), torch.full((2, 5), old, device=device)
                merge_rows(out, lse, b, torch.full((2, 5), new, device=device), every, every)
                torch.testing.assert_close(out, a if old > new else b, rtol=0, atol=1e-6)
                torch.testing.assert_close(lse, torch.full_like(lse, high), rtol=0, atol=1e-12)


def test_fresh_accumulators_are_not_read(device: str) -> None:
    """The first part is taken as it is, zeros where it saw no key."""
    out, lse = torch.full((6, 2, 8), NAN, device=device), torch.full((2, 6), NAN, device=device)
    part, part_lse = torch.randn(4, 2, 8, device=device).bfloat16(), torch.randn(2, 4, device=device)
    part[1], part_lse[:, 1] = NAN, -INF
    to, of = torch.tensor([5, 0, 2]), torch.tensor([3, 1, 0])
    final = torch.full((6, 2, 8), NAN, dtype=torch.bfloat16, device=device)
    merge_rows(out, lse, part, part_lse, indices(to, device), indices(of, device), final=final, fresh=True)
    expected = part.float()
    expected[1] = 0
    assert out.cpu()[to].equal(expected.cpu()[of])
    assert lse.cpu()[:, to].equal(part_lse.cpu()[:, of])
    assert final.cpu()[to].equal(expected.cpu()[of].bfloat16())
    assert [int(x.isnan().sum()) for x in (out, lse, final)] == [48, 6, 48]


@pytest.mark.parametrize("dim", [1, 64, 192, 256])
@pytest.mark.parametrize("rows", [1, 130])
def test_merges_of_all_sizes(device: str, dim: int, rows: int) -> None:
    """More rows than one program handles, and fewer; several warps on a row."""
    attention = Attention(rows, 2, dim, 8)
    out, lse = accumulators(rows, 2, dim, torch.float32, device)
    every = torch.randperm(rows)
    for i, cuts in enumerate(((0, 2), (2, 5), (5, 8))):
        part, part_lse = as_part(*attention.over(*cuts), torch.float32, device, every)
        merge_rows(out, lse, part, part_lse, indices(every, device), indices(every, device), fresh=i == 0)
    expected, expected_lse = attention.over(0, 8)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=0, atol=2e-6)


def test_nothing_to_merge(device: str) -> None:
    """No rows: nothing changes."""
    out, lse = torch.randn(3, 2, 8, device=device), torch.randn(2, 3, device=device)
    before, none = out.clone(), torch.empty(0, dtype=torch.int32, device=device)
    merge_rows(out, lse, out[:0], lse[:, :0], none, none)
    assert out.equal(before)


def test_what_merge_rows_does_not_take(device: str) -> None:
    """Callers' mistakes are assertions."""
    out, lse = torch.zeros(3, 2, 8, device=device), torch.zeros(2, 3, device=device)
    rows = torch.arange(3, dtype=torch.int32, device=device)
    wrong = [
        (out.bfloat16(), lse.bfloat16(), out, lse, rows, rows),
        (out, lse.double(), out, lse, rows, rows),
        (out, lse.t(), out, lse, rows, rows),
        (out, lse, out[:2], lse, rows, rows),
        (out, lse, out[:, :1], lse, rows, rows),
        (out, lse, out, lse, rows.long(), rows.long()),
        (out, lse, out, lse, rows, rows[:2]),
        (out, lse, torch.zeros(3, 8, 2, device=device).transpose(1, 2), lse, rows, rows),
    ]
    for arguments in wrong:
        with pytest.raises(AssertionError):
            merge_rows(*arguments)
    with pytest.raises(AssertionError):
        merge_rows(out, lse, out.clone(), lse.clone(), rows, rows, final=out[:2])


@pytest.mark.gpu
def test_a_cuda_graph_holds_both() -> None:
    """Captured once, replayed with other values, tables and rows; nothing waits for the device."""
    sources = [random_rows(9, 2, 64, torch.bfloat16, "cuda") for _ in range(2)]
    table, summed = random_table(30, 2, 18, "cuda"), torch.empty(30, 2, 64, device="cuda")
    out, lse = torch.empty(30, 2, 64, device="cuda"), torch.empty(2, 30, device="cuda")
    part, part_lse = torch.empty(30, 2, 64, device="cuda"), torch.empty(2, 30, device="cuda")
    rows = torch.arange(30, dtype=torch.int32, device="cuda")

    def work() -> None:
        sum_rows(summed, sources, table)
        merge_rows(out, lse, part, part_lse, rows, rows)

    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for _ in range(2):
        attention = Attention(30, 2, 64, 8)
        for x, y in zip((out, lse, part, part_lse), (*attention.over(0, 3), *attention.over(3, 8)), strict=True):
            x.copy_(y)
        for source in sources:
            source.normal_()
        table.copy_(random_table(30, 2, 18, "cuda"))
        graph.replay()
        assert_rounded_once(summed, brute_force(sources, table, None), 2)
        torch.testing.assert_close(out.cpu().double(), attention.over(0, 8)[0], rtol=0, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_waits_for_the_device() -> None:
    """Not even with -1 in the table."""
    source, out, lse = (torch.randn(8, 2, 64, device="cuda") for _ in range(3))
    lse = lse[:, :, 0].t()
    table = random_table(8, 2, 8, "cuda")
    rows = torch.arange(8, dtype=torch.int32, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        sum_rows(out, [source], table)
        sum_rows(out, [source], table[:, :1].contiguous())
        merge_rows(out, lse, source, lse.clone(), rows, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
