"""A workspace with something of everything that the page shows, made by the daemon's own functions."""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from daemon.champions import promotion
from daemon.inbox.intake import Intake
from daemon.inbox.watcher import Settled
from daemon.queue import states
from daemon.state.events import Word
from daemon.state.layout import LOCK_NAME
from daemon.state.states import AWAITING
from daemon.system.folders import StateFolder, WorkFolder
from daemon.views.overview import Overview
from pipeline import durable
from pipeline.artifacts import CurvePoint
from pipeline.config import TrainConfig
from pipeline.contract import CURVE_NAME, PROGRESS_NAME, Curve, Progress
from pipeline.report.write import write_report
from tests import run_owner
from tests.daemon.conftest import BASE_ID, LivedIn
from tests.made_artifacts import run_config
from tests.model_folder import write_model

HOUR_MS = 3_600_000
#: Markup, a bidi control, a terminal escape; a name in a folder has no slash.
HOSTILE_NAME = '<img src=x onerror="document.title=1">\u202egpj.\x1b[31m.jsonl'


#: The same in a row.
HOSTILE_TEXT = '<script>document.title = "owned"</script></pre><img src=x onerror="document.title=1"> \u202eevil'


def rows(topic: str, number: int = 40) -> str:
    """Return a drop of so many records."""
    made = ({"instruction": f"Rate {topic}, {place}.", "output": str(1 + place % 5)} for place in range(number))
    return "".join(json.dumps(one) + "\n" for one in made)


def make_model(folder: Path, name: str) -> str:
    """Put a model that no one could load into the `models` folder; return its id."""
    identity = write_model(folder / "new", name.encode())
    (folder / "new").rename(folder / identity)
    return identity


def begin(made: LivedIn, rank: int = 16) -> states.Claim:
    """Let the next run begin."""
    config = run_config("/base", BASE_ID, train=TrainConfig(rank=rank, alpha=2 * rank))
    claim = run_owner.claim(made.engine, made.tick(), lambda _session, _track: config)
    assert claim is not None
    return claim


def end(made: LivedIn, cards: Any, outcome: str, over: int = 0, *, waits: bool = False) -> int:
    """Let the next run end in a verdict with its card; promote what won, unless it waits for a person."""
    claim = begin(made)
    for step in ("prepare", "train", "merge", "evaluate", "decide"):
        shutil.rmtree(made.attempt(claim, step))  # its files are made below
    return judge(made, cards, claim, outcome, over, waits=waits)


def judge(made: LivedIn, cards: Any, claim: states.Claim, outcome: str, over: int = 0, *, waits: bool = False) -> int:
    """Let a run end in a verdict with its card; promote what won, unless it waits for a person."""
    root, run = made.settings.work_folder, claim.run_id
    serving = Overview(StateFolder(root), WorkFolder(root)).champion("default")
    assert serving is not None
    attempt, verdict = cards.case(root, outcome, run=run)
    model = make_model(root / "models", f"model of run {run}")
    edits = {"champion_generation": over, "candidate_model_id": model, "champion_model_id": serving.model_id}
    verdict = verdict.model_copy(update=edits)
    verdict = verdict.model_copy(update={"report": write_report(attempt, verdict)})
    durable.write_json(root / "runs" / str(run) / "decide.json", verdict.model_dump(mode="json"))
    if outcome == "promoted" and not waits:
        promotion.promote(made.engine, root, run, verdict, Word("", made.tick()))
    ending = (AWAITING if waits else verdict.outcome, verdict)
    run_owner.finish(made.engine, claim, ending, made.tick())
    return run


def progress(folder: Path, done: int, loss: float, dev_loss: float | None = None) -> None:
    """Say how far a training is; a dev loss that was said before is not measured again."""
    told = Progress(
        step="train",
        done=done,
        total=240,
        loss=loss,
        dev_loss=dev_loss,
        tokens_per_second=310.0,
        eta_seconds=3.0 * (240 - done),
        memory=2_300_000_000,
        updated_at=time.time(),
    )
    durable.write_hint(folder / PROGRESS_NAME, told.model_dump())
    before = Curve.model_validate(durable.read_json(folder / CURVE_NAME) or {})
    measured = dev_loss is not None and dev_loss not in {point.loss for point in before.dev}
    dev = (CurvePoint(step=done, loss=dev_loss),) if measured else ()
    curve = Curve(loss=(*before.loss, CurvePoint(step=done, loss=loss)), dev=(*before.dev, *dev))
    durable.write_hint(folder / CURVE_NAME, curve.model_dump())


def furnish(made: LivedIn, cards: Any) -> tuple[states.Claim, Path]:
    """
    Fill a workspace; return the run that is training, and the folder of its attempt.

    Runs: 1 and 3 promoted, 2 not shown better, 4 a guard failed, 5 failed, 6 won and waits for a person, 7 trains, 8 is
    queued, as is 9 of track support. Drops: one held out, a duplicate, one rejected, one of hostile words, and one for
    each run.
    """
    made.now = round(time.time() * 1000) - 5 * HOUR_MS
    made.take("exam.jsonl", rows("the exam", 120), "heldout")
    made.take("reviews-2026-10.jsonl", rows("October", 180))
    end(made, cards, "promoted")
    made.take("bewertungen_ü.jsonl", rows("Äpfel", 60))
    end(made, cards, "not_shown_better", 1)
    made.take("reviews-2026-11.jsonl", rows("November", 150))
    end(made, cards, "promoted", 1)
    made.take("reviews-2026-11 (copy).jsonl", rows("November", 150))
    made.take("export.jsonl", '{"instruction": "no answer"}\n{"question": "?", "answer": 3}\nnot json\n' + rows("x", 3))
    made.take(HOSTILE_NAME, rows(HOSTILE_TEXT, 30))
    end(made, cards, "guard_failed", 2)
    made.take("tickets.jsonl", rows("tickets", 90))
    failed = begin(made)
    made.attempt(failed, "prepare")
    made.fail(failed)
    made.take("tickets-mended.jsonl", rows("tickets again", 90))
    end(made, cards, "promoted", 2, waits=True)
    made.take("chats.jsonl", rows("chats", 200))
    claim = begin(made, rank=64)
    made.attempt(claim, "prepare")
    data = cards.dataset(train_rows=1482, warnings=())
    durable.write_json(made.settings.state_folder / f"runs/{claim.run_id}/prepare.json", data.model_dump(mode="json"))
    folder = made.attempt(claim, "train", None)
    for step in range(2, 92, 2):
        progress(folder, step, 0.5 + 1.6 * 0.97**step + 0.03 * (step % 3), 0.6 + 1.5 * 0.97 ** (step // 20 * 20))
    made.take("late.jsonl", rows("the late ones", 25))
    (made.settings.inbox_folder / "support" / "questions.jsonl").write_text(rows("questions", 15))
    Intake(made.engine, made.settings).take(Settled("support", "train", b"questions.jsonl"), made.tick())
    return claim, folder


@contextmanager
def running(state_folder: Path) -> Iterator[None]:
    """Hold the lock of a daemon that works on a state folder."""
    fd = os.open(state_folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(fd)
