"""A workspace with a champion that a run made."""

from pathlib import Path

import pytest

from tests.chaos.house import START, Daemon, build, records


@pytest.fixture
def promoted(tmp_path: Path) -> Daemon:
    """The daemon of a workspace in `tmp_path` whose first run was promoted."""
    build(tmp_path)
    (tmp_path / "inbox" / "a.jsonl").write_bytes(records("a"))
    daemon = Daemon(tmp_path, START)
    daemon.take_in(START)
    daemon.finish_runs(START, "promoted")
    return daemon
