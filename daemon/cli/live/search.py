"""`search`: a run that trains with several settings and sends the best one, by the dev rows, to the gate."""

import typer

from daemon.cli.live.queue import TrackArgument
from daemon.cli.output import print_line
from daemon.cli.workspace import load_settings, open_overview, open_writer
from daemon.queue.run_queue import enqueue_by_hand
from daemon.settings.model import SettingsError
from daemon.state.states import SEARCH
from daemon.system.clock import now_ms
from pipeline.search_settings import Range, SearchConfig, Value, most_trials
from pipeline.words import count, listed

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
    run, drops = enqueue_by_hand(open_writer(context), track, now_ms(), SEARCH)
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
