"""The mask function that transformers calls, once per forward and kind of layer.

transformers describes a mask by functions of indices. Those that anyattn knows (causal, sliding window, chunked,
bidirectional, packed by positions) become a Packing, made here and carried by the returned mask as an attribute: layers
find all they need on it and wait for nothing. Anything else, everything under ``torch.compile`` and a decoding step
that might be compiled become transformers' own complete 4-D mask; that of a decoding step is read by the first layer
that turns out not to be compiled.

What is returned is a 2-D tensor, because that is what passes through ``generate`` and gradient checkpointing unharmed:
bool, True for a real token, or integers, 0 for padding and else the number of the token's chunk. It counts from the
very first token to the last key that holds something, so it may be handed in again. A mask comes back where nothing is
masked too: some models say of layers with a causal mask that they are not causal, and mean that their mask says it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn._errors import PackingError, ShapeError
from anyattn.integrations import _transformers_cached as cached
from anyattn.integrations._layout import Layout, Pattern, Shape, documents_of, lay_out, may_restart, several
from anyattn.integrations._transformers_decoding import note_decoding
from anyattn.integrations._transformers_functions import Known, recognize
from anyattn.integrations._transformers_memory import documents_at
from anyattn.integrations._transformers_models import as_added, need_of_mask

_ATTRIBUTE = "_anyattn_facts"
_TRACED = "_anyattn_traced"
_NOTED = "_anyattn_noted"
#: The positions that came with the mask that is asked for next. transformers keeps them from its mask functions where
#: there is a cache or a 2-D mask.
positions_given: ContextVar[Tensor | None] = ContextVar("positions_given", default=None)
#: What a mask made under ``torch.compile`` was made for.
PLAIN_PATTERN, CHUNKS = "pattern", "chunks"


@dataclass(frozen=True, eq=False)
class Facts:
    """What one mask of one forward says."""

    shape: Shape
    """keys: those that hold something."""
    allocated: int
    """Key rows that layers will pass; more than ``shape.keys`` with a static cache."""
    pattern: Pattern
    real: Tensor | None
    """bool (B, K) on the CPU; None: no padding."""
    documents: Tensor | None
    """integers (B, Q) on the CPU: documents that were found by positions."""
    layout: Layout
    device: torch.device | None = None
    """Where the layout lives."""
    origin: Tensor | None = None
    """int64 (B,) on the CPU: the key row of each sequence's first token, where the pattern has chunks."""
    looked: bool = False
    """Positions were looked at: without ``documents`` there is one per entry."""
    mixed: bool = False
    """Queries see cached keys of several documents, as far as the mask says."""
    version: int | None = None
    """Of the mask that these are facts of; None: it does not say when it is written to."""

    @property
    def plain(self) -> bool:
        """Nothing is masked but by the pattern."""
        return self.real is None and self.documents is None


class Noted(NamedTuple):
    """What holds of a 2-D mask of the mask function's whatever its values are, and in compiled regions too."""

    causal: bool
    window: int | None
    plain: bool
    """The two above are all that it said when it was made, and all keys of its layers hold something."""


def facts_of(mask: Tensor) -> Facts | None:
    """What the mask function noted on a mask that was not written to since."""
    if torch.compiler.is_compiling():
        return None
    facts: Facts | None = getattr(mask, _ATTRIBUTE, None)
    return None if facts is None or facts.version != version_of(mask) else facts


def noted_on(mask: Tensor) -> Noted | None:
    """What the mask function noted for compiled regions and for masks that are written to; None: not its mask."""
    found: Noted | None = getattr(mask, _NOTED, None)
    return found


def note(mask: Tensor, facts: Facts) -> Tensor:
    """Note facts on a 2-D mask."""
    setattr(mask, _ATTRIBUTE, facts)
    causal, window, chunk = facts.pattern
    plain = facts.plain and chunk is None and facts.shape.keys == facts.allocated
    setattr(mask, _NOTED, Noted(causal, window, plain))
    return mask


def version_of(mask: Tensor) -> int | None:
    """How often a tensor was written to; None: it does not say."""
    return None if mask.is_inference() else mask._version


def traced_pattern(mask: Any) -> str | None:
    """What a mask was made for under ``torch.compile``; None: by the user, or elsewhere."""
    found: str | None = getattr(mask, _TRACED, None)
    return found


def note_traced(mask: Tensor, chunked: bool) -> Tensor:
    """Say on a mask made under ``torch.compile`` that position and padding are all that is in it; or chunks too."""
    setattr(mask, _TRACED, CHUNKS if chunked else PLAIN_PATTERN)
    return mask


def check_mask(mask: Tensor, batch: int) -> None:
    """Refuse a tensor that is no mask of this batch: one that is neither (batch, keys) nor 4-D.

    Raises:
        ShapeError: it has other dims, or another batch size.
    """
    if mask.ndim not in (2, 4) or (mask.ndim == 2 and mask.shape[0] != batch):
        raise ShapeError(
            f"attention_mask must be 2-D, 4-D or a BlockMask; for {batch} batch entries, 2-D is ({batch}, keys); got "
            f"{tuple(mask.shape)}"
        )


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor:
    """A mask as ``transformers.AttentionMaskInterface`` wants it; see the module's docstring.

    Args:
        batch_size: B.
        q_length: Q.
        kv_length: key rows that the layers will pass.
        q_offset: position of the first query.
        kv_offset: position of the first key row.
        mask_function: (batch, head, query, key indices) -> visible.
        attention_mask: bool (B, positions), or None.
        device: of the mask.
        **options: handed on to transformers' own mask function, where that is used.

    Returns:
        A 2-D mask with facts, or a complete 4-D mask.

    Raises:
        ShapeError: an attention mask of another batch size.
    """
    # Names from the module itself: torch 2.11 does not compile an import from transformers' lazy package.
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    if attention_mask is not None:
        check_mask(attention_mask, batch_size)
    if mask_function is None:
        mask_function = causal_mask_function
    tracing = _tracing(attention_mask)
    positions, cache = (None, None) if tracing else (positions_given.get(), cached.take())
    if positions is not None:
        positions_given.set(None)
    known = None if tracing or options.get("use_vmap") else recognize(mask_function)
    placed = None
    need = need_of_mask(options.get("config"))
    if known is not None and need is None and not _must_materialize(options, packed=known.documents is not None):
        placed = _place(known.pattern, q_length, kv_length, q_offset, kv_offset)
    if known is None or placed is None:
        mask = sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, device=device,
            **{**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
        )  # fmt: skip
        if need is not None and need.additive:
            return as_added(mask, options.get("dtype", torch.float32))
        mask = _without_padded_queries(mask, attention_mask, q_offset, options)
        if tracing:
            return note_traced(mask, _is_chunked(options))
        shape = Shape(batch_size, q_length, kv_length)
        if known is not None and _mixed(cache, known.pattern, shape, q_offset, kv_offset, attention_mask):
            cached.refuse_several()
        return note_decoding(_apart(mask, positions, cache, shape, q_offset, kv_offset, attention_mask))
    shape = Shape(batch_size, q_length, placed)
    return _with_facts(known, shape, kv_length, kv_offset, attention_mask, positions, cache, torch.device(device))


def _with_facts(
    known: Known,
    shape: Shape,
    allocated: int,
    kv_offset: int,
    given: Tensor | None,
    positions: Tensor | None,
    cache: Any,
    device: torch.device,
) -> Tensor:
    """A 2-D mask with facts; ``shape`` is of the keys that hold something, ``given`` the caller's mask."""
    pattern, documents, left = known
    seen = kv_offset + shape.keys
    if pattern.chunk is not None and seen <= pattern.chunk:
        pattern = pattern._replace(chunk=None)  # all within the first one, also of a sequence that begins later
    real = _real_keys(given, kv_offset, shape.keys)
    host = _documents(shape, pattern, documents, positions, real)
    origin = None if pattern.chunk is None or left is None else left.cpu().long().expand(shape.batch) - kv_offset
    layout = lay_out(shape, pattern, real, host, origin=origin, device=device)
    mask = _from_the_start(None if real is None and not kv_offset else given, shape.batch, seen, device)
    if pattern.chunk is not None and left is not None:
        mask = _numbered(mask, pattern.chunk, left)
    looked = host is not None or (pattern.causal and may_restart(positions, shape))
    version, first = version_of(mask), seen - shape.queries
    mixed = _mixed(cache, pattern, shape, first, kv_offset, given)
    if not first and pattern.causal:
        cached.note_documents(cache, host)
    return note(mask, Facts(shape, allocated, pattern, real, host, layout, device, origin, looked, mixed, version))


def _mixed(
    cache: Any, pattern: Pattern, shape: Shape, first: int | Tensor, kv_offset: int, given: Tensor | None
) -> bool:
    """Whether a cache was filled with several documents, and new tokens see more than one of them."""
    if cached.documents_in(cache) is None or not pattern.causal or pattern.chunk is not None:
        return False
    step = cached.Step(int(first), kv_offset, pattern.window)
    return cached.sees_several(cache, shape.batch, step, _real_keys(given, kv_offset, step.first - kv_offset))


def _documents(
    shape: Shape, pattern: Pattern, documents: Tensor | None, positions: Tensor | None, real: Tensor | None
) -> Tensor | None:
    """Integers (B, Q) on the CPU: the documents that transformers found, or that positions tell apart; None: one."""
    if documents is not None:
        return documents.cpu().expand(shape.batch, -1)
    if not pattern.causal or not may_restart(positions, shape):
        return None
    assert positions is not None
    found = documents_at(positions, shape, real, None)
    return found if several(found) else None


def _is_chunked(options: dict[str, Any]) -> bool:
    """Whether a mask is asked for chunked attention, where its function cannot be read."""
    config, size = options.get("config"), options.get("local_size")
    chunk = getattr(config, "attention_chunk_size", None)
    return size is not None and size == chunk and getattr(config, "sliding_window", None) != size


def _numbered(mask: Tensor, chunk: int, left: Tensor) -> Tensor:
    """int32: the number of each real token's chunk, from 1 on, and 0 for padding."""
    row = torch.arange(mask.shape[1], device=mask.device)[None] - left.to(mask.device).view(-1, 1)
    number = torch.div(row, chunk, rounding_mode="floor").clamp(min=0) + 1
    return (number * mask).to(torch.int32)


def _apart(
    mask: Tensor,
    positions: Tensor | None,
    cache: Any,
    shape: Shape,
    q_offset: int | Tensor,
    kv_offset: int,
    given: Tensor | None,
) -> Tensor:
    """A complete mask under which documents, told by positions that restart, do not see each other."""
    if not may_restart(positions, shape):
        return mask
    assert positions is not None
    first = int(q_offset)
    documents = documents_of(positions, shape.batch, _real_keys(given, first, shape.queries))
    if not first:
        cached.note_documents(cache, documents)
    if not several(documents):
        return mask
    if first or kv_offset or shape.keys < shape.queries:
        raise PackingError(
            "position_ids restart among new tokens after cached ones, and do not say to which document those belong: "
            "pass a 4-D mask"
        )
    of_queries = documents.to(mask.device)
    of_keys = torch.nn.functional.pad(of_queries, (0, shape.keys - shape.queries), value=-1)
    return mask & (of_queries[:, None, :, None] == of_keys[:, None, None, :])


def _tracing(attention_mask: Tensor | None) -> bool:
    """Whether nothing may be read from tensors."""
    if torch.compiler.is_compiling():
        return True
    from transformers.utils.import_utils import is_tracing

    return bool(is_tracing(attention_mask))


def _must_materialize(options: dict[str, Any], packed: bool) -> bool:
    """Whether the model asks for a complete mask.

    It does so for a decoding step that will be compiled too, with the mask as its input. Packed positions set the same
    flag, and need none.
    """
    if "allow_is_bidirectional_skip" in options:
        return options["allow_is_bidirectional_skip"] is False
    return options.get("allow_is_causal_skip") is False and not packed


def _place(pattern: Pattern, q_length: int, kv_length: int, q_offset: int | Tensor, kv_offset: int) -> int | None:
    """How many key rows hold something; None if queries are not the last of them."""
    if not pattern.causal and pattern.window is None:
        return kv_length
    seen = int(q_offset) + q_length - kv_offset
    return seen if q_length <= seen <= kv_length else None


def _real_keys(attention_mask: Tensor | None, kv_offset: int, keys: int) -> Tensor | None:
    """Bool (B, K) on the CPU, or None where all are real. The one copy from the device."""
    if attention_mask is None:
        return None
    found = attention_mask[:, kv_offset : kv_offset + keys].cpu()
    missing = keys - found.shape[1]
    if not missing and bool(found.all()):
        return None
    return torch.nn.functional.pad(found != 0, (0, missing))


def _from_the_start(given: Tensor | None, batch: int, seen: int, device: torch.device) -> Tensor:
    """Bool (B, seen), True for real tokens: a new tensor, for an attribute must not land on the caller's."""
    if given is None:
        return torch.ones(batch, seen, dtype=torch.bool, device=device)
    mask = given[:, :seen].to(device) != 0
    missing = seen - mask.shape[1]
    return torch.nn.functional.pad(mask, (0, missing)) if missing else mask


def _without_padded_queries(
    mask: Tensor, attention_mask: Tensor | None, q_offset: int | Tensor, options: dict[str, Any]
) -> Tensor:
    """Padded rows of self-attention see nothing, so that they come out as 0."""
    bidirectional = "allow_is_bidirectional_skip" in options
    if attention_mask is None or bidirectional or not isinstance(q_offset, int):
        return mask
    queries = attention_mask[:, q_offset : q_offset + mask.shape[-2]] != 0
    return mask & queries[:, None, :, None] if queries.shape[1] == mask.shape[-2] else mask
