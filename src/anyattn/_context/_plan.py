"""``ContextPlan``: one batch, placed over the ranks of a context-parallel group."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from anyattn._context import _agreement, _cost, _tables
from anyattn._context._data import Mask
from anyattn._context._plan_data import PlanData, check_features
from anyattn._context._shards import Shards
from anyattn._context._topology import ON_FLAT_MESH, Members, number_of
from anyattn._errors import ContextError

if TYPE_CHECKING:
    from anyattn._api import Causal
    from anyattn._context._tables import Tables

Window = tuple[int | None, int | None] | None


def mask_of(causal: Any, window: Any) -> Mask:
    """Causality and window in one spelling."""
    left, right = window or (None, None)
    return Mask(left, 0 if causal else right, causal == "top_left")


class _Keys(Shards):
    """How the keys of cross-attention are sharded."""

    def __init__(self, plan: ContextPlan, data: PlanData, members: Members | None) -> None:
        super().__init__(data.keys, data.memory_k, data.rank, members)
        self._plan = weakref.ref(plan)

    def _agree(self, failure: Exception | None = None) -> None:
        plan = self._plan()
        if plan is not None:
            plan._agree(failure)

    def __reduce__(self) -> Any:
        raise ContextError("plan.kv is a part of its plan: pickle or copy the plan, and take kv of that")


class ContextPlan(Shards):
    """Where each token of a batch lives, which ranges of queries meet which keys, and what travels.

    Made by :meth:`ContextParallel.plan`, once per batch, from lengths alone; it is host data, and pickles. The shards
    of all ranks have the same number of rows. A plan made without a group (in a data-loader worker), or pickled,
    shards; for attention and :meth:`unshard`, :meth:`ContextParallel.bind` connects it. A copy has its plan's group.

    Example::

        >>> cp = anyattn.ContextParallel((1, 0))
        >>> plan = cp.plan(anyattn.Packing.from_lengths([3, 2], pad_to_multiple_of=4))
        >>> plan.rows, plan.position_ids.tolist()
        (5, [0, 1, 2, 0, 1])
        >>> plan.shard(torch.tensor([5, 6, 7, 0, 8, 9, 0, 0])).tolist()
        [5, 6, 7, 8, 9]
    """

    def __init__(self, data: PlanData, members: Members | None) -> None:
        super().__init__(data.queries, data.memory_q, data.rank, members)
        self._data = data
        self._agreed: set[Any] = set()
        self._tables: dict[Any, Tables] = {}
        self._packings: Any = weakref.WeakKeyDictionary()  # found equal to the plan's, with their versions
        self._checked: dict[Any, Any] = {}  # sizes of calls whose arguments were found right
        self._keys = _Keys(self, data, members) if data.cross else None

    # --- what it says ---

    @property
    def comm(self) -> str:
        """The scheme: "p2p", "all_gather", "a2a" or "a2a+p2p"."""
        return self._data.comm

    @property
    def causal(self) -> Causal:
        """What the plan was made for."""
        mask = self._data.mask
        return ("top_left" if mask.top_left else True) if mask.right == 0 else False

    @property
    def window(self) -> Window:
        """(left, right) with causality folded in, or None."""
        left, right, _ = self._data.mask
        return None if left is None and not right else (left, right)

    @property
    def kv(self) -> Shards:
        """The same for keys and values: how cross-attention's are sharded; the plan itself otherwise."""
        return self if self._keys is None else self._keys

    @property
    def imbalance(self) -> float:
        """Attention work of the busiest rank over the mean: 1.0 is balance. Pairs of a query and a key are counted."""
        areas = self._data.areas()
        return max(areas) * len(areas) / sum(areas) if sum(areas) else 1.0

    @property
    def bytes_moved(self) -> int:
        """Bytes that the rank that receives most receives in one forward, for the heads and dims the plan was given.

        Where it was given none, they are 32 query and 8 key heads of dim 128, in a dtype of two bytes.
        """
        return _cost.bytes_forward(self._data)

    def explain(self) -> str:
        """What the plan does and costs, and what the other schemes would, as text."""
        from anyattn._context import _explain

        return _explain.text(self._data)

    def __repr__(self) -> str:
        data = self._data
        return (
            f"ContextPlan({data.comm!r}, rank={data.rank} of {data.topology.world}, "
            f"sequences={len(data.queries.lengths)}, rows={self.rows}, imbalance={self.imbalance:.3f})"
        )

    # --- others made from it ---

    def with_mask(self, causal: Causal = True, window: Window = None) -> ContextPlan:
        """A plan for layers with another mask, whose tokens live where this plan's do.

        Args:
            causal: as :func:`anyattn.attention`.
            window: as :func:`anyattn.attention`.
        """
        data = replace(
            self._data, mask=normal_mask(causal, window, self._data.queries.lengths == self._data.keys.lengths)
        )
        check_planned(data)
        return ContextPlan(data, self._members)

    def _bound(self, members: Members) -> ContextPlan:
        """The plan connected to a group; see :meth:`ContextParallel.bind`."""
        return ContextPlan(self._data, members)

    def copy_(self, other: ContextPlan) -> ContextPlan:
        """Refill this plan in place with another batch that fits its capacity, for captured CUDA graphs.

        Tensors that were taken of this plan, ``position_ids`` and ``valid``, are refilled too.

        Args:
            other: a plan of the same capacity, scheme and ranks.

        Raises:
            ContextError: this plan has no fixed capacity, or the other does not fit.
        """
        from anyattn._context import _static

        _static.refill(self, other)
        return self

    # --- for the package ---

    @property
    def _mean_area(self) -> float:
        """Visible pairs per rank and head, on average."""
        return self._areas[0]

    @property
    def _travelling(self) -> float:
        """The part of them that belongs to documents on several ranks."""
        return self._areas[1]

    @cached_property
    def _areas(self) -> tuple[float, float]:
        return self._data.mean_area()

    def _become(self, data: PlanData) -> None:
        """Become the plan of another batch of the same capacity, in place."""
        self._data = data
        self._agreed.clear()
        self._packings.clear()
        self.__dict__.pop("_areas", None)
        self._replace(data.queries, data.memory_q)
        for (device, batch, alibi, dense), tables in self._tables.items():
            made = _tables.build(data.batched(batch), device, alibi=alibi, dense=dense)
            _tables.refill(tables, made)
        if self._members is not None and self._members.groups is not None:
            self._agree_on()

    def _agree_on(
        self, kind: Any = None, call: Mapping[str, object] | None = None, failure: Exception | None = None
    ) -> None:
        """Compare with the other ranks, once for every kind of call, before anything travels.

        Args:
            kind: of call; None for the plan alone.
            call: what of it must be alike on all ranks.
            failure: why this rank cannot run it.

        Raises:
            ContextError: on every rank, where plans differ or another rank cannot run the call.
            Exception: the failure.
        """
        _agreement.check(self._data, self._connected(), call or {}, failure)
        self._agreed |= {kind, None}

    def _agree(self, failure: Exception | None = None) -> None:
        if None not in self._agreed:
            self._agree_on(failure=failure)

    def __copy__(self) -> ContextPlan:
        copied = ContextPlan(self._data, self._members)
        copied._agreed |= self._agreed
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextPlan:
        return self.__copy__()

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self._data}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ContextPlan.__init__(self, state["data"], None)


def normal_mask(causal: Any, window: Any, equal_lengths: bool) -> Mask:
    """A mask as plans keep it: where lengths are equal there is one alignment.

    Raises:
        ContextError: no window, or no causality.
    """
    if causal not in (None, True, False, "top_left"):
        raise ContextError(f"causal must be True, False or 'top_left', got {causal!r}")
    sides = window
    if window is not None:
        sides = tuple(map(_side, window)) if isinstance(window, (tuple, list)) else ()
        if len(sides) != 2 or -1 in sides:
            raise ContextError(f"window must be (left, right), each an int >= 0 or None, got {window!r}")
    mask = mask_of(causal, sides)
    return mask._replace(top_left=False) if equal_lengths else mask


def _side(given: Any) -> int | None:
    """Of a window; -1: no side."""
    number = number_of(given)
    return None if given is None else -1 if number is None or number < 0 else number


def check_planned(data: PlanData, features: frozenset[str] | None = None) -> None:
    """Refuse a plan whose scheme cannot do what is asked; None: what it was made for.

    Raises:
        ContextError: with what to do instead.
    """
    try:
        check_features(data, frozenset(data.features) if features is None else features)
    except ContextError as error:
        if data.comm != "a2a+p2p" or not any(f"comm='{comm}'" in str(error) for comm in ("all_gather", "a2a")):
            raise
        raise ContextError(f"{error}; {ON_FLAT_MESH}") from None
