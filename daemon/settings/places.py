"""Folders in settings: made absolute, and the inbox held apart from everything that the daemon must not take in."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from daemon.settings.model import Settings

#: A folder that exists is its device and inode; one that does not, the nearest above it that does, and the rest.
_Key = tuple[int, int, tuple[str, ...]]


def check_place(value: str) -> str:
    """Return a path as settings have it. Raises `ValueError` if it can be none, or begins at an unknown home folder."""
    if "\0" in value:
        raise ValueError("must not hold a NUL character")
    try:
        Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(f"there is no home folder {value.partition('/')[0]}: write the whole path") from error
    return value


def absolute_paths(settings: "Settings", folder: Path) -> dict[str, Any]:
    """Return the fields of `settings` that hold paths, made absolute; `folder` is that of the settings file."""

    def absolute(value: str) -> str:
        return str(Path(os.path.abspath(folder / os.path.expanduser(value)))) if value else ""  # noqa: PTH100, PTH111 - links stay, and an unknown home is refused elsewhere

    def suite(name: str) -> str:
        """Make a suite's own file absolute; a task of lm-eval may be a file, too."""
        engine, task = ("lm-eval:", name.removeprefix("lm-eval:")) if name.startswith("lm-eval:") else ("", name)
        own = task not in {"builtin", "questions"} and (not engine or "/" in task or task.endswith((".yaml", ".yml")))
        return engine + (absolute(task) if own else task)

    def track(values: Mapping[str, Any]) -> dict[str, Any]:
        found = dict(values)
        if "base_model" in values:
            found["base_model"] = absolute(values["base_model"])
        evaluate = values.get("evaluate")
        names = evaluate.get("general") if isinstance(evaluate, Mapping) else None
        if isinstance(names, list) and isinstance(evaluate, Mapping):
            found["evaluate"] = {**evaluate, "general": [suite(str(name)) for name in names]}
        return found

    paths: dict[str, Any] = {name: absolute(getattr(settings, name)) for name in ("inbox", "state", "base_model")}
    general = tuple(map(suite, settings.evaluate.general))
    evaluate = settings.evaluate.model_copy(update={"general": general})
    return {**paths, "evaluate": evaluate, "tracks": {name: track(values) for name, values in settings.tracks.items()}}


def overlap(settings: "Settings", file: Path) -> str | None:
    """
    Return what the inbox is, lies in or lies around that it must not, as "/x lies in the state folder /y"; else `None`.

    Folders are compared by device and inode, so that no link and no bind mount hides one; `settings` has absolute
    paths, `file` is where they were read.
    """
    inbox = settings.inbox_folder
    own, mine = _key(inbox), set(_keys(inbox))
    for what, other, may_lie_in in _others(settings, file):
        if own == _key(other):
            return f"{inbox} is {what} {other}"
        if _key(other) in mine and not may_lie_in:
            return f"{inbox} lies in {what} {other}"
        if own in _keys(other):
            return f"{inbox} lies around {what} {other}"
    return None


def _others(settings: "Settings", file: Path) -> Iterable[tuple[str, Path, bool]]:
    """Yield what the inbox is held apart from: what it is, where, and whether the inbox may lie in it."""
    yield "the folder of the settings file", file.absolute().parent, True
    with contextlib.suppress(RuntimeError):
        yield "the home folder", Path.home(), True
    yield "the state folder", settings.state_folder, False
    bases = {settings.track(name).base_model for name in settings.track_names} - {""}
    yield from (("the base model", Path(base), False) for base in sorted(bases))


def _keys(path: Path) -> Iterator[_Key]:
    """Yield a folder's key, then those of all folders above it."""
    real = Path(os.path.realpath(path))
    return map(_key, (real, *real.parents))


def _key(path: Path) -> _Key:
    real = Path(os.path.realpath(path))
    for place in (real, *real.parents):
        with contextlib.suppress(OSError):
            found = place.stat()
            return found.st_dev, found.st_ino, real.relative_to(place).parts
    return 0, 0, real.parts
