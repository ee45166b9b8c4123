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
    if pad_between and queries.padded is None and keys.padded is None:
        raise InvalidArgument(
            "pad_between_seqs=True needs cu_seqlens_q_padded and cu_seqlens_kv_padded, which say where each begins: "
            "give them, or leave pad_between_seqs out"
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
    if by_mask is not None and by_mask.host_lengths()[0] != made.host_lengths()[0]:
        raise PackingError(
            f"cu_seqlens_{side.name} say lengths {list(made.host_lengths()[0])}, and attention_mask "
            f"{list(by_mask.host_lengths()[0])}: give one of the two"
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
