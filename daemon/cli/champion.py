"""`champion`, `history`, `promote`, `rollback`, `hook`: what serves, what did, and letting another model serve."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from daemon.cli.output import clock, dump, local, print_json, print_line, print_table
from daemon.cli.status import command_lines, short_id, taken_out_lines
from daemon.cli.workspace import (
    JsonOption,
    RunArgument,
    TrackOption,
    chosen_tracks,
    load_settings,
    open_overview,
    open_writer,
    word_of_user,
)
from daemon.system.clock import now_ms
from daemon.views.champion_history import ChampionView, serving_at
from daemon.views.details import deeds
from pipeline.report.cost import cost_words
from pipeline.words import count, signed


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
        from daemon.champions.promotion import NoChampion  # noqa: PLC0415 - a quick start

        raise NoChampion(names[0])
    if as_json:
        print_json(champions=dump(found))
    elif path:
        print(overview.folder / "tracks" / names[0] / "champion")
    else:
        for place, one in enumerate(found):
            if place:
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
    List the champions of each track, today's first, and when what they are judged on was changed, and by whom.

    With --at the one that was live at that time, with the drops that it was trained on. A time without an offset is
    in this machine's time zone.
    """
    moment = None if at is None else _moment(at)
    overview = open_overview(context)
    past = {name: overview.history(name) for name in chosen_tracks(context, track)}
    yardsticks = [one for name in past if moment is None for one in overview.yardsticks(name)]
    if moment is not None:
        past = {name: [one] if (one := serving_at(all_, moment)) else [] for name, all_ in past.items()}
    if as_json:
        print_json(history=dump(one for all_ in past.values() for one in reversed(all_)), yardsticks=dump(yardsticks))
    elif moment is not None:
        _print_moment(context, past, moment)
    elif not any(past.values()):
        print_line("no champions yet")
    else:
        _print_history(context, past)
        for change in yardsticks:
            print_line(f"track {change.track}, run {change.run}, {local(change.at)}: {change.words}")


def promote(
    context: typer.Context,
    *,
    run: RunArgument,
    force: Annotated[
        bool, typer.Option("--force", help="Whatever its verdict, and though it was rolled back from; needs --reason.")
    ] = False,
    reason: Annotated[str | None, typer.Option("--reason", metavar="TEXT", help="Why; kept in the history.")] = None,
) -> None:
    """
    Promote a run that won and waits for approval (gate.approval = "manual").

    With --force the model of any ended run serves, whatever its verdict; it is loaded first, to see that it answers.
    """
    from daemon.champions import approval  # noqa: PLC0415 - a quick start

    _require_words(reason)
    if force and reason is None:
        raise typer.BadParameter("--force needs --reason TEXT")
    engine, root = open_writer(context), load_settings(context).state_folder
    word = word_of_user(reason or "")
    if force:
        row = approval.force(engine, root, run, word, try_out=_try_out)
    else:
        row = approval.approve(engine, root, run, word)
    for line in deeds.promoted(row):
        print_line(line)
    serving = open_overview(context).champion(row.track)
    for line in taken_out_lines(serving) if serving is not None else ():
        print_line(line)
    _print_commands(context, row.track)


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

    Its files are checked first, and it is loaded to see that it answers. The model that loses its place is blocked: no
    run promotes it again. Later candidates are compared with the champion that serves then.
    """
    from daemon.champions.rollback import Target  # noqa: PLC0415 - a quick start
    from daemon.champions.rollback import rollback as roll_back  # noqa: PLC0415

    _require_words(reason)
    chosen_tracks(context, track)
    root = load_settings(context).state_folder
    word = word_of_user(reason)
    row = roll_back(open_writer(context), root, Target(track, to), word, try_out=_try_out)
    for line in deeds.rolled_back(row):
        print_line(line)
    _print_commands(context, track)


def hook(
    context: typer.Context,
    *,
    track: Annotated[str, typer.Option("--track", metavar="TRACK", help="The track whose server is told.")] = "default",
) -> None:
    """
    Run hooks.after_promotion again for the champion that serves, as after a failure.

    The daemon runs it with the settings that it was started with, and `status` and `history` say what came of it.
    """
    from daemon.champions.approval import who  # noqa: PLC0415 - a quick start
    from daemon.champions.hooks.changes import ask_again  # noqa: PLC0415

    settings = load_settings(context)
    settings.track(track)  # one that left the settings has no commands of its own any more
    ask_again(open_writer(context), settings, track, now_ms(), who())
    _print_commands(context, track)


def _require_words(reason: str | None) -> None:
    """Refuse a reason that would tell the history's readers nothing."""
    if reason is not None and not reason.strip():
        raise typer.BadParameter("--reason is blank: say why, for those who read the history")


def _try_out(folder: Path) -> None:
    """Let the model answer, and say that this is under way."""
    from daemon.champions.smoke_test import can_try, require_answer  # noqa: PLC0415 - a quick start

    if can_try():
        print_line(f"its files are what they were; loading {folder} to see that it answers")
        require_answer(folder)
    else:
        print_line("its files are what they were; not loaded, since the training stack is not installed here")


def _print_commands(context: typer.Context, track: str) -> None:
    """Say that the daemon runs the user's commands, and whether it is there to do so."""
    overview = open_overview(context)
    champion = overview.champion(track)
    if champion is not None:
        for line in command_lines(load_settings(context), champion, alive=overview.daemon().alive):
            print_line(line)


def _moment(text: str) -> datetime:
    """Return the time that was asked for; only the past has a history."""
    try:
        moment = datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError, OSError) as error:
        message = f"{text!r} is no time in ISO 8601: write 2026-11-24, 2026-11-24T02:00 or 2026-11-24T02:00+01:00"
        raise typer.BadParameter(message) from error
    now = datetime.now(UTC)
    if moment > now:
        message = f"{local(moment)} is still to come: it is {local(now)} now, and nobody knows who will serve then"
        raise typer.BadParameter(message)
    return moment


def _print_history(context: typer.Context, past: dict[str, list[ChampionView]]) -> None:
    rows = [
        (
            one.track,
            one.generation,
            one.kind,
            short_id(one.model_id),
            clock(one.since),
            one.run,
            _why_in_list(one),
        )
        for all_ in past.values()
        for one in reversed(all_)
    ]
    print_table(("TRACK", "GEN", "KIND", "MODEL", "SINCE", "RUN", "WHY"), rows)
    settings, alive = load_settings(context), open_overview(context).daemon().alive
    for one in (one for all_ in past.values() for one in reversed(all_)):
        if one.cost is not None:
            print_line(f"track {one.track}, generation {one.generation}: run {one.run} took {cost_words(one.cost)}")
        if one.over is not None:
            print_line(f"track {one.track}, generation {one.generation}: trained {one.training}")
        for line in taken_out_lines(one):
            print_line(f"track {one.track}, generation {one.generation}: {line}")
        for line in command_lines(settings, one, alive=alive):
            print_line(f"track {one.track}, generation {one.generation}: {line}")


def _print_moment(context: typer.Context, past: dict[str, list[ChampionView]], moment: datetime) -> None:
    settings, alive = load_settings(context), open_overview(context).daemon().alive
    for place, (name, found) in enumerate(past.items()):
        if place:
            print_line()
        if not found:
            print_line(f"track {name}: no champion at {local(moment)}")
            continue
        one = found[0]
        _print_champion(one)
        for drop in one.data:
            since = f", {drop.since_words}" if drop.taken_out else ""
            rows = count(drop.rows, "row")
            print_line(f"  drop {drop.id}: {drop.name}, {drop.role}, {rows}, sha256 {drop.sha256}{since}")
        for line in command_lines(settings, one, alive=alive, every=True):
            print_line(line)


def _why(one: ChampionView) -> str:
    """Return why a champion served, and by whose word."""
    who = one.approved_by
    if one.kind == "forced":
        return f"forced{f' by {who}' if who else ''} over {one.overrode}: {one.reason}"
    if one.kind == "promotion" and who:
        return f"{one.reason} (approved by {who})"
    return f"{one.reason} (by {who})" if who else one.reason


def _why_in_list(one: ChampionView) -> str:
    """Return why a champion served, as a list has it: of the gate's own word the gain alone."""
    if one.kind == "promotion" and one.gain is not None:
        return f"{signed(one.gain)} points{f', approved by {one.approved_by}' if one.approved_by else ''}"
    return _why(one)


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
        for line in taken_out_lines(one):
            print_line(line)
    print_line(f"why: {_why(one)}")
    if one.verdict is not None and one.verdict != one.reason:
        print_line(f"verdict of run {one.run}: {one.verdict}")
