"""The command line: ``anyattn demo``, ``doctor`` and ``explain``. It needs the extra ``cli``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from anyattn._environment import module_exists
from anyattn._errors import MissingExtra

_NEEDED = ("typer", "rich")


def main(args: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 for a "no" or a failure, 2 for arguments that make no sense.

    Args:
        args: what follows ``anyattn`` on the command line. Default: ``sys.argv``.
    """
    missing = [name for name in _NEEDED if not module_exists(name)]
    if missing:
        print(f"anyattn: {MissingExtra('the command line', 'cli', ' and '.join(missing))}", file=sys.stderr)
        return 1
    from anyattn.cli._app import run

    return run(sys.argv[1:] if args is None else list(args))
