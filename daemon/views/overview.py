"""
Read-only queries on a state folder, from its database and files; they need no running daemon.

Times are UTC. Missing data (no database yet, a file lost in a crash) gives an empty result, not an error. Queries raise
`DatabaseUnusable` if the database cannot be read.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pydantic import ValidationError

from daemon.inbox.answers.remarks import lacking
from daemon.settings.model import Settings
from daemon.state.layout import LOCK_NAME, TROUBLES_NOTE, WATCHER_NOTE
from daemon.state.states import state_words
from daemon.system.processes import lock_holder
from daemon.views.champion_history import Champions
from daemon.views.drops import Drops, last_prepared
from daemon.views.reader import NotThere
from daemon.views.runs import RunDetail, Runs
from pipeline.artifacts import JSON_NAME, PAGE_NAME, Frozen
from pipeline.data_words import warning_words
from pipeline.durable import read_object
from pipeline.errors import DropforgeError
from pipeline.report.facts import Story


class DaemonView(Frozen):
    """Whether a daemon works on the state folder."""

    alive: bool
    pid: int | None
    """Process id; `None` if no daemon runs, or the lock file has no id."""


class Overview(Runs, Drops, Champions):
    """Reads one workspace: its runs, drops and champions, and what concerns them all."""

    def daemon(self) -> DaemonView:
        """Return whether a daemon holds the lock, and its pid. Raises `DropforgeError` if the lock is not readable."""
        try:
            pid = lock_holder(self.state / LOCK_NAME)
        except PermissionError as error:
            raise DropforgeError(
                f"{self.state} is not readable for this user",
                "ask as the user that the daemon runs as: sudo -u USER dropforge",
            ) from error
        return DaemonView(alive=pid is not None, pid=pid or None)

    def tracks(self) -> list[str]:
        """Return the names of all tracks in the database, also of those not in the settings any more, oldest first."""
        return [row.name for row in self.rows("SELECT name FROM track ORDER BY created_at")]

    def fixed(self, track: str) -> Any:
        """Return an object with the track's `metric` and `max_new_tokens`; each is `None` until a run fixes it."""
        rows = self.rows("SELECT metric, max_new_tokens FROM track WHERE name = ?", track)
        return rows[0] if rows else SimpleNamespace(metric=None, max_new_tokens=None)

    def missing_rows(
        self, settings: Settings, track: str | None = None, more: tuple[Path, int] | None = None
    ) -> dict[str, str]:
        """
        Map each declared track (or `track` only) that lacks rows for a first verdict to a sentence that says so.

        A track that ever had a verdict other than "insufficient_evidence" is left out. `more` is a file with its number
        of rows, counted as training rows of each track that does not have the file yet.
        """
        names = [name for name in settings.track_names if track in {None, name}]
        sentences = {name: lacking(settings, name, self.fixed(name).metric, self.rows, more) for name in names}
        return {name: words for name, words in sentences.items() if words is not None}

    def data_warnings(self, track: str | None = None) -> list[str]:
        """Return a line with track and run for each warning on the data of each (or one) track's last prepared run."""
        names = [name for name in self.tracks() if track in {None, name}]
        last = self.read(lambda reader: [(name, *last_prepared(reader, self.folder, name)) for name in names])
        prepared = [(f"track {name}, run {run}", data) for name, run, data in last if data]
        return [f"{where}: {words}" for where, data in prepared for words in warning_words(data)]

    def inbox_note(self) -> dict[str, Any]:
        """
        Return the daemon's latest note on the files that remain in the inbox; its lists are empty before the first.

        Its keys: "waiting" (names of files open for writing), "unknown_folders" (of no track: {"name", "nearest"}),
        "full_tracks" (names: too many drops wait), "left" (files and folders that it cannot take or use: {"name",
        "why"}).
        """
        note = read_object(self.state / WATCHER_NOTE)
        return {name: list(note.get(name, ())) for name in ("waiting", "unknown_folders", "full_tracks", "left")}

    def troubles(self) -> dict[str, str]:
        """Map each part of the daemon with an error, as "track a" or "the worker", to its message, as last noted."""
        return {whose: str(words) for whose, words in read_object(self.state / TROUBLES_NOTE).items()}

    def report_folder(self, run_id: int) -> Path:
        """Return the folder of a run's report.html and .json. Raises as `run`, `NotThere` without verdict or page."""
        run = self.run(run_id)
        if run.verdict is None:
            why = f": it {state_words(run.state)}{f': {run.error}' if run.error else ''}" if run.ended_at else ""
            raise NotThere(
                f"run {run_id} has no verdict, so there is no report{why}",
                (why and run.hint) or f"see how far it is: dropforge show {run_id}",
            )
        folder = self.folder / run.verdict.report if run.verdict.report else None
        if folder is None or not (folder / PAGE_NAME).is_file():
            raise NotThere(
                f"the report of run {run_id} is not there{f': {folder} is gone' if folder else ''}",
                f"the verdict and its numbers: dropforge show {run_id}",
            )
        return folder

    def report_data(self, run_id: int) -> dict[str, Any]:
        """Return the object in a run's report.json. Raises as `report_folder`, `DropforgeError` if damaged or gone."""
        path = self.report_folder(run_id) / JSON_NAME
        value = read_object(path)
        if not value:
            raise DropforgeError(
                f"the data of the report of run {run_id} is damaged or gone: {path}",
                f"bring it back from a backup; the page is in the same folder: dropforge report {run_id}",
            )
        return value

    def story(self, run: RunDetail) -> Story | None:
        """Return headline, reasons and next steps from a run's report.json; `None` if it is missing or damaged."""
        if run.verdict is None or run.verdict.report is None:
            return None
        story = read_object(self.folder / run.verdict.report / JSON_NAME).get("story")
        try:
            return Story.model_validate(story)
        except ValidationError:
            return None
