"""``Problem``: everything that the choice of a kernel may look at, and no tensor.

It is frozen and hashable, so a choice is made once per kind of call. Exact lengths are not in it, for packed totals
change at every step: they enter as classes (0, 1, powers of two) and as the facts that kernels ask about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Form = Literal["dense", "packed"]
Relation = Literal["equal", "keys_longer", "any"]


def length_class(length: int) -> int:
    """0 for 0, 1 for 1, else the next power of two: lengths of one class are treated alike."""
    return length if length < 2 else 1 << (length - 1).bit_length()


@dataclass(frozen=True, slots=True)
class Problem:
    """A kind of attention call."""

    arch: int
    """Compute capability times ten (90 on Hopper); 0 is the CPU."""
    dtype: str
    """Of q, k and v: "bfloat16", "float16", "float32", "float64"."""
    form: Form
    """"dense": (batch, seq, heads, dim). "packed": (rows, heads, dim), with offsets; padded 4-D batches too."""
    head_dim: int
    head_dim_v: int
    num_heads: int
    num_kv_heads: int
    seqlen_q: int
    """Class of the longest query sequence."""
    seqlen_k: int
    """Class of the longest key sequence."""
    relation: Relation
    """How key lengths compare with query lengths, sequence by sequence, as far as the host knows."""
    gaps: bool = False
    """Rows that belong to no sequence may be present."""
    causal: bool = False
    """A right side of 0: no key after the query's own position."""
    left: bool = False
    """A finite left side: a sliding window."""
    right: bool = False
    """A finite right side above 0."""
    top_left: bool = False
    """Positions count from the start of the keys, and that differs from counting from their end."""
    softcap: bool = False
    sink: str | None = None
    """The sink's dtype, or None."""
    alibi: Literal[None, "heads", "sequences"] = None
    bias: str | None = None
    """The bias's dtype, or None."""
    mask: Literal[None, "tensor", "block"] = None
    dropout: bool = False
    nonpositive_scale: bool = False
    """A scale of zero or below, where masking before scaling goes wrong."""
    grad: bool = False
    """A gradient of q, k or v is needed."""
    sink_grad: bool = False
    bias_grad: bool = False
    lse_grad: bool = False
    """lse is returned and a gradient may reach it."""
    return_lse: bool = False
    deterministic: bool = False
    torch_deterministic: bool = False
    """torch.are_deterministic_algorithms_enabled(), which torch's own CUDA kernels read by themselves."""
    num_splits: int = 1
    """As in ``Spec``."""

    @property
    def needs_backward(self) -> bool:
        """Whether any gradient is needed."""
        return self.grad or self.sink_grad or self.bias_grad

    @property
    def shape_matters(self) -> bool:
        """Whether the position of a query among the keys changes what it sees."""
        return self.causal or self.left or self.right or self.alibi is not None

    def features(self) -> tuple[str, ...]:
        """The names of what this problem asks beyond plain attention, as capabilities declare them."""
        unequal = self.relation != "equal" and self.shape_matters
        asked = {
            self.form: True,
            "gaps": self.gaps,
            "causal": self.causal,
            "window": self.left or self.right,
            "bottom_right": unequal and not self.top_left,
            "top_left": unequal and self.top_left,
            "gqa": self.num_heads != self.num_kv_heads,
            "unequal_head_dims": self.head_dim != self.head_dim_v,
            "softcap": self.softcap,
            "sink": self.sink is not None,
            "alibi": self.alibi is not None,
            "alibi_per_sequence": self.alibi == "sequences",
            "bias": self.bias is not None,
            "bias_grad": self.bias_grad,
            "mask": self.mask == "tensor",
            "block_mask": self.mask == "block",
            "dropout": self.dropout,
            "nonpositive_scale": self.nonpositive_scale,
            "lse_grad": self.lse_grad,
            "deterministic": self.deterministic and self.needs_backward,
        }
        return tuple(name for name, wanted in asked.items() if wanted)

    def __str__(self) -> str:
        heads = str(self.num_heads) if self.num_heads == self.num_kv_heads else f"{self.num_heads}/{self.num_kv_heads}"
        dims = str(self.head_dim) if self.head_dim == self.head_dim_v else f"{self.head_dim}/{self.head_dim_v}"
        where = f"sm{self.arch}" if self.arch else "cpu"
        lengths = f"seq {self.seqlen_q}" if self.seqlen_q == self.seqlen_k else f"seq {self.seqlen_q} x {self.seqlen_k}"
        extra = [name for name in self.features() if name not in ("gqa", "unequal_head_dims")]
        extra += [f"num_splits {self.num_splits}"] if self.num_splits != 1 else []
        direction = "forward and backward" if self.needs_backward else "forward"
        return f"{self.dtype} on {where}, {lengths}, heads {heads}, head_dim {dims}, {', '.join(extra)}, {direction}"
