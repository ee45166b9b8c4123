"""Every case of the table through every model: what one document at a time gives, in float32, to rounding."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import anyattn
from transformers_cases import FORWARD
from transformers_generation import GENERATION
from transformers_images import IMAGES
from transformers_judge import Case, judge
from transformers_models import ARCHITECTURES, BY_NAME, Architecture, transformers

CASES = (*FORWARD, *IMAGES, *GENERATION)
NOT_TOLD = "its attention is not handed position_ids: packed batches need cu_seq_lens or a Packing"


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    anyattn.integrations.transformers.register(replace="flash_attention_2")
    yield
    anyattn.integrations.transformers.unregister()
    anyattn.integrations.transformers.register()
    transformers.logging.set_verbosity(verbosity)


def _marks(case: Case, architecture: Architecture) -> list[pytest.MarkDecorator]:
    if case.by_positions and not architecture.told_positions:
        return [pytest.mark.xfail(strict=True, reason=NOT_TOLD)]
    if architecture.name == "llama4" and "generate, static" in case.name and transformers.__version__ < "5.20":
        return [
            pytest.mark.xfail(strict=True, reason="transformers passes its own mask function what it does not take")
        ]
    return []


def _table() -> list[object]:
    return [
        pytest.param(case, architecture, marks=_marks(case, architecture), id=f"{case.name}-{architecture.name}")
        for case in CASES
        for architecture in ARCHITECTURES
        if case.suits(architecture)
    ]


@pytest.mark.parametrize(("asked", "architecture"), _table())
def test_equals_one_document_at_a_time(asked: Case, architecture: Architecture) -> None:
    outcome = judge(asked, architecture, "anyattn")
    assert outcome.verdict == "right", outcome


#: Architectures that transformers does not let take the name, whatever is behind it.
CLOSED = {"llama4", "t5"}
IN_PLACE = [
    pytest.param(case, architecture, marks=_marks(case, architecture), id=f"{case.name}-{architecture.name}")
    for case in CASES
    for architecture in ARCHITECTURES
    if case.suits(architecture) and architecture.name not in CLOSED
    if architecture.kind in ("vision", "multimodal") or architecture.name in ("mistral", "gpt_oss", "bart")
]


@pytest.mark.parametrize(("asked", "architecture"), IN_PLACE)
def test_equals_it_in_place_of_flash_attention(asked: Case, architecture: Architecture) -> None:
    """Under the name "flash_attention_2", to which transformers hands other masks and other arguments."""
    outcome = judge(asked, architecture, "flash_attention_2")
    assert outcome.verdict == "right", outcome


def test_the_table_sees_what_is_wrong() -> None:
    """It finds documents that leak into each other, as transformers' own implementations let them."""
    by_name = {case.name: case for case in CASES}
    llama = BY_NAME["llama"]
    assert judge(by_name["restarting position_ids"], llama, "sdpa").verdict == "wrong"
    assert judge(by_name["restarting position_ids"], llama, "sdpa").error > 0.1
    assert judge(by_name["BlockMask"], llama, "sdpa").verdict == "crashed"
    assert judge(by_name["encoder not padded"], BY_NAME["t5"], "flash_attention_2").verdict == "refused"
