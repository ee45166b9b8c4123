"""Calling a compiled kernel of FlashAttention 4 again without the Python around it.

The raw forward function looks at every argument, anew at each call, to find the kernel that it compiled for them: tens
of microseconds of host time, several times what the kernel's launch takes. What it finds depends on shapes, strides,
dtypes and numbers alone, and so do the arguments that it gives the kernel, but for the tensors. So the first call of a
kind goes through it while what it calls is noted; later calls of the kind give the same kernel the same numbers and
their own tensors.

Nothing is kept of a call that was not exactly one kernel over our own tensors: that made copies of them, or tables, or
parts to be merged. Nor with a release whose function was not read to do nothing after that kernel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn._call import Call

#: Releases whose forward function was read: it prepares, calls one kernel by its cache of kernels, and returns.
READ = frozenset(f"4.0.0b{n}" for n in range(26, 37))

#: Kinds of one spec that are kept: the stages of a plan are several.
_KINDS = 256


class Kept(NamedTuple):
    """One kernel, and what it is given."""

    entry: Any
    """The raw function that called it."""
    kind: tuple[Any, ...]
    """Of the calls that it serves, as ``kind_of`` says."""
    kernel: Callable[..., Any] | None
    """None: nothing can be kept of such calls."""
    arranged: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    """From the tensors of a call, in the order of ``_tensors``, and the constants, to the kernel's arguments."""
    constants: tuple[Any, ...]
    lse: bool
    """Whether it writes lse."""


def were_read(version: str | None) -> bool:
    """Whether kernels of a release may be kept."""
    return version in READ


def kind_of(call: Call, place: Tensor | None) -> tuple[Any, ...] | None:
    """All of a call, beside its spec, that the raw function looks at; None where nothing is kept.

    That is of tensors that it would copy first, that cannot be told from one another, or that are none in truth.

    Args:
        call: the call.
        place: where out is to be written, if not to new memory.
    """
    q, k, v, sink = call.q, call.k, call.v, call.sink
    at_q, at_k, at_v = q.data_ptr(), k.data_ptr(), v.data_ptr()
    pointers = at_q | at_k | at_v if place is None else at_q | at_k | at_v | place.data_ptr()
    if pointers & 15 or at_q == at_k or at_k == at_v or at_v == at_q:
        return None
    if sink is not None and (sink.data_ptr() & 3 or not sink.is_contiguous()):
        return None
    rows_q, rows_k = call.rows_q, call.rows_k
    return (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, q.device,
        None if place is None else place.stride(),
        None if sink is None else sink.dtype,
        None if rows_q is None or rows_k is None else (
            rows_q.lengths.shape[0], rows_q.max_seqlen, rows_k.max_seqlen, rows_q.gaps, rows_k.gaps
        ),
    )  # fmt: skip


def find(entry: Any, call: Call, kind: tuple[Any, ...]) -> Kept | None:
    """What is kept for a call. The last kind of its spec is compared, which costs less than a look-up: mostly it is."""
    memo = call.spec.memo
    kept: Kept | None = memo.get("last kept")
    if kept is None or kept.kind != kind:
        kept = memo["kept"].get(kind) if "kept" in memo else None
        if kept is None:
            return None
        memo["last kept"] = kept
    return kept if kept.entry is entry else None


def _keep(call: Call, kept: Kept) -> None:
    kinds = call.spec.memo.setdefault("kept", {})
    if len(kinds) >= _KINDS:
        kinds.clear()
    kinds[kept.kind] = call.spec.memo["last kept"] = kept


def run(kept: Kept, call: Call, place: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
    """(out, lse or None), from the kernel itself, on the current stream. None where it does not take the call."""
    q, v = call.q, call.v
    if place is not None:
        out = place
    elif q.shape[-1] == v.shape[-1]:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    else:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse = q.new_empty(_lse_shape(q), dtype=torch.float32) if kept.lse else None
    assert kept.kernel is not None
    try:
        kept.kernel(*kept.arranged((*_tensors(call, out, lse), *kept.constants)))
    except (TypeError, ValueError):  # its checks, which come before its launch
        _keep(call, kept._replace(kernel=None))
        return None
    return out, lse


def _lse_shape(q: Tensor) -> tuple[int, ...]:
    return (q.shape[1], q.shape[0]) if q.ndim == 3 else (q.shape[0], q.shape[2], q.shape[1])


def _tensors(call: Call, out: Tensor | None, lse: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors of a call, in one order."""
    q, k, v, rows_q, rows_k, sink = call.q, call.k, call.v, call.rows_q, call.rows_k, call.sink
    if q.requires_grad or k.requires_grad or v.requires_grad:
        q, k, v = q.detach(), k.detach(), v.detach()
    sink = sink if sink is None else sink.detach()
    if rows_q is None or rows_k is None:
        return q, k, v, out, lse, sink, None, None, None, None
    return q, k, v, out, lse, sink, rows_q.starts, rows_k.starts, rows_q.lengths, rows_k.lengths


# --- noting what the raw function calls ---

_noting = threading.Lock()


class _Notes:
    """Stands where the package's cache of kernels stands, and is that cache; calls of one thread are noted."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self.thread: int | None = threading.get_ident()
        """Whose calls are noted; None: nobody's any more."""
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __contains__(self, key: Any) -> bool:
        return key in self._cache

    def __setitem__(self, key: Any, kernel: Any) -> None:
        self._cache[key] = kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def __getitem__(self, key: Any) -> Any:
        kernel = self._cache[key]
        if threading.get_ident() != self.thread:
            return kernel

        def noted(*arguments: Any) -> Any:
            self.calls.append((kernel, arguments))
            return kernel(*arguments)

        return noted


def note(entry: Any, call: Call, kind: tuple[Any, ...], arguments: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """(out, lse or None) from the raw function; later calls of the kind find what it called, where that is all of it.

    Args:
        entry: the raw function, with its cache of kernels.
        call: the call.
        kind: as ``kind_of`` says.
        arguments: what the raw function is given.
    """
    if not _noting.acquire(blocking=False):  # another thread notes, and may be compiling: this call need not wait
        out, lse, *_ = entry(**arguments)
        return out, lse
    try:
        # Tensors of its own for each argument, so that which one went where can be told.
        given = {name: x.detach() if isinstance(x, Tensor) else x for name, x in arguments.items()}
        cache = entry.compile_cache
        notes = entry.compile_cache = _Notes(cache)
        try:
            out, lse, *_ = entry(**given)
        finally:
            notes.thread = None
            if entry.compile_cache is notes:
                entry.compile_cache = cache
    finally:
        _noting.release()
    kept = _kept(entry, kind, notes.calls, {**given, "out": out, "lse": lse})
    _keep(call, Kept(entry, kind, None, tuple, (), False) if kept is None else kept)
    return arguments.get("out", out), lse


#: The arguments of the raw function in the order of ``_tensors``, in which out and lse are results.
_NAMES = (
    "q", "k", "v", "out", "lse", "learnable_sink", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k",
)  # fmt: skip


def _kept(
    entry: Any, kind: tuple[Any, ...], noted: list[tuple[Any, tuple[Any, ...]]], ours: dict[str, Any]
) -> Kept | None:
    """None where there was another number of kernels than one, or one that got something else than is ours."""
    if len(noted) != 1:
        return None
    ((kernel, arguments),) = noted
    tensors = {name: ours[name] for name in _NAMES if ours.get(name) is not None}
    places: list[int] = []
    constants: list[Any] = []
    for x in arguments:
        if _is_constant(x):
            places.append(len(_NAMES) + len(constants))
            constants.append(x)
        elif isinstance(x, Tensor) and (name := _which(x, tensors)) is not None:
            places.append(_NAMES.index(name))
        else:
            return None
    if not {_NAMES.index(name) for name in tensors}.issubset(places):  # it was given something in another form
        return None
    return Kept(entry, kind, kernel, itemgetter(*places), tuple(constants), "lse" in tensors)


def _which(x: Tensor, tensors: dict[str, Tensor]) -> str | None:
    """Whose memory and layout a tensor has; None where it is nobody's, or could be several ones'."""
    same = [name for name, y in tensors.items() if x is y]
    if not same:
        layout = x.data_ptr(), x.shape, x.stride(), x.dtype
        same = [name for name, y in tensors.items() if (y.data_ptr(), y.shape, y.stride(), y.dtype) == layout]
    return same[0] if len(same) == 1 else None


def _is_constant(x: Any) -> bool:
    """Numbers, None, and tuples of such."""
    return x is None or isinstance(x, int | float) or (isinstance(x, tuple) and all(map(_is_constant, x)))
