"""How an attempt at a step ends, and what follows for its run: the one table of both, with all pauses and limits."""

from enum import Enum, StrEnum
from typing import Any, NamedTuple

from daemon.queue.states import Move
from daemon.settings.model import RetrySettings
from daemon.state.states import AttemptState, RunState
from daemon.state.tables import Run
from pipeline.errors import DropforgeError

#: A postponed run waits as long again as since its first claim, but so long at least and at most.
POSTPONED_MS, _LONGEST_POSTPONED_MS = 30_000, 600_000
#: The pause after a failure doubles each time, up to this.
_LONGEST_BACKOFF_MS = 3_600_000
#: So many attempts in a row that Slurm stopped, all without progress, are a failure: every node may be preempted.
MOST_INTERRUPTED = 10


class Then(StrEnum):
    """What follows for a claimed run, by the event's kind; all but `GO_ON` release the claim (`run_queue.leave`)."""

    #: The run takes its next action at once.
    GO_ON = "run_goes_on"
    #: A failure is counted: the run waits, longer each time, and fails at the limit.
    RETRY = "run_waits"
    #: A failure is counted, and the run fails: another attempt would fail, too.
    FAIL = "run_failed"
    #: A vanished process is counted: the run can be claimed again at once, and crashes at the limit.
    DIE = "run_died"
    #: Nothing is counted: the run can be claimed again at once.
    INTERRUPT = "run_interrupted"
    #: Nothing is counted: the run waits until its trouble may be over.
    POSTPONE = "run_postponed"
    CANCEL = "run_cancelled"


class End(Enum):
    """
    How an attempt ended: a name, the attempt's state, and what follows.

    A lost attempt is revoked, as its process may still run.
    """

    PUBLISHED = "published", AttemptState.PUBLISHED, Then.GO_ON
    #: The step left an error, or what cannot be published, or Slurm stopped it as it will stop the next attempt.
    FAILED = "failed", AttemptState.FAILED, Then.RETRY
    #: Data, base model and settings can never work together.
    BAD_DATA = "bad data", AttemptState.FAILED, Then.FAIL
    #: Its process was killed, or vanished.
    DIED = "died", AttemptState.FAILED, Then.DIE
    DISK_FULL = "disk full", AttemptState.FAILED, Then.POSTPONE
    #: It failed or died, and the shared folder was away meanwhile, or the base model is.
    FOLDER_AWAY = "folder away", AttemptState.FAILED, Then.INTERRUPT
    #: The step was stopped, and can continue.
    INTERRUPTED = "interrupted", AttemptState.INTERRUPTED, Then.INTERRUPT
    #: The step saved its state for a fresh process.
    START_AGAIN = "start again", AttemptState.INTERRUPTED, Then.GO_ON
    #: The run is to be cancelled, which is its next action.
    CANCELLED = "cancelled", AttemptState.INTERRUPTED, Then.GO_ON
    FOREIGN_RESULT = "foreign result", AttemptState.LOST, Then.DIE
    SPEC_DAMAGED = "spec damaged", AttemptState.LOST, Then.DIE
    SPEC_LOST = "spec lost", AttemptState.LOST, Then.GO_ON

    def __init__(self, _name: str, state: AttemptState, then: Then) -> None:
        """Set `state` and `then`; the name tells rows apart that have the same two."""
        self.state, self.then = state, then


class Leave(NamedTuple):
    """What follows for a run, why, and whether its last attempt made progress (`Facts.progress`)."""

    then: Then
    error: DropforgeError | None = None
    progress: bool = False

    def move(self, run: Run, now: int, retry: RetrySettings) -> Move:
        """
        Return the change of a claimed run: its new state, its counters, until when it waits, and the error if any.

        `RETRY` waits for `retry.backoff_seconds`, doubled per failure up to an hour, or fails at `retry.limit`; `FAIL`
        fails at once. `DIE` crashes at `retry.limit` deaths in a row, else is due at once; with progress the count
        restarts at 1: three reboots in a week must not end a training that takes longer than a week. `INTERRUPT` is due
        at once. `POSTPONE` waits as long as since the first claim, 30 s to 10 min.
        """
        to, error = RunState.WAITING, self.error
        values: dict[str, Any] = {} if error is None else {"error": error.message, "hint": error.hint or None}
        detail: dict[str, Any] = {} if error is None else {"error": error.message, "exit_code": error.exit_code}
        match self.then:
            case Then.RETRY | Then.FAIL:
                values["failures"] = failures = run.failures + 1
                if self.then is Then.FAIL or failures >= retry.limit:
                    to = RunState.FAILED
                else:
                    wait = min(int(retry.backoff_seconds * 1000) << min(failures - 1, 32), _LONGEST_BACKOFF_MS)
                    values["not_before"], detail["wait_ms"] = now + wait, wait
            case Then.DIE:
                values["deaths"] = deaths = 1 if self.progress else run.deaths + 1
                values["hint"] = None
                if deaths >= retry.limit:
                    to = RunState.CRASHED
                    values["hint"] = f"free memory or lower train.batch_tokens, then: dropforge retry {run.id}"
            case Then.POSTPONE:
                waited = now - (run.started_at or now)
                values["not_before"] = now + min(max(waited, POSTPONED_MS), _LONGEST_POSTPONED_MS)
            case Then.CANCEL:
                to = RunState.CANCELLED
            # An interrupted run's `not_before` stays as it was at the claim: to be later, by a clock that is ahead,
            # would make it wait.
        return Move(to, str(self.then) if to is RunState.WAITING else f"run_{to}", values, detail)
