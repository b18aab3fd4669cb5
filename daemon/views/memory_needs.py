"""What a track's training is estimated to take of memory, beside what the machine has; nothing is loaded for it."""

from pathlib import Path

from daemon.settings.model import Settings
from pipeline.config import MemoryPlan
from pipeline.models.memory_estimate import MARGIN, available_memory, base_sizes, estimate
from pipeline.words import size_words

_DEVICES = Path("/dev")


def memory_needs(settings: Settings, track: str) -> tuple[str, bool]:
    """
    Return the estimate for a track in words, and whether the least that a training can do with is there.

    It is for records as long as they may be, on a processor with arithmetic in 16 bits. What is free on a card, only
    torch tells. Raises `OSError` or `ValueError` if the base model cannot be read.
    """
    own = settings.track(track)
    cards = len(list(_DEVICES.glob("nvidia[0-9]*")))
    is_gpu = settings.device == "cuda" or (settings.device == "auto" and cards > 0)
    base = base_sizes(Path(own.base_model))
    most = own.train.max_length * own.train.batch_size
    first = MemoryPlan(
        device="",
        quantization="none",
        batch_tokens=max(own.train.max_length, min(own.train.batch_tokens, most)),
        activations="recomputed" if is_gpu else "kept",
    )
    quantised = first.model_copy(update={"quantization": "nf4"})
    least = (first if own.train.quantization == "none" else quantised).model_copy(
        update={"batch_tokens": own.train.max_length, "activations": "recomputed"}
    )
    wide, narrow, smallest = (
        sum(estimate(base, plan, own.train, "cuda" if is_gpu else "cpu").values()) for plan in (first, quantised, least)
    )
    in_4_bits = "" if own.train.trains_full_weights else f", {size_words(narrow)} with it in 4 bits"
    text = (
        f"training takes about {size_words(wide)} with the base as it is{in_4_bits}, for "
        f"{first.batch_tokens:,} tokens a pass; {size_words(smallest)} at the least"
    )
    wanted = cards if own.train.processes == "auto" else own.train.processes
    used = min(wanted, own.train.batch_size)
    if is_gpu:
        return f"{text}, on {'the card' if used == 1 else f'each of {used} cards'}", True
    free = available_memory()
    return f"{text}; {size_words(free)} are free", smallest <= MARGIN * free
