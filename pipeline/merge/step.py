"""
The merge step: an adapter or trained weights, and the model that was trained → the model folder that is served.

The merged files have the base's headers: each tensor is computed in float32, rounded once, and written at the base's
offset, with a few rows in memory at a time. All other cases are merged with the whole model in memory, adapters by
PEFT.
"""

import errno
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import FileIO
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from pipeline import durable
from pipeline.artifacts import TRAINED_FILES, Adapter, Dataset, Model
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain, StepFailed
from pipeline.models.generation import end_tokens
from pipeline.models.loading import load_model, load_tokenizer, quiet
from pipeline.models.manifest import (
    Lineage,
    model_id,
    read_lineage,
    require_start,
    trained_ids,
    write_manifest,
    write_trained_ids,
)
from pipeline.models.safetensors_files import (
    INDEX,
    WHOLE,
    Header,
    NotSafetensorsError,
    read_header,
    read_shapes,
    weight_files,
)
from pipeline.models.template import Format, Template

if TYPE_CHECKING:
    import torch

_PHASES = 2
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_AGAIN = "train it again: dropforge retry RUN --from train"
#: Numbers merged at a time: few enough that a block stays in the CPU's cache.
_BLOCK = 1 << 18
#: Maps some rows of a base weight, and their slice, to the same rows of the merged weight.
Change = Callable[["torch.Tensor", slice], "torch.Tensor"]


class NeedsWholeModel(Exception):
    """A model or an adapter can only be merged with the whole model in memory; the message says why."""


@dataclass(frozen=True)
class Answering:
    """The merged model's default generation: greedy, as in the evaluation."""

    format: Format
    max_new_tokens: int
    repetition_penalty: float
    stops: Sequence[int]
    """Tokens that end an answer."""


def merge(attempt: Attempt) -> Model:
    """
    Merge the adapter, or the trained weights, into the model that the training started from, base or champion.

    The merged model is written to `model/` in the attempt's folder, with a manifest and a list of the records that it
    was trained on, by this run and by those of the champion it started from. Raises `StepFailed` if the adapter's file
    is missing, incomplete or has changed, `CannotTrain` if a merged weight is not finite, the base was replaced, or the
    champion's folder has changed, and `Interrupted` if stopped.
    """
    started = time.monotonic()
    adapter, dataset = attempt.load(Adapter), attempt.load(Dataset)
    base, trained = Path(attempt.config.base_model), attempt.path(adapter.folder) / TRAINED_FILES[adapter.kind]
    target = attempt.folder / "model"
    if not trained.is_file() or durable.sha256_file(trained) != adapter.adapter_sha256:
        message = f"{trained} is missing or has changed since the training"
        raise StepFailed(message, f"train it again: dropforge retry {attempt.spec.run} --from train")
    if model_id(base) != adapter.base_model_id:
        message = f"the base model {base} has changed since the training"
        raise CannotTrain(message, f"restore its files, or train on the new one: dropforge retry {attempt.spec.run}")
    start = base if adapter.start is None else require_start(attempt, adapter.start)
    lineage = None if adapter.start is None else read_lineage(start)
    tokenizer: Any = load_tokenizer(base)
    answering = Answering(
        adapter.format, dataset.max_new_tokens, attempt.config.evaluate.repetition_penalty, end_tokens(base, tokenizer)
    )
    attempt.check_stop()
    attempt.progress(0, _PHASES, phase="merge")
    dtype = merge_into(start, trained.parent if adapter.kind == "adapter" else trained, tokenizer, target, answering)
    attempt.check_stop()
    attempt.progress(1, _PHASES, phase="hash")
    rows = durable.read_jsonl(attempt.path(dataset.folder) / "train.jsonl")
    # Records that the start was trained on must never count as unseen by this model.
    write_trained_ids(target, chain((row["id"] for row in rows), trained_ids(start)))
    trainings = 1 if lineage is None else lineage.trainings + 1
    identity = write_manifest(target, Lineage(adapter.base_model_id, trainings))
    attempt.progress(_PHASES, _PHASES, phase="hash")
    return Model(
        folder=attempt.relative(target),
        model_id=identity,
        base_model_id=adapter.base_model_id,
        dtype=dtype,
        size_bytes=sum(path.stat().st_size for path in target.rglob("*") if path.is_file()),
        format=adapter.format,
        seconds=time.monotonic() - started,
    )


def merge_into(base: Path, trained: Path, tokenizer: Any, target: Path, answering: Answering) -> str:
    """
    Save the merged model in the new folder `target`; return the name of its dtype, which is the base's.

    `trained` is a PEFT adapter folder, or a safetensors file of weights that replace the base's of the same names. The
    folder contains the tokenizer, a chat template of the trained format, and a generation config as in the evaluation.
    Chat template and padding token of `tokenizer` itself may change, too. The whole model is loaded into memory if its
    files cannot be merged one by one. Raises `CannotTrain` if a merged weight is not finite, and `StepFailed` if the
    adapter's file and config differ.
    """
    generation = _generation(tokenizer, answering)
    try:
        model, config = _empty_model(base)
        headers, dtype = _check_files(base, model, config)
        changes = _replacements(trained) if trained.is_file() else _updates(model, trained)
        _check_names(changes, headers)
    except NeedsWholeModel as why:
        sys.stderr.write(f"merged with the whole model in memory: {why}\n")
        dtype = _merge_whole(base, trained, target, generation)
    else:
        target.mkdir()
        for path, header in headers.items():
            _write_merged(path, header, changes, target / path.name)
        if not (target / WHOLE).exists():
            shutil.copyfile(base / INDEX, target / INDEX)
        config.architectures, config.dtype = [type(model).__name__], dtype
        config.save_pretrained(target)
        generation.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for path in target.rglob("*.safetensors"):
        # safetensors writes files readable by their owner only; servers must read them.
        shutil.copymode(target / "config.json", path)
    return dtype


def _generation(tokenizer: Any, answering: Answering) -> Any:
    """Return the evaluation's generation config; set the tokenizer's chat template and padding token."""
    from transformers import GenerationConfig

    template = Template(tokenizer, answering.format, answering.stops).served
    if template is not None:
        tokenizer.chat_template = template
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    config: Any = GenerationConfig
    return config(
        do_sample=False,
        max_new_tokens=answering.max_new_tokens,
        repetition_penalty=float(answering.repetition_penalty),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(answering.stops),
        pad_token_id=tokenizer.pad_token_id,
    )


def _empty_model(folder: Path) -> tuple[Any, Any]:
    """
    Create the model of a folder's config with parameters on the meta device; return it and its config.

    Raises `NeedsWholeModel` if that fails, or if transformers converts such weights when it loads them.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    quiet()
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping

        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with init_empty_weights():
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        model.tie_weights()
        converted = get_model_conversion_mapping(model, add_legacy=False)
    except Exception as error:  # loading the whole model reports the error
        raise NeedsWholeModel(
            f"the model cannot be created on the meta device: {type(error).__name__}: {error}"[:500]
        ) from error
    if converted:
        raise NeedsWholeModel(f"transformers converts the weights of a {config.model_type} when it loads them")
    return model, config


def _check_files(base: Path, model: Any, config: Any) -> tuple[dict[Path, Header], str]:
    """
    Return the headers of the base's weight files, and their dtype.

    Raises `NeedsWholeModel` if a file cannot be read, the tensors are not the model's, or they have several dtypes.
    """
    try:
        headers = {path: read_header(path)[0] for path in weight_files(base)}
    except (OSError, NotSafetensorsError) as error:
        raise NeedsWholeModel(f"a weight file cannot be read: {error}") from error
    tensors = {name: tensor for header in headers.values() for name, tensor in header.items()}
    in_files = {(name, *tensor.shape) for name, tensor in tensors.items()}
    tied = model.all_tied_weights_keys
    expected = {
        (name, *held.shape) for name, held in model.named_parameters(remove_duplicate=False) if name not in tied
    }
    if in_files != expected:
        raise NeedsWholeModel(f"{min(in_files ^ expected)[0]} is not both in the base's files and in the model")
    dtype, *others = sorted({_DTYPES.get(tensor.dtype, tensor.dtype) for tensor in tensors.values()})
    is_other = config.dtype is not None and f"torch.{dtype}" != str(config.dtype)
    if others or dtype not in _DTYPES.values() or is_other:
        raise NeedsWholeModel(
            f"its weights are in {', '.join([dtype, *others])}, and its config.json says {config.dtype}"
        )
    return headers, dtype


def _check_names(changes: Mapping[str, Change], headers: Mapping[Path, Header]) -> None:
    """Raise `NeedsWholeModel` if the base's files have a changed weight under another name, as of a tied layer."""
    if strange := sorted(changes.keys() - {name for header in headers.values() for name in header}):
        raise NeedsWholeModel(f"{strange[0]} is trained, and the base's files have it under another name")


def _replacements(weights: Path) -> dict[str, Change]:
    file: Any = safe_open(weights, framework="pt")

    def replaced(name: str, block: "torch.Tensor", rows: slice) -> Any:
        return file.get_slice(name)[rows].view(block.shape)

    return {name: partial(replaced, name) for name in file.keys()}  # noqa: SIM118 - it is no dict


def _updates(model: Any, adapter: Path) -> dict[str, Change]:
    """
    Return the adapter's change of each base weight, by the weight's name.

    Raises what `check_pairs` raises, and `NeedsWholeModel` for an adapter on other than linear layers.
    """
    from peft import PeftConfig, PeftModel
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from safetensors.torch import load_file
    from torch import nn

    config: Any = PeftConfig.from_pretrained(str(adapter), local_files_only=True)
    check_pairs(PeftModel(model, config, low_cpu_mem_usage=True), adapter)
    pairs = load_file(adapter / TRAINED_FILES["adapter"])
    changes = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if type(layer) is not Linear or type(layer.base_layer) is not nn.Linear:
            kind = type(getattr(layer, "base_layer", layer)).__name__
            raise NeedsWholeModel(f"the adapter changes {name}, which is a {kind}, not linear")
        prefix = f"base_model.model.{name}"
        changes[f"{name}.weight"] = _lora(
            pairs[f"{prefix}.lora_A.weight"].float(),
            pairs[f"{prefix}.lora_B.weight"].float(),
            layer.scaling["default"],
            pairs.get(f"{prefix}.lora_magnitude_vector"),
        )
    return changes


def _lora(a: "torch.Tensor", b: "torch.Tensor", scale: float, magnitude: "torch.Tensor | None") -> Change:
    """
    Return the function that applies an adapter to rows of a linear layer's weight, of the shape (outputs, inputs).

    `a` is (rank, inputs), `b` (outputs, rank); LoRA (arXiv:2106.09685) gives W + scale B A. With DoRA
    (arXiv:2402.09353) each row of the result, an output's, is scaled to the length in `magnitude`, of the shape
    (outputs,).
    """
    import torch

    def merged(block: "torch.Tensor", rows: slice) -> "torch.Tensor":
        full = (b[rows] @ a).mul_(scale).add_(block)
        if magnitude is not None:
            full.mul_((magnitude[rows].float() / torch.linalg.norm(full, dim=1)).view(-1, 1))
        return full

    return merged


def check_pairs(model: Any, adapter: Path) -> None:
    """
    Raise `StepFailed`, naming a matrix, unless an adapter's file has exactly the matrices that its config implies.

    Names and shapes are compared. `model` is the base with the adapter in the folder `adapter`. PEFT itself only warns
    of a missing matrix, and leaves it untrained.
    """
    from peft import get_peft_model_state_dict

    parameters = dict(model.named_parameters())
    saved = get_peft_model_state_dict(model, state_dict=parameters, save_embedding_layers=False)
    implied = {(name, *held.shape) for name, held in saved.items()}
    found = {(name, *shape) for name, shape in read_shapes(adapter / TRAINED_FILES["adapter"]).items()}
    if implied != found:
        name = min(implied ^ found)[0]
        raise StepFailed(f"the adapter's file and its adapter_config.json do not agree on {name}", _AGAIN)


def _write_merged(source: Path, header: Header, changes: Mapping[str, Change], target: Path) -> None:
    """
    Copy the safetensors file `source` to `target`, with the same header, changing the weights named in `changes`.

    Raises `CannotTrain` if a number is not finite, and `OSError` if the file is truncated.
    """
    import torch

    begins = source.stat().st_size - max(tensor.data_offsets[1] for tensor in header.values())
    blocks = [
        (name, slice(first, min(first + step, count)))
        for name, tensor in header.items()
        for count, width in [((*tensor.shape, 1)[0], math.prod(tensor.shape[1:]))]
        for step in [max(1, _BLOCK // max(1, width))]
        for first in range(0, count if width else 0, step)
    ]
    with durable.open_regular(source) as file, target.open("wb", buffering=0) as out:

        def merge_block(name: str, rows: slice) -> None:
            tensor = header[name]
            width, dtype = math.prod(tensor.shape[1:]), getattr(torch, _DTYPES[tensor.dtype])
            offset = begins + tensor.data_offsets[0] + rows.start * width * dtype.itemsize
            chunk = bytearray((rows.stop - rows.start) * width * dtype.itemsize)
            if os.preadv(file.fileno(), [chunk], offset) != len(chunk):
                raise OSError(f"{source} ends within {name}")
            with torch.inference_mode():
                block = torch.frombuffer(chunk, dtype=dtype).view(-1, width)
                if name in changes:
                    block = changes[name](block, rows).to(dtype)
                _check_finite(block, name)
                _write_at(out, block.view(-1).view(torch.uint8).numpy().data, offset)

        _write_at(out, file.read(begins), 0)
        # A thread per core over blocks: threads within such small operations would mostly wait for each other.
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(merge_block, *zip(*blocks, strict=True)):
                pass
        torch.set_num_threads(threads)


def _write_at(file: FileIO, data: "bytes | memoryview", offset: int) -> None:
    """Write `data` at `offset`. Raises `OSError` if the disk takes only a part: `pwrite` then returns its length."""
    if os.pwrite(file.fileno(), data, offset) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)


def _check_finite(weight: "torch.Tensor", name: str) -> None:
    """Raise `CannotTrain` if a number of a merged weight is not finite."""
    # Twenty times as fast as `isfinite`; NaN propagates through aminmax.
    if not all(math.isfinite(end) for end in weight.aminmax()):
        raise CannotTrain(
            f"the merged weight {name} would hold numbers that are not finite",
            "lower train.learning_rate and train again",
        )


def _merge_whole(base: Path, trained: Path, target: Path, generation: Any) -> str:
    """
    Merge with the whole model in memory, an adapter by PEFT; return the dtype's name.

    Raises `CannotTrain` if a merged weight is not finite, and what `check_pairs` raises.
    """
    from peft import PeftModel
    from safetensors.torch import load_file

    model: Any = load_model(base, "cpu")
    if trained.is_file():
        own = dict(model.named_parameters(remove_duplicate=False))
        for name, numbers in load_file(trained).items():
            own[name].data = numbers.to(own[name].dtype)
            _check_finite(own[name].data, name)
    else:
        adapted: Any = PeftModel.from_pretrained(model, trained, local_files_only=True)
        check_pairs(adapted, trained)
        try:
            model = adapted.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise CannotTrain(
                f"the adapter cannot be merged: {error}", "lower train.learning_rate and train again"
            ) from error
    model.generation_config = generation
    model.save_pretrained(target, max_shard_size="5GB")
    return str(model.dtype).removeprefix("torch.")
