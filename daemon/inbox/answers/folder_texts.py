"""
Write README.txt in the folders for drops, and notes next to files that cannot be taken.

README.txt describes, by the settings, what may be dropped into a track's folder and how it is answered. Files that the
daemon did not write are left alone (`keep_own`).
"""

import os
from collections.abc import Mapping
from pathlib import Path

from daemon.inbox.answers.remarks import begins_when, rows_for_verdict
from daemon.inbox.drop_folders import DONE, WAITS, folder_names
from daemon.inbox.folders import InboxFolders, keep_own, writing
from daemon.settings.model import IntakeSettings, Settings, TrackSettings
from pipeline.records.validate import Options
from pipeline.words import count, printable, size_words

README = "README.txt"
#: What it says, for `str.format`.
_TEXT = Path(__file__).with_name("readme.txt")


def write_readmes(settings: Settings, inbox: InboxFolders) -> None:
    """Write README.txt in each declared track's folder. Raises `OSError` if the disk is full, logs other errors."""
    for track in settings.track_names:
        _keep(inbox, folder_names(track, "train"), README, readme_text(settings, track))


def keep_notes(inbox: InboxFolders, folders: tuple[str, ...], left: Mapping[str, str]) -> None:
    """
    Write NAME.waits.txt next to each file in `left` (name: reason), and delete the daemon's other notes there.

    `folders` is the folder as names below the inbox. Raises `OSError` if the disk is full; other errors are logged.
    """
    with writing("inbox_text_not_written", name=printable("/".join(folders))):
        folder = inbox.shared(*folders)  # open as long as it has a name
        there = os.listdir(folder.fd)  # noqa: PTH208 - a descriptor
        for name in {name.removesuffix(WAITS) for name in there if name.endswith(WAITS)} | left.keys():
            why = left.get(name)
            note = why and f"{printable(name)} has not been taken, and is tried again: {why}\n"
            _keep(inbox, folders, name + WAITS, note)


def _keep(inbox: InboxFolders, folders: tuple[str, ...], name: str, words: str | None) -> None:
    with writing("inbox_text_not_written", name=printable("/".join((*folders, name)))):
        keep_own(inbox.shared(*folders), inbox.closed(DONE), name, words)


def readme_text(settings: Settings, track: str) -> str:
    """Return the text of README.txt in the folder of declared `track`, which describes what may be dropped there."""
    intake = settings.intake
    at_once = ",\nor at once if it is renamed into this folder" if settings.observer == "native" else ""
    below, top = ("", "") if track == "default" else (f"{track}/", "../")
    return _TEXT.read_text(encoding="utf-8").format(
        track=track,
        intake=intake,
        most=size_words(intake.max_bytes),
        longest=size_words(Options().max_line_bytes),
        judges=_what_judges(settings.track(track)),
        at_once=at_once,
        below=below,
        top=top,
        bad_rows=_bad_rows(intake),
        begins=begins_when(settings, track),
    )


def _what_judges(track: TrackSettings) -> str:
    never = "Records that are dropped into heldout/ are never trained on"
    needed = f"No model gets a verdict before\n{rows_for_verdict(track)}."
    if track.gate.on == "pinned":
        return f"{never}:\nthe models are judged on them. {needed}"
    return f"{never}.\nThe models are judged on a share of each drop. {needed}"


def _bad_rows(intake: IntakeSettings) -> str:
    if intake.on_bad_rows == "reject":
        return "One bad row, and the whole file is given back."
    most = f"{count(intake.max_bad_rows, 'bad row')} ({intake.max_bad_percent:g} % of the rows)"
    return f"Up to {most} are left out;\nwith more, the whole file is given back."
