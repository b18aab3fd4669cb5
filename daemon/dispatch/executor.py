"""Where steps run: one contract for the own machine and, later, for a cluster."""

from enum import StrEnum
from typing import Protocol

from pipeline.contract import StepSpec


class JobState(StrEnum):
    """What an executor knows of one attempt."""

    #: It was taken and has not begun.
    QUEUED = "queued"
    #: Its process runs, or is winding down.
    RUNNING = "running"
    #: Its result.json is there: the truth.
    ENDED = "ended"
    #: Nobody knows it and it left no result.
    LOST = "lost"


class Executor(Protocol):
    """Runs attempts. The truth is their result.json; what an executor says is a hint when to look."""

    def submit(self, spec: StepSpec) -> None:
        """Order an attempt; ordering the same key again changes nothing."""

    def poll(self, spec: StepSpec) -> JobState:
        """Say how far an attempt is."""

    def cancel(self, key: str) -> None:
        """Ask the attempt of this key to stop; it leaves a checkpoint if it can. Asking twice changes nothing."""
