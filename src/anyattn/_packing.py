"""``Packing``: where the sequences of a batch lie in memory.

Everything a kernel may ask for lies in one int32 tensor, the *table* (``_rows``), so that moving, refilling and
capturing a packing is one copy. Legend: N sequences, T rows in memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyattn._errors import DtypeError, PackingError, ShapeError
from anyattn._offsets import (
    check_number,
    check_offsets,
    check_tensor,
    check_values,
    cumulative,
    extended,
    read_offsets,
    whole_numbers,
)
from anyattn._problem import Relation
from anyattn._rows import build_table, host_of_table, rows_of_table, valid_rows

#: In place of the rows of an entry: a refill put tokens elsewhere than first in the entries of a batch.
ELSEWHERE = -2


@dataclass(frozen=True, slots=True)
class Facts:
    """What the host knows of a packing; part of the choice of a kernel."""

    sequences: int
    max_seqlen: int
    rows: int | None
    """None: not known here, the tensor's rows count."""
    gaps: bool
    """Rows before ``rows`` outside every sequence may exist."""
    lengths: tuple[int, ...] | None = None
    """None: not known here, or free to change (fixed capacity)."""
    starts: tuple[int, ...] | None = None
    """First rows, where lengths are known."""

    @property
    def longest_gap(self) -> int | None:
        """The longest run of rows outside every sequence, before, between and after them; None: not known here."""
        if self.starts is None or self.lengths is None or self.rows is None:
            return None
        ends = [0, *(s + n for s, n in zip(self.starts, self.lengths, strict=True))]
        return max(begin - end for begin, end in zip((*self.starts, self.rows), ends, strict=True))


class Packing:
    """Where the sequences of a batch lie in memory: their offsets, their room, and what is padding.

    Args:
        cu_seqlens: int32 (sequences + 1,): cumulative real lengths, from 0.
        cu_seqlens_padded: int32 (sequences + 1,): first row of each sequence in memory, then the end of the last
            one's room. Default: ``cu_seqlens``, no padding between sequences. The first may be above 0.
        max_seqlen: at least the longest real length. Default: read from the offsets.
        rows: rows in memory. Default: the end of the padded offsets. A tensor may have more: the rest is padding.
        sanitize: treat padding of q, k, v and of the incoming gradient as zeros even where it is NaN or infinite.
            Finite padding never needs it. Costs one pass over each tensor.
        check: copy the offsets to the host once, here, and check them. With False nothing is copied if
            ``max_seqlen`` is given, and the caller answers for the values. With 4-D tensors the first rows of each
            entry are then the real ones.

    Raises:
        DtypeError: offsets that are not int32.
        PackingError: offsets that do not start at 0 or decrease, room smaller than a length, a ``max_seqlen`` or
            ``rows`` that is too small.

    A packing is made outside of compiled regions, once per batch. It pickles. ``q`` and ``k`` of one packing may come
    in any dtype and head count.

    Example::

        >>> p = Packing.from_lengths([3, 0, 2], pad_to_multiple_of=4)
        >>> p.total, p.rows, p.max_seqlen
        (5, 8, 3)
        >>> p.valid.tolist()
        [True, True, True, False, True, True, False, False]
    """

    #: A call with 4-D tensors has found that these offsets speak of its rows.
    _taken_as_it_is = False

    def __init__(
        self,
        cu_seqlens: Tensor,
        cu_seqlens_padded: Tensor | None = None,
        max_seqlen: int | None = None,
        rows: int | None = None,
        sanitize: bool = False,
        check: bool = True,
    ) -> None:
        check_offsets("cu_seqlens", cu_seqlens)
        check_number("max_seqlen", max_seqlen)
        check_number("rows", rows)
        starts = cu_seqlens
        if cu_seqlens_padded is not None:
            check_offsets("cu_seqlens_padded", cu_seqlens_padded)
            if cu_seqlens_padded.shape != cu_seqlens.shape or cu_seqlens_padded.device != cu_seqlens.device:
                raise PackingError(
                    f"cu_seqlens_padded must have cu_seqlens' shape and device, {tuple(cu_seqlens.shape)} on "
                    f"{cu_seqlens.device}; got {tuple(cu_seqlens_padded.shape)} on {cu_seqlens_padded.device}"
                )
            starts = cu_seqlens_padded
        known = read_offsets(cu_seqlens, starts) if check or max_seqlen is None else None
        lengths: tuple[int, ...] | None = None
        firsts: tuple[int, ...] | None = None
        gaps = True
        if known is not None:
            check_values(known, max_seqlen, rows)
            lengths = tuple(b - a for a, b in zip(known[0], known[0][1:], strict=False))
            firsts = tuple(known[1][:-1])
            if max_seqlen is None:
                max_seqlen = max(lengths, default=0)
            if rows is None:
                rows = known[1][-1]
            gaps = sum(lengths) != rows
        assert max_seqlen is not None
        self.cu_seqlens, self.cu_seqlens_padded = _own(cu_seqlens), _own(starts)
        self.sanitize = sanitize
        self.check = check
        self._assemble(Facts(cu_seqlens.numel() - 1, max_seqlen, rows, gaps, lengths, firsts))

    def _assemble(self, facts: Facts, shape: tuple[int, int] | None = None, holes: Tensor | None = None) -> None:
        """Set what derives from the offsets."""
        self._facts = facts
        self._shape = shape
        self._holes = holes  # memory rows of the real tokens, where they are not one run per sequence
        self._entry_rows = _entry_rows(facts)
        self._longest = facts.max_seqlen if facts.lengths is None else max(facts.lengths, default=0)
        with torch.inference_mode(False):  # a packing made or met there serves training too
            self._table = build_table(self.cu_seqlens, self.cu_seqlens_padded, facts.rows)
        self._entries: dict[tuple[int, int], Packing] = {}
        self._set_rows()

    def _set_rows(self) -> None:
        facts = self._facts
        #: What a call's cache key holds of this packing.
        shape = self._shape or self._entry_rows
        gap = facts.longest_gap
        covered = gap is not None and gap <= facts.max_seqlen
        numbers = (facts.sequences, facts.max_seqlen, facts.rows, facts.gaps)
        self._key = (*numbers, shape, self.sanitize, self.device, covered)
        host = host_of_table(self._table, facts.sequences)
        self._rows = rows_of_table(self._table, facts.sequences, facts.max_seqlen, facts.gaps, host)

    # --- constructors ---

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int] | Tensor,
        pad_to_multiple_of: int = 1,
        device: torch.device | str | None = None,
        *,
        max_sequences: int | None = None,
        max_rows: int | None = None,
        max_seqlen: int | None = None,
        sanitize: bool = False,
    ) -> Packing:
        """Sequences of these lengths, one after the other.

        Args:
            lengths: real lengths, on the host (a tensor is copied there).
            pad_to_multiple_of: room of each sequence is rounded up to this.
            device: where the offsets live, as the tensors do.
            max_sequences: fixed capacity. With it, or one of the next two, :meth:`copy_` may refill this packing with
                another batch that fits, also under a captured CUDA graph.
            max_rows: fixed capacity of rows in memory.
            max_seqlen: fixed capacity of the longest length.
            sanitize: see :class:`Packing`.

        Example::

            >>> Packing.from_lengths([100, 257, 0, 300], pad_to_multiple_of=64).rows
            768
        """
        numbers = whole_numbers(lengths)
        if any(n < 0 for n in numbers):
            raise PackingError(f"lengths must be >= 0, got {numbers}")
        if pad_to_multiple_of < 1:
            raise PackingError(f"pad_to_multiple_of must be >= 1, got {pad_to_multiple_of}")
        room = [-(-n // pad_to_multiple_of) * pad_to_multiple_of for n in numbers]
        count = len(numbers) if max_sequences is None else max_sequences
        if count < len(numbers):
            raise PackingError(f"max_sequences={max_sequences} is less than the {len(numbers)} lengths given")
        extra = count - len(numbers)
        cu, starts = cumulative(numbers + [0] * extra), cumulative(room + [0] * extra)
        if starts[-1] >= 1 << 31:
            raise PackingError(f"offsets are int32: at most {(1 << 31) - 1} rows, got {starts[-1]}")
        with torch.inference_mode(False):
            both = torch.tensor([cu, starts], dtype=torch.int32, device="cpu")
        check_values((cu, starts), max_seqlen, max_rows)
        if device is not None and torch.device(device).type != "cpu":
            both = both.to(device)
        fixed = not (max_sequences is None and max_rows is None and max_seqlen is None)
        packing = cls.__new__(cls)
        packing.cu_seqlens, packing.cu_seqlens_padded = both[0], both[1]
        packing.sanitize, packing.check = sanitize, True
        rows = starts[-1] if max_rows is None else max_rows
        longest = max(numbers, default=0) if max_seqlen is None else max_seqlen
        gaps = fixed or cu[-1] != rows
        known = (None, None) if fixed else (tuple(numbers), tuple(starts[:-1]))
        packing._assemble(Facts(count, longest, rows, gaps, *known))
        return packing

    @classmethod
    def from_mask(cls, mask: Tensor, *, sanitize: bool = False) -> Packing:
        """One sequence per row of a 2-D mask: the real tokens of each batch entry, wherever they stand.

        Args:
            mask: (batch, seq), bool or integers; true means a real token. It is copied to the host once.
            sanitize: see :class:`Packing`.

        One run of real tokens per row (left or right padding) is expressed in place. Rows with holes go through
        :meth:`pack` and :meth:`unpack`, which ``attention`` does by itself.

        Example::

            >>> p = Packing.from_mask(torch.tensor([[0, 1, 1], [1, 1, 0]]))
            >>> p.lengths.tolist(), p.valid.tolist()
            ([2, 2], [[False, True, True], [True, True, False]])
        """
        check_tensor("mask", mask)
        if mask.ndim != 2:
            raise ShapeError(f"mask must have 2 dims (batch, seq), got shape {tuple(mask.shape)}")
        if mask.is_floating_point() or mask.is_complex():
            raise DtypeError(
                f"mask must be bool or integers, true meaning a real token; got {mask.dtype}: use mask.bool()"
            )
        batch, seq = mask.shape
        real = (mask != 0).cpu()
        counts = real.sum(1, dtype=torch.int64)
        firsts = real.int().argmax(1) if seq else counts
        positions = torch.arange(seq, device="cpu")
        run = (positions >= firsts[:, None]) & (positions < (firsts + counts)[:, None])
        lengths = tuple(counts.tolist())
        cu = torch.tensor(cumulative(lengths), dtype=torch.int32, device="cpu")
        packing = cls.__new__(cls)
        packing.sanitize, packing.check = sanitize, True
        packing.cu_seqlens = _own(cu.to(mask.device))
        rows, longest = batch * seq, max(lengths, default=0)
        if torch.equal(run, real):
            begin = torch.arange(batch, device="cpu") * seq + firsts
            starts = torch.cat([begin, torch.tensor([rows], device="cpu")]).to(torch.int32)
            packing.cu_seqlens_padded = _own(starts.to(mask.device))
            facts = Facts(batch, longest, rows, sum(lengths) != rows, lengths, tuple(starts[:-1].tolist()))
            packing._assemble(facts, (batch, seq))
        else:
            packing.cu_seqlens_padded = _own(packing.cu_seqlens)
            holes = real.flatten().nonzero().flatten().to(mask.device)
            facts = Facts(batch, longest, sum(lengths), False, lengths, tuple(cu[:-1].tolist()))
            packing._assemble(facts, (batch, seq), holes)
        return packing

    @classmethod
    def from_position_ids(cls, position_ids: Tensor, *, sanitize: bool = False) -> Packing:
        """A new sequence wherever an id is not the previous one plus 1, and at each batch row.

        Args:
            position_ids: integers (rows,) or (batch, seq); copied to the host once. Rows are the flattened ones.
            sanitize: see :class:`Packing`.

        Example::

            >>> Packing.from_position_ids(torch.tensor([[0, 1, 2, 0, 1]])).lengths.tolist()
            [3, 2]
        """
        check_tensor("position_ids", position_ids)
        if position_ids.ndim not in (1, 2):
            raise ShapeError(f"position_ids must be (rows,) or (batch, seq), got shape {tuple(position_ids.shape)}")
        if position_ids.is_floating_point() or position_ids.dtype == torch.bool:
            raise DtypeError(f"position_ids must be integers, got {position_ids.dtype}")
        ids = (position_ids.reshape(1, -1) if position_ids.ndim == 1 else position_ids).long()
        new = torch.ones(ids.shape, dtype=torch.bool, device="cpu")
        if ids.shape[1] > 1:
            new[:, 1:] = (ids[:, 1:] != ids[:, :-1] + 1).cpu()
        first = new.flatten().nonzero().flatten()
        cu = torch.cat([first, torch.tensor([ids.numel()], device="cpu")]).to(torch.int32)
        packing = cls(cu if ids.numel() else cu[:1])
        packing.sanitize = sanitize
        return packing.to(position_ids.device)

    # --- what it says ---

    @property
    def device(self) -> torch.device:
        """Where the offsets live."""
        return self.cu_seqlens.device

    @property
    def max_seqlen(self) -> int:
        """At least the longest real length."""
        return self._facts.max_seqlen

    @property
    def num_sequences(self) -> int:
        """How many sequences, empty ones counted."""
        return self._facts.sequences

    @property
    def total(self) -> int:
        """How many real tokens. Waits for the device if the host does not know (``check=False``, fixed capacity)."""
        lengths = self._facts.lengths
        return sum(lengths) if lengths is not None else int(self.cu_seqlens[-1])

    @property
    def rows(self) -> int:
        """How many rows in memory. Waits for the device if the host does not know (``check=False`` without rows)."""
        if self._shape is not None:
            return self._shape[0] * self._shape[1]
        return self._facts.rows if self._facts.rows is not None else int(self.cu_seqlens_padded[-1])

    @property
    def lengths(self) -> Tensor:
        """int32 (sequences,): real lengths, on the packing's device."""
        return self._rows.lengths

    @property
    def valid(self) -> Tensor:
        """Bool (rows,), or (batch, seq) after :meth:`from_mask`: which rows hold a real token."""
        if self._holes is not None:
            valid = torch.zeros(self.rows, dtype=torch.bool, device=self.device)
            valid[self._holes] = True
        else:
            valid = valid_rows(self._rows, self.rows)
        return valid.view(self._shape) if self._shape is not None else valid

    @property
    def position_ids(self) -> Tensor:
        """int64 (rows,), or (batch, seq) after :meth:`from_mask`: positions within each sequence, 0 at padding.

        Example::

            >>> Packing.from_lengths([2, 3], pad_to_multiple_of=4).position_ids.tolist()
            [0, 1, 0, 0, 0, 1, 2, 0]
        """
        if self._holes is not None:
            token = torch.arange(self.total, device=self.device)
            sequence = torch.searchsorted(self.cu_seqlens[1:].contiguous(), token, right=True)
            return self.unpack(token - self.cu_seqlens[sequence])
        row = torch.arange(self.rows, device=self.device)  # by rows, not tokens: of those the device alone may know
        if not self.lengths.shape[0]:
            return row.zero_()
        starts = self.cu_seqlens_padded[:-1].contiguous()
        sequence = torch.searchsorted(starts, row, right=True).sub_(1).clamp_(min=0)
        place = row - starts[sequence]
        positions = place.masked_fill_((place < 0) | (place >= self.lengths[sequence]), 0)
        return positions.view(self._shape) if self._shape is not None else positions

    # --- moving tokens ---

    def _memory_rows(self) -> Tensor:
        """int64 (total,): the memory row of each real token, in order."""
        if self._holes is not None:
            return self._holes
        with torch.inference_mode(False):  # what is made in evaluation serves training too
            return self._made_memory_rows()

    def _made_memory_rows(self) -> Tensor:
        token = torch.arange(self.total, device=self.device, dtype=torch.int32)
        sequence = torch.searchsorted(self.cu_seqlens[1:].contiguous(), token, right=True)
        return (token - self.cu_seqlens[sequence] + self.cu_seqlens_padded[sequence]).long()

    def pack(self, x: Tensor) -> Tensor:
        """From memory layout, (rows, ...) or (batch, seq, ...) after :meth:`from_mask`, to compact (total, ...).

        Differentiable. Rows beyond ``rows`` are padding too.

        Example::

            >>> p = Packing.from_lengths([1, 2], pad_to_multiple_of=2)
            >>> p.pack(torch.tensor([5, 0, 6, 7])).tolist()
            [5, 6, 7]
        """
        check_tensor("x", x)
        flat = x
        if self._shape is not None:
            if tuple(x.shape[:2]) != self._shape:
                raise ShapeError(f"pack needs (batch, seq, ...) = {self._shape}, got shape {tuple(x.shape)}")
            flat = x.flatten(0, 1)
        elif x.ndim < 1 or x.shape[0] < self.rows:
            raise ShapeError(f"pack needs at least {self.rows} rows, got shape {tuple(x.shape)}")
        return flat.index_select(0, self._memory_rows())

    def unpack(self, x: Tensor) -> Tensor:
        """From compact (total, ...) to memory layout, with zeros in padding. Differentiable.

        Example::

            >>> p = Packing.from_lengths([1, 2], pad_to_multiple_of=2)
            >>> p.unpack(torch.tensor([5, 6, 7])).tolist()
            [5, 0, 6, 7]
        """
        check_tensor("x", x)
        if x.ndim < 1 or x.shape[0] != self.total:
            raise ShapeError(f"unpack needs {self.total} rows, one per real token; got shape {tuple(x.shape)}")
        memory = x.new_zeros(self.rows, *x.shape[1:]).index_copy(0, self._memory_rows(), x)
        return memory.unflatten(0, self._shape) if self._shape is not None else memory

    def compact(self) -> Packing:
        """The packing of what :meth:`pack` returns: the same sequences without padding."""
        packing = Packing.__new__(Packing)
        packing.sanitize, packing.check = self.sanitize, self.check
        packing.cu_seqlens, packing.cu_seqlens_padded = _own(self.cu_seqlens), _own(self.cu_seqlens)
        facts = self._facts
        starts = None if facts.lengths is None else tuple(cumulative(facts.lengths)[:-1])
        rows = None if facts.lengths is None else sum(facts.lengths)
        packing._assemble(Facts(facts.sequences, facts.max_seqlen, rows, False, facts.lengths, starts))
        return packing

    # --- moving the packing ---

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Packing:
        """The same packing on another device; itself if it is there already."""
        if torch.device(device) == self.device:
            return self
        return self._with(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Packing:
        """The same packing in pinned host memory, for an asynchronous ``to``."""
        return self._with(lambda t: t.pin_memory())

    def _with(self, move: Any) -> Packing:
        other = Packing.__new__(Packing)
        other.__dict__.update(self.__dict__)
        with torch.inference_mode(False):  # a packing moved there serves training too
            other.cu_seqlens, other.cu_seqlens_padded = move(self.cu_seqlens), move(self.cu_seqlens_padded)
            other._table = move(self._table)
            other._holes = None if self._holes is None else move(self._holes)
        other._entries, other._taken_as_it_is = {}, False
        other._set_rows()
        return other

    def copy_(self, other: Packing) -> Packing:
        """Refill this packing in place with another batch that fits its capacity, for captured CUDA graphs.

        Args:
            other: a packing with at most as many sequences, rows and ``max_seqlen``; on any device.

        Raises:
            PackingError: it does not fit; it has padding, or wants ``sanitize``, and this one was made without; or this
                one was used with 4-D tensors and it has tokens in other rows of the entries, or in unknown ones.

        Derived tensors are refilled too. Nothing waits for the device. With 4-D tensors the new batch is what it would
        be by itself; that is an error where its tokens are not, or are not known to be, in the rows of the entries that
        this packing has. Calls in compiled regions do not count as use: capture those with packings of one kind.
        """
        mine, theirs = self._facts, other._facts
        if other.sanitize and not self.sanitize:
            raise PackingError("copy_: the new batch wants sanitize=True, and this packing was made without")
        for name in ("sequences", "max_seqlen", "rows"):
            limit = getattr(mine, name)
            wanted = None if limit is None else getattr(other, name if name != "sequences" else "num_sequences")
            if wanted is not None and wanted > limit:
                raise PackingError(f"copy_: {name} is {wanted}, this packing was made for at most {limit}")
        if self._shape != other._shape or self._holes is not None or other._holes is not None:
            raise PackingError(
                "copy_: packings made by from_mask refill only one of the same (batch, seq), without holes"
            )
        if not mine.gaps and (theirs.gaps or other.rows < self.rows):
            raise PackingError(
                "copy_: the new batch has padding and this packing was made without; make it with a fixed capacity: "
                "Packing.from_lengths(..., max_rows=...)"
            )
        for (batch, seq), entry in self._entries.items():
            if not entry._facts.gaps and (theirs.lengths is None or sum(theirs.lengths) != batch * seq):
                raise PackingError(
                    f"copy_: this packing was used for full entries of {seq} rows, and the new batch has padding "
                    "there; make it with a fixed capacity: Packing.from_lengths(..., max_seqlen=...)"
                )
        missing = mine.sequences - theirs.sequences
        entry_rows = self._entry_rows_after(other, missing)
        if entry_rows != self._entry_rows and (self._taken_as_it_is or (entry_rows == ELSEWHERE and self._entries)):
            raise PackingError(
                "copy_: this packing was used with 4-D tensors, and the new batch has its tokens in other rows of the "
                "entries, or in rows that the host does not know: refill it with a packing made in the same way, or "
                "make a new one"
            )
        self.cu_seqlens.copy_(extended(other.cu_seqlens, missing), non_blocking=True)
        self.cu_seqlens_padded.copy_(extended(other.cu_seqlens_padded, missing), non_blocking=True)
        self._table.copy_(build_table(self.cu_seqlens, self.cu_seqlens_padded, mine.rows))
        if mine.lengths is not None:
            self._facts = Facts(mine.sequences, mine.max_seqlen, mine.rows, mine.gaps)
        self._entry_rows = entry_rows
        self._set_rows()
        for (batch, seq), entry in self._entries.items():
            entry.copy_(self._right_padded(batch, seq))
        return self

    def _entry_rows_after(self, other: Packing, missing: int) -> int:
        """What ``_entry_rows`` is after a refill that adds so many empty sequences."""
        size, facts = other._entry_rows, other._facts
        if size == self._entry_rows and not (size > 0 and missing):
            return size
        if size < 0:
            return size
        if facts.starts is None or facts.lengths is None:
            return ELSEWHERE
        first = all(s == i * size for i, (s, n) in enumerate(zip(facts.starts, facts.lengths, strict=True)) if n)
        return -1 if first else ELSEWHERE

    def __copy__(self) -> Packing:
        """Its own tensors: refilling one leaves the other as it is."""
        return self._with(lambda t: t.clone())

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["_rows"], state["_entries"], state["_key"]
        state.pop("_taken_as_it_is", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._entries = {}
        self._set_rows()

    def __repr__(self) -> str:
        facts = self._facts
        rows = "?" if facts.rows is None else facts.rows
        return (
            f"Packing(sequences={facts.sequences}, rows={rows}, max_seqlen={facts.max_seqlen}, "
            f"gaps={facts.gaps}, device={str(self.device)!r})"
        )

    # --- for the core: private to the package ---

    def host_lengths(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(lengths, first rows) on the host; copied from the device where they are not known here.

        Raises:
            PackingError: the tokens of a sequence are not one run of rows.
        """
        if self._holes is not None:
            raise PackingError(
                "a packing made from a mask with holes has no runs of rows: pack the tensors with Packing.pack, and "
                "use Packing.compact()"
            )
        facts = self._facts
        if facts.lengths is not None and facts.starts is not None:
            return facts.lengths, facts.starts
        cu, starts = read_offsets(self.cu_seqlens, self.cu_seqlens_padded)
        return tuple(b - a for a, b in itertools.pairwise(cu)), tuple(starts[:-1])

    def relation(self, keys: Packing) -> Relation:
        """How the lengths of ``keys`` compare with these, as far as the host knows."""
        if keys is self:
            return "equal"
        mine, theirs = self._facts.lengths, keys._facts.lengths
        if mine is None or theirs is None or len(mine) != len(theirs):
            return "any"
        if mine == theirs:
            return "equal"
        return "keys_longer" if all(k >= q for q, k in zip(mine, theirs, strict=True)) else "any"

    def for_entries(self, batch: int, seq: int) -> Packing:
        """This packing as rows of a flattened (batch, seq): sequence i lies in batch entry i.

        Offsets that already speak of batch * seq rows are taken as they are; otherwise the first rows of each entry
        are the real ones.
        """
        facts = self._facts
        if facts.sequences != batch:
            raise PackingError(
                f"with 4-D tensors sequence i lies in batch entry i: the packing has {facts.sequences} sequences and "
                f"the batch {batch} entries; use layout='thd' for several sequences per entry"
            )
        if facts.max_seqlen > seq and (facts.lengths is None or max(facts.lengths, default=0) > seq):
            raise PackingError(f"max_seqlen {facts.max_seqlen} does not fit in entries of {seq} rows")
        if self._shape == (batch, seq):
            return self
        if self._shape is not None:
            raise PackingError(f"the packing was made from a mask of shape {self._shape}, the batch is {(batch, seq)}")
        if facts.rows == batch * seq and self._entry_rows == seq:
            self._taken_as_it_is = True
            return self
        check_entries(self._entry_rows)
        if (batch, seq) not in self._entries:
            self._entries[batch, seq] = self._right_padded(batch, seq)
        return self._entries[batch, seq]

    def _right_padded(self, batch: int, seq: int) -> Packing:
        packing = Packing.__new__(Packing)
        packing.sanitize, packing.check = self.sanitize, self.check
        packing.cu_seqlens = _own(self.cu_seqlens)
        with torch.inference_mode(False):
            packing.cu_seqlens_padded = torch.arange(batch + 1, dtype=torch.int32, device=self.device) * seq
        facts = self._facts
        gaps = facts.lengths is None or sum(facts.lengths) != batch * seq
        longest = min(facts.max_seqlen, seq)
        starts = None if facts.lengths is None else tuple(i * seq for i in range(batch))
        packing._assemble(Facts(batch, longest, batch * seq, gaps, facts.lengths, starts))
        return packing


def _own(offsets: Tensor) -> Tensor:
    """A copy that nobody else writes to, usable for training wherever it was made."""
    with torch.inference_mode(False):
        return offsets.clone()


def _entry_rows(facts: Facts) -> int:
    """The size of equal entries in which the sequences lie, one in each; -1 if there is none."""
    n, rows = facts.sequences, facts.rows
    if not n or rows is None or rows % n:
        return -1
    size = rows // n
    if facts.starts is None or facts.lengths is None:
        return -1  # not known here: 4-D tensors then have the first rows of each entry
    pairs = enumerate(zip(facts.starts, facts.lengths, strict=True))
    return size if all(i * size <= s and s + length <= (i + 1) * size for i, (s, length) in pairs) else -1


def check_entries(entry_rows: int) -> None:
    """Refuse 4-D tensors where a refill has put tokens elsewhere than first in their entries.

    Raises:
        PackingError: it has.
    """
    if entry_rows == ELSEWHERE:
        raise PackingError(
            "with 4-D tensors, a packing of this kind has the first rows of each entry, and it was refilled by copy_() "
            "with a batch whose tokens lie elsewhere: make a packing of that batch, or use layout='thd'"
        )
