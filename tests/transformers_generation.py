"""Cases of generation and of prefill in parts: token for token what each row alone gives with the eager model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from transformers_cases import MASKS, Inputs, positions_of, tokens
from transformers_judge import Case, Found
from transformers_models import Architecture, build, transformers

NEW = 7
_GROUP = "generation"
_DECODER = frozenset({"decoder"})


def _prompts(padding: str) -> tuple[Tensor, Tensor]:
    """(ids, mask): three rows of ten tokens, or fewer with padding on the left."""
    mask = torch.tensor(MASKS["left" if padding == "left" else "ones"])
    ids = tokens(3, 10, seed=3)
    return (ids.masked_fill(mask == 0, 0) if padding == "left" else ids), mask


def _generate(model: Any, inputs: Inputs, **options: Any) -> Tensor:
    found: Tensor = model.generate(
        **inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, disable_compile=True, **options
    )
    return found[:, -NEW:]


def _generation(
    name: str, padding: str = "none", rows: int = 3, together: Callable[[Architecture], Inputs] | None = None,
    shared: Inputs | None = None, **more: Any,
) -> Case:  # fmt: skip
    """Greedy generation from several prompts at once.

    Args:
        name: of the case.
        padding: "none" or "left".
        rows: how many prompts.
        together: options of ``generate`` for the batch.
        shared: options of ``generate`` for the batch and for each row alone.
        **more: of the case.
    """

    def run(architecture: Architecture, model: Any) -> Found:
        ids, mask = _prompts(padding)
        options = (shared or {}) | ({} if together is None else together(architecture))
        return {"tokens": _generate(model, {"input_ids": ids[:rows], "attention_mask": mask[:rows]}, **options)}

    def truth(architecture: Architecture, model: Any) -> Found:
        ids, mask = _prompts(padding)
        prompts = [x[m.bool()][None] for x, m in zip(ids[:rows], mask[:rows], strict=True)]
        return {"tokens": torch.cat([_generate(model, {"input_ids": x}, **(shared or {})) for x in prompts])}

    return Case(name, _GROUP, run, truth, **{"kinds": _DECODER, "exactly": True, **more})


def _assistant(architecture: Architecture) -> Inputs:
    """A smaller model that guesses: of the same weights up to noise, so that some guesses are taken."""
    model = build(architecture.name, "eager")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    model.generation_config.num_assistant_tokens = 3
    return {"assistant_model": model}


# --- prefill in parts ---


def _in_parts(cache: str, padding: str) -> Case:
    """Logits of new tokens after cached ones, in three forwards."""
    cuts = (6, 4, 1)

    def run(architecture: Architecture, model: Any) -> Found:
        mask = torch.cat([torch.tensor(MASKS[padding]), torch.ones(3, 1, dtype=torch.long)], 1)
        ids = tokens(3, 11, seed=5)
        positions = positions_of(mask)
        past = (
            transformers.StaticCache(config=model.config, max_cache_len=16)
            if cache == "static"
            else transformers.DynamicCache(config=model.config)
        )
        found, begin = [], 0
        for n in cuts:
            seen = begin + n
            with torch.no_grad():
                out = model(
                    input_ids=ids[:, begin:seen], attention_mask=mask[:, :seen] if padding != "ones" else None,
                    position_ids=positions[:, begin:seen], past_key_values=past, use_cache=True,
                )  # fmt: skip
            found.append(out.logits)
            begin = seen
        return {"logits": torch.cat(found, 1)[mask.bool()]}

    def truth(architecture: Architecture, model: Any) -> Found:
        mask = torch.cat([torch.tensor(MASKS[padding]), torch.ones(3, 1, dtype=torch.long)], 1).bool()
        with torch.no_grad():
            alone = [model(input_ids=x[m][None]).logits[0] for x, m in zip(tokens(3, 11, seed=5), mask, strict=True)]
        return {"logits": torch.cat(alone)}

    told = "not padded" if padding == "ones" else "padded on the left"
    return Case(f"prefill in parts, {cache} cache, {told}", _GROUP, run, truth, kinds=_DECODER)


# --- encoder-decoder ---


def _seq2seq(name: str, speech: bool = False, **options: Any) -> Case:
    def inputs() -> tuple[str, Tensor, Tensor | None]:
        if speech:
            return "input_features", torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(3)), None
        return "input_ids", tokens(3, 10), torch.tensor(MASKS["right"])

    def run(architecture: Architecture, model: Any) -> Found:
        given, x, mask = inputs()
        batch = {given: x} if mask is None else {given: x, "attention_mask": mask}
        return {"tokens": _generate(model, batch, **options)}

    def truth(architecture: Architecture, model: Any) -> Found:
        given, x, mask = inputs()
        shared = {k: v for k, v in options.items() if k != "cache_implementation"}
        rows = [x[i : i + 1] if mask is None else x[i : i + 1, mask[i].bool()] for i in range(len(x))]
        return {"tokens": torch.cat([_generate(model, {given: row}, **shared) for row in rows])}

    kind = "speech" if speech else "seq2seq"
    return Case(name, _GROUP, run, truth, kinds=frozenset({kind}), exactly=True)


def _static(architecture: Architecture) -> Inputs:
    return {"cache_implementation": "static"}


GENERATION: tuple[Case, ...] = (
    _generation("generate"),
    _generation("generate, padded on the left", "left"),
    _generation("generate, static cache", together=_static),
    _generation("generate, static cache, padded on the left", "left", together=_static),
    _generation("generate with beams, padded on the left", "left", shared={"num_beams": 3}),
    _generation(
        "generate, prefill_chunk_size, padded on the left", "left", together=lambda _: {"prefill_chunk_size": 4}
    ),
    _generation("generate with an assistant", rows=1, together=_assistant),
    _in_parts("dynamic", "ones"),
    _in_parts("dynamic", "left"),
    _in_parts("static", "ones"),
    _in_parts("static", "left"),
    _seq2seq("generate from a padded encoder"),
    _seq2seq("generate from a padded encoder, static cache", cache_implementation="static"),
    _seq2seq("generate from a padded encoder, beams", num_beams=3),
    _seq2seq("generate from sound", speech=True),
)
