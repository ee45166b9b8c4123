"""Train a small causal language model with transformers' Trainer on packed documents, on one process or several.

    python examples/finetune_trainer.py
    torchrun --nproc-per-node 2 examples/finetune_trainer.py
    torchrun --nproc-per-node 8 examples/finetune_trainer.py --cp 4

It needs anyattn[transformers] and accelerate. Python's own language reference is the text, as bytes, and the model is a
small Gemma 2 with random weights, so nothing is downloaded; --model takes a name or folder for from_pretrained.

transformers' DataCollatorWithFlattening packs documents into one row, and attn_implementation="anyattn" keeps them
apart. Under torchrun the ranks form a mesh (dp, cp), and context_parallel divides each batch over the cp ranks of a
group: the losses are those of one process, but for rounding.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from contextlib import nullcontext
from pydoc_data.topics import topics  # type: ignore[import-not-found, unused-ignore]
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh

import anyattn
from anyattn.integrations.transformers import ContextParallelCollator, context_parallel, register

CONFIG = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


class Printer(transformers.TrainerCallback):  # type: ignore[misc]
    """Prints a line per step, on the first process."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Called by the Trainer."""
        if state.is_world_process_zero and logs and "loss" in logs:
            print(f"step {state.global_step:3}  loss {logs['loss']:.4f}", flush=True)


def documents(tokenize: Any, longest: int) -> list[dict[str, list[int]]]:
    """Topics, cut to a length."""
    return [{"input_ids": tokenize(topics[name])[:longest]} for name in sorted(topics)]


def model_and_tokens(name: str | None) -> tuple[Any, Any]:
    """The model, and what makes tokens of a text."""
    register()
    if name is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, attn_implementation="anyattn")
        return model, lambda text: tokenizer(text)["input_ids"]
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**CONFIG)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="anyattn")
    return model, lambda text: list(text.encode())


def main() -> None:
    """Options, and the Trainer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", help="default: a small one with random weights")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--documents", type=int, default=4, help="in a step, over all ranks")
    parser.add_argument("--longest", type=int, default=1024, help="tokens of a document")
    parser.add_argument("--cp", type=int, help="ranks that share tokens; default: all")
    options = parser.parse_args()
    world, on_gpus = int(os.environ.get("WORLD_SIZE", 1)), torch.cuda.is_available()
    cp_size = world if options.cp is None else options.cp
    if cp_size < 1 or world % cp_size or options.documents % (world // cp_size):
        parser.error(f"--cp must divide the {world} ranks, and world / cp the documents; got {cp_size}")
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, max_steps=options.steps, per_device_train_batch_size=options.documents // (world // cp_size),
            learning_rate=3e-3, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[],
            use_cpu=not on_gpus, bf16=on_gpus, disable_tqdm=True, dataloader_num_workers=1,
            dataloader_pin_memory=on_gpus, remove_unused_columns=False, ddp_find_unused_parameters=False,
        )  # fmt: skip
        kind = arguments.device.type  # under torchrun, this starts torch.distributed
        model, tokenize = model_and_tokens(options.model)
        collator: Any = transformers.DataCollatorWithFlattening()
        cp = None
        if dist.is_initialized():
            mesh = init_device_mesh(kind, (world // cp_size, cp_size), mesh_dim_names=("dp", "cp"))
            cp = anyattn.ContextParallel(mesh["cp"])
            collator = ContextParallelCollator(collator, cp, model.config)  # plans are made by the loader's worker
        trainer = transformers.Trainer(
            model=model, args=arguments, data_collator=collator, train_dataset=documents(tokenize, options.longest),
            callbacks=[Printer()],
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        divided = nullcontext() if cp is None else context_parallel(cp, model, accelerator=trainer.accelerator)
        with divided:
            trainer.train()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
