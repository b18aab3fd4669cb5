"""A task of lm-eval (EleutherAI's Language Model Evaluation Harness), run on a model that is loaded already."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.errors import CannotTrain
from pipeline.models.generation import AskedModel

#: Scores of a sample that count, the first that a task has.
_SCORES = ("acc", "exact_match")
#: That of lm-eval's own command.
_FEWSHOT_SEED = 1234
_NAME = re.compile(r"""^task:\s*["']?([^"'\s#]+)""", re.MULTILINE)


def check_task(task: str) -> str:
    """
    Return what names a task's content, so that scores on another one are never taken for its own.

    That is the package's version, the hash of a task's own YAML file and, of each task that the name stands for, the
    version that it gives itself, the number of its items and a hash of all that is asked, with the items' own data.
    Raises `CannotTrain` if lm-eval is not installed or cannot load the task: nothing is downloaded.
    """
    if find_spec("lm_eval") is None:
        message = f'evaluate.general names "lm-eval:{task}", and the package lm-eval is not installed'
        hint = "install it beside Dropforge: pip install 'lm-eval>=0.4.13,<0.5', or take it out of evaluate.general"
        raise CannotTrain(message, hint)
    path = Path(task)
    content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    with _its_own_words(task):
        name, manager = _manager(task)
        found = manager.load([name])["tasks"]
        parts = [_identity(own_name, one) for own_name, one in sorted(found.items())]
    return json.dumps([f"lm-eval {version('lm-eval')}", task, content, *parts])


def _identity(name: str, task: Any) -> list[object]:
    """Return what tells a loaded task from another one of its name."""
    # As `simple_evaluate` does, or the examples that stand before a question would be others.
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    task.build_all_requests()
    seen, items = hashlib.sha256(), set()
    for one in task.instances:
        items.add(one.doc_id)
        # What is no JSON (a picture, say) is told by its class: its words may be others in each process.
        asked = json.dumps([one.doc_id, one.request_type, one.arguments, one.doc], sort_keys=True, default=_class_of)
        seen.update(f"{len(asked)}:{asked}".encode())
    return [name, str(task.VERSION), len(items), seen.hexdigest()]


def _class_of(value: object) -> str:
    return type(value).__qualname__


def run_task(asked: AskedModel, task: str, batch_size: int) -> dict[str, float]:
    """
    Return the score of every sample of a task, 0 to 1, by the sample's id.

    `task` is a name that lm-eval knows or the path of a task's YAML file. Questions are put as the task puts them,
    without a chat template, to candidate and champion alike. Raises `CannotTrain` if lm-eval cannot run it: its data
    must lie on this machine, as nothing is downloaded while a run is evaluated.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with _its_own_words(task):
        name, manager = _manager(task)
        model = HFLM(pretrained=asked.model, tokenizer=asked.tokenizer, batch_size=batch_size)
        found = lm_eval.simple_evaluate(
            model,
            tasks=[name],
            bootstrap_iters=0,
            log_samples=True,
            task_manager=manager,
            fewshot_random_seed=_FEWSHOT_SEED,
        )
    samples = {f"{name}-{one['doc_id']}": one for name, some in found["samples"].items() for one in some}
    scores = {key: _score(one) for key, one in samples.items()}
    known = {key: score for key, score in scores.items() if score is not None}
    if not known or len(known) < len(scores):
        message = f"lm-eval's task {task} scores no {' or '.join(_SCORES)} for every sample"
        raise CannotTrain(message, "name another task in evaluate.general")
    return known


@contextmanager
def _its_own_words(task: str) -> Iterator[None]:
    """Tell what lm-eval raises in its own words, with what to do."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        by_hand = f"try it by hand: lm_eval --model hf --tasks {task}; its data must lie on this machine already"
        raise CannotTrain(f"lm-eval cannot run {task}: {error}", by_hand) from error


def _manager(task: str) -> tuple[str, Any]:
    """Return a task's name, and lm-eval's index of tasks with it."""
    from lm_eval.tasks import TaskManager

    name, folder = _own_task(task)
    return name, TaskManager(include_path=folder, include_defaults=folder is None)


def _own_task(task: str) -> tuple[str, str | None]:
    """Return a task's name, and the folder of its YAML file where it is one of the user's own."""
    path = Path(task)
    if not path.is_file():
        return task, None
    named = _NAME.search(path.read_text(encoding="utf-8"))
    if named is None:
        raise ValueError("it has no line that begins with task:")
    return named[1], str(path.parent)


def _score(sample: dict[str, Any]) -> float | None:
    return next((float(sample[name]) for name in _SCORES if name in sample), None)
