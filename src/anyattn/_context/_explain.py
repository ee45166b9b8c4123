"""``plan.explain()``: what a plan does and costs, and what the other schemes would, in 100 columns."""

from __future__ import annotations

import string
import textwrap
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate

from anyattn._context import _cost, _simulate
from anyattn._context._data import Comm, Layout, Mask
from anyattn._context._estimate import Estimate
from anyattn._context._gpu import Gpu
from anyattn._context._plan_data import PlanData, check_features
from anyattn._errors import ContextError

WIDTH = 100
MOST_RANKS = 16
"""More are shown by the first and the last few."""
LETTERS = string.ascii_lowercase + string.ascii_uppercase
_STRIP = 48


def text(data: PlanData) -> str:
    """What ``plan.explain()`` returns."""
    gpu = _cost.default_gpu()
    estimates, refused = alternatives(data, gpu)
    own = _simulate.estimate(data, gpu)
    parts = [
        *_wrapped(_headline(data, own, estimates), ""),
        "",
        *_facts(data, own, gpu),
        "",
        "Who owns what: columns are the tokens of the batch, a letter marks a document's; then the ranges",
        *owners(data.queries),
        *(["", "Keys and values", *owners(data.keys)] if data.cross else []),
        "",
        *_ranks(data, gpu),
        "",
        *_schemes(data, own, estimates, refused),
        *_cannot(data),
        "",
        *_wrapped(f"Seconds are estimates for {gpu.name}, one layer: {gpu.source}.", ""),
    ]
    return "\n".join(parts)


# ---- the plan


def _headline(data: PlanData, own: Estimate, estimates: dict[Comm, Estimate]) -> str:
    """The scheme, and how it stands among the others."""
    topology = data.topology
    ranks = counted(topology.world, "rank")
    if data.comm == "a2a+p2p":
        ranks += f" ({topology.sequence} along the sequence, {topology.heads} sharing heads)"
    words = f"{data.comm} over {ranks}, this is rank {data.rank}: "
    if not set(estimates) - {data.comm}:
        return words + "no other scheme can serve this batch, for the reasons below."
    best = min(estimates, key=lambda comm: estimates[comm].forward + estimates[comm].backward)
    taken, least = own.forward + own.backward, estimates[best].forward + estimates[best].backward
    if best == data.comm or taken <= least:
        return words + "by estimate the cheapest of the schemes below."
    words += f"by estimate {best} is cheaper, {ms(least)} against {ms(taken)} forward and backward."
    if data.capacity is not None:
        words += " For plans of fixed capacity comm='auto' chooses by a full batch of the longest sequences."
    if best == "a2a" and data.given[0] is None:
        words += " Give num_heads=, without which comm='auto' does not take it."
    return words


def mask_words(mask: Mask) -> str:
    """A mask in words."""
    left, right, top_left = mask
    if left is None and not right:
        words = "causal" if right == 0 else "every key is seen"
    else:
        sides = ", ".join("unbounded" if side is None else str(side) for side in (left, right))
        words = f"window ({sides})"
    return words + (", top-left" if top_left else "")


def _facts(data: PlanData, own: Estimate, gpu: Gpu) -> list[str]:
    queries, shape = data.queries, data.shape
    whole, cut = whole_and_cut(queries)
    empty = len(queries.lengths) - whole - cut
    tokens, rows = sum(queries.lengths), queries.rows * queries.ranks
    kv = f"/{shape.num_kv_heads}" if shape.num_kv_heads != shape.num_heads else ""
    dim_v = f"/{shape.head_dim_v}" if shape.head_dim_v != shape.head_dim else ""
    heads = f"{shape.num_heads}{kv} heads of dim {shape.head_dim}{dim_v}, {shape.itemsize} bytes per element"
    assumed = (
        "" if data.given[0] is not None and data.given[2] is not None else ", assumed where the plan was given none"
    )
    areas = data.areas()
    cross = f", {counted(sum(data.keys.lengths), 'key')}" if data.cross else ""
    facts = {
        "batch": f"{counted(len(queries.lengths), 'document')}, {counted(tokens, 'token')}{cross}, "
        f"{mask_words(data.mask)}; {whole:,} whole on a rank, {cut:,} cut, {empty:,} empty",
        "shards": f"{counted(queries.rows, 'row')} on every rank, {rows - tokens:,} of all without a token; "
        f"placement {data.placement}",
        "work": f"imbalance {own.imbalance:.3f}: pairs of the busiest rank ({_simulate.busiest(data)}) over the mean, "
        f"{sum(areas) / len(areas):,.0f}",
        "received": f"{mib(own.bytes_forward)} forward, {mib(own.bytes_backward)} backward by the rank that receives "
        f"most; {heads}{assumed}",
        "predicted": f"{ms(own.forward)} forward, {ms(own.backward)} backward on {gpu.name}",
    }
    if data.features:
        facts["features"] = ", ".join(data.features)
    return [line for name, words in facts.items() for line in _wrapped(words, f"{name:<11}")]


def whole_and_cut(layout: Layout) -> tuple[int, int]:
    """How many documents lie whole on one rank, and how many are cut; empty ones are neither."""
    holders: dict[int, set[int]] = {}
    for rank, pieces in enumerate(layout.pieces):
        for piece in pieces:
            holders.setdefault(piece.document, set()).add(rank)
    cut = sum(1 for ranks in holders.values() if len(ranks) > 1)
    return len(holders) - cut, cut


def _ranks(data: PlanData, gpu: Gpu) -> list[str]:
    """What ranks do: all of few, of many the busiest, the first, the last and this one."""
    world = data.topology.world
    shown = range(world) if world <= MOST_RANKS else sorted({0, world - 1, data.rank, _simulate.busiest(data)})
    mean = sum(data.areas()) / world
    rows = []
    for found in (_simulate.facts_of(data, rank, gpu) for rank in shown):
        share = f"{found.pairs / mean:.3f}" if mean else "-"
        numbers = (found.tokens, found.pairs)
        moved = mib(found.bytes_forward), mib(found.bytes_backward)
        rows.append((str(found.rank), *(f"{n:,}" for n in numbers), share, str(found.stages), str(found.calls), *moved))
    head = ("rank", "tokens", "pairs", "of mean", "stages", "calls", "received forward", "backward")
    return columns([head, *rows])


def _schemes(data: PlanData, own: Estimate, estimates: dict[Comm, Estimate], refused: dict[Comm, str]) -> list[str]:
    """This plan beside every scheme with its best placement."""
    head = ("scheme", "forward", "backward", "received forward", "backward", "imbalance", "")
    rows = [head, (data.comm, *_row(own), "this plan")]
    others = {comm: cost for comm, cost in estimates.items() if comm != data.comm}
    rows += [(comm, *_row(cost), "with its best placement") for comm, cost in others.items()]
    lines = columns(rows, left=(0, 6))
    return lines + [line for comm, why in refused.items() for line in _wrapped(f"cannot: {why}", f"{comm:<12}")]


def _row(cost: Estimate) -> tuple[str, ...]:
    moved = mib(cost.bytes_forward), mib(cost.bytes_backward)
    return (ms(cost.forward), ms(cost.backward), *moved, f"{cost.imbalance:.3f}")


def _cannot(data: PlanData) -> list[str]:
    """What calls under this plan cannot ask."""
    reasons: dict[str, list[str]] = {}
    for name in ("alibi", "bias", "mask"):
        try:
            check_features(data, frozenset((name,)))
        except ContextError as error:
            reasons.setdefault(str(error).replace(name, "...", 1), []).append(name)
    if not reasons:
        return []
    lines = [f"{', '.join(names)}: {why.replace('...', names[0], 1)}" for why, names in reasons.items()]
    return ["", "Calls under this plan cannot have", *(part for line in lines for part in _wrapped(line, "  "))]


# ---- what other schemes would do


def refusal(data: PlanData, comm: Comm) -> str:
    """Why a scheme cannot serve this batch on these ranks; empty if it can."""
    if comm == "a2a+p2p" and data.comm != comm:
        return "it needs ranks in two dims: a mesh of (p2p, a2a)"
    shared = {"a2a": data.topology.world, "a2a+p2p": data.topology.heads}.get(comm, 1)
    if data.shape.num_heads % shared:
        assumed = "" if data.given[0] is not None else " (assumed: num_heads= was not given)"
        return f"{data.shape.num_heads} query heads{assumed} do not divide over {shared} ranks"
    try:
        check_features(replace(data, comm=comm), frozenset(data.features))
    except ContextError as error:
        return str(error)
    return ""


def alternatives(data: PlanData, gpu: Gpu) -> tuple[dict[Comm, Estimate], dict[Comm, str]]:
    """Estimates of all schemes that can serve the batch, each with its best placement; and why others cannot."""
    reasons = {comm: refusal(data, comm) for comm in _cost.PREFERRED}
    refused = {comm: why for comm, why in reasons.items() if why and comm != data.comm}
    allowed = [comm for comm, why in reasons.items() if not why]
    if not allowed:  # this plan's own heads are assumed ones that its ranks do not divide
        return {}, refused
    choice = _cost.choose(
        data.queries.lengths, data.topology.world, data.mask, data.shape, gpu, allowed,
        members=data.topology.heads if data.comm == "a2a+p2p" else 1, keys=data.keys if data.cross else None,
    )  # fmt: skip
    return choice.estimates, refused


# ---- pictures


def letter(document: int) -> str:
    """One letter for a document; after 52 documents they come again."""
    return LETTERS[document % len(LETTERS)]


def shown_ranks(ranks: int, most: int = MOST_RANKS) -> list[int | None]:
    """The ranks that are drawn; None stands for those left out."""
    if ranks <= most:
        return list(range(ranks))
    return [*range(most - 4), None, *range(ranks - 3, ranks)]


def owners(layout: Layout, width: int = WIDTH, most: int = MOST_RANKS) -> list[str]:
    """A line per rank: which parts of the batch it owns, as letters, then the ranges, as far as there is room."""
    lines = []
    label = len(str(layout.ranks - 1))
    starts = [0, *accumulate(layout.lengths)]
    for rank in shown_ranks(layout.ranks, most):
        if rank is None:
            lines.append(f"{'':>{label}}  ... {layout.ranks - most + 1} more ranks")
            continue
        line = f"{rank:>{label}}  {_strip(layout, rank, starts)}  "
        lines.append((line + _ranges(layout, rank, width - len(line))).rstrip())
    return lines


def _strip(layout: Layout, rank: int, starts: Sequence[int]) -> str:
    """The batch in equal parts: a document's letter where the rank owns a token, a dot where it owns none."""
    total = max(1, starts[-1])
    width = min(_STRIP, total)
    cells = ["."] * width
    for document, begin, end, _ in layout.pieces[rank]:
        first, last = starts[document] + begin, starts[document] + end - 1
        for cell in range(first * width // total, last * width // total + 1):
            cells[cell] = letter(document)
    return "".join(cells)


def _ranges(layout: Layout, rank: int, room: int) -> str:
    many = len(layout.lengths) > len(LETTERS)
    found = []
    for document, begin, end, _ in layout.pieces[rank]:
        name = f"{letter(document)}{document}" if many else letter(document)
        whole = (begin, end) == (0, layout.lengths[document])
        found.append(name if whole else f"{name}[{begin}:{end})")
    for count in range(len(found), 0, -1):
        line = " ".join(found[:count]) + (f" +{len(found) - count} more" if count < len(found) else "")
        if len(line) <= room:
            return line
    return counted(len(found), "piece") if found else "nothing"


# ---- where a token lies


class Owners:
    """Documents, positions and ranks of the tokens of a batch, by their number in it."""

    def __init__(self, layout: Layout) -> None:
        self.lengths = layout.lengths
        self.starts = [0, *accumulate(layout.lengths)]
        spans = sorted((self.starts[d] + b, r) for r, own in enumerate(layout.pieces) for d, b, _, _ in own)
        self._begins, self._ranks = [b for b, _ in spans], [r for _, r in spans]

    def at(self, token: int) -> tuple[int, int, int]:
        """(document, position, rank)."""
        document = bisect_right(self.starts, token) - 1
        return document, token - self.starts[document], self._ranks[bisect_right(self._begins, token) - 1]


def sampled(data: PlanData, rows: int, columns: int) -> list[tuple[int, list[int | None]]]:
    """A coarse picture of which queries see which keys: per row the rank of its query, and the ranks of the keys seen.

    Looks at one token in the middle of each row and column; None: the query does not see that key.
    """
    queries = Owners(data.queries)
    keys = queries if data.keys is data.queries else Owners(data.keys)
    total_q, total_k = queries.starts[-1], keys.starts[-1]
    if not total_q or not total_k:
        return []
    ends = [keys.at((2 * c + 1) * total_k // (2 * columns)) for c in range(columns)]
    picture = []
    for r in range(rows):
        document, position, rank = queries.at((2 * r + 1) * total_q // (2 * rows))
        n, m = queries.lengths[document], keys.lengths[document]
        here = position + (0 if data.mask.top_left else m - n)
        cells = [owner if d == document and _sees(data.mask, k - here) else None for d, k, owner in ends]
        picture.append((rank, cells))
    return picture


def _sees(mask: Mask, distance: int) -> bool:
    """Whether a query sees a key at this distance from its own position."""
    return (mask.left is None or -distance <= mask.left) and (mask.right is None or distance <= mask.right)


# ---- words


def counted(count: int, what: str) -> str:
    """So many of a thing."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def ms(seconds: float) -> str:
    """Milliseconds."""
    return f"{seconds * 1e3:,.3g} ms" if seconds < 0.1 else f"{seconds * 1e3:,.0f} ms"


def mib(moved: int) -> str:
    """MiB."""
    return f"{moved / 2**20:,.1f} MiB"


def _wrapped(words: str, label: str) -> list[str]:
    """Words behind a label, in lines of the width."""
    return textwrap.wrap(words, WIDTH, initial_indent=label, subsequent_indent=" " * len(label))


def columns(rows: Sequence[Sequence[str]], left: Iterable[int] = ()) -> list[str]:
    """Cells in columns, set right but for those named."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        [c.ljust(w) if i in set(left) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]
    return ["  ".join(row).rstrip() for row in aligned]
