"""
The command line: one module per command group, one function per command, which parses, calls and prints.

In: arguments. Out: lines, tables or JSON (`output`), and an exit code. This module imports the
requested command and prints the errors of all commands. Open `runs` first to see how a command is written.
"""

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_group

from daemon.cli.commands import COMMANDS, GROUPS, epilog_of, examples_of
from daemon.state.layout import DATABASE_NAME
from daemon.system.programs import user
from pipeline.errors import EXIT_FAILED, DropforgeError, os_words
from pipeline.words import printable

_EXIT_BROKEN_PIPE = 1
_EXIT_SIGINT = 130
_EPILOG = (
    "Exit codes: 0 done, 1 failed, 2 wrong usage or settings, 65 bad data, 69 the daemon is not running. "
    "`wait` has one for each verdict. With DROPFORGE_DEBUG=1 an error shows its traceback."
)


class _Commands(TyperGroup):
    """Command group that imports a command's module only when it is used, so that `--help` is quick."""

    def list_commands(self, _ctx: Any) -> list[str]:
        """Return the names of all commands, in the order in which `--help` lists them."""
        return list(COMMANDS)

    def get_command(self, _ctx: Any, cmd_name: str) -> Any:
        """Return a command, imported on first use; for an unknown name import all, to suggest one, and return None."""
        for name in [cmd_name] if cmd_name in COMMANDS else COMMANDS:
            if name not in self.commands:
                self.commands.update(get_group(_made(name)).commands)
        return self.commands.get(cmd_name)

    def format_commands(self, _ctx: Any, formatter: Any) -> None:
        """Write the list of commands into the help without importing them."""
        limit = formatter.width - 6 - max(map(len, COMMANDS))
        with formatter.section("Commands"):
            formatter.write_dl(
                [
                    (name, TyperCommand(name, help=words).get_short_help_str(limit))
                    for name, (_, words) in COMMANDS.items()
                ]
            )

    def invoke(self, ctx: Any) -> Any:
        """Run the command and return its result; in place of its exception raise that of `_database_words`, if any."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            words = _database_words(error, ctx)
            if words is None:
                raise
            raise words from error


app = typer.Typer(
    name="dropforge",
    cls=_Commands,
    help="Drop a dataset into a folder; get a better model, or the proof that it isn't one.",
    epilog=_EPILOG,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _made(name: str) -> typer.Typer:
    """Import the module of the command `name`; return a Typer application with only this command or group."""
    module, made = import_module(f"daemon.cli.{COMMANDS[name][0]}"), typer.Typer(rich_markup_mode=None)
    function = getattr(module, name.replace("-", "_"))
    if name in GROUPS:
        group = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
        group.callback()(function)
        for each in GROUPS[name]:
            group.command(epilog=epilog_of(f"dropforge {name} {each}"))(getattr(module, each))
        made.add_typer(group, name=name)
    else:
        made.command(name, epilog=epilog_of(f"dropforge {name}"))(function)
    return made


def _print_version(wanted: bool) -> None:  # noqa: FBT001 - as typer calls it
    if wanted:
        from importlib.metadata import version  # noqa: PLC0415 - a quick start

        print(f"dropforge {version('dropforge')}")
        raise typer.Exit


@app.callback()
def options(
    *,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="The settings; else $DROPFORGE_CONFIG, else ./dropforge.toml."),
    ] = None,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Declare the options before the command; commands read `config` from the root context, --version ends at once."""


def main() -> int:
    """
    Run the command in `sys.argv`, or `--help` without one, print its errors to stderr, and return the exit code.

    With `--json` an error is also printed as JSON to stdout. Wrong usage (code 2), `DropforgeError` (its `exit_code`)
    and `OSError` (1) are printed, any other exception is raised; with DROPFORGE_DEBUG=1 only wrong usage is printed.
    Returns 130 after Ctrl-C, 1 if the reader of stdout is gone.
    """
    # Pydantic would read the metadata of every installed package to look for plugins: we use none.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        code = app(args=sys.argv[1:] or ["--help"], prog_name="dropforge", standalone_mode=False)
        sys.stdout.flush()
    except typer.TyperException as error:
        where = getattr(getattr(error, "ctx", None), "command_path", "dropforge")
        hints = [f"for example: {line}" for line in examples_of(where)[:1]]
        hints.append(f"see how it is used: {where} --help")
        return _report(error.format_message(), "; ".join(hints), error.exit_code)
    except typer.Abort:
        return _EXIT_SIGINT
    except BrokenPipeError:
        # The reader closed the pipe; without this, Python prints another error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_BROKEN_PIPE
    except (DropforgeError, OSError) as error:
        if os.environ.get("DROPFORGE_DEBUG") == "1":
            raise
        if isinstance(error, DropforgeError):
            return _report(error.message, error.hint, error.exit_code)
        return _report(os_words(error), f"see whether it is there and this user, {user()}, may use it", EXIT_FAILED)
    return code if isinstance(code, int) else 0


def _database_words(error: Exception, context: typer.Context) -> DropforgeError | None:
    """
    Return a `DropforgeError` with a remedy for an error of SQLite or an `OverflowError`; `None` for any other error.

    `None`, too, for wrong SQL statements and rows, which are defects of our own code.
    """
    if isinstance(error, OverflowError):  # SQLite holds 64 bits
        return DropforgeError("no number here is that large", "list them: dropforge runs, dropforge drops")
    if "sqlite3" not in sys.modules:
        return None  # nobody has opened it
    from daemon.cli.workspace import load_settings  # noqa: PLC0415 - a quick start
    from daemon.state.database_file import cause_of, in_words  # noqa: PLC0415

    cause = cause_of(error)
    return None if cause is None else in_words(cause, load_settings(context).state_folder / DATABASE_NAME)


def _report(message: str, hint: str, code: int) -> int:
    """Print message and hint to stderr, with --json also as JSON to stdout; return the exit code `code`."""
    print(f"error: {printable(message)}", file=sys.stderr)
    if hint:
        print(f"hint: {printable(hint)}", file=sys.stderr)
    if "--json" in sys.argv:
        from daemon.cli.output import print_json  # noqa: PLC0415 - a quick start

        print_json(error={"code": code, "message": message, "hint": hint})
    return code
