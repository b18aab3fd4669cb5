"""Maintenance of a workspace: `attention`, `gc`, `backup`, `restore`, `doctor`, `messages`, `metrics`."""

from pathlib import Path
from typing import Annotated

import typer

from daemon.champions.promotion import mend_links, tracks_with_champion
from daemon.cli.output import print_json, print_line, print_table
from daemon.cli.workspace import (
    JsonOption,
    chosen_file,
    command,
    load_settings,
    open_overview,
    open_writer,
    word_of_user,
)
from daemon.inbox.answers import rejected
from daemon.messages import addresses
from daemon.metrics import metrics_text
from daemon.storage.backup import make
from daemon.storage.gc import Collected, collect
from daemon.storage.restore import restore as put_back
from daemon.system.clock import now_ms
from daemon.views import attention as needs
from daemon.views import confirmations
from daemon.views.doctor import examine
from pipeline.errors import EXIT_FAILED, EXIT_OK, DropforgeError
from pipeline.words import count, local, shell_path, size_words

_MOST_NAMED = 20

DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed, and why.")]


def attention(
    context: typer.Context,
    *,
    dismiss: Annotated[
        list[str] | None, typer.Option("--dismiss", metavar="KEY", help="Leave it out until it happens again.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """
    List what needs a person, the most urgent first, each with its key.

    With --dismiss the entries of these keys are left out until they happen again, and each is confirmed in place of the
    list; --json lists the entries that remain. A lasting condition, such as a pause, is listed again after a day.
    """
    settings, overview = load_settings(context), open_overview(context)
    for key in dismiss or ():
        left_out = needs.dismiss(open_writer(context), settings, overview, key, word_of_user())
        if not as_json:
            print_line(confirmations.dismissed(left_out))
    entries = needs.attention(settings, overview)
    if as_json:
        print_json(attention=entries)
    elif not dismiss:
        print_table(
            ("KEY", "WHAT"), [(entry.key, ": ".join(filter(None, (entry.title, entry.detail)))) for entry in entries]
        )


def gc(context: typer.Context, *, dry_run: DryRunOption = False, as_json: JsonOption = False) -> None:
    """
    Remove what nothing needs any more: models that lost, leftovers of ended runs, files rejected long ago.

    [gc] in the settings says what is kept. The champion, the one before it, base models, drops that were not rejected,
    and everything of a run that is not over are kept in any case. Safe while the daemon runs, which does the same after
    each run unless gc.automatic is false. With --dry-run nothing is removed.
    """
    settings = load_settings(context)
    engine, now = open_writer(context), now_ms()
    collected = collect(engine, settings, now, dry_run=dry_run)
    items = (*collected.items, *rejected.collect(engine, settings, now, dry_run=dry_run))
    collected = Collected(dry_run=dry_run, items=items, bytes=sum(item.bytes for item in items))
    if as_json:
        print_json(**collected.model_dump(mode="json"))
        return
    if items:
        print_table(("SIZE", "WHAT", "WHY"), [(size_words(item.bytes), item.path, item.why) for item in items])
    verb = "would be given back" if dry_run else "given back"
    print_line(f"{size_words(collected.bytes)} {verb}, by {count(len(items), 'file or folder', 'files and folders')}")


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

    The backup is a new folder, in DIR if that is there, that is verified before it has its name. Models are left out
    without --models, checkpoints and logs always. Exit code 1 if a file that the database names was missing or had
    changed; the backup is made nevertheless.
    """
    made = make(load_settings(context), target, with_models=models)
    manifest = made.manifest
    if as_json:
        print_json(backup=str(made.folder), **manifest.model_dump(mode="json", exclude={"files"}))
    else:
        size = sum(size for size, _ in manifest.files.values())
        print_line(f"backup: {made.folder} ({count(len(manifest.files), 'file')}, {size:,} bytes, verified)")
        if manifest.champions and not models:
            print_line(f"without the models {', '.join(manifest.champions)}: --models takes them along")
        for name in manifest.missing[:_MOST_NAMED]:
            print_line(f"missing or changed: {name}")
        print_line(f"to put it back, with the daemon stopped: {command(context)} restore {shell_path(made.folder)}")
    if manifest.missing:
        raise typer.Exit(EXIT_FAILED)


def restore(
    context: typer.Context,
    *,
    source: Annotated[Path, typer.Argument(metavar="BACKUP", help="A folder that `backup` made.")],
    without_models: Annotated[
        bool, typer.Option("--without-models", help="Even if the model of a champion is lost.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """
    Put a backup in the place of the present database; no daemon may run.

    The former database, and runs that had not succeeded in the backup, go to backups/replaced-… in the state folder;
    other files that differ from the backup's are overwritten. Runs that were not over at the time of the backup begin
    again. The champions' links follow at once. If the backup is damaged or another version's, or a champion's model is
    lost (unless --without-models), nothing is changed.
    """
    settings = load_settings(context)
    done = put_back(settings, source, without_models=without_models)
    engine = open_writer(context)
    for track in tracks_with_champion(engine):
        mend_links(engine, settings.work_folder, track)
    if as_json:
        print_json(restored=str(source), replaced=str(done.replaced), lost=done.lost, missing=done.missing)
        return
    print_line(f"restored: {source}; what was there before is in {done.replaced}")
    if settings.executor.shared:
        print_line(f"and its runs in {settings.work_folder / done.replaced.relative_to(settings.state_folder)}")
    for name in done.lost[:_MOST_NAMED]:
        print_line(f"accepted after the backup, so drop it again from {settings.inbox}/done: {name}")
    if len(done.lost) > _MOST_NAMED:
        print_line(f"and {len(done.lost) - _MOST_NAMED} more")
    for name in done.missing[:_MOST_NAMED]:
        print_line(f"missing or damaged: {name}")


def doctor(context: typer.Context, *, as_json: JsonOption = False) -> None:
    """
    Look at database, disks, inbox and models, and say what to mend.

    Changes nothing, but on a Slurm cluster it runs a job, for a minute at most. Exit code 1 if a check is "bad".
    """
    settings = load_settings(context)
    findings = [*examine(settings), *addresses.examine(settings.messages, chosen_file(context))]
    bad = any(finding.level == "bad" for finding in findings)
    if as_json:
        print_json(ok=not bad, findings=findings)
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            print_line(f"{finding.level:4}  {finding.name:{width}}  {finding.text}")
            if finding.remedy:
                print_line(f"{'':{width + 6}}  → {finding.remedy}")
    if bad:
        raise typer.Exit(EXIT_FAILED)


def messages(
    context: typer.Context,
    *,
    test: Annotated[bool, typer.Option("--test", help="Send one to each address now; say what came of it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """
    List the messages that have not arrived: those that wait, and those that were given up in the last week.

    [messages] in the settings says where they go. With --test nothing is listed and a message is sent to each address:
    exit code 1 if one is not taken.
    """
    settings = load_settings(context)
    if test:
        tried = addresses.try_all(settings.messages)
        if not tried:
            raise DropforgeError("there is no address to send to", f"set {_where_set(context)}")
        if as_json:
            print_json(tried=tried)
        else:
            for result in tried:
                how = f"not taken: {result['error']}" if result["error"] else "taken"
                print_line(f"{result['address']}: {how}")
        raise typer.Exit(EXIT_FAILED if any(result["error"] for result in tried) else EXIT_OK)
    unsent = addresses.unsent(settings, now_ms())
    if as_json:
        print_json(addresses=[str(url) for url in settings.messages.urls], messages=unsent)
    elif unsent:
        rows = [(row.id, local(row.created_at), row.address, row.state, row.tries, row.title) for row in unsent]
        print_table(("MESSAGE", "SINCE", "ADDRESS", "STATE", "TRIES", "TITLE"), rows)
        for address, error in dict.fromkeys((row.address, row.error) for row in unsent if row.error):
            print_line(f"{address}: {error}")
    else:
        print_line("no message waits" if settings.messages.urls else f"no address is set: {_where_set(context)}")


def _where_set(context: typer.Context) -> str:
    """Return a noun phrase that names the settings file with the addresses, and the unit's environment if it exists."""
    file = chosen_file(context)
    environment = file.with_name("environment")
    of_unit = f"; those in {environment} only the unit has: see docs/operations.md, Monitoring"
    return f"urls in [messages] of {file}{of_unit if environment.exists() else ''}"


def metrics(context: typer.Context) -> None:
    """
    Print all metrics in Prometheus' text format, as /metrics of the page does.

    For node_exporter's textfile collector: each minute write them to another file and rename it.
    """
    print(metrics_text(load_settings(context)).decode(), end="")
