"""What a kernel can do, declared as data, and the one evaluator that compares it with a problem.

A :class:`Capability` says which GPUs, dtypes, head dims and features a kernel takes, forward and backward told apart,
and between which versions. :func:`evaluate` returns *all* reasons against it, each with a remedy. Known defects are
rows of the same kind, with a link.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from packaging.version import Version

from anyattn._environment import arch_name
from anyattn._problem import Problem

Direction = Literal["forward", "backward"]


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a backend does not take a call.

    ``str(reason)`` is one line: what was asked, what the backend needs, what it got, and what would lift it.
    """

    what: str
    """What was asked for: "softcap", "head_dim", "dtype" ..."""
    needs: str
    """What the backend needs for it."""
    got: str
    """What there is instead."""
    remedy: str
    """What would lift the reason."""
    kernel: str = ""
    """Which of the backend's kernels says so, where it has several."""
    link: str = ""
    """Where a known defect is described."""
    text: str = ""
    """``detail`` in other words, where what, needs and got read badly in one sentence."""

    @property
    def detail(self) -> str:
        """The reason without what would lift it."""
        return self.text or f"{self.what}: needs {self.needs}, got {self.got}"

    def __str__(self) -> str:
        head = f"{self.kernel}: " if self.kernel else ""
        link = f" ({self.link})" if self.link else ""
        return f"{head}{self.detail}; {self.remedy}{link}"


@dataclass(frozen=True, slots=True)
class Support:
    """How a kernel supports one feature. The defaults mean: every version, every GPU, forward and backward."""

    since: str | None = None
    """First version with it (forward)."""
    backward: bool = True
    """Whether gradients are right with it."""
    backward_since: str | None = None
    """First version whose backward has it."""
    families: tuple[int, ...] | None = None
    """GPU generations with it (9 is Hopper); None: wherever the kernel runs."""
    backward_families: tuple[int, ...] | None = None
    """GPU generations whose backward has it; None: as forward."""


ALWAYS = Support()
FORWARD_ONLY = Support(backward=False)


@dataclass(frozen=True, slots=True)
class HeadDims:
    """Head dims that a kernel takes."""

    maximum: int
    multiple_of: int = 1
    maximum_backward: int | None = None
    maximum_v: int | None = None
    """Of head_dim_v; None: as of head_dim."""
    pads: bool = False
    """The core pads other head dims with zeros, which changes no score and no value."""
    equal: bool = False
    """head_dim_v must be head_dim: the core pads the smaller one, where it pads."""

    def used(self, head_dim: int, head_dim_v: int) -> tuple[int, int]:
        """(head_dim, head_dim_v) that the kernel is run with."""
        if not self.pads:
            return head_dim, head_dim_v
        if self.equal:
            head_dim = head_dim_v = max(head_dim, head_dim_v)
        return self._rounded(head_dim), self._rounded(head_dim_v)

    def _rounded(self, dim: int) -> int:
        return -(-dim // self.multiple_of) * self.multiple_of


@dataclass(frozen=True, slots=True)
class Row:
    """A rule that no table column expresses, or a known defect: applies where ``when`` says, unless lifted."""

    when: Callable[[Problem], bool]
    reason: Reason
    since: str | None = None
    """First affected version (None: from the first)."""
    fixed: str | None = None
    """First version without it (None: not fixed)."""
    direction: Literal["both", "backward"] = "both"
    flag: str | None = None
    """Only builds of which the probe reported this."""


@dataclass(frozen=True, slots=True)
class Capability:
    """What one kernel of a backend takes."""

    families: tuple[int, ...]
    """GPU generations (compute capability's first part); 0 is the CPU."""
    dtypes: tuple[str, ...]
    head_dims: HeadDims
    features: Mapping[str, Support]
    """By the names of Problem.features(); what is absent is not supported."""
    kernel: str = ""
    """The kernel's name, where a backend has several."""
    package: str = "torch"
    """The distribution whose version the rows speak of."""
    upgrade: str = ""
    """The command that installs or upgrades it."""
    backward_families: tuple[int, ...] | None = None
    """GPU generations with a backward; None: as forward; (): none."""
    lse_grad: Literal["native", "augmented"] = "augmented"
    """Whether backward takes the gradient of lse, or the core adds it through one more column of v."""
    native_sink: tuple[str, ...] = ()
    """Sink dtypes that the kernel takes itself; the core applies all others from (out, lse)."""
    native_sink_since: str | None = None
    native_sink_when: Callable[[Problem], bool] | None = None
    """Which problems it takes a sink in (None: all)."""
    product_error: Mapping[str, float] = field(default_factory=dict)
    """By dtype: the relative error of a product, where the kernel's arithmetic is coarser than the dtype."""
    writes_gaps: bool = False
    """Gaps go in as sequences of their own, and come out zero as far as max_seqlen reaches."""
    ignores_gaps: bool = False
    """Nothing in a gap, NaN included, can reach a row of a sequence: the core need not clean what goes in."""
    rank: int = 0
    """Where any backend may run, kernels of a higher rank come after all of a lower one; 2 and more: last resorts."""
    slow_at: Callable[[Problem], bool] | None = None
    """Problems that it takes and that others are much faster at: it ranks below them there."""
    dense_is_quicker: bool = False
    """One sequence is quicker as a dense batch than as a packed one: what a plan of one sequence then hands over."""
    reads_torch_flag: bool = False
    """Deterministic only while torch.use_deterministic_algorithms is on."""
    most_splits: int = 1
    """In how many parts forward may take the keys of a block of queries; above 1, it also chooses by itself."""
    rows: tuple[Row, ...] = field(default=())

    def takes_sink(self, problem: Problem, version: str | None) -> bool:
        """Whether the kernel itself applies the problem's sink."""
        fits = self.native_sink_when is None or self.native_sink_when(problem)
        return problem.sink in self.native_sink and fits and _at_least(version, self.native_sink_since)

    def rank_at(self, problem: Problem) -> int:
        """The kernel's rank for a problem."""
        return self.rank + (self.slow_at is not None and self.slow_at(problem))

    def as_run(self, problem: Problem) -> Problem:
        """The problem with the head dims that the kernel is run with."""
        dims = self.head_dims.used(problem.head_dim, problem.head_dim_v)
        if dims == (problem.head_dim, problem.head_dim_v):
            return problem
        return replace(problem, head_dim=dims[0], head_dim_v=dims[1])


#: ``Reason.what`` where the tensors are on another device than the kernel's.
OTHER_DEVICE = "device"

FAMILY_NAMES = {0: "CPU", 7: "sm7x", 8: "sm8x", 9: "sm90", 10: "sm10x", 11: "sm11x", 12: "sm12x"}

#: How each feature is called in front of people.
FEATURE_NAMES = {
    "dense": "dense batches",
    "packed": "packed batches",
    "gaps": "rows outside every sequence",
    "causal": "causal masking",
    "window": "sliding windows",
    "bottom_right": "bottom-right alignment with lengths not known equal",
    "top_left": "top-left alignment with lengths not known equal",
    "gqa": "fewer kv heads than heads",
    "unequal_head_dims": "head_dim_v other than head_dim",
    "softcap": "softcap",
    "sink": "sinks",
    "alibi": "ALiBi",
    "alibi_per_sequence": "ALiBi slopes per sequence",
    "bias": "an additive bias",
    "bias_grad": "the gradient of bias",
    "mask": "a mask tensor",
    "block_mask": "a BlockMask",
    "dropout": "dropout",
    "nonpositive_scale": "a scale of zero or below",
    "lse_grad": "the gradient of lse",
    "deterministic": "a deterministic backward",
}

#: Those that are called in the plural.
_PLURAL = ("dense", "packed", "gaps", "window", "gqa", "sink", "alibi_per_sequence")
#: Those that only a backward has.
BACKWARD_ONLY = ("bias_grad", "lse_grad", "deterministic")

#: What a user may do about a feature that no version of a kernel has.
_FEATURE_REMEDIES = {
    "dense": 'use layout="thd" with a Packing',
    "gaps": "pack the batch without padding (Packing.pack)",
    "top_left": "use causal=True (bottom-right), or lengths that the host knows to be equal",
    "lse_grad": "detach lse, or leave out return_lse",
    "deterministic": "leave out deterministic=True",
    "bias_grad": "detach bias",
}


def _at_least(version: str | None, since: str | None) -> bool:
    return since is None or (version is not None and Version(version) >= Version(since))


def _families(families: tuple[int, ...]) -> str:
    return ", ".join(FAMILY_NAMES[f] for f in families) or "no GPU"


def dims_text(head_dim: int, head_dim_v: int) -> str:
    """``"128"``, or ``"192/128"`` where they differ."""
    return str(head_dim) if head_dim == head_dim_v else f"{head_dim}/{head_dim_v}"


def _run_as(given: str, run: str) -> str:
    return given if given == run else f"{given}, run as {run}"


def _dims_found(given: Problem, run: Problem) -> str:
    """The head dims of a call, and those that the kernel would be run with."""
    return _run_as(dims_text(given.head_dim, given.head_dim_v), dims_text(run.head_dim, run.head_dim_v))


def _feature_reason(
    capability: Capability, name: str, problem: Problem, version: str | None, way: Direction
) -> Reason | None:
    """Why this feature rules the kernel out in one direction, or None. It names what all the call needs."""
    what = FEATURE_NAMES[name] + (" in backward" if way == "backward" and name not in BACKWARD_ONLY else "")
    support = capability.features.get(name)
    if support is None or (way == "backward" and not support.backward):
        remedy = _FEATURE_REMEDIES.get(name, "choose another backend")
        text = f"{what}: this kernel does not have {'them' if name in _PLURAL else 'it'}"
        return Reason(what, "a kernel that has it", "one without", remedy, text=text)
    backward = support.backward_families or support.families, support.backward_since or support.since
    families, since = backward if way == "backward" else (support.families, support.since)
    all_families, all_since = backward if problem.needs_backward and support.backward else (families, since)
    if families is not None and problem.arch // 10 not in families:
        needs = f"a GPU of {_families(all_families or families)}"
        return Reason(what, needs, arch_name(problem.arch), "use such a GPU or another backend")
    if not _at_least(version, since):
        remedy = capability.upgrade or f"upgrade {capability.package}"
        return Reason(what, f"{capability.package} >= {all_since}", f"{version}", remedy)
    return None


def device_reason(capability: Capability, problem: Problem) -> Reason | None:
    """Why the kernel does not run where the tensors are, or None."""
    if problem.arch // 10 in capability.families:
        return None
    remedy = "move the tensors" if problem.arch == 0 or capability.families == (0,) else "choose another backend"
    return Reason(OTHER_DEVICE, _families(capability.families), arch_name(problem.arch), remedy, capability.kernel)


def _static_reasons(capability: Capability, given: Problem, problem: Problem) -> list[Reason]:
    """Reasons from device, dtype and head dims, alike in both directions; ``given`` is before padding."""
    found = [r] if (r := device_reason(capability, problem)) else []
    if problem.dtype not in capability.dtypes:
        found.append(
            Reason("dtype", " or ".join(capability.dtypes), problem.dtype, "cast q, k and v, or use torch.autocast")
        )
    dims = capability.head_dims
    for name, asked, dim, maximum in (
        ("head_dim", given.head_dim, problem.head_dim, dims.maximum),
        ("head_dim_v", given.head_dim_v, problem.head_dim_v, dims.maximum_v or dims.maximum),
    ):
        got, grown = _run_as(str(asked), str(dim)), dim
        if problem.lse_grad and capability.lse_grad == "augmented":
            grown = dim + max(8, dims.multiple_of)
        if dim % dims.multiple_of:
            padded = -(-dim // dims.multiple_of) * dims.multiple_of
            found.append(
                Reason(name, f"a multiple of {dims.multiple_of}", got, f"pad q, k and v to {padded} with zeros")
            )
        if dim > maximum:
            found.append(Reason(name, f"at most {maximum}", got, "choose another backend"))
        elif grown > maximum:
            needs = f"at most {maximum - max(8, dims.multiple_of)} for the gradient of lse"
            found.append(Reason(name, needs, got, "detach lse, or choose another backend"))
    return found


def _backward_reasons(capability: Capability, given: Problem, problem: Problem) -> list[Reason]:
    """Reasons that only a backward has, features aside; ``given`` is before padding."""
    found = []
    families = capability.backward_families
    if families is not None and problem.arch // 10 not in families:
        found.append(
            Reason(
                "backward",
                f"a GPU of {_families(families)}" if families else "a kernel with a backward",
                arch_name(problem.arch) if families else "one without",
                "call it under torch.no_grad(), or choose another backend",
            )
        )
    if problem.deterministic and capability.reads_torch_flag and not problem.torch_deterministic:
        found.append(
            Reason(
                FEATURE_NAMES["deterministic"],
                "torch.use_deterministic_algorithms(True), which it reads itself",
                "the flag off",
                "switch the flag on",
            )
        )
    largest = capability.head_dims.maximum_backward
    if largest is not None and max(problem.head_dim, problem.head_dim_v) > largest:
        found.append(
            Reason(
                "head_dim in backward",
                f"at most {largest}",
                _dims_found(given, problem),
                "call it under torch.no_grad(), or choose another backend",
            )
        )
    return found


def _row_applies(row: Row, problem: Problem, version: str | None, flags: frozenset[str], way: Direction) -> bool:
    if row.direction == "backward" and way == "forward":
        return False
    if row.flag is not None and row.flag not in flags:
        return False
    affected = _at_least(version, row.since) and not (row.fixed is not None and _at_least(version, row.fixed))
    return affected and row.when(problem)


#: What rows say of a value that they cannot know: the problem has it.
_UNSAID = ("another", "more", "a larger one", "one in between", "different ones")


def _row_reason(row: Row, given: Problem, run: Problem, version: str | None) -> Reason:
    """A row's reason, with the value that there is: the version, the head dims or the bias's dtype."""
    reason = row.reason
    if row.fixed is not None and ">=" in reason.needs:
        return replace(reason, got=f"{version}")
    if reason.got not in _UNSAID:
        return reason
    if "head_dim" in reason.what or "head_dim" in reason.needs:
        return replace(reason, got=_dims_found(given, run))
    return replace(reason, got=given.bias) if given.bias and reason.what == "bias's dtype" else reason


def _splits_reason(wanted: int, most: int) -> Reason:
    """Why a kernel that takes keys in fewer parts is ruled out."""
    what = f"num_splits={wanted}"
    if most > 1:
        return Reason(what, f"at most {most}", f"{wanted}", "ask for fewer, or for 0, its own choice")
    text = f"{what}: this kernel does not split keys in forward"
    return Reason(what, "a kernel that splits keys in forward", "one that does not", "leave num_splits at 1", text=text)


def _with_lse_column(problem: Problem) -> Problem:
    """The problem whose backward is run where the core adds the gradient of lse: head dims grow by 8."""
    return replace(problem, head_dim=problem.head_dim + 8, head_dim_v=problem.head_dim_v + 8)


def _forward_reasons(
    capability: Capability, given: Problem, problem: Problem, version: str | None, flags: frozenset[str]
) -> list[Reason]:
    found = _static_reasons(capability, given, problem)
    if problem.num_splits != 1 and not problem.num_splits <= capability.most_splits > 1:
        found.append(_splits_reason(problem.num_splits, capability.most_splits))
    for name in problem.features():
        if name not in ("sink", *BACKWARD_ONLY) and (
            reason := _feature_reason(capability, name, problem, version, "forward")
        ):
            found.append(reason)
    rows = [row for row in capability.rows if _row_applies(row, problem, version, flags, "forward")]
    return found + [_row_reason(row, given, problem, version) for row in rows]


def _backward_only_reasons(
    capability: Capability, given: Problem, problem: Problem, version: str | None, flags: frozenset[str]
) -> list[Reason]:
    """Reasons against the backward that are none against the forward."""
    found = _backward_reasons(capability, given, problem)
    for name in problem.features():
        if name in ("sink", "lse_grad"):
            continue
        forward = name not in BACKWARD_ONLY and _feature_reason(capability, name, problem, version, "forward")
        reason = _feature_reason(capability, name, problem, version, "backward")
        support = capability.features.get(name)
        if reason and (not forward or (support is not None and not support.backward)):
            found.append(reason)
    run = _with_lse_column(problem) if problem.lse_grad and capability.lse_grad == "augmented" else problem
    for row in capability.rows:
        forward_too = _row_applies(row, problem, version, flags, "forward")
        if not forward_too and _row_applies(row, run, version, flags, "backward"):
            found.append(_row_reason(row, given, run, version))
    return found


def evaluate(
    capability: Capability, problem: Problem, version: str | None, flags: frozenset[str] = frozenset()
) -> tuple[list[Reason], list[Reason]]:
    """All reasons against a kernel: those against its forward, and those against its backward only.

    Sinks and the gradient of lse are the core's to add, so they are asked of no kernel here beyond a larger head dim.
    """
    run = capability.as_run(problem)
    forward = _forward_reasons(capability, problem, run, version, flags)
    backward = _backward_only_reasons(capability, problem, run, version, flags) if run.needs_backward else []
    if capability.kernel:
        forward = [replace(r, kernel=capability.kernel) for r in forward]
        backward = [replace(r, kernel=capability.kernel) for r in backward]
    return forward, backward
