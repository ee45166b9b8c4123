"""anyattn inside diffusers.

Use::

    import anyattn
    from diffusers import FluxTransformer2DModel

    anyattn.integrations.diffusers.register()
    model = FluxTransformer2DModel.from_pretrained(name, subfolder="transformer")
    model.set_attention_backend("anyattn")

Masks of every kind, grouped key heads, causality and windows give what diffusers' native backend gives; after
``model.enable_parallelism(...)`` too, where anyattn's own context parallelism runs. A mask is read once for as long as
it lives, not in every layer: one that hides nothing is dropped, and one that hides keys shortens the sequences. Nothing
that a model asks of its attention is dropped: what cannot be done is an error that names it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anyattn._api import attention
from anyattn._errors import InvalidArgument, MissingExtra, Unsupported
from anyattn._packing import Packing
from anyattn._request import is_block_mask
from anyattn.backends import ORDER
from anyattn.integrations._diffusers_masks import (
    Habits,
    Shape,
    Terms,
    all_rows,
    as_four_dims,
    check_fits,
    forget,
    settle,
    without_reading,
)

__all__ = ["forget", "register"]

_NAME = re.compile(r"[a-z0-9][a-z0-9_:.-]*")


def register(name: str = "anyattn", *, read_masks: bool = True, whole_masks: bool = False) -> None:
    """Make ``name`` an attention backend of diffusers, and ``name:<backend>`` one for every backend of anyattn.

    ``model.set_attention_backend(name)``, ``with attention_backend(name)`` and ``dispatch_attention_fn(...,
    backend=name)`` take it from then on, for as long as the process lives.

    Args:
        name: as diffusers will know it, in lower case. Registering a name again is harmless, and the last one counts.
        read_masks: copy a mask to the host, once for as long as it lives, to find what it hides. With False nothing
            is copied or waited for: masks of keys are sorted out on the device in every call, and others go to a
            kernel that takes masks. It is for models that make a new mask in every layer, on a GPU. Inside a captured
            CUDA graph and a compiled region masks are never read.
        whole_masks: after ``enable_parallelism``, also take masks over the keys of all ranks that hide something. They
            are read in the order of the ranks' parts, which is not that of the undivided sequence where text and image
            are divided apart and joined afterwards: so they are refused by default. A rank's mask of its own keys is
            always taken.

    Raises:
        MissingExtra: diffusers is not installed.
        InvalidArgument: a name that diffusers could not find, or that is one of its own.
        Unsupported: this diffusers keeps its attention backends in another way.

    Example::

        >>> import anyattn
        >>> anyattn.integrations.diffusers.register()  # doctest: +SKIP
        >>> model.set_attention_backend("anyattn")  # doctest: +SKIP
        >>> model.set_attention_backend("anyattn:fa3")  # doctest: +SKIP
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidArgument(
            "name must be in lower case, as diffusers looks it up, and of letters, digits, '_', '-', '.' and ':', as "
            f'"anyattn" and "anyattn:fa3" are; got {name!r}'
        )
    dispatch = _dispatch_module()
    names, registry = dispatch.AttentionBackendName, dispatch._AttentionBackendRegistry
    habits, known = Habits(read_masks, whole_masks), names._value2member_map_
    for value in (name, *(f"{name}:{backend}" for backend in ORDER)):
        if value in known and not isinstance(registry._supported_arg_names.get(known[value]), _Everything):
            raise InvalidArgument(f"{value!r} is an attention backend of diffusers itself: choose another name")
    for backend in ("auto", *ORDER):
        member = _member(names, name if backend == "auto" else f"{name}:{backend}")
        registry.register(member, supports_context_parallel=True)(_function(backend, habits))
        registry._supported_arg_names[member] = _Everything(registry._supported_arg_names[member])


def _dispatch_module() -> Any:
    try:
        import diffusers
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise MissingExtra("anyattn.integrations.diffusers", "diffusers", "diffusers") from None
    try:
        attention_dispatch: Any = importlib.import_module("diffusers.models.attention_dispatch")
    except ModuleNotFoundError as error:
        if error.name != "diffusers.models.attention_dispatch":
            raise
        attention_dispatch = None
    registry = getattr(attention_dispatch, "_AttentionBackendRegistry", None)
    needed = ("register", "_supported_arg_names", "_supports_context_parallel")
    if not hasattr(attention_dispatch, "AttentionBackendName") or not all(hasattr(registry, x) for x in needed):
        raise Unsupported(
            f"diffusers {diffusers.__version__} keeps its attention backends in a way that anyattn does not know: "
            "install diffusers>=0.39, or a newer anyattn"
        )
    return attention_dispatch


class _Everything(set[str]):
    """Parameter names of a backend's function, for diffusers, which drops arguments that are not among them.

    It says yes to every name, so that the function meets all arguments, and refuses those that it does not know.
    """

    def __contains__(self, name: object) -> bool:
        return True


def _member(names: Any, value: str) -> Any:
    """A member of diffusers' enumeration of backends, added where it is missing: it has no other place for one."""
    if value in names._value2member_map_:
        return names._value2member_map_[value]
    label = value.upper()  # colons and all: no two values have one
    member = str.__new__(names, value)
    member._name_, member._value_ = label, value
    member.__objclass__, member._sort_order_ = names, len(names._member_names_)
    type.__setattr__(names, label, member)
    names._member_names_.append(label)
    names._member_map_[label] = member
    names._value2member_map_[value] = member
    return member


def _function(backend: str, habits: Habits) -> Callable[..., Any]:
    """What diffusers calls for one name. Its parameters' names are diffusers'."""

    def attention_forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float | None = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        window_size: tuple[int, int] | None = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
        return_lse: bool = False,
        _parallel_config: Any = None,
        **others: Any,
    ) -> Any:
        for name, given in others.items():
            if given is not None:
                raise Unsupported(
                    f"anyattn does not know diffusers' argument {name}={given!r}: leave it out of attention_kwargs, or "
                    "use the backend that it is meant for"
                )
        causal, window = position_of(query, key, is_causal, window_size)
        options = {
            "scale": scale, "dropout": float(dropout_p or 0.0), "softcap": softcap or None, "backend": backend,
            "deterministic": deterministic or None, "return_lse": return_lse,
        }  # fmt: skip
        config = getattr(_parallel_config, "context_parallel_config", None)
        if config is not None:
            from anyattn.integrations._diffusers_parallel import parallel_attention

            return parallel_attention(config, (query, key, value), attn_mask, causal, window, habits, options)
        return _attention((query, key, value), attn_mask, causal, window, habits, options)

    return attention_forward


def position_of(
    query: Tensor, key: Tensor, is_causal: bool, window_size: Any
) -> tuple[Any, tuple[int | None, int | None] | None]:
    """(causal, window) of ``attention``, from diffusers' arguments.

    Of fewer queries than keys, or more, native counts causal positions from the first ones, and FlashAttention, which
    alone has windows there, from the last ones.
    """
    left, right = _window_of(window_size)
    window = None if left < 0 and right < 0 else (left if left >= 0 else None, right if right >= 0 else None)
    equal = query.shape[1] == key.shape[1]
    if is_causal and window is not None and not equal:
        raise Unsupported(
            f"is_causal with window_size={tuple(window_size)} for {query.shape[1]} queries and {key.shape[1]} keys: "
            "diffusers' backends count positions from either end there; pass an attn_mask instead"
        )
    return (False if not is_causal else True if equal else "top_left"), window


def _window_of(window_size: Any) -> tuple[int, int]:
    """(left, right) as diffusers has it, where None is no window."""
    if window_size is None:
        return -1, -1
    whole = isinstance(window_size, tuple | list) and all(type(x) is int for x in window_size)
    if not whole or len(window_size) != 2:
        raise InvalidArgument(
            "window_size must be (left, right), two ints of which -1 means no limit, or None; got "
            f"{window_size!r}: for as many keys on both sides pass (n, n)"
        )
    return window_size[0], window_size[1]


def _attention(
    qkv: tuple[Tensor, Tensor, Tensor], mask: Any, causal: Any, window: Any, habits: Habits, options: dict[str, Any]
) -> Any:
    """One process; q, k and v are (batch, rows, heads, dim)."""
    q, k, v = qkv
    if mask is None or is_block_mask(mask):
        return attention(q, k, v, mask=mask, causal=causal, window=window, **options)
    shape = Shape(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    whole = as_four_dims(mask, shape.batch, (shape.keys,))
    check_fits(whole, shape)
    compiling = torch.compiler.is_compiling()
    captured = not compiling and q.is_cuda and torch.cuda.is_current_stream_capturing()
    terms = settle(whole, shape, causal, window is not None, habits.read and not compiling and not captured)
    if terms.keys is not None:
        return _packed(q, k, v, terms, options)
    of_keys = terms.mask is not None and whole.shape[1] == whole.shape[2] == 1 and not causal and window is None
    if of_keys and (captured or not habits.read) and not compiling:
        packing_kv, k, v = without_reading(whole[:, 0, 0].expand(shape.batch, shape.keys), k, v)
        packing = all_rows(shape.batch, shape.queries, q.device)
        return attention(q, k, v, packing=packing, packing_kv=packing_kv, **options)
    return attention(q, k, v, mask=terms.mask, bias=terms.bias, causal=causal, window=window, **options)


def _packed(q: Tensor, k: Tensor, v: Tensor, terms: Terms, options: dict[str, Any]) -> Any:
    """Queries of ``terms.rows`` by ``terms.keys``: in place where these are runs, else the real rows are packed."""
    batch, queries = q.shape[:2]
    every = all_rows(batch, queries, q.device)
    rows, keys = terms.rows or every, terms.keys
    assert keys is not None
    if rows._holes is None and keys._holes is None:
        return attention(q, k, v, packing=rows, packing_kv=keys, causal=terms.causal, **options)
    got = attention(
        q.flatten(0, 1) if terms.rows is None else rows.pack(q), keys.pack(k), keys.pack(v), causal=terms.causal,
        packing=rows if terms.rows is None else rows.compact(), packing_kv=keys.compact(), **options,
    )  # fmt: skip
    out, lse = got if options["return_lse"] else (got, None)
    out = _unpacked(out, terms.rows, batch, queries)
    if lse is None:
        return out
    lse = _unpacked(lse.transpose(0, 1), terms.rows, batch, queries)
    if terms.rows is not None:
        lse = lse.masked_fill(~terms.rows.valid.unsqueeze(-1), float("-inf"))
    return out, lse.transpose(1, 2)


def _unpacked(x: Tensor, rows: Packing | None, batch: int, queries: int) -> Tensor:
    return x.unflatten(0, (batch, queries)) if rows is None else rows.unpack(x)
