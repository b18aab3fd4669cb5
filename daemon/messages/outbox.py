"""
The outbox, the only writer of table `message`, and the thread that sends what is in it.

Events become messages in one transaction with a cursor, each once.

A row is one message to one address. Messages to an address are sent in order, so an address that does not answer
delays only its own messages. A try is counted before it is made. A trouble that lasts becomes one message a day.
"""

import threading
import time
from collections.abc import Callable, Mapping

import structlog
from sqlalchemy import Engine, func
from sqlalchemy.exc import DBAPIError
from sqlmodel import Session, col, select

from daemon.messages import delivery
from daemon.messages.digest import digest_due, digest_text
from daemon.messages.texts import Text, inert, text_of
from daemon.settings.model import Settings
from daemon.settings.sections import SecretUrl
from daemon.state.database import ChangeWatch, transaction
from daemon.state.states import MessageState
from daemon.state.tables import Event, Message, Outbox
from daemon.state.troubles import Troubles
from daemon.storage.disk import is_full
from daemon.system.clock import now_ms
from pipeline.errors import DropforgeError
from pipeline.words import count

#: Most events handled in one transaction.
_MOST = 200
#: Most messages of one kind to an address within an hour: a folder of bad files must not drown other messages.
MOST_AN_HOUR = 10
HOUR_MS = 3_600_000
WEEK_MS = 7 * 24 * HOUR_MS
_DAY_MS = 24 * HOUR_MS
_FIRST_PAUSE_MS, _LONGEST_PAUSE_MS = 15_000, 600_000
_TICK_SECONDS = 2.0
#: Seconds after which the outbox is read even if the database is unchanged: a retry or the digest may be due.
_LOOK_SECONDS = 15.0
_PENDING = select(Message).where(Message.state == MessageState.PENDING)
_GONE = "its address is not in the settings any more"
log = structlog.get_logger()


def open_outbox(engine: Engine, settings: Settings, now: int) -> None:
    """
    If addresses are set, create the cursor at the latest event, unless there is one; if none are set, delete it.

    So the first address that is set gets no messages about old events. Pending messages to an address that is not in
    the settings any more are given up.
    """
    addresses = _addresses(settings)
    with transaction(engine) as session:
        outbox = session.get(Outbox, 1)
        if outbox is None and addresses:
            last = session.exec(select(func.max(Event.id))).one() or 0
            session.add(Outbox(id=1, event_id=last, digest_event_id=last, digest_at=now))
        elif outbox is not None and not addresses:
            session.delete(outbox)
        for message in session.exec(_PENDING.where(col(Message.address).not_in(addresses))).all():
            _end(message, MessageState.GIVEN_UP, now, _GONE)


def collect(engine: Engine, settings: Settings, now: int) -> bool:
    """
    Write messages about the next 200 events at most, and the digest if it is due; return whether events may remain.

    Call `open_outbox` before. Nothing is sent. The digest waits while events remain. At most ten messages of one kind
    per hour are written to an address, the others are omitted.
    """
    with transaction(engine) as session:
        outbox = session.get_one(Outbox, 1)
        events = session.exec(
            select(Event).where(col(Event.id) > outbox.event_id).order_by(col(Event.id)).limit(_MOST)
        ).all()
        for event in events:
            _put(session, settings, _worded(text_of, session, event), event.id, now)
        if events:
            outbox.event_id = events[-1].id or 0
        outbox.digest_at = min(outbox.digest_at, now)  # the clock was ahead and was set back since
        due = digest_due(settings, outbox.digest_at, now)
        if due is not None and len(events) < _MOST:
            digest = _worded(digest_text, session, settings, outbox.digest_event_id, outbox.digest_at)
            _put(session, settings, digest, None, now)
            outbox.digest_at, outbox.digest_event_id = due, outbox.event_id
        return len(events) == _MOST


def tell_troubles(engine: Engine, settings: Settings, troubles: Mapping[str, str], now: int) -> None:
    """Write a message to each address about each of `troubles`, {name: sentence}, but about a name once in 24 hours."""
    for whose, words in troubles.items():
        title = f"[dropforge] TROUBLE: {inert(whose)}"
        text = Text("trouble", "warning", title, f"{inert(words)}\nmore: dropforge status")
        with transaction(engine) as session:
            today = (Message.title == title, col(Message.created_at) > now - _DAY_MS)
            if not session.exec(select(func.count()).select_from(Message).where(*today)).one():
                _put(session, settings, text, None, now)


def take(engine: Engine, address: str, now: int) -> Message | None:
    """
    Return the oldest pending message to an address, and count the try; `None` if there is none or it is not due yet.

    It is returned again after a pause, which grows from 15 s to ten minutes, until `record_sent` is called for it. A
    message older than a week whose sending has failed is given up, and the next message takes its place.
    """
    first = _PENDING.where(Message.address == address).order_by(col(Message.id)).limit(1)
    with transaction(engine) as session:
        while (message := session.exec(first).first()) is not None:
            if message.error and message.created_at < now - WEEK_MS:
                _end(message, MessageState.GIVEN_UP, now, message.error)
                session.flush()
                continue
            # A later time was set by a clock that was ahead.
            if now < message.not_before <= now + _LONGEST_PAUSE_MS:
                return None
            message.not_before = now + min(_FIRST_PAUSE_MS << min(message.tries, 16), _LONGEST_PAUSE_MS)
            message.tries += 1
            return message
    return None


def record_sent(engine: Engine, number: int, now: int) -> None:
    """Record that the message with id `number` was sent, so that `take` returns the next one."""
    with transaction(engine) as session:
        _end(session.get_one(Message, number), MessageState.SENT, now, None)


def record_failure(engine: Engine, number: int, error: str) -> None:
    """Record why the message with id `number` could not be sent; it stays pending, and `take` returns it again."""
    with transaction(engine) as session:
        session.get_one(Message, number).error = error


def trouble(engine: Engine, address: str, now: int) -> str | None:
    """Return words on the messages to an address that cannot be sent or were given up in the last week, else `None`."""
    here = Message.address == address
    lost = (Message.state == MessageState.GIVEN_UP, col(Message.ended_at) > now - WEEK_MS, Message.error != _GONE)
    with transaction(engine) as session:
        first = session.exec(_PENDING.where(here).order_by(col(Message.id)).limit(1)).first()
        waiting = session.exec(select(func.count()).where(here, Message.state == MessageState.PENDING)).one()
        given_up = session.exec(select(func.count()).where(here, *lost)).one()
    words = []
    if first is not None and first.error:
        words.append(f"{count(waiting, 'message')} cannot be sent: {first.error}; to try: dropforge messages --test")
    if given_up:
        words.append(f"{count(given_up, 'message')} could not be sent for a week: dropforge messages")
    return "; ".join(words) or None


def _worded(word: Callable[..., Text | None], *about: object) -> Text | None:
    """Return `word(*about)`; log an exception and return `None`, but raise an error of the database."""
    try:
        return word(*about)
    except DBAPIError:
        raise
    except Exception:
        log.exception("message_not_worded")
        return None


def _put(session: Session, settings: Settings, text: Text | None, event: int | None, now: int) -> None:
    """Add a pending message per address, at most ten of a kind per hour; none if `text` is `None`."""
    if text is None:
        return
    for address in _addresses(settings):
        hour = (Message.kind == text.kind, col(Message.created_at) > now - HOUR_MS, Message.address == address)
        written = session.exec(select(func.count()).select_from(Message).where(*hour)).one()
        if written >= MOST_AN_HOUR:
            continue
        last = written == MOST_AN_HOUR - 1
        body = f"{text.body}\nfurther ones within the hour: dropforge status" if last else text.body
        fields = {**text._asdict(), "body": body, "event_id": event, "address": address}
        session.add(Message(**fields, created_at=now, not_before=now))
        session.flush()


def _end(message: Message, state: MessageState, now: int, error: str | None) -> None:
    message.state, message.ended_at, message.error = state, now, error


def _addresses(settings: Settings) -> list[str]:
    return [url.address for url in settings.messages.urls]


class Messenger:
    """Sends the messages of the outbox, in order per address, until `finish`."""

    def __init__(self, engine: Engine, settings: Settings, troubles: Troubles) -> None:
        """Send to the addresses of `settings`; record errors of an address in `troubles`."""
        self._engine = engine
        self._settings = settings
        self._troubles = troubles
        self._changes = ChangeWatch(engine)
        self._looked_at = -float("inf")
        #: Messages (by address) sent but not recorded, as the database could not be written: not sent again here.
        self._unnoted: dict[str, int] = {}
        self._stop = threading.Event()
        # A daemon thread: a failing daemon must not wait for it, and the outbox keeps unsent messages.
        self._thread = threading.Thread(target=self._run, name="messenger", daemon=True)

    def start(self, now: int) -> None:
        """Call `open_outbox` at `now` (ms), and if there is an address, start the thread that calls `turn`."""
        open_outbox(self._engine, self._settings, now)
        if self._settings.messages.urls:
            self._thread.start()

    def finish(self) -> None:
        """Stop the thread after the message that is being sent, and wait for it; the next daemon sends the others."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def turn(self, now: int) -> None:
        """
        Turn new events and lasting troubles into messages and send those due at `now` (ms), after `open_outbox`.

        A message that cannot be sent is noted as trouble, and a later call sends it again. Database errors are raised.
        """
        while collect(self._engine, self._settings, now):
            pass
        tell_troubles(self._engine, self._settings, self._troubles.lasting, now)
        for number, url in enumerate(self._settings.messages.urls, 1):
            while not self._stop.is_set() and self._sends_one(url, now):
                pass
            # By number: two addresses of one service look the same without their secrets.
            whose, words = f"address {number} of messages, {url}", trouble(self._engine, url.address, now)
            if words is None:
                self._troubles.clear(whose)
            else:
                self._troubles.note(whose, DropforgeError(words))

    def _sends_one(self, url: SecretUrl, now: int) -> bool:
        """Send the next due message (if the last one is recorded), record the result; return whether one was sent."""
        if url.address not in self._unnoted:
            message = take(self._engine, url.address, now)
            if message is None:
                return False
            number = message.id or 0
            error = delivery.send(url.get_secret_value(), message.title, message.body, message.level)
            if error is not None:
                record_failure(self._engine, number, error)
                log.warning("message_not_sent", message=number, address=str(url), error=error)
                return False
            self._unnoted[url.address] = number
        number = self._unnoted[url.address]
        record_sent(self._engine, number, now)
        del self._unnoted[url.address]
        log.info("message_sent", message=number, address=str(url))
        return True

    def _run(self) -> None:
        while not self._stop.wait(_TICK_SECONDS):
            try:
                if self._changes.changed() or time.monotonic() - self._looked_at >= _LOOK_SECONDS:
                    self._looked_at = time.monotonic()
                    self.turn(now_ms())
            except Exception as error:  # a full disk or a locked database passes
                if is_full(error):
                    log.warning("disk_full", error=str(error))
                else:
                    log.exception("messages_trouble")
