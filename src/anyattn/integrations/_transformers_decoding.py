"""Complete masks of one query per batch entry, as static caches have them: which keys are visible, as lengths.

For a decoding step that it might compile, transformers asks for a 4-D mask, and few kernels take one. The mask function
only notes that such a mask is its own; a layer that runs uncompiled reads it, once for all layers, and a compiled one
sees the tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anyattn.integrations._layout import Layout, Pattern, Shape, lay_out
from anyattn.integrations._transformers_memory import once

_ATTRIBUTE = "_anyattn_decoding"
#: The one query stands last, and the layout says all that it sees.
SEEN = Pattern(causal=False)


class Row(NamedTuple):
    """What the queries of a mask see."""

    shape: Shape
    """keys: up to the last one that any of them sees."""
    layout: Layout


def note_decoding(mask: Tensor) -> Tensor:
    """A complete mask made for one query per entry, with a note that it is the mask function's own."""
    if mask.ndim != 4 or mask.shape[1:3] != (1, 1):
        return mask
    mask = mask.contiguous()  # here, for generate() would do it and lose the note
    setattr(mask, _ATTRIBUTE, True)
    return mask


def read_decoding(mask: Tensor, shape: Shape, layer: int | None) -> Row | None:
    """What the mask function's own mask says of these queries and keys; None: the tensor itself counts.

    That is for masks of the user's, for those with holes, and while a CUDA graph is captured, where nothing can be
    read. The mask is copied to the host once.
    """
    if not getattr(mask, _ATTRIBUTE, False) or tuple(mask.shape) != (shape.batch, 1, 1, shape.keys):
        return None
    if _capturing(mask):
        return None

    def make() -> Row | None:
        visible = mask[:, 0, 0].cpu()
        keys = visible.any(0).nonzero()
        used = shape._replace(keys=int(keys.max()) + 1 if keys.numel() else 1)
        layout = lay_out(used, SEEN, visible[:, : used.keys], device=mask.device)
        return None if layout.mask is not None else Row(used, layout)

    row: Row | None = once(mask, ("row", shape), layer, make)
    return row


def reads_now(mask: object) -> bool:
    """Whether a mask of a decoding step counts as the tensor that it is now: a CUDA graph is captured that reads it."""
    return isinstance(mask, Tensor) and getattr(mask, _ATTRIBUTE, False) and _capturing(mask)


def _capturing(mask: Tensor) -> bool:
    """Whether a CUDA graph is captured that this mask may be an input of."""
    return mask.is_cuda and torch.cuda.is_current_stream_capturing()
