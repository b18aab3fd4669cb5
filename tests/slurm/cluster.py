"""A real Slurm of several nodes on this machine, below one folder: munged, slurmctld and a slurmd per node."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

_CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_min_interval=50000,batch_sched_delay=0,bf_interval=1,defer_batch=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
MinJobAge=300
KillWait=5
SlurmdTimeout=20
MailProg=/bin/true
GresTypes=gpu
SlurmdParameters=config_overrides
{nodes}
PartitionName=low Nodes=ALL PriorityTier=1 Default=YES MaxTime=INFINITE DefMemPerCPU=100 State=UP
PartitionName=high Nodes=ALL PriorityTier=9 PreemptMode=OFF MaxTime=INFINITE DefMemPerCPU=100 State=UP
PartitionName=gpu Nodes=ALL MaxTime=INFINITE State=UP
"""
#: For tests that need a cluster.
NEEDS_SLURM = pytest.mark.skipif(
    shutil.which("slurmctld", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None and "CI" not in os.environ,
    reason="it needs a real Slurm (Debian: slurm-wlm and munge)",
)


class Cluster:
    """A cluster that is started with `start` and ended with `end`."""

    def __init__(
        self, root: Path, nodes: int = 3, cpus: int = 2, *, inside: Sequence[str] = (), **settings: object
    ) -> None:
        """
        Write its configuration into `root`, whose path has at most 70 characters: sockets allow 108.

        Each node has `cpus` processors, 128 GB and a GPU, as Slurm believes. `settings` replace lines of slurm.conf;
        `inside` is a command that the nodes' daemons are started by.
        """
        self.root, self.nodes, self._inside = root, [f"n{number + 1}" for number in range(nodes)], inside
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        port, host = _free_ports(nodes + 1), socket.gethostname().partition(".")[0]
        lines = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + 1 + index} CPUs={cpus} "
            f"Boards=1 SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=128000 Gres=gpu:1 "
            "State=UNKNOWN"
            for index, name in enumerate(self.nodes)
        ]
        (root / "state").mkdir()
        (root / "munge.key").write_bytes(os.urandom(128))
        (root / "munge.key").chmod(0o600)
        user = "root" if os.geteuid() == 0 else os.environ["USER"]
        text = _CONF.format(host=host, user=user, port=port, root=root, nodes="\n".join(lines))
        for name, value in settings.items():
            text = re.sub(f"^{name}=.*$", f"{name}={value}", text, flags=re.MULTILINE)
        (root / "slurm.conf").write_text(text)
        (root / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        # Slurm asks for a character device and opens none.
        (root / "gres.conf").write_text("AutoDetect=off\nName=gpu File=/dev/null\n")

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which Slurm's commands find this cluster."""
        return {"SLURM_CONF": str(self.root / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}

    def start(self, *names: str) -> None:
        """Start the named daemons, `munged`, `slurmctld` or a node, or all, and wait until the controller answers."""
        for name in names or ("munged", "slurmctld", *self.nodes):
            if name == "munged":
                files = {
                    "key-file": "key",
                    "socket": "socket",
                    "pid-file": "pid",
                    "log-file": "log",
                    "seed-file": "seed",
                }
                told = [f"--{option}={self.root}/munge.{ending}" for option, ending in files.items()]
                self._begin(name, "munged", "--foreground", "--force", *told)
                wait_for((self.root / "munge.socket").exists)
            elif name == "slurmctld":
                self._begin(name, "slurmctld", "-D")
                wait_for(lambda: self.says("scontrol", "ping").startswith("Slurmctld(primary)") and self.answers())
            else:
                (self.root / f"spool-{name}").mkdir(exist_ok=True)
                self._begin(name, *self._inside, "slurmd", "-D", "-N", name)
        if not names:
            wait_for(lambda: set(self.says("sinfo", "-h", "-N", "-o", "%T").split()) == {"idle"})

    def kill(self, name: str) -> None:
        """Kill a daemon by SIGKILL."""
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def stop(self, name: str) -> None:
        """End a daemon in order: the controller saves its state."""
        process = self._processes.pop(name)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def save(self) -> None:
        """Wait until the controller has saved its jobs, which it else does some seconds after each change."""
        self.says("sbatch", "--job-name=saved", "--output=/dev/null", "--wrap=true")
        wait_for(lambda: b"saved" in (self.root / "state" / "job_state").read_bytes())

    def clear(self) -> None:
        """Cancel all jobs, and wait until none is left on any node."""
        self.says("scancel", "--full", "--me")
        wait_for(lambda: self.answers() and not self.says("squeue", "--me", "--noheader"))

    def resume(self) -> bool:
        """Give the nodes back that Slurm has drained, as an administrator does; return `True`."""
        self.says("scontrol", "update", f"nodename={','.join(self.nodes)}", "state=resume")
        return True

    def answers(self) -> bool:
        """Return whether the controller answers."""
        return "is UP" in self.says("scontrol", "ping")

    def says(self, *command: str) -> str:
        """Return what a command of Slurm prints; empty if it fails."""
        environment = {**os.environ, **self.environment}
        done = subprocess.run(
            command, cwd=self.root, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        return done.stdout if done.returncode == 0 else ""

    def end(self) -> None:
        """Cancel all jobs and end every daemon."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.says("scancel", "--full", "--me")
        for name in reversed(list(self._processes)):
            self.stop(name)

    def _begin(self, name: str, *argv: str) -> None:
        with (self.root / f"{name}.out").open("ab") as output:
            self._processes[name] = subprocess.Popen(
                argv, env={**os.environ, **self.environment}, stdout=output, stderr=output, cwd=self.root
            )


@contextlib.contextmanager
def new_cluster(**settings: Any) -> Iterator[Cluster]:
    """Start a cluster, made with `settings`, in a temporary folder with a short name, and end it."""
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o755)
        made = Cluster(Path(name), **settings)
        try:
            made.start()
            yield made
        finally:
            made.end()


def wait_for(condition: Callable[[], object]) -> None:
    """Wait for what another process does; the test's own time limit ends a wait in vain."""
    pause = threading.Event()
    while not condition():
        pause.wait(0.05)


def _free_ports(count: int) -> int:
    """Return the first of `count` ports in a row that were free a moment ago."""
    while True:
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
        if port + count < 60_000 and all(map(_is_free, range(port, port + count))):
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as one:
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
