"""The README.md of a champion, the model card that the Hub reads: what it was measured at, trained on and made from."""

from collections.abc import Iterable
from pathlib import Path

from daemon.state import run_files
from pipeline.artifacts import Adapter, Dataset, Evaluation, Verdict
from pipeline.errors import DropforgeError
from pipeline.words import count, printable, signed, span, start_words


def hub_readme(state_folder: Path, run_id: int | None, model_id: str, name: str) -> str:
    """Return README.md for a run's model. Raises `DropforgeError` for any other model, or without huggingface_hub."""
    if run_id is None:
        message = "the champion is the base model itself: nothing was trained"
        raise DropforgeError(message, "export it without --hub, or take it from where it came from")
    made = run_files.load_model(state_folder, run_id)
    verdict, dataset = run_files.load_verdict(state_folder, run_id), run_files.load_dataset(state_folder, run_id)
    adapter, evaluation = run_files.load_adapter(state_folder, run_id), run_files.load_evaluation(state_folder, run_id)
    if made is None or made.model_id != model_id or dataset is None or adapter is None:
        message = f"the files of run {run_id} do not tell of model {model_id[:12]} any more"
        raise DropforgeError(message, "export it without --hub")
    parts = [
        _metadata(name, evaluation, adapter),
        f"# {_plain(name)}\n",
        f"Trained {_how(adapter)}, merged, and compared by Dropforge with the model that served before it.\n",
        *_measured(verdict, evaluation),
        *_trained_on(dataset),
        *_made_from(run_id, adapter, dataset, model_id),
    ]
    return "\n".join(parts)


def _how(adapter: Adapter) -> str:
    return "with QLoRA" if adapter.kind == "adapter" else "in the base's own weights"


def _metadata(name: str, evaluation: Evaluation | None, adapter: Adapter) -> str:
    """Return the YAML head, with an entry of the model index for each metric."""
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
    of = f"of these files (sha256 of what was prepared of them: {dataset.dataset_sha256})"
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
    """Return a text as Markdown shows it, whatever it holds: names of files come from anybody."""
    return "".join(f"\\{char}" if char in "\\`*_{}[]()<>#+-!|~&" else char for char in printable(text))
