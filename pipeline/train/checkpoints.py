"""
Write and find checkpoints: written in the scratch folder, hashed, made durable, and renamed last.

A checkpoint is a folder `step-<N>-<attempt>` with the trainer's files and `files.json`: the fingerprint of the training
that it belongs to, size and sha256 of each file. It is complete if that is there, and newer with a higher step, then
attempt. An attempt resumes from those of all attempts, but removes none of a later one: on a cluster a process may go
on that was given up.
"""

import re
import shutil
import sys
from pathlib import Path

from pipeline import durable
from pipeline.models.manifest import difference, file_entries

LISTING = "files.json"
KEPT = 2
_NAME = re.compile("step-([0-9]+)-([0-9]+)")
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


def publish(source: Path, folder: Path, step: int, mark: str, attempt: int) -> Path:
    """
    Move the trainer's checkpoint `source` to `folder`/step-`step`-`attempt`, durably; return its new path.

    `source` must be on the same file system, `folder` need not exist; `mark` is the training's fingerprint. An existing
    target is replaced. Of the checkpoints of this attempt and earlier ones, all but the newest `KEPT` of this training
    up to `step` are removed; those of later attempts stay.
    """
    target = folder / f"step-{step}-{attempt}"
    folder.mkdir(parents=True, exist_ok=True)
    durable.write_json(source / LISTING, {"fingerprint": mark, "files": file_entries(source)})
    _remove(target)
    durable.publish_folder(source, target)
    # A training resumes from its newest valid checkpoint: one of a later step is torn, damaged or another training's.
    removable = [path for path in _by_step(folder) if _step_and_attempt(path)[1] <= attempt]
    valid = [path for path in removable if step_of(path) <= step and not _problem(path, mark, by_files=False)]
    for path in removable:
        if path not in valid[:KEPT]:
            _remove(path)
    return target


def newest_valid(folder: Path, mark: str) -> Path | None:
    """
    Return the newest complete, undamaged checkpoint with the fingerprint `mark`; `None` if there is none.

    Incomplete and damaged checkpoints and those of other trainings are skipped. The choice and the reasons are written
    to stderr.
    """
    checkpoints = _by_step(folder)
    for path in checkpoints:
        problem = _problem(path, mark, by_files=True)
        if not problem:
            sys.stderr.write(f"training resumes from checkpoint {path.name}\n")
            return path
        sys.stderr.write(f"checkpoint {path.name} is skipped: {problem}\n")
    if checkpoints:
        sys.stderr.write("training starts again at step 0: no checkpoint can be used\n")
    return None


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step at which a checkpoint was taken, by its folder's name (step-20-1: 20)."""
    return _step_and_attempt(checkpoint)[0]


def _by_step(folder: Path) -> list[Path]:
    """Return the checkpoint folders in `folder`, newest first; none if it does not exist."""
    if not folder.is_dir():
        return []
    named = (path for path in folder.iterdir() if _NAME.fullmatch(path.name))
    return sorted(named, key=_step_and_attempt, reverse=True)


def _step_and_attempt(checkpoint: Path) -> tuple[int, int]:
    step, attempt = checkpoint.name.split("-")[1:]
    return int(step), int(attempt)


def _problem(path: Path, mark: str, *, by_files: bool) -> str:
    """Return why a checkpoint cannot be used for the training `mark`, else ""; with `by_files` its files are hashed."""
    try:
        listing = durable.read_json(path / LISTING)
        if listing is None:
            return f"it has no {LISTING}: removing it was interrupted"
        if listing["fingerprint"] != mark:
            return "it belongs to another training (other data, settings or base model)"
        for name, entry in listing["files"].items() if by_files else ():
            if problem := difference(path / name, entry):
                return f"{name} {problem}"
    except _UNREADABLE as error:
        return f"it cannot be read ({error})"
    return ""


def _remove(path: Path) -> None:
    """Remove a checkpoint, if it exists, its listing first: an interrupted removal leaves an incomplete checkpoint."""
    if path.exists():
        (path / LISTING).unlink(missing_ok=True)
        durable.fsync_folder(path)
        shutil.rmtree(path)
