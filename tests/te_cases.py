"""Batches for Transformer Engine's attention, and what it documents of them, written out as one dense formula.

Everything is dense and float64 here: (B, S, H, D), with a mask of every pair. Nothing of the package is imported.

Legend: B sequences, S and K rooms of the longest query and key sequence, H heads, G kv heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

INF = float("inf")


@dataclass(frozen=True)
class TeCase:
    """One call. Lengths are real ones; rooms are lengths with padding, of one size where the layout is 4-D."""

    layout: str = "bshd"
    mask: str = "causal"
    lengths: tuple[int, ...] = (9, 9)
    rooms: tuple[int, ...] = ()
    """() for no padding."""
    keys: tuple[int, ...] = ()
    """() for as many as queries."""
    key_rooms: tuple[int, ...] = ()
    window: tuple[int, int] | None = None
    bottom_right: bool | None = None
    softcap: float = 0.0
    softmax: str = "vanilla"
    bias: str = "no_bias"
    bias_shape: str = "1hss"
    """b, 1, h, s: which dims are whole."""
    slopes: str = ""
    """"", h or bh."""
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (8, 8)
    scale: float | None = None
    by: str = "offsets"
    """How padding is given: offsets, mask, left (a mask of left padding), both."""
    also_offsets: bool = False
    """Offsets beside a mask, whatever ``by`` says."""
    tail: int = 0
    """Rows beyond all rooms, with "thd"."""
    max_logit: bool = False
    more: tuple[tuple[str, Any], ...] = ()
    """Arguments of forward."""

    @property
    def id(self) -> str:
        """What differs from a plain case."""
        plain = TeCase()
        values = [(n, getattr(self, n)) for n in self.__dataclass_fields__ if getattr(self, n) != getattr(plain, n)]
        return "-".join(f"{n}={v}" for n, v in values).replace(" ", "") or "plain"

    @property
    def is_packed(self) -> bool:
        """thd."""
        return self.layout == "thd"

    def side(self, keys: bool) -> Side:
        """Where queries, or keys, lie."""
        lengths = self.keys if keys and self.keys else self.lengths
        rooms = self.key_rooms if keys and self.keys else self.rooms
        return Side(lengths, rooms or lengths, self.by == "left")


class Side(NamedTuple):
    """Queries or keys."""

    lengths: tuple[int, ...]
    rooms: tuple[int, ...]
    left: bool

    @property
    def longest(self) -> int:
        """S."""
        return max(self.rooms)

    @property
    def starts(self) -> list[int]:
        """First rows of rooms, packed, and the end."""
        found = [0]
        for room in self.rooms:
            found.append(found[-1] + room)
        return found

    def real(self) -> Tensor:
        """bool (B, S)."""
        at = torch.arange(self.longest)
        found = []
        for length, room in zip(self.lengths, self.rooms, strict=True):
            first = room - length if self.left else 0
            found.append((at >= first) & (at < first + length))
        return torch.stack(found)


@dataclass
class Batch:
    """Dense leaves of a case."""

    case: TeCase
    leaves: dict[str, Tensor] = field(default_factory=dict)
    """q (B, S, H, D), k, v, dout, and sink, bias, slopes, hidden where they are there."""


def build(case: TeCase, garbage: float = 1e3) -> Batch:
    """A batch; what is no token is garbage."""
    torch.manual_seed(7)
    queries, keys = case.side(False), case.side(True)
    (heads, groups), (dim, dim_v) = case.heads, case.dims
    batch = Batch(case)
    sizes = {
        "q": (queries, heads, dim), "dout": (queries, heads, dim_v),
        "k": (keys, groups, dim), "v": (keys, groups, dim_v),
    }  # fmt: skip
    for name, (side, number, size) in sizes.items():
        x = torch.randn(len(side.lengths), side.longest, number, size, dtype=torch.float64)
        batch.leaves[name] = x.masked_fill(~side.real()[..., None, None], garbage)
    shape = (len(queries.lengths), heads, queries.longest, keys.longest)
    if case.softmax == "learnable":
        batch.leaves["sink"] = torch.randn(heads)
    if case.bias.endswith("scale_bias"):
        whole = [n if c not in "1" else 1 for n, c in zip(shape, case.bias_shape, strict=True)]
        batch.leaves["bias"] = torch.randn(whole, dtype=torch.float64)
    if case.slopes:
        size = (heads,) if case.slopes == "h" else (shape[0], heads)
        batch.leaves["slopes"] = torch.rand(size) / 4
    if case.mask == "arbitrary":
        batch.leaves["hidden"] = torch.rand(shape[0], 1, *shape[2:]) > 0.6
    return batch


# --- what it means ---


def positions(case: TeCase) -> Tensor:
    """(B, S, K): key position - query position, where positions count real tokens."""
    queries, keys = case.side(False), case.side(True)
    causal = "causal" in case.mask
    bottom_right = "bottom_right" in case.mask if causal else case.bottom_right is not False
    padded = "padding" in case.mask
    found = []
    for i in range(len(queries.lengths)):
        places = []
        for side in (queries, keys):
            first = side.rooms[i] - side.lengths[i] if side.left else 0
            places.append(torch.arange(side.longest) - first)
        lengths = [side.lengths[i] if padded else side.longest for side in (queries, keys)]
        shift = lengths[1] - lengths[0] if bottom_right else 0
        found.append(places[1][None] - (places[0] + shift)[:, None])
    return torch.stack(found)


def seen(case: TeCase, batch: Batch) -> Tensor:
    """bool (B, 1, S, K)."""
    away = positions(case)
    left, right = case.window or (-1, -1)
    if "causal" in case.mask:
        right = 0
    found = torch.ones_like(away, dtype=torch.bool)
    if left >= 0:
        found &= away >= -left
    if right >= 0:
        found &= away <= right
    if "padding" in case.mask:
        found &= case.side(False).real()[:, :, None] & case.side(True).real()[:, None]
    found = found[:, None]
    return found & ~batch.leaves["hidden"] if "hidden" in batch.leaves else found


def mean(case: TeCase, batch: Batch, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(out (B, S, H, V), the largest logits (H,)) in float64."""
    q, k, v = (leaves[n].double().transpose(1, 2) for n in "qkv")
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scale = case.scale if case.scale is not None else case.dims[0] ** -0.5
    logits = q @ k.transpose(-1, -2)
    if case.bias == "pre_scale_bias":
        logits = logits + leaves["bias"]
    logits = logits * scale
    if case.softcap:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    if case.bias == "post_scale_bias":
        logits = logits + leaves["bias"]
    if case.bias == "alibi":
        slopes = batch.leaves["slopes"] if case.slopes else torch.tensor(series(q.shape[1]))
        slopes = slopes.double().expand(q.shape[0], -1)
        logits = logits - slopes[..., None, None] * positions(case).abs()[:, None]
    visible = seen(case, batch)
    logits = logits.masked_fill(~visible, -INF)
    largest = logits.detach().amax((0, 2, 3))
    weights = logits
    if case.softmax != "vanilla":
        sink = leaves["sink"].double() if case.softmax == "learnable" else torch.zeros(q.shape[1], dtype=torch.float64)
        weights = torch.cat([logits, sink[:, None, None].expand(*logits.shape[:3], 1)], -1)
    some = visible.any(-1, keepdim=True)
    weights = torch.softmax(weights.masked_fill(~some, 0), -1)[..., : logits.shape[-1]].masked_fill(~some, 0)
    return (weights.masked_fill(~visible, 0) @ v).transpose(1, 2), largest


def series(heads: int) -> list[float]:
    """ALiBi's slopes as its paper gives them."""
    if heads & (heads - 1) == 0:
        return [2.0 ** (-8.0 * (i + 1) / heads) for i in range(heads)]
    below = 1 << (heads.bit_length() - 1)
    return series(below) + series(2 * below)[0::2][: heads - below]


class Answer(NamedTuple):
    """Dense, float64."""

    out: Tensor
    largest: Tensor
    grads: dict[str, Tensor]


def answer(batch: Batch) -> Answer:
    """out and gradients, exactly zero in padding."""
    case = batch.case
    names: list[str] = [n for n in ("q", "k", "v", "sink", "bias") if n in batch.leaves]
    real = {"q": case.side(False).real(), "k": case.side(True).real(), "v": case.side(True).real()}
    if "padding" not in case.mask:
        real = {}
    leaves = {n: batch.leaves[n].detach().double().requires_grad_() for n in names}
    clean = {n: x.masked_fill(~real[n][..., None, None], 0) if n in real else x for n, x in leaves.items()}
    out, largest = mean(case, batch, clean)
    dout = batch.leaves["dout"].masked_fill(~case.side(False).real()[..., None, None], 0)
    if "padding" not in case.mask:
        dout = batch.leaves["dout"]
    found = torch.autograd.grad((out * dout).sum(), list(leaves.values()), allow_unused=True)
    grads = {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(names, found, strict=True)}
    return Answer(out.detach(), largest, grads)


# --- as the module takes it ---


def pack(x: Tensor, side: Side, layout: str, tail: int = 0, garbage: float = 1e3) -> Tensor:
    """A dense (B, S, H, D) as the layout has it."""
    if layout == "bshd":
        return x
    if layout == "sbhd":
        return x.transpose(0, 1)
    rows = [x[i, :room] for i, room in enumerate(side.rooms)]
    return torch.cat([*rows, x.new_full((tail, *x.shape[2:]), garbage)])


def unpack(x: Tensor, side: Side, layout: str) -> Tensor:
    """A layout's (..., H * V) or (..., H, V) as dense (B, S, ...), zero beyond rooms."""
    if layout == "bshd":
        return x
    if layout == "sbhd":
        return x.transpose(0, 1)
    found = x.new_zeros(len(side.rooms), side.longest, *x.shape[1:])
    for i, (start, room) in enumerate(zip(side.starts, side.rooms, strict=False)):
        found[i, :room] = x[start : start + room]
    return found


def offsets(numbers: tuple[int, ...]) -> Tensor:
    """int32, cumulative."""
    return torch.tensor([0, *numbers]).cumsum(0).to(torch.int32)


def arguments(batch: Batch) -> dict[str, Any]:
    """Of forward, beside q, k, v and bias; offsets and masks are those of the whole batch."""
    case = batch.case
    found: dict[str, Any] = dict(case.more)
    if case.bias != "no_bias":
        found["core_attention_bias_type"] = case.bias
    if case.slopes:
        found["alibi_slopes"] = batch.leaves["slopes"]
    if "hidden" in batch.leaves:
        found["attention_mask"] = batch.leaves["hidden"]
    if "padding" not in case.mask:
        return found
    queries, keys = case.side(False), case.side(True)
    if case.by in ("offsets", "both") or case.is_packed or case.also_offsets:
        found["cu_seqlens_q"] = offsets(queries.lengths)
        found["cu_seqlens_kv"] = offsets(keys.lengths) if case.keys else found["cu_seqlens_q"]
        if case.is_packed and queries.rooms != queries.lengths:
            found["cu_seqlens_q_padded"] = offsets(queries.rooms)
            found["cu_seqlens_kv_padded"] = offsets(keys.rooms) if case.keys else found["cu_seqlens_q_padded"]
    if case.by != "offsets":
        masks = tuple(~side.real()[:, None, None] for side in (queries, keys))
        found["attention_mask"] = masks if case.keys else masks[0]
    return found


def constructor(case: TeCase) -> dict[str, Any]:
    """Of the module."""
    return {
        "num_attention_heads": case.heads[0],
        "kv_channels": case.dims[0] if case.dims[0] == case.dims[1] else case.dims,
        "num_gqa_groups": case.heads[1],
        "qkv_format": case.layout,
        "attn_mask_type": case.mask,
        "window_size": case.window,
        "bottom_right_diagonal": case.bottom_right,
        "softcap": case.softcap,
        "softmax_scale": case.scale,
        "softmax_type": case.softmax,
        "attention_type": "cross" if case.keys else "self",
        "return_max_logit": case.max_logit,
    }
