"""Each kernel through its own entry points: what anyattn is compared with.

A class per kernel: made for a batch, it has ``forward()``, which returns (out, lse, ...) as the kernel does, and
``backward(result, dout)``, which returns (dq, dk, dv, ...). Both get and allocate what anyattn's own call of that
kernel does.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import anyattn
from anyattn import Packing
from measure import reasons


@dataclass(frozen=True)
class Shape:
    """Sequences, heads (q/kv) and head dim of a batch, with causal or full attention."""

    lengths: tuple[int, ...]
    heads: tuple[int, int] = (16, 16)
    dim: int = 128
    causal: bool = True

    @property
    def label(self) -> str:
        """For people: "4 x 4k, heads 16/16, dim 128, causal"."""
        size = self.lengths[0]
        each = f"{size // 1024}k" if size % 1024 == 0 else str(size)
        mask = "causal" if self.causal else "full"
        return f"{len(self.lengths)} x {each}, heads {self.heads[0]}/{self.heads[1]}, dim {self.dim}, {mask}"

    @property
    def forward_flops(self) -> int:
        """Of the two products in forward."""
        return sum(4 * n * n for n in self.lengths) * self.heads[0] * self.dim // (2 if self.causal else 1)


class Batch:
    """The tensors of a shape, in bfloat16: (B, S, H, D), or packed (T, H, D), as leaves."""

    def __init__(self, shape: Shape, packed: bool, *, grad: bool = True, device: str = "cuda") -> None:
        rows = (sum(shape.lengths),) if packed else (len(shape.lengths), shape.lengths[0])
        heads, kv_heads = shape.heads
        self.shape, self.packed = shape, packed
        self.q, self.k, self.v = (
            torch.randn(*rows, h, shape.dim, device=device, dtype=torch.bfloat16, requires_grad=grad)
            for h in (heads, kv_heads, kv_heads)
        )
        self.dout = torch.randn_like(self.q, requires_grad=False)
        self.packing = Packing.from_lengths(list(shape.lengths), device=device) if packed else None

    def attention(self, backend: str) -> Tensor:
        """The call of anyattn."""
        out: Tensor = anyattn.attention(
            self.q, self.k, self.v, causal=self.shape.causal, packing=self.packing, backend=backend
        )
        return out

    def refused(self, backend: str) -> str:
        """Why that backend does not take this batch, or nothing if it does."""
        found = anyattn.explain(self.q, self.k, self.v, causal=self.shape.causal, packing=self.packing, backend=backend)
        return "" if found.forward is not None else reasons(found)


class Raw:
    """What the kernels have in common."""

    heads_first = False
    """The kernel's tensors are (B, H, S, D)."""
    differentiates = False
    """forward keeps a graph of torch's, which backward goes through, once."""

    grouped = True
    """The kernel takes fewer kv heads than heads."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.q, self.k, self.v = (x.detach() for x in (batch.q, batch.k, batch.v))
        if self.heads_first:
            self.q, self.k, self.v = (x.transpose(1, 2) for x in (self.q, self.k, self.v))
        self.causal = batch.shape.causal
        self.scale = batch.shape.dim**-0.5
        self.longest = max(batch.shape.lengths)
        self.cu = None if batch.packing is None else batch.packing.cu_seqlens
        self.lengths: dict[str, Any] = {}
        if self.cu is not None:
            self.lengths = {
                "cu_seqlens_q": self.cu, "cu_seqlens_k": self.cu, "max_seqlen_q": self.longest,
                "max_seqlen_k": self.longest,
            }  # fmt: skip

    def forward(self) -> Sequence[Any]:
        """(out, lse, ...), as the kernel returns them."""
        raise NotImplementedError

    def backward(self, result: Sequence[Any], dout: Tensor) -> Sequence[Any]:
        """(dq, dk, dv, ...) from what forward returned; dout is in the caller's layout."""
        raise NotImplementedError

    def public(self) -> Callable[[], Any] | None:
        """A call of the package's own function for packed batches, where that is another one."""
        return None

    def to_caller(self, x: Tensor) -> Tensor:
        """Out or dq, from the kernel's layout."""
        return x.transpose(1, 2) if self.heads_first else x


class Fa4(Raw):
    """flash-attn-4."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch)
        module: Any = importlib.import_module("flash_attn.cute.interface")
        self._forward, self._backward = module._flash_attn_fwd, module._flash_attn_bwd
        self._options = {
            "softmax_scale": self.scale, "causal": self.causal, "softcap": 0.0, "window_size_left": None,
            "window_size_right": None, **self.lengths,
        }  # fmt: skip

    def forward(self) -> Sequence[Any]:
        result: Sequence[Any] = self._forward(q=self.q, k=self.k, v=self.v, return_lse=True, **self._options)
        return result

    def backward(self, result: Sequence[Any], dout: Tensor) -> Sequence[Any]:
        found: Sequence[Any] = self._backward(
            q=self.q, k=self.k, v=self.v, out=result[0], dout=dout, lse=result[1], deterministic=False, **self._options
        )
        return found

    def public(self) -> Callable[[], Any]:
        call: Any = importlib.import_module("flash_attn.cute").flash_attn_varlen_func
        options = {**self.lengths, "softmax_scale": self.scale}
        return lambda: call(self.q, self.k, self.v, causal=self.causal, **options)


class Fa3(Raw):
    """flash-attn-3 as torch ops, or fa3-fwd, which has no backward."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch)
        whole = _installed("flash-attn-3")
        self._module: Any = importlib.import_module("flash_attn_interface" if whole else "fa3_fwd_interface")
        ops = torch.ops.flash_attn_3 if whole else torch.ops.fa3_fwd
        if not hasattr(ops, "fwd"):
            raise LookupError("this beta of flash-attn-3 has no torch ops to compare with")
        self._forward, self._backward = ops.fwd.default, ops.bwd.default
        self._options = {"softmax_scale": self.scale, "is_causal": self.causal, **self.lengths}

    def forward(self) -> Sequence[Any]:
        result: Sequence[Any] = self._forward(self.q, self.k, self.v, num_splits=1, **self._options)
        return result

    def backward(self, result: Sequence[Any], dout: Tensor) -> Sequence[Any]:
        found = [torch.empty_like(x) for x in (self.q, self.k, self.v)]
        self._backward(dout, self.q, self.k, self.v, result[0], result[1], *found, **self._options)
        return found

    def public(self) -> Callable[[], Any]:
        call: Any = self._module.flash_attn_varlen_func
        options = {**self.lengths, "softmax_scale": self.scale}
        return lambda: call(self.q, self.k, self.v, causal=self.causal, **options)


class Fa2(Raw):
    """flash-attn, of any version: the raw Python functions, without the dispatch of the custom ops they became."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch)
        module: Any = importlib.import_module("flash_attn.flash_attn_interface")
        kind = "varlen_" if batch.packed else ""
        self._forward, self._forward_options = self._bound(getattr(module, f"_flash_attn_{kind}forward"))
        self._backward, self._backward_options = self._bound(getattr(module, f"_flash_attn_{kind}backward"))

    def _bound(self, function: Any) -> tuple[Any, dict[str, Any]]:
        """The function, and what it takes of all that any version does."""
        run = getattr(function, "_init_fn", function)
        known = {
            "dropout_p": 0.0, "softmax_scale": self.scale, "causal": self.causal, "window_size": (-1, -1),
            "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None,
            "return_softmax": False, "block_table": None, "deterministic": False, "rng_state": None, **self.lengths,
        }  # fmt: skip
        taken = inspect.signature(run).parameters
        return run, {name: value for name, value in known.items() if name in taken}

    def forward(self) -> Sequence[Any]:
        got = self._forward(q=self.q, k=self.k, v=self.v, **self._forward_options)
        return got[0], got[-3]  # (out, lse, S_dmask, rng_state), until 2.6 with four more after out

    def backward(self, result: Sequence[Any], dout: Tensor) -> Sequence[Any]:
        found = dict(zip(("dq", "dk", "dv"), (torch.empty_like(x) for x in (self.q, self.k, self.v)), strict=True))
        self._backward(
            dout=dout, q=self.q, k=self.k, v=self.v, out=result[0], softmax_lse=result[1], **found,
            **self._backward_options,
        )  # fmt: skip
        return list(found.values())


class AtenFlash(Raw):
    """torch's FlashAttention 2, dense and packed."""

    def forward(self) -> Sequence[Any]:
        result: Sequence[Any] = torch.ops.aten._flash_attention_forward.default(
            self.q, self.k, self.v, self.cu, self.cu, self.longest, self.longest, 0.0, self.causal, False,
            scale=self.scale,
        )  # fmt: skip
        return result

    def backward(self, result: Sequence[Any], dout: Tensor) -> Sequence[Any]:
        found: Sequence[Any] = torch.ops.aten._flash_attention_backward.default(
            dout, self.q, self.k, self.v, result[0], result[1], self.cu, self.cu, self.longest, self.longest, 0.0,
            self.causal, result[2], result[3], scale=self.scale,
        )  # fmt: skip
        return found


class AtenCudnn(Raw):
    """torch's cuDNN op. Equal lengths only: its causal is aligned at the start."""

    heads_first = True

    def forward(self) -> Sequence[Any]:
        result: Sequence[Any] = torch.ops.aten._scaled_dot_product_cudnn_attention.default(
            self.q, self.k, self.v, None, True, 0.0, self.causal, False, scale=self.scale
        )
        return result

    def backward(self, result: Sequence[Any], dout: Tensor) -> Sequence[Any]:
        found: Sequence[Any] = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default(
            dout.transpose(1, 2), self.q, self.k, self.v, result[0], result[1], result[6], result[7], None, None, None,
            self.longest, self.longest, 0.0, self.causal, scale=self.scale,
        )  # fmt: skip
        return found


class AtenEfficient(Raw):
    """torch's memory-efficient op."""

    grouped = False

    def forward(self) -> Sequence[Any]:
        result: Sequence[Any] = torch.ops.aten._efficient_attention_forward.default(
            self.q, self.k, self.v, None, None, None, self.longest, self.longest, 0.0, int(self.causal), True,
            scale=self.scale,
        )  # fmt: skip
        return result

    def backward(self, result: Sequence[Any], dout: Tensor) -> Sequence[Any]:
        found: Sequence[Any] = torch.ops.aten._efficient_attention_backward.default(
            dout, self.q, self.k, self.v, None, result[0], None, None, self.longest, self.longest, result[1], 0.0,
            result[2], result[3], int(self.causal), False, scale=self.scale,
        )  # fmt: skip
        return found


class CudnnFrontend(Raw):
    """nvidia-cudnn-frontend: the very graphs that anyattn built for the batch, executed without it."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch)
        self._names: Any = importlib.import_module("anyattn.backends._cudnn_graph")
        runs: list[tuple[Any, dict[int, Tensor]]] = []
        run = self._names.Graph.run

        def recording(graph: Any, tensors: dict[int, Tensor], device: torch.device) -> None:
            runs.append((graph, dict(tensors)))
            run(graph, tensors, device)

        leaves = [x.detach().requires_grad_() for x in (batch.q, batch.k, batch.v)]
        with mock.patch.object(self._names.Graph, "run", recording), torch.enable_grad():
            out = anyattn.attention(*leaves, causal=self.causal, packing=batch.packing, backend="cudnn")
            torch.autograd.grad(out, leaves, batch.dout)
        self._forward, self._backward = runs
        self._handle = self._names.cudnn.create_handle()

    def _execute(self, graph: Any, tensors: dict[int, Tensor]) -> None:
        workspace = torch.empty(graph._size, dtype=torch.uint8, device=self.q.device)
        self._names.cudnn.set_stream(handle=self._handle, stream=self._names.current_stream(self.q.device))
        graph._graph.execute(tensors, workspace, handle=self._handle)

    def _fresh(self, tensors: dict[int, Tensor], *uids: int) -> dict[int, Tensor]:
        """The tensors, with new memory for the results."""
        return {**tensors, **{uid: torch.empty_like(tensors[uid]) for uid in uids}}

    def forward(self) -> Sequence[Any]:
        graph, recorded = self._forward
        tensors = self._fresh(recorded, self._names.OUT, self._names.STATS)
        self._execute(graph, tensors)
        return tensors[self._names.OUT], tensors[self._names.STATS]

    def backward(self, result: Sequence[Any], dout: Tensor) -> Sequence[Any]:
        names, (graph, recorded) = self._names, self._backward
        tensors = self._fresh(recorded, names.DQ, names.DK, names.DV)
        out, stats = result
        if stats.shape != recorded[names.STATS].shape:
            stats = stats.transpose(-1, -2).contiguous()
        tensors.update({names.OUT: out, names.STATS: stats, names.DOUT: dout})
        self._execute(graph, tensors)
        return tensors[names.DQ], tensors[names.DK], tensors[names.DV]


class Flex(Raw):
    """torch's flex_attention, compiled for any lengths, with a block mask made beforehand."""

    heads_first = True
    differentiates = True

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch)
        from torch.nn.attention import flex_attention as flex

        torch._dynamo.config.recompile_limit = 64  # a compilation for each mask and number of heads
        if batch.packed:
            self.q, self.k, self.v = (x.detach()[None].transpose(1, 2) for x in (batch.q, batch.k, batch.v))
        self.q, self.k, self.v = (x.detach().requires_grad_() for x in (self.q, self.k, self.v))
        rows, mask = self.q.shape[2], self._mask()
        device = self.q.device.type
        self._block_mask = None if mask is None else flex.create_block_mask(mask, None, None, rows, rows, device=device)
        self._call: Any = torch.compile(flex.flex_attention, dynamic=device == "cuda", fullgraph=True)
        triton = "BACKEND" in flex.FlexKernelOptions.__annotations__
        self._options: Any = None
        if device == "cuda":
            self._options = {"BACKEND": "TRITON"} if triton else {"FORCE_USE_FLEX_ATTENTION": True}

    def _mask(self) -> Any:
        causal = self.causal
        if not self.batch.packed:
            return (lambda b, h, i, j: i >= j) if causal else None
        lengths = torch.tensor(self.batch.shape.lengths)
        document = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(self.q.device)
        if causal:
            return lambda b, h, i, j: (document[i] == document[j]) & (i >= j)
        return lambda b, h, i, j: document[i] == document[j]

    def forward(self) -> Sequence[Any]:
        q, k, v = self.q, self.k, self.v
        out = self._call(
            q, k, v, block_mask=self._block_mask, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1],
            kernel_options=self._options,
        )  # fmt: skip
        return (out,)

    def backward(self, result: Sequence[Any], dout: Tensor) -> Sequence[Any]:
        dout = (dout[None] if self.batch.packed else dout).transpose(1, 2)
        return torch.autograd.grad(result[0], (self.q, self.k, self.v), dout)

    def to_caller(self, x: Tensor) -> Tensor:
        rows = x.transpose(1, 2)
        return rows[0] if self.batch.packed else rows


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


class Bare(torch.autograd.Function):
    """The least that calling raw entry points from autograd takes."""

    @staticmethod
    def forward(ctx: Any, raw: Raw, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse, *others = raw.forward()
        ctx.raw, ctx.others = raw, others
        ctx.save_for_backward(q, k, v, out, lse)
        return raw.to_caller(out)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        _, _, _, out, lse = ctx.saved_tensors
        dq, dk, dv, *_ = ctx.raw.backward((out, lse, *ctx.others), dout)
        return None, ctx.raw.to_caller(dq), ctx.raw.to_caller(dk), ctx.raw.to_caller(dv)


#: By the name that ``backend=`` takes: the class, and whether it takes dense and packed batches.
KERNELS: dict[str, tuple[type[Raw], tuple[bool, ...]]] = {
    "fa4": (Fa4, (False, True)),
    "fa3": (Fa3, (False, True)),
    "fa2": (Fa2, (False, True)),
    "cudnn": (CudnnFrontend, (False, True)),
    "varlen": (AtenFlash, (True,)),
    "torch:flash": (AtenFlash, (False,)),
    "torch:cudnn": (AtenCudnn, (False,)),
    "torch:efficient": (AtenEfficient, (False,)),
    "flex": (Flex, (False, True)),
}
