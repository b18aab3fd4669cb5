"""
The merge step: an adapter or trained weights, and the model that was trained → the model folder that is served.

A program that reads the base reads the result: config and tokenizer are the base's files, and the weight files have the
base's names and headers. Each tensor is computed in float32, rounded once, and written at the base's offset, with a few
rows in memory at a time. What cannot be merged so is merged with the whole model in memory, adapters by PEFT.
"""

import errno
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
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
from pipeline.models.generation import load_template
from pipeline.models.loading import load_model, quiet
from pipeline.models.manifest import (
    Lineage,
    model_files,
    model_id,
    read_lineage,
    require_start,
    trained_ids,
    write_manifest,
    write_trained_ids,
)
from pipeline.models.safetensors_files import INDEX, WHOLE, Header, read_header, weight_files
from pipeline.models.template import Template
from pipeline.models.untrusted import is_text, parse_json, read_bytes

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
    template = load_template(base, adapter.format)
    attempt.check_stop()
    attempt.progress(0, _PHASES, phase="merge")
    dtype = merge_into(start, trained.parent if adapter.kind == "adapter" else trained, target)
    copy_texts(base, target, template.served)
    _generation(template, attempt.config.evaluate.repetition_penalty).save_pretrained(target)
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


def merge_into(base: Path, trained: Path, target: Path) -> str:
    """
    Write the merged weights to files in the new folder `target`, named as the base's; return their dtypes' names.

    `trained` is a PEFT adapter folder, or a safetensors file of weights that replace the base's of the same names. The
    whole model is loaded into memory if the changed weights are not in the base's files under their names. Raises
    `CannotTrain` if a merged weight is not finite or not in the base's files, and `StepFailed` if the adapter's file
    and config differ.
    """
    headers = {path: read_header(path)[0] for path in weight_files(base)}
    tensors = {name: tensor for header in headers.values() for name, tensor in header.items()}
    try:
        changes = _changes(base, trained, tensors)
    except NeedsWholeModel as why:
        sys.stderr.write(f"merged with the whole model in memory: {why}\n")
        changes = _changes_of_whole(base, trained, tensors)
    target.mkdir()
    for path, header in headers.items():
        _write_merged(path, header, changes, target / path.name)
    if not (target / WHOLE).exists():
        shutil.copyfile(base / INDEX, target / INDEX)
    return ", ".join(sorted({_DTYPES[tensor.dtype] for tensor in tensors.values() if tensor.dtype in _DTYPES}))


def _generation(template: Template, repetition_penalty: float) -> Any:
    """Return the generation config: greedy as in the evaluation, but without its limit of an answer's length."""
    from transformers import GenerationConfig

    config: Any = GenerationConfig
    return config(
        do_sample=False,
        repetition_penalty=float(repetition_penalty),
        bos_token_id=template.tokenizer.bos_token_id,
        eos_token_id=list(template.ends),
        pad_token_id=template.tokenizer.pad_token_id,
    )


def copy_texts(base: Path, target: Path, template: str | None) -> None:
    """
    Copy the base's config and tokenizer files to the folder `target`; a `template` replaces the base's chat templates.

    Raises `OSError` if a file is not a regular one, or larger than `read_bytes` allows.
    """
    for path in model_files(base):
        name = path.relative_to(base).as_posix()
        replaced = template is not None and "chat_template" in name
        if not is_text(path) or replaced or name == "generation_config.json" or name.endswith(".index.json"):
            continue
        data = read_bytes(path)
        if template is not None and name == "tokenizer_config.json" and "chat_template" in (config := parse_json(data)):
            # llama.cpp's converter prefers this template to that in chat_template.jinja.
            del config["chat_template"]
            data = json.dumps(config, indent=2).encode()
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(data)
    if template is not None:
        (target / "chat_template.jinja").write_text(template, encoding="utf-8")


def _changes(base: Path, trained: Path, tensors: Header) -> dict[str, Change]:
    """
    Return the change of each trained weight, and of those tied to it, by name; `tensors` are the base's.

    Raises `NeedsWholeModel` if the model cannot be created on the meta device, if transformers converts such weights
    when it loads them, or if a trained weight is not in the base's files under its name and shape; and as `_updates`.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    quiet()
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping

        config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
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
    shapes = {name: list(weight.shape) for name, weight in model.named_parameters(remove_duplicate=False)}
    tied: Mapping[str, str] = model.all_tied_weights_keys
    changes = _replacements(trained) if trained.is_file() else _updates(model, trained)
    for name in changes:
        if name in tied or name not in tensors or tensors[name].shape != shapes[name]:
            raise NeedsWholeModel(f"{name} is trained, and the base's files have it under another name or shape")
    return changes | {name: changes[source] for name, source in tied.items() if source in changes}


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
    found = {(name, *held.shape) for name, held in read_header(adapter / TRAINED_FILES["adapter"])[0].items()}
    if implied != found:
        name = min(implied ^ found)[0]
        raise StepFailed(f"the adapter's file and its adapter_config.json do not agree on {name}", _AGAIN)


def _write_merged(source: Path, header: Header, changes: Mapping[str, Change], target: Path) -> None:
    """
    Copy the safetensors file `source` to `target`, with the same header, changing the weights named in `changes`.

    Raises `CannotTrain` if a number is not finite, and `OSError` if the file is truncated.
    """
    import torch

    begins = source.stat().st_size - max((tensor.data_offsets[1] for tensor in header.values()), default=0)
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
            begin, end = tensor.data_offsets
            row_bytes = (end - begin) // (*tensor.shape, 1)[0]
            offset = begins + begin + rows.start * row_bytes
            chunk = bytearray((rows.stop - rows.start) * row_bytes)
            if os.preadv(file.fileno(), [chunk], offset) != len(chunk):
                raise OSError(f"{source} ends within {name}")
            dtype = getattr(torch, _DTYPES.get(tensor.dtype, "uint8"))  # masks and positions are copied
            with torch.inference_mode():
                block = torch.frombuffer(chunk, dtype=dtype).view(rows.stop - rows.start, -1)
                if dtype.is_floating_point and name in changes:
                    block = changes[name](block, rows).to(dtype)
                # Twenty times as fast as `isfinite`; NaN propagates through aminmax.
                if not all(math.isfinite(end) for end in block.aminmax()):
                    message = f"the merged weight {name} would hold numbers that are not finite"
                    raise CannotTrain(message, "lower train.learning_rate and train again")
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


def _changes_of_whole(base: Path, trained: Path, tensors: Header) -> dict[str, Change]:
    """
    Merge with the whole model in memory, an adapter by PEFT; return all weights as changes, by their names in files.

    Raises `CannotTrain` if a weight has no place in the base's files, and what `check_pairs` raises.
    """
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers.core_model_loading import revert_weight_conversion

    model: Any = load_model(base, "cpu")
    if trained.is_file():
        own = dict(model.named_parameters(remove_duplicate=False))
        for name, numbers in load_file(trained).items():
            own[name].data = numbers.to(own[name].dtype)
    else:
        adapted: Any = PeftModel.from_pretrained(model, trained, local_files_only=True)
        check_pairs(adapted, trained)
        model = adapted.merge_and_unload()
    prefix = f"{model.base_model_prefix}."  # some files, as GPT-2's, leave it out
    merged = {
        short if (short := name.removeprefix(prefix)) in tensors else name: weight
        for name, weight in revert_weight_conversion(model, model.state_dict()).items()
    }
    # Of tied weights one name is enough.
    placed = {weight.data_ptr() for name, weight in merged.items() if name in tensors}
    for name, weight in merged.items():
        if weight.data_ptr() not in placed or (name in tensors and tensors[name].shape != list(weight.shape)):
            message = f"the base's files have the weight {name} under another name or shape, so it cannot be merged"
            raise CannotTrain(message, "save the base again with transformers' save_pretrained, and train on that")

    def taken(weight: torch.Tensor, block: torch.Tensor, rows: slice) -> torch.Tensor:
        new = weight[rows]
        # What did not change keeps the precision that it has in the base's files.
        return torch.where(block.to(new.dtype) == new, block, new.to(block.dtype))

    return {name: partial(taken, weight.reshape((*weight.shape, 1)[0], -1)) for name, weight in merged.items()}
