"""
Write the texts in the inbox's folders: README.txt, WANTED.md, and a note next to each file that cannot be taken.

They are derived from settings and database, and refreshed after scans of the inbox. README.txt describes what may be
dropped into a track's folder and how it is answered; WANTED.md lists the kinds of rows that would help its champion
most, by the scores on the held-out records.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import structlog
from sqlalchemy import text
from sqlmodel import Session, col, select

from daemon.inbox.answers.remarks import begins_when, metric_of_track, rows_for_verdict
from daemon.inbox.answers.verdict_notes import VerdictNotes
from daemon.inbox.drop_folders import DONE, WAITS, folder_names
from daemon.inbox.folders import InboxFolders, InboxUnusable, keep_own
from daemon.queue.snapshots import JUDGED
from daemon.settings.model import IntakeSettings, Settings, TrackSettings
from daemon.state.database import open_reader, transaction
from daemon.state.layout import DATABASE_NAME
from daemon.state.questions import MAKER, METRIC
from daemon.state.run_files import ArtifactDamaged, load_dataset, load_verdict
from daemon.state.tables import Run, Track
from pipeline.artifacts import SliceResult, Verdict
from pipeline.errors import is_disk_full
from pipeline.records.validate import Options
from pipeline.words import count, plain, printable, size_words

README = "README.txt"
WANTED = "WANTED.md"
#: Most slices listed, the weakest ones; most verdicts searched for one with scores of the current champion.
_MOST, _MOST_VERDICTS = 20, 50
#: The score of fewer groups of records is unreliable (a copy of `pipeline.decide.slices.LEAST_TESTED`: no numpy here).
_LEAST_GROUPS = 30
#: Guards that more rows of some kind can satisfy, and guards that general questions and answers can.
_ROWS_HELP, _GENERAL = {"slice", "anchor", "floor"}, {"general", "general_base"}
#: Reasons of a verdict that would not have been a win even without guards.
_NO_WIN = {"p_above_limit", "gain_below_minimum"}
#: Characters that would end Markdown code or the cell of a table.
_NO_CODE = str.maketrans({"`": "'", "|": "¦"})
log = structlog.get_logger()


class FolderTexts:
    """Keeps README.txt and WANTED.md in each track's folder, and the verdict notes next to receipts, up to date."""

    def __init__(self, settings: Settings, inbox: InboxFolders) -> None:
        """Open the database, for use by one thread; write nothing yet. Raises `DatabaseUnusable` if there is none."""
        self._engine = open_reader(settings.state_folder / DATABASE_NAME)
        self._settings, self._inbox = settings, inbox
        self._notes = VerdictNotes(self._engine, settings, inbox)

    def refresh(self) -> bool:
        """Write texts that changed; return whether notes are still pending. Raises `OSError` if the disk is full."""
        more = self._notes.refresh()
        for track in sorted(self._notes.touched):
            if track in self._settings.track_names:
                with transaction(self._engine) as session:
                    wanted = wanted_text(session, self._settings.state_folder, track)
                    found = session.connection().execute(text(METRIC), {"track": track}).first()
                folders = folder_names(track, "train")
                metric = metric_of_track(self._settings.state_folder, found)
                self._keep(folders, README, readme_text(self._settings, track, metric))
                self._keep(folders, WANTED, wanted)
            self._notes.touched.discard(track)
        return more

    def keep_notes(self, folders: tuple[str, ...], left: Mapping[str, str]) -> None:
        """Write a note next to each file in `left` (name: reason), delete others. Raises `OSError` as `refresh`."""
        try:
            folder = self._inbox.shared(*folders)  # open as long as it has a name
            there = os.listdir(folder.fd)  # noqa: PTH208 - a descriptor
        except (InboxUnusable, OSError) as error:
            log.warning("inbox_text_not_written", name=printable("/".join(folders)), error=str(error))
            return
        for name in {name.removesuffix(WAITS) for name in there if name.endswith(WAITS)} | left.keys():
            why = left.get(name)
            note = why and f"{printable(name)} has not been taken, and is tried again: {why}\n"
            self._keep(folders, name + WAITS, note)

    def _keep(self, folders: tuple[str, ...], name: str, words: str | None) -> None:
        """Write a text to a folder, or delete it if `None`. Errors are logged; a full disk raises `OSError`."""
        try:
            keep_own(self._inbox.shared(*folders), self._inbox.closed(DONE), name, words)
        except (InboxUnusable, OSError) as error:
            if isinstance(error, OSError) and is_disk_full(error):
                raise
            log.warning("inbox_text_not_written", name=printable("/".join((*folders, name))), error=str(error))


def readme_text(settings: Settings, track: str, metric: str | None = None) -> str:
    """Return the README of the folder of `track`; `metric` is its primary metric, `None` if not known yet."""
    intake, own = settings.intake, settings.track(track)
    below, top = ("", "") if track == "default" else (f"{track}/", "../")
    return f"""\
This is the inbox of track {track}: drop files of training records here.

WHAT TO DROP
A file that ends in .jsonl or .json, in UTF-8, a record a line:

  {{"instruction": "...", "input": "...", "output": "..."}}

"input" may be left out. "tags": ["one", "two"] and "category": "one" name the
kinds that scores are given for. Other keys are not used.
A file has at most {size_words(intake.max_bytes)}, a line {size_words(Options().max_line_bytes)}.
"dropforge check FILE" tells beforehand what is wrong with a file.

{_what_judges(own, metric)}

HOW IT IS ANSWERED
A file is taken once it has not changed for {intake.settle_seconds:g} s. It then lies in

  {top}done/{below}       taken; beside it NAME.receipt.json with its number, and
              NAME.verdict.txt: what became of it, replaced when that changes
  {top}rejected/{below}   given back; beside it NAME.errors.json with line, field and
              remedy of each finding: mend the file and drop it again

(in a folder ~USER there, which only you can read, if you are not the user that
Dropforge runs as). {_bad_rows(intake)}

A file that cannot be taken stays here; NAME.waits.txt beside it says why.

The next run of this track {begins_when(settings, track)}.
{WANTED}, where there is one, lists the kinds of rows that would help most.
"""


def _what_judges(own: TrackSettings, metric: str | None) -> str:
    never = "Records that are dropped into heldout/ are never trained on"
    needed = f"No model gets a verdict before\n{rows_for_verdict(own, metric)}."
    if own.gate.on == "pinned":
        return f"{never}:\nthe models are judged on them. {needed}"
    return f"{never}.\nThe models are judged on a share of each drop. {needed}"


def _bad_rows(intake: IntakeSettings) -> str:
    if intake.on_bad_rows == "reject":
        return "One bad row, and the whole file is given back."
    most = f"{count(intake.max_bad_rows, 'bad row')} ({intake.max_bad_percent:g} % of the rows)"
    return f"Up to {most} are left out;\nwith more, the whole file is given back."


class _Measured(NamedTuple):
    """A verdict that has a score of the current champion."""

    verdict: Verdict
    run: int
    is_candidate: bool
    """Whether the champion was that run's candidate."""


def wanted_text(session: Session, state_folder: Path, track: str) -> str | None:
    """Return the content of a track's WANTED.md; `None` if no verdict has a score of its current champion."""
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
    """Return a paragraph on a run that won on the task but failed guards which more rows cannot satisfy; else empty."""
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
    """Return the latest verdict with a score of the current champion; `None` if the last 50 runs have none."""
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
    """Return the number of training rows per slice in the run that made the champion; empty for a base model."""
    run = session.scalars(text(MAKER), {"track": track, "model": model_id}).first()
    try:
        dataset = None if run is None else load_dataset(state_folder, run)
    except (ArtifactDamaged, OSError):
        return {}
    return {} if dataset is None else dataset.train_rows_of


def _weakest(slices: Sequence[SliceResult], *, is_candidate: bool) -> list[SliceResult]:
    """Return at most 20 slices by drop or tag, lowest score first, those with few groups of records last."""
    parts = [one for one in slices if one.kind in {"drop", "tag"}]
    score = {one.label: one.candidate if is_candidate else one.champion for one in parts}
    return sorted(parts, key=lambda one: (one.groups < _LEAST_GROUPS, score[one.label], one.label))[:_MOST]


def _code(label: str) -> str:
    """Return an untrusted tag or file name as Markdown code, so that nothing in it acts as markup."""
    return f"`{printable(label).translate(_NO_CODE)}`"
