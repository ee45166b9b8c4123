"""What attention means, written a second time: loops per sequence and head, autograd for gradients.

It imports nothing of the package that it judges. In float64 it is the oracle; in a problem's own dtype, rounded after
every step as eager code rounds, it is the plain low-precision implementation whose error sets the tolerance:

    budget = 2 * (error of the plain implementation) + one rounding band

Plain comes in several orders of the same steps, for the error of one order on a small tensor is partly luck: scale
after the product and torch's own softmax backward, or scale before it and the backward of every fused kernel, from the
rounded out and the lse; each with its sums in a few orders.

Legend: B batch, S query rows, K key rows, H heads, G kv heads, D head_dim, V head_dim_v. Everything is (B, S, H, D)
here; a packed batch is one entry of many rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

INF = float("inf")


class Span(NamedTuple):
    """One sequence: which batch entry it lies in, and where its queries and keys are."""

    entry: int
    start_q: int
    len_q: int
    start_k: int
    len_k: int


@dataclass(frozen=True)
class Terms:
    """The arguments that are no tensors of the batch."""

    causal: bool | str | None = None
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Order:
    """In which order a sum is taken."""

    fused: bool
    """Scale first, and the backward of fused kernels."""
    seed: int
    """0: as it comes."""

    def shuffle(self, n: int, device: torch.device) -> Tensor:
        """A permutation of n."""
        if self.seed == 0:
            return torch.arange(n, device=device)
        return torch.randperm(n, generator=torch.Generator().manual_seed(self.seed)).to(device)


EXACT = Order(False, 0)
#: The orders in which the plain implementation runs, as far as an error makes it necessary.
ORDERS = tuple(Order(fused, seed) for seed in range(8) for fused in (False, True))


def _shuffled(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A matrix with both dims permuted; dims of size 1 are broadcast, and stay."""
    x = x if x.shape[0] == 1 else x[rows]
    return x if x.shape[1] == 1 else x[:, columns]


def dense_spans(batch: int, seq_q: int, seq_k: int) -> list[Span]:
    """Every entry is one sequence."""
    return [Span(b, 0, seq_q, 0, seq_k) for b in range(batch)]


def visible_pairs(terms: Terms, len_q: int, len_k: int) -> Tensor:
    """(len_q, len_k): what causal and window let through, a pair at a time."""
    left, right = terms.window or (None, None)
    if terms.causal:
        right = 0 if right is None else min(right, 0)
    rows = []
    for i in range(len_q):
        position = i if terms.causal == "top_left" else i + len_k - len_q
        low = -INF if left is None else position - left
        high = INF if right is None else position + right
        rows.append([low <= j <= high for j in range(len_k)])
    return torch.tensor(rows, dtype=torch.bool).reshape(len_q, len_k)


def distances(terms: Terms, len_q: int, len_k: int) -> Tensor:
    """(len_q, len_k): |key position - query position|."""
    shift = 0 if terms.causal == "top_left" else len_k - len_q
    query = torch.arange(len_q)[:, None] + shift
    return (torch.arange(len_k)[None, :] - query).abs()


def _cut(x: Tensor, entry: int, head: int, rows: slice, keys: slice) -> Tensor:
    """The part of a tensor that broadcasts to (B, H, S, K) which belongs to one head of one sequence."""
    x = x.reshape((1,) * (4 - x.ndim) + tuple(x.shape))
    x = x[entry if x.shape[0] > 1 else 0, head if x.shape[1] > 1 else 0]
    return x[rows if x.shape[0] > 1 else slice(None), keys if x.shape[1] > 1 else slice(None)]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Sequence[Span],
    terms: Terms,
    *,
    sink: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    keep: Tensor | None = None,
    order: Order = EXACT,
) -> tuple[Tensor, Tensor]:
    """(out, lse): (B, S, H, V) in q's dtype; (B, H, S) in float32, or float64 for float64 inputs.

    Rows outside every span are 0 and -inf. ``mask`` is bool and broadcasts to (B, H, S, K), for packed batches too.
    ``keep`` is dropout's factor, (B, H, S, K). Half precision rounds the scores, the probabilities and the result.
    ``order`` changes the order of the steps and of the sums, and nothing else.
    """
    heads, group = q.shape[2], q.shape[2] // max(k.shape[2], 1)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = terms.scale if terms.scale is not None else q.shape[-1] ** -0.5
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    lse = torch.full((q.shape[0], heads, q.shape[1]), -INF, dtype=wide, device=q.device)
    dims, dims_v = order.shuffle(q.shape[-1], q.device), order.shuffle(v.shape[-1], q.device)
    for number, span in enumerate(spans):
        rows = slice(span.start_q, span.start_q + span.len_q)
        keys = slice(span.start_k, span.start_k + span.len_k)
        of_q, of_k = order.shuffle(span.len_q, q.device), order.shuffle(span.len_k, q.device)
        back = of_q.argsort()
        near = _shuffled(visible_pairs(terms, span.len_q, span.len_k).to(q.device), of_q, of_k)
        for head in range(heads):
            q_SD = _shuffled(q[span.entry, rows, head], of_q, dims)
            k_KD = _shuffled(k[span.entry, keys, head // group], of_k, dims)
            v_KV = _shuffled(v[span.entry, keys, head // group], of_k, dims_v)
            added = None
            if bias is not None:
                added = _shuffled(_cut(bias, span.entry, head, rows, keys), of_q, of_k).to(q.dtype)
            slopes = None
            if alibi_slopes is not None:
                per_head = alibi_slopes if alibi_slopes.ndim == 1 else alibi_slopes[number]
                far = _shuffled(distances(terms, span.len_q, span.len_k).to(q.device), of_q, of_k)
                slopes = far.to(q.dtype) * per_head[head].to(q.dtype)
            s_SK = _scores(q_SD, k_KD, scale, terms.softcap, slopes, added, order.fused)
            again_SK = s_SK.detach()
            # In half precision kernels keep scores in float32: repeating them adds nothing.
            if order.fused and q.dtype == wide:
                again_SK = _scores(q_SD, k_KD, scale, terms.softcap, slopes, added, False).detach()
            seen = near
            if added is not None:
                seen = seen & (added > -INF)
            if mask is not None:
                seen = seen & _shuffled(_cut(mask, span.entry, head, rows, keys), of_q, of_k)
            factor = None if keep is None else _shuffled(keep[span.entry, head, rows, keys], of_q, of_k)
            logit = None if sink is None else sink[head].to(wide)
            o_SV, l_S = _softmax(s_SK.to(wide), again_SK.to(wide), seen, logit, v_KV, factor, order.fused)
            out[span.entry, rows, head] = o_SV[back][:, dims_v.argsort()]
            lse[span.entry, head, rows] = l_S[back]
    return out, lse


def _scores(
    q_SD: Tensor, k_KD: Tensor, scale: float, softcap: float | None, slopes: Tensor | None, bias: Tensor | None,
    scale_first: bool,
) -> Tensor:  # fmt: skip
    s_SK = (q_SD * scale) @ k_KD.T if scale_first else (q_SD @ k_KD.T) * scale
    if softcap:
        s_SK = softcap * torch.tanh(s_SK / softcap)
    if slopes is not None:
        s_SK = s_SK - slopes
    return s_SK if bias is None else s_SK + bias


def _softmax(
    s_SK: Tensor, again_SK: Tensor, seen: Tensor, sink: Tensor | None, v_KV: Tensor, keep: Tensor | None, fused: bool
) -> tuple[Tensor, Tensor]:
    """(out, lse) of one head of one sequence; rows for which nothing counts are 0 and -inf.

    ``again_SK`` are the scores as a fused backward computes them once more.
    """
    logits, again = s_SK.masked_fill(~seen, -INF), again_SK.masked_fill(~seen, -INF)
    counts = seen.any(-1)
    if sink is not None:
        column = sink.expand(logits.shape[0], 1)
        logits, again = torch.cat([logits, column], dim=1), torch.cat([again, column.detach()], dim=1)
        counts = counts | (sink > -INF)
    alive = counts.nonzero().flatten()
    out = s_SK.new_zeros(s_SK.shape[0], v_KV.shape[-1]).to(v_KV.dtype)
    lse = s_SK.new_full((s_SK.shape[0],), -INF)
    if alive.numel() == 0:
        return out, lse
    factor = None if keep is None else keep[alive]
    if fused:
        o_AV, l_A = _Fused.apply(logits[alive], again[alive], v_KV, factor)
    else:
        o_AV, l_A = _weigh(logits[alive], v_KV, factor)
    return out.index_copy(0, alive, o_AV), lse.index_copy(0, alive, l_A)


def _weigh(logits: Tensor, v_KV: Tensor, keep: Tensor | None, from_lse: bool = False) -> tuple[Tensor, Tensor]:
    """(out, lse) of rows for which something counts. A column beyond the keys is the sink's."""
    lse = torch.logsumexp(logits, -1)
    p_AK = torch.exp(logits - lse[:, None]) if from_lse else torch.softmax(logits, -1)
    p_AK = p_AK[:, : v_KV.shape[0]]
    if keep is not None:
        p_AK = p_AK * keep.to(p_AK.dtype)
    return p_AK.to(v_KV.dtype) @ v_KV, lse


class _Fused(torch.autograd.Function):
    """``_weigh`` with the backward of fused kernels: from repeated scores, the rounded out and the lse."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, again: Tensor, v_KV: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        out, lse = _weigh(logits, v_KV, keep, from_lse=True)
        ctx.save_for_backward(again, v_KV, keep, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor, None, Tensor, None]:
        logits, v_KV, keep, out, lse = ctx.saved_tensors
        p = torch.exp(logits - lse[:, None])
        kept, dp = p[:, : v_KV.shape[0]], (dout @ v_KV.T).to(p.dtype)
        if keep is not None:
            kept, dp = kept * keep.to(p.dtype), dp * keep.to(p.dtype)
        delta = (dout.to(p.dtype) * out.to(p.dtype)).sum(-1) - dlse
        dp = torch.nn.functional.pad(dp, (0, p.shape[1] - dp.shape[1]))
        return p * (dp - delta[:, None]), None, kept.to(v_KV.dtype).T @ dout, None


# --- gradients -----------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """out, lse and the gradients that were asked for: q, k, v, and sink and bias where they are there."""

    out: Tensor
    lse: Tensor
    grads: dict[str, Tensor]


def solve(
    dtype: torch.dtype,
    order: Order,
    tensors: Mapping[str, Tensor | None],
    spans: Sequence[Span],
    terms: Terms,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    mask: Tensor | None = None,
    keep: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Answer:
    """Everything, computed in ``dtype`` on a device; the answer lies on the CPU.

    dout is (B, S, H, V), dlse (B, H, S); both only count in spans.
    """
    mask, keep = (None if x is None else x.to(device) for x in (mask, keep))
    there = {n: x.detach().to(device, dtype) for n, x in tensors.items() if x is not None}
    given = {n: x.requires_grad_(n != "alibi_slopes") for n, x in there.items()}
    q, k, v = (given.pop(n) for n in "qkv")
    out, lse = attention(q, k, v, spans, terms, mask=mask, keep=keep, order=order, **given)
    leaves = {"q": q, "k": k, "v": v, **{n: x for n, x in given.items() if n != "alibi_slopes"}}
    grads = {n: torch.zeros_like(x) for n, x in leaves.items()}
    if dout is not None:
        real = torch.zeros(out.shape[:2], dtype=torch.bool, device=device)
        for span in spans:
            real[span.entry, span.start_q : span.start_q + span.len_q] = True
        total = (out * dout.to(device, dtype).masked_fill(~real[..., None, None], 0)).sum()
        if dlse is not None:
            finite = real[:, None] & (lse.detach() > -INF)
            total = total + (lse * dlse.to(device, lse.dtype)).masked_fill(~finite, 0).sum()
        if total.requires_grad:
            found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
            grads.update({n: g for n, g in zip(leaves, found, strict=True) if g is not None})
    return Answer(out.detach().cpu(), lse.detach().cpu(), {n: g.cpu() for n, g in grads.items()})


# --- tolerances ----------------------------------------------------------------------------------------------------


class Expected:
    """The exact answer of a problem of some dtype, and the error of the plain implementation."""

    def __init__(self, dtype: torch.dtype, *problem: Any) -> None:
        """``problem`` is what ``solve`` takes, but the dtype and the order.

        float64 has nothing more exact to be compared with. There the plain error is that of float32, scaled by the
        ratio of the roundings, or the difference of two orders in float64, whichever is larger.
        """
        self.dtype, self._problem = dtype, problem
        self._device = next(x.device for x in problem[0].values() if x is not None)  # plain sums as this device does
        self.exact = solve(torch.float64, EXACT, *problem)
        self._plain: list[tuple[Answer, float]] = []
        self.product_error = 0.0  # of kernels whose products are coarser than the dtype, as they declare

    def field(self, name: str) -> Tensor:
        """The exact value of "out", "lse", "dq", "dsink" ..."""
        return _field(name, self.exact).double()

    def errors(self, name: str) -> Iterator[float]:
        """The plain implementation's largest error in the first order, in the first two, and so on."""
        exact = self.field(name)
        finite = exact > -INF
        # A result that is exact by luck (one key per row, say) counts as rounded once.
        largest = torch.finfo(torch.float32 if name == "lse" else self.dtype).eps / 2 * exact[finite].abs().max().item()
        for number, (dtype, order) in enumerate(self._runs()):
            if number == len(self._plain):
                scale = torch.finfo(self.dtype).eps / torch.finfo(dtype).eps
                self._plain.append((solve(dtype, order, *self._problem, device=self._device), scale))
            plain, scale = self._plain[number]
            largest = max(largest, (_field(name, plain).double() - exact)[finite].abs().max().item() * scale)
            yield largest

    def _runs(self) -> Iterator[tuple[torch.dtype, Order]]:
        for order in ORDERS:
            if self.dtype == torch.float64:
                yield torch.float32, order
            yield self.dtype, order


def check(name: str, actual: Tensor, expected: Expected) -> None:
    """``actual`` ("out", "lse", "dq", "dsink" ...) is within the budget, and infinite in the same places.

    The rounding band is that of the coarser of the problem's dtype and ``actual``'s own; lse, float32 always, has its
    own. A kernel that declares coarser products has that in its band.
    """
    exact = expected.field(name)
    band = max(torch.finfo(d).eps for d in ({actual.dtype} if name == "lse" else {actual.dtype, expected.dtype}))
    actual = actual.detach().cpu().double()
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert torch.equal(actual == -INF, exact == -INF), f"{name}: -inf in other places than expected"
    finite = exact > -INF
    if not finite.any():
        return
    assert torch.isfinite(actual[finite]).all(), f"{name}: not finite where it should be"
    band = (band + expected.product_error) * exact[finite].abs().max().item()
    error = (actual - exact)[finite].abs().max().item()
    plain = 0.0
    for plain in expected.errors(name):
        if error <= 2 * plain + band:
            return
    raise AssertionError(f"{name}: error {error:.3e} exceeds {2 * plain + band:.3e} (plain {plain:.3e})")


def _field(name: str, answer: Answer) -> Tensor:
    return getattr(answer, name) if name in ("out", "lse") else answer.grads[name[1:]]
