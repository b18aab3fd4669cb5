"""Commands that change the queue: `train`, `search`, `retry`, `cancel`, `move`, `pause` and `resume`."""

from typing import Annotated

import typer

from daemon.cli.output import print_line, print_lines
from daemon.cli.workspace import (
    AnyReasonOption,
    ReasonOption,
    RunArgument,
    TrackArgument,
    chosen_tracks,
    load_settings,
    not_in_force,
    open_overview,
    open_writer,
    word_of_user,
)
from daemon.dispatch import stale_steps
from daemon.queue import order, run_queue
from daemon.settings.model import SettingsError
from daemon.system.clock import now_ms
from daemon.system.programs import who
from daemon.views import confirmations
from pipeline.search_settings import most_trials
from pipeline.words import count


def train(context: typer.Context, *, track: TrackArgument = "default") -> None:
    """
    Begin a run now, without waiting for a drop or for the night.

    Says how many drops it will hold, and how many of them are new. A run that is queued already is due now. It is an
    error if the track has no drop to train on. The command returns at once: to see the result, dropforge wait.
    """
    load_settings(context).track(track)
    run, drops = run_queue.enqueue_by_hand(open_writer(context), track, now_ms())
    held = [drop for drop in drops if drop.role == "train"]
    rows, new = sum(drop.rows for drop in held), sum(drop.first_run is None for drop in held)
    data = f"{count(rows, 'row')} of {count(len(held), 'drop')}, {new} of them new"
    print_line(f"run {run} trains on {data}; it begins next{_when_it_acts(context)}")
    print_lines(not_in_force(open_overview(context)))


def retry(
    context: typer.Context,
    *,
    run: RunArgument,
    since: Annotated[
        str | None, typer.Option("--from", metavar="STEP", help="Do this step again, as train, and all later ones.")
    ] = None,
) -> None:
    """
    Let a failed, cancelled or crashed run go on where it stopped.

    It uses the settings that the daemon has in force, and no drop that was withdrawn or suspended since. The first step
    that these changes make stale, with --from STEP at the latest that one, and all later steps are done again. A run
    that never began is queued anew. In any other state this is an error.
    """
    goes_on = stale_steps.retry(open_writer(context), load_settings(context).work_folder, run, now_ms(), since)
    print_line(f"{goes_on}{_when_it_acts(context)}")
    print_lines(not_in_force(open_overview(context)))


def cancel(context: typer.Context, *, run: RunArgument) -> None:
    """
    End a run without a verdict.

    A running run is only asked to stop: it leaves a checkpoint first, so that it can be retried. A win that waits for
    approval is turned down: its model is not promoted. For a run that has ended otherwise this is an error.
    """
    state = run_queue.cancel(open_writer(context), run, now_ms())
    print_line(confirmations.cancelled(run, state) + (_when_it_acts(context) if state == "running" else ""))


def _when_it_acts(context: typer.Context) -> str:
    alive = open_overview(context).daemon().alive
    return "" if alive else ", once the daemon runs: dropforge run"


def move(context: typer.Context, *, run: RunArgument) -> None:
    """
    Let a queued or waiting run go before all others, also before those that were moved earlier.

    It still waits until its earliest start, as after a failure. A run that is running goes on first, even if
    interrupted. Prints the new order. For any other run this is an error.
    """
    print_line(confirmations.moved(order.move_first(open_writer(context), run, now_ms(), who())))


def pause(context: typer.Context, *, track: TrackArgument = "default", reason: ReasonOption) -> None:
    """
    Let a track begin no run until it is resumed.

    A run that is running goes on; if it is interrupted, or has to try a step again, it waits. Drops are taken in and
    runs queued as usual. It is an error if the track is paused already.
    """
    chosen_tracks(context, track)
    order.pause(open_writer(context), track, word_of_user(reason))
    print_line(confirmations.paused(track))


def resume(context: typer.Context, *, track: TrackArgument = "default", reason: AnyReasonOption = None) -> None:
    """Let a paused track begin runs again; it is an error if the track is not paused."""
    order.resume(open_writer(context), track, word_of_user(reason))
    print_line(confirmations.resumed(track))


_EXAMPLE = "name what to try in [train.search], as space = { learning_rate = [2e-4, 5e-4, 1e-3], rank = [8, 32] }"


def search(context: typer.Context, *, track: TrackArgument = "default") -> None:
    """
    Begin a run now that trains several times, each time with other settings.

    It tries the settings in [train.search]. The training with the lowest loss on the dev split is merged, evaluated and
    judged as any other; the card shows the others. With train.search.when = "asked" only such runs search. A run that
    is queued already becomes such a run. It is an error if [train.search.space] is empty or the track has no drop to
    train on.
    """
    wanted = load_settings(context).track(track).train.search
    if not wanted.space:
        raise SettingsError(f"track {track} has nothing to search: [train.search.space] is empty", _EXAMPLE)
    run, drops = run_queue.enqueue_by_hand(open_writer(context), track, now_ms(), search=True)
    rows, trials = sum(drop.rows for drop in drops if drop.role == "train"), count(most_trials(wanted), "trial")
    print_line(f"run {run} searches on {count(rows, 'row')} in {trials}; it begins next{_when_it_acts(context)}")
    print_lines(not_in_force(open_overview(context)))
