"""The next action of a claimed run: a pure function of facts, which `facts` reads and `dispatcher` acts on."""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from daemon.queue.attempt_ends import End, Then
from daemon.state.tables import Attempt, Run
from pipeline.artifacts import Artifact
from pipeline.contract import Step, StepResult, StepSpec
from pipeline.errors import EXIT_BAD_DATA, EXIT_DISK_FULL, EXIT_START_AGAIN, DropforgeError, StepFailed

_SIGNAL_EXITS = 128
_FAILURES = frozenset({Then.RETRY, Then.FAIL, Then.DIE})


@dataclass(frozen=True)
class Facts:
    """What the next action of a claimed run depends on; what it does not depend on was not read."""

    run: Run
    #: Whether the daemon stops, so that no step may begin.
    draining: bool = False
    #: The open attempt and the spec that it was submitted with, or whether its spec.json is damaged. Without a spec,
    #: `step` is set if nobody has begun it.
    attempt: Attempt | None = None
    spec: StepSpec | None = None
    damaged: bool = False
    #: Whether the attempt has ended; its result, `None` if that is another attempt's; whether its publication began,
    #: and the artifact, or why it cannot be published, once that has ended.
    ended: bool = False
    result: StepResult | None = None
    publishing: bool = False
    published: Artifact | StepFailed | None = None
    #: Whether the step is useless, as another champion serves than its training starts from.
    useless: bool = False
    #: How Slurm ended the attempt's job; its hint says why that counts as a failure, or is empty.
    stopped: DropforgeError | None = None
    #: Whether the attempt made progress (`FactReader._made_progress`), and which folder was away (`FactReader.away`).
    progress: bool = False
    away: str = ""
    #: The artifacts by step, the first stale step (`first_stale`), the next step, and what keeps it from beginning.
    done: dict[str, str] = field(default_factory=dict)
    stale: tuple[str, str] | None = None
    step: Step | None = None
    blocker: DropforgeError | None = None


class Do(Enum):
    """An action other than the end of an attempt (`End`); of these, only `CONCLUDE` can end the claim."""

    #: Begin the next step, or submit the open attempt, which never reached the executor.
    SUBMIT = auto()
    #: Wait for the end of the step, or of the publication of its result.
    WAIT = auto()
    #: Have the running step stopped.
    CANCEL = auto()
    #: Begin to publish the result.
    PUBLISH = auto()
    #: Unpublish the stale step and all later ones.
    REDO = auto()
    #: Apply the verdict and end the run.
    CONCLUDE = auto()


class Action(NamedTuple):
    """An action on a run: do something, end its attempt, or release it; and the error to store with that."""

    what: Do | End | Then
    error: DropforgeError | None = None


def next_action(facts: Facts) -> Action:
    """Return the next action on a claimed run; changes nothing."""
    if facts.attempt is None:
        return _between_steps(facts)
    if facts.spec is None:
        # The daemon died between the attempt's row and its spec, or the spec was lost later, as by a restore.
        if facts.stale or (facts.step and facts.step.name == facts.attempt.step):
            return Action(Do.REDO if facts.stale else Do.SUBMIT)
        end, words = (End.SPEC_DAMAGED, "is damaged") if facts.damaged else (End.SPEC_LOST, "is missing")
        return Action(end, DropforgeError(f"its spec.json {words}"))
    if not facts.ended:
        return Action(Do.CANCEL if facts.run.cancel_requested or facts.useless else Do.WAIT)
    action = _after_result(facts, facts.spec)
    if facts.away and action.error and isinstance(action.what, End) and action.what.then in _FAILURES:
        return Action(End.FOLDER_AWAY, not_mounted(facts.away, action.error))
    return action


def not_mounted(folder: str, error: DropforgeError) -> DropforgeError:
    """Return `error` with its message extended: `folder` was not mounted. Hint and exit code are dropped."""
    return DropforgeError(f"{folder} was not mounted: {error.message}")


def _between_steps(facts: Facts) -> Action:
    if facts.run.cancel_requested:
        return Action(Then.CANCEL)
    if facts.stale or facts.step is None:
        return Action(Do.REDO if facts.stale else Do.CONCLUDE)
    if facts.draining:
        return Action(Then.INTERRUPT)
    return Action(Then.POSTPONE, facts.blocker) if facts.blocker else Action(Do.SUBMIT)


def _after_result(facts: Facts, spec: StepSpec) -> Action:
    result = facts.result
    if result is None:
        return Action(End.FOREIGN_RESULT, DropforgeError(f"step {spec.step}: its result is damaged, or not its own"))
    if result.status == "ok":
        return _after_good(facts)
    error = None if result.error is None else DropforgeError(result.error.message, result.error.hint, result.exit_code)
    if result.status == "interrupted":
        if result.exit_code == EXIT_START_AGAIN or facts.run.cancel_requested:
            return Action(End.CANCELLED) if facts.run.cancel_requested else Action(End.START_AGAIN, error)
        return Action(End.FAILED if facts.stopped and facts.stopped.hint else End.INTERRUPTED, facts.stopped)
    end = {EXIT_DISK_FULL: End.DISK_FULL, EXIT_BAD_DATA: End.BAD_DATA}.get(result.exit_code, End.FAILED)
    hint = f"the whole story: dropforge logs {spec.run}"
    error = error or DropforgeError(f"exit code {result.exit_code}", hint)
    return Action(End.DIED if result.exit_code > _SIGNAL_EXITS else end, error)


def _after_good(facts: Facts) -> Action:
    if isinstance(facts.published, StepFailed):
        return Action(End.FAILED, facts.published)
    if facts.published is not None:
        return Action(End.PUBLISHED)
    if facts.publishing and facts.run.cancel_requested:
        return Action(End.CANCELLED, DropforgeError("it was cancelled while it was published"))
    return Action(Do.WAIT if facts.publishing else Do.PUBLISH)
