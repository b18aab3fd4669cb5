"""Errors that a step can end with; each knows its exit code and what the user can do about it."""

from typing import ClassVar

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_DATA = 65
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
