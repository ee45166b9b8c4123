"""Launching Triton kernels again: what was compiled for a kind of arguments is kept, and launched without a look-up.

Triton's own launch binds and inspects every argument, in Python, each time. Imported only where Triton is.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

#: Triton compiles 64-bit arithmetic for integers from here on.
_WIDE = 1 << 31


class Launcher:
    """The launches of one Triton kernel."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[Hashable, Any] = {}

    def __call__(
        self, programs: int, pointers: Sequence[Tensor], kind: tuple[Hashable, ...], sizes: Sequence[int],
        arguments: Sequence[Any], *, num_warps: int, first: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """Launch on the current stream of the current device.

        Args:
            programs: the grid, of one dim.
            pointers: the tensors among the arguments.
            kind: all among the arguments that Triton compiles for: integers it specializes on, and constants.
            sizes: the integers that it does not specialize on.
            arguments: all, in the kernel's order, constants included.
            num_warps: warps of a program.
            first: called before a kind of arguments is launched for the first time.
        """
        key = (*(x.dtype for x in pointers), *kind, torch.cuda.current_device())
        plain = not any(x.data_ptr() & 15 for x in pointers) and max(sizes, default=0) < _WIDE
        compiled = self._compiled.get(key) if plain else None
        if compiled is not None:
            compiled[programs, 1, 1](*arguments)
            return
        if first is not None:
            first()
        compiled = self._kernel[programs,](*arguments, num_warps=num_warps)
        if plain and hasattr(compiled, "packed_metadata"):  # neither interpreted nor still compiling
            self._compiled[key] = compiled
