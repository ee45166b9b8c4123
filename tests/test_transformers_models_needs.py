"""Models that compute with the mask themselves, or say more to attention than others: what their eager code gives."""

import copy

import pytest
import torch
from torch import nn

import anyattn
from anyattn._errors import PackingError, ShapeError, Unsupported
from anyattn.integrations import _transformers_models as models
from anyattn.integrations._transformers_call import attention_forward, refuse
from anyattn.integrations._transformers_refusals import check_model
from transformers_cases import MASKS, positions_of, tokens
from transformers_judge import CLOSE
from transformers_models import GROUPED, VOCABULARY, transformers

pytestmark = pytest.mark.usefixtures("registered")

_EXPERTS = {
    "n_routed_experts": 4, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2, "n_shared_experts": 1,
}  # fmt: skip
_CHOICE = {
    **GROUPED, **_EXPERTS, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 12, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 12, "index_topk": 4, "index_head_dim": 8, "index_n_heads": 2,
    "swa_head_dim": 8, "sliding_window": 4,
}  # fmt: skip
_BLOCKS = {
    **GROUPED, **_EXPERTS, "dense_intermediate_size": 48, "index_block_size": 2, "index_topk_blocks": 2,
    "index_n_heads": 2, "index_head_dim": 8, "layer_types": ["minimax_m3_sparse"] * 2,
}  # fmt: skip
_SHARED = {
    **GROUPED, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 4, "global_head_dim": 8,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
_COMPRESSED = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 32, "q_lora_rank": 32, "o_groups": 2, "o_lora_rank": 16,
    "moe_intermediate_size": 32, "intermediate_size": 32, "n_routed_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 4, "sliding_window": 8,
    "pad_token_id": 0, "max_position_embeddings": 256,
}  # fmt: skip
#: model_type -> configuration.
CHOOSING = dict.fromkeys(
    ("deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4", "dots3_note_text", "mistral_large4_text"), _CHOICE
)
LEFT = torch.tensor(MASKS["left"])


def configuration(model_type, given):
    """A configuration with those of the given fields that it has."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    absent = f"this transformers has no {model_type}"
    if model_type == "mistral_large4_text":
        if not hasattr(transformers, "MistralLarge4TextConfig"):
            pytest.skip(absent)
        return transformers.MistralLarge4TextConfig(**{**given, "head_dim": 16})
    if model_type not in CONFIG_MAPPING:
        pytest.skip(absent)
    kind = CONFIG_MAPPING[model_type]
    fields = {name for cls in kind.__mro__ for name in getattr(cls, "__annotations__", {})}
    return kind(**{name: value for name, value in given.items() if name in fields | set(kind.attribute_map)})


def pair(config, kind=None):
    """The same model with eager, and with anyattn."""
    torch.manual_seed(0)
    make = transformers.AutoModelForCausalLM.from_config if kind is None else kind._from_config
    eager = make(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    other = copy.deepcopy(eager)
    other.set_attn_implementation("anyattn")
    assert other.config._attn_implementation == "anyattn"
    return eager, other


def outputs(model, mask=None, **options):
    """Logits or hidden states, and gradients, of a batch padded on the left or not at all."""
    model.zero_grad()
    more = {} if mask is None else {"attention_mask": mask, "position_ids": positions_of(mask)}
    out = model(input_ids=tokens(3, 10), **more, **options)[0]
    if mask is not None:
        out = out[mask.bool()]
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def compare(eager, other, *args, **options):
    (got, *slopes), (want, *right) = outputs(other, *args, **options), outputs(eager, *args, **options)
    torch.testing.assert_close(got, want, **CLOSE)
    assert len(slopes) == len(right)
    for have, slope in zip(slopes, right, strict=True):  # in the hundreds, and sdpa's differ by up to 3e-4 of that
        torch.testing.assert_close(have, slope, atol=1e-3 * max(1.0, float(slope.abs().max())), rtol=0)


def generated(model, mask=LEFT):
    return model.generate(tokens(3, 10), attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("model_type", CHOOSING)
def test_chosen_keys(model_type):
    config = configuration(model_type, CHOOSING[model_type])
    text = model_type == "mistral_large4_text"  # nothing but a model for images and text has its head
    eager, other = pair(config, transformers.MistralLarge4TextModel if text else None)
    compare(eager, other, use_cache=False)
    compare(eager, other, LEFT, use_cache=False)
    if not text:
        assert torch.equal(generated(other), generated(eager))


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("model_type", ["deepseek_v32", "doge"])
def test_a_complete_mask_of_packed_documents(model_type, use_cache):
    eager, other = pair(configuration(model_type, _CHOICE if model_type in CHOOSING else GROUPED))
    ids, positions = tokens(1, 12), torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        want = torch.cat([eager(input_ids=x).logits for x in ids.split([5, 7], 1)], 1)
        got = other(input_ids=ids, position_ids=positions, use_cache=use_cache).logits
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("model_type", ["deepseek_v32", "gemma4_text", "doge"])
def test_a_packing_beside_a_complete_mask_is_refused(model_type):
    given = {"deepseek_v32": _CHOICE, "gemma4_text": _SHARED, "doge": GROUPED}[model_type]
    model = pair(configuration(model_type, given))[1]
    with pytest.raises(PackingError, match="give one"), torch.no_grad():
        model(input_ids=tokens(1, 12), packing=anyattn.Packing.from_lengths([5, 7]), use_cache=False)


def test_chosen_keys_compiled():
    eager, other = pair(configuration("deepseek_v32", _CHOICE))
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    given = {"attention_mask": LEFT, "position_ids": positions_of(LEFT), "use_cache": False}
    with torch.no_grad():
        want, got = (m(input_ids=tokens(3, 10), **given).logits[LEFT.bool()] for m in (eager, compiled))
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("implementation", ["anyattn", "sdpa"])
def test_chosen_blocks(implementation):
    eager, other = pair(configuration("minimax_m3_vl_text", _BLOCKS))
    if implementation == "sdpa":
        anyattn.integrations.transformers.register(replace="sdpa")
        other.set_attn_implementation("sdpa")
    try:
        compare(eager, other, use_cache=False)
        ones = torch.ones_like(LEFT)  # of left padding the model chooses whole blocks, and eager sees those
        compare(eager, other, ones, use_cache=False)
        assert torch.equal(generated(other, ones), generated(eager, ones))
    finally:
        anyattn.integrations.transformers.unregister()
        anyattn.integrations.transformers.register()


def test_a_choice_of_keys_by_hand():
    module = nn.Module()
    q, k, v = (torch.randn(2, 2, 5, 8) for _ in range(3))
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None].expand(2, 1, 5, 5)
    indices = torch.tensor([[0], [0], [1], [2], [0]]).expand(2, 5, 1)
    out, _ = attention_forward(module, q, k, v, mask, indices=indices)
    torch.testing.assert_close(out, v[:, :, indices[0, :, 0]].transpose(1, 2))
    torch.testing.assert_close(attention_forward(module, q, k, v, mask[:1], indices=indices)[0], out)
    additive = torch.zeros(2, 1, 5, 5).masked_fill(~mask, float("-inf"))
    torch.testing.assert_close(attention_forward(module, q, k, v, additive, indices=indices)[0], out)
    with pytest.raises(Unsupported, match="chooses keys"):
        attention_forward(module, q, k, v, None, indices=indices)
    with pytest.raises(ShapeError, match="a choice of keys of shape"):
        attention_forward(module, q, k, v, mask, indices=indices[:1])


def test_sinks_of_each_row():
    given = {
        **GROUPED, **_EXPERTS, "sliding_window_size": 4, "swa_head_dim": 8, "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
    }  # fmt: skip
    eager, other = pair(configuration("inkling2_text", given))
    compare(eager, other, use_cache=False)
    compare(eager, other, LEFT, use_cache=False)
    assert torch.equal(generated(other), generated(eager))


def test_sinks_by_hand():
    q, k, v = (torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    sinks = torch.randn(2, 3, 5, 1, dtype=torch.float64, requires_grad=True)
    scores = torch.cat([q @ k.mT * 8**-0.5, sinks], -1).softmax(-1)[..., :-1]
    want = (scores @ v).transpose(1, 2)
    packing = anyattn.Packing.from_lengths([5, 5])
    calls = {"dense": {}, "flat": {"packing": packing}}
    weights = torch.randn_like(want)
    slopes = torch.autograd.grad((want * weights).sum(), (q, k, v, sinks))
    for options in calls.values():
        got, _ = attention_forward(nn.Module(), q, k, v, None, is_causal=False, sinks=sinks, **options)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad((got * weights).sum(), (q, k, v, sinks)), slopes)
    with pytest.raises(ShapeError, match="sinks must be"):
        attention_forward(nn.Module(), q, k, v, None, sinks=sinks[:, 0])


@pytest.mark.parametrize("model_type", ["git", "bigbird_pegasus"])
def test_attention_written_out_is_refused(model_type):
    given = {
        **GROUPED, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    }  # fmt: skip
    config = configuration(model_type, given)
    if model_type == "git":
        tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        config.vision_config = transformers.GitVisionConfig(**tower, image_size=8, patch_size=4)
    eager, other = pair(config)
    with torch.no_grad():
        want = eager(input_ids=tokens(3, 10)).logits
        with pytest.raises(Unsupported, match=model_type):
            other(input_ids=tokens(3, 10))
        other.set_attn_implementation("eager")
        torch.testing.assert_close(other(input_ids=tokens(3, 10)).logits, want)


@pytest.mark.parametrize("model_type", ["gemma4_text", "gemma4_unified_text"])
def test_layers_that_share_keys(model_type):
    eager, other = pair(configuration(model_type, _SHARED))
    compare(eager, other)
    compare(eager, other, LEFT)
    with torch.no_grad():
        for keep in (1, 3):
            given = {"input_ids": tokens(3, 10), "attention_mask": torch.ones_like(LEFT), "logits_to_keep": keep}
            torch.testing.assert_close(other(**given).logits, eager(**given).logits, **CLOSE)
    assert torch.equal(generated(other), generated(eager))


def test_output_that_is_viewed():
    given = {**GROUPED, **_EXPERTS, "global_attn_every_n_layers": 2, "num_dense_layers": 1, "sliding_window": 4}
    compare(*pair(configuration("afmoe", given)), use_cache=False)


def test_frames_that_are_padding():
    if not hasattr(transformers, "LasrForCTC"):
        pytest.skip("this transformers has no LASR")
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "num_mel_bins": 8, "subsampling_conv_channels": 16, "conv_kernel_size": 5,
    }  # fmt: skip
    config = transformers.LasrCTCConfig(encoder_config=sizes, vocab_size=VOCABULARY)
    eager, other = pair(config, transformers.LasrForCTC)
    frames = torch.randn(2, 40, 8)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 20:] = 0
    with torch.no_grad():
        for options in ({}, {"attention_mask": mask}):
            want, got = (m(input_features=frames, **options).logits for m in (eager, other))
            torch.testing.assert_close(got[0], want[0], **CLOSE)
            torch.testing.assert_close(got[1, :3], want[1, :3], **CLOSE)


class _Layer(nn.Module):
    """An attention layer that says something of its own."""

    is_causal = False

    def forward(self, x, attention_interface=attention_forward, **kwargs):
        return attention_interface(self, x, x, x, None, radius=kwargs.pop("own", None), **kwargs)[0]


def test_an_unknown_keyword_of_a_layer_is_refused():
    x = torch.randn(1, 2, 4, 8)
    want = _Layer()(x)
    for value in (torch.ones(1), 3, True):
        with pytest.raises(Unsupported, match="_Layer says radius= to its attention"):
            _Layer()(x, own=value)
    torch.testing.assert_close(_Layer()(x, own=False), want)
    torch.testing.assert_close(_Layer()(x, column=torch.ones(1)), want)  # of the batch: no layer says it


def test_an_unknown_keyword_compiled():
    x, layer = torch.randn(1, 2, 4, 8), _Layer()
    run = torch.compile(lambda **given: layer(x, **given), backend="eager", fullgraph=True)
    torch.testing.assert_close(run(column=torch.ones(1)), layer(x))
    with pytest.raises(Exception, match="radius="):
        run(own=torch.ones(1))


def test_columns_of_the_batch_are_nothing_to_attention():
    eager, other = pair(transformers.LlamaConfig(**GROUPED))
    with torch.no_grad():
        want = eager(input_ids=tokens(3, 10)).logits
        got = other(input_ids=tokens(3, 10), loss_weights=torch.ones(3, 10)).logits
    torch.testing.assert_close(got, want, **CLOSE)


def test_what_layers_of_transformers_say_is_read_from_their_source():
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention
    from transformers.models.modernbert.modeling_modernbert import ModernBertAttention
    from transformers.models.t5.modeling_t5 import T5Attention

    for kind in (GptOssAttention, ModernBertAttention, T5Attention):
        assert not models._says(kind, "anything_else")
    assert models._says(GptOssAttention, "s_aux")  # by the layer
    assert models._says(T5Attention, "position_bias")  # by its eager attention


def test_under_a_plan_they_are_refused():
    for name in models.HEEDED:
        refuse(nn.Module(), {name: torch.ones(1)}, models.HEEDED)
        with pytest.raises(Unsupported, match=f"{name}= of Module"):
            refuse(nn.Module(), {name: torch.ones(1)})
    for model_type, given in (("deepseek_v32", _CHOICE), ("gemma4_text", _SHARED)):
        with pytest.raises(Unsupported, match="computes with a mask of the whole sequence"):
            check_model(transformers.AutoModelForCausalLM.from_config(configuration(model_type, given)))


def test_compressed_keys_are_seen():
    """DeepSeek V4 lengthens its mask by keys of whole blocks of tokens."""
    config = configuration(
        "deepseek_v4",
        {
            **_COMPRESSED, "layer_types": ["heavily_compressed_attention"] * 2,
            "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 4},
        },
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.randint(1, VOCABULARY, (1, 14))

    def logits(implementation):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            whole, step = model(tokens, use_cache=False).logits, model(tokens[:, :5], use_cache=True)
            parts = [step.logits]
            for i in range(5, 14):
                step = model(tokens[:, i : i + 1], past_key_values=step.past_key_values, use_cache=True)
                parts.append(step.logits)
        return torch.cat([whole, *parts], 1)

    torch.testing.assert_close(logits("anyattn"), logits("eager"), rtol=1e-4, atol=1e-5)
