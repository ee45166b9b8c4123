"""What ranks run for ``test_transformers_context``: a step divided over them beside the same step in one process."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers
from torch.utils.data import DataLoader, IterableDataset

import anyattn
from anyattn.integrations.transformers import ContextParallelCollator, context_parallel, register

IGNORED = -100
COMMON = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
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
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=128, attn_pdrop=0.0, resid_pdrop=0.0,
        embd_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    ),
}  # fmt: skip
LENGTHS = (13, 1, 30, 7)


def build(name: str, **changes: Any) -> Any:
    """A tiny model in training mode; the same weights everywhere."""
    register()
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="anyattn")
    with torch.no_grad():
        for parameter in model.parameters():  # away from symmetric initial values, sinks included
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.train()


def documents(seed: int = 1) -> list[dict[str, list[int]]]:
    """Features as data sets have them."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 61, (n,), generator=generator).tolist()} for n in LENGTHS]


def batch_of(kind: str) -> dict[str, Any]:
    """A whole batch."""
    if kind in ("positions", "cu_seq_lens"):
        collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=kind == "cu_seq_lens")
        return dict(collator(documents(), return_tensors="pt"))
    ids = torch.randint(3, 61, (3, 17), generator=torch.Generator().manual_seed(1))
    if kind == "plain":
        return {"input_ids": ids, "labels": ids.clone()}
    if kind == "packing":
        packing = anyattn.Packing.from_lengths([5, 0, 9, 17], pad_to_multiple_of=4)
        ids = torch.randint(3, 61, (1, packing.rows), generator=torch.Generator().manual_seed(1))
        first = packing.cu_seqlens_padded[:-1][packing.lengths > 0].long()
        labels = ids.masked_fill(~packing.valid, IGNORED).index_fill(1, first, IGNORED)
        return {"input_ids": ids, "labels": labels, "packing": packing, "position_ids": packing.position_ids[None]}
    mask = torch.ones(3, 17, dtype=torch.long)
    labels = ids.clone()
    if kind == "right":
        mask[1, 11:] = 0
        mask[2, 3:] = 0
    else:
        mask[1, :5] = 0
        mask[2, :16] = 0
        labels[1, 5] = labels[2, 16] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, IGNORED)}


class Step(NamedTuple):
    """Loss, gradients, and logits of real tokens."""

    loss: float
    gradients: dict[str, torch.Tensor]
    logits: torch.Tensor


def real_tokens(batch: dict[str, Any]) -> torch.Tensor:
    """Rows of the flattened batch that hold a token."""
    if batch.get("attention_mask") is not None:
        return batch["attention_mask"].flatten().bool()
    if "packing" in batch:
        return batch["packing"].valid
    return torch.ones(batch["input_ids"].numel(), dtype=torch.bool)


def alone(name: str, kind: str, **more: Any) -> Step:
    """The step in one process."""
    model, batch = build(name), batch_of(kind)
    out = model(**batch, **more)
    out.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    return Step(out.loss.item(), gradients, out.logits.detach().flatten(0, 1)[real_tokens(batch)])


def averaged(seat: Any, model: Any, by: int) -> dict[str, torch.Tensor]:
    """The sum over ranks of the gradients, divided."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad.clone()
        dist.all_reduce(grad, group=seat.group if isinstance(seat.group, dist.ProcessGroup) else None)
        found[name] = grad / by
    return found


def divided(seat: Any, name: str, kind: str, comm: str, gradients: str = "mean", **more: Any) -> Step:
    """The step over ranks; comm "group" hands over the group as it is."""
    model, batch = build(name), batch_of(kind)
    cp = seat.group if comm == "group" else anyattn.ContextParallel(seat.group, comm=comm)
    with context_parallel(cp, model, gradients=gradients) as division:
        out = model(**batch, **more)
        out.loss.backward()
        logits = division.unshard(out.logits.detach())[0]
    summed = averaged(seat, model, seat.size if gradients == "mean" else 1)
    return Step(out.loss.item(), summed, logits[real_tokens(batch)])


def several(seat: Any, name: str, kinds: tuple[str, ...], comm: str) -> list[Step]:
    """One after the other."""
    return [divided(seat, name, kind, comm) for kind in kinds]


def shard_weights(seat: Any, model: Any) -> None:
    """By FSDP2."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.DeviceMesh.from_group(seat.group, "cpu")
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)


def wrapped(seat: Any, how: str) -> Step:
    """In a wrapper that averages, or with a feature of training."""
    model, batch = build("gemma2"), batch_of("positions")
    outer = model
    if how == "ddp":
        outer = torch.nn.parallel.DistributedDataParallel(model, process_group=seat.group)
    elif how == "fsdp2":
        shard_weights(seat, model)
    elif how == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif how == "compiled":
        outer = torch.compile(model, backend="eager")
    elif how == "embeddings":
        batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    elif how == "tuple":
        batch["return_dict"] = False
    cp = anyattn.ContextParallel(seat.group, comm="p2p")
    with context_parallel(cp, outer) as division:
        if how == "fsdp2 inside":  # as a Trainer does
            shard_weights(seat, model)
        out = outer(**batch)
        loss, logits = (out[0], out[1]) if how == "tuple" else (out.loss, out.logits)
        loss.backward()
        logits = division.unshard(logits.detach())[0]
    if how.startswith("fsdp2"):
        gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
    elif how == "ddp":
        gradients = {n: p.grad for n, p in model.named_parameters()}
    else:
        gradients = averaged(seat, model, seat.size)
    return Step(loss.item(), gradients, logits)


def accumulated(seat: Any) -> dict[str, torch.Tensor]:
    """Gradients of two batches under one number of tokens; compare :func:`accumulated_alone`."""
    model = build("llama")
    with context_parallel(anyattn.ContextParallel(seat.group), model):
        accumulate(model)
    return averaged(seat, model, seat.size)


def accumulate(model: Any) -> None:
    """As a Trainer does with gradient_accumulation_steps=2."""
    batches = [batch_of("positions"), batch_of("right")]
    total = sum((b["labels"][:, 1:] != IGNORED).sum() for b in batches)
    for batch in batches:
        model(**batch, num_items_in_batch=total).loss.backward()


def by_own_plan(seat: Any) -> Step:
    """Without the context: the caller divides, and passes the plan."""
    model, batch = build("gemma2"), batch_of("positions")
    packing = anyattn.Packing.from_position_ids(batch["position_ids"][0])
    plan = anyattn.ContextParallel(seat.group).plan(packing, num_heads=4, num_kv_heads=2)
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    mine = plan.shard(labels, dim=1, fill=IGNORED)
    out = model(
        input_ids=plan.shard(batch["input_ids"], dim=1), position_ids=plan.position_ids[None], plan=plan,
        labels=mine, shift_labels=mine, num_items_in_batch=(labels != IGNORED).sum(), use_cache=False,
    )  # fmt: skip
    out.loss.backward()
    dist.all_reduce(total := out.loss.detach().clone(), group=seat.group)
    return Step(total.item(), averaged(seat, model, 1), plan.unshard(out.logits.detach(), dim=1)[0])


def own_plan_without(seat: Any, left_out: tuple[str, ...], name: str = "llama") -> Any:
    """The same for one document, without some of the arguments; returns the loss."""
    model, ids = build(name), batch_of("plain")["input_ids"].view(1, -1)
    packing = anyattn.Packing.from_lengths([ids.shape[1]])
    plan = anyattn.ContextParallel(seat.group).plan(packing, placement="contiguous")
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
    mine = plan.shard(labels, dim=1, fill=IGNORED)
    batch = {
        "inputs_embeds": plan.shard(model.get_input_embeddings()(ids), dim=1), "position_ids": plan.position_ids[None],
        "labels": mine, "shift_labels": mine, "num_items_in_batch": (labels != IGNORED).sum(),
    }  # fmt: skip
    given = {key: value for key, value in batch.items() if key not in left_out}
    loss = model(**given, plan=plan).loss
    return None if loss is None else loss.item()


def unsharded_loss(seat: Any, gradients: str) -> Step:
    """A loss of one's own, of logits that were put together again, which every rank computes."""
    model, batch = build("llama"), batch_of("positions")
    labels = batch.pop("labels")
    with context_parallel(anyattn.ContextParallel(seat.group), model, gradients=gradients) as division:
        logits = division.unshard(model(**batch).logits)[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], labels[0, 1:], ignore_index=IGNORED)
        loss.backward()
    return Step(loss.item(), averaged(seat, model, seat.size if gradients == "mean" else 1), logits.detach())


def collated(seat: Any) -> list[float]:
    """Losses of batches whose plans were made by the collator, and came through a pipe."""
    model = build("mistral")
    cp = anyattn.ContextParallel(seat.group)
    collator = ContextParallelCollator(transformers.DataCollatorWithFlattening(), cp, model.config)
    collator = pickle.loads(pickle.dumps(collator))
    data = [feature for seed in range(2) for feature in documents(seed)]
    loader = DataLoader(data, batch_size=len(LENGTHS), collate_fn=collator)
    found = []
    with torch.no_grad(), context_parallel(cp, model) as division:
        for made in loader:
            batch = pickle.loads(pickle.dumps(made))
            found.append(model(**batch).loss.item())
            assert division.plan._data == batch["plan"]._data
    return found


def given_different_batches(seat: Any) -> None:
    """Same lengths, other tokens."""
    model, batch = build("llama"), batch_of("plain")
    batch["input_ids"] = batch["input_ids"] + seat.rank % 2
    with context_parallel(anyattn.ContextParallel(seat.group), model):
        model(**batch)


# --- Trainer ---


def train(cp: anyattn.ContextParallel | None, batch_size: int, **options: Any) -> tuple[list[float], dict[str, Any]]:
    """Losses that a Trainer logs, its evaluation loss last, and the weights it ends with."""
    model = build("gemma2")
    data = [feature for seed in range(8) for feature in documents(seed)]
    collator: Any = transformers.DataCollatorWithFlattening()
    if cp is not None:
        collator = ContextParallelCollator(collator, cp, model.config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, per_device_train_batch_size=batch_size, per_device_eval_batch_size=batch_size, max_steps=3,
            logging_steps=1, learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True, seed=3,
            disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False, optim="sgd", **options,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=model, args=arguments, data_collator=collator, train_dataset=data, eval_dataset=data
        )
        trainer.remove_callback(transformers.PrinterCallback)
        within = (
            contextlib.nullcontext() if cp is None else context_parallel(cp, model, accelerator=trainer.accelerator)
        )
        with within:
            trainer.train()
            evaluated = trainer.evaluate()["eval_loss"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [*losses, evaluated], {name: p.detach().clone() for name, p in model.named_parameters()}


def train_over_ranks(seat: Any, cp_size: int, **options: Any) -> tuple[list[float], dict[str, Any]]:
    """On all processes: (data, context)."""
    with as_torchrun_does(seat):
        mesh = dist.init_device_mesh("cpu", (seat.size // cp_size, cp_size), mesh_dim_names=("dp", "cp"))
        return train(anyattn.ContextParallel(mesh["cp"]), 2, **options)


@contextlib.contextmanager
def as_torchrun_does(seat: Any) -> Iterator[None]:
    """What accelerate reads from the environment."""
    names = {"RANK": seat.rank, "WORLD_SIZE": seat.size, "LOCAL_RANK": seat.rank, "LOCAL_WORLD_SIZE": seat.size}
    given = {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    os.environ |= given
    try:
        yield
    finally:
        for name in given:
            del os.environ[name]


class Stream(IterableDataset[dict[str, list[int]]]):
    """Documents one after the other."""

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        yield from documents()


def prepared(seat: Any, dim: str, dispatch: bool | None) -> list[int]:
    """First tokens of the batches that an accelerator's loader gives a rank of a mesh (dp, cp)."""
    import accelerate

    with as_torchrun_does(seat):
        mesh = dist.init_device_mesh("cpu", (2, seat.size // 2), mesh_dim_names=("dp", "cp"))
        accelerator = accelerate.Accelerator(
            cpu=True, dataloader_config=accelerate.DataLoaderConfiguration(dispatch_batches=dispatch)
        )
        collator = transformers.DataCollatorWithFlattening()
        loader = DataLoader(Stream(), batch_size=1, collate_fn=lambda x: collator(x, return_tensors="pt"))
        with context_parallel(anyattn.ContextParallel(mesh[dim]), build("llama"), accelerator=accelerator):
            found = [batch["input_ids"][0, 0].item() for batch in accelerator.prepare(loader)]
        assert "prepare_data_loader" not in vars(accelerator)
        return found


def accumulated_alone() -> dict[str, torch.Tensor]:
    """In one process."""
    model = copy.deepcopy(build("llama"))
    accumulate(model)
    return {n: p.grad for n, p in model.named_parameters()}
