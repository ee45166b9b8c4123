"""Breaks in a compiled region: attention under a plan, and an error; imported there alone, for torch's compiler is."""

from __future__ import annotations

from typing import Any

import torch

from anyattn._errors import Unsupported
from anyattn.integrations import _transformers_plan

_WHY = (
    "what is compiled sees padding, restarting positions and static caches as a 4-D mask, which the backend asked for "
    'by name has no kernel for; use attn_implementation="anyattn", or leave it uncompiled (generate(..., '
    "disable_compile=True), or a dynamic cache), or pass packed documents by a Packing or cu_seq_lens"
)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend(*args: Any, **options: Any) -> Any:
    """:func:`_transformers_plan.attend`, which counts layers when they run."""
    return _transformers_plan.attend(*args, **options)


@torch.compiler.disable(reason=_WHY)  # type: ignore[untyped-decorator]
def refuse_mask(backend: str) -> None:
    """Raise when the compiled code runs; at once where it may not have a break, with the same words."""
    raise Unsupported(f'"anyattn:{backend}" is given a mask: {_WHY}')
