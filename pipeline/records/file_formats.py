"""
Recognise a file or a row of another format, and give the command that converts it.

The command for rows is a jq program. It reads JSON Lines or one JSON array, and omits rows that would be no records:
`dropforge check` accepts its whole output, except rows that only the base model or the settings exclude.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HEAD_BYTES = 1 << 16
"""So many first bytes are enough for `foreign_format`."""
_PANDAS = (
    "convert it: python -c \"import pandas; pandas.read_parquet('FILE').to_json('NEW.jsonl', orient='records', "
    'lines=True)"'
)
_SHEET = "unpack it (unzip FILE), or save the sheet as CSV and convert that"
_EXPORT = "write its records as JSON Lines: one object a line with instruction, input and output"
_ICONV = "save it as UTF-8: iconv -f UTF-16 -t UTF-8 FILE > NEW"
_MAGIC = (
    (b"\x1f\x8b", "gzip-compressed", "unpack it first: gunzip FILE"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", "unpack it first: unzstd FILE"),
    (b"PK\x03\x04", "a zip archive or an Excel file", _SHEET),
    (b"PAR1", "Parquet", _PANDAS),
    (b"%PDF", "a PDF document", _EXPORT),
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the file itself", "fetch it: git lfs pull"),
    (b"\xff\xfe", "UTF-16 text", _ICONV),
    (b"\xfe\xff", "UTF-16 text", _ICONV),
)
_HTML = re.compile(r"<!doctype html|<html", re.IGNORECASE)
_SPREAD = re.compile(rb"\s*\{[ \t\r]*\n\s*\"")
_COLUMNS = frozenset(
    {"instruction", "input", "output", "prompt", "response", "completion", "question", "answer", "text"}
)
_TABLE = (
    "convert it: python3 -c \"import csv, json; rows = csv.DictReader(open('FILE', encoding='utf-8-sig', newline=''), "
    "delimiter='{}'); [print(json.dumps(row)) for row in rows]\" > NEW.jsonl"
)
_SEPARATORS = {",": "CSV", ";": "CSV with semicolons", "\t": "TSV", "|": "a table with bars"}

_ROWS = 'if type == "array" then .[] else . end | objects'
_KEEP = 'select(all(type == "string") and ([.instruction, .output] | all(test("\\\\S"))))'
_LOST = "system messages, later turns, and rows that begin otherwise are lost"
#: Joins lists of content parts that are all texts.
_PARTS = 'map_values(if type == "array" and all(.type == "text") then map(.text) | join("\\n") else . end)'
_FIRST_PAIR = (
    "arrays | map(select(.{who} | IN({left_out}) | not)) "
    "| select([.[0].{who}, .[1].{who}] | IN({pairs})) | {{instruction: .[0].{says}, output: .[1].{says}}}"
)
_SHAREGPT = _FIRST_PAIR.format(
    who="from", says="value", left_out='"system"', pairs='["human", "gpt"], ["user", "assistant"]'
)
_OPENAI = _FIRST_PAIR.format(
    who="role", says="content", left_out='"system", "developer"', pairs='["user", "assistant"]'
)


@dataclass(frozen=True)
class Foreign:
    """A file format that is not supported, with its remedy."""

    name: str
    remedy: str


def foreign_format(head: bytes) -> Foreign | None:
    """Return the unsupported format of a file that begins with `head`; `None` if it may be JSON."""
    for magic, name, remedy in _MAGIC:
        if head.startswith(magic):
            return Foreign(name, remedy)
    body = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if _SPREAD.match(body):
        remedy = "write each record on one line: jq -c . FILE > NEW.jsonl (jq -c '.data[]' where a key holds them all)"
        return Foreign("JSON spread over several lines", remedy)
    line = body.split(b"\n", 1)[0].decode("utf-8", "replace")
    if _HTML.match(line):
        return Foreign("an HTML page", "drop the data itself: this is a web page")
    return None if line.startswith(("{", "[")) else _table(line)


def _table(line: str) -> Foreign | None:
    """Return the format of a table whose header `line` names known columns; `None` if it is no such table."""
    for separator, name in _SEPARATORS.items():
        cells = {re.sub(r'^["\']|["\']$', "", cell.strip()).casefold() for cell in line.split(separator)}
        if len(cells) > 1 and cells & _COLUMNS:
            return Foreign(name, _TABLE.format(separator.replace("\t", "\\t")))
    return None


def command(program: str) -> str:
    """Return the shell command that converts a file's rows to records by the jq filter `program`."""
    return f"jq -c '{_ROWS} | {program} | {_KEEP}' FILE > NEW.jsonl"


def other_format(row: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Return (identifying key, format name, how to convert) of a row in another known format; else `None`."""
    if "instruction" in row:
        return None
    if "conversations" in row:
        words = f"its first question and the answer become a record; {_LOST}"
        return "conversations", "a ShareGPT conversation", f"{words}: {command(f'.conversations | {_SHAREGPT}')}"
    if "messages" in row:
        words = f"its first user message and the answer become a record; {_LOST}"
        return "messages", "an OpenAI chat", f"{words}: {command(f'.messages | {_OPENAI} | {_PARTS}')}"
    return None
