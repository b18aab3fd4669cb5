"""`move`, `pause`, `resume`: a person's word on the order of the queue, and on tracks that begin no run."""

from typing import Annotated

import typer

from daemon.champions.approval import who
from daemon.cli.output import print_line
from daemon.cli.workspace import RunArgument, chosen_tracks, complete_run, open_writer, small_enough, word_of_user
from daemon.queue.scheduling import pausing
from daemon.queue.scheduling.order import move as put
from daemon.system.clock import now_ms
from daemon.views.details.deeds import moved, paused, resumed

TrackArgument = Annotated[str, typer.Argument(metavar="[TRACK]", help="The track; that of the top level by default.")]


def move(
    context: typer.Context,
    *,
    run: RunArgument,
    first: Annotated[bool, typer.Option("--first", help="Before all that is not running.")] = False,
    after: Annotated[
        int | None,
        typer.Option(
            "--after",
            metavar="RUN",
            help="Right behind this run.",
            autocompletion=complete_run,
            callback=small_enough,
        ),
    ] = None,
) -> None:
    """
    Let a queued or waiting run go before all others, or right behind another one.

    It still waits for its own time, as for its track's quiet. What comes later goes behind what was moved.
    """
    if first == (after is not None):
        raise typer.BadParameter("say where to: --first, or --after RUN")
    order = put(open_writer(context), run, now_ms(), who(), after)
    print_line(moved(order))


def pause(
    context: typer.Context,
    *,
    track: TrackArgument = "default",
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why; `status` says it to everybody.")],
) -> None:
    """
    Let a track begin no run until it is resumed.

    A run that is under way ends as it would have. Drops are taken in and runs queued as ever.
    """
    if not reason.strip():
        raise typer.BadParameter("--reason is blank: say why, for those who read the status")
    chosen_tracks(context, track)
    pausing.pause(open_writer(context), track, word_of_user(reason))
    print_line(paused(track))


def resume(
    context: typer.Context,
    *,
    track: TrackArgument = "default",
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why; kept with the event.")] = "",
) -> None:
    """Let a paused track begin runs again."""
    pausing.resume(open_writer(context), track, word_of_user(reason))
    print_line(resumed(track))
