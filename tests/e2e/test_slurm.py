"""From a dropped file to a promotion through a real Slurm, with the daemon and the controller killed in between."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, new_cluster

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Start a cluster of three nodes whose commands the daemon finds."""
    with new_cluster() as made:
        for name, value in made.environment.items():
            monkeypatch.setenv(name, value)
        yield made


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_tracks_are_promoted_through_slurm_though_daemon_and_controller_are_killed(
    workspace: Any, tiny: Any, cluster: Cluster
) -> None:
    (workspace.folder / "env.sh").write_text(f"export PYTHONPATH={ROOT} HF_HUB_OFFLINE=1\n")
    settings = workspace.folder / "dropforge.toml"
    settings.write_text(
        f'{settings.read_text()}[executor]\nkind = "slurm"\nparallel = 2\nshared = "share"\nsetup = "env.sh"\n'
        "poll_seconds = 1\n[tracks.other]\n"
    )
    workspace.start()
    workspace.drop("one.jsonl", tiny.rows(400, seed=1))
    aside = workspace.inbox / ".two.part"
    aside.write_text("".join(tiny_lines(tiny.rows(400, seed=2))))
    aside.rename(workspace.inbox / "other" / "two.jsonl")
    share = workspace.folder / "share"
    for run in (1, 2):
        workspace.wait(lambda run=run: list(share.glob(f"runs/{run}/attempts/train-1/claim.json")))
    workspace.kill()
    cluster.kill("slurmctld")
    workspace.start()
    cluster.start("slurmctld")
    workspace.wait_for_runs("succeeded", "succeeded")
    assert [(run.failures, run.deaths) for run in workspace.runs()] == [(0, 0), (0, 0)]
    assert {promotion.track for promotion in workspace.done_promotions()} == {"default", "other"}
    assert [path.name for path in share.glob("runs/*/attempts/train-*")] == ["train-1", "train-1"], (
        "no attempt was lost"
    )
    assert (share / "tracks/default/champion/model.safetensors").exists()
    assert not (workspace.state / "runs").exists()
    assert workspace.stop() == 0


def tiny_lines(rows: list[dict[str, str]]) -> Iterator[str]:
    """Yield the lines of a drop."""
    return (json.dumps(row) + "\n" for row in rows)
