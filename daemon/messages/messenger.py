"""The thread that sends the messages of the outbox."""

import threading
import time

import structlog
from sqlalchemy import Engine

from daemon.messages import delivery, outbox
from daemon.messages.delivery import NotSent
from daemon.settings.messages import SecretUrl
from daemon.settings.model import Settings
from daemon.state.database import ChangeWatch
from daemon.state.troubles import Troubles
from daemon.storage.disk import is_full
from daemon.system.clock import now_ms
from pipeline.errors import DropforgeError

_TICK_SECONDS = 2.0
#: Seconds after which the outbox is read even if the database is unchanged: a retry or the digest may be due.
_LOOK_SECONDS = 15.0
log = structlog.get_logger()


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
        """Call `outbox.open_outbox` at `now` (ms), and start the thread that sends messages if there is an address."""
        outbox.open_outbox(self._engine, self._settings, now)
        if self._settings.messages.urls:
            self._thread.start()

    def finish(self) -> None:
        """Stop the thread after the message that is being sent, and wait for it; the next daemon sends the others."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def turn(self, now: int) -> None:
        """
        Turn new events and lasting troubles into messages and send those due at `now` (ms), after `outbox.open_outbox`.

        A message that cannot be sent is noted as trouble, and a later call sends it again. Database errors are raised.
        """
        while outbox.collect(self._engine, self._settings, now):
            pass
        outbox.tell_troubles(self._engine, self._settings, self._troubles.lasting, now)
        for number, url in enumerate(self._settings.messages.urls, 1):
            while not self._stop.is_set() and self._sends_one(url, now):
                pass
            # By number: two addresses of one service look the same without their secrets.
            whose, words = f"address {number} of messages, {url}", outbox.trouble(self._engine, url.address, now)
            if words is None:
                self._troubles.clear(whose)
            else:
                self._troubles.note(whose, DropforgeError(words))

    def _sends_one(self, url: SecretUrl, now: int) -> bool:
        """Send the next due message to an address; return whether one was sent, so that another may be due."""
        unnoted = self._unnoted.get(url.address)
        if unnoted is not None:
            self._note(url, unnoted, now)
            return True
        message = outbox.take(self._engine, url.address, now)
        if message is None:
            return False
        number = message.id or 0
        try:
            delivery.send(url.get_secret_value(), message.title, message.body, message.level)
        except NotSent as error:
            outbox.record_failure(self._engine, number, str(error))
            log.warning("message_not_sent", message=number, address=str(url), error=str(error))
            return False
        self._unnoted[url.address] = number
        self._note(url, number, now)
        return True

    def _note(self, url: SecretUrl, number: int, now: int) -> None:
        outbox.record_sent(self._engine, number, now)
        del self._unnoted[url.address]
        log.info("message_sent", message=number, address=str(url))

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
