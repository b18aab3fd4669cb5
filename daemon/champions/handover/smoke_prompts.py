"""
Smoke prompts: prompts whose recorded answers tell the champion from another model, to check a server with.

They come from the evaluation of the run that made the champion; its records are kept as long as the champion may serve.
A file next to the champion's link has today's prompts. Two engines round differently, and the longer an answer, the
more likely they diverge: so only the beginning of an answer is compared, where the two models differ from the first
words.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from daemon.state import run_files
from daemon.system.folders import WorkFolder
from pipeline import durable
from pipeline.artifacts import Frozen
from pipeline.contract import SPEC_NAME, StepSpec
from pipeline.errors import DropforgeError
from pipeline.models.template import fold

FILE_NAME = "smoke-prompts.json"
MOST = 8
#: Characters of a prompt; tokens that are asked for; characters within which the two answers differ, which are fewer
#: than those tokens have in any script.
_LONGEST_PROMPT, _ASKED_TOKENS, _LONGEST_COMMON = 4000, 32, 8


class SmokePrompt(Frozen):
    """A user message after earlier turns, if any, and the recorded answers of two models to it."""

    turns: tuple[tuple[str, str], ...] = ()
    """Role and text of the turns before the message."""
    content: str
    answer: str
    """The champion's answer."""
    other: str
    """The answer of the model that the champion was compared with."""

    def is_champions(self, text: str) -> bool:
        """Return whether `text` is the champion's answer, or a beginning of it that is not a beginning of `other`."""
        # A character that was cut in the middle of its bytes is none.
        text, answer, other = text.strip().rstrip("\ufffd"), self.answer.strip(), self.other.strip()
        return text == answer or (answer.startswith(text) and not other.startswith(text))


class SmokePrompts(Frozen):
    """The prompts that a server is checked with, and the sampling settings to send."""

    model_id: str
    prompts: tuple[SmokePrompt, ...]
    max_tokens: int
    """Most tokens of an answer; those of the evaluation may have been longer."""
    repetition_penalty: float


def write_smoke_prompts(work_folder: WorkFolder, track: str, model_id: str, run_id: int | None) -> str | None:
    """
    Write the smoke prompts of a run's model into its track's folder; return the file's path relative to `work_folder`.

    Smoke prompts are held-out prompts with recorded answers; the file may list none. An older file is removed in any
    case. Returns `None`, and writes no file, without `run_id` (a base model), or if the run's evaluation is gone,
    damaged, of another model or in NF4.
    """
    path = work_folder / "tracks" / track / FILE_NAME
    path.unlink(missing_ok=True)
    prompts = None if run_id is None else _of_run(work_folder, run_id, model_id)
    if prompts is None:
        return None
    durable.write_json(path, prompts.model_dump())
    return str(path.relative_to(work_folder))


def adapter_of(work_folder: WorkFolder, run_id: int, model_id: str) -> str | None:
    """
    Return the folder of a model's adapter over the base, relative to the work folder; `None` if there is none.

    Also `None` if the run trained from a champion, did not make `model_id`, or published something that is damaged, or
    if the folder was deleted; the files in the folder are not read.
    """
    try:
        adapter, model = run_files.load_adapter(work_folder, run_id), run_files.load_model(work_folder, run_id)
    except DropforgeError:
        return None
    if adapter is None or adapter.kind != "adapter" or adapter.start is not None:
        return None
    if model is None or model.model_id != model_id:
        return None
    return adapter.folder if (work_folder / adapter.folder).is_dir() else None


def _of_run(work_folder: WorkFolder, run_id: int, model_id: str) -> SmokePrompts | None:
    """Return a run's smoke prompts; `None` if its evaluation is missing, damaged, of another model or in NF4."""
    try:
        evaluation = run_files.load_evaluation(work_folder, run_id)
        dataset = run_files.load_dataset(work_folder, run_id)
        if evaluation is None or dataset is None or evaluation.candidate.model_id != model_id:
            return None
        if evaluation.quantization == "nf4":
            return None  # a server that holds the model in 16 bits answers differently
        folder = work_folder / evaluation.folder
        prompts = _choose(durable.read_jsonl(folder / "records.jsonl"))
        spec = StepSpec.model_validate_json(durable.read_regular(folder.parent / SPEC_NAME))
    except (DropforgeError, OSError, ValueError, KeyError, TypeError):
        return None  # damaged, or collected
    return SmokePrompts(
        model_id=model_id,
        prompts=prompts,
        max_tokens=min(dataset.max_new_tokens, _ASKED_TOKENS),
        repetition_penalty=spec.config.evaluate.repetition_penalty,
    )


def _choose(records: Iterable[Mapping[str, Any]]) -> tuple[SmokePrompt, ...]:
    """Return up to `MOST` prompts of 4,000 characters at most whose sound answers begin differently, shortest first."""
    chosen = []
    for record in records:
        content = fold(record["instruction"], record["input"])
        candidate, turns = record["candidate"], record.get("turns", ())
        prompt = SmokePrompt(turns=turns, content=content, answer=candidate["text"], other=record["champion"]["text"])
        answer, others = prompt.answer.strip(), prompt.other.strip()
        length = len(content) + sum(len(text) for _, text in turns)
        sound = answer and not candidate["degenerate"] and length <= _LONGEST_PROMPT
        if sound and answer[:_LONGEST_COMMON] != others[:_LONGEST_COMMON]:
            chosen.append((length + len(prompt.answer), str(record["id"]), prompt))
    return tuple(prompt for *_, prompt in sorted(chosen, key=lambda each: each[:2])[:MOST])
