"""flash-attn-4 over its double, of every version that is claimed: right where it is taken, and refused by name."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

import anyattn
import cases
from anyattn import _api, _select, _traced
from anyattn._call import Call
from anyattn._request import Tensors
from anyattn.backends import _fa4_kept as kept_kernels
from anyattn.backends import fa4
from cases import Case
from doubles import pretend
from doubles.fa4 import versions
from places import Places, taken
from test_conformance import check, run
from versions import assert_named, double, run_what_is_taken, solve

NEWEST = fa4.NEWEST
CLAIMED = [v for v in versions() if Version(v) >= Version("4.0.0b5")]

_FA4 = Case(double("fa4", NEWEST), dtype="bfloat16", heads="4/2", dims="32")
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
    for case in _EVERYWHERE:
        solve(replace(case, target=double("fa4", version)))


@pytest.mark.parametrize("on", ["sm90", "sm100", "sm120"])
@pytest.mark.parametrize("version", CLAIMED)
def test_fa4_is_asked_nothing_that_it_refuses(version: str, on: str) -> None:
    assert run_what_is_taken(double("fa4", version, on)) >= 5 or on == "sm120"


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
    assert_named(replace(_FA4, target=double("fa4", version, on), **changes), what)


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
        check(problem := cases.build(case), *run(problem))
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


_PLACED = (
    replace(_FA4, form="thd_gaps", mask="causal", asks="lse_grad", scores="sink"),
    replace(_FA4, form="thd_tail", heads="4", relation="any", mask="window_left"),
    replace(_FA4, form="bshd", mask="causal", dims="64", dtype="float16"),
    replace(_FA4, form="thd", dims="128/64", heads="4"),
)


@pytest.mark.parametrize(
    ("version", "heads"),
    [(CLAIMED[0], True), ("4.0.0b25", False), ("4.0.0b26", True), (NEWEST, False), (NEWEST, True)],
)
def test_fa4_writes_results_where_they_are_wanted(version: str, heads: bool) -> None:
    """From the version on that looks at the layout of what is given."""
    placing, target = Version(version) >= Version("4.0.0b26"), double("fa4", version)
    with target.machine():
        for case in _PLACED:
            got = taken(replace(case, target=target), fa4, heads=heads)
            assert got == (["out", "dq", "dk", "dv"] if placing else [])


def test_fa4_writes_nothing_to_memory_that_is_not_aligned() -> None:
    with double("fa4", NEWEST).machine():
        assert taken(_PLACED[0], fa4, heads=True, shift=1) == []


# --- kernels that are called again without the raw function -------------------------------------------------------

_AGAIN = (
    *_EVERYWHERE,
    replace(_FA4, scores="sink_low", mask="causal"),
    replace(_FA4, scores="softcap", form="thd_gaps"),
    replace(_FA4, form="bhsd", dims="32/64", heads="4"),
)


def _raw_forwards(machine: Any) -> int:
    return sum(name == "_flash_attn_fwd" for name, _ in machine.fa4.calls)


@pytest.mark.parametrize(("version", "keeps"), [("4.0.0b25", False), ("4.0.0b26", True), (NEWEST, True)])
def test_the_raw_function_is_called_once_for_a_kind(version: str, keeps: bool) -> None:
    """Later calls have other values: each is judged by itself."""
    for case in _AGAIN:
        with pretend("sm90", fa4=version) as machine:
            for seed in range(3):
                check(problem := cases.build(case, seed), *run(problem))
        assert _raw_forwards(machine) == (1 if keeps else 3), case


def _packed(lengths: list[int], rows: int | None = None) -> anyattn.Packing:
    return anyattn.Packing.from_lengths(lengths, max_rows=rows, max_seqlen=8, max_sequences=3)


def _again(machine: Any, *calls: dict[str, Any]) -> list[int]:
    """How often the raw function was called in all after each of these calls, every one of which is right."""
    counts = []
    for call in calls:
        q, k, v = call.pop("qkv", None) or torch.randn(3, 16, 2, 32, dtype=torch.bfloat16).unbind()
        got = anyattn.attention(q, k, v, backend="fa4", **call)
        exact = anyattn.attention(q.float(), k.float(), v.float(), backend="reference", **call)
        torch.testing.assert_close(got.float(), exact, atol=2e-2, rtol=0)
        counts.append(_raw_forwards(machine))
    return counts


def test_kept_kernels_get_the_offsets_of_each_call() -> None:
    one, two, three = _packed([5, 3, 8]), _packed([8, 8]), _packed([1, 2, 3], 16)
    with pretend("sm90", fa4=NEWEST) as machine:
        own = [{"packing": p, "causal": True} for p in (one, two, three, one)]
        assert _again(machine, *own) == [1] * 4
        cross = [{"packing": p, "packing_kv": q} for p, q in ((two, one), (one, three), (one, two))]
        assert _again(machine, *cross) == [2] * 3


def test_another_kind_is_not_taken_for_a_kept_one() -> None:
    wide = [torch.randn(3, 16, 2, 32, dtype=torch.bfloat16).unbind() for _ in range(2)]
    apart = [[x[..., :32] for x in torch.randn(3, 16, 2, 64, dtype=torch.bfloat16).unbind()] for _ in range(2)]
    packing = _packed([8, 8])
    with pretend("sm90", fa4=NEWEST) as machine:
        given = [{"qkv": x, "packing": packing} for x in (wide[0], wide[1], apart[0], apart[1], wide[0], apart[0])]
        assert _again(machine, *given) == [1, 1, 2, 2, 2, 2]


def _call(**changes: Any) -> Call:
    q, k, v = torch.randn(3, 16, 2, 32, dtype=torch.bfloat16).unbind()
    rows = _packed([8, 8])._rows
    given = {
        "q": q,
        "k": k,
        "v": v,
        "spec": None,
        "kernel": "fa4",
        "rows_q": rows,
        "rows_k": rows,
        "sink": torch.ones(2),
    }
    return Call(**(given | changes))


_OTHERS: dict[str, dict[str, Any]] = {
    "rows of q": {"q": torch.randn(24, 2, 32, dtype=torch.bfloat16)},
    "heads of k and v": {n: torch.randn(16, 1, 32, dtype=torch.bfloat16) for n in "kv"},
    "head_dim_v": {"v": torch.randn(16, 2, 64, dtype=torch.bfloat16)},
    "strides of q": {"q": torch.randn(16, 2, 64, dtype=torch.bfloat16)[..., :32]},
    "strides of k": {"k": torch.randn(16, 4, 32, dtype=torch.bfloat16)[:, ::2]},
    "strides of v": {"v": torch.randn(32, 2, 32, dtype=torch.bfloat16)[::2]},
    "dtype": {n: torch.randn(16, 2, 32, dtype=torch.float16) for n in "qkv"},
    "no sink": {"sink": None},
    "dtype of the sink": {"sink": torch.ones(2, dtype=torch.bfloat16)},
    "dense": {"rows_q": None, "rows_k": None},
    "sequences": {"rows_q": anyattn.Packing.from_lengths([8, 8], max_seqlen=8)._rows},
    "max_seqlen": {"rows_q": anyattn.Packing.from_lengths([8, 8], max_sequences=3, max_seqlen=16, max_rows=16)._rows},
    "max_seqlen of keys": {
        "rows_k": anyattn.Packing.from_lengths([8, 8], max_sequences=3, max_seqlen=16, max_rows=16)._rows
    },
    "gaps": {"rows_q": replace(_packed([8, 8])._rows, gaps=not _packed([8, 8])._rows.gaps)},
    "gaps of keys": {"rows_k": replace(_packed([8, 8])._rows, gaps=not _packed([8, 8])._rows.gaps)},
}


@pytest.mark.parametrize("other", _OTHERS)
def test_all_that_the_raw_function_looks_at_makes_a_kind(other: str) -> None:
    one = kept_kernels.kind_of(_call(), None)
    assert one is not None
    assert one == kept_kernels.kind_of(_call(), None)
    assert kept_kernels.kind_of(_call(**_OTHERS[other]), None) not in (None, one)


def test_places_make_kinds() -> None:
    compact, apart = torch.zeros(16, 2, 32), torch.zeros(16, 4, 32)[:, ::2]
    kinds = [kept_kernels.kind_of(_call(), place) for place in (None, compact, apart, torch.zeros(16, 2, 32))]
    assert kinds[1] == kinds[3]
    assert len(set(kinds)) == 3


def test_what_would_be_copied_first_has_no_kind() -> None:
    off = torch.randn(16 * 2 * 32 + 1, dtype=torch.bfloat16)[1:].view(16, 2, 32)
    odd = torch.ones(3, dtype=torch.bfloat16)[1:]
    call = _call()
    for changes in ({"q": off}, {"k": off}, {"v": off}, {"sink": torch.ones(2, 2)[:, 0]}, {"sink": odd},
                    {"q": call.k, "k": call.k}, {"v": call.k, "k": call.k}, {"v": call.q, "q": call.q}):  # fmt: skip
        assert kept_kernels.kind_of(_call(**changes), None) is None
    assert kept_kernels.kind_of(call, off) is None


def test_only_one_kernel_over_our_tensors_is_kept() -> None:
    """Not several, none that gets another tensor or a list, none that does not get all of ours."""
    names = ("q", "k", "v", "out", "lse")
    ours = {name: torch.randn(4, 2, 8) for name in names}
    right = (*(x.detach() for x in ours.values()), 0.5, None, (None, 3), True)

    def kept(*noted: tuple[Any, ...], **changes: Any) -> Any:
        return kept_kernels._kept(None, (), [(print, arguments) for arguments in noted], ours | changes)

    found = kept(right)
    assert found is not None
    assert found.constants == (0.5, None, (None, 3), True)
    assert kept() is None
    assert kept(right, right) is None
    assert kept((*right, torch.randn(4, 2, 8))) is None
    assert kept((*right, [None])) is None
    assert kept((*right, (ours["q"],))) is None
    assert kept(right[1:]) is None
    assert kept((ours["q"].clone(), *right[1:])) is None
    assert kept(right, k=ours["q"]) is None


def test_a_warm_up_with_one_tensor_leaves_others_to_be_kept() -> None:
    packing, (q, k, v) = _packed([8, 8]), torch.randn(3, 16, 2, 32, dtype=torch.bfloat16).unbind()
    with pretend("sm90", fa4=NEWEST) as machine, torch.no_grad():
        anyattn.warm_up(q, q, q, packing=packing, backend="fa4")
        before = _raw_forwards(machine)
        for _ in range(3):
            anyattn.attention(q, k, v, packing=packing, backend="fa4")
        assert _raw_forwards(machine) == before + 1


def test_sinks_of_any_layout() -> None:
    """A column of a table of sinks, and one that begins at an odd place: a kept kernel would not take them."""
    table = torch.randn(2, 5)
    bytes_apart = torch.randn(3, dtype=torch.bfloat16)
    with pretend("sm90", fa4=NEWEST) as machine:
        good = {"packing": _packed([8, 8]), "sink": table[:, 1].contiguous()}
        assert _again(machine, dict(good), dict(good)) == [1, 1]
        assert _again(machine, good | {"sink": table[:, 1]}, good | {"sink": table[:, 2]}) == [2, 3]
        assert _again(machine, dict(good)) == [3]
        odd = good | {"sink": bytes_apart[1:]}
        assert _again(machine, dict(odd), dict(odd)) == [4, 5]


def test_places_are_written_by_kept_kernels_too() -> None:
    case = replace(_PLACED[0], target=double("fa4", NEWEST))
    with case.target.machine():
        for _ in range(3):
            assert taken(case, fa4, heads=True) == ["out", "dq", "dk", "dv"]


@pytest.mark.parametrize("batch", ["alike", "off", "many"])
def test_what_is_not_one_kernel_over_the_given_tensors_is_not_kept(batch: str) -> None:
    """q, k and v that cannot be told apart; tensors that are copied first; so many sequences that a table is made."""

    def qkv() -> Any:
        x = torch.randn(3, 16, 2, 32, dtype=torch.bfloat16)
        if batch == "off":
            return torch.randn(3 * 16 * 2 * 32 + 1, dtype=torch.bfloat16)[1:].view(x.shape).unbind()
        return (x[0],) * 3 if batch == "alike" else x.unbind()

    many = {"packing": anyattn.Packing.from_lengths([1] * 10 + [0] * 290 + [6])} if batch == "many" else {}
    with pretend("sm90", fa4=NEWEST) as machine:
        calls = [{"qkv": qkv(), "packing": _packed([8, 8])} | many for _ in range(3)]
        assert _again(machine, *calls) == [1, 2, 3]


def test_kernels_of_releases_that_nobody_read_are_not_kept() -> None:
    assert kept_kernels.were_read(NEWEST)
    assert not any(map(kept_kernels.were_read, ("4.0.0b25", "4.0.0b37", "4.0.0b36.dev1", "4.0.0", None)))


def test_a_kept_kernel_that_refuses_a_call_is_not_asked_again() -> None:
    packing = {"packing": _packed([8, 8])}
    with pretend("sm90", fa4=NEWEST) as machine:
        assert _again(machine, dict(packing), dict(packing)) == [1, 1]
        prepared = next(p for p in _api._prepared.values() if p.backend is fa4)
        kept = prepared.spec.memo["last kept"]

        def refusing(*_: Any) -> None:
            raise TypeError("expects another stride")

        prepared.spec.memo["last kept"] = kept._replace(kernel=refusing)
        assert _again(machine, dict(packing), dict(packing)) == [2, 3]


def test_what_another_thread_calls_is_not_noted() -> None:
    """Two threads at once: each gets its own results, and nothing of one is kept for the other."""
    torch.manual_seed(0)
    inputs = [torch.randn(3, 16, 2, 32, dtype=torch.bfloat16).unbind() for _ in range(8)]
    packings = [_packed([8, 8]), _packed([5, 3, 8])]
    with pretend("sm90", fa4=NEWEST) as machine:
        cache, started = machine.fa4._flash_attn_fwd.compile_cache, threading.Barrier(8)

        def one(number: int) -> Tensor:
            started.wait()
            out: Tensor = anyattn.attention(
                *inputs[number], packing=packings[number % 2], causal=number % 4 < 2, backend="fa4"
            )
            return out

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(one, range(8)))
        assert machine.fa4._flash_attn_fwd.compile_cache is cache
    for number, out in enumerate(found):
        q, k, v = (x.float() for x in inputs[number])
        exact = anyattn.attention(q, k, v, packing=packings[number % 2], causal=number % 4 < 2, backend="reference")
        torch.testing.assert_close(out.float(), exact, atol=2e-2, rtol=0)


@pytest.mark.parametrize("version", ["4.0.0b12", "4.0.0b18", "4.0.0b19", "4.0.0b25", NEWEST])
def test_first_kernels_of_head_dim_256_on_sm100_get_tensors_without_holes(version: str) -> None:
    """They would read, and write, the memory between."""
    common = torch.randn(60, 3, 4, 256, dtype=torch.bfloat16)
    q, k, v = common.unbind(1)
    packing = anyattn.Packing.from_lengths([17, 43])
    places = Places(heads=True)
    with pretend("sm100", fa4=version), places.given_to(fa4):
        out = anyattn.attention(q, k, v, packing=packing, causal=True, backend="fa4")
    exact = anyattn.attention(q.float(), k.float(), v.float(), packing=packing, causal=True, backend="reference")
    torch.testing.assert_close(out.float(), exact, atol=2e-2, rtol=0)
    assert places.taken == (["out"] if Version(version) >= Version("4.0.0b26") else [])


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
    monkeypatch.setattr(fa4, "_takes_places", False)
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
    assert not fa4._takes_places


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
