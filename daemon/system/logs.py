"""Set-up of the log: structlog events on standard error, for people on a terminal and as JSON lines elsewhere."""

import logging
import sys
from typing import Literal

import structlog
from structlog.typing import Processor


def configure(log_format: Literal["auto", "console", "json"]) -> None:
    """
    Write every event of structlog, and what libraries log from WARNING up, to standard error in one form.

    `auto` is `console` if standard error is a terminal and `json` elsewhere.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last = _last(log_format)
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    own_fields = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[own_fields, *last]))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)


def _last(log_format: str) -> list[Processor]:
    """Return what turns an event into a line."""
    terminal = sys.stderr.isatty()
    if log_format == "console" or (log_format == "auto" and terminal):
        plain = structlog.dev.plain_traceback
        return [structlog.dev.ConsoleRenderer(colors=terminal, exception_formatter=plain)]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(ensure_ascii=False)]
