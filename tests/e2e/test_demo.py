"""
The demo as a user starts it: the real SmolLM2 in NF4 through the real daemon, from the drops to both decisions.

What the model learns differs from processor to processor: here only that all follows from the verdicts, whatever these
are. That the poison is refused is for the demo itself to say, and for `make prove`, which runs it.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from daemon.cli.demo.command import unexpected
from daemon.system.processes import lock_holder
from daemon.views.overview import Overview
from pipeline.artifacts import Adapter, Dataset

DROPFORGE = Path(sys.executable).parent / "dropforge"


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_two_drops_are_trained_judged_and_end_as_their_verdicts_say(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    done = subprocess.run([DROPFORGE, "demo", "--folder", folder], capture_output=True, text=True, check=False)
    log = (folder / "daemon.log").read_text() if (folder / "daemon.log").exists() else ""
    overview = Overview(folder / ".dropforge")
    # A third one is at most begun: it tries the new drop alone.
    runs = [overview.run(run.id) for run in reversed(overview.runs())][:2]
    verdicts = [run.verdict for run in runs if run.verdict is not None]
    assert len(verdicts) == 2, done.stdout + done.stderr + log[-5000:]
    problems = unexpected(overview, *runs)
    assert (done.returncode, [word for word in problems if word not in done.stderr]) == (1 if problems else 0, [])
    # With the second drop other words are common, so a few rows that the champion was trained on now count as near
    # copies of held-out records: these are left out, and said.
    left = Dataset.model_validate(overview.published(2, "prepare")).seen_by_champion
    assert [verdicts[0].records, verdicts[1].records + left] == [120, 120]
    adapter = Adapter.model_validate(overview.published(1, "train"))
    assert adapter.format == "chat"
    assert adapter.peak_memory_bytes > 0 < sum(adapter.estimated_memory.values())
    on_trial = [drop.name for drop in overview.drops() if drop.on_trial]
    assert on_trial == ["poisoned.jsonl"] * verdicts[1].blames_new_drops
    link = folder / ".dropforge" / "tracks" / "default" / "champion"
    winners = [one.candidate_model_id for one in verdicts if one.outcome == "promoted"]
    if winners:
        assert link.readlink() == Path("..", "..", "models", winners[-1] or "")
    assert (link / "model.safetensors").is_file()
    for words in (*(one.sentence for one in verdicts), "base model:", "loss ", f"champion     {link}"):
        assert words in done.stdout
    assert not overview.daemon().alive
    assert lock_holder(folder / ".dropforge" / "spool" / "worker.lock") is None
