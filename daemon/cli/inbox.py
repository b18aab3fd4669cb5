"""`init`, `check` and `submit`: create a workspace, validate a file, copy a file into the inbox."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from daemon.cli.output import drop_words, print_json, print_line, print_lines
from daemon.cli.workspace import JsonOption, OneTrackOption, config_path, load_settings
from daemon.inbox.answers.remarks import likely_metric, too_few, use_of_pinned
from daemon.inbox.quarantine import Ruling, rule, validation_options
from daemon.inbox.submit import copy_in
from daemon.settings.load import load
from daemon.settings.model import FILE_NAME, Settings
from daemon.state.layout import DATABASE_NAME, LOCK_NAME
from daemon.system.programs import is_closed, user
from daemon.views.drop_detail import drop_of_file
from daemon.views.drops import DropView
from daemon.views.overview import Overview
from pipeline.durable import sha256_file
from pipeline.errors import EXIT_BAD_DATA, DropforgeError
from pipeline.models.manifest import check_base
from pipeline.records.file_formats import HEAD_BYTES, foreign_format
from pipeline.records.special_tokens import FILES
from pipeline.records.validate import MOST_FINDINGS, MOST_KINDS, Validation, validate
from pipeline.words import count

#: Each commented line is valid if it alone is uncommented: after a section's heading come only its own settings.
_START_FILE = """\
# Settings of Dropforge; systemd/dropforge.toml of the project lists all of them with their defaults.

# Folder of the model that training starts from, in transformers' format.
{base_model}

# A run begins when no file has been dropped for so many seconds.
#run_after_quiet_seconds = 60

# "drop": a run follows a dropped file; "nightly": the schedule; "both": either.
#trigger = "drop"
#schedule = "0 2 * * *"
#timezone = "UTC"

# Another model line with its own data and champion; its inbox is inbox/support/.
#tracks.support.base_model = "path/to/another/model"

[train]
#format = "auto"        # "chat", "alpaca", or the chat template where the model has one
#learning_rate = 2e-4
#epochs = 1.0
#max_length = 1024      # tokens, question and answer together

[gate]
#on = "all"             # "pinned": judge on files in inbox/heldout/ only, of whoever owns this file (pinned_by)
"""


class BadDrop(DropforgeError):
    """The file would be rejected if it were dropped."""

    exit_code = EXIT_BAD_DATA


def init(
    *,
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where; made if it is not there.")] = Path(),
    base_model: Annotated[
        Path | None, typer.Option("--base-model", metavar="DIR", help="Folder of the model that training starts from.")
    ] = None,
) -> None:
    """
    Make a workspace: settings, inbox, state folder.

    Nothing that is there already is changed.
    """
    from daemon.inbox.watcher import make_inbox  # noqa: PLC0415 - `check` is quick

    if base_model is not None:
        check_base(base_model)
        # As the settings are read: without "..", and links stay.
        base_model = Path(os.path.abspath(base_model))  # noqa: PTH100
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(_START_FILE.format(base_model=_base_line(base_model)))
        print_line(f"made {path}")
    except FileExistsError:
        print_line(f"{path} is there already and stays as it is")
    settings = load(path)
    if base_model is not None and settings.base_model != str(base_model):
        raise typer.BadParameter(
            f"{path} is there already and names another base model: write {_base_line(base_model)} into it"
        )
    make_inbox(settings)
    settings.state_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    print_line(f"inbox {settings.inbox}, state {settings.state}")
    _print_next_steps(folder, settings)


def check(
    context: typer.Context,
    *,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to look at.")],
    track: OneTrackOption = "default",
    as_json: JsonOption = False,
) -> None:
    """
    Say what is wrong with a file, line by line.

    Tells what would become of it in the inbox; needs no daemon and changes nothing. Exit code 65 if it is bad.
    """
    settings = load(config_path(context))  # the defaults where there is no workspace: a file can be checked anywhere
    found = _look_at(file, settings, track, "train")
    validation, ruling = found.validation, found.ruling
    if as_json:
        same = None if found.known is None else found.known.id
        fields = {"same_as_drop": same, "unseen": found.unseen, **validation.model_dump(mode="json")}
        print_json(file=str(file), ok=validation.ok, accepted=ruling.accepted, **fields)
    else:
        _print_findings(file, validation, ruling)
        _print_remarks(found)
    if not ruling.accepted:
        raise typer.Exit(EXIT_BAD_DATA)


def submit(
    context: typer.Context,
    *,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to drop; it stays where it is.")],
    track: OneTrackOption = "default",
    heldout: Annotated[
        bool, typer.Option("--heldout", help="Pin it as held-out records, which judge and are never trained on.")
    ] = False,
) -> None:
    """
    Check a file and copy it into the inbox.

    It appears there whole or not at all, and replaces nothing. The daemon takes it when it runs.
    """
    settings = load_settings(context, as_owner=False)  # a file is its sender's
    # Everything is examined before copying: the daemon may take the copy in at once.
    found = _look_at(file, settings, track, "heldout" if heldout else "train")
    validation, ruling = found.validation, found.ruling
    if not ruling.accepted:
        _print_findings(file, validation, ruling)
        raise BadDrop(f"{file} was not submitted: {ruling.reason}", f"mend it, then look again: dropforge check {file}")
    target = copy_in(file, settings, track, heldout=heldout)
    print_line(f"copied {count(validation.rows, 'record')} to {target}")
    if not validation.ok:
        bad = count(validation.bad_rows, "of them is bad", "of them are bad")
        print_line(f"{bad} and will be set aside: dropforge check {file}")
    _print_remarks(found)
    print_line(_what_follows(settings, track, heldout=heldout, known=found.known is not None))
    if is_closed(lock := settings.state_folder / LOCK_NAME):
        print_line(f"cannot see whether the daemon runs: user {user()} may not read {lock}")
    elif not Overview(settings.state_folder).daemon().alive:
        print_line("the daemon is not running, so nothing happens until you start it: dropforge run")


def _base_line(base_model: Path | None) -> str:
    if base_model is None:
        return '#base_model = "path/to/a/model"'
    return f"base_model = {json.dumps(str(base_model.absolute()), ensure_ascii=False)}"


def _print_next_steps(folder: Path, settings: Settings) -> None:
    if any((parent / ".git").exists() for parent in (folder.absolute(), *folder.absolute().parents)):
        print_line("git: models and data do not belong in it; add to .gitignore: .dropforge/ inbox/")
    print_line()
    print_line("next:")
    if not settings.base_model:
        print_line(f"  name the base model in {folder / 'dropforge.toml'}")
    print_line("  dropforge run" if folder == Path() else f"  cd {folder} && dropforge run")
    print_line(f"  cp FILE.jsonl {settings.inbox}/")
    print_line("  dropforge status")


class _Found(NamedTuple):
    """The result of examining a file before it is dropped."""

    validation: Validation
    ruling: Ruling
    known: DropView | None
    """The drop of the track that brought the same content, if it is still of use."""
    unseen: list[str]
    """What this user may not look at, a line each: whoever may drop files need not see state and base model."""
    remarks: list[str]
    """What a receipt would warn of: what the track still lacks."""


def _look_at(file: Path, settings: Settings, track: str, role: str) -> _Found:
    """Validate a file and compare it with its track's drops. Raises `BadDrop` if its type, name or size is wrong."""
    own, database = settings.track(track), settings.state_folder / DATABASE_NAME
    _refuse(file, settings)
    unseen, known, remarks = [], None, list[str]()
    overview = None if is_closed(database) else Overview(settings.state_folder)
    if overview is None:
        unseen.append(f"cannot see whether the same content is there already: user {user()} may not read {database}")
    closed = next((path for name in FILES if is_closed(path := Path(own.base_model, name))), None)
    if closed is not None:
        unseen.append(f"special tokens are not looked for: user {user()} may not read {closed}")
    drops = [] if overview is None else overview.drops(track, "accepted")
    validation = validate(file, validation_options(settings, track))
    if overview is not None:
        known = drop_of_file(overview, track, role, sha256_file(file))
        fresh = 0 if known else validation.good_rows
        if role == "train" or own.gate.on == "pinned":
            rows = Counter({role: fresh})
            for drop in drops:
                rows[drop.role] += drop.rows
            said = too_few(track, own, overview.fixed(track).metric or likely_metric(file), rows)
            remarks = [f"with this file, {said}"] if said else []
    return _Found(validation, rule(validation, settings.intake), known, unseen, remarks)


def _refuse(file: Path, settings: Settings) -> None:
    if not file.is_file():
        raise BadDrop(
            f"{file} is not a file" if file.exists() else f"there is no file {file}",
            "name a .jsonl or .json file of records with instruction, input and output",
        )
    if not file.name.lower().endswith((".jsonl", ".json")):
        with file.open("rb") as opened:
            foreign = foreign_format(opened.read(HEAD_BYTES))
        if foreign is not None:
            raise BadDrop(f"{file} is {foreign.name}", foreign.remedy)
        raise BadDrop(
            f"the name of {file} does not end in .jsonl or .json", "if it holds records, rename it to end in .jsonl"
        )
    if file.stat().st_size > settings.intake.max_bytes:
        raise BadDrop(
            f"{file} has more than the {settings.intake.max_bytes:,} bytes that are allowed",
            "split it, or raise intake.max_bytes",
        )


def _print_remarks(found: _Found) -> None:
    if (known := found.known) is not None:
        print_line(
            f"the same content is there already, as drop {known.id} ({known.name}, {drop_words(known)}): a duplicate"
        )
    print_lines((*found.unseen, *found.remarks))


def _what_follows(settings: Settings, track: str, *, heldout: bool, known: bool) -> str:
    own = settings.track(track)
    settle = f"it is taken once it has not changed for {settings.intake.settle_seconds:g} s"
    if known:
        return f"{settle}, and begins no run"
    if heldout:
        from daemon.queue.evaluation_set import why_it_waits  # noqa: PLC0415 - `check` is quick

        why = why_it_waits(settings, track, os.geteuid(), 0)
        waits = f"then it waits for a person: dropforge drops accept DROP; {why}"
        return f"{settle}; {use_of_pinned(settings, track) if why is None else waits}"
    if own.trigger == "nightly":
        return f"{settle}; the next run of track {track} is by its schedule, {own.schedule} ({own.timezone})"
    return f"{settle}; a run of track {track} begins after {own.run_after_quiet_seconds:g} s without another drop"


def _print_findings(file: Path, validation: Validation, ruling: Ruling) -> None:
    """Print the file's errors and warnings, then whether the file would be accepted."""
    _print_faults(file, validation)
    for notice in validation.warnings:
        where = f"{file}:{notice.line}" if notice.line is not None else str(file)
        print_line(f"{where}: warning: {notice.message} ({count(notice.rows, 'record')})")
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
