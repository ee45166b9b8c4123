"""Mistakes about plans and groups are named, on every rank alike, and nothing hangs.

What is wrong on all ranks raises the same error on all of them before anything travels, on ranks that hold nothing too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import anyattn
import context_pool
from anyattn import (
    ContextError,
    ContextParallel,
    DeviceError,
    DtypeError,
    InvalidArgument,
    NoBackend,
    Packing,
    PackingError,
    ShapeError,
    UnknownBackend,
    Unsupported,
)
from anyattn._context._topology import members_of


def cp(comm: str = "all_gather", ranks: Any = 4) -> ContextParallel:
    """Rank 0, without a group."""
    return ContextParallel((ranks, 0), comm=comm)


P = Packing.from_lengths([9, 14])
HOLES = Packing.from_mask(torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1]]))

#: name: (the mistake, its exception, what its message says)
MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a scheme that does not exist": (lambda: cp("ring"), ContextError, "'ring'.*p2p, all_gather, a2a, a2a\\+p2p"),
    "no mesh, no group": (lambda: ContextParallel("cuda"), ContextError, "DeviceMesh, a ProcessGroup.*got str"),
    "a rank beyond the world": (lambda: ContextParallel((4, 4)), ContextError, "0 to 3, got 4"),
    "a negative rank": (lambda: ContextParallel((4, -1)), ContextError, "0 to 3, got -1"),
    "a world of no ranks": (lambda: ContextParallel((0, 0)), ContextError, "world_size"),
    "three numbers": (lambda: ContextParallel((2, 2, 0)), ContextError, "world_size"),
    "a2a+p2p in one dim": (lambda: cp("a2a+p2p"), ContextError, "two-dimensional mesh"),
    "another scheme in two dims": (lambda: cp("p2p", (2, 2)), ContextError, "a2a\\+p2p"),
    "a plan of a tensor": (lambda: cp().plan(torch.zeros(3)), ContextError, "Packing or a length, got Tensor"),
    "a plan of a bool": (lambda: cp().plan(True), ContextError, "Packing or a length, got bool"),
    "a negative length": (lambda: cp().plan(-3), ContextError, ">= 0, got -3"),
    "a packing with holes": (lambda: cp().plan(HOLES), PackingError, "holes.*pack"),
    "other numbers of sequences": (
        lambda: cp().plan(P, packing_kv=Packing.from_lengths([3])), ContextError, "2 and 1",
    ),
    "a packing and a length": (lambda: cp().plan(P, packing_kv=9), ContextError, "both packings or both lengths"),
    "cross-attention around a ring": (
        lambda: cp("p2p").plan(P, packing_kv=Packing.from_lengths([3, 4])), ContextError, "'all_gather' or 'a2a'",
    ),
    "cross-attention in two dims": (
        lambda: cp("a2a+p2p", (2, 2)).plan(P, packing_kv=Packing.from_lengths([3, 4])), ContextError,
        "'all_gather'.*_flatten",
    ),
    "heads that no rank count divides": (lambda: cp("a2a").plan(P, num_heads=6), ContextError, "6 query heads.*4"),
    "heads that two ranks do not divide": (
        lambda: cp("a2a+p2p", (2, 2)).plan(P, num_heads=5), ContextError, "5 query heads.*2.*_flatten",
    ),
    "a bias on two dims": (
        lambda: cp("auto", (2, 2)).plan(8, features=("bias",)), ContextError, "comm='all_gather'.*_flatten",
    ),
    "ALiBi both ways on two dims": (
        lambda: cp("auto", (2, 2)).plan(8, causal=False, features=("alibi",)), ContextError, "comm='a2a'.*_flatten",
    ),
    "with_mask on two dims that ALiBi cannot have": (
        lambda: cp("auto", (2, 2)).plan(8, features=("alibi",)).with_mask(causal=False), ContextError, "_flatten",
    ),
    "a bias over packed rows on two dims": (
        lambda: cp("auto", (2, 2)).plan(P, features=("bias",)), ContextError, "told apart already$",
    ),
    "a fixed capacity on two dims": (
        lambda: cp("auto", (2, 2)).plan(
            Packing.from_lengths([3], max_sequences=2, max_rows=8, max_seqlen=8)
        ), ContextError, "comm='all_gather' or 'a2a'.*_flatten",
    ),
    "kv heads that do not divide heads": (
        lambda: cp().plan(P, num_heads=6, num_kv_heads=4), ContextError, "multiple of num_kv_heads, got 6 and 4",
    ),
    "kv heads alone": (lambda: cp().plan(P, num_kv_heads=4), ContextError, "num_heads"),
    "no heads": (lambda: cp().plan(P, num_heads=0), ContextError, "num_heads.*>= 1.*got 0"),
    "head_dim of no number": (lambda: cp().plan(P, head_dim=64.0), ContextError, "head_dim.*got 64.0"),
    "an unknown feature": (lambda: cp().plan(P, features=("rope",)), ContextError, "rope.*allowed.*bias"),
    "a feature that is no name": (lambda: cp().plan(P, features=3), ContextError, "names, of alibi.*got 3"),  # type: ignore[arg-type]
    "features that do not hash": (lambda: cp().plan(P, features=[["lse"]]), ContextError, "unknown features"),  # type: ignore[list-item]
    "heads that are a bool": (lambda: cp().plan(P, num_heads=True), ContextError, "num_heads.*got True"),
    "a multiple that is a bool": (lambda: cp().plan(P, pad_to_multiple_of=True), ContextError, "multiple_of.*got True"),
    "a window of bools": (lambda: cp().plan(P, window=(True, 0)), ContextError, "window.*got \\(True"),
    "a window of fractions": (lambda: cp().plan(P, window=(2.0, 0)), ContextError, "window.*got \\(2.0"),  # type: ignore[arg-type]
    "a length in a tensor": (lambda: cp().plan(torch.tensor(3)), ContextError, "a length, got Tensor"),
    "an unknown placement": (lambda: cp().plan(P, placement="snake"), ContextError, "'snake'.*zigzag"),
    "a multiple of zero": (lambda: cp().plan(P, pad_to_multiple_of=0), ContextError, "pad_to_multiple_of.*got 0"),
    "causal by another name": (lambda: cp().plan(P, causal="bottom_right"), ContextError, "'bottom_right'"),
    "a negative window": (lambda: cp().plan(P, window=(-1, 0)), ContextError, "window.*>= 0"),
    "a window of one number": (lambda: cp().plan(P, window=5), ContextError, "window"),
    "with_mask of a negative window": (lambda: cp().plan(P).with_mask(window=(0, -2)), ContextError, "window.*>= 0"),
    "a bias around a ring": (lambda: cp("p2p").plan(8, features=("bias",)), ContextError, "comm='all_gather'"),
    "a mask by heads": (lambda: cp("a2a").plan(8, features=("mask",)), ContextError, "comm='all_gather'"),
    "a bias over packed rows": (lambda: cp().plan(P, features=("bias",)), ContextError, "4-D"),
    "ALiBi both ways around a ring": (
        lambda: cp("p2p").plan(P, causal=False, features=("alibi",)), ContextError, "comm='a2a'",
    ),
    "ALiBi both ways, gathered": (
        lambda: cp().plan(P, causal=False, window=(5, 5), features="alibi"), ContextError, "comm='a2a'",
    ),
    "with_mask that ALiBi cannot have": (
        lambda: cp().plan(P, features=("alibi",)).with_mask(causal=False), ContextError, "comm='a2a'",
    ),
    "to bind no plan": (lambda: cp().bind(P), ContextError, "ContextPlan, got Packing"),
    "to bind another rank's plan": (lambda: cp().bind(ContextParallel((4, 1)).plan(P)), ContextError, "rank 1.*rank 0"),
    "to bind a plan of more ranks": (lambda: cp().bind(ContextParallel((8, 0)).plan(P)), ContextError, "of 8.*of 4"),
    "too few rows": (lambda: cp().plan(P).shard(torch.zeros(22)), ShapeError, "22 rows.*23"),
    "another length": (lambda: cp().plan(16).shard(torch.zeros(17, 2)), ShapeError, "17 rows.*16"),
    "the rows in another dim": (
        lambda: cp().plan(P).shard(torch.zeros(2, 23)), ShapeError, "dim 0.*2 rows.*23.*pass dim=1",
    ),
    "a shard in place of the batch": (
        lambda: (p := cp().plan(P)).shard(torch.zeros(p.rows)), ShapeError, "6 rows.*batch, 23 rows; this is a shard",
    ),
    "a fill that bool cannot hold": (
        lambda: cp().plan(P).shard(torch.zeros(23, dtype=torch.bool), fill=-100), DtypeError, "-100.*False and True",
    ),
    "a fill that bytes cannot hold": (
        lambda: cp().plan(P).shard(torch.zeros(23, dtype=torch.uint8), fill=-100), DtypeError, "-100.*0 to 255",
    ),
    "a fill with a fraction": (
        lambda: cp().plan(P).shard(torch.zeros(23, dtype=torch.int32), fill=0.5), DtypeError, "0.5.*ints",
    ),
    "a fill beyond half precision": (
        lambda: cp().plan(P).shard(torch.zeros(23, dtype=torch.float16), fill=1e6), DtypeError, "up to 65504",
    ),
    "to unshard with a fill that does not fit": (
        lambda: ContextParallel((1, 0)).plan(P).unshard(torch.zeros(23).bool(), fill=2), DtypeError, "unshard: fill=2",
    ),
    "a fill that is no number": (
        lambda: cp().plan(P).shard(torch.zeros(23), fill=None), InvalidArgument, "fill must be a number, got None",  # type: ignore[arg-type]
    ),
    "a complex fill": (lambda: cp().plan(P).shard(torch.zeros(23), fill=1j), DtypeError, "1j.*real"),  # type: ignore[arg-type]
    "a fill beyond 64 bits": (
        lambda: cp().plan(P).shard(torch.zeros(23, dtype=torch.uint64), fill=2**64), DtypeError, "18446744073709551615",
    ),
    "infinity in float8": (
        lambda: cp().plan(P).shard(torch.zeros(23).to(torch.float8_e4m3fn), fill=float("inf")), DtypeError, "up to 448",
    ),
    "zero where there is none": (
        lambda: cp().plan(P).shard(torch.ones(23).to(torch.float8_e8m0fnu)), DtypeError, "fill=0.*float8_e8m0fnu",
    ),
    "a gradient in float8": (
        lambda: cp().plan(P).shard(torch.ones(23).to(torch.float8_e5m2).requires_grad_()), DtypeError, "detach",
    ),
    "two numbers in a byte": (
        lambda: cp().plan(P).shard(torch.zeros(23, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)), DtypeError,
        "view\\(torch.uint8\\)",
    ),
    "a dim that is no number": (lambda: cp().plan(P).shard(torch.zeros(23), dim="x"), ShapeError, "dim 'x'"),  # type: ignore[arg-type]
    "a dim that is a bool": (lambda: cp().plan(P).shard(torch.zeros(23), dim=False), ShapeError, "dim False"),
    "a dim that is not there": (lambda: cp().plan(P).shard(torch.zeros(23), dim=1), ShapeError, "dim 1"),
    "a shard of a list": (lambda: cp().plan(P).shard([1.0]), InvalidArgument, "tensor, got list"),
    "unshard without a group": (lambda: (p := cp().plan(P)).unshard(torch.zeros(p.rows)), ContextError, "bind"),
    "attention without a group": (
        lambda: anyattn.attention(*(torch.zeros(3, cp().plan(P).rows, 2, 8).unbind()), plan=cp().plan(P)),
        ContextError, "bind",
    ),
    "attention with no plan": (
        lambda: anyattn.attention(*torch.zeros(3, 6, 2, 8).unbind(), plan=P), ContextError, "ContextPlan, got Packing",
    ),
    "to refill a plan of no capacity": (lambda: cp().plan(P).copy_(cp().plan(P)), ContextError, "capacity"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name: str) -> None:
    mistake, kind, message = MISTAKES[name]
    with pytest.raises(kind, match=f"(?s){message}"):
        mistake()


def test_whatever_auto_takes_can_do_what_is_asked() -> None:
    for features, more in ((("bias",), {}), (("alibi",), {"causal": False}), ((), {"packing_kv": 30})):
        plan = cp("auto").plan(16, num_heads=8, features=features, **more)
        assert plan.comm in ("all_gather", "a2a")


def test_a_plan_of_one_rank_needs_no_group() -> None:
    """Scripts run unchanged on one process."""
    plan = ContextParallel((1, 0)).plan(P)
    q, k, v = torch.randn(3, 23, 2, 8).unbind()
    shards = [plan.shard(x) for x in (q, k, v)]
    out = plan.unshard(anyattn.attention(*shards, plan=plan))
    torch.testing.assert_close(out, anyattn.attention(q, k, v, causal=True, packing=P))


# --- mistakes at the call, on every rank ---------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pool() -> context_pool.Pool:
    """Ranks."""
    return context_pool.shared()


class Batch:
    """A small packed batch on one rank; what a mistake changes is given."""

    def __init__(self, seat: context_pool.Seat, comm: str = "all_gather", **more: Any) -> None:
        self.cp = ContextParallel(seat.group, comm=comm)
        given = more.pop("given", P)
        self.plan = self.cp.plan(given, **more)
        self.whole = given if isinstance(given, int) else given.rows
        self.packed = not isinstance(given, int)

    def rows(self, heads: int = 4, dim: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
        """A shard, (rows, heads, dim) or (2, rows, heads, dim)."""
        shape = (self.plan.rows, heads, dim) if self.packed else (2, self.plan.rows, heads, dim)
        return torch.randn(shape, dtype=dtype)

    def attend(self, *qkv: Tensor, **more: Any) -> Any:
        """``attention`` with this plan."""
        q, k, v = qkv or (self.rows(), self.rows(), self.rows())
        return anyattn.attention(q, k, v, **{"plan": self.plan, **more})


def _packed_bias(seat: context_pool.Seat) -> Any:
    batch = Batch(seat)
    return batch.attend(bias=torch.zeros(4, batch.plan.rows, P.rows))


def _block_mask(seat: context_pool.Seat) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 16, 16, device="cpu", BLOCK_SIZE=16)
    return Batch(seat, given=16).attend(mask=mask)


def _dtensor(seat: context_pool.Seat) -> Any:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate

    batch = Batch(seat)
    mesh = DeviceMesh.from_group(seat.group, "cpu")
    return batch.attend(*(DTensor.from_local(batch.rows(), mesh, [Replicate()]) for _ in range(3)))


def _whole_batch(seat: context_pool.Seat) -> Any:
    return Batch(seat).attend(*torch.randn(3, P.rows, 4, 8).unbind())


def _keys_of_another_plan(seat: context_pool.Seat) -> Any:
    batch = Batch(seat, packing_kv=Packing.from_lengths([40, 33]), causal=False)
    return batch.attend()


def _transformed(seat: context_pool.Seat) -> Any:
    batch = Batch(seat)
    rows = torch.stack([batch.rows(), batch.rows()])
    return torch.func.vmap(lambda x: batch.attend(x, x, x))(rows)


Job = Callable[[context_pool.Seat], Any]

#: name: (the mistake, its exception, what its message says); on four ranks.
CALLS: dict[str, tuple[Job, type[Exception], str]] = {
    "not causal": (lambda s: Batch(s).attend(causal=False), ContextError, "causal=True.*causal=False.*with_mask"),
    "another alignment": (
        lambda s: Batch(s, packing_kv=Packing.from_lengths([40, 33])).attend(causal="top_left"),
        InvalidArgument, "",
    ),
    "another window": (lambda s: Batch(s, window=(5, 0)).attend(window=(6, 0)), ContextError, "\\(5, 0\\).*\\(6, 0\\)"),
    "a window to a plan without": (lambda s: Batch(s).attend(window=(6, 0)), ContextError, "with_mask"),
    "another batch's packing": (
        lambda s: Batch(s).attend(packing=Packing.from_lengths([14, 9])), ContextError, "packing.*other lengths",
    ),
    "another batch's packing_kv": (
        lambda s: Batch(s).attend(packing_kv=Packing.from_lengths([14, 9])), ContextError, "packing_kv.*other lengths",
    ),
    "the whole batch in place of shards": (_whole_batch, ShapeError, "plan.shard"),
    "shards of the queries' size for other keys": (_keys_of_another_plan, ShapeError, "plan.kv.shard"),
    "4-D tensors to a plan of a packing": (
        lambda s: (b := Batch(s)).attend(*torch.randn(3, 1, b.plan.rows, 4, 8).unbind()), ShapeError, "3-D",
    ),
    "3-D tensors to a plan of a length": (
        lambda s: (b := Batch(s, given=16)).attend(*torch.randn(3, b.plan.rows, 4, 8).unbind()), InvalidArgument, "",
    ),
    "other heads than planned": (lambda s: Batch(s, num_heads=8).attend(), InvalidArgument, "num_heads=8.*4"),
    "other kv heads than planned": (
        lambda s: Batch(s, num_heads=4, num_kv_heads=2).attend(), InvalidArgument, "num_kv_heads=2.*4",
    ),
    "another head_dim than planned": (
        lambda s: Batch(s, num_heads=4, head_dim=16).attend(), InvalidArgument, "head_dim=16.*8",
    ),
    "heads that the ranks do not divide": (
        lambda s: (b := Batch(s, "a2a")).attend(b.rows(6), b.rows(3), b.rows(3)), InvalidArgument, "6 query heads.*4",
    ),
    "kv heads that do not divide heads": (
        lambda s: (b := Batch(s)).attend(b.rows(6), b.rows(4), b.rows(4)), ShapeError, "6.*4",
    ),
    "two dtypes": (
        lambda s: (b := Batch(s)).attend(b.rows(), b.rows(dtype=torch.float64), b.rows()), DtypeError, "float64",
    ),
    "tensors elsewhere": (
        lambda s: (b := Batch(s)).attend(*(b.rows().to("meta") for _ in range(3))), DeviceError, "meta",
    ),
    "a sink of other heads": (lambda s: Batch(s).attend(sink=torch.zeros(3)), ShapeError, "sink"),
    "slopes of other sequences": (lambda s: Batch(s).attend(alibi_slopes=torch.zeros(3, 4)), ShapeError, "alibi"),
    "ALiBi both ways": (
        lambda s: Batch(s, causal=False).attend(alibi_slopes=torch.ones(4)), ContextError, "comm='a2a'",
    ),
    "a bias around a ring": (
        lambda s: (b := Batch(s, "p2p", given=16)).attend(bias=torch.zeros(1, 1, b.plan.rows, 16)),
        ContextError, "comm='all_gather'",
    ),
    "a mask by heads": (
        lambda s: (b := Batch(s, "a2a", given=16)).attend(mask=torch.ones(1, 1, b.plan.rows, 16, dtype=torch.bool)),
        ContextError, "comm='all_gather'",
    ),
    "a bias over packed rows": (_packed_bias, InvalidArgument, "4-D"),
    "a bias of local keys": (
        lambda s: (b := Batch(s, given=16)).attend(bias=torch.zeros(1, 1, b.plan.rows, b.plan.rows)),
        ShapeError, "all keys",
    ),
    "a BlockMask": (_block_mask, Unsupported, "BlockMask"),
    "a DTensor": (_dtensor, Unsupported, "to_local"),
    "torch.func": (_transformed, Unsupported, "vmap"),
    "a backend that does not exist": (lambda s: Batch(s).attend(backend="fa9"), UnknownBackend, "fa9"),
    "a backend that is not here": (lambda s: Batch(s).attend(backend="fa2"), NoBackend, "fa2"),
    "dropout of everything": (lambda s: Batch(s).attend(dropout=1.0), InvalidArgument, "dropout"),
    "another rank's plan": (
        lambda s: ContextParallel(s.group).bind(ContextParallel((4, (s.rank + 1) % 4)).plan(P)),
        ContextError, "rank . of 4",
    ),
    "a plan without its group": (
        lambda s: Batch(s).attend(plan=ContextParallel((4, s.rank)).plan(P)), ContextError, "bind",
    ),
    "unshard of the whole": (
        lambda s: Batch(s).plan.unshard(torch.zeros(P.rows)), ShapeError, "23 rows.*a shard, 6 rows; this is the whole",
    ),
    "unshard of another dim": (
        lambda s: Batch(s).plan.unshard(torch.zeros(2, 6)), ShapeError, "2 rows.*a shard, 6 rows: pass dim=1",
    ),
    "three dims of a mesh for two": (lambda s: Batch(s, "a2a+p2p"), ContextError, "two-dimensional mesh"),
}  # fmt: skip


def mistaken(seat: context_pool.Seat, name: str) -> Any:
    """Make a mistake on this rank."""
    CALLS[name][0](seat)


@pytest.mark.parametrize("name", CALLS)
def test_mistakes_at_the_call_are_named_on_every_rank(pool: context_pool.Pool, name: str) -> None:
    _, kind, message = CALLS[name]
    for found in context_pool.failures(pool.run(4, mistaken, name), kind):
        assert re.search(f"(?s){message}", found), found


def unshard_alone(seat: context_pool.Seat) -> None:
    """One rank's shard is wrong at the first use of the plan."""
    plan = ContextParallel(seat.group, comm="all_gather").plan(P)
    plan.unshard(torch.zeros(P.rows if seat.rank == 2 else plan.rows))


def test_a_wrong_shard_of_one_rank_is_heard_by_all_at_a_plans_first_use(pool: context_pool.Pool) -> None:
    outcomes = pool.run(4, unshard_alone)
    for rank, outcome in enumerate(outcomes):
        assert outcome.failure is not None
        assert outcome.failure.is_a(ShapeError if rank == 2 else ContextError), outcome.failure.text
        assert ("this is the whole" if rank == 2 else "cannot run on rank 2") in outcome.failure.message


def nothing_here(seat: context_pool.Seat, comm: str, lengths: list[int], backend: str, **call: Any) -> None:
    """A batch of which some ranks hold nothing."""
    batch = Batch(seat, comm, given=Packing.from_lengths(lengths))
    batch.attend(backend=backend, **call)


@pytest.mark.parametrize("lengths", [[3], [0, 1, 0], [2, 5]])
@pytest.mark.parametrize("comm", ["p2p", "all_gather", "a2a"])
def test_a_rank_that_holds_nothing_raises_too(pool: context_pool.Pool, comm: str, lengths: list[int]) -> None:
    """The kernel that is missing would not run on all ranks; all say so."""
    messages = context_pool.failures(pool.run(4, nothing_here, comm, lengths, "fa2"), NoBackend)
    assert all("fa2" in m for m in messages)


@pytest.mark.parametrize("comm", ["p2p", "all_gather", "a2a"])
def test_the_plans_own_arguments_may_be_repeated(pool: context_pool.Pool, comm: str) -> None:
    context_pool.values(pool.run(4, repeated, comm))


def repeated(seat: context_pool.Seat, comm: str) -> None:
    """Say again what the plan knows."""
    batch = Batch(seat, comm, window=(5, 3))
    qkv = batch.rows(), batch.rows(), batch.rows()
    first = batch.attend(*qkv)
    assert torch.equal(first, batch.attend(*qkv, causal=True, window=(5, 3), packing=P, layout="thd"))
    assert torch.equal(first, batch.attend(*qkv, window=(5, 0), packing=Packing.from_lengths([9, 14])))


def test_explain_says_which_kernel_runs(pool: context_pool.Pool) -> None:
    chosen = context_pool.values(pool.run(4, explained))
    assert len(set(chosen)) == 1
    assert chosen[0] in ("torch", "reference")


def explained(seat: context_pool.Seat) -> Any:
    """The kernel of this rank's largest call."""
    batch = Batch(seat)
    return anyattn.explain(batch.rows(), batch.rows(), batch.rows(), plan=batch.plan).chosen


def outside(seat: context_pool.Seat) -> list[str]:
    """Ranks 0 and 1 make groups; what the others hear of them."""
    from torch.distributed.device_mesh import DeviceMesh

    groups: list[Any] = [
        torch.distributed.new_group([0, 1]),
        torch.distributed.new_group([0, 1], use_local_synchronization=True),
        DeviceMesh("cpu", [0, 1]),
    ]
    found = []
    for group in groups:
        try:
            ContextParallel(group)
            found.append("")
        except ContextError as error:
            found.append(str(error))
    return found


def test_a_process_outside_of_a_group_is_told_so() -> None:
    pool = context_pool.Pool(3)  # all processes make torch's groups together
    found = context_pool.values(pool.run(3, outside))
    pool.close()
    assert found[:2] == [["", "", ""]] * 2
    plain, local, mesh = found[2]
    assert "not a member of the group" in plain
    assert "not a member of the group" in local
    assert "not a member of the mesh [0, 1]" in mesh


def members(seat: context_pool.Seat) -> tuple[int, tuple[int, ...]]:
    """A rank's place, and the ranks by their places."""
    found = members_of(seat.group)
    return found.rank, found.ranks


def test_ranks_of_a_mesh_are_named_as_its_group_numbers_them(pool: context_pool.Pool) -> None:
    """Also where they are written backwards."""
    for rank, (place, ranks) in enumerate(
        context_pool.values(pool.run(context_pool.Mesh((2,), None, (1, 0)), members))
    ):
        assert ranks[place] == rank


def test_a_mesh_of_two_dims_whose_ranks_are_disordered_is_refused(pool: context_pool.Pool) -> None:
    """Groups number their members in order, and places in two dims would not be one to a rank."""
    mesh = context_pool.Mesh((2, 2), ("p2p", "a2a"), (0, 3, 2, 1))
    for said in context_pool.failures(pool.run(mesh, members), ContextError):
        assert re.search(r"\[\[0, 3\], \[2, 1\]\].*init_device_mesh", said), said
