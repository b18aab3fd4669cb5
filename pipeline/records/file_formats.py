"""Names what a file is when it is not JSON Lines, from its first bytes, and says how to make JSON Lines of it."""

import re
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Foreign:
    """A format that is not read, and what to do with it."""

    name: str
    remedy: str


def foreign_format(head: bytes) -> Foreign | None:
    """Return what a file is whose first bytes are `head`; `None` if it may be JSON."""
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
    """Recognise a table by a header line that names columns which we know."""
    for separator, name in _SEPARATORS.items():
        cells = {re.sub(r'^["\']|["\']$', "", cell.strip()).casefold() for cell in line.split(separator)}
        if len(cells) > 1 and cells & _COLUMNS:
            return Foreign(name, _TABLE.format(separator.replace("\t", "\\t")))
    return None
