"""
Export of a champion: to a plain folder, to a repository for the Hugging Face Hub, to a GGUF file.

The folder appears whole or not at all: it is written under another name, compared with the champion's id, synced and
renamed.
"""

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from daemon.champions.smoke_test import can_try
from daemon.state import run_files
from pipeline import durable
from pipeline.artifacts import Adapter, Dataset, Evaluation, Verdict
from pipeline.errors import DropforgeError
from pipeline.models.manifest import MANIFEST_NAME, TRAINED_IDS, model_files, model_id
from pipeline.words import count, printable, signed, span, start_words

#: Files that are exported in addition to the model's own.
_BESIDE = ("LICENSE*", "NOTICE*", MANIFEST_NAME, TRAINED_IDS)
_LARGE_FILES = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.gguf filter=lfs diff=lfs merge=lfs -text\n"
#: How far a GGUF file's logits may be from the champion's, and at how many places its likeliest token must be the same.
#: In 8 bits SmolLM2-135M is 0.033 away and agrees at 99 % of them, in 16 there is no difference.
_MOST_DISTANCE, _LEAST_AGREEMENT = 0.1, 0.9
_MAGIC = b"GGUF"
#: Prefixes of variables that a command with its own Python environment must not get.
_NOT_ITS_OWN = ("PYTHON", "VIRTUAL_ENV", "DROPFORGE_")


@dataclass(frozen=True)
class Wanted:
    """The parts of an export: the model folder, a README.md for the Hub, the command that makes a GGUF file."""

    folder: bool
    """The champion's folder."""
    readme: str | None = None
    """README.md of a repository on the Hub."""
    gguf: tuple[str, ...] = ()
    """Command that makes a GGUF file, given FOLDER --outfile FILE."""


def export(champion: Path, identity: str, target: Path, wanted: Wanted) -> str:
    """
    Export the model folder `champion` with id `identity` to the new folder `target`; describe what was written.

    Raises `DropforgeError` if `target` exists, the model's files do not match `identity`, or the GGUF file cannot be
    made or differs from the champion.
    """
    if os.path.lexists(target):
        raise DropforgeError(f"{target} is there already", "name a folder that is not there yet")
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    aside.mkdir(parents=True)
    try:
        words = []
        if wanted.folder:
            words.append(_copy(champion, identity, aside))
        if wanted.readme is not None:
            (aside / "README.md").write_text(wanted.readme, encoding="utf-8")
            (aside / ".gitattributes").write_text(_LARGE_FILES, encoding="utf-8")
            words.append("README.md as the Hub reads it")
        if wanted.gguf:
            words.append(_make_gguf(champion, aside / f"{target.name}.gguf", wanted.gguf))
        durable.publish_folder(aside, target)
        if aside.exists():
            raise DropforgeError(f"{target} came to be meanwhile", "name a folder that is not there yet")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return f"{target}: {'; '.join(words)}"


def _copy(champion: Path, identity: str, aside: Path) -> str:
    names = {path.relative_to(champion) for path in model_files(champion)}
    names |= {path.relative_to(champion) for pattern in _BESIDE for path in champion.glob(pattern) if path.is_file()}
    for name in sorted(names):
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(champion / name, aside / name)
    if model_id(aside) != identity:
        message = f"the champion in {champion} is not what it was"
        raise DropforgeError(message, "see what is wrong: dropforge doctor; or serve another: dropforge rollback")
    return f"model {identity[:12]}, {count(len(names), 'file')}"


def _make_gguf(champion: Path, file: Path, command: Sequence[str]) -> str:
    """Run the command that makes a GGUF file, and compare that with the champion; return both as a description."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_ITS_OWN)}
    try:
        done = _run([*command, str(champion), "--outfile", str(file)], {**own, "HF_HUB_OFFLINE": "1"})
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
    """Describe how close the GGUF file's logits are to the champion's. Raises `DropforgeError` if too far apart."""
    if not can_try():
        return "not compared with the champion, since the training stack is not installed here"
    argv = [sys.executable, "-P", "-m", "pipeline.models.gguf", str(file), "--check", str(champion.absolute())]
    done = _run(argv, dict(os.environ))
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise DropforgeError(f"{file.name} could not be compared with the champion", "see above; nothing was kept")
    found = json.loads(done.stdout.splitlines()[-1])
    words = f"its logits {found['distance']:.2g} from the champion's, same token at {found['top1']:.0%} of the places"
    if not (found["distance"] <= _MOST_DISTANCE and found["top1"] >= _LEAST_AGREEMENT):
        message = f"{file.name} is not the champion: {words}"
        raise DropforgeError(message, f"{_MOST_DISTANCE:g} and {_LEAST_AGREEMENT:.0%} are let pass: use more bits")
    return words


def _run(argv: Sequence[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return it with its output, which is captured and shown only if it failed."""
    return subprocess.run(  # noqa: S603 - the user's own argument list, or our own module
        argv, env=environment, capture_output=True, text=True, errors="replace", check=False, stdin=subprocess.DEVNULL
    )


def hub_readme(state_folder: Path, run_id: int | None, model_id: str, name: str) -> str:
    """
    Return README.md for the model of a run. Raises `DropforgeError` if the run did not make it.

    Also raises `DropforgeError` for a base model (`run_id` is `None`) and if huggingface_hub is not installed.
    """
    if run_id is None:
        message = "the champion is the base model itself: nothing was trained"
        raise DropforgeError(message, "export it without --hub, or take it from where it came from")
    made = run_files.load_model(state_folder, run_id)
    verdict, dataset = run_files.load_verdict(state_folder, run_id), run_files.load_dataset(state_folder, run_id)
    adapter, evaluation = run_files.load_adapter(state_folder, run_id), run_files.load_evaluation(state_folder, run_id)
    if made is None or made.model_id != model_id or dataset is None or adapter is None:
        message = f"the files of run {run_id} do not tell of model {model_id[:12]} any more"
        raise DropforgeError(message, "export it without --hub")
    how = "with QLoRA" if adapter.kind == "adapter" else "in the base's own weights"
    parts = [
        _metadata(name, evaluation, adapter),
        f"# {_plain(name)}\n",
        f"Trained {how}, merged, and compared by Dropforge with the model that served before it.\n",
        *_measured(verdict, evaluation),
        *_trained_on(dataset),
        *_made_from(run_id, adapter, dataset, model_id),
    ]
    return "\n".join(parts)


def _metadata(name: str, evaluation: Evaluation | None, adapter: Adapter) -> str:
    """Return the YAML front matter for the Hub: name, tags, and a model-index entry for each metric of the model."""
    try:
        from huggingface_hub import EvalResult, ModelCardData  # noqa: PLC0415 - a part of the training stack
    except ImportError as error:
        message = "the package huggingface_hub is not installed here"
        raise DropforgeError(message, "pip install 'dropforge[train]', or export without --hub") from error
    metrics = evaluation.candidate.metrics if evaluation is not None else {}
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name="held-out records of its own track",
            dataset_revision=evaluation.heldout_version if evaluation is not None else None,
            metric_type=metric,
            metric_name=metric.replace("_", " "),
            metric_value=round(points, 2),
        )
        for metric, points in metrics.items()
    ]
    data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["dropforge", *(["qlora"] if adapter.kind == "adapter" else [])],
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _measured(verdict: Verdict | None, evaluation: Evaluation | None) -> Iterable[str]:
    if verdict is None or evaluation is None:
        yield "It was not compared with another model.\n"
        return
    yield "## Evaluation\n"
    yield f"{verdict.sentence[:1].upper()}{verdict.sentence[1:]}.\n"
    yield f"| metric, in points on {count(evaluation.records, 'held-out record')} | this model | the model before |"
    yield "|---|---|---|"
    for metric, points in evaluation.candidate.metrics.items():
        former = evaluation.champion.metrics.get(metric)
        yield f"| {metric.replace('_', ' ')} | {points:.1f} | {'' if former is None else f'{former:.1f}'} |"
    yield ""
    if verdict.gain is not None and verdict.p_value is not None:
        between = f", 98 % interval {span(verdict.interval)}" if verdict.interval else ""
        yield f"Gain {signed(verdict.gain)} points{between}; p = {verdict.p_value:.2g} ({verdict.test}, one-sided).\n"


def _trained_on(dataset: Dataset) -> Iterable[str]:
    yield "## Trained on\n"
    of = f"of these files (sha256 of the prepared rows: {dataset.dataset_sha256})"
    yield f"Trained {start_words(dataset)}, {of}; all of them are behind it:\n"
    yield "| file | role | rows | sha256 |"
    yield "|---|---|---|---|"
    for drop in dataset.drops:
        yield f"| {_plain(drop.name)} | {drop.role} | {drop.rows} | {drop.sha256} |"
    yield ""


def _made_from(run_id: int, adapter: Adapter, dataset: Dataset, model_id: str) -> Iterable[str]:
    yield "## Made from\n"
    yield f"- base model: id {adapter.base_model_id}"
    if adapter.start is not None:
        yield f"- trained over: id {adapter.start.model_id}, itself made from that base"
    steps, tokens = count(adapter.optimizer_steps, "optimizer step"), count(adapter.trained_tokens, "token")
    yield f"- run {run_id}: {steps}, {tokens}"
    yield f"- {adapter.kind}: sha256 {adapter.adapter_sha256}, quantisation {adapter.quantization}"
    yield f"- held-out records: version {dataset.heldout_version}"
    yield f"- this model: id {model_id}"
    versions = ", ".join(f"{name} {version}" for name, version in sorted(adapter.versions.items()))
    yield f"- versions: {_plain(versions)}\n" if versions else ""
    yield "## Use\n"
    yield (
        "Ask it as it was trained: one user message through its chat template, the instruction and, if there is an "
        "input, `### Input:` and it on the next lines. It was evaluated with greedy decoding.\n"
    )


def _plain(text: str) -> str:
    """Escape a text so that Markdown shows it as it is: file names come from anybody."""
    return "".join(f"\\{char}" if char in "\\`*_{}[]()<>#+-!|~&" else char for char in printable(text))
