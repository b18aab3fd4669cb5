"""Whether what the settings need beside the daemon is here and can be used by this user: packages, programs, suites."""

import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from daemon.settings.model import Settings
from daemon.system.programs import find_program, user
from pipeline.errors import DropforgeError
from pipeline.evaluation.engines.vllm_server import read_version
from pipeline.evaluation.suite_items import BUILTIN, HARNESS, read_items
from pipeline.wording import count


@dataclass(frozen=True)
class Need:
    """Something that settings need."""

    name: str
    look: Callable[[], str]
    """Returns in words what was found. Raises `DropforgeError` if it is not there or cannot be used."""
    of_steps: bool = False
    """Whether the worker needs it, which has an environment of its own with worker = "separate"."""


def needs(settings: Settings) -> Iterator[Need]:
    """Yield what these settings need; nothing is looked for yet."""
    yield Need("training", partial(try_training, settings.device), of_steps=True)
    own = settings.hooks
    around = {"hooks.before_training": own.before_training, "hooks.after_training": own.after_training}
    for name, argv in {**around, "export.gguf": settings.export.gguf}.items():
        if argv:
            yield Need(name, partial(find_program, argv[0]))
    for track in settings.track_names:
        own, evaluate = settings.track(track).hooks, settings.track(track).evaluate
        for suite in dict.fromkeys(evaluate.general):
            yield Need(f"suites of {track}", partial(try_suite, suite), of_steps=suite.startswith(HARNESS))
        for argv in (own.after_promotion, own.health):
            if argv:
                yield Need(f"hooks of {track}", partial(find_program, argv[0]))
        if evaluate.engine == "vllm":
            yield Need(f"vLLM of {track}", partial(try_vllm, evaluate.vllm), of_steps=True)


def try_training(device: str) -> str:
    """
    Return in words which training stack there is, by its metadata: importing torch takes seconds and half a gigabyte.

    Raises `DropforgeError` if a package of it is not installed, or cannot compute on `device`.
    """
    wanted = [line for line in requires("dropforge") or () if "extra ==" in line and "train" in line.partition(";")[2]]
    missing = [name for name in (re.split(r"[^\w-]", line)[0] for line in wanted) if not _installed(name)]
    if missing:
        raise DropforgeError(f"not installed here: {', '.join(missing)}", "pip install 'dropforge[train]'")
    if device == "cuda" and version("torch").endswith("+cpu"):
        message = f'device = "cuda", and torch {version("torch")} computes on CPUs alone'
        raise DropforgeError(message, 'install a torch with CUDA, or set device = "auto"')
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl"))


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return importlib.util.find_spec(name.replace("-", "_")) is not None


def try_suite(name: str) -> str:
    """
    Return in words what a name in `evaluate.general` stands for, read as a run reads it.

    A task of lm-eval is not loaded, which takes the training stack. Raises `DropforgeError` if it cannot be used.
    """
    if not name.startswith(HARNESS):
        if Path(name).exists() and not Path(name).is_file() and not Path(name).is_dir():
            raise DropforgeError(f"{name} is not a file", "name a file of items in evaluate.general")
        try:
            items = read_items(name)
        except OSError as error:
            message = f"user {user()} cannot read the suite {name}: {error.strerror}"
            raise DropforgeError(message, f"let the daemon's user read it: ls -l {name}") from error
        return f"{'built in' if name == BUILTIN else name}: {count(len(items), 'item')}"
    task = name.removeprefix(HARNESS)
    try:
        package = f"lm-eval {version('lm-eval')}"
    except PackageNotFoundError as error:
        message = f"evaluate.general names {name}, and the package lm-eval is not installed"
        raise DropforgeError(message, "pip install 'lm-eval>=0.4.13,<0.5', or remove it from the setting") from error
    if task.endswith((".yaml", ".yml")) and not Path(task).is_file():
        raise DropforgeError(f"there is no task {task}", "mend its path in evaluate.general, or put the file there")
    return f"{name}: {package}; whether it loads, a run says"


def try_vllm(program: str) -> str:
    """Return in words which vLLM a program is. Raises `DropforgeError` if it cannot be used, or is none."""
    return f"{find_program(program)}: version {read_version(program)}"
