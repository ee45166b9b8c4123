"""The context-parallel benchmark: its arithmetic, a trial of the script over gloo, errors that leave nobody waiting.

No figure is judged.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import context_pool
from context_pool import Pool, values
from doubles import pretend

ROOT = Path(__file__).parents[1]
FOLDER = str(ROOT / "benchmarks")


@pytest.fixture(autouse=True)
def _modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


def load(name: str) -> Any:
    return importlib.import_module(name)


# --- arithmetic ---


@pytest.mark.parametrize("window", [None, (0, 0), (3, 0), (7, 0), (90, 0)])
@pytest.mark.parametrize("length", [0, 1, 4, 8, 31])
def test_the_area_is_what_the_mask_shows(length: int, window: tuple[int, int] | None) -> None:
    left = length if window is None else window[0]
    seen = sum(1 for i in range(length) for j in range(length) if i - left <= j <= i)
    assert load("context_problems").area(length, window) == seen


def test_one_gpus_sequence_has_the_flops_of_a_rank() -> None:
    problems = load("context_problems")
    for window in (None, (4095, 0)):
        whole = problems.Problem("a", (131072,), window=window)
        assert whole.alone(4).area == pytest.approx(whole.area / 4, rel=4e-3)
    assert problems.Problem("a", (131072,)).alone(4).lengths == (65536,)
    packed = problems.Problem("b", (5, 3), packed=True)
    assert packed.alone(4) == packed


def test_documents_are_as_asked() -> None:
    lengths = load("context_problems").documents(65536, 2048, 16384)
    assert (sum(lengths), len(lengths), max(lengths)) == (65536, 32, 16384)
    assert lengths == load("context_problems").documents(65536, 2048, 16384)
    with pytest.raises(ValueError, match="documents of up to 100 tokens"):
        load("context_problems").documents(65536, 2048, 100)


def test_a_profile_tells_what_nothing_hides() -> None:
    profile = load("context_profile")
    kernels = [
        profile.Kernel("attend", 0.0, 40.0),
        profile.Kernel("ncclDevKernel_SendRecv", 30.0, 60.0),
        profile.Kernel("attend", 70.0, 100.0),
    ]
    lines = profile.summary(kernels, calls=2)
    assert lines[0] == "per call: 0.050 ms = computing 0.035 + only communicating 0.010 + idle 0.005"
    assert "10.0  ncclDevKernel_SendRecv -> attend" in lines[2]
    assert lines[-2].split() == ["0.0350", "1.0", "attend"]
    many = [profile.Kernel(f"k{i}", 2.0 * i, 2.0 * i + 1) for i in range(100)]
    assert len(profile.summary(many, calls=1)) == 40
    assert profile.summary([], calls=1) == ["no kernel ran on the device"]


# --- kernels that peers are served with ---


@pytest.fixture
def _own_modules() -> Iterator[None]:
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "flash_attn"}
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.usefixtures("_own_modules")
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(("name", "versions"), [("fa3", {"fa3": "3.0.0"}), ("varlen", {})])
def test_peers_get_the_same_kernel(name: str, versions: dict[str, str], packed: bool) -> None:
    raw, kernels = load("raw"), load("context_kernels")
    with pretend("sm90", **versions):
        batch = raw.Batch(raw.Shape((48, 48), (4, 2), 64), packed, device="cpu")
        entry = {"fa3": raw.Fa3, "varlen": raw.AtenFlash}[name](batch)
        out, lse, *more = entry.forward()
        kernels.serve(name)
        served = importlib.import_module("flash_attn.flash_attn_interface")
        q, k, v = (x.detach() for x in (batch.q, batch.k, batch.v))
        options: dict[str, Any] = dict(
            dropout_p=0.0, softmax_scale=64**-0.5, causal=True, window_size_left=-1, window_size_right=-1,
            softcap=0.0, alibi_slopes=None, **entry.lengths,
        )  # fmt: skip
        kind = "varlen_" if packed else ""
        forward = getattr(served, f"_flash_attn_{kind}forward")
        got = forward(q=q, k=k, v=v, return_softmax=False, **options)
        torch.testing.assert_close(got[:2], (out, lse))
        grads = tuple(torch.full_like(x, float("nan")) for x in (q, k, v))
        getattr(served, f"_flash_attn_{kind}backward")(
            dout=batch.dout, q=q, k=k, v=v, out=got[0], softmax_lse=got[1], deterministic=False, **options,
            **dict(zip(("dq", "dk", "dv"), grads, strict=True)),
        )  # fmt: skip
        for mine, theirs in zip(grads, entry.backward((out, lse, *more), batch.dout), strict=False):
            torch.testing.assert_close(mine, theirs, atol=3e-2, rtol=3e-2)  # dq is summed in any order
        with pytest.raises(NotImplementedError, match="no dropout"):
            forward(q=q, k=k, v=v, return_softmax=False, **{**options, "dropout_p": 0.1})


# --- over ranks ---


def attempts(seat: context_pool.Seat, folder: str, out: str) -> Any:
    """Three measurements, of which the second fails: on one rank alone, before an exchange of the others."""
    sys.path.insert(0, folder)
    timing, bench = load("context_timing"), load("context_bench")
    mine = timing.Seat(seat.rank, seat.size, torch.device("cpu"), tiny=True, patience=10.0)
    report = bench.RankReport("context", Path(out), ranks=seat.size)
    run = bench.Bench(mine, report, 60.0)

    def measured(fails: int) -> list[Any]:
        if seat.rank == fails:
            raise RuntimeError("a kernel died")
        times = timing.milliseconds(mine, lambda: None)
        return [bench.RankRow("a call", times.slowest, 1.0, "ms", "another", detail={"by_rank": times.by_rank})]

    run.attempt("one", lambda: measured(-1))
    run.attempt("two", lambda: measured(1))
    run.attempt("three", lambda: measured(-1))
    run.seconds = 0.0
    run.attempt("four", lambda: measured(-1))
    return len(report.rows), report.left_out


def test_an_error_of_one_rank_is_told_on_all_and_ends_nothing(tmp_path: Path) -> None:
    pool = Pool(size=2)
    try:
        found = values(pool.run(2, attempts, FOLDER, str(tmp_path)))
    finally:
        pool.close()
    assert found[0] == found[1]
    count, left_out = found[0]
    assert count == 2
    assert [(item["what"], item["because"]) for item in left_out] == [("two", "error"), ("four", "time")]
    assert left_out[0]["why"].startswith("rank 1: RuntimeError: a kernel died")


def written(script: str, backends: str, cases: str, folder: Path) -> Path:
    """The result of a trial on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               f"{FOLDER}/{script}", "--device", "cpu", "--tiny", "--backends", backends]  # fmt: skip
    done = subprocess.run(
        [*command, "--cases", cases, "--out", str(folder)], capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = folder.iterdir()
    return path


def test_the_script_runs(tmp_path: Path) -> None:
    path = written("context.py", "fa3,reference", "32k,packed,window,memory,host,torch", tmp_path)
    assert path.name.endswith("-2xcpu-context.json")
    content = json.loads(path.read_text())
    assert content["machine"]["ranks"] == 2
    assert {(item["what"], item["because"]) for item in content["left_out"]} == {
        ("fa3", "absent"), ("torch context_parallel", "absent"),
    }  # fmt: skip
    names = [row["name"] for row in content["rows"]]
    for comm in ("p2p", "all_gather", "a2a", "a2a+p2p"):
        for problem in ("32k", "packed 64k", "window 4k, 128k"):
            assert f"forward and backward, {problem}, {comm}, reference" in names
        assert f"extra memory, 128k, {comm}, reference" in names
        assert f"host time, forward, tiny sequence, {comm}, reference" in names
    row = next(row for row in content["rows"] if row["name"] == "forward, packed 64k, p2p, reference")
    assert len(row["detail"]["ms_by_rank"]) == 2
    assert row["detail"]["rows"] >= 64
    assert row["ours"] > 0
    assert row["theirs"] > 0


def test_a_larger_group_is_replayed_by_two(tmp_path: Path) -> None:
    path = written("context_replay.py", "reference", "packed:all_gather,packed:p2p,32k:a2a,memory:all_gather", tmp_path)
    content = json.loads(path.read_text())
    assert content["left_out"] == []
    assert content["machine"]["replayed"] == 4
    rows = {row["name"]: row for row in content["rows"]}
    for problem in ("packed 64k, all_gather", "packed 64k, p2p", "32k, a2a"):
        row = rows[f"forward and backward, {problem}, 4 ranks replayed, reference"]
        assert len(row["detail"]["ms_by_rank"]) == 4, "some rank was not played"
        assert min(row["ours"], row["theirs"]) > 0
    assert "extra memory, 128k, all_gather, 4 ranks replayed, reference" in rows
