"""Base model and tokenizer from a folder: offline, safetensors only, no code of the model's own."""

import logging
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import CannotTrain, StepFailed
from pipeline.models.memory_estimate import MARGIN, available_memory
from pipeline.models.untrusted_code import foreign_code
from pipeline.words import count, size_words

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The libraries read these when they are imported, in functions, which is later than this: no network, no progress bars.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
# Steps tokenise a few thousand rows in one process; the Rust threads would only slow torch's.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

Device = Literal["cpu", "cuda"]

#: What transformers says of weights that are not as large as config.json has it.
_OTHER_SIZES = "ignore_mismatched_sizes"
#: What the libraries say to each other: peft asks transformers by names that transformers is giving up.
_THEIR_QUARRELS = (".?is_gradient_checkpointing.? is deprecated",)
#: What torch and the libraries below it say where memory could not be had, when that is no error of its own kind.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "std::bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")


def quiet() -> None:
    """Turn the libraries' progress bars and advice off; a step says by itself how far it is."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for name in ("trl", "peft", "accelerate", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in _THEIR_QUARRELS:
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)


def chosen_device() -> Device:
    """
    Return the device of this step: `$DROPFORGE_DEVICE`, where `auto` (the default) takes CUDA if there is one.

    Raises `CannotTrain` if CUDA is asked for and torch sees none, or if the word is unknown.
    """
    import torch

    wanted = os.environ.get("DROPFORGE_DEVICE", "auto")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda":
        if not torch.cuda.is_available():
            message = "device is cuda, and torch sees no CUDA device"
            raise CannotTrain(message, 'check nvidia-smi and that torch was installed with CUDA, or set device = "cpu"')
        return "cuda"
    if wanted == "cpu":
        return "cpu"
    raise CannotTrain(f"unknown device {wanted!r}", 'set device to "auto", "cpu" or "cuda"')


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Return the tokenizer saved in `folder`. Raises `CannotTrain` if there is none that can be used."""
    from transformers import AutoTokenizer

    quiet()
    hint = "save the tokenizer into the folder again, with its save_pretrained"
    with foreign_code(f"the tokenizer in {folder} cannot be loaded", hint):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        message = f"the tokenizer in {folder} has no EOS token, so a model could not learn where an answer ends"
        raise CannotTrain(message, "name its eos_token in tokenizer_config.json")
    return tokenizer


def arithmetic_dtype(device: Device) -> "torch.dtype | None":
    """
    Return float32 for a processor that has no arithmetic in 16 bits; `None` where a model's own dtype will do.

    Measured on a processor with AVX2 alone, two cores: products of bfloat16 at 0.6 GFLOP/s, of float32 at 47.
    """
    import torch

    mkldnn: Any = torch.ops.mkldnn
    return torch.float32 if device == "cpu" and not mkldnn._is_mkldnn_bf16_supported() else None  # noqa: SLF001


def free_memory(device: Device) -> int:
    """Return the bytes that the device has left."""
    import torch

    return int(torch.cuda.mem_get_info()[0]) if device == "cuda" else available_memory()


class OutOfMemory(StepFailed):
    """The device's memory did not hold a pass of the training, or a batch of prompts."""


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error is the machine's or the card's want of memory; torch tells it in several ways."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def load_model(
    folder: Path,
    device: Device,
    quantization: Literal["nf4", "none"] = "none",
    dtype: "torch.dtype | None" = None,
    *,
    offload: bool = False,
) -> "PreTrainedModel":
    """
    Return the causal language model in `folder`, on `device`, in evaluation mode.

    Weights keep the dtype that they are saved in unless `dtype` is given; with `nf4` the linear layers are quantised to
    4 bits (double quantisation, computing in bf16 or, if that is `dtype`, in float32). With `offload` the weights that
    memory does not hold are read from the files in each pass, but if `dtype` is given. Raises `CannotTrain` if the
    folder holds no such model, `StepFailed` if memory does not suffice.
    """
    from transformers import AutoModelForCausalLM

    quiet()
    try:
        model, told = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            **_places(folder, device, offload=offload and dtype is None),
            quantization_config=_nf4(dtype) if quantization == "nf4" else None,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # libraries raise errors of every kind at a damaged folder
        if is_out_of_memory(error):
            message = f"not enough memory to load the model in {folder}"
            raise StepFailed(message, "free memory there, or use a smaller base model") from error
        if isinstance(error, RuntimeError) and _OTHER_SIZES not in str(error):
            raise  # the device's trouble, which may pass: memory that is in use, a driver
        message = f"the model in {folder} cannot be loaded: {type(error).__name__}: {error}"[:1000]
        hint = "use a causal language model in transformers' format, saved as safetensors"
        raise CannotTrain(message, hint) from error
    _refuse_made_up(folder, told)
    _keep_unpacked(model)
    model.eval()
    return model


def _places(folder: Path, device: Device, *, offload: bool) -> dict[str, Any]:
    """Return what tells transformers where the weights go: on the device, or half of it full and the rest on disk."""
    weights, free = sum(path.stat().st_size for path in folder.glob("*.safetensors")), free_memory(device)
    if not offload or weights <= MARGIN * free:
        return {"device_map": {"": device}}
    sys.stderr.write(f"{size_words(weights)} of weights, {size_words(free)} of memory: most are read in each pass\n")
    # The other half is for keys, values and logits.
    return {"device_map": "auto", "max_memory": {0 if device == "cuda" else "cpu": free // 2, "disk": weights}}


def _refuse_made_up(folder: Path, told: Mapping[str, Any]) -> None:
    """Raise `CannotTrain` if weights were missing, which the library makes up at random."""
    names = sorted(told["missing_keys"])
    if names:
        lacks = count(len(names), "weight")
        message = f"the model in {folder} lacks {lacks} that its config.json speaks of: {names[0]}"
        raise CannotTrain(message, "get the model anew: its config.json and its weights are not of one model")


def _nf4(dtype: "torch.dtype | None") -> object:
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32 if dtype == torch.float32 else torch.bfloat16,
    )


def _keep_unpacked(model: "torch.nn.Module") -> None:
    """
    Keep 4-bit layers in the layout that can be trained through.

    On a CPU with AVX512-BF16 bitsandbytes repacks a 4-bit weight for good at the first forward pass in evaluation mode,
    and the packed product passes no gradient to its input: one look at the dev loss would silently end the training.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - an attribute of bitsandbytes' layers
