"""How the integration behaves beyond the table of cases: what is refused, what is remembered, what is zero."""

import copy

import pytest
import torch

import anyattn
from anyattn.integrations import _transformers_call as integration
from anyattn.integrations import _transformers_masks as masks
from anyattn.integrations import _transformers_memory as memory
from anyattn.integrations import _transformers_said as said
from transformers_cases import HOLES, LENGTHS, offsets, tokens
from transformers_cases import MASKS as PADDED
from transformers_generation import NEW
from transformers_judge import CLOSE
from transformers_models import build as build_tiny
from transformers_models import transformers

MASKS = {**PADDED, "holes": HOLES}


pytestmark = pytest.mark.usefixtures("registered")


def build(name, implementation="anyattn"):
    return build_tiny(name, implementation)


@pytest.fixture(params=["llama", "mistral", "gemma2", "gpt_oss", "llama4"])
def models(request):
    """(through anyattn, through eager)"""
    ours = build(request.param)
    theirs = copy.deepcopy(ours)
    theirs.set_attn_implementation("eager")
    return ours, theirs


# --- padding ---


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
        assert (out.reshape(3, 10, 4, 8)[~mask.bool()] == 0).all()


# --- packing ---


def packed_batch():
    ids = tokens(1, sum(LENGTHS))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return ids, positions


def test_packed_with_padding_between(models):
    """A Packing with room after each document; padding holds any tokens."""
    ours, theirs = models
    packing = anyattn.Packing.from_lengths(LENGTHS, pad_to_multiple_of=4)
    ids = tokens(1, packing.rows)
    positions = torch.cat([torch.arange(-(-n // 4) * 4) for n in LENGTHS])[None]
    got = ours(input_ids=ids, position_ids=positions, packing=packing).logits[0]
    want = torch.cat([theirs(input_ids=x[None]).logits[0] for x in packing.pack(ids[0]).split(LENGTHS)])
    torch.testing.assert_close(packing.pack(got), want, **CLOSE)


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
        torch.testing.assert_close(ours(input_ids=ids, position_ids=positions).logits, packed, **CLOSE)


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
    torch.testing.assert_close(got[:, :8], want, **CLOSE)


@pytest.fixture
def work(monkeypatch):
    """The names of what is worked out, as it happens."""
    calls = []
    for module, name in (
        (memory, "documents_of"), (masks, "lay_out"), (integration, "lay_out"), (said, "lay_out"),
        (integration, "from_offsets"),
    ):  # fmt: skip
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name, **k: calls.append(name) or real(*a, **k))
    return calls


@pytest.mark.parametrize("inference", [False, True], ids=["grad", "inference_mode"])
def test_layers_work_nothing_out_again(work, inference):
    """One forward, one look at mask, positions and offsets, however many layers there are."""
    ours = build("llama")
    ours.model.layers.extend(copy.deepcopy(ours.model.layers))
    for i, layer in enumerate(ours.model.layers):
        layer.self_attn.layer_idx = i
    ours.config.num_hidden_layers = 4
    assert len(ours.model.layers) == 4
    for forward in range(2):
        with torch.inference_mode(inference):
            ids, positions = packed_batch()
            ours(input_ids=ids, position_ids=positions, use_cache=True)
            assert sorted(work) == ["documents_of", "lay_out"], forward
            work.clear()
            cu = offsets()
            ours(input_ids=ids, cu_seq_lens_q=cu, cu_seq_lens_k=cu)
            assert work.count("from_offsets") == 1, forward
            work.clear()
            ours(input_ids=tokens(3, 10), attention_mask=torch.tensor(MASKS["left"]))
            assert sorted(work) == ["documents_of", "lay_out"], forward
            work.clear()
    before = len(memory.memory)
    del positions, cu
    assert len(memory.memory) < before


def test_offsets_of_keys_that_are_written_to_are_read_again():
    q, k, v = qkv(6, 9, batch=1)
    of_queries, of_keys = offsets([2, 4]), offsets([4, 5])
    for lengths in ([4, 5], [3, 6]):
        of_keys.copy_(offsets(lengths))
        got = call(q, k, v, cu_seq_lens_q=of_queries, cu_seq_lens_k=of_keys)
        document_q, document_k = (torch.repeat_interleave(torch.tensor(n)) for n in ([2, 4], lengths))
        torch.testing.assert_close(got, expected(q, k, v, document_q[:, None] == document_k), **CLOSE)


# --- generation ---


def generate(model, ids, mask, cache, **options):
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, cache_implementation=cache,
        disable_compile=True, **options,
    )  # fmt: skip


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
            torch.testing.assert_close(call(q, k, v, mask), want, **CLOSE)


def test_is_causal_of_the_call_wins_over_the_module():
    q, k, v = qkv()
    lower = torch.ones(6, 6, dtype=torch.bool).tril()
    torch.testing.assert_close(call(q, k, v, is_causal=False), expected(q, k, v, torch.ones_like(lower)), **CLOSE)
    torch.testing.assert_close(call(q, k, v, is_causal=True), expected(q, k, v, lower), **CLOSE)
    out = integration.attention_forward(Layer(True), q, k, v, None, scaling=0.25, is_causal=False)[0]
    torch.testing.assert_close(out, expected(q, k, v, torch.ones_like(lower)), **CLOSE)


@pytest.mark.parametrize("causal", [True, False])
def test_window_counts_the_query_itself(causal):
    q, k, v = qkv()
    distance = torch.arange(6)[:, None] - torch.arange(6)
    visible = (distance.abs() < 3) & ((distance >= 0) | (not causal))
    for mask in (None, torch.ones(2, 6).bool()):
        got = call(q, k, v, mask, is_causal=causal, sliding_window=3)
        torch.testing.assert_close(got, expected(q, k, v, visible), **CLOSE)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]).bool()
    got = call(q, k, v, mask, is_causal=causal, sliding_window=3)
    want = expected(q, k, v, visible & mask[:, None, None])
    torch.testing.assert_close(got[mask], want[mask], **CLOSE)


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
    torch.testing.assert_close(got, want, **CLOSE)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), bias)[0], torch.autograd.grad(want.sum(), bias)[0], **CLOSE
    )


def test_keys_of_another_length_than_queries_by_offsets():
    q, k, v = qkv(6, 9, batch=1)
    lengths_k = [4, 5]
    got = call(q, k, v, cu_seq_lens_q=offsets([2, 4]), cu_seq_lens_k=offsets(lengths_k))
    document_q, document_k = (torch.repeat_interleave(torch.tensor(n)) for n in ([2, 4], lengths_k))
    torch.testing.assert_close(got, expected(q, k, v, document_q[:, None] == document_k), **CLOSE)


def test_dropout_keeps_the_mean():
    q, k, v = qkv()
    want = call(q, k, v)
    torch.manual_seed(1)
    drawn = torch.stack([call(q, k, v, dropout=0.5) for _ in range(400)])
    assert not torch.allclose(drawn[0], want)
    error = drawn.std(0) / 400**0.5
    assert ((drawn.mean(0) - want).abs() <= 5 * error + 1e-6).all()


def test_dropout_of_a_model_in_training():
    """The configuration's, drawn anew each time, the same with the same seed; none in evaluation."""
    ours = build("llama")
    ids = tokens(2, 8)
    want = ours(input_ids=ids).logits
    for layer in ours.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert torch.equal(ours(input_ids=ids).logits, want)
    ours.train()

    def drawn(seed):
        torch.manual_seed(seed)
        return ours(input_ids=ids).logits

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.allclose(drawn(1), drawn(2))
    assert not torch.allclose(drawn(1), want)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_autocast(name):
    """bfloat16 autocast of float32 weights: as near to float32 as eager's."""
    ours, theirs = build(name), build(name, "eager")
    mask = torch.tensor(MASKS["left"])
    ids, rows = tokens(3, 10), mask.bool()
    exact = theirs(input_ids=ids, attention_mask=mask).logits[rows].detach()
    with torch.autocast("cpu", torch.bfloat16):
        got, eager = (m(input_ids=ids, attention_mask=mask).logits[rows].detach().float() for m in (ours, theirs))
        ours(input_ids=ids, attention_mask=mask).logits.float().sum().backward()
    band = torch.finfo(torch.bfloat16).eps * float(exact.abs().max())
    assert float((got - exact).abs().max()) <= 2 * float((eager - exact).abs().max()) + band
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["mistral", "llama4"])
@pytest.mark.parametrize("kind", ["left", "mixed", "right"])
def test_a_mask_that_lost_its_facts_still_counts(name, kind, monkeypatch):
    """As after a move to another device; windows and chunks too."""
    ours = build(name)
    ids, mask = tokens(3, 10), torch.tensor(MASKS[kind])
    want = ours(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    monkeypatch.setattr(said, "facts_of", lambda mask: None)
    torch.testing.assert_close(ours(input_ids=ids, attention_mask=mask).logits[mask.bool()], want, **CLOSE)


@pytest.mark.parametrize("name", ["mistral", "llama4"])
def test_a_mask_that_lost_its_facts_still_counts_in_generation(name, monkeypatch):
    if name == "llama4" and transformers.__version__ < "5.20":
        pytest.skip("transformers' own mask functions crash here")
    ours = build(name)
    ids, mask = tokens(3, 10), torch.tensor(MASKS["left"])
    want = [generate(ours, ids, mask, cache) for cache in (None, "static")]
    monkeypatch.setattr(said, "facts_of", lambda mask: None)
    assert all(torch.equal(generate(ours, ids, mask, c), w) for c, w in zip((None, "static"), want, strict=True))


def test_chunks_need_lengths():
    ours = build("llama4")
    ids, _ = packed_batch()
    unknown = anyattn.Packing(offsets(), max_seqlen=9, rows=18, check=False)
    with pytest.raises(anyattn.Unsupported, match="chunked attention needs a packing whose lengths the host knows"):
        ours(input_ids=ids, packing=unknown)


def test_positions_that_only_the_mask_function_is_told_are_checked():
    """Llama 4 hands positions to no layer: they disagree in the mask function's name."""
    ours = build("llama4")
    ids, positions = packed_batch()
    with pytest.raises(anyattn.PackingError, match="disagree about where documents start"):
        ours(input_ids=ids, position_ids=positions, packing=anyattn.Packing.from_lengths([6, 0, 9, 3]))
    cache = ours(input_ids=tokens(1, 6), use_cache=True).past_key_values
    with pytest.raises(anyattn.PackingError, match="restart among 4 new tokens after 6 cached"):
        ours(input_ids=tokens(1, 4), position_ids=torch.tensor([[6, 7, 0, 1]]), past_key_values=cache)


def test_what_cannot_be_honoured_is_refused():
    q, k, v = qkv()
    with pytest.raises(anyattn.Unsupported, match="continuous batching"):
        call(q, k, v, cache=object())
    with pytest.raises(anyattn.Unsupported, match=r"a position_bias .* several documents per row: pad instead"):
        call(q, k, v, position_bias=torch.zeros(1, 4, 6, 6), cu_seq_lens_q=offsets([4, 8]))
    with pytest.raises(anyattn.Unsupported, match=r"output_attentions.*set_attn_implementation\('eager'\)"):
        build("llama")(input_ids=tokens(1, 4), output_attentions=True)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0,
        output_attentions=True,
    )  # fmt: skip
    asking = transformers.LlamaForCausalLM._from_config(config, attn_implementation="anyattn")
    with pytest.raises(anyattn.Unsupported, match="output_attentions=False"):
        asking(input_ids=tokens(1, 4))
    assert asking(input_ids=tokens(1, 4), output_attentions=False).attentions is None
    with pytest.raises(anyattn.InvalidArgument, match="sliding_window must be at least 1"):
        call(q, k, v, sliding_window=0)
    with pytest.raises(anyattn.ShapeError, match="2-D, 4-D or a BlockMask"):
        call(q, k, v, torch.ones(2, 6, 6).bool())
    with pytest.raises(anyattn.DtypeError, match="2-D attention_mask must be bool"):
        call(q, k, v, torch.ones(2, 6))
    assert call(q, k, v, something_else=1).shape == (2, 6, 4, 16)
