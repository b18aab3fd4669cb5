"""
Runs the user's commands after a change of a champion: `hooks.after_promotion`, then `hooks.health`.

The state of each command is on the row of the change, so a daemon that dies in between runs it again: at least once. A
failed `after_promotion` is recorded and changes nothing else; a failed `health` rolls back to the former champion.
Nothing here blocks: each command has a thread of its own, and the main loop polls it. A track's command that hangs
(until its time limit) or fails concerns that track only, and so does an error in the track's files.
"""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import structlog
from sqlalchemy import Engine

from daemon.champions import decisions, promotion
from daemon.champions.handover.smoke_prompts import adapter_of, write_smoke_prompts
from daemon.champions.hooks.commands import Command, Ended, last_line
from daemon.champions.hooks.training import OPEN, UNTOLD, is_gpu_lent, whose_hooks
from daemon.champions.smoke_test import Stopped, require_answer
from daemon.settings.model import HookSettings, Settings
from daemon.state import run_files
from daemon.state.database import ChangeWatch, transaction
from daemon.state.events import Word, record_event
from daemon.state.states import HookState
from daemon.state.tables import Promotion, Track
from daemon.state.troubles import Troubles
from daemon.system.processes import child_environment
from pipeline.durable import read_object
from pipeline.errors import DropforgeError

Which = Literal["hook", "health"]
_TROUBLE_SECONDS = 30.0
log = structlog.get_logger()


class Hooks:
    """Runs the commands of all tracks, one at a time for each track."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        begin: Callable[..., Command] = Command,
        try_out: Callable[..., Any] = require_answer,
        troubles: Troubles | None = None,
    ) -> None:
        """Run the commands of `settings` by `begin`, at each `tick`; `try_out` loads the model to roll back to."""
        self._engine = engine
        self._settings = settings
        self._root, self._state = settings.work_folder, settings.state_folder
        self._begin = begin
        self._try_out = try_out
        self._troubles = Troubles() if troubles is None else troubles
        self._changes = ChangeWatch(engine)
        #: By track: the row and which of its commands.
        self._running: dict[str, tuple[int, Which, Command]] = {}
        self._rollbacks: dict[str, threading.Thread] = {}
        #: Whether there may be a next command, whatever has been written since.
        self._look = True
        self._stop = threading.Event()

    def tick(self, now: int) -> None:
        """
        Record the commands that have ended and start the next ones, without waiting; do nothing after `stop`.

        A failed `hooks.health` starts a rollback. Nothing starts while the GPU is lent to a run (`is_gpu_lent`).
        """
        if self._stop.is_set():
            return
        for track, thread in list(self._rollbacks.items()):
            if not thread.is_alive():
                del self._rollbacks[track]
                self._look = True
        for track, (row_id, which, running) in list(self._running.items()):
            ended = running.ended()
            if ended is not None:
                self._note(row_id, which, ended, now)
                del self._running[track]
        self._look = self._changes.changed() or self._look
        if not self._look or is_gpu_lent(self._state):
            return
        with transaction(self._engine) as session:
            waiting = session.exec(UNTOLD).all()
        # Start each of them, whether or not the previous one could be.
        well = [self._went_on(row, now) for row in waiting]
        self._look = not all(well)

    def stop(self) -> None:
        """Kill running commands, unrecorded, so that the next daemon runs them again; finish or break off rollbacks."""
        for _, _, running in self._running.values():
            running.kill()
        self._running.clear()
        self._stop.set()
        for thread in self._rollbacks.values():
            thread.join()

    def _went_on(self, row: Promotion, now: int) -> bool:
        """Start the next command of a change, if none of its track runs; return `False` if trouble prevents that."""
        whose = whose_hooks(row.track)
        if not self._troubles.is_pausing(whose):
            with self._troubles.alone(whose):
                # A second change of the track waits for the first one's command.
                if row.track not in self._running and row.track not in self._rollbacks:
                    self._next(row, now)
        return not self._troubles.is_pausing(whose)

    def _next(self, row: Promotion, now: int) -> None:
        """
        Start the next command of a change, or its rollback if the health command failed.

        A command that the settings do not have, or that is not needed any more, is recorded as such.
        """
        if row.health_state in OPEN and row.health_error is not None:
            if row.hook_state in OPEN:
                # A person asked for it while the health was asked for: nobody is told of an unhealthy model again.
                self._write(row.id, now, hook_state=HookState.SKIPPED)
            # Also where a daemon died between the answer and what follows from it. In a thread: the former champion's
            # files are hashed and it is loaded first.
            thread = threading.Thread(target=self._roll_back, args=(row, row.health_error, now), name="rollback")
            self._rollbacks[row.track] = thread
            thread.start()
            return
        if row.hook_state in OPEN and self._begins(row, "hook", now):
            return
        if row.health_state not in OPEN:
            return
        if _hooks_of(self._settings, row.track).health and not self._serves(row):
            self._write(row.id, now, health_state=HookState.SKIPPED)
        else:
            self._begins(row, "health", now)

    def _begins(self, row: Promotion, which: Which, now: int) -> bool:
        """Start a command and return `True`; record that the settings have none and return `False`."""
        hooks = _hooks_of(self._settings, row.track)
        argv = hooks.after_promotion if which == "hook" else hooks.health
        state, kind = (HookState.RUNNING, f"{which}_started") if argv else (None, None)
        self._write(row.id, now, kind, **{f"{which}_state": state})
        if argv:
            log.info("hook_started", track=row.track, generation=row.generation, command=_name(which))
            command = self._begin(argv, self._environment(row), hooks.timeout_seconds)
            self._running[row.track] = (row.id or 0, which, command)
        return bool(argv)

    def _note(self, row_id: int, which: Which, ended: Ended, now: int) -> None:
        """Record how a command ended; a failed health command keeps its state until `_roll_back` has acted."""
        values: dict[str, object] = {f"{which}_output": ended.output or None, f"{which}_error": ended.error}
        if ended.error is None or which == "hook":
            values[f"{which}_state"] = HookState.OK if ended.error is None else HookState.FAILED
        kind = f"{which}_{'succeeded' if ended.error is None else 'failed'}"
        row = self._write(row_id, now, kind, ended.error, **values)
        words = {"track": row.track, "generation": row.generation, "command": _name(which)}
        if ended.error is None:
            log.info("hook_ended", **words)
        else:
            line, hint = last_line(ended.output), f"dropforge history --track {row.track}"
            log.warning("hook_failed", **words, error=ended.error, said=line, hint=hint)

    def _roll_back(self, row: Promotion, error: str, now: int) -> None:
        """Roll back if the model still serves; record the result or a refusal; after other errors it is tried again."""
        try:
            refused = self._change_back(row, error, now)
            kind = None if refused is None else "rollback_failed"
            self._write(row.id, now, kind, refused, health_state=HookState.FAILED, health_error=refused or error)
        except Stopped:
            return
        except Exception:  # a full disk or a locked database passes
            log.exception("rollback_trouble", track=row.track)
            self._stop.wait(_TROUBLE_SECONDS)

    def _change_back(self, row: Promotion, error: str, now: int) -> str | None:
        """Roll back if the unhealthy model still serves; return the error if that was refused, else `None`."""
        if not self._serves(row):
            return None
        reason = f"health command failed: {error}"
        try:
            back, try_out = Word(reason, now), partial(self._try_out, stop=self._stop)
            decisions.rollback(self._engine, self._root, row.track, back, over=row.generation, try_out=try_out)
        except promotion.ChampionMoved:
            return None  # somebody was quicker, and chose
        except DropforgeError as problem:
            log.warning("rollback_refused", track=row.track, error=problem.message, hint=problem.hint)
            return f"{error}; not rolled back: {problem.message}"
        log.warning("rolled_back", track=row.track, generation=row.generation, reason=reason)
        return None

    def _write(
        self, row_id: int | None, now: int, kind: str | None = None, error: str | None = None, **values: object
    ) -> Promotion:
        """Change columns of a row, with an event of this `kind` if it is given; return the row."""
        with transaction(self._engine) as session:
            row = session.get_one(Promotion, row_id)
            session.add(row.sqlmodel_update(values))
            if kind is not None:
                record_event(session, kind, now, track=row.track, run_id=row.run_id, error=error)
        return row

    def _serves(self, row: Promotion) -> bool:
        with transaction(self._engine) as session:
            return session.get_one(Track, row.track).champion_generation == row.generation

    def _environment(self, row: Promotion) -> dict[str, str]:
        """Return the environment of a command: that of the daemon and PROMOTION_*. Writes the smoke prompts."""
        run = row.run_id
        # A damaged verdict must not keep the server from being told.
        decided = {} if run is None else read_object(run_files.run_folder(self._root, run) / "decide.json")
        place = decided.get("report")
        adapter = None if run is None else adapter_of(self._root, run, row.model_id)
        asked = write_smoke_prompts(self._root, row.track, row.model_id, run)
        return child_environment(
            {
                "PROMOTION_TRACK": row.track,
                "PROMOTION_KIND": row.kind,
                "PROMOTION_GENERATION": str(row.generation),
                "PROMOTION_MODEL_ID": row.model_id,
                "PROMOTION_MODEL_PATH": _absolute(self._root, row.model_path),
                "PROMOTION_PREVIOUS_PATH": _absolute(self._root, row.previous_path or ""),
                "PROMOTION_RUN": "" if run is None else str(run),
                "PROMOTION_REPORT": _absolute(self._root, place if isinstance(place, str) else ""),
                "PROMOTION_ADAPTER": _absolute(self._root, adapter or ""),
                "PROMOTION_SMOKE_PROMPTS": _absolute(self._root, asked or ""),
            }
        )


def ask_again(engine: Engine, settings: Settings, track: str, now: int, by: str) -> Promotion:
    """
    Mark `hooks.after_promotion` as pending again for the track's champion, for the daemon to run; return its row.

    Its former result is deleted, and an event with the user `by` recorded. Raises `DropforgeError` if the settings name
    no command, if it is pending or running already, or if the track has no champion.
    """
    if not _hooks_of(settings, track).after_promotion:
        message = f"track {track} has no command to run after a change of champion"
        raise DropforgeError(message, "set hooks.after_promotion in dropforge.toml")
    with transaction(engine) as session:
        generation = promotion.champion(session, track).generation
        row = promotion.champions_of(session, track)[-1]
        if row.hook_state in OPEN:
            message = f"hooks.after_promotion of track {track} is {row.hook_state} already"
            raise DropforgeError(message, "see what comes of it: dropforge status; the daemon runs it: dropforge run")
        row.hook_state, row.hook_error, row.hook_output = HookState.PENDING, None, None
        session.add(row)
        record_event(session, "hook_asked_again", now, track=track, run_id=row.run_id, generation=generation, by=by)
    return row


def _hooks_of(settings: Settings, track: str) -> HookSettings:
    """Return a track's hooks; those of the top level if the track is no longer declared."""
    return (settings.track(track) if track in settings.track_names else settings).hooks


def _name(which: Which) -> str:
    return "hooks.after_promotion" if which == "hook" else "hooks.health"


def _absolute(root: Path, path: str) -> str:
    return str((root / path).absolute()) if path else ""
