"""Packages that look installed: a folder like site-packages, with metadata, whose modules hold what a double gives."""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

#: What belongs to kernel packages: set aside while others are pretended to be installed.
TOP_LEVEL = (
    "flash_attn", "flash_attn_2_cuda", "flash_attn_3", "flash_attn_3_cuda", "flash_attn_interface", "flash_attn_config",
    "fa3_fwd", "fa3_fwd_interface", "fa3_fwd_config",
)  # fmt: skip
FILL = "from doubles import installation\n\ninstallation.fill(__name__, globals())\n"

_contents: dict[str, Callable[[], Mapping[str, Any]]] = {}
_folders = tempfile.TemporaryDirectory(prefix="pretended-")


def fill(module: str, namespace: dict[str, Any]) -> None:
    """Called by a pretended module as it is imported."""
    namespace.update(_contents[module]())


@cache
def _site_packages(files: tuple[tuple[str, str], ...], distributions: tuple[tuple[str, str], ...]) -> Path:
    """A folder with these files, by path and text, and these distributions, by name and version."""
    folder = Path(tempfile.mkdtemp(dir=_folders.name))
    for path, text in files:
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    for name, version in distributions:
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "RECORD").write_text("".join(f"{path},,\n" for path, _ in files))
    return folder


@contextmanager
def installed(
    files: Mapping[str, str],
    distributions: Mapping[str, str],
    contents: Mapping[str, Callable[[], Mapping[str, Any]]],
) -> Iterator[None]:
    """These packages are installed, and no other kernel package has been imported.

    Args:
        files: by path, the text of every module.
        distributions: versions by name, as ``importlib.metadata`` finds them.
        contents: by module, what it holds, where its text is ``FILL``.
    """
    folder = str(_site_packages(tuple(files.items()), tuple(distributions.items())))
    aside = {name: sys.modules.pop(name) for name in _imported()}
    _contents.update(contents)
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
        _contents.clear()
        for name in _imported():
            del sys.modules[name]
        sys.modules.update(aside)
        importlib.invalidate_caches()


def _imported() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] in TOP_LEVEL]
