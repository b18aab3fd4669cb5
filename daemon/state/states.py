"""
The states that rows of the database pass through, a sentence for each.

Apart from the tables themselves, so that whoever only reads need not load what writes them.
"""

from enum import StrEnum

#: `Run.outcome` of a win that a person has to approve, and of one that another champion came before.
AWAITING, OVERTAKEN = "awaiting_approval", "overtaken"


class DropState(StrEnum):
    """What has become of one file."""

    #: It passed validation and is in every later snapshot of its track; a person withdraws it, a verdict suspends it.
    ACCEPTED = "accepted"
    #: A held-out file that waits for approval, in no snapshot: accepted or withdrawn by a person.
    PROPOSED = "proposed"
    #: It failed validation and was given back with its findings; final.
    REJECTED = "rejected"
    #: The same content is accepted on the track already (`duplicate_of`); final.
    DUPLICATE = "duplicate"
    #: A person took it out of later snapshots; a person restores it.
    WITHDRAWN = "withdrawn"
    #: It made a candidate worse, and another one that was trained on it alone beside what the champion knows; it is out
    #: of later snapshots, and a person restores it.
    SUSPENDED = "suspended"


#: `Run.trigger` of a run that tries one drop alone, since that may have made another run worse.
TRIAL = "trial"
#: `Run.trigger` of a run that a person began so that it searches, as `dropforge search` does.
SEARCH = "search"

#: `Event.kind` where a verdict has the champion's loss on a drop that it did not know.
MEASURED = "drop_measured"

#: `Event.kind` where a drop came in, or came back by a person's word.
CAME_IN = ("drop_accepted", "drop_restored")


class SuspectEnd(StrEnum):
    """What a drop's being on trial has come to."""

    #: Its trial did not speak against it, another drop was found, or nobody looks any further.
    CLEARED = "cleared"
    #: Its trial spoke against it: the drop is suspended.
    SUSPENDED = "suspended"
    #: A person took the drop out or put it back meanwhile.
    ENDED = "ended"


class RunState(StrEnum):
    """How far one run is."""

    #: Open: it collects drops and has no snapshot yet; claimed by the dispatcher when its track has been quiet.
    QUEUED = "queued"
    #: A daemon holds its claim token and works on it; moved on by `finish`, `fail`, `interrupt`, `cancel`, `rescue`.
    RUNNING = "running"
    #: Interrupted or to be retried: it keeps its snapshot and is claimed, from `not_before` on, before any queued run.
    WAITING = "waiting"
    #: It ended with a verdict, promoted or not; final, unless it waits for approval and a drop of its own is withdrawn.
    SUCCEEDED = "succeeded"
    #: It ended without a verdict; a person retries it.
    FAILED = "failed"
    #: A person ended it or withdrew a drop that it was made from; a person retries it.
    CANCELLED = "cancelled"
    #: Its processes vanished again and again (killed, out of memory), so it may not take the box down once more; a
    #: person retries it.
    CRASHED = "crashed"


#: The states of runs that are not over, in the order in which these runs go.
OPEN_STATES = (RunState.RUNNING, RunState.WAITING, RunState.QUEUED)


def queue_order(state: str, trigger: str, place: int, run_id: int) -> tuple[bool, int, bool, bool, int]:
    """Return the key that sorts open runs into the order in which they go; `queue.order` says why."""
    return state != RunState.RUNNING, place, trigger == TRIAL, state == RunState.QUEUED, run_id


def state_words(state: str) -> str:
    """Return a run's state as it is said after the run's number: "is queued", "succeeded", "was cancelled"."""
    if state in {RunState.SUCCEEDED, RunState.FAILED, RunState.CRASHED}:
        return str(state)
    return f"was {state}" if state == RunState.CANCELLED else f"is {state}"


class AttemptState(StrEnum):
    """How far one attempt at one step is."""

    #: Its spec is with the executor; moved on by the dispatcher.
    SUBMITTED = "submitted"
    #: Its result was checked and its artifact published; final.
    PUBLISHED = "published"
    #: It ended with an error; final.
    FAILED = "failed"
    #: It was asked to stop and left a checkpoint; final.
    INTERRUPTED = "interrupted"
    #: Its process vanished without a result; final.
    LOST = "lost"


class PromotionKind(StrEnum):
    """Why a champion changed."""

    #: A base model became the champion: generation 0, or another base in the settings.
    BASE = "base"
    #: A run's candidate won; where approval is manual, a person said yes.
    PROMOTION = "promotion"
    #: A person made a run's model the champion, whatever its verdict.
    FORCED = "forced"
    #: A person made a former champion serve again; the one that lost its place is blocked.
    ROLLBACK = "rollback"


class PromotionState(StrEnum):
    """Every change of a champion is done; older versions also wrote `intent` and `abandoned`, which changed nothing."""

    #: The link points to `model_path` or did; final.
    DONE = "done"


class HookState(StrEnum):
    """How far a command is that follows a change of a champion; nothing where there is none to run."""

    #: To be run by the daemon.
    PENDING = "pending"
    #: The daemon runs it, or died while it did: then it is run again.
    RUNNING = "running"
    #: It ended with exit code 0; final.
    OK = "ok"
    #: It ended otherwise, or not in time; final.
    FAILED = "failed"
    #: Of a health command: another champion had taken the place before it could be asked. Of a hook that a person asked
    #: for again: the model was found to be unhealthy meanwhile. Final.
    SKIPPED = "skipped"


class MessageState(StrEnum):
    """How far one message to one address is."""

    #: To be sent once all earlier ones to the same address were; also after tries in vain.
    PENDING = "pending"
    #: It was taken there; final.
    SENT = "sent"
    #: It could not be sent for a week, or its address is not in the settings any more; final.
    GIVEN_UP = "given_up"
