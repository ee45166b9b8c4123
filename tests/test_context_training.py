"""Training over ranks equals training on one process: models, checkpointing, compiling, meshes of several dims.

And what calls of a plan promise from one to the next: determinism, dropout, plans that are refilled, groups of heads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import anyattn
import context_pool
import context_training as ct
import context_training_calls as calls
from anyattn import ContextParallel, Packing
from cases import Imagined
from context_cases import ContextCase, build, refusal
from context_features import SCHEMES
from context_judge import judge, summed
from context_pool import Mesh, values
from context_training import Step, Training
from context_training_calls import Capacity, Dropping
from oracle import Terms


@pytest.fixture(scope="session")
def pool() -> context_pool.Pool:
    """Ranks."""
    return context_pool.shared()


def training(scheme: str, **changes: Any) -> Training:
    """Under a scheme, on four ranks."""
    return Training(comm=scheme, ranks=Mesh((2, 2), ("p2p", "a2a")) if scheme == "a2a+p2p" else 4, **changes)


def possible(features: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """Schemes with the features that they take."""
    return [(s, f) for s in SCHEMES for f in features if not refusal(ContextCase(**{**SCHEMES[s], **features[f]}))]


def near(name: str, found: Tensor, wanted: Tensor) -> None:
    """Equal, but for the order of sums in float64."""
    assert found.shape == wanted.shape, name
    error, size = (found - wanted).abs().max(), wanted.abs().max()
    assert error <= 1e-12 * (size + 1), f"{name} is {error:.1e} off, of {size:.1e}"


def equals_one_process(t: Training, found: list[Step], wanted: Step | None = None) -> None:
    """All ranks' parts together."""
    wanted = wanted or ct.alone(t)
    assert sum(f.loss for f in found) == pytest.approx(wanted.loss, rel=1e-12)
    assert found[0].grads.keys() == wanted.grads.keys()
    for name, grad in wanted.grads.items():
        near(name, summed([f.grads[name] for f in found]), grad)


BATCHES: dict[str, dict[str, Any]] = {
    "mixed": {},
    "one_long": {"lengths": (61,), "gap": 1},
    "many_short": {"lengths": (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5)},
    "zigzag_full_first": {"placement": "zigzag", "layers": ct.LAYERS[::-1]},
    "documents": {"placement": "documents"},
    "idle_ranks": {"lengths": (0, 2, 0)},
    "nothing": {"lengths": (0, 0)},
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_with_different_masks_share_a_placement(pool: context_pool.Pool, scheme: str, batch: str) -> None:
    t = training(scheme, **BATCHES[batch])
    equals_one_process(t, values(pool.run(t.ranks, ct.train, t)))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_activation_checkpointing_changes_no_bit(pool: context_pool.Pool, scheme: str, dropout: float) -> None:
    t = training(scheme, dropout=dropout)
    found = values(pool.run(t.ranks, ct.checkpointed, t))
    for rank, steps in enumerate(found):
        for kind in ("not reentrant", "reentrant"):
            assert steps[kind].loss == steps["kept"].loss
            for name, grad in steps["kept"].grads.items():
                assert torch.equal(steps[kind].grads[name], grad), f"rank {rank}, {kind}: {name}"
    losses = [sum(steps[kind].loss for steps in found) for kind in ("kept", "another seed")]
    assert (losses[0] == losses[1]) == (not dropout)
    if not dropout:
        equals_one_process(t, [steps["reentrant"] for steps in found])


# --- compiled ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["p2p", "a2a"])
def test_a_compiled_model_equals_the_eager_one(pool: context_pool.Pool, scheme: str) -> None:
    t = Training(comm=scheme, ranks=2, layers=ct.LAYERS[:2])
    batches = ((29, 0, 3, 17), (40, 9), (70,), (13, 13, 13), (5, 5, 60, 5))
    found = values(pool.run(2, ct.compiled, t, batches))
    for i, lengths in enumerate(batches):
        equals_one_process(replace(t, lengths=lengths), [steps[i] for steps, _ in found])
    most = len(t.layers) + 1
    for _, graphs in found:
        assert 0 < graphs[0] <= most, "at most one break per call"
        assert graphs[-1] <= 2 * most, "a new plan compiles nothing; the second number of rows makes rows dynamic"


def test_a_plan_in_one_graph_is_an_error_that_says_so(pool: context_pool.Pool) -> None:
    t = Training(ranks=2, layers=ct.LAYERS[:1])
    outcomes = pool.run(2, ct.one_graph, t)
    for message in context_pool.failures(outcomes, torch._dynamo.exc.Unsupported):
        assert "plan=" in message, message
        assert "fullgraph" in message, message


# --- meshes --------------------------------------------------------------------------------------------------------


def average(t: Training, rows: int = 2) -> Step:
    """One process, with the batches of all data parallel rows."""
    steps = [ct.alone(replace(t, seed=row)) for row in range(rows)]
    mean = {name: sum(s.grads[name] for s in steps) / rows for name in steps[0].grads}
    return Step(sum(s.loss for s in steps), mean)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_data_parallel_rows_of_context_parallel_ranks(pool: context_pool.Pool, scheme: str) -> None:
    t = Training(comm=scheme)
    names = ("p2p", "a2a") if scheme == "a2a+p2p" else ("cp",)
    mesh = Mesh((2, *(2 for _ in names)), ("dp", *names))
    found, wanted = values(pool.run(mesh, ct.each_row, t, names)), average(t)
    assert sum(f.loss for f in found) == pytest.approx(wanted.loss, rel=1e-12)
    for f in found:
        for name, grad in wanted.grads.items():
            near(name, f.grads[name], grad)


@pytest.mark.parametrize("over", ["dp", "all"])
def test_fully_sharded_data_parallel(pool: context_pool.Pool, over: str) -> None:
    t = Training(comm="all_gather" if over == "dp" else "p2p", layers=ct.LAYERS[:2])
    found = values(pool.run(Mesh((4, 2), ("dp", "cp")), ct.fully_sharded, t, over))
    model = t.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    wanted = average(t, 4)
    for name, p in model.named_parameters():
        p.grad = wanted.grads[name]
    optimizer.step()
    for parameters in found:
        for name, p in model.named_parameters():
            near(name, parameters[name], p.detach())


@pytest.mark.parametrize("scheme", ["p2p", "all_gather", "a2a"])
def test_heads_divided_by_the_caller(pool: context_pool.Pool, scheme: str) -> None:
    t = Training(comm=scheme, heads=8, kv_heads=4, layers=ct.LAYERS[:3])
    found, wanted = values(pool.run(Mesh((2, 2), ("tp", "cp")), ct.heads_divided, t)), ct.alone(t)
    for tp in range(2):
        parts = found[2 * tp : 2 * tp + 2]
        assert sum(f.loss for f in parts) == pytest.approx(wanted.loss, rel=1e-12)
        for name in parts[0].grads:
            grad = summed([f.grads[name] for f in parts])
            near(f"{name} on {tp}", grad, ct.of_heads(name, wanted.grads, t, tp))


# --- from call to call ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "torch:cpu"])
@pytest.mark.parametrize("deterministic", [True, None])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_runs_repeat_bitwise(pool: context_pool.Pool, scheme: str, deterministic: bool | None, backend: str) -> None:
    case = ContextCase(
        **SCHEMES[scheme], lengths=(70, 3, 41, 12), heads="8/2", scores="sink", dtype="float32", dims="16",
        backend=backend, asks="grad",
    )  # fmt: skip
    one, two = (values(pool.run(case.group, calls.with_determinism, case, deterministic)) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.out, b.out)
        assert a.grads.keys() == b.grads.keys() == {"q", "k", "v", "sink"}
        for name, grad in a.grads.items():
            assert torch.equal(grad, b.grads[name]), name
    judge(case, one)


# --- dropout -------------------------------------------------------------------------------------------------------

#: Batches and masks under which calls of every kind happen: local, remote, halos, whole documents.
DROPPED: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"terms": Terms()},
    "window": {"terms": Terms(window=(9, 0))},
    "softcap": {"terms": Terms(causal=True, softcap=1.5)},
    "one_long": {"lengths": (67,)},
    "documents": {"placement": "documents"},
    "batch": {"lengths": 21, "batch": 2},
    "cross": {"lengths": (9, 0, 20), "keys": (30, 3, 11), "terms": Terms()},
    "bias": {"lengths": 21, "batch": 2, "scores": "bias sink"},
}


@pytest.mark.parametrize(("scheme", "feature"), possible(DROPPED))
def test_backward_drops_what_forward_dropped(pool: context_pool.Pool, scheme: str, feature: str) -> None:
    """out is linear in v, and gradients are those of the function with its seed."""
    case = ContextCase(**{**SCHEMES[scheme], "scores": "sink", "asks": "grad", **DROPPED[feature]})
    found: list[Dropping] = values(pool.run(case.group, calls.dropping, case, 0.375))
    assert sum(f.dout_out for f in found) == pytest.approx(sum(f.v_dv for f in found), rel=1e-12)
    assert sum(f.slope for f in found) == pytest.approx(sum(f.along for f in found), rel=1e-7)
    assert all(f.repeats for f in found)
    assert any(f.differs for f in found)


@pytest.mark.parametrize("kept", [-1.0, 1e9], ids=["fetched_again", "kept"])
@pytest.mark.parametrize("comm", ["p2p", "all_gather", "a2a"])
def test_a_forward_that_runs_again_drops_the_same(pool: context_pool.Pool, comm: str, kept: float) -> None:
    """Activation checkpointing runs it first without gradients, and then with them."""
    parts = values(pool.run(2, calls.dropped_again, comm, kept))
    assert sum(a for a, _ in parts) == pytest.approx(sum(b for _, b in parts), rel=1e-10)


#: Kernels that repeat dropout from a seed that is given, and from a state that forward returned.
DROPPING: dict[str, dict[str, Any]] = {
    "reference": {},
    "reference_in_groups": {},
    "fa2_in_groups": {"backend": "fa2", "dtype": "bfloat16", "imagined": Imagined("sm90", (("fa2", "2.8.3"),))},
}


@pytest.mark.parametrize("kernel", DROPPING)
@pytest.mark.parametrize("placement", ["documents", "zigzag", "contiguous"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_score_is_dropped_on_its_own(pool: context_pool.Pool, scheme: str, placement: str, kernel: str) -> None:
    """The right rate, of the probabilities of the whole; no two parts are dropped alike, on ranks of one torch seed."""
    rate, keys = 0.25, 32
    case = ContextCase(
        **SCHEMES[scheme], **DROPPING[kernel], lengths=(keys,) * 4, placement=placement, heads="8/8", dims=str(keys),
        terms=Terms(scale=0.05), asks="grad",
    )  # fmt: skip
    found = values(pool.run(case.group, calls.dropped_masks, case, rate, "groups" in kernel))
    assert all(torch.equal(f.forward, found[0].forward) for f in found)
    q, k = (build(case).tensors[n].unflatten(1, (4, keys))[0].transpose(1, 2).double() for n in "qk")  # type: ignore[union-attr]
    factors = found[0].forward.double() / (0.05 * q @ k.mT).softmax(-1)
    bound = 1e-12 if case.dtype == "float64" else 0.02
    kept = factors != 0
    assert ((factors - kept.double() / (1 - rate)).abs() < bound).all()
    assert torch.equal(summed([f.backward for f in found]) != 0, kept), "backward drops others"
    assert abs(kept.double().mean() - (1 - rate)) < 5 * (rate * (1 - rate) / kept.numel()) ** 0.5
    blocks = kept.unflatten(3, (4, 8)).unflatten(2, (4, 8)).movedim(3, 4).flatten(0, 3).flatten(1).double()
    blocks = (blocks - (1 - rate)) / (rate * (1 - rate)) ** 0.5
    alike = (blocks @ blocks.T / blocks.shape[1]).fill_diagonal_(0)
    assert alike.abs().max() < 0.9, "two blocks of scores were dropped alike"


# --- plans of fixed capacity ---------------------------------------------------------------------------------------

ROOM = Capacity(sequences=8, rows=64, longest=64)
REFILLS: tuple[tuple[int, ...], ...] = (
    (), (64,), (1, 2, 3, 5, 8, 13, 21, 11), (7, 1, 1, 0, 2, 9, 4, 6), (37, 0, 22), (16, 16, 16, 16), (1,)
)  # fmt: skip
FIXED: dict[str, dict[str, Any]] = {
    **{f"all_gather-{p}": {"comm": "all_gather", "placement": p, "ranks": 4} for p in ("auto", "zigzag", "contiguous")},
    "all_gather-2-zigzag": {"comm": "all_gather", "placement": "zigzag", "ranks": 2},
    "all_gather-window": {"comm": "all_gather", "terms": Terms(window=(6, 0)), "ranks": 2},
    "all_gather-window-alibi": {"comm": "all_gather", "terms": Terms(window=(30, 0)), "scores": "alibi", "ranks": 4},
    "all_gather-full": {"comm": "all_gather", "terms": Terms(), "ranks": 3},
    "a2a": {"comm": "a2a", "ranks": 4},
    "a2a-window": {"comm": "a2a", "terms": Terms(window=(6, 0)), "ranks": 2},
    "a2a-full": {"comm": "a2a", "terms": Terms(), "ranks": 2},
    "a2a-rounded": {"comm": "a2a", "pad_to_multiple_of": 16, "ranks": 4},
    "a2a-in-halves": {"comm": "a2a", "heads": "12/3", "ranks": 4},
}


@pytest.mark.parametrize("kind", FIXED)
def test_a_refilled_plan_is_the_new_batchs(pool: context_pool.Pool, kind: str) -> None:
    case = ContextCase(**{"scores": "sink", **FIXED[kind]})
    found = values(pool.run(case.group, calls.refilled, case, ROOM, REFILLS))
    for i, lengths in enumerate(REFILLS):
        results = [f[i] for f in found]
        judge(replace(case, lengths=lengths, seed=i), [r.found for r in results])
        positions = torch.cat([torch.arange(n) for n in (*lengths, 0)])
        tokens = torch.cat([r.tokens for r in results])
        order = tokens.argsort()
        assert torch.equal(tokens[order], torch.arange(sum(lengths)))
        assert torch.equal(torch.cat([r.positions for r in results])[order], positions)
        assert all(r.beyond == 0 for r in results)
        assert len({r.found.rows for f in found for r in f}) == 1


def fixed(comm: str = "all_gather", lengths: tuple[int, ...] = (5, 9), capacity: Capacity = ROOM, **more: Any) -> Any:
    """A plan of fixed capacity, on the first of two ranks."""
    return ContextParallel((2, 0), comm=comm).plan(capacity.packing(lengths), num_heads=4, **more)


REFUSED: dict[str, tuple[Any, str]] = {
    "no capacity": (lambda: ContextParallel((2, 0)).plan(Packing.from_lengths([5])).copy_(fixed()), "max_sequences"),
    "another comm": (lambda: fixed().copy_(fixed("a2a")), r"is 'a2a', .* is 'all_gather'.*comm='all_gather'\)"),
    "another mask": (lambda: fixed().copy_(fixed(causal=False)), "mask"),
    "another window": (lambda: fixed(window=(5, 0)).copy_(fixed(window=(4, 0))), "mask"),
    "another capacity": (lambda: fixed().copy_(fixed(capacity=ROOM._replace(sequences=9))), "capacity"),
    "other rows": (lambda: fixed().copy_(fixed(capacity=ROOM._replace(rows=96))), "rows"),
    "another placement": (lambda: fixed().copy_(fixed(placement="zigzag")), "placement"),
    "a plan of no capacity": (
        lambda: fixed().copy_(ContextParallel((2, 0), comm="all_gather").plan(Packing.from_lengths([5]))), "capacity"
    ),
    "another rank's": (
        lambda: fixed().copy_(ContextParallel((2, 1), comm="all_gather").plan(ROOM.packing((5,)), num_heads=4)), "rank"
    ),
    "no plan": (lambda: fixed().copy_(ROOM.packing((5,))), "ContextPlan"),
    "p2p": (lambda: fixed("p2p"), "a ring"),
    "a window's right side": (lambda: fixed(causal=False, window=(4, 2)), "right"),
    "whole documents": (lambda: fixed(placement="documents"), "documents"),
    "cross-attention": (lambda: fixed(packing_kv=ROOM.packing((9, 9))), "packing_kv"),
    "with_mask, a right side": (lambda: fixed().with_mask(False, (4, 2)), "right"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_plan_of_fixed_capacity_refuses(name: str) -> None:
    make, words = REFUSED[name]
    with pytest.raises(anyattn.ContextError, match=words):
        make()


def test_auto_never_takes_a_ring_for_a_fixed_capacity() -> None:
    for lengths in ((64,), (1, 2, 3)):
        assert fixed("auto", lengths).comm in ("all_gather", "a2a")


def test_auto_takes_one_scheme_for_all_batches_of_a_capacity() -> None:
    """By their lengths alone it would take two."""
    room, batches = Capacity(8, 1 << 16, 1 << 16), ((1 << 16,), (1 << 13,) * 8, (100, 200), (64,))
    free = [ContextParallel((4, 0)).plan(Packing.from_lengths(n), num_heads=32, num_kv_heads=8).comm for n in batches]
    assert len(set(free)) > 1
    plans = [ContextParallel((4, 0)).plan(room.packing(n), num_heads=32, num_kv_heads=8) for n in batches]
    assert len({plan.comm for plan in plans}) == 1
    for plan in plans[1:]:
        plans[0].copy_(plan)
        assert torch.equal(plans[0].position_ids, plan.position_ids)


@pytest.mark.parametrize("keeping", calls.KEEPING)
@pytest.mark.parametrize("comm", ["all_gather", "a2a"])
def test_a_refill_before_backward_is_an_error_and_not_a_wrong_gradient(
    pool: context_pool.Pool, comm: str, keeping: str
) -> None:
    for said in values(pool.run(2, calls.refilled_too_early, comm, ROOM, keeping)):
        assert "refilled by copy_() between forward and backward" in said


@pytest.mark.parametrize("comm", ["p2p", "all_gather", "a2a"])
def test_saved_tensors_may_come_back_with_other_strides(pool: context_pool.Pool, comm: str) -> None:
    assert all(all(found) for found in values(pool.run(2, calls.with_saved_tensors_transposed, comm)))


# --- groups of heads -----------------------------------------------------------------------------------------------

GROUPED: dict[str, dict[str, Any]] = {
    "causal": {"lengths": (70, 0, 41, 12), "scores": "sink"},
    "four_key_heads": {"lengths": (70, 0, 41, 12), "scores": "sink", "heads": "8/4"},
    "six_key_heads": {"heads": "12/6", "terms": Terms()},
    "full": {"terms": Terms()},
    "window": {"terms": Terms(window=(6, None))},
    "zigzag": {"placement": "zigzag", "gap": 8, "garbage": float("nan")},
    "alibi": {"scores": "alibi sink"},
    "batch": {"lengths": 26, "batch": 2, "scores": "sink", "terms": Terms(causal=True, softcap=1.5)},
    "wide_keys": {"dims": "24/16", "dtype": "float32", "asks": "deterministic"},
    "few": {"lengths": (0, 3, 0), "scores": "sink"},
    "bias": {"lengths": 22, "batch": 2, "scores": "bias mask", "terms": Terms()},
}


@pytest.mark.parametrize(("scheme", "feature"), possible(GROUPED))
def test_heads_travel_in_groups(pool: context_pool.Pool, scheme: str, feature: str) -> None:
    """Small parts too, where ``_door.LEAST`` lets them."""
    case = ContextCase(**{**SCHEMES[scheme], "heads": "16/8", **GROUPED[feature]})
    found = values(pool.run(case.group, calls.in_groups, case))
    groups = {n for _, n in found}
    assert len(groups) == 1, "ranks differ"
    if scheme in ("p2p", "all_gather") and feature in ("causal", "full", "zigzag"):
        assert groups == {4}
    judge(case, [f for f, _ in found])


@pytest.mark.parametrize("placement", ["zigzag", "contiguous", "auto"])
def test_what_comes_back_is_put_together_at_once(pool: context_pool.Pool, placement: str) -> None:
    """Memory: gradients of a group of heads do not wait for all others, but for those that their own rows still owe."""
    case = ContextCase(
        comm="all_gather", placement=placement, heads="16/8", lengths=(70, 0, 41, 12), ranks=4, asks="grad"
    )
    found = values(pool.run(case.group, calls.held, case))
    assert all(times == 4 for _, times, _ in found)
    assert all(most <= 1 for _, _, most in found)
    judge(case, [f for f, _, _ in found])


# --- keys that are kept --------------------------------------------------------------------------------------------

KEPT = {name: GROUPED[name] for name in ("causal", "window", "batch", "few", "bias")}


@pytest.mark.parametrize(("scheme", "feature"), [(s, f) for s, f in possible(KEPT) if s in ("p2p", "all_gather")])
def test_keys_that_are_kept_do_not_travel_again(pool: context_pool.Pool, scheme: str, feature: str) -> None:
    """Few fetched keys stay for backward, many are fetched again; alike on all ranks, and right both ways."""
    case = ContextCase(**{**SCHEMES[scheme], "heads": "16/8", **KEPT[feature]})
    for share, times in ((1e9, 1), (0.0, 2)):
        found = values(pool.run(case.group, calls.keeping, case, share))
        ((keys, gradients),) = {(k, g) for _, k, g in found}
        assert keys == times * gradients
        assert gradients > 0 or feature == "few"
        judge(case, [f for f, _, _ in found])
