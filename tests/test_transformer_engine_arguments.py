"""Arguments of ``DotProductAttention`` that go together: offsets, rooms, masks and heads, and how mistakes read."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import anyattn
from anyattn.integrations import _te_options
from anyattn.integrations.transformer_engine import DotProductAttention
from te_cases import TeCase, offsets
from test_transformer_engine import judge, run

PADDING = ("padding", "padding_causal", "padding_causal_bottom_right")


def plain(rows: int = 6, **options: Any) -> tuple[DotProductAttention, list[Tensor]]:
    """A module of two heads, and q, k and v of a batch of two, (2, rows, 2, 8)."""
    module = DotProductAttention(2, 8, **{"qkv_format": "bshd", "attn_mask_type": "padding", **options})
    return module, list(torch.randn(3, 2, rows, 2, 8).unbind())


def both(*lengths: int) -> dict[str, Tensor]:
    """Real lengths of queries and keys, in one tensor."""
    found = offsets(lengths)
    return {"cu_seqlens_q": found, "cu_seqlens_kv": found}


# --- rooms ---


@pytest.mark.parametrize("between", [None, True, False])
@pytest.mark.parametrize(("here", "there"), [("q", "kv"), ("kv", "q")])
def test_rooms_of_one_side_alone(here: str, there: str, between: bool | None) -> None:
    """They would place keys elsewhere than queries."""
    module = DotProductAttention(2, 8, qkv_format="thd")
    tensors = torch.randn(3, 12, 2, 8).unbind()
    given: dict[str, Any] = {**both(4, 5), f"cu_seqlens_{here}_padded": offsets((6, 6)), "pad_between_seqs": between}
    text = (
        f"cu_seqlens_{here}_padded without cu_seqlens_{there}_padded.*for a side without padding pass its own "
        f"cu_seqlens: cu_seqlens_{there}_padded=cu_seqlens_{there}"
    )
    policy = {"sequence_ids": torch.tensor([0, 1]), "mask_type": "padding", "window_size": None}
    with pytest.raises(anyattn.InvalidArgument, match=text):
        module(*tensors, **given, attn_mask_type="padding_causal")
    with pytest.raises(anyattn.InvalidArgument, match=text):
        module(*tensors, **given, thd_attention_policies=[policy])
    module.check_offsets = False
    with pytest.raises(anyattn.InvalidArgument, match=text):
        module(*tensors, **given, attn_mask_type="padding_causal", max_seqlen_q=5, max_seqlen_kv=5)


@pytest.mark.parametrize("between", [None, True])
@pytest.mark.parametrize("kind", PADDING)
def test_a_side_without_padding_gives_its_lengths_twice(kind: str, between: bool | None) -> None:
    rooms: dict[str, Any] = {"layout": "thd", "mask": kind, "lengths": (5, 4), "keys": (7, 9)}
    own = offsets((7, 9))
    case = TeCase(**rooms, rooms=(8, 6))
    judge(case, run(case, cu_seqlens_kv=own, cu_seqlens_kv_padded=own, pad_between_seqs=between))
    own = offsets((5, 4))
    case = TeCase(**rooms, key_rooms=(8, 12))
    rooms_of_keys: dict[str, Any] = {"cu_seqlens_q_padded": own, "cu_seqlens_kv_padded": offsets((8, 12))}
    judge(case, run(case, cu_seqlens_q=own, **rooms_of_keys, pad_between_seqs=between))


# --- heads ---


@pytest.mark.parametrize("heads", [2, 8])
@pytest.mark.parametrize("ranks", [1, 2])
def test_queries_have_the_heads_that_the_module_was_made_for(heads: int, ranks: int) -> None:
    module = DotProductAttention(4 * ranks, 8, num_gqa_groups=2 * ranks, qkv_format="bshd", tp_size=ranks)
    keys = torch.randn(1, 3, 2, 8)
    assert module(torch.randn(1, 3, 4, 8), keys, keys).shape == (1, 3, 32)
    text = rf"heads of q, k and v \({heads}, 2, 2\).* made for \(4, 2, 2\).* num_attention_heads={4 * ranks}, "
    with pytest.raises(anyattn.ShapeError, match=text):
        module(torch.randn(1, 3, heads, 8), keys, keys)


# --- masks beside offsets ---


def holes(rows: int) -> Tensor:
    """A padding mask, (2, 1, 1, rows), with padding amid the tokens of both entries."""
    mask = torch.zeros(2, 1, 1, rows, dtype=torch.bool)
    mask[0, ..., [1, 4]] = True
    mask[1, ..., [0, 3, rows - 1]] = True
    return mask


def hidden(mask: Tensor, causal: bool, left: int | None = None) -> Tensor:
    """What a padding mask with holes hides, (2, 1, rows, rows), where positions count real tokens."""
    at = (~mask).cumsum(-1)[:, :, 0]
    away = at[:, :, None] - at[..., None]  # key - query
    found = mask | mask.transpose(-1, -2)
    if causal:
        found = found | (away > 0)
    return found if left is None else found | (away < -left)


def compare(module: DotProductAttention, tensors: list[Tensor], mask: Tensor, given: dict[str, Any], left: Any) -> None:
    """Out and gradients are those of a mask of every pair."""
    leaves = [x.requires_grad_() for x in tensors]
    swap = module.qkv_format == "sbhd"
    placed = [x.transpose(0, 1) if swap else x for x in leaves]
    window = {} if left is None else {"window_size": (left, 0)}
    out = module(*placed, attention_mask=mask, **given, **window)
    pairs = hidden(mask, "causal" in module.attn_mask_type, left)
    plainly, _ = plain(attn_mask_type="arbitrary")
    expected = plainly(*leaves, attention_mask=pairs)
    found = out.transpose(0, 1) if swap else out
    torch.testing.assert_close(found, expected)
    assert not found[mask[:, 0, 0]].any()
    weight = torch.randn_like(expected)
    grads = (torch.autograd.grad((x * weight).sum(), leaves) for x in (found, expected))
    for mine, whole in zip(*grads, strict=True):
        torch.testing.assert_close(mine, whole)


@pytest.mark.parametrize("layout", ["bshd", "sbhd"])
@pytest.mark.parametrize("kind", PADDING)
def test_a_mask_with_holes_beside_offsets_that_agree(kind: str, layout: str) -> None:
    mask = holes(8)
    one, two = both(6, 5), {"cu_seqlens_q": offsets((6, 5)), "cu_seqlens_kv": offsets((6, 5))}
    for given in ({}, one, two, {"cu_seqlens_q": offsets((6, 5))}, {"cu_seqlens_kv": offsets((6, 5))}):
        module, tensors = plain(8, attn_mask_type=kind, qkv_format=layout)
        compare(module, tensors, mask, given, None)


def test_windows_count_real_tokens_where_a_mask_has_holes() -> None:
    mask = holes(8)
    for given in ({}, both(6, 5)):
        module, tensors = plain(8, attn_mask_type="padding_causal")
        compare(module, tensors, mask, given, 1)
    rows = torch.arange(8)
    by_rows = hidden(mask, True) | (rows[:, None] - rows > 1)
    assert not torch.equal(by_rows, hidden(mask, True, 1))


@pytest.mark.parametrize("mask", [holes(8), torch.arange(8).expand(2, 1, 1, 8) >= 7], ids=["holes", "right"])
@pytest.mark.parametrize("side", ["q", "kv"])
def test_a_mask_and_offsets_that_disagree(mask: Tensor, side: str) -> None:
    module, tensors = plain(8)
    hidden_lengths = (~mask).sum(-1).flatten().tolist()
    agreeing = offsets(tuple(hidden_lengths))
    given = {"cu_seqlens_q": agreeing, "cu_seqlens_kv": agreeing, f"cu_seqlens_{side}": offsets((8, 2))}
    text = f"cu_seqlens_{side} and attention_mask disagree: the lengths are .8, 2. by cu_seqlens_{side} and "
    with pytest.raises(anyattn.PackingError, match=text) as caught:
        module(*tensors, attention_mask=mask, **given)
    assert f"{hidden_lengths} by attention_mask" in str(caught.value)


# --- in this module's own words ---

UNMASKED = torch.zeros(2, 1, 1, 6, dtype=torch.bool)
WORDS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "mask of another batch": (
        {}, {"attention_mask": torch.zeros(3, 1, 1, 6, dtype=torch.bool)},
        "attention_mask: 3 sequences, and query_layer has 2 batch entries with qkv_format='bshd'; one sequence lies in",
    ),
    "mask of other rows": (
        {}, {"attention_mask": torch.zeros(2, 1, 1, 5, dtype=torch.bool)},
        "attention_mask is .2, 1, 1, 5., and query_layer has 6 rows with qkv_format='bshd'",
    ),
    "keys' mask of other rows": (
        {"attention_type": "cross"}, {"attention_mask": (UNMASKED, torch.zeros(2, 1, 1, 7, dtype=torch.bool))},
        "attention_mask is .2, 1, 1, 7., and key_layer has 6 rows",
    ),
    "offsets of another batch": (
        {}, both(2, 2, 2), "cu_seqlens_q: 3 sequences, and query_layer has 2 batch entries with qkv_format='bshd'",
    ),
    "keys' offsets of another batch": (
        {}, {"cu_seqlens_q": offsets((6, 6)), "cu_seqlens_kv": offsets((6,))},
        "cu_seqlens_kv: 1 sequences, and key_layer has 2 batch entries",
    ),
    "offsets in the other layout": (
        {"qkv_format": "sbhd"}, both(6, 4),
        "cu_seqlens_q: 2 sequences, and query_layer has 6 batch entries with qkv_format='sbhd'; it has 2 as 'bshd': "
        "pass qkv_format='bshd'",
    ),
    "mask in the other layout": (
        {"qkv_format": "sbhd"}, {"attention_mask": UNMASKED},
        "attention_mask: 2 sequences, .* it has 2 as 'bshd': pass qkv_format='bshd'",
    ),
    "long sequence": (
        {}, both(6, 7),
        "the longest sequence has 7 tokens by cu_seqlens_q, and an entry of query_layer has 6 rows with qkv_format=",
    ),
    "long sequence of keys": (
        {}, {"cu_seqlens_q": offsets((6, 6)), "cu_seqlens_kv": offsets((8, 6))},
        "the longest sequence has 8 tokens by cu_seqlens_kv, and an entry of key_layer has 6 rows",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WORDS)
def test_mistakes_are_told_by_the_arguments_names(name: str) -> None:
    options, given, text = WORDS[name]
    module, tensors = plain(**options)
    with pytest.raises(anyattn.PackingError, match=text):
        module(*tensors, **given)


@pytest.mark.parametrize(("side", "tensor"), [("q", "query_layer"), ("kv", "key_layer")])
def test_offsets_that_end_beyond_the_rows(side: str, tensor: str) -> None:
    module = DotProductAttention(2, 8, qkv_format="thd", attn_mask_type="padding")
    tensors = torch.randn(3, 12, 2, 8).unbind()
    given = both(6, 6) | {f"cu_seqlens_{side}": offsets((6, 7))}
    text = rf"sequences of cu_seqlens_{side} \(and cu_seqlens_{side}_padded\) end at row 13, and {tensor} has 12 rows"
    with pytest.raises(anyattn.PackingError, match=text):
        module(*tensors, **given)


def test_alibi_counts_real_tokens_where_a_mask_has_holes() -> None:
    mask = holes(8)
    at = (~mask).cumsum(-1)[:, :, 0]
    slopes = torch.tensor([0.3, 0.7])
    term = -slopes[:, None, None] * (at[:, :, None] - at[..., None]).abs()
    module, tensors = plain(8)
    out = module(*tensors, attention_mask=mask, core_attention_bias_type="alibi", alibi_slopes=slopes)
    plainly, _ = plain(attn_mask_type="arbitrary")
    bias = {"core_attention_bias_type": "post_scale_bias", "core_attention_bias": term}
    torch.testing.assert_close(out, plainly(*tensors, attention_mask=hidden(mask, False), **bias))


@pytest.mark.parametrize("kind", ["no_mask", "causal", "causal_bottom_right"])
def test_masks_are_not_read_without_padding(kind: str) -> None:
    """Megatron's layers always pass one."""
    module, tensors = plain(attn_mask_type=kind)
    expected = module(*tensors)
    for mask in (UNMASKED.logical_not(), torch.rand(2, 1, 6, 6) > 0.5, torch.ones(1)):
        assert torch.equal(module(*tensors, attention_mask=mask), expected)
    packed, given = [x.flatten(0, 1) for x in tensors], both(6, 6)
    thd = {"qkv_format": "thd", "attn_mask_type": "padding"}
    expected = module(*packed, **thd, **given)
    assert torch.equal(module(*packed, attention_mask=UNMASKED.logical_not(), **thd, **given), expected)


def test_every_argument_reaches_what_looks_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused by name, and what runs outside of a compiled region, get all that forward was given."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(_te_options, "refuse", seen.update)
    module, (q, *_) = plain(attn_mask_type="no_mask")
    module(q, q, q)
    assert list(seen) == list(inspect.signature(DotProductAttention.forward).parameters)
    assert seen["self"] is module
    assert seen["value_layer"] is q
