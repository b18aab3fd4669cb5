"""
Read a table as text: CSV, TSV, Parquet, JSON Lines, any of these in gzip, and a folder that datasets saved.

No value is guessed from a type: 007 and NA stay what they are. A row takes at most `MOST_LINE_BYTES` of memory, as a
drop's line. An error of the whole file is a `DropforgeError` with file, line and remedy; that of a row stands in place
of its cells.
"""

import csv
import gzip
import json
import os
import subprocess
import sys
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline import durable
from pipeline.errors import EXIT_BAD_DATA, DropforgeError
from pipeline.records.fast_path import MOST_KEYS
from pipeline.records.file_formats import HEAD_BYTES, SEPARATORS, foreign_format, name_file
from pipeline.records.records import MOST_LINE_BYTES, FileFinding, Finding, read_rows
from pipeline.words import first_of, shell_path

_BOM = b"\xef\xbb\xbf"
#: A row's cells in the columns that are asked for, or what is wrong with it.
Cells = list[Any] | str
_Quoting = Literal[0, 3]  # csv.QUOTE_MINIMAL, csv.QUOTE_NONE


class Table(NamedTuple):
    """A table: the names of its columns, and a function that reads some of them."""

    kind: str
    columns: tuple[str, ...]
    read: Callable[[Sequence[str]], Iterator[tuple[int, Cells]]]
    """Yields the first line of each row (of Parquet, its number) and its cells in the named columns."""
    note: str = ""
    """What is not read as it is written."""


def open_table(path: Path, name: str, aside: Path, most: int) -> Table:
    """
    Open the table at `path`, a file or folder that its owner knows as `name`.

    gzip, Parquet and Arrow files are unpacked into the folder `aside`, up to `most` bytes, and rows read from there
    later, else from `path`. Raises `DropforgeError` if it is no table or its columns have no usable names, `OSError` if
    it cannot be read.
    """
    if path.is_dir():
        table = _arrow("a folder that datasets saved", _saved_files(path, name), name, aside / "rows", most)
    else:
        head = _head(path)
        if head.startswith(b"\x1f\x8b"):
            path = _unpacked(path, name, aside / "unpacked", most)
            head = _head(path)
        foreign = foreign_format(head)
        if head.startswith(b"PAR1"):
            table = _arrow("Parquet", [path], name, aside / "rows", most)
        elif foreign is not None and foreign.name not in SEPARATORS.values():
            raise _error(name, f"it is {foreign.name}", foreign.remedy)
        else:
            table = (_objects if head.removeprefix(_BOM).lstrip().startswith((b"{", b"[")) else _delimited)(path, name)
    twice = [json.dumps(column[:60]) for column, times in Counter(table.columns).items() if times > 1 and column]
    if twice or len(table.columns) > MOST_KEYS:
        faults = (
            f"several columns have the name {first_of(twice)}" if twice else f"it has more than {MOST_KEYS:,} columns"
        )
        raise _error(name, faults, "give each column a name of its own, and keep those of question and answer", 1)
    return table


def _head(path: Path) -> bytes:
    with durable.open_regular(path) as file:
        return file.read(HEAD_BYTES)


def _error(name: str, message: str, hint: str, line: int | None = None) -> DropforgeError:
    """Return an error about the file `name`; FILE in `hint` becomes its name, NEW that of a new file in its folder."""
    hint = name_file(hint.replace("NEW", shell_path(Path(name).parent / f"new-{Path(name).name}")), name)
    return DropforgeError(f"{name}{'' if line is None else f':{line}'}: {message}", hint, EXIT_BAD_DATA)


def _unpacked(path: Path, name: str, target: Path, most: int) -> Path:
    try:
        with gzip.open(path) as packed, target.open("wb") as file:
            while chunk := packed.read(1 << 20):
                file.write(chunk)
                if file.tell() > most:
                    message = f"it unpacks to more than {most:,} bytes, the limit (intake.max_bytes)"
                    raise _error(name, message, "split it, or raise intake.max_bytes")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _error(name, f"it cannot be unpacked: {error}", "see whether it is whole: gzip -t FILE") from error
    return target


def _delimited(path: Path, name: str) -> Table:
    """Open a table of lines by its likeliest separator; the first row names the columns. Raises `DropforgeError`."""
    rows = partial(_rows, path, name)
    widths = {separator: len(next(rows(separator, csv.QUOTE_NONE), (1, []))[1]) for separator in SEPARATORS}
    # Names of columns have commas, no tabs.
    separator = "\t" if widths["\t"] > 1 else max(widths, key=widths.__getitem__)
    if widths[separator] < 2:  # noqa: PLR2004 - a question and an answer
        hint = "write a first line of names, as: instruction,output"
        raise _error(name, "it has no columns: no tab, comma, semicolon or bar is in its first line", hint, 1)
    quoting: _Quoting = csv.QUOTE_MINIMAL
    note = ""
    if separator == "\t":
        # Many write TSV without a meaning of quotes. They have one if the whole file keeps its rules.
        try:
            deque(rows(separator, quoting), maxlen=0)
        except DropforgeError as error:
            quoting, note = csv.QUOTE_NONE, f"quotes are read as text, since {error.message}"
    first, names = next(rows(separator, quoting))

    def read(wanted: Sequence[str]) -> Iterator[tuple[int, Cells]]:
        places, width = [names.index(column) for column in wanted], len(names)
        problem = f"it has not as many cells as line {first} has names ({width})"
        for line, cells in islice(rows(separator, quoting), 1, None):
            yield line, [cells[place] for place in places] if len(cells) == width else problem

    return Table(SEPARATORS[separator], tuple(names), read, note)


def _rows(path: Path, name: str, separator: str, quoting: _Quoting) -> Iterator[tuple[int, list[str]]]:
    """Yield the first line and the cells of each row that is not empty. Raises `DropforgeError` for a malformed one."""
    begin = number = taken = 0

    def lines() -> Iterator[str]:
        nonlocal number, taken
        while line := file.readline(MOST_LINE_BYTES + 1):
            number, taken = number + 1, taken + len(line)
            if taken > MOST_LINE_BYTES:
                message = f"the row that begins here is longer than {MOST_LINE_BYTES:,} bytes"
                raise _error(name, message, "shorten it, or close the quote that it opens", begin)
            try:
                yield (line.removeprefix(_BOM) if number == 1 else line).decode()
            except UnicodeDecodeError as error:
                message = f"not UTF-8: byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line"
                hint = "save it as UTF-8, as with: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
                raise _error(name, message, hint, number) from error

    csv.field_size_limit(MOST_LINE_BYTES)
    with durable.open_regular(path) as file:
        reader = csv.reader(lines(), delimiter=separator, quoting=quoting, strict=True)
        while True:
            begin, taken = number + 1, 0
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                fault = str(error).partition(" - ")[0].replace("unexpected end of data", "a quote is not closed")
                hint = 'put a cell with a quote or a line break in quotes, write " in it as "", and end rows with \\n'
                raise _error(name, f"the row that begins here is malformed: {fault}", hint, begin) from error
            if cells:
                yield begin, cells


def _objects(path: Path, name: str) -> Table:
    """Open JSON Lines or an array, reading all rows for their keys; numbers become text. Raises `DropforgeError`."""
    columns: dict[str, None] = {}
    for row in read_rows(path):
        if isinstance(row, FileFinding):
            raise _error(name, row.message, row.remedy)
        if not isinstance(row, Finding) and isinstance(row.value, dict) and len(columns) <= MOST_KEYS:
            columns.update(dict.fromkeys(row.value))

    def read(wanted: Sequence[str]) -> Iterator[tuple[int, Cells]]:
        for row in read_rows(path):
            if isinstance(row, Finding):
                yield row.line or 1, row.message
            elif isinstance(row.value, dict):
                values = [row.value.get(column) for column in wanted]
                yield row.line, [json.dumps(each) if isinstance(each, int | float) else each for each in values]
            else:
                yield row.line, "a record is an object"

    return Table("JSON", tuple(columns), read)


def _saved_files(folder: Path, name: str) -> list[Path]:
    """Return the files of one split that datasets saved, in order. Raises `DropforgeError` for any other folder."""
    splits = durable.read_object(folder / "dataset_dict.json").get("splits")
    if isinstance(splits, list) and splits:
        message = f"{name}: it holds the splits {first_of([str(split)[:60] for split in splits])}"
        hint = f"convert one of them: dropforge convert {shell_path(Path(name, str(splits[0])))}"
        raise DropforgeError(message, hint, EXIT_BAD_DATA)
    try:
        names = [str(entry["filename"]) for entry in durable.read_object(folder / "state.json")["_data_files"]]
    except (KeyError, TypeError):
        names = []
    if not names or any(Path(file).name != file for file in names):
        message = f"{name}: it is a folder, and not one that datasets saved (save_to_disk)"
        raise DropforgeError(message, "name a file in it", EXIT_BAD_DATA)
    return [folder / file for file in names]


def _arrow(kind: str, files: Sequence[Path], name: str, target: Path, most: int) -> Table:
    """
    Open Parquet or Arrow files, which a child process, as it loads the training stack, converts to JSON Lines.

    These are written to `target`, up to `most` bytes. Raises `DropforgeError` if that fails.
    """
    argv = [sys.executable, "-P", "-m", "pipeline.records.arrow_rows", str(target), str(most), *map(str, files)]
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}
    done = subprocess.run(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)  # noqa: S603 - our own
    if done.returncode != 0:
        died = {"error": f"its process ended with {done.returncode}", "hint": "free memory, then try again"}
        told = json.loads(done.stdout.splitlines()[-1]) if done.stdout else died
        raise _error(name, told["error"], told["hint"])
    note = "columns of bytes are left out; numbers that the file has names for (ClassLabel) are written as these"
    return _objects(target, name)._replace(kind=kind, note=note)
