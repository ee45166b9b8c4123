"""Models of transformers under ``torch.compile``: without a graph break, and what they give uncompiled."""

import pytest
import torch
import torch._dynamo.testing

import anyattn
from transformers_cases import LENGTHS, MASKS, packed, tokens
from transformers_generation import NEW
from transformers_judge import TOLERANCE, difference
from transformers_models import BY_NAME, build

pytestmark = pytest.mark.usefixtures("registered")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(name, how):
    """(inputs, rows that count)"""
    spelling = {"cu_seq_lens": "seq_lens", "packing": "packing", "positions": ""}.get(how)
    if spelling is not None:
        batch = packed(spelling, use_cache=False)(BY_NAME[name]).inputs
        return batch, torch.ones_like(batch["input_ids"], dtype=torch.bool)
    mask = torch.tensor(MASKS["left"])
    return {"input_ids": tokens(3, 10), "attention_mask": mask, "use_cache": False}, mask.bool()


def found(model, batch, rows):
    """Logits, and gradients where the model's backward traces."""
    logits = model(**batch).logits[rows]
    if not logits.requires_grad:
        return {"logits": logits}
    model.zero_grad()
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    named = getattr(model, "_orig_mod", model).named_parameters()
    return {"logits": logits.detach(), **{n: p.grad.clone() for n, p in named if p.grad is not None}}


TABLE = [
    *(("llama", how) for how in ("packing", "cu_seq_lens", "positions", "padded")),
    ("gemma2", "cu_seq_lens"), ("mistral", "padded"), ("gpt_oss", "positions"), ("llama4", "padded"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "how"), TABLE)
def test_compiled(name, how):
    ours = build(name, "anyattn")
    batch, rows = inputs(name, how)
    experts = name in ("gpt_oss", "llama4")  # their backward does not trace in transformers 5.17
    with torch.set_grad_enabled(not experts):
        want = found(ours, batch, rows)
        got = found(torch.compile(ours, backend="aot_eager", fullgraph=True), batch, rows)
    error, where = difference(got, want)
    assert error <= TOLERANCE, where


def test_layers_compiled_one_by_one():
    """Masks come from outside then."""
    for name, how in (("llama", "packing"), ("mistral", "padded"), ("mistral", "positions"), ("llama4", "padded")):
        ours = build(name, "anyattn")
        batch, rows = inputs(name, how)
        with torch.no_grad():
            want = ours(**batch).logits[rows]
            for layer in ours.model.layers:
                layer.compile(backend="eager", fullgraph=True)
            got = ours(**batch).logits[rows]
        torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=2e-4)


def test_what_does_not_compile_is_refused():
    batch, _ = inputs("llama4", "cu_seq_lens")
    compiled = torch.compile(build("llama4", "anyattn"), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="chunked attention of packed documents does not compile"), torch.no_grad():
        compiled(**batch)
    batch, _ = inputs("llama", "cu_seq_lens")
    batch["attention_mask"] = torch.ones(1, 1, sum(LENGTHS), sum(LENGTHS), dtype=torch.bool)
    compiled = torch.compile(build("llama", "anyattn"), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="a 4-D attention mask says all"), torch.no_grad():
        compiled(**batch)


def test_generate_with_a_compiled_model():
    ours, theirs = build("gemma2", "anyattn"), build("gemma2", "eager")
    mask = torch.tensor(MASKS["left"])
    ids = tokens(3, 10, seed=3).masked_fill(mask == 0, 0)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "disable_compile": True}
    want = theirs.generate(ids, attention_mask=mask, **options)
    ours.forward = torch.compile(ours.forward, backend="eager", fullgraph=True)
    assert torch.equal(ours.generate(ids, attention_mask=mask, cache_implementation="static", **options), want)


def test_packings_of_many_batches_recompile_nothing():
    ours = build("llama", "anyattn")
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(ours, backend=counter, fullgraph=True)
    with torch.no_grad():
        for lengths in ([5, 1, 9, 3], [6, 3, 9], [2, 2, 2, 3], [10, 4], [7, 8, 1, 1, 1], [4, 30]):
            packing = anyattn.Packing.from_lengths(lengths)
            batch = {"input_ids": tokens(1, sum(lengths)), "packing": packing, "use_cache": False}
            torch.testing.assert_close(compiled(**batch).logits, ours(**batch).logits, atol=TOLERANCE, rtol=2e-4)
            if lengths == [2, 2, 2, 3]:
                warm = counter.frame_count
    assert counter.frame_count == warm
