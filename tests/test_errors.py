"""Mistakes are named (promise 8): what was given, what is allowed, what to do; before a kernel runs.

The messages are golden: a change of wording is a change of this table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import anyattn
from anyattn import (
    AnyattnError,
    DeviceError,
    DtypeError,
    InvalidArgument,
    Packing,
    PackingError,
    ShapeError,
    UnknownBackend,
    attention,
)
from cases import BACKENDS

q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8)
t = torch.randn(12, 2, 8)
ALL = ", ".join(BACKENDS.ORDER)
HOLES = torch.tensor([[1, 0, 1, 0, 0], [1, 1, 1, 1, 1]])


def cu(*numbers: int) -> Tensor:
    """Offsets."""
    return torch.tensor(numbers, dtype=torch.int32)


def lengths(*numbers: int, **more: Any) -> Packing:
    """A compact packing."""
    return Packing.from_lengths(numbers, **more)


def padded() -> Packing:
    """Three sequences in 12 rows."""
    return Packing.from_lengths([3, 0, 5], pad_to_multiple_of=4)


def bools(*shape: int) -> Tensor:
    """A mask that hides nothing."""
    return torch.ones(shape, dtype=torch.bool)


Mistake = tuple[Callable[[], Any], type[Exception], str]

#: name: (the mistake, its exception, its message)
CALLS: dict[str, Mistake] = {
    "q is a list": (lambda: attention([1.0], k, k), InvalidArgument, "q must be a tensor, got list"),
    "sink is a float": (
        lambda: attention(q, k, k, sink=1.0),
        InvalidArgument,
        "sink must be a tensor or None, got float",
    ),
    "bias is a list": (
        lambda: attention(q, k, k, bias=[0.0]),
        InvalidArgument,
        "bias must be a tensor or None, got list",
    ),
    "mask is a list": (
        lambda: attention(q, k, k, mask=[[True]]),
        InvalidArgument,
        "mask must be a bool tensor, a BlockMask or None, got list",
    ),
    "2-D tensors": (
        lambda: attention(q[0, 0], k[0, 0], k[0, 0]),
        ShapeError,
        "layout 'bshd' needs 4-D tensors, q has shape (4, 8)",
    ),
    "mixed ranks": (
        lambda: attention(q, t, t),
        ShapeError,
        "layout 'bshd' needs 4-D tensors, k has shape (12, 2, 8)",
    ),
    "thd of 4-D tensors": (
        lambda: attention(q, k, k, layout="thd", packing=padded()),
        ShapeError,
        "layout 'thd' needs 3-D tensors, q has shape (2, 5, 4, 8)",
    ),
    "bhsd of 3-D tensors": (
        lambda: attention(t, t, t, layout="bhsd"),
        ShapeError,
        "layout 'bhsd' needs 4-D tensors, q has shape (12, 2, 8)",
    ),
    "batch sizes": (
        lambda: attention(q, k[:1], k[:1]),
        ShapeError,
        "q, k and v must have one batch size, got 2, 1, 1",
    ),
    "key and value lengths": (
        lambda: attention(q, k, k[:, :6]),
        ShapeError,
        "k and v must agree in all but the last dim, got (2, 7, 2, 8) and (2, 6, 2, 8) as 'bshd'",
    ),
    "key and value heads": (
        lambda: attention(q, k, k[:, :, :1]),
        ShapeError,
        "k and v must agree in all but the last dim, got (2, 7, 2, 8) and (2, 7, 1, 8) as 'bshd'",
    ),
    "head dims": (lambda: attention(q, k[..., :4], k), ShapeError, "q and k must have one head_dim, got 8 and 4"),
    "head dim 0": (
        lambda: attention(q[..., :0], k[..., :0], k),
        ShapeError,
        "head_dim must be at least 1, got 0 for q and k, 8 for v",
    ),
    "heads do not divide": (
        lambda: attention(q[:, :, :3], k, k),
        ShapeError,
        "num_heads must be a multiple of num_kv_heads, got 3 and 2",
    ),
    "no kv heads": (
        lambda: attention(q, k[:, :, :0], k[:, :, :0]),
        ShapeError,
        "num_heads must be a multiple of num_kv_heads, got 4 and 0",
    ),
    "mixed dtypes": (
        lambda: attention(q, k.half(), k),
        DtypeError,
        "q, k and v must have one dtype, got torch.float32, torch.float16, torch.float32: cast them",
    ),
    "integers": (
        lambda: attention(q.int(), k.int(), k.int()),
        DtypeError,
        "q, k and v must be one of torch.float16, torch.bfloat16, torch.float32, torch.float64, got torch.int32",
    ),
    "mixed devices": (
        lambda: attention(q, k.to("meta"), k.to("meta")),
        DeviceError,
        "all tensors of a call must be on one device, got cpu, meta: move them with .to(q.device)",
    ),
    "sink elsewhere": (
        lambda: attention(q, k, k, sink=torch.zeros(4, device="meta")),
        DeviceError,
        "all tensors of a call must be on one device, got cpu, meta: move them with .to(q.device)",
    ),
    "unknown layout": (
        lambda: attention(q, k, k, layout="bsdh"),
        InvalidArgument,
        "unknown layout 'bsdh'; allowed: bshd, sbhd, bhsd, thd",
    ),
    "unknown backend": (
        lambda: attention(q, k, k, backend="fa9"),
        UnknownBackend,
        f"unknown backend 'fa9'; allowed: auto, {ALL}",
    ),
    "unknown backend in a sequence": (
        lambda: attention(q, k, k, backend=["reference", "fa9"]),
        UnknownBackend,
        f"unknown backend 'fa9'; allowed: auto, {ALL}",
    ),
    "unknown kernel": (
        lambda: attention(q, k, k, backend="torch:quick"),
        UnknownBackend,
        "unknown kernel 'torch:quick'; allowed: torch:cudnn, torch:flash, torch:efficient, torch:cpu",
    ),
    "kernel of a backend with one": (
        lambda: attention(q, k, k, backend="reference:x"),
        UnknownBackend,
        "unknown kernel 'reference:x'; allowed: reference (it has one kernel)",
    ),
    "no backend named": (
        lambda: attention(q, k, k, backend=()),
        InvalidArgument,
        "backend must be a name or a non-empty sequence of names, got ()",
    ),
    "backend is a number": (
        lambda: attention(q, k, k, backend=3),
        InvalidArgument,
        "backend must be a name or a non-empty sequence of names, got 3",
    ),
    "use of an unknown backend": (
        lambda: anyattn.use("fa9").__enter__(),
        UnknownBackend,
        f"unknown backend 'fa9'; allowed: auto, {ALL}",
    ),
    "thd without packing": (
        lambda: attention(t, t, t),
        PackingError,
        'layout "thd" needs packing=, a Packing that says where the sequences lie',
    ),
    "packing_kv alone": (
        lambda: attention(q, k, k, packing_kv=lengths(5, 7)),
        PackingError,
        "packing_kv= needs packing= too: pass the queries' Packing",
    ),
    "packing is a tensor": (
        lambda: attention(t, t, t, packing=cu(0, 3)),
        PackingError,
        "packing must be an anyattn.Packing, got Tensor",
    ),
    "offsets past the tensor": (
        lambda: attention(t[:8], t[:8], t[:8], packing=lengths(5, 7)),
        PackingError,
        "packing ends at row 12, past the tensor's 8 rows",
    ),
    "offsets past the keys": (
        lambda: attention(t, t[:8], t[:8], packing=lengths(5, 7)),
        PackingError,
        "packing_kv ends at row 12, past the tensor's 8 rows (keys of another length need packing_kv=)",
    ),
    "numbers of sequences": (
        lambda: attention(t, t, t, packing=padded(), packing_kv=lengths(5, 7)),
        PackingError,
        "packing and packing_kv must have as many sequences, got 3 and 2",
    ),
    "packing elsewhere": (
        lambda: attention(t, t, t, packing=padded().to("meta")),
        DeviceError,
        "packing is on meta, the tensors on cpu: use packing.to(q.device)",
    ),
    "sequences of a 4-D batch": (
        lambda: attention(q, q, q, packing=padded()),
        PackingError,
        "with 4-D tensors sequence i lies in batch entry i: the packing has 3 sequences and the batch 2 entries; use "
        "layout='thd' for several sequences per entry",
    ),
    "sequences longer than entries": (
        lambda: attention(q, q, q, packing=lengths(5, 7)),
        PackingError,
        "max_seqlen 7 does not fit in entries of 5 rows",
    ),
    "keys of another length": (
        lambda: attention(q, k, k, packing=lengths(5, 2)),
        PackingError,
        "with 5 query rows and 7 key rows per entry, the keys need a packing_kv= of their own",
    ),
    "a mask with holes and mask=": (
        lambda: attention(q, q, q, mask=bools(5, 5), packing=Packing.from_mask(HOLES)),
        PackingError,
        "a packing made from a mask with holes goes with 4-D self-attention without bias and mask: use mask= for such "
        "a mask, or pack the tensors yourself with Packing.pack",
    ),
    "window is a number": (
        lambda: attention(q, k, k, window=3),
        InvalidArgument,
        "window must be (left, right), each an int >= 0 or None, got 3",
    ),
    "window of three": (
        lambda: attention(q, k, k, window=(1, 2, 3)),
        InvalidArgument,
        "window must be (left, right), each an int >= 0 or None, got (1, 2, 3)",
    ),
    "negative window": (
        lambda: attention(q, k, k, window=(-1, 0)),
        InvalidArgument,
        "window's left side must be an int >= 0, or None for unbounded; got -1",
    ),
    "fractional window": (
        lambda: attention(q, k, k, window=(0, 1.5)),
        InvalidArgument,
        "window's right side must be an int >= 0, or None for unbounded; got 1.5",
    ),
    "unknown causal": (
        lambda: attention(q, k, k, causal="bottom"),
        InvalidArgument,
        "causal must be None, False, True or 'top_left', got 'bottom'",
    ),
    "negative softcap": (
        lambda: attention(q, k, k, softcap=-1.0),
        InvalidArgument,
        "softcap must be above 0, or None for none; got -1.0",
    ),
    "softcap is NaN": (
        lambda: attention(q, k, k, softcap=float("nan")),
        InvalidArgument,
        "softcap must be a finite number or None, got nan",
    ),
    "infinite scale": (
        lambda: attention(q, k, k, scale=float("inf")),
        InvalidArgument,
        "scale must be a finite number or None, got inf",
    ),
    "scale is a tensor": (
        lambda: attention(q, k, k, scale=torch.tensor(1.0)),
        InvalidArgument,
        "scale must be a finite number or None, got tensor(1.)",
    ),
    "dropout of 1": (
        lambda: attention(q, k, k, dropout=1.0),
        InvalidArgument,
        "dropout must be a number in [0, 1), got 1.0",
    ),
    "negative dropout": (
        lambda: attention(q, k, k, dropout=-0.1),
        InvalidArgument,
        "dropout must be a number in [0, 1), got -0.1",
    ),
    "sink of the wrong length": (
        lambda: attention(q, k, k, sink=torch.zeros(2)),
        ShapeError,
        "sink must have shape (num_heads,) = (4,), got (2,)",
    ),
    "integer sink": (
        lambda: attention(q, k, k, sink=torch.zeros(4, dtype=torch.int64)),
        DtypeError,
        "sink must have a floating dtype, got torch.int64",
    ),
    "slopes of the wrong length": (
        lambda: attention(q, k, k, alibi_slopes=torch.zeros(3)),
        ShapeError,
        "alibi_slopes must have shape (num_heads,) or (sequences, num_heads), (4,) or (2, 4); got (3,)",
    ),
    "slopes that want a gradient": (
        lambda: attention(q, k, k, alibi_slopes=torch.zeros(4, requires_grad=True)),
        InvalidArgument,
        "alibi_slopes gets no gradient: pass alibi_slopes.detach()",
    ),
    "bias of the wrong shape": (
        lambda: attention(q, k, k, bias=torch.zeros(5, 5)),
        ShapeError,
        "bias must broadcast to (batch, num_heads, seq_q, seq_k) = (2, 4, 5, 7), got (5, 5)",
    ),
    "integer bias": (
        lambda: attention(q, k, k, bias=torch.zeros(5, 7, dtype=torch.int32)),
        DtypeError,
        "bias must have a floating dtype, got torch.int32",
    ),
    "mask of the wrong shape": (
        lambda: attention(q, k, k, mask=bools(3, 5, 7)),
        ShapeError,
        "mask must broadcast to (batch, num_heads, seq_q, seq_k) = (2, 4, 5, 7), got (3, 5, 7)",
    ),
    "mask of keys that are real": (
        lambda: attention(q, k, k, mask=bools(2, 7)),
        ShapeError,
        "mask must broadcast to (batch, num_heads, seq_q, seq_k) = (2, 4, 5, 7), got (2, 7); if it says which keys are "
        "real, pass mask[:, None, None, :], or packing=Packing.from_mask(mask)",
    ),
    "mask of five dims": (
        lambda: attention(q, k, k, mask=bools(1, 1, 1, 5, 7)),
        ShapeError,
        "mask must broadcast to (batch, num_heads, seq_q, seq_k) = (2, 4, 5, 7), got (1, 1, 1, 5, 7)",
    ),
    "additive mask": (
        lambda: attention(q, k, k, mask=torch.zeros(5, 7)),
        DtypeError,
        "mask must be bool, True meaning attend, got torch.float32: additive masks go to bias=",
    ),
    "mask with thd": (
        lambda: attention(t, t, t, packing=padded(), mask=bools(12, 12)),
        InvalidArgument,
        'a tensor mask does not go with layout "thd": use 4-D tensors, or a BlockMask over packed rows',
    ),
    "bias with thd": (
        lambda: attention(t, t, t, packing=padded(), bias=torch.zeros(12, 12)),
        InvalidArgument,
        'a tensor bias does not go with layout "thd": use 4-D tensors, or a BlockMask over packed rows',
    ),
    "explain on an unknown target": (
        lambda: anyattn.explain(q, k, k, on="sm70"),
        InvalidArgument,
        "unknown on='sm70'; allowed: cpu, sm80 (A100), sm86 (A10, RTX 3090), sm89 (L4, RTX 4090), "
        "sm90 (H100, H200), sm100 (B200), sm103 (B300), sm120 (RTX 5090)",
    ),
    "explain assuming an unknown backend": (
        lambda: anyattn.explain(q, k, k, assume={"fa9": "1"}),
        UnknownBackend,
        f"assume names the unknown backend 'fa9'; allowed: {ALL}",
    ),
    "explain assuming no version": (
        lambda: anyattn.explain(q, k, k, assume={"torch": "new"}),
        InvalidArgument,
        "assume gives torch the version 'new', which is none; use one like '2.13.0', or None for not installed",
    ),
}

PACKINGS: dict[str, Mistake] = {
    "offsets are a list": (
        lambda: Packing([0, 3]),
        PackingError,
        "cu_seqlens must be an int32 tensor, got list: use torch.tensor(cu_seqlens, dtype=torch.int32)",
    ),
    "a mask is a list": (
        lambda: Packing.from_mask([[1, 0]]),
        PackingError,
        "mask must be a tensor, got list: use torch.tensor(mask)",
    ),
    "positions are a list": (
        lambda: Packing.from_position_ids([0, 1]),
        PackingError,
        "position_ids must be a tensor, got list: use torch.tensor(position_ids)",
    ),
    "lengths are a number": (
        lambda: Packing.from_lengths(5),
        PackingError,
        "lengths must be a sequence of ints or a 1-D tensor, got 5",
    ),
    "int64 offsets": (
        lambda: Packing(cu(0, 3).long()),
        DtypeError,
        "cu_seqlens must be int32, got torch.int64: use cu_seqlens.to(torch.int32)",
    ),
    "2-D offsets": (
        lambda: Packing(cu(0, 3)[None]),
        PackingError,
        "cu_seqlens must be 1-D with sequences + 1 entries, got shape (1, 2)",
    ),
    "no offsets": (
        lambda: Packing(cu()),
        PackingError,
        "cu_seqlens must be 1-D with sequences + 1 entries, got shape (0,)",
    ),
    "offsets decrease": (
        lambda: Packing(cu(0, 5, 3)),
        PackingError,
        "cu_seqlens must not decrease: entry 2 is 3 after 5",
    ),
    "offsets start late": (lambda: Packing(cu(1, 5)), PackingError, "cu_seqlens must start at 0, got 1"),
    "padded offsets decrease": (
        lambda: Packing(cu(0, 0, 1), cu(0, 3, 2)),
        PackingError,
        "cu_seqlens_padded must not decrease: entry 2 is 2 after 3",
    ),
    "too little room": (
        lambda: Packing(cu(0, 3, 5), cu(0, 2, 5)),
        PackingError,
        "cu_seqlens_padded leaves sequence 0 2 rows, and it has 3 by cu_seqlens",
    ),
    "negative padded offset": (
        lambda: Packing(cu(0, 3), cu(-1, 5)),
        PackingError,
        "cu_seqlens_padded must not be negative, got -1 first",
    ),
    "numbers of offsets": (
        lambda: Packing(cu(0, 3), cu(0, 3, 4)),
        PackingError,
        "cu_seqlens_padded must have cu_seqlens' shape and device, (2,) on cpu; got (3,) on cpu",
    ),
    "max_seqlen too small": (
        lambda: Packing(cu(0, 3, 8), max_seqlen=4),
        PackingError,
        "max_seqlen is 4, and the longest sequence has 5 tokens",
    ),
    "fractional max_seqlen": (
        lambda: Packing(cu(0, 3), max_seqlen=4.5),
        PackingError,
        "max_seqlen must be an int >= 0 or None, got 4.5",
    ),
    "negative max_seqlen unchecked": (
        lambda: Packing(cu(0, 3), max_seqlen=-3, check=False),
        PackingError,
        "max_seqlen must be an int >= 0 or None, got -3",
    ),
    "rows too few": (
        lambda: Packing(cu(0, 3, 8), rows=7),
        PackingError,
        "rows is 7, and the last sequence ends at row 8",
    ),
    "negative lengths": (lambda: lengths(3, -1), PackingError, "lengths must be >= 0, got [3, -1]"),
    "fractional lengths": (lambda: lengths(2.5), PackingError, "lengths must be integers, got [2.5]"),
    "padding to 0": (
        lambda: lengths(3, pad_to_multiple_of=0),
        PackingError,
        "pad_to_multiple_of must be >= 1, got 0",
    ),
    "max_sequences too small": (
        lambda: lengths(3, 4, max_sequences=1),
        PackingError,
        "max_sequences=1 is less than the 2 lengths given",
    ),
    "max_rows too small": (
        lambda: lengths(3, 4, max_rows=6),
        PackingError,
        "rows is 6, and the last sequence ends at row 7",
    ),
    "capacity's max_seqlen too small": (
        lambda: lengths(3, 4, max_seqlen=3),
        PackingError,
        "max_seqlen is 3, and the longest sequence has 4 tokens",
    ),
    "1-D mask": (lambda: Packing.from_mask(bools(3)), ShapeError, "mask must have 2 dims (batch, seq), got shape (3,)"),
    "additive padding mask": (
        lambda: Packing.from_mask(torch.zeros(2, 3)),
        DtypeError,
        "mask must be bool or integers, true meaning a real token; got torch.float32: use mask.bool()",
    ),
    "fractional positions": (
        lambda: Packing.from_position_ids(torch.zeros(3)),
        DtypeError,
        "position_ids must be integers, got torch.float32",
    ),
    "3-D positions": (
        lambda: Packing.from_position_ids(torch.zeros(1, 1, 3, dtype=torch.int64)),
        ShapeError,
        "position_ids must be (rows,) or (batch, seq), got shape (1, 1, 3)",
    ),
    "pack of too few rows": (
        lambda: padded().pack(torch.zeros(5)),
        ShapeError,
        "pack needs at least 12 rows, got shape (5,)",
    ),
    "unpack of too few tokens": (
        lambda: padded().unpack(torch.zeros(5)),
        ShapeError,
        "unpack needs 8 rows, one per real token; got shape (5,)",
    ),
    "copy_ of too many sequences": (
        lambda: padded().copy_(lengths(1, 2, 3, 4)),
        PackingError,
        "copy_: sequences is 4, this packing was made for at most 3",
    ),
    "copy_ of too long a sequence": (
        lambda: padded().copy_(lengths(6, 1)),
        PackingError,
        "copy_: max_seqlen is 6, this packing was made for at most 5",
    ),
    "copy_ of padding into none": (
        lambda: lengths(4, 4).copy_(lengths(1, 2)),
        PackingError,
        "copy_: the new batch has padding and this packing was made without; make it with a fixed capacity: "
        "Packing.from_lengths(..., max_rows=...)",
    ),
}


@pytest.mark.usefixtures("no_kernel")
@pytest.mark.parametrize("name", CALLS)
def test_mistakes_in_a_call_are_named_before_a_kernel_runs(name: str) -> None:
    mistake, kind, message = CALLS[name]
    with pytest.raises(AnyattnError) as caught:
        mistake()
    assert (caught.type, str(caught.value)) == (kind, message)


@pytest.mark.parametrize("name", PACKINGS)
def test_mistakes_in_a_packing_are_named_when_it_is_made(name: str) -> None:
    mistake, kind, message = PACKINGS[name]
    with pytest.raises(AnyattnError) as caught:
        mistake()
    assert (caught.type, str(caught.value)) == (kind, message)


@pytest.mark.usefixtures("no_kernel")
@pytest.mark.parametrize("name", [n for n in CALLS if "explain" not in n and n != "use of an unknown backend"])
def test_a_mistake_is_named_again_the_second_time(name: str) -> None:
    """Nothing of a refused call is cached as if it were good."""
    mistake, kind, message = CALLS[name]
    for _ in range(2):
        with pytest.raises(kind) as caught:
            mistake()
        assert str(caught.value) == message


def test_the_exception_tree() -> None:
    for kind in (ShapeError, DtypeError, DeviceError, PackingError, UnknownBackend):
        assert issubclass(kind, InvalidArgument)
    assert issubclass(InvalidArgument, ValueError)
    assert issubclass(anyattn.NoBackend, RuntimeError)
    assert issubclass(anyattn.Unsupported, NotImplementedError)
    assert issubclass(anyattn.MissingExtra, ImportError)
    for kind in (InvalidArgument, anyattn.NoBackend, anyattn.Unsupported, anyattn.MissingExtra):
        assert issubclass(kind, AnyattnError)


@pytest.mark.usefixtures("no_kernel")
def test_no_backend_lists_every_reason_with_its_remedy() -> None:
    """Named backends that lack something: each reason says what was needed, what there is, and what to do."""
    with pytest.raises(anyattn.NoBackend) as caught:
        attention(q, k, k, softcap=3.0, dropout=0.1, backend="torch:cpu")
    text = str(caught.value)
    flat = " ".join(text.split())
    assert text.splitlines()[0] == "no backend can run this call; each says why, and what would lift it:"
    assert "torch:cpu softcap: this kernel does not have it; choose another backend" in flat
    assert "torch:cpu dropout: this kernel does not have it; choose another backend" in flat
    others = ", ".join(name for name in BACKENDS.ORDER if name != "torch")
    assert text.splitlines()[3:] == [f'  not asked for: {others} (backend="torch:cpu")']
    explanation = caught.value.explanation
    assert explanation.chosen is None
    assert [r.what for r in explanation.rejected["torch"]] == ["softcap", "dropout"]
