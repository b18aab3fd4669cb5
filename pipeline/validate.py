"""
Holds a file against `schemas/alpaca-record.schema.json` and says of every bad row where, what and what to do.

Used by the intake and by `dropforge check FILE`; streaming, so memory does not grow with the file.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from referencing import Registry

from pipeline.artifacts import Frozen
from pipeline.formats import printable, shown
from pipeline.records import BROKEN_ARRAY, KEYS, Finding, Limits, Row, key_meant, read_rows, record_of
from pipeline.strict_json import FLATTEN, NESTED

SCHEMA = "alpaca-record.schema.json"
MOST_FINDINGS = 1000
_MOST_KEYS = 100
_KEY_WIDTH = 60
#: Keys that give away another format: what it is, by the key.
_OTHER_ROWS = {
    "conversations": "a ShareGPT conversation",
    "messages": "an OpenAI chat",
    "chosen": "a preference pair",
}
_CONVERT = "convert it to instruction, input and output: the request, its text if any, and the one answer"


@dataclass(frozen=True, slots=True)
class Options:
    """What a file may be."""

    max_line_bytes: int = 4_000_000
    """Longest line in bytes."""
    unknown_keys: Literal["warn", "reject"] = "warn"
    """A record's keys beside instruction, input and output: counted, or a finding each."""


class Notice(Frozen):
    """Something worth knowing that rejects nothing, counted over the file."""

    kind: str
    key: str | None
    rows: int
    message: str


class Validation(Frozen):
    """What a file was found to be."""

    rows: int
    """Records found, good or not."""
    good_rows: int
    findings_total: int
    findings: tuple[Finding, ...]
    """The first `MOST_FINDINGS`."""
    warnings: tuple[Notice, ...]

    @property
    def ok(self) -> bool:
        """Whether the file may be trained on."""
        return self.findings_total == 0

    @property
    def reason(self) -> str:
        """One sentence: how many findings, and the first."""
        if self.ok:
            return f"{self.good_rows:,} records, nothing to object to"
        first = self.findings[0]
        where = "" if first.line is None else f"line {first.line:,}: "
        count = "" if self.findings_total == 1 else f"{self.findings_total:,} findings; the first: "
        return f"{count}{where}{first.message}"


def validate(path: Path, options: Options) -> Validation:
    """Read the file at `path` whole and return what it holds. Raises `OSError` only."""
    tally = _Tally(options)
    for row in read_rows(path, Limits(options.max_line_bytes)):
        tally.add(row)
    return tally.result()


def row_findings(row: Row) -> list[Finding]:
    """Return what the schema, and the rule on misnamed keys, have against one row; in the order of the keys."""
    value = row.value
    if isinstance(value, dict):
        other = next((key for key in _OTHER_ROWS if key in value), None)
        if other is not None and "instruction" not in value:
            return [_finding(row, other, "format", f"the row is {_OTHER_ROWS[other]}", _CONVERT)]
    try:
        found = [_worded(row, error) for error in _schema().iter_errors(value)]
    except RecursionError:
        return [_finding(row, None, "nesting", NESTED, FLATTEN)]
    return found + list(_misnamed(row, {finding.field for finding in found}))


@cache
def _schema() -> Draft202012Validator:
    """Build the validator once; its registry is empty, so nothing is ever fetched."""
    text = resources.files("schemas").joinpath(SCHEMA).read_text(encoding="utf-8")
    schema = json.loads(text)
    Draft202012Validator.check_schema(schema)
    registry: Registry[Any] = Registry()
    return Draft202012Validator(schema, registry=registry)


class _Tally:
    """Counts what a file holds."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._rows = 0
        self._good = 0
        self._whole_file = False
        self._total = 0
        self._findings: list[Finding] = []
        self._keys: dict[str, int] = {}

    def add(self, row: Row | Finding) -> None:
        if isinstance(row, Finding):
            no_row = row.line is None or row.rule == BROKEN_ARRAY
            self._rows += not no_row
            self._whole_file = self._whole_file or no_row
            self._note([row])
            return
        self._rows += 1
        record = record_of(row)
        found = row_findings(row) if record is None else []
        unknown = record.unknown if record is not None else ()
        if unknown and self._options.unknown_keys == "reject":
            found = [*found, *(_unknown_key(row, key) for key in unknown)]
        elif unknown:
            self._count(unknown)
        self._good += not found
        self._note(found)

    def result(self) -> Validation:
        if self._rows == 0 and not self._whole_file:
            remedy = "write one JSON object a line, with instruction and output, and drop it again"
            self._note([Finding(line=None, rule="empty", message="the file has no records", remedy=remedy)])
        return Validation(
            rows=self._rows, good_rows=self._good, findings_total=self._total,
            findings=tuple(self._findings), warnings=tuple(_key_notice(key, rows) for key, rows in self._keys.items()),
        )  # fmt: skip

    def _note(self, found: list[Finding]) -> None:
        self._total += len(found)
        self._findings.extend(found[: MOST_FINDINGS - len(self._findings)])

    def _count(self, keys: tuple[str, ...]) -> None:
        for key in keys:
            name = printable(key[:_KEY_WIDTH])
            place = name if name in self._keys or len(self._keys) < _MOST_KEYS else "…"
            self._keys[place] = self._keys.get(place, 0) + 1


def _key_notice(key: str, rows: int) -> Notice:
    message = f"the key {key!r} is not used"
    return Notice(kind="unknown_key", key=key, rows=rows, message=message)


def _unknown_key(row: Row, key: str) -> Finding:
    name = printable(key[:_KEY_WIDTH])
    remedy = 'leave it out, or set intake.unknown_keys = "warn" to have it ignored'
    return _finding(row, name, "unknown_key", f"{name!r} is not a key of a record", remedy)


def _worded(row: Row, error: ValidationError) -> Finding:
    """Say in our words what jsonschema found; its own would repeat the whole value."""
    field = str(error.path[0]) if error.path else None
    if error.validator == "required":
        field = _missing(error)
        return _missing_finding(row, field)
    if error.validator == "pattern":
        return _finding(row, field, "blank", f"{field} is blank", f"write the {field}, or leave the row out")
    if error.validator == "type" and field is None:
        message = f"a record is an object, this is {_article(row.value)}"
        return _finding(row, None, "type", message, 'write {"instruction": ..., "input": ..., "output": ...}')
    if error.validator == "type" and error.instance is None:
        remedy = "use an empty string or leave it out" if field == "input" else f"write the {field} as a text"
        return _finding(row, field, "type", f"{field} is null, not a text", remedy)
    if error.validator == "type":
        return _finding(row, field, "type", f"{field} is {_article(error.instance)}, not a text", "put it in quotes")
    return _finding(
        row, field, str(error.validator).lower(), f"breaks the schema at {error.json_path}", f"see {SCHEMA}"
    )


def _missing(error: ValidationError) -> str:
    """Return the key that a `required` error is about: the schema gives one error a missing key, in its order."""
    words = error.message
    return next((key for key in KEYS if words.startswith(repr(key))), words)


def _missing_finding(row: Row, field: str) -> Finding:
    near = next((key for key in row.value if key not in KEYS and key_meant(key, row.value) == field), None)
    if near is None:
        return _finding(row, field, "missing", f"{field} is missing", f'add the key "{field}" with a text')
    name = printable(near[:_KEY_WIDTH])
    remedy = f'did you mean "{field}"? rename the key "{name}"'
    return _finding(row, field, "misnamed_key", f'{field} is missing, but there is "{name}"', remedy)


def _misnamed(row: Row, told: set[str | None]) -> Iterator[Finding]:
    """Find unknown keys that are probably `input`, which would be lost without a word."""
    if not isinstance(row.value, dict):
        return
    for key in row.value:
        known = key_meant(key, row.value) if key not in KEYS else None
        if known is not None and known not in told:
            told.add(known)
            name = printable(key[:_KEY_WIDTH])
            remedy = f'did you mean "{known}"? rename the key, or leave it out'
            yield _finding(row, known, "misnamed_key", f'"{name}" is not a key of a record', remedy)


def _finding(row: Row, field: str | None, rule: str, message: str, remedy: str) -> Finding:
    return Finding(line=row.line, record=row.record, field=field, rule=rule, message=message, remedy=remedy)


def _article(value: object) -> str:
    if isinstance(value, str):
        return f"a text: {shown(value)}"
    if isinstance(value, bool):
        return f"true or false: {shown(value)}"
    if isinstance(value, int | float):
        return f"a number: {shown(value)}"
    return shown(value)
