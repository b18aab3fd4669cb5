"""The unit as it is shipped, installed as README.md says, under a real systemd."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import durable
from tests.slurm.cluster import NEEDS_SLURM, wait_for
from tests.systemd.boot import Machine, boot
from tests.systemd.installation import ROOT, SOURCE, binds, make_environment

UNIT = ROOT / "systemd" / "dropforge.service"
STATE = "var/lib/dropforge"
SETTINGS = "/etc/dropforge/dropforge.toml"
DONE = "/srv/dropforge/inbox/done"
DROP_IN = ROOT / "systemd" / "slurm.conf"
WORKER = ROOT / "systemd" / "worker.conf"
#: Tenths of systemd-analyze's exposure level, as reached; a change that weakens the unit is seen.
MOST_EXPOSURE = 14
#: The same with the drop-in for Slurm, which needs the network; docs/cluster.md says it, too.
SLURM_EXPOSURE = 19
#: A cluster of this machine alone, with munge and Slurm's services as Debian has them.
_SLURM = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser=slurm
AuthType=auth/munge
CredType=cred/munge
StateSaveLocation=/var/lib/lab/state
SlurmdSpoolDir=/var/lib/lab/spool
SlurmctldPidFile=/run/slurmctld.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


TINY = ROOT / "tests" / "tiny_llama.py"
#: In the place of the unit's two minutes.
WATCHDOG_SECONDS = 4
#: Enough to learn the task, and to be interrupted in the middle.
ROWS = 400
EPOCHS = 15.0
_QUICK = """
inbox = "/srv/dropforge/inbox"
state = "/var/lib/dropforge"
base_model = "/srv/tiny/base"
run_after_quiet_seconds = 0.5
[intake]
settle_seconds = 1
[split]
heldout = 0.4
dev = 0
[evaluate]
general = []
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

    wait_for(has_begun)
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


def listed(machine: Machine, what: str) -> list[dict[str, Any]]:
    """Return what `dropforge runs` or `drops` shows to the service's user, who has none of our variables."""
    found = json.loads(machine.run("runuser", "-u", "dropforge", "--", "dropforge", what, "--json").stdout)
    return list(found[what])


def runs(machine: Machine) -> list[dict[str, Any]]:
    """Return the runs."""
    return listed(machine, "runs")


@pytest.mark.parametrize(("drop_ins", "most"), [((), MOST_EXPOSURE), ((DROP_IN,), SLURM_EXPOSURE)])
def test_the_unit_is_as_closed_as_a_trainer_allows(drop_ins: tuple[Path, ...], most: int, tmp_path: Path) -> None:
    unit, beside = tmp_path / UNIT.name, tmp_path / f"{UNIT.name}.d"
    shutil.copy(UNIT, unit)
    beside.mkdir()
    for drop_in in drop_ins:
        shutil.copy(drop_in, beside)
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager"]
    done = subprocess.run([*command, f"--threshold={most}", str(unit)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    tighter = [*command, f"--threshold={most - 1}", str(unit)]
    assert subprocess.run(tighter, capture_output=True, check=False).returncode == 1, "lower the bound"
    words = f"gives the unit {SLURM_EXPOSURE / 10} instead of {MOST_EXPOSURE / 10}"
    assert words in " ".join((ROOT / "docs" / "cluster.md").read_text(encoding="utf-8").split())


def test_the_unit_forbids_nothing_that_a_trainer_needs() -> None:
    text = re.sub(r"^#.*", "", UNIT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    limits = ("PrivateDevices", "DevicePolicy", "DeviceAllow", "MemoryDenyWriteExecute", "MemoryMax", "TasksMax")
    assert [limit for limit in limits if limit in text] == []
    assert "ProtectClock=no" in text, "it would bring a device list with it"
    assert not re.search(r"SystemCallFilter=~.*@resources", text)


@pytest.mark.timeout(500)
def test_a_drop_is_promoted_though_the_service_restarts_in_training(machine: Machine) -> None:
    configure(machine, "nf4")
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
    wait_for(lambda: in_state(machine, "active") and training_step(machine) >= 1)
    status = machine.run("systemctl", "status", "--no-pager", "dropforge").stdout
    assert re.search(r'Status: "run 1 train', status), status

    machine.run("systemctl", "restart", "--no-block", "dropforge")
    wait_for(lambda: has_pending(machine, trainer, signal.SIGTERM))
    machine.run("kill", "-CONT", str(trainer))
    wait_for(lambda: in_state(machine, "active") and int(shown(machine, "MainPID")) not in {0, main})
    decided = machine.root / STATE / "runs" / "1" / "decide.json"
    wait_for(lambda: in_state(machine, "active") and decided.exists() and shown(machine, "StatusText") == "idle")
    (run,) = runs(machine)
    assert (run["state"], run["outcome"]) == ("succeeded", "promoted"), run
    assert published(machine, "train")["resumed_from_step"] > 0, "the restart left a checkpoint and it was used"
    assert champion(machine) == published(machine, "decide")["candidate_model_id"] != base

    receipt = machine.run("runuser", "-u", "sender", "--", "ls", f"{DONE}/~sender").stdout.split()
    assert sorted(receipt) == ["drop.jsonl", "drop.jsonl.receipt.json", "drop.jsonl.verdict.txt"]
    for name in receipt:
        machine.run("runuser", "-u", "sender", "--", "cat", f"{DONE}/~sender/{name}")
    refused = machine.run("runuser", "-u", "sender", "--", "ls", "/var/lib/dropforge", check=False)
    assert refused.returncode != 0

    machine.run("systemctl", "stop", "dropforge")
    assert (shown(machine, "ActiveState"), shown(machine, "Result")) == ("inactive", "success")
    assert ours(machine) == {}
    assert "Traceback" not in journal(machine)


@pytest.mark.timeout(300)
def test_nvidia_uvm_is_loaded_by_root_before_the_daemon_and_a_failure_keeps_nothing_from_starting(
    machine: Machine,
) -> None:
    configure(machine, "none")
    # What nvidia-modprobe needs of root: its user, capabilities, new privileges, and the mounts of the machine.
    machine.write(
        "/usr/bin/nvidia-modprobe",
        """#!/bin/sh
        exec >> /usr/local/modprobe
        echo "$@"; id -u; grep -E "CapBnd|NoNewPrivs" /proc/self/status
        exit 1
        """,
        0o755,
    )
    whole = (machine.root / "proc/1/status").read_text(encoding="utf-8")
    start(machine)
    assert shown(machine, "ActiveState") == "active"
    said = (machine.root / "usr/local/modprobe").read_text(encoding="utf-8").splitlines()
    (bounding,) = re.findall(r"^CapBnd:.*", whole, re.MULTILINE)
    as_root = ["0", bounding, "NoNewPrivs:\t0"]
    assert said == ["-u -c 0", *as_root, "-c 0 -c 255", *as_root]
    assert "CUDA_CACHE_PATH=/var/cache/dropforge/nv" in shown(machine, "Environment").split()


@pytest.mark.timeout(500)
def test_a_worker_with_a_unit_of_its_own_trains_on_while_the_daemon_restarts(machine: Machine) -> None:
    configure(machine, "none")
    start(machine)
    settings = machine.root / SETTINGS.lstrip("/")
    settings.write_text(f'worker = "separate"\n{settings.read_text()}')
    commands = re.findall(r"^#   (.*)", WORKER.read_text(encoding="utf-8"), re.MULTILINE)
    for command in commands:
        machine.run("bash", "-ec", f"cd {SOURCE} && {command}")
    verified = machine.run("systemd-analyze", "verify", "/etc/systemd/system/dropforge-worker.service")
    assert (verified.stdout, verified.stderr) == ("", "")
    exposure = ["systemd-analyze", "security", "--no-pager", f"--threshold={MOST_EXPOSURE}", "dropforge-worker"]
    assert machine.run(*exposure, check=False).returncode == 0, "as closed as the first unit"

    machine.run("runuser", "-u", "sender", "--", "cp", "/srv/tiny/drop.jsonl", "/srv/dropforge/inbox/")
    trainer, main = freeze_trainer(machine), int(shown(machine, "MainPID"))
    machine.run("systemctl", "restart", "dropforge")
    wait_for(lambda: in_state(machine, "active") and "run 1 train" in shown(machine, "StatusText"))
    assert int(shown(machine, "MainPID")) != main
    machine.run("kill", "-CONT", str(trainer))
    decided = machine.root / STATE / "runs" / "1" / "decide.json"
    wait_for(lambda: in_state(machine, "active") and decided.exists() and shown(machine, "StatusText") == "idle")
    (run,) = runs(machine)
    assert (run["state"], run["outcome"]) == ("succeeded", "promoted"), run
    assert [path.name for path in decided.parent.glob("attempts/train-*")] == ["train-1"]
    machine.run("systemctl", "stop", "dropforge-worker")
    assert (machine.root / "run/dropforge").is_dir(), "the page's socket is the daemon's"
    machine.run("systemctl", "stop", "dropforge")
    assert ours(machine) == {}


#: What a member of the group tries in the inbox, each a shell script; none may move what is the daemon's.
_ATTACKS = {
    "swap rejected for a link": "mv rejected o; rmdir rejected; ln -sfT /var/lib/dropforge/spool/queue rejected",
    "swap done for a link": "mv done o; rmdir done; ln -sfT /var/lib/dropforge/drops done",
    "swap a track's folder": "mv support o; rmdir support; ln -sfT /var/lib/dropforge support",
    "swap a folder in it": "cd support && mv heldout o; rmdir heldout; ln -sfT /var/lib/dropforge/drops heldout",
    "write into answers": "ln -s /var/lib/dropforge/spool/queue rejected/support",
    "open a folder for others": "chmod 777 rejected done support",
    "forge an order": 'printf \'{"folder": "/srv/dropforge/inbox/forged"}\' > 9-train-1.json; mkdir forged',
    "write the order itself": "cp 9-train-1.json /var/lib/dropforge/spool/queue/",
    "a link to the database": "ln -s /var/lib/dropforge/dropforge.db link.jsonl",
    "a hard link": "ln /srv/tiny/drop.jsonl hard.jsonl",
    "a pipe": "mkfifo pipe.jsonl",
    "a folder": "mkdir -p folder.jsonl/deep",
    "a file of 8 TiB": "truncate --size 8T huge.jsonl",
    "a held-out file": "cp /srv/tiny/heldout.jsonl heldout/mine-heldout.jsonl",
}
#: What of it is a drop like any other: a held-out file, which waits for a person.
_TAKEN = ("mine-heldout.jsonl",)
#: Those that the file system must refuse outright.
_REFUSED = {name for name in _ATTACKS if name.startswith(("swap", "open", "write"))}


def as_user(machine: Machine, user: str, script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script in the inbox as a user."""
    argv = ("runuser", "-u", user, "--", "sh", "-c", f"cd /srv/dropforge/inbox && {script}")
    return machine.run(*argv, check=False)


def tree(folder: Path) -> dict[str, int]:
    """Return the folders and links below a folder, with their modes and kinds."""
    return {str(path.relative_to(folder)): path.lstat().st_mode for path in folder.rglob("*") if not path.is_file()}


@pytest.mark.timeout(400)
def test_a_member_of_the_group_moves_nothing_and_an_honest_file_goes_through(machine: Machine) -> None:
    configure(machine, "none")
    settings = machine.root / "etc/dropforge/dropforge.toml"
    # What is tried here is the inbox: nothing is to be trained.
    text = settings.read_text().replace("run_after_quiet_seconds = 0.5", "run_after_quiet_seconds = 3600")
    settings.write_text(f"{text}\n[tracks.support]\n")
    machine.run("useradd", "--no-create-home", "--groups", "dropforge", "reader")
    machine.run("bash", "-ec", "head -n 20 /srv/tiny/drop.jsonl | tee /srv/tiny/heldout.jsonl > /srv/tiny/small.jsonl")
    start(machine)
    inbox, state = machine.root / "srv/dropforge/inbox", machine.root / STATE
    wait_for(lambda: in_state(machine, "active") and (inbox / "support").is_dir())
    own = [inbox / name for name in ("done", "rejected", "support", "heldout", "support/heldout")]
    before = {path: (path.lstat().st_ino, path.lstat().st_mode) for path in own}
    spool = tree(state / "spool")
    attempts = {name: as_user(machine, "sender", script).returncode for name, script in _ATTACKS.items()}
    assert {name for name, code in attempts.items() if code} >= _REFUSED, attempts

    assert (
        as_user(
            machine, "reader", "cp /srv/tiny/small.jsonl support/.x && mv support/.x support/honest.jsonl"
        ).returncode
        == 0
    )
    assert as_user(machine, "sender", "cp /srv/tiny/drop.jsonl .x && mv .x mine.jsonl").returncode == 0
    honest, mine = inbox / "done/support/~reader/honest.jsonl", inbox / "done/~sender/mine.jsonl"
    wait_for(lambda: in_state(machine, "active") and honest.exists() and mine.exists())
    told = [inbox / "rejected/~sender/9-train-1.json", inbox / "done/~sender/mine-heldout.jsonl"]
    wait_for(lambda: in_state(machine, "active") and all(path.exists() for path in told))
    assert {path: (path.lstat().st_ino, path.lstat().st_mode) for path in own} == before
    assert tree(state / "spool") == spool
    assert not list((state / "spool").rglob("9-train-1*"))
    assert not (state / "runs/9").exists()
    taken = {drop["name"]: drop["state"] for drop in listed(machine, "drops") if drop["state"] != "rejected"}
    assert taken == {"honest.jsonl": "accepted", "mine.jsonl": "accepted"} | dict.fromkeys(_TAKEN, "proposed"), taken
    assert "Traceback" not in journal(machine)

    for name in (mine.name, f"{mine.name}.receipt.json"):
        assert as_user(machine, "sender", f"cat done/~sender/{name}").returncode == 0, "who sent it may read it"
        for attempt in ("cat", "rm -f", "mv -t ."):
            assert as_user(machine, "reader", f"{attempt} done/~sender/{name}").returncode != 0, attempt
    assert as_user(machine, "reader", "ls done/~sender").returncode != 0
    assert mine.exists()
    exposure = ["systemd-analyze", "security", "--no-pager", f"--threshold={MOST_EXPOSURE}", "dropforge"]
    assert machine.run(*exposure, check=False).returncode == 0, "no worse than without all this"


def move_environment(machine: Machine, to: str) -> None:
    """Copy the environment to a second folder, with what it names beside that one, too."""
    for beside in ("source", "packages"):
        machine.run("ln", "-s", f"/opt/dropforge-{beside}", f"{to}-{beside}")
    move = f"cp --archive /opt/dropforge {to} && sed -i s:/opt/dropforge:{to}: {to}/bin/dropforge {to}/lib/*/*/here.pth"
    machine.run("bash", "-ec", move)


@NEEDS_SLURM
@pytest.mark.timeout(500)
def test_with_the_drop_in_the_service_trains_in_a_job_that_outlives_it(machine: Machine) -> None:
    host = machine.run("hostname").stdout.strip()
    machine.write("/etc/slurm/slurm.conf", _SLURM.format(host=host))
    machine.write("/etc/slurm/cgroup.conf", "CgroupPlugin=disabled\n")
    machine.run("install", "-d", "-o", "slurm", "/var/lib/lab", "/var/lib/lab/state", "/var/lib/lab/spool")
    # Slurm finds no address of its own where there is only the loopback interface's.
    machine.run("ip", "address", "add", "10.0.0.1", "dev", "lo")
    machine.run("systemctl", "start", "munge", "slurmctld", "slurmd")

    configure(machine, "none")
    machine.run("install", "-d", "-o", "dropforge", "-m", "700", "/shared/dropforge", "/shared/dropforge/data")
    move_environment(machine, "/shared/dropforge/venv")
    settings = machine.root / SETTINGS.lstrip("/")
    executor = '[executor]\nkind = "slurm"\nshared = "/shared/dropforge/data"\npoll_seconds = 1\n'
    settings.write_text(settings.read_text() + executor)
    for command in documented("cluster.md"):
        machine.run("bash", "-ec", f"cd {SOURCE} && {command}")
    verified = machine.run("systemd-analyze", "verify", "/etc/systemd/system/dropforge.service")
    assert (verified.stdout, verified.stderr) == ("", "")

    machine.run("runuser", "-u", "sender", "--", "cp", "/srv/tiny/drop.jsonl", "/srv/dropforge/inbox/")
    attempt = machine.root / "shared/dropforge/data/runs/1/attempts/train-1"
    wait_for(lambda: in_state(machine, "active") and (attempt / "progress.json").exists())
    (trainer,) = (pid for pid, words in machine.processes().items() if "-m pipeline train" in words)
    machine.run("kill", "-STOP", str(trainer))  # it must not end before the service does
    machine.run("systemctl", "stop", "dropforge")
    assert (shown(machine, "ActiveState"), shown(machine, "Result")) == ("inactive", "success")
    assert trainer in machine.processes()
    machine.run("systemctl", "start", "dropforge")
    wait_for(lambda: in_state(machine, "active") and "run 1 train" in shown(machine, "StatusText"))
    assert trainer in machine.processes()
    assert [path.name for path in attempt.parent.glob("train-*")] == ["train-1"]
    assert "Traceback" not in journal(machine)


def documented(chapter: str = "operations.md") -> list[str]:
    """Return the commands of a chapter that are for a service alone: their blocks name no language."""
    text = (ROOT / "docs" / chapter).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return "".join(block for language, block in blocks if not language).splitlines()


def folder_table() -> Iterator[tuple[str, str, str]]:
    """Yield path, owner with group, and mode of each row of the table in docs/operations.md."""
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    for paths, owners, mode in re.findall(r"^\| (`[/…].*?) \| (\w+, \w+) \| (\d+) \|", text, re.MULTILINE):
        for path in re.findall(r"`(.*?)`", paths):
            yield path.replace("…", "/srv/dropforge/inbox"), owners.replace(", ", " "), mode


@pytest.mark.timeout(500)
def test_a_person_configures_it_and_every_documented_command_does_its_work(machine: Machine) -> None:
    configure(machine, "none")
    settings = machine.root / "etc/dropforge/dropforge.toml"
    right = settings.read_text(encoding="utf-8")
    settings.write_text("epochs = 1\n" + right, encoding="utf-8")
    assert machine.run("bash", "-ec", installation()[-1], check=False).returncode != 0
    told = [shown(machine, name) for name in ("ActiveState", "ExecMainStatus", "NRestarts")]
    assert told == ["failed", "2", "0"], "wrong settings wait for a person"
    web = '\n[web]\nenabled = true\nlisten = "unix:/run/dropforge/web.sock"\n'
    settings.write_text(right + web, encoding="utf-8")
    for _ in range(7):
        machine.run("systemctl", "restart", "dropforge")
    machine.run("systemctl", "kill", "--signal=KILL", "dropforge")
    wait_for(lambda: shown(machine, "NRestarts") == "1" and shown(machine, "ActiveState") == "active")
    before, troubles = shown(machine, "MainPID"), machine.root / STATE / "troubles.json"
    settings.write_text("retry.limit = 4\n" + right + web, encoding="utf-8")
    wait_for(lambda: "until: systemctl reload dropforge" in machine.run("dropforge", "config").stdout)
    machine.run("systemctl", "reload", "dropforge")
    wait_for(lambda: not troubles.exists() and shown(machine, "ActiveState") == "active")
    assert [shown(machine, name) for name in ("MainPID", "NRestarts")] == [before, "1"]

    machine.write("/etc/dropforge/environment", "DROPFORGE_MESSAGES__URLS='[\"json://127.0.0.1:9\"]'\n", 0o600)
    wait_for((machine.root / "run/dropforge/web.sock").exists)
    found = {path: machine.run("stat", "--format=%U %G %a", path).stdout.strip() for path, _, _ in folder_table()}
    assert found == {path: f"{owners} {mode}" for path, owners, mode in folder_table()}
    machine.run("useradd", "alice")
    machine.write("/opt/dropforge/bin/pip", "#!/bin/sh\n", 0o755)  # nothing is fetched in a test
    commands = documented()
    assert {"usermod", "systemctl", "dropforge", "install", "userdel"} <= {line.split()[0] for line in commands}
    for line in commands:
        machine.run("bash", "-ec", f"cd {SOURCE} && {line}")
        if line.startswith("usermod"):
            assert "dropforge" in machine.run("id", "--groups", "--name", "alice").stdout.split()
        elif line.startswith("systemctl stop"):
            assert shown(machine, "StatusText") in {"", "stopped"}  # systemd may have forgotten the unit
        elif line.startswith("dropforge backup"):
            assert list((machine.root / "srv/dropforge-backups").glob("*/manifest.json"))
    made = [
        *found,
        "/etc/systemd/system/dropforge.service",
        "/usr/local/bin/dropforge",
        "/srv/dropforge",
        "/etc/dropforge",
    ]
    left = [path for path in made if os.path.lexists(machine.root / path.lstrip("/"))]
    accounts = [machine.run("getent", kind, "dropforge", check=False).returncode for kind in ("passwd", "group")]
    assert (left, accounts) == ([], [2, 2])


@pytest.mark.timeout(300)
def test_a_publication_that_takes_longer_than_the_watchdog_waits_ends(machine: Machine) -> None:
    configure(machine, "none")
    machine.write("/etc/systemd/system/dropforge.service.d/soon.conf", f"[Service]\nWatchdogSec={WATCHDOG_SECONDS}\n")
    machine.run("systemctl", "daemon-reload")
    start(machine)
    # As a collection by hand does, by the daemon's user, as the file may be new; whoever publishes waits.
    script = f"flock /{STATE}/gc.lock sh -c 'touch /tmp/held; while [ -e /tmp/held ]; do sleep 0.1; done'"
    wait_for(lambda: in_state(machine, "active") and shown(machine, "StatusText") == "idle")
    machine.run("systemd-run", "--uid=dropforge", "bash", "-c", script)
    wait_for((machine.root / "tmp/held").exists)
    machine.run("cp", "/srv/tiny/drop.jsonl", "/srv/dropforge/inbox/")
    result = machine.root / STATE / "runs/1/attempts/prepare-1/result.json"
    wait_for(lambda: in_state(machine, "active") and result.exists())
    threading.Event().wait(2 * WATCHDOG_SECONDS)
    assert not (machine.root / STATE / "runs/1/prepare.json").exists()
    (machine.root / "tmp/held").unlink()
    wait_for(lambda: in_state(machine, "active") and (machine.root / STATE / "runs/1/prepare.json").exists())
    assert shown(machine, "NRestarts") == "0", journal(machine)
