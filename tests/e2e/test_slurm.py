"""docs/cluster.md, followed from the installation to three promotions on a real Slurm that is killed in between."""

import contextlib
import json
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.demo_data import write_rows
from tests.e2e.conftest import Workspace
from tests.slurm.cluster import NEEDS_SLURM, Cluster, new_cluster

ROOT = Path(__file__).parents[2]
TRACKS = ("default", "second", "third")
#: Does as pip, with this environment's packages instead of downloaded ones.
PIP = f"""#!/bin/sh -e
here=$(dirname "$0")
printf '%s\\n' '{sysconfig.get_path("purelib")}' '{ROOT}' > "$(echo "$here"/../lib/python3.*/site-packages)/here.pth"
printf '#!%s/python3\\nimport sys\\nfrom daemon.cli import main\\nsys.exit(main())\\n' "$here" > "$here/dropforge"
chmod +x "$here/dropforge"
"""
#: Settings with which the tiny model is soon promoted; all others are the chapter's.
QUICK: dict[str, Any] = {
    "RUN_AFTER_QUIET_SECONDS": 0.5,
    "INTAKE": {"settle_seconds": 1},
    "SPLIT": {"heldout": 0.4, "dev": 0},
    "EVALUATE": {"general": []},
    "TRACKS": {name: {} for name in TRACKS[1:]},
    "EXECUTOR__POLL_SECONDS": 1,
}
pytestmark = NEEDS_SLURM


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Start a cluster of three nodes whose commands the daemon finds."""
    with new_cluster(cpus=8) as made:
        for name, value in made.environment.items():
            monkeypatch.setenv(name, value)
        yield made


class Reader:
    """Somebody who follows the chapter, with a test's folders in the place of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._before: list[str] = []

    def blocks(self, language: str) -> list[str]:
        """Return the chapter's blocks of a language, with this reader's folders."""
        text = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
        text = re.sub(r"/(?=(?:shared|local)/)", f"{self._folder}/", text)
        return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)

    def does(self, line: str) -> str:
        """Run a command, in the folder and with the variables that earlier ones set; return what it prints."""
        if line.startswith(("cd ", "export ")):
            self._before.append(line)
        argv = ["bash", "-euo", "pipefail", "-c", "\n".join([*self._before, line])]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout


def install(reader: Reader, shared: Path, lines: list[str]) -> None:
    """Run the lines that install the program, with a stand-in for pip."""
    make, *others = lines
    shared.mkdir(parents=True)
    reader.does(make.replace("python3 -m venv", f"{sys.executable} -m venv --without-pip"))
    (shared / "venv" / "bin" / "pip").write_text(PIP)
    (shared / "venv" / "bin" / "pip").chmod(0o755)
    for line in others:
        reader.does(line)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_who_follows_the_chapter_sees_three_tracks_promoted_though_daemon_and_controller_are_killed(
    tmp_path: Path, tiny: Any, tiny_llama: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, workspace = Reader(tmp_path), Workspace(tmp_path / "local" / "dropforge")
    shared, work = tmp_path / "shared" / "dropforge", tmp_path / "shared" / "dropforge" / "data"
    for name, value in {**QUICK, "TRAIN": tiny.settings()}.items():
        monkeypatch.setenv(f"DROPFORGE_{name}", json.dumps(value))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    begin, enter, first, follow, end = (block.splitlines() for block in reader.blocks("sh"))
    install(reader, shared, begin)
    # Each job waits for the file, so that three run at once however fast a machine is.
    with (shared / "env.sh").open("a") as file:
        file.write(f'echo "set up on $SLURMD_NODENAME"\nwhile [ ! -e {tmp_path}/go ]; do sleep 0.1; done\n')
    (shared / "base").symlink_to(tiny_llama)
    for line in enter:
        reader.does(line)
    with (workspace.folder / "dropforge.toml").open("a") as file:
        file.writelines(reader.blocks("toml"))
    workspace.interpreter, workspace.program = f"{shared}/venv/bin/python3", [f"{shared}/venv/bin/dropforge"]
    with contextlib.ExitStack() as started:
        *check, run = first
        for line in check:
            reader.does(line)
        assert run.startswith("dropforge run ")
        started.callback(workspace.end)
        workspace.start()
        write_rows(workspace.folder / "answers.jsonl", tiny.rows(400, seed=1))
        for line in follow:
            if line.startswith("dropforge wait "):
                stop_in_training(workspace, cluster, work, tmp_path / "go")
                workspace.wait_for_runs(*["succeeded"] * len(TRACKS))
            told = reader.does(line)
            if line.startswith("cp "):
                for seed, track in enumerate(TRACKS[1:], start=2):
                    workspace.drop(f"{track}/more.jsonl", tiny.rows(400, seed=seed))
                workspace.wait(lambda: len(running(cluster)) == len(TRACKS))
            elif line.startswith("squeue "):
                assert re.search(r"^\d+ dropforge-\w{8}\.1-train-1 RUNNING None n\d$", told, re.MULTILINE), told

        assert [(run.outcome, run.failures, run.deaths) for run in workspace.runs()] == [("promoted", 0, 0)] * 3
        assert sorted(promotion.track for promotion in workspace.done_promotions()) == sorted(TRACKS)
        assert all((work / "tracks" / track / "champion" / "model.safetensors").exists() for track in TRACKS)
        assert not (workspace.state / "runs").exists()
        assert workspace.stop() == 0
    assert [reader.does(line) for line in end][:2] == ["no runs\n", ""], "no job is left"
    assert 'kind = "local"' in (workspace.folder / "dropforge.toml").read_text()


def running(cluster: Cluster) -> list[str]:
    """Return the nodes of the running jobs."""
    return cluster.says("squeue", "--me", "--noheader", "--states=RUNNING", "--format=%N").split()


def set_up(work: Path) -> list[str]:
    """Return the nodes on which the trainings' jobs have read the file of `executor.setup`."""
    logs = [path.read_text() for path in work.glob("runs/*/attempts/train-1/log.txt")]
    return sorted(re.findall(r"^set up on (\w+)$", "".join(logs), re.MULTILINE))


def stop_in_training(workspace: Workspace, cluster: Cluster, work: Path, go: Path) -> None:
    """Let the three jobs begin, and kill daemon and controller once all of them train; start both again."""
    assert sorted(running(cluster)) == cluster.nodes, "a GPU each"
    workspace.wait(lambda: set_up(work) == cluster.nodes)
    go.touch()
    workspace.wait(lambda: len(list(work.glob("runs/*/attempts/train-1/progress.json"))) == len(TRACKS))
    cluster.save()  # else it would lose a job, and its run would need minutes more
    workspace.kill()
    cluster.kill("slurmctld")
    workspace.start()
    cluster.start("slurmctld")
