"""Names what a file is when it is not JSON Lines, from its first bytes."""

import re
from dataclasses import dataclass

_MAGIC = (
    (b"\x1f\x8b", "gzip-compressed", "unpack it first: gunzip FILE.gz"),
    (b"PK\x03\x04", "a zip archive or an Excel file", "unpack it, or save the sheet as JSON Lines"),
    (b"PK\x05\x06", "an empty zip archive", "drop the JSON Lines file itself"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", "unpack it first: unzstd FILE.zst"),
    (b"BZh", "bzip2-compressed", "unpack it first: bunzip2 FILE.bz2"),
    (b"\xfd7zXZ\0", "xz-compressed", "unpack it first: unxz FILE.xz"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it and drop the JSON Lines file"),
    (
        b"PAR1",
        "Parquet",
        "convert it to JSON Lines: pandas.read_parquet(FILE).to_json(NEW, orient='records', lines=True)",
    ),
    (b"ARROW1", "an Arrow file", "convert it to JSON Lines"),
    (b"SQLite format 3\0", "an SQLite database", "export the table to JSON Lines"),
    (b"%PDF", "a PDF document", "write its records as JSON Lines"),
    (b"\xff\xfe\0\0", "UTF-32 text", "save it as UTF-8: iconv -f UTF-32 -t UTF-8 FILE > NEW"),
    (b"\0\0\xfe\xff", "UTF-32 text", "save it as UTF-8: iconv -f UTF-32 -t UTF-8 FILE > NEW"),
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8: iconv -f UTF-16 -t UTF-8 FILE > NEW"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8: iconv -f UTF-16 -t UTF-8 FILE > NEW"),
)
_COLUMNS = frozenset(
    {"instruction", "input", "output", "prompt", "response", "completion", "question", "answer", "text"}
)
_SEPARATORS = {",": "CSV", ";": "CSV with semicolons", "\t": "TSV"}
_TO_JSONL = "convert it to JSON Lines: pandas.read_csv(FILE).to_json(NEW, orient='records', lines=True)"


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
    if head[:1] in b"{[" and head[1:2] == b"\0":
        return Foreign("UTF-16 text", "save it as UTF-8: iconv -f UTF-16LE -t UTF-8 FILE > NEW")
    if head[:1] == b"\0" and head[1:2] in b"{[" and len(head) > 1:
        return Foreign("UTF-16 text", "save it as UTF-8: iconv -f UTF-16BE -t UTF-8 FILE > NEW")
    return _table(head)


def printable(text: str) -> str:
    """Return `text` with everything that a terminal or a log must not see (controls, lone surrogates) escaped."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def shown(value: object, width: int = 60) -> str:
    """Return a short, printable form of a JSON value for a message."""
    if isinstance(value, str):
        clipped = value[:width] + ("…" if len(value) > width else "")
        return f'"{printable(clipped)}"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    return str(value)[:width]


def _table(head: bytes) -> Foreign | None:
    """Recognise a table by a header line that names columns which we know."""
    line = head.lstrip(b"\xef\xbb\xbf").lstrip().split(b"\n", 1)[0].decode("utf-8", "replace")
    if line.startswith(("{", "[")):
        return None
    for separator, name in _SEPARATORS.items():
        cells = {re.sub(r'^["\']|["\']$', "", cell.strip()).casefold() for cell in line.split(separator)}
        if len(cells) > 1 and cells & _COLUMNS:
            return Foreign(name, _TO_JSONL)
    return None
