"""An attempt that is asked to stop in the middle of a training, as its worker would ask it."""

from typing import Any

from pipeline.contract import Attempt


class StoppedAfter(Attempt):
    """It is asked when it reports a step: its checkpoint is that of the next one."""

    step = 0

    def progress(self, done: int, total: int, **fields: Any) -> None:
        """Report, and ask."""
        super().progress(done, total, **fields)
        if fields.get("loss") is not None and done >= self.step:
            self.stop.set()
