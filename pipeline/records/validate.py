"""
Validate a file against `schemas/alpaca-record.schema.json`, with line, error and remedy for each bad row.

Used by the intake and by `dropforge check FILE`; streaming, so memory does not grow with the file. Nearly all rows of
nearly all files are recognised as good by their bytes (`fast_path`); jsonschema finds what is wrong with the others.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, reduce
from itertools import islice
from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.artifacts import Frozen
from pipeline.records.fast_path import KEYS, MOST_KEYS, PlainRows
from pipeline.records.file_formats import other_format
from pipeline.records.records import (
    LABELS,
    LONGEST_TAG,
    MOST_LINE_BYTES,
    MOST_TAGS,
    FileFinding,
    Finding,
    PlainRun,
    Record,
    Row,
    key_meant,
    many_keys,
    read_rows,
    record_of,
    scan_rows,
)
from pipeline.records.text_checks import ODDITIES, TextRules
from pipeline.words import count, printable, shown

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import ValidationError

SCHEMA = "alpaca-record.schema.json"
MOST_FINDINGS = 1000
#: Most kinds of findings that are shown or stored.
MOST_KINDS = 20
_MOST_NOTICES = 100
_MOST_HINTS = 100
_KEY_WIDTH = 60


@dataclass(frozen=True, slots=True)
class Options:
    """The limits and rules by which a file is validated."""

    max_line_bytes: int = MOST_LINE_BYTES
    """Longest line in bytes."""
    special_tokens: tuple[str, ...] = ()
    """Texts that the base model's tokenizer reads as special tokens."""
    most_bad_rows: int = 0
    """Most bad rows of an accepted file: after `MOST_FINDINGS`, a file with more of them is read no further."""

    @property
    def text_rules(self) -> TextRules:
        """The rules for texts, compiled."""
        return TextRules(self.special_tokens)


class Notice(Frozen):
    """A warning and the number of rows with it; it does not reject the file."""

    kind: str
    key: str | None
    rows: int
    line: int | None = None
    """The first line that it is about."""
    message: str


class FindingKind(NamedTuple):
    """Findings of one or more rows with the same message and remedy."""

    message: str
    remedy: str
    rows: int
    line: int | None
    """Of the first."""
    field: str | None


class Validation(Frozen):
    """The result of validating a file."""

    rows: int
    """Records found, good or not; where reading stopped early, up to there."""
    good_rows: int
    findings_total: int
    findings: tuple[Finding, ...]
    """The first `MOST_FINDINGS`."""
    rules: dict[str, int]
    """How many of all findings broke each rule, the most frequent first."""
    warnings: tuple[Notice, ...]
    complete: bool = True
    """Whether the file was read to its end, and has records: only then can it be accepted without its bad rows."""
    stopped: bool = False
    """Whether reading stopped early because there were too many findings."""

    @property
    def bad_rows(self) -> int:
        """Number of records with a finding."""
        return self.rows - self.good_rows

    @property
    def ok(self) -> bool:
        """Whether there are no findings."""
        return self.findings_total == 0

    @property
    def kinds(self) -> tuple[FindingKind, ...]:
        """The findings grouped by message and remedy, rarest first, so that errors in every line do not hide them."""
        equal: dict[tuple[str, str], list[Finding]] = {}
        for finding in self.findings:
            equal.setdefault((finding.message, finding.remedy), []).append(finding)
        found = sorted(equal.items(), key=lambda kind: len(kind[1]))
        return tuple(FindingKind(*words, len(all_), all_[0].line, all_[0].field) for words, all_ in found)

    @property
    def reason(self) -> str:
        """A sentence with the number of findings and the first one; without findings the number of records."""
        if self.ok:
            return f"{count(self.good_rows, 'record')}, nothing to object to"
        first = self.findings[0]
        where = "" if first.line is None else f"line {first.line:,}: "
        many = "" if self.findings_total == 1 else f"{self.findings_total:,} findings; the first: "
        if self.stopped:
            many = f"stopped after {many}"
        return f"{many}{where}{first.message}"


def validate(path: Path, options: Options) -> Validation:
    """
    Validate the file at `path` and return the result. Raises `OSError` only.

    Reading stops early once there are `MOST_FINDINGS` findings and more bad rows than the options accept.
    """
    tally = _Tally(options)
    for row in scan_rows(path, options.max_line_bytes, PlainRows(options.special_tokens)):
        if tally.is_full:
            return tally.result(stopped=True)
        tally.add(row)
    return tally.result()


def good_rows(path: Path, options: Options) -> Iterator[Row]:
    """Yield the rows of a file that `validate` counts as good. Raises `OSError` only."""
    texts = options.text_rules
    for row in read_rows(path, options.max_line_bytes):
        if isinstance(row, Row) and not row_findings(row, record_of(row), texts):
            yield row


def row_findings(row: Row, record: Record | None, texts: TextRules) -> list[Finding]:
    """Return the findings about a row; `record` is the result of `record_of` for it."""
    found = schema_findings(row) if record is None else []
    if not (found and found[0].rule == "format"):
        found += [_finding(row, *fault) for fault in texts.faults(row.value)]
    return found


def schema_findings(row: Row) -> list[Finding]:
    """Return the findings about one row from the schema and the checks for other formats and misnamed keys."""
    value = row.value
    if isinstance(value, dict):
        if len(value) > MOST_KEYS:
            return [many_keys(row.line)]
        if (other := other_format(value)) is not None:
            remedy = "write each question as instruction and its answer as output, one record a line"
            return [_finding(row, other[0], "format", f"the row is {other[1]}", remedy)]
    found = [_worded_label(row, error) or _worded(row, error) for error in _schema().iter_errors(outline(value))]
    tags = value.get("tags") if isinstance(value, dict) else None
    if isinstance(tags, list) and len(tags) > MOST_TAGS:
        message = f"tags are {len(tags):,}, at most {MOST_TAGS} are read"
        found.append(_finding(row, "tags", "maxitems", message, "leave some out"))
    return found + list(_misnamed(row, {finding.field for finding in found}))


def outline(value: Any) -> Any:
    """Return a small row that breaks the schema as `value` does (except too many tags): each error keeps its row."""
    if not isinstance(value, dict):
        return _small(value)
    small = {key: _small(value[key]) for key in (*KEYS, *LABELS) if key in value}
    for key in KEYS:
        if isinstance(value.get(key), str):
            small[key] = value[key].strip()[:1]
    tags = value.get("tags")
    if isinstance(tags, list) and len(tags) > MOST_TAGS:
        del small["tags"]
    elif isinstance(tags, list):
        small["tags"] = [_small(tag) for tag in tags]
    return small


def _small(value: Any) -> Any:
    if isinstance(value, str):
        return value[: LONGEST_TAG + 1]
    return type(value)() if isinstance(value, list | dict) else value


@cache
def _schema() -> "Draft202012Validator":
    """Return the schema's validator, built once; its registry is empty, so that nothing is ever fetched."""
    from importlib import resources  # noqa: PLC0415 - a quick start: most files have no row that it is needed for

    from jsonschema import Draft202012Validator  # noqa: PLC0415
    from referencing import Registry  # noqa: PLC0415

    text = resources.files("schemas").joinpath(SCHEMA).read_text(encoding="utf-8")
    schema = json.loads(text)
    Draft202012Validator.check_schema(schema)
    registry: Registry[Any] = Registry()
    return Draft202012Validator(schema, registry=registry)


class _Tally:
    """Counts a file's rows, findings and warnings, and makes the `Validation`."""

    def __init__(self, options: Options) -> None:
        self._texts = options.text_rules
        self._most_bad_rows = options.most_bad_rows
        self._rows = 0
        self._good = 0
        self._complete = True
        self._total = 0
        self._findings: list[Finding] = []
        self._rules: Counter[str] = Counter()
        self._notices: dict[tuple[str, str], list[int]] = {}
        """Rows and first line, by kind and key."""

    @property
    def is_full(self) -> bool:
        """Whether the file is refused in any case and no further finding would be kept."""
        return self._total >= MOST_FINDINGS and self._rows - self._good > self._most_bad_rows

    def add(self, row: Row | Finding | PlainRun) -> None:
        if isinstance(row, PlainRun):
            self._rows += row.count
            self._good += row.count
        elif isinstance(row, Row):
            self._rows += 1
            self._add_row(row)
        else:
            self._complete = self._complete and not isinstance(row, FileFinding)
            self._rows += not isinstance(row, FileFinding)
            self._note([row])

    def result(self, *, stopped: bool = False) -> Validation:
        if self._rows == 0 and self._complete:
            remedy = "write one JSON object a line, with instruction and output, and drop it again"
            self._note([Finding(line=None, rule="empty", message="the file has no records", remedy=remedy)])
            self._complete = False
        notices = tuple(_notice(*place, *count) for place, count in self._notices.items())
        return Validation(
            rows=self._rows,
            good_rows=self._good,
            findings_total=self._total,
            findings=tuple(self._findings),
            rules=dict(self._rules.most_common()),
            warnings=notices,
            complete=self._complete and not stopped,
            stopped=stopped,
        )

    def _add_row(self, row: Row) -> None:
        record = record_of(row)
        clean = record is not None and self._texts.clean(record.instruction, record.input, record.output)
        found = [] if clean else row_findings(row, record, self._texts)
        self._note(found)
        if found:
            return
        # Warnings are for good rows only.
        self._good += 1
        for key in record.unknown if record is not None else ():
            self._count("unknown_key", printable(key[:_KEY_WIDTH]), row.line)
        for kind, field in () if clean else self._texts.oddities(row.value):
            self._count(kind, field, row.line)

    def _note(self, found: list[Finding]) -> None:
        self._total += len(found)
        self._rules.update(finding.rule for finding in found)
        self._findings.extend(found[: MOST_FINDINGS - len(self._findings)])

    def _count(self, kind: str, key: str, line: int) -> None:
        known = (kind, key) in self._notices or len(self._notices) < _MOST_NOTICES or kind != "unknown_key"
        count = self._notices.setdefault((kind, key if known else "…"), [0, line])
        count[0] += 1


def _notice(kind: str, key: str, rows: int, line: int) -> Notice:
    words = f"the key {key!r} is not used" if kind == "unknown_key" else ODDITIES[kind].format(key)
    return Notice(kind=kind, key=key, rows=rows, line=line, message=words)


def _worded(row: Row, error: "ValidationError") -> Finding:
    """Convert a jsonschema error to a finding with a message of its own, since jsonschema's repeats the value."""
    field = str(error.path[0]) if error.path else None
    if error.validator == "required":
        # The schema gives an error for each missing key, which its message begins with.
        return _missing_finding(row, next(key for key in KEYS if error.message.startswith(repr(key))))
    if error.validator == "pattern":
        return _finding(row, field, "blank", f"{field} is blank", f"write the {field}, or leave the row out")
    if field is None:
        message = f"a record is an object, this is {_article(row.value)}"
        return _finding(row, None, "type", message, 'write {"instruction": ..., "input": ..., "output": ...}')
    value = reduce(getitem, error.absolute_path, row.value)
    if value is None and field == "input":
        remedy = "use an empty string or leave it out"
    elif value is None or isinstance(value, list | dict):
        remedy = f"write the {field} as one text"
    else:
        remedy = "put it in quotes"
    return _finding(row, field, "type", f"{field} is {_article(value)}, not a text", remedy)


def _worded_label(row: Row, error: "ValidationError") -> Finding | None:
    """Convert a jsonschema error about tags or category to a finding; `None` for an error about another key."""
    field = error.path[0] if error.path else None
    if field not in LABELS:
        return None
    value = reduce(getitem, error.absolute_path, row.value)
    one = "category" if field == "category" else "a tag"
    if error.validator == "maxLength":
        message = f"{one} has {len(value):,} characters, at most {LONGEST_TAG} are read"
        remedy = "shorten it: it names a slice of the report"
    elif error.validator == "pattern" and error.validator_value == r"\S":
        message, remedy = f"{one} is blank", "leave it out"
    elif error.validator == "pattern":
        message, remedy = f"{one} holds a control character", "take it out"
    else:
        wanted = "a list of texts" if field == "tags" and len(error.path) == 1 else "a text"
        subject = "tags is" if wanted == "a list of texts" else f"{one} is"
        message, remedy = (
            f"{subject} {_article(value)}, not {wanted}",
            'write "tags": ["one", "two"], or "category": "one"',
        )
    return _finding(row, str(field), str(error.validator).lower(), message, remedy)


def _missing_finding(row: Row, field: str) -> Finding:
    others = islice((key for key in row.value if key not in KEYS), _MOST_HINTS)
    near = next((key for key in others if key_meant(key, row.value) == field), None)
    if near is None:
        return _finding(row, field, "missing", f"{field} is missing", f'add the key "{field}" with a text')
    name = printable(near[:_KEY_WIDTH])
    remedy = f'did you mean "{field}"? rename the key "{name}"'
    return _finding(row, field, "misnamed_key", f'{field} is missing, but there is "{name}"', remedy)


def _misnamed(row: Row, told: set[str | None]) -> Iterator[Finding]:
    """Yield a finding per unknown key that probably stands for a missing key, unless that is in `told`."""
    if not isinstance(row.value, dict):
        return
    # In a row that is bad anyway only the first keys are checked; in other rows all, so that no input is lost.
    for key in islice(row.value, _MOST_HINTS if told else None):
        known = key_meant(key, row.value) if key not in KEYS else None
        if known is not None and known not in told:
            told.add(known)
            name = printable(key[:_KEY_WIDTH])
            remedy = f'did you mean "{known}"? rename the key, or leave it out'
            yield _finding(row, known, "misnamed_key", f'"{name}" is not a key of a record', remedy)


def _finding(row: Row, field: str | None, rule: str, message: str, remedy: str) -> Finding:
    return Finding(line=row.line, field=field, rule=rule, message=message, remedy=remedy)


def _article(value: object) -> str:
    if isinstance(value, str):
        return f"a text: {shown(value)}"
    if isinstance(value, bool):
        return f"true or false: {shown(value)}"
    if isinstance(value, int | float):
        return f"a number: {shown(value)}"
    return shown(value)
