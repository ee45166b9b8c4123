"""The choice: never silently something else (promise 2), pure, cached, explained, said once."""

from __future__ import annotations

import contextvars
import logging
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import anyattn
import cases
from anyattn import Explanation, InvalidArgument, NoBackend, UnknownBackend, _select
from anyattn._capability import FEATURE_NAMES, Capability
from anyattn._environment import TARGETS, Probe
from anyattn._problem import Problem
from anyattn._select import choose
from cases import BACKENDS, Case, Target
from test_conformance import check, run

q, k, v = torch.randn(3, 2, 5, 4, 8).unbind()
KERNELS = [(name, c) for name in BACKENDS.ORDER for c in BACKENDS.get(name).CAPABILITIES]


def kernel_name(name: str, capability: Capability) -> str:
    """As ``backend=`` takes it."""
    return f"{name}:{capability.kernel}" if capability.kernel else name


# --- nothing is dropped --------------------------------------------------------------------------------------------

#: What turns a plain problem into one that asks for a feature.
ASKING: dict[str, dict[str, Any]] = {
    "dense": {"form": "dense"},
    "packed": {"form": "packed"},
    "gaps": {"form": "packed", "gaps": True},
    "causal": {"causal": True},
    "window": {"left": True},
    "bottom_right": {"causal": True, "relation": "any"},
    "top_left": {"causal": True, "relation": "any", "top_left": True},
    "gqa": {"num_kv_heads": 2},
    "unequal_head_dims": {"head_dim_v": 32},
    "softcap": {"softcap": True},
    "alibi": {"alibi": "heads"},
    "alibi_per_sequence": {"alibi": "sequences"},
    "bias": {"bias": "bfloat16"},
    "bias_grad": {"bias": "bfloat16", "bias_grad": True},
    "mask": {"mask": "tensor"},
    "block_mask": {"mask": "block"},
    "dropout": {"dropout": True},
    "nonpositive_scale": {"nonpositive_scale": True},
    "deterministic": {"deterministic": True, "grad": True},
}
#: The core adds these to every kernel.
ADDED = {"sink", "lse_grad"}


def plain_problem(capability: Capability) -> Problem:
    """What every kernel takes."""
    form: Any = "dense" if "dense" in capability.features else "packed"
    return Problem(max(capability.families) * 10, capability.dtypes[0], form, 64, 64, 4, 4, 128, 128, "equal")


def test_every_feature_is_asked_for() -> None:
    assert set(ASKING) | ADDED == set(FEATURE_NAMES)


@pytest.mark.parametrize(("name", "capability"), KERNELS, ids=[kernel_name(*x) for x in KERNELS])
def test_a_feature_that_a_kernel_lacks_rejects_it_with_a_reason(name: str, capability: Capability) -> None:
    installed = tuple((n, Probe(BACKENDS.get(n).NEWEST)) for n in BACKENDS.ORDER)
    for feature, asked in ASKING.items():
        if feature in capability.features:
            continue
        explanation = choose(replace(plain_problem(capability), **asked), (kernel_name(name, capability),), installed)
        assert explanation.chosen is None, f"{feature} is taken although it is not declared"
        reasons = explanation.rejected[name]
        assert any(r.what.startswith(FEATURE_NAMES[feature]) for r in reasons), f"no reason speaks of {feature}"
        assert all(r.needs and r.got and r.remedy for r in reasons)


@pytest.mark.usefixtures("no_kernel")
def test_a_refused_call_reaches_no_kernel(target: Target) -> None:
    """Each thing that the kernel does not take, asked of it by name: refused, with reasons, before anything runs."""
    base = Case(target, dtype=target.capability.dtypes[0], dims="64")
    if not cases.takes(base):
        base = replace(base, form="thd")
    values = cases._values(target)
    refused = 0
    for parameter in ("form", "relation", "mask", "scores", "heads"):
        for value in values[parameter]:
            case = replace(base, **{parameter: value, **({"mask": "causal"} if parameter == "relation" else {})})
            if cases.takes(case):
                continue
            refused += 1
            problem = cases.build(case)
            with pytest.raises((NoBackend, InvalidArgument)) as caught:
                problem.call()
            if isinstance(caught.value, NoBackend):
                assert caught.value.explanation.rejected[target.backend]
    assert refused or target.backend in ("reference", "flex")  # these take all that is asked here


@pytest.fixture
def only(target: Target, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels as they run."""
    ran: list[str] = []
    for name in BACKENDS.ORDER:
        backend = BACKENDS.get(name)
        for way in ("forward", "backward"):
            original = getattr(backend, way)

            def spy(call: Any, *rest: Any, name: str = name, way: str = way, original: Any = original) -> Any:
                ran.append(f"{name}:{call.kernel} {way}" if call.kernel else f"{name} {way}")
                return original(call, *rest)

            monkeypatch.setattr(backend, way, spy)
    return ran


def test_a_named_kernel_runs_and_no_other(target: Target, only: list[str]) -> None:
    case = Case(target, dtype=target.capability.dtypes[0], dims="64")
    if not cases.takes(case):
        case = replace(case, form="thd")
    problem = cases.build(case)
    assert str(problem.explain().forward) == target.name
    check(problem, *run(problem))
    assert only == [f"{target.name} forward", f"{target.name} backward"]


def test_one_of_several_named_backends_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order given; one that cannot is passed over; none beyond them."""
    chosen = lambda backend, **more: anyattn.explain(q, k, v, backend=backend, **more)  # noqa: E731
    assert chosen(("torch", "reference")).chosen == "torch"
    assert chosen(["reference", "torch"]).chosen == "reference"
    assert chosen("reference,torch").chosen == "reference"
    assert chosen("reference, torch").chosen == "reference"
    assert chosen(("torch", "reference"), softcap=2.0).chosen == "reference"
    assert chosen(("varlen", "torch"), softcap=2.0).chosen is None
    assert str(chosen(("torch:flash", "torch:cpu")).forward) == "torch:cpu"
    assert chosen("torch:flash").chosen is None
    assert chosen(("reference", "auto")).chosen == "reference"
    with pytest.raises(NoBackend):
        anyattn.attention(q, k, v, backend=("varlen", "torch"), softcap=2.0)


def test_backends_that_were_not_named_are_listed_too() -> None:
    explanation = anyattn.explain(q, k, v, backend="reference")
    assert set(explanation.rejected) == set(BACKENDS.ORDER) - {"reference"}
    for name, reasons in explanation.rejected.items():
        assert [r.what for r in reasons] == ["backend"]
        assert name in reasons[0].needs


# --- use() and ANYATTN_BACKEND -------------------------------------------------------------------------------------


def test_use_prefers_and_nests() -> None:
    assert anyattn.explain(q, k, v).chosen == "torch"
    with anyattn.use("reference"):
        assert anyattn.explain(q, k, v).chosen == "reference"
        with anyattn.use(["torch", "reference"]):
            assert anyattn.explain(q, k, v).chosen == "torch"
        assert anyattn.explain(q, k, v).chosen == "reference"
        assert anyattn.explain(q, k, v, backend="torch").chosen == "torch", "what the call names goes first"
    assert anyattn.explain(q, k, v).chosen == "torch"


def test_use_never_becomes_another_backend() -> None:
    with anyattn.use("torch"), pytest.raises(NoBackend):
        anyattn.attention(q, k, v, softcap=2.0)


def test_use_is_undone_by_an_exception() -> None:
    with pytest.raises(RuntimeError, match="out"), anyattn.use("reference"):
        raise RuntimeError("out")
    assert anyattn.explain(q, k, v).chosen == "torch"


def test_use_belongs_to_its_thread() -> None:
    seen: list[str | None] = []

    def look() -> None:
        seen.append(anyattn.explain(q, k, v).chosen)

    with anyattn.use("reference"):
        threads = [
            threading.Thread(target=look),
            threading.Thread(target=contextvars.copy_context().run, args=(look,)),
        ]
        for thread in threads:
            thread.start()
            thread.join()
    assert seen == ["torch", "reference"], "a copied context takes it along, a new thread does not"


def test_use_reaches_a_cached_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The preference is part of what is looked up."""
    ran = spy_on(monkeypatch)
    anyattn.attention(q, k, v)
    with anyattn.use("reference"):
        anyattn.attention(q, k, v)
    anyattn.attention(q, k, v)
    assert ran == ["torch", "reference", "torch"]


def spy_on(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Backends whose forward runs."""
    ran: list[str] = []
    for name in BACKENDS.ORDER:
        backend = BACKENDS.get(name)

        def spy(call: Any, name: str = name, original: Any = backend.forward) -> Any:
            ran.append(name)
            return original(call)

        monkeypatch.setattr(backend, "forward", spy)
    return ran


def test_environment_variable_prefers(monkeypatch: pytest.MonkeyPatch, fresh_choice: Callable[[], None]) -> None:
    monkeypatch.setenv("ANYATTN_BACKEND", "reference")
    fresh_choice()
    monkeypatch.setenv("ANYATTN_BACKEND", "reference")
    assert anyattn.explain(q, k, v).chosen == "reference"
    with anyattn.use("torch"):
        assert anyattn.explain(q, k, v).chosen == "torch", "use() goes before the environment"
    assert anyattn.explain(q, k, v, backend="torch").chosen == "torch"


def test_environment_variable_with_several_names(
    monkeypatch: pytest.MonkeyPatch, fresh_choice: Callable[[], None]
) -> None:
    fresh_choice()
    monkeypatch.setenv("ANYATTN_BACKEND", "torch,reference")
    assert anyattn.explain(q, k, v).chosen == "torch"
    assert anyattn.explain(q, k, v, softcap=1.0).chosen == "reference"


@pytest.mark.usefixtures("no_kernel")
def test_who_asked_for_a_backend_is_told(monkeypatch: pytest.MonkeyPatch, fresh_choice: Callable[[], None]) -> None:
    fresh_choice()
    monkeypatch.setenv("ANYATTN_BACKEND", "fa2")
    with pytest.raises(NoBackend, match="fa2 alone is asked for by the environment variable ANYATTN_BACKEND"):
        anyattn.attention(q, k, v)
    with anyattn.use(("fa3", "fa2")), pytest.raises(NoBackend, match=r"fa3, fa2 alone is asked for by anyattn\.use"):
        anyattn.attention(q, k, v)
    with pytest.raises(NoBackend) as found:
        anyattn.attention(q, k, v, backend="fa2")
    assert "alone is asked for by" not in str(found.value)


@pytest.mark.usefixtures("no_kernel")
def test_environment_variable_with_an_unknown_name(
    monkeypatch: pytest.MonkeyPatch, fresh_choice: Callable[[], None]
) -> None:
    fresh_choice()
    monkeypatch.setenv("ANYATTN_BACKEND", "fa9")
    with pytest.raises(UnknownBackend, match="unknown backend 'fa9'"):
        anyattn.attention(q, k, v)


def test_a_version_that_is_none_is_a_reason(monkeypatch: pytest.MonkeyPatch, fresh_choice: Callable[[], None]) -> None:
    """Whatever stands in a package's metadata."""
    fresh_choice()
    monkeypatch.setattr(BACKENDS.get("fa4"), "probe", lambda: Probe("not-a-version"))
    anyattn.attention(q, k, v)
    assert "its version, 'not-a-version', cannot be compared" in anyattn.backends()["fa4"].reason
    assert "cannot be compared" in str(anyattn.explain(q, k, v, backend="fa4"))


# --- pure, cached, one object --------------------------------------------------------------------------------------


def test_choose_is_pure_and_cached() -> None:
    """The same question gives the same object; equal problems are one; nothing but the arguments counts."""
    problem = plain_problem(KERNELS[-1][1])
    installed = tuple((n, Probe(BACKENDS.get(n).NEWEST)) for n in BACKENDS.ORDER)
    first = choose(problem, ("auto",), installed)
    assert choose(replace(problem), ("auto",), installed) is first
    with anyattn.use("reference"):
        assert choose(problem, ("auto",), installed) is first
    choose.cache_clear()
    again = choose(problem, ("auto",), installed)
    assert again is not first
    assert again == first


def test_problem_is_frozen_hashable_and_without_tensors() -> None:
    problem = anyattn.explain(q, k, v, sink=torch.zeros(4)).problem
    assert hash(problem) == hash(replace(problem))
    with pytest.raises(AttributeError):
        problem.causal = True  # type: ignore[misc]
    assert not any(isinstance(getattr(problem, f), torch.Tensor) for f in problem.__slots__)


def test_lengths_of_one_class_are_one_problem() -> None:
    """Packed totals change every step: they make no new choice."""
    found = set()
    for lengths in ([100, 257, 300], [120, 260, 290], [101, 400, 1]):
        packing = anyattn.Packing.from_lengths(lengths, pad_to_multiple_of=64)
        x = torch.empty(packing.rows, 4, 8)
        found.add(anyattn.explain(x, x, x, causal=True, packing=packing).problem)
    assert len(found) == 1


def test_explain_returns_the_object_that_attention_acts_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from anyattn import _core

    acted: list[Explanation] = []
    forward = _core.forward

    def spy(p: Any, *rest: Any) -> Any:
        acted.append(p.explanation)
        return forward(p, *rest)

    monkeypatch.setattr(_core, "forward", spy)
    anyattn.attention(q, k, v, causal=True)
    assert len(acted) == 1
    assert acted[0] is anyattn.explain(q, k, v, causal=True)
    with pytest.raises(NoBackend) as caught:
        anyattn.attention(q, k, v, softcap=1.0, backend="torch")
    assert caught.value.explanation is anyattn.explain(q, k, v, softcap=1.0, backend="torch")


@pytest.mark.usefixtures("no_kernel")
def test_explain_runs_nothing_and_takes_meta_tensors() -> None:
    x = torch.empty(2, 4096, 32, 128, dtype=torch.bfloat16, device="meta")
    packing = anyattn.Packing.from_lengths([4096] * 2)
    explanation = anyattn.explain(x, x, x, causal=True, packing=packing, on="sm90")
    assert explanation.chosen is not None
    assert explanation.chosen in str(explanation)


@pytest.mark.parametrize("on", TARGETS)
def test_explain_answers_for_every_target(on: str) -> None:
    """From any machine, with the newest version of everything; reference takes all, and is the last resort."""
    x = torch.empty(1, 512, 8, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    explanation = anyattn.explain(x, x, x, causal=True, on=on)
    assert explanation.problem.arch == TARGETS[on]
    assert explanation.candidates[-1].backend == "reference"
    assert set(explanation.versions) == set(BACKENDS.ORDER)
    names = {c.backend for c in explanation.candidates} | set(explanation.rejected)
    assert names == set(BACKENDS.ORDER)
    for name, capability in KERNELS:
        if TARGETS[on] // 10 not in capability.families:
            assert kernel_name(name, capability) not in map(str, explanation.candidates)


def test_explain_assumes_versions() -> None:
    x = torch.empty(1, 512, 8, 64, dtype=torch.bfloat16, device="meta")
    packing = anyattn.Packing.from_lengths([512])
    base = anyattn.explain(x, x, x, packing=packing, on="sm90")
    assert base.chosen is not None
    absent = anyattn.explain(x, x, x, packing=packing, on="sm90", assume={base.chosen: None})
    assert absent.chosen != base.chosen
    assert [r.what for r in absent.rejected[base.chosen]] == ["installation"]
    assert absent.versions[base.chosen] is None
    other = anyattn.explain(x, x, x, packing=packing, assume={"reference": "2.11.0"})
    assert other.versions["reference"] == "2.11.0"
    assert other.problem.arch == 0, "without on=, this machine"


def test_assuming_an_old_version_gives_the_upgrade_as_remedy() -> None:
    """A rule that a newer version lifts says so."""
    x = torch.empty(1, 512, 8, 64, dtype=torch.bfloat16, device="meta")
    explanation = anyattn.explain(x, x, x, on="sm90", backend="fa4", assume={"fa4": "4.0.0b1"})
    assert explanation.chosen is None
    assert any("pip install" in r.remedy for r in explanation.rejected["fa4"])


def test_str_is_a_table_of_everything() -> None:
    text = str(anyattn.explain(q, k, v, softcap=2.0, dropout=0.1))
    assert "reference" in text.splitlines()[0] + text.splitlines()[1]
    for name in BACKENDS.ORDER:
        assert name in text
    assert "softcap" in text
    assert max(map(len, text.splitlines())) <= 160


def on_sm90(dim: int = 64, dim_v: int | None = None, **more: Any) -> Explanation:
    """A training call there."""
    q, v = (
        torch.empty(1, 512, 8, d, dtype=torch.bfloat16, device="meta").requires_grad_() for d in (dim, dim_v or dim)
    )
    return anyattn.explain(q, q, v, on="sm90", **more)


def test_text_is_in_one_order_and_leaves_out_what_does_not_help() -> None:
    explanation = on_sm90(softcap=2.0, dropout=0.1, assume={"fa4": None})
    names = [line.split()[0] for line in str(explanation).splitlines() if "  rejected  " in line]
    order = [kernel_name(*kernel) for kernel in KERNELS]
    assert list(dict.fromkeys(names)) == [name for name in order if name in names]
    assert "torch:cpu" not in names
    assert str(explanation).splitlines()[-1] == "  for other devices: torch:cpu, flex:cpu"
    assert "device" in [r.what for r in explanation.rejected["torch"]], "what is not told is kept"
    assert "FlashAttention 4: not installed; pip install" in str(explanation)


def test_what_cannot_run_on_this_device_is_not_recommended() -> None:
    """An installation is no remedy where none of a backend's kernels is for the device."""
    explanation = anyattn.explain(q, k, v, on="cpu", assume={"fa4": None})
    assert [r.what for r in explanation.rejected["fa4"]] == ["installation", "device"]
    assert "pip install" not in str(explanation)


def test_reasons_say_what_was_got() -> None:
    """The version, the head dims: values, and not that they are others."""
    cases_: list[tuple[Explanation, str, str]] = [
        (on_sm90(backend="fa2", assume={"fa2": "2.2.0"}), "fa2", "2.2.0"),
        (on_sm90(80, backend="fa4"), "fa4", "80"),
        (on_sm90(100, backend="fa4"), "fa4", "100, run as 104"),
        (on_sm90(64, 96, backend="fa4"), "fa4", "64/96"),
        (on_sm90(600, 64, backend="fa3"), "fa3", "600"),
        (on_sm90(320, backend="fa3"), "fa3", "320"),
        (
            anyattn.explain(*[torch.empty(1, 4, 2, 8, requires_grad=True)] * 3, backend="flex:cpu"),
            "flex",
            "one without",
        ),
    ]
    for explanation, name, got in cases_:
        assert got in [r.got for r in explanation.rejected[name]], explanation


def test_a_deterministic_backward_is_said_once() -> None:
    text = str(on_sm90(deterministic=True, backend="cudnn,torch:cudnn,fa2", assume={"fa2": "2.4.0"}))
    assert "a deterministic backward: " in text
    assert "a deterministic backward in backward" not in text


def test_a_last_resort_is_called_slow() -> None:
    assert "slow" in str(anyattn.explain(q, k, v, backend="reference")).splitlines()[1]
    assert "slow" not in str(anyattn.explain(q, k, v))


def test_a_version_that_anyattn_does_not_run_with_is_not_assumed() -> None:
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'"torch>={_select.LEAST_TORCH}"' in pyproject
    for name in ("torch", "varlen", "flex", "reference"):
        with pytest.raises(InvalidArgument, match=rf"assume gives {name} the version 2.10.1, .* torch >= 2.11"):
            anyattn.explain(q, k, v, assume={name: "2.10.1"})
        assert anyattn.explain(q, k, v, assume={name: "2.11.0a0"}).versions[name] == "2.11.0a0"


# --- the log -------------------------------------------------------------------------------------------------------


@pytest.fixture
def said(fresh_choice: Callable[[], None], caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    caplog.set_level(logging.INFO, logger="anyattn")
    return caplog


def test_the_log_says_each_new_choice_once(said: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        anyattn.attention(q, k, v)
        anyattn.attention(q, k, v, causal=True)
    for _ in range(3):
        with anyattn.use("reference"):
            anyattn.attention(q, k, v)
    messages = [r.getMessage() for r in said.records]
    assert len(messages) == len(set(messages)) == 3
    assert sum("torch:cpu" in m for m in messages) == 2
    assert sum("reference" in m for m in messages) == 1


def test_the_log_goes_through_one_logger(said: pytest.LogCaptureFixture) -> None:
    anyattn.attention(q, k, v, causal=True, window=(2, 0))
    assert {r.name for r in said.records} == {"anyattn"}


# --- what is cached is never stale ---------------------------------------------------------------------------------


def test_nothing_that_matters_is_missing_from_the_cache_key() -> None:
    """Calls that differ in one respect, one after the other, each against a call made for the first time."""
    from conftest import forget_prepared

    x, y = torch.randn(2, 1, 6, 4, 8).unbind()
    base: dict[str, Any] = {"backend": "reference"}
    variants: list[dict[str, Any]] = [
        {}, {"causal": True}, {"window": (1, 2)}, {"causal": "top_left"}, {"window": (2, 1)}, {"window": [1, 1]},
        {"scale": 0.5}, {"scale": 0.25}, {"softcap": 1.0}, {"softcap": 2.0}, {"layout": "bhsd"}, {"layout": "sbhd"},
        {"mask": torch.rand(6, 6) > 0.3}, {"bias": torch.randn(6, 6)}, {"sink": torch.randn(4)},
        {"alibi_slopes": torch.rand(4)}, {"return_lse": True}, {"packing": anyattn.Packing.from_lengths([4])},
        {"packing": anyattn.Packing.from_lengths([3])},
    ]  # fmt: skip

    def answer(arguments: dict[str, Any]) -> torch.Tensor:
        got = anyattn.attention(x, x, y, **base, **arguments)
        return got[0] if isinstance(got, tuple) else got

    fresh = []
    for arguments in variants:
        forget_prepared()
        fresh.append(answer(arguments))
    forget_prepared()
    for _ in range(2):
        for arguments, expected in zip(variants, fresh, strict=True):
            assert torch.equal(answer(arguments), expected), arguments
    for (one, a), (other, b) in pairwise(zip(variants, fresh, strict=True)):
        if "return_lse" not in one and "return_lse" not in other:
            assert a.shape != b.shape or not torch.equal(a, b), (one, other)


def test_state_of_torch_reaches_a_cached_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grad mode, autocast and the deterministic flag are looked up at every call."""
    x = torch.randn(1, 6, 4, 8, requires_grad=True)
    for _ in range(2):
        assert anyattn.attention(x, x, x).requires_grad
        with torch.no_grad():
            assert not anyattn.attention(x, x, x).requires_grad
        assert not anyattn.attention(x.detach(), x.detach(), x.detach()).requires_grad
        with torch.autocast("cpu", torch.bfloat16):
            assert anyattn.attention(x, x, x).dtype == torch.bfloat16
        assert anyattn.attention(x, x, x).dtype == torch.float32
        torch.use_deterministic_algorithms(True)
        assert anyattn.explain(x, x, x).problem.deterministic
        torch.use_deterministic_algorithms(False)
        assert not anyattn.explain(x, x, x).problem.deterministic


def test_a_backend_that_stops_loading_is_left_out(
    monkeypatch: pytest.MonkeyPatch, fresh_choice: Callable[[], None]
) -> None:
    """A package that is there but does not import is a reason, and the next backend runs; by name it is refused."""

    def broken() -> None:
        raise AttributeError("module 'cutlass' has no attribute 'cute'\nsecond line")

    monkeypatch.setattr(BACKENDS.get("torch"), "load", broken)
    fresh_choice()
    assert anyattn.attention(q, k, v).shape == q.shape
    status = anyattn.backends()["torch"]
    assert not status.runs_here
    assert status.reason == "AttributeError: module 'cutlass' has no attribute 'cute'"
    assert status.version is not None
    with pytest.raises(NoBackend, match="AttributeError: module 'cutlass' has no attribute 'cute'"):
        anyattn.attention(q, k, v, backend="torch")


def test_backends_lists_everything_here() -> None:
    table = anyattn.backends()
    assert list(table) == list(BACKENDS.ORDER)
    assert table["reference"].runs_here
    for name, status in table.items():
        assert status.name == name
        assert status.install
        assert status.runs_here == (not status.reason)
        assert name in str(table)


def test_last_resorts_come_last_where_any_backend_may_run() -> None:
    """Kernels of a higher rank, but not where the caller names them first."""
    q = torch.empty(1, 64, 2, 64, device="meta", dtype=torch.float32)
    first, *_ = (str(k) for k in anyattn.explain(q, q, q, softcap=9.0, on="cpu").candidates)
    assert first == "reference"
    named = [str(k) for k in anyattn.explain(q, q, q, softcap=9.0, on="cpu", backend=("flex", "auto")).candidates]
    assert named == ["flex:cpu", "reference"]


@pytest.mark.parametrize(("queries", "keys", "first"), [(1, 8192, False), (512, 8192, True), (1, 512, True)])
def test_a_kernel_is_passed_where_others_are_much_faster(queries: int, keys: int, first: bool) -> None:
    q, k = (torch.empty(1, n, 2, 64, device="meta", dtype=torch.bfloat16) for n in (queries, keys))
    none = {"fa3": None, "fa4": None, "fa2": None}
    found = anyattn.explain(q, k, k, on="sm90", assume=none)
    assert (found.chosen == "cudnn") is first
    assert "cudnn" in [k.backend for k in found.candidates]


def test_a_backend_for_other_devices_says_why_where_it_was_asked_for() -> None:
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(anyattn.NoBackend) as raised:
        anyattn.attention(q, q, q, backend="fa4")
    assert re.search(r"fa4 +device: needs sm90, .* got cpu", str(raised.value))
    assert re.search(r"fa4 +FlashAttention 4: ", str(raised.value))
