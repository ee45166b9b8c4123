"""The door: ``attention``, ``explain`` and ``backends``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from anyattn import _autograd, _core, _environment, _preparation, _select, _traced
from anyattn._call import Call
from anyattn._errors import InvalidArgument, PackingError, Refused, Unsupported
from anyattn._packing import Packing
from anyattn._preparation import Inputs, Prepared
from anyattn._request import (
    Request,
    Tensors,
    as_tuple,
    autocast_dtype,
    describe,
    describe_optional,
    is_block_mask,
    refuse_transforms,
)
from anyattn._select import Explanation
from anyattn.backends import ORDER
from anyattn.backends import get as get_backend

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from anyattn._context._plan import ContextPlan

Causal = bool | Literal["top_left"] | None
_CACHE_SIZE = 4096
_prepared: dict[Any, Prepared] = {}
#: The last one found, under None: comparing two keys costs less than hashing one and comparing it.
_recent: dict[None, tuple[Any, Prepared]] = {}
_select.caches += [_prepared, _recent]
#: Asked first, for to ask for one kind of device costs more.
_any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled
_flash_override = _environment.flash_override
_NO_INPUTS = Inputs(None, None, None, None, None)


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: Causal = ..., window: tuple[int | None, int | None] | None = ...,
    scale: float | None = ..., softcap: float | None = ..., sink: Tensor | None = ...,
    alibi_slopes: Tensor | None = ..., bias: Tensor | None = ..., mask: Tensor | BlockMask | None = ...,
    dropout: float = ..., layout: str | None = ...,
    packing: Packing | None = ..., packing_kv: Packing | None = ..., plan: ContextPlan | None = ...,
    backend: str | Sequence[str] = ...,
    deterministic: bool | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: Causal = ..., window: tuple[int | None, int | None] | None = ...,
    scale: float | None = ..., softcap: float | None = ..., sink: Tensor | None = ...,
    alibi_slopes: Tensor | None = ..., bias: Tensor | None = ..., mask: Tensor | BlockMask | None = ...,
    dropout: float = ..., layout: str | None = ...,
    packing: Packing | None = ..., packing_kv: Packing | None = ..., plan: ContextPlan | None = ...,
    backend: str | Sequence[str] = ...,
    deterministic: bool | None = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: Causal = None,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | BlockMask | None = None,
    dropout: float = 0.0,
    layout: str | None = None,
    packing: Packing | None = None,
    packing_kv: Packing | None = None,
    plan: ContextPlan | None = None,
    backend: str | Sequence[str] = "auto",
    deterministic: bool | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention, on whichever kernel is installed, able and fastest.

    In order: scale, softcap, + ALiBi, + bias, masks, sink, softmax, dropout. causal, window, mask and packing are all
    applied. Query i of a sequence stands at position i + len_k - len_q, from real lengths, for causal, window and
    ALiBi alike; with ``causal="top_left"`` it stands at i.

    Args:
        q: queries, (batch, seq_q, num_heads, head_dim) or as ``layout`` says. float16, bfloat16, float32 or float64.
        k: keys, (batch, seq_k, num_kv_heads, head_dim). num_heads is a multiple of num_kv_heads.
        v: values, (batch, seq_k, num_kv_heads, head_dim_v). One dtype and device for q, k and v.
        causal: no key after a query's own position. True is bottom-right aligned: the last query sees the last key.
            ``"top_left"`` is the other alignment. None means False.
        window: (left, right), ints >= 0: keys visible on either side of a query's own position, both ends inclusive.
            None on a side is unbounded. causal makes right 0.
        scale: multiplies q . k; default head_dim ** -0.5.
        softcap: s -> softcap * tanh(s / softcap). None or 0.0 is none.
        sink: (num_heads,), any float dtype: a logit that joins every row's softmax and has no value. Gets a gradient.
        alibi_slopes: (num_heads,) or (sequences, num_heads): adds -slope * |key position - query position|. Gets no
            gradient.
        bias: added to the scores, broadcastable to (batch, num_heads, seq_q, seq_k). Gets a gradient. Not with "thd".
            Hide keys by ``mask``: where huge negative numbers leave a row no other score, kernels (torch's own too)
            recompute its probabilities in backward from an lse that cannot hold them, and its gradient is wrong.
        mask: bool, True = attend, broadcastable to (batch, num_heads, seq_q, seq_k), or a torch BlockMask (over packed
            rows with "thd").
        dropout: probability in [0, 1) of dropping an attention weight, in training and evaluation alike.
        layout: "bshd" (default for 4-D), "sbhd", "bhsd", or "thd" (default for 3-D): (rows, heads, dim).
        packing: where the sequences lie. Required for "thd"; with 4-D tensors it says how many rows of each batch
            entry are real.
        packing_kv: the same for keys and values; default: packing.
        plan: a ContextPlan: q, k and v are this rank's shards of a batch that the ranks of its group share, and all of
            them call. causal, window and packing are then the plan's and can be left out. bias and mask are this rank's
            query rows by all keys.
        backend: "auto", a backend's name, "backend:kernel", or several in order of preference: never another one.
        deterministic: bitwise repeatable, forward and backward. Default: torch.are_deterministic_algorithms_enabled().
        return_lse: also return the log-sum-exp of the masked scores, sink included; it is differentiable.

    Returns:
        out, as q with head_dim_v for its last dim; or (out, lse), lse float32 in natural log, (batch, num_heads,
        seq_q) or (num_heads, rows of q). In padding out is 0 and lse is -inf, exactly. A real row that sees no key
        has out 0 and lse -inf, or the sink's value.

    Raises:
        InvalidArgument: (or a subclass) arguments that no backend could take; before anything runs.
        NoBackend: no backend that is allowed and installed takes the call; lists every reason.
        Unsupported: DTensor, torch.func transforms.

    Under autocast, float32 q, k and v are cast as by ``F.scaled_dot_product_attention``. Double backward raises.

    Example::

        >>> import torch, anyattn
        >>> packing = anyattn.Packing.from_lengths([3, 5], pad_to_multiple_of=4)
        >>> q, k, v = torch.randn(3, packing.rows, 2, 16).unbind()
        >>> anyattn.attention(q, k, v, causal=True, packing=packing).shape
        torch.Size([12, 2, 16])
    """
    if plan is not None:
        return _with_plan(  # type: ignore[no-any-return]
            Tensors(q, k, v, sink, alibi_slopes, bias, mask, packing, packing_kv), plan,
            causal, window, scale, softcap, dropout, layout, backend, deterministic, return_lse,
        )  # fmt: skip
    if torch.compiler.is_compiling():
        return _traced.attention(  # type: ignore[no-any-return]
            Tensors(q, k, v, sink, alibi_slopes, bias, mask, packing, packing_kv),
            causal, window, scale, softcap, dropout, layout, backend, deterministic, return_lse,
        )  # fmt: skip
    refuse_transforms(q, k, v, sink, bias)
    key: Any = None
    prepared: Prepared | None = None
    try:
        # All that preparation depends on. Building and finding it is what choosing costs from the second call on.
        key = (
            q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
            q.__class__, k.__class__, v.__class__,
            torch.is_grad_enabled() and (q.requires_grad, k.requires_grad, v.requires_grad),
            causal.__class__, scale.__class__, softcap.__class__, dropout.__class__,  # a tensor equals a number
            causal, window, scale, softcap, dropout, layout, backend, deterministic, return_lse,
            torch.are_deterministic_algorithms_enabled(), _select.default_preference(),
            _any_autocast() and autocast_dtype(q.device.type), _flash_override(),
            None if sink is None else (sink.shape, sink.dtype, sink.device, sink.requires_grad),
            None if alibi_slopes is None else describe(alibi_slopes, True),
            None if bias is None else describe(bias, True),
            None if mask is None else describe_optional(mask, True),
            None if packing is packing_kv is None else _packing_key(q, k, layout, packing, packing_kv),
        )  # fmt: skip
        recent = _recent.get(None)
        prepared = recent[1] if recent is not None and recent[0] == key else _look_up(key)
    except (AttributeError, TypeError):  # not tensors, or something unhashable: validation names it
        key = None
    if (
        prepared is None
        or prepared.layout.flattened
        or sink is not None
        or alibi_slopes is not None
        or mask is not None
    ):
        return _attention(  # type: ignore[no-any-return]
            key, prepared, Tensors(q, k, v, sink, alibi_slopes, bias, mask, packing, packing_kv),
            causal, window, scale, softcap, dropout, layout, backend, deterministic, return_lse,
        )  # fmt: skip
    rows_q = rows_k = None
    if packing is not None:
        rows_q = packing._rows
        rows_k = rows_q if packing_kv is None else packing_kv._rows
    try:
        if prepared.bare and bias is None and _core.on_current_device(prepared):
            return prepared.backend.forward(Call(q, k, v, prepared.spec, prepared.kernel.name, rows_q, rows_k)).out
        out, lse = _autograd.run(prepared, Inputs(rows_q, rows_k, None, None, None), q, k, v, None, bias)
    except Refused:
        _drop(key)
        return _attention(  # type: ignore[no-any-return]
            key, None, Tensors(q, k, v, sink, alibi_slopes, bias, mask, packing, packing_kv),
            causal, window, scale, softcap, dropout, layout, backend, deterministic, return_lse,
        )  # fmt: skip
    return (out, lse) if return_lse else out


def attention_in_splits(
    num_splits: int, q: Tensor, k: Tensor, v: Tensor, *, causal: Any = None, window: Any = None, scale: Any = None,
    softcap: Any = None, sink: Tensor | None = None, alibi_slopes: Tensor | None = None, bias: Tensor | None = None,
    mask: Any = None, dropout: Any = 0.0, layout: str | None = None, packing: Packing | None = None,
    packing_kv: Packing | None = None, plan: ContextPlan | None = None, backend: Any = "auto",
    deterministic: bool | None = None, return_lse: bool = False,
) -> Any:  # fmt: skip
    """``attention`` on a kernel that takes the keys of a block of queries in parts: for integrations that are asked so.

    Args:
        num_splits: in how many parts forward takes them, which are computed side by side and merged; 0: as many as the
            kernel chooses. Backward is not split. Kernels that do not split are reasons in ``NoBackend``.

    The other arguments are ``attention``'s, and so are results and errors.
    """
    t = Tensors(q, k, v, sink, alibi_slopes, bias, mask, packing, packing_kv)
    options = (causal, window, scale, softcap, dropout, layout, backend, deterministic, return_lse, num_splits)
    if plan is not None:
        return _with_plan(t, plan, *options)
    if torch.compiler.is_compiling():
        if num_splits != 1 and is_block_mask(mask):  # FlexAttention alone runs those in a compiled region
            raise Unsupported(
                f"num_splits={num_splits} with a BlockMask: FlexAttention does not split keys in forward; leave "
                "num_splits at 1"
            )
        return _traced.attention(t, *options)
    refuse_transforms(q, k, v, sink, bias)
    key: Any = None
    prepared: Prepared | None = None
    if getattr(packing, "_holes", None) is None:  # else it is packed first, and looked up then
        key = make_request(t, *options)
        try:
            prepared = _prepared.get(key)
        except TypeError:  # something unhashable: validation names it
            key = None
    return _attention(key, prepared, t, *options)


def _with_plan(
    t: Tensors, plan: Any, causal: Any, window: Any, scale: Any, softcap: Any, dropout: Any, layout: Any, backend: Any,
    deterministic: Any, return_lse: bool, num_splits: int = 1,
) -> Any:  # fmt: skip
    """Over the ranks of a plan."""
    from anyattn._context import _door
    from anyattn._context._checks import Asked

    run = _door.breaking if torch.compiler.is_compiling() else _door.attention
    # Made in one piece: torch 2.11 does not carry what _replace() makes over a graph break.
    asked = Asked(
        causal, as_tuple(window), scale, softcap, dropout, layout, as_tuple(backend), deterministic, return_lse,
        num_splits,
    )  # fmt: skip
    return run(t, asked, plan)


def _look_up(key: Any) -> Prepared | None:
    """What is prepared for a key; it is the recent one from then on, for most models call alike from layer to layer."""
    prepared = _prepared.get(key)
    if prepared is not None:
        _recent[None] = (key, prepared)
    return prepared


def _packing_key(
    q: Tensor, k: Tensor, layout: str | None, packing: Packing | None, packing_kv: Packing | None
) -> tuple[Any, ...]:
    """What a key holds of the packings: with 4-D tensors, of those that count rows of the flattened batch."""
    if packing is None or packing._holes is not None:
        raise TypeError("nothing to look up: packing_kv alone is an error, and holes are packed first")
    if q.ndim == 4:
        packing, packing_kv = entries_of(q, k, layout, packing, packing_kv)
        assert packing is not None
    if packing_kv is None:
        return packing._key
    return packing._key, packing_kv._key, packing.relation(packing_kv)


def _attention(
    key: Any, prepared: Prepared | None, t: Tensors, causal: Any, window: Any, scale: Any, softcap: Any, dropout: Any,
    layout: Any, backend: Any, deterministic: Any, return_lse: bool, num_splits: int = 1,
) -> Any:  # fmt: skip
    """The rest of ``attention``: a first call of its kind, or one with more than q, k, v, bias and rows."""
    if t.packing is not None and getattr(t.packing, "_holes", None) is not None:
        options = (causal, window, scale, softcap, dropout, backend, deterministic, return_lse, num_splits)
        return _through_packing(t, layout, *options)
    if prepared is not None:
        try:
            out, lse = _autograd.run(prepared, _inputs(prepared, t), t.q, t.k, t.v, t.sink, t.bias)
            return (out, lse) if return_lse else out
        except Refused:
            _drop(key)

    def prepare() -> Prepared:
        request = make_request(
            t, causal, window, scale, softcap, dropout, layout, backend, deterministic, return_lse, num_splits
        )
        found = _preparation.prepare(request)
        if key is not None:
            if len(_prepared) >= _CACHE_SIZE:
                _prepared.clear()
            _prepared[key] = found
        return found

    def run(p: Prepared) -> Any:
        return _autograd.run(p, _inputs(p, t), t.q, t.k, t.v, t.sink, t.bias)

    out, lse = _preparation.run_accepted(prepare, run, lambda: _drop(key))
    return (out, lse) if return_lse else out


def _drop(key: Any) -> None:
    """Choose anew for a key."""
    _recent.clear()
    if key is not None:
        _prepared.pop(key, None)


def make_request(
    t: Tensors,
    causal: Any,
    window: Any,
    scale: Any,
    softcap: Any,
    dropout: Any,
    layout: Any,
    backend: Any,
    deterministic: bool | None,
    return_lse: bool,
    num_splits: int = 1,
) -> Request:
    """The description of a call."""
    q, k, v, sink, alibi, bias, mask, packing, packing_kv = t
    grad = torch.is_grad_enabled()
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise InvalidArgument(f"{name} must be a tensor, got {type(x).__name__}")
    if packing is None and packing_kv is None:
        keys = None
        relation = "any"
    else:
        packing, packing_kv = entries_of(q, k, layout, packing, packing_kv)
        keys = None if packing_kv is None else packing_kv._key
        relation = "equal" if packing_kv is None or packing is None else packing.relation(packing_kv)
    return Request(
        describe(q, grad),
        describe(k, grad),
        describe(v, grad),
        causal,
        window if window is None or type(window) is tuple else as_tuple(window),
        scale,
        softcap,
        None if sink is None else describe_optional(sink, grad),
        None if alibi is None else describe_optional(alibi, grad),
        None if bias is None else describe_optional(bias, grad),
        None if mask is None else describe_optional(mask, grad),
        dropout,
        layout,
        None if packing is None else packing._key,
        keys,
        relation,
        backend if type(backend) is str else as_tuple(backend),
        _select.default_preference(),
        deterministic,
        torch.are_deterministic_algorithms_enabled(),
        return_lse,
        autocast_dtype(q.device.type),
        _flash_override(),
        num_splits,
    )


def entries_of(
    q: Tensor, k: Tensor, layout: str | None, packing: Packing | None, packing_kv: Packing | None
) -> tuple[Packing | None, Packing | None]:
    """The packings of a call; with 4-D tensors, as rows of the flattened batch."""
    for name, p in (("packing", packing), ("packing_kv", packing_kv)):
        if p is not None and not isinstance(p, Packing):
            raise PackingError(f"{name} must be an anyattn.Packing, got {type(p).__name__}")
        if p is not None and p._holes is not None:
            raise PackingError(
                f"{name} was made from a mask with holes, which needs 4-D tensors and a packing for the queries too"
            )
    if q.ndim != 4 or k.ndim != 4 or packing is None or layout not in (None, "bshd", "sbhd", "bhsd"):
        return packing, packing_kv
    batch, seq, _ = {"sbhd": (1, 0, 2), "bhsd": (0, 2, 1)}.get(layout or "", (0, 1, 2))
    if packing_kv is not None:
        packing_kv = packing_kv.for_entries(k.shape[batch], k.shape[seq])
    elif k.shape[seq] != q.shape[seq]:
        return packing, None  # validation says what is missing
    return packing.for_entries(q.shape[batch], q.shape[seq]), packing_kv


def _inputs(prepared: Prepared, t: Tensors) -> Inputs:
    """What a call carries beside q, k, v, sink and bias."""
    inputs = _NO_INPUTS
    if prepared.packed:
        packing, packing_kv = t.packing, t.packing_kv
        if prepared.layout.flattened:
            packing, packing_kv = entries_of(t.q, t.k, prepared.layout.name, packing, packing_kv)
        assert packing is not None
        rows = packing._rows
        inputs = Inputs(rows, rows if packing_kv is None else packing_kv._rows, None, None, None)
    return inputs if t.alibi_slopes is None and t.mask is None else _more_inputs(inputs, t)


def _more_inputs(inputs: Inputs, t: Tensors) -> Inputs:
    alibi = None if t.alibi_slopes is None else t.alibi_slopes.detach()
    if t.mask is None or is_block_mask(t.mask):
        return inputs._replace(alibi=alibi, block_mask=t.mask)
    assert isinstance(t.mask, Tensor)
    return inputs._replace(alibi=alibi, mask=t.mask.reshape((1,) * (4 - t.mask.ndim) + tuple(t.mask.shape)))


def _through_packing(
    t: Tensors, layout: str | None, causal: Any, window: Any, scale: Any, softcap: Any, dropout: Any, backend: Any,
    deterministic: Any, return_lse: bool, num_splits: int,
) -> Any:  # fmt: skip
    """A mask with holes: gather the real tokens, run packed, scatter back."""
    packing = t.packing
    assert packing is not None
    swap = {None: (0, 0), "bshd": (0, 0), "sbhd": (0, 1), "bhsd": (1, 2)}.get(layout)
    if swap is None or t.packing_kv is not None or t.bias is not None or t.mask is not None or t.q.ndim != 4:
        raise PackingError(
            "a packing made from a mask with holes goes with 4-D self-attention without bias and mask: use mask= for "
            "such a mask, or pack the tensors yourself with Packing.pack"
        )
    q, k, v = (packing.pack(x.transpose(*swap)) for x in (t.q, t.k, t.v))
    run: Any = attention if num_splits == 1 else partial(attention_in_splits, num_splits)
    got = run(
        q, k, v, causal=causal, window=window, scale=scale, softcap=softcap, sink=t.sink, alibi_slopes=t.alibi_slopes,
        dropout=dropout, packing=packing.compact(), backend=backend, deterministic=deterministic, return_lse=return_lse,
    )  # fmt: skip
    out, lse = got if return_lse else (got, None)
    out = packing.unpack(out).transpose(*swap)
    if lse is None:
        return out
    rows = packing.unpack(lse.transpose(0, 1)).masked_fill(~packing.valid.unsqueeze(-1), float("-inf"))
    return out, rows.transpose(1, 2)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: Causal = None,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | BlockMask | None = None,
    dropout: float = 0.0,
    layout: str | None = None,
    packing: Packing | None = None,
    packing_kv: Packing | None = None,
    plan: ContextPlan | None = None,
    backend: str | Sequence[str] = "auto",
    deterministic: bool | None = None,
    return_lse: bool = False,
    on: str | None = None,
    assume: Mapping[str, str | None] | None = None,
) -> Explanation:
    """Which kernel ``attention`` would run for the same arguments, and why each other one would not.

    Args:
        on: a target to ask about from any machine: "cpu", "sm80", "sm86", "sm89", "sm90", "sm100", "sm103" or
            "sm120". It assumes the newest known version of each backend. Default: this machine as it is.
        assume: versions to assume instead, {"fa4": "4.0.0b20", "varlen": None}; None means not installed.

    The other arguments are ``attention``'s. Tensors may be on "meta": nothing is computed.

    Returns:
        An :class:`Explanation`: ``.chosen``, ``.rejected`` {name: reasons}, ``.candidates``; ``str()`` is a table. It
        is the very object that ``attention`` acts on.

    Raises:
        InvalidArgument: as ``attention``; also an unknown ``on`` or a backend in ``assume`` that does not exist.

    Example::

        >>> import torch, anyattn
        >>> q = torch.empty(1, 4096, 32, 128, dtype=torch.bfloat16, device="meta")
        >>> anyattn.explain(q, q, q, causal=True, on="sm100").chosen
        'fa4'
    """
    if on is not None and on not in _environment.TARGETS:
        raise InvalidArgument(f"unknown on={on!r}; allowed: {_environment.describe_targets()}")
    tensors = Tensors(q, k, v, sink, alibi_slopes, bias, mask, packing, packing_kv)
    arch = None if on is None else _environment.TARGETS[on]
    installed = None if on is None and assume is None else _select.assumed_world(assume, newest=on is not None)
    if plan is not None:
        from anyattn._context import _door
        from anyattn._context._checks import Asked

        asked = Asked(causal, window, scale, softcap, dropout, layout, backend, deterministic, return_lse)
        return _door.explain(tensors, asked, plan, installed, arch)
    if packing is not None and getattr(packing, "_holes", None) is not None:  # attention() packs such a batch first
        swap = {"sbhd": (0, 1), "bhsd": (1, 2)}.get(layout or "", (0, 0))
        q, k, v = (x.transpose(*swap).flatten(0, 1)[: packing._facts.rows] for x in (q, k, v))
        tensors, layout = tensors._replace(q=q, k=k, v=v, packing=packing.compact()), None
    request = make_request(tensors, causal, window, scale, softcap, dropout, layout, backend, deterministic, return_lse)
    return _preparation.explain(request, installed, arch)


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """One backend, as ``backends()`` finds it."""

    name: str
    title: str
    version: str | None
    """The installed version, or None."""
    runs_here: bool
    """Installed, importable, and able to use this machine's device."""
    reason: str
    """Why it does not run here, in one line; empty if it does."""
    install: str
    """The command that installs or upgrades it."""

    def __str__(self) -> str:
        state = "runs here" if self.runs_here else self.reason
        return f"{self.name:<10} {self.version or '-':<12} {state}"


class BackendTable(dict[str, BackendStatus]):
    """Backend statuses by name; ``str()`` is a table."""

    def __str__(self) -> str:
        rows = [(s.name, s.version or "-", "runs here" if s.runs_here else s.reason) for s in self.values()]
        return "\n".join(_select.aligned(rows))


def backends() -> BackendTable:
    """What is installed, its version, whether this machine's device runs it, and why not.

    Installed kernel packages are imported, to see whether they can be; a failure of any kind is the ``reason``.

    Example::

        >>> import anyattn
        >>> anyattn.backends()["reference"].runs_here
        True
    """
    arch = _environment.arch_of(torch.device("cuda")) if torch.cuda.is_available() else 0
    return BackendTable({name: _status(name, arch) for name in ORDER})


def _status(name: str, arch: int) -> BackendStatus:
    backend = get_backend(name)
    probe = dict(_select.world())[name]
    reason = probe.problem
    if probe.version is None:
        reason = reason or "not installed"
    elif not reason and not _select.load(name):
        reason = dict(_select.world())[name].problem
    families = {family for c in backend.CAPABILITIES for family in c.families}
    if not reason and arch // 10 not in families:
        reason = f"has no kernel for {_environment.arch_name(arch)}"
    reason = reason or _select.barred(name, arch)
    return BackendStatus(name, backend.TITLE, probe.version, not reason, reason, backend.INSTALL)
