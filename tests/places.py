"""Places for results: slices of larger tensors, as context parallelism gives them to a backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import cases
from anyattn._call import Call, Gradients, Result, Saved
from cases import Case
from test_conformance import check, run

FILL = 7.0


@dataclass
class Places:
    """Gives places to every call of a backend, and looks at what lies around them afterwards.

    ``taken`` are the names of the results that were written there.
    """

    heads: bool
    """They are slices of the heads too, so that rows have holes between them."""
    shift: int = 0
    """By how many elements memory begins after a multiple of 16 bytes."""
    taken: list[str] = field(default_factory=list)

    @contextmanager
    def given_to(self, backend: Any) -> Iterator[None]:
        """Every call of the backend gets them."""
        forward, backward = self._forward(backend.forward), self._backward(backend.backward)
        with mock.patch.object(backend, "forward", forward), mock.patch.object(backend, "backward", backward):
            yield

    def _forward(self, run: Callable[[Call], Result]) -> Callable[[Call], Result]:
        def forward(call: Call) -> Result:
            memory, place = self._place(call.q, call.v.shape[-1])
            got = run(call._replace(out=place))
            self._look("out", memory, place, got.out)
            return got

        return forward

    def _backward(self, run: Callable[..., Gradients]) -> Callable[..., Gradients]:
        def backward(call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None) -> Gradients:
            named = {"dq": call.q, "dk": call.k, "dv": call.v}
            made = {name: self._place(x, x.shape[-1]) for name, x in named.items()}
            got = run(call._replace(**{name: place for name, (_, place) in made.items()}), saved, dout, dlse)
            for name, (memory, place) in made.items():
                self._look(name, memory, place, getattr(got, name))
            return got

        return backward

    def _place(self, like: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """All of a larger tensor's memory, and the place in it."""
        heads = like.shape[-2]
        spare = 3 if self.heads else 0
        shape = (like.shape[0] + 5, *like.shape[1:-2], heads + spare, dim)
        memory = torch.full((math.prod(shape) + self.shift,), FILL, dtype=like.dtype, device=like.device)
        larger = memory[self.shift :].view(shape)
        return memory, larger[2 : 2 + like.shape[0], ..., spare // 3 : spare // 3 + heads, :]

    def _look(self, name: str, memory: Tensor, place: Tensor, result: Tensor) -> None:
        """Note whether the result is in its place; nothing else was written."""
        if result.data_ptr() == place.data_ptr():
            assert (result.shape, result.stride()) == (place.shape, place.stride())
            self.taken.append(name)
            written = place.clone()
            place.fill_(FILL)
            assert (memory == FILL).all(), f"{name} was written beside its place"
            place.copy_(written)
        else:
            assert (memory == FILL).all(), f"{name} is elsewhere, and was written to its place"


def taken(case: Case, backend: Any, *, heads: bool, shift: int = 0) -> list[str]:
    """Which results of a case are written to the places given, which changes no result. The target's machine is on."""
    places, problem = Places(heads, shift), cases.build(case)
    with cases.deterministic_flag(case):
        out, lse, grads = run(problem)
        with places.given_to(backend):
            placed = run(problem)
    check(problem, *placed)
    assert torch.equal(placed[0], out)
    if lse is not None:
        torch.testing.assert_close(placed[1], lse, rtol=0, atol=0)
    for name, grad in grads.items():  # sums in no fixed order differ a little
        torch.testing.assert_close(placed[2][name], grad, rtol=1e-2, atol=1e-2 * float(grad.abs().max()))
    return places.taken
