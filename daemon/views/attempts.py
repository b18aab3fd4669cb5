"""A run's attempts at its steps, and which of them are made once more."""

from datetime import datetime
from pathlib import Path
from sqlite3 import Connection
from typing import TYPE_CHECKING

from daemon.state.run_files import again_words, published
from daemon.views.champion_history import utc
from pipeline.artifacts import Frozen
from pipeline.steps import STEPS

if TYPE_CHECKING:
    from daemon.state.tables import Attempt, Run


#: Why the training of a run is done once more, until it has been.
_WHY = """
SELECT detail FROM event WHERE run_id = ? AND kind = 'run_began_again' AND NOT EXISTS (
    SELECT 1 FROM attempt
    WHERE run_id = event.run_id AND step = 'train' AND state = 'published' AND ended_at > event.at)
ORDER BY id DESC LIMIT 1
"""


class AttemptView(Frozen):
    """One attempt at one step."""

    step: str
    number: int
    state: str
    started_at: datetime
    ended_at: datetime | None
    seconds: float | None
    error: str | None


def attempts_of(base: Connection, run: "Run") -> tuple[AttemptView, ...]:
    """Return the attempts of a run, the oldest first."""
    made = base.execute("SELECT * FROM attempt WHERE run_id = ? ORDER BY id", (run.id,))
    return tuple(_attempt(row) for row in made)


def done_again(base: Connection, state_folder: Path, run_id: int) -> str | None:
    """Describe which steps an open run repeats and why; `None` for none, or if its folder is unreadable."""
    try:
        stands = published(state_folder, run_id)
    except OSError:
        return None
    once = "SELECT DISTINCT step FROM attempt WHERE run_id = ? AND state = 'published'"
    made = {row.step for row in base.execute(once, (run_id,))}
    again = [step.name for step in STEPS if step.name in made and step.name not in stands]
    if not again:
        return None
    reasons = [str(row.detail["reason"]) for row in base.execute(_WHY, (run_id,))]
    return ": ".join([*reasons, again_words(stands, again, certain="prepare" in stands)])


def _attempt(row: "Attempt") -> AttemptView:
    seconds = None if row.ended_at is None else (row.ended_at - row.started_at) / 1000
    return AttemptView.model_validate(
        {
            "step": row.step,
            "number": row.number,
            "state": row.state,
            "started_at": utc(row.started_at),
            "ended_at": utc(row.ended_at),
            "seconds": seconds,
            "error": row.error,
        }
    )
