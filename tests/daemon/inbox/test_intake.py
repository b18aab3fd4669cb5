"""A settled file is recorded once and answered in the inbox, whatever is wrong with it and wherever the daemon dies."""

import errno
import hashlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from jsonschema import Draft202012Validator
from sqlmodel import col, select

from daemon.inbox.answers import rejected
from daemon.inbox.intake import Intake, Outcome
from daemon.inbox.watcher import Settled, make_inbox
from daemon.queue import drops, run_queue
from daemon.queue.states import Claim
from daemon.settings.model import Settings
from daemon.state import database
from daemon.state.clauses import drop_clauses
from daemon.state.events import Word
from daemon.state.states import DropState
from daemon.state.tables import Drop, Event, Message, Run
from daemon.storage.disk import Disk
from daemon.storage.retention import DAY_MS
from daemon.system.programs import name_of
from pipeline import durable
from pipeline.errors import DropforgeError
from tests import run_owner

NOW = 1_800_000_000_000
FOUND = {
    "blamed_run": 1,
    "trial": 2,
    "tested": [1],
    "control": 3,
    "scores": {"groups": 9, "wins": 1, "losses": 8, "p_value": 0.01},
}
FINDINGS = Draft202012Validator(
    json.loads((Path(__file__).parents[3] / "schemas" / "drop-errors.schema.json").read_text(encoding="utf-8")),
    format_checker=Draft202012Validator.FORMAT_CHECKER,
)


def rows(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"instruction": f"Question {number}?", "output": "yes"} for number in range(start, start + count)]


GOOD = rows(3)


class PowerCut(BaseException):
    """The daemon dies here."""


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


class Box:
    """A state folder with its database and inbox; `put` drops a file and `take` takes it."""

    def __init__(self, root: Path, **values: Any) -> None:
        self.settings = Settings.model_validate(
            {"inbox": str(root / "inbox"), "state": str(root / "state"), "tracks": {"support": {}}, **values}
        )
        self.inbox = self.settings.inbox_folder
        make_inbox(self.settings)
        path = root / "state" / "dropforge.db"
        database.create(path)
        self.engine = database.open_engine(path)
        self.intake = Intake(self.engine, self.settings)

    def restart(self) -> None:
        self.intake = Intake(self.engine, self.settings)

    def put(self, name: str, data: bytes | list[Any], folder: str = "") -> Path:
        path = self.inbox / folder / name
        path.write_bytes(data if isinstance(data, bytes) else jsonl(data))
        return path

    def take(self, path: Path, now: int = NOW) -> Outcome:
        parts = path.relative_to(self.inbox).parts[:-1]
        track = next((part for part in parts if part != "heldout"), "default")
        name = os.fsencode(path.name)
        return self.intake.take(Settled(track, "heldout" if "heldout" in parts else "train", name), now)

    def drop(self, name: str, data: bytes | list[Any], folder: str = "", now: int = NOW) -> Outcome:
        return self.take(self.put(name, data, folder), now)

    def begin(self) -> Claim:
        """Let the next run of the default track begin, with all drops."""
        run_queue.enqueue_by_hand(self.engine, "default", NOW)
        claim = run_owner.claim(self.engine, NOW, run_owner.configure)
        assert claim is not None
        return claim

    def end(self, outcome: str, claim: Claim | None = None, **verdict: Any) -> int:
        """Let the next run, or one that has begun, come to a verdict; return its number."""
        held = claim or self.begin()
        run_owner.finish(self.engine, held, run_owner.ending(outcome, **verdict), NOW)
        return held.run_id

    def rows(self, kind: type[Any]) -> list[Any]:
        with database.transaction(self.engine) as session:
            return list(session.exec(select(kind).order_by(col(kind.id))).all())

    def kinds(self) -> list[str]:
        return [event.kind for event in self.rows(Event)]

    def files(self, folder: str) -> list[str]:
        home = self.inbox / folder
        return sorted(str(path.relative_to(home)) for path in home.rglob("*") if not path.is_dir())

    def read(self, path: str) -> Any:
        return json.loads((self.inbox / path).read_text(encoding="utf-8"))

    def store(self) -> list[str]:
        return sorted(path.name for path in (self.settings.state_folder / "drops").iterdir())

    def no_litter(self) -> bool:
        return list((self.settings.state_folder / "incoming").iterdir()) == []


@pytest.mark.parametrize("name", ["my table.csv", "my table.jsonl"])
def test_the_command_in_an_error_list_can_be_pasted(tmp_path: Path, name: str) -> None:
    box = Box(tmp_path)
    box.drop(name, b"instruction,output\nq,a\n")
    (found,) = box.read(f"rejected/{name}.errors.json")["findings"]
    assert found["remedy"] == f"convert it: dropforge convert '{name}'"


def test_a_good_file_becomes_an_accepted_drop_with_a_run_and_a_receipt(tmp_path: Path) -> None:
    box = Box(tmp_path)
    data = jsonl([*GOOD, {"instruction": "Another?", "output": "no", "id": 7}])
    outcome = box.drop("a.jsonl", data)
    sha256 = hashlib.sha256(data).hexdigest()
    assert (outcome.kind, outcome.drop, outcome.run) == ("accepted", 1, 1)
    drop, run = box.rows(Drop)[0], box.rows(Run)[0]
    assert (drop.state, drop.track, drop.role) == ("accepted", "default", "train")
    assert (drop.name, drop.name_bytes) == ("a.jsonl", b"a.jsonl")
    assert (drop.sha256, drop.size_bytes, drop.rows, drop.warnings, drop.findings) == (sha256, len(data), 4, 1, 0)
    assert (drop.received_at, drop.first_run) == (NOW, None)
    assert (run.trigger, run.state, run.not_before) == ("drop", "queued", NOW + 60_000)
    assert "drop_accepted" in box.kinds()
    assert (box.settings.state_folder / "drops" / f"{sha256}.jsonl").read_bytes() == data
    assert box.files("done") == ["a.jsonl", "a.jsonl.receipt.json"]
    assert (box.inbox / "done" / "a.jsonl").read_bytes() == data
    receipt = box.read("done/a.jsonl.receipt.json")
    assert [receipt[name] for name in ("drop", "state", "rows", "run", "sha256")] == [1, "accepted", 4, 1, sha256]
    assert receipt["received_at"] == "2027-01-15T08:00:00+00:00"
    assert receipt["sentence"] == "accepted: 4 records; they are in run 1"
    known, short = receipt["warnings"]
    assert known == {"kind": "ignored_keys", "keys": ["id"], "rows": 1, "line": 4, "message": "ignored: id"}
    assert (short["kind"], short["rows"], short["line"]) == ("too_few_rows", 4, None)
    assert box.files("") == sorted(f"done/{name}" for name in box.files("done"))
    assert box.no_litter()


def test_a_bad_file_is_given_back_with_its_errors_and_nothing_of_it_is_kept(tmp_path: Path) -> None:
    box = Box(tmp_path)
    outcome = box.drop(
        "bad.jsonl", [GOOD[0], {"instruction": "a", "response": "b"}, {"instruction": "\x1b", "output": 3}]
    )
    assert (outcome.kind, outcome.drop, outcome.run) == ("rejected", 1, None)
    assert box.files("rejected") == ["bad.jsonl", "bad.jsonl.errors.json"]
    errors = box.read("rejected/bad.jsonl.errors.json")
    FINDINGS.validate(errors)
    told = [errors[name] for name in ("drop", "state", "rows", "good_rows", "findings_total")]
    assert told == [1, "rejected", 3, 1, 3]
    assert [(found["line"], found["field"], found["rule"]) for found in errors["findings"]] == [
        (2, "output", "misnamed_key"),
        (3, "output", "type"),
        (3, "instruction", "control_character"),
    ]
    drop = box.rows(Drop)[0]
    assert (drop.state, drop.findings, drop.reason) == ("rejected", 3, errors["reason"])
    assert (box.rows(Run), box.store(), box.no_litter()) == ([], [], True)
    assert box.drop("good.jsonl", GOOD).kind == "accepted"


def test_the_errors_of_a_file_are_a_hundred_with_the_first_of_each_kind(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.drop("bad.jsonl", [*[{"instruction": "a"}] * 300, {"instruction": "b", "output": 3}, *[{"output": "c"}] * 200])
    errors = box.read("rejected/bad.jsonl.errors.json")
    FINDINGS.validate(errors)
    assert (len(errors["findings"]), errors["findings_total"]) == (100, 501)
    assert errors["rules"] == {"missing": 500, "type": 1}
    lines = [found["line"] for found in errors["findings"]]
    assert lines == [*range(1, 99), 301, 302]


def test_old_rejected_files_go_with_their_answers_and_rows(tmp_path: Path) -> None:
    box = Box(tmp_path)
    for name in ("old.jsonl", "other.jsonl", "linked.jsonl"):
        box.drop(name, [{"instruction": name}], "support" if name == "other.jsonl" else "")
    box.drop("untold.jsonl", [{}])
    box.drop("new.jsonl", [{}], now=NOW + DAY_MS)
    box.drop("good.jsonl", GOOD)
    mine, outside = box.inbox / "rejected" / "old.jsonl-notes", tmp_path / "outside"
    mine.write_text("mine")
    outside.write_text("not ours")
    linked = box.inbox / "rejected" / "linked.jsonl"
    linked.unlink()
    linked.symlink_to(outside)
    then = NOW + 90 * DAY_MS + 1
    with database.transaction(box.engine) as session:
        told: dict[str, Any] = {"address": "a", "kind": "drop_rejected", "level": "warning", "title": "t", "body": "b"}
        for event, state in ((1, "sent"), (4, "pending")):
            ended = NOW if state == "sent" else None
            session.add(Message(**told, event_id=event, state=state, created_at=NOW, not_before=NOW, ended_at=ended))
    would = rejected.collect(box.engine, box.settings, then, dry_run=True)
    assert (len(box.rows(Drop)), len(would)) == (6, 3)
    assert rejected.collect(box.engine, box.settings, then) == would
    assert [drop.name for drop in box.rows(Drop)] == ["untold.jsonl", "new.jsonl", "good.jsonl"]
    assert {event.drop_id for event in box.rows(Event) if event.drop_id} == {4, 5, 6}
    assert [name for name in box.files("rejected") if not name.endswith(".errors.json")] == [
        "new.jsonl",
        "old.jsonl-notes",
        "untold.jsonl",
    ]
    assert box.rows(Message)[0].event_id == 4
    assert (box.files("rejected/support"), outside.read_text()) == ([], "not ours")
    assert rejected.collect(box.engine, box.settings, then) == ()


@pytest.mark.parametrize("name", ["a.jsonl.errors.json", "~nobody"])
def test_an_error_that_passes_keeps_a_rejected_drop_for_the_next_collection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    box = Box(tmp_path)
    box.drop("a.jsonl", [{}])
    box.drop("later.jsonl", GOOD)
    if name == "~nobody":
        with database.transaction(box.engine) as session:
            session.connection().exec_driver_sql("UPDATE \"drop\" SET owner = 'nobody'")
    real = os.open

    def full(path: Any, *arguments: Any, **named: Any) -> int:
        if str(path) == name:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        return real(path, *arguments, **named)

    then = NOW + 90 * DAY_MS + 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        with pytest.raises(OSError, match="Too many open files"):
            rejected.collect(box.engine, box.settings, then)
    assert [drop.name for drop in box.rows(Drop)] == ["a.jsonl", "later.jsonl"]
    assert len(rejected.collect(box.engine, box.settings, then)) == 1


def test_the_numbers_of_collected_drops_and_events_do_not_come_again(tmp_path: Path) -> None:
    box = Box(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        box.drop(name, [{}])
    last = box.rows(Event)[-1].id
    then = NOW + 91 * DAY_MS
    rejected.collect(box.engine, box.settings, then)
    outcome = box.drop("c.jsonl", GOOD, now=then)
    assert (outcome.drop, box.rows(Event)[-1].id > last) == (3, True)


@pytest.mark.parametrize(
    ("name", "data", "rule", "words"),
    [
        ("empty.jsonl", b"", "empty", "no records"),
        ("a.jsonl", b"\x1f\x8b\x08", "format", "gzip"),
        ("a.txt", jsonl(GOOD), "name", "does not end in .jsonl or .json"),
        ("big.jsonl", jsonl(GOOD) * 100, "too_large", "1,000 are allowed"),
    ],
)
def test_what_cannot_be_read_is_rejected_by_name(tmp_path: Path, name: str, data: bytes, rule: str, words: str) -> None:
    box = Box(tmp_path, intake={"max_bytes": 1000})
    assert box.drop(name, data).kind == "rejected"
    errors = box.read(f"rejected/{name}.errors.json")
    FINDINGS.validate(errors)
    assert errors["findings"][0]["rule"] == rule
    assert words in errors["findings"][0]["message"]
    assert (box.inbox / "rejected" / name).read_bytes() == data


def test_links_pipes_and_sockets_are_moved_away_and_never_followed(tmp_path: Path) -> None:
    box = Box(tmp_path)
    secret = tmp_path / "secret.jsonl"
    secret.write_bytes(jsonl(GOOD))
    (box.inbox / "link.jsonl").symlink_to(secret)
    os.link(secret, box.inbox / "hard.jsonl")
    os.mkfifo(box.inbox / "fifo.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(box.inbox / "socket.jsonl"))
        for name, words in (
            ("link", "symbolic link"),
            ("hard", "hard link"),
            ("fifo", "named pipe"),
            ("socket", "socket"),
        ):
            outcome = box.take(box.inbox / f"{name}.jsonl")
            assert outcome.kind == "rejected"
            assert words in outcome.message
            errors = box.read(f"rejected/{name}.jsonl.errors.json")
            FINDINGS.validate(errors)
            assert errors["sha256"] == ""
    assert (box.inbox / "rejected" / "link.jsonl").readlink() == secret
    assert secret.read_bytes() == jsonl(GOOD)
    assert box.store() == []


def test_the_same_content_is_a_duplicate_whose_receipt_says_of_which_drop(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.drop("first.jsonl", GOOD)
    outcome = box.drop("second.jsonl", GOOD, now=NOW + 5000)
    assert (outcome.kind, outcome.drop, outcome.run) == ("duplicate", 2, None)
    drop = box.rows(Drop)[1]
    assert (drop.state, drop.duplicate_of, drop.rows) == ("duplicate", 1, 3)
    receipt = box.read("done/second.jsonl.receipt.json")
    assert receipt["state"] == "duplicate"
    first = {"drop": 1, "name": "first.jsonl", "received_at": "2027-01-15T08:00:00+00:00", "state": "accepted"}
    assert receipt["duplicate_of"] == first
    assert "the same content is drop 1 (first.jsonl)" in receipt["sentence"]
    assert len(box.rows(Run)) == 1
    assert box.rows(Run)[0].not_before == NOW + 60_000


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"{}")])
def test_a_file_that_is_dropped_again_mends_its_damaged_copy_in_the_store(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    box = Box(tmp_path)
    box.drop("first.jsonl", GOOD)
    stored = box.settings.state_folder / "drops" / box.store()[0]
    damage(stored)
    assert box.drop("second.jsonl", GOOD).kind == "duplicate"
    assert stored.read_bytes() == jsonl(GOOD)
    assert box.no_litter()


def test_a_damaged_copy_that_cannot_be_replaced_keeps_the_file_in_the_inbox(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.drop("first.jsonl", GOOD)
    stored = box.settings.state_folder / "drops" / box.store()[0]
    stored.unlink()
    stored.mkdir()
    with pytest.raises(IsADirectoryError):
        box.drop("second.jsonl", GOOD)
    assert len(box.rows(Drop)) == 1
    stored.rmdir()
    assert box.drop("second.jsonl", GOOD).kind == "duplicate"
    assert stored.read_bytes() == jsonl(GOOD)


def test_the_same_content_may_go_to_another_track_or_role(tmp_path: Path) -> None:
    box = Box(tmp_path, gate={"on": "pinned"})
    kinds = [box.drop("a.jsonl", GOOD, folder).kind for folder in ("", "support", "heldout", "support/heldout")]
    assert kinds == ["accepted"] * 4
    taken = [(drop.track, drop.role) for drop in box.rows(Drop)]
    assert taken == [("default", "train"), ("support", "train"), ("default", "heldout"), ("support", "heldout")]
    assert [run.track for run in box.rows(Run)] == ["default", "support"]
    names = ("a-2.jsonl", "a-2.jsonl.receipt.json", "a.jsonl", "a.jsonl.receipt.json")
    assert box.files("done") == [*names, *(f"support/{name}" for name in names)]


@pytest.mark.parametrize(
    ("state", "suspension", "why"),
    [
        ("withdrawn", None, "bad answers"),
        ("suspended", FOUND, "; ".join(drop_clauses(SimpleNamespace(id=1, track="default", suspension=FOUND)))),
    ],
)
def test_the_same_content_as_a_withdrawn_or_held_drop_says_so(
    tmp_path: Path, state: str, suspension: dict[str, object] | None, why: str
) -> None:
    box = Box(tmp_path)
    box.drop("a.jsonl", GOOD)
    with database.transaction(box.engine) as session:
        drop = session.get_one(Drop, 1)
        drop.state, drop.reason, drop.suspension = DropState(state), "bad answers", suspension
        session.add(drop)
    assert box.drop("b.jsonl", GOOD).kind == "duplicate"
    sentence = box.read("done/b.jsonl.receipt.json")["sentence"]
    assert f"which is {state}: {why}; to use it again: dropforge drops restore 1 --reason TEXT" in sentence
    drops.restore(box.engine, 1, Word("mended", NOW), box.settings)


@pytest.mark.parametrize(
    ("values", "folder", "runs"),
    [
        ({"trigger": "drop"}, "", 1),
        ({"trigger": "nightly"}, "", 0),
        ({"trigger": "drop", "gate": {"on": "pinned"}}, "heldout", 0),
        ({"tracks": {"support": {"trigger": "nightly"}}}, "support", 0),
    ],
)
def test_a_run_is_queued_where_drops_trigger_one(
    tmp_path: Path, values: dict[str, Any], folder: str, runs: int
) -> None:
    box = Box(tmp_path, **values)
    assert box.drop("a.jsonl", GOOD, folder).kind == "accepted"
    assert len(box.rows(Run)) == runs


PINNED = {"gate": {"on": "pinned"}}


@pytest.mark.parametrize(
    ("values", "mode", "why"),
    [
        (PINNED, 0o644, None),
        ({"gate": {"on": "pinned", "pinned_by": [str(os.getuid())]}}, 0o600, None),
        ({"gate": {"on": "pinned", "pinned_by": ["12345"]}}, 0o644, "gate.pinned_by is 12345"),
        ({"gate": {"on": "all"}}, 0o644, 'gate.on is "all"'),
        (PINNED, 0o664, "others may write into it (mode 664)"),
    ],
)
def test_a_held_out_file_counts_at_once_if_the_settings_name_its_owner_or_waits_for_a_word(
    tmp_path: Path, values: dict[str, Any], mode: int, why: str | None
) -> None:
    box = Box(tmp_path, **values)
    path = box.put("exam.jsonl", GOOD, "heldout")
    path.chmod(mode)
    outcome = box.take(path)
    (drop,) = box.rows(Drop)
    receipt = box.read("done/exam.jsonl.receipt.json")
    assert outcome.kind == drop.state == receipt["state"] == ("proposed" if why else "accepted")
    assert box.rows(Drop)[-1].owner == name_of(os.getuid())
    if why:
        said = f"it is {name_of(os.getuid())}'s, and {why}"
        assert drop.reason == said
        assert receipt["sentence"] == f"3 held-out records wait for a person: dropforge drops accept 1; {said}"
    assert box.kinds()[-1] == f"drop_{drop.state}"
    assert box.store() == [f"{drop.sha256}.jsonl"]


def test_what_somebody_proposed_does_not_stand_in_the_way_of_the_owners_own_copy(tmp_path: Path) -> None:
    box = Box(tmp_path, gate={"on": "pinned", "pinned_by": ["12345"]})
    assert box.drop("a.jsonl", GOOD, "heldout").kind == "proposed"
    box.settings = Settings.model_validate({**box.settings.model_dump(), "gate": {"on": "pinned"}})
    box.restart()
    assert box.drop("mine.jsonl", GOOD, "heldout").kind == "accepted"
    with pytest.raises(DropforgeError, match="accepted already, as drop 2"):
        drops.accept(box.engine, 1, Word("", NOW), box.settings)
    assert box.drop("again.jsonl", GOOD, "heldout").kind == "duplicate"


@pytest.mark.parametrize(("missing", "kind"), [(1, "no_room"), (0, "accepted")])
def test_a_file_that_would_bring_the_disk_under_its_mark_waits_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: int, kind: str
) -> None:
    box = Box(tmp_path, intake={"on_bad_rows": "reject"})
    path = box.put("a.jsonl", GOOD)
    free = box.settings.disk.low_water_bytes + path.stat().st_size - missing
    monkeypatch.setattr(Disk, "free_bytes", lambda _self: free)
    outcome = box.take(path)
    assert (outcome.kind, path.exists()) == (kind, missing == 1)
    assert "(disk.low_water_bytes); it waits for room" in outcome.message or not missing


def test_a_full_queue_leaves_the_file_where_it_is_and_says_so(tmp_path: Path) -> None:
    box = Box(tmp_path, intake={"max_waiting_drops": 1}, gate={"on": "pinned"})
    box.drop("a.jsonl", GOOD)
    path = box.put("b.jsonl", [{"instruction": "other", "output": "b"}])
    assert box.take(path).kind == "queue_full"
    assert "max_waiting_drops" in box.take(path).message
    assert path.exists()
    assert box.intake.limit.full_tracks() == ["default"]
    assert box.drop("c.jsonl", GOOD, "support").kind == "accepted"
    assert box.drop("c.jsonl", GOOD, "heldout").kind == "accepted"
    with database.transaction(box.engine) as session:
        drop = session.get_one(Drop, 1)
        drop.first_run = 1
        session.add(drop)
    assert box.intake.limit.full_tracks() == []
    assert box.take(path).kind == "accepted"


def test_what_is_gone_or_a_folder_by_now_is_no_file(tmp_path: Path) -> None:
    box = Box(tmp_path)
    assert box.take(box.inbox / "a.jsonl").kind == "gone"
    (box.inbox / "a.jsonl").mkdir()
    assert box.take(box.inbox / "a.jsonl").kind == "gone"
    assert (box.inbox / "a.jsonl").is_dir()


def test_a_start_removes_what_a_dead_daemon_had_half_written_and_nothing_else(tmp_path: Path) -> None:
    box = Box(tmp_path)
    folder = box.inbox / "rejected" / "support"
    (folder / ".x.json.q.tmp").mkdir(parents=True)
    names = ("a.jsonl", "a.jsonl.receipt.json", ".hidden", "b.json.tmp")
    for name in (*names, ".a.jsonl.receipt.json.0123.tmp"):
        (folder / name).write_text("part")
    (box.settings.state_folder / "incoming" / "0.tmp").write_text("part")
    box.restart()
    assert {path.name for path in folder.iterdir() if path.is_file()} == set(names)
    assert box.no_litter()


def test_names_that_are_taken_get_a_number_and_nothing_is_overwritten(tmp_path: Path) -> None:
    box = Box(tmp_path)
    (box.inbox / "done" / "a.jsonl").write_text("mine")
    (box.inbox / "done" / "a-2.jsonl.receipt.json").write_text("not JSON")
    (box.inbox / "done" / "a-3.jsonl.errors.json").write_text('{"drop": 1}')
    box.drop("a.jsonl", GOOD)
    assert (box.inbox / "done" / "a.jsonl").read_text() == "mine"
    assert (box.inbox / "done" / "a-2.jsonl.receipt.json").read_text() == "not JSON"
    assert (box.inbox / "done" / "a-4.jsonl").read_bytes() == jsonl(GOOD)
    assert box.read("done/a-4.jsonl.receipt.json")["drop"] == 1
    for number in range(5, 21):
        (box.inbox / "done" / f"a-{number}.jsonl").touch()
    box.drop("a.jsonl", GOOD[:1])
    assert (box.inbox / "done" / "a-2000.jsonl").exists(), "thousands of one name are not gone through for each"


@pytest.mark.parametrize(
    "name",
    [
        b"caf\xe9\n\x1b[31m.jsonl",
        b"x" * 249 + b".jsonl",
        "é".encode() * 124 + b".jsonl",
        b" .jsonl",
        "\u202e.jsonl".encode(),
    ],
)
def test_any_name_that_a_file_can_have_is_answered(tmp_path: Path, name: bytes) -> None:
    box = Box(tmp_path)
    for count in (1, 2):
        outcome = box.drop(os.fsdecode(name), GOOD)
        assert outcome.kind in {"accepted", "duplicate"}
        assert outcome.name.isprintable()
        assert len(box.files("done")) == 2 * count
    assert box.rows(Drop)[0].name_bytes == name
    assert box.files("") == [f"done/{path}" for path in box.files("done")]
    receipts_found = [path for path in box.files("done") if path.endswith(".receipt.json")]
    assert len(receipts_found) == 2


def test_a_file_that_changes_while_it_is_read_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Box(tmp_path)
    path = box.put("a.jsonl", jsonl(GOOD))
    read = os.read

    def read_and_append(fd: int, size: int) -> bytes:
        data = read(fd, size)
        with path.open("ab") as file:
            file.write(b"more\n")
        return data

    with monkeypatch.context() as patch:
        patch.setattr("daemon.inbox.safe_copy.os.read", read_and_append)
        assert box.take(path).kind == "changed"
    assert (box.rows(Drop), box.store(), box.no_litter()) == ([], [], True)
    assert path.exists()


def test_a_file_that_cannot_be_read_stays_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Box(tmp_path)
    path = box.put("a.jsonl", GOOD)
    with monkeypatch.context() as patch:
        broken = Mock(side_effect=OSError(errno.EIO, "Input/output error"))
        patch.setattr("daemon.inbox.safe_copy.os.read", broken)
        assert box.take(path).kind == "unreadable"
        assert "Input/output error" in box.take(path).message
    assert box.kinds() == []
    assert box.no_litter()
    assert box.take(path).kind == "accepted"


def test_a_full_disk_raises_and_leaves_the_file_in_the_inbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Box(tmp_path)
    path = box.put("a.jsonl", GOOD)
    with monkeypatch.context() as patch:
        full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
        patch.setattr("daemon.inbox.safe_copy.os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            box.take(path)
    assert path.exists()
    assert (box.rows(Drop), box.no_litter()) == ([], True)
    assert box.take(path).kind == "accepted"


die = Mock(side_effect=PowerCut)


def at_the_move(patch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    """Act when the source leaves the inbox, and at no other rename."""
    rename = os.rename

    def renamed(source: Any, target: Any, **folders: Any) -> None:
        if folders:
            action()
        rename(source, target, **folders)

    patch.setattr("daemon.inbox.answers.receipts.os.rename", renamed)


#: Where the daemon may die while it takes a file.
CUTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "before the transaction": lambda patch: patch.setattr("daemon.queue.run_queue.enqueue", die),
    "before the document": lambda patch: patch.setattr("daemon.inbox.answers.receipts.durable.write_json", die),
    "before the move": lambda patch: at_the_move(patch, die),
}


@pytest.mark.parametrize("cut", ["before the document", "before the move"])
@pytest.mark.parametrize("kind", ["rejected", "duplicate", "proposed"])
def test_a_daemon_that_dies_while_it_answers_gives_one_answer_after_its_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str, kind: str
) -> None:
    box = Box(tmp_path)
    box.drop("first.jsonl", GOOD)
    path = box.put("a.jsonl", [{"instruction": "a"}] if kind == "rejected" else GOOD, "heldout" * (kind == "proposed"))
    with monkeypatch.context() as patch:
        CUTS[cut](patch)
        with pytest.raises(PowerCut):
            box.take(path)
    box.restart()
    outcome = box.take(path, NOW + 1000)
    assert (outcome.kind, outcome.drop) == (kind, 2)
    assert [drop.state for drop in box.rows(Drop)] == ["accepted", kind]
    folder = "rejected" if kind == "rejected" else "done"
    assert len([name for name in box.files(folder) if name.startswith("a")]) == 2
    assert not path.exists()


def test_a_new_file_under_the_old_name_is_not_moved_for_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(tmp_path)
    path = box.put("a.jsonl", GOOD)
    write = durable.write_json

    def write_and_replace(target: Path, value: Any) -> None:
        write(target, value)
        path.unlink()
        path.write_bytes(jsonl([{"instruction": "new", "output": "file"}]))

    with monkeypatch.context() as patch:
        patch.setattr("daemon.inbox.answers.receipts.durable.write_json", write_and_replace)
        assert box.take(path).kind == "accepted"
    assert path.exists()
    assert box.files("done") == ["a.jsonl.receipt.json"]
    assert box.take(path).drop == 2
    assert box.read("done/a-2.jsonl.receipt.json")["drop"] == 2


def test_a_file_that_cannot_leave_the_inbox_is_recorded_once_and_moved_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(tmp_path)
    path = box.put("a.jsonl", GOOD)
    with monkeypatch.context() as patch:
        at_the_move(patch, Mock(side_effect=PermissionError(errno.EPERM, "Operation not permitted")))
        for _ in range(3):
            outcome = box.take(path)
            assert outcome.kind == "not_moved"
            assert "recorded as drop 1" in outcome.message
    assert len(box.rows(Drop)) == 1
    assert box.take(path).kind == "accepted"
    assert box.files("done") == ["a.jsonl", "a.jsonl.receipt.json"]
    # Another file under the name is another file.
    assert box.drop("a.jsonl", [{"instruction": "new", "output": "y"}]).drop == 2


@pytest.mark.parametrize("other", ["link", "pipe", "file"])
def test_what_takes_a_files_place_after_the_look_is_not_read_and_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    box = Box(tmp_path)
    path = box.put("a.jsonl", GOOD)
    secret = tmp_path / "secret.jsonl"
    secret.write_bytes(jsonl(GOOD))

    def look_then_swap(name: bytes, folder_fd: int) -> os.stat_result:
        seen = os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
        path.unlink()
        if other == "link":
            path.symlink_to(secret)
        elif other == "pipe":
            os.mkfifo(path)
        else:
            secret.rename(path)
        return seen

    with monkeypatch.context() as patch:
        patch.setattr("daemon.inbox.intake.look", look_then_swap)
        assert box.take(path).kind == ("unreadable" if other == "link" else "changed")
    assert (box.rows(Drop), box.store(), box.no_litter()) == ([], [], True)


def test_a_file_that_somebody_else_may_have_moved_there_waits_for_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(tmp_path, gate={"on": "pinned"})
    assert box.drop("a.jsonl", GOOD, "heldout").kind == "accepted"
    # As under a unit that forbids it, the daemon cannot set the sticky bit itself.
    monkeypatch.setattr(os, "fchmod", lambda *_: None)
    box.inbox.chmod(0o2770)
    assert box.drop("b.jsonl", GOOD[:1], "heldout").kind == "proposed"
    assert "chmod +t" in str(box.rows(Drop)[1].reason)


def of_member(box: Box, name: str, data: list[Any], folder: str = "") -> Outcome:
    path = box.put(name, data, folder)
    os.chown(path, 12345, 12345)
    return box.take(path)


@pytest.mark.skipif(os.geteuid() != 0 and "CI" not in os.environ, reason="only root gives files away")
@pytest.mark.parametrize(("folder", "first"), [("", "accepted"), ("heldout", "proposed")])
def test_one_owners_waiting_drops_keep_no_other_owners_file_out(tmp_path: Path, folder: str, first: str) -> None:
    box = Box(tmp_path, intake={"max_waiting_drops": 1}, gate={"on": "pinned"})
    assert of_member(box, "a.jsonl", GOOD[:1], folder).kind == first
    more = of_member(box, "b.jsonl", GOOD[1:2], folder)
    assert more.kind == "queue_full"
    assert more.message.startswith("1 ")
    assert " of 12345 wait for " in more.message
    assert box.drop("own.jsonl", GOOD[2:], folder).kind == "accepted"


def test_a_missing_folder_of_our_own_is_an_error_and_not_a_file_that_is_gone(tmp_path: Path) -> None:
    box = Box(tmp_path)
    (box.settings.work_folder / "incoming").rmdir()
    (box.inbox / "a.jsonl").write_bytes(jsonl(GOOD))
    with pytest.raises(OSError, match="/incoming/"):
        box.intake.take(Settled("default", "train", b"a.jsonl"), NOW)
    (box.settings.work_folder / "incoming").mkdir()
    assert box.intake.take(Settled("default", "train", b"a.jsonl"), NOW).kind == "accepted"
