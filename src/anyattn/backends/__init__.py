"""The backends, each in one file. Nothing outside a backend's file knows its name but ``ORDER``."""

from __future__ import annotations

import importlib
from functools import cache
from typing import cast

from anyattn._call import Backend

#: Every backend, the preferred first. A new one is a file of this name here and an entry in this tuple.
ORDER: tuple[str, ...] = ("fa3", "fa4", "cudnn", "fa2", "varlen", "torch", "flex", "reference")


@cache
def get(name: str) -> Backend:
    """The backend of this name. Its kernels are not imported: ``load()`` does that."""
    return cast(Backend, importlib.import_module(f"{__name__}.{name}"))
