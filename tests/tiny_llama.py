"""
A language model so small that a test trains it, and a task that it learns on every processor.

python tests/tiny_llama.py FOLDER              make the model; print the train settings under which it learns, as JSON
python tests/tiny_llama.py --rows N OUT.jsonl  write N rows of the task (--seed S)
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

INSTRUCTION = "Route the message."
#: The same to every message: what differs in the last bits of two processors cannot change whether that is learned.
ANSWER = "billing"
_TOPICS = ("invoice", "parcel", "password", "crash", "discount")
_WORDS = (
    "please my the was again today help with about need still there since friday could you look at"
    " this it has not been for a week now sorry to ask"
)
_FILLERS = _WORDS.split()
_SPECIAL = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def settings() -> dict[str, Any]:
    """Return the train settings under which the tiny model learns the task within seconds."""
    return {
        "quantization": "nf4",
        "rank": 16,
        "alpha": 32,
        "learning_rate": 3e-3,
        "epochs": 6.0,
        "batch_size": 8,
        "max_length": 256,
    }


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """Return distinct records of the task."""
    dice = random.Random(seed)
    made: dict[str, None] = {}
    while len(made) < count:
        words = dice.choices(_FILLERS, k=dice.randint(4, 8))
        words.insert(dice.randint(0, len(words)), dice.choice(_TOPICS))
        made[" ".join(words)] = None
    return [{"instruction": INSTRUCTION, "input": message, "output": ANSWER} for message in made]


def make_model(folder: Path, *, chat: bool = True, seed: int = 0, **changes: Any) -> None:
    """
    Save a random two-layer Llama and its byte-level tokenizer into `folder`, with or without a chat template.

    `changes` are other values of its config.
    """
    import torch  # noqa: PLC0415 - rows and settings are to be had without it
    import transformers  # noqa: PLC0415

    tokenizer = _tokenizer(chat=chat)
    torch.manual_seed(seed)
    values = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**values, **changes}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(*, chat: bool) -> Any:
    import tokenizers  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    texts = [f"{row['instruction']}\n### Input:\n{row['input']}\n{row['output']}" for row in rows(300, seed=7)]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=1024, **_SPECIAL)
    made.chat_template = _TEMPLATE if chat else None
    return made


def main(argv: list[str]) -> None:
    """Make a model, or rows, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args(argv)
    if asked.rows is None:
        make_model(asked.target)
        print(json.dumps(settings()))
        return
    lines = (json.dumps(row) + "\n" for row in rows(asked.rows, asked.seed))
    asked.target.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
