"""What a call says, settled by the first layer of a forward that says it, found again by all later ones.

A layer's arguments beside queries, keys and values are mostly the very objects that the layer before it was given:
the same mask, the same positions and offsets. A look-up by what they are, and a look at whether they were written to
meanwhile, takes the place of reading them. It is an addition to the memory of ``_transformers_memory``, never its
substitute: a call that is not found is worked out in full.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from anyattn._packing import Packing
from anyattn.integrations import _transformers_memory as memory

#: Keyword arguments that say something about masks and packing.
NAMES = (
    "position_ids", "packing", "packing_kv", "cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens_q", "cu_seqlens_k",
    "max_length_q", "max_length_k", "max_seqlen_q", "max_seqlen_k",
)  # fmt: skip
_PACKING = 1 + NAMES.index("packing")
_ENTRIES = 64
OWN = True


class Settled(NamedTuple):
    """How one call is made, but for its tensors and numbers."""

    causal: bool = False
    window: tuple[int, int] | None = None
    packing: Packing | None = None
    """None: the caller's own as it is, if there is one."""
    packing_kv: Packing | None = None
    """The same for keys."""
    flat: bool = False
    """Batch entries are flattened to rows: the packings count those."""
    mask: Tensor | None = None
    """bool (B, 1, Q, K): complete."""
    whole: Any = None
    """A complete mask; ``OWN`` for the call's own, which is not kept."""
    keys: int = 0
    """Key rows that hold something; the layer may pass more."""


class Given(NamedTuple):
    """What a call was given."""

    key: tuple[Any, ...]
    things: tuple[Any, ...]
    """The mask, then the keyword arguments ``NAMES``."""


class _Known:
    """A settled call, and what it was settled for; it keeps none of that alive."""

    __slots__ = ("layer", "others", "settled", "silent", "tensors", "used")

    def __init__(self, settled: Settled, used: list[Any], layer: int) -> None:
        self.settled = settled
        self.tensors: list[tuple[int, ref[Tensor], int]] = []
        """(place among the things, the tensor, its version)"""
        self.others: list[tuple[int, ref[Any], Any]] = []
        """The same for packings, by their facts, and for tensors that do not say when they are written to, by None."""
        self.silent = False
        """There are such tensors: what was settled holds for one forward."""
        self.used = used
        """Entries of the memory that it was settled by."""
        self.layer = layer
        """The last one that asked."""


_known: dict[tuple[Any, ...], _Known] = {}
memory.caches.append(_known)


def given(numbers: tuple[Any, ...], mask: Any, options: Mapping[str, Any]) -> Given:
    """What a call was given.

    Args:
        numbers: sizes and flags, hashable.
        mask: of the call.
        options: its further keyword arguments.
    """
    things = (mask, *map(options.get, NAMES))
    # Objects by where they lie, below 0: find() makes sure that they are still the same ones.
    return Given((numbers, *[x if x is None or x.__class__ is int else ~id(x) for x in things]), things)


def find(said: Given, module: torch.nn.Module) -> Settled | None:
    """What an earlier layer settled for the very same objects, none of them written to since; else None."""
    key, things = said
    known = _known.get(key)
    if known is None:
        return None
    for place, tensor, version in known.tensors:
        if tensor() is not things[place] or things[place]._version != version:
            return None
    for place, other, state in known.others:
        if other() is not things[place] or (state is not None and things[place]._facts is not state):
            return None
    return known.settled if not known.silent or _comes_next(known, module) else None


def keep(said: Given, settled: Settled, module: torch.nn.Module, used: list[Any]) -> None:
    """Remember a call that was settled for as long as everything lives that it was given.

    Args:
        said: what it was given.
        settled: how it is made.
        module: the layer.
        used: entries of the memory that it was settled by.
    """
    key, things = said
    if settled.packing is things[_PACKING]:  # those of each call: kept here they would live for ever
        settled = settled._replace(packing=None)
    if settled.packing_kv is things[_PACKING + 1]:
        settled = settled._replace(packing_kv=None)
    known = _Known(settled, used, _number(module))
    forget = lambda _: _known.pop(key, None)  # noqa: E731
    for place, x in enumerate(things):
        if x is None or x.__class__ is int:
            continue
        if isinstance(x, Packing):
            known.others.append((place, ref(x, forget), x._facts))
        elif not isinstance(x, Tensor):
            return
        elif x.is_inference():
            known.others.append((place, ref(x, forget), None))
            known.silent = True
        else:
            known.tensors.append((place, ref(x, forget), x._version))
    if len(_known) >= _ENTRIES:
        _known.clear()
    _known[key] = known


def _number(module: torch.nn.Module) -> int:
    layer = getattr(module, "layer_idx", None)
    return -1 if layer is None else layer


def _comes_next(known: _Known, module: torch.nn.Module) -> bool:
    """Whether a layer comes after the last one that asked: only then is this the same forward. It is the last now."""
    number = _number(module)
    if number <= known.layer or any(number <= entry.layer for entry in known.used):
        return False
    known.layer = number
    for entry in known.used:
        entry.layer = number
    return True
