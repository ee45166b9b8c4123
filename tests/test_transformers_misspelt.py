"""Arguments of a model's call that were meant to say something to attention, and say it by another name, or in part."""

import pytest
import torch

import anyattn
from anyattn.integrations import _transformers_models as models
from transformers_cases import LENGTHS, offsets, tokens
from transformers_models import build

pytestmark = pytest.mark.usefixtures("registered")

PACKING = anyattn.Packing.from_lengths(LENGTHS)


@pytest.fixture(scope="module")
def llama():
    return build("llama", "anyattn")


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("cu_seq_len_q", offsets(), "cu_seq_lens_q"), ("cu_seqlen_k", offsets(), "cu_seqlens_k"),
        ("cu_seqlens", offsets(), "cu_seqlens_[qk]"), ("cu_seq_lens", offsets(), "cu_seq_lens_[qk]"),
        ("cuseqlens_q", offsets(), "cu_seqlens_q"), ("packings", PACKING, "packing"),
        ("packing_k", PACKING, "packing_kv"), ("packing_mask", offsets(), "packing(_kv)?"),
        ("max_length_queries", 9, "max_length_q"), ("max_seqlens_q", 9, "max_seqlen_q"),
        ("max_seqlen", 9, "max_seqlen_[qk]"),
        ("max_seq_len_q", 9, "max_seqlen_q"), ("position_id", torch.arange(18)[None], "position_ids"),
        ("plans", object(), "plan"), ("window", 4, "sliding_window"), ("causal", True, "is_causal"),
    ],
)  # fmt: skip
def test_a_misspelt_word_about_packing_is_an_error(llama, name, value, meant):
    ids = tokens(1, sum(LENGTHS))
    with pytest.raises(anyattn.InvalidArgument, match=f"^{name}= reached .*LlamaAttention.*; {meant}= was probably"):
        llama(input_ids=ids, **{name: value})
    want = llama(input_ids=ids).logits
    for nothing in (None, False):
        assert torch.equal(llama(input_ids=ids, **{name: nothing}).logits, want)


def test_a_misspelt_word_compiled(llama):
    run = torch.compile(llama, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="cu_seq_lens_q= was probably meant"), torch.no_grad():
        run(input_ids=tokens(1, sum(LENGTHS)), cu_seq_len_q=offsets(), use_cache=False)


def test_other_words_are_passed_over(llama):
    """Columns of a batch, and keywords that models of transformers have for parts of their own."""
    from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
    from transformers.utils import TransformersKwargs

    theirs = {*TransformersKwargs.__annotations__, *FlashAttentionKwargs.__annotations__}
    assert {"cu_seq_lens_q", "num_items_in_batch"} <= theirs
    own = set(models.SILENT) | {"is_causal"}  # a parameter of the attention function
    others = {
        "max_length", "max_new_tokens", "loss_weights", "token_type_ids", "image_position_ids", "text_position_ids",
        "decoder_position_ids", "image_cu_seqlens", "video_max_seqlen", "image_grid_thw", "pixel_values", "length",
        "lengths", "seq_lens", "position", "position_mask", "shift_labels", "packed_mask", "mask_length", "use_kernel",
    }  # fmt: skip
    kind = type(llama.model.layers[0].self_attn)
    assert {name for name in (theirs - own) | others if models._meaning(kind, name)} == set()
    ids = tokens(1, sum(LENGTHS))
    got = llama(input_ids=ids, **dict.fromkeys(others, 3)).logits
    assert torch.equal(got, llama(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["max_length_q", "max_length_k", "max_seqlen_q", "max_seqlen_k"])
def test_a_longest_length_without_offsets(llama, name):
    ids = tokens(1, sum(LENGTHS))
    with pytest.raises(anyattn.PackingError, match="without cu_seq_lens_q: the longest length does not say where"):
        llama(input_ids=ids, **{name: 9})
    for said in ({"packing": PACKING}, {"cu_seq_lens_q": offsets()}):
        assert llama(input_ids=ids, **said, **{name: 9}).logits.shape[:2] == ids.shape


@pytest.mark.parametrize("plan", [3, "ring", (1, 0)])
def test_a_plan_that_is_none(llama, plan):
    with pytest.raises(anyattn.ContextError, match=r"plan must be an anyattn.ContextPlan, .*; got .*(3|ring|1, 0)"):
        llama(input_ids=tokens(1, 4), plan=plan)


def test_a_layer_says_more_than_a_misspelling():
    """What a layer itself passes is refused as that, whatever it is like."""
    kind = type(build("gpt_oss", "anyattn").model.layers[0].self_attn)
    assert models._meaning(kind, "s_aux") == "s_aux"
    assert models._meaning(kind, "anything_else") == ""
