"""A small Llama, and three ways to run the same step with it: packed, padded, and one document at a time.

A way takes a model and a batch of documents, runs forward and backward, and returns the loss: the sum of the
cross-entropies of all tokens that have a predecessor, divided by their number. Gradients add up in the parameters. The
documents and the loss are the same in every way; only what the model sees at once differs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn._errors import MissingExtra
from anyattn._packing import Packing
from anyattn.demo.data import VOCABULARY
from anyattn.integrations import transformers as integration

#: The target of a token that has no successor.
IGNORED = -100
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the model."""

    hidden: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    feed_forward: int = 384


def build(sizes: Sizes, longest: int, attention: str, seed: int) -> Any:
    """A Llama with random weights, float32, on the CPU; the same for the same sizes and seed.

    Raises:
        MissingExtra: transformers is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise MissingExtra("anyattn demo", "cli,plot,transformers", "transformers") from None
    integration.register()
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=sizes.hidden, intermediate_size=sizes.feed_forward,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim, max_position_embeddings=longest, bos_token_id=256, eos_token_id=257,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()


def exact_twin(model: Any, dtype: torch.dtype) -> Any:
    """The same weights in a wider dtype, computing in it throughout, through torch's own attention.

    transformers' eager softmax and its RMSNorm always compute in float32, so both are replaced by torch's.
    """
    twin = copy.deepcopy(model).to(dtype)
    twin.set_attn_implementation("sdpa")
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(child.weight.shape[0], child.variance_epsilon, dtype=dtype)
                norm.weight = child.weight
                setattr(parent, name, norm.to(child.weight.device))
    return twin


# --- the three ways ---


class Row(NamedTuple):
    """A packed batch: all documents in one row, each one's room rounded up to a multiple, padding between them."""

    packing: Packing
    inputs: Tensor
    """int64 (rows,)."""
    positions: Tensor
    """int64 (rows,), within the document."""
    targets: Tensor
    """int64 (rows,): the next token; IGNORED where there is none, and in padding."""


def in_one_row(documents: Sequence[Tensor], multiple: int, device: torch.device) -> Row:
    """Documents in one row, with room for each that is a multiple of ``multiple``."""
    packing = Packing.from_lengths([len(d) for d in documents], pad_to_multiple_of=multiple, device=device)
    inputs = packing.unpack(torch.cat(list(documents)).to(device))
    positions = packing.unpack(torch.cat([torch.arange(len(d)) for d in documents]).to(device))
    targets = torch.full_like(inputs, IGNORED)
    targets[packing.valid] = torch.cat([_targets(d) for d in documents]).to(device)
    return Row(packing, inputs, positions, targets)


def packed(model: Any, documents: Sequence[Tensor], multiple: int) -> float:
    """All documents in one row, each one's room rounded up to a multiple; what is between them is padding."""
    packing, inputs, positions, targets = in_one_row(documents, multiple, model.device)
    logits = model(input_ids=inputs[None], position_ids=positions[None], packing=packing, use_cache=False).logits
    return backward(logits[0], targets, count(documents))


def padded(model: Any, documents: Sequence[Tensor]) -> float:
    """A row per document, as long as the longest, and a 2-D mask."""
    pad = torch.nn.utils.rnn.pad_sequence
    inputs = pad(list(documents), batch_first=True)
    targets = pad([_targets(d) for d in documents], batch_first=True, padding_value=IGNORED)
    lengths = torch.tensor([len(d) for d in documents])
    mask = torch.arange(inputs.shape[1]) < lengths[:, None]
    inputs, targets, mask = (x.to(model.device) for x in (inputs, targets, mask))
    logits = model(input_ids=inputs, attention_mask=mask, use_cache=False).logits
    return backward(logits.flatten(0, 1), targets.flatten(), count(documents))


def one_at_a_time(model: Any, documents: Sequence[Tensor]) -> float:
    """A forward and a backward for every document."""
    total = 0.0
    for document in documents:
        logits = model(input_ids=document[None].to(model.device), use_cache=False).logits
        total += backward(logits[0], _targets(document).to(model.device), count(documents))
    return total


def _targets(document: Tensor) -> Tensor:
    """The next token of each; the last one has none."""
    return torch.cat([document[1:], document.new_full((1,), IGNORED)])


def count(documents: Sequence[Tensor]) -> int:
    """Tokens that have a predecessor."""
    return sum(len(d) - 1 for d in documents)


def backward(logits: Tensor, targets: Tensor, count: int) -> float:
    """Add the gradients of the summed cross-entropies over ``count``; return that loss."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = torch.nn.functional.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="none")
    (losses.sum() / count).backward()
    return float(losses.detach().double().sum() / count)


# --- training ---


def computing_in(dtype: torch.dtype, device_type: str) -> AbstractContextManager[Any]:
    """A dtype of DTYPES, by autocast where it is not float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device_type, dtype)


@dataclass(slots=True)
class Trainer:
    """A model, its optimizer, and the way its steps are run."""

    model: Any
    way: Callable[[Any, Sequence[Tensor]], float]
    optimizer: torch.optim.Optimizer
    precision: Callable[[], AbstractContextManager[Any]]

    @classmethod
    def of(
        cls,
        model: Any,
        way: Callable[[Any, Sequence[Tensor]], float],
        learning_rate: float,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Trainer:
        """With the optimizer that every way uses."""
        return cls(model, way, torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95)), precision)

    def look(self, documents: Sequence[Tensor], way: Callable[[Any, Sequence[Tensor]], float] | None = None) -> float:
        """Forward and backward, and the loss; no weight changes, and no gradient stays."""
        with self.precision():
            loss = (way or self.way)(self.model, documents)
        self.model.zero_grad(set_to_none=True)
        return loss

    def step(self, documents: Sequence[Tensor]) -> float:
        """One training step; the loss before it."""
        with self.precision():
            loss = self.way(self.model, documents)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss
