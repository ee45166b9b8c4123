"""Dropout's random numbers, where the caller drew the seed: kernels draw from torch's CUDA generator by themselves."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from anyattn._call import Call
from anyattn._errors import Unsupported

_lock = threading.Lock()


@contextmanager
def seeded(call: Call) -> Iterator[None]:
    """Make torch's generator of the call's device start from ``call.seed``, and put it back afterwards.

    Without a seed, nothing happens: the kernel draws on. Only the host is involved.

    Raises:
        Unsupported: while a CUDA graph is captured, which would replay one seed for ever.
    """
    if call.seed is None:
        yield
        return
    if call.q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise Unsupported(
            "dropout in a region of torch.compile cannot be captured in a CUDA graph: its seed is drawn on the host; "
            "capture the region without torch.compile, or leave out dropout"
        )
    index = call.q.device.index
    with _lock:
        generator = torch.cuda.default_generators[torch.cuda.current_device() if index is None else index]
        state = generator.get_state()
        generator.manual_seed(philox_seed(call.seed))
        try:
            yield
        finally:
            generator.set_state(state)


def philox_seed(seed: torch.Tensor) -> int:
    """The generator's seed for a call's seed (int64 (2,), on the CPU); its offset is 0."""
    first, second = seed.tolist()
    return int(first ^ second) & 0x7FFFFFFFFFFFFFFF
