"""Packings that a caller gives to a transformers model: how they are spelled, and what they must cover."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn._errors import PackingError
from anyattn._packing import Packing
from anyattn.integrations._layout import Layout, Shape, names_of
from anyattn.integrations._transformers_memory import Same, once


class Offsets(NamedTuple):
    """Cumulative lengths, (documents + 1) each, as a model's keyword arguments give them."""

    queries: Tensor
    keys: Tensor
    """``queries`` itself, where only one of them is given."""
    longest: Any
    """The longest document of queries, or None."""
    longest_keys: Any


def given_packing(options: Mapping[str, Any], name: str) -> Packing | None:
    """The value of ``packing`` or ``packing_kv``.

    Raises:
        PackingError: it is not a Packing.
    """
    packing = options.get(name)
    if packing is None or isinstance(packing, Packing):
        return packing
    raise PackingError(f"{name} must be an anyattn.Packing, got {type(packing).__name__}")


def given_offsets(options: Mapping[str, Any], layer: int | None = None) -> Offsets | None:
    """Cumulative lengths and longest lengths, in either spelling; None where there are no cumulative lengths.

    Args:
        options: the keyword arguments.
        layer: that asks; tensors are compared once for all layers.

    Raises:
        PackingError: both spellings of one thing, with different values; offsets beside a packing, or no tensors;
            longest lengths without offsets or a packing.
    """
    queries, keys = (_one(options, f"cu_seq_lens_{x}", f"cu_seqlens_{x}", layer) for x in "qk")
    longest, longest_keys = (_one(options, f"max_length_{x}", f"max_seqlen_{x}", layer) for x in "qk")
    if queries is None and keys is None:
        if (longest is not None or longest_keys is not None) and options.get("packing") is None:
            raise PackingError(
                "max_length_q or max_length_k (max_seqlen_q, max_seqlen_k) without cu_seq_lens_q: the longest length "
                "does not say where documents begin; pass cu_seq_lens_q and cu_seq_lens_k beside it, or leave it out"
            )
        return None
    if options.get("packing") is not None:
        raise PackingError("packing and cu_seq_lens are two ways to say one thing: give one of the two")
    queries = keys if queries is None else queries
    keys = queries if keys is None else keys
    if not isinstance(queries, Tensor) or not isinstance(keys, Tensor):
        raise PackingError("cu_seq_lens_q and cu_seq_lens_k must be tensors, (documents + 1)")
    return Offsets(queries, keys, longest, longest_keys)


def _one(options: Mapping[str, Any], name: str, other: str, layer: int | None) -> Any:
    """The value under either of two names, or the one that both have."""
    a, b = options.get(name), options.get(other)
    if a is None or b is None or a is b:
        return b if a is None else a
    tensors = isinstance(a, Tensor) or isinstance(b, Tensor)
    if tensors and torch.compiler.is_compiling():
        raise PackingError(
            f"{name} and {other} are two names of one thing, and are not compared when compiled: give one"
        )
    if not (_equal(a, b, layer) if tensors else a == b):
        raise PackingError(f"{name} and {other} are two names of one thing, and their values differ: give one of them")
    return a


def _equal(a: Any, b: Any, layer: int | None) -> bool:
    def make() -> bool:
        x, y = (torch.as_tensor(value).cpu().flatten() for value in (a, b))
        return torch.equal(x.long(), y.long())

    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return make()
    found: bool = once(a, ("equal", Same(b)), layer, make)
    return found


def is_flat(packing: Packing, shape: Shape) -> bool:
    """Whether a packing counts rows of the flattened batch, as it must where an entry holds several documents.

    Raises:
        PackingError: as many sequences as entries, of lengths that the host does not know, in as many rows: sequence i
            may lie in entry i, or anywhere.
    """
    if packing._shape is not None:
        return False
    facts = packing._facts
    if shape.batch == 1 or facts.sequences != shape.batch:
        return True
    if facts.rows != shape.batch * shape.queries:
        return False
    if facts.starts is not None:
        return packing._entry_rows != shape.queries
    if facts.max_seqlen > shape.queries:
        return True  # none so long would fit in an entry
    if not facts.gaps:
        return False  # all entries are full, wherever they are said to lie
    raise PackingError(
        f"the packing has room for {facts.sequences} sequences in {facts.rows} rows, and there are {shape.batch} x "
        f"{shape.queries} tokens: with lengths that the host does not know (fixed capacity, check=False) that may mean "
        "one sequence in each batch entry, or sequences anywhere in the flattened batch. For one in each entry, pass a "
        "2-D attention_mask or Packing.from_mask(mask) instead; for the flattened batch, reshape the batch to one "
        f"entry, (1, {facts.rows}), or give room for more sequences: max_sequences={shape.batch + 1} or above"
    )


def check_covers(packing: Packing, shape: Shape, padded: bool) -> None:
    """Refuse a packing of the queries that ends before the tokens do, or after.

    Args:
        packing: one that knows its rows; others are taken at their word.
        shape: of the call.
        padded: a 2-D mask says that some tokens are padding. It is compared with the packing elsewhere.

    Raises:
        PackingError: tokens of which nothing says that they are padding.
    """
    rows, tokens = packing._facts.rows, shape.batch * shape.queries
    if rows is None or rows == tokens or (padded and rows < tokens):
        return
    raise PackingError(
        f"the packing (or cu_seq_lens) is of {rows} rows, and there are {shape.batch} x {shape.queries} tokens: it "
        "must count all rows of the flattened batch; if those after the last document are padding, say so by a 2-D "
        f"attention_mask beside it, or by Packing(..., rows={tokens})"
    )


def check_keys(layout: Layout, shape: Shape) -> None:
    """Refuse other documents of keys than of queries, where both are the same tokens.

    Raises:
        PackingError: there are as many key rows as query rows, and they are divided in another way.
    """
    packing, packing_kv = layout.packing, layout.packing_kv
    if packing is None or packing_kv is None or packing_kv is packing or shape.queries != shape.keys:
        return
    ours, theirs = packing._facts, packing_kv._facts
    if ours == theirs and packing._holes is packing_kv._holes:
        return
    keys = Layout(packing_kv, flat=layout.flat and packing_kv._shape is None)
    a, b = names_of(layout, shape), names_of(keys, shape)
    if a is None or b is None or torch.equal(a.flatten(), b.flatten()):
        return
    raise PackingError(
        "in self-attention queries and keys are the same tokens, and cu_seq_lens_q and cu_seq_lens_k (or packing and "
        f"packing_kv) divide them differently, first at row {int((a.flatten() != b.flatten()).nonzero()[0])} of the "
        "flattened batch: leave the keys' out; for cross-attention with as many keys as queries, pass a 4-D mask"
    )
