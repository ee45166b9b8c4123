"""What anyattn adds to a kernel on a GPU: host time per call, throughput, padding, memory; against the raw kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import anyattn
from anyattn import Packing
from measure import Row, device_ms, host_us, peak_mib

Call = Callable[[], Any]
SHAPES = {"16 x 1k": [1024] * 16, "4 x 4k": [4096] * 4, "1 x 16k": [16384]}
DIM = 128


def _qkv(rows: int, heads: int, kv_heads: int, grad: bool = False) -> list[torch.Tensor]:
    return [
        torch.randn(rows, h, DIM, device="cuda", dtype=torch.bfloat16, requires_grad=grad)
        for h in (heads, kv_heads, kv_heads)
    ]


class Raw:
    """A kernel's own entry points on a compact packed batch, causal: what anyattn is compared with."""

    def __init__(self, name: str, lengths: list[int], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.name, self.q, self.k, self.v = name, q, k, v
        self.cu = Packing.from_lengths(lengths, device="cuda").cu_seqlens
        self.longest = max(lengths)
        self.scale = DIM**-0.5

    def forward(self) -> Any:
        """(out, lse, ...) as the kernel returns it."""
        if self.name == "fa4":
            from flash_attn.cute.interface import _flash_attn_fwd

            return _flash_attn_fwd(
                self.q, self.k, self.v, cu_seqlens_q=self.cu, cu_seqlens_k=self.cu, max_seqlen_q=self.longest,
                max_seqlen_k=self.longest, softmax_scale=self.scale, causal=True, return_lse=True,
            )  # fmt: skip
        return torch.ops.aten._flash_attention_forward(
            self.q, self.k, self.v, self.cu, self.cu, self.longest, self.longest, 0.0, True, False, scale=self.scale
        )

    def backward(self, result: Any, dout: torch.Tensor) -> Any:
        """(dq, dk, dv, ...) as the kernel returns it."""
        out, lse = result[0], result[1]
        if self.name == "fa4":
            from flash_attn.cute.interface import _flash_attn_bwd

            return _flash_attn_bwd(
                self.q, self.k, self.v, out, dout, lse, softmax_scale=self.scale, causal=True, cu_seqlens_q=self.cu,
                cu_seqlens_k=self.cu, max_seqlen_q=self.longest, max_seqlen_k=self.longest,
            )  # fmt: skip
        return torch.ops.aten._flash_attention_backward(
            dout, self.q, self.k, self.v, out, lse, self.cu, self.cu, self.longest, self.longest, 0.0, True, result[2],
            result[3], scale=self.scale,
        )  # fmt: skip


def call_cost(backends: list[str]) -> list[Row]:
    """Host microseconds per call on a tiny packed problem, forward, no grad."""
    lengths = [16, 16]
    q, k, v = _qkv(32, 4, 4)
    packing = Packing.from_lengths(lengths, device="cuda")
    padded = Packing.from_lengths(lengths, pad_to_multiple_of=24, device="cuda")
    wide = _qkv(48, 4, 4)
    rows = []
    with torch.no_grad():
        for name in backends:
            raw = Raw(name, lengths, q, k, v)
            thunks: list[Call] = [
                lambda name=name: anyattn.attention(q, k, v, causal=True, packing=packing, backend=name),
                raw.forward,
                lambda name=name: anyattn.attention(*wide, causal=True, packing=padded, backend=name),
            ]
            if name == "fa4":
                thunks.append(_public_fa4(raw))
            ours, entry, with_gaps, *public = host_us(*thunks)
            rows.append(Row(f"host time, tiny packed call, {name}", ours, entry, "us", "its raw entry point"))
            rows.append(
                Row(f"host time, tiny padded call, {name}", with_gaps, entry, "us", "its raw entry point, compact")
            )
            if public:
                target = "<= 0.9"
                rows.append(
                    Row(f"host time, tiny packed call, {name}", ours, public[0], "us", "its public function", target)
                )
    return rows


def _public_fa4(raw: Raw) -> Call:
    from flash_attn.cute import flash_attn_varlen_func

    return lambda: flash_attn_varlen_func(
        raw.q, raw.k, raw.v, cu_seqlens_q=raw.cu, cu_seqlens_k=raw.cu, max_seqlen_q=raw.longest,
        max_seqlen_k=raw.longest, softmax_scale=raw.scale, causal=True,
    )  # fmt: skip


def throughput(backends: list[str], heads: tuple[int, int] = (16, 16)) -> list[Row]:
    """16k tokens, causal, bf16: anyattn against the raw kernel on the same tensors, forward and backward.

    Rows are speeds: ours / theirs is the raw kernel's time over anyattn's.
    """
    rows = []
    for name in backends:
        for label, lengths in SHAPES.items():
            q, k, v = _qkv(sum(lengths), *heads, grad=True)
            dout = torch.randn_like(q)
            raw = Raw(name, lengths, q.detach(), k.detach(), v.detach())
            packing = Packing.from_lengths(lengths, device="cuda")
            out = anyattn.attention(q, k, v, causal=True, packing=packing, backend=name)
            result = raw.forward()
            times = device_ms(
                lambda: anyattn.attention(q, k, v, causal=True, packing=packing, backend=name),
                raw.forward,
                lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True),
                lambda: raw.backward(result, dout),
            )
            flops = 2 * sum(n * n for n in lengths) * heads[0] * DIM
            for way, ours, theirs, factor in (("forward", *times[:2], 1.0), ("backward", *times[2:], 2.5)):
                speeds = [round(flops * factor / t / 1e9, 1) for t in (ours, theirs)]
                what = f"{way}, {label}, heads {heads[0]}/{heads[1]}, {name}"
                rows.append(Row(what, *speeds, "TFLOP/s", "the raw kernel", ">= 0.99"))
    return rows


def padding(backends: list[str], heads: tuple[int, int] = (16, 16)) -> list[Row]:
    """Gaps of 10 and 50 percent of the rows, against the raw kernel on the compact batch; then 50 against 10.

    A third row adds to the raw kernel what no kernel can save: writing as many bytes of zeros as the gaps have.
    """
    rows = []
    for name in backends:
        for label, lengths in SHAPES.items():
            compact = _qkv(sum(lengths), *heads)
            raw = Raw(name, lengths, *compact)
            dout = torch.randn_like(compact[0])
            result = raw.forward()
            gaps = [_qkv(round(sum(lengths) / (1 - share)) - sum(lengths), *heads) for share in (0.1, 0.5)]
            thunks: list[Call] = [raw.forward, lambda: raw.backward(result, dout)]
            for share in (0.1, 0.5):
                thunks += _padded_calls(name, lengths, heads, share)
            for q, k, v in gaps:
                thunks += [lambda q=q: q.zero_(), lambda q=q, k=k, v=v: (q.zero_(), k.zero_(), v.zero_())]
            base_f, base_b, f10, b10, f50, b50, *zeros = device_ms(*thunks)
            forward, backward = (base_f, f10, f50, *zeros[::2]), (base_b, b10, b50, *zeros[1::2])
            for way, (base, low, high, *writing) in (("forward", forward), ("backward", backward)):
                for percent, taken, zero in ((10, low, writing[0]), (50, high, writing[1])):
                    what = f"{way}, {label}, {percent}% gaps, {name}"
                    ours, theirs = round(1 / taken, 4), round(1 / base, 4)
                    rows.append(Row(what, ours, theirs, "1/ms", "the raw kernel, compact", ">= 0.97"))
                    floor = round(1 / (base + zero), 4)
                    rows.append(Row(what, ours, floor, "1/ms", "the raw kernel, compact, and writing the zeros"))
                rows.append(Row(f"{way}, {label}, 50% gaps, {name}", high, low, "ms", "10% gaps", "<= 1.03"))
    return rows


def _padded_calls(name: str, lengths: list[int], heads: tuple[int, int], share: float) -> list[Call]:
    """Forward and backward of a batch in which this share of the rows is padding after each sequence."""
    room = [round(n / (1 - share)) for n in lengths]
    starts = torch.tensor([0, *room], dtype=torch.int32).cumsum(0, dtype=torch.int32).cuda()
    cu = Packing.from_lengths(lengths, device="cuda").cu_seqlens
    packing = Packing(cu, cu_seqlens_padded=starts)
    q, k, v = _qkv(sum(room), *heads, grad=True)
    out = anyattn.attention(q, k, v, causal=True, packing=packing, backend=name)
    dout = torch.randn_like(q)
    return [
        lambda: anyattn.attention(q, k, v, causal=True, packing=packing, backend=name),
        lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True),
    ]


def memory(backends: list[str]) -> list[Row]:
    """Peak memory of forward and backward against the raw calls, which return the same tensors."""
    rows = []
    lengths = [4096] * 4
    for name in backends:
        q, k, v = _qkv(sum(lengths), 16, 16, grad=True)
        dout = torch.randn_like(q)
        raw = Raw(name, lengths, q.detach(), k.detach(), v.detach())
        packing = Packing.from_lengths(lengths, device="cuda")

        def ours(name: str = name, q: Any = q, k: Any = k, v: Any = v, packing: Any = packing, dout: Any = dout) -> Any:
            out = anyattn.attention(q, k, v, causal=True, packing=packing, backend=name)
            return out, torch.autograd.grad(out, (q, k, v), dout)

        def theirs(raw: Raw = raw, dout: Any = dout) -> Any:
            result = raw.forward()
            return result, raw.backward(result, dout)

        rows.append(Row(f"peak memory, forward and backward, 4 x 4k, {name}", peak_mib(ours), peak_mib(theirs), "MiB",
                        "the raw calls", "<= 1.01"))  # fmt: skip
    return rows


def rows() -> list[Row]:
    """All GPU figures, for the packed backends that run here."""
    status = anyattn.backends()
    here = [name for name in ("fa4", "varlen") if name in status and status[name].runs_here]
    found = call_cost(here)
    for heads in ((16, 16), (32, 8)):
        found += throughput(here, heads)
    return found + padding(here) + memory(here)
