"""`backup` and `restore`: a copy of the state folder, and putting it back."""

from pathlib import Path
from typing import Annotated

import typer

from daemon.cli.output import print_json, print_line
from daemon.cli.workspace import JsonOption, load_settings
from pipeline.errors import EXIT_FAILED

_MOST_NAMED = 20


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command()(backup)
    app.command()(restore)


def backup(
    context: typer.Context,
    *,
    target: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR]", help="A new folder, or one that is there; else backups/ in the state folder."),
    ] = None,
    models: Annotated[
        bool, typer.Option("--models", help="With the models of champion, previous and wins that wait.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """
    Back up database, drops and verdicts with their cards, also while the daemon works.

    The backup is a folder that is verified before it has its name. Models are left out without --models, checkpoints
    and logs always. Exit code 1 if a file that the database names was missing or had changed.
    """
    from daemon.storage.backup import make  # noqa: PLC0415 - a quick start for the other commands

    made = make(load_settings(context), target, with_models=models)
    manifest = made.manifest
    if as_json:
        print_json(backup=str(made.folder), **manifest.model_dump(mode="json", exclude={"files"}))
    else:
        size = sum(size for size, _ in manifest.files.values())
        print_line(f"backup: {made.folder} ({len(manifest.files)} files, {size:,} bytes, verified)")
        if manifest.champions and not models:
            print_line(f"without the models {', '.join(manifest.champions)}: --models takes them along")
        for name in manifest.missing[:_MOST_NAMED]:
            print_line(f"missing or changed: {name}")
        print_line(f"to put it back, with the daemon stopped: dropforge restore {made.folder}")
    if manifest.missing:
        raise typer.Exit(EXIT_FAILED)


def restore(
    context: typer.Context,
    *,
    source: Annotated[
        Path, typer.Argument(metavar="BACKUP", help="A folder that `backup` made, or one of its databases alone.")
    ],
    without_models: Annotated[
        bool, typer.Option("--without-models", help="Even if the model of a champion is lost.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """
    Put a backup in the place of the present database; no daemon may run.

    What it replaces goes to backups/replaced-… in the state folder. Runs that were not over at the time of the backup
    begin again; the champions' links follow at the daemon's next start.
    """
    from daemon.storage.restore import restore as put_back  # noqa: PLC0415 - a quick start for the other commands

    settings = load_settings(context)
    done = put_back(settings, source, without_models=without_models)
    if as_json:
        print_json(restored=str(source), replaced=str(done.replaced), lost=done.lost, missing=done.missing)
        return
    print_line(f"restored: {source}; what was there before is in {done.replaced}")
    for name in done.lost[:_MOST_NAMED]:
        print_line(f"accepted after the backup, so drop it again from {settings.inbox}/done: {name}")
    if len(done.lost) > _MOST_NAMED:
        print_line(f"and {len(done.lost) - _MOST_NAMED} more")
    for name in done.missing[:_MOST_NAMED]:
        print_line(f"missing or damaged: {name}")
