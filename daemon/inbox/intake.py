"""
Turn one settled file into an accepted, proposed, rejected or duplicate drop, and move it out of the inbox.

The order makes a crash at any point safe: the copy is durable first, then one transaction records the drop and its run,
then the file leaves the inbox. A recorded file that is still there is recognised by its identity in the event.
"""

import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Engine, text
from sqlmodel import Session, col, select

from daemon.inbox.answers import receipts
from daemon.inbox.answers.receipts import ERRORS, RECEIPT, Document
from daemon.inbox.answers.remarks import lacking
from daemon.inbox.drop_folders import Folder
from daemon.inbox.folders import InboxFolders, InboxUnusable
from daemon.inbox.quarantine import examine, one_finding, rule, sift, validation_options
from daemon.inbox.safe_copy import SourceChanged, SourceUnreadable, copy, identity, look, refusal
from daemon.inbox.waiting_limit import WaitingLimit
from daemon.inbox.watcher import Settled
from daemon.queue import run_queue, states
from daemon.settings.model import Settings
from daemon.state.database import rows_of, transaction
from daemon.state.events import record_event
from daemon.state.questions import TAKEN_IN
from daemon.state.states import DropState
from daemon.state.tables import Drop, Event, Track
from daemon.storage.disk import Disk
from daemon.system.programs import name_of
from pipeline import durable
from pipeline.records.validate import MOST_KINDS, FindingKind, Notice, Validation, validate
from pipeline.words import printable, size_words

#: States of drops whose content makes a file a duplicate. Not proposed: a stranger's file would block the owner's.
_KNOWN = (DropState.ACCEPTED, DropState.WITHDRAWN, DropState.SUSPENDED)


@dataclass(frozen=True)
class Outcome:
    """The result of taking one file."""

    kind: str
    """The drop's state; or why it stays for a later scan: changed, gone, queue_full, unreadable, no_room, not_moved."""
    track: str
    name: str
    drop: int | None = None
    """Its number, if it was recorded (rejected and duplicate, too): it has left the inbox, unless it changed since."""
    run: int | None = None
    message: str = ""


class _Recorded(NamedTuple):
    """The drop as which a file was recorded before a crash, its event, and the drop that it repeats, if any."""

    drop: Drop
    event: Event
    original: Drop | None

    def receipt(self, sha256: str) -> Document:
        return receipts.receipt(self.drop, self.event.run_id, self.original, self.event.detail, sha256)


class _Source(NamedTuple):
    """A settled file, its stat result, its open folder, the time in ms, and its record from before a crash, if any."""

    settled: Settled
    info: os.stat_result
    folder: Folder
    now: int
    earlier: _Recorded | None = None


class Intake:
    """Turns settled files into drops; used by one thread of the only daemon on the state folder."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        """Create `drops/` and `incoming/`; remove a killed daemon's leftovers there, in `done/` and in `rejected/`."""
        self._engine = engine
        self._settings = settings
        self._drops = settings.work_folder / "drops"
        self._incoming = settings.work_folder / "incoming"
        for folder in (self._drops, self._incoming):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Copies that a killed daemon had not finished.
        for path in self._incoming.glob("*.tmp"):
            path.unlink()
        self._inbox = InboxFolders(settings.inbox_folder)
        receipts.remove_leftovers(self._inbox)
        self._disk = Disk(settings)
        self.limit = WaitingLimit(engine, settings, self._inbox)

    def take(self, settled: Settled, now_ms: int) -> Outcome:
        """
        Record a file as a drop and move it out of the inbox, or leave it for later; return the outcome.

        The file is copied and validated, an accepted drop may queue a run, and the file then lies in `done/` with a
        receipt or in `rejected/` with an error list. `now_ms` is in milliseconds since the epoch. A file that is bad,
        changing, unreadable, beyond a limit or cannot be moved raises nothing. Raises `OSError` or a database error if
        the state folder cannot be written, as on a full disk, and `InboxUnusable`; then the file stays in the inbox.
        """
        try:
            folder = self._inbox.shared(*settled.folders)
            info = look(settled.name, folder.fd)
        except FileNotFoundError:
            return _outcome(settled, "gone", "it is not there any more")
        try:
            if stat.S_ISDIR(info.st_mode):
                return _outcome(settled, "gone", "a folder has taken its name")
            if self.limit.is_full(settled, info):
                return _outcome(settled, "queue_full", self.limit.words(info))
            return self._take(_Source(settled, info, folder, now_ms))
        except SourceChanged as error:
            return _outcome(settled, "changed", error.message)
        except SourceUnreadable as error:
            return _outcome(settled, "unreadable", f"{error.message}; {error.hint}")

    def _take(self, source: _Source) -> Outcome:
        settled = source.settled
        with transaction(self._engine) as session:
            earlier = _earlier(session, source)
            full = self.limit.why_full(session, settled, source.info) if earlier is None else ""
        if earlier is not None:
            drop, source = earlier.drop, source._replace(earlier=earlier)
            if drop.state != DropState.REJECTED and not drop.quarantined:  # else its findings are needed
                return self._answer(source, drop, earlier.receipt(drop.sha256))
        refused = None if full else refusal(source.info, self._settings.intake.max_bytes)
        if refused is not None:
            return self._reject(source, one_finding(*refused), refused[1], sha256="")
        no_room = full or self._no_room(source.info.st_size)
        if no_room:
            return _outcome(settled, "queue_full" if full else "no_room", no_room)
        path, sha256 = copy(source.settled.name, source.folder.fd, source.info, self._incoming)
        try:
            return self._judge(source, path, sha256)
        finally:
            path.unlink(missing_ok=True)

    def _judge(self, source: _Source, path: Path, sha256: str) -> Outcome:
        """
        Validate the copy of a file at `path`, record it as a drop, store its good rows, and move the file.

        A file that was recorded before a crash is not recorded again.
        """
        name, is_heldout = os.fsdecode(source.settled.name), source.settled.role == "heldout"
        options = validation_options(self._settings, source.settled.track, name, heldout=is_heldout)
        if source.earlier is not None and source.earlier.drop.quarantined:
            drop = source.earlier.drop
            again = validate(path, replace(options, most_bad_rows=drop.quarantined))
            return self._answer(source, drop, source.earlier.receipt(sha256), receipts.errors(drop, again, sha256))
        same = self._duplicate(source, path, sha256, sha256)
        if same is not None:
            return same
        validation = examine(path, options)
        ruling = rule(validation, self._settings.intake)
        if not ruling.accepted:
            return self._reject(source, validation, ruling.reason, sha256)
        content = sha256
        if not validation.ok:
            # Only the good rows, which will be trained on, are stored, hashed and compared.
            content = sift(path, options)
            same = self._duplicate(source, path, sha256, content)
            if same is not None:
                return same
        path.rename(self._drops / f"{content}.jsonl")
        durable.fsync_folder(self._drops)
        return self._accept(source, validation, content, sha256)

    def _duplicate(self, source: _Source, path: Path, sha256: str, content: str) -> Outcome | None:
        """
        Record and move a file with the hash `content` of an accepted, withdrawn or suspended drop; `None` without one.

        The drop is the newest of the track and role. The file at `path` replaces its stored file if lost or damaged.
        """
        with transaction(self._engine) as session:
            settled = source.settled
            same = select(Drop).where(Drop.track == settled.track, Drop.role == settled.role, Drop.sha256 == content)
            known = same.where(col(Drop.state).in_(_KNOWN)).order_by(col(Drop.id).desc())
            original = session.exec(known).first()
        if original is None:
            return None
        stored, whole = self._drops / f"{content}.jsonl", False
        with suppress(OSError):
            whole = durable.sha256_file(stored) == content
        if not whole:
            path.rename(stored)
            durable.fsync_folder(self._drops)
        drop = _drop(source, DropState.DUPLICATE, sha256)
        drop.duplicate_of, drop.rows, drop.records = original.id, original.rows, original.records
        drop.selected, drop.warnings = original.selected, original.warnings
        with transaction(self._engine) as session:
            _record(session, drop, source)
        return self._answer(source, drop, receipts.receipt(drop, None, original, {"warnings": []}, sha256))

    def _accept(self, source: _Source, validation: Validation, content: str, sha256: str) -> Outcome:
        settled = source.settled
        drop = _drop(source, DropState.ACCEPTED, content)
        if settled.role == "heldout":
            drop.reason = self.limit.why_it_waits(settled, source.info)
            drop.state = DropState.ACCEPTED if drop.reason is None else DropState.PROPOSED
        drop.rows, drop.records, drop.selected = validation.good_rows, validation.records, validation.selected
        drop.warnings = sum(notice.rows for notice in validation.warnings)
        drop.findings, drop.quarantined = validation.findings_total, validation.bad_rows
        drop.answers_accepted = self._settings.intake.new_answers == "accept"
        with transaction(self._engine) as session:
            states.ensure_track(session, drop.track, source.now)
            session.add(drop)
            session.flush()
            queued = run_queue.enqueue_for_drop(session, self._settings, drop, source.now)
            run = None if queued is None else queued.id
            lacks = self._lacks(session, drop)
            few = () if lacks is None else (Notice(kind="too_few_rows", rows=drop.rows, message=lacks),)
            warnings = [notice.model_dump() for notice in (*validation.warnings, *few)]
            detail = {"warnings": warnings, "account": validation.counts}
            _record(session, drop, source, validation.kinds, run_id=run, file_sha256=sha256, **detail)
        receipt = receipts.receipt(drop, run, None, detail, sha256)
        errors = receipts.errors(drop, validation, sha256) if drop.quarantined else None
        return self._answer(source, drop, receipt, errors)

    def _lacks(self, session: Session, drop: Drop) -> str | None:
        """Return why the track has too few rows for a verdict; `None` if it has enough, or the drop does not count."""
        track = self._settings.track(drop.track)
        if drop.state != DropState.ACCEPTED or (drop.role == "heldout" and track.gate.on != "pinned"):
            return None
        metric = session.get_one(Track, drop.track).metric
        return lacking(self._settings, drop.track, metric, lambda ask, **named: session.execute(text(ask), named).all())

    def _reject(self, source: _Source, validation: Validation, reason: str, sha256: str) -> Outcome:
        """Record a rejected file, unless it was recorded before a crash, and move it to `rejected/`."""
        if source.earlier is not None and source.earlier.drop.state == DropState.REJECTED:
            drop = source.earlier.drop
        else:
            drop = _drop(source, DropState.REJECTED, sha256)
            drop.rows, drop.findings, drop.reason = validation.rows, validation.findings_total, reason
            drop.warnings = sum(notice.rows for notice in validation.warnings)
            with transaction(self._engine) as session:
                _record(session, drop, source, validation.kinds, rules=validation.rules)
        return self._answer(source, drop, None, receipts.errors(drop, validation, sha256))

    def _answer(self, source: _Source, drop: Drop, receipt: Document | None, errors: Document | None = None) -> Outcome:
        """Move a recorded file out of the inbox and return its outcome: "not_moved" if it fails, and is tried again."""
        settled = source.settled
        try:
            receipts.file_away(self._inbox, settled, source.info, drop, {ERRORS: errors, RECEIPT: receipt})
        except (OSError, InboxUnusable) as error:
            why = str(error) if isinstance(error, InboxUnusable) else error.strerror or str(error)
            return _outcome(settled, "not_moved", f"recorded as drop {drop.id}, but it cannot leave the inbox: {why}")
        message, run = (receipt["sentence"], receipt["run"]) if receipt else (str(drop.reason), None)
        return Outcome(drop.state, drop.track, drop.name, drop.id, run, message)

    def _no_room(self, size: int) -> str:
        """Return why a file of `size` bytes would bring the disk below `disk.low_water_bytes`; empty if not."""
        # A second copy is written without the bad rows.
        need = size * (2 if self._settings.intake.on_bad_rows == "quarantine" else 1)
        free = self._disk.free_bytes()
        if need + self._disk.low_water_bytes <= free:
            return ""
        return (
            f"it needs {size_words(need)}, and the disk of {self._settings.work_folder} has {size_words(free)} free, "
            f"of which {size_words(self._disk.low_water_bytes)} stay so (disk.low_water_bytes); it waits for room"
        )


def _shown(settled: Settled) -> str:
    return printable(os.fsdecode(settled.name))


def _outcome(settled: Settled, kind: str, message: str) -> Outcome:
    return Outcome(kind, settled.track, _shown(settled), message=message)


def _drop(source: _Source, state: DropState, sha256: str) -> Drop:
    settled = source.settled
    return Drop(
        track=settled.track,
        role=settled.role,
        state=state,
        name_bytes=settled.name,
        name=_shown(settled),
        sha256=sha256,
        size_bytes=source.info.st_size,
        owner=name_of(source.info.st_uid),
        received_at=source.now,
    )


def _record(session: Session, drop: Drop, source: _Source, kinds: Sequence[FindingKind] = (), **detail: Any) -> None:
    """Add the drop, and an event with the file's identity, by which a file still in the inbox is recognised."""
    session.add(drop)
    session.flush()
    common = {"name": drop.name, "rows": drop.rows, "reason": drop.reason, "source": identity(source.info)}
    findings = {"kinds": [kind._asdict() for kind in kinds[:MOST_KINDS]], "warnings": []}
    detail = {"track": drop.track, "drop_id": drop.id, **common, **findings, **detail}
    record_event(session, f"drop_{drop.state}", source.now, **detail)


def _earlier(session: Session, source: _Source) -> _Recorded | None:
    """Return the record of this very file from before a crash, by its name and identity; `None` without any."""
    settled = source.settled
    same = select(Drop).where(Drop.track == settled.track, Drop.role == settled.role, Drop.name_bytes == settled.name)
    drop = session.exec(same.order_by(col(Drop.id).desc())).first()
    if drop is None:
        return None
    first = rows_of(session, Event, TAKEN_IN, drop=drop.id).first()
    if first is None or first.detail.get("source") != identity(source.info):
        return None
    return _Recorded(drop, first, None if drop.duplicate_of is None else session.get(Drop, drop.duplicate_of))
