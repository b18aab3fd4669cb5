"""
A merge that holds one weight at a time: a model whose weights stay in its files, and what was trained in a new folder.

An adapter's mathematics are PEFT's own, in its own layers; only where the numbers come from is ours. What PEFT can do
beyond a LoRA, rsLoRA or DoRA on plain linear layers raises `CannotStream`. Weights of the base's own that were trained
take their place.
"""

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import durable
from pipeline.errors import CannotTrain, StepFailed
from pipeline.model_folder.safetensors_files import NotSafetensorsError, header_bytes, read_header
from pipeline.model_folder.text_files import try_read_object
from pipeline.qlora.loading import quiet
from pipeline.regular_files import open_regular
from pipeline.wording import count

if TYPE_CHECKING:
    import torch
    from peft.tuners.lora.layer import Linear

ADAPTER_FILE = "adapter_model.safetensors"
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
#: Numbers that are merged, or read, at a time: few enough that a block stays in the processor's cache.
_BLOCK = 1 << 18
_LENGTH_BYTES = 8
#: What an adapter's config may say other than PEFT's defaults. Everything else may change what a merge has to do.
_OPTIONS = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    "inference_mode",
}
_PLAIN_INITS = (True, False, "gaussian")


class CannotStream(Exception):
    """Why a model or an adapter has to be merged by PEFT, with the whole model in memory."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: `begin` is the place of its first byte, `dtype` torch's name of its type."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def width(self) -> int:
        """Numbers in a row; a vector has one in each."""
        return math.prod(self.shape[1:])

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]

    def blocks(self, rows: int) -> "Iterator[torch.Tensor]":
        """Yield some rows at a time, flat, as they are stored; the next ones take their place. Raises `OSError`."""
        import torch

        left = math.prod(self.shape)
        count = max(1, min(left, rows * self.width))
        chunk = bytearray(count * _ITEM_BYTES[self.dtype])
        numbers = torch.frombuffer(chunk, dtype=getattr(torch, self.dtype))
        with open_regular(self.path) as file:
            file.seek(self.begin)
            while left:
                block = numbers[: min(left, count)]
                left -= len(block)
                if file.readinto(memoryview(chunk)[: block.nbytes]) != block.nbytes:
                    raise OSError(f"{self.path} ends within {self.name}")
                yield block

    def rounded(self, dtype: str) -> Iterator[memoryview]:
        """Yield the bytes of the numbers rounded to `dtype`. Raises `StepFailed` if one is not finite in it."""
        import torch

        for block in self.blocks(max(1, _BLOCK // self.width)):
            yield _bytes_of(block.to(getattr(torch, dtype)), self.name)

    def read(self) -> "torch.Tensor":
        """Return the tensor in float32. Raises `OSError` if the file ends too early."""
        import torch

        made = torch.empty(self.shape, dtype=torch.float32)
        rest = made.view(-1)
        for block in self.blocks(max(1, _BLOCK // self.width)):
            rest[: len(block)].copy_(block)
            rest = rest[len(block) :]
        return made


@dataclass(frozen=True)
class Streamed:
    """A model that holds no weights: each layer reads its own, in float32, while it computes."""

    model: Any
    """transformers' model, or PEFT's around it; its parameters are on the device `meta`."""
    config: Any
    """As transformers read it from the folder."""
    base: Mapping[str, Stored]
    """The base's weights by name, in the order of the files; all of one dtype."""
    sources: "Mapping[torch.nn.Parameter, Stored]"
    """Where each parameter of the model lies, those of the adapter and the trained ones among them."""
    trained: Mapping[str, Stored] = dataclasses.field(default_factory=dict)
    """Tensors in the place of the base's of the same name, of any dtype."""

    @property
    def dtype(self) -> str:
        """The base's dtype."""
        return next(iter(self.base.values())).dtype

    def layers(self) -> "dict[str, Linear]":
        """Return PEFT's layers by the name of the base's weight that each changes."""
        return {self.sources[layer.base_layer.weight].name: layer for layer in lora_layers(self.model).values()}


def open_streamed(folder: Path, adapter: Path | None = None, weights: Path | None = None) -> Streamed:
    """
    Return the model in `folder`, with an adapter on it, or with trained weights in it, without reading its weights.

    Raises `CannotStream` if this takes the whole model. That what was trained is whole is not asked here.
    """
    model, config = _empty_model(folder)
    base = _stored(*weight_files(folder))
    trained = _stored(weights) if weights else {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    own = parameters.keys() - model.all_tied_weights_keys.keys()
    if base.keys() != own:
        raise CannotStream(f"{min(base.keys() ^ own)} is not both in the base's files and in the model")
    dtypes = {tensor.dtype for tensor in base.values()}
    if len(dtypes) > 1 or (config.dtype and f"torch.{min(dtypes)}" != str(config.dtype)):
        raise CannotStream(f"its weights are in {', '.join(sorted(dtypes))}, and its config.json says {config.dtype}")
    sources = {parameters[name]: trained.get(name, tensor) for name, tensor in base.items()}
    if adapter is not None:
        model = _adapted(model, adapter)
        pairs = _stored(adapter / ADAPTER_FILE)
        sources |= {parameter: pairs[name] for name, parameter in saved_as(model).items() if name in pairs}
    for parameter, tensor in sources.items():
        if tuple(parameter.shape) != tensor.shape:
            raise CannotStream(f"{tensor.name} has the shape {tensor.shape} in {tensor.path.name}")
    model.eval()
    streamed = Streamed(model, config, base, sources, trained)
    _read_while_computing(streamed)
    return streamed


def write_merged(streamed: Streamed, target: Path, shard_bytes: int) -> None:
    """
    Write the weights of base and what was trained to the folder `target`: computed in float32, rounded once.

    A file holds `shard_bytes` at most, or one weight; several have an index. Raises `CannotTrain` if a merged weight is
    not finite, `StepFailed` if a pair was left over.
    """
    left = streamed.layers()
    shards = _shards(streamed.base.values(), shard_bytes)
    jobs = []
    for file, tensors in shards.items():
        head = _header(tensors)
        (target / file).write_bytes(head)
        begins = itertools.accumulate((tensor.size for tensor in tensors), initial=len(head))
        for tensor, place in zip(tensors, begins, strict=False):
            jobs.append((streamed, tensor, left.pop(tensor.name, None), target / file, place))
    with _threads() as pool:
        for done in [pool.submit(_write, *job) for job in jobs]:
            done.result()
    if left:
        message = f"{count(len(left), 'pair')} of the adapter not merged, that of {min(left)} among them"
        raise StepFailed(message, "report this")
    if len(shards) > 1:
        size = sum(tensor.size for tensor in streamed.base.values())
        places = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
        durable.write_json(target / _INDEX, {"metadata": {"total_size": size}, "weight_map": places})


@contextmanager
def _threads() -> Iterator[Executor]:
    """Give each of the processor's cores weights of its own, rather than a part of each weight; at most four."""
    import torch

    cores = torch.get_num_threads()
    pool = ThreadPoolExecutor(min(cores, 4), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)


def _write(streamed: Streamed, tensor: Stored, layer: "Linear | None", path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        source = streamed.trained.get(tensor.name, tensor)
        file.writelines(source.rounded(tensor.dtype) if layer is None else _merged(streamed, layer))


def _shards(tensors: Iterable[Stored], most: int) -> dict[str, list[Stored]]:
    """Return which tensors go into which file, by transformers' names for them."""
    groups: list[list[Stored]] = [[]]
    room = most
    for tensor in tensors:
        if groups[-1] and tensor.size > room:
            groups.append([])
            room = most
        groups[-1].append(tensor)
        room -= tensor.size
    if len(groups) == 1:
        return {_WHOLE: groups[0]}
    return {f"model-{number:05}-of-{len(groups):05}.safetensors": group for number, group in enumerate(groups, 1)}


def _empty_model(folder: Path) -> tuple[Any, Any]:
    """Return the model of a folder's config, without weights and to compute in float32, and the config."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    quiet()
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping

        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        # Buffers are computed, not saved: they have to be there.
        with init_empty_weights(include_buffers=False):
            model: Any = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False
            )
        model.tie_weights()
        converted = get_model_conversion_mapping(model, add_legacy=False)
    except Exception as error:  # whatever it is, loading the whole model words it
        raise CannotStream(f"the model cannot be laid out: {type(error).__name__}: {error}"[:500]) from error
    if converted:
        raise CannotStream(f"transformers converts the weights of a {config.model_type} when it loads them")
    return model, config


def weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers loads: the whole one, or those that the index names."""
    if (folder / _WHOLE).is_file():
        return [folder / _WHOLE]
    shards = (try_read_object(folder / _INDEX) or {}).get("weight_map")
    if not isinstance(shards, dict):
        raise CannotStream(f"the folder has neither {_WHOLE} nor an index")
    return [folder / Path(str(name)).name for name in sorted(set(shards.values()))]


def _stored(*files: Path) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for path in files:
        try:
            header, length = read_header(path)
        except (OSError, NotSafetensorsError) as error:
            raise CannotStream(f"{path.name} cannot be read: {error}") from error
        for name, entry in sorted(header.items(), key=lambda item: int(item[1]["data_offsets"][0])):
            if entry["dtype"] not in _DTYPES or name in found:
                raise CannotStream(f"{name} is of the type {entry['dtype']}, or in two files")
            begin = _LENGTH_BYTES + length + entry["data_offsets"][0]
            found[name] = Stored(name, path, _DTYPES[entry["dtype"]], tuple(entry["shape"]), begin)
    return found


def _adapted(model: Any, adapter: Path) -> Any:
    """Return PEFT's model of `model` and an adapter, both without weights."""
    from peft import LoraConfig, PeftConfig, PeftModel
    from peft.tuners.lora.layer import Linear
    from torch import nn

    config: Any = PeftConfig.from_pretrained(str(adapter), local_files_only=True)
    if type(config) is not LoraConfig:
        raise CannotStream(f"the adapter is a {config.peft_type}, no LoRA")
    plain = LoraConfig()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        known = field.name in _OPTIONS or (field.name == "init_lora_weights" and value in _PLAIN_INITS)
        if not known and value != getattr(plain, field.name):
            raise CannotStream(f"the adapter's {field.name} is {value!r}"[:200])
    model = PeftModel(model, config, low_cpu_mem_usage=True)
    for name, layer in lora_layers(model).items():
        if type(layer) is not Linear or type(layer.base_layer) is not nn.Linear:
            raise CannotStream(f"the adapter changes {name}, which is a {type(layer.base_layer).__name__}, not linear")
    return model


def lora_layers(model: Any) -> dict[str, Any]:
    """Return PEFT's layers in a model by their names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def saved_as(model: Any) -> "dict[str, torch.nn.Parameter]":
    """Return a PEFT model's adapter by the names that PEFT saves it under."""
    from peft import get_peft_model_state_dict

    parameters = dict(model.named_parameters())
    return dict(get_peft_model_state_dict(model, state_dict=parameters, save_embedding_layers=False))


Place = tuple["torch.nn.Module", str, "torch.nn.Parameter"]


def _places(*modules: "torch.nn.Module") -> list[Place]:
    """Return where parameters stand that are modules' own."""
    return [(module, name, held) for module in modules for name, held in module.named_parameters(recurse=False)]


def _read_while_computing(streamed: Streamed) -> None:
    """Let each module read its weights before its forward pass and let go of them after it; PEFT's layers as one."""
    layers = set(lora_layers(streamed.model).values())
    within = {part for layer in layers for part in layer.modules()}
    for module in streamed.model.modules():
        parts = list(module.modules()) if module in layers else [] if module in within else [module]
        if places := _places(*parts):
            module.register_forward_pre_hook(lambda _, __, places=places: _read(streamed, places))
            module.register_forward_hook(lambda _, __, ___, places=places: _empty(places), always_call=True)


def _read(streamed: Streamed, places: Iterable[Place]) -> None:
    _fill((place, streamed.sources[place[2]].read()) for place in places)


def _fill(values: "Iterable[tuple[Place, torch.Tensor]]") -> None:
    import torch

    for (module, name, _), numbers in values:
        setattr(module, name, torch.nn.Parameter(numbers, requires_grad=False))


def _empty(places: Iterable[Place]) -> None:
    for module, name, held in places:
        setattr(module, name, held)


def _merged(streamed: Streamed, layer: "Linear") -> Iterator[memoryview]:
    """
    Yield the bytes of a layer's merged weight in the base's dtype, a block of rows at a time.

    Rows are outputs: each needs its row of the weight, of `lora_B` and of DoRA's magnitudes, and all of `lora_A`.
    """
    import torch

    weight = streamed.sources[layer.base_layer.weight]
    dtype: torch.dtype = getattr(torch, weight.dtype)
    base = (layer.base_layer, "weight", layer.base_layer.weight)
    inputs = _places(*layer.lora_A.values())
    outputs = _places(*layer.lora_B.values(), *layer.lora_magnitude_vector.values())
    _fill((place, streamed.sources[place[2]].read()) for place in inputs)
    by_row = [(place, streamed.sources[place[2]].read()) for place in outputs]
    step = max(1, _BLOCK // weight.width)
    for number, block in enumerate(weight.blocks(step)):
        rows = slice(number * step, (number + 1) * step)
        _fill([(base, block.float().view(-1, weight.width)), *((place, own[rows]) for place, own in by_row)])
        with torch.inference_mode():
            layer.merge()
            rounded = layer.base_layer.weight.data.to(dtype)
        # Of what it merged the layer keeps notes, for an unmerge that never comes.
        layer.merged_adapters.clear()
        layer._caches.clear()  # noqa: SLF001 - it has no way of its own to forget
        yield _bytes_of(rounded, weight.name)
    _empty([base, *inputs, *outputs])


def _bytes_of(rounded: Any, name: str) -> memoryview:
    """Return the bytes of some rows of a merged weight. Raises `CannotTrain` if a number in them is not finite."""
    import torch

    with torch.inference_mode():
        # Twenty times as fast as to ask each number; one that is no number comes through.
        finite = all(math.isfinite(end) for end in rounded.aminmax())
    if not finite:
        message = f"what was trained cannot be merged: {name} would hold numbers that are not finite"
        raise CannotTrain(message, "lower train.learning_rate and train again")
    return memoryview(rounded.view(-1).view(torch.uint8).numpy())


def _header(tensors: Iterable[Stored]) -> bytes:
    """Return the head of a safetensors file of these tensors, one after the other."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    entries: dict[str, Any] = {}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.size
        entries[tensor.name] = {"dtype": names[tensor.dtype], "shape": tensor.shape, "data_offsets": (begin, end)}
    return header_bytes(entries)
