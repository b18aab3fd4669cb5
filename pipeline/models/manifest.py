"""Identify a model folder by its files, write and verify its manifest, and check a base model."""

import hashlib
import math
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import durable
from pipeline.artifacts import ModelRef
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain, DropforgeError
from pipeline.models.safetensors_files import INDEX, NotSafetensorsError, read_all_shapes
from pipeline.models.tokenizer_files import token_problem
from pipeline.models.untrusted import size_problem, text_part, too_few_weights, try_read_object, unfit_file

MANIFEST_NAME = "dropforge-manifest.json"
#: Ids of the records that a model was trained on. Not part of the model id, but listed in the manifest.
TRAINED_IDS = "trained-ids.txt"
PICKLES = (".bin", ".pt", ".pth", ".pkl")
_WEIGHTS = "*.safetensors"
#: The files that a model's answers depend on; cards, licences and the manifest are not part of its id.
_IDENTITY = (
    _WEIGHTS,
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
)


class Lineage(NamedTuple):
    """The base model of a merged model and its number of trainings, from its manifest."""

    base_model_id: str
    trainings: int
    """Successive trainings since the base model: 1 if it was trained from the base."""


def model_files(folder: Path) -> list[Path]:
    """Return the files of the model id: weights, configs, tokenizer, templates; by name, none in a missing folder."""
    # Only the patterns' folders: other files, however deep, are not visited.
    files = {path for pattern in _IDENTITY for path in folder.glob(pattern) if path.is_file()}
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def model_id(folder: Path) -> str:
    """
    Return the model id: the sha256, in hexadecimal, of the names and hashes of `model_files`.

    A folder that is missing or has no such files also gives an id. Raises `DropforgeError` if a file cannot be read.
    """
    try:
        files = model_files(folder)
        return _identity({path.relative_to(folder).as_posix(): durable.sha256_file(path) for path in files})
    except OSError as error:
        raise DropforgeError(
            f"the model folder {folder} cannot be read: {error}",
            "check that the folder and its files belong to the user of Dropforge",
        ) from error


def write_manifest(folder: Path, lineage: Lineage | None = None) -> str:
    """Write dropforge-manifest.json in `folder`: size and sha256 per file, model id, lineage; return the model id."""
    files = {name: entry for name, entry in file_entries(folder).items() if Path(name).name != MANIFEST_NAME}
    covered = {path.relative_to(folder).as_posix() for path in model_files(folder)}
    identity = _identity({name: str(entry["sha256"]) for name, entry in files.items() if name in covered})
    made_from = {} if lineage is None else {"lineage": lineage._asdict()}
    durable.write_json(folder / MANIFEST_NAME, {"version": 1, "model_id": identity, **made_from, "files": files})
    return identity


def read_lineage(folder: Path) -> Lineage | None:
    """Return the lineage in the manifest of the model in `folder`; `None` if it has none or cannot be read."""
    match (try_read_object(folder / MANIFEST_NAME) or {}).get("lineage"):
        case {"base_model_id": str(base), "trainings": int(trainings)}:
            return Lineage(base, trainings)
    return None


def verify_manifest(folder: Path) -> str:
    """
    Check a model folder against its manifest, by hashing every listed file; return the model id.

    Raises `DropforgeError`, naming the first file, if a file is missing, differs from the manifest or is a model's file
    that is not listed, or if the manifest cannot be read or has another model id.
    """
    hint = "the folder is damaged: restore it from a backup, or train it again"
    value = try_read_object(folder / MANIFEST_NAME)
    files = None if value is None else value.get("files")
    if value is None or not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise DropforgeError(f"{folder} has no readable {MANIFEST_NAME}", hint)
    for name, entry in files.items():
        if problem := difference(folder / name, entry):
            raise DropforgeError(f"{folder / name} {problem}", hint)
    covered = {path.relative_to(folder).as_posix() for path in model_files(folder)}
    unlisted = sorted(covered - files.keys())
    if unlisted:
        raise DropforgeError(f"{folder / unlisted[0]} is not in the model's manifest", hint)
    identity = _identity({name: entry["sha256"] for name, entry in files.items() if name in covered})
    if identity != value.get("model_id"):
        raise DropforgeError(f"{folder / MANIFEST_NAME} has a model id that does not match its files", hint)
    return identity


def write_trained_ids(folder: Path, ids: Iterable[str]) -> None:
    """Write `ids`, of training records, to trained-ids.txt in `folder`, sorted, without duplicates, one per line."""
    durable.write_bytes(folder / TRAINED_IDS, "".join(f"{name}\n" for name in sorted(set(ids))).encode())


def trained_ids(folder: Path, among: Container[str] | None = None) -> frozenset[str]:
    """
    Return the ids in trained-ids.txt, of the records that a model was trained on; only those in `among` if given.

    Empty for a folder without the list, such as a base model's. Raises `OSError` or `ValueError` if it is unreadable.
    """
    try:
        with (folder / TRAINED_IDS).open(encoding="utf-8") as file:
            ids = (line.rstrip("\n") for line in file)
            return frozenset(name for name in ids if name and (among is None or name in among))
    except FileNotFoundError:
        return frozenset()


def check_base(folder: Path, fmt: str = "auto") -> None:
    """
    Check that `folder` holds a base model in transformers' format, trainable with `train.format`; load no weights.

    The folder is untrusted: only regular files are opened, and read up to a limit. Raises `CannotTrain` for the first
    problem: a missing, incomplete, unsafe or too large file, impossible sizes, unusable special tokens, chat
    templates without a default, or a model that is not supported (custom code, quantised, an encoder-decoder, an
    adapter); `OSError` if weights cannot be read.
    """
    if not folder.is_dir():
        raise CannotTrain(
            f"there is no base model folder {folder}", "set base_model to the folder of a model in transformers' format"
        )
    for problem, hint in _problems(folder, fmt):
        raise CannotTrain(f"the base model {folder} {problem}", hint)


_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_ANEW = "download the model again from a trusted source, or use another one"


def _problems(folder: Path, fmt: str) -> Iterator[tuple[str, str]]:
    """Yield each reason why a folder is no trainable base model, with its remedy; the caller stops at the first."""
    if problem := unfit_file(folder):
        yield problem, _ANEW
    if (folder / "adapter_config.json").exists():
        yield "holds an adapter, which would be loaded on top of the model", "use the folder of the merged model"
    yield from _config_problems(folder)
    yield from _weights_problems(folder)
    yield from _tokenizer_problems(folder)
    if fmt != "alpaca":
        yield from _template_problems(folder)


def _config_problems(folder: Path) -> Iterator[tuple[str, str]]:
    config = try_read_object(folder / "config.json")
    if config is None:
        yield "has no readable config.json", "use a model folder as transformers' save_pretrained writes it"
        return
    if "auto_map" in text_part(config):
        yield (
            "needs custom code (auto_map in config.json), which is never run",
            "use a model whose architecture is part of transformers",
        )
    if config.get("quantization_config"):
        yield (
            "is already quantised (quantization_config in config.json)",
            'use the 16-bit model: train.quantization = "nf4" quantises it for training',
        )
    if config.get("is_encoder_decoder"):
        yield "is an encoder-decoder", "use a causal language model"
    if "transformers_weights" in config:
        yield (
            "names its weight files in config.json (transformers_weights)",
            "save it again with transformers' save_pretrained",
        )
    if problem := size_problem(config):
        yield f"has an invalid config.json: {problem}", _ANEW


def _weights_problems(folder: Path) -> Iterator[tuple[str, str]]:
    weights = [path for path in sorted(folder.glob(_WEIGHTS)) if path.is_file()]
    if not weights:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        only = f", only pickled ones ({pickles[0]}), which can run code when loaded" if pickles else ""
        yield f"has no safetensors weights{only}", "save it again with transformers' save_pretrained"
    if (folder / INDEX).exists():
        shards = (try_read_object(folder / INDEX) or {}).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            yield f"has no readable {INDEX}", "download the model again"
            return
        if missing := sorted(set(shards.values()) - {path.name for path in weights}):
            yield f"lacks the shard {missing[0]} that {INDEX} names", "download the model again"
    numbers = 0
    try:
        for _path, shapes, _length in read_all_shapes(weights):
            numbers += sum(math.prod(shape) for shape in shapes.values())
    except NotSafetensorsError as error:
        yield f"has a {error}", "download it again (with git: git lfs pull)"
    if problem := too_few_weights(try_read_object(folder / "config.json") or {}, numbers):
        yield f"has a config.json that does not match its weights: {problem}", _ANEW


def _tokenizer_problems(folder: Path) -> Iterator[tuple[str, str]]:
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        yield "has no tokenizer", "save the tokenizer into the same folder, with its save_pretrained"
    if "auto_map" in (try_read_object(folder / "tokenizer_config.json") or {}):
        yield (
            "needs custom code (auto_map in tokenizer_config.json), which is never run",
            "use a model whose tokenizer is part of transformers",
        )
    if problem := token_problem(folder):
        yield problem, _ANEW


def _template_problems(folder: Path) -> Iterator[tuple[str, str]]:
    further = {path.name for path in folder.glob("additional_chat_templates/*.jinja")}
    # With these, transformers ignores a template in tokenizer_config.json.
    if further and "default.jinja" not in further and not (folder / "chat_template.jinja").is_file():
        yield (
            "has additional_chat_templates/ and no chat_template.jinja, the default",
            'write the default template into that file, or set train.format = "alpaca"',
        )


def _identity(hashes: Mapping[str, str]) -> str:
    lines = "".join(f"{len(name.encode())}:{name}:{digest}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def file_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """Return `size` and `sha256` of each file below `folder`, by path there. Raises `OSError` if one is unreadable."""
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": durable.sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def difference(path: Path, entry: Mapping[str, Any]) -> str:
    """Return how a file differs from its entry in `file_entries`, as "is missing"; empty if it does not."""
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != entry.get("size"):
        return f"has {path.stat().st_size} bytes instead of {entry.get('size')}"
    try:
        return "" if durable.sha256_file(path) == entry.get("sha256") else "has changed"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def require_start(attempt: Attempt, start: ModelRef | None) -> Path:
    """
    Return the folder of the model that a training starts from: the champion `start`, or the base if that is `None`.

    Raises `CannotTrain` unless the base is the one that the run began with, and the champion's files match its manifest
    and model id; `DropforgeError` if the base cannot be read.
    """
    base = Path(attempt.config.base_model)
    if model_id(base) != attempt.config.base_model_id:
        message = f"the base model {base} has changed since the run began"
        raise CannotTrain(message, "restore its files, or train on the new one: dropforge retry RUN")
    if start is None:
        return base
    folder = attempt.path(start.path)
    try:
        problem = "" if verify_manifest(folder) == start.model_id else f"{folder} holds another model"
    except DropforgeError as error:
        problem = error.message
    if problem:
        raise CannotTrain(
            f"the training starts from the champion of generation {start.generation}, and {problem}",
            'restore it from a backup, or set train.start = "base"; then: dropforge retry RUN',
        )
    return folder
