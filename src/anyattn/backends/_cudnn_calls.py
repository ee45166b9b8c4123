"""What a call becomes for cuDNN: the recipe of its graph, and the tensors that both directions are given.

Recipes are kept by what they depend on, which is never a total of a packed batch: the number of sequences, the longest
length and the rows are rounded up, so that batches of about the same size share a graph. Extra sequences are empty.
Legend: B batch, S seq, H heads, D head_dim, T rows of a packed batch, N sequences of a graph.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn._call import Call, Rows, Spec
from anyattn._derived import derived, in_graph_memory
from anyattn.backends import _cudnn_graph as graphs
from anyattn.backends._cudnn_graph import Band, Graph, Operand, Recipe, contiguous

Numbers = Sequence[int]


class Recipes:
    """Both graphs of one kind of call, looked up once: a recipe is long, and its hash takes microseconds."""

    __slots__ = ("_graphs", "backward", "forward")

    def __init__(self, forward: Recipe, backward: Recipe) -> None:
        self.forward, self.backward = forward, backward
        self._graphs: list[Graph | None] = [None, None]

    def forward_graph(self) -> Graph:
        """Raises Refused where there is none."""
        return self._graphs[0] or self._keep(0, self.forward)

    def backward_graph(self, dout: Tensor | None = None, out: Tensor | None = None) -> Graph:
        """Of the backward that follows. dout and out of a dense batch may be laid out otherwise than a fresh out.

        Raises Refused where there is none.
        """
        if dout is None or out is None or (dout.is_contiguous() and out.is_contiguous()):
            return self._graphs[1] or self._keep(1, self.backward)
        return graphs.graph(
            self.backward._replace(
                out=_dense_operand(out.shape, out.stride()), dout=_dense_operand(dout.shape, dout.stride())
            )
        )

    def _keep(self, which: int, recipe: Recipe) -> Graph:
        found = self._graphs[which] = graphs.graph(recipe)
        return found


class Described(NamedTuple):
    """A call as cuDNN sees it."""

    recipes: Recipes
    tensors: dict[int, Tensor]
    """What both directions are given, by the names of ``_cudnn_graph``."""
    by_token: bool = False
    """Stats are (..., S, H), or (T, H), and not (B, H, S)."""


def describe(call: Call, *, backward: bool = False) -> Described:
    """The recipes and inputs of a call; for its backward, those of the forward that one belongs to."""
    if call.rows_q is not None:
        return _packed(call)
    return _growing(call) if not backward and _grows(call) else _dense(call)


def recipes_of(recipe: Recipe, spec: Spec) -> Recipes:
    """Both directions, from a recipe that holds what either needs.

    With bounds on its rows, backward goes by q's offsets where it writes dq: seen with cuDNN 9.19, a q of another row
    stride than dq's makes dq wrong, or the kernel die. Packed queries are therefore given to it as a fresh tensor.
    """
    forward = recipe._replace(
        stats=recipe.stats if spec.need_lse else None, rows=None, grads=(), bias_grad=False, deterministic=False
    )  # fmt: skip
    q = recipe.q if recipe.rows is None else recipe.grads[0]
    return Recipes(forward, recipe._replace(backward=True, q=q, dout=recipe.out))


def aligned(x: Tensor) -> Tensor:
    """x, or a copy that cuDNN can read: rows of one head without holes, beginning at multiples of 16 bytes.

    Where they do not, results are wrong without a word, or the kernel dies
    (https://github.com/NVIDIA/cudnn-frontend/issues/1571); 1.32 checks it.
    """
    if x.data_ptr() % 16 == 0:
        if x.is_contiguous():
            return x
        *outer, last = x.stride()
        if last == 1 and all(n == 1 or (s > 0 and s % 8 == 0) for s, n in zip(outer, x.shape, strict=False)):
            return x
    return x.clone(memory_format=torch.contiguous_format)


# --- dense batches -------------------------------------------------------------------------------------------------


def _dense_operand(shape: Numbers, strides: Numbers) -> Operand:
    """Of (B, S, H, D). The stride of a dim of one element may be anything: it is made a legal one."""
    batch, seq, heads, dim = shape
    of_batch, of_seq, of_heads = (s if n > 1 else dim for s, n in zip(strides, (batch, seq, heads), strict=False))
    return Operand((batch, heads, seq, dim), (of_batch, of_heads, of_seq, 1))


def _band(spec: Spec, seq_q: int, seq_k: int) -> tuple[Band, bool]:
    """What a dense batch's queries see, and whether cuDNN must be told the lengths to take it.

    Positions from the end are turned into positions from the start where they can be: only those go with a bias and
    with dropout.
    """
    left, right = None if spec.left is None else spec.left + 1, spec.right
    shift = 0 if spec.top_left or (left is None and right is None) else seq_k - seq_q
    if shift and (right is None or right + shift >= 0) and (left is None or left > shift):
        left, right, shift = None if left is None else left - shift, None if right is None else right + shift, 0
    return Band(left, right, bool(shift)), (left is not None or bool(shift)) and seq_q > seq_k


@lru_cache(maxsize=1024)
def _dense_recipes(
    device: int, dtype: torch.dtype, q: tuple[Numbers, Numbers], k: tuple[Numbers, Numbers],
    v: tuple[Numbers, Numbers], bias: tuple[Numbers, Numbers] | None, spec: Spec,
) -> Recipes:  # fmt: skip
    batch, seq_q, heads, _ = q[0]
    band, lengths = _band(spec, seq_q, k[0][1])
    recipe = Recipe(
        device, dtype, False, _dense_operand(*q), _dense_operand(*k), _dense_operand(*v),
        contiguous((batch, heads, seq_q, v[0][3])),
        Operand((batch, heads, seq_q, 1), (heads * seq_q, seq_q, 1, 1)),
        spec.scale, band, spec.dropout,
        bias=None if bias is None else Operand(_four(bias[0]), _four(bias[1])),
        lengths=lengths,
        grads=tuple(contiguous((batch, shape[2], shape[1], shape[3])) for shape, _ in (q, k, v)),
        bias_grad=spec.bias_grad, deterministic=spec.deterministic,
    )  # fmt: skip
    return recipes_of(recipe, spec)


def _four(numbers: Numbers) -> tuple[int, int, int, int]:
    a, b, c, d = numbers
    return a, b, c, d


def _dense(call: Call) -> Described:
    q, k, v = aligned(call.q), aligned(call.k), aligned(call.v)
    tensors = {graphs.Q: q, graphs.K: k, graphs.V: v}
    seq_q, seq_k = q.shape[1], k.shape[1]
    bias = _bias(call, seq_q, seq_k)
    if bias is not None:
        tensors[graphs.BIAS] = bias
    recipes = _dense_recipes(
        q.device.index or 0, q.dtype, (q.shape, q.stride()), (k.shape, k.stride()), (v.shape, v.stride()),
        None if bias is None else (bias.shape, bias.stride()), call.spec,
    )  # fmt: skip
    if recipes.forward.lengths:
        for name, length in ((graphs.LEN_Q, seq_q), (graphs.LEN_K, seq_k)):
            tensors[name] = torch.full((q.shape[0],), length, dtype=torch.int32, device=q.device)
    return Described(recipes, tensors)


def _bias(call: Call, seq_q: int, seq_k: int) -> Tensor | None:
    """What is added to the scores, (1 or B, 1 or H, S, K): a mask is -inf in it."""
    bias = call.bias
    if call.mask is not None:
        zero = torch.zeros((), dtype=call.q.dtype, device=call.q.device)
        bias = torch.where(call.mask, zero if bias is None else bias, float("-inf"))
    return None if bias is None else bias.expand(*bias.shape[:2], seq_q, seq_k).contiguous()


# --- dense batches whose lengths change from call to call ----------------------------------------------------------


#: A model that generates is given at most so many queries at a time.
FEW = 16


def _grows(call: Call) -> bool:
    """Whether there are likely to be more keys at the next call, as where a model generates: a graph for each is slow.

    A rule of the call alone: the same call gives the same bits, whatever came before.
    """
    seq_q, seq_k = call.q.shape[1], call.k.shape[1]
    plain = call.bias is None and call.mask is None and not call.spec.dropout
    return plain and seq_q <= FEW < seq_k and not call.spec.needs_backward


#: Tables of offsets of such a batch.
_OF_K, _OF_V, _OF_Q, _OF_OUT, _OF_STATS = range(5)


@lru_cache(maxsize=1024)
def _growing_recipes(
    device: int, dtype: torch.dtype, q: tuple[Numbers, Numbers], k: tuple[Numbers, Numbers],
    v: tuple[Numbers, Numbers], spec: Spec,
) -> Recipes:  # fmt: skip
    """Shapes are those of the graph, with room; strides are (seq, heads)."""
    batch, seq_q, heads, _ = q[0]

    def given(shape: Numbers, strides: Numbers, table: int) -> Operand:
        entries, seq, of, dim = shape
        return Operand(
            (entries, of, seq, dim), (seq * strides[0], strides[1] if of > 1 else dim, strides[0], 1), table
        )  # fmt: skip

    left = None if spec.left is None else spec.left + 1
    from_end = not (spec.top_left or (left is None and spec.right is None))
    recipe = Recipe(
        device, dtype, False, given(*q, _OF_Q), given(*k, _OF_K), given(*v, _OF_V),
        contiguous((batch, heads, seq_q, v[0][3]), _OF_OUT), contiguous((batch, heads, seq_q, 1), _OF_STATS),
        spec.scale, Band(left, spec.right, from_end), lengths=True, wide=True,
    )  # fmt: skip
    return recipes_of(recipe, spec)


def _growing(call: Call) -> Described:
    q, k, v = aligned(call.q), aligned(call.k), aligned(call.v)
    (batch, seq_q, heads, dim), seq_k, dim_v = q.shape, k.shape[1], v.shape[3]
    # cuDNN has a kernel for one query, four times as fast; given lengths, its lse is wrong (seen with 9.19).
    room_q = 2 if call.spec.need_lse and seq_q == 1 else seq_q
    of_q = ((batch, room_q, heads, dim), (q.stride(1) if seq_q > 1 else heads * dim, q.stride(2)))
    recipes = _growing_recipes(
        q.device.index or 0, q.dtype, of_q,
        ((batch, room(seq_k), *k.shape[2:]), k.stride()[1:3]), ((batch, room(seq_k), *v.shape[2:]), v.stride()[1:3]),
        call.spec,
    )  # fmt: skip
    strides = (k.stride(0), v.stride(0), q.stride(0), seq_q * heads * dim_v, seq_q * heads)
    make = _entries.__wrapped__ if q.is_cuda and in_graph_memory(q.get_device()) else _entries
    tables = make(q.device, graphs.current_stream(q.device), batch, strides, seq_q, seq_k)
    return Described(recipes, {graphs.Q: q, graphs.K: k, graphs.V: v, **tables}, by_token=True)


@lru_cache(maxsize=256)
def _entries(
    device: torch.device, stream: int, batch: int, strides: tuple[int, ...], seq_q: int, seq_k: int
) -> dict[int, Tensor]:
    """Offsets of equal entries, and their lengths. Kept by stream, on which they are written."""
    lengths = {
        name: torch.full((batch,), length, dtype=torch.int32, device=device)
        for name, length in ((graphs.LEN_Q, seq_q), (graphs.LEN_K, seq_k))
    }
    entries = torch.arange(batch + 1, device=device)
    return {**lengths, **{graphs.RAGGED + i: entries * stride for i, stride in enumerate(strides)}}


# --- packed batches ------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """Packed recipes, their sequences, and the row strides of their tables of offsets: of k's side, then of q's."""

    recipes: Recipes
    sequences: int
    of_k: tuple[int, ...]
    of_q: tuple[int, ...]
    key: Hashable
    """Of these tables."""


def sequences(count: int) -> int:
    """The number of sequences of a graph: a power of two."""
    return 1 << (count - 1).bit_length()


def room(length: int) -> int:
    """Longest length, or rows, of a graph: 128, or four steps to each power of two."""
    if length <= 128:
        return 128
    step = 1 << (length - 1).bit_length() - 3
    return -(-length // step) * step


@lru_cache(maxsize=1024)
def _packed_plan(
    device: int, dtype: torch.dtype, q: tuple[Numbers, Numbers], k: tuple[Numbers, Numbers],
    v: tuple[Numbers, Numbers], given_sequences: int, given_longest: tuple[int, int], spec: Spec,
) -> _Plan:  # fmt: skip
    """q, k and v are shapes and strides. q's own row stride is the last table: backward has none."""
    (total, heads, dim), (total_k, heads_k, _), (_, _, dim_v) = q[0], k[0], v[0]
    row_q, row_k, row_v = q[1][0], k[1][0], v[1][0]
    count = sequences(given_sequences)
    longest, rows = (room(given_longest[0]), room(given_longest[1])), (room(total), room(total_k))
    wide = max(total * max(row_q, heads * dim_v), total_k * max(row_k, row_v)) >= 1 << 31
    of_k = tuple(dict.fromkeys((heads_k * dim, heads_k * dim_v, row_k, row_v)))
    of_q = tuple(dict.fromkeys((heads * dim, heads * dim_v, heads, row_q)))
    table_k = {stride: i for i, stride in enumerate(of_k)}
    table_q = {stride: i + len(of_k) for i, stride in enumerate(of_q)}

    def given(x: tuple[Numbers, Numbers], seq: int, tables: dict[int, int]) -> Operand:
        (_, of_heads, width), (row, head, _) = x
        return Operand((count, of_heads, seq, width), (seq * row, head if of_heads > 1 else width, row, 1), tables[row])

    def fresh(side: int, of_heads: int, width: int) -> Operand:
        tables = table_k if side else table_q
        return contiguous((count, of_heads, longest[side], width), tables[of_heads * width])

    left = None if spec.left is None else spec.left + 1
    from_end = not (spec.top_left or spec.equal_lengths or (left is None and spec.right is None))
    recipe = Recipe(
        device, dtype, False, given(q, longest[0], table_q), given(k, longest[1], table_k),
        given(v, longest[1], table_k), fresh(0, heads, dim_v), fresh(0, heads, 1),
        spec.scale, Band(left, spec.right, from_end), spec.dropout, lengths=True, wide=wide, rows=rows,
        grads=(fresh(0, heads, dim), fresh(1, heads_k, dim), fresh(1, heads_k, dim_v)),
        deterministic=spec.deterministic,
    )  # fmt: skip
    return _Plan(recipes_of(recipe, spec), count, of_k, of_q, ("cudnn", count, of_k, of_q, wide))


def _found_plan(q: Tensor, k: Tensor, v: Tensor, rows_q: Rows, rows_k: Rows, spec: Spec) -> _Plan:
    return _packed_plan(
        q.device.index or 0, q.dtype, (q.shape, q.stride()), (k.shape, k.stride()), (v.shape, v.stride()),
        rows_q.lengths.shape[0], (rows_q.max_seqlen, rows_k.max_seqlen), spec,
    )  # fmt: skip


def _packed(call: Call) -> Described:
    rows_q, rows_k = call.rows_q, call.rows_k
    assert rows_q is not None
    assert rows_k is not None
    q, k, v = aligned(call.q), aligned(call.k), aligned(call.v)
    key = (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), rows_q.lengths.shape[0], rows_q.max_seqlen,
        rows_k.max_seqlen, q.dtype, q.device,
    )  # fmt: skip
    # The last one: most models call alike from layer to layer, and comparing costs less than hashing.
    last: tuple[Any, _Plan] | None = call.spec.memo.get("cudnn")
    if last is None or last[0] != key:
        last = call.spec.memo["cudnn"] = (key, _found_plan(q, k, v, rows_q, rows_k, call.spec))
    plan = last[1]
    tables = derived(rows_q, rows_k, plan.key, lambda: _tables(rows_q, rows_k, plan))
    return Described(plan.recipes, {graphs.Q: q, graphs.K: k, graphs.V: v, **tables}, by_token=True)


def _tables(rows_q: Rows, rows_k: Rows, plan: _Plan) -> dict[int, Tensor]:
    """Ragged offsets, in elements, and lengths."""
    made: list[Tensor] = []
    lengths = []
    for rows, strides in ((rows_k, plan.of_k), (rows_q, plan.of_q)):
        extra = plan.sequences - rows.lengths.shape[0]
        starts = rows.starts.long() if plan.recipes.forward.wide else rows.starts
        starts = torch.cat([starts, starts[-1:].expand(extra)]) if extra else starts
        made += [starts * stride for stride in strides]
        lengths.append(torch.nn.functional.pad(rows.lengths, (0, extra)))
    tables = {graphs.RAGGED + i: offsets for i, offsets in enumerate(made)}
    return {graphs.LEN_K: lengths[0], graphs.LEN_Q: lengths[1], **tables}
