"""``warm_up``: what is compiled, planned or loaded at the first call of a kind, before training starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anyattn._api import attention, explain
from anyattn._errors import InvalidArgument
from anyattn._select import Explanation


def warm_up(q: Tensor, k: Tensor, v: Tensor, *, group: Any = None, **arguments: Any) -> Explanation:
    """Run a call once for its side effects: kernels are chosen, imported, compiled and kept on disk.

    Kernels that are compiled at their first use cost seconds per configuration, and many processes that compile the
    same ones at once wait for each other's locks, or time out. Here one process of each host goes first; the others
    then find the compiled kernels on disk, where the backend keeps them (``anyattn doctor`` says where).

    Args:
        q: as for :func:`attention`, and so are k and v; only shapes, dtypes, device and ``requires_grad`` matter. If
            one of them requires a gradient, backward runs too. Nothing is added to ``.grad``.
        k: keys.
        v: values.
        group: a process group of all processes that call this, on the hosts' local ranks 0 first. None: the default
            group if ``torch.distributed`` is initialised, else this process alone.
        arguments: ``attention``'s other arguments.

    Returns:
        What ``explain`` says of the call.

    Raises:
        InvalidArgument: tensors on "meta", which no kernel can run on.
        NoBackend: as ``attention``.

    Example::

        >>> import torch, anyattn
        >>> q = torch.randn(1, 64, 2, 16, requires_grad=True)
        >>> anyattn.warm_up(q, q, q, causal=True).chosen
        'torch'
    """
    if any(x.device.type == "meta" for x in (q, k, v)):
        raise InvalidArgument("warm_up needs tensors on the device that will run the kernels, got some on meta")
    with _one_per_host_first(group):
        _run(q, k, v, arguments)
    return explain(q, k, v, **arguments)


def _run(q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> None:
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in (q, k, v)]
    got = attention(*leaves, **arguments)
    results = [x for x in (got if isinstance(got, tuple) else (got,)) if x.requires_grad]
    wanted = [x for x in leaves if x.requires_grad]
    wanted += [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]
    if results and wanted:
        torch.autograd.grad(results, wanted, [torch.zeros_like(x) for x in results], allow_unused=True)


@contextmanager
def _one_per_host_first(group: Any) -> Iterator[None]:
    """The body runs in the first process of each host, and then in the others."""
    if not (dist.is_available() and dist.is_initialized()):
        yield
        return
    first = int(os.environ.get("LOCAL_RANK", dist.get_rank(group) % max(torch.cuda.device_count(), 1))) == 0
    try:
        if not first:
            dist.barrier(group)
        yield
    finally:
        if first:
            dist.barrier(group)
