"""Conversations become one record per learned answer, in each form alike; nothing of a row is lost unsaid."""

import json
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from pipeline.records.conversation import FORMS
from pipeline.records.records import Record, Row, read_records, records_of
from pipeline.records.row_findings import schema_findings
from pipeline.records.validate import Options, Validation, validate

Said = list[tuple[str, str]]
TALK: Said = [("system", "Be brief."), ("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")]
SCHEMAS = {
    key: Draft202012Validator(json.loads((Path(__file__).parents[3] / "schemas" / form.schema).read_text()))
    for key, form in FORMS.items()
}


def messages(said: Said, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in said], **more}


def sharegpt(said: Said) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {"conversations": [{"from": names[role], "value": text} for role, text in said]}


def alpaca(said: Said) -> dict[str, Any]:
    texts = [text for role, text in said if role != "system"]
    pairs = [list(pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
    system = next((text for role, text in said if role == "system"), "")
    return {"system": system, "history": pairs[:-1], "instruction": pairs[-1][0], "output": pairs[-1][1]}


WAYS: dict[str, Callable[[Said], dict[str, Any]]] = {
    "messages": messages,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "system apart": lambda said: {**sharegpt(said[1:]), "system": said[0][1]},
    "other names": lambda said: messages(
        [({"system": "developer", "user": "human"}.get(r, "bot"), t) for r, t in said]
    ),
}


def written(folder: Path, rows: Iterable[Any]) -> Path:
    path = folder / "drop.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def records(folder: Path, *rows: Any) -> list[Record]:
    return [record for record in read_records(written(folder, rows)) if isinstance(record, Record)]


def check(folder: Path, *rows: Any, options: Options = Options()) -> Validation:  # noqa: B008 - frozen
    return validate(written(folder, rows), options)


@pytest.mark.parametrize("way", WAYS)
def test_each_form_gives_a_record_per_answer_after_the_turns_before_it(tmp_path: Path, way: str) -> None:
    found = records(tmp_path, WAYS[way](TALK))
    opening = tuple(text for _, text in TALK)  # of two exchanges, as the first question is short
    assert found == [
        Record(1, "One?", "", "1", turns=tuple(TALK[:1]), opening=opening),
        Record(1, "Two?", "", "2", turns=tuple(TALK[:3]), opening=opening),
    ]


@pytest.mark.parametrize("others", [{}, {"weight": 1}, {"weight": None}], ids=["none", "1", "null, as Parquet has it"])
def test_an_answer_of_the_weight_0_stands_before_later_questions_and_is_no_record(
    tmp_path: Path, others: dict[str, Any]
) -> None:
    row = messages(TALK)
    for turn in row["messages"]:
        turn.update(others)
    row["messages"][2]["weight"] = 0.0
    assert check(tmp_path, row).ok
    (record,) = records(tmp_path, row)
    assert (record.output, record.turns) == ("2", tuple(TALK[:3]))


def test_an_opening_has_one_exchange_after_a_question_that_is_no_greeting(tmp_path: Path) -> None:
    long = ("user", "a" * 41)
    assert {record.opening for record in records(tmp_path, messages([TALK[0], long, *TALK[2:]]))} == {
        ("Be brief.", long[1], "1")
    }


def test_several_unsupported_keys_are_told_in_their_order(tmp_path: Path) -> None:
    row = {**messages(TALK), "images": ["a"], "tools": ["b"], "chosen": "c", "rejected": "d"}
    told = [finding.message.split('"')[1] for finding in check(tmp_path, row).findings]
    assert told == ["images", "tools", "chosen", "rejected"]


def test_the_input_of_an_alpaca_row_stays_the_input_of_its_last_question(tmp_path: Path) -> None:
    row = {"instruction": "Sum.", "input": "a text", "output": "b", "history": [["Hi", "Hello"]], "group": "g"}
    first, last = records(tmp_path, row)
    assert (first.instruction, first.input, first.group) == ("Hi", "", "g")
    assert (last.instruction, last.input, last.turns) == ("Sum.", "a text", (("user", "Hi"), ("assistant", "Hello")))


def test_a_system_message_alone_makes_no_conversation_of_an_alpaca_row(tmp_path: Path) -> None:
    """Its unit is its document or its prompt, as without."""
    (record,) = records(tmp_path, alpaca(TALK[:3]))
    assert (record.turns, record.opening) == ((("system", "Be brief."),), ())


def test_a_file_with_rows_of_two_forms_is_refused_and_both_are_named(tmp_path: Path) -> None:
    plain = {"instruction": "a", "input": "", "output": "b"}
    found = check(tmp_path, plain, plain, messages(TALK), options=Options(most_bad_rows=9))
    (finding,) = found.findings
    assert (finding.rule, found.complete) == ("form", False)
    assert finding.message == (
        'the file has rows of 2 forms: Alpaca ("instruction") and OpenAI messages ("messages", line 3)'
    )
    assert finding.remedy == "drop a file for each form, or rename the key that is not meant"
    both = check(tmp_path, messages(TALK), {**sharegpt(TALK), **messages(TALK)})
    assert both.findings[0].message == (
        'the file has rows of 2 forms: OpenAI messages ("messages", line 1) and ShareGPT ("conversations", line 2)'
    )


@pytest.mark.parametrize(
    ("said", "turn", "message"),
    [
        ([("user", "a"), ("user", "b"), ("assistant", "c")], 2, "two turns of the user follow each other"),
        ([("assistant", "a")], 1, "the assistant's turn has no question before it"),
        ([*TALK, ("system", "x"), *TALK[1:]], 6, "a system message stands after other turns"),
        (TALK[:4], 4, "the last turn is not the assistant's"),
        ([("user", "a"), ("narrator", "b")], 2, 'the role "narrator" is not known'),
        ([("user", "a"), ("assistant", "\n")], 2, "content is blank"),
        ([("user", "a"), ("assistant", "b\x02")], 2, "messages holds the control character U+0002"),
        (
            [("user", "</s>"), ("assistant", "b")],
            1,
            "messages holds </s>, a special token of the base model's tokenizer",
        ),
    ],
)
def test_a_bad_turn_is_told_by_line_and_turn(tmp_path: Path, said: Said, turn: int, message: str) -> None:
    found = check(tmp_path, messages(TALK), messages(said), options=Options(special_tokens=("</s>",)))
    (finding,) = found.findings
    assert (finding.line, finding.field, finding.turn, finding.message) == (2, "messages", turn, message)
    assert found.reason == f"line 2, turn {turn}: {message}"


def test_bad_turns_are_counted_as_turns_and_not_as_rows(tmp_path: Path) -> None:
    found = check(tmp_path, {"messages": sharegpt(TALK[:3])["conversations"]})
    assert found.bad_rows == 1
    assert {(kind.where, kind.often) for kind in found.kinds} == {(":1, turn 1", " (in 3 turns, first here)")}


def test_a_system_message_beside_the_turns_and_among_them_is_one_too_many(tmp_path: Path) -> None:
    (finding,) = check(tmp_path, {**messages(TALK), "system": "x"}).findings
    assert (finding.turn, finding.rule) == (1, "role")


def test_unused_keys_are_listed_once_those_of_turns_too(tmp_path: Path) -> None:
    rows = [messages([("user", f"q{n}"), ("assistant", "a")], **{"score": n, "note\n": 1}) for n in range(3)]
    for row in rows:
        row["messages"][0]["name"] = "Ann"
    found = check(tmp_path, *rows)
    (notice,) = found.warnings
    assert (notice.kind, notice.rows, notice.line) == ("ignored_keys", 3, 1)
    assert notice.message == "ignored: score, note\\n, messages.name"


def test_a_conversation_of_any_length_takes_bounded_memory(tmp_path: Path) -> None:
    turns = '{"role":"user","content":"a"},{"role":"assistant","content":"b"},'
    path = tmp_path / "drop.jsonl"
    path.write_text(
        '{"messages":[' + turns * 500_000 + "0]}\n" + '{"messages":[' + turns * 60_000 + turns[:-1] + "]}\n"
    )
    tracemalloc.start()
    try:
        found = validate(path, Options(most_bad_rows=9))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [(finding.line, finding.rule) for finding in found.findings] == [(1, "too_long"), (2, "maxitems")]
    assert found.findings[1].message == "the conversation has more than 300 turns"
    assert peak < 150_000_000


ROLE: st.SearchStrategy[Any] = st.sampled_from(
    ["system", "developer", "user", "human", "assistant", "gpt", "tool", "x", "", None, 5, []]
)
TEXT: st.SearchStrategy[Any] = st.sampled_from(["a", "b", " ", "", "\x1c"]) | st.none() | st.integers() | st.just([])
WEIGHT = st.sampled_from([0, 1, 1.0, 0.5, True, False, None, "1"])
TURN = st.fixed_dictionaries({}, optional={"role": ROLE, "content": TEXT, "weight": WEIGHT, "name": TEXT}) | TEXT
GOOD = st.sampled_from(TALK).map(lambda turn: {"role": turn[0], "content": turn[1]})
TURNS = st.lists(TURN | GOOD, max_size=5) | st.lists(GOOD, max_size=6) | TEXT
MORE = st.fixed_dictionaries({}, optional={"system": TEXT, "tags": TEXT, "group": TEXT, "id": TEXT, "tools": TEXT})


@given(turns=TURNS, more=MORE)
def test_the_quick_road_and_the_findings_give_the_same_answer(turns: Any, more: dict[str, Any]) -> None:
    row = Row(1, {"messages": turns, **more})
    found = records_of(row)
    assert (not found) == bool(schema_findings(row))
    assert not found or SCHEMAS["messages"].is_valid(row.value)


HISTORY = st.lists(st.lists(TEXT, max_size=3) | st.just(["a", "b"]), max_size=3) | TEXT


@given(history=HISTORY, more=MORE)
def test_the_quick_road_and_the_findings_give_the_same_answer_for_history(history: Any, more: dict[str, Any]) -> None:
    row = Row(1, {"instruction": "a", "output": "b", "history": history, **more})
    found = records_of(row)
    assert (not found) == bool(schema_findings(row))
    assert not found or SCHEMAS["instruction"].is_valid(row.value)
