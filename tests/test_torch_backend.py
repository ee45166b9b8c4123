"""torch's kernels on GPUs, over their doubles: what no generated case reaches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import _registry
from torch.utils._python_dispatch import TorchDispatchMode

import anyattn
import cases
import oracle
from anyattn import _select
from anyattn._call import Call, Saved, Spec
from anyattn._environment import Probe, flash_override, torch_version
from anyattn._errors import Refused, Unsupported
from anyattn.backends import _aten_cudnn, _aten_efficient, varlen
from anyattn.backends import torch as torch_backend
from cases import Case, Target
from doubles import pretend
from doubles.aten_flash import Override

KERNELS = ("torch:cudnn", "torch:flash", "torch:efficient", "varlen")
HALF = torch.bfloat16


@pytest.fixture
def hopper() -> Iterator[None]:
    """A machine with such a GPU, and torch alone."""
    with pretend("sm90"):
        yield


def double(name: str) -> Target:
    """A kernel of torch."""
    backend, _, kernel = name.partition(":")
    capability = next(c for c in cases.BACKENDS.get(backend).CAPABILITIES if c.kernel == kernel)
    return Target("cpu", name, capability)


def against_the_oracle(
    q: Tensor, k: Tensor, v: Tensor, spans: list[oracle.Span], terms: oracle.Terms, **a: Any
) -> None:
    """Forward and backward of one call, in layout "bshd" or "thd"."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = anyattn.attention(*leaves, causal=terms.causal, window=terms.window, **a)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, dout)
    whole = (lambda x: x[None]) if q.ndim == 3 else (lambda x: x)
    expected = oracle.Expected(
        q.dtype, dict(zip("qkv", map(whole, leaves), strict=True)), spans, terms, whole(dout), None, None, None
    )
    oracle.check("out", whole(out), expected)
    for name, grad in zip("qkv", grads, strict=True):
        oracle.check(f"d{name}", whole(grad), expected)


# --- packed flash --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lengths", "room"), [([1, 1, 1], 1), ([1, 0, 1], 1), ([1, 1, 0], 4)])
def test_sequences_of_one_query_with_fewer_kv_heads(hopper: None, lengths: list[int], room: int) -> None:
    """With max_q of 1 the op would take each row of q as a sequence."""
    packing = anyattn.Packing.from_lengths(lengths, room)
    assert packing.max_seqlen == 1
    q, k = (torch.randn(packing.rows, h, 32, dtype=HALF) for h in (4, 2))
    starts = packing.cu_seqlens_padded if packing.cu_seqlens_padded is not None else packing.cu_seqlens
    spans = [oracle.Span(0, s, n, s, n) for s, n in zip(starts.tolist(), lengths, strict=False)]
    against_the_oracle(q, k, k, spans, oracle.Terms(causal=True), packing=packing, backend="varlen")


@pytest.mark.parametrize("right", [None, 7, 9, 12, 1 << 40])
@pytest.mark.parametrize("left", [None, 2, 1 << 40])
def test_a_window_that_reaches_past_all_keys(hopper: None, left: int | None, right: int | None) -> None:
    """A right side of at least max_k would count as unbounded, and an unbounded one as max_k: neither may be."""
    lengths_q, lengths_k = [16, 3], [7, 5]
    packing, packing_kv = (anyattn.Packing.from_lengths(n) for n in (lengths_q, lengths_k))
    q, k = torch.randn(19, 2, 32, dtype=HALF), torch.randn(12, 2, 32, dtype=HALF)
    spans = [oracle.Span(0, 0, 16, 0, 7), oracle.Span(0, 16, 3, 7, 5)]
    terms = oracle.Terms(window=(left, right))
    against_the_oracle(q, k, k, spans, terms, packing=packing, packing_kv=packing_kv, backend="varlen")


def test_a_dense_window_that_reaches_past_all_keys_is_refused(hopper: None) -> None:
    q, k = torch.randn(1, 9, 2, 32, dtype=HALF), torch.randn(1, 4, 2, 32, dtype=HALF)
    with pytest.raises(anyattn.NoBackend, match="right=4 of the window reaches past all 4 keys"):
        anyattn.attention(q, k, k, window=(None, 4), backend="torch:flash")
    assert anyattn.attention(q, k, k, window=(None, 3), causal=True, backend="torch:flash").shape == q.shape


# --- what every kernel's own check misses --------------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("cut", [slice(0, 64), slice(1, 65), slice(0, 128, 2)], ids=str)
def test_tensors_that_begin_anywhere(hopper: None, name: str, cut: slice) -> None:
    """Kernels load 16 bytes at a time: rows that begin elsewhere are copied first."""
    form = "thd" if name == "varlen" else "bshd"
    q, k, v = (torch.randn(*((11,) if form == "thd" else (1, 11)), 2, 130, dtype=HALF)[..., cut] for _ in range(3))
    packing = {"packing": anyattn.Packing.from_lengths([11])} if form == "thd" else {}
    against_the_oracle(q, k, v, [oracle.Span(0, 0, 11, 0, 11)], oracle.Terms(causal=True), backend=name, **packing)


@pytest.mark.parametrize("name", KERNELS)
def test_more_sequences_than_a_grid_holds_are_refused(hopper: None, name: str) -> None:
    count = 65536
    q = torch.zeros(count, 2, 1, 8, dtype=HALF)
    packing = {}
    if name == "varlen":
        q, packing = q.flatten(0, 1), {"packing": anyattn.Packing.from_lengths([2] * count)}
    with pytest.raises(anyattn.NoBackend, match=r"65536 sequences, .* more than its grid"):
        anyattn.attention(q, q, q, backend=name, **packing)


@pytest.mark.parametrize(
    ("on", "changes", "more", "what"),
    [
        ("sm86", {"dims": "200"}, {}, "head_dim in backward: needs at most 192, or above 224"),
        ("sm89", {"dims": "256"}, {"dropout": 0.5}, "dropout in backward: needs a head_dim of at most 192"),
        ("sm120", {"dims": "208"}, {}, "head_dim in backward"),
    ],
)
@pytest.mark.parametrize("name", ["torch:flash", "varlen"])
def test_small_gpus_lack_large_head_dims(
    on: str, name: str, changes: dict[str, str], more: dict[str, Any], what: str
) -> None:
    case = Case(double(name), "thd" if name == "varlen" else "bshd", dtype="bfloat16", **changes)
    with pretend(on):
        assert what in str(cases.build(case).explain(**more))
        assert cases.build(replace(case, asks="forward")).explain(**more).chosen, "forward has room"
    with pretend("sm80"):
        assert cases.build(case).explain(**more).chosen


# --- cuDNN ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on", "dims", "takes"),
    [
        ("sm90", "256", True), ("sm100", "128", True), ("sm100", "192/128", True), ("sm100", "192", False),
        ("sm120", "136", False),
    ],
)  # fmt: skip
def test_cudnn_head_dims(on: str, dims: str, takes: bool) -> None:
    with pretend(on):
        explanation = cases.build(Case(double("torch:cudnn"), dtype="bfloat16", dims=dims)).explain()
    assert (explanation.chosen is not None) == takes, explanation


@pytest.mark.parametrize(
    ("version", "flags"),
    [
        (None, ()), (90900, ("cudnn_before_9.10",)), (91002, ("cudnn_9.10",)), (91100, ("cudnn_9.11_to_9.13",)),
        (91302, ("cudnn_9.11_to_9.13",)), (91400, ()), (91900, ()),
    ],
)  # fmt: skip
def test_cudnn_flags(monkeypatch: pytest.MonkeyPatch, version: int | None, flags: tuple[str, ...]) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    assert torch_backend.load() == frozenset(flags)


@pytest.mark.parametrize(
    ("flag", "on", "dims", "more", "what"),
    [
        ("cudnn_before_9.10", "sm90", "136", {}, "cuDNN >= 9.10"),
        ("cudnn_9.10", "sm100", "192/128", {}, "cuDNN >= 9.11 on sm10x"),
        ("cudnn_9.11_to_9.13", "sm90", "64", {"dropout": 0.25}, "cuDNN other than 9.11 to 9.13"),
    ],
)
def test_cudnn_of_every_version(flag: str, on: str, dims: str, more: dict[str, Any], what: str) -> None:
    with pretend(on):
        problem = cases.build(Case(double("torch:cudnn"), dtype="bfloat16", dims=dims)).explain(**more).problem
        for flags in (frozenset[str](), frozenset({flag})):
            world = tuple((n, Probe("2.13.0", flags=flags) if n == "torch" else p) for n, p in _select.world())
            explanation = _select.choose(problem, ("torch:cudnn",), world)
            assert (explanation.chosen is None) == bool(flags)
        assert what in str(explanation)


def test_cudnn_takes_no_single_key(hopper: None) -> None:
    q, k = torch.randn(1, 4, 2, 64, dtype=HALF), torch.randn(1, 1, 2, 64, dtype=HALF)
    assert "a single key" in str(anyattn.explain(q, k, k, backend="torch:cudnn"))
    assert anyattn.explain(q, k.repeat(1, 2, 1, 1), k.repeat(1, 2, 1, 1), backend="torch:cudnn").chosen


def test_cudnn_refuses_dropout_that_it_would_round(hopper: None) -> None:
    q = torch.randn(1, 4, 2, 64, dtype=HALF)
    with pytest.raises(anyattn.NoBackend, match=r"dropout of 0\.1 is rounded to a multiple of 1/16"):
        anyattn.attention(q, q, q, dropout=0.1, backend="torch:cudnn")
    assert anyattn.attention(q, q, q, dropout=0.1, backend=["torch:cudnn", "torch:flash"]).shape == q.shape


# --- efficient -----------------------------------------------------------------------------------------------------


class Launches(TorchDispatchMode):
    """What the efficient op was given."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note, and go on."""
        if func is torch.ops.aten._efficient_attention_forward.default:
            self.keys.append(args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("heads", "kv_heads", "launches"), [(8, 8, 1), (8, 1, 1), (8, 2, 2), (8, 4, 2), (12, 3, 3)])
def test_efficient_shares_keys_among_heads(hopper: None, heads: int, kv_heads: int, launches: int) -> None:
    """No key is copied, and there are as few launches as one stride for heads allows."""
    q, k = torch.randn(2, 9, heads, 16), torch.randn(2, 9, kv_heads, 16)
    with Launches() as seen:
        anyattn.attention(q, k, k, backend="torch:efficient")
    assert len(seen.keys) == launches
    storage = k.untyped_storage().data_ptr()
    assert all(x.untyped_storage().data_ptr() == storage for x in seen.keys)


def test_efficient_asks_for_lse_where_it_would_read_past_the_heads(hopper: None) -> None:
    q, k = torch.randn(2, 1, 48, 16), torch.randn(2, 9, 1, 16)
    out = anyattn.attention(q, k, k, backend="torch:efficient")
    exact = anyattn.attention(q.double(), k.double(), k.double(), backend="reference")
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)


def _dropping(q: Tensor, k: Tensor, **more: Any) -> Call:
    spec = Spec(scale=1.0, softcap=0.0, left=None, right=None, top_left=False, dropout=0.5, deterministic=False,
                need_lse=True)  # fmt: skip
    return Call(q, k, k, spec, "efficient", **more)


@pytest.mark.parametrize(
    ("batch", "heads", "seq", "fits"),
    [(1, 31, 8192, True), (1, 32, 8192, False), (2, 31, 8192, True), (4, 16, 8192, True), (5, 16, 8192, False)],
)
def test_efficient_drops_no_more_scores_than_it_counts(batch: int, heads: int, seq: int, fits: bool) -> None:
    """Beyond, forward and backward would drop other weights."""
    q = torch.empty(batch, seq, heads, 64, device="meta")
    if fits:
        _aten_efficient._check_dropout(_dropping(q, q))
        return
    with pytest.raises(Refused, match=f"dropout over {batch * heads * seq * seq} scores"):
        _aten_efficient._check_dropout(_dropping(q, q))


class _OnCuda:
    """As much of a CUDA tensor as the state of dropout is asked for."""

    is_cuda = True

    def __init__(self, values: list[int]) -> None:
        self.values = torch.tensor(values)

    def cpu(self) -> Tensor:
        """Waits for the device."""
        return self.values

    def __getitem__(self, i: int) -> Tensor:
        return self.values[i]


@pytest.mark.parametrize(
    ("rng", "seed", "capturing", "state"),
    [
        (torch.tensor([5, 8]), None, False, [5, 8]),
        (_OnCuda([5, 8]), None, True, [5, 8]),
        (_OnCuda([5, 8]), None, False, [5, 8]),
        (_OnCuda([9, 9]), torch.tensor([12, 10]), False, [12 ^ 10, 0]),
        (torch.tensor([5, 8]), None, True, None),
    ],
    ids=["eager", "both captured", "forward captured", "compiled", "backward captured"],
)
def test_the_state_of_dropout_is_where_backward_reads_it(
    monkeypatch: pytest.MonkeyPatch, rng: Any, seed: Tensor | None, capturing: bool, state: list[int] | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    q: Any = _OnCuda([])
    call, saved = _dropping(q, q, seed=seed), Saved(q, q, rng)
    if state is None:
        with pytest.raises(Unsupported, match="capture both"):
            _aten_efficient._dropout_state(call, saved)
        return
    assert [int(x) for x in _aten_efficient._dropout_state(call, saved)] == state


@pytest.mark.parametrize(
    ("changes", "more", "what"),
    [
        ({"form": "thd"}, {"dropout": 0.5}, "where its backward drops other weights"),
        ({"heads": "4/2"}, {"dropout": 0.5}, "as many kv heads as heads"),
        ({"form": "bshd_right", "scores": "bias"}, {}, "a batch without padding"),
        ({"form": "bshd_right", "scores": "mask"}, {}, "a batch without padding"),
    ],
)
def test_efficient_limits_are_named(hopper: None, changes: dict[str, str], more: dict[str, Any], what: str) -> None:
    explanation = cases.build(Case(double("torch:efficient"), **changes)).explain(**more)
    assert explanation.chosen is None
    assert what in str(explanation).replace("\n" + " " * 29, " "), explanation


# --- another implementation in the place of torch's ----------------------------------------------------------------


@pytest.fixture
def override(monkeypatch: pytest.MonkeyPatch) -> Iterator[Override]:
    """FlashAttention 3, activated as a user does it; nothing of it stays."""
    monkeypatch.setattr(_registry, "_FLASH_ATTENTION_IMPLS", dict(_registry._FLASH_ATTENTION_IMPLS))
    double = Override("FA3")
    yield double
    _registry.restore_flash_attention_impl(_raise_warn=False)


def test_an_override_is_seen(override: Override) -> None:
    assert flash_override() is None
    override.activate()
    assert flash_override() == "FA3"
    for backend in (torch_backend, varlen):
        probe = backend.probe()
        assert "FA3 is in the place of torch's flash kernels" in probe.note
        assert probe.flags == {"flash_override"}
    _registry.restore_flash_attention_impl()
    assert flash_override() is None
    assert torch_backend.probe() == Probe(torch_version())


@pytest.mark.parametrize("name", ["torch:flash", "varlen"])
def test_under_an_override_flash_stands_aside(hopper: None, override: Override, name: str) -> None:
    problem = cases.build(Case(double(name), "thd" if name == "varlen" else "bshd", dtype="bfloat16"))
    described = problem.explain().problem
    override.activate()
    world = tuple((n, Probe("2.13.0", flags=frozenset({"flash_override"}))) for n, _ in _select.world())
    explanation = _select.choose(described, (name,), world)
    assert explanation.chosen is None
    reasons = str(explanation)
    assert "restore_flash_attention_impl()" in reasons
    assert 'backend="fa3"' in reasons
    others = {str(kernel) for kernel in _select.choose(described, ("torch", "varlen"), world).candidates}
    assert others == ({"torch:cudnn", "torch:efficient"} if name == "torch:flash" else {"torch:efficient"})


@pytest.mark.parametrize("name", ["torch:flash", "varlen"])
def test_an_override_that_comes_after_the_choice(hopper: None, override: Override, name: str) -> None:
    """Nothing runs as something else."""
    problem = cases.build(Case(double(name), "thd" if name == "varlen" else "bshd", dtype="bfloat16"))
    problem.call()
    override.activate()
    with pytest.raises(anyattn.NoBackend, match="FA3 is in the place of torch's flash kernels"):
        problem.call()
    assert override.calls == 0


def test_the_override_double_is_one(hopper: None, override: Override) -> None:
    """Else the tests above would prove nothing: it takes calls, with its own lse for rows without keys."""
    q, k = torch.randn(1, 3, 1, 16, dtype=HALF), torch.randn(1, 1, 1, 16, dtype=HALF)
    op = torch.ops.aten._flash_attention_forward.default
    assert (op(q, k, k, None, None, 3, 1, 0.0, True, False)[1][0, 0, :2] == torch.inf).all()
    override.activate()
    assert (op(q, k, k, None, None, 3, 1, 0.0, True, False)[1][0, 0, :2] == -torch.inf).all()
    with pytest.raises(RuntimeError, match="dropout_p must be 0"):
        op(q, k, k, None, None, 3, 1, 0.5, True, False)
    assert override.calls == 2


def test_cudnn_hides_with_finite_values() -> None:
    """Trouble with -inf is why; each dtype can hold what stands for it."""
    for dtype, value in _aten_cudnn._HIDDEN.items():
        assert torch.tensor(value, dtype=dtype).isfinite()
