"""
Measure a training beside its peers, each in a process of its own: speed, peak memory, and the dev loss that comes out.

    python bench/train.py [--demo-rows 96] [--alpaca-rows 24] [--alpaca FILE.jsonl] [--base FOLDER] [--batch-size 8]
                          [--runs 3] [--unsloth PYTHON]

- guide: what the libraries' guides tell to write (bench/bare_script.py): TRL's SFTTrainer on messages, NF4, padded.
- TRL: the same trainer as it comes, on the tokens that ours gets.
- Unsloth: on those tokens, too (bench/unsloth_script.py), by the Python of an environment that has it.
- ours: what the train step builds, over the base in NF4 and in 16 bits.

On SmolLM2-135M-Instruct, one epoch of the demo's rows and of an Alpaca file's, or of made-up rows as long. The clock
runs from the first step to the last, on a GPU until the card is idle. Each runs in turns in the environment of its
users, ours in a step's: medians of the runs by the clock, processor time beside them; other work on the machine makes
all of it worthless. The dev loss is the same function for all: nats per token of the answers of rows that nobody was
trained on. The peak is of this process, on a GPU the memory that torch reserved. Exits 1 if ours, over the same base,
has a dev loss more than 2 % above TRL's.

Measured on two quiet cores (EPYC with avx512_bf16), batches of 8, tokens a second by the clock. 96 rows of the demo, 12
steps: guide 206, TRL 200, ours over NF4 546 (2.7 times TRL; dev loss 1.166, TRL 1.172), over 16 bits 637 (3.2 times;
1.221), 1.6 to 1.7 GB each. 24 rows of Alpaca's length, 3 steps: guide 137, TRL 132, 3.5 GB; ours 380 and 410 (2.9 and
3.1 times TRL), 2.2 GB. Unsloth and a GPU were not measured by the clock.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from daemon.cli.demo import demo_base
from daemon.system.threads import thread_variables
from tests.demo_data import make_data

WINDOW = 1024
DEV_ROWS = 16
PEERS = ("guide", "TRL", "ours, NF4", "ours, 16 bits")
#: Steps of a bench are few: the step size is the demo's, so that they are seen in the dev loss.
LEARNING_RATE = 5e-4
_WORDS = "the of and to in a is that it for as with was on be by at this have from or an they which one"


def main() -> int:
    """Measure every peer on both sets and print; exit 1 if ours ends in another dev loss than TRL's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo-rows", type=int, default=96)
    parser.add_argument("--alpaca-rows", type=int, default=24)
    parser.add_argument("--alpaca", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--unsloth", type=Path, metavar="PYTHON")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.peer:
        print(json.dumps(measure(asked.peer, asked.base, asked.rows, asked.batch_size, asked.unsloth)))
        return 0
    base = asked.base or demo_base()
    alpaca = read(asked.alpaca) if asked.alpaca else made_alpaca(asked.alpaca_rows + DEV_ROWS)
    sets = {
        "the demo's rows": (
            list(make_data(first=asked.demo_rows + DEV_ROWS, heldout=1, second=1).first),
            asked.demo_rows,
        ),
        f"rows of {asked.alpaca.name}" if asked.alpaca else "made-up rows of Alpaca's length": (
            alpaca,
            asked.alpaca_rows,
        ),
    }
    peers = [*PEERS, *(["Unsloth"] if asked.unsloth else [])]
    common = ["--base", str(base), "--batch-size", str(asked.batch_size), "--unsloth", str(asked.unsloth)]
    return max(show(title, run(peers * asked.runs, common, rows, count)) for title, (rows, count) in sets.items())


def run(
    turns: Sequence[str], common: Sequence[str], records: Sequence[dict[str, str]], count: int
) -> dict[str, dict[str, Any]]:
    """Train the peers in `turns` on `count` records, each in a process of its own; return the medians of each."""
    said: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        rows.write_text(json.dumps([records[:count], records[count : count + DEV_ROWS]]), encoding="utf-8")
        for peer in turns:
            own = thread_variables() if peer.startswith("ours") else {}
            environment = {**os.environ, **own, "TRANSFORMERS_VERBOSITY": "error"}
            argv = [sys.executable, __file__, "--peer", peer, "--rows", str(rows), *common]
            done = subprocess.run(argv, env=environment, cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode:
                # On a small card one may be without memory where another is not.
                sys.stderr.write(f"{peer} failed: {done.stderr[-2000:]}\n")
                continue
            said.setdefault(peer, []).append(json.loads(done.stdout.splitlines()[-1]))
    return {peer: {key: statistics.median(one[key] for one in all_) for key in all_[0]} for peer, all_ in said.items()}


def measure(peer: str, base: Path, rows: Path, batch_size: int, unsloth: Path) -> dict[str, Any]:
    """Train as `peer` does; return what it took and the dev loss."""
    import torch  # noqa: PLC0415 - after the environment is set
    from trl import SFTConfig  # noqa: F401, PLC0415 - its import is not the training's

    from pipeline.models.generation import load_template  # noqa: PLC0415

    train, dev = json.loads(rows.read_text(encoding="utf-8"))
    template = load_template(base, "chat")
    kept, measured = ([tokenise(template, row) for row in part] for part in (train, dev))
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if peer == "Unsloth":
            model, took = by_unsloth(unsloth, base, scratch, kept, batch_size)
        elif peer.startswith("ours"):
            settings = {"batch_size": batch_size, "quantization": "nf4" if "NF4" in peer else "none"}
            model, took = timed(ours(base, scratch, template.tokenizer, kept, settings))
        else:
            data = train if peer == "guide" else [vars(row) for row in kept]
            model, took = timed(peers(base, scratch, template.tokenizer, data, batch_size))
    model.eval()
    model.get_base_model().set_attn_implementation("sdpa")
    with torch.no_grad():
        losses = [answer_loss(model, row) for row in measured]
    dev_loss = sum(loss for loss, _ in losses) / sum(tokens for _, tokens in losses)
    return {**took, "rows": len(kept), "tokens": sum(len(row.input_ids) for row in kept), "dev_loss": dev_loss}


def timed(trainer: Any) -> tuple[Any, dict[str, float]]:
    """Train; return the model and what it took: `wall` and `processor` seconds and `peak` bytes."""
    import resource  # noqa: PLC0415

    import torch  # noqa: PLC0415

    wall, processor = time.perf_counter(), time.process_time()
    trainer.train()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    took = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
    took["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        took["peak"] = torch.cuda.max_memory_reserved()
    return trainer.model, took


def by_unsloth(python: Path, base: Path, scratch: Path, rows: Any, batch_size: int) -> tuple[Any, dict[str, float]]:
    """Let Unsloth train; return its adapter over the same base as TRL's, and what it took."""
    from peft import PeftModel  # noqa: PLC0415

    given = {"rows": [vars(row) for row in rows], "batch_size": batch_size}
    given |= {"learning_rate": LEARNING_RATE, "window": WINDOW}
    file = scratch / "rows.json"
    file.write_text(json.dumps(given), encoding="utf-8")
    script = Path(__file__).with_name("unsloth_script.py")
    argv = [str(python), str(script), str(base), str(file), str(scratch / "adapter")]
    done = subprocess.run(argv, cwd=scratch, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return PeftModel.from_pretrained(in_4_bits(base), scratch / "adapter"), json.loads(done.stdout.splitlines()[-1])


def ours(base: Path, scratch: Path, tokenizer: Any, rows: Any, settings: dict[str, Any]) -> Any:
    """Return the trainer that the train step builds."""
    from pipeline.artifacts import MemoryPlan  # noqa: PLC0415
    from pipeline.config import TrainConfig  # noqa: PLC0415
    from pipeline.models.loading import chosen_device  # noqa: PLC0415
    from pipeline.train.job import Job  # noqa: PLC0415
    from pipeline.train.memory import batch_tokens  # noqa: PLC0415
    from pipeline.train.trainer import Trainer  # noqa: PLC0415

    config = TrainConfig.model_validate({**settings, "learning_rate": LEARNING_RATE, "epochs": 1})
    device = chosen_device()
    quantization = "none" if config.quantization == "auto" else config.quantization
    tokens = batch_tokens(config, device)
    plan = MemoryPlan(device=device, quantization=quantization, batch_tokens=tokens, activations="kept")
    return Trainer(Job(base, device, rows, [], config, plan, scratch / "adapter", scratch), tokenizer)


def peers(base: Path, scratch: Path, tokenizer: Any, rows: Any, batch_size: int) -> Any:
    """Return TRL's trainer as its guide has it, on records as messages or on tokens."""
    import torch  # noqa: PLC0415
    from datasets import Dataset  # noqa: PLC0415
    from peft import LoraConfig  # noqa: PLC0415
    from trl import SFTConfig, SFTTrainer  # noqa: PLC0415

    columns = [as_messages(row) if "instruction" in row else row for row in rows]
    config = SFTConfig(
        output_dir=str(scratch),
        per_device_train_batch_size=batch_size,
        num_train_epochs=1,
        bf16=arithmetic() == torch.bfloat16,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        max_length=WINDOW,
        report_to="none",
        save_strategy="no",
        optim="adamw_torch",
        use_cpu=not torch.cuda.is_available(),
        completion_only_loss=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    return SFTTrainer(
        model=in_4_bits(base),
        args=config,
        train_dataset=Dataset.from_list(columns),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def in_4_bits(base: Path) -> Any:
    """Return the base as QLoRA's guide loads it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: PLC0415

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=arithmetic(),
    )
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=arithmetic())


def arithmetic() -> Any:
    """Return bfloat16, in which the guides compute; on a CPU without 16-bit arithmetic float32, as ours does."""
    import torch  # noqa: PLC0415

    from pipeline.models.loading import arithmetic_dtype, chosen_device  # noqa: PLC0415

    return arithmetic_dtype(chosen_device()) or torch.bfloat16


def answer_loss(model: Any, row: Any) -> tuple[float, int]:
    """Return the summed loss of a row's answer in nats, and its count of tokens."""
    import torch  # noqa: PLC0415

    ids = torch.tensor([row.input_ids], device=model.device)
    mask = torch.tensor(row.completion_mask[1:], dtype=torch.bool, device=model.device)
    logits = model(input_ids=ids).logits[0, :-1][mask].float()
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:][mask], reduction="sum")
    return float(loss), int(mask.sum())


def tokenise(template: Any, record: dict[str, str]) -> Any:
    """Return a record as the train step tokenises it."""
    from pipeline.models.template import fold, single_turn  # noqa: PLC0415
    from pipeline.train.job import TokenRow  # noqa: PLC0415

    turns = single_turn(fold(record["instruction"], record.get("input", "")), record["output"])
    prompt, answer = template.prompt(turns[:-1]), template.target(turns)
    return TokenRow([*prompt, *answer], [0] * len(prompt) + [1] * len(answer))


def as_messages(record: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """Return a record as TRL's guide has it."""
    from pipeline.models.template import fold  # noqa: PLC0415

    content = fold(record["instruction"], record.get("input", ""))
    return {
        "prompt": [{"role": "user", "content": content}],
        "completion": [{"role": "assistant", "content": record["output"]}],
    }


def read(path: Path) -> list[dict[str, str]]:
    """Return the records of an Alpaca file that are not long enough to be cut."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in records if len(row["instruction"] + row.get("input", "") + row["output"]) < 2 * WINDOW]


def made_alpaca(count: int) -> list[dict[str, str]]:
    """Return records with answers of 20 to 250 words, as most of Alpaca's are."""
    dice = random.Random(1)
    return [
        {
            "instruction": " ".join(dice.choices(_WORDS.split(), k=12)),
            "output": " ".join(dice.choices(_WORDS.split(), k=words)),
        }
        for words in (int(20 * 12.5 ** dice.random()) for _ in range(count))
    ]


def show(title: str, said: dict[str, dict[str, Any]]) -> int:
    """Print one table; return 1 if a peer failed, or ours in NF4 has a dev loss more than 2 % above TRL's."""
    missing = {name for name in PEERS if name not in said}
    one = next(iter(said.values()), {"rows": 0, "tokens": 0})
    table = Table(
        "",
        "tokens/s",
        "x guide",
        "x TRL",
        "of processor time",
        "peak",
        "dev loss",
        title=f"{title}: {one['rows']} rows, {one['tokens']} tokens; load {os.getloadavg()[0]:.1f}",
    )
    for peer, took in said.items():
        table.add_row(
            peer,
            f"{one['tokens'] / took['wall']:.0f}",
            *(f"{said[name]['wall'] / took['wall']:.2f}" if name in said else "" for name in ("guide", "TRL")),
            f"{one['tokens'] / took['processor']:.0f}",
            f"{took['peak'] / 1e9:.2f} GB",
            f"{took['dev_loss']:.3f}",
        )
    Console(width=120).print(table)
    return int(bool(missing) or said["ours, NF4"]["dev_loss"] > 1.02 * said["TRL"]["dev_loss"])


if __name__ == "__main__":
    sys.exit(main())
