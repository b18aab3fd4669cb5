"""`ask`: send a prompt to the champion."""

import sys
from typing import Annotated, Any

import typer

from daemon.champions import smoke_test
from daemon.champions.history import no_champion
from daemon.cli.output import print_json
from daemon.cli.workspace import JsonOption, OneTrackOption, chosen_tracks, load_settings
from daemon.views.overview import Overview
from pipeline.words import count, printable

#: Longest answer in tokens, if neither the settings nor a run of the track fix it.
_TOKENS = 256


def ask(
    context: typer.Context,
    *,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What is asked: a record's instruction.")],
    more: Annotated[str, typer.Option("--input", metavar="TEXT", help="A record's input, if it has one.")] = "",
    track: OneTrackOption = "default",
    as_json: JsonOption = False,
) -> None:
    """
    Let the champion answer as it was evaluated: with the same prompt template, greedily, up to the same length.

    The model is loaded for this one answer, on the device of the settings, whatever the daemon does there meanwhile:
    where a training leaves too little memory, this command is the one that ends with an error.
    """
    chosen_tracks(context, track)
    settings = load_settings(context)
    overview = Overview.of(settings)
    champion = overview.champion(track)
    if champion is None:
        raise no_champion(track)
    track_settings = settings.track(track) if track in settings.track_names else settings
    request = {
        "folder": champion.path,
        "format": track_settings.train.format if champion.kind == "base" else "auto",
        "instruction": prompt,
        "input": more,
        "max_new_tokens": track_settings.evaluate.max_new_tokens or overview.fixed(track).max_new_tokens or _TOKENS,
        "repetition_penalty": track_settings.evaluate.repetition_penalty,
    }
    answer: dict[str, Any] = {"text": ""}
    for part in smoke_test.ask(request, settings.device):
        answer |= {**part, "text": answer["text"] + part.get("text", "")}
        if not as_json:
            _print_part(part)
    if as_json:
        print_json(generation=champion.generation, model_id=champion.model_id, **answer)


def _print_part(part: dict[str, Any]) -> None:
    """Print a part of an answer, unprintable characters but newlines escaped; after the last whether it was cut."""
    sys.stdout.write("\n".join(map(printable, part.get("text", "").split("\n"))))
    if "tokens" in part:
        sys.stdout.write("\n")
        if not part["ended"]:
            print(f"cut after {count(part['tokens'], 'token')}, as in an evaluation", file=sys.stderr)
    sys.stdout.flush()
