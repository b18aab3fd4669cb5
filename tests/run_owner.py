"""A run's owner in few lines, for tests that need no dispatcher: it claims the next run, and finishes it; and drops."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import Engine
from sqlmodel import Session, select

from daemon.champions import promotion
from daemon.dispatch.spool import Spool
from daemon.queue import order, run_queue, suspects
from daemon.queue.attempt_ends import Leave, Then
from daemon.queue.states import Claim, ensure_track
from daemon.settings.model import RetrySettings
from daemon.state.database import transaction
from daemon.state.events import Word
from daemon.state.states import AWAITING, OVERTAKEN, DropState, RunState
from daemon.state.tables import Drop, Run, Track
from daemon.system.folders import StateFolder, WorkFolder
from pipeline import durable
from pipeline.artifacts import Verdict
from pipeline.config import RunConfig
from pipeline.errors import DropforgeError
from pipeline.report.write import write_report
from tests.model_folder import write_model

Lines = list[dict[str, Any]]


def configure(_session: Session, track: Track) -> RunConfig:
    return RunConfig(track=track.name, base_model="/base", base_model_id="b" * 64, salt=track.salt)


def add_drop(session: Session, track: str = "default", **fields: Any) -> int:
    """Add an accepted drop for training with a content of its own; return its number."""
    number = len(session.exec(select(Drop)).all()) + 1
    plain = {"role": "train", "state": DropState.ACCEPTED, "name_bytes": b"a", "name": f"{number}.jsonl", "rows": 5}
    plain["records"] = fields.get("rows", 5)
    made = Drop(track=track, **{"sha256": f"{number:064x}", "size_bytes": 1, "received_at": 1, **plain, **fields})
    session.add(made)
    session.flush()
    return made.id or 0


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
                run_queue.postpone(session, run, error, now)
            else:
                return run_queue.claim(session, run, now)
    return None


def leave(engine: Engine, held: Claim, now: int, then: Then, **why: Any) -> RunState:
    """Release a claimed run, as the dispatcher does after `error`; it is given up at `limit`."""
    error = DropforgeError(why["error"], why.get("hint", ""), why.get("exit_code")) if "error" in why else None
    return run_queue.leave(engine, held, Leave(then, error), now, RetrySettings(limit=why.get("limit", 3))).to


def retry(engine: Engine, run_id: int, now: int) -> RunState:
    with transaction(engine) as session:
        return run_queue.retry(session, run_id, now)


def finish(
    engine: Engine,
    held: Claim,
    ending: tuple[str, Verdict],
    now: int,
    also: Callable[[Session, Run], None] = lambda _session, _run: None,
) -> None:
    """End a run, and do `also` in the same transaction."""
    with transaction(engine) as session:
        also(session, run_queue.finish(session, held, *ending, now))


def judged(outcome: str, gain: float | None = None, **more: Any) -> Verdict:
    """Return a verdict on 120 records; without enough of them for one it says that 200 are needed."""
    needed = 200 if outcome == "insufficient_evidence" else None
    plain = {"reasons": (), "metric": "exact_match", "records": 120, "groups": 120, "groups_needed": needed}
    return Verdict.model_validate({"outcome": outcome, "gain": gain, **plain, **more})


def ending(outcome: str, gain: float | None = None, **more: Any) -> tuple[str, Verdict]:
    """Return a run's end with such a verdict, which has won if it waits for approval."""
    return (outcome, judged("promoted" if outcome in {AWAITING, OVERTAKEN} else outcome, gain, **more))


#: A verdict that blames the new drops of its run.
WORSE = judged("worse", -9.0, reasons=("harm_shown",), blames_new_drops=True)


def unsettled(trial: Run) -> None:
    """Refuse to serve a trial, where no control has settled one."""
    raise AssertionError(f"run {trial.id} is not to serve")


def end(made: Any, held: Claim, said: Verdict = WORSE) -> None:
    """End a run of a made workspace with a verdict, and follow it."""

    def also(session: Session, run: Run) -> None:
        suspects.follow_verdict(session, made.settings, run, said, made.now, serve=unsettled)

    finish(made.engine, held, (said.outcome, said), made.tick(), also)


def end_with_card(
    made: Any, cards: Any, outcome: str, change: Callable[[Lines], Lines] = list, *, review: int = 0
) -> int:
    """
    Take a drop in and let its run end in a verdict of `cards` (tests/made_reports.py) with its card.

    `change` is made to the evaluation's records. With `review` a win waits for the blind review of so many pairs.
    """
    row = {"instruction": f"say {made.now}", "output": "a"}
    made.take(f"drop-{made.now}.jsonl", json.dumps(row) + "\n")
    claimed = made.claim()
    root = made.settings.state_folder
    attempt, verdict = cards.case(root, outcome, change, run=claimed.run_id)
    verdict = verdict.model_copy(update={"report": write_report(attempt, verdict)})
    durable.write_json(root / f"runs/{claimed.run_id}/decide.json", verdict.model_dump(mode="json"))

    def also(_session: Session, run: Run) -> None:
        if review:
            run.config = {**(run.config or {}), "gate": {"approval": "manual", "review": review}}

    finish(made.engine, claimed, (AWAITING if review else verdict.outcome, verdict), made.tick(), also)
    return int(claimed.run_id)


def candidate(engine: Engine, root: WorkFolder, weights: str) -> tuple[int, str]:
    """Make a model with these weights, by a run of its own; return the run and the model's id."""
    identity = write_model(root / "models/new", weights.encode())
    shutil.copytree(root / "models/new", root / "models" / identity, dirs_exist_ok=True)
    shutil.rmtree(root / "models/new")
    with transaction(engine) as session:
        run = Run(track="default", state="succeeded", trigger="drop", created_at=1, not_before=1, ended_at=1)
        session.add(run)
        session.flush()
        return run.id or 0, identity


def crown(engine: Engine, root: WorkFolder, weights: str, over: int) -> str:
    """Make a model with these weights the champion after generation `over`; return its id."""
    run_id, identity = candidate(engine, root, weights)
    won = judged("promoted", candidate_model_id=identity, champion_generation=over)
    promotion.promote(engine, root, run_id, won, Word("", 10))
    return identity


def spool_of(folder: Path) -> Spool:
    """Return the spool of a state folder that holds the runs, too; make the folder of the runs."""
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    return Spool(StateFolder(folder), WorkFolder(folder))
