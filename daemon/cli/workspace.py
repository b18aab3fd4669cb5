"""What commands share: common options, access to the settings and the state folder; and the command `config`."""

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli.output import print_json, print_line, print_lines, print_table
from daemon.settings.in_force import WHOSE
from daemon.settings.load import load
from daemon.settings.model import ENV_PREFIX, FILE_NAME, OTHER_VARIABLES, Settings, SettingsError
from daemon.settings.text import flat
from daemon.system.clock import now_ms
from daemon.system.programs import act_as_owner, name_of
from daemon.views.overview import Overview
from pipeline.errors import DropforgeError
from pipeline.words import listed, shell_path

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from daemon.state.events import Word

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
AllOption = Annotated[bool, typer.Option("--all", help="All of them and not the newest 50, with --json too.")]
TrackOption = Annotated[str | None, typer.Option("--track", metavar="TRACK", help="Of this track only.")]
OneTrackOption = Annotated[str, typer.Option("--track", metavar="TRACK", help="The track; that of the top level else.")]
TrackArgument = Annotated[str, typer.Argument(metavar="[TRACK]", help="The track; that of the top level by default.")]
#: Most rows of a list without --all.
MOST_LISTED = 50
#: The settings of the service, as README.md installs it.
SERVICE_FILE = Path("/etc/dropforge/dropforge.toml")


def config_path(context: typer.Context) -> Path | None:
    """
    Return the path in `--config`; else, outside of a workspace, the service's file if readable; else `None`.

    `load(None)` reads $DROPFORGE_CONFIG or ./dropforge.toml.
    """
    path: Path | None = context.find_root().params.get("config")
    return path or (SERVICE_FILE if not _is_workspace() and os.access(SERVICE_FILE, os.R_OK) else None)


def command(context: typer.Context) -> str:
    """Return the beginning of a command for the same settings: `dropforge`, and `--config` if that was given."""
    path = context.find_root().params.get("config")
    return f"dropforge --config {shell_path(path)}" if path else "dropforge"


def _is_workspace() -> bool:
    """Return whether environment variables hold settings, or the current folder has settings or a state folder."""
    set_here = {name for name in os.environ if name.startswith(ENV_PREFIX)} - OTHER_VARIABLES | {"DROPFORGE_CONFIG"}
    # `access` raises nothing in a folder that this user may not enter.
    return any(map(os.environ.get, set_here)) or any(os.access(name, os.F_OK) for name in (FILE_NAME, ".dropforge"))


def chosen_file(context: typer.Context) -> Path:
    """Return the path of the settings file in use, which need not exist."""
    return config_path(context) or Path(os.environ.get("DROPFORGE_CONFIG") or "dropforge.toml")


def load_settings(context: typer.Context, *, as_owner: bool = True) -> Settings:
    """
    Return the settings in the file and the environment.

    With `as_owner` a process of root becomes the user that owns the state folder, for good (`act_as_owner`). Raises
    `SettingsError` if they cannot be used, if there are neither settings nor a state folder, or, for root without a
    named file, as `_refuse_planted`.
    """
    if config_path(context) is None and not _is_workspace():
        raise SettingsError(
            f"there is no workspace in {Path.cwd()}: no dropforge.toml, nor one of a service: {SERVICE_FILE}",
            "make one: dropforge init; or name its settings: dropforge --config FILE COMMAND",
        )
    settings = load(config_path(context))
    if os.geteuid() == 0 and config_path(context) is None:
        _refuse_planted(settings)
    if as_owner:
        act_as_owner(settings.state_folder)
    return settings


def _refuse_planted(settings: Settings) -> None:
    """
    Raise `SettingsError` if ./dropforge.toml or a link to the state folder belongs to an untrusted user.

    Trusted are root and the owner of the state folder.
    """
    state, trusted = settings.state_folder, {0}
    trusted |= {state.stat().st_uid} if state.exists() else set()
    for path in (Path(FILE_NAME), state):
        if os.path.lexists(path) and (owner := path.lstat().st_uid) not in trusted:
            user = name_of(owner)
            hint = f"ask as {user}: sudo -u {user} dropforge; or name --config"
            raise SettingsError(f"{path.absolute()} belongs to {user}, and this is root", hint)


def refuse_missing(context: typer.Context, settings: Settings, *, with_bases: bool = False) -> None:
    """Raise `SettingsError` if a package, program, suite or address (`with_bases`: or base model) is unusable."""
    from daemon.messages.addresses import examine  # noqa: PLC0415 - a quick start
    from daemon.views.preflight import bases, needs  # noqa: PLC0415 - a quick start

    file, looked = chosen_file(context), bases(settings) if with_bases else ()
    bad = [need for need in (*looked, *needs(settings), *examine(settings.messages, file)) if need.level == "bad"]
    if bad:
        raise SettingsError(f"{file}: {'; '.join(f'{need.name}: {need.text}' for need in bad)}", bad[0].remedy)


def open_overview(context: typer.Context) -> Overview:
    """Return an `Overview`, which reads the workspace's state folder; it need not exist. Raises as `load_settings`."""
    return Overview.of(load_settings(context))


def open_writer(context: typer.Context) -> "Engine":
    """Return an engine on the workspace's existing database. Raises as `load_settings` and `database.open_writer`."""
    from daemon.state import database  # noqa: PLC0415 - a quick start

    return database.open_writer(load_settings(context))


def word_of_user(reason: str | None = None) -> "Word":
    """Return a manual decision by the user who started this command, at this time, with `reason` or an empty one."""
    from daemon.state.events import Word  # noqa: PLC0415
    from daemon.system.programs import who  # noqa: PLC0415 - a quick start

    return Word(reason or "", now_ms(), who())


def chosen_tracks(context: typer.Context, track: str | None) -> list[str]:
    """
    Return `track` alone in a list, or all declared tracks if `None`. Raises `SettingsError` for an unknown track.

    A track that was removed from the settings still has its runs and its champion.
    """
    settings = load_settings(context)
    if track is None:
        return list(settings.track_names)
    if track not in settings.track_names and track not in open_overview(context).tracks():
        settings.track(track)
    return [track]


def _not_blank(reason: str | None) -> str | None:
    if reason is not None and not reason.strip():
        raise typer.BadParameter("it is blank: say why, for those who read the history")
    return reason


_REASON = typer.Option("--reason", metavar="TEXT", help="Why; kept in the history.", callback=_not_blank)
ReasonOption = Annotated[str, _REASON]
AnyReasonOption = Annotated[str | None, _REASON]
RunArgument = Annotated[int, typer.Argument(metavar="RUN", help="Number of the run.")]


def exit_on_sigterm() -> None:
    """Let SIGTERM raise `SystemExit` from now on, so that temporary folders are removed."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def newest_only(rows: Sequence[object], *, whole: bool) -> list[str]:
    """Return a line saying that only the newest 50 are listed; none if `whole`, or unless `rows` has exactly 50."""
    return [f"the newest {MOST_LISTED}; all of them: --all"] if len(rows) == MOST_LISTED and not whole else []


def config(context: typer.Context) -> None:
    """Show the settings, or check them; without a subcommand they are shown."""
    if context.invoked_subcommand is None:
        show(context)


def show(context: typer.Context, *, as_json: JsonOption = False) -> None:
    """
    Show the settings in the file and the environment, and the default of each that has another value.

    With --json all defaults are shown. Passwords and tokens are not shown. Says which of them a running daemon does not
    use yet.
    """
    values, defaults = _by_name(load_settings(context)), _by_name(Settings())
    if as_json:
        print_json(settings=[{"name": name, "value": values[name], "default": defaults.get(name)} for name in values])
        return
    changed = {name for name in values if values[name] != defaults.get(name)}
    rows = [
        (name, json.dumps(value, ensure_ascii=False), json.dumps(defaults.get(name)) if name in changed else "")
        for name, value in values.items()
    ]
    print_table(("SETTING", "VALUE", "DEFAULT"), rows)
    print_lines(not_in_force(open_overview(context)))


def not_in_force(overview: Overview) -> list[str]:
    """Return [sentence] if the running daemon says that settings are not in force, else []."""
    try:
        words = overview.troubles().get(WHOSE) if overview.daemon().alive else None
    except DropforgeError:  # the state folder may be closed to a user who may read the settings
        words = None
    return [f"trouble: {WHOSE}: {words}"] if words else []


def _by_name(settings: Settings) -> dict[str, Any]:
    """Return the value of each setting by its dotted name, those of the tracks last, as JSON has it."""
    values = settings.model_dump(mode="json")
    tracks = values.pop("tracks")
    return {".".join(name): value for name, value in flat({**values, **({"tracks": tracks} if tracks else {})})}


def check(context: typer.Context, *, as_json: JsonOption = False) -> None:
    """
    Say whether the settings can be used.

    Exit code 2 if not, with the file or the variable, the setting and what would be right; so too if a track's base
    model is not there or cannot be trained, or a package or program that a setting needs is not installed. Changes
    nothing; the daemon reads its settings when it starts, and at `systemctl reload dropforge`.
    """
    settings, where = load_settings(context), str(chosen_file(context))
    refuse_missing(context, settings, with_bases=True)
    if as_json:
        print_json(ok=True, file=where, tracks=list(settings.track_names))
    else:
        print_line(
            f"{where}: the settings can be used, for {listed([f'track {name}' for name in settings.track_names])}"
        )
