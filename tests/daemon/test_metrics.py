"""What Prometheus is told, held against the workspace that it is told of, and what dashboard and alerts stand on."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from daemon.metrics import CONTENT_TYPE, metrics_text
from daemon.settings.model import Settings
from daemon.settings.sections import ExecutorSettings
from daemon.state.database import transaction
from daemon.state.tables import Message
from daemon.system.processes import FileLock
from daemon.web.server import make_app

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "systemd" / "monitoring"
Sample = tuple[str, frozenset[tuple[str, str]]]


def read(text: bytes) -> dict[Sample, float]:
    """Read a text as Prometheus does."""
    families = text_string_to_metric_families(text.decode())
    return {(one.name, frozenset(one.labels.items())): one.value for family in families for one in family.samples}


def value(found: dict[Sample, float], name: str, **labels: str) -> float | None:
    return found.get((f"dropforge_{name}", frozenset(labels.items())))


#: What the workspace comes to: the name of a metric, its labels, its value.
VALUES: list[tuple[str, dict[str, str], float]] = [
    *[("runs", {"track": "default", "state": state}, 1) for state in ("running", "failed", "succeeded")],
    ("runs", {"track": "support", "state": "queued"}, 0),  # so that an alert sees the first one
    ("drops", {"track": "default", "state": "accepted"}, 4),
    ("drops", {"track": "default", "state": "rejected"}, 1),
    ("messages", {"state": "pending"}, 1),
    ("messages", {"state": "sent"}, 0),
    ("run_stage", {"track": "default", "step": "train"}, 1),
    ("run_progress_ratio", {"track": "default"}, 0.4),
    ("run_loss", {"track": "default"}, 0.5),
    ("run_dev_loss", {"track": "default"}, 0.6),
    ("run_tokens_per_second", {"track": "default"}, 250.0),
    ("run_eta_seconds", {"track": "default"}, 75.0),
    ("run_memory_bytes", {"track": "default"}, 2_300_000_000),
    ("verdicts", {"track": "default", "outcome": "promoted"}, 1),
    ("last_gain_points", {"track": "default"}, 40.0),
    ("champion_generation", {"track": "default"}, 1),
    ("champion_command_failed", {"track": "default"}, 0),
    ("step_seconds_count", {"track": "default", "step": "prepare"}, 3),
    ("step_seconds_sum", {"track": "default", "step": "prepare"}, 3 * 60),
    ("up", {}, 0),
]


def test_each_value_is_that_of_the_workspace(lived_in: Any) -> None:
    fields: dict[str, Any] = {"kind": "digest", "level": "info", "title": "t", "body": "b", "address": "ab12"}
    with transaction(lived_in.engine) as session:
        session.add(Message(**fields, created_at=1, not_before=1))
    found = read(metrics_text(lived_in.settings))
    assert [(name, labels, value(found, name, **labels)) for name, labels, _ in VALUES] == VALUES
    since = value(found, "champion_since_timestamp_seconds", track="default")
    assert since is not None
    assert since < lived_in.now / 1000


def test_the_machine_is_told_by_the_daemons_lock_and_the_state_folders_disk(lived_in: Any) -> None:
    lock = FileLock(lived_in.settings.state_folder / "daemon.lock")
    assert lock.acquire()
    found = read(metrics_text(lived_in.settings))
    assert value(found, "up") == 1
    lock.release()
    free = value(found, "disk_free_bytes")
    assert free is not None
    assert 0 < free <= shutil.disk_usage(lived_in.settings.state_folder).total
    assert value(found, "disk_low_water_bytes") == lived_in.settings.disk.low_water_bytes


@pytest.mark.parametrize("full", ["state", "shared"])
def test_of_two_disks_the_fuller_is_measured_as_either_stops_all_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    for name in ("state", "shared"):
        (tmp_path / name).mkdir()
    sizes = {tmp_path / "state": 5, tmp_path / "shared": 5, tmp_path / full: 2}
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=sizes[path], f_frsize=10**9))
    settings = Settings(state=str(tmp_path / "state"), executor=ExecutorSettings(shared=str(tmp_path / "shared")))
    assert value(read(metrics_text(settings)), "disk_free_bytes") == 2 * 10**9


def test_before_a_daemon_ever_ran_there_is_the_machine_alone(tmp_path: Path) -> None:
    settings = Settings(inbox=str(tmp_path / "inbox"), state=str(tmp_path / "state"))
    found = read(metrics_text(settings))
    assert value(found, "up") == 0
    assert not [name for name, _ in found if name.startswith("dropforge_run")]
    assert not (tmp_path / "state").exists()


def test_no_label_names_a_file_or_a_row(new_workspace: Callable[[], Any]) -> None:
    made = new_workspace()
    made.take('evil"} 1\n# HELP x.jsonl'.replace("\n", "_"), '{"instruction": "SECRET", "output": "b"}\n')
    made.take("SECRET.jsonl", '{"instruction": "SECRET"}\n')
    text = metrics_text(made.settings).decode()
    assert "SECRET" not in text
    assert "evil" not in text
    labels = {name for _, labels in read(text.encode()) for name, _ in labels}
    assert labels <= {"track", "state", "step", "outcome", "version", "quantile"}


def test_command_and_page_give_the_same_text(lived_in: Any, dropforge: Callable[..., Any]) -> None:
    done = dropforge("metrics")
    assert done.code == 0
    ours = read(metrics_text(lived_in.settings)).keys()
    assert read(done.out.encode()).keys() == ours
    answer = TestClient(make_app(lived_in.settings, "t" * 43), base_url="http://127.0.0.1:8765").get("/metrics")
    assert (answer.status_code, answer.headers["content-type"]) == (200, CONTENT_TYPE)
    assert read(answer.content).keys() == ours


# --- dashboard and alerts


def named() -> dict[str, set[str]]:
    """Return the metrics that dashboard and alert rules name, by the file that does."""
    files = {path.name: path.read_text(encoding="utf-8") for path in MONITORING.iterdir()}
    return {name: set(re.findall(r"\bdropforge_\w+", text)) for name, text in files.items()}


def test_each_metric_that_dashboard_and_alerts_name_is_there(lived_in: Any) -> None:
    families = list(text_string_to_metric_families(metrics_text(lived_in.settings).decode()))
    there = {family.name for family in families} | {one.name for family in families for one in family.samples}
    for name, metrics in named().items():
        assert metrics, name
        assert metrics - there == set(), name
    shown = named()["dashboard.json"]
    ours = {one.name for family in families for one in family.samples}
    assert ours - shown <= {"dropforge_build_info", "dropforge_run_eta_seconds"}
