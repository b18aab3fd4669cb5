"""`champion` and `history`: which model serves, and which ones did."""

from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli.output import dump, local, print_json, print_line, print_table
from daemon.cli.status import short_id
from daemon.cli.workspace import JsonOption, TrackOption, chosen_tracks, open_overview
from pipeline.errors import DropforgeError

if TYPE_CHECKING:
    from daemon.overview import ChampionView


class NoChampion(DropforgeError):
    """The track has no champion, not even its base model."""


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command()(champion)
    app.command()(history)


def champion(
    context: typer.Context,
    *,
    track: TrackOption = None,
    path: Annotated[
        bool, typer.Option("--path", help="Print the champion's link alone: the folder that a server loads.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """
    Show each track's champion.

    With --path only where it lies: of track default, unless --track says otherwise.
    """
    overview = open_overview(context)
    names = chosen_tracks(context, track or ("default" if path else None))
    found = [one for one in (overview.champion(name) for name in names) if one is not None]
    if not found:
        message = f"track {names[0]} has no champion yet"
        raise NoChampion(message, "set base_model in dropforge.toml and start the daemon: dropforge run")
    if as_json:
        print_json(champions=dump(found))
    elif path:
        print(overview.folder / "tracks" / names[0] / "champion")
    else:
        for place, one in enumerate(found):
            if place:
                print_line()
            _print_champion(one)


def history(context: typer.Context, *, track: TrackOption = None, as_json: JsonOption = False) -> None:
    """List the champions of each track, today's first."""
    overview = open_overview(context)
    found = [one for name in chosen_tracks(context, track) for one in reversed(overview.history(name))]
    if as_json:
        print_json(history=dump(found))
        return
    if not found:
        print_line("no champions yet")
        return
    rows = [(one.track, one.generation, short_id(one.model_id), local(one.since), one.run, one.reason) for one in found]
    print_table(("TRACK", "GENERATION", "MODEL", "SINCE", "RUN", "WHY"), rows)


def _print_champion(one: "ChampionView") -> None:
    print_line(f"track {one.track}: generation {one.generation} since {local(one.since)}")
    print_line(f"model: {one.model_id}")
    print_line(f"folder: {one.path}")
    if one.run is not None:
        print_line(f"run: {one.run}")
        print_line(f"trained on: {', '.join(one.drops)}")
    print_line(f"why: {one.reason}")
