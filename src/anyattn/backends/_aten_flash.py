"""torch's bundled FlashAttention 2, through its raw ops, dense and packed: used by ``torch`` and by ``varlen``.

Its conventions, measured on an H200 with torch 2.11 (docs/padding.md): bottom-right alignment; windows of two ints or
None; lse +inf for a row that sees no key; rows outside every sequence are neither read nor written; gaps given as
sequences of their own cost nothing. GQA needs no expanded keys. Deterministic only under torch's own flag.

Read in its C++ (flash_attn/flash_api.cpp, attention_backward.cu):

- Dropout draws from torch's generator of the current device. The state comes back as one uint64 (2,) on the device, in
  a CUDA graph as well, and backward reads it there. The rate of what is kept is rounded down to 8 bits, its factor not.
- A side of a window that is at least ``max_k`` counts as unbounded, and an unbounded one beside a bounded one as max_k.
  Both are wrong for queries further before the first key than that: packed calls name a longer ``max_k`` then.
- ``max_q`` of 1 with fewer kv heads takes each row of a packed q as a sequence: it is never below 2 here.
- The batch is a dim of the grid, which ends at 65535. 16 bytes are loaded at a time, wherever rows begin.

The public function has ``seqused_k``, ``block_table`` and ``num_splits`` from 2.12 on, for inference. They gain nothing
here: there is no ``seqused_q``, so that queries need gaps as sequences in any case, which cost nothing for keys either;
and the kernel splits keys only with pages. The ops are called with what 2.11 takes.

``torch.nn.attention.activate_flash_attention_impl`` puts FlashAttention 3 or 4 in the place of these ops, for the whole
process. They read gaps (NaN there reaches real rows), refuse dropout, have limits of their own by version, and torch
2.13 calls FlashAttention 4 as it was until 4.0.0b18. So these kernels stand aside while that lasts: ``OVERRIDDEN``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyattn._call import Call, Gradients, Result, Saved
from anyattn._capability import Reason, Row
from anyattn._environment import Probe, flash_override
from anyattn._errors import Refused
from anyattn._problem import Problem
from anyattn._random import seeded
from anyattn.backends._raw import aligned, check_batch

INF = float("inf")
_FLAG = "flash_override"
#: A side of a window that is as good as unbounded, and fits the kernel's ints.
_FAR = 1 << 30


def _small_gpu(p: Problem) -> bool:
    """Less than 144 KB of shared memory per block."""
    return p.arch in (86, 89) or p.arch // 10 == 12


def _dim_224(p: Problem) -> bool:
    return _small_gpu(p) and 192 < p.head_dim <= 224


def _dim_256_with_dropout(p: Problem) -> bool:
    return _small_gpu(p) and p.head_dim > 224 and p.dropout


_SDP_UTILS = "https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/transformers/cuda/sdp_utils.cpp"
_SMALL_GPU = "sm8.6, sm8.9 or sm12.x"

#: What these kernels cannot do whose columns do not say it.
ROWS = (
    # The kernel takes an unbounded right side, beside a bounded left one, as the longest key length. That hides keys
    # from queries further before the first key than there are keys: seen on an H200 with torch 2.11, forward too.
    # Packed, a longer key length can be named.
    Row(
        lambda p: p.form == "dense" and p.left and not p.right and not p.causal and p.relation == "any",
        Reason("a window bounded on the left alone", "no more queries than keys", "more",
               "add a bound on the right, or choose another backend"),
    ),
    Row(
        _dim_224,
        Reason("head_dim in backward", "at most 192, or above 224, on " + _SMALL_GPU, "one in between",
               "pad head_dim to 232, or choose another backend", link=_SDP_UTILS),
        direction="backward",
    ),
    Row(
        _dim_256_with_dropout,
        Reason("dropout in backward", "a head_dim of at most 192 on " + _SMALL_GPU, "a larger one",
               "leave out dropout, or choose another backend", link=_SDP_UTILS),
        direction="backward",
    ),
    Row(
        lambda p: True,
        Reason("torch's own flash kernels", "FlashAttention 2, as torch brings it",
               "another one in its place (torch.nn.attention.activate_flash_attention_impl)",
               'use backend="fa3" or "fa4", or call torch.nn.attention.restore_flash_attention_impl()'),
        flag=_FLAG,
    ),
)  # fmt: skip


def with_override(probe: Probe) -> Probe:
    """The probe of torch, with what is in the place of its flash kernels."""
    active = flash_override()
    if active is None:
        return probe
    note = f"{active} is in the place of torch's flash kernels (torch.nn.attention.activate_flash_attention_impl)"
    return Probe(probe.version, probe.problem, probe.flags | {_FLAG}, note)


def _check_override() -> None:
    """Refuse to run where another implementation has come in since the kernel was chosen."""
    if (active := flash_override()) is not None:
        raise Refused(f"{active} is in the place of torch's flash kernels")


def offsets(call: Call) -> tuple[Tensor | None, Tensor | None, int, int]:
    """(cu_seqlens_q, cu_seqlens_k, max_q, max_k); gaps become sequences, on both sides or on none."""
    q, k = call.rows_q, call.rows_k
    if q is None or k is None:
        return None, None, call.q.shape[1], call.k.shape[1]
    if q.gaps or k.gaps:
        return q.as_queries, k.as_keys, q.max_seqlen, k.max_seqlen
    return q.starts, k.starts, q.max_seqlen, k.max_seqlen


#: (cu_seqlens_q, cu_seqlens_k, max_q, max_k, left, right), as the ops take them.
_Limits = tuple[Tensor | None, Tensor | None, int, int, int | None, int | None]


def _limits(call: Call) -> _Limits:
    """Where sequences lie and how far they see. Raises Refused for what the ops' own checks miss."""
    spec = call.spec
    cu_q, cu_k, max_q, max_k = offsets(call)
    check_batch(call.q.shape[0] if cu_q is None else cu_q.shape[0] - 1)
    if cu_q is not None:
        max_q = max(max_q, 2)
    left, right = spec.left, spec.right
    if left is None and not right:
        return cu_q, cu_k, max_q, max_k, None, None  # none, or causal, which is a flag of its own
    left = None if left is None else min(left, _FAR)
    if right == 0 or (right is None and (spec.sees_key or cu_q is None)):
        return cu_q, cu_k, max_q, max_k, left, None
    if cu_q is None and right is not None and right >= max_k and not spec.sees_key:
        raise Refused(f"right={right} of the window reaches past all {max_k} keys, where queries precede them")
    right = min(_FAR if right is None else right, max_q + max_k)  # no key is further from a query
    if not spec.sees_key:
        max_k = max(max_k, right + 1)
    return cu_q, cu_k, max_q, max_k, left, right


def forward(call: Call) -> Result:
    """See ``Backend.forward``."""
    _check_override()
    if call.spec.dropout:
        with seeded(call):
            return _forward(call)
    return _forward(call)


def _forward(call: Call) -> Result:
    spec = call.spec
    cu_q, cu_k, max_q, max_k, left, right = _limits(call)
    out, lse, rng, _, _ = torch.ops.aten._flash_attention_forward.default(
        aligned(call.q), aligned(call.k), aligned(call.v), cu_q, cu_k, max_q, max_k, spec.dropout, spec.right == 0,
        False, scale=spec.scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    if spec.need_lse and not spec.sees_key:
        lse.masked_fill_(lse == INF, -INF)
    return Result(out, lse, rng.view(torch.int64))


def backward(call: Call, saved: Saved, dout: Tensor) -> Gradients:
    """See ``Backend.backward``."""
    spec = call.spec
    cu_q, cu_k, max_q, max_k, left, right = _limits(call)
    lse = saved.lse if spec.sees_key else saved.lse.masked_fill(saved.lse == -INF, INF)
    assert saved.rng is not None
    rng = saved.rng.view(torch.uint64)
    dq, dk, dv = torch.ops.aten._flash_attention_backward.default(
        aligned(dout), aligned(call.q), aligned(call.k), aligned(call.v), aligned(saved.out), lse, cu_q, cu_k, max_q,
        max_k, spec.dropout, spec.right == 0, rng, rng[:1].squeeze(0), scale=spec.scale, window_size_left=left,
        window_size_right=right,
    )  # fmt: skip
    return Gradients(dq, dk, dv)
