"""``anyattn explain``: a problem in words, the kernel that would run it, and why each other one would not."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import typer
from packaging.version import InvalidVersion, Version
from torch import Tensor

import anyattn
from anyattn._environment import TARGETS
from anyattn._errors import InvalidArgument
from anyattn._packing import Packing
from anyattn._select import Explanation
from anyattn.backends import get
from anyattn.cli import _render

_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
_LAYOUTS = ("bshd", "sbhd", "bhsd", "thd")
_GAP_ROWS = 64
_SEQ = 4096


@dataclass(frozen=True, slots=True)
class Words:
    """The problem as given on the command line, read but not yet checked against one another."""

    seq: int | None
    seq_k: int | None
    heads: tuple[int, int]
    head_dim: tuple[int, int]
    batch: int | None
    dtype: torch.dtype
    causal: bool
    top_left: bool
    window: tuple[int | None, int | None] | None
    softcap: float | None
    sink: bool
    alibi: bool
    bias: bool
    bias_grad: bool
    mask: bool
    dropout: float
    packed: bool
    gaps: bool
    lengths: tuple[int, ...] | None
    layout: str | None
    grad: bool
    deterministic: bool
    return_lse: bool


# --- reading ---


def _count(option: str, text: str | None) -> int | None:
    if text is not None and not text.strip().isdigit():
        raise InvalidArgument(f"{option} must be an int >= 0, got {text!r}")
    return None if text is None else int(text)


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidArgument(f"{option} must be a number, got {text!r}") from None


def _pair(option: str, text: str, meaning: str) -> tuple[int, int]:
    """``"32/8"`` or ``"32"``, meaning 32/32."""
    parts = text.split("/")
    if len(parts) > 2 or not all(part.strip().isdigit() for part in parts):
        raise InvalidArgument(f"{option} must be {meaning}, got {text!r}")
    return int(parts[0]), int(parts[-1])


def _window(text: str | None) -> tuple[int | None, int | None] | None:
    if text is None:
        return None
    sides = [side.strip().lower() for side in text.split(",")]
    if len(sides) != 2 or not all(side.isdigit() or side == "none" for side in sides):
        raise InvalidArgument(f"--window must be LEFT,RIGHT, each an int >= 0 or 'none' for unbounded; got {text!r}")
    left, right = (None if side == "none" else int(side) for side in sides)
    return left, right


def _lengths(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    numbers = [part.strip() for part in text.split(",")]
    if not all(number.isdigit() for number in numbers):
        raise InvalidArgument(f"--lengths must be ints >= 0 with commas between, like 100,200,300; got {text!r}")
    return tuple(map(int, numbers))


def _dtype(text: str) -> torch.dtype:
    by_name = _DTYPES | {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES.values()}
    if text not in by_name:
        raise InvalidArgument(f"--dtype must be one of {', '.join(by_name)}; got {text!r}")
    return by_name[text]


def _assume(pairs: Sequence[str]) -> dict[str, str | None] | None:
    found: dict[str, str | None] = {}
    for pair in pairs:
        name, equals, version = pair.partition("=")
        if not equals or not name or not version:
            raise InvalidArgument(f"--assume must be BACKEND=VERSION or BACKEND=none, got {pair!r}")
        found[name] = None if version.lower() == "none" else version
        try:
            Version(found[name] or "0")
        except InvalidVersion:
            raise InvalidArgument(f"--assume {pair}: {version!r} is no version, such as 4.0.0b20 or none") from None
    return found or None


# --- building ---


def _device(on: str | None) -> torch.device:
    """Where the tensors are said to be: "meta" unless this machine's GPU is asked about."""
    return torch.device("cuda" if on is None and torch.cuda.is_available() else "meta")


def _problem(words: Words, device: torch.device) -> dict[str, Any]:
    """The arguments of ``attention`` for these words. One element of memory per tensor, at most."""
    w = words
    layout = w.layout or ("thd" if w.packed or w.lengths is not None else "bshd")
    _check_together(w, layout)
    lengths = w.lengths
    if lengths is None:
        lengths = (_SEQ if w.seq is None else w.seq,) * (1 if w.batch is None else w.batch)
    if layout == "thd":
        place: Any = None if device.type == "meta" else device
        packing = Packing.from_lengths(lengths, device=place)
        keys = Packing.from_lengths([w.seq_k] * len(lengths), device=place) if w.seq_k is not None else packing
        extra = _GAP_ROWS if w.gaps else 0
        leading_q: tuple[int, ...]
        leading_k: tuple[int, ...]
        leading_q, leading_k = (packing.rows + extra,), (keys.rows + extra,)
        packings: dict[str, Any] = {"packing": packing, "packing_kv": None if keys is packing else keys}
    else:
        seq = max(lengths, default=_SEQ) if w.seq is None else w.seq
        leading_q, leading_k = (len(lengths), seq), (len(lengths), seq if w.seq_k is None else w.seq_k)
        packings = {}
        if w.lengths is not None:
            packings["packing"] = Packing.from_lengths(lengths, device=None if device.type == "meta" else device)

    def tensor(*shape: int, dtype: torch.dtype = w.dtype, grad: bool = w.grad) -> Tensor:
        return torch.empty((), dtype=dtype, device=device).expand(shape).requires_grad_(grad)

    def as_layout(leading: Sequence[int], heads: int, dim: int) -> Tensor:
        shape = (*leading, heads, dim)
        order = {"sbhd": (1, 0, 2, 3), "bhsd": (0, 2, 1, 3)}.get(layout, range(len(shape)))
        return tensor(*(shape[i] for i in order))

    scores = (len(lengths), w.heads[0], leading_q[-1], leading_k[-1])
    return {
        "q": as_layout(leading_q, w.heads[0], w.head_dim[0]),
        "k": as_layout(leading_k, w.heads[1], w.head_dim[0]),
        "v": as_layout(leading_k, w.heads[1], w.head_dim[1]),
        "causal": "top_left" if w.top_left else w.causal,
        "window": w.window,
        "softcap": w.softcap,
        "sink": tensor(w.heads[0]) if w.sink else None,
        "alibi_slopes": tensor(w.heads[0], dtype=torch.float32, grad=False) if w.alibi else None,
        "bias": tensor(*scores, grad=w.bias_grad and w.grad) if w.bias or w.bias_grad else None,
        "mask": tensor(*scores, dtype=torch.bool, grad=False) if w.mask else None,
        "dropout": w.dropout,
        "layout": layout,
        "deterministic": w.deterministic or None,
        "return_lse": w.return_lse,
        **packings,
    }


def _check_together(w: Words, layout: str) -> None:
    if layout not in _LAYOUTS:
        raise InvalidArgument(f"--layout must be one of {', '.join(_LAYOUTS)}; got {layout!r}")
    if w.packed and layout != "thd":
        raise InvalidArgument(
            f"--packed is layout thd, got --layout {layout}: leave one out, or give --lengths for a padded batch"
        )
    if w.gaps and layout != "thd":
        raise InvalidArgument("--gaps goes with --packed; a padded batch is --lengths with a 4-D --layout")
    if w.lengths is not None:
        if w.batch is not None and w.batch != len(w.lengths):
            raise InvalidArgument(f"--batch {w.batch} does not fit {len(w.lengths)} --lengths: leave --batch out")
        if w.seq_k is not None:
            raise InvalidArgument("--seq-k does not go with --lengths, which are those of queries and keys alike")
        if w.seq is not None and layout == "thd":
            raise InvalidArgument("--seq does not go with packed --lengths: leave --seq out")


# --- saying it ---


def _said(w: Words, arguments: dict[str, Any]) -> str:
    """The problem in words, as it was understood."""
    packing = arguments.get("packing")
    dtype = {dtype: name for name, dtype in _DTYPES.items()}[w.dtype]
    if packing is None:
        dims = {"sbhd": (1, 0), "bhsd": (0, 2)}.get(arguments["layout"], (0, 1))
        batch, seq = (arguments["q"].shape[dim] for dim in dims)
        lengths = f"batch {batch}, seq {seq}" + (f" x {w.seq_k}" if w.seq_k is not None else "")
    else:
        numbers = packing.lengths.tolist()
        shown = ", ".join(map(str, numbers[:8])) + (f" ... ({len(numbers)} in all)" if len(numbers) > 8 else "")
        kind = "packed" if arguments["layout"] == "thd" else "padded"
        lengths = f"{kind}{' with gaps' if w.gaps else ''}, lengths {shown}"
        if w.seq_k is not None:
            lengths += f", keys {w.seq_k} each"
    heads, dims_ = ("/".join(map(str, pair if pair[0] != pair[1] else pair[:1])) for pair in (w.heads, w.head_dim))
    words = [dtype, lengths, f"heads {heads}", f"head_dim {dims_}"]
    if w.layout in ("sbhd", "bhsd"):
        words.append(f"layout {w.layout}")
    if w.causal or w.top_left:
        words.append("causal (top-left)" if w.top_left else "causal")
    if w.window is not None:
        words.append("window " + ",".join("none" if side is None else str(side) for side in w.window))
    words += [f"{name} {value:g}" for name, value in (("softcap", w.softcap), ("dropout", w.dropout)) if value]
    flags = {
        "sink": w.sink,
        "alibi": w.alibi,
        "bias": w.bias and not w.bias_grad,
        "bias with a gradient": w.bias_grad,
        "mask": w.mask,
        "deterministic": w.deterministic,
        "lse returned": w.return_lse,
    }
    words += [name for name, wanted in flags.items() if wanted]
    return ", ".join([*words, "forward and backward" if w.grad else "forward only"])


def _rows(explanation: Explanation) -> Iterator[tuple[str, str, str, str, str]]:
    for place, kernel in enumerate(explanation.candidates):
        yield str(kernel), "able" if place else "chosen", kernel.version, "; ".join(explanation.notes(kernel)), ""
    before = ""
    for name, reason in explanation.told():
        version = explanation.versions.get(name.partition(":")[0]) or "-"
        head = ("", "", "") if name == before else (name, "rejected", version)
        link = f" ({reason.link})" if reason.link else ""
        yield *head, f"{reason.detail}{link}", reason.remedy
        before = name


def _verdict(explanation: Explanation) -> str:
    kernel = explanation.forward
    if kernel is None:
        return "No backend takes this call: each says why, and what would lift it."
    return f"{kernel} {kernel.version} runs it: {get(kernel.backend).TITLE}."


def _world(on: str | None, assume: dict[str, str | None] | None, arch: int) -> str:
    target = f"sm{arch}" if arch else "cpu"
    words = f"On {target}, with the newest known version of each backend" if on else f"On this machine ({target})"
    if assume:
        words += ", assuming " + ", ".join(f"{name} {version or 'absent'}" for name, version in assume.items())
    return words + "."


def _data(explanation: Explanation, said: str) -> dict[str, Any]:
    """What --json prints."""
    rejected = {
        name: [dataclasses.asdict(reason) | {"text": reason.detail} for reason in reasons]
        for name, reasons in explanation.reasons()
    }
    return {
        "asked": said,
        "problem": dataclasses.asdict(explanation.problem),
        "chosen": explanation.chosen,
        "candidates": [
            {"kernel": str(k), "version": k.version, "notes": list(explanation.notes(k))}
            for k in explanation.candidates
        ],
        "rejected": rejected,
        "versions": dict(explanation.versions),
    }


_shape = partial(typer.Option, rich_help_panel="Shapes")
_what = partial(typer.Option, rich_help_panel="What is computed")
_where = partial(typer.Option, rich_help_panel="Where, and by what")


def explain(
    seq: Annotated[str | None, _shape(metavar="N", show_default="4096", help="Length of each sequence.")] = None,
    seq_k: Annotated[str | None, _shape(metavar="N", help="Length of the keys, where it differs.")] = None,
    heads: Annotated[str, _shape(metavar="N or N/KV", help="Heads, and kv heads where fewer: 32/8.")] = "32",
    head_dim: Annotated[
        str, _shape(metavar="D or D/DV", help="head_dim, and head_dim_v where it differs: 192/128.")
    ] = "128",
    batch: Annotated[str | None, _shape(metavar="N", show_default="1", help="Sequences.")] = None,
    dtype: Annotated[str, _shape(metavar="NAME", help="bf16, fp16, fp32 or fp64.")] = "bf16",
    layout: Annotated[
        str | None, _shape(metavar="NAME", show_default="bshd; thd when packed", help="bshd, sbhd, bhsd or thd.")
    ] = None,
    packed: Annotated[bool, _shape("--packed", help="A packed batch: all sequences in one row of tokens.")] = False,
    lengths: Annotated[
        str | None, _shape(metavar="N,N,...", help="Lengths of the sequences: packed, or padded with a 4-D --layout.")
    ] = None,
    gaps: Annotated[bool, _shape("--gaps", help="Rows outside every sequence, in a packed batch.")] = False,
    causal: Annotated[bool, _what("--causal", help="No key after the query's own position.")] = False,
    top_left: Annotated[bool, _what("--top-left", help="Causal, with positions counted from the start.")] = False,
    window: Annotated[
        str | None, _what(metavar="LEFT,RIGHT", help="Keys visible on either side, ints or none: 1023,0.")
    ] = None,
    softcap: Annotated[str | None, _what(metavar="X", help="softcap * tanh(score / softcap).")] = None,
    sink: Annotated[bool, _what("--sink", help="A learnable logit per head.")] = False,
    alibi: Annotated[bool, _what("--alibi", help="ALiBi slopes per head.")] = False,
    bias: Annotated[bool, _what("--bias", help="An additive bias.")] = False,
    bias_grad: Annotated[bool, _what("--bias-grad", help="An additive bias that gets a gradient.")] = False,
    mask: Annotated[bool, _what("--mask", help="A bool mask tensor.")] = False,
    dropout: Annotated[str, _what(metavar="P", help="Probability of dropping a weight.")] = "0",
    grad: Annotated[bool, _what("--grad/--no-grad", help="Training, or forward only.")] = True,
    deterministic: Annotated[bool, _what("--deterministic", help="Bitwise repeatable.")] = False,
    return_lse: Annotated[bool, _what("--return-lse", help="The log-sum-exp too.")] = False,
    on: Annotated[
        str | None,
        _where(metavar="TARGET", show_default="this machine", help=f"Ask about another device: {', '.join(TARGETS)}."),
    ] = None,
    assume: Annotated[
        list[str] | None,
        _where(
            metavar="BACKEND=VERSION", help="A version to assume, or none for absent: fa4=4.0.0b20. May be repeated."
        ),
    ] = None,
    backend: Annotated[
        str, _where(metavar="NAME", help="A backend, or several with commas: never another one.")
    ] = "auto",
    as_json: Annotated[bool, _where("--json", help="For machines.")] = False,
) -> None:
    """Show which kernel would run a problem, and why each other one would not. No GPU needed.

    For example: anyattn explain --seq 8192 --heads 32/8 --causal --window 1023,0 --on sm90

    Exit status: 0, or 1 if no backend takes the problem, or 2 if the problem makes no sense.
    """
    words = Words(
        seq=_count("--seq", seq),
        seq_k=_count("--seq-k", seq_k),
        heads=_pair("--heads", heads, "N or N/KV, like 32 or 32/8"),
        head_dim=_pair("--head-dim", head_dim, "D or D/DV, like 128 or 192/128"),
        batch=_count("--batch", batch),
        dtype=_dtype(dtype),
        causal=causal,
        top_left=top_left,
        window=_window(window),
        softcap=None if softcap is None else _number("--softcap", softcap),
        sink=sink,
        alibi=alibi,
        bias=bias,
        bias_grad=bias_grad,
        mask=mask,
        dropout=_number("--dropout", dropout),
        packed=packed,
        gaps=gaps,
        lengths=_lengths(lengths),
        layout=layout,
        grad=grad,
        deterministic=deterministic,
        return_lse=return_lse,
    )
    assumed = _assume(assume or ())
    arguments = _problem(words, _device(on))
    if on is None:
        with contextlib.redirect_stdout(sys.stderr):
            anyattn.backends()  # finds out which installed packages fail to import
    found = anyattn.explain(**arguments, backend=backend, on=on, assume=assumed)
    said = _said(words, arguments)
    if as_json:
        _render.show_json(_data(found, said))
    else:
        head = ("kernel", "verdict", "version", "why not, or a note", "what would lift it")
        _render.show(
            f"{said}.",
            _world(on, assumed, found.problem.arch),
            "",
            _render.heading(_verdict(found)),
            "",
            _render.table(head, _rows(found)),
            *([""] if found.closing() else []),
            *found.closing(),
        )
    if found.chosen is None:
        raise typer.Exit(1)
