"""
The states of the database's rows, each with its meaning and how it ends.

Separate from the tables, so that a reader need not load SQLModel.
"""

from enum import StrEnum

#: `Run.outcome` of a win that waits for approval, and of a win before whose approval the champion changed.
AWAITING, OVERTAKEN = "awaiting_approval", "overtaken"


class DropState(StrEnum):
    """The state of one dropped file."""

    #: It passed validation and is in every later snapshot of its track; a person withdraws it, a verdict suspends it.
    ACCEPTED = "accepted"
    #: A held-out file that waits for approval, in no snapshot: accepted or withdrawn by a person.
    PROPOSED = "proposed"
    #: It failed validation and was given back with its findings; final.
    REJECTED = "rejected"
    #: The same content is accepted, withdrawn or suspended on the track already (`duplicate_of`); final.
    DUPLICATE = "duplicate"
    #: A person took it out of later snapshots; a person restores it.
    WITHDRAWN = "withdrawn"
    #: A candidate trained with it was worse, and so was its trial, also compared with a control; it is in no later
    #: snapshot until a person restores it.
    SUSPENDED = "suspended"


class Purpose(StrEnum):
    """What a run is for; the last three are about one drop (`Run.about_drop`), and begin when nothing else is due."""

    #: It trains on all accepted drops.
    CANDIDATE = "candidate"
    #: The same, and a person wants settings searched (`dropforge search`).
    SEARCH = "search"
    #: It trains on the champion's drops and one that may have made another run worse.
    TRIAL = "trial"
    #: It trains on the champion's drops alone, to compare a trial (`Run.control_of`) with.
    CONTROL = "control"
    #: It trains on the champion's drops without one of them.
    LEFT_OUT = "left_out"


class SuspectEnd(StrEnum):
    """How a drop's trial ended."""

    #: Its trial was not worse than champion and control, another drop was found, the search was given up, or a person
    #: restored the drop.
    CLEARED = "cleared"
    #: Its trial was worse than champion and control: the drop is suspended.
    SUSPENDED = "suspended"
    #: A person withdrew the drop meanwhile.
    ENDED = "ended"


class RunState(StrEnum):
    """The state of one run."""

    #: Open: it collects drops and has no snapshot yet; claimed by the dispatcher when its track has been quiet.
    QUEUED = "queued"
    #: A daemon holds its claim token and works on it; ended by `finish` or `leave`, adopted after a crash by `rescue`.
    RUNNING = "running"
    #: Interrupted or to be retried: it keeps its snapshot and is claimed, from `not_before` on, before any queued run.
    WAITING = "waiting"
    #: It ended with a verdict, promoted or not; final, unless it waits for approval: a person cancels it.
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


def queue_order(state: str, about_drop: int | None, place: int, run_id: int) -> tuple[bool, int, bool, bool, int]:
    """
    Return a key that sorts open runs: running first, then by `place`, lowest first.

    At the same place runs about one drop go last, waiting runs before queued ones, the older first; `queue.order` has
    the reasons.
    """
    return state != RunState.RUNNING, place, about_drop is not None, state == RunState.QUEUED, run_id


def state_words(state: str) -> str:
    """Return a run's state as a predicate: "is queued", "succeeded", "was cancelled"."""
    if state in {RunState.SUCCEEDED, RunState.FAILED, RunState.CRASHED}:
        return str(state)
    return f"was {state}" if state == RunState.CANCELLED else f"is {state}"


class AttemptState(StrEnum):
    """The state of one attempt at one step."""

    #: Its spec is with the executor; moved on by the dispatcher.
    SUBMITTED = "submitted"
    #: Its result was checked and its artifact published; final.
    PUBLISHED = "published"
    #: It ended with an error; final.
    FAILED = "failed"
    #: It was stopped, or saved its state for a fresh process: the next attempt resumes; final.
    INTERRUPTED = "interrupted"
    #: Its spec is lost, its result is another attempt's, or its run stopped before it; final.
    LOST = "lost"


class PromotionKind(StrEnum):
    """Why a champion changed."""

    #: A base model became the champion: generation 0, or another base in the settings.
    BASE = "base"
    #: A run's candidate won and, where approval is manual, a person approved it.
    PROMOTION = "promotion"
    #: A person made a run's model the champion, whatever its verdict.
    FORCED = "forced"
    #: A former champion was made to serve again; the replaced one is blocked.
    ROLLBACK = "rollback"


class HookState(StrEnum):
    """The state of a hook or health command after a change of champion; `None` if there is no command."""

    #: To be run by the daemon.
    PENDING = "pending"
    #: The daemon runs it, or died while it did: then it is run again.
    RUNNING = "running"
    #: It ended with exit code 0; final.
    OK = "ok"
    #: It ended otherwise, or not in time; final.
    FAILED = "failed"
    #: A health command that did not run before the champion changed again, or a hook that a person wanted repeated
    #: while the model was found to be unhealthy; final.
    SKIPPED = "skipped"


class MessageState(StrEnum):
    """The state of one message to one address."""

    #: To be sent after all earlier ones to the same address; also after failed tries.
    PENDING = "pending"
    #: The address accepted it; final.
    SENT = "sent"
    #: It could not be sent for a week, or its address is not in the settings any more; final.
    GIVEN_UP = "given_up"
