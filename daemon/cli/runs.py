"""`runs`, `show`, `logs`, `train`, `retry`, `cancel`: looking at runs, beginning one and acting on one."""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path  # noqa: TC003 - a block of its own costs four lines
from typing import Annotated

import typer

from daemon.cli.output import clock, dump, local, print_json, print_line, print_older, print_table, verdict_lines
from daemon.cli.status import describe_run, files_in_inbox, outcome_words, review_lines
from daemon.cli.workspace import (
    MOST_LISTED,
    AllOption,
    JsonOption,
    RunArgument,
    TrackOption,
    chosen_tracks,
    count_older,
    load_settings,
    open_overview,
    open_writer,
)
from daemon.settings.origins import flat
from daemon.state.run_files import ArtifactDamaged, load_adapter, run_folder
from daemon.state.states import RunState, state_words
from daemon.system.clock import now_ms
from daemon.views.compare_runs import story_of
from daemon.views.details import deeds
from daemon.views.overview import NotThere, Overview, RunDetail
from pipeline.artifacts import Verdict
from pipeline.durable import read_object
from pipeline.models.prompt import prompt_form
from pipeline.report.cost import cost_words
from pipeline.search_settings import trial_words
from pipeline.steps import BY_NAME
from pipeline.words import count, duration

StateOption = Annotated[
    str | None,
    typer.Option(
        "--state",
        metavar="STATE",
        help="queued, running, waiting, succeeded, failed, cancelled or crashed.",
    ),
]
StepOption = Annotated[
    str | None, typer.Option("--step", metavar="STEP", help="Of this step only, as train or evaluate.")
]
_FOLLOW_SECONDS = 0.5


def runs(
    context: typer.Context,
    *,
    track: TrackOption = None,
    state: StateOption = None,
    whole: AllOption = False,
    as_json: JsonOption = False,
) -> None:
    """List the runs, newest first."""
    if state is not None and state not in set(RunState):
        raise typer.BadParameter(f"there is no state {state!r}: use one of {', '.join(RunState)}")
    if track is not None:
        chosen_tracks(context, track)
    overview = open_overview(context)
    found = overview.runs(track, None if state is None else [state], None if whole else MOST_LISTED)
    older = count_older(overview, "run", found[-1].id if found else None, track=track, state=state)
    if as_json:
        print_json(runs=dump(found), older=older)
        return
    if not found:
        print_line("no runs")
        return
    rows = [
        (
            run.id,
            run.track,
            run.state,
            clock(run.started_at),
            outcome_words(run) if run.ended_at else describe_run(run),
        )
        for run in found
    ]
    print_table(("RUN", "TRACK", "STATE", "BEGAN", ""), rows)
    print_older(older)


def show(context: typer.Context, *, run: RunArgument, as_json: JsonOption = False) -> None:
    """
    Show everything about one run.

    Its data, attempts, settings and folder, and the verdict with its numbers.
    """
    overview = open_overview(context)
    found = overview.run(run)
    if as_json:
        print_json(run=found.model_dump(mode="json"))
        return
    _print_head(found)
    _print_data(found)
    if found.attempts:
        print_line()
        attempts = [
            (f"{one.step}-{one.number}", one.state, local(one.started_at), duration(one.seconds), one.error)
            for one in found.attempts
        ]
        print_table(("ATTEMPT", "STATE", "BEGAN", "TOOK", "ERROR"), attempts)
    if found.config:
        print_line()
        for name in ("base_model", "train", "evaluate", "gate", "guards", "split"):
            print_line(f"{name}: {', '.join(_settings_words(found.config.get(name)))}")
    trained = read_object(run_folder(overview.folder, run) / "train.json").get("format")
    if trained in {"chat", "alpaca"}:
        print_line(f"prompt: {prompt_form(trained)}")
    _print_trials(overview, run)
    if found.verdict is not None:
        _print_verdict(overview, found, found.verdict)
    elif found.ended_at is not None:
        print_line()
        print_line("report: none, since the run ended without a verdict")


def _print_trials(overview: Overview, run: int) -> None:
    """Say what a search tried, and what it chose."""
    try:
        adapter = load_adapter(overview.folder, run)
    except ArtifactDamaged:
        return  # `status` and the run's error say so
    for one in adapter.candidates if adapter is not None else ():
        print_line(f"trial {trial_words(one)}")


def _print_verdict(overview: Overview, run: RunDetail, verdict: Verdict) -> None:
    print_line()
    story = story_of(overview, run)
    if story is not None and run.outcome != verdict.outcome:
        # What to do about a win that was not promoted stands in its line.
        story = story.model_copy(update={"next_steps": ()})
    for line in verdict_lines(verdict, story):
        print_line(line)
    for line in review_lines(overview, run):
        print_line(line)
    if verdict.report:
        print_line(f"report: {overview.folder / verdict.report / 'report.html'}")


def logs(
    context: typer.Context,
    *,
    run: RunArgument,
    step: StepOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run is over.")] = False,
) -> None:
    """Print what a run's steps have written."""
    overview = open_overview(context)
    tail = _Tail(overview, run, step)
    while follow and overview.run(run).ended_at is None:
        with suppress(NotThere):  # no log yet
            tail.print_new()
        time.sleep(_FOLLOW_SECONDS)
    tail.print_new(whole=True)


def train(
    context: typer.Context,
    *,
    track: Annotated[str, typer.Argument(metavar="[TRACK]", help="The track; that of the top level by default.")] = (
        "default"
    ),
) -> None:
    """
    Begin a run now, without waiting for a drop or for the night.

    Says which drops it will hold, and what the last one came to if none is new. A run that is queued already begins
    now.
    """
    from daemon.queue.run_queue import enqueue_by_hand  # noqa: PLC0415 - a quick start

    settings, overview = load_settings(context), open_overview(context)
    own = settings.track(track)
    run, drops = enqueue_by_hand(open_writer(context), track, now_ms())
    rows = sum(drop.rows for drop in drops if drop.role == "train")
    numbers = ", ".join(str(drop.id) for drop in drops if drop.role == "train")
    drops_words = f"drop{'s' if ',' in numbers else ''} {numbers}"
    print_line(f"run {run} trains on {count(rows, 'row')} of {drops_words}; it begins next{_when_it_acts(context)}")
    new = [f"{drop.id} ({drop.name})" for drop in drops if drop.first_run is None and drop.role == "train"]
    if own.train.start == "champion":
        print_line(f"it goes on from the champion if that may be: dropforge show {run} says so once it has begun")
    for pause in overview.paused():
        if pause.track == track:
            print_line(pause.words)
    print_line(f"new: {', '.join(new)}" if new else _nothing_new(overview, track, run))
    files = [] if overview.daemon().alive else files_in_inbox(settings, track)
    if files:
        print_line(f"not in it, since the daemon has not taken {'them' if files[1:] else 'it'} yet: {', '.join(files)}")


def _nothing_new(overview: Overview, track: str, run: int) -> str:
    """Say what the run before came to; it need not have had the same drops, as a trial has one alone."""
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

    With the settings of today, and without the drops that were withdrawn or suspended meanwhile: steps that this
    makes stale are done again, and it says which, and what stands.
    """
    from daemon.dispatch import stale_steps  # noqa: PLC0415 - a quick start

    if since is not None and since not in BY_NAME:
        raise typer.BadParameter(f"there is no step {since!r}: use one of {', '.join(BY_NAME)}")
    goes_on, words = stale_steps.retry(open_writer(context), load_settings(context), run, now_ms(), since)
    print_line(f"{goes_on}{_when_it_acts(context)}")
    if words:
        print_line(words)


def cancel(context: typer.Context, *, run: RunArgument) -> None:
    """
    End a run without a verdict.

    One that is running leaves a checkpoint first, so that it can be retried.
    """
    from daemon.queue import run_queue  # noqa: PLC0415 - a quick start

    state = run_queue.cancel(open_writer(context), run, now_ms())
    print_line(deeds.cancelled(run, state) + (_when_it_acts(context) if state == "running" else ""))


def _when_it_acts(context: typer.Context) -> str:
    alive = open_overview(context).daemon().alive
    return "" if alive else ", once the daemon runs: dropforge run"


def _print_head(run: RunDetail) -> None:
    print_line(f"run {run.id} of track {run.track}: {run.state}{f', {run.outcome}' if run.outcome else ''}")
    if run.ended_at is None:
        print_line(describe_run(run))
    elif run.trial:
        print_line(run.trial)
    if run.error:
        print_line(f"error: {run.error}")
    if run.hint:
        print_line(f"hint: {run.hint}")
    print_line(f"trigger: {run.trigger}, created {local(run.created_at)}")
    if run.started_at is not None:
        took = duration((run.ended_at - run.started_at).total_seconds()) if run.ended_at else ""
        ended = f", ended {local(run.ended_at)} after {took}" if run.ended_at else ""
        print_line(f"began {local(run.started_at)}{ended}")
    if run.cost is not None:
        print_line(f"cost: {cost_words(run.cost)}")
    if run.failures or run.deaths:
        print_line(f"failures: {run.failures}, vanished processes: {run.deaths}")
    print_line(f"folder: {run.folder}")


def _print_data(run: RunDetail) -> None:
    if run.snapshot:
        print_line()
        since = {drop.id: drop.since_words for drop in run.taken_out}
        rows = [(one["id"], one["role"], one["rows"], one["name"], since.get(one["id"])) for one in run.snapshot]
        print_table(("DROP", "ROLE", "ROWS", "NAME", ""), rows)
    if run.training:
        print_line(f"training: {run.training}")
    for warning in run.warnings:
        print_line(f"warning: {warning}")


def _settings_words(section: object) -> Iterator[str]:
    """Yield the settings of a section, or one alone, with their values as a settings file has them; words unquoted."""
    for name, value in flat(section) if isinstance(section, dict) else [((), section)]:
        words = value if value and isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        yield f"{'.'.join(name)} {words}".lstrip()


class _Tail:
    """Prints what is new in the logs of a run, under a line that names the attempt where it changes."""

    def __init__(self, overview: Overview, run: int, step: str | None) -> None:
        self._overview = overview
        self._run = run
        self._step = step
        self._read: dict[Path, int] = {}
        self._at: Path | None = None

    def print_new(self, *, whole: bool = False) -> None:
        """Print every finished line that is new; with `whole` an unfinished one at the end too."""
        for path in self._overview.logs(self._run, self._step):
            start = self._read.get(path, 0)
            with path.open("rb") as file:
                file.seek(start)
                data = file.read()
            end = len(data) if whole else data.rfind(b"\n") + 1
            if end == 0:
                continue
            if path != self._at:
                print_line(f"==> {path.parent.name} <==")
                self._at = path
            self._read[path] = start + end
            for line in data[:end].removesuffix(b"\n").split(b"\n"):
                # A progress bar writes one line over and over: its last state is enough.
                print_line(line.rstrip(b"\r").rpartition(b"\r")[2].decode("utf-8", "replace").expandtabs())
