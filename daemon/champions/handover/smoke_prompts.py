"""
What a server is asked to see that it serves the champion: prompts that the champion and another model told apart.

They come from the evaluation that compared the two, whose records stay as long as the champion may serve; a file beside
the champion's link has those of today's. Two engines round differently, so an answer may leave the champion's at a
later word: it counts as the champion's if it follows its answer further than the other model's.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from daemon.state import run_files
from pipeline import durable
from pipeline.artifacts import Evaluation, Frozen
from pipeline.contract import SPEC_NAME, StepSpec
from pipeline.errors import DropforgeError
from pipeline.prompt import fold

FILE_NAME = "smoke-prompts.json"
MOST = 8
_LONGEST_PROMPT, _LONGEST_ANSWER = 4000, 64


class SmokePrompt(Frozen):
    """A user's message, and what two models answered to it."""

    content: str
    answer: str
    """The champion's."""
    other: str
    """That of the model that it was compared with."""

    def is_champions(self, said: str) -> bool:
        """Say whether an answer is the champion's, or follows it further than the other model's."""
        said, own, other = said.strip(), self.answer.strip(), self.other.strip()
        return said == own or _common(said, own) > _common(said, other)


class SmokePrompts(Frozen):
    """What a server is asked, and how."""

    model_id: str
    prompts: tuple[SmokePrompt, ...]
    max_tokens: int
    """Most tokens of an answer; those of the evaluation may have been longer."""
    repetition_penalty: float


def write_smoke_prompts(state_folder: Path, track: str, model_id: str, run_id: int | None) -> str | None:
    """
    Write what tells a model from the one that it was compared with, first of all by the run that made it.

    Return the file's path, relative to the state folder; `None` where no evaluation of the model is there any more.
    """
    path = state_folder / "tracks" / track / FILE_NAME
    path.unlink(missing_ok=True)
    for one in _runs(state_folder, run_id):
        found = _of_run(state_folder, one, model_id)
        if found is not None:
            durable.write_json(path, found.model_dump())
            return str(path.relative_to(state_folder))
    return None


def adapter_of(state_folder: Path, run_id: int, model_id: str) -> str | None:
    """Return the folder of the adapter that a model was merged from, relative to the state folder, if it is there."""
    try:
        adapter, model = run_files.load_adapter(state_folder, run_id), run_files.load_model(state_folder, run_id)
    except DropforgeError:
        return None
    is_its = adapter is not None and model is not None and model.model_id == model_id
    return adapter.folder if adapter is not None and is_its and (state_folder / adapter.folder).is_dir() else None


def _runs(state_folder: Path, first: int | None) -> Iterator[int]:
    """Yield the run that made a model, then all others, the latest first."""
    if first is not None:
        yield first
    names = (path.name for path in (state_folder / "runs").glob("*") if path.name.isdecimal())
    yield from sorted((int(name) for name in names if int(name) != first), reverse=True)


def _of_run(state_folder: Path, run_id: int, model_id: str) -> SmokePrompts | None:
    """Return what a run's evaluation recorded of a model; `None` if it did not ask it, or its files are not there."""
    try:
        evaluation = run_files.load_evaluation(state_folder, run_id)
        dataset = run_files.load_dataset(state_folder, run_id)
        if evaluation is None or dataset is None or evaluation.candidate.model_id == evaluation.champion.model_id:
            return None
        roles = _roles(evaluation, model_id)
        if roles is None:
            return None
        folder = state_folder / evaluation.folder
        prompts = _choose(durable.read_jsonl(folder / "records.jsonl"), *roles)
        spec = StepSpec.model_validate_json((folder.parent / SPEC_NAME).read_bytes())
    except (DropforgeError, OSError, ValueError, KeyError, TypeError):
        return None  # damaged, or collected
    return SmokePrompts(
        model_id=model_id,
        prompts=prompts,
        max_tokens=min(dataset.max_new_tokens, _LONGEST_ANSWER),
        repetition_penalty=spec.config.evaluate.repetition_penalty,
    )


def _roles(evaluation: Evaluation, model_id: str) -> tuple[str, str] | None:
    """Return under which name the records have a model's answers, and the other one's."""
    names = {evaluation.candidate.model_id: ("candidate", "champion")}
    return ({evaluation.champion.model_id: ("champion", "candidate")} | names).get(model_id)


def _choose(records: Iterable[Mapping[str, Any]], own: str, other: str) -> tuple[SmokePrompt, ...]:
    """Return the prompts of the shortest answers that differ; of sound ones alone."""
    found = []
    for record in records:
        content = fold(record["instruction"], record["input"])
        one = SmokePrompt(content=content, answer=record[own]["text"], other=record[other]["text"])
        sound = one.answer.strip() and not record[own]["degenerate"] and len(content) <= _LONGEST_PROMPT
        if sound and one.answer.strip() != one.other.strip():
            found.append((len(content) + len(one.answer), str(record["id"]), one))
    return tuple(one for *_, one in sorted(found, key=lambda each: each[:2])[:MOST])


def _common(one: str, other: str) -> int:
    """Return with how many characters two texts begin alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (mine, yours) in pairs if mine != yours), min(len(one), len(other)))
