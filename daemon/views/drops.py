"""Views of drops: state, trial, replaced rows, and the champions trained on a withdrawn drop."""

from collections.abc import Iterable
from contextlib import suppress
from sqlite3 import Connection

from daemon.champions import history
from daemon.state.clauses import drop_clauses
from daemon.state.run_files import ArtifactDamaged, load_dataset
from daemon.system.folders import WorkFolder
from daemon.views.reader import Row, Time, champions_of
from pipeline.artifacts import Dataset, Frozen
from pipeline.words import count, first_of, worth_words

#: Most former champions that are searched for one without withdrawn drops.
_MOST_FORMER = 1000
#: The last run of a track that has prepared its data. One about a drop has not all of the track's drops.
_PREPARED = """
SELECT id FROM run WHERE track = ? AND about_drop IS NULL AND EXISTS
(SELECT 1 FROM attempt WHERE run_id = run.id AND step = 'prepare' AND state = 'published') ORDER BY id DESC LIMIT 1
"""


class DropView(Frozen):
    """One dropped file that was recorded, whether accepted or not."""

    id: int
    track: str
    role: str
    state: str
    name: str
    rows: int
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
    worth: str | None = None
    """Points that the champion loses without it, by the newest run that left it out; `None` if none did."""
    replaced: str | None = None
    """How many of its rows later drops replaced in the track's last run, and how many it replaced; `None` for none."""


_COLUMNS = tuple(name for name, field in DropView.model_fields.items() if field.is_required())


class DropUses(Frozen):
    """The serving champion if it was trained on a given drop, and the champion to roll back to."""

    champion: int | None = None
    """Generation of the serving champion, if that was trained on it."""
    before: int | None = None
    """The latest generation that may serve again and was trained neither on it nor on a withdrawn drop."""


def drop_views(base: Connection, work_folder: WorkFolder, which: str, values: Iterable[object]) -> list[DropView]:
    """Return the drops that an SQL clause, as "WHERE id = ?", selects with the parameters `values`."""
    tried = on_trial(base)
    found = base.execute(f'SELECT * FROM "drop" {which}', tuple(values)).fetchall()  # noqa: S608 - our own words
    told = {track: replaced(base, work_folder, track) for track in {row.track for row in found}}
    why = {row.id: drop_clauses(row) for row in found}
    return [
        DropView.model_validate(
            {
                **{name: getattr(row, name) for name in _COLUMNS},
                "reason": next(iter(why[row.id]), None),
                "evidence": why[row.id][1:],
                "on_trial": tried.get(row.id),
                "worth": _worth(row),
                "replaced": told[row.track].get(row.id),
            }
        )
        for row in found
    ]


def _worth(row: Row) -> str | None:
    if None in (row.worth_run, row.worth_points, row.worth_half_width):
        return None
    return f"worth {worth_words(row.worth_points, row.worth_half_width)} (run {row.worth_run})"


def replaced(base: Connection, work_folder: WorkFolder, track: str) -> dict[int, str]:
    """Map the id of each drop whose rows are replaced, or that replaces some, in a track's last run to a text."""
    _, data = last_prepared(base, work_folder, track)
    by: dict[int, list[str]] = {}
    of: dict[int, list[str]] = {}
    for one in sorted(data.replacements if data else (), key=lambda one: -one.rows):
        by.setdefault(one.old, []).append(f"{count(one.rows, 'row')} replaced by drop {one.new}")
        of.setdefault(one.new, []).append(f"{count(one.rows, 'row')} of drop {one.old}")
    told = {drop: first_of(words) for drop, words in by.items()}
    for drop, words in of.items():
        told[drop] = "; ".join(filter(None, (told.get(drop), f"replaces {first_of(words)}")))
    return told


def last_prepared(base: Connection, work_folder: WorkFolder, track: str) -> tuple[int, Dataset | None]:
    """Return the track's last run with prepared data, and that data; 0 and `None` if there is none or it is damaged."""
    for run in base.execute(_PREPARED, (track,)).fetchall():
        with suppress(ArtifactDamaged, OSError):
            return run.id, load_dataset(work_folder, run.id)
    return 0, None


def on_trial(base: Connection) -> dict[int, str]:
    """Map the id of each drop on trial to a text: which run it may have made worse, and which run, if any, tries it."""
    wanted = (
        "SELECT drop_id, blamed_run, trial_run, run.state FROM suspect LEFT JOIN run ON run.id = trial_run "
        "WHERE ended IS NULL"
    )
    found = {}
    for row in base.execute(wanted).fetchall():
        how = "it is tried when nothing else is to be run"
        if row.trial_run:
            was = "was worse, too; a control without it decides"
            how = f"run {row.trial_run} {was if row.state == 'succeeded' else 'tries it'}"
        found[row.drop_id] = f"it may have made run {row.blamed_run} worse; {how}"
    return found


def drop_uses(base: Connection, work_folder: WorkFolder, drop: Row) -> DropUses:
    """Return the serving champion, if it was trained on `drop`, and the one to roll back to; else `None` for both."""
    track = base.execute("SELECT * FROM track WHERE name = ?", (drop.track,)).fetchone()
    past = champions_of(base, drop.track)
    if track is None or drop.role != "train" or not past or drop.id not in (past[-1].drops or ()):
        return DropUses()
    former = history.former(past, track, work_folder, _MOST_FORMER)
    without = base.execute("""SELECT id FROM "drop" WHERE track = ? AND state = 'withdrawn'""", (drop.track,))
    gone = {drop.id, *(row.id for row in without)}
    before = next((one.generation for one in former if gone.isdisjoint(one.drops or ())), None)
    return DropUses(champion=track.champion_generation, before=before)
