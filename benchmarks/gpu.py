"""What anyattn adds to each kernel on a GPU: host time, throughput, padding, memory; against its raw entry points."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import anyattn
import raw
from anyattn import Packing
from anyattn.backends import get as get_backend
from measure import Report, Row, Thunk, device_ms, host_us, peak_mib, synchronises
from raw import KERNELS, Batch, Raw, Shape

SHORT, MIDDLE, LONG = (1024,) * 16, (4096,) * 4, (16384,)
SHAPES = (
    Shape(SHORT),
    Shape(MIDDLE),
    Shape(LONG),
    Shape(MIDDLE, causal=False),
    Shape(LONG, heads=(32, 8)),
    Shape(MIDDLE, heads=(32, 8), dim=64),
)
TINY = Shape((16, 16), heads=(4, 4))
#: Host time with the package's own function for packed batches, at most: ours over theirs.
OF_PUBLIC = {"fa3": "<= 0.5", "fa4": "<= 0.8"}
#: Kernels that compile for seconds per kind of packed batch: these shapes only.
FEW_PACKED = {"flex": SHAPES[:3]}
#: Which kernels are measured with gaps between the sequences.
WITH_GAPS = ("fa4", "fa3", "fa2", "varlen", "cudnn")


def chosen(only: Sequence[str]) -> list[str]:
    """The kernels of these names, or of these backends; all where there is none."""
    return [name for name in KERNELS if not only or name in only or name.partition(":")[0] in only]


def measure_all(report: Report, names: Sequence[str]) -> None:
    """All GPU figures of the kernels that run here; the others are named."""
    status = anyattn.backends()
    for name in names:
        backend = name.partition(":")[0]
        if backend not in status or not status[backend].runs_here:
            why = status[backend].reason if backend in status else "anyattn has no such backend"
            report.leave_out(name, "absent", why.replace("not installed", "not installed here"))
            continue
        kernel, forms = KERNELS[name]
        packed = forms[-1]
        form = _form(packed)
        report.attempt(f"backward, {form}, {name}", partial(backward_refused, report, name, packed))
        report.attempt(f"host time, {form}, {name}", partial(host_time_of_forward, name, kernel, packed))
        report.attempt(f"host time with gradients, {form}, {name}", partial(host_time, name, kernel, packed))
        report.attempt(f"synchronisation, {form}, {name}", partial(synchronisation, name, kernel, packed))
        report.attempt(f"peak memory, {form}, {name}", partial(memory, name, kernel, packed))
        for form_packed in forms:
            shapes = FEW_PACKED.get(name, SHAPES) if form_packed else SHAPES
            for shape in shapes:
                what = f"throughput, {_form(form_packed)}, {shape.label}, {name}"
                if not kernel.grouped and shape.heads[0] != shape.heads[1]:
                    report.leave_out(what, "refused", "the raw kernel takes as many kv heads as heads only")
                    continue
                report.attempt(what, partial(throughput, name, kernel, shape, form_packed))
        if name in WITH_GAPS:
            for shape in SHAPES[:3]:
                report.attempt(f"gaps, {shape.label}, {name}", partial(padding, name, kernel, shape))


def backward_refused(report: Report, name: str, packed: bool) -> list[Row]:
    """No rows: says so where a kernel has a forward only."""
    if why := Batch(TINY, packed).refused(name):
        report.leave_out(f"backward, {name}", "refused", why)
    return []


def _form(packed: bool) -> str:
    return "packed" if packed else "dense"


# --- batches with gaps ---------------------------------------------------------------------------------------------


class Padded:
    """A packed batch in which rows after each sequence are padding, and its calls of anyattn."""

    def __init__(self, name: str, shape: Shape, room: Sequence[int], grad: bool) -> None:
        self.name, self.shape = name, shape
        starts = torch.tensor([0, *room], dtype=torch.int32).cumsum(0, dtype=torch.int32).cuda()
        cu = Packing.from_lengths(list(shape.lengths), device="cuda").cu_seqlens
        self.packing = Packing(cu, cu_seqlens_padded=starts)
        heads, kv_heads = shape.heads
        self.q, self.k, self.v = (
            torch.randn(sum(room), h, shape.dim, device="cuda", dtype=torch.bfloat16, requires_grad=grad)
            for h in (heads, kv_heads, kv_heads)
        )
        self.dout = torch.randn_like(self.q, requires_grad=False)

    def forward(self) -> Tensor:
        out: Tensor = anyattn.attention(
            self.q, self.k, self.v, causal=self.shape.causal, packing=self.packing, backend=self.name
        )
        return out

    def both(self) -> Any:
        return torch.autograd.grad(self.forward(), (self.q, self.k, self.v), self.dout)


# --- host time -----------------------------------------------------------------------------------------------------


def host_time_of_forward(name: str, kernel: type[Raw], packed: bool) -> list[Row]:
    """Host microseconds per call on a tiny problem, forward, without gradients."""
    batch = Batch(TINY, packed, grad=False)
    entry = kernel(batch)
    with torch.no_grad():
        thunks: dict[str, Thunk] = {"ours": lambda: batch.attention(name), "raw": entry.forward}
        public = entry.public() if packed else None
        if public is not None:
            thunks["public"] = public
        if name in WITH_GAPS:
            thunks["padded"] = Padded(name, TINY, [24, 24], grad=False).forward
        us = dict(zip(thunks, host_us(*thunks.values()), strict=True))
    what = f"host time, tiny {_form(packed)} call, {name}"
    rows = [Row(what, us["ours"], us["raw"], "us", "its raw entry point")]
    if "public" in us:
        rows.append(Row(what, us["ours"], us["public"], "us", "its public function", OF_PUBLIC.get(name, "")))
    if "padded" in us:
        against = "its raw entry point, compact"
        rows.append(Row(f"host time, tiny padded call, {name}", us["padded"], us["raw"], "us", against))
    return rows


def host_time(name: str, kernel: type[Raw], packed: bool) -> list[Row]:
    """Host microseconds per call with gradients: forward, then forward and backward through autograd."""
    batch = Batch(TINY, packed)
    if batch.refused(name):  # forward only
        return []
    q, k, v = leaves = (batch.q, batch.k, batch.v)
    entry = kernel(batch)
    thunks: dict[str, Thunk] = {
        "forward": lambda: batch.attention(name),
        "raw forward": entry.forward,
        "both": lambda: torch.autograd.grad(batch.attention(name), leaves, batch.dout),
        "raw both": lambda: entry.backward(entry.forward(), batch.dout),
    }
    if not kernel.differentiates:
        bare: Any = raw.Bare.apply
        thunks["bare forward"] = lambda: bare(entry, q, k, v)
        thunks["bare"] = lambda: torch.autograd.grad(bare(entry, q, k, v), leaves, batch.dout)
    if name in WITH_GAPS:
        padded = Padded(name, TINY, [24, 24], grad=True)
        thunks |= {"padded forward": padded.forward, "padded both": padded.both}
    us = dict(zip(thunks, host_us(*thunks.values(), calls=200), strict=True))
    what, bound = f"host time, tiny {_form(packed)} call", "<= +30 us"
    forward, both = f"{what} with gradients, forward, {name}", f"{what} with gradients, forward and backward, {name}"
    rows = [
        Row(forward, us["forward"], us["raw forward"], "us", "its raw entry point", bound),
        Row(both, us["both"], us["raw both"], "us", "its raw entry points"),  # autograd's engine is in it
    ]
    if "bare" in us:
        against = "a bare autograd.Function of its raw entry points"
        rows.append(Row(forward, us["forward"], us["bare forward"], "us", against))
        rows.append(Row(both, us["both"], us["bare"], "us", against))
    if "padded both" in us:
        more = "<= +30 us" if get_backend(name).CAPABILITIES[0].writes_gaps else "<= +45 us"
        what, against = "host time, tiny padded call with gradients", "its raw entry points, compact"
        rows += [
            Row(f"{what}, forward, {name}", us["padded forward"], us["raw forward"], "us", against, more),
            Row(f"{what}, forward and backward, {name}", us["padded both"], us["raw both"], "us", against),
        ]
    return rows


def synchronisation(name: str, kernel: type[Raw], packed: bool) -> list[Row]:
    """Whether a call, or a padded one, makes the host wait for the device in steady state."""
    batch = Batch(TINY, packed)
    grad = not batch.refused(name)
    if not grad:
        batch = Batch(TINY, packed, grad=False)
    entry = kernel(batch)
    calls: dict[str, Thunk] = {f"tiny {_form(packed)} call": _ours(name, batch, grad)}
    if name in WITH_GAPS:
        padded = Padded(name, TINY, [24, 24], grad=grad)
        calls["tiny padded call"] = padded.both if grad else padded.forward
    theirs = synchronises(_theirs(entry, batch, grad))
    way = "forward and backward" if grad else "forward"
    return [
        Row(f"waits for the device, {what}, {way}, {name}", synchronises(call), theirs, "waits", "the raw kernel",
            "<= +0 waits")
        for what, call in calls.items()
    ]  # fmt: skip


def _ours(name: str, batch: Batch, grad: bool) -> Thunk:
    """Forward, and backward if asked for: all that they return."""

    def run() -> Any:
        out = batch.attention(name)
        return out, torch.autograd.grad(out, (batch.q, batch.k, batch.v), batch.dout) if grad else None

    return run


def _theirs(entry: Raw, batch: Batch, grad: bool) -> Thunk:
    def run() -> Any:
        result = entry.forward()
        return result, entry.backward(result, batch.dout) if grad else None

    return run


# --- throughput ----------------------------------------------------------------------------------------------------


def throughput(name: str, kernel: type[Raw], shape: Shape, packed: bool) -> list[Row]:
    """16k tokens in bfloat16: anyattn against the raw kernel on the same tensors, forward and backward.

    Rows are speeds: ours / theirs is the raw kernel's time over anyattn's.
    """
    batch = Batch(shape, packed)
    grad = not batch.refused(name)
    if not grad:
        batch = Batch(shape, packed, grad=False)
    entry = kernel(batch)
    ways: dict[str, tuple[float, Thunk, Thunk]] = {"forward": (1.0, lambda: batch.attention(name), entry.forward)}
    out, result = batch.attention(name), entry.forward()
    _same("out", out, entry.to_caller(result[0]))
    if grad:
        leaves = (batch.q, batch.k, batch.v)

        def ours() -> Sequence[Tensor]:
            return torch.autograd.grad(out, leaves, batch.dout, retain_graph=True)

        def theirs() -> Sequence[Tensor]:
            return entry.backward(result, batch.dout)

        for mine, other in zip(ours(), theirs(), strict=False):
            _same("a gradient", mine, entry.to_caller(other))
        if kernel.differentiates:  # its graph is kept for one backward: a second one would compute forward again
            ways["forward and backward"] = 3.5, _ours(name, batch, grad), _theirs(entry, batch, grad)
        else:
            ways["backward"] = 2.5, ours, theirs
    times = device_ms(*(call for _, *calls in ways.values() for call in calls))
    rows = []
    for i, (way, (factor, *_)) in enumerate(ways.items()):
        speeds = [round(shape.forward_flops * factor / ms / 1e9, 1) for ms in times[2 * i : 2 * i + 2]]
        what = f"{way}, {_form(packed)}, {shape.label}, {name}"
        rows.append(Row(what, speeds[0], speeds[1], "TFLOP/s", "the raw kernel", ">= 0.99"))
    return rows


def _same(what: str, ours: Tensor, theirs: Tensor) -> None:
    """Both computed the same thing: else there is nothing to compare."""
    ours, theirs = ours.detach().float(), theirs.detach().float()
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    if not error < 2e-2:
        raise AssertionError(f"{what} differs from the raw kernel's by {error:.1e} of its largest value")


# --- padding and memory --------------------------------------------------------------------------------------------


def padding(name: str, kernel: type[Raw], shape: Shape) -> list[Row]:
    """Gaps of 10 and 50 percent of the rows, against the raw kernel on the compact batch; then 50 against 10.

    A third row adds to the raw kernel what no kernel can save: writing as many bytes of zeros as the gaps have.
    """
    batch = Batch(shape, packed=True)
    if batch.refused(name):
        return _padding_rows(name, shape, "forward", _forward_times(name, kernel, shape))
    entry = kernel(batch)
    result = entry.forward()
    thunks: list[Thunk] = [entry.forward, lambda: entry.backward(result, batch.dout)]
    for room in _rooms(shape):
        padded = Padded(name, shape, room, grad=True)
        out, leaves = padded.forward(), (padded.q, padded.k, padded.v)
        thunks.append(padded.forward)
        thunks.append(partial(torch.autograd.grad, out, leaves, padded.dout, retain_graph=True))
    for room in _rooms(shape):
        q, k, v = _gap_tensors(shape, room)
        thunks += [q.zero_, partial(_zero, q, k, v)]
    times = device_ms(*thunks)
    return [
        *_padding_rows(name, shape, "forward", times[::2]),
        *_padding_rows(name, shape, "backward", times[1::2]),
    ]


def _forward_times(name: str, kernel: type[Raw], shape: Shape) -> list[float]:
    """Of a kernel without backward: compact, with gaps of 10 and 50 percent, and writing as many zeros."""
    padded = [Padded(name, shape, room, grad=False) for room in _rooms(shape)]
    gaps = [_gap_tensors(shape, room)[0] for room in _rooms(shape)]
    entry = kernel(Batch(shape, packed=True, grad=False))
    return device_ms(entry.forward, *(p.forward for p in padded), *(q.zero_ for q in gaps))


def _rooms(shape: Shape) -> list[list[int]]:
    """Rows that each sequence has, so that 10 and 50 percent of all are gaps."""
    return [[round(n / (1 - share)) for n in shape.lengths] for share in (0.1, 0.5)]


def _gap_tensors(shape: Shape, room: Sequence[int]) -> list[Tensor]:
    """Tensors of as many rows as the gaps of q, k and v."""
    rows = sum(room) - sum(shape.lengths)
    heads, kv_heads = shape.heads
    return [torch.empty(rows, h, shape.dim, device="cuda", dtype=torch.bfloat16) for h in (heads, kv_heads, kv_heads)]


def _zero(*tensors: Tensor) -> None:
    for x in tensors:
        x.zero_()


def _padding_rows(name: str, shape: Shape, way: str, times: Sequence[float]) -> list[Row]:
    compact, low, high, *zeros = times
    rows = []
    for percent, taken, zero in ((10, low, zeros[0]), (50, high, zeros[1])):
        what = f"{way}, {shape.label}, {percent}% gaps, {name}"
        speeds = [round(1 / ms, 4) for ms in (taken, compact, compact + zero)]
        rows.append(Row(what, speeds[0], speeds[1], "1/ms", "the raw kernel, compact", ">= 0.97"))
        rows.append(Row(what, speeds[0], speeds[2], "1/ms", "the raw kernel, compact, and writing the zeros"))
    rows.append(Row(f"{way}, {shape.label}, 50% gaps, {name}", high, low, "ms", "10% gaps", "<= 1.03"))
    return rows


def memory(name: str, kernel: type[Raw], packed: bool) -> list[Row]:
    """Peak memory of forward and backward against the raw calls, which return the same tensors."""
    shape = Shape(MIDDLE)
    batch = Batch(shape, packed)
    grad = not batch.refused(name)
    if not grad:
        batch = Batch(shape, packed, grad=False)
    entry = kernel(batch)
    ours, theirs = peak_mib(_ours(name, batch, grad)), peak_mib(_theirs(entry, batch, grad))
    way = "forward and backward" if grad else "forward"
    what = f"peak memory, {way}, {_form(packed)}, {shape.label}, {name}"
    return [Row(what, ours, theirs, "MiB", "the raw calls", "<= 1.01")]
