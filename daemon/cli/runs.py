"""`runs`, `show`, `logs`, `report`, `review`: list runs; show one, its logs, its evidence, its answers to judge."""

import json
import os
import sys
import webbrowser
from collections.abc import Iterator
from typing import Annotated

import typer

from daemon.champions.blind_review import KEYS, UNDO, Choice, Pair, Review, choose, put_on_card
from daemon.cli.output import clock, print_json, print_line, print_lines, print_table
from daemon.cli.status import describe_run, judged_words, outcome_words, review_lines
from daemon.cli.workspace import (
    MOST_LISTED,
    AllOption,
    JsonOption,
    RunArgument,
    TrackOption,
    chosen_tracks,
    load_settings,
    newest_only,
    open_overview,
    open_writer,
)
from daemon.settings.text import flat
from daemon.state.run_files import ArtifactDamaged, load_adapter, run_folder
from daemon.state.states import RunState
from daemon.system.clock import now_ms
from daemon.system.programs import who
from daemon.views.overview import Overview
from daemon.views.runs import AttemptView, RunDetail, RunView
from pipeline.artifacts import PAGE_NAME, Verdict
from pipeline.durable import read_object
from pipeline.errors import DropforgeError
from pipeline.models.template import prompt_form
from pipeline.report.facts import Story
from pipeline.report.story import p_value_words
from pipeline.search_settings import trial_words
from pipeline.words import count, duration, local, signed, span


def runs(
    context: typer.Context,
    *,
    track: TrackOption = None,
    state: Annotated[RunState | None, typer.Option("--state", help="In this state only.")] = None,
    whole: AllOption = False,
    as_json: JsonOption = False,
) -> None:
    """List the runs, newest first: the newest 50, or with --all all of them."""
    if track is not None:
        chosen_tracks(context, track)
    overview = open_overview(context)
    views = overview.runs(track, None if state is None else [state], None if whole else MOST_LISTED)
    if as_json:
        print_json(runs=views)
        return
    if not views:
        print_line("no runs")
        return
    print_table(("RUN", "TRACK", "STATE", "BEGAN", ""), map(_run_row, views))
    print_lines(newest_only(views, whole=whole))


def _run_row(run: RunView) -> tuple[object, ...]:
    words = outcome_words(run) if run.ended_at else describe_run(run)
    return (run.id, run.track, run.state, clock(run.started_at), words)


def show(context: typer.Context, *, run: RunArgument, as_json: JsonOption = False) -> None:
    """
    Show everything about one run.

    Its data, attempts, settings and folder, and the verdict with its numbers.
    """
    overview = open_overview(context)
    detail = overview.run(run)
    if as_json:
        print_json(run=detail)
        return
    _print_head(detail)
    _print_data(detail)
    if detail.attempts:
        print_line()
        print_table(("ATTEMPT", "STATE", "BEGAN", "TOOK", "ERROR"), map(_attempt_row, detail.attempts))
    if detail.config:
        print_line()
        for name in ("base_model", "train", "evaluate", "gate", "guards", "split"):
            print_line(f"{name}: {', '.join(_settings_words(detail.config.get(name)))}")
    trained = read_object(run_folder(overview.folder, run) / "train.json").get("format")
    if trained in {"chat", "alpaca"}:
        print_line(f"prompt: {prompt_form(trained)}")
    _print_trials(overview, run)
    if detail.verdict is not None:
        _print_verdict(overview, detail, detail.verdict)
    elif detail.ended_at is not None:
        print_lines(["", "report: none, since the run ended without a verdict"])


def _attempt_row(attempt: AttemptView) -> tuple[object, ...]:
    name = f"{attempt.step}-{attempt.number}"
    return (name, attempt.state, local(attempt.started_at), duration(attempt.seconds), attempt.error)


def _print_trials(overview: Overview, run: int) -> None:
    """Print a line for each trial of the run's search; nothing without a search or with a damaged adapter file."""
    try:
        adapter = load_adapter(overview.folder, run)
    except ArtifactDamaged:
        return  # `status` and the run's error say so
    for candidate in adapter.candidates if adapter is not None else ():
        print_line(f"trial {trial_words(candidate)}")


def _print_verdict(overview: Overview, run: RunDetail, verdict: Verdict) -> None:
    print_line()
    story = overview.story(run)
    if story is not None and run.outcome != verdict.outcome:
        # It won and was not promoted, or its control let it serve: its sentence has the next steps.
        story = story.model_copy(update={"next_steps": ()})
    print_lines([run.sentence or "", *verdict_lines(verdict, story), *review_lines(overview, run)])
    if verdict.report:
        print_line(f"report: {overview.folder / verdict.report / 'report.html'}")


def verdict_lines(verdict: Verdict, story: Story | None) -> list[str]:
    """
    Return the lines below a verdict's sentence: reasons and next steps from `story`, p-value, guards and slices.

    Without `story` there are no reasons and next steps. Guards are one line, with the number that failed. Slices by
    drop or tag are left out: "seen" (drops that the champion was trained on) and "unseen" (new drops) have a line.
    """
    lines = []
    if story is not None:
        lines += ["why:", *(f"  {words}" for words in story.why)]
        steps = [f"  {step.line}" for step in story.next_steps]
        lines += ["what to do next:", *steps] if steps else []
    lines += filter(None, [p_value_words(verdict)])
    if verdict.guards:
        failed = [guard for guard in verdict.guards if guard.state == "failed"]
        lines.append(f"guards: {len(failed)} of {len(verdict.guards)} failed")
    for part in verdict.slices:
        if part.kind in {"seen", "unseen"}:
            between = f", interval {span(part.interval)}" if part.interval else ""
            lines.append(f"{part.label}: gain {signed(part.gain)} points on {count(part.records, 'record')}{between}")
    return lines


def logs(context: typer.Context, *, run: RunArgument) -> None:
    """
    Print what a run's steps have written, oldest attempt first; of a progress bar only its last state.

    It is an error if there is no log yet.
    """
    for path in open_overview(context).logs(run):
        print_line(f"==> {path.parent.name} <==")
        for line in path.read_bytes().removesuffix(b"\n").split(b"\n"):
            # A progress bar writes one line over and over: its last state is enough.
            print_line(line.rstrip(b"\r").rpartition(b"\r")[2].decode("utf-8", "replace").expandtabs())


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
    print_line(f"trigger: {run.trigger}, purpose: {run.purpose}, created {local(run.created_at)}")
    if run.started_at is not None:
        took = duration((run.ended_at - run.started_at).total_seconds()) if run.ended_at else ""
        ended = f", ended {local(run.ended_at)} after {took}" if run.ended_at else ""
        print_line(f"began {local(run.started_at)}{ended}")
    if run.failures or run.deaths:
        print_line(f"failures: {run.failures}, vanished processes: {run.deaths}")
    print_line(f"folder: {run.folder}")


def _print_data(run: RunDetail) -> None:
    if run.snapshot:
        print_line()
        since = {drop.id: drop.since_words for drop in run.taken_out}
        keys = ("id", "role", "rows", "records", "name")
        rows = [(*(drop[key] for key in keys), since.get(drop["id"])) for drop in run.snapshot]
        print_table(("DROP", "ROLE", "ROWS", "RECORDS", "NAME", ""), rows)
    if run.training:
        print_line(f"training: {run.training}")
    if run.left_out:
        print_line(f"left out: {run.left_out}")
    for warning in run.warnings:
        print_line(f"warning: {warning}")


def _settings_words(section: object) -> Iterator[str]:
    """Yield "DOTTED.NAME VALUE" for each setting of a section, or a single setting's value; JSON, but bare strings."""
    for name, value in flat(section) if isinstance(section, dict) else [((), section)]:
        words = value if value and isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        yield f"{'.'.join(name)} {words}".lstrip()


def report(
    context: typer.Context,
    *,
    run: RunArgument,
    path: Annotated[bool, typer.Option("--path", help="Print where the page lies, and open nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """
    Open the evidence behind a run's verdict in a browser.

    It is one file, report.html, that can be copied or sent. Its path is printed, and without a display nothing is
    opened. With --json the same as data, which schemas/report.schema.json describes. It is an error if there is none.
    """
    overview = open_overview(context)
    if as_json:
        print_json(report=overview.report_data(run))
        return
    page = overview.report_folder(run).absolute() / PAGE_NAME
    if not path and (sys.platform == "darwin" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()):
        webbrowser.open(page.as_uri())
    print_line(str(page))


def review(
    context: typer.Context,
    *,
    run: RunArgument,
    choose: Annotated[
        list[str] | None,
        typer.Option("--choose", metavar="PAIR=KEY", help="Judge a pair of those that --json prints; may be repeated."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """
    Compare a run's answers with the champion's without knowing which is which.

    Keys: 1 the first is better, 2 the second, 0 neither, u takes the last answer back, q goes on another time. At the
    end, when nothing can be taken back any more, the counts and an exact sign test are shown, and written on the run's
    card. Each choice is stored at once. For programs --json prints the pairs that are left and --choose judges them.
    """
    overview = open_overview(context)
    for given in choose or ():
        pair, sign, key = given.partition("=")
        if not sign:
            raise typer.BadParameter(f"--choose {given}: write PAIR=KEY, as 4f1c09a2b7e35d68=1")
        _choose(context, run, pair, key)
    progress = overview.review(run)
    if not as_json and not choose:
        progress = _ask_all(context, progress)
    if as_json:
        print_json(review=progress)
        return
    print_line(judged_words(progress))


def _choose(context: typer.Context, run: int, pair: str, key: str) -> Review:
    choice = Choice(pair, key, now_ms(), who())
    return choose(open_writer(context), load_settings(context).work_folder, run, choice)


def _ask_all(context: typer.Context, progress: Review) -> Review:
    """
    Show the pairs one by one, store the choice that is typed for each, and return the review after the last, or at q.

    If it is complete, only put its result on the card. Raises `DropforgeError` if stdin or stdout is no terminal.
    """
    if progress.result is not None:
        put_on_card(load_settings(context).work_folder, progress.run, progress.result)
    elif not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise DropforgeError(
            "the keys of a review are read from a terminal, and this is none",
            f"dropforge review {progress.run} --json prints the pairs, --choose PAIR=1 judges one",
        )
    while progress.left:
        _show_pair(progress, progress.left[0])
        while (key := _read_key()) not in KEYS and not (key == UNDO and progress.last):
            if key == "q":
                return progress
        pair = progress.last if key == UNDO and progress.last else progress.left[0].id
        progress = _choose(context, progress.run, pair, key)
    return progress


def _show_pair(progress: Review, pair: Pair) -> None:
    print_line(f"--- {progress.judged + 1} of {progress.asked}")
    for head, text in (
        ("earlier turns", pair.earlier),
        ("instruction", pair.instruction),
        ("input", pair.input),
        ("answer 1", pair.first),
        ("answer 2", pair.second),
    ):
        if text or head.startswith("answer"):
            print_line(f"{head}:" if text else f"{head}: (empty)")
            for line in text.expandtabs().splitlines():
                print_line(f"  | {line}")


def _read_key() -> str:
    print("better: 1, 2, or 0 for neither (u: take the last back, q: go on another time) ", end="", flush=True)
    key = typer.getchar()
    print_line(key)
    return key.lower()
