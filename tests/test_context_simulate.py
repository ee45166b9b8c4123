"""``anyattn plan`` and ``ContextPlan.explain()``: what they say is what plans hold."""

from __future__ import annotations

import json
import re
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import anyattn
import fresh
from anyattn._call import Result
from anyattn._context import (
    _attention,
    _backward,
    _door,
    _heads,
    _rows,
    _schedule,
    _simulate,
    _tables,
)
from anyattn._context._exchange import Arrival
from anyattn._context._kernel import NOWHERE, Kernel
from anyattn._context._lengths import lengths_of
from anyattn._context._plan import ContextPlan
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


@pytest.mark.parametrize(
    ("option", "named"),
    [(("--picture", "plan.pdf"), "must end in .svg or .png"), (("--json", "no/such/plan.json"), "there is no folder")],
)
def test_a_target_that_cannot_be_is_told_before_anything_is_planned(
    option: tuple[str, str], named: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_simulate, "simulate", lambda *_: pytest.fail("it planned"))
    assert main(["plan", "--lengths", "1k", "--ranks", "2", *option]) == 2
    assert named in capsys.readouterr().err


def test_a_mistake_is_told_without_the_schedule() -> None:
    got = fresh.run(
        "import sys\n"
        "from anyattn.cli import main\n"
        "status = main(['plan', '--bad'])\n"
        "assert 'anyattn._context._simulate' in sys.modules\n"
        "assert 'anyattn._context._door' not in sys.modules, 'seconds, for the compiler that it brings'\n"
        "sys.exit(status)"
    )
    assert got.returncode == 2
    assert got.stderr.startswith("anyattn: No such option: --bad")


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command prints, in one line."""
    assert main(["plan", *arguments]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_two_dims_are_pointed_at_where_ranks_span_hosts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--lengths", "1m", "--ranks", "64")
    text = said(capsys, *asked)
    flat = simulated(tmp_path, *asked)
    scheme = simulated(tmp_path, *asked, "--hierarchical")["schemes"]["a2a+p2p"]
    capsys.readouterr()
    best = flat["schemes"][flat["chosen"]]["of_perfect"]
    assert "--hierarchical shows it: a2a+p2p" in text
    assert f"efficiency {scheme['of_perfect']:.2f} against {best:.2f} of {flat['chosen']}" in text
    for silent in (("--hierarchical",), ("--comm", "p2p"), ("--gpus-per-node", "64"), ("--gpus-per-node", "7")):
        assert "--hierarchical shows it" not in said(capsys, *asked, *silent)
    assert "--hierarchical shows it" not in said(capsys, *asked, "--heads", "12/4")


def test_another_scheme_than_the_meshs_own_goes_with_the_flattened_mesh(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--lengths", "lognormal:mean=2k,longest=16k,total=256k", "--ranks", "16")
    text = said(capsys, *asked, "--hierarchical")
    assert "all_gather, chosen" in text
    assert "comm='all_gather' on the flattened mesh" in text
    assert "flattened" not in said(capsys, *asked)


def test_the_table_says_whose_figures_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "--lengths", "8k,3x2k", "--ranks", "4")
    assert "most of any rank: received, forward" in text
    assert "slowest rank: predicted, forward" in text
    assert "per group of heads" in text
    assert "This rank receives" in text
    for term in ("imbalance", "received", "kernel calls", "extra memory", "predicted", "efficiency"):
        assert f" {term}: " in text


# --- memory: what the schedule itself allocates ---


class Ledger(TorchDispatchMode):
    """Counts the bytes of tensors that operators make, as long as they are held."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.most = 0
        self._held = {x.untyped_storage()._cdata: 0 for x in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and x.is_meta and x.untyped_storage()._cdata not in self._held:
                storage = x.untyped_storage()
                self._held[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self._dropped, storage._cdata)
        self.most = max(self.most, self.live)
        return made

    def _dropped(self, key: int) -> None:
        self.live -= self._held.pop(key, 0)


class Bare:
    """Kernels that make their results and no more, where they are told to; exchanges that make what arrives."""

    @staticmethod
    def run(kernel: Any, q: Any, k: Any, v: Any, terms: Any, place: Any = None) -> tuple[Any, Result]:
        out = q.new_empty(*q.shape[:2], v.shape[2]) if place is None else place
        return None, Result(out, q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32), None)

    @staticmethod
    def run_backward(kernel: Any, p: Any, q: Any, k: Any, v: Any, *rest: Any) -> tuple[Any, ...]:
        places = rest[-1] if len(rest) == 5 else NOWHERE
        found = zip((places.dq, places.dk, places.dv), (q, k, v), strict=True)
        return *(x.new_empty(x.shape) if place is None else place for place, x in found), None

    @staticmethod
    def exchange(group: Any, send: Any, sent: Any, received: Any, *, room: int = 0, head_start: int = 0) -> Arrival:
        return Arrival(send.new_empty(sum(received) + room, send.shape[1]), None, send)

    @staticmethod
    def columns(parts: list[torch.Tensor], index: torch.Tensor) -> torch.Tensor:
        return parts[0].new_empty(parts[0].shape[0], index.shape[0])


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """The schedule alone."""
    monkeypatch.setattr(Kernel, "run", Bare.run)
    monkeypatch.setattr(Kernel, "run_backward", Bare.run_backward)
    monkeypatch.setattr(_schedule, "_columns", Bare.columns)
    for name in ("sum_rows", "merge_rows"):
        monkeypatch.setattr(_rows, name, lambda *_, **__: None)
    for module in (_schedule, _backward, _heads):
        monkeypatch.setattr(module, "exchange", Bare.exchange)


def held(plan: ContextPlan, heads: tuple[int, int]) -> int:
    """Bytes at most in a forward and its backward, beside inputs, out and gradients, on tensors without values."""
    like: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
    q, k, v = (torch.empty(plan.rows, n, 128, **like, requires_grad=True) for n in (heads[0], heads[1], heads[1]))
    tables = _tables.build(plan._data, torch.device("cpu"), alibi=False, dense=False)
    blank = tables.blank[:0]  # an index on the CPU fits no tensor without values
    plan._tables[(q.device, 1, False, False)] = replace(tables, blank=blank)
    given: Any = SimpleNamespace(q=q, k=k, v=v, alibi_slopes=None, bias=None, mask=None, sink=None)
    asked: Any = SimpleNamespace(
        scale=None, softcap=0.0, dropout=0.0, backend="auto", deterministic=False, return_lse=False, num_splits=None
    )
    run = _door._run(plan, given, asked, (q[None], k[None], v[None]), 1)
    with Ledger(q, k, v) as ledger:
        out, _ = _attention.ContextAttention.apply(run, q, k, v, None, None)  # type: ignore[no-untyped-call]
        size = int(out.untyped_storage().nbytes())
        forward = ledger.most - size
        dout = torch.empty_like(out).detach()
        ledger.most = ledger.live
        gradients = torch.autograd.grad(out, (q, k, v), dout)
        backward = ledger.most - 2 * size - sum(x.untyped_storage().nbytes() for x in gradients)
    return int(max(forward, backward))


LONG, MIXED, WHOLE = [131072], [30000, 1500, 10000, 250, 250, 4500], [4096] * 8


@pytest.mark.parametrize(
    ("lengths", "heads", "window"),
    [
        (LONG, (32, 8), None),
        (LONG, (32, 2), None),
        (LONG, (8, 8), (1023, 0)),
        (MIXED, (32, 8), None),
        (MIXED, (64, 4), None),
        (MIXED, (32, 8), (2047, 0)),
        (WHOLE, (32, 8), None),
    ],
)
@pytest.mark.parametrize("comm", ["p2p", "all_gather", "a2a", "a2a+p2p"])
@pytest.mark.usefixtures("bare")
def test_predicted_memory_is_what_the_schedule_holds(
    lengths: list[int], heads: tuple[int, int], window: tuple[int, int] | None, comm: str
) -> None:
    ranks = (2, 2) if comm == "a2a+p2p" else 4
    plans = [
        anyattn.ContextParallel((ranks, rank), comm=comm).plan(
            anyattn.Packing.from_lengths(lengths), window=window, num_heads=heads[0], num_kv_heads=heads[1],
            head_dim=128,
        )
        for rank in range(4)
    ]  # fmt: skip
    most = max(held(plan, heads) for plan in plans)
    assert _simulate.most_memory(plans[0]).total == pytest.approx(most, rel=0.15)


def test_memory_is_in_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = simulated(tmp_path, "--lengths", "64k", "--ranks", "4")
    text = capsys.readouterr().out
    for scheme in found["schemes"].values():
        memory = scheme["extra_memory"]
        assert memory["total"] == memory["keys"] + memory["results"] + memory["exchanged"]
        assert f"{memory['total'] / 2**20:,.1f} MiB" in text
    p2p, gathered, by_heads = (found["schemes"][comm]["extra_memory"] for comm in ("p2p", "all_gather", "a2a"))
    assert p2p["keys"] < gathered["keys"]
    assert by_heads["exchanged"] > p2p["exchanged"] == 0


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


FILES: dict[str, tuple[bytes, str]] = {
    "not_text": (b"\xff\xfe1\n", "as UTF-8 text"),
    "a_header": (b"lengths\n12\n", "got 'lengths'"),
    "a_fraction": (b"12\n2.0\n", "got '2.0'"),
    "below_zero": (b"12\n-3\n", "got -3"),
    "broken_json": (b"[12, ", "as JSON it ends in"),
    "a_list_of_lists": (b"[[12]]", r"got \[12\]"),
}


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_holds_no_lengths_is_told_by_what_it_holds(file: str, tmp_path: Path) -> None:
    content, told = FILES[file]
    path = tmp_path / "lengths.txt"
    path.write_bytes(content)
    with pytest.raises(anyattn.InvalidArgument, match=f"must hold ints >= 0.*{told}"):
        lengths_of(str(path))


def test_a_mark_of_byte_order_is_no_length(tmp_path: Path) -> None:
    path = tmp_path / "lengths.txt"
    path.write_bytes(b"\xef\xbb\xbf300\n20\n")
    assert lengths_of(str(path)) == (300, 20)


def test_a_scheme_of_one_dim_does_not_go_with_hosts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--lengths", "64k", "--ranks", "16", "--hierarchical", "--comm", "p2p"]) == 2
    assert "--comm p2p" in capsys.readouterr().err
