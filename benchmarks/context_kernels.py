"""The functions of flash-attn 2's Python interface that ring-flash-attn calls, served by another kernel.

flash-attn itself is not installed on the machines that are measured. So that package gets a module of this name which
hands its calls to FlashAttention 3's torch ops, or to torch's own FlashAttention 2. The figures are of its schedule and
its merging with these kernels; what the hand-over costs (torch's FlashAttention 2 returns gradients, which are copied
to where the caller wants them) is in them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

MODULE = "flash_attn.flash_attn_interface"


@dataclass(frozen=True)
class Asked:
    """A call, in terms that both kernels have."""

    scale: float
    causal: bool
    window: tuple[int, int]
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None
    longest_q: int = 0
    longest_k: int = 0


class Fa3:
    """FlashAttention 3's torch ops."""

    def __init__(self) -> None:
        importlib.import_module("flash_attn_interface")
        ops = torch.ops.flash_attn_3
        self._forward, self._backward = ops.fwd.default, ops.bwd.default

    def _options(self, asked: Asked) -> dict[str, Any]:
        options: dict[str, Any] = {"softmax_scale": asked.scale, "is_causal": asked.causal}
        options |= {"window_size_left": asked.window[0], "window_size_right": asked.window[1]}
        if asked.cu_q is not None:
            options |= {"cu_seqlens_q": asked.cu_q, "cu_seqlens_k": asked.cu_k}
            options |= {"max_seqlen_q": asked.longest_q, "max_seqlen_k": asked.longest_k}
        return options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self._forward(q, k, v, num_splits=1, **self._options(asked))
        return out, lse

    def backward(
        self, dout: Tensor, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor,
        into: tuple[Tensor, Tensor, Tensor], asked: Asked,
    ) -> None:  # fmt: skip
        self._backward(dout, *qkv, out, lse, *into, **self._options(asked))


class Aten:
    """torch's FlashAttention 2."""

    def __init__(self) -> None:
        self._random: tuple[Tensor, ...] = ()

    def _sizes(self, q: Tensor, k: Tensor, asked: Asked) -> tuple[Any, ...]:
        if asked.cu_q is None:
            return None, None, q.shape[1], k.shape[1]
        return asked.cu_q, asked.cu_k, asked.longest_q, asked.longest_k

    def _window(self, asked: Asked) -> dict[str, Any]:
        left, right = (None if n < 0 else n for n in asked.window)
        return {"scale": asked.scale, "window_size_left": left, "window_size_right": right}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward.default(
            q, k, v, *self._sizes(q, k, asked), 0.0, asked.causal, False, **self._window(asked)
        )
        return out, lse

    def backward(
        self, dout: Tensor, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor,
        into: tuple[Tensor, Tensor, Tensor], asked: Asked,
    ) -> None:  # fmt: skip
        if not self._random:  # the state of dropout, which there is none of
            self._random = tuple(torch.zeros(n, dtype=torch.uint64, device=dout.device) for n in ((2,), ()))
        found = torch.ops.aten._flash_attention_backward.default(
            dout, *qkv, out, lse.contiguous(), *self._sizes(qkv[0], qkv[1], asked), 0.0, asked.causal, *self._random,
            **self._window(asked),
        )  # fmt: skip
        for place, value in zip(into, found, strict=True):
            place.copy_(value)


KERNELS: dict[str, Callable[[], Any]] = {"fa3": Fa3, "varlen": Aten}


def serve(name: str) -> None:
    """Make ``flash_attn.flash_attn_interface`` a module whose functions call that kernel.

    Functions and parameters have flash-attn 2's names: its callers look parameters up by name.
    """
    kernel = KERNELS[name]()
    module = ModuleType(MODULE)

    def _flash_attn_forward(
        q: Any, k: Any, v: Any, dropout_p: Any, softmax_scale: Any, causal: Any, window_size_left: Any,
        window_size_right: Any, softcap: Any, alibi_slopes: Any, return_softmax: Any,
    ) -> Any:  # fmt: skip
        _refuse(dropout_p, softcap, alibi_slopes)
        asked = Asked(softmax_scale, causal, (window_size_left, window_size_right))
        return *kernel.forward(q, k, v, asked), None, None

    def _flash_attn_varlen_forward(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any,
        dropout_p: Any, softmax_scale: Any, causal: Any, window_size_left: Any, window_size_right: Any, softcap: Any,
        alibi_slopes: Any, return_softmax: Any,
    ) -> Any:  # fmt: skip
        _refuse(dropout_p, softcap, alibi_slopes)
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        asked = Asked(softmax_scale, causal, (window_size_left, window_size_right), *lengths)
        return *kernel.forward(q, k, v, asked), None, None

    def _flash_attn_backward(
        dout: Any, q: Any, k: Any, v: Any, out: Any, softmax_lse: Any, dq: Any, dk: Any, dv: Any, dropout_p: Any,
        softmax_scale: Any, causal: Any, window_size_left: Any, window_size_right: Any, softcap: Any,
        alibi_slopes: Any, deterministic: Any,
    ) -> None:  # fmt: skip
        _refuse(dropout_p, softcap, alibi_slopes, deterministic)
        asked = Asked(softmax_scale, causal, (window_size_left, window_size_right))
        kernel.backward(dout, (q, k, v), out, softmax_lse, (dq, dk, dv), asked)

    def _flash_attn_varlen_backward(
        dout: Any, q: Any, k: Any, v: Any, out: Any, softmax_lse: Any, dq: Any, dk: Any, dv: Any, cu_seqlens_q: Any,
        cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any, dropout_p: Any, softmax_scale: Any, causal: Any,
        window_size_left: Any, window_size_right: Any, softcap: Any, alibi_slopes: Any, deterministic: Any,
    ) -> None:  # fmt: skip
        _refuse(dropout_p, softcap, alibi_slopes, deterministic)
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        asked = Asked(softmax_scale, causal, (window_size_left, window_size_right), *lengths)
        kernel.backward(dout, (q, k, v), out, softmax_lse, (dq, dk, dv), asked)

    for function in (
        _flash_attn_forward, _flash_attn_varlen_forward, _flash_attn_backward, _flash_attn_varlen_backward,
    ):  # fmt: skip
        setattr(module, function.__name__, function)
    sys.modules[MODULE] = module
    try:
        importlib.import_module("flash_attn")
    except ImportError:
        parent = ModuleType("flash_attn")
        parent.__path__ = []
        sys.modules["flash_attn"] = parent


def _refuse(*unsupported: Any) -> None:
    if any(unsupported):
        raise NotImplementedError("no dropout, softcap, ALiBi or determinism is served here")
