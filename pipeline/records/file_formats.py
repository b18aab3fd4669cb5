"""Recognise a file or a row of another format, and give the command that converts such a file."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

HEAD_BYTES = 1 << 16
"""So many first bytes are enough for `foreign_format`."""
_PANDAS = (
    "convert it: python -c \"import pandas; pandas.read_parquet('FILE').to_json('NEW.jsonl', orient='records', "
    'lines=True)"'
)
_SHEET = "unpack it (unzip FILE), or save the sheet as CSV and convert that"
_ICONV = "save it as UTF-8: iconv -f UTF-16 -t UTF-8 FILE > NEW"
_ARRAY = (
    "convert it: python3 -c \"import json; [print(json.dumps(row)) for row in json.load(open('FILE', "
    "encoding='utf-8-sig'))]\" > NEW.jsonl"
)
_MAGIC = (
    (b"\x1f\x8b", "gzip-compressed", "unpack it first: gunzip FILE"),
    (b"PK\x03\x04", "a zip archive or an Excel file", _SHEET),
    (b"PAR1", "Parquet", _PANDAS),
    (b"\xff\xfe", "UTF-16 text", _ICONV),
    (b"\xfe\xff", "UTF-16 text", _ICONV),
)
_SPREAD = re.compile(rb"\s*\{[ \t\r]*\n\s*\"")
_COLUMNS = frozenset(
    {"instruction", "input", "output", "prompt", "response", "completion", "question", "answer", "text"}
)
_TABLE = (
    "convert it: python3 -c \"import csv, json; rows = csv.DictReader(open('FILE', encoding='utf-8-sig', newline=''), "
    "delimiter='{}'); [print(json.dumps(row)) for row in rows]\" > NEW.jsonl"
)
_SEPARATORS = {",": "CSV", ";": "CSV with semicolons", "\t": "TSV", "|": "a table with bars"}


class Foreign(NamedTuple):
    """A file format that is not supported, with its remedy."""

    name: str
    remedy: str


def foreign_format(head: bytes) -> Foreign | None:
    """Return the unsupported format (CSV, ...) of a file that begins with `head`; `None` if none is recognised."""
    for magic, name, remedy in _MAGIC:
        if head.startswith(magic):
            return Foreign(name, remedy)
    body = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if _SPREAD.match(body):
        remedy = "write each record on one line: jq -c . FILE > NEW.jsonl (jq -c '.data[]' where a key holds them all)"
        return Foreign("JSON spread over several lines", remedy)
    if body.startswith(b"["):
        return Foreign("one JSON array", _ARRAY)
    line = body.split(b"\n", 1)[0].decode("utf-8", "replace")
    return None if line.startswith("{") else _table(line)


def _table(line: str) -> Foreign | None:
    """Return the format of a table whose header `line` names known columns; `None` if it is no such table."""
    for separator, name in _SEPARATORS.items():
        cells = {re.sub(r'^["\']|["\']$', "", cell.strip()).casefold() for cell in line.split(separator)}
        if len(cells) > 1 and cells & _COLUMNS:
            return Foreign(name, _TABLE.format(separator.replace("\t", "\\t")))
    return None


def other_format(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return (identifying key, format name) of a ShareGPT or OpenAI row without an "instruction"; else `None`."""
    known = {"conversations": "a ShareGPT conversation", "messages": "an OpenAI chat"}
    return None if "instruction" in row else next(((key, known[key]) for key in known if key in row), None)
