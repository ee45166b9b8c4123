"""Interpreters that have imported torch alone, for code that imports anyattn for the first time.

They are forked from one that has imported torch and its compiler, which is seconds, and end as any interpreter does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

#: Seconds that a piece of code has.
LIMIT = 300

_SERVER = f"""
import gc, json, os, signal, sys, torch, torch._inductor.compile_fx
gc.freeze()
for line in sys.stdin:
    given = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
signal.alarm({LIMIT})
for number, (name, flags) in enumerate(
    [(os.devnull, os.O_RDONLY), (given["out"], os.O_WRONLY | os.O_CREAT), (given["err"], os.O_WRONLY | os.O_CREAT)]
):
    os.dup2(os.open(name, flags), number)
os.environ.clear()
os.environ.update(given["environment"])
sys.path[1:1] = given["path"]
exec(compile(given["code"], "<string>", "exec"), {{"__name__": "__main__"}})
"""


def run(code: str, path: Sequence[Path] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter of its own.

    Args:
        code: may be indented.
        path: folders of packages that go before all others, as in PYTHONPATH.
        **environment: variables beside those of this process.
    """
    if not _servers:
        command = [sys.executable, "-W", "error::UserWarning:anyattn", "-c", _SERVER]
        _servers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    server = _servers[0]
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        given = {"code": textwrap.dedent(code), "path": list(map(str, path)), "out": str(out),
                 "err": str(err), "environment": {**os.environ, **environment}}  # fmt: skip
        server.stdin.write(json.dumps(given) + "\n")
        server.stdin.flush()
        status = server.stdout.readline()
        assert status, f"the interpreter to fork from ended: {_servers.pop().wait(LIMIT)}"
        return subprocess.CompletedProcess(code, int(status), out.read_text(), err.read_text())


def script(
    file: Path, *options: str, path: Sequence[Path] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a file as ``python file option ...`` does."""
    return run(
        f"""
        import runpy, sys
        sys.argv[:], sys.path[0] = {[str(file), *options]!r}, {str(file.parent)!r}
        runpy.run_path(sys.argv[0], run_name="__main__")
        """,
        path,
        **environment,
    )


#: The interpreter of this process; it ends with its standard input.
_servers: list[subprocess.Popen[str]] = []
