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
    document: dict[str, Any]


def receipt(drop: Drop, run: int | None, original: Drop | None, notices: Sequence[Notice]) -> dict[str, Any]:
    """Return the receipt of a drop that was accepted, or found to repeat `original`."""
    same = None
    if original is not None:
        same = {
            "drop": original.id, "name": original.name, "received_at": iso_time(original.received_at),
            "state": original.state,
        }  # fmt: skip
    return {
        "version": 1, **_common(drop), "size_bytes": drop.size_bytes, "rows": drop.rows, "run": run,
        "duplicate_of": same, "sentence": _sentence(drop, run, original),
        "warnings": [notice.model_dump() for notice in notices],
    }  # fmt: skip


def errors(drop: Drop, validation: Validation) -> dict[str, Any]:
    """Return the errors of a rejected drop, as `schemas/findings.schema.json` describes them."""
    remedy = "mend what the findings name and drop the file again"
    return {
        "version": 1, **_common(drop), "reason": validation.reason, "remedy": remedy,
        "rows": validation.rows, "good_rows": validation.good_rows, "findings_total": validation.findings_total,
        "findings": [finding.model_dump() for finding in validation.findings],
        "warnings": [notice.model_dump() for notice in validation.warnings],
    }  # fmt: skip


def file_away(inbox: Path, filing: Filing) -> Path:
    """
    Write the document and move the file beside it; return where the file is now.

    Nothing is overwritten: a name that is taken gets a number. Raises `OSError`, and may then be called again.
    """
    home = inbox / (REJECTED if filing.rejected else DONE)
    if filing.settled.track != "default":
        home /= filing.settled.track
    home.mkdir(parents=True, exist_ok=True)
    ending = ERRORS if filing.rejected else RECEIPT
    target = _free_target(home, filing, ending)
    durable.write_json(target.with_name(target.name + ending), filing.document)
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


def _common(drop: Drop) -> dict[str, Any]:
    return {
        "drop": drop.id, "state": drop.state, "track": drop.track, "role": drop.role, "name": drop.name,
        "sha256": drop.sha256, "received_at": iso_time(drop.received_at),
    }  # fmt: skip


def _sentence(drop: Drop, run: int | None, original: Drop | None) -> str:
    if original is None:
        then = "they are in the next run of the track" if run is None else f"they are in run {run}"
        what = "held-out records for the gate" if drop.role == "heldout" else "records"
        return f"accepted: {drop.rows:,} {what}; {then}"
    same = f"the same content is drop {original.id} ({original.name}), received {iso_time(original.received_at)}"
    if original.state == DropState.ACCEPTED:
        return f"{same}; nothing was added"
    why = f": {original.reason}" if original.reason else ""
    return f"{same}, which is {original.state}{why}; to use it again: dropforge drops restore {original.id}"


def _free_target(home: Path, filing: Filing, ending: str) -> Path:
    stem, dot, suffix = _shortened(filing.settled.name).rpartition(b".")
    if not stem:
        stem, dot, suffix = dot + suffix, b"", b""
    names = (stem + (b"" if number == 1 else b"-%d" % number) + dot + suffix for number in itertools.count(1))
    targets = (home / os.fsdecode(name) for name in names)
    return next(target for target in targets if _is_free(target, filing.drop, ending))


def _is_free(target: Path, drop: int, ending: str) -> bool:
    """Say whether nothing stands in the way, but for the document that was written for this drop before a crash."""
    if os.path.lexists(target):
        return False
    documents = [target.with_name(target.name + known) for known in (RECEIPT, ERRORS)]
    in_the_way = [document for document in documents if os.path.lexists(document)]
    own = target.with_name(target.name + ending)
    return not in_the_way or (in_the_way == [own] and _drop_of(own) == drop)


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
