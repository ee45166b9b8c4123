"""Masks that differ between sequences of a packed batch: a call for each mask, in which the others are padding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from anyattn._errors import InvalidArgument, Unsupported
from anyattn._packing import Packing
from anyattn.integrations import _te_options as options
from anyattn.integrations import _te_rows
from anyattn.integrations._te_call import Call
from anyattn.integrations._te_options import Masking
from anyattn.integrations._te_rows import Given, Rows
from anyattn.integrations._transformers_memory import Same

_NEEDED = {"sequence_ids", "mask_type", "window_size"}
_ALLOWED = _NEEDED | {"bottom_right_diagonal"}


@dataclass(frozen=True, eq=False)
class _Policy:
    ids: Tensor
    """Sequences, ascending."""
    masking: Masking


def calls(call: Call, given: Any, aligned: bool | None, pad_between: bool | None) -> list[Call]:
    """A call for each policy that has sequences.

    Args:
        call: without mask and rows.
        given: ``thd_attention_policies``: dicts with "sequence_ids" (integers, ascending), "mask_type" (a padding
            one), "window_size" and perhaps "bottom_right_diagonal". Each sequence is in one of them.
        aligned: the call's own alignment, where a policy has none.
        pad_between: as ``forward`` takes it.

    Raises:
        InvalidArgument: policies that do not say once for each sequence how it is masked.
        Unsupported: bias, ALiBi, or several ranks.
    """
    if call.layout != "thd":
        raise InvalidArgument(f"thd_attention_policies go with qkv_format='thd', got {call.layout!r}")
    if call.bias is not None or call.slopes is not None:
        raise Unsupported("thd_attention_policies with bias or ALiBi: call once for each kind of sequence")
    if call.ranks is not None:
        raise Unsupported("thd_attention_policies under context parallelism: call once for each kind of sequence")
    if not call.check:
        raise Unsupported("thd_attention_policies with check_offsets=False: sequence numbers are read on the host")
    if _te_rows.captured(call.q):
        raise Unsupported(
            "thd_attention_policies cannot be captured in a CUDA graph, for sequence numbers are read on the host: "
            "call once for each kind of sequence"
        )
    policies = _policies(given, aligned)
    assert call.sides is not None
    _te_rows.check(*call.sides, True, pad_between)
    queries, keys = call.sides
    key = (call.q.device, *(Same(p.ids) for p in policies))
    rows: list[Rows | None] = _te_rows.remembered(
        "policies", queries, keys, key, lambda: _split(call, policies), call.layer
    )  # fmt: skip
    return [
        replace(call, masking=policy.masking, rows=own)
        for policy, own in zip(policies, rows, strict=True)
        if own is not None
    ]


def _policies(given: Any, aligned: bool | None) -> list[_Policy]:
    if not isinstance(given, (list, tuple)) or not given:
        raise InvalidArgument(f"thd_attention_policies must be a list of dicts, got {given!r}")
    found = []
    for number, policy in enumerate(given):
        if not isinstance(policy, dict) or not _NEEDED <= set(policy) <= _ALLOWED:
            raise InvalidArgument(
                f"policy {number} must be a dict with {', '.join(sorted(_NEEDED))} and perhaps bottom_right_diagonal; "
                f"got {sorted(policy) if isinstance(policy, dict) else policy!r}"
            )
        ids = policy["sequence_ids"]
        if not isinstance(ids, Tensor) or ids.ndim != 1 or ids.dtype not in (torch.int32, torch.int64):
            raise InvalidArgument(f"sequence_ids of policy {number} must be a 1-D int32 or int64 tensor")
        kind = options.mask_type(policy["mask_type"])
        if "padding" not in kind:
            raise InvalidArgument(f"mask_type of policy {number} must be a padding one, got {kind!r}")
        own = policy.get("bottom_right_diagonal")
        window = options.window_of(kind, policy["window_size"])
        found.append(_Policy(ids, options.masking(kind, window, aligned if own is None else own)))
    return found


def _split(call: Call, policies: list[_Policy]) -> list[Rows | None]:
    """Where the sequences of each policy lie; None where it has none."""
    queries, keys = _sides(call)
    whole = _te_rows.rows_of(queries, keys, True, torch.device("cpu"), call.layer)
    numbers = [policy.ids.tolist() for policy in policies]
    count = len(whole.queries.host_lengths()[0])
    if sorted(n for own in numbers for n in own) != list(range(count)) or any(own != sorted(own) for own in numbers):
        raise InvalidArgument(
            f"the sequence_ids of all policies must be 0 to {count - 1}, each in one policy, ascending; got {numbers}"
        )
    device = call.q.device
    return [
        Rows(_only(whole.queries, own, device), None if whole.keys is None else _only(whole.keys, own, device))
        if own
        else None
        for own in numbers
    ]


def _sides(call: Call) -> tuple[Given, Given]:
    assert call.sides is not None
    return call.sides


def _only(packing: Packing, numbers: list[int], device: torch.device) -> Packing:
    """Some sequences of a packing, where they lie; all other rows are padding."""
    lengths, starts = packing.host_lengths()
    cumulative = [0]
    for n in numbers:
        cumulative.append(cumulative[-1] + lengths[n])
    firsts = [*(starts[n] for n in numbers), packing.rows]
    offsets = torch.tensor([cumulative, firsts], dtype=torch.int32, device="cpu")
    return _te_rows.moved(Packing(offsets[0], offsets[1]), device)


def together(outs: list[Tensor], q: Tensor, v: Tensor) -> Tensor:
    """The results of all calls; each is zero where the others are not."""
    if not outs:
        return q.new_zeros(q.shape[0], q.shape[1] * v.shape[2]) + 0 * (q.sum() + v.sum())
    total = outs[0]
    for out in outs[1:]:
        total = total + out
    return total
