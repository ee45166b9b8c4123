"""What layers say to attention, as constants of a compiled region; imported there alone, for torch's compiler is."""

from __future__ import annotations

import torch

from anyattn.integrations import _transformers_models as models


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def meaning(kind: type, name: str) -> str:
    """:func:`_transformers_models._meaning`, which reads source."""
    return models._meaning(kind, name)
