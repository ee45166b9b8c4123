"""A small Llama, and three ways to run the same step with it: packed, padded, and one document at a time.

A way takes a model and a batch of documents, runs forward and backward, and returns the loss: the sum of the
cross-entropies of all tokens that have a predecessor, divided by their number. Gradients add up in the parameters. The
documents and the loss are the same in every way; only what the model sees at once differs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyattn._errors import MissingExtra
from anyattn._packing import Packing
from anyattn.demo.data import VOCABULARY
from anyattn.integrations import transformers as integration

_IGNORED = -100


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


def packed(model: Any, documents: Sequence[Tensor], multiple: int) -> float:
    """All documents in one row, each one's room rounded up to a multiple; what is between them is padding."""
    device = model.device
    packing = Packing.from_lengths([len(d) for d in documents], pad_to_multiple_of=multiple, device=device)
    inputs = packing.unpack(torch.cat(list(documents)).to(device))
    positions = packing.unpack(torch.cat([torch.arange(len(d)) for d in documents]).to(device))
    targets = torch.full_like(inputs, _IGNORED)
    targets[packing.valid] = torch.cat([_targets(d) for d in documents]).to(device)
    logits = model(input_ids=inputs[None], position_ids=positions[None], packing=packing, use_cache=False).logits
    return _backward(logits[0], targets, _count(documents))


def padded(model: Any, documents: Sequence[Tensor]) -> float:
    """A row per document, as long as the longest, and a 2-D mask."""
    pad = torch.nn.utils.rnn.pad_sequence
    inputs = pad(list(documents), batch_first=True)
    targets = pad([_targets(d) for d in documents], batch_first=True, padding_value=_IGNORED)
    lengths = torch.tensor([len(d) for d in documents])
    mask = torch.arange(inputs.shape[1]) < lengths[:, None]
    inputs, targets, mask = (x.to(model.device) for x in (inputs, targets, mask))
    logits = model(input_ids=inputs, attention_mask=mask, use_cache=False).logits
    return _backward(logits.flatten(0, 1), targets.flatten(), _count(documents))


def one_at_a_time(model: Any, documents: Sequence[Tensor]) -> float:
    """A forward and a backward for every document."""
    total = 0.0
    for document in documents:
        logits = model(input_ids=document[None].to(model.device), use_cache=False).logits
        total += _backward(logits[0], _targets(document).to(model.device), _count(documents))
    return total


def _targets(document: Tensor) -> Tensor:
    """The next token of each; the last one has none."""
    return torch.cat([document[1:], document.new_full((1,), _IGNORED)])


def _count(documents: Sequence[Tensor]) -> int:
    return sum(len(d) - 1 for d in documents)


def _backward(logits: Tensor, targets: Tensor, count: int) -> float:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = torch.nn.functional.cross_entropy(wide, targets, ignore_index=_IGNORED, reduction="none")
    (losses.sum() / count).backward()
    return float(losses.detach().double().sum() / count)


# --- training ---


@dataclass(slots=True)
class Trainer:
    """A model, its optimizer, and the way its steps are run."""

    model: Any
    way: Callable[[Any, Sequence[Tensor]], float]
    optimizer: torch.optim.Optimizer
    precision: Callable[[], AbstractContextManager[Any]]

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
