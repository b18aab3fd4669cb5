"""How a person is told what is wrong with a file: alike findings once, rare ones first, with the command that helps."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from daemon.cli.output import print_line
from daemon.inbox.quarantine import Ruling
from pipeline.records.file_formats import command
from pipeline.records.records import Row, nearest_key, read_rows
from pipeline.records.validate import MOST_FINDINGS, MOST_KINDS, Validation
from pipeline.words import count

#: Readings of a file whose keys are other ones that are offered.
_MOST_READINGS = 3
#: Keys that hold answers, besides those that mean `output`.
_ANSWERS = frozenset({"solution", "query", "sql", "summary", "label"})
#: Keys that need no quotes in jq, nor in a shell.
_PLAIN_KEY = re.compile(r"[A-Za-z_]\w{0,60}", re.ASCII)


def print_findings(file: Path, validation: Validation, ruling: Ruling, odd: Sequence[str] = ()) -> None:
    """Print what is wrong with `file`, what is odd in it, further lines of that, and what would become of it."""
    _print_faults(file, validation)
    for notice in validation.warnings:
        where = f"{file}:{notice.line}" if notice.line is not None else str(file)
        print_line(f"{where}: warning: {notice.message} ({count(notice.rows, 'record')})")
    for line in odd:
        print_line(line)
    verdict = "it would be accepted"
    if not validation.ok:
        verdict = f"{count(validation.bad_rows, 'is bad', 'are bad')}: it would be "
        verdict += "accepted without them" if ruling.accepted else "rejected"
        verdict += f": {ruling.ceiling}" if ruling.ceiling else ""
    stopped = ", read no further" if validation.stopped else ""
    print_line(f"{file}: {count(validation.rows, 'record')}{stopped}; {verdict}")


def _print_faults(file: Path, validation: Validation) -> None:
    kinds = validation.kinds
    for found in kinds[:MOST_KINDS]:
        where = f"{file}:{found.line}" if found.line is not None else str(file)
        times = f" (in {count(found.rows, 'row')}, first here)" if found.rows > 1 else ""
        print_line(f"{where}: {found.message}{times}; {found.remedy}")
    kept = len(validation.findings)
    if len(kinds) > MOST_KINDS or kept < validation.findings_total:
        shown = sum(found.rows for found in kinds[:MOST_KINDS])
        held = "all of them" if kept == validation.findings_total else f"the first {MOST_FINDINGS:,}"
        print_line(f"... and {validation.findings_total - shown:,} more; {held}: dropforge check --json {file}")
    everywhere = [found for found in kinds if found.rows == validation.rows]
    missing = {found.field for found in everywhere if found.message.startswith(f"{found.field} is missing")}
    if missing & {"instruction", "output"}:
        for reading in _readings(file):
            print_line(reading)


def _readings(file: Path) -> Iterator[str]:
    """Yield a complete command for each way to read the rows of a file that has other keys, by its first row."""
    row = next((row.value for row in read_rows(file) if isinstance(row, Row)), None)
    values = row if isinstance(row, dict) else {}
    texts = [key for key, value in values.items() if isinstance(value, str) and _PLAIN_KEY.fullmatch(key)]
    meant = {key: nearest_key(key) for key in texts}
    questions = ["instruction", "question", *(key for key in texts if meant[key] == "instruction")]
    asked = next((key for key in questions if key in texts), None)
    answers = [key for key in texts if meant[key] == "output"] or [key for key in texts if key.casefold() in _ANSWERS]
    if asked is None or not answers:
        return
    given = next((f', input: (.{key} // "")' for key in texts if meant[key] == "input"), "")
    for answer in answers[:_MOST_READINGS]:
        made = command(f"{{instruction: .{asked}{given}, output: .{answer}}}")
        yield f'if "{answer}" is the answer to "{asked}", this converts it; other keys are lost: {made}'
