"""Threads that call at once, processes that fork, data loaders that import."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import anyattn
import cases
from anyattn import Packing
from cases import Target
from conftest import forget_prepared
from test_conformance import run


def test_threads_may_call_at_once(target: Target) -> None:
    """Forward and backward of different kinds from many threads, starting with nothing cached: each its own answer."""
    made = [c for c in cases.pairwise(target) if c.asks in ("grad", "lse_grad")][:8]
    if not made:
        pytest.skip(f"{target.name} has no backward")
    problems = [cases.build(c) for c in made]
    alone = [run(p) for p in problems]
    forget_prepared()
    barrier = threading.Barrier(len(problems))

    def work(number: int) -> list[tuple[Tensor, Tensor | None, dict[str, Tensor]]]:
        barrier.wait()
        return [run(problems[number]) for _ in range(5)]

    with ThreadPoolExecutor(len(problems)) as pool:
        results = list(pool.map(work, range(len(problems))))
    for (out, lse, grads), repeated in zip(alone, results, strict=True):
        for again in repeated:
            torch.testing.assert_close(again[0], out)
            if lse is not None:
                torch.testing.assert_close(again[1], lse)
            for name, grad in grads.items():
                torch.testing.assert_close(again[2][name], grad)


def test_threads_may_share_a_packing() -> None:
    """The packing of a 4-D batch is derived at first use: by whichever thread comes first."""
    x = torch.randn(2, 7, 2, 8)
    expected = anyattn.attention(x, x, x, packing=Packing.from_lengths([7, 3]))
    packing = Packing.from_lengths([7, 3])
    barrier = threading.Barrier(4)

    def work(_: int) -> Tensor:
        barrier.wait()
        return anyattn.attention(x, x, x, packing=packing)

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(out, expected) for out in pool.map(work, range(4)))


class Documents(torch.utils.data.Dataset):
    """Makes packings in the loader's workers, and calls attention there."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Packing, Tensor]:
        packing = Packing.from_lengths([index + 1, 2], pad_to_multiple_of=4)
        x = torch.arange(packing.rows * 16, dtype=torch.float32).reshape(packing.rows, 2, 8) / 100
        return packing, anyattn.attention(x, x, x, causal=True, packing=packing)


def _same(batch: list[tuple[Packing, Tensor]]) -> tuple[Packing, Tensor]:
    return batch[0]


def test_a_forked_data_loader_makes_packings() -> None:
    """Packings travel from its workers, and mean the same here."""
    loader = torch.utils.data.DataLoader(
        Documents(), num_workers=1, multiprocessing_context="fork", collate_fn=_same, timeout=60
    )
    for index, (packing, out) in enumerate(loader):
        assert packing.lengths.tolist() == [index + 1, 2]
        expected = Documents()[index][1]
        assert torch.equal(out, expected)


def test_a_forked_process_calls_after_its_parent_has() -> None:
    """torch's CPU threads do not survive a fork with more than one thread, so one is used, as loaders do."""
    code = """
        import multiprocessing, torch, anyattn
        torch.set_num_threads(1)
        x = torch.ones(1, 4, 2, 8, requires_grad=True)
        anyattn.attention(x, x, x, causal=True)

        def child():
            out = anyattn.attention(x, x, x, causal=True)
            assert torch.equal(out, torch.ones_like(out))

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(60)
        assert process.exitcode == 0, process.exitcode
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)
