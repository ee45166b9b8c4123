"""Cases generated from what the backends declare, and the problems that they stand for.

A case names a kernel that can run on a device, and one value of every parameter: form (layout and padding), lengths,
positional mask, terms of the scores, dtype, heads, head dims, and what is asked of the call. Cases cover every pair of
values that the kernel takes; what it takes is asked of ``anyattn.explain``, so declaring a backend tests it.

Kernels of other machines run as their doubles (tests/doubles), each of several published versions.

Padding is always there and always hostile: large finite values in q, k, v and in the incoming gradients.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import random
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

import anyattn
import oracle
from anyattn import _preparation, _select
from anyattn._capability import Capability
from doubles import pretend
from oracle import Span, Terms

BACKENDS = importlib.import_module("anyattn.backends")
DTYPES = {n: getattr(torch, n) for n in ("float16", "bfloat16", "float32", "float64")}

#: Kernels that compile for seconds per configuration: no more cases than this, and fewer head dims.
CASE_LIMITS = {"fa4": 40, "flex:cuda": 40, "flex:cpu": 12}
SLOW_TO_COMPILE_DIMS = ("64", "128", "192/128")
#: Doubles: this many cases of the newest version, and of each older one.
IMAGINED_LIMITS = (40, 16)

FORMS = (
    "bshd", "sbhd", "bhsd",  # dense
    "thd", "thd_gaps", "thd_tail", "thd_offset",  # packed: compact, padded between, after the end, before the start
    "bshd_right", "sbhd_right", "bhsd_right", "bshd_left", "bhsd_left", "bshd_holes",  # 4-D and padded
)  # fmt: skip
MASKS = {
    "full": Terms(),
    "causal": Terms(causal=True),
    "top_left": Terms(causal="top_left"),
    "window": Terms(window=(3, 2)),
    "window_left": Terms(window=(4, None)),
    "window_right": Terms(window=(None, 1)),
    "window_self": Terms(window=(0, 0)),
    "causal_window": Terms(causal=True, window=(3, 9)),
    "top_left_window": Terms(causal="top_left", window=(2, None)),
}
SCORES = (
    "plain", "scale", "scale_negative",
    "softcap", "sink", "sink_low", "softcap_sink", "alibi", "alibi_sequences", "alibi_sink",
    "bias", "bias_grad", "bias_row", "mask", "mask_bias", "mask_sink", "block_mask",
)  # fmt: skip
RELATIONS = ("equal", "keys_longer", "any")
HEADS = ("4", "4/2", "3/1")
ASKS = ("grad", "lse_grad", "forward", "deterministic", "out")  # forward gives lse too, out nothing else


@dataclass(frozen=True)
class Imagined:
    """A machine that this one is not: a GPU, and versions of packages, by backend."""

    on: str
    packages: tuple[tuple[str, str], ...] = ()
    newest: bool = True
    """With the newest version of what is tested: all that is declared must be there."""
    without: tuple[str, ...] = ()
    """Features that the build of FlashAttention 3 lacks."""


@dataclass(frozen=True)
class Target:
    """A kernel on a device of this machine, or its double, on the CPU, as if on another one."""

    device: str
    name: str
    """As ``backend=`` takes it: "reference", "torch:cpu"."""
    capability: Capability = field(repr=False, hash=False, compare=False)
    imagined: Imagined | None = None

    @property
    def id(self) -> str:
        """For pytest."""
        if self.imagined is None:
            return f"{self.device}-{self.name}"
        versions = "".join(f"@{version}" for _, version in self.imagined.packages)
        without = "".join(f"-no{feature}" for feature in self.imagined.without)
        return f"{self.imagined.on}-{self.name}{versions}{without}"

    @property
    def dims(self) -> str:
        """A head dim that every kernel takes there."""
        return "16" if self.device == "cpu" and self.imagined is None else "64"

    def machine(self) -> AbstractContextManager[Any]:
        """Be on the imagined machine, with the kernel loaded; nothing where one is there, or where it is this one."""
        if self.imagined is None or _there == self.imagined:
            return nullcontext()
        return _be_on(self.imagined, self.backend)

    @property
    def backend(self) -> str:
        """Without the kernel."""
        return self.name.partition(":")[0]

    @property
    def arch(self) -> str:
        """As ``explain(on=)`` takes it."""
        if self.imagined is not None:
            return self.imagined.on
        if self.device == "cpu":
            return "cpu"
        major, minor = torch.cuda.get_device_capability()
        return f"sm{major}{minor}"


@dataclass(frozen=True)
class Case:
    """One value of every parameter."""

    target: Target
    form: str = "bshd"
    relation: str = "equal"
    mask: str = "full"
    scores: str = "plain"
    dtype: str = "float32"
    heads: str = "4"
    dims: str = "16"
    asks: str = "grad"

    @property
    def id(self) -> str:
        """For pytest."""
        return "-".join([self.target.id, *(str(getattr(self, name)) for name in PARAMETERS)])


PARAMETERS = tuple(f.name for f in fields(Case) if f.name != "target")


# --- which kernels run here ----------------------------------------------------------------------------------------

_there: Imagined | None = None


@contextmanager
def _be_on(imagined: Imagined, backend: str) -> Iterator[None]:
    global _there
    with pretend(imagined.on, without=imagined.without, **dict(imagined.packages)):
        _select.load(backend)  # what only the import tells counts from the start
        _there = imagined
        try:
            yield
        finally:
            _there = None


#: Doubles by backend, the newest version first. Betas of FlashAttention 3 go by their dates: before torch knew its ops,
#: before and after windows had two sides; 0.0.3 is fa3-fwd. torch's own kernels have one version.
VERSIONS = {
    "fa2": ("2.8.3", "2.7.4", "2.6.3", "2.5.9", "2.4.1", "2.3.0"),
    "fa3": ("3.0.0", "2025-12-04", "2025-06-07", "2025-04-10", "0.0.3"),
    "fa4": ("4.0.0b36", "4.0.0b12"),
    "varlen": (),
    "torch": (),
}


#: Older versions that every test of a kernel gets beside the newest; all of them get generated cases.
OLDER = ("2.5.9", "2025-06-07")


@functools.cache
def imagined() -> tuple[Target, ...]:
    """The doubles, as if on a Hopper GPU."""
    found = []
    for name, versions in VERSIONS.items():
        if name not in BACKENDS.ORDER:
            continue
        able = [c for c in BACKENDS.get(name).CAPABILITIES if 9 in c.families]
        machines = [Imagined("sm90", ((name, v),), i == 0) for i, v in enumerate(versions)] or [Imagined("sm90")]
        found += [
            Target("cpu", f"{name}:{c.kernel}" if c.kernel else name, c, machine) for machine in machines for c in able
        ]
    return tuple(t for t in found if pairwise(t))


@functools.cache
def targets(device: str) -> tuple[Target, ...]:
    """Every kernel that can run on this device, installed and loadable."""
    if device == "cuda" and not torch.cuda.is_available():
        return ()
    arch = 0 if device == "cpu" else torch.cuda.get_device_capability()[0]
    found = []
    for name in BACKENDS.ORDER:
        backend = BACKENDS.get(name)
        able = [c for c in backend.CAPABILITIES if arch in c.families]
        if not able:
            continue
        probe = backend.probe()
        if probe.version is None or probe.problem:
            continue
        if not _select.load(name):  # what backends() reports
            continue
        found += [Target(device, f"{name}:{c.kernel}" if c.kernel else name, c) for c in able]
    return tuple(found)


# --- problems ------------------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """Tensors of a case, as the caller has them, and all that the oracle needs."""

    q: Tensor
    k: Tensor
    v: Tensor
    arguments: dict[str, Any]
    """Keyword arguments of ``attention``, the backend among them."""
    spans: list[Span]
    terms: Terms
    layout: str
    dtype: torch.dtype
    mask: Tensor | None = None
    """For the oracle: bool, over the rows in memory."""
    dout: Tensor | None = None
    """(B, S, H, V), as the oracle has it."""
    dlse: Tensor | None = None
    """(B, H, S)"""
    leaves: dict[str, Tensor] = field(default_factory=dict)
    """What gets a gradient."""
    product_error: float = 0.0
    """As the kernel declares it."""

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """For the oracle: (B, S, H, D), and the others."""
        given = {n: to_bshd(getattr(self, n), self.layout) for n in "qkv"}
        return {**given, **{n: self.arguments.get(n) for n in ("sink", "alibi_slopes", "bias")}}

    def call(self, **changes: Any) -> Any:
        """Run ``attention``."""
        return anyattn.attention(self.q, self.k, self.v, **{**self.arguments, **changes})

    def explain(self, **changes: Any) -> anyattn.Explanation:
        """What ``attention`` would run."""
        return anyattn.explain(self.q, self.k, self.v, **{**self.arguments, **changes})

    def expected(self) -> oracle.Expected:
        """The oracle's answer, and how far from it a kernel may be."""
        expected = oracle.Expected(self.dtype, self.tensors, self.spans, self.terms, self.dout, self.dlse, self.mask)
        expected.product_error = self.product_error
        return expected

    @property
    def real_q(self) -> Tensor:
        """bool (B, S): which query rows belong to a sequence."""
        return _real(to_bshd(self.q, self.layout).shape[:2], [(s.entry, s.start_q, s.len_q) for s in self.spans])

    @property
    def real_k(self) -> Tensor:
        """bool (B, K)."""
        return _real(to_bshd(self.k, self.layout).shape[:2], [(s.entry, s.start_k, s.len_k) for s in self.spans])


def _real(shape: Iterable[int], runs: Iterable[tuple[int, int, int]]) -> Tensor:
    real = torch.zeros(tuple(shape), dtype=torch.bool)
    for entry, start, length in runs:
        real[entry, start : start + length] = True
    return real


_SWAPS = {"bshd": (0, 0), "sbhd": (0, 1), "bhsd": (1, 2)}


def to_bshd(x: Tensor, layout: str) -> Tensor:
    """From the caller's layout."""
    return x.unsqueeze(0) if layout == "thd" else x.transpose(*_SWAPS[layout])


def from_bshd(x: Tensor, layout: str) -> Tensor:
    """To the caller's layout; the strides are whatever they become."""
    return x.squeeze(0) if layout == "thd" else x.transpose(*_SWAPS[layout])


def lse_to_bhs(x: Tensor, layout: str) -> Tensor:
    """lse as the oracle has it."""
    return x.unsqueeze(0) if layout == "thd" else x


#: Lengths of the sequences of a batch (queries, keys), by how they compare; a few times longer on a GPU.
_LENGTHS = {
    "equal": ([5, 0, 1, 13, 7], [5, 0, 1, 13, 7]),
    "keys_longer": ([5, 0, 1, 4, 7], [9, 3, 1, 13, 7]),
    "any": ([9, 3, 0, 13, 2], [5, 0, 4, 7, 12]),
}
_LONG = {
    "equal": ([130, 0, 1, 257, 64], [130, 0, 1, 257, 64]),
    "keys_longer": ([100, 0, 1, 129, 64], [200, 3, 1, 300, 64]),
    "any": ([200, 3, 0, 150, 20], [130, 0, 40, 64, 257]),
}
_DENSE = {"equal": (11, 11), "keys_longer": (6, 13), "any": (13, 6)}
_LONG_DENSE = {"equal": (201, 201), "keys_longer": (65, 257), "any": (190, 77)}


@dataclass
class _Place:
    """Where the rows of one side (queries, or keys) lie."""

    batch: int
    seq: int
    runs: list[tuple[int, int, int]]
    """(entry, start, length) per sequence."""
    packing: Any = None


def _place(form: str, lengths: list[int], device: str) -> _Place:
    layout, _, kind = form.partition("_")
    if layout == "thd":
        return _packed_place(kind, lengths, device)
    room = max(lengths) + 2
    if kind == "right":
        runs = [(i, 0, n) for i, n in enumerate(lengths)]
        packing = anyattn.Packing.from_lengths(lengths, device=device)
    else:
        runs = [(i, room - n, n) for i, n in enumerate(lengths)]
        real = _real((len(lengths), room), runs)
        packing = anyattn.Packing.from_mask(real.to(device))
    return _Place(len(lengths), room, runs, packing)


def _packed_place(kind: str, lengths: list[int], device: str) -> _Place:
    multiple, first, tail = {"": (1, 0, 0), "gaps": (8, 0, 0), "tail": (1, 0, 5), "offset": (4, 3, 2)}[kind]
    starts, row = [], first
    for n in lengths:
        starts.append(row)
        row += -(-n // multiple) * multiple
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    padded = torch.tensor([*starts, row], dtype=torch.int32, device=device)
    packing = anyattn.Packing(cu) if kind in ("", "tail") else anyattn.Packing(cu, padded)
    return _Place(1, row + tail, [(0, s, n) for s, n in zip(starts, lengths, strict=True)], packing)


def _holes_place(lengths: list[int], device: str) -> tuple[_Place, Tensor]:
    """A mask with holes: every second row of an entry is real, as far as they go."""
    room = 2 * max(lengths) + 1
    real = torch.zeros(len(lengths), room, dtype=torch.bool)
    for i, n in enumerate(lengths):
        real[i, 1 : 2 * n : 2] = True
    return _Place(len(lengths), room, [], anyattn.Packing.from_mask(real.to(device))), real


def build(case: Case, seed: int = 0, *, device: str | None = None, garbage: float = 1e4) -> Problem:
    """The tensors of a case. On "meta", packings stay on the CPU: enough for ``explain``."""
    where = device or case.target.device
    # explain takes tensors on "meta" as of any device; offsets are small and may stay on the host
    offsets = "cpu" if where == "meta" else where
    layout, _, kind = case.form.partition("_")
    small = case.target.device == "cpu"
    if kind == "holes":
        raise ValueError("build_holes makes those")
    if layout == "thd" or kind:
        lengths_q, lengths_k = (_LENGTHS if small else _LONG)[case.relation]
        place_q = _place(case.form, lengths_q, offsets)
        place_k = place_q if case.relation == "equal" else _place(case.form, lengths_k, offsets)
    else:
        seq_q, seq_k = (_DENSE if small else _LONG_DENSE)[case.relation]
        place_q = _Place(2, seq_q, [(b, 0, seq_q) for b in range(2)])
        place_k = _Place(2, seq_k, [(b, 0, seq_k) for b in range(2)])
    spans = [Span(e, sq, nq, sk, nk) for (e, sq, nq), (_, sk, nk) in zip(place_q.runs, place_k.runs, strict=True)]
    make = Maker(case, seed, where, place_q, place_k)
    problem = make.problem(spans, layout, garbage)
    if place_q.packing is not None:
        problem.arguments["packing"] = place_q.packing
        if place_k is not place_q:
            problem.arguments["packing_kv"] = place_k.packing
    return problem


class Maker:
    """Draws the tensors of a case."""

    def __init__(self, case: Case, seed: int, device: str, q: _Place, k: _Place) -> None:
        self.case, self.device, self.q, self.k = case, device, q, k
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = DTYPES[case.dtype]
        heads, _, kv_heads = case.heads.partition("/")
        self.heads, self.kv_heads = int(heads), int(kv_heads or heads)
        dim, _, dim_v = case.dims.partition("/")
        self.dim, self.dim_v = int(dim), int(dim_v or dim)
        self.grad = case.asks not in ("forward", "out")

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers, the same on every device."""
        dtype = dtype or self.dtype
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device, dtype)

    def leaf(self, x: Tensor, grad: bool = True) -> Tensor:
        """A tensor that gets a gradient where the case asks for one."""
        return x.detach().requires_grad_(self.grad and grad)

    def rows(self, place: _Place, heads: int, dim: int, layout: str, garbage: float) -> Tensor:
        """q, k, v or dout, with large values in padding, (B, S, H, D)."""
        x = self.draw(place.batch, place.seq, heads, dim)
        if self.device != "meta" and place.packing is not None:
            real = _real((place.batch, place.seq), place.runs).to(self.device)
            x = torch.where(real[..., None, None], x, x * garbage)
        return x

    def problem(self, spans: list[Span], layout: str, garbage: float) -> Problem:
        """All of it."""
        case, terms = self.case, MASKS[self.case.mask]
        q, k, v = (
            self.leaf(from_bshd(self.rows(place, heads, dim, layout, garbage), layout).contiguous())
            for place, heads, dim in (
                (self.q, self.heads, self.dim), (self.k, self.kv_heads, self.dim), (self.k, self.kv_heads, self.dim_v)
            )
        )  # fmt: skip
        arguments: dict[str, Any] = {"backend": case.target.name, "layout": layout}
        arguments["return_lse"] = case.asks in ("lse_grad", "forward")
        if case.asks == "deterministic":
            arguments["deterministic"] = True
        terms, mask = self._scores(terms, arguments)
        arguments.update(
            {n: x for n in ("causal", "window", "scale", "softcap") if (x := getattr(terms, n)) is not None}
        )
        problem = Problem(q, k, v, arguments, spans, terms, layout, self.dtype, mask)
        problem.product_error = case.target.capability.product_error.get(case.dtype, 0.0)
        if self.grad:
            problem.dout = self.rows(self.q, self.heads, self.dim_v, layout, garbage)
            problem.leaves = {"q": q, "k": k, "v": v}
            problem.leaves |= {
                n: arguments[n] for n in ("sink", "bias") if n in arguments and arguments[n].requires_grad
            }
        if case.asks == "lse_grad":
            problem.dlse = self.draw(self.q.batch, self.heads, self.q.seq, dtype=torch.float32)
        return problem

    def _scores(self, terms: Terms, arguments: dict[str, Any]) -> tuple[Terms, Tensor | None]:
        """Add what the case has on its scores; (terms, mask for the oracle)."""
        mask = None
        for part in SCORE_PARTS.get(self.case.scores, ()):
            if part == "scale":
                terms = replace(terms, scale=0.3)
            elif part == "scale_negative":
                terms = replace(terms, scale=-0.3)
            elif part == "softcap":
                terms = replace(terms, softcap=1.5)
            elif part in ("sink", "sink_low"):
                low = torch.bfloat16 if part == "sink_low" else torch.float32
                arguments["sink"] = self.leaf(self.draw(self.heads, dtype=low))
            elif part in ("alibi", "alibi_sequences"):
                sequences = max(len(self.q.runs), 1)
                slopes = self.draw(
                    *((sequences,) if part == "alibi_sequences" else ()), self.heads, dtype=torch.float32
                )
                arguments["alibi_slopes"] = slopes.abs()
            elif part.startswith("bias"):
                shape = (self.heads, 1, self.k.seq) if part == "bias_row" else (self.q.batch, 1, self.q.seq, self.k.seq)
                arguments["bias"] = self.leaf(self.draw(*shape), part != "bias")
            elif part == "mask":
                mask = (self.draw(1, self.heads, self.q.seq, self.k.seq, dtype=torch.float32) > -0.5).contiguous()
                if self.device != "meta":
                    mask[0, :, self.q.seq // 2] = False  # a row that sees nothing
                arguments["mask"] = mask
                mask = mask.cpu() if self.device != "meta" else None
            elif part == "block_mask":
                arguments["mask"] = block_mask(self.q.seq, self.k.seq, self.device)
                mask = block_mask_values(self.q.seq, self.k.seq)
        return terms, mask


SCORE_PARTS = {
    "scale": ("scale",),
    "scale_negative": ("scale_negative",),
    "softcap": ("softcap",),
    "sink": ("sink",),
    "sink_low": ("sink_low",),
    "softcap_sink": ("softcap", "sink"),
    "alibi": ("alibi",),
    "alibi_sequences": ("alibi_sequences",),
    "alibi_sink": ("alibi", "sink"),
    "bias": ("bias",),
    "bias_grad": ("bias_grad",),
    "bias_row": ("bias_row",),
    "mask": ("mask",),
    "mask_bias": ("mask", "bias"),
    "mask_sink": ("mask", "sink"),
    "block_mask": ("block_mask",),
}


def _blocks(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """A mask_mod with full, partial and empty blocks of 16."""
    return ((i + 2 * j) % 5 != 0) | (j < 16) & (i >= 16)


def block_mask(rows: int, keys: int, device: str) -> Any:
    """torch's BlockMask for these rows."""
    from torch.nn.attention.flex_attention import create_block_mask

    where = "cpu" if device == "meta" else device
    return create_block_mask(_blocks, None, None, rows, keys, device=where, BLOCK_SIZE=16 if where == "cpu" else 128)


def block_mask_values(rows: int, keys: int) -> Tensor:
    """The same as a tensor, (1, 1, rows, keys)."""
    zero = torch.zeros((), dtype=torch.long)
    return _blocks(zero, zero, torch.arange(rows)[:, None], torch.arange(keys)[None])[None, None]


# --- choosing cases ------------------------------------------------------------------------------------------------


def _values(target: Target) -> dict[str, tuple[str, ...]]:
    """The values of each parameter, before anyone asks what the kernel takes."""
    if target.imagined is not None:
        dims: tuple[str, ...] = ("64", "32", "20", "24", "64/32", "32/64", "192/128", "256")
    elif target.device == "cpu":
        dims = ("16", "8", "5", "16/8", "8/24")
    elif target.backend in CASE_LIMITS:
        dims = SLOW_TO_COMPILE_DIMS
    else:
        dims = ("64", "40", "128", "192/128", "32/64")
    return {
        "form": tuple(f for f in FORMS if not f.endswith("_holes")),
        "relation": RELATIONS,
        "mask": tuple(MASKS),
        "scores": SCORES,
        "dtype": tuple(d for d in DTYPES if d in target.capability.dtypes),
        "heads": HEADS,
        "dims": dims,
        "asks": ASKS,
    }


def _limit(target: Target) -> int:
    if target.imagined is not None:
        return IMAGINED_LIMITS[0 if target.imagined.newest else 1]
    return CASE_LIMITS.get(target.name, CASE_LIMITS.get(target.backend, 1 << 30))


@functools.cache
def has_backward(target: Target) -> bool:
    """Whether the kernel has gradients at all: not every build has."""
    if target.capability.backward_families == ():
        return False
    plain = Case(target, dtype=target.capability.dtypes[0], dims="64")
    return any(takes(replace(plain, form=form)) for form in ("bshd", "thd"))


def with_other_head_dims(target: Target) -> list[Case]:
    """Plain cases whose head_dim_v is not their head_dim."""
    forms = [form for form in ("bshd", "thd") if {"bshd": "dense", "thd": "packed"}[form] in target.capability.features]
    dims = [d for d in _values(target)["dims"] if "/" in d]
    return [Case(target, f, dtype=target.capability.dtypes[0], dims=d, asks="forward") for f in forms for d in dims]


@functools.cache
def takes(case: Case) -> bool:
    """Whether the library says that the kernel takes the case."""
    on_cpu = case.target.device == "cpu"
    try:
        with case.target.machine(), deterministic_flag(case):
            problem = build(case, device="cpu" if on_cpu and case.target.imagined is None else "meta")
            if on_cpu:
                return problem.explain().chosen == case.target.backend
            with _meta_is_this_gpu():
                return problem.explain().chosen is not None
    except anyattn.InvalidArgument:
        return False


@contextmanager
def _meta_is_this_gpu() -> Iterator[None]:
    """``explain(on=...)`` would assume whole builds of each kernel; this is about the ones that are installed."""
    arch_of = _preparation.arch_of
    _preparation.arch_of = lambda device: arch_of(torch.device("cuda"))  # type: ignore[assignment]
    try:
        yield
    finally:
        _preparation.arch_of = arch_of


class deterministic_flag:
    """torch's process-wide flag, on where a case is deterministic and its kernel reads that flag."""

    def __init__(self, case: Case) -> None:
        self.wanted = case.asks == "deterministic" and case.target.capability.reads_torch_flag
        self.before = False

    def __enter__(self) -> None:
        self.before = torch.are_deterministic_algorithms_enabled()
        if self.wanted:
            torch.use_deterministic_algorithms(True)

    def __exit__(self, *_: object) -> None:
        if self.wanted:
            torch.use_deterministic_algorithms(self.before)


def is_tried_everywhere(target: Target) -> bool:
    """Whether every test of a kernel gets this one: of its versions, few do."""
    if target.imagined is None or target.imagined.newest:
        return True
    return any(version in OLDER for _, version in target.imagined.packages)


@functools.cache
def all_targets(device: str) -> tuple[Target, ...]:
    """Every kernel that runs on a device, and beside those of the CPU the doubles."""
    return targets(device) + (imagined() if device == "cpu" else ())


@functools.cache
def generate(device: str) -> tuple[Case, ...]:
    """The cases of every kernel that runs on a device, and beside those of the CPU of every double."""
    return tuple(case for target in all_targets(device) for case in pairwise(target))


def _first(target: Target, values: dict[str, tuple[str, ...]]) -> Case | None:
    """A plain case that the kernel takes: the base from which single values are tried."""
    plain = itertools.product(("grad", "out"), ("bshd", "thd"), values["dtype"], values["heads"], values["dims"])
    for asks, form, dtype, heads, dims in plain:
        case = Case(target, form, dtype=dtype, heads=heads, dims=dims, asks=asks)
        if takes(case):
            return case
    return None


@functools.cache
def pairwise(target: Target) -> tuple[Case, ...]:
    """Cases in which every pair of values that the kernel takes together occurs (Cohen et al. 1997, greedily).

    Where a kernel gets fewer, every single value that it takes occurs all the same.
    """
    with target.machine():
        return tuple(_pairwise(target))


def _pairwise(target: Target) -> Iterator[Case]:
    values = _values(target)
    base = _first(target, values)
    if base is None:
        return
    bases = [c for form in ("bshd", "thd", "bshd_right") if takes(c := replace(base, form=form))]
    bases += [c for b in bases if takes(c := replace(b, asks="forward"))]
    usable = {
        name: tuple(x for x in options if any(takes(replace(b, **{name: x})) for b in bases))
        for name, options in values.items()
    }
    single = {frozenset({(a, x)}) for a in usable for x in usable[a]}
    pairs = {
        frozenset({(a, x), (b, y)}) for a, b in itertools.combinations(usable, 2) for x in usable[a] for y in usable[b]
    }
    yield from itertools.islice(_cover(target, usable, single, pairs), _limit(target))


Goals = set[frozenset[tuple[str, str]]]


def _cover(target: Target, usable: dict[str, tuple[str, ...]], single: Goals, pairs: Goals) -> Iterator[Case]:
    rng = random.Random(0)
    orders = [sorted(goals, key=sorted) for goals in (single, pairs)]
    for order in orders:
        rng.shuffle(order)
    for goal in itertools.chain(*orders):
        if goal not in single and goal not in pairs:
            continue
        best: tuple[int, Case | None] = (0, None)
        for _ in range(12):
            drawn = {name: rng.choice(options) for name, options in usable.items()}
            drawn.update(dict(goal))
            score = sum(frozenset(p) in pairs for p in itertools.combinations(drawn.items(), 2))
            score += 10 * sum(frozenset({item}) in single for item in drawn.items())
            if score > best[0] and takes(case := Case(target, **drawn)):
                best = (score, case)
        if best[1] is None:
            continue
        chosen = [(name, getattr(best[1], name)) for name in usable]
        single -= {frozenset({item}) for item in chosen}
        pairs -= {frozenset(p) for p in itertools.combinations(chosen, 2)}
        yield best[1]
