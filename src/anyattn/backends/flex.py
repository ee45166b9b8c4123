"""FlexAttention (torch.nn.attention.flex_attention): any mask, any bias, through a compiler.

Each kind of call is compiled at its first use: seconds on CUDA, and again in the first backward. Packed documents,
causality and windows become block masks, made once per packing from its offsets. FlexAttention gives gradients through
autograd only: forward keeps the graph that it made, and backward runs it; where there is none, backward first repeats
forward. Only the compiled kernel ever runs: the unfused one keeps all scores in memory.

The CPU kernel has no lse, no gradient, and is compiled for each shape anew: it is the last choice.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from anyattn._call import Call, Gradients, Result, Saved
from anyattn._capability import ALWAYS, Capability, HeadDims, Reason, Row
from anyattn._environment import Probe, module_exists, one_line, torch_version
from anyattn._errors import Refused
from anyattn._problem import Problem
from anyattn.backends._flex_call import Run, entries_of, run_of, spanned
from anyattn.backends._flex_compiled import compiled, forget, kernel_options
from anyattn.backends._flex_tiles import shrink, tile_options

NAME = "flex"
TITLE = "FlexAttention, torch's compiler for any mask"
INSTALL = "pip install torch"
NEWEST = "2.13.0"
#: Its graph holds the lse that its backward needs: none is asked for where nobody else looks at it.
KEEPS_LSE = True
#: torch.compile traces it with a BlockMask, whose function no custom op takes.
TRACES_BLOCK_MASKS = True

_ISSUES = "https://github.com/pytorch/pytorch/issues"
_FEATURES = (
    "dense", "packed", "gaps", "causal", "window", "bottom_right", "top_left", "gqa", "unequal_head_dims", "softcap",
    "alibi", "alibi_per_sequence", "bias", "mask", "block_mask", "nonpositive_scale",
)  # fmt: skip


def _any(p: Problem) -> bool:
    return True


_ROWS = (
    Row(
        _any,
        Reason("installation", "Triton", "no triton package", "pip install triton, or a CUDA build of torch"),
        flag="no_triton",
    ),
    Row(
        # Its gradient is summed over rows, heads and entries by atomic additions, in any order.
        lambda p: p.deterministic and p.bias_grad,
        Reason(
            "a deterministic gradient of bias", "a kernel that sums it in one order", "atomic additions",
            "detach bias, or choose another backend",
        ),
        direction="backward",
    ),
    Row(
        lambda p: p.arch in (86, 89, 120) and max(p.head_dim, p.head_dim_v) > 128,
        Reason(
            "head_dim", "at most 128 on sm86, sm89 and sm120, by their shared memory", "more",
            "choose another backend", link=f"{_ISSUES}/180278",
        ),
    ),
)  # fmt: skip
_CPU_ROWS = (
    Row(
        _any,
        Reason("installation", "a C++ compiler", "none found", "install g++, or set CXX to a compiler"),
        flag="no_compiler",
    ),
    Row(
        _any,
        Reason("installation", "an x86 CPU with AVX2, on Linux", "another", "choose another backend"),
        flag="no_avx2",
    ),
    Row(
        lambda p: p.return_lse or p.sink is not None,
        Reason("lse, or a sink, which needs it", "a kernel that gives lse", "one without", "use a GPU, or do without"),
    ),
)

CAPABILITIES = (
    Capability(
        kernel="cuda",
        families=(8, 9, 10, 11, 12),
        dtypes=("float16", "bfloat16", "float32"),
        head_dims=HeadDims(maximum=256),
        features=dict.fromkeys((*_FEATURES, "bias_grad", "deterministic"), ALWAYS),
        lse_grad="native",
        rows=_ROWS,
    ),
    Capability(
        kernel="cpu",
        families=(0,),
        dtypes=("float16", "bfloat16", "float32"),
        head_dims=HeadDims(maximum=1 << 20),
        features=dict.fromkeys(_FEATURES, ALWAYS),
        backward_families=(),
        rank=3,
        rows=_CPU_ROWS,
    ),
)


# --- what is here ---


def probe() -> Probe:
    """Torch itself, with what its compiler needs beside it."""
    flags = set()
    if not module_exists("triton"):
        flags.add("no_triton")
    if shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")) is None:
        flags.add("no_compiler")
    if sys.platform == "darwin" or platform.machine() not in ("x86_64", "AMD64") or not _avx2():
        flags.add("no_avx2")
    return Probe(torch_version(), flags=frozenset(flags))


def _avx2() -> bool:
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


_options: tuple[tuple[str, Any], ...] = ()


def load() -> None:
    """Import FlexAttention, and with it torch's compiler."""
    global _options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch deprecates of itself
        importlib.import_module("torch._inductor.compile_fx")
    _options = kernel_options()


# --- the contract ---


class _Held:
    """A forward's graph, for one backward: out (B, H, S, D), lse (B, H, S) or None, and leaves as (B, S, H, D)."""

    def __init__(self, out: Tensor, lse: Tensor | None, leaves: tuple[Tensor, ...]) -> None:
        self.out, self.lse, self.leaves = out, lse, leaves
        self.returned: Tensor | None = None
        """lse as forward returned it."""
        self.used = False


def _recording() -> AbstractContextManager[Any]:
    """Autograd on, also within a custom op: dispatch leaves it, and functorch, out there. As in a thread of its own."""
    if not torch._C._dispatch_tls_local_exclude_set().has(torch._C.DispatchKey.AutogradFunctionality):
        return torch.enable_grad()
    return _outside_dispatch()


@contextmanager
def _outside_dispatch() -> Iterator[None]:
    with torch._C._ForceDispatchKeyGuard(*_untouched_dispatch()), torch.enable_grad():
        yield


@cache
def _untouched_dispatch() -> tuple[Any, Any]:
    """The dispatch keys that a thread includes and excludes at its start."""
    found: list[Any] = []

    def look() -> None:
        found.extend((torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return found[0], found[1]


def _compiled_call(call: Call, q: Tensor, k: Tensor, v: Tensor, lse: bool, bias: Tensor | None = None) -> Any:
    """(out, lse or None) from (B, S, H, D), out as (B, H, S, D), and from a leaf in place of bias."""
    run = run_of(call, lse, (*_options, *tile_options(call)) if q.is_cuda else ())
    if bias is not None:
        run = run._replace(terms=run.terms._replace(bias=bias))
    function = _function(call, run, q, k, v)
    try:
        return function(q, k, v, run.terms, run.tables, run.own)
    except torch._dynamo.exc.FailOnRecompileLimitHit:  # many masks of one function: a new code object has a new count
        call.spec.memo.pop("flex", None)
        forget(run.kind, q, k, v, run.own, torch.is_grad_enabled())
    except Exception as error:
        if not _does_not_compile(error):
            raise
        if not shrink("fwd", call, error):
            raise Refused(f"it does not compile: {one_line(getattr(error, 'inner_exception', error))}") from error
    return _compiled_call(call, q, k, v, lse, bias)


def _function(call: Call, run: Run, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """What ``compiled`` returns. The last one is kept: comparing costs less than hashing all that is constant in it."""
    grad = torch.is_grad_enabled()
    if torch.compiler.is_compiling() or run.own is not None:
        return compiled(run.kind, q, k, v, run.own, grad)
    key = (run.kind, q.shape, k.shape, v.shape, q.dtype, grad)
    last = call.spec.memo.get("flex")
    if last is None or last[0] != key:
        last = call.spec.memo["flex"] = (key, compiled(run.kind, q, k, v, None, grad))
    return last[1]


def _does_not_compile(error: Exception) -> bool:
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


def _enter(call: Call) -> list[Tensor]:
    """q, k and v without autograd, as (B, S, H, D)."""
    tensors = [x.detach() for x in (call.q, call.k, call.v)]
    return tensors if call.rows_q is None else [_unflattened(call, x) for x in tensors]


def _without_autograd(call: Call) -> Call:
    return call if call.bias is None else call._replace(bias=call.bias.detach())


def _unflattened(call: Call, x: Tensor) -> Tensor:
    entries = entries_of(call)
    return x.unsqueeze(0) if entries == 1 else x.view(entries, x.shape[0] // entries, *x.shape[1:])


def _leave(call: Call, out: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(out, lse) as the call has them, from out (B, H, S, D) and lse (B, H, S)."""
    out = out.detach().transpose(1, 2)
    lse = None if lse is None else lse.detach()
    if call.rows_q is None:
        return out, lse
    if out.shape[0] == 1:
        return out.squeeze(0), None if lse is None else lse.squeeze(0)
    return out.flatten(0, 1), None if lse is None else lse.transpose(0, 1).flatten(1, 2)


def _with_graph(call: Call, lse: bool) -> _Held:
    """Forward on leaves of its own. Bias enters in float32: its gradient is a sum over all that it is broadcast to."""
    with _recording():
        leaves = [x.requires_grad_() for x in _enter(call)]
        call = _without_autograd(call)
        bias, _ = spanned(call.bias) if call.spec.bias_grad else (None, None)
        if bias is not None:
            bias = bias.float().detach().requires_grad_()
            leaves.append(bias)
        out, own_lse = _compiled_call(call, leaves[0], leaves[1], leaves[2], lse, bias)
    return _Held(out, own_lse, tuple(leaves))


def forward(call: Call) -> Result:
    """See ``Backend.forward``."""
    if call.spec.needs_backward:
        held = _with_graph(call, call.spec.need_lse)
        out, held.returned = _leave(call, held.out, held.lse)
        return Result(out, held.returned, held=held)
    with torch.no_grad():
        q, k, v = _enter(call)
        out, lse = _compiled_call(_without_autograd(call), q, k, v, call.spec.need_lse)
        return Result(*_leave(call, out, lse))


def backward(call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None) -> Gradients:
    """See ``Backend.backward``."""
    try:
        return _backward(call, saved, dout, dlse)
    except Exception as error:  # the compiler gets to a backward when it first runs
        if not (_does_not_compile(error) and shrink("bwd", call, error)):
            raise
    return _backward(call, saved._replace(held=None), dout, dlse)


def _backward(call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None) -> Gradients:
    held: _Held | None = saved.held
    lse: Tensor | None = saved.lse
    if held is None or held.used:
        held = _with_graph(call, lse is not None)
    held.used = True
    # Where nobody asked for lse, nothing can have changed it.
    final = lse is None or (held.returned is not None and held.returned.data_ptr() == lse.data_ptr())
    out = saved.out
    if call.rows_q is not None:
        out, dout = _unflattened(call, out), _unflattened(call, dout)
        lse = None if lse is None else _lse_unflattened(call, lse)
        dlse = None if dlse is None else _lse_unflattened(call, dlse)
    dout = dout.transpose(1, 2)
    if not final and lse is not None:
        dout, dlse = _as_of_own(held, out.transpose(1, 2), lse, dout, dlse)
    outputs, incoming = [held.out], [dout.to(held.out.dtype)]
    if dlse is not None and held.lse is not None:
        outputs.append(held.lse)
        incoming.append(dlse)
    found = list(torch.autograd.grad(outputs, held.leaves, incoming))
    if call.rows_q is not None:
        found[:3] = [x.flatten(0, 1) for x in found[:3]]
    dbias = None
    if call.bias is not None and call.spec.bias_grad:
        dbias = found[3].to(call.bias.dtype).view(call.bias.shape)
    return Gradients(found[0], found[1], found[2], dbias)


def _lse_unflattened(call: Call, lse: Tensor) -> Tensor:
    """(H, T) to (B, H, S)."""
    shaped: Tensor = lse.unflatten(1, (entries_of(call), -1))
    return shaped.transpose(0, 1)


def _as_of_own(held: _Held, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of the kernel's own out and lse that say what dout and dlse say of the final ones, out and lse.

    All are (B, H, S, D) or (B, H, S). A backward uses p = exp(score - lse) and delta = rowsum(dout * out) - dlse. With
    r = exp(own lse - final lse), the final p is r times the own one: so dout becomes r * dout, and dlse what makes
    delta r times the final delta.
    """
    assert held.lse is not None
    mine = held.lse.detach()
    ratio = torch.exp(mine - lse).masked_fill_(~mine.isfinite(), 0.0)  # nothing is seen
    own = (dout * ratio.unsqueeze(-1)).to(dout.dtype)
    delta = (dout.float() * out.float()).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    return own, (own.float() * held.out.detach().float()).sum(-1) - ratio * delta
