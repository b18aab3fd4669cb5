"""`run` and `worker`: the two processes that work."""

from pathlib import Path
from typing import Annotated

import typer

from daemon.cli.workspace import load_settings


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command()(run)
    app.command()(worker)


def run(context: typer.Context) -> None:
    """
    Run the daemon until Ctrl-C or SIGTERM.

    It watches the inbox, trains on what is dropped there, judges the model that comes out, and promotes or refuses it.
    """
    from daemon import service  # noqa: PLC0415 - a quick start for the other commands
    from daemon.system import logs  # noqa: PLC0415 - a quick start for the other commands

    settings = load_settings(context)
    logs.configure(settings.log_format)
    raise typer.Exit(service.run(settings))


def worker(
    context: typer.Context,
    *,
    state: Annotated[
        Path | None, typer.Option("--state", metavar="DIR", help="The state folder; else that of the settings.")
    ] = None,
    lifeline: Annotated[bool, typer.Option("--lifeline", help="End when standard input closes.", hidden=True)] = False,
) -> None:
    """
    Run the steps that the daemon orders.

    One at a time. The daemon starts this by itself; with worker = "separate" a unit of its own does.
    """
    from daemon.dispatch import worker as room  # noqa: PLC0415
    from daemon.system import logs  # noqa: PLC0415 - a quick start for the other commands

    settings = load_settings(context) if state is None else None
    logs.configure("auto" if settings is None else settings.log_format)
    folder = settings.state_folder if settings is not None else Path(state or "")
    raise typer.Exit(room.serve(folder, with_lifeline=lifeline))
