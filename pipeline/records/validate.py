"""
Validate a file against the schema of its form, with line, turn, error and remedy for each bad row.

Used by the intake and by `dropforge check FILE`; streaming, so memory does not grow with the file. Nearly all rows of
nearly all files are recognised as good by their bytes (`fast_path`); jsonschema finds what is wrong with the others.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from pipeline.artifacts import Frozen
from pipeline.models.template import fold
from pipeline.models.tokenizer_files import token_pattern
from pipeline.records.conversation import FORMS
from pipeline.records.fast_path import PlainRows
from pipeline.records.file_formats import name_file
from pipeline.records.heldout import normalise
from pipeline.records.records import (
    MOST_LINE_BYTES,
    SELECTED,
    FileFinding,
    Finding,
    Record,
    Row,
    read_records,
    read_rows,
    records_of,
    scan_rows,
)
from pipeline.records.row_findings import KEY_WIDTH, row_findings
from pipeline.words import count, ignored_words, listed, printable

MOST_FINDINGS = 1000
#: Most rows whose prompts are compared.
MOST_COMPARED = 10_000
#: Most kinds of findings that are shown or stored.
MOST_KINDS = 20
#: Most unknown keys that are told apart.
_MOST_UNKNOWN = 100
#: Most prompts, and texts of an unknown key, that are told apart.
_MOST_HASHES = 1000
#: So many times fewer prompts than rows are found where the question stands under a key that is not read.
_FEWER = 10
#: The rules whose remedies may have a command on the file, and no text of its rows.
_WITH_COMMAND = {"format", "encoding", "json"}


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
    is_heldout: bool = False
    """Whether its records are to be held out: then no row may have the tag `selected`."""

    @property
    def special_pattern(self) -> re.Pattern[str] | None:
        """A pattern of the special tokens, compiled anew at each access; `None` without any."""
        pattern = token_pattern(self.special_tokens)
        return re.compile(pattern) if pattern else None


class Notice(Frozen):
    """A warning and the number of rows with it; it does not reject the file."""

    kind: str
    rows: int
    line: int | None = None
    """The first line that it is about."""
    message: str
    keys: tuple[str, ...] = ()
    """The keys that it is about."""


class FindingKind(NamedTuple):
    """Findings of one or more rows with the same message and remedy."""

    message: str
    remedy: str
    rows: int
    """How many rows; where turns are meant, how many turns."""
    line: int | None
    """Of the first."""
    field: str | None
    turn: int | None
    bare: str
    """The message without the text of the file that it quotes."""

    @property
    def where(self) -> str:
        """Line and turn of the first, to follow the file's name, as `:12, turn 3`; empty without a line."""
        line = "" if self.line is None else f":{self.line}"
        return line if self.turn is None else f"{line}, turn {self.turn:,}"

    @property
    def often(self) -> str:
        """How many there are, as ` (in 2 rows, first here)`; empty for one."""
        noun = "row" if self.turn is None else "turn"
        return f" (in {count(self.rows, noun)}, first here)" if self.rows > 1 else ""


class Validation(Frozen):
    """The result of validating a file."""

    rows: int
    """Rows found, good or not; where reading stopped early, up to there."""
    good_rows: int
    answers: int = 0
    """Those of the good rows: one each, but for conversations."""
    context: int = 0
    """Of the `answers`, those of the weight 0, which only stand before later questions."""
    duplicates: int = 0
    """Of the `answers`, those that repeat an earlier one to the same prompt, of the first `MOST_COMPARED`."""
    selected: int = 0
    """Of the good rows, those with the tag `selected`, which are never held out."""
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
    def records(self) -> int:
        """Number of answers to learn or to judge by, each once."""
        return self.answers - self.context - self.duplicates

    @property
    def counts(self) -> dict[str, int]:
        """What `account_words` says."""
        return self.model_dump(include={"rows", "good_rows", "answers", "context", "duplicates", "selected"})

    @property
    def bad_rows(self) -> int:
        """Number of rows with a finding."""
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
            FindingKind(
                first.message, first.remedy, rows, first.line, first.field, first.turn, first.bare or first.message
            )
            for rows, first in sorted(kinds, key=itemgetter(0))
        )

    @property
    def reason(self) -> str:
        """The first finding with its line, how many there are and whether reading stopped; without any, the records."""
        if self.ok:
            return f"{count(self.records, 'record')}, nothing to object to"
        first = self.findings[0]
        turn = "" if first.turn is None else f", turn {first.turn:,}"
        where = "" if first.line is None else f"line {first.line:,}{turn}: "
        many = "" if self.findings_total == 1 else f"{self.findings_total:,} findings; the first: "
        if self.stopped:
            many = f"stopped after {many}"
        return f"{many}{where}{first.message}"


def account_words(counts: Mapping[str, int]) -> str:
    """
    Return the account of `Validation.counts` without zeros: `10 rows and 8 further answers = 17 records + 1 bad row`.

    After it, in brackets, how many rows have the tag `selected`.
    """
    bad, further = counts["rows"] - counts["good_rows"], counts["answers"] - counts["good_rows"]
    context, duplicates, selected = counts["context"], counts["duplicates"], counts["selected"]
    given = [count(counts["rows"], "row"), *([count(further, "further answer")] if further else [])]
    used = [
        count(counts["answers"] - context - duplicates, "record"),
        *([count(bad, "bad row")] if bad else []),
        *([count(context, "answer of the weight 0", "answers of the weight 0")] if context else []),
        *([count(duplicates, "duplicate")] if duplicates else []),
    ]
    tagged = f" ({count(selected, 'row')} tagged {SELECTED}: never held out)" if selected else ""
    return f"{' and '.join(given)} = {' + '.join(used)}{tagged}"


def validate(path: Path, options: Options) -> Validation:
    """
    Validate the file at `path` and return the result. Raises `OSError` only.

    Reading stops early once there are `MOST_FINDINGS` findings and more bad rows than the options accept. Findings
    about the whole file: no rows, rows of two forms, rows that differ mainly by a key that is not read, rows that are
    `selected` in a held-out file. In a file that may be accepted, repeated prompts are looked for in the first
    `MOST_COMPARED` records.
    """
    tally = _Tally(options)
    for row in scan_rows(path, options.max_line_bytes, PlainRows(options.special_tokens)):
        if tally.is_full:
            return tally.result(stopped=True)
        tally.add(row)
    validation = tally.result()
    if not validation.complete or validation.bad_rows > options.most_bad_rows:
        return validation
    rows = islice(read_records(path, options.max_line_bytes), MOST_COMPARED)
    whole = validation.answers <= MOST_COMPARED
    repeated = tuple(_repeated((row for row in rows if isinstance(row, Record)), whole=whole))
    duplicates = sum(notice.rows for notice in repeated if notice.kind == "repeated")
    warnings = (*validation.warnings, *repeated)
    return validation.model_copy(update={"warnings": warnings, "duplicates": duplicates})


def _repeated(records: Iterable[Record], *, whole: bool) -> Iterator[Notice]:
    """Yield a warning for repeated answers to a prompt, one for different ones; `whole`: no record is left out."""
    answers: dict[int, set[int]] = {}
    """Hash of each prompt -> hashes of its answers."""
    equal: list[int] = []
    different: list[int] = []
    for record in records:
        earlier = answers.setdefault(hash((record.turns, normalise(fold(record.instruction, record.input)))), set())
        answer = hash(record.output)
        if answer in earlier:
            equal.append(record.line)
        elif earlier:
            different.append(record.line)
        earlier.add(answer)
    among = "" if whole else f" (of the first {MOST_COMPARED:,} records)"
    if equal:
        message = f"the same prompt and answer as in an earlier row{among}: each pair is used once"
        yield Notice(kind="repeated", rows=len(equal), line=equal[0], message=message)
    if different:
        prompts = [earlier for earlier in answers.values() if len(earlier) > 1]
        message = f"{count(len(prompts), 'prompt has', 'prompts have')} different answers in this file{among}: "
        message += "all of them are trained on, and where the prompt is held out, each of them counts as right"
        rows = sum(map(len, prompts))
        yield Notice(kind="several_answers", rows=rows, line=different[0], message=message)


def good_rows(path: Path, options: Options) -> Iterator[Row]:
    """Yield the rows of a file, to its end, that are good by the rules of `validate`. Raises `OSError` only."""
    special = options.special_pattern
    for row in read_rows(path, options.max_line_bytes):
        if isinstance(row, Row) and not row_findings(row, records_of(row), special):
            yield row


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
        self._answers = self._context = self._selected = 0
        self._first_selected: int | None = None
        self._forms: dict[str, int | None] = {}
        """The keys of `FORMS` that rows have, with the first line; `None` where that is not known."""
        self._complete = True
        self._findings: list[Finding] = []
        self._rules: Counter[str] = Counter()
        self._unknown: dict[str, _Unknown] = {}
        self._ignoring = 0
        """Good rows with unknown keys."""
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
            self._answers += row
            self._forms.setdefault("instruction", None)
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
        if len(self._forms) > 1:
            self._refuse_two_forms()
        for key, unknown in self._unknown.items():
            self._refuse_lost_prompts(key, unknown)
        if self._selected and self._options.is_heldout:
            self._refuse_selected()
        return Validation(
            rows=self._rows,
            good_rows=self._good,
            answers=self._answers,
            context=self._context,
            selected=self._selected,
            findings_total=self._rules.total(),
            findings=tuple(self._findings),
            rules=dict(self._rules.most_common()),
            warnings=(self._ignored(),) if self._unknown else (),
            complete=self._complete and not stopped,
            stopped=stopped,
        )

    def _add_row(self, row: Row) -> None:
        records = records_of(row)
        for key in FORMS:
            if isinstance(row.value, dict) and key in row.value:
                self._forms.setdefault(key, row.line)
        findings = row_findings(row, records, self._special)
        self._note(findings)
        if findings:
            return
        # Warnings are for good rows only.
        self._good += 1
        self._answers += len(records)
        self._context += sum(not record.learned for record in records)
        record = records[-1]
        if SELECTED in record.tags:
            self._selected += 1
            self._first_selected = self._first_selected or row.line
        if not record.unknown:
            return
        self._ignoring += 1
        if len(self._prompts) < _MOST_HASHES:
            self._prompts.add(hash((record.turns, record.instruction, record.input)))
        for key in record.unknown:
            name = printable(key[:KEY_WIDTH])
            known = name in self._unknown or len(self._unknown) < _MOST_UNKNOWN
            self._unknown.setdefault(name if known else "…", _Unknown(row.line)).add(row.value.get(key))

    def _ignored(self) -> Notice:
        line, keys = min(use.line for use in self._unknown.values()), tuple(self._unknown)
        return Notice(kind="ignored_keys", rows=self._ignoring, line=line, message=ignored_words(keys), keys=keys)

    def _refuse_two_forms(self) -> None:
        """Add a finding about the whole file, whose rows have keys of several forms."""
        names = [
            f'{FORMS[key].name} ("{key}"{"" if line is None else f", line {line:,}"})'
            for key, line in sorted(self._forms.items(), key=lambda item: (item[1] or 0, item[0]))
        ]
        message = f"the file has rows of {len(names)} forms: {listed(names)}"
        remedy = "drop a file for each form, or rename the key that is not meant"
        self.add(FileFinding(line=None, rule="form", message=message, remedy=remedy))

    def _refuse_selected(self) -> None:
        message = f"{count(self._selected, 'row has', 'rows have')} the tag {SELECTED}, and the file is to be held out"
        remedy = "rows that were chosen by a model's answers judge nothing: drop them as a file to train on"
        self.add(FileFinding(line=self._first_selected, field="tags", rule=SELECTED, message=message, remedy=remedy))

    def _refuse_lost_prompts(self, key: str, use: "_Unknown") -> None:
        """Add a finding about the file if most rows differ by an unknown key's texts, and hardly by their prompts."""
        rows, prompts = use.rows, len(self._prompts)
        if prompts * _FEWER > rows or rows * 2 < self._good or len(use.texts) < min(rows, _MOST_HASHES) / 2:
            return
        name = json.dumps(key, ensure_ascii=False)
        few = f"{rows:,} rows have only {count(prompts, 'prompt')} without"
        message, bare = f"{few} the key {name}, which is not read", f"{few} a key that is not read"
        remedy = 'rename this key to "input"; if it is no part of the question, leave it out'
        self.add(
            FileFinding(line=use.line, field="input", rule="misnamed_key", message=message, remedy=remedy, bare=bare)
        )

    def _note(self, findings: list[Finding]) -> None:
        self._rules.update(finding.rule for finding in findings)
        for finding in findings[: MOST_FINDINGS - len(self._findings)]:
            remedy = name_file(finding.remedy, self._options.path) if finding.rule in _WITH_COMMAND else finding.remedy
            self._findings.append(finding.model_copy(update={"remedy": remedy}))
