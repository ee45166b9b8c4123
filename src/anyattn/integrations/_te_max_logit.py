"""The largest score of each head: what kernels do not return, computed apart in blocks of queries, in plain torch.

Legend: H heads, G kv heads, n queries of a block, m keys, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from anyattn.integrations._te_options import Masking

#: Scores that are in memory at once, in float32: 256 MiB.
SCORES = 1 << 26


class Part(NamedTuple):
    """Queries of one sequence that follow one another, and all keys of that sequence."""

    queries: Tensor
    """(rows, H, D)."""
    keys: Tensor
    """(len_k, G, D)."""
    first: int
    """Of the queries, in their sequence."""
    len_q: int
    """Of the whole sequence."""
    slopes: Tensor | None = None
    """(H,)."""
    bias: Tensor | None = None
    """(H or 1, rows or 1, len_k or 1)."""
    mask: Tensor | None = None
    """The same, bool: True where a query sees a key."""


class Terms(NamedTuple):
    """What scores are made of, beside tensors."""

    masking: Masking
    scale: float
    softcap: float | None


@torch.no_grad()
def largest(parts: Iterable[Part], heads: int, terms: Terms, device: torch.device) -> Tensor:
    """float32 (heads,): the largest score that any query of any part sees; -inf where none sees a key.

    Scores are scaled, capped and biased; a sink is none. No gradient.
    """
    found = torch.full((heads,), float("-inf"), device=device)
    for part in parts:
        if part.queries.shape[0] and part.keys.shape[0]:
            for block in _blocks(part, heads):
                found = torch.maximum(found, _largest_of(block, terms).to(found.dtype))
    return found


def _blocks(part: Part, heads: int) -> Iterator[Part]:
    """A part in blocks of as many queries as there is memory for."""
    rows = part.queries.shape[0]
    step = max(1, SCORES // max(1, heads * part.keys.shape[0]))
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        bias, mask = (
            x if x is None or x.shape[1] == 1 else x[:, begin:end] for x in (part.bias, part.mask)
        )  # fmt: skip
        yield part._replace(queries=part.queries[begin:end], first=part.first + begin, bias=bias, mask=mask)


def _largest_of(block: Part, terms: Terms) -> Tensor:
    masking = terms.masking
    rows, len_k = block.queries.shape[0], block.keys.shape[0]
    place = block.first if masking.top_left else block.first + len_k - block.len_q
    low, high = _range(place, rows, len_k, masking)
    if low >= high:
        return torch.full((block.queries.shape[1],), float("-inf"), device=block.queries.device)
    scores = _products(block.queries, block.keys[low:high]) * terms.scale
    if terms.softcap is not None:
        scores = terms.softcap * torch.tanh(scores / terms.softcap)
    away = (
        torch.arange(low, high, device=scores.device) - torch.arange(place, place + rows, device=scores.device)[:, None]
    )
    if block.slopes is not None:
        scores = scores - block.slopes[:, None, None].to(scores.dtype) * away.abs()
    if block.bias is not None:
        scores = scores + _columns(block.bias, low, high).to(scores.dtype)
    hidden = _hidden(away, masking)
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    if block.mask is not None:
        scores = scores.masked_fill(~_columns(block.mask, low, high), float("-inf"))
    return scores.amax((1, 2))


def _range(place: int, rows: int, len_k: int, masking: Masking) -> tuple[int, int]:
    """The keys that some query of a block may see."""
    left, right = masking.window or (None, None)
    if masking.causal:
        right = 0
    low = 0 if left is None else max(0, place - left)
    high = len_k if right is None else min(len_k, place + rows + right)
    return low, high


def _hidden(away: Tensor, masking: Masking) -> Tensor | None:
    left, right = masking.window or (None, None)
    if masking.causal:
        right = 0
    hidden = None if right is None else away > right
    if left is not None:
        hidden = away < -left if hidden is None else hidden | (away < -left)
    return hidden


def _columns(x: Tensor, low: int, high: int) -> Tensor:
    return x if x.shape[2] == 1 else x[..., low:high]


def _products(queries: Tensor, keys: Tensor) -> Tensor:
    """(H, n, m) in float32, or float64: half precision goes through tensor cores and is not rounded after."""
    heads, kv_heads = queries.shape[1], keys.shape[1]
    share = heads // kv_heads
    q = queries.unflatten(1, (kv_heads, share)).permute(1, 2, 0, 3).flatten(1, 2)  # (G, share * n, D)
    k = keys.permute(1, 2, 0)  # (G, D, m)
    if q.dtype in (torch.float16, torch.bfloat16):
        scores = torch.bmm(q, k, out_dtype=torch.float32) if q.is_cuda else torch.bmm(q.float(), k.float())
    else:
        scores = torch.bmm(q, k)
    return scores.view(heads, queries.shape[0], keys.shape[0])


# --- parts of a batch ---


class Span(NamedTuple):
    """One run of queries of one sequence, by rows of flattened tensors."""

    entry: int
    """Batch entry of its terms."""
    row: int
    rows: int
    first: int
    """Position of the first query."""
    len_q: int
    row_k: int
    len_k: int
    term_q: int = 0
    """First row of bias and mask."""
    term_k: int = 0


def parts_of(
    spans: Sequence[Span],
    q: Tensor,
    k: Tensor,
    slopes: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
) -> Iterator[Part]:
    """Parts of flattened q (rows, H, D) and k (rows, G, D); slopes are (H,) or (sequences, H), terms up to 4-D."""
    for s in spans:
        yield Part(
            q[s.row : s.row + s.rows],
            k[s.row_k : s.row_k + s.len_k],
            s.first,
            s.len_q,
            slopes if slopes is None or slopes.ndim == 1 else slopes[s.entry],
            _term(bias, s),
            _term(mask, s),
        )


def _term(term: Tensor | None, s: Span) -> Tensor | None:
    """The part of a term that a span meets."""
    if term is None:
        return None
    whole = term.reshape((1,) * (4 - term.ndim) + tuple(term.shape))
    found = whole[s.entry if whole.shape[0] > 1 else 0]
    found = found if found.shape[1] == 1 else found[:, s.term_q : s.term_q + s.rows]
    return found if found.shape[2] == 1 else found[..., s.term_k : s.term_k + s.len_k]
