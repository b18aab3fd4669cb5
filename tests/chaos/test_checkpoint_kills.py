"""A trainer that is killed while it writes a checkpoint: a whole one is left, the old or the new."""

import subprocess
import sys
from pathlib import Path

PUBLISH = """
import os, pathlib, signal, sys
from pipeline.train.checkpoints import newest_valid, publish
place, left = pathlib.Path(sys.argv[1]), 0

def counted(real):
    def call(*arguments, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)
    return call

for name in ("fsync", "rename", "unlink", "rmdir"):
    setattr(os, name, counted(getattr(os, name)))

def written(step):
    source = place / f"checkpoint-{step}"
    source.mkdir()
    (source / "optimizer.pt").write_bytes(b"moments" * step)
    (source / "trainer_state.json").write_text(str(step))
    return source

for step in (10, 20):
    publish(written(step), place / "checkpoints", step, "mark", 1)
written(30)
point = died = 0
while point == died:
    point += 1
    child = os.fork()
    if child == 0:
        mine = place / str(point)
        os.system(f"mkdir {mine} && cp -r {place}/checkpoints {place}/checkpoint-30 {mine}")
        left = point
        publish(mine / "checkpoint-30", mine / "checkpoints", 30, "mark", 1)
        os._exit(0)
    died += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    print(point, newest_valid(place / str(point) / "checkpoints", "mark").name)
"""


def test_killed_at_every_sync_and_rename_of_writing_a_checkpoint_a_whole_one_is_left(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PUBLISH, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = [line.split()[1] for line in done.stdout.splitlines()]
    print(f"killed at {len(found) - 1} points of writing a checkpoint")
    assert len(found) > 10
    assert found == sorted(found), "the old one until the new one is complete"
    assert (found[0], found[-1]) == ("step-20-1", "step-30-1")
