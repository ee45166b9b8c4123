"""What a backend derives from a packing (a block mask, say), made once per batch and not once per layer."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from anyattn._call import Rows

T = TypeVar("T")


class _Kept:
    """What is kept for one table, for as long as it lives."""

    __slots__ = ("captured", "table", "values")

    def __init__(self, table: Tensor) -> None:
        def forget(_: Any, key: int = id(table), kept: dict[int, _Kept] = _kept) -> None:
            kept.pop(key, None)

        self.table = weakref.ref(table, forget)
        self.values: dict[Hashable, tuple[tuple[int, int], weakref.ref[Tensor], Any]] = {}
        self.captured = False
        """A CUDA graph reads the table. Where it holds the refilling too, a replay shows in no version."""


#: By the id of a table: a tensor hashes as slowly as a weak dictionary looks up.
_kept: dict[int, _Kept] = {}


def _of(table: Tensor) -> _Kept:
    found = _kept.get(id(table))
    if found is None or found.table() is not table:
        found = _kept[id(table)] = _Kept(table)
    return found


def derived(rows_q: Rows, rows_k: Rows, key: Hashable, make: Callable[[], T]) -> T:
    """``make()``'s value, kept under ``key`` for as long as the two packings live and are not refilled.

    The value must hold no view of the tables, which would keep them, and itself, for ever, and must not be None.

    Nothing is taken from before or kept for later in the memory of a CUDA graph: what is derived there must be part of
    the graph, for it is replayed with other offsets. Nor is it for packings that were captured once.
    """
    value = kept(rows_q, rows_k, key, make)
    return make() if value is None else value


def kept(rows_q: Rows, rows_k: Rows, key: Hashable, make: Callable[[], T]) -> T | None:
    """As ``derived``, but None where the value would be made anew at every call."""
    table, other = rows_q.table, rows_k.table
    if table.is_inference() or other.is_inference():  # they have no versions
        return None
    mine = _of(table)
    others = mine if other is table else _of(other)
    if table.is_cuda:
        device = table.get_device()
        stream = torch._C._cuda_getCurrentRawStream(device)
        if stream and in_graph_memory(device):
            mine.captured = others.captured = True
        key = (key, stream)  # what one stream writes is not there yet for another
    if mine.captured or others.captured:
        return None
    now = (table._version, other._version)
    found = mine.values.get(key)
    if found is None or found[0] != now or found[1]() is not other:
        with torch.inference_mode(False):  # what is made in evaluation serves training too
            found = mine.values[key] = (now, weakref.ref(other), make())
    value: T = found[2]
    return value


def in_graph_memory(device: int) -> bool:
    """Whether memory taken on a device's current stream belongs to a CUDA graph, so that nothing in it may be kept.

    It does while a graph is captured, and where torch.compile first runs what it captures next (its mode
    "reduce-overhead"), on a stream of its own. Neither is the default stream.
    """
    stream = torch._C._cuda_getCurrentRawStream(device)
    return bool(stream) and (torch.cuda.is_current_stream_capturing() or _is_of_compiled_graphs(device, stream))


def _is_of_compiled_graphs(device: int, stream: int) -> bool:
    trees: Any = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is None:
        return False
    try:
        manager = trees.get_manager(device, create_if_none_exists=False)
        return manager is not None and bool(manager.stream.cuda_stream == stream)
    except Exception:  # private to torch: where it is another, nothing is kept
        return True
