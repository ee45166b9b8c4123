"""What the tests of every generation's published versions have in common."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import cases
from cases import Case, Imagined, Target
from test_conformance import check, run

VALUES: dict[str, tuple[str, ...]] = {
    "form": tuple(f for f in cases.FORMS if not f.endswith("_holes")),
    "relation": cases.RELATIONS,
    "mask": tuple(cases.MASKS),
    "scores": tuple(s for s in cases.SCORES if s not in ("block_mask", "bias_row", "mask_bias")),
    "heads": cases.HEADS,
    "dims": ("32", "64", "20", "24", "64/32", "32/64", "192/128", "256"),
    "asks": cases.ASKS,
}


def double(
    name: str, version: str | None = None, on: str = "sm90", *, without: tuple[str, ...] = (), **others: str
) -> Target:  # fmt: skip
    """A kernel's double on such a GPU, of one version; other packages may be there too, and features may not."""
    backend, _, kernel = name.partition(":")
    capability = next(c for c in cases.BACKENDS.get(backend).CAPABILITIES if c.kernel == kernel)
    packages = ((backend, version),) if version else ()
    return Target("cpu", name, capability, Imagined(on, (*packages, *others.items()), without=without))


def solve(case: Case) -> None:
    """Run a case and compare everything with the oracle."""
    with case.target.machine(), cases.deterministic_flag(case):
        assert cases.takes(case), case.id
        problem = cases.build(case)
        check(problem, *run(problem))


def _anything(target: Target) -> Iterator[Case]:
    rng = random.Random(target.id)
    while True:
        yield Case(target, **{p: rng.choice(v) for p, v in VALUES.items()}, dtype="bfloat16")


def run_what_is_taken(target: Target, count: int = 60) -> int:
    """What the declaration lets through runs: no assert of that version's code is met. How much that was."""
    ran = 0
    with target.machine():
        for case in itertools.islice(_anything(target), count):
            if cases.takes(case):
                with cases.deterministic_flag(case):
                    run(cases.build(case))
                ran += 1
    return ran


def assert_named(case: Case, what: str) -> None:
    """The reason why a kernel does not take a case, "softcap: flash-attn >= 2.6.0"; every reason has a remedy."""
    with case.target.machine():
        explanation = cases.build(case, device="meta").explain()
    assert not explanation.candidates, explanation
    reasons = explanation.rejected[case.target.backend]
    assert any(what in f"{reason.what}: {reason.needs}" for reason in reasons), explanation
    assert all(reason.remedy for reason in reasons)


def changed(case: Case, **changes: str) -> Case:
    """The case with other values."""
    return replace(case, **changes)
