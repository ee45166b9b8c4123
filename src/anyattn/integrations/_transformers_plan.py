"""Attention layers of a transformers model under a context-parallel plan.

Legend: B batch entries, R rows of this rank's shard.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from anyattn._api import attention
from anyattn._context._plan import ContextPlan
from anyattn._errors import ContextError, ShapeError, Unsupported
from anyattn.integrations._layout import Pattern
from anyattn.integrations._transformers_call import refuse
from anyattn.integrations._transformers_functions import recognize
from anyattn.integrations._transformers_masks import facts_of, make_mask
from anyattn.integrations._transformers_memory import once


@dataclass(eq=False)
class Forward:
    """One forward of a model under a plan."""

    plan: ContextPlan
    layers: int = 0
    """Attention layers that ran through it."""
    thread: int = field(default_factory=threading.get_ident)
    """In which it runs."""


#: Plans whose batches context_parallel divides, with positions and labels; others are the caller's own.
_by_hooks: weakref.WeakSet[ContextPlan] = weakref.WeakSet()
#: Forwards of divided models that run now, of all threads. Empty in backward, which may run layers again.
_running: list[Forward] = []


def begin(plan: ContextPlan) -> None:
    """A forward of a divided model begins in this thread."""
    _by_hooks.add(plan)
    _running.append(Forward(plan))


def end() -> Forward | None:
    """This thread's innermost forward ends; None where there is none."""
    forwards = running()
    if forwards:
        _running.remove(forwards[-1])
    return forwards[-1] if forwards else None


def running() -> list[Forward]:
    """Forwards of divided models in this thread, outermost first; of any thread where that is asked in a trace."""
    if torch.compiler.is_compiling():
        return _running
    thread = threading.get_ident()
    return [forward for forward in _running if forward.thread == thread]


def or_by_plan(attention_forward: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    """An attention function for transformers, with what a call does that is given a plan.

    Args:
        attention_forward: without a plan.
        **fixed: keyword arguments of every call.
    """

    @functools.wraps(attention_forward)
    def forward(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> Any:
        if options.get("plan") is None:
            if _running and running():
                raise Unsupported(
                    "context_parallel hands the plan to attention as a keyword argument of the model, and this model "
                    "does not pass its keyword arguments on to attention"
                )
            return attention_forward(module, query, key, value, attention_mask, **options, **fixed)
        run = attend
        if torch.compiler.is_compiling():
            from anyattn.integrations._transformers_breaking import attend as run
        return run(module, query, key, value, attention_mask, **options, **fixed)

    return forward


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    *,
    plan: ContextPlan,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    deterministic: bool | None = None,
    backend: str = "auto",
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of this rank's rows, as a transformers model calls it.

    ``plan`` is of the batch, with whatever mask; ``mask`` is what the model hands to attention, and says nothing that
    is not in the plan. query, key and value are (1, heads, R, dim), or (B, heads, R, dim) with a plan from a plain
    length. Returns (1 or B, R, num_heads, head_dim_v), and None. All else is as without a plan.

    Raises:
        ContextError: ``plan`` is something else, or the model was called with a plan of the caller's own, and its
            positions or labels are not of this rank's rows.
    """
    if not isinstance(plan, ContextPlan):
        raise ContextError(
            f"plan must be an anyattn.ContextPlan, as ContextParallel.plan() makes it, or None; got {plan!r:.80}"
        )
    refuse(module, options)
    if plan not in _by_hooks:
        _check_own(plan, options, getattr(module, "layer_idx", None))
    made = _kind_of(mask)
    if made is not None and made.chunk is not None:
        raise Unsupported("under a plan there is no chunked attention: plans know causal, sliding and full masks")
    if position_bias is not None:
        raise Unsupported("under a plan there is no position_bias: a rank's keys are of several ranks")
    for forward in running():
        forward.layers += 1
    here = _masked(plan, _pattern(module, made, is_causal, sliding_window))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    more: dict[str, Any] = {
        "scale": scaling, "softcap": softcap or None, "sink": s_aux, "dropout": dropout,
        "deterministic": deterministic, "backend": backend,
    }  # fmt: skip
    if plan._memory.entries:
        return attention(q, k, v, plan=here, **more), None
    if query.shape[0] != 1:
        raise ShapeError(f"under a plan made from a Packing a batch is one row of this rank's; got {query.shape[0]}")
    return attention(q[0], k[0], v[0], plan=here, **more)[None], None


# --- plans of the caller's own, without context_parallel ---


def _check_own(plan: ContextPlan, options: Mapping[str, Any], layer: int | None) -> None:
    """Refuse a call whose positions or loss are of other rows, as far as what reaches attention tells.

    Args:
        plan: of the batch.
        options: keyword arguments of the call of attention, most of which are the model's.
        layer: the number of the layer that asks.

    Raises:
        ContextError: positions or labels are not of this rank's rows; before a plan's first use on all ranks.
    """
    failure = None
    if plan._data.topology.world > 1:
        failure = _wrong_loss(options)
    if failure is None and _counted_by_row(plan, options.get("position_ids"), layer):
        failure = (
            "plan= without position_ids=: the model has counted this rank's rows from 0, and they are other tokens of "
            "their documents; pass position_ids=plan.position_ids[None]"
        )
    if failure is not None:
        error = ContextError(failure)
        plan._agree(error)  # ranks whose rows do begin at 0 hear of it
        raise error


def _wrong_loss(options: Mapping[str, Any]) -> str | None:
    """Why the loss would not be this rank's part of the batch's; None where it is, or where that cannot be known."""
    items, shifted = (options.get(name) is not None for name in ("num_items_in_batch", "shift_labels"))
    if shifted and not items:
        return (
            "plan= and shift_labels= without num_items_in_batch=: the loss would be the mean over this rank's labels, "
            "and means of ranks do not add up; pass num_items_in_batch, the number of labels in the whole batch"
        )
    if not shifted and (items or options.get("labels") is not None):
        return (
            f"plan= and {'num_items_in_batch' if items else 'labels'}= without shift_labels=: the model would shift "
            "labels within this rank's rows; shift the whole batch's, take this rank's by plan.shard, and pass them "
            "both as labels and as shift_labels. Where the loss is computed outside the model, leave "
            "num_items_in_batch= out"
        )
    return None


def _counted_by_row(plan: ContextPlan, positions: Any, layer: int | None) -> bool:
    """Whether positions are 0, 1, ... along this rank's rows, and those of its tokens are others."""
    if type(positions) is not Tensor or not positions.ndim or positions.shape[-1] != plan.rows:
        return False
    if positions.is_cuda and torch.cuda.is_current_stream_capturing():
        return False  # a step is captured that has run before
    if positions.data_ptr() == plan.position_ids.data_ptr():
        return False  # the plan's own, and nothing is read from the device

    def look() -> bool:
        if all(begin == row for _, begin, _, row in plan._layout.pieces[plan._rank]):
            return False
        rows = torch.arange(plan.rows, device=positions.device)
        return bool((positions == rows).all())

    found: bool = once(positions, ("counted by row", weakref.ref(plan)), layer, look)
    return found


# --- masks ---


def _kind_of(mask: Any) -> Pattern | None:
    """The kind of mask, from a mask function: this file's or, without :func:`context_parallel`, the usual one."""
    if mask is None or isinstance(mask, Pattern):
        return mask
    facts = facts_of(mask)
    if facts is None or facts.real is not None:
        raise Unsupported(
            "under a plan there is no attention_mask: the plan says which tokens are real, and what they see"
        )
    return facts.pattern


def _pattern(
    module: torch.nn.Module, made: Pattern | None, is_causal: bool | None, sliding_window: int | None
) -> Pattern:
    """What position allows: as the call says, else as the mask does, else as the module does."""
    window = None if sliding_window is None else sliding_window - 1
    if made is not None:
        return Pattern(made.causal if is_causal is None else is_causal, window if made.window is None else made.window)
    return Pattern(bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal, window)


_masks: Any = WeakIdKeyDictionary()


def _masked(plan: ContextPlan, pattern: Pattern) -> ContextPlan:
    """The plan for layers with this mask, made once for all of them."""
    data, known = _masks.get(plan, (None, {}))
    if data is not plan._data:  # new, or refilled
        known = {}
        _masks[plan] = (plan._data, known)
    if pattern not in known:
        other = plan.with_mask(causal=pattern.causal, window=pattern.sides())
        known[pattern] = None if other._data.mask == plan._data.mask else other  # the plan itself would live for ever
    found: ContextPlan | None = known[pattern]
    return plan if found is None else found


def mask_function(*args: Any, **kwargs: Any) -> Tensor | Pattern | None:
    """The mask function that transformers calls: under a plan it returns the kind of mask, for all else is in the plan.

    Raises:
        Unsupported: any other mask function.
    """
    if not running():
        return make_mask(*args, **kwargs)
    function = args[5] if len(args) > 5 else kwargs.get("mask_function")
    known = None if function is None else recognize(function)
    if function is not None and known is None:
        raise Unsupported(
            "context_parallel knows causal, sliding and bidirectional masks, and this model has a mask function of its "
            "own"
        )
    return Pattern(causal=True) if known is None else known.pattern
