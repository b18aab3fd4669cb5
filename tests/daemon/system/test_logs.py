"""The log of a process."""

import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import logging, structlog
from daemon.cli.service import configure_logs
configure_logs()
structlog.get_logger().warning("of our own")
logging.getLogger("library").warning("of a library")
raise SystemExit(7)
"""


def test_a_log_that_cannot_be_written_does_not_change_how_a_process_ends() -> None:
    with Path("/dev/full").open("w") as full:
        assert subprocess.run((sys.executable, "-c", _PROGRAM), stderr=full, check=False).returncode == 7
    told = subprocess.run((sys.executable, "-c", _PROGRAM), stderr=subprocess.PIPE, check=False).stderr.decode()
    assert [line for line in ("of our own", "of a library") if line not in told] == []
