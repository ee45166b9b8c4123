"""``anyattn plan`` and ``ContextPlan.explain()``: what they say is what plans hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import anyattn
from anyattn.cli import main


def simulated(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """What the command writes for machines."""
    target = tmp_path / "plan.json"
    assert main(["plan", *arguments, "--json", str(target)]) == 0
    found: dict[str, Any] = json.loads(target.read_text())
    return found


@pytest.mark.parametrize("comm", ["p2p", "all_gather", "a2a"])
def test_the_numbers_are_those_of_plans(tmp_path: Path, comm: str) -> None:
    found = simulated(tmp_path, "--lengths", "8k,3x2k", "--ranks", "4", "--comm", comm)["schemes"][comm]
    packing = anyattn.Packing.from_lengths([8192, 2048, 2048, 2048])
    plan = anyattn.ContextParallel((4, 0), comm=comm).plan(packing, num_heads=32, num_kv_heads=8, head_dim=128)
    assert found["rows"] == plan.rows
    assert found["imbalance"] == pytest.approx(plan.imbalance)
    assert found["bytes_moved"] == plan.bytes_moved


def test_auto_chooses_the_cheapest(tmp_path: Path) -> None:
    found = simulated(tmp_path, "--lengths", "128k", "--ranks", "8")
    seconds = {n: s["estimate"]["forward"] + s["estimate"]["backward"] for n, s in found["schemes"].items()}
    assert found["chosen"] == min(seconds, key=lambda name: seconds[name])


def test_a_thousand_ranks_and_two_dims(tmp_path: Path) -> None:
    found = simulated(
        tmp_path, "--lengths", "lognormal:mean=4k,longest=64k,total=4m", "--ranks", "1024", "--hierarchical"
    )
    assert "a2a+p2p" in found["schemes"]
    assert found["schemes"]["a2a+p2p"]["rows"] >= sum(found["batch"]["lengths"]) // 1024


def test_lengths_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "lengths.txt"
    file.write_text("300\n20\n0\n7\n")
    assert simulated(tmp_path, "--lengths", str(file), "--ranks", "2")["batch"]["lengths"] == [300, 20, 0, 7]


def test_it_draws_who_owns_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.svg"
    assert main(["plan", "--lengths", "4x1k", "--ranks", "2", "--comm", "all_gather", "--picture", str(picture)]) == 0
    drawn = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r"0 +a+\.+c+\.+ +a c", line) for line in drawn)
    assert any(re.fullmatch(r"1 +\.+b+\.+d+ +b d", line) for line in drawn)
    assert picture.read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--lengths", "nonsense", "--ranks", "2"), "lognormal"),
        (("--lengths", "1k", "--ranks", "2", "--gpu", "foo"), "h200"),
        (("--lengths", "1k", "--ranks", "0"), "ranks"),
        (("--lengths", "1k", "--ranks", "2", "--comm", "ring"), "all_gather"),
        (("--lengths", "1k", "--ranks", "5", "--hierarchical"), "use 8 ranks, or another --gpus-per-node"),
        (("--lengths", "1k", "--ranks", "12", "--hierarchical"), "use 8 or 16 ranks"),
        (("--lengths", "{empty}", "--ranks", "2"), "empty.txt holds no length"),
    ],
)
def test_mistakes_name_what_is_allowed(
    arguments: tuple[str, ...], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    assert main(["plan", *(word.format(empty=empty) for word in arguments)]) == 2
    assert named in capsys.readouterr().err


def test_one_of_a_thing_is_singular(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--lengths", "1", "--ranks", "1"]) == 0
    said = capsys.readouterr().out + anyattn.ContextParallel((1, 0)).plan(1).explain()
    assert "1 sequence, 1 token " in said
    assert "1 document, 1 token, causal" in said
    assert re.findall(r"\b1 \w+s\b", said) == []


def test_explain_says_what_the_plan_does() -> None:
    packing = anyattn.Packing.from_lengths([4096, 100, 300, 0, 7])
    plan = anyattn.ContextParallel((4, 1), comm="all_gather").plan(packing, features=("sink",))
    text = plan.explain()
    assert "all_gather over 4 ranks" in text
    assert f"imbalance {plan.imbalance:.3f}" in text
    assert "a2a+p2p     cannot" in text
    assert all(len(line) <= 100 for line in text.splitlines())
