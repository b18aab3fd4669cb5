"""What runs and what waits, in the order in which it goes, and the tracks that a person has paused."""

from datetime import datetime
from sqlite3 import Connection
from typing import TYPE_CHECKING, Any

from daemon.state.questions import IS_DUE
from daemon.state.states import OPEN_STATES, queue_order
from daemon.system.clock import now_ms
from daemon.views.champion_history import utc
from pipeline.artifacts import Frozen

if TYPE_CHECKING:
    from daemon.views.overview import Overview, RunView


class PauseView(Frozen):
    """A track that begins no run."""

    track: str
    reason: str
    by: str
    """The person who paused it."""
    at: datetime

    @property
    def words(self) -> str:
        """That it is paused, why, and how it goes on."""
        return (
            f"track {self.track} is paused by {self.by}: {self.reason}; to let it go on: dropforge resume {self.track}"
        )


def pauses(base: Connection) -> list[PauseView]:
    """Return the tracks that are paused."""
    found = base.execute("SELECT name, paused FROM track WHERE paused IS NOT NULL ORDER BY created_at").fetchall()
    return [PauseView(track=row.name, **{**row.paused, "at": utc(row.paused["at"])}) for row in found]


def goes_after(base: Connection, run: Any) -> int | None:
    """Return the run before `run` in the queue, of those that may begin now; `None` for the first."""
    due = base.execute(f"SELECT id, state, trigger, place FROM run WHERE {IS_DUE}", {"now": now_ms()})  # noqa: S608
    keys = {queue_order(one.state, one.trigger, one.place, one.id) for one in due}
    before = [key for key in keys if key < queue_order(run.state, run.trigger, run.place, run.id)]
    return max(before)[-1] if before else None


def open_runs(overview: "Overview", track: str | None = None) -> "list[RunView]":
    """Return the runs that are not over, in the order in which they go."""
    runs = overview.runs(track, OPEN_STATES)
    return sorted(runs, key=lambda run: queue_order(run.state, run.trigger, run.place, run.id))
