"""What Transformer Engine's attention module has beside attention: its sink, its groups of ranks, its checkpoints.

The class here is the base of ``DotProductAttention``, which adds the constructor's arguments and ``forward``. It keeps
the attributes, and the entries of a state dict, that code written for Transformer Engine's module looks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anyattn.integrations import _te_options as options
from anyattn.integrations._te_context import CPLoadBalancingStrategy, Ranks, ranks_of, strategy_of


class Module(torch.nn.Module):
    """A module with a sink for each head and with groups of ranks, which computes nothing yet."""

    softmax_type: str
    softmax_offset: Tensor | None
    """float32 (heads of this rank,); None without a sink."""
    tp_size: int

    # --- the sink ---

    def _make_sink(self, kind: str, heads: int) -> None:
        """Set ``softmax_offset`` for so many heads: a parameter, a buffer, or None."""
        self.softmax_type = options.choice("softmax_type", kind, options.SOFTMAXES)
        if kind == "vanilla":
            self.softmax_offset = None
            return
        # As Transformer Engine's, which knows no other device; a default that was chosen goes first.
        device = torch.get_default_device()
        if device.type == "cpu" and torch.cuda.is_available():
            device = torch.device("cuda")
        zeros = torch.zeros(heads, dtype=torch.float32, device=device)
        if kind == "learnable":
            self.softmax_offset = torch.nn.Parameter(zeros)
        else:
            self.register_buffer("softmax_offset", zeros, persistent=False)

    def reset_parameters(self) -> None:
        """Make sinks zero, as new modules have them; after ``to_empty``, for one."""
        if self.softmax_offset is not None:
            torch.nn.init.zeros_(self.softmax_offset)

    def _sink(self) -> Tensor | None:
        """One for each head; that of "off-by-one" is zero whatever the buffer holds, which no checkpoint fills."""
        found = self.softmax_offset
        return torch.zeros_like(found) if found is not None and self.softmax_type == "off-by-one" else found

    # --- groups ---

    def set_tensor_parallel_group(self, tp_group: dist.ProcessGroup | None) -> None:
        """Set the tensor-parallel group. Attention of different heads needs no communication: only its size counts.

        Args:
            tp_group: the group; None leaves ``tp_size`` as it is.
        """
        self.tp_group = tp_group
        if tp_group is not None:
            self.tp_size = dist.get_world_size(tp_group)

    def set_context_parallel_group(
        self,
        cp_group: dist.ProcessGroup | list[dist.ProcessGroup] | None,
        cp_global_ranks: list[int] | None,
        cp_stream: torch.cuda.Stream | None,
        cp_comm_type: str = "p2p",
        load_balancing_strategy: Any = CPLoadBalancingStrategy.DUAL_CHUNK_SWAP,
    ) -> None:
        """Share every sequence among the ranks of a group; q, k and v of ``forward`` are then this rank's rows.

        Args:
            cp_group: the group; for "a2a+p2p", [the a2a group, the p2p group]; None for none.
            cp_global_ranks: the ranks of all members; needed for "a2a+p2p", neighbours in an a2a group first.
            cp_stream: kept, without effect: communication has streams of its own.
            cp_comm_type: "p2p", "all_gather", "a2a" or "a2a+p2p".
            load_balancing_strategy: DUAL_CHUNK_SWAP: each sequence, with its padding, is cut in 2 * ranks chunks, of
                which rank r holds r and 2 * ranks - 1 - r. NO_LOAD_BALANCE ("thd"): the rows of the batch are cut in
                equal runs.

        Raises:
            ContextError: no such scheme or strategy.
        """
        options.choice("cp_comm_type", cp_comm_type, ("p2p", "all_gather", "a2a", "a2a+p2p"))
        self.load_balancing_strategy = strategy_of(load_balancing_strategy)
        self.cp_group, self.cp_global_ranks = cp_group, cp_global_ranks
        self.cp_stream, self.cp_comm_type = cp_stream, cp_comm_type
        self._found_ranks: tuple[Any, Any, str, Ranks | None] | None = None

    def _ranks(self) -> Ranks | None:
        """Who shares sequences; found at the first call, by all of them together."""
        if self.cp_group is None:
            return None
        found = self._found_ranks
        if found is None or (found[0], found[1], found[2]) != (self.cp_group, self.cp_global_ranks, self.cp_comm_type):
            ranks = ranks_of(self.cp_group, self.cp_global_ranks, self.cp_comm_type)
            found = self._found_ranks = (self.cp_group, self.cp_global_ranks, self.cp_comm_type, ranks)
        return found[3]

    # --- checkpoints ---

    def get_extra_state(self) -> Tensor:
        """Nothing, as Transformer Engine's module has it where attention is not in FP8."""
        return torch.empty(0, dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Scales of FP8 attention, which a checkpoint may hold, mean nothing here."""

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        """Extra states that are missing, or lie where older releases had them, are no mistakes."""
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        for names, name in ((missing, "_extra_state"), (unexpected, "fused_attention._extra_state")):
            while prefix + name in names:
                names.remove(prefix + name)
