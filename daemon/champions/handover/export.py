"""
Export of a champion: to a plain folder, or to a GGUF file.

The folder appears whole or not at all: it is written under another name, compared with the champion's id, synced and
renamed.
"""

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from daemon.champions.smoke_test import can_try
from pipeline import durable
from pipeline.errors import DropforgeError
from pipeline.models.manifest import MANIFEST_NAME, TRAINED_IDS, model_files, model_id
from pipeline.words import count

#: Files that are exported in addition to the model's own.
_BESIDE = ("LICENSE*", "NOTICE*", MANIFEST_NAME, TRAINED_IDS)
#: How far a GGUF file's logits may be from the champion's, and at how many places its likeliest token must be the same.
#: In 8 bits SmolLM2-135M is 0.033 away and agrees at 99 % of them, in 16 there is no difference.
_MOST_DISTANCE, _LEAST_AGREEMENT = 0.1, 0.9
_MAGIC = b"GGUF"
#: Prefixes of variables that a command with its own Python environment must not get.
_NOT_ITS_OWN = ("PYTHON", "VIRTUAL_ENV", "DROPFORGE_")


def export(champion: Path, identity: str, target: Path, gguf: Sequence[str] = ()) -> str:
    """
    Copy the model in `champion`, with id `identity`, to the new folder `target`; return a description of the result.

    If `gguf` is given, `target` gets a GGUF file alone, made by this command, which is called with FOLDER --outfile
    FILE; its logits are compared with the champion's if torch is installed. Missing parent folders are created. Raises
    `DropforgeError` if `target` exists, and, leaving no `target`, if the copied files do not match `identity` (not
    checked with `gguf`), or the GGUF file cannot be made or differs too much; `OSError` if copying fails.
    """
    if os.path.lexists(target):
        raise DropforgeError(f"{target} is there already", "name a folder that is not there yet")
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    aside.mkdir(parents=True)
    try:
        words = _make_gguf(champion, aside / f"{target.name}.gguf", gguf) if gguf else _copy(champion, identity, aside)
        durable.publish_folder(aside, target)
        if aside.exists():
            raise DropforgeError(f"{target} was made meanwhile", "name a folder that is not there yet")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return f"{target}: {words}"


def _copy(champion: Path, identity: str, aside: Path) -> str:
    names = {path.relative_to(champion) for path in model_files(champion)}
    names |= {path.relative_to(champion) for pattern in _BESIDE for path in champion.glob(pattern) if path.is_file()}
    for name in sorted(names):
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(champion / name, aside / name)
    if model_id(aside) != identity:
        message = f"the champion in {champion} has changed"
        hint = "put it back from a backup, or let another serve: dropforge rollback --reason TEXT"
        raise DropforgeError(message, hint)
    return f"model {identity[:12]}, {count(len(names), 'file')}"


def _make_gguf(champion: Path, file: Path, command: Sequence[str]) -> str:
    """Make the GGUF `file` by `command`, compare it, describe both. Raises `DropforgeError` if either fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_ITS_OWN)}
    try:
        done = _run([*command, str(champion), "--outfile", str(file)], {**environment, "HF_HUB_OFFLINE": "1"})
    except OSError as error:
        message = f"export.gguf cannot be started: {command[0]}: {error.strerror}"
        raise DropforgeError(message, "name the program by its whole path: docs/serving.md") from error
    if done.returncode or not file.is_file():
        sys.stderr.write(done.stdout + done.stderr)
        message = f"export.gguf made no file: {command[0]} ended with exit code {done.returncode}"
        raise DropforgeError(message, "it says why above")
    with file.open("rb") as head:
        if head.read(len(_MAGIC)) != _MAGIC:
            message = f"what export.gguf made is no GGUF file: {command[0]}"
            raise DropforgeError(message, "it is given FOLDER --outfile FILE; docs/serving.md has an example")
    return f"{file.name}, {_compared(champion, file)}"


def _compared(champion: Path, file: Path) -> str:
    """Describe how close the file's logits are to the champion's, if known. Raises `DropforgeError` if too far."""
    if not can_try():
        return "not compared with the champion, since the training stack is not installed here"
    argv = [sys.executable, "-P", "-m", "pipeline.models.gguf", str(file), "--check", str(champion.absolute())]
    done = _run(argv, dict(os.environ))
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise DropforgeError(f"{file.name} could not be compared with the champion", "see above; nothing was kept")
    apart = json.loads(done.stdout.splitlines()[-1])
    words = f"its logits {apart['distance']:.2g} from the champion's, same token at {apart['top1']:.0%} of the places"
    if not (apart["distance"] <= _MOST_DISTANCE and apart["top1"] >= _LEAST_AGREEMENT):
        message = f"{file.name} is not the champion: {words}"
        raise DropforgeError(message, f"the limits are {_MOST_DISTANCE:g} and {_LEAST_AGREEMENT:.0%}: use more bits")
    return words


def _run(argv: Sequence[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command, and return its exit code and captured output. Raises `OSError` if it cannot be started."""
    return subprocess.run(  # noqa: S603 - the user's own argument list, or our own module
        argv, env=environment, capture_output=True, text=True, errors="replace", check=False, stdin=subprocess.DEVNULL
    )
