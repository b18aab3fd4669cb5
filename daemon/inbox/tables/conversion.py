"""
Convert a table to records: which column is which key, and how many rows are lost and why.

Rows are written on the lines that they have in the table, validated as the inbox does, and sifted: so the result passes
`dropforge check`, and what is said of a row names its line in the table.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

from daemon.inbox.quarantine import sift
from daemon.inbox.tables.reading import Table
from pipeline.durable import read_jsonl
from pipeline.errors import EXIT_BAD_DATA, DropforgeError
from pipeline.records.conversation import UNSUPPORTED
from pipeline.records.fast_path import KEYS
from pipeline.records.records import KNOWN, LABELS, misnamed_key
from pipeline.records.strict_json import BadJson, parse
from pipeline.records.validate import MOST_FINDINGS, MOST_KINDS, FindingKind, Options, Validation, validate
from pipeline.words import count, ignored_words

#: Keys that hold a whole conversation.
_CONVERSATIONS = ("messages", "conversations")
_LISTS = {"tags", "history", *_CONVERSATIONS}
OUTPUTS = (*KEYS, "system", "history", *LABELS, *_CONVERSATIONS)
#: Names of columns that probably hold what a key means, the likeliest first.
_LIKELY = {
    "instruction": ("text", "sentence", "sentence1", "premise", "query", "message", "document", "article", "review"),
    "input": ("sentence2", "hypothesis", "passage"),
    "output": ("label", "labels", "class", "category", "intent", "sentiment", "summary", "highlights", "translation"),
}
_SHOWN = 3


class Choice(NamedTuple):
    """Which column of a table is which key of a record."""

    columns: dict[str, str]
    """Key -> column."""
    known: bool
    """Whether these are the columns of a known form, or were given: none is guessed."""
    unused: tuple[str, ...]
    missing: tuple[str, ...]
    """Keys that a record must have, and that no column is known for."""

    @property
    def ignored(self) -> str:
        """The unused columns, as `ignored: id, url`, and why where the inbox refuses rows with such keys."""
        whys = {name: f" ({why} not supported)" for name, why in UNSUPPORTED.items()}
        return ignored_words([name + whys.get(name, "") for name in self.unused])


class Conversion(NamedTuple):
    """The rows of records that a table gave; rows = kept + lost."""

    rows: int
    kept: int
    records: int
    """More than `kept` of conversations."""
    losses: tuple[str, ...]
    """Why rows are lost, how many, and which is the first; a row can have several reasons."""
    first: tuple[dict[str, Any], ...]

    @property
    def words(self) -> str:
        """The numbers of rows, records and lost rows, as `10 rows = 9 records + 1 row lost`."""
        lost, records = count(self.rows - self.kept, "row"), count(self.records, "record")
        kept = records if self.records == self.kept else f"{count(self.kept, 'row')} with {records}"
        return f"{count(self.rows, 'row')} = {kept} + {lost} lost"


def choose(columns: Sequence[str], given: Mapping[str, str]) -> Choice:
    """
    Choose each key's column: the one `given` (key -> column, "" for none), else by its name, else by a guess.

    Raises `DropforgeError` for a given key or column that does not exist; keys without a column are `Choice.missing`.
    """
    for key, column in given.items():
        if key not in OUTPUTS:
            raise DropforgeError(f"{key} is no key of a record", f"the keys: {', '.join(OUTPUTS)}", EXIT_BAD_DATA)
        if column and column not in columns:
            hint = f"its columns: {', '.join(columns)}"[:2000]
            raise DropforgeError(f"there is no column {column}", hint, EXIT_BAD_DATA)
    free = {column: None for column in columns if column and column not in given.values()}
    talks = [key for key in _CONVERSATIONS if given.get(key)]
    if not any(map(given.get, (*KEYS, "history", *_CONVERSATIONS))):
        talks = [key for key in _CONVERSATIONS if key in free and key not in given]
    chosen, known = dict(given), True
    for key in filter(KNOWN[talks[0] if talks else "instruction"].__contains__, OUTPUTS):
        named = None if key in chosen else key if key in free else misnamed_key(free, key)
        if named is not None:
            chosen[key] = named
            del free[named]
            known = known and (named == key or misnamed_key(free, key) is None)
    names = {column.strip().casefold(): column for column in reversed(free)}
    for key, likely in _LIKELY.items():
        guess = next((names[name] for name in likely if name in names), None)
        if key not in chosen and not talks and guess in free:
            chosen[key], known = guess, False
            del free[guess]
    chosen = {key: chosen[key] for key in OUTPUTS if chosen.get(key)}
    missing = tuple(key for key in ("instruction", "output") if key not in chosen and not talks)
    # Of two forms, which is meant is said.
    is_one = not talks or given.get(talks[0]) or not ("output" in free or misnamed_key(free, "output"))
    return Choice(chosen, bool(known and is_one and len(talks) + ("output" in chosen) == 1), tuple(free), missing)


def convert(table: Table, columns: Mapping[str, str], target: Path, options: Options, most: int) -> Conversion:
    """
    Write the good records of `table` to the new file `target`, as JSON Lines, and count what is lost.

    `columns` maps keys to columns; `options` say what a good record is. Raises `DropforgeError` if the table cannot be
    read to its end or the file exceeds `most` bytes, `OSError` if it cannot be written; an incomplete file stays.
    """
    unread: dict[str, list[int]] = {}
    rows = last = 0
    with target.open("wb") as file:
        for line, cells in table.read(list(columns.values())):
            rows += 1
            record = cells if isinstance(cells, str) else _record(list(columns), cells)
            if isinstance(record, str):
                reason = record if record in unread or len(unread) < MOST_FINDINGS else "further reasons"
                unread.setdefault(reason, [line, 0])[1] += 1
                continue
            file.writelines(repeat(b"\n", line - last - 1))
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            last = line
            if file.tell() > most:
                message = f"the records have more than {most:,} bytes, the limit (intake.max_bytes)"
                raise DropforgeError(message, "split the table, or raise intake.max_bytes", EXIT_BAD_DATA)
    validation = validate(target, replace(options, most_bad_rows=rows))
    sift(target, options)
    losses = [FindingKind(words, "", times, line, None, None, words) for words, (line, times) in unread.items()]
    texts = [
        f"{options.path}{kind.where}: {'; '.join(filter(None, (kind.message, kind.remedy)))}{kind.often}"
        for kind in losses + (_kinds(validation) if last else [])
    ]
    more = [f"... and {count(len(texts) - MOST_KINDS, 'further reason')}"] if len(texts) > MOST_KINDS else []
    first = tuple(islice(read_jsonl(target), _SHOWN))
    records = validation.answers - validation.context
    return Conversion(rows, validation.good_rows, records, (*texts[:MOST_KINDS], *more), first)


def new_name(name: str) -> str:
    """Return the name for the records of the table `name`: data.jsonl of data.csv.gz, data-new.jsonl of data.jsonl."""
    new = Path(name.removesuffix(".gz")).with_suffix(".jsonl").name
    return new if new != name else f"{Path(name).stem}-new.jsonl"


def _record(keys: Sequence[str], cells: Sequence[Any]) -> dict[str, Any] | str:
    """Return the record of a row's cells, or why it is none. Lists are parsed from JSON; `None` is "" or left out."""
    record = dict(zip(keys, cells, strict=True))
    for key in _LISTS & record.keys():
        text = record[key]
        if isinstance(text, str) and text.lstrip().startswith("["):
            try:
                record[key] = parse(text.encode())
            except BadJson as error:
                return f"{key}: {error.message}"
        elif key == "tags" and isinstance(text, str):
            record[key] = [text] if text.strip() else []
    # No cell is no text: of a label, nothing is said then.
    return {key: "" if value is None else value for key, value in record.items() if value is not None or key in KEYS}


def _kinds(validation: Validation) -> list[FindingKind]:
    """Return the kinds of findings; of too many findings, a kind for each broken rule."""
    if validation.findings_total <= MOST_FINDINGS:
        return list(validation.kinds)
    first = {finding.rule: finding for finding in reversed(validation.findings)}
    return [
        FindingKind(f"{rule}, as: {of.message}", "", times, of.line, of.field, of.turn, of.message)
        if (of := first.get(rule))
        else FindingKind(f"{rule}, not among the first rows", "", times, None, None, None, rule)
        for rule, times in validation.rules.items()
    ]
