"""Keeps every text in the inbox that follows from settings and database; called whenever the inbox is looked at."""

import structlog

from daemon.inbox.answers import own_files
from daemon.inbox.answers.readme import README, readme_text
from daemon.inbox.answers.verdict_notes import VerdictNotes
from daemon.inbox.answers.wanted import WANTED, wanted_text
from daemon.inbox.drop_folders import DONE, folder_names
from daemon.inbox.folders import InboxFolders, InboxUnusable
from daemon.settings.model import Settings
from daemon.state.database import open_reader, transaction
from daemon.state.layout import DATABASE_NAME
from pipeline.errors import is_disk_full

log = structlog.get_logger()


class FolderTexts:
    """The README.txt of each track's folder, its WANTED.md, and the verdicts beside the receipts."""

    def __init__(self, settings: Settings, inbox: InboxFolders) -> None:
        """Keep the texts of `inbox`; nothing is written yet. For one thread. Raises `DatabaseUnusable`."""
        self._engine = open_reader(settings.state_folder / DATABASE_NAME)
        self._settings, self._inbox = settings, inbox
        self._notes = VerdictNotes(self._engine, settings, inbox)
        self._readmes = list(settings.track_names)

    def refresh(self) -> bool:
        """Write what has changed; say whether more is to be written soon. Raises `OSError` if the disk is full."""
        while self._readmes:
            track = self._readmes[-1]
            self._keep(track, README, readme_text(self._settings, track))
            self._readmes.pop()
        more = self._notes.refresh()
        for track in sorted(self._notes.touched):
            if track in self._settings.track_names:
                with transaction(self._engine) as session:
                    text = wanted_text(session, self._settings.state_folder, track)
                self._keep(track, WANTED, text)
            self._notes.touched.discard(track)
        return more

    def _keep(self, track: str, name: str, text: str | None) -> None:
        """Keep one text in a track's folder; one that cannot be written is logged and left, but for a full disk."""
        try:
            folder = self._inbox.shared(*folder_names(track, "train"))
            own_files.keep(folder, self._inbox.closed(DONE), name, text)
        except (InboxUnusable, OSError) as error:
            if isinstance(error, OSError) and is_disk_full(error):
                raise
            log.warning("inbox_text_not_written", track=track, name=name, error=str(error))
