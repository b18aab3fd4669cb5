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


class Trouble:
    """
    What happens to the call after `left` harmless ones (fsync, rename, symlink, link, commit).

    `full` fails as a full disk does, from then on for as long as it is `around`; `death` ends the process. `hit` names
    the calls that met with it.
    """

    def __init__(self, kind: str, left: int) -> None:
        """Order it."""
        self._kind = kind
        self._left = left
        self.hit: list[str] = []

    @contextmanager
    def around(self) -> Iterator[None]:
        """Let the calls of the block count."""
        with ExitStack() as stack:
            for name in _CALLS:
                stack.enter_context(patch.object(os, name, self._watched(name, getattr(os, name))))
            event.listen(Engine, "commit", self._commit)
            stack.callback(event.remove, Engine, "commit", self._commit)
            yield

    def _commit(self, _connection: object) -> None:
        self._meet("commit")

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self._meet(name)
            return real(*arguments, **options)

        return call

    def _meet(self, name: str) -> None:
        self._left -= 1
        if self._left >= 0:
            return
        self.hit.append(name)
        if self._kind == "death":
            raise Death(name)
        if name == "commit":
            raise OperationalError("COMMIT", {}, sqlite3.OperationalError("database or disk is full"))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
