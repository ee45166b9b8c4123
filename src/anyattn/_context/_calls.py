"""From pairs of runs that see each other to as few kernel calls as possible.

Legend: n query rows and m key rows of a part. Under bottom-right alignment row i of a part without a left window sees
its first min(m, i + m - n + right + 1) keys, all of them where right is None. So the number of keys seen grows by one
each row until it is m, and then stays; that is what two parts have to add up to in order to be fused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from anyattn._context._data import Entry, KernelCall


class Part(NamedTuple):
    """An entry with its own effective window."""

    document: int
    q: int
    len_q: int
    k: int
    len_k: int
    left: int | None
    right: int | None


def _stacked(upper: Part, lower: Part) -> Part | None:
    """One part in place of two of adjacent query rows, or None. Neither has a left window."""
    if upper.k != lower.k or upper.q + upper.len_q != lower.q or upper.len_k > lower.len_k:
        return None
    right: int | None
    if upper.len_k == lower.len_k:
        if lower.right is not None:  # rows further down must not see less
            return None
        right = None if upper.right is None else upper.right + lower.len_q
    else:
        if upper.right != 0 and upper.len_q != 1:  # rows that see as many keys as the next must not be followed by more
            return None
        right = upper.len_k + lower.len_q - lower.len_k
        if right < 0 or (right < lower.len_q - 1 if lower.right is None else right != lower.right):
            return None
    return upper._replace(len_q=upper.len_q + lower.len_q, len_k=lower.len_k, right=right)


def _extended(part: Part, more: Part) -> Part | None:
    """One part in place of two of the same query piece and adjacent key rows, or None. Neither has a left window."""
    above = more.q - part.q  # rows that see nothing of the second
    if above < 0 or part.q + part.len_q != more.q + more.len_q or part.k + part.len_k != more.k:
        return None
    if part.right is not None and above < part.len_q - 1 - part.right:  # rows that see only some of the first
        return None
    lower = more._replace(k=part.k, len_k=part.len_k + more.len_k)
    if not above:
        return lower
    right = None if part.right is None else part.right - more.len_q
    if right is not None and right < 0:
        return None
    if right is not None and right >= above - 1:
        right = None
    return _stacked(part._replace(len_q=above, right=right), lower)


def _fused_keys(parts: Sequence[Part]) -> list[Part]:
    """Parts of one query piece, by key rows."""
    result: list[Part] = []
    for part in parts:
        joined = _extended(result[-1], part) if result and result[-1].left is None and part.left is None else None
        if joined is None:
            result.append(part)
        else:
            result[-1] = joined
    return result


def fused(pieces: Iterable[Sequence[Part]]) -> list[Part]:
    """The same pairs in fewer parts, where a union of parts is exactly a part.

    Args:
        pieces: of one document; by query piece in the order of rows, its parts in the order of key rows.
    """
    result: list[Part] = []
    for parts in pieces:
        before = len(result)
        for part in _fused_keys(parts):
            for i in range(before):
                joined = _stacked(result[i], part) if result[i].left is None and part.left is None else None
                if joined is not None:
                    result[i] = joined
                    break
            else:
                result.append(part)
    return result


@dataclass(slots=True)
class _Side:
    """One side of a call's window, as far as its parts settle it."""

    value: int | None = None
    least: int = 0
    """The smallest value that hides nothing in those parts that see everything on this side."""

    def takes(self, value: int | None, least: int) -> bool:
        """Whether a part with this effective value, hiding nothing from ``least`` on, may join."""
        if value is None:
            return self.value is None or self.value >= least
        return self.value == value or (self.value is None and value >= self.least)

    def add(self, value: int | None, least: int) -> None:
        """Count a part in."""
        if value is None:
            self.least = max(self.least, least)
        else:
            self.value = value


class _Chain:
    """The parts of one call, while they are gathered."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.left, self.right = _Side(), _Side()
        self.q = self.k = 0
        """First rows that are still free."""

    def takes(self, part: Part) -> bool:
        """Whether the part's rows come after all others, and the windows agree."""
        if part.q < self.q or part.k < self.k:
            return False
        return self.left.takes(part.left, part.len_k - 1) and self.right.takes(part.right, part.len_q - 1)

    def add(self, part: Part) -> None:
        """Append the part."""
        self.parts.append(part)
        self.left.add(part.left, part.len_k - 1)
        self.right.add(part.right, part.len_q - 1)
        self.q, self.k = part.q + part.len_q, part.k + part.len_k

    def call(self) -> KernelCall:
        """The call that computes these parts."""
        entries = tuple(Entry(p.q, p.len_q, p.k, p.len_k) for p in self.parts)
        return KernelCall(self.left.value, self.right.value, entries, tuple(p.document for p in self.parts))


def calls(parts: Iterable[Part]) -> tuple[KernelCall, ...]:
    """Few calls that compute all parts: rows of a call increase on both sides, and all its parts fit one window.

    Each part, by query rows, joins the call whose last key row is nearest before its own. For disjoint query rows and
    one window no other choice needs fewer calls.
    """
    chains: list[_Chain] = []
    for part in sorted(parts, key=lambda p: (p.q, -p.k)):
        best: _Chain | None = None
        for chain in chains:
            if (best is None or chain.k > best.k) and chain.takes(part):
                best = chain
        if best is None:
            best = _Chain()
            chains.append(best)
        best.add(part)
    return tuple(chain.call() for chain in chains)
