"""Transformer Engine's context parallelism as a plan: its groups, and its placement of tokens, made explicit.

There every rank holds fixed rows, whatever the scheme. With ``DUAL_CHUNK_SWAP`` each sequence, padding included, is cut
in 2 * R chunks, of which rank r holds r and 2 * R - 1 - r, one after the other, sequence by sequence. With
``NO_LOAD_BALANCE`` the rows of the packed batch, padding included, are cut in R equal runs. A plan says where each
*token* lies; rows that hold none are padding to it.

Legend: R ranks, a *room* is a sequence with its padding.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist

from anyattn._context._agreement import side_group
from anyattn._context._data import Comm, Layout, Piece, Shape
from anyattn._context._plan import ContextPlan, normal_mask
from anyattn._context._plan_data import Memory, PlanData, check_features
from anyattn._context._topology import COMMS, Members, members_of, topology
from anyattn._errors import ContextError, PackingError, ShapeError
from anyattn._packing import Packing


class CPLoadBalancingStrategy(enum.Enum):
    """How tokens are divided over a context-parallel group, under Transformer Engine's names.

    Its own enumeration is taken as well.
    """

    DUAL_CHUNK_SWAP = "dual_chunk_swap"
    """Every sequence, padding included, in 2 * ranks chunks; rank r holds chunks r and 2 * ranks - 1 - r."""
    NO_LOAD_BALANCE = "no_load_balance"
    """The rows of a packed batch in as many equal runs as there are ranks. For qkv_format="thd"."""


def strategy_of(given: Any) -> CPLoadBalancingStrategy:
    """A strategy, by its name there too.

    Raises:
        ContextError: no such strategy.
    """
    name = str(getattr(given, "name", None))
    if name not in CPLoadBalancingStrategy.__members__:
        raise ContextError(
            f"load_balancing_strategy must be one of {', '.join(CPLoadBalancingStrategy.__members__)}, got {given!r}"
        )
    return CPLoadBalancingStrategy[name]


# --- who takes part ---


class Ranks(NamedTuple):
    """The ranks that share sequences, and how keys meet queries."""

    members: Members
    comm: Comm

    @property
    def world(self) -> int:
        """How many."""
        return self.members.world


def ranks_of(group: Any, global_ranks: Any, comm: Any) -> Ranks | None:
    """The ranks of a group, or of [a2a group, p2p group]; None where there is but one.

    Raises:
        ContextError: groups that do not go with the scheme, or are not the grid that ``global_ranks`` say.
    """
    if comm not in COMMS:
        raise ContextError(f"unknown cp_comm_type {comm!r}; allowed: {', '.join(COMMS)}")
    if group is None:
        return None
    listed = None if global_ranks is None else len(tuple(global_ranks))
    if not isinstance(group, (list, tuple)):
        if comm == "a2a+p2p":
            raise ContextError("cp_comm_type='a2a+p2p' takes cp_group=[a2a group, p2p group], got one group")
        members = members_of(group)
        if listed not in (None, members.world):
            raise ContextError(
                f"cp_global_ranks must list the {members.world} ranks of cp_group, {list(members.ranks)}, or be None; "
                f"got {list(global_ranks)}"
            )
    elif comm != "a2a+p2p" or len(group) != 2:
        raise ContextError(
            f"cp_comm_type={comm!r} takes {'[a2a group, p2p group]' if comm == 'a2a+p2p' else 'one group'} as "
            f"cp_group, got a list of {len(group)}"
        )
    else:
        inner, outer = members_of(group[0]), members_of(group[1])
        if inner.world == 1:
            members, comm = outer, "p2p"
        elif outer.world == 1:
            members, comm = inner, "a2a"
        else:
            members = _grid(inner, outer, global_ranks)
    if members.world == 1:
        return None
    side_group(members)
    return Ranks(members, cast("Comm", comm))


def _grid(inner: Members, outer: Members, global_ranks: Any) -> Members:
    """Rank = place in the p2p group * ranks of an a2a group + place in it, as ``global_ranks`` lists them."""
    wanted = inner.world * outer.world
    ranks = tuple(map(int, global_ranks)) if global_ranks is not None else ()
    row = ranks[outer.rank * inner.world :][: inner.world]
    column = ranks[inner.rank :: inner.world]
    if len(ranks) != wanted or row != inner.ranks or column != outer.ranks:
        raise ContextError(
            f"cp_comm_type='a2a+p2p' needs cp_global_ranks, all {wanted} of them, neighbours in an a2a group first: "
            f"the a2a group here is {list(inner.ranks)}, the p2p group {list(outer.ranks)}; got {list(ranks)}"
        )
    shape = (outer.world, inner.world)
    rank = outer.rank * inner.world + inner.rank
    groups = (*(outer.groups or ()), *(inner.groups or ()))
    return Members(shape, rank, groups, outer.device, ranks)


# --- which rows hold which tokens ---


class Room(NamedTuple):
    """Where one sequence lies in the memory of the whole batch."""

    start: int
    """First row of the room."""
    rows: int
    """Of the room."""
    first: int
    """Row of the first token, counted from the start of the room."""
    tokens: int
    """Real ones, which follow one another."""


def packed_rooms(packing: Packing) -> tuple[Room, ...]:
    """Of a packed batch: what lies before the next sequence belongs to one."""
    lengths, starts = packing.host_lengths()
    ends = (*starts[1:], packing.rows)
    return tuple(Room(s, e - s, 0, n) for s, e, n in zip(starts, ends, lengths, strict=True))


def entry_rooms(packing: Packing, entries: int, rows: int) -> tuple[Room, ...]:
    """Of a batch of entries of so many rows each, flattened: one sequence in each.

    Raises:
        PackingError: another number of sequences, one that is longer than its entry, or a mask of other entries.
    """
    if packing._shape not in (None, (entries, rows)):
        raise PackingError(
            f"attention_mask speaks of (batch, rows) {packing._shape}, and the batch has {(entries, rows)} over all "
            "ranks: pass the mask of the whole sequences on every rank, not that of its own rows"
        )
    lengths, starts = packing.host_lengths()
    if len(lengths) != entries:
        raise PackingError(f"{len(lengths)} sequences, and the batch has {entries} entries: one lies in each")
    if max(lengths, default=0) > rows:
        raise PackingError(f"the longest sequence has {max(lengths)} tokens, and an entry {rows} rows over all ranks")
    by_mask = packing._shape is not None
    return tuple(Room(i * rows, rows, starts[i] - i * rows if by_mask else 0, n) for i, n in enumerate(lengths))


def layout(rooms: tuple[Room, ...], ranks: int, rows: int, strategy: CPLoadBalancingStrategy) -> Layout:
    """Which token lies in which row of which rank.

    Args:
        rooms: of the whole batch.
        ranks: R.
        rows: of a rank's tensors.
        strategy: how they are divided.

    Raises:
        PackingError: rooms that the ranks do not divide, or more of them than rows.
        ShapeError: more rows than the ranks' share, as where the whole batch was passed.
    """
    end = rooms[-1].start + rooms[-1].rows if rooms else 0
    if end > rows * ranks:
        raise PackingError(f"the sequences take {end} rows, and {ranks} ranks have {rows} each: pass this rank's rows")
    dual = strategy is CPLoadBalancingStrategy.DUAL_CHUNK_SWAP
    runs = (_dual_runs if dual else _equal_runs)(rooms, ranks)
    if rows * ranks != end:
        raise ShapeError(
            f"tensors of {rows} rows, and this rank's share of the {end} rows of all sequences, padding included, is "
            f"{end // ranks} over {ranks} ranks: pass this rank's rows alone. Rows of padding after the last sequence "
            "are one more sequence in the offsets, of length 0, with its room in cu_seqlens_q_padded and "
            "cu_seqlens_kv_padded"
        )
    pieces = tuple(tuple(_pieces(own, rooms)) for own in runs)
    return Layout(tuple(room.tokens for room in rooms), pieces, rows)


#: (room, first row counted from its start, rows, row on the rank)
_Run = tuple[int, int, int, int]


def _dual_runs(rooms: tuple[Room, ...], ranks: int) -> list[list[_Run]]:
    found: list[list[_Run]] = [[] for _ in range(ranks)]
    for number, room in enumerate(rooms):
        chunk, rest = divmod(room.rows, 2 * ranks)
        base, ahead = divmod(room.start, ranks)
        if rest or ahead:
            raise PackingError(
                f"sequence {number} has {room.rows} rows from row {room.start} on, padding included, which 2 * "
                f"{ranks} chunks do not divide: pad every sequence to a multiple of {2 * ranks} and say so in "
                "cu_seqlens_q_padded and cu_seqlens_kv_padded"
            )
        for rank, own in enumerate(found):
            own.append((number, rank * chunk, chunk, base))
            own.append((number, (2 * ranks - 1 - rank) * chunk, chunk, base + chunk))
    return found


def _equal_runs(rooms: tuple[Room, ...], ranks: int) -> list[list[_Run]]:
    total = rooms[-1].start + rooms[-1].rows if rooms else 0
    share, rest = divmod(total, ranks)
    if rest:
        raise PackingError(
            f"the batch has {total} rows, padding included, which {ranks} ranks do not divide: pad the last sequence"
        )
    found: list[list[_Run]] = []
    for rank in range(ranks):
        begin, end = rank * share, (rank + 1) * share
        own = []
        for number, room in enumerate(rooms):
            low, high = max(begin, room.start), min(end, room.start + room.rows)
            if low < high:
                own.append((number, low - room.start, high - low, low - begin))
        found.append(own)
    return found


def _pieces(runs: list[_Run], rooms: tuple[Room, ...]) -> Iterator[Piece]:
    """The tokens of runs of rows; those that follow one another in both as one piece."""
    last: Piece | None = None
    for number, begin, rows, at in runs:
        first, tokens = rooms[number].first, rooms[number].tokens
        low, high = max(begin, first), min(begin + rows, first + tokens)
        if low >= high:
            continue
        piece = Piece(number, low - first, high - first, at + low - begin)
        if last is not None and _follows(last, piece):
            piece = last._replace(end=piece.end)
        elif last is not None:
            yield last
        last = piece
    if last is not None:
        yield last


def _follows(last: Piece, piece: Piece) -> bool:
    return last.document == piece.document and last.end == piece.begin and last.row + last.end - last.begin == piece.row


# --- plans ---


class Side(NamedTuple):
    """Queries or keys of the whole batch."""

    rooms: tuple[Room, ...]
    rows: int
    """Of a rank's tensors."""


def plan(
    ranks: Ranks,
    queries: Side,
    keys: Side | None,
    causal: Any,
    window: tuple[int | None, int | None] | None,
    strategy: CPLoadBalancingStrategy,
    *,
    entries: bool = False,
) -> ContextPlan:
    """The plan of a batch that lies where Transformer Engine has it.

    Args:
        ranks: who takes part.
        queries: where they lie.
        keys: where they lie; None: as the queries.
        causal: as ``anyattn.attention``.
        window: as ``anyattn.attention``.
        strategy: how rows are divided.
        entries: one sequence, for 4-D tensors of any batch size.

    Raises:
        PackingError: sequences that the ranks do not divide.
        ContextError: what the scheme cannot do.
    """
    shares = topology(ranks.comm, ranks.members)
    at_q = layout(queries.rooms, ranks.world, queries.rows, strategy)
    cross = keys is not None
    if cross and ranks.comm in ("p2p", "a2a+p2p"):
        raise ContextError(
            f"keys of other lengths, or with other padding, than queries' under cp_comm_type={ranks.comm!r}: use "
            "cp_comm_type='all_gather' or 'a2a'"
        )
    at_k = at_q if keys is None else layout(keys.rooms, ranks.world, keys.rows, strategy)
    if len(at_q.lengths) != len(at_k.lengths):
        raise PackingError(f"queries have {len(at_q.lengths)} sequences, and keys {len(at_k.lengths)}")
    memory_q = _memory(queries, ranks.world, entries)
    memory_k = memory_q if keys is None else _memory(keys, ranks.world, entries)
    mask = normal_mask(causal, window, at_q.lengths == at_k.lengths)
    data = PlanData(
        comm=ranks.comm, topology=shares, rank=ranks.members.rank, mask=mask, queries=at_q, keys=at_k,
        memory_q=memory_q, memory_k=memory_k, cross=cross, placement="zigzag",
        multiple=1, shape=Shape(), given=(None,) * 4,
    )  # fmt: skip
    check_features(data, frozenset())
    return ContextPlan(data, ranks.members)


def check_scheme(data: PlanData, heads: int, alibi: bool, bias: bool, mask: bool) -> None:
    """Refuse what a scheme cannot do, before a plan is asked for it in other words.

    Args:
        data: of the plan.
        heads: of the queries.
        alibi: there are slopes.
        bias: there is ``core_attention_bias``.
        mask: there is an "arbitrary" mask.

    Raises:
        ContextError: with what to do instead.
    """
    comm = f"under cp_comm_type={data.comm!r}"
    name = "core_attention_bias" if bias else "attn_mask_type='arbitrary'"
    if (bias or mask) and data.comm != "all_gather":
        raise ContextError(f"{name} {comm}, which has not all keys at once: use cp_comm_type='all_gather'")
    if bias and not data.memory_q.entries:
        raise ContextError(
            "core_attention_bias with padding, or with qkv_format='thd', under context parallelism: use a 4-D layout "
            "and a mask type without padding"
        )
    if alibi and data.comm != "a2a" and data.mask.right != 0:
        raise ContextError(f"ALiBi without a causal mask type {comm}: use cp_comm_type='a2a'")
    if heads % data.topology.heads:
        raise ContextError(
            f"{heads} query heads do not divide over the {data.topology.heads} ranks that share heads {comm}: use "
            "cp_comm_type='p2p' or 'all_gather', or as many ranks as divide them"
        )


def _memory(side: Side, ranks: int, entries: bool) -> Memory:
    return Memory(tuple(room.start + room.first for room in side.rooms), side.rows * ranks, entries)


_kept: OrderedDict[tuple[Any, ...], ContextPlan] = OrderedDict()
_KEPT = 64


def kept(key: tuple[Any, ...], make: Callable[[], ContextPlan]) -> ContextPlan:
    """A plan that depends on sizes alone, of the most recent ones."""
    found = _kept.get(key)
    if found is None:
        with torch.inference_mode(False):  # the plan serves training too
            found = _kept[key] = make()
        while len(_kept) > _KEPT:
            _kept.popitem(last=False)
    _kept.move_to_end(key)
    return found


def largest_over(ranks: Ranks, x: Any) -> None:
    """Make a tensor the elementwise largest of all ranks', in place."""
    for group in ranks.members.groups or ():
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
