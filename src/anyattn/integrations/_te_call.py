"""One attention of Transformer Engine's as one call of ``anyattn.attention``, on one rank or over several.

Legend: B batch, S rows of q, K rows of k, H heads; "thd" has no batch. Under context parallelism S and K are a rank's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn._context._plan import ContextPlan
from anyattn._errors import InvalidArgument, PackingError, Unsupported
from anyattn._packing import Packing
from anyattn.integrations import _te_context, _te_rows
from anyattn.integrations._te_context import CPLoadBalancingStrategy, Ranks, Room, Side
from anyattn.integrations._te_entries import entries_of
from anyattn.integrations._te_max_logit import Span, Terms, largest, parts_of
from anyattn.integrations._te_options import Masking, window_of
from anyattn.integrations._te_options import masking as masking_of
from anyattn.integrations._te_rows import Given, Rows, check, distance, remembered, rows_of, rows_unread, visible


@dataclass(frozen=True, eq=False)
class Call:
    """All that a call says, in anyattn's terms but for layout and placement."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: str
    """bshd, sbhd or thd."""
    masking: Masking
    scale: float
    softcap: float | None
    sink: Tensor | None
    slopes: Tensor | None
    """Of ALiBi: (H,) or (sequences, H)."""
    bias: Tensor | None
    mask: Tensor | None = None
    """bool, True where a query sees a key."""
    sides: tuple[Given, Given] | None = None
    """Where padding is; None: nowhere."""
    ranks: Ranks | None = None
    strategy: CPLoadBalancingStrategy = CPLoadBalancingStrategy.DUAL_CHUNK_SWAP
    check: bool = True
    """Offsets may be read."""
    layer: int | None = None
    """The number of the layer that calls."""
    rows: Rows | None = None
    """Where the tokens lie, if that is known already."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(B, S, K)."""
        if self.layout == "thd":
            return 1, self.q.shape[0], self.k.shape[0]
        batch, seq = (0, 1) if self.layout == "bshd" else (1, 0)
        return self.q.shape[batch], self.q.shape[seq], self.k.shape[seq]


class Settled(NamedTuple):
    """What is left to do: attention with these, and taking the result apart again."""

    q: Tensor
    k: Tensor
    v: Tensor
    arguments: dict[str, Any]
    back: Callable[[Tensor], Tensor]
    """The result in the caller's layout."""
    largest: Callable[[], Tensor]
    """(H,): the largest score of each head."""


def settle(call: Call) -> Settled:
    """How a call is made.

    Raises:
        AnyattnError: what is wrong with it, or cannot be done.
    """
    return _alone(call) if call.ranks is None else _shared(call, call.ranks)


def _arguments(call: Call) -> dict[str, Any]:
    return {
        "causal": call.masking.how_causal,
        "window": call.masking.window,
        "scale": call.scale,
        "softcap": call.softcap,
        "sink": call.sink,
        "alibi_slopes": call.slopes,
        "bias": call.bias,
        "mask": call.mask,
    }


def masked(call: Call, kind: str, window: Any, aligned: bool | None, mask: Any, pad_between: bool | None) -> Call:
    """A call with its mask, and with padding where the mask type has it.

    Raises:
        InvalidArgument: offsets and masks that do not go with the type.
    """
    masking = masking_of(kind, window_of(kind, window), aligned)
    assert call.sides is not None
    if call.layout == "thd" and not masking.padding:
        raise InvalidArgument(
            f"qkv_format='thd' takes padding mask types, got {kind!r}: use 'padding' or 'padding_causal'"
        )
    for side, rows in zip(call.sides, call.sizes[1:], strict=True):
        if call.layout != "thd" and side.longest not in (None, rows):
            raise InvalidArgument(
                f"max_seqlen_{side.name} is {side.longest}, and the tensors have {rows} rows: leave it out with "
                f"qkv_format={call.layout!r}"
            )
    if masking.padding:
        check(*call.sides, call.layout == "thd", pad_between)
        if call.layout != "thd":
            world = 1 if call.ranks is None else call.ranks.world
            _te_rows.check_entries(call.sides, call.layout, call.sizes, world)
        return replace(call, masking=masking)
    for side in call.sides:
        if side.offsets is not None or side.padded is not None:
            raise InvalidArgument(
                f"cu_seqlens_{side.name} say where padding is, and attn_mask_type={kind!r} has none: use a padding "
                "mask type, or leave them out"
            )
    if not masking.arbitrary:
        return replace(call, masking=masking, sides=None)
    _, rows_q, rows_k = call.sizes
    keys = rows_k if call.ranks is None else rows_k * call.ranks.world
    return replace(call, masking=masking, sides=None, mask=visible(mask, (rows_q, keys)))


# --- one rank ---


def _alone(call: Call) -> Settled:
    rows = _rows(call)
    if rows is not None and call.layout == "thd" and call.bias is not None:
        return _spread(call, call.bias, rows)
    call = _aligned(call, rows)
    arguments = _arguments(call) | {"layout": call.layout}
    if rows is not None:
        if rows.keys is not None or call.bias is not None:
            check_runs(rows.queries, rows.keys)
        _, rows_q, rows_k = call.sizes
        # Entries of other sizes are another packing, whatever their lengths.
        apart = rows.keys is None and call.layout != "thd" and rows_q != rows_k
        arguments |= {"packing": rows.queries, "packing_kv": rows.queries if apart else rows.keys}
    return Settled(call.q, call.k, call.v, arguments, _same, lambda: _largest_alone(call, rows))


def check_runs(*packings: Packing | None) -> None:
    """Refuse padding amid the tokens of an entry where there is more than self-attention.

    Raises:
        PackingError: it is there.
    """
    if any(packing is not None and packing._holes is not None for packing in packings):
        raise PackingError(
            "attention_mask has padding between the tokens of an entry, which goes with self-attention alone: not with "
            "cross-attention, core_attention_bias, return_max_logit or context parallelism. Say it by "
            "attn_mask_type='arbitrary' and a mask of (batch, 1, seq_q, seq_kv), or move padding to an end"
        )


def _same(x: Tensor) -> Tensor:
    return x


def _spread(call: Call, bias: Tensor, rows: Rows) -> Settled:
    """A packed batch with a bias, as one of 4-D tensors: a bias speaks of positions within each sequence."""
    keys = rows.queries if rows.keys is None else rows.keys
    size_q, size_k = (
        size if size > 1 else max(packing.max_seqlen, 1)
        for size, packing in zip((1, 1, *bias.shape)[-2:], (rows.queries, keys), strict=True)
    )
    queries, at_q = entries_of(rows.queries, size_q, call.q.device)
    others, at_k = (
        (queries, at_q) if rows.keys is None and size_q == size_k else entries_of(keys, size_k, call.q.device)
    )
    total = call.q.shape[0]
    inner = replace(
        call, q=queries.enter(call.q), k=others.enter(call.k), v=others.enter(call.v), layout="bshd",
        rows=Rows(at_q, None if at_k is at_q else at_k),
    )  # fmt: skip
    settled = _alone(inner)
    return settled._replace(back=lambda x: queries.leave(x, total))


def _rows(call: Call) -> Rows | None:
    if call.rows is not None or call.sides is None:
        return call.rows
    if unread(call):
        return rows_unread(*call.sides)
    if _te_rows.captured(call.q):
        raise Unsupported(
            "a 4-D batch with padding cannot be captured in a CUDA graph, for its lengths are read on the host: use "
            "qkv_format='thd' with max_seqlen_q and max_seqlen_kv, or a mask type without padding"
        )
    if torch.compiler.is_compiling():
        from anyattn.integrations._te_breaking import rows_within as read
    else:
        read = _te_rows.rows_within
    found: Rows = read(*call.sides, call.layout, call.sizes[1:], call.q.device, call.layer)
    return found


def unread(call: Call) -> bool:
    """Whether a packed batch's offsets stay on the device."""
    return call.ranks is None and call.layout == "thd" and (not call.check or _te_rows.captured(call.q))


def _aligned(call: Call, rows: Rows | None) -> Call:
    """Windows and ALiBi from the top left without causality, which ``attention`` has where lengths are equal.

    Raises:
        Unsupported: lengths differ, or may, and there is padding.
    """
    masking = call.masking
    if masking.causal or not masking.top_left or (masking.window is None and call.slopes is None):
        return call
    _, rows_q, rows_k = call.sizes
    if rows is None and rows_q == rows_k:
        return call
    if rows is not None and (rows.keys is None or rows.queries.relation(rows.keys) == "equal"):
        return call
    if rows is not None:
        raise Unsupported(
            "bottom_right_diagonal=False with padding, no causality and keys of another length than queries': leave "
            "bottom_right_diagonal out, or use a padding_causal mask type"
        )
    away = distance(rows_q, rows_k, call.q.device)
    mask, bias = call.mask, call.bias
    left, right = masking.window or (None, None)
    for hidden in (None if left is None else away < -left, None if right is None else away > right):
        if hidden is not None:
            mask = ~hidden if mask is None else mask & ~hidden
    if call.slopes is not None:
        term = -call.slopes[..., None, None] * away.abs()
        bias = term if bias is None else bias + term
    return replace(call, masking=masking._replace(window=None), slopes=None, mask=mask, bias=bias)


def _largest_alone(call: Call, rows: Rows | None) -> Tensor:
    batch, rows_q, rows_k = call.sizes
    if rows is None:
        spans = [Span(i, i * rows_q, rows_q, 0, rows_q, i * rows_k, rows_k) for i in range(batch)]
    else:
        queries, keys = rows.queries, rows.queries if rows.keys is None else rows.keys
        if call.layout != "thd":
            queries, keys = queries.for_entries(batch, rows_q), keys.for_entries(batch, rows_k)
        spans = _spans(queries, keys, *((0, 0) if call.layout == "thd" else (rows_q, rows_k)))
    return _largest(call, spans, _flat(call.q, call.layout), _flat(call.k, call.layout))


def _spans(queries: Packing, keys: Packing, rows_q: int, rows_k: int) -> list[Span]:
    pairs = zip(*queries.host_lengths(), *keys.host_lengths(), strict=True)
    return [Span(i, s, n, 0, n, t, m, s - i * rows_q, t - i * rows_k) for i, (n, s, m, t) in enumerate(pairs)]


def _flat(x: Tensor, layout: str) -> Tensor:
    """(B * rows, H, D)."""
    if layout == "thd":
        return x
    return (x if layout == "bshd" else x.transpose(0, 1)).flatten(0, 1)


def _largest(call: Call, spans: list[Span], q: Tensor, k: Tensor) -> Tensor:
    terms = Terms(call.masking, call.scale, call.softcap)
    parts = parts_of(spans, q, k, call.slopes, call.bias, call.mask)
    return largest(parts, q.shape[1], terms, q.device)


# --- several ranks ---


def _shared(call: Call, ranks: Ranks) -> Settled:
    batch, masking = call.sizes[0], call.masking
    if call.strategy is not CPLoadBalancingStrategy.DUAL_CHUNK_SWAP and call.layout != "thd":
        raise InvalidArgument("load_balancing_strategy NO_LOAD_BALANCE goes with qkv_format='thd'")
    plan = _dense_plan(call, ranks) if call.sides is None else _packed_plan(call, ranks)
    _te_context.check_scheme(
        plan._data, call.q.shape[-2], call.slopes is not None, call.bias is not None, call.mask is not None
    )
    lengths = plan._data.queries.lengths, plan._data.keys.lengths
    positioned = masking.window is not None or call.slopes is not None
    if masking.top_left and not masking.causal and positioned and lengths[0] != lengths[1]:
        raise Unsupported(
            "bottom_right_diagonal=False without causality under context parallelism, with keys of another length than "
            "queries': leave bottom_right_diagonal out"
        )
    arguments = {n: x for n, x in _arguments(call).items() if n not in ("causal", "window")} | {"plan": plan}
    back: Callable[[Tensor], Tensor] = _same
    if call.sides is None or call.layout == "thd":
        tensors = call.q, call.k, call.v
        arguments["layout"] = call.layout
    else:
        tensors = _flat(call.q, call.layout), _flat(call.k, call.layout), _flat(call.v, call.layout)
        back = _entries(call.layout, batch)
        arguments["layout"] = "thd"
    return Settled(*tensors, arguments, back, lambda: _largest_shared(call, ranks, plan))


def _entries(layout: str, batch: int) -> Callable[[Tensor], Tensor]:
    def back(x: Tensor) -> Tensor:
        entries: Tensor = x.unflatten(0, (batch, -1))
        return entries if layout == "bshd" else entries.transpose(0, 1)

    return back


def _dense_plan(call: Call, ranks: Ranks) -> ContextPlan:
    """Of equal sequences without padding: by their sizes alone."""
    _, rows_q, rows_k = call.sizes
    masking, strategy = call.masking, call.strategy

    def side(rows: int) -> Side:
        return Side((Room(0, rows * ranks.world, 0, rows * ranks.world),), rows)

    def make() -> ContextPlan:
        keys = None if rows_k == rows_q else side(rows_k)
        return _te_context.plan(
            ranks, side(rows_q), keys, masking.how_causal, masking.window, strategy, entries=True
        )  # fmt: skip

    return _te_context.kept((ranks, rows_q, rows_k, masking, strategy), make)


def _packed_plan(call: Call, ranks: Ranks) -> ContextPlan:
    """Of sequences with padding or of several lengths; made at the first layer, from offsets read on the host."""
    assert call.sides is not None
    if _te_rows.captured(call.q):
        raise Unsupported(
            "a batch with padding or of several lengths cannot be captured in a CUDA graph under context parallelism: "
            "its plan is made from lengths on the host"
        )
    batch, rows_q, rows_k = call.sizes
    queries, keys = call.sides
    packed, masking, strategy = call.layout == "thd", call.masking, call.strategy

    def make() -> ContextPlan:
        rows = rows_of(queries, keys, packed, torch.device("cpu"), call.layer)
        check_runs(rows.queries, rows.keys)

        def side(packing: Packing, mine: int) -> Side:
            if packed:
                return Side(_te_context.packed_rooms(packing), mine)
            return Side(_te_context.entry_rooms(packing, batch, mine * ranks.world), batch * mine)

        other = rows.keys if rows.keys is not None or rows_k == rows_q else rows.queries
        return _te_context.plan(
            ranks, side(rows.queries, rows_q), None if other is None else side(other, rows_k), masking.how_causal,
            masking.window, strategy,
        )  # fmt: skip

    found: ContextPlan = remembered(
        "plan", queries, keys, (ranks, call.sizes, packed, masking, strategy), make, call.layer
    )  # fmt: skip
    return found


def _largest_shared(call: Call, ranks: Ranks, plan: ContextPlan) -> Tensor:
    """Every rank's queries by all keys, which are gathered for it."""
    data = plan._data
    batch, rows_q, _ = call.sizes
    dense = call.sides is None
    q, k = _flat(call.q, call.layout), _flat(call.k, call.layout)
    pieces = data.queries.pieces[data.rank]
    if dense:
        keys = plan.kv.unshard(k.detach().unflatten(0, (batch, -1)), dim=1).flatten(0, 1)
        total = data.memory_k.rows
        spans = [
            Span(i, i * rows_q + p.row, p.end - p.begin, p.begin, data.queries.lengths[0], i * total, total, p.row)
            for i in range(batch)
            for p in pieces
        ]
    else:
        keys = plan.kv.unshard(k.detach())
        spans = [
            Span(d, row, end - begin, begin, data.queries.lengths[d], data.memory_k.starts[d], data.keys.lengths[d])
            for d, begin, end, row in pieces
        ]
    found = _largest(call, spans, q, keys)
    _te_context.largest_over(ranks, found)
    return found
