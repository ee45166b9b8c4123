"""Pre-train a small decoder on packed documents, with every batch divided over ranks by context parallelism.

    torchrun --nproc-per-node 2 examples/context_parallel.py
    torchrun --nproc-per-node 4 examples/context_parallel.py --dp 2

Every rank takes a GPU (NCCL) where there is one for each; else all run on the CPU (gloo), with a smaller model. The
ranks form a mesh (dp, cp): dp groups take different documents, and the cp ranks of a group share theirs, each holding a
part of the tokens. FSDP2 shards the weights over cp. The text is the source of Python's standard library, as bytes.

A step trains on the same documents whatever the mesh: any number of ranks prints the same losses, but for rounding.

Context parallelism is in four places, marked (1) to (4): a data-loader worker makes a plan from the documents' lengths,
and takes this rank's tokens and labels; positions come from the plan; attention takes it; the loop connects it.
"""

import argparse
import os
import random
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import anyattn

VOCABULARY, IGNORED = 256, -100


class Sizes(NamedTuple):
    """Of the model, and of a batch over all ranks."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tokens: int


ON_CPU = Sizes(dim=128, layers=2, heads=4, kv_heads=2, head_dim=32, tokens=2048)
ON_GPU = Sizes(dim=1024, layers=12, heads=16, kv_heads=4, head_dim=64, tokens=131072)


class Batch(NamedTuple):
    """This rank's part of a step."""

    inputs: Tensor  # int64 (plan.rows,)
    labels: Tensor  # int64 (plan.rows,): the next byte of the document; IGNORED where there is none
    plan: anyattn.ContextPlan
    targets: int  # labels on all ranks together
    tokens: int  # on all ranks together


class Batches(Dataset[Batch]):
    """Step by step, this rank's part of the same documents on every mesh; dp and cp are (size, rank)."""

    def __init__(self, sizes: Sizes, steps: int, dp: tuple[int, int], cp: tuple[int, int], comm: str) -> None:
        self.sizes, self.steps, self.dp = sizes, steps, dp
        self.files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        # (1) From (size, rank) it makes plans without a process group, which a worker has not.
        self.planner = anyattn.ContextParallel(cp, comm=comm)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        documents = self._documents(random.Random(step))
        total = sum(map(len, documents))
        mine = documents[self.dp[1] :: self.dp[0]]
        packing = anyattn.Packing.from_lengths([len(document) for document in mine])
        heads = {"num_heads": self.sizes.heads, "num_kv_heads": self.sizes.kv_heads, "head_dim": self.sizes.head_dim}
        plan = self.planner.plan(packing, **heads)
        inputs = plan.shard(torch.cat(mine))
        labels = torch.cat([F.pad(document[1:], (0, 1), value=IGNORED) for document in mine])
        return Batch(inputs, plan.shard(labels, fill=IGNORED), plan, total - len(documents), total)

    def _documents(self, choice: random.Random) -> list[Tensor]:
        """The beginnings of files, eight or more."""
        documents: list[Tensor] = []
        while (missing := self.sizes.tokens - sum(map(len, documents))) > 0:
            content = choice.choice(self.files).read_bytes()[: min(missing, self.sizes.tokens // 8)]
            documents.append(torch.tensor(list(content or b"\n")))
        return documents


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """RoPE: x (rows, heads, head_dim), turned by angles (rows, 1, head_dim / 2)."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Block(nn.Module):
    """Attention with fewer key heads than query heads, then a gated feed-forward; (rows, dim) to (rows, dim)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, self.head_dim = (sizes.heads, sizes.kv_heads, sizes.kv_heads), sizes.head_dim
        self.norm_1, self.norm_2 = nn.RMSNorm(sizes.dim), nn.RMSNorm(sizes.dim)
        self.qkv = nn.Linear(sizes.dim, sum(self.heads) * sizes.head_dim, bias=False)
        self.out = nn.Linear(sizes.heads * sizes.head_dim, sizes.dim, bias=False)
        self.up = nn.Linear(sizes.dim, 6 * sizes.dim, bias=False)
        self.down = nn.Linear(3 * sizes.dim, sizes.dim, bias=False)

    def forward(self, x: Tensor, angles: Tensor, plan: anyattn.ContextPlan) -> Tensor:
        """One layer of this rank's rows; angles turn queries and keys by position."""
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=1)
        # (2) Causal, and within documents: the plan was made so.
        attended = anyattn.attention(turned(q, angles), turned(k, angles), v, plan=plan)
        x = x + self.out(attended.flatten(1))
        gate, value = self.up(self.norm_2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * value)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Bytes (rows,) to logits of the next ones (rows, VOCABULARY)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.head_dim = sizes.head_dim
        self.embedding = nn.Embedding(VOCABULARY, sizes.dim)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.dim)
        self.head = nn.Linear(sizes.dim, VOCABULARY, bias=False)

    def forward(self, inputs: Tensor, plan: anyattn.ContextPlan) -> Tensor:
        """Logits of this rank's rows."""
        # (3) Positions within the document, of this rank's rows.
        positions = plan.position_ids
        rates = 10000.0 ** -torch.arange(0, 1, 2 / self.head_dim, device=positions.device)
        angles, x = positions[:, None, None] * rates, self.embedding(inputs)
        for block in self.blocks:
            x = block(x, angles, plan)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def train(sizes: Sizes, mesh: DeviceMesh, device: torch.device, options: argparse.Namespace) -> None:
    """The loop; rank 0 prints."""
    dp, cp = ((mesh[name].size(), mesh[name].get_local_rank()) for name in ("dp", "cp"))
    parallel = anyattn.ContextParallel(mesh["cp"], comm=options.comm)
    batches = DataLoader(Batches(sizes, options.steps, dp, cp, options.comm), batch_size=None, num_workers=1)
    torch.manual_seed(0)
    model = Decoder(sizes).to(device)
    precision = MixedPrecisionPolicy(torch.bfloat16, cast_forward_inputs=False) if device.type == "cuda" else None
    for part in (*model.blocks, model):  # of a mesh (dp, cp), FSDP2 shards over cp, and holds a copy for each dp
        fully_shard(part, mesh=mesh, mp_policy=precision or MixedPrecisionPolicy())
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95))
    for step, batch in enumerate(batches, 1):
        begin = time.perf_counter()
        plan = parallel.bind(batch.plan)  # (4) The worker's plan gets this rank's process group.
        logits = model(batch.inputs.to(device), plan)
        summed = F.cross_entropy(logits.float(), batch.labels.to(device), ignore_index=IGNORED, reduction="sum")
        loss = summed / batch.targets  # this rank's part of the mean over all ranks' targets
        (loss * mesh.size()).backward()  # FSDP2 takes the mean of the ranks' gradients, and we want their sum
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total := loss.detach())
        if dist.get_rank() == 0:
            value, speed = total.item(), batch.tokens / (time.perf_counter() - begin)
            print(f"step {step:3}  loss {value:.5f}  {speed:9,.0f} tokens/s  {plan.comm}", flush=True)


def main() -> None:
    """Options, mesh and device."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dp", type=int, default=1, help="groups that take different documents, 8 at most")
    parser.add_argument("--comm", default="auto", help="auto, p2p, all_gather or a2a")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        parser.error("start it with torchrun --nproc-per-node N examples/context_parallel.py")
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    if not 1 <= options.dp <= 8 or world % options.dp:
        parser.error(f"--dp must be 1 to 8 and divide the {world} ranks, got {options.dp}")
    on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (options.dp, world // options.dp), mesh_dim_names=("dp", "cp"))
    train(ON_GPU if on_gpus else ON_CPU, mesh, device, options)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
