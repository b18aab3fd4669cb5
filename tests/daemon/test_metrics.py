"""What Prometheus is told, held against the workspace that it is told of, and what dashboard and alerts stand on."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from daemon.metrics import CONTENT_TYPE, metrics_text
from daemon.settings.model import Settings
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


@pytest.fixture
def found(lived_in: Any) -> dict[Sample, float]:
    return read(metrics_text(lived_in.settings))


def test_the_queue_and_the_drops_are_counted_by_track_and_state(found: dict[Sample, float]) -> None:
    runs = {state: value(found, "runs", track="default", state=state) for state in ("running", "failed", "succeeded")}
    assert runs == {"running": 1, "failed": 1, "succeeded": 1}
    assert value(found, "runs", track="support", state="queued") == 0, "so that an alert sees the first one"
    drops = {state: value(found, "drops", track="default", state=state) for state in ("accepted", "rejected")}
    assert drops == {"accepted": 4, "rejected": 1}


def test_messages_are_counted_by_state(lived_in: Any) -> None:
    fields: dict[str, Any] = {"kind": "digest", "level": "info", "title": "t", "body": "b", "address": "ab12"}
    with transaction(lived_in.engine) as session:
        session.add(Message(**fields, created_at=1, not_before=1))
    found = read(metrics_text(lived_in.settings))
    assert {state: value(found, "messages", state=state) for state in ("pending", "sent")} == {"pending": 1, "sent": 0}


def test_the_run_in_hand_says_where_it_is(found: dict[Sample, float]) -> None:
    assert value(found, "run_stage", track="default", step="train") == 1
    names = ("progress_ratio", "loss", "dev_loss", "tokens_per_second", "eta_seconds", "memory_bytes")
    told = {name: value(found, f"run_{name}", track="default") for name in names}
    assert told == {
        "progress_ratio": 0.4,
        "loss": 0.5,
        "dev_loss": 0.6,
        "tokens_per_second": 250.0,
        "eta_seconds": 75.0,
        "memory_bytes": 2_300_000_000,
    }


def test_verdicts_gain_and_champion_are_those_of_the_database(lived_in: Any, found: dict[Sample, float]) -> None:
    assert value(found, "verdicts", track="default", outcome="promoted") == 1
    assert value(found, "last_gain_points", track="default") == 40.0
    assert value(found, "champion_generation", track="default") == 1
    since = value(found, "champion_since_timestamp_seconds", track="default")
    assert since is not None
    assert since < lived_in.now / 1000
    assert value(found, "champion_command_failed", track="default") == 0
    assert value(found, "step_seconds_count", track="default", step="prepare") == 3
    assert value(found, "step_seconds_sum", track="default", step="prepare") == 3 * 60


def test_the_machine_is_told_by_the_daemons_lock_and_the_state_folders_disk(
    lived_in: Any, found: dict[Sample, float]
) -> None:
    assert value(found, "up") == 0
    lock = FileLock(lived_in.settings.state_folder / "daemon.lock")
    assert lock.acquire()
    assert value(read(metrics_text(lived_in.settings)), "up") == 1
    lock.release()
    free = value(found, "disk_free_bytes")
    assert free is not None
    assert 0 < free <= shutil.disk_usage(lived_in.settings.state_folder).total
    assert value(found, "disk_low_water_bytes") == lived_in.settings.disk.low_water_bytes


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
