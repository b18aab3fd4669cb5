"""The table of actions: what is done next with a claimed run, from facts alone."""

from pathlib import Path
from typing import Any

import pytest

from daemon.dispatch.next_action import Action, Do, Facts, next_action
from daemon.queue.attempt_ends import End, Then
from daemon.state.states import AttemptState
from daemon.state.tables import Attempt, Run
from pipeline.contract import StepError, StepResult, StepSpec
from pipeline.errors import DropforgeError, StepFailed
from pipeline.steps import BY_NAME
from tests.made_artifacts import made_adapter, made_spec

RUN = Run(id=1, track="default", trigger="drop", created_at=0, not_before=0)
ATTEMPT = Attempt(run_id=1, step="train", number=1, fence="f", started_at=0)
SPEC: StepSpec = made_spec(Path("/root"), "train")
STALE, FULL = ("merge", ""), DropforgeError("the disk is full", "free some room")
STOPPED = DropforgeError("Slurm stopped job 7")
SHARE = "the shared folder"
NOT_MOUNTED = "the shared folder was not mounted: it did not work"
TOO_OFTEN = DropforgeError("Slurm stopped job 7", "10 attempts in a row left no checkpoint")


def result(status: str = "ok", code: int = 0, words: str | None = "it did not work") -> StepResult:
    error = StepError(message=words, hint="try this") if words and status != "ok" else None
    told: dict[str, Any] = {"key": SPEC.key, "fence": SPEC.fence, "status": status, "exit_code": code, "error": error}
    return StepResult.model_validate(told)


def ended(**facts: Any) -> dict[str, Any]:
    return {"attempt": ATTEMPT, "spec": SPEC, "ended": True, **facts}


def failed(code: int, **facts: Any) -> dict[str, Any]:
    return ended(result=result("failed", code), **facts)


def stopped(code: int = 75, **facts: Any) -> dict[str, Any]:
    return ended(result=result("interrupted", code), **facts)


PREPARE, TRAIN = BY_NAME["prepare"], BY_NAME["train"]
OPEN: dict[str, Any] = {"attempt": ATTEMPT, "spec": SPEC}
WELL = ended(result=result())
BROKEN = StepFailed("it did not work")
NO_SPEC = "its spec.json is missing"
PUBLISHING = {**WELL, "publishing": True}
TABLE: dict[str, tuple[dict[str, Any], Do | End | Then, str | None]] = {
    "no step begun": ({"step": TRAIN}, Do.SUBMIT, None),
    "a step is stale": ({"stale": STALE}, Do.REDO, None),
    "a step is stale, daemon stops": ({"stale": STALE, "draining": True}, Do.REDO, None),
    "all steps done": ({}, Do.CONCLUDE, None),
    "all steps done, daemon stops": ({"draining": True}, Do.CONCLUDE, None),
    "no step begun, daemon stops": ({"step": TRAIN, "draining": True}, Then.INTERRUPT, None),
    "no room": ({"step": TRAIN, "blocker": FULL}, Then.POSTPONE, "the disk is full"),
    "no room, daemon stops": ({"step": TRAIN, "blocker": FULL, "draining": True}, Then.INTERRUPT, None),
    "cancelled": ({"cancelled": True}, Then.CANCEL, None),
    "never submitted": ({"attempt": ATTEMPT, "step": TRAIN}, Do.SUBMIT, None),
    "never submitted, a step is stale": ({"attempt": ATTEMPT, "stale": STALE}, Do.REDO, None),
    "never submitted, another is next": ({"attempt": ATTEMPT, "step": PREPARE}, End.SPEC_LOST, NO_SPEC),
    "begun, its spec is damaged": ({"attempt": ATTEMPT, "damaged": True}, End.SPEC_DAMAGED, "its spec.json is damaged"),
    "begun without spec, or cancelled": ({"attempt": ATTEMPT}, End.SPEC_LOST, NO_SPEC),
    "at work": (OPEN, Do.WAIT, None),
    "at work, daemon stops": ({**OPEN, "draining": True}, Do.WAIT, None),
    "at work, cancelled": ({**OPEN, "cancelled": True}, Do.CANCEL, None),
    "at work, useless": ({**OPEN, "useless": True}, Do.CANCEL, None),
    "another attempt's result": (ended(), End.FOREIGN_RESULT, "step train: its result is damaged, or not its own"),
    "good": (WELL, Do.PUBLISH, None),
    "good, cancelled": ({**WELL, "cancelled": True}, Do.PUBLISH, None),
    "being published": (PUBLISHING, Do.WAIT, None),
    "being published, cancelled": (
        {**PUBLISHING, "cancelled": True},
        End.CANCELLED,
        "it was cancelled while it was published",
    ),
    "published": ({**PUBLISHING, "published": made_adapter(SPEC)}, End.PUBLISHED, None),
    "published, cancelled": ({**PUBLISHING, "published": made_adapter(SPEC), "cancelled": True}, End.PUBLISHED, None),
    "cannot be published": ({**WELL, "published": BROKEN}, End.FAILED, "it did not work"),
    "cannot be published, folder away": ({**WELL, "published": BROKEN, "away": SHARE}, End.FOLDER_AWAY, NOT_MOUNTED),
    "failed": (failed(1), End.FAILED, "it did not work"),
    "failed without words": (ended(result=result("failed", 3, None)), End.FAILED, "exit code 3"),
    "failed, folder away": (failed(1, away=SHARE), End.FOLDER_AWAY, NOT_MOUNTED),
    "failed, cancelled": (failed(1, cancelled=True), End.FAILED, "it did not work"),
    "bad data": (failed(65), End.BAD_DATA, "it did not work"),
    "disk full": (failed(74), End.DISK_FULL, "it did not work"),
    "disk full, folder away": (failed(74, away=SHARE), End.DISK_FULL, "it did not work"),
    "killed": (failed(137), End.DIED, "it did not work"),
    "killed, folder away": (failed(137, away=SHARE), End.FOLDER_AWAY, NOT_MOUNTED),
    "stopped here": (stopped(), End.INTERRUPTED, None),
    "stopped by Slurm": (stopped(stopped=STOPPED), End.INTERRUPTED, "Slurm stopped job 7"),
    "stopped by Slurm, folder away": (stopped(stopped=STOPPED, away=SHARE), End.INTERRUPTED, "Slurm stopped job 7"),
    "stopped by Slurm too often": (stopped(stopped=TOO_OFTEN), End.FAILED, "Slurm stopped job 7"),
    "stopped, cancelled": (stopped(cancelled=True), End.CANCELLED, None),
    "starts again": (stopped(76), End.START_AGAIN, "it did not work"),
    "starts again, cancelled": (stopped(76, cancelled=True), End.CANCELLED, None),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_next_action(name: str) -> None:
    given, what, words = TABLE[name]
    facts = {**given}
    run = RUN.model_copy(update={"cancel_requested": facts.pop("cancelled", False)})
    action: Action = next_action(Facts(run, **facts))
    assert (action.what, action.error and action.error.message) == (what, words)


def test_each_action_and_end_is_in_the_table() -> None:
    known = {what for _, what, _ in TABLE.values()}
    assert known >= {*Do, *End}


#: Only these count: a reboot, a full disk and a lost folder are nobody's failure.
COUNTED = {
    End.FAILED: Then.RETRY,
    End.BAD_DATA: Then.FAIL,
    **dict.fromkeys((End.DIED, End.FOREIGN_RESULT, End.SPEC_DAMAGED), Then.DIE),
}


def test_what_follows_from_the_end_of_an_attempt() -> None:
    assert {end: end.then for end in End if end.then in COUNTED.values()} == COUNTED
    assert {end for end in End if end.state == AttemptState.PUBLISHED} == {End.PUBLISHED}
    assert len({*End}) == len(End.__members__), "else two ends are one"
