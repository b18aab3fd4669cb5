"""Whether what the settings name can be used by this user: the suites of general abilities, and vLLM."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from daemon.system.programs import CannotUse, find_program, user
from pipeline.evaluation.engines.vllm_server import read_version
from pipeline.evaluation.suite_items import BUILTIN, HARNESS, read_items
from pipeline.wording import count


def try_suite(name: str) -> str:
    """
    Return in words what a name in `evaluate.general` stands for, read as a run reads it.

    A task of lm-eval is not loaded, which takes the training stack. Raises `DropforgeError` if it cannot be used.
    """
    if not name.startswith(HARNESS):
        if Path(name).exists() and not Path(name).is_file() and not Path(name).is_dir():
            raise CannotUse(f"{name} is not a file", "name a file of items in evaluate.general")
        try:
            items = read_items(name)
        except OSError as error:
            message = f"user {user()} cannot read the suite {name}: {error.strerror}"
            raise CannotUse(message, f"let the daemon's user read it: ls -l {name}") from error
        return f"{'built in' if name == BUILTIN else name}: {count(len(items), 'item')}"
    task = name.removeprefix(HARNESS)
    try:
        package = f"lm-eval {version('lm-eval')}"
    except PackageNotFoundError as error:
        message = f"evaluate.general names {name}, and the package lm-eval is not installed"
        raise CannotUse(message, "pip install 'lm-eval>=0.4.13,<0.5', or take it out of evaluate.general") from error
    if task.endswith((".yaml", ".yml")) and not Path(task).is_file():
        raise CannotUse(f"there is no task {task}", "mend its path in evaluate.general, or put the file there")
    return f"{name}: {package}; whether it loads, a run says"


def try_vllm(program: str) -> str:
    """Return in words which vLLM a program is. Raises `DropforgeError` if it cannot be used, or is none."""
    return f"{find_program(program)}: version {read_version(program)}"
