"""An imagined machine with nvidia-cudnn-frontend, whose double knows graphs; beside those of ``pretend``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from anyattn.backends import _cudnn_graph as graphs
from anyattn.backends import cudnn
from doubles import cudnn as double
from doubles import pretend


@contextmanager
def machine(version: str = cudnn.NEWEST, library: int = 91900, on: str = "sm90") -> Iterator[double.Interface]:
    """The frontend is installed, on such a GPU; fresh memory holds NaN."""
    interface = double.Interface(version, library, {"sm90": 90, "sm100": 100, "sm120": 120}[on])
    module = ModuleType("cudnn")
    module.__dict__.update(interface.module())
    names = ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty"), (Tensor, "new_empty_strided"))

    def poisoned(make: Any) -> Any:
        def made(*args: Any, **given: Any) -> Tensor:
            x: Tensor = make(*args, **given)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return made

    with ExitStack() as stack:
        stack.enter_context(pretend(on, cudnn=version))
        if "cudnn" in sys.modules:
            stack.callback(sys.modules.__setitem__, "cudnn", sys.modules["cudnn"])
        sys.modules["cudnn"] = module
        stack.callback(sys.modules.pop, "cudnn")
        stack.enter_context(mock.patch.object(graphs, "current_stream", return_value=7))
        for owner, name in names:
            stack.enter_context(mock.patch.object(owner, name, poisoned(getattr(owner, name))))
        double.forget()
        stack.callback(double.forget)
        yield interface
