"""Models divided over ranks: positions, the last call, parts and copies, other threads, arguments of the loss."""

import copy
import pickle
import re
import threading
from pathlib import Path

import pytest
import torch

import anyattn
from anyattn.integrations.transformers import context_parallel, register

transformers = pytest.importorskip("transformers")

import transformers_context_jobs as jobs  # noqa: E402

PADDED = {
    "none": None,
    "right": torch.tensor([[1] * 12, [1] * 7 + [0] * 5]),
    "left": torch.tensor([[1] * 12, [0] * 5 + [1] * 7]),
}


@pytest.fixture
def cp():
    return anyattn.ContextParallel((1, 0))


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(level)


def tiny(name):
    """A decoder that does not count positions as most do."""
    register()
    sizes = {name: value for name, value in jobs.COMMON.items() if name not in ("num_key_value_heads", "head_dim")}
    if name == "opt":
        config = transformers.OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32)
    else:
        config = {"roberta": transformers.RobertaConfig, "data2vec": transformers.Data2VecTextConfig}[name](
            **sizes, is_decoder=True
        )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="anyattn").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def tokens():
    return torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(1))


def both(cp, model, **batch):
    """Logits of all tokens without a group, and divided over one."""
    with torch.no_grad():
        want = model(**batch).logits.flatten(0, 1)
        with context_parallel(cp, model) as division:
            got = division.unshard(model(**batch).logits)[0]
    mask = batch.get("attention_mask")
    real = slice(None) if mask is None else mask.flatten().bool()
    return want[real], got[real]


# --- positions ---


@pytest.mark.parametrize("padding", PADDED)
@pytest.mark.parametrize("name", ["roberta", "data2vec"])
def test_models_that_count_from_another_position(cp, name, padding):
    model, mask = tiny(name), PADDED[padding]
    batch = {"input_ids": tokens()} if mask is None else {"input_ids": tokens() * mask, "attention_mask": mask}
    with context_parallel(cp, model), pytest.raises(anyattn.Unsupported, match="pass position_ids, as the model would"):
        model(**batch)
    for more in ({}, {"packing": anyattn.Packing.from_lengths([12, 12])}):
        with context_parallel(cp, model), pytest.raises(anyattn.Unsupported, match=f"{type(model).__name__} counts"):
            model(input_ids=tokens(), **more)
    real = torch.ones(2, 12, dtype=torch.long) if mask is None else mask
    want, got = both(cp, model, **batch, position_ids=real.cumsum(1) * real)  # padding_idx is 0
    torch.testing.assert_close(got, want)
    with torch.no_grad():
        own = model(**batch).logits[real.bool()]
    torch.testing.assert_close(got, own)


@pytest.mark.parametrize("padding", PADDED)
def test_a_model_that_counts_by_the_mask(cp, padding):
    model, mask = tiny("opt"), PADDED[padding]
    batch = {"input_ids": tokens(), **({} if mask is None else {"attention_mask": mask})}
    if padding == "left":
        with (
            context_parallel(cp, model),
            pytest.raises(anyattn.Unsupported, match="counts positions from the first token after padding"),
        ):
            model(**batch)
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    want, got = both(cp, model, **batch)
    torch.testing.assert_close(got, want)


def test_a_subclass_with_a_forward_of_its_own(cp):
    """Positions go through keyword arguments to the forward that names them."""

    class Mine(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            return super().forward(input_ids=input_ids, **kwargs)

    register()
    model = Mine(transformers.LlamaConfig(**jobs.COMMON)).eval()
    model.set_attn_implementation("anyattn")
    want, got = both(cp, model, input_ids=tokens())
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["cu_seq_lens_k", "cu_seqlens_k"])
def test_offsets_of_keys_alone(cp, name):
    model, ids = jobs.build("llama"), tokens()[:1]
    offsets = torch.tensor([0, 5, 9, 12])
    want, got = both(cp, model, input_ids=ids, **{name: offsets})
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-4)
    leaking, _ = both(cp, model, input_ids=ids)
    assert not torch.allclose(got, leaking, atol=1e-3)


@pytest.mark.parametrize("lengths", [[5, 19], [12, 12], [3, 11, 10]])
def test_documents_that_go_on_in_the_next_entry(cp, lengths):
    """Two entries of 12 rows."""
    positions = torch.cat([torch.arange(length) for length in lengths]).view(2, 12)
    packing = anyattn.Packing.from_lengths(lengths)
    want, got = both(cp, jobs.build("llama"), input_ids=tokens(), position_ids=positions, packing=packing)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-4)


# --- the last call, parts of a model, plans of the caller's own ---


def test_rows_of_the_last_call(cp):
    """Also where the call stands in the same line: two batches with as many real tokens, elsewhere."""
    model, batch = jobs.build("llama").eval(), jobs.batch_of("right")
    other = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"].flip(1)}
    real = other["attention_mask"].flatten().bool()
    with torch.no_grad():
        want = model(**other).logits.flatten(0, 1)
        with context_parallel(cp, model) as division:
            model(**batch)
            got = division.unshard(model(**other).logits, dim=1)[0]
            rows = division.shard(other["input_ids"].view(1, -1))
    torch.testing.assert_close(got[real], want[real], atol=2e-5, rtol=2e-4)
    assert rows[0].tolist() == other["input_ids"].flatten()[real].tolist()


@pytest.mark.parametrize("compiled", [False, True])
def test_the_decoder_under_the_head_by_itself(cp, compiled):
    model, batch = jobs.build("llama"), jobs.batch_of("plain")
    decoder = torch.compile(model.model, backend="eager") if compiled else model.model
    with (
        context_parallel(cp, model),
        pytest.raises(anyattn.ContextError, match="inside of a LlamaForCausalLM was"),
    ):
        decoder(input_ids=batch["input_ids"])
    assert not model.model._forward_pre_hooks
    with torch.no_grad(), context_parallel(cp, model.model):
        assert decoder(input_ids=batch["input_ids"]).last_hidden_state.shape[:2] == (1, 51)


def test_the_page_without_the_context():
    """Its code runs, and the loss of one rank, which has all tokens, is the batch's."""
    page = (Path(__file__).parent.parent / "docs" / "transformers-context-parallel.md").read_text("utf-8")
    code = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert "plan=plan" in code[-1]
    names = {"__name__": "page"}
    for block in (code[0], code[-1]):
        exec(compile(block, "page", "exec"), names)
    assert names["part"].item() == pytest.approx(names["loss"].item(), abs=2e-6)


def test_documents_on_one_rank_without_positions(cp):
    model, batch = jobs.build("llama"), jobs.batch_of("positions")
    plan = cp.plan(anyattn.Packing.from_lengths(jobs.LENGTHS))
    with pytest.raises(anyattn.ContextError, match="plan= without position_ids="):
        model(input_ids=plan.shard(batch["input_ids"], dim=1), plan=plan)
    assert model(input_ids=batch["input_ids"], plan=plan, position_ids=batch["position_ids"]).logits.shape[1] == 51
    whole = cp.plan(anyattn.Packing.from_lengths([51]))
    assert model(input_ids=batch["input_ids"], plan=whole).logits.shape[1] == 51


# --- copies, threads, accelerators ---


@pytest.mark.parametrize("made", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_not_divided(cp, made):
    model, ids = jobs.build("llama").eval(), tokens()
    with torch.no_grad(), context_parallel(cp, model):
        other = made(model)
        assert model(input_ids=ids).logits.shape[:2] == (1, 24)
        assert other(input_ids=ids).logits.shape[:2] == (2, 12)
        with context_parallel(cp, other):
            assert other(input_ids=ids).logits.shape[:2] == (1, 24)
    assert other.generate(ids, max_new_tokens=2).shape == (2, 14)
    with torch.no_grad():
        whole = torch.compile(other, backend="eager", fullgraph=True)(input_ids=ids, use_cache=False)
    assert whole.logits.shape[:2] == (2, 12)


def test_a_model_in_another_thread(cp):
    """It is called while a divided model runs."""
    model, other, ids = jobs.build("llama").eval(), jobs.build("mistral").eval(), tokens()
    with torch.no_grad():
        want = other(input_ids=ids).logits
    found = []

    def run():
        with torch.no_grad():
            found.append(other(input_ids=ids).logits)

    def meanwhile(*_):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    handle = model.model.layers[1].register_forward_pre_hook(meanwhile)
    with torch.no_grad(), context_parallel(cp, model):
        assert model(input_ids=ids).logits.shape[:2] == (1, 24)
    handle.remove()
    torch.testing.assert_close(found[0], want)


def test_two_models_and_one_accelerator(cp):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    with context_parallel(cp, jobs.build("llama"), accelerator=accelerator):
        outer = accelerator.prepare_data_loader
        with context_parallel(cp, jobs.build("mistral"), accelerator=accelerator):
            assert accelerator.prepare_data_loader is not outer
            loader = accelerator.prepare(torch.utils.data.DataLoader(range(4), batch_size=2))
            assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3]]
        assert accelerator.prepare_data_loader is outer
    assert "prepare_data_loader" not in vars(accelerator)


# --- the loss ---


def test_labels_that_are_ignored(cp):
    model, ids = jobs.build("llama"), tokens()
    mask = PADDED["right"]
    labels = ids.masked_fill((mask == 0) | (ids % 3 == 0), 7)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "ignore_index": 7}
    want = model(**batch).loss.item()
    with context_parallel(cp, model):
        assert model(**batch).loss.item() == pytest.approx(want, abs=2e-6)
        with pytest.raises(anyattn.ContextError, match="label it 7"):
            model(**{**batch, "labels": ids})
