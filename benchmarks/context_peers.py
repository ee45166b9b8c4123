"""Other packages' context parallelism, as calls on this rank's tensors: ring-flash-attn and torch's own.

Each peer is made for a problem and has ``forward``, ``infer`` and ``both``, as :class:`context_problems.Call` has, and
``rows``, the places of this rank's tokens in the whole batch. Nothing of theirs is copied here.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import context_kernels
from context_problems import Call, Problem, alone
from context_timing import Seat


class Peer:
    """This rank's tensors, (rows, heads, dim) or with a batch of 1 first, and a call on them."""

    rows: Tensor
    leaves: tuple[Tensor, Tensor, Tensor]
    dout: Tensor

    def _fill(self, problem: Problem, shape: Sequence[int], device: torch.device) -> None:
        call = Call(problem, shape, device, {})
        self.leaves, self.dout = call.leaves, call.dout

    def forward(self) -> Tensor:
        raise NotImplementedError

    def infer(self) -> Tensor:
        """Forward, nothing kept for backward."""
        with torch.no_grad():
            return self.forward()

    def both(self) -> list[Tensor]:
        """Out and the gradients."""
        out = self.forward()
        return [out, *torch.autograd.grad(out, self.leaves, self.dout)]

    def by_rows(self, x: Tensor) -> Tensor:
        """(rows, heads, dim) of a tensor as this peer has it."""
        return x[0] if x.ndim == 4 else x


# --- ring-flash-attn ---


@cache
def ring_flash_attn(kernel: str) -> Any:
    """The package, once per kernel (it compiles as it is used), its kernel calls served by that kernel.

    Its adapter for transformers is left out: it imports names that transformers 5 no longer has.
    """
    for name in [name for name in sys.modules if name.partition(".")[0] == "ring_flash_attn"]:
        del sys.modules[name]
    context_kernels.serve(kernel)
    adapters: Any = ModuleType("ring_flash_attn.adapters")
    adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = None
    sys.modules[adapters.__name__] = adapters
    return importlib.import_module("ring_flash_attn")


class Zigzag(Peer):
    """zigzag_ring_flash_attn_func, and its varlen form: lengths divide by twice the ranks."""

    def __init__(self, package: Any, problem: Problem, seat: Seat) -> None:
        self._package, ranks = package, seat.size
        starts = torch.tensor([0, *problem.lengths]).cumsum(0)
        chunks = [n // (2 * ranks) for n in problem.lengths]
        if any(n % (2 * ranks) for n in problem.lengths):
            raise LookupError(f"refused: a length does not divide by 2 * {ranks}")
        self.rows = torch.cat([
            torch.arange(size) + start + size * chunk
            for start, size in zip(starts.tolist()[:-1], chunks, strict=True)
            for chunk in (seat.rank, 2 * ranks - 1 - seat.rank)
        ]).to(seat.device)  # fmt: skip
        self._packed: tuple[Tensor, int] | None = None
        if problem.packed:
            self._packed = (starts // ranks).to(seat.device, torch.int32), max(problem.lengths) // ranks
        count = len(self.rows)
        self._fill(problem, (count,) if problem.packed else (1, count), seat.device)

    def forward(self) -> Tensor:
        out: Tensor
        if self._packed is None:
            out = self._package.zigzag_ring_flash_attn_func(*self.leaves, causal=True)
        else:
            out = self._package.zigzag_ring_flash_attn_varlen_func(*self.leaves, *self._packed, causal=True)
        return out


class Llama3(Peer):
    """llama3_flash_attn_varlen_func: contiguous parts, keys gathered a head at a time."""

    def __init__(self, package: Any, problem: Problem, seat: Seat) -> None:
        self._function = package.llama3_flash_attn_varlen_func
        cu = torch.tensor([0, *problem.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(seat.device)
        *self._lengths, self._slice = package.llama3_flash_attn_prepare_cu_seqlens(cu, True, seat.rank, seat.size)
        count = sum(problem.lengths) // seat.size
        self.rows = torch.arange(count, device=seat.device) + seat.rank * count
        self._window = (-1, -1) if problem.window is None else problem.window
        self._fill(problem, (count,), seat.device)

    def forward(self) -> Tensor:
        out: Tensor = self._function(
            *self.leaves, *self._lengths, 1, self._slice, causal=True, window_size=self._window
        )
        return out


# --- torch ---

SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


class Sdpa(Peer):
    """scaled_dot_product_attention of (1, heads, rows, dim), in :func:`torch_context_parallel` or alone."""

    def __init__(self, problem: Problem, rows: Tensor, kernel: str, repeat_keys: bool, device: torch.device) -> None:
        heads, kv_heads = problem.heads
        self.rows, self._kernel, self._repeat = rows, SDPA[kernel], heads // kv_heads if repeat_keys else 1
        self._grouped = heads != kv_heads and not repeat_keys
        self._fill(problem, (1, len(rows)), device)
        self.leaves = tuple(x.detach().transpose(1, 2).contiguous().requires_grad_() for x in self.leaves)  # type: ignore[assignment]
        self.dout = self.dout.transpose(1, 2).contiguous()

    def forward(self) -> Tensor:
        q, k, v = self.leaves
        if self._repeat > 1:
            k, v = (x.repeat_interleave(self._repeat, 1) for x in (k, v))
        with sdpa_kernel(self._kernel):
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self._grouped)

    def by_rows(self, x: Tensor) -> Tensor:
        return x[0].transpose(0, 1)


@contextlib.contextmanager
def torch_context_parallel(length: int, mesh: Any, rotate: str, device: torch.device) -> Iterator[Tensor]:
    """SDPA is torch's context-parallel one in here; gives the places of this rank's tokens."""
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    set_rotate_method(rotate)
    rows = torch.arange(length, device=device)[None].contiguous()
    with context_parallel(mesh, buffers=[rows], buffer_seq_dims=[1]):
        yield rows[0].clone()


# --- all of them ---


def compare(peer: Peer, problem: Problem, backend: str, device: torch.device) -> None:
    """This rank's out and gradients equal anyattn's of the whole problem on this device alone.

    Raises:
        AssertionError: they do not: the peer is called wrongly, or is wrong.
    """
    torch.manual_seed(1)
    whole = alone(problem, backend, device)
    with torch.no_grad():
        for mine, all_rows in zip((*peer.leaves, peer.dout), (*whole.leaves, whole.dout), strict=True):
            by_rows = all_rows.flatten(0, -3)
            peer.by_rows(mine).copy_(by_rows[peer.rows])
    for name, got, want in zip(("out", "dq", "dk", "dv"), peer.both(), whole.both(), strict=True):
        wanted = want.flatten(0, -3)[peer.rows].float()
        error = float((peer.by_rows(got).float() - wanted).abs().max() / wanted.abs().max())
        if not error < 2e-2:
            raise AssertionError(f"{name} differs from one GPU's by {error:.1e} of its largest value")
