"""What a case is, and what an implementation of attention makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

import anyattn
from transformers_models import Architecture, build

#: float32 through a few layers; outputs and gradients are compared relative to the largest, or to 1.
TOLERANCE = 2e-5
#: The same for assert_close.
CLOSE = {"atol": TOLERANCE, "rtol": 2e-4}
Found = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One case."""

    name: str
    group: str
    run: Callable[[Architecture, Any], Found]
    """Through a model."""
    truth: Callable[[Architecture, Any], Found]
    """What must come out, from the eager model."""
    kinds: frozenset[str] = frozenset({"decoder"})
    exactly: bool = False
    """Token for token."""
    without: frozenset[str] = field(default_factory=frozenset)
    """Architectures that have no such case."""
    by_positions: bool = False
    """Only ``position_ids`` tell documents apart, where transformers' mask functions do not look at them."""

    def suits(self, architecture: Architecture) -> bool:
        """Whether an architecture has such a case."""
        return architecture.kind in self.kinds and architecture.name not in self.without


@dataclass(frozen=True)
class Outcome:
    """What an implementation made of a case."""

    verdict: str
    """"right", "wrong", "refused" (an error that names what is not supported) or "crashed"."""
    error: float = 0.0
    """The largest difference from the truth, or how many tokens differ."""
    told: str = ""


_REFUSALS = (ValueError, NotImplementedError, ImportError, anyattn.AnyattnError)
_truths: dict[tuple[str, str], Found] = {}


def judge(case: Case, architecture: Architecture, implementation: str) -> Outcome:
    """Run a case through an implementation and compare."""
    key = (case.name, architecture.name)
    if key not in _truths:
        _truths[key] = case.truth(architecture, build(architecture.name, "eager"))
    try:
        got = case.run(architecture, build(architecture.name, implementation))
    except _REFUSALS as error:
        return Outcome("refused", told=f"{type(error).__name__}: {error}")
    except Exception as error:
        return Outcome("crashed", told=f"{type(error).__name__}: {error}")
    error, where = difference(got, _truths[key], case.exactly)
    right = error == 0 if case.exactly else error <= TOLERANCE
    return Outcome("right" if right else "wrong", error, where)


def difference(got: Found, want: Found, exactly: bool = False) -> tuple[float, str]:
    """The largest difference, and in what."""
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    worst, where = 0.0, ""
    for name, w in want.items():
        g = got[name]
        if g.shape != w.shape:
            return float("inf"), f"{name}: shape {tuple(g.shape)}, not {tuple(w.shape)}"
        if exactly:
            error = float((g != w).sum())
        else:
            error = float((g - w).abs().max() / max(1.0, float(w.abs().max()))) if w.numel() else 0.0
        if not error <= worst:
            worst, where = error, name
    return worst, where
