"""Where a command works: the settings named by `--config`, and what is known of their state folder."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import DropforgeError

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from daemon.settings.model import Settings
    from daemon.views.overview import Overview

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
TrackOption = Annotated[str | None, typer.Option("--track", metavar="TRACK", help="Of this track only.")]


class NoWorkspace(DropforgeError):
    """The command was started where there is nothing of ours."""

    exit_code = 2


def config_path(context: typer.Context) -> Path | None:
    """Return what `--config` says, if it is there."""
    path: Path | None = context.find_root().params.get("config")
    return path


def chosen_file(context: typer.Context) -> Path:
    """Return the settings file that is read, whether or not it is there."""
    return config_path(context) or Path(os.environ.get("DROPFORGE_CONFIG") or "dropforge.toml")


def load_settings(context: typer.Context) -> "Settings":
    """
    Return the settings in force.

    Raises `SettingsError` if they cannot be used, `NoWorkspace` if neither settings nor a state folder are there.
    """
    from daemon.settings.load import load  # noqa: PLC0415 - a quick start
    from daemon.settings.model import ENV_PREFIX, OTHER_VARIABLES  # noqa: PLC0415 - a quick start

    settings = load(config_path(context))
    set_here = {name for name in os.environ if name.startswith(ENV_PREFIX)} - OTHER_VARIABLES
    named = config_path(context) is not None or "DROPFORGE_CONFIG" in os.environ or set_here
    if not named and not Path("dropforge.toml").exists() and not settings.state_folder.exists():
        message = f"there is no workspace in {Path.cwd()}: no dropforge.toml"
        raise NoWorkspace(message, "make one: dropforge init; or name its settings: dropforge --config FILE COMMAND")
    return settings


def refuse_missing(context: typer.Context, settings: "Settings") -> None:
    """Raise `SettingsError` naming each package, program, suite and address that settings need and that is not here."""
    from daemon.messages.addresses import examine  # noqa: PLC0415 - a quick start
    from daemon.settings.model import SettingsError  # noqa: PLC0415 - a quick start
    from daemon.views.doctor import needs  # noqa: PLC0415 - a quick start

    file = chosen_file(context)
    bad = [one for one in (*needs(settings), *examine(settings.messages, file)) if one.level == "bad"]
    if bad:
        raise SettingsError(f"{file}: {'; '.join(f'{one.name}: {one.text}' for one in bad)}", bad[0].remedy)


def open_overview(context: typer.Context) -> "Overview":
    """Return what is known of the workspace's state folder."""
    from daemon.views.overview import Overview  # noqa: PLC0415 - a quick start

    return Overview(load_settings(context).state_folder)


def open_writer(context: typer.Context) -> "Engine":
    """
    Return an engine that writes to the workspace's database, beside the daemon or without it.

    Raises `DatabaseUnusable` if there is none yet.
    """
    from daemon.state import database  # noqa: PLC0415 - a quick start
    from daemon.state.layout import DATABASE_NAME  # noqa: PLC0415

    return database.open_writer(load_settings(context).state_folder / DATABASE_NAME)


def chosen_tracks(context: typer.Context, track: str | None) -> list[str]:
    """
    Return the one track asked for, or all declared ones. Raises `SettingsError` if it is not declared and never was.

    One that was taken out of the settings has its runs and its champion still.
    """
    settings = load_settings(context)
    if track is None:
        return list(settings.track_names)
    if track not in settings.track_names and track not in open_overview(context).tracks():
        settings.track(track)
    return [track]


def complete_run(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Return the runs whose number begins with what was typed, each with what it is."""
    try:
        runs = open_overview(context).runs()
    except DropforgeError:
        return []
    matching = [run for run in runs if str(run.id).startswith(incomplete)]
    return [(str(run.id), f"{run.track} {run.outcome or run.state}") for run in matching]


#: The largest number that the database can look for.
MOST = (1 << 63) - 1


def small_enough(number: int | None) -> int | None:
    """Return a number that the database can look for. An option's `max` would be told in every help."""
    if number is not None and number > MOST:
        raise typer.BadParameter(f"no number here is larger than {MOST}")
    return number


RunArgument = Annotated[
    int, typer.Argument(metavar="RUN", help="Number of the run.", autocompletion=complete_run, callback=small_enough)
]
