"""
What a person should know of a file where it is dropped, not a night later.

Whether its track has rows enough for a verdict: below the minimum nothing is trained. How many of its rows are pinned
as held-out records: those are never trained on. When a run begins, what pinned records are for, and what a champion
found odd.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from daemon.settings.model import Settings, TrackSettings
from pipeline.metrics.automatic import SHORT_WORDS
from pipeline.records.heldout import rows_for
from pipeline.words import count, plain

_TENS = 10
_IF_LONG = f"where answers are JSON or longer than {SHORT_WORDS} words"


def too_few(name: str, track: TrackSettings, metric: str | None, rows: Mapping[str, int]) -> str | None:
    """
    Say what track `name` lacks for a verdict on any model, and the ways out; `None` if it has enough.

    Enough rows are those that bring the held-out records in 95 of 100 cases; `rows` are those of its accepted drops, by
    role, repeated ones counted each time: even so many may not do. `metric` is what the track's first run fixed, or
    what a file is likely to be judged by; `None`: not known.
    """
    least, most = _needed(track, metric)
    nothing = "nothing is trained" if track.gate.approval == "auto" else "no model gets a verdict"
    verdict = f"a verdict by {metric} needs" if metric and track.evaluate.metric == "auto" else "a verdict needs"
    pin = "dropforge submit --heldout FILE"
    if track.gate.on == "pinned":
        have = rows.get("heldout", 0)
        if have >= most:
            return None
        said = f"track {name} has {count(have, 'pinned record')}, and {verdict} {_either(least, most, 'records')}"
        when = f"{_IF_LONG}, " if have >= least else ""
        return f"{said}: {when}{nothing} until more are pinned: {pin}"
    have, share = rows.get("train", 0), track.split.heldout
    if have >= rows_for(most, share):
        return None
    said = f"track {name} has {count(have, 'row')}, and {verdict} {_either(least, most, 'held-out records')}"
    said += f", so about {_either(_about(least, share), _about(most, share), 'rows', '')}"
    when = f"{_IF_LONG}, " if have >= rows_for(least, share) else ""
    return f'{said}: {when}{nothing} until then; or pin records of your own: gate.on = "pinned", then {pin}'


def metric_of_track(state_folder: Path, found: Any) -> str | None:
    """
    Return the metric of the track whose `METRIC` was found; `None` if it is not known.

    Before its first run that is the metric by which its newest drop is likely to be judged.
    """
    if found is None or found.metric or not found.newest:
        return None if found is None else found.metric
    from pipeline.records.repeats import likely_metric  # noqa: PLC0415 - a quick start

    try:
        return likely_metric(state_folder / "drops" / f"{found.newest}.jsonl")
    except OSError:
        return None


def pinned_already(name: str, pinned: int, rows: int) -> str | None:
    """Say how many of a training file's rows are held-out questions; `None` if none is."""
    if not pinned:
        return None
    are = "is a held-out question" if pinned == 1 else "are held-out questions"
    return f"{name}: {pinned:,} of {count(rows, 'row')} {are}, pinned in this track: never trained on"


def begins_when(settings: Settings, track: str) -> str:
    """Say when the next run of a track begins, with "begins" as the first word."""
    if track not in settings.track_names:
        return "begins once that track is in the settings again"
    own = settings.track(track)
    quiet = f"begins {own.run_after_quiet_seconds:g} s after the last file"
    nightly = f"by the schedule {own.schedule} ({own.timezone})"
    return {"drop": quiet, "nightly": f"begins {nightly}", "both": f"{quiet} or {nightly}"}[own.trigger]


def use_of_pinned(settings: Settings, track: str) -> str:
    """Say what an accepted held-out drop of a track is for."""
    on = settings.track(track).gate.on if track in settings.track_names else "pinned"
    if on == "pinned":
        return f"from the next run on it judges the candidates of track {track}"
    return f'its records stay out of training; nothing is judged on them, since gate.on is "{on}", not "pinned"'


def loss_words(found: Mapping[str, Any]) -> str:
    """Say what a champion's loss on a new drop was, beside those on what it knew; `found` is what the event says."""
    nats, least, most = (plain(value, 2) for value in (found["nats"], *found["known"]))
    return f"{nats} nats per token, compared with {least} to {most} on the drops that it knew"


def unlikely_words(found: Mapping[str, Any], run: int | None) -> str:
    """Say that the champion of a run found a drop's answers far less likely than those of all drops that it knew."""
    return f"look at its answers, the champion found them unlikely: {loss_words(found)}; dropforge report {run}"


def rows_for_verdict(track: TrackSettings, metric: str | None = None) -> str:
    """Say how much of what a track needs for a verdict on any model; `metric` is as in `too_few`."""
    least, most = _needed(track, metric)
    share = track.split.heldout
    if track.gate.on == "pinned":
        return f"{_either(least, most, 'records')} are held out"
    return f"there are about {_either(_about(least, share), _about(most, share), 'rows')}"


def _needed(track: TrackSettings, metric: str | None) -> tuple[int, int]:
    """Return the fewest held-out records for a verdict, with short answers and with long ones; `None`: as it comes."""
    metric = metric if track.evaluate.metric == "auto" else track.evaluate.metric
    short, long = track.gate.min_records, track.gate.min_records_continuous
    return {None: (short, long), "exact_match": (short, short)}.get(metric, (long, long))


def _either(least: int, most: int, noun: str, when: str = f" {_IF_LONG}") -> str:
    return f"{least:,} {noun}" if least == most else f"{least:,} {noun} ({most:,}{when})"


def _about(records: int, share: float) -> int:
    return math.ceil(rows_for(records, share) / _TENS) * _TENS
