"""The batches of a transformers model: which documents they hold, and a rank's rows of them.

Legend: B batch entries and S positions of the whole batch; R rows of a rank's shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anyattn._context._plan import ContextPlan
from anyattn._errors import ContextError, PackingError, Unsupported
from anyattn._packing import Packing
from anyattn.integrations._layout import Layout, Pattern, Shape, check_agrees, documents_of, from_offsets, lay_out
from anyattn.integrations._transformers_masks import check_mask
from anyattn.integrations._transformers_packed import check_covers, given_offsets, given_packing, is_flat

IGNORED = -100
#: Tensors of a batch that have a row per token, and what rows without a token get.
PER_TOKEN = {"input_ids": 0, "inputs_embeds": 0, "token_type_ids": 0, "labels": IGNORED, "shift_labels": IGNORED}
#: What describes the batch, and is in the plan.
DESCRIPTIONS = (
    "attention_mask", "packing", "packing_kv", "cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens_q", "cu_seqlens_k",
    "max_length_q", "max_length_k", "max_seqlen_q", "max_seqlen_k", "seq_idx",
)  # fmt: skip

_OFFSETS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens_q", "cu_seqlens_k")


def packing_of(batch: Mapping[str, Any], shape: Shape) -> Packing:
    """The sequences of a batch, by the rows of the flattened (B, S), from whatever describes them.

    Raises:
        PackingError: sources that disagree, or padding inside of a document.
        ShapeError: a mask of another batch size.
    """
    real, positions = _real_tokens(batch.get("attention_mask"), shape), batch.get("position_ids")
    documents = None
    if isinstance(positions, Tensor) and positions.ndim == 2:
        documents = documents_of(positions, shape.batch, real)
    explicit = _explicit(batch, shape, real is not None)
    if explicit is not None:
        check_agrees(Layout(explicit, flat=explicit._shape is None), shape, real, documents)
        return explicit
    layout = lay_out(shape, Pattern(causal=True), real, documents)
    if layout.mask is not None:
        raise PackingError("context_parallel takes documents that are runs of tokens, and padding splits one of these")
    return layout.packing or Packing.from_lengths([shape.queries] * shape.batch)


def _real_tokens(mask: Tensor | None, shape: Shape) -> Tensor | None:
    """Bool (B, S) on the CPU, or None where all are real. Tokens after the end of the mask are padding."""
    if mask is None:
        return None
    check_mask(mask, shape.batch)
    real = mask[:, : shape.queries].cpu() != 0
    real = torch.nn.functional.pad(real, (0, shape.queries - real.shape[1]))
    return None if bool(real.all()) else real


def _explicit(batch: Mapping[str, Any], shape: Shape, padded: bool) -> Packing | None:
    """From ``packing`` or cumulative lengths; counts all rows of the flattened batch, of which a mask pads some."""
    packing, packing_kv = (given_packing(batch, name) for name in ("packing", "packing_kv"))
    offsets = given_offsets(batch)
    if offsets is not None:
        longest = (None if x is None else int(x) for x in (offsets.longest, offsets.longest_keys))
        layout = from_offsets(offsets.queries, offsets.keys, *longest)
        packing, packing_kv = layout.packing, layout.packing_kv
    if packing_kv is not None:
        raise Unsupported("context_parallel divides self-attention: keys of other lengths (packing_kv) are not divided")
    if packing is None:
        return None
    check_covers(packing, shape, padded)
    rows = shape.batch * shape.queries
    if packing._shape is None and offsets is None and not is_flat(packing, shape):
        return packing.for_entries(shape.batch, shape.queries)
    if packing._facts.rows in (None, rows):
        return packing
    return Packing(packing.cu_seqlens, packing.cu_seqlens_padded, rows=rows)


def says_documents(batch: Mapping[str, Any]) -> bool:
    return any(batch.get(name) is not None for name in ("packing", *_OFFSETS))


def divide(batch: dict[str, Any], plan: ContextPlan, shape: Shape, explicit: bool) -> dict[str, Any]:
    """This rank's rows of a batch, and the plan; labels are shifted first, and counted in the whole batch."""
    labels, shifted = batch.get("labels"), batch.get("shift_labels")
    ignored = batch.get("ignore_index", IGNORED)  # as the loss takes it
    if labels is not None:
        if shifted is None:
            shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=ignored)
        batch["shift_labels"] = shifted
        _check_labels(shifted, ignored, plan)
        if batch.get("num_items_in_batch") is None:
            batch["num_items_in_batch"] = (shifted != ignored).sum()
    divided = {name: value for name, value in batch.items() if name not in DESCRIPTIONS}
    for name, fill in PER_TOKEN.items():
        if isinstance(x := divided.get(name), Tensor):
            fill = ignored if fill == IGNORED else fill
            divided[name] = plan.shard(x.flatten(0, 1), fill=fill)[None]
    tokens = divided["input_ids"] if divided.get("input_ids") is not None else divided["inputs_embeds"]
    positions = batch.get("position_ids")
    if positions is None and explicit:
        divided["position_ids"] = plan.position_ids.to(tokens.device)[None]
    else:
        if positions is None:  # as models count them
            positions = torch.arange(shape.queries, device=tokens.device)[None]
        whole = positions.expand(*positions.shape[:-2], shape.batch, shape.queries)
        divided["position_ids"] = plan.shard(whole.flatten(-2), dim=-1).unsqueeze(-2)
    return {**divided, "plan": plan}


def _check_labels(shifted: Tensor, ignored: int, plan: ContextPlan) -> None:
    """No token may be predicted from padding: there is no such row on any rank."""
    if sum(plan._layout.lengths) == plan._memory.rows:
        return
    real = plan._index("whole", torch.device("cpu")) >= 0
    lost = ((shifted.flatten().cpu() != ignored) & ~real).nonzero()
    if lost.numel():
        raise ContextError(
            f"the label of token {int(lost[0]) + 1} of the flattened batch would be predicted from padding, which no "
            f"rank computes: label it {ignored} (after left padding, the first real token too)"
        )


def digest(x: Any) -> int | None:
    """A number that depends on all values of integers and on their order."""
    if not isinstance(x, Tensor):
        return None
    flat = x.flatten().long()
    return int((flat * torch.arange(1, flat.numel() + 1, device=flat.device)).sum())


def sizes_of(config: Any) -> dict[str, Any]:
    """Heads and dims as :meth:`ContextParallel.plan` takes them; nothing where layers differ."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    several = any(getattr(text, name, None) for name in ("global_head_dim", "num_global_key_value_heads"))
    if not isinstance(heads, int) or several:
        return {}
    if getattr(text, "kv_lora_rank", None):  # latent attention: keys are expanded to as many heads
        return {"num_heads": heads, "num_kv_heads": heads}
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return {"num_heads": heads, "num_kv_heads": kv_heads} if isinstance(kv_heads, int) else {}
