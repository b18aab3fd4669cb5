"""Check a model's files before its track is switched to it."""

from collections.abc import Callable
from pathlib import Path

from pipeline.errors import DropforgeError
from pipeline.models.manifest import model_id, verify_manifest

TryOut = Callable[[Path], object]


def later(now: int, seconds: float) -> int:
    """Return the time, in ms, after a look at a model: a large one takes minutes, and the history says who served."""
    return now + 1000 * int(seconds)


def require_there(folder: Path, what: str, track: str) -> None:
    """Raise `DropforgeError` if the folder of a model, named by `what`, is not there any more."""
    if not folder.is_dir():
        raise DropforgeError(f"{what} is not there any more: {folder}", other_ways(track))


def check_files(state_folder: Path, path: str, identity: str, what: str, track: str) -> None:
    """Compare the files of the model at `path`, as rows name it, with their hashes. Raises `DropforgeError`."""
    folder = state_folder / path
    require_there(folder, what, track)
    try:
        # A base model is the user's own folder, without a manifest of ours.
        found = model_id(folder) if Path(path).is_absolute() else verify_manifest(folder)
    except DropforgeError as error:
        raise DropforgeError(f"{what} is not what it was: {error.message}", other_ways(track)) from error
    if found != identity:
        raise DropforgeError(f"{what} is not what it was: {folder} holds another model", other_ways(track))


def other_ways(track: str) -> str:
    """Return what a person can do where a model's files are not what they were."""
    return f"take another one: dropforge history --track {track}; or bring the folder back from a backup"
