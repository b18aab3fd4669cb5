"""Models of several families are trained, merged and evaluated with their own templates."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import durable
from pipeline.config import EvaluateConfig, TrainConfig
from pipeline.contract import Attempt
from pipeline.evaluate.step import evaluate
from pipeline.merge.step import merge
from pipeline.models.generation import load_template
from pipeline.models.loading import load_tokenizer
from pipeline.models.template import fold, single_turn
from pipeline.records.heldout import dataset_hash
from pipeline.train.step import train
from tests.made_artifacts import heldout_row, run_config
from tests.model_families import FAMILIES, make_family
from tests.prepared_rows import write_rows


def logits_of(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=torch.tensor([tokens])).logits[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_trained_served_and_scored_on_what_its_template_writes(
    family: str, tiny: Any, tiny_llama: Path, tmp_path: Path, make_attempt: Callable[..., Attempt]
) -> None:
    base = make_family(tmp_path / "base", family, load_tokenizer(tiny_llama))
    template = load_template(base, "auto")
    rows = tiny.rows(30, seed=5)
    held_out = [heldout_row(f"{number:08x}", row) for number, row in enumerate(rows[24:])]
    dataset = write_rows(tmp_path, rows[:24])
    (tmp_path / "data/heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    dataset = dataset.model_copy(update={"heldout_rows": 6, "dataset_sha256": dataset_hash(tmp_path / "data")})
    config = run_config(
        base,
        train=TrainConfig(rank=4, learning_rate=3e-3, epochs=1, quantization="none", seed=1),
        evaluate=EvaluateConfig(batch_size=4, general=()),
    )
    inputs: dict[str, Any] = {"prepare": dataset}
    inputs["train"] = adapter = train(make_attempt("train", config=config, inputs=inputs))
    inputs["merge"] = model = merge(make_attempt("merge", config=config, inputs=inputs))
    assert (adapter.format, adapter.optimizer_steps) == ("chat", 3)
    turns = [single_turn(fold(row["instruction"], row["input"]), row["output"]) for row in rows]
    trained = [[*template.prompt(one[:-1]), *template.target(one)] for one in turns]
    assert adapter.trained_tokens == sum(map(len, trained[:24]))

    folder = tmp_path / model.folder
    served: Any = AutoTokenizer.from_pretrained(folder)
    assert served.apply_chat_template(turns[0][:-1], add_generation_prompt=True, return_dict=False) == template.prompt(
        turns[0][:-1]
    )
    merged, plain = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, base))
    changed = PeftModel.from_pretrained(plain, str(tmp_path / adapter.folder))
    assert torch.allclose(logits_of(merged, trained[0]), logits_of(changed, trained[0]), atol=1e-3)

    attempt = make_attempt("evaluate", config=config, inputs=inputs)
    report = evaluate(attempt)
    records = list(durable.read_jsonl(attempt.path(report.folder) / "records.jsonl"))
    assert len(records) == 6
    for record, one in zip(records, turns[24:], strict=True):
        target = template.target(one)
        logits = logits_of(merged, [*template.prompt(one[:-1]), *target])[-len(target) - 1 : -1]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum")
        assert record["candidate"]["nll_sum"] == pytest.approx(float(losses), rel=1e-3)
