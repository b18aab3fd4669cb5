"""The errors of steps, each with its exit code and a remedy for the user."""

import errno

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_DATA = 65
#: An exception that is no `DropforgeError`; its text may quote data.
EXIT_UNFORESEEN = 70
#: The disk is full: the run waits for free space, and the attempt is not counted.
EXIT_DISK_FULL = 74
EXIT_INTERRUPTED = 75
#: `StartAgain`: the next attempt continues at once in a fresh process, and this one is not counted.
EXIT_START_AGAIN = 76


class DropforgeError(Exception):
    """An error that the user can act on: `message` describes it, `hint` is the remedy."""

    exit_code = EXIT_FAILED

    def __init__(self, message: str, hint: str = "", exit_code: int | None = None) -> None:
        """Keep `message` (one sentence), `hint` (the remedy, an exact command) and the class's exit code or another."""
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code or self.exit_code


class StepFailed(DropforgeError):
    """A step failed, and another attempt may succeed; it is retried up to the limit."""


class CannotTrain(DropforgeError):
    """Data, base model and settings can never work together; retrying is pointless."""

    exit_code = EXIT_BAD_DATA


class Interrupted(DropforgeError):
    """The step was stopped: the run waits, the attempt is no failed one, and the next resumes from what it saved."""

    exit_code = EXIT_INTERRUPTED


class StartAgain(Interrupted):
    """The step saved its state; another attempt follows at once in a fresh process. This one is not counted."""

    exit_code = EXIT_START_AGAIN


def os_words(error: OSError) -> str:
    """Return the message of an operating system error, after the file's name and a colon if it has one."""
    return ": ".join(map(str, filter(None, (error.filename, error.strerror or error))))


#: Messages of libraries that write files without Python: torch's archives, safetensors, the C library.
_FULL_WORDS = (
    "No space left on device",
    "Disk quota exceeded",
    "StorageFull",
    "PytorchStreamWriter failed writing",
    ". unexpected pos ",
)


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error, or an error in its chain of causes and contexts, reports a full disk or quota."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if getattr(cause, "errno", None) in {errno.ENOSPC, errno.EDQUOT} or any(map(str(cause).count, _FULL_WORDS)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
