"""Models of transformers in bfloat16 on a GPU, by each backend: right, and without waiting in any layer.

Right: logits and gradients differ from those of float32, one document at a time, by at most twice what eager bfloat16
differs, one document at a time too, plus a rounding band.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import anyattn
from anyattn.integrations.transformers import attention_forward
from transformers_judge import Found
from transformers_models import transformers

BACKENDS = ("fa4", "varlen", "cudnn", "fa3", "fa2")
VOCABULARY, WINDOW = 64, 64
LENGTHS = (100, 1, 257, 154)
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1024,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {"llama": ("LlamaConfig", {}), "mistral": ("MistralConfig", {"sliding_window": WINDOW})}


pytestmark = pytest.mark.usefixtures("registered")


def requires(backend: str) -> str:
    """The backend, or a skipped test."""
    status = anyattn.backends()[backend]
    if not status.runs_here:
        pytest.skip(f"{backend}: {status.reason}")
    return backend


@cache
def original(name: str, device: str) -> Any:
    """The float32 model, eager."""
    torch.manual_seed(0)
    config, more = MODELS[name]
    made = getattr(transformers, config)(**_SIZES, **more)
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager").float().eval().to(device)
    with torch.no_grad():  # values that bfloat16 holds: both dtypes have the same weights
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
            parameter.copy_(parameter.bfloat16())
    return model


def model_of(name: str, device: str, implementation: str) -> Any:
    """The same model in bfloat16."""
    model = copy.deepcopy(original(name, device)).bfloat16()
    if implementation != "eager":
        model.set_attn_implementation(implementation)
    return model


# --- batches: (inputs, the rows of each document) ---

Rows = list[tuple[int, int, int]]


def tokens(*shape: int, device: str) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(0)).to(device)


def padded(kind: str, device: str) -> tuple[dict[str, Any], Rows]:
    mask, rows = torch.zeros(3, 300, dtype=torch.long), []
    for row, length in enumerate((130, 300, 17)):
        begin = {"left": 300 - length, "right": 0, "mixed": (300 - length) // 2}[kind]
        mask[row, begin : begin + length] = 1
        rows.append((row, begin, begin + length))
    return {"input_ids": tokens(3, 300, device=device), "attention_mask": mask.to(device)}, rows


def packed(spelling: str, device: str) -> tuple[dict[str, Any], Rows]:
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None].to(device)
    inputs: dict[str, Any] = {"input_ids": tokens(1, sum(LENGTHS), device=device), "position_ids": positions}
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32).to(device)
    if spelling == "cu_seq_lens":
        inputs |= {f"cu_seq_lens_{x}": cu for x in "qk"} | {f"max_length_{x}": max(LENGTHS) for x in "qk"}
    elif spelling == "packing":
        inputs["packing"] = anyattn.Packing.from_lengths(LENGTHS, device=device)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    return inputs, [(0, a, b) for a, b in pairwise(ends)]


BATCHES: dict[str, Callable[[str], tuple[dict[str, Any], Rows]]] = {
    **{f"{kind} padding": lambda device, kind=kind: padded(kind, device) for kind in ("left", "right", "mixed")},
    **{f"packed by {how}": lambda device, how=how: packed(how, device) for how in ("positions", "cu_seq_lens",
                                                                                  "packing")},
}  # fmt: skip


def collect(model: Any, outs: list[Tensor]) -> Found:
    loss = torch.zeros((), device=outs[0].device)
    for i, out in enumerate(outs):
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(i)).to(out.device)
        loss = loss + (out.float() * weights).sum()
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": torch.cat([out.detach().float() for out in outs]), **found}


def alone(model: Any, ids: Tensor, rows: Rows) -> Found:
    return collect(model, [model(input_ids=ids[row : row + 1, a:b]).logits[0] for row, a, b in rows])


_known: dict[tuple[str, str, str], tuple[Found, Found]] = {}


def check(name: str, which: str, device: str, got: Found) -> None:
    """Against float32, with the error of eager bfloat16 for a measure."""
    key = (name, which, device)
    if key not in _known:
        inputs, rows = BATCHES[which](device)
        ids = inputs["input_ids"]
        _known[key] = (
            alone(copy.deepcopy(original(name, device)), ids, rows), alone(model_of(name, device, "eager"), ids, rows)
        )  # fmt: skip
    exact, eager = _known[key]
    assert got.keys() == exact.keys()
    for what, wanted in exact.items():
        band = torch.finfo(torch.bfloat16).eps * float(wanted.abs().max())
        allowed = 2 * float((eager[what] - wanted).abs().max()) + band
        error = float((got[what] - wanted).abs().max())
        assert error <= allowed, f"{what}: {error} of {allowed}"


def judged(name: str, which: str, device: str, implementation: str) -> None:
    inputs, rows = BATCHES[which](device)
    model = model_of(name, device, implementation)
    logits = model(**inputs).logits
    check(name, which, device, collect(model, [logits[row, a:b] for row, a, b in rows]))


def test_the_judge_on_a_cpu() -> None:
    """It lets the right ones pass, and no other."""
    for which in ("left padding", "packed by positions"):
        judged("mistral", which, "cpu", "anyattn:torch")
    with pytest.raises(AssertionError, match="of "):
        judged("mistral", "packed by positions", "cpu", "sdpa")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_equals_one_document_at_a_time(name: str, which: str, backend: str) -> None:
    judged(name, which, "cuda", f"anyattn:{requires(backend)}")


# --- generation ---


def generated(name: str, device: str, implementation: str, static: bool) -> None:
    """Logits of every step, against float32 and eager bfloat16 on the tokens that were chosen, each row alone."""
    inputs, rows = padded("left", device)
    steps = 12
    found = model_of(name, device, implementation).generate(
        **inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, return_dict_in_generate=True,
        output_logits=True, disable_compile=True, cache_implementation="static" if static else None,
    )  # fmt: skip
    got = torch.stack(found.logits, 1).float()
    with torch.no_grad():
        for row, begin, _ in rows:
            ids = found.sequences[row : row + 1, begin:-1]
            exact, eager = (
                m(input_ids=ids).logits[0, -steps:].float()
                for m in (original(name, device), model_of(name, device, "eager"))
            )
            band = torch.finfo(torch.bfloat16).eps * float(exact.abs().max())
            allowed = 2 * float((eager - exact).abs().max()) + band
            assert float((got[row] - exact).abs().max()) <= allowed


def test_generation_on_a_cpu() -> None:
    generated("mistral", "cpu", "anyattn:torch", static=False)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", MODELS)
def test_generation(name: str, static: bool, backend: str) -> None:
    generated(name, "cuda", f"anyattn:{requires(backend)}", static)


# --- waiting ---


@contextmanager
def no_waiting(on: bool = True) -> Iterator[None]:
    """Any synchronisation or copy to the host is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is a prototype
        torch.cuda.set_sync_debug_mode("error" if on else "default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", BATCHES)
def test_no_layer_waits(which: str, backend: str) -> None:
    """But the first of a forward, which may work something out; nor does backward."""
    requires(backend)
    layers: list[int] = []

    def watched(module: Any, *args: Any, **options: Any) -> Any:
        layers.append(module.layer_idx)
        with no_waiting(module.layer_idx > 0):
            return attention_forward(module, *args, backend=backend, **options)

    model = model_of("mistral", "cuda", f"anyattn:{backend}")
    registered = transformers.AttentionInterface._global_mapping
    usual = registered[f"anyattn:{backend}"]
    for forward in range(3):
        inputs, _ = BATCHES[which]("cuda")
        registered[f"anyattn:{backend}"] = usual if forward == 0 else watched
        try:
            loss = model(**inputs).logits.float().square().mean()
        finally:
            registered[f"anyattn:{backend}"] = usual
        torch.cuda.synchronize()
        with no_waiting(forward > 0):
            loss.backward()
    assert layers == [0, 1, 2, 3] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_layer_waits_in_decoding(backend: str) -> None:
    requires(backend)
    inputs, _ = padded("left", "cuda")
    model = model_of("llama", "cuda", f"anyattn:{backend}")
    registered = transformers.AttentionInterface._global_mapping
    usual = registered[f"anyattn:{backend}"]
    seen: list[int] = []

    def watched(module: Any, query: Tensor, *args: Any, **options: Any) -> Any:
        seen.append(query.shape[2])
        with no_waiting(module.layer_idx > 0):
            return attention_forward(module, query, *args, backend=backend, **options)

    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    want = model.generate(**inputs, **options)
    registered[f"anyattn:{backend}"] = watched
    try:
        assert torch.equal(model.generate(**inputs, **options), want)
    finally:
        registered[f"anyattn:{backend}"] = usual
    assert seen.count(1) == 7 * 4
