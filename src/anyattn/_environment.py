"""What this process can see: which GPU a tensor is on, and which packages are installed, without importing them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from functools import cache

import torch
from torch.nn.attention import current_flash_attention_impl

#: Targets that ``explain(on=...)`` knows, as compute capability times ten; 0 is the CPU.
TARGETS: dict[str, int] = {
    "cpu": 0,
    "sm80": 80,
    "sm86": 86,
    "sm89": 89,
    "sm90": 90,
    "sm100": 100,
    "sm103": 103,
    "sm120": 120,
}


_FOUND_IN = {
    "sm80": "A100",
    "sm86": "A10, RTX 3090",
    "sm89": "L4, RTX 4090",
    "sm90": "H100, H200",
    "sm100": "B200",
    "sm103": "B300",
    "sm120": "RTX 5090",
}


def describe_targets() -> str:
    """Every target, with GPUs that are one."""
    return ", ".join(f"{name} ({_FOUND_IN[name]})" if name in _FOUND_IN else name for name in TARGETS)


@dataclass(frozen=True, slots=True)
class Probe:
    """What is known of one backend's package without importing it, and what was learned since."""

    version: str | None
    """The installed version, or None."""
    problem: str = ""
    """Why it cannot be used although a version is there, or what to install; empty when all is well."""
    flags: frozenset[str] = frozenset()
    """What this very build lacks or does otherwise than its version says, by names that the backend's rows use."""
    note: str = ""
    """What a user should know of this installation; ``explain`` shows it."""


def arch_name(arch: int) -> str:
    """``"cpu"`` or ``"sm90"`` and so on."""
    return f"sm{arch}" if arch else "cpu"


def arch_of(device: torch.device) -> int:
    """Compute capability times ten of a CUDA device (90 on Hopper); 0 for the CPU and for "meta"."""
    if device.type != "cuda":
        return 0
    return _cuda_arch(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _cuda_arch(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor


@cache
def torch_version() -> str:
    """Torch's version without its local part: "2.11.0"."""
    return torch.__version__.split("+")[0]


def flash_override() -> str | None:
    """Which implementation has taken the place of torch's own flash kernels, or None: "FA3", "FA4".

    ``torch.nn.attention.activate_flash_attention_impl`` sets that for the whole process, at any time.
    """
    return current_flash_attention_impl()


def distribution_version(name: str) -> str | None:
    """The version of an installed distribution ("flash-attn-4"), or None. Nothing is imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def module_exists(name: str) -> bool:
    """Whether a module could be found. Parents of a dotted name are imported by Python's own rule."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def one_line(error: BaseException) -> str:
    """An exception as one line: its type and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
