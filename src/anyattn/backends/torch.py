"""torch's scaled-dot-product kernels through their raw ops: cuDNN, flash and efficient on CUDA, and the CPU kernel.

The raw ops give lse, and a backward from a given lse, which ``F.scaled_dot_product_attention`` does not. Each kernel
has its calls and its conventions in a file beside this one: ``_aten_cudnn``, ``_aten_flash``, ``_aten_efficient``,
``_aten_cpu``. Here is what they can do.
"""

from __future__ import annotations

from torch import Tensor

from anyattn._call import Call, Gradients, Result, Saved
from anyattn._capability import ALWAYS, Capability, HeadDims, Reason, Row
from anyattn._environment import Probe, torch_version
from anyattn._problem import Problem
from anyattn.backends import _aten_cpu, _aten_cudnn, _aten_efficient, _aten_flash

NAME = "torch"
TITLE = "torch's scaled-dot-product kernels"
INSTALL = "pip install torch"
NEWEST = "2.13.0"

_HALF = ("float16", "bfloat16")
_ELSE = "choose another backend"


def _window_unfit(p: Problem) -> bool:
    return (p.left or p.right) and not (p.causal and p.relation == "equal")


def _rows_without_keys(p: Problem) -> bool:
    return p.causal and p.relation == "any" and not p.top_left


def _bias_differs(p: Problem) -> bool:
    return p.bias is not None and p.bias != p.dtype


def _packed_with_values(p: Problem) -> bool:
    return p.form == "packed" and (p.bias is not None or p.mask is not None)


_BIAS_DTYPE = Row(_bias_differs, Reason("bias's dtype", "that of q", "another", "cast bias, or choose another backend"))
_EFFICIENT_ROWS = (
    Row(
        _window_unfit,
        Reason("sliding windows", "causal, with key lengths known equal to query lengths", "another window", _ELSE),
    ),
    Row(
        _rows_without_keys,
        Reason("bottom-right causal", "no query sequence longer than its keys", "lengths that may be",
               _ELSE + ": rows without keys come out wrong"),
    ),
    _BIAS_DTYPE,
    Row(
        _packed_with_values,
        Reason("a bias or mask tensor", "a batch without padding", "a packed or padded one", _ELSE),
    ),
    Row(
        lambda p: p.dropout and p.form == "packed",
        Reason("dropout", "a dense batch", "a packed or padded one, where its backward drops other weights",
               "leave out dropout, or " + _ELSE, link="https://github.com/pytorch/pytorch/issues/115590"),
    ),
    Row(
        lambda p: p.dropout and p.num_heads != p.num_kv_heads,
        Reason("dropout", "as many kv heads as heads", "fewer, which take several launches, each with a state",
               "leave out dropout, or " + _ELSE),
    ),
)  # fmt: skip

CAPABILITIES = (
    Capability(
        kernel="cudnn",
        families=(9, 10, 11, 12),
        dtypes=_HALF,
        head_dims=HeadDims(maximum=256, multiple_of=8, pads=True),
        features=dict.fromkeys(
            ("dense", "causal", "top_left", "gqa", "unequal_head_dims", "bias", "mask", "dropout"), ALWAYS
        ),
        rows=(*_aten_cudnn.ROWS, _BIAS_DTYPE),
    ),
    Capability(
        kernel="flash",
        families=(8, 9, 10, 11, 12),
        dtypes=_HALF,
        head_dims=HeadDims(maximum=256, multiple_of=8, pads=True, equal=True),
        features=dict.fromkeys(
            (
                "dense",
                "causal",
                "window",
                "bottom_right",
                "gqa",
                "unequal_head_dims",
                "dropout",
                "deterministic",
            ),
            ALWAYS,
        ),
        reads_torch_flag=True,
        rows=_aten_flash.ROWS,
    ),
    Capability(
        kernel="efficient",
        families=(7, 8, 9, 10, 11, 12),
        dtypes=("float16", "bfloat16", "float32"),
        head_dims=HeadDims(maximum=1024, multiple_of=8, pads=True),
        # Each factor is split in two TF32 parts of 11 bits, and the product of the small parts is dropped: 2 ** -22 for
        # each factor's remainder and as much for the dropped product. On an H200 the error was 2 ** -20.3.
        product_error={"float32": 3 * 2.0**-22},
        features=dict.fromkeys(
            (
                "dense",
                "packed",
                "gaps",
                "causal",
                "window",
                "bottom_right",
                "top_left",
                "gqa",
                "unequal_head_dims",
                "bias",
                "bias_grad",
                "mask",
                "dropout",
                "deterministic",
            ),
            ALWAYS,
        ),
        reads_torch_flag=True,
        rows=_EFFICIENT_ROWS,
    ),
    Capability(
        kernel="cpu",
        families=(0,),
        dtypes=("float16", "bfloat16", "float32", "float64"),
        head_dims=HeadDims(maximum=1 << 20, pads=True, equal=True),
        features=dict.fromkeys(
            (
                "dense",
                "packed",
                "gaps",
                "causal",
                "window",
                "bottom_right",
                "top_left",
                "gqa",
                "unequal_head_dims",
                "alibi",
                "alibi_per_sequence",
                "bias",
                "mask",
                "deterministic",
            ),
            ALWAYS,
        ),
        writes_gaps=True,
        ignores_gaps=True,
    ),
)


def probe() -> Probe:
    """Torch itself, and what is in the place of its flash kernels."""
    return _aten_flash.with_override(Probe(torch_version()))


def load() -> frozenset[str]:
    """Nothing to import: the ops are torch's. Says what is known of its cuDNN."""
    return _aten_cudnn.flags()


_FORWARD = {
    "cudnn": _aten_cudnn.forward,
    "flash": _aten_flash.forward,
    "efficient": _aten_efficient.forward,
    "cpu": _aten_cpu.forward,
}
_BACKWARD = {
    "cudnn": _aten_cudnn.backward,
    "flash": _aten_flash.backward,
    "efficient": _aten_efficient.backward,
    "cpu": _aten_cpu.backward,
}


def forward(call: Call) -> Result:
    """See ``Backend.forward``."""
    return _FORWARD[call.kernel](call)


def backward(call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None) -> Gradients:
    """See ``Backend.backward``."""
    return _BACKWARD[call.kernel](call, saved, dout)
