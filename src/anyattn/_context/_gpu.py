"""What a GPU and its links do per second: the figures behind estimates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

Rates = tuple[tuple[float, float], ...]
"""(bytes of a message, bytes per second received), by increasing size."""

MIB = 2.0**20


@dataclass(frozen=True, slots=True)
class Gpu:
    """Figures of one GPU of a host, and of the links between such GPUs."""

    name: str
    source: str
    """Where the figures are from."""
    forward: float
    """FLOP/s of attention on one whole long document, in 16-bit."""
    backward: float
    """The same of its backward alone, at 2.5 times forward's FLOPs."""
    gathered: float
    """Share of that speed that is left for pieces of documents against gathered keys, all work around included."""
    circled: float
    """The same for pieces against one rank's keys after another, merging left out."""
    memory: float
    """Bytes per second of device memory."""
    ring: Rates
    all_gather: Rates
    all_to_all: Rates
    contention: float
    """Seconds that computing loses per second of communication that runs beside it."""
    call: float
    """Seconds that the host takes for one kernel call, with all around it."""
    exchange: float
    """Seconds before the first byte of an exchange arrives."""

    def seconds(self, rates: Rates, moved: float, messages: int = 1) -> float:
        """Time to receive so many bytes in so many exchanges of equal size."""
        if not moved:
            return 0.0
        return moved / _rate(rates, moved / messages) + messages * self.exchange


def _rate(rates: Rates, size: float) -> float:
    """Interpolated by the logarithm of the size, and constant beyond both ends."""
    below, above = rates[0], rates[-1]
    for point in rates:
        if point[0] <= size:
            below = point
        elif point[0] < above[0]:
            above = point
    if size <= below[0] or size >= above[0]:
        return below[1] if size <= below[0] else above[1]
    share = math.log(size / below[0]) / math.log(above[0] / below[0])
    return below[1] + share * (above[1] - below[1])


def _scaled(rates: Rates, factor: float) -> Rates:
    return tuple((size, rate * factor) for size, rate in rates)


def _like_h200(name: str, compute: float, memory: float, links: float, source: str) -> Gpu:
    """H200's measured figures times ratios of the vendor's."""
    return replace(
        H200,
        name=name,
        source=f"H200 as measured, times the vendor's ratios: {source}",
        forward=H200.forward * compute,
        backward=H200.backward * compute,
        memory=memory,
        ring=_scaled(H200.ring, links),
        all_gather=_scaled(H200.all_gather, links),
        all_to_all=_scaled(H200.all_to_all, links),
    )


H200 = Gpu(
    name="h200",
    source=(
        "4 x H200, NVLink, 2026-11-20: FlashAttention 3 alone (causal, 32/8 heads, dim 128, 16k), NCCL in 16 and 128 "
        "MiB, a gather by hand (64k to 128k), Transformer Engine's ring; memory, seconds before a first byte: assumed"
    ),
    forward=663e12,
    backward=595e12,
    gathered=0.976,
    circled=0.93,
    memory=4.0e12,
    ring=((16 * MIB, 105e9), (128 * MIB, 160e9)),
    all_gather=((16 * MIB, 261e9), (128 * MIB, 315e9)),
    all_to_all=((16 * MIB, 168e9), (128 * MIB, 282e9)),
    contention=0.76,
    call=85e-6,
    exchange=20e-6,
)

GPUS: dict[str, Gpu] = {
    "h200": H200,
    "h100": _like_h200("h100", 1.0, 3.35e12 * 0.83, 1.0, "989 TFLOP/s, 3.35 TB/s, NVLink 900 GB/s, as H200 but memory"),
    "a100": _like_h200("a100", 312 / 989, 2.04e12 * 0.83, 600 / 900, "312 TFLOP/s, 2.04 TB/s, NVLink 600 GB/s"),
    "b200": _like_h200("b200", 2250 / 989, 8.0e12 * 0.83, 1800 / 900, "2250 TFLOP/s, 8 TB/s, NVLink 1800 GB/s"),
    "cpu": Gpu(
        name="cpu",
        source="orders of magnitude, not measured: one process per core, gloo over the loopback",
        forward=2e10,
        backward=2e10,
        gathered=1.0,
        circled=1.0,
        memory=5e9,
        ring=((MIB, 1e9),),
        all_gather=((MIB, 1e9),),
        all_to_all=((MIB, 1e9),),
        contention=1.0,
        call=50e-6,
        exchange=300e-6,
    ),
}


def default_gpu() -> Gpu:
    """What estimates are for where nothing is said: they decide the same on every rank, GPU or not."""
    return H200
