"""Which transformers models and batches can be divided over ranks; all others are refused by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn._errors import ContextError, InvalidArgument, MissingExtra, Unsupported
from anyattn.integrations._transformers_batches import DESCRIPTIONS, PER_TOKEN
from anyattn.integrations._transformers_masks import check_mask
from anyattn.integrations._transformers_models import need_of


def transformers_model(model: Any) -> Any:
    """The transformers model in wrappers."""
    try:
        from transformers import PreTrainedModel
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise MissingExtra("context_parallel", "transformers", "transformers") from None
    if not isinstance(model, torch.nn.Module):
        raise InvalidArgument(f"model must be a transformers model, got {type(model).__name__}")
    found = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)
    if found is None:
        raise InvalidArgument(f"model must be, or wrap, a transformers model; {type(model).__name__} does not")
    return found


def parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def check_model(model: Any) -> None:
    """Refuse models whose tokens meet elsewhere than in attention, or whose loss is not a sum over tokens."""
    name, why = type(model).__name__, None
    need = next((x for part in model.modules() if (x := need_of(getattr(part, "config", None))) is not None), None)
    ropes = {str(rope) for part in model.modules() for rope in _ropes(part)}
    mixing = next((type(p).__name__ for p in model.modules() if isinstance(p, _MIXING)), None)
    if model.config.is_encoder_decoder:
        why = "it is an encoder-decoder, whose cross-attention has keys of another length"
    elif getattr(model, "loss_type", None) not in (None, "ForCausalLM"):
        why = f"it is no causal language model (its loss is {model.loss_type})"
    elif need is not None:
        why = f"it computes with a mask of the whole sequence itself: {need.why}"
    elif mixing is not None:
        why = f"tokens meet in its {mixing}, not in attention alone"
    elif ropes & {"dynamic", "longrope"}:
        why = f"its rotary frequencies ({', '.join(sorted(ropes))}) depend on the longest position in the batch"
    elif not any(p.kind is p.VAR_KEYWORD for p in parameters(model).values()):
        why = "its forward takes no further keyword arguments, by which a plan reaches attention"
    elif not _takes_positions(model):
        why = "its forward takes no position_ids, and it would count a rank's tokens from its first"
    if why is not None:
        raise Unsupported(f"context_parallel cannot divide {name}: {why}")


def _takes_positions(model: Any) -> bool:
    """Whether the forward of a model, or one that its class overrides, names ``position_ids``."""
    forwards: list[Any] = [model.forward, *(vars(c)["forward"] for c in type(model).mro() if "forward" in vars(c))]
    return any("position_ids" in inspect.signature(forward).parameters for forward in forwards)


class Positions(NamedTuple):
    """How a model counts positions where it is given none."""

    otherwise: bool
    """Neither from 0 nor by row alone, but from padding_idx + 1 or by which tokens are padding."""
    by_mask: bool
    """From 0, at the first token that attention_mask says is real."""


def positions_of(model: Any) -> Positions:
    """Read from the forwards of the model's modules; tables of embeddings are given the positions that others count."""
    tables = torch.nn.Embedding
    kinds = {kind for part in model.modules() if not isinstance(part, tables) for kind in type(part).mro()}
    forwards = [vars(kind).get("forward") for kind in kinds if kind.__module__.startswith(_MODELS)]
    source = "".join(inspect.getsource(forward) for forward in forwards if forward is not None)
    return Positions("create_position_ids_from_" in source, re.search(r"position_ids = .*cumsum\(", source) is not None)


#: transformers' own, and those that it loads from the hub.
_MODELS = ("transformers.models.", "transformers_modules.")


def check_positions(model: Any, counted: Positions, batch: Mapping[str, Any], explicit: bool) -> None:
    """Refuse a batch without positions where the model would not count 0, 1, ... along each row.

    Args:
        model: named in the message.
        counted: how it does count.
        batch: all arguments by name.
        explicit: the batch describes its documents, and positions are within those.
    """
    if batch.get("position_ids") is not None:
        return
    mask = batch.get("attention_mask")
    if counted.otherwise:
        how = "from another position than 0, or by which tokens are padding"
    elif (
        counted.by_mask and not explicit and mask is not None and bool(((mask[:, :-1] == 0) & (mask[:, 1:] != 0)).any())
    ):
        how = "from the first token after padding"
    else:
        return
    raise Unsupported(
        f"{type(model).__name__} counts positions {how}, and context_parallel from 0 on: pass position_ids, as the "
        "model would count them"
    )


_MIXING = (torch.nn.modules.conv._ConvNd, torch.nn.RNNBase, torch.nn.modules.batchnorm._BatchNorm)


def _ropes(part: torch.nn.Module) -> list[Any]:
    """Kinds of rotary positions of a module; some have one per kind of layer."""
    kind = getattr(part, "rope_type", None)
    return list(kind.values()) if isinstance(kind, dict) else [kind]


def named(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward by name."""
    names = list(parameters(model))
    return {**dict(zip(names, args, strict=False)), **kwargs}


def check_batch(batch: dict[str, Any]) -> None:
    mask = batch.get("attention_mask")
    if batch.get("past_key_values") is not None or batch.get("use_cache"):
        raise Unsupported("context_parallel divides training and evaluation; generation, with a cache of keys, is not")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim == 4):
        raise Unsupported(
            "context_parallel takes a 2-D attention_mask or a packing; a 4-D mask or BlockMask is of whole sequences"
        )
    keep = batch.get("logits_to_keep", 0)
    if isinstance(keep, Tensor) or keep:
        raise Unsupported("logits_to_keep counts rows of a whole sequence, and a rank has some of them: leave it out")
    if (batch.get("input_ids") is None) == (batch.get("inputs_embeds") is None):
        raise ContextError("the model must be given input_ids or inputs_embeds")
    if mask is not None:
        check_mask(mask, len(batch["inputs_embeds" if batch.get("input_ids") is None else "input_ids"]))
    known = {*PER_TOKEN, *DESCRIPTIONS, "position_ids", "num_items_in_batch"}
    for name, value in batch.items():
        if isinstance(value, Tensor) and name not in known:
            raise Unsupported(f"context_parallel does not know how to divide {name}, of shape {tuple(value.shape)}")


def check_loss(model: Any) -> None:
    """Refuse labels where the model's own loss does not take shifted ones."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    source = inspect.getsource(model.forward)
    if model.loss_function is not ForCausalLMLoss or ("loss_function(" not in source and "shift_labels" not in source):
        raise Unsupported(
            f"{type(model).__name__} has a loss of its own, which does not take shifted labels: pass no labels, and "
            "compute it from the logits"
        )


def check_ran(model: Any, attended: int, output: Any) -> None:
    name, layers = type(model).__name__, getattr(model.config.get_text_config(), "num_hidden_layers", 1)
    if attended < layers:
        raise Unsupported(
            f"{attended} of {name}'s {layers} layers attended through anyattn: the others mix tokens in another "
            "way, or the model was not given attn_implementation='anyattn'"
        )
    for field, what in (("aux_loss", "a loss over all tokens of the batch"), ("pooler_output", "one of all tokens")):
        if getattr(output, field, None) is not None:
            raise Unsupported(f"{name} returns {field}, {what}, and a rank has some of them: turn it off")
