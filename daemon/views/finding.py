"""A finding of `dropforge doctor`: the result of one check."""

from typing import Literal

from pipeline.artifacts import Frozen


class Finding(Frozen):
    """The result of one check."""

    name: str
    level: Literal["ok", "warn", "bad"]
    text: str
    remedy: str = ""


def ok(name: str, text: str) -> Finding:
    """Return the finding that there is no problem."""
    return Finding(name=name, level="ok", text=text)


def warn(name: str, text: str, remedy: str) -> Finding:
    """Return the finding of a possible problem."""
    return Finding(name=name, level="warn", text=text, remedy=remedy)


def bad(name: str, text: str, remedy: str) -> Finding:
    """Return the finding of a problem with which runs fail."""
    return Finding(name=name, level="bad", text=text, remedy=remedy)
