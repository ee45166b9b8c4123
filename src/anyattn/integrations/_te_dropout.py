"""Dropout inside a tracker of generators' states, also where it is computed again in backward."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor


class Forks:
    """Where a computation drops: inside ``tracker.fork()``, the same fork each time it runs.

    Args:
        tracker: has get_states, set_states and fork; None for no tracker.
    """

    def __init__(self, tracker: Any) -> None:
        self._tracker: Any = tracker
        self._states: dict[str, Any] | None = None

    def next(self) -> AbstractContextManager[Any]:
        """The fork; from the second time on, as it was at the first, and the tracker is left as it is."""
        if self._tracker is None:
            return nullcontext()
        if self._states is None:
            self._states = _copied(self._tracker.get_states())
            found: AbstractContextManager[Any] = self._tracker.fork()
            return found
        return _Again(self._tracker, self._states)


class _Again(AbstractContextManager[None]):
    """A tracker's fork from states that it had."""

    def __init__(self, tracker: Any, states: dict[str, Any]) -> None:
        self._tracker, self._states = tracker, states

    def __enter__(self) -> None:
        self._now = _copied(self._tracker.get_states())
        self._tracker.set_states(_copied(self._states))
        self._fork = self._tracker.fork()
        self._fork.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._fork.__exit__(*error)
        self._tracker.set_states(self._now)


def _copied(states: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in states.items()}
