"""What a caller gives to describe a batch: packings and masks that disagree, or do not cover the tokens, are errors."""

import pytest
import torch

import anyattn
from anyattn.integrations import _transformers_call as integration
from transformers_cases import LENGTHS, offsets, tokens
from transformers_judge import CLOSE
from transformers_models import build

pytestmark = pytest.mark.usefixtures("registered")


def of_both(lengths_q, lengths_k, **more):
    """Cumulative lengths of queries and of keys."""
    return {"cu_seq_lens_q": offsets(lengths_q), "cu_seq_lens_k": offsets(lengths_k), **more}


def test_both_spellings_must_agree():
    ours = build("llama", "anyattn")
    ids = tokens(1, sum(LENGTHS))
    want = ours(input_ids=ids, cu_seq_lens_q=offsets()).logits
    torch.testing.assert_close(
        ours(input_ids=ids, **of_both(LENGTHS, LENGTHS), cu_seqlens_q=offsets().long()[None]).logits, want
    )
    longest = {"max_length_q": 9, "max_seqlen_q": torch.tensor(9)}
    torch.testing.assert_close(ours(input_ids=ids, cu_seq_lens_q=offsets(), **longest).logits, want)
    for more in (
        {"cu_seqlens_q": offsets([6, 0, 9, 3])}, {"cu_seqlens_k": offsets([18])},
        {"max_length_q": 9, "max_seqlen_q": 10}, {"max_length_k": torch.tensor(9), "max_seqlen_k": 10},
    ):  # fmt: skip
        with pytest.raises(anyattn.PackingError, match="are two names of one thing, and their values differ"):
            ours(input_ids=ids, **of_both(LENGTHS, LENGTHS), **more)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_whole_mask_wins_over_positions_that_restart(use_cache):
    ours, theirs = (build("llama", implementation) for implementation in ("anyattn", "eager"))
    batch = {"input_ids": tokens(1, 18), "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]}
    whole = torch.ones(1, 1, 18, 18, dtype=torch.bool).tril()
    added = torch.zeros(whole.shape).masked_fill(~whole, torch.finfo(torch.float32).min)
    want = theirs(**batch, attention_mask=added, use_cache=use_cache).logits
    for mask in (whole, added):
        torch.testing.assert_close(ours(**batch, attention_mask=mask, use_cache=use_cache).logits, want, **CLOSE)
    assert not torch.allclose(ours(**batch, use_cache=use_cache).logits[:, 5:], want[:, 5:])


def test_keys_are_divided_as_queries_in_self_attention():
    ours = build("llama", "anyattn")
    ids = tokens(1, sum(LENGTHS))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    other = [6, 0, 9, 3]
    packings = {name: anyattn.Packing.from_lengths(n) for name, n in (("packing", LENGTHS), ("packing_kv", other))}
    for wrong in (of_both(LENGTHS, other), of_both(LENGTHS, [5, 1, 9]), packings):
        for more in ({}, {"position_ids": positions}):
            with pytest.raises(anyattn.PackingError, match=r"self-attention .*first at row (5|15)|is of 15 rows"):
                ours(input_ids=ids, **wrong, **more)
    same = {name: anyattn.Packing.from_lengths(LENGTHS) for name in ("packing", "packing_kv")}
    want = ours(input_ids=ids, cu_seq_lens_q=offsets()).logits
    torch.testing.assert_close(ours(input_ids=ids, **same).logits, want, **CLOSE)


def test_tokens_that_nothing_covers():
    """Neither documents nor padding: an error, whatever else is in the batch."""
    ours = build("llama", "anyattn")
    ids = tokens(2, 15)
    short = of_both([5, 10], [5, 10])
    for wrong in (
        short, {**short, "attention_mask": torch.ones_like(ids)}, of_both([5, 30], [5, 30]),
        {"packing": anyattn.Packing.from_lengths([5, 7])}, {"packing": anyattn.Packing.from_lengths([5, 7, 2])},
    ):  # fmt: skip
        with pytest.raises(anyattn.PackingError, match=r"is of \d+ rows, and there are 2 x 15 tokens"):
            ours(input_ids=ids, **wrong)
    want = ours(input_ids=ids[:1], **of_both([5, 10], [5, 10])).logits
    mask = torch.tensor([[1] * 15, [0] * 15])
    for said in ({**short, "attention_mask": mask}, {"packing": anyattn.Packing(offsets([5, 10]), rows=30)}):
        torch.testing.assert_close(ours(input_ids=ids, **said).logits[:1], want, **CLOSE)


@pytest.mark.parametrize("mask", [torch.ones(8), torch.ones(2, 8, 8), torch.ones(1, 8), torch.ones(3, 8)])
def test_masks_of_another_batch(mask):
    ours = build("llama", "anyattn")
    with pytest.raises(anyattn.ShapeError, match=r"for 2 batch entries, 2-D is \(2, keys\); got"):
        ours(input_ids=tokens(2, 8), attention_mask=mask.long())
    q = torch.zeros(2, 4, 6, 8)
    with pytest.raises(anyattn.ShapeError, match="2-D, 4-D or a BlockMask"):
        integration.attention_forward(ours.model.layers[0].self_attn, q, q, q, mask[..., :6].bool())


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_positions_count_where_the_mask_function_is_a_models_own(use_cache: bool, masked: bool) -> None:
    """A mask that only transformers can make is made by it; documents that positions tell apart stay apart in it."""
    from transformers import Gemma3TextConfig, Gemma3TextModel

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=4, use_bidirectional_attention=True,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = Gemma3TextModel(config).eval()
    model.set_attn_implementation("anyattn")
    ids = torch.randint(1, 64, (1, 12))
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    more = {"attention_mask": torch.ones_like(ids)} if masked else {}
    with torch.no_grad():
        alone = torch.cat([model(x).last_hidden_state for x in (ids[:, :5], ids[:, 5:])], 1)
        packed = model(ids, position_ids=positions, use_cache=use_cache, **more).last_hidden_state
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
