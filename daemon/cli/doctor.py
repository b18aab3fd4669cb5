"""`doctor`: is this machine, and this workspace, fit for the work."""

import typer

from daemon.cli.output import print_json, print_line
from daemon.cli.workspace import JsonOption, load_settings
from pipeline.errors import EXIT_FAILED


def register(app: typer.Typer) -> None:
    """Add this group's command."""
    app.command()(doctor)


def doctor(context: typer.Context, *, as_json: JsonOption = False) -> None:
    """
    Look at database, disks, inbox, models and clock, and say what to mend.

    Changes nothing. Exit code 1 if a line is bad.
    """
    from daemon.views.doctor import examine  # noqa: PLC0415 - a quick start for the other commands

    findings = examine(load_settings(context))
    bad = any(finding.level == "bad" for finding in findings)
    if as_json:
        print_json(ok=not bad, findings=[finding.model_dump(mode="json") for finding in findings])
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            print_line(f"{finding.level:4}  {finding.name:{width}}  {finding.text}")
            if finding.remedy:
                print_line(f"{'':{width + 6}}  → {finding.remedy}")
    if bad:
        raise typer.Exit(EXIT_FAILED)
