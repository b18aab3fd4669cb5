"""A task of lm-eval (EleutherAI's Language Model Evaluation Harness), run on a model that is loaded already."""

import hashlib
import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.errors import CannotTrain
from pipeline.qlora.generation import AskedModel

#: Scores of a sample that count, the first that a task has.
_SCORES = ("acc", "exact_match")
_NAME = re.compile(r"""^task:\s*["']?([^"'\s#]+)""", re.MULTILINE)


def check_task(task: str) -> str:
    """
    Return what names a task's content: its name and the package's version, or the hash of a task's own YAML file.

    Raises `CannotTrain` if lm-eval is not installed.
    """
    if find_spec("lm_eval") is None:
        message = f'evaluate.general names "lm-eval:{task}", and the package lm-eval is not installed'
        hint = "install it beside Dropforge: pip install 'lm-eval>=0.4.13,<0.5', or take it out of evaluate.general"
        raise CannotTrain(message, hint)
    path = Path(task)
    content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return f"lm-eval {version('lm-eval')} {task} {content}"


def run_task(asked: AskedModel, task: str, batch_size: int) -> dict[str, float]:
    """
    Return the score of every sample of a task, 0 to 1, by the sample's id.

    `task` is a name that lm-eval knows or the path of a task's YAML file. Questions are put as the task puts them,
    without a chat template, to candidate and champion alike. Raises `CannotTrain` if lm-eval cannot run it: its data
    must lie on this machine, as nothing is downloaded while a run is evaluated.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    hint = f"try it by hand: lm_eval --model hf --tasks {task}; its data must lie on this machine already"
    try:
        name, folder = _own_task(task)
        manager = TaskManager(include_path=folder, include_defaults=folder is None)
        model = HFLM(pretrained=asked.model, tokenizer=asked.tokenizer, batch_size=batch_size)
        found = lm_eval.simple_evaluate(model, tasks=[name], bootstrap_iters=0, log_samples=True, task_manager=manager)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise CannotTrain(f"lm-eval cannot run {task}: {error}", hint) from error
    samples = {f"{name}-{one['doc_id']}": one for name, some in found["samples"].items() for one in some}
    scores = {key: _score(one) for key, one in samples.items()}
    known = {key: score for key, score in scores.items() if score is not None}
    if not known or len(known) < len(scores):
        message = f"lm-eval's task {task} scores no {' or '.join(_SCORES)} for every sample"
        raise CannotTrain(message, "name another task in evaluate.general")
    return known


def _own_task(task: str) -> tuple[str, str | None]:
    """Return a task's name, and the folder of its YAML file where it is one of the user's own."""
    path = Path(task)
    if not path.is_file():
        return task, None
    named = _NAME.search(path.read_text(encoding="utf-8"))
    if named is None:
        message = "it has no line that begins with task:"
        raise ValueError(message)
    return named[1], str(path.parent)


def _score(sample: dict[str, Any]) -> float | None:
    return next((float(sample[name]) for name in _SCORES if name in sample), None)
