"""Check that the packages, programs and suites that settings need are there for this user; loads no model."""

import importlib.util
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.metadata import requires, version
from pathlib import Path

from daemon.settings.model import Settings
from daemon.system.programs import find_program, user
from pipeline.errors import DropforgeError
from pipeline.evaluate.suites import BUILTIN, read_suite
from pipeline.evaluate.vllm import read_version
from pipeline.words import count


def needs(settings: Settings) -> Iterator[tuple[str, Callable[[], str], bool]]:
    """
    Yield each requirement of the settings: its name, a function that checks it, and whether only steps need it.

    Nothing is checked until the function is called. It returns a description, and raises `DropforgeError` if the
    required thing is missing or unusable.
    """
    yield "training", partial(try_training, settings.device), True
    own = settings.hooks
    around = {"hooks.before_training": own.before_training, "hooks.after_training": own.after_training}
    for name, argv in {**around, "export.gguf": settings.export.gguf}.items():
        if argv:
            yield name, partial(find_program, argv[0]), False
    for track in settings.track_names:
        own, evaluate = settings.track(track).hooks, settings.track(track).evaluate
        for suite in dict.fromkeys(evaluate.general):
            yield f"suites of {track}", partial(try_suite, suite), False
        for argv in (own.after_promotion, own.health):
            if argv:
                yield f"hooks of {track}", partial(find_program, argv[0]), False
        if evaluate.vllm:
            yield f"vLLM of {track}", partial(try_vllm, evaluate.vllm), True


def try_training(device: str) -> str:
    """
    Return the versions of the installed training stack, from package metadata: importing torch takes seconds.

    Raises `DropforgeError` if one of its packages is not installed, or if `device` is "cuda" and torch is a build for
    CPUs only; whether there is a GPU is not checked.
    """
    wanted = re.findall(r"^([\w-]+).*;.*extra == .train\b", "\n".join(requires("dropforge") or ()), re.MULTILINE)
    missing = [name for name in wanted if importlib.util.find_spec(name.replace("-", "_")) is None]
    if missing:
        raise DropforgeError(f"not installed here: {', '.join(missing)}", "pip install 'dropforge[train]'")
    if device == "cuda" and version("torch").endswith("+cpu"):
        raise DropforgeError(
            f'device = "cuda", and torch {version("torch")} computes on CPUs alone',
            'install a torch with CUDA, or set device = "auto"',
        )
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl"))


def try_suite(name: str) -> str:
    """Return name and number of items of a suite. Raises `DropforgeError` if it is missing, unreadable or invalid."""
    if Path(name).exists() and not Path(name).is_file() and not Path(name).is_dir():
        raise DropforgeError(f"{name} is not a regular file", "name a file of items in evaluate.general")
    try:
        items = read_suite(name).items
    except OSError as error:
        raise DropforgeError(
            f"user {user()} cannot read the suite {name}: {error.strerror}",
            f"let the daemon's user read it: ls -l {name}",
        ) from error
    return f"{'built in' if name == BUILTIN else name}: {count(len(items), 'item')}"


@cache
def try_vllm(program: str) -> str:
    """Run a vLLM program's Python; return path and version. Raises `DropforgeError` if it is missing or not vLLM."""
    return f"{find_program(program)}: version {read_version(program)}"
