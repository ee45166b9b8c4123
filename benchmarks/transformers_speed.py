"""Time a model of transformers on packed documents and in generation, by attention implementation.

    python benchmarks/transformers_speed.py [--out FOLDER] [--backends fa4,varlen]
    python benchmarks/transformers_speed.py --tiny --backends torch,reference

A Llama of one billion parameters (16 layers, 32 query and 8 key heads of 64), bfloat16, random weights. Per backend:
the step (forward and backward) on 16k tokens of packed documents, host time inside each layer's attention, and a
decoding step. Peers: sdpa with the block-diagonal mask that it needs to be right; sdpa without, which leaks between
documents; transformers' own flash attention where its package is installed. With --tiny, on any machine, only the
script itself is tried: the figures mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import anyattn
from measure import RESULTS, Report, Row

BACKENDS = ("fa3", "fa4", "fa2", "cudnn", "varlen")
FLASH = ("flash_attention_4", "flash_attention_3", "flash_attention_2")
LEAKING = "sdpa without a mask (leaks between documents)"
MASKED = "sdpa with the block-diagonal mask"


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    tokens: int = 16384
    mean_length: int = 700
    layers: int = 16
    hidden: int = 2048
    heads: tuple[int, int] = (32, 8)
    vocabulary: int = 32768
    prompts: int = 8
    prompt: int = 1024
    new: int = 32
    rounds: int = 5


TINY = Sizes(256, 40, 2, 64, (4, 2), 128, 2, 16, 4, 2)


class Bench:
    """One model, and the batches that it is given."""

    def __init__(self, sizes: Sizes, device: str) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.sizes, self.device = sizes, device
        heads, kv_heads = sizes.heads
        config = LlamaConfig(
            vocab_size=sizes.vocabulary, hidden_size=sizes.hidden, intermediate_size=4 * sizes.hidden,
            num_hidden_layers=sizes.layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
            head_dim=sizes.hidden // heads, max_position_embeddings=max(sizes.tokens, 2 * sizes.prompt),
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device(device):
            self.model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
        self.lengths = documents(sizes.tokens, sizes.mean_length)
        cu = torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32).to(device)
        ids = torch.randint(3, sizes.vocabulary, (1, sizes.tokens), device=device)
        positions = torch.cat([torch.arange(n) for n in self.lengths])[None].to(device)
        longest = max(self.lengths)
        self.plain: dict[str, Any] = {"input_ids": ids, "labels": ids, "position_ids": positions, "use_cache": False}
        self.packed = {
            **self.plain, "cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": longest, "max_length_k": longest,
        }  # fmt: skip
        self.losses: dict[str, float] = {}
        self._inputs: dict[str, dict[str, Any]] = {}

    def masked(self) -> dict[str, Any]:
        """With the mask that keeps documents apart, whole."""
        number = torch.repeat_interleave(torch.tensor(self.lengths)).to(self.device)
        visible = number[:, None] == number[None]
        return {**self.plain, "attention_mask": visible.tril()[None, None]}

    def leaking(self) -> dict[str, Any]:
        """What sdpa does with a packed batch beside a mask of ones: the fast causal kernel over all documents."""
        ones = torch.ones_like(self.plain["input_ids"])
        return {**self.plain, "attention_mask": ones}

    def inputs(self, name: str) -> dict[str, Any]:
        """The batch as an implementation must be given it."""
        if name not in self._inputs:
            made = self.masked() if name == MASKED else self.leaking() if name == LEAKING else self.packed
            self._inputs[name] = made
        return self._inputs[name]

    def use(self, name: str) -> None:
        """Set the attention implementation."""
        self.model.set_attn_implementation("sdpa" if name in (MASKED, LEAKING) else name)

    def wait(self) -> None:
        """For the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    # --- steps ---

    def step_ms(self, name: str) -> float:
        """Milliseconds of one forward and backward."""
        self.use(name)
        self.model.train()
        inputs = self.inputs(name)
        self.model.zero_grad(set_to_none=True)
        self.wait()
        start = time.perf_counter()
        loss = self.model(**inputs).loss
        loss.backward()
        self.wait()
        taken = (time.perf_counter() - start) * 1e3
        self.losses[name] = float(loss.detach())
        self.model.zero_grad(set_to_none=True)
        return taken

    def steps_ms(self, names: list[str]) -> dict[str, float]:
        """The median of each, measured in turns, for a machine's speed drifts."""
        taken: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(self.sizes.rounds):
            for name in names:
                taken[name].append(self.step_ms(name))
        return {name: round(statistics.median(times), 3) for name, times in taken.items()}

    def check(self, name: str, against: str) -> None:
        """Two implementations compute one thing."""
        ours, theirs = self.losses[name], self.losses[against]
        if abs(ours - theirs) > 2e-3 * abs(theirs):
            raise AssertionError(f"the loss is {ours} with {name} and {theirs} with {against}")

    # --- host time ---

    def host_us(self, name: str) -> float:
        """Host microseconds inside each layer's attention in forward, the first layer's left out.

        Nothing waits for the device but what the implementation itself waits for. The first layer also works out what
        the others use.
        """
        self.use(name)
        self.model.eval()
        inputs = {k: v for k, v in self.inputs(name).items() if k != "labels"}
        taken: list[float] = []
        with torch.no_grad(), timed("sdpa" if name in (MASKED, LEAKING) else name, taken):
            for number in range(2 + self.sizes.rounds):
                if number == 2:
                    taken.clear()
                self.model.model(**inputs)
                self.wait()
        return round(statistics.median(taken) * 1e6, 2)

    # --- decoding ---

    def decode_ms(self, name: str) -> float:
        """Milliseconds per new token of a batch of prompts padded on the left, with a dynamic cache."""
        self.use(name)
        self.model.eval()
        sizes = self.sizes
        mask = torch.ones(sizes.prompts, sizes.prompt, dtype=torch.long, device=self.device)
        for row in range(sizes.prompts):
            mask[row, : row * sizes.prompt // (2 * sizes.prompts)] = 0
        ids = torch.randint(3, sizes.vocabulary, mask.shape, device=self.device).masked_fill(mask == 0, 0)

        def seconds(new: int) -> float:
            self.wait()
            start = time.perf_counter()
            self.model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False)
            self.wait()
            return time.perf_counter() - start

        seconds(2)
        taken = [(seconds(sizes.new + 1) - seconds(1)) / sizes.new for _ in range(2)]
        return round(statistics.median(taken) * 1e3, 4)


def documents(tokens: int, mean: int) -> list[int]:
    """Lengths of documents, lognormal (sigma 1), that fill the row exactly."""
    generator = torch.Generator().manual_seed(1)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        drawn = float(torch.empty(1).log_normal_(0.0, 1.0, generator=generator)) * mean / 1.65
        lengths.append(min(max(int(drawn), 8), tokens - sum(lengths)))
    return lengths


@contextmanager
def timed(name: str, taken: list[float]) -> Iterator[None]:
    """Note the seconds of every call of an attention function, but the first layer's."""
    from transformers import AttentionInterface

    mapping = AttentionInterface._global_mapping
    original: Callable[..., Any] = mapping[name]

    def measured(module: Any, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = original(module, *args, **options)
        if module.layer_idx:
            taken.append(time.perf_counter() - start)
        return result

    mapping[name] = measured
    try:
        yield
    finally:
        mapping[name] = original


def allow_flash_attention() -> None:
    """Let transformers take FlashAttention 3 and 4 by their modules, whatever the packages are called."""
    from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX as MATRIX

    for generation, module in ((3, "flash_attn_interface"), (4, "flash_attn.cute")):
        if generation in MATRIX and _exists(module):
            MATRIX[generation]["general_availability_check"] = lambda: True


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def target(kind: str, name: str, other: str) -> str:
    """What our part of a peer's time should be at most; nothing where they do not do the same."""
    same_kernel = other.removeprefix("flash_attention_") == name.removeprefix("anyattn:fa")
    if kind == "host":  # kernels that transformers has no path for against any of its paths
        return "<= 0.5" if other in FLASH and (same_kernel or ":fa" not in name) else ""
    return "<= 1.0" if other in (MASKED, LEAKING) or same_kernel else ""


def warmed(report: Report, bench: Bench, label: str, names: list[str]) -> list[str]:
    """Those that run: two steps of each; what fails is left out and said."""
    ready: list[str] = []

    def warm(name: str) -> list[Row]:
        for _ in range(2):
            bench.step_ms(name)
        ready.append(name)
        return []

    for name in names:
        report.attempt(f"{label}, {name}", partial(warm, name))
    return ready


def measure_all(report: Report, bench: Bench, backends: list[str]) -> None:
    """Every row."""
    status = anyattn.backends()
    names = []
    for backend in backends:
        if status[backend].runs_here:
            names.append(f"anyattn:{backend}")
        else:
            report.leave_out(f"anyattn:{backend}", "absent", status[backend].reason)
    peers = [MASKED, LEAKING]
    allow_flash_attention()
    for flash in FLASH:
        try:
            bench.use(flash)
            peers.append(flash)
        except (ImportError, ValueError) as error:
            report.leave_out(flash, "absent", str(error)[:300])
    what = f"packed {bench.sizes.tokens} tokens, {len(bench.lengths)} documents"
    of_peers: dict[str, dict[str, float]] = {kind: {} for kind in ("step", "host", "decode")}

    def peer(kind: str, name: str, value: Callable[[str], float]) -> list[Row]:
        of_peers[kind][name] = value(name)
        return []

    def rows(kind: str, name: str, label: str, unit: str, value: Callable[[str], float]) -> list[Row]:
        ours = value(name)
        if kind == "step" and MASKED in bench.losses:
            bench.check(name, MASKED)
        return [
            Row(f"{label}, {name}", ours, theirs, unit, other, target(kind, name, other))
            for other, theirs in of_peers[kind].items()
        ]

    steps = f"step, {what}"
    in_turns = bench.steps_ms(warmed(report, bench, steps, [*peers, *names]))
    measures = (
        ("step", steps, "ms", in_turns.__getitem__),
        ("host", f"host time of attention per layer, {what}", "us", bench.host_us),
        ("decode", f"decode step, {bench.sizes.prompts} prompts of {bench.sizes.prompt}", "ms", bench.decode_ms),
    )  # fmt: skip
    for kind, label, unit, value in measures:
        ran = [name for name in [*peers, *names] if name in in_turns]
        for name in [p for p in peers if p in ran and (kind != "decode" or p != MASKED)]:
            report.attempt(f"{label}, {name}", partial(peer, kind, name, value))
        for name in [n for n in names if n in ran]:
            report.attempt(f"{label}, {name}", partial(rows, kind, name, label, unit, value))
    rename = {LEAKING: "sdpa"}
    for row in report.rows:
        if row.name.startswith("decode"):
            row.against = rename.get(row.against, row.against)


def main() -> None:
    """Measure, print, and write a dated file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="of anyattn")
    parser.add_argument("--tiny", action="store_true", help="try the script, on any machine")
    chosen = parser.parse_args()
    anyattn.integrations.transformers.register()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not chosen.tiny:
        parser.error("needs a GPU, or --tiny")
    report = Report("transformers-tiny" if chosen.tiny else "transformers", chosen.out)
    bench = Bench(TINY if chosen.tiny else Sizes(), device)
    measure_all(report, bench, chosen.backends.split(","))
    report.write()
    report.show()


if __name__ == "__main__":
    main()
