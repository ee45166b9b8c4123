"""Transformer Engine's ``DotProductAttention``, by anyattn: the same arguments, any kernel, no Transformer Engine.

Use::

    from anyattn.integrations.transformer_engine import DotProductAttention

in place of ``from transformer_engine.pytorch import DotProductAttention``. The constructor and ``forward`` take the
arguments of Transformer Engine 2.20 in their order, and context parallelism its data layout. What each does, and what
is refused by name: docs/transformer-engine.md.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from anyattn._api import attention, attention_in_splits
from anyattn._errors import InvalidArgument, ShapeError, Unsupported
from anyattn.integrations import _te_options as options
from anyattn.integrations import _te_policies, _te_rows
from anyattn.integrations._te_call import Call, Settled, check_runs, masked, settle, unread
from anyattn.integrations._te_context import CPLoadBalancingStrategy
from anyattn.integrations._te_dropout import Forks
from anyattn.integrations._te_module import Module
from anyattn.integrations._transformers_memory import forget

__all__ = ["CPLoadBalancingStrategy", "DotProductAttention", "forget"]


class DotProductAttention(Module):
    """Attention of queries over keys, with the arguments of Transformer Engine's module of this name.

    Args:
        num_attention_heads: of the whole layer; over ``tp_size`` ranks each has its share.
        kv_channels: head_dim of keys, and of values where it is the second of two.
        num_gqa_groups: key heads of the whole layer; default: as many as heads.
        attention_dropout: probability of dropping an attention weight, while the module is in training.
        qkv_format: "sbhd" (seq, batch, heads, head_dim), "bshd" or "thd" (rows, heads, head_dim).
        attn_mask_type: "no_mask", "padding", "causal" (top-left aligned), "padding_causal", "causal_bottom_right",
            "padding_causal_bottom_right" or "arbitrary".
        window_size: (left, right) keys visible on either side of a query's own position; -1 is unbounded.
        bottom_right_diagonal: where windows and ALiBi are aligned; causal mask types fix it. Default: bottom-right.
        softcap: s -> softcap * tanh(s / softcap) of the scaled scores; 0.0 is none.
        sequence_parallel: where it is set, dropout draws from the current generator, and not inside the tracker.
        tp_size: tensor-parallel ranks.
        get_rng_state_tracker: gives a tracker whose ``fork()`` dropout runs in.
        tp_group: their group; overrides ``tp_size``.
        layer_number: kept, without effect.
        attention_type: "self" or "cross"; says whether one padding mask serves queries and keys.
        cp_group: see :meth:`set_context_parallel_group`.
        cp_global_ranks: the same.
        cp_stream: kept, without effect.
        cp_comm_type: the same.
        softmax_scale: of the scores; default: head_dim ** -0.5.
        softmax_type: "vanilla"; "off-by-one", a sink of zero; or "learnable", a sink for each head, which is the
            parameter ``softmax_offset`` (heads of this rank,).
        return_max_logit: return (out, the largest score of each head) instead of out. It costs a pass of its own.
        name: kept, without effect.

    ``check_offsets``, an attribute of class or module (True): the values of ``cu_seqlens_*`` are copied to the host
    once per batch, at the first layer, and checked. Where it is False, nothing waits for the device: with "thd",
    ``max_seqlen_q`` and ``max_seqlen_kv`` must then be given, and the caller answers for the values.

    Raises:
        InvalidArgument: values that are none of those allowed.

    Example::

        >>> import torch
        >>> from anyattn.integrations.transformer_engine import DotProductAttention
        >>> layer = DotProductAttention(8, 64, num_gqa_groups=2, qkv_format="bshd")
        >>> q, k, v = torch.randn(1, 16, 8, 64), *torch.randn(2, 1, 16, 2, 64)
        >>> layer(q, k, v).shape
        torch.Size([1, 16, 512])
    """

    check_offsets: bool = True

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        softcap: float = 0.0,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        tp_group: dist.ProcessGroup | None = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: dist.ProcessGroup | list[dist.ProcessGroup] | None = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: torch.cuda.Stream | None = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool | None = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.qkv_format = options.choice("qkv_format", qkv_format, options.FORMATS)
        self.attn_mask_type = options.mask_type(attn_mask_type)
        #: As the constructor's mask type has it, -1 for unbounded.
        self.window_size: tuple[int, int] | None = options.stored_window(self.attn_mask_type, window_size)
        self.bottom_right_diagonal = bottom_right_diagonal
        options.soft_cap(softcap)
        self.softcap = softcap
        self.tp_size = tp_size
        self.set_tensor_parallel_group(tp_group)
        self.num_attention_heads = num_attention_heads
        self.num_gqa_groups = num_attention_heads if num_gqa_groups is None else num_gqa_groups
        self._check_heads()
        self.num_gqa_groups_per_partition = self.num_gqa_groups // self.tp_size
        self._heads_of_rank = num_attention_heads // self.tp_size
        both = (kv_channels, kv_channels) if isinstance(kv_channels, int) else tuple(kv_channels)
        self.hidden_size_per_attention_head_k, self.hidden_size_per_attention_head_v = both
        self.layer_number = 1 if layer_number is None else layer_number
        self._layer = layer_number
        self.attention_type = options.choice("attention_type", attention_type, ("self", "cross"))
        self.attention_dropout = attention_dropout
        self.sequence_parallel = sequence_parallel
        self.get_rng_state_tracker = get_rng_state_tracker
        self.rng_states_tracker = None
        if get_rng_state_tracker is not None and not sequence_parallel:
            self.rng_states_tracker = get_rng_state_tracker()
        self.softmax_scale = 1.0 / math.sqrt(both[0]) if softmax_scale is None else softmax_scale
        self.return_max_logit = bool(return_max_logit)
        #: None: as torch's own flag says at each call.
        self.deterministic = None if _may_vary() else True
        self._make_sink(softmax_type, self._heads_of_rank)
        self.set_context_parallel_group(cp_group, cp_global_ranks, cp_stream, cp_comm_type)

    def _check_heads(self) -> None:
        heads, groups, ranks = self.num_attention_heads, self.num_gqa_groups, self.tp_size
        if heads % groups or heads % ranks:
            raise InvalidArgument(
                f"num_attention_heads must be a multiple of num_gqa_groups and of tp_size, got {heads}, {groups} and "
                f"{ranks}"
            )

    def _own_window(self) -> tuple[int, int] | None:
        """The module's window; None where it is unbounded under every mask type."""
        own = self.window_size
        return None if own in ((-1, -1), (-1, 0)) else own

    def forward(
        self,
        query_layer: Tensor | None = None,
        key_layer: Tensor | None = None,
        value_layer: Tensor | None = None,
        attention_mask: Tensor | tuple[Tensor, Tensor] | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        softcap: float | None = None,
        checkpoint_core_attention: bool = False,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        fast_zero_fill: bool = True,
        inference_params: Any = None,
        pad_between_seqs: bool | None = None,
        fp8_output: bool | None = False,
        bf16_backward: bool | None = False,
        num_splits: int | None = 1,
        score_mod: Callable[..., Any] | None = None,
        score_mod_bprop: Callable[..., Any] | None = None,
        score_mod_tensors: dict[str, Tensor] | None = None,
        score_mod_bprop_tensors: dict[str, Tensor] | None = None,
        qkv_layer: Tensor | None = None,
        kv_layer: Tensor | None = None,
        qkv_interleave_dim: int = -3,
        thd_attention_policies: list[dict[str, Any]] | None = None,
        thd_attention_policy_dispatch: str = "auto",
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention; None takes what the constructor was given.

        Args:
            query_layer: (seq, batch, heads, head_dim) or as ``qkv_format`` says; this rank's rows under context
                parallelism, this rank's heads under tensor parallelism. Any device.
            key_layer: the same, with the key heads.
            value_layer: as key_layer, with the head_dim of values.
            attention_mask: with padding mask types of 4-D tensors, bool (batch, 1, 1, max_seqlen), True in padding, or
                two of them for cross-attention; with "arbitrary", bool, True where a key is hidden, broadcastable to
                (batch, heads, rows of q, rows of k). Not looked at otherwise.
            qkv_format: "sbhd", "bshd" or "thd".
            cu_seqlens_q: int32 (sequences + 1,): cumulative real lengths, of the whole batch, with padding mask types.
            cu_seqlens_kv: the same of keys; may be the same tensor.
            cu_seqlens_q_padded: first rows of the sequences in memory, with "thd"; of both sides or of none. A side
                without padding takes its own cu_seqlens.
            cu_seqlens_kv_padded: the same of keys.
            max_seqlen_q: with "thd", at least the longest length.
            max_seqlen_kv: the same of keys.
            attn_mask_type: see the class.
            window_size: see the class.
            bottom_right_diagonal: see the class.
            softcap: see the class.
            checkpoint_core_attention: compute attention again in backward, and keep only q, k and v until then.
            core_attention_bias_type: "no_bias", "pre_scale_bias" (added before scaling), "post_scale_bias" or "alibi".
            core_attention_bias: broadcastable to (batch, heads, rows of q, rows of k). Gets a gradient.
            alibi_slopes: (heads,) or (batch, heads); default: the geometric series of the ALiBi paper.
            fast_zero_fill: without effect: padding is always zero.
            inference_params: refused.
            pad_between_seqs: None: as the padded offsets say. True and False must agree with them.
            fp8_output: refused.
            bf16_backward: without effect: backward is never in FP8.
            num_splits: in how many parts the kernel takes keys in forward, side by side, before it merges the results;
                0: as many as it chooses; None: 1. With other than 1, kernels that do not split are passed over.
            score_mod: refused.
            score_mod_bprop: refused.
            score_mod_tensors: refused.
            score_mod_bprop_tensors: refused.
            qkv_layer: q, k and v in one tensor, in place of the three.
            kv_layer: k and v in one tensor, in place of the two.
            qkv_interleave_dim: the dim of qkv_layer or kv_layer that counts them, -3 or -2.
            thd_attention_policies: masks for some sequences of a "thd" batch each; see docs/transformer-engine.md.
            thd_attention_policy_dispatch: "auto" or "grouped", which compute the same.

        Returns:
            out, with heads and head_dim as one dim: (seq, batch, heads * head_dim_v), (batch, seq, ...) or (rows, ...).
            Exactly zero in padding. With ``return_max_logit``, (out, float32 (heads,)): the largest score of each head
            over the whole batch, all context-parallel ranks' included, without gradient; -inf where nothing is seen.

        Raises:
            InvalidArgument: (or a subclass) arguments that do not go together.
            Unsupported: what nothing here can do, by the argument's name.
            NoBackend: no kernel takes the call; it lists every reason.
        """
        given: dict[str, Any] = {  # not locals(): torch 2.11's compiler does not take that
            "self": self, "query_layer": query_layer, "key_layer": key_layer, "value_layer": value_layer,
            "attention_mask": attention_mask, "qkv_format": qkv_format, "cu_seqlens_q": cu_seqlens_q,
            "cu_seqlens_kv": cu_seqlens_kv, "cu_seqlens_q_padded": cu_seqlens_q_padded,
            "cu_seqlens_kv_padded": cu_seqlens_kv_padded, "max_seqlen_q": max_seqlen_q,
            "max_seqlen_kv": max_seqlen_kv, "attn_mask_type": attn_mask_type, "window_size": window_size,
            "bottom_right_diagonal": bottom_right_diagonal, "softcap": softcap,
            "checkpoint_core_attention": checkpoint_core_attention,
            "core_attention_bias_type": core_attention_bias_type, "core_attention_bias": core_attention_bias,
            "alibi_slopes": alibi_slopes, "fast_zero_fill": fast_zero_fill, "inference_params": inference_params,
            "pad_between_seqs": pad_between_seqs, "fp8_output": fp8_output, "bf16_backward": bf16_backward,
            "num_splits": num_splits, "score_mod": score_mod, "score_mod_bprop": score_mod_bprop,
            "score_mod_tensors": score_mod_tensors, "score_mod_bprop_tensors": score_mod_bprop_tensors,
            "qkv_layer": qkv_layer, "kv_layer": kv_layer, "qkv_interleave_dim": qkv_interleave_dim,
            "thd_attention_policies": thd_attention_policies,
            "thd_attention_policy_dispatch": thd_attention_policy_dispatch,
        }  # fmt: skip
        options.refuse(given)
        if self.cp_group is not None and torch.compiler.is_compiling():
            from anyattn.integrations._te_breaking import eagerly

            return eagerly(DotProductAttention.forward, given)  # type: ignore[no-any-return]
        q, k, v = options.unpacked(query_layer, key_layer, value_layer, qkv_layer, kv_layer, qkv_interleave_dim)
        options.refuse_quantised(query_layer=q, key_layer=k, value_layer=v)
        layout = options.choice("qkv_format", self.qkv_format if qkv_format is None else qkv_format, options.FORMATS)
        self._check_tensors(q, k, v, layout)
        cap = options.soft_cap(self.softcap if softcap is None else softcap)
        options.check_bias(core_attention_bias_type, core_attention_bias, alibi_slopes, cap)
        kind = options.mask_type(self.attn_mask_type if attn_mask_type is None else attn_mask_type)
        sides = _te_rows.sides(
            (cu_seqlens_q, cu_seqlens_kv), (cu_seqlens_q_padded, cu_seqlens_kv_padded), (max_seqlen_q, max_seqlen_kv),
            attention_mask if layout != "thd" and "padding" in kind else None, self.attention_type == "cross",
            pad_between_seqs is False,
        )  # fmt: skip
        aligned = self.bottom_right_diagonal if bottom_right_diagonal is None else bottom_right_diagonal
        window = self._own_window() if window_size is None else window_size
        slopes, bias = self._terms(core_attention_bias_type, core_attention_bias, alibi_slopes, q)
        call = Call(
            q, k, v, layout, options.masking(kind, None, aligned), self.softmax_scale, cap, self._sink(), slopes,
            bias, sides=sides, ranks=self._ranks(), strategy=self.load_balancing_strategy, check=self.check_offsets,
            layer=self._layer,
        )  # fmt: skip
        if thd_attention_policies is not None:
            if attn_mask_type is not None or window_size is not None or self.return_max_logit:
                raise InvalidArgument(
                    "thd_attention_policies say masks and windows: leave out attn_mask_type, window_size and "
                    "return_max_logit"
                )
            calls = _te_policies.calls(call, thd_attention_policies, aligned, pad_between_seqs)
            outs = [self._run(settle(each), checkpoint_core_attention, num_splits) for each in calls]
            return _te_policies.together(outs, q, v)
        call = masked(call, kind, window, aligned, attention_mask, pad_between_seqs)
        if self.return_max_logit and unread(call):
            raise Unsupported(
                "return_max_logit with offsets that are not read (check_offsets=False, or inside a CUDA graph): it is "
                "computed sequence by sequence: leave check_offsets True, or return_max_logit False"
            )
        settled = settle(call)
        if self.return_max_logit:
            check_runs(settled.arguments.get("packing"))
        out = self._run(settled, checkpoint_core_attention, num_splits)
        return (out, settled.largest()) if self.return_max_logit else out

    def _check_tensors(self, q: Tensor, k: Tensor, v: Tensor, layout: str) -> None:
        """The sizes that the constructor was told."""
        rank = 3 if layout == "thd" else 4
        for name, x in (("query_layer", q), ("key_layer", k), ("value_layer", v)):
            if not isinstance(x, Tensor) or x.ndim != rank:
                got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ShapeError(f"{name} must be a {rank}-D tensor with qkv_format={layout!r}, got {got}")
        given = (q.shape[-2], k.shape[-2], v.shape[-2]), (q.shape[-1], k.shape[-1], v.shape[-1])
        groups, dim = self.num_gqa_groups_per_partition, self.hidden_size_per_attention_head_k
        wanted = (self._heads_of_rank, groups, groups), (dim, dim, self.hidden_size_per_attention_head_v)
        if given != wanted:
            raise ShapeError(
                f"heads of q, k and v {given[0]}, their head dims {given[1]}: the module was made for {wanted[0]} and "
                f"{wanted[1]}, by num_attention_heads={self.num_attention_heads}, num_gqa_groups={self.num_gqa_groups} "
                f"(default: num_attention_heads), tp_size={self.tp_size} and kv_channels"
            )

    def _terms(
        self, kind: str, bias: Tensor | None, slopes: Tensor | None, q: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """(ALiBi's slopes, bias) as ``attention`` takes them."""
        if kind == "pre_scale_bias":
            assert bias is not None
            return None, bias * self.softmax_scale
        if kind == "alibi" and slopes is None:
            return options.plain_slopes(q.shape[-2], q.device), None
        return None if slopes is None else slopes.detach(), bias

    def _run(self, settled: Settled, again: bool, num_splits: int | None) -> Tensor:
        """Attention, inside of the generator's fork where it drops."""
        dropout = self.attention_dropout if self.training else 0.0
        arguments = settled.arguments | {"dropout": dropout, "deterministic": self.deterministic}
        splits = options.splits(num_splits)
        attend: Callable[..., Any] = attention if splits == 1 else partial(attention_in_splits, splits)
        forks = Forks(self.rng_states_tracker if dropout else None)

        # By position, those of the terms too: checkpoint() notices what is written to before it runs again.
        terms = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}

        def run(q: Tensor, k: Tensor, v: Tensor, *given: Tensor) -> Tensor:
            with forks.next():
                return attend(q, k, v, **arguments | dict(zip(terms, given, strict=True)))  # type: ignore[no-any-return]

        tensors = settled.q, settled.k, settled.v, *terms.values()
        out = checkpoint(run, *tensors, use_reentrant=False) if again and torch.is_grad_enabled() else run(*tensors)
        return settled.back(out).flatten(-2)


def _may_vary() -> bool:
    """Transformer Engine's own variable: "0" asks for results that repeat."""
    return os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1") != "0"
