"""The alert rules, tried by Prometheus' own tool: when each fires, and when it does not."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from daemon.metrics import metrics_text

RULES = Path(__file__).parents[2] / "systemd" / "monitoring" / "alerts.yml"

pytestmark = pytest.mark.skipif(
    shutil.which("promtool") is None and "CI" not in os.environ, reason="it needs promtool (Debian: promtool)"
)


def promtool(*arguments: str, given: bytes = b"") -> str:
    done = subprocess.run(["promtool", *arguments], input=given, capture_output=True, check=False)
    words = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, words
    return words


def test_prometheus_reads_the_rules_and_finds_nothing_odd_in_the_metrics(lived_in: Any) -> None:
    assert "SUCCESS: 10 rules found" in promtool("check", "rules", str(RULES))
    assert promtool("check", "metrics", given=metrics_text(lived_in.settings)) == ""


def series(name: str, values: str, **labels: str) -> dict[str, str]:
    listed = ", ".join(f'{key}="{value}"' for key, value in {"instance": "box", **labels}.items())
    return {"series": f"dropforge_{name}{{{listed}}}", "values": values}


def runs(**values: str) -> list[dict[str, str]]:
    return [series("runs", value, track="default", state=state) for state, value in values.items()]


#: An alert, the series that it stands on (a value a minute), when it is looked at, and whether it fires then.
CASES = [
    ("DropforgeDown", [series("up", "0x10")], "4m", False),
    ("DropforgeDown", [series("up", "0x10")], "6m", True),
    ("DropforgeUnseen", [series("up", "1x2 _x40")], "40m", True),
    ("DropforgeUnseen", [series("up", "1x60")], "40m", False),
    ("DropforgeRunFailed", runs(failed="3x30 4x30"), "40m", True),
    ("DropforgeRunFailed", runs(failed="3x60"), "40m", False),
    ("DropforgeQueueStuck", runs(queued="1x300", running="0x300"), "200m", True),
    ("DropforgeQueueStuck", runs(queued="1x300", running="1x300"), "200m", False),
    (
        "DropforgeQueueStuck",
        [*runs(queued="1x300", running="0x300"), series("track_paused", "1x300", track="default")],
        "200m",
        False,
    ),
    ("DropforgeNoProgress", [series("run_progress_ratio", "0.5x200", track="default")], "180m", True),
    ("DropforgeNoProgress", [series("run_progress_ratio", "0+0.001x200", track="default")], "180m", False),
    ("DropforgeNoProgress", [series("run_progress_ratio", "_x150 0.5x50", track="default")], "180m", False),
    ("DropforgeDiskLow", [series("disk_free_bytes", "5x10"), series("disk_low_water_bytes", "9x10")], "6m", True),
    ("DropforgeDiskLow", [series("disk_free_bytes", "9x10"), series("disk_low_water_bytes", "9x10")], "6m", False),
    ("DropforgeCommandFailed", [series("champion_command_failed", "1x10", track="default")], "6m", True),
    ("DropforgeMessagesUnsent", [series("messages", "2x90", state="pending")], "70m", True),
    ("DropforgeMessagesUnsent", [series("messages", "2x90", state="sent")], "70m", False),
    (
        "DropforgeWaitsForApproval",
        [series("verdicts", "1x1500", track="default", outcome="awaiting_approval")],
        "1441m",
        True,
    ),
    ("DropforgeTrouble", [series("troubles", "1x60")], "31m", True),
]


def test_each_alert_fires_when_it_should_and_not_before(tmp_path: Path) -> None:
    tried = []
    for alert, given, at, fires in CASES:
        wanted = f'count(ALERTS{{alertname="{alert}", alertstate="firing"}}) or vector(0)'
        expected = [{"labels": "{}", "value": float(fires)}]
        query = {"expr": wanted, "eval_time": at, "exp_samples": expected}
        name = f"{alert} {at} {fires}"
        tried.append({"name": name, "interval": "1m", "input_series": given, "promql_expr_test": [query]})
    # YAML reads what JSON writes.
    path = tmp_path / "case.yml"
    path.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tried}))
    promtool("test", "rules", str(path))


def test_every_alert_is_tried() -> None:
    tried = {alert for alert, _, _, fires in CASES if fires}
    written = RULES.read_text(encoding="utf-8")
    assert {line.split()[-1] for line in written.splitlines() if "- alert: " in line} == tried
    assert written.count("summary: ") == written.count("description: ") == len(tried)
