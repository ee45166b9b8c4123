"""Checks of arguments that hold for every backend, in one place, before anything runs.

Legend: B batch, S seq, H heads, D head_dim, T rows of a packed batch.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from anyattn._errors import DeviceError, DtypeError, InvalidArgument, PackingError, ShapeError, Unsupported
from anyattn._request import Meta, Request

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Which dims of a layout are (batch, seq, heads); thd has no batch.
LAYOUTS = {"bshd": (0, 1, 2), "sbhd": (1, 0, 2), "bhsd": (0, 2, 1), "thd": None}


class Sizes(NamedTuple):
    """The sizes of a validated request. For "thd", batch is 1 and seq counts rows."""

    layout: str
    batch: int
    seq_q: int
    seq_k: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int


def validate(request: Request) -> Sizes:
    """Check a request; return its sizes.

    Raises:
        InvalidArgument: or one of its subclasses, naming what was given, what is allowed and what to do.
        Unsupported: DTensors.
    """
    _check_kinds(request)
    _check_dtypes(request)
    sizes = _sizes(request)
    _check_numbers(request)
    _check_packings(request, sizes)
    _check_extras(request, sizes)
    return sizes


def _qkv(request: Request) -> tuple[tuple[str, Meta], ...]:
    return ("q", request.q), ("k", request.k), ("v", request.v)


def _check_kinds(request: Request) -> None:
    for name, x in _qkv(request):
        if not isinstance(x, Meta):
            raise InvalidArgument(f"{name} must be a tensor, got {type(x).__name__}")
        if x.kind.__name__ == "DTensor":
            raise Unsupported(f"{name} is a DTensor: call attention on {name}.to_local(), within each rank")
    for name in ("sink", "alibi_slopes", "bias"):
        x = getattr(request, name)
        if x is not None and not isinstance(x, Meta):
            raise InvalidArgument(f"{name} must be a tensor or None, got {type(x).__name__}")
    if request.mask is not None and not isinstance(request.mask, tuple):
        raise InvalidArgument(f"mask must be a bool tensor, a BlockMask or None, got {type(request.mask).__name__}")
    devices = {x.device for _, x in _qkv(request)}
    devices |= {
        x.device for x in (request.sink, request.alibi_slopes, request.bias, request.mask) if isinstance(x, Meta)
    }
    if len(devices) > 1:
        places = ", ".join(sorted(map(str, devices)))
        raise DeviceError(f"all tensors of a call must be on one device, got {places}: move them with .to(q.device)")


def _check_dtypes(request: Request) -> None:
    given = [x.dtype for _, x in _qkv(request)]
    if request.autocast is not None:
        given = [request.autocast if d == torch.float32 else d for d in given]
    if len(set(given)) > 1:
        raise DtypeError(f"q, k and v must have one dtype, got {', '.join(map(str, given))}: cast them")
    if given[0] not in FLOATS:
        raise DtypeError(f"q, k and v must be one of {', '.join(map(str, FLOATS))}, got {given[0]}")
    for name in ("sink", "alibi_slopes", "bias"):
        x = getattr(request, name)
        if x is not None and x.dtype not in FLOATS:
            raise DtypeError(f"{name} must have a floating dtype, got {x.dtype}")
    if isinstance(request.mask, Meta) and request.mask.dtype != torch.bool:
        raise DtypeError(
            f"mask must be bool, True meaning attend, got {request.mask.dtype}: additive masks go to bias="
        )


def _sizes(request: Request) -> Sizes:
    q, k, v = (x.shape for _, x in _qkv(request))
    layout = request.layout
    if layout is None:
        layout = "thd" if len(q) == 3 else "bshd"
    if layout not in LAYOUTS:
        raise InvalidArgument(f"unknown layout {layout!r}; allowed: {', '.join(LAYOUTS)}")
    rank = 3 if layout == "thd" else 4
    for name, x in _qkv(request):
        if len(x.shape) != rank:
            raise ShapeError(f"layout {layout!r} needs {rank}-D tensors, {name} has shape {tuple(x.shape)}")
    dims = LAYOUTS[layout]
    if dims is None:
        batches, seqs, heads = [1, 1, 1], [x[0] for x in (q, k, v)], [x[1] for x in (q, k, v)]
    else:
        batches, seqs, heads = ([x[d] for x in (q, k, v)] for d in dims)
    if len(set(batches)) > 1:
        raise ShapeError(f"q, k and v must have one batch size, got {batches[0]}, {batches[1]}, {batches[2]}")
    if seqs[1] != seqs[2] or heads[1] != heads[2]:
        raise ShapeError(f"k and v must agree in all but the last dim, got {tuple(k)} and {tuple(v)} as {layout!r}")
    if q[-1] != k[-1]:
        raise ShapeError(f"q and k must have one head_dim, got {q[-1]} and {k[-1]}")
    if q[-1] == 0 or v[-1] == 0:
        raise ShapeError(f"head_dim must be at least 1, got {q[-1]} for q and k, {v[-1]} for v")
    if (heads[1] == 0) != (heads[0] == 0) or (heads[1] and heads[0] % heads[1]):
        raise ShapeError(f"num_heads must be a multiple of num_kv_heads, got {heads[0]} and {heads[1]}")
    return Sizes(layout, batches[0], seqs[0], seqs[1], heads[0], heads[1], q[-1], v[-1])


def _check_numbers(request: Request) -> None:
    if request.causal not in (None, True, False, "top_left"):
        raise InvalidArgument(f"causal must be None, False, True or 'top_left', got {request.causal!r}")
    window = request.window
    if window is not None:
        if not isinstance(window, tuple) or len(window) != 2:
            raise InvalidArgument(f"window must be (left, right), each an int >= 0 or None, got {window!r}")
        for side, value in zip(("left", "right"), window, strict=True):
            if value is not None and (not isinstance(value, int) or value < 0):
                raise InvalidArgument(f"window's {side} side must be an int >= 0, or None for unbounded; got {value!r}")
    for name in ("scale", "softcap"):
        value = getattr(request, name)
        if value is not None and (not isinstance(value, (int, float)) or not math.isfinite(value)):
            raise InvalidArgument(f"{name} must be a finite number or None, got {value!r}")
    if request.softcap is not None and request.softcap < 0:
        raise InvalidArgument(f"softcap must be above 0, or None for none; got {request.softcap}")
    dropout = request.dropout
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise InvalidArgument(f"dropout must be a number in [0, 1), got {dropout!r}")


def _check_packings(request: Request, sizes: Sizes) -> None:
    if request.packing is None:
        if sizes.layout == "thd":
            raise PackingError('layout "thd" needs packing=, a Packing that says where the sequences lie')
        if request.packing_kv is not None:
            raise PackingError("packing_kv= needs packing= too: pass the queries' Packing")
        return
    same = request.packing_kv is None
    if same and sizes.layout != "thd" and sizes.seq_q != sizes.seq_k:
        raise PackingError(
            f"with {sizes.seq_q} query rows and {sizes.seq_k} key rows per entry, the keys need a packing_kv= of their "
            "own"
        )
    keys = request.packing if same else request.packing_kv
    assert keys is not None
    for name, packing, rows in (("packing", request.packing, sizes.seq_q), ("packing_kv", keys, sizes.seq_k)):
        sequences, _, known_rows, _, _, _, device, _ = packing
        if device != request.q.device and request.q.device.type != "meta":
            raise DeviceError(f"{name} is on {device}, the tensors on {request.q.device}: use {name}.to(q.device)")
        if sizes.layout == "thd" and known_rows is not None and known_rows > rows:
            hint = " (keys of another length need packing_kv=)" if same and name == "packing_kv" else ""
            raise PackingError(f"{name} ends at row {known_rows}, past the tensor's {rows} rows{hint}")
        if sequences != request.packing[0]:
            raise PackingError(
                f"packing and packing_kv must have as many sequences, got {request.packing[0]} and {sequences}"
            )


def _check_extras(request: Request, sizes: Sizes) -> None:
    heads = sizes.num_heads
    if request.sink is not None and tuple(request.sink.shape) != (heads,):
        raise ShapeError(f"sink must have shape (num_heads,) = ({heads},), got {tuple(request.sink.shape)}")
    sequences = sizes.batch if request.packing is None else request.packing[0]
    slopes = request.alibi_slopes
    if slopes is not None:
        allowed = ((heads,), (sequences, heads))
        if tuple(slopes.shape) not in allowed:
            raise ShapeError(
                f"alibi_slopes must have shape (num_heads,) or (sequences, num_heads), {allowed[0]} or {allowed[1]}; "
                f"got {tuple(slopes.shape)}"
            )
        if slopes.requires_grad:
            raise InvalidArgument("alibi_slopes gets no gradient: pass alibi_slopes.detach()")
    for name in ("bias", "mask"):
        x = getattr(request, name)
        if x is None:
            continue
        if isinstance(x, Meta):
            _check_scores_shape(name, x, sizes)
        else:
            _check_block_mask(x, sizes)


def _check_scores_shape(name: str, x: Meta, sizes: Sizes) -> None:
    """A tensor that broadcasts against the scores."""
    if sizes.layout == "thd":
        raise InvalidArgument(
            f'a tensor {name} does not go with layout "thd": use 4-D tensors, or a BlockMask over packed rows'
        )
    full = (sizes.batch, sizes.num_heads, sizes.seq_q, sizes.seq_k)
    given = (1,) * (4 - len(x.shape)) + tuple(x.shape)
    if len(given) != 4 or any(a not in (1, b) for a, b in zip(given, full, strict=True)):
        hint = ""
        if name == "mask" and tuple(x.shape) == (sizes.batch, sizes.seq_k):
            hint = "; if it says which keys are real, pass mask[:, None, None, :], or packing=Packing.from_mask(mask)"
        raise ShapeError(
            f"{name} must broadcast to (batch, num_heads, seq_q, seq_k) = {full}, got {tuple(x.shape)}{hint}"
        )


def _check_block_mask(x: tuple[Any, ...], sizes: Sizes) -> None:
    if x[0] != "block":
        raise InvalidArgument(f"mask must be a bool tensor, a BlockMask or None, got a tuple of {len(x)}")
    batch, heads, rows_q, rows_k = (1, 1, *x[1])[-4:]
    if (
        batch not in (1, sizes.batch)
        or heads not in (1, sizes.num_heads)
        or (rows_q, rows_k) != (sizes.seq_q, sizes.seq_k)
    ):
        full = (sizes.batch, sizes.num_heads, sizes.seq_q, sizes.seq_k)
        raise ShapeError(f"the BlockMask must be for {full}, with batch and heads possibly 1; it is for {x[1]}")
