"""What is on trial, and what a trial run is: drops that may have made a run worse, each tried alone."""

from sqlite3 import Connection


def on_trial(base: Connection) -> dict[int, str]:
    """Return the drops that are on trial, each with the reason and what is done about it."""
    rows = base.execute("SELECT drop_id, blamed_run, trial_run FROM suspect WHERE ended IS NULL").fetchall()
    return {row.drop_id: f"it may have made run {row.blamed_run} worse; {_turn(row.trial_run)}" for row in rows}


def trial_words(base: Connection, run_id: int, *, ended: bool) -> str | None:
    """Say what a trial run is there for; `None` for one that tries nothing any more."""
    tried = base.execute("SELECT drop_id, blamed_run FROM suspect WHERE trial_run = ?", (run_id,)).fetchone()
    if tried is None:
        return None
    verb, why = ("tried", "which might have") if ended else ("tries", "which may have")
    return f"{verb} drop {tried.drop_id} alone, {why} made run {tried.blamed_run} worse"


def _turn(trial: int | None) -> str:
    return f"run {trial} tries it alone" if trial else "it is tried alone when nothing else is to be run"
