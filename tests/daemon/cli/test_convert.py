"""A table becomes records: which column is which key, what is lost and why, and a result that `check` passes."""

import gzip
import json
import os
import shlex
import signal
import tracemalloc
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from daemon.inbox.tables import conversion
from daemon.inbox.tables.conversion import convert
from daemon.inbox.tables.reading import Table
from pipeline.records.validate import Options
from tests.daemon.conftest import Ended

Command = Callable[..., Ended]
#: Without the time, so that two processes collect the same tests.
packed = partial(gzip.compress, mtime=0)
QA = 'question,answer,id\n"What is 1+1?",2,7\n"two\nlines, yes",007,8\n'
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
RECORDS = [{"instruction": "What is 1+1?", "output": "2"}, {"instruction": "two\nlines, yes", "output": "007"}]


def written(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("qa.csv", QA.encode()),
        ("qa.csv", b"\xef\xbb\xbf" + QA.replace("\n", "\r\n").replace("two\r\n", "two\n").encode()),
        (
            "qa.tsv",
            b'question\tanswer\tid\tnotes, many, many, many\nWhat is 1+1?\t2\t7\t\n"two\nlines, yes"\t007\t8\t\n',
        ),
        ("qa.csv.gz", packed(QA.encode())),
    ],
)
def test_a_table_with_known_columns_needs_no_mapping_and_its_cells_stay_text(
    dropforge: Command, tmp_path: Path, name: str, data: bytes
) -> None:
    (tmp_path / name).write_bytes(data)
    seen = dropforge("convert", name)
    assert (seen.code, seen.err) == (0, "")
    assert "  instruction: column question\n  output: column answer\n  ignored: id" in seen.out
    assert f"{name}: 2 rows = 2 records + 0 rows lost\n" in seen.out
    assert json.dumps(RECORDS[1]) in seen.out
    assert f"nothing is written yet; next:\n  dropforge convert {name} -o qa.jsonl\n" in seen.out
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert dropforge("convert", name, "-o", "qa.jsonl").code == 0
    assert written(tmp_path / "qa.jsonl") == RECORDS
    assert dropforge("check", "qa.jsonl").code == 0
    for output, why in {
        "qa.jsonl": "qa.jsonl is there already",
        "qa.csv.new": "qa.csv.new does not end in .jsonl",
        "no/qa.jsonl": "there is no folder no",
    }.items():
        again = dropforge("convert", name, "-o", output)
        assert (again.code, why in again.err) == (2, True)


def test_each_lost_row_is_counted_with_its_line_and_reason(dropforge: Command, tmp_path: Path) -> None:
    rows = ["instruction,output", "a,1", "b,", '"c\n\nc",', "d,1,2", "e", "f\0,1", "", " ,x", "g,2"]
    (tmp_path / "bad.csv").write_text("\n".join(rows))
    ended = dropforge("convert", "bad.csv", "-o", "bad.jsonl")
    assert "bad.csv:3: output is blank; write the output, or leave the row out (in 2 rows, first here)\n" in ended.out
    assert "bad.csv:7: it has not as many cells as line 1 has names (2) (in 2 rows, first here)\n" in ended.out
    assert "bad.csv:9: instruction holds the control character U+0000; " in ended.out
    assert "bad.csv:11: instruction is blank; " in ended.out
    assert "bad.csv: 8 rows = 2 records + 6 rows lost\n" in ended.out
    assert [row["instruction"] for row in written(tmp_path / "bad.jsonl")] == ["a", "g"]
    assert dropforge("check", "bad.jsonl").code == 0


def test_a_turn_that_is_lost_is_told_by_line_and_turn(dropforge: Command, tmp_path: Path) -> None:
    talks = '"[{""role"":""user"",""content"":""a""},{""role"":""assistant"",""content"":""b""}]"'
    (tmp_path / "bad.csv").write_text(f"messages,id\n{talks},1\n{talks.replace('assistant', 'judge')},2\n")
    ended = dropforge("convert", "bad.csv")
    assert 'bad.csv:3, turn 2: the role "judge" is not known; ' in ended.out
    assert "bad.csv: 2 rows = 1 record + 1 row lost\n" in ended.out


def test_of_very_many_lost_rows_each_is_counted(dropforge: Command, tmp_path: Path) -> None:
    rows = [f"{place},{'' if place % 3 else 'x'}" for place in range(6000)]
    (tmp_path / "bad.csv").write_text("\n".join(["instruction,output", *rows]))
    ended = dropforge("convert", "bad.csv")
    assert "bad.csv:3: blank, as: output is blank (in 4,000 rows, first here)\n" in ended.out
    assert "bad.csv: 6,000 rows = 2,000 records + 4,000 rows lost\n" in ended.out


def test_of_very_many_reasons_the_first_are_told_and_the_others_counted(dropforge: Command, tmp_path: Path) -> None:
    rows = [f'{{"instruction": {" " * place}x' for place in range(1100)]
    (tmp_path / "bad.jsonl").write_text("\n".join(['{"instruction": "a", "output": "b"}', *rows]))
    ended = dropforge("convert", "bad.jsonl")
    assert "bad.jsonl:21: not JSON: expecting value at column 36\n... and 981 further reasons\n" in ended.out
    assert "bad.jsonl: 1,101 rows = 1 record + 1,100 rows lost\n" in ended.out
    assert "dropforge convert bad.jsonl -o bad-new.jsonl\n" in ended.out
    (tmp_path / "bad.csv").write_text("instruction,output\na\n")
    ended = dropforge("convert", "bad.csv")
    assert (ended.out.count("bad.csv:"), "bad.csv gave no records" in ended.err) == (3, True)


def test_columns_that_change_what_is_learned_are_named_where_they_are_ignored(
    dropforge: Command, tmp_path: Path
) -> None:
    more = {f"c{number}": 1 for number in range(30)}
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "a", "answer": "b", "id": 7, "tools": ["t"], **more}))
    ended = dropforge("convert", "a.jsonl")
    (line,) = (line for line in ended.out.splitlines() if "ignored" in line)
    assert line.startswith("  ignored: id, tools (tool calls are not supported), c0, c1, ")
    assert line.endswith(", c17, …")


def test_the_commands_that_it_names_are_for_the_same_settings_and_file(dropforge: Command, tmp_path: Path) -> None:
    (tmp_path / "-my settings.toml").touch()
    (tmp_path / "-a.csv").write_text("question,answer\na,b\n")
    options = ("--config", "-my settings.toml", "convert", "./-a.csv")
    again = "  dropforge --config './-my settings.toml' convert ./-a.csv --drop\n"
    assert again in dropforge(*options).out
    next_command = "next: dropforge --config './-my settings.toml' submit ./-b.jsonl\n"
    assert dropforge(*options, "-o", "-b.jsonl").out.endswith(next_command)
    assert "convert it: dropforge convert ./-a.csv" in dropforge("check", "./-a.csv").out


def test_nothing_is_left_where_it_is_stopped(
    dropforge: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.csv").write_text(QA)
    monkeypatch.setattr(conversion, "convert", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(SystemExit) as stopped:
            dropforge("convert", "a.csv", "-o", "a.jsonl")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (stopped.value.code, [path.name for path in tmp_path.iterdir()]) == (143, ["a.csv"])


def test_columns_that_are_guessed_are_shown_and_written_only_once_they_are_named(
    dropforge: Command, tmp_path: Path
) -> None:
    (tmp_path / "table.csv").write_text("text,label\ngood,1\n")
    (tmp_path / "dropforge.toml").write_text("[tracks.support]\n")
    assert "--map output=label --track support --drop\n" in dropforge("convert", "table.csv", "--track", "support").out
    seen = dropforge("convert", "table.csv")
    mapped = "dropforge convert table.csv --map instruction=text --map output=label"
    assert (seen.code, "table.csv: CSV; the columns are guessed from their names\n" in seen.out) == (0, True)
    assert f"  {mapped} -o table.jsonl\n" in seen.out
    refused = dropforge("convert", "table.csv", "-o", "out.jsonl")
    assert (refused.code, f"hint: if they are right: {mapped} -o out.jsonl\n" in refused.err) == (65, True)
    assert not (tmp_path / "out.jsonl").exists()
    assert dropforge(*mapped.split()[1:], "-o", "out.jsonl").code == 0
    assert written(tmp_path / "out.jsonl") == [{"instruction": "good", "output": "1"}]


def test_two_columns_for_one_key_are_no_known_form(dropforge: Command, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("question,prompt,answer\na,b,c\n")
    assert dropforge("convert", "table.csv", "-o", "out.jsonl").code == 65
    assert dropforge("convert", "table.csv", "--map", "instruction=prompt", "-o", "out.jsonl").code == 0
    assert written(tmp_path / "out.jsonl") == [{"instruction": "b", "output": "c"}]


@pytest.mark.parametrize(
    ("columns", "maps", "message", "hint"),
    [
        ("a,b", (), "no column is known as instruction or output", "--map instruction=COLUMN --map output=COLUMN"),
        ("question,b", (), "no column is known as output", "name it: --map output=COLUMN"),
        ("question,answer", ("output=nothing",), "there is no column nothing", "its columns: "),
        ("question,answer", ("outputs=answer",), "outputs is no key of a record", "the keys: instruction, input"),
        ("question,answer,answer", (), 'it.csv:1: several columns have the name "answer"', "a name of its own"),
        ("one column", (), "it.csv:1: it has no columns: no tab, comma, semicolon or bar", "instruction,output"),
    ],
)
def test_a_mapping_that_cannot_be_is_refused_with_what_can(
    dropforge: Command, tmp_path: Path, columns: str, maps: tuple[str, ...], message: str, hint: str
) -> None:
    (tmp_path / "it.csv").write_text(f"{columns}\nx,y\n")
    ended = dropforge("convert", "it.csv", *(word for pair in maps for word in ("--map", pair)))
    assert ended.code == 65
    assert message in ended.err
    assert hint in ended.err


LABEL_STUDIO = [
    {"prompt": "VPN?", "answer": "No.", "corrected": "Choose VPN.", "verdict": "wrong", "annotator": "a", "id": 1},
    {"prompt": "Form?", "answer": "HR-12.", "verdict": "right", "annotator": "a", "id": 3},
]
ANYTHING_LLM = [
    {"id": 1, "prompt": "a?", "response": "b", "workspace": "w", "username": "u", "rating": "GOOD"},
    {"id": 2, "prompt": "c?", "response": "d", "workspace": "w", "username": "u", "rating": "BAD"},
    {"id": 3, "prompt": "e?", "response": "f", "workspace": "w", "username": "u", "rating": "--"},
]
GRADIO = 'question,output,flag,username,timestamp\n"1+1?",2,,u,2026-12-03\n"1+2?",5,wrong,u,2026-12-03\n'


@pytest.mark.parametrize(
    ("name", "data", "doubt", "choices"),
    [
        (
            "studio.json",
            json.dumps(LABEL_STUDIO),
            "corrected and answer are both answers; the column verdict judges the answers",
            {
                "--map output=corrected": [("VPN?", "Choose VPN.")],
                "--map output=answer": [("VPN?", "No."), ("Form?", "HR-12.")],
                "--map output=answer --only verdict=right": [("Form?", "HR-12.")],
            },
        ),
        (
            "log.csv",
            GRADIO,
            "the column flag judges the answers",
            {
                "--map output=output --only flag=": [("1+1?", "2")],
                "--map output=output --only flag=wrong": [("1+2?", "5")],
            },
        ),
        (
            "chats.json",
            json.dumps(ANYTHING_LLM),
            "the column rating judges the answers",
            {
                "--map output=response --only rating=GOOD": [("a?", "b")],
                "--map output=response": [("a?", "b"), ("c?", "d"), ("e?", "f")],
            },
        ),
    ],
)
def test_of_answers_that_a_person_corrected_or_rated_it_asks_which_are_learned(
    dropforge: Command, tmp_path: Path, name: str, data: str, doubt: str, choices: dict[str, list[tuple[str, str]]]
) -> None:
    (tmp_path / name).write_text(data)
    asked = dropforge("convert", name)
    assert (asked.code, doubt in asked.out, "next:" in asked.out) == (0, True, False)
    refused = dropforge("convert", name, "-o", "out.jsonl")
    assert (refused.code, "it is not said which answers are to be learned" in refused.err) == (65, True)
    assert not (tmp_path / "out.jsonl").exists()
    commands = [line.strip() for line in refused.out.splitlines() if line.startswith("  dropforge convert ")]
    for choice, pairs in choices.items():
        maps, _, only = choice.partition(" --only ")
        endings = (maps + f" --tag selected{only and ' --only '}{only} -o out.jsonl").strip()
        (command,) = (line for line in commands if line.endswith(endings))
        assert dropforge(*shlex.split(command)[1:]).code == 0
        rows = written(tmp_path / "out.jsonl")
        assert [(row["instruction"], row["output"]) for row in rows] == pairs
        assert {tuple(row["tags"]) for row in rows} == {("selected",)}
        (tmp_path / "out.jsonl").unlink()


@pytest.mark.parametrize(
    ("columns", "output"),
    [
        ("question,answer,Correction", "Correction"),
        ("question,response,better answer", "better answer"),
        ("question,output,expectedOutput", "expectedOutput"),
        ("question,answer,gold_label", "gold_label"),
        ("question,reference", "reference"),
        ("question,answer,reference_url", "answer"),
        ("question,answer,correct", "answer"),
    ],
)
def test_a_persons_answer_goes_before_the_answer_beside_it(
    dropforge: Command, tmp_path: Path, columns: str, output: str
) -> None:
    (tmp_path / "a.csv").write_text(f"{columns}\na,b,c\n" if columns.count(",") == 2 else f"{columns}\na,b\n")
    assert f"  output: column {output}\n" in dropforge("convert", "a.csv").out


def test_a_tag_is_given_to_each_record_beside_its_own(dropforge: Command, tmp_path: Path) -> None:
    """As of AnythingLLM's Alpaca file, which says nothing of its ratings."""
    alpaca = [
        {"instruction": "be kind", "input": "a?", "output": "b", "tags": tags} for tags in ([], ["x"], ["selected"])
    ]
    (tmp_path / "a.json").write_text(json.dumps([*alpaca, {"instruction": "a", "output": "b", "tags": 7}]))
    assert "a.jsonl --tag selected" not in dropforge("convert", "a.json").out
    ended = dropforge("convert", "a.json", "--tag", "selected")
    assert "  dropforge convert a.json --tag selected --drop\n" in ended.out
    assert "a.json: 4 rows = 4 records + 0 rows lost\n" in ended.out
    assert dropforge("convert", "a.json", "--tag", "selected", "-o", "a.jsonl").code == 0
    tags = [["selected"], ["x", "selected"], ["selected"], ["7", "selected"]]
    assert [row["tags"] for row in written(tmp_path / "a.jsonl")] == tags
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": TALK}))
    assert dropforge("convert", "talk.jsonl", "--tag", "selected", "-o", "b.jsonl").code == 0
    assert written(tmp_path / "b.jsonl") == [{"messages": TALK, "tags": ["selected"]}]
    for only, code, words in (("id=7", 65, "there is no column id"), ("id", 2, "--only is COLUMN=TEXT, not id")):
        wrong = dropforge("convert", "a.json", "--only", only)
        assert (wrong.code, words in wrong.err) == (code, True)


def test_a_dropped_table_is_in_the_inbox_as_records_and_replaces_nothing(dropforge: Command, tmp_path: Path) -> None:
    dropforge("init")
    (tmp_path / "qa.csv").write_text(QA)
    ended = dropforge("convert", "qa.csv", "--drop")
    assert (ended.code, f"copied 2 rows to {tmp_path}/inbox/qa.jsonl\n" in ended.out) == (0, True)
    assert written(tmp_path / "inbox" / "qa.jsonl") == RECORDS
    assert dropforge("convert", "qa.csv", "--drop").code == 1
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("name", "data", "message", "hint"),
    [
        (
            "a.csv",
            b"instruction,output\ra,b\r",
            "malformed: new-line character seen in unquoted field\n",
            "end rows with \\n",
        ),
        ("a.csv", "instruction,output\n".encode("utf-16"), "it is UTF-16 text", "UTF-8 a.csv > new-a.csv\n"),
        (
            "a.csv",
            b'instruction,output\na,b\n"c,d\ne,f\n',
            "a.csv:3: the row that begins here is malformed: a quote is not closed",
            "in quotes",
        ),
        (
            "a.csv",
            b'instruction,output\n"a"b,c\n',
            "a.csv:2: the row that begins here is malformed: ',' expected after '\"'",
            '""',
        ),
        (
            "a.csv",
            b'instruction,output\na,"' + b"x\n" * 2_100_000,
            "a.csv:2: the row that begins here is longer",
            "clo",
        ),
        (
            "a.csv",
            b",".join(b"c%d" % place for place in range(1001)),
            "a.csv:1: it has more than 1,000 columns",
            "keep",
        ),
        ("a.csv.gz", packed(b"a,b\n" * 300_000), "it unpacks to more than 1,000,000 bytes", "max_bytes"),
        (
            "b.csv.gz",
            packed(b"question,answer\n" + b"a,b\n" * 60_000),
            "the records have more than 1,0",
            "split",
        ),
        ("a.csv.gz", packed(b"a,b\n" * 3000)[:-9], "it cannot be unpacked", "gzip -t a.csv.gz"),
        ("a.csv.gz", packed(packed(b"a,b\n")), "it is gzip-compressed", "dropforge convert"),
        ("a.xlsx", b"PK\x03\x04", "it is a zip archive or an Excel file", "save the sheet as CSV"),
        ("a.parquet", b"PAR1" + b"x" * 100 + b"PAR1", "a.parquet: ", "see whether it is whole"),
        ("a.csv", b"instruction,output\n", "a.csv gave no records", ""),
        ("a.csv", b"", "it has no columns", ""),
    ],
)
def test_a_hostile_table_is_an_error_with_its_place_and_nothing_is_written(
    dropforge: Command, tmp_path: Path, name: str, data: bytes, message: str, hint: str
) -> None:
    (tmp_path / "dropforge.toml").write_text("[intake]\nmax_bytes = 1_000_000\n" if name.endswith("gz") else "")
    (tmp_path / name).write_bytes(data)
    ended = dropforge("convert", name, "-o", "out.jsonl")
    assert ended.code in {1, 65}
    assert message in ended.err
    assert hint in ended.err
    assert not (tmp_path / "out.jsonl").exists()


def test_quotes_in_a_tsv_are_text_if_not_all_of_them_are_closed(dropforge: Command, tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('instruction\toutput\n"Stop" he said\tx\n"open\ty\n')
    ended = dropforge("convert", "a.tsv", "-o", "out.jsonl")
    assert "  quotes are read as text, since a.tsv:2: the row that begins here is malformed: " in ended.out
    assert [row["instruction"] for row in written(tmp_path / "out.jsonl")] == ['"Stop" he said', '"open']


def test_parquet_and_what_datasets_saved_are_read_as_text_in_another_process(
    dropforge: Command, tmp_path: Path
) -> None:
    features = {"label": {"names": ["pos", "neg"], "_type": "ClassLabel"}, "text": {"dtype": "string"}}
    table = pa.table({"text": ["a", "b", None, "d"], "label": [1, 0, 1, -1], "tags": [["x"], [], None, None]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    saved = tmp_path / "both" / "train"
    saved.mkdir(parents=True)
    for place in range(2):
        with ipc.new_stream(saved / f"data-{place}.arrow", table.schema) as stream:
            stream.write_table(table.slice(2 * place, 2))
    (saved / "state.json").write_text('{"_data_files": [{"filename": "data-0.arrow"}, {"filename": "data-1.arrow"}]}')
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    for name in ("a.parquet", "both/train"):
        ended = dropforge("convert", name, "--map", "instruction=text", "--map", "output=label", "-o", "out.jsonl")
        assert "; numbers that the file has names for (ClassLabel) are written as these\n" in ended.out
        assert f"{name}:3: instruction is blank; " in ended.out
        assert f"{name}:4: output is blank; " in ended.out
        assert f"{name}: 4 rows = 2 records + 2 rows lost\n" in ended.out
        rows = [{"instruction": "a", "output": "neg", "tags": ["x"]}, {"instruction": "b", "output": "pos", "tags": []}]
        assert written(tmp_path / "out.jsonl") == rows
        (tmp_path / "out.jsonl").unlink()
    ended = dropforge("convert", "both")
    assert (ended.code, "hint: convert one of them: dropforge convert both/train\n" in ended.err) == (65, True)
    (saved / "state.json").write_text('{"_data_files": [{"filename": "../train/data-0.arrow"}]}')
    assert "not one that datasets saved" in dropforge("convert", "both/train").err
    assert "not one that datasets saved" in dropforge("convert", ".").err
    assert "not one that datasets saved" in dropforge("convert", "/").err


def test_a_parquet_file_that_unpacks_to_too_much_is_refused(dropforge: Command, tmp_path: Path) -> None:
    giant = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["x" * 3_000_000]))
    parquet.write_table(pa.table({"instruction": giant, "output": ["a"] * 1000}), tmp_path / "a.parquet")
    ended = dropforge("convert", "a.parquet")
    assert (ended.code, "it needs more than 536,870,912 bytes of memory" in ended.err) == (65, True)
    (tmp_path / "dropforge.toml").write_text("[intake]\nmax_bytes = 100_000\n")
    parquet.write_table(pa.table({"instruction": ["a"] * 9000, "output": ["a"] * 9000}), tmp_path / "b.parquet")
    ended = dropforge("convert", "b.parquet")
    assert "b.parquet: its rows have more than 100,000 bytes as text, the limit (intake.max_bytes)" in ended.err


def test_columns_that_are_no_text_are_told_and_rows_of_them_lost(dropforge: Command, tmp_path: Path) -> None:
    talk = [[{"role": "user", "at": datetime(2026, 1, 1)}]] * 3  # noqa: DTZ001 - as Parquet has them
    table = pa.table({"prompt": ["a"] * 3, "bin": [b"\xff"] * 3, "talk": talk, "x": [1.5, 2.0, None]})
    parquet.write_table(table, tmp_path / "a.parquet")
    ended = dropforge("convert", "a.parquet", "--map", "output=bin")
    assert ("there is no column bin" in ended.err, "its columns: prompt, talk, x\n" in ended.err) == (True, True)
    ended = dropforge("convert", "a.parquet", "--map", "output=talk")
    assert "a.parquet:1: output is a list, not a text; " in ended.out
    assert "a.parquet: 3 rows = 0 records + 3 rows lost\n" in ended.out
    ended = dropforge("convert", "a.parquet", "--map", "output=x")
    assert '"output": "1.5"}' in ended.out
    assert "a.parquet:3: output is blank; " in ended.out
    parquet.write_table(pa.table([["a"], ["b"]], names=["prompt", "prompt"]), tmp_path / "a.parquet")
    assert "a.parquet: several columns have the same name" in dropforge("convert", "a.parquet").err


def test_conversations_are_passed_on_as_json(dropforge: Command, tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text(f"messages\tid\n{json.dumps(TALK)}\t1\n[1\t2\n")
    ended = dropforge("convert", "a.tsv")
    assert "  messages: column messages\n" in ended.out
    assert "a.tsv:3: messages: not JSON" in ended.out
    row = {"instruction": "a", "output": "b", "system": "s", "history": [["q", "w"]]}
    (tmp_path / "b.jsonl.gz").write_bytes(packed(json.dumps(row).encode()))
    assert dropforge("convert", "b.jsonl.gz", "-o", "b.jsonl").code == 0
    assert written(tmp_path / "b.jsonl") == [row]


def test_blank_lines_between_rows_take_no_memory(tmp_path: Path) -> None:
    row = {"instruction": "a", "output": "b"}
    table = Table("JSON Lines", tuple(row), lambda _: iter([(1, list(row.values())), (20_000_000, list(row.values()))]))
    tracemalloc.start()
    try:
        made = convert(table, dict(zip(row, row, strict=True)), tmp_path / "made.jsonl", Options(), 1 << 30)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert made.first == (row, row)
    assert peak < 5_000_000


def test_beside_conversations_columns_of_another_form_are_not_read(dropforge: Command, tmp_path: Path) -> None:
    """As of UltraChat, which has the first question once more."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", "prompt_id": "7", "messages": TALK, "group": "g"}))
    assert dropforge("convert", "a.jsonl", "-o", "b.jsonl").code == 0
    assert written(tmp_path / "b.jsonl") == [{"messages": TALK, "group": "g"}]


@pytest.mark.parametrize(
    ("maps", "kept"),
    [
        (["messages=messages"], "messages"),
        (["instruction=prompt", "output=response"], "output"),
        (["messages=", "conversations="], "output"),
    ],
)
def test_a_table_of_two_forms_is_read_as_the_one_that_is_named(
    dropforge: Command, tmp_path: Path, maps: list[str], kept: str
) -> None:
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"prompt": "a", "response": "b", "messages": TALK, "conversations": []})
    )
    ended = dropforge("convert", "a.jsonl", "-o", "b.jsonl")
    assert (ended.code, "--map messages=messages -o b.jsonl\n" in ended.err) == (65, True)
    options = [word for pair in maps for word in ("--map", pair)]
    assert all(pair in dropforge("convert", "a.jsonl", *options).out.split("next:")[1] for pair in maps)
    assert dropforge("convert", "a.jsonl", *options, "-o", "b.jsonl").code == 0
    (row,) = written(tmp_path / "b.jsonl")
    assert (kept in row, len(row.keys() & {"messages", "output"})) == (True, 1)
    assert dropforge("check", "b.jsonl").code == 0


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "unknown.txt"])
def test_check_and_submit_name_this_one_command(dropforge: Command, tmp_path: Path, name: str) -> None:
    data = {
        "a.csv": b"question,answer\na,b\n",
        "a.tsv": b"question\tanswer\na\tb\n",
        "a.parquet": b"PAR1",
        "a.jsonl.gz": packed(b"{}"),
    }
    (tmp_path / name).write_bytes(data.get(name, b"x\ty\na\tb\n"))
    dropforge("init")
    submitted = dropforge("submit", name)
    assert (submitted.out, f"convert it: dropforge convert {name}\n" in submitted.err) == ("", True)
    ended = dropforge("check", name)
    assert (ended.code, f"convert it: dropforge convert {name}\n" in ended.out) == (65, True)
    assert ended.out.endswith(f"{name}: it would be rejected\n"), "no row of it was read"


@pytest.mark.parametrize(
    ("name", "head", "kind", "columns"),
    [
        ("a.tsv", b"utterance\tgroup, a,b\n", "TSV", "utterance and group, a,b"),
        ("A.CSV", b'\xef\xbb\xbf"utterance";intent name\r\n', "CSV with semicolons", "utterance and intent name"),
        ("a.csv", b"\"a, b\",'c',\n", "CSV", "a, b and c"),
        ("a.csv", b"a, b\r1,2\n", "CSV", "a and b"),
        ("a.csv", b"a,b,c,d,e,f," + b"x" * 99 + b"\n", "CSV", "a, b, c, d, e and 2 more"),
    ],
)
def test_columns_of_no_known_form_are_named_with_the_command_that_maps_them(
    dropforge: Command, tmp_path: Path, name: str, head: bytes, kind: str, columns: str
) -> None:
    (tmp_path / name).write_bytes(head + head)
    dropforge("init")
    told = f"the file is {kind} and its columns are {columns}"
    helps = f"dropforge convert {name} --map instruction=COLUMN --map output=COLUMN\n"
    refused = dropforge("submit", name)
    assert (refused.code, told in refused.err, helps in refused.err) == (65, True, True), refused.err
    checked = dropforge("check", name)
    assert (checked.code, told in checked.out, helps in checked.out) == (65, True, True), checked.out
