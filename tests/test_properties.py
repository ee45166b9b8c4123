"""Random problems agree with the oracle, or are refused with a reason."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import anyattn
import cases
import oracle
from test_conformance import check, run

SIZES = st.integers(0, 9)


@st.composite
def problems(draw: st.DrawFn) -> cases.Problem:
    """Anything that the signature allows, mistakes included."""
    kernel = draw(st.sampled_from(["auto", "torch", "reference", ("torch", "reference")]))
    dtype = cases.DTYPES[draw(st.sampled_from(sorted(cases.DTYPES)))]
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    dim, dim_v = draw(st.integers(5, 16)), draw(st.integers(5, 16))
    layout = draw(st.sampled_from(["bshd", "sbhd", "bhsd", "thd"]))
    packed = layout == "thd" or draw(st.booleans())
    batch = 1 if layout == "thd" else draw(st.integers(0, 3))
    arguments: dict[str, Any] = {"backend": kernel, "layout": layout, "return_lse": draw(st.booleans())}
    same = draw(st.booleans())
    if packed:
        count = draw(st.integers(0, 4)) if layout == "thd" else batch
        arguments["packing"], seq_q, runs_q = _side(draw, layout, count)
        seq_k, runs_k = seq_q, runs_q
        if not same:
            arguments["packing_kv"], seq_k, runs_k = _side(draw, layout, count)
        pairs = zip(runs_q, runs_k, strict=True)
        spans = [oracle.Span(e, q, n, k, m) for (e, q, n), (_, k, m) in pairs]
    else:
        seq_q = draw(SIZES)
        seq_k = seq_q if same else draw(SIZES)
        spans = oracle.dense_spans(batch, seq_q, seq_k)
    terms = oracle.Terms(
        draw(st.sampled_from([None, False, True, "top_left"])),
        draw(st.none() | st.tuples(st.none() | st.integers(0, 5), st.none() | st.integers(0, 5))),
        draw(st.none() | st.floats(0.1, 2.0)),
        draw(st.none() | st.floats(0.5, 5.0)),
    )
    arguments |= {"causal": terms.causal, "window": terms.window, "scale": terms.scale, "softcap": terms.softcap}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    if draw(st.booleans()):
        arguments["sink"] = tensor(heads, dtype=draw(st.sampled_from([torch.float32, dtype]))).requires_grad_()
    if draw(st.integers(0, 3)) == 0:
        arguments["alibi_slopes"] = tensor(
            *draw(st.sampled_from([(heads,), (len(spans), heads)])), dtype=torch.float32
        ).abs()
    full = (batch, heads, seq_q, seq_k)
    mask = None
    if draw(st.integers(0, 3)) == 0:
        arguments["bias"] = tensor(*(n if draw(st.booleans()) else 1 for n in full)).requires_grad_(draw(st.booleans()))
    if draw(st.integers(0, 3)) == 0:
        mask = arguments["mask"] = tensor(*(n if draw(st.booleans()) else 1 for n in full)) > -0.7
    q, k, v = (
        tensor(batch, seq_q, heads, dim),
        tensor(batch, seq_k, kv_heads, dim),
        tensor(batch, seq_k, kv_heads, dim_v),
    )
    leaves = {n: cases.from_bshd(x, layout).requires_grad_() for n, x in (("q", q), ("k", k), ("v", v))}
    problem = cases.Problem(
        **leaves, arguments=arguments, spans=spans, terms=terms, layout=layout, dtype=dtype, mask=mask
    )
    problem.dout = tensor(batch, seq_q, heads, dim_v)
    if arguments["return_lse"]:
        problem.dlse = tensor(batch, heads, seq_q, dtype=torch.float32)
    problem.leaves = leaves | {
        n: arguments[n] for n in ("sink", "bias") if n in arguments and arguments[n].requires_grad
    }
    return problem


Runs = list[tuple[int, int, int]]


def _side(draw: st.DrawFn, layout: str, count: int) -> tuple[anyattn.Packing, int, Runs]:
    """(packing, rows or seq, (entry, start, length) per sequence) of queries or keys."""
    lengths = draw(st.lists(st.integers(0, 7), min_size=count, max_size=count))
    cu = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)
    if layout == "thd":
        starts, row = [], draw(st.integers(0, 2))
        for n in lengths:
            starts.append(row)
            row += n + draw(st.integers(0, 2))
        packing = anyattn.Packing(cu, torch.tensor([*starts, row], dtype=torch.int32))
        return packing, row + draw(st.integers(0, 2)), [(0, s, n) for s, n in zip(starts, lengths, strict=True)]
    seq = max(lengths, default=0) + draw(st.integers(0, 2))
    if draw(st.booleans()):
        return anyattn.Packing(cu), seq, [(i, 0, n) for i, n in enumerate(lengths)]
    starts = [draw(st.integers(0, seq - n)) for n in lengths]
    mask = torch.zeros(count, seq, dtype=torch.bool)
    for i, (s, n) in enumerate(zip(starts, lengths, strict=True)):
        mask[i, s : s + n] = True
    places = zip(starts, lengths, strict=True)
    return anyattn.Packing.from_mask(mask), seq, [(i, s, n) for i, (s, n) in enumerate(places)]


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(problems())
def test_random_problems_agree_with_the_oracle_or_are_refused_with_a_reason(problem: cases.Problem) -> None:
    refusal: anyattn.AnyattnError | None = None
    try:
        got = run(problem)
    except (anyattn.NoBackend, anyattn.InvalidArgument) as error:
        refusal = error
    if refusal is None:
        check(problem, *got)
    elif isinstance(refusal, anyattn.NoBackend):
        assert refusal.explanation.chosen is None
        assert all(refusal.explanation.rejected.values())
        assert problem.arguments["backend"] == "torch", "the reference takes everything"
    else:
        assert problem.layout == "thd", refusal
        assert {"bias", "mask"} & set(problem.arguments), refusal
