"""From Transformer Engine's offsets and masks, once per batch, to where the real tokens lie.

Legend: N sequences. Offsets are those of the whole batch, also under context parallelism.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn._errors import DtypeError, InvalidArgument, PackingError, ShapeError
from anyattn._packing import Packing
from anyattn.integrations._transformers_memory import Same, once

PaddingMask = Tensor | tuple[Tensor, Tensor] | None


class Given(NamedTuple):
    """What a call says of one side, queries or keys."""

    name: str
    """q or kv, as the arguments' names end."""
    offsets: Tensor | None
    padded: Tensor | None
    longest: Any
    """max_seqlen; an int, or a tensor of one."""
    mask: Tensor | None
    """(N, 1, 1, seq), True in padding."""
    gapless: bool = False
    """The caller says that nothing lies between sequences: padded offsets must say the same."""

    @property
    def anchor(self) -> Tensor | None:
        """The tensor that the rest is remembered with."""
        return self.mask if self.offsets is None else self.offsets

    def key(self, anchor: Tensor) -> tuple[Any, ...]:
        """All that the result depends on; without the anchor itself, which must not be held."""
        tensors = ("anchor" if x is anchor else None if x is None else Same(x) for x in self._tensors)
        longest = Same(self.longest) if isinstance(self.longest, Tensor) else self.longest
        return (*tensors, longest, self.gapless)

    @property
    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.offsets, self.padded, self.mask


@dataclass(frozen=True, eq=False)
class Rows:
    """Where the tokens lie; keys None: as the queries."""

    queries: Packing
    keys: Packing | None


def sides(
    offsets: tuple[Tensor | None, Tensor | None],
    padded: tuple[Tensor | None, Tensor | None],
    longest: tuple[Any, Any],
    mask: PaddingMask,
    cross: bool,
    gapless: bool = False,
) -> tuple[Given, Given]:
    """Queries and keys as the arguments of a call give them.

    Raises:
        InvalidArgument: one mask for cross-attention.
    """
    masks: tuple[Tensor | None, Tensor | None]
    if isinstance(mask, (tuple, list)):
        if len(mask) != 2:
            raise InvalidArgument(f"attention_mask must be one tensor, or two in a tuple; got {len(mask)}")
        masks = mask[0], mask[1]
    elif mask is not None and cross and any(x is None for x in offsets):
        raise InvalidArgument(
            "attention_type='cross' with a padding mask takes attention_mask=(queries', keys'), or cu_seqlens_q and "
            "cu_seqlens_kv; got one tensor"
        )
    else:
        masks = mask, mask
    return (
        Given("q", offsets[0], padded[0], longest[0], masks[0], gapless),
        Given("kv", offsets[1], padded[1], longest[1], masks[1], gapless),
    )


def check(queries: Given, keys: Given, packed: bool, pad_between: bool | None) -> None:
    """What can be said without looking at values.

    Raises:
        InvalidArgument: offsets and masks that are missing, too many, or of a wrong type or shape.
    """
    for side in (queries, keys):
        _check_types(side)
        if packed and side.offsets is None:
            raise InvalidArgument("qkv_format='thd' needs cu_seqlens_q and cu_seqlens_kv")
        if side.offsets is None and side.mask is None:
            raise InvalidArgument(
                f"a padding mask type needs cu_seqlens_{side.name} or attention_mask: give one, or use a mask type "
                "without padding"
            )
        if not packed and side.padded is not None:
            raise InvalidArgument(f"cu_seqlens_{side.name}_padded go with qkv_format='thd': leave them out")
        if not packed and side.mask is not None and (side.mask.ndim != 4 or side.mask.shape[1:3] != (1, 1)):
            raise ShapeError(
                f"a padding mask must be (batch, 1, 1, max_seqlen_{side.name}), got shape {tuple(side.mask.shape)}"
            )
        if not packed and side.mask is not None and side.mask.dtype != torch.bool:
            raise DtypeError(f"attention_mask must be bool, True in padding; got {side.mask.dtype}")
    if pad_between and not packed:
        raise InvalidArgument("pad_between_seqs=True goes with qkv_format='thd': use cu_seqlens_q or attention_mask")
    if (queries.padded is None) != (keys.padded is None):
        here, there = (queries, keys) if keys.padded is None else (keys, queries)
        raise InvalidArgument(
            f"cu_seqlens_{here.name}_padded without cu_seqlens_{there.name}_padded: they go together, whatever "
            f"pad_between_seqs is. Give both; for a side without padding pass its own cu_seqlens: "
            f"cu_seqlens_{there.name}_padded=cu_seqlens_{there.name}"
        )
    if pad_between and queries.padded is None:
        raise InvalidArgument(
            "pad_between_seqs=True needs cu_seqlens_q_padded and cu_seqlens_kv_padded, which say where each begins: "
            "give them, or leave pad_between_seqs out"
        )


def check_entries(sides: tuple[Given, Given], layout: str, sizes: tuple[int, int, int], ranks: int) -> None:
    """Offsets and masks are of the batch that 4-D tensors have, as far as sizes say.

    Args:
        sides: queries and keys, of which :func:`check` has seen the types.
        layout: bshd or sbhd.
        sizes: (batch, rows of q, rows of k).
        ranks: how many share the rows; over several, a mask's rows are compared with those of all when they are read.

    Raises:
        PackingError: they speak of another number of sequences, or of other rows.
    """
    for side, rows in zip(sides, sizes[1:], strict=True):
        _check_side(side, layout, sizes[0], rows, ranks == 1)


def _check_side(side: Given, layout: str, batch: int, rows: int, alone: bool) -> None:
    tensor = _TENSORS[side.name]
    counts = {
        f"cu_seqlens_{side.name}": None if side.offsets is None else side.offsets.shape[0] - 1,
        "attention_mask": None if side.mask is None else side.mask.shape[0],
    }
    for name, count in counts.items():
        if count in (None, batch):
            continue
        other = "sbhd" if layout == "bshd" else "bshd"
        remedy = (
            f"it has {rows} as {other!r}: pass qkv_format={other!r}"
            if count == rows
            else "one sequence lies in each entry"
        )
        raise PackingError(
            f"{name}: {count} sequences, and {tensor} has {batch} batch entries with qkv_format={layout!r}; {remedy}"
        )
    if side.mask is not None and alone and side.mask.shape[3] != rows:
        raise PackingError(
            f"attention_mask is {tuple(side.mask.shape)}, and {tensor} has {rows} rows with qkv_format={layout!r}: "
            "pass a mask of (batch, 1, 1, rows), or with attention_type='cross' two, (queries', keys')"
        )


def _check_ends(side: str, packing: Packing, rows: int, layout: str) -> None:
    """Sequences that end beyond the tensors' rows, or an entry's, are an error."""
    tensor = _TENSORS[side]
    if layout == "thd":
        end = packing._facts.rows
        if end is not None and end > rows:
            raise PackingError(
                f"the sequences of cu_seqlens_{side} (and cu_seqlens_{side}_padded) end at row {end}, and {tensor} has "
                f"{rows} rows"
            )
    elif packing._longest > rows:
        raise PackingError(
            f"the longest sequence has {packing._longest} tokens by cu_seqlens_{side}, and an entry of {tensor} has "
            f"{rows} rows with qkv_format={layout!r}"
        )


def _check_types(side: Given) -> None:
    """Offsets are tensors of integers in one dim, and a mask is a tensor."""
    offsets = {f"cu_seqlens_{side.name}": side.offsets, f"cu_seqlens_{side.name}_padded": side.padded}
    for name, x in offsets.items():
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise DtypeError(f"{name} must be an int32 tensor (sequences + 1,), got {type(x).__name__}")
        if x.dtype not in (torch.int32, torch.int64):
            raise DtypeError(f"{name} must be an int32 tensor (sequences + 1,), got {x.dtype}: use {name}.int()")
        if x.ndim != 1 or not x.shape[0]:
            raise ShapeError(f"{name} must be (sequences + 1,), got shape {tuple(x.shape)}")
    if side.mask is not None and not isinstance(side.mask, Tensor):
        raise DtypeError(f"attention_mask must be a bool tensor, or two in a tuple; got {type(side.mask).__name__}")


#: Whose rows a side's offsets count.
_TENSORS = {"q": "query_layer", "kv": "key_layer"}


def captured(x: Tensor) -> bool:
    """In a CUDA graph, which reads offsets and masks again at each replay: nothing of this batch may be remembered."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def rows_of(queries: Given, keys: Given, packed: bool, device: torch.device, layer: int | None) -> Rows:
    """The packings of a batch, made at the first layer that asks for them: the values are copied to the host there.

    Raises:
        PackingError: offsets that describe no batch, or that disagree with the mask.
    """
    found: Rows = remembered(
        "rows", queries, keys, (packed, device), lambda: _make(queries, keys, packed, device), layer
    )  # fmt: skip
    return found


def rows_within(
    queries: Given, keys: Given, layout: str, sizes: tuple[int, int], device: torch.device, layer: int | None
) -> Rows:
    """As :func:`rows_of`, of tensors of so many rows (4-D: of each entry) for queries and keys.

    Raises:
        PackingError: also where a sequence ends beyond them.
    """
    found = rows_of(queries, keys, layout == "thd", device, layer)
    _check_ends("q", found.queries, sizes[0], layout)
    _check_ends("kv", found.queries if found.keys is None else found.keys, sizes[1], layout)
    return found


def remembered(
    what: str, queries: Given, keys: Given, more: tuple[Any, ...], make: Callable[[], Any], layer: int | None
) -> Any:
    """What ``make`` returns, for as long as the queries' offsets (or mask) live and nobody writes to any of them."""
    anchor = queries.anchor
    assert anchor is not None
    return once(anchor, (what, *queries.key(anchor), *keys.key(anchor), *more), layer, make)


def rows_unread(queries: Given, keys: Given) -> Rows:
    """The packings of a "thd" batch without looking at the offsets' values, which nobody checks then.

    Raises:
        InvalidArgument: a length is missing that only the values could tell.
    """
    for side in (queries, keys):
        if not isinstance(side.longest, int):
            raise InvalidArgument(
                f"without reading the offsets (check_offsets=False, or inside a CUDA graph), max_seqlen_{side.name} "
                f"must be an int; got {side.longest!r}"
            )
        if side.gapless and side.padded is not None and side.padded is not side.offsets:
            raise InvalidArgument(
                f"pad_between_seqs=False with cu_seqlens_{side.name}_padded, which are not read here "
                "(check_offsets=False, or inside a CUDA graph): leave out one"
            )

    def make(side: Given) -> Packing:
        assert side.offsets is not None
        return Packing(side.offsets, side.padded, max_seqlen=side.longest, check=False)

    return Rows(make(queries), None if _one(queries, keys) else make(keys))


def _one(queries: Given, keys: Given) -> bool:
    """Queries and keys are given by the same tensors."""
    return keys.offsets is queries.offsets and keys.padded is queries.padded and keys.mask is queries.mask


def _make(queries: Given, keys: Given, packed: bool, device: torch.device) -> Rows:
    found = _packing(queries, packed, device)
    if _one(queries, keys):
        return Rows(found, None)
    other = _packing(keys, packed, device)
    if not packed and queries.mask is not None and keys.mask is queries.mask:
        return Rows(found, None)  # the offsets of both, where given, are the mask's
    alike = (found._facts.lengths, found._facts.starts) == (other._facts.lengths, other._facts.starts)
    holes = found._holes is not None or other._holes is not None
    return Rows(found, None if alike and not holes and found.rows == other.rows else other)


def _packing(side: Given, packed: bool, device: torch.device) -> Packing:
    longest = None if side.longest is None or not packed else int(side.longest)
    by_mask = None if packed or side.mask is None else Packing.from_mask(~side.mask[:, 0, 0])
    if side.offsets is None:
        assert by_mask is not None
        return moved(by_mask, device)
    # Copies: what is remembered for as long as the caller's tensors live must not keep them alive.
    offsets = side.offsets.to(torch.int32, copy=True)
    padded = None if side.padded is None else side.padded.to(torch.int32, copy=True)
    made = Packing(offsets, padded, max_seqlen=longest)
    if side.gapless and made._facts.gaps:
        raise InvalidArgument(
            f"pad_between_seqs=False says that there is no padding, and cu_seqlens_{side.name}_padded where it is: "
            "leave out one"
        )
    if by_mask is not None and by_mask._facts.lengths != made._facts.lengths:
        told, hidden = (list(packing._facts.lengths or ()) for packing in (made, by_mask))
        raise PackingError(
            f"cu_seqlens_{side.name} and attention_mask disagree: the lengths are {told} by cu_seqlens_{side.name} and "
            f"{hidden} by attention_mask, which is True in padding: give one of the two, or make them agree"
        )
    # Lengths do not say at which end of an entry the padding is, and a mask does.
    return moved(made if by_mask is None else by_mask, device)


def moved(packing: Packing, device: torch.device) -> Packing:
    """A packing on a device; one that was made on the host comes there without waiting."""
    if device.type == "cuda" and packing.device.type == "cpu":
        return packing.pin_memory().to(device, non_blocking=True)
    return packing.to(device)


# --- masks that are given whole ---


def visible(mask: Any, expected: tuple[int, int]) -> Tensor:
    """bool, True where a query sees a key, of an "arbitrary" mask, which is True where it does not.

    Raises:
        InvalidArgument: not one bool tensor that ends in (rows of q, rows of k), each possibly 1.
    """
    if not isinstance(mask, Tensor):
        raise InvalidArgument(
            f"attn_mask_type='arbitrary' needs attention_mask, one bool tensor, True where a key is hidden; got "
            f"{type(mask).__name__}"
        )
    if mask.dtype != torch.bool:
        raise DtypeError(f"attention_mask must be bool, True where a key is hidden; got {mask.dtype}")
    if mask.ndim not in (2, 3, 4) or any(n not in (1, m) for n, m in zip(mask.shape[-2:], expected, strict=True)):
        raise ShapeError(
            f"attention_mask must broadcast to (batch, num_heads, rows of q, rows of k), which end in {expected}; got "
            f"{tuple(mask.shape)}"
        )
    if torch.compiler.is_compiling() or captured(mask):
        return mask.logical_not()
    found: Tensor = once(mask, ("visible",), None, mask.logical_not)
    return found


def distance(rows_q: int, rows_k: int, device: torch.device) -> Tensor:
    """(rows_q, rows_k): key position - query position, where query i stands at i."""
    return torch.arange(rows_k, device=device) - torch.arange(rows_q, device=device)[:, None]
