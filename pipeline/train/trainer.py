"""Prepare a job's model, and train it by TRL's trainer with this project's row order, micro-batches and loss."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, Features, List, Value
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from pipeline.config import DEV_ROWS
from pipeline.errors import CannotTrain
from pipeline.models.adapter import add_adapter
from pipeline.models.loading import arithmetic_dtype, check_gpu, load_config, load_model
from pipeline.models.memory_estimate import has_8_bit_moments
from pipeline.train.answer_loss import add_answer_loss, answer_tokens, has_plain_head, mean_loss
from pipeline.train.data_parallel import seed_step, summed
from pipeline.train.job import Job, LengthGroups, TokenRow
from pipeline.train.packing import collate, enable_packing, micro_batches
from pipeline.train.trained_weights import load_trained, optimizer, save_trained, unfreeze

_DEV_SHARE = 0.25
"""The dev loss is measured at each such share of an epoch, or of a training shorter than an epoch."""


class PreparedModel(NamedTuple):
    """A model that is ready to be trained, and how it can be trained."""

    model: Any
    plain_head: bool
    """Whether its logits are its output head applied to the hidden states."""
    packed: bool
    """Whether records are packed."""
    mixed: bool
    """Whether it is trained in mixed precision."""


def prepare_model(job: Job) -> PreparedModel:
    """
    Load the base, and add a new adapter or unfreeze the weights to train.

    Its probes see the model as loaded. Raises `StepFailed` if the base does not fit into memory, and `CannotTrain` if
    GPU, tokenizer or settings do not match it.
    """
    check_gpu(job.device)
    config, rows, quantization = job.config, job.rows, job.plan.quantization
    # Mixed precision is bf16, which does not mix with float16; a float32 base would be slow on a GPU, where attention
    # has no kernel for it. The merge uses the base's own dtype.
    saved = load_config(job.base).dtype
    single = arithmetic_dtype(job.device)
    dtype = single or (torch.bfloat16 if job.device == "cuda" or saved == torch.float16 else None)
    model: Any = load_model(job.base, job.device, quantization, dtype)
    size, highest = model.get_input_embeddings().weight.shape[0], max(max(row.input_ids) for row in rows)
    if highest >= size:
        raise CannotTrain(
            f"the tokenizer has token {highest}, and the base model's vocabulary has {size} tokens",
            "put the base model's own tokenizer into its folder",
        )
    # A float32 base is trained in float32: nothing in it is 16-bit or quantised, so mixed precision would only round.
    mixed = single is None and (quantization == "nf4" or model.dtype != torch.float32)
    plain_head = has_plain_head(model, rows[0].input_ids)
    packed = enable_packing(model, [row.input_ids for row in rows])
    add_answer_loss(model)
    if config.trains_full_weights:
        unfreeze(model, job.base, config, job.process)
    else:
        model = add_adapter(model, config)
    return PreparedModel(model, plain_head, packed, mixed)


class Trainer(SFTTrainer):  # type: ignore[misc, unused-ignore]
    """TRL's trainer with a resumable row order, micro-batches by tokens, and completion-only loss."""

    loss_is_scaled_for_ga = True
    aux_loss_enabled: bool

    def __init__(self, job: Job, tokenizer: Any) -> None:
        """
        Prepare the model of `job`; nothing is trained yet. Without `DEV_ROWS` dev records no dev loss is measured.

        Raises what `prepare_model` raises.
        """
        model, self.plain_head, packed, mixed = prepare_model(job)
        self.job = job
        self.divide_step = partial(
            micro_batches, batch_tokens=job.plan.batch_tokens, packed=packed, share=job.process.share
        )
        super().__init__(
            model=model,
            args=SFTConfig(**_arguments(job, model.config.get_text_config(), mixed=mixed)),
            train_dataset=_dataset(job.rows),
            eval_dataset=_dataset(job.dev) if len(job.dev) >= DEV_ROWS else None,
            processing_class=tokenizer,
            data_collator=collate,
            optimizers=(optimizer(model, job.config), None),
        )
        # TRL trains the adapter of a quantised base in bf16, whose steps around a weight of 0.04 are as large as an
        # update.
        for weight in self.model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
        if not self.plain_head or self.aux_loss_enabled:
            sys.stderr.write("TRL computes the loss: this architecture scales or caps its logits, or has experts\n")
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, _dataset: Any = None) -> LengthGroups:
        return self.job.order

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Compute an optimizer step's gradients; return its loss, of all processes, in nats per answer token."""
        process, answers = self.job.process, answer_tokens(inputs["labels"])
        parts = self._micro_batches(inputs)
        self.state.num_input_tokens_seen += sum(inputs["lengths"])
        seed_step(process, self.job.config.seed, self.state.global_step)
        losses = [SFTTrainer.training_step(self, model, part, answers) for part in parts]
        return summed(process, self._sum(losses), (weight for weight in model.parameters() if weight.requires_grad))

    def dev_loss(self) -> float:
        """Return the dev rows' loss in nats per answer token; all processes call it. Leaves the model in eval mode."""
        total = torch.zeros((), dtype=torch.float64, device=self.args.device)
        tokens = torch.zeros((), dtype=torch.int64, device=self.args.device)
        self.model.eval()
        # A router's loss is not part of the answers' loss.
        trained_with, self.aux_loss_enabled = self.aux_loss_enabled, False
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in self.get_eval_dataloader():
                step = self._prepare_inputs(batch)
                parts = self._micro_batches(step)
                # Divided by 1: the loss is the sum over the answers of each part.
                losses = [self.compute_loss(self.model, part, num_items_in_batch=1) for part in parts]
                total += summed(self.job.process, self._sum(losses)).double()
                tokens += answer_tokens(step["labels"])
        self.aux_loss_enabled = trained_with
        return float(total / tokens)

    def _micro_batches(self, step: Any) -> list[dict[str, Any]]:
        parts = self.divide_step(step)
        # TRL divides a router's loss by it.
        self.current_gradient_accumulation_steps = len(parts) * self.job.process.count
        return parts

    def _sum(self, losses: list[Any]) -> Any:
        return torch.stack([torch.zeros((), device=self.args.device), *losses]).sum()

    def compute_loss(self, model: Any, inputs: Any, **options: Any) -> Any:
        """Return a micro-batch's loss: `mean_loss`, or TRL's own if the head is not plain or the model has a router."""
        if not self.plain_head or self.aux_loss_enabled:
            plain = {name: values for name, values in inputs.items() if name != "answers"}
            return super().compute_loss(model, plain, **options)
        return mean_loss(model, inputs, options.get("num_items_in_batch"))

    def evaluate(self, *_args: Any, **_options: Any) -> dict[str, float]:
        """Measure the dev loss, log it and call the callbacks with it; return it, in nats per token, as `eval_loss`."""
        metrics = {"eval_loss": self.dev_loss()}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        if self.job.config.trains_full_weights:
            save_trained(self.model, Path(output_dir))
        else:
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: Any, model: Any = None) -> None:
        if self.job.config.trains_full_weights:
            load_trained(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


def _arguments(job: Job, model: Any, *, mixed: bool) -> dict[str, Any]:
    """Return the keyword arguments of TRL's `SFTConfig`; `model` is the language model's configuration."""
    config, on_cuda, activations = job.config, job.device == "cuda", job.plan.activations
    return {
        "output_dir": str(job.scratch),
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": config.warmup,
        # Not paged: bitsandbytes would never free its managed memory, and ends the process where it gets none.
        "optim": "adamw_8bit" if has_8_bit_moments(config, job.device) else "adamw_torch_fused",
        "bf16": mixed,
        "use_cpu": not on_cuda,
        "activation_checkpointing": activations != "kept",
        "activation_checkpointing_kwargs": {"every_n_layers": 2} if activations == "half recomputed" else None,
        "dataloader_pin_memory": on_cuda,
        "max_length": config.max_length,
        "completion_only_loss": True,
        # TRL computes a router's own loss with `num_experts`, which some mixtures, as Granite's, call otherwise.
        "router_aux_loss_coef": None if hasattr(model, "num_experts") else 0.0,
        "packing": False,
        "seed": config.seed,
        "data_seed": config.seed,
        "save_strategy": "no",
        "eval_strategy": "steps" if len(job.dev) >= DEV_ROWS else "no",
        "eval_steps": _DEV_SHARE / max(1.0, float(config.epochs)),
        "prediction_loss_only": True,
        "logging_steps": 1,
        # A loss that is not a number must be seen, not replaced by the mean of its neighbours.
        "logging_nan_inf_filter": False,
        "report_to": [],
        "disable_tqdm": True,
    }


def _dataset(rows: Sequence[TokenRow]) -> Dataset:
    columns = {"input_ids": [row.input_ids for row in rows], "completion_mask": [row.completion_mask for row in rows]}
    features = Features({"input_ids": List(Value("int32")), "completion_mask": List(Value("int8"))})
    return Dataset.from_dict(columns, features=features)
