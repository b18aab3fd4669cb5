import os
import shutil

#: Where a test machine must have them, their absence is an error.
_POSSIBLE = os.geteuid() == 0 and shutil.which("systemd-nspawn") is not None
collect_ignore_glob = [] if _POSSIBLE or "CI" in os.environ else ["test_*.py"]


def pytest_report_header() -> str:
    return "tests/systemd: not run, it needs root and systemd-nspawn (systemd-container)" if collect_ignore_glob else ""
