"""Lengths of sequences in words or files, as ``anyattn plan`` takes them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from math import log
from pathlib import Path
from typing import Any

from anyattn._errors import InvalidArgument

_FORMS = (
    '"64k" (one sequence), "4x16k" (several), such items with commas between, '
    '"lognormal:mean=2k,longest=16k,total=64k" (sigma=1 unless said), or a file of lengths '
    "(one per line, or a JSON list)"
)
_SIZE = re.compile(r"(\d+)([kmg]?)", re.IGNORECASE)
_POWER = {"": 0, "k": 10, "m": 20, "g": 30}


def size_of(text: str, what: str) -> int:
    """An int; "k", "m" and "g" are powers of 1024.

    Raises:
        InvalidArgument: anything else.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise InvalidArgument(f"{what} must be an int >= 0, such as 4096, 64k or 1m; got {text!r}")
    return int(found[1]) << _POWER[found[2].lower()]


def lengths_of(text: str, tokens: int | None = None, seed: int = 0) -> tuple[int, ...]:
    """Lengths of sequences from words or a file.

    Args:
        text: a distribution, or the path of a file; a file that exists is read, whatever its name means.
        tokens: how many in all: lengths are repeated, or drawn, until they are reached; the last one is cut.
        seed: of what is drawn.

    Raises:
        InvalidArgument: none of the forms.
    """
    path = Path(text)
    if path.is_file():
        return _filled(_of_file(path), tokens, text)
    name, colon, rest = text.partition(":")
    if colon and name == "lognormal":
        return _lognormal(rest, tokens, seed)
    items = [re.fullmatch(r"(?:(\d+)x)?(\d+[kmg]?)", item.strip(), re.IGNORECASE) for item in text.split(",")]
    if not all(items):
        raise InvalidArgument(f"--lengths must be {_FORMS}; got {text!r}, which is no file either")
    found = [size_of(item[2], "--lengths") for item in items if item for _ in range(int(item[1] or 1))]
    return _filled(found, tokens, text)


def _of_file(path: Path) -> list[int]:
    wanted = "ints >= 0, one per line or as one JSON list"
    try:
        content = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"--lengths {path} must hold {wanted}, as UTF-8 text: {error}") from None
    try:
        found = json.loads(content) if content.lstrip().startswith("[") else _words(content)
    except json.JSONDecodeError as error:
        raise InvalidArgument(f"--lengths {path} must hold {wanted}; as JSON it ends in {error}") from None
    wrong = next((n for n in found if type(n) is not int or n < 0), None)
    if wrong is not None:
        raise InvalidArgument(f"--lengths {path} must hold {wanted}; got {wrong!r}")
    if not found:
        raise InvalidArgument(f"--lengths {path} holds no length: write ints >= 0, one per line or as one JSON list")
    return found


def _words(content: str) -> list[Any]:
    """Ints, and what is none as it stands."""
    return [int(word) if re.fullmatch(r"[+-]?\d+", word) else word for word in content.split()]


def _filled(lengths: Sequence[int], tokens: int | None, given: str) -> tuple[int, ...]:
    """As they are, or repeated up to so many tokens."""
    if tokens is None:
        return tuple(lengths)
    if not any(lengths):
        raise InvalidArgument(f"--tokens needs lengths that are not all 0, got --lengths {given}")
    return _up_to(tokens, (n for _ in iter(int, 1) for n in lengths))


def _up_to(tokens: int, lengths: Iterable[int]) -> tuple[int, ...]:
    found, left = [], tokens
    for length in lengths:
        if not left:
            break
        found.append(min(length, left))
        left -= found[-1]
    return tuple(found)


def _lognormal(text: str, tokens: int | None, seed: int) -> tuple[int, ...]:
    """Drawn with this mean, then cut at the longest; at least 1."""
    given = dict(item.strip().partition("=")[::2] for item in text.split(",")) if text else {}
    unknown = sorted(set(given) - {"mean", "longest", "total", "sigma"})
    if unknown or "mean" not in given:
        wrong = f"unknown {', '.join(unknown)}" if unknown else "no mean"
        raise InvalidArgument(f"--lengths lognormal: takes mean=, longest=, total= and sigma=; {wrong} in {text!r}")
    if ("total" in given) == (tokens is not None):
        raise InvalidArgument("--lengths lognormal: needs either total= or --tokens, and not both")
    mean = size_of(given["mean"], "mean")
    longest = size_of(given["longest"], "longest") if "longest" in given else None
    total = size_of(given["total"], "total") if tokens is None else tokens
    try:
        sigma = float(given.get("sigma", "1"))
    except ValueError:
        sigma = -1.0
    if sigma <= 0 or mean < 1 or longest == 0:
        raise InvalidArgument(f"--lengths lognormal: needs a mean and longest >= 1 and a sigma > 0; got {text!r}")
    draw, centre = random.Random(seed), log(mean) - sigma * sigma / 2

    def drawn() -> Iterator[int]:
        while True:
            length = max(1, round(draw.lognormvariate(centre, sigma)))
            yield length if longest is None else min(longest, length)

    return _up_to(total, drawn())
