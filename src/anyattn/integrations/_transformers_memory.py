"""Things worked out once per forward, by the first layer that asks, for all layers of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from anyattn._errors import PackingError
from anyattn.integrations._layout import Shape, documents_of, several

memory: Any = WeakIdKeyDictionary()
"""Anchor -> (its version, {key: _Entry})."""
_CASES = 16


class _Entry(NamedTuple):
    value: Any
    layer: int
    """The last layer that asked; -1 where layers have no numbers."""


class Same:
    """A tensor as part of a key: equal to itself, unless it was written to meanwhile."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.version = x, _version(x)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.x is other.x and self.version == other.version

    def __hash__(self) -> int:
        return id(self.x)


def once(anchor: Any, key: tuple[Any, ...], layer: int | None, make: Callable[[], Any]) -> Any:
    """What ``make`` returns, remembered for as long as ``anchor`` lives and is not written to.

    Args:
        anchor: the tensor (or other object) that all layers of a forward pass.
        key: what else the result depends on. Neither it nor the result may hold the anchor.
        layer: the number of the layer that asks, or None.
        make: works it out, and copies to the host.

    Tensors made under inference_mode do not say when they are written to. For them a result holds for one forward:
    until a layer asks that does not come after the last one that asked.
    """
    number = -1 if layer is None else layer
    tensors = [x for x in (anchor, *(k.x for k in key if isinstance(k, Same))) if isinstance(x, Tensor)]
    silent = any(x.is_inference() for x in tensors)
    version = _version(anchor) if isinstance(anchor, Tensor) else 0
    known = memory.get(anchor)
    if known is None or known[0] != version or len(known[1]) >= _CASES:
        known = memory[anchor] = (version, {})
    entry = known[1].get(key)
    value = make() if entry is None or (silent and number <= entry.layer) else entry.value
    known[1][key] = _Entry(value, number)
    return value


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
