"""What travels between the core and a backend: ``Call`` in, ``Result`` and ``Gradients`` out.

Shape legend: B batch, S seq, H heads, D head_dim, T rows of a packed batch, N sequences.

In this contract lse is canonical: natural log, float32 (float64 for float64 inputs), -inf for a row that sees no key,
(B, H, S) or (H, T). Adapters convert both ways. What lies outside the rows of a call is undefined, in out, lse and
gradients: the core takes only the rows it asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

from anyattn._capability import Capability
from anyattn._environment import Probe

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Where the sequences of a packed tensor lie. Tensors are int32 on the tensor's device.

    For kernels that know used lengths: ``starts`` and ``lengths``. For kernels that do not: ``as_queries`` and
    ``as_keys``, offsets in which each gap is two more sequences, its rows as queries without keys, then as keys
    without queries. With ``gaps`` False, ``starts`` alone says all.
    """

    table: Tensor
    """What the other four are views of: the batch's identity, for what is derived from it."""
    starts: Tensor
    """(N + 1,): first row of each sequence, then the end of the last one's room."""
    lengths: Tensor
    """(N,): real rows of each sequence."""
    as_queries: Tensor
    """(3 N + 3,)"""
    as_keys: Tensor
    """(3 N + 3,)"""
    max_seqlen: int
    """At least the longest length."""
    gaps: bool
    """Rows outside every sequence may exist before the last sequence's end."""
    host: tuple[tuple[int, int], ...] | None
    """(start, length) per sequence where the offsets lie on the CPU, else None."""


@dataclass(frozen=True, slots=True)
class Spec:
    """The numbers of a call, in one spelling: causal is ``right == 0``, None is unbounded, 0.0 is none."""

    scale: float
    softcap: float
    left: int | None
    right: int | None
    top_left: bool
    dropout: float
    deterministic: bool
    need_lse: bool
    equal_lengths: bool = False
    """Every key sequence is known to be as long as its query sequence: alignments coincide."""
    sees_key: bool = False
    """Every real query row is known to see a key, so that no kernel's lse of an empty row can appear."""
    needs_backward: bool = False
    """A backward is expected to follow."""
    bias_grad: bool = False
    """The gradient of bias is asked for."""
    num_splits: int = 1
    """In how many parts forward takes the keys of a block of queries, to be merged; 0: as the kernel chooses."""
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """A backend's own, for what it makes of these numbers: there is one Spec per kind of call."""


class Call(NamedTuple):
    """One problem for a kernel: never empty, never on a device that the backend did not declare.

    A NamedTuple because it is made at every call: a frozen dataclass costs four times as much.
    """

    q: Tensor
    """(B, S, H, D) of any strides, or (T, H, D)."""
    k: Tensor
    v: Tensor
    spec: Spec
    kernel: str
    """Which of the backend's kernels was chosen."""
    rows_q: Rows | None = None
    """With packed tensors; None means dense."""
    rows_k: Rows | None = None
    sink: Tensor | None = None
    """(H,), only where the kernel declared that it applies such a sink itself: out and lse then include it."""
    alibi: Tensor | None = None
    """(H,) or (N, H), of any float dtype."""
    bias: Tensor | None = None
    """Broadcastable to (B, H, S, Sk); 4-D."""
    mask: Tensor | None = None
    """bool, broadcastable to (B, H, S, Sk); 4-D."""
    block_mask: BlockMask | None = None
    seed: Tensor | None = None
    """int64 (2,) on the CPU: for dropout, where the caller drew it; else the kernel draws its own."""
    out: Tensor | None = None
    """Where the caller would have out, a slice of something larger: a backend may write it there and return that very
    tensor. The caller copies what lies elsewhere."""
    dq: Tensor | None = None
    """The same for dq, in backward."""
    dk: Tensor | None = None
    """The same for dk, which is given together with dv; what heads share is summed already."""
    dv: Tensor | None = None


class Result(NamedTuple):
    """What forward returns."""

    out: Tensor
    lse: Tensor | None
    """None only if the spec did not need it."""
    rng: Tensor | None = None
    """int64 (2,), on any device: what backward needs to repeat dropout."""
    held: Any = None
    """Whatever else backward would gladly have; opaque, and lost under torch.compile. With it, nothing but padding is
    written to in out and lse, and their versions stay."""


class Saved(NamedTuple):
    """What backward gets besides the call: the final out and lse, sinks included, zero and -inf in padding."""

    out: Tensor
    lse: Tensor
    rng: Tensor | None
    held: Any = None
    """As forward returned it, or None: backward must do without."""


class Gradients(NamedTuple):
    """What backward returns."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None = None
    """In bias's own shape, where it was declared and asked for."""


class Backend(Protocol):
    """What a backend's file holds."""

    NAME: str
    TITLE: str
    """What it is, in a few words."""
    INSTALL: str
    """The command that installs it."""
    NEWEST: str
    """The newest version it is known to work with: what ``explain(on=...)`` assumes."""
    CAPABILITIES: tuple[Capability, ...]
    """One per kernel, the preferred first."""

    def probe(self) -> Probe:
        """The installed version, without importing the kernel."""

    def load(self) -> frozenset[str] | None:
        """Import what the kernels need; raise whatever goes wrong. Returns flags that only the import could tell."""

    def forward(self, call: Call) -> Result:
        """Compute out and lse. Raises Refused, before anything runs, where a kernel's own check says no."""

    def backward(self, call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None) -> Gradients:
        """Compute the gradients from the final out and lse. dlse is given only to kernels that declared it native."""
