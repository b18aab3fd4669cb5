"""Findings on what settings need: base models, packages, programs and suites, for this user; loads no model."""

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from importlib.metadata import requires, version
from pathlib import Path
from typing import Literal

from daemon.settings.model import Settings
from daemon.system.programs import find_program, user
from pipeline.artifacts import Frozen
from pipeline.config import TrainConfig
from pipeline.durable import open_regular
from pipeline.errors import DropforgeError, os_words
from pipeline.evaluate.suites import BUILTIN, read_suite
from pipeline.evaluate.vllm import read_version
from pipeline.models.manifest import check_base, model_files
from pipeline.words import count


class Finding(Frozen):
    """The result of one check."""

    name: str
    level: Literal["ok", "warn", "bad"]
    text: str
    remedy: str = ""


def ok(name: str, text: str) -> Finding:
    """Return the finding that there is no problem."""
    return Finding(name=name, level="ok", text=text)


def warn(name: str, text: str, remedy: str) -> Finding:
    """Return the finding of a possible problem."""
    return Finding(name=name, level="warn", text=text, remedy=remedy)


def bad(name: str, text: str, remedy: str) -> Finding:
    """Return the finding of a problem with which runs fail."""
    return Finding(name=name, level="bad", text=text, remedy=remedy)


def tried(name: str, look: Callable[[], str], make: Callable[[str, str, str], Finding] = bad) -> Finding:
    """Return an "ok" finding with the text of `look`, or that of `make` if it raises `DropforgeError` or `OSError`."""
    try:
        return ok(name, look())
    except DropforgeError as error:
        return make(name, error.message, error.hint)
    except OSError as error:
        return make(name, f"user {user()} cannot read it: {os_words(error)}", "let the daemon's user read that file")


def bases(
    settings: Settings, further: Callable[[str, TrainConfig], str] = lambda folder, _train: folder
) -> Iterator[Finding]:
    """
    Yield a finding per track: "ok" if its base model exists, is readable and can be trained, else "bad".

    If so its text is what `further` returns, called with folder and settings; it may raise `DropforgeError`.
    """
    for track in settings.track_names:
        chosen = settings.track(track)

        def look(base: str = chosen.base_model, train: TrainConfig = chosen.train) -> str:
            return further(try_base(base, train.format), train)

        yield tried(f"base of {track}", look)


def adapter_words(found: Mapping[str, int]) -> list[str]:
    """Return [sentence] if a training leaves experts of a base as they are, by what `try_adapter` found, else []."""
    experts = found.get("experts", 0)
    return [f"a training leaves its experts, {experts:,} weights, as they are"] if experts else []


def needs(settings: Settings) -> Iterator[Finding]:
    """
    Yield a finding for the training packages, and for each program and suite that the settings need.

    Its level is "ok", or "bad" if it is missing or unusable; "warn" if only steps need it and the worker is separate.
    """
    # A separate worker has its own environment.
    of_steps = warn if settings.worker == "separate" else bad
    yield tried("training", partial(try_training, settings.device), of_steps)
    hooks = settings.hooks
    around = {"hooks.before_training": hooks.before_training, "hooks.after_training": hooks.after_training}
    for name, argv in {**around, "export.gguf": settings.export.gguf}.items():
        if argv:
            yield tried(name, partial(find_program, argv[0]))
    for track in settings.track_names:
        hooks, evaluate = settings.track(track).hooks, settings.track(track).evaluate
        for suite in dict.fromkeys(evaluate.general):
            yield tried(f"suites of {track}", partial(try_suite, suite))
        for argv in (hooks.after_promotion, hooks.health):
            if argv:
                yield tried(f"hooks of {track}", partial(find_program, argv[0]))
        if evaluate.vllm:
            yield tried(f"vLLM of {track}", partial(try_vllm, evaluate.vllm), of_steps)


def try_base(folder: str, fmt: str) -> str:
    """Return `folder`. Raises `DropforgeError` if it is empty or no trainable model, `OSError` if it is unreadable."""
    if not folder:
        raise DropforgeError("no base model is set", "set base_model in dropforge.toml to a model folder")
    check_base(Path(folder), fmt)
    for path in model_files(Path(folder)):
        with open_regular(path) as file:
            file.read(1)
    return folder


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
    """Return a suite's name and size. Raises `DropforgeError` if missing or invalid, `OSError` if unreadable."""
    if Path(name).exists() and not Path(name).is_file() and not Path(name).is_dir():
        raise DropforgeError(f"{name} is not a regular file", "name a file of items in evaluate.general")
    return f"{'built in' if name == BUILTIN else name}: {count(len(read_suite(name).items), 'item')}"


@cache
def try_vllm(program: str) -> str:
    """Return path and version of a vLLM program, cached. Raises `DropforgeError` if it is missing or not vLLM."""
    return f"{find_program(program)}: version {read_version(program)}"
