"""A disk that is full, or a process that dies, at the n-th call that changes something durable."""

import errno
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from sqlalchemy import Engine, event
from sqlalchemy.exc import OperationalError

_CALLS = ("fsync", "rename", "symlink", "link")


class Death(BaseException):
    """The daemon is gone: nothing may catch this and tidy up."""


@contextmanager
def trouble(kind: str | None, after: int) -> Iterator[list[str]]:
    """
    Let the call after `after` harmless ones (fsync, rename, symlink, link, commit) end in trouble of a kind.

    `full` fails as a full disk does, from then on for as long as the block lasts; `death` ends the process. Yields what
    was hit, which is empty until then.
    """
    hit: list[str] = []
    left = after

    def meet(name: str) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            return
        hit.append(name)
        if kind == "death":
            raise Death(name)
        if name == "commit":
            raise OperationalError("COMMIT", {}, sqlite3.OperationalError("database or disk is full"))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            meet(name)
            return real(*arguments, **options)

        return call

    def commit(_connection: object) -> None:
        meet("commit")

    if kind is None:
        yield hit
        return
    with ExitStack() as stack:
        for name in _CALLS:
            stack.enter_context(patch.object(os, name, watched(name, getattr(os, name))))
        event.listen(Engine, "commit", commit)
        stack.callback(event.remove, Engine, "commit", commit)
        yield hit
