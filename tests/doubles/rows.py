"""Where sequences lie in the tensors that a double is given, as rows of flattened ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequence:
    """One sequence of one side."""

    start: int
    length: int
    written: int
    """How many of its rows the grid covers: no more than max_seqlen."""

    @property
    def rows(self) -> slice:
        """All of them."""
        return slice(self.start, self.start + self.length)

    @property
    def covered(self) -> slice:
        """Those that the grid covers."""
        return slice(self.start, self.start + self.written)


def flat(x: Tensor) -> Tensor:
    """(T, H, D): dense batches are one sequence after the other."""
    return x if x.ndim == 3 else x.reshape(-1, *x.shape[2:])


def sequences(
    x: Tensor, cu_seqlens: Tensor | None, used: Tensor | None, max_seqlen: int | None
) -> Iterator[Sequence]:  # fmt: skip
    """The sequences of q, or of k."""
    if cu_seqlens is None:
        bounds = [i * x.shape[1] for i in range(x.shape[0] + 1)]
        longest = x.shape[1]
    else:
        bounds, longest = cu_seqlens.tolist(), max_seqlen
        assert longest is not None
    for i, (start, end) in enumerate(pairwise(bounds)):
        length = end - start if used is None else int(used[i])
        assert 0 <= length <= end - start
        yield Sequence(start, length, min(length, longest))


def flat_lse(x: Tensor) -> Tensor:
    """(H, T), from that or from (B, H, S)."""
    return x if x.ndim == 2 else x.transpose(0, 1).flatten(1, 2)


def shaped_lse(x: Tensor, q: Tensor) -> Tensor:
    """From (H, T) to what goes with q: (H, T) or (B, H, S)."""
    return x if q.ndim == 3 else x.unflatten(1, q.shape[:2]).transpose(0, 1).contiguous()


def is_offsets(x: Tensor, *, sequences: int) -> bool:
    """Whether a kernel takes x as cu_seqlens."""
    return x.dtype == torch.int32 and x.is_contiguous() and x.shape == (sequences + 1,)
