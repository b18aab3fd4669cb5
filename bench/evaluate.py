"""
Measure what an evaluation costs beside a loop that answers one record at a time, and what a second challenge costs.

    python bench/evaluate.py [--records 500] [--base FOLDER] [--engine continuous]

One table on one base model (SmolLM2-135M-Instruct) and the demo's held-out questions, one after the other in one
process each: the guide's loop of `generate` over one model; our evaluate step, which asks two models and measures their
likelihoods too; the step again with another challenger and the same champion. Both load their models themselves,
decode greedily and allow the same number of tokens. Challengers are the base with a little noise on its last norm, so
that they answer alike and take as long. The first row is for one model; the ratio compares it with one model of ours.

Measured with both engines, 60 records in bf16, two busy CPU cores, each twice: answers of at most 16 tokens took 10 s
in batches and 23 to 29 s continuously, of at most 64 tokens 51 to 60 s and 55 to 61 s. On a GPU it was not measured.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from daemon.cli.demo.command import demo_base
from daemon.cli.demo.data import make_data
from pipeline import durable
from pipeline.artifacts import Dataset, Evaluation, Model, ModelRef, NoiseFloor
from pipeline.config import EvaluateConfig, RunConfig
from pipeline.contract import Attempt, StepSpec
from pipeline.model_folder.manifest import model_id

NEW_TOKENS = 16
BUDGET_CPU, BUDGET_GPU = 3.0, 8.0
LOOP = """
import json, sys, time
from pathlib import Path
began = time.monotonic()
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
imported = time.monotonic() - began
folder, rows, limit = sys.argv[1], [json.loads(line) for line in open(sys.argv[2], encoding="utf-8")], int(sys.argv[3])
device = "cuda" if torch.cuda.is_available() else "cpu"
began = time.monotonic()
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
tokens = 0
with torch.inference_mode():
    for row in rows:
        said = [{"role": "user", "content": row["instruction"] + "\\n### Input:\\n" + row["input"]}]
        prompt = tokenizer.apply_chat_template(
            said, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(device)
        out = model.generate(**prompt, max_new_tokens=limit, do_sample=False)
        tokens += out.shape[1] - prompt["input_ids"].shape[1]
        tokenizer.decode(out[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True)
print(json.dumps({"seconds": time.monotonic() - began, "tokens": tokens}))
"""


def main() -> int:
    """Print the table; exit 1 if the evaluation is not as much faster than the loop as it has to be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=500)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--engine", choices=("batches", "continuous"), default="batches")
    asked = parser.parse_args()
    base = asked.base or demo_base()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        _write_heldout(root, asked.records)
        loop = _loop(base, root / "data/heldout.jsonl")
        reports = []
        for number in (1, 2):
            _make_challenger(base, root / f"models/challenger-{number}", number)
            reports.append(_evaluate(root, base, number, asked.engine))
    return _print(asked.records, loop, reports)


def _write_heldout(root: Path, records: int) -> None:
    rows = make_data(heldout=records, first=1, second=1).heldout
    (root / "data").mkdir()
    facts = {"drop": 1, "pinned": False, "replaced": False, "tags": [], "near": []}
    lines = (
        json.dumps({"id": (name := f"{n:032x}"), **row, "references": [row["output"]], **facts, "group": name})
        for n, row in enumerate(rows)
    )
    (root / "data/heldout.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _loop(base: Path, rows: Path) -> dict[str, Any]:
    argv = [sys.executable, "-c", LOOP, str(base), str(rows), str(NEW_TOKENS)]
    done = subprocess.run(argv, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the loop failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _make_challenger(base: Path, folder: Path, seed: int) -> None:
    """Save the base with a little noise on its last norm."""
    import torch  # noqa: PLC0415 - the control plane's imports above come first
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    torch.manual_seed(seed)
    with torch.no_grad():
        model.model.norm.weight.add_(torch.randn_like(model.model.norm.weight) * 0.01)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def _evaluate(root: Path, base: Path, number: int, engine: Literal["batches", "continuous"]) -> Evaluation:
    """Run the step in a process of its own, as the worker does, and keep its predictions as the dispatcher does."""
    base_id = model_id(base)
    dataset = Dataset(
        folder="data", train_rows=1, dev_rows=0, heldout_rows=1, heldout_groups=1, heldout_pinned=True,
        heldout_version="v",
        dataset_sha256="d", duplicates=0, replaced=0, removed_heldout=0, metric="exact_match",
        max_new_tokens=NEW_TOKENS,
    )  # fmt: skip
    model = Model(
        folder=f"models/challenger-{number}", model_id=f"challenger-{number}", base_model_id=base_id, dtype="bfloat16",
        size_bytes=1, logits_difference=0.0, logits_tolerance=1.0, format="chat", seconds=1.0,
    )  # fmt: skip
    inputs = {}
    for name, artifact in (("prepare", dataset), ("merge", model)):
        inputs[name] = f"{name}-{number}.json"
        durable.write_json(root / inputs[name], artifact.model_dump(mode="json"))
    folder = root / f"attempts/{number}"
    folder.mkdir(parents=True)
    spec = StepSpec(
        run=number, step="evaluate", attempt=1, fence="f", root=str(root), folder=f"attempts/{number}",
        checkpoints="checkpoints", predictions="predictions", argv=(), env={}, inputs=inputs, drops=(),
        champion=ModelRef(model_id=base_id, path=str(base), generation=0),
        config=RunConfig(
            track="default", base_model=str(base), base_model_id=base_id, salt="s",
            evaluate=EvaluateConfig(general=(), engine=engine), noise=NoiseFloor(records=1, changed=0, points=0.0),
        ),
    )  # fmt: skip
    durable.write_json(folder / "spec.json", spec.model_dump(mode="json"))
    program = (
        "import sys; from pathlib import Path; from pipeline.contract import Attempt, StepSpec; "
        "from pipeline.steps.evaluate import evaluate; "
        "spec = StepSpec.model_validate_json(Path(sys.argv[1]).read_text()); "
        "print(evaluate(Attempt(spec)).model_dump_json())"
    )
    argv = [sys.executable, "-c", program, str(folder / "spec.json")]
    done = subprocess.run(argv, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the evaluation failed: {done.stderr[-2000:]}")
    report = Evaluation.model_validate_json(done.stdout.splitlines()[-1])
    for key in report.prediction_keys.values():
        kept = root / "predictions" / key
        kept.mkdir(parents=True, exist_ok=True)
        os.link(Attempt(spec).folder / f"predictions/{key}.jsonl", kept / f"{number}.jsonl")
    return report


def _environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}


def _print(records: int, loop: dict[str, Any], reports: list[Evaluation]) -> int:
    first, second = reports
    table = Table(
        title=f"{records} held-out records, at most {NEW_TOKENS} tokens an answer, {first.versions['device']}"
    )
    for column in ("", "answers made", "from the cache", "tokens", "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("loop, one model", str(records), "0", str(loop["tokens"]), f"{loop['seconds']:.1f}")
    for number, report in enumerate(reports, 1):
        for role in ("candidate", "champion"):
            scores = getattr(report, role)
            tokens = f"{scores.answer_tokens * records:.0f}" if scores.generated else "0"
            row = (str(scores.generated), str(scores.cached), tokens, f"{scores.seconds:.1f}")
            table.add_row(f"challenge {number}, {role}", *row)
    Console().print(table)
    ours = (first.candidate.seconds + first.champion.seconds) / 2
    answering = (first.candidate.seconds_per_answer or 0.0) * records
    ratio, budget = loop["seconds"] / ours, BUDGET_GPU if "cuda" in first.versions["device"] else BUDGET_CPU
    print(
        f"batches of {first.batch_size}; of the candidate's seconds {answering:.1f} are answers, the rest likelihoods"
    )
    print(f"the loop takes {ratio:.1f} times as long as ours for one model (budget: {budget:g} times or more)")
    paid = second.champion.generated
    print(f"second challenge: {paid} answers of the champion were made again, {second.champion.seconds:.1f} s")
    return int(ratio < budget or paid > 0)


if __name__ == "__main__":
    sys.exit(main())
