"""`drops`: what was taken in; accepting a proposed drop, taking one out of later runs, putting it back."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli.output import clock, dump, print_json, print_line, print_table
from daemon.cli.workspace import (
    JsonOption,
    TrackOption,
    chosen_tracks,
    load_settings,
    open_overview,
    open_writer,
    small_enough,
)

if TYPE_CHECKING:
    from daemon.settings.model import Settings
    from daemon.views.drop_lineage import DropUses, DropView

DropArgument = Annotated[int, typer.Argument(metavar="DROP", help="Number of the drop.", callback=small_enough)]
ReasonOption = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why; kept with the drop.")]
StateOption = Annotated[
    str | None,
    typer.Option("--state", help="accepted, proposed, rejected, duplicate, withdrawn or suspended.", metavar="STATE"),
]


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    group = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
    group.callback()(drops)
    group.command()(accept)
    group.command()(withdraw)
    group.command()(restore)
    app.add_typer(group, name="drops")


def drops(
    context: typer.Context, *, track: TrackOption = None, state: StateOption = None, as_json: JsonOption = False
) -> None:
    """List the files that were taken in, newest first."""
    if context.invoked_subcommand is not None:
        return
    from daemon.state.states import DropState  # noqa: PLC0415 - a quick start
    from daemon.views.details.missing_rows import missing_rows  # noqa: PLC0415

    if state is not None and state not in set(DropState):
        message = f"there is no state {state!r}: use one of {', '.join(DropState)}"
        raise typer.BadParameter(message)
    if track is not None:
        chosen_tracks(context, track)
    overview = open_overview(context)
    found = overview.drops(track, state)
    if as_json:
        print_json(drops=dump(found))
        return
    if not found:
        print_line("no drops")
    else:
        _print_list(found)
    for said in missing_rows(load_settings(context), overview, track).values() if state is None else ():
        print_line(said)


def _print_list(found: Sequence["DropView"]) -> None:
    rows = [
        (
            drop.id,
            drop.track,
            state_words(drop),
            drop.rows,
            drop.first_run,
            clock(drop.received_at),
            ": ".join(filter(None, (place_words(drop), _why(drop)))),
        )
        for drop in found
    ]
    print_table(("DROP", "TRACK", "STATE", "ROWS", "RUN", "RECEIVED", "NAME"), rows)


def place_words(drop: "DropView") -> str:
    """Return a drop's name as it lay in its track's inbox: below heldout/, if it is held out."""
    return f"heldout/{drop.name}" if drop.role == "heldout" else drop.name


def _why(drop: "DropView") -> str:
    """Return why a drop is in the state that it is in, or what is odd in it; empty where there is nothing to say."""
    same = f"the same as drop {drop.duplicate_of}" if drop.duplicate_of else ""
    return waiting_words(drop) or drop.on_trial or drop.reason or same or drop.unlikely or ""


def state_words(drop: "DropView") -> str:
    """Return a drop's state as a person reads it; one that is on trial is accepted, and in no run but its own."""
    return "on trial" if drop.on_trial else drop.state


def waiting_words(drop: "DropView") -> str:
    """Say how a drop that waits for a person's word gets it, and why it waits; empty for any other."""
    return f"waits for a person: dropforge drops accept {drop.id}; {drop.reason}" if drop.state == "proposed" else ""


def accept(
    context: typer.Context,
    *,
    drop: DropArgument,
    reason: Annotated[str | None, typer.Option("--reason", metavar="TEXT", help="Why; kept with the event.")] = None,
) -> None:
    """
    Let a held-out file that waits for a person count.

    Such a file says what every later model is judged on: look at its records first.
    """
    from daemon.champions.approval import who  # noqa: PLC0415 - a quick start
    from daemon.inbox.answers.remarks import use_of_pinned  # noqa: PLC0415
    from daemon.queue.drops import accept as let_count  # noqa: PLC0415
    from daemon.state.events import Word  # noqa: PLC0415
    from daemon.system.clock import now_ms  # noqa: PLC0415

    engine, settings = open_writer(context), load_settings(context)
    row = let_count(engine, drop, Word(reason or "", now_ms(), who()), settings)
    print_line(f"drop {drop} ({row.name}) is accepted: {use_of_pinned(settings, row.track)}")
    _print_queued(context, settings, row.track)


def withdraw(context: typer.Context, *, drop: DropArgument, reason: ReasonOption) -> None:
    """
    Take a drop out of every later run.

    Its file and its history stay. Open runs and pending approvals that were made from it are cancelled, and a run
    without it is queued. A champion that was trained on it stays and is named.
    """
    from daemon.champions.approval import who  # noqa: PLC0415 - a quick start
    from daemon.queue.drops import withdraw as take_out  # noqa: PLC0415
    from daemon.state.events import Word  # noqa: PLC0415
    from daemon.system.clock import now_ms  # noqa: PLC0415

    word = Word(reason, now_ms(), who())
    done = take_out(open_writer(context), drop, word, load_settings(context))
    for line in (*done.words, *_still_in(open_overview(context).uses(drop), done.drop.track)):
        print_line(line)
    if done.queued is not None and done.drop.role == "heldout":
        print_line(
            "if a corrected file is to take its place, drop it before that run begins: it judges with what is there"
        )


def restore(context: typer.Context, *, drop: DropArgument, reason: ReasonOption) -> None:
    """
    Put a withdrawn or suspended drop back, or one that is on trial.

    It counts as new and starts a run as a new drop would.
    """
    from daemon.champions.approval import who  # noqa: PLC0415 - a quick start
    from daemon.queue.drops import restore as put_back  # noqa: PLC0415
    from daemon.state.events import Word  # noqa: PLC0415
    from daemon.system.clock import now_ms  # noqa: PLC0415

    engine, settings = open_writer(context), load_settings(context)
    row = put_back(engine, drop, Word(reason, now_ms(), who()), settings)
    print_line(f"drop {drop} ({row.name}) is accepted again: the next run of track {row.track} uses it")
    _print_queued(context, settings, row.track)


def _print_queued(context: typer.Context, settings: "Settings", track: str) -> None:
    """Say that a run is queued, if one is, and when it begins."""
    from daemon.state.states import RunState  # noqa: PLC0415 - a quick start

    for run in open_overview(context).runs(track, [RunState.QUEUED]) if track in settings.track_names else ():
        quiet = settings.track(track).run_after_quiet_seconds
        print_line(f"run {run.id} is queued: it begins after {quiet:g} s without another drop")


def _still_in(uses: "DropUses", track: str) -> list[str]:
    """Say whether the champion was trained on a withdrawn drop, and what a person can do about it."""
    if uses.champion is None:
        return []
    see = f"dropforge history --track {track}"
    back = f"dropforge rollback --track {track} --to {uses.before} --reason TEXT"
    way = f"to let the latest one without withdrawn drops serve: {back}"
    if uses.before is None:
        way = f"every former one has withdrawn drops, lost its place by a rollback or is gone: {see}"
    return [f"the champion of track {track}, generation {uses.champion}, was trained on it; {way}"]
