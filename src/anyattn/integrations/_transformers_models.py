"""What certain transformers models need: a complete mask, or a keyword argument of their own that attention must heed.

Most models hand the mask to attention untouched and say the rest by keywords that all of them share. A few compute with
the mask themselves, and a few pass a choice of keys, or sinks, by names of their own. They are told by
``config.model_type`` and by the keyword; anything else that a layer says, and nobody here reads, is refused by name.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn._errors import InvalidArgument, ShapeError, Unsupported
from anyattn.integrations._transformers_settled import NAMES

# --- masks ---


def _always(config: Any) -> bool:
    return True


class Need(NamedTuple):
    """What a model needs of its mask, and why."""

    why: str
    """What its own code does with it."""
    refused: bool = False
    """No mask of anyattn's would do: the model's attention is written out and calls nobody."""
    applies: Callable[[Any], bool] = _always
    """Whether a config of this type has it."""
    additive: bool = False
    """Its own code reads numbers to add, and not bools."""


def _shares_keys(config: Any) -> bool:
    return bool(getattr(config, "num_kv_shared_layers", 0))


def _selects_blocks(config: Any) -> bool:
    return "minimax_m3_sparse" in (getattr(config, "layer_types", None) or ())


_INDEXER = "its indexer adds the mask to the scores by which it chooses keys"
_LAST_TOKENS = "it cuts the mask to the queries whose logits are kept, before layers that share keys"

#: By ``model_type`` of the config that a mask is made for.
NEEDS: dict[str, Need] = {
    "axk2": Need(_INDEXER),
    "bigbird_pegasus": Need("its encoder adds the mask to scores of its own", refused=True),
    "deepseek_v32": Need(_INDEXER),
    "deepseek_v4": Need("it lengthens an additive mask by its compressed keys", additive=True),
    "doge": Need("it adds the mask to one of its own, by which it chooses keys"),
    "dots3_note_text": Need(_INDEXER),
    "gemma4_text": Need(_LAST_TOKENS, applies=_shares_keys),
    "gemma4_unified_text": Need(_LAST_TOKENS, applies=_shares_keys),
    "git": Need("its text layers add the mask to scores of their own", refused=True),
    "glm_moe_dsa": Need(_INDEXER),
    "hy_v4": Need(_INDEXER),
    "lasr_encoder": Need("its convolutions read from the mask which frames are padding"),
    "minimax_m3_vl_text": Need("a choice of blocks of keys is taken together with the mask", applies=_selects_blocks),
    "mistral_large4_text": Need(_INDEXER),
    "nllb-moe": Need("its routers read from an additive mask which tokens are padding", additive=True),
}


def need_of_mask(config: Any) -> Need | None:
    """What a model that computes with its masks itself needs; None: nothing, it hands them on.

    Args:
        config: that a mask is made for; None where nobody says.

    Raises:
        Unsupported: its code adds the mask to scores of its own, and would not call anyattn.
    """
    need = need_of(config)
    if need is not None and need.refused:
        raise Unsupported(
            f"{config.model_type} attends by code of its own, which no implementation replaces: {need.why}. "
            "model.set_attn_implementation('eager')"
        )
    return need


def as_added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as floats to add: 0 where a query sees a key."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def need_of(config: Any) -> Need | None:
    """What a model with this config needs of its mask; None: nothing."""
    need = NEEDS.get(getattr(config, "model_type", ""))
    return need if need is not None and need.applies(config) else None


# --- keyword arguments ---

#: Keywords that attention reads, or that say nothing to it.
SILENT = frozenset({
    *NAMES, "plan", "cache", "block_table", "output_attentions",
    "cache_position", "use_cache", "past_key_values", "position_embeddings", "encoder_hidden_states", "seq_idx",
    "output_hidden_states", "output_router_logits", "logits_to_keep", "return_dict", "num_items_in_batch", "labels",
})  # fmt: skip
#: Keywords that a few models have, and that attention without a plan heeds.
HEEDED = frozenset({"indices", "block_indices", "sinks"})
#: Keywords of a model's call that say which tokens see each other; names like these that nobody reads meant them.
_ABOUT_PACKING = (*NAMES, "plan")
_BEGINNINGS = ("cu_seq", "max_length_", "max_seqlen", "packing")
#: What ``anyattn.attention`` calls them, and what transformers does.
_OTHER_NAMES = {"window": "sliding_window", "causal": "is_causal"}
_LIKENESS = 0.88


def refuse_unread(module: torch.nn.Module, options: Mapping[str, Any], heeded: frozenset[str]) -> None:
    """Refuse keywords that say something to a layer's attention, and that nobody reads here.

    What the model was called with reaches attention too, whatever it is, and is nothing to it: what the layer itself
    passes, or its eager attention has a parameter for, is refused, and so is a misspelt word about packing.

    Args:
        module: the layer.
        options: keyword arguments of its call.
        heeded: names that are read.

    Raises:
        Unsupported: a keyword that the layer says, unless it is None or False.
        InvalidArgument: a keyword that is nearly one about packing, unless it is None or False.
    """
    meaning: Callable[[type, str], str] = _meaning
    if torch.compiler.is_compiling():
        from anyattn.integrations._transformers_constant import meaning
    for name, value in options.items():
        if value is None or value is False or name in SILENT or name in heeded:
            continue
        if name in HEEDED:
            raise Unsupported(
                f"{name}= of {type(module).__name__}, by which it chooses keys or adds sinks, does not go with a plan: "
                "leave out context_parallel"
            )
        meant = meaning(type(module), name)
        if meant == name:
            raise Unsupported(
                f"{type(module).__name__} says {name}= to its attention, and anyattn does not know what it means: "
                "model.set_attn_implementation('eager')"
            )
        if meant:
            raise InvalidArgument(
                f"{name}= reached the attention of {type(module).__name__}, where nobody reads it; {meant}= was "
                "probably meant: correct the name, or leave the argument out. Read as names about packing are "
                f"{', '.join(_ABOUT_PACKING)}"
            )


@functools.lru_cache(maxsize=1024)
def _meaning(kind: type, name: str) -> str:
    """What a keyword that nobody reads was meant for.

    Args:
        kind: class of the layer that it reached.
        name: of the keyword.

    Returns:
        The name itself, if the layer says it; the keyword about packing that it is nearly; else "", and it is nothing
        to attention.
    """
    if _says(kind, name):
        return name
    if name in _OTHER_NAMES:
        return _OTHER_NAMES[name]
    if name == "max_length" or name.endswith("_position_ids"):  # generate()'s and tokenizers'; other parts' positions
        return ""
    cutoff = 0.6 if name.startswith(_BEGINNINGS) else _LIKENESS
    return next(iter(difflib.get_close_matches(name, _ABOUT_PACKING, n=1, cutoff=cutoff)), "")


@functools.lru_cache(maxsize=1024)
def _says(kind: type, name: str) -> bool:
    """Whether a class of layers passes a keyword to attention itself, or has an eager attention that takes it."""
    classes = [cls for cls in kind.mro() if cls not in (torch.nn.Module, object)]
    eager = [getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None) for cls in classes]
    if any(function is not None and name in inspect.signature(function).parameters for function in eager):
        return True
    methods = [x for cls in classes for x in vars(cls).values() if inspect.isfunction(x)]
    return any(name in passed if (passed := _passed(method)) is not None else True for method in methods)


def _passed(method: Callable[..., Any]) -> frozenset[str] | None:
    """Keywords of all calls in a method whose first argument is the layer itself; None without a source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        return None
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    calls = [call for call in calls if isinstance(call.args[0], ast.Name) and call.args[0].id == "self"]
    return frozenset(keyword.arg for call in calls for keyword in call.keywords if keyword.arg is not None)


def choose(module: torch.nn.Module, queries: torch.Size, mask: Any, options: Mapping[str, Any]) -> Any:
    """The mask of a call, less the keys that the model did not choose.

    Args:
        module: the layer.
        queries: shape of the queries, (B, H, Q, D).
        mask: of the call.
        options: its keyword arguments; of ``indices``, integers (B, Q, n), a query sees the n keys named, and of
            ``block_indices``, integers (B, G, Q, n), the blocks of keys named, -1 for none, where G divides H.

    Returns:
        The mask where nothing was chosen; else a new 4-D one.

    Raises:
        Unsupported: a choice beside a mask that is not complete.
        ShapeError: a choice of another shape.
    """
    indices, blocks = options.get("indices"), options.get("block_indices")
    if indices is None and blocks is None:
        return mask
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        raise Unsupported(
            f"{type(module).__name__} chooses keys (indices= or block_indices=), which goes with the 4-D mask that the "
            f"model makes, or one of your own: got {None if mask is None else type(mask).__name__}; "
            "model.set_attn_implementation('eager')"
        )
    chosen, keys = None, mask.shape[-1]
    if indices is not None:
        chosen = _chosen(indices, 3, queries, keys).unsqueeze(1)
    if blocks is not None:
        config: Any = module.config
        size = int(config.index_block_size)
        per_group = _chosen(blocks, 4, queries, -(-keys // size)).repeat_interleave(size, -1)[..., :keys]
        if queries[1] % per_group.shape[1]:
            raise ShapeError(f"block_indices of {per_group.shape[1]} groups of heads, for {queries[1]} heads")
        of_heads = per_group.repeat_interleave(queries[1] // per_group.shape[1], 1)
        chosen = of_heads if chosen is None else chosen & of_heads
    assert chosen is not None
    if mask.is_floating_point():
        return mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)
    return mask & chosen


def _chosen(indices: Tensor, dims: int, queries: torch.Size, count: int) -> Tensor:
    """Bool (..., Q, count): what integers (..., Q, n) name; -1 is nothing."""
    if indices.ndim != dims or (indices.shape[0], indices.shape[-2]) != (queries[0], queries[2]):
        raise ShapeError(
            f"a choice of keys of shape {tuple(indices.shape)} for queries of shape {tuple(queries)}: it must have "
            f"{dims} dims, and as many batch entries and queries"
        )
    indices = indices.long()
    named = torch.zeros(*indices.shape[:-1], count + 1, dtype=torch.bool, device=indices.device)
    return named.scatter(-1, indices.masked_fill(indices < 0, count), True)[..., :count]


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Attention whose softmax had one more logit in each row.

    Args:
        out: without it, (B, Q, H, D), or (rows, H, D) of the flattened batch.
        lse: of the scores without it, (B, H, Q), or (H, rows).
        sinks: the logits, (B, H, Q, 1).

    Raises:
        ShapeError: sinks of another shape.
    """
    batch, heads, queries = lse.shape if lse.ndim == 3 else (-1, lse.shape[0], -1)
    if sinks.ndim != 4 or sinks.shape[1] != heads or (lse.ndim == 3 and sinks.shape != (batch, heads, queries, 1)):
        raise ShapeError(f"sinks must be (batch, {heads}, queries, 1), one logit per row; got {tuple(sinks.shape)}")
    left = sinks[..., 0].transpose(1, 2)  # (B, Q, H)
    if lse.ndim == 3:
        part = torch.sigmoid(lse.transpose(1, 2) - left)
    else:
        part = torch.sigmoid(lse.transpose(0, 1) - left.flatten(0, 1))
    return out * part[..., None].to(out.dtype)
