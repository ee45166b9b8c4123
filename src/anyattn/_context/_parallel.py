"""``ContextParallel``: a group of ranks that share long sequences, and the plans made for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from anyattn._context import _cost, _placement, _static
from anyattn._context._agreement import side_group
from anyattn._context._data import Capacity, Comm, Mask, Placement, Shape
from anyattn._context._plan import ContextPlan, check_planned, normal_mask
from anyattn._context._plan_data import Memory, PlanData
from anyattn._context._search import Search
from anyattn._context._topology import COMMS, ON_FLAT_MESH, Members, Topology, members_of, number_of, topology
from anyattn._errors import ContextError
from anyattn._packing import Packing

PLACEMENTS = ("auto", "contiguous", "zigzag", "documents")
FEATURES = ("alibi", "bias", "dropout", "lse", "mask", "sink", "softcap")


class ContextParallel:
    """Ranks among which sequences are divided.

    Args:
        mesh_or_group: a DeviceMesh of one dim; one of two dims named "p2p" and "a2a", or unnamed in that order, for
            "a2a+p2p"; a ProcessGroup; or (world_size, rank), ((p2p_size, a2a_size), rank), where plans are only made,
            as in a data-loader worker.
        comm: how keys and values meet the queries (docs/context-parallel.md): "p2p" (in stages around a ring, merged),
            "all_gather" (keys gathered), "a2a" (heads exchanged for sequence), "a2a+p2p" (both, on two dims), or
            "auto": each plan takes the cheapest by its own estimate; for a packing of fixed capacity by that alone; on
            a mesh of two dims always "a2a+p2p".

    Raises:
        ContextError: no such scheme, or a mesh that does not go with it.

    All members make it together: the first on a group makes a gloo group beside it, on which plans are compared.

    Example::

        >>> plan = anyattn.ContextParallel((4, 0)).plan(1024, num_heads=8, num_kv_heads=2)
        >>> plan.rows
        256
    """

    def __init__(self, mesh_or_group: Any, comm: str = "auto") -> None:
        if comm != "auto" and comm not in COMMS:
            raise ContextError(f"unknown comm {comm!r}; allowed: auto, {', '.join(COMMS)}")
        self.comm = comm
        self._fixed: dict[Any, str] = {}  # what "auto" takes, by capacity
        self._members: Members = members_of(mesh_or_group)
        if comm != "auto":
            topology(cast("Comm", comm), self._members)
        if self._members.groups is not None and self._members.world > 1:
            side_group(self._members)

    @property
    def size(self) -> int:
        """How many ranks share a sequence."""
        return self._members.world

    @property
    def rank(self) -> int:
        """This rank among them."""
        return self._members.rank

    def __repr__(self) -> str:
        return f"ContextParallel(ranks={self._members.shape}, rank={self.rank}, comm={self.comm!r})"

    def plan(
        self,
        packing_or_seqlen: Packing | int,
        packing_kv: Packing | int | None = None,
        causal: Any = True,
        window: tuple[int | None, int | None] | None = None,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        head_dim_v: int | None = None,
        features: Iterable[str] | None = (),
        placement: str = "auto",
        pad_to_multiple_of: int = 1,
    ) -> ContextPlan:
        """Place a batch over the ranks, from lengths alone: every rank makes the same plan, and nothing travels.

        Args:
            packing_or_seqlen: where the sequences of the whole batch lie; or one length, for unpadded 4-D tensors of
                any batch size.
            packing_kv: the same for the keys of cross-attention; default: the queries', as is one that equals it.
            causal: as :func:`anyattn.attention`, but True by default.
            window: as :func:`anyattn.attention`.
            num_heads: query heads; comm="auto" takes "a2a" only where it is given and the ranks divide it.
            num_kv_heads: key heads; default: as num_heads.
            head_dim: of q and k, for estimates; default 128.
            head_dim_v: of v; default: as head_dim.
            features: what the calls will ask that not every scheme can do, so that it is refused here and not at the
                first call: any of "alibi", "bias", "dropout", "lse", "mask", "sink", "softcap"; None: nothing.
            placement: "contiguous" (equal runs in order), "zigzag" (every sequence in 2 * ranks chunks, first and last
                to the first rank: Transformer Engine's), "documents" (every sequence whole), or "auto" (long ones cut,
                short ones whole, tokens and work level).
            pad_to_multiple_of: rows of a shard are rounded up to it.

        Raises:
            ContextError: what the scheme cannot do, numbers that make no sense.
            PackingError: a packing whose tokens are not runs in memory.
        """
        shape, given = _shape(num_heads, num_kv_heads, head_dim, head_dim_v)
        wanted = _features(features)
        if placement not in PLACEMENTS:
            raise ContextError(f"unknown placement {placement!r}; allowed: {', '.join(PLACEMENTS)}")
        multiple = number_of(pad_to_multiple_of) or 0
        if multiple < 1:
            raise ContextError(f"pad_to_multiple_of must be an int >= 1, got {pad_to_multiple_of!r}")
        lengths, memory, capacity = _read(packing_or_seqlen)
        keys = None if packing_kv is None else _read(packing_kv)
        if keys == (lengths, memory, capacity):  # self-attention, said twice
            keys = None
        if keys is not None and (len(keys[0]) != len(lengths) or keys[1].entries != memory.entries):
            raise ContextError(
                f"queries and keys must have as many sequences, both packings or both lengths: got {len(lengths)} and "
                f"{len(keys[0])}"
            )
        lengths_k, memory_k = (lengths, memory) if keys is None else keys[:2]
        mask = normal_mask(causal, window, lengths == lengths_k)
        comm: Any = self.comm
        search = Search(lengths, mask)
        if comm == "auto":
            if capacity is None:
                comm = self._choose(search, keys is not None, shape, given, wanted, False)
            else:
                comm = self._choose_fixed(capacity, memory.rows, mask, shape, given, wanted)
        shares = topology(comm, self._members)
        _check_heads(given, shares)
        options: dict[str, Any] = {
            "multiple": multiple, "members": shares.heads, "shape": shape, "comm": comm,
        }  # fmt: skip
        order: _placement.Order = "document" if comm in ("p2p", "a2a+p2p") else "local"
        if capacity is not None:
            order = "slot"  # queries in the order of their keys
        wished = cast("Placement", placement)
        queries = _placement.place(lengths, shares.world, mask, wished, order=order, search=search, **options)
        keys_at = queries
        if keys is not None:
            how = wished if wished in ("zigzag", "documents") else "contiguous"
            keys_at = _placement.place(lengths_k, shares.world, Mask(), how, order=order, **options)
        sanitize = any(isinstance(p, Packing) and p.sanitize for p in (packing_or_seqlen, packing_kv))
        if capacity is not None:
            kind = "in order" if comm == "a2a" else placement
            queries = keys_at = _static.roomy(queries, memory.rows, shares.world, multiple, kind)
        data = PlanData(
            comm, shares, self.rank, mask, queries, keys_at, memory, memory_k, keys is not None, wished,
            multiple, shape, given, tuple(sorted(wanted)), sanitize, capacity,
        )  # fmt: skip
        check_planned(data)
        return ContextPlan(data, self._members)

    def bind(self, plan: ContextPlan) -> ContextPlan:
        """Give a plan made elsewhere (in a data-loader worker) this group. Its scheme is the one it was made for.

        Raises:
            ContextError: the plan is for another rank, or for another number of ranks.
        """
        if not isinstance(plan, ContextPlan):
            raise ContextError(f"bind takes a ContextPlan, got {type(plan).__name__}")
        data = plan._data
        if (data.topology.world, data.rank) != (self.size, self.rank):
            raise ContextError(
                f"the plan is for rank {data.rank} of {data.topology.world}, this is rank {self.rank} of {self.size}: "
                f"make it with ContextParallel(({self.size}, {self.rank}))"
            )
        if topology(data.comm, self._members) != data.topology:
            raise ContextError(
                f"the plan is for {data.topology.sequence} x {data.topology.heads} ranks along sequence and heads, and "
                f"the mesh has shape {self._members.shape}: make it for that shape"
            )
        return plan._bound(self._members)

    def _choose_fixed(
        self, capacity: Capacity, rows: int, mask: Mask, shape: Shape, given: Any, features: frozenset[str]
    ) -> str:
        """The same for a batch that fills a capacity: plans that refill one another have one scheme."""
        key = (capacity, rows, mask, shape, given, features)
        if key not in self._fixed:
            search = Search(_static.fullest(capacity, rows), mask)
            self._fixed[key] = self._choose(search, False, shape, given, features, True)
        return self._fixed[key]

    def _choose(
        self,
        search: Search,
        cross: bool,
        shape: Shape,
        given: Any,
        features: frozenset[str],
        fixed: bool,
    ) -> str:
        """The cheapest scheme that can do what is asked."""
        if len(self._members.shape) == 2:
            return "a2a+p2p"
        if features & {"bias", "mask"}:
            return "all_gather"
        heads_fit = given[0] is not None and given[0] % self.size == 0
        if "alibi" in features and search.mask.right != 0:
            return "a2a"
        allowed: list[Comm] = ["all_gather"] if cross or fixed else ["p2p", "all_gather"]
        allowed += ["a2a"] if heads_fit else []
        gpu = _cost.default_gpu()
        return _cost.choose(search.lengths, self.size, search.mask, shape, gpu, allowed, search=search).comm


def _shape(*sizes: Any) -> tuple[Shape, tuple[int | None, int | None, int | None, int | None]]:
    """Sizes with their defaults, and as given."""
    names = ("num_heads", "num_kv_heads", "head_dim", "head_dim_v")
    given = [number_of(size) for size in sizes]
    for name, size, number in zip(names, sizes, given, strict=True):
        if size is not None and (number is None or number < 1):
            raise ContextError(f"{name} must be an int >= 1 or None, got {size!r}")
    heads, kv_heads, dim, dim_v = given
    if heads is None and kv_heads is not None:
        raise ContextError("num_kv_heads= needs num_heads= too")
    if heads is not None:
        kv_heads = kv_heads or heads
        if heads % kv_heads:
            raise ContextError(f"num_heads must be a multiple of num_kv_heads, got {heads} and {kv_heads}")
    plain = Shape()
    dim_v = dim_v or dim
    shape = Shape(
        heads or plain.num_heads, kv_heads or plain.num_kv_heads, dim or plain.head_dim, dim_v or plain.head_dim
    )
    return shape, (heads, kv_heads, dim, dim_v)


def _features(given: Any) -> frozenset[str]:
    if given is not None and not isinstance(given, Iterable):
        raise ContextError(f"features must be names, of {', '.join(FEATURES)}; got {given!r}")
    names = (given,) if isinstance(given, str) else tuple(given or ())
    unknown = sorted({str(name) for name in names if name not in FEATURES})
    if unknown:
        raise ContextError(f"unknown features {', '.join(unknown)}; allowed: {', '.join(FEATURES)}")
    return frozenset(names)


def _read(given: Any) -> tuple[tuple[int, ...], Memory, Capacity | None]:
    """(lengths, memory, capacity) of a packing or a plain length."""
    length = number_of(given)
    if length is not None:
        if length < 0:
            raise ContextError(f"a sequence length must be >= 0, got {length}")
        return (length,), Memory((0,), length, True), None
    if not isinstance(given, Packing):
        raise ContextError(f"a plan is made from a Packing or a length, got {type(given).__name__}")
    lengths, starts = given.host_lengths()
    facts = given._facts
    fixed = facts.lengths is None and facts.rows is not None
    capacity = Capacity(facts.sequences, facts.max_seqlen) if fixed else None
    return lengths, Memory(starts, given.rows, False), capacity


def _check_heads(given: tuple[int | None, ...], shares: Topology) -> None:
    if given[0] is not None and given[0] % shares.heads:
        raise ContextError(
            f"{given[0]} query heads do not divide over the {shares.heads} ranks that share heads: use comm='p2p' or "
            f"'all_gather', or as many ranks as divide them{f'; {ON_FLAT_MESH}' if shares.sequence > 1 else ''}"
        )
