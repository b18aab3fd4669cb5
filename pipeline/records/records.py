"""
Read a drop's bytes as rows of JSON, and rows as records; every error becomes a `Finding`, never an exception.

A file has one row a line, or is one JSON array of rows. Lines end at newline bytes alone (text may hold U+2028 and its
kin), their length is bounded, and JSON is read strictly: no duplicate keys, no NaN, no lone surrogates.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.artifacts import Frozen
from pipeline.records.conversation import (
    FORMS,
    Conversation,
    alpaca_turns,
    form_key,
    message_turns,
    turn_faults,
    unsupported,
)
from pipeline.records.fast_path import KEYS, MOST_KEYS, PlainRows
from pipeline.records.file_formats import HEAD_BYTES, foreign_format
from pipeline.records.strict_json import BadJson, BrokenArray, elements, parse
from pipeline.words import printable, shell_path

_BOM = b"\xef\xbb\xbf"
#: JSON's white space; a form feed does not belong to it.
_BLANKS = b" \t\r\n"
_BLOCK_BYTES = 1 << 16
_BLANK_RUN = re.compile(rb"[ \t\r\n]*+")
_SHOWN_KEY = 60
#: Keys that the model does not see.
LABELS = ("tags", "group")
#: The tag of rows that are trained on and never held out: they were chosen by what a champion answered.
SELECTED = "selected"
#: Keys of a row in each form besides the one that tells it, and `LABELS`.
KNOWN = {key: {*LABELS, "system", *(("history", *KEYS) if key == "instruction" else (key,))} for key in FORMS}
#: The limits of the schema for tags, which label a record for slices of the report.
MOST_TAGS = 20
LONGEST_TAG = 64
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
#: Our keys by their usual names, in lower case.
ALIASES = {
    **dict.fromkeys(("instruction", "instructions", "prompt", "question", "instruct"), "instruction"),
    **dict.fromkeys(("input", "inputs", "context"), "input"),
    **dict.fromkeys(("output", "outputs", "response", "answer", "completion", "target"), "output"),
}
#: Longest line of a drop, in bytes.
MOST_LINE_BYTES = 4_000_000
#: For files that were accepted already.
ANY_LENGTH = 1 << 40


class Finding(Frozen):
    """One error in a drop, with its remedy."""

    line: int | None
    """Line in the file, from 1, where the row begins; `None` where the whole file is meant."""
    field: str | None = None
    """The record's key, where one key is meant."""
    turn: int | None = None
    """Number in the list under that key, from 1, where one turn of a conversation is meant."""
    rule: str
    """Short name of the broken rule, for machines."""
    message: str
    remedy: str
    bare: str | None = Field(default=None, exclude=True)
    """The message without the text of the file that it quotes; `None` if it quotes none."""


class FileFinding(Finding):
    """A finding about the whole file: leaving out a row does not help."""


@dataclass(frozen=True, slots=True)
class Row:
    """One JSON value of a drop, not yet validated, and the line, from 1, where it begins."""

    line: int
    value: Any


@dataclass(frozen=True, slots=True)
class Record:
    """One question with its answer, of a good row; `unknown` are the row's keys that are not used."""

    line: int
    instruction: str
    input: str
    output: str
    unknown: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    """Labels for slices of the report."""
    group: str = ""
    """What it belongs to, a document or a conversation; empty if it says nothing."""
    turns: tuple[tuple[str, str], ...] = ()
    """Role and text of the turns before the question, a system message included."""
    opening: tuple[str, ...] = ()
    """System message, question and answer that its conversation begins with; empty if it is of none."""
    learned: bool = True
    """Whether the answer is learned; one of the weight 0 only stands before later questions."""


def read_rows(path: Path, most: int = MOST_LINE_BYTES) -> Iterator[Row | Finding]:
    """
    Yield the JSON values of a drop in their order, and a finding for each line that cannot be read.

    Blank lines are skipped; a line of more than `most` bytes is a finding. A file of another format (gzip, CSV, UTF-16,
    ...) gives one `FileFinding`; a broken array ends with one. Raises `OSError` only.
    """
    for row in scan_rows(path, most, None):
        if not isinstance(row, int):
            yield row


def scan_rows(path: Path, most: int, plain: PlainRows | None) -> Iterator[Row | Finding | int]:
    """Yield as `read_rows` does; of consecutive lines, not elements of an array, that `plain` takes only the number."""
    file: BufferedReader = BufferedReader(path.open("rb", buffering=0), _BLOCK_BYTES)
    with file:
        head = file.read(HEAD_BYTES)
        foreign = foreign_format(head)
        if foreign is not None:
            yield FileFinding(line=None, rule="format", message=f"the file is {foreign.name}", remedy=foreign.remedy)
            return
        start = len(_BOM) if head.startswith(_BOM) else 0
        file.seek(start)
        is_array = head[start:].lstrip(_BLANKS).startswith(b"[")
        yield from _array_rows(file, most) if is_array else _line_rows(file, most, plain)


def read_records(path: Path, most: int = MOST_LINE_BYTES) -> Iterator[Record | Finding]:
    """
    Yield a drop's records, one per learned answer, and a finding for each bad row, without `validate`'s details.

    Special tokens and control characters in texts are not looked for. Raises `OSError` only.
    """
    for row in read_rows(path, most):
        if isinstance(row, Finding):
            yield row
            continue
        records = records_of(row)
        for record in records:
            if record.learned:
                yield record
        if not records:
            yield Finding(
                line=row.line,
                rule="schema",
                message="not a record: instruction and output must be text that is not blank, input text",
                remedy=f"see every problem: dropforge check {shell_path(path)}",
            )


def records_of(row: Row) -> Sequence[Record]:
    """
    Return a record for each answer in `row`, learned or not; none if it has findings as of `schema_findings`.

    Special tokens and control characters in texts are not looked for.
    """
    value = row.value
    if not isinstance(value, dict) or len(value) > MOST_KEYS:
        return ()
    key = form_key(value)
    if key != "instruction":
        conversation = message_turns(value, key)
        is_good = conversation is not None and next(turn_faults(conversation, value[key]), None) is None
        return _labelled(row, key, conversation) if conversation is not None and is_good else ()
    instruction, given, output = value.get("instruction"), value.get("input", ""), value.get("output")
    if not (isinstance(instruction, str) and isinstance(given, str) and isinstance(output, str)):
        return ()
    if not instruction.strip() or not output.strip():
        return ()
    if len(value) == len(KEYS) and "input" in value:
        return (Record(row.line, instruction, given, output),)
    conversation = None if misnamed_key(value, "input") else alpaca_turns(value)
    return () if conversation is None else _labelled(row, key, conversation, (instruction, given))


def _labelled(row: Row, key: str, conversation: Conversation, last: tuple[str, str] | None = None) -> Sequence[Record]:
    """
    Return a record for each answer of a row's conversation; none for bad tags, a bad group or an unsupported key.

    `last` is the last question in two parts, if it has two.
    """
    value, turns = row.value, tuple(conversation.turns)
    tags, group = value.get("tags", []), value.get("group", "")
    is_tagged = isinstance(tags, list) and len(tags) <= MOST_TAGS and all(map(_is_tag, tags))
    if not is_tagged or not isinstance(group, str) or any(unsupported(value)):
        return ()
    unknown = (*(name for name in value if name not in KNOWN[key]), *conversation.unknown)
    answers = [number for number, (role, _) in enumerate(turns) if role == "assistant"]
    opening = conversation.opening if len(answers) > 1 or key != "instruction" else ()
    return [
        Record(
            row.line,
            *(last if last and number == answers[-1] else (turns[number - 1][1], "")),
            turns[number][1],
            unknown,
            tuple(tags),
            group,
            turns[: number - 1],
            opening,
            number in conversation.learned,
        )
        for number in answers
    ]


def _is_tag(value: object) -> bool:
    if not isinstance(value, str) or len(value) > LONGEST_TAG:
        return False
    return bool(value.strip()) and _CONTROL.search(value) is None


def misnamed_key(value: Mapping[str, Any], known: str) -> str | None:
    """Return the row's key that probably means `known` (`response`: output); `None` if none or if `known` is there."""
    if known in value:
        return None
    return next((key for key in value if ALIASES.get(key.strip().casefold()) == known), None)


def _line_rows(file: BufferedReader, most: int, plain: PlainRows | None) -> Iterator[Row | Finding | int]:
    number = taken = 0
    while line := file.readline(most + 1):
        number += 1
        is_long = len(line) > most and not line.endswith(b"\n")
        if plain is not None and not is_long and plain.take(line):
            taken += 1
            continue
        if not is_long and not line.strip(_BLANKS):
            number += _skip_blanks(file, most)
            continue
        if taken:
            yield taken
            taken = 0
        if is_long:
            _skip_line(file)
            message, remedy = f"the line is longer than {most:,} bytes", "write one record a line, or shorten it"
            yield Finding(line=number, rule="too_long", message=message, remedy=remedy)
        else:
            yield _json_row(line.removesuffix(b"\n"), number)
    if taken:
        yield taken


def _array_rows(file: BufferedReader, most: int) -> Iterator[Row | Finding]:
    try:
        for number, text in elements(file, most):
            yield _json_row(text, number)
    except BrokenArray as error:
        remedy = "write one complete JSON array of rows, or one row a line"
        yield FileFinding(line=error.line, rule="json", message=str(error), remedy=remedy)


def _skip_blanks(file: BufferedReader, most: int) -> int:
    """Skip the blank lines within the next `most` bytes, as far as they are buffered; return how many."""
    held = file.peek()[:most]
    if held[:1].strip(_BLANKS):
        return 0
    run = _BLANK_RUN.match(held)
    end = held.rfind(b"\n", 0, run.end() if run else 0) + 1
    file.read(end)
    return held.count(b"\n", 0, end)


def _json_row(text: bytes, line: int) -> Row | Finding:
    try:
        return Row(line, parse(text))
    except BadJson as error:
        field = error.field and printable(error.field[:_SHOWN_KEY])
        return Finding(
            line=line, field=field, rule=error.rule, message=error.message, remedy=error.remedy, bare=error.bare
        )


def _skip_line(file: BufferedReader) -> None:
    while (part := file.readline(1 << 20)) and not part.endswith(b"\n"):
        pass
