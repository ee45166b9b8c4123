"""What one call leaves behind must not change another: caches, refilled packings, modes, threads, compiled regions."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import anyattn
import cases
from anyattn import Packing, _select, attention
from doubles import pretend


def i32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def compiled(function: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("scale", [-0.5, 0.0])
@pytest.mark.parametrize("packed", [False, True])
def test_a_scale_of_zero_or_below(scale: float, packed: bool) -> None:
    """Kernels that mask before they scale would give NaN: only those that do not are chosen."""
    q, k, v = torch.randn(3, 6, 2, 4).unbind()
    options: dict[str, Any] = {"packing": Packing.from_lengths([2, 4])} if packed else {}
    if not packed:
        q, k, v = q[None], k[None], v[None]
    out = attention(q, k, v, scale=scale, causal=True, **options)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out, attention(q, k, v, scale=scale, causal=True, backend="reference", **options))


@pytest.mark.parametrize("compile_it", [False, True])
def test_unknown_starts_mean_the_first_rows_of_each_entry(compile_it: bool) -> None:
    x = torch.randn(2, 4, 2, 8)
    call = lambda packing: attention(x, x, x, causal=True, packing=packing)  # noqa: E731
    run = compiled(call) if compile_it else call
    expected = call(Packing.from_lengths([3, 3]))
    for packing in (
        Packing.from_lengths([3, 3], max_rows=8, max_seqlen=4),
        Packing(i32(0, 3, 6), max_seqlen=4, rows=8, check=False),
        Packing.from_lengths([3, 3], max_rows=9),
    ):
        torch.testing.assert_close(run(packing), expected)


@pytest.mark.parametrize(
    ("backend", "seq", "full", "padded"),
    [
        ("fa4", 8, Packing(i32(0, 8, 16), i32(0, 12, 24)), Packing(i32(0, 8, 13), i32(0, 12, 24))),
        ("varlen", 12, Packing.from_lengths([8, 4, 8, 4]), Packing.from_lengths([8, 8, 8, 0])),
    ],
)
def test_a_batch_without_padding_says_nothing_of_the_next(
    backend: str, seq: int, full: Packing, padded: Packing
) -> None:
    x = torch.randn(full.num_sequences, seq, 2, 64, dtype=torch.bfloat16)
    with pretend("sm90", fa4="4.0.0b36"):
        attention(x, x, x, packing=full, backend=backend)
        out = attention(x, x, x, packing=padded, backend=backend)
    for entry, length in enumerate(padded.lengths.tolist()):
        assert not out[entry, length:].any()


def test_packing_kv_alone_is_an_error_after_any_call() -> None:
    x = torch.randn(2, 6, 2, 8)
    attention(x, x, x)
    with pytest.raises(anyattn.PackingError, match="packing_kv= needs packing="):
        attention(x, x, x, packing_kv=Packing.from_lengths([2, 3]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_dropout_under_compile_and_checkpointing(backend: str) -> None:
    """The recomputation drops what forward dropped."""
    x, weight = torch.randn(2, 8, 2, 8), torch.randn(2, 8, 2, 8)
    inner = lambda q: attention(q * 1.0, q * 1.0, q * 1.0, dropout=0.5).sin()  # noqa: E731
    gradients = []
    for function in (lambda q: checkpoint(inner, q, use_reentrant=False), inner):
        torch._dynamo.reset()
        q = x.clone().requires_grad_()
        torch.manual_seed(1)
        (torch.compile(function, fullgraph=True, backend=backend)(q) * weight).sum().backward()
        gradients.append(q.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "bnsd"},
        {"layout": "BHSD"},
        {"layout": "thd"},
        {"window": (-1, 0)},
        {"window": (1, -1)},
        {"scale": float("nan")},
        {"packing": Packing.from_lengths([2, 3]), "keys": 5},
        {"packing": Packing.from_mask(torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]))},
        {"alibi_slopes": torch.ones(2, requires_grad=True)},
    ],
    ids=lambda o: ",".join(f"{n}={v}"[:30] for n, v in o.items()),
)
def test_compiled_mistakes_are_named_as_eager_ones(options: dict[str, Any]) -> None:
    q = torch.randn(2, 8, 2, 8, requires_grad=True)
    k = torch.randn(2, options.pop("keys", 8), 2, 8)
    call = lambda q, k: attention(q, k, k, **options)  # noqa: E731
    with pytest.raises(anyattn.InvalidArgument) as eager:
        call(q, k)
    with pytest.raises(anyattn.InvalidArgument) as traced:
        compiled(call)(q, k)
    assert str(traced.value) == str(eager.value)


def test_a_loose_max_seqlen_is_taken_under_compile_too() -> None:
    x = torch.randn(2, 8, 2, 8)
    packing = Packing(i32(0, 3, 8), max_seqlen=64)
    call = lambda x: attention(x, x, x, packing=packing)  # noqa: E731
    torch.testing.assert_close(compiled(call)(x), call(x))


class TestRefilling:
    def test_offsets_are_the_packing_s_own(self) -> None:
        offsets = i32(0, 5, 10)
        packing = Packing(offsets, max_seqlen=8, rows=16)
        packing.copy_(Packing.from_lengths([3, 5], pad_to_multiple_of=8))
        assert packing.lengths.tolist() == [3, 5]
        assert offsets.tolist() == [0, 5, 10]
        offsets.zero_()
        assert packing.cu_seqlens.tolist() == [0, 3, 8]

    def test_entries_follow(self) -> None:
        x = torch.randn(2, 4, 2, 8)
        packing, other = Packing(i32(0, 3, 6), i32(0, 4, 8), max_seqlen=4), Packing(i32(0, 2, 6), i32(0, 2, 8))
        packing.copy_(other)
        expected = attention(x, x, x, packing=Packing.from_lengths([2, 4]))
        torch.testing.assert_close(attention(x, x, x, packing=packing), expected)

    def test_what_does_not_fit_changes_nothing(self) -> None:
        x = torch.randn(2, 8, 2, 8)
        packing = Packing(i32(0, 8, 16), i32(0, 12, 24))
        before = attention(x, x, x, packing=packing)
        with pytest.raises(anyattn.PackingError, match="full entries of 8 rows"):
            packing.copy_(Packing(i32(0, 8, 13), i32(0, 12, 24)))
        assert packing.lengths.tolist() == [8, 8]
        assert torch.equal(attention(x, x, x, packing=packing), before)


@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode_first_and_training_after(made_inside: bool) -> None:
    x = torch.randn(2, 5, 2, 8)
    packing = Packing.from_lengths([3, 4])
    with torch.inference_mode():
        if made_inside:
            packing = Packing.from_lengths([3, 4])
        attention(x, x, x, packing=packing)
    y = x.clone().requires_grad_()
    attention(y, y, y, packing=packing).sum().backward()
    assert y.grad is not None


def test_sanitize_with_more_query_rows_than_key_rows() -> None:
    packing = Packing.from_lengths([3, 4], pad_to_multiple_of=4, sanitize=True)
    q, k = torch.randn(10, 2, 8), torch.randn(8, 2, 8)
    out = attention(q, k, k, packing=packing)
    assert out.shape == q.shape
    assert not out[8:].any()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_default_device_moves_nothing(backend: str) -> None:
    with torch.device("meta"):
        lengths = Packing.from_lengths([1, 4], pad_to_multiple_of=4, device="cpu")
        mask = Packing.from_mask(torch.ones(1, 5, dtype=torch.bool, device="cpu"))
        positions = Packing.from_position_ids(torch.tensor([0, 1, 0], device="cpu"))
        x = torch.randn(8, 2, 8, device="cpu", requires_grad=True)
        out = attention(x, x, x, packing=lengths, causal=True, window=(2, 0), backend=backend)
        out.sum().backward()
    assert {p.device.type for p in (lengths, mask, positions)} == {"cpu"}
    assert out.device.type == "cpu"


@pytest.mark.parametrize("layout", ["bshd", "sbhd", "bhsd"])
def test_explain_takes_a_packing_with_holes(layout: str) -> None:
    x = {"bshd": torch.randn(2, 4, 3, 8), "sbhd": torch.randn(4, 2, 3, 8), "bhsd": torch.randn(2, 3, 4, 8)}[layout]
    packing = Packing.from_mask(torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]))
    assert anyattn.explain(x, x, x, layout=layout, packing=packing).chosen == "torch"
    assert attention(x, x, x, layout=layout, packing=packing).shape == x.shape


def test_a_compiled_backward_replays_forward_s_choice() -> None:
    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    out = compiled(lambda q: attention(q * 1.0, q, q))(q)
    with anyattn.use("fa4"):
        out.sum().backward()
    assert q.grad is not None


def test_use_in_two_threads_leaves_no_preference_behind() -> None:
    from anyattn import _select

    inside, leave = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]

    def work(number: int) -> None:
        with anyattn.use("reference"):
            inside[number].set()
            leave[number].wait()

    threads = [threading.Thread(target=work, args=(n,)) for n in (0, 1)]
    for number, thread in enumerate(threads):
        thread.start()
        inside[number].wait()
    for number, thread in enumerate(threads):
        leave[number].set()
        thread.join()
    assert _select.traced_preference is None


def test_positions_in_eight_bits_do_not_wrap() -> None:
    ids = torch.cat([torch.arange(256), torch.arange(4)]).to(torch.uint8)
    assert Packing.from_position_ids(ids).lengths.tolist() == [256, 4]


def test_a_refusal_is_of_these_numbers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel's own check speaks of one call: another rate, shape or window is asked again."""
    from anyattn._errors import Refused

    backend = cases.BACKENDS.get("torch")
    real = backend.forward

    def picky(call: Any) -> Any:
        if call.q.shape[1] == 7:
            raise Refused("seven is too much")
        return real(call)

    monkeypatch.setattr(backend, "forward", picky)
    seven, six = torch.randn(1, 7, 2, 8), torch.randn(1, 6, 2, 8)
    with pytest.raises(anyattn.NoBackend, match="seven is too much"):
        anyattn.attention(seven, seven, seven, backend="torch")
    assert anyattn.attention(seven, seven, seven).shape == seven.shape  # another kernel's
    assert anyattn.explain(seven, seven, seven).chosen == "reference"
    anyattn.attention(six, six, six, backend="torch")
    _select.forget_world()


def test_a_passing_refusal_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    from anyattn._errors import Refused

    backend = cases.BACKENDS.get("torch")
    real, moods = backend.forward, [True]

    def moody(call: Any) -> Any:
        if moods:
            raise Refused("not now", lasting=False)
        return real(call)

    monkeypatch.setattr(backend, "forward", moody)
    q = torch.randn(1, 5, 2, 8)
    for _ in range(2):
        with pytest.raises(anyattn.NoBackend, match="not now"):
            anyattn.attention(q, q, q, backend="torch")
    moods.clear()
    anyattn.attention(q, q, q, backend="torch")


def test_a_compiled_backward_runs_the_kernel_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever has changed about the choice since: dropout's state is one kernel's own."""
    ran: list[str] = []
    for name in ("torch", "reference"):
        backend = cases.BACKENDS.get(name)
        for way in ("forward", "backward"):
            real = getattr(backend, way)
            monkeypatch.setattr(
                backend, way, lambda *a, name=name, way=way, real=real: (ran.append(f"{name} {way}"), real(*a))[1]
            )
    q = torch.randn(1, 5, 2, 8, requires_grad=True)
    out = torch.compile(lambda q: anyattn.attention(q, q, q, dropout=0.5), backend="aot_eager", fullgraph=True)(q)
    first = ran[-1].split()[0]
    monkeypatch.setattr(cases.BACKENDS.get(first), "CAPABILITIES", ())
    _select.forget_world()
    _select.choose.cache_clear()
    out.sum().backward()
    assert ran == [f"{first} forward", f"{first} backward"]
    monkeypatch.undo()
    _select.forget_world()
    _select.choose.cache_clear()


def test_create_graph_through_a_checkpoint_names_what_is_missing() -> None:
    from torch.utils.checkpoint import checkpoint

    q = torch.randn(1, 5, 2, 8, requires_grad=True)
    out = checkpoint(lambda q: anyattn.attention(q, q, q), q, use_reentrant=False)
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(anyattn.Unsupported, match="double backward"):
        grad.sum().backward()


def test_a_seed_is_drawn_on_the_host_whatever_the_default_device() -> None:
    graphs: list[Any] = []

    def keep(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    q = torch.randn(1, 5, 2, 8)
    with torch.device("meta"):
        torch.compile(lambda q: anyattn.attention(q, q, q, dropout=0.5), backend=keep, fullgraph=True)(q)
    (node,) = [n for n in graphs[0].graph.nodes if "randint" in str(n.target)]
    assert str(node.kwargs["device"]) == "cpu"


def test_rows_without_any_sequence_reach_no_kernel() -> None:
    packing = anyattn.Packing(torch.tensor([0], dtype=torch.int32), max_seqlen=5)
    q = torch.randn(4, 2, 8, requires_grad=True)
    out = anyattn.attention(q, q, q, packing=packing)
    out.sum().backward()
    assert not out.any()
    assert q.grad is not None
    assert not q.grad.any()
