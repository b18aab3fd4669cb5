"""Make TRL's trainer with this project's row order, micro-batches and completion-only loss."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.artifacts import MemoryPlan
from pipeline.config import TrainConfig
from pipeline.errors import CannotTrain
from pipeline.models.loading import Device, arithmetic_dtype, check_gpu, load_model
from pipeline.models.memory_estimate import has_8_bit_moments
from pipeline.train.answer_loss import add_answer_loss, answer_tokens, has_plain_head, mean_loss
from pipeline.train.base_weights import keeping_weights, optimizer, unfreeze
from pipeline.train.data_parallel import ProcessRank, seed_step, summed
from pipeline.train.lora import lora_config
from pipeline.train.packing import LengthGroups, collate, enable_packing, micro_batches
from pipeline.train.watcher import dev_loss

DEV_ROWS = 20
"""Fewest dev rows for which a dev loss is measured."""
_DEV_SHARE = 0.25
"""The dev loss is measured at each such share of an epoch, or of a training shorter than an epoch."""


#: Divides the output of `collate` for an optimizer step into the inputs of this process's micro-batches.
Divide = Callable[[Mapping[str, Any]], list[dict[str, Any]]]


@dataclass(frozen=True)
class TokenRow:
    """A tokenised record: prompt and answer, and a mask of the answer's tokens."""

    input_ids: list[int]
    completion_mask: list[int]
    line: int = 0
    """Line number in train.jsonl, from 1."""


@dataclass(frozen=True)
class Training:
    """All that a training depends on but the tokenizer: base, device, rows, settings, memory plan, output folders."""

    base: Path
    """Folder of the model that is trained: the base, or the champion that the training starts from."""
    device: Device
    rows: Sequence[TokenRow]
    dev: Sequence[TokenRow]
    config: TrainConfig
    """The settings, with numbers for "auto"; those of memory are in `plan`."""
    plan: MemoryPlan
    adapter: Path
    scratch: Path
    fingerprint: str = ""
    estimated_memory: dict[str, int] = field(default_factory=dict)
    """Estimated memory, in bytes by purpose."""
    process: ProcessRank = field(default_factory=ProcessRank)
    """This process's rank among those that share the training."""


def make_trainer(training: Training, tokenizer: Any) -> Any:
    """
    Load the base, add a new adapter or unfreeze the weights to train, and return the trainer, not yet started.

    Without `DEV_ROWS` dev rows no dev loss is measured. Raises `StepFailed` if the base does not fit into memory,
    and `CannotTrain` if GPU, tokenizer or settings do not match it.
    """
    import torch
    from transformers import AutoConfig, PrinterCallback
    from trl import SFTConfig

    check_gpu(training.device)
    config, rows, dev, quantization = training.config, training.rows, training.dev, training.plan.quantization
    # Mixed precision is bf16, which does not mix with float16; a float32 base would be slow on a GPU, where attention
    # has no kernel for it. The merge uses the base's own dtype.
    saved: Any = AutoConfig.from_pretrained(training.base, local_files_only=True, trust_remote_code=False).dtype
    single = arithmetic_dtype(training.device)
    dtype = single or (torch.bfloat16 if training.device == "cuda" or saved == torch.float16 else None)
    model: Any = load_model(training.base, training.device, quantization, dtype)
    _check_vocabulary(model, rows)
    plain_head = has_plain_head(model, rows[0].input_ids)
    packed = enable_packing(model, [row.input_ids for row in rows])
    # A float32 base is trained in float32: nothing in it is 16-bit or quantised, so mixed precision would only round.
    mixed = single is None and (quantization == "nf4" or model.dtype != torch.float32)
    trains_base = config.trains_full_weights
    most = training.plan.batch_tokens
    divide = partial(micro_batches, batch_tokens=most, packed=packed, share=training.process.share)
    make: Any = _trainer_class(training, divide, plain_head=plain_head)
    if trains_base:
        unfreeze(model, training.base, config, training.process)
        make = keeping_weights(make)

    trainer = make(
        model=model,
        args=SFTConfig(**_arguments(training, mixed=mixed)),
        train_dataset=_dataset(rows),
        eval_dataset=_dataset(dev) if len(dev) >= DEV_ROWS else None,
        processing_class=tokenizer,
        data_collator=collate,
        peft_config=None if trains_base else lora_config(model, config),
        optimizers=(optimizer(model, config), None),
    )
    # TRL trains the adapter of a quantised base in bf16, whose steps around a weight of 0.04 are as large as an update.
    for weight in trainer.model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    add_answer_loss(trainer.model if trains_base else trainer.model.get_base_model())
    if not plain_head or trainer.aux_loss_enabled:
        sys.stderr.write("TRL computes the loss: this architecture scales or caps its logits, or has experts\n")
    trainer.remove_callback(PrinterCallback)
    return trainer


def _trainer_class(training: Training, divide: Divide, *, plain_head: bool) -> Any:
    """Return a subclass of TRL's trainer with this project's row order, micro-batches (`divide`) and loss."""
    import torch
    from trl import SFTTrainer

    config, process, lengths = training.config, training.process, [len(row.input_ids) for row in training.rows]

    class Trainer(SFTTrainer):  # type: ignore[misc, unused-ignore]
        """TRL's trainer with a resumable row order, micro-batches by tokens, and completion-only loss."""

        loss_is_scaled_for_ga = True
        divide_step = staticmethod(divide)
        aux_loss_enabled: bool

        def _get_train_sampler(self, _dataset: Any = None) -> LengthGroups:
            return LengthGroups(lengths, config.batch_size, config.seed)

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            answers = answer_tokens(inputs["labels"])
            parts = self._micro_batches(inputs)
            self.state.num_input_tokens_seen += sum(inputs["lengths"])
            seed_step(process, config.seed, self.state.global_step)
            losses = [SFTTrainer.training_step(self, model, part, answers) for part in parts]
            return summed(process, self._sum(losses), (weight for weight in model.parameters() if weight.requires_grad))

        def prediction_step(self, model: Any, inputs: Any, *_options: Any, **_named: Any) -> Any:
            answers = answer_tokens(inputs["labels"])
            # A router's loss is not part of the answers' loss.
            trained_with, self.aux_loss_enabled = self.aux_loss_enabled, False
            with torch.no_grad(), self.compute_loss_context_manager():
                parts = self._micro_batches(self._prepare_inputs(inputs))
                losses = [self.compute_loss(model, part, num_items_in_batch=answers) for part in parts]
            self.aux_loss_enabled = trained_with
            return summed(process, self._sum(losses)), None, None

        def _micro_batches(self, step: Any) -> list[dict[str, Any]]:
            parts = self.divide_step(step)
            # TRL divides a router's loss by it.
            self.current_gradient_accumulation_steps = len(parts) * process.count
            return parts

        def _sum(self, losses: list[Any]) -> Any:
            return torch.stack([torch.zeros((), device=self.args.device), *losses]).sum()

        def compute_loss(self, model: Any, inputs: Any, **options: Any) -> Any:
            if not plain_head or self.aux_loss_enabled:
                plain = {name: values for name, values in inputs.items() if name != "answers"}
                return super().compute_loss(model, plain, **options)
            return mean_loss(model, inputs, options.get("num_items_in_batch"))

        def evaluate(self, *_args: Any, **_options: Any) -> dict[str, float]:
            metrics = {"eval_loss": dev_loss(self)}
            self.log(metrics)
            self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    return Trainer


def _arguments(training: Training, *, mixed: bool) -> dict[str, Any]:
    """Return the keyword arguments of TRL's `SFTConfig`."""
    config, on_cuda, activations = training.config, training.device == "cuda", training.plan.activations
    return {
        "output_dir": str(training.scratch),
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": config.warmup,
        # Not paged: bitsandbytes would never free its managed memory, and ends the process where it gets none.
        "optim": "adamw_8bit" if has_8_bit_moments(config, training.device) else "adamw_torch_fused",
        "bf16": mixed,
        "use_cpu": not on_cuda,
        "activation_checkpointing": activations != "kept",
        "activation_checkpointing_kwargs": {"every_n_layers": 2} if activations == "half recomputed" else None,
        "dataloader_pin_memory": on_cuda,
        "max_length": config.max_length,
        "completion_only_loss": True,
        "packing": False,
        "seed": config.seed,
        "data_seed": config.seed,
        "save_strategy": "no",
        "eval_strategy": "steps" if len(training.dev) >= DEV_ROWS else "no",
        "eval_steps": _DEV_SHARE / max(1.0, float(config.epochs)),
        "prediction_loss_only": True,
        "logging_steps": 1,
        # A loss that is not a number must be seen, not replaced by the mean of its neighbours.
        "logging_nan_inf_filter": False,
        "report_to": [],
        "disable_tqdm": True,
    }


def _check_vocabulary(model: Any, rows: Sequence[TokenRow]) -> None:
    size = model.get_input_embeddings().weight.shape[0]
    highest = max(max(row.input_ids) for row in rows)
    if highest >= size:
        raise CannotTrain(
            f"the tokenizer has token {highest}, and the base model's vocabulary has {size} tokens",
            "put the base model's own tokenizer into its folder",
        )


def _dataset(rows: Sequence[TokenRow]) -> Any:
    from datasets import Dataset, Features, List, Value

    columns = {
        "input_ids": [row.input_ids for row in rows],
        "completion_mask": [row.completion_mask for row in rows],
    }
    features = Features({"input_ids": List(Value("int32")), "completion_mask": List(Value("int8"))})
    return Dataset.from_dict(columns, features=features)
