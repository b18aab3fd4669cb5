"""`convert`: make records of a table, to a file or into the inbox."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

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
from pipeline.words import shell_path

#: Most characters of a record that are shown.
_WIDTH = 500
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
    track: OneTrackOption = "default",
) -> None:
    """
    Make records of a table: CSV, TSV, Parquet, gzip.

    Also of JSON Lines with other keys, and of a folder that datasets saved. Shows which column is read as what, three
    records, and how many rows are lost and why; writes nothing without -o and --drop. Columns of a known form
    (instruction and output, prompt and completion, question and answer) need no --map. All cells are text. Exit code 65
    if there are no records or, with -o or --drop, if the columns are only guessed.
    """
    if output is not None:
        _require_new(output, drop=drop)
    given = {key: column for key, _, column in (text.partition("=") for text in maps or ())}
    settings = load_settings(context, as_owner=False) if drop else load(config_path(context))
    beside = None if output is None else output.absolute().parent
    exit_on_sigterm()
    with TemporaryDirectory(prefix=".dropforge-convert-", dir=beside) as name:
        made = Path(name, conversion.new_name(file.absolute().name or "table"))
        choice, result = _converted(file, made, given, settings, track)
        again = _command(context, file, choice, given, track)
        if output is None and not drop:
            print_line("nothing is written yet; next:")
            print_lines([f"  {again} -o {shlex.quote(made.name)}", f"  {again} --drop"])
        elif not choice.known:
            hint = f"if they are right: {again} {'--drop' if drop else shlex.join(['-o', str(output)])}"
            raise DropforgeError("nothing is written: the columns are guessed from their names", hint, EXIT_BAD_DATA)
        elif output is None:
            say_copied(context, settings, copy_in(made, settings, track, heldout=False), result.kept)
        else:
            made.chmod(0o644)
            made.rename(output)
            words = shlex.join(["submit", *["--track", track] * (track != "default")])
            print_line(f"wrote {output}; next: {command(context)} {words} {shell_path(output)}")


def _command(context: typer.Context, file: Path, choice: Choice, given: Mapping[str, str], track: str) -> str:
    """Return the shell command that converts `file` with this choice of columns, without -o and --drop."""
    pairs = [f"{key}={column}" for key, column in choice.columns.items() if given or not choice.known]
    pairs += [f"{key}=" for key, column in given.items() if not column]
    options = [word for pair in pairs for word in ("--map", pair)] + ["--track", track] * (track != "default")
    return " ".join([command(context), "convert", shell_path(file), *map(shlex.quote, options)])


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


def _converted(
    file: Path, made: Path, given: Mapping[str, str], settings: Settings, track: str
) -> tuple[Choice, Conversion]:
    """
    Convert the table `file` to the file `made`, and print which column is read as what, three records and the losses.

    Raises `DropforgeError` if the file cannot be read as a table, `given` names an unknown key or column, no column is
    known for the question or the answer, there are no records, or they exceed intake.max_bytes.
    """
    if not file.exists():
        raise DropforgeError(f"there is no file {file}", "name a table: CSV, TSV, Parquet, gzip", EXIT_BAD_DATA)
    table = open_table(file, str(file), made.parent, settings.intake.max_bytes)
    choice = conversion.choose(table.columns, given)
    _print_columns(file, table, choice)
    options = validation_options(settings, track, str(file))
    result = conversion.convert(table, choice.columns, made, options, settings.intake.max_bytes)
    _print_records(file, table, result)
    return choice, result


def _print_columns(file: Path, table: Table, choice: Choice) -> None:
    """Print which column is read as what. Raises `DropforgeError` if none is known for the question or the answer."""
    print_line(f"{file}: {table.kind}{'' if choice.known else '; the columns are guessed from their names'}")
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
