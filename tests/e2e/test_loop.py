"""The whole loop through the real daemon, its worker and real steps, on a tiny model that really learns."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from daemon.state.clauses import verdict_clauses
from daemon.state.states import DropState
from daemon.system.processes import lock_holder
from pipeline import durable
from pipeline.decide.explain import sentence
from tests import walk
from tests.state_listing import unlisted

WALK = Path(__file__).parents[2].joinpath("docs", "walk.md").read_text(encoding="utf-8")
TRAINER = ("pipeline", "train")


@pytest.mark.timeout(300)
def test_a_dropped_file_ends_in_a_promotion_and_its_copy_is_a_duplicate(
    workspace: Any, tiny: Any, tiny_llama: Path
) -> None:
    workspace.start()
    (workspace.inbox / "bad.jsonl").write_text('{"instruction": "x", "input": "", "outputs": "y"}\n')
    workspace.drop("good.jsonl", tiny.rows(400, seed=1))
    workspace.wait(lambda: {drop.state for drop in workspace.drops()} == {"accepted", "rejected"})
    workspace.wait_for_runs("succeeded")
    run = workspace.runs()[0]
    assert run.outcome == "promoted", run.verdict
    link = workspace.state / "tracks" / "default" / "champion"
    verdict = workspace.published(1, "decide")
    assert link.resolve().name == verdict["candidate_model_id"]
    assert (workspace.state / "tracks" / "default" / "previous").resolve() == tiny_llama.resolve()
    findings = durable.read_json(workspace.inbox / "rejected" / "bad.jsonl.errors.json")
    assert any("output" in str(finding) for finding in findings["findings"])
    assert not (workspace.inbox / "good.jsonl").exists()
    workspace.drop("again.jsonl", tiny.rows(400, seed=1))
    workspace.wait(lambda: [drop.state for drop in workspace.drops()][-1] == "duplicate")
    # The row is committed first, then the file leaves the inbox.
    workspace.wait((workspace.inbox / "done" / "again.jsonl").exists)
    receipts = {path.name for path in (workspace.inbox / "done").iterdir()}
    assert {"good.jsonl", "again.jsonl"} <= receipts
    note, readme = workspace.inbox / "done" / "good.jsonl.verdict.txt", workspace.inbox / "README.txt"
    workspace.wait(lambda: note.exists() and "In use: the model that serves was trained on it." in note.read_text())
    assert f"Run 1 was trained on it, and its model was {sentence(verdict_clauses(run))}." in note.read_text()
    assert "This is the inbox of track default" in readme.read_text()
    shown = workspace.cli("status")
    assert [line.split()[2:4] for line in shown.splitlines() if "good.jsonl" in line] == [["accepted", "400"]]
    assert workspace.stop() == 0
    assert len(workspace.runs()) == 1
    assert workspace.processes() == []
    assert unlisted(workspace.state) == []
    assert walk.shape(walk.render(workspace.folder)) == walk.shape(WALK), "docs/walk.md is old: make walk"


@pytest.mark.long
@pytest.mark.timeout(600)
def test_runs_survive_a_killed_daemon_a_stop_and_a_killed_worker(workspace: Any, tiny: Any) -> None:
    rows = tiny.rows(600, seed=5)
    workspace.start()
    for number in range(5):
        workspace.drop(f"first{number}.jsonl", rows[80 * number : 80 * number + 80])
    workspace.wait_for_step(1, "train", 2)
    assert len(workspace.runs()[0].snapshot) == 5, "five drops make one run"
    workspace.kill()
    workspace.start()
    for number in range(5):
        workspace.drop(f"second{number}.jsonl", rows[400 + 40 * number : 440 + 40 * number])
    workspace.wait(lambda: len(workspace.drops()) == 10)
    workspace.wait(lambda: workspace.processes(*TRAINER))
    assert workspace.stop() == 0
    assert [run.state for run in workspace.runs()] == ["waiting", "queued"]
    # The step of the killed daemon may still be writing its checkpoint.
    workspace.wait(lambda: workspace.processes() == [])
    workspace.start()
    most = 0

    def is_trained(run: int) -> bool:
        nonlocal most
        found = workspace.processes(*TRAINER)
        # What a trainer starts, to ask about the processor, has its command line until it becomes another program.
        most = max(most, len([process for process in found if parent(process) not in found]))
        return bool((workspace.state / "runs" / str(run) / "train.json").exists())

    workspace.wait(lambda: is_trained(1))
    workspace.wait_for_step(2, "train", 3)
    worker = lock_holder(workspace.state / "spool" / "worker.lock")
    assert worker
    os.kill(worker, signal.SIGKILL)
    # What follows a training, the first run has shown.
    workspace.wait(lambda: is_trained(2))
    assert most == 1, "never two trainers at once"
    first, second = workspace.runs()
    assert first.ended_at <= second.started_at
    assert (len(first.snapshot), len(second.snapshot), first.failures, first.outcome) == (5, 10, 0, "promoted")
    assert workspace.published(1, "train")["resumed_from_step"] > 0
    assert workspace.published(2, "train")["resumed_from_step"] > 0
    assert {drop.state for drop in workspace.drops()} == {DropState.ACCEPTED}
    assert [row.run_id for row in workspace.done_promotions()][:1] == [1]
    assert workspace.stop() == 0
    assert workspace.processes() == []


def parent(process: int) -> int:
    """Return the process that started another one, 0 if that is gone."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    except OSError:
        return 0


@pytest.mark.timeout(120)
def test_a_second_daemon_on_the_same_state_folder_is_refused(workspace: Any) -> None:
    workspace.start()
    workspace.cli("run", code=1)
    assert workspace.stop() == 0
