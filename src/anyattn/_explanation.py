"""``Explanation``: what the choice of a kernel comes to, and how it is told to people.

Text is shorter than data: backends that were not asked for, and kernels for other devices, have a line together.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from anyattn._capability import OTHER_DEVICE, Reason
from anyattn._problem import Problem

#: ``Reason.what`` where the caller asked for other backends.
NOT_ASKED = "backend"
#: Kernels of this rank and above are last resorts.
_LAST_RESORT = 2


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel of one backend, as chosen."""

    backend: str
    name: str
    """Empty where the backend has one kernel only."""
    version: str
    native_sink: bool = False
    native_lse_grad: bool = False
    writes_gaps: bool = False
    ignores_gaps: bool = False
    dims: tuple[int, int] | None = None
    """(head_dim, head_dim_v) that it is run with, where the core pads them to that."""
    notes: tuple[str, ...] = ()
    """What a user should know of a call that it runs."""
    rank: int = 0
    """As ``Capability.rank_at`` says."""
    dense_is_quicker: bool = False
    """As the capability says."""

    def __str__(self) -> str:
        return f"{self.backend}:{self.name}" if self.name else self.backend


@dataclass(frozen=True, slots=True)
class Explanation:
    """Which kernel runs a call, and why each other one does not. ``str()`` is a table.

    Attributes:
        problem: the kind of call, as the choice saw it.
        candidates: every kernel that takes it, the preferred first.
        rejected: for each backend that does not, all its reasons.
        versions: what was installed, or assumed to be, by backend.
        passed_over: for each candidate backend, the reasons against its other kernels.
    """

    problem: Problem
    candidates: tuple[Kernel, ...]
    rejected: Mapping[str, tuple[Reason, ...]]
    versions: Mapping[str, str | None] = field(default_factory=dict)
    passed_over: Mapping[str, tuple[Reason, ...]] = field(default_factory=dict)

    @property
    def chosen(self) -> str | None:
        """The chosen backend's name, or None if nothing takes the call."""
        return self.candidates[0].backend if self.candidates else None

    @property
    def forward(self) -> Kernel | None:
        """The kernel that runs forward."""
        return self.candidates[0] if self.candidates else None

    @property
    def backward(self) -> Kernel | None:
        """The kernel that runs backward, if a gradient is needed."""
        return self.forward if self.problem.needs_backward else None

    def reasons(self) -> Iterator[tuple[str, tuple[Reason, ...]]]:
        """Every kernel that does not take the call, as ``backend=`` names it, with its reasons; in one order always."""
        found = {**self.passed_over, **self.rejected}
        order = [*self.versions, *found]
        for backend in sorted(found, key=order.index):
            for kernel in dict.fromkeys(r.kernel for r in found[backend]):
                name = f"{backend}:{kernel}" if kernel else backend
                yield name, tuple(r for r in found[backend] if r.kernel == kernel)

    def notes(self, kernel: Kernel) -> tuple[str, ...]:
        """What a user should know of a candidate: also that a last resort is what runs."""
        slow = kernel == self.forward and kernel.rank >= _LAST_RESORT
        return ("slow, a last resort", *kernel.notes) if slow else kernel.notes

    def told(self) -> Iterator[tuple[str, Reason]]:
        """The reasons that are told one by one."""
        together = self._together()
        for name, reasons in self.reasons():
            if not together & {r.what for r in reasons}:
                yield from ((name, reason) for reason in reasons)

    def _together(self) -> set[str]:
        """What has a line for all kernels; other devices only beside something that is told of this one."""
        found = {frozenset(r.what for r in reasons) for _, reasons in self.reasons()}
        alone = not self.candidates and all(what & {NOT_ASKED, OTHER_DEVICE} for what in found)
        return {NOT_ASKED} if alone else {NOT_ASKED, OTHER_DEVICE}

    def closing(self) -> list[str]:
        """A line for all kernels for other devices, and one for all backends that were not asked for."""
        lines = []
        for what, head in ((OTHER_DEVICE, "for other devices"), (NOT_ASKED, "not asked for")):
            found = {name: r for name, reasons in self.reasons() for r in reasons if r.what == what}
            if found and what in self._together():
                tail = f' (backend="{next(iter(found.values())).got}")' if what == NOT_ASKED else ""
                lines.append(f"{head}: {', '.join(found)}{tail}")
        return lines

    def reasons_text(self) -> str:
        """Why each kernel does not take the call: a line for each reason, and those of ``closing``."""
        told = [(name, replace(reason, kernel="")) for name, reason in self.told()]
        width = max((len(name) for name, _ in told), default=0)
        return "\n".join([*(f"  {name:<{width}}  {r}" for name, r in told), *(f"  {line}" for line in self.closing())])

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = []
        for kernel in self.candidates:
            state = "chosen" if kernel == self.forward else "able"
            rows.append((str(kernel), state, "; ".join((kernel.version, *self.notes(kernel)))))
        rows += [(name, "rejected", str(replace(reason, kernel=""))) for name, reason in self.told()]
        verdict = f"{self.forward} {self.forward.version} runs" if self.forward else "No backend takes"
        closing = [line for text in self.closing() for line in aligned([(text,)])]
        return "\n".join([f"{verdict} {self.problem}", *aligned(rows), *closing])


def aligned(rows: Sequence[tuple[str, ...]], width: int = 120) -> list[str]:
    """Rows as the lines of a plain table: columns aligned, the last one wrapped under itself."""
    last = max((len(row) for row in rows), default=1) - 1
    widths = [max((len(row[i]) for row in rows if i < len(row)), default=0) for i in range(last)]
    lines = []
    for row in rows:
        head = "  " + "".join(cell.ljust(w) + "  " for cell, w in zip(row[:last], widths, strict=False))
        tail = row[last] if len(row) > last else ""
        wrapped = textwrap.wrap(tail, max(40, width - len(head)), break_long_words=False, break_on_hyphens=False)
        lines.append((head + (wrapped[0] if wrapped else "")).rstrip())
        lines += [" " * len(head) + line for line in wrapped[1:]]
    return lines
