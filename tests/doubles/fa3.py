"""A double of FlashAttention 3, of several states of its main branch, and of fa3-fwd, on an imagined GPU.

Read in hopper/ (the lines meant are of 3.0.0):

- lse is float32, natural log, (B, H, S) or (H, T): -inf for a row that sees no key, but +inf where there is no key at
  all (flash_api.cpp:1193).
- Rows beyond the used lengths are written neither in out, lse nor gradients. Whole tiles are loaded: NaN in rows after
  a sequence's end makes that sequence NaN, in q, k, v and dout, as was measured with FlashAttention 4.
- Backward looks at used lengths only where cu_seqlens are given (flash_bwd_launch_template.h:299).
- A window's side of at least the longest length less one is unbounded, which changes nothing.
- ``deterministic`` counts from 2025-09-17 on, up to head dim 192; older ones take the flag and sum in any order.
- Gradients are only written to what is given from 2025-12-04 on, and not returned.
- ``num_splits`` above 1: the keys of every sequence are cut, and float32 parts are merged by their lse; their memory
  comes back too. At 0 the kernel chooses (flash_api.cpp:983), one where it was built without splits.
- A build may lack features: ``flash_attn_config.CONFIG`` says which, from 2025-12-04 on; the kernels refuse them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from doubles import plain
from doubles.calling import Arguments, bind, custom_op, plain_name, python_function
from doubles.installation import FILL
from doubles.rows import Sequence, flat, flat_lse, is_offsets, sequences, shaped_lse
from doubles.signatures import Recorded, recorded

INF, NAN = float("inf"), float("nan")
TILE = 128
#: Betas all call themselves 3.0.0b1: they are named by the date on which they reached the main branch.
BETA = "3.0.0b1"
DATES = {"3.0.0": "2026-02-05"}
CALLED = {"_flash_attn_forward": "fwd", "_flash_attn_backward": "bwd"}
FEATURES = (
    "BACKWARD", "SPLIT", "PAGEDKV", "APPENDKV", "LOCAL", "SOFTCAP", "PACKGQA", "FP16", "FP8", "VARLEN", "CLUSTER",
    "HDIM64", "HDIM96", "HDIM128", "HDIM192", "HDIM256", "SM8x",
)  # fmt: skip
#: What the wheel of fa3-fwd 0.0.3 lacks, as its fa3_fwd_config.py says.
FORWARD_WHEEL = ("BACKWARD", "PAGEDKV", "LOCAL", "FP16")
COMPILED_DIMS = (64, 96, 128, 192, 256)


@dataclass
class Interface:
    """What ``import flash_attn_interface`` would give, and what it registers. ``calls`` are of the C++ functions."""

    label: str = "3.0.0"
    """ "3.0.0", the date of a beta, or a version of fa3-fwd: "0.0.3"."""
    arch: int = 90
    without: tuple[str, ...] = ()
    """Features that the build lacks, as in FLASHATTENTION_DISABLE_*."""
    calls: list[tuple[str, Arguments]] = field(default_factory=list)
    _library: Any = None
    _ops: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.forward_only = self.label.startswith("0.")
        if self.forward_only:
            self.without = FORWARD_WHEEL
        self._package: Recorded = recorded("fa3_fwd" if self.forward_only else "fa3")
        self._date = DATES.get(self.label, "2026-02-05" if self.forward_only else self.label)
        self._recorded = self.label
        if not self.forward_only:
            self._recorded = [v for v in self._package.versions() if v.partition("+")[0] <= self._date][-1]

    def _since(self, date: str) -> bool:
        """Whether the main branch had by then what came at that date."""
        return self._date >= date

    @property
    def version(self) -> str:
        """What the package says of itself."""
        return self.label if self.label in DATES or self.forward_only else BETA

    @property
    def distribution(self) -> str:
        """Under which name pip knows it: that of FlashAttention 2, for a while."""
        return "fa3-fwd" if self.forward_only else str(self._package.noted(self._recorded)["package"])

    @property
    def namespace(self) -> str:
        """Of its torch ops."""
        return "fa3_fwd" if self.forward_only else "flash_attn_3"

    @property
    def has_ops(self) -> bool:
        """Whether the compiled functions are torch ops: pybind11 made them until 2025-05-21."""
        return self._package.has(f"{self.namespace}::fwd", self._recorded)

    @property
    def has_custom_ops(self) -> bool:
        """Whether the Python functions are torch ops too; windows have two sides since."""
        return "op" in self._package.entry("_flash_attn_forward", self._recorded)

    def _compiled_name(self, name: str) -> str:
        return f"{self.namespace}::{name}" if self.has_ops else f"flash_attn_3_cuda.{name}"

    def _names(self, name: str) -> list[str]:
        """The arguments of a compiled function, in order."""
        return [plain_name(n) for n in self._package.signature(self._compiled_name(name), self._recorded).parameters]

    # --- what is imported -------------------------------------------------------------------------------------------

    def files(self) -> dict[str, str]:
        """Its modules."""
        name = "fa3_fwd" if self.forward_only else "flash_attn"
        compiled = f"{self.namespace}/_C.py" if self.has_ops else "flash_attn_3_cuda.py"
        imported = f"{self.namespace}._C" if self.has_ops else "flash_attn_3_cuda"
        found = {compiled: FILL, f"{name}_interface.py": f"import {imported}\n{FILL}"}
        if self.has_custom_ops:
            found[f"{name}_config.py"] = f"CONFIG = {self.config()!r}\n"
        return found

    def contents(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """What its modules hold."""
        name = "fa3_fwd" if self.forward_only else "flash_attn"
        compiled = f"{self.namespace}._C" if self.has_ops else "flash_attn_3_cuda"
        return {compiled: self.cuda_module, f"{name}_interface": self.python_module}

    def cuda_module(self) -> dict[str, Callable[..., Any]]:
        """What flash_attn_3_cuda holds; where there are torch ops, importing flash_attn_3._C makes them."""
        if self.has_ops:
            self._register()
            return {}
        return {name: functools.partial(self._pybind, name) for name in CALLED.values()}

    def _register(self) -> None:
        if self._library is None:
            self._library = torch.library.Library(self.namespace, "FRAGMENT")
            for name in CALLED.values():
                self._library.define(self._package.entry(self._compiled_name(name), self._recorded)["schema"])
                self._library.impl(name, functools.partial(self._compiled_function, name), "CPU")

    def python_module(self) -> dict[str, Any]:
        """What flash_attn_interface holds."""
        functions = {}
        for name, called in CALLED.items():
            body = functools.partial(self._from_python, name, called)
            functions[name] = python_function(self._package, name, self._recorded, body)
            if self.has_custom_ops:
                compiled = self._compiled_name(called)
                functions[name] = custom_op(self._package, name, compiled, self._recorded, functions[name])
                self._ops.append(functions[name])
        return functions

    def config(self) -> dict[str, dict[str, bool]]:
        """flash_attn_config.CONFIG."""
        flags = {f"FLASHATTENTION_DISABLE_{name}": name in self.without for name in FEATURES}
        differing = {f"FLASH_ATTENTION_DISABLE_HDIMDIFF{d}": f"HDIMDIFF{d}" in self.without for d in (64, 192)}
        return {"build_flags": {**flags, "FLASHATTENTION_ENABLE_VCOLMAJOR": False, **differing}}

    def close(self) -> None:
        """Take the ops out of torch.ops again."""
        for op in self._ops:
            op._lib._destroy()
        self._ops.clear()
        if self._library is not None:
            self._library._destroy()
            self._library = None

    def _from_python(self, name: str, called: str, g: Arguments) -> Any:
        for tensor in ("dout", "q", "k", "v", "out"):
            if g.get(tensor) is not None and g[tensor].stride(-1) != 1:
                g[tensor] = g[tensor].contiguous()
        if "window_size" in g:
            g["window_size_left"], g["window_size_right"] = g.pop("window_size")
        assert set(g) == set(self._names(called))
        returned = self._call(called, g)
        if name == "_flash_attn_forward":
            return tuple(x if x is not None or not self.has_custom_ops else torch.empty(0) for x in returned)
        return returned[0] if self.has_custom_ops else tuple(returned[:4])

    def _pybind(self, name: str, *args: Any) -> list[Tensor | None]:
        return list(self._compiled_function(name, *args))

    def _compiled_function(self, name: str, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        signature = self._package.signature(self._compiled_name(name), self._recorded)
        return self._call(name, bind(signature, args, kwargs))

    # --- what the C++ functions refuse ------------------------------------------------------------------------------

    def _call(self, name: str, g: Arguments) -> tuple[Tensor | None, ...]:
        self.calls.append((name, dict(g)))
        for unused in ("k_new", "v_new", "qv", "page_table", "kv_batch_idx", "leftpad_k", "rotary_cos", "q_descale",
                       "scheduler_metadata"):  # fmt: skip
            assert g.get(unused) is None, f"{unused} is not for training"
        assert not g.get("attention_chunk")
        assert not g.get("sink_token_length")
        if g["softmax_scale"] is None:
            g["softmax_scale"] = g["q"].shape[-1] ** -0.5
        self._check(g)
        self._settle_window(name, g)
        if name == "fwd":
            return self._forward(g)
        self._check_backward(g)
        return self._backward(g)

    def _lacks(self, feature: str) -> bool:
        return feature in self.without

    def _refuse(self, feature: str, what: str, asked: bool) -> None:
        """As TORCH_CHECK does: betas have no other way to tell."""
        if asked and self._lacks(feature):
            raise RuntimeError(f"This flash attention build does not support {what}.")

    def _check(self, g: Arguments) -> None:
        q, k, v = g["q"], g["k"], g["v"]
        assert self.arch >= 80, "FlashAttention only supports Ampere GPUs or newer."
        assert self.arch // 10 == 9 or (self.arch < 90 and not self._lacks("SM8x")), "no kernel image for this device"
        assert q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only supports fp16, bf16, and fp8_e4m3"
        assert q.dtype == k.dtype == v.dtype, "query and key must have the same dtype"
        self._refuse("FP16", "FP16", q.dtype == torch.float16)
        for x in (q, k, v, *((g["out"], g["dout"]) if "dout" in g else ())):
            assert x.stride(-1) == 1, "Input tensor must have contiguous last dimension"
            assert x.data_ptr() % 16 == 0, "TMA descriptors want rows at multiples of 16 bytes"
            assert all(stride and stride % 8 == 0 for stride in x.stride()[:-1]), "the same"
        batches = []
        for x, name in ((q, "q"), (k, "k")):
            cu, used = g[f"cu_seqlens_{name}"], g[f"seqused_{name}"]
            batch = x.shape[0] if cu is None else cu.shape[0] - 1
            batches.append(batch)
            assert x.ndim == (4 if cu is None else 3)
            if cu is not None:
                assert is_offsets(cu, sequences=batch), f"cu_seqlens_{name} must have dtype torch.int32"
                assert isinstance(g[f"max_seqlen_{name}"], int), "max_seqlen must be provided if cu_seqlens is provided"
            if used is not None:
                assert used.dtype == torch.int32, f"seqused_{name} must have dtype int32"
                assert used.is_contiguous()
                assert used.shape == (batch,)
            self._refuse("VARLEN", "varlen", cu is not None or used is not None)
        assert batches[0] == batches[1], "batch_size must be equal to batch_size_k"
        assert k.shape[:-1] == v.shape[:-1]
        assert q.shape[-1] == k.shape[-1]
        assert q.shape[-2] % k.shape[-2] == 0, "Number of heads in key/value must divide number of heads in query"
        self._refuse("SOFTCAP", "tanh softcapping", g["softcap"] > 0)
        self._check_dims(g)

    def _check_dims(self, g: Arguments) -> None:
        dim, dim_v = g["q"].shape[-1], g["v"].shape[-1]
        assert dim % 8 == 0, "head_size should be a multiple of 8"
        assert dim_v % 8 == 0, "head_size_v should be a multiple of 8"
        assert dim <= self._largest, f"FlashAttention forward only supports head dimension at most {self._largest}"
        if "dout" in g:
            assert dim_v <= self._largest, f"FlashAttention only supports head dimension at most {self._largest}"
            assert dim == dim_v or self._since("2025-04-23")
        elif dim != dim_v:
            assert (128 < dim <= 192 and 96 < dim_v <= 128) or (dim <= 64 and dim_v <= 512), "V headdim is different"
            assert self.arch // 10 == 9, "Only Hopper supports different V headdim"
            assert self._since("2025-02-07")
            assert dim > 64 or dim_v <= 64 or self._since("2025-03-22")

    @property
    def _compiled(self) -> list[int]:
        return [d for d in COMPILED_DIMS if not self._lacks(f"HDIM{d}")]

    @property
    def _largest(self) -> int:
        return max(self._compiled)

    def _settle_window(self, name: str, g: Arguments) -> None:
        """left and right as the kernel gets them."""
        longest = [
            g[x].shape[1] if g[f"cu_seqlens_{x}"] is None else g[f"max_seqlen_{x}"] for x in ("q", "k")
        ]  # fmt: skip
        left, right = g["window_size_left"], g["window_size_right"]
        assert isinstance(left, int)
        assert isinstance(right, int)
        left = -1 if left >= longest[1] - 1 else left
        right = -1 if right >= longest[0] - 1 else right
        one_row = name == "fwd" and longest[0] == 1 and left == right == -1
        if g["causal"] and not one_row:
            right = 0
        local = (left >= 0 or right >= 0) and not (left < 0 and right == 0)
        self._refuse("LOCAL", "local attention", local)
        g["left"] = None if left < 0 else left
        g["right"] = None if right < 0 else right

    def _check_backward(self, g: Arguments) -> None:
        q, k, v = g["q"], g["k"], g["v"]
        self._refuse("BACKWARD", "backward", True)
        assert g["out"].shape == g["dout"].shape == (*q.shape[:-1], v.shape[-1])
        assert g["out"].dtype == g["dout"].dtype == q.dtype, "query and out must have the same dtype"
        assert g["out"].stride(-1) == g["dout"].stride(-1) == 1, "dout tensor must have contiguous last dimension"
        lse = g["softmax_lse"]
        assert lse.dtype == torch.float32
        assert lse.is_contiguous(), "it is read as it lies in memory"
        packed = g["cu_seqlens_q"] is not None
        assert lse.shape == ((q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1]))
        for name, x in (("dq", q), ("dk", k), ("dv", v)):
            if (grad := g[name]) is not None:
                assert (grad.shape, grad.dtype) == (x.shape, q.dtype)
                assert grad.stride(-1) == 1, f"{name} must have contiguous last dimension"
        rounded = next(d for d in self._compiled if d >= max(q.shape[-1], v.shape[-1]))
        refused = self._since("2025-09-17") and g["deterministic"] and rounded >= 256
        assert not refused, "Deterministic backward not supported for hdim 256."

    # --- the kernels ------------------------------------------------------------------------------------------------

    def _pairs(self, g: Arguments, *, backward: bool) -> Iterator[tuple[Sequence, Sequence]]:
        varlen = g["cu_seqlens_q"] is not None or g["cu_seqlens_k"] is not None
        honoured = varlen or not backward
        return zip(
            *(
                sequences(
                    g[x], g[f"cu_seqlens_{x}"], g[f"seqused_{x}"] if honoured else None, g[f"max_seqlen_{x}"]
                )
                for x in ("q", "k")
            ),
            strict=True,
        )  # fmt: skip

    def _forward(self, g: Arguments) -> tuple[Tensor | None, ...]:
        q, k, v = (g[n].detach() for n in "qkv")
        assert 0 <= g["num_splits"] <= 256
        self._refuse("SPLIT", "splits", g["num_splits"] > 1)
        splits = g["num_splits"] or (1 if self._lacks("SPLIT") else 3)
        out = plain.poisoned(*q.shape[:-1], v.shape[-1], dtype=q.dtype) if g["out"] is None else g["out"]
        assert out.stride(-1) == 1
        rows = flat(q)
        lse = plain.poisoned(q.shape[-2], rows.shape[0], dtype=torch.float32)
        if flat(k).shape[0] == 0:
            return out.zero_(), shaped_lse(lse.fill_(INF), q), None, None
        found = plain.poisoned(rows.shape[0], q.shape[-2], v.shape[-1], dtype=q.dtype)
        found.copy_(out.reshape(found.shape))
        for one, two in self._pairs(g, backward=False):
            seen = plain.visible(one.length, two.length, g["left"], g["right"])
            seen[:, two.written :] = False
            keys, values = flat(k)[two.rows], flat(v)[two.rows]
            o, l = _split(rows[one.rows], keys, values, seen, g["softmax_scale"], g["softcap"], splits)
            if q.ndim == 3 and (_spoiled(q, one) or _spoiled(k, two) or _spoiled(v, two)):
                o, l = o * NAN, l * NAN
            found[one.covered], lse[:, one.covered] = o[: one.written].to(q.dtype), l[:, : one.written]
        out.copy_(found.view(out.shape))
        if v.shape[-1] > 64 >= q.shape[-1] and self._lacks("HDIMDIFF64"):
            out.fill_(NAN)  # the kernel for head_dim_v 64 runs
        lse = shaped_lse(lse, q)
        if splits == 1:
            return out, lse, None, None
        parts = splits, *lse.shape
        return out, lse, *(plain.poisoned(*x, dtype=torch.float32) for x in ((*parts, v.shape[-1]), parts))

    def _backward(self, g: Arguments) -> tuple[Tensor | None, ...]:
        q, k, v, out, dout = (g[n].detach() for n in ("q", "k", "v", "out", "dout"))
        grads = [
            plain.poisoned(*x.shape, dtype=x.dtype) if g[n] is None else g[n]
            for n, x in (("dq", q), ("dk", k), ("dv", v))
        ]
        found = [flat(x).clone() for x in grads]
        lse = flat_lse(g["softmax_lse"])
        lse = lse.masked_fill(lse == -INF, 0.0)
        ordered = g["deterministic"] and self._since("2025-09-17")
        for one, two in self._pairs(g, backward=True):
            seen = plain.visible(one.length, two.length, g["left"], g["right"])
            seen[one.written :], seen[:, two.written :] = False, False
            got = plain.backward(
                flat(q)[one.rows], flat(k)[two.rows], flat(v)[two.rows], flat(out)[one.rows],
                lse[:, one.rows].masked_fill(~seen.any(1), 0.0), flat(dout)[one.rows], seen, g["softmax_scale"],
                g["softcap"],
            )[:3]  # fmt: skip
            if q.ndim == 3 and any(_spoiled(x, where) for x, where in ((q, one), (dout, one), (k, two), (v, two))):
                got = tuple(x * NAN for x in got)
            if not ordered:
                unordered = (True, *[q.shape[-2] != k.shape[-2]] * 2)
                got = tuple(plain.jitter(x) if any_order else x for x, any_order in zip(got, unordered, strict=True))
            for place, where, x in zip(found, (one, two, two), got, strict=True):
                place[where.covered] = x[: where.written].to(place.dtype)
        for grad, x in zip(grads, found, strict=True):
            grad.copy_(x.view(grad.shape))
        others = tuple(torch.empty(0) for _ in range(5))
        return others if self.has_custom_ops else (*grads, *others)


def _split(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float, splits: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and lse of one sequence, from those of runs of its keys, of which some may be empty or wholly masked."""
    runs = zip(k.tensor_split(splits), v.tensor_split(splits), seen.tensor_split(splits, 1), strict=True)
    outs, lses = (torch.stack(x) for x in zip(*(plain.forward(q, *run, scale, softcap) for run in runs), strict=True))
    total = lses.logsumexp(0)
    shares = torch.exp(lses - total).nan_to_num(0.0)  # -inf - -inf: nothing seen at all
    return (outs * shares.transpose(1, 2).unsqueeze(-1)).sum(0), total


def _spoiled(x: Tensor, place: Sequence) -> bool:
    """Whether the tiles of a sequence hold NaN in rows after its end."""
    end = place.start + place.length
    reach = place.start + -(-place.length // TILE) * TILE
    return x.ndim == 3 and bool(x[end:reach].isnan().any())
