"""flash-attn 2 over its double, of every published version: right where it is taken, and refused by name."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import anyattn
import cases
from anyattn.backends import fa2
from cases import Case
from doubles import fa2 as kernels
from doubles import plain, pretend
from places import Places, taken
from test_conformance import check, run
from versions import assert_named, double, run_what_is_taken, solve

INF = float("inf")
VERSIONS = kernels.versions()
NEWEST = VERSIONS[-1]

_FA2 = Case(double("fa2", NEWEST), dtype="bfloat16", heads="4/2", dims="32")
_EVERYWHERE = (
    replace(_FA2, asks="lse_grad"),
    replace(_FA2, form="thd", mask="causal_window", asks="lse_grad", dims="24"),
    replace(_FA2, form="thd", mask="window_left", heads="4", asks="forward"),
    replace(_FA2, form="bhsd", mask="causal", scores="sink", relation="keys_longer", dims="64/32"),
)
#: By the version that brought it.
_LATER = {
    "2.3.4": (
        replace(_FA2, form="thd_gaps", mask="causal", asks="lse_grad"),
        replace(_FA2, form="thd_tail", relation="any", mask="causal", scores="sink_low"),
        replace(_FA2, form="bshd_left", relation="any", mask="window", asks="forward"),
    ),
    "2.4.0": (
        replace(_FA2, mask="causal", scores="alibi", relation="keys_longer", asks="lse_grad"),
        replace(_FA2, form="thd_gaps", relation="any", mask="causal", scores="alibi_sequences", asks="lse_grad"),
        replace(_FA2, form="thd", mask="window", scores="alibi_sink"),
    ),
    "2.4.1": (replace(_FA2, form="thd", mask="causal", asks="deterministic"),),
    "2.6.0": (replace(_FA2, form="thd", scores="softcap", asks="forward"),),
    "2.6.2": (replace(_FA2, form="thd", scores="softcap_sink", mask="causal"),),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version(version: str) -> None:
    target = double("fa2", version)
    there = kernels.Interface(version)
    with target.machine():
        for case in (*_EVERYWHERE, *(c for first, more in _LATER.items() if there.at_least(first) for c in more)):
            solve(replace(case, target=target))


@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_is_asked_that_is_refused(version: str) -> None:
    """What the declaration lets through runs: no check of that version's code, and no known wrong answer, is met."""
    assert run_what_is_taken(double("fa2", version), 40) >= 1


@pytest.mark.parametrize("on", ["sm80", "sm86", "sm100", "sm120"])
@pytest.mark.parametrize("version", ["2.3.6", "2.5.4", "2.5.9.post1", "2.7.2.post1", "2.7.4.post1", NEWEST])
def test_nothing_is_asked_that_is_refused_on_other_gpus(version: str, on: str) -> None:
    taken = run_what_is_taken(double("fa2", version, on), 40)
    assert taken >= 5 or on in ("sm100", "sm120")


@pytest.mark.parametrize(
    ("on", "version", "changes", "what"),
    [
        ("sm90", "2.5.9", {"scores": "softcap", "asks": "forward"}, "softcap: flash-attn >= 2.6.0"),
        ("sm90", "2.6.1", {"scores": "softcap"}, "softcap in backward: flash-attn >= 2.6.2"),
        ("sm90", "2.3.6", {"scores": "alibi"}, "ALiBi: flash-attn >= 2.4.0"),
        ("sm90", "2.3.6", {"scores": "alibi_sequences", "form": "thd"}, "ALiBi slopes per sequence: flash-attn >="),
        ("sm90", "2.4.0", {"asks": "deterministic"}, "a deterministic backward: flash-attn >= 2.4.1"),
        ("sm90", "2.3.3", {"form": "thd_gaps"}, "flash-attn >= 2.3.4"),
        ("sm90", "2.3.3", {"form": "thd", "relation": "any"}, "flash-attn >= 2.3.4"),
        ("sm86", "2.5.4", {"dims": "256"}, "flash-attn >= 2.5.5"),
        ("sm89", "2.6.1", {"dims": "224"}, "flash-attn >= 2.6.2"),
        ("sm120", "2.6.3", {}, "flash-attn >= 2."),
        ("sm100", "2.6.3", {}, "flash-attn >= 2."),
        ("sm90", NEWEST, {"dims": "264"}, "at most 256"),
        ("sm90", NEWEST, {"dims": "256", "asks": "lse_grad"}, "for the gradient of lse"),
        ("sm90", NEWEST, {"relation": "any", "mask": "window_right"}, "not more queries than keys"),
        ("sm90", NEWEST, {"relation": "any", "mask": "window_left"}, "not more queries than keys"),
        ("sm90", NEWEST, {"mask": "top_left", "relation": "any"}, "top-left"),
        ("sm90", NEWEST, {"scores": "bias"}, "an additive bias"),
        ("sm90", NEWEST, {"scores": "mask"}, "a mask tensor"),
        ("sm90", NEWEST, {"dtype": "float32"}, "dtype:"),
        ("cpu", NEWEST, {}, "device"),
    ],
)
def test_limits_are_named(on: str, version: str, changes: dict[str, str], what: str) -> None:
    assert_named(replace(_FA2, target=double("fa2", version, on), **changes), what)


def test_older_versions_are_refused() -> None:
    explanation = cases.build(_FA2, device="meta").explain(on="sm90", assume={"fa2": "2.2.5"})
    assert any("flash-attn >= 2.3.0" in reason.needs for reason in explanation.rejected["fa2"])


def test_a_limit_says_what_is_installed_and_what_to_install() -> None:
    """As a user reads it: what was asked, the version that has it, the version that is there, and the command."""
    with pretend("sm90", fa2="2.5.9"):
        explanation = cases.build(replace(_FA2, scores="softcap", asks="forward"), device="meta").explain()
    (reason,) = explanation.rejected["fa2"]
    assert (reason.what, reason.needs, reason.got) == ("softcap", "flash-attn >= 2.6.0", "2.5.9")
    assert "pip install" in reason.remedy


# --- results where they are wanted ---------------------------------------------------------------------------------

_PLACED = (
    replace(_FA2, form="thd", mask="causal", asks="lse_grad", dims="64"),
    replace(_FA2, form="thd_tail", relation="any", heads="4", scores="sink", dims="24"),
    replace(_FA2, form="thd_gaps", mask="causal_window"),
    replace(_FA2, form="thd_gaps", relation="any", mask="causal", scores="alibi_sequences", asks="lse_grad"),
    replace(_FA2, form="bshd", mask="causal", heads="4"),
)


@pytest.mark.parametrize(
    ("version", "heads"),
    [
        *((v, True) for v in ("2.3.0", "2.5.9.post1", "2.6.0.post1", "2.6.1", "2.6.3", "2.7.0.post2", NEWEST)),
        (NEWEST, False),
    ],
)
def test_results_are_written_where_they_are_wanted(version: str, heads: bool) -> None:
    """Gradients always; out of packed batches, as soon as the order of the C++ function's arguments is known."""
    there, target = kernels.Interface(version), double("fa2", version)
    known = there.at_least("2.6.1")
    with target.machine():
        for case in _PLACED if there.at_least("2.4.0") else _PLACED[:1]:
            forward = ["out"] if known and case.form != "bshd" else []
            assert taken(replace(case, target=target), fa2, heads=heads) == [*forward, "dq", "dk", "dv"]


@pytest.mark.parametrize("version", ["2.6.3", NEWEST])
def test_dropout_is_repeated_in_places(version: str) -> None:
    case = replace(_PLACED[0], asks="grad")
    places = Places(heads=True)
    with pretend("sm90", fa2=version) as machine, places.given_to(fa2):
        run(cases.build(case), dropout=0.3)
    assert machine.fa2 is not None
    forward, backward = (given for _, given in machine.fa2.calls)
    assert forward["dropout_p"] == backward["dropout_p"] == 0.3
    assert backward["rng_state"] is not None
    assert places.taken == ["out", "dq", "dk", "dv"]


def test_memory_that_is_not_aligned_is_no_place() -> None:
    with double("fa2", NEWEST).machine():
        assert taken(_PLACED[0], fa2, heads=True, shift=1) == []


def test_an_argument_that_nobody_knows_leaves_out_where_it_is() -> None:
    """The C++ function may have got one too."""

    def later(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any, softcap: float = 0.0, leftpad_k: Any = None, num_splits: int = 0
    ) -> None: ...

    assert fa2._cuda_forward(later) is None


# --- what the generated cases do not reach -------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.3.6", "2.4.3.post1", "2.6.3", NEWEST])
@pytest.mark.parametrize("lengths", [[1, 1, 1], [1, 0, 1, 1], [1, 0]])
@pytest.mark.parametrize("gap", [1, 4])
def test_sequences_of_one_token(version: str, lengths: list[int], gap: int) -> None:
    """With one query each and fewer kv heads, the packed forward takes rows for sequences, which not all are."""
    packing = anyattn.Packing.from_lengths(lengths, gap)
    keys = anyattn.Packing.from_lengths([5 + i for i in range(len(lengths))], gap)
    q = torch.randn(packing.rows, 4, 32, dtype=torch.bfloat16)
    k, v = (torch.randn(keys.rows, 2, 32, dtype=torch.bfloat16) for _ in range(2))
    arguments: dict[str, Any] = {"packing": packing, "packing_kv": keys, "causal": True, "return_lse": True}
    with pretend("sm90", fa2=version):
        out, lse = anyattn.attention(q, k, v, backend="fa2", **arguments)
    exact, exact_lse = anyattn.attention(q.float(), k.float(), v.float(), backend="reference", **arguments)
    torch.testing.assert_close(out.float(), exact, atol=2e-2, rtol=0)
    torch.testing.assert_close(lse, exact_lse, atol=1e-2, rtol=0)


@pytest.mark.parametrize("version", ["2.3.6", "2.6.3", NEWEST])
@pytest.mark.parametrize("form", ["bshd", "thd_gaps"])
def test_backward_gets_the_state_that_forward_drew(version: str, form: str) -> None:
    with pretend("sm90", fa2=version) as machine:
        run(cases.build(replace(_FA2, form=form)), dropout=0.3)
        assert machine.fa2 is not None
        forward, backward = (g for _, g in machine.fa2.calls)
    assert forward["dropout_p"] == backward["dropout_p"] == 0.3
    assert backward["rng_state"] is not None


@pytest.mark.parametrize("on", ["sm86", "sm89"])
def test_dropout_of_large_head_dims_on_small_gpus(on: str) -> None:
    """Nothing checks this from 2.7.3 on, and nothing is launched."""
    with pretend(on, fa2=NEWEST):
        explanation = cases.build(replace(_FA2, dims="256"), device="meta").explain(dropout=0.1)
    assert "fa2" in explanation.rejected


def test_two_versions_of_lse_agree() -> None:
    """Padded until 2.5, packed since: the same numbers come out."""
    case = replace(_FA2, form="thd_gaps", relation="any", mask="causal", asks="forward")
    found = []
    for version in ("2.5.9", "2.6.0"):
        with pretend("sm90", fa2=version):
            _, lse, _ = run(cases.build(case))
        found.append(lse)
    assert found[0] is not None
    assert torch.equal(*found)


@pytest.mark.parametrize("version", ["2.6.3", NEWEST])
def test_under_the_custom_op(version: str) -> None:
    """The op that torch.compile sees runs the same kernel, forward and backward."""
    problem = cases.build(replace(_FA2, form="thd_gaps", mask="causal", scores="alibi"))
    with pretend("sm90", fa2=version):
        compiled = torch.compile(anyattn.attention, fullgraph=True, backend="aot_eager")
        out = compiled(problem.q, problem.k, problem.v, **problem.arguments)
        assert problem.dout is not None
        grads = torch.autograd.grad(out, [*problem.leaves.values()], cases.from_bshd(problem.dout, "thd"))
        check(problem, out, None, dict(zip(problem.leaves, grads, strict=True)))
    torch._dynamo.reset()


# --- the double is as awkward as the kernel ------------------------------------------------------------------------


def _raw(version: str, q: Tensor, k: Tensor, **changes: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) of the C++ function, v being k."""
    interface = kernels.Interface(version)
    packed = q.ndim == 3
    given: dict[str, Any] = {
        "q": q, "k": k, "v": k, "dropout_p": 0.0, "softmax_scale": 0.2, "causal": False, "window_size_left": -1,
        "window_size_right": -1, "softcap": 0.0, "return_softmax": False, "zero_tensors": False, **changes,
    }  # fmt: skip
    name = "varlen_fwd" if packed else "fwd"
    returned = interface.cuda_module()[name](*(given.get(n) for n in interface._names(name)))
    return returned[0], returned[-3]


def _rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16)


def test_lse_of_a_row_without_keys_is_plus_infinity() -> None:
    _, lse = _raw(NEWEST, _rows(1, 6, 2, 16), _rows(1, 4, 2, 16), causal=True)
    assert (lse[..., :2] == INF).all()
    assert lse[..., 2:].isfinite().all()


def test_a_window_as_long_as_the_keys_is_unbounded_although_it_is_not() -> None:
    """And beside a bounded side, what is unbounded is the longest key length: of 4 keys, query 7 sees the first."""
    q, k = _rows(1, 16, 2, 16), _rows(1, 4, 2, 16)
    for version, right in ((NEWEST, 4), ("2.4.0", 5)):
        _, lse = _raw(version, q, k, window_size_left=3, window_size_right=5)
        assert torch.equal(lse[0, 0] == INF, ~plain.visible(16, 4, 3, right).any(1))
    _, lse = _raw(NEWEST, q, k, window_size_right=5)
    assert lse.isfinite().all()


def test_lse_of_causal_alibi_counts_from_column_0() -> None:
    q, k, slopes = _rows(1, 5, 2, 16), _rows(1, 5, 2, 16), torch.tensor([0.5, 0.25])
    _, causal = _raw(NEWEST, q, k, causal=True, alibi_slopes=slopes)
    _, window = _raw(NEWEST, q, k, window_size_left=4, window_size_right=0, alibi_slopes=slopes)
    torch.testing.assert_close(causal - window, slopes[None, :, None] * torch.arange(5.0))


def test_a_row_is_a_sequence_where_each_has_one() -> None:
    offsets = torch.tensor([0, 1, 1, 2], dtype=torch.int32)
    lengths = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": 1, "max_seqlen_k": 1}
    with pytest.raises(RuntimeError, match="invalid"):
        _raw(NEWEST, _rows(2, 4, 16), _rows(2, 2, 16), **lengths)
    _raw(NEWEST, _rows(2, 4, 16), _rows(2, 2, 16), **{**lengths, "max_seqlen_q": 2})


def test_gradients_of_fewer_kv_heads_are_summed_from_anything() -> None:
    """What lies outside the sequences is not as it was given, but with as many kv heads it is."""
    offsets = torch.tensor([0, 2], dtype=torch.int32)
    for kv_heads, kept in ((4, True), (2, False)):
        q, k = _rows(3, 4, 16), _rows(3, kv_heads, 16)
        interface, found = kernels.Interface(NEWEST), torch.zeros(3, kv_heads, 16, dtype=torch.bfloat16)
        given = {
            "dout": q, "q": q, "k": k, "v": k, "out": q, "softmax_lse": torch.zeros(4, 3), "dk": found,
            "cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": 2, "max_seqlen_k": 2, "dropout_p": 0.0,
            "softmax_scale": 0.2, "zero_tensors": False, "causal": False, "window_size_left": -1,
            "window_size_right": -1, "softcap": 0.0, "deterministic": False,
        }  # fmt: skip
        interface.cuda_module()["varlen_bwd"](*(given.get(n) for n in interface._names("varlen_bwd")))
        assert found[:2].isfinite().all()
        assert bool((found[2] == 0).all()) == kept


def test_raw_functions_look_as_they_do() -> None:
    """Plain functions until 2.6, torch custom ops since, whose signature only what they wrap has."""
    with pretend("sm90", fa2="2.6.3"):
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward as older

        assert "window_size" in inspect.signature(older).parameters
    with pretend("sm90", fa2="2.7.0"):
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward as newer

        assert "window_size_left" not in inspect.signature(newer).parameters
        assert "window_size_left" in inspect.signature(newer._init_fn).parameters
        assert isinstance(newer, torch._library.custom_ops.CustomOpDef)
        assert torch.ops.flash_attn._flash_attn_varlen_forward is not None


def test_newest_is_recorded() -> None:
    assert NEWEST == fa2.NEWEST
