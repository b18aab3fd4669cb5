"""Root in the folder of somebody who planted settings there: nothing is written where they lead."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.loop_disk import needs_root

MALLORY = 64210


@needs_root
@pytest.mark.parametrize("planted", ["settings", "link"])
def test_root_writes_nothing_where_another_users_settings_lead(tmp_path: Path, planted: str) -> None:
    roots, theirs = tmp_path / "roots", tmp_path / "theirs"
    roots.mkdir()
    theirs.mkdir()
    if planted == "settings":
        path = theirs / "dropforge.toml"
        path.write_text(f'state = "{roots}"\n')
    else:
        path = theirs / ".dropforge"
        path.symlink_to(roots)
    for place in (theirs, path):
        os.lchown(place, MALLORY, MALLORY)
    argv = [sys.executable, "-P", "-m", "daemon", "web", "--url"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DROPFORGE_")}
    done = subprocess.run(argv, cwd=theirs, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, list(roots.iterdir())) == (2, []), done.stderr
    assert f"{path} belongs to {MALLORY}, and this is root" in done.stderr
