"""What a mask of diffusers comes to: nothing, runs of real rows, or the mask itself.

Legend: B batch, H heads, Q query rows, K key rows. A mask broadcasts to (B, H, Q, K).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from anyattn._errors import DtypeError, ShapeError
from anyattn._packing import Packing


class Shape(NamedTuple):
    """Of the scores of a call."""

    batch: int
    heads: int
    queries: int
    keys: int


class Habits(NamedTuple):
    """What is done with masks under one name."""

    read: bool = True
    """They may be copied to the host."""
    whole: bool = False
    """Over several ranks, a mask over all keys is in the order of the ranks' parts."""


class Terms(NamedTuple):
    """What a mask comes to, for one kind of call."""

    rows: Packing | None = None
    """Queries that see a key; None: all. Only with ``keys``."""
    keys: Packing | None = None
    """Keys that every query of ``rows`` sees, and no other."""
    mask: Tensor | None = None
    """bool, 4-D."""
    bias: Tensor | None = None
    """Additive, 4-D."""
    causal: Any = False
    """As ``attention(causal=...)``: with ``keys``, the alignment that keeps positions."""


class Facts(NamedTuple):
    """What was read from a mask. Holds nothing of the mask itself."""

    exact: bool = True
    """It shows or hides, and weighs nothing: bool, or of zeros and minus infinities."""
    everything: bool = False
    """Every query sees every key."""
    rows: Packing | None = None
    keys: Packing | None = None
    """None: no Packing says what the mask does."""
    from_start: bool = False
    """The real keys of every entry are its first ones."""
    to_end: bool = False
    """They are its last ones."""
    visible: Tensor | None = None
    """bool: the same as an additive mask, where that is exact."""


def as_four_dims(mask: Any, batch: int, keys: tuple[int, ...]) -> Tensor:
    """A mask as diffusers' native backend reads it, 4-D and without repetition.

    Args:
        mask: (B, K) for keys; otherwise its dims are the last of (B, H, Q, K).
        batch: B.
        keys: allowed sizes of K.

    Raises:
        DtypeError: neither bool nor floating.
        ShapeError: not a tensor of 1 to 4 dims.
    """
    if not isinstance(mask, Tensor) or not 1 <= mask.ndim <= 4:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ShapeError(f"attn_mask must be a tensor of 1 to 4 dims, a BlockMask or None, got {got}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise DtypeError(
            f"attn_mask must be bool, True meaning attend, or floating and additive; got {mask.dtype}: use "
            "attn_mask.bool()"
        )
    if mask.ndim == 2 and mask.shape[0] == batch and mask.shape[1] in keys:
        mask = mask[:, None, None]
    whole: Tensor = mask[(None,) * (4 - mask.ndim)]
    for dim in range(3):
        if whole.shape[dim] > 1 and whole.stride(dim) == 0:
            whole = whole.narrow(dim, 0, 1)
    return whole


def check_fits(whole: Tensor, shape: Shape) -> None:
    """Refuse a mask that does not broadcast to the scores."""
    if any(a not in (1, b) for a, b in zip(whole.shape, shape, strict=True)):
        raise ShapeError(
            f"attn_mask must broadcast to (batch, heads, queries, keys) = {tuple(shape)}, or be (batch, keys) = "
            f"({shape.batch}, {shape.keys}); as 4-D it has shape {tuple(whole.shape)}"
        )


def settle(whole: Tensor, shape: Shape, causal: Any, windowed: bool, read: bool) -> Terms:
    """What a mask comes to, exactly.

    Args:
        whole: from :func:`as_four_dims`.
        shape: of the scores.
        causal: False, or the alignment that the call asks for.
        windowed: the call has a window too.
        read: the mask may be copied to the host, once for as long as it lives.
    """
    if not whole.numel():
        return Terms(causal=causal)
    as_it_is = Terms(mask=whole, causal=causal) if whole.dtype == torch.bool else Terms(bias=whole, causal=causal)
    if whole.requires_grad or not read:
        return as_it_is
    facts = facts_of(whole, shape)
    if facts.everything:
        return Terms(causal=causal)
    if facts.keys is not None:
        if not causal and not windowed:
            return Terms(facts.rows, facts.keys)
        if causal and not windowed and facts.rows is None and shape.queries == shape.keys:
            # Which end of queries and keys is aligned decides which keys the rows before and after see.
            if facts.from_start:
                return Terms(keys=facts.keys, causal="top_left")
            if facts.to_end:
                return Terms(keys=facts.keys, causal=True)
    return as_it_is if facts.visible is None else Terms(mask=facts.visible, causal=causal)


def facts_of(whole: Tensor, shape: Shape) -> Facts:
    """What a mask says; copied from the device at the first call that asks."""
    facts: Facts = remembered(whole, (shape,), lambda: _read(whole, shape))
    return facts


_memory: Any = WeakIdKeyDictionary()
#: Readings of one tensor: views of it, and shapes of calls that it broadcasts to.
_READINGS = 64


def remembered(whole: Tensor, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """What ``make`` returns, kept while the tensor that the mask is a view of lives and is not written to.

    All layers of a model are given one mask, or views of one, so only the first layer waits for the device.
    """
    found = recalled(whole, key)
    if found is None:
        with torch.inference_mode(False):  # what is made in validation serves training too
            found = make()
        keep(whole, key, found)
    return found


def recalled(whole: Tensor, key: tuple[Any, ...]) -> Any:
    """What was kept for a mask under a key; None if nothing was, or the mask was written to since."""
    anchor = whole if whole._base is None else whole._base
    if anchor.is_inference() or whole.is_inference():
        return None
    known = _memory.get(anchor)
    return None if known is None or known[0] != anchor._version else known[1].get(_view(whole, key))


def keep(whole: Tensor, key: tuple[Any, ...], found: Any) -> None:
    """Keep something for :func:`recalled`, which must not hold the mask.

    Tensors made under inference_mode do not say when they are written to: nothing is kept for them.
    """
    anchor = whole if whole._base is None else whole._base
    if anchor.is_inference() or whole.is_inference():
        return
    known = _memory.get(anchor)
    if known is None or known[0] != anchor._version or len(known[1]) >= _READINGS:
        known = _memory[anchor] = (anchor._version, {})
    known[1][_view(whole, key)] = found


def _view(whole: Tensor, key: tuple[Any, ...]) -> tuple[Any, ...]:
    return (whole.storage_offset(), whole.shape, whole.stride(), whole.dtype, *key)


def forget() -> None:
    """Read every mask anew at its next call, as if it had never been seen.

    A mask is read again by itself when torch's operations write to it. What writes past them goes unseen: collectives
    (``torch.distributed.broadcast`` into a mask that is used again), ``mask.data``, numpy arrays and other libraries
    that share its memory. After such a write, and before the next call, this is needed. Over several ranks one rank may
    call it alone.

    Example::

        >>> import anyattn
        >>> anyattn.integrations.diffusers.forget()
    """
    _memory.clear()


def _read(whole: Tensor, shape: Shape) -> Facts:
    additive = whole.dtype != torch.bool
    visible = (whole == 0) if additive else whole
    exact = (visible | (whole == -torch.inf)).all() if additive else torch.ones_like(visible.all())
    seen = visible.any(2).any(1)  # (B, K): by any query
    if visible.shape[2] > 1:
        sees = visible.any(3).any(1)  # (B, Q): any key
        product = (visible == (seen[:, None, None] & sees[:, None, :, None])).all()
    else:  # a query that sees nothing is one whose entry has no keys
        sees = torch.ones_like(seen[:, :1])
        product = (visible == seen[:, None, None]).all()
    found = torch.cat([x.reshape(-1) for x in (exact, product, seen, sees)]).cpu()  # the one copy
    facts = _facts(ctypes.string_at(found.data_ptr(), found.numel()), tuple(seen.shape), shape, whole.device)
    return facts._replace(visible=visible) if additive and facts.exact else facts


@lru_cache(maxsize=64)
def _facts(content: bytes, size: tuple[int, int], shape: Shape, device: torch.device) -> Facts:
    """Facts by what was read: a model that makes its mask anew in every layer has its packings made once."""
    with torch.inference_mode(False):
        return _facts_found(torch.frombuffer(bytearray(content), dtype=torch.bool), size, shape, device)


def _facts_found(found: Tensor, size: tuple[int, int], shape: Shape, device: torch.device) -> Facts:
    exact, product = found[:2].tolist()
    if not exact or not product:
        return Facts(exact)
    seen, sees = found[2:].split((size[0] * size[1], found.numel() - 2 - size[0] * size[1]))
    seen = seen.view(size).expand(shape.batch, shape.keys)
    sees = sees.view(size[0], -1).expand(shape.batch, shape.queries)
    if bool(seen.all()) and bool(sees.all()):
        return Facts(everything=True)
    length = seen.sum(1, keepdim=True)
    at = torch.arange(shape.keys)
    return Facts(
        rows=None if bool(sees.all()) else Packing.from_mask(sees).to(device),
        keys=Packing.from_mask(seen).to(device),
        from_start=torch.equal(seen, at < length),
        to_end=torch.equal(seen, at >= shape.keys - length),
    )


@lru_cache(maxsize=64)
def all_rows(batch: int, rows: int, device: torch.device) -> Packing:
    """The packing of entries without padding."""
    with torch.inference_mode(False):
        return Packing.from_lengths([rows] * batch, device=device)


def without_reading(real: Tensor, k: Tensor, v: Tensor) -> tuple[Packing, Tensor, Tensor]:
    """Keys that are real first in their entries, and how many; computed on the device, which nothing waits for.

    Args:
        real: bool (B, K).
        k: (B, K, heads, dim).
        v: the same.
    """
    batch, keys = k.shape[:2]
    order = real.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    index = (order + torch.arange(batch, device=k.device)[:, None] * keys).flatten()
    ends = real.sum(1).cumsum(0)
    offsets = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
    packing = Packing(offsets, max_seqlen=keys, check=False)
    k, v = (x.flatten(0, 1).index_select(0, index).unflatten(0, (batch, keys)) for x in (k, v))
    return packing, k, v
