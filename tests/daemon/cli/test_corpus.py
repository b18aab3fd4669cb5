"""Twelve forms of files, good and hostile rows in each: what is read is what a few independent lines count."""

import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from tests.daemon.conftest import Ended

Command = Callable[..., Ended]
Said = list[tuple[str, str]]
TALKS: list[Said] = [
    [("system", "Be brief."), ("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")],
    [("user", "Ça va?"), ("assistant", "oui")],
    [("user", "Ça va?"), ("assistant", "oui")],
]
ODD = 'a\r\nb, "c"; d\te|f\u2028'
TEXTS: list[Said] = [
    [("user", ODD), ("assistant", '"\n,\n;\n\t\n"')],
    [("user", "Why?"), ("assistant", " ")],
    [("user", "\u3000"), ("assistant", "a")],
]
BAD_TURNS: list[Said] = [
    [("wizard", "a"), ("assistant", "b")],
    [("user", "a"), ("user", "b"), ("assistant", "c")],
    [("user", "a"), ("assistant", "b"), ("user", "c")],
    [("user", "a"), ("system", "b"), ("assistant", "c")],
    [],
    [("user", "a"), ("assistant", "b")] * 151,
]
#: Of each form: the rows, the bad ones of them, the records, and what `convert` calls it if it is a table.
FORMS = {
    "alpaca.jsonl": (7, 2, 4, ""),
    "array.json": (7, 2, 4, ""),
    "history.jsonl": (6, 2, 4, ""),
    "messages.jsonl": (12, 8, 4, ""),
    "spread.json": (12, 8, 4, ""),
    "sharegpt.jsonl": (12, 8, 4, ""),
    "comma.csv": (7, 2, 4, "CSV"),
    "semicolon.csv": (7, 2, 4, "CSV with semicolons"),
    "tab.tsv": (7, 2, 4, "TSV"),
    "keys.jsonl.gz": (7, 2, 4, "JSON"),
    "messages.parquet": (12, 8, 4, "Parquet"),
    "saved": (7, 2, 4, "a folder that datasets saved"),
}
WRITTEN_AS_TEXT = [name for name in FORMS if "." in name and not name.endswith("parquet")]


def pairs(talks: Iterable[Said]) -> list[tuple[str, str]]:
    texts = [[text for role, text in talk if role != "system"] for talk in talks]
    return [pair for said in texts for pair in zip(said[::2], said[1::2], strict=True)]


def rows_of(name: str, talks: Iterable[Said]) -> list[dict[str, Any]]:
    """Return the rows of a form; those of single questions have no roles that could be bad."""
    if name.startswith("messages") or name == "spread.json":
        return [{"messages": [{"role": role, "content": text} for role, text in talk], "score": 1.5} for talk in talks]
    if name == "sharegpt.jsonl":
        roles = {"user": "human", "assistant": "gpt"}
        said = [[{"from": roles.get(role, role), "value": text} for role, text in talk] for talk in talks]
        return [{"conversations": turns} for turns in said]
    good = [talk for talk in talks if talk not in BAD_TURNS]
    if name == "history.jsonl":
        told = [(dict(talk).get("system", ""), pairs([talk])) for talk in good]
        rows = [(system, said[:-1], *said[-1]) for system, said in told]
        return [dict(zip(("system", "history", "instruction", "output"), row, strict=True)) for row in rows]
    keys = ("instruction", "output") if name in {"alpaca.jsonl", "array.json"} else ("question", "answer", "id")
    return [dict(zip(keys, (*pair, 7), strict=False)) for pair in pairs(good)]


def write(folder: Path, name: str, talks: Iterable[Said], encoding: str = "utf-8") -> Path:
    rows, path = rows_of(name, talks), folder / name
    if name == "saved":
        path.mkdir()
        table = pa.Table.from_pylist(rows)
        with ipc.new_stream(path / "data.arrow", table.schema) as stream:
            stream.write_table(table)
        path.joinpath("state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    elif name.endswith(".parquet"):
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        file = io.StringIO(newline="")
        if name.endswith((".csv", ".tsv")):
            writer = csv.DictWriter(file, list(rows[0]), delimiter={"c": ",", "s": ";", "t": "\t"}[name[0]])
            writer.writeheader()
            writer.writerows(rows)
        elif name.endswith(".json"):
            json.dump(rows, file, ensure_ascii=False, indent=1 if name == "spread.json" else None)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_bytes((gzip.compress if name.endswith("gz") else bytes)(file.getvalue().encode(encoding)))
    return path


def independently(path: Path) -> tuple[int, int, int]:
    """Count a file's rows, its bad rows and the records of the others, without the product."""
    if path.is_dir():
        rows = ipc.open_stream(path / "data.arrow").read_all().to_pylist()
    elif path.suffix == ".parquet":
        rows = parquet.read_table(path).to_pylist()
    else:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
        if path.suffix in {".csv", ".tsv"}:
            rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=re.findall("[,;\t]", text)[0]))
        else:
            rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.split("\n") if line]
    said = list(filter(None, map(said_in, rows)))
    records = {(*texts[:number], texts[number]) for texts in said for number in range(1, len(texts), 2)}
    return len(rows), len(rows) - len(said), len(records)


def said_in(row: dict[str, Any]) -> list[str]:
    """Return the questions and answers of a good row; none of a bad one."""
    turns = row.get("messages", row.get("conversations"))
    if turns is None:
        texts = [text for pair in row.get("history", []) for text in pair]
        texts += [row.get("instruction", row.get("question")), row.get("output", row.get("answer"))]
        return texts if all(text.strip() for text in texts) else []
    texts = [turn.get("content", turn.get("value")) for turn in turns]
    roles = "".join(turn.get("role", turn.get("from"))[0] for turn in turns)
    is_good = re.fullmatch("s?([uh][ag]){1,150}", roles) and all(text.strip() for text in texts)
    return texts[roles.startswith("s") :] if is_good else []


def read(dropforge: Command, path: Path) -> tuple[Ended, dict[str, Any]]:
    """Return how `convert` ended, or `check` if that takes the file as it is, and what `check` counts."""
    limits = '[intake]\non_bad_rows = "quarantine"\nmax_bad_percent = 100\n'
    path.with_name("dropforge.toml").write_text(limits)
    if not FORMS[path.name][3]:
        return dropforge("check", path.name), dropforge("check", path.name, "--json").json
    ended = dropforge("convert", path.name, "-o", "out.jsonl")
    return ended, dropforge("check", "out.jsonl", "--json").json if ended.code == 0 else {}


@pytest.mark.parametrize(
    ("name", "encoding"), [*((name, "utf-8") for name in FORMS), *((name, "utf-8-sig") for name in WRITTEN_AS_TEXT)]
)
def test_rows_and_records_are_those_that_a_few_lines_count_and_all_are_accounted_for(
    dropforge: Command, tmp_path: Path, name: str, encoding: str
) -> None:
    path = write(tmp_path, name, [*TALKS, *TEXTS, *BAD_TURNS], encoding)
    *counts, kind = FORMS[name]
    ended, found = read(dropforge, path)
    assert independently(path) == tuple(counts)
    rows, bad, records = counts
    good, further = found["good_rows"], found["answers"] - found["good_rows"]
    assert (good, found["answers"] - found["duplicates"], found["duplicates"]) == (rows - bad, records, 1)
    if kind:
        assert ended.out.startswith(f"{name}: {kind}\n")
        kept = f"{good} records" if not further else f"{good} rows with {records + 1} records"
        assert f"{name}: {rows} rows = {kept} + {bad} rows lost\n" in ended.out
    else:
        more = f" and {further} further answer" if further else ""
        assert f"{name}: {rows} rows{more} = {records} records + {bad} bad rows + 1 duplicate; " in ended.out
        assert len(found["findings"]) == bad
    made = tmp_path / "out.jsonl" if kind else path
    assert json.dumps(ODD, ensure_ascii=False) in made.read_text(encoding=encoding)


@pytest.mark.parametrize("name", WRITTEN_AS_TEXT)
def test_a_file_in_another_encoding_is_told_with_line_and_command(
    dropforge: Command, tmp_path: Path, name: str
) -> None:
    ended, found = read(dropforge, write(tmp_path, name, TALKS, "cp1252"))
    assert "not UTF-8: byte 0xc7 at byte " in ended.out + ended.err
    if found:
        assert found["answers"] == 2
        assert " + 2 bad rows; " in ended.out or " + 2 rows lost\n" in ended.out
    else:
        assert f"error: {name}:4: " in ended.err
        assert f"iconv -f WINDOWS-1252 -t UTF-8 {name} > new-{name}\n" in ended.err


@pytest.mark.parametrize("name", FORMS)
def test_a_giant_text_is_told_and_takes_no_other_row_in_silence(dropforge: Command, tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, [*TALKS, [("user", "q"), ("assistant", "x" * 4_100_000)], TALKS[1]])
    ended, found = read(dropforge, path)
    assert "4,000,000 bytes" in ended.out + ended.err
    is_whole = found.get("complete", False)
    assert ended.code == (0 if is_whole else 65)
    if is_whole:
        assert (" + 1 bad row" in ended.out or " + 1 row lost" in ended.out, found["answers"]) == (True, 5)
