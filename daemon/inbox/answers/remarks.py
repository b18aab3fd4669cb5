"""
Sentences for people who drop files: rows still needed for a verdict, the next run.

With too few rows for a verdict nothing is trained.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from daemon.settings.model import Settings, TrackSettings
from daemon.state.questions import ACCEPTED_ROWS, HAS_VERDICT, NEWEST_FILES
from pipeline import durable
from pipeline.metrics.automatic import SHORT_WORDS, metric_of
from pipeline.records.heldout import rows_for
from pipeline.records.records import Record, read_records
from pipeline.words import count

#: Most answers by which the metric of a track is foreseen.
_MOST_ANSWERS = 1000
_TENS = 10
_IF_LONG = f"where answers are JSON or longer than {SHORT_WORDS} words"


def lacking(
    settings: Settings,
    name: str,
    metric: str | None,
    ask: Callable[..., Sequence[Any]],
    more: tuple[Path, int] | None = None,
) -> str | None:
    """
    Return `too_few` of declared track `name`; `None` once it had a verdict other than "insufficient_evidence".

    `metric` is the track's; before the first run fixes it, it is foreseen by the answers of the newest drops, if they
    can be read. `ask` returns the rows of an SQL query with named parameters. `more` is a file to train on and its
    number of rows, which count unless it was dropped already. Raises `OSError` if this file cannot be read.
    """
    if ask(HAS_VERDICT, track=name):
        return None
    track = settings.track(name)
    role = "heldout" if track.gate.on == "pinned" else "train"
    hashes = [file.sha256 for file in ask(NEWEST_FILES, track=name, role=role)]
    paths: list[Path] = [settings.work_folder / "drops" / f"{sha256}.jsonl" for sha256 in hashes]
    rows = Counter({row.role: row.rows for row in ask(ACCEPTED_ROWS, track=name)})
    if more and role == "train" and durable.sha256_file(more[0]) not in hashes:
        paths.insert(0, more[0])
        rows[role] += more[1]
    words = too_few(name, track, metric, rows)
    if words is None or metric or track.evaluate.metric != "auto":
        return words
    return too_few(name, track, metric_of(islice(_answers(paths), _MOST_ANSWERS)), rows)


def _answers(paths: Sequence[Path]) -> Iterator[str]:
    for path in paths:
        with suppress(OSError):  # not every user of `dropforge status` may read the drops
            yield from (row.output for row in read_records(path) if isinstance(row, Record))


def too_few(name: str, track: TrackSettings, metric: str | None, rows: Mapping[str, int]) -> str | None:
    """
    Return how many rows track `name` has and needs for a verdict, as a sentence with remedies; `None` if it has enough.

    `rows` is the number of rows in accepted drops, by role: held-out rows count with `gate.on = "pinned"`, otherwise
    training rows, of which enough yield the required held-out records in 95 of 100 cases. Repeated rows count each
    time, so even enough rows may turn out too few. Without the track's `metric`, enough rows are enough for long
    answers, too, and the sentence may have both numbers.
    """
    least, most = _needed(track, metric)
    # Said while a run trains, too: it may have begun with other rows or settings.
    nothing = "train nothing" if track.gate.approval == "auto" else "give no verdict"
    verdict = f"a verdict by {metric} needs" if metric and track.evaluate.metric == "auto" else "a verdict needs"
    pinned, share = track.gate.on == "pinned", track.split.heldout
    have = rows.get("heldout" if pinned else "train", 0)
    enough, enough_if_long = (least, most) if pinned else (rows_for(least, share), rows_for(most, share))
    if have >= enough_if_long:
        return None
    if pinned:
        has, needs, remedy = count(have, "pinned record"), _either(least, most, "records"), "pin more:"
    else:
        has, needs = count(have, "row"), _either(least, most, "held-out records")
        needs += f", so about {_either(_about(least, share), _about(most, share), 'rows', '')}"
        remedy = 'drop more, or pin records of your own: gate.on = "pinned", then'
    when = f"{_IF_LONG}, " if have >= enough else ""
    to = "" if name == "default" else f" --track {name}"
    remedy = f"{remedy} dropforge submit --heldout{to} FILE"
    return f"track {name} has {has}, and {verdict} {needs}: {when}a run with fewer may {nothing}; {remedy}"


def begins_when(settings: Settings, track: str) -> str:
    """Return when the next run of a track, declared or not, begins, as a phrase whose first word is "begins"."""
    if track not in settings.track_names:
        return "begins once that track is in the settings again"
    here = settings.track(track)
    quiet = f"begins {here.run_after_quiet_seconds:g} s after the last file"
    nightly = f"by the schedule {here.schedule} ({here.timezone})"
    return {"drop": quiet, "nightly": f"begins {nightly}", "both": f"{quiet} or {nightly}"}[here.trigger]


def use_of_pinned(settings: Settings, track: str) -> str:
    """Return a clause on how an accepted held-out drop is used, by its track's `gate.on` ("pinned" if undeclared)."""
    on = settings.track(track).gate.on if track in settings.track_names else "pinned"
    if on == "pinned":
        return f"from the next run on it judges the candidates of track {track}"
    return f'its records stay out of training; nothing is judged on them, since gate.on is "{on}", not "pinned"'


def rows_for_verdict(track: TrackSettings) -> str:
    """Return what a verdict needs, to follow "before": "there are about 780 rows", or "60 records are held out"."""
    least, most = _needed(track, None)
    share = track.split.heldout
    if track.gate.on == "pinned":
        return f"{_either(least, most, 'records')} are held out"
    return f"there are about {_either(_about(least, share), _about(most, share), 'rows')}"


def _needed(track: TrackSettings, metric: str | None) -> tuple[int, int]:
    """Return the fewest held-out records for a verdict: with short answers, with long answers."""
    metric = metric if track.evaluate.metric == "auto" else track.evaluate.metric
    short, long = ("exact_match", "rougeL") if metric is None else (metric, metric)
    return track.gate.least_groups(short), track.gate.least_groups(long)


def _either(least: int, most: int, noun: str, when: str = f" {_IF_LONG}") -> str:
    return f"{least:,} {noun}" if least == most else f"{least:,} {noun} ({most:,}{when})"


def _about(records: int, share: float) -> int:
    return math.ceil(rows_for(records, share) / _TENS) * _TENS
