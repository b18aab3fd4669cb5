"""Log configuration: structlog events on standard error, in colour on a terminal and as JSON lines elsewhere."""

import contextlib
import logging
import os
import sys
from typing import TextIO, cast

import structlog
from structlog.typing import Processor


class _Stderr:
    """Standard error without a buffer. A log that cannot be written, as on a full disk, ends nothing."""

    def write(self, line: str) -> None:
        with contextlib.suppress(OSError):
            os.write(2, line.encode(errors="backslashreplace"))

    def flush(self) -> None:
        """Do nothing."""


def configure() -> None:
    """
    Log structlog events (from INFO) and libraries' logs (from WARNING) to stderr: colour on a terminal, or JSON.

    A line that cannot be written is dropped.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last, stderr = _last(), _Stderr()
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", stderr)),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stderr)
    own_fields = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[own_fields, *last]))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)


def _last() -> list[Processor]:
    """Return the processors that render an event as a line: in colour on a terminal, as JSON elsewhere."""
    if sys.stderr.isatty():
        return [structlog.dev.ConsoleRenderer(colors=True, exception_formatter=structlog.dev.plain_traceback)]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(ensure_ascii=False)]
