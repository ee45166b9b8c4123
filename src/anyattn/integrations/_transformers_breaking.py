"""Attention under a plan as a break in a compiled region; imported there alone, for it imports torch's compiler."""

from __future__ import annotations

from typing import Any

import torch

from anyattn.integrations import _transformers_plan


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend(*args: Any, **options: Any) -> Any:
    """:func:`_transformers_plan.attend`, which counts layers when they run."""
    return _transformers_plan.attend(*args, **options)
