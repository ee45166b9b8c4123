"""``Attention``: :func:`anyattn.attention` with its projections, as a layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from anyattn._api import Causal, attention
from anyattn._context._plan import ContextPlan
from anyattn._errors import ShapeError
from anyattn._packing import Packing

Rotary = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Attention(nn.Module):
    """Self-attention with its four projections: dense, packed, or this rank's rows of a batch.

    Args:
        dim: of the input and the output.
        num_heads: query heads.
        num_kv_heads: key heads, which divide the query heads; default: as many.
        head_dim: of queries, keys and values; default: ``dim // num_heads``.
        causal: as :func:`anyattn.attention`, and so are the next three.
        window: (left, right) rows seen on either side of a query's own.
        softcap: of the scores.
        scale: of the scores; default ``head_dim ** -0.5``.
        bias: whether the projections have one.
        sink: whether each head has a learnable logit that joins every row's softmax.
        dropout: of attention weights, in training.
        rotary: called as ``rotary(q, k, position_ids)`` with q (..., num_heads, head_dim), k (..., num_kv_heads,
            head_dim) and int64 positions (rows,) or (seq,); returns both, turned. None: no positions.
        device: of the parameters.
        dtype: of the parameters.

    Example::

        >>> layer = anyattn.Attention(64, num_heads=4, num_kv_heads=2)
        >>> layer(torch.randn(2, 10, 64)).shape  # two sequences of 10
        torch.Size([2, 10, 64])
        >>> packing = anyattn.Packing.from_lengths([3, 7])
        >>> layer(torch.randn(10, 64), packing=packing).shape  # two documents, one after the other
        torch.Size([10, 64])
        >>> plan = anyattn.ContextParallel((1, 0)).plan(packing)
        >>> layer(torch.randn(plan.rows, 64), plan=plan).shape  # this rank's rows of them
        torch.Size([10, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        causal: Causal = True,
        window: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        bias: bool = False,
        sink: bool = False,
        dropout: float = 0.0,
        rotary: Rotary | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ShapeError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}")
        if head_dim is None and dim % num_heads:
            raise ShapeError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}: or give head_dim")
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.causal, self.window, self.softcap, self.scale = causal, window, softcap, scale
        self.dropout, self.rotary = dropout, rotary
        width, width_kv = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(dim, width, bias, device, dtype)
        self.k_proj = nn.Linear(dim, width_kv, bias, device, dtype)
        self.v_proj = nn.Linear(dim, width_kv, bias, device, dtype)
        self.o_proj = nn.Linear(width, dim, bias, device, dtype)
        self.sink = nn.Parameter(torch.zeros(num_heads, device=device, dtype=dtype)) if sink else None

    def forward(
        self,
        x: Tensor,
        *,
        packing: Packing | None = None,
        plan: ContextPlan | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Attend among the rows of each sequence; returns as many rows as x has.

        Args:
            x: (batch, seq, dim), or (rows, dim) with a packing, or a plan made from one.
            packing: where the sequences lie; with (batch, seq, dim) how many rows of each entry are real.
            plan: x is this rank's rows. Its mask is this layer's: ``plan.with_mask(causal, window)`` for each kind.
            position_ids: for ``rotary``; default: the plan's or packing's, within sequences, or 0 to seq - 1.

        """
        alone = packing is None and plan is None
        entries = packing is None or packing.cu_seqlens.shape[0] == x.shape[0] + 1
        if x.ndim not in (2, 3) or (x.ndim == 2 and alone) or (x.ndim == 3 and not entries):
            given = "neither" if alone else "a plan" if packing is None else str(packing)
            raise ShapeError(
                "x must be (batch, seq, dim), with a packing of as many sequences as batch entries if any, or "
                f"(rows, dim) with a packing or a plan; got {tuple(x.shape)}, and {given}"
            )
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.rotary is not None:
            q, k = self.rotary(q, k, _positions(x, packing, plan) if position_ids is None else position_ids)
        out = attention(
            q, k, v, causal=self.causal, window=self.window, softcap=self.softcap, scale=self.scale, sink=self.sink,
            dropout=self.dropout if self.training else 0.0, packing=packing, plan=plan,
        )  # fmt: skip
        return self.o_proj(out.flatten(-2))  # type: ignore[no-any-return]


def _positions(x: Tensor, packing: Packing | None, plan: ContextPlan | None) -> Tensor:
    """Positions within sequences, (rows,), (seq,) or (batch, seq)."""
    if plan is not None:
        return plan.position_ids.to(x.device)
    if packing is not None and packing._shape is not None and x.ndim == 3:  # from a mask, padded on either side
        return packing.position_ids
    if packing is not None and x.ndim == 2:
        positions = packing.position_ids.flatten()
        return nn.functional.pad(positions, (0, x.shape[0] - positions.shape[0]))
    return torch.arange(x.shape[-2], device=x.device)
