"""torch's packed FlashAttention kernels (those of torch.nn.attention.varlen), through their raw op.

The public function is newer than the op: it has had windows since 2.11, GQA and used key lengths since 2.12, and no
dropout. ``_aten_flash`` says what the op takes, and why it is not given used key lengths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyattn._call import Call, Gradients, Result, Saved
from anyattn._capability import ALWAYS, Capability, HeadDims
from anyattn._environment import Probe, torch_version
from anyattn.backends import _aten_flash

NAME = "varlen"
TITLE = "torch's packed FlashAttention 2"
INSTALL = "install a CUDA build of torch"
NEWEST = "2.13.0"
CAPABILITIES = (
    Capability(
        families=(8, 9, 10, 11, 12),
        dtypes=("float16", "bfloat16"),
        head_dims=HeadDims(maximum=256, multiple_of=8, pads=True, equal=True),
        features={
            "packed": ALWAYS,
            "gaps": ALWAYS,
            "causal": ALWAYS,
            "window": ALWAYS,
            "bottom_right": ALWAYS,
            "gqa": ALWAYS,
            "unequal_head_dims": ALWAYS,
            "dropout": ALWAYS,
            "deterministic": ALWAYS,
        },
        writes_gaps=True,
        ignores_gaps=True,
        reads_torch_flag=True,
        rows=_aten_flash.ROWS,
    ),
)


def probe() -> Probe:
    """Torch itself, where it was built for CUDA, and what is in the place of its flash kernels."""
    built = torch.backends.cuda.is_built() and torch.backends.cuda.is_flash_attention_available()
    found = Probe(torch_version(), "" if built else "this build of torch has no CUDA FlashAttention")
    return _aten_flash.with_override(found)


def load() -> None:
    """Nothing to import: the ops are torch's."""


def forward(call: Call) -> Result:
    """See ``Backend.forward``."""
    return _aten_flash.forward(call)


def backward(call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None) -> Gradients:
    """See ``Backend.backward``."""
    return _aten_flash.backward(call, saved, dout)
