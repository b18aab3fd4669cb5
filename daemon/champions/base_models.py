"""Base models: generation 0 of each track's champions. Hashed once, then recognised by file size and change time."""

import contextlib
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import structlog
from sqlalchemy import Engine

from daemon.champions.promotion import change_champion, change_to, sync_link
from daemon.queue.states import ensure_track
from daemon.settings.model import Settings
from daemon.state.database import transaction
from daemon.state.events import Word, record_event
from daemon.state.states import PromotionKind
from daemon.state.troubles import concerns_all, in_words
from daemon.system.folders import WorkFolder
from daemon.system.sd_notify import showing_life
from pipeline import durable
from pipeline.artifacts import ModelRef
from pipeline.durable import read_object
from pipeline.errors import CannotTrain, DropforgeError
from pipeline.models.manifest import check_base, model_files, model_id

_NOTE = "base.json"
_MOST_ENTRIES = 10_000
log = structlog.get_logger()


class Bases:
    """Checks the base model of every declared track, and makes it the champion of a track that has none."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        """Prepare for the tracks of `settings` and remove files of interrupted writes; `refresh` checks models."""
        self._engine = engine
        self._settings = settings
        self._seen: dict[str, object] = {}
        self._problems: dict[str, DropforgeError] = {}
        for name in settings.track_names:
            # A file that cannot be removed does no harm; `refresh` checks whether the folder can be used.
            with contextlib.suppress(OSError):
                durable.remove_leftovers(settings.work_folder / "tracks" / name)

    def refresh(self, now: int) -> None:
        """
        Check every track's base model and apply `ensure_base`; keep the error of an unusable model for `problem`.

        A model is hashed again only if its files have changed. Only errors that concern all tracks are raised.
        """
        for name in self._settings.track_names:
            looked_at = None
            try:
                folder = self._folder(name)
                looked_at = _entries(folder)
                if self._seen.get(name) != looked_at:
                    self._refresh_track(name, folder, now)
                    self._problems.pop(name, None)
            except Exception as error:  # one track's row must not stop every other track
                if concerns_all(error):
                    raise
                # An error in the files lasts until one of them changes.
                looked_at = looked_at if isinstance(error, CannotTrain) else None
                self._problems[name] = error if isinstance(error, DropforgeError) else _unreadable(name, error)
            self._seen[name] = looked_at

    def problem(self, name: str) -> DropforgeError | None:
        """Return the error that `refresh` found in the base model of track `name`; `None` if it found none."""
        return self._problems.get(name)

    def _folder(self, name: str) -> Path:
        text = self._settings.track(name).base_model
        if not text:
            hint = "set base_model in dropforge.toml to a model folder, then restart the daemon"
            raise DropforgeError(f"track {name} has no base model", hint)
        return Path(text)

    def _refresh_track(self, name: str, folder: Path, now: int) -> None:
        check_base(folder, self._settings.track(name).train.format)
        files = [(path.name, path.stat()) for path in model_files(folder)]
        signature = [str(folder), [[file, info.st_size, info.st_ctime_ns] for file, info in files]]
        note = self._settings.work_folder / "tracks" / name / _NOTE
        # A damaged note is none: the model is hashed again.
        known = read_object(note)
        identity = known.get("model_id")
        if known.get("signature") != signature or not isinstance(identity, str):
            log.info("base_model_hashing", track=name, folder=str(folder))
            identity = showing_life(model_id, folder)
            note.parent.mkdir(parents=True, exist_ok=True)
            durable.write_json(note, {"signature": signature, "model_id": identity})
        ensure_base(self._engine, self._settings.work_folder, name, Base(folder, identity), now)


def is_away(folder: Path) -> bool:
    """Return whether a base model's folder has no config.json that can be reached, as where its disk is unmounted."""
    try:
        return not (folder / "config.json").exists()
    except OSError:
        return True


def require_base(folder: Path, run_id: int) -> None:
    """Raise `DropforgeError` if the base model in `folder`, of a run that has begun, is away."""
    if is_away(folder):
        message = f"the base model {folder} is away: it has no config.json"
        hint = f"mount its disk, and the run goes on by itself; or end the run: dropforge cancel {run_id}"
        raise DropforgeError(message, hint)


def _unreadable(track: str, error: Exception) -> DropforgeError:
    if not isinstance(error, OSError):
        hint = "put a backup in its place: dropforge restore BACKUP"
        return DropforgeError(f"the row of track {track} cannot be used: {in_words(error)}", hint)
    message = f"the base model cannot be read: {error.filename or 'its folder'}: {error.strerror or error}"
    return DropforgeError(message, "let the user that the daemon runs as read the folder and every file in it")


def _entries(folder: Path) -> list[tuple[Path, int]]:
    """Return paths and ctimes (ns), which permissions change, too, of the folder and at most 10,000 files, sorted."""
    folders = [path for path in (folder, folder / "additional_chat_templates") if path.is_dir()]
    paths = sorted(islice((path for each in folders for path in chain((each,), each.iterdir())), _MOST_ENTRIES))
    return [(path, path.stat().st_ctime_ns if path.exists() else 0) for path in paths]


@dataclass(frozen=True)
class Base:
    """A base model: its folder and its model id."""

    folder: Path
    model_id: str


def ensure_base(engine: Engine, work_folder: WorkFolder, track_name: str, base: Base, now: int) -> None:
    """
    Make `base` the champion, generation 0, of a track that has none; update the track's base model and links.

    A missing track is created. If the track had another base model, a trained champion stays; a champion that is the
    former base model is replaced by `base` as the next generation, which ends pending approvals and has
    `hooks.after_promotion` run. If the same model only moved to another folder, row and links follow.
    """
    with transaction(engine) as session:
        track = ensure_track(session, track_name, now)
        path, identity, generation = str(base.folder.absolute()), base.model_id, track.champion_generation
        known = (track.base_path, track.base_model_id)
        track.base_path, track.base_model_id = path, identity
        if known != (path, identity):
            kind = "base_set" if generation is None else "base_changed"
            record_event(session, kind, now, track=track_name, model_id=identity, path=path)
        if generation is None or track.champion_model_id == known[1] != identity:
            model = ModelRef(model_id=identity, path=path, generation=0 if generation is None else generation + 1)
            change_champion(session, change_to(model, PromotionKind.BASE, track_name, None, Word("", now)))
        elif track.champion_model_id == identity:
            track.champion_path = path
        session.add(track)
        sync_link(session, work_folder, track_name)
