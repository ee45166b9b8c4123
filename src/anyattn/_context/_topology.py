"""Who takes part: how many ranks share the sequence, how many share the heads, and the groups that connect them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from anyattn._context._data import Comm
from anyattn._errors import ContextError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: What to add where a two-dimensional mesh is told to use a scheme of one.
ON_FLAT_MESH = "that scheme takes the mesh flattened: ContextParallel(mesh._flatten(), comm=...)"

COMMS: tuple[Comm, ...] = ("p2p", "all_gather", "a2a", "a2a+p2p")


class Topology(NamedTuple):
    """Rank = sequence index * heads + head index: ranks that share the heads of a part of the sequence are neighbours.

    Under p2p and all_gather there is one head rank, under a2a one sequence rank.
    """

    sequence: int
    """Ranks along the sequence."""
    heads: int
    """Ranks along the heads."""

    @property
    def world(self) -> int:
        """All ranks."""
        return self.sequence * self.heads

    def groups(self) -> list[range]:
        """The ranks of each head group."""
        return [range(i * self.heads, (i + 1) * self.heads) for i in range(self.sequence)]


@dataclass(frozen=True, slots=True)
class Members:
    """Where a rank stands, and what connects it; without groups in a process that only makes plans."""

    shape: tuple[int, ...]
    """(ranks,), or (p2p ranks, a2a ranks)."""
    rank: int
    groups: tuple[Any, ...] | None
    """A ProcessGroup per dim of shape; None: not connected."""
    device: torch.device
    """Of the tensors that this rank computes with."""
    ranks: tuple[int, ...] = ()
    """Global ranks of all members, by their rank here; empty where not connected."""

    @property
    def world(self) -> int:
        """All ranks."""
        total = 1
        for size in self.shape:
            total *= size
        return total


def number_of(given: Any) -> int | None:
    """An int, of Python or of another library such as numpy; None for all else, a bool or a tensor too."""
    if isinstance(given, (bool, torch.Tensor)):
        return None
    try:
        return operator.index(given)
    except TypeError:
        return None


def topology(comm: Comm, members: Members) -> Topology:
    """How a scheme uses the ranks.

    Raises:
        ContextError: a2a+p2p without a two-dimensional mesh, or another scheme with one.
    """
    two = len(members.shape) == 2
    if comm == "a2a+p2p":
        if not two:
            raise ContextError(
                f"comm='a2a+p2p' needs a two-dimensional mesh, its dims named 'p2p' and 'a2a' or unnamed in that "
                f"order; got {members.world} ranks in one dim: use init_device_mesh(..., (p2p, a2a)), or another comm"
            )
        return Topology(members.shape[0], members.shape[1])
    if two:
        raise ContextError(
            f"comm={comm!r} takes ranks in one dim, got a mesh of shape {members.shape}: pass the flattened mesh "
            "(mesh._flatten()), or use comm='a2a+p2p'"
        )
    return Topology(1, members.world) if comm == "a2a" else Topology(members.world, 1)


def members_of(mesh_or_group: Any) -> Members:
    """Read a DeviceMesh, a ProcessGroup, or (world size, rank).

    Raises:
        ContextError: anything else, or a rank that is not in the group.
    """
    if isinstance(mesh_or_group, DeviceMesh):
        return _of_mesh(mesh_or_group)
    if isinstance(mesh_or_group, tuple):
        return _of_numbers(mesh_or_group)
    if isinstance(mesh_or_group, dist.ProcessGroup):
        return _of_group(mesh_or_group)
    if mesh_or_group is None or mesh_or_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ContextError(
            f"this process is not a member of the group: torch.distributed.new_group gave it {mesh_or_group!r} where "
            "members get a ProcessGroup; make ContextParallel on the members only"
        )
    raise ContextError(
        "ContextParallel takes a DeviceMesh, a ProcessGroup, or (world_size, rank) to make plans without a group; got "
        f"{type(mesh_or_group).__name__}"
    )


def _of_mesh(mesh: DeviceMesh) -> Members:
    if mesh.ndim not in (1, 2):
        raise ContextError(
            f"the mesh has {mesh.ndim} dims; context parallelism takes one, or two for a2a+p2p: pass a sub-mesh, such "
            "as mesh['cp']"
        )
    if mesh.get_coordinate() is None:
        raise ContextError(
            f"this process is not a member of the mesh {mesh.mesh.tolist()}: make ContextParallel on its members only"
        )
    order = [0] if mesh.ndim == 1 else _two_dims(mesh.mesh_dim_names)
    shape = tuple(mesh.size(i) for i in order)
    table = mesh.mesh.permute(order)
    groups = tuple(mesh.get_group(i) for i in order)
    place = [mesh.get_local_rank(i) for i in order]
    rank = place[0] if len(place) == 1 else place[0] * shape[1] + place[1]
    if mesh.ndim == 1:
        ranks = tuple(dist.get_process_group_ranks(groups[0]))
    elif any(bool((table.diff(dim=i) <= 0).any()) for i in (0, 1)):  # seen alike by all ranks
        raise ContextError(
            f"the mesh {mesh.mesh.tolist()} has ranks that do not increase along each dim, as process groups number "
            "their members: make it by init_device_mesh, or of ranks in order"
        )
    else:
        ranks = tuple(table.flatten().tolist())
    return Members(shape, rank, groups, _device(mesh.device_type), ranks)


def _two_dims(names: tuple[str, ...] | None) -> list[int]:
    """Which dims are p2p and a2a."""
    if names is None:
        return [0, 1]
    if set(names) != {"p2p", "a2a"}:
        raise ContextError(
            f"the mesh has dims {names}; a2a+p2p takes two, named 'p2p' and 'a2a' or unnamed in that order: for other "
            f"schemes pass a sub-mesh of one dim, such as mesh[{names[-1]!r}]"
        )
    return [names.index("p2p"), names.index("a2a")]


def _of_numbers(given: tuple[Any, ...]) -> Members:
    world, rank = given if len(given) == 2 else (None, None)
    place = number_of(rank)
    shape = tuple(number_of(n) or 0 for n in (world if isinstance(world, tuple) else (world,)))
    if place is None or len(shape) not in (1, 2) or min(shape) < 1:
        raise ContextError(
            f"without a group, ContextParallel takes (world_size, rank), or ((p2p_size, a2a_size), rank); got {given!r}"
        )
    members = Members(shape, place, None, torch.device("cpu"))
    if not 0 <= place < members.world:
        raise ContextError(f"rank must be in 0 to {members.world - 1}, got {rank}")
    return members


def _of_group(group: ProcessGroup) -> Members:
    rank = dist.get_rank(group)
    if rank < 0:
        raise ContextError("this rank is not in the process group: make ContextParallel on its members only")
    kinds = {device.type for device in group._device_types}
    kind = "cuda" if "cuda" in kinds and torch.cuda.is_available() else "cpu"
    ranks = tuple(dist.get_process_group_ranks(group))
    return Members((dist.get_world_size(group),), rank, (group,), _device(kind), ranks)


def _device(kind: str) -> torch.device:
    if kind == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(kind if kind != "cuda" else "cpu")
