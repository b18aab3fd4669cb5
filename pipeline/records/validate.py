"""
Validate a file against `schemas/alpaca-record.schema.json`, with line, error and remedy for each bad row.

Used by the intake and by `dropforge check FILE`; streaming, so memory does not grow with the file. Nearly all rows of
nearly all files are recognised as good by their bytes (`fast_path`); jsonschema finds what is wrong with the others.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, reduce
from itertools import islice
from operator import getitem, itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.artifacts import Frozen
from pipeline.models.special_tokens import token_pattern
from pipeline.models.template import fold
from pipeline.records.fast_path import KEYS, MOST_KEYS, PlainRows
from pipeline.records.file_formats import name_file, other_format
from pipeline.records.heldout import normalise
from pipeline.records.records import (
    LABELS,
    LONGEST_TAG,
    MOST_LINE_BYTES,
    MOST_TAGS,
    FileFinding,
    Finding,
    Record,
    Row,
    misnamed_key,
    read_records,
    read_rows,
    record_of,
    scan_rows,
    text_faults,
)
from pipeline.words import count, printable, shown

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import ValidationError

SCHEMA = "alpaca-record.schema.json"
MOST_FINDINGS = 1000
#: Most rows whose prompts are compared.
MOST_COMPARED = 10_000
#: Most kinds of findings that are shown or stored.
MOST_KINDS = 20
_MOST_NOTICES = 100
#: Most prompts, and texts of an unknown key, that are told apart.
_MOST_HASHES = 1000
#: So many times fewer prompts than rows are found where the question stands under a key that is not read.
_FEWER = 10
#: The rules whose remedies may have a command on the file, and no text of its rows.
_WITH_COMMAND = {"format", "encoding", "json"}
_KEY_WIDTH = 60


@dataclass(frozen=True, slots=True)
class Options:
    """The limits and rules by which a file is validated."""

    max_line_bytes: int = MOST_LINE_BYTES
    """Longest line in bytes."""
    special_tokens: tuple[str, ...] = ()
    """Texts that the base model's tokenizer reads as special tokens."""
    path: str = "FILE"
    """Path of the file as its owner knows it, for the commands of remedies."""
    most_bad_rows: int = 0
    """Most bad rows of an accepted file: after `MOST_FINDINGS`, a file with more of them is read no further."""

    @property
    def special_pattern(self) -> re.Pattern[str] | None:
        """A pattern of the special tokens, compiled anew at each access; `None` without any."""
        pattern = token_pattern(self.special_tokens)
        return re.compile(pattern) if pattern else None


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
    bare: str
    """The message without the text of the file that it quotes."""


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
        """The `findings`, at most `MOST_FINDINGS`, by message and remedy: the rarest kind first, so that it is seen."""
        equal: dict[tuple[str, str], list[Finding]] = {}
        for finding in self.findings:
            equal.setdefault((finding.message, finding.remedy), []).append(finding)
        kinds = [(len(all_), all_[0]) for all_ in equal.values()]
        return tuple(
            FindingKind(first.message, first.remedy, rows, first.line, first.field, first.bare or first.message)
            for rows, first in sorted(kinds, key=itemgetter(0))
        )

    @property
    def reason(self) -> str:
        """The first finding and, if there are several, their number; the number of records if there are none."""
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

    Reading stops early once there are `MOST_FINDINGS` findings and more bad rows than the options accept. A file
    without records has a finding, too. In a file that may be accepted, repeated prompts are looked for
    in the first `MOST_COMPARED` rows.
    """
    tally = _Tally(options)
    for row in scan_rows(path, options.max_line_bytes, PlainRows(options.special_tokens)):
        if tally.is_full:
            return tally.result(stopped=True)
        tally.add(row)
    found = tally.result()
    if not found.complete or found.bad_rows > options.most_bad_rows:
        return found
    rows = islice(read_records(path, options.max_line_bytes), MOST_COMPARED)
    repeated = _repeated((row for row in rows if isinstance(row, Record)), whole=found.rows <= MOST_COMPARED)
    return found.model_copy(update={"warnings": (*found.warnings, *repeated)})


def _repeated(records: Iterable[Record], *, whole: bool) -> Iterator[Notice]:
    """Yield what `prepare` makes of rows with the same prompt, equal or different in their answers."""
    answers: dict[int, set[int]] = {}
    """Hash of each prompt -> hashes of its answers."""
    equal: list[int] = []
    different: list[int] = []
    for record in records:
        earlier = answers.setdefault(hash(normalise(fold(record.instruction, record.input))), set())
        answer = hash(record.output)
        if answer in earlier:
            equal.append(record.line)
        elif earlier:
            different.append(record.line)
        earlier.add(answer)
    among = "" if whole else f" (of the first {MOST_COMPARED:,} rows)"
    if equal:
        message = f"the same prompt and answer as in an earlier row{among}: each pair is used once"
        yield Notice(kind="repeated", key=None, rows=len(equal), line=equal[0], message=message)
    if different:
        prompts = [earlier for earlier in answers.values() if len(earlier) > 1]
        message = f"{count(len(prompts), 'prompt has', 'prompts have')} different answers in this file{among}: "
        message += "all of them are trained on, and where the prompt is held out, each of them counts as right"
        rows = sum(map(len, prompts))
        yield Notice(kind="several_answers", key=None, rows=rows, line=different[0], message=message)


def good_rows(path: Path, options: Options) -> Iterator[Row]:
    """Yield the rows of a file, to its end, that are good by the rules of `validate`. Raises `OSError` only."""
    special = options.special_pattern
    for row in read_rows(path, options.max_line_bytes):
        if isinstance(row, Row) and not row_findings(row, record_of(row), special):
            yield row


def row_findings(row: Row, record: Record | None, special: re.Pattern[str] | None) -> list[Finding]:
    """Return the findings about a row, none if it is good; `record` is the result of `record_of` for it."""
    found = schema_findings(row) if record is None else []
    if not (found and found[0].rule == "format"):
        found += [_finding(row, *fault) for fault in text_faults(row.value, special)]
    return found


def schema_findings(row: Row) -> list[Finding]:
    """Return a row's findings by the schema and for misnamed keys, or only that of another format or too many keys."""
    value = row.value
    if not isinstance(value, dict):
        return [_worded(row, error) for error in _schema().iter_errors(value)]
    if len(value) > MOST_KEYS:
        message, remedy = f"the record has more than {MOST_KEYS:,} keys", "keep instruction, input and output alone"
        return [_finding(row, None, "maxproperties", message, remedy)]
    if (other := other_format(value)) is not None:
        remedy = "write each question as instruction and its answer as output, one record a line"
        return [_finding(row, other[0], "format", f"the row is {other[1]}", remedy)]
    known = {key: value[key] for key in (*KEYS, *LABELS) if key in value}
    if isinstance(value.get("tags"), list):
        # One too many is enough to be told of.
        known["tags"] = value["tags"][: MOST_TAGS + 1]
    found = [_worded(row, error) for error in _schema().iter_errors(known)]
    if (near := misnamed_key(value, "input")) is not None:
        name = printable(near[:_KEY_WIDTH])
        remedy = 'did you mean "input"? rename the key, or leave it out'
        found.append(_finding(row, "input", "misnamed_key", f'"{name}" is not a key of a record', remedy))
    return found


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


@dataclass
class _Unknown:
    """The rows with one unknown key: the first line, how many, and hashes of texts of several words."""

    line: int
    rows: int = 0
    texts: set[int] = field(default_factory=set)

    def add(self, value: object) -> None:
        self.rows += 1
        if isinstance(value, str) and len(self.texts) < _MOST_HASHES and len(value.split(maxsplit=1)) > 1:
            self.texts.add(hash(value))


class _Tally:
    """Counts a file's rows, findings and warnings, and makes the `Validation`."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._special = options.special_pattern
        self._rows = 0
        self._good = 0
        self._complete = True
        self._findings: list[Finding] = []
        self._rules: Counter[str] = Counter()
        self._unknown: dict[str, _Unknown] = {}
        self._prompts: set[int] = set()
        """Hashes of the prompts of rows with unknown keys, up to `_MOST_HASHES`."""

    @property
    def is_full(self) -> bool:
        """Whether the file is refused in any case and no further finding would be kept."""
        return self._rules.total() >= MOST_FINDINGS and self._rows - self._good > self._options.most_bad_rows

    def add(self, row: Row | Finding | int) -> None:
        if isinstance(row, int):
            self._rows += row
            self._good += row
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
        for key, found in self._unknown.items():
            self._refuse_lost_prompts(key, found)
        notices = tuple(
            Notice(kind="unknown_key", key=key, rows=use.rows, line=use.line, message=f"the key {key!r} is not used")
            for key, use in self._unknown.items()
        )
        return Validation(
            rows=self._rows,
            good_rows=self._good,
            findings_total=self._rules.total(),
            findings=tuple(self._findings),
            rules=dict(self._rules.most_common()),
            warnings=notices,
            complete=self._complete and not stopped,
            stopped=stopped,
        )

    def _add_row(self, row: Row) -> None:
        record = record_of(row)
        found = row_findings(row, record, self._special)
        self._note(found)
        if found:
            return
        # Warnings are for good rows only.
        self._good += 1
        if record is None or not record.unknown:
            return
        if len(self._prompts) < _MOST_HASHES:
            self._prompts.add(hash((record.instruction, record.input)))
        for key in record.unknown:
            name = printable(key[:_KEY_WIDTH])
            known = name in self._unknown or len(self._unknown) < _MOST_NOTICES
            self._unknown.setdefault(name if known else "…", _Unknown(row.line)).add(row.value[key])

    def _refuse_lost_prompts(self, key: str, found: "_Unknown") -> None:
        """Add a finding about the file if the texts of an unknown key, not its prompts, tell most rows apart."""
        rows, prompts = found.rows, len(self._prompts)
        if prompts * _FEWER > rows or rows * 2 < self._good or len(found.texts) < min(rows, _MOST_HASHES) / 2:
            return
        name = json.dumps(key, ensure_ascii=False)
        few = f"{rows:,} rows have only {count(prompts, 'prompt')} without"
        message, bare = f"{few} the key {name}, which is not read", f"{few} a key that is not read"
        remedy = 'rename this key to "input"; if it is no part of the question, leave it out'
        self.add(
            FileFinding(line=found.line, field="input", rule="misnamed_key", message=message, remedy=remedy, bare=bare)
        )

    def _note(self, found: list[Finding]) -> None:
        self._rules.update(finding.rule for finding in found)
        for finding in found[: MOST_FINDINGS - len(self._findings)]:
            remedy = name_file(finding.remedy, self._options.path) if finding.rule in _WITH_COMMAND else finding.remedy
            self._findings.append(finding.model_copy(update={"remedy": remedy}))


def _worded(row: Row, error: "ValidationError") -> Finding:
    """Convert a jsonschema error to a finding with a message of its own, since jsonschema's repeats the value."""
    field = str(error.path[0]) if error.path else None
    value = reduce(getitem, error.absolute_path, row.value)
    if error.validator == "required":
        # The schema gives an error for each missing key, which its message begins with.
        return _missing_finding(row, next(key for key in KEYS if error.message.startswith(repr(key))))
    if field == "tags":
        allowed = f"at most {MOST_TAGS} texts of 1 to {LONGEST_TAG} characters"
        message = f"tags are not {allowed}, none blank or with control characters"
        return _finding(row, field, str(error.validator).lower(), message, 'write "tags": ["one", "two"]')
    if error.validator == "pattern":
        return _finding(row, field, "blank", f"{field} is blank", f"write the {field}, or leave the row out")
    if field is None:
        remedy = 'write {"instruction": ..., "input": ..., "output": ...}'
        return _type_finding(row, None, "a record is an object, this is {}", remedy, value)
    if value is None and field in {"input", "group"}:
        remedy = "use an empty string or leave it out"
    elif value is None or isinstance(value, list | dict):
        remedy = f"write the {field} as one text"
    else:
        remedy = "put it in quotes"
    return _type_finding(row, field, f"{field} is {{}}, not a text", remedy, value)


def _missing_finding(row: Row, field: str) -> Finding:
    near = misnamed_key(row.value, field)
    if near is None:
        return _finding(row, field, "missing", f"{field} is missing", f'add the key "{field}" with a text')
    name = printable(near[:_KEY_WIDTH])
    remedy = f'did you mean "{field}"? rename the key "{name}"'
    return _finding(row, field, "misnamed_key", f'{field} is missing, but there is "{name}"', remedy)


def _finding(row: Row, field: str | None, rule: str, message: str, remedy: str) -> Finding:
    return Finding(line=row.line, field=field, rule=rule, message=message, remedy=remedy)


def _type_finding(row: Row, field: str | None, message: str, remedy: str, value: object) -> Finding:
    """Return the finding about a value of the wrong type, which `message` has a place for."""
    kinds = {str: "a text", bool: "true or false", int: "a number", float: "a number"}
    kind = kinds.get(type(value))
    if kind is None:
        return _finding(row, field, "type", message.format(shown(value)), remedy)
    bare = message.format(kind)
    finding = _finding(row, field, "type", message.format(f"{kind}: {shown(value)}"), remedy)
    return finding.model_copy(update={"bare": bare})
