"""Names under which transformers finds anyattn, and the undoing of it.

A name that transformers gives to kernels of its own ("flash_attention_2") is checked when a model takes it: the package
must be installed, a GPU present, the weights in half precision. For a name that anyattn has replaced these checks ask
nothing of the machine. What a model itself says stays in force: it supports such a name or it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch

from anyattn._errors import InvalidArgument, MissingExtra
from anyattn.integrations import _transformers_cached as cached
from anyattn.integrations._transformers_masks import positions_given

#: transformers looks for these in the name and then treats the function as one of its own.
_TAKEN = ("flash", "sdpa", "flex_attention", "eager", "paged|", "/")
#: Names of transformers' own that anyattn may stand in for.
REPLACEABLE = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "sdpa")
_FLASH = {f"flash_attention_{version}": version for version in (2, 3, 4)}
_NOT_REPLACEABLE = {
    "eager": "each model has its own function under this name, which is not looked up",
    "paged|eager": "it is continuous batching's, which keeps keys in pages",
    "flex_attention": "models make BlockMasks for this name, which few kernels take; a BlockMask of your own goes in "
    "under any name",
}

_MISSING = object()
_before: dict[tuple[str, str], Any] = {}
"""(registry, name) -> what was registered before anyattn, or _MISSING."""
_methods: dict[str, Any] = {}
"""Methods of PreTrainedModel that are wrapped, as they were."""
_functions: dict[str, Any] = {}
"""Functions of masking_utils that are wrapped, as they were."""
_replaced: set[str] = set()
_PREPROCESS = "_preprocess_mask_arguments"


def check_name(name: str) -> None:
    """Refuse a name that transformers would take for an implementation of its own."""
    if not isinstance(name, str):
        raise InvalidArgument(f"name must be a string, as attn_implementation= will take it; got {name!r}")
    taken = next((part for part in _TAKEN if part in name), None)
    if taken is not None or not name:
        raise InvalidArgument(f"name must be non-empty and not contain {taken!r}, which transformers gives a meaning")


def names_to_replace(replace: Any) -> tuple[str, ...]:
    """Names of transformers' own, one or several; refuses what cannot be replaced."""
    names = (replace,) if isinstance(replace, str) else replace
    if names is None:
        return ()
    if not isinstance(names, Iterable):
        raise InvalidArgument(f"replace must be one or several of {', '.join(REPLACEABLE)}, or None; got {replace!r}")
    names = tuple(names)
    for name in names:
        _check_replace(name)
    return names


def _check_replace(name: str) -> None:
    """Refuse to replace what cannot be, or does not exist."""
    if name not in REPLACEABLE:
        why = _NOT_REPLACEABLE.get(name, "transformers has no such implementation")
        raise InvalidArgument(f"replace={name!r}: {why}; allowed: {', '.join(REPLACEABLE)}")


def put(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Register both functions under a name, and remember what was there."""
    for registry, function in zip(_registries(), (attention, mask), strict=True):
        mapping = registry._global_mapping
        _before.setdefault((registry.__name__, name), mapping.get(name, _MISSING))
        registry.register(name, function)
    from transformers import masking_utils

    original = getattr(masking_utils, _PREPROCESS, None)
    if original is not None and _PREPROCESS not in _functions:
        _functions[_PREPROCESS] = original
        setattr(masking_utils, _PREPROCESS, _watching(original))


def replace(name: str) -> None:
    """Let models take a name that anyattn has put itself under, on any machine."""
    _replaced.add(name)
    if name in _FLASH and not _methods:
        from transformers import PreTrainedModel

        for method, wrap in (
            ("_check_and_adjust_attn_implementation", _adjusting),
            ("_flash_attn_can_dispatch", _dispatching),
        ):
            _methods[method] = getattr(PreTrainedModel, method)
            setattr(PreTrainedModel, method, wrap(_methods[method]))


def undo() -> None:
    """Put back everything."""
    if not _before:
        return
    for registry in _registries():
        for (kind, name), function in list(_before.items()):
            if kind != registry.__name__:
                continue
            if function is _MISSING:
                registry._global_mapping.pop(name, None)
            else:
                registry.register(name, function)
    from transformers import masking_utils

    for function, original in _functions.items():
        setattr(masking_utils, function, original)
    _functions.clear()
    _before.clear()
    _replaced.clear()
    if _methods:
        from transformers import PreTrainedModel

        for method, original in _methods.items():
            setattr(PreTrainedModel, method, original)
        _methods.clear()


def _registries() -> tuple[Any, Any]:
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise MissingExtra("anyattn.integrations.transformers", "transformers", "transformers") from None
    return AttentionInterface, AttentionMaskInterface


def _watching(original: Callable[..., Any]) -> Callable[..., Any]:
    """Transformers hands positions to mask functions where there is neither cache nor mask, and no cache: note both."""

    @wraps(original)
    def _preprocess_mask_arguments(
        config: Any, inputs_embeds: Any, attention_mask: Any, past_key_values: Any, position_ids: Any, *more: Any,
        **options: Any,
    ) -> Any:  # fmt: skip
        found = original(config, inputs_embeds, attention_mask, past_key_values, position_ids, *more, **options)
        if not torch.compiler.is_compiling():
            ours = ("AttentionMaskInterface", config._attn_implementation) in _before and not found[0]
            positions_given.set(position_ids if ours else None)
            cached.give(past_key_values if ours else None)
            cached.trim(past_key_values)  # whoever computes this forward, or whatever its mask says
        return found

    return _preprocess_mask_arguments


def _stands_in(model: Any, name: Any) -> bool:
    """Whether a model that takes this name calls anyattn: some have functions of their own for it."""
    return name in _replaced and model._can_set_attn_implementation()


def _adjusting(original: Callable[..., str]) -> Callable[..., str]:
    @wraps(original)
    def _check_and_adjust_attn_implementation(
        self: Any, attn_implementation: str | None, is_init_check: bool = False, **options: Any
    ) -> str:
        if attn_implementation in _FLASH and _stands_in(self, attn_implementation):
            return str(self.get_correct_attn_implementation(attn_implementation, is_init_check))
        return original(self, attn_implementation, is_init_check=is_init_check, **options)

    return _check_and_adjust_attn_implementation


def _dispatching(original: Callable[..., bool]) -> Callable[..., bool]:
    @wraps(original)
    def _flash_attn_can_dispatch(self: Any, flash_attn_version: int, is_init_check: bool = False) -> bool:
        if self._supports_flash_attn and _stands_in(self, f"flash_attention_{flash_attn_version}"):
            return True
        return original(self, flash_attn_version=flash_attn_version, is_init_check=is_init_check)

    return _flash_attn_can_dispatch
