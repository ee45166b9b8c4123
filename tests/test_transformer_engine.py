"""``DotProductAttention`` against what Transformer Engine documents of each option, in float64, gradients included."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import te_cases
from anyattn.integrations.transformer_engine import DotProductAttention
from te_cases import TeCase

PADDED: dict[str, Any] = {"lengths": (7, 0, 4), "rooms": (9, 9, 9), "mask": "padding_causal"}
PACKED: dict[str, Any] = {"layout": "thd", "lengths": (7, 0, 4, 5), "mask": "padding_causal"}
GAPS: dict[str, Any] = {**PACKED, "rooms": (8, 2, 4, 6)}
CROSS: dict[str, Any] = {"keys": (13, 13)}
CROSS_PADDED: dict[str, Any] = {**PADDED, "keys": (5, 3, 9), "key_rooms": (11, 11, 11)}
CROSS_PACKED: dict[str, Any] = {**GAPS, "keys": (9, 3, 2, 5), "key_rooms": (9, 4, 4, 8)}

MASKS = ("no_mask", "causal", "causal_bottom_right")
PADDING = ("padding", "padding_causal", "padding_causal_bottom_right")

CASES = [
    # layouts and mask types
    *(TeCase(layout=x, mask=m, **keys) for x in ("bshd", "sbhd") for m in MASKS for keys in ({}, CROSS)),
    *(
        TeCase(layout=x, by=by, **{**PADDED, "mask": m})
        for x in ("bshd", "sbhd")
        for m in PADDING
        for by in ("offsets", "mask", "left", "both")
    ),
    *(TeCase(by="left", also_offsets=True, **{**PADDED, "mask": m}) for m in PADDING),
    TeCase(by="left", also_offsets=True, layout="sbhd", **CROSS_PADDED),
    *(
        TeCase(by=by, **{**CROSS_PADDED, "mask": m})
        for m in PADDING
        for by in ("offsets", "mask")
    ),
    *(
        TeCase(**{**base, "mask": m})
        for base in (PACKED, GAPS, CROSS_PACKED)
        for m in PADDING
    ),
    TeCase(**GAPS, tail=3),
    TeCase(**GAPS, more=(("pad_between_seqs", True), ("max_seqlen_q", 16), ("max_seqlen_kv", 16))),
    TeCase(mask="arbitrary"),
    TeCase(layout="sbhd", mask="arbitrary", **CROSS),
    # windows and alignments
    *(TeCase(mask=m, window=(3, 0)) for m in ("causal", "causal_bottom_right")),
    *(
        TeCase(mask=m, window=(3, 2), bottom_right=b, **CROSS)
        for m in ("no_mask", "arbitrary")
        for b in (None, True, False)
    ),
    *(TeCase(mask=m, window=(6, 0), **CROSS) for m in ("causal", "causal_bottom_right")),
    TeCase(window=(-1, 0)),
    TeCase(mask="no_mask", window=(0, 0)),
    *(TeCase(window=(2, 0), **base) for base in (PADDED, GAPS, CROSS_PADDED, CROSS_PACKED)),
    *(TeCase(window=(2, 1), bottom_right=False, **{**base, "mask": "padding"}) for base in (PADDED, GAPS)),
    TeCase(window=(3, 3), **{**CROSS_PACKED, "mask": "padding"}),
    # what is done to scores
    *(TeCase(softcap=2.0, **base) for base in ({}, PADDED, GAPS)),
    *(TeCase(softmax=s, **base) for s in ("off-by-one", "learnable") for base in ({}, CROSS, PADDED, GAPS)),
    *(
        TeCase(bias=b, bias_shape=s)
        for b in ("pre_scale_bias", "post_scale_bias")
        for s in ("1hss", "bhss", "11ss", "b11s")
    ),
    TeCase(bias="post_scale_bias", softcap=2.0, layout="sbhd", **CROSS),
    TeCase(bias="post_scale_bias", **PADDED),
    *(TeCase(bias=b, **base) for b in ("pre_scale_bias", "post_scale_bias") for base in (PACKED, GAPS, CROSS_PACKED)),
    *(TeCase(bias="post_scale_bias", bias_shape=s, **GAPS) for s in ("bhss", "1h1s", "1hs1", "b111")),
    TeCase(bias="post_scale_bias", tail=3, max_logit=True, softmax="learnable", **GAPS),
    *(TeCase(bias="alibi", slopes=s, **base) for s in ("", "h", "bh") for base in ({}, PADDED, GAPS)),
    *(TeCase(bias="alibi", mask="no_mask", bottom_right=b, **CROSS) for b in (None, False)),
    TeCase(bias="alibi", mask="no_mask", bottom_right=False, window=(4, 3), slopes="bh", **CROSS),
    TeCase(bias="alibi", heads=(6, 3)),
    TeCase(scale=0.3),
    # heads
    TeCase(heads=(4, 4)),
    TeCase(heads=(4, 1), dims=(12, 8), **GAPS),
    TeCase(dims=(12, 8), softmax="learnable"),
    # the largest logit
    *(TeCase(max_logit=True, **base) for base in ({}, CROSS, PADDED, GAPS, CROSS_PADDED, CROSS_PACKED)),
    TeCase(max_logit=True, by="left", **PADDED),
    TeCase(max_logit=True, window=(2, 1), softcap=1.0, mask="no_mask"),
    TeCase(max_logit=True, bias="post_scale_bias", bias_shape="bhss", mask="arbitrary", layout="sbhd"),
    *(TeCase(max_logit=True, bias="post_scale_bias", bias_shape="bhss", by=by, **PADDED) for by in ("offsets", "left")),
    TeCase(max_logit=True, bias="alibi", slopes="bh", **GAPS),
    TeCase(max_logit=True, mask="no_mask", bottom_right=False, window=(4, 3), **CROSS),
]  # fmt: skip


def run(case: TeCase, module: DotProductAttention | None = None, **more: Any) -> te_cases.Answer:
    """A case by the module, dense again."""
    batch = te_cases.build(case)
    module = module or DotProductAttention(**te_cases.constructor(case))
    leaves = {n: batch.leaves[n].clone().requires_grad_() for n in ("q", "k", "v")}
    given = {n: te_cases.pack(leaves[n], case.side(n != "q"), case.layout, case.tail) for n in leaves}
    arguments = te_cases.arguments(batch) | more
    if "bias" in batch.leaves:
        leaves["bias"] = arguments["core_attention_bias"] = batch.leaves["bias"].clone().requires_grad_()
    if "sink" in batch.leaves:
        leaves["sink"] = module.softmax_offset  # type: ignore[assignment]
        with torch.no_grad():
            leaves["sink"].copy_(batch.leaves["sink"])
    out = module(given["q"], given["k"], given["v"], **arguments)
    out, largest = out if case.max_logit else (out, torch.empty(0))
    side = case.side(False)
    assert out.shape[-1] == case.heads[0] * case.dims[1]
    if case.tail:
        assert (out[-case.tail :] == 0).all()
    dense = te_cases.unpack(out, side, case.layout).unflatten(-1, (case.heads[0], case.dims[1]))
    grads = torch.autograd.grad((dense * batch.leaves["dout"]).sum(), list(leaves.values()))
    return te_cases.Answer(dense.detach(), largest, dict(zip(leaves, grads, strict=True)))


def judge(case: TeCase, found: te_cases.Answer) -> None:
    """The documented answer, and exactly zero in padding."""
    expected = te_cases.answer(te_cases.build(case))
    torch.testing.assert_close(found.out, expected.out, rtol=1e-6, atol=1e-6)
    if case.max_logit:
        torch.testing.assert_close(found.largest.double(), expected.largest, rtol=1e-5, atol=1e-5)
    for name, grad in found.grads.items():
        torch.testing.assert_close(
            grad.double(), expected.grads[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"d{n}: {m}"
        )
    if "padding" in case.mask:
        assert (found.out[~case.side(False).real()] == 0).all()
        for name in ("q", "k", "v"):
            assert (found.grads[name][~case.side(name != "q").real()] == 0).all(), name


@pytest.mark.parametrize("option", CASES, ids=lambda option: option.id)
def test_every_option_means_what_is_documented(option: TeCase) -> None:
    judge(option, run(option))


HALF = [
    TeCase(dims=(64, 64)),
    TeCase(dims=(64, 64), window=(3, 0)),
    TeCase(dims=(64, 64), softmax="learnable"),
    *(TeCase(dims=(64, 64), **base) for base in (PADDED, PACKED, GAPS)),
    TeCase(dims=(64, 64), softmax="off-by-one", **GAPS),
]


@pytest.mark.parametrize("option", HALF, ids=lambda option: option.id)
def test_in_bfloat16_by_the_kernels_of_a_device(device: str, option: TeCase) -> None:
    """On a GPU too, with ``-m gpu``."""
    judge_half(option, device)


def judge_half(option: TeCase, device: str) -> None:
    """The documented answer, forward and backward, but for bfloat16."""
    batch = te_cases.build(option)
    module = DotProductAttention(**te_cases.constructor(option)).to(device)
    if "sink" in batch.leaves:
        module.load_state_dict({"softmax_offset": batch.leaves["sink"]})
    leaves = [
        te_cases.pack(batch.leaves[n], option.side(n != "q"), option.layout).to(device, torch.bfloat16).requires_grad_()
        for n in "qkv"
    ]
    arguments = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in te_cases.arguments(batch).items()}
    if "cu_seqlens_kv" in arguments:
        arguments["cu_seqlens_kv"] = arguments["cu_seqlens_q"]
    if "cu_seqlens_kv_padded" in arguments:
        arguments["cu_seqlens_kv_padded"] = arguments["cu_seqlens_q_padded"]
    out = module(*leaves, **arguments)
    dense = te_cases.unpack(out, option.side(False), option.layout).unflatten(-1, (4, 64))
    grads = torch.autograd.grad((dense * batch.leaves["dout"].to(dense)).sum(), leaves)
    expected = te_cases.answer(batch)
    torch.testing.assert_close(dense.cpu().double(), expected.out, rtol=0.03, atol=0.03)
    for name, grad in zip("qkv", grads, strict=True):
        found = te_cases.unpack(grad, option.side(name != "q"), option.layout).cpu().double()
        torch.testing.assert_close(
            found, expected.grads[name], rtol=0.06, atol=0.06, msg=lambda m, n=name: f"d{n}: {m}"
        )
