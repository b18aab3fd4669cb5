"""Load a model and its tokenizer from a folder: offline, safetensors only, without running the model's code."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import CannotTrain, StepFailed
from pipeline.models.gpu_driver import AMD, closed_device, nvidia_driver
from pipeline.models.memory_estimate import available_memory, free_on_gpus
from pipeline.models.placement import Quantization, gpu_map, weight_bytes
from pipeline.models.untrusted import foreign_code
from pipeline.words import count

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The libraries read these when functions import them, which is later.
_ENVIRONMENT = {
    # No network, no progress bars, no warnings.
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    # Nothing is compiled; bitsandbytes would import torch's compiler all the same, which takes most of a second.
    "TORCHDYNAMO_DISABLE": "1",
    # Steps tokenise a few thousand rows in one process; the Rust threads would only slow torch's.
    "TOKENIZERS_PARALLELISM": "false",
    # On a CPU oneDNN and torch keep the code of 1024 products, about half a MB each. Nearly every micro-batch has new
    # shapes, so that the training of a small model grows by 0.5 GB; it has some twenty, and compiles them in 6 ms.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "LRU_CACHE_CAPACITY": "128",
}
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
for _name in ("trl", "peft", "accelerate", "bitsandbytes"):
    logging.getLogger(_name).setLevel(logging.ERROR)
# The libraries cause it in each other.
warnings.filterwarnings("ignore", ".?is_gradient_checkpointing.? is deprecated", FutureWarning)

Device = Literal["cpu", "cuda"]

#: In transformers' message about weights whose size differs from config.json.
_OTHER_SIZES = "ignore_mismatched_sizes"
#: Messages of torch and the libraries below it for a lack of memory without an error class of its own.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "std::bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")
_ERROR_CHARACTERS = 200


def has_gpu() -> bool:
    """Return whether NVIDIA's driver is loaded or, if torch is built for ROCm, AMD's."""
    import torch

    return bool(nvidia_driver() or (torch.version.hip and AMD.exists()))


def is_cuda_lost() -> bool:
    """Return whether this is a fork of a process that has used CUDA: the GPU works in a new process only."""
    import torch

    return has_gpu() and torch.cuda._is_in_bad_fork()  # noqa: SLF001 - torch's own error about this comes too late


def chosen_device() -> Device:
    """
    Return the device in `$DROPFORGE_DEVICE`; for `auto`, its default, the GPU if there is one, else the CPU.

    `auto` is the CPU, too, if CUDA_VISIBLE_DEVICES hides all GPUs. Raises `StepFailed` if torch cannot use the GPU, for
    `auto` only if its driver is loaded; `CannotTrain` if the device is unknown.
    """
    import torch

    wanted = os.environ.get("DROPFORGE_DEVICE", "auto")
    if wanted not in {"auto", "cpu", "cuda"}:
        raise CannotTrain(f"unknown device {wanted!r}", 'set device to "auto", "cpu" or "cuda"')
    if wanted != "cpu" and torch.cuda.is_available():
        return "cuda"
    # With an empty CUDA_VISIBLE_DEVICES, or -1, the user has hidden the GPUs.
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"}
    if wanted == "cpu" or (wanted == "auto" and (is_hidden or not has_gpu())):
        return "cpu"
    message, remedy = _why_no_gpu()
    raise StepFailed(f"torch cannot use the GPU: {message}", f'{remedy}, or set device = "cpu"')


def _why_no_gpu() -> tuple[str, str]:
    """Return why `torch.cuda.is_available()` is false, and the remedy."""
    import torch

    if not (torch.version.cuda or torch.version.hip):
        return f"torch {torch.__version__} is built for the CPU", "install a torch that is built for CUDA"
    if closed := closed_device():
        return closed
    cuda: Any = torch.cuda
    words = "it sees no CUDA device"
    try:
        cuda.init()
    except RuntimeError as error:
        words = " ".join(str(error).split())
    return words, "see nvidia-smi, then update the driver or install a torch for its CUDA version"


def check_gpu(device: Device) -> None:
    """Raise `CannotTrain` if `device` is a GPU that cannot compute in bf16."""
    import torch

    if device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise CannotTrain(
            f"{torch.cuda.get_device_name()} cannot compute in bf16",
            'use an Ampere card or newer, or set device = "cpu"',
        )


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Return the tokenizer in `folder`. Raises `CannotTrain` if it cannot be loaded or has no EOS token."""
    from transformers import AutoTokenizer

    hint = "save the tokenizer into the folder again, with its save_pretrained"
    with foreign_code(f"the tokenizer in {folder} cannot be loaded", hint):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        message = f"the tokenizer in {folder} has no EOS token, so a model could not learn where an answer ends"
        raise CannotTrain(message, "set eos_token in tokenizer_config.json")
    return tokenizer


def load_config(folder: Path) -> Any:
    """Return transformers' configuration of the model in `folder`. Raises `OSError` or `ValueError` if it has none."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def arithmetic_dtype(device: Device) -> "torch.dtype | None":
    """
    Return float32 for a CPU without 16-bit arithmetic, otherwise `None`: compute in the model's dtype.

    Measured on a CPU with only AVX2, two cores: bfloat16 products at 0.6 GFLOP/s, float32 at 47.
    """
    import torch

    mkldnn: Any = torch.ops.mkldnn
    return torch.float32 if device == "cpu" and not mkldnn._is_mkldnn_bf16_supported() else None  # noqa: SLF001


def free_memory(device: Device, processes: int = 1, gpu: int = 0) -> int:
    """
    Return the bytes that each of `processes` processes can allocate: an equal share on a CPU.

    On GPUs, one per process from number `gpu` on, it is the free memory of the GPU that has least. Raises `StepFailed`
    if that cannot be read.
    """
    return min(free_on_gpus()[gpu : gpu + processes]) if device == "cuda" else available_memory() // processes


class OutOfMemory(StepFailed):
    """A micro-batch of the training, or a batch of prompts, did not fit into the device's memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory of the machine or the GPU ran out."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


@contextmanager
def memory_errors(
    message: str = "the model and one batch of prompts do not fit into the device's memory",
    hint: str = "free the device, or set a lower evaluate.batch_size",
) -> Iterator[None]:
    """Convert errors within the block by which memory ran out to `OutOfMemory`, a `StepFailed`; pass on others."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        words = f"{type(error).__name__}: {error}"[:_ERROR_CHARACTERS]
        raise OutOfMemory(f"{message} ({words})", hint) from error


def load_model(
    folder: Path,
    device: Device,
    quantization: Quantization = "none",
    dtype: "torch.dtype | None" = None,
    *,
    spread: bool = False,
) -> "PreTrainedModel":
    """
    Return the causal language model in `folder`, on `device`, in evaluation mode.

    Weights keep their saved dtype unless `dtype` is given; with `nf4` the linear layers are quantised to NF4 (double
    quantisation, computing in bf16 or, if that is `dtype`, in float32). With `spread` a model that does not fit on the
    first GPU is placed on all. Raises `CannotTrain` if the folder holds no such model or lacks weights, `StepFailed` if
    memory does not suffice, `RuntimeError` for other problems of the device.
    """
    model, names = _read_weights(folder, device, quantization, dtype, spread=spread)
    if names:
        # Transformers initialises these at random.
        message = f"the model in {folder} lacks {count(len(names), 'weight')} that its config.json requires: {names[0]}"
        raise CannotTrain(message, "download the model again: its config.json and its weights do not belong together")
    if "disk" in getattr(model, "hf_device_map", {}).values():
        raise _no_memory(folder)
    _keep_unpacked(model)
    model.eval()
    return model


def _read_weights(
    folder: Path, device: Device, quantization: Quantization, dtype: "torch.dtype | None", *, spread: bool
) -> tuple[Any, list[str]]:
    """Return the model, and the sorted names of weights that are not in its files. Raises as `load_model` does."""
    from transformers import AutoModelForCausalLM

    spreads = spread and device == "cuda"
    try:
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            **(gpu_map(weight_bytes(folder, quantization)) if spreads else {"device_map": {"": device}}),
            quantization_config=_nf4(dtype) if quantization == "nf4" else None,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # libraries raise errors of every kind at a damaged folder
        if is_out_of_memory(error):
            raise _no_memory(folder) from error
        if isinstance(error, RuntimeError) and _OTHER_SIZES not in str(error):
            raise  # a problem of the device that may pass: memory in use, a driver
        message = f"the model in {folder} cannot be loaded: {type(error).__name__}: {error}"[:1000]
        hint = "use a causal language model in transformers' format, saved as safetensors"
        raise CannotTrain(message, hint) from error
    return model, sorted(loading_info["missing_keys"])


def _no_memory(folder: Path) -> StepFailed:
    message = f"not enough memory to load the model in {folder}"
    return StepFailed(message, "free memory there, or use a smaller base model")


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
    Keep NF4 layers in the layout through which gradients can flow.

    On a CPU with AVX512-BF16 bitsandbytes repacks an NF4 weight for good at the first forward pass in evaluation mode,
    and the packed product passes no gradient to its input: one measurement of the dev loss would silently end learning.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - an attribute of bitsandbytes' layers
