"""Commands that change the queue: `train`, `search`, `retry`, `cancel`, `move`, `pause` and `resume`."""

from typing import Annotated

import typer

from daemon.cli.output import print_line, print_lines
from daemon.cli.status import files_in_inbox, outcome_words
from daemon.cli.workspace import (
    AnyReasonOption,
    ReasonOption,
    RunArgument,
    TrackArgument,
    chosen_tracks,
    load_settings,
    open_overview,
    open_writer,
    word_of_user,
)
from daemon.dispatch import stale_steps
from daemon.queue import order, run_queue
from daemon.settings.model import SettingsError
from daemon.state.states import SEARCH, state_words
from daemon.system.clock import now_ms
from daemon.system.programs import who
from daemon.views import confirmations
from daemon.views.overview import Overview
from pipeline.search_settings import Range, SearchConfig, Value, most_trials
from pipeline.steps import BY_NAME
from pipeline.words import count, listed


def train(
    context: typer.Context,
    *,
    track: TrackArgument = "default",
) -> None:
    """
    Begin a run now, without waiting for a drop or for the night.

    Says which drops it will hold, and what the last one came to if none is new. A run that is queued already begins
    now.
    """
    settings, overview = load_settings(context), open_overview(context)
    own = settings.track(track)
    run, drops = run_queue.enqueue_by_hand(open_writer(context), track, now_ms())
    rows = sum(drop.rows for drop in drops if drop.role == "train")
    numbers = ", ".join(str(drop.id) for drop in drops if drop.role == "train")
    drops_words = f"drop{'s' if ',' in numbers else ''} {numbers}"
    print_line(f"run {run} trains on {count(rows, 'row')} of {drops_words}; it begins next{_when_it_acts(context)}")
    new = [f"{drop.id} ({drop.name})" for drop in drops if drop.first_run is None and drop.role == "train"]
    if own.train.start == "champion":
        print_line(f"it goes on from the champion if that may be: dropforge show {run} says so once it has begun")
    print_lines(pause.words for pause in overview.paused() if pause.track == track)
    print_line(f"new: {', '.join(new)}" if new else _nothing_new(overview, track, run))
    files = [] if overview.daemon().alive else files_in_inbox(settings, track)
    if files:
        print_line(f"not in it, since the daemon has not taken {'them' if files[1:] else 'it'} yet: {', '.join(files)}")


def _nothing_new(overview: Overview, track: str, run: int) -> str:
    """Return that no drop is new, with the outcome or state of the track's previous run, if there was one."""
    last = next(iter(overview.runs(track, most=1, before=run)), None)
    if last is None:
        return "no drop is new"
    became = outcome_words(last) if last.ended_at else f"it {state_words(last.state)}"
    return f"no drop is new; run {last.id}, the last one: {became}"


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

    With the settings of today, and without the drops that were withdrawn or suspended meanwhile: the first step that
    this makes stale and all later ones are done again.
    """
    if since is not None and since not in BY_NAME:
        raise typer.BadParameter(f"there is no step {since!r}: use one of {', '.join(BY_NAME)}")
    goes_on = stale_steps.retry(open_writer(context), load_settings(context).state_folder, run, now_ms(), since)
    print_line(f"{goes_on}{_when_it_acts(context)}")


def cancel(context: typer.Context, *, run: RunArgument) -> None:
    """
    End a run without a verdict.

    One that is running leaves a checkpoint first, so that it can be retried.
    """
    state = run_queue.cancel(open_writer(context), run, now_ms())
    print_line(confirmations.cancelled(run, state) + (_when_it_acts(context) if state == "running" else ""))


def _when_it_acts(context: typer.Context) -> str:
    alive = open_overview(context).daemon().alive
    return "" if alive else ", once the daemon runs: dropforge run"


def move(
    context: typer.Context,
    *,
    run: RunArgument,
    first: Annotated[bool, typer.Option("--first", help="Before all that is not running.")] = False,
) -> None:
    """
    Let a queued or waiting run go before all others.

    It still waits for its own time, as for its track's quiet. What comes later goes behind what was moved.
    """
    if not first:
        raise typer.BadParameter("say where to: --first")
    print_line(confirmations.moved(order.move_first(open_writer(context), run, now_ms(), who())))


def pause(
    context: typer.Context,
    *,
    track: TrackArgument = "default",
    reason: ReasonOption,
) -> None:
    """
    Let a track begin no run until it is resumed.

    A run that is under way ends as it would have. Drops are taken in and runs queued as ever.
    """
    chosen_tracks(context, track)
    order.pause(open_writer(context), track, word_of_user(reason))
    print_line(confirmations.paused(track))


def resume(
    context: typer.Context,
    *,
    track: TrackArgument = "default",
    reason: AnyReasonOption = None,
) -> None:
    """Let a paused track begin runs again."""
    order.resume(open_writer(context), track, word_of_user(reason))
    print_line(confirmations.resumed(track))


_EXAMPLE = "name what to try in [train.search], as space = { learning_rate = [1e-4, 2e-4, 4e-4], rank = [8, 32] }"


def search(context: typer.Context, *, track: TrackArgument = "default") -> None:
    """
    Begin a run now that trains several times, with what [train.search] has to try.

    One of the trainings, by the rows of the dev split, is merged, evaluated and judged as any other; the card shows the
    others. With train.search.when = "asked" only such runs search.
    """
    wanted = load_settings(context).track(track).train.search
    if not wanted.space:
        raise SettingsError(f"track {track} has nothing to search: [train.search.space] is empty", _EXAMPLE)
    run, drops = run_queue.enqueue_by_hand(open_writer(context), track, now_ms(), SEARCH)
    rows = sum(drop.rows for drop in drops if drop.role == "train")
    begins = (
        "it begins next" if open_overview(context).daemon().alive else "it begins once the daemon runs: dropforge run"
    )
    print_line(f"run {run} searches on {count(rows, 'row')}: {_words(wanted)}; {begins}")
    for name, values in wanted.space.items():
        print_line(f"  {name}: {_values(values)}")


def _words(wanted: SearchConfig) -> str:
    most = most_trials(wanted)
    how = ", all combinations" if wanted.method == "grid" else " at most, chosen by Optuna (TPE)"
    hours = f", within {wanted.hours:g} h" if wanted.hours else ""
    return f"{count(most, 'trial')}{how}{hours}"


def _values(values: Range | tuple[Value, ...]) -> str:
    if isinstance(values, tuple):
        return listed([", ".join(value) if isinstance(value, tuple) else str(value) for value in values])
    return f"{values.low:g} to {values.high:g}{', by its logarithm' if values.log else ''}"
