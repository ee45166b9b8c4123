"""``Request``: one call of ``attention`` without its tensors' data: the key under which all preparation is cached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad as _forward_ad

from anyattn._errors import Unsupported
from anyattn._packing import Packing
from anyattn._select import Preference

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Window: TypeAlias = tuple[int | None, int | None]


class Meta(NamedTuple):
    """A tensor, described."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    kind: type
    """Tensor, or a subclass."""
    requires_grad: bool


class Request(NamedTuple):
    """What was asked, hashable. Fields as in ``attention``; q to mask are descriptions."""

    q: Meta
    k: Meta
    v: Meta
    causal: bool | str | None
    window: Window | None
    scale: float | None
    softcap: float | None
    sink: Meta | None
    alibi_slopes: Meta | None
    bias: Meta | None
    mask: Meta | tuple[Any, ...] | None
    """A description; for a BlockMask ("block", shape, block size)."""
    dropout: float
    layout: str | None
    packing: tuple[Any, ...] | None
    packing_kv: tuple[Any, ...] | None
    relation: str
    backend: str | Preference
    preference: Preference
    """What backend="auto" means here."""
    deterministic: bool | None
    torch_deterministic: bool
    return_lse: bool
    autocast: torch.dtype | None
    flash_override: str | None
    """What has taken the place of torch's own flash kernels."""
    num_splits: int = 1
    """As in ``Spec``; ``attention`` itself has no such argument."""


class Tensors(NamedTuple):
    """The data of a call, as the caller gave it."""

    q: Tensor
    k: Tensor
    v: Tensor
    sink: Tensor | None
    alibi_slopes: Tensor | None
    bias: Tensor | None
    mask: Tensor | BlockMask | None
    packing: Packing | None
    packing_kv: Packing | None


def describe(x: Tensor, grad_mode: bool) -> Meta:
    """A tensor as a Meta."""
    return Meta(x.shape, x.dtype, x.device, x.__class__, grad_mode and x.requires_grad)


def describe_optional(x: Any, grad_mode: bool) -> Any:
    """A tensor, a BlockMask or None; anything else as it is, for validation to name."""
    if x is None:
        return None
    if isinstance(x, Tensor):
        return describe(x, grad_mode)
    if is_block_mask(x):
        return ("block", tuple(x.shape), tuple(x.BLOCK_SIZE))
    return x


def is_block_mask(x: Any) -> bool:
    """Whether x is torch's BlockMask, without importing FlexAttention for those who do not use it."""
    return type(x).__name__ == "BlockMask" and type(x).__module__ == "torch.nn.attention.flex_attention"


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast gives float32 tensors on this kind of device, or None where it is off."""
    if device_type == "meta":  # explain(): torch has no autocast there, and raises
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def refuse_transforms(*tensors: object) -> None:
    """torch.func transforms would run kernels on wrapped tensors, and forward-mode tangents would be lost in them."""
    if torch._C._are_functorch_transforms_active():
        raise Unsupported(
            "attention() does not run under torch.func transforms (vmap, grad, jvp, ...): use torch.autograd, and a "
            "batch dim in place of vmap"
        )
    if _forward_ad._current_level >= 0 and any(
        isinstance(x, Tensor) and _forward_ad.unpack_dual(x).tangent is not None for x in tensors
    ):
        raise Unsupported("attention() has no forward-mode derivatives (torch.autograd.forward_ad): use backward ones")


def as_tuple(value: Any) -> Any:
    """Sequences as tuples, so that they can be looked up."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
