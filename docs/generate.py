"""Write the parts of the documentation that the code itself says: ``python docs/generate.py [--check]``.

Each part stands between ``<!-- name -->`` and ``<!-- /name -->``. With ``--check`` nothing is written, and a part that
is not current is an error.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import anyattn
import backend_pages
import context_table
import figures
import transformers_table
from anyattn import _errors, _support
from anyattn.backends import ORDER
from tables import kernels

ROOT = Path(__file__).resolve().parent.parent

#: For each error, what to do about it, and calls that raise it, as (when, call). What they may name is in ``_names``.
ERRORS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "InvalidArgument": (
        "The call is wrong on every backend and machine: change it. Catch this class to catch all below it.",
        [
            ("a value outside its range", "anyattn.attention(q, q, q, dropout=1.0)"),
            ("a window side of -1: unbounded is None here", "anyattn.attention(q, q, q, window=(-1, 0))"),
            ("a layout that does not exist", 'anyattn.attention(q, q, q, layout="bhds")'),
            ("a tensor mask with packed rows", "anyattn.attention(rows, rows, rows, packing=packing, mask=mask)"),
        ],
    ),
    "ShapeError": (
        "Compare the shapes in the message with the layout: (batch, seq, heads, dim) unless `layout=` says otherwise.",
        [
            ("heads that do not divide", "anyattn.attention(q, q[:, :, :3], q[:, :, :3])"),
            ("a rank that is not the layout's", 'anyattn.attention(q[0], q[0], q[0], layout="bshd")'),
            ("a sink of another length", "anyattn.attention(q, q, q, sink=torch.zeros(3))"),
        ],
    ),
    "DtypeError": (
        "Cast. Nothing is cast for you but what `torch.autocast` casts.",
        [
            ("dtypes that differ", "anyattn.attention(q, q.half(), q)"),
            ("an additive mask", "anyattn.attention(q, q, q, mask=torch.zeros(16, 16))"),
            ("offsets that are not int32", "anyattn.Packing(torch.tensor([0, 5, 16]))"),
        ],
    ),
    "DeviceError": (
        "Move tensors with `.to(device)`, and a Packing with `Packing.to(device)`: once per batch, not in every layer.",
        [("tensors on several devices", 'anyattn.attention(q, q.to("meta"), q)')],
    ),
    "PackingError": (
        "The offsets are wrong, or belong to another batch. They are checked once, when the Packing is made; with "
        "`check=False` they are not, and you answer for them.",
        [
            ("packed rows without a packing", "anyattn.attention(rows, rows, rows)"),
            ("offsets that decrease", "anyattn.Packing(torch.tensor([0, 9, 5], dtype=torch.int32))"),
            ("a max_seqlen that is too small", "anyattn.Packing(packing.cu_seqlens, max_seqlen=4)"),
            ("a packing that ends past the tensor", "anyattn.attention(rows[:8], rows[:8], rows[:8], packing=packing)"),
            ("several sequences in one batch entry", "anyattn.attention(q[:1], q[:1], q[:1], packing=packing)"),
        ],
    ),
    "ContextError": (
        "The plan, the group or the scheme does not fit: make the plan as the message says, the same on every rank.",
        [
            ("heads that the ranks cannot share", "anyattn.ContextParallel((3, 0), 'a2a').plan(64, num_heads=4)"),
            (
                "a plan for another mask",
                "anyattn.attention(q, q, q, window=(3, 0), plan=anyattn.ContextParallel((1, 0)).plan(16))",
            ),
        ],
    ),
    "UnknownBackend": (
        "Use one of the names in the message. The name may also come from `use()` or from `ANYATTN_BACKEND`.",
        [
            ("a backend that does not exist", 'anyattn.attention(q, q, q, backend="fa5")'),
            ("a kernel that does not exist", 'anyattn.attention(q, q, q, backend="torch:math")'),
        ],
    ),
    "NoBackend": (
        "Take one of the remedies, or allow more backends. `error.explanation` is what `anyattn.explain` returns for "
        'the same call ([how to read it](choosing.md#reading-the-table)). With `backend="auto"` this does not happen '
        "on a CPU or an NVIDIA GPU of compute capability 7.0 or more: `reference` takes every valid call there.",
        [("the named kernel cannot", 'anyattn.attention(q, q, q, softcap=30.0, backend="torch:cpu")')],
    ),
    "Unsupported": (
        "Call it in another way, as the message says.",
        [("torch.func transforms", "torch.vmap(lambda x: anyattn.attention(x, x, x))(q[None])")],
    ),
}


def _names() -> dict[str, Any]:
    q = torch.zeros(2, 16, 4, 64)
    packing = anyattn.Packing.from_lengths([7, 9])
    return {
        "torch": torch, "anyattn": anyattn, "q": q, "rows": q[0], "packing": packing,
        "mask": torch.ones(16, 16, dtype=torch.bool),
    }  # fmt: skip


def errors() -> str:
    """Every error, as it is raised here and now."""
    sections = []
    for name, (remedy, cases) in ERRORS.items():
        kind = getattr(anyattn, name)
        shown = [f"# {when}\n>>> {call}\n{name}: {_message(kind, call)}" for when, call in cases]
        examples = "\n\n".join(shown)
        text = textwrap.fill(f"{_first_line(kind)} {remedy}", 120, break_long_words=False, break_on_hyphens=False)
        sections.append(f"### {name}\n\n{text}\n\n```text\n{examples}\n```")
    return "\n\n".join(sections)


def tree() -> str:
    """The exceptions, as ``_errors.py`` draws them."""
    drawing = re.search(r"^::\n\n(.*?)\n\n(?=\S)", inspect.getdoc(_errors) or "", re.DOTALL | re.MULTILINE)
    assert drawing is not None
    return f"```text\n{textwrap.dedent(drawing[1])}\n```"


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]


def _message(kind: type[Exception], call: str) -> str:
    try:
        eval(call, _names())
    except anyattn.AnyattnError as error:
        if type(error) is kind:
            return str(error)
        raise
    raise AssertionError(f"{call} raises nothing")


def explanation() -> str:
    """What README's example of ``explain`` prints."""
    q = torch.empty(1, 8192, 32, 128, dtype=torch.bfloat16, device="meta", requires_grad=True)
    k = torch.empty(1, 8192, 8, 128, dtype=torch.bfloat16, device="meta", requires_grad=True)
    return f"```text\n{anyattn.explain(q, k, k, causal=True, window=(1023, 0), on='sm90')}\n```"


def sanitize() -> str:
    """What ``sanitize=True`` costs, by kernel."""
    able = [(kernel, c) for name in ORDER for kernel, c in kernels(name) if "gaps" in c.features]
    free = ", ".join(f"`{kernel}`" for kernel, c in able if c.ignores_gaps)
    others = ", ".join(f"`{kernel}`" for kernel, c in able if not c.ignores_gaps)
    told = (
        f"It costs nothing with {free}, whose valid rows padding does not reach, and a pass over q, k, v with {others}."
    )
    return textwrap.fill(told, 120)


PARTS: dict[str, Callable[[], str]] = {
    "support": _support.markdown_table,
    "matrix": backend_pages.matrix,
    "speed": figures.speed,
    "speed-summary": figures.speed_summary,
    "context-figures": figures.context,
    "context-replayed": figures.replayed,
    "context-kernels": context_table.table,
    "transformers-speed": figures.transformers_speed,
    "backends": partial(backend_pages.table_of_backends, ""),
    "sanitize": sanitize,
    "tree": tree,
    "explain": explanation,
    "errors": errors,
    "transformers-cases": transformers_table.cases,
}
for _name in ORDER:
    PARTS |= backend_pages.parts(_name)


def regenerate(text: str) -> str:
    """A page with each of its generated parts made anew."""
    for name, make in PARTS.items():
        part = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if part.search(text):
            made = make().rstrip()
            text = part.sub(lambda m: f"{m[1]}{made}\n{m[2]}", text)  # noqa: B023
    return text


def pages() -> list[Path]:
    """Every page of the documentation."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def stale() -> list[Path]:
    """The pages with a part that is not current."""
    return [page for page in pages() if (text := page.read_text("utf-8")) != regenerate(text)]


def begin_pages() -> list[Path]:
    """Write the pages of backends that have none, without prose."""
    begun = []
    for name in ORDER:
        page = ROOT / "docs" / "backends" / f"{name}.md"
        if not page.exists():
            page.write_text(backend_pages.skeleton(name), "utf-8")
            begun.append(page)
    return begun


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a part is not current")
    check = parser.parse_args().check
    if not check:
        begin_pages()
    found = stale()
    for page in found:
        if not check:
            page.write_text(regenerate(page.read_text("utf-8")), "utf-8")
        print(f"{page.relative_to(ROOT)}: {'not current, run: make docs' if check else 'written'}")
    return 1 if check and found else 0


if __name__ == "__main__":
    sys.exit(main())
