"""What a backend derives from a packing (a block mask, say), made once per batch and not once per layer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from anyattn._call import Rows

T = TypeVar("T")

_kept: Any = WeakTensorKeyDictionary()


def derived(rows_q: Rows, rows_k: Rows, key: Hashable, make: Callable[[], T]) -> T:
    """``make()``'s value, kept under ``key`` for as long as the two packings live and are not refilled.

    The value must hold no view of the tables, which would keep them, and itself, for ever.

    While a CUDA graph is captured nothing is taken from before or kept for later: what is derived must be part of the
    graph, for it is replayed with other offsets.
    """
    table, other = rows_q.table, rows_k.table
    if table.is_inference() or other.is_inference():
        return make()
    if table.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return make()
        # What one stream writes is not there yet for another.
        key = (key, torch._C._cuda_getCurrentRawStream(table.device.index))
    values: dict[Hashable, tuple[tuple[int, int], weakref.ref[Tensor], Any]] = _kept.setdefault(table, {})
    now = (table._version, other._version)
    found = values.get(key)
    if found is None or found[0] != now or found[1]() is not other:
        with torch.inference_mode(False):  # what is made in evaluation serves training too
            found = values[key] = (now, weakref.ref(other), make())
    value: T = found[2]
    return value
