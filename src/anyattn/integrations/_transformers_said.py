"""What one attention call of a transformers model says, from its arguments, its mask and its module."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn._errors import DtypeError, InvalidArgument, ShapeError
from anyattn._request import is_block_mask
from anyattn.integrations._layout import Pattern, Shape, lay_out
from anyattn.integrations._transformers_masks import Facts, Noted, check_mask, facts_of, note_traced, noted_on
from anyattn.integrations._transformers_memory import once
from anyattn.integrations._transformers_traced import keys_seen, traced_padding


class Said(NamedTuple):
    """What one call says, besides queries, keys and values."""

    shape: Shape
    pattern: Pattern
    facts: Facts | None
    """Of a 2-D mask."""
    whole: Any
    """A complete mask, or None."""
    options: dict[str, Any]
    position_bias: Tensor | None
    layer: int | None


def read(
    module: torch.nn.Module,
    shape: Shape,
    attention_mask: Any,
    is_causal: bool | None,
    sliding_window: int | None,
    options: dict[str, Any],
    position_bias: Tensor | None,
) -> Said:
    """Everything that a call says, from its arguments, its mask and its module."""
    layer = getattr(module, "layer_idx", None)
    whole = attention_mask if _is_whole(attention_mask) else None
    given = None if whole is not None else attention_mask
    if given is not None:
        check_mask(given, shape.batch)
    noted = None if given is None else noted_on(given)
    facts = None if given is None else facts_of(given)
    elsewhere = facts is not None and (facts.shape.queries, facts.allocated) != (shape.queries, shape.keys)
    if noted is not None and noted.plain and (elsewhere or torch.compiler.is_compiling()):
        given = None  # all are real, of keys that it was not made for too: encoders with a cache have such
    if elsewhere:
        facts = None  # a mask made for other layers: only its values count
    pattern = _pattern(module, facts, noted, is_causal, sliding_window)
    if given is not None and facts is None:
        if torch.compiler.is_compiling():
            whole = note_traced(traced_padding(given, shape, pattern), chunked=given.dtype != torch.bool)
        else:
            facts = _facts_without(given, shape, pattern, layer)
    if facts is not None:  # a static cache is longer than what was written to it
        shape = facts.shape
    return Said(shape, pattern, facts, whole, options, position_bias, layer)


def _pattern(
    module: torch.nn.Module,
    facts: Facts | None,
    noted: Noted | None,
    is_causal: bool | None,
    sliding_window: int | None,
) -> Pattern:
    """What position allows: what the mask was made for, else the argument, else the module.

    A mask comes first, as a complete one does: models that have one may call their causal layers not causal.
    """
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    window = chunk = None
    if noted is not None:
        causal, window, _ = noted
    if facts is not None:
        chunk = facts.pattern.chunk
    if window is None and sliding_window is not None:
        if sliding_window < 1:
            raise InvalidArgument(f"sliding_window must be at least 1, or None for none; got {sliding_window}")
        window = sliding_window - 1
    return Pattern(causal, window, chunk)


def _facts_without(mask: Tensor, shape: Shape, pattern: Pattern, layer: int | None) -> Facts:
    """Facts for a mask that the mask function did not make, or that lost them on the way to another device."""

    def make() -> Facts:
        first = max(mask.shape[1] - shape.keys, 0)  # a sliding cache has dropped the first keys
        numbers = mask[:, first:].cpu()
        # Rows of a static cache that hold nothing yet are after the mask's end.
        keys = keys_seen(mask.shape[1], shape) if pattern.causal else numbers.shape[1]
        used = shape._replace(keys=keys)
        numbers = torch.nn.functional.pad(numbers, (0, keys - numbers.shape[1]))
        real = numbers != 0
        parts = None if mask.dtype == torch.bool else numbers
        layout = lay_out(used, pattern, real, parts, device=mask.device)
        return Facts(used, shape.keys, pattern, real, None, layout, mask.device)

    facts: Facts = once(mask, ("facts", shape, pattern), layer, make)
    return facts


def _is_whole(mask: Any) -> bool:
    """Whether a mask says everything; other shapes than (batch, keys) and 4-D are an error."""
    if mask is None:
        return False
    if is_block_mask(mask):
        return True
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ShapeError(f"attention_mask must be 2-D, 4-D or a BlockMask, got {got}")
    if mask.ndim == 2 and mask.is_floating_point():
        raise DtypeError(f"a 2-D attention_mask must be bool or integers, true for real tokens; got {mask.dtype}")
    return mask.ndim == 4
