"""The specification: attention in plain eager torch, on any device, in any float dtype, with every feature.

Read ``_scores`` to know what anyattn means by attention. Nothing here is fast, and optimised code never imports
it. Half precision computes in float32; float64 stays float64.

Legend: B batch, S query rows, K key rows, H heads, G = num_kv_heads, D head_dim, V head_dim_v. A packed batch is cut
into pieces that look like dense ones: one sequence each on the CPU; on CUDA all sequences, padded to the longest, so
that nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyattn._call import Call, Gradients, Result, Rows, Saved
from anyattn._capability import ALWAYS, FEATURE_NAMES, Capability, HeadDims
from anyattn._environment import Probe, torch_version

NAME = "reference"
TITLE = "plain eager torch, the specification: slow"
INSTALL = "pip install torch"
NEWEST = "2.13.0"
CAPABILITIES = (
    Capability(
        families=(0, 7, 8, 9, 10, 11, 12),
        dtypes=("float16", "bfloat16", "float32", "float64"),
        head_dims=HeadDims(maximum=1 << 20),
        features=dict.fromkeys(FEATURE_NAMES, ALWAYS),
        lse_grad="native",
        rank=2,
    ),
)


def probe() -> Probe:
    """Torch itself."""
    return Probe(torch_version())


def load() -> None:
    """Nothing to import."""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Sequences as a dense problem, and where each of their rows lies in memory."""

    entry: Tensor
    """(B,): which sequence, or batch entry."""
    row_q: Tensor
    """(B, S): memory row of each query row; of dense tensors, the row within its entry."""
    row_k: Tensor
    """(B, K)"""
    len_q: Tensor
    """(B,): real query rows; the others are filler."""
    len_k: Tensor


# --- the specification ---


def _position_mask(call: Call, piece: Piece) -> tuple[Tensor, Tensor]:
    """(distance, visible): key position - query position as (B, 1, S, K), and what lengths and window let through."""
    spec = call.spec
    i = torch.arange(piece.row_q.shape[1], device=call.q.device)
    j = torch.arange(piece.row_k.shape[1], device=call.q.device)
    shift = torch.zeros_like(piece.len_q) if spec.top_left else piece.len_k - piece.len_q
    distance = j[None, None, :] - (i[None, :, None] + shift[:, None, None])
    visible = (i[None, :, None] < piece.len_q[:, None, None]) & (j[None, None, :] < piece.len_k[:, None, None])
    if spec.left is not None:
        visible = visible & (distance >= -spec.left)
    if spec.right is not None:
        visible = visible & (distance <= spec.right)
    return distance[:, None], visible[:, None]


def _scores(call: Call, piece: Piece, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """(raw, final): scaled q . k as (B, H, S, K), and what enters the softmax: softcap, ALiBi, bias, masks applied."""
    spec = call.spec
    raw = _matmul_heads(q, k) * spec.scale
    final = spec.softcap * torch.tanh(raw / spec.softcap) if spec.softcap else raw
    distance, visible = _position_mask(call, piece)
    if call.alibi is not None:
        slopes = call.alibi.to(final.dtype)
        slopes = slopes[None] if slopes.ndim == 1 else slopes[piece.entry]
        final = final - slopes[:, :, None, None] * distance.abs()
    if call.bias is not None:
        final = final + _of_piece(call, piece, call.bias).to(final.dtype)
    if call.mask is not None:
        visible = visible & _of_piece(call, piece, call.mask)
    if call.block_mask is not None:
        visible = visible & _block_mask(call, piece)
    return raw, final.masked_fill(~visible, float("-inf"))


def _probabilities(final: Tensor, lse: Tensor) -> Tensor:
    """(B, H, S, K), from scores and lse (B, H, S). A row that sees nothing has zeros; a sink in lse has its share.

    Not exp(score - lse): where all scores of a row are huge, as biases of a dtype's least number make them, lse cannot
    hold by how much it is more than they are.
    """
    own = torch.logsumexp(final, -1)
    share = torch.exp(own - lse).masked_fill(own == float("-inf"), 0.0)
    return torch.softmax(final, -1).masked_fill((own == float("-inf"))[..., None], 0.0) * share[..., None]


def _forward_piece(
    call: Call, piece: Piece, q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    _, final = _scores(call, piece, q, k)
    lse = torch.logsumexp(final, -1)
    p = _probabilities(final, lse)
    if seed is not None:
        p = p * _keep(call, piece, p, seed)
    return _matmul_values(p, v), lse


def _backward_piece(
    call: Call, piece: Piece, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor,
    dlse: Tensor | None, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dscores) from the final out and lse."""
    raw, final = _scores(call, piece, q, k)
    p = _probabilities(final, lse)
    dp = _matmul_heads(dout, v)
    kept = p
    if seed is not None:
        keep = _keep(call, piece, p, seed)
        kept, dp = p * keep, dp * keep
    dv = _matmul_keys(kept, dout, v.shape[2])
    delta = (dout * out).sum(-1).transpose(1, 2)
    if dlse is not None:
        delta = delta - dlse
    dfinal = p * (dp - delta[..., None])
    draw = dfinal
    if call.spec.softcap:
        draw = dfinal * (1 - torch.tanh(raw / call.spec.softcap) ** 2)
    draw = draw * call.spec.scale
    return _matmul_values(draw, k), _matmul_keys(draw, q, k.shape[2]), dv, dfinal


# --- grouped heads: keys and values are never expanded ---


def _matmul_heads(q: Tensor, k: Tensor) -> Tensor:
    """(B, S, H, D) . (B, K, G, D) -> (B, H, S, K)."""
    grouped = q.unflatten(2, (k.shape[2], -1)) if k.shape[2] else q.unsqueeze(3)
    return torch.einsum("bsgrd,bkgd->bgrsk", grouped, k).flatten(1, 2)


def _matmul_values(p: Tensor, v: Tensor) -> Tensor:
    """(B, H, S, K) . (B, K, G, V) -> (B, S, H, V)."""
    grouped = p.unflatten(1, (v.shape[2], -1)) if v.shape[2] else p.unsqueeze(2)
    return torch.einsum("bgrsk,bkgv->bsgrv", grouped, v).flatten(2, 3)


def _matmul_keys(p: Tensor, q: Tensor, kv_heads: int) -> Tensor:
    """(B, H, S, K), (B, S, H, D) -> (B, K, G, D): the sum over the query heads of a group."""
    grouped, queries = p.unflatten(1, (kv_heads, -1)), q.unflatten(2, (kv_heads, -1))
    return torch.einsum("bgrsk,bsgrd->bkgd", grouped, queries)


# --- bias, masks, dropout ---


def _index(call: Call, piece: Piece, shape: tuple[int, ...] | torch.Size) -> tuple[Tensor, ...]:
    """Indices of a (batch, heads, seq_q, seq_k) tensor for each score of a piece; dims of size 1 are broadcast."""
    row_q, row_k = piece.row_q, piece.row_k
    if call.rows_q is not None:  # flattened entries: back to the row within the entry
        row_q, row_k = row_q % shape[2], row_k % shape[3]
    head = torch.arange(call.q.shape[-2], device=call.q.device)
    full = (
        piece.entry[:, None, None, None],
        head[None, :, None, None],
        row_q[:, None, :, None],
        row_k[:, None, None, :],
    )
    return tuple(x if size != 1 else torch.zeros_like(x) for x, size in zip(full, shape, strict=True))


def _of_piece(call: Call, piece: Piece, x: Tensor) -> Tensor:
    """Bias or mask for a piece, (B, H or 1, S or 1, K or 1)."""
    return x if call.rows_q is None else x[_index(call, piece, x.shape)]


def _block_mask(call: Call, piece: Piece) -> Tensor:
    """A BlockMask for a piece: full blocks, and what mask_mod lets through in the partial ones."""
    mask: Any = call.block_mask
    head = torch.arange(call.q.shape[-2], device=call.q.device)
    rows, keys = mask.shape[-2:]
    over_rows = call.rows_q is not None and call.q.shape[0] == rows  # "thd"; else flattened entries, as in _index
    entry = torch.zeros_like(piece.entry) if over_rows else piece.entry
    b, h, i, j = (
        entry[:, None, None, None],
        head[None, :, None, None],
        (piece.row_q % rows)[:, None, :, None],
        (piece.row_k % keys)[:, None, None, :],
    )
    size_q, size_k = mask.BLOCK_SIZE
    partial = _dense_blocks(mask.kv_num_blocks, mask.kv_indices)
    blocks = tuple(x if n != 1 else torch.zeros_like(x) for x, n in zip((b, h), partial.shape[:2], strict=True))
    blocks = (*blocks, i // size_q, j // size_k)
    visible: Tensor = partial[blocks] & mask.mask_mod(b, h, i, j)
    if mask.full_kv_num_blocks is not None:
        visible = visible | _dense_blocks(mask.full_kv_num_blocks, mask.full_kv_indices)[blocks]
    return visible


def _dense_blocks(counts: Tensor, indices: Tensor) -> Tensor:
    """Which blocks are listed, bool (B, H, query blocks, key blocks)."""
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    dense = torch.zeros(*indices.shape[:-1], indices.shape[-1] + 1, dtype=torch.bool, device=indices.device)
    target = torch.where(listed, indices.long(), indices.shape[-1])
    return dense.scatter_(-1, target, True)[..., :-1]


def _keep(call: Call, piece: Piece, p: Tensor, seed: Tensor) -> Tensor:
    """0, or 1 / (1 - dropout), per probability: a hash of the seed and the score's place, so backward repeats it."""
    index = [
        x.long()
        for x in (piece.entry[:, None, None, None], piece.row_q[:, None, :, None], piece.row_k[:, None, None, :])
    ]
    head = torch.arange(p.shape[1], device=p.device)[None, :, None, None]
    state = seed[0]
    for x in (index[0], head, index[1], index[2]):
        state = _mix(state ^ (x + 1))
    uniform = (state & 0xFFFFFF).to(torch.float64) / float(1 << 24)
    dropout = call.spec.dropout
    return (uniform >= dropout).to(p.dtype) / (1 - dropout)


def _mix(x: Tensor) -> Tensor:
    """A 64-bit finalizer (splitmix64, Steele et al. 2014), in wrapping int64 arithmetic."""
    x = x * -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


# --- pieces ---


def _pieces(call: Call) -> Iterator[Piece]:
    device = call.q.device
    if call.rows_q is None or call.rows_k is None:
        batch, rows_q, rows_k = call.q.shape[0], call.q.shape[1], call.k.shape[1]
        entry = torch.arange(batch, device=device)
        full = torch.ones_like(entry)
        row_q, row_k = (torch.arange(n, device=device).expand(batch, -1) for n in (rows_q, rows_k))
        yield Piece(entry, row_q, row_k, full * rows_q, full * rows_k)
    elif call.rows_q.host is not None and call.rows_k.host is not None:
        for i, (q, k) in enumerate(zip(call.rows_q.host, call.rows_k.host, strict=True)):
            rows = [torch.arange(start, start + length, device=device)[None] for start, length in (q, k)]
            one, len_q, len_k = (torch.tensor([n], device=device) for n in (i, q[1], k[1]))
            yield Piece(one, rows[0], rows[1], len_q, len_k)
    else:
        entry = torch.arange(call.rows_q.lengths.shape[0], device=device)
        row_q, row_k = _padded(call.rows_q, call.q.shape[0]), _padded(call.rows_k, call.k.shape[0])
        yield Piece(entry, row_q, row_k, call.rows_q.lengths.long(), call.rows_k.lengths.long())


def _padded(rows: Rows, total: int) -> Tensor:
    """(N, max_seqlen): the memory row of each row; filler points anywhere legal."""
    row = rows.starts[:-1, None] + torch.arange(rows.max_seqlen, device=rows.starts.device)
    return row.long().clamp(max=total - 1)


class _Memory:
    """The packed or dense tensor that pieces are written to. Filler rows go to one row more, which is dropped."""

    def __init__(self, call: Call, like: Tensor, dtype: torch.dtype) -> None:
        self.dense = call.rows_q is None
        rows = like.shape if self.dense else (like.shape[0] + 1, *like.shape[1:])
        self.tensor = torch.zeros(rows, dtype=dtype, device=like.device)

    def read(self, row: Tensor) -> Tensor:
        """The rows of a piece."""
        return self.tensor if self.dense else self.tensor[row]

    def write(self, row: Tensor, length: Tensor, x: Tensor) -> None:
        """Put the real rows of a piece in place."""
        if self.dense:
            self.tensor.copy_(x)
            return
        real = torch.arange(row.shape[1], device=row.device) < length[:, None]
        target = torch.where(real, row, self.tensor.shape[0] - 1)
        self.tensor.index_copy_(0, target.flatten(), x.flatten(0, 1).to(self.tensor.dtype))

    @property
    def result(self) -> Tensor:
        """Without the row for filler."""
        return self.tensor if self.dense else self.tensor[:-1]


def _rows_of(call: Call, x: Tensor, row: Tensor, length: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows of a piece, (B, S, H, D), in the dtype of computation; filler is zero."""
    if call.rows_q is None:
        return x.to(dtype)
    real = torch.arange(row.shape[1], device=row.device) < length[:, None]
    return x[row].to(dtype).masked_fill(~real.view(*real.shape, *(1,) * (x.ndim - 1)), 0.0)


def _compute_dtype(call: Call) -> torch.dtype:
    return torch.float64 if call.q.dtype == torch.float64 else torch.float32


# --- the contract ---


def forward(call: Call) -> Result:
    """See ``Backend.forward``."""
    dtype = _compute_dtype(call)
    seed = None
    if call.seed is not None:
        seed = call.seed
    elif call.spec.dropout:
        seed = torch.randint(-(1 << 62), 1 << 62, (2,), dtype=torch.int64, device=call.q.device)
    out = _Memory(call, call.q[..., :1].expand(*call.q.shape[:-1], call.v.shape[-1]), call.q.dtype)
    lse = _Memory(call, call.q[..., 0], dtype)
    lse.tensor.fill_(float("-inf"))
    with torch.autocast(call.q.device.type, enabled=False):
        for piece in _pieces(call):
            q = _rows_of(call, call.q, piece.row_q, piece.len_q, dtype)
            k, v = (_rows_of(call, x, piece.row_k, piece.len_k, dtype) for x in (call.k, call.v))
            o, l = _forward_piece(call, piece, q, k, v, seed)
            out.write(piece.row_q, piece.len_q, o)
            lse.write(piece.row_q, piece.len_q, l.transpose(1, 2))
    return Result(out.result, lse.result.transpose(-1, -2), seed)


def backward(call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None) -> Gradients:
    """See ``Backend.backward``."""
    dtype = _compute_dtype(call)
    dq, dk, dv = (_Memory(call, x, x.dtype) for x in (call.q, call.k, call.v))
    dbias = None if call.bias is None else torch.zeros(call.bias.shape, dtype=dtype, device=call.q.device)
    lse_rows = saved.lse.transpose(-1, -2)
    dlse_rows = None if dlse is None else dlse.transpose(-1, -2)
    with torch.autocast(call.q.device.type, enabled=False):
        for piece in _pieces(call):
            row_q, row_k = piece.row_q, piece.row_k
            q, out, do = (_rows_of(call, x, row_q, piece.len_q, dtype) for x in (call.q, saved.out, dout))
            k, v = (_rows_of(call, x, row_k, piece.len_k, dtype) for x in (call.k, call.v))
            lse, extra = (
                None if x is None else _rows_of(call, x, row_q, piece.len_q, dtype).transpose(1, 2)
                for x in (lse_rows, dlse_rows)
            )
            assert lse is not None
            got = _backward_piece(call, piece, q, k, v, out, lse, do, extra, saved.rng)
            dq.write(row_q, piece.len_q, got[0])
            dk.write(row_k, piece.len_k, got[1])
            dv.write(row_k, piece.len_k, got[2])
            if dbias is not None:
                _add_bias(call, piece, dbias, got[3])
    shaped = None if dbias is None or call.bias is None else dbias.to(call.bias.dtype)
    return Gradients(dq.result, dk.result, dv.result, shaped)


def _add_bias(call: Call, piece: Piece, dbias: Tensor, dscores: Tensor) -> None:
    """Sum the scores' gradient into the bias's, over every dim that was broadcast."""
    if call.rows_q is None:
        dbias += dscores.sum_to_size(dbias.shape)
        return
    index = _index(call, piece, dbias.shape)
    dbias.index_put_(torch.broadcast_tensors(*index), dscores, accumulate=True)
