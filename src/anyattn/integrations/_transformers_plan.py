"""Attention layers of a transformers model under a context-parallel plan.

Legend: B batch entries, R rows of this rank's shard.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
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


@dataclass(eq=False)
class Forward:
    """One forward of a model under a plan."""

    plan: ContextPlan
    layers: int = 0
    """Attention layers that ran through it."""
    thread: int = field(default_factory=threading.get_ident)
    """In which it runs."""


#: Forwards of divided models that run now, of all threads. Empty in backward, which may run layers again.
_running: list[Forward] = []


def begin(plan: ContextPlan) -> None:
    """A forward of a divided model begins in this thread."""
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
        ContextError: ``plan`` is something else.
    """
    if not isinstance(plan, ContextPlan):
        raise ContextError(
            f"plan must be an anyattn.ContextPlan, as ContextParallel.plan() makes it, or None; got {plan!r:.80}"
        )
    refuse(module, options)
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
