"""Recognise a file of another format, and give the command that converts such a file."""

import csv
import re
from pathlib import Path
from typing import NamedTuple

from pipeline.words import first_of, shell_path

HEAD_BYTES = 1 << 16
"""So many first bytes are enough for `foreign_format`."""
_CONVERT = "convert it: dropforge convert FILE"
_MAP = "name those of question and answer: dropforge convert FILE --map instruction=COLUMN --map output=COLUMN"
_SHEET = "unpack it (unzip FILE), or save the sheet as CSV and convert that: dropforge convert TABLE.csv"
_ICONV = "save it as UTF-8: iconv -f UTF-16 -t UTF-8 FILE > NEW"
_MAGIC = (
    (b"\x1f\x8b", "gzip-compressed", _CONVERT),
    (b"PK\x03\x04", "a zip archive or an Excel file", _SHEET),
    (b"PAR1", "Parquet", _CONVERT),
    (b"\xff\xfe", "UTF-16 text", _ICONV),
    (b"\xfe\xff", "UTF-16 text", _ICONV),
)
_SPREAD = re.compile(rb"\s*\{[ \t\r]*\n\s*\"")
_COLUMNS = frozenset(
    {"instruction", "input", "output", "prompt", "response", "completion", "question", "answer", "text"}
)
SEPARATORS = {",": "CSV", ";": "CSV with semicolons", "\t": "TSV", "|": "a table with bars"}


class Foreign(NamedTuple):
    """A file format that is not supported, with its remedy, in which FILE and NEW stand for paths (`name_file`)."""

    name: str
    remedy: str


def name_file(remedy: str, path: str) -> str:
    """Return a remedy with FILE replaced by `path`, NEW by another .jsonl path next to it, both quoted for a shell."""
    new = str(Path(path).with_suffix(".jsonl"))
    if new == path:
        new = f"{path.removesuffix('.jsonl')}-new.jsonl"
    names = {"FILE": shell_path(path), "NEW": shell_path(new)}
    return re.sub(r"\b(FILE|NEW)\b", lambda word: names[word[0]], remedy)


def foreign_format(head: bytes, path: str = "") -> Foreign | None:
    """
    Return the unsupported format (CSV, ...) of a file that begins with `head`; `None` if none is recognised.

    A table is recognised by known columns, or by any columns if its `path` ends in .csv or .tsv.
    """
    for magic, name, remedy in _MAGIC:
        if head.startswith(magic):
            return Foreign(name, remedy)
    body = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if _SPREAD.match(body):
        remedy = "write each record on one line: jq -c . FILE > NEW (jq -c '.data[]' where a key holds them all)"
        return Foreign("JSON spread over several lines", remedy)
    line = re.split(rb"[\r\n]", body, maxsplit=1)[0].decode("utf-8", "replace")
    if line.startswith(("{", "[")):
        return None
    rows = {sep: next(csv.reader([line], delimiter=sep, skipinitialspace=True), []) for sep in SEPARATORS}
    tables = {sep: [cell.strip(" '") for cell in row] for sep, row in rows.items()}
    for separator, columns in tables.items():
        if len(columns) > 1 and not _COLUMNS.isdisjoint(map(str.casefold, columns)):
            return Foreign(SEPARATORS[separator], _CONVERT)
    separator = "\t" if "\t" in line else max(SEPARATORS, key=line.count)
    if path.lower().endswith((".csv", ".tsv")) and separator in line:
        columns = [column[:60] for column in tables[separator] if column]
        return Foreign(f"{SEPARATORS[separator]} and its columns are {first_of(columns)}", _MAP)
    return None
