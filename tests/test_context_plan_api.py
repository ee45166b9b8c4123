"""A plan as users hold it: shards and what they are made of, numbers, text and pickles, mostly without ranks."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import anyattn
import context_pool
import context_ranks
import context_training_calls as calls
from anyattn import ContextParallel, ContextPlan, Packing
from context_cases import ContextCase, build
from context_judge import judge
from oracle import Terms, visible_pairs

PLACEMENTS = ("auto", "contiguous", "zigzag", "documents")
#: Packings with padding before, between and after sequences; lengths 0, 1 and primes.
LENGTHS = {
    "mixed": [37, 0, 1, 53, 8],
    "one": [101],
    "short": [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5],
    "few": [0, 2, 0],
    "none": [],
    "empty": [0, 0],
}


@pytest.fixture(scope="session")
def pool() -> context_pool.Pool:
    """Ranks."""
    return context_pool.shared()


def padded(lengths: list[int], first: int = 2) -> Packing:
    """Room for a multiple of four, and two rows before."""
    cu, starts = [0], [first]
    for n in lengths:
        cu.append(cu[-1] + n)
        starts.append(starts[-1] - -n // 4 * 4 if n else starts[-1])
    return Packing(torch.tensor(cu, dtype=torch.int32), torch.tensor(starts, dtype=torch.int32))


def every_plan(given: Any, ranks: int, comm: str = "all_gather", **more: Any) -> list[Any]:
    """Unbound plans of all ranks."""
    return [ContextParallel((ranks, r), comm=comm).plan(given, **more) for r in range(ranks)]


# --- shards, without a group ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_every_token_is_on_one_rank_and_keeps_its_position(lengths: str, placement: str, ranks: int) -> None:
    packing = padded(LENGTHS[lengths])
    plans = every_plan(packing, ranks, placement=placement)
    assert len({p.rows for p in plans}) == 1
    numbers = torch.arange(1, packing.rows + 1)
    found = []
    for plan in plans:
        mine = plan.shard(numbers)
        assert mine.shape == plan.valid.shape == plan.position_ids.shape == (plan.rows,)
        assert plan.valid.dtype == torch.bool
        assert plan.position_ids.dtype == torch.int64
        assert torch.equal(plan.valid, mine > 0)
        count = int(plan.valid.sum())
        assert plan.valid[:count].all(), "unused rows come last"
        assert torch.equal(plan.position_ids, plan.shard(packing.position_ids))
        found += mine[mine > 0].tolist()
    assert sorted(found) == numbers[packing.valid].tolist()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_plain_length_is_one_sequence_without_padding(placement: str) -> None:
    plans = every_plan(23, 4, placement=placement)
    found = torch.cat([p.shard(torch.arange(23))[p.valid] for p in plans])
    assert sorted(found.tolist()) == list(range(23))
    for plan in plans:
        assert torch.equal(plan.position_ids[plan.valid], plan.shard(torch.arange(23))[plan.valid])


@pytest.mark.parametrize("multiple", [1, 2, 16, 100])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_rows_are_rounded_up(placement: str, multiple: int) -> None:
    plain, rounded = (
        every_plan(padded([37, 11]), 3, placement=placement, pad_to_multiple_of=m)[0].rows for m in (1, multiple)
    )
    assert rounded % multiple == 0
    assert rounded >= plain - plain % multiple


@pytest.mark.parametrize("lengths", [[64, 64], [100, 7, 23, 31, 5], [128], [40, 40, 40, 8]])
def test_a_balanced_placement_wastes_few_rows(lengths: list[int]) -> None:
    """Tokens are level for the layers around attention: no rank has many more than its share."""
    plan = every_plan(Packing.from_lengths(lengths), 4)[0]
    assert plan.rows <= 1.3 * sum(lengths) / 4 + 1


DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
)  # fmt: skip


def bits(x: Tensor) -> Tensor:
    """The same bytes in a dtype that torch compares and fills: float8 and unsigned ones it does not."""
    if x.dtype in (torch.uint16, torch.uint32, torch.uint64) or x.dtype.itemsize == 1:
        return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])
    return x


def sample(dtype: torch.dtype, *shape: int) -> Tensor:
    """Numbers of any dtype."""
    if dtype == torch.bool:
        return torch.rand(shape) > 0.5
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape).to(dtype)
    return torch.randint(0, 100, shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shards_of_any_dtype(dtype: torch.dtype) -> None:
    packing = padded([9, 0, 14])
    x = sample(dtype, packing.rows, 3)
    for plan in every_plan(packing, 3):
        mine = plan.shard(x)
        assert mine.dtype == dtype
        rows = plan.shard(torch.arange(packing.rows))[plan.valid]
        assert torch.equal(bits(mine)[plan.valid], bits(x)[rows])
        assert not bits(mine)[~plan.valid].any()


@pytest.mark.parametrize(
    ("dtype", "fill"),
    [
        (torch.uint64, 2**64 - 1),
        (torch.uint16, 65535),
        (torch.float8_e5m2, float("-inf")),
        (torch.float8_e4m3fn, -1.5),
        (torch.float8_e8m0fnu, 4),
    ],
    ids=str,
)
def test_fills_of_dtypes_that_torch_does_not_fill(dtype: torch.dtype, fill: float) -> None:
    packing = padded([9, 14])
    x = torch.ones(packing.rows, 3).to(dtype)
    for plan in every_plan(packing, 4, pad_to_multiple_of=8):
        mine = plan.shard(x, fill=fill)
        assert torch.equal(bits(mine)[plan.valid], bits(x)[: int(plan.valid.sum())])
        wanted = torch.full((1,), fill, dtype=dtype)
        assert (bits(mine)[~plan.valid] == bits(wanted)).all()
    assert (~plan.valid).any(), "the test needs padding"


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_any_dim_counts_rows(dim: int) -> None:
    packing = padded([9, 0, 14])
    plan = every_plan(packing, 3)[1]
    x = torch.randn(packing.rows, 2, 5)
    moved = x.movedim(0, dim).contiguous()
    assert torch.equal(plan.shard(moved, dim=dim).movedim(dim, 0), plan.shard(x))


def test_labels_are_filled_with_what_the_loss_ignores() -> None:
    packing = padded([9, 14])
    labels = torch.randint(0, 50, (packing.rows,))
    for plan in every_plan(packing, 4, pad_to_multiple_of=8):
        mine = plan.shard(labels, fill=-100)
        assert (mine[~plan.valid] == -100).all()
        assert (mine[plan.valid] >= 0).all()
    assert (~plan.valid).any(), "the test needs padding"


def test_rows_beyond_the_packing_are_never_taken() -> None:
    packing = padded([9, 14])
    x = torch.randn(packing.rows + 7, 2)
    plan = every_plan(packing, 2)[0]
    assert torch.equal(plan.shard(x), plan.shard(x[: packing.rows]))


def test_a_shards_gradient_is_its_own_rows() -> None:
    packing = padded([9, 14])
    total = torch.zeros(packing.rows, 3)
    for plan in every_plan(packing, 3):
        x = torch.randn(packing.rows, 3, requires_grad=True)
        plan.shard(x).square().sum().backward()
        rows = plan.shard(torch.arange(packing.rows))[plan.valid]
        assert x.grad is not None
        expected = torch.zeros_like(x).index_copy(0, rows, 2 * x.detach()[rows])
        assert torch.equal(x.grad, expected)
        total += (x.grad != 0).float()
    assert torch.equal(total.bool().all(1), packing.valid)


def test_the_keys_of_cross_attention_are_sharded_by_plan_kv() -> None:
    packing, keys = padded([9, 0, 14]), padded([3, 20, 5], first=0)
    plans = every_plan(packing, 3, packing_kv=keys)
    found = []
    for plan in plans:
        assert plan.kv is not plan
        mine = plan.kv.shard(torch.arange(1, keys.rows + 1))
        assert mine.shape == plan.kv.valid.shape == (plan.kv.rows,)
        assert torch.equal(plan.kv.position_ids, plan.kv.shard(keys.position_ids))
        found += mine[plan.kv.valid].tolist()
    assert sorted(found) == (keys.valid.nonzero().flatten() + 1).tolist()


def test_without_packing_kv_the_keys_lie_where_the_queries_do() -> None:
    plan = every_plan(padded([9, 14]), 2)[1]
    x = torch.randn(padded([9, 14]).rows)
    assert torch.equal(plan.kv.shard(x), plan.shard(x))
    assert plan.kv.rows == plan.rows


# --- unshard, over ranks -------------------------------------------------------------------------------------------


def round_trip(
    seat: context_pool.Seat, dtype: torch.dtype, dim: int, placement: str, fill: Any
) -> tuple[torch.dtype, Tensor]:
    """What comes back of a tensor, on a rank: its dtype and, for not all dtypes pickle, bits."""
    packing = padded([9, 0, 14, 1])
    plan = ContextParallel(seat.group).plan(packing, placement=placement)
    x = sample(dtype, packing.rows, 2, 3).movedim(0, dim)
    whole = plan.unshard(plan.shard(x, dim=dim), dim=dim, fill=fill).movedim(dim, 0)
    return whole.dtype, bits(whole)


@pytest.mark.parametrize("ranks", [1, 3, context_pool.Mesh((2, 2), ("p2p", "a2a"))], ids=str)
@pytest.mark.parametrize(("dim", "placement"), [(0, "auto"), (1, "zigzag"), (-1, "documents"), (-2, "contiguous")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unshard_brings_back_the_whole(
    pool: context_pool.Pool, dtype: torch.dtype, dim: int, placement: str, ranks: Any
) -> None:
    packing = padded([9, 0, 14, 1])
    fill = True if dtype == torch.bool else 7
    torch.manual_seed(0)  # as jobs do
    filling = int(bits(torch.full((1,), fill, dtype=dtype))) if dtype.itemsize == 1 else fill
    expected = bits(sample(dtype, packing.rows, 2, 3)).masked_fill(~packing.valid[:, None, None], filling)
    found = context_pool.values(pool.run(ranks, round_trip, dtype, dim, placement, fill))
    for kind, whole in found:
        assert kind == dtype
        assert torch.equal(whole, found[0][1])
        assert torch.equal(whole, expected)


def gradient_of_unshard(seat: context_pool.Seat) -> tuple[Tensor, Tensor]:
    """(whole, what arrives at this rank's shard) where all ranks compute one loss from the whole."""
    plan = ContextParallel(seat.group).plan(padded([9, 14]), pad_to_multiple_of=6)
    mine = (torch.arange(plan.rows, dtype=torch.float32) + 100 * seat.rank).requires_grad_()
    whole = plan.unshard(mine)
    whole.pow(2).sum().backward()
    assert mine.grad is not None
    return plan.valid, mine.grad - 2 * mine.detach() * plan.valid


def test_unshards_gradient_is_this_ranks_own_rows(pool: context_pool.Pool) -> None:
    for valid, difference in context_pool.values(pool.run(3, gradient_of_unshard)):
        assert not difference.any()
        assert (~valid).any()


def layer_between(seat: context_pool.Seat, summed: bool) -> tuple[Tensor, Tensor]:
    """What arrives at this rank's shard, and what should: the loss is a sum over rows that a layer has mixed."""
    packing = padded([9, 14])
    plan = ContextParallel(seat.group).plan(packing)
    layer = torch.randn(packing.rows, packing.rows)
    whole = torch.randn(packing.rows, 3, requires_grad=True)
    mixed = layer @ (whole * packing.valid[:, None])
    mixed[packing.valid].pow(2).sum().backward()
    assert whole.grad is not None
    mine = plan.shard(whole.detach()).requires_grad_()
    together = plan.unshard(mine)

    def added(grad: Tensor) -> Tensor:
        grad = grad.clone()
        torch.distributed.all_reduce(grad, group=seat.group)
        return grad

    if summed:
        together.register_hook(added)
    (plan.shard(layer @ together) * plan.valid[:, None]).pow(2).sum().backward()
    assert mine.grad is not None
    return mine.grad, plan.shard(whole.grad)


def test_a_layer_over_the_whole_batch_between_unshard_and_shard(pool: context_pool.Pool) -> None:
    """Each rank's loss is a part, and so is its gradient of the whole: the documented hook adds the parts up."""
    for found, wanted in context_pool.values(pool.run(3, layer_between, True)):
        torch.testing.assert_close(found, wanted)
    for found, wanted in context_pool.values(pool.run(3, layer_between, False)):
        assert not torch.allclose(found, wanted), "the documentation says that this is a part"


# --- numbers -------------------------------------------------------------------------------------------------------

MASKS = {
    "causal": Terms(causal=True),
    "full": Terms(),
    "window": Terms(window=(5, 3)),
    "causal_window": Terms(causal=True, window=(6, None)),
}


def seen_by_rank(plans: list[Any], lengths: list[int], terms: Terms) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    """By rank and sequence: (which queries it has, which keys it has, which pairs see each other), pair by pair."""
    packing = Packing.from_lengths(lengths)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    found = []
    for plan in plans:
        mine = plan.shard(torch.arange(packing.rows))[plan.valid]
        of_rank = []
        for i, n in enumerate(lengths):
            has = torch.zeros(n, dtype=torch.bool)
            has[(mine[sequence[mine] == i] - sum(lengths[:i]))] = True
            of_rank.append((has, has, visible_pairs(terms, n, n)))
        found.append(of_rank)
    return found


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("comm", ["p2p", "all_gather"])
def test_imbalance_counts_pairs(comm: str, placement: str, mask: str) -> None:
    lengths, terms = [37, 0, 1, 53, 8], MASKS[mask]
    packing = Packing.from_lengths(lengths)
    plans = every_plan(
        packing, 3, comm, placement=placement, causal=terms.causal or False, window=terms.window, num_heads=4
    )
    areas = [sum(int(pairs[q].sum()) for q, _, pairs in rank) for rank in seen_by_rank(plans, lengths, terms)]
    for plan in plans:
        assert plan.imbalance == pytest.approx(max(areas) * 3 / sum(areas))


def test_imbalance_of_nothing_is_balance() -> None:
    assert every_plan(Packing.from_lengths([0, 0]), 2)[0].imbalance == 1.0


def test_zigzag_balances_a_long_causal_document() -> None:
    assert every_plan(4096, 4, placement="zigzag")[0].imbalance == pytest.approx(1.0, abs=0.01)
    assert every_plan(4096, 4, placement="contiguous")[0].imbalance == pytest.approx(1.75, abs=0.01)
    assert every_plan(4096, 4)[0].imbalance < 1.05


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("comm", ["p2p", "all_gather"])
def test_bytes_moved_are_those_of_remote_keys_that_are_seen(comm: str, placement: str, mask: str) -> None:
    """For each rank the keys that its queries see and that it does not own: twice, k and v, in two bytes."""
    lengths, terms = [37, 0, 1, 53, 8], MASKS[mask]
    plans = every_plan(
        Packing.from_lengths(lengths), 3, comm, placement=placement, causal=terms.causal or False, window=terms.window,
        num_heads=8, num_kv_heads=2, head_dim=16, head_dim_v=8,
    )  # fmt: skip
    remote = [
        sum(int((pairs[q].any(0) & ~k).sum()) for q, k, pairs in rank) for rank in seen_by_rank(plans, lengths, terms)
    ]
    for plan in plans:
        assert plan.bytes_moved == max(remote) * 2 * (16 + 8) * 2


@pytest.mark.parametrize("multiple", [1, 64])
def test_bytes_moved_where_heads_are_exchanged_are_those_that_travel(pool: context_pool.Pool, multiple: int) -> None:
    """Padding travels there too."""
    for moved, said in context_pool.values(pool.run(3, calls.moved_by_heads, (37, 0, 1, 53, 8), multiple)):
        assert moved == said


def test_a_windows_bytes_do_not_grow_with_the_document() -> None:
    short, long = (every_plan(n, 4, "p2p", window=(1023, 0), num_heads=8)[0].bytes_moved for n in (1 << 14, 1 << 18))
    assert long == short
    full = every_plan(1 << 18, 4, "p2p", num_heads=8)[0].bytes_moved
    assert long < full / 20


def test_whole_documents_move_nothing() -> None:
    plans = every_plan(Packing.from_lengths([64] * 8), 4)
    assert {p.bytes_moved for p in plans} == {0}
    assert {p.imbalance for p in plans} == {1.0}


@pytest.mark.parametrize("comm", ["p2p", "all_gather", "a2a", "a2a+p2p", "auto"])
def test_explain_says_what_the_plan_does_and_costs(comm: str) -> None:
    ranks: Any = (2, 2) if comm == "a2a+p2p" else 4
    plan = ContextParallel((ranks, 1), comm=comm).plan(Packing.from_lengths([4096, 100, 300]), num_heads=8)
    text = plan.explain()
    assert plan.comm in text
    assert f"{plan.imbalance:.3f}" in text
    for name in ("p2p", "all_gather", "a2a"):
        assert name in text, f"what {name} would cost"
    assert plan.comm in repr(plan)
    assert str(plan.rows) in repr(plan)


# --- other masks, other processes ----------------------------------------------------------------------------------


def test_with_mask_keeps_the_placement() -> None:
    plan = every_plan(padded([61, 7, 30]), 3, window=(8, 0))[1]
    full = plan.with_mask(causal=True)
    assert torch.equal(plan.position_ids, full.position_ids)
    assert (plan.causal, plan.window) == (True, (8, 0))
    assert (full.causal, full.window) == (True, None)
    assert full.bytes_moved > plan.bytes_moved
    both = plan.with_mask(causal=False, window=(4, 5))
    assert (both.causal, both.window) == (False, (4, 5))


@pytest.mark.parametrize("comm", ["p2p", "all_gather", "a2a"])
def test_a_plan_pickles(comm: str) -> None:
    packing = padded([9, 0, 14])
    plan = ContextParallel((3, 2), comm=comm).plan(packing, num_heads=6, window=(4, 2), causal=False)
    plan.imbalance, plan.position_ids, plan.bytes_moved  # noqa: B018  what is derived stays behind
    data = pickle.dumps(plan)
    again = pickle.loads(data)
    x = torch.randn(packing.rows, 2)
    assert torch.equal(again.shard(x), plan.shard(x))
    assert torch.equal(again.position_ids, plan.position_ids)
    assert (again.comm, again.rows, again.window, again.imbalance) == (
        plan.comm,
        plan.rows,
        plan.window,
        plan.imbalance,
    )
    assert again.explain() == plan.explain()
    assert pickle.dumps(pickle.loads(data)) == data


def copies(seat: context_pool.Seat) -> list[tuple[bool, bool]]:
    """Of copies of a plan: whether they unshard, and are still plans of their own."""
    packing = padded([9, 0, 14])
    plan = ContextParallel(seat.group, comm="all_gather").plan(packing, packing_kv=padded([3, 20, 5]), causal=False)
    x = torch.arange(packing.rows)
    found = []
    for make in (copy.copy, copy.deepcopy):
        again = make(plan)
        own = again.position_ids is not plan.position_ids and again.kv is not plan.kv
        found.append((torch.equal(again.unshard(again.shard(x), fill=-1), plan.unshard(plan.shard(x), fill=-1)), own))
    return found


def test_a_copy_keeps_its_plans_group(pool: context_pool.Pool) -> None:
    for found in context_pool.values(pool.run(2, copies)):
        assert found == [(True, True)] * 2


def unsharded_columns(seat: context_pool.Seat) -> list[bool]:
    """Columns and int16 rows of a tensor, which lie apart in memory or in a dtype that few groups carry."""
    packing = Packing.from_lengths([9, 14])
    plan = ContextParallel(seat.group, comm="all_gather").plan(packing)
    whole = torch.arange(packing.rows * 3).view(-1, 3)
    mine = plan.shard(whole)
    columns = [torch.equal(plan.unshard(mine[:, i]), whole[:, i]) for i in range(3)]
    return [*columns, torch.equal(plan.unshard(mine.to(torch.int16)), whole.to(torch.int16))]


def test_rows_that_lie_apart_are_unsharded(pool: context_pool.Pool) -> None:
    assert all(all(found) for found in context_pool.values(pool.run(2, unsharded_columns)))


@pytest.mark.parametrize("make", [pickle.dumps, copy.copy, copy.deepcopy])
def test_keys_alone_are_no_plan(make: Any) -> None:
    plan = every_plan(padded([9, 14]), 2, packing_kv=padded([3, 20]), causal=False)[0]
    with pytest.raises(anyattn.ContextError, match="a part of its plan: pickle or copy the plan"):
        make(plan.kv)
    assert pickle.loads(pickle.dumps(plan)).kv.rows == plan.kv.rows


@pytest.mark.parametrize("comm", ["p2p", "all_gather", "a2a", "auto"])
def test_the_queries_packing_as_packing_kv_is_self_attention(comm: str) -> None:
    packing, x = padded([9, 0, 14]), torch.arange(padded([9, 0, 14]).rows)
    for given, same in ((packing, packing), (packing, padded([9, 0, 14])), (23, 23)):
        plain = every_plan(given, 2, comm)[1]
        said = every_plan(given, 2, comm, packing_kv=same)[1]
        assert said.kv is said
        assert (said.comm, said.rows) == (plain.comm, plain.rows)
        if given is packing:
            assert torch.equal(said.shard(x), plain.shard(x))


def test_packing_kv_of_the_same_lengths_elsewhere_in_memory_is_not() -> None:
    plan = every_plan(padded([9, 14]), 2, packing_kv=padded([9, 14], first=0))[0]
    assert plan.kv is not plan


def test_keys_that_are_placed_apart_later_are_sharded_apart() -> None:
    """Integrations give the keys of a plan another layout, also where their lengths are the queries'."""
    packing = padded([9, 14])
    plan = every_plan(packing, 2, packing_kv=packing, placement="contiguous")[0]
    roomy = replace(plan._data.keys, rows=plan.rows + 3)
    apart = ContextPlan(replace(plan._data, keys=roomy, cross=True), plan._members)
    assert (apart.rows, apart.kv.rows) == (plan.rows, plan.rows + 3)


class Whole:
    """An int of another library."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


def test_ints_of_other_libraries_are_ints() -> None:
    n = Whole
    plan = ContextParallel((n(4), n(1)), comm="all_gather").plan(
        n(64), n(64), window=(n(5), n(0)), num_heads=n(8), num_kv_heads=n(2), head_dim=n(16), head_dim_v=n(8),
        pad_to_multiple_of=n(4),
    )  # fmt: skip
    plain = ContextParallel((4, 1), comm="all_gather").plan(
        64, window=(5, 0), num_heads=8, num_kv_heads=2, head_dim=16, head_dim_v=8, pad_to_multiple_of=4
    )
    assert plan._data == plain._data
    assert plan._data.fingerprint() == plain._data.fingerprint()
    assert pickle.dumps(plan) == pickle.dumps(plain)
    x = torch.randn(3, 64)
    assert torch.equal(plan.shard(x, dim=n(1)), plain.shard(x, dim=1))  # type: ignore[arg-type]
    assert ContextParallel(((n(2), n(2)), n(3))).plan(64, features=None).comm == "a2a+p2p"


def test_what_was_taken_of_a_plan_is_refilled() -> None:
    def made(lengths: list[int]) -> Any:
        packing = Packing.from_lengths(lengths, max_sequences=4, max_rows=32, max_seqlen=32)
        return ContextParallel((2, 0), comm="all_gather").plan(packing)

    plan, other = made([3, 4]), made([20, 5])
    positions, valid = plan.position_ids, plan.valid
    assert not torch.equal(valid, other.valid), "the test needs another batch"
    plan.copy_(other)
    assert torch.equal(positions, other.position_ids)
    assert torch.equal(valid, other.valid)
    assert plan.position_ids is positions
    assert plan.valid is valid


def test_a_pickled_plan_is_host_data_alone() -> None:
    """It grows with documents and ranks, not with tokens."""
    small, large = (len(pickle.dumps(every_plan(n, 8)[0])) for n in (1 << 10, 1 << 22))
    assert large < 2 * small < 20_000


class Batches(Dataset[Any]):
    """Makes plans for rank ``rank`` of two where it is asked for a batch: in a worker."""

    def __init__(self, rank: int, comm: str) -> None:
        self.rank, self.comm = rank, comm

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        case = batch_case(index, self.comm)
        whole = build(case)
        plan = ContextParallel((2, self.rank), comm=self.comm).plan(
            whole.q_side.given, **context_ranks.plan_arguments(case)
        )
        q = whole.tensors["q"]
        assert q is not None
        return plan, plan.shard(q[0])


def batch_case(index: int, comm: str) -> ContextCase:
    """Batch ``index``."""
    return ContextCase(comm=comm, lengths=(5 + 11 * index, 0, 13), gap=4, heads="4/2", seed=index, scores="sink")


def _same(batch: Any) -> Any:
    return batch


def use_loaded(seat: context_pool.Seat, index: int, plans: list[bytes], comm: str) -> context_ranks.Found:
    """Bind what a data loader made, and run the case with it."""
    case = batch_case(index, comm)
    whole = build(case)
    plan = ContextParallel(seat.group, comm=comm).bind(pickle.loads(plans[seat.rank]))
    local = context_ranks.localize(whole, plan, "cpu")
    return context_ranks.measure(whole, local, context_ranks.attend(local))


@pytest.mark.parametrize("comm", ["p2p", "all_gather", "a2a"])
def test_plans_made_in_data_loader_workers(pool: context_pool.Pool, comm: str) -> None:
    loaders = [
        DataLoader(
            Batches(r, comm), batch_size=None, num_workers=2, multiprocessing_context="forkserver", collate_fn=_same
        )
        for r in range(2)
    ]
    for index, made in enumerate(zip(*loaders, strict=True)):
        case = batch_case(index, comm)
        q = build(case).tensors["q"]
        assert q is not None
        for plan, shard in made:
            assert torch.equal(plan.shard(q[0]), shard)
        plans = [pickle.dumps(plan) for plan, _ in made]
        judge(case, context_pool.values(pool.run(2, use_loaded, index, plans, comm)))
