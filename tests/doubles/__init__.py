"""Hostile doubles: CPU stand-ins for kernels, each as awkward as the real one was measured or read to be.

``pretend("sm90", fa4="4.0.0b36")`` makes the package take CPU tensors for tensors on such a machine, with such packages
installed. Doubles live in tests and are no backend that anyone can pick.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch

import anyattn
from anyattn import _api, _core, _environment, _select, _traced
from anyattn.backends import ORDER
from doubles import aten_cudnn, aten_efficient, aten_flash, fa4

FA4_MODULE = "flash_attn.cute.interface"
TORCH = "2.13.0"


@dataclass
class Machine:
    """What is pretended."""

    fa4: fa4.Interface | None


def forget() -> None:
    """No choice, prepared call or loaded kernel is remembered."""
    _api._prepared.clear()
    _traced._prepared.clear()
    _select.choose.cache_clear()
    _select.load.cache_clear()
    _select._broken.clear()


@contextmanager
def pretend(on: str, **installed: str | None) -> Iterator[Machine]:
    """CPU tensors are on this GPU, and these versions are installed; torch's own kernels always are.

    Args:
        on: "sm90" and so on, as ``explain(on=)`` takes it.
        installed: versions by backend, None for absent. Other backends than torch's own are absent.
    """
    arch = _environment.TARGETS[on]
    versions: dict[str, str | None] = {"torch": TORCH, "varlen": TORCH, "reference": anyattn.__version__, **installed}
    world = tuple((name, _environment.Probe(versions.get(name))) for name in ORDER)
    double = fa4.Interface(version, arch) if (version := versions.get("fa4")) else None
    replaced = [(_core, "arch_of", lambda device: arch), (_select, "world", lambda: world)]
    kept = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    real_module = sys.modules.pop(FA4_MODULE, None)
    library = torch.library.Library("aten", "IMPL")
    forget()
    try:
        for module, name, value in replaced:
            setattr(module, name, value)
        for ops in (aten_flash, aten_cudnn, aten_efficient):
            ops.register(library)
        if double is not None:
            sys.modules[FA4_MODULE] = _as_module(double)
        yield Machine(double)
    finally:
        library._destroy()
        sys.modules.pop(FA4_MODULE, None)
        if real_module is not None:
            sys.modules[FA4_MODULE] = real_module
        for module, name, value in kept:
            setattr(module, name, value)
        forget()


def _as_module(double: fa4.Interface) -> ModuleType:
    module = ModuleType(FA4_MODULE)
    for name in ("_flash_attn_fwd", "_flash_attn_bwd", "maybe_contiguous"):
        setattr(module, name, getattr(double, name))
    return module
