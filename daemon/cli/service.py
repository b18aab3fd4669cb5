"""`run`, `worker` and `web`: the processes that run until they are stopped, and their logs on standard error."""

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, TextIO, cast

import structlog
import typer
from structlog.typing import Processor

from daemon.cli.output import print_line
from daemon.cli.workspace import config_path, load_settings, refuse_missing
from daemon.settings.model import SettingsError
from daemon.system import processes
from daemon.system.folders import StateFolder, WorkFolder
from pipeline.errors import DropforgeError


def run(context: typer.Context) -> None:
    """
    Run the daemon until Ctrl-C or SIGTERM.

    It watches the inbox, trains on what is dropped there, judges the model that comes out, and promotes or refuses it.
    It does not start if a package or program that the settings need is missing: dropforge config check.
    """
    from daemon import service  # noqa: PLC0415 - a quick start for the other commands

    processes.close_to_others()
    settings = load_settings(context, as_owner=False)
    try:
        refuse_missing(context, settings)
    except SettingsError as error:  # unlike wrong settings it may come, with a mount: the service is started again
        raise DropforgeError(error.message, error.hint) from error
    configure_logs()
    raise typer.Exit(service.run(settings, config_path(context)))


def worker(  # noqa: PLR0913 - each is an option
    context: typer.Context,
    *,
    state: Annotated[
        Path | None, typer.Option("--state", metavar="DIR", help="The state folder; else that of the settings.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option("--work", metavar="DIR", help="The folder of runs and models; else the state folder.")
    ] = None,
    parallel: Annotated[
        int | None, typer.Option("--parallel", metavar="N", min=1, help="Most steps at once; else as the settings say.")
    ] = None,
    lifeline: Annotated[bool, typer.Option("--lifeline", help="End when standard input closes.", hidden=True)] = False,
    one: Annotated[
        tuple[str, str] | None, typer.Option("--one", help="Key and fence of the attempt to run alone.", hidden=True)
    ] = None,
) -> None:
    """
    Run the steps that the daemon orders.

    Until SIGTERM or Ctrl-C; another worker of the same state folder must have ended first. The daemon starts it, or
    with worker = "separate" another unit of systemd.
    """
    from daemon.dispatch import attempt  # noqa: PLC0415
    from daemon.dispatch import worker as room  # noqa: PLC0415

    processes.close_to_others()  # the judge's key is in its environment
    settings = load_settings(context, as_owner=False) if state is None else None
    configure_logs()
    if settings is not None:
        folder, runs, most = settings.state_folder, settings.work_folder, settings.executor.parallel_here
    else:
        folder, runs, most = StateFolder(state or Path()), WorkFolder(work or state or Path()), 1
    if one is not None:
        attempt.serve_one(runs, *one)
        return
    raise typer.Exit(room.serve(folder, runs, with_lifeline=lifeline, parallel=parallel or most))


def web(
    context: typer.Context,
    *,
    url: Annotated[bool, typer.Option("--url", help="Print the address alone, as of the page that runs already.")] = (
        False
    ),
    lifeline: Annotated[bool, typer.Option("--lifeline", help="End when standard input closes.", hidden=True)] = False,
) -> None:
    """
    Serve the web page until Ctrl-C, with or without a daemon.

    web.listen says where. Whoever has the address that is printed may change everything: keep it to yourself. With
    --url it is only printed, and nothing is served.
    """
    from daemon.web import server  # noqa: PLC0415 - the daemon and its worker load no web server
    from daemon.web.security import load_token  # noqa: PLC0415

    settings = load_settings(context)
    address, token = settings.web.address, load_token(settings.state_folder)
    if url:
        print_line(server.address_words(address, token))
        return
    configure_logs()
    listening = server.listen(address)
    if not lifeline:  # the daemon's log is for others to read
        port = address.port or (0 if address.socket else listening.getsockname()[1])
        print_line(f"the page of {settings.state}: {server.address_words(address._replace(port=port), token)}")
    server.serve(settings, listening, with_lifeline=lifeline)


class _Stderr:
    """Standard error without a buffer. A log that cannot be written, as on a full disk, ends nothing."""

    def write(self, line: str) -> None:
        with contextlib.suppress(OSError):
            os.write(2, line.encode(errors="backslashreplace"))

    def flush(self) -> None:
        """Do nothing."""


def configure_logs() -> None:
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
