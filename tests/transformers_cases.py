"""The table of cases for models of transformers: what a user passes, and what must come out.

What must come out is the eager model's answer where nothing can go wrong: each document alone, without a mask. Only
what has no such answer (masks of the user's own, holes) is compared with eager on the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

import anyattn
from transformers_judge import Case, Found
from transformers_models import VOCABULARY, Architecture

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """Rows of an output that are a document."""

    entry: int
    begin: int
    end: int
    alone: Inputs | None = None
    """The document alone, for the eager model."""


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward, and where the documents lie in it."""

    inputs: Inputs
    pieces: Sequence[Piece]
    eager: Inputs | None = None
    """What eager takes instead, for all pieces at once."""


# --- forward and backward -------------------------------------------------------------------------------------------


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Token ids, none of them special."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def output(result: Any) -> Tensor:
    logits = getattr(result, "logits", None)
    found: Tensor = result.last_hidden_state if logits is None else logits
    return found


def collect(model: nn.Module, pieces: Sequence[Tensor]) -> Found:
    """The outputs of all documents, and the gradients of a fixed function of them."""
    loss = torch.zeros(())
    for i, piece in enumerate(pieces):
        loss = loss + (piece * torch.randn(piece.shape, generator=torch.Generator().manual_seed(i))).sum()
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found
    return {"output": torch.cat([piece.detach() for piece in pieces]), **found}


def _no_dropout(model: nn.Module) -> None:
    """Training without it: there is nothing to compare with."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def forward_case(name: str, group: str, make: Callable[[Architecture], Batch], **options: Any) -> Case:
    """A case of one forward and its gradients."""
    train, prepare = options.pop("train", False), options.pop("prepare", None)

    def run(architecture: Architecture, model: Any) -> Found:
        if train:
            model.train()
            _no_dropout(model)
        if prepare is not None:
            prepare(model)
        batch = make(architecture)
        out = output(model(**batch.inputs))
        return collect(model, [out[p.entry, p.begin : p.end] for p in batch.pieces])

    def truth(architecture: Architecture, model: Any) -> Found:
        batch = make(architecture)
        if batch.eager is not None:
            out = output(model(**batch.eager))
            return collect(model, [out[p.entry, p.begin : p.end] for p in batch.pieces])
        return collect(model, [output(model(**p.alone))[0, : p.end - p.begin] for p in batch.pieces])

    return Case(name, group, run, truth, **options)


# --- padded batches ---

MASKS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 10, [0] * 9 + [1]],
    "right": [[1, 1, 1, 1, 1, 1, 0, 0, 0, 0], [1] * 10, [1] + [0] * 9],
    "mixed": [[0, 1, 1, 1, 1, 1, 1, 0, 0, 0], [1] * 10, [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]],
    "ones": [[1] * 10] * 3,
}
HOLES = [[1, 1, 0, 1, 1, 0, 0, 1, 1, 1], [1] * 10, [0, 1, 1, 1, 0, 1, 1, 1, 1, 0]]


def positions_of(mask: Tensor, first: int = 0) -> Tensor:
    """As ``generate`` counts them: from the first real token on."""
    return (mask.cumsum(1) - 1).clamp(min=0) + first


def padded(kind: str | None) -> Callable[[Architecture], Batch]:
    """Three rows of up to ten tokens."""

    def make(architecture: Architecture) -> Batch:
        ids = tokens(3, 10)
        inputs: Inputs = {"input_ids": ids}
        mask = torch.tensor(MASKS[kind or "ones"])
        if kind is not None:
            inputs["attention_mask"] = mask
        if architecture.learned_positions and kind is not None:
            inputs["position_ids"] = positions_of(mask, architecture.first_position)
        pieces = []
        for row, real in enumerate(mask.bool()):
            begin, length = int(real.int().argmax()), int(real.sum())
            pieces.append(Piece(row, begin, begin + length, {"input_ids": ids[row : row + 1, begin : begin + length]}))
        return Batch(inputs, pieces)

    return make


def holes(architecture: Architecture) -> Batch:
    """Padding between the real tokens of a row: as eager on the same batch."""
    mask = torch.tensor(HOLES)
    inputs = {"input_ids": tokens(3, 10), "attention_mask": mask}
    pieces = [Piece(row, at, at + 1) for row, at in mask.nonzero().tolist()]
    return Batch(inputs, pieces, inputs)


# --- masks of the user's own ---


def _visible(architecture: Architecture) -> Tensor:
    """(2, 1, 9, 9): any mask, in which a query sees itself."""
    generator = torch.Generator().manual_seed(2)
    visible = torch.rand(2, 1, 9, 9, generator=generator) > 0.3
    if architecture.kind == "decoder":
        visible = visible & torch.ones(9, 9, dtype=torch.bool).tril()
    return visible | torch.eye(9, dtype=torch.bool)


def whole_mask(form: str) -> Callable[[Architecture], Batch]:
    """A complete mask, as bools, additive floats or a BlockMask."""

    def make(architecture: Architecture) -> Batch:
        ids, visible = tokens(2, 9), _visible(architecture)
        additive = torch.zeros(2, 1, 9, 9).masked_fill(~visible, torch.finfo(torch.float32).min)
        mask: Any = {"bool": visible, "float": additive}.get(form)
        if mask is None:
            mask = create_block_mask(lambda b, h, q, k: visible[b, 0, q, k], 2, None, 9, 9, device="cpu")
        pieces = [Piece(0, 0, 9), Piece(1, 0, 9)]
        return Batch({"input_ids": ids, "attention_mask": mask}, pieces, {"input_ids": ids, "attention_mask": additive})

    return make


# --- packed batches ---

LENGTHS = (5, 1, 9, 3)


def offsets(lengths: Sequence[int] = LENGTHS) -> Tensor:
    """As collators make them: int32, from 0."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def packed(
    spelling: str = "", positions: bool = True, first: int | None = None, **more: Any
) -> Callable[[Architecture], Batch]:
    """Documents one after the other in one row.

    Args:
        spelling: "seq_lens" or "seqlens" for cumulative lengths, "packing" for a Packing, "" for neither.
        positions: pass them, restarting.
        first: where they restart; default: where the model counts from.
        **more: further inputs; ``mask=True`` is a mask of ones.
    """

    def make(architecture: Architecture) -> Batch:
        start = architecture.first_position if first is None else first
        ids = tokens(1, sum(LENGTHS))
        counted = [torch.arange(start, start + n)[None] for n in LENGTHS]
        inputs: Inputs = {"input_ids": ids, **{k: v for k, v in more.items() if k != "mask"}}
        if positions:
            inputs["position_ids"] = torch.cat(counted, 1)
        if more.get("mask"):
            inputs["attention_mask"] = torch.ones_like(ids)
        if spelling == "packing":
            inputs["packing"] = anyattn.Packing.from_lengths(LENGTHS)
        elif spelling:
            longest = "max_length" if spelling == "seq_lens" else "max_seqlen"
            inputs |= {f"cu_{spelling}_{x}": offsets() for x in "qk"} | {f"{longest}_{x}": max(LENGTHS) for x in "qk"}
        pieces, begin = [], 0
        for n, document, count in zip(LENGTHS, ids.split(LENGTHS, 1), counted, strict=True):
            pieces.append(Piece(0, begin, begin + n, {"input_ids": document, "position_ids": count}))
            begin += n
        return Batch(inputs, pieces)

    return make


def packed_rows(padded_tails: bool) -> Callable[[Architecture], Batch]:
    """Several rows of several documents, found by positions; perhaps with padding after the last."""

    def make(architecture: Architecture) -> Batch:
        start = architecture.first_position
        rows = ((4, 6), (2, 3, 1)) if padded_tails else ((5, 7), (2, 9, 1))
        ids = tokens(2, 12)
        positions, mask, pieces = torch.full_like(ids, start), torch.zeros_like(ids), []
        for row, lengths in enumerate(rows):
            begin = 0
            for n in lengths:
                positions[row, begin : begin + n] = counted = torch.arange(start, start + n)
                mask[row, begin : begin + n] = 1
                alone = {"input_ids": ids[row : row + 1, begin : begin + n], "position_ids": counted[None]}
                pieces.append(Piece(row, begin, begin + n, alone))
                begin += n
        inputs = {"input_ids": ids, "position_ids": positions}
        return Batch(inputs | {"attention_mask": mask} if padded_tails else inputs, pieces)

    return make


# --- encoder-decoder, speech ---


def translation(kind: str | None) -> Callable[[Architecture], Batch]:
    """Decoder tokens beside padded encoder tokens."""

    def make(architecture: Architecture) -> Batch:
        source, target = tokens(3, 10), tokens(3, 7, seed=1)
        inputs: Inputs = {"input_ids": source, "decoder_input_ids": target}
        mask = torch.tensor(MASKS[kind or "ones"])
        if kind is not None:
            inputs["attention_mask"] = mask
        pieces = []
        for row, real in enumerate(mask.bool()):
            alone = {"input_ids": source[row : row + 1, real], "decoder_input_ids": target[row : row + 1]}
            pieces.append(Piece(row, 0, 7, alone))
        return Batch(inputs, pieces)

    return make


def translation_to_padded(architecture: Architecture) -> Batch:
    """Both sides padded on the right."""
    batch = translation("right")(architecture)
    lengths = (7, 2, 4)
    mask = torch.arange(7)[None] < torch.tensor(lengths)[:, None]
    pieces = []
    for n, piece in zip(lengths, batch.pieces, strict=True):
        assert piece.alone is not None
        alone = piece.alone | {"decoder_input_ids": piece.alone["decoder_input_ids"][:, :n]}
        pieces.append(Piece(piece.entry, 0, n, alone))
    return Batch(batch.inputs | {"decoder_attention_mask": mask.long()}, pieces)


def speech(architecture: Architecture) -> Batch:
    """Sound of one length, and decoder tokens."""
    sound = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(3))
    target = tokens(2, 7, seed=1)
    pieces = [
        Piece(row, 0, 7, {"input_features": sound[row : row + 1], "decoder_input_ids": target[row : row + 1]})
        for row in range(2)
    ]
    return Batch({"input_features": sound, "decoder_input_ids": target}, pieces)


# --- the table ------------------------------------------------------------------------------------------------------

_TEXT = frozenset({"decoder", "encoder"})
_DECODER = frozenset({"decoder"})
_PADDED, _OWN, _PACKED, _MORE = "padded", "masks of one's own", "packed", "encoder-decoder"


def _checkpointing(model: Any) -> None:
    model.train()
    _no_dropout(model)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


FORWARD: tuple[Case, ...] = (
    forward_case("no mask", _PADDED, padded(None), kinds=_TEXT),
    forward_case("mask of ones", _PADDED, padded("ones"), kinds=_TEXT),
    forward_case("left padding", _PADDED, padded("left"), kinds=_TEXT),
    forward_case("right padding", _PADDED, padded("right"), kinds=_TEXT),
    forward_case("padding on both sides", _PADDED, padded("mixed"), kinds=_TEXT),
    forward_case("padding between tokens", _PADDED, holes, kinds=_TEXT),
    forward_case("left padding, gradient checkpointing", _PADDED, padded("left"), prepare=_checkpointing),
    forward_case("4-D bool mask", _OWN, whole_mask("bool"), kinds=_TEXT),
    forward_case("4-D additive mask", _OWN, whole_mask("float"), kinds=_TEXT),
    forward_case("BlockMask", _OWN, whole_mask("block"), kinds=_TEXT, without=frozenset({"gpt2"})),
    forward_case("restarting position_ids, use_cache=False", _PACKED, packed(use_cache=False)),
    forward_case("restarting position_ids", _PACKED, packed(), kinds=_TEXT, by_positions=True),
    forward_case("restarting position_ids, training", _PACKED, packed(), train=True, by_positions=True),
    forward_case("restarting position_ids, mask of ones", _PACKED, packed(mask=True), kinds=_TEXT, by_positions=True),
    forward_case("position_ids restarting at 2", _PACKED, packed(first=2), kinds=_TEXT, by_positions=True),
    forward_case("restarting position_ids, several rows", _PACKED, packed_rows(False), kinds=_TEXT, by_positions=True),
    forward_case("restarting position_ids, several rows, padded", _PACKED, packed_rows(True), kinds=_TEXT,
             by_positions=True),
    forward_case("cu_seq_lens and position_ids", _PACKED, packed("seq_lens"), kinds=_TEXT),
    forward_case("cu_seq_lens and position_ids, training", _PACKED, packed("seq_lens"), train=True),
    forward_case("cu_seqlens and position_ids", _PACKED, packed("seqlens"), kinds=_TEXT),
    forward_case("cu_seq_lens and position_ids, mask of ones", _PACKED, packed("seq_lens", mask=True), kinds=_TEXT),
    forward_case(
        "cu_seq_lens alone", _PACKED, packed("seq_lens", positions=False), kinds=_TEXT,
        without=frozenset({"gpt2", "bert", "roberta"}),
    ),
    forward_case("Packing and position_ids", _PACKED, packed("packing"), kinds=_TEXT),
    forward_case("encoder not padded", _MORE, translation(None), kinds=frozenset({"seq2seq"})),
    forward_case("encoder padded on the right", _MORE, translation("right"), kinds=frozenset({"seq2seq"})),
    forward_case("encoder padded on both sides", _MORE, translation("mixed"), kinds=frozenset({"seq2seq"}),
             without=frozenset({"bart"})),
    forward_case("encoder and decoder padded", _MORE, translation_to_padded, kinds=frozenset({"seq2seq"})),
    forward_case("sound", _MORE, speech, kinds=frozenset({"speech"})),
)  # fmt: skip
