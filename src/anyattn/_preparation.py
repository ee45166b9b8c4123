"""From a validated request to everything that does not depend on data: settled once per kind of call, and cached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from anyattn import _select
from anyattn._call import Backend, Rows, Spec
from anyattn._environment import arch_of
from anyattn._errors import NoBackend, Refused
from anyattn._problem import Problem, length_class
from anyattn._request import Meta, Request
from anyattn._select import Explanation, Kernel
from anyattn._validate import Sizes, validate
from anyattn.backends import get as get_backend

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Layout:
    """How the caller's tensors become (B, S, H, D) or (T, H, D), and back."""

    name: str
    flattened: bool
    """4-D tensors with a packing: entries are flattened to rows."""
    batch: int
    seq_q: int
    seq_k: int
    head_dim: int
    head_dim_v: int
    is_identity: bool
    """The caller's layout is the kernel's."""

    def enter(self, x: Tensor) -> Tensor:
        """From the caller's layout."""
        if self.name == "bhsd":
            x = x.transpose(1, 2)
        elif self.name == "sbhd":
            x = x.transpose(0, 1)
        return x.flatten(0, 1) if self.flattened else x

    def leave(self, x: Tensor) -> Tensor:
        """To the caller's layout: out, dq."""
        return self._leave(x, self.seq_q)

    def leave_keys(self, x: Tensor) -> Tensor:
        """To the caller's layout: dk, dv."""
        return self._leave(x, self.seq_k)

    def _leave(self, x: Tensor, seq: int) -> Tensor:
        if self.flattened:
            x = x.unflatten(0, (self.batch, seq))
        if self.name == "bhsd":
            return x.transpose(1, 2)
        return x.transpose(0, 1) if self.name == "sbhd" else x

    def enter_lse(self, x: Tensor) -> Tensor:
        """(B, H, S) to (H, T), where entries are flattened; kernels read it as it lies in memory."""
        return x.transpose(0, 1).flatten(1, 2).contiguous() if self.flattened else x

    def leave_lse(self, x: Tensor) -> Tensor:
        """(H, T) to (B, H, S), where entries are flattened."""
        return x.unflatten(1, (self.batch, self.seq_q)).transpose(0, 1) if self.flattened else x


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that a kind of call needs, settled once."""

    request: Request
    explanation: Explanation
    kernel: Kernel
    backend: Backend
    spec: Spec
    recorded: Spec
    """The same for a forward of which autograd's graph holds all, lse included: the kernel may leave lse out."""
    layout: Layout
    packed: bool
    empty: bool
    """Nothing to compute: no kernel runs."""
    bare: bool
    """A forward with nothing to do around the kernel: no gradient, layout, padding, sink, cast or lse."""
    direct: bool
    """The kernel gets q, k and v as the caller has them, and no sink."""
    final: bool
    """What the kernel gives is the result: no sink, padding or head dim of ours, and its device is the current one."""
    fill_q: bool
    """Rows outside every sequence may be left unwritten in out and dq."""
    fill_k: bool
    """The same for dk and dv."""
    fill_lse: bool
    """Somebody may look at lse in rows outside every sequence."""
    sanitize: bool
    dims: tuple[int, int] | None
    """(head_dim, head_dim_v) that the kernel is run with, where they are padded to that."""
    needs_backward: bool
    return_lse: bool
    core_sink: bool
    """The sink is applied here, from (out, lse)."""
    cast: torch.dtype | None
    """Autocast's dtype for float32 q, k and v."""
    lse_dtype: torch.dtype
    device: int | None
    """Index of the CUDA device, where there are several."""


class Inputs(NamedTuple):
    """The tensors of a call that carry no gradient, beside q, k, v, sink and bias."""

    rows_q: Rows | None
    rows_k: Rows | None
    alibi: Tensor | None
    mask: Tensor | None
    block_mask: Any
    seed: Tensor | None = None
    """For dropout, where it was drawn outside."""


# --- preparation ---


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sides(request: Request, sizes: Sizes) -> tuple[int | None, int | None]:
    """(left, right), causality folded in; as far as any row is from another is unbounded, and no kernel's int32."""
    far = max(sizes.seq_q, sizes.seq_k)
    left, right = (None if side is None or side >= far else side for side in request.window or (None, None))
    if request.causal:
        right = 0
    return left, right


def describe_problem(request: Request, sizes: Sizes, arch: int) -> Problem:
    """The kind of call, for choosing."""
    left, right = _sides(request, sizes)
    packed = request.packing is not None
    seq_q, seq_k = sizes.seq_q, sizes.seq_k
    relation: Any = "equal" if seq_q == seq_k else ("keys_longer" if seq_k > seq_q else "any")
    gaps = False
    if request.packing is not None:
        keys = request.packing_kv or request.packing
        seq_q, seq_k, relation = request.packing[1], keys[1], request.relation
        gaps = _has_gaps(request.packing, sizes, sizes.seq_q) or _has_gaps(keys, sizes, sizes.seq_k)
    deterministic = request.torch_deterministic if request.deterministic is None else request.deterministic
    grad = any(x.requires_grad for x in (request.q, request.k, request.v))
    sink_grad = request.sink is not None and request.sink.requires_grad
    bias_grad = request.bias is not None and request.bias.requires_grad
    top_left = request.causal == "top_left"
    problem = Problem(
        arch=arch,
        dtype=_dtype_name(_compute_dtype(request)),
        form="packed" if packed else "dense",
        head_dim=sizes.head_dim,
        head_dim_v=sizes.head_dim_v,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        seqlen_q=length_class(seq_q),
        seqlen_k=length_class(seq_k),
        relation=relation,
        gaps=gaps,
        causal=right == 0,
        left=left is not None,
        right=bool(right),
        top_left=top_left and relation != "equal",
        softcap=bool(request.softcap),
        sink=_dtype_name(request.sink.dtype) if request.sink is not None else None,
        alibi=None
        if request.alibi_slopes is None
        else ("heads" if len(request.alibi_slopes.shape) == 1 else "sequences"),
        bias=_dtype_name(request.bias.dtype) if request.bias is not None else None,
        mask=None if request.mask is None else ("tensor" if isinstance(request.mask, Meta) else "block"),
        dropout=request.dropout > 0,
        nonpositive_scale=request.scale is not None and request.scale <= 0,
        grad=grad,
        sink_grad=sink_grad,
        bias_grad=bias_grad,
        lse_grad=request.return_lse and (grad or sink_grad or bias_grad),
        return_lse=request.return_lse,
        deterministic=deterministic,
        torch_deterministic=request.torch_deterministic,
        num_splits=request.num_splits,
    )
    return problem


def _compute_dtype(request: Request) -> torch.dtype:
    dtype = request.q.dtype
    return request.autocast if request.autocast is not None and dtype == torch.float32 else dtype


def _has_gaps(packing: tuple[Any, ...], sizes: Sizes, rows: int) -> bool:
    """Whether rows of the tensor may lie outside every sequence."""
    return bool(packing[3]) or packing[2] != rows * sizes.batch


def _written(packing: tuple[Any, ...], sizes: Sizes, rows: int) -> bool:
    """Whether a kernel that gets gaps as sequences writes all of them: each within max_seqlen, and no row beyond."""
    return bool(packing[7]) and packing[2] == rows * sizes.batch


def explain(request: Request, installed: _select.World | None, arch: int | None) -> Explanation:
    """Validate a request and choose; for ``explain()``."""
    sizes = validate(request)
    problem = describe_problem(request, sizes, arch_of(request.q.device) if arch is None else arch)
    if installed is not None:
        return _select.choose(problem, _preference(request), installed)
    return _select.choose(problem, _preference(request), _select.world(), _select.refusals_of(request))


def _preference(request: Request) -> _select.Preference:
    if request.backend == "auto":
        return request.preference
    return _select.parse_preference(request.backend)


def _wish(request: Request) -> str:
    """Who asked for some backends alone, where the call itself did not."""
    if request.backend != "auto" or "auto" in request.preference:
        return ""
    by = "anyattn.use()" if _select.preference_is_of_use() else "the environment variable ANYATTN_BACKEND"
    return f"{', '.join(request.preference)} alone is asked for by {by}"


def prepare(request: Request) -> Prepared:
    """Validate, choose, and settle everything that does not depend on data.

    Raises:
        InvalidArgument: see ``validate``.
        NoBackend: nothing that is allowed takes the call.
    """
    sizes = validate(request)
    problem = describe_problem(request, sizes, arch_of(request.q.device))
    preference = _preference(request)
    refusals = _select.refusals_of(request)
    explanation = _select.choose(problem, preference, _select.world(), refusals)
    while explanation.forward is not None and not _select.ready(explanation.forward.backend):
        explanation = _select.choose(problem, preference, _select.world(), refusals)
    kernel = explanation.forward
    if kernel is None:
        raise NoBackend(explanation, _wish(request))
    return _settle(request, sizes, problem, explanation, kernel)


def _sees_key(problem: Problem) -> bool:
    """Whether every real query row is known to see at least one key: its own position, or any."""
    if problem.mask is not None or problem.bias is not None:
        return False
    return problem.relation != "any" or (problem.form == "dense" and not problem.shape_matters)


def _index(device: torch.device) -> int | None:
    """Of a CUDA device, where there are several: with one, it is the current one."""
    if device.type != "cuda" or torch.cuda.device_count() == 1:
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _settle(request: Request, sizes: Sizes, problem: Problem, explanation: Explanation, kernel: Kernel) -> Prepared:
    core_sink = problem.sink is not None and not kernel.native_sink
    packed = problem.form == "packed"
    keys = request.packing_kv or request.packing
    spec = _spec(request, sizes, problem, core_sink)
    sequences = 1 if request.packing is None else request.packing[0]
    dims = (sizes.batch, sequences, sizes.seq_q, sizes.seq_k, sizes.num_heads, problem.seqlen_q, problem.seqlen_k)
    gaps_q = packed and _has_gaps(request.packing or (), sizes, sizes.seq_q)
    gaps_k = packed and _has_gaps(keys or (), sizes, sizes.seq_k)
    sanitize = packed and bool((request.packing or (False,))[5] or (keys or (False,))[5]) and not kernel.ignores_gaps
    layout = Layout(
        sizes.layout,
        packed and sizes.layout != "thd",
        sizes.batch,
        sizes.seq_q,
        sizes.seq_k,
        sizes.head_dim,
        sizes.head_dim_v,
        sizes.layout == "thd" or (sizes.layout == "bshd" and not packed),
    )
    backend = get_backend(kernel.backend)
    around = (
        problem.needs_backward, problem.return_lse, problem.sink is not None, gaps_q, gaps_k, sanitize, 0 in dims,
        request.autocast is not None, not layout.is_identity, kernel.dims is not None,
    )  # fmt: skip
    fill_q = gaps_q and not (kernel.writes_gaps and _written(request.packing or (), sizes, sizes.seq_q))
    fill_lse = gaps_q and (problem.return_lse or problem.sink is not None)
    device = _index(request.q.device)
    left_to_do = core_sink, fill_q, fill_lse, 0 in dims, kernel.dims is not None, device is not None
    return Prepared(
        request=request,
        explanation=explanation,
        kernel=kernel,
        backend=backend,
        spec=spec,
        recorded=_recorded(spec, problem, backend),
        layout=layout,
        packed=packed,
        empty=0 in dims,
        bare=not any(around),
        direct=layout.is_identity and not sanitize and kernel.dims is None and problem.sink is None,
        final=not any(left_to_do),
        fill_q=fill_q,
        fill_k=gaps_k and not (kernel.writes_gaps and _written(keys or (), sizes, sizes.seq_k)),
        fill_lse=fill_lse,
        sanitize=sanitize,
        dims=kernel.dims,
        needs_backward=problem.needs_backward,
        return_lse=problem.return_lse,
        core_sink=core_sink,
        cast=request.autocast,
        lse_dtype=torch.float64 if problem.dtype == "float64" else torch.float32,
        device=device,
    )


def _spec(request: Request, sizes: Sizes, problem: Problem, core_sink: bool) -> Spec:
    left, right = _sides(request, sizes)
    return Spec(
        scale=sizes.head_dim**-0.5 if request.scale is None else float(request.scale),
        softcap=float(request.softcap or 0.0),
        left=left,
        right=right,
        top_left=problem.top_left,
        dropout=float(request.dropout),
        deterministic=problem.deterministic,
        need_lse=problem.needs_backward or problem.return_lse or core_sink,
        equal_lengths=problem.relation == "equal",
        sees_key=_sees_key(problem),
        needs_backward=problem.needs_backward,
        bias_grad=problem.bias_grad,
        num_splits=problem.num_splits,
    )


def _recorded(spec: Spec, problem: Problem, backend: Backend) -> Spec:
    """A spec without lse, where only the backward of a backend that keeps its own would look at it."""
    seen = problem.return_lse or problem.sink is not None or not getattr(backend, "KEEPS_LSE", False)
    return spec if seen else replace(spec, need_lse=False, memo={})


def run_accepted(prepare: Callable[[], Prepared], run: Callable[[Prepared], T], drop: Callable[[], None]) -> T:
    """Run a call on the first kernel whose own check accepts it.

    ``prepare`` chooses, ``drop`` makes it choose anew. What a check says is held against later calls of the same
    request, unless it says that it speaks of this moment only.
    """
    passing: list[Request] = []
    try:
        while True:
            p = prepare()
            try:
                return run(p)
            except Refused as refused:
                _select.refuse(p.request, p.kernel, str(refused))
                if not refused.lasting:
                    passing.append(p.request)
                drop()
    finally:
        for request in passing:
            _select.forgive(request)
            drop()
