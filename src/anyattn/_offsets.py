"""Offsets and lengths as users give them: read, checked, and named where they are wrong."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from anyattn._errors import DtypeError, PackingError


def check_number(name: str, value: int | None) -> None:
    if value is not None and (not isinstance(value, int) or value < 0):
        raise PackingError(f"{name} must be an int >= 0 or None, got {value!r}")


def check_tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise PackingError(f"{name} must be a tensor, got {type(x).__name__}: use torch.tensor({name})")


def whole_numbers(lengths: Any) -> list[int]:
    """Lengths as ints; whatever else they are is named."""
    given = lengths.tolist() if isinstance(lengths, Tensor) else lengths
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise PackingError(f"lengths must be a sequence of ints or a 1-D tensor, got {lengths!r}")
    try:
        return [operator.index(n) for n in given]
    except TypeError:
        raise PackingError(f"lengths must be integers, got {list(given)!r}") from None


def check_offsets(name: str, offsets: Tensor) -> None:
    if not isinstance(offsets, Tensor):
        raise PackingError(
            f"{name} must be an int32 tensor, got {type(offsets).__name__}: use torch.tensor({name}, dtype=torch.int32)"
        )
    if offsets.dtype != torch.int32:
        raise DtypeError(f"{name} must be int32, got {offsets.dtype}: use {name}.to(torch.int32)")
    if offsets.ndim != 1 or offsets.numel() < 1:
        raise PackingError(f"{name} must be 1-D with sequences + 1 entries, got shape {tuple(offsets.shape)}")


def read_offsets(cu_seqlens: Tensor, starts: Tensor) -> tuple[list[int], list[int]]:
    """Both offsets on the host, in one copy."""
    cu, padded = torch.stack([cu_seqlens, starts]).tolist()
    return cu, padded


def check_values(known: tuple[list[int], list[int]], max_seqlen: int | None, rows: int | None) -> None:
    cu, starts = known
    if cu[0] != 0:
        raise PackingError(f"cu_seqlens must start at 0, got {cu[0]}")
    if starts[0] < 0:
        raise PackingError(f"cu_seqlens_padded must not be negative, got {starts[0]} first")
    longest = 0
    for i in range(len(cu) - 1):
        length, room = cu[i + 1] - cu[i], starts[i + 1] - starts[i]
        for name, step, values in (("cu_seqlens", length, cu), ("cu_seqlens_padded", room, starts)):
            if step < 0:
                raise PackingError(f"{name} must not decrease: entry {i + 1} is {values[i + 1]} after {values[i]}")
        if room < length:
            raise PackingError(f"cu_seqlens_padded leaves sequence {i} {room} rows, and it has {length} by cu_seqlens")
        longest = max(longest, length)
    if max_seqlen is not None and max_seqlen < longest:
        raise PackingError(f"max_seqlen is {max_seqlen}, and the longest sequence has {longest} tokens")
    if rows is not None and rows < starts[-1]:
        raise PackingError(f"rows is {rows}, and the last sequence ends at row {starts[-1]}")


def cumulative(numbers: Sequence[int]) -> list[int]:
    total, out = 0, [0]
    for n in numbers:
        total += n
        out.append(total)
    return out


def extended(offsets: Tensor, missing: int) -> Tensor:
    """Offsets with empty sequences added at the end."""
    return torch.cat([offsets, offsets[-1:].expand(missing)]) if missing else offsets
