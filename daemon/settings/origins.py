"""The source of each setting's value: file, environment variable, preset or default."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from daemon.settings.load import from_environment, load, section_of
from daemon.settings.model import ENV_PREFIX, FILE_NAME, Settings
from daemon.settings.text import read_toml
from pipeline.artifacts import Frozen
from pipeline.config import PRESETS


class Origin(Frozen):
    """A setting's value and where it comes from."""

    name: str
    """With its sections, as `train.epochs`; a track's own as `tracks.NAME.train.epochs`."""
    value: Any
    source: Literal["default", "file", "environment", "preset"]
    where: str
    """The file's path, the variable, or the preset; empty for a default."""


def origins(path: Path | None, environment: Mapping[str, str]) -> list[Origin]:
    """
    Return every setting in the order of the sample file, then what the tracks have of their own.

    `path` and `environment` are those of `load`; raises what it raises. Secrets are shown as they show themselves.
    """
    settings = load(path, environment)
    file = path or Path(environment.get("DROPFORGE_CONFIG") or FILE_NAME)
    known = _Known(file, environment)
    top = [known.origin(name, value, settings) for name, value in _leaves(settings, ())]
    own = dict(flat({"tracks": settings.tracks}))
    return [*top, *(known.origin(name, value, settings) for name, value in own.items())]


class _Known:
    """The settings in file and environment, by path."""

    def __init__(self, file: Path, environment: Mapping[str, str]) -> None:
        self._file = file
        self._in_file = dict(flat(read_toml(file))) if file.exists() else {}
        self._values = dict(flat(from_environment(environment)))
        named = (name for name in environment if name.startswith(ENV_PREFIX))
        #: Each variable, by the setting or the section that it sets.
        self._variables = {tuple(name.removeprefix(ENV_PREFIX).lower().split("__")): name for name in named}

    def origin(self, name: tuple[str, ...], value: Any, settings: Settings) -> Origin:
        source: Literal["default", "file", "environment", "preset"] = "default"
        where = ""
        if _set_by(name, self._values) is not None:
            source, where = "environment", self._variables[_set_by(name, self._variables) or name]
        elif _set_by(name, self._in_file) is not None:
            source, where = "file", str(self._file)
        elif name[0] == "train" and name[1] in PRESETS[settings.train.preset]:
            source, where = "preset", f"train.preset = {settings.train.preset}"
        return Origin(name=".".join(name), value=value, source=source, where=where)


def _set_by(name: tuple[str, ...], found: Mapping[tuple[str, ...], Any]) -> tuple[str, ...] | None:
    """Return the longest beginning of a name that is set, as a section may be as a whole, or a part of its value."""
    whole = (name[:end] for end in range(len(name), 0, -1) if name[:end] in found)
    parts = (one for one in found if one[: len(name)] == name)
    return next(whole, None) or next(parts, None)


def _leaves(model: BaseModel, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each setting of the top level, with the names that lead to it and its value as JSON has it."""
    plain = model.model_dump(mode="json")
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if name == "tracks" and not place:
            continue
        if section_of(field) is not None and isinstance(value, BaseModel):
            yield from _leaves(value, (*place, name))
        else:
            yield (*place, name), plain[name]


def flat(values: Mapping[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each value that is not a table, with its path."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, (*place, name))
        else:
            yield (*place, name), value
