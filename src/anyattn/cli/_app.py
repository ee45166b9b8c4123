"""The typer app: which commands there are, and how errors leave it, one line each."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Sequence
from typing import Annotated, Any, cast

import typer
import typer.core
import typer.main

import anyattn
from anyattn._errors import AnyattnError, InvalidArgument

#: Each is a function of this name in the module of this name; a module is imported when its command is asked for.
COMMANDS = ("demo", "doctor", "explain", "plan")
#: click's base of errors about arguments. typer may carry a click of its own, so its module has no stable name.
_ClickError = cast(type[Exception], typer.BadParameter.__mro__[2])


class _Commands(typer.core.TyperGroup):
    """The commands, each made when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return command(cmd_name, self.rich_markup_mode) if cmd_name in COMMANDS else None


def command(name: str, markup: Any = None) -> Any:
    """The click command of this name."""
    one = _typer(markup)
    one.command(name)(getattr(importlib.import_module(f"anyattn.cli._{name}"), name))
    return typer.main.get_command(one)


def _typer(markup: Any, **options: Any) -> typer.Typer:
    settings = {"help_option_names": ["-h", "--help"]}
    return typer.Typer(
        add_completion=False, rich_markup_mode=markup, pretty_exceptions_enable=False, context_settings=settings,
        **options,
    )  # fmt: skip


def application() -> Any:
    """The whole command line as one click command. Its help has boxes and colours on a terminal only."""
    app = _typer("rich" if sys.stdout.isatty() else None, cls=_Commands)
    app.callback(invoke_without_command=True)(_start)
    return typer.main.get_command(app)


def _start(ctx: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print it.")] = False) -> None:
    """One attention call for PyTorch that runs on whichever kernel is installed and fastest."""
    if version:
        typer.echo(f"anyattn {anyattn.__version__}")
    elif ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def run(args: Sequence[str]) -> int:
    """Run a command; say what is wrong in one line on standard error. Returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a message of another package must not die on an ASCII terminal
            stream.reconfigure(errors="backslashreplace")
    try:
        result = application().main(args=list(args), prog_name="anyattn", standalone_mode=False)
    except _ClickError as error:
        context = getattr(error, "ctx", None)
        where = f" (see {context.command_path} --help)" if context is not None else ""
        return _fail(cast(Any, error).format_message().rstrip(".") + where, 2)
    except AnyattnError as error:
        return _fail(str(error), 2 if isinstance(error, InvalidArgument) else 1)
    except typer.Abort:
        return _fail("stopped", 1)
    return result if isinstance(result, int) else 0


def _fail(message: str, status: int) -> int:
    print(f"anyattn: {message}", file=sys.stderr)
    return status
