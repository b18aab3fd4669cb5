"""
Move a recorded file to `done/` or `rejected/`, and write its receipt or error list next to it.

The document is written first and the file moved after it. If the daemon dies between the two, the file is recognised
at the next scan and moved next to the document that was written for it.
"""

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from daemon.inbox.drop_folders import DONE, REJECTED, Folder, folder_names
from daemon.inbox.folders import InboxFolders, InboxUnusable, read_own
from daemon.inbox.safe_copy import identity, look
from daemon.inbox.watcher import Settled
from daemon.state.clauses import drop_clauses
from daemon.state.states import DropState
from daemon.state.tables import Drop
from daemon.system.clock import utc
from pipeline import durable
from pipeline.records.records import Finding
from pipeline.records.validate import Validation, account_words
from pipeline.words import count

Document = dict[str, Any]
RECEIPT = ".receipt.json"
ERRORS = ".errors.json"
#: A name, its number, the document's ending and the temporary name that it is written under stay below 255 bytes.
_LONGEST_NAME = 190
#: Most findings in an error list, which stays small even for a file of many short rows.
_MOST_FINDINGS = 100
_LONGEST_ENDING = 20
_FIRST_TRIES = 20


def receipt(drop: Drop, run: int | None, original: Drop | None, detail: Mapping[str, Any], sha256: str) -> Document:
    """
    Return the receipt of a drop that is accepted, proposed, or a duplicate of `original`.

    `run` is the id of the run that the drop queued, if any. `detail` has the warnings, `Notice`s as JSON, and, but of a
    duplicate, `Validation.counts`. `sha256` is that of the dropped file; `content_sha256` in the receipt is
    that of the stored rows, without bad ones, but of a duplicate that of the dropped file.
    """
    same = None
    if original is not None:
        same = {
            "drop": original.id,
            "name": original.name,
            "received_at": iso_time(original.received_at),
            "state": original.state,
        }
    return {
        "version": 1,
        **_common(drop, sha256),
        "content_sha256": drop.sha256,
        "size_bytes": drop.size_bytes,
        "rows": drop.rows,
        "records": drop.records,
        "quarantined": drop.quarantined,
        "account": account_words(detail["account"]) if "account" in detail else None,
        "run": run,
        "duplicate_of": same,
        "sentence": _sentence(drop, run, original),
        "warnings": detail["warnings"],
    }


def errors(drop: Drop, validation: Validation, sha256: str) -> Document | None:
    """
    Return the error list of a drop that was rejected or lost rows (`schemas/drop-errors.schema.json`), or `None`.

    It has at most 100 findings. `sha256` is that of the dropped file. `None` if the file is valid now: it was recorded
    before a crash, under other settings.
    """
    if validation.ok:
        return None
    reason, remedy = drop.reason or validation.reason, "mend what the findings name and drop the file again"
    if drop.state != DropState.REJECTED:
        remedy = "mend the rows that the findings name and drop them in a file of their own"
    return {
        "version": 1,
        **_common(drop, sha256),
        "reason": reason,
        "remedy": remedy,
        "rows": validation.rows,
        "good_rows": validation.good_rows,
        "quarantined": drop.quarantined,
        "findings_total": validation.findings_total,
        "rules": validation.rules,
        "findings": [finding.model_dump() for finding in _chosen(validation.findings)],
        "warnings": [notice.model_dump() for notice in validation.warnings],
    }


def file_away(
    inbox: InboxFolders, settled: Settled, info: os.stat_result, drop: Drop, made: Mapping[str, Document | None]
) -> None:
    """
    Write a drop's documents to its owner's folder in `done/` or `rejected/`, then move its file next to them.

    `info` is the file's when it was recorded; `made` has the documents, or `None`, by the ending of their names. If the
    file has changed or is gone, only the documents are written. Nothing is overwritten: a name that is taken gets a
    number. Raises `OSError` or `InboxUnusable`, and may then be called again.
    """
    documents = {ending: document for ending, document in made.items() if document is not None}
    home = home_of(drop)
    source, target = inbox.shared(*settled.folders), inbox.answers(*home, owner=info.st_uid)
    names = map(os.fsdecode, names_for(settled.name, drop.id or 0))
    name = os.fsencode(next(name for name in names if _is_free(target, name, documents)))
    for ending, document in documents.items():
        durable.write_json(target.path / (os.fsdecode(name) + ending), document)
    try:
        unchanged = identity(look(settled.name, source.fd)) == identity(info)
    except FileNotFoundError:
        return
    if unchanged:
        os.rename(settled.name, name, src_dir_fd=source.fd, dst_dir_fd=target.fd)
        if look(name, target.fd).st_ino != info.st_ino and not os.path.lexists(source.path / os.fsdecode(settled.name)):
            # Another file that replaced the recorded one just before; it has not been read yet.
            os.rename(name, settled.name, src_dir_fd=target.fd, dst_dir_fd=source.fd)
        os.fsync(target.fd)
        os.fsync(source.fd)


def home_of(drop: Drop) -> tuple[str, ...]:
    """Return "rejected" for a rejected drop, else "done", then its track unless "default": names below the inbox."""
    return (REJECTED if drop.state == DropState.REJECTED else DONE, *folder_names(drop.track, "train"))


def names_for(name: bytes, drop: int) -> Iterator[bytes]:
    """
    Yield names for a file in `done/` or `rejected/`, without end: its own, then with -2 to -20 before the ending.

    Later numbers count from 1000 times `drop`, the drop's id. A name over 190 bytes is cut before its ending.
    """
    stem, ending = os.path.splitext(name)  # noqa: PTH122 - bytes
    if len(name) > _LONGEST_NAME:
        if len(ending) > _LONGEST_ENDING:
            stem, ending = name, b""
        # "ignore" drops a character that was cut in half, and the bytes of a name that are not UTF-8.
        stem = stem[: _LONGEST_NAME - len(ending)].decode("utf-8", "ignore").encode()
    # After a few tries the number comes from the drop's id: with thousands of equal names each would try all others.
    numbers = itertools.chain(range(1, _FIRST_TRIES + 1), itertools.count(1000 * max(drop, 1)))
    yield from (stem + (b"" if number == 1 else b"-%d" % number) + ending for number in numbers)


def remove_leftovers(inbox: InboxFolders) -> None:
    """Remove half-written documents of a killed daemon from `done/` and `rejected/`; ignore errors."""
    for home in (DONE, REJECTED):
        with contextlib.suppress(InboxUnusable, OSError):  # the first scan reports it
            folder = inbox.closed(home)
            for _, below, _, fd in os.fwalk(dir_fd=folder.fd):
                durable.remove_leftovers(Path(f"/proc/self/fd/{fd}"))
                # The daemon writes nothing into a folder of another user.
                owners = {name: os.stat(name, dir_fd=fd, follow_symlinks=False).st_uid for name in below}
                below[:] = [name for name, owner in owners.items() if owner == os.geteuid()]


def iso_time(milliseconds: int) -> str:
    """Return milliseconds since the epoch as ISO 8601 in UTC: 2026-01-31T02:00:00+00:00."""
    return utc(milliseconds).isoformat(timespec="seconds")


def _chosen(findings: Sequence[Finding]) -> Sequence[Finding]:
    """Return at most 100 findings in their order; the first of each rule, then of each message, are chosen first."""
    rules: dict[str, int] = {}
    kinds: dict[tuple[str, str], int] = {}
    for number, finding in enumerate(findings):
        rules.setdefault(finding.rule, number)
        kinds.setdefault((finding.message, finding.remedy), number)
    chosen = dict.fromkeys([*rules.values(), *kinds.values(), *range(len(findings))])
    return [findings[number] for number in sorted(itertools.islice(chosen, _MOST_FINDINGS))]


def _common(drop: Drop, sha256: str) -> Document:
    return {
        "drop": drop.id,
        "state": drop.state,
        "track": drop.track,
        "role": drop.role,
        "name": drop.name,
        "sha256": sha256,
        "received_at": iso_time(drop.received_at),
    }


def _sentence(drop: Drop, run: int | None, original: Drop | None) -> str:
    if drop.state == DropState.PROPOSED:
        wait = count(drop.records, "held-out record waits", "held-out records wait")
        return f"{wait} for a person: dropforge drops accept {drop.id}; {drop.reason}"
    if original is None:
        they = "it is" if drop.records == 1 else "they are"
        then = f"{they} in the next run of the track" if run is None else f"{they} in run {run}"
        what, gate = ("held-out record", " for the gate") if drop.role == "heldout" else ("record", "")
        aside = f"; {count(drop.quarantined, 'bad row was', 'bad rows were')} set aside" if drop.quarantined else ""
        return f"accepted: {count(drop.records, what)}{gate}; {then}{aside}"
    same = f"the same content is drop {original.id} ({original.name}), received {iso_time(original.received_at)}"
    if original.state == DropState.ACCEPTED:
        return f"{same}; nothing was added"
    why = ": ".join(filter(None, (original.state, "; ".join(drop_clauses(original)))))
    return f"{same}, which is {why}; to use it again: dropforge drops restore {original.id} --reason TEXT"


def _is_free(folder: Folder, name: str, documents: Mapping[str, Document]) -> bool:
    """Return whether `name` is free in `folder`: no such file, and no documents but this drop's own are there."""
    in_the_way = [ending for ending in (RECEIPT, ERRORS) if os.path.lexists(folder.path / (name + ending))]
    return not os.path.lexists(folder.path / name) and all(
        ending in documents and read_own(folder, name + ending) == durable.json_bytes(documents[ending])
        for ending in in_the_way
    )
