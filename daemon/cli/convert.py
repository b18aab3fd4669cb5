"""`convert`: make records of a table, to a file or into the inbox."""

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, NamedTuple

import typer

from daemon.cli.inbox import say_copied
from daemon.cli.output import print_line, print_lines
from daemon.cli.workspace import OneTrackOption, command, config_path, exit_on_sigterm, load_settings
from daemon.inbox.quarantine import validation_options
from daemon.inbox.submit import copy_in
from daemon.inbox.tables import conversion
from daemon.inbox.tables.conversion import Choice, Conversion
from daemon.inbox.tables.reading import Table, open_table
from daemon.settings.load import load
from daemon.settings.model import Settings
from pipeline.errors import EXIT_BAD_DATA, DropforgeError
from pipeline.records.records import SELECTED
from pipeline.words import shell_path

#: Most characters of a record that are shown.
_WIDTH = 500
#: Most values of a column of judgements by which rows are offered.
_MOST_VALUES = 4
MapOption = Annotated[
    list[str] | None, typer.Option("--map", metavar="KEY=COLUMN", help="The column of a record's key; repeatable.")
]


def convert(  # noqa: PLR0913 - its options
    context: typer.Context,
    *,
    file: Annotated[Path, typer.Argument(metavar="FILE|FOLDER", help="A table, or what datasets saved.")],
    output: Annotated[Path | None, typer.Option("-o", metavar="FILE", help="Write the records to a new file.")] = None,
    drop: Annotated[bool, typer.Option("--drop", help="Copy the records into the inbox.")] = False,
    maps: MapOption = None,
    tag: Annotated[
        list[str] | None, typer.Option("--tag", metavar="TAG", help="A tag for each record; repeatable.")
    ] = None,
    only: Annotated[
        str | None, typer.Option("--only", metavar="COLUMN=TEXT", help="Only rows with this text in this column.")
    ] = None,
    track: OneTrackOption = "default",
) -> None:
    """
    Make records of a table: CSV, TSV, Parquet, gzip.

    Also of JSON Lines with other keys, and of a folder that datasets saved. Shows which column is read as what, three
    records, and how many rows are lost and why; writes nothing without -o and --drop. Columns of a known form
    (instruction and output, prompt and completion, question and answer) need no --map. All cells are text. Of answers
    that somebody corrected or rated it asks which are to be learned. Exit code 65 if there are no records or, with -o
    or --drop, if the columns are only guessed or it asks.
    """
    if output is not None:
        _require_new(output, drop=drop)
    given = {key: column for key, _, column in (text.partition("=") for text in maps or ())}
    asked = _Asked(context, file, given, tuple(tag or ()), _pair(only), track)
    settings = load_settings(context, as_owner=False) if drop else load(config_path(context))
    beside = None if output is None else output.absolute().parent
    exit_on_sigterm()
    with TemporaryDirectory(prefix=".dropforge-convert-", dir=beside) as name:
        made = Path(name, conversion.new_name(file.absolute().name or "table"))
        choice, result, choices = _converted(asked, made, settings)
        again = asked.command({} if choice.known and not given else choice.columns)
        is_written = drop or output is not None
        if choices:
            print_line(
                f"which answers are to be learned? Tagged {SELECTED}, since a model chose them, they never judge:"
            )
            print_lines(f"  {words} {_to(output if is_written else Path(made.name))}" for words in choices)
        if choices and is_written:
            message = "nothing is written: it is not said which answers are to be learned"
            raise DropforgeError(message, "run one of the commands above", EXIT_BAD_DATA)
        if not is_written:
            print_line("nothing is written yet" if choices else "nothing is written yet; next:")
            print_lines([f"  {again} {_to(to)}" for to in (Path(made.name), None) if not choices])
        elif not choice.known:
            message = "nothing is written: the columns are guessed from their names"
            raise DropforgeError(message, f"if they are right: {again} {_to(output)}", EXIT_BAD_DATA)
        elif output is None:
            say_copied(context, settings, copy_in(made, settings, track, heldout=False), result.kept)
        else:
            made.chmod(0o644)
            made.rename(output)
            words = shlex.join(["submit", *["--track", track] * (track != "default")])
            print_line(f"wrote {output}; next: {command(context)} {words} {shell_path(output)}")


class _Asked(NamedTuple):
    """The arguments of the command that say what is converted."""

    context: typer.Context
    file: Path
    given: Mapping[str, str]
    """Key -> column, as `conversion.choose` takes it."""
    tags: tuple[str, ...]
    only: tuple[str, str] | None
    track: str

    def command(self, columns: Mapping[str, str]) -> str:
        """Return the shell command that converts the file with these columns by key, without -o and --drop."""
        pairs = [f"{key}={column}" for key, column in columns.items()]
        pairs += [f"{key}=" for key, column in self.given.items() if not column]
        options = [word for pair in pairs for word in ("--map", pair)]
        options += [word for tag in self.tags for word in ("--tag", tag)]
        options += ["--only", "=".join(self.only)] if self.only else []
        options += ["--track", self.track] * (self.track != "default")
        return " ".join([command(self.context), "convert", shell_path(self.file), *map(shlex.quote, options)])

    def choices(self, choice: Choice, table: Table) -> Iterator[str]:
        """
        Yield the commands for the answers that may be meant: those of a column, or its rows with one judgement.

        A model may have written or chosen these answers, so they get the tag `selected`.
        """
        tags = self.tags if SELECTED in self.tags else (*self.tags, SELECTED)
        judged = [(choice.judgement, value) for value in _values(table, choice.judgement)] if choice.judgement else []
        for answer in choice.answers:
            # A verdict is on the model's answer, not on its correction.
            for only in [self.only, *([] if conversion.is_persons(answer) or self.only else judged)]:
                yield self._replace(tags=tags, only=only).command({**choice.columns, "output": answer})


def _values(table: Table, column: str) -> list[str]:
    """Return a column's values, the most frequent first; none if there are more than `_MOST_VALUES`."""
    values: Counter[str] = Counter()
    for _line, cells in table.read([column]):
        if not isinstance(cells, str) and len(values) <= _MOST_VALUES:
            values[conversion.cell_text(cells[0])] += 1
    return [value for value, _ in values.most_common()] if len(values) <= _MOST_VALUES else []


def _pair(text: str | None) -> tuple[str, str] | None:
    """Return the two parts of COLUMN=TEXT. Raises `BadParameter` if it has no such form."""
    if text is None:
        return None
    column, sign, value = text.partition("=")
    if not sign:
        raise typer.BadParameter(f"--only is COLUMN=TEXT, not {text}")
    return column, value


def _to(output: Path | None) -> str:
    return "--drop" if output is None else shlex.join(["-o", str(output)])


def _require_new(output: Path, *, drop: bool) -> None:
    """Raise `BadParameter` if `drop`, if `output` exists or is no .jsonl or .json, or if its folder is missing."""
    faults = {
        "-o and --drop exclude each other": drop,
        f"{output} is there already": output.exists(),
        f"{output} does not end in .jsonl": output.suffix.lower() not in {".jsonl", ".json"},
        f"there is no folder {output.parent}": not output.parent.is_dir(),
    }
    for fault in (words for words, is_true in faults.items() if is_true):
        raise typer.BadParameter(fault)


def _converted(asked: _Asked, made: Path, settings: Settings) -> tuple[Choice, Conversion, list[str]]:
    """
    Convert a table to the file `made`, and print which column is read as what, three records and the losses.

    Also returns the commands among which the user has to choose (`_Asked.choices`). Raises `DropforgeError` if the file
    cannot be read as a table, an unknown key or column is named, no column is known for the question or the answer,
    there are no records, or they exceed intake.max_bytes.
    """
    file = asked.file
    if not file.exists():
        raise DropforgeError(f"there is no file {file}", "name a table: CSV, TSV, Parquet, gzip", EXIT_BAD_DATA)
    most = settings.intake.max_bytes
    table = open_table(file, str(file), made.parent, most)
    if asked.only is not None:
        conversion.require_column(asked.only[0], table.columns)
    choice = conversion.choose(table.columns, asked.given)
    _print_columns(file, table, choice)
    options = validation_options(settings, asked.track, str(file))
    result = conversion.convert(table, choice.columns, made, options, most, asked.tags, asked.only)
    _print_records(file, table, result)
    return choice, result, list(asked.choices(choice, table))


def _print_columns(file: Path, table: Table, choice: Choice) -> None:
    """Print which column is read as what. Raises `DropforgeError` if none is known for the question or the answer."""
    print_line(f"{file}: {'; '.join(filter(None, (table.kind, choice.doubt)))}")
    print_lines(f"  {key}: column {column}" for key, column in choice.columns.items())
    print_lines([f"  {choice.ignored}"] if choice.unused else [])
    if choice.missing:
        hint = f"name it: {' '.join(f'--map {key}=COLUMN' for key in choice.missing)}"
        raise DropforgeError(f"{file}: no column is known as {' or '.join(choice.missing)}", hint, EXIT_BAD_DATA)


def _print_records(file: Path, table: Table, result: Conversion) -> None:
    """Print the first records, each cut after 500 characters, and the losses. Raises `DropforgeError` if no records."""
    texts = [json.dumps(record, ensure_ascii=False) for record in result.first]
    shown = [text if len(text) <= _WIDTH else f"{text[:_WIDTH]}…" for text in texts]
    print_lines([*([f"  {table.note}"] if table.note else []), *shown, *result.losses, f"{file}: {result.words}"])
    if not result.kept:
        hint = "mend what is said above, or name other columns: --map output=COLUMN"
        raise DropforgeError(f"{file} gave no records", hint, EXIT_BAD_DATA)
