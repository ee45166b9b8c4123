"""The benchmarks' arithmetic, their raw calls on doubles, and the tool that sums up test reports. Nothing is timed."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from doubles import pretend

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _modules(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("benchmarks", "tools"):
        monkeypatch.syspath_prepend(str(ROOT / folder))


def load(name: str) -> Any:
    return importlib.import_module(name)


# --- rows and reports ---


@pytest.mark.parametrize(
    ("ours", "theirs", "wanted", "met"),
    [
        (90.0, 184.0, "<= 0.5", True),
        (93.0, 184.0, "<= 0.5", False),
        (99.0, 100.0, ">= 0.99", True),
        (98.9, 100.0, ">= 0.99", False),
        (70.0, 40.0, "<= +30 us", True),
        (70.1, 40.0, "<= +30 us", False),
        (0.0, 0.0, "<= +0 us", True),
        (1.0, 0.0, "<= +0 us", False),
        (70.0, 40.0, "", None),
    ],
)
def test_a_target_is_met_or_not(ours: float, theirs: float, wanted: str, met: bool | None) -> None:
    assert load("measure").Row("a call", ours, theirs, "us", "another", wanted).met is met


@pytest.mark.parametrize("wanted", ["<=", "0.5", "< 0.5", "<= +30", "<= +30 ms", "<= 0.5 us"])
def test_a_target_that_says_nothing_is_an_error(wanted: str) -> None:
    with pytest.raises(ValueError, match="a target is"):
        load("measure").Row("a call", 1.0, 2.0, "us", "another", wanted)


def test_a_ratio_to_nothing_is_no_target() -> None:
    assert load("measure").Row("a call", 1.0, 0.0, "us", "another").ratio is None
    with pytest.raises(ValueError, match="no ratio"):
        load("measure").Row("a call", 1.0, 0.0, "us", "another", "<= 0.5")


def test_what_raises_is_kept_and_takes_nothing_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure, raw = load("measure"), load("raw")

    def broken() -> list[Any]:
        raise RuntimeError("a kernel died")

    def refused() -> list[Any]:
        batch = raw.Batch(raw.Shape((8,), heads=(2, 2), dim=16), packed=False, device="cpu")
        return [batch.attention("varlen")]

    report = measure.Report("gpu", tmp_path)
    report.attempt("one", broken)
    report.attempt("two", refused)
    report.attempt("three", lambda: [measure.Row("three", 1.0, 2.0, "us", "another", "<= 0.5")])
    report.show()
    kept = json.loads(report.path.read_text())
    assert [row["met"] for row in kept["rows"]] == [True]
    assert [(item["what"], item["because"]) for item in kept["left_out"]] == [("one", "error"), ("two", "refused")]
    assert "RuntimeError: a kernel died" in kept["left_out"][0]["why"]
    assert "varlen" not in kept["left_out"][1]["why"]
    assert kept["left_out"][1]["why"]
    assert "left out (error): one" in capsys.readouterr().out


def test_chosen_kernels() -> None:
    gpu = load("gpu")
    assert gpu.chosen([]) == list(load("raw").KERNELS)
    assert gpu.chosen(["torch", "fa4"]) == ["fa4", "torch:flash", "torch:cudnn", "torch:efficient"]
    assert gpu.chosen(["torch:flash"]) == ["torch:flash"]
    assert gpu.chosen(["fa"]) == []


# --- raw calls ---


@pytest.mark.parametrize(
    ("name", "packed", "versions"),
    [
        ("fa4", False, {"fa4": "4.0.0b36"}),
        ("fa4", True, {"fa4": "4.0.0b36"}),
        ("fa3", False, {"fa3": "3.0.0"}),
        ("fa3", True, {"fa3": "3.0.0"}),
        ("fa3", True, {"fa3": "2025-06-07"}),
        ("fa3", True, {"fa3": "0.0.3"}),
        ("fa2", False, {"fa2": "2.8.3"}),
        ("fa2", True, {"fa2": "2.3.0"}),
        ("fa2", True, {"fa2": "2.8.3"}),
        ("varlen", True, {}),
        ("torch:flash", False, {}),
        ("torch:efficient", False, {}),
    ],
)
def test_raw_calls_compute_what_anyattn_does(name: str, packed: bool, versions: dict[str, str]) -> None:
    raw = load("raw")
    kernel, forms = raw.KERNELS[name]
    assert packed in forms
    heads = (4, 2) if kernel.grouped else (4, 4)
    with pretend("sm90", **versions):
        batch = raw.Batch(raw.Shape((48, 48), heads, 64), packed, device="cpu")
        entry = kernel(batch)
        result = entry.forward()
        with torch.no_grad():
            torch.testing.assert_close(entry.to_caller(result[0]), batch.attention(name))
        if versions.get("fa3") == "0.0.3":
            assert "backward" in batch.refused(name)
            return
        assert not batch.refused(name)
        leaves = (batch.q, batch.k, batch.v)
        ours = torch.autograd.grad(batch.attention(name), leaves, batch.dout)
        bare = torch.autograd.grad(raw.Bare.apply(entry, *leaves), leaves, batch.dout)
        for mine, other, third in zip(ours, entry.backward(result, batch.dout)[:3], bare, strict=True):
            for theirs in (entry.to_caller(other), third):
                torch.testing.assert_close(mine, theirs, atol=3e-2, rtol=3e-2)  # dq is summed in any order


def test_raw_cudnn_of_torch_computes_what_anyattn_does() -> None:
    raw = load("raw")
    with pretend("sm90"):
        batch = raw.Batch(raw.Shape((48, 48), (4, 2), 64), packed=False, grad=False, device="cpu")
        entry = raw.AtenCudnn(batch)
        torch.testing.assert_close(entry.to_caller(entry.forward()[0]), batch.attention("torch:cudnn"))


def test_raw_cudnn_executes_anyattns_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it reaches into is there."""
    raw, graphs = load("raw"), load("anyattn.backends._cudnn_graph")
    ran: list[Any] = []
    streams: list[Any] = []
    built = SimpleNamespace(get_workspace_size=lambda: 64, execute=lambda *x, handle: ran.append((*x, handle)))
    monkeypatch.setattr(graphs, "cudnn", SimpleNamespace(set_stream=lambda **x: streams.append(x)))
    monkeypatch.setattr(graphs, "current_stream", lambda device: 7)
    entry = object.__new__(raw.CudnnFrontend)
    entry._names, entry._handle, entry.q = graphs, "handle", torch.empty(0)
    q, out, stats = torch.ones(2), torch.ones(3), torch.ones(4)
    entry._forward = graphs.Graph(built), {graphs.Q: q, graphs.OUT: out, graphs.STATS: stats}
    first, second = entry.forward(), entry.forward()
    assert streams == [{"handle": "handle", "stream": 7}] * 2
    assert [(given[graphs.Q] is q, len(space), handle) for given, space, handle in ran] == [(True, 64, "handle")] * 2
    assert [x.shape for x in first] == [out.shape, stats.shape]
    assert len({x.data_ptr() for x in (*first, *second, out, stats)}) == 6


# --- reports of tests ---

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_padding" name="test_a[cuda-fa4-thd]"/>
<testcase classname="tests.test_padding" name="test_a[plain-cuda-torch:flash]">
<skipped message="torch:flash does not take thd_gaps"/></testcase>
<testcase classname="tests.test_padding" name="test_b[sm90-fa3@2025-09-12-thd]">
<failure message="no&#10;more"/></testcase>
<testcase classname="test_choice" name="test_c"><skipped message="it has one"/></testcase>
</testsuite></testsuites>"""


def test_a_report_of_tests_is_summed_up(tmp_path: Path) -> None:
    tool = load("summarise_tests")
    (tmp_path / "a.xml").write_text(REPORT)
    (tmp_path / "m.json").write_text(json.dumps({"machine": {"gpu": "an older one"}}))
    result = tool.collect([f"{tmp_path}/a.xml", f"b12={tmp_path}/a.xml,{tmp_path}/m.json"], {"gpu": "this one"})
    assert result["machine"] == {"gpu": "this one"}
    assert result["runs"]["b12"].pop("machine") == {"gpu": "an older one"}
    run = result["runs"]["a"]
    assert run == result["runs"]["b12"]
    assert run["outcomes"] == {"failed": 1, "passed": 1, "refused": 1, "skipped": 1}
    assert run["failures"] == [{"test": "test_padding::test_b[sm90-fa3@2025-09-12-thd]", "message": "no"}]
    kernels = run["kernels"]
    assert set(kernels) == {"fa4", "torch:flash", "fa3@2025-09-12, double on sm90", "no kernel in particular"}
    assert kernels["fa4"] == {"outcomes": {"passed": 1}, "tests": {"test_padding::test_a": {"passed": 1}}}
    assert kernels["torch:flash"]["refused because"] == {"does not take thd_gaps": 1}
    assert kernels["no kernel in particular"]["skipped because"] == {"it has one": 1}


def test_two_reports_of_one_label_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text(REPORT)
    with pytest.raises(ValueError, match="two reports"):
        load("summarise_tests").collect([f"x={tmp_path}/a.xml"] * 2, {})
