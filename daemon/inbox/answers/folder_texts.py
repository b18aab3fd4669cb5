"""
Write README.txt in the folders for drops, and notes next to files that cannot be taken.

README.txt describes, by the settings, what may be dropped into a track's folder and how it is answered.
"""

import os
from collections.abc import Mapping

from daemon.inbox.answers.remarks import begins_when, rows_for_verdict
from daemon.inbox.drop_folders import DONE, WAITS, folder_names
from daemon.inbox.folders import InboxFolders, keep_own, writing
from daemon.settings.model import IntakeSettings, Settings, TrackSettings
from pipeline.records.validate import Options
from pipeline.words import count, printable, size_words

README = "README.txt"


def write_readmes(settings: Settings, inbox: InboxFolders) -> None:
    """Write README.txt in each track's folder. Raises `OSError` if the disk is full; other errors are logged."""
    for track in settings.track_names:
        _keep(inbox, folder_names(track, "train"), README, readme_text(settings, track))


def keep_notes(inbox: InboxFolders, folders: tuple[str, ...], left: Mapping[str, str]) -> None:
    """
    Write NAME.waits.txt next to each file in `left` (name: reason), and delete the daemon's other such notes there.

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
    """Write a text to a folder, or delete it if `None`. Errors are logged; a full disk raises `OSError`."""
    with writing("inbox_text_not_written", name=printable("/".join((*folders, name)))):
        keep_own(inbox.shared(*folders), inbox.closed(DONE), name, words)


def readme_text(settings: Settings, track: str) -> str:
    """Return the text of README.txt in the folder of `track`, which describes what may be dropped there."""
    intake = settings.intake
    at_once = ",\nor at once if it is renamed into this folder" if settings.observer == "native" else ""
    below, top = ("", "") if track == "default" else (f"{track}/", "../")
    return f"""\
This is the inbox of track {track}: drop files of training records here.

WHAT TO DROP
A file that ends in .jsonl or .json, in UTF-8, with a row a line:

  {{"instruction": "...", "input": "...", "output": "..."}}

"input" may be left out. A row may be a conversation, too, as OpenAI's
"messages" or ShareGPT's "conversations". "tags": ["one", "two"] names the kinds
that scores are given for; "group": "page 7" names the text or conversation that
a row is of, so that all of it is trained on, or none. Other keys are not used.
A file has at most {size_words(intake.max_bytes)}, a line {size_words(Options().max_line_bytes)}.
"dropforge check FILE" tells beforehand what is wrong with a file;
"dropforge convert FILE" makes such a file of a table (CSV, TSV, Parquet).

{_what_judges(settings.track(track))}

HOW IT IS ANSWERED
A file is taken once it has not changed for {intake.settle_seconds:g} s{at_once}.
It then lies in

  {top}done/{below}       taken; beside it NAME.receipt.json with its number, and
              NAME.verdict.txt: what became of it, replaced when that changes
  {top}rejected/{below}   given back; beside it NAME.errors.json with line, field and
              remedy of each finding: mend the file and drop it again

(in a folder ~USER there, which only you can read, if you are not the user that
Dropforge runs as). {_bad_rows(intake)}

A file that cannot be taken stays here; NAME.waits.txt beside it says why.

The next run of this track {begins_when(settings, track)}.
"""


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
