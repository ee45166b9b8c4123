"""anyattn inside transformers.

Use::

    import anyattn
    from transformers import AutoModelForCausalLM

    anyattn.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="anyattn")

Padded batches, packed batches and generation give what one sequence at a time gives. Packing is taken, in this order,
from ``model(..., packing=Packing)``, from ``cu_seq_lens_q`` and ``cu_seq_lens_k``, from a 2-D attention mask together
with positions that restart; sources that disagree are an error. Padded rows of causal attention come out as 0.

A 4-D mask is complete, as everywhere in transformers: it also says what causality and windows would. Everything is
worked out once per forward, so layers wait for nothing. Under ``torch.compile`` a Packing can only be passed in, made
outside; masks and positions become 4-D masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from anyattn._api import attention
from anyattn._errors import DtypeError, InvalidArgument, MissingExtra, PackingError, ShapeError, Unsupported
from anyattn._log import logger
from anyattn._packing import Packing
from anyattn._request import is_block_mask
from anyattn.integrations._layout import (
    PLAIN,
    Layout,
    Pattern,
    Shape,
    check_agrees,
    documents_of,
    from_offsets,
    lay_out,
    several,
    traced_offsets,
)
from anyattn.integrations._transformers_masks import Facts, facts_of, make_mask

__all__ = ["register"]

#: transformers looks for these in the name and then treats the function as one of its own.
_TAKEN = ("flash", "sdpa", "flex_attention", "eager", "paged|", "/")


def register(name: str = "anyattn") -> None:
    """Make ``attn_implementation=name`` run every attention of a model through anyattn.

    Args:
        name: as transformers will know it. Registering a name again is harmless.

    Raises:
        MissingExtra: transformers is not installed.
        InvalidArgument: a name that transformers would take for an implementation of its own.

    Example::

        >>> import anyattn
        >>> anyattn.integrations.transformers.register()  # doctest: +SKIP
        >>> model.set_attn_implementation("anyattn")  # doctest: +SKIP
    """
    taken = next((part for part in _TAKEN if part in name), None)
    if taken is not None or not name:
        raise InvalidArgument(f"name must be non-empty and not contain {taken!r}, which transformers gives a meaning")
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise MissingExtra("anyattn.integrations.transformers", "transformers", "transformers") from None
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, make_mask)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    deterministic: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as a transformers model calls it.

    Args:
        module: the attention layer; says whether it is causal, where nothing else does.
        query: (batch, num_heads, seq_q, head_dim).
        key: (batch, num_kv_heads, seq_k, head_dim).
        value: (batch, num_kv_heads, seq_k, head_dim_v).
        attention_mask: None, 2-D with true for real tokens, 4-D bool or additive, or a BlockMask.
        dropout: of attention weights.
        scaling: of the scores.
        is_causal: overrides mask and module.
        sliding_window: keys that a query sees, its own included.
        softcap: of the scores.
        s_aux: (num_heads,) sink logits.
        position_bias: added to the scores.
        deterministic: bitwise repeatable.
        **options: ``position_ids``, ``packing``, ``packing_kv``, ``cu_seq_lens_q`` and its kin; others are not
            attention's.

    Returns:
        (batch, seq_q, num_heads, head_dim_v), and None for the weights, which are never computed.
    """
    if options.get("cache") is not None or options.get("block_table") is not None:
        raise Unsupported("continuous batching keeps keys in pages, which anyattn does not read: use generate()")
    if options.get("output_attentions"):
        _say_once("output_attentions: anyattn never has the attention weights; use attn_implementation='eager'")
    whole = _is_whole(attention_mask)
    facts = None if whole or attention_mask is None else facts_of(attention_mask)
    if facts is not None and (facts.shape.queries, facts.allocated) != (query.shape[2], key.shape[2]):
        facts = None  # a mask made for other layers: only its values count
    pattern = _pattern(module, facts, is_causal, sliding_window)
    shape = Shape(query.shape[0], query.shape[2], key.shape[2])
    if torch.compiler.is_compiling() and attention_mask is not None and not whole:
        attention_mask, whole = _traced_padding(attention_mask, shape, pattern), True
    if facts is None and attention_mask is not None and not whole:
        facts = _facts_without(attention_mask, shape, pattern)
    if facts is not None:  # a static cache is longer than what was written to it
        shape = facts.shape
    layout, mask, bias = _settle(shape, pattern, attention_mask if whole else None, facts, options, position_bias)
    keys = shape.keys
    q, k, v = (x.transpose(1, 2) for x in (query, key[:, :, :keys], value[:, :, :keys]))
    complete = mask is not None or (bias is not None and bias is not position_bias)
    arguments: dict[str, Any] = {
        "causal": pattern.causal and not complete,
        "window": None if complete else pattern.sides(),
        "scale": scaling,
        "softcap": softcap or None,
        "sink": s_aux,
        "bias": bias,
        "mask": mask,
        "dropout": dropout,
        "packing": layout.packing,
        "packing_kv": layout.packing_kv,
        "deterministic": deterministic,
    }
    if not layout.flat:
        return attention(q, k, v, **arguments), None
    if bias is not None:
        raise Unsupported("a position_bias or 4-D mask does not go with several documents per row: pad instead")
    flat = attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), **arguments)
    return flat.unflatten(0, q.shape[:2]), None


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said and not torch.compiler.is_compiling():
        _said.add(message)
        logger.warning(message)


def _pattern(
    module: torch.nn.Module, facts: Facts | None, is_causal: bool | None, sliding_window: int | None
) -> Pattern:
    """What position allows: the argument, else what the mask was made for, else the module."""
    causal, window = is_causal, None
    if facts is not None:
        causal = facts.pattern.causal if causal is None else causal
        window = facts.pattern.window
    if causal is None:
        causal = bool(getattr(module, "is_causal", True))
    if window is None and sliding_window is not None:
        if sliding_window < 1:
            raise InvalidArgument(f"sliding_window must be at least 1, or None for none; got {sliding_window}")
        window = sliding_window - 1
    return Pattern(causal, window)


def _facts_without(mask: Tensor, shape: Shape, pattern: Pattern) -> Facts:
    """Facts for a mask that the mask function did not make, or that lost them on the way to another device."""

    def make() -> Facts:
        first = max(mask.shape[1] - shape.keys, 0)  # a sliding cache has dropped the first keys
        real = mask[:, first:].cpu() != 0
        keys = real.shape[1]
        if pattern.causal and shape.queries < shape.keys:  # rows of a static cache that hold nothing yet
            keys = max(int(real.any(0).nonzero().max()) + 1 if bool(real.any()) else 0, shape.queries)
        used = shape._replace(keys=keys)
        real = torch.nn.functional.pad(real, (0, keys - real.shape[1]))
        return Facts(used, shape.keys, pattern, real, None, lay_out(used, pattern, real, device=mask.device))

    facts: Facts = _once(mask, ("facts", shape, pattern), make)
    return facts


def _settle(
    shape: Shape,
    pattern: Pattern,
    whole: Any,
    facts: Facts | None,
    options: dict[str, Any],
    position_bias: Tensor | None,
) -> tuple[Layout, Any, Tensor | None]:
    """(layout, mask, bias) of a call, from everything that says something about them."""
    explicit = _explicit(options, shape)
    compiling = torch.compiler.is_compiling()
    if compiling and explicit is not None:  # the mask beside it is the mask function's, and says no more
        return explicit, None, position_bias
    if whole is not None:
        if explicit is not None:
            raise PackingError("a 4-D attention mask says all, and so does a packing (or cu_seq_lens): give one")
        return _with_whole_mask(shape, whole, options, position_bias)
    if compiling:
        return PLAIN, _traced_documents(shape, pattern, options), position_bias
    layout = _implicit(shape, pattern, facts, options, explicit, position_bias is not None)
    return layout, layout.mask, position_bias


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


def _with_whole_mask(
    shape: Shape, mask: Any, options: dict[str, Any], position_bias: Tensor | None
) -> tuple[Layout, Any, Tensor | None]:
    if isinstance(mask, Tensor):
        mask = mask[..., : shape.keys]
        if mask.is_floating_point():
            return PLAIN, None, mask if position_bias is None else position_bias + mask
        if mask.dtype != torch.bool:
            raise DtypeError(f"a 4-D attention mask must be bool (true: attend) or additive floats, got {mask.dtype}")
        if torch.compiler.is_compiling():  # models that keep positions from the mask function leak documents there
            documents = _traced_documents(shape, Pattern(causal=False), options)
            mask = mask if documents is None else mask & documents
    return PLAIN, mask, position_bias


# --- packings that the caller gives ---


def _either(options: dict[str, Any], *names: str) -> Any:
    """The value of the first of several spellings that is given."""
    return next((options[name] for name in names if options.get(name) is not None), None)


def _explicit(options: dict[str, Any], shape: Shape) -> Layout | None:
    """From ``packing`` or cumulative lengths."""
    packing, packing_kv = options.get("packing"), options.get("packing_kv")
    offsets = _either(options, "cu_seq_lens_q", "cu_seqlens_q", "cu_seq_lens_k", "cu_seqlens_k")
    if packing is not None:
        if offsets is not None:
            raise PackingError("packing and cu_seq_lens are two ways to say one thing: give one of the two")
        if not isinstance(packing, Packing):
            raise PackingError(f"packing must be an anyattn.Packing, got {type(packing).__name__}")
        return Layout(packing, packing_kv, flat=_is_flat(packing, shape))
    if offsets is None:
        return None
    offsets_kv = _either(options, "cu_seq_lens_k", "cu_seqlens_k")
    offsets_kv = offsets if offsets_kv is None else offsets_kv
    if not isinstance(offsets, Tensor) or not isinstance(offsets_kv, Tensor):
        raise PackingError("cu_seq_lens_q and cu_seq_lens_k must be tensors, (documents + 1)")
    longest = _either(options, "max_length_q", "max_seqlen_q")
    longest_kv = _either(options, "max_length_k", "max_seqlen_k")
    if torch.compiler.is_compiling():
        return traced_offsets(shape, offsets, longest, offsets_kv, longest_kv)
    longest, longest_kv = (None if x is None else int(x) for x in (longest, longest_kv))
    key = ("offsets", None if offsets_kv is offsets else offsets_kv, longest, longest_kv)
    layout: Layout = _once(offsets, key, lambda: from_offsets(offsets, longest, offsets_kv, longest_kv))
    return layout


def _is_flat(packing: Packing, shape: Shape) -> bool:
    """Whether a packing counts rows of the flattened batch, as it must where an entry holds several documents."""
    if packing._shape is not None:
        return False
    facts = packing._facts
    if shape.batch == 1 or facts.sequences != shape.batch:
        return True
    across = facts.starts is not None and packing._entry_rows != shape.queries
    return across and facts.rows == shape.batch * shape.queries


# --- padding and positions ---


def _implicit(
    shape: Shape,
    pattern: Pattern,
    facts: Facts | None,
    options: dict[str, Any],
    explicit: Layout | None,
    biased: bool,
) -> Layout:
    """From a 2-D mask and positions, or ``explicit`` checked against them; at the first layer that asks."""
    positions = options.get("position_ids")
    if not _may_restart(positions, shape) or (facts is not None and facts.documents is not None):
        positions = None
    if explicit is None and positions is None:
        if facts is None:
            return PLAIN
        if facts.pattern == pattern and not (biased and _needs_dense(facts.layout)):
            return facts.layout
    if positions is None and facts is None:
        assert explicit is not None
        return explicit
    anchor = facts if positions is None else positions
    key = (shape, pattern, explicit and explicit.packing, None if positions is None else facts, biased)
    layout: Layout = _once(anchor, key, lambda: _work_out(shape, pattern, facts, positions, explicit, biased))
    return layout


def _needs_dense(layout: Layout) -> bool:
    """Whether a bias cannot go with a layout."""
    return layout.flat or (layout.packing is not None and layout.packing._holes is not None)


def _may_restart(positions: Any, shape: Shape) -> bool:
    """Whether positions could tell documents apart. Three rows of them (as for images) need an explicit packing."""
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.is_floating_point():
        return False
    return positions.shape[0] in (1, shape.batch) and positions.shape[1] == shape.queries > 1


def _work_out(
    shape: Shape,
    pattern: Pattern,
    facts: Facts | None,
    positions: Tensor | None,
    explicit: Layout | None,
    biased: bool,
) -> Layout:
    real = None if facts is None else facts.real
    documents = None if facts is None else facts.documents
    if positions is not None and (pattern.causal or shape.queries == shape.keys):
        documents = documents_of(positions, shape.batch, None if real is None else real[:, -shape.queries :])
    if explicit is not None:
        check_agrees(explicit, shape, real, documents)
        return explicit
    if documents is not None and shape.queries != shape.keys:
        if several(documents):
            raise PackingError(
                f"position_ids restart among {shape.queries} new tokens after {shape.keys - shape.queries} cached "
                "ones, and do not say to which document those belong: pass a 4-D mask"
            )
        documents = None
    device = positions.device if positions is not None else (None if facts is None else facts.device)
    layout = lay_out(shape, pattern, real, documents, device=device)
    if biased and _needs_dense(layout):
        layout = lay_out(shape, pattern, real, documents, dense=True, device=device)
    return layout


# --- under torch.compile: masks, computed on the device ---


def _traced_documents(shape: Shape, pattern: Pattern, options: dict[str, Any]) -> Tensor | None:
    """A mask that keeps documents apart, or None where positions cannot restart."""
    positions = options.get("position_ids")
    if not _may_restart(positions, shape) or shape.queries != shape.keys:
        return None
    assert isinstance(positions, Tensor)
    step = positions[:, 1:] - positions[:, :-1]
    documents = torch.nn.functional.pad((step != 1).cumsum(1), (1, 0))
    row = torch.arange(shape.queries, device=positions.device)
    return (documents[:, None, :, None] == documents[:, None, None, :]) & _visible(pattern, row, row)


def _traced_padding(mask: Tensor, shape: Shape, pattern: Pattern) -> Tensor:
    """A complete mask from a 2-D one that was made outside: ``generate`` does so for static caches.

    The last query stands where the last real token does, for the rest of a static cache holds nothing yet.
    """
    real = mask[:, -shape.keys :] != 0
    real = torch.nn.functional.pad(real, (0, shape.keys - real.shape[1]))
    key = torch.arange(shape.keys, device=mask.device)
    last = torch.where(real.any(0), key, -1).max()
    query = torch.arange(shape.queries, device=mask.device) + last + 1 - shape.queries
    return real[:, None, None] & _visible(pattern, query, key)


def _visible(pattern: Pattern, query: Tensor, key: Tensor) -> Tensor:
    """(Q, K): what position allows."""
    distance = key[None] - query[:, None]
    visible = torch.ones_like(distance, dtype=torch.bool)
    if pattern.causal:
        visible = visible & (distance <= 0)
    return visible if pattern.window is None else visible & (distance.abs() <= pattern.window)


# --- once per forward ---

_memory: Any = WeakIdKeyDictionary()
_CASES = 16


class _Same:
    """A tensor as part of a key: equal to itself, unless it was written to meanwhile."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.version = x, x._version

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.x is other.x and self.version == other.version

    def __hash__(self) -> int:
        return id(self.x)


def _once(anchor: Any, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """What ``make`` returns, remembered for as long as ``anchor`` lives and is not written to.

    All layers of a forward pass the same tensors, so only the first one computes, and copies to the host. Neither key
    nor result may hold the anchor. Tensors made under inference_mode do not say when they are written to: nothing is
    remembered for them.
    """
    tensors = [x for x in (anchor, *(k.x for k in key if isinstance(k, _Same))) if isinstance(x, Tensor)]
    if any(x.is_inference() for x in tensors):
        return make()
    version = anchor._version if isinstance(anchor, Tensor) else 0
    known = _memory.get(anchor)
    if known is None or known[0] != version or len(known[1]) >= _CASES:
        known = _memory[anchor] = (version, {})
    if key not in known[1]:
        known[1][key] = make()
    return known[1][key]
