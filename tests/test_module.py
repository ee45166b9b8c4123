"""``anyattn.Attention`` equals its parts, whatever the batch looks like."""

import pytest
import torch
from torch import nn

import anyattn

LENGTHS = [3, 0, 7, 1]


def by_hand(layer, x, *, window=None, softcap=None, scale=None, rotary=None, sink=None):
    """One sequence (rows, dim), by dense matrices in float64."""
    heads = [project(x).unflatten(-1, (-1, layer.head_dim)) for project in (layer.q_proj, layer.k_proj, layer.v_proj)]
    q, k, v = heads
    if rotary is not None:
        q, k = rotary(q, k, torch.arange(len(x)))
    k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], 1) for y in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (layer.head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(len(x))[:, None] - torch.arange(len(x))
    visible = distance >= 0
    if window is not None:
        visible &= distance <= window
    scores = scores.masked_fill(~visible, -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, sink[:, None, None].expand(-1, len(x), 1)], -1)
    weights = scores.softmax(-1)[..., : len(x)]
    return layer.o_proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))


def turn(q, k, position_ids):
    """RoPE with one frequency for each pair of dims."""
    angle = position_ids[:, None, None] * 0.5 ** torch.arange(q.shape[-1] // 2)

    def turned(x):
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    return turned(q), turned(k)


def make(**options):
    layer = anyattn.Attention(24, 4, 2, head_dim=8, dtype=torch.float64, **options)
    if layer.sink is not None:
        nn.init.normal_(layer.sink)
    return layer


FEATURES = {
    "plain": {},
    "window": {"window": (2, 0)},
    "softcap, scale": {"softcap": 3.0, "scale": 0.7},
    "sink": {"sink": True},
    "rotary": {"rotary": turn},
    "bias": {"bias": True},
}


def expected(layer, x, options):
    given = {name: options[name] for name in ("softcap", "scale", "rotary") if name in options}
    window = options["window"][0] if "window" in options else None
    return by_hand(layer, x, window=window, sink=layer.sink, **given)


def documents(x):
    return x.split(LENGTHS)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("kind", ["dense", "packed", "plan"])
def test_it_equals_dense_matrices(name, kind):
    options = FEATURES[name]
    layer = make(**options)
    packing = anyattn.Packing.from_lengths(LENGTHS)
    x = torch.randn(11, 24, dtype=torch.float64)
    if kind == "dense":
        batch = x[:10].view(2, 5, 24)
        got, want = layer(batch), torch.stack([expected(layer, y, options) for y in batch])
    elif kind == "packed":
        got, want = layer(x, packing=packing), torch.cat([expected(layer, y, options) for y in documents(x)])
    else:
        plan = anyattn.ContextParallel((1, 0)).plan(packing, window=options.get("window"))
        got = plan.unshard(layer(plan.shard(x), plan=plan))
        want = torch.cat([expected(layer, y, options) for y in documents(x)])
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(got)
    grads = [torch.autograd.grad((y * weights).sum(), list(layer.parameters())) for y in (got, want)]
    torch.testing.assert_close(*grads)


def test_padding_between_documents_and_after_them():
    layer = make(rotary=turn)
    packing = anyattn.Packing.from_lengths(LENGTHS, pad_to_multiple_of=4)
    x = torch.randn(packing.rows + 3, 24, dtype=torch.float64)
    got = packing.pack(layer(x, packing=packing)[: packing.rows])
    compact = packing.pack(x[: packing.rows])
    torch.testing.assert_close(got, layer(compact, packing=anyattn.Packing.from_lengths(LENGTHS)))


def test_entries_with_padding():
    layer = make()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    got = layer(x, packing=anyattn.Packing.from_lengths([3, 5]))
    torch.testing.assert_close(got[0, :3], expected(layer, x[0, :3], {}))
    assert (got[0, 3:] == 0).all()


def test_positions_of_the_caller_win():
    layer = make(rotary=turn)
    x = torch.randn(1, 5, 24, dtype=torch.float64)
    shifted = layer(x, position_ids=torch.arange(5) + 100)
    torch.testing.assert_close(shifted, layer(x))  # relative
    assert not torch.allclose(layer(x, position_ids=2 * torch.arange(5)), layer(x))


def test_dropout_is_of_training_alone():
    layer = make(dropout=0.5)
    x = torch.randn(1, 9, 24, dtype=torch.float64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_a_plan_for_another_mask_is_an_error():
    layer = make(window=(2, 0))
    plan = anyattn.ContextParallel((1, 0)).plan(anyattn.Packing.from_lengths(LENGTHS))
    x = torch.randn(plan.rows, 24, dtype=torch.float64)
    with pytest.raises(anyattn.ContextError, match="with_mask"):
        layer(x, plan=plan)
    layer(x, plan=plan.with_mask(causal=True, window=(2, 0)))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [((24, 4, 3), "multiple of num_kv_heads, got 4 and 3"), ((24, 5), "multiple of num_heads, got 24 and 5")],
)
def test_heads_that_do_not_divide(arguments, text):
    with pytest.raises(anyattn.ShapeError, match=text):
        anyattn.Attention(*arguments)


def test_defaults_and_names():
    layer = anyattn.Attention(24, 4, device="meta", dtype=torch.bfloat16)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {f"{name}_proj.weight": (24, 24) for name in "qkvo"}
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}


def test_shapes_that_packing_does_not_go_with_are_named() -> None:
    layer = anyattn.Attention(16, num_heads=2)
    packing = anyattn.Packing.from_lengths([3, 4])
    for x, given in ((torch.randn(1, 7, 16), packing), (torch.randn(7, 16), None), (torch.randn(1, 1, 7, 16), None)):
        with pytest.raises(anyattn.ShapeError, match=r"x must be \(batch, seq, dim\), .* or \(rows, dim\)"):
            layer(x, packing=given)


def test_rotary_gets_the_positions_of_entries_padded_on_the_left() -> None:
    packing = anyattn.Packing.from_mask(torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]))
    seen: list[torch.Tensor] = []

    def rotary(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(positions)
        return q, k

    anyattn.Attention(16, num_heads=2, rotary=rotary)(torch.randn(2, 5, 16), packing=packing)
    assert seen[0].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
