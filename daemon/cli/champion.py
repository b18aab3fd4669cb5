"""`champion` and `history`: show the model that serves, and the models that served before."""

from datetime import UTC, datetime
from typing import Annotated

import typer

from daemon.champions.history import no_champion
from daemon.cli.output import clock, print_json, print_line, print_lines, print_table
from daemon.cli.status import command_lines, taken_out_lines
from daemon.cli.workspace import JsonOption, TrackOption, chosen_tracks, open_overview
from daemon.views.champion_history import ChampionView, serving_at
from pipeline.words import count, local, short


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

    With --path only the link to its folder is printed: of track default, unless --track says otherwise. It is an error
    if none of the tracks has a champion.
    """
    overview = open_overview(context)
    names = chosen_tracks(context, track or ("default" if path else None))
    views = [view for view in (overview.champion(name) for name in names) if view is not None]
    if not views:
        raise no_champion(names[0])
    if as_json:
        print_json(champions=views)
    elif path:
        print(overview.folder / "tracks" / names[0] / "champion")
    else:
        for index, view in enumerate(views):
            if index:
                print_line()
            _print_champion(view)


def history(
    context: typer.Context,
    *,
    track: TrackOption = None,
    at: Annotated[
        str | None, typer.Option("--at", metavar="TIME", help="Only what was live then: ISO 8601, as 2026-11-24T02:00.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """
    List the champions of each track, today's first.

    With --at the champion that served at that time, with the drops that it was trained and judged on. A time without an
    offset is in this machine's time zone, and a time in the future is an error.
    """
    moment = None if at is None else _moment(at)
    overview = open_overview(context)
    past = {name: overview.history(name) for name in chosen_tracks(context, track)}
    if moment is not None:
        past = {name: [view] if (view := serving_at(all_, moment)) else [] for name, all_ in past.items()}
    views = [view for all_ in past.values() for view in all_]
    if as_json:
        print_json(history=views)
    elif moment is not None:
        _print_moment(past, moment, alive=overview.daemon().alive)
    elif not views:
        print_line("no champions yet")
    else:
        rows = [
            (view.track, view.generation, view.kind, short(view.model_id), clock(view.since), view.run, view.reason)
            for view in views
        ]
        print_table(("TRACK", "GEN", "KIND", "MODEL", "SINCE", "RUN", "WHY"), rows)
        alive = overview.daemon().alive
        for view in views:
            lines = [*taken_out_lines(view), *command_lines(view, alive=alive)]
            print_lines(f"track {view.track}, generation {view.generation}: {line}" for line in lines)


def _moment(text: str) -> datetime:
    """Parse an ISO 8601 time, local without an offset. Raises `BadParameter` if it is malformed or in the future."""
    try:
        moment = datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError, OSError) as error:
        raise typer.BadParameter(
            f"{text!r} is no time in ISO 8601: write 2026-11-24, 2026-11-24T02:00 or 2026-11-24T02:00+01:00"
        ) from error
    now = datetime.now(UTC)
    if moment > now:
        raise typer.BadParameter(f"{local(moment)} is in the future: it is {local(now)} now")
    return moment


def _print_moment(past: dict[str, list[ChampionView]], moment: datetime, *, alive: bool) -> None:
    for index, (name, views) in enumerate(past.items()):
        if index:
            print_line()
        if not views:
            print_line(f"track {name}: no champion at {local(moment)}")
        for view in views:
            _print_champion(view)
            for drop in view.data:
                since = f", {drop.since_words}" if drop.taken_out else ""
                rows = count(drop.rows, "row")
                print_line(f"  drop {drop.id}: {drop.name}, {drop.role}, {rows}, sha256 {drop.sha256}{since}")
            print_lines(command_lines(view, alive=alive, every=True))


def _print_champion(view: ChampionView) -> None:
    until = f" until {local(view.until)}" if view.until else ""
    print_line(f"track {view.track}: generation {view.generation}, {view.kind}, since {local(view.since)}{until}")
    print_line(f"model: {view.model_id}")
    print_line(f"folder: {view.path}")
    if view.run is not None:
        print_line(f"run: {view.run}")
        print_line(f"trained on: {', '.join(view.drops)}")
        if view.training:
            print_line(f"training: {view.training}")
        print_lines(taken_out_lines(view))
    print_line(f"why: {view.reason}")
    if view.verdict is not None and view.kind != "promotion":
        print_line(f"verdict of run {view.run}: {view.verdict}")
