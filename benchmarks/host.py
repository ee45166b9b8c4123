"""What a call costs on the host: choosing, and importing. Runs anywhere."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import torch

import anyattn
from measure import Report, Row, host_us

F = torch.nn.functional


def call_cost() -> list[Row]:
    """A tiny dense call on the CPU against F.scaled_dot_product_attention with the same transposes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    q, k, v = torch.randn(3, 1, 4, 2, 8).unbind()

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        ).transpose(1, 2)

    with torch.no_grad():
        ours, theirs = host_us(lambda: anyattn.attention(q, k, v, causal=True), sdpa, calls=2000)
    torch.set_num_threads(threads)
    return [Row("tiny call on the CPU, no grad", ours, theirs, "us", "F.scaled_dot_product_attention", "<= 2.0")]


def import_cost(rounds: int = 7) -> list[Row]:
    """Seconds of `import torch` with and without `import anyattn`, in fresh processes, interleaved."""
    taken: dict[str, list[float]] = {"import torch": [], "import torch, anyattn": []}
    for _ in range(rounds):
        for statement, times in taken.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", statement], check=True)
            times.append(time.perf_counter() - start)
    alone, both = (round(statistics.median(times), 3) for times in taken.values())
    # As the share that importing anyattn adds; 0.2 s is the bound.
    bound = round((alone + 0.2) / alone, 4)
    return [Row("import torch, anyattn", both, alone, "s", "import torch alone", f"<= {bound}")]


def measure_all(report: Report) -> None:
    """All host figures."""
    report.attempt("tiny call on the CPU", call_cost)
    report.attempt("import", import_cost)
