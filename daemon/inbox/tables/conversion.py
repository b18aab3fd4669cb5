"""
Convert a table to records: which column is which key, and how many rows are lost and why.

Rows are written on the lines that they have in the table, validated as the inbox does, and sifted: so the result passes
`dropforge check`, and what is said of a row names its line in the table.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
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
from pipeline.records.records import ALIASES, KNOWN, LABELS, misnamed_key
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
#: Words in the name of a column that holds a person's answer, alone or with names of the answer: `corrected`,
#: `expected_output`, and not `reference_url`.
_PERSONS = {"corrected", "correction", "correct", "expected", "gold", "reference", "better"}
_ANSWERS = {"label", *(name for name, key in ALIASES.items() if key == "output")}
#: Words in the name of a column that judges the answer beside it.
_JUDGEMENTS = {"rating", "verdict", "thumb", "thumbs", "flag", "score"}
_SHOWN = 3


class Choice(NamedTuple):
    """Which column of a table is which key of a record."""

    columns: dict[str, str]
    """Key -> column."""
    known: bool
    """Whether these are the columns of a known form, or were given: none is guessed."""
    unused: tuple[str, ...]
    answers: tuple[str, ...]
    """The columns that may be the answer, likeliest first, if more than one or judged, and none was given."""
    judgement: str | None
    """The column that judges the answers: which rows are meant is the user's to say."""
    missing: tuple[str, ...]
    """Keys that a record must have, and that no column is known for."""

    @property
    def doubt(self) -> str:
        """Why the columns are not known, as a clause; empty if they are, or if one is missing."""
        judged = f"; the column {self.judgement} judges the answers" if self.judgement else ""
        several = f"; {' and '.join(self.answers)} are both answers" if len(self.answers) > 1 else ""
        guessed = "" if self.known or self.answers else "; the columns are guessed from their names"
        return f"{several}{judged}{guessed}"[2:]

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

    A person's answer goes before a model's; which is meant is asked, as it is of judged answers. Keys without a column
    are `Choice.missing`. Raises `DropforgeError` for a given key or column that does not exist.
    """
    for key, column in given.items():
        if key not in OUTPUTS:
            raise DropforgeError(f"{key} is no key of a record", f"the keys: {', '.join(OUTPUTS)}", EXIT_BAD_DATA)
        if column:
            require_column(column, columns)
    free = {column: None for column in columns if column and column not in given.values()}
    talks = [key for key in _CONVERSATIONS if given.get(key)]
    if not any(map(given.get, (*KEYS, "history", *_CONVERSATIONS))):
        talks = [key for key in _CONVERSATIONS if key in free and key not in given]
    chosen, known = dict(given), True
    persons = None if talks or "output" in given else next(filter(is_persons, free), None)
    if persons is not None:
        chosen["output"] = persons
        del free[persons]
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
    other = "output" if "output" in free else misnamed_key(free, "output")
    is_open = "output" in chosen and "output" not in given
    judgement = next(filter(_is_judgement, free), None) if is_open else None
    is_asked = is_open and (judgement is not None or (persons is not None and other is not None))
    answers = tuple(filter(None, (chosen["output"], other))) if is_asked else ()
    missing = tuple(key for key in ("instruction", "output") if key not in chosen and not talks)
    # Of two forms, which is meant is said.
    is_one = not talks or given.get(talks[0]) or other is None
    known = bool(known and not is_asked and is_one and len(talks) + ("output" in chosen) == 1)
    return Choice(chosen, known, tuple(free), answers, judgement, missing)


def require_column(column: str, columns: Sequence[str]) -> None:
    """Raise `DropforgeError` if `column` is none of the `columns` of a table."""
    if column not in columns:
        hint = f"its columns: {', '.join(columns)}"[:2000]
        raise DropforgeError(f"there is no column {column}", hint, EXIT_BAD_DATA)


def is_persons(column: str) -> bool:
    """Return whether a column is named as a person's answer: `corrected`, `gold`, `Better answer`, `expectedOutput`."""
    words = _words(column)
    return words <= _PERSONS | _ANSWERS and bool(words & _PERSONS) and words not in ({"better"}, {"correct"})


def _is_judgement(column: str) -> bool:
    """Return whether a column's name has a word for a judgement: `rating`, `user_verdict`, `thumbs up`."""
    return bool(_words(column) & _JUDGEMENTS)


def _words(column: str) -> set[str]:
    """Return the words of a column's name, in lower case; `expectedOutput` has two."""
    return set(re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", column).casefold()))


def convert(  # noqa: PLR0913, PLR0917 - what is read, where to, and the rules
    table: Table,
    columns: Mapping[str, str],
    target: Path,
    options: Options,
    most: int,
    tags: Sequence[str] = (),
    only: tuple[str, str] | None = None,
) -> Conversion:
    """
    Write the good records of `table` to the new file `target`, as JSON Lines, and count what is lost.

    `columns` maps keys to columns; `options` say what a good record is. Each record gets the `tags`, too. `only` is a
    column and a text: rows with another text there are lost. Raises `DropforgeError` if the table cannot be read to its
    end or the file exceeds `most` bytes, `OSError` if it cannot be written; an incomplete file stays.
    """
    unread: dict[str, list[int]] = {}
    rows = last = 0
    with target.open("wb") as file:
        for line, cells in table.read([*columns.values(), *([only[0]] if only else [])]):
            rows += 1
            record = cells if isinstance(cells, str) else _record(columns, cells, tags, only)
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


def _record(
    keys: Iterable[str], cells: Sequence[Any], tags: Sequence[str], only: tuple[str, str] | None
) -> dict[str, Any] | str:
    """
    Return the record of a row's cells, or why it is none. Lists are parsed from JSON; `None` is "" or left out.

    With `only` the last cell must be its text.
    """
    if only is not None and cell_text(cells[-1]) != only[1]:
        return f"{only[0]} is not {only[1]}"
    record = dict(zip(keys, cells, strict=only is None))
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
    record = {key: "" if value is None else value for key, value in record.items() if value is not None or key in KEYS}
    if tags and isinstance(record.setdefault("tags", []), list):  # other values are told of by the validation
        record["tags"] = [*record["tags"], *(tag for tag in tags if tag not in record["tags"])]
    return record


def cell_text(cell: Any) -> str:
    """Return a cell as text; `None` is empty."""
    return "" if cell is None else str(cell)


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
