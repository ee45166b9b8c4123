"""What one layer settled, later layers find; and nothing is found that is not the same any more."""

import gc
import threading
import weakref

import pytest
import torch

import anyattn
from anyattn.integrations import _transformers_call as integration
from anyattn.integrations import _transformers_settled as settled
from transformers_cases import LENGTHS, MASKS, offsets, tokens
from transformers_judge import CLOSE
from transformers_models import build

ROWS = sum(LENGTHS)


pytestmark = pytest.mark.usefixtures("registered")


@pytest.fixture(autouse=True)
def _fresh():
    anyattn.integrations.transformers.forget()


class Layer(torch.nn.Module):
    """An attention layer as far as attention sees it."""

    def __init__(self, layer_idx=None, is_causal=True):
        super().__init__()
        self.layer_idx, self.is_causal = layer_idx, is_causal


def qkv(queries=ROWS, keys=ROWS, batch=1):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, n, 8, generator=generator) for heads, n in ((4, queries), (2, keys), (2, keys))]


Q, K, V = qkv()


def call(mask=None, layer=None, qkv=(Q, K, V), **options):
    return integration.attention_forward(layer or Layer(), *qkv, mask, **options)[0]


def alone(lengths):
    """Each document in a call of its own."""
    lengths = list(lengths)
    pieces = [x.split(lengths, 2) for x in (Q, K, V)]
    return torch.cat([call(qkv=piece) for piece in zip(*pieces, strict=True)], 1)


def positions_of(lengths):
    return torch.cat([torch.arange(n) for n in lengths])[None]


@pytest.fixture
def read(monkeypatch):
    """How often a call was read in full."""
    calls, real = [], integration.read
    monkeypatch.setattr(integration, "read", lambda *a, **k: calls.append(a) or real(*a, **k))
    return calls


def packed_inputs(how):
    if how in ("left", "right"):
        return {"input_ids": tokens(3, 10), "attention_mask": torch.tensor(MASKS[how])}
    if how == "4-D mask":
        return {"input_ids": tokens(2, 6), "attention_mask": torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()}
    inputs = {"input_ids": tokens(1, ROWS)}
    if how != "no mask":
        inputs["position_ids"] = positions_of(LENGTHS)
    if how == "cu_seq_lens":
        inputs |= {f"cu_seq_lens_{x}": offsets() for x in "qk"} | {f"max_length_{x}": max(LENGTHS) for x in "qk"}
    elif how == "lengths on the device":
        inputs |= {"cu_seq_lens_q": offsets(), "max_length_q": torch.tensor(max(LENGTHS))}
    elif how == "packing":
        inputs["packing"] = anyattn.Packing.from_lengths(LENGTHS)
    return inputs


@pytest.mark.parametrize("inference", [False, True], ids=["grad", "inference_mode"])
@pytest.mark.parametrize(
    "how",
    ["no mask", "left", "right", "4-D mask", "positions", "cu_seq_lens", "lengths on the device", "packing"],
)
def test_one_layer_of_a_kind_reads_a_call(how, inference, read):
    with torch.inference_mode(inference):
        inputs = packed_inputs(how)
        for name, kinds in (("llama", 1), ("gemma2", 2)):
            model = build(name, "anyattn")
            layers = model.model.layers
            layers.extend(build(name, "anyattn").model.layers)
            for i, layer in enumerate(layers):
                layer.self_attn.layer_idx = i
            model.config.num_hidden_layers = len(layers)
            if kinds == 2:
                model.config.layer_types = model.config.layer_types * 2
            for forward in range(2):
                read.clear()
                model(**inputs, use_cache=False)
                # A second forward of the same tensors may have nothing to read, where they tell that it is so.
                assert len(read) == kinds or (0 <= len(read) < kinds and forward == 1 and not inference)


def test_decoding_reads_one_layer_of_each_step(read):
    model = build("llama", "anyattn")
    ids, mask = tokens(3, 10), torch.tensor(MASKS["left"])
    model.generate(ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert len(read) == 4


@pytest.mark.parametrize("name", ["position_ids", "cu_seq_lens_q", "cu_seqlens_k", "attention_mask"])
def test_what_is_written_to_is_read_again(name):
    other = (6, 3, 9)
    if name == "attention_mask":
        given = torch.ones(1, 1, ROWS, ROWS, dtype=torch.bool).tril()
        block = torch.block_diag(*(torch.ones(n, n) for n in other)).bool().tril()
        for values, lengths in ((given.clone(), (ROWS,)), (block, other)):
            given.copy_(values)
            torch.testing.assert_close(call(given), alone(lengths), **CLOSE)
        return
    given = positions_of(LENGTHS) if name == "position_ids" else offsets((*other, 0))
    for lengths in ((*other, 0), LENGTHS):
        given.copy_(positions_of(lengths) if name == "position_ids" else offsets(lengths))
        for _ in range(2):
            torch.testing.assert_close(call(**{name: given}), alone(n for n in lengths if n), **CLOSE)


def test_what_torch_does_not_count_needs_forget():
    cu = offsets((6, 3, 9))
    call(cu_seq_lens_q=cu)
    cu.data.copy_(offsets((5, 4, 9)))
    anyattn.integrations.transformers.forget()
    torch.testing.assert_close(call(cu_seq_lens_q=cu), alone((5, 4, 9)), **CLOSE)


def test_another_tensor_at_the_same_place_is_another_tensor():
    """Nothing is found for a tensor that is gone, though a new one may have its id."""
    ids = set()
    for i in range(60):
        lengths = (1 + i % 17, ROWS - 1 - i % 17)
        cu = offsets(lengths)
        ids.add(id(cu))
        torch.testing.assert_close(call(cu_seq_lens_q=cu), alone(lengths), **CLOSE)
        del cu
    assert len(ids) < 60  # or nothing was tried
    assert not any("cu" in str(key) for key in settled._known)


def test_nothing_is_kept_alive():
    anyattn.integrations.transformers.forget()
    mask = torch.tensor([[1, 0, 1, 1, 0, 1] + [1] * 12]).bool()  # with holes, and a window: a dense mask is made
    packing = anyattn.Packing.from_lengths(LENGTHS)
    call(mask, sliding_window=3)
    call(packing=packing)
    call(packing=packing, packing_kv=packing)
    known = list(settled._known.values())
    dense = [weakref.ref(k.settled.mask) for k in known if k.settled.mask is not None]
    kept = [weakref.ref(x) for x in (mask, packing)]
    assert (len(known), len(dense)) == (3, 1)
    del mask, packing, known
    gc.collect()
    assert not settled._known
    assert [x() for x in (*kept, *dense)] == [None] * 3


def test_entries_are_bounded():
    keep = [offsets((i, ROWS - i)) for i in range(1, 18) for _ in range(8)]
    for cu in keep:
        call(cu_seq_lens_q=cu)
    assert len(settled._known) <= settled._ENTRIES


def test_a_packing_that_is_refilled():
    packing = anyattn.Packing.from_lengths([5, 13], max_sequences=4, max_rows=ROWS, max_seqlen=ROWS)
    for lengths in ([5, 13], [2, 7, 9], [18]):
        packing.copy_(anyattn.Packing.from_lengths(lengths))
        for _ in range(2):
            torch.testing.assert_close(call(packing=packing), alone(lengths), **CLOSE)
    packing = anyattn.Packing.from_lengths([5, 13])  # its lengths are known until it is refilled
    positions = positions_of([5, 13])
    call(packing=packing, position_ids=positions)
    packing.copy_(anyattn.Packing.from_lengths([6, 12]))
    with pytest.raises(anyattn.PackingError, match="disagree"):
        call(packing=anyattn.Packing.from_lengths([6, 12]), position_ids=positions)
    torch.testing.assert_close(call(packing=packing, position_ids=positions), alone([6, 12]), **CLOSE)


def test_packings_of_entries():
    """One sequence per entry: a packing of queries that counts as it is, beside one of keys that does not."""
    q, k, v = qkv(4, 6, batch=2)
    full = Layer(is_causal=False)
    pieces = [(q[i : i + 1], k[i : i + 1, :, :n], v[i : i + 1, :, :n]) for i, n in enumerate((6, 3))]
    want = torch.cat([call(qkv=piece, layer=full) for piece in pieces])
    queries, keys = anyattn.Packing.from_lengths([4, 4]), anyattn.Packing.from_lengths([6, 3])
    for _ in range(3):
        got = call(qkv=(q, k, v), layer=full, packing=queries, packing_kv=keys)
        torch.testing.assert_close(got, want, **CLOSE)


def test_every_number_counts():
    """Of two calls with the same tensors and another number, none is answered by the other."""
    cu, positions = offsets(), positions_of(LENGTHS)
    given = {"cu_seq_lens_q": cu, "position_ids": positions}
    want = alone(LENGTHS)
    for more in ({}, {"max_length_q": max(LENGTHS)}):
        torch.testing.assert_close(call(**given, **more), want, **CLOSE)
    with pytest.raises(anyattn.PackingError, match="max_seqlen is 4"):
        call(**given, max_length_q=4)
    assert not torch.allclose(call(**given, is_causal=False), want)
    assert not torch.allclose(call(**given, sliding_window=2), want)
    assert not torch.allclose(call(**given, layer=Layer(is_causal=False)), want)
    with pytest.raises(anyattn.PackingError, match=f"is of {ROWS} rows"):
        call(qkv=qkv(batch=2), **given)
    with pytest.raises(anyattn.PackingError, match="two ways to say one thing"):
        call(**given, packing=anyattn.Packing.from_lengths(LENGTHS))
    with pytest.raises(anyattn.PackingError, match="two names of one thing"):
        call(**given, cu_seqlens_q=offsets((6, 3, 9)))
    with pytest.raises(anyattn.PackingError, match="4-D attention mask says all"):
        call(torch.ones(1, 1, ROWS, ROWS, dtype=torch.bool), **given)
    torch.testing.assert_close(call(**given, max_length_q=max(LENGTHS)), want, **CLOSE)


def test_a_bias_counts_beside_what_was_settled_without():
    mask = torch.ones(1, ROWS, dtype=torch.bool)
    mask[:, :3] = False
    bias = torch.randn(1, 4, ROWS, ROWS)
    without = call(mask)
    got = call(mask, position_bias=bias)
    anyattn.integrations.transformers.forget()
    torch.testing.assert_close(call(mask, position_bias=bias), got)
    assert not torch.allclose(got, without, atol=0.1)


def test_an_entry_is_of_its_own_objects():
    """Whatever it is found under."""
    layer, packing = Layer(), anyattn.Packing.from_lengths(LENGTHS)
    for things in ({"cu_seq_lens_q": offsets()}, {"packing": packing}):
        other = {name: offsets() if name != "packing" else anyattn.Packing.from_lengths(LENGTHS) for name in things}
        numbers = 1, ROWS, ROWS, None, None, True, None
        mine, theirs = settled.given(numbers, None, things), settled.given(numbers, None, other)
        call(layer=layer, **things)
        assert settled.find(mine, layer) is not None
        settled._known[theirs.key] = settled._known[mine.key]
        assert settled.find(theirs, layer) is None
    packing.copy_(anyattn.Packing.from_lengths([9, 9]))
    assert settled.find(mine, layer) is None


def test_a_packing_of_keys_needs_one_of_queries():
    for more in ({}, {"cu_seq_lens_q": offsets()}):
        with pytest.raises(anyattn.PackingError, match="packing_kv says how keys are divided"):
            call(packing_kv=anyattn.Packing.from_lengths(LENGTHS), **more)


def test_refusals_are_of_every_call():
    model = build("llama", "anyattn")
    inputs = {"input_ids": tokens(1, 4), "position_ids": torch.arange(4)[None], "use_cache": False}
    model(**inputs)
    model.config._output_attentions = True
    with pytest.raises(anyattn.Unsupported, match="output_attentions=False"):
        model.model.layers[0].self_attn(
            torch.zeros(1, 4, 32), position_embeddings=(torch.ones(1, 4, 8), torch.zeros(1, 4, 8)), attention_mask=None
        )
    cu = offsets()
    call(cu_seq_lens_q=cu)
    with pytest.raises(anyattn.Unsupported, match="continuous batching"):
        call(cu_seq_lens_q=cu, cache=object())
    with pytest.raises(anyattn.Unsupported, match="position_bias"):
        call(cu_seq_lens_q=cu, position_bias=torch.zeros(1, 4, ROWS, ROWS))


@pytest.mark.parametrize("first", [0, 1, 3])
def test_inference_tensors_hold_for_one_forward(first):
    """Whichever layer begins the next forward: they do not say that they were written to."""
    with torch.inference_mode():
        cu = offsets((6, 3, 9))
        for layer in range(4):
            torch.testing.assert_close(call(layer=Layer(layer), cu_seq_lens_q=cu), alone((6, 3, 9)), **CLOSE)
        cu.copy_(offsets((5, 4, 9)))
        for layer in range(first, 4):
            torch.testing.assert_close(call(layer=Layer(layer), cu_seq_lens_q=cu), alone((5, 4, 9)), **CLOSE)
        cu.copy_(offsets((2, 7, 9)))
        for _ in range(2):  # layers without a number
            torch.testing.assert_close(call(cu_seq_lens_q=cu), alone((2, 7, 9)), **CLOSE)
            cu.copy_(offsets((2, 7, 9)))


def test_inference_tensors_of_two_kinds_of_layers():
    """Both kinds share what was worked out of the offsets; a forward may begin with either."""
    with torch.inference_mode():
        cu = offsets((6, 3, 9))

        def forward(lengths, layers):
            cu.copy_(offsets(lengths))
            for layer in layers:
                window = ROWS if layer % 2 else None
                got = call(layer=Layer(layer), cu_seq_lens_q=cu, sliding_window=window)
                torch.testing.assert_close(got, alone(lengths), **CLOSE)

        forward((6, 3, 9), range(4))
        forward((5, 4, 9), range(1, 4))
        forward((2, 7, 9), (2, 3))
        forward((1, 8, 9), (3,))


def test_threads_do_not_meet():
    """Each with batches of its own, of the same shapes, and one mask that they share."""
    shared = torch.ones(1, ROWS, dtype=torch.bool)
    wrong = []

    def work(seed):
        lengths = [(seed + 1, ROWS - seed - 1), (ROWS - seed - 2, seed + 2)]
        want = [alone(n) for n in lengths]
        for i in range(60):
            cu = offsets(lengths[i % 2])
            for _ in range(3):
                got = call(shared, cu_seq_lens_q=cu)
                if not torch.allclose(got, want[i % 2], **CLOSE):
                    wrong.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("runs", [((0, 3), (1, 2, 3)), ((0, 1, 2), (1, 3)), ((0, 1, 3), (2, 3))], ids=str)
def test_what_a_forward_of_some_layers_read_holds_for_no_other(runs):
    """Tensors made under inference_mode do not say when they are written to; layers of another kind share them."""
    with torch.inference_mode():
        for first_of_a_kind in range(4):
            anyattn.integrations.transformers.forget()
            offsets_given = offsets((6, 3, 9))
            for layers, lengths in zip(runs, ((6, 3, 9), (5, 4, 9)), strict=True):
                offsets_given.copy_(offsets(lengths))
                for number in layers:
                    window = ROWS if number >= first_of_a_kind else None
                    found = call(layer=Layer(number), cu_seq_lens_q=offsets_given, sliding_window=window)
                    torch.testing.assert_close(found, alone(lengths), **CLOSE)
