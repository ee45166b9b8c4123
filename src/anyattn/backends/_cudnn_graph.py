"""Graphs of nvidia-cudnn-frontend: what a call looks like to cuDNN, and the graph built for it, kept and run.

Nothing here knows of the contract between core and backends. Legend: N sequences (or batch entries), H heads, S seq,
D head_dim; cuDNN's tensors are (N, H, S, D) with strides, whatever the layout in memory. In a packed batch the stride
of N means nothing: ragged offsets, in elements, say where each sequence begins.
"""

from __future__ import annotations

import importlib
import inspect
import threading
from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn._environment import one_line
from anyattn._errors import Refused

#: Names of the tensors of a graph: what a run gives a pointer for.
Q, K, V, OUT, STATS, DOUT, DQ, DK, DV, BIAS, DBIAS, SEED, OFFSET, LEN_Q, LEN_K = range(1, 16)
#: The i-th distinct table of ragged offsets.
RAGGED = 32

#: A workspace above this is refused: the deterministic backward on sm90, and that of a bias, keep all scores there.
LARGEST_WORKSPACE = 4 << 30

#: One of at most so many bytes is kept with its graph, for the default stream.
KEPT_WORKSPACE = 1 << 16

_DTYPES = {torch.float16: "HALF", torch.bfloat16: "BFLOAT16", torch.float32: "FLOAT"}


class Operand(NamedTuple):
    """A tensor as cuDNN sees it."""

    dims: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    ragged: int = -1
    """Which table of offsets it goes by; -1 is none."""


class Band(NamedTuple):
    """Which keys a query sees: ``-left < key - query <= right``, both counted from an end; None is unbounded."""

    left: int | None
    right: int | None
    bottom_right: bool


class Recipe(NamedTuple):
    """All that a graph is built from, and the key under which it is kept."""

    device: int
    dtype: torch.dtype
    backward: bool
    q: Operand
    k: Operand
    v: Operand
    out: Operand
    stats: Operand | None
    """(N, H, S, 1); None: not asked for."""
    scale: float
    band: Band
    dropout: float = 0.0
    bias: Operand | None = None
    lengths: bool = False
    """Lengths of every sequence are given: what lies behind is padding."""
    wide: bool = False
    """Ragged offsets are int64."""
    rows: tuple[int, int] | None = None
    """At least the rows of q and of k, where they are packed: what bounds the workspace of backward."""
    dout: Operand | None = None
    grads: tuple[Operand, ...] = ()
    """Of q, k and v."""
    bias_grad: bool = False
    deterministic: bool = False


cudnn: Any = None


def load() -> str:
    """Import the package; the version of the cuDNN library that it found, like "9.19.0"."""
    global cudnn
    cudnn = importlib.import_module("cudnn")
    return version_text(int(cudnn.backend_version()))


def version_text(number: int) -> str:
    """91900 is "9.19.0"."""
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def contiguous(dims: tuple[int, int, int, int], ragged: int = -1) -> Operand:
    """Of a fresh tensor (N, S, H, D), or (rows, H, D): by row, then by head."""
    _, heads, seq, dim = dims
    return Operand(dims, (seq * heads * dim, dim, heads * dim, 1), ragged)


# --- building ------------------------------------------------------------------------------------------------------


class Graph:
    """A built graph. ``run`` may be called from any thread."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self._size = max(int(graph.get_workspace_size()), 1)
        self._lock = threading.Lock()
        #: Tensors by position, with their names beside: that form passes through none of the package's Python.
        self._by_position = _takes_names(graph)
        self._workspace: Tensor | None = None
        if self._size > LARGEST_WORKSPACE:
            raise Refused(
                f"cuDNN needs a workspace of {self._size / 2**30:.1f} GiB for these lengths, more than the "
                f"{LARGEST_WORKSPACE >> 30} GiB that anyattn allows"
            )

    def run(self, tensors: Mapping[int, Tensor], device: torch.device) -> None:
        """Launch on the current stream."""
        stream = current_stream(device)
        pool = _handles[device.index or 0]
        handle = _taken(pool)
        try:
            cudnn.set_stream(handle=handle, stream=stream)
            with self._lock:
                workspace = self._workspace if stream == 0 else None
                if workspace is None:
                    workspace = self._fresh_workspace(stream, device)
                if self._by_position:
                    self._graph.execute([*tensors.values()], workspace, handle=handle, tensor_uids=(*tensors,))
                else:
                    self._graph.execute(tensors, workspace, handle=handle)
        finally:
            pool.append(handle)

    def _fresh_workspace(self, stream: int, device: torch.device) -> Tensor:
        """From torch's allocator: streams and captures own it.

        A small one is kept for the default stream, which no CUDA graph can capture, and on which the lock keeps the
        launches of one run together: nothing else writes to it in between.
        """
        workspace = torch.empty(self._size, dtype=torch.uint8, device=device)
        if stream == 0 and self._size <= KEPT_WORKSPACE:
            self._workspace = workspace
        return workspace


def _takes_names(graph: Any) -> bool:
    """Whether ``execute`` takes tensors by position: since 1.32."""
    try:
        return "tensor_uids" in inspect.signature(graph.execute).parameters
    except ValueError:  # a compiled function, as in older versions
        return False


#: Idle cuDNN handles by device: no handle serves two threads at a time.
_handles: defaultdict[int, list[Any]] = defaultdict(list)


def _taken(pool: list[Any]) -> Any:
    """A handle of the current device that nobody else uses until it is given back."""
    try:
        return pool.pop()
    except IndexError:
        return cudnn.create_handle()


def current_stream(device: torch.device) -> int:
    """The address of torch's current stream."""
    index = torch.cuda.current_device() if device.index is None else device.index
    address: int = torch._C._cuda_getCurrentRawStream(index)
    return address


@lru_cache(maxsize=1024)
def graph(recipe: Recipe) -> Graph:
    """The graph of a recipe, built at its first use: tens of milliseconds and more.

    Raises:
        Refused: cuDNN has no kernel for it.
    """
    pool = _handles[recipe.device]
    handle = _taken(pool)
    try:
        made = _declared(recipe, handle)
        made.validate()
        made.build_operation_graph()
        made.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        # The package's own compiled kernels: another set of conventions, and seconds to compile.
        made.deselect_engines(["sdpa_fwd", "sdpa_bwd"])
        made.check_support()
        made.build_plans()
    except Exception as error:  # its own error, and RuntimeError, ValueError, NotImplementedError
        raise Refused(f"cuDNN refuses it: {one_line(error)}") from error
    finally:
        pool.append(handle)
    return Graph(made)


def _type(dtype: torch.dtype) -> Any:
    return getattr(cudnn.data_type, _DTYPES[dtype])


class _Tensors:
    """Declares the tensors of one graph."""

    def __init__(self, made: Any, recipe: Recipe) -> None:
        self.made, self.recipe = made, recipe
        self.tables: dict[int, Any] = {}

    def plain(self, uid: int, dims: tuple[int, ...], strides: tuple[int, ...], dtype: Any, **more: Any) -> Any:
        made = self.made.tensor(dim=list(dims), stride=list(strides), data_type=dtype, **more)
        made.set_uid(uid)
        return made

    def small(self, uid: int, count: int, dtype: Any) -> Any:
        return self.plain(uid, (count, 1, 1, 1), (1, 1, 1, 1), dtype)

    def table(self, which: int) -> Any:
        """A table of ragged offsets, or None."""
        if which < 0:
            return None
        if which not in self.tables:
            dtype = cudnn.data_type.INT64 if self.recipe.wide else cudnn.data_type.INT32
            self.tables[which] = self.small(RAGGED + which, self.recipe.q.dims[0] + 1, dtype)
        return self.tables[which]

    def operand(self, uid: int, operand: Operand, dtype: torch.dtype | None = None) -> Any:
        table = self.table(operand.ragged)
        more = {} if table is None else {"ragged_offset": table}
        return self.plain(uid, operand.dims, operand.strides, _type(dtype or self.recipe.dtype), **more)

    def result(self, tensor: Any, uid: int, operand: Operand, dtype: torch.dtype | None = None) -> None:
        tensor.set_output(True).set_uid(uid).set_dim(list(operand.dims)).set_stride(list(operand.strides))
        tensor.set_data_type(_type(dtype or self.recipe.dtype))
        if operand.ragged >= 0:
            tensor.set_ragged_offset(self.table(operand.ragged))

    def options(self) -> dict[str, Any]:
        """The arguments that both directions have."""
        recipe, count = self.recipe, self.recipe.q.dims[0]
        align = cudnn.diagonal_alignment
        found: dict[str, Any] = {
            "attn_scale": float(recipe.scale),
            "diagonal_alignment": align.BOTTOM_RIGHT if recipe.band.bottom_right else align.TOP_LEFT,
            "diagonal_band_left_bound": recipe.band.left,
            "diagonal_band_right_bound": recipe.band.right,
        }
        if recipe.lengths:
            int32 = cudnn.data_type.INT32
            found["use_padding_mask"] = True
            found["seq_len_q"] = self.small(LEN_Q, count, int32)
            found["seq_len_kv"] = self.small(LEN_K, count, int32)
        if recipe.bias is not None:
            found["bias"] = self.operand(BIAS, recipe.bias)
        if recipe.dropout:
            int64 = cudnn.data_type.INT64
            found["dropout"] = (recipe.dropout, self.small(SEED, 1, int64), self.small(OFFSET, 1, int64))
        return found


def _declared(recipe: Recipe, handle: Any) -> Any:
    """A graph of one node, not yet checked."""
    made = cudnn.pygraph(
        handle=handle,
        io_data_type=_type(recipe.dtype),
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
    )
    tensors = _Tensors(made, recipe)
    q, k, v = (tensors.operand(u, x) for u, x in ((Q, recipe.q), (K, recipe.k), (V, recipe.v)))
    if not recipe.backward:
        out, stats = made.sdpa(q=q, k=k, v=v, generate_stats=recipe.stats is not None, **tensors.options())
        tensors.result(out, OUT, recipe.out)
        if recipe.stats is not None:
            tensors.result(stats, STATS, recipe.stats, torch.float32)
        return made
    assert recipe.stats is not None
    assert recipe.dout is not None
    options = tensors.options()
    if recipe.rows is not None:
        options["max_total_seq_len_q"], options["max_total_seq_len_kv"] = recipe.rows
    if recipe.bias_grad:
        assert recipe.bias is not None
        options["dBias"] = tensors.operand(DBIAS, recipe.bias)
        options["dBias"].set_output(True)
    dq, dk, dv = made.sdpa_backward(
        q=q,
        k=k,
        v=v,
        o=tensors.operand(OUT, recipe.out),
        dO=tensors.operand(DOUT, recipe.dout),
        stats=tensors.operand(STATS, recipe.stats, torch.float32),
        use_deterministic_algorithm=recipe.deterministic,
        **options,
    )
    for result, uid, operand in zip((dq, dk, dv), (DQ, DK, DV), recipe.grads, strict=True):
        tensors.result(result, uid, operand)
    return made
