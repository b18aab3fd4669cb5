"""`champion`, `history` and `rollback`: which model serves, which ones did, and letting one of them serve again."""

from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli.output import dump, local, print_json, print_line, print_table
from daemon.cli.status import short_id
from daemon.cli.workspace import JsonOption, TrackOption, chosen_tracks, load_settings, open_overview, open_writer
from pipeline.errors import DropforgeError

if TYPE_CHECKING:
    from daemon.overview import ChampionView


class NoChampion(DropforgeError):
    """The track has no champion, not even its base model."""


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command()(champion)
    app.command()(history)
    app.command()(rollback)


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


def rollback(
    context: typer.Context,
    *,
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why; kept in the history.")],
    track: Annotated[str, typer.Option("--track", metavar="TRACK", help="The track that goes back.")] = "default",
    to: Annotated[
        int | None,
        typer.Option("--to", metavar="GENERATION", help="Of the history; else the one that today's took the place of."),
    ] = None,
) -> None:
    """
    Let a former champion serve again.

    Its files are checked first. The model that loses its place is barred: no run promotes it again. Later candidates
    are compared with the champion that serves then.
    """
    from daemon.champions import rollback as roll_back  # noqa: PLC0415 - a quick start
    from daemon.clock import now_ms  # noqa: PLC0415

    chosen_tracks(context, track)
    row = roll_back(open_writer(context), load_settings(context).state_folder, track, to, reason, now_ms())
    print_line(f"track {track} serves model {short_id(row.model_id)} again, as generation {row.generation}")
    print_line(f"model {short_id(row.previous_model_id or '')} is barred: no run promotes it again")


def _print_champion(one: "ChampionView") -> None:
    print_line(f"track {one.track}: generation {one.generation} since {local(one.since)}")
    print_line(f"model: {one.model_id}")
    print_line(f"folder: {one.path}")
    if one.run is not None:
        print_line(f"run: {one.run}")
        print_line(f"trained on: {', '.join(one.drops)}")
    print_line(f"why: {one.reason}")
