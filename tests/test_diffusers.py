"""diffusers' transformers and attention calls through anyattn: what its native backend gives, and nothing dropped."""

import re
import sys
from pathlib import Path

import pytest
import torch

import anyattn

pytest.importorskip("diffusers")

from diffusers.models import attention_dispatch as dispatch

from anyattn.integrations import _diffusers_masks as masks
from diffusers_models import (
    BATCH,
    KINDS,
    assert_same,
    backend,
    build,
    inputs_of,
    integration,
    joint,
    key_mask,
    result,
)

anyattn.integrations.diffusers.register()
anyattn.integrations.diffusers.register("anyattn_device", read_masks=False)

HEADS, ROWS = 4, 10
#: float32, of values of order one.
TOLERANCE = {"atol": 2e-6, "rtol": 2e-5}


@pytest.fixture(autouse=True)
def active_backend():
    """set_attention_backend is for the whole process."""
    before = dispatch._AttentionBackendRegistry._active_backend
    yield
    dispatch._AttentionBackendRegistry.set_active_backend(before)


@pytest.fixture
def reads(monkeypatch):
    """Masks that were copied to the host."""
    found = []
    read = masks._read
    monkeypatch.setattr(masks, "_read", lambda whole, shape: found.append(whole) or read(whole, shape))
    return found


@pytest.fixture
def calls(monkeypatch):
    """Arguments of the calls of anyattn.attention."""
    found = []

    def attention(q, k, v, **arguments):
        found.append(arguments)
        return anyattn.attention(q, k, v, **arguments)

    monkeypatch.setattr(integration, "attention", attention)
    return found


def tensors(rows=ROWS, keys=ROWS, kv_heads=HEADS, batch=BATCH):
    torch.manual_seed(0)
    shapes = ((rows, HEADS), (keys, kv_heads), (keys, kv_heads))
    return [torch.randn(batch, *shape, 16, requires_grad=True) for shape in shapes]


def call(name, mask=None, *, rows=ROWS, keys=ROWS, kv_heads=HEADS, **options):
    """(out, dq, dk, dv)."""
    q, k, v = tensors(rows, keys, kv_heads)
    out = dispatch.dispatch_attention_fn(q, k, v, attn_mask=mask, enable_gqa=kv_heads != HEADS, backend=name, **options)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad((out * dout).sum(), (q, k, v))]


def assert_equals_native(name, mask, **options):
    for got, want in zip(call(name, mask, **options), call("native", mask, **options), strict=True):
        torch.testing.assert_close(got, want, **TOLERANCE)


# --- masks ---


def forms(real):
    """A mask of keys, bool (batch, keys), in the ways in which models write it."""
    batch, keys = real.shape
    whole = real[:, None, None]
    return {
        "2d": real,
        "4d": whole,
        "expanded": whole.expand(batch, HEADS, keys, keys),
        "full": whole.expand(batch, HEADS, keys, keys).clone(),
        "additive": torch.zeros(whole.shape).masked_fill(~whole, -torch.inf),
        "additive2d": torch.zeros(real.shape).masked_fill(~real, -torch.inf),
        "large": torch.zeros(whole.shape).masked_fill(~whole, torch.finfo(torch.float32).min),
        "product": whole & real[:, None, :, None],
    }


def others(queries, keys):
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.rand(shape, generator=generator) < 0.6

    return {
        "none": None,
        "nothing": torch.zeros(BATCH, keys, dtype=torch.bool),
        "one_entry_hidden": torch.arange(BATCH)[:, None].bool() & torch.ones(keys, dtype=torch.bool),
        "pairs": draw(BATCH, 1, queries, keys),
        "pairs_of_heads": draw(BATCH, HEADS, queries, keys),
        "keys_of_heads": draw(1, HEADS, 1, keys),
        "queries_by_keys": draw(queries, keys),
        "three_dims": draw(HEADS, queries, keys),
        "queries": draw(BATCH, 1, queries, 1).expand(-1, -1, -1, keys),
        "one_row": draw(1, keys),
        "bias": torch.randn(BATCH, HEADS, queries, keys, generator=generator),
        "bias_of_keys": torch.randn(BATCH, 1, 1, keys, generator=generator),
        "additive_pairs": torch.zeros(BATCH, 1, queries, keys).masked_fill(~draw(BATCH, 1, queries, keys), -torch.inf),
    }


MASKS = {
    f"{kind}-{form}": mask
    for kind in KINDS
    if kind != "none"
    for form, mask in forms(key_mask(kind, BATCH, ROWS)).items()
} | others(ROWS, ROWS)  # fmt: skip
BACKENDS = ("anyattn", "anyattn_device", "anyattn:reference")


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_gives_what_native_gives(kind, causal):
    if causal and kind == "three_dims":
        pytest.skip("native refuses it")
    # Of a row whose scores are all huge the reference cannot tell how many they are: their log-sum-exp is one of them.
    for name in BACKENDS[:2] if kind.endswith("large") else BACKENDS:
        assert_equals_native(name, MASKS[kind], is_causal=causal)


@pytest.mark.parametrize("kind", ["none", "right-2d", "left-2d", "holes-4d", "middle-additive", "pairs", "bias"])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_fewer_key_heads(kind, causal):
    for name in BACKENDS:
        assert_equals_native(name, MASKS[kind], is_causal=causal, kv_heads=2)


@pytest.mark.parametrize("kind", ["none", "nothing", "one_entry_hidden", "pairs", "queries_by_keys", "queries", "bias"])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("sizes", [(6, 10), (10, 6), (1, 7)], ids=str)
def test_cross_attention(kind, causal, sizes):
    mask = others(*sizes)[kind]
    for name in BACKENDS:
        assert_equals_native(name, mask, is_causal=causal, rows=sizes[0], keys=sizes[1])


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "none"])
def test_cross_attention_with_padding(kind):
    for mask in (key_mask(kind, BATCH, 7), key_mask(kind, BATCH, 7)[:, None, None]):
        for name in BACKENDS:
            assert_equals_native(name, mask, rows=10, keys=7)


def test_a_bias_gets_its_gradient():
    found = []
    for name in ("anyattn", "native"):
        bias = torch.randn(BATCH, HEADS, ROWS, ROWS, generator=torch.Generator().manual_seed(2)).requires_grad_()
        q, k, v = tensors()
        out = dispatch.dispatch_attention_fn(q, k, v, attn_mask=bias, backend=name)
        found.append(torch.autograd.grad(out.square().sum(), bias)[0])
    torch.testing.assert_close(*found, **TOLERANCE)


def test_an_empty_batch_with_a_mask():
    q = torch.randn(0, 5, HEADS, 16)
    out = dispatch.dispatch_attention_fn(q, q, q, attn_mask=torch.ones(0, 5, dtype=torch.bool), backend="anyattn")
    assert out.shape == q.shape


def test_a_block_mask():
    from torch.nn.attention.flex_attention import create_block_mask

    def near(b, h, i, j):
        return (i - j).abs() < 3

    block_mask = create_block_mask(near, None, None, ROWS, ROWS, device="cpu")
    distance = torch.arange(ROWS)[:, None] - torch.arange(ROWS)
    with torch.no_grad():
        got = dispatch.dispatch_attention_fn(*tensors(), attn_mask=block_mask, backend="anyattn")
        want = dispatch.dispatch_attention_fn(*tensors(), attn_mask=distance.abs() < 3, backend="native")
    torch.testing.assert_close(got, want, **TOLERANCE)


# --- what a mask costs ---


@pytest.mark.parametrize("form", ["2d", "4d", "expanded", "full", "additive", "product"])
def test_a_mask_that_hides_nothing_is_dropped(form, calls, reads):
    call("anyattn", forms(key_mask("true", BATCH, ROWS))[form])
    (arguments,) = calls
    assert len(reads) == 1
    assert arguments["mask"] is arguments["bias"] is None
    assert "packing_kv" not in arguments


@pytest.mark.parametrize("kind", ["right", "left", "middle", "holes"])
@pytest.mark.parametrize("form", ["2d", "4d", "full", "additive", "product"])
def test_padding_shortens_sequences(kind, form, calls):
    call("anyattn", MASKS[f"{kind}-{form}"])
    (arguments,) = calls
    assert arguments.get("mask") is arguments.get("bias") is None
    assert arguments["packing_kv"].lengths.tolist() == key_mask(kind, BATCH, ROWS).sum(1).tolist()


@pytest.mark.parametrize(("kind", "causal"), [("right", "top_left"), ("left", True)])
def test_causal_padding_needs_no_mask(kind, causal, calls):
    call("anyattn", MASKS[f"{kind}-2d"], is_causal=True)
    (arguments,) = calls
    assert "mask" not in arguments
    assert arguments["causal"] == causal


def test_a_mask_is_read_once_by_all_layers(reads):
    mask = key_mask("middle", BATCH, ROWS)
    for _ in range(3):
        call("anyattn", mask)
        call("anyattn", mask[:, None, None])  # a view of it
        with torch.no_grad():
            dispatch.dispatch_attention_fn(*tensors(), attn_mask=mask[:, None, None], backend="anyattn")
    assert len(reads) == 1
    mask[1] = True
    assert_equals_native("anyattn", mask)
    assert len(reads) == 2, "it was written to"


def test_equal_masks_share_what_is_made_of_them(calls):
    for _ in range(2):
        call("anyattn", key_mask("middle", BATCH, ROWS))
    first, second = calls
    assert first["packing"] is second["packing"]
    mask = key_mask("right", BATCH, ROWS)
    call("anyattn", mask)
    call("anyattn", mask.clone())
    assert calls[2]["packing_kv"] is calls[3]["packing_kv"]


def test_what_is_remembered_dies_with_the_mask():
    before = len(masks._memory)
    mask = key_mask("holes", BATCH, ROWS)
    call("anyattn", mask)
    assert len(masks._memory) == before + 1
    del mask
    assert len(masks._memory) == before


def test_nothing_is_read_on_request(reads, calls):
    for kind in ("right-2d", "pairs", "additive_pairs", "bias"):
        call("anyattn_device", MASKS[kind])
    assert not reads
    assert [x.get("mask") is not None for x in calls] == [False, True, False, False]
    assert [x.get("bias") is not None for x in calls] == [False, False, True, True]


def test_masks_made_in_inference_mode():
    with torch.inference_mode():
        mask = key_mask("left", BATCH, ROWS)
        q, k, v = (x.detach() for x in tensors())
        for _ in range(2):
            got, want = (
                dispatch.dispatch_attention_fn(q, k, v, attn_mask=mask, backend=name) for name in ("anyattn", "native")
            )
            torch.testing.assert_close(got, want, **TOLERANCE)
            mask[0, 0] = True
            mask[1, 3] = False


def read_in_inference_mode(mask):
    with torch.inference_mode():
        dispatch.dispatch_attention_fn(*(x.detach().clone() for x in tensors()), attn_mask=mask, backend="anyattn")


@pytest.mark.parametrize("kind", MASKS)
def test_training_after_validation_in_inference_mode(kind):
    masks._facts.cache_clear()
    masks.all_rows.cache_clear()
    if MASKS[kind] is None:
        return
    mask = MASKS[kind].clone()
    for causal in (False, True) if kind != "three_dims" else (False,):
        read_in_inference_mode(mask)
        assert_equals_native("anyattn", mask, is_causal=causal)
        assert_equals_native("anyattn", mask.clone(), is_causal=causal)


def test_what_torch_does_not_see_is_to_be_forgotten(reads):
    mask = key_mask("right", BATCH, ROWS)
    call("anyattn", mask)
    mask.data.copy_(key_mask("holes", BATCH, ROWS))
    call("anyattn", mask)
    assert len(reads) == 1, "torch says when a mask is written to now: forget() is not needed"
    anyattn.integrations.diffusers.forget()
    assert_equals_native("anyattn", mask)
    assert len(reads) == 2


# --- other arguments ---


@pytest.mark.parametrize("window", [(2, 1), (3, -1), (-1, 0), (-1, -1)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("kind", ["none", "right-2d", "middle-4d", "pairs"])
def test_windows(window, causal, kind):
    distance = torch.arange(ROWS) - torch.arange(ROWS)[:, None]
    left, right = window
    seen = torch.ones(ROWS, ROWS, dtype=torch.bool)
    seen &= (distance >= -left) if left >= 0 else seen
    seen &= (distance <= right) if right >= 0 else seen
    mask = MASKS[kind]
    if mask is not None:
        seen = seen & (mask[:, None, None] if mask.ndim == 2 else mask)
    want = call("native", seen, is_causal=causal)
    got = call("anyattn", mask, is_causal=causal, attention_kwargs={"window_size": window})
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, **TOLERANCE)


def test_windows_are_counted_from_the_last_keys():
    """As FlashAttention does, the only backend of diffusers that has them."""
    distance = torch.arange(10) - torch.arange(10 - 4, 10)[:, None]
    want = call("native", distance.abs() <= 2, rows=4, keys=10)
    got = call("anyattn", rows=4, keys=10, attention_kwargs={"window_size": (2, 2)})
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, **TOLERANCE)


def test_scale_and_lse():
    q, k, v = tensors()
    for kind in ("none", "right-2d", "middle-2d", "holes-product", "pairs"):
        mask = MASKS[kind]
        for name in ("anyattn", "anyattn_device"):
            out, lse = dispatch.dispatch_attention_fn(
                q, k, v, attn_mask=mask, scale=0.3, backend=name, attention_kwargs={"return_lse": True}
            )
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.3
            if mask is not None:
                scores = scores.masked_fill(~(mask[:, None, None] if mask.ndim == 2 else mask), -torch.inf)
            torch.testing.assert_close(lse, scores.logsumexp(-1), **TOLERANCE)
            want = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).nan_to_num(), v)
            torch.testing.assert_close(out, want, **TOLERANCE)


def test_softcap_and_determinism():
    q, k, v = tensors()
    more = {"softcap": 2.0, "deterministic": True}
    got = dispatch.dispatch_attention_fn(q, k, v, backend="anyattn", attention_kwargs=more)
    scores = 2 * torch.tanh(torch.einsum("bqhd,bkhd->bhqk", q, k) / 4 / 2)
    torch.testing.assert_close(got, torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), **TOLERANCE)


def test_determinism_is_asked_for(calls):
    call("anyattn", attention_kwargs={"deterministic": True})
    call("anyattn")
    assert [x["deterministic"] for x in calls] == [True, None], "by default as torch says"


def test_none_is_no_dropout_and_no_window():
    q, k, v = tensors()
    more = {"dropout_p": None, "attention_kwargs": {"window_size": None}}
    got = dispatch.dispatch_attention_fn(q, k, v, backend="anyattn", **more)
    assert torch.equal(got, anyattn.attention(q, k, v))


def test_dropout():
    q, k, v = tensors()
    torch.manual_seed(3)
    got = dispatch.dispatch_attention_fn(q, k, v, dropout_p=0.5, backend="anyattn")
    torch.manual_seed(3)
    assert torch.equal(got, anyattn.attention(q, k, v, dropout=0.5))
    assert not torch.equal(got, anyattn.attention(q, k, v))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"attention_kwargs": {"sparsity": 0.5}}, anyattn.Unsupported, "sparsity=0.5"),
        ({"attn_mask": torch.ones(BATCH, ROWS, dtype=torch.long)}, anyattn.DtypeError, r"use attn_mask.bool\(\)"),
        ({"attn_mask": torch.ones(BATCH, ROWS - 1).bool()}, anyattn.ShapeError, "must broadcast to"),
        ({"attn_mask": torch.ones(1, 1, 1, 1, ROWS).bool()}, anyattn.ShapeError, "1 to 4 dims"),
        ({"attn_mask": [True]}, anyattn.ShapeError, "got list"),
        ({"is_causal": True, "attention_kwargs": {"window_size": (2, 0)}, "rows": 4}, anyattn.Unsupported, "4 queries"),
        ({"backend": "anyattn:fa3"}, anyattn.NoBackend, "fa3"),
        ({"attention_kwargs": {"window_size": 3}}, anyattn.InvalidArgument, r"\(left, right\).*got 3"),
        ({"attention_kwargs": {"window_size": (3,)}}, anyattn.InvalidArgument, r"\(left, right\)"),
        ({"attention_kwargs": {"window_size": (3, None)}}, anyattn.InvalidArgument, "-1 means no limit"),
    ],
    ids=["unknown", "integers", "shape", "dims", "list", "alignment", "named", "window", "one_side", "no_number"],
)
def test_what_is_refused_is_named(arguments, error, text):
    q, k, v = tensors(rows=arguments.pop("rows", ROWS))
    with pytest.raises(error, match=text):
        dispatch.dispatch_attention_fn(q, k, v, **{"backend": "anyattn", **arguments})


# --- registration ---


def test_registering_again_is_harmless():
    names = list(dispatch.AttentionBackendName)
    anyattn.integrations.diffusers.register()
    assert list(dispatch.AttentionBackendName) == names
    assert dispatch.AttentionBackendName("anyattn") is dispatch.AttentionBackendName.ANYATTN
    values = [member.value for member in names]
    assert len(set(values)) == len(values)
    assert {"native", "anyattn", "anyattn:fa3", "anyattn:reference"} <= set(values)
    assert "anyattn" in dispatch._AttentionBackendRegistry._supports_context_parallel
    anyattn.integrations.diffusers.register("anyattn_fa3")
    found = {member.value for member in dispatch.AttentionBackendName.__members__.values()}
    assert {"anyattn:fa3", "anyattn_fa3", "anyattn_fa3:fa3"} <= found, "each under a label of its own"


@pytest.mark.parametrize("name", ["native", "Anyattn", "", 3, "my backend!", "a/b", ":fa3", "anyattn\n"])
def test_names_that_diffusers_could_not_find(name):
    native = dispatch._AttentionBackendRegistry._backends[dispatch.AttentionBackendName.NATIVE]
    with pytest.raises(anyattn.InvalidArgument):
        anyattn.integrations.diffusers.register(name)
    assert dispatch._AttentionBackendRegistry._backends[dispatch.AttentionBackendName.NATIVE] is native


def test_without_diffusers(monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "diffusers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(anyattn.MissingExtra, match=r"anyattn\[diffusers\]"):
        anyattn.integrations.diffusers.register()


def test_a_preference_reaches_the_call():
    with anyattn.use("fa3"), pytest.raises(anyattn.NoBackend, match="fa3"):
        call("anyattn")


def test_diffusers_own_checks(monkeypatch):
    """DIFFUSERS_ATTN_CHECKS=yes."""
    monkeypatch.setattr(dispatch._AttentionBackendRegistry, "_checks_enabled", True)
    assert_equals_native("anyattn", MASKS["right-2d"])


# --- models ---


@pytest.fixture(scope="module")
def natively():
    """(output, gradients) of a model without a mask."""
    found = {}
    for name in ("flux", "wan", "qwen"):
        with backend("native"):
            found[name] = result(build(name), inputs_of(name))
    return found


@pytest.mark.parametrize("name", ["flux", "wan", "qwen"])
def test_model(name, natively, calls):
    model = build(name)
    model.set_attention_backend("anyattn")
    assert_same(result(model, inputs_of(name)), natively[name])
    assert len(calls) >= 2, "attention went elsewhere"


FLUX_FORMS = {
    "2d": lambda real: real,
    "4d": lambda real: real[:, None, None],
    "additive": lambda real: torch.zeros(real.shape).masked_fill(~real, -torch.inf)[:, None, None],
    "pairs": lambda real: real[:, None, None] & real[:, None, :, None],
}


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("form", FLUX_FORMS)
def test_flux_with_a_mask(kind, form, natively):
    inputs = inputs_of("flux", FLUX_FORMS[form](joint(key_mask(kind))))
    found = {}
    for name in ("native", "anyattn"):
        with backend(name):
            found[name] = result(build("flux"), inputs)
    assert_same(found["anyattn"], found["native"])
    if kind != "true":
        assert not torch.allclose(found["native"][0], natively["flux"][0], atol=1e-4), "the mask does nothing"


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("attention", ["anyattn", "anyattn_device"])
def test_qwen_with_padded_text(kind, attention):
    inputs = inputs_of("qwen", key_mask(kind))
    found = {}
    for name in ("native", attention):
        with backend(name):
            found[name] = result(build("qwen"), inputs)
    assert_same(found[attention], found["native"])


def test_a_forward_reads_one_mask(reads):
    model, inputs = build("flux"), inputs_of("flux", joint(key_mask("middle")))
    with backend("anyattn"), torch.no_grad():
        model(**inputs)
        assert len(reads) == 1, "three layers, one mask"
        model(**inputs)
    assert len(reads) == 1, "the same mask in the next step"


@pytest.mark.parametrize("kind", ["none", "true", "middle"])
def test_gradient_checkpointing(kind):
    inputs = inputs_of("qwen", key_mask(kind))
    with backend("anyattn"):
        model = build("qwen")
        want = result(model, inputs)
        model.enable_gradient_checkpointing()
        assert_same(result(model, inputs), want)


def test_bfloat16():
    inputs = inputs_of("flux", joint(key_mask("middle")))
    inputs = {n: x.bfloat16() if torch.is_tensor(x) and n[-3:] != "ids" else x for n, x in inputs.items()}
    found = []
    for name in ("anyattn", "native"):
        with backend(name), torch.no_grad():
            found.append(build("flux").bfloat16()(**inputs, return_dict=False)[0].float())
    torch.testing.assert_close(*found, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("kind", ["right-2d", "bias"])
def test_compiled(kind, reads):
    def run(q, k, v, mask):
        return dispatch.dispatch_attention_fn(q, k, v, attn_mask=mask, backend="anyattn")

    q, k, v = tensors()
    torch._dynamo.reset()
    got = torch.compile(run, backend="aot_eager", fullgraph=True)(q, k, v, MASKS[kind])
    assert not reads
    want = dispatch.dispatch_attention_fn(q, k, v, attn_mask=MASKS[kind], backend="native")
    torch.testing.assert_close(got, want, **TOLERANCE)
    for x, y in zip(*(torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (got, want)), strict=True):
        torch.testing.assert_close(x, y, atol=2e-5, rtol=2e-5)


def test_compiled_model(natively):
    model = build("flux")
    model.set_attention_backend("anyattn")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = result(compiled, inputs_of("flux"))
    assert_same((got[0], {n.removeprefix("_orig_mod."): x for n, x in got[1].items()}), natively["flux"])


def blocks(language):
    """Of docs/diffusers.md."""
    text = (Path(__file__).parents[1] / "docs" / "diffusers.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_the_page_runs():
    names = {}
    runs = [block for block in blocks("python") if "parallel" not in block]
    for block in runs:
        exec(block, names)
    assert names["out"].shape == (2, 16, 4)
    assert len(runs) == 3


def test_reset_leaves_the_backend_of_the_process():
    """diffusers' own: reset_attention_backend asks models to use the active one, and leaves that as it is."""
    model = build("flux")
    model.set_attention_backend("anyattn")
    model.reset_attention_backend()
    assert dispatch._AttentionBackendRegistry._active_backend == "anyattn"
