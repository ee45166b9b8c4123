"""A double of nvidia-cudnn-frontend (module ``cudnn``) over the cuDNN library, for CPU tensors, on an imagined GPU.

A graph is declared, checked and run as with the package: ``execute`` gets tensors by uid, and reads and writes their
memory by what was declared of them, offsets and strides included. What lies there beside is none of its business, so a
wrong stride, a wrong table of offsets or a stale graph gives wrong numbers here too.

Measured on an H200 with 1.14 to 1.32 and cuDNN 9.19:

- stats are float32, natural log, -inf for a row whose keys are all masked, whose out is 0. Backward takes that.
- Rows of a sequence without keys are not written, in out and stats; its dq is zero, and so are dk and dv of one without
  queries. Rows outside every sequence are neither read nor written.
- left counts one more than the keys before a position; positions from the end go by the true lengths.
- With room for one query and lengths given, forward's stats are wrong.
- With ``max_total_seq_len_q`` and ragged offsets, backward goes by q's offsets where it writes dq.
- A scale below zero goes wrong once anything is masked. A bias has q's dtype.

Read in its headers (include/cudnn_frontend/node, 1.32): what ``validate`` refuses, the alignment of strides and
pointers, which older versions do not check, and that the deterministic backward on sm90 keeps all scores.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from anyattn.backends import _cudnn_calls as calls
from anyattn.backends import _cudnn_graph as graphs
from doubles import plain

NAN = float("nan")


class GraphNotSupported(Exception):
    """cudnnGraphNotSupportedError."""


DataType = Enum("DataType", ["HALF", "BFLOAT16", "FLOAT", "INT32", "INT64"])
Alignment = Enum("Alignment", ["TOP_LEFT", "BOTTOM_RIGHT"])
HeurMode = Enum("HeurMode", ["A", "FALLBACK"])
_DTYPES = {
    "HALF": torch.float16, "BFLOAT16": torch.bfloat16, "FLOAT": torch.float32, "INT32": torch.int32,
    "INT64": torch.int64,
}  # fmt: skip


class Declared:
    """A tensor of a graph."""

    def __init__(
        self, dim: list[int], stride: list[int], data_type: Any, ragged_offset: Declared | None = None
    ) -> None:
        self.uid, self.dim, self.stride, self.ragged = -1, dim, stride, ragged_offset
        self.dtype: torch.dtype | None = None
        #: Only outputs are written.
        self.output = False
        if data_type is not None:
            self.set_data_type(data_type)

    def set_uid(self, uid: int) -> Declared:
        self.uid = uid
        return self

    def set_output(self, output: bool) -> Declared:
        self.output = output
        return self

    def set_dim(self, dim: list[int]) -> Declared:
        self.dim = dim
        return self

    def set_stride(self, stride: list[int]) -> Declared:
        self.stride = stride
        return self

    def set_data_type(self, data_type: Any) -> Declared:
        self.dtype = _DTYPES[data_type.name]
        return self

    def set_ragged_offset(self, ragged_offset: Declared) -> Declared:
        self.ragged = ragged_offset
        return self


class Handle:
    """A cuDNN handle: of one thread at a time."""

    def __init__(self) -> None:
        self.stream: int | None = None
        self.lock = threading.Lock()


@dataclass
class Interface:
    """What ``import cudnn`` would give.

    ``built`` are the graphs whose plans were built, ``runs`` how many times one ran, ``runs_by_position`` how many of
    these got tensors by position.
    """

    version: str = "1.32.0"
    library: int = 91900
    arch: int = 90
    built: list[Graph] = field(default_factory=list)
    runs: int = 0
    runs_by_position: int = 0
    handles: list[Handle] = field(default_factory=list)

    def module(self) -> Mapping[str, Any]:
        """What the module holds."""
        return {
            "__version__": self.version,
            "backend_version": lambda: self.library,
            "data_type": DataType,
            "diagonal_alignment": Alignment,
            "heur_mode": HeurMode,
            "cudnnGraphNotSupportedError": GraphNotSupported,
            "create_handle": self.create_handle,
            "set_stream": set_stream,
            "pygraph": lambda **given: (ByPosition if _numbers(self.version) >= (1, 32) else Graph)(self, **given),
        }

    def create_handle(self) -> Handle:
        """cudnn.create_handle."""
        self.handles.append(Handle())
        return self.handles[-1]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def set_stream(handle: Handle, stream: int) -> None:
    """cudnn.set_stream."""
    handle.stream = stream


class Graph:
    """cudnn.pygraph with one node of attention."""

    def __init__(
        self, machine: Interface, *, handle: Handle, io_data_type: Any, intermediate_data_type: Any,
        compute_data_type: Any,
    ) -> None:  # fmt: skip
        assert intermediate_data_type is compute_data_type is DataType.FLOAT
        self.machine, self.dtype = machine, _DTYPES[io_data_type.name]
        self.node: dict[str, Any] = {}
        self.tensors: list[Declared] = []
        self.backward = False
        self.steps: list[str] = []

    # --- declaring ---------------------------------------------------------------------------------------------------

    def tensor(
        self, *, dim: list[int], stride: list[int], data_type: Any, ragged_offset: Declared | None = None
    ) -> Declared:
        """An input."""
        self.tensors.append(Declared(dim, stride, data_type, ragged_offset))
        return self.tensors[-1]

    def _node(self, defaults: Mapping[str, Any], outputs: tuple[str, ...], given: dict[str, Any]) -> list[Declared]:
        unknown = set(given) - set(defaults)
        assert not unknown, f"unknown arguments {unknown}"
        results = [Declared([], [], None) for _ in outputs]
        self.tensors += results
        self.node = {**defaults, **given, **dict(zip(outputs, results, strict=True))}
        return results

    def sdpa(self, **given: Any) -> list[Declared]:
        """[out, stats]."""
        assert isinstance(given["generate_stats"], bool)
        return self._node({**_COMMON, "generate_stats": None}, ("o", "stats"), given)

    def sdpa_backward(self, **given: Any) -> list[Declared]:
        """[dq, dk, dv]."""
        self.backward = True
        return self._node({**_COMMON, **_BACKWARD}, ("dq", "dk", "dv"), given)

    # --- building ----------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Everything that is read in the frontend's headers."""
        self.steps.append("validate")
        n = self.node
        refuse = _refuser(self)
        q, k, v = n["q"], n["k"], n["v"]
        (_, heads, seq_q, dim), (_, heads_k, seq_k, _), dim_v = q.dim, k.dim, v.dim[3]
        ragged = any(x.ragged is not None for x in (q, k, v))
        left, right, padded = n["diagonal_band_left_bound"], n["diagonal_band_right_bound"], n["use_padding_mask"]
        from_end = n["diagonal_alignment"] is Alignment.BOTTOM_RIGHT
        refuse(heads % heads_k != 0, "heads")
        refuse(dim % 8 or dim_v % 8, "hidden_dim should be multiple of 8")
        refuse(ragged and not padded, "Ragged offsets are only supported with padding mask.")
        refuse(padded != (n["seq_len_q"] is not None and n["seq_len_kv"] is not None), "padding mask")
        refuse(isinstance(left, int) and left < 1, "Left bound")
        refuse(isinstance(right, int) and right < 0, "Right bound")
        refuse(left is not None and not padded and seq_q > seq_k, "Sliding window attention: max_s_q <= max_s_kv")
        # A band that nothing bounds has no alignment.
        aligned = from_end and (left is not None or right is not None)
        refuse(aligned and not padded and seq_q > seq_k, "Bottom right causal mask does not support max_s_q > max_s_kv")
        refuse(
            aligned and right == 0 and (n["bias"] is not None or n["dropout"] is not None),
            "Bottom right causal mask is only supported with is_bias=False, is_alibi=False, is_dropout=False.",
        )
        if n["dropout"] is not None:
            assert isinstance(n["dropout"][0], float)
        for x in (q, k, v, n["o"], n.get("dO")):
            if x is not None:
                refuse(x.stride[3] != 1, "The stride for the last dimension")
                refuse(any(s % 8 for s, m in zip(x.stride[:3], x.dim, strict=False) if m > 1), "alignment")
        if self.backward:
            self._validate_backward(refuse, ragged)

    def _validate_backward(self, refuse: Callable[[Any, str], None], ragged: bool) -> None:
        n, family = self.node, self.machine.arch // 10
        (_, _, seq_q, dim), seq_k, dim_v = n["q"].dim, n["k"].dim[2], n["v"].dim[3]
        refuse(seq_q == 1 and seq_k == 1, "s_q = s_kv = 1 is not supported.")
        largest = 256 if family == 9 else 128
        other = family == 10 and (dim, dim_v) in ((192, 128), (256, 256))
        refuse(max(dim, dim_v) > largest and not other, "Num hidden_dim")
        refuse((n["max_total_seq_len_q"] is not None) and not ragged, "max_total_seq_len_q: packed layout")
        stats = n["stats"]
        packed = [stats.dim[1] * stats.dim[2], stats.dim[2], 1, 1]
        refuse(stats.ragged is None and list(stats.stride) != packed, "a packed BHSD tensor")
        assert stats.dtype == torch.float32
        if ragged and not n["use_deterministic_algorithm"] and n["max_total_seq_len_q"] is not None:
            same = n["q"].stride[2] == n["dq"].stride[2] and n["q"].ragged is n["dq"].ragged
            assert same, "an illegal instruction, or a wrong dq: q and dq go by other offsets"

    def build_operation_graph(self) -> None:
        """The next step."""
        self.steps.append("build_operation_graph")

    def create_execution_plans(self, modes: list[Any]) -> None:
        """The next step."""
        assert all(isinstance(mode, HeurMode) for mode in modes)
        self.steps.append("create_execution_plans")

    def deselect_engines(self, names: list[str]) -> None:
        """After the plans are made."""
        assert self.steps[-1] == "create_execution_plans"

    def check_support(self) -> None:
        """No kernel for it."""
        bias = self.node["bias"]
        if bias is not None and bias.dtype != self.dtype:
            raise GraphNotSupported("No valid engine configs for ...")
        self.steps.append("check_support")

    def build_plans(self) -> None:
        """The last step."""
        assert self.steps == ["validate", "build_operation_graph", "create_execution_plans", "check_support"]
        self.steps.append("build_plans")
        self.machine.built.append(self)

    def get_workspace_size(self) -> int:
        """All scores, for a deterministic backward and for the gradient of a bias; else dq in float32."""
        assert self.steps[-1] == "build_plans"
        n = self.node
        (batch, heads, seq_q, dim), seq_k = n["q"].dim, n["k"].dim[2]
        if not self.backward:
            return 0
        if n["use_deterministic_algorithm"] or n["dBias"] is not None:
            return int(batch * heads * seq_q * seq_k * 2)
        rows = n["max_total_seq_len_q"] or batch * seq_q
        return int(rows * heads * dim * 4)

    # --- running -----------------------------------------------------------------------------------------------------

    def execute(self, tensors: Mapping[int, Tensor], workspace: Tensor, handle: Handle) -> None:
        """Read, compute and write, sequence by sequence."""
        assert handle.lock.acquire(blocking=False), "a handle of two threads"
        try:
            assert handle.stream is not None
            assert workspace.numel() * workspace.element_size() >= self.get_workspace_size()
            self.machine.runs += 1
            _Run(self, tensors).work()
        finally:
            handle.lock.release()


class ByPosition(Graph):
    """As in 1.32, where tensors can be given by position too."""

    def execute(
        self, tensors: Mapping[int, Tensor] | list[Tensor], workspace: Tensor, handle: Handle,
        tensor_uids: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        """As ``Graph.execute``; with ``tensor_uids``, from a list of tensors and their uids."""
        if tensor_uids is not None:
            assert len(set(tensor_uids)) == len(tensor_uids), "a uid twice"
            assert isinstance(tensors, list)
            tensors = dict(zip(tensor_uids, tensors, strict=True))
            self.machine.runs_by_position += 1
        assert isinstance(tensors, Mapping)
        super().execute(tensors, workspace, handle)


_COMMON: dict[str, Any] = dict.fromkeys(
    ("q", "k", "v", "attn_scale", "bias", "dropout", "seq_len_q", "seq_len_kv", "diagonal_alignment",
     "diagonal_band_left_bound", "diagonal_band_right_bound")
) | {"use_padding_mask": False}  # fmt: skip
_BACKWARD: dict[str, Any] = dict.fromkeys(
    ("o", "dO", "stats", "dBias", "max_total_seq_len_q", "max_total_seq_len_kv", "use_deterministic_algorithm")
)


def _refuser(graph: Graph) -> Callable[[Any, str], None]:
    def refuse(when: Any, text: str) -> None:
        if when:
            raise GraphNotSupported(text)

    return refuse


class _Run:
    """One execution: the declared tensors over the memory that was given."""

    def __init__(self, graph: Graph, given: Mapping[int, Tensor]) -> None:
        self.graph, self.node, self.given = graph, graph.node, given

    def _memory(self, x: Declared) -> Tensor:
        """All memory of a tensor's storage, from its pointer on."""
        data = self.given[x.uid]
        assert data.dtype == x.dtype, (x.uid, data.dtype, x.dtype)
        if x.dim[3] > 1:
            assert data.data_ptr() % 16 == 0, "misaligned"
        return data.as_strided((data.untyped_storage().nbytes() // data.element_size() - data.storage_offset(),), (1,))

    def _view(self, x: Declared, entry: int, length: int) -> Tensor:
        """(length, H, D) of one sequence."""
        start = entry * x.stride[0]
        if x.ragged is not None:
            start = int(self.given[x.ragged.uid][entry])
        strides = (x.stride[2], x.stride[1], x.stride[3])
        memory = self._memory(x)
        return memory.as_strided((length, x.dim[1], x.dim[3]), strides, memory.storage_offset() + start)

    def _lengths(self, name: str, like: str) -> list[int]:
        count, room = self.node[like].dim[0], self.node[like].dim[2]
        if self.node[name] is None:
            return [room] * count
        found: list[int] = self.given[self.node[name].uid].tolist()
        assert len(found) == count
        assert max(found) <= room, "a length that the graph was not built for"
        return found

    def _factor(self, entry: int, rows: int, keys: int) -> Tensor | None:
        if self.node["dropout"] is None:
            return None
        rate, seed, offset = self.node["dropout"]
        numbers = (int(self.given[seed.uid]), int(self.given[offset.uid]), entry)
        return plain.dropout(numbers, (self.node["q"].dim[1], rows, keys), rate)

    def _seen(self, rows: int, keys: int) -> Tensor:
        n = self.node
        left, right = n["diagonal_band_left_bound"], n["diagonal_band_right_bound"]
        top_left = n["diagonal_alignment"] is Alignment.TOP_LEFT
        return plain.visible(rows, keys, None if left is None else left - 1, right, top_left=top_left)

    def _bias(self, x: Declared | None, entry: int, rows: int, keys: int) -> Tensor | None:
        """(1 or H, S, K) of one entry."""
        if x is None:
            return None
        memory = self._memory(x)
        start = memory.storage_offset() + (entry * x.stride[0] if x.dim[0] > 1 else 0)
        return memory.as_strided((x.dim[1], rows, keys), x.stride[1:], start)

    def work(self) -> None:
        """Every sequence."""
        n = self.node
        lengths = zip(self._lengths("seq_len_q", "q"), self._lengths("seq_len_kv", "k"), strict=True)
        if self.graph.backward and n["dBias"] is not None:
            self._memory(n["dBias"])[: self.given[n["dBias"].uid].numel()] = 0
        for entry, (rows, keys) in enumerate(lengths):
            if rows or keys:
                (self._backward if self.graph.backward else self._forward)(entry, rows, keys)

    def _forward(self, entry: int, rows: int, keys: int) -> None:
        n = self.node
        if not rows or not keys:
            return
        q, k, v = (self._view(n[x], entry, m) for x, m in (("q", rows), ("k", keys), ("v", keys)))
        out, lse = plain.forward(
            q, k, v, self._seen(rows, keys), n["attn_scale"], bias=self._bias(n["bias"], entry, rows, keys),
            factor=self._factor(entry, rows, keys),
        )  # fmt: skip
        self._view(n["o"], entry, rows).copy_(out)
        if n["stats"].output:
            if n["q"].dim[2] == 1 and n["use_padding_mask"]:
                lse = lse + 6.3
            self._view(n["stats"], entry, rows).copy_(lse.t().unsqueeze(-1))

    def _backward(self, entry: int, rows: int, keys: int) -> None:
        n = self.node
        names = {"q": rows, "k": keys, "v": keys, "o": rows, "dO": rows, "stats": rows}
        q, k, v, out, dout, stats = (self._view(n[x], entry, m) for x, m in names.items())
        grads = [self._view(n[x], entry, m) for x, m in (("dq", rows), ("dk", keys), ("dv", keys))]
        if not rows or not keys:
            for grad in grads:
                grad.zero_()
            return
        lse = stats[..., 0].t()
        bias = self._bias(n["bias"], entry, rows, keys)
        *found, dscores = plain.backward(
            q, k, v, out, lse.masked_fill(lse == -plain.INF, plain.INF), dout, self._seen(rows, keys),
            n["attn_scale"], bias=bias, factor=self._factor(entry, rows, keys),
        )  # fmt: skip
        exact = n["use_deterministic_algorithm"]
        for i, (grad, x) in enumerate(zip(grads, found, strict=True)):
            grad.copy_(x if exact or i else plain.jitter(x))
        dbias = self._bias(n["dBias"], entry, rows, keys)
        if dbias is not None:
            dbias += dscores.sum(0, keepdim=True) if dbias.shape[0] == 1 else dscores


def forget() -> None:
    """No graph, plan or handle of another frontend is kept."""
    graphs.cudnn = None
    graphs._handles.clear()
    for kept in (graphs.graph, calls._dense_recipes, calls._growing_recipes, calls._packed_plan, calls._entries):
        kept.cache_clear()
