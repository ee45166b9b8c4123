"""Cases of vision towers, and of models that read images and text: as eager on the same padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from transformers_cases import Batch, Inputs, Piece, collect, forward_case, output
from transformers_generation import NEW
from transformers_judge import Case, Found
from transformers_models import IMAGE, Architecture

GRIDS = ((1, 4, 4), (1, 2, 6), (2, 4, 2))
_GROUP = "images"


def _patches(grids: Sequence[tuple[int, ...]], seed: int = 4) -> list[Tensor]:
    """Flattened patches of each image."""
    sizes = [t * h * w for t, h, w in grids]
    patches = torch.randn(sum(sizes), 3 * 2 * 2 * 2, generator=torch.Generator().manual_seed(seed))
    return list(patches.split(sizes))


def _run_tower(architecture: Architecture, model: Any) -> Found:
    images = _patches(GRIDS)
    out = output(model(torch.cat(images), grid_thw=torch.tensor(GRIDS)))
    return collect(model, out.split([len(x) for x in images]))


def _true_tower(architecture: Architecture, model: Any) -> Found:
    images = zip(_patches(GRIDS), GRIDS, strict=True)
    return collect(model, [output(model(x, grid_thw=torch.tensor([grid]))) for x, grid in images])


def _inputs(architecture: Architecture) -> Inputs:
    """Two rows of text around an image; the first is padded on the left."""
    image = [IMAGE.begin, *[IMAGE.token] * 4, IMAGE.end]
    ids = torch.tensor([[0, 0, 0, *image, 5, 6, 7, 8], [9, 10, 11, *image, 5, 6, 7, 8]])
    inputs: Inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    of_image = (ids == IMAGE.token).long()
    if architecture.name == "gemma3_vl":
        pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(6))
        return {**inputs, "pixel_values": pixels, "token_type_ids": of_image}
    grids = ((1, 4, 4), (1, 4, 4))
    grid = torch.tensor(grids)
    return {
        **inputs, "pixel_values": torch.cat(_patches(grids)), "image_grid_thw": grid, "mm_token_type_ids": of_image
    }  # fmt: skip


def _batch(architecture: Architecture) -> Batch:
    inputs = _inputs(architecture)
    length = inputs["input_ids"].shape[1]
    return Batch(inputs, [Piece(0, 3, length), Piece(1, 0, length)], inputs)


def _generate(static: bool) -> Case:
    def run(architecture: Architecture, model: Any) -> Found:
        cache = "static" if static else None
        inputs = _inputs(architecture)
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "disable_compile": True}
        return {"tokens": model.generate(**inputs, **options, cache_implementation=cache)[:, -NEW:]}

    name = f"generate from images and text, {'static cache, ' if static else ''}padded on the left"
    return Case(name, _GROUP, run, run, kinds=frozenset({"multimodal"}), exactly=True)


IMAGES: tuple[Case, ...] = (
    Case("images by cu_seqlens", _GROUP, _run_tower, _true_tower, kinds=frozenset({"vision"})),
    forward_case("images and text, padded on the left", _GROUP, _batch, kinds=frozenset({"multimodal"})),
    _generate(static=False),
    _generate(static=True),
)
