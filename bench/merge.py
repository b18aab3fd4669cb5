"""
Compare a merge file by file with `cp -r` of the base, and with PEFT's merge of the whole model in memory.

    python bench/merge.py [--gigabytes 1] [--runs 3] [--dora] [--folder /tmp]

The base is a random Llama in bfloat16, in shards of at most a gigabyte; the adapter has rank 16 on all linear layers.
Each run does all three, in changing order, in separate processes, and removes the output before the next; the threads
of ours wait as a step's do, PEFT's as its users' do. Times do not include imports; "on the disk" includes an fsync.
Memory is the peak above that after the imports, including mapped files of the base. Ratios are medians by the clock
relative to `cp -r`.

Measured on two cores, 1 GB, on the disk: `cp -r` 0.89 s, file by file 2.01 s, PEFT 9.62 s; peak memory 50 MB, PEFT's
1,916 MB. Without the fsync 0.42, 1.58 and 9.02 s. A GPU's host was not measured.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from daemon.system.threads import thread_variables
from pipeline import durable

BUDGET_TIMES = 3.0
BUDGET_MEGABYTES = 600
SHARD_BYTES = 1_000_000_000
HIDDEN, INNER, VOCABULARY, KEYS = 2048, 5632, 32_000, 512
WAYS = ("cp -r", "by file", "PEFT")


def main() -> int:
    """Measure and print; exit 1 if the merge is over its budget of time or of memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--folder", type=Path, help="where to work; /dev/shm leaves the disk out of it")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        return child(asked.child[0], *map(Path, asked.child[1:]))
    with tempfile.TemporaryDirectory(dir=asked.folder) as scratch:
        folder = Path(scratch)
        argv = [sys.executable, __file__, "--child", "make", *map(str, (folder / "base", folder / "adapter", folder))]
        given = {"LAYERS": str(layers_of(asked.gigabytes)), "DORA": str(int(asked.dora))}
        subprocess.run(argv, check=True, env={**os.environ, **given})
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for number in range(asked.runs):
            for way in WAYS if number % 2 else reversed(WAYS):
                found[way].append(measure(way, folder))
        return show(found, folder / "base")


def layers_of(gigabytes: float) -> int:
    """Return the layers of a model of about this size."""
    layer = HIDDEN * (2 * HIDDEN + 2 * KEYS + 3 * INNER)
    return max(1, round((gigabytes * 5e8 - VOCABULARY * HIDDEN) / layer))


def measure(way: str, folder: Path) -> dict[str, float]:
    """Return the seconds without and with an fsync, and the peak megabytes, of one merge or copy."""
    target = folder / "out"
    os.sync()
    if way == "cp -r":
        begin, before = time.perf_counter(), os.times()
        subprocess.run(["/bin/cp", "-r", folder / "base", target], check=True)
        after = os.times()
        processor = after.children_user + after.children_system - before.children_user - before.children_system
        found = {"seconds": time.perf_counter() - begin, "processor": processor, "megabytes": 0.0}
    else:
        argv = [sys.executable, __file__, "--child", way, *map(str, (folder / "base", folder / "adapter", target))]
        environment = {**os.environ, **(thread_variables() if way == "by file" else {})}
        done = subprocess.run(argv, check=True, env=environment, stdout=subprocess.PIPE)
        found = json.loads(done.stdout)
    begin = time.perf_counter()
    durable.fsync_tree(target)
    found["stored"] = found["seconds"] + time.perf_counter() - begin
    shutil.rmtree(target)
    return found


def child(way: str, base: Path, adapter: Path, target: Path) -> int:
    """Do one thing in this process and print what it took."""
    import torch  # noqa: PLC0415
    from peft import PeftModel  # noqa: PLC0415
    from transformers import LlamaForCausalLM  # noqa: PLC0415

    from pipeline.merge.step import copy_texts, merge_into  # noqa: PLC0415

    if way == "make":
        make(base, adapter, layers=int(os.environ["LAYERS"]), dora=os.environ["DORA"] == "1")
        return 0
    with measured():
        if way == "PEFT":
            model: Any = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
            whole: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
            whole.save_pretrained(target, max_shard_size=SHARD_BYTES)
        else:
            merge_into(base, adapter, target)
            copy_texts(base, target, None)
    return 0


@contextmanager
def measured() -> Iterator[None]:
    """Print the seconds of the block and the peak growth of the process in megabytes."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident()
    begin, processor = time.perf_counter(), time.process_time()
    yield
    seconds, processor = time.perf_counter() - begin, time.process_time() - processor
    print(json.dumps({"seconds": seconds, "processor": processor, "megabytes": (resident() - before) / 1000}))


def resident() -> int:
    """Return this process's largest resident size in kilobytes since it was last forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def make(base: Path, adapter: Path, *, layers: int, dora: bool) -> None:
    """Write a base of random numbers in shards, and an adapter on all of its linear layers."""
    import torch  # noqa: PLC0415
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415
    from tokenizers import Tokenizer, models  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: PLC0415

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shards: list[dict[str, Any]] = [{}]
    for name, parameter in model.named_parameters():
        if sum(tensor.nbytes for tensor in shards[-1].values()) + 2 * parameter.numel() > SHARD_BYTES:
            shards.append({})
        scale = 1.0 if name.endswith("norm.weight") else 0.02
        shards[-1][name] = torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(0, scale)
    config.save_pretrained(base)
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, base / file, {"format": "pt"})
    places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    words = Tokenizer(models.WordLevel({"</s>": 0}, "</s>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(base)  # noqa: S106 - a token of text
    options = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=dora)
    adapted: Any = get_peft_model(model, options, low_cpu_mem_usage=True)
    pairs = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    # DoRA's magnitudes are the lengths of rows: of so many numbers of 0.02 each.
    save = {
        name: torch.full(pair.shape, 0.02 * HIDDEN**0.5) if "magnitude" in name else torch.randn(pair.shape) * 0.02
        for name, pair in pairs.items()
    }
    adapter.mkdir()
    save_file(save, adapter / "adapter_model.safetensors", {"format": "pt"})
    adapted.peft_config["default"].inference_mode = True
    adapted.peft_config["default"].save_pretrained(adapter)


def show(found: dict[str, list[dict[str, float]]], base: Path) -> int:
    """Print one table; return the exit code."""
    size = sum(path.stat().st_size for path in base.iterdir()) / 1e6
    largest = 2 * VOCABULARY * HIDDEN / 1e6
    title = f"{size:,.0f} MB in {len(list(base.glob('*.safetensors')))} shards, the largest weight {largest:.0f} MB"
    table = Table("", "seconds", "ratio", "on the disk", "ratio", "of the processor", "peak MB", title=title)
    middle = {
        way: {name: statistics.median(run[name] for run in runs) for name in runs[0]} for way, runs in found.items()
    }
    copied = middle["cp -r"]
    for way, took in middle.items():
        times, stored = took["seconds"] / copied["seconds"], took["stored"] / copied["stored"]
        cells = (
            f"{took['seconds']:.2f}",
            f"{times:.2f}",
            f"{took['stored']:.2f}",
            f"{stored:.2f}",
            f"{took['processor']:.2f}",
        )
        table.add_row(way, *cells, f"{took['megabytes']:,.0f}" if took["megabytes"] else "")
    Console().print(table)
    most = 4 * largest + BUDGET_MEGABYTES
    print(f"budgets: {BUDGET_TIMES} times cp -r on the disk, {most:,.0f} MB; load {os.getloadavg()}")
    ours = middle["by file"]
    return int(ours["stored"] > BUDGET_TIMES * copied["stored"] or ours["megabytes"] > most)


if __name__ == "__main__":
    sys.exit(main())
