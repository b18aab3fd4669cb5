"""
The answer that a person finds in the inbox: the file in `done/` or `rejected/`, and a receipt or its errors beside it.

The document is written first and the file moved after it. If the daemon dies between the two, the file is recognised
at the next scan and moved to the document that was written for it.
"""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from daemon.incoming import identity, look, opened_folder
from daemon.tables import Drop, DropState
from daemon.watcher import DONE, REJECTED, Settled
from pipeline import durable
from pipeline.validate import Notice, Validation

Document = dict[str, Any]
RECEIPT = ".receipt.json"
ERRORS = ".errors.json"
#: A name, its number, the document's ending and the temporary name that it is written under stay below 255 bytes.
_LONGEST_NAME = 190
_LONGEST_ENDING = 20


@dataclass(frozen=True)
class Filing:
    """A file that is recorded and still has to leave the inbox, with its document."""

    settled: Settled
    identity: str
    """The file that was recorded; another one under its name is left alone."""
    drop: int
    rejected: bool
    receipt: Document | None
    errors: Document | None

    @property
    def documents(self) -> dict[str, Document]:
        """What is written beside the file, by the ending of its name."""
        both = {ERRORS: self.errors, RECEIPT: self.receipt}
        return {ending: document for ending, document in both.items() if document is not None}


def receipt(drop: Drop, run: int | None, original: Drop | None, notices: Sequence[Notice], sha256: str) -> Document:
    """
    Return the receipt of a drop that was accepted, waits for a person, or was found to repeat `original`.

    `sha256` is the file's; where bad rows were set aside, `content_sha256` is that of the rows which were stored.
    """
    same = None
    if original is not None:
        same = {
            "drop": original.id, "name": original.name, "received_at": iso_time(original.received_at),
            "state": original.state,
        }  # fmt: skip
    return {
        "version": 1, **_common(drop, sha256), "content_sha256": drop.sha256, "size_bytes": drop.size_bytes,
        "rows": drop.rows, "quarantined": drop.quarantined, "run": run, "duplicate_of": same,
        "sentence": _sentence(drop, run, original),
        "warnings": [notice.model_dump() for notice in notices],
    }  # fmt: skip


def errors(drop: Drop, validation: Validation, sha256: str) -> Document | None:
    """
    Return the errors of a drop that was rejected or lost rows, as `schemas/drop-errors.schema.json` describes them.

    `sha256` is the file's. `None` if there are none any more: the settings of a daemon that died were other ones.
    """
    if validation.ok:
        return None
    reason, remedy = drop.reason or validation.reason, "mend what the findings name and drop the file again"
    if drop.state != DropState.REJECTED:
        remedy = "mend the rows that the findings name and drop them in a file of their own"
    return {
        "version": 1, **_common(drop, sha256), "reason": reason, "remedy": remedy,
        "rows": validation.rows, "good_rows": validation.good_rows, "quarantined": drop.quarantined,
        "findings_total": validation.findings_total,
        "findings": [finding.model_dump() for finding in validation.findings],
        "warnings": [notice.model_dump() for notice in validation.warnings],
    }  # fmt: skip


def file_away(inbox: Path, filing: Filing) -> Path:
    """
    Write the documents and move the file beside them; return where the file is now.

    Nothing is overwritten: a name that is taken gets a number. Raises `OSError`, and may then be called again.
    """
    home = inbox / (REJECTED if filing.rejected else DONE)
    if filing.settled.track != "default":
        home /= filing.settled.track
    home.mkdir(parents=True, exist_ok=True)
    target = _free_target(home, filing)
    for ending, document in filing.documents.items():
        durable.write_json(target.with_name(target.name + ending), document)
    with opened_folder(filing.settled.folder) as source_fd, opened_folder(home) as target_fd:
        try:
            unchanged = identity(look(filing.settled.name, source_fd)) == filing.identity
        except FileNotFoundError:
            unchanged = False
        if unchanged:
            os.rename(filing.settled.name, os.fsencode(target.name), src_dir_fd=source_fd, dst_dir_fd=target_fd)
            os.fsync(target_fd)
            os.fsync(source_fd)
    return target


def remove_leftovers(inbox: Path) -> None:
    """Remove the half-written documents of a daemon that died."""
    for home in (inbox / DONE, inbox / REJECTED):
        for folder in (home, *(path for path in home.glob("[!.]*") if path.is_dir() and not path.is_symlink())):
            durable.remove_leftovers(folder, "*.json")


def iso_time(milliseconds: int) -> str:
    """Return a moment as people and programs read it: 2026-01-31T02:00:00+00:00."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")


def _common(drop: Drop, sha256: str) -> Document:
    return {
        "drop": drop.id, "state": drop.state, "track": drop.track, "role": drop.role, "name": drop.name,
        "sha256": sha256, "received_at": iso_time(drop.received_at),
    }  # fmt: skip


def _sentence(drop: Drop, run: int | None, original: Drop | None) -> str:
    if drop.state == DropState.PROPOSED:
        return f"{drop.rows:,} held-out records wait for a person: dropforge drops accept {drop.id}; {drop.reason}"
    if original is None:
        then = "they are in the next run of the track" if run is None else f"they are in run {run}"
        what = "held-out records for the gate" if drop.role == "heldout" else "records"
        aside = f"; {drop.quarantined:,} bad rows were set aside" if drop.quarantined else ""
        return f"accepted: {drop.rows:,} {what}; {then}{aside}"
    same = f"the same content is drop {original.id} ({original.name}), received {iso_time(original.received_at)}"
    if original.state == DropState.ACCEPTED:
        return f"{same}; nothing was added"
    why = f": {original.reason}" if original.reason else ""
    return f"{same}, which is {original.state}{why}; to use it again: dropforge drops restore {original.id}"


def _free_target(home: Path, filing: Filing) -> Path:
    stem, dot, suffix = _shortened(filing.settled.name).rpartition(b".")
    if not stem:
        stem, dot, suffix = dot + suffix, b"", b""
    names = (stem + (b"" if number == 1 else b"-%d" % number) + dot + suffix for number in itertools.count(1))
    targets = (home / os.fsdecode(name) for name in names)
    return next(target for target in targets if _is_free(target, filing))


def _is_free(target: Path, filing: Filing) -> bool:
    """Say whether nothing stands in the way, but for documents that were written for this drop before a crash."""
    if os.path.lexists(target):
        return False
    documents = {ending: target.with_name(target.name + ending) for ending in (RECEIPT, ERRORS)}
    in_the_way = {ending: document for ending, document in documents.items() if os.path.lexists(document)}
    return all(
        ending in filing.documents and _drop_of(document) == filing.drop for ending, document in in_the_way.items()
    )


def _shortened(name: bytes) -> bytes:
    if len(name) <= _LONGEST_NAME:
        return name
    stem, dot, ending = name.rpartition(b".")
    ending = dot + ending
    if not stem or len(ending) > _LONGEST_ENDING:
        stem, ending = name, b""
    # "ignore" drops what the cut left of a character; a name that is no UTF-8 loses its odd bytes here.
    return stem[: _LONGEST_NAME - len(ending)].decode("utf-8", "ignore").encode() + ending


def _drop_of(document: Path) -> object:
    try:
        value = durable.read_json(document)
    except (OSError, ValueError):
        return None
    return value.get("drop") if isinstance(value, dict) else None
