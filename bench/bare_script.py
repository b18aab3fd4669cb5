"""
The peer of bench/loop.py: what the libraries' guides tell to write, in one process, with nothing around it.

    python bench/bare_script.py BASE FOLDER TRAIN_JSON

Trains NF4 QLoRA on FOLDER/train.jsonl, merges into the 16-bit base, answers FOLDER/heldout.jsonl one at a time with the
base and with the merged model, and prints the seconds of each part as one line of JSON.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: On a CPU without 16-bit arithmetic bfloat16 would take a hundred times as long.
NARROW = DEVICE == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001 - it has no public name
DTYPE = torch.bfloat16 if NARROW else torch.float32


def main(base: str, folder: Path, train: dict[str, Any]) -> None:
    """Do it all and print the times."""
    times: dict[str, float] = {}
    tokenizer = AutoTokenizer.from_pretrained(base)
    started = time.monotonic()
    fit(base, folder, train, tokenizer)
    times["train"] = time.monotonic() - started
    started = time.monotonic()
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "bare-adapter")
    merged.merge_and_unload().save_pretrained(folder / "bare-merged")
    tokenizer.save_pretrained(folder / "bare-merged")
    times["merge"] = time.monotonic() - started
    started = time.monotonic()
    times["before"] = exact_match(base, folder, tokenizer)
    times["after"] = exact_match(str(folder / "bare-merged"), folder, tokenizer)
    times["evaluate"] = time.monotonic() - started
    print(json.dumps(times))


def fit(base: str, folder: Path, train: dict[str, Any], tokenizer: Any) -> None:
    """Train as TRL's guide does."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPE,
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=DTYPE)
    rows = [
        {"prompt": [user(row)], "completion": [{"role": "assistant", "content": row["output"]}]}
        for row in read(folder / "train.jsonl")
    ]
    config = SFTConfig(
        output_dir=str(folder / "bare"),
        per_device_train_batch_size=train["batch_size"],
        num_train_epochs=1,
        learning_rate=train["learning_rate"],
        max_length=train["max_length"],
        bf16=NARROW,
        use_cpu=DEVICE == "cpu",
        report_to="none",
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        save_strategy="no",
        optim="adamw_torch",
    )
    lora = LoraConfig(r=train["rank"], lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora
    )
    trainer.train()
    trainer.model.save_pretrained(folder / "bare-adapter")


def exact_match(model_folder: str, folder: Path, tokenizer: Any) -> float:
    """Answer one record at a time; return the percentage answered exactly."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=DTYPE, device_map=DEVICE)
    right = 0
    rows = read(folder / "heldout.jsonl")
    for row in rows:
        prompt = tokenizer.apply_chat_template(
            [user(row)], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(DEVICE)
        with torch.no_grad():
            out = model.generate(**prompt, max_new_tokens=16, do_sample=False)
        answer = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        right += answer.strip().casefold() == row["output"].casefold()
    return 100 * right / len(rows)


def user(row: dict[str, str]) -> dict[str, str]:
    """Return a record's request as a chat message."""
    return {"role": "user", "content": f"{row['instruction']}\n### Input:\n{row['input']}"}


def read(path: Path) -> list[dict[str, str]]:
    """Read JSON Lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
