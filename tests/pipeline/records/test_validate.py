"""A file is held against the schema; every finding says where, what and what to do."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from pipeline.records.fast_path import KEYS, MOST_KEYS
from pipeline.records.records import Row, misnamed_key, records_of
from pipeline.records.row_findings import schema_findings
from pipeline.records.validate import MOST_COMPARED, MOST_FINDINGS, Options, Validation, validate

GOOD = {"instruction": "a", "input": "", "output": "b"}
BARE = {"instruction": "a", "output": "b"}
OTHER, THIRD = {**GOOD, "input": "c"}, {**GOOD, "input": "d"}
TEXTS = st.text(max_size=3) | st.sampled_from(["", " ", "\n\t", "\u2003", "\x1c", "\ufeff", "\u200b", "a"])
VALUES = TEXTS | st.none() | st.integers() | st.booleans() | st.lists(st.integers(), max_size=1)
LABEL = TEXTS | st.sampled_from(["x" * 64, "x" * 65, "a\n", "\x7f", "a\x1f"])
TAGS = st.lists(LABEL | st.integers(), max_size=3) | st.sampled_from([["a"] * 20, ["a"] * 21])
NAMES = st.sampled_from([*KEYS, "Input", "response", "instructions", "id", "Output", "context"])
ROWS = st.dictionaries(NAMES, VALUES, max_size=5) | st.fixed_dictionaries(
    {"instruction": TEXTS, "output": TEXTS},
    optional={"input": VALUES, "id": VALUES, "Input": VALUES, "tags": TAGS | VALUES, "group": VALUES},
)


def check(folder: Path, *rows: Any, options: Options = Options()) -> Validation:  # noqa: B008 - frozen
    path = folder / "drop.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return validate(path, options)


def schema() -> Draft202012Validator:
    path = Path(__file__).parents[3] / "schemas" / "alpaca-record.schema.json"
    return Draft202012Validator(json.loads(path.read_text(encoding="utf-8")))


SCHEMA = schema()


@given(value=ROWS | VALUES)
@example(value={"instruction": "\x1c", "output": "b"})
@example(value={"instruction": "\u200b", "output": "b"})
def test_the_quick_road_and_the_schema_give_the_same_answer(value: Any) -> None:
    misnamed = isinstance(value, dict) and misnamed_key(value, "input")
    row = Row(1, value)
    assert bool(records_of(row)) == (SCHEMA.is_valid(value) and not misnamed)
    assert (not records_of(row)) == bool(schema_findings(row))


@pytest.mark.parametrize(
    ("row", "field", "rule", "message", "remedy"),
    [
        ({"output": "b"}, "instruction", "missing", "instruction is missing", "add the key"),
        ({"instruction": "a"}, "output", "missing", "output is missing", "add the key"),
        ({"instructions": "a", "output": "b"}, "instruction", "misnamed_key", '"instructions"', 'mean "instruction"'),
        ({"instruction": "a", "response": "b"}, "output", "misnamed_key", 'there is "response"', 'you mean "output"'),
        ({"instruction": "a", "Output": "b"}, "output", "misnamed_key", 'there is "Output"', 'did you mean "output"'),
        ({**BARE, "Input": "c"}, "input", "misnamed_key", '"Input" is not', 'did you mean "input"'),
        ({"instruction": " \n", "output": "b"}, "instruction", "blank", "instruction is blank", "write the instr"),
        ({"instruction": "a", "output": ""}, "output", "blank", "output is blank", "write the output"),
        ({"instruction": "a", "output": 7}, "output", "type", "output is a number: 7, not a text", "quotes"),
        ({"instruction": "a", "output": ["b"]}, "output", "type", "output is a list, not a text", "one text"),
        ({**BARE, "input": None}, "input", "type", "input is null", "empty string or leave it out"),
        ({"instruction": "a", "output": None}, "output", "type", "output is null", "write the output"),
        ({**BARE, "group": 7}, "group", "type", "group is a number: 7, not a text", "put it in quotes"),
        ({**BARE, "group": None}, "group", "type", "group is null, not a text", "use an empty string or leave it out"),
        ({**BARE, "tags": "a"}, "tags", "type", "tags are not at most 20 texts of 1 to 64", '"tags": ["one"'),
        ({**BARE, "tags": None}, "tags", "type", "tags are not at most 20 texts", '"tags": ["one"'),
        ({**BARE, "tags": ["a", 7]}, "tags", "type", "tags are not at most 20 texts", '"tags": ["one"'),
        ({**BARE, "tags": [" "]}, "tags", "pattern", "tags are not at most 20 texts", '"tags": ["one"'),
        ({**BARE, "tags": ["a"] * 21}, "tags", "maxitems", "tags are not at most 20 texts", '"tags": ["one"'),
        ({**BARE, "tags": ["a" * 65]}, "tags", "maxlength", "tags are not at most 20 texts", '"tags": ["one"'),
        ({**BARE, "tags": ["a\x1b[1m"]}, "tags", "pattern", "none blank or with control characters", '"tags": ["one"'),
        ("text", None, "type", 'a record is an object, this is a text: "text"', "instruction"),
    ],
)
def test_a_bad_row_is_told_by_field_rule_and_remedy(
    tmp_path: Path, row: Any, field: str | None, rule: str, message: str, remedy: str
) -> None:
    found = check(tmp_path, GOOD, row, GOOD)
    assert (found.rows, found.good_rows, found.findings_total) == (3, 2, 1)
    finding = found.findings[0]
    assert (finding.line, finding.field, finding.rule) == (2, field, rule)
    assert message in finding.message
    assert remedy in finding.remedy
    assert not found.ok
    assert found.reason.startswith("line 2: ")


def test_a_group_is_a_key_of_a_record(tmp_path: Path) -> None:
    groups = ("page 7", "", "\u2003", "</s>")
    rows = [{**GOOD, "input": str(place), "group": group} for place, group in enumerate(groups)]
    found = check(tmp_path, *rows, {"group": "page 7", **GOOD}, options=Options(special_tokens=("</s>",)))
    assert (found.good_rows, found.warnings, found.findings) == (5, (), ())


def test_rows_of_one_prompt_are_told_with_what_becomes_of_them(tmp_path: Path) -> None:
    rows = [GOOD, OTHER, {**GOOD, "instruction": " A"}, {**GOOD, "output": "c"}, {**BARE, "output": "c"}, THIRD]
    same, several = check(tmp_path, *rows).warnings
    assert (same.kind, same.rows, same.line) == ("repeated", 2, 3)
    assert same.message == "the same prompt and answer as in an earlier row: each pair is used once"
    assert (several.kind, several.rows, several.line) == ("several_answers", 2, 4)
    assert several.message == (
        "1 prompt has different answers in this file: all of them are trained on, and where the prompt is held out, "
        "each of them counts as right"
    )
    assert check(tmp_path, GOOD, OTHER, THIRD).warnings == ()


def test_in_a_long_file_only_the_first_rows_are_compared(tmp_path: Path) -> None:
    rows = [{**GOOD, "input": str(number)} for number in range(MOST_COMPARED)]
    assert check(tmp_path, *rows, rows[0]).warnings == ()
    (same,) = check(tmp_path, rows[0], *rows).warnings
    assert (same.rows, "(of the first 10,000 records)" in same.message) == (1, True)


def lost(rows: int, key: str = "text", prompts: int = 1) -> list[dict[str, str]]:
    return [
        {"instruction": f"Classify {number % prompts}", key: f"case number {number}", "output": "yes"}
        for number in range(rows)
    ]


@pytest.mark.parametrize(("rows", "prompts"), [(60, 6), (3000, 2)])
def test_a_question_under_a_key_that_is_not_read_is_a_finding(tmp_path: Path, rows: int, prompts: int) -> None:
    found = check(tmp_path, *lost(rows, prompts=prompts), options=Options(most_bad_rows=9000))
    (finding,) = found.findings
    assert (finding.line, finding.field, finding.rule, found.complete) == (1, "input", "misnamed_key", False)
    said = f'{rows:,} rows have only {prompts} prompts without the key "text", which is not read'
    assert finding.message == said
    assert finding.remedy == 'rename this key to "input"; if it is no part of the question, leave it out'


@pytest.mark.parametrize(
    "rows",
    [
        lost(9),
        lost(60, prompts=7),
        [{**row, "text": "one source"} for row in lost(60)],
        [{**row, "text": "word"} for row in lost(60)],
        [*lost(20), *({**GOOD, "input": str(number)} for number in range(40))],
        [{**GOOD, "output": str(number)} for number in range(60)],
    ],
)
def test_a_key_that_is_no_question_is_none(tmp_path: Path, rows: list[Any]) -> None:
    assert check(tmp_path, *rows).ok


def test_findings_and_kinds_of_warnings_are_bounded_and_counted_on(tmp_path: Path) -> None:
    bad = [{"output": "b"} for _ in range(MOST_FINDINGS + 5)]
    found = check(tmp_path, *bad, options=Options(most_bad_rows=MOST_FINDINGS + 5))
    assert (len(found.findings), found.findings_total) == (MOST_FINDINGS, MOST_FINDINGS + 5)
    assert (found.complete, found.stopped) == (True, False)
    many = check(tmp_path, *({**GOOD, "input": str(number), f"key {number}": 1} for number in range(300)))
    (notice,) = many.warnings
    assert (notice.rows, len(notice.keys), notice.message[-9:]) == (300, 101, "key 19, …")


def test_a_file_that_is_refused_in_any_case_is_not_read_to_its_end(tmp_path: Path) -> None:
    bad = [{"output": "b"} for _ in range(MOST_FINDINGS)]
    whole = check(tmp_path, GOOD, *bad)
    assert (whole.rows, whole.findings_total, whole.complete, whole.stopped) == (1001, 1000, True, False)
    cut = check(tmp_path, GOOD, *bad, GOOD, GOOD)
    assert (cut.rows, cut.good_rows, cut.findings_total, cut.complete, cut.stopped) == (1001, 1, 1000, False, True)
    assert cut.reason == "stopped after 1,000 findings; the first: line 2: instruction is missing"
    ceiling = check(tmp_path, *[{}] * 600, GOOD, options=Options(most_bad_rows=600))
    assert (ceiling.rows, ceiling.findings_total, ceiling.complete) == (601, 1200, True)


def test_a_record_may_have_so_many_keys_and_no_more(tmp_path: Path) -> None:
    most = {**GOOD, **{f"key {number}": 1 for number in range(MOST_KEYS - 3)}}
    assert check(tmp_path, most).ok
    assert SCHEMA.is_valid(most)
    kinds: tuple[object, ...] = (1, [])
    for more in kinds:
        found = check(tmp_path, {**most, "key 0": more, "one more": 1})
        assert [finding.message for finding in found.findings] == ["the record has more than 1,000 keys"]
    assert not SCHEMA.is_valid({**most, "one more": 1})


def test_findings_repeat_little_of_the_data_and_nothing_that_cannot_be_printed(tmp_path: Path) -> None:
    found = check(tmp_path, "\x1b[2J" + "x" * 100_000, {"\x1b" * 1000: 1, "instruction": "a", "output": "b" * 0})
    for finding in found.findings:
        assert finding.message.isprintable()
        assert len(finding.message) < 300


@pytest.mark.parametrize(
    ("content", "command"),
    [
        (b'{\n "instruction": "q"\n}', "jq -c . notes.jsonl > notes-new.jsonl"),
        (b'{"version": 1, "rows": [{"messages": []}]}', "jq -c '.[] | arrays[]' notes.jsonl > notes-new.jsonl"),
        (b'{"instruction": "q", "output": "\xe9"}', "iconv -f WINDOWS-1252 -t UTF-8 notes.jsonl > notes-new.jsonl"),
    ],
)
def test_the_command_that_makes_rows_of_another_json_names_the_file(
    tmp_path: Path, content: bytes, command: str
) -> None:
    (tmp_path / "0f3a.tmp").write_bytes(content)
    (found,) = validate(tmp_path / "0f3a.tmp", Options(path="notes.jsonl")).findings
    assert command in found.remedy


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "drop.jsonl"
    row = json.dumps({**GOOD, "instruction": "x" * 1000}).encode()
    path.write_bytes(b"\n".join([row] * 20_000))
    tracemalloc.start()
    try:
        assert validate(path, Options()).good_rows == 20_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size / 2
