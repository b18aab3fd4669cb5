"""Train on tokenised rows and save the result, resuming from a checkpoint where there is one."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.artifacts import CurvePoint, Frozen
from pipeline.config import TrainConfig
from pipeline.contract import Attempt, thinned
from pipeline.errors import CannotTrain, Interrupted
from pipeline.models.loading import OutOfMemory, is_out_of_memory
from pipeline.models.memory_estimate import peak_resident
from pipeline.train.checkpoints import keeper, newest_valid, step_of
from pipeline.train.methods.choice import save_trained
from pipeline.train.trainer import TokenRow, Training, make_trainer
from pipeline.train.watcher import StepRows, adapter_weights, watcher

_ERROR_CHARACTERS = 200


class Trained(Frozen):
    """The result of a training: steps, tokens, loss curves, size of the change, peak memory."""

    optimizer_steps: int
    resumed_from_step: int
    trained_tokens: int
    loss_curve: tuple[CurvePoint, ...]
    dev_curve: tuple[CurvePoint, ...]
    pruned: bool = False
    """Whether a search stopped it early because other trials did better; the adapter is saved as it was then."""
    trainable_parameters: int
    adapter_change: float
    peak_memory_bytes: int
    """Of the process that saved the adapter: allocated by torch on a GPU, else resident."""


def train_model(
    training: Training, tokenizer: Any, rows: Sequence[TokenRow], dev: Sequence[TokenRow], attempt: Attempt
) -> Trained:
    """
    Train an adapter, or the base's own weights, and save them; resume from the newest checkpoint of this training.

    Raises `Interrupted` after saving a checkpoint if the attempt was stopped, `OutOfMemory` if a micro-batch did not
    fit into memory, `StepFailed` if the base does not, and `CannotTrain` if the training diverged, no weight changed,
    or base, tokenizer, settings or GPU do not match.
    """
    import torch

    config = attempt.config.train
    writes = training.process.rank == 0
    if training.memory is not None:
        config = config.model_copy(update=training.memory.model_dump(include={"quantization", "batch_tokens"}))
    checkpoint = newest_valid(attempt.path(attempt.spec.checkpoints), training.fingerprint)
    try:
        trainer = make_trainer(training, tokenizer, rows, dev, config)
        before = adapter_weights(trainer.model)
        watch = watcher(attempt, _step_rows(trainer, rows, config))
        watch.prune = training.prune
        trainer.add_callback(watch)
        trainer.add_callback(keeper(attempt, training.scratch, training.fingerprint, training.process))
        attempt.check_stop()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        ran_out = ""
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        ran_out = f"{type(error).__name__}: {error}"
    # Outside of `except`: the error's frames keep the tensors alive, and recovering needs memory, too.
    if ran_out:
        message = f"a micro-batch does not fit into memory ({ran_out[:_ERROR_CHARACTERS]})"
        raise OutOfMemory(message, "free memory on the device, or lower train.max_length")
    state = trainer.state
    if state.global_step < state.max_steps and not watch.pruned:
        message = f"training was stopped and left a checkpoint at step {state.global_step} of {state.max_steps}"
        raise Interrupted(message)
    change = _change(before, adapter_weights(trainer.model))
    if writes:
        save_trained(trainer.model, training.adapter)
    losses = [(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry]
    return Trained(
        optimizer_steps=state.global_step,
        resumed_from_step=step_of(checkpoint) if checkpoint else 0,
        trained_tokens=int(state.num_input_tokens_seen),
        loss_curve=thinned(losses),
        dev_curve=tuple(CurvePoint(step=step, loss=loss) for step, loss in watch.dev),
        pruned=watch.pruned,
        trainable_parameters=sum(weight.numel() for weight in before.values()),
        adapter_change=change,
        peak_memory_bytes=torch.cuda.max_memory_allocated() if training.device == "cuda" else peak_resident(),
    )


def _step_rows(trainer: Any, rows: Sequence[TokenRow], config: TrainConfig) -> StepRows:
    return StepRows(trainer._get_train_sampler(), config.batch_size, [row.line for row in rows])  # noqa: SLF001 - ours


def _change(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """Return the L2 norm of the trained weights' change. Raises `CannotTrain` if it is zero or not finite."""
    squares = (float((after[name].double() - weight.double()).square().sum()) for name, weight in before.items())
    change = math.sqrt(sum(squares))
    if not math.isfinite(change):
        raise CannotTrain("training diverged: trained weights are not finite", "lower train.learning_rate")
    if change == 0:
        message = "training changed no weight: no gradient reached them"
        raise CannotTrain(message, "raise train.learning_rate or train.epochs; if they are sensible, report this")
    return change
