"""A call as FlexAttention takes it: the kind that is compiled, the tensors, the block tables.

Legend: B batch entries, S query rows, T packed rows. Packed rows are one entry (1, T), or one entry per sequence where
a bias or a mask has them so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from anyattn import _derived
from anyattn._call import Call, Rows, Spec
from anyattn.backends import _flex_blocks
from anyattn.backends._flex_blocks import Blocks, Side, Tables
from anyattn.backends._flex_compiled import Kind, Terms

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

#: Rows and keys of a block of scores: FlexAttention's own choice.
_BLOCK = 128


class Run(NamedTuple):
    """What the compiled function gets, beside q, k and v."""

    kind: Kind
    terms: Terms
    tables: Tables | None
    own: Any


def run_of(call: Call, lse: bool, options: tuple[tuple[str, Any], ...]) -> Run:
    """All that a call's compiled function needs; options are the kernel's. Kept where a packing says all of it."""
    given = any(x is not None for x in (call.alibi, call.bias, call.mask, call.block_mask))
    if given or call.rows_q is None or call.rows_k is None:
        return _made_run(call, lse, options)
    key = ("run", call.q.is_cuda, call.q.shape[0], call.k.shape[0], call.spec, lse, options)
    found: Run = derived(call.rows_q, call.rows_k, key, lambda: _made_run(call, lse, options))
    return found


def _made_run(call: Call, lse: bool, options: tuple[tuple[str, Any], ...]) -> Run:
    spec, own = call.spec, None if call.block_mask is None else call.block_mask.mask_mod
    (bias, bias_dims), (mask, mask_dims) = spanned(call.bias), spanned(call.mask)
    terms = Terms(slopes=call.alibi, bias=bias, mask=mask)
    if call.rows_q is not None:
        terms = _packed_terms(call, terms)
    elif not (spec.top_left or spec.equal_lengths) and (_positional(spec) or call.alibi is not None):
        terms = terms._replace(shift=_number(call.k.shape[1] - call.q.shape[1], call))
    if spec.left is not None:
        terms = terms._replace(left=_number(spec.left, call))
    if spec.right:
        terms = terms._replace(right=_number(spec.right, call))
    kind = Kind(
        cuda=call.q.is_cuda, scale=spec.scale, softcap=spec.softcap, causal=spec.right == 0,
        alibi=0 if call.alibi is None else call.alibi.ndim, bias=bias_dims, mask=mask_dims, own_mask=own is not None,
        lse=lse, options=options,
    )  # fmt: skip
    if call.rows_q is None and mask is None and own is None and not _positional(spec):
        return Run(kind, terms, None, None)
    sparsity = _sparsity(call)
    if sparsity.states is not None and call.block_mask is not None:
        states, dims = spanned(sparsity.states)
        terms = terms._replace(states=states)
        kind = kind._replace(states=dims, own_block=(call.block_mask.BLOCK_SIZE[0], call.block_mask.BLOCK_SIZE[1]))
    return Run(kind._replace(block=sparsity.block), terms, sparsity.tables, own)


def _positional(spec: Spec) -> bool:
    return spec.left is not None or spec.right is not None


def _number(value: int, call: Call) -> Tensor | int:
    """A number on the device; written there by a kernel, so that nothing waits and a CUDA graph can hold it.

    In a compiled region it stays what it is: a constant, or a symbol.
    """
    if torch.compiler.is_compiling():
        return value
    return torch.full((), value, dtype=torch.int32, device=call.q.device)


def spanned(x: Tensor | None) -> tuple[Tensor | None, tuple[int, ...] | None]:
    """A broadcast (batch, heads, seq_q, seq_k) tensor without its dims of size 1, and which dims are left; 4: none."""
    if x is None:
        return None, None
    dims = tuple(d for d in range(4) if x.shape[d] != 1)
    return (x.squeeze(tuple(d for d in range(4) if d not in dims)), dims) if dims else (x.reshape(1), (4,))


# --- packed batches and block tables ---


def derived(rows_q: Rows, rows_k: Rows, key: Hashable, make: Callable[[], Any]) -> Any:
    """What is made once for a packing; in a compiled region, what is part of the graph."""
    return make() if torch.compiler.is_compiling() else _derived.derived(rows_q, rows_k, key, make)


def entries_of(call: Call) -> int:
    """Whether packed rows are run as one entry, or one entry per sequence: as bias and masks have them."""
    assert call.rows_q is not None
    sequences = call.rows_q.lengths.shape[0]
    mask = call.block_mask
    if call.bias is not None or call.mask is not None:
        return sequences
    return sequences if mask is not None and mask.shape[-2] != call.q.shape[0] else 1


class _Places(NamedTuple):
    """Where the rows of a packed batch stand."""

    queries: Side
    keys: Side
    tag_q: Tensor
    """int32 (entries, S): a query sees the keys of its own tag."""
    tag_k: Tensor


def _places(call: Call) -> _Places:
    rows_q, rows_k = call.rows_q, call.rows_k
    assert rows_q is not None
    assert rows_k is not None
    entries, top_left = entries_of(call), call.spec.top_left
    len_q, len_k = call.q.shape[0] // entries, call.k.shape[0] // entries

    def make() -> _Places:
        queries, keys = _flex_blocks.sides(rows_q, rows_k, entries, len_q, len_k, top_left)
        tags = queries.sequence.masked_fill(~queries.real, -1), keys.sequence.masked_fill(~keys.real, -2)
        return _Places(queries, keys, *tags)

    found: _Places = derived(rows_q, rows_k, ("places", entries, len_q, len_k, top_left), make)
    return found


def _packed_terms(call: Call, terms: Terms) -> Terms:
    queries, keys, tag_q, tag_k = _places(call)
    placed = _positional(call.spec) or call.alibi is not None
    return terms._replace(
        tag_q=tag_q,
        tag_k=tag_k,
        position_q=queries.position if placed else None,
        position_k=keys.position if placed else None,
        sequence=queries.sequence if call.alibi is not None and call.alibi.ndim == 2 else None,
    )


class _Sparsity(NamedTuple):
    """Which blocks of scores the kernel visits."""

    tables: Tables
    block: tuple[int, int]
    states: Tensor | None = None
    """int8 (B, H, R, C): the caller's BlockMask by its own blocks, 1 partial and 2 full, where those are too small."""


def _sparsity(call: Call) -> _Sparsity:
    """Made once for a packing, or for lengths and a window; a BlockMask with a window, anew at each call."""
    if torch.compiler.is_compiling():
        return _made(call)
    spec, mask = call.spec, call.block_mask
    positions = (spec.left, spec.right, spec.top_left, call.mask is not None, spec.needs_backward)
    if call.rows_q is not None and call.rows_k is not None:
        key = ("tables", entries_of(call), call.q.shape[0], call.k.shape[0], *positions)
        if mask is None:
            found: _Sparsity = derived(call.rows_q, call.rows_k, key, lambda: _made(call))
            return found
        kept: list[tuple[BlockMask, _Sparsity]] = derived(call.rows_q, call.rows_k, (*key, "own"), list)
        if not kept or kept[0][0] is not mask:
            kept[:] = [(mask, _made(call))]
        return kept[0][1]
    if mask is not None or (call.q.is_cuda and _derived.in_graph_memory(call.q.get_device())):
        return _made(call)
    dense = (call.q.device, call.q.shape[1], call.k.shape[1], *positions)
    made = _dense.get(dense)
    if made is None:
        if len(_dense) >= 256:
            _dense.clear()
        made = _dense[dense] = _made(call)
    return made


#: Of batches without padding, by device, lengths and window.
_dense: dict[Any, _Sparsity] = {}


def _made(call: Call) -> _Sparsity:
    """From positions, a packing and a BlockMask together."""
    mask, backward = call.block_mask, call.spec.needs_backward
    own, block, states = None, (_BLOCK, _BLOCK), None
    if mask is not None:
        own, block = _own_blocks(mask), (mask.BLOCK_SIZE[0], mask.BLOCK_SIZE[1])
        multiple = smallest_block(call.q)
        if block[0] % multiple or block[1] % multiple:
            larger = (math.lcm(block[0], multiple), math.lcm(block[1], multiple))
            states = own.partial.to(torch.int8) + 2 * own.full.to(torch.int8)
            own, block = _flex_blocks.coarser(own, (larger[0] // block[0], larger[1] // block[1])), larger
        elif call.rows_q is None and not _positional(call.spec):
            return _Sparsity(_given_tables(mask, backward), block)
    if call.rows_q is not None:
        places = _places(call)
        blocks = _flex_blocks.packed_blocks(call.spec, places.queries, places.keys, block)
    else:
        blocks = _flex_blocks.dense_blocks(call.spec, call.q.shape[1], call.k.shape[1], block, call.q.device)
    if call.mask is not None:  # which scores it lets through, only the kernel asks
        blocks = Blocks(blocks.partial | blocks.full, torch.zeros_like(blocks.full))
    if own is not None:
        blocks = _flex_blocks.intersected(own, blocks)
    return _Sparsity(_flex_blocks.ordered(blocks, backward), block, states)


def smallest_block(q: Tensor) -> int:
    """What block sizes must be multiples of: on CUDA the kernels' tiles are up to 128 rows."""
    return _BLOCK if q.is_cuda else 1


def _own_blocks(mask: BlockMask) -> Blocks:
    columns = -(-mask.shape[-1] // mask.BLOCK_SIZE[1])
    partial = _flex_blocks.unordered(mask.kv_num_blocks, mask.kv_indices, columns)
    if mask.full_kv_num_blocks is None or mask.full_kv_indices is None:
        return Blocks(partial, torch.zeros_like(partial))
    return Blocks(partial, _flex_blocks.unordered(mask.full_kv_num_blocks, mask.full_kv_indices, columns))


def _given_tables(mask: BlockMask, backward: bool) -> Tables:
    """A BlockMask's own tensors."""
    if backward and mask.q_indices is None:
        return _flex_blocks.ordered(_own_blocks(mask), backward)
    names = Tables._fields if backward else Tables._fields[:4]
    return Tables(**{name: getattr(mask, name) for name in names})
