"""Ranks that share a sequence hear of each other's masks before they look at them together.

What a rank remembers of a mask is its own affair: it may edit its mask, or take up an older one, when others do not. To
look at a mask is a collective over the accelerators, so all ranks must do it, or none. They settle that over a gloo
group, on the host, where nothing waits for the device.
"""

from __future__ import annotations

import atexit
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from anyattn._context import _agreement
from anyattn._context._plan_data import number
from anyattn._context._topology import members_of
from anyattn._errors import ContextError


class Hearing:
    """The ranks of one mesh, made by all of them together.

    A call with a mask always asks. A call without one asks as long as the last time that ranks asked some had a mask:
    so models without masks pay for one question.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self._members = members_of(mesh)
        self._group: Any = _agreement._new_group(self._members)
        _all.add(self)
        self._watching = True
        self._broken: str | None = None

    def same(self, form: object, look: int, failure: Exception | None) -> bool:
        """Whether all ranks remember one look at their masks; raises on all of them where they cannot go on.

        Args:
            form: of this rank's mask, which must be alike on all ranks; None: no mask.
            look: the number of the look that it remembers, from 1; 0: none.
            failure: why this rank cannot take its mask.

        Raises:
            ContextError: masks on some ranks alone, of different form, or refused by other ranks; ranks that make no
                such call.
            Exception: the failure.
        """
        given = form is not None or failure is not None
        if not given and not self._watching:
            return False
        mine = [given, failure is not None, 0 if form is None else number(form), look]
        found = self._of_all(torch.tensor(mine, dtype=torch.int64, device="cpu"), failure)
        self._watching = bool(found[:, 0].any())
        if failure is not None:
            raise failure
        if found[:, 1].any():
            raise ContextError(
                f"ranks {_named(found[:, 1])} of the {self._members.world} that share a sequence cannot take their "
                "attn_mask, and say why; nothing has run here"
            )
        if found[:, 0].any() and not found[:, 0].all():
            raise ContextError(
                f"ranks {_named(found[:, 0])} of the {self._members.world} that share a sequence have an attn_mask and "
                "the others none: pass one on every rank, all true where nothing is hidden, or on none"
            )
        if (found[:, 2] != found[0, 2]).any():
            raise ContextError(
                f"the {self._members.world} ranks that share a sequence have masks of different shape, dtype or need "
                f"of a gradient; this rank's is {form}: pass masks of one form, under one name of backend"
            )
        return look > 0 and bool((found[:, 3] == look).all())

    def _of_all(self, mine: Tensor, failure: Exception | None) -> Tensor:
        if self._broken is not None:
            raise failure or ContextError(
                f"masks can no longer be compared in this group, for it failed before: {self._broken}. Start the "
                "processes anew"
            )
        try:
            return _agreement._gathered(self._group, self._members, mine)
        except _agreement.RanksMissing as error:
            seconds = _agreement._timeout(self._members).total_seconds()
            self._broken = (
                f"ranks {', '.join(map(str, error.ranks))} of the {self._members.world} that share a sequence made no "
                f"call with an attn_mask within at most {seconds:.0f} s, as this one does: pass a mask on every rank, "
                "all true where nothing is hidden, or on none; or look for their own error"
            )
            raise failure or ContextError(self._broken) from error


def _named(marks: Tensor) -> str:
    return ", ".join(map(str, marks.nonzero().flatten().tolist()))


_all: weakref.WeakSet[Hearing] = weakref.WeakSet()


@atexit.register
def _end_groups() -> None:
    """End threads of gloo's before the interpreter ends."""
    for hearing in _all:
        hearing._group = None
