"""``attention(plan=)`` over ranks equals one process, forward and backward, for every scheme and every feature.

A cell of scheme x feature either gives the oracle's answer for the whole batch, or is refused with the same named error
on every rank, where ``context_cases.refusal`` says so, and nowhere else.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import anyattn
import context_pool
import context_ranks
from cases import Imagined
from context_cases import ContextCase, refusal
from context_features import FEATURES, SCHEMES
from context_judge import judge
from doubles import frontend
from oracle import Terms


@pytest.fixture(scope="session")
def pool() -> context_pool.Pool:
    """Ranks."""
    return context_pool.shared()


def attempt(pool: context_pool.Pool, case: ContextCase) -> None:
    """The oracle's answer, or the refusal that the design names, on all ranks alike."""
    outcomes = pool.run(case.group, context_ranks.run, case)
    why = refusal(case)
    if why is None:
        judge(case, context_pool.values(outcomes))
        return
    assert outcomes[0].failure is not None, f"it ran, and {why}"
    messages = context_pool.failures(outcomes, anyattn.ContextError if case.told else anyattn.InvalidArgument)
    assert len(set(messages)) == 1, messages


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_with_every_feature(pool: context_pool.Pool, scheme: str, feature: str) -> None:
    attempt(pool, ContextCase(**{**SCHEMES[scheme], **FEATURES[feature]}))


#: Kernels, and the form in which a plan of one length gives them its tensors.
FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "reference": ({"backend": "reference"}, "packed"),
    "fa3": ({"backend": "fa3", "imagined": Imagined("sm90", (("fa3", "3.0.0"),))}, "packed"),
    "cudnn, quicker so": ({"backend": "cudnn", "imagined": Imagined("sm90", (("cudnn", "1.32.0"),))}, "dense"),
    "flash, which takes nothing else": ({"backend": "torch:flash", "imagined": Imagined("sm90")}, "dense"),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kernel", FORMS)
def test_a_plan_from_a_length_may_give_kernels_dense_tensors(pool: context_pool.Pool, kernel: str, scheme: str) -> None:
    """Where the ranks divide the length, and the kernel is quicker so, or takes nothing else."""
    changes, form = FORMS[kernel]
    case = ContextCase(
        **SCHEMES[scheme], **changes, lengths=48, batch=2, dims="32", dtype="bfloat16", asks="grad", scores="sink",
        terms=Terms(causal=True),
    )  # fmt: skip
    found = context_pool.values(pool.run(case.group, context_ranks.run_and_see_forms, case))
    judge(case, [f for f, _ in found])
    assert {form for _, forms in found for form in forms} == {form}


def test_the_form_of_a_call_overrules_no_preference() -> None:
    """Where the kernel that comes first takes the packed call alone, no other gets the dense one."""
    q = torch.empty(2, 1, 4, 32, dtype=torch.bfloat16, requires_grad=True)
    with frontend.machine():
        plan = anyattn.ContextParallel((1, 0), comm="all_gather").plan(1, num_heads=4)
        for backend in (("cudnn", "auto"), ("cudnn", "fa2", "torch")):
            told = anyattn.explain(q, q, q, plan=plan, backend=backend)
            assert (told.chosen, told.problem.form) == ("cudnn", "packed")


GROUPS = [
    *((comm, n) for n in (1, 2, 3, 8) for comm in ("p2p", "all_gather", "a2a")),
    *(("a2a+p2p", shape) for shape in ((2, 1), (1, 2), (1, 1), (4, 2), (2, 4))),
]
BATCHES: dict[str, dict[str, Any]] = {
    "causal": {"scores": "sink"},
    "full": {"terms": Terms(), "gap": 8},
    "window": {"terms": Terms(window=(11, 2)), "placement": "zigzag"},
    "primes": {"lengths": (61, 2, 31, 17, 3), "terms": Terms(causal=True, softcap=3.0)},
    "few": {"lengths": (0, 5, 1), "scores": "sink", "terms": Terms()},
    "batch": {"lengths": 29, "batch": 2, "dims": "8/12"},
    "alibi": {"lengths": (47, 7, 13), "scores": "alibi"},
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("group", GROUPS, ids=lambda group: "-".join(map(str, group)))
def test_any_number_of_ranks(pool: context_pool.Pool, group: tuple[str, Any], batch: str) -> None:
    comm, ranks = group
    heads = "6/2" if ranks == 3 else "8/2"
    attempt(pool, ContextCase(comm=comm, ranks=ranks, heads=heads, **BATCHES[batch]))


@pytest.mark.parametrize("ranks", [2, 3, 4, (2, 2)])
@pytest.mark.parametrize(
    "feature", ["causal", "window", "cross", "bias", "alibi_full", "heads_that_ranks_do_not_divide"]
)
def test_auto_takes_a_scheme_that_can(pool: context_pool.Pool, ranks: Any, feature: str) -> None:
    """Where some scheme can, ``comm="auto"`` does not refuse."""
    case = ContextCase(**{"heads": "12/3", **FEATURES[feature], "comm": "auto", "ranks": ranks})
    outcomes = pool.run(case.group, context_ranks.run, case)
    if isinstance(ranks, tuple) and refusal(replace(case, comm="a2a+p2p")) is not None:
        context_pool.failures(outcomes, anyattn.ContextError)  # on such a mesh there is one scheme
        return
    found = context_pool.values(outcomes)
    assert len({f.comm for f in found}) == 1
    judge(case, found)


# --- kernels -------------------------------------------------------------------------------------------------------

#: Kernels: those of the CPU, and doubles of others, which leave NaN where real ones write nothing.
KERNELS: dict[str, dict[str, Any]] = {
    "torch": {"backend": "torch:cpu", "dtype": "float32"},
    "fa2": {"backend": "fa2", "imagined": Imagined("sm90", (("fa2", "2.8.3"),))},
    "fa3": {"backend": "fa3", "imagined": Imagined("sm90", (("fa3", "3.0.0"),))},
    "fa4": {"backend": "fa4", "imagined": Imagined("sm90", (("fa4", "4.0.0b36"),))},
    "varlen": {"backend": "varlen", "imagined": Imagined("sm90")},
    "cudnn": {"backend": "cudnn", "imagined": Imagined("sm90", (("cudnn", "1.32.0"),))},
}
ON_KERNELS: dict[str, dict[str, Any]] = {
    "causal_sink": {"scores": "sink"},
    "full": {"terms": Terms()},
    "window": {"terms": Terms(window=(9, 3))},
    "padded": {"gap": 8},
    "zigzag": {"placement": "zigzag"},
    "plain_length": {"lengths": 41, "batch": 2},
    "even": {"lengths": 48, "batch": 2, "scores": "sink"},
    "even_window": {"lengths": 48, "terms": Terms(causal=True, window=(9, None))},
    "few": {"lengths": (0, 3, 0), "scores": "sink"},
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("feature", ON_KERNELS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_kernels_under_every_scheme(pool: context_pool.Pool, scheme: str, feature: str, kernel: str) -> None:
    changes = {"dtype": "bfloat16", "dims": "32", "heads": "4/2", "asks": "grad"}
    case = ContextCase(**{**changes, **KERNELS[kernel], **SCHEMES[scheme], **ON_KERNELS[feature]})
    outcomes = pool.run(case.group, context_ranks.run, case)
    if kernel in ("torch", "varlen") and outcomes[0].failure is not None:
        context_pool.failures(outcomes, anyattn.NoBackend)  # neither takes every call; on all ranks alike then
        pytest.skip(f"refused: {outcomes[0].failure.message}")
    judge(case, context_pool.values(outcomes))


UNSEEING: dict[str, dict[str, Any]] = {
    "a2a": {"comm": "a2a", "lengths": (0, 40, 1), "keys": (8, 0, 8), "gap": 4},
    "all_gather": {"comm": "all_gather", "lengths": (0, 40), "keys": (8, 0), "placement": "documents"},
    "a2a_window": {"comm": "a2a", "lengths": (64,), "keys": (1,), "tail": 3, "terms": Terms(window=(0, 0))},
}


@pytest.mark.parametrize("kernel", ["fa2", "fa3"])
@pytest.mark.parametrize("batch", UNSEEING)
def test_a_sink_beside_queries_that_see_no_key(pool: context_pool.Pool, batch: str, kernel: str) -> None:
    """A kernel that is called once for all rows leaves anything in their lse: the sink's gradient must not see it."""
    changes = {"dtype": "float16", "dims": "32", "heads": "4/4", "scores": "sink", "asks": "grad", "ranks": 4}
    case = ContextCase(**{**changes, **KERNELS[kernel], **UNSEEING[batch]})
    judge(case, context_pool.values(pool.run(case.group, context_ranks.run, case)))


# --- anything ------------------------------------------------------------------------------------------------------

LENGTH = st.one_of(st.integers(0, 12), st.sampled_from([0, 1, 2, 3, 17, 29, 31, 40]))
SIDE = st.none() | st.integers(0, 14)


@st.composite
def contexts(draw: st.DrawFn) -> ContextCase:
    """Anything that makes sense to ask, refusals included."""
    comm = draw(st.sampled_from(["p2p", "all_gather", "a2a", "a2a+p2p"]))
    if comm == "a2a+p2p":
        ranks: Any = draw(st.sampled_from([(2, 2), (1, 2), (2, 1), (2, 4)]))
    else:
        ranks = draw(st.sampled_from([1, 2, 3, 4, 8] if draw(st.integers(0, 3)) == 0 else [2, 3, 4]))
    members = ranks[1] if isinstance(ranks, tuple) else ranks if comm == "a2a" else 1
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    least = next(n for n in range(1, 64) if n * kv_heads % members == 0)
    packed = draw(st.integers(0, 3)) > 0
    one = st.lists(LENGTH, max_size=6).map(tuple) if packed else LENGTH
    lengths: Any = draw(one)
    keys: Any = None
    if comm in ("all_gather", "a2a") and draw(st.integers(0, 3)) == 0:
        keys = tuple(draw(LENGTH) for _ in lengths) if packed else draw(LENGTH)
    scores = [draw(st.sampled_from(["", "sink"])), draw(st.sampled_from(["", "", "", "alibi", "alibi_sequences"]))]
    if comm == "all_gather" and not packed:
        scores += [draw(st.sampled_from(["", "bias", "bias_row"])), draw(st.sampled_from(["", "mask"]))]
    causal = draw(st.sampled_from([None, True, True, "top_left"]))
    window = draw(st.none() | st.tuples(SIDE, SIDE))
    return ContextCase(
        comm=comm,
        ranks=ranks,
        lengths=lengths,
        keys=keys,
        batch=1 if packed else draw(st.integers(0, 2)),
        gap=draw(st.sampled_from([1, 1, 4, 7])) if packed else 1,
        first=draw(st.integers(0, 2)) if packed else 0,
        placement=draw(st.sampled_from(["auto", "auto", "zigzag", "contiguous", "documents"])),
        pad_to_multiple_of=draw(st.sampled_from([1, 1, 4])),
        terms=Terms(causal, window, draw(st.sampled_from([None, 0.4])), draw(st.sampled_from([None, None, 2.0]))),
        scores=" ".join(filter(None, scores)),
        heads=f"{least * kv_heads}/{kv_heads}",
        dims=draw(st.sampled_from(["4", "6/3", "3/5"])),
        dtype=draw(st.sampled_from(["float64", "float64", "float32"])),
        asks=draw(st.sampled_from(["lse_grad", "lse_grad", "grad", "forward"])),
        told=draw(st.booleans()),
        garbage=draw(st.sampled_from([1e4, float("nan")])) if packed else 1e4,
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(contexts())
def test_any_batch_over_any_ranks_is_the_oracles_or_refused(pool: context_pool.Pool, case: ContextCase) -> None:
    attempt(pool, case)
