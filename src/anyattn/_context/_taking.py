"""Rows of a tensor by index, with a fill for those that are missing, in any dtype."""

from __future__ import annotations

import math
from numbers import Complex, Integral, Real
from typing import Any

import torch
from torch import Tensor

from anyattn._errors import DtypeError, InvalidArgument

#: Dtypes that torch copies and does not fill, with those that have as many bits.
_BITS = {
    torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64,
    **{
        getattr(torch, name): torch.uint8
        for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
        if hasattr(torch, name)
    },
}  # fmt: skip


def as_bits(x: Tensor) -> Tensor:
    """The same memory in a dtype that torch fills, and that every group carries."""
    bits = _BITS.get(x.dtype)
    return x if bits is None else x.view(bits)


def taken(x: Tensor, dim: int, index: Tensor, fill: Any) -> Tensor:
    """Rows of x by index along dim; ``fill`` where it is -1."""
    if x.dtype in _BITS:
        filling = as_bits(torch.full((), fill, dtype=x.dtype, device="cpu"))
        return _taken(as_bits(x), dim, index, int(filling)).view(x.dtype)
    return _taken(x, dim, index, fill)


def _taken(x: Tensor, dim: int, index: Tensor, fill: Any) -> Tensor:
    shape = [1] * x.ndim
    shape[dim] = -1
    missing = (index < 0).view(shape)
    if x.shape[dim] == 0:  # every row is missing; the result still belongs to x's graph
        size = list(x.shape)
        size[dim] = index.numel()
        return torch.cat([x, x.new_full(size, fill)], dim)
    return x.index_select(dim, index.clamp(min=0)).masked_fill(missing, fill)


def check_fill(call: str, x: Tensor, fill: Any) -> None:
    """Refuse a fill that would come out as another number, and tensors of which no rows can be taken.

    Raises:
        InvalidArgument: fill is no number.
        DtypeError: x's dtype does not hold it, or cannot be filled, or has no gradient.
    """
    dtype = x.dtype
    if not isinstance(fill, Complex):
        raise InvalidArgument(f"{call}: fill must be a number, got {fill!r}: leave it out for 0")
    if dtype in _BITS and x.requires_grad and torch.is_grad_enabled():
        raise DtypeError(
            f"{call}: x of dtype {dtype} requires grad, and torch adds up no gradients of that dtype: pass x.detach(), "
            "or convert x"
        )
    if dtype.itemsize == 1 and dtype.is_floating_point and dtype not in _BITS:
        raise DtypeError(f"{call}: torch fills no tensor of dtype {dtype}: pass x.view(torch.uint8)")
    held = _held(dtype, fill)
    if held is not None:
        raise DtypeError(
            f"{call}: fill={fill!r} and x of dtype {dtype}, which holds {held}: convert x, or fill with one"
        )


def _held(dtype: torch.dtype, fill: Complex) -> str | None:
    """None where a dtype holds the number, else what it holds."""
    if dtype.is_complex or (fill == 0 and not _lacks_zero(dtype)):
        return None
    if not isinstance(fill, Real):
        return "real numbers"
    number = float(fill)
    if dtype == torch.bool:
        return None if fill == 1 else "False and True"
    if dtype.is_floating_point:
        return None if _rounds(dtype, number) else f"numbers up to {torch.finfo(dtype).max:g}, rounded"
    info = torch.iinfo(dtype)
    whole = isinstance(fill, Integral) or (math.isfinite(number) and number == int(number))
    if whole and info.min <= int(fill if isinstance(fill, Integral) else number) <= info.max:
        return None
    return f"ints from {info.min} to {info.max}"


def _lacks_zero(dtype: torch.dtype) -> bool:
    """float8_e8m0fnu holds powers of two alone."""
    return dtype == getattr(torch, "float8_e8m0fnu", None)


def _rounds(dtype: torch.dtype, number: float) -> bool:
    """Whether a number stays what it is, but for rounding: as finite as it was, and on the same side of 0."""
    if math.isfinite(number) and abs(number) > torch.finfo(dtype).max:
        return False
    kept = torch.tensor(number, dtype=torch.float64, device="cpu").to(dtype).double().item()
    if math.isnan(number):
        return math.isnan(kept)
    if not math.isfinite(number):
        return kept == number
    return kept == 0 or (number != 0 and (kept < 0) == (number < 0))
