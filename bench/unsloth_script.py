"""
A peer of bench/train.py in an environment of its own: Unsloth, as its guide has it.

    python bench/unsloth_script.py BASE ROWS_JSON FOLDER

Trains NF4 QLoRA for one epoch on rows that are tokens, saves the adapter in FOLDER, and prints what it took as one line
of JSON. The settings come with the rows.
"""

import json
import resource
import sys
import time
from pathlib import Path

from unsloth import FastLanguageModel  # type: ignore[import-not-found]  # isort: skip - it patches what comes after it
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer


def main(base: str, rows: Path, folder: Path) -> None:
    """Train, save and print."""
    given = json.loads(rows.read_text(encoding="utf-8"))
    model, tokenizer = FastLanguageModel.from_pretrained(base, max_seq_length=given["window"], load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=32,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing=False,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )
    config = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=given["batch_size"],
        num_train_epochs=1,
        learning_rate=given["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        max_length=given["window"],
        report_to="none",
        save_strategy="no",
        optim="adamw_torch",
        completion_only_loss=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    dataset = Dataset.from_list(given["rows"])
    trainer = SFTTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)
    wall, processor = time.perf_counter(), time.process_time()
    trainer.train()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    took = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
    took["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        took["peak"] = torch.cuda.max_memory_reserved()
    model.save_pretrained(folder)
    print(json.dumps(took))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
