"""What a compiled region does with a plan; imported there alone, for torch's compiler is.

A trace would hold the numbers of one batch, and be made anew for the next: rows are taken in a break, and positions
come from an operator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anyattn._context._shards import by_handle
from anyattn._errors import ContextError

if TYPE_CHECKING:
    from anyattn._context._shards import Shards


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="plan.shard() takes rows that differ from batch to batch: leave out fullgraph=True, or shard before"
)
def shard(shards: Shards, x: Tensor, dim: Any, fill: Any) -> Tensor:
    """:meth:`Shards.shard`."""
    return shards._shard(x, dim, fill)


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="plan.unshard() communicates, which is not for the compiler: leave out fullgraph=True, or unshard after"
)
def unshard(shards: Shards, x: Tensor, dim: Any, fill: Any) -> Tensor:
    """:meth:`Shards.unshard`."""
    return shards._unshard(x, dim, fill)


# What it needs is made when it runs, which is nothing for a captured graph to repeat.
@torch.library.custom_op("anyattn::plan_index", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _index(handle: int, name: str, rows: int, device: torch.device) -> Tensor:
    shards = by_handle.get(handle)
    if shards is None:
        raise ContextError(
            "compiled code asks for the positions of a plan that is gone: keep the plan until backward is over, where "
            "activation checkpointing runs forward again"
        )
    return shards._index(name, device).clone()  # what an operator returns is the compiler's to write to


@_index.register_fake
def _(handle: int, name: str, rows: int, device: torch.device) -> Tensor:
    return torch.empty(rows, dtype=torch.bool if name == "valid" else torch.int64, device=device)


def index(shards: Shards, name: str, device: torch.device) -> Tensor:
    """A copy of what ``position_ids`` and ``valid`` are, without a break: plans are told apart by a number."""
    found: Tensor = _index(shards._handle, name, shards.rows, device)
    return found
