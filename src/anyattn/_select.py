"""The choice of a kernel: pure, cached, and able to explain itself.

``choose(problem, preference, world)`` looks at nothing else. The ``Explanation`` that it returns is what ``explain()``
shows, and what ``attention()`` acts on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from packaging.version import InvalidVersion, Version

from anyattn._capability import Capability, Reason, device_reason, dims_text, evaluate
from anyattn._environment import Probe, flash_override, one_line
from anyattn._errors import InvalidArgument, UnknownBackend
from anyattn._explanation import NOT_ASKED
from anyattn._explanation import Explanation as Explanation
from anyattn._explanation import Kernel as Kernel
from anyattn._explanation import aligned as aligned
from anyattn._log import logger
from anyattn._problem import Form, Problem
from anyattn.backends import ORDER
from anyattn.backends import get as get_backend

Preference = tuple[str, ...]
World = tuple[tuple[str, Probe], ...]
Refusals = tuple[tuple[str, str], ...]
"""(kernel, what its own check said) against one request."""

AUTO: Preference = ("auto",)


#: The oldest torch that anyattn requires, as pyproject.toml says.
LEAST_TORCH = "2.11"


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


def preference_is_of_use() -> bool:
    """Whether ``use()`` says what ``backend="auto"`` means, and not the environment."""
    return _preference.get() is not None


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
#: By request: what kernels' own checks have said against it.
_refusals: dict[Hashable, Refusals] = {}

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
    probe = get_backend(name).probe()
    if probe.version is not None and not probe.problem and not _is_version(probe.version):
        probe = replace(
            probe, problem=f"its version, {probe.version!r}, cannot be compared: {get_backend(name).INSTALL}"
        )
    return amended(name, probe)


def _is_version(text: str) -> bool:
    try:
        Version(text)
    except InvalidVersion:
        return False
    return True


def amended(name: str, probe: Probe) -> Probe:
    """A probe with what was learned in this process: by importing the kernel, and from its own checks."""
    if name in _broken:
        return replace(probe, problem=_broken[name])
    flags = _learned.get(name)
    return replace(probe, flags=probe.flags | flags) if flags else probe


def assumed_world(assume: Mapping[str, str | None] | None, *, newest: bool) -> World:
    """The world for ``explain(on=..., assume=...)``: the newest known versions, or this process's, then ``assume``."""
    assume = assume or {}
    for name, version in assume.items():
        if name not in ORDER:
            raise UnknownBackend(f"assume names the unknown backend {name!r}; allowed: {', '.join(ORDER)}")
        if version is not None:
            _check_version(name, version)
    base = {n: Probe(get_backend(n).NEWEST) for n in ORDER} if newest else dict(world())
    base.update({n: _assumed(n, v) for n, v in assume.items()})
    return tuple(base.items())


def _assumed(name: str, version: str | None) -> Probe:
    newest = get_backend(name).NEWEST
    newer = version is not None and Version(version) > Version(newest)
    return Probe(version, note=f"newer than any known ({newest})" if newer else "")


def _check_version(name: str, version: str) -> None:
    try:
        found = Version(version)
    except (InvalidVersion, TypeError):
        raise InvalidArgument(
            f"assume gives {name} the version {version!r}, which is none; use one like {get_backend(name).NEWEST!r}, "
            "or None for not installed"
        ) from None
    of_torch = all(c.package == "torch" for c in get_backend(name).CAPABILITIES)
    if of_torch and found.release < Version(LEAST_TORCH).release:
        raise InvalidArgument(f"assume gives {name} the version {version}, and anyattn requires torch >= {LEAST_TORCH}")


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


def barred(name: str, arch: int) -> str:
    """Why this build runs nothing on a device that its kernels are for; empty if one of them takes a plain call."""
    backend, probe = get_backend(name), dict(world())[name]
    found: list[Reason] = []
    for capability in backend.CAPABILITIES:
        if arch // 10 in capability.families:
            form: Form = "dense" if "dense" in capability.features else "packed"
            plain = Problem(arch, capability.dtypes[0], form, 64, 64, 4, 4, 128, 128, "equal")
            forward, _ = evaluate(capability, plain, probe.version, probe.flags)
            if not forward:
                return ""
            found += forward
    return f"{found[0].detail}; {found[0].remedy}" if found else ""


def ready(name: str) -> bool:
    """Import a backend's kernels, and say whether a choice made before still stands."""
    before = world()
    return load(name) and world() == before


def refusals_of(request: Hashable) -> Refusals:
    """What kernels' own checks have said against a request."""
    return _refusals.get(request, ())


def refuse(request: Hashable, kernel: Kernel, text: str) -> None:
    """Hold a kernel's own refusal against it, for requests like this one."""
    logger.info("%s refuses a call: %s", kernel, text)
    if len(_refusals) >= 4096:
        _refusals.clear()
    _refusals[request] = (*refusals_of(request), (str(kernel), text))


def forgive(request: Hashable) -> None:
    """Let every kernel be asked again."""
    _refusals.pop(request, None)


# --- the choice ---


_CHECK = "the kernel's own check"


def _judge(
    name: str, kernels: set[str] | None, problem: Problem, probe: Probe, refusals: Refusals
) -> tuple[list[Kernel], list[Reason]]:
    """The kernels of one backend that take the problem, and all reasons of those that do not."""
    backend = get_backend(name)
    if probe.version is None or probe.problem:
        got = f"{probe.version}: {probe.problem}" if probe.version else (probe.problem or "not installed")
        text = f"{backend.TITLE}: {got}"
        return [], [Reason("installation", backend.TITLE, got, backend.INSTALL, text=text), *_elsewhere(name, problem)]
    able, reasons = [], []
    for capability in backend.CAPABILITIES:
        if kernels is not None and capability.kernel not in kernels:
            continue
        forward, backward = evaluate(capability, problem, probe.version, probe.flags)
        forward += _refused(name, capability, refusals)
        if forward or backward:
            reasons += [*forward, *backward]
        else:
            able.append(_kernel(name, capability, problem, probe))
    return able, reasons


def _elsewhere(name: str, problem: Problem) -> list[Reason]:
    """Why installing a backend would not help: none of its kernels is for this device."""
    found = [device_reason(capability, problem) for capability in get_backend(name).CAPABILITIES]
    return [replace(r, kernel="") for r in found[:1] if r is not None and all(found)]


def _refused(name: str, capability: Capability, refusals: Refusals) -> list[Reason]:
    kernel = f"{name}:{capability.kernel}" if capability.kernel else name
    return [
        Reason(
            _CHECK,
            "a call that it accepts",
            said,
            "choose another backend",
            capability.kernel,
            text=f"{_CHECK}: {said}",
        )
        for refused, said in refusals
        if refused == kernel
    ]


def _kernel(name: str, capability: Capability, problem: Problem, probe: Probe) -> Kernel:
    run, version = capability.as_run(problem), probe.version
    assert version is not None
    notes = [probe.note] if probe.note else []
    dims = None
    if run is not problem:
        dims = (run.head_dim, run.head_dim_v)
        given = dims_text(problem.head_dim, problem.head_dim_v)
        notes.append(f"head_dim {given} is padded with zeros to {dims_text(*dims)}")
    return Kernel(
        name,
        capability.kernel,
        version,
        native_sink=problem.sink is not None and capability.takes_sink(run, version),
        native_lse_grad=capability.lse_grad == "native",
        writes_gaps=capability.writes_gaps,
        ignores_gaps=capability.ignores_gaps,
        dims=dims,
        notes=tuple(notes),
        rank=capability.rank_at(problem),
        dense_is_quicker=capability.dense_is_quicker,
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
def choose(
    problem: Problem, preference: Preference, installed: World, refusals: Refusals = ()
) -> Explanation:  # fmt: skip
    """Choose a kernel. Pure: the same arguments give the same answer."""
    probes = dict(installed)
    candidates: list[Kernel] = []
    rejected: dict[str, tuple[Reason, ...]] = {}
    passed_over: dict[str, tuple[Reason, ...]] = {}
    allowed = _expand(preference)
    for name, kernels in allowed:
        able, reasons = _judge(name, kernels, problem, probes[name], refusals)
        candidates += able
        if not able:
            rejected[name] = tuple(reasons)
        elif reasons:
            passed_over[name] = tuple(reasons)
    named = dict(allowed)
    candidates.sort(key=lambda k: _rank(preference, k))
    for name in ORDER:
        if name not in named:
            needs, asked = f"backend={name!r} or 'auto'", ",".join(preference)
            rejected[name] = (Reason(NOT_ASKED, needs, asked, "name it, or leave backend out"),)
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
