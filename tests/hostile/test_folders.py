"""Whoever may write into the inbox tries to lead the daemon somewhere else, or at what another person dropped."""

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hostile.people import ALICE, BOB, DAEMON, STRANGER, Box, rows

Record = Callable[[str, object], None]
SPEC = '{"run": 1, "step": "prepare", "argv": ["touch", "%s"]}'


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return what lies below a folder: kind and rights, and the bytes of files."""
    found = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        found[str(path.relative_to(folder))] = (info.st_mode, path.read_bytes() if path.is_file() else b"")
    return found


def goes_on(box: Box) -> None:
    """Raise unless an honest file of somebody else is taken."""
    name = f"{uuid.uuid4().hex}.jsonl"
    box.drop(BOB, name, rows(name))
    box.until(lambda: box.is_filed(name))
    assert not box.ended


def number_after(box: Box) -> int:
    """Return the number that the next drop gets."""
    return 1 + max([drop["id"] for drop in box.status()["latest_drops"]], default=0)


@pytest.mark.parametrize("name", ["rejected", "done", "support", "heldout", "support/heldout"])
def test_a_member_cannot_move_a_folder_of_the_inbox(box: Box, name: str, record_property: Record) -> None:
    for attempt in (f"mv {name} other", f"rmdir {name}", f"ln -sfn {box.state} {name} && test -L {name}"):
        done = box.shell(ALICE, attempt)
        assert done.returncode != 0
    record_property("probe", [f"move or replace {name}/", "not permitted", done.stderr.strip()[-30:] or "refused"])
    goes_on(box)


@pytest.mark.parametrize("home", ["rejected", "done"])
def test_nobody_but_the_daemon_writes_into_answers(box: Box, home: str, record_property: Record) -> None:
    box.drop(ALICE, "mine.jsonl", rows("mine") if home == "done" else "no JSON\n")
    box.until(lambda: box.is_filed("mine.jsonl", home))
    where = f"{home}/~alice"
    refused = [
        f"ln -s {box.state}/spool/queue {home}/support",
        f"touch {home}/file",
        f"touch {where}/file",
        f"rm -f {where}/mine.jsonl",
        f"mv {where} other",
    ]
    for attempt in refused:
        assert box.shell(ALICE, attempt).returncode != 0, attempt
    assert box.shell(ALICE, f"cat {where}/mine.jsonl").returncode == 0
    record_property("probe", [f"write into {home}/", "refused; own file readable", "refused; own file readable"])
    goes_on(box)


def test_a_folder_that_was_swapped_for_a_link_is_not_followed(
    new_box: Callable[..., Box], record_property: Record
) -> None:
    # Without the sticky bit on the inbox, as an administrator may have made it, members can move folders in it.
    box = new_box(inbox_mode=0o2770)
    box.start()
    target = box.folder / "was-here"
    forged = box.folder / "forged"
    forged.mkdir()
    (forged / "spec.json").write_text(SPEC % target)
    entry = json.dumps({"folder": str(forged)}) + "\n"
    swap = f"mv rejected o && ln -s {box.state}/spool/queue rejected; mv support s && ln -s {box.state}/spool support"
    assert box.shell(ALICE, swap).returncode == 0
    before = tree(box.state / "drops")
    box.shell(ALICE, f"printf %s {entry!r} > .x; mv .x zz.json")
    box.until(lambda: "inbox_folder_unusable" in box.said() or "intake_trouble" in box.said())
    assert list((box.state / "spool" / "queue").glob("*")) == []
    assert not target.exists()
    assert tree(box.state / "drops") == before
    # Put right again, everything that waited is taken.
    assert box.shell(ALICE, "rm rejected support; mv o rejected; mv s support").returncode == 0
    box.drop(BOB, "later.jsonl", rows("later"), "support")
    box.until(lambda: box.is_filed("later.jsonl") and box.is_filed("zz.json", "rejected"))
    assert not target.exists()
    record_property("probe", ["rejected/ -> spool/queue", "no code runs", "no code ran, files waited"])


def test_a_heldout_folder_that_leads_to_the_store_loses_no_drop(
    new_box: Callable[..., Box], record_property: Record
) -> None:
    box = new_box(inbox_mode=0o2770)
    box.start()
    box.drop(BOB, "first.jsonl", rows("first"))
    box.until(lambda: box.is_filed("first.jsonl"))
    before = tree(box.state / "drops")
    assert box.shell(ALICE, f"mv support s; mkdir support; ln -s {box.state}/drops support/heldout").returncode == 0
    box.until(lambda: len(box.status()["inbox"]["left"]) == 2)
    assert {one["name"] for one in box.status()["inbox"]["left"]} == {"support/", "support/heldout/"}
    assert "belongs to alice" in box.cli(DAEMON, "status").stdout
    assert tree(box.state / "drops") == before != {}
    goes_on(box)
    record_property(
        "probe", ["support/heldout -> drops", "no stored drop touched", "support/ not used: belongs to alice"]
    )


def test_a_member_reads_what_is_theirs_and_not_what_is_not(box: Box, record_property: Record) -> None:
    box.drop(ALICE, "private.jsonl", rows("private"))
    box.drop(ALICE, "wrong.jsonl", '{"instruction": "private", "output": 3}\n')
    box.drop(ALICE, "own.jsonl", rows("own"), "support")
    box.until(lambda: box.is_filed("private.jsonl") and box.is_filed("own.jsonl"))
    box.until(lambda: box.is_filed("wrong.jsonl", "rejected"))
    own = [
        "done/~alice/private.jsonl",
        "done/~alice/private.jsonl.receipt.json",
        "rejected/~alice/wrong.jsonl",
        "rejected/~alice/wrong.jsonl.errors.json",
        "done/support/~alice/own.jsonl",
    ]
    for name in own:
        assert box.shell(ALICE, f"cat {name}").returncode == 0, name
        for other in (BOB, STRANGER):
            for attempt in (f"cat {box.inbox}/{name}", f"rm -f {box.inbox}/{name} && ! test -e {box.inbox}/{name}"):
                assert box.shell(other, attempt).returncode != 0 or (box.inbox / name).exists(), (name, attempt)
            assert box.shell(other, f"cat {box.inbox}/{name}").returncode != 0
    assert all((box.inbox / name).exists() for name in own)
    record_property("probe", ["read or delete another's answer", "refused", "refused"])


def test_a_pipe_that_has_the_name_of_an_answer_is_not_read(box: Box, record_property: Record) -> None:
    assert box.shell(ALICE, "mkfifo bad.jsonl.errors.json").returncode == 0
    box.until(lambda: box.is_filed("bad.jsonl.errors.json", "rejected"))
    box.drop(ALICE, "bad.jsonl", "no JSON\n")
    box.until(lambda: box.is_filed("bad-2.jsonl", "rejected"))
    goes_on(box)
    record_property("probe", ["a pipe as bad.jsonl.errors.json", "a free name", "filed as bad-2.jsonl"])


def test_an_answer_that_a_person_made_up_is_neither_taken_for_ours_nor_overwritten(
    box: Box, record_property: Record
) -> None:
    # As it would look, were it ours: the drop's number can be guessed.
    forged = json.dumps({"version": 1, "drop": number_after(box) + 1, "state": "rejected"})
    box.drop(ALICE, "a.jsonl.errors.json", forged)
    box.until(lambda: box.is_filed("a.jsonl.errors.json", "rejected"))
    box.drop(ALICE, "a.jsonl", "no JSON\n")
    box.until(lambda: box.is_filed("a-2.jsonl", "rejected"))
    home = box.inbox / "rejected" / "~alice"
    assert (home / "a.jsonl.errors.json").read_text() == forged
    assert json.loads((home / "a-2.jsonl.errors.json").read_text())["drop"] > 2
    record_property("probe", ["forged a.jsonl.errors.json", "kept, not ours", "kept; ours is a-2.jsonl.errors.json"])


def test_links_pipes_and_folders_under_the_names_of_drops_are_never_opened(box: Box, record_property: Record) -> None:
    secret = box.state / "secret.jsonl"
    secret.write_text(rows("secret"))
    script = f"ln -s {secret} link.jsonl; mkfifo pipe.jsonl; mkdir folder.jsonl; ln -s /dev/zero zero.jsonl"
    assert box.shell(ALICE, script).returncode == 0
    there = [box.inbox / "rejected" / "~alice" / f"{name}.jsonl" for name in ("link", "pipe", "zero")]
    box.until(lambda: all(os.path.lexists(path) for path in there))
    assert all("secret" not in path.read_text() for path in (box.state / "drops").iterdir())
    assert (box.inbox / "folder.jsonl").is_dir()
    goes_on(box)
    record_property("probe", ["link, pipe, device, folder as a drop", "rejected unread", "rejected unread"])


def test_two_daemons_do_not_share_an_inbox(box: Box, new_box: Callable[..., Box], record_property: Record) -> None:
    other = new_box()
    (other.folder / "dropforge.toml").write_text((box.folder / "dropforge.toml").read_text())
    other.inbox = box.inbox
    other.start()
    assert other.stop() == 1
    assert f"takes the files of {box.inbox}" in other.said()
    assert "Traceback" not in other.said()
    record_property("probe", ["a second daemon on the inbox", "refused", "exit 1, names the other process"])
    goes_on(box)
