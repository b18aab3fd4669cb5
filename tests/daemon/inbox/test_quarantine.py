"""A drop with bad rows is given back whole, or taken without them; either way every row is answered for."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, Mock

import pytest

from daemon.state.tables import Drop, Event, Run
from pipeline import durable
from pipeline.records.records import Record, read_records
from tests.daemon.inbox.test_intake import CUTS, FINDINGS, NOW, Box, PowerCut, jsonl, rows

GOOD = rows(98)
BAD = {"instruction": "a", "output": 7}
MIXED = jsonl([*GOOD[:50], BAD, *GOOD[50:]]) + b"not JSON\n"


def box(root: Path, **intake: Any) -> Box:
    return Box(root, intake={"on_bad_rows": "quarantine", "max_bad_percent": 2, **intake})


def stored(made: Box) -> list[Record]:
    path = made.settings.state_folder / "drops" / made.store()[0]
    found = list(read_records(path))
    assert all(isinstance(row, Record) for row in found)
    return [row for row in found if isinstance(row, Record)]


def test_a_drop_within_the_ceilings_is_taken_without_its_bad_rows_which_receipt_and_errors_name(tmp_path: Path) -> None:
    made = box(tmp_path)
    outcome = made.drop("a.jsonl", MIXED)
    assert (outcome.kind, outcome.drop, outcome.run) == ("accepted", 1, 1)
    drop = made.rows(Drop)[0]
    assert (drop.state, drop.rows, drop.quarantined, drop.findings, drop.reason) == ("accepted", 98, 2, 2, None)
    assert [record.instruction for record in stored(made)] == [row["instruction"] for row in GOOD]
    assert made.store() == [f"{drop.sha256}.jsonl"]
    assert durable.sha256_file(made.settings.state_folder / "drops" / made.store()[0]) == drop.sha256
    assert made.files("done") == ["a.jsonl", "a.jsonl.errors.json", "a.jsonl.receipt.json"]
    assert (made.inbox / "done" / "a.jsonl").read_bytes() == MIXED
    assert made.no_litter()
    receipt, errors = (made.read(f"done/a.jsonl.{name}.json") for name in ("receipt", "errors"))
    FINDINGS.validate(errors)
    own = hashlib.sha256(MIXED).hexdigest()
    assert (receipt["rows"], receipt["quarantined"], receipt["sha256"]) == (98, 2, own)
    assert receipt["content_sha256"] == drop.sha256 != own
    assert receipt["sentence"].endswith("; 2 bad rows were set aside")
    assert (errors["state"], errors["rows"], errors["good_rows"], errors["quarantined"]) == ("accepted", 100, 98, 2)
    assert [(found["line"], found["rule"]) for found in errors["findings"]] == [(51, "type"), (100, "json")]
    assert "drop them in a file of their own" in errors["remedy"]
    assert made.rows(Event)[-1].detail["file_sha256"] == own


@pytest.mark.parametrize(
    ("intake", "words"),
    [
        ({"on_bad_rows": "reject"}, "2 findings; the first: line 51"),
        ({"max_bad_rows": 1}, "2 of 100 rows are bad, intake.max_bad_rows allows 1; 2 findings"),
        ({"max_bad_percent": 1.99}, "2 of 100 rows are bad, intake.max_bad_percent allows 1.99 %, these are 2 %"),
    ],
)
def test_a_drop_over_a_ceiling_is_given_back_whole_and_the_reason_names_it(
    tmp_path: Path, intake: dict[str, Any], words: str
) -> None:
    made = box(tmp_path, **intake)
    assert made.drop("a.jsonl", MIXED).kind == "rejected"
    errors = made.read("rejected/a.jsonl.errors.json")
    FINDINGS.validate(errors)
    assert errors["reason"].startswith(words)
    assert (errors["quarantined"], made.rows(Drop)[0].reason) == (0, errors["reason"])
    assert (made.store(), made.rows(Run), made.files("done")) == ([], [], [])


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("all bad.jsonl", jsonl([BAD]), "1 of 1 row is bad, no row is left; line 1: "),
        ("empty.jsonl", b"", "the file has no records"),
        ("packed.jsonl", b"\x1f\x8b\x08", "the file is gzip-compressed"),
        (
            "unread.json",
            b"[" + b",".join(jsonl([row]) for row in GOOD) + b",",
            "line 99: the file ends before its array does",
        ),
        (
            "lost.jsonl",
            jsonl([{**row, "instruction": "Classify", "text": row["instruction"]} for row in GOOD]),
            "line 1: 98",
        ),
    ],
)
def test_what_setting_rows_aside_cannot_mend_is_given_back(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    made = box(tmp_path, max_bad_percent=100)
    assert made.drop(name, data).kind == "rejected"
    errors = made.read(f"rejected/{name}.errors.json")
    FINDINGS.validate(errors)
    assert errors["reason"].startswith(reason)
    assert made.store() == []


def test_the_same_file_again_and_its_good_rows_alone_are_duplicates(tmp_path: Path) -> None:
    made = box(tmp_path)
    made.drop("a.jsonl", MIXED)
    assert made.drop("b.jsonl", MIXED).kind == "duplicate"
    other = MIXED + jsonl([{"output": "b"}])
    assert Box(tmp_path, intake={"on_bad_rows": "quarantine", "max_bad_percent": 5}).drop("c.jsonl", other).kind == (
        "duplicate"
    )
    assert made.drop("d.jsonl", jsonl(GOOD)).kind == "duplicate"
    assert [drop.duplicate_of for drop in made.rows(Drop)] == [None, 1, 1, 1]
    assert len(made.rows(Run)) == len(made.store()) == 1


def cut_between_documents(patch: pytest.MonkeyPatch) -> None:
    once = Mock(wraps=durable.write_json, side_effect=[DEFAULT, PowerCut])
    patch.setattr("daemon.inbox.answers.receipts.durable.write_json", once)


@pytest.mark.parametrize(
    ("cut", "on_bad_rows"),
    [
        *((cut, "quarantine") for cut in (*CUTS.values(), cut_between_documents)),
        (CUTS["before the document"], "reject"),
    ],
)
def test_a_daemon_that_dies_while_it_sets_rows_aside_answers_once_after_its_restart_whatever_the_settings_say_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: Callable[[pytest.MonkeyPatch], None], on_bad_rows: str
) -> None:
    made = box(tmp_path)
    path = made.put("a.jsonl", MIXED)
    with monkeypatch.context() as patch:
        cut(patch)
        with pytest.raises(PowerCut):
            made.take(path)
    made = box(tmp_path, on_bad_rows=on_bad_rows)
    assert made.take(path, NOW + 1000).kind == "accepted"
    assert [(drop.state, drop.quarantined) for drop in made.rows(Drop)] == [("accepted", 2)]
    assert made.files("done") == ["a.jsonl", "a.jsonl.errors.json", "a.jsonl.receipt.json"]
    assert made.files("rejected") == []
    receipt, errors = (made.read(f"done/a.jsonl.{name}.json") for name in ("receipt", "errors"))
    FINDINGS.validate(errors)
    assert (receipt["drop"], receipt["run"], errors["drop"], errors["quarantined"]) == (1, 1, 1, 2)
    assert len(made.store()) == len(made.rows(Run)) == 1
