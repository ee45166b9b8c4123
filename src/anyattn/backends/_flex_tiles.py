"""Tiles that fit: kernel options where FlexAttention's own tiles need more shared memory than the GPU has.

What its tables miss shows when a kernel is compiled, "out of resource", after many seconds. Then, and where it was seen
before, smaller tiles are asked for. Seen on an H200 with torch 2.11: head_dim 192 in float32 needs 280 kB for forward,
and a float32 bias over rows and keys 246 kB at head_dim 64; the GPU has 232 kB.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from anyattn._call import Call

Way = Literal["fwd", "bwd"]
Options = tuple[tuple[str, Any], ...]

_SMALL: dict[Way, dict[str, int]] = {
    "fwd": {"BLOCK_M": 32, "BLOCK_N": 32, "num_stages": 1, "num_warps": 4},
    "bwd": {
        "BLOCK_M1": 16, "BLOCK_N1": 16, "BLOCK_M2": 16, "BLOCK_N2": 16, "num_stages": 1, "num_warps": 4,
    },
}  # fmt: skip
_shrunk: set[tuple[Way, Any]] = set()


def tile_options(call: Call) -> Options:
    """Kernel options for a call's tiles; none where FlexAttention's own do."""
    wanted: dict[str, int] = {}
    key = _key(call)
    for way, small in _SMALL.items():
        if (way, key) in _shrunk or (way == "fwd" and _known_too_large(call)):
            wanted.update({f"{way}_{name}": value for name, value in small.items()})
    if not wanted and _full_precision_bias(call) and call.q.shape[-1] == 64:
        wanted["fwd_BLOCK_N"] = 64
    return tuple(wanted.items())


def shrink(way: Way, call: Call, error: Exception) -> bool:
    """Whether smaller tiles may help where a kernel did not compile; from now on they are asked for."""
    place = (way, _key(call))
    if "out of resource" not in str(error) or place in _shrunk:
        return False
    _shrunk.add(place)
    return True


def _known_too_large(call: Call) -> bool:
    """Head dims for which FlexAttention has no tiles of its own in float32."""
    dim = call.q.shape[-1]
    return call.q.dtype == torch.float32 and max(dim, call.v.shape[-1]) > 128 and dim not in (128, 256)


def _full_precision_bias(call: Call) -> bool:
    if call.bias is None or 1 in call.bias.shape[2:]:
        return False
    return call.spec.bias_grad or call.bias.dtype == torch.float32


def _key(call: Call) -> tuple[Any, ...]:
    """What a tile's size depends on."""
    added = [None if x is None else (x.shape[2] == 1, x.shape[3] == 1) for x in (call.bias, call.mask)]
    return call.q.device, call.q.dtype, call.q.shape[-1], call.v.shape[-1], *added
