"""Which keys a run of queries sees: closed forms over token ranges of one document.

Query i stands at position p = i + len_k - len_q (at i with ``top_left``) and sees key j if -left <= j - p <= right.
Lengths reach millions, so nothing here looks at single tokens. A range is (begin, end), end excluded.
"""

from __future__ import annotations

from typing import NamedTuple

from anyattn._context._data import Mask

Span = tuple[int, int]


class Meeting(NamedTuple):
    """The queries of a run that see a key of a run, the keys that they see, and the window between the two."""

    queries: Span
    keys: Span
    left: int | None
    """Effective: bottom-right aligned within these two ranges. None: it hides nothing here."""
    right: int | None


def _shift(mask: Mask, len_q: int, len_k: int) -> int:
    """The position of query 0."""
    return 0 if mask.top_left else len_k - len_q


def _is_blind(mask: Mask) -> bool:
    """Whether the window holds no position at all, as with a negative right and a small left."""
    return mask.left is not None and mask.right is not None and mask.left + mask.right < 0


def _below(x: int, top: int) -> int:
    """The sum of min(max(y, 0), top) over all y below x."""
    if x <= 1:
        return 0
    ramp = x - 1 if x - 1 < top else top
    return ramp * (ramp + 1) // 2 + (x - 1 - ramp) * top


def seen_before(mask: Mask, len_q: int, len_k: int, at: int) -> int:
    """How many (query, key) pairs the queries [0, at) of a document see, but for a constant: differences tell areas."""
    left, right, top_left = mask
    if left is not None and right is not None and left + right < 0:  # blind
        return 0
    first = at if top_left else at + len_k - len_q
    upper = at * len_k if right is None else _below(first + right + 1, len_k)
    return upper if left is None else upper - _below(first - left, len_k)


def area(mask: Mask, len_q: int, len_k: int, begin: int, end: int) -> int:
    """How many (query, key) pairs the queries [begin, end) of a document see."""
    return seen_before(mask, len_q, len_k, end) - seen_before(mask, len_q, len_k, begin) if begin < end else 0


def needed(mask: Mask, len_q: int, len_k: int, begin: int, end: int) -> Span:
    """The keys that the queries [begin, end) of a document see, one range; (0, 0) if there are none."""
    if end <= begin or _is_blind(mask):
        return 0, 0
    shift = _shift(mask, len_q, len_k)
    low = 0 if mask.left is None else max(0, begin + shift - mask.left)
    high = len_k if mask.right is None else min(len_k, end + shift + mask.right)
    return (low, high) if low < high else (0, 0)


def meet(mask: Mask, len_q: int, len_k: int, queries: Span, keys: Span) -> Meeting | None:
    """The part of a document's queries and keys that see each other; None if there is none.

    One pass suffices: windows of neighbouring queries overlap or touch, so the trimmed keys are all seen, and they
    hold the keys that kept each query. Thus no side of the effective window is negative, which kernels would read as
    unbounded.
    """
    begin, end = queries
    low, high = keys
    if begin >= end or low >= high or _is_blind(mask):
        return None
    left, right = mask.left, mask.right
    shift = _shift(mask, len_q, len_k)
    if right is not None:
        begin = max(begin, low - right - shift)
    if left is not None:
        end = min(end, high + left - shift)
    if begin >= end:
        return None
    if left is not None:
        low = max(low, begin + shift - left)
    if right is not None:
        high = min(high, end + shift + right)
    offset = high - end - shift
    if left is not None:
        left = None if left + offset >= high - low - 1 else left + offset
    if right is not None:
        right = None if right - offset >= end - begin - 1 else right - offset
    return Meeting((begin, end), (low, high), left, right)
