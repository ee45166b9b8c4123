"""Many small tensors to a device in one copy that nobody waits for."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from anyattn._context._data import KernelCall, Stage
from anyattn._packing import Packing

T = TypeVar("T")


class Upload:
    """Collects int32 tensors, and moves them in one copy that nobody waits for."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def add(self, x: Tensor) -> Tensor:
        """Remember a tensor."""
        assert x.dtype == torch.int32
        self._tensors.append(x)
        return x

    def packing(self, packing: Packing) -> Packing:
        """Remember a packing's tensors."""
        packing._with(self.add)
        return packing

    def moved(self, tables: T, device: torch.device) -> tuple[T, tuple[Tensor, ...]]:
        """A structure with everything in it on the device, and the tensors that hold all of it."""
        if device.type == "cpu":
            return tables, tuple(self._tensors)
        places, total = [], 0
        for x in self._tensors:
            places.append(total)
            total += -(-x.numel() // 4) * 4  # kernels read some of them in vectors
        blob = torch.zeros(total, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
        for x, place in zip(self._tensors, places, strict=True):
            blob[place : place + x.numel()] = x.flatten()
        there = blob.to(device, non_blocking=True)
        views = {
            id(x): there[place : place + x.numel()].view(x.shape)
            for x, place in zip(self._tensors, places, strict=True)
        }
        moved: T = _map(tables, views, {})
        return moved, (there,)


def _map(value: Any, views: dict[int, Tensor], packings: dict[int, Packing]) -> Any:
    """A structure with its tensors replaced; one packing stays one."""
    if isinstance(value, Tensor):
        return views.get(id(value), value)
    if isinstance(value, Packing):
        if id(value) not in packings:
            packings[id(value)] = value._with(lambda t: views[id(t)])
        return packings[id(value)]
    if is_dataclass(value) and not isinstance(value, (Stage, KernelCall, type)):
        names = type(value).__dataclass_fields__
        return type(value)(**{name: _map(getattr(value, name), views, packings) for name in names})
    if type(value) is tuple:
        return tuple(_map(v, views, packings) for v in value)
    return value
