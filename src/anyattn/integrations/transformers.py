"""anyattn inside transformers.

Use::

    import anyattn
    from transformers import AutoModelForCausalLM

    anyattn.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="anyattn")

Padded batches, packed batches and generation give what one sequence at a time gives. Packing is taken, in this order,
from ``model(..., packing=Packing)``, from ``cu_seq_lens_q`` and ``cu_seq_lens_k``, from a 2-D attention mask together
with positions that restart; sources that disagree are an error. Padded rows of causal attention come out as 0.

A 4-D mask is complete, as everywhere in transformers: it also says what causality and windows would. Everything is
worked out once per forward, so layers wait for nothing. Under ``torch.compile`` a Packing can only be passed in, made
outside; masks and positions become 4-D masks.

:func:`context_parallel` divides every batch over the ranks of a group. ``model(..., plan=ContextPlan)`` says that the
batch is this rank's rows already, which takes positions and shifted labels of these rows too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from anyattn.backends import ORDER
from anyattn.backends import get as get_backend
from anyattn.integrations import _transformers_register as registry
from anyattn.integrations._transformers_call import attention_forward, packed_only, without_masks
from anyattn.integrations._transformers_context import ContextParallelCollator, context_parallel
from anyattn.integrations._transformers_memory import forget
from anyattn.integrations._transformers_plan import mask_function, or_by_plan

__all__ = ["ContextParallelCollator", "context_parallel", "forget", "register", "unregister"]


def register(name: str = "anyattn", *, replace: str | Sequence[str] | None = None) -> None:
    """Make ``attn_implementation=name`` run every attention of a model through anyattn.

    ``f"{name}:{backend}"`` runs it on that backend and no other, for each backend of ``anyattn.backends()``:
    "anyattn:fa4", "anyattn:varlen" (torch's own varlen kernels, with no package to install).

    Args:
        name: as transformers will know it. Registering a name again is harmless.
        replace: names of transformers' own that from now on mean anyattn too, one or several of "flash_attention_2",
            "flash_attention_3", "flash_attention_4" and "sdpa". For models and features that transformers opens to
            those names only. Models take the flash names then without the package, on any device and in any dtype.
            A model that has attention functions of its own for such a name, instead of looking it up, keeps them.

    Raises:
        MissingExtra: transformers is not installed.
        InvalidArgument: a name that transformers would take for an implementation of its own, or one that cannot be
            replaced.

    :func:`unregister` undoes it.

    Example::

        >>> import anyattn
        >>> anyattn.integrations.transformers.register()  # doctest: +SKIP
        >>> model.set_attn_implementation("anyattn")  # doctest: +SKIP
        >>> model.set_attn_implementation("anyattn:varlen")  # doctest: +SKIP
    """
    registry.check_name(name)
    replaced = registry.names_to_replace(replace)
    for own in (name, *replaced):
        registry.put(own, _entry(), mask_function)
    for backend in ORDER:
        registry.put(f"{name}:{backend}", _entry(backend), mask_function)
    for other in replaced:
        registry.replace(other)


def unregister() -> None:
    """Undo every :func:`register`: names of anyattn's are gone, replaced ones mean again what they meant.

    A model that still has one of anyattn's names raises transformers' ``KeyError`` when it is called: give it another
    one first.
    """
    registry.undo()


def _entry(backend: str | None = None) -> Callable[..., Any]:
    """The function that models call; on one backend, or on whichever is best."""
    if backend is None:
        return or_by_plan(attention_forward)
    features = {feature for kernel in get_backend(backend).CAPABILITIES for feature in kernel.features}
    for feature, lacking in (("mask", without_masks), ("dense", packed_only)):
        if feature not in features:
            lacking.add(backend)
    return or_by_plan(attention_forward, backend=backend)
