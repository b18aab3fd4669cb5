"""What a drop that was taken out is still in: runs that have their snapshot, wins that wait, the champion."""

from pathlib import Path
from sqlite3 import Connection
from typing import TYPE_CHECKING

from daemon.champions import history
from daemon.champions.blockers import Blocker, blocker
from daemon.queue.withdrawals import withdrawn
from daemon.state.run_files import run_folder
from daemon.views.reader import champions_of, drops_with, snapshot_of
from pipeline.artifacts import Frozen

if TYPE_CHECKING:
    from daemon.state.tables import Drop

#: Former champions that are looked through for one without withdrawn drops.
_MOST_FORMER = 1000


class DropUses(Frozen):
    """Where a drop is in spite of its being out of every later snapshot."""

    runs: tuple[int, ...] = ()
    """Open runs that were prepared with it."""
    wins: tuple[int, ...] = ()
    """Runs whose win waits for approval and that were prepared with it; not those whose model is blocked."""
    suspended: tuple[tuple[int, int], ...] = ()
    """Drops that are suspended, each with the run that had a bad verdict on it and on this one."""
    champion: int | None = None
    """Generation of the serving champion, if that was trained on it."""
    before: int | None = None
    """The latest generation that may serve again and was trained on no drop that is withdrawn."""


def drop_uses(base: Connection, state_folder: Path, drop: "Drop") -> DropUses:
    """Return what `drop` is still in; no champion is named for a held-out drop, since nothing is trained on it."""

    def having(runs: str) -> tuple[int, ...]:
        which = f"SELECT id FROM run WHERE track = ? AND {runs} ORDER BY id"  # noqa: S608 - our own words
        found = base.execute(which, (drop.track,)).fetchall()
        return tuple(run.id for run in found if drop.id in snapshot_of(base, run.id))

    # A run that was retried and not claimed since has no settings yet: it takes its snapshot anew.
    runs = having("state IN ('running', 'waiting') AND config IS NOT NULL")
    waiting = having("outcome = 'awaiting_approval'")
    against = {run: blocker_of(base, state_folder, drop.track, run) for run in waiting}
    wins = tuple(run for run, why in against.items() if why is None or not why.blocked)
    uses = DropUses(runs=runs, wins=wins, suspended=_suspended_beside(base, drop))
    track = base.execute("SELECT * FROM track WHERE name = ?", (drop.track,)).fetchone()
    past = champions_of(base, drop.track)
    if track is None or drop.role != "train" or drop.id not in (history.drops_of(past, track.champion_model_id) or ()):
        return uses
    former = history.former(past, track, state_folder, _MOST_FORMER)
    without = base.execute("""SELECT id FROM "drop" WHERE track = ? AND state = 'withdrawn'""", (drop.track,))
    gone = {drop.id, *(row.id for row in without)}
    before = next((one.generation for one in former if gone.isdisjoint(one.drops or ())), None)
    return uses.model_copy(update={"champion": track.champion_generation, "before": before})


def blocker_of(base: Connection, state_folder: Path, track: str, run_id: int) -> Blocker | None:
    """Return what stands against a win that waits; `None` if a yes is enough."""
    gone = withdrawn(drops_with(base, snapshot_of(base, run_id)))
    return blocker(run_folder(state_folder, run_id), champions_of(base, track), gone)


def _suspended_beside(base: Connection, drop: "Drop") -> tuple[tuple[int, int], ...]:
    """Return the drops that are suspended for a run that had this one, too, each with the latest such run."""
    since = base.execute(
        """
        SELECT drop_id, max(run_id) AS run_id FROM event WHERE kind = 'drop_suspended' AND drop_id IN
        (SELECT id FROM "drop" WHERE track = ? AND state = 'suspended') GROUP BY drop_id ORDER BY drop_id
        """,
        (drop.track,),
    ).fetchall()
    return tuple((one.drop_id, one.run_id) for one in since if one.run_id and drop.id in snapshot_of(base, one.run_id))
