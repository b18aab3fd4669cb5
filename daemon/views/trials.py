"""What is on trial, what a trial run is, and what a verdict found odd in a drop: what a person should look at."""

from sqlite3 import Connection

from daemon.inbox.answers.remarks import loss_words, unlikely_words
from daemon.state.questions import LOSS


def on_trial(base: Connection) -> dict[int, str]:
    """Return the drops that are on trial, each with the reason and what is done about it."""
    rows = base.execute("SELECT drop_id, blamed_run, trial_run FROM suspect WHERE ended IS NULL").fetchall()
    return {row.drop_id: f"it may have made run {row.blamed_run} worse; {_turn(row.trial_run)}" for row in rows}


def champion_loss(base: Connection, drop_id: int) -> tuple[str | None, str | None]:
    """Describe the loss on a drop of the latest champion not trained on it, and the remedy if it stood out."""
    row = base.execute(LOSS, {"drop": drop_id}).fetchone()
    if row is None:
        return None, None
    run = base.execute("SELECT outcome FROM run WHERE id = ?", (row.run_id,)).fetchone()
    is_odd = row.detail["stands_out"] and (run is None or run.outcome != "promoted")
    return loss_words(row.detail), unlikely_words(row.detail, row.run_id) if is_odd else None


def trial_words(base: Connection, run_id: int, *, ended: bool) -> str | None:
    """Say what a trial run is there for; `None` for one that tries nothing any more."""
    tried = base.execute("SELECT drop_id, blamed_run FROM suspect WHERE trial_run = ?", (run_id,)).fetchone()
    if tried is None:
        return None
    verb, why = ("tried", "which might have") if ended else ("tries", "which may have")
    return f"{verb} drop {tried.drop_id} alone, {why} made run {tried.blamed_run} worse"


def _turn(trial: int | None) -> str:
    return f"run {trial} tries it alone" if trial else "it is tried alone when nothing else is to be run"
