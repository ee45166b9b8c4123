"""What a mask function of transformers says, read from what it is made of: causal, sliding, chunked, packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from anyattn.integrations._layout import Pattern


def _captured(function: Callable[..., Any]) -> dict[str, Any]:
    """The variables that a closure holds."""
    cells = function.__closure__ or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def _made_by(function: Callable[..., Any], maker: Callable[..., Any] | None) -> bool:
    """Whether a closure was returned by this function of transformers."""
    return maker is not None and function.__code__ in maker.__code__.co_consts


class Known(NamedTuple):
    """What a mask function says."""

    pattern: Pattern
    documents: Tensor | None = None
    """Integers (B, Q): the number of each row's document."""
    left: Tensor | None = None
    """(B,): rows of padding before each sequence, from where chunks are counted."""


def recognize(function: Callable[..., Any]) -> Known | None:
    """What a mask function says; None if it is not one that anyattn knows."""
    from transformers import masking_utils as theirs

    if function is theirs.causal_mask_function:
        return Known(Pattern(causal=True))
    if function is theirs.bidirectional_mask_function:
        return Known(Pattern(causal=False))
    if not hasattr(function, "__code__"):
        return None
    captured = _captured(function)
    if _made_by(function, getattr(theirs, "remap_positions_for_packed_sequence", None)):
        return recognize(captured["mask_function"])  # positions within documents: what a packing counts
    if not _made_by(function, theirs.and_masks):
        return None
    return _both(captured["mask_functions"])


def _both(parts: tuple[Callable[..., Any], ...]) -> Known | None:
    """The intersection of mask functions; None where two of them say the same thing in two ways."""
    from transformers import masking_utils as theirs

    causal, window, chunk, documents, left = False, None, None, None, None
    for part in parts:
        if _made_by(part, theirs.sliding_window_overlay):  # as a causal window; alone it is none
            window = _captured(part)["sliding_window"] - 1
            if not any(other is theirs.causal_mask_function for other in parts):
                return None
        elif _made_by(part, theirs.chunked_overlay):
            chunk, left = (_captured(part)[name] for name in ("chunk_size", "left_padding"))
        elif _made_by(part, theirs.sliding_window_bidirectional_overlay):
            window = _captured(part)["sliding_window"]
        elif _made_by(part, theirs.packed_sequence_mask_function):
            documents = _captured(part)["packed_sequence_mask"]
        else:
            inner = recognize(part)
            if inner is None or _twice(inner.documents, documents) or _twice(inner.pattern.window, window):
                return None
            if _twice(inner.pattern.chunk, chunk):
                return None
            causal |= inner.pattern.causal
            window = inner.pattern.window if window is None else window
            if chunk is None:
                chunk, left = inner.pattern.chunk, inner.left
            documents = inner.documents if documents is None else documents
    if chunk is not None and (not causal or window is not None):
        return None
    return Known(Pattern(causal, window, chunk), documents, left)


def _twice(a: Any, b: Any) -> bool:
    return a is not None and b is not None
