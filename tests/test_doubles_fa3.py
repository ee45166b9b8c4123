"""FlashAttention 3 and fa3-fwd over their doubles, of every state: right where taken, refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import anyattn
import cases
from anyattn.backends import fa3
from cases import Case
from doubles import fa3 as kernels
from doubles import pretend
from doubles.signatures import recorded
from test_conformance import check, run
from versions import assert_named, double, run_what_is_taken, solve

NAN = float("nan")
#: States of the main branch, by date. The package has its name since the first of these; its betas have one version.
STATES = [
    v.partition("+")[0] for v in recorded("fa3").versions() if recorded("fa3").noted(v)["package"] == "flash_attn_3"
]
BETAS_WITHOUT_SCHEMA = [s for s in STATES if s < "2025-05-21"]
WITH_BACKWARD = [*STATES, "3.0.0"]
FORWARD_ONLY = recorded("fa3_fwd").versions()

_FA3 = Case(double("fa3", "3.0.0"), dtype="bfloat16", heads="4/2", dims="32")
_FORWARD = (
    replace(_FA3, form="bhsd", mask="causal", relation="any", asks="forward"),
    replace(_FA3, form="thd_gaps", scores="softcap", asks="forward"),
    replace(_FA3, form="thd", scores="sink", mask="causal", relation="keys_longer", asks="forward", dims="192/128"),
    replace(_FA3, form="bshd_left", relation="any", asks="forward", dims="20"),
)
_EVERYWHERE = (
    replace(_FA3, asks="lse_grad"),
    replace(_FA3, form="thd_gaps", mask="causal", asks="lse_grad"),
    replace(_FA3, form="thd", mask="window_left", relation="any", heads="4"),
    replace(_FA3, form="bshd_right", mask="window", relation="any", scores="sink", dims="24"),
    replace(_FA3, form="thd_tail", mask="causal_window", scores="softcap", dtype="float16"),
)


@pytest.mark.parametrize("state", WITH_BACKWARD)
def test_every_state(state: str) -> None:
    target = double("fa3", state)
    with target.machine():
        for case in (*_FORWARD, *_EVERYWHERE):
            solve(replace(case, target=target))


@pytest.mark.parametrize("version", FORWARD_ONLY)
def test_every_forward_only_version(version: str) -> None:
    target = double("fa3", version)
    with target.machine():
        for case in _FORWARD:
            solve(replace(case, target=target))


@pytest.mark.parametrize("state", ["2025-09-17", "3.0.0"])
def test_head_dims_that_differ(state: str) -> None:
    for dims in ("64/256", "32/64", "64/8", "192/128"):
        solve(replace(_FA3, target=double("fa3", state), dims=dims, mask="causal"))
    solve(replace(_FA3, target=double("fa3", state), dims="64/512", asks="forward"))


@pytest.mark.parametrize("state", [*WITH_BACKWARD, *FORWARD_ONLY])
def test_nothing_is_asked_that_is_refused(state: str) -> None:
    """What the declaration lets through runs: no check of that state's code, and no known wrong answer, is met."""
    assert run_what_is_taken(double("fa3", state), 200 if state in FORWARD_ONLY else 40) >= 2


FEATURES: list[tuple[str, ...]] = [
    ("LOCAL",), ("SOFTCAP",), ("FP16",), ("VARLEN",), ("BACKWARD",), ("SPLIT",), ("PACKGQA",), ("HDIM64",),
    ("HDIM256",), ("HDIM192", "HDIM256"), ("HDIM64", "HDIM96", "HDIM192", "HDIM256"), ("HDIM128", "HDIM192"),
    ("HDIMDIFF64",), ("HDIMDIFF192",), ("HDIM64", "HDIM96", "HDIM128", "HDIM192"),
]  # fmt: skip


@pytest.mark.parametrize("without", FEATURES, ids="-".join)
def test_builds_that_lack_something(without: tuple[str, ...]) -> None:
    target = double("fa3", "3.0.0", without=without)
    assert run_what_is_taken(target, 50) >= 2
    solve(replace(_FA3, target=target, dims="64" if "BACKWARD" not in without else "32", asks="forward"))


@pytest.mark.parametrize(
    ("version", "without", "changes", "what"),
    [
        ("3.0.0", (), {"dims": "264"}, "head_dim: at most 256"),
        ("3.0.0", (), {"dims": "128/64"}, "head_dim_v: that of q"),
        ("3.0.0", (), {"dims": "64/512"}, "head_dim_v in backward: at most 256"),
        (
            "3.0.0",
            (),
            {"dims": "256", "asks": "deterministic"},
            "deterministic backward: head_dim and head_dim_v of at",
        ),
        ("3.0.0", (), {"scores": "alibi"}, "ALiBi"),
        ("3.0.0", (), {"scores": "bias"}, "an additive bias"),
        ("3.0.0", (), {"dtype": "float32"}, "dtype:"),
        ("3.0.0", (), {"mask": "top_left", "relation": "any"}, "top-left"),
        ("3.0.0", ("LOCAL",), {"mask": "window"}, "sliding windows: a build that has it"),
        ("3.0.0", ("SOFTCAP",), {"scores": "softcap"}, "softcap: a build that has it"),
        ("3.0.0", ("FP16",), {"dtype": "float16"}, "float16: a build that has it"),
        ("3.0.0", ("VARLEN",), {"form": "thd"}, "packed batches: a build that has it"),
        ("3.0.0", ("BACKWARD",), {}, "backward: a build that has it"),
        ("3.0.0", ("HDIM192", "HDIM256"), {"dims": "192"}, "head_dim above 128"),
        ("3.0.0", ("HDIM192",), {"dims": "192", "asks": "deterministic"}, "of at most 128: larger ones run as 256"),
        ("2025-06-07", (), {"asks": "deterministic"}, "betas took the flag and ignored it: flash-attn-3 >= 3.0.0"),
        ("2025-04-10", (), {"asks": "deterministic"}, "betas took the flag and ignored it: flash-attn-3 >= 3.0.0"),
        ("2025-04-10", (), {"dims": "64/32"}, "another head_dim_v than head_dim in backward: flash-attn-3 >= 3.0.0"),
        ("0.0.3", (), {}, "backward: flash-attn-3"),
        ("0.0.3", (), {"mask": "window", "asks": "forward"}, "sliding windows: flash-attn-3"),
        ("0.0.3", (), {"dtype": "float16", "asks": "forward"}, "float16: flash-attn-3"),
    ],
)
def test_limits_are_named(version: str, without: tuple[str, ...], changes: dict[str, str], what: str) -> None:
    assert_named(replace(_FA3, target=double("fa3", version, without=without), **changes), what)


@pytest.mark.parametrize("on", ["sm80", "sm100", "sm120"])
def test_it_is_for_hopper(on: str) -> None:
    assert_named(replace(_FA3, target=double("fa3", "3.0.0", on)), "device: sm90")


@pytest.mark.parametrize("lacking", ["LOCAL", "SOFTCAP", "FP16", "VARLEN"])
@pytest.mark.parametrize("state", ["2025-04-10", "2025-09-17"])
def test_betas_say_only_at_the_call_what_they_lack(state: str, lacking: str) -> None:
    """They have no list of it: the kernel refuses, once, and from then on that kind of call goes elsewhere."""
    asked = {
        "LOCAL": {"mask": "window"}, "SOFTCAP": {"scores": "softcap"}, "FP16": {"dtype": "float16"},
        "VARLEN": {"form": "thd", "asks": "grad"},
    }[lacking]  # fmt: skip
    case = replace(_FA3, target=double("fa3", state, without=(lacking,)), **asked)
    with case.target.machine():
        problem = cases.build(case)
        problem.arguments["backend"] = ["fa3", "varlen", "reference"]
        check(problem, *run(problem))
        assert problem.explain().chosen != "fa3"
        assert "does not support" in str(problem.explain())


# --- what the generated cases do not reach -------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["2025-04-10", "2025-09-17", "3.0.0"])
def test_padded_dense_batches_give_offsets_too(state: str) -> None:
    """Used lengths without offsets would be left out in backward."""
    with pretend("sm90", fa3=state) as machine:
        run(cases.build(replace(_FA3, form="bshd_right")))
    assert machine.fa3 is not None
    for _, given in machine.fa3.calls:
        assert given["seqused_q"] is not None
        assert given["cu_seqlens_q"] is not None


def test_nothing_is_left_to_the_kernel_that_compilation_would_have_to_guess() -> None:
    """The C++ default of num_splits is a heuristic, whose sums depend on the GPU."""
    with pretend("sm90", fa3="3.0.0") as machine:
        run(cases.build(replace(_FA3, asks="forward")))
    assert machine.fa3 is not None
    assert [g["num_splits"] for name, g in machine.fa3.calls if name == "fwd"] == [1]


@pytest.mark.parametrize("dims", ["184", "192", "248", "256"])
def test_the_gradient_of_lse_needs_room(dims: str) -> None:
    """One more column may be one compiled head dim more: what is promised is kept."""
    for asks in ("lse_grad", "deterministic"):
        case = replace(_FA3, dims=dims, asks=asks)
        with case.target.machine():
            problem = cases.build(case)
            problem.arguments["return_lse"] = True
            if not problem.explain().candidates:
                continue
            q = problem.leaves["q"]
            out, lse = problem.call()
            torch.autograd.grad((out.float().sum() + lse[lse.isfinite()].sum()), q)


@pytest.mark.parametrize("label", ["2024-07-22", "2024-11-12", "2025-01-07", "2025-02-15"])
def test_betas_of_other_names_are_not_there(label: str) -> None:
    """They called themselves flashattn-hopper, or flash-attn as FlashAttention 2 does, which they are not."""
    with pretend("sm90", fa3=label):
        for name in ("fa2", "fa3"):
            if name in cases.BACKENDS.ORDER:
                explanation = cases.build(_FA3, device="meta").explain(backend=name)
                assert explanation.chosen is None


def test_under_the_custom_op() -> None:
    """The op that torch.compile sees runs the same kernel, forward and backward."""
    problem = cases.build(replace(_FA3, form="thd_gaps", mask="causal", scores="sink"))
    with pretend("sm90", fa3="3.0.0") as machine:
        compiled = torch.compile(anyattn.attention, fullgraph=True, backend="aot_eager")
        out = compiled(problem.q, problem.k, problem.v, **problem.arguments)
        assert problem.dout is not None
        grads = torch.autograd.grad(out, [*problem.leaves.values()], cases.from_bshd(problem.dout, "thd"))
        check(problem, out, None, dict(zip(problem.leaves, grads, strict=True)))
    assert machine.fa3 is not None
    assert [name for name, _ in machine.fa3.calls] == ["fwd", "bwd"]
    torch._dynamo.reset()


# --- the double is as awkward as the kernel ------------------------------------------------------------------------


def _rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16)


def _call(interface: kernels.Interface, name: str, **given: Any) -> tuple[Tensor | None, ...]:
    """A compiled function by its arguments' names; what is not given is none, or off."""
    plain: dict[str, Any] = {
        "causal": False, "window_size_left": -1, "window_size_right": -1, "attention_chunk": 0, "softcap": 0.0,
        "rotary_interleaved": False, "num_splits": 1, "sm_margin": 0, "deterministic": False, "softmax_scale": 0.2,
    }  # fmt: skip
    return interface._compiled_function(name, *({**plain, **given}.get(n) for n in interface._names(name)))


def test_without_offsets_backward_ignores_used_lengths() -> None:
    q, used = _rows(2, 8, 2, 64), torch.tensor([5, 3], dtype=torch.int32)
    interface = kernels.Interface("3.0.0")
    out, lse, *_ = _call(interface, "fwd", q=q, k=q, v=q, seqused_q=used, seqused_k=used)
    assert out is not None
    assert lse is not None
    assert out[0, 5:].isnan().all()
    grads = {name: torch.zeros_like(q) for name in ("dq", "dk", "dv")}
    out, lse = out.nan_to_num(), lse.nan_to_num()
    _call(interface, "bwd", dout=q, q=q, k=q, v=q, out=out, softmax_lse=lse, seqused_q=used, seqused_k=used, **grads)
    assert grads["dk"][0, 5:].any()


def test_lse_is_minus_infinity_but_plus_where_there_is_no_key_at_all() -> None:
    interface = kernels.Interface("3.0.0")
    _, lse, *_ = _call(interface, "fwd", q=_rows(1, 6, 2, 64), k=(k := _rows(1, 4, 2, 64)), v=k, causal=True)
    assert lse is not None
    assert (lse[..., :2] == float("-inf")).all()
    _, lse, *_ = _call(interface, "fwd", q=_rows(1, 6, 2, 64), k=(k := _rows(1, 0, 2, 64)), v=k)
    assert lse is not None
    assert (lse == float("inf")).all()


@pytest.mark.parametrize(("state", "repeats"), [("2025-06-07", False), ("2025-09-17", True), ("3.0.0", True)])
def test_the_flag_of_older_betas_does_nothing(state: str, repeats: bool) -> None:
    interface, q = kernels.Interface(state), _rows(1, 64, 2, 64)
    out, lse, *_ = _call(interface, "fwd", q=q, k=q, v=q)
    found = []
    for _ in range(2):
        grads = {name: torch.zeros_like(q) for name in ("dq", "dk", "dv")}
        _call(interface, "bwd", dout=q, q=q, k=q, v=q, out=out, softmax_lse=lse, deterministic=True, **grads)
        found.append(grads["dq"])
    assert torch.equal(*found) == repeats


@pytest.mark.parametrize("state", [*BETAS_WITHOUT_SCHEMA[-1:], "2025-05-21", "2025-12-04", "3.0.0"])
def test_compiled_functions_are_where_they_were(state: str) -> None:
    with pretend("sm90", fa3=state):
        import flash_attn_interface

        assert flash_attn_interface._flash_attn_forward is not None
        if state in BETAS_WITHOUT_SCHEMA:
            assert not hasattr(torch.ops.flash_attn_3, "fwd")
        else:
            returned = len(torch.ops.flash_attn_3.bwd.default._schema.returns)
            assert returned == (5 if state >= "2025-12-04" else 8)
    assert not hasattr(torch.ops.flash_attn_3, "fwd")


def test_newest_is_there() -> None:
    assert fa3.NEWEST in kernels.DATES
