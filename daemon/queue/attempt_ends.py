"""How an attempt at a step ends, and what follows for its run: the one table of both."""

from enum import Enum, StrEnum
from typing import NamedTuple

from daemon.state.states import AttemptState
from pipeline.errors import DropforgeError


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
    #: It failed or died, and the shared folder was away meanwhile.
    SHARE_GONE = "share gone", AttemptState.FAILED, Then.INTERRUPT
    #: The step was stopped, and can continue.
    INTERRUPTED = "interrupted", AttemptState.INTERRUPTED, Then.INTERRUPT
    #: The step saved its state for a fresh process.
    START_AGAIN = "start again", AttemptState.INTERRUPTED, Then.GO_ON
    #: The run is to be cancelled, which is its next action.
    CANCELLED = "cancelled", AttemptState.INTERRUPTED, Then.GO_ON
    FOREIGN_RESULT = "foreign result", AttemptState.LOST, Then.DIE
    SPEC_LOST = "spec lost", AttemptState.LOST, Then.GO_ON

    def __init__(self, _name: str, state: AttemptState, then: Then) -> None:
        """Keep the row."""
        self.state, self.then = state, then


class Leave(NamedTuple):
    """What follows for a run, why, and whether its last attempt wrote a checkpoint."""

    then: Then
    error: DropforgeError | None = None
    progress: bool = False
