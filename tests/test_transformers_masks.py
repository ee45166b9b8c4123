"""What a mask says reaches every layer, whatever that says of itself: compiled or not, copied or edited on the way."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor

import anyattn
from anyattn.integrations import _transformers_call as integration
from transformers_cases import HOLES, positions_of, tokens
from transformers_generation import NEW
from transformers_judge import TOLERANCE
from transformers_models import _SEQ2SEQ, _SIZES, build, transformers

pytestmark = pytest.mark.usefixtures("registered")

CLOSE: dict[str, Any] = {"atol": TOLERANCE, "rtol": 2e-4}
#: Every row ends in padding.
ENDS = [[1] * 7 + [0] * 3, [0] + [1] * 7 + [0] * 2, [1] * 4 + [0] * 6]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    anyattn.integrations.transformers.forget()
    yield
    torch._dynamo.reset()


def pair(kind: str, config: Any) -> tuple[Any, Any]:
    """The same tiny model by eager attention and by anyattn."""
    torch.manual_seed(0)
    eager = getattr(transformers, kind)._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("anyattn")
    return eager, ours


def layers_compiled(model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    return model


def masks_copied(model: Any) -> Any:
    """Layers are given copies of masks, as on another device: what was noted on a mask is gone."""
    for layer in model.model.layers:
        layer.register_forward_pre_hook(_copy_mask, with_kwargs=True)
    return model


def _copy_mask(layer: Any, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**options, "attention_mask": options["attention_mask"].clone()}


# --- layers that say of themselves what does not hold ---


def decoded(model: Any, mask: Tensor | None) -> Tensor:
    """Logits of real tokens of a decoder."""
    given = {"input_ids": tokens(3, 8), "decoder_input_ids": tokens(3, 6, seed=1), "decoder_attention_mask": mask}
    with torch.no_grad():
        logits: Tensor = model(**given).logits
    return logits if mask is None else logits[mask.bool()]


def test_a_decoder_that_calls_itself_not_causal_sees_no_future() -> None:
    """It leaves that to the mask, also where nothing is padded."""
    eager, ours = pair("PegasusXForConditionalGeneration", transformers.PegasusXConfig(**_SEQ2SEQ, block_size=4))
    torch.testing.assert_close(decoded(ours, None), decoded(eager, None), **CLOSE)


@pytest.mark.parametrize("rows", [None, [[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]]], ids=["plain", "padded"])
def test_a_router_that_reads_the_mask(rows: list[list[int]] | None) -> None:
    """It takes what is not 0 for padding, of a mask that is added; and its decoder calls itself not causal."""
    config = transformers.NllbMoeConfig(
        **_SEQ2SEQ, encoder_sparse_step=2, decoder_sparse_step=2, num_experts=4, expert_capacity=24
    )
    eager, ours = pair("NllbMoeForConditionalGeneration", config)
    mask = None if rows is None else torch.tensor(rows)
    torch.testing.assert_close(decoded(ours, mask), decoded(eager, mask), **CLOSE)


def test_a_mask_wins_over_a_call_that_says_not_causal() -> None:
    """Moonshine says so wherever it has a mask."""
    config = transformers.MoonshineConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, encoder_num_hidden_layers=2, decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4, decoder_num_attention_heads=4, pad_token_id=0, decoder_start_token_id=2,
    )  # fmt: skip
    eager, ours = pair("MoonshineForConditionalGeneration", config)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]])
    given = {
        "input_values": torch.randn(3, 4000, generator=torch.Generator().manual_seed(0)),
        "decoder_input_ids": tokens(3, 6), "decoder_attention_mask": mask,
    }  # fmt: skip
    with torch.no_grad():
        got, want = (model(**given).logits[mask.bool()] for model in (ours, eager))
    torch.testing.assert_close(got, want, **CLOSE)


def test_an_encoder_that_generates_with_a_cache_sees_it() -> None:
    """It asks for the mask of one token, and its layers have the keys of all."""
    eager, ours = pair("BertLMHeadModel", transformers.BertConfig(**_SIZES))
    given = {"attention_mask": torch.ones(3, 8, dtype=torch.long), "max_new_tokens": NEW, "min_new_tokens": NEW,
             "do_sample": False, "return_dict_in_generate": True, "output_logits": True}  # fmt: skip
    got, want = (torch.stack(model.generate(tokens(3, 8), **given).logits) for model in (ours, eager))
    torch.testing.assert_close(got, want, **CLOSE)


# --- compiled ---


def test_layers_compiled_where_all_rows_end_in_padding() -> None:
    ours, mask = build("mistral", "anyattn"), torch.tensor(ENDS)
    given = {"input_ids": tokens(3, 10), "attention_mask": mask, "use_cache": False}
    with torch.no_grad():
        want = build("mistral", "eager")(**given).logits[mask.bool()]
        torch.testing.assert_close(layers_compiled(ours)(**given).logits[mask.bool()], want, **CLOSE)


@pytest.mark.parametrize(("name", "whole"), [("llama", True), ("mistral", False)], ids=["model", "layers"])
def test_compiled_padding_between_tokens_starts_no_document(name: str, whole: bool) -> None:
    """Padding has positions too, and they count for nothing."""
    ours, mask = build(name, "anyattn"), torch.tensor(HOLES)
    positions = positions_of(mask).masked_fill(mask == 0, 1)
    given = {"input_ids": tokens(3, 10), "attention_mask": mask, "position_ids": positions, "use_cache": False}
    compiled = torch.compile(ours, backend="eager", fullgraph=True) if whole else layers_compiled(ours)
    with torch.no_grad():
        want = build(name, "eager")(**given).logits[mask.bool()]
        torch.testing.assert_close(compiled(**given).logits[mask.bool()], want, **CLOSE)


def test_compiled_documents_go_on_after_padding() -> None:
    """Each goes on at its next position, or as many rows later as it stands; all others begin."""
    ours, eager, ids = build("llama", "anyattn"), build("llama", "eager"), tokens(2, 10)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1, 0, 1], [1] * 10])
    positions = torch.tensor([[0, 1, 7, 7, 2, 3, 0, 1, 5, 3], [*range(4), *range(6)]])
    documents = ((0, [0, 1, 4, 5]), (0, [6, 7, 9]), (1, [0, 1, 2, 3]), (1, [4, 5, 6, 7, 8, 9]))
    with torch.no_grad():
        compiled = torch.compile(ours, backend="eager", fullgraph=True)
        got = compiled(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        for entry, rows in documents:
            want = eager(input_ids=ids[entry, rows][None], position_ids=positions[entry, rows][None]).logits[0]
            torch.testing.assert_close(got[entry, rows], want, **CLOSE)


def test_compiled_a_mask_of_ones_own_says_all() -> None:
    """Two continuations of one prompt, whose positions repeat."""
    ours = build("llama", "anyattn")
    mask = torch.ones(10, 10, dtype=torch.bool).tril()
    mask[7:, 4:7] = False
    given = {
        "input_ids": tokens(1, 10), "attention_mask": mask[None, None], "use_cache": False,
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 6, 4, 5, 6]]),
    }  # fmt: skip
    with torch.no_grad():
        want = ours(**given).logits
        got = torch.compile(ours, backend="eager", fullgraph=True)(**given).logits
    torch.testing.assert_close(got, want, **CLOSE)


def test_compiled_layers_without_padding_see_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """And are compiled again for a padded batch of the same shape."""
    ours, eager = build("mistral", "anyattn"), build("mistral", "eager")
    real, masks = integration.attention, []
    monkeypatch.setattr(integration, "attention", lambda *a, **k: masks.append(k["mask"]) or real(*a, **k))
    layer, states = ours.model.layers[0], torch.randn(3, 10, 32)
    rope = ours.model.rotary_emb(states, torch.arange(10)[None])
    from transformers import masking_utils

    def mask_of(real_tokens: list[list[int]] | None) -> Any:
        given = None if real_tokens is None else torch.tensor(real_tokens)
        return masking_utils.create_sliding_window_causal_mask(ours.config, states, given, None)

    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    theirs = torch.ones(10, 10, dtype=torch.bool).tril().triu(1 - ours.config.sliding_window)
    with torch.no_grad():
        for rows in (None, ENDS, [[1] * 10] * 3, HOLES):
            masks.clear()
            got = compiled(states, attention_mask=mask_of(rows), position_embeddings=rope)
            assert all((mask is None) == (rows != ENDS and rows != HOLES) for mask in masks)
            keep = torch.ones(3, 10, dtype=torch.bool) if rows is None else torch.tensor(rows).bool()
            floats = torch.zeros(3, 1, 10, 10).masked_fill(~(theirs & keep[:, None, None]), torch.finfo().min)
            want = eager.model.layers[0](states, attention_mask=floats, position_embeddings=rope)
            torch.testing.assert_close(got[keep], want[keep], **CLOSE)


# --- a prompt in parts ---


@pytest.mark.parametrize(("name", "cache", "change"), [
    ("llama", "dynamic", layers_compiled), ("mistral", "static", layers_compiled),
    ("mistral", "dynamic", masks_copied), ("llama", "static", masks_copied),
])  # fmt: skip
def test_a_second_part_that_ends_in_padding(name: str, cache: str, change: Any) -> None:
    """Its queries stand where the mask ends, not where the last real token does; a static cache has room after that."""
    mask = torch.tensor([[0] + [1] * 7 + [0] * 2, [1] * 8 + [0] * 2, [1] * 7 + [0] * 3])
    ids = tokens(3, 10)

    def logits(model: Any) -> Tensor:
        kind = transformers.DynamicCache if cache == "dynamic" else transformers.StaticCache
        past = kind(config=model.config, **({} if cache == "dynamic" else {"max_cache_len": 14}))
        found = [
            model(input_ids=ids[:, a:b], attention_mask=mask[:, :b], past_key_values=past, use_cache=True).logits
            for a, b in ((0, 6), (6, 10))
        ]
        return torch.cat(found, 1)[mask.bool()]

    with torch.no_grad():
        want = logits(build(name, "eager"))
        torch.testing.assert_close(logits(change(build(name, "anyattn"))), want, **CLOSE)


# --- masks of the mask function's in other hands ---


class Layer(torch.nn.Module):
    """An attention layer as far as attention sees it."""

    is_causal = False


def attend(qkv: list[Tensor], mask: Tensor) -> Tensor:
    return integration.attention_forward(Layer(), *qkv, mask)[0]


@pytest.mark.parametrize("rows", [None, [[0, 0, 1, 1, 1, 1], [1] * 6]], ids=["plain", "padded"])
def test_a_mask_that_is_written_to_is_read_again(rows: list[list[int]] | None) -> None:
    """Its values are, and what it was made for stays."""
    from transformers import masking_utils

    given = None if rows is None else torch.tensor(rows).bool()
    mask = anyattn.integrations.transformers.mask_function(2, 6, 6, 0, 0, masking_utils.causal_mask_function, given)
    assert isinstance(mask, Tensor)
    assert mask.shape == (2, 6)
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(2, 2, 6, 8, generator=generator) for _ in range(3)]
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    for first in (0, 1, 3):
        mask[1, :first] = False
        want = torch.nn.functional.scaled_dot_product_attention(*qkv, attn_mask=causal & mask[:, None, None])
        torch.testing.assert_close(attend(qkv, mask)[mask], want.transpose(1, 2)[mask], **CLOSE)


def test_a_packing_of_fixed_capacity_that_could_mean_two_things_is_an_error() -> None:
    """One sequence in each entry, or sequences anywhere in the flattened batch."""
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(2, 2, 6, 8, generator=generator) for _ in range(3)]

    def attend_to(packing: anyattn.Packing) -> Tensor:
        return integration.attention_forward(Layer(), *qkv, None, packing=packing)[0]

    packing = anyattn.Packing.from_lengths([4, 6], max_sequences=2, max_rows=12, max_seqlen=6)
    with pytest.raises(anyattn.PackingError, match=r"room for 2 sequences in 12 rows.*2 x 6 tokens.*max_sequences=3"):
        attend_to(packing)
    want = attend_to(anyattn.Packing.from_lengths([4, 6, 2])).flatten(0, 1)[:10]
    roomy = anyattn.Packing.from_lengths([4, 6], max_sequences=3, max_rows=12, max_seqlen=6)
    torch.testing.assert_close(attend_to(roomy).flatten(0, 1)[:10], want, **CLOSE)
    longer = anyattn.Packing.from_lengths([4, 6], max_sequences=2, max_rows=12, max_seqlen=12)  # fits in no entry
    torch.testing.assert_close(attend_to(longer).flatten(0, 1)[:10], want, **CLOSE)
    by_entry = attend_to(anyattn.Packing.from_mask(torch.tensor([[1] * 4 + [0] * 2, [1] * 6])))
    full = anyattn.Packing.from_lengths([6, 6])
    filled = attend_to(full)
    full.copy_(anyattn.Packing.from_lengths([6, 6]))  # the host forgets the lengths, and entries are full all the same
    torch.testing.assert_close(attend_to(full), filled)
    assert not torch.allclose(by_entry, filled)
