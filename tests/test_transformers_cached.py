"""Caches that a packed batch filled: what continues one document, and what would see all and is refused."""

import copy

import pytest
import torch

import anyattn
from anyattn.integrations import _transformers_cached as cached
from transformers_cases import offsets, tokens
from transformers_judge import CLOSE
from transformers_models import build, transformers

pytestmark = pytest.mark.usefixtures("registered")

LENGTHS = [9, 6]
SEVERAL = "cache holds keys of several documents"


def filled(model, positions=None, cache=None, rows=1, **more):
    """Tokens of two documents, and a cache with their keys."""
    ids = tokens(rows, sum(LENGTHS))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None] if positions is None else positions
    with torch.no_grad():
        out = model(input_ids=ids, position_ids=positions, use_cache=True, past_key_values=cache, **more)
    return ids, out.past_key_values


def step(model, cache, position=6, token=7, **more):
    """Logits of one more token."""
    with torch.no_grad():
        ids = torch.tensor([[token]])
        return model(input_ids=ids, position_ids=torch.tensor([[position]]), past_key_values=cache, **more).logits[
            :, -1
        ]


def static(model):
    return transformers.StaticCache(config=model.config, max_cache_len=32)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_what_would_see_all_documents_is_refused(name, kind):
    model = build(name, "anyattn")
    _, cache = filled(model, cache=static(model) if kind == "static" else None)
    for mask in (None, torch.ones(1, 16, dtype=torch.long)):
        with pytest.raises(anyattn.PackingError, match=SEVERAL):
            step(model, copy.deepcopy(cache), attention_mask=mask)


def test_generate_from_packed_documents_is_refused():
    model = build("llama", "anyattn")
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    with pytest.raises(anyattn.PackingError, match=SEVERAL):
        model.generate(tokens(1, 15), position_ids=positions, max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_mask_says_which_document_goes_on(kind):
    model = build("llama", "anyattn")
    ids, cache = filled(model, cache=static(model) if kind == "static" else None)
    hidden = torch.tensor([[0] * 9 + [1] * 7])
    last = torch.cat([ids[:, 9:], torch.tensor([[7]])], 1)
    want = model(input_ids=last).logits[:, -1]
    torch.testing.assert_close(step(model, copy.deepcopy(cache), attention_mask=hidden), want, **CLOSE)
    if kind == "dynamic":
        whole = hidden.bool()[:, None, None]
        torch.testing.assert_close(step(model, copy.deepcopy(cache), attention_mask=whole), want, **CLOSE)
        given = {"cu_seq_lens_q": offsets([0, 1]), "cu_seq_lens_k": offsets([9, 7])}
        torch.testing.assert_close(step(model, copy.deepcopy(cache), **given), want, **CLOSE)
    step(model, cache, attention_mask=hidden)
    with pytest.raises(anyattn.PackingError, match=SEVERAL):  # and later ones need it too
        step(model, cache, 7)


def test_a_cache_that_was_cut_to_one_document():
    model = build("llama", "anyattn")
    ids, cache = filled(model)
    cache.crop(-6)
    for n in range(3):  # also past where the next document began
        got = step(model, cache, 9 + n)
        want = model(input_ids=torch.cat([ids[:, :9], torch.full((1, n + 1), 7)], 1)).logits[:, -1]
        torch.testing.assert_close(got, want, **CLOSE)


def test_a_window_that_sees_one_document():
    """Keys that no layer sees are no document's; a sliding cache has dropped them."""
    config = transformers.MistralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, pad_token_id=0,
    )  # fmt: skip
    model = transformers.MistralForCausalLM._from_config(config, attn_implementation="anyattn").eval()
    ids, cache = filled(model)
    want = model(input_ids=torch.cat([ids[:, 9:], torch.tensor([[7]])], 1)).logits[:, -1]
    torch.testing.assert_close(step(model, cache), want, **CLOSE)


@pytest.mark.parametrize("start", [0, 2])
def test_other_caches_are_nothing_to_it(start):
    """One document, wherever its positions start, left padding, and a static cache that is filled anew."""
    model = build("llama", "anyattn")
    _, cache = filled(model, positions=torch.arange(15)[None] + start)
    assert cached.documents_in(cache) is None
    assert step(model, cache, 3).shape[0] == 1  # as in models whose positions count less than tokens
    mask = torch.tensor([[0] * 4 + [1] * 11])
    _, cache = filled(model, positions=(mask.cumsum(1) - 1).masked_fill(mask == 0, 1), attention_mask=mask)
    assert cached.documents_in(cache) is None
    step(model, cache, 11, attention_mask=torch.nn.functional.pad(mask, (0, 1), value=1))
    again = static(model)
    filled(model, cache=again)
    assert cached.documents_in(again) is not None
    again.reset()
    filled(model, positions=torch.arange(15)[None], cache=again)
    assert cached.documents_in(again) is None
    step(model, again, 15)


def test_rows_of_a_padded_batch():
    """What is hidden by the mask counts in its own row only."""
    documents = torch.tensor([[0] * 9 + [1] * 6, [0] * 15])
    holder = type("Cache", (), {})()
    cached.note_documents(holder, documents)
    at = cached.Step(15, 0, None)
    real = torch.ones(2, 15, dtype=torch.bool)
    assert cached.sees_several(holder, 2, at, None)
    assert cached.sees_several(holder, 2, at, real)
    real[0, :9] = False
    assert not cached.sees_several(holder, 2, at, real)
    real[0] = False
    assert not cached.sees_several(holder, 2, at, real)
    assert cached.sees_several(holder, 3, at, None)  # rows were chosen or repeated
    assert not cached.sees_several(holder, 3, at, torch.ones(3, 15, dtype=torch.bool))
    assert not cached.sees_several(holder, 2, cached.Step(17, 0, 6), None)
    assert cached.sees_several(holder, 2, cached.Step(17, 0, 9), None)
    assert not cached.sees_several(holder, 2, cached.Step(17, 12, None), None)
    assert cached.documents_in(None) is None


def test_nothing_keeps_a_cache_alive():
    holder = type("Cache", (), {})()
    cached.give(holder)
    assert cached.take() is holder
    assert cached.take() is None
    cached.give(holder)
    del holder
    assert cached.take() is None
    cached.give(())  # no weak references
    assert cached.take() is None


@pytest.mark.parametrize("refilled", ["by a mask of its own", "by another implementation"])
def test_a_note_does_not_outlive_what_the_cache_held(refilled):
    """A static cache that is reset and filled with one document is one like any other."""
    model = build("llama", "anyattn")
    _, cache = filled(model, cache=static(model))
    assert cached.documents_in(cache) is not None
    cache.reset()
    with torch.no_grad():
        if refilled == "by a mask of its own":
            seen = torch.ones(9, 32, dtype=torch.bool).tril()[None, None]
            model(input_ids=tokens(1, 9), attention_mask=seen, past_key_values=cache, use_cache=True)
        else:
            model.set_attn_implementation("sdpa")
            model(input_ids=tokens(1, 9), past_key_values=cache, use_cache=True)
            model.set_attn_implementation("anyattn")
    assert cached.documents_in(cache) is None
    found = step(model, cache, position=9)
    with torch.no_grad():
        whole = model(input_ids=torch.cat([tokens(1, 9), torch.tensor([[7]])], 1), use_cache=False).logits[:, -1]
    torch.testing.assert_close(found, whole, **CLOSE)


def test_a_cache_that_is_cut_to_one_document_goes_on():
    model = build("llama", "anyattn")
    _, cache = filled(model)
    cache.crop(-LENGTHS[1])
    seen = torch.ones(3, 12, dtype=torch.bool).tril(9)[None, None]
    with torch.no_grad():
        model(
            input_ids=tokens(1, 3), attention_mask=seen, past_key_values=cache, position_ids=torch.tensor([[9, 10, 11]])
        )
    step(model, cache, position=12)
