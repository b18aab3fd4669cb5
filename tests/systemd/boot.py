"""
Boots this machine's own root under real systemd, in an overlay that is thrown away.

The overlay lies on a tmpfs in a mount namespace of its own, so nothing that happens inside reaches the machine, and
both vanish with the last process. Needs root and systemd-nspawn (Debian: systemd-container).
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

LIFE_SECONDS = 570
BOOT_SECONDS = 60
#: Where cgroups of version 2 and systemd's own hierarchy of version 1 are mounted, of those that there are.
_CGROUPS = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd")
#: nspawn makes its machine's cgroup below the one that it is in: in the same one two machines would share their units'.
_OVERLAY = f"""
set -e
for place in {" ".join(_CGROUPS)}; do
    if [ -w "$place/cgroup.procs" ]; then
        mkdir "$place/${{1##*/}}"
        echo $$ > "$place/${{1##*/}}/cgroup.procs"
    fi
done
mount -t tmpfs tmpfs "$1"
mkdir "$1"/upper "$1"/work "$1"/root
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
: > "$1/root/etc/machine-id.new"
mv "$1/root/etc/machine-id.new" "$1/root/etc/machine-id"
shift
exec "$@"
"""


class Machine:
    """A booted system: `run` runs a command in it, `root` is its file system seen from here."""

    def __init__(self, leader: int) -> None:
        """Take the process id of its init."""
        self.leader = leader
        self.root = Path(f"/proc/{leader}/root")

    def run(self, *argv: str, check: bool = True, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command as root with a bare environment. Raises `AssertionError` with what it said if it fails."""
        namespaces = ["nsenter", "-t", str(self.leader), "-m", "-p", "-u", "-i", "-n", "-C", "-r", "-w", "--"]
        bare = ["env", "-i", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"]
        done = subprocess.run(
            [*namespaces, *bare, *argv],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        if check and done.returncode:
            log = self.run("journalctl", "--no-pager", "--lines=40", check=False).stdout
            raise AssertionError(f"{' '.join(argv)}: {done.returncode}\n{done.stdout}\n{done.stderr}\n{log}")
        return done

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file of the system, with the folders above it."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        file.chmod(mode)

    def processes(self) -> dict[int, str]:
        """Return the command lines of everything that runs in it, by its own process ids."""
        found: dict[int, str] = {}
        for folder in (self.root / "proc").glob("[0-9]*"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found[int(folder.name)] = (folder / "cmdline").read_text(errors="replace").replace("\0", " ").strip()
        return found


@contextlib.contextmanager
def boot(scratch: Path, binds: Mapping[Path, str]) -> Iterator[Machine]:
    """
    Boot, give the machine, power it off.

    `binds` maps folders of this machine to where they stand in the other one, read-only. Raises `RuntimeError` with the
    console's text if it does not boot.
    """
    name = f"boot-{uuid.uuid4().hex[:8]}"
    overlay = scratch / name
    overlay.mkdir()
    console = scratch / f"{name}.log"
    # Closed once it is up: systemd goes on to say how it is, and would wait for a reader that reads no more.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, console.open("w") as log:
        ready.bind(f"\0{name}")
        ready.settimeout(BOOT_SECONDS)
        environment = {**os.environ, "NOTIFY_SOCKET": f"@{name}", "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}
        argv = _argv(overlay, name, binds)
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        leader = _leader_once_booted(ready)
    try:
        if leader is None:
            msg = f"no boot within {BOOT_SECONDS} s:\n{console.read_text(errors='replace')}"
            raise RuntimeError(msg)
        yield Machine(leader)
    finally:
        process.send_signal(signal.SIGTERM)  # forwarded to systemd-nspawn, which powers its system off
        process.wait(LIFE_SECONDS)
        overlay.rmdir()
        for place in _CGROUPS:
            for folder, _, _ in os.walk(f"{place}/{name}", topdown=False):
                with contextlib.suppress(OSError):  # a process in it is about to end
                    Path(folder).rmdir()
        for folder in ("propagate", "unix-export"):
            shutil.rmtree(f"/run/systemd/nspawn/{folder}/{name}", ignore_errors=True)


def _argv(overlay: Path, name: str, binds: Mapping[Path, str]) -> list[str]:
    return [
        *("timeout", "--kill-after=10", str(LIFE_SECONDS)),
        *("unshare", "--mount", "--propagation", "private", "bash", "-c", _OVERLAY, "overlay", str(overlay)),
        *("systemd-nspawn", "--quiet", f"--directory={overlay}/root", f"--machine={name}"),
        *("--register=no", "--keep-unit", "--private-network", "--notify-ready=yes", "--console=pipe"),
        *(f"--bind-ro={source}:{target}" for source, target in binds.items()),
        *("--boot", "systemd.unit=basic.target", "systemd.mask=systemd-firstboot.service"),
    ]


def _leader_once_booted(ready: socket.socket) -> int | None:
    """Return the process id of the other system's init once it has said that it is up; `None` if it does not."""
    leader = None
    with contextlib.suppress(TimeoutError):
        while True:
            words = ready.recv(4096).decode()
            if found := re.search(r"^X_NSPAWN_LEADER_PID=(\d+)$", words, re.MULTILINE):
                leader = int(found[1])
            if "READY=1" in words.splitlines():
                return leader
    return None
