"""WANTED.md: which kinds of rows would help a track's champion most, by its scores on the held-out records."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import text
from sqlmodel import Session, col, select

from daemon.queue.snapshots import JUDGED
from daemon.state.questions import MAKER
from daemon.state.run_files import ArtifactDamaged, load_dataset, load_verdict
from daemon.state.tables import Run, Track
from pipeline.artifacts import SliceResult, Verdict
from pipeline.words import count, plain, printable

WANTED = "WANTED.md"
#: Slices that are listed, the weakest; verdicts that are looked through for one on today's champion.
_MOST, _MOST_VERDICTS = 20, 50
#: Fewer groups of records say little (`pipeline.decide.slices.LEAST_TESTED`; numpy is not for the daemon).
_LEAST_GROUPS = 30
#: Guards that more rows of a kind help against, and those that general ones do.
_ROWS_HELP, _GENERAL = {"slice", "anchor", "floor"}, {"general", "general_base"}
#: Reasons of a verdict that would have been no win without its guards either.
_NO_WIN = {"p_above_limit", "gain_below_minimum"}
#: What would end the code, or the cell of the table.
_NO_CODE = str.maketrans({"`": "'", "|": "¦"})


class _Measured(NamedTuple):
    """A verdict that says how the champion did."""

    verdict: Verdict
    run: int
    is_candidate: bool
    """Whether the champion was that run's candidate."""


def wanted_text(session: Session, state_folder: Path, track: str) -> str | None:
    """Return what WANTED.md says of a track; `None` while no verdict says how its champion did."""
    serving = session.get(Track, track)
    measured = None if serving is None else _measured(session, state_folder, serving)
    if measured is None or serving is None or serving.champion_model_id is None:
        return None
    rows = _train_rows(session, state_folder, track, serving.champion_model_id)
    verdict = measured.verdict
    whole = verdict.candidate_score if measured.is_candidate else verdict.champion_score
    head = (
        f"# What would help the model of track {track} most\n\n"
        f"Scores of the model that serves, as run {measured.run} measured them: `{verdict.metric}`, in points "
        f"of 100, on held-out records.\nOn all {count(verdict.records, 'record')}: {plain(whole or 0.0)}. "
    )
    slices = _weakest(verdict.slices, is_candidate=measured.is_candidate)
    guarded = _guarded(measured)
    if not slices:
        return head + guarded + 'Rows with "tags" or a "category", and several drops, are told apart here.\n'
    table = ["| rows of | score | held-out records | training rows |", "|---|---:|---:|---:|"]
    for one in slices:
        score = plain(one.candidate if measured.is_candidate else one.champion)
        few = " (few)" if one.groups < _LEAST_GROUPS else ""
        trained = rows.get(one.label.partition(" (")[0] if one.kind == "drop" else one.label, 0)
        table.append(f"| {_code(one.label)} | {score} | {one.records:,}{few} | {trained:,} |")
    advice = (
        "On the task, rows like those at the top help most." if guarded else "Drop more rows like those at the top."
    )
    end = f"The score of fewer than {_LEAST_GROUPS} records (few) says little: more of them would show more.\n"
    return f"{head}{guarded}{advice}\n\n" + "\n".join(table) + "\n\n" + end


def _guarded(measured: _Measured) -> str:
    """Say what a run lost that won on the task, and that more rows of the task do not help; empty where they may."""
    verdict = measured.verdict
    failed = {guard.guard for guard in verdict.guards if guard.state == "failed"}
    won = verdict.outcome == "guard_failed" and not _NO_WIN & set(verdict.reasons)
    if measured.is_candidate or not won or failed & _ROWS_HELP:
        return ""
    general = "; general questions and their answers do" if failed & _GENERAL else ""
    return (
        f"\n\nRun {measured.run} was better on the task and is not used: {_code(verdict.sentence)}.\n"
        f"More rows of the task do not help against that{general}. All that helps: dropforge show {measured.run}\n\n"
    )


def _measured(session: Session, state_folder: Path, serving: Track) -> _Measured | None:
    """Return the latest verdict on the champion that serves."""
    asked = select(Run.id).where(Run.track == serving.name, col(Run.outcome).in_(JUDGED))
    for run in session.exec(asked.order_by(col(Run.id).desc()).limit(_MOST_VERDICTS)):
        try:
            verdict = load_verdict(state_folder, run or 0)
        except (ArtifactDamaged, OSError):
            continue
        if verdict is not None and verdict.gain is not None:
            models = (verdict.champion_model_id, verdict.candidate_model_id)
            if serving.champion_model_id in models:
                return _Measured(verdict, run or 0, serving.champion_model_id != verdict.champion_model_id)
    return None


def _train_rows(session: Session, state_folder: Path, track: str, model_id: str) -> dict[str, int]:
    """Return the training rows of the champion's own run, by slice; none of a base model."""
    run = session.scalars(text(MAKER), {"track": track, "model": model_id}).first()
    try:
        dataset = None if run is None else load_dataset(state_folder, run)
    except (ArtifactDamaged, OSError):
        return {}
    return {} if dataset is None else dataset.train_rows_of


def _weakest(slices: Sequence[SliceResult], *, is_candidate: bool) -> list[SliceResult]:
    """Return the drops and tags with the lowest scores, those of few records last."""
    parts = [one for one in slices if one.kind in {"drop", "tag"}]
    score = {one.label: one.candidate if is_candidate else one.champion for one in parts}
    return sorted(parts, key=lambda one: (one.groups < _LEAST_GROUPS, score[one.label], one.label))[:_MOST]


def _code(text: str) -> str:
    """Return a tag or a file's name, which anybody may have chosen, as code: nothing in there is markup."""
    return f"`{printable(text).translate(_NO_CODE)}`"
