"""What a rank does with a case under context parallelism: it takes its rows as Transformer Engine lays them out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import te_cases
from anyattn.integrations import _te_context
from anyattn.integrations.transformer_engine import CPLoadBalancingStrategy, DotProductAttention
from context_pool import Mesh, Ranks, Seat
from doubles import pretend
from te_cases import Side, TeCase

GRID = Mesh((2, 2), ("p2p", "a2a"))


def group_of(comm: str, ranks: int) -> Ranks:
    """For the pool."""
    return GRID if comm == "a2a+p2p" else ranks


def groups(seat: Seat, comm: str) -> dict[str, Any]:
    """Arguments of set_context_parallel_group."""
    if comm != "a2a+p2p":
        return {"cp_group": seat.group, "cp_global_ranks": list(range(seat.size)), "cp_comm_type": comm}
    both = [seat.group.get_group("a2a"), seat.group.get_group("p2p")]
    return {"cp_group": both, "cp_global_ranks": list(range(seat.size)), "cp_comm_type": comm}


def rows(side: Side, layout: str, size: int, rank: int, contiguous: bool) -> Tensor:
    """Rows of the whole batch, of one entry where the layout is 4-D, that a rank holds, in its order."""
    if contiguous:
        share = side.starts[-1] // size
        return torch.arange(rank * share, (rank + 1) * share)
    rooms = side.rooms if layout == "thd" else side.rooms[:1]
    found = []
    for start, room in zip(side.starts, rooms, strict=False):
        chunks = torch.arange(start, start + room).chunk(2 * size) if room else ()
        if room:
            found += [chunks[rank], chunks[2 * size - 1 - rank]]
    return torch.cat(found)


@dataclass
class Found:
    """Of one rank."""

    out: Tensor
    """This rank's rows."""
    rows: Tensor
    rows_k: Tensor
    grads: dict[str, Tensor]
    """This rank's rows of q, k and v; the whole of others, of which the ranks' are to be added."""
    largest: Tensor
    same: bool
    """Two layers gave the same."""
    plans: int
    """Plans that were made."""


def run(seat: Seat, case: TeCase, comm: str, contiguous: bool = False) -> Found:
    """Forward and backward, twice: the second as another layer of the model."""
    batch = te_cases.build(case)
    module = DotProductAttention(**te_cases.constructor(case))
    strategy = CPLoadBalancingStrategy["NO_LOAD_BALANCE" if contiguous else "DUAL_CHUNK_SWAP"]
    module.set_context_parallel_group(**groups(seat, comm), cp_stream=None, load_balancing_strategy=strategy)
    sides = {"q": case.side(False), "k": case.side(True), "v": case.side(True), "dout": case.side(False)}
    dim = 1 if case.layout == "bshd" else 0
    mine = {n: rows(s, case.layout, seat.size, seat.rank, contiguous) for n, s in sides.items()}
    local = {n: _local(batch.leaves[n], case, sides[n], mine[n], dim) for n in sides}
    leaves = {n: local[n].clone().requires_grad_() for n in "qkv"}
    arguments = te_cases.arguments(batch)
    for name in ("bias", "hidden"):
        if name in batch.leaves:
            x = batch.leaves[name]
            x = (x[..., mine["q"], :] if x.shape[-2] > 1 else x).clone()
            if name == "bias":
                leaves["bias"] = arguments["core_attention_bias"] = x.requires_grad_()
            else:
                arguments["attention_mask"] = x
    if "sink" in batch.leaves:
        leaves["sink"] = module.softmax_offset  # type: ignore[assignment]
        with torch.no_grad():
            leaves["sink"].copy_(batch.leaves["sink"])
    with _counted() as plans:
        first = module(leaves["q"], leaves["k"], leaves["v"], **arguments)
        out = module(leaves["q"], leaves["k"], leaves["v"], **arguments)
    out, largest = out if case.max_logit else (out, torch.empty(0))
    first = first[0] if case.max_logit else first
    heads = out.unflatten(-1, (case.heads[0], case.dims[1]))
    grads = torch.autograd.grad((heads * local["dout"]).sum(), list(leaves.values()))
    same = torch.equal(first, out)
    return Found(
        heads.detach(), mine["q"], mine["k"], dict(zip(leaves, grads, strict=True)), largest, same, len(plans)
    )  # fmt: skip


@contextlib.contextmanager
def _counted() -> Iterator[list[Any]]:
    """What is planned inside."""
    made: list[Any] = []
    real = _te_context.plan

    def plan(*arguments: Any, **more: Any) -> Any:
        made.append(arguments)
        return real(*arguments, **more)

    _te_context.plan = plan
    try:
        yield made
    finally:
        _te_context.plan = real


def _local(x: Tensor, case: TeCase, side: Side, mine: Tensor, dim: int) -> Tensor:
    whole = te_cases.pack(x, side, case.layout)
    return whole.index_select(dim, mine)


def refused(seat: Seat, comm: str, wrong: str) -> None:
    """A call that cannot be made."""
    module = DotProductAttention(4, 8, qkv_format="bshd")
    given = groups(seat, comm)
    q, k, v = torch.randn(3, 1, 8, 4, 8).unbind()
    arguments: dict[str, Any] = {}
    if wrong == "ranks":
        given["cp_global_ranks"] = given["cp_global_ranks"][::-1]
    elif wrong == "no ranks":
        given["cp_global_ranks"] = None
    elif wrong == "one group":
        given["cp_group"] = given["cp_group"][0]
    elif wrong == "two groups":
        given["cp_group"] = [given["cp_group"], given["cp_group"]]
    elif wrong == "strategy":
        given["load_balancing_strategy"] = CPLoadBalancingStrategy.NO_LOAD_BALANCE
    elif wrong == "odd":
        q, k, v = (x[:, :3] for x in (q, k, v))
    elif wrong == "too few ranks":
        given["cp_global_ranks"] = given["cp_global_ranks"][:1]
    elif wrong in ("odd sequence", "short", "policies", "whole", "tail"):
        q, k, v = (x[0] for x in (q, k, v))
        lengths = {"odd sequence": (6, 10), "short": (16, 16), "policies": (8, 8), "whole": (8,), "tail": (12,)}[wrong]
        arguments = {"qkv_format": "thd", "attn_mask_type": "padding_causal"}
        arguments["cu_seqlens_q"] = arguments["cu_seqlens_kv"] = te_cases.offsets(lengths)
        if wrong == "policies":
            ids = torch.arange(2)
            arguments["thd_attention_policies"] = [{"sequence_ids": ids, "mask_type": "padding", "window_size": None}]
            del arguments["attn_mask_type"]
    elif wrong == "entries":
        arguments = {"attn_mask_type": "padding"}
        arguments["cu_seqlens_q"] = arguments["cu_seqlens_kv"] = te_cases.offsets((4, 4))
    elif wrong in ("own mask", "short mask", "long mask"):
        width = {"own mask": 8, "short mask": 12, "long mask": 24}[wrong]
        hidden = torch.zeros(1, 1, 1, width, dtype=torch.bool)
        hidden[..., 16:] = True
        arguments = {"attn_mask_type": "padding", "attention_mask": hidden}
    elif wrong in ("mask with holes", "masks of two"):
        hidden = torch.zeros(2 if wrong == "masks of two" else 1, 1, 1, 16, dtype=torch.bool)
        hidden[..., 5] = True
        arguments = {"attn_mask_type": "padding", "attention_mask": hidden}
    elif wrong == "padding and bias":
        arguments = {"attn_mask_type": "padding", "core_attention_bias_type": "post_scale_bias"}
        arguments["cu_seqlens_q"] = arguments["cu_seqlens_kv"] = te_cases.offsets((12,))
        arguments["core_attention_bias"] = torch.zeros(1, 1, 8, 16)
    elif wrong == "long entry":
        arguments = {"attn_mask_type": "padding"}
        arguments["cu_seqlens_q"] = arguments["cu_seqlens_kv"] = te_cases.offsets((40,))
    module.set_context_parallel_group(**given, cp_stream=None)
    module(q, k, v, **arguments)


def alone(seat: Seat) -> tuple[Tensor, Tensor]:
    """Groups of one rank: the result, and that of a call without any."""
    import torch.distributed as dist

    mine = [dist.new_group([rank]) for rank in range(dist.get_world_size())][seat.rank]
    module = DotProductAttention(2, 8, qkv_format="bshd", attn_mask_type="padding_causal")
    tensors = torch.randn(3, 1, 5, 2, 8).unbind()
    offsets = te_cases.offsets((4,))
    module.set_context_parallel_group(mine, [seat.rank], None, "p2p")
    first = module(*tensors, cu_seqlens_q=offsets, cu_seqlens_kv=offsets)
    module.set_context_parallel_group([mine, mine], [seat.rank], None, "a2a+p2p")
    second = module(*tensors, cu_seqlens_q=offsets, cu_seqlens_kv=offsets)
    module.set_context_parallel_group(None, None, None)
    third = module(*tensors, cu_seqlens_q=offsets, cu_seqlens_kv=offsets)
    return torch.stack([first, second]), third


def halves(seat: Seat, comm: str) -> tuple[Tensor, Tensor]:
    """a2a+p2p over groups of which one has one rank, and the scheme that is left."""
    import torch.distributed as dist

    single = [dist.new_group([rank]) for rank in range(dist.get_world_size())][seat.rank]
    module = DotProductAttention(8, 8, qkv_format="bshd")
    tensors = torch.randn(3, 1, 4, 8, 8).unbind()
    both = [seat.group, single] if comm == "a2a" else [single, seat.group]
    module.set_context_parallel_group(both, list(range(seat.size)), None, "a2a+p2p")
    first = module(*tensors)
    module.set_context_parallel_group(seat.group, list(range(seat.size)), None, comm)
    return first, module(*tensors)


def split(seat: Seat, comm: str) -> tuple[list[Tensor], list[int]]:
    """out and gradients with all keys in one part, then in two, and in how many each call of the kernel was asked."""
    module = DotProductAttention(4, 64, qkv_format="bshd")
    module.set_context_parallel_group(**groups(seat, comm), cp_stream=None)
    leaves = [x.bfloat16().requires_grad_() for x in torch.randn(3, 1, 16, 4, 64).unbind()]
    found: list[Tensor] = []
    with pretend("sm90", fa3="3.0.0") as machine:
        for num_splits in (1, 2):
            out = module(*leaves, num_splits=num_splits)
            found += [out.detach(), *torch.autograd.grad(out.float().sum(), leaves)]
        assert machine.fa3 is not None
        return found, [given["num_splits"] for name, given in machine.fa3.calls if name == "fwd"]


def compiled(seat: Seat) -> tuple[Tensor, Tensor]:
    """What a compiled module gives under context parallelism, and the module itself."""
    module = DotProductAttention(2, 8, qkv_format="bshd")
    module.set_context_parallel_group(seat.group, list(range(seat.size)), None, "all_gather")
    tensors = torch.randn(3, 1, 4, 2, 8).unbind()
    return torch.compile(module, backend="eager")(*tensors), module(*tensors)
