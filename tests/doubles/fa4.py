"""A double of flash_attn.cute.interface (flash-attn-4), of any recorded version, on an imagined GPU.

It binds every call to that version's signature, refuses what that version's code refuses, returns as many values, and
leaves NaN where the real kernels leave memory as it was. Measured on an H200 with 4.0.0b36:

- rows beyond the used lengths are not written, in out, lse and gradients (they held up to 2.4e24);
- whole tiles are loaded: NaN in rows after a sequence's end makes every row of that sequence NaN, in q, k, v and dout.

From b26 on forward is what a kernel does that is kept in ``compile_cache``, under all that it was compiled for. It gets
tensors and numbers by position, and above ``TABLES`` sequences a table of theirs too, made at every call.

Given results are written where they are and returned, rows of no sequence left as they were. From b26 on the layout of
a given out is checked; that of gradients never is, and strides and pointers are taken as aligned to 16 bytes. The first
kernels of head dim 256 on sm10x read (to b18) and write (to b19) as if no tensor had holes.

Read in the wheels: lse is float32, natural log, (B, H, S) or (H, T), -inf for a row that sees no key, the sink's value
with a sink; window sides are None where unbounded; a length above max_seqlen is cut without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch import Tensor

from doubles import plain
from doubles.calling import python_function
from doubles.signatures import recorded

TILE = 128
#: BIN_BATCH_SEARCH_THRESH of the real one.
TABLES = 256


class AuxData(NamedTuple):
    """What score and mask functions look at."""

    tensors: Any = None
    scalars: Any = None


def versions() -> list[str]:
    """Every recorded version, oldest first."""
    return recorded("fa4").versions()


def entry(function: str, version: str) -> dict[str, Any]:
    """What is recorded of one function of one version."""
    return recorded("fa4").entry(function, version)


@dataclass
class Sequence:
    """Where one sequence of one side lies: rows of a flattened tensor."""

    start: int
    length: int
    room: int
    """Rows until the next one begins."""


@dataclass
class Interface:
    """What ``import flash_attn.cute.interface`` would give. ``calls`` are the keyword arguments of every call."""

    version: str = "4.0.0b36"
    arch: int = 90
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    maybe_contiguous: Callable[..., Tensor] = field(init=False)
    _flash_attn_fwd: Callable[..., tuple[Any, ...]] = field(init=False)
    _flash_attn_bwd: Callable[..., tuple[Any, ...]] = field(init=False)

    def __post_init__(self) -> None:
        package = recorded("fa4")
        self._flash_attn_fwd = python_function(package, "_flash_attn_fwd", self.version, self._forward)
        self._flash_attn_bwd = python_function(package, "_flash_attn_bwd", self.version, self._backward)
        if self._at_least("b26"):
            self.maybe_contiguous = _aligned_copy
            self._flash_attn_fwd.compile_cache = {}  # type: ignore[attr-defined]
        else:
            self.maybe_contiguous = _last_contiguous

    def _at_least(self, beta: str) -> bool:
        return Version(self.version) >= Version(f"4.0.0{beta}")

    def module(self) -> dict[str, Any]:
        """What flash_attn.cute.interface holds."""
        return {n: getattr(self, n) for n in ("_flash_attn_fwd", "_flash_attn_bwd", "maybe_contiguous")}

    @property
    def family(self) -> int:
        """GPU generation."""
        return self.arch // 10

    # --- what the raw functions refuse ------------------------------------------------------------------------------

    def _check_tensors(self, g: dict[str, Any]) -> None:
        q, k, v = g["q"], g["k"], g["v"]
        assert q.dtype in (torch.float16, torch.bfloat16), "inputs must be float16 or bfloat16"
        assert q.dtype == k.dtype == v.dtype, "inputs must have the same dtype"
        packed = [g.get("cu_seqlens_q") is not None, g.get("cu_seqlens_k") is not None]
        assert [q.ndim == 3, k.ndim == 3] == packed
        assert k.shape[:-1] == v.shape[:-1]
        assert q.shape[-1] == k.shape[-1]
        assert q.shape[-2] % k.shape[-2] == 0, "num_head must be divisible by num_head_kv"
        for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"):
            if (x := g.get(name)) is not None:
                assert x.dtype == torch.int32, f"{name} must be int32"
                assert x.stride(0) == 1, f"{name} must be contiguous"
                batch = g["cu_seqlens_q"].shape[0] - 1
                assert x.shape == (batch + name.startswith("cu"),)
        for name in ("max_seqlen_q", "max_seqlen_k"):  # a tensor there would enter the compile key
            assert g.get(name) is None or type(g[name]) is int
        for name in ("window_size_left", "window_size_right"):
            assert g.get(name) is None or g[name] >= 0, "-1 is a bound here: unbounded is None"
        assert isinstance(g["causal"], bool)
        if not self._at_least("b26"):
            for x in (q, k, v, g.get("dout", q)):
                strides = [s for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1]
                assert x.data_ptr() % 16 == 0, "misaligned"
                assert all(s % 8 == 0 for s in strides), "misaligned"
        assert 0 not in q.shape, "an empty problem: old betas do not expect one"
        assert 0 not in k.shape, "an empty problem: old betas do not expect one"

    def _check_dims(self, g: dict[str, Any]) -> None:
        dim, dim_v = g["q"].shape[-1], g["v"].shape[-1]
        assert dim % 8 == 0, "head_dim must be divisible by 8"
        assert dim_v % 8 == 0, "head_dim must be divisible by 8"
        if self.family == 9:
            assert max(dim, dim_v) <= 256
            assert dim_v <= max(dim, 128), "no tile fits"
        elif self.family in (10, 11):
            more = [(192, 128)] + [(256, 256)] * self._at_least("b11")
            assert max(dim, dim_v) <= 128 or (dim, dim_v) in more
        else:
            assert max(dim, dim_v) <= 128, "shared memory"
            assert dim == dim_v
            assert self._at_least("b21"), "silently wrong: pull/2553"
            assert g.get("cu_seqlens_q") is None, "illegal memory access: issues/2860"
        if self.family in (10, 11) and dim == 256 and not self._at_least("b34"):
            assert not g["softcap"]
            assert g.get("learnable_sink") is None
            assert g.get("window_size_left") is None
            assert not g.get("window_size_right")
            assert self._at_least("b31") or (g.get("seqused_q") is None and g.get("seqused_k") is None)
        if g["softcap"]:
            assert self._at_least("b9"), "another formula: issues/2396"

    def _check_backward(self, g: dict[str, Any]) -> None:
        q, v, heads, kv_heads = g["q"], g["v"], g["q"].shape[-2], g["k"].shape[-2]
        dim, dim_v, gqa = q.shape[-1], v.shape[-1], heads != kv_heads
        assert g["out"].shape == g["dout"].shape == (*q.shape[:-1], dim_v)
        lse_shape = (heads, q.shape[0]) if q.ndim == 3 else (q.shape[0], heads, q.shape[1])
        assert g["lse"].shape == lse_shape
        assert g["lse"].dtype == torch.float32
        assert g.get("dlse") is None or (g.get("dlse").shape, g.get("dlse").dtype) == (lse_shape, torch.float32)
        assert q.dtype == g["out"].dtype == g["dout"].dtype, "inputs must have the same dtype"
        if not self._at_least("b30"):
            assert dim % 32 == 0, "does not compile: issues/2492"
            assert dim_v % 32 == 0, "does not compile: issues/2492"
        if self.family == 9:
            if self._at_least("b30") and dim <= 128:
                assert (-(-dim // 16) * 16) % 32 == 0, "dq silently wrong: pull/2896"
            if not self._at_least("b31"):
                assert dim <= 192
                assert not (gqa and dim > 128)
            assert self._at_least("b30") or not 128 < dim <= 160
            assert not gqa or dim == dim_v
            assert not (g["deterministic"] and gqa) or self._at_least("b12"), "not deterministic in truth"
        elif self.family in (10, 11):
            assert dim == dim_v or (dim, dim_v) == (192, 128), "dv silently wrong: issues/2552"
            assert dim != 256, "silently wrong: TransformerEngine/issues/3216"
            assert self.family == 10 or dim < 128 or self._at_least("b15")
        else:
            assert not g["deterministic"], "deterministic backward not supported on SM 12.0"
        if g["softcap"] and g.get("cu_seqlens_q") is not None:
            assert self._at_least("b24"), "varlen + score_mod not supported in bwd yet"

    def _given(self, g: dict[str, Any], name: str, like: Tensor, dim: int) -> Tensor:
        """Where a result goes: to what was given, or to memory as the allocator hands it out."""
        shape = (*like.shape[:-1], dim)
        if (place := g.get(name)) is None:
            return plain.poisoned(*shape, dtype=like.dtype)
        assert place.shape == shape, f"{name} shape"
        assert place.dtype == like.dtype, f"{name} dtype"
        aligned = place.stride(-1) == 1 and place.data_ptr() % 16 == 0 and not any(s % 8 for s in place.stride()[:-1])
        assert aligned, f"{name} must have aligned strides and a contiguous last dimension"
        if self._misses_holes(dim, "b20"):
            place = place.as_strided(shape, torch.empty(shape, device="meta").stride())
        return place

    def _misses_holes(self, dim: int, since: str) -> bool:
        """Whether tensors are taken for contiguous ones, before a version that looks."""
        return self.family == 10 and dim == 256 and not self._at_least(since)

    # --- the raw functions ------------------------------------------------------------------------------------------

    def _forward(self, g: dict[str, Any]) -> tuple[Any, ...]:
        self.calls.append(("_flash_attn_fwd", g))
        self._check_tensors(g)
        self._check_dims(g)
        sink = g.get("learnable_sink")
        if sink is not None:
            assert self.family in (9, 10, 11), "Learnable sink is not supported in this kernel"
            allowed = (torch.float16, torch.bfloat16, torch.float32) if self._at_least("b26") else (torch.bfloat16,)
            assert sink.dtype in allowed
            assert sink.shape == (g["q"].shape[-2],)
            assert not sink.requires_grad, "cannot be exported"
        q, k, v = g["q"].detach(), g["k"].detach(), g["v"].detach()
        if self._misses_holes(q.shape[-1], "b19"):
            assert all(x.is_contiguous() for x in (q, k, v)), "silently wrong: pull/2670"
        out = self._given(g, "out", q, v.shape[-1])
        needed = g["return_lse"] or any(g[n].requires_grad for n in "qkv")
        lse = plain.poisoned(*_lse_shape(q), dtype=torch.float32) if needed else None
        if self._at_least("b26"):
            self._by_kernel(g, (q, k, v), out, lse)
        else:
            _attend({**g, "q": q, "k": k, "v": v}, out, lse)
        values = max(entry("_flash_attn_fwd", self.version)["returns"])
        return (out, lse, *(None,) * (values - 2))

    def _by_kernel(self, g: dict[str, Any], qkv: tuple[Tensor, ...], out: Tensor, lse: Tensor | None) -> None:
        """Compile a kernel for the call, or find it, and call it: with views of what the caller gave, or copies."""
        q, k, v = (self.maybe_contiguous(_last_contiguous(x)) for x in qkv)
        given = [g.get(f"{name}_{side}") for name in ("cu_seqlens", "seqused") for side in "qk"]
        sink, causal = g.get("learnable_sink"), g["causal"]
        sink = None if sink is None else _aligned_copy(_last_contiguous(sink), 4)
        longest = g.get("max_seqlen_q"), g.get("max_seqlen_k")
        window = g["window_size_left"], None if causal else g["window_size_right"]
        key = (
            q.shape[-2:], k.shape[-2:], v.shape[-1], q.dtype, causal, g["softcap"], longest, self.arch, lse is None,
            *(x is None for x in (*given, *window)), None if sink is None else sink.dtype,
        )  # fmt: skip
        cache = self._flash_attn_fwd.compile_cache  # type: ignore[attr-defined]
        if key not in cache:
            fixed = {"causal": causal, "softcap": g["softcap"]}
            fixed |= {f"max_seqlen_{side}": bound for side, bound in zip("qk", longest, strict=True)}
            cache[key] = _kernel(fixed, q.dtype, (q.shape[-2:], k.shape[-2:], v.shape[-2:]))
        table = given[0].clone() if given[0] is not None and given[0].shape[0] > TABLES + 1 else None
        cache[key](
            q, k, v, out.detach(), lse, g["softmax_scale"], *given, None, *window, sink, None, AuxData(), table, None
        )  # fmt: skip

    def _backward(self, g: dict[str, Any]) -> tuple[Any, ...]:
        self.calls.append(("_flash_attn_bwd", g))
        self._check_tensors(g)
        self._check_dims(g)
        self._check_backward(g)
        assert g.get("learnable_sink") is None, "the final lse says all"
        q, k, v, out, dout = (g[n].detach() for n in ("q", "k", "v", "out", "dout"))
        grads = [self._given(g, n, x, x.shape[-1]) for n, x in (("dq", q), ("dk", k), ("dv", v))]
        dq, dk, dv = found = [_rows(x).clone() for x in grads]
        lse, dlse = _flat_lse(g["lse"].detach()), None if g.get("dlse") is None else _flat_lse(g.get("dlse"))
        # 2 ** (x - 0) where lse is -inf: a row without keys counts for nothing, its scores being masked
        lse = lse.masked_fill(lse == -plain.INF, 0.0)
        for one, two in _pairs(g):
            rows, keys = slice(one.start, one.start + one.length), slice(two.start, two.start + two.length)
            seen = plain.visible(one.length, two.length, *_window(g))
            got = plain.backward(
                _rows(q)[rows], _rows(k)[keys], _rows(v)[keys], _rows(out)[rows], lse[:, rows], _rows(dout)[rows], seen,
                g["softmax_scale"], g["softcap"], None if dlse is None else dlse[:, rows],
            )[:3]  # fmt: skip
            sides = ((q, one), (dout, one), (k, two), (v, two))
            if any(_spoiled(_rows(x), where) for x, where in sides):
                got = tuple(x * float("nan") for x in got)
            for grad, place, x, side in ((dq, one, got[0], "q"), (dk, two, got[1], "k"), (dv, two, got[2], "k")):
                length = min(place.length, _limit(g, side))
                grad[place.start : place.start + length] = x[:length].to(grad.dtype)
        for grad, x in zip(grads, found, strict=True):
            grad.copy_(x.view(grad.shape))
        return tuple(grads)


def _kernel(fixed: dict[str, Any], dtype: torch.dtype, heads: tuple[torch.Size, ...]) -> Callable[..., None]:
    """A compiled forward: numbers in ``fixed``, the dtype, heads and head dims are constants of it.

    It checks what those of the package check of their tensors before they are launched.
    """

    def kernel(*arguments: Any) -> None:
        q, k, v, out, lse, scale, starts_q, starts_k, used_q, used_k, _, left, right, sink, _, _, table, _ = arguments
        for x, shape in zip((q, k, v), heads, strict=True):
            if x.dtype != dtype or x.shape[-2:] != shape:
                raise ValueError(f"compiled for {dtype}, {shape}, got {x.dtype}, {x.shape[-2:]}")
        for x in (q, k, v, out):
            if x.stride(-1) != 1 or x.data_ptr() % 16 or any(s % 8 for s in x.stride()[:-1]):
                raise ValueError("a tensor that is not aligned to 16 bytes, or has holes in its last dim")
        for x in (lse, sink, starts_q, starts_k, used_q, used_k):
            if x is not None and (x.data_ptr() % 4 or x.stride(-1) != 1):
                raise ValueError("a tensor that is not aligned to 4 bytes, or has holes")
        assert table is None or torch.equal(table, starts_q), "the table of another batch"
        tensors = {"q": q, "k": k, "v": v, "cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k, "learnable_sink": sink}
        used = {"seqused_q": used_q, "seqused_k": used_k}
        window = {"window_size_left": left, "window_size_right": right}
        for x in (*tensors.values(), out, lse):
            assert x is None or not x.requires_grad, "cannot be exported"
        _attend({**tensors, **used, **window, "softmax_scale": scale, **fixed}, out, lse)

    return kernel


def _attend(g: dict[str, Any], out: Tensor, lse: Tensor | None) -> None:
    """Forward, into out and lse, but for rows that the kernels do not write."""
    q, k, v, sink = g["q"], g["k"], g["v"], g.get("learnable_sink")
    flat_out, flat_lse = _rows(out).clone(), plain.poisoned(q.shape[-2], _rows(q).shape[0], dtype=torch.float32)
    for one, two in _pairs(g):
        rows, keys = slice(one.start, one.start + one.length), slice(two.start, two.start + two.length)
        seen = plain.visible(one.length, two.length, *_window(g))
        o, l = plain.forward(
            _rows(q)[rows], _rows(k)[keys], _rows(v)[keys], seen, g["softmax_scale"], g["softcap"], sink
        )
        if _spoiled(_rows(q), one) or _spoiled(_rows(k), two) or _spoiled(_rows(v), two):
            o, l = o * float("nan"), l * float("nan")
        written = slice(one.start, one.start + min(one.length, _limit(g, "q")))
        flat_out[written] = o[: written.stop - written.start].to(out.dtype)
        flat_lse[:, written] = l[:, : written.stop - written.start]
    out.copy_(flat_out.view(out.shape))
    if lse is not None:
        lse.copy_(flat_lse if q.ndim == 3 else flat_lse.unflatten(1, q.shape[:2]).transpose(0, 1))


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _aligned_copy(tensor: Tensor, align_bytes: int = 16) -> Tensor:
    return tensor if tensor.data_ptr() % align_bytes == 0 else tensor.clone()


def _rows(x: Tensor) -> Tensor:
    """(T, H, D), a view: dense batches are one sequence after the other."""
    return x if x.ndim == 3 else (x if x.is_contiguous() else x.contiguous()).flatten(0, 1)


def _lse_shape(q: Tensor) -> tuple[int, ...]:
    return (q.shape[1], q.shape[0]) if q.ndim == 3 else (q.shape[0], q.shape[2], q.shape[1])


def _flat_lse(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.transpose(0, 1).flatten(1, 2)


def _window(g: dict[str, Any]) -> tuple[int | None, int | None]:
    return g["window_size_left"], 0 if g["causal"] else g["window_size_right"]


def _limit(g: dict[str, Any], side: str) -> int:
    """Rows that the grid covers."""
    bound: int | None = g.get(f"max_seqlen_{side}")
    return g[side].shape[0 if g[side].ndim == 3 else 1] if bound is None else bound


def _places(g: dict[str, Any], side: str) -> Iterator[Sequence]:
    x, used = g[side], g.get(f"seqused_{side}")
    bounds = [i * x.shape[1] for i in range(x.shape[0] + 1)] if x.ndim == 4 else g[f"cu_seqlens_{side}"].tolist()
    for i, (start, end) in enumerate(pairwise(bounds)):
        yield Sequence(start, end - start if used is None else int(used[i]), end - start)


def _pairs(g: dict[str, Any]) -> Iterator[tuple[Sequence, Sequence]]:
    return zip(_places(g, "q"), _places(g, "k"), strict=True)


def _spoiled(x: Tensor, place: Sequence) -> bool:
    """Whether the tiles of a sequence hold NaN in rows after its end."""
    end = place.start + place.length
    reach = place.start + -(-place.length // TILE) * TILE
    return bool(x[end:reach].isnan().any())
