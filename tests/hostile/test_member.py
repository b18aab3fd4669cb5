"""`check` and `submit` by a member of the group, who may write into the inbox and see nothing of the state folder."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.hostile.people import ALICE, BOB, DAEMON, GROUP, STRANGER, Box, NewBox, rows


def put(box: Box, name: str, *words: str) -> Path:
    path = box.folder / name
    path.write_text(rows(*words))
    return path


def test_a_member_may_check_a_file(new_box: NewBox) -> None:
    box = new_box()
    file = put(box, "good.jsonl", "a")
    ended = box.cli(ALICE, "check", str(file))
    (box.folder / "base").chmod(0o700)
    closed = box.cli(ALICE, "check", str(file))
    for done in (ended, closed):
        assert (done.returncode, "it would be accepted" in done.stdout) == (0, True), done.stderr


def test_what_a_member_submits_is_for_the_daemon_to_read(new_box: NewBox) -> None:
    box = new_box()
    ended = box.cli(ALICE, "submit", str(put(box, "good.jsonl", "a")), umask=0o077)
    assert ended.returncode == 0, ended.stderr
    (copy,) = box.inbox.iterdir()
    found = copy.stat()
    assert (copy.name, found.st_mode & 0o7777, found.st_uid, found.st_gid) == ("good.jsonl", 0o640, 64202, GROUP)
    box.start()
    box.until(lambda: box.is_filed("good.jsonl"))


@pytest.mark.timeout(120)
def test_who_drops_a_file_that_cannot_be_read_is_told_beside_it(new_box: NewBox) -> None:
    box = new_box()
    box.start()
    box.shell(ALICE, f"printf %s {shlex.quote(rows('a'))} > .x && mv .x mine.jsonl", umask=0o077)
    note = box.inbox / "mine.jsonl.waits.txt"
    box.until(note.exists)
    told = box.shell(ALICE, "cat mine.jsonl.waits.txt").stdout
    assert "mine.jsonl has not been taken, and is tried again: it cannot be opened: Permission denied; " in told
    remedy = re.findall(r"chmod .*?jsonl", told)
    assert remedy == ["chmod g+r mine.jsonl"], told
    assert box.shell(ALICE, remedy[0]).returncode == 0
    box.until(lambda: box.is_filed("mine.jsonl") and not note.exists())
    box.shell(ALICE, "touch hers.jsonl.waits.txt")
    box.drop(BOB, "his.jsonl", rows("b"))
    box.until(lambda: box.is_filed("his.jsonl"))
    kept = (box.inbox / "hers.jsonl.waits.txt").exists()
    assert kept, "a person's own file by such a name stays"


@pytest.mark.timeout(120)
def test_a_member_who_reaches_the_pages_socket_reads_no_ones_rows(new_box: NewBox) -> None:
    box = new_box()
    (box.folder / "run").mkdir()
    os.chown(box.folder / "run", DAEMON.number, GROUP)
    (box.folder / "run").chmod(0o750)
    path = box.folder / "run/web.sock"
    box.start(extra={"DROPFORGE_WEB__ENABLED": "true", "DROPFORGE_WEB__LISTEN": f"unix:{path}"})
    box.drop(BOB, "his.jsonl", rows("secret"))
    box.until(lambda: box.is_filed("his.jsonl") and path.is_socket())
    ask = (
        "import http.client, socket, sys; c = http.client.HTTPConnection('localhost'); "
        "c.sock = socket.socket(socket.AF_UNIX); c.sock.connect(sys.argv[1]); "
        "c.request('GET', '/api/v1/drops/1/rows'); a = c.getresponse(); print(a.status, b'secret' in a.read())"
    )
    argv = shlex.join([sys.executable, "-c", ask, str(path)])
    member, stranger = box.shell(ALICE, argv), box.shell(STRANGER, argv)
    happened = f"member {member.stdout.strip()}, stranger {stranger.stderr.splitlines()[-1].partition(':')[0]}"
    assert happened == "member 403 False, stranger PermissionError", (member.stderr, stranger.stdout)


def test_submit_makes_no_folder_of_the_inbox(new_box: NewBox) -> None:
    box = new_box()
    file = put(box, "good.jsonl", "a")
    for name, options in (("support", ("--track", "support")), ("heldout", ("--heldout",))):
        ended = box.cli(ALICE, "submit", str(file), *options)
        assert ended.returncode == 1
        assert f"there is no folder {box.inbox / name}" in ended.stderr
        assert "dropforge run" in ended.stderr
    assert list(box.inbox.iterdir()) == []


def test_submit_follows_no_link_that_another_member_made(new_box: NewBox) -> None:
    box = new_box()
    trap = box.folder / "trap"
    trap.mkdir()
    trap.chmod(0o777)
    assert box.shell(BOB, f"ln -s {trap} support").returncode == 0
    ended = box.cli(ALICE, "submit", str(put(box, "good.jsonl", "a")), "--track", "support")
    assert (ended.returncode, list(trap.iterdir())) == (1, [])
    assert f"{box.inbox / 'support'} is not a folder" in ended.stderr


def test_who_is_no_member_is_told_so(new_box: NewBox) -> None:
    box = new_box()
    ended = box.cli(STRANGER, "submit", str(put(box, "good.jsonl", "a")))
    assert (ended.returncode, list(box.inbox.iterdir())) == (1, [])
    assert f"error: {box.inbox}: Permission denied" in ended.stderr
    assert "user, stranger" in ended.stderr
