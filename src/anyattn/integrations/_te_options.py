"""What the arguments of Transformer Engine's attention mean here: masks, windows, alignments, refusals. No tensors."""

from __future__ import annotations

import contextlib
import math
import operator
import sys
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn._errors import InvalidArgument, ShapeError, Unsupported

FORMATS = ("sbhd", "bshd", "thd")
MASKS = (
    "no_mask", "padding", "causal", "padding_causal", "causal_bottom_right", "padding_causal_bottom_right", "arbitrary",
)  # fmt: skip
BIASES = ("no_bias", "pre_scale_bias", "post_scale_bias", "alibi")
SOFTMAXES = ("vanilla", "off-by-one", "learnable")
#: Two spellings of "padding_causal", once commas are underscores.
_SAME = {"causal_padding": "padding_causal"}

Sides = tuple[int | None, int | None]


class Masking(NamedTuple):
    """What a query sees, by position and by what the caller says of padding."""

    causal: bool
    top_left: bool
    """Query i stands at i; else at i + len_k - len_q. Causality, windows and ALiBi alike."""
    window: Sides | None
    padding: bool
    arbitrary: bool

    @property
    def how_causal(self) -> Any:
        """As ``attention(causal=...)``."""
        return ("top_left" if self.top_left else True) if self.causal else False


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """The value, if it is one of those allowed.

    Raises:
        InvalidArgument: it is not.
    """
    if value not in allowed:
        raise InvalidArgument(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    return str(value)


def mask_type(given: Any) -> str:
    """A mask type in its one spelling."""
    text = given.replace(",", "_") if isinstance(given, str) else given
    return choice("attn_mask_type", _SAME.get(text, text) if isinstance(text, str) else text, MASKS)


def window_of(kind: str, given: Any) -> Sides | None:
    """A window of Transformer Engine's, whose -1 is unbounded, as anyattn's.

    Causal masks make the right side 0. Where the mask is not causal, (-1, 0) is taken as no window, with a warning, as
    there.

    Raises:
        InvalidArgument: not two ints >= -1, or a side unbounded where there must be none.
    """
    if given is None:
        return None
    left, right = _two_ints(given)
    causal = "causal" in kind
    if causal and left >= -1 and (right == 0 or left >= 0 or right == -1):
        if right != 0:
            warnings.warn(f"window_size {given!r} under attn_mask_type={kind!r} means ({left}, 0)", stacklevel=4)
        return None if left == -1 else (left, 0)
    if not causal and (left, right) == (-1, 0):
        warnings.warn(f"window_size (-1, 0) under attn_mask_type={kind!r} means (-1, -1): no window", stacklevel=4)
        return None
    if not causal and (left, right) == (-1, -1):
        return None
    if not causal and left >= 0 and right >= 0:
        return left, right
    wanted = "(-1, 0) or (left >= 0, 0)" if causal else "(-1, -1) or (left >= 0, right >= 0)"
    raise InvalidArgument(f"window_size must be {wanted} under attn_mask_type={kind!r}, got {given!r}")


def _two_ints(given: Any) -> tuple[int, int]:
    """NumPy's integers count."""
    if isinstance(given, (tuple, list)) and len(given) == 2 and all(hasattr(n, "__index__") for n in given):
        return operator.index(given[0]), operator.index(given[1])
    raise InvalidArgument(f"window_size must be (left, right), two ints, -1 for unbounded; got {given!r}")


def stored_window(kind: str, given: Any) -> tuple[int, int]:
    """A window as Transformer Engine's module keeps it: as its own mask type has it, -1 for unbounded.

    Raises:
        InvalidArgument: as :func:`window_of`.
    """
    found = window_of(kind, given)
    if found is None:
        return -1, 0 if "causal" in kind else -1
    return found[0] if found[0] is not None else -1, found[1] if found[1] is not None else -1


def masking(kind: str, window: Sides | None, bottom_right: bool | None) -> Masking:
    """All that says what a query sees. Causal mask types fix the alignment, whatever ``bottom_right`` says."""
    causal = "causal" in kind
    if causal:
        bottom_right = "bottom_right" in kind
    return Masking(causal, bottom_right is False, window, "padding" in kind, kind == "arbitrary")


def soft_cap(value: float) -> float | None:
    """A cap as ``attention(softcap=...)``; 0 is none.

    Raises:
        InvalidArgument: negative, infinite or NaN.
    """
    if not math.isfinite(value) or value < 0:
        raise InvalidArgument(f"softcap must be finite and >= 0, where 0 is none; got {value}")
    return value or None


def splits(given: Any) -> int:
    """In how many parts a kernel takes keys in forward; None is 1, and 0 what the kernel chooses.

    Raises:
        InvalidArgument: not an int, or a negative one.
    """
    if given is None:
        return 1
    number = -1
    if not isinstance(given, bool):
        with contextlib.suppress(TypeError):
            number = operator.index(given)
    if number < 0:
        raise InvalidArgument(
            f"num_splits must be an int >= 0, where 0 is the kernel's own choice, or None; got {given!r}"
        )
    return number


def check_bias(kind: Any, bias: Tensor | None, slopes: Tensor | None, cap: float | None) -> None:
    """Bias, slopes and their kind go together.

    Raises:
        InvalidArgument: they do not.
        Unsupported: a bias inside of the cap.
    """
    choice("core_attention_bias_type", kind, BIASES)
    wanted = kind in ("pre_scale_bias", "post_scale_bias")
    if wanted != (bias is not None):
        what = "needs core_attention_bias" if wanted else "takes no core_attention_bias"
        raise InvalidArgument(f"core_attention_bias_type={kind!r} {what}")
    if slopes is not None and kind != "alibi":
        raise InvalidArgument(f"alibi_slopes need core_attention_bias_type='alibi', got {kind!r}")
    if kind == "pre_scale_bias" and cap is not None:
        raise Unsupported(
            "pre_scale_bias with softcap: the bias would be inside of the cap, and here it is added after it: use "
            "post_scale_bias, or no softcap"
        )


def refuse(options: Mapping[str, Any]) -> None:
    """What nothing here can do is an error, by its name.

    Args:
        options: arguments of forward, by name.

    Raises:
        Unsupported: one of them is set.
        InvalidArgument: a dispatch that there is not, or no number of splits.
    """
    choice("thd_attention_policy_dispatch", options.get("thd_attention_policy_dispatch"), ("auto", "grouped"))
    for name, remedy in _REFUSED.items():
        if options.get(name) not in (None, False):
            raise Unsupported(f"{name}: {remedy}")
    splits(options.get("num_splits"))
    if (what := _fp8_attention()) is not None:
        raise Unsupported(
            f"{what}: attention in FP8 is not computed here: leave fp8_dpa and fp8_mha of the recipe False; linear "
            "layers may stay in FP8"
        )


_MODIFIER = "score functions for cuDNN are not run here: use core_attention_bias, softcap, a window or a mask"
_REFUSED = {
    "inference_params": "keys are not cached here: pass all keys and values, with a causal_bottom_right mask type",
    "fp8_output": "the result is never in FP8: leave fp8_output False, and quantise it afterwards",
    "score_mod": _MODIFIER,
    "score_mod_bprop": _MODIFIER,
    "score_mod_tensors": _MODIFIER,
    "score_mod_bprop_tensors": _MODIFIER,
}


def refuse_quantised(**tensors: Tensor) -> None:
    """Transformer Engine's quantised tensors are not read.

    Raises:
        Unsupported: one of them is such a tensor.
    """
    for name, x in tensors.items():
        kind = type(x)
        if kind is not Tensor and kind.__module__.startswith("transformer_engine"):
            raise Unsupported(f"{name} is a {kind.__name__}: pass {name}.dequantize()")


def _fp8_attention() -> str | None:
    """What asks for attention in FP8: an ``autocast`` of Transformer Engine's, where that is imported."""
    for name in ("transformer_engine.pytorch.quantization", "transformer_engine.pytorch.fp8"):
        manager = getattr(sys.modules.get(name), "FP8GlobalStateManager", None)
        if manager is not None and manager.is_fp8_enabled():
            recipe = manager.get_fp8_recipe()
            for flag in ("fp8_dpa", "fp8_mha"):
                if getattr(recipe, flag, False):
                    return f"{flag}=True of the FP8 recipe"
            return None
    return None


def unpacked(
    query: Tensor | None, key: Tensor | None, value: Tensor | None,
    qkv: Tensor | None, kv: Tensor | None, dim: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k and v, of which some may come as views of one tensor.

    Raises:
        InvalidArgument: too few or too many of them.
        ShapeError: the tensor does not hold three (or two) along ``dim``.
    """
    if dim not in (-3, -2):
        raise InvalidArgument(f"qkv_interleave_dim must be -3 or -2, got {dim!r}")
    given = {"query_layer": query, "key_layer": key, "value_layer": value}
    packed, count, name, beside = (
        (qkv, 3, "qkv_layer", ()) if qkv is not None else (kv, 2, "kv_layer", ("query_layer",))
    )
    if qkv is not None and kv is not None:
        raise InvalidArgument("qkv_layer and kv_layer both hold keys and values: give one of the two")
    wanted = set(given) if packed is None else set(beside)
    there = {n for n, x in given.items() if x is not None}
    if there != wanted:
        what = "without qkv_layer and kv_layer" if packed is None else f"beside {name}"
        raise InvalidArgument(f"{what}, give {', '.join(sorted(wanted)) or 'nothing else'}; got {sorted(there)}")
    if packed is None:
        return query, key, value  # type: ignore[return-value]  # none is None: see above
    if packed.ndim not in (4, 5) or packed.shape[dim] != count:
        raise ShapeError(f"{name} must have size {count} at dim {dim}, got shape {tuple(packed.shape)}")
    parts = packed.unbind(dim)
    return (parts[0], parts[1], parts[2]) if query is None else (query, parts[0], parts[1])


def plain_slopes(heads: int, device: torch.device) -> Tensor:
    """float32 (heads,): ALiBi's own slopes, made on the device without waiting for it.

    They are a geometric series, and for heads beyond a power of two every other one of the next.
    """
    whole = 1 << (heads.bit_length() - 1)
    number = torch.arange(heads, dtype=torch.float32, device=device)
    first, more = (number + 1) * (-8.0 / whole), (2 * (number - whole) + 1) * (-4.0 / whole)
    return torch.where(number < whole, first, more).exp2()
