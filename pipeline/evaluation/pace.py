"""How far one model's part of an evaluation is, and how fast it goes."""

import time

from pipeline.contract import Attempt


class Pace:
    """Says how far one model's part is, and stops between batches when the step is to stop."""

    def __init__(self, attempt: Attempt, phase: str, total: int) -> None:
        """Begin a phase of `total` records; raises `Interrupted`."""
        self._attempt, self._phase, self._total = attempt, phase, total
        self._started = time.monotonic()
        self._generating_since: float | None = None
        self._done = self._skipped = self._tokens = 0
        attempt.check_stop()
        attempt.progress(0, total, phase=phase)

    def skip(self, records: int) -> None:
        """Count `records` that an earlier attempt had done."""
        self._done += records
        self._skipped += records
        self._attempt.progress(self._done, self._total, phase=self._phase)

    def advance(self, records: int, tokens: int) -> None:
        """Count one batch of `records` in which `tokens` were generated; raises `Interrupted`."""
        now = time.monotonic()
        rate = None
        if tokens:
            self._tokens += tokens
            rate = self._tokens / max(now - (self._generating_since or self._started), 1e-9)
        else:
            self._generating_since = now
        self._done += records
        left = (now - self._started) / (self._done - self._skipped) * (self._total - self._done)
        self._attempt.progress(self._done, self._total, phase=self._phase, tokens_per_second=rate, eta_seconds=left)
        self._attempt.check_stop()
