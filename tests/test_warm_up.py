"""``warm_up``: everything that a first call does, with one process per host ahead of the others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import anyattn
import cases
import context_pool


def test_runs_forward_and_backward_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    backend: Any = cases.BACKENDS.get("reference")
    ran: list[str] = []
    for way in ("forward", "backward"):
        real = getattr(backend, way)
        monkeypatch.setattr(backend, way, lambda *a, way=way, real=real: (ran.append(way), real(*a))[1])
    q = torch.randn(1, 5, 2, 8, requires_grad=True)
    sink = torch.randn(2, requires_grad=True)
    found = anyattn.warm_up(q, q, q, sink=sink, return_lse=True, backend="reference")
    assert (found.chosen, ran) == ("reference", ["forward", "backward"])
    assert q.grad is None
    assert sink.grad is None


def test_forward_alone_without_gradients() -> None:
    q = torch.randn(1, 5, 2, 8)
    assert not anyattn.warm_up(q, q, q).problem.grad


def test_meta_is_refused() -> None:
    q = torch.empty(1, 5, 2, 8, device="meta")
    with pytest.raises(anyattn.InvalidArgument, match="on the device that will run the kernels"):
        anyattn.warm_up(q, q, q)


def _process(rank: int, folder: str) -> None:
    os.environ["LOCAL_RANK"] = str(rank % 2)  # two hosts of two processes
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4)
    backend: Any = cases.BACKENDS.get("reference")
    real = backend.forward

    def forward(call: Any) -> Any:
        (Path(folder) / f"begun-{rank}").touch()
        others = [Path(folder) / f"done-{r}" for r in (0, 2)]
        (Path(folder) / f"saw-{rank}").write_text(str(all(f.exists() for f in others)))
        result = real(call)
        (Path(folder) / f"done-{rank}").touch()
        return result

    backend.forward = forward
    q = torch.randn(1, 4, 2, 8)
    anyattn.warm_up(q, q, q, backend="reference")
    dist.destroy_process_group()


def test_one_process_per_host_goes_first(tmp_path: Path) -> None:
    context_pool.server()
    mp.start_processes(_process, (str(tmp_path),), nprocs=4, start_method="forkserver")
    assert [(tmp_path / f"saw-{rank}").read_text() for rank in (1, 3)] == ["True", "True"]
    assert all((tmp_path / f"begun-{rank}").exists() for rank in range(4))
