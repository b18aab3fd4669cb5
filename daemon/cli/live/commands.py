"""Adds the commands of this folder."""

import typer

from daemon.cli.live.ask import ask
from daemon.cli.live.queue import move, pause, resume
from daemon.cli.live.search import search
from daemon.cli.live.wait import wait
from daemon.cli.live.watch import watch


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    for command in (watch, wait, ask, search, move, pause, resume):
        app.command()(command)
