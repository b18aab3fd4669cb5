"""`status`: print what the daemon does, what waits, and the outcomes of the latest runs."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer

from daemon.champions.blind_review import Review
from daemon.champions.hooks.commands import last_line
from daemon.cli.output import (
    answers_words,
    clock,
    drop_words,
    print_json,
    print_line,
    print_lines,
    print_table,
    waiting_words,
)
from daemon.cli.workspace import JsonOption, load_settings, open_overview
from daemon.inbox.drop_folders import is_skipped, watched_folders
from daemon.settings.model import Settings
from daemon.settings.text import next_fire
from daemon.state.clauses import watch_clauses
from daemon.storage.disk import Disk
from daemon.views.champion_history import ChampionView, ServingView
from daemon.views.overview import Overview
from daemon.views.runs import RunView
from pipeline.errors import DropforgeError
from pipeline.words import printable, short, size_words, until

EXIT_UNAVAILABLE = 69
#: Most drops, and most ended runs, that are listed.
LATEST = 5
Champions = dict[str, ServingView | None]


def status(context: typer.Context, *, as_json: JsonOption = False) -> None:
    """
    Say what the daemon does and what waits.

    With the champions, the drops, and the outcomes of the latest runs. Exit code 69 if the daemon is not running.
    """
    settings, overview = load_settings(context), open_overview(context)
    if as_json:
        _print_status_json(settings, overview)
    else:
        print_status(settings, overview)
    if not overview.daemon().alive:
        raise typer.Exit(EXIT_UNAVAILABLE)


def print_status(settings: Settings, overview: Overview) -> None:
    """Print daemon, disk, inbox, tracks, what needs a person, open runs, and the latest five drops and ended runs."""
    daemon = overview.daemon()
    process = f", process {daemon.pid}" if daemon.pid else ""
    print_line(f"daemon: running{process}" if daemon.alive else "daemon: not running; start it: dropforge run")
    print_line(f"inbox: {settings.inbox}")
    print_line(f"state: {settings.state}")
    disk = _disk(settings)
    print_line(disk["shortage"] or f"disk: {size_words(disk['free_bytes'])} free")
    _print_inbox(settings, overview, alive=daemon.alive)
    for whose, words in (overview.troubles() if daemon.alive else {}).items():
        print_line(f"trouble: {whose}: {words}")
    print_lines(pause.words for pause in overview.paused())
    champions = _champions(settings, overview)
    _print_tracks(settings, overview, champions)
    for drop in overview.drops(state="proposed", most=LATEST):
        print_line(f"drop {drop.id} of track {drop.track} ({drop.name}) {waiting_words(drop)}")
    for drop in overview.drops_with_new_answers(LATEST):
        print_line(f"drop {drop.id} of track {drop.track} ({drop.name}): {answers_words(drop)}")
    for run in (*overview.wins(blocked=False), *overview.wins(blocked=True)):
        print_line(f"run {run.id} of track {run.track}: {outcome_words(run)}")
    for champion in filter(None, champions.values()):
        for line in command_lines(champion, alive=daemon.alive):
            print_line(f"track {champion.track}, generation {champion.generation}: {line}")
        print_lines(watch_clauses(champion.track, champion.watch) if champion.watch else ())
    _print_latest(overview)


def describe_run(run: RunView) -> str:
    """
    Return an open run's trial, its progress or, if it is not running, when it begins, and its last error.

    If it is to be cancelled, this replaces the error; if its track is paused, error and begin.
    """
    trial = f"{run.trial}; " if run.trial else ""
    if run.state == "running":
        before = f"; before that: {run.error}" if run.error else ""
        ending = "; to be cancelled" if run.cancel_requested else before
        return trial + (run.progress.words if run.progress else run.step or "beginning") + ending
    if run.paused:
        return trial + run.paused
    words = f"{trial}begins {until(run.not_before) or 'in its turn'}"
    return f"{words}; {run.error}" if run.error else words


def outcome_words(run: RunView) -> str:
    """Return an ended run's verdict, or its state and error if it has none, and for a trial run which drop it tried."""
    return "; ".join(filter(None, (run.sentence or ": ".join(filter(None, (run.state, run.error))), run.trial)))


def _champions(settings: Settings, overview: Overview) -> Champions:
    names = dict.fromkeys([*settings.track_names, *overview.tracks()])
    return {**names, **{champion.track: champion for champion in overview.champions(names)}}


def _print_status_json(settings: Settings, overview: Overview) -> None:
    lacks, daemon, champions = overview.missing_rows(settings), overview.daemon(), _champions(settings, overview)
    nights = {name: _next_night(settings, name) for name in champions}
    print_json(
        daemon=daemon,
        inbox={"folder": settings.inbox, "files": files_in_inbox(settings), **overview.inbox_note()},
        state=settings.state,
        disk=_disk(settings),
        troubles=overview.troubles() if daemon.alive else {},
        tracks=[
            {
                "name": name,
                "champion": champion,
                "lacks": lacks.get(name),
                "next_night": night.astimezone(UTC).isoformat() if (night := nights[name]) else None,
            }
            for name, champion in champions.items()
        ],
        awaiting=overview.wins(blocked=False),
        blocked=overview.wins(blocked=True),
        proposed=overview.drops(state="proposed", most=LATEST),
        new_answers=overview.drops_with_new_answers(LATEST),
        drops=overview.drop_counts(),
        latest_drops=overview.drops(most=LATEST),
        paused=overview.paused(),
        runs=overview.open_runs(),
        latest=overview.ended_runs(LATEST),
    )


def files_in_inbox(settings: Settings) -> list[str]:
    """Return the paths, relative to the inbox, printable and sorted, of files in watched folders but ignored names."""
    paths: list[Path] = []
    for folder in watched_folders(settings):
        if folder.path.is_dir():
            paths += [path for path in folder.path.iterdir() if not is_skipped(os.fsencode(path.name))]
    return sorted(printable(str(path.relative_to(settings.inbox_folder))) for path in paths if path.is_file())


def _disk(settings: Settings) -> dict[str, Any]:
    disk = Disk(settings)
    sizes = {"free_bytes": disk.least_free_bytes(), "low_water_bytes": disk.low_water_bytes}
    return {**sizes, "shortage": disk.shortage() or None}


def _print_inbox(settings: Settings, overview: Overview, *, alive: bool) -> None:
    files = files_in_inbox(settings)
    note = overview.inbox_note()
    why = dict.fromkeys(note["waiting"], " (still open for writing)")
    why |= {left["name"]: f": {left['why']}" for left in note["left"]}
    for name in files:
        print_line(f"  not taken yet: {name}{why.get(name, '') if alive else ''}")
    for name in [left["name"] for left in note["left"] if left["name"].endswith("/")]:
        print_line(f"  not used: {name}{why[name]}")
    for folder in note["unknown_folders"]:
        near = f"; did you mean {folder['nearest']}?" if folder["nearest"] else ""
        print_line(f"  left alone: {folder['name']}/ is no declared track{near}")
    for track in note["full_tracks"]:
        print_line(f"  track {track}: further files wait for a run, the limit is intake.max_waiting_drops")


def _next_night(settings: Settings, track: str) -> datetime | None:
    """Return the next time of a track's schedule; `None` if it has none or is no longer in the settings."""
    track_settings = settings.track(track) if track in settings.track_names else None
    if track_settings is None or track_settings.trigger == "drop":
        return None
    return next_fire(track_settings.schedule, track_settings.timezone, datetime.now(UTC))


def _print_tracks(settings: Settings, overview: Overview, champions: Champions) -> None:
    counts = overview.drop_counts()
    rows = []
    for name, champion in champions.items():
        words = _champion_words(champion) if champion is not None else _why_none(settings, name)
        drops = ", ".join(f"{number} {state}" for state, number in sorted(counts.get(name, {}).items()))
        rows.append((name, words, drops or "none"))
    print_line()
    print_table(("TRACK", "CHAMPION", "DROPS"), rows)
    for name in settings.track_names:
        night = _next_night(settings, name)
        if night is not None:
            print_line(f"the next night of track {name} begins {until(night) or 'now'}, at {clock(night)}")
    print_lines([*overview.missing_rows(settings).values(), *overview.data_warnings()])


def _champion_words(champion: ServingView) -> str:
    how = champion.reason if champion.run is None else f"{champion.kind} of run {champion.run}"
    return f"generation {champion.generation}, {short(champion.model_id)}, {how}"


def review_lines(overview: Overview, run: RunView) -> list[str]:
    """Return a line on a run's blind review; none if it is unreadable, or neither begun nor needed for approval."""
    try:
        review = overview.review(run.id)
    except (DropforgeError, OSError):
        return []  # no answers to compare, or none that this user can read: `review` says which
    waits = review.awaited and run.outcome == "awaiting_approval"
    return [judged_words(review)] if review.judged or waits else []


def judged_words(review: Review) -> str:
    """Return a blind review's result in words, or its progress and the command that continues it."""
    if review.result is not None:
        from pipeline.report.story import review_words  # noqa: PLC0415 - a quick start

        return review_words(review.result)
    return f"{review.judged} of {review.asked} pairs are judged blind; to go on: dropforge review {review.run}"


def taken_out_lines(champion: ChampionView) -> list[str]:
    """Return a line for each drop that a champion was trained on and that was withdrawn or suspended since."""
    return [f"trained on drop {drop.id} ({drop.name}), {drop.since_words}" for drop in champion.taken_out]


def command_lines(champion: ServingView, *, alive: bool, every: bool = False) -> list[str]:
    """
    Return lines on a champion's hooks: failed with the last line of output, pending, running; with `every` all.

    `alive` is whether the daemon, which runs the hooks, is running. Hooks that are not set are left out.
    """
    lines = []
    for name, command in (("hooks.after_promotion", champion.hook), ("hooks.health", champion.health)):
        if command is None:
            continue
        if command.state == "failed":
            again = name == "hooks.after_promotion" and champion.until is None
            hint = f"; to run it again: dropforge hook --track {champion.track}" if again else ""
            lines.append(f"{name} failed: {command.error}{hint}")
            output = last_line(command.output)
            lines += [f"{name} said: {output}"] if output else []
        elif command.state in {"pending", "running"}:
            lines.append(f"{name} is {command.state}" if alive else f"{name} runs once the daemon does")
        elif every:
            lines.append(f"{name}: {command.state}")
    return lines


def _why_none(settings: Settings, track: str) -> str:
    """Return "none" and why a track has no champion: not in the settings, base model unset, missing or not used yet."""
    if track not in settings.track_names:
        return "none; no longer in the settings"
    path = settings.track(track).base_model
    if not path:
        return "none: set base_model in dropforge.toml"
    return "none yet" if Path(path).is_dir() else f"none: there is no folder {path}"


def _print_latest(overview: Overview) -> None:
    """Print a table of the latest drops, of the open runs and of the runs that ended last; none for what is empty."""
    drops = [
        (drop.id, drop.track, drop_words(drop), drop.rows, drop.records, clock(drop.received_at), drop.name)
        for drop in overview.drops(most=LATEST)
    ]
    going = [(run.id, run.track, run.state, describe_run(run)) for run in overview.open_runs()]
    ended = [(run.id, run.track, clock(run.ended_at), outcome_words(run)) for run in overview.ended_runs(LATEST)]
    for heads, rows in (
        (("DROP", "TRACK", "STATE", "ROWS", "RECORDS", "RECEIVED", "NAME"), drops),
        (("RUN", "TRACK", "STATE", ""), going),
        (("RUN", "TRACK", "ENDED", "OUTCOME"), ended),
    ):
        if rows:
            print_line()
            print_table(heads, rows)
