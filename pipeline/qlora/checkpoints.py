"""
Checkpoints that can be trusted: written aside, hashed, renamed in, and marked complete last.

A checkpoint is a folder `step-<N>` with the trainer's files, `files.json` (size and sha256 of each) and `COMPLETE`,
which holds the hash of `files.json` and the fingerprint of the training that it belongs to.
"""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import durable
from pipeline.contract import Attempt

if TYPE_CHECKING:
    from transformers import TrainerCallback

COMPLETE = "COMPLETE"
LISTING = "files.json"
KEPT = 2
_PREFIX = "step-"


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Return the sha256 that stands for everything a training depends on, given as JSON values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def publish(source: Path, folder: Path, step: int, mark: str) -> Path:
    """
    Move the trainer's checkpoint `source` to `folder`/step-`step`, durably; return its new place.

    `source` must be on the same file system, `mark` is the training's fingerprint. The newest `KEPT` of this training
    are left; torn and foreign ones are removed, since by their number they would push this one out.
    """
    target = folder / f"{_PREFIX}{step}"
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(path for path in source.rglob("*") if path.is_file())
    listing = {
        path.relative_to(source).as_posix(): {"size": path.stat().st_size, "sha256": durable.sha256_file(path)}
        for path in files
    }
    durable.write_json(source / LISTING, listing)
    durable.fsync_tree(source)
    _remove(target)
    source.rename(target)
    durable.fsync_folder(folder)
    complete = {"files_sha256": durable.sha256_file(target / LISTING), "fingerprint": mark}
    durable.write_json(target / COMPLETE, complete)
    found = _by_step(folder)
    kept = [path for path in found if _mark(path) == mark][:KEPT]
    for old in found:
        if old not in kept:
            _remove(old)
    return target


def newest_valid(folder: Path, mark: str) -> Path | None:
    """
    Return the newest checkpoint that is whole and belongs to this training, or `None`.

    Torn, damaged and foreign ones are passed over, with a line on stderr saying why.
    """
    for path in _by_step(folder):
        problem = _problem(path, mark)
        if not problem:
            return path
        sys.stderr.write(f"checkpoint {path.name} is passed over: {problem}\n")
    return None


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step at which a checkpoint was taken."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def keeper(attempt: Attempt, scratch: Path, mark: str) -> "TrainerCallback":
    """
    Return the trainer's callback that checkpoints every `checkpoint_minutes`, and when the attempt is asked to stop.

    It ends the training at the next optimizer step once `attempt.stop` is set.
    """
    from transformers import TrainerCallback

    folder = attempt.path(attempt.spec.checkpoints)
    seconds = attempt.config.train.checkpoint_minutes * 60

    class Keeper(TrainerCallback):
        """Decides when to save, and takes the saved folder out of the trainer's hands."""

        def __init__(self) -> None:
            self.saved_at = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= state.max_steps:
                return
            stopping = attempt.stop.is_set()
            control.should_training_stop = control.should_training_stop or stopping
            control.should_save = stopping or time.monotonic() - self.saved_at >= seconds

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            publish(scratch / f"checkpoint-{state.global_step}", folder, state.global_step, mark)
            self.saved_at = time.monotonic()

    return Keeper()


def _by_step(folder: Path) -> list[Path]:
    """Return the checkpoint folders, the newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def _mark(path: Path) -> str | None:
    """Return the fingerprint of a checkpoint whose writing was not cut off; its files are not looked at."""
    try:
        complete = durable.read_json(path / COMPLETE)
    except (OSError, ValueError):
        return None
    return complete.get("fingerprint") if isinstance(complete, dict) else None


def _problem(path: Path, mark: str) -> str:
    """Say why a checkpoint cannot be resumed from; empty if it can."""
    try:
        complete = durable.read_json(path / COMPLETE)
        if complete is None:
            return f"it has no {COMPLETE}, so writing it was cut off"
        if complete["fingerprint"] != mark:
            return "it belongs to another training (other data, settings or base model)"
        if complete["files_sha256"] != durable.sha256_file(path / LISTING):
            return f"{LISTING} has changed"
        listing = durable.read_json(path / LISTING)
        damaged = (name for name, entry in listing.items() if not _is_as_listed(path / name, entry))
        name = next(damaged, "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({error})"
    return f"{name} is missing, cut off or changed" if name else ""


def _is_as_listed(file: Path, entry: Mapping[str, Any]) -> bool:
    same_size = file.is_file() and file.stat().st_size == entry["size"]
    return same_size and durable.sha256_file(file) == entry["sha256"]


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a half-removed one is never taken for a whole one."""
    if path.exists():
        (path / COMPLETE).unlink(missing_ok=True)
        durable.fsync_folder(path)
        shutil.rmtree(path)
