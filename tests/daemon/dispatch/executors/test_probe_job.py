"""`dropforge doctor` on a real cluster: it submits a job, and says what the node sees."""

from pathlib import Path

import pytest

from daemon.settings.model import Settings
from daemon.views import doctor, slurm_probe
from daemon.views.preflight import Finding
from tests.daemon.dispatch.executors.test_slurm import wrap
from tests.slurm.cluster import NEEDS_SLURM, Cluster

pytestmark = NEEDS_SLURM
ROOT = Path(__file__).parents[4]
#: A torch that sees two cards.
TORCH = "__version__ = '9.1'\nclass cuda:\n    device_count = staticmethod(lambda: 2)\n"


class Site:
    """A workspace whose jobs find the modules in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.share, self.slurm = folder, folder / "share", dict[str, object]()
        self.share.mkdir()
        self.setup = folder / "env.sh"
        self.setup.write_text(f"export PYTHONPATH={folder}:{ROOT}\n")
        (folder / "torch.py").write_text(TORCH)

    def settings(self) -> Settings:
        told = {"kind": "slurm", "shared": str(self.share), "setup": str(self.setup), "slurm": self.slurm}
        return Settings.model_validate(
            {"state": str(self.folder / "state"), "inbox": str(self.folder), "executor": told}
        )

    def asked(self) -> dict[str, Finding]:
        """Return the findings on Slurm by name; nothing is left of the probe."""
        found = {one.name: one for one in doctor.examine(self.settings())}
        assert list(self.share.iterdir()) == []
        return {name: found[name] for name in ("Slurm", "KillWait", "probe job") if name in found}


@pytest.fixture
def site(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    return Site(tmp_path)


def test_a_good_node_is_named_with_its_torch_its_cards_and_the_lag_of_its_file(site: Site) -> None:
    site.slurm = {"extra": ["--nodelist=n2"]}
    found = site.asked()
    assert [(one.name, one.level) for one in found.values()] == [
        ("Slurm", "ok"),
        ("KillWait", "warn"),
        ("probe job", "ok"),
    ]
    assert " on n2 has torch 9.1 and 2 GPUs; its file was seen here after " in found["probe job"].text


@pytest.mark.parametrize(
    ("module", "text", "words"),
    [
        ("sitecustomize", "import os; os.getuid = lambda: 4321", "runs as user 4321, the daemon as"),
        ("sitecustomize", "import time; now = time.time; time.time = lambda: now() + 99", "s or more ahead"),
        ("sitecustomize", "import time; now = time.time; time.time = lambda: now() - 99", "s or more behind"),
        ("torch", "raise OSError('libcuda.so is too old')", "cannot import torch: OSError: libcuda.so is too old"),
        ("sitecustomize", "import os; os._exit(7)", "gave no answer: FAILED"),
    ],
)
def test_what_is_wrong_with_a_node_is_said(site: Site, module: str, text: str, words: str) -> None:
    (site.folder / f"{module}.py").write_text(text)
    found = site.asked()["probe job"]
    assert (words in found.text, found.level) == (True, "warn" if "or more" in words else "bad"), found
    assert found.remedy


def test_fewer_cards_than_a_training_asks_for_are_said(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    # The lab's nodes have none to ask for.
    wrap(site.folder, "sbatch", "exec $REAL $(printf '%s\\n' \"$@\" | grep -v ^--gres)", monkeypatch)
    site.slurm = {"train": {"gpus": 3}}
    found = site.asked()["probe job"]
    assert (found.level, "sees 2 of the 3 GPUs that executor.slurm.train asks for" in found.text) == ("bad", True)


def test_a_job_that_does_not_begin_is_cancelled_and_its_reason_said(
    site: Site, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_probe, "_MOST_SECONDS", 1.0)
    site.slurm = {"extra": ["--begin=now+1hour"]}
    found = site.asked()["probe job"]
    assert (found.level, "waits in Slurm (BeginTime) and was cancelled" in found.text) == ("warn", True), found
    assert cluster.says("squeue", "--me", "--noheader") == ""


def test_a_refusal_and_a_controller_that_is_away_are_said_in_slurms_words(site: Site, cluster: Cluster) -> None:
    site.slurm = {"partition": "nowhere"}
    found = site.asked()["probe job"]
    assert (found.level, found.text) == (
        "bad",
        "sbatch: invalid partition specified: nowhere; Batch job submission failed: Invalid partition name specified",
    )
    cluster.kill("slurmctld")
    try:
        found = site.asked()["Slurm"]
        assert (found.level, "is DOWN" in found.text) == ("bad", True), found
    finally:
        cluster.start("slurmctld")


def test_without_slurms_commands_it_says_which_are_missing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(site.folder))
    assert site.asked()["Slurm"].text == "its commands are not there: sbatch, squeue, scancel, scontrol"
