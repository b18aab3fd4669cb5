"""Errors that a step can end with; each knows its exit code and what the user can do about it."""

import errno
from collections.abc import Iterator
from typing import ClassVar

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_DATA = 65
#: The disk is full: the run waits for room, uncounted.
EXIT_DISK_FULL = 74
EXIT_INTERRUPTED = 75


class DropforgeError(Exception):
    """Something went wrong that a person can act on: `message` says what, `hint` what to do."""

    exit_code: ClassVar[int] = EXIT_FAILED

    def __init__(self, message: str, hint: str = "") -> None:
        """Keep `message` (one sentence) and `hint` (the remedy, an exact command where there is one)."""
        super().__init__(message)
        self.message = message
        self.hint = hint


class StepFailed(DropforgeError):
    """A step failed in a way that another attempt may mend; it is retried up to the limit."""


class CannotTrain(DropforgeError):
    """The data, the base model or the settings can never work together; retrying is pointless."""

    exit_code = EXIT_BAD_DATA


class Interrupted(DropforgeError):
    """The step was asked to stop and left a checkpoint; the run waits and the attempt is not counted."""

    exit_code = EXIT_INTERRUPTED


class StartAgain(DropforgeError):
    """The step wrote down what it learned, and the same attempt is to go on with it in a fresh process."""


class DiskFull(DropforgeError):
    """A file could not be written for want of room; the run waits until there is some, and nothing is counted."""

    exit_code = EXIT_DISK_FULL


#: What libraries say that write files without Python: torch's archives, safetensors, the C library's own words.
_FULL_WORDS = (
    "No space left on device",
    "Disk quota exceeded",
    "StorageFull",
    "PytorchStreamWriter failed writing",
    ". unexpected pos ",
)


def is_disk_full(error: BaseException) -> bool:
    """Say whether a full disk, or a spent quota, is behind an error; libraries tell it in ways of their own."""
    return any(
        getattr(cause, "errno", None) in {errno.ENOSPC, errno.EDQUOT} or any(word in str(cause) for word in _FULL_WORDS)
        for cause in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__
