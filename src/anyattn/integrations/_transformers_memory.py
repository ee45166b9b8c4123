"""Things worked out once per forward, by the first layer that asks, for all layers of a model."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

from anyattn._errors import PackingError
from anyattn.integrations._layout import Shape, documents_of, several

memory: Any = WeakIdKeyDictionary()
"""Anchor, or the tensor that it is a view of -> (its version, {key: _Entry})."""
caches: list[Any] = [memory]
"""All that :func:`forget` clears."""
_CASES = 16


class _Entry:
    """Something worked out."""

    __slots__ = ("layer", "value")

    def __init__(self, value: Any, layer: int) -> None:
        self.value = value
        self.layer = layer
        """The last layer that asked; -1 where layers have no numbers."""


class _Watched(threading.local):
    """Entries that this thread uses, while somebody wants to know."""

    entries: list[_Entry] | None = None


_watched = _Watched()


@contextmanager
def watched() -> Iterator[list[_Entry]]:
    """Yields a list to which every entry is added that is used within."""
    found: list[_Entry] = []
    _watched.entries = found
    try:
        yield found
    finally:
        _watched.entries = None


class Same:
    """A tensor as part of a key: equal to itself, or to a view of the same memory, unless it was written to meanwhile.

    It does not keep the tensor alive, so that two tensors may be remembered with one another.
    """

    def __init__(self, x: Tensor) -> None:
        owner, self.place = _owner(x)
        self.ref: Any = WeakIdRef(owner)
        self.number, self.version, self.silent = id(owner), _version(x), x.is_inference()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Same) or (self.place, self.version) != (other.place, other.version):
            return False
        mine = self.ref()
        return mine is not None and mine is other.ref()

    def __hash__(self) -> int:
        return self.number


def once(anchor: Any, key: tuple[Any, ...], layer: int | None, make: Callable[[], Any]) -> Any:
    """What ``make`` returns, remembered for as long as ``anchor`` lives and is not written to.

    Args:
        anchor: the tensor (or other object) that all layers of a forward pass. New views of one tensor are one
            anchor, if they are alike.
        key: what else the result depends on. Neither it nor the result may hold the anchor, nor a tensor of the
            caller's: tensors are in a key as :class:`Same`.
        layer: the number of the layer that asks, or None.
        make: works it out, and copies to the host. It runs outside of inference_mode, for training may ask later.

    Tensors made under inference_mode do not say when they are written to. For them a result holds for one forward:
    until a layer asks that does not come after the last one that asked. Nobody says it of what other libraries write
    (collectives, ``.data``, NumPy) either: :func:`forget` is for that.
    """
    number = -1 if layer is None else layer
    silent = any(k.silent for k in key if isinstance(k, Same))
    version, owner, place = 0, anchor, None
    if isinstance(anchor, Tensor):
        silent = silent or anchor.is_inference()
        version = _version(anchor)
        owner, place = _owner(anchor)
    known = memory.get(owner)
    if known is None or known[0] != version or len(known[1]) >= _CASES:
        known = memory[owner] = (version, {})
    entry = known[1].get((place, key))
    if entry is None or (silent and number <= entry.layer):
        if entry is not None:
            entry.layer = sys.maxsize  # no later forward's: whoever holds it is not answered by it either
        entry = known[1][place, key] = _Entry(_outside_of_inference(make), number)
    entry.layer = number
    if _watched.entries is not None:
        _watched.entries.append(entry)
    return entry.value


def forget() -> None:
    """Forget every batch that was looked at: the next layer reads offsets, masks and positions again.

    For tensors that are written to without their version being counted: receive buffers of collectives, ``.data``,
    and memory shared with NumPy.
    """
    for cache in caches:
        cache.clear()


def _outside_of_inference(make: Callable[[], Any]) -> Any:
    """What ``make`` returns, of tensors that may be saved for backward."""
    grad = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        return make()


def _owner(x: Tensor) -> tuple[Tensor, tuple[Any, ...] | None]:
    """The tensor that a view is of, and where the view lies in it; another tensor is its own."""
    base = x._base
    if base is None:
        return x, None
    return base, (x.dtype, tuple(x.shape), x.stride(), x.storage_offset())


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


def documents_at(positions: Tensor, shape: Shape, real: Tensor | None, layer: int | None) -> Tensor:
    """int64 (B, Q) on the CPU: the document of each query row, by where positions restart; looked at once.

    Args:
        positions: (B or 1, Q), on any device.
        shape: of the call.
        real: bool (B, K) on the CPU, or None.
        layer: that asks.

    Raises:
        PackingError: positions restart after cached tokens.
    """
    if real is None:
        documents: Tensor = once(
            positions, ("documents", shape.batch), layer, lambda: documents_of(positions, shape.batch)
        )
    else:
        documents = documents_of(positions, shape.batch, real[:, -shape.queries :])
    if shape.queries != shape.keys and several(documents):
        raise PackingError(
            f"position_ids restart among {shape.queries} new tokens after {shape.keys - shape.queries} cached "
            "ones, and do not say to which document those belong: pass a 4-D mask"
        )
    return documents
