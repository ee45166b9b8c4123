"""torch's cuDNN attention through its raw ops: dense, with bias, mask and dropout.

Conventions, measured on an H200 with torch 2.11 and cuDNN 9.19: causal is top-left; lse has one more dim; never
deterministic. Tensors are (B, H, S, D).

Read in its C++ (attention.cu, attention_backward.cu, cudnn/MHA.cpp, sdp_utils.cpp):

- A bias is (B or 1, H or 1, S, K), in q's dtype, and gets no gradient. torch never gives it together with causal, and
  gives -65504 for what a mask hides, because of trouble with -inf: so causality goes into the bias here, and what
  hides is large and finite. Rows that see no key are made canonical around the op.
- Dropout's state is two int64 scalars that lie on the device, in a CUDA graph as well. Some kernels round the rate to a
  multiple of 1/16 and not its factor (pytorch#174245): other rates are refused.
- torch itself calls it for no single key, for no single query with dropout, and for head dims above 128 only where
  ``ROWS`` says so.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anyattn._call import Call, Gradients, Result, Saved, Spec
from anyattn._capability import Reason, Row
from anyattn._errors import Refused
from anyattn._problem import Problem
from anyattn._random import seeded
from anyattn.backends._aten_terms import INF, additive, position_mask, without_dead_rows
from anyattn.backends._raw import aligned, check_batch

_SDP_UTILS = "https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/transformers/cuda/sdp_utils.cpp"
_ELSE = "choose another backend"
#: What a mask adds to a score. JAX gives cuDNN the first, torch the second: differences of larger ones go wrong there.
_HIDDEN = {torch.bfloat16: -(2.0**41), torch.float16: -65504.0}


def _wide(p: Problem) -> bool:
    """Head dims above 128, but for Hopper's and those of DeepSeek on Blackwell."""
    dims = p.head_dim, p.head_dim_v
    return max(dims) > 128 and p.arch != 90 and not (p.arch // 10 == 10 and dims == (192, 128))


ROWS = (
    Row(
        lambda p: p.seqlen_k == 1,
        Reason("a single key", "at least two keys", "one", _ELSE, link=_SDP_UTILS),
    ),
    Row(
        lambda p: p.dropout and p.seqlen_q == 1,
        Reason("dropout", "at least two queries", "one", "leave out dropout, or " + _ELSE, link=_SDP_UTILS),
    ),
    Row(
        _wide,
        Reason("head_dim", "at most 128, but for up to 256 on sm90 and 192/128 on sm10x", "a larger one", _ELSE,
               link=_SDP_UTILS),
    ),
    Row(
        lambda p: max(p.head_dim, p.head_dim_v) > 128,
        Reason("head_dim above 128", "cuDNN >= 9.10 (9.11 on sm10x)", "an older one", "upgrade nvidia-cudnn",
               link=_SDP_UTILS),
        flag="cudnn_before_9.10",
    ),
    Row(
        lambda p: p.arch // 10 == 10 and max(p.head_dim, p.head_dim_v) > 128,
        Reason("head_dim above 128", "cuDNN >= 9.11 on sm10x", "9.10", "upgrade nvidia-cudnn", link=_SDP_UTILS),
        flag="cudnn_9.10",
    ),
    Row(
        lambda p: p.dropout,
        Reason("dropout", "cuDNN other than 9.11 to 9.13", "one of these, which find no kernel for it",
               "upgrade nvidia-cudnn", link="https://github.com/pytorch/pytorch/pull/163903"),
        flag="cudnn_9.11_to_9.13",
    ),
)  # fmt: skip


def flags() -> frozenset[str]:
    """What the cuDNN that torch loads is known for."""
    version = torch.backends.cudnn.version()
    if version is None:
        return frozenset()
    found = []
    if version < 91000:
        found.append("cudnn_before_9.10")
    elif version < 91100:
        found.append("cudnn_9.10")
    elif version < 91400:
        found.append("cudnn_9.11_to_9.13")
    return frozenset(found)


class _Bias(NamedTuple):
    """What the op takes for bias, mask and causality together, and the rows that it leaves without a key."""

    values: Tensor
    """(B or 1, H or 1, S, K), finite."""
    dead: Tensor
    """bool (B or 1, H or 1, S)"""


def _bias(call: Call) -> _Bias | None:
    added = additive(call)
    if added is None:
        return None
    values, (rows, keys) = added.values, added.values.shape[2:]
    if call.spec.right == 0:
        values.masked_fill_(~position_mask(call.spec, rows, keys, values.device), -INF)
    return _Bias(values.masked_fill_(values == -INF, _HIDDEN[values.dtype]), added.dead)


def _causal(spec: Spec, bias: _Bias | None) -> bool:
    return spec.right == 0 and bias is None


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def forward(call: Call) -> Result:
    """See ``Backend.forward``."""
    check_batch(call.q.shape[0])
    dropout = call.spec.dropout
    if not dropout:
        return _forward(call)
    if dropout * 16 % 1:
        raise Refused(
            f"dropout of {dropout} is rounded to a multiple of 1/16 by some of its kernels, unlike its factor"
        )
    with seeded(call):
        return _forward(call)


def _forward(call: Call) -> Result:
    spec = call.spec
    bias = None if call.bias is None and call.mask is None else _bias(call)
    q, k, v = aligned(call.q).transpose(1, 2), aligned(call.k).transpose(1, 2), aligned(call.v).transpose(1, 2)
    out, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention.default(
        q, k, v, None if bias is None else bias.values, spec.need_lse, spec.dropout, _causal(spec, bias), False,
        scale=spec.scale,
    )  # fmt: skip
    out, rng = out.transpose(1, 2), torch.stack((seed, offset)) if spec.dropout else None
    if bias is not None:
        out = without_dead_rows(out, bias.dead)
    if not spec.need_lse:
        return Result(out, None, rng)
    lse = lse.squeeze(-1)
    return Result(out, lse if bias is None else lse.masked_fill(bias.dead, -INF), rng)


def backward(call: Call, saved: Saved, dout: Tensor) -> Gradients:
    """See ``Backend.backward``."""
    spec = call.spec
    bias = _bias(call)
    q, k, v = aligned(call.q), aligned(call.k), aligned(call.v)
    q = q if 0 not in q.stride() else q.contiguous()  # an expanded dim has no place in an order
    out, dout = _laid_out_as(saved.out, q), _laid_out_as(dout, q)
    lse = saved.lse if bias is None else saved.lse.masked_fill(bias.dead, 0.0)  # all they see is hidden: exp is 0
    if spec.dropout and saved.rng is not None:
        seed, offset = saved.rng[0], saved.rng[1]
    else:
        seed = offset = torch.empty((), dtype=torch.int64, device=q.device)
    got = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default(
        *(_heads_first(x) for x in (dout, q, k, v, out)), lse.unsqueeze(-1), seed, offset,
        None if bias is None else bias.values, None, None, q.shape[1], k.shape[1], spec.dropout, _causal(spec, bias),
        scale=spec.scale,
    )  # fmt: skip
    dq, dk, dv = (_heads_first(x) for x in got)
    return Gradients(dq, dk, dv)


def _laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    """The same values with their dims in memory in the order of another tensor's, the last dim last.

    torch (2.11) keeps a built backward by the strides of q, k and v alone, and reads out and its gradient as they were
    laid out when it was built: in q's order, as its forward does. In another order dq and dk are silently wrong.
    """
    if x.is_contiguous() and like.is_contiguous():
        return x
    order = [*sorted(range(x.ndim - 1), key=like.stride, reverse=True), x.ndim - 1]
    return x.permute(order).contiguous().permute([order.index(dim) for dim in range(x.ndim)])
