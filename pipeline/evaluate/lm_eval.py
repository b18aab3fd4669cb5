"""Run a task of lm-eval (EleutherAI's Language Model Evaluation Harness) on a loaded model."""

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

#: Metrics of a sample that are used, in order of preference.
_SCORES = ("acc", "exact_match")
#: The default of lm-eval's command.
_FEWSHOT_SEED = 1234
_NAME = re.compile(r"""^task:\s*["']?([^"'\s#]+)""", re.MULTILINE)


def check_task(task: str) -> str:
    """
    Return a text that identifies a task's content, so that cached scores of other content are never reused.

    It holds the package's version, the hash of the task's YAML file and, for each task of this name, its version, the
    number of its items and a hash of all requests with the items' data. Raises `CannotTrain` if lm-eval is not
    installed or cannot load the task; nothing is downloaded.
    """
    if find_spec("lm_eval") is None:
        message = f'evaluate.general names "lm-eval:{task}", and the package lm-eval is not installed'
        hint = "install it with Dropforge: pip install 'lm-eval>=0.4.13,<0.5', or remove it from evaluate.general"
        raise CannotTrain(message, hint)
    path = Path(task)
    content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    with _its_own_words(task):
        name, manager = _manager(task)
        found = manager.load([name])["tasks"]
        parts = [_identity(own_name, one) for own_name, one in sorted(found.items())]
    return json.dumps([f"lm-eval {version('lm-eval')}", task, content, *parts])


def _identity(name: str, task: Any) -> list[object]:
    """Return the identity of a loaded task: name, version, number of items, hash of its requests."""
    # As `simple_evaluate` does, for the same few-shot examples.
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    task.build_all_requests()
    seen, items = hashlib.sha256(), set()
    for request in task.instances:
        items.add(request.doc_id)
        # A value that is not JSON (a picture) is represented by its class: its repr may differ in each process.
        fields = [request.doc_id, request.request_type, request.arguments, request.doc]
        text = json.dumps(fields, sort_keys=True, default=_class_of)
        seen.update(f"{len(text)}:{text}".encode())
    return [name, str(task.VERSION), len(items), seen.hexdigest()]


def _class_of(value: object) -> str:
    return type(value).__qualname__


def run_task(asked: Any, task: str, batch_size: int) -> dict[str, float]:
    """
    Return the score of every sample of a task, 0 to 1, by the sample's id; `asked` is an `AskedModel`.

    `task` is a name that lm-eval knows or the path of a task's YAML file. Prompts are the task's own, without a chat
    template. Raises `CannotTrain` if lm-eval cannot run it: its data must be on this machine, as nothing is downloaded
    during a run.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with _its_own_words(task):
        name, manager = _manager(task)
        model = HFLM(pretrained=asked.model, tokenizer=asked.tokenizer, batch_size=batch_size)
        results = lm_eval.simple_evaluate(
            model,
            tasks=[name],
            bootstrap_iters=0,
            log_samples=True,
            task_manager=manager,
            fewshot_random_seed=_FEWSHOT_SEED,
        )
    named = ((name, sample) for name, samples in results["samples"].items() for sample in samples)
    scores = {f"{name}-{sample['doc_id']}": _score(sample) for name, sample in named}
    known = {key: score for key, score in scores.items() if score is not None}
    if not known or len(known) < len(scores):
        message = f"lm-eval's task {task} has no {' or '.join(_SCORES)} score for every sample"
        raise CannotTrain(message, "use another task in evaluate.general")
    return known


@contextmanager
def _its_own_words(task: str) -> Iterator[None]:
    """Convert errors of lm-eval within the block to `CannotTrain` with its message and a remedy."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        by_hand = f"try it by hand: lm_eval --model hf --tasks {task}; its data must be on this machine already"
        raise CannotTrain(f"lm-eval cannot run {task}: {error}", by_hand) from error


def _manager(task: str) -> tuple[str, Any]:
    """Return a task's name and an lm-eval task manager that can load it."""
    from lm_eval.tasks import TaskManager

    name, folder = _own_task(task)
    return name, TaskManager(include_path=folder, include_defaults=folder is None)


def _own_task(task: str) -> tuple[str, str | None]:
    """
    Return a task's name and, if `task` is the path of a YAML file, the file's folder; otherwise `None`.

    Raises `ValueError` if the file does not name its task.
    """
    path = Path(task)
    if not path.is_file():
        return task, None
    named = _NAME.search(path.read_text(encoding="utf-8"))
    if named is None:
        raise ValueError("it has no line that begins with task:")
    return named[1], str(path.parent)


def _score(sample: dict[str, Any]) -> float | None:
    return next((float(sample[name]) for name in _SCORES if name in sample), None)
