"""One attention call of a transformers model: what its arguments say, as a call of ``anyattn.attention``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyattn._api import attention
from anyattn._errors import DtypeError, PackingError, ShapeError, Unsupported
from anyattn._packing import Packing
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
from anyattn.integrations._transformers_cached import refuse_several
from anyattn.integrations._transformers_decoding import SEEN, read_decoding, reads_now
from anyattn.integrations._transformers_masks import CHUNKS, PLAIN_PATTERN, Facts, traced_pattern
from anyattn.integrations._transformers_memory import Same, documents_at, once, watched
from anyattn.integrations._transformers_models import HEEDED, SILENT, choose, refuse_unread, with_sinks
from anyattn.integrations._transformers_packed import (
    Offsets,
    check_covers,
    check_keys,
    given_offsets,
    given_packing,
    is_flat,
)
from anyattn.integrations._transformers_said import Said, read
from anyattn.integrations._transformers_settled import OWN, Settled, find, given, keep
from anyattn.integrations._transformers_traced import apart, traced_documents

without_masks: set[str] = set()
"""Backends of which no kernel takes a mask tensor; those that are registered by name."""
packed_only: set[str] = set()
"""The same of which no kernel takes a batch that is not packed."""


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
        is_causal: overrides the module, where no mask of the mask function's says it.
        sliding_window: keys that a query sees, its own included.
        softcap: of the scores.
        s_aux: (num_heads,) sink logits.
        position_bias: added to the scores.
        deterministic: bitwise repeatable.
        backend: as ``anyattn.attention`` takes it.
        **options: ``position_ids``, ``packing``, ``packing_kv``, ``cu_seq_lens_q`` and its kin; ``indices`` or
            ``block_indices``, a choice of keys; ``sinks``, (batch, num_heads, seq_q, 1), a logit more in each row.

    Returns:
        (batch, seq_q, num_heads, head_dim_v), and None for the weights, which are never computed.

    Raises:
        Unsupported: ``output_attentions``, keys in pages, a keyword argument of the layer's own that is not known here,
            or a mask in a compiled region for a backend without.
        InvalidArgument: a keyword argument that is nearly one about packing.
        PackingError: sources of packing that disagree, or that do not cover the tokens; or cached keys of several
            documents, of which nothing says which are seen.
        ShapeError: a mask of another batch size.
    """
    refuse(module, options, HEEDED)
    (batch, _, queries, _), rows = query.shape, key.shape[2]
    compiling, chosen = torch.compiler.is_compiling(), False
    if "indices" in options or "block_indices" in options:
        whole = _apart(attention_mask, Shape(batch, queries, rows), options)
        attention_mask = choose(module, query.shape, whole, options)
        chosen = attention_mask is not whole
    settled = said = pack_on = None
    if position_bias is None and not compiling and not chosen:
        pack_on = query.device if backend.__class__ is str and backend in packed_only else None
        numbers = batch, queries, rows, is_causal, sliding_window, getattr(module, "is_causal", True), pack_on
        if not reads_now(attention_mask):  # else this call stands alone
            said = given(numbers, attention_mask, options)
            settled = find(said, module)
    if settled is None:
        shape = Shape(batch, queries, rows)
        asked = module, shape, attention_mask, is_causal, sliding_window, options, position_bias
        if said is None:
            settled = _settle(read(*asked))
        else:
            with watched() as used:
                settled = _in_rows(_settle(read(*asked)), shape, pack_on)
            if pack_on is None or query.__class__ is Tensor:  # no packing of fake tensors may meet real ones
                keep(said, settled, module, used)
    causal, window, packing, packing_kv, flat, mask, whole, keys = settled
    bias = position_bias
    if whole is not None:
        mask, bias = _with_whole_mask(attention_mask if whole is OWN else whole, keys, position_bias)
    if compiling and isinstance(mask, Tensor) and isinstance(backend, str) and backend in without_masks:
        from anyattn.integrations._transformers_breaking import refuse_mask

        refuse_mask(backend)
    packing = options.get("packing") if packing is None else packing
    packing_kv = options.get("packing_kv") if packing_kv is None else packing_kv
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if keys != rows:  # a static cache is longer than what was written to it
        k, v = k[:, :keys], v[:, :keys]
    if flat:
        if bias is not None:
            raise Unsupported("a position_bias or 4-D mask does not go with several documents per row: pad instead")
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    sinks = options.get("sinks")
    with_lse: Any = sinks is not None
    out: Any = attention(
        q, k, v, causal=causal, window=window, scale=scaling, softcap=softcap or None, sink=s_aux, bias=bias,
        mask=mask, dropout=dropout, packing=packing, packing_kv=packing_kv, deterministic=deterministic,
        backend=backend, return_lse=with_lse,
    )  # fmt: skip
    if sinks is not None:
        out = with_sinks(out[0], out[1], sinks)
    out = out.contiguous()  # as every eager attention's is: a few models view it
    if not flat:
        return out, None
    return out[None] if batch == 1 else out.unflatten(0, (batch, queries)), None


def refuse(module: torch.nn.Module, options: dict[str, Any], heeded: frozenset[str] = frozenset()) -> None:
    """Refuse what no kernel does, asked for by an argument or by the layer's config.

    Args:
        module: the layer.
        options: keyword arguments of its call.
        heeded: those of a few models that are read.
    """
    if not SILENT.issuperset(options):
        refuse_unread(module, options, heeded)
    if options.get("cache") is not None or options.get("block_table") is not None:
        raise Unsupported("continuous batching keeps keys in pages, which anyattn does not read: use generate()")
    weights = options.get("output_attentions")
    if weights or (weights is None and _asked_by(getattr(module, "config", None))):
        raise Unsupported(
            "output_attentions: no kernel forms the attention weights; for a model whose weights you want to see, "
            "model.set_attn_implementation('eager'); if the model's config asks for them, pass output_attentions=False"
        )


def _asked_by(config: Any) -> Any:
    """Whether a layer's config asks for attention weights."""
    if not torch.compiler.is_compiling():
        try:  # where transformers keeps it: any attribute is otherwise read through a function, at each layer
            return object.__getattribute__(config, "_output_attentions")
        except AttributeError:
            pass
    return getattr(config, "output_attentions", False)


# --- from what is said to a layout ---


def _settle(said: Said) -> Settled:
    """How a call is made, from everything that says something about it."""
    explicit = _explicit(said)
    compiling = torch.compiler.is_compiling()
    if compiling and explicit is not None:
        _check_traced(said)
        return _laid_out(said, explicit)
    if said.whole is not None:
        if explicit is not None:
            raise PackingError("a 4-D attention mask says all, and so does a packing (or cu_seq_lens): give one")
        return _from_whole_mask(said)
    if explicit is None and said.facts is not None and said.facts.mixed:
        refuse_several()
    if compiling:
        mask = traced_documents(said.shape, said.pattern, said.options.get("position_ids"))
        return _laid_out(said, PLAIN) if mask is None else Settled(mask=mask, keys=said.shape.keys)
    return _laid_out(said, _implicit(said, explicit))


def _laid_out(said: Said, layout: Layout) -> Settled:
    """A layout beside what position allows; a mask says that too."""
    packing, packing_kv, flat, mask = layout
    pattern = Pattern(causal=False) if mask is not None else said.pattern
    return Settled(pattern.causal, pattern.sides(), packing, packing_kv, flat, mask, None, said.shape.keys)


def _in_rows(settled: Settled, shape: Shape, pack_on: torch.device | None) -> Settled:
    """One sequence per batch entry as rows of the flattened batch, which ``attention`` would make of it anyway.

    Args:
        settled: how a call is made.
        shape: of the call.
        pack_on: where the tensors are, if a batch without padding must be packed too.
    """
    packing, packing_kv, keys = settled.packing, settled.packing_kv, settled.keys
    if pack_on is not None and packing is None and settled.mask is None and settled.whole is None:
        packing = Packing.from_lengths([shape.queries] * shape.batch, device=pack_on)
        if keys != shape.queries:
            packing_kv = Packing.from_lengths([keys] * shape.batch, device=pack_on)
    if packing is None or settled.flat or packing._holes is not None:
        return settled
    if packing_kv is not None:
        packing_kv = packing_kv.for_entries(shape.batch, keys)
    elif keys != shape.queries:
        return settled  # attention() says what is missing
    packing = packing.for_entries(shape.batch, shape.queries)
    return settled._replace(packing=packing, packing_kv=packing_kv, flat=True)


def _check_traced(said: Said) -> None:
    """A packing in a compiled region: the mask beside it must be the mask function's, which says no more."""
    if said.whole is None:
        return
    made_for = traced_pattern(said.whole)
    if made_for == CHUNKS:
        raise Unsupported("chunked attention of packed documents does not compile: leave the model uncompiled")
    if made_for != PLAIN_PATTERN:
        raise PackingError("a 4-D attention mask says all, and so does a packing (or cu_seq_lens): give one")


def _with_whole_mask(mask: Any, keys: int, position_bias: Tensor | None) -> tuple[Any, Tensor | None]:
    """(mask, bias) of a call whose mask is complete, of the first so many keys."""
    if isinstance(mask, Tensor):
        if mask.shape[-1] != keys:
            mask = mask[..., :keys]
        if mask.is_floating_point():
            return None, mask if position_bias is None else position_bias + mask
    return mask, position_bias


def _apart(mask: Any, shape: Shape, options: dict[str, Any]) -> Any:
    """The mask function's own mask in a compiled region, with documents apart, before keys are chosen; or any other."""
    documents = None if traced_pattern(mask) is None else apart(mask, shape, options.get("position_ids"))
    return mask if documents is None else documents


def _from_whole_mask(said: Said) -> Settled:
    """A complete mask counts as it is, or as lengths where the mask function made it for a decoding step."""
    mask, shape = said.whole, said.shape
    if not isinstance(mask, Tensor):
        return Settled(whole=OWN, keys=shape.keys)
    if not mask.is_floating_point() and mask.dtype != torch.bool:
        raise DtypeError(f"a 4-D attention mask must be bool (true: attend) or additive floats, got {mask.dtype}")
    if mask.shape[-1] > shape.keys:
        raise ShapeError(
            f"a 4-D attention mask of {mask.shape[-1]} keys for a layer that has {shape.keys}: a sliding cache keeps "
            "the last ones only; pass a mask of those, or a 2-D mask, from which each layer takes its part"
        )
    if torch.compiler.is_compiling():
        if traced_pattern(mask) is not None:  # models that keep positions from the mask function leak documents there
            documents = apart(mask, shape, said.options.get("position_ids"))
            if documents is not None:
                return Settled(mask=documents, keys=shape.keys)
        return Settled(whole=mask, keys=shape.keys)
    row = None if said.position_bias is not None else read_decoding(mask, shape, said.layer)
    if row is not None:
        return _laid_out(said._replace(shape=row.shape, pattern=SEEN), row.layout)
    return Settled(whole=OWN, keys=shape.keys)


# --- packings that the caller gives ---


def _explicit(said: Said) -> Layout | None:
    """From ``packing`` or cumulative lengths, which must cover the tokens."""
    options, shape = said.options, said.shape
    offsets = given_offsets(options, said.layer)
    packing, packing_kv = (given_packing(options, name) for name in ("packing", "packing_kv"))
    compiling = torch.compiler.is_compiling()
    if packing is not None:
        layout = Layout(packing, packing_kv, flat=is_flat(packing, shape))
    elif packing_kv is not None:
        raise PackingError("packing_kv says how keys are divided, and needs packing beside it for the queries")
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
