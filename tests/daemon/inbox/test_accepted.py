"""An accepted drop starts a run where it should, and its receipt says what its track lacks for a verdict."""

import json
from pathlib import Path
from typing import Any

import pytest

from daemon.queue.attempt_ends import Then
from daemon.queue.drops import accept
from daemon.state.events import Word
from daemon.state.tables import Drop, Run
from tests import run_owner
from tests.daemon.inbox.test_intake import NOW, Box, rows

PINNED = {"gate": {"on": "pinned"}}


def warning(box: Box, name: str) -> str | None:
    found = [one["message"] for one in box.read(f"done/{name}.receipt.json")["warnings"]]
    return found[0] if found else None


def test_a_receipt_says_that_all_rows_of_the_track_are_too_few(tmp_path: Path) -> None:
    box = Box(tmp_path, evaluate={"metric": "exact_match"})
    box.drop("a.jsonl", rows(300))
    said = warning(box, "a.jsonl")
    assert said is not None
    assert said.startswith("track default has 300 rows, and a verdict needs 100 held-out records, so about 780 rows")
    box.drop("b.jsonl", rows(300, 300))
    assert "track default has 600 rows" in (warning(box, "b.jsonl") or "")
    box.drop("other.jsonl", rows(5), "support")
    box.drop("exam.jsonl", rows(50), "heldout")
    box.drop("c.jsonl", rows(180, 600))
    assert warning(box, "c.jsonl") is None
    assert warning(box, "exam.jsonl") is None, "it waits for approval, and nothing is judged on it"


def test_a_receipt_says_how_many_records_are_pinned(tmp_path: Path) -> None:
    box = Box(tmp_path, evaluate={"metric": "exact_match"}, **PINNED)
    box.drop("exam.jsonl", rows(60), "heldout")
    assert "track default has 60 pinned records, and a verdict needs 100" in (warning(box, "exam.jsonl") or "")
    box.drop("a.jsonl", rows(3, 900))
    assert "60 pinned records" in (warning(box, "a.jsonl") or "")
    box.drop("more.jsonl", rows(40, 60), "heldout")
    assert warning(box, "more.jsonl") is None


@pytest.mark.parametrize(
    ("outcome", "values", "begins"),
    [
        ("insufficient_evidence", PINNED, True),
        ("insufficient_evidence", {**PINNED, "trigger": "nightly"}, False),
        ("insufficient_evidence", {}, False),
        ("not_shown_better", PINNED, False),
        (None, PINNED, False),
    ],
)
def test_pinned_records_start_a_run_where_the_last_one_lacked_some(
    tmp_path: Path, outcome: str | None, values: dict[str, Any], *, begins: bool
) -> None:
    box = Box(tmp_path, **values)
    box.drop("a.jsonl", rows(3))
    if outcome is None:
        run_owner.leave(box.engine, box.begin(), NOW, Then.FAIL)
    else:
        box.end(outcome)
    taken = box.drop("exam.jsonl", rows(200, 900), "heldout")
    assert (taken.run is not None, len(box.rows(Run))) == (begins, 2 if begins else 1)
    if begins:
        assert box.read("done/exam.jsonl.receipt.json")["sentence"].endswith("they are in run 2")
        assert box.drop("more.jsonl", rows(20, 2000), "heldout").run == 2, "it is in the one that is queued"


def test_records_that_a_person_lets_count_start_a_run(tmp_path: Path) -> None:
    box = Box(tmp_path, **PINNED)
    box.drop("a.jsonl", rows(3))
    box.end("insufficient_evidence")
    path = box.put("exam.jsonl", rows(200, 900), "heldout")
    path.chmod(0o666)
    assert box.take(path).kind == "proposed"
    assert len(box.rows(Run)) == 1, "nobody has said that they count"
    accept(box.engine, 2, Word("I looked at them", NOW), box.settings)
    assert [run.state for run in box.rows(Run)] == ["succeeded", "queued"]


def talk(turns: int, number: int = 0) -> dict[str, list[dict[str, Any]]]:
    said = [(role, f"{role} {number}") for _ in range(turns) for role in ("user", "assistant")]
    return {"messages": [{"role": role, "content": text} for role, text in said]}


def test_a_receipt_accounts_for_each_row_and_each_answer(tmp_path: Path) -> None:
    box = Box(tmp_path, intake={"on_bad_rows": "quarantine", "max_bad_percent": 50})
    quiet = talk(2, 1)
    quiet["messages"][1]["weight"] = 0
    assert box.drop("chat.jsonl", [talk(3), quiet, talk(1), {"messages": []}]).kind == "accepted"
    receipt = box.read("done/chat.jsonl.receipt.json")
    (drop,) = box.rows(Drop)
    assert receipt["account"] == (
        "4 rows and 3 further answers = 4 records + 1 bad row + 1 answer of the weight 0 + 1 duplicate"
    )
    assert (receipt["rows"], receipt["records"], drop.rows, drop.records) == (3, 4, 3, 4)
    assert receipt["sentence"].startswith("accepted: 4 records; they are in run 1; 1 bad row was set aside")
    assert box.drop("again.jsonl", [talk(3), quiet, talk(1)]).kind == "duplicate"
    again = box.read("done/again.jsonl.receipt.json")
    assert (again["account"], again["rows"], again["records"]) == (None, 3, 4)


def test_an_array_is_stored_as_it_came_and_without_bad_rows_as_lines(tmp_path: Path) -> None:
    box = Box(tmp_path, intake={"on_bad_rows": "quarantine", "max_bad_percent": 50})
    assert box.drop("a.json", json.dumps([talk(2)], indent=1).encode()).kind == "accepted"
    assert box.drop("b.json", json.dumps([talk(2), 7]).encode()).kind == "accepted"
    first, second = ((box.settings.state_folder / f"drops/{drop.sha256}.jsonl").read_text() for drop in box.rows(Drop))
    assert (first, second) == (json.dumps([talk(2)], indent=1), json.dumps(talk(2)) + "\n")
