"""transformers models divided over ranks: the loss, gradients and logits of one process, and what is refused."""

import os
import sys
import warnings
import weakref

import pytest
import torch

import anyattn
import context_pool
from anyattn.integrations.transformers import ContextParallelCollator, context_parallel, register

transformers = pytest.importorskip("transformers")

import transformers_context_jobs as jobs  # noqa: E402

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="this torch has no gloo"
)

RANKS = 4
KINDS = ("positions", "cu_seq_lens", "packing", "right", "left", "plain")
#: float32 through two layers.
TOLERANCE = {"atol": 2e-6, "rtol": 2e-5}


@pytest.fixture(scope="module")
def pool():
    made = context_pool.Pool(size=RANKS)
    yield made
    made.close()


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    """Models in this process say what they think of their tiny configs."""
    level = transformers.utils.logging.get_verbosity()
    yield
    transformers.utils.logging.set_verbosity(level)


_steps = {}


def alone(name, kind):
    if (name, kind) not in _steps:
        _steps[name, kind] = jobs.alone(name, kind)
    return _steps[name, kind]


def assert_step(got, want):
    assert got.loss == pytest.approx(want.loss, abs=2e-6)
    torch.testing.assert_close(got.logits, want.logits, atol=2e-5, rtol=2e-4)
    assert_gradients(got.gradients, want.gradients)


def assert_gradients(got, want):
    assert got.keys() == want.keys()
    for name in want:
        scale = max(want[name].abs().max().item(), 1e-2)
        torch.testing.assert_close(
            got[name] / scale, want[name] / scale, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- one step ---

SCHEMES = {
    "llama": [(2, "p2p"), (4, "all_gather"), (4, "a2a")],
    "mistral": [(2, "p2p"), (4, "p2p"), (2, "all_gather")],
    "gemma2": [(2, "a2a"), (4, "p2p"), (4, "all_gather")],
    "gpt_oss": [(2, "p2p"), (4, "a2a"), (4, "all_gather")],
    "gpt2": [(2, "p2p"), (4, "auto")],
}


@pytest.mark.parametrize(
    ("name", "ranks", "comm"), [(name, *scheme) for name, schemes in SCHEMES.items() for scheme in schemes]
)
def test_ranks_take_the_step_of_one_process(pool, name, ranks, comm):
    found = context_pool.values(pool.run(ranks, jobs.several, name, KINDS, comm))
    for steps in found:
        for kind, step in zip(KINDS, steps, strict=True):
            assert_step(step, alone(name, kind))


def test_a_mesh_of_two_dims(pool):
    mesh = context_pool.Mesh((2, 2), ("p2p", "a2a"))
    for step in context_pool.values(pool.run(mesh, jobs.divided, "gemma2", "positions", "a2a+p2p")):
        assert_step(step, alone("gemma2", "positions"))


@pytest.mark.parametrize("how", ["ddp", "fsdp2", "fsdp2 inside", "checkpointing", "compiled", "embeddings", "tuple"])
def test_wrapped_models(pool, how):
    want = alone("gemma2", "positions")
    for step in context_pool.values(pool.run(2, jobs.wrapped, how)):
        assert_step(step, want)


@pytest.mark.parametrize("ranks", [2, context_pool.Mesh((2, 2), ("p2p", "a2a"))], ids=["ProcessGroup", "DeviceMesh"])
def test_a_group_as_it_is(pool, ranks):
    for step in context_pool.values(pool.run(ranks, jobs.divided, "llama", "positions", "group")):
        assert_step(step, alone("llama", "positions"))


def test_gradients_to_be_summed(pool):
    for step in context_pool.values(pool.run(2, jobs.divided, "llama", "right", "p2p", "sum")):
        assert_step(step, alone("llama", "right"))


def test_accumulated_batches(pool):
    want = jobs.accumulated_alone()
    for got in context_pool.values(pool.run(2, jobs.accumulated)):
        assert_gradients(got, want)


def test_a_plan_of_the_callers_own(pool):
    for step in context_pool.values(pool.run(2, jobs.by_own_plan)):
        assert_step(step, alone("gemma2", "positions"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss"])
def test_a_plan_of_the_callers_own_without_positions(pool, name):
    """The first rank's rows do begin at 0, and it hears of the others'."""
    without = context_pool.failures(pool.run(2, jobs.own_plan_without, ("position_ids",), name), anyattn.ContextError)
    assert "this call cannot run on rank 1 of the group" in without[0]
    assert "pass position_ids=plan.position_ids[None]" in without[1]


LEFT_OUT = {
    "plan= and shift_labels= without num_items_in_batch=": ("num_items_in_batch",),
    "plan= and num_items_in_batch= without shift_labels=": ("shift_labels",),
}


@pytest.mark.parametrize("text", LEFT_OUT)
def test_a_plan_of_the_callers_own_and_a_loss_of_other_tokens(pool, text):
    for message in context_pool.failures(pool.run(2, jobs.own_plan_without, LEFT_OUT[text]), anyattn.ContextError):
        assert text in message


def test_a_plan_of_the_callers_own_without_a_loss(pool):
    left_out = ("labels", "shift_labels", "num_items_in_batch")
    assert context_pool.values(pool.run(2, jobs.own_plan_without, left_out)) == [None, None]
    assert None not in context_pool.values(pool.run(2, jobs.own_plan_without, ()))


@pytest.mark.parametrize("gradients", ["mean", "sum"])
def test_a_loss_of_the_callers_own(pool, gradients):
    for step in context_pool.values(pool.run(2, jobs.unsharded_loss, gradients)):
        assert_step(step, alone("llama", "positions"))


def test_plans_made_by_the_data_loader(pool):
    model = jobs.build("mistral")
    collator = transformers.DataCollatorWithFlattening()
    with torch.no_grad():
        want = [model(**collator(jobs.documents(seed), return_tensors="pt")).loss.item() for seed in range(2)]
    for got in context_pool.values(pool.run(2, jobs.collated)):
        assert got == pytest.approx(want, abs=2e-6)


def test_ranks_given_different_tokens_hear_of_it(pool):
    for message in context_pool.failures(pool.run(2, jobs.given_different_batches), anyattn.ContextError):
        assert "input_ids (ranks 0 against 1)" in message
        assert "must be given the same batch" in message


# --- Trainer ---


@pytest.fixture(scope="module")
def trained():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "plain": jobs.train(None, 4),
            "accumulation": jobs.train(None, 4, gradient_accumulation_steps=2),
        }


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=["plain", "accumulation"])
def test_trainer_over_data_and_context_ranks(pool, trained, options):
    """Two data-parallel ranks with two documents each are one process with four."""
    pytest.importorskip("accelerate")
    want, weights = trained["accumulation" if options else "plain"]
    assert want[0] > want[2]
    assert "LOCAL_RANK" not in os.environ
    for losses, got in context_pool.values(pool.run(RANKS, _train, 2, options)):
        assert losses == pytest.approx(want, abs=2e-4)  # the log rounds to four digits
        assert_gradients(got, weights)


def _train(seat, cp_size, options):
    return jobs.train_over_ranks(seat, cp_size, **options)


def test_loaders_of_an_accelerator(pool):
    """Neighbours are given the same documents, the two groups different ones."""
    pytest.importorskip("accelerate")
    first = [feature["input_ids"][0] for feature in jobs.documents()]
    found = context_pool.values(pool.run(RANKS, jobs.prepared, "cp", False))
    assert found == [first[::2], first[::2], first[1::2], first[1::2]]


def test_loaders_in_which_one_process_reads_for_all(pool):
    pytest.importorskip("accelerate")
    for message in context_pool.failures(pool.run(RANKS, jobs.prepared, "cp", None), anyattn.Unsupported):
        assert "dispatch_batches=False" in message


def test_groups_that_are_no_neighbours(pool):
    pytest.importorskip("accelerate")
    for message in context_pool.failures(pool.run(RANKS, jobs.prepared, "dp", False), anyattn.ContextError):
        assert "a group must be neighbours" in message


# --- refused, by name ---


@pytest.fixture
def cp():
    return anyattn.ContextParallel((1, 0))


def tiny(name, **changes):
    """A model of a class, with random weights."""
    register()
    sizes = {**jobs.COMMON, **changes}
    kinds = {
        "LlamaForSequenceClassification": transformers.LlamaConfig,
        "BartForConditionalGeneration": transformers.BartConfig,
        "BartForCausalLM": transformers.BartConfig,
        "Qwen3NextForCausalLM": transformers.Qwen3NextConfig,
    }
    if "Bart" in name:
        sizes = {
            "vocab_size": 61, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "max_position_embeddings": 64,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip
    model = getattr(transformers, name)(kinds[name](**sizes))
    model.set_attn_implementation("anyattn")
    return model


MODELS = {
    "LlamaForSequenceClassification": "no causal language model (its loss is ForSequenceClassification)",
    "BartForConditionalGeneration": "encoder-decoder",
    "BartForCausalLM": "its forward takes no position_ids",
    "Qwen3NextForCausalLM": "tokens meet in its Conv1d",
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_cannot_be_divided(cp, name):
    with pytest.raises(anyattn.Unsupported) as raised, context_parallel(cp, tiny(name)):
        pass
    assert name in str(raised.value)
    assert MODELS[name] in str(raised.value)


def test_rotary_positions_that_depend_on_the_longest(cp):
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **jobs.COMMON, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        )
    )
    with pytest.raises(anyattn.Unsupported, match=r"rotary frequencies .* depend on the longest position"):
        context_parallel(cp, model).__enter__()


def test_a_loss_of_the_models_own(cp):
    model, batch = jobs.build("llama"), jobs.batch_of("plain")
    model.loss_function = lambda logits, labels, **_: logits.sum()
    with context_parallel(cp, model):
        with pytest.raises(anyattn.Unsupported, match="LlamaForCausalLM has a loss of its own"):
            model(**batch)
        assert model(input_ids=batch["input_ids"]).loss is None


ARGUMENTS = {
    "generation, with a cache": lambda b: {"past_key_values": transformers.DynamicCache()},
    "generation, with a cache of": lambda b: {"use_cache": True},
    "a 4-D mask": lambda b: {"attention_mask": torch.ones(3, 1, 17, 17, dtype=torch.bool)},
    "logits_to_keep": lambda b: {"logits_to_keep": 1},
    "how to divide pixel_values": lambda b: {"pixel_values": torch.ones(3, 4)},
    "packing_kv": lambda b: {
        "packing": anyattn.Packing.from_lengths([17] * 3), "packing_kv": anyattn.Packing.from_lengths([9] * 3)
    },
}  # fmt: skip


@pytest.mark.parametrize("text", ARGUMENTS)
def test_batches_that_cannot_be_divided(cp, text):
    model, batch = jobs.build("llama"), jobs.batch_of("plain")
    with context_parallel(cp, model):
        with pytest.raises(anyattn.Unsupported, match=text):
            model(**{**batch, **ARGUMENTS[text](batch)})
        assert model(**batch).loss > 0  # nothing stays behind


def test_generation_is_refused(cp):
    model = jobs.build("llama").eval()
    with context_parallel(cp, model), pytest.raises(anyattn.Unsupported, match="generation"):
        model.generate(jobs.batch_of("plain")["input_ids"], max_new_tokens=2)


WRONG = {
    "would be predicted from padding": lambda: {
        "attention_mask": torch.tensor([[0] * 5 + [1] * 12]).expand(3, -1),
    },
    "padding splits one": lambda: {
        "attention_mask": torch.tensor([[1] * 5 + [0] + [1] * 11]).expand(3, -1),
        "position_ids": torch.tensor([[*range(8), *range(9)]]).expand(3, -1),
    },
    "the plan is for 9 rows, and the batch has 3 x 17": lambda: {
        "plan": anyattn.ContextParallel((1, 0)).plan(anyattn.Packing.from_lengths([9])),
    },
    "is of 20 rows, and there are 3 x 17 tokens": lambda: {"cu_seq_lens_q": torch.tensor([0, 5, 20])},
    "is of 3 rows, and there are 3 x 17 tokens": lambda: {"packing": anyattn.Packing.from_lengths([1] * 3)},
    "two names of one thing": lambda: {
        "cu_seq_lens_q": torch.tensor([0, 51]), "cu_seqlens_q": torch.tensor([0, 5, 51])
    },
    r"2-D is \(3, keys\); got \(1, 17\)": lambda: {"attention_mask": torch.ones(1, 17)},
    r"2-D is \(3, keys\); got \(3, 17, 17\)": lambda: {"attention_mask": torch.ones(3, 17, 17)},
    "must be an anyattn.ContextPlan, got int": lambda: {"plan": 3},
    "the plan is for rank 0 of 2": lambda: {
        "plan": anyattn.ContextParallel((2, 0)).plan(anyattn.Packing.from_lengths([51])),
    },
    "two ways to say one thing": lambda: {
        "packing": anyattn.Packing.from_lengths([51]), "cu_seq_lens_q": torch.tensor([0, 51])
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ["mask", "offsets"])
def test_tokens_after_the_end_are_padding(cp, kind):
    """Of a mask that is shorter than the tokens, and of offsets beside a mask; as in one process."""
    model, ids = jobs.build("llama"), jobs.batch_of("plain")["input_ids"]
    if kind == "mask":
        batch = {"attention_mask": torch.tensor([[1] * 12, [0] * 3 + [1] * 9, [1] * 12])}
        labels = torch.cat([ids[:, :12], torch.full_like(ids[:, 12:], jobs.IGNORED)], 1)
        labels[1, :4] = jobs.IGNORED
    else:
        ids = ids.view(1, -1)
        batch = {"attention_mask": (torch.arange(51) < 40)[None], "cu_seq_lens_k": torch.tensor([0, 13, 40])}
        labels = ids.masked_fill(torch.arange(51) >= 40, jobs.IGNORED)
    want = model(input_ids=ids, labels=labels, **batch).loss.item()
    with context_parallel(cp, model):
        assert model(input_ids=ids, labels=labels, **batch).loss.item() == pytest.approx(want, abs=2e-6)
        with pytest.raises(anyattn.ContextError, match="would be predicted from padding"):
            model(input_ids=ids, labels=ids, **batch)


def test_a_longer_mask_is_cut(cp):
    model, batch = jobs.build("llama"), jobs.batch_of("right")
    want = model(**batch).loss.item()
    batch["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones(3, 4, dtype=torch.long)], 1)
    with context_parallel(cp, model):
        assert model(**batch).loss.item() == pytest.approx(want, abs=2e-6)


@pytest.mark.parametrize("text", WRONG)
def test_what_does_not_fit_is_an_error(cp, text):
    model, batch = jobs.build("llama"), jobs.batch_of("plain")
    with context_parallel(cp, model), pytest.raises(anyattn.InvalidArgument, match=text):
        model(**{**batch, **WRONG[text]()})


def test_attention_that_is_not_anyattns(cp):
    model, batch = jobs.build("llama"), jobs.batch_of("plain")
    model.set_attn_implementation("sdpa")
    with context_parallel(cp, model), pytest.raises(anyattn.Unsupported, match="0 of LlamaForCausalLM's 2 layers"):
        model(**batch)


def test_a_loss_over_routers(cp):
    model, batch = jobs.build("gpt_oss"), jobs.batch_of("positions")
    with context_parallel(cp, model), pytest.raises(anyattn.Unsupported, match="returns aux_loss"):
        model(**batch, output_router_logits=True)


def test_chunked_attention(cp):
    register()
    config = transformers.Llama4TextConfig(
        **{**jobs.COMMON, "num_hidden_layers": 4}, attention_chunk_size=4, num_local_experts=1, num_experts_per_tok=1,
        intermediate_size_mlp=16,
    )  # fmt: skip
    model = transformers.Llama4ForCausalLM(config)
    model.set_attn_implementation("anyattn")
    with context_parallel(cp, model), pytest.raises(anyattn.Unsupported, match="chunked attention"):
        model(**jobs.batch_of("plain"))


def test_arguments_of_the_context(cp):
    model = jobs.build("llama")
    with pytest.raises(anyattn.InvalidArgument, match="gradients must be 'mean' or 'sum', got 'max'"):
        context_parallel(cp, model, gradients="max").__enter__()
    with pytest.raises(anyattn.InvalidArgument, match="Linear does not"):
        context_parallel(cp, torch.nn.Linear(1, 1)).__enter__()
    with pytest.raises(anyattn.ContextError, match="placement"), context_parallel(cp, model, placement="somewhere"):
        model(**jobs.batch_of("plain"))
    with context_parallel(cp, model) as division, pytest.raises(anyattn.ContextError, match="call the model first"):
        division.unshard(torch.ones(1, 3))


def test_nested_contexts(cp):
    model, other = jobs.build("llama"), jobs.build("llama")
    for inner in (model, model.model, torch.nn.Sequential(model)):
        with (
            context_parallel(cp, model),
            pytest.raises(anyattn.ContextError, match=r"is nested: .* is divided already"),
            context_parallel(cp, inner),
        ):
            pass
    with context_parallel(cp, model), context_parallel(cp, other):
        assert other(**jobs.batch_of("plain")).loss > 0
    with pytest.raises(anyattn.ContextError, match=r"takes a DeviceMesh, a ProcessGroup, .* got int"):
        context_parallel(3, model).__enter__()


def test_after_it_the_model_is_as_before(cp):
    model, batch = jobs.build("gemma2"), jobs.batch_of("right")
    before = model(**batch)
    with context_parallel(cp, model):
        assert model(**batch).logits.shape[:2] == (1, int(batch["attention_mask"].sum()))
    after = model(**batch)
    torch.testing.assert_close(after.logits, before.logits)
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())


def test_positions_of_three_rows(cp):
    """Of text models that also take images: time, height and width."""
    register()
    config = transformers.Qwen2_5_VLTextConfig(
        **jobs.COMMON,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    )
    model = transformers.Qwen2_5_VLTextModel(config)
    model.set_attn_implementation("anyattn")
    batch = {name: x for name, x in jobs.batch_of("right").items() if name != "labels"}
    batch["position_ids"] = torch.randint(0, 30, (3, 3, 17))
    want = model(**batch).last_hidden_state.flatten(0, 1)
    with context_parallel(cp, model) as division:
        rows = model(**batch).last_hidden_state
        got = division.unshard(rows, dim=1)[0]
    real = batch["attention_mask"].flatten().bool()
    torch.testing.assert_close(got[real], want[real], atol=2e-5, rtol=2e-4)


def test_sizes_of_configs():
    from anyattn.integrations._transformers_batches import sizes_of

    assert sizes_of(jobs.CONFIGS["llama"]()) == {"num_heads": 4, "num_kv_heads": 2}
    assert sizes_of(jobs.CONFIGS["gpt2"]()) == {"num_heads": 4, "num_kv_heads": 4}
    assert sizes_of(transformers.DeepseekV3Config(num_attention_heads=8, num_key_value_heads=8))["num_heads"] == 8


def test_the_collator_makes_the_plan_of_its_rank():
    made = ContextParallelCollator(
        transformers.DataCollatorWithFlattening(), anyattn.ContextParallel((4, 2)), jobs.CONFIGS["llama"]()
    )(jobs.documents())
    assert made["input_ids"].shape == (1, sum(jobs.LENGTHS))
    assert made["plan"]._data.queries.lengths == jobs.LENGTHS
    assert made["plan"]._data.rank == 2


def test_a_mask_function_of_the_models_own(cp, monkeypatch):
    model, batch = jobs.build("llama"), jobs.batch_of("plain")
    made = transformers.masking_utils.create_causal_mask

    def other(*args, **kwargs):
        return made(*args, **kwargs, or_mask_function=lambda b, h, q, k: k == 0)

    monkeypatch.setattr(sys.modules[type(model).__module__], "create_causal_mask", other)
    with context_parallel(cp, model), pytest.raises(anyattn.Unsupported, match="a mask function of its own"):
        model(**batch)


def test_layers_share_plans_and_plans_do_not_stay(cp):
    from anyattn.integrations import _transformers_plan

    model, batch = jobs.build("gemma2"), jobs.batch_of("positions")
    with context_parallel(cp, model) as division:
        model(**batch)
        _, known = _transformers_plan._masks[division.plan]
        assert sorted(pattern.window or 0 for pattern in known) == [0, 3]
        assert sum(made is None for made in known.values()) == 1  # the plan itself
        gone = weakref.ref(division.plan)
        model(**batch)
    assert gone() is None
