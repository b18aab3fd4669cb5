"""`run`, `worker` and `web`: the processes that go on until they are stopped."""

from pathlib import Path
from typing import Annotated

import typer

from daemon.cli.output import print_line
from daemon.cli.workspace import load_settings


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command()(run)
    app.command()(worker)
    app.command()(web)


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


def web(
    context: typer.Context,
    *,
    listen: Annotated[
        str | None, typer.Option("--listen", metavar="ADDRESS", help="Else web.listen: 127.0.0.1:8765, or unix:/PATH.")
    ] = None,
) -> None:
    """
    Serve the web page until Ctrl-C, with or without a daemon.

    The printed address opens it for changes, too; keep it to yourself.
    """
    from daemon.settings.model import SettingsError  # noqa: PLC0415 - a quick start for the other commands
    from daemon.settings.web import WebSettings  # noqa: PLC0415
    from daemon.web import server  # noqa: PLC0415
    from daemon.web.security import load_token  # noqa: PLC0415

    settings = load_settings(context)
    if listen is not None:
        try:
            chosen = WebSettings.model_validate({**settings.web.model_dump(), "listen": listen})
        except ValueError as error:
            raise SettingsError(f"--listen: {error}", "as --listen 127.0.0.1:8765") from error
        settings = settings.model_copy(update={"web": chosen})
    listening = server.listen(settings.web.address)
    print_line(f"serving {settings.state} on {server.address_words(listening, load_token(settings.state_folder))}")
    server.serve(settings, listening)
