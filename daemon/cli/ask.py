"""`ask`: send a prompt to the champion, and with --versus also to the previous champion or the base model."""

import sys
from typing import Annotated, Any, Literal

import typer

from daemon.champions import smoke_test
from daemon.champions.history import no_champion
from daemon.cli.output import print_json, print_line
from daemon.cli.status import short_id
from daemon.cli.workspace import JsonOption, OneTrackOption, chosen_tracks, load_settings, open_overview
from daemon.views.champion_history import ChampionView
from daemon.views.overview import Overview
from pipeline.errors import DropforgeError
from pipeline.words import count, printable

#: Longest answer in tokens, if neither the settings nor a run of the track fix it.
_TOKENS = 256
VersusOption = Annotated[
    Literal["previous", "base"] | None,
    typer.Option("--versus", help="Ask the model that served before, or the base model, too."),
]


def ask(  # noqa: PLR0913 - each goes by its name on the command line
    context: typer.Context,
    *,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What is asked: a record's instruction.")],
    more: Annotated[str, typer.Option("--input", metavar="TEXT", help="A record's input, if it has one.")] = "",
    track: OneTrackOption = "default",
    versus: VersusOption = None,
    as_json: JsonOption = False,
) -> None:
    """
    Let the champion answer as it was evaluated: the same template around the prompt, greedily, of the same length.

    The model is loaded for this one answer, on the device of the settings, whatever the daemon does there meanwhile:
    where a training leaves too little memory, this command is the one that ends with an error.
    """
    chosen_tracks(context, track)
    settings, overview = load_settings(context), open_overview(context)
    asked = _asked(overview, track, versus)
    own = settings.track(track) if track in settings.track_names else settings
    request = {
        "models": [{"folder": one.path, "format": own.train.format if one.kind == "base" else "auto"} for one in asked],
        "instruction": prompt,
        "input": more,
        "max_new_tokens": own.evaluate.max_new_tokens or overview.fixed(track).max_new_tokens or _TOKENS,
        "repetition_penalty": own.evaluate.repetition_penalty,
    }
    answers: list[dict[str, Any]] = []
    for said in smoke_test.ask(request, settings.device):
        if "folder" in said:
            answers.append({"text": ""})
            if len(asked) > 1 and not as_json:
                print_line(f"{_named(asked[len(answers) - 1])}:")
        answers[-1] |= {**said, "text": answers[-1]["text"] + said.get("text", "")}
        if not as_json:
            _print_part(said)
    if as_json:
        print_json(answers=[_as_object(one, said) for one, said in zip(asked, answers, strict=True)])
    elif len(answers) > 1 and answers[0]["text"] == answers[1]["text"]:
        print_line("both give the same answer")


def _asked(overview: Overview, track: str, versus: str | None) -> list[ChampionView]:
    """Return the champion, and by `versus` the previous or base model. Raises `DropforgeError` if one is missing."""
    past = overview.history(track)
    if not past:
        raise no_champion(track)
    champion = past[0]
    if versus is None:
        return [champion]
    others = [one for one in past if one.model_id != champion.model_id]
    other = next((one for one in others if versus == "previous" or one.kind == "base"), None)
    if other is None:
        raise DropforgeError(
            f"the champion of track {track} is the base model, and no other model served before",
            f"leave out --versus; the models that served: dropforge history --track {track}",
        )
    return [champion, other]


def _named(one: ChampionView) -> str:
    return f"generation {one.generation}, {one.kind}, {short_id(one.model_id)}"


def _print_part(said: dict[str, Any]) -> None:
    """Print a part of an answer, unprintable characters but newlines escaped; after the last whether it was cut."""
    sys.stdout.write("\n".join(map(printable, said.get("text", "").split("\n"))))
    if "tokens" in said:
        sys.stdout.write("\n")
        if not said["ended"]:
            print(f"cut after {count(said['tokens'], 'token')}, as in an evaluation", file=sys.stderr)
    sys.stdout.flush()


def _as_object(one: ChampionView, said: dict[str, Any]) -> dict[str, Any]:
    own = {"generation": one.generation, "kind": one.kind, "model_id": one.model_id, "folder": one.path}
    return {**own, **{name: said.get(name) for name in ("text", "tokens", "ended")}}
