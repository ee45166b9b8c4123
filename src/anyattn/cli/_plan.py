"""``anyattn plan``: what context parallelism would cost for a batch, on machines that are not here."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from anyattn._context import _explain as words
from anyattn._context import _lengths, _simulate
from anyattn._context._data import Comm, Entry, Shape, Stage
from anyattn._context._explain import counted
from anyattn._context._gpu import GPUS
from anyattn._context._parallel import PLACEMENTS
from anyattn._context._plan_data import PlanData
from anyattn._context._simulate import Batch, Machine, Scheme, Simulation
from anyattn._context._topology import COMMS
from anyattn._environment import module_exists
from anyattn._errors import ContextError, InvalidArgument, MissingExtra
from anyattn.cli import _render
from anyattn.cli._explain import _pair, _window

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_GRID = (24, 72)
_MOST_CALLS = 12
_MOST_ENTRIES = 4

# --- reading ---


def _batch(
    lengths: str, tokens: str | None, seed: int, heads: str, kv_heads: str | None, head_dim: str, causal: bool,
    window: str | None, placement: str,
) -> Batch:  # fmt: skip
    total = None if tokens is None else _lengths.size_of(tokens, "--tokens")
    found = _lengths.lengths_of(lengths, total, seed)
    if placement not in PLACEMENTS:
        raise InvalidArgument(f"--placement must be one of {', '.join(PLACEMENTS)}; got {placement!r}")
    query, key = _pair("--heads", heads, "N or N/KV, like 32 or 32/8")
    if kv_heads is not None:
        if "/" in heads:
            raise InvalidArgument(f"--heads {heads} says the kv heads already: leave --kv-heads out")
        key = _lengths.size_of(kv_heads, "--kv-heads")
    shape = Shape(query, key, *_pair("--head-dim", head_dim, "D or D/DV, like 128 or 192/128"))
    if min(query, key, shape.head_dim, shape.head_dim_v) < 1 or query % key:
        raise InvalidArgument(
            f"heads and head dims must be >= 1, and heads a multiple of kv heads; got {query}/{key} heads of dim "
            f"{head_dim}"
        )
    return Batch(found, causal, _window(window), shape, placement)


def _machine(ranks: str, gpu: str, per_node: str, network: str | None, hierarchical: bool) -> Machine:
    count, per_host = _lengths.size_of(ranks, "--ranks"), _lengths.size_of(per_node, "--gpus-per-node")
    if gpu not in GPUS:
        raise InvalidArgument(f"--gpu must be one of {', '.join(GPUS)}; got {gpu!r}")
    if not 1 <= count <= 65536 or per_host < 1:
        raise InvalidArgument(f"--ranks must be 1 to 65536 and --gpus-per-node >= 1, got {ranks} and {per_node}")
    machine = Machine(count, GPUS[gpu], per_host, hierarchical=hierarchical)
    if network is None:
        return machine
    try:
        rate = float(network) * 1e9
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise InvalidArgument(f"--network must be a number > 0, in GB per second and GPU; got {network!r}")
    if not machine.several_hosts:
        raise InvalidArgument(
            f"--network goes with several hosts: {counted(count, 'rank')} fit one of --gpus-per-node {per_host}"
        )
    return dataclasses.replace(machine, network=rate)


# --- saying it ---


def _schemes(found: Simulation, batch: Batch) -> Any:
    """A column per scheme: the words beside the figures say what they are of."""
    columns = [_figures(found, batch, comm) for comm in found.schemes]
    head = ("", *(f"{comm}, chosen" if comm == found.chosen else comm for comm in found.schemes))
    rows = zip(("imbalance", *_MOST, *_SLOWEST), *columns, strict=True)
    by_heads = any(scheme.memory.exchanged for scheme in found.schemes.values())
    return _render.table(head, [row for row in rows if by_heads or row[0] != _EXCHANGED])


_EXCHANGED = "  heads exchanged: q, k, v, out, gradients"
_MOST = (
    "most of any rank: received, forward",
    "most of any rank: received, backward",
    "most of any rank: kernel calls, forward",
    "most of any rank: extra memory, namely",
    "  keys of other ranks, and their gradients",
    "  partial results, and float32 sums of them",
    _EXCHANGED,
)
_SLOWEST = (
    "slowest rank: predicted, forward",
    "slowest rank: predicted, backward",
    "tokens/s, this layer's attention",
    "efficiency",
)


def _figures(found: Simulation, batch: Batch, comm: Comm) -> tuple[str, ...]:
    """Of one scheme, as they are named there."""
    scheme = found.schemes[comm]
    cost, memory = scheme.estimate, scheme.memory
    moved, held = (cost.bytes_forward, cost.bytes_backward), (memory.total, *memory)
    seconds, last = (cost.forward, cost.backward), (f"{_pace(batch, scheme):,.0f}", f"{found.share(comm):.2f}")
    first = f"{scheme.plan.imbalance:.3f}", *map(words.mib, moved), str(cost.calls)
    return *first, *map(words.mib, held), *map(words.ms, seconds), *last


def _pace(batch: Batch, scheme: Scheme) -> float:
    """Tokens per second through one layer's attention, forward and backward."""
    taken = scheme.estimate.forward + scheme.estimate.backward
    return sum(batch.lengths) / taken if taken else 0.0


def _said(batch: Batch, machine: Machine, seed: int) -> list[str]:
    shape, lengths, mask = batch.shape, batch.lengths, words.mask_words(batch.mask)
    lines = [
        f"{counted(len(lengths), 'sequence')}, {counted(sum(lengths), 'token')} (longest {max(lengths, default=0):,}, "
        f"seed {seed}), {mask}, heads {shape.num_heads}/{shape.num_kv_heads}, head_dim "
        f"{shape.head_dim}/{shape.head_dim_v}, placement {batch.placement}, on {machine.ranks} x {machine.gpu.name}.",
    ]
    if machine.several_hosts:
        lines.append(
            f"{counted(machine.per_host, 'GPU')} a host. Between hosts a GPU receives {machine.network / 1e9:g} GB/s: "
            "given by --network, else assumed (400 Gbit/s), not measured. An exchange among ranks of several hosts is "
            "timed as if all that it brings came from other hosts, though part of it comes from the same one."
        )
    return lines


def _legend(found: Simulation, machine: Machine) -> list[str]:
    """What the names in the table mean, a line each."""
    gpu = machine.gpu
    return [
        "imbalance: pairs of a query and a key that it sees, of the rank with most, over the mean; 1.000 is even.",
        "received: keys, values and gradients that come from other ranks, and what an exchange of heads brings.",
        "kernel calls: over all stages and groups of heads.",
        "extra memory: most held at once in a forward and its backward, beside inputs, outputs and their gradients. "
        "Not counted: the kernel's own workspace. Of more than 16 ranks, those whose keys travel most are looked at.",
        "predicted: seconds of one layer's attention; nothing else of a model is in it.",
        "tokens/s, this layer's attention: the batch's tokens over those seconds, forward and backward together.",
        "efficiency: one GPU's predicted seconds for the whole batch, over the slowest rank's times the number of "
        "ranks; 1.00 is a perfect division.",
        "Exact, from the plans: imbalance, the rows of every rank, and the rank shown below. All else is estimated. "
        f"Figures of {gpu.name}: {gpu.source}.",
    ]


def _notes(found: Simulation, batch: Batch, machine: Machine, comm: str) -> list[str]:
    """What to do about it."""
    scheme = found.schemes[found.chosen]
    lines = _two_dims(found, batch, machine) if comm == "auto" else []
    if found.auto and found.auto != found.chosen and machine.hierarchical:
        lines.append(
            f"On this mesh of two dims ContextParallel(comm='auto') takes {found.auto}. To have {found.chosen}, pass "
            f"comm={found.chosen!r} on the flattened mesh: ContextParallel(mesh._flatten(), comm={found.chosen!r})."
        )
    elif found.auto and found.auto != found.chosen:
        lines.append(
            f"ContextParallel(comm='auto') takes {found.auto}: it decides by the figures of h200 within one host. Pass "
            f"comm={found.chosen!r} to have {found.chosen}."
        )
    if scheme.plan.imbalance > 1.05 and batch.placement != "auto":
        lines.append("placement='auto' levels work and tokens.")
    return lines


def _two_dims(found: Simulation, batch: Batch, machine: Machine) -> list[str]:
    """What a2a+p2p would do on the same hosts, where it was not asked for and they can be laid out so."""
    if machine.hierarchical or not machine.several_hosts or machine.ranks % machine.per_host:
        return []
    try:
        other = _simulate.simulate(batch, dataclasses.replace(machine, hierarchical=True), "a2a+p2p")
    except ContextError:  # its heads do not divide over a host's ranks
        return []
    share, here = other.share("a2a+p2p"), found.share(found.chosen)
    cost = other.schemes["a2a+p2p"].estimate
    return [
        "Not in the table, --hierarchical shows it: a2a+p2p, heads divided within a host and the sequence over hosts, "
        f"by a mesh of two dims: efficiency {share:.2f} against {here:.2f} of {found.chosen}, "
        f"{words.ms(cost.forward)} forward, {words.ms(cost.backward)} backward."
    ]


def _entries(data: PlanData) -> list[Any]:
    """Which queries meet which keys: coarse, over all ranks, where a digit can name a rank."""
    if data.topology.world > len(_DIGITS):
        return []
    picture = words.sampled(data, *_GRID)
    if not picture:
        return []
    lines: list[Any] = [
        _render.heading(f"{data.comm}: who meets whom"),
        "A row is a part of the queries, in order, labelled by its rank; a column a part of the keys. A cell names the "
        "rank that the keys come from; blank: not seen.",
        "",
    ]
    for rank, cells in picture:
        line = Text(f"{_DIGITS[rank]} |")
        for cell in cells:
            line.append(" " if cell is None else _DIGITS[cell], style="bold green" if cell == rank else "dim")
        lines.append(line)
    return [*lines, ""]


def _busiest(scheme: Scheme) -> list[Any]:
    """The entries of the busiest rank, stage by stage."""
    data, facts = scheme.plan._data, scheme.busiest
    stages = data.stages_of(facts.rank, alibi=False).stages
    rows: list[tuple[str, ...]] = []
    for number, stage in enumerate(stages):
        for call in stage.calls:
            entries = [f"{words.letter(d)}: {_entry(e)}" for d, e in zip(call.documents, call.entries, strict=True)]
            more = f" +{len(entries) - _MOST_ENTRIES} more" if len(entries) > _MOST_ENTRIES else ""
            sides = "/".join("-" if side is None else str(side) for side in (call.left, call.right))
            rows.append((str(number), _arriving(stage), sides, ", ".join(entries[:_MOST_ENTRIES]) + more))
    shown = rows[:_MOST_CALLS]
    if len(rows) > len(shown):
        shown.append(("...", f"{len(rows) - len(shown)} more", "", ""))
    head = ("stage", "key rows", "window", "entries: query rows x key rows of the stage, bottom-right")
    return [
        _render.heading(f"{data.comm}: rank {facts.rank}, which computes most"),
        f"The rank with most pairs; others may receive more, which the table says. {counted(facts.tokens, 'token')}, "
        f"{counted(facts.pairs, 'pair')}, {counted(facts.calls, 'kernel call')} per group of heads in "
        f"{counted(facts.stages, 'stage')}. This rank receives {words.mib(facts.bytes_forward)} forward and "
        f"{words.mib(facts.bytes_backward)} backward.",
        "",
        _render.table(head, shown),
        "",
    ]


def _arriving(stage: Stage) -> str:
    if stage.local:
        return "own"
    sources = [rank for rank, count in enumerate(stage.receive) if count]
    names = ", ".join(map(str, sources[:3])) + (" ..." if len(sources) > 3 else "")
    return f"{stage.rows:,} from {names}" if sources else "none"


def _entry(entry: Entry) -> str:
    q, n, k, m = entry
    return f"{q}:{q + n} x {k}:{k + m}"


def _report(found: Simulation, batch: Batch, machine: Machine, seed: int, comm: str) -> None:
    scheme = found.schemes[found.chosen]
    data = scheme.plan._data
    owners: list[Any] = [
        _render.heading(f"{found.chosen}: who owns what"),
        f"{counted(data.queries.rows, 'row')} a rank. Columns are the tokens of the batch, a letter marks a "
        "document's; then the ranges.",
        "",
        *(Text(line) for line in words.owners(data.queries)),
        "",
    ]
    _render.show(
        *_said(batch, machine, seed),
        "",
        _schemes(found, batch),
        *(f"{each} cannot: {why}" for each, why in found.refused.items()),
        *_notes(found, batch, machine, comm),
        "",
        *_legend(found, machine),
        "",
        *owners,
        *_entries(data),
        *_busiest(scheme),
    )


def _data(found: Simulation, batch: Batch, machine: Machine, seed: int) -> dict[str, Any]:
    """What --json writes."""
    schemes = {
        comm: {
            "rows": scheme.plan.rows,
            "imbalance": scheme.plan.imbalance,
            "bytes_moved": scheme.plan.bytes_moved,
            "tokens_per_second": _pace(batch, scheme),
            "of_perfect": found.share(comm),
            "estimate": dataclasses.asdict(scheme.estimate),
            "busiest_rank": scheme.busiest._asdict(),
            "extra_memory": {"total": scheme.memory.total, **scheme.memory._asdict()},
            "pieces": _pieces(scheme),
        }
        for comm, scheme in found.schemes.items()
    }
    return {
        "batch": dataclasses.asdict(batch),
        "seed": seed,
        "machine": dataclasses.asdict(machine),
        "chosen": found.chosen,
        "auto": found.auto or None,
        "refused": dict(found.refused),
        "schemes": schemes,
    }


def _pieces(scheme: Scheme) -> list[list[list[int]]]:
    """By rank: [document, begin, end, row]."""
    return [[list(piece) for piece in own] for own in scheme.plan._data.queries.pieces]


def _write(target: str, data: dict[str, Any]) -> None:
    if target == "-":
        _render.show_json(data)
        return
    Path(target).write_text(json.dumps(data) + "\n", encoding="utf-8")


def _check_targets(json_to: str | None, picture: Path | None) -> None:
    """Before anything is planned."""
    if json_to is not None and json_to != "-":
        _check_folder("--json", Path(json_to))
    if picture is None:
        return
    if picture.suffix not in (".svg", ".png"):
        raise InvalidArgument(f"--picture must end in .svg or .png, got {picture}")
    _check_folder("--picture", picture)
    if not module_exists("matplotlib"):
        raise MissingExtra("anyattn plan --picture", "cli,plot", "matplotlib")


def _check_folder(option: str, path: Path) -> None:
    if not path.parent.is_dir():
        raise InvalidArgument(f"{option} {path}: there is no folder {path.parent}")


def _draw(target: Path, found: Simulation) -> None:
    from anyattn.cli import _plan_picture

    _plan_picture.draw(target, found.schemes[found.chosen].plan._data)


_what = partial(typer.Option, rich_help_panel="The batch")
_where = partial(typer.Option, rich_help_panel="The machine")
_output = partial(typer.Option, rich_help_panel="Output")


def plan(
    lengths: Annotated[
        str,
        _what(metavar="FILE or WORDS", help="64k, 4x16k, 8k,3x2k, lognormal:mean=2k,longest=16k,total=64k or a file."),
    ],
    ranks: Annotated[str, _where(metavar="N", help="GPUs that share the batch.")],
    gpu: Annotated[str, _where(metavar="NAME", help=f"One of {', '.join(GPUS)}.")] = "h200",
    hierarchical: Annotated[
        bool, _where("--hierarchical", help="Two dims: heads within a host, the sequence over hosts (a2a+p2p).")
    ] = False,
    gpus_per_node: Annotated[str, _where(metavar="N", help="GPUs of a host.")] = "8",
    network: Annotated[
        str | None,
        _where(metavar="GB/S", show_default="50, assumed", help="What a GPU receives per second from other hosts."),
    ] = None,
    heads: Annotated[str, _what(metavar="N or N/KV", help="Heads, and kv heads where fewer: 32/8.")] = "32/8",
    kv_heads: Annotated[str | None, _what(metavar="N", help="Kv heads, where --heads is one number.")] = None,
    head_dim: Annotated[str, _what(metavar="D or D/DV", help="head_dim, and head_dim_v where it differs.")] = "128",
    tokens: Annotated[
        str | None, _what(metavar="N", help="Repeat the lengths, or draw, up to so many tokens; the last one is cut.")
    ] = None,
    window: Annotated[
        str | None, _what(metavar="LEFT,RIGHT", help="Keys visible on either side, ints or none: 4095,0.")
    ] = None,
    causal: Annotated[bool, _what("--causal/--no-causal", help="No key after the query's own position.")] = True,
    seed: Annotated[int, _what(metavar="N", help="Of lengths that are drawn.")] = 0,
    placement: Annotated[str, _what(metavar="NAME", help=f"One of {', '.join(PLACEMENTS)}.")] = "auto",
    comm: Annotated[
        str, _what(metavar="NAME", help=f"One of auto (all are planned, the cheapest chosen), {', '.join(COMMS)}.")
    ] = "auto",
    json_to: Annotated[str | None, _output("--json", metavar="FILE", help="For machines; - instead of text.")] = None,
    picture: Annotated[Path | None, _output(metavar="FILE", help="Owners, entries and work as .svg or .png.")] = None,
) -> None:
    """Plan a batch over ranks that are not here, and predict each scheme's cost. No GPU needed.

    For example: anyattn plan --lengths lognormal:mean=2k,longest=16k,total=1m --ranks 64 --hierarchical

    Exit status: 0, or 2 if the plan makes no sense.
    """
    batch = _batch(lengths, tokens, seed, heads, kv_heads, head_dim, causal, window, placement)
    machine = _machine(ranks, gpu, gpus_per_node, network, hierarchical)
    _check_targets(json_to, picture)
    found = _simulate.simulate(batch, machine, comm)
    if picture is not None:
        _draw(picture, found)
    if json_to is not None:
        _write(json_to, _data(found, batch, machine, seed))
    if json_to != "-":
        _report(found, batch, machine, seed, comm)
