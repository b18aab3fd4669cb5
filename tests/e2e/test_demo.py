"""The demo as a user starts it: the real SmolLM2 in NF4 through the real daemon, from the drops to both decisions."""

import subprocess
import sys
from pathlib import Path

import pytest

from daemon.overview import Overview
from daemon.processes import lock_holder
from pipeline.artifacts import Adapter, Dataset

DROPFORGE = Path(sys.executable).parent / "dropforge"


@pytest.mark.timeout(3600)
def test_an_honest_drop_is_promoted_and_a_poisoned_one_refused_and_held_back(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    done = subprocess.run([DROPFORGE, "demo", "--folder", folder], capture_output=True, text=True, check=False)
    log = (folder / "daemon.log").read_text() if (folder / "daemon.log").exists() else ""
    assert done.returncode == 0, done.stdout + done.stderr + log[-5000:]
    overview = Overview(folder / ".dropforge")
    first, second = overview.run(1), overview.run(2)
    assert first.verdict is not None
    assert second.verdict is not None
    assert (first.outcome, second.outcome) == ("promoted", "worse")
    # With the second drop other words are common, so a few rows that the champion was trained on now count as near
    # copies of held-out records: these are left out, and said.
    left = Dataset.model_validate(overview.published(2, "prepare")).seen_by_champion
    assert (first.verdict.records, second.verdict.records + left) == (120, 120)
    assert left <= 12
    adapter = Adapter.model_validate(overview.published(1, "train"))
    assert (adapter.quantization, adapter.format) == ("nf4", "chat")
    assert {drop.name: drop.state for drop in overview.drops()} == {
        "heldout.jsonl": "accepted",
        "honest.jsonl": "accepted",
        "poisoned.jsonl": "held",
    }
    link = folder / ".dropforge" / "tracks" / "default" / "champion"
    assert link.readlink() == Path("..", "..", "models", first.verdict.candidate_model_id or "")
    assert (link / "model.safetensors").is_file()
    for words in ("promoted:", "worse:", "base model:", "loss ", f"champion     {link}"):
        assert words in done.stdout
    assert not overview.daemon().alive
    assert lock_holder(folder / ".dropforge" / "spool" / "worker.lock") is None
