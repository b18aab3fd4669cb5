"""Keeps every text in the inbox that follows from settings and database; called whenever the inbox is looked at."""

import os
from collections.abc import Mapping

import structlog
from sqlalchemy import text

from daemon.inbox.answers import own_files
from daemon.inbox.answers.readme import README, readme_text
from daemon.inbox.answers.remarks import metric_of_track
from daemon.inbox.answers.verdict_notes import VerdictNotes
from daemon.inbox.answers.wanted import WANTED, wanted_text
from daemon.inbox.drop_folders import DONE, WAITS, folder_names
from daemon.inbox.folders import InboxFolders, InboxUnusable
from daemon.settings.model import Settings
from daemon.state.database import open_reader, transaction
from daemon.state.layout import DATABASE_NAME
from daemon.state.questions import METRIC
from pipeline.errors import is_disk_full
from pipeline.words import printable

log = structlog.get_logger()


class FolderTexts:
    """The README.txt of each track's folder, its WANTED.md, and the verdicts beside the receipts."""

    def __init__(self, settings: Settings, inbox: InboxFolders) -> None:
        """Keep the texts of `inbox`; nothing is written yet. For one thread. Raises `DatabaseUnusable`."""
        self._engine = open_reader(settings.state_folder / DATABASE_NAME)
        self._settings, self._inbox = settings, inbox
        self._notes = VerdictNotes(self._engine, settings, inbox)

    def refresh(self) -> bool:
        """Write what has changed; say whether more is to be written soon. Raises `OSError` if the disk is full."""
        more = self._notes.refresh()
        for track in sorted(self._notes.touched):
            if track in self._settings.track_names:
                with transaction(self._engine) as session:
                    wanted = wanted_text(session, self._settings.state_folder, track)
                    found = session.connection().execute(text(METRIC), {"track": track}).first()
                folders = folder_names(track, "train")
                metric = metric_of_track(self._settings.state_folder, found)
                self._keep(folders, README, readme_text(self._settings, track, metric))
                self._keep(folders, WANTED, wanted)
            self._notes.touched.discard(track)
        return more

    def keep_notes(self, folders: tuple[str, ...], left: Mapping[str, str]) -> None:
        """Say beside each file in `left` why it stays, and nothing beside others. Raises `OSError` as `refresh`."""
        try:
            folder = self._inbox.shared(*folders)  # open as long as it has a name
            there = os.listdir(folder.fd)  # noqa: PTH208 - a descriptor
        except (InboxUnusable, OSError) as error:
            log.warning("inbox_text_not_written", name=printable("/".join(folders)), error=str(error))
            return
        for name in {name.removesuffix(WAITS) for name in there if name.endswith(WAITS)} | left.keys():
            text = f"{printable(name)} has not been taken, and is tried again: {left[name]}\n" if name in left else None
            self._keep(folders, name + WAITS, text)

    def _keep(self, folders: tuple[str, ...], name: str, text: str | None) -> None:
        """Keep one text in a folder; one that cannot be written is logged and left, but for a full disk."""
        try:
            own_files.keep(self._inbox.shared(*folders), self._inbox.closed(DONE), name, text)
        except (InboxUnusable, OSError) as error:
            if isinstance(error, OSError) and is_disk_full(error):
                raise
            log.warning("inbox_text_not_written", name=printable("/".join((*folders, name))), error=str(error))
