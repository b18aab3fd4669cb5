"""A run's owner in few lines, for tests that need no dispatcher: it claims the next run, and finishes it."""

from collections.abc import Callable

from sqlalchemy import Engine
from sqlmodel import Session

from daemon.queue import order, run_queue
from daemon.queue.states import Claim, ensure_track
from daemon.state.database import transaction
from daemon.state.tables import Run, Track
from pipeline.config import RunConfig
from pipeline.errors import DropforgeError


def claim(engine: Engine, now: int, configure: Callable[[Session, Track], RunConfig]) -> Claim | None:
    """Claim the next run that `configure` does not refuse."""
    with transaction(engine) as session:
        for run in order.due_runs(session, now):
            try:
                if run.config is None:
                    config = configure(session, ensure_track(session, run.track, now))
                    if not run_queue.begin(session, run, config, now):
                        continue
            except DropforgeError as error:
                run_queue.put_off(session, run, error, now)
            else:
                return run_queue.claim(session, run, now)
    return None


def finish(
    engine: Engine,
    held: Claim,
    ending: run_queue.Ending,
    now: int,
    also: Callable[[Session, Run], None] = lambda _session, _run: None,
) -> None:
    """End a run, and do `also` in the same transaction."""
    with transaction(engine) as session:
        also(session, run_queue.finish(session, held, ending, now))
