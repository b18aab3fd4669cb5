"""Where each setting in force comes from: the line of the file, the variable, a preset, or the default."""

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, SecretStr

from daemon.settings.load import from_environment, load, section_of
from daemon.settings.model import ENV_PREFIX, FILE_NAME, Settings
from daemon.settings.text import read_toml
from pipeline.artifacts import Frozen
from pipeline.config import PRESETS

#: Lines of a file from which on its settings are told without their lines: each is found by reading what is above it.
_MOST_LINES = 2000


class Origin(Frozen):
    """A setting in force, and who says so."""

    name: str
    """With its sections, as `train.epochs`; a track's own as `tracks.NAME.train.epochs`."""
    value: Any
    source: Literal["default", "file", "environment", "preset"]
    where: str
    """`dropforge.toml:12`, the variable, or the preset; of a default nothing."""


def origins(path: Path | None, environment: Mapping[str, str]) -> list[Origin]:
    """
    Return every setting in the order of the sample file, then what the tracks have of their own.

    `path` and `environment` are those of `load`; raises what it raises. Secrets are shown as they show themselves.
    """
    settings = load(path, environment)
    file = path or Path(environment.get("DROPFORGE_CONFIG") or FILE_NAME)
    lines = _lines(file) if file.exists() else {}
    known = _Known(file, lines, environment)
    top = [known.origin(name, value, settings) for name, value in _leaves(settings, ())]
    own = dict(flat({"tracks": settings.tracks}))
    return [*top, *(known.origin(name, value, settings) for name, value in own.items())]


class _Known:
    """What file and environment set, by the names that lead to it."""

    def __init__(self, file: Path, lines: Mapping[tuple[str, ...], int], environment: Mapping[str, str]) -> None:
        self._file = file
        self._lines = lines
        self._values = dict(flat(from_environment(environment)))
        named = (name for name in environment if name.startswith(ENV_PREFIX))
        #: Each variable, by the setting or the section that it sets.
        self._variables = {tuple(name.removeprefix(ENV_PREFIX).lower().split("__")): name for name in named}

    def origin(self, name: tuple[str, ...], value: Any, settings: Settings) -> Origin:
        source: Literal["default", "file", "environment", "preset"] = "default"
        where = ""
        if _set_by(name, self._values) is not None:
            source, where = "environment", self._variables[_set_by(name, self._variables) or name]
        elif (place := _set_by(name, self._lines)) is not None:
            number = self._lines[place]
            source, where = "file", f"{self._file}:{number}" if number else str(self._file)
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
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if name == "tracks" and not place:
            continue
        if section_of(field) is not None and isinstance(value, BaseModel):
            yield from _leaves(value, (*place, name))
        else:
            yield (*place, name), _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, SecretStr):
        return str(value)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (tuple, list)) else value


def flat(values: Mapping[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each value that is no table, with the names that lead to it."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, (*place, name))
        else:
            yield (*place, name), value


def _lines(file: Path) -> dict[tuple[str, ...], int]:
    """
    Return each setting of a file with the line that it begins in; 0 in a file of very many lines.

    Found by reading ever more of the file: a beginning that is TOML and has one setting more ends with that setting, so
    it began behind the last such beginning.
    """
    names = [name for name, _ in flat(read_toml(file))]
    text = file.read_text(encoding="utf-8").splitlines()
    if len(text) > _MOST_LINES:
        return dict.fromkeys(names, 0)
    found: dict[tuple[str, ...], int] = {}
    begins = 0
    for number, line in enumerate(text, start=1):
        if begins == number - 1 and (not line.strip() or line.lstrip().startswith("#")):
            begins = number
            continue
        try:
            now = tomllib.loads("\n".join(text[:number]))
        except tomllib.TOMLDecodeError:
            continue
        for name, _ in flat(now):
            found.setdefault(name, begins + 1)
        begins = number
    return found
