"""TRL's trainer as ours: what is trained, in which passes, with which loss."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pipeline.config import MemoryPlan, TrainConfig
from pipeline.errors import CannotTrain
from pipeline.models.loading import Device, arithmetic_dtype, load_model
from pipeline.train.data_parallel.sharing import Place, seed_step, summed
from pipeline.train.method import lora_config, method_arguments
from pipeline.train.methods.choice import keeping_weights, optimizer, unfreeze
from pipeline.train.passes.answer_loss import add_answer_loss, answer_tokens, has_plain_head, mean_loss
from pipeline.train.passes.lora_linear import fuse
from pipeline.train.passes.packed_attention import enable_packing
from pipeline.train.passes.packing import collate, passes
from pipeline.train.row_order import LengthGroups
from pipeline.train.watcher import dev_loss

DEV_ROWS = 20
"""Fewest dev rows worth a loss curve."""
_DEV_SHARE = 0.25
"""Of an epoch, or of a shorter training, from one measurement of the dev loss to the next."""


#: Divides what `collate` made of an optimizer step into the inputs of this process's forward passes.
Passes = Callable[[Mapping[str, Any]], list[dict[str, Any]]]


@dataclass(frozen=True)
class TokenRow:
    """One record as the trainer takes it: prompt and answer, and which of the tokens are the answer's."""

    input_ids: list[int]
    completion_mask: list[int]
    line: int = 0
    """Where it stands in train.jsonl, from 1."""


@dataclass(frozen=True)
class Training:
    """What to train, where, and where to leave the adapter and the trainer's own files."""

    base: Path
    """Folder of the model below the adapter: the base, or the champion that the training goes on from."""
    device: Device
    adapter: Path
    scratch: Path
    fingerprint: str
    memory: MemoryPlan | None = None
    """What goes before the settings, as far as memory goes; `None` leaves it to them."""
    place: Place = field(default_factory=Place)
    """This process's among those that share the training."""
    prune: Callable[[Sequence[float]], bool] | None = None
    """Says, of the dev losses so far, whether to end it; `None` ends none."""


def make_trainer(
    training: Training, tokenizer: Any, rows: Sequence[TokenRow], dev: Sequence[TokenRow], config: TrainConfig
) -> Any:
    """Load the base, put a fresh adapter on it or let its own weights be trained, and return the trainer."""
    import torch
    from transformers import AutoConfig, PrinterCallback
    from trl import SFTConfig

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
    own = config.trains_full_weights
    divide = partial(passes, batch_tokens=config.batch_tokens, packed=packed, share=training.place.share)
    make: Any = _trainer_class(lengths, config, training.place, divide, plain_head=plain_head)
    if own:
        unfreeze(model, training.base, config, training.place)
        make = keeping_weights(make)

    trainer = make(
        model=model,
        args=SFTConfig(**_arguments(training, config, mixed=mixed, has_dev=len(dev) >= DEV_ROWS)),
        train_dataset=_dataset(rows),
        eval_dataset=_dataset(dev) if len(dev) >= DEV_ROWS else None,
        processing_class=tokenizer,
        data_collator=collate,
        peft_config=None if own else lora_config(model, config),
        optimizers=(optimizer(model, config), None),
    )
    # TRL trains the adapter of a quantised base in bf16, whose steps around a weight of 0.04 are as large as an update.
    for weight in trainer.model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    fuse(trainer.model)
    add_answer_loss(trainer.model if own else trainer.model.get_base_model())
    if not plain_head or trainer.aux_loss_enabled:
        sys.stderr.write("the loss is TRL's own: this architecture scales or caps its logits, or has experts\n")
    trainer.remove_callback(PrinterCallback)
    return trainer


def _trainer_class(
    lengths: Sequence[int], config: TrainConfig, place: Place, divide: Passes, *, plain_head: bool
) -> Any:
    """Return TRL's trainer, changed where ours does otherwise, for records of these lengths."""
    import torch
    from trl import SFTTrainer

    class Trainer(SFTTrainer):  # type: ignore[misc, unused-ignore]
        """TRL's trainer, with an order of rows that survives a resume, passes by tokens, and the answers' loss."""

        loss_is_scaled_for_ga = True
        divide_step = staticmethod(divide)
        aux_loss_enabled: bool

        def _get_train_sampler(self, _dataset: Any = None) -> LengthGroups:
            return LengthGroups(lengths, config.batch_size, config.seed)

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            answers = answer_tokens(inputs["labels"])
            parts = self._passes(inputs)
            seed_step(place, config.seed, self.state.global_step)
            losses = [SFTTrainer.training_step(self, model, part, answers) for part in parts]
            return summed(place, self._sum(losses), (one for one in model.parameters() if one.requires_grad))

        def prediction_step(self, model: Any, inputs: Any, *_options: Any, **_named: Any) -> Any:
            answers = answer_tokens(inputs["labels"])
            # The loss of a router says nothing of the answers.
            trained_with, self.aux_loss_enabled = self.aux_loss_enabled, False
            with torch.no_grad(), self.compute_loss_context_manager():
                parts = self._passes(self._prepare_inputs(inputs))
                losses = [self.compute_loss(model, part, num_items_in_batch=answers) for part in parts]
            self.aux_loss_enabled = trained_with
            return summed(place, self._sum(losses)), None, None

        def _passes(self, step: Any) -> list[dict[str, Any]]:
            parts = self.divide_step(step)
            # TRL divides a router's loss by it.
            self.current_gradient_accumulation_steps = len(parts) * place.processes
            return parts

        def _sum(self, losses: list[Any]) -> Any:
            return torch.stack([torch.zeros((), device=self.args.device), *losses]).sum()

        def compute_loss(self, model: Any, inputs: Any, **options: Any) -> Any:
            if not plain_head or self.aux_loss_enabled:
                return super().compute_loss(model, inputs, **options)
            return mean_loss(model, inputs, options.get("num_items_in_batch"))

        def evaluate(self, *_args: Any, **_options: Any) -> dict[str, float]:
            metrics = {"eval_loss": dev_loss(self)}
            self.log(metrics)
            self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    return Trainer


def _arguments(training: Training, config: TrainConfig, *, mixed: bool, has_dev: bool) -> dict[str, Any]:
    """Return SFTConfig's arguments."""
    on_cuda = training.device == "cuda"
    activations = "kept" if training.memory is None else training.memory.activations
    return {
        "output_dir": str(training.scratch),
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        **method_arguments(config),
        "optim": "paged_adamw_8bit" if on_cuda else "adamw_torch_fused",
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
        "eval_steps": _DEV_SHARE / max(1.0, config.epochs),
        "prediction_loss_only": True,
        "logging_steps": 1,
        # A loss that is not a number must be seen, not replaced by the mean of its neighbours.
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "all",
        "report_to": [],
        "disable_tqdm": True,
    }


def _check_card(device: Device) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        message = f"{torch.cuda.get_device_name()} cannot compute in bf16"
        raise CannotTrain(message, 'use an Ampere card or newer, or set device = "cpu"')


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
