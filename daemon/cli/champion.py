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
    if no champion is found.
    """
    overview = open_overview(context)
    names = chosen_tracks(context, track or ("default" if path else None))
    found = [one for one in (overview.champion(name) for name in names) if one is not None]
    if not found:
        raise no_champion(names[0])
    if as_json:
        print_json(champions=found)
    elif path:
        print(overview.folder / "tracks" / names[0] / "champion")
    else:
        for index, one in enumerate(found):
            if index:
                print_line()
            _print_champion(one)


def history(
    context: typer.Context,
    *,
    track: TrackOption = None,
    at: Annotated[
        str | None,
        typer.Option("--at", metavar="TIME", help="Only what was live then: ISO 8601, as 2026-11-24T02:00."),
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
        past = {name: [one] if (one := serving_at(all_, moment)) else [] for name, all_ in past.items()}
    found = [one for all_ in past.values() for one in all_]
    if as_json:
        print_json(history=found)
    elif moment is not None:
        _print_moment(past, moment, alive=overview.daemon().alive)
    elif not found:
        print_line("no champions yet")
    else:
        _print_history(found, alive=overview.daemon().alive)


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


def _print_history(found: list[ChampionView], *, alive: bool) -> None:
    rows = [
        (one.track, one.generation, one.kind, short(one.model_id), clock(one.since), one.run, one.reason)
        for one in found
    ]
    print_table(("TRACK", "GEN", "KIND", "MODEL", "SINCE", "RUN", "WHY"), rows)
    for one in found:
        lines = [*taken_out_lines(one), *command_lines(one, alive=alive)]
        print_lines(f"track {one.track}, generation {one.generation}: {line}" for line in lines)


def _print_moment(past: dict[str, list[ChampionView]], moment: datetime, *, alive: bool) -> None:
    for index, (name, found) in enumerate(past.items()):
        if index:
            print_line()
        if not found:
            print_line(f"track {name}: no champion at {local(moment)}")
        for one in found:
            _print_champion(one)
            for drop in one.data:
                since = f", {drop.since_words}" if drop.taken_out else ""
                rows = count(drop.rows, "row")
                print_line(f"  drop {drop.id}: {drop.name}, {drop.role}, {rows}, sha256 {drop.sha256}{since}")
            print_lines(command_lines(one, alive=alive, every=True))


def _print_champion(one: ChampionView) -> None:
    until = f" until {local(one.until)}" if one.until else ""
    print_line(f"track {one.track}: generation {one.generation}, {one.kind}, since {local(one.since)}{until}")
    print_line(f"model: {one.model_id}")
    print_line(f"folder: {one.path}")
    if one.run is not None:
        print_line(f"run: {one.run}")
        print_line(f"trained on: {', '.join(one.drops)}")
        if one.training:
            print_line(f"training: {one.training}")
        print_lines(taken_out_lines(one))
    print_line(f"why: {one.reason}")
    if one.verdict is not None and one.kind != "promotion":
        print_line(f"verdict of run {one.run}: {one.verdict}")
