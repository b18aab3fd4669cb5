"""Whoever may write into the inbox tries to lead the daemon somewhere else, or at what another person dropped."""

import json
import uuid
from pathlib import Path

import pytest

from tests.hostile.people import ALICE, BOB, DAEMON, STRANGER, Box, NewBox, rows

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
def test_a_member_cannot_move_a_folder_of_the_inbox(box: Box, name: str) -> None:
    for attempt in (f"mv {name} other", f"rmdir {name}", f"ln -sfn {box.state} {name} && test -L {name}"):
        done = box.shell(ALICE, attempt)
        assert done.returncode != 0
    goes_on(box)


@pytest.mark.parametrize("home", ["rejected", "done"])
def test_nobody_but_the_daemon_writes_into_answers(box: Box, home: str) -> None:
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
    goes_on(box)


def test_a_folder_that_was_swapped_for_a_link_is_not_followed(new_box: NewBox) -> None:
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


def test_a_heldout_folder_that_leads_to_the_store_loses_no_drop(new_box: NewBox) -> None:
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


def test_a_member_reads_what_is_theirs_and_not_what_is_not(box: Box) -> None:
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


def test_an_answer_that_a_person_made_up_is_neither_taken_for_ours_nor_overwritten(box: Box) -> None:
    # As it would look, were it ours: the drop's number can be guessed.
    forged = json.dumps({"version": 1, "drop": number_after(box) + 1, "state": "rejected"})
    box.drop(ALICE, "a.jsonl.errors.json", forged)
    box.until(lambda: box.is_filed("a.jsonl.errors.json", "rejected"))
    box.drop(ALICE, "a.jsonl", "no JSON\n")
    box.until(lambda: box.is_filed("a-2.jsonl", "rejected"))
    home = box.inbox / "rejected" / "~alice"
    assert (home / "a.jsonl.errors.json").read_text() == forged
    assert json.loads((home / "a-2.jsonl.errors.json").read_text())["drop"] > 2


def test_two_daemons_do_not_share_an_inbox(box: Box, new_box: NewBox) -> None:
    other = new_box()
    (other.folder / "dropforge.toml").write_text((box.folder / "dropforge.toml").read_text())
    other.inbox = box.inbox
    other.start()
    assert other.stop() == 1
    assert f"takes the files of {box.inbox}" in other.said()
    assert "Traceback" not in other.said()
    goes_on(box)
