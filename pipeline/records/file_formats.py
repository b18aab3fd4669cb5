"""Recognise a file of another format, and give the command that converts such a file."""

import re
from pathlib import Path
from typing import NamedTuple

from pipeline.words import shell_path

HEAD_BYTES = 1 << 16
"""So many first bytes are enough for `foreign_format`."""
_CONVERT = "convert it: dropforge convert FILE"
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


def foreign_format(head: bytes) -> Foreign | None:
    """Return the unsupported format (CSV, ...) of a file that begins with `head`; `None` if none is recognised."""
    for magic, name, remedy in _MAGIC:
        if head.startswith(magic):
            return Foreign(name, remedy)
    body = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if _SPREAD.match(body):
        remedy = "write each record on one line: jq -c . FILE > NEW (jq -c '.data[]' where a key holds them all)"
        return Foreign("JSON spread over several lines", remedy)
    line = body.split(b"\n", 1)[0].decode("utf-8", "replace")
    return None if line.startswith(("{", "[")) else _table(line)


def _table(line: str) -> Foreign | None:
    """Return the format of a table whose header `line` names known columns; `None` if it is no such table."""
    for separator, name in SEPARATORS.items():
        cells = {re.sub(r'^["\']|["\']$', "", cell.strip()).casefold() for cell in line.split(separator)}
        if len(cells) > 1 and cells & _COLUMNS:
            return Foreign(name, _CONVERT)
    return None
