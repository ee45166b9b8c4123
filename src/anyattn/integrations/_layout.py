"""From masks and document numbers, on the host, to what ``attention`` takes: a Packing in place, or a dense mask.

Legend: B batch, Q query rows, K key rows of an entry; queries are the last Q of the K rows. Nothing here depends on a
model library.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn._errors import PackingError, Unsupported
from anyattn._packing import Facts, Packing
from anyattn._rows import build_table


class Pattern(NamedTuple):
    """Which keys a query sees by position alone."""

    causal: bool
    window: int | None = None
    """Rows visible before the query's own, and after it where not causal; None is unbounded."""
    chunk: int | None = None
    """A sequence is cut into chunks of this many rows, which do not see each other; None: it is not."""

    def sides(self) -> tuple[int, int] | None:
        """As ``attention(window=...)``."""
        return None if self.window is None else (self.window, 0 if self.causal else self.window)


class Shape(NamedTuple):
    """Of one attention call."""

    batch: int
    queries: int
    keys: int


class Layout(NamedTuple):
    """How one call is made."""

    packing: Packing | None = None
    packing_kv: Packing | None = None
    flat: bool = False
    """The packing counts rows of the flattened batch; otherwise sequence i lies in entry i."""
    mask: Tensor | None = None
    """bool (B, 1, Q, K), complete: position, padding, documents and chunks."""


PLAIN = Layout()


def lay_out(
    shape: Shape,
    pattern: Pattern,
    real: Tensor | None = None,
    documents: Tensor | None = None,
    *,
    origin: Tensor | None = None,
    dense: bool = False,
    device: torch.device | None = None,
) -> Layout:
    """Express padding, documents and chunks, in place where that is possible.

    Args:
        shape: sizes of the call.
        pattern: what position allows.
        real: bool (B, K) on the CPU: keys that are no padding. None: all.
        documents: integers (B, K) on the CPU: rows of one entry with one number are one document.
        origin: int64 (B,) on the CPU: the row of each sequence's first token, for chunks; below 0 where a cache has
            dropped it. None: the first real row. Several documents in an entry each begin at their own.
        dense: give a mask even where a Packing would do.
        device: where the result is needed.

    Causal attention is self-attention: padded rows are no queries either, and come out as 0. Otherwise keys may be
    another sequence than queries, so all queries are computed.
    """
    if real is not None and bool(real.all()):
        real = None
    if documents is not None and not several(documents):
        documents = None
    if pattern.chunk is not None:
        documents = _chunks(shape, pattern.chunk, real, documents, origin)
    if documents is not None and shape.queries == 1 < shape.keys:  # one query, of the last document
        own = documents == documents[:, -1:]
        real, documents = own if real is None else own & real, None
    if documents is not None and not several(documents):
        documents = None
    if real is None and documents is None and not dense:
        return PLAIN
    layout = None
    if not dense:
        if documents is not None:
            layout = _documents(shape, real, documents) if shape.queries == shape.keys else None
        elif real is not None:
            layout = _padded(shape, pattern, real)
    if layout is None:
        layout = Layout(mask=_dense(shape, pattern, real, documents))
    return _to(layout, device)


def _chunks(shape: Shape, chunk: int, real: Tensor | None, documents: Tensor | None, origin: Tensor | None) -> Tensor:
    """int64 (B, K): documents cut into chunks of this many rows, counted from where each begins."""
    row = torch.arange(shape.keys).expand(shape.batch, -1)
    if documents is None:
        if origin is None:
            origin = torch.zeros(shape.batch, dtype=torch.long) if real is None else real.int().argmax(1)
        return torch.div(row - origin[:, None], chunk, rounding_mode="floor")
    number: Tensor = documents.long().unique(return_inverse=True)[1]
    at = row if real is None else row.masked_fill(~real, shape.keys)
    begin = torch.full((shape.batch, int(number.max()) + 1), shape.keys)
    begin = begin.scatter_reduce(1, number, at, "amin").gather(1, number)
    part: Tensor = torch.div(row - begin, chunk, rounding_mode="floor").clamp(min=0)
    return number * (shape.keys + 1) + part


def _to(layout: Layout, device: torch.device | None) -> Layout:
    if device is None or device.type == "cpu":
        return layout
    packing, packing_kv, flat, mask = layout
    return Layout(
        None if packing is None else packing.to(device),
        None if packing_kv is None else packing_kv.to(device),
        flat,
        None if mask is None else mask.to(device),
    )


def _padded(shape: Shape, pattern: Pattern, real: Tensor) -> Layout | None:
    """One sequence per entry; None where only a dense mask says it."""
    packing_kv = Packing.from_mask(real)
    holes = packing_kv._holes is not None
    if not pattern.causal:
        if holes or pattern.window is not None:
            return None
        return Layout(_full_queries(shape), packing_kv)
    if shape.queries == shape.keys:
        # A window counts rows, padding in a hole included, and a packing would close the hole.
        return None if holes and pattern.window is not None else Layout(packing_kv)
    if holes:
        return None
    return Layout(Packing.from_mask(real[:, shape.keys - shape.queries :]), packing_kv)


def _full_queries(shape: Shape) -> Packing:
    return Packing.from_mask(torch.ones(shape.batch, shape.queries, dtype=torch.bool))


def _documents(shape: Shape, real: Tensor | None, documents: Tensor) -> Layout | None:
    """Several sequences per entry; None where padding splits one of them."""
    starts, lengths = _runs(documents, real)
    if starts is None:
        return None
    rows = shape.batch * shape.queries
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Layout(Packing(cu, torch.tensor([*starts, rows], dtype=torch.int32), rows=rows), flat=True)


def _runs(documents: Tensor, real: Tensor | None) -> tuple[list[int] | None, list[int]]:
    """First rows and lengths of the documents; (None, []) where one is more than one run."""
    seq = documents.shape[1]
    key = documents.long()
    if real is not None:
        key = key.masked_fill(~real, -1)
    new = torch.ones_like(key, dtype=torch.bool)
    new[:, 1:] = key[:, 1:] != key[:, :-1]
    first = new.flatten().nonzero().flatten()
    length = torch.diff(first, append=torch.tensor([key.numel()]))
    name = key.flatten()[first]
    first, length, entry, name = (x[name >= 0] for x in (first, length, first // max(seq, 1), name))
    names = list(zip(entry.tolist(), name.tolist(), strict=True))
    if len(set(names)) != len(names):
        return None, []
    return first.tolist(), length.tolist()


def _dense(shape: Shape, pattern: Pattern, real: Tensor | None, documents: Tensor | None) -> Tensor:
    distance = torch.arange(shape.keys)[None] - torch.arange(shape.keys - shape.queries, shape.keys)[:, None]
    visible = torch.ones_like(distance, dtype=torch.bool)
    if pattern.causal:
        visible &= distance <= 0
    if pattern.window is not None:
        visible &= distance.abs() <= pattern.window
    mask = visible[None, None].expand(shape.batch, 1, shape.queries, shape.keys)
    if documents is not None:
        own = documents[:, shape.keys - shape.queries :]
        mask = mask & (own[:, None, :, None] == documents[:, None, None, :])
    if real is not None:
        mask = mask & real[:, None, None, :]
        if pattern.causal:
            mask = mask & real[:, None, shape.keys - shape.queries :, None]
    return mask.contiguous()


# --- documents, from positions ---


def may_restart(positions: Any, shape: Shape) -> bool:
    """Whether positions could tell documents apart. Three rows of them (as for images) need an explicit packing."""
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.is_floating_point():
        return False
    return positions.shape[0] in (1, shape.batch) and positions.shape[1] == shape.queries > 1


def documents_of(position_ids: Tensor, batch: int, real: Tensor | None = None) -> Tensor:
    """int64 (B, S) on the CPU: the number of the document of each row, counted by where positions restart.

    Args:
        position_ids: (B or 1, S) integers, on any device.
        batch: B.
        real: bool (B, S) on the CPU. Positions of padding are not looked at; a real row goes on where the last real
            row was, or as many rows later as it stands.
    """
    ids = position_ids.cpu().long().expand(batch, -1)
    seq = ids.shape[1]
    row = torch.arange(seq).expand(batch, -1)
    if real is None:
        last = (row - 1).clamp(min=0)
    else:
        seen = torch.where(real, row, -1).cummax(1).values
        last = torch.cat([torch.zeros(batch, 1, dtype=torch.long), seen[:, :-1]], 1)
    step = ids - ids.gather(1, last.clamp(min=0))
    new = (step != 1) & (step != row - last)
    new[:, :1] = False
    if real is not None:
        new &= real & (last >= 0)
    return new.cumsum(1)


# --- sources that must not disagree ---


def check_agrees(layout: Layout, shape: Shape, real: Tensor | None, documents: Tensor | None) -> None:
    """Compare an explicit packing with a mask and with positions, as far as the host knows it.

    Raises:
        PackingError: the mask calls a token padding that the packing counts, or the other way round; or documents
            start elsewhere by their positions. Positions that never restart are taken as not given.
    """
    if real is None and documents is None:
        return
    name = names_of(layout, shape)
    if name is None:
        return
    valid = name >= 0
    if real is not None and not torch.equal(valid, real[:, shape.keys - shape.queries :]):
        raise PackingError(
            f"the attention mask calls {int(real.sum())} tokens real, and the packing (or cu_seq_lens) "
            f"{int(valid.sum())}, or not the same ones: give one of the two"
        )
    if documents is None or not several(documents):
        return
    pairs = valid[:, 1:] & valid[:, :-1]
    by_packing, by_positions = (pairs & (x[:, 1:] != x[:, :-1]) for x in (name, documents))
    differ = (by_packing != by_positions).nonzero()
    if differ.numel():
        entry, row = differ[0].tolist()
        raise PackingError(
            f"position_ids and the packing (or cu_seq_lens) disagree about where documents start, first at row "
            f"{row + 1} of entry {entry}: give one of the two, or make them agree"
        )


def names_of(layout: Layout, shape: Shape) -> Tensor | None:
    """(B, Q) on the CPU: the number of the sequence that each row belongs to, or -1. None: not known on the host."""
    packing = layout.packing
    assert packing is not None
    if packing._holes is not None:
        return packing.valid.cpu().long() - 1
    if not layout.flat:
        packing = packing.for_entries(shape.batch, shape.queries)
    facts = packing._facts
    if facts.lengths is None or facts.starts is None:
        return None
    names = torch.full((shape.batch * shape.queries,), -1)
    for i, (start, length) in enumerate(zip(facts.starts, facts.lengths, strict=True)):
        names[start : start + length] = i
    return names.view(shape.batch, shape.queries)


def in_chunks(layout: Layout, shape: Shape, pattern: Pattern, device: torch.device | None) -> Layout:
    """The sequences of an explicit packing, each cut into the pattern's chunks.

    Raises:
        Unsupported: the packing's lengths are not known on the host.
    """
    names = names_of(layout, shape)
    if names is None or layout.packing_kv is not None or shape.queries != shape.keys:
        raise Unsupported(
            "chunked attention needs a packing whose lengths the host knows, the same for queries and keys: make it "
            "with check=True, without a fixed capacity and packing_kv"
        )
    return lay_out(shape, pattern, names >= 0, names, device=device)


def from_offsets(offsets: Tensor, offsets_kv: Tensor, longest: int | None, longest_kv: int | None) -> Layout:
    """Cumulative lengths of queries and keys as a layout. Copies them to the host once."""
    packing = _from_offsets("cu_seq_lens_q", offsets, longest)
    if offsets_kv is offsets:
        return Layout(packing, flat=True)
    packing_kv = _from_offsets("cu_seq_lens_k", offsets_kv, longest_kv)
    same = packing_kv._facts.lengths == packing._facts.lengths
    return Layout(packing, None if same else packing_kv, flat=True)


def _from_offsets(name: str, offsets: Tensor, longest: int | None) -> Packing:
    # A copy: what is remembered for as long as the caller's tensor lives must not keep it alive.
    return Packing(_one_row(name, offsets).to(torch.int32, copy=True), max_seqlen=longest)


def _one_row(name: str, offsets: Tensor) -> Tensor:
    if offsets.ndim == 2 and offsets.shape[0] == 1:  # as some data loaders batch it
        offsets = offsets[0]
    if offsets.is_floating_point() or offsets.ndim != 1:
        raise PackingError(f"{name} must be 1-D integers, got {offsets.dtype} of shape {tuple(offsets.shape)}")
    return offsets


def traced_offsets(
    shape: Shape, offsets: Tensor, longest: int | None, offsets_kv: Tensor, longest_kv: int | None
) -> Layout:
    """``from_offsets`` inside a compiled region: nothing is read from the tensors, so nothing is checked."""
    packing = _traced_packing("cu_seq_lens_q", offsets, longest, shape.batch * shape.queries)
    if offsets_kv is offsets and shape.queries == shape.keys:
        return Layout(packing, flat=True)
    return Layout(
        packing, _traced_packing("cu_seq_lens_k", offsets_kv, longest_kv, shape.batch * shape.keys), flat=True
    )


def _traced_packing(name: str, offsets: Tensor, longest: int | None, rows: int) -> Packing:
    packing = Packing.__new__(Packing)
    packing.sanitize, packing.check = False, False
    packing.cu_seqlens = packing.cu_seqlens_padded = _one_row(name, offsets).to(torch.int32)
    packing._facts = Facts(offsets.numel() - 1, rows if longest is None else longest, rows, True)
    packing._shape, packing._holes, packing._entry_rows = None, None, -1
    packing._longest = packing._facts.max_seqlen
    packing._table = build_table(packing.cu_seqlens, packing.cu_seqlens, rows)
    return packing


def several(documents: Tensor) -> bool:
    """Whether any entry holds more than one document."""
    return bool((documents[:, 1:] != documents[:, :-1]).any())
