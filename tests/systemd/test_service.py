"""The unit as it is shipped, installed as README.md says, under a real systemd."""

import grp
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import durable
from tests.systemd.boot import Machine, boot
from tests.systemd.installation import ROOT, SOURCE, binds, make_environment

UNIT = ROOT / "systemd" / "dropforge.service"
STATE = "var/lib/dropforge"
DONE = "/srv/dropforge/inbox/done"
#: Tenths of systemd-analyze's exposure level, as reached; a change that weakens the unit is seen.
MOST_EXPOSURE = 14
TINY = ROOT / "tests" / "tiny_llama.py"
#: Enough to learn the task, and to be interrupted in the middle.
ROWS = 400
EPOCHS = 15.0
_QUICK = """
base_model = "/srv/tiny/base"
run_after_quiet_seconds = 0.5
[intake]
settle_seconds = 1
[split]
heldout = 0.4
dev = 0
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a tiny base model, the settings under which it learns, and a drop."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "train.json").write_text(make_tiny("base", cwd=folder), encoding="utf-8")
    make_tiny("--rows", str(ROWS), "drop.jsonl", cwd=folder)
    return folder


@pytest.fixture
def machine(tmp_path: Path, tiny: Path) -> Iterator[Machine]:
    """Boot a machine on which Dropforge is installed, not started, with a tiny base model."""
    with boot(tmp_path, binds()) as booted:
        make_environment(booted)
        for command in installation()[1:-1]:
            booted.run("bash", "-ec", f"cd {SOURCE} && {command}")
        shutil.copytree(tiny, booted.root / "srv/tiny")
        booted.run("chmod", "--recursive", "a+rX", "/srv/tiny")
        booted.run("useradd", "--no-create-home", "--groups", "dropforge", "sender")
        yield booted


def make_tiny(*arguments: str, cwd: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    argv = [sys.executable, str(TINY), *arguments]
    return subprocess.run(argv, cwd=cwd, env=environment, check=True, capture_output=True, text=True).stdout


def installation() -> list[str]:
    """Return the commands of README.md: the environment, then the files, then the start."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return readme.partition("## As a service\n\n```\n")[2].partition("```")[0].splitlines()


def wait_until(condition: Callable[[], object]) -> None:
    """Wait; the test's time limit ends a wait in vain."""
    pause = threading.Event()
    while not condition():
        pause.wait(0.2)


def configure(machine: Machine, quantization: str) -> None:
    settings = json.loads((machine.root / "srv/tiny/train.json").read_text(encoding="utf-8"))
    # Long enough that its progress, written every two seconds, is seen between the first step and the last.
    settings |= {"quantization": quantization, "epochs": EPOCHS}
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    machine.write("/etc/dropforge/dropforge.toml", "\n".join([_QUICK, "[train]", *lines, ""]))


def start(machine: Machine) -> None:
    done = machine.run("bash", "-ec", installation()[-1], check=False)
    assert done.returncode == 0, f"{done.stderr}\n{journal(machine)}"


def shown(machine: Machine, name: str) -> str:
    return machine.run("systemctl", "show", "--value", "--property", name, "dropforge").stdout.strip()


def published(machine: Machine, step: str) -> dict[str, Any]:
    return dict(json.loads((machine.root / STATE / "runs" / "1" / f"{step}.json").read_text(encoding="utf-8")))


def training_step(machine: Machine) -> int:
    """Return how far the training that systemctl shows has come; 0 if none is shown."""
    found = re.search(r"run 1 train\b.*?(\d+)/\d+", shown(machine, "StatusText"))
    return int(found[1]) if found else 0


def freeze_trainer(machine: Machine) -> int:
    """Stop run 1's trainer as soon as it has taken a step; return its process id in the machine."""
    attempts = machine.root / STATE / "runs" / "1" / "attempts"

    def has_begun() -> bool:
        found = (durable.read_json(path) or {} for path in attempts.glob("train-*/progress.json"))
        return any(progress.get("done", 0) > 0 for progress in found)

    wait_until(has_begun)
    (pid,) = (pid for pid, words in machine.processes().items() if "-m pipeline train" in words)
    machine.run("kill", "-STOP", str(pid))
    return pid


def has_pending(machine: Machine, pid: int, number: signal.Signals) -> bool:
    """Say whether a signal waits for a process that is stopped."""
    status = (machine.root / "proc" / str(pid) / "status").read_text(encoding="utf-8")
    return bool(int(re.findall(r"^ShdPnd:\s*(\w+)", status, re.MULTILINE)[0], 16) >> (number - 1) & 1)


def ours(machine: Machine) -> dict[int, str]:
    return {pid: words for pid, words in machine.processes().items() if "dropforge" in words or "pipeline" in words}


def in_state(machine: Machine, *states: str) -> bool:
    state = shown(machine, "ActiveState")
    assert state != "failed", journal(machine)
    return state in states


def journal(machine: Machine) -> str:
    return machine.run("journalctl", "--no-pager", "--unit", "dropforge").stdout


def champion(machine: Machine) -> str:
    return (machine.root / STATE / "tracks" / "default" / "champion").readlink().name


def runs(machine: Machine) -> list[dict[str, Any]]:
    """Return what `dropforge runs` says, asked as the service's user with the unit's own environment."""
    environment = shown(machine, "Environment").split()
    user = ["runuser", "-u", "dropforge", "--", "env", *environment]
    found = json.loads(machine.run(*user, "/opt/dropforge/bin/dropforge", "runs", "--json").stdout)
    return list(found["runs"])


def test_the_unit_is_as_closed_as_a_trainer_allows() -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager"]
    done = subprocess.run(
        [*command, f"--threshold={MOST_EXPOSURE}", str(UNIT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    tighter = [*command, f"--threshold={MOST_EXPOSURE - 1}", str(UNIT)]
    assert subprocess.run(tighter, capture_output=True, check=False).returncode == 1, "lower MOST_EXPOSURE"


def test_the_unit_forbids_nothing_that_a_trainer_needs() -> None:
    text = re.sub(r"^#.*", "", UNIT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    limits = ("PrivateDevices", "DevicePolicy", "DeviceAllow", "MemoryDenyWriteExecute", "MemoryMax", "TasksMax")
    assert [limit for limit in limits if limit in text] == []
    assert "ProtectClock=no" in text, "it would bring a device list with it"
    assert not re.search(r"SystemCallFilter=~.*@resources", text)


@pytest.mark.timeout(500)
def test_a_drop_is_promoted_though_the_service_restarts_in_training(machine: Machine) -> None:
    configure(machine, "none")
    verified = machine.run("systemd-analyze", "verify", "/etc/systemd/system/dropforge.service")
    assert (verified.stdout, verified.stderr) == ("", "")
    start(machine)
    assert shown(machine, "ActiveState") == "active"
    main = int(shown(machine, "MainPID"))
    user = int(re.findall(r"^dropforge:x:(\d+):", (machine.root / "etc/passwd").read_text(), re.MULTILINE)[0])
    assert (machine.root / "proc" / str(main)).stat().st_uid == user
    base = champion(machine)

    machine.run("runuser", "-u", "sender", "--", "cp", "/srv/tiny/drop.jsonl", "/srv/dropforge/inbox/")
    # It goes on only when it has been told to stop: what is trained here would be over before systemctl has begun.
    trainer = freeze_trainer(machine)
    wait_until(lambda: in_state(machine, "active") and training_step(machine) >= 1)
    status = machine.run("systemctl", "status", "--no-pager", "dropforge").stdout
    assert re.search(r'Status: "run 1 train', status), status

    machine.run("systemctl", "restart", "--no-block", "dropforge")
    wait_until(lambda: has_pending(machine, trainer, signal.SIGTERM))
    machine.run("kill", "-CONT", str(trainer))
    wait_until(lambda: in_state(machine, "active") and int(shown(machine, "MainPID")) not in {0, main})
    decided = machine.root / STATE / "runs" / "1" / "decide.json"
    wait_until(lambda: in_state(machine, "active") and decided.exists() and shown(machine, "StatusText") == "idle")
    (run,) = runs(machine)
    assert (run["state"], run["outcome"]) == ("succeeded", "promoted"), run
    assert published(machine, "train")["resumed_from_step"] > 0, "the restart left a checkpoint and it was used"
    assert champion(machine) == published(machine, "decide")["candidate_model_id"] != base

    receipt = machine.run("runuser", "-u", "sender", "--", "ls", f"{DONE}/~sender").stdout.split()
    assert sorted(receipt) == ["drop.jsonl", "drop.jsonl.receipt.json"]
    for name in receipt:
        machine.run("runuser", "-u", "sender", "--", "cat", f"{DONE}/~sender/{name}")
    refused = machine.run("runuser", "-u", "sender", "--", "ls", "/var/lib/dropforge", check=False)
    assert refused.returncode != 0

    machine.run("systemctl", "stop", "dropforge")
    assert (shown(machine, "ActiveState"), shown(machine, "Result")) == ("inactive", "success")
    assert ours(machine) == {}
    assert "Traceback" not in journal(machine)


@pytest.mark.timeout(300)
def test_a_stop_in_training_leaves_nothing_running_and_the_run_waiting(machine: Machine) -> None:
    configure(machine, "nf4")
    start(machine)
    machine.run("cp", "/srv/tiny/drop.jsonl", "/srv/dropforge/inbox/")
    wait_until(lambda: in_state(machine, "active") and training_step(machine) >= 1)
    machine.run("systemctl", "stop", "dropforge")
    assert (shown(machine, "ActiveState"), shown(machine, "Result")) == ("inactive", "success")
    assert ours(machine) == {}
    (run,) = runs(machine)
    assert run["state"] == "waiting"


def test_the_rig_leaves_nothing_behind(tmp_path: Path) -> None:
    mounts = Path("/proc/self/mounts").read_text(encoding="utf-8")
    users = [*pwd.getpwall()], [*grp.getgrall()]
    with boot(tmp_path, {}) as machine:
        machine.run("useradd", "--system", "passing-guest")
        machine.run("systemd-run", "--unit=left-over", "--service-type=exec", "sleep", "infinity")
        leader = machine.leader
        assert "/usr/bin/sleep infinity" in machine.processes().values()
    assert not Path(f"/proc/{leader}").exists()
    assert Path("/proc/self/mounts").read_text(encoding="utf-8") == mounts
    assert ([*pwd.getpwall()], [*grp.getgrall()]) == users
    assert not [folder for folder in tmp_path.iterdir() if folder.is_dir()]
