"""`serve-hook`: a server takes the champion; for `hooks.after_promotion` and `hooks.health`."""

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from daemon.champions.handover import switch
from daemon.champions.handover.server import Server
from daemon.cli.output import print_line


def serve_hook(
    url: Annotated[str, typer.Argument(metavar="URL", help="The server: http://127.0.0.1:8000 or unix:/PATH.")],
    *,
    restart: Annotated[
        str | None, typer.Option("--restart", metavar="COMMAND", help="Restart it so, as 'systemctl restart vllm'.")
    ] = None,
    adapter_name: Annotated[
        Path | None,
        typer.Option("--adapter-name", metavar="FILE", help="Load the adapter into vLLM; name it for clients in FILE."),
    ] = None,
    wait: Annotated[float, typer.Option("--wait", metavar="SECONDS", help="Longest time until it is up.")] = 600.0,
) -> None:
    """
    Let a server take the champion, and ask it: it fails if the answers are not the champion's.

    For hooks.after_promotion with --restart or --adapter-name, for hooks.health without. What it asks are held-out
    prompts that the champion and the model that it was compared with answered differently. docs/serving.md shows both.
    """
    if restart is not None and adapter_name is not None:
        raise typer.BadParameter("--restart and --adapter-name are two ways to do it: choose one")
    server, change = Server(url), switch.Change.from_environment(os.environ)
    if restart is not None:
        print_line(switch.restart(server, change, _words(restart), wait))
    elif adapter_name is not None:
        print_line(switch.switch_adapter(server, change, adapter_name, wait))
    else:
        print_line(switch.check(server, change, wait))


def _words(command: str) -> list[str]:
    """Return a command's arguments; no shell reads it."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise typer.BadParameter(f"--restart is no command: {error}") from error
    if not words:
        raise typer.BadParameter("--restart names no command")
    return words
