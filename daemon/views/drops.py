"""Views of drops: state, trial, replaced rows, findings, rows, and the champions that were trained on them."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from sqlite3 import Connection
from typing import Any

from daemon.state.clauses import drop_clauses
from daemon.state.questions import MEAN_WORTH, NEW_ANSWERS, PREPARED, TAKEN_IN
from daemon.state.run_files import readable_dataset
from daemon.system.folders import WorkFolder
from daemon.views.reader import NotThere, Reader, Time, newest_rows
from pipeline.artifacts import AnswerPair, Dataset, Frozen
from pipeline.models.template import transcript
from pipeline.records import records
from pipeline.words import count, cut_start, first_of, signed, worth_words

#: Most rows of one page, most characters of a row's text, and most champions that are listed.
MOST_ROWS = 20
MOST_CHARACTERS = 2000
_MOST_CHAMPIONS = 20
#: The number of drops by track and state, and of those on trial, which the index of states does not have.
_COUNTS = 'SELECT track, state, count(*) AS number FROM "drop" GROUP BY track, state'
_ON_TRIAL = 'SELECT "drop".track, state FROM suspect JOIN "drop" ON "drop".id = drop_id WHERE ended IS NULL'
#: The champions that were trained on a drop, the latest first.
_TRAINED = """
SELECT DISTINCT generation, generation = champion_generation AS serves
FROM promotion JOIN track ON track.name = promotion.track, json_each(promotion.drops) AS held
WHERE track.name = ? AND held.value = ? ORDER BY generation DESC LIMIT ?
"""


class DropView(Frozen):
    """One dropped file that was recorded, whether accepted or not."""

    id: int
    track: str
    role: str
    state: str
    name: str
    rows: int
    records: int
    findings: int
    warnings: int
    received_at: Time
    first_run: int | None
    duplicate_of: int | None
    reason: str | None
    evidence: tuple[str, ...] = ()
    """Of a suspended drop, what its trial found and what helps, a clause each."""
    sha256: str
    on_trial: str | None = None
    """Why only a trial run may use it, and which run that is; `None` unless it is on trial."""
    preview: dict[str, Any] | None = None
    """How well the champion's answers agree with it (`artifacts.Preview`); `None` if it did not answer."""
    worth: str | None = None
    """Points that the champion loses without it, and on average without a drop; `None` if no run left it out."""
    replaced: str | None = None
    """How many of its records later drops replaced in the last run, and how many it replaced; `None` for none."""
    new_answers: int
    """Records with other answers to questions of earlier drops that a person may accept now."""


class Drops(Reader):
    """Reads the drops of a workspace."""

    def drops(
        self,
        track: str | None = None,
        state: str | None = None,
        most: int | None = None,
        before: int | None = None,
        name: str | None = None,
    ) -> list[DropView]:
        """Return the drops, newest first, of a track, state and name if given: at most `most`, ids below `before`."""
        return self._drops(*newest_rows({"track": track, "state": state, "name": name}, most, before))

    def drop(self, drop_id: int) -> DropView:
        """Return one drop. Raises `NotThere` if there is no such drop."""
        if not (drops := self._drops("WHERE id = ?", [drop_id])):
            raise NotThere(f"there is no drop {drop_id}", "list them: dropforge drops")
        return drops[0]

    def drops_with_new_answers(self, most: int) -> list[DropView]:
        """Return at most `most` drops with new answers to old questions that can be accepted now, newest first."""
        return self._drops(f"WHERE {NEW_ANSWERS} ORDER BY id DESC LIMIT ?", [most])

    def drop_counts(self) -> dict[str, dict[str, int]]:
        """Return {track: {state: number of drops}}; drops on trial count as "on trial" only, zeros are left out."""
        counts: dict[str, Counter[str]] = {}
        for row in self.rows(_COUNTS):
            counts.setdefault(row.track, Counter())[row.state] = row.number
        for row in self.rows(_ON_TRIAL):
            counts[row.track].update({row.state: -1, "on trial": 1})
        return {track: dict(+of_track) for track, of_track in counts.items()}

    def _drops(self, which: str, values: Sequence[object]) -> list[DropView]:
        """Return the drops that an SQL clause such as "WHERE id = ?" selects, with its parameters, in its order."""

        def views(reader: Connection) -> list[DropView]:
            tried = on_trial(reader)
            rows = reader.execute(f'SELECT * FROM "drop" {which}', values).fetchall()  # noqa: S608 - our own words
            replacements = {track: replaced(reader, self.folder, track) for track in {row.track for row in rows}}
            return [
                _view(row, tried.get(row.id), replacements[row.track].get(row.id), _worth(reader, row)) for row in rows
            ]

        return self.read(views)


def _view(row: Any, tried: str | None, replacement: str | None, worth: str | None) -> DropView:
    why = drop_clauses(row)
    fields = {
        "reason": next(iter(why), None),
        "evidence": why[1:],
        "on_trial": tried,
        "replaced": replacement,
        "worth": worth,
        "new_answers": 0 if row.state != "accepted" or row.answers_accepted or tried else row.new_answers,
    }
    return DropView.model_validate({**vars(row), **fields}, extra="ignore")


def _worth(reader: Connection, row: Any) -> str | None:
    """
    Return a drop's worth in words, with the mean over the champion's drops that were left out, if several.

    `None` if no run has left it out. The champion's luck on the held-out records is in each worth alike, so the mean is
    what to compare with.
    """
    if None in (row.worth_run, row.worth_points, row.worth_half_width):
        return None
    words = f"worth {worth_words(row.worth_points, row.worth_half_width)} (run {row.worth_run})"
    mean = reader.execute(MEAN_WORTH, {"run": row.worth_run}).fetchone()
    return f"{words}; the mean of {mean.drops} drops is {signed(mean.points)}" if mean.drops > 1 else words


def replaced(reader: Connection, work_folder: WorkFolder, track: str) -> dict[int, str]:
    """Map the ids of drops with replaced or replacing records in the track's last prepared run to words on how many."""
    _, data = last_prepared(reader, work_folder, track)
    by, of = dict[int, list[str]](), dict[int, list[str]]()
    for pair in sorted(data.replacements if data else (), key=lambda pair: -pair.rows):
        by.setdefault(pair.old, []).append(f"{count(pair.rows, 'record')} replaced by drop {pair.new}")
        of.setdefault(pair.new, []).append(f"{count(pair.rows, 'record')} of drop {pair.old}")
    words_of = {drop: first_of(words) for drop, words in by.items()}
    for drop, words in of.items():
        words_of[drop] = "; ".join(filter(None, (words_of.get(drop), f"replaces {first_of(words)}")))
    return words_of


def last_prepared(reader: Connection, work_folder: WorkFolder, track: str) -> tuple[int, Dataset | None]:
    """Return id and data of the track's last run with prepared data; (0, None) if there is none or it is damaged."""
    run = reader.execute(PREPARED, {"track": track}).fetchone()
    data = None if run is None else readable_dataset(work_folder, run.id)
    return (0, None) if run is None or data is None else (run.id, data)


def on_trial(reader: Connection) -> dict[int, str]:
    """Map the id of each drop on trial to a text: which run it may have made worse, and which run, if any, tries it."""
    wanted = (
        "SELECT drop_id, blamed_run, trial_run, run.state FROM suspect LEFT JOIN run ON run.id = trial_run "
        "WHERE ended IS NULL"
    )
    texts = {}
    for row in reader.execute(wanted).fetchall():
        how = "it is tried when nothing else is to be run"
        if row.trial_run:
            was = "was worse, too; a control without it decides"
            how = f"run {row.trial_run} {was if row.state == 'succeeded' else 'tries it'}"
        texts[row.drop_id] = f"it may have made run {row.blamed_run} worse; {how}"
    return texts


class FindingView(Frozen, extra="ignore"):
    """A kind of error or warning about a drop's rows."""

    message: str
    remedy: str = ""
    rows: int
    line: int | None = None
    """Number of the first affected line."""
    turn: int | None = None
    """Number of the turn in its conversation."""


class DropRow(Frozen):
    """A row of a drop; its texts, but not its tags, are cut to `MOST_CHARACTERS`."""

    line: int
    earlier: str = ""
    """The turns before the last question of a conversation; a long text is cut at its beginning."""
    instruction: str
    input: str
    output: str
    tags: tuple[str, ...] = ()
    cut: bool = False


class DropDetail(Frozen):
    """All details of one drop except its rows."""

    drop: DropView
    by: str | None
    """Name of the user who dropped the file; `None` if unknown."""
    findings: tuple[FindingView, ...]
    warnings: tuple[FindingView, ...]
    champions: tuple[int, ...]
    """Generations of the track's champions that were trained on it, without rollbacks, the latest first; at most 20."""
    serving: bool
    """Whether the current champion was trained on it."""
    answers: tuple[AnswerPair, ...] = ()
    """Up to 20 of its new answers, each with the old one."""


def drop_detail(overview: Drops, drop_id: int) -> DropDetail:
    """Return a drop's details without a warning of too few rows, which changes. Raises `NotThere` if it is unknown."""
    drop = overview.drop(drop_id)
    detail = _taken_in(overview, drop_id)
    # Nothing is trained on other drops.
    trained = overview.rows(_TRAINED, drop.track, drop_id, _MOST_CHAMPIONS) if drop.role == "train" else []
    return DropDetail(
        drop=drop,
        by=overview.rows('SELECT owner FROM "drop" WHERE id = ?', drop_id)[0].owner,
        findings=_findings(detail.get("kinds")),
        # Whether the track's rows are too few changes: pages say it as of now.
        warnings=_findings(kind for kind in detail.get("warnings") or () if kind["kind"] != "too_few_rows"),
        champions=tuple(row.generation for row in trained),
        serving=any(row.serves for row in trained),
        answers=_new_answers(overview, drop),
    )


def first_outcomes(overview: Drops, drops: Iterable[DropView]) -> dict[int, str]:
    """Map the id of each run that is the first one of a drop in `drops` to its outcome, or else to its state."""
    wanted = json.dumps([drop.first_run for drop in drops if drop.first_run is not None])
    runs = overview.rows("SELECT id, state, outcome FROM run WHERE id IN (SELECT value FROM json_each(?))", wanted)
    return {row.id: row.outcome or row.state for row in runs}


def findings_of(overview: Drops, drop_id: int) -> tuple[FindingView, ...]:
    """Return up to 20 kinds of errors in a drop's rows, rarest first, as found in the first 1,000 at intake."""
    return _findings(_taken_in(overview, drop_id).get("kinds"))


def drop_rows(overview: Drops, drop: DropView, after: int = 0) -> tuple[DropRow, ...]:
    """
    Return up to 20 stored rows of a drop after the first `after`; empty if its file was not kept.

    Lines that are not JSON objects are skipped and not counted. Texts are cut to 2,000 characters.
    """
    if (path := stored_file(overview, drop)) is None:
        return ()
    rows = (row for row in records.read_rows(path) if isinstance(row, records.Row) and isinstance(row.value, dict))
    return tuple(_row(row) for row in islice(rows, after, after + MOST_ROWS))


def stored_file(overview: Drops, drop: DropView) -> Path | None:
    """Return the path of the stored copy of a drop's file; `None` if it was not kept."""
    path = overview.folder / "drops" / f"{drop.sha256}.jsonl"
    return path if drop.sha256 and path.is_file() else None


def _new_answers(overview: Drops, drop: DropView) -> tuple[AnswerPair, ...]:
    if not drop.new_answers:
        return ()
    last = overview.read(lambda reader: [last_prepared(reader, overview.folder, drop.track)])
    pairs = (pair for _, data in last if data is not None for pair in data.proposed_answers)
    return tuple(pair for pair in pairs if pair.new_drop == drop.id)


def _taken_in(overview: Drops, drop_id: int) -> dict[str, Any]:
    """Return the detail of the event that recorded the drop at intake; {} if there is none."""
    return next((row.detail for row in overview.rows(TAKEN_IN, drop=drop_id)), {})


def _findings(noted: Iterable[dict[str, Any]] | None) -> tuple[FindingView, ...]:
    return tuple(map(FindingView.model_validate, noted or ()))


def _row(row: records.Row) -> DropRow:
    found = list(records.records_of(row))
    value = asdict(found[-1]) if found else row.value
    texts = {name: _text(value.get(name, "")) for name in ("instruction", "input", "output")}
    earlier = transcript(found[-1].turns) if found else ""
    tags = row.value.get("tags")
    return DropRow(
        line=row.line,
        earlier=cut_start(earlier, MOST_CHARACTERS),
        **{name: text[:MOST_CHARACTERS] for name, text in texts.items()},
        tags=tuple(map(_text, tags)) if isinstance(tags, list) else (),
        cut=any(len(text) > MOST_CHARACTERS for text in (earlier, *texts.values())),
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
