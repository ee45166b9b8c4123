"""A packed batch as equal entries and back, for terms that kernels take with 4-D tensors only. Copies every row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anyattn._errors import PackingError, ShapeError
from anyattn._packing import Packing
from anyattn.integrations._te_rows import moved


class Entries(NamedTuple):
    """Where each token lies in both."""

    packed: Tensor
    """int64 (tokens,): rows of the packed batch."""
    spread: Tensor
    """int64 (tokens,): rows of the flattened entries."""
    batch: int
    rows: int
    """Of an entry."""

    def enter(self, x: Tensor) -> Tensor:
        """(entries, rows, ...) of (T, ...), zero in padding."""
        empty = x.new_zeros(self.batch * self.rows, *x.shape[1:])
        flat: Tensor = empty.index_copy(0, self.spread, x.index_select(0, self.packed))
        return flat.view(self.batch, self.rows, *x.shape[1:])

    def leave(self, x: Tensor, rows: int) -> Tensor:
        """(rows, ...) of (entries, rows of an entry, ...), zero in padding."""
        tokens = x.flatten(0, 1).index_select(0, self.spread)
        return x.new_zeros(rows, *x.shape[2:]).index_copy(0, self.packed, tokens)


def entries_of(packing: Packing, rows: int, device: torch.device) -> tuple[Entries, Packing]:
    """How a packed batch becomes entries of so many rows, and where tokens lie there.

    Raises:
        PackingError: the lengths are not known on the host.
        ShapeError: a sequence is longer than an entry.
    """
    lengths = packing._facts.lengths
    if lengths is None:
        raise PackingError(
            "core_attention_bias with qkv_format='thd' needs offsets that are read: leave check_offsets True, and do "
            "not capture the call in a CUDA graph; or use a 4-D layout"
        )
    if max(lengths, default=0) > rows:
        raise ShapeError(f"core_attention_bias is for sequences of {rows}, and the longest has {max(lengths)} tokens")
    entries = moved(Packing.from_lengths(lengths), device)
    token = torch.arange(entries.total, device=device)
    sequence = torch.searchsorted(entries.cu_seqlens[1:].contiguous(), token, right=True)
    spread = sequence * rows + token - entries.cu_seqlens[sequence]
    return Entries(packing._memory_rows(), spread, len(lengths), rows), entries
