"""A small model that is trained on one process, and on any arrangement of ranks.

Nothing is asserted here: the jobs return what a rank found, and tests/test_context_training.py judges it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import anyattn
from context_pool import Ranks, Seat

Attend = Callable[..., Tensor]
"""(q, k, v, sink) to out, of one layer."""

#: (causal, window) of each layer: a window, everything causal, a wider window, and no mask.
LAYERS: tuple[tuple[bool, tuple[int, int] | None], ...] = ((True, (6, 0)), (True, None), (False, (9, 4)), (False, None))


@dataclass(frozen=True)
class Training:
    """A model, a batch and how the batch is divided."""

    comm: str = "p2p"
    ranks: Ranks = 4
    lengths: tuple[int, ...] = (29, 0, 3, 17)
    gap: int = 4
    layers: tuple[tuple[bool, tuple[int, int] | None], ...] = LAYERS
    heads: int = 4
    kv_heads: int = 2
    dropout: float = 0.0
    placement: str = "auto"
    seed: int = 0
    backend: str = "reference"

    def packing(self) -> anyattn.Packing:
        """The whole batch."""
        return anyattn.Packing.from_lengths(list(self.lengths), self.gap)

    def model(self) -> Net:
        """The same on every rank."""
        torch.manual_seed(11)
        return Net(len(self.layers), self.heads, self.kv_heads).double()

    def data(self) -> tuple[Tensor, Tensor]:
        """Tokens and labels of the whole batch; labels in gaps are to be ignored."""
        packing, generator = self.packing(), torch.Generator().manual_seed(self.seed)
        tokens, labels = (torch.randint(0, TOKENS, (packing.rows,), generator=generator) for _ in range(2))
        return tokens, labels.masked_fill(~packing.valid, -100)


TOKENS, WIDTH, DIM = 13, 16, 8


class Layer(nn.Module):
    """Attention with a sink, and its projections."""

    def __init__(self, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.parts = [heads, kv_heads, kv_heads]
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, sum(self.parts) * DIM)
        self.sink = nn.Parameter(torch.randn(heads))
        self.out = nn.Linear(heads * DIM, WIDTH, bias=False)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (sum(self.parts), DIM)).split(self.parts, -2)
        y: Tensor = self.out(attend(q, k, v, self.sink).flatten(-2))
        return x + y


class Net(nn.Module):
    """Tokens (rows,) and positions (rows,) to logits (rows, TOKENS)."""

    def __init__(self, layers: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList(Layer(heads, kv_heads) for _ in range(layers))
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(
        self, tokens: Tensor, positions: Tensor, attends: Sequence[Attend], reentrant: bool | None = None
    ) -> Tensor:
        """reentrant: of activation checkpointing; None: without."""
        frequencies = torch.exp(-torch.arange(WIDTH) / 4)
        x = self.embed(tokens) + torch.sin(positions[:, None] * frequencies)
        for layer, attend in zip(self.layers, attends, strict=True):
            x = layer(x, attend) if reentrant is None else checkpoint(layer, x, attend, use_reentrant=reentrant)
        logits: Tensor = self.head(x)
        return logits


def loss_of(logits: Tensor, labels: Tensor, tokens: int) -> Tensor:
    """This rank's part of the mean over all tokens of the batch."""
    return nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / max(tokens, 1)


@dataclass
class Step:
    """What one step found."""

    loss: float
    grads: dict[str, Tensor]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By name; missing ones are an error."""
    found = {}
    for name, p in model.named_parameters():
        assert p.grad is not None, f"no gradient for {name}"
        found[name.removeprefix("_orig_mod.")] = p.grad.detach().clone()
    return found


def alone(t: Training) -> Step:
    """On one process."""
    model, packing, (tokens, labels) = t.model(), t.packing(), t.data()
    loss = loss_of(model(tokens, packing.position_ids, whole_attends(t)), labels, sum(t.lengths))
    loss.backward()
    return Step(loss.item(), gradients(model))


def whole_attends(t: Training) -> list[Attend]:
    """Every layer's attention over the whole batch."""
    packing = t.packing()

    def attend(causal: bool, window: Any) -> Attend:
        return lambda q, k, v, sink: anyattn.attention(
            q, k, v, sink=sink, causal=causal, window=window, packing=packing, backend=t.backend
        )

    return [attend(*layer) for layer in t.layers]


# --- over ranks ----------------------------------------------------------------------------------------------------


@dataclass
class Shard:
    """A rank's part of the batch."""

    plan: Any
    attends: list[Attend]
    tokens: Tensor
    labels: Tensor


def shard(t: Training, group: Any, heads: int | None = None, kv_heads: int | None = None) -> Shard:
    """One placement for all layers, whose masks differ.

    Args:
        t: what is trained.
        group: of context parallelism.
        heads: query heads on this rank, where tensor parallelism divides them; default: all.
        kv_heads: the same for key heads.
    """
    (causal, window), *others = t.layers
    cp = anyattn.ContextParallel(group, comm=t.comm)
    plan = cp.plan(
        t.packing(), causal=causal, window=window, num_heads=heads or t.heads, num_kv_heads=kv_heads or t.kv_heads,
        head_dim=DIM, features=("sink", "dropout") if t.dropout else ("sink",), placement=t.placement,
    )  # fmt: skip
    plans = [plan, *(plan.with_mask(*mask) for mask in others)]
    tokens, labels = t.data()
    return Shard(plan, [_attend(t, p) for p in plans], plan.shard(tokens), plan.shard(labels, fill=-100))


def _attend(t: Training, plan: Any) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        out: Tensor = anyattn.attention(q, k, v, sink=sink, plan=plan, dropout=t.dropout, backend=t.backend)
        return out

    return attend


def step(t: Training, mine: Shard, model: nn.Module, seed: int = 5, scale: float = 1.0, **arguments: Any) -> Step:
    """Forward and backward of this rank's rows."""
    torch.manual_seed(seed)
    model.zero_grad()
    logits = model(mine.tokens, mine.plan.position_ids, mine.attends, **arguments)
    loss = loss_of(logits, mine.labels, sum(t.lengths)) * scale
    loss.backward()
    return Step(loss.item(), gradients(model))


def train(seat: Seat, t: Training) -> Step:
    """One step."""
    return step(t, shard(t, seat.group), t.model())


def checkpointed(seat: Seat, t: Training) -> dict[str, Step]:
    """The same step without activation checkpointing, with both kinds, and without again under another seed."""
    mine, model = shard(t, seat.group), t.model()
    return {
        "kept": step(t, mine, model),
        "not reentrant": step(t, mine, model, reentrant=False),
        "reentrant": step(t, mine, model, reentrant=True),
        "another seed": step(t, mine, model, seed=6),
    }


def compiled(seat: Seat, t: Training, batches: Sequence[tuple[int, ...]]) -> tuple[list[Step], list[int]]:
    """A compiled model's steps with one batch after another, and how many graphs there were after each."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter, steps, graphs = CompileCounterWithBackend("aot_eager"), [], []
    model: Any = torch.compile(t.model(), backend=counter)
    for lengths in batches:
        one = replace(t, lengths=lengths)
        steps.append(step(one, shard(one, seat.group), model))
        graphs.append(counter.frame_count)
    return steps, graphs


def one_graph(seat: Seat, t: Training) -> None:
    """A whole model in one graph, with a plan: an error."""
    torch._dynamo.reset()
    mine, model = shard(t, seat.group), t.model()
    step(t, mine, torch.compile(model, backend="aot_eager", fullgraph=True))  # type: ignore[arg-type]


def each_row(seat: Seat, t: Training, names: tuple[str, ...]) -> Step:
    """Data parallel rows with batches of their own: gradients summed over the rest, averaged over rows."""
    mesh = seat.group
    t = replace(t, seed=mesh.get_local_rank("dp"))
    found = step(t, shard(t, mesh[names if len(names) > 1 else names[0]]), t.model())
    for grad in found.grads.values():
        for name in names:
            dist.all_reduce(grad, group=mesh.get_group(name))
        dist.all_reduce(grad, group=mesh.get_group("dp"))
        grad /= mesh.size(0)
    return found


def fully_sharded(seat: Seat, t: Training, over: str) -> dict[str, Tensor]:
    """Parameters after one step of an optimizer under FSDP2, over "dp" alone or over "all" ranks."""
    from torch.distributed.fsdp import fully_shard

    mesh = seat.group
    t = replace(t, seed=mesh.get_local_rank("dp"))
    model, mine = t.model(), shard(t, mesh["cp"])
    across = mesh["dp"] if over == "dp" else mesh._flatten("all")
    for layer in model.layers:
        fully_shard(layer, mesh=across)
    fully_shard(model, mesh=across)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    # gradients are averaged over the mesh's ranks; those of context parallelism are to be summed
    step(t, mine, model, scale=1.0 if over == "dp" else mesh.size(1))
    if over == "dp":
        for p in model.parameters():
            dist.all_reduce(p.grad.to_local(), group=mesh.get_group("cp"))  # type: ignore[union-attr]
    optimizer.step()
    return {name: p.full_tensor().detach().clone() for name, p in model.named_parameters()}  # type: ignore[attr-defined]


# --- heads divided by the caller -----------------------------------------------------------------------------------


class _Copied(torch.autograd.Function):
    """The same on all ranks of a group, whose gradients are added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Added(torch.autograd.Function):
    """The sum over the ranks of a group, on all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _HeadsOf(nn.Module):
    """Some heads of a layer."""

    def __init__(self, whole: Layer, group: Any) -> None:
        super().__init__()
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self.parts = [n // size for n in whole.parts]
        self.group, self.norm = group, whole.norm

        def mine(x: Tensor, dim: int = 0) -> Tensor:
            return x.detach().chunk(size, dim)[rank]

        def qkv(x: Tensor) -> nn.Parameter:
            return nn.Parameter(torch.cat([mine(part) for part in x.split([n * DIM for n in whole.parts])]))

        self.weight, self.bias = qkv(whole.qkv.weight), qkv(whole.qkv.bias)
        self.sink = nn.Parameter(mine(whole.sink).clone())
        self.out = nn.Parameter(mine(whole.out.weight, 1).clone())

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        y = _Copied.apply(self.norm(x), self.group)  # type: ignore[no-untyped-call]
        y = nn.functional.linear(y, self.weight, self.bias)
        q, k, v = y.unflatten(-1, (sum(self.parts), DIM)).split(self.parts, -2)
        z = nn.functional.linear(attend(q, k, v, self.sink).flatten(-2), self.out)
        summed: Tensor = _Added.apply(z, self.group)  # type: ignore[no-untyped-call]
        return x + summed


def heads_divided(seat: Seat, t: Training) -> Step:
    """Tensor parallelism around the context-parallel part; gradients are those of this rank's heads."""
    mesh = seat.group
    model, group, size = t.model(), mesh.get_group("tp"), mesh.size(0)
    model.layers = nn.ModuleList(_HeadsOf(layer, group) for layer in model.layers)  # type: ignore[arg-type]
    mine = shard(t, mesh["cp"], t.heads // size, t.kv_heads // size)
    return step(t, mine, model)


def of_heads(name: str, grads: dict[str, Tensor], t: Training, rank: int, size: int = 2) -> Tensor:
    """What :func:`heads_divided` should find for a parameter on a rank of its tensor parallel group."""
    parts = [n * DIM for n in (t.heads, t.kv_heads, t.kv_heads)]
    prefix, _, last = name.rpartition(".")
    if not prefix.startswith("layers") or prefix.endswith("norm"):
        return grads[name]
    if last in ("weight", "bias"):
        whole = grads[f"{prefix}.qkv.{last}"]
        return torch.cat([part.chunk(size)[rank] for part in whole.split(parts)])
    if last == "sink":
        return grads[name].chunk(size)[rank]
    return grads[f"{name}.weight"].chunk(size, 1)[rank]
