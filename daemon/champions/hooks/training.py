"""
Runs the user's commands before and after steps that need the GPU: `hooks.before_training`, `hooks.after_training`.

A note in the state folder is written before the first command starts and removed once the second one succeeded. So
however the run or this process ends in between, the daemon that finds the note runs `hooks.after_training`: at least
once. While the note exists the commands after a change of champion wait, since the server that they notify has no GPU.
Nothing here blocks but `finish`.
"""

from collections.abc import Callable
from pathlib import Path

import structlog
from sqlalchemy import Engine
from sqlmodel import col, or_, select

from daemon.champions.hooks.commands import Command, Ended, last_line
from daemon.settings.model import Settings
from daemon.state.database import transaction
from daemon.state.layout import GPU_NOTE
from daemon.state.states import HookState
from daemon.state.tables import Promotion, Run
from daemon.state.troubles import Troubles
from daemon.system.processes import child_environment
from pipeline import durable
from pipeline.errors import DropforgeError

_BEFORE, _AFTER = "hooks.before_training", "hooks.after_training"
OPEN = (HookState.PENDING, HookState.RUNNING)
#: The changes of champion that have a pending or running command.
UNTOLD = (
    select(Promotion)
    .where(or_(col(Promotion.hook_state).in_(OPEN), col(Promotion.health_state).in_(OPEN)))
    .order_by(col(Promotion.generation), col(Promotion.id))
)
log = structlog.get_logger()


class TrainingHooks:
    """Takes the GPU from a server for runs and gives it back, by one of the two commands at a time."""

    def __init__(self, engine: Engine, settings: Settings, troubles: Troubles) -> None:
        """Run the commands in `settings` when `free` and `tick` require it; their errors are noted in `troubles`."""
        self._engine = engine
        self._hooks = settings.hooks
        self._note = settings.state_folder / GPU_NOTE
        self._troubles = troubles
        self._running: tuple[str, Command] | None = None
        self._is_free = False

    def free(self, run: Run) -> bool:
        """
        Return whether the GPU is free for a step of `run`; if not, start `hooks.before_training`: call again later.

        Always true if neither command is set. A note in the state folder records that the GPU was taken. The command is
        not started before the commands after a change of champion have run. Raises `DropforgeError` if it failed; the
        next call starts it again.
        """
        if not (self._hooks.before_training or self._hooks.after_training) or self._is_free:
            return True
        if self._running is not None:
            which, running = self._running
            ended = running.ended()
            if which != _BEFORE or ended is None:
                return False
            self._running = None
            if ended.error is not None:
                error = self._failure(_BEFORE, ended)
                self._troubles.note(_BEFORE, error)
                raise error
            self._troubles.clear(_BEFORE)
            log.info("gpu_freed")
            self._is_free = True
            return True
        # The server that is to take a new champion must have its GPU for that.
        if not self._note.exists() and self._is_server_to_be_told():
            return False
        durable.write_json(self._note, {"run": run.id, "track": run.track})
        if not self._hooks.before_training:
            self._is_free = True
            return True
        self._start(_BEFORE, self._hooks.before_training)
        return False

    def keeps_server_waiting(self) -> bool:
        """Return whether the GPU is taken and a command after a change of champion waits for it."""
        return self._note.exists() and self._is_server_to_be_told()

    def tick(self, is_wanted: Callable[[], bool]) -> None:
        """
        Start `hooks.after_training` if the GPU was taken, by this or an earlier process, and `is_wanted()` is false.

        Once it has succeeded, or if there is no such command, the GPU counts as given back. A failure is noted in
        `troubles`, not raised, and the command is started again after a pause.
        """
        if self._running is not None:
            which, running = self._running
            ended = running.ended()
            if ended is None or (which == _BEFORE and is_wanted()):
                return  # `free` takes the result of the command
            self._running = None
            if which == _AFTER:
                self._note_given_back(ended)
        if self._note.exists() and not is_wanted() and not self._troubles.is_pausing(_AFTER):
            self._give_back()

    def finish(self, is_wanted: Callable[[], bool]) -> None:
        """At shutdown, kill `hooks.before_training` and, unless `is_wanted()`, give a taken GPU back; wait for that."""
        if self._running is not None and self._running[0] == _BEFORE:
            self._running[1].kill()
            self._running = None
        if self._running is None and self._note.exists() and not is_wanted():
            self._give_back()
        if self._running is not None:
            self._note_given_back(self._running[1].wait())
            self._running = None

    def _give_back(self) -> None:
        self._is_free = False
        if self._hooks.after_training:
            self._start(_AFTER, self._hooks.after_training)
        else:
            self._note_given_back(Ended(None, ""))

    def _note_given_back(self, ended: Ended) -> None:
        if ended.error is not None:
            self._troubles.note(_AFTER, self._failure(_AFTER, ended))
            return
        self._troubles.clear(_AFTER)
        self._note.unlink(missing_ok=True)
        durable.fsync_folder(self._note.parent)
        log.info("gpu_given_back")

    def _start(self, which: str, argv: tuple[str, ...]) -> None:
        noted = durable.read_object(self._note)
        variables = {f"TRAINING_{name.upper()}": str(noted.get(name, "")) for name in ("run", "track")}
        log.info("hook_started", command=which, **noted)
        self._running = which, Command(argv, child_environment(variables), self._hooks.timeout_seconds)

    def _failure(self, which: str, ended: Ended) -> DropforgeError:
        line = last_line(ended.output)
        message = f"{which} failed: {ended.error}{f': {line}' if line else ''}"
        return DropforgeError(message, "mend the command or what it acts on: it is run again by itself")

    def _is_server_to_be_told(self) -> bool:
        """Return whether a command after a change of champion is pending or running on a track without trouble."""
        with transaction(self._engine) as session:
            # What one track has in its way must not keep the others from training; its server is told afterwards.
            return any(whose_hooks(row.track) not in self._troubles.words for row in session.exec(UNTOLD))


def whose_hooks(track: str) -> str:
    """Return the key in `Troubles` for a track's commands after a change of champion."""
    return f"hooks of track {track}"


def is_gpu_lent(state_folder: Path) -> bool:
    """Return whether the GPU was taken for a run, by this daemon or an earlier one, and not given back yet."""
    return (state_folder / GPU_NOTE).exists()
