"""torch's bundled FlashAttention 2, through its raw ops, dense and packed: used by ``torch`` and by ``varlen``.

Its conventions, measured on an H200 with torch 2.11 (docs/padding.md): bottom-right alignment; windows of two ints or
None; lse +inf for a row that sees no key; rows outside every sequence are not written; gaps given as sequences of
their own cost nothing. GQA needs no expanded keys. Deterministic only under torch's own flag.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyattn._call import Call, Gradients, Result, Saved
from anyattn._capability import Reason, Row

INF = float("inf")

#: The kernel takes an unbounded right side, beside a bounded left one, as the longest key length. That hides keys from
#: queries further before the first key than there are keys: seen on an H200 with torch 2.11, forward too.
OPEN_RIGHT = Row(
    lambda p: p.left and not p.causal and p.relation == "any",
    Reason(
        "a window bounded on the left", "causal, or query sequences known not to be longer than their keys",
        "other lengths",
        "add a bound on the right by causal=True, or choose another backend",
    ),
)  # fmt: skip


def _offsets(call: Call) -> tuple[Tensor | None, Tensor | None, int, int]:
    """(cu_seqlens_q, cu_seqlens_k, max_q, max_k); gaps become sequences, on both sides or on none."""
    q, k = call.rows_q, call.rows_k
    if q is None or k is None:
        return None, None, call.q.shape[1], call.k.shape[1]
    if q.gaps or k.gaps:
        return q.as_queries, k.as_keys, q.max_seqlen, k.max_seqlen
    return q.starts, k.starts, q.max_seqlen, k.max_seqlen


def _rowwise(x: Tensor) -> Tensor:
    """The kernels want the last dim contiguous, and nothing else."""
    return x if x.stride(-1) == 1 else x.contiguous()


def forward(call: Call) -> Result:
    """See ``Backend.forward``."""
    spec = call.spec
    cu_q, cu_k, max_q, max_k = _offsets(call)
    causal = spec.right == 0
    out, lse, rng, _, _ = torch.ops.aten._flash_attention_forward.default(
        _rowwise(call.q), _rowwise(call.k), _rowwise(call.v), cu_q, cu_k, max_q, max_k, 0.0, causal, False,
        scale=spec.scale, window_size_left=spec.left, window_size_right=None if causal else spec.right,
    )  # fmt: skip
    if spec.need_lse and not spec.sees_key:
        lse.masked_fill_(lse == INF, -INF)
    return Result(out, lse, rng.view(torch.int64))


def backward(call: Call, saved: Saved, dout: Tensor) -> Gradients:
    """See ``Backend.backward``."""
    spec = call.spec
    cu_q, cu_k, max_q, max_k = _offsets(call)
    causal = spec.right == 0
    lse = saved.lse if spec.sees_key else saved.lse.masked_fill(saved.lse == -INF, INF)
    assert saved.rng is not None
    rng = saved.rng.view(torch.uint64)
    dq, dk, dv = torch.ops.aten._flash_attention_backward.default(
        _rowwise(dout), _rowwise(call.q), _rowwise(call.k), _rowwise(call.v), saved.out, lse, cu_q, cu_k, max_q, max_k,
        0.0, causal, rng, rng[:1].squeeze(0), scale=spec.scale, window_size_left=spec.left,
        window_size_right=None if causal else spec.right,
    )  # fmt: skip
    return Gradients(dq, dk, dv)
