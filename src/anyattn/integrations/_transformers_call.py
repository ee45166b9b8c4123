"""One attention call of a transformers model: what its arguments say, as a call of ``anyattn.attention``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn._api import attention
from anyattn._errors import DtypeError, InvalidArgument, PackingError, ShapeError, Unsupported
from anyattn._request import is_block_mask
from anyattn.integrations._layout import (
    PLAIN,
    Layout,
    Pattern,
    Shape,
    check_agrees,
    from_offsets,
    in_chunks,
    lay_out,
    may_restart,
    traced_offsets,
)
from anyattn.integrations._transformers_masks import (
    CHUNKS,
    PLAIN_PATTERN,
    Facts,
    check_mask,
    facts_of,
    note_traced,
    traced_pattern,
)
from anyattn.integrations._transformers_memory import Same, documents_at, once
from anyattn.integrations._transformers_packed import (
    Offsets,
    check_covers,
    check_keys,
    given_offsets,
    given_packing,
    is_flat,
)
from anyattn.integrations._transformers_traced import traced_documents, traced_padding


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
    backend: str = "auto",
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
        backend: as ``anyattn.attention`` takes it.
        **options: ``position_ids``, ``packing``, ``packing_kv``, ``cu_seq_lens_q`` and its kin; others are not
            attention's.

    Returns:
        (batch, seq_q, num_heads, head_dim_v), and None for the weights, which are never computed.

    Raises:
        Unsupported: ``output_attentions``, or keys in pages.
        PackingError: sources of packing that disagree, or that do not cover the tokens.
        ShapeError: a mask of another batch size.
    """
    refuse(module, options)
    said = _said(
        module, Shape(query.shape[0], query.shape[2], key.shape[2]), attention_mask, is_causal, sliding_window, options,
        position_bias,
    )  # fmt: skip
    layout, mask, bias = _settle(said)
    keys = said.shape.keys
    q, k, v = (x.transpose(1, 2) for x in (query, key[:, :, :keys], value[:, :, :keys]))
    complete = mask is not None or (bias is not None and bias is not position_bias)
    arguments: dict[str, Any] = {
        "causal": said.pattern.causal and not complete,
        "window": None if complete else said.pattern.sides(),
        "scale": scaling,
        "softcap": softcap or None,
        "sink": s_aux,
        "bias": bias,
        "mask": mask,
        "dropout": dropout,
        "packing": layout.packing,
        "packing_kv": layout.packing_kv,
        "deterministic": deterministic,
        "backend": backend,
    }
    if not layout.flat:
        return attention(q, k, v, **arguments), None
    if bias is not None:
        raise Unsupported("a position_bias or 4-D mask does not go with several documents per row: pad instead")
    flat = attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), **arguments)
    return flat.unflatten(0, q.shape[:2]), None


def refuse(module: torch.nn.Module, options: dict[str, Any]) -> None:
    """Refuse what no kernel does, asked for by an argument or by the layer's config."""
    if options.get("cache") is not None or options.get("block_table") is not None:
        raise Unsupported("continuous batching keeps keys in pages, which anyattn does not read: use generate()")
    weights = options.get("output_attentions")
    if weights or (weights is None and getattr(getattr(module, "config", None), "output_attentions", False)):
        raise Unsupported(
            "output_attentions: no kernel forms the attention weights; for a model whose weights you want to see, "
            "model.set_attn_implementation('eager'); if the model's config asks for them, pass output_attentions=False"
        )


def _said(
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
    facts = None if given is None else facts_of(given)
    if facts is not None and (facts.shape.queries, facts.allocated) != (shape.queries, shape.keys):
        facts = None  # a mask made for other layers: only its values count
    pattern = _pattern(module, facts, is_causal, sliding_window)
    if given is not None and facts is None:
        if torch.compiler.is_compiling():
            whole = note_traced(traced_padding(given, shape, pattern), chunked=given.dtype != torch.bool)
        else:
            facts = _facts_without(given, shape, pattern, layer)
    if facts is not None:  # a static cache is longer than what was written to it
        shape = facts.shape
    return Said(shape, pattern, facts, whole, options, position_bias, layer)


def _pattern(
    module: torch.nn.Module, facts: Facts | None, is_causal: bool | None, sliding_window: int | None
) -> Pattern:
    """What position allows: the argument, else what the mask was made for, else the module."""
    causal, window, chunk = is_causal, None, None
    if facts is not None:
        causal = facts.pattern.causal if causal is None else causal
        _, window, chunk = facts.pattern
    if causal is None:
        causal = bool(getattr(module, "is_causal", True))
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
        keys = numbers.shape[1]
        if pattern.causal and shape.queries < shape.keys:  # rows of a static cache that hold nothing yet
            seen = (numbers != 0).any(0).nonzero()
            keys = max(int(seen.max()) + 1 if seen.numel() else 0, shape.queries)
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


# --- from what is said to a layout ---


def _settle(said: Said) -> tuple[Layout, Any, Tensor | None]:
    """(layout, mask, bias) of a call, from everything that says something about them."""
    explicit = _explicit(said)
    compiling = torch.compiler.is_compiling()
    if compiling and explicit is not None:
        _check_traced(said)
        return explicit, None, said.position_bias
    if said.whole is not None:
        if explicit is not None:
            raise PackingError("a 4-D attention mask says all, and so does a packing (or cu_seq_lens): give one")
        return _with_whole_mask(said)
    if compiling:
        return PLAIN, traced_documents(said.shape, said.pattern, said.options.get("position_ids")), said.position_bias
    layout = _implicit(said, explicit)
    return layout, layout.mask, said.position_bias


def _check_traced(said: Said) -> None:
    """A packing in a compiled region: the mask beside it must be the mask function's, which says no more."""
    if said.whole is None:
        return
    made_for = traced_pattern(said.whole)
    if made_for == CHUNKS:
        raise Unsupported("chunked attention of packed documents does not compile: leave the model uncompiled")
    if made_for != PLAIN_PATTERN:
        raise PackingError("a 4-D attention mask says all, and so does a packing (or cu_seq_lens): give one")


def _with_whole_mask(said: Said) -> tuple[Layout, Any, Tensor | None]:
    mask, position_bias = said.whole, said.position_bias
    if isinstance(mask, Tensor):
        mask = mask[..., : said.shape.keys]
        if mask.is_floating_point():
            return PLAIN, None, mask if position_bias is None else position_bias + mask
        if mask.dtype != torch.bool:
            raise DtypeError(f"a 4-D attention mask must be bool (true: attend) or additive floats, got {mask.dtype}")
        if torch.compiler.is_compiling():  # models that keep positions from the mask function leak documents there
            documents = traced_documents(said.shape, Pattern(causal=False), said.options.get("position_ids"))
            mask = mask if documents is None else mask & documents
    return PLAIN, mask, position_bias


# --- packings that the caller gives ---


def _explicit(said: Said) -> Layout | None:
    """From ``packing`` or cumulative lengths, which must cover the tokens."""
    options, shape = said.options, said.shape
    offsets = given_offsets(options, said.layer)
    packing, packing_kv = (given_packing(options, name) for name in ("packing", "packing_kv"))
    compiling = torch.compiler.is_compiling()
    if packing is not None:
        layout = Layout(packing, packing_kv, flat=is_flat(packing, shape))
    elif offsets is None:
        return None
    elif compiling:
        return traced_offsets(shape, offsets.queries, offsets.longest, offsets.keys, offsets.longest_keys)
    else:
        layout = _from_offsets(offsets, said.layer)
    if not compiling:  # sizes may be symbols there, and values are not known
        assert layout.packing is not None
        check_covers(layout.packing, shape, said.facts is not None and said.facts.real is not None)
        check_keys(layout, shape)
    return layout


def _from_offsets(offsets: Offsets, layer: int | None) -> Layout:
    queries, keys = offsets.queries, offsets.keys
    longest, longest_keys = (None if x is None else int(x) for x in (offsets.longest, offsets.longest_keys))
    key = ("offsets", None if keys is queries else Same(keys), longest, longest_keys)
    layout: Layout = once(queries, key, layer, lambda: from_offsets(queries, keys, longest, longest_keys))
    return layout


# --- padding and positions ---


def _implicit(said: Said, explicit: Layout | None) -> Layout:
    """From a 2-D mask and positions, or ``explicit`` checked against them; at the first layer that asks."""
    shape, pattern, facts = said.shape, said.pattern, said.facts
    biased = said.position_bias is not None
    positions = said.options.get("position_ids")
    if not may_restart(positions, shape) or (facts is not None and facts.looked):
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
    make = lambda: _work_out(shape, pattern, facts, positions, explicit, biased, said.layer)  # noqa: E731
    layout: Layout = once(anchor, key, said.layer, make)
    return layout


def _needs_dense(layout: Layout) -> bool:
    """Whether a bias cannot go with a layout."""
    return layout.flat or (layout.packing is not None and layout.packing._holes is not None)


def _work_out(
    shape: Shape,
    pattern: Pattern,
    facts: Facts | None,
    positions: Tensor | None,
    explicit: Layout | None,
    biased: bool,
    layer: int | None,
) -> Layout:
    real = None if facts is None else facts.real
    documents = None if facts is None else facts.documents
    device = positions.device if positions is not None else (None if facts is None else facts.device)
    if positions is not None and (pattern.causal or shape.queries == shape.keys):
        documents = documents_at(positions, shape, real, layer)
    if explicit is not None:
        check_agrees(explicit, shape, real, documents)
        return explicit if pattern.chunk is None else in_chunks(explicit, shape, pattern, device)
    if shape.queries != shape.keys:
        documents = None
    origin = None if facts is None else facts.origin
    layout = lay_out(shape, pattern, real, documents, origin=origin, device=device)
    if biased and _needs_dense(layout):
        layout = lay_out(shape, pattern, real, documents, origin=origin, dense=True, device=device)
    return layout
