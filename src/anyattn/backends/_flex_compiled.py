"""FlexAttention, compiled once per kind of call.

``attend_by_head`` is what torch.compile traces: scores and masks are closures made while tracing, over tensors that
enter as arguments. So no closure is guarded on, and new values, lengths and windows compile nothing. Legend: B batch,
S rows, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import and_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn._errors import Refused
from anyattn.backends._flex_blocks import Tables

#: tl.dot takes no smaller dims.
_SMALLEST_DIM = 16


class Kind(NamedTuple):
    """What is constant in a compiled kernel."""

    cuda: bool
    scale: float
    softcap: float
    causal: bool
    """No key after the query's own position."""
    alibi: int
    """Dims of the slopes; 0 for none."""
    bias: tuple[int, ...] | None
    """The dims of (batch, heads, seq_q, seq_k) that bias spans."""
    mask: tuple[int, ...] | None
    """The same of mask."""
    own_mask: bool
    """The caller's BlockMask takes part."""
    lse: bool
    options: tuple[tuple[str, Any], ...]
    """Kernel options."""
    block: tuple[int, int] = (0, 0)
    """Rows and keys of a block of scores, where there are tables."""
    own_block: tuple[int, int] = (0, 0)
    """Those of the caller's BlockMask, where its own blocks are asked for."""
    states: tuple[int, ...] | None = None
    """The dims of (batch, heads, blocks of rows, blocks of keys) that they span."""


class Terms(NamedTuple):
    """What scores and masks are made of, as tensors. None where there is none."""

    slopes: Tensor | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None
    states: Tensor | None = None
    """int8: the caller's BlockMask by its own blocks, 1 partial and 2 full."""
    left: Tensor | int | None = None
    """int32 (): how far below its own position a query sees."""
    right: Tensor | int | None = None
    shift: Tensor | int | None = None
    """int32 (): the position of the first query, where rows are not packed."""
    sequence: Tensor | None = None
    """int32 (B, S): of each query row, for slopes per sequence."""
    tag_q: Tensor | None = None
    """int32 (B, S): a query sees the keys of its own tag."""
    tag_k: Tensor | None = None
    position_q: Tensor | None = None
    position_k: Tensor | None = None


MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def attend(
    kind: Kind, q: Tensor, k: Tensor, v: Tensor, terms: Terms, tables: Tables | None, own: MaskMod | None
) -> tuple[Tensor, Tensor | None]:
    """(out, lse), out (B, S, H, D), from tensors like it: see ``attend_by_head``."""
    out, lse = attend_by_head(kind, q, k, v, terms, tables, own)
    return out.transpose(1, 2), lse


def attend_by_head(
    kind: Kind, q: Tensor, k: Tensor, v: Tensor, terms: Terms, tables: Tables | None, own: MaskMod | None
) -> tuple[Tensor, Tensor | None]:
    """(out, lse) from (B, S, H, D), out (B, H, S, D), as the kernel has it: a view costs the host least outside.

    Only ever traced: FlexAttention that is not compiled keeps all scores in memory.
    """
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

    if not torch.compiler.is_compiling():
        raise Refused("torch.compile is switched off at this moment, and FlexAttention needs it", lasting=False)
    dim_v, heads = v.shape[-1], q.shape[-2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if kind.cuda:
        q, k, v = (_widened(x) for x in (q, k, v))
    block_mask = None
    if tables is not None:
        block_mask = BlockMask(
            seq_lengths=(q.shape[2], k.shape[2]),
            BLOCK_SIZE=kind.block,
            mask_mod=_mask_mod(kind, terms, own),
            **tables._asdict(),
        )
    score_mod = _score_mod(kind, terms)
    found: Any = flex_attention(  # type: ignore[call-overload]
        q, k, v, score_mod=score_mod, block_mask=block_mask, scale=kind.scale, enable_gqa=heads != k.shape[1],
        kernel_options=dict(kind.options), return_aux=AuxRequest(lse=True) if kind.lse else None,
    )  # fmt: skip
    out, lse = (found[0], found[1].lse) if kind.lse else (found, None)
    return out if out.shape[-1] == dim_v else out[..., :dim_v], lse


def _widened(x: Tensor) -> Tensor:
    missing = _SMALLEST_DIM - x.shape[-1]
    return torch.nn.functional.pad(x, (0, missing)) if missing > 0 else x


def _distance(terms: Terms) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Key position - query position."""
    position_q, position_k, shift = terms.position_q, terms.position_k, terms.shift
    if position_q is not None and position_k is not None:
        return lambda b, i, j: position_k[b, j] - position_q[b, i]
    if shift is not None:
        return lambda b, i, j: j - i - shift
    return lambda b, i, j: j - i


def _at(x: Tensor, dims: tuple[int, ...], b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """The entry of a tensor that has these dims of (batch, heads, seq_q, seq_k), or one that holds for all."""
    place = (b, h, i, j, h - h)
    return x[tuple(place[d] for d in dims)]


def _score_mod(kind: Kind, terms: Terms) -> Any:
    if not (kind.softcap or kind.alibi or kind.bias is not None):
        return None
    distance = _distance(terms)
    slopes, bias, sequence = terms.slopes, terms.bias, terms.sequence

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if kind.softcap:
            score = kind.softcap * torch.tanh(score / kind.softcap)
        if slopes is not None:
            entry = b if sequence is None else sequence[b, i]
            slope = slopes[h] if kind.alibi == 1 else slopes[entry, h]
            score = score - slope * distance(b, i, j).abs()
        if bias is not None and kind.bias is not None:
            score = score + _at(bias, kind.bias, b, h, i, j)
        return score

    return score_mod


def _mask_mod(kind: Kind, terms: Terms, own: MaskMod | None) -> MaskMod:
    from torch.nn.attention.flex_attention import noop_mask

    distance = _distance(terms)
    left, right, mask, states = terms.left, terms.right, terms.mask, terms.states
    tag_q, tag_k = terms.tag_q, terms.tag_k

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = []
        if tag_q is not None and tag_k is not None:
            seen.append(tag_q[b, i] == tag_k[b, j])
        if kind.causal:
            seen.append(distance(b, i, j) <= 0)
        if right is not None:
            seen.append(distance(b, i, j) <= right)
        if left is not None:
            seen.append(distance(b, i, j) >= -left)
        if mask is not None and kind.mask is not None:
            seen.append(_at(mask, kind.mask, b, h, i, j))
        if own is not None:
            allowed = i == i if own is noop_mask else own(b, h, i, j)  # that one returns a constant
            if not isinstance(allowed, Tensor):
                allowed = (i == i) & allowed
            if states is not None and kind.states is not None:
                state = _at(states, kind.states, b, h, i // kind.own_block[0], j // kind.own_block[1])
                allowed = (state == 2) | ((state == 1) & allowed)
            seen.append(allowed)
        # Begun with no constant: torch may keep one as a tensor, in a CUDA graph's memory if it compiles there.
        return reduce(and_, seen) if seen else i == i

    return mask_mod


# --- compiling ---


def kernel_options() -> tuple[tuple[str, Any], ...]:
    """One kernel for all lengths, the one that has a backward; and float32 as float32, which is TF32 otherwise."""
    from torch.nn.attention.flex_attention import FlexKernelOptions

    newer = "BACKEND" in FlexKernelOptions.__annotations__
    kernel = ("BACKEND", "TRITON") if newer else ("FORCE_USE_FLEX_ATTENTION", True)
    return kernel, ("FLOAT32_PRECISION", "'ieee'")


_compiled: dict[Any, Any] = {}


def compiled(kind: Kind, q: Tensor, k: Tensor, v: Tensor, own: MaskMod | None, grad: bool) -> Any:
    """``attend_by_head`` for one kind of call, compiled: takes q, k, v, terms, tables and own.

    Dynamo counts compilations per code object and gives up after eight, so each kind has a code object of its own. The
    kind stands in it as a literal: as an argument, its numbers would become symbols. CUDA kernels are compiled for any
    lengths; those of the CPU for these, since its code generator takes no symbolic sizes where tensors are captured
    (torch 2.13 substitutes one symbol's name within another's).
    """
    key = _key(kind, q, k, v, own, grad)
    function = _compiled.get(key)
    if function is None:
        function = _compiled[key] = torch.compile(_entry(kind), dynamic=kind.cuda, fullgraph=True)
    return function


def forget(kind: Kind, q: Tensor, k: Tensor, v: Tensor, own: MaskMod | None, grad: bool) -> None:
    """Compile the kind anew at its next call."""
    _compiled.pop(_key(kind, q, k, v, own, grad), None)


def _key(kind: Kind, q: Tensor, k: Tensor, v: Tensor, own: MaskMod | None, grad: bool) -> tuple[Any, ...]:
    dims = (q.dtype, q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1])
    if kind.cuda:
        sizes: tuple[Any, ...] = (q.shape[0] > 1, q.shape[1] > 128, k.shape[1] > 128)  # sizes of 1 become constants
    else:
        sizes = (*q.shape, *k.shape)
    return kind, dims, sizes, grad, getattr(own, "__code__", own if own is None else type(own))


def _entry(kind: Kind) -> Any:
    """A function of its own code object, in which the kind is a literal."""
    call = f"attend_by_head({kind!r}, q, k, v, terms, tables, own)"
    source = f"def entry(q, k, v, terms, tables, own):\n    return {call}\n"
    names: dict[str, Any] = {"attend_by_head": attend_by_head, "Kind": Kind}
    exec(compile(source, __file__, "exec"), names)
    return names["entry"]
