"""The demo on a tiny model: it agrees with itself, and says so when attention is wrong."""

import dataclasses
import json
import re

import pytest
import torch

import anyattn
from anyattn.demo import data, model
from anyattn.demo import run as running
from anyattn.integrations import _transformers_call as integration

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("typer")

from anyattn.cli import _demo, main

TINY = running.Settings(
    steps=3, tokens=200, longest=120, sizes=model.Sizes(hidden=32, layers=1, heads=2, kv_heads=1, head_dim=16)
)


@pytest.fixture
def _tiny(monkeypatch):
    """``anyattn demo`` with tiny documents and a tiny model."""
    real = running.Settings

    def settings(**given):
        return real(**(dataclasses.asdict(TINY) | {"sizes": TINY.sizes} | given))

    monkeypatch.setattr(running, "Settings", settings)


def demo(tmp_path, *more):
    return main(["demo", "--steps", "3", "--tokens", "200", "--output", str(tmp_path / "out"), *more])


# --- it passes, and writes ---


@pytest.mark.usefixtures("_tiny")
def test_passes_and_writes(tmp_path, capsys):
    assert demo(tmp_path) == 0
    said = capsys.readouterr().out
    assert "The losses are the same: in 3 steps" in said
    assert re.search(r"torch:cpu +chosen", said)
    assert re.search(r"padded to the longest, anyattn +[\d,]+ +[\d.]+ +\d+%", said)
    assert said.isascii()
    found = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert found["agrees"] is True
    assert found["failures"] == []
    assert len(found["losses"]["packed"]) == len(found["bounds"]) == 3
    assert found["losses"]["padded, by step"]
    assert 0 < max(found["bounds"]) < 1e-4
    assert found["pace"]["packed"]["rows"] > found["pace"]["packed"]["tokens"] > 600
    assert found["versions"]["anyattn"] == anyattn.__version__
    assert found["machine"]["cpu_count"] >= 1
    assert (tmp_path / "out" / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_no_state_is_left_behind():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    running.run(dataclasses.replace(TINY, steps=1))
    assert torch.equal(torch.get_rng_state(), before)


# --- it fails when attention is wrong ---


def _leaking(real):
    """Every document sees those before it."""

    def attention(q, k, v, **options):
        if q.ndim == 3:
            options["packing"] = anyattn.Packing.from_lengths([q.shape[0]])
        return real(q, k, v, **options)

    return attention


def _short_sighted(real):
    """A window that hides what lies 100 tokens back, which only the longest documents notice."""

    def attention(q, k, v, **options):
        return real(q, k, v, **(options | {"window": (100, 0)}))

    return attention


def _off_by_little(real):
    """Five parts in a hundred: little, for weights that have hardly learned anything."""

    def attention(q, k, v, **options):
        return real(q, k, v, **(options | {"scale": options["scale"] * 1.05}))

    return attention


@pytest.mark.parametrize("sabotage", [_leaking, _short_sighted, _off_by_little])
@pytest.mark.usefixtures("_tiny")
def test_wrong_attention_is_found(tmp_path, capsys, monkeypatch, sabotage):
    monkeypatch.setattr(integration, "attention", sabotage(integration.attention))
    assert demo(tmp_path) == 1
    assert "The losses differ by more than rounding explains" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert found["agrees"] is False
    assert found["failures"]


def test_padded_batches_are_checked_too(monkeypatch):
    real = integration.attention

    def attention(q, k, v, **options):  # right where packed, wrong where padded
        return real(q, k, v, **(options | {"packing": None} if q.ndim == 4 and q.shape[0] > 1 else options)) * (
            1.01 if q.ndim == 4 else 1.0
        )

    monkeypatch.setattr(integration, "attention", attention)
    failures = running.run(TINY).failures
    assert failures
    assert all("padded" in failure for failure in failures)


def test_not_a_number_is_a_failure():
    report = running.run(dataclasses.replace(TINY, steps=1))
    report.packed[0] = float("nan")
    assert report.failures


# --- its parts ---


def test_documents_are_real_and_chosen_by_the_seed():
    batches = data.batches(6, 3000, 32, 2048, 0)
    lengths = [len(d) for batch in batches for d in batch]
    assert min(lengths) < 100
    assert max(lengths) > 1000
    assert all(3000 <= sum(map(len, batch)) < 3000 + 2048 for batch in batches)
    document = batches[0][0].tolist()
    assert (document[0], document[-1]) == (data.BEGIN, data.END)
    assert bytes(document[1:-1]).decode(errors="ignore").isprintable() or b"\n" in bytes(document[1:-1])
    again = data.batches(6, 3000, 32, 2048, 0)
    assert all(torch.equal(a, b) for x, y in zip(batches, again, strict=True) for a, b in zip(x, y, strict=True))
    other = data.batches(1, 3000, 32, 2048, 1)
    assert not torch.equal(other[0][0], batches[0][0])


def test_the_three_ways_have_one_loss_and_one_gradient():
    documents = data.batches(1, 400, 32, 200, 0)[0]
    eager = model.build(TINY.sizes, 200, "eager", 0)
    ours = model.build(TINY.sizes, 200, "anyattn", 0)
    runs = [
        (eager, model.one_at_a_time(eager, documents)),
        (model.exact_twin(eager, torch.float64), None),
        (ours, None),
    ]
    want = {name: p.grad.clone() for name, p in eager.named_parameters()}
    loss = runs[0][1]
    twin = runs[1][0]
    twin.zero_grad()
    exact = model.one_at_a_time(twin, documents)
    assert exact == pytest.approx(loss, abs=1e-6)
    assert exact != loss
    for way in (lambda m, d: model.packed(m, d, 16), model.padded, model.one_at_a_time):
        ours.zero_grad()
        assert way(ours, documents) == pytest.approx(loss, abs=1e-6)
        for name, p in ours.named_parameters():
            torch.testing.assert_close(p.grad, want[name], atol=1e-6, rtol=1e-4)


def test_the_exact_twin_is_exact():
    """No float32 is left in it: twice the precision, a billionth of the difference between ways of rounding."""
    documents = data.batches(1, 400, 32, 200, 0)[0]
    twin = model.exact_twin(model.build(TINY.sizes, 200, "eager", 0), torch.float64)
    other = model.exact_twin(model.build(TINY.sizes, 200, "anyattn", 0), torch.float64)
    other.set_attn_implementation("anyattn")
    with anyattn.use("reference"):
        a, b = model.one_at_a_time(twin, documents), model.packed(other, documents, 16)
    assert abs(a - b) < 1e-14


# --- arguments ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--dtype", "float16"], "unknown dtype 'float16'; allowed: float32, bfloat16"),
        (["--device", "tpu9"], "device 'tpu9' cannot be used here"),
    ],
)
def test_arguments_that_make_no_sense(capsys, tmp_path, arguments, said):
    assert main(["demo", "--output", str(tmp_path), *arguments]) == 2
    assert f"anyattn: {said}" in capsys.readouterr().err


def test_a_missing_extra_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(_demo, "module_exists", lambda name: name != "matplotlib")
    assert main(["demo", "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "anyattn: anyattn demo needs what is not installed here, matplotlib: "
        "pip install 'anyattn[cli,plot,transformers]'\n"
    )


def test_bfloat16_agrees_too():
    assert not running.run(dataclasses.replace(TINY, dtype="bfloat16")).failures
