"""Pre-train a small decoder on packed documents: anyattn.Attention, context parallelism and FSDP2 in one loop.

    python examples/pretrain.py
    torchrun --nproc-per-node 2 examples/pretrain.py
    torchrun --nproc-per-node 8 examples/pretrain.py --cp 4

The text is Python's own language reference, as bytes; nothing is downloaded. A step packs whole topics, one after the
other, into one row of tokens; attention keeps them apart. Every second layer sees a short window only.

Under torchrun the ranks form a mesh (dp, cp): dp groups take different topics, and the cp ranks of a group share
theirs, each holding a part of the tokens. FSDP2 shards the weights over all ranks. Where there is a GPU for every rank
they run on GPUs (NCCL), else on the CPU (gloo) with a smaller model. Any number of ranks prints the same losses, but
for rounding.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics  # type: ignore[import-not-found, unused-ignore]

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import anyattn

VOCABULARY, IGNORED = 256, -100


@dataclass(frozen=True)
class Sizes:
    """Of the model, and of a step over all ranks."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    window: int
    tokens: int


ON_CPU = Sizes(dim=128, layers=2, heads=4, kv_heads=2, window=128, tokens=2048)
ON_GPU = Sizes(dim=1024, layers=12, heads=16, kv_heads=4, window=1024, tokens=131072)


# --- the model ---


def rotary(q: Tensor, k: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """RoPE: q and k (rows, heads, head_dim), turned by their positions (rows,)."""
    rates = 10000.0 ** -torch.arange(0, 1, 2 / q.shape[-1], device=q.device)
    angles = position_ids[:, None, None] * rates

    def turned(x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1).to(x.dtype)

    return turned(q), turned(k)


class Block(nn.Module):
    """Attention, then a gated feed-forward: (rows, dim) to (rows, dim)."""

    def __init__(self, sizes: Sizes, window: int | None) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(sizes.dim), nn.RMSNorm(sizes.dim)
        self.attention = anyattn.Attention(
            sizes.dim, sizes.heads, sizes.kv_heads, window=(window, 0) if window else None, rotary=rotary
        )
        self.up = nn.Linear(sizes.dim, 6 * sizes.dim, bias=False)
        self.down = nn.Linear(3 * sizes.dim, sizes.dim, bias=False)

    def forward(self, x: Tensor, plan: anyattn.ContextPlan) -> Tensor:
        """One layer, of this rank's rows."""
        x = x + self.attention(self.norm_1(x), plan=plan)
        gate, value = self.up(self.norm_2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * value)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Bytes (rows,) to logits of the next ones (rows, VOCABULARY)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.window = sizes.window
        self.embedding = nn.Embedding(VOCABULARY, sizes.dim)
        self.blocks = nn.ModuleList(Block(sizes, sizes.window if i % 2 else None) for i in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.dim)
        self.head = nn.Linear(sizes.dim, VOCABULARY, bias=False)

    def forward(self, inputs: Tensor, plan: anyattn.ContextPlan) -> Tensor:
        """Logits of this rank's rows."""
        plans = [plan, plan.with_mask(causal=True, window=(self.window, 0))]  # one placement, two kinds of layers
        x = self.embedding(inputs)
        for i, block in enumerate(self.blocks):
            x = block(x, plans[i % 2])
        return self.head(self.norm(x))  # type: ignore[no-any-return]


# --- the data ---


def steps(sizes: Sizes, count: int) -> Iterator[list[Tensor]]:
    """Documents of each step, the same on every rank: whole topics but for the longest and the last."""
    names = sorted(topics)
    for step in range(count):
        choice, documents, room = random.Random(step), [], sizes.tokens
        while room:
            content = topics[choice.choice(names)].encode()[: min(room, sizes.tokens // 4)]
            documents.append(torch.tensor(list(content)))
            room -= len(content)
        yield documents


def joined(documents: list[Tensor]) -> Tensor:
    """One after the other; nothing, where a step has fewer documents than there are dp groups."""
    return torch.cat([torch.empty(0, dtype=torch.long), *documents])


# --- the loop ---


@dataclass(frozen=True)
class Ranks:
    """Who takes part: one process, or a mesh (dp, cp)."""

    mesh: DeviceMesh | None
    device: torch.device

    @property
    def size(self) -> int:
        """All ranks."""
        return 1 if self.mesh is None else self.mesh.size()

    def context_parallel(self, comm: str) -> anyattn.ContextParallel:
        """The group that shares this rank's tokens."""
        return anyattn.ContextParallel((1, 0) if self.mesh is None else self.mesh["cp"], comm=comm)

    def mine(self, documents: list[Tensor]) -> list[Tensor]:
        """The documents of this rank's group."""
        return documents if self.mesh is None else documents[self.mesh["dp"].get_local_rank() :: self.mesh["dp"].size()]


def build(sizes: Sizes, ranks: Ranks) -> Decoder:
    """The model, its weights sharded over all ranks."""
    torch.manual_seed(0)
    model = Decoder(sizes).to(ranks.device)
    if ranks.mesh is not None:
        mesh = ranks.mesh._flatten("dp_cp")
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh)
    return model


def train(sizes: Sizes, ranks: Ranks, options: argparse.Namespace) -> None:
    """Rank 0 prints the loss of each step."""
    model, cp = build(sizes, ranks), ranks.context_parallel(options.comm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95))
    for step, documents in enumerate(steps(sizes, options.steps), 1):
        begin = time.perf_counter()
        mine = ranks.mine(documents)
        packing = anyattn.Packing.from_lengths([len(document) for document in mine])
        plan = cp.plan(packing, num_heads=sizes.heads, num_kv_heads=sizes.kv_heads)
        tokens, shifted = joined(mine), joined([F.pad(x[1:], (0, 1), value=IGNORED) for x in mine])  # shift, then shard
        inputs = plan.shard(tokens).to(ranks.device)
        labels = plan.shard(shifted, fill=IGNORED).to(ranks.device)
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=ranks.device.type == "cuda"):
            logits = model(inputs, plan)
        summed = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
        loss = summed / sum(len(document) - 1 for document in documents)  # this rank's part of the mean over all ranks
        (loss * ranks.size).backward()  # FSDP2 takes the mean of the ranks' gradients, and we want their sum
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        if ranks.mesh is not None:
            dist.all_reduce(total)
        if ranks.mesh is None or dist.get_rank() == 0:
            speed = sizes.tokens / (time.perf_counter() - begin)
            print(f"step {step:3}  loss {total.item():.5f}  {speed:9,.0f} tokens/s  {plan.comm}", flush=True)


def start(cp: int | None) -> Ranks:
    """One process, or the mesh that torchrun started."""
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    on_gpus = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cuda", local) if on_gpus else torch.device("cpu")
    if "WORLD_SIZE" not in os.environ:
        return Ranks(None, device)
    if on_gpus:
        torch.cuda.set_device(device)
    cp = world if cp is None else cp
    if cp < 1 or world % cp:
        raise SystemExit(f"--cp must divide the {world} ranks, got {cp}")
    return Ranks(init_device_mesh(device.type, (world // cp, cp), mesh_dim_names=("dp", "cp")), device)


def main() -> None:
    """Options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cp", type=int, help="ranks that share tokens; default: all")
    parser.add_argument("--comm", default="auto", choices=("auto", "p2p", "all_gather", "a2a"))
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    options = parser.parse_args()
    ranks = start(options.cp)
    train(ON_GPU if ranks.device.type == "cuda" else ON_CPU, ranks, options)
    if ranks.mesh is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
