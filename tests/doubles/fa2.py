"""A double of flash-attn, of any version from 2.3.0 to 2.8, on an imagined GPU.

``flash_attn_2_cuda`` is here with the C++ functions' own order of arguments, and ``flash_attn.flash_attn_interface``
with that of its raw functions, which are torch custom ops from 2.7.0 on. Read in the sources (csrc/flash_attn, at every
tag; the lines meant are of 2.8.3):

- lse is float32, natural log, (B, H, S); packed (H, T) from 2.6.0 on, and (B, H, max_seqlen) before. It is +inf for a
  row that sees no key (src/softmax.h:180).
- What lies outside cu_seqlens is neither read nor written; with fewer kv heads dk and dv are summed from memory that
  was not, so that they hold anything there, whatever they held before (flash_api.cpp:1164).
- A side of a window that is unbounded beside a bounded one becomes max_seqlen_k, and from 2.4.1 on a side of at least
  max_seqlen_k is unbounded (:141, :608). Both are wrong for queries that lie before the first key.
- Until 2.3.3 a sequence without keys is not written, nor are the gradients of one without queries (commit db2f8069).
- Until 2.6.1 backward leaves out the derivative of softcap (issues/1065).
- 16 bytes are loaded at a time, and the batch is a dim of the grid: rows begin at multiples of 16 bytes, and there are
  at most 65535 sequences.
- ALiBi adds slope * column where the mask is causal and nothing more, and the true distance elsewhere (src/alibi.h).
- max_seqlen_q = 1 with fewer kv heads takes each query row as a sequence (:592): the batch must have as many rows.
- Dropout draws from torch's generator; backward needs the state that forward returned.
- dq is summed in any order unless ``deterministic``, which 2.4.1 brought.
- Given results are written by their strides, and returned; with fewer kv heads, every row of dk and dv is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from doubles import plain
from doubles.calling import Arguments, bind, custom_op, plain_name, python_function
from doubles.rows import Sequence, flat, flat_lse, is_offsets, sequences
from doubles.signatures import recorded

INF, NAN = float("inf"), float("nan")
RECORDED = recorded("fa2")
CUDA = "flash_attn_2_cuda"
#: Each raw Python function, and the C++ function that it calls.
CALLED = {
    "_flash_attn_forward": "fwd",
    "_flash_attn_varlen_forward": "varlen_fwd",
    "_flash_attn_backward": "bwd",
    "_flash_attn_varlen_backward": "varlen_bwd",
}


def versions() -> list[str]:
    """Every recorded version, oldest first."""
    return RECORDED.versions("_flash_attn_forward")


def recorded_as(version: str) -> str:
    """The recorded version of the same release: "2.5.9.post1" for "2.5.9"."""
    return next(v for v in versions() if Version(v).release == Version(version).release)


@dataclass
class Interface:
    """What ``import flash_attn.flash_attn_interface`` and ``import flash_attn_2_cuda`` would give.

    ``calls`` are the arguments of every call of a C++ function, by name.
    """

    version: str = "2.8.3"
    arch: int = 90
    calls: list[tuple[str, Arguments]] = field(default_factory=list)
    _ops: list[Any] = field(default_factory=list)

    def at_least(self, version: str) -> bool:
        """Whether this is that version or a later one."""
        return Version(self.version) >= Version(version)

    # --- what is imported -------------------------------------------------------------------------------------------

    def cuda_module(self) -> dict[str, Callable[..., Any]]:
        """What flash_attn_2_cuda holds."""
        return {name: functools.partial(self._cuda, name) for name in CALLED.values()}

    def python_module(self) -> dict[str, Any]:
        """What flash_attn.flash_attn_interface holds; custom ops from 2.7.0 on."""
        functions = {}
        for name, called in CALLED.items():
            body = functools.partial(self._from_python, name, called)
            functions[name] = python_function(RECORDED, name, self._recorded, body)
            if "op" in RECORDED.entry(name, self._recorded):
                functions[name] = custom_op(RECORDED, name, f"{CUDA}.{called}", self._recorded, functions[name])
                self._ops.append(functions[name])
        return {"maybe_contiguous": _rowwise, **functions}

    @property
    def _recorded(self) -> str:
        return recorded_as(self.version)

    def _names(self, called: str) -> list[str]:
        """The arguments of a C++ function, in order."""
        return [plain_name(n) for n in RECORDED.signature(f"{CUDA}.{called}", self._recorded).parameters]

    def close(self) -> None:
        """Take the custom ops out of torch.ops again."""
        for op in self._ops:
            op._lib._destroy()
        self._ops.clear()

    def _from_python(self, name: str, called: str, g: Arguments) -> Any:
        """Call the C++ function as the Python one does, and return what that returns."""
        for tensor in ("dout", "q", "k", "v", "out"):
            if g.get(tensor) is not None:
                g[tensor] = _rowwise(g[tensor])
        if "window_size" in g:
            g["window_size_left"], g["window_size_right"] = g.pop("window_size")
        names = self._names(called)
        assert set(g) <= set(names), "an argument that is dropped"
        given = {"zero_tensors": False} | g
        returned = self._cuda(called, *(given.get(n) for n in names))
        assert [len(returned)] == RECORDED.returns(f"{CUDA}.{called}", self._recorded)
        if "backward" in name and "op" in RECORDED.entry(name, self._recorded):
            return returned[3]
        return tuple(returned)

    # --- the C++ functions ------------------------------------------------------------------------------------------

    def _cuda(self, name: str, *args: Any) -> list[Tensor]:
        g = bind(RECORDED.signature(f"{CUDA}.{name}", self._recorded), args, {})
        self.calls.append((name, dict(g)))
        g = {"alibi_slopes": None, "softcap": 0.0, "deterministic": False, "zero_tensors": False} | g
        for unused in ("gen", "seqused_k", "leftpad_k", "block_table"):
            assert g.get(unused) is None, f"{unused} is not for training"
        self._check(g, backward="bwd" in name)
        if self._takes_rows_as_sequences(name, g):
            self._rows_as_sequences(g)
        self._settle_window(name, g)
        return self._backward(g) if "bwd" in name else self._forward(g)

    def _check(self, g: Arguments, *, backward: bool) -> None:
        q, k, v = g["q"], g["k"], g["v"]
        families = (8, 9, 10, 11, 12) if self.at_least("2.7.3") else (8, 9)
        assert self.arch // 10 in families, "FlashAttention only supports Ampere GPUs or newer."
        assert q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type"
        tensors = [q, k, v, *((g["out"], g["dout"]) if backward else ())]
        assert all(x.dtype == q.dtype for x in tensors), "query and key must have the same dtype"
        assert all(x.stride(-1) == 1 for x in tensors), "Input tensor must have contiguous last dimension"
        assert all(x.data_ptr() % 16 == 0 for x in tensors), "misaligned address"
        assert all(stride % 8 == 0 for x in tensors for stride in x.stride()[:-1]), "misaligned address"
        packed = "cu_seqlens_q" in g
        assert q.ndim == k.ndim == (3 if packed else 4)
        assert k.shape == v.shape
        assert q.shape[-1] == k.shape[-1], "one head_dim"
        assert packed or q.shape[0] == k.shape[0]
        assert 0 not in (*q.shape, *k.shape), "an empty problem"
        # 2.3 to 2.6 pad others themselves in forward, and not in backward
        assert q.shape[-1] % 8 == 0, "query, key, value, and out_ must have a head_size that is a multiple of 8"
        assert q.shape[-1] <= 256, "FlashAttention forward only supports head dimension at most 256"
        assert q.shape[-2] % k.shape[-2] == 0, "Number of heads in key/value must divide number of heads in query"
        assert isinstance(g["causal"], bool)
        assert all(isinstance(g[f"window_size_{side}"], int) for side in ("left", "right"))
        assert all(g[f"window_size_{side}"] >= -1 for side in ("left", "right"))
        assert isinstance(g["softmax_scale"], float)
        assert 0.0 <= g["dropout_p"] < 1.0
        assert not (g["softcap"] and g["dropout_p"]), "Softcapping does not support dropout for now"
        if packed:
            self._check_offsets(g)
        if g["alibi_slopes"] is not None:
            self._check_slopes(g)
        for result, like in (("dq", "q"), ("dk", "k"), ("dv", "v")) if backward else (("out", "q"),):
            if (place := g[result]) is not None:
                assert (place.shape, place.dtype) == (g[like].shape, q.dtype)
                assert place.stride(-1) == 1, f"{result} must have contiguous last dimension"
                assert place.data_ptr() % 16 == 0, "misaligned address"
                assert all(stride % 8 == 0 for stride in place.stride()[:-1]), "misaligned address"
        if backward:
            self._check_backward(g)

    def _check_offsets(self, g: Arguments) -> None:
        batch = g["cu_seqlens_q"].shape[0] - 1
        assert batch > 0, "batch size must be positive"
        assert batch <= 65535, "invalid configuration argument"
        assert is_offsets(g["cu_seqlens_q"], sequences=batch), "cu_seqlens_q must have dtype int32"
        assert is_offsets(g["cu_seqlens_k"], sequences=batch), "cu_seqlens_k must have dtype int32"
        assert all(isinstance(g[f"max_seqlen_{side}"], int) for side in "qk")

    def _check_slopes(self, g: Arguments) -> None:
        slopes, heads = g["alibi_slopes"], g["q"].shape[-2]
        batch = g["cu_seqlens_q"].shape[0] - 1 if "cu_seqlens_q" in g else g["q"].shape[0]
        assert slopes.dtype == torch.float32, "ALiBi slopes must have dtype fp32"
        assert slopes.stride(-1) == 1, "ALiBi slopes tensor must have contiguous last dimension"
        assert slopes.shape in ((heads,), (batch, heads))

    def _check_backward(self, g: Arguments) -> None:
        q, dim, small = g["q"], g["q"].shape[-1], self.arch in (86, 89)
        if small and dim > 192 and not self.at_least("2.7.3"):
            assert self.at_least("2.5.5"), "head dim > 192 requires A100/A800 or H100/H800"
            assert not g["dropout_p"], "head dim > 192 with dropout requires A100/A800 or H100/H800"
            assert dim > 224 or self.at_least("2.6.2"), "head dim 224 with/without dropout requires A100/A800"
        assert g["out"].shape == g["dout"].shape == q.shape
        lse, rng = g["softmax_lse"], g["rng_state"]
        assert lse.dtype == torch.float32
        assert lse.is_contiguous(), "it is read as it lies in memory"
        assert lse.shape == self._lse_shape(g)
        if rng is not None:
            assert (rng.shape, rng.element_size()) == ((2,), 8)

    def _lse_shape(self, g: Arguments) -> tuple[int, ...]:
        q, heads = g["q"], g["q"].shape[-2]
        if q.ndim == 4:
            return q.shape[0], heads, q.shape[1]
        if self.at_least("2.6.0"):
            return heads, q.shape[0]
        return g["cu_seqlens_q"].shape[0] - 1, heads, g["max_seqlen_q"]

    # --- what is done to the arguments ------------------------------------------------------------------------------

    def _takes_rows_as_sequences(self, name: str, g: Arguments) -> bool:
        if name != "varlen_fwd" or not self.at_least("2.4.3") or g["max_seqlen_q"] != 1:
            return False
        bounded = g["window_size_left"] >= 0 or g["window_size_right"] >= 0
        plain_call = g["dropout_p"] == 0.0 and g["alibi_slopes"] is None and not bounded
        return plain_call and g["q"].shape[1] > g["k"].shape[1]

    def _rows_as_sequences(self, g: Arguments) -> None:
        batch = g["cu_seqlens_q"].shape[0] - 1
        if g["q"].shape[0] != batch:
            raise RuntimeError(f"shape '[{batch}, ...]' is invalid for input of {g['q'].shape[0]} rows")
        g["cu_seqlens_q"] = torch.arange(batch + 1, dtype=torch.int32)

    def _settle_window(self, name: str, g: Arguments) -> None:
        """window_size_left, window_size_right and is_causal as the kernel gets them."""
        packed = "varlen" in name
        longest_q, longest_k = (g["max_seqlen_q"], g["max_seqlen_k"]) if packed else (g["q"].shape[1], g["k"].shape[1])
        left, right, causal = g["window_size_left"], g["window_size_right"], g["causal"]
        one_row = longest_q == 1 and g["alibi_slopes"] is None and (not packed or self.at_least("2.4.3"))
        if "fwd" in name and one_row:
            causal = False
        if self.at_least("2.4.1"):
            left, right = (-1 if side >= longest_k else side for side in (left, right))
        if causal:
            right = 0
        g["only_causal"] = left < 0 and right == 0
        if left < 0 <= right:
            left = longest_k
        elif right < 0 <= left:
            right = longest_k
        g["left"], g["right"] = (None if side < 0 else side for side in (left, right))

    # --- the kernels ------------------------------------------------------------------------------------------------

    def _pairs(self, g: Arguments) -> Iterator[tuple[int, Sequence, Sequence, Arguments]]:
        """(number, queries, keys, what both directions have in common) of each sequence."""
        sides = [
            sequences(g[x], g.get(f"cu_seqlens_{x}"), None, g.get(f"max_seqlen_{x}")) for x in ("q", "k")
        ]  # fmt: skip
        for i, (one, two) in enumerate(zip(*sides, strict=True)):
            bias, factor = None, None
            if (slopes := g["alibi_slopes"]) is not None:
                slopes = slopes if slopes.ndim == 1 else slopes[i]
                bias = plain.alibi(slopes, one.length, two.length, columns_only=g["only_causal"])
            if g["dropout_p"]:
                shape = (g["q"].shape[-2], one.length, two.length)
                factor = plain.dropout((*g["rng"], i), shape, g["dropout_p"])
            shared = {"scale": g["softmax_scale"], "softcap": g["softcap"], "bias": bias, "factor": factor}
            seen = plain.visible(one.length, two.length, g["left"], g["right"])
            seen[:, two.written :] = False
            yield i, one, two, {"seen": seen, **shared}

    def _forward(self, g: Arguments) -> list[Tensor]:
        q, k, v = (g[n].detach() for n in "qkv")
        assert not g["return_softmax"] or g["dropout_p"] > 0, "return_softmax is only supported when p_dropout > 0.0"
        # torch's generator, whose seed is what the device's would be
        state = torch.randint(2**62, (2,)) if g["dropout_p"] else torch.tensor([77, 78])
        g["rng"] = tuple(state.tolist())
        out = plain.poisoned(*q.shape, dtype=q.dtype) if g["out"] is None else g["out"]
        lse = plain.poisoned(*self._lse_shape(g), dtype=torch.float32)
        if g["zero_tensors"]:
            out, lse = out.zero_(), lse.fill_(-INF)
        rows = flat(out).clone()
        for i, one, two, shared in self._pairs(g):
            if two.length == 0 and not self.at_least("2.3.4"):
                continue
            o, l = plain.forward(flat(q)[one.rows], flat(k)[two.rows], flat(v)[two.rows], **shared)
            l = l.masked_fill(l == -INF, INF)
            rows[one.covered] = o[: one.written].to(q.dtype)
            if lse.ndim == 2:
                lse[:, one.covered] = l[:, : one.written]
            else:
                lse[i, :, : one.written] = l[:, : one.written]
        out.copy_(rows.view(out.shape))
        found = [out, lse, q.new_empty(0), state]
        return found if self.at_least("2.7.0") else [out, q, k, v, out, *found[1:]]

    def _backward(self, g: Arguments) -> list[Tensor]:
        q, k, v, out, dout = (g[n].detach() for n in ("q", "k", "v", "out", "dout"))
        dq, dk, dv = (
            plain.poisoned(*x.shape, dtype=x.dtype) if g[n] is None else g[n]
            for n, x in (("dq", q), ("dk", k), ("dv", v))
        )
        if g["zero_tensors"]:
            dq.zero_(), dk.zero_(), dv.zero_()
        elif q.shape[-2] != k.shape[-2]:
            dk.fill_(NAN), dv.fill_(NAN)
        g["rng"] = (0, 0) if g["rng_state"] is None else tuple(g["rng_state"].view(torch.int64).tolist())
        places = [flat(x).clone() for x in (dq, dk, dv)]
        for i, one, two, shared in self._pairs(g):
            if one.length == 0 and not self.at_least("2.3.4"):
                continue
            lse = g["softmax_lse"]
            lse = flat_lse(lse)[:, one.rows] if lse.ndim == 2 or q.ndim == 4 else lse[i, :, : one.length]
            lse = torch.nn.functional.pad(lse, (0, one.length - lse.shape[1]), value=INF)
            got = plain.backward(
                flat(q)[one.rows], flat(k)[two.rows], flat(v)[two.rows], flat(out)[one.rows], lse,
                flat(dout)[one.rows], **shared,
            )[:3]  # fmt: skip
            if g["softcap"] and not self.at_least("2.6.2"):
                got = tuple(x * 2 for x in got)
            # Measured with torch's copy of these kernels: a masked score less lse = -inf is no number.
            if two.length and (lse == -INF).any():
                got = tuple(x * NAN for x in got)
            if not g["deterministic"]:
                got = (plain.jitter(got[0]), *got[1:])
            for place, where, x in zip(places, (one, two, two), got, strict=True):
                place[where.covered] = x[: where.written].to(place.dtype)
        for grad, place in zip((dq, dk, dv), places, strict=True):
            grad.copy_(place.view(grad.shape))
        return [dq, dk, dv, torch.empty(0)]


def _rowwise(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
