"""Adapters of random numbers: nothing is trained, and yet they are not the zero that an adapter begins at."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from pipeline.config import TrainConfig
from pipeline.models.loading import load_tokenizer
from pipeline.train.job import Job, TokenRow, with_numbers
from pipeline.train.trainer import Trainer
from tests.made_artifacts import memory_plan

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

#: Sizes of a model in the words of most architectures.
SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def save_base(kind: type, tokens: Path, folder: Path, **options: Any) -> Path:
    """Save a small model of random numbers, of the class of config `kind`, with the tokenizer in `tokens`."""
    tokenizer: Any = load_tokenizer(tokens)
    torch.manual_seed(0)
    config = kind(**{**SMALL, "vocab_size": len(tokenizer), **options})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def token_rows(count: int, seed: int) -> list[TokenRow]:
    """Return rows of 2 to 40 tokens, with labels anywhere, also on the first token, and always on the last."""
    dice = random.Random(seed)
    return [
        TokenRow(
            [dice.randrange(3, 259) for _ in range(length)],
            [*(int(dice.random() < 0.4) for _ in range(length - 1)), 1],
        )
        for length in (dice.randint(2, 40) for _ in range(count))
    ]


def made_training(base: Path, folder: Path, rows: Sequence[TokenRow], config: TrainConfig, **plan: Any) -> Job:
    """Return a training in `folder` as the step plans it, over the base as it is unless `plan` says otherwise."""
    tokens = 1024 if config.batch_tokens == "auto" else config.batch_tokens
    quantization = "none" if config.quantization == "auto" else config.quantization
    memory = memory_plan(**{"quantization": quantization, "batch_tokens": tokens, **plan})
    numbers = with_numbers(config, len(rows), 0)
    return Job(base, "cpu", rows, [], numbers, memory, folder / "adapter", folder / "scratch")


def trainer_of(base: Path, folder: Path, rows: Sequence[TokenRow], **settings: Any) -> Any:
    """Return the trainer that the step builds, with such an adapter."""
    config = TrainConfig.model_validate({"quantization": "none", "rank": 4, **settings})
    trainer = Trainer(made_training(base, folder, rows, config), load_tokenizer(base))
    dice = torch.Generator().manual_seed(1)
    for weight in trainer.model.parameters():
        if weight.requires_grad:
            weight.data.normal_(0, 0.05, generator=dice)
    return trainer


def trls_loss(trainer: Any, model: Any, inputs: Mapping[str, Any], **options: Any) -> Any:
    """Return TRL's own loss of a micro-batch."""
    inputs = {name: values for name, values in inputs.items() if name != "answers"}
    return SFTTrainer.compute_loss(trainer, model, inputs, **options)


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    """Return the gradients that have gathered on what is trained."""
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


def assert_near(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tolerance: float) -> None:
    """Require gradients to be the same but for `tolerance`, of the largest number of each."""
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        size = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=tolerance, atol=tolerance * size)


def save_adapter(base: Path, folder: Path, **options: Any) -> Path:
    """Save such an adapter on the linear layers of a Llama, which moves the base's logits."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **options}
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**options))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
        if "magnitude" in name:
            parameter.data.mul_(torch.empty_like(parameter).uniform_(0.8, 1.2))
    model.save_pretrained(folder)
    return folder
