"""Every call that an adapter makes binds against every version that it claims (tools/record_signatures.py)."""

from __future__ import annotations

from typing import Any

import pytest
from packaging.version import Version

import cases
from anyattn.backends import fa4
from cases import Case, Target
from doubles import fa4 as double
from doubles import pretend
from test_conformance import run

CLAIMED = [v for v in double.versions() if Version(v) >= Version("4.0.0b5")]
RAW = ("_flash_attn_fwd", "_flash_attn_bwd")


def calls() -> list[tuple[str, dict[str, Any]]]:
    """Every kind of call that the adapter makes, as keyword arguments."""
    base = Case(Target("cpu", "fa4", fa4.CAPABILITIES[0]), dtype="bfloat16", dims="32")
    with pretend("sm90", fa4=fa4.NEWEST) as machine:
        for form in ("bshd", "thd", "thd_gaps"):
            for mask in ("full", "causal", "window", "causal_window"):
                for scores in ("plain", "sink", "softcap"):
                    for asks in ("forward", "lse_grad", "deterministic"):
                        run(cases.build(Case(base.target, form, "equal", mask, scores, "bfloat16", "4/2", "32", asks)))
        assert machine.fa4 is not None
        return machine.fa4.calls


CALLS = calls()


def test_the_calls_are_of_all_kinds() -> None:
    """An adapter that left an argument out would bind all the better."""
    given = {(name, argument) for name, kwargs in CALLS for argument, value in kwargs.items() if value is not None}
    for argument in ("cu_seqlens_q", "seqused_k", "max_seqlen_q", "window_size_left", "window_size_right"):
        assert {(name, argument) for name in RAW} <= given
    assert {("_flash_attn_fwd", "learnable_sink"), ("_flash_attn_bwd", "dlse")} <= given
    assert any(kwargs["deterministic"] for name, kwargs in CALLS if name == "_flash_attn_bwd")


@pytest.mark.parametrize("version", CLAIMED)
@pytest.mark.parametrize("function", RAW)
def test_calls_bind(function: str, version: str) -> None:
    signature = double.signature(function, version)
    for name, kwargs in CALLS:
        if name == function:
            signature.bind(**kwargs)


@pytest.mark.parametrize("version", CLAIMED)
def test_results_have_what_is_unpacked(version: str) -> None:
    assert min(double.entry("_flash_attn_fwd", version)["returns"]) >= 2  # out, lse
    assert min(double.entry("_flash_attn_bwd", version)["returns"]) >= 3  # dq, dk, dv


@pytest.mark.parametrize("version", CLAIMED)
def test_defaults_that_are_left_alone(version: str) -> None:
    """The adapter counts on these: one split (several are refused on sm90), no paged keys, no mask of its own."""
    parameters = double.signature("_flash_attn_fwd", version).parameters
    expected = {"num_splits": "1", "page_table": "None", "mask_mod": "None", "out": "None", "lse": "None"}
    assert {name: parameters[name].default for name in expected} == expected


def test_newest_is_recorded() -> None:
    assert double.versions()[-1] == fa4.NEWEST


def test_versions_not_claimed_lack_what_is_passed() -> None:
    """Before b5 there is no gradient of lse: this is why those versions are rejected."""
    assert "dlse" not in double.signature("_flash_attn_bwd", "4.0.0b4").parameters
