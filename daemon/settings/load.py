"""Read `dropforge.toml` and environment variables into checked settings, with absolute paths."""

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from daemon.settings.model import ENV_PREFIX, FILE_NAME, OTHER_VARIABLES, Settings, SettingsError, TrackSettings
from daemon.settings.text import BadText, nearest, overlay, read_toml, read_variable, shown
from daemon.system.programs import name_of
from pipeline.search_settings import first_problem
from pipeline.words import shell_path


def load(path: Path | None = None, environment: Mapping[str, str] | None = None) -> Settings:
    """
    Read the settings file (`path`, else `$DROPFORGE_CONFIG`, else ./dropforge.toml if it is there) and `environment`.

    A variable, by default of this process, names a setting with its sections, joined by two underscores, and overrides
    the file: `DROPFORGE_TRAIN__EPOCHS=2`. Without both the defaults hold. Paths are made absolute, from the settings
    file's folder. An empty `gate.pinned_by` becomes the file's owner. Raises `SettingsError` for an unknown or wrong
    setting, naming the field and the file or variable, for a file that cannot be read, and for an inbox that overlaps
    another folder.
    """
    environment = os.environ if environment is None else environment
    chosen = path or Path(environment.get("DROPFORGE_CONFIG") or FILE_NAME)
    values: dict[str, Any] = {}
    if path is not None or "DROPFORGE_CONFIG" in environment or chosen.exists():
        values = _read(chosen)
    try:
        settings = Settings.model_validate(overlay(values, from_environment(environment)))
    except ValidationError as error:
        raise _worded(error, str(chosen), environment) from error
    for name in settings.tracks:
        try:
            settings.track(name)
        except ValidationError as error:
            raise _worded(error, str(chosen), environment, ("tracks", name)) from error
    owner = (name_of(chosen.stat().st_uid),) if chosen.exists() else ()
    gate = settings.gate.model_copy(update={"pinned_by": settings.gate.pinned_by or owner})
    resolved = settings.model_copy(update={**_absolute_paths(settings, chosen.absolute().parent), "gate": gate})
    variable = f"{ENV_PREFIX}INBOX"
    _refuse_overlap(resolved, chosen, settings.inbox, variable if variable in environment else str(chosen))
    return resolved


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_toml(path)
    except FileNotFoundError as error:
        hint = f"make one: dropforge init {shell_path(path.parent)}"
        raise SettingsError(f"there is no settings file {path}", hint) from error
    except OSError as error:
        message = f"cannot read the settings file {path}: {error.strerror}"
        raise SettingsError(message, f"see who may read it: ls -l {shell_path(path)}") from error
    except BadText as error:
        raise SettingsError(f"{path} {error}", "mend it; the commented sample is systemd/dropforge.toml") from error


def from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """
    Return the settings in `DROPFORGE_*` variables as nested tables; they are parsed but not checked.

    Raises `SettingsError` if a value is nested too deeply, or if one variable names a field of a section and another
    sets the section to a value that is not a table.
    """
    values: dict[str, Any] = {}
    for name in sorted(environment):
        if not name.startswith(ENV_PREFIX) or name in OTHER_VARIABLES:
            continue
        place = values
        *sections, last = name.removeprefix(ENV_PREFIX).lower().split("__")
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                message = f"{name}: {section!r} is set by another variable already"
                raise SettingsError(message, "set either the section as a whole or its fields one by one")
        try:
            place[last] = read_variable(environment[name])
        except BadText as error:
            raise SettingsError(f"{name} {error}", "write the value alone, or a table of a section as JSON") from error
    return values


def _refuse_overlap(settings: Settings, file: Path, written: str, source: str) -> None:
    """
    Raise `SettingsError` if the inbox is or contains one of `_others`, or lies in one in which it may not lie.

    `written` and `source`, for the message, are the setting's value and the file or variable that has it.
    """
    inbox = settings.inbox_folder
    real = Path(os.path.realpath(inbox))
    for what, folder, may_lie_in in _others(settings, file):
        other = Path(os.path.realpath(folder))
        if real == other:
            words = "is"
        elif real.is_relative_to(other) and not may_lie_in:
            words = "lies in"
        elif other.is_relative_to(real):
            words = "lies around"
        else:
            continue
        hint = (
            f"found {shown(written)}; what lies in an inbox is taken for drops: give it a folder of its own, as "
            'inbox = "inbox", apart from settings, home, state and base models'
        )
        raise SettingsError(f"{source}: inbox: {inbox} {words} {what} {folder}", hint)


def _worded(
    error: ValidationError, file: str, environment: Mapping[str, str], section: tuple[str, ...] = ()
) -> SettingsError:
    unknown = _unknown_setting(error, TrackSettings if section else Settings)
    place, problem, value = first_problem(error) if unknown is None else (unknown[0], "", None)
    place = (*section, *place)
    variables = (ENV_PREFIX + "__".join(place[:depth]).upper() for depth in range(len(place), 0, -1))
    source = next((name for name in variables if name in environment), file)
    dotted = ".".join(place)
    if unknown is not None:
        near = nearest(place[-1], unknown[1])
        hint = f"did you mean {'.'.join((*place[:-1], near))!r}?" if near else f"known here: {', '.join(unknown[1])}"
        return SettingsError(f"{source}: unknown setting {dotted!r}", hint)
    # TOML has lists alone.
    problem = problem.replace("a valid tuple", 'a list, as ["one", "two"]')
    # An address with its password, or a key that stands where only its variable's name should, is not repeated.
    written = "what is not shown here" if {"judge", "messages"} & set(place) else shown(value)
    # Settings that do not go together are no value that was found somewhere.
    hint = "" if isinstance(value, BaseModel | Mapping) else f"found {written}; "
    where = ": ".join(filter(None, (source, dotted, problem)))
    return SettingsError(where, f"{hint}the commented sample is systemd/dropforge.toml")


def _unknown_setting(error: ValidationError, model: type[BaseModel]) -> tuple[tuple[str, ...], list[str]] | None:
    """Return the path of the first setting unknown in `model`, and its section's known names; `None` without one."""
    for problem in error.errors():
        section: type[BaseModel] | None = model
        place = tuple(map(str, problem["loc"]))
        for name in place[:-1]:
            section = section_of(section.model_fields[name]) if section and name in section.model_fields else None
        if section is not None and problem["type"] == "extra_forbidden":
            return place, [field.alias or name for name, field in section.model_fields.items()]
    return None


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model class of a field that is a section of settings; `None` for any other field."""
    kinds = [field.annotation, *get_args(field.annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _absolute_paths(settings: Settings, folder: Path) -> dict[str, Any]:
    """Return the fields of `settings` with paths, for `model_copy`: the paths absolute, relative ones from `folder`."""

    def absolute(value: str) -> str:
        return str(Path(os.path.abspath(folder / os.path.expanduser(value)))) if value else ""  # noqa: PTH100, PTH111 - links stay, and an unknown home is refused elsewhere

    def suite(name: str) -> str:
        return name if name in {"builtin", "questions"} else absolute(name)

    def track(values: Mapping[str, Any]) -> dict[str, Any]:
        fields = dict(values)
        if "base_model" in values:
            fields["base_model"] = absolute(values["base_model"])
        evaluate = values.get("evaluate")
        names = evaluate.get("general") if isinstance(evaluate, Mapping) else None
        if isinstance(names, list) and isinstance(evaluate, Mapping):
            fields["evaluate"] = {**evaluate, "general": [suite(str(name)) for name in names]}
        return fields

    paths: dict[str, Any] = {name: absolute(getattr(settings, name)) for name in ("inbox", "state", "base_model")}
    general = tuple(map(suite, settings.evaluate.general))
    evaluate = settings.evaluate.model_copy(update={"general": general})
    executor = {name: absolute(getattr(settings.executor, name)) for name in ("shared", "setup")}
    paths["executor"] = settings.executor.model_copy(update=executor)
    return {**paths, "evaluate": evaluate, "tracks": {name: track(values) for name, values in settings.tracks.items()}}


def _others(settings: Settings, file: Path) -> Iterable[tuple[str, Path, bool]]:
    """Yield (name, folder, whether the inbox may lie in it) of each folder that the inbox may not be or contain."""
    yield "the folder of the settings file", file.absolute().parent, True
    with contextlib.suppress(RuntimeError):
        yield "the home folder", Path.home(), True
    yield "the state folder", settings.state_folder, False
    yield "the shared folder", settings.work_folder, False
    bases = {settings.track(name).base_model for name in settings.track_names} - {""}
    yield from (("the base model", Path(base), False) for base in sorted(bases))
