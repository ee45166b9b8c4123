"""Raw functions of kernel packages, whose arguments come and go and change places from version to version."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn._errors import Refused

#: The last index of a grid's second and third dims, of which these kernels make the batch one.
LARGEST_BATCH = 65535


class Entry(NamedTuple):
    """A raw function that takes its arguments in an order of ours, whatever its own is."""

    call: Callable[..., Any]
    lacks: frozenset[str]
    """What we have for it and it does not take."""


def entry(function: Any, given: tuple[str, ...], also_called: Mapping[str, str] | None = None) -> Entry:
    """Adapt a function to be called with the values of ``given``, by position.

    Args:
        function: a Python function, a torch custom op (what it wraps is called), or an overload of a torch op.
        given: our names, in our order. What the function takes beyond them gets its default, or None.
        also_called: our name by the function's, where they differ.
    """
    run = getattr(function, "_init_fn", function)  # without the custom op's dispatch, which costs 30 us and more
    parameters = _parameters(run)
    run = getattr(run, "_op", run)  # of a torch op: all that calling its overload does is to call this
    places: list[int] = []
    rest: list[Any] = []
    taken: set[str] = set()
    needed = 0
    for own_name, default, required in parameters:
        name = (also_called or {}).get(own_name, own_name)
        if name in given:
            taken.add(name)
            places.append(given.index(name))
        else:
            places.append(len(given) + len(rest))
            rest.append(default)
        if required or name in given:
            needed = len(places)
    arrange, others = itemgetter(*places[:needed]), tuple(rest)
    if others:
        return Entry(lambda *values: run(*arrange((*values, *others))), frozenset(given) - taken)
    return Entry(lambda *values: run(*arrange(values)), frozenset(given) - taken)


def _parameters(function: Any) -> list[tuple[str, Any, bool]]:
    """(name, default or None, whether it has none)."""
    schema = getattr(function, "_schema", None)
    if schema is not None:
        return [(a.name, a.default_value, not a.has_default_value()) for a in schema.arguments]
    empty = inspect.Parameter.empty
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, None if p.default is empty else p.default, p.default is empty) for p in parameters]


def check_batch(count: int) -> None:
    """Refuse more sequences than a grid has room for: the launch would fail."""
    if count > LARGEST_BATCH:
        raise Refused(f"{count} sequences, gaps among them, are more than its grid has room for ({LARGEST_BATCH})")


def aligned(x: Tensor) -> Tensor:
    """x, or a copy, with its last dim contiguous and every row at a multiple of 16 bytes.

    Its elements have 2 bytes, and its last dim is a multiple of 8. The kernels load 16 bytes at a time, and of all this
    they check that the last dim is contiguous, and nothing else.
    """
    if x.is_contiguous() and not x.data_ptr() % 16:
        return x
    if not x.data_ptr() % 16:
        *outer, last = x.stride()
        if last == 1 and not any(stride % 8 for stride in outer):
            return x
    return x.clone(memory_format=torch.contiguous_format)
