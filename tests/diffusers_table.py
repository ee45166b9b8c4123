"""What attention backends of diffusers do on a CPU: right, wrong or refused. Run it: python tests/diffusers_table.py.

docs/diffusers.md shows what it prints. Wrong is told by the largest absolute error of outputs of order one, against a
plain softmax in float64.
"""

import warnings

import diffusers
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

import diffusers_models as models
from context_pool import Mesh, Pool
from diffusers_models import BATCH, Call, key_mask

ROWS, HEADS = 16, 4
DISTANCE = torch.arange(ROWS) - torch.arange(ROWS)[:, None]
EVERY = torch.ones(1, 1, ROWS, ROWS, dtype=torch.bool)
PAIRS = torch.rand(BATCH, 1, ROWS, ROWS, generator=torch.Generator().manual_seed(5)) < 0.6
TRIL = DISTANCE <= 0


def keys(kind):
    return key_mask(kind, BATCH, ROWS)


def whole(mask):
    return mask[:, None, None]


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)


#: By name: a call, and which keys its queries see.
CASES = {
    "no mask": (Call(), EVERY),
    "(batch, keys) bool, all true": (Call(mask=keys("true")), EVERY),
    "(batch, keys) bool, right padding": (Call(mask=keys("right")), whole(keys("right"))),
    "(batch, keys) bool, left padding": (Call(mask=keys("left")), whole(keys("left"))),
    "(batch, keys) bool, padding in the middle": (Call(mask=keys("middle")), whole(keys("middle"))),
    "(batch, 1, 1, keys) bool, padding in the middle": (Call(mask=whole(keys("middle"))), whole(keys("middle"))),
    "(batch, 1, 1, keys) additive, padding in the middle": (
        Call(mask=additive(whole(keys("middle")))),
        whole(keys("middle")),
    ),
    "(batch, keys) additive, right padding": (Call(mask=additive(keys("right"))), whole(keys("right"))),
    "(batch, 1, queries, keys) bool": (Call(mask=PAIRS), PAIRS),
    "an entry with all keys hidden": (
        Call(mask=whole(keys("true") & torch.arange(BATCH)[:, None].bool())),
        whole(keys("true") & torch.arange(BATCH)[:, None].bool()),
    ),
    "is_causal": (Call(causal=True), TRIL),
    "is_causal and right padding": (
        Call(causal=True, mask=whole(keys("right"))),
        whole(keys("right")) & TRIL,
    ),
    "enable_gqa": (Call(kv_heads=2), EVERY),
    "window_size=(3, 2)": (Call(more={"window_size": (3, 2)}), (DISTANCE >= -3) & (DISTANCE <= 2)),
    "return_lse": (Call(more={"return_lse": True}), EVERY),
    "an unknown argument": (Call(more={"sparsity": 0.5}), None),
}
LOCAL = {
    "no mask": (Call(), EVERY),
    "is_causal": (Call(causal=True), TRIL),
    "enable_gqa": (Call(kv_heads=2), EVERY),
    "key padding, each rank its own": (Call(mask=keys("middle"), held="keys"), whole(keys("middle"))),
    "(batch, 1, queries, keys) bool, whole_masks=True": (Call(mask=PAIRS), PAIRS),
}


def wanted(call, seen):
    """[out], in float64; a row that sees nothing is 0."""
    q, k, v, _ = (x.double() for x in call.tensors())
    k, v = (x.repeat_interleave(HEADS // call.kv_heads, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def verdict(out, call, seen):
    """Right, or wrong by how much."""
    if seen is None:
        return "dropped, silently"
    error = (out.double() - wanted(call, seen)).abs().max().item()
    return "right" if error < 1e-5 else f"**wrong**, by {error:.2g}"


def judged(call, seen, name):
    """What a backend makes of a call in this process."""
    q, k, v, _ = call.tensors()
    try:
        out = dispatch_attention_fn(
            q, k, v, attn_mask=call.mask, is_causal=call.causal, enable_gqa=call.kv_heads != HEADS, backend=name,
            attention_kwargs=call.more,
        )  # fmt: skip
    except Exception as error:
        return f"{type(error).__name__}"
    return verdict(out[0] if isinstance(out, tuple) else out, call, seen)


def judged_by_ranks(pool, degrees, call, seen, name):
    """The same of two ranks that share a sequence."""
    found = pool.run(
        Mesh((2, *degrees), models.DIMS), models.call_job, call, degrees, "anyattn_whole" if name == "anyattn" else name
    )
    failed = [outcome.failure for outcome in found if outcome.failure is not None]
    if failed:
        return failed[0].kinds[0].rpartition(".")[2]
    return verdict(torch.cat([outcome.value[0][0] for outcome in found[:2]], 1), call, seen)


def judged_flux(pool, degrees, own, name):
    """Of a Flux of two ranks with a padded caption: against one process, with native."""
    with models.backend("native"):
        inputs = models.inputs_of("flux", models.joint(key_mask("right")))
        want = models.build("flux")(**inputs, return_dict=False)[0]
    found = pool.run(Mesh((2, *degrees), models.DIMS), models.model_job, "flux", "right", degrees, name, own)
    failed = [outcome.failure for outcome in found if outcome.failure is not None]
    if failed:
        return failed[0].kinds[0].rpartition(".")[2]
    error = models.difference(found[0].value[0], want)
    return "right" if error < 1e-5 else f"**wrong**, by {error:.2g}"


def main():
    """Print two tables."""
    warnings.simplefilter("ignore")
    models.integration.register()
    print(f"diffusers {diffusers.__version__}, torch {torch.__version__}\n")
    names = ("anyattn", "native", "flex")
    print(f"| | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for case, (call, seen) in CASES.items():
        print(f"| {case} | {' | '.join(judged(call, seen, name) for name in names)} |", flush=True)
    pool = Pool(size=4, timeout=60.0)
    pool.run(4, models.prepare)
    columns = [(name, degrees) for degrees in ((2, 1), (1, 2)) for name in ("anyattn", "native")]
    heads = [f"{name}, {'ring' if degrees[0] > 1 else 'ulysses'}" for name, degrees in columns]
    print(f"\n| two ranks | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for case, (call, seen) in LOCAL.items():
        cells = [judged_by_ranks(pool, degrees, call, seen, name) for name, degrees in columns]
        print(f"| {case} | {' | '.join(cells)} |", flush=True)
    for own in (False, True):
        cells = [judged_flux(pool, degrees, own, name) for name, degrees in columns]
        row = "Flux, a mask of each rank's part" if own else "Flux, a mask of the undivided sequence"
        print(f"| {row} | {' | '.join(cells)} |", flush=True)
    pool.close()


if __name__ == "__main__":
    main()
