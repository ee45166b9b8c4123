"""``DotProductAttention`` as a module: its signature, state, dropout, checkpoints, caches, and what it refuses."""

from __future__ import annotations

import copy
import doctest
import gc
import importlib
import inspect
import re
import sys
import types
import weakref
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import anyattn
import fresh
import te_cases
from anyattn.integrations import _te_rows, transformer_engine
from anyattn.integrations._transformers_memory import memory
from anyattn.integrations.transformer_engine import CPLoadBalancingStrategy, DotProductAttention
from doubles.signatures import recorded
from te_cases import TeCase
from test_transformer_engine import GAPS, PACKED, PADDED, judge, run

NEWEST = "2.20.2"
EVERYWHERE = ("__init__", "forward", "set_context_parallel_group")


@pytest.mark.parametrize("method", EVERYWHERE)
def test_the_signature_is_the_published_one(method: str) -> None:
    package = recorded("transformer_engine")
    assert package.versions() == [NEWEST]
    published = package.signature(f"DotProductAttention.{method}", NEWEST).parameters.values()
    ours = inspect.signature(getattr(DotProductAttention, method)).parameters.values()
    assert [(p.name, p.kind) for p in ours] == [(p.name, p.kind) for p in published]
    defaults = [p.default if p.default is p.empty else str(p.default).removeprefix("'").removesuffix("'") for p in ours]
    assert defaults == [p.default if p.default is p.empty else p.default.strip("'") for p in published]


def test_it_needs_no_transformer_engine() -> None:
    code = (
        "import sys; import anyattn.integrations.transformer_engine as t; t.DotProductAttention(2, 8); "
        "assert not {'transformer_engine', 'transformers', 'diffusers'} & set(sys.modules)"
    )
    done = fresh.run(code)
    assert done.returncode == 0, done.stderr


def plain(seq: int = 6, heads: int = 2, dim: int = 8, **options: Any) -> tuple[DotProductAttention, list[Tensor]]:
    """A module and q, k, v."""
    options = {"qkv_format": "bshd", **options}
    return DotProductAttention(heads, dim, **options), list(torch.randn(3, 2, seq, heads, dim).unbind())


# --- one import in a Megatron-style model ---


class CoreAttention(DotProductAttention):
    """How Megatron-style code wraps it: by keywords at construction, tensors by position."""

    def __init__(self, heads: int, dim: int, layer_number: int, **extra: Any) -> None:
        super().__init__(
            num_attention_heads=heads, kv_channels=dim, attention_dropout=0.0, attn_mask_type="causal",
            sequence_parallel=False, tp_size=1, get_rng_state_tracker=None, tp_group=None, layer_number=layer_number,
            attention_type="self", num_gqa_groups=heads // 2, softmax_scale=None, **extra,
        )  # fmt: skip

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, packed: Any
    ) -> Any:
        if packed is None:
            return super().forward(query, key, value, attention_mask, attn_mask_type="causal")
        return super().forward(query, key, value, attention_mask, attn_mask_type="padding_causal", **packed)


def test_a_megatron_style_layer() -> None:
    core = CoreAttention(4, 8, 3)
    q, k, v = torch.randn(10, 2, 4, 8), *torch.randn(2, 10, 2, 2, 8)
    causal = torch.ones(1, 1, 10, 10, dtype=torch.bool).triu(1)  # what its data loader makes; the mask type says it
    out = core(q, k, v, causal, None)
    assert out.shape == (10, 2, 32)
    offsets = torch.arange(0, 21, 10, dtype=torch.int32)
    packed = {"qkv_format": "thd", "cu_seqlens_q": offsets, "cu_seqlens_kv": offsets, "max_seqlen_q": 10}
    rows = [x.transpose(0, 1).flatten(0, 1) for x in (q, k, v)]
    thd = core(*rows, torch.ones(1), packed | {"max_seqlen_kv": 10, "cu_seqlens_q_padded": None})
    torch.testing.assert_close(thd.view(2, 10, 32), out.transpose(0, 1))


def test_the_examples_run() -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder(exclude_empty=True).find(transformer_engine):
        assert runner.run(test).failed == 0
    assert runner.tries
    page = (Path(__file__).parents[1] / "docs" / "transformer-engine.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["out"].shape == (16, 512)
    assert [i for i, row in enumerate(names["out"]) if not row.any()] == [5, 6, 7, 15]


#: A release, cut down to what is read of it.
PUBLISHED = """
class DotProductAttention(Base):
    def __init__(self, heads: int, window: Optional[Tuple[int, int]] = None) -> None: ...
    def forward(self, q=None, *, scale: float = 1.0): return q
    def other(self): ...
"""


def test_signatures_are_read_from_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "transformer_engine-9.1-py3-none-any.whl", "w") as archive:
        folder = "transformer_engine/pytorch/attention/dot_product_attention"
        archive.writestr(f"{folder}/dot_product_attention.py", PUBLISHED)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    try:
        packages = importlib.import_module("signatures.packages")
        ((version, noted, functions),) = packages.transformer_engine(tmp_path)
    finally:
        for name in [n for n in sys.modules if n.partition(".")[0] == "signatures"]:
            del sys.modules[name]
    assert (version, noted) == ("9.1", {})
    assert functions == {
        "DotProductAttention.__init__": {"signature": "self, heads, window=None"},
        "DotProductAttention.forward": {"signature": "self, q=None, *, scale=1.0"},
    }


def test_inputs_that_are_packed_in_one_tensor() -> None:
    module, _ = plain()
    for dim, shape in ((-3, (2, 6, 3, 2, 8)), (-2, (2, 6, 2, 3, 8))):
        qkv = torch.randn(shape)
        q, k, v = qkv.unbind(dim)
        torch.testing.assert_close(module(qkv_layer=qkv, qkv_interleave_dim=dim), module(q, k, v))
        torch.testing.assert_close(module(q, kv_layer=qkv.narrow(dim, 1, 2), qkv_interleave_dim=dim), module(q, k, v))
    with pytest.raises(anyattn.InvalidArgument, match="beside qkv_layer, give nothing else"):
        module(q, qkv_layer=qkv)
    with pytest.raises(anyattn.InvalidArgument, match="without qkv_layer and kv_layer, give key_layer"):
        module(q)
    with pytest.raises(anyattn.InvalidArgument, match="both hold keys"):
        module(qkv_layer=qkv, kv_layer=qkv)
    with pytest.raises(anyattn.ShapeError, match="must have size 3 at dim -3"):
        module(qkv_layer=qkv)
    with pytest.raises(anyattn.InvalidArgument, match="-3 or -2"):
        module(qkv_layer=qkv, qkv_interleave_dim=1)


# --- state ---


def test_checkpoints_go_both_ways() -> None:
    module = DotProductAttention(4, 8, softmax_type="learnable", tp_size=2)
    state = module.state_dict()
    assert {n: tuple(x.shape) for n, x in state.items()} == {"softmax_offset": (2,), "_extra_state": (0,)}
    assert list(DotProductAttention(4, 8, softmax_type="off-by-one").state_dict()) == ["_extra_state"]
    state["softmax_offset"] = torch.tensor([1.0, 2.0])
    state["_extra_state"] = torch.ones(5, dtype=torch.uint8)  # scales of FP8 attention
    assert str(module.load_state_dict(state)) == "<All keys matched successfully>"
    assert module.softmax_offset is not None
    assert module.softmax_offset.tolist() == [1.0, 2.0]
    older = {"core.softmax_offset": torch.zeros(2), "core.fused_attention._extra_state": None}
    holder = torch.nn.Module()
    holder.core = copy.deepcopy(module)
    holder.load_state_dict(older)
    with pytest.raises(RuntimeError, match="unknown"):
        holder.load_state_dict(older | {"core.unknown": torch.zeros(1)})


def test_a_sink_moves_with_the_module() -> None:
    for kind in ("off-by-one", "learnable"):
        module = DotProductAttention(4, 8, softmax_type=kind).to("meta", torch.bfloat16)
        assert module.softmax_offset is not None
        assert (module.softmax_offset.device.type, module.softmax_offset.dtype) == ("meta", torch.bfloat16)


@pytest.mark.parametrize("kind", ["off-by-one", "learnable"])
def test_a_module_made_without_memory(kind: str) -> None:
    expected, tensors = plain(softmax_type=kind)
    with torch.device("meta"):
        module, _ = plain(softmax_type=kind)
    module.to_empty(device="cpu")
    assert module.softmax_offset is not None
    torch.nn.init.constant_(module.softmax_offset, 777.0)  # what was in memory
    module.load_state_dict(expected.state_dict(), strict=True)
    assert torch.equal(module(*tensors), expected(*tensors))
    torch.nn.init.constant_(module.softmax_offset, 777.0)
    module.reset_parameters()
    assert module.softmax_offset.eq(0).all()


def test_tensor_parallel_ranks_share_heads() -> None:
    module = DotProductAttention(8, 16, num_gqa_groups=4, tp_size=2, qkv_format="bshd", softmax_type="learnable")
    assert module(torch.randn(1, 3, 4, 16), *torch.randn(2, 1, 3, 2, 16)).shape == (1, 3, 64)
    with pytest.raises(anyattn.ShapeError, match=r"heads of q, k and v \(4, 4, 4\).* num_gqa_groups=4 "):
        module(torch.randn(1, 3, 4, 16), *torch.randn(2, 1, 3, 4, 16))
    with pytest.raises(anyattn.InvalidArgument, match="multiple of num_gqa_groups and of tp_size"):
        DotProductAttention(8, 16, tp_size=3)


# --- dropout, repeats, checkpoints ---


class Tracker:
    """Generators' states by name, as Megatron-style code keeps them; here of the CPU's generator."""

    def __init__(self, seed: int) -> None:
        self.states = {"model-parallel-rng": torch.Generator().manual_seed(seed).get_state()}
        self.forks = 0

    def get_states(self) -> dict[str, Tensor]:
        return dict(self.states)

    def set_states(self, states: dict[str, Tensor]) -> None:
        self.states = dict(states)

    @contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        self.forks += 1
        before = torch.get_rng_state()
        torch.set_rng_state(self.states[name])
        try:
            yield
        finally:
            self.states[name] = torch.get_rng_state()
            torch.set_rng_state(before)


def test_dropout_is_for_training() -> None:
    module, (q, k, v) = plain(seq=32, attention_dropout=0.5)
    expected = plain()[0](q, k, v)
    assert not torch.allclose(module(q, k, v), expected)
    torch.testing.assert_close(module.eval()(q, k, v), expected)


def test_dropout_draws_inside_of_the_tracker() -> None:
    tracker = Tracker(3)
    module, (q, k, v) = plain(seq=32, attention_dropout=0.5, get_rng_state_tracker=lambda: tracker)
    before = torch.get_rng_state()
    first = module(q, k, v)
    assert torch.equal(torch.get_rng_state(), before)
    second = module(q, k, v)
    assert not torch.equal(first, second)
    tracker.set_states(Tracker(3).states)
    assert torch.equal(module(q, k, v), first)
    assert tracker.forks == 3
    module.eval()(q, k, v)
    assert tracker.forks == 3
    free, _ = plain(attention_dropout=0.5, get_rng_state_tracker=lambda: tracker, sequence_parallel=True)
    free(q, k, v)
    assert tracker.forks == 3


@pytest.mark.parametrize("tracked", [False, True])
def test_attention_computed_again_drops_the_same(tracked: bool) -> None:
    found = []
    for again in (False, True):
        torch.manual_seed(1)
        tracker = Tracker(5)
        options: dict[str, Any] = {"get_rng_state_tracker": lambda t=tracker: t} if tracked else {}
        module, _ = plain(attention_dropout=0.4, softmax_type="learnable", **options)
        q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, 16, 2, 8).unbind())
        out = module(q, k, v, checkpoint_core_attention=again)
        module(q, k, v)  # the tracker goes on before backward comes
        now = tracker.states["model-parallel-rng"].clone()
        out.square().sum().backward()
        assert torch.equal(tracker.states["model-parallel-rng"], now)
        assert module.softmax_offset is not None
        assert module.softmax_offset.grad is not None
        found.append((out, q.grad, k.grad, v.grad, module.softmax_offset.grad))
    for plainly, recomputed in zip(*found, strict=True):
        assert plainly is not None
        assert torch.equal(plainly, recomputed)


@pytest.mark.parametrize("what", ["bias", "slopes", "sink"])
def test_what_is_written_to_before_it_is_computed_again_is_an_error(what: str) -> None:
    """As it is where attention is computed once."""
    module, (q, k, v) = plain(softmax_type="learnable")
    bias, slopes = torch.randn(1, 2, 6, 6), torch.rand(2)
    terms: dict[str, dict[str, Any]] = {
        "bias": {"core_attention_bias_type": "post_scale_bias", "core_attention_bias": bias},
        "slopes": {"core_attention_bias_type": "alibi", "alibi_slopes": slopes},
        "sink": {},
    }
    assert module.softmax_offset is not None
    written = {"bias": bias, "slopes": slopes, "sink": module.softmax_offset}[what]
    out = module(q.requires_grad_(), k, v, checkpoint_core_attention=True, **terms[what])
    with torch.no_grad():
        written.mul_(3).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.square().sum().backward()


def test_attention_that_is_computed_again_keeps_only_its_inputs() -> None:
    module, _ = plain(seq=64)
    kept = []
    for again in (False, True):
        q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, 64, 2, 8).unbind())
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: (s.append(x.numel()), x)[1], lambda x: x):
            module(q, k, v, checkpoint_core_attention=again).sum()
        kept.append(len(sizes))
    assert kept[1] < kept[0]


def test_transformer_engines_variable_asks_for_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = plain()
    assert module.deterministic is None
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    module, (q, k, v) = plain()
    assert module.deterministic is True
    torch.testing.assert_close(module(q, k, v), plain()[0](q, k, v))


# --- once per batch ---


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is read on the host, in order."""
    calls: list[Any] = []
    real = _te_rows._make

    def count(*arguments: Any) -> Any:
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(_te_rows, "_make", count)
    return calls


def packed_call(
    offsets: Tensor, padded: Tensor | None = None, **options: Any
) -> tuple[DotProductAttention, list[Tensor], dict[str, Any]]:
    """A "thd" call."""
    module, _ = plain(qkv_format="thd", attn_mask_type="padding_causal", **options)
    tensors = list(torch.randn(3, 12, 2, 8).unbind())
    given = {"cu_seqlens_q": offsets, "cu_seqlens_kv": offsets}
    if padded is not None:
        given |= {"cu_seqlens_q_padded": padded, "cu_seqlens_kv_padded": padded}
    return module, tensors, given


def test_offsets_are_read_once_per_batch(made: list[Any]) -> None:
    offsets, padded = torch.tensor([0, 4, 9], dtype=torch.int32), torch.tensor([0, 6, 12], dtype=torch.int32)
    module, tensors, given = packed_call(offsets, padded)
    first = module(*tensors, **given)
    for _ in range(3):
        other, *_ = packed_call(offsets)
        other(*tensors, **given, window_size=(2, 0))
    assert len(made) == 1
    padded.sub_(torch.tensor([0, 2, 1], dtype=torch.int32))
    moved = module(*tensors, **given)
    assert len(made) == 2
    assert not torch.equal(first, moved)
    offsets.copy_(torch.tensor([0, 2, 9], dtype=torch.int32))
    module(*tensors, **given)
    assert len(made) == 3


def test_nothing_outlives_the_offsets() -> None:
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    module, tensors, given = packed_call(offsets)
    module(*tensors, **given)
    (rows,) = (entry.value for entry in memory[offsets][1].values())
    watched = weakref.ref(rows)
    del offsets, given, rows
    gc.collect()
    assert watched() is None


def test_offsets_that_are_not_read(made: list[Any]) -> None:
    offsets, padded = torch.tensor([0, 4, 9], dtype=torch.int32), torch.tensor([0, 6, 12], dtype=torch.int32)
    module, tensors, given = packed_call(offsets, padded)
    expected = module(*tensors, **given)
    made.clear()
    module.check_offsets = False
    longest = {"max_seqlen_q": 5, "max_seqlen_kv": 5}
    torch.testing.assert_close(module(*tensors, **given, **longest), expected)
    other = {"cu_seqlens_kv": offsets.clone(), "cu_seqlens_kv_padded": padded.clone()}
    torch.testing.assert_close(module(*tensors, **(given | other), **longest), expected)
    assert not made
    with pytest.raises(anyattn.InvalidArgument, match="max_seqlen_kv must be an int; got None"):
        module(*tensors, **given, max_seqlen_q=5)
    with pytest.raises(anyattn.InvalidArgument, match="pad_between_seqs=False with cu_seqlens_q_padded"):
        module(*tensors, **given, **longest, pad_between_seqs=False)
    module.return_max_logit = True
    with pytest.raises(anyattn.Unsupported, match="return_max_logit with offsets that are not read"):
        module(*tensors, **given, **longest)


def test_a_captured_call_reads_and_remembers_nothing(made: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph reads the offsets at each replay, so it must not keep what one batch had."""
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    module, tensors, given = packed_call(offsets)
    expected = module(*tensors, **given)
    made.clear()
    monkeypatch.setattr(_te_rows, "captured", lambda x: True)
    known = len(memory[offsets][1])
    torch.testing.assert_close(module(*tensors, **given, max_seqlen_q=5, max_seqlen_kv=5), expected)
    assert not made
    assert len(memory[offsets][1]) == known
    with pytest.raises(anyattn.InvalidArgument, match="inside a CUDA graph"):
        module(*tensors, **given)


def test_what_is_read_on_the_host_is_refused_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warm-up has read it already, and a replay would go on with what it had."""
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    mask = torch.zeros(2, 1, 1, 6, dtype=torch.bool)
    module, tensors = plain(attn_mask_type="padding")
    given = [{"cu_seqlens_q": offsets, "cu_seqlens_kv": offsets}, {"attention_mask": mask}]
    packed, rows, more = packed_call(offsets)
    policy = {"sequence_ids": torch.tensor([0, 1]), "mask_type": "padding", "window_size": None}
    for each in given:
        module(*tensors, **each)
    packed(*rows, **more, thd_attention_policies=[policy])
    monkeypatch.setattr(_te_rows, "captured", lambda x: True)
    for each in given:
        with pytest.raises(anyattn.Unsupported, match="4-D batch with padding cannot be captured"):
            module(*tensors, **each)
    with pytest.raises(anyattn.Unsupported, match="thd_attention_policies cannot be captured"):
        packed(*rows, **more, thd_attention_policies=[policy])
    packed.return_max_logit = True
    with pytest.raises(anyattn.Unsupported, match="return_max_logit with offsets that are not read"):
        packed(*rows, **more, max_seqlen_q=5, max_seqlen_kv=5)


def test_an_arbitrary_mask_is_looked_at_again_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = torch.rand(2, 1, 6, 6) > 0.5
    known = _te_rows.visible(hidden, (6, 6))
    assert _te_rows.visible(hidden, (6, 6)) is known
    monkeypatch.setattr(_te_rows, "captured", lambda x: True)
    found = _te_rows.visible(hidden, (6, 6))
    assert found is not known
    assert torch.equal(found, ~hidden)


TRAINED: list[tuple[str, str, dict[str, Any]]] = [
    ("bshd", "arbitrary", {"attention_mask": torch.eye(6, dtype=torch.bool)}),
    ("bshd", "padding", {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [0] * 6]).bool()[:, None, None]}),
    ("thd", "padding_causal", {"cu_seqlens_q": torch.tensor([0, 4, 12], dtype=torch.int32)}),
]


@pytest.mark.parametrize(("layout", "kind", "given"), TRAINED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_inference_met_first_serves_training(layout: str, kind: str, given: dict[str, Any]) -> None:
    module, tensors = plain(qkv_format=layout, attn_mask_type=kind)
    tensors = [x.flatten(0, 1) if layout == "thd" else x for x in tensors]
    given = {n: x.clone() for n, x in given.items()}
    if layout == "thd":
        given["cu_seqlens_kv"] = given["cu_seqlens_q"]
    with torch.inference_mode():
        expected = module(*tensors, **given)
    leaves = [x.requires_grad_() for x in tensors]
    out = module(*leaves, **given)
    torch.testing.assert_close(out, expected.clone())
    assert all(x.any() for x in torch.autograd.grad(out.square().sum(), leaves))


def test_two_batches_that_look_at_one_another_are_forgotten() -> None:
    module, _ = plain(attn_mask_type="padding", attention_type="cross")
    text, image = torch.randn(2, 6, 2, 8), torch.randn(2, 9, 2, 8)
    watched = []
    for _ in range(5):
        masks = torch.arange(6) >= torch.tensor([4, 6])[:, None], torch.arange(9) >= torch.tensor([9, 5])[:, None]
        here, there = (mask[:, None, None] for mask in masks)
        for _ in range(2):
            module(text, image, image, attention_mask=(here, there))
            module(image, text, text, attention_mask=(there, here))
        watched += [weakref.ref(x) for x in (*masks, here, there)]
    del masks, here, there
    gc.collect()
    assert sum(x() is not None for x in watched) == 0


def test_new_views_of_the_same_offsets_are_the_same(made: list[Any]) -> None:
    whole = torch.tensor([0, 4, 9, 12, 12, 12], dtype=torch.int32)
    module, tensors, _ = packed_call(whole)
    found = [module(*tensors, cu_seqlens_q=whole[:4], cu_seqlens_kv=whole[:4]) for _ in range(3)]
    assert len(made) == 1
    other = module(*tensors, cu_seqlens_q=whole[:3], cu_seqlens_kv=whole[:3])
    assert len(made) == 2
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], other)
    whole[1] = 2
    module(*tensors, cu_seqlens_q=whole[:4], cu_seqlens_kv=whole[:4])
    assert len(made) == 3


def test_what_was_written_unseen_can_be_forgotten(made: list[Any]) -> None:
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    module, tensors, given = packed_call(offsets)
    first = module(*tensors, **given)
    offsets.numpy()[1] = 2
    assert torch.equal(module(*tensors, **given), first)
    transformer_engine.forget()
    assert not torch.equal(module(*tensors, **given), first)
    assert len(made) == 2


def test_inference_mode(made: list[Any]) -> None:
    with torch.inference_mode():
        offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
        module, tensors, given = packed_call(offsets)
        first = module(*tensors, **given)
        offsets.copy_(torch.tensor([0, 2, 9], dtype=torch.int32))  # nobody is told
        assert not torch.equal(module(*tensors, **given), first)
    assert len(made) == 2


def test_a_longest_length_that_is_too_small_is_an_error() -> None:
    module, tensors, given = packed_call(torch.tensor([0, 4, 9], dtype=torch.int32))
    with pytest.raises(anyattn.PackingError, match="max_seqlen is 4, and the longest sequence has 5"):
        module(*tensors, **given, max_seqlen_q=4, max_seqlen_kv=4)


def test_equal_offsets_in_two_tensors_are_self_attention() -> None:
    """Then every kernel can do what is causal, though the alignment is the top left."""
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    rows = _te_rows.rows_of(
        *_te_rows.sides((offsets, offsets.clone()), (None, None), (5, 5), None, False), True, torch.device("cpu"), None
    )
    assert rows.keys is None


# --- masks for some sequences each ---


def test_policies_mask_sequences_apart() -> None:
    case = TeCase(**GAPS, tail=2)
    batch = te_cases.build(case)
    module = DotProductAttention(**te_cases.constructor(case))
    tensors = [te_cases.pack(batch.leaves[n], case.side(n != "q"), "thd", 2).requires_grad_() for n in "qkv"]
    given = te_cases.arguments(batch)
    policies = [
        {"sequence_ids": torch.tensor([0, 1]), "mask_type": "padding", "window_size": (2, 2)},
        {"sequence_ids": torch.tensor([2]), "mask_type": "padding,causal", "window_size": (-1, 0)},
        {"sequence_ids": torch.tensor([3]), "mask_type": "padding_causal", "window_size": (1, 0),
         "bottom_right_diagonal": True},
        {"sequence_ids": torch.tensor([], dtype=torch.int32), "mask_type": "padding", "window_size": None},
    ]  # fmt: skip
    kinds = [("padding", (2, 2)), ("padding", (2, 2)), ("padding_causal", None), ("padding_causal", (1, 0))]
    found = module(*tensors, **given, thd_attention_policies=policies)
    for i, (start, room) in enumerate(zip(case.side(False).starts, case.side(False).rooms, strict=False)):
        kind, window = kinds[i]
        whole = module(*tensors, **given, attn_mask_type=kind, window_size=window)
        assert torch.equal(found[start : start + room], whole[start : start + room])
    assert (found[-2:] == 0).all()
    assert torch.autograd.grad(found.sum(), tensors)[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sequence_ids": torch.tensor([0])}, "must be 0 to 1, each in one policy"),
        ({"sequence_ids": torch.tensor([1, 0])}, "ascending"),
        ({"sequence_ids": [0, 1]}, "1-D int32 or int64"),
        ({"mask_type": "causal"}, "must be a padding one"),
        ({"window": 1}, "must be a dict with"),
    ],
)
def test_policies_that_say_too_little(change: dict[str, Any], text: str) -> None:
    module, tensors, given = packed_call(torch.tensor([0, 4, 9], dtype=torch.int32))
    policy = {"sequence_ids": torch.tensor([0, 1]), "mask_type": "padding", "window_size": None}
    with pytest.raises(anyattn.InvalidArgument, match=text):
        module(*tensors, **given, thd_attention_policies=[policy | change])


# --- what is refused, by name ---

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"inference_params": object()}, "inference_params: keys are not cached"),
    ({"fp8_output": True}, "fp8_output"),
    ({"score_mod": print}, "score_mod: score functions"),
    ({"score_mod_tensors": {}}, "score_mod_tensors"),
]


@pytest.mark.parametrize(("given", "text"), REFUSED, ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_what_nothing_here_can_do_is_refused_by_name(given: dict[str, Any], text: str) -> None:
    module, tensors = plain()
    with pytest.raises(anyattn.Unsupported, match=text):
        module(*tensors, **given)


@pytest.mark.parametrize("place", ["quantization", "fp8"])
def test_attention_in_fp8_is_refused(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    module, tensors = plain()
    recipe = types.SimpleNamespace(fp8_dpa=False, fp8_mha=True)
    on = True
    manager = types.SimpleNamespace(is_fp8_enabled=lambda: on, get_fp8_recipe=lambda: recipe)
    there = types.ModuleType(f"transformer_engine.pytorch.{place}")
    there.FP8GlobalStateManager = manager  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, there.__name__, there)
    with pytest.raises(anyattn.Unsupported, match="fp8_mha=True of the FP8 recipe"):
        module(*tensors)
    recipe.fp8_mha = False
    module(*tensors)  # linear layers may be in FP8
    on, recipe.fp8_dpa = False, True
    module(*tensors)


def test_quantised_tensors_are_refused() -> None:
    kind = type("Float8Tensor", (Tensor,), {"__module__": "transformer_engine.pytorch.tensor"})
    module, (q, k, v) = plain()
    with pytest.raises(anyattn.Unsupported, match=r"key_layer is a Float8Tensor: pass key_layer.dequantize\(\)"):
        module(q, k.as_subclass(kind), v)


MISTAKES: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ({}, {"num_splits": -1}, anyattn.InvalidArgument, "num_splits must be an int >= 0"),
    ({}, {"num_splits": 2.0}, anyattn.InvalidArgument, "num_splits must be an int >= 0"),
    ({"attn_mask_type": "causal_top"}, {}, anyattn.InvalidArgument, "attn_mask_type must be one of no_mask"),
    ({"qkv_format": "bhsd"}, {}, anyattn.InvalidArgument, "qkv_format must be one of sbhd, bshd, thd"),
    ({"softmax_type": "zero"}, {}, anyattn.InvalidArgument, "softmax_type must be one of"),
    ({"attention_type": "both"}, {}, anyattn.InvalidArgument, "attention_type must be one of"),
    ({"cp_comm_type": "ring"}, {}, anyattn.InvalidArgument, "cp_comm_type must be one of p2p"),
    ({"softcap": -1.0}, {}, anyattn.InvalidArgument, "softcap must be finite and >= 0"),
    ({}, {"softcap": float("inf")}, anyattn.InvalidArgument, "softcap must be finite"),
    ({"window_size": (-2, 0)}, {}, anyattn.InvalidArgument, r"must be \(-1, 0\) or \(left >= 0, 0\)"),
    ({}, {"window_size": 3}, anyattn.InvalidArgument, "must be .left, right., two ints"),
    ({"attn_mask_type": "no_mask"}, {"window_size": (-1, 2)}, anyattn.InvalidArgument, "right >= 0"),
    ({}, {"core_attention_bias_type": "post_scale_bias"}, anyattn.InvalidArgument, "needs core_attention_bias"),
    ({}, {"core_attention_bias": torch.zeros(1)}, anyattn.InvalidArgument, "takes no core_attention_bias"),
    ({}, {"core_attention_bias_type": "bias"}, anyattn.InvalidArgument, "core_attention_bias_type must be one of"),
    ({}, {"alibi_slopes": torch.zeros(2)}, anyattn.InvalidArgument, "alibi_slopes need"),
    (
        {"softcap": 1.0},
        {"core_attention_bias_type": "pre_scale_bias", "core_attention_bias": torch.zeros(1, 1, 6, 6)},
        anyattn.Unsupported, "pre_scale_bias with softcap",
    ),
    ({"attn_mask_type": "padding"}, {}, anyattn.InvalidArgument, "needs cu_seqlens_q or attention_mask"),
    (
        {"attn_mask_type": "padding"}, {"attention_mask": torch.zeros(2, 1, 6, 6, dtype=torch.bool)},
        anyattn.ShapeError, r"must be \(batch, 1, 1, max_seqlen_q\)",
    ),
    (
        {"attn_mask_type": "padding"}, {"attention_mask": torch.zeros(2, 1, 1, 6)}, anyattn.DtypeError,
        "True in padding",
    ),
    (
        {"attn_mask_type": "padding", "attention_type": "cross"},
        {"attention_mask": torch.zeros(2, 1, 1, 6, dtype=torch.bool)}, anyattn.InvalidArgument, "queries', keys'",
    ),
    ({"attn_mask_type": "arbitrary"}, {}, anyattn.InvalidArgument, "'arbitrary' needs attention_mask"),
    (
        {"attn_mask_type": "arbitrary"}, {"attention_mask": torch.zeros(2, 1, 5, 6, dtype=torch.bool)},
        anyattn.ShapeError, r"end in \(6, 6\)",
    ),
    ({}, {"cu_seqlens_q": torch.tensor([0, 6, 12])}, anyattn.InvalidArgument, "attn_mask_type='causal' has none"),
    (
        {"attn_mask_type": "padding"}, {"cu_seqlens_q": torch.tensor([0, 6, 12]), "pad_between_seqs": True,
        "cu_seqlens_kv": torch.tensor([0, 6, 12])}, anyattn.InvalidArgument, "pad_between_seqs=True goes with",
    ),
    ({}, {"thd_attention_policy_dispatch": "best"}, anyattn.InvalidArgument, "auto, grouped"),
    ({}, {"thd_attention_policies": []}, anyattn.InvalidArgument, "go with qkv_format='thd'"),
    ({}, {"qkv_format": "thd"}, anyattn.ShapeError, "3-D tensor"),
    ({}, {"max_seqlen_kv": 5}, anyattn.InvalidArgument, "max_seqlen_kv is 5, and the tensors have 6 rows"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "given", "kind", "text"), MISTAKES, ids=[m[3][:40] for m in MISTAKES])
def test_mistakes_are_named(options: dict[str, Any], given: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        _attend(options, given)


def _attend(options: dict[str, Any], given: dict[str, Any]) -> None:
    module, tensors = plain(**options)
    module(*tensors, **given)


def test_mistakes_in_packed_batches() -> None:
    offsets, padded = torch.tensor([0, 4, 9], dtype=torch.int32), torch.tensor([0, 6, 12], dtype=torch.int32)
    module, tensors, given = packed_call(offsets, padded)
    with pytest.raises(anyattn.InvalidArgument, match="takes padding mask types, got 'causal'"):
        module(*tensors, **given, attn_mask_type="causal")
    with pytest.raises(anyattn.InvalidArgument, match="needs cu_seqlens_q and cu_seqlens_kv"):
        module(*tensors, cu_seqlens_q=offsets)
    with pytest.raises(anyattn.InvalidArgument, match="pad_between_seqs=False says that there is no padding"):
        module(*tensors, **given, pad_between_seqs=False)
    equal = {"cu_seqlens_q_padded": offsets.clone(), "cu_seqlens_kv_padded": offsets.clone()}
    expected = module(*tensors, **(given | equal))
    assert torch.equal(module(*tensors, **(given | equal), pad_between_seqs=False), expected)
    with pytest.raises(anyattn.InvalidArgument, match="pad_between_seqs=True needs cu_seqlens_q_padded"):
        module(*tensors, cu_seqlens_q=offsets, cu_seqlens_kv=offsets, pad_between_seqs=True)
    with pytest.raises(anyattn.DtypeError, match=r"cu_seqlens_kv must be an int32 tensor .* got list"):
        module(*tensors, cu_seqlens_q=offsets, cu_seqlens_kv=[0, 4, 9])
    with pytest.raises(anyattn.DtypeError, match=r"got torch.float32: use cu_seqlens_q_padded.int\(\)"):
        module(*tensors, **(given | {"cu_seqlens_q_padded": padded.float()}))
    with pytest.raises(anyattn.ShapeError, match=r"cu_seqlens_q must be \(sequences \+ 1,\), got shape \(1, 3\)"):
        module(*tensors, **(given | {"cu_seqlens_q": offsets[None]}))
    with pytest.raises(anyattn.PackingError, match="must not decrease"):
        module(*tensors, cu_seqlens_q=padded.flip(0) - 12, cu_seqlens_kv=offsets)
    given |= {"core_attention_bias_type": "post_scale_bias", "core_attention_bias": torch.zeros(1, 2, 4, 4)}
    with pytest.raises(anyattn.ShapeError, match="is for sequences of 4, and the longest has 5 tokens"):
        module(*tensors, **given)
    module.check_offsets = False
    with pytest.raises(anyattn.PackingError, match="needs offsets that are read"):
        module(*tensors, **given, max_seqlen_q=5, max_seqlen_kv=5)


def test_windows_that_are_put_right_are_said() -> None:
    with pytest.warns(UserWarning, match=r"means \(-1, 0\)"):
        causal, tensors = plain(window_size=(-1, -1))
    with pytest.warns(UserWarning, match="no window"):
        full, _ = plain(attn_mask_type="no_mask", window_size=(-1, 0))
    assert (causal.window_size, full.window_size) == ((-1, 0), (-1, -1))
    torch.testing.assert_close(causal(*tensors), plain()[0](*tensors))
    torch.testing.assert_close(full(*tensors), plain(attn_mask_type="no_mask")[0](*tensors))
    torch.testing.assert_close(causal(*tensors, attn_mask_type="no_mask"), full(*tensors))


def test_windows_are_as_the_constructor_makes_them() -> None:
    with pytest.warns(UserWarning, match=r"means \(2, 0\)"):
        module, tensors = plain(window_size=(2, 3))
    assert module.window_size == (2, 0)
    expected = plain(attn_mask_type="no_mask", window_size=(2, 0))[0](*tensors)
    torch.testing.assert_close(module(*tensors, attn_mask_type="no_mask"), expected)


def test_windows_may_be_numpys_integers() -> None:
    numpy = pytest.importorskip("numpy")
    module, tensors = plain(window_size=(numpy.int64(2), 0))
    assert module.window_size == (2, 0)
    assert torch.equal(module(*tensors), plain(window_size=(2, 0))[0](*tensors))


# --- ways to run ---


def test_a_compiled_module() -> None:
    module, (q, k, v) = plain(softmax_type="learnable")
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), module(q, k, v))
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    packed, tensors, given = packed_call(offsets)
    expected = packed(*tensors, **given)
    torch.testing.assert_close(torch.compile(packed, backend="eager")(*tensors, **given), expected)


def test_a_kernel_is_asked_for_as_elsewhere() -> None:
    module, (q, k, v) = plain()
    with anyattn.use("fa2"), pytest.raises(anyattn.NoBackend):
        module(q, k, v)


def test_every_kernel_here_takes_padding_between_sequences() -> None:
    for backend in ("torch", "reference"):
        with anyattn.use(backend):
            case = TeCase(**GAPS, dims=(16, 16))
            batch = te_cases.build(case)
            module = DotProductAttention(**te_cases.constructor(case))
            tensors = [te_cases.pack(batch.leaves[n].float(), case.side(n != "q"), "thd") for n in "qkv"]
            out = module(*tensors, **te_cases.arguments(batch))
            dense = te_cases.unpack(out, case.side(False), "thd").unflatten(-1, (4, 16))
            torch.testing.assert_close(dense.double(), te_cases.answer(batch).out, rtol=1e-4, atol=1e-4)


def test_half_precision_and_autocast() -> None:
    module, (q, k, v) = plain(return_max_logit=True)
    expected, largest = module(q, k, v)
    out, half = module(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert (out.dtype, half.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(half, largest, rtol=0.02, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(q, k, v)[0].dtype == torch.bfloat16


def test_the_largest_logit_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from anyattn.integrations import _te_max_logit

    monkeypatch.setattr(_te_max_logit, "SCORES", 50)
    for base in (PADDED, GAPS, PACKED):
        judge(case := TeCase(**base, max_logit=True, window=(2, 0)), run(case))
    judge(case := TeCase(max_logit=True, bias="post_scale_bias", bias_shape="bhss", mask="arbitrary"), run(case))


def test_a_strategy_by_its_name_elsewhere() -> None:
    module, _ = plain()
    theirs = types.SimpleNamespace(name="NO_LOAD_BALANCE")
    module.set_context_parallel_group(None, None, None, "all_gather", theirs)
    assert module.load_balancing_strategy is CPLoadBalancingStrategy.NO_LOAD_BALANCE
    with pytest.raises(anyattn.ContextError, match="DUAL_CHUNK_SWAP, NO_LOAD_BALANCE"):
        module.set_context_parallel_group(None, None, None, load_balancing_strategy="zigzag")


@pytest.mark.parametrize("kind", ["padding", "padding_causal", "padding_causal_bottom_right"])
def test_queries_and_keys_of_equal_lengths_in_entries_of_other_sizes(kind: str) -> None:
    """Whether lengths are equal is the batch's matter, and must not make a call fail."""
    module, _ = plain(attn_mask_type=kind, attention_type="cross")
    q, keys = torch.randn(2, 5, 2, 8), torch.randn(2, 3, 2, 8)
    found = []
    for lengths in ((3, 2), (3, 1)):
        of_keys = te_cases.offsets(lengths)
        found.append(module(q, keys, keys, cu_seqlens_q=te_cases.offsets((3, 2)), cu_seqlens_kv=of_keys))
    assert torch.equal(found[0][0], found[1][0])  # the first entry is the same in both
    without = {"padding": "no_mask"}.get(kind, kind.removeprefix("padding_"))
    alone = module(q[1:, :2], keys[1:, :2], keys[1:, :2], attn_mask_type=without)
    torch.testing.assert_close(found[0][1, :2], alone[0])
    assert not found[0][1, 2:].any()


def hole(rows: int = 6) -> Tensor:
    """A padding mask of two entries, one with padding amid its tokens."""
    mask = torch.zeros(2, 1, 1, rows, dtype=torch.bool)
    mask[0, ..., 2] = True
    return mask


REFUSED_HOLES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cross": ({"attention_type": "cross"}, {"attention_mask": (hole(), hole())}),
    "cross, in keys": ({"attention_type": "cross"}, {"attention_mask": (torch.zeros_like(hole()), hole())}),
    "bias": (
        {},
        {
            "attention_mask": hole(),
            "core_attention_bias_type": "post_scale_bias",
            "core_attention_bias": torch.zeros(1, 1, 6, 6),
        },
    ),
    "max_logit": ({"return_max_logit": True}, {"attention_mask": hole()}),
}


@pytest.mark.parametrize("name", REFUSED_HOLES)
def test_padding_amid_tokens_goes_with_self_attention_alone(name: str) -> None:
    made, called = REFUSED_HOLES[name]
    module, tensors = plain(attn_mask_type="padding", **made)
    with pytest.raises(anyattn.PackingError, match="attn_mask_type='arbitrary'"):
        module(*tensors, **called)
