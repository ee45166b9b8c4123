"""Tiny models of many architectures, one entry each, for the table of cases (``transformers_cases``)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

transformers: Any = pytest.importorskip("transformers")

VOCABULARY = 61
WINDOW = 4
CHUNK = 4

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}
_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    **_SIZES, "num_key_value_heads": 4, "kv_lora_rank": 12, "q_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 2, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_QWEN_TOWER: dict[str, Any] = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 2, "in_channels": 3,
    "spatial_merge_size": 2, "window_size": 8, "fullatt_block_indexes": [1], "out_hidden_size": 32,
}  # fmt: skip
_MIXED = ["sliding_attention", "full_attention"]


class IMAGE:
    """Tokens around and of an image."""

    token, begin, end, vocabulary = 65, 66, 67, 70


@dataclass(frozen=True)
class Architecture:
    """One architecture: how a tiny model of it is made, and what is special about its attention."""

    name: str
    kind: str
    """"decoder", "encoder", "seq2seq", "speech", "vision" or "multimodal"."""
    make: Callable[[], tuple[type, Any]]
    """The model's class and a configuration."""
    special: str = ""
    """What its attention has, in a few words."""
    first_position: int = 0
    """The position of a document's first token."""
    told_positions: bool = True
    """Its attention layers or its mask are handed ``position_ids``."""
    learned_positions: bool = False
    """Positions are not relative: a padded batch needs ``position_ids``."""


def _causal(config: str, **options: Any) -> Callable[[], tuple[type, Any]]:
    return lambda: (transformers.AutoModelForCausalLM, getattr(transformers, config)(**options))


def _of(model: str, config: str, **options: Any) -> Callable[[], tuple[type, Any]]:
    return lambda: (getattr(transformers, model), getattr(transformers, config)(**options))


ARCHITECTURES = (
    Architecture("llama", "decoder", _causal("LlamaConfig", **GROUPED), "grouped keys"),
    Architecture("qwen3", "decoder", _causal("Qwen3Config", **GROUPED), "normalised queries and keys"),
    Architecture("mistral", "decoder", _causal("MistralConfig", **GROUPED, sliding_window=WINDOW), "window"),
    Architecture(
        "gemma2", "decoder",
        _causal("Gemma2Config", **GROUPED, sliding_window=WINDOW, attn_logit_softcapping=5.0, query_pre_attn_scalar=8),
        "window and full layers, softcap",
    ),
    Architecture(
        "gemma3", "decoder",
        _causal(
            "Gemma3TextConfig", **GROUPED, sliding_window=WINDOW, layer_types=_MIXED, query_pre_attn_scalar=8
        ),
        "window and full layers",
    ),
    Architecture(
        "gpt_oss", "decoder",
        _causal(
            "GptOssConfig", **GROUPED, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        "sinks, window and full layers",
    ),
    Architecture("gpt2", "decoder", _causal(
        "GPT2Config", vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    ), "learned positions", learned_positions=True),
    Architecture("deepseek_v2", "decoder", _causal("DeepseekV2Config", **_LATENT), "latent: head dims 16 and 12"),
    Architecture("deepseek_v3", "decoder", _causal("DeepseekV3Config", **_LATENT), "latent: head dims 16 and 12"),
    Architecture(
        "llama4", "decoder",
        _causal(
            "Llama4TextConfig", **GROUPED, attention_chunk_size=CHUNK, num_local_experts=2, num_experts_per_tok=1,
            intermediate_size_mlp=48, no_rope_layers=[1, 0], attn_temperature_tuning=False,
        ),
        "chunks and full layers",
    ),
    Architecture("bert", "encoder", _of("BertModel", "BertConfig", **_SIZES), "learned positions",
                 learned_positions=True),
    Architecture("roberta", "encoder", _of("RobertaModel", "RobertaConfig", **{**_SIZES, "pad_token_id": 1}),
                 "positions from 2", first_position=2, learned_positions=True),
    Architecture(
        "modernbert", "encoder",
        _of("ModernBertModel", "ModernBertConfig", **_SIZES, local_attention=8, cls_token_id=1, sep_token_id=2,
            layer_types=_MIXED),
        "windows on both sides", told_positions=False,
    ),
    Architecture(
        "t5", "seq2seq",
        _of("T5ForConditionalGeneration", "T5Config", vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2,
            num_heads=4, relative_attention_num_buckets=8, relative_attention_max_distance=16, pad_token_id=0,
            eos_token_id=2, decoder_start_token_id=0),
        "position bias",
    ),
    Architecture(
        "bart", "seq2seq",
        _of("BartForConditionalGeneration", "BartConfig", **_SEQ2SEQ, max_position_embeddings=64,
            forced_eos_token_id=None),
        "cross-attention",
    ),
    Architecture(
        "whisper", "speech",
        _of("WhisperForConditionalGeneration", "WhisperConfig", **_SEQ2SEQ, num_mel_bins=8, max_source_positions=10,
            max_target_positions=64, suppress_tokens=None, begin_suppress_tokens=None),
        "cross-attention to sound",
    ),
    Architecture(
        "qwen2_vl", "vision",
        lambda: (
            transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel,
            transformers.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig(
                depth=2, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2, patch_size=2, in_channels=3,
                spatial_merge_size=2,
            ),
        ),
        "images of a batch by cumulative lengths",
    ),
    Architecture(
        "qwen2_5_vl", "vision",
        lambda: (
            transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel,
            transformers.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig(**_QWEN_TOWER),
        ),
        "images and windows of a batch by cumulative lengths",
    ),
    Architecture(
        "qwen2_5_vl_text", "multimodal",
        _of("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig",
            text_config={**GROUPED, "vocab_size": IMAGE.vocabulary,
                         "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
            vision_config=_QWEN_TOWER, image_token_id=IMAGE.token, vision_start_token_id=IMAGE.begin,
            vision_end_token_id=IMAGE.end, video_token_id=68),
        "images and text, positions in three rows",
    ),
    Architecture(
        "gemma3_vl", "multimodal",
        _of("Gemma3ForConditionalGeneration", "Gemma3Config",
            text_config={**GROUPED, "vocab_size": IMAGE.vocabulary, "sliding_window": WINDOW, "layer_types": _MIXED,
                         "query_pre_attn_scalar": 8},
            vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                           "num_attention_heads": 4, "image_size": 8, "patch_size": 2},
            mm_tokens_per_image=4, image_token_index=IMAGE.token, boi_token_index=IMAGE.begin,
            eoi_token_index=IMAGE.end),
        "images that see themselves both ways",
    ),
)  # fmt: skip
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


@cache
def _original(name: str) -> nn.Module:
    """The model with attention that transformers calls eager."""
    torch.manual_seed(0)
    kind, config = BY_NAME[name].make()
    make = getattr(kind, "_from_config", None) or kind.from_config
    model: nn.Module = make(config, attn_implementation="eager").float()
    with torch.no_grad():
        for parameter in model.parameters():  # away from symmetric initial values, sinks included
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def build(name: str, implementation: str) -> Any:
    """A tiny model of an architecture, by an implementation of attention; the same weights for each."""
    model: Any = copy.deepcopy(_original(name))
    if implementation != "eager":
        model.set_attn_implementation(implementation)
    return model
