"""A BlockMask in a compiled region: FlexAttention itself enters the graph, for no custom op takes a mask's function.

What the core does around a kernel is said here in differentiable torch: layouts, the packing, sinks, padding. The
backend of torch.compile is the caller's: one that does not fuse keeps all scores in memory. Legend as in ``attend``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyattn import _select
from anyattn._call import Call, Rows, Spec
from anyattn._errors import InvalidArgument, PackingError, ShapeError, Unsupported
from anyattn._packing import Packing, check_entries
from anyattn._request import Tensors
from anyattn._rows import rows_of_table
from anyattn.backends import ORDER, get
from anyattn.backends._flex_call import entries_of, run_of
from anyattn.backends._flex_compiled import attend, kernel_options

_OPTIONS = kernel_options()
_ALLOWED = {"auto", *(name for name in ORDER if getattr(get(name), "TRACES_BLOCK_MASKS", False))}


def attention(
    t: Tensors,
    causal: Any,
    window: Any,
    scale: float | None,
    softcap: float | None,
    dropout: float,
    backend: Any,
    deterministic: bool | None,
    return_lse: bool,
) -> Any:
    """``attention`` with a BlockMask, for q, k, v in "bshd" or "thd"."""
    q, k, v, mask = t.q, t.k, t.v, t.mask
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    _check(t, dropout, backend, deterministic, return_lse)
    left, right = (None, None) if window is None else window
    spec = Spec(
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        softcap=softcap or 0.0,
        left=left,
        right=0 if causal else right,
        top_left=causal == "top_left",
        dropout=0.0,
        deterministic=deterministic,
        need_lse=True,
        equal_lengths=q.ndim == 4 and t.packing is None and q.shape[1] == k.shape[1],
        needs_backward=torch.is_grad_enabled() and q.is_cuda,
    )
    lse_wanted = return_lse or t.sink is not None
    batch = q.shape[0]
    rows_q, rows_k = _rows(q, t.packing), _rows(k, t.packing_kv or t.packing)
    if rows_q is not None and q.ndim == 4:
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    bias = None if t.bias is None else t.bias.reshape((1,) * (4 - t.bias.ndim) + tuple(t.bias.shape))
    call = Call(q, k, v, spec, "", rows_q, rows_k, None, t.alibi_slopes, bias, None, mask)  # type: ignore[arg-type]
    run = run_of(call, lse_wanted, _OPTIONS if q.is_cuda else ())
    if rows_q is not None:
        entries = entries_of(call)
        q, k, v = (x.unflatten(0, (entries, x.shape[0] // entries)) for x in (q, k, v))
    if run.terms.tag_q is not None and run.terms.tag_k is not None and _sanitize(t):
        q, k, v = _cleaned(q, run.terms.tag_q), _cleaned(k, run.terms.tag_k), _cleaned(v, run.terms.tag_k)
    out, lse = attend(run.kind, q, k, v, run.terms, run.tables, run.own)
    if t.sink is not None and lse is not None:
        out, lse = with_sink(out, lse, t.sink)
    if run.terms.tag_q is not None:  # as out is nothing there, its gradient is, whatever arrives
        out = _cleaned(out, run.terms.tag_q)
        lse = None if lse is None else torch.where((run.terms.tag_q >= 0)[:, None], lse, -torch.inf)
    return _left(out, lse if return_lse else None, t.q, batch)


def _sanitize(t: Tensors) -> bool:
    return any(p is not None and p.sanitize for p in (t.packing, t.packing_kv))


def _left(out: Tensor, lse: Tensor | None, q: Tensor, batch: int) -> Any:
    """What the caller gets, in q's layout."""
    if q.ndim == 3:
        out, lse = out.flatten(0, 1), None if lse is None else lse.transpose(0, 1).flatten(1, 2)
    elif out.shape[0] != batch:  # packed as one entry
        out = out.unflatten(1, (batch, -1)).squeeze(0)
        lse = None if lse is None else lse.unflatten(2, (batch, -1)).squeeze(0).transpose(0, 1)
    return out if lse is None else (out, lse)


def _cleaned(x: Tensor, tag: Tensor) -> Tensor:
    """A copy with zeros in rows outside every sequence."""
    return torch.where((tag >= 0)[..., None, None], x, torch.zeros((), dtype=x.dtype, device=x.device))


def with_sink(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """The final (out, lse) where one more logit without a value joins; differentiable."""
    logit = sink.to(lse.dtype)[:, None]
    seen = lse > -torch.inf
    finite = torch.where(seen, lse, 0.0)
    share = torch.where(seen, torch.sigmoid(finite - logit), 0.0)
    total = torch.where(seen, torch.logaddexp(finite, logit), logit)
    return (out * share.transpose(1, 2).unsqueeze(-1)).to(out.dtype), total


def _rows(x: Tensor, packing: Packing | None) -> Rows | None:
    """A packing's rows; with 4-D tensors, as rows of the flattened batch."""
    if packing is None:
        return None
    facts = packing._facts
    rows = rows_of_table(packing._table, facts.sequences, facts.max_seqlen, True, None)
    if (
        x.ndim == 3
        or (packing._shape is not None)
        or (facts.rows == x.shape[0] * x.shape[1] and packing._entry_rows == x.shape[1])
    ):
        return rows
    check_entries(packing._entry_rows)
    starts = torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device) * x.shape[1]
    return Rows(rows.table, starts, rows.lengths, starts, starts, facts.max_seqlen, True, None)


def _check(t: Tensors, dropout: float, backend: Any, deterministic: bool, return_lse: bool) -> None:
    """What FlexAttention refuses, by name."""
    q, mask = t.q, t.mask
    wanted = [backend] if isinstance(backend, str) else list(backend)
    if wanted == ["auto"]:
        wanted = list(_select.traced_preference or _select.environment_preference.__wrapped__())
    if not any(name.partition(":")[0] in _ALLOWED for one in wanted for name in one.split(",")):
        _refuse(f"it is FlexAttention's, and backend= allows {', '.join(wanted)} only")
    seq_q, seq_k = t.q.shape[-3], t.k.shape[-3]
    if mask.shape[-2] != seq_q or mask.shape[-1] != seq_k:  # type: ignore[union-attr]
        raise ShapeError(f"the BlockMask must be for {seq_q} rows and {seq_k} keys; it is for {mask.shape}")  # type: ignore[union-attr]
    if dropout:
        _refuse("it has no dropout")
    gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, t.k, t.v, t.sink, t.bias))
    if q.device.type == "cpu" and (gradient or return_lse or t.sink is not None):
        _refuse("on the CPU it has neither gradients nor lse, which sinks need")
    if q.device.type == "cpu" and t.packing is not None:  # its code generator takes no tensors computed in the graph
        _refuse("on the CPU it takes no packing")
    if q.dtype == torch.float64 or max(q.shape[-1], t.v.shape[-1]) > 256:
        _refuse("it takes float16, bfloat16 and float32, and a head_dim of at most 256")
    if deterministic and gradient and t.bias is not None and t.bias.requires_grad:
        _refuse("its gradient of bias is not deterministic")


def check_values(t: Tensors, causal: Any, window: Any, softcap: float | None, layout: str | None) -> None:
    """What ``validate`` checks of a request, in terms that can be traced."""
    if layout not in (None, "bshd", "sbhd", "bhsd", "thd"):
        raise InvalidArgument(f"unknown layout {layout!r}; allowed: bshd, sbhd, bhsd, thd")
    if causal not in (None, False, True, "top_left"):
        raise InvalidArgument(f'causal must be True, False, None or "top_left", got {causal!r}')
    for side in window or ():
        if side is not None and side < 0:
            raise InvalidArgument(f"window must be (left, right) of ints >= 0 or None, got {window}")
    if softcap is not None and softcap < 0:
        raise InvalidArgument(f"softcap must be positive, got {softcap}")
    q, k = t.q, t.k
    heads = q.shape[-2]
    if t.sink is not None and tuple(t.sink.shape) != (heads,):
        raise ShapeError(f"sink must be ({heads},), one per head, got {tuple(t.sink.shape)}")
    sequences = q.shape[0] if t.packing is None else t.packing._facts.sequences
    if t.alibi_slopes is not None and tuple(t.alibi_slopes.shape) not in ((heads,), (sequences, heads)):
        raise ShapeError(
            f"alibi_slopes must be ({heads},) or ({sequences}, {heads}), got {tuple(t.alibi_slopes.shape)}"
        )
    if t.bias is not None and (q.ndim == 3 or t.bias.ndim > 4):
        raise ShapeError("bias must be broadcastable to (batch, num_heads, seq_q, seq_k), and goes with 4-D tensors")
    if t.bias is not None:
        full = (q.shape[0], heads, q.shape[1], k.shape[1])
        for given, wanted in zip(t.bias.shape[::-1], full[::-1], strict=False):
            if given not in (1, wanted):
                raise ShapeError(f"bias must be broadcastable to {full}, got {tuple(t.bias.shape)}")
    for x, packing in ((q, t.packing), (k, t.packing_kv or t.packing)):
        if packing is not None and x.ndim == 4 and packing._facts.sequences != x.shape[0]:
            raise PackingError(
                f"with 4-D tensors sequence i lies in batch entry i: the packing has {packing._facts.sequences} "
                f"sequences, the batch {x.shape[0]} entries"
            )


def _refuse(why: str) -> None:
    raise Unsupported(
        f"a BlockMask in a compiled region runs on FlexAttention alone: {why}; call attention outside of torch.compile"
    )
