"""Problems for context parallelism: one description, and the tensors of the whole batch, the same on every rank.

Padding is hostile: large finite values, or NaN where the packing asks for sanitizing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

import anyattn
from cases import DTYPES, Imagined
from context_pool import Mesh, Ranks
from oracle import Span, Terms

CAUSAL = Terms(causal=True)


@dataclass(frozen=True)
class ContextCase:
    """A whole batch, how it is divided, and what is asked."""

    comm: str = "all_gather"
    ranks: int | tuple[int, int] = 2
    """Or (p2p, a2a)."""
    lengths: tuple[int, ...] | int = (37, 0, 1, 23, 8)
    """Of packed sequences; or one, of unpacked 4-D tensors."""
    keys: tuple[int, ...] | int | None = None
    """The same for cross-attention's keys."""
    batch: int = 1
    """Of 4-D tensors."""
    gap: int = 1
    """Packed sequences have room for a multiple of this."""
    first: int = 0
    """Padding before the first sequence."""
    tail: int = 0
    """Rows of the tensors beyond those of the packing."""
    placement: str = "auto"
    pad_to_multiple_of: int = 1
    terms: Terms = CAUSAL
    scores: str = ""
    """Any of sink, sink_low, alibi, alibi_sequences, bias, bias_row, mask, separated by spaces."""
    heads: str = "8/4"
    dims: str = "8"
    dtype: str = "float64"
    asks: str = "lse_grad"
    """lse_grad, grad, forward (lse too), out, deterministic."""
    told: bool = True
    """Whether the plan is told heads, head dims and features."""
    garbage: float = 1e4
    backend: str = "reference"
    imagined: Imagined | None = None
    seed: int = 0

    @property
    def group(self) -> Ranks:
        """What the pool is asked for."""
        if isinstance(self.ranks, int):
            return self.ranks
        return Mesh(self.ranks, ("p2p", "a2a"))

    @property
    def world(self) -> int:
        """How many ranks."""
        return self.ranks if isinstance(self.ranks, int) else self.ranks[0] * self.ranks[1]

    @property
    def head_ranks(self) -> int:
        """How many ranks share the heads."""
        if isinstance(self.ranks, tuple):
            return self.ranks[1]
        return self.ranks if self.comm == "a2a" else 1

    @property
    def is_packed(self) -> bool:
        """Whether tensors are (rows, heads, dim)."""
        return not isinstance(self.lengths, int)

    @property
    def parts(self) -> frozenset[str]:
        """What is added to or hidden from the scores."""
        return frozenset(self.scores.split())

    def __str__(self) -> str:
        plain = ContextCase()
        changed = (f for f in fields(self) if getattr(self, f.name) != getattr(plain, f.name))
        return ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in changed)


def refusal(case: ContextCase) -> str | None:
    """Why the case cannot work, as the design says; None: it must."""
    packed_bias = case.is_packed and case.parts & {"bias", "bias_row", "mask"}
    gathered_bias = case.parts & {"bias", "bias_row", "mask"} and case.comm != "all_gather"
    causal = case.terms.causal or (case.terms.window is not None and case.terms.window[1] == 0)
    if packed_bias:
        return "a tensor bias or mask goes with 4-D tensors"
    if gathered_bias:
        return "a tensor bias or mask needs all_gather"
    if case.keys is not None and case.comm in ("p2p", "a2a+p2p"):
        return "cross-attention needs all_gather or a2a"
    if case.parts & {"alibi", "alibi_sequences"} and not causal and case.comm != "a2a":
        return "ALiBi without causal needs a2a"
    if int(case.heads.partition("/")[0]) % case.head_ranks:
        return "the ranks that share heads must divide them"
    return None


# --- the whole batch -----------------------------------------------------------------------------------------------


@dataclass
class Side:
    """Where the rows of queries, or of keys, lie."""

    batch: int
    rows: int
    runs: list[tuple[int, int, int]]
    """(entry, start, length) per sequence."""
    given: Any
    """What ``ContextParallel.plan`` takes."""


@dataclass
class Whole:
    """The tensors of a case, on the CPU, the same on every rank. They are (B, S, H, D), packed ones with B = 1."""

    case: ContextCase
    q_side: Side
    k_side: Side
    tensors: dict[str, Tensor | None] = field(default_factory=dict)
    """As the oracle takes them: q, k, v, sink, alibi_slopes, bias."""
    mask: Tensor | None = None
    dout: Tensor | None = None
    dlse: Tensor | None = None

    @property
    def spans(self) -> list[Span]:
        """For the oracle."""
        return [Span(e, a, n, b, m) for (e, a, n), (_, b, m) in zip(self.q_side.runs, self.k_side.runs, strict=True)]

    def real(self, side: Side) -> Tensor:
        """bool (B, S): which rows belong to a sequence."""
        real = torch.zeros(side.batch, side.rows, dtype=torch.bool)
        for entry, start, length in side.runs:
            real[entry, start : start + length] = True
        return real


def _side(case: ContextCase, lengths: tuple[int, ...] | int, device: torch.device | str) -> Side:
    if isinstance(lengths, int):
        return Side(case.batch, lengths, [(b, 0, lengths) for b in range(case.batch)], lengths)
    starts, row = [], case.first
    for n in lengths:
        starts.append(row)
        row += -(-n // case.gap) * case.gap
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    padded = torch.tensor([*starts, row], dtype=torch.int32, device=device)
    packing = anyattn.Packing(cu, padded, sanitize=case.garbage != case.garbage)
    return Side(1, row, [(0, s, n) for s, n in zip(starts, lengths, strict=True)], packing)


def build(case: ContextCase, device: torch.device | str = "cpu") -> Whole:
    """The whole batch; offsets of packings on a device."""
    q_side = _side(case, case.lengths, device)
    whole = Whole(case, q_side, q_side if case.keys is None else _side(case, case.keys, device))
    generator = torch.Generator().manual_seed(case.seed)
    dtype = DTYPES[case.dtype]

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def rows(side: Side, *rest: int, dtype: torch.dtype = dtype) -> Tensor:
        x = draw(side.batch, side.rows, *rest, dtype=dtype)
        return torch.where(whole.real(side).view(side.batch, side.rows, *(1 for _ in rest)), x, x * case.garbage)

    heads, kv_heads = pair(case.heads)
    dim, dim_v = pair(case.dims)
    whole.tensors = {
        "q": rows(q_side, heads, dim), "k": rows(whole.k_side, kv_heads, dim), "v": rows(whole.k_side, kv_heads, dim_v)
    }  # fmt: skip
    if {"sink", "sink_low"} & case.parts:
        whole.tensors["sink"] = draw(heads, dtype=torch.bfloat16 if "sink_low" in case.parts else torch.float32)
    if {"alibi", "alibi_sequences"} & case.parts:
        shape = (len(q_side.runs), heads) if "alibi_sequences" in case.parts else (heads,)
        whole.tensors["alibi_slopes"] = draw(*shape, dtype=torch.float32).abs()
    if "bias" in case.parts:
        whole.tensors["bias"] = draw(q_side.batch, 1, q_side.rows, whole.k_side.rows)
    if "bias_row" in case.parts:
        whole.tensors["bias"] = draw(heads, 1, whole.k_side.rows)
    if "mask" in case.parts:
        whole.mask = draw(1, heads, q_side.rows, whole.k_side.rows, dtype=torch.float32) > -0.5
        whole.mask[0, :, q_side.rows // 2 : q_side.rows // 2 + 1] = False  # a row that sees nothing
    if case.asks not in ("forward", "out"):
        whole.dout = rows(q_side, heads, dim_v)
    if case.asks == "lse_grad":
        whole.dlse = rows(q_side, heads, dtype=torch.float32).transpose(1, 2)
    return whole


def pair(text: str) -> tuple[int, int]:
    first, _, second = text.partition("/")
    return int(first), int(second or first)
