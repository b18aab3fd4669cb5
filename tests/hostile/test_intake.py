"""Files that cannot be taken, thousands that wait, and a member who swaps things while the daemon looks."""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.hostile.people import ALICE, BOB, DAEMON, Box, NewBox, rows

#: Seconds that the daemon and a member race each other.
RACE_SECONDS = 60 if os.environ.get("DROPFORGE_CHAOS") == "whole" else 8


def why(box: Box, name: str) -> str:
    """Return why a file is left in the inbox, as `dropforge status` says it; empty if it does not."""
    left = {one["name"]: one["why"] for one in box.status()["inbox"]["left"]}
    return str(left.get(name, ""))


def test_a_file_larger_than_the_disk_is_skipped(new_box: NewBox) -> None:
    box = new_box("max_bytes = 1000000000000\n")
    box.start()
    room = os.statvfs(box.state).f_bavail * os.statvfs(box.state).f_frsize
    # Sparse: it costs its sender nothing.
    box.sparse(ALICE, "huge.jsonl", room + (1 << 30))
    box.until(lambda: "free, of which" in why(box, "huge.jsonl"))
    box.drop(BOB, "small.jsonl", rows("small"))
    box.until(lambda: box.is_filed("small.jsonl"))
    assert list((box.state / "incoming").iterdir()) == []
    assert "not taken yet: huge.jsonl: it needs" in box.cli(DAEMON, "status").stdout


def test_thousands_that_wait_for_a_full_track_are_not_looked_at_one_by_one(new_box: NewBox) -> None:
    box = new_box("max_waiting_drops = 1\n")
    box.start()
    box.drop(ALICE, "first.jsonl", rows("first"))
    box.until(lambda: box.is_filed("first.jsonl"))
    script = "for n in $(seq 3000); do printf x > .$n.part; done; for n in $(seq 3000); do mv .$n.part $n.jsonl; done"
    assert box.shell(ALICE, script).returncode == 0
    box.until(lambda: box.status()["inbox"]["full_tracks"] == ["default"])
    box.drop(BOB, "other.jsonl", rows("other"), "support")
    box.until(lambda: box.is_filed("other.jsonl"))
    assert len(list(box.inbox.glob("*.waits.txt"))) <= 100


def test_a_member_who_swaps_things_at_random_reaches_nothing_else(new_box: NewBox) -> None:
    box = new_box(inbox_mode=0o2770)
    decoy = box.folder / "decoy"
    (decoy / "heldout").mkdir(parents=True)
    (decoy / "secret.jsonl").write_text(rows("secret"))
    os.chown(decoy, DAEMON.number, DAEMON.number)
    trace = box.folder / "trace"
    box.start("strace", "-f", "-y", "-qq", "-o", str(trace), "-e", "trace=%file")
    box.drop(BOB, "kept.jsonl", rows("kept"))
    box.until(lambda: box.is_filed("kept.jsonl"))
    box.drop(BOB, "too.jsonl", rows("too"), "support")
    box.until(lambda: box.is_filed("too.jsonl"))
    # The daemon made its inbox sticky, which would end the race: it is to hold where it may not, in one that is root's.
    box.inbox.chmod(0o2770)
    before = fingerprint(decoy), fingerprint(box.state / "drops")
    swapper = box.popen(ALICE, sys.executable, "-P", str(Path(__file__).with_name("swapper.py")), str(decoy))
    with contextlib.suppress(subprocess.TimeoutExpired):
        swapper.wait(RACE_SECONDS)
    # However the processes were scheduled: without a folder refused the race was none.
    box.until(lambda: refusals(box) > 0)
    swapper.communicate()
    box.until(lambda: put_right(box))
    box.drop(BOB, "after.jsonl", rows("after"))
    box.until(lambda: box.is_filed("after.jsonl"))
    assert box.stop() == 0
    drops = fingerprint(box.state / "drops")
    assert fingerprint(decoy) == before[0]
    assert before[1].items() <= drops.items(), "no stored drop was lost"
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.stem for path in (box.state / "drops").iterdir())
    outside = touched(trace.read_text(errors="replace"), decoy)
    assert outside == []


def refusals(box: Box) -> int:
    """Return how often the daemon said that a folder of the inbox cannot be used."""
    said = box.said()
    return said.count("inbox_folder_unusable") + said.count("intake_trouble")


def put_right(box: Box) -> bool:
    """Clear what the race left under the names of the daemon's folders; say whether all of them can be used."""
    for name in ("heldout", "support", "done", "rejected"):
        path = box.inbox / name
        if path.is_symlink() or (path.exists() and path.stat().st_uid != DAEMON.number):
            path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)
    return all((box.inbox / name).is_dir() for name in ("heldout", "support/heldout", "done", "rejected"))


def fingerprint(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Return kind, owner and content of everything below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path.relative_to(folder))] = (info.st_mode, info.st_uid, digest)
    return found


def touched(trace: str, decoy: Path) -> list[str]:
    """Return the lines of strace's record whose call reached into a folder and succeeded."""
    reached = re.compile(rf"= \d+<{re.escape(str(decoy))}[/>]")
    changed = re.compile(
        rf"(unlink|rename|link|mkdir|rmdir|mknod|chmod|chown|symlink)\w*\(.*<{re.escape(str(decoy))}[/>].* = 0$"
    )
    return [line for line in trace.splitlines() if reached.search(line) or changed.search(line)]
