"""`init`, `check` and `submit`: create a workspace, validate a file, copy a file into the inbox."""

import json
import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from daemon.cli.output import print_json, print_line, print_lines
from daemon.cli.status import EXIT_UNAVAILABLE
from daemon.cli.workspace import (
    JsonOption,
    OneTrackOption,
    command,
    config_path,
    exit_on_sigterm,
    load_settings,
    open_overview,
    open_writer,
    word_of_user,
)
from daemon.inbox.quarantine import Ruling, examine, foresee, one_finding, rule, validation_options
from daemon.inbox.safe_copy import too_large
from daemon.inbox.submit import copy_in
from daemon.settings.load import load
from daemon.settings.model import FILE_NAME, Settings
from daemon.views import confirmations
from daemon.views.overview import Overview
from pipeline.config import TrainConfig
from pipeline.errors import EXIT_BAD_DATA, DropforgeError
from pipeline.models.manifest import check_base
from pipeline.records.validate import MOST_FINDINGS, MOST_KINDS, Validation, account_words
from pipeline.words import count, printable, shell_path

_LOOK_SECONDS = 0.5
#: Of fewer rows, chance decides what is held out.
_LEAST_ROWS = 20
_START_FILE = """\
# Settings of Dropforge. `dropforge config` lists all of them, systemd/dropforge.toml describes them.

# Folder of the model that training starts from, in transformers' format.
{base_model}
"""


def init(
    *,
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where; made if it is not there.")] = Path(),
    base_model: Annotated[
        Path | None, typer.Option("--base-model", metavar="DIR", help="Folder of the model that training starts from.")
    ] = None,
) -> None:
    """
    Make a workspace: settings, inbox, state folder.

    Files that are there already stay as they are. It is an error if the base model cannot be trained, or if settings
    that are there already do not name it.
    """
    from daemon.inbox.watcher import make_inbox  # noqa: PLC0415 - `check` is quick

    settings = _settings_of_new(folder, base_model)
    make_inbox(settings)
    settings.state_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    steps = [
        *([] if settings.base_model else [f"name the base model in {folder / FILE_NAME}"]),
        "dropforge run" if folder == Path() else f"cd {shell_path(folder)} && dropforge run",
        f"cp FILE.jsonl {shell_path(settings.inbox)}/",
        "dropforge status",
    ]
    print_lines([f"inbox {settings.inbox}, state {settings.state}", "", "next:", *(f"  {step}" for step in steps)])


def _settings_of_new(folder: Path, base_model: Path | None) -> Settings:
    """
    Make `folder` and write its settings unless they exist, print which, and return the loaded settings.

    Raises `DropforgeError` if `base_model` cannot be trained, `BadParameter` if existing settings do not name it, and
    `SettingsError` if these cannot be used.
    """
    from daemon.champions.smoke_test import try_adapter  # noqa: PLC0415 - `check` is quick
    from daemon.views.preflight import adapter_words  # noqa: PLC0415

    path, line = folder / FILE_NAME, '#base_model = "path/to/a/model"'
    if base_model is not None:
        train = load(path).train if path.exists() else TrainConfig()
        check_base(base_model, train.format)
        print_lines(f"base model {base_model}: {words}" for words in adapter_words(try_adapter(str(base_model), train)))
        # As the settings are read: without "..", and links stay.
        base_model = Path(os.path.abspath(base_model))  # noqa: PTH100
        line = f"base_model = {json.dumps(str(base_model), ensure_ascii=False)}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(_START_FILE.format(base_model=line))
        print_line(f"made {path}")
    except FileExistsError:
        print_line(f"{path} is there already and stays as it is")
    settings = load(path)
    if base_model is not None and settings.base_model != str(base_model):
        raise typer.BadParameter(f"{path} is there already and names another base model: write {line} into it")
    return settings


def check(
    context: typer.Context,
    *,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to look at.")],
    track: OneTrackOption = "default",
    show: Annotated[
        int, typer.Option("--show", metavar="N", min=0, max=20, help="Show the first N records as the model sees them.")
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """
    Say what is wrong with a file, line by line.

    Tells whether the inbox would reject it, and what a run would leave out; needs no daemon and changes nothing. Equal
    errors are printed once, with their number; --json has each of the first 1,000. Exit code 65 if the file would be
    rejected.
    """
    settings = load(config_path(context))  # the defaults where there is no workspace: a file can be checked anywhere
    validation, ruling = _look_at(file, settings, track)
    shown = _shown(file, settings, track, show) if show else []
    foreseen = []
    if ruling.accepted and validation.good_rows >= _LEAST_ROWS:
        exit_on_sigterm()
        foreseen = foresee(file, settings, track)
    if ruling.accepted:
        foreseen += _lacking(file, settings, track, validation.good_rows - validation.selected)
    if as_json:
        fields = validation.model_dump(mode="json")
        print_json(file=str(file), ok=validation.ok, accepted=ruling.accepted, **fields, foreseen=foreseen, shown=shown)
    else:
        _print_shown(file, shown)
        _print_findings(file, validation, ruling, foreseen)
    if not ruling.accepted:
        raise typer.Exit(EXIT_BAD_DATA)
    if not as_json:
        to = "" if track == "default" else f" --track {track}"
        print_line(f"next: {command(context)} submit {shell_path(file)}{to}")


def _lacking(file: Path, settings: Settings, track: str, rows: int) -> list[str]:
    """
    Return [sentence] if the track still has too few rows for a first verdict with this file, else [].

    `rows` is the number of the file's rows that can be held out. Also [] if this user cannot read the state folder.
    """
    with suppress(DropforgeError, OSError):  # who may drop a file need not see the state folder
        lacks = Overview.of(settings).missing_rows(settings, track, (file, rows))
        counted = "" if settings.track(track).gate.on == "pinned" else "with this file, "
        return [f"{counted}{words}" for words in lacks.values()]
    return []


def _shown(file: Path, settings: Settings, track: str, most: int) -> list[dict[str, Any]]:
    from daemon.champions.smoke_test import shown_records  # noqa: PLC0415 - `check` is quick

    return shown_records(file, settings, track, most)


def _print_shown(file: Path, shown: Sequence[dict[str, Any]]) -> None:
    for record in shown:
        print_line(f"{file}:{record['line']}: {record['words']}, from ⟦ to ⟧:")
        print_lines([*f"{record['prompt']}⟦{record['learned']}⟧".split("\n"), ""])


def submit(
    context: typer.Context,
    *,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to drop; it stays where it is.")],
    track: OneTrackOption = "default",
    heldout: Annotated[
        bool, typer.Option("--heldout", help="Pin it as held-out records, which judge and are never trained on.")
    ] = False,
    new_answers: Annotated[
        bool, typer.Option("--new-answers", help="Let its answers to old questions replace the old ones.")
    ] = False,
) -> None:
    """
    Check a file and copy it into the inbox.

    It appears there whole or not at all, and replaces nothing. The daemon takes it when it runs. Exit code 65, with
    nothing copied, if it would be rejected. --new-answers, for the owner of the settings, waits until it is taken.
    """
    newest = 0
    if new_answers:
        open_writer(context)  # who may not accept learns it before anything is copied
        newest = max((drop.id for drop in open_overview(context).drops(most=1)), default=0)
    settings = load_settings(context, as_owner=False)  # a file is its sender's
    validation, ruling = _look_at(file, settings, track, heldout=heldout)
    if not ruling.accepted:
        hint = f"mend it, then look again: dropforge check {shell_path(file)}"
        if validation.rows:
            _print_findings(file, validation, ruling, ())
        else:  # it is no file of records
            hint = validation.findings[0].remedy
        raise DropforgeError(f"{file} was not submitted: {ruling.reason}", hint, EXIT_BAD_DATA)
    target = copy_in(file, settings, track, heldout=heldout)
    say_copied(context, settings, target, validation.rows)
    if not validation.ok:
        bad = count(validation.bad_rows, "of them is bad", "of them are bad")
        print_line(f"{bad} and will be set aside: dropforge check {shell_path(file)}")
    if new_answers:
        _accept_answers(context, target, track, newest)


def say_copied(context: typer.Context, settings: Settings, target: Path, rows: int) -> None:
    """Print that `rows` rows were copied to `target`, when they are taken, next commands, and if no daemon runs."""
    same = command(context)
    print_line(f"copied {count(rows, 'row')} to {target}")
    print_line(f"it is taken once it has not changed for {settings.intake.settle_seconds:g} s")
    print_lines(["next:", f"  {same} status", f"  {same} wait {shell_path(target.name)}"])
    with suppress(DropforgeError):  # who may drop a file need not see the state folder
        if not Overview.of(settings).daemon().alive:
            print_line(f"the daemon is not running, so nothing happens until you start it: {same} run")


def _accept_answers(context: typer.Context, file: Path, track: str, newest: int) -> None:
    """
    Wait until the daemon has taken the file from the inbox, accept its drop's new answers, and print what follows.

    For a duplicate the original drop's are accepted. Raises `DropforgeError` if no daemon runs while the file waits, at
    first or for 60 s, if the file went without a drop after drop `newest`, and as `accept_answers`, if rejected too.
    """
    from daemon.cli.wait import GONE_SECONDS  # noqa: PLC0415 - a quick start
    from daemon.queue.drops import accept_answers  # noqa: PLC0415

    overview, settings, alive_at = open_overview(context), load_settings(context), -math.inf
    while file.exists():
        if overview.daemon().alive:
            alive_at = time.monotonic()
        elif time.monotonic() - alive_at > GONE_SECONDS:
            hint = "start it: dropforge run; once it has taken the file: dropforge drops accept DROP --answers"
            message = f"its new answers are not accepted yet: no daemon runs that takes {file}"
            raise DropforgeError(message, hint, EXIT_UNAVAILABLE)
        time.sleep(_LOOK_SECONDS)
    (drop,) = overview.drops(track, most=1, name=printable(file.name)) or (None,)
    if drop is None or drop.id <= newest:
        raise DropforgeError(f"{file} is gone, and the daemon has not taken it", "submit it again")
    row = accept_answers(open_writer(context), drop.duplicate_of or drop.id, word_of_user(), settings)
    print_lines(confirmations.accepted_answers(overview, settings, row))


def _look_at(file: Path, settings: Settings, track: str, *, heldout: bool = False) -> tuple[Validation, Ruling]:
    """Validate a file for a track and rule whether it is accepted. Raises `DropforgeError` if it is no regular file."""
    if not file.is_file():
        words = f"{file} is not a file" if file.exists() else f"there is no file {file}"
        hint = "name a .jsonl or .json file of records: instruction, input, output"
        if file.is_dir():
            hint += f"; if datasets saved this folder: dropforge convert {shell_path(file)}"
        raise DropforgeError(words, hint, EXIT_BAD_DATA)
    refused = too_large(file.stat(), settings.intake.max_bytes)
    options = validation_options(settings, track, str(file), heldout=heldout)
    validation = one_finding(*refused) if refused else examine(file, options)
    return validation, rule(validation, settings.intake)


def _print_findings(file: Path, validation: Validation, ruling: Ruling, foreseen: Sequence[str]) -> None:
    """Print the file's errors, its warnings and the sentences `foreseen`, then whether the file would be accepted."""
    _print_faults(file, validation)
    for notice in validation.warnings:
        where = f"{file}:{notice.line}" if notice.line is not None else str(file)
        print_line(f"{where}: warning: {notice.message} ({count(notice.rows, 'row')})")
    print_lines(f"{file}: warning: {words}" for words in foreseen)
    verdict = "it would be accepted"
    if not validation.ok:
        verdict = "it would be "
        verdict += "accepted without them" if ruling.accepted else "rejected"
        verdict += f": {ruling.ceiling}" if ruling.ceiling else ""
    stopped = ", read no further" if validation.stopped else ""
    account = f"{account_words(validation.counts)}{stopped}; " if validation.rows else ""
    print_line(f"{file}: {account}{verdict}")


def _print_faults(file: Path, validation: Validation) -> None:
    kinds = validation.kinds
    for kind in kinds[:MOST_KINDS]:
        print_line(f"{file}{kind.where}: {kind.message}{kind.often}; {kind.remedy}")
    kept = len(validation.findings)
    if len(kinds) > MOST_KINDS or kept < validation.findings_total:
        shown = sum(kind.rows for kind in kinds[:MOST_KINDS])
        held = "all of them" if kept == validation.findings_total else f"the first {MOST_FINDINGS:,}"
        more = f"{validation.findings_total - shown:,} more"
        print_line(f"... and {more}; {held}: dropforge check --json {shell_path(file)}")
