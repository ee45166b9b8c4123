"""The choice of a kernel: pure, cached, and able to explain itself.

``choose(problem, preference, world)`` looks at nothing else. ``Explanation`` is what it returns, what ``explain()``
shows, and what ``attention()`` acts on.
"""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from packaging.version import InvalidVersion, Version

from anyattn._capability import Capability, Reason, evaluate
from anyattn._environment import Probe, Refusal, flash_override, one_line
from anyattn._errors import InvalidArgument, UnknownBackend
from anyattn._log import logger
from anyattn._problem import Problem
from anyattn.backends import ORDER
from anyattn.backends import get as get_backend

Preference = tuple[str, ...]
World = tuple[tuple[str, Probe], ...]

AUTO: Preference = ("auto",)


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

    def reasons_text(self) -> str:
        """Every reason of every rejected backend, a line each."""
        return "\n".join(f"  {name:<10} {reason}" for name, reasons in self.rejected.items() for reason in reasons)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = []
        for kernel in self.candidates:
            state = "chosen" if kernel == self.forward else "able"
            rows.append((str(kernel), state, "; ".join((kernel.version, *kernel.notes))))
        for name, reasons in (*self.passed_over.items(), *self.rejected.items()):
            for r in reasons:
                rows.append((f"{name}:{r.kernel}" if r.kernel else name, "rejected", str(replace(r, kernel=""))))
        verdict = f"{self.forward} {self.forward.version} runs" if self.forward else "No backend takes"
        return "\n".join([f"{verdict} {self.problem}", *aligned(rows)])


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


# --- what the caller prefers ---


def parse_preference(wanted: str | Sequence[str]) -> Preference:
    """``"fa4"``, ``"torch:flash"``, ``"fa4,torch"`` or a sequence of such names, checked; ("auto",) means any.

    Raises:
        UnknownBackend: a name that is no backend or kernel.
    """
    names = wanted.split(",") if isinstance(wanted, str) else wanted
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(n, str) for n in names):
        raise InvalidArgument(f"backend must be a name or a non-empty sequence of names, got {wanted!r}")
    parsed = tuple(name.strip() for name in names)
    for name in parsed:
        _check_name(name)
    return parsed


def _check_name(name: str) -> None:
    backend, _, kernel = name.partition(":")
    if backend == "auto" and not kernel:
        return
    if backend not in ORDER:
        raise UnknownBackend(f"unknown backend {name!r}; allowed: auto, {', '.join(ORDER)}")
    kernels = [c.kernel for c in get_backend(backend).CAPABILITIES if c.kernel]
    if ":" in name and kernel not in kernels:
        allowed = ", ".join(f"{backend}:{k}" for k in kernels) or f"{backend} (it has one kernel)"
        raise UnknownBackend(f"unknown kernel {name!r}; allowed: {allowed}")


_preference: ContextVar[Preference | None] = ContextVar("anyattn_preference", default=None)

#: The preference as torch.compile sees it: a plain global, for Dynamo guards those and cannot read a ContextVar.
traced_preference: Preference | None = None


@lru_cache
def environment_preference() -> Preference:
    """``ANYATTN_BACKEND``, read once: looking it up costs as much as all the rest of a cached choice."""
    value = os.environ.get("ANYATTN_BACKEND", "")
    try:
        return parse_preference(value) if value else AUTO
    except InvalidArgument as error:
        raise UnknownBackend(f"ANYATTN_BACKEND={value}: {error}") from None


def default_preference() -> Preference:
    """What ``backend="auto"`` means here: ``use()``, else ``ANYATTN_BACKEND``, else any."""
    return _preference.get() or environment_preference()


def use(backend: str | Sequence[str]) -> AbstractContextManager[None]:
    """Prefer a backend, or several in order, for every call inside that does not name one itself.

    Args:
        backend: as ``attention(backend=...)``: never another one than these.

    Raises:
        UnknownBackend: a name that is no backend.

    The preference belongs to the current thread and context. In a region compiled by ``torch.compile`` it is a
    constant of the graph, guarded, and process-wide.

    Example::

        >>> import anyattn, torch
        >>> q = torch.randn(1, 4, 2, 8)
        >>> with anyattn.use("reference"):
        ...     anyattn.explain(q, q, q).chosen
        'reference'
    """
    return _using(parse_preference(backend))


@contextmanager
def _using(parsed: Preference) -> Iterator[None]:
    global traced_preference
    token = _preference.set(parsed)
    traced_preference = parsed
    try:
        yield
    finally:
        _preference.reset(token)
        traced_preference = _preference.get()


# --- what is installed ---

_broken: dict[str, str] = {}
_learned: dict[str, frozenset[str]] = {}
_refusals: dict[str, tuple[Refusal, ...]] = {}

#: What depends on the world besides ``choose``, which takes it as an argument: emptied when the world is forgotten.
caches: list[dict[Any, Any]] = []
_world: World | None = None
_override: str | None = None


def world() -> World:
    """What is installed in this process, probed once, and again when torch's own flash kernels are replaced."""
    global _world, _override
    override = flash_override()
    if _world is None or override != _override:
        _world, _override = tuple((name, _probe(name)) for name in ORDER), override
    return _world


def _probe(name: str) -> Probe:
    return amended(name, get_backend(name).probe())


def amended(name: str, probe: Probe) -> Probe:
    """A probe with what was learned in this process: by importing the kernel, and from its own checks."""
    if name in _broken:
        return replace(probe, problem=_broken[name])
    flags, refusals = _learned.get(name, frozenset()), _refusals.get(name, ())
    return replace(probe, flags=probe.flags | flags, refusals=refusals) if flags or refusals else probe


def assumed_world(assume: Mapping[str, str | None] | None, *, newest: bool) -> World:
    """The world for ``explain(on=..., assume=...)``: the newest known versions, or this process's, then ``assume``."""
    assume = assume or {}
    for name, version in assume.items():
        if name not in ORDER:
            raise UnknownBackend(f"assume names the unknown backend {name!r}; allowed: {', '.join(ORDER)}")
        if version is not None:
            _check_version(name, version)
    base = {n: Probe(get_backend(n).NEWEST) for n in ORDER} if newest else dict(world())
    base.update({n: Probe(v, "" if v else "assumed absent") for n, v in assume.items()})
    return tuple(base.items())


def _check_version(name: str, version: str) -> None:
    try:
        Version(version)
    except (InvalidVersion, TypeError):
        raise InvalidArgument(
            f"assume gives {name} the version {version!r}, which is none; use one like {get_backend(name).NEWEST!r}, "
            "or None for not installed"
        ) from None


def forget_world() -> None:
    """Probe again at the next call: for tests, and after installing something into a live process."""
    global _world
    _world = None
    for found in (_broken, _learned, _refusals):
        found.clear()
    for cache in caches:
        cache.clear()
    load.cache_clear()
    environment_preference.cache_clear()


@lru_cache
def load(name: str) -> bool:
    """Import a backend's kernels. False, and a reason from then on, if that fails in any way."""
    global _world
    path = list(sys.path)
    try:
        flags = get_backend(name).load()
    except (Exception, SystemExit) as error:  # kernel packages fail with AttributeError, TypeError and OSError too
        _broken[name] = one_line(error)
        _world = None
        logger.warning("%s is installed but does not load, so it is left out: %s", name, _broken[name])
        return False
    finally:
        sys.path[:] = path  # packages put folders there that shadow others' modules
    if flags:
        _learned[name], _world = flags, None
    return True


def ready(name: str) -> bool:
    """Import a backend's kernels, and say whether a choice made before still stands."""
    before = world()
    return load(name) and world() == before


def refuse(kernel: Kernel, problem: Problem, text: str) -> None:
    """Hold a kernel's own refusal of a kind of call against it from now on."""
    global _world
    logger.info("%s refuses %s: %s", kernel, problem, text)
    _refusals[kernel.backend] = (*_refusals.get(kernel.backend, ()), Refusal(kernel.name, problem, text))
    _world = None
    for cache in caches:
        cache.clear()


# --- the choice ---


def _judge(name: str, kernels: set[str] | None, problem: Problem, probe: Probe) -> tuple[list[Kernel], list[Reason]]:
    """The kernels of one backend that take the problem, and all reasons of those that do not."""
    backend = get_backend(name)
    if probe.version is None or probe.problem:
        got = f"{probe.version}: {probe.problem}" if probe.version else (probe.problem or "not installed")
        return [], [Reason("installation", f"{backend.TITLE}", got, backend.INSTALL)]
    able, reasons = [], []
    for capability in backend.CAPABILITIES:
        if kernels is not None and capability.kernel not in kernels:
            continue
        forward, backward = evaluate(capability, problem, probe.version, probe.flags)
        forward += _refused(capability, problem, probe)
        if forward or backward:
            reasons += [*forward, *backward]
        else:
            able.append(_kernel(name, capability, problem, probe))
    return able, reasons


def _refused(capability: Capability, problem: Problem, probe: Probe) -> list[Reason]:
    return [
        Reason("the kernel's own check", "a call that it accepts", r.text, "choose another backend", capability.kernel)
        for r in probe.refusals
        if r.kernel == capability.kernel and r.problem == problem
    ]


def _kernel(name: str, capability: Capability, problem: Problem, probe: Probe) -> Kernel:
    run, version = capability.as_run(problem), probe.version
    assert version is not None
    notes = [probe.note] if probe.note else []
    dims = None
    if run is not problem:
        dims = (run.head_dim, run.head_dim_v)
        given, used = (f"{d}/{v}" if d != v else str(d) for d, v in ((problem.head_dim, problem.head_dim_v), dims))
        notes.append(f"head_dim {given} is padded with zeros to {used}")
    return Kernel(
        name,
        capability.kernel,
        version,
        native_sink=problem.sink is not None and capability.takes_sink(run, version),
        native_lse_grad=capability.takes_lse_grad(version),
        writes_gaps=capability.writes_gaps,
        ignores_gaps=capability.ignores_gaps,
        dims=dims,
        notes=tuple(notes),
        rank=capability.rank_at(problem),
    )


def _expand(preference: Preference) -> list[tuple[str, set[str] | None]]:
    """Backends in order, each with the kernels allowed (None: all)."""
    order: dict[str, set[str] | None] = {}
    for wanted in preference:
        if wanted == "auto":
            order.update({name: None for name in ORDER if name not in order})
            continue
        name, _, kernel = wanted.partition(":")
        if not kernel:
            order[name] = None
        elif name not in order:
            order[name] = {kernel}
        elif (named := order[name]) is not None:
            named.add(kernel)
    return list(order.items())


@lru_cache(maxsize=4096)
def choose(problem: Problem, preference: Preference, installed: World) -> Explanation:
    """Choose a kernel. Pure: the same arguments give the same answer."""
    probes = dict(installed)
    candidates: list[Kernel] = []
    rejected: dict[str, tuple[Reason, ...]] = {}
    passed_over: dict[str, tuple[Reason, ...]] = {}
    allowed = _expand(preference)
    for name, kernels in allowed:
        able, reasons = _judge(name, kernels, problem, probes[name])
        candidates += able
        if not able:
            rejected[name] = tuple(reasons)
        elif reasons:
            passed_over[name] = tuple(reasons)
    named = dict(allowed)
    candidates.sort(key=lambda k: _rank(preference, k))
    for name in ORDER:
        if name not in named:
            asked = " or ".join(preference)
            rejected[name] = (Reason("backend", f"backend={name!r} or 'auto'", asked, "name it, or leave backend out"),)
    explanation = Explanation(
        problem,
        tuple(candidates),
        MappingProxyType(rejected),
        MappingProxyType({n: p.version for n, p in installed}),
        MappingProxyType(passed_over),
    )
    logger.info("%s runs %s", explanation.forward or "nothing", problem)
    return explanation


def _rank(preference: Preference, kernel: Kernel) -> tuple[int, int]:
    """The place of a kernel in a preference; where any may run, its rank as well."""
    for place, wanted in enumerate(preference):
        if wanted == "auto":
            return place, kernel.rank
        if wanted in (str(kernel), kernel.backend):
            return place, 0
    return len(preference), 0


def deterministic_default() -> bool:
    """What ``deterministic=None`` means."""
    return torch.are_deterministic_algorithms_enabled()
