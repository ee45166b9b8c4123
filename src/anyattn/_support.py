"""What each kernel can do, as tables made from the declared capabilities: for ``anyattn doctor`` and the docs.

``support_rows`` is features x kernels, ``kernel_facts`` what holds for a kernel as a whole, ``markdown_table`` both,
as the documentation shows them. None of it looks at what is installed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from anyattn._capability import BACKWARD_ONLY, FAMILY_NAMES, FEATURE_NAMES, Capability, HeadDims, Row, Support
from anyattn.backends import ORDER, get

#: Features that the core gives to every kernel: from out and lse, or through one more column of v.
_FROM_CORE = ("sink", "lse_grad")
_ANY_DIM = 1 << 16

#: What the words in the cells mean, in the order in which they are explained.
LEGEND = {
    "yes": "forward and backward",
    "forward": "forward only: no gradients",
    "since": "from this version of the kernel's package on",
    "with flag": "while torch.use_deterministic_algorithms(True) is on, which the kernel reads itself",
    "no": "the kernel is passed over, with a reason",
}


@dataclass(frozen=True, slots=True)
class SupportRow:
    """One feature, and what each kernel makes of it."""

    feature: str
    """The name by which capabilities declare it."""
    title: str
    """How it is called in front of people."""
    cells: tuple[tuple[str, str], ...]
    """(kernel, "yes", "forward", "since 4.0.0b9", "with flag", "no" ...), in the order of preference."""


@dataclass(frozen=True, slots=True)
class KernelFacts:
    """What holds for one kernel whatever the feature."""

    kernel: str
    """"fa4", "torch:flash" ..."""
    package: str
    families: tuple[int, ...]
    """Generations of ``devices``, 0 the CPU."""
    devices: str
    dtypes: str
    head_dims: str
    backward: str
    notes: tuple[str, ...]
    """Rules and known defects that no cell expresses, a line each."""


def _kernels() -> Iterator[tuple[str, Capability]]:
    for name in ORDER:
        for capability in get(name).CAPABILITIES:
            yield (f"{name}:{capability.kernel}" if capability.kernel else name), capability


def _devices(families: Sequence[int]) -> str:
    return ", ".join(FAMILY_NAMES[family] for family in families)


def support_rows() -> list[SupportRow]:
    """Features x kernels, every feature that a problem can ask for.

    Example::

        >>> row = {r.feature: r for r in support_rows()}["softcap"]
        >>> dict(row.cells)["reference"]
        'yes'
    """
    kernels = list(_kernels())
    return [
        SupportRow(feature, title, tuple((kernel, _cell(capability, feature)) for kernel, capability in kernels))
        for feature, title in FEATURE_NAMES.items()
    ]


def _cell(capability: Capability, feature: str) -> str:
    support = Support() if feature in _FROM_CORE else capability.features.get(feature)
    forward_only = support is not None and (not support.backward or capability.backward_families == ())
    if support is None or (forward_only and feature in BACKWARD_ONLY):
        return "no"
    if feature in BACKWARD_ONLY:
        since, later = support.backward_since or support.since, None
        families, fewer = support.backward_families or support.families, None
    else:
        since, later = support.since, None if forward_only else support.backward_since
        families, fewer = support.families, None if forward_only else support.backward_families
    words = [f"since {since}"] if since else []
    if later and later != since:
        words.append(f"backward since {later}")
    if families:
        words.append(f"{_devices(families)} only")
    if fewer and fewer != families:
        words.append(f"backward on {_devices(fewer)}")
    if feature == "deterministic" and capability.reads_torch_flag:
        words.append("with flag")
    if forward_only:
        words.insert(0, "forward")
    elif not words or not (since or families or "with flag" in words):
        words.insert(0, "yes")
    return ", ".join(words)


def kernel_facts() -> list[KernelFacts]:
    """Devices, dtypes, head dims and rules of every kernel, the preferred first."""
    return [
        KernelFacts(
            kernel,
            capability.package,
            capability.families,
            _devices(capability.families),
            ", ".join(capability.dtypes),
            _head_dims(capability.head_dims),
            _backward(capability),
            tuple(dict.fromkeys(_note(row) for row in capability.rows)),
        )
        for kernel, capability in _kernels()
    ]


def _head_dims(dims: HeadDims) -> str:
    words = "any" if dims.maximum >= _ANY_DIM else f"to {dims.maximum}"
    if dims.multiple_of > 1:
        words += f", {'padded to ' if dims.pads else ''}multiples of {dims.multiple_of}"
    if dims.maximum_v is not None:
        words += f"; head_dim_v to {dims.maximum_v}"
    if dims.maximum_backward is not None and dims.maximum_backward < dims.maximum:
        words += f"; backward to {dims.maximum_backward}"
    return words


def _backward(capability: Capability) -> str:
    if capability.backward_families is None:
        return "yes"
    return _devices(capability.backward_families) or "no"


def _note(row: Row) -> str:
    """A rule in one line; ``got`` is left out, for no problem is at hand."""
    reason = row.reason
    words = f"{reason.what}: needs {reason.needs}"
    if row.direction == "backward" and "backward" not in words:
        words += ", in backward"
    when = [f"from {row.since} on"] if row.since else []
    when += [f"before {row.fixed}"] if row.fixed and row.fixed not in words else []
    if when:
        words = f"{' and '.join(when)}, {words}"
    return f"{words} ({reason.link})" if reason.link else words


def legend() -> list[tuple[str, str]]:
    """The words that occur in the cells, each with its meaning."""
    parts = {part for row in support_rows() for _, text in row.cells for part in text.split(", ")}
    return [(word, meaning) for word, meaning in LEGEND.items() if any(part.startswith(word) for part in parts)]


def markdown_table() -> str:
    """The support table as markdown: features, then kernels, then the legend and every rule as notes."""
    rows, facts = support_rows(), kernel_facts()
    features = [("", *(fact.kernel for fact in facts))]
    features += [(row.title, *(text for _, text in row.cells)) for row in rows]
    kernels = [("kernel", "runs on", "dtypes", "head_dim", "backward")]
    kernels += [(fact.kernel, fact.devices, fact.dtypes, fact.head_dims, fact.backward) for fact in facts]
    notes = [f"- **{word}**: {meaning}" for word, meaning in legend()]
    notes += [f"- `{fact.kernel}`: {note}" for fact in facts for note in fact.notes]
    return "\n\n".join([_markdown(features), _markdown(kernels), "\n".join(notes)]) + "\n"


def _markdown(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows, the first one the head, as an aligned markdown table."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
