"""QLoRA training through TRL's SFTTrainer, on rows that are tokenised already."""

import math
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.artifacts import CurvePoint
from pipeline.config import MemoryPlan, TrainConfig
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain, Interrupted, StepFailed
from pipeline.qlora.loading import Device, arithmetic_dtype, is_out_of_memory, load_model
from pipeline.qlora.training.answer_loss import add_answer_loss, answer_tokens, has_plain_head, mean_loss
from pipeline.qlora.training.checkpoints import keeper, newest_valid, step_of
from pipeline.qlora.training.memory import OutOfMemory
from pipeline.qlora.training.packed_attention import enable_packing
from pipeline.qlora.training.packing import collate, passes
from pipeline.qlora.training.row_order import LengthGroups

if TYPE_CHECKING:
    from transformers import TrainerCallback

DEV_ROWS = 20
"""Fewest dev rows worth a loss curve."""
_CURVE_POINTS = 200
_WINDOW_STEPS = 20
_LOG_LINES = 20
_ERROR_CHARACTERS = 200


@dataclass(frozen=True)
class TokenRow:
    """One record as the trainer takes it: prompt and answer, and which of the tokens are the answer's."""

    input_ids: list[int]
    completion_mask: list[int]


@dataclass(frozen=True)
class Training:
    """What to train, where, and where to leave the adapter and the trainer's own files."""

    base: Path
    device: Device
    adapter: Path
    scratch: Path
    fingerprint: str
    memory: MemoryPlan | None = None
    """What goes before the settings, as far as memory goes; `None` leaves it to them."""


@dataclass(frozen=True)
class Trained:
    """How a training went."""

    optimizer_steps: int
    resumed_from_step: int
    skipped: tuple[str, ...]
    """Checkpoints that could not be used, each with the reason."""
    trained_tokens: int
    train_loss: float
    """Mean over all optimizer steps, in nats a token."""
    loss_curve: tuple[CurvePoint, ...]
    dev_curve: tuple[CurvePoint, ...]
    trainable_parameters: int
    adapter_change: float


def fit(
    training: Training, tokenizer: Any, rows: Sequence[TokenRow], dev: Sequence[TokenRow], attempt: Attempt
) -> Trained:
    """
    Train an adapter over the base and save it; resume from the newest valid checkpoint of the same training.

    Raises `Interrupted` after leaving a checkpoint if the attempt was asked to stop, `OutOfMemory` if a pass did not
    fit, `StepFailed` if the loss left the finite numbers, the adapter did not move or memory does not hold the base,
    `CannotTrain` if base, tokenizer or card do not fit.
    """
    config = attempt.config.train
    if training.memory is not None:
        config = config.model_copy(update=training.memory.model_dump(include={"quantization", "batch_tokens"}))
    choice = newest_valid(attempt.path(attempt.spec.checkpoints), training.fingerprint)
    checkpoint = choice.checkpoint
    if checkpoint is not None:
        sys.stderr.write(f"training goes on from checkpoint {checkpoint.name}\n")
    elif choice.skipped:
        sys.stderr.write("training begins again at step 0: no checkpoint can be used\n")
    try:
        trainer = _trainer(training, tokenizer, rows, dev, config)
        before = _adapter_weights(trainer)
        trainer.add_callback(keeper(attempt, training.scratch, training.fingerprint))
        trainer.add_callback(_watcher(attempt))
        attempt.check_stop()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        ran_out = ""
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        ran_out = f"{type(error).__name__}: {error}"
    # Not while the error is there: its frames hold all that was computed, and what comes now needs memory, too.
    if ran_out:
        message = f"memory does not hold a pass of the training ({ran_out[:_ERROR_CHARACTERS]})"
        raise OutOfMemory(message, "free memory on the device, or lower train.max_length")
    state = trainer.state
    if state.global_step < state.max_steps:
        message = f"training was asked to stop and left a checkpoint at step {state.global_step} of {state.max_steps}"
        raise Interrupted(message)
    change = _change(before, _adapter_weights(trainer))
    trainer.model.save_pretrained(training.adapter)
    (training.adapter / "README.md").unlink(missing_ok=True)
    losses = [CurvePoint(step=entry["step"], loss=entry["loss"]) for entry in state.log_history if "loss" in entry]
    return Trained(
        optimizer_steps=state.global_step,
        resumed_from_step=step_of(checkpoint) if checkpoint else 0,
        skipped=choice.skipped,
        trained_tokens=int(state.num_input_tokens_seen),
        train_loss=sum(point.loss for point in losses) / max(1, len(losses)),
        loss_curve=_thinned(losses),
        dev_curve=tuple(
            CurvePoint(step=entry["step"], loss=entry["eval_loss"])
            for entry in state.log_history
            if math.isfinite(entry.get("eval_loss", math.nan))
        ),
        trainable_parameters=sum(weight.numel() for weight in before.values()),
        adapter_change=change,
    )


def _trainer(
    training: Training, tokenizer: Any, rows: Sequence[TokenRow], dev: Sequence[TokenRow], config: TrainConfig
) -> Any:
    """Load the base, put a fresh adapter on it, and return the trainer of both."""
    import torch
    from peft import LoraConfig
    from transformers import AutoConfig, PrinterCallback
    from trl import SFTConfig, SFTTrainer

    _check_card(training.device)
    # Mixed precision is bf16's, which does not mix with float16; the merge goes into the base as it is.
    saved: Any = AutoConfig.from_pretrained(training.base, local_files_only=True, trust_remote_code=False).dtype
    single = arithmetic_dtype(training.device)
    dtype = single or (torch.bfloat16 if saved == torch.float16 else None)
    quantization: Literal["nf4", "none"] = "nf4" if config.quantization == "nf4" else "none"
    model: Any = load_model(training.base, training.device, quantization, dtype)
    _check_vocabulary(model, rows)
    plain_head = has_plain_head(model, rows[0].input_ids)
    packed = enable_packing(model, [row.input_ids for row in rows])
    # A float32 base is trained in float32: nothing in it is 16-bit or quantised, so mixed precision would only round.
    mixed = single is None and (quantization == "nf4" or model.dtype != torch.float32)
    lengths = [len(row.input_ids) for row in rows]

    class Trainer(SFTTrainer):  # type: ignore[misc, unused-ignore]
        """TRL's trainer, with an order of rows that survives a resume, passes by tokens, and the answers' loss."""

        loss_is_scaled_for_ga = True
        records_packed = packed

        def _get_train_sampler(self, _dataset: Any = None) -> LengthGroups:
            return LengthGroups(lengths, config.batch_size, config.seed)

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            answers = answer_tokens(inputs["labels"])
            parts = self._passes(inputs)
            losses = [SFTTrainer.training_step(self, model, part, answers) for part in parts]
            return torch.stack(losses).sum()

        def prediction_step(self, model: Any, inputs: Any, *_options: Any, **_named: Any) -> Any:
            answers = answer_tokens(inputs["labels"])
            with torch.no_grad(), self.compute_loss_context_manager():
                parts = self._passes(self._prepare_inputs(inputs))
                losses = [self.compute_loss(model, part, num_items_in_batch=answers) for part in parts]
            return torch.stack(losses).sum(), None, None

        def _passes(self, step: Any) -> list[dict[str, Any]]:
            parts = passes(step, config.batch_tokens, packed=packed)
            # TRL divides a router's loss by it.
            self.current_gradient_accumulation_steps = len(parts)
            return parts

        def compute_loss(self, model: Any, inputs: Any, **options: Any) -> Any:
            if not plain_head or self.aux_loss_enabled:
                return super().compute_loss(model, inputs, **options)
            return mean_loss(model, inputs, options.get("num_items_in_batch"))

    trainer = Trainer(
        model=model,
        args=SFTConfig(**_arguments(training, config, mixed=mixed, has_dev=len(dev) >= DEV_ROWS)),
        train_dataset=_dataset(rows),
        eval_dataset=_dataset(dev) if len(dev) >= DEV_ROWS else None,
        processing_class=tokenizer,
        data_collator=collate,
        peft_config=LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    # TRL trains the adapter of a quantised base in bf16, whose steps around a weight of 0.04 are as large as an update.
    for weight in trainer.model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    add_answer_loss(trainer.model.get_base_model())
    if not plain_head or trainer.aux_loss_enabled:
        sys.stderr.write("the loss is TRL's own: this architecture scales or caps its logits, or has experts\n")
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(training: Training, config: TrainConfig, *, mixed: bool, has_dev: bool) -> dict[str, Any]:
    """Return SFTConfig's arguments."""
    on_cuda = training.device == "cuda"
    activations = "kept" if training.memory is None else training.memory.activations
    return {
        "output_dir": str(training.scratch),
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "warmup_steps": config.warmup,
        "lr_scheduler_type": "cosine",
        "optim": "paged_adamw_8bit" if on_cuda else "adamw_torch",
        "bf16": mixed,
        "use_cpu": not on_cuda,
        "activation_checkpointing": activations != "kept",
        "activation_offloading": activations == "offloaded",
        "dataloader_pin_memory": on_cuda,
        "max_length": config.max_length,
        "completion_only_loss": True,
        "packing": False,
        "seed": config.seed,
        "data_seed": config.seed,
        "save_strategy": "no",
        "eval_strategy": "steps" if has_dev else "no",
        "eval_steps": 0.2,
        "prediction_loss_only": True,
        "logging_steps": 1,
        # A loss that is not a number must be seen, not replaced by the mean of its neighbours.
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "all",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _check_card(device: Device) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        message = f"{torch.cuda.get_device_name()} cannot compute in bf16"
        raise CannotTrain(message, 'use an Ampere card or newer, or set device = "cpu"')
    if device == "cuda" and torch.cuda.device_count() > 1:
        message = f"{torch.cuda.device_count()} GPUs are visible, and a training uses one"
        raise CannotTrain(message, "start the worker with CUDA_VISIBLE_DEVICES=0, or another card's number")


def _check_vocabulary(model: Any, rows: Sequence[TokenRow]) -> None:
    size = model.get_input_embeddings().weight.shape[0]
    highest = max(max(row.input_ids) for row in rows)
    if highest >= size:
        message = f"the tokenizer gives token {highest}, and the base model knows {size} tokens"
        raise CannotTrain(message, "put the base model's own tokenizer into its folder")


def _dataset(rows: Sequence[TokenRow]) -> Any:
    from datasets import Dataset, Features, List, Value

    columns = {
        "input_ids": [row.input_ids for row in rows],
        "completion_mask": [row.completion_mask for row in rows],
    }
    features = Features({"input_ids": List(Value("int32")), "completion_mask": List(Value("int8"))})
    return Dataset.from_dict(columns, features=features)


def _watcher(attempt: Attempt) -> "TrainerCallback":
    """Return the callback that reports each optimizer step, and fails the step when the loss leaves the numbers."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        """Turns the trainer's log into progress."""

        def __init__(self) -> None:
            self.marks: deque[tuple[float, int, int]] = deque(maxlen=_WINDOW_STEPS + 1)

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.marks.append((time.monotonic(), state.global_step, int(state.num_input_tokens_seen)))
            attempt.progress(state.global_step, state.max_steps, phase="train")

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            loss = (logs or {}).get("loss", (logs or {}).get("eval_loss"))
            if loss is None:
                return
            if not math.isfinite(loss):
                message = f"training diverged: the loss at step {state.global_step} is {loss}"
                raise StepFailed(message, "lower train.learning_rate")
            if "loss" not in logs:
                sys.stderr.write(f"step {state.global_step}: dev loss {loss:.4f}\n")
                return
            self.marks.append((time.monotonic(), state.global_step, int(state.num_input_tokens_seen)))
            (began, first, tokens), (now, last, seen) = self.marks[0], self.marks[-1]
            elapsed = max(now - began, 1e-9)
            attempt.progress(
                state.global_step,
                state.max_steps,
                phase="train",
                loss=loss,
                tokens_per_second=(seen - tokens) / elapsed,
                eta_seconds=elapsed / max(1, last - first) * (state.max_steps - last),
            )
            if state.global_step % max(1, state.max_steps // _LOG_LINES) == 0:
                sys.stderr.write(f"step {state.global_step} of {state.max_steps}: loss {loss:.4f}\n")

    return Watcher()


def _adapter_weights(trainer: Any) -> Mapping[str, Any]:
    """Return copies of the trainable weights in float32, on the CPU."""
    named = trainer.model.named_parameters()
    return {name: weight.detach().float().cpu().clone() for name, weight in named if weight.requires_grad}


def _change(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """Return the L2 norm of the adapter's change. Raises `StepFailed` if it is zero or not finite."""
    squares = (float((after[name].double() - weight.double()).square().sum()) for name, weight in before.items())
    change = math.sqrt(sum(squares))
    if not math.isfinite(change):
        message = "training diverged: the adapter holds numbers that are not finite"
        raise StepFailed(message, "lower train.learning_rate")
    if change == 0:
        message = "training left the adapter as it was: no gradient reached it"
        raise StepFailed(message, "raise train.learning_rate or train.epochs; if they are sensible, report this")
    return change


def _thinned(points: Sequence[CurvePoint]) -> tuple[CurvePoint, ...]:
    """Return at most `_CURVE_POINTS` points: the mean loss of equal spans, each at its last step."""
    span = math.ceil(len(points) / _CURVE_POINTS) or 1
    groups = [points[start : start + span] for start in range(0, len(points), span)]
    return tuple(CurvePoint(step=g[-1].step, loss=sum(point.loss for point in g) / len(g)) for g in groups)
