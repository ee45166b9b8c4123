"""The benchmark of transformers models runs, compares like with like, and leaves out what is absent."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest

import anyattn
from transformers_models import transformers


@pytest.fixture
def transformers_speed(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    anyattn.integrations.transformers.register()
    yield importlib.import_module("transformers_speed")
    anyattn.integrations.transformers.unregister()


def test_every_figure_is_taken(transformers_speed, tmp_path):
    sizes = replace(transformers_speed.TINY, tokens=64, prompt=8, new=2, rounds=1)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    report = transformers_speed.Report("transformers-tiny", tmp_path)
    bench = transformers_speed.Bench(sizes, "cpu")
    transformers_speed.measure_all(report, bench, ["torch", "fa4"])
    transformers.logging.set_verbosity(verbosity)
    assert {(row.name.split(",")[0], row.against.split()[1:2] == ["with"]) for row in report.rows} == {
        ("step", True), ("step", False), ("host time of attention per layer", True),
        ("host time of attention per layer", False), ("decode step", False),
    }  # fmt: skip
    assert all(row.ours > 0 and row.theirs > 0 for row in report.rows)
    assert {item["because"] for item in report.left_out} == {"absent"}
    assert {item["what"] for item in report.left_out} == {"anyattn:fa4", *transformers_speed.FLASH}
    ours, right, leaking = (
        bench.losses[name]
        for name in ("anyattn:torch", transformers_speed.MASKED, transformers_speed.LEAKING)
    )  # fmt: skip
    assert abs(ours - right) < abs(leaking - right)
    bench.losses["wrong"] = right + 1
    with pytest.raises(AssertionError, match="the loss is"):
        bench.check("wrong", transformers_speed.MASKED)


def test_documents_fill_the_row(transformers_speed):
    lengths = transformers_speed.documents(16384, 700)
    assert sum(lengths) == 16384
    assert len(set(lengths)) > 10
