"""The command line: what it prints, in a pipe and on a terminal, its exit statuses, and its options, frozen."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import anyattn
import fresh
from anyattn import _api, _select, _support
from anyattn._capability import ALWAYS, FEATURE_NAMES, Capability, HeadDims, Reason, Row, Support
from anyattn._environment import Probe
from anyattn.cli import _app, _doctor, _render, main

backends = importlib.import_module("anyattn.backends")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "ANYATTN_BACKEND", "ANYATTN_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)


def _run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    status = main(list(args))
    out, err = capsys.readouterr()
    return status, out, err


# --- backends that no release changes ---


def _backend(name: str, capabilities: tuple[Capability, ...], probe: Probe, error: str = "") -> types.ModuleType:
    module = types.ModuleType(f"anyattn.backends.{name}")

    def load() -> None:
        if error:
            raise AttributeError(error)

    module.__dict__.update(
        NAME=name, TITLE=f"the {name} kernels", INSTALL=f"pip install {name}-kernels", NEWEST="3.1",
        CAPABILITIES=capabilities, probe=lambda: probe, load=load,
    )  # fmt: skip
    return module


def _features(*names: str, **versions: Support) -> dict[str, Support]:
    return dict.fromkeys(names, ALWAYS) | versions


_HALF = ("float16", "bfloat16")
_DEFECT = Reason(
    "causal masking", "lengths that are known", "other ones", "wait for 4.0", link="https://example.org/issues/7"
)
_FAKES = (
    _backend(
        "alpha",
        (
            Capability(
                families=(9, 10),
                dtypes=_HALF,
                head_dims=HeadDims(256, 8, maximum_backward=128),
                features=_features(
                    "dense",
                    "causal",
                    softcap=Support(since="3.0"),
                    window=Support(backward=False),
                    gqa=Support(since="2.0", backward_since="3.2"),
                    unequal_head_dims=Support(families=(9,)),
                ),
                package="alpha-kernels",
                upgrade="pip install -U alpha-kernels",
                rows=(Row(lambda p: p.causal and p.seqlen_q == 4, _DEFECT, fixed="4.0", direction="backward"),),
            ),
        ),
        Probe(None),
    ),
    _backend(
        "beta",
        (
            Capability(
                kernel="quick",
                families=(0, 9),
                dtypes=("float32",),
                head_dims=HeadDims(64),
                features=_features("dense", "packed"),
                backward_families=(),
            ),
            Capability(
                kernel="slow",
                families=(0, 9),
                dtypes=("float32", *_HALF),
                head_dims=HeadDims(1 << 20),
                features=_features(*FEATURE_NAMES),
                reads_torch_flag=True,
            ),
        ),
        Probe("1.5"),
    ),
    _backend(
        "gamma",
        (Capability((9,), _HALF, HeadDims(128), _features("dense")),),
        Probe("2.5"),
        error="no attribute 'cute'\nand a second line",
    ),
)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    order = tuple(fake.NAME for fake in _FAKES)
    for fake in _FAKES:
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    for module in (backends, _support, _select, _api):
        monkeypatch.setattr(module, "ORDER", order)
    _select.forget_world()
    yield
    _select.forget_world()


# --- explain ---


@pytest.mark.usefixtures("fakes")
class TestExplain:
    def test_chosen_able_and_rejected(self, capsys: pytest.CaptureFixture[str]) -> None:
        args = "explain --on sm90 --seq 8192 --heads 8 --softcap 30 --batch 2"
        assert _run(capsys, *args.split()) == (0, _GOLDEN_ABLE, "")

    def test_every_reason_and_what_would_lift_it(self, capsys: pytest.CaptureFixture[str]) -> None:
        args = "explain --on sm100 --seq 4 --heads 32/8 --head-dim 192/100 --top-left --window 3,none --dropout .1"
        assert _run(capsys, *args.split()) == (1, _GOLDEN_NONE, "")

    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        status, out, _ = _run(capsys, "explain", "--on", "sm90", "--json", "--assume", "alpha=2.5", "--softcap", "3")
        got = json.loads(out)
        assert status == 0
        assert got["chosen"] == "beta"
        assert got["candidates"] == [{"kernel": "beta:slow", "version": "3.1", "notes": []}]
        assert got["versions"] == {"alpha": "2.5", "beta": "3.1", "gamma": "3.1"}
        assert got["problem"]["softcap"] is True
        assert got["rejected"]["alpha"][0] == {
            "what": "softcap",
            "needs": "alpha-kernels >= 3.0",
            "got": "2.5",
            "remedy": "pip install -U alpha-kernels",
            "kernel": "",
            "link": "",
            "text": "softcap: needs alpha-kernels >= 3.0, got 2.5",
        }
        assert list(got["rejected"]) == ["alpha", "beta:quick", "gamma"]

    def test_here_a_package_that_does_not_load_is_a_reason(self, capsys: pytest.CaptureFixture[str]) -> None:
        status, out, _ = _run(capsys, "explain", "--json")
        reason, device = json.loads(out)["rejected"]["gamma"]
        assert status == 0
        assert reason["got"] == "2.5: AttributeError: no attribute 'cute'"
        assert reason["text"] == "the gamma kernels: 2.5: AttributeError: no attribute 'cute'"
        assert device["what"] == "device", "there is no GPU here that it would run on"

    def test_what_was_asked_for_and_is_for_other_devices_says_why(self, capsys: pytest.CaptureFixture[str]) -> None:
        status, out, _ = _run(capsys, "explain", "--on", "sm100", "--backend", "beta,gamma")
        *_, asked = out.splitlines()
        assert status == 1
        for name in ("beta:quick", "beta:slow", "gamma"):
            assert re.search(rf"^ *{name} +rejected +3.1 +device: needs .*, got sm100", out, re.MULTILINE), out
        assert asked == 'not asked for: alpha (backend="beta,gamma")'
        assert "for other devices" not in out

    def test_what_is_for_other_devices_is_a_line_beside_others(self, capsys: pytest.CaptureFixture[str]) -> None:
        _, out, _ = _run(capsys, "explain", "--on", "sm100")
        assert "for other devices: beta:quick, beta:slow, gamma" in out

    def test_a_version_that_is_newer_than_any_known_is_noted(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "newer than any known (3.1)" in _run(capsys, "explain", "--on", "sm90", "--assume", "alpha=3.2")[1]
        assert "newer" not in _run(capsys, "explain", "--on", "sm90", "--assume", "alpha=3.1")[1]

    def test_a_remedy_is_enough_for_training(self, capsys: pytest.CaptureFixture[str]) -> None:
        """gqa came in 2.0, and its backward in 3.2."""
        words = ["explain", "--on", "sm90", "--heads", "8/2", "--json", "--assume", "alpha=1.9"]
        for grad, needed in (((), "alpha-kernels >= 3.2"), (("--no-grad",), "alpha-kernels >= 2.0")):
            reasons = json.loads(_run(capsys, *words, *grad)[1])["rejected"]["alpha"]
            assert [r["needs"] for r in reasons] == [needed]

    def test_backend_named(self, capsys: pytest.CaptureFixture[str]) -> None:
        status, out, _ = _run(capsys, "explain", "--on", "sm90", "--backend", "beta:quick", "--json")
        assert status == 1
        got = json.loads(out)
        assert got["chosen"] is None
        assert "backward" in [reason["what"] for reason in got["rejected"]["beta:quick"]]

    def test_the_environment_says_what_may_be_chosen(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fresh_choice: Callable[[], None]
    ) -> None:
        """As for attention(), where no backend is named."""
        fresh_choice()
        monkeypatch.setenv("ANYATTN_BACKEND", "beta,gamma")
        assert 'not asked for: alpha (backend="beta,gamma")' in _run(capsys, "explain", "--on", "sm90")[1]
        assert "not asked for: beta" in _run(capsys, "explain", "--on", "sm90", "--backend", "alpha")[1]

    def test_forward_only(self, capsys: pytest.CaptureFixture[str]) -> None:
        args = ["explain", "--on", "sm90", "--window", "1023,0", "--json"]
        assert json.loads(_run(capsys, *args)[1])["chosen"] == "beta"
        assert json.loads(_run(capsys, *args, "--no-grad")[1])["chosen"] == "alpha"

    def test_plain_text_table(self) -> None:
        import torch

        q = torch.empty(1, 8192, 8, 128, dtype=torch.bfloat16, device="meta")
        assert str(anyattn.explain(q, q, q, softcap=30.0, on="sm90")) + "\n" == _GOLDEN_STR


_GOLDEN_ABLE = """\
bf16, batch 2, seq 8192, heads 8, head_dim 128, softcap 30, forward and backward.
On sm90, with the newest known version of each backend.

alpha 3.1 runs it: the alpha kernels.

kernel      verdict   version  why not, or a note                           what would lift it
------------------------------------------------------------------------------------------------------------------------
alpha       chosen    3.1
beta:slow   able      3.1
beta:quick  rejected  3.1      dtype: needs float32, got bfloat16           cast q, k and v, or use torch.autocast
                               head_dim: needs at most 64, got 128          choose another backend
                               head_dim_v: needs at most 64, got 128        choose another backend
                               softcap: this kernel does not have it        choose another backend
                               backward: needs a kernel with a backward,    call it under torch.no_grad(), or choose
                               got one without                              another backend
gamma       rejected  3.1      softcap: this kernel does not have it        choose another backend
"""
_GOLDEN_NONE = """\
bf16, batch 1, seq 4, heads 32/8, head_dim 192/100, causal (top-left), window 3,none, dropout 0.1, forward and backward.
On sm100, with the newest known version of each backend.

No backend takes this call: each says why, and what would lift it.

kernel  verdict   version  why not, or a note                             what would lift it
------------------------------------------------------------------------------------------------------------------------
alpha   rejected  3.1      head_dim_v: needs a multiple of 8, got 100     pad q, k and v to 104 with zeros
                           head_dim_v other than head_dim: needs a GPU    use such a GPU or another backend
                           of sm90, got sm100
                           dropout: this kernel does not have it          choose another backend
                           head_dim in backward: needs at most 128, got   call it under torch.no_grad(), or choose
                           192/100                                        another backend
                           sliding windows in backward: this kernel does  choose another backend
                           not have them
                           fewer kv heads than heads in backward: needs   pip install -U alpha-kernels
                           alpha-kernels >= 3.2, got 3.1
                           causal masking: needs lengths that are known,  wait for 4.0
                           got other ones (https://example.org/issues/7)

for other devices: beta:quick, beta:slow, gamma
"""
_GOLDEN_STR = """\
alpha 3.1 runs bfloat16 on sm90, seq 8192, heads 8, head_dim 128, dense, softcap, forward
  alpha       chosen    3.1
  beta:slow   able      3.1
  beta:quick  rejected  dtype: needs float32, got bfloat16; cast q, k and v, or use torch.autocast
  beta:quick  rejected  head_dim: needs at most 64, got 128; choose another backend
  beta:quick  rejected  head_dim_v: needs at most 64, got 128; choose another backend
  beta:quick  rejected  softcap: this kernel does not have it; choose another backend
  gamma       rejected  softcap: this kernel does not have it; choose another backend
"""


# --- what the words mean ---


def _problem(capsys: pytest.CaptureFixture[str], words: str) -> dict[str, Any]:
    status, out, err = _run(capsys, "explain", "--on", "sm90", "--json", "--backend", "reference", *words.split())
    assert (status, err) == (0, "")
    problem: dict[str, Any] = json.loads(out)["problem"]
    return problem


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", {"form": "dense", "dtype": "bfloat16", "seqlen_q": 4096, "num_heads": 32, "head_dim": 128, "grad": True}),
        ("--heads 32/8 --head-dim 192/128", {"num_heads": 32, "num_kv_heads": 8, "head_dim": 192, "head_dim_v": 128}),
        ("--dtype fp16 --no-grad", {"dtype": "float16", "grad": False}),
        ("--dtype float64", {"dtype": "float64"}),
        ("--seq 512 --seq-k 1024", {"seqlen_q": 512, "seqlen_k": 1024, "relation": "keys_longer"}),
        ("--layout sbhd --seq 512 --batch 3", {"seqlen_q": 512, "form": "dense"}),
        ("--layout bhsd --seq 512 --batch 3", {"seqlen_q": 512, "num_heads": 32}),
        ("--causal", {"causal": True, "top_left": False}),
        ("--top-left --seq 8 --seq-k 16", {"causal": True, "top_left": True}),
        ("--window 1023,0", {"left": True, "right": False, "causal": True}),
        ("--window none,5", {"left": False, "right": True, "causal": False}),
        ("--softcap 30", {"softcap": True}),
        ("--sink", {"sink": "bfloat16", "sink_grad": True}),
        ("--alibi", {"alibi": "heads"}),
        ("--bias", {"bias": "bfloat16", "bias_grad": False}),
        ("--bias-grad", {"bias": "bfloat16", "bias_grad": True}),
        ("--mask", {"mask": "tensor"}),
        ("--dropout 0.1", {"dropout": True}),
        ("--deterministic", {"deterministic": True}),
        ("--return-lse", {"return_lse": True, "lse_grad": True}),
        ("--packed --batch 3 --seq 64", {"form": "packed", "seqlen_q": 64, "gaps": False, "relation": "equal"}),
        ("--packed --seq 64 --seq-k 128", {"form": "packed", "seqlen_k": 128, "relation": "keys_longer"}),
        ("--lengths 100,200,300", {"form": "packed", "seqlen_q": 512, "gaps": False}),
        ("--lengths 100,0,300 --gaps", {"form": "packed", "gaps": True}),
        ("--lengths 100,200,300 --layout bshd", {"form": "packed", "seqlen_q": 512, "gaps": True}),
        ("--lengths 8,8 --layout bhsd --seq 8", {"form": "packed", "gaps": False}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_words(capsys: pytest.CaptureFixture[str], words: str, expected: dict[str, Any]) -> None:
    problem = _problem(capsys, words)
    assert {name: problem[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--seq -4", "--seq must be an int >= 0, got '-4'"),
        ("--heads 32/8/2", "--heads must be N or N/KV, like 32 or 32/8, got '32/8/2'"),
        ("--heads 3/2", "num_heads must be a multiple of num_kv_heads, got 3 and 2"),
        ("--head-dim big", "--head-dim must be D or D/DV, like 128 or 192/128, got 'big'"),
        (
            "--dtype int8",
            "--dtype must be one of bf16, fp16, fp32, fp64, bfloat16, float16, float32, float64; got 'int8'",
        ),
        ("--window 3", "--window must be LEFT,RIGHT, each an int >= 0 or 'none' for unbounded; got '3'"),
        ("--window -1,0", "--window must be LEFT,RIGHT, each an int >= 0 or 'none' for unbounded; got '-1,0'"),
        ("--softcap -3", "softcap must be above 0, or None for none; got -3.0"),
        ("--softcap hot", "--softcap must be a number, got 'hot'"),
        ("--dropout 2", "dropout must be a number in [0, 1), got 2.0"),
        ("--layout shbd", "--layout must be one of bshd, sbhd, bhsd, thd; got 'shbd'"),
        ("--lengths 1,x", "--lengths must be ints >= 0 with commas between, like 100,200,300; got '1,x'"),
        ("--lengths 1,2 --batch 3", "--batch 3 does not fit 2 --lengths: leave --batch out"),
        ("--lengths 1,2 --seq 3", "--seq does not go with packed --lengths: leave --seq out"),
        ("--lengths 1,2 --seq-k 3", "--seq-k does not go with --lengths, which are those of queries and keys alike"),
        ("--gaps", "--gaps goes with --packed; a padded batch is --lengths with a 4-D --layout"),
        (
            "--packed --layout bshd",
            "--packed is layout thd, got --layout bshd: leave one out, or give --lengths for a padded batch",
        ),
        (
            "--packed --mask",
            'a tensor mask does not go with layout "thd": use 4-D tensors, or a BlockMask over packed rows',
        ),
        (
            "--on sm99",
            "unknown on='sm99'; allowed: cpu, sm80 (A100), sm86 (A10, RTX 3090), sm89 (L4, RTX 4090), "
            "sm90 (H100, H200), sm100 (B200), sm103 (B300), sm120 (RTX 5090)",
        ),
        ("--assume torch", "--assume must be BACKEND=VERSION or BACKEND=none, got 'torch'"),
        ("--assume torch=new", "--assume torch=new: 'new' is no version, such as 4.0.0b20 or none"),
    ],
    ids=lambda x: x if x.startswith("--") and len(x) < 40 else "",
)  # fmt: skip
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    assert _run(capsys, "explain", *words.split()) == (2, "", f"anyattn: {message}\n")


@pytest.mark.parametrize(
    ("args", "start", "end"),
    [
        (["explain", "--backend", "nope"], "anyattn: unknown backend 'nope'; allowed: auto, ", "reference\n"),
        (["explain", "--assume", "nope=1"], "anyattn: assume names the unknown backend 'nope'", "reference\n"),
        (["explain", "--nope"], "anyattn: No such option: --nope", "(see anyattn explain --help)\n"),
        (["explain", "--seq"], "anyattn: Option '--seq' requires an argument", "argument\n"),
        (["nope"], "anyattn: No such command 'nope'", "(see anyattn --help)\n"),
    ],
)
def test_unknown_names_are_one_line(capsys: pytest.CaptureFixture[str], args: list[str], start: str, end: str) -> None:
    status, out, err = _run(capsys, *args)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(start)
    assert err.endswith(end)


# --- doctor ---

_MACHINE = {
    "anyattn": "0.9", "python": "3.11.7", "platform": "Linux-6", "torch": "2.11.0+cu128", "cuda": "12.8",
    "cudnn": "9.19.0", "triton": "3.6.0", "cpu_threads": 2,
    "devices": [{"name": "NVIDIA H200", "arch": "sm90", "memory_gib": 139.8}], "no_device": "",
}  # fmt: skip


@pytest.fixture
def _one_gpu(monkeypatch: pytest.MonkeyPatch, fakes: None) -> None:
    monkeypatch.setattr(_doctor, "_machine", lambda: _MACHINE)
    monkeypatch.setattr(_doctor, "distribution_version", lambda name: None if name == "matplotlib" else "1.0")
    monkeypatch.setenv("ANYATTN_CACHE_DIR", "/somewhere")
    monkeypatch.setenv("ANYATTN_BACKEND", "alpha,nope")


@pytest.mark.usefixtures("_one_gpu")
def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(capsys, "doctor") == (0, _GOLDEN_DOCTOR, "")


_GOLDEN_DOCTOR = """\
anyattn 0.9 on this machine
python  3.11.7, Linux-6
torch   2.11.0+cu128
CUDA    12.8
cuDNN   9.19.0
triton  3.6.0
GPU 0   NVIDIA H200, sm90, 139.8 GiB
CPU     2 threads for torch

Backends, the preferred first
backend  version  runs here  why not                                   what it is
----------------------------------------------------------------------------------------
alpha    -        no         not installed: pip install alpha-kernels  the alpha kernels
beta     1.5      yes                                                  the beta kernels
gamma    2.5      no         AttributeError: no attribute 'cute'       the gamma kernels

What each kernel can do
                                                                                    beta:    beta:
feature                                              alpha                          quick    slow       gamma
-------------------------------------------------------------------------------------------------------------
dense batches                                        yes                            forward  yes        yes
packed batches                                       no                             forward  yes        no
rows outside every sequence                          no                             no       yes        no
causal masking                                       yes                            no       yes        no
sliding windows                                      forward                        no       yes        no
bottom-right alignment with lengths not known equal  no                             no       yes        no
top-left alignment with lengths not known equal      no                             no       yes        no
fewer kv heads than heads                            since 2.0, backward since 3.2  no       yes        no
head_dim_v other than head_dim                       sm90 only                      no       yes        no
softcap                                              since 3.0                      no       yes        no
sinks                                                yes                            forward  yes        yes
ALiBi                                                no                             no       yes        no
ALiBi slopes per sequence                            no                             no       yes        no
an additive bias                                     no                             no       yes        no
the gradient of bias                                 no                             no       yes        no
a mask tensor                                        no                             no       yes        no
a BlockMask                                          no                             no       yes        no
dropout                                              no                             no       yes        no
a scale of zero or below                             no                             no       yes        no
the gradient of lse                                  yes                            no       yes        yes
a deterministic backward                             no                             no       with flag  no

yes        forward and backward
forward    forward only: no gradients
since      from this version of the kernel's package on
with flag  while torch.use_deterministic_algorithms(True) is on, which the kernel reads itself
no         the kernel is passed over, with a reason

kernel      runs on      dtypes                      head_dim                                 backward
------------------------------------------------------------------------------------------------------
alpha       sm90, sm10x  float16, bfloat16           to 256, multiples of 8; backward to 128  yes
beta:quick  CPU, sm90    float32                     to 64                                    no
beta:slow   CPU, sm90    float32, float16, bfloat16  any                                      yes
gamma       sm90         float16, bfloat16           to 128                                   yes

kernel  rule or known defect
------------------------------------------------------------------------------------------------------------
alpha   before 4.0, causal masking: needs lengths that are known, in backward (https://example.org/issues/7)

Environment
variable           value       what it says
------------------------------------------------------------------------------------------------------------------------
ANYATTN_BACKEND    alpha,nope  which backends backend="auto" may be: names with commas; WRONG: unknown backend 'nope';
                               allowed: auto, alpha, beta, gamma
ANYATTN_LOG        not set     what is logged to standard error: debug, info, warning or error
ANYATTN_CACHE_DIR  /somewhere  where compiled kernels are kept; without it, where their packages do

Next steps
pip install alpha-kernels    alpha: the alpha kernels
pip install gamma-kernels    gamma, which is installed and does not work: AttributeError: no attribute 'cute'
pip install 'anyattn[plot]'  the plot of anyattn demo
anyattn demo                 trains a small model on packed documents
"""


@pytest.mark.usefixtures("_one_gpu")
def test_doctor_leaves_no_rule_out_in_silence(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(_doctor, "_machine", lambda: _MACHINE | {"devices": []})
    said = "More rules hold for alpha, on other devices: anyattn doctor --all shows them."
    assert said in _run(capsys, "doctor")[1]
    out = _run(capsys, "doctor", "--all")[1]
    assert said not in out
    assert "https://example.org/issues/7" in out


def test_doctor_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = _run(capsys, "doctor")
    assert (status, err) == (0, "")
    assert f"anyattn {anyattn.__version__} on this machine" in out
    assert out.isascii()
    for name in backends.ORDER:
        assert name in out


def test_doctor_json(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = _run(capsys, "doctor", "--json")
    got = json.loads(out)
    assert status == 0
    assert [status["name"] for status in got["backends"]] == list(backends.ORDER)
    assert set(got["support"]) == set(FEATURE_NAMES)
    assert got["support"]["softcap"]["reference"] == "yes"
    assert [v["name"] for v in got["environment"]] == ["ANYATTN_BACKEND", "ANYATTN_LOG", "ANYATTN_CACHE_DIR"]
    assert got["next_steps"]


# --- how it looks ---


@pytest.mark.parametrize("columns", [40, 72, 100, 200])
@pytest.mark.parametrize("command", ["doctor --all", "explain --on sm90 --lengths 3,5 --softcap 2"])
def test_nothing_is_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    out = _run(capsys, *command.split())[1]
    lines = out.splitlines()
    assert max(map(len, lines)) <= columns
    assert not any(line != line.rstrip() for line in lines)
    assert "\u2026" not in out
    assert "..." not in out


def test_a_terminal_gets_colour_and_rules(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    out = _run(capsys, "explain", "--on", "sm90")[1]
    assert "\x1b[1;32mchosen" in out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "[1;32m" not in _run(capsys, "explain", "--on", "sm90")[1]


def test_widths() -> None:
    rows = [("name", "what for"), ("alpha", "a b c d e f g h"), ("b", "incomprehensible")]
    assert _render._widths(rows, 80) == [5, 16]
    assert _render._widths(rows, 23) == [5, 16]
    assert _render._widths(rows, 20) == [5, 13]  # less than the longest word: it is folded
    assert _render._widths(rows, 10) == [4, 4]
    assert _render._widths([("name", "what for"), ("alpha", "a b c d e f g h")], 15) == [5, 8]


# --- options, frozen ---

_OPTIONS = {
    "doctor": {"--all", "--json", "--help", "-h"},
    "explain": {
        "--seq", "--seq-k", "--heads", "--head-dim", "--batch", "--dtype", "--layout", "--packed", "--lengths",
        "--gaps", "--causal", "--top-left", "--window", "--softcap", "--sink", "--alibi", "--bias", "--bias-grad",
        "--mask", "--dropout", "--grad", "--no-grad", "--deterministic", "--return-lse", "--on", "--assume",
        "--backend", "--json", "--help", "-h",
    },
    "plan": {
        "--lengths", "--ranks", "--gpu", "--hierarchical", "--gpus-per-node", "--network", "--heads", "--kv-heads",
        "--head-dim", "--tokens", "--window", "--causal", "--no-causal", "--seed", "--placement", "--comm", "--json",
        "--picture", "--help", "-h",
    },
}  # fmt: skip


def test_commands_are_frozen() -> None:
    assert _app.COMMANDS == ("demo", "doctor", "explain", "plan")


@pytest.mark.parametrize("name", sorted(_OPTIONS))
def test_options_are_frozen(name: str) -> None:
    command = _app.command(name)
    context = command.make_context(name, [], resilient_parsing=True)
    options = {opt for p in command.get_params(context) for opt in (*p.opts, *p.secondary_opts)}
    assert options == _OPTIONS[name]


@pytest.mark.parametrize("name", sorted(_OPTIONS))
def test_help(capsys: pytest.CaptureFixture[str], name: str) -> None:
    status, out, _ = _run(capsys, name, "--help")
    assert status == 0
    assert out.isascii()
    assert all(option in out for option in _OPTIONS[name])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(capsys, "--version") == (0, f"anyattn {anyattn.__version__}\n", "")


# --- processes of their own ---


def test_a_missing_extra_is_one_line() -> None:
    got = fresh.run(
        "import sys\n"
        "for name in ('typer', 'rich'): sys.modules[name] = None\n"
        "from anyattn._support import markdown_table\n"  # needs none of them
        "assert markdown_table()\n"
        "from anyattn.cli import main\n"
        "sys.exit(main(['doctor']))"
    )
    needed = "what is not installed here, typer and rich"
    assert (got.returncode, got.stdout) == (1, "")
    assert got.stderr == f"anyattn: the command line needs {needed}: pip install 'anyattn[cli]'\n"


def test_as_a_module_into_a_pipe_of_ascii() -> None:
    command = [sys.executable, "-m", "anyattn", "explain", "--on", "sm90"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    got = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (got.returncode, got.stderr) == (0, "")
    assert "chosen" in got.stdout


# --- the support table ---


@pytest.mark.usefixtures("fakes")
def test_support_cells() -> None:
    rows = {row.feature: dict(row.cells) for row in _support.support_rows()}
    assert list(rows) == list(FEATURE_NAMES)
    assert list(rows["dense"]) == ["alpha", "beta:quick", "beta:slow", "gamma"]
    assert list(rows["dense"].values()) == ["yes", "forward", "yes", "yes"]
    assert list(rows["softcap"].values()) == ["since 3.0", "no", "yes", "no"]
    assert rows["window"]["alpha"] == "forward"
    assert rows["gqa"]["alpha"] == "since 2.0, backward since 3.2"
    assert rows["unequal_head_dims"]["alpha"] == "sm90 only"
    assert list(rows["sink"].values()) == ["yes", "forward", "yes", "yes"]
    assert list(rows["lse_grad"].values()) == ["yes", "no", "yes", "yes"]
    assert list(rows["deterministic"].values()) == ["no", "no", "with flag", "no"]


@pytest.mark.usefixtures("fakes")
def test_kernel_facts() -> None:
    alpha, quick, slow, _ = _support.kernel_facts()
    assert (alpha.kernel, alpha.devices, alpha.package) == ("alpha", "sm90, sm10x", "alpha-kernels")
    assert alpha.head_dims == "to 256, multiples of 8; backward to 128"
    assert (quick.devices, quick.backward, quick.head_dims) == ("CPU, sm90", "no", "to 64")
    assert (slow.backward, slow.head_dims) == ("yes", "any")
    assert alpha.notes == (
        "before 4.0, causal masking: needs lengths that are known, in backward (https://example.org/issues/7)",
    )


def test_markdown_table() -> None:
    features, kernels, notes = _support.markdown_table().strip().split("\n\n")
    assert len(features.splitlines()) == 2 + len(FEATURE_NAMES)
    for table in (features, kernels):
        assert len({(line.count("|"), len(line)) for line in table.splitlines()}) == 1
    assert len(kernels.splitlines()) == 2 + len(_support.kernel_facts())
    assert all(line.startswith("- ") for line in notes.splitlines())
