"""torch's memory-efficient attention (CUTLASS), through its raw ops: dense, packed, with bias, mask and dropout.

Conventions, measured on an H200 with torch 2.11: float32 products are made of three TF32 ones; lse is padded to a
multiple of 32; bottom-right causal is wrong for rows without keys, and its window is wrong in backward unless lengths
are equal; a bias row must be padded in memory to a multiple of 8.

Read in its C++ (attention.cu, attention_backward.cu, mem_eff_attention/kernel_forward.h and kernel_backward.h):

- Packed, the batch is 1 and lse (N, H, max_seqlen_q). A sequence without keys gets no out for wide head dims, and no dq
  at all. Backward splits keys by a number of queries that may be 0 then, so it is told not to split. No bias.
- Dropout's random numbers are indexed by the keys of the batch, which the packed forward takes as 0 and its backward
  does not (pytorch#115590): packed batches have no dropout here. Forward counts those indices in 32 bits and backward
  in 64, signed: so dropout ends at that size.
- The state of dropout is two int64 scalars, on the device while a CUDA graph is captured and on the CPU else; backward
  reads them on the side where it expects them, without a look.
- There is one stride for heads: keys of a group of heads can be shared (stride 0), those of several groups cannot.
  So GQA is one launch per group, or one per place in a group, whichever are fewer. Nothing is expanded in memory.
- A block of one query (65 of them: the second block of 64) against keys with stride 0 for heads, without lse, is taken
  for one query in all, whose heads then stand for queries: wrong on an H200. lse is asked for with such keys.
- out and its gradient are read as contiguous.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anyattn._call import Call, Gradients, Result, Saved, Spec
from anyattn._derived import derived
from anyattn._errors import Refused, Unsupported
from anyattn._random import philox_seed, seeded
from anyattn.backends._aten_flash import offsets
from anyattn.backends._aten_terms import INF, additive, position_mask, without_dead_rows
from anyattn.backends._raw import aligned, check_batch


class _Places(NamedTuple):
    """Where the rows of a packed q lie in the op's lse, (N, H, L)."""

    sequence: Tensor
    """int64 (T,); N for rows beyond the sequences."""
    row: Tensor
    """int64 (T,)"""
    dead: Tensor
    """bool (T,): rows of sequences without keys."""


class _Problem(NamedTuple):
    """What the ops take."""

    q: Tensor
    """(B, S, H, D); packed (1, T, H, D)."""
    k: Tensor
    v: Tensor
    cu_q: Tensor | None
    cu_k: Tensor | None
    max_q: int
    max_k: int
    custom_mask_type: int
    window_size: int | None
    bias: Tensor | None
    """(B, H, S, K)"""
    dead: Tensor | None
    """Dense, with bias or mask: rows that see no key, (B or 1, H or 1, S)."""
    places: _Places | None


_Heads = tuple[slice, slice]
"""Query heads of a launch, and the kv heads that they see: as many, or one."""


# --- what a call comes to ---


def _problem(call: Call) -> _Problem:
    spec = call.spec
    q, k, v = aligned(call.q), aligned(call.k), aligned(call.v)
    cu_q, cu_k, max_q, max_k = offsets(call)
    window = None if spec.left is None else spec.left + 1
    if cu_q is None or cu_k is None:
        check_batch(q.shape[0])
        kind = 0 if spec.right != 0 else (1 if spec.top_left or max_q == max_k else 2)
        added = additive(call)
        if added is None:
            return _Problem(q, k, v, None, None, max_q, max_k, kind, window, None, None, None)
        bias = added.values.expand(q.shape[0], q.shape[2], max_q, max_k)
        return _Problem(q, k, v, None, None, max_q, max_k, kind, window, bias, added.dead, None)
    check_batch(cu_q.shape[0] - 1)
    kind = 0 if spec.right != 0 else (1 if spec.top_left or spec.equal_lengths else 2)
    max_q, max_k = min(max_q, q.shape[0]), min(max_k, k.shape[0])
    q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    return _Problem(q, k, v, cu_q, cu_k, max_q, max_k, kind, window, None, None, _places(call, cu_q, cu_k))


def _places(call: Call, cu_q: Tensor, cu_k: Tensor) -> _Places:
    assert call.rows_q is not None
    assert call.rows_k is not None
    rows = call.q.shape[0]

    def make() -> _Places:
        row = torch.arange(rows, device=cu_q.device, dtype=torch.int32)
        sequence = torch.searchsorted(cu_q, row, right=True) - 1
        count = cu_q.shape[0] - 1
        inside = (sequence >= 0) & (sequence < count)
        nearest = sequence.clamp(0, count - 1)
        dead = (cu_k[1:] == cu_k[:-1])[nearest] & inside
        return _Places(torch.where(inside, sequence, count), (row - cu_q[nearest]).long().clamp_(min=0), dead)

    return derived(call.rows_q, call.rows_k, ("efficient", rows), make)


_ALL = slice(None)
_WHOLE: list[_Heads] = [(_ALL, _ALL)]


def _launches(q: Tensor, k: Tensor) -> list[_Heads]:
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads == kv_heads:
        return _WHOLE
    group = heads // kv_heads
    if kv_heads <= group:
        return [(slice(g * group, (g + 1) * group), slice(g, g + 1)) for g in range(kv_heads)]
    return [(slice(i, None, group), _ALL) for i in range(group)]


def _part(x: _Problem, heads: _Heads) -> _Problem:
    """The problem of one launch."""
    of_q, of_k = heads
    if of_q is _ALL:
        return x
    q = x.q[:, :, of_q]
    k, v = (t[:, :, of_k].expand(-1, -1, q.shape[2], -1) for t in (x.k, x.v))
    return x._replace(q=q, k=k, v=v, bias=None if x.bias is None else x.bias[:, of_q])


# --- forward ---


def forward(call: Call) -> Result:
    """See ``Backend.forward``."""
    _check_dropout(call)
    x = _problem(call)
    launches = _launches(x.q, x.k)
    if len(launches) == 1:
        if not call.spec.dropout:
            return _result(call, x, *_launch(call, _part(x, launches[0])))
        with seeded(call):
            out, lse, rng = _launch(call, _part(x, launches[0]))
    else:
        out = x.q.new_empty(*x.q.shape[:3], x.v.shape[-1])
        lse, rng = None, None
        for heads in launches:
            out[:, :, heads[0]], part, _ = _launch(call, _part(x, heads))
            if part is not None:
                lse = part.new_empty(part.shape[0], x.q.shape[2], part.shape[2]) if lse is None else lse
                lse[:, heads[0]] = part
    return _result(call, x, out, lse, rng)


def _launch(call: Call, x: _Problem) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, lse as the op pads it, rng)."""
    spec = call.spec
    out, lse, seed, offset, _, _ = torch.ops.aten._efficient_attention_forward.default(
        x.q, x.k, x.v, x.bias, x.cu_q, x.cu_k, x.max_q, x.max_k, spec.dropout, x.custom_mask_type,
        spec.need_lse or x.k.stride(2) == 0, scale=spec.scale, window_size=x.window_size,
    )  # fmt: skip
    return out, lse if spec.need_lse else None, torch.stack((seed, offset)) if spec.dropout else None


def _result(call: Call, x: _Problem, out: Tensor, lse: Tensor | None, rng: Tensor | None) -> Result:
    """Rows without keys made canonical, in (B, S, H, D) and (B, H, S), or (T, H, D) and (H, T)."""
    if x.places is None:
        if lse is not None:
            lse = lse if lse.shape[2] == x.max_q else lse.narrow(2, 0, x.max_q)
            lse = lse if x.dead is None else lse.masked_fill(x.dead, -INF)
        return Result(out if x.dead is None else without_dead_rows(out, x.dead), lse, rng)
    sequence, row, dead = x.places
    out = out[0]
    if lse is not None:
        inside = sequence.clamp(max=lse.shape[0] - 1), row.clamp(max=lse.shape[2] - 1)
        lse = lse[inside[0], :, inside[1]].t().contiguous()
    if call.spec.sees_key:
        return Result(out, lse, rng)
    out = out.masked_fill(dead[:, None, None], 0.0)
    return Result(out, None if lse is None else lse.masked_fill(dead, -INF), rng)


# --- backward ---


def backward(call: Call, saved: Saved, dout: Tensor) -> Gradients:
    """See ``Backend.backward``."""
    x = _problem(call)
    out, dout, lse = saved.out.contiguous(), aligned(dout), _padded_lse(call.spec, x, saved.lse)
    if x.places is not None:
        out, dout = out.unsqueeze(0), dout.unsqueeze(0)
    state = _dropout_state(call, saved)
    whole = x.q.shape[2] == x.k.shape[2]
    dq, dk, dv, dbias = (_launch_backward if whole else _grouped_backward)(call, x, out, dout, lse, state)
    if x.places is not None:
        dq, dk, dv = dq[0], dk[0], dv[0]
        if not call.spec.sees_key:
            dq = dq.masked_fill(x.places.dead[:, None, None], 0.0)
    return Gradients(dq, dk, dv, _summed(call, dbias))


_State = tuple[Tensor, Tensor]


def _launch_backward(
    call: Call, x: _Problem, out: Tensor, dout: Tensor, lse: Tensor, state: _State
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    got: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.aten._efficient_attention_backward.default(
        dout, x.q, x.k, x.v, x.bias, out, x.cu_q, x.cu_k, x.max_q, x.max_k, lse, call.spec.dropout, *state,
        x.custom_mask_type, call.spec.bias_grad, scale=call.spec.scale,
        num_splits_key=None if x.cu_q is None else 1, window_size=x.window_size,
    )  # fmt: skip
    return got


def _grouped_backward(
    call: Call, x: _Problem, out: Tensor, dout: Tensor, lse: Tensor, state: _State
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of several launches together; those of keys are summed in float32."""
    dq = torch.empty_like(x.q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (x.k, x.v))
    dbias = torch.empty(0 if x.bias is None else x.bias.shape, dtype=x.q.dtype, device=x.q.device)
    for of_q, of_k in _launches(x.q, x.k):
        parts = out[:, :, of_q].contiguous(), dout[:, :, of_q], lse[:, of_q]
        got = _launch_backward(call, _part(x, (of_q, of_k)), *parts, state)
        dq[:, :, of_q] = got[0]
        for total, part in ((dk[:, :, of_k], got[1]), (dv[:, :, of_k], got[2])):
            total += part if total.shape[2] == part.shape[2] else part.sum(2, keepdim=True, dtype=torch.float32)
        if call.spec.bias_grad:
            dbias[:, of_q] = got[3]
    return dq, dk.to(x.k.dtype), dv.to(x.v.dtype), dbias


def _padded_lse(spec: Spec, x: _Problem, lse: Tensor) -> Tensor:
    """The op's lse, padded with +inf beyond a sequence's end; +inf for a row that sees no key."""
    if x.places is not None or not spec.sees_key:
        lse = lse.masked_fill(lse == -INF, INF)
    if x.places is None or x.cu_q is None:
        return torch.nn.functional.pad(lse, (0, -x.max_q % 32), value=INF)
    count, width = x.cu_q.shape[0] - 1, -(-x.max_q // 32) * 32
    padded = lse.new_full((count + 1, lse.shape[0], width), INF)
    padded[x.places.sequence, :, x.places.row.clamp(max=width - 1)] = lse.t()
    return padded[:count]


def _summed(call: Call, dbias: Tensor) -> Tensor | None:
    """The gradient of bias in its own shape."""
    if call.bias is None or not call.spec.bias_grad:
        return None
    rows, keys = call.q.shape[1], call.k.shape[1]
    dbias = dbias[..., :keys].float()
    if call.spec.right is not None:  # what causal hides is not written
        hidden = ~position_mask(call.spec, rows, keys, call.q.device)
        dbias = dbias.masked_fill(hidden, 0.0)
    return dbias.sum_to_size(call.bias.shape).to(call.bias.dtype)


# --- dropout ---


def _check_dropout(call: Call) -> None:
    if not call.spec.dropout:
        return
    entries, rows, heads, _ = call.q.shape
    each = heads * rows * call.k.shape[1]
    if each >= 1 << 31 or entries * each > 1 << 32:
        raise Refused(
            f"dropout over {entries * each} scores, {each} per batch entry, is more than it counts (2 ** 32, and fewer "
            "than 2 ** 31 per batch entry)"
        )


def _dropout_state(call: Call, saved: Saved) -> _State:
    """(seed, offset), on the side where backward reads them."""
    if not call.spec.dropout:
        unused = torch.empty((), dtype=torch.int64, device=call.q.device)
        return unused, unused
    rng = saved.rng
    assert rng is not None
    capturing = call.q.is_cuda and torch.cuda.is_current_stream_capturing()
    if capturing and not rng.is_cuda:
        raise Unsupported(
            "backward is captured in a CUDA graph and its forward was not, so that dropout's state lies on the CPU: "
            'capture both, or use backend="torch:flash"'
        )
    if rng.is_cuda and not capturing:  # under torch.compile its value is known; else forward was captured, alone
        rng = rng.cpu() if call.seed is None else torch.tensor([philox_seed(call.seed), 0], device="cpu")
    return rng[0], rng[1]
