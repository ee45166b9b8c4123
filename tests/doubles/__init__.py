"""Hostile doubles: CPU stand-ins for kernels, each as awkward as the real one was measured or read to be.

``pretend("sm90", fa4="4.0.0b36", fa2="2.5.9")`` makes the package take CPU tensors for tensors on such a machine, with
such packages installed. Doubles live in tests and are no backend that anyone can pick.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

import anyattn
from anyattn import _environment, _preparation, _select
from anyattn.backends import ORDER
from anyattn.backends import get as get_backend
from doubles import aten_cudnn, aten_efficient, aten_flash, fa2, fa3, fa4
from doubles.installation import FILL, installed

TORCH = "2.13.0"
#: Backends whose packages are pretended to be installed: their own probes look.
PACKAGED = ("fa2", "fa3", "fa4")


@dataclass
class Machine:
    """What is pretended."""

    fa2: fa2.Interface | None = None
    fa3: fa3.Interface | None = None
    fa4: fa4.Interface | None = None


def forget() -> None:
    """No choice, prepared call or loaded kernel is remembered."""
    _select.forget_world()
    for cache in _select.caches:
        cache.clear()
    _select.choose.cache_clear()


@contextmanager
def pretend(on: str, *, without: tuple[str, ...] = (), **versions: str | None) -> Iterator[Machine]:
    """CPU tensors are on this GPU, and these versions are installed; torch's own kernels always are.

    Args:
        on: "sm90" and so on, as ``explain(on=)`` takes it.
        without: features that the build of FlashAttention 3 lacks, as in FLASHATTENTION_DISABLE_*: "LOCAL".
        versions: by backend, None for absent. Other backends than torch's own are absent. Betas of FlashAttention 3
            are dates; its versions below 1 are those of fa3-fwd.
    """
    arch = _environment.TARGETS[on]
    versions = {"torch": TORCH, "varlen": TORCH, "reference": anyattn.__version__, **versions}
    machine = Machine(
        fa2.Interface(v, arch) if (v := versions.get("fa2")) else None,
        fa3.Interface(v, arch, without) if (v := versions.get("fa3")) else None,
        fa4.Interface(v, arch) if (v := versions.get("fa4")) else None,
    )
    absent = {name for name in PACKAGED if name in ORDER and get_backend(name).probe().version is None}
    library = torch.library.Library("aten", "IMPL")
    with ExitStack() as stack:
        stack.callback(forget)
        stack.callback(library._destroy)
        for double in (machine.fa2, machine.fa3):
            if double is not None:
                stack.callback(double.close)
        stack.enter_context(_packages(machine))
        stack.enter_context(mock.patch.object(_preparation, "arch_of", return_value=arch))
        for name in ORDER:
            if not (name in PACKAGED and (versions.get(name) or name in absent)):
                stack.enter_context(_probes(name, versions.get(name)))
        # Kernels that drop draw from the device's generator: here, that is the CPU's.
        stack.enter_context(mock.patch.object(torch.cuda, "default_generators", (torch.default_generator,)))
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", return_value=0))
        stack.enter_context(mock.patch.object(torch.backends.cuda, "is_built", return_value=True))
        for ops in (aten_flash, aten_cudnn, aten_efficient):
            ops.register(library)
        forget()
        yield machine


def _probes(name: str, version: str | None) -> Any:
    return mock.patch.object(get_backend(name), "probe", return_value=_environment.Probe(version))


def _packages(machine: Machine) -> Any:
    """Everything that is installed, in one folder, as pip would have it."""
    files: dict[str, str] = {}
    distributions: dict[str, str] = {}
    contents: dict[str, Any] = {}
    if (two := machine.fa2) is not None:
        distributions["flash-attn"] = two.version
        files["flash_attn/__init__.py"] = (
            f"__version__ = {two.version!r}\nfrom flash_attn import flash_attn_interface\n"
        )
        files["flash_attn/flash_attn_interface.py"] = f"import flash_attn_2_cuda\n{FILL}"
        files["flash_attn_2_cuda.py"] = FILL
        contents["flash_attn.flash_attn_interface"] = two.python_module
        contents["flash_attn_2_cuda"] = two.cuda_module
    if (three := machine.fa3) is not None:
        distributions[three.distribution] = three.version
        files |= three.files()
        contents |= three.contents()
    if (four := machine.fa4) is not None:
        distributions["flash-attn-4"] = four.version
        files["flash_attn/cute/__init__.py"] = ""
        files["flash_attn/cute/interface.py"] = FILL
        contents["flash_attn.cute.interface"] = four.module
    return installed(files, distributions, contents)
