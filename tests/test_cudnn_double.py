"""cuDNN's adapter over a double of nvidia-cudnn-frontend: graphs, their keys, offsets, rounding up, refusals."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import anyattn
import cases
from anyattn import Packing, _select
from anyattn.backends import _cudnn_calls as calls
from anyattn.backends import _cudnn_graph as graphs
from anyattn.backends import cudnn
from cases import Case, Target
from doubles import cudnn as double
from doubles.frontend import machine
from places import taken
from test_conformance import check, run
from versions import VALUES

TARGET = Target("cpu", "cudnn", cudnn.CAPABILITIES[0])
PLAIN = Case(TARGET, dtype="bfloat16", heads="4/2", dims="32")


@pytest.fixture
def frontend() -> Iterator[double.Interface]:
    """An H200 with what was measured there."""
    with machine() as interface:
        yield interface


# --- the oracle's answer -------------------------------------------------------------------------------------------


def _taken(case: Case) -> bool:
    try:
        return cases.build(case, device="meta").explain().chosen == "cudnn"
    except anyattn.InvalidArgument:
        return False


def _drawn(count: int) -> list[Case]:
    """Random cases that are taken, and every value that is taken at all among them."""
    rng = random.Random(0)
    found: dict[Case, None] = {}
    with machine():
        for parameter, value in [(p, v) for p, values in VALUES.items() for v in values]:
            near = (replace(PLAIN, **{parameter: value, "asks": asks}) for asks in ("grad", "forward"))
            found.update(dict.fromkeys(list(filter(_taken, near))[:1]))
        while len(found) < count:
            case = replace(PLAIN, **{p: rng.choice(v) for p, v in VALUES.items()})
            if case not in found and _taken(case):
                found[case] = None
    return list(found)


@pytest.mark.parametrize("drawn", _drawn(90), ids=lambda c: c.id)
def test_same_answer(drawn: Case, frontend: double.Interface) -> None:
    problem = cases.build(drawn)
    check(problem, *run(problem))


@pytest.mark.parametrize("form", ["thd_gaps", "thd_tail", "thd_offset", "bshd_left"])
def test_nan_in_padding_reaches_no_other_row(form: str, frontend: double.Interface) -> None:
    """Without sanitize: the declaration says that the core need not clean."""
    problem = cases.build(replace(PLAIN, form=form, mask="causal"))
    for x, real in ((problem.q, problem.real_q), (problem.k, problem.real_k), (problem.v, problem.real_k)):
        x.detach()[~real.reshape(x.shape[:-2])] = float("nan")
    assert problem.dout is not None
    problem.dout[~problem.real_q] = float("nan")
    check(problem, *run(problem))


def test_queries_cut_from_a_common_projection(frontend: double.Interface) -> None:
    """cuDNN's backward mistakes the row stride of packed queries for that of their gradient."""
    packing = Packing.from_lengths([100, 0, 57, 3])
    common = torch.randn(packing.rows, 3, 4, 32, dtype=torch.bfloat16, requires_grad=True)
    fresh = [x.detach().contiguous().requires_grad_() for x in common.unbind(1)]
    arguments: dict[str, Any] = {"packing": packing, "causal": True, "backend": "cudnn", "deterministic": True}
    for changes in ({}, {"deterministic": False}):
        outs = [anyattn.attention(*given, **{**arguments, **changes}) for given in (common.unbind(1), fresh)]
        assert torch.equal(*outs)
        dout = torch.randn_like(outs[0])
        (cut,) = torch.autograd.grad(outs[0], common, dout)
        for got, want in zip(cut.unbind(1), torch.autograd.grad(outs[1], fresh, dout), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"form": "thd_gaps", "mask": "causal"},
        {"form": "thd_tail", "relation": "any", "heads": "4", "dims": "64/32"},
        {"form": "thd", "mask": "causal", "scores": "sink", "dims": "64"},
        {"form": "bshd", "mask": "causal", "heads": "4", "scores": "bias"},
    ],
)
def test_results_are_written_where_they_are_wanted(
    changes: dict[str, str], heads: bool, frontend: double.Interface
) -> None:
    """To places as the graph declares results, without holes; and no other graph is built.

    But where a place of a dense out has holes: its gradient is expected to have them too, and here has none.
    """
    want = [] if heads else ["out", "dq", "dk", "dv"]
    case = replace(PLAIN, **changes)
    assert taken(case, cudnn, heads=heads) == want
    more = [True] if heads and not case.form.startswith("thd") else []
    assert [g.backward for g in frontend.built] == [False, True, *more]


def test_memory_that_is_not_aligned_is_no_place(frontend: double.Interface) -> None:
    assert taken(replace(PLAIN, form="thd", mask="causal"), cudnn, heads=False, shift=1) == []


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_repeats_its_mask_in_backward(packed: bool, frontend: double.Interface) -> None:
    """out is linear in v: <dout, out> is <dv, v> only if backward drops what forward dropped."""
    shape = (150, 4, 32) if packed else (2, 75, 4, 32)
    q, k, v = (torch.randn(shape, dtype=torch.float16, requires_grad=True) for _ in range(3))
    packing = Packing.from_lengths([100, 50]) if packed else None
    out = anyattn.attention(q, k, v, packing=packing, causal=True, dropout=0.4, backend="cudnn")
    dout = torch.randn_like(out)
    dq, dk, dv = (x.double() for x in torch.autograd.grad(out, (q, k, v), dout))
    torch.testing.assert_close((dout.double() * out).sum(), (dv * v).sum(), rtol=1e-2, atol=0.3)
    torch.testing.assert_close((dq * q).sum(), (dk * k).sum(), rtol=1e-2, atol=0.3)  # scores are linear in both
    again = anyattn.attention(q, k, v, packing=packing, causal=True, dropout=0.4, backend="cudnn")
    assert not torch.equal(out, again)


# --- which graphs are built ----------------------------------------------------------------------------------------


def test_a_kind_of_call_builds_two_graphs_once(frontend: double.Interface) -> None:
    for _ in range(3):
        q, k, v = (torch.randn(2, 40, 4, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        anyattn.attention(q, k, v, causal=True, backend="cudnn").sum().backward()
    # The gradient of a sum is one number in all places: a fresh tensor, as forward expected.
    assert [g.backward for g in frontend.built] == [False, True]
    assert frontend.runs == 6
    assert len(frontend.handles) == 1


def test_packed_batches_of_about_the_same_size_share_their_graphs(frontend: double.Interface) -> None:
    rng = random.Random(1)
    for _ in range(6):
        lengths = [rng.randint(0, 200) for _ in range(rng.randint(5, 8))] + [250]
        lengths += [0] * (12 - len(lengths))
        lengths[0] = 1700 - sum(lengths[1:])  # the longest, between 448 and 512 apart
        lengths[0] = max(450, min(lengths[0], 512))
        packing = Packing.from_lengths([*lengths, rng.randint(1, 1700 - sum(lengths)) % 200 + 1])
        assert 1024 < packing.rows <= 1792
        q, k, v = (torch.randn(packing.rows, 4, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        anyattn.attention(q, k, v, packing=packing, backend="cudnn").sum().backward()
    assert sum(not g.backward for g in frontend.built) == 1
    assert sum(g.backward for g in frontend.built) <= 3  # by rows: 1280, 1536, 1792


def test_a_model_that_generates_builds_no_graph_for_each_token(frontend: double.Interface) -> None:
    cache = torch.randn(2, 2, 300, 4, 32, dtype=torch.bfloat16)
    for seq in range(140, 180):
        k, v = cache[:, :, :seq]
        q = torch.randn(2, 1, 8, 32, dtype=torch.bfloat16)
        out, lse = anyattn.attention(q, k, v, causal=True, backend="cudnn", return_lse=True)
        expected, expected_lse = anyattn.attention(q, k, v, causal=True, backend="reference", return_lse=True)
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4)
        assert torch.equal(anyattn.attention(q, k, v, causal=True, backend="cudnn"), out)
    assert len(frontend.built) == 4  # up to 160 keys, and up to 192; with lse, and without


def test_sizes_of_graphs_are_few_and_close() -> None:
    rooms = {calls.room(n) for n in range(1, 1 << 16)}
    assert all(n <= calls.room(n) <= max(128, n * 5 // 4 + 1) for n in range(1, 1 << 16))
    assert len(rooms) < 40
    assert [calls.sequences(n) for n in (1, 2, 3, 9, 16)] == [1, 2, 4, 16, 16]


@pytest.mark.parametrize(
    "made",
    [
        lambda x: x,
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.nn.functional.pad(x, (0, 4))[..., :-4],  # rows that begin anywhere
        lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),  # memory that begins anywhere
        lambda x: x[:, :1].expand(x.shape),
    ],
    ids=["plain", "bhsd", "rows", "pointer", "expanded"],
)
def test_any_strides(made: Any, frontend: double.Interface) -> None:
    q, k, v, dout = (made(torch.randn(2, 30, 4, 32, dtype=torch.bfloat16)) for _ in range(4))
    results = {}
    for name, inputs in (("given", (q, k, v)), ("fresh", tuple(x.contiguous() for x in (q, k, v)))):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = anyattn.attention(*leaves, window=(5, 3), backend="cudnn", deterministic=True)
        results[name] = (out, *torch.autograd.grad(out, leaves, dout))
    for got, want in zip(results["given"], results["fresh"], strict=True):
        assert torch.equal(got, want)


def test_threads_share_graphs_and_no_handle(frontend: double.Interface) -> None:
    q = torch.randn(1, 64, 4, 32, dtype=torch.bfloat16)
    want = anyattn.attention(q, q, q, backend="cudnn")
    failures: list[Any] = []

    def work() -> None:
        try:
            for _ in range(20):
                assert torch.equal(anyattn.attention(q, q, q, backend="cudnn"), want)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(frontend.built) == 1
    assert len(frontend.handles) <= 4


# --- what is refused -----------------------------------------------------------------------------------------------


def test_a_refused_backward_is_a_reason_before_anything_runs(
    frontend: double.Interface, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_support(graph: double.Graph) -> None:
        if graph.backward:
            raise double.GraphNotSupported("no engine for this\nand more lines")
        graph.steps.append("check_support")

    monkeypatch.setattr(double.Graph, "check_support", check_support)
    q = torch.randn(1, 40, 4, 32, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(anyattn.NoBackend, match="cuDNN refuses it: GraphNotSupported: no engine for this"):
        anyattn.attention(q, q, q, backend="cudnn")
    assert frontend.runs == 0
    with torch.no_grad():
        anyattn.attention(q, q, q, backend="cudnn")
    assert frontend.runs == 1


def test_a_workspace_of_all_scores_has_a_limit(frontend: double.Interface) -> None:
    """The lengths are never touched: forward refuses first."""
    q = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16).expand(1, 1 << 17, 1, 8)
    leaf = q.requires_grad_()
    arguments: dict[str, Any] = {"causal": True, "backend": "cudnn"}
    with pytest.raises(anyattn.NoBackend, match=r"workspace of 32\.0 GiB for these lengths, more than the 4 GiB"):
        anyattn.attention(leaf, leaf, leaf, deterministic=True, **arguments)
    assert frontend.runs == 0


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"form": "thd", "scores": "bias"}, "a bias or mask"),
        ({"relation": "any", "mask": "causal", "scores": "mask"}, "bias, masks and dropout"),
        ({"relation": "keys_longer", "mask": "causal_window", "scores": "bias"}, "bias, masks and dropout"),
        ({"scores": "softcap"}, "softcap"),
        ({"scores": "alibi"}, "ALiBi"),
        ({"dtype": "float32"}, "dtype"),
        ({"scores": "scale_negative"}, "a scale of zero or below"),
    ],
)
def test_what_is_not_taken_says_why(changes: dict[str, str], what: str, frontend: double.Interface) -> None:
    case = replace(PLAIN, heads="4", **changes)
    if changes.get("form") == "thd":
        case = replace(case, form="bshd_right")
    explanation = cases.build(case, device="meta").explain()
    assert not explanation.candidates
    assert what in [reason.what for reason in explanation.rejected["cudnn"]]


def test_one_token_has_no_backward(frontend: double.Interface) -> None:
    q = torch.randn(2, 1, 4, 32, dtype=torch.bfloat16, requires_grad=True)
    explanation = anyattn.explain(q, q, q, backend="cudnn")
    assert [reason.what for reason in explanation.rejected["cudnn"]] == ["one token in backward"]
    assert anyattn.explain(q.detach(), q.detach(), q.detach(), backend="cudnn").chosen == "cudnn"


@pytest.mark.parametrize(
    ("on", "changes", "what"),
    [
        ("sm100", {"dims": "160"}, "head_dim in backward"),
        ("sm100", {"dims": "192/128"}, None),
        ("sm100", {"dims": "256"}, None),
        ("sm100", {"dims": "160", "asks": "forward"}, None),
        ("sm100", {"dims": "128", "asks": "lse_grad"}, "head_dim in backward"),  # of 136 then
        ("sm100", {"heads": "4", "scores": "bias", "asks": "deterministic"}, "a deterministic backward on sm10x"),
        ("sm120", {"dims": "192/128"}, "head_dim in backward"),
        ("sm120", {"form": "thd"}, "packed batches"),
        ("sm120", {}, None),
    ],
)
def test_other_gpus_take_less(on: str, changes: dict[str, str], what: str | None) -> None:
    problem = cases.build(replace(PLAIN, **changes), device="meta")
    explanation = problem.explain(on=on, assume={"cudnn": cudnn.NEWEST})
    assert [reason.what for reason in explanation.rejected.get("cudnn", ())] == ([what] if what else [])


# --- versions ------------------------------------------------------------------------------------------------------


def _installed(**versions: str) -> Any:
    names = {
        "frontend": "nvidia-cudnn-frontend",
        "library": f"nvidia-cudnn-cu{(torch.version.cuda or '').split('.')[0]}",
    }
    found = {names[key]: version for key, version in versions.items()}
    return mock.patch.object(cudnn, "distribution_version", found.get)


def test_probe_reads_metadata_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(graphs, "load", lambda: pytest.fail("imported"))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: pytest.fail("that initialises CUDA"))
    with _installed():
        assert cudnn.probe().version is None
    with _installed(frontend="1.32.0", library="9.19.0.56"):
        probe = cudnn.probe()
        assert (probe.version, probe.problem, probe.note) == ("1.32.0", "", "cuDNN 9.19.0")
        assert probe.flags == {"cudnn<9.23.0"}
    with _installed(frontend="1.32.0", library="9.8.0.87"):
        assert "cuDNN 9.8.0 is older than 9.10.2: upgrade" in cudnn.probe().problem
    with _installed(frontend="1.32.0"):
        assert cudnn.probe() == type(probe)("1.32.0")


def test_what_the_library_lacks_is_known_once_loaded() -> None:
    with machine(library=91400):
        assert cudnn.load() == {"cudnn<9.18.0", "cudnn<9.23.0", "cudnn==9.14.0"}
        _select.load("cudnn")
        case = replace(PLAIN, mask="window")
        reasons = cases.build(case).explain().rejected["cudnn"]
        assert "9.14.0" in str(reasons[0])
        check(problem := cases.build(replace(case, mask="causal_window")), *run(problem))
    with machine(library=92300):
        assert cudnn.load() == frozenset()


def test_a_library_that_is_too_old_does_not_load() -> None:
    with machine(library=90800), pytest.raises(ImportError, match=r"cuDNN 9\.8\.0 is older than 9\.10\.2"):
        cudnn.load()


def test_another_library_than_torch_has_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with machine(), mock.patch.object(torch.backends.cudnn, "version", return_value=91002):
        cudnn.load()
    assert "found cuDNN 9.19.0, and torch has 9.10.2" in caplog.text


def test_a_small_workspace_is_kept_for_the_default_stream_alone() -> None:
    """Another stream may be captured in a CUDA graph, whose replays would share it with later calls."""
    q = torch.randn(1, 8, 2, 16, dtype=torch.bfloat16)
    with machine() as frontend:
        given: list[tuple[int, int]] = []
        execute = double.ByPosition.execute

        def recorded(graph: Any, tensors: Any, workspace: Tensor, handle: Any, tensor_uids: Any = None) -> None:
            given.append((handle.stream, id(workspace)))
            held.append(workspace)
            execute(graph, tensors, workspace, handle, tensor_uids)

        held: list[Tensor] = []
        with mock.patch.object(double.ByPosition, "execute", recorded):
            for stream in (0, 0, 9, 9, 0):
                with mock.patch.object(graphs, "current_stream", return_value=stream):
                    anyattn.attention(q, q, q, backend="cudnn")
        assert [stream for stream, _ in given] == [0, 0, 9, 9, 0]
        of_default = {place for stream, place in given if stream == 0}
        assert len(of_default) == 1
        assert len({place for _, place in given} - of_default) == 2
        assert frontend.runs == frontend.runs_by_position == 5


def test_older_versions_get_tensors_by_name() -> None:
    q = torch.randn(1, 8, 2, 16, dtype=torch.bfloat16)
    with machine("1.31.0") as frontend:
        found = anyattn.attention(q, q, q, backend="cudnn")
        assert (frontend.runs, frontend.runs_by_position) == (1, 0)
    torch.testing.assert_close(found, anyattn.attention(q, q, q, backend="reference"), rtol=2e-2, atol=2e-2)
