"""Static caches: where nothing is compiled, decoding goes by lengths, on kernels that take no mask too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor

import anyattn
from anyattn.integrations import _transformers_call as integration
from anyattn.integrations import _transformers_decoding as decoding
from doubles import pretend
from transformers_cases import MASKS, tokens
from transformers_generation import NEW
from transformers_models import build, transformers

#: Of transformers 5.17, llama4 fails inside transformers with a static cache.
DECODERS = ("llama", "mistral", "gemma3", "gpt_oss", "deepseek_v3") + (
    () if transformers.__version__ < "5.20" else ("llama4",)
)
#: Padding in the middle after left padding: what generate() is given is a left-padded prompt.
PADDING = {"left": MASKS["left"], "ones": MASKS["ones"], "mixed": MASKS["mixed"]}


pytestmark = pytest.mark.usefixtures("registered")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keyword arguments of every call of attention, and the shapes of q and k."""
    found: list[dict[str, Any]] = []
    real = integration.attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        found.append({**options, "q": q.shape, "k": k.shape})
        return real(q, k, v, **options)

    monkeypatch.setattr(integration, "attention", spy)
    return found


def generate(model: Any, padding: str = "left", cache: str | None = "static", **options: Any) -> Tensor:
    mask = torch.tensor(PADDING[padding])
    ids = tokens(3, 10, seed=3).masked_fill(mask == 0, 0)
    found: Tensor = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, cache_implementation=cache,
        **{"disable_compile": True, **options},
    )  # fmt: skip
    return found


@pytest.mark.parametrize("padding", ["left", "ones"])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_needs_no_mask(name: str, padding: str, calls: list[dict[str, Any]]) -> None:
    model = build(name, "anyattn")
    want = generate(model, padding, None)
    calls.clear()
    assert torch.equal(generate(model, padding), want)
    assert all(call["mask"] is None and call["bias"] is None for call in calls)
    assert len(calls) == 2 * NEW
    if name != "llama4":  # whose chunks are packed too
        assert any(call["packing"] is not None for call in calls) == (padding == "left")


@pytest.mark.parametrize("options", [
    {"prefill_chunk_size": 4}, {"prefill_chunk_size": 3}, {"num_beams": 3}, {"num_beams": 2, "prefill_chunk_size": 9},
])  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_in_parts_and_with_beams(name: str, options: dict[str, Any], calls: list[dict[str, Any]]) -> None:
    model = build(name, "anyattn")
    want = generate(model, "left", None, **options)
    calls.clear()
    assert torch.equal(generate(model, "left", **options), want)
    assert all(call["mask"] is None for call in calls)


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_forwards_with_a_cache_of_ones_own(
    name: str, padding: str, inference: bool, calls: list[dict[str, Any]]
) -> None:
    """Logits of a prompt in parts, then of single tokens, as a dynamic cache has them."""
    model = build(name, "anyattn")
    mask = torch.cat([torch.tensor(PADDING[padding]), torch.ones(3, 4, dtype=torch.long)], 1)
    ids = tokens(3, 14, seed=5)

    def logits(past: Any) -> Tensor:
        found, begin = [], 0
        for n in (5, 1, 4, 1, 1, 1, 1):
            found.append(
                model(
                    input_ids=ids[:, begin : begin + n], attention_mask=mask[:, : begin + n], past_key_values=past,
                    use_cache=True,
                ).logits
            )  # fmt: skip
            begin += n
        return torch.cat(found, 1)[mask.bool()]

    with torch.inference_mode() if inference else torch.no_grad():
        want = logits(transformers.DynamicCache(config=model.config))
        calls.clear()
        got = logits(transformers.StaticCache(config=model.config, max_cache_len=20))
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-4)
    # Padding after a row's first tokens leaves a hole in what later tokens see, but for a window that is shorter than
    # the hole: there the mask itself counts.
    masked = [call for call in calls if call["mask"] is not None]
    assert bool(masked) == (padding == "mixed" and name != "mistral")
    assert all(call["q"][1] == 1 or call["q"][1] == 4 for call in masked)


@pytest.mark.parametrize("backend", ["fa3", "fa4", "varlen"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_kernels_without_masks_serve_it(name: str, backend: str) -> None:
    versions = {"fa3": "3.0.0", "fa4": "4.0.0b36"}
    with pretend("sm90", **{k: v for k, v in versions.items() if k == backend}):
        model = build(name, f"anyattn:{backend}").bfloat16()
        for padding in ("left", "ones"):
            assert torch.equal(generate(model, padding), generate(model, padding, None))


def test_decoding_reads_no_more_keys_than_there_are(calls: list[dict[str, Any]]) -> None:
    """Not the room that a static cache has left."""
    model = build("llama", "anyattn")
    cache = transformers.StaticCache(config=model.config, max_cache_len=50)
    with torch.no_grad():
        for begin, end in ((0, 6), (6, 7), (7, 8)):
            model(input_ids=tokens(2, 8)[:, begin:end], past_key_values=cache, use_cache=True)
    assert [call["k"][1] for call in calls] == [6, 6, 7, 7, 8, 8]


@pytest.fixture
def step() -> tuple[Tensor, list[Tensor]]:
    """A mask of the mask function's for one query, and q, k and v."""
    from transformers import masking_utils

    real = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0]]).bool()
    mask = anyattn.integrations.transformers.mask_function(
        2, 1, 6, torch.tensor(3), 0, masking_utils.causal_mask_function, real, allow_is_causal_skip=False
    )
    assert isinstance(mask, Tensor)
    generator = torch.Generator().manual_seed(0)
    return mask, [torch.randn(2, 2, n, 8, generator=generator) for n in (1, 6, 6)]


def attend(mask: Tensor, qkv: list[Tensor], **options: Any) -> Tensor:
    layer = torch.nn.Module()
    return integration.attention_forward(layer, *qkv, mask, **options)[0]


def expected(mask: Tensor, qkv: list[Tensor]) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(*qkv, attn_mask=mask).transpose(1, 2)


def test_a_mask_that_is_written_to_is_read_again(step: tuple[Tensor, list[Tensor]], calls: list[Any]) -> None:
    mask, qkv = step
    for visible in ([[0, 1, 1, 1, 0, 0], [1] * 4 + [0] * 2], [[0, 1, 1, 1, 1, 0], [1] * 5 + [0]], [[1, 0] * 3] * 2):
        mask.copy_(torch.tensor(visible).bool()[:, None, None])
        for _ in range(2):
            torch.testing.assert_close(attend(mask, qkv), expected(mask, qkv))
    assert [call["mask"] is not None for call in calls] == [False] * 4 + [True] * 2  # holes are no lengths


def test_rows_that_see_nothing_are_zero(step: tuple[Tensor, list[Tensor]]) -> None:
    mask, qkv = step
    mask[0] = False
    got = attend(mask, qkv)
    assert (got[0] == 0).all()
    torch.testing.assert_close(got[1], expected(mask, qkv)[1])
    mask[1] = False
    assert (attend(mask, qkv) == 0).all()


def test_masks_of_ones_own_count_as_they_are(step: tuple[Tensor, list[Tensor]], calls: list[Any]) -> None:
    """And so do those for other layers than these, and what is captured in a graph."""
    mask, qkv = step
    torch.testing.assert_close(attend(mask.clone(), qkv), expected(mask, qkv))
    torch.testing.assert_close(attend(mask.float().log(), qkv), expected(mask, qkv))
    one = [x[:1] for x in qkv]
    torch.testing.assert_close(attend(mask[:1], one), expected(mask[:1], one))
    bias = torch.randn(2, 2, 1, 6)
    got = attend(mask, qkv, position_bias=bias)
    torch.testing.assert_close(got, expected(bias.masked_fill(~mask, float("-inf")), qkv))
    assert [call["mask"] is not None for call in calls] == [True, False, True, True]
    assert all(call["packing"] is None for call in calls)


def test_capture_reads_nothing(step: tuple[Tensor, list[Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    mask, _ = step
    shape = decoding.Shape(2, 1, 6)
    assert decoding.read_decoding(mask, shape, None) is not None
    assert decoding.read_decoding(mask, shape._replace(keys=5), None) is None
    monkeypatch.setattr(decoding, "_capturing", lambda mask: True)
    assert decoding.read_decoding(mask, shape, None) is None


def test_capture_finds_nothing_that_was_settled_before(
    step: tuple[Tensor, list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that is captured after a warm-up with the very same mask reads the tensor, whatever it will hold."""
    mask, qkv = step
    want = attend(mask, qkv)
    seen: list[tuple[bool, bool]] = []

    def spy(*tensors: Tensor, **options: Any) -> Tensor:
        seen.append((options["mask"] is not None, options["packing"] is not None))
        found: Tensor = anyattn.attention(*tensors, **options)
        return found

    monkeypatch.setattr("anyattn.integrations._transformers_call.attention", spy)
    attend(mask, qkv)
    monkeypatch.setattr(decoding, "_capturing", lambda mask: True)
    torch.testing.assert_close(attend(mask, qkv), want)
    assert seen == [(False, True), (True, False)]


def test_a_mask_of_more_keys_than_a_layer_has_is_an_error() -> None:
    """A sliding cache keeps the last keys: which of the mask's they are is not guessed."""
    with pytest.raises(anyattn.ShapeError, match="of 7 keys for a layer that has 6"):
        attend(torch.ones(2, 1, 1, 7, dtype=torch.bool), [torch.randn(2, 2, n, 8) for n in (1, 6, 6)])


def test_a_packing_beside_such_a_mask_is_an_error(step: tuple[Tensor, list[Tensor]]) -> None:
    mask, qkv = step
    with pytest.raises(anyattn.PackingError, match="4-D attention mask says all"):
        attend(mask, qkv, packing=anyattn.Packing.from_lengths([1, 1]))


# --- compiled ---


def compiling(fullgraph: bool) -> dict[str, Any]:
    """Options of generate() for compiled decoding on a CPU."""
    config = transformers.CompileConfig(backend="aot_eager", fullgraph=fullgraph, mode=None)
    config._compile_all_devices = True
    torch._dynamo.reset()
    return {"disable_compile": False, "compile_config": config}


@pytest.mark.parametrize("fullgraph", [True, False])
def test_what_is_compiled_sees_the_mask(fullgraph: bool) -> None:
    model = build("llama", "anyattn")
    want = generate(model, cache=None)
    torch._dynamo.utils.counters.clear()
    assert torch.equal(generate(model, **compiling(fullgraph)), want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_with_a_kernel_without_masks(fullgraph: bool) -> None:
    """An error that says what to do; and it does."""
    with pretend("sm90", fa3="3.0.0"):
        model = build("llama", "anyattn:fa3").bfloat16()
        said = (
            r'what is compiled sees .*attn_implementation="anyattn", or leave it uncompiled \(generate\(\.\.\., disabl'
        )
        kind = Exception if fullgraph else anyattn.Unsupported
        with pytest.raises(kind, match=said):
            generate(model, **compiling(fullgraph))
        want = generate(model, cache=None, disable_compile=False)
        assert torch.equal(generate(model, disable_compile=True), want)
        model.set_attn_implementation("anyattn")
        assert torch.equal(generate(model, **compiling(fullgraph)), want)
    torch._dynamo.reset()
