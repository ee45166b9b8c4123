"""transformers models through anyattn: logits, gradients and tokens as with eager, or as one document at a time."""

import copy
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing

import anyattn
from anyattn.integrations import transformers as integration

transformers = pytest.importorskip("transformers")

anyattn.integrations.transformers.register()

#: float32 through a few layers; the models' logits and gradients are of order one.
TOLERANCE = {"atol": 2e-5, "rtol": 2e-4}

COMMON = {
    "vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "mistral": lambda: transformers.MistralConfig(**COMMON, sliding_window=4),
    "gemma2": lambda: transformers.Gemma2Config(
        **COMMON, sliding_window=4, attn_logit_softcapping=5.0, query_pre_attn_scalar=16
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **COMMON, sliding_window=4, num_local_experts=2, num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}  # fmt: skip


def build(name, implementation="anyattn", **changes):
    """A tiny model; the same weights for every implementation."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():  # away from symmetric initial values, sinks included
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.float().eval()


@pytest.fixture(params=CONFIGS)
def models(request):
    """(through anyattn, through eager)"""
    ours = build(request.param)
    theirs = copy.deepcopy(ours)
    theirs.set_attn_implementation("eager")
    return ours, theirs


def tokens(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 61, shape, generator=generator)


def gradients(model, logits, rows):
    """Of a fixed function of the logits of some rows."""
    model.zero_grad()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * weights)[rows].sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found
    return found


def assert_same(ours, theirs, batch, rows=None):
    rows = torch.ones_like(batch["input_ids"], dtype=torch.bool) if rows is None else rows
    got, want = ours(**batch).logits, theirs(**batch).logits
    torch.testing.assert_close(got[rows], want[rows], **TOLERANCE)
    assert_gradients(gradients(ours, got, rows), gradients(theirs, want, rows))
    return got


def assert_gradients(got, want):
    assert got.keys() == want.keys()
    for name in want:
        scale = max(1.0, want[name].abs().max().item())
        torch.testing.assert_close(
            got[name] / scale, want[name] / scale, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- padding ---

MASKS = {
    "none": None,
    "ones": [[1] * 10] * 3,
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 10, [0] * 9 + [1]],
    "right": [[1, 1, 1, 1, 1, 1, 0, 0, 0, 0], [1] * 10, [1] + [0] * 9],
    "mixed": [[0, 1, 1, 1, 1, 1, 1, 0, 0, 0], [1] * 10, [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]],
    "holes": [[1, 1, 0, 1, 1, 0, 0, 1, 1, 1], [1] * 10, [0, 1, 1, 1, 0, 1, 1, 1, 1, 0]],
}


@pytest.mark.parametrize("kind", MASKS)
def test_mask_equals_eager(models, kind):
    ours, theirs = models
    batch = {"input_ids": tokens(3, 10)}
    rows = None
    if MASKS[kind] is not None:
        batch["attention_mask"] = torch.tensor(MASKS[kind])
        rows = batch["attention_mask"].bool()
    assert_same(ours, theirs, batch, rows)


@pytest.mark.parametrize("kind", ["left", "right", "holes"])
def test_padded_rows_are_zero(models, kind, monkeypatch):
    ours, _ = models
    seen = []
    real_forward = integration.attention

    def spy(*args, **kwargs):
        seen.append(real_forward(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(integration, "attention", spy)
    mask = torch.tensor(MASKS[kind])
    ours(input_ids=tokens(3, 10), attention_mask=mask)
    assert len(seen) == 2
    for out in seen:
        assert (out.reshape(3, 10, 4, 16)[~mask.bool()] == 0).all()


def test_user_4d_masks(models):
    ours, theirs = models
    ids = tokens(2, 9)
    visible = torch.ones(9, 9, dtype=torch.bool).tril() & (torch.rand(2, 1, 9, 9) > 0.3)
    visible |= torch.eye(9, dtype=torch.bool)
    additive = torch.zeros(2, 1, 9, 9).masked_fill(~visible, torch.finfo(torch.float32).min)
    want = theirs(input_ids=ids, attention_mask=additive).logits
    for mask in (visible, additive):
        torch.testing.assert_close(ours(input_ids=ids, attention_mask=mask).logits, want, **TOLERANCE)


# --- packing ---

LENGTHS = [5, 1, 9, 3]


def packed_batch():
    ids = tokens(1, sum(LENGTHS))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return ids, positions


def offsets(lengths=LENGTHS):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


PACKED = {
    "positions": {"use_cache": False},
    "positions, default use_cache": {},
    "positions, ones mask": {"attention_mask": "ones"},
    "positions of two rows": {"rows": 2},
    "cu_seq_lens": {"cu": "seq_lens", "position": False},
    "cu_seqlens": {"cu": "seqlens", "position": False},
    "cu_seq_lens and positions": {"cu": "seq_lens"},
    "packing": {"packing": True},
}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("spelling", PACKED)
def test_packed_equals_one_at_a_time(models, spelling, train):
    ours, theirs = models
    ours.train(train)
    theirs.train(train)
    options = dict(PACKED[spelling])
    ids, positions = packed_batch()
    batch = {"input_ids": ids}
    if options.pop("position", True):
        batch["position_ids"] = positions
    if options.pop("attention_mask", None):
        batch["attention_mask"] = torch.ones_like(ids)
    cu = options.pop("cu", None)
    if cu:
        longest = "max_length" if cu == "seq_lens" else "max_seqlen"
        batch |= {f"cu_{cu}_{x}": offsets() for x in "qk"} | {f"{longest}_{x}": max(LENGTHS) for x in "qk"}
    if options.pop("packing", False):
        batch["packing"] = anyattn.Packing.from_lengths(LENGTHS)
    if options.pop("rows", 1) == 2:
        batch = {"input_ids": ids.view(2, -1), "position_ids": positions.view(2, -1)}
    got = ours(**batch, **options).logits
    cuts = LENGTHS if got.shape[0] == 1 else [5, 1, 3, 6, 3]
    want = torch.cat([theirs(input_ids=x).logits for x in ids.split(cuts, 1)], 1)
    rows = torch.ones_like(ids, dtype=torch.bool)
    got = got.reshape(want.shape)
    if len(cuts) == 5:  # positions of the third document go on in the second row: a document there starts at 3
        want, got, rows = want[:, :9], got[:, :9], rows[:, :9]
    torch.testing.assert_close(got, want, **TOLERANCE)
    assert_gradients(gradients(ours, got, rows), gradients(theirs, want, rows))


def test_packed_with_padding_between(models):
    """A Packing with room after each document; padding holds any tokens."""
    ours, theirs = models
    packing = anyattn.Packing.from_lengths(LENGTHS, pad_to_multiple_of=4)
    ids = tokens(1, packing.rows)
    positions = torch.cat([torch.arange(-(-n // 4) * 4) for n in LENGTHS])[None]
    got = ours(input_ids=ids, position_ids=positions, packing=packing).logits[0]
    want = torch.cat([theirs(input_ids=x[None]).logits[0] for x in packing.pack(ids[0]).split(LENGTHS)])
    torch.testing.assert_close(packing.pack(got), want, **TOLERANCE)


def test_packed_rows_with_padded_tails(models):
    """Several documents per row and a 2-D mask: transformers' own implementations leak here."""
    ours, theirs = models
    ids = tokens(2, 12)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 0], [0, 1, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0]])
    mask = torch.tensor([[1] * 10 + [0] * 2, [1] * 5 + [0] * 7])
    got = ours(input_ids=ids, position_ids=positions, attention_mask=mask).logits
    for row, start, end in [(0, 0, 4), (0, 4, 10), (1, 0, 2), (1, 2, 5)]:
        want = theirs(input_ids=ids[row : row + 1, start:end]).logits[0]
        torch.testing.assert_close(got[row, start:end], want, **TOLERANCE)


def test_positions_from_an_offset_pack_too():
    ours = build("llama")
    ids = tokens(1, 8)
    positions = torch.tensor([[2, 3, 4, 2, 3, 4, 5, 6]])
    got = ours(input_ids=ids, position_ids=positions).logits
    want = torch.cat([ours(input_ids=x).logits for x in ids.split([3, 5], 1)], 1)
    torch.testing.assert_close(got, want, **TOLERANCE)


def test_positions_written_to_in_place_are_read_again():
    ours = build("llama")
    ids = tokens(1, 8)
    positions = torch.arange(8)[None]
    whole = ours(input_ids=ids, position_ids=positions).logits
    positions.copy_(torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]))
    packed = ours(input_ids=ids, position_ids=positions).logits
    assert not torch.allclose(whole[:, 5:], packed[:, 5:])
    with torch.inference_mode():
        positions = torch.arange(8)[None]
        ours(input_ids=ids, position_ids=positions)
        positions.copy_(torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]))
        torch.testing.assert_close(ours(input_ids=ids, position_ids=positions).logits, packed, **TOLERANCE)


def test_what_disagrees_is_an_error():
    ours = build("llama")
    ids, positions = packed_batch()
    wrong = offsets([6, 0, 9, 3])
    cu = {"cu_seq_lens_q": wrong, "cu_seq_lens_k": wrong, "max_length_q": 9, "max_length_k": 9}
    with pytest.raises(anyattn.PackingError, match=r"position_ids .* disagree .* first at row 5 of entry 0"):
        ours(input_ids=ids, position_ids=positions, **cu)
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    with pytest.raises(anyattn.PackingError, match="the attention mask calls 16 tokens real"):
        ours(input_ids=ids, attention_mask=mask, **cu)
    with pytest.raises(anyattn.PackingError, match="two ways to say one thing"):
        ours(input_ids=ids, packing=anyattn.Packing.from_lengths(LENGTHS), **cu)
    with pytest.raises(anyattn.PackingError, match="max_seqlen is 4"):
        ours(input_ids=ids, **(cu | {"max_length_q": 4}))
    with pytest.raises(anyattn.PackingError, match="4-D attention mask says all"):
        ours(input_ids=ids, attention_mask=torch.ones(1, 1, 18, 18, dtype=torch.bool), **cu)


def test_a_tail_after_the_last_document_is_padding():
    ours = build("llama")
    ids = tokens(1, 10)
    mask = torch.tensor([[1] * 8 + [0] * 2])
    got = ours(input_ids=ids, attention_mask=mask, cu_seq_lens_q=offsets([3, 5]), cu_seq_lens_k=offsets([3, 5])).logits
    want = torch.cat([ours(input_ids=x).logits for x in ids[:, :8].split([3, 5], 1)], 1)
    torch.testing.assert_close(got[:, :8], want, **TOLERANCE)


def test_layers_work_nothing_out_again(monkeypatch):
    """One forward, one look at mask and positions, however many layers there are."""
    ours = build("llama", num_hidden_layers=4)
    calls = []
    for name in ("documents_of", "lay_out", "from_offsets"):
        real = getattr(integration, name)
        monkeypatch.setattr(integration, name, lambda *a, real=real, **k: calls.append(1) or real(*a, **k))
    ids, positions = packed_batch()
    ours(input_ids=ids, position_ids=positions.clone(), use_cache=True)
    assert len(calls) == 2
    calls.clear()
    ours(input_ids=ids, cu_seq_lens_q=(cu := offsets()), cu_seq_lens_k=cu)
    assert len(calls) <= 2
    calls.clear()
    ours(input_ids=tokens(3, 10), attention_mask=torch.tensor(MASKS["left"]), position_ids=None)
    assert len(calls) <= 2
    before = len(integration._memory)
    del positions, cu
    assert len(integration._memory) <= before


# --- generation ---


def generate(model, ids, mask, cache, **options):
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, cache_implementation=cache,
        disable_compile=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_generate_token_for_token(models, cache, padding):
    ours, theirs = models
    ids = tokens(3, 10, seed=3)
    mask = torch.ones_like(ids)
    if padding == "left":
        mask = torch.tensor(MASKS["left"])
        ids = ids.masked_fill(mask == 0, 0)
    assert torch.equal(generate(ours, ids, mask, cache), generate(theirs, ids, mask, None))


def test_generate_with_beams(models):
    ours, theirs = models
    ids, mask = tokens(2, 6, seed=4), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    assert torch.equal(generate(ours, ids, mask, None, num_beams=3), generate(theirs, ids, mask, None, num_beams=3))


def test_chunked_prefill(models):
    """New tokens after cached ones, left-padded."""
    ours, theirs = models
    ids = tokens(3, 14, seed=5)
    mask = torch.cat([torch.tensor(MASKS["left"]), torch.ones(3, 4, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = []
    for model in (ours, theirs):
        first = model(input_ids=ids[:, :9], attention_mask=mask[:, :9], position_ids=positions[:, :9], use_cache=True)
        second = model(
            input_ids=ids[:, 9:], attention_mask=mask, position_ids=positions[:, 9:],
            past_key_values=first.past_key_values,
        )  # fmt: skip
        logits.append(torch.cat([first.logits, second.logits], 1))
    torch.testing.assert_close(logits[0][mask.bool()], logits[1][mask.bool()], **TOLERANCE)


def test_packed_positions_after_cached_tokens_are_refused():
    ours = build("llama")
    cache = ours(input_ids=tokens(1, 6), use_cache=True).past_key_values
    with pytest.raises(anyattn.PackingError, match="restart among 4 new tokens after 6 cached"):
        ours(input_ids=tokens(1, 4), position_ids=torch.tensor([[6, 7, 0, 1]]), past_key_values=cache)


# --- the attention function itself ---


class Layer(torch.nn.Module):
    def __init__(self, is_causal):
        super().__init__()
        self.is_causal = is_causal


def call(q, k, v, mask=None, is_causal=False, **options):
    return integration.attention_forward(Layer(is_causal), q, k, v, mask, scaling=0.25, **options)[0]


def qkv(queries=6, keys=6, batch=2):
    torch.manual_seed(0)
    return (
        torch.randn(batch, 4, queries, 16),
        torch.randn(batch, 2, keys, 16),
        torch.randn(batch, 2, keys, 16),
    )


def expected(q, k, v, visible, bias=0.0):
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3) * 0.25 + bias).masked_fill(~visible, float("-inf"))
    return (torch.softmax(scores, -1).nan_to_num(0.0) @ v).transpose(1, 2)


def test_cross_attention_with_padded_keys():
    """Also where queries are as many as keys: they are another sequence, and none of them is padding."""
    for queries in (3, 6):
        q, k, v = qkv(queries, 6)
        for rows in ([[1, 1, 1, 1, 0, 0], [1] * 6], [[1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 1, 1]]):
            mask = torch.tensor(rows).bool()
            want = expected(q, k, v, mask[:, None, None])
            torch.testing.assert_close(call(q, k, v, mask), want, **TOLERANCE)


def test_is_causal_of_the_call_wins_over_the_module():
    q, k, v = qkv()
    lower = torch.ones(6, 6, dtype=torch.bool).tril()
    torch.testing.assert_close(call(q, k, v, is_causal=False), expected(q, k, v, torch.ones_like(lower)), **TOLERANCE)
    torch.testing.assert_close(call(q, k, v, is_causal=True), expected(q, k, v, lower), **TOLERANCE)
    out = integration.attention_forward(Layer(True), q, k, v, None, scaling=0.25, is_causal=False)[0]
    torch.testing.assert_close(out, expected(q, k, v, torch.ones_like(lower)), **TOLERANCE)


@pytest.mark.parametrize("causal", [True, False])
def test_window_counts_the_query_itself(causal):
    q, k, v = qkv()
    distance = torch.arange(6)[:, None] - torch.arange(6)
    visible = (distance.abs() < 3) & ((distance >= 0) | (not causal))
    for mask in (None, torch.ones(2, 6).bool()):
        got = call(q, k, v, mask, is_causal=causal, sliding_window=3)
        torch.testing.assert_close(got, expected(q, k, v, visible), **TOLERANCE)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]).bool()
    got = call(q, k, v, mask, is_causal=causal, sliding_window=3)
    want = expected(q, k, v, visible & mask[:, None, None])
    torch.testing.assert_close(got[mask], want[mask], **TOLERANCE)


@pytest.mark.parametrize("kind", ["none", "left", "holes", "4-D"])
def test_position_bias_is_added(kind):
    q, k, v = qkv()
    bias = torch.randn(1, 4, 6, 6, requires_grad=True)
    lower = torch.ones(6, 6, dtype=torch.bool).tril()
    mask = {
        "none": None,
        "left": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]).bool(),
        "holes": torch.tensor([[1, 0, 0, 1, 1, 1], [1] * 6]).bool(),
        "4-D": lower[None, None].expand(2, 1, 6, 6),
    }[kind]
    visible = lower if kind in ("none", "4-D") else lower & mask[:, None, None] & mask[:, None, :, None]
    got = call(q, k, v, mask, is_causal=True, position_bias=bias)
    want = expected(q, k, v, visible, bias)
    torch.testing.assert_close(got, want, **TOLERANCE)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), bias)[0], torch.autograd.grad(want.sum(), bias)[0], **TOLERANCE
    )


def test_keys_of_another_length_than_queries_by_offsets():
    q, k, v = qkv(6, 9, batch=1)
    lengths_k = [4, 5]
    got = call(q, k, v, cu_seq_lens_q=offsets([2, 4]), cu_seq_lens_k=offsets(lengths_k))
    document_q, document_k = (torch.repeat_interleave(torch.tensor(n)) for n in ([2, 4], lengths_k))
    torch.testing.assert_close(got, expected(q, k, v, document_q[:, None] == document_k), **TOLERANCE)


def test_dropout_is_not_dropped():
    q, k, v = qkv()
    torch.manual_seed(1)
    assert not torch.allclose(call(q, k, v, dropout=0.5), call(q, k, v))


def test_a_mask_that_lost_its_facts_still_counts():
    """As after a move to another device, static cache included."""
    ours = build("mistral")
    keep = integration.facts_of
    ids, mask = tokens(3, 10), torch.tensor(MASKS["left"])
    want = generate(ours, ids, mask, "static")
    integration.facts_of = lambda mask: None
    try:
        assert torch.equal(generate(ours, ids, mask, "static"), want)
    finally:
        integration.facts_of = keep


def test_what_cannot_be_honoured_is_refused():
    q, k, v = qkv()
    with pytest.raises(anyattn.Unsupported, match="continuous batching"):
        call(q, k, v, cache=object())
    with pytest.raises(anyattn.InvalidArgument, match="sliding_window must be at least 1"):
        call(q, k, v, sliding_window=0)
    with pytest.raises(anyattn.ShapeError, match="2-D, 4-D or a BlockMask"):
        call(q, k, v, torch.ones(2, 6, 6).bool())
    with pytest.raises(anyattn.DtypeError, match="2-D attention_mask must be bool"):
        call(q, k, v, torch.ones(2, 6))
    assert call(q, k, v, something_else=1).shape == (2, 6, 4, 16)


# --- other models ---


def test_bert_padded():
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    ours = transformers.BertModel._from_config(config, attn_implementation="anyattn").eval()
    theirs = copy.deepcopy(ours)
    theirs.set_attn_implementation("eager")
    for kind in ("none", "left", "right", "holes"):
        mask = None if kind == "none" else torch.tensor(MASKS[kind])
        rows = torch.ones(3, 10, dtype=torch.bool) if mask is None else mask.bool()
        got, want = (m(input_ids=tokens(3, 10), attention_mask=mask).last_hidden_state for m in (ours, theirs))
        torch.testing.assert_close(got[rows], want[rows], **TOLERANCE)


def test_bart_cross_attention():
    config = transformers.BartConfig(
        vocab_size=61, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    ours = transformers.BartForConditionalGeneration._from_config(config, attn_implementation="anyattn").eval()
    theirs = copy.deepcopy(ours)
    theirs.set_attn_implementation("eager")
    mask = torch.tensor(MASKS["right"])
    batch = {"input_ids": tokens(3, 10), "attention_mask": mask}
    for decoder in (tokens(3, 10, seed=1), tokens(3, 7, seed=1)):
        got, want = (m(**batch, decoder_input_ids=decoder).logits for m in (ours, theirs))
        torch.testing.assert_close(got, want, **TOLERANCE)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 1}
    assert torch.equal(ours.generate(**batch, **options), theirs.generate(**batch, **options))


def test_chunked_attention_of_llama4():
    config = transformers.Llama4TextConfig(
        **{k: v for k, v in COMMON.items() if k != "head_dim"}, head_dim=16, attention_chunk_size=4,
        num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=96, no_rope_layers=[1, 0],
        attn_temperature_tuning=False,
    )  # fmt: skip
    torch.manual_seed(0)
    ours = transformers.Llama4ForCausalLM._from_config(config, attn_implementation="anyattn").eval()
    theirs = copy.deepcopy(ours)
    theirs.set_attn_implementation("eager")
    for kind in ("none", "left"):
        mask = None if kind == "none" else torch.tensor(MASKS[kind])
        rows = torch.ones(3, 10, dtype=torch.bool) if mask is None else mask.bool()
        got, want = (m(input_ids=tokens(3, 10), attention_mask=mask).logits for m in (ours, theirs))
        torch.testing.assert_close(got[rows], want[rows], **TOLERANCE)


def test_gradient_checkpointing():
    ours = build("mistral")
    ids, mask = tokens(3, 10), torch.tensor(MASKS["left"])
    want = gradients(ours, ours(input_ids=ids, attention_mask=mask).logits, mask.bool())
    ours.train()
    enable = getattr(ours, "activation_checkpointing_enable", None) or ours.gradient_checkpointing_enable
    enable()
    got = gradients(ours, ours(input_ids=ids, attention_mask=mask, use_cache=False).logits, mask.bool())
    assert_gradients(got, want)


# --- torch.compile ---


@pytest.mark.parametrize(
    ("name", "how"),
    [
        (name, how)
        for name in ("llama", "mistral", "gemma2")
        for how in ("packing", "cu_seq_lens", "positions", "padded")
    ]
    + [("gpt_oss", "positions")],
)
def test_compiled(name, how):
    ours = build(name)
    ids, positions = packed_batch()
    batch = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    if how == "packing":
        batch["packing"] = anyattn.Packing.from_lengths(LENGTHS)
    elif how == "cu_seq_lens":
        batch |= {"cu_seq_lens_q": offsets(), "cu_seq_lens_k": offsets(), "max_length_q": 9, "max_length_k": 9}
    elif how == "padded":
        batch = {"input_ids": tokens(3, 10), "attention_mask": torch.tensor(MASKS["left"]), "use_cache": False}
    rows = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    want = ours(**batch).logits
    want_gradients = gradients(ours, want, rows)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(name != "gpt_oss"):  # the backward of its experts does not trace in transformers 5.17
        got = compiled(**batch).logits
    torch.testing.assert_close(got[rows], want[rows], **TOLERANCE)
    if got.requires_grad:
        assert_gradients(gradients(ours, got, rows), want_gradients)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_generate_with_a_compiled_model(name):
    ours, theirs = build(name), build(name, "eager")
    mask = torch.tensor(MASKS["left"])
    ids = tokens(3, 10, seed=3).masked_fill(mask == 0, 0)
    torch._dynamo.reset()
    ours.forward = torch.compile(ours.forward, backend="eager", fullgraph=True)
    assert torch.equal(generate(ours, ids, mask, "static"), generate(theirs, ids, mask, None))


def test_packings_of_many_batches_recompile_nothing():
    ours = build("llama")
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(ours, backend=counter, fullgraph=True)
    torch._dynamo.reset()
    with torch.no_grad():
        for lengths in ([5, 1, 9, 3], [6, 3, 9], [2, 2, 2, 3], [10, 4], [7, 8, 1, 1, 1], [4, 30]):
            packing = anyattn.Packing.from_lengths(lengths)
            batch = {"input_ids": tokens(1, sum(lengths)), "packing": packing, "use_cache": False}
            torch.testing.assert_close(compiled(**batch).logits, ours(**batch).logits, **TOLERANCE)
            if lengths == [2, 2, 2, 3]:
                warm = counter.frame_count
    assert counter.frame_count == warm


# --- registering ---


@pytest.mark.parametrize("name", ["my_flash", "org/kernel", "sdpa2", "paged|x", ""])
def test_names_that_transformers_would_misread(name):
    with pytest.raises(anyattn.InvalidArgument, match="name must be non-empty and not contain"):
        integration.register(name)


BLOCKED = """
import sys
sys.modules["transformers"] = None
import anyattn
try:
    anyattn.integrations.transformers.register()
except anyattn.MissingExtra as error:
    print(error)
"""


def test_without_transformers():
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=True)
    assert done.stdout == (
        "anyattn.integrations.transformers needs what is not installed here, transformers: "
        "pip install 'anyattn[transformers]'\n"
    )


def test_import_leaves_transformers_alone():
    code = "import sys, anyattn; anyattn.integrations.transformers; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
