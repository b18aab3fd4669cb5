"""Whether the settings file still has the settings that the daemon began with."""

import os
from collections.abc import Iterator
from pathlib import Path

from daemon.settings.load import load
from daemon.settings.model import FILE_NAME, Settings, SettingsError
from daemon.settings.text import flat
from pipeline import durable
from pipeline.errors import DropforgeError
from pipeline.words import first_of

#: The name of a difference among the troubles of the daemon.
WHOSE = "the settings"


class SettingsInForce:
    """The settings of a running daemon, compared with their file, which is read again only once it has changed."""

    def __init__(self, settings: Settings, path: Path | None) -> None:
        """Remember `settings`, which `load(path)` has just returned."""
        self._settings, self._path = settings, path
        self._file = (path or Path(os.environ.get("DROPFORGE_CONFIG") or FILE_NAME)).absolute()
        self._seen = durable.signature(self._file)
        self._found: DropforgeError | None = None

    def difference(self) -> DropforgeError | None:
        """
        Return an error that names the settings that differ in the file, with the command that reloads it; else `None`.

        A file that cannot be used is a `SettingsError`.
        """
        seen = durable.signature(self._file)
        if seen != self._seen:
            self._seen, self._found = seen, self._compare()
        return self._found

    def _compare(self) -> DropforgeError | None:
        try:
            names = list(_changed(self._settings, load(self._path)))
        except SettingsError as error:
            return SettingsError(f"{error.message}; the former settings stay in force", error.hint)
        if not names:
            return None
        verb = "is" if len(names) == 1 else "are"
        return DropforgeError(f"{first_of(names)} in {self._file} {verb} not in force until: {_reload_command()}")


def _changed(before: Settings, now: Settings) -> Iterator[str]:
    """Yield the dotted name of each setting that has another value, or is in one of the two only."""
    one, other = (dict(flat(settings.model_dump(mode="json"))) for settings in (before, now))
    for name in {**one, **other}:
        if name not in one or name not in other or one[name] != other[name]:
            yield ".".join(name)


def _reload_command() -> str:
    return "systemctl reload dropforge" if "NOTIFY_SOCKET" in os.environ else f"kill -HUP {os.getpid()}"
