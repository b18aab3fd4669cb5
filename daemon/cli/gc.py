"""`gc`: give back what nothing needs any more."""

from typing import Annotated

import typer

from daemon.cli.output import print_json, print_line, print_table
from daemon.cli.workspace import JsonOption, load_settings, open_writer

DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed, and why.")]


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command()(gc)


def gc(context: typer.Context, *, dry_run: DryRunOption = False, as_json: JsonOption = False) -> None:
    """
    Remove what nothing needs any more: models that lost, leftovers of ended runs, old cached predictions.

    [gc] in the settings says what is kept. The champion, the one before it, base models, drops, and everything of a run
    that is not over are kept in any case. Safe beside the daemon, which does the same after each run.
    """
    from daemon.storage.disk import size_words  # noqa: PLC0415
    from daemon.storage.gc import collect  # noqa: PLC0415
    from daemon.system.clock import now_ms  # noqa: PLC0415 - a quick start

    settings = load_settings(context)
    found = collect(open_writer(context), settings, now_ms(), dry_run=dry_run)
    if as_json:
        print_json(**found.model_dump(mode="json"))
        return
    if found.items:
        print_table(("SIZE", "WHAT", "WHY"), [(size_words(one.bytes), one.path, one.why) for one in found.items])
    verb = "would be given back" if dry_run else "given back"
    print_line(f"{size_words(found.bytes)} {verb}, by {len(found.items)} files and folders")
