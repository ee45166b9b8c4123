"""Documents whose keys a cache holds, noted where a packed batch fills it: a later step sees them all.

The mask function is told of the cache by what ``register`` wraps. What is noted lives on the cache itself and is read
from the host, so that a step of any other cache costs one look at an attribute.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from anyattn._errors import PackingError
from anyattn.integrations._layout import several

_ATTRIBUTE = "_anyattn_documents"
#: The cache that the mask is for that is asked for next; nothing is kept alive by it.
cache_given: ContextVar[ref[Any] | None] = ContextVar("cache_given", default=None)


class Step(NamedTuple):
    """Where new tokens stand in a cache."""

    first: int
    """Tokens that the cache held before them, those that a sliding cache has dropped included."""
    kv_offset: int
    """Tokens that a sliding cache has dropped."""
    window: int | None
    """Keys before its own that a query sees, if not all."""


def give(cache: Any) -> None:
    """Say which cache the next mask is for; None for none."""
    try:
        cache_given.set(None if cache is None else ref(cache))
    except TypeError:  # a class of somebody's own, without weak references
        cache_given.set(None)


def take() -> Any:
    """The cache that was said, once; or None."""
    found = cache_given.get()
    if found is None:
        return None
    cache_given.set(None)
    return found()


def documents_in(cache: Any) -> Tensor | None:
    """Integers (B, S) on the CPU: the document of each of the first tokens of a cache; None where it is one."""
    found: Tensor | None = getattr(cache, _ATTRIBUTE, None)
    return found


def note_documents(cache: Any, documents: Tensor | None) -> None:
    """Note what an empty cache is filled with.

    Args:
        cache: or None.
        documents: integers (B, Q) on the CPU, or None for one per entry.
    """
    if cache is None:
        return
    if documents is not None and several(documents):
        setattr(cache, _ATTRIBUTE, documents)
    elif documents_in(cache) is not None:
        setattr(cache, _ATTRIBUTE, None)


def trim(cache: Any) -> None:
    """Forget of a cache that is noted what it no longer holds. That asks the cache for its length: no other one."""
    documents = documents_in(cache)
    if documents is None:
        return
    length = int(cache.get_seq_length())
    if length < documents.shape[1]:  # it was reset, or cut
        note_documents(cache, documents[:, :length] if length else None)


def sees_several(cache: Any, batch: int, step: Step, real: Tensor | None) -> bool:
    """Whether new tokens, told apart by nothing, see cached keys of several documents.

    Args:
        cache: or None.
        batch: B.
        step: where the tokens stand.
        real: bool (B, keys) on the CPU, of the keys that are left; None: all.
    """
    documents = documents_in(cache)
    if documents is None:
        return False
    if step.first < documents.shape[1]:  # it was cut
        documents = documents[:, : step.first]
        note_documents(cache, documents)
    if not step.first:
        return False
    if documents.shape[0] not in (1, batch):  # rows were chosen or repeated: which are whose is not known
        return real is None and several(documents)
    # What came after the first tokens goes on with the last document.
    after = documents[:, -1:].expand(-1, step.first - documents.shape[1])
    start = step.kv_offset if step.window is None else max(step.kv_offset, step.first - step.window)
    seen = torch.cat([documents, after], 1)[:, start:].expand(batch, -1)
    if not seen.shape[1]:
        return False
    if real is None:
        return several(seen)
    shown = real[:, start - step.kv_offset : step.first - step.kv_offset]
    lowest = seen.masked_fill(~shown, torch.iinfo(seen.dtype).max).amin(1)
    highest = seen.masked_fill(~shown, -1).amax(1)
    return bool((lowest < highest).any())


def refuse_several() -> None:
    """Raise for tokens that would see cached keys of several documents."""
    raise PackingError(
        "the cache holds keys of several documents (position_ids restarted when it was filled), and position_ids of "
        "new tokens do not say which of them those see: pass a mask of the keys that they continue, 2-D with false for "
        "those of the other documents, or 4-D, which hides later ones of the new tokens too. A 4-D mask that hides "
        "nothing else lets them see every document"
    )
