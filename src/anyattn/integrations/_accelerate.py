"""Data loaders of accelerate that give ranks of a context-parallel group the same batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from anyattn._context._parallel import ContextParallel
from anyattn._errors import ContextError, Unsupported


@contextmanager
def same_batches(accelerator: Any, cp: ContextParallel) -> Iterator[None]:
    """Loaders that an accelerator prepares inside give the ranks of a group the same batches.

    accelerate reads from a mesh which processes are to be given the same batch; it is shown one of (data, context).
    """
    _check_processes(accelerator, cp)
    world, outer = accelerator.num_processes, vars(accelerator).get("prepare_data_loader")
    mesh = None
    if dist.is_initialized():
        mesh = dist.device_mesh.init_device_mesh(
            accelerator.device.type, (world // cp.size, cp.size), mesh_dim_names=("dp_replicate", "cp")
        )

    accelerator.prepare_data_loader = _Prepare(accelerator, mesh)
    try:
        yield
    finally:
        if outer is None:
            del accelerator.prepare_data_loader
        else:
            accelerator.prepare_data_loader = outer


class _Prepare:
    """An accelerator's ``prepare_data_loader``, shown a mesh: the innermost context's, where several are nested."""

    def __init__(self, accelerator: Any, mesh: Any) -> None:
        before = accelerator.prepare_data_loader
        self._prepare: Any = before._prepare if isinstance(before, _Prepare) else before
        self._accelerator, self._mesh = accelerator, mesh

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from accelerate.data_loader import DataLoaderDispatcher

        state = self._accelerator.state
        before, state.device_mesh = state.device_mesh, self._mesh
        try:
            loader = self._prepare(*args, **kwargs)
        finally:
            state.device_mesh = before
        if isinstance(loader, DataLoaderDispatcher) and self._accelerator.num_processes > 1:
            raise Unsupported(
                "context_parallel needs every process to read its batches, and dispatch_batches has one read for all: "
                "pass dispatch_batches=False (for a Trainer, in accelerator_config)"
            )
        return loader


def _check_processes(accelerator: Any, cp: ContextParallel) -> None:
    world, rank = accelerator.num_processes, accelerator.process_index
    others = getattr(accelerator.parallelism_config, "non_data_parallel_size", 1)
    first = rank - cp.rank
    if others > 1:
        raise Unsupported("context_parallel(accelerator=) takes a ParallelismConfig of data-parallel dims only")
    if world % cp.size or first % cp.size or cp._members.ranks not in ((), tuple(range(first, first + cp.size))):
        raise ContextError(
            f"process {rank} of {world} is rank {cp.rank} of {cp.size} in its context-parallel group, of processes "
            f"{list(cp._members.ranks)}: a group must be neighbours, as the last dim of a mesh (data, context) is"
        )
