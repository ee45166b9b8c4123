"""Ways to call a kernel that reach every argument an adapter ever passes."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import anyattn
import cases
from cases import Case, Target
from test_conformance import run

PLAIN = {"dtype": "bfloat16", "heads": "4/2", "dims": "32"}
#: Together, every argument that an adapter ever passes.
WAYS: tuple[dict[str, str], ...] = (
    {},
    {"mask": "causal", "asks": "lse_grad"},
    {"mask": "causal", "dims": "64"},
    {"mask": "window"},
    {"mask": "window", "asks": "forward"},
    {"asks": "deterministic"},
    {"mask": "causal_window", "scores": "alibi"},
    {"scores": "softcap"},
    {"scores": "softcap", "asks": "forward"},
    {"scores": "sink"},
    {"form": "bshd_right", "scores": "sink", "asks": "forward"},
    {"form": "thd", "asks": "out"},
    {"form": "thd", "mask": "causal_window", "scores": "alibi"},
    {"form": "thd", "mask": "causal"},
    {"form": "thd", "mask": "window"},
    {"form": "thd", "asks": "deterministic"},
    {"form": "thd", "scores": "softcap"},
    {"form": "thd", "scores": "softcap", "asks": "forward"},
    {"form": "thd", "relation": "any"},
    {"form": "thd_gaps", "mask": "causal"},
    {"form": "thd_gaps", "mask": "window", "asks": "lse_grad"},
    {"form": "thd_gaps", "mask": "causal", "asks": "forward"},
)


def call(name: str, way: dict[str, str], **more: Any) -> None:
    """Call a kernel, if it takes what is asked."""
    backend, _, kernel = name.partition(":")
    capability = next(c for c in cases.BACKENDS.get(backend).CAPABILITIES if c.kernel == kernel)
    case = Case(Target("cpu", name, capability), **(PLAIN | way))
    with cases.deterministic_flag(case), suppress((anyattn.NoBackend, anyattn.InvalidArgument)):
        run(cases.build(case), **more)
