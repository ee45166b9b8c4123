"""diffusers' enable_parallelism through anyattn, on gloo ranks: what one process gives.

diffusers itself asks for an accelerator in enable_parallelism, only to number its devices: jobs say that there is one.
"""

import re
from pathlib import Path

import pytest
import torch

import anyattn
import diffusers_models as models
from context_pool import Mesh, Pool, failures, values
from diffusers_models import BATCH, Call, Step, assert_same, backend, build, difference, inputs_of, key_mask, result

pytest.importorskip("diffusers")
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="this torch has no gloo"
)

anyattn.integrations.diffusers.register()

#: (ring_degree, ulysses_degree) of the four ranks; where two share a sequence, two more share another one.
DEGREES = {"ring2": (2, 1), "ulysses2": (1, 2), "both": (2, 2), "ring4": (4, 1), "ulysses4": (1, 4)}
SCHEMES = {"ring2": "p2p", "ulysses2": "a2a", "both": "a2a+p2p", "ring4": "p2p", "ulysses4": "a2a"}


@pytest.fixture(scope="module")
def pool():
    pool = Pool(size=4, timeout=60.0)
    values(pool.run(4, models.prepare))
    yield pool
    pool.close()


def mesh_of(ranks):
    degrees = DEGREES[ranks]
    return Mesh((4 // (degrees[0] * degrees[1]), *degrees), models.DIMS)


# --- models ---


@pytest.fixture(scope="module")
def alone():
    """(output, gradients) of models in one process, with diffusers' native backend."""
    found = {}

    def find(name, kind):
        if (name, kind) not in found:
            with backend("native"):
                found[name, kind] = result(build(name), inputs_of(name, key_mask(kind)))
        return found[name, kind]

    return find


MODELS = [(name, "none", ranks) for ranks in DEGREES for name in ("flux", "wan")] + [
    ("qwen", kind, ranks) for ranks in DEGREES for kind in ("none", "true", "right", "middle")
]


@pytest.mark.parametrize(("name", "kind", "ranks"), MODELS, ids=lambda x: x)
def test_model(pool, alone, name, kind, ranks):
    """Its output whole on every rank, its gradients in sum over the ranks that share a sequence."""
    found = values(pool.run(mesh_of(ranks), models.model_job, name, kind, DEGREES[ranks], "anyattn"))
    for got in found:
        assert_same(got, alone(name, kind))


# --- calls ---


def draw(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.6


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)


KEYS = {kind: key_mask(kind, BATCH, 16) for kind in ("true", "right", "left", "middle", "holes")}
PAIRS = draw(BATCH, 1, 16, 16)
BIAS = torch.randn(BATCH, 4, 16, 16, generator=torch.Generator().manual_seed(6))
CALLS = {
    "plain": Call(),
    "fewer_key_heads": Call(kv_heads=2),
    "one_key_head": Call(kv_heads=1),
    "causal": Call(causal=True),
    "causal_fewer_key_heads": Call(causal=True, kv_heads=2),
    "cross": Call(rows=8, keys=20, kv_heads=2),
    "cross_causal": Call(rows=8, keys=20, causal=True),
    "lse": Call(more={"return_lse": True}),
    "keys_true": Call(mask=KEYS["true"], held="keys"),
    "keys_right": Call(mask=KEYS["right"], held="keys"),
    "keys_left_4d": Call(mask=KEYS["left"][:, None, None], held="keys", kv_heads=2),
    "keys_middle_additive": Call(mask=additive(KEYS["middle"])[:, None, None], held="keys"),
    "keys_holes_causal": Call(mask=KEYS["holes"], held="keys", causal=True, kv_heads=2),
    "keys_cross": Call(rows=8, keys=16, mask=KEYS["right"], held="keys"),
    "keys_of_heads": Call(mask=draw(1, 4, 1, 16), held="keys"),
    "keys_lse": Call(mask=KEYS["middle"], held="keys", more={"return_lse": True}, kv_heads=2),
    "keys_hidden_on_a_rank": Call(mask=torch.arange(16).expand(BATCH, -1) >= 8, held="keys"),
    "keys_of_one_rank_each": Call(mask=torch.arange(16) // 8 == torch.arange(BATCH)[:, None], held="keys"),
    "keys_hidden_of_an_entry": Call(mask=KEYS["true"] & torch.arange(BATCH)[:, None].bool(), held="keys"),
    "keys_all_hidden": Call(mask=torch.zeros(BATCH, 16, dtype=torch.bool), held="keys"),
    "keys_bias": Call(mask=torch.where(KEYS["middle"], 0.5, -9.0)[:, None, None], held="keys"),
    "all_keys": Call(mask=KEYS["middle"][:, None, None]),
    "all_keys_2d": Call(mask=KEYS["middle"]),
    "all_true": Call(mask=torch.ones(BATCH, 1, 16, 16, dtype=torch.bool)),
    "pairs": Call(mask=PAIRS),
    "pairs_of_its_rows": Call(mask=PAIRS, held="rows"),
    "bias_of_its_rows": Call(mask=BIAS, held="rows", kv_heads=2),
    "bias": Call(mask=BIAS, causal=True),
}
WITH_A_TERM = {
    "keys_holes_causal",
    "keys_of_heads",
    "keys_bias",
    "pairs",
    "pairs_of_its_rows",
    "bias_of_its_rows",
    "bias",
}
SLOW = {"ring4", "ulysses4"}


def expected(ranks, name):
    if SCHEMES[ranks] != "a2a" and CALLS[name].mask is not None and name not in ("keys_true", "all_true"):
        return ["all_gather"]
    if name in WITH_A_TERM or name == "keys_all_hidden" or ("cross" in name and SCHEMES[ranks] != "a2a"):
        return ["all_gather"]
    return [SCHEMES[ranks]]


def wanted(call):
    """In one process: by native, and the log-sum-exp, which native does not give, by anyattn."""
    if call.more is None:
        return call.run("native")
    return [*call._replace(more=None).run("native"), call.run("anyattn")[-1]]


def assert_whole(found, ranks, want):
    """The parts of each sequence's ranks, one after the other, are the whole."""
    size = DEGREES[ranks][0] * DEGREES[ranks][1]
    for first in range(0, 4, size):
        parts = zip(*found[first : first + size], strict=True)
        for i, (part, whole) in enumerate(zip(parts, want, strict=True)):
            assert difference(torch.cat(part, 2 if i == 4 else 1), whole) < 1e-5, ["out", "dq", "dk", "dv", "lse"][i]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("ranks", [r for r in DEGREES if r not in SLOW])
def test_call(pool, ranks, name):
    found = values(pool.run(mesh_of(ranks), models.call_job, CALLS[name], DEGREES[ranks]))
    assert all(schemes == expected(ranks, name) for _, schemes in found)
    assert_whole([parts for parts, _ in found], ranks, wanted(CALLS[name]))


@pytest.mark.parametrize("name", ["causal_fewer_key_heads", "keys_right", "pairs"])
@pytest.mark.parametrize("ranks", sorted(SLOW))
def test_call_on_four(pool, ranks, name):
    found = values(pool.run(mesh_of(ranks), models.call_job, CALLS[name], DEGREES[ranks]))
    assert_whole([parts for parts, _ in found], ranks, wanted(CALLS[name]))


@pytest.mark.parametrize("ranks", ["ring2", "ulysses2"])
def test_windows(pool, ranks):
    distance = torch.arange(16) - torch.arange(16)[:, None]
    call = Call(more={"window_size": (3, 2)})
    found = values(pool.run(mesh_of(ranks), models.call_job, call, DEGREES[ranks]))
    want = Call(mask=(distance >= -3) & (distance <= 2)).run("native")
    assert_whole([parts for parts, _ in found], ranks, want)


@pytest.mark.parametrize("name", ["keys_right", "all_true", "bias_of_its_rows"])
def test_masks_that_are_not_read(pool, name):
    found = values(pool.run(mesh_of("ring2"), models.call_job, CALLS[name], (2, 1), "anyattn_device"))
    assert all(schemes == ["all_gather"] for _, schemes in found)
    assert_whole([parts for parts, _ in found], "ring2", wanted(CALLS[name]))


def test_a_mask_is_looked_at_once(pool):
    assert values(pool.run(mesh_of("ring2"), models.repeated_job, CALLS["keys_right"], (2, 1), 3)) == [1] * 4


# --- what a rank remembers of its mask, which another does not ---

PADDED, HOLES, SHOWN = (key_mask(kind, BATCH, 8) for kind in ("right", "holes", "true"))
STEPS = {
    "one_edits": ([[PADDED], [HOLES]], [Step((0, 0)), Step((0, 0), writes=HOLES), Step((0, 0))]),
    "one_hides_something": ([[SHOWN], [SHOWN]], [Step((0, 0)), Step((0, 0), writes=PADDED)]),
    "one_alternates": ([[PADDED], [HOLES, SHOWN]], [Step((0, 0)), Step((0, 1)), Step((0, 0)), Step((0, 1))]),
    "each_alternates": (
        [[PADDED, SHOWN], [HOLES, SHOWN]],
        [Step((0, 0)), Step((1, 1)), Step((0, 1)), Step((1, 0)), Step((0, 0))],
    ),
    "one_forgets": ([[PADDED], [HOLES]], [Step((0, 0)), Step((0, 0), writes=HOLES, past_torch=True)]),
    "none_and_masks": ([[PADDED], [HOLES]], [Step((None, None)), Step((0, 0)), Step((None, None)), Step((0, 0))]),
    "inference": ([[PADDED], [HOLES]], [Step((0, 0), inference=True), Step((0, 0))]),
    "inference_with_a_bias": (
        [[torch.randn(BATCH, 1, 1, 8)], [torch.randn(BATCH, 1, 1, 8)]],
        [Step((0, 0), inference=True), Step((0, 0))],
    ),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("ranks", ["ring2", "ulysses2"])
def test_ranks_need_not_remember_alike(pool, ranks, name):
    masks, steps = STEPS[name]
    found = values(pool.run(mesh_of(ranks), models.steps_job, DEGREES[ranks], masks, steps))
    now = [[x.clone() for x in own] for own in masks]
    for i, step in enumerate(steps):
        if step.writes is not None:
            now[0][step.uses[0]] = step.writes
        parts = [own[j] for own, j in zip(now, step.uses, strict=True) if j is not None]
        want = Call(mask=torch.cat(parts, -1) if parts else None).run("native")
        assert_whole([rank[i] for rank in found], ranks, want[:1] if step.inference else want)


@pytest.mark.parametrize("first", [(0, 0), (None, 0)], ids=["after_masks", "at_once"])
def test_a_mask_on_one_rank_alone(pool, first):
    job = models.steps_job, (2, 1), [[PADDED], [HOLES]], [Step(first), Step((None, 0))]
    for message in failures(pool.run(mesh_of("ring2"), *job), anyattn.ContextError):
        assert "ranks 1 of the 2 that share a sequence have an attn_mask and the others none" in message


def test_masks_of_different_form(pool):
    job = models.steps_job, (2, 1), [[PADDED], [additive(HOLES)]], [Step((0, 0))]
    for message in failures(pool.run(mesh_of("ring2"), *job), anyattn.ContextError):
        assert "different shape, dtype" in message


def test_a_mask_that_one_rank_cannot_take(pool):
    job = models.refused_job, (2, 1), [[PADDED], [HOLES.long()]], [Step((0, 0))]
    for rank, (kind, message) in enumerate(values(pool.run(mesh_of("ring2"), *job))):
        assert kind == ("DtypeError" if rank % 2 else "ContextError")
        assert ("attn_mask.bool()" if rank % 2 else "ranks 1 of the 2 that share a sequence cannot") in message


def test_heads_that_ranks_do_not_divide(pool):
    for message in failures(pool.run(mesh_of("ulysses2"), models.odd_heads_job, (1, 2)), anyattn.ContextError):
        assert "3 query heads do not divide over ulysses_degree=2" in message
        assert "ring_degree=2" in message


# --- what the page says ---


def test_the_page_runs_on_four_ranks(pool):
    text = (Path(__file__).parents[1] / "docs" / "diffusers.md").read_text()
    (script,) = (x for x in re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE) if "nccl" in x)
    found = values(pool.run(mesh_of("both"), models.page_job, script))
    assert found[0].shape == (2, 16, 4)
    assert all(torch.equal(found[0], x) for x in found)


def test_diffusers_own_limits(pool):
    """Where one of these passes, the page is to be mended."""
    for message in failures(pool.run(mesh_of("ring2"), models.dictionary_job), ValueError):
        assert "Expected output to be a tensor" in message
    if not torch.accelerator.is_available():
        for message in failures(pool.run(mesh_of("ring2"), models.without_accelerator_job), ZeroDivisionError):
            assert "modulo" in message or "zero" in message


# --- what is refused, on all ranks alike ---


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (Call(mask=PAIRS, held="keys"), anyattn.ShapeError, "pass it over all 16 keys"),
        (Call(mask=torch.ones(BATCH, 1, 1, 7, dtype=torch.bool)), anyattn.ShapeError, "must broadcast to"),
        (Call(mask=torch.ones(BATCH, 16, dtype=torch.int64)), anyattn.DtypeError, "bool"),
        (Call(mask=torch.zeros(BATCH, 1, 1, 16).requires_grad_(), held="keys"), anyattn.Unsupported, "detach it"),
    ],
    ids=["part_of_pairs", "shape", "integers", "gradient"],
)
def test_masks_that_say_too_little(pool, call, error, text):
    for message in failures(pool.run(mesh_of("ring2"), models.call_job, call, (2, 1)), error):
        assert text in message


@pytest.mark.parametrize("name", ["all_keys", "all_keys_2d", "pairs", "pairs_of_its_rows", "bias_of_its_rows"])
@pytest.mark.parametrize("ranks", ["ring2", "ulysses2"])
def test_masks_over_all_keys_whose_order_nobody_knows(pool, ranks, name):
    job = models.call_job, CALLS[name], DEGREES[ranks], "anyattn"
    for message in failures(pool.run(mesh_of(ranks), *job), anyattn.Unsupported):
        assert "in which order" in message
        assert "whole_masks=True" in message


def test_masks_over_all_keys_that_hide_nothing(pool):
    found = values(pool.run(mesh_of("ring2"), models.call_job, CALLS["all_true"], (2, 1), "anyattn"))
    assert all(schemes == ["p2p"] for _, schemes in found)


@pytest.mark.parametrize("name", ["keys_right", "keys_bias"])
def test_masks_of_its_own_keys_need_no_order(pool, name):
    found = values(pool.run(mesh_of("ring2"), models.call_job, CALLS[name], (2, 1), "anyattn"))
    assert_whole([parts for parts, _ in found], "ring2", wanted(CALLS[name]))


def test_flux_with_a_mask_in_the_order_of_the_undivided_sequence(pool):
    """The mask reaches every rank whole, text first, and each rank holds a part of the text and a part of the image."""
    found = pool.run(mesh_of("ring2"), models.model_job, "flux", "right", (2, 1), "anyattn")
    for message in failures(found, anyattn.Unsupported):
        assert "where text and image are divided apart" in message


@pytest.mark.parametrize("ranks", ["ring2", "ulysses2", "both"])
def test_flux_with_its_own_part_of_a_mask(pool, ranks):
    with backend("native"):
        want = result(build("flux"), inputs_of("flux", models.joint(key_mask("right"))))
    for got in values(pool.run(mesh_of(ranks), models.model_job, "flux", "right", DEGREES[ranks], "anyattn", True)):
        assert_same(got, want)


def test_parts_of_different_length(pool):
    for message in failures(pool.run(mesh_of("ring2"), models.uneven_job, (2, 1)), anyattn.ContextError):
        assert "differ" in message


@pytest.mark.parametrize(("degrees", "name"), [((2, 1), "ring_anything"), ((1, 2), "ulysses_anything")])
def test_parts_of_any_length(pool, degrees, name):
    mesh = Mesh((2, *degrees), models.DIMS)
    for message in failures(pool.run(mesh, models.anything_job, degrees, name), anyattn.Unsupported):
        assert f"{name}=True" in message


def test_a_configuration_that_was_not_set_up(pool):
    found = failures(pool.run(mesh_of("ring2"), models.unprepared_job, Call(), (2, 1)), anyattn.Unsupported)
    assert "enable_parallelism" in found[0]
