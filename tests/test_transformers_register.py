"""Names under which transformers finds anyattn, and the undoing of them."""

import pytest
import torch

import anyattn
import fresh
from anyattn.backends import ORDER
from anyattn.integrations import _transformers_call as call
from anyattn.integrations import transformers as integration
from transformers_cases import MASKS, packed, tokens
from transformers_images import GRIDS
from transformers_judge import TOLERANCE
from transformers_models import BY_NAME, build, transformers


def state():
    """All that register() may change."""
    methods = ("_check_and_adjust_attn_implementation", "_flash_attn_can_dispatch")
    return (
        dict(transformers.AttentionInterface._global_mapping),
        dict(transformers.AttentionMaskInterface._global_mapping),
        [getattr(transformers.PreTrainedModel, name) for name in methods],
        transformers.masking_utils._preprocess_mask_arguments,
    )


@pytest.fixture(autouse=True)
def _undone():
    integration.unregister()
    before = state()
    yield
    integration.unregister()
    assert state() == before


@pytest.mark.parametrize("name", ["my_flash", "org/kernel", "sdpa2", "paged|x", ""])
def test_names_that_transformers_would_misread(name):
    with pytest.raises(anyattn.InvalidArgument, match="name must be non-empty and not contain"):
        integration.register(name)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [({"replace": True}, "replace must be one or several of .* got True"), ({"name": 3}, "name must be a string.* 3")],
)
def test_arguments_of_another_type(arguments, text):
    with pytest.raises(anyattn.InvalidArgument, match=text):
        integration.register(**arguments)


def test_each_backend_has_a_name():
    integration.register()
    for backend in ORDER:
        build("llama", f"anyattn:{backend}")
    integration.register("mine")
    build("llama", "mine:fa4")


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_name_runs_its_backend_and_no_other(backend, monkeypatch):
    integration.register()
    asked = []
    real = call.attention
    monkeypatch.setattr(call, "attention", lambda *a, **k: asked.append(k["backend"]) or real(*a, **k))
    inputs = {"input_ids": tokens(3, 10), "attention_mask": torch.tensor(MASKS["left"])}
    rows = inputs["attention_mask"].bool()
    with torch.no_grad():
        got = build("llama", f"anyattn:{backend}")(**inputs).logits[rows]
        want = build("llama", "eager")(**inputs).logits[rows]
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=2e-4)
    assert asked == [backend] * 2


def test_a_backend_that_cannot_is_an_error():
    integration.register()
    with pytest.raises(anyattn.NoBackend, match="fa4"):
        build("llama", "anyattn:fa4")(input_ids=tokens(1, 4))
    with pytest.raises(anyattn.NoBackend, match="varlen"), torch.no_grad():
        build("gemma2", "anyattn:varlen")(input_ids=tokens(1, 4))


# --- in place of transformers' own ---


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("eager", "each model has its own function"),
        ("flex_attention", "models make BlockMasks"),
        ("paged|eager", "continuous batching"),
        ("flash_attention_9", "transformers has no such"),
    ],
)
def test_what_cannot_be_replaced(name, why):
    with pytest.raises(anyattn.InvalidArgument, match=f"{why}.*allowed: flash_attention_2, flash_attention_3"):
        integration.register(replace=name)


def test_flash_attention_is_out_of_reach_here_without():
    with pytest.raises(ImportError, match="seem to be installed"):
        build("llama", "flash_attention_2")


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flash_attention_4", "sdpa"])
def test_in_place_of(name):
    """From set_attn_implementation, from_config and a sub-configuration; undone, it is what it was."""
    integration.register(replace=name)
    batch = packed("seq_lens")(BY_NAME["llama"]).inputs
    want = build("llama", "eager")
    with torch.no_grad():
        alone = torch.cat([want(input_ids=x).logits for x in batch["input_ids"].split([5, 1, 9, 3], 1)], 1)
        model = build("llama", name)
        torch.testing.assert_close(model(**batch).logits, alone, atol=TOLERANCE, rtol=2e-4)
        made = transformers.AutoModelForCausalLM.from_config(model.config, attn_implementation=name)
        made.load_state_dict(model.state_dict())
        torch.testing.assert_close(made.eval()(**batch).logits, alone, atol=TOLERANCE, rtol=2e-4)
    integration.unregister()
    if name != "sdpa":
        with pytest.raises(ImportError, match="seem to be installed"):
            build("llama", name)
    else:
        with torch.no_grad():
            assert not torch.allclose(build("llama", name)(**batch).logits, alone, atol=1e-2)


def test_from_pretrained(tmp_path):
    integration.register(replace="flash_attention_2")
    model = build("llama", "anyattn")
    model.save_pretrained(tmp_path)
    want = model(input_ids=tokens(1, 9)).logits
    for name in ("anyattn", "anyattn:reference", "flash_attention_2"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
        torch.testing.assert_close(loaded(input_ids=tokens(1, 9)).logits, want, atol=TOLERANCE, rtol=2e-4)
        assert loaded.config._attn_implementation == name


def test_only_the_names_asked_for_are_replaced():
    integration.register(replace=["flash_attention_3"])
    build("llama", "flash_attention_3")
    with pytest.raises(ImportError, match="seem to be installed"):
        build("llama", "flash_attention_2")


def test_what_a_model_says_of_itself_stays():
    integration.register(replace="flash_attention_2")
    with pytest.raises(ValueError, match="does not support Flash Attention 2"):
        build("t5", "flash_attention_2")
    config = transformers.FalconConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(ImportError, match="seem to be installed"):  # it has functions of its own for this name
        transformers.FalconForCausalLM._from_config(config, attn_implementation="flash_attention_2")


def test_vision_towers_make_one_call_for_all_images(monkeypatch):
    """Which transformers lets them do under this name alone; otherwise they call once per image."""
    integration.register(replace="flash_attention_2")
    calls = []
    real = call.attention
    monkeypatch.setattr(call, "attention", lambda *a, **k: calls.append(k["packing"]) or real(*a, **k))
    patches = torch.randn(sum(t * h * w for t, h, w in GRIDS), 24)
    for name, number in (("anyattn", 2 * 4), ("flash_attention_2", 2)):
        calls.clear()
        build("qwen2_vl", name)(patches, grid_thw=torch.tensor(GRIDS))
        assert len(calls) == number
    assert all(packing.lengths.tolist() == [16, 12, 8, 8] for packing in calls)


def test_all_ones_masks_reach_static_caches():
    """transformers drops such a mask unless the name says flash; either way tokens are eager's."""
    integration.register(replace="flash_attention_2")
    ids = tokens(2, 6)
    options = {"max_new_tokens": 5, "do_sample": False, "disable_compile": True}
    want = build("llama", "eager").generate(ids, **options)
    for name in ("anyattn", "flash_attention_2"):
        model = build("llama", name)
        assert torch.equal(model.generate(ids, cache_implementation="static", **options), want)


# --- importing ---

BLOCKED = """
import sys
sys.modules["transformers"] = None
import anyattn
anyattn.integrations.transformers.unregister()
try:
    anyattn.integrations.transformers.register()
except anyattn.MissingExtra as error:
    print(error)
"""


def test_without_transformers():
    done = fresh.run(BLOCKED)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "anyattn.integrations.transformers needs what is not installed here, transformers: "
        "pip install 'anyattn[transformers]'\n"
    )


def test_import_leaves_transformers_alone():
    code = "import sys, anyattn; anyattn.integrations.transformers; assert 'transformers' not in sys.modules"
    done = fresh.run(code)
    assert done.returncode == 0, done.stderr
