"""Every adapter over its hostile double: the oracle's answer on GPUs and versions that this machine does not have.

A double refuses what its kernel refuses and leaves NaN where its kernel writes nothing, so a declaration that promises
too much, a keyword that a version lacks and a row that nobody zeroes all fail here.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

import anyattn
import cases
from anyattn import _api, _environment, _select, _traced
from anyattn._request import Tensors
from anyattn.backends import fa4
from cases import Case, Target
from doubles import pretend
from doubles.fa4 import versions
from test_conformance import check, run

NEWEST = fa4.NEWEST
CLAIMED = [v for v in versions() if Version(v) >= Version("4.0.0b5")]
#: Which packages each kernel needs on the imagined machine.
KERNELS: dict[str, dict[str, str]] = {
    "fa4": {"fa4": NEWEST},
    "varlen": {},
    "torch:flash": {},
    "torch:cudnn": {},
    "torch:efficient": {},
}
VALUES: dict[str, tuple[str, ...]] = {
    "form": tuple(f for f in cases.FORMS if not f.endswith("_holes")),
    "relation": cases.RELATIONS,
    "mask": tuple(cases.MASKS),
    "scores": (
        "plain",
        "scale",
        "softcap",
        "sink",
        "sink_low",
        "softcap_sink",
        "bias",
        "bias_grad",
        "mask",
        "mask_sink",
    ),
    "dtype": ("bfloat16", "float16", "float32"),
    "heads": cases.HEADS,
    "dims": ("32", "64", "24", "64/32", "32/64", "192/128", "256"),
    "asks": cases.ASKS,
}


def target(name: str) -> Target:
    """A kernel, as if it ran here."""
    backend, _, kernel = name.partition(":")
    capability = next(c for c in cases.BACKENDS.get(backend).CAPABILITIES if c.kernel == kernel)
    return Target("cpu", name, capability)


def taken(case: Case) -> bool:
    """Whether the imagined machine runs the case on its kernel."""
    try:
        with cases.deterministic_flag(case):
            return cases.build(case, device="meta").explain().chosen == case.target.backend
    except anyattn.InvalidArgument:
        return False


def drawn(name: str, count: int) -> list[Case]:
    """Random cases that a kernel takes; every value that it takes at all is among them."""
    rng = random.Random(name)
    plain = Case(target(name), form="thd" if name == "varlen" else "bshd", dtype="bfloat16", dims="32")
    found: dict[Case, None] = {}
    with pretend("sm90", **KERNELS[name]):
        for parameter, value in [(p, v) for p, values in VALUES.items() for v in values]:
            near = (replace(plain, **{parameter: value, "asks": asks}) for asks in ("grad", "forward"))
            found.update(dict.fromkeys(list(filter(taken, near))[:1]))
        while len(found) < count:
            case = Case(target(name), **{p: rng.choice(v) for p, v in VALUES.items()})
            if case not in found and taken(case):
                found[case] = None
    return list(found)


def solve_and_check(case: Case, **changes: Any) -> None:
    """Run a case on the imagined machine and compare everything with the oracle."""
    problem = cases.build(case)
    with cases.deterministic_flag(case):
        check(problem, *run(problem, **changes))


@pytest.mark.parametrize("drawn_case", [c for n in KERNELS for c in drawn(n, 60)], ids=lambda c: c.id)
def test_same_answer(drawn_case: Case) -> None:
    with pretend("sm90", **KERNELS[drawn_case.target.name]):
        solve_and_check(drawn_case)


# --- every version of flash-attn-4 ---------------------------------------------------------------------------------

_FA4 = Case(target("fa4"), dtype="bfloat16", heads="4/2", dims="32")
_EVERYWHERE = (
    _FA4,
    replace(_FA4, mask="causal_window", asks="lse_grad"),
    replace(_FA4, form="thd_gaps", mask="window_left", asks="lse_grad"),
    replace(_FA4, form="bshd_right", scores="sink", heads="4"),
    replace(_FA4, form="thd_tail", relation="any", mask="causal", scores="sink_low"),
    replace(_FA4, form="thd", mask="window_right", heads="4", asks="deterministic"),
    replace(_FA4, form="thd_offset", asks="forward"),
)


@pytest.mark.parametrize("version", CLAIMED)
def test_fa4_of_every_version(version: str) -> None:
    with pretend("sm90", fa4=version):
        for case in _EVERYWHERE:
            assert taken(case), case.id
            solve_and_check(case)


def _anything(rng: random.Random) -> Iterator[Case]:
    while True:
        yield Case(target("fa4"), **{p: rng.choice(v) for p, v in VALUES.items()} | {"dtype": "bfloat16"})


@pytest.mark.parametrize("on", ["sm90", "sm100", "sm120"])
@pytest.mark.parametrize("version", CLAIMED)
def test_fa4_is_asked_nothing_that_it_refuses(version: str, on: str) -> None:
    """What the declaration lets through runs: no assert of that version's code, and no known wrong answer, is met."""
    ran = 0
    with pretend(on, fa4=version):
        for case in itertools.islice(_anything(random.Random(version + on)), 60):
            if taken(case):
                with cases.deterministic_flag(case):
                    run(cases.build(case))
                ran += 1
    assert ran >= 5 or on == "sm120"


@pytest.mark.parametrize(
    ("on", "version", "changes", "what"),
    [
        ("sm90", "4.0.0b4", {}, "flash-attn-4 >= 4.0.0b5"),
        ("sm90", "4.0.0b8", {"scores": "softcap", "asks": "forward"}, "flash-attn-4 >= 4.0.0b9"),
        ("sm90", "4.0.0b23", {"scores": "softcap", "form": "thd"}, "flash-attn-4 >= 4.0.0b24"),
        ("sm90", "4.0.0b11", {"asks": "deterministic"}, "flash-attn-4 >= 4.0.0b12"),
        ("sm90", "4.0.0b29", {"dims": "24"}, "flash-attn-4 >= 4.0.0b30"),
        ("sm90", NEWEST, {"dims": "16"}, "a multiple of 32, or 8 less"),
        ("sm90", "4.0.0b30", {"dims": "256"}, "flash-attn-4 >= 4.0.0b31"),
        ("sm90", "4.0.0b30", {"dims": "192"}, "flash-attn-4 >= 4.0.0b31"),
        ("sm90", NEWEST, {"dims": "192/128"}, "head_dim_v equal to head_dim on sm90"),
        ("sm90", NEWEST, {"dims": "32/192"}, "that of q, or one of 32/64, 96/64, 128/64, 192/128 on sm90"),
        ("sm100", NEWEST, {"dims": "128/96"}, "dv is wrong for others"),
        ("sm100", NEWEST, {"dims": "192"}, "at most 128, or 192/128, or 256/256"),
        ("sm100", NEWEST, {"dims": "256"}, "gradients of 256 were wrong"),
        ("sm100", "4.0.0b10", {"dims": "256", "asks": "forward"}, "flash-attn-4 >= 4.0.0b11"),
        ("sm100", "4.0.0b33", {"dims": "256", "asks": "forward", "mask": "window"}, "flash-attn-4 >= 4.0.0b34"),
        ("sm100", "4.0.0b30", {"dims": "256", "asks": "forward", "form": "thd_gaps"}, "flash-attn-4 >= 4.0.0b31"),
        ("sm120", NEWEST, {"dims": "192"}, "at most 128 on sm12x"),
        ("sm120", NEWEST, {"form": "thd"}, "a GPU other than sm12x"),
        ("sm120", NEWEST, {"asks": "deterministic"}, "a GPU of sm90, sm10x, sm11x"),
        ("sm120", "4.0.0b20", {}, "flash-attn-4 >= 4.0.0b21"),
        ("sm80", NEWEST, {}, "sm90, sm10x, sm11x, sm12x"),
        ("sm90", NEWEST, {"mask": "top_left", "relation": "any"}, "top-left"),
        ("sm90", NEWEST, {"dtype": "float32"}, "float16 or bfloat16"),
    ],
)
def test_fa4_limits_are_named(on: str, version: str, changes: dict[str, str], what: str) -> None:
    with pretend(on, fa4=version):
        explanation = cases.build(replace(_FA4, **changes)).explain()
    reasons = explanation.rejected["fa4"]
    assert any(what in f"{reason.what}: {reason.needs}" for reason in reasons), explanation
    assert all(reason.remedy for reason in reasons)


@pytest.mark.parametrize(
    ("on", "version", "scores", "native"),
    [
        ("sm90", NEWEST, "sink", True),
        ("sm90", NEWEST, "sink_low", True),
        ("sm90", "4.0.0b25", "sink", False),
        ("sm100", "4.0.0b26", "sink", True),
        ("sm120", NEWEST, "sink", False),
    ],
)
def test_fa4_applies_the_sinks_that_it_can(on: str, version: str, scores: str, native: bool) -> None:
    case = replace(_FA4, scores=scores)
    with pretend(on, fa4=version) as machine:
        solve_and_check(case)
    assert machine.fa4 is not None
    forward, backward = (kwargs for _, kwargs in machine.fa4.calls)
    assert (forward["learnable_sink"] is not None) == native
    assert backward.get("learnable_sink") is None


def test_fa4_gets_used_lengths_only_where_rows_lie_between() -> None:
    with pretend("sm90", fa4=NEWEST) as machine:
        for form in ("bshd", "thd", "thd_tail", "thd_gaps"):
            run(cases.build(replace(_FA4, form=form, asks="forward")))
    assert machine.fa4 is not None
    given = [kwargs for _, kwargs in machine.fa4.calls]
    assert [g.get("cu_seqlens_q") is not None for g in given] == [False, True, True, True]
    assert [g.get("seqused_q") is not None for g in given] == [False, False, False, True]


def test_older_fa4_gets_aligned_tensors() -> None:
    """A slice that begins off a multiple of 16 bytes: the double of b25 would refuse it, as its kernel would."""
    wide = [torch.randn(1, 8, 4, 33, dtype=torch.bfloat16) for _ in range(3)]
    q, k, v = (x[..., 1:] for x in wide)
    with pretend("sm90", fa4="4.0.0b25"):
        out = anyattn.attention(q, k, v, causal=True, backend="fa4")
    exact = anyattn.attention(q.double(), k.double(), v.double(), causal=True, backend="reference")
    assert torch.allclose(out.double(), exact, atol=2e-2)


def test_fa4_under_the_custom_op() -> None:
    """The op that torch.compile sees runs the same kernel, forward and backward."""
    problem = cases.build(replace(_FA4, form="thd_gaps", mask="causal", scores="sink"))
    sink, packing = problem.arguments["sink"], problem.arguments["packing"]
    with pretend("sm90", fa4=NEWEST) as machine:
        tensors = Tensors(problem.q, problem.k, problem.v, sink, None, None, None, packing, None)
        out = _traced.attention(tensors, True, None, None, None, 0.0, "thd", "fa4", None, False)
        assert problem.dout is not None
        grads = torch.autograd.grad(out, [*problem.leaves.values()], cases.from_bshd(problem.dout, "thd"))
        check(problem, out, None, dict(zip(problem.leaves, grads, strict=True)))
    assert machine.fa4 is not None
    assert [name for name, _ in machine.fa4.calls] == ["_flash_attn_fwd", "_flash_attn_bwd"]


# --- padding that is not finite ------------------------------------------------------------------------------------


def _with_nan_padding(case: Case, *, sanitize: bool) -> cases.Problem:
    """The case with NaN in every padding row of q, k, v and dout."""
    problem = cases.build(case)
    packing = problem.arguments["packing"]
    problem.arguments["packing"] = anyattn.Packing(
        packing.cu_seqlens, packing.cu_seqlens_padded, rows=packing.rows, sanitize=sanitize
    )
    assert problem.dout is not None
    for x, real in ((problem.q, problem.real_q), (problem.k, problem.real_k), (problem.v, problem.real_k)):
        x.detach()[~real[0]] = float("nan")
    problem.dout[:, ~problem.real_q[0]] = float("nan")
    return problem


_PADDED = [replace(_FA4, form=form, mask="causal", asks=asks) for form in ("thd_gaps", "thd_tail", "thd_offset")
           for asks in ("grad", "lse_grad")]  # fmt: skip


@pytest.mark.parametrize("padded", _PADDED, ids=lambda c: c.id)
@pytest.mark.parametrize("name", ["fa4", "varlen"])
def test_nan_in_padding_with_sanitize(name: str, padded: Case) -> None:
    with pretend("sm90", **KERNELS[name]):
        problem = _with_nan_padding(replace(padded, target=target(name)), sanitize=True)
        check(problem, *run(problem))


@pytest.mark.parametrize("padded", _PADDED, ids=lambda c: c.id)
def test_nan_in_padding_without_sanitize(padded: Case) -> None:
    """Kernels of FlashAttention 2 read no row outside their sequences: gaps as sequences of their own suffice."""
    with pretend("sm90"):
        problem = _with_nan_padding(replace(padded, target=target("varlen")), sanitize=False)
        check(problem, *run(problem))


def test_nan_in_padding_needs_sanitize_with_fa4() -> None:
    """The double is as hostile as the kernel: else the tests above would prove nothing."""
    with pretend("sm90", fa4=NEWEST):
        problem = _with_nan_padding(_PADDED[0], sanitize=False)
        out, _, grads = run(problem)
        assert out[problem.real_q[0]].isnan().any()
        assert not out[~problem.real_q[0]].any(), "padding is zero all the same"
        assert grads["q"][problem.real_q[0]].isnan().any()


# --- installation --------------------------------------------------------------------------------------------------


def _package(folder: Path, body: str) -> None:
    place = folder / "flash_attn" / "cute"
    place.mkdir(parents=True)
    for parent in (place.parent, place):
        (parent / "__init__.py").write_text("")
    (place / "interface.py").write_text(body)


@pytest.fixture
def clean_import(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder on sys.path for a package of one's own; nothing of it stays."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(fa4, "_raw_forward", None)
    monkeypatch.setattr(fa4, "_raw_backward", None)
    monkeypatch.setattr(fa4, "_aligns_itself", True)
    monkeypatch.delenv("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", raising=False)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "flash_attn":
            del sys.modules[name]
    os.environ.pop("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", None)


_SPOILING = """
import os, sys
sys.path.insert(0, "somewhere_with_utils")
seen = os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"]
"""
_FUNCTIONS = "def _flash_attn_fwd(): ...\ndef _flash_attn_bwd(): ...\ndef maybe_contiguous(x): ...\n"


def test_fa4_load_leaves_the_path_alone(clean_import: Path) -> None:
    _package(clean_import, _SPOILING + _FUNCTIONS)
    before = list(sys.path)
    fa4.load()
    assert sys.path == before
    assert sys.modules["flash_attn.cute.interface"].seen == "1", "the variable is there before the package looks"
    assert not fa4._aligns_itself


def test_fa4_load_respects_the_variable(clean_import: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "0")
    _package(clean_import, _SPOILING + _FUNCTIONS)
    fa4.load()
    assert os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] == "0"


def test_fa4_that_does_not_import_is_a_reason(clean_import: Path, fresh_choice: Any) -> None:
    _package(clean_import, _SPOILING + "raise AttributeError('module cutlass has no attribute x')")
    before = list(sys.path)
    assert not _select.load("fa4")
    assert sys.path == before
    assert "AttributeError: module cutlass" in _select._broken["fa4"]


@pytest.mark.parametrize(
    ("installed", "version", "problem"),
    [
        ({}, None, ""),
        ({"flash-attn-4": "4.0.0b26", "nvidia-cutlass-dsl": "4.6.0"}, "4.0.0b26", "nvidia-cutlass-dsl>=4.6.2"),
        ({"flash-attn-4": NEWEST, "nvidia-cutlass-dsl": "4.8.1"}, NEWEST, ""),
    ],
)
def test_fa4_probe(
    installed: dict[str, str], version: str | None, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fa4, "distribution_version", installed.get)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    probe = fa4.probe()
    assert probe.version == version
    assert problem in probe.problem
    assert bool(problem) == bool(probe.problem)


# --- pretending ----------------------------------------------------------------------------------------------------


def test_nothing_pretended_stays() -> None:
    q = torch.randn(1, 4, 2, 32, dtype=torch.bfloat16)
    with pretend("sm90", fa4=NEWEST):
        assert anyattn.explain(q, q, q).chosen == "fa4"
        anyattn.attention(q, q, q)
    assert anyattn.explain(q, q, q).chosen == "torch"
    assert not _api._prepared
    assert _environment.arch_of(q.device) == 0
    with pytest.raises(NotImplementedError):
        torch.ops.aten._flash_attention_forward(q, q, q, None, None, 4, 4, 0.0, False, False)
