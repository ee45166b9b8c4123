"""What a compiled region breaks at. A module of its own, for to say so imports the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from anyattn.integrations import _te_rows
from anyattn.integrations._te_rows import Given, Rows


@torch._dynamo.disable(  # type: ignore[untyped-decorator]
    reason="offsets are read on the host, which is not for the compiler: leave out fullgraph=True"
)
def rows_within(
    queries: Given, keys: Given, layout: str, sizes: tuple[int, int], device: torch.device, layer: int | None
) -> Rows:
    """As ``_te_rows.rows_within``, outside of the region."""
    return _te_rows.rows_within(queries, keys, layout, sizes, device, layer)


@torch._dynamo.disable(  # type: ignore[untyped-decorator]
    reason="context parallelism communicates, which is not for the compiler: leave out fullgraph=True"
)
def eagerly(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    """``function(**given)``, outside of the region."""
    return function(**given)
