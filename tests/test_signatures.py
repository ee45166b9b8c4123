"""Every call that an adapter makes binds against every version that it claims (tests/signatures, doubles.signatures).

The doubles of packages bind each call that they get against what is recorded of the version that they stand for, and
return as many values: here every version is called in every way that the adapter has.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from packaging.version import Version

from anyattn.backends import _cudnn_graph, fa3
from doubles import pretend
from doubles.cudnn import forget
from doubles.signatures import recorded
from ways import WAYS, call

# --- packages, over their doubles ----------------------------------------------------------------------------------


def calls(backend: str, version: str) -> list[tuple[str, dict[str, Any]]]:
    """Call a version in every way that it takes; what its double was called with."""
    with pretend("sm90", **{backend: version}) as machine:
        for way in WAYS:
            call(backend, way)
        for form in ("bshd", "thd"):
            call(backend, {"form": form}, dropout=0.5)
        return getattr(machine, backend).calls


def said(found: list[tuple[str, dict[str, Any]]]) -> set[tuple[str, str]]:
    """Which arguments of which functions were ever more than what switches them off."""
    off = (None, False, 0.0, -1)
    return {
        (name, argument)
        for name, kwargs in found
        for argument, value in kwargs.items()
        if isinstance(value, torch.Tensor) or value not in off
    }


def given(found: list[tuple[str, dict[str, Any]]]) -> set[tuple[str, str]]:
    """Which arguments of which functions were more than None."""
    return {(name, argument) for name, kwargs in found for argument, value in kwargs.items() if value is not None}


def test_the_doubles_bind() -> None:
    """Else nothing here could fail."""
    with pretend("sm90", fa2="2.5.8", fa3="2025-03-01", fa4="4.0.0b4") as machine:
        assert machine.fa2 is not None
        assert machine.fa3 is not None
        assert machine.fa4 is not None
        for function in (
            machine.fa2.python_module()["_flash_attn_forward"],
            machine.fa3.python_module()["_flash_attn_forward"],
            functools.partial(machine.fa4._flash_attn_fwd, v=None),
        ):
            with pytest.raises(TypeError, match=r"missing a required argument|unexpected keyword argument"):
                function(q=None, k=None, bogus=None)
        for module in (machine.fa2.cuda_module(), machine.fa3.cuda_module()):
            with pytest.raises(TypeError, match="missing a required"):
                module["fwd"](None, None, None)
            with pytest.raises(TypeError, match="too many positional arguments"):
                module["fwd"](*[None] * 40)


@pytest.mark.parametrize("version", recorded("fa4").versions())
def test_fa4(version: str) -> None:
    found = calls("fa4", version)
    for function, kwargs in found:
        recorded("fa4").signature(function, version).bind(**kwargs)
    passed = given(found)
    for function in ("_flash_attn_fwd", "_flash_attn_bwd"):
        assert min(recorded("fa4").returns(function, version)) >= {"_flash_attn_fwd": 2, "_flash_attn_bwd": 3}[function]
        names = ["causal", "softmax_scale"]
        if function == "_flash_attn_fwd" or Version(version) >= Version("4.0.0b5"):  # sm90's first backward is dense
            names += ["cu_seqlens_q", "seqused_k", "max_seqlen_q", "window_size_left", "window_size_right"]
        assert {(function, name) for name in names} <= passed
    assert (("_flash_attn_bwd", "dlse") in passed) == (Version(version) >= Version("4.0.0b5"))
    assert (("_flash_attn_fwd", "learnable_sink") in passed) == (Version(version) >= Version("4.0.0b26"))


@pytest.mark.parametrize("version", recorded("fa4").versions())
def test_defaults_of_fa4_that_are_left_alone(version: str) -> None:
    """The adapter counts on these: one split (several are refused on sm90), no paged keys, no mask of its own."""
    parameters = recorded("fa4").signature("_flash_attn_fwd", version).parameters
    expected = {"num_splits": "1", "page_table": "None", "mask_mod": "None", "out": "None", "lse": "None"}
    assert {name: parameters[name].default for name in expected} == expected


@pytest.mark.parametrize("version", recorded("fa2").versions())
def test_fa2(version: str) -> None:
    passed = said(calls("fa2", version))
    came = {"softcap": "2.6.0", "alibi_slopes": "2.4.0", "deterministic": "2.4.1"}
    for function in ("fwd", "varlen_fwd", "bwd", "varlen_bwd"):
        backward = "bwd" in function
        if backward:
            came["softcap"] = "2.6.2"
        expected = {"softmax_scale", "causal", "window_size_left", "window_size_right", "dropout_p"}
        expected |= {"rng_state"} if backward else set()
        expected |= {name for name, first in came.items() if Version(version) >= Version(first)}
        expected -= set() if backward else {"deterministic"}
        watched = expected | set(came)
        assert {argument for name, argument in passed if name == function and argument in watched} == expected


#: The states of FlashAttention 3, by the day, since its distribution has a name of its own; the last one is 3.0.0.
STATES = [v for v in recorded("fa3").versions() if recorded("fa3").noted(v)["package"] == "flash_attn_3"]
DAYS = [v.partition("+")[0] for v in STATES[:-1]]


@pytest.mark.parametrize("version", [*DAYS, fa3.NEWEST])
def test_fa3(version: str) -> None:
    passed = said(calls("fa3", version))
    for function in ("fwd", "bwd"):
        expected = {"softmax_scale", "causal", "window_size_left", "window_size_right", "softcap"}
        expected |= {"cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "max_seqlen_q", "max_seqlen_k"}
        assert {(function, argument) for argument in expected} <= passed
    assert ({("bwd", name) for name in ("dq", "dk", "dv")}) <= passed  # newer ones return no gradient
    assert (("bwd", "deterministic") in passed) == (version == "3.0.0")
    assert ("fwd", "num_splits") in passed  # its default of 0 chooses, and need not repeat


@pytest.mark.parametrize("version", recorded("fa3_fwd").versions())
def test_fa3_fwd(version: str) -> None:
    passed = said(calls("fa3", version))
    expected = {"softmax_scale", "causal", "softcap", "cu_seqlens_q", "seqused_k", "max_seqlen_q", "num_splits"}
    assert {("fwd", argument) for argument in expected} <= passed
    assert {function for function, _ in passed} == {"fwd"}
    assert not {("fwd", "window_size_left"), ("fwd", "window_size_right")} & passed
    lacking = {f"FLASHATTENTION_DISABLE_{name}" for name in ("BACKWARD", "FP16", "LOCAL")}
    assert lacking <= set(recorded("fa3_fwd").noted(version)["build_flags"])


# --- cuDNN's front end, of which nothing is computed ----------------------------------------------------------------


class Anything:
    """An enumeration: every name is in it."""

    def __getattr__(self, name: str) -> str:
        return name


class Bound:
    """Binds what its methods are called with; ``place`` is the class it stands for."""

    def __init__(self, front: FrontEnd, place: str) -> None:
        self._front, self._place = front, place

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def method(*args: Any, **kwargs: Any) -> Any:
            return self._front.bind(f"{self._place}.{name}", args, kwargs, self)

        return method


class FrontEnd:
    """``import cudnn`` of a version."""

    data_type = heur_mode = build_plan_policy = diagonal_alignment = Anything()
    cudnnGraphNotSupportedError = RuntimeError

    def __init__(self, version: str) -> None:
        self.version, self.calls = version, set[str]()

    def bind(self, function: str, args: tuple[Any, ...], kwargs: dict[str, Any], receiver: Any = None) -> Any:
        package = recorded("cudnn")
        assert package.has(function, self.version), f"{self.version} has no {function}"
        package.signature(function, self.version).bind(*args, **kwargs)
        self.calls |= {
            function,
            *(f"{function}:{name}" for name, value in kwargs.items() if value not in (None, False)),
        }
        if function == "pygraph.get_workspace_size":
            return 1
        place, _, name = function.rpartition(".")
        if place == "tensor":
            assert package.returns(function, self.version) == [1]
            return receiver
        made = [Bound(self, "tensor") for _ in range(max(package.returns(function, self.version), default=0))]
        return made if name.startswith("sdpa") else made[0] if made else None

    def pygraph(self, *args: Any, **kwargs: Any) -> Bound:
        self.bind("pygraph.__init__", args, kwargs)
        return Bound(self, "pygraph")

    def create_handle(self) -> Any:
        return self.bind("create_handle", (), {})

    def set_stream(self, *args: Any, **kwargs: Any) -> None:
        self.bind("set_stream", args, kwargs)

    def backend_version(self) -> int:
        return 91900


@contextmanager
def front_end(version: str) -> Iterator[FrontEnd]:
    """A version is installed, on a GPU."""
    front = FrontEnd(version)
    forget()
    with (
        mock.patch.dict(sys.modules, {"cudnn": front}),
        mock.patch.object(_cudnn_graph, "current_stream", return_value=0),
        pretend("sm90", cudnn=version),
    ):
        yield front
    forget()


CLAIMED = [v for v in recorded("cudnn").versions() if Version(v) >= Version("1.14.0")]


@pytest.mark.parametrize("version", CLAIMED)
def test_cudnn(version: str) -> None:
    with front_end(version) as front:
        for way in (*WAYS, {"scores": "bias_grad"}, {"scores": "mask"}):
            call("cudnn", way)
        for form in ("bshd", "thd"):
            call("cudnn", {"form": form}, dropout=0.5)
    methods = ("validate", "build_operation_graph", "create_execution_plans", "check_support", "build_plans", "execute")
    assert {f"pygraph.{name}" for name in methods} <= front.calls
    both = ("seq_len_q", "seq_len_kv", "use_padding_mask", "dropout", "bias", "attn_scale", "diagonal_band_left_bound")
    assert {f"pygraph.{node}:{name}" for node in ("sdpa", "sdpa_backward") for name in both} <= front.calls
    assert {"pygraph.sdpa:generate_stats", "pygraph.sdpa_backward:dBias"} <= front.calls
    assert {"pygraph.sdpa_backward:use_deterministic_algorithm", "pygraph.tensor:ragged_offset"} <= front.calls


@pytest.mark.parametrize("version", CLAIMED)
def test_nodes_of_cudnn_have_what_is_unpacked(version: str) -> None:
    assert recorded("cudnn").returns("pygraph.sdpa", version) == [2]  # out, stats
    assert recorded("cudnn").returns("pygraph.sdpa_backward", version) == [3]
