"""Names what a file is when it is not JSON Lines, from its first bytes, and says how to make JSON Lines of it."""

import re
from dataclasses import dataclass

HEAD_BYTES = 1 << 16
"""So many first bytes are enough for `foreign_format`."""
_UNPACK = "unpack it first: {} FILE"
_PANDAS = (
    "convert it: python -c \"import pandas; pandas.{}('FILE').to_json('NEW.jsonl', orient='records', lines=True)\""
)
_ICONV = "save it as UTF-8: iconv -f {} -t UTF-8 FILE > NEW"
_ARROW = (
    'convert it: python -c "import datasets; '
    "datasets.Dataset.from_file('FILE').to_json('NEW.jsonl', force_ascii=False)\""
)
_SHEET = "unpack it (unzip FILE), or save the sheet as CSV and convert that"
_PICKLE = "a pickle can run code when it is read: save the data as JSON Lines where it was made"
_SQLITE = "export the table: sqlite3 -json FILE 'select * from TABLE' > NEW.json"
_EXPORT = "write its records as JSON Lines: one object a line with instruction, input and output"
_MAGIC = (
    (b"\x1f\x8b", "gzip-compressed", _UNPACK.format("gunzip")),
    (b"\x1f\x9d", "compressed with compress", _UNPACK.format("uncompress")),
    (b"PK\x03\x04", "a zip archive or an Excel file", _SHEET),
    (b"PK\x05\x06", "an empty zip archive", "drop the JSON Lines file itself"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", _UNPACK.format("unzstd")),
    (b"BZh", "bzip2-compressed", _UNPACK.format("bunzip2")),
    (b"\xfd7zXZ\0", "xz-compressed", _UNPACK.format("unxz")),
    (b"]\0\0", "lzma-compressed", _UNPACK.format("unlzma")),
    (b"\x04\x22\x4d\x18", "lz4-compressed", _UNPACK.format("unlz4")),
    (b"\xff\x06\0\0sNaPpY", "snappy-compressed", _UNPACK.format("snzip -d")),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it and drop the JSON Lines file"),
    (b"Rar!", "a RAR archive", "unpack it and drop the JSON Lines file"),
    (b"PAR1", "Parquet", _PANDAS.format("read_parquet")),
    (b"ARROW1", "an Arrow file", _PANDAS.format("read_feather")),
    (b"FEA1", "a Feather file", _PANDAS.format("read_feather")),
    (b"\xff\xff\xff\xff", "an Arrow stream", _ARROW),
    (b"ORC", "ORC", _PANDAS.format("read_orc")),
    (b"Obj\x01", "Avro", _EXPORT),
    (b"\x89HDF", "HDF5", _PANDAS.format("read_hdf")),
    (b"\x93NUMPY", "a NumPy array", _EXPORT),
    (b"\x80\x02", "a Python pickle", _PICKLE),
    (b"\x80\x03", "a Python pickle", _PICKLE),
    (b"\x80\x04", "a Python pickle", _PICKLE),
    (b"\x80\x05", "a Python pickle", _PICKLE),
    (b"SQLite format 3\0", "an SQLite database", _SQLITE),
    (b"%PDF", "a PDF document", _EXPORT),
    (b"\xd0\xcf\x11\xe0", "an old Excel or Word file", "save the sheet as CSV and convert that"),
    (b"{\\rtf", "rich text", _EXPORT),
    (b"\x89PNG", "a picture", "drop a file of records"),
    (b"\xff\xd8\xff", "a picture", "drop a file of records"),
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the file itself", "fetch it: git lfs pull"),
    (b"\xff\xfe\0\0", "UTF-32 text", _ICONV.format("UTF-32")),
    (b"\0\0\xfe\xff", "UTF-32 text", _ICONV.format("UTF-32")),
    (b"\xff\xfe", "UTF-16 text", _ICONV.format("UTF-16")),
    (b"\xfe\xff", "UTF-16 text", _ICONV.format("UTF-16")),
    (b"+/v8", "UTF-7 text", _ICONV.format("UTF-7")),
    (b"\x1e", "a JSON text sequence", "take the record separators out: tr -d '\\036' < FILE > NEW.jsonl"),
)
#: Text without a byte order mark, by where its NUL bytes are in the first four.
_WIDE = (
    (re.compile(rb"[{\[]\0\0\0"), "UTF-32LE"),
    (re.compile(rb"\0\0\0[{\[]"), "UTF-32BE"),
    (re.compile(rb"[{\[]\0"), "UTF-16LE"),
    (re.compile(rb"\0[{\[]"), "UTF-16BE"),
)
_TAR_PLACE, _TAR_MAGIC = 257, b"ustar"
_YAML = (
    'convert it: python -c "import json, yaml; '
    "[print(json.dumps(row)) for row in yaml.safe_load(open('FILE'))]\" > NEW.jsonl"
)
_MARKUP = (
    (re.compile(r"<!doctype html|<html", re.IGNORECASE), "an HTML page", "drop the data itself: this is a web page"),
    (re.compile(r"<\?xml|<[a-z][\w:.-]*[ />]", re.IGNORECASE), "XML", _EXPORT),
    (
        re.compile(r"---[ \t]*$|%YAML|-[ \t]+\w+[ \t]*:|(?:instruction|input|output|prompt|response)[ \t]*:"),
        "YAML",
        _YAML,
    ),
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
    for wide, name in _WIDE:
        if wide.match(head):
            return Foreign(f"{name[:6]} text", _ICONV.format(name))
    if head[_TAR_PLACE:].startswith(_TAR_MAGIC):
        return Foreign("a tar archive", "unpack it and drop the JSON Lines file: tar -xf FILE")
    return _text(head)


def _text(head: bytes) -> Foreign | None:
    """Recognise text that is something else by its first line."""
    body = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if _SPREAD.match(body):
        remedy = "write each record on one line: jq -c . FILE > NEW.jsonl (jq -c '.data[]' where a key holds them all)"
        return Foreign("JSON spread over several lines", remedy)
    line = body.split(b"\n", 1)[0].decode("utf-8", "replace")
    if line.startswith(("{", "[")):
        return None
    for pattern, name, remedy in _MARKUP:
        if pattern.match(line):
            return Foreign(name, remedy)
    return _table(line)


def _table(line: str) -> Foreign | None:
    """Recognise a table by a header line that names columns which we know."""
    for separator, name in _SEPARATORS.items():
        cells = {re.sub(r'^["\']|["\']$', "", cell.strip()).casefold() for cell in line.split(separator)}
        if len(cells) > 1 and cells & _COLUMNS:
            return Foreign(name, _TABLE.format(separator.replace("\t", "\\t")))
    return None
