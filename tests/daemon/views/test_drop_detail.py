"""A drop in full."""

import json
from typing import Any

import pytest

from daemon.views.drops import drop_detail, drop_rows, findings_of
from daemon.views.overview import Overview


@pytest.fixture
def overview(lived_in: Any) -> Overview:
    return Overview.of(lived_in.settings)


def test_the_champions_that_were_trained_on_a_drop_are_listed(overview: Overview) -> None:
    found = drop_detail(overview, 2)
    assert (found.champions, found.serving, found.findings) == ((1,), True, ())
    assert drop_detail(overview, 5).champions == ()
    assert drop_detail(overview, 1).champions == (), "nothing is trained on a held-out drop"


def test_what_was_found_in_a_drop_is_kept_with_its_counts(overview: Overview) -> None:
    (found,) = findings_of(overview, 4)
    assert (found.message, found.rows, found.line) == ("output is missing", 1, 1)
    assert found.remedy
    assert findings_of(overview, 2) == ()


def test_rows_are_read_a_page_at_a_time_and_long_ones_are_cut(overview: Overview, lived_in: Any) -> None:
    rows = [{"instruction": f"q{number}", "output": "x" * (number * 1000)} for number in range(1, 31)]
    lived_in.take("long.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    drop = overview.drops(most=1)[0]
    first, second = drop_rows(overview, drop), drop_rows(overview, drop, after=20)
    assert [row.line for row in (*first, *second)] == list(range(1, 31))
    assert [row.cut for row in first[:4]] == [False, False, True, True]
    assert len(second[-1].output) == 2000


def test_a_conversation_is_shown_with_the_turns_before_its_last_question(overview: Overview, lived_in: Any) -> None:
    said = [("system", "Be brief."), ("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")]
    row = {"messages": [{"role": role, "content": text} for role, text in said]}
    lived_in.take("chat.jsonl", json.dumps(row))
    drop = overview.drops(most=1)[0]
    (shown,) = drop_rows(overview, drop)
    assert shown.earlier == "system:\nBe brief.\n\nuser:\nOne?\n\nassistant:\n1"
    assert (shown.instruction, shown.output, shown.cut) == ("Two?", "2", False)
    assert (drop.rows, drop.records) == (1, 2)


def test_a_rejected_drop_has_no_rows_and_one_that_is_gone_neither(overview: Overview, lived_in: Any) -> None:
    assert drop_rows(overview, overview.drop(4)) == ()
    for path in (lived_in.settings.state_folder / "drops").iterdir():
        path.unlink()
    assert drop_rows(overview, overview.drop(2)) == ()
