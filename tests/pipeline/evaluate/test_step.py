"""Evaluation with two tiny Llamas and real attempts: what is asked, cached, counted and refused."""

import json
import math
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline import durable
from pipeline.artifacts import Dataset, Evaluation, Model, ModelRef
from pipeline.config import EvaluateConfig, RunConfig
from pipeline.contract import Attempt, StepSpec
from pipeline.decide.comparison import read_comparison
from pipeline.errors import CannotTrain, Interrupted, StartAgain, StepFailed
from pipeline.evaluate import plan
from pipeline.evaluate.prediction_cache import Prediction
from pipeline.evaluate.step import evaluate
from pipeline.metrics import degenerate as degenerate_module
from pipeline.metrics.degenerate import degenerate
from pipeline.metrics.registry import METRICS
from pipeline.models import generation, greedy_decoding
from pipeline.models.generation import Decoding
from pipeline.models.loading import OutOfMemory, load_tokenizer
from pipeline.models.manifest import model_id
from pipeline.models.prompt import ALPACA_TEMPLATE, completion_ids, fold, prompt_ids
from tests.made_artifacts import heldout_row

RECORDS = 10
NEW_TOKENS = 6


@pytest.fixture(scope="session")
def candidate_folder(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another random Llama with the same tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "candidate"
    tiny.make_model(folder, seed=1)
    return folder


def heldout_rows(tiny: Any, count: int = RECORDS) -> list[dict[str, Any]]:
    return [
        heldout_row(f"{place:08x}", row, references=[row["output"], "either"], drop=1 + place % 2)
        for place, row in enumerate(tiny.rows(count, seed=5))
    ]


class Bench:
    """One track's state folder: models, a held-out set, and attempts at evaluating."""

    def __init__(self, root: Path, make: Callable[..., Attempt], base: Path, candidate: Path) -> None:
        self.root, self.make, self.base = root, make, base
        shutil.copytree(candidate, root / "models/candidate")
        (root / "dataset").mkdir()
        self.candidate_id, self.base_id = "cand", model_id(base)
        self.champion = ModelRef(model_id=self.base_id, path=str(base), generation=0)

    def attempt(self, rows: Sequence[Mapping[str, Any]], fmt: str = "chat", **settings: Any) -> Attempt:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (self.root / "dataset/heldout.jsonl").write_text(text, encoding="utf-8")
        dataset = Dataset(
            folder="dataset",
            train_rows=1,
            dev_rows=0,
            heldout_rows=len(rows),
            heldout_groups=len(rows),
            heldout_pinned=True,
            heldout_version="v",
            dataset_sha256="d",
            duplicates=0,
            replaced=0,
            removed_heldout=0,
            metric="exact_match",
            max_new_tokens=NEW_TOKENS,
        )
        model = Model.model_validate(
            {
                "folder": "models/candidate",
                "model_id": self.candidate_id,
                "base_model_id": self.base_id,
                "dtype": "float32",
                "size_bytes": 1,
                "format": fmt,
                "seconds": 1.0,
            }
        )
        config = RunConfig(
            track="default",
            base_model=str(self.base),
            base_model_id=self.base_id,
            salt="s",
            evaluate=EvaluateConfig(**{"batch_size": 4, "general": (), **settings}),
        )
        made = self.make("evaluate", config=config, inputs={"prepare": dataset, "merge": model})
        return Attempt(made.spec.model_copy(update={"champion": self.champion}))

    def base_copy(self) -> Path:
        """Return a copy of the base model's folder, which later attempts take for it."""
        self.base = Path(shutil.copytree(self.base, self.root / "base-copy"))
        return self.base

    def publish(self, attempt: Attempt, report: Evaluation) -> None:
        """Copy an attempt's predictions into the cache, as the dispatcher does."""
        for key in report.prediction_keys.values():
            folder = self.root / attempt.spec.predictions / key
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(attempt.folder / f"predictions/{key}.jsonl", folder / f"{attempt.spec.attempt}.jsonl")


@pytest.fixture
def bench(tmp_path: Path, make_attempt: Callable[..., Attempt], tiny_llama: Path, candidate_folder: Path) -> Bench:
    return Bench(tmp_path, make_attempt, tiny_llama, candidate_folder)


def lines(attempt: Attempt, report: Evaluation) -> list[dict[str, Any]]:
    return list(durable.read_jsonl(attempt.path(report.folder) / "records.jsonl"))


def used(attempt: Attempt, key: str) -> list[Prediction]:
    text = (attempt.folder / f"predictions/{key}.jsonl").read_text(encoding="utf-8")
    return [Prediction.model_validate_json(line) for line in text.splitlines()]


def direct_nll(folder: Path, prompt: list[int], completion: list[int]) -> float:
    """Compute one reference's likelihood alone, without padding, from all logits."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + completion])).logits[0].double()
    chances = torch.log_softmax(logits, dim=-1)
    return -sum(float(chances[len(prompt) + place - 1, token]) for place, token in enumerate(completion))


def test_both_models_are_scored_on_the_same_records(bench: Bench, tiny: Any) -> None:
    rows = heldout_rows(tiny)
    attempt = bench.attempt(rows)
    report = evaluate(attempt)
    assert (report.records, report.metric, report.heldout_version, report.champion_generation) == (
        RECORDS,
        "exact_match",
        "v",
        0,
    )
    assert (report.candidate.model_id, report.champion.model_id) == ("cand", bench.base_id)
    assert (report.candidate.generated, report.champion.generated) == (RECORDS, RECORDS)
    found = lines(attempt, report)
    assert [(line["id"], line["drop"]) for line in found] == [(row["id"], row["drop"]) for row in rows]
    for role, scores in (("candidate", report.candidate), ("champion", report.champion)):
        for name, metric in METRICS.items():
            if name.startswith("json"):
                assert name not in scores.metrics
                continue
            values = [line[role]["scores"][name] for line in found]
            texts = [line[role]["text"] for line in found]
            assert values == metric.scores(texts, [row["references"] for row in rows])
            assert scores.metrics[name] == pytest.approx(100 * sum(values) / len(values))
    assert [line["candidate"]["text"] for line in found] != [line["champion"]["text"] for line in found]


def test_a_record_that_no_window_holds_is_left_out_for_both_models_and_counted(bench: Bench, tiny: Any) -> None:
    rows = heldout_rows(tiny)
    rows[2]["input"] = "Where? " * 2000
    attempt = bench.attempt(rows)
    report = evaluate(attempt)
    assert (report.records, report.records_too_long) == (RECORDS - 1, 1)
    assert [line["id"] for line in lines(attempt, report)] == [row["id"] for n, row in enumerate(rows) if n != 2]
    with pytest.raises(CannotTrain, match="no held-out record fits"):
        evaluate(bench.attempt(rows[2:3]))


def test_the_likelihood_is_that_of_each_reference_computed_alone(bench: Bench, tiny: Any, tiny_llama: Path) -> None:
    rows = heldout_rows(tiny)
    for place, row in enumerate(rows):
        row["output"] = " or ".join([row["output"]] * (1 + place % 3))
    attempt = bench.attempt(rows)
    report = evaluate(attempt)
    tokenizer = load_tokenizer(tiny_llama)
    kept = {line.id: line for line in used(attempt, report.prediction_keys[bench.base_id])}
    total, tokens = 0.0, 0
    for row in rows:
        content = fold(row["instruction"], row["input"])
        completion = completion_ids(tokenizer, "chat", content, row["output"], [tokenizer.eos_token_id])
        assert completion[-1] == tokenizer.eos_token_id
        expected = direct_nll(tiny_llama, prompt_ids(tokenizer, "chat", content), completion)
        assert kept[row["id"]].nll_sum == pytest.approx(expected, rel=1e-4)
        assert kept[row["id"]].nll_tokens == len(completion)
        total, tokens = total + expected, tokens + len(completion)
    assert len({line.nll_tokens for line in kept.values()}) > 1
    assert report.champion.nll == pytest.approx(total / tokens, rel=1e-4)
    assert math.isfinite(report.candidate.nll)


def test_a_second_evaluation_takes_every_prediction_from_the_cache(bench: Bench, tiny: Any) -> None:
    rows = heldout_rows(tiny)
    attempt = bench.attempt(rows)
    report = evaluate(attempt)
    bench.publish(attempt, report)
    # Without weights nothing can be asked: only the cache can answer.
    (bench.root / "models/candidate/model.safetensors").unlink()
    again = bench.attempt(rows)
    second = evaluate(again)
    assert (second.candidate.generated, second.candidate.cached) == (0, RECORDS)
    assert (second.champion.generated, second.champion.cached) == (0, RECORDS)
    assert second.prediction_keys == report.prediction_keys
    assert lines(again, second) == lines(attempt, report)
    assert second.candidate.nll == report.candidate.nll
    assert {line.id for line in used(again, report.prediction_keys["cand"])} == {row["id"] for row in rows}


def test_only_what_is_missing_is_generated(bench: Bench, tiny: Any) -> None:
    rows = heldout_rows(tiny)
    first = bench.attempt(rows[:7])
    bench.publish(first, evaluate(first))
    second = evaluate(bench.attempt(rows))
    assert (second.candidate.generated, second.candidate.cached) == (3, 7)


def test_a_changed_reference_costs_its_likelihood_and_no_generation(bench: Bench, tiny: Any, tiny_llama: Path) -> None:
    rows = heldout_rows(tiny)
    first = bench.attempt(rows)
    report = evaluate(first)
    bench.publish(first, report)
    text = lines(first, report)[0]["champion"]["text"]
    other = "billing" if rows[0]["output"] != "billing" else "sales"
    rows[0] = {**rows[0], "output": other, "references": [text]}
    attempt = bench.attempt(rows)
    second = evaluate(attempt)
    assert second.champion.generated == 0
    assert lines(attempt, second)[0]["champion"]["scores"]["exact_match"] == 1.0
    tokenizer = load_tokenizer(tiny_llama)
    content = fold(rows[0]["instruction"], rows[0]["input"])
    completion = completion_ids(tokenizer, "chat", content, other, [tokenizer.eos_token_id])
    kept = {line.id: line for line in used(attempt, second.prediction_keys[bench.base_id])}
    expected = direct_nll(tiny_llama, prompt_ids(tokenizer, "chat", content), completion)
    assert kept[rows[0]["id"]].nll_sum == pytest.approx(expected, rel=1e-4)
    assert second.champion.nll != report.champion.nll


def test_a_base_without_template_is_asked_in_the_alpaca_form_of_the_candidate(
    bench: Bench, tiny: Any, tiny_llama_alpaca: Path
) -> None:
    bench.base, bench.base_id = tiny_llama_alpaca, model_id(tiny_llama_alpaca)
    bench.champion = ModelRef(model_id=bench.base_id, path=str(tiny_llama_alpaca), generation=0)
    tokenizer = load_tokenizer(bench.root / "models/candidate")
    tokenizer.chat_template = ALPACA_TEMPLATE
    tokenizer.save_pretrained(bench.root / "models/candidate")
    attempt = bench.attempt(heldout_rows(tiny), fmt="alpaca")
    report = evaluate(attempt)
    hashes = [{line.prompt_hash for line in used(attempt, key)} for key in report.prediction_keys.values()]
    assert len(hashes) == 2
    assert hashes[0] == hashes[1]


def test_a_champion_of_another_format_is_not_compared(bench: Bench, tiny: Any) -> None:
    shutil.copytree(bench.base, bench.root / "models/old")
    tokenizer = load_tokenizer(bench.root / "models/old")
    tokenizer.chat_template = ALPACA_TEMPLATE
    tokenizer.save_pretrained(bench.root / "models/old")
    bench.champion = ModelRef(model_id="old", path="models/old", generation=2)
    with pytest.raises(CannotTrain, match=r"evaluated with different setups.*template"):
        evaluate(bench.attempt(heldout_rows(tiny)))


def test_a_model_whose_likelihood_is_no_number_fails_before_any_generation(bench: Bench, tiny: Any) -> None:
    folder = bench.root / "models/candidate"
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(folder)
    attempt = bench.attempt(heldout_rows(tiny))
    with pytest.raises(CannotTrain, match=r"the candidate's likelihood of record .* is not a finite number"):
        evaluate(attempt)
    assert list((attempt.folder / "predictions").iterdir()) == []


def test_a_base_whose_choices_are_no_numbers_is_not_measured_and_the_run_goes_on(
    bench: Bench, tiny: Any, tmp_path: Path, trained: ModelRef, capsys: pytest.CaptureFixture[str]
) -> None:
    name = write_suite(tmp_path / "own.jsonl", 9)
    bench.champion = trained
    folder = bench.base_copy()
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(folder)
    bench.base, bench.base_id = folder, model_id(folder)
    report = evaluate(bench.attempt(heldout_rows(tiny, 4), general=(name,)))
    assert report.suites[0].base is None
    assert "likelihood of a general suite's answer is not a finite number" in capsys.readouterr().err


def test_a_base_whose_config_names_no_dtype_is_compared_by_the_stored_one(bench: Bench, tiny: Any) -> None:
    folder = bench.base_copy()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: config[key] for key in config if "dtype" not in key}))
    bench.base, bench.base_id = folder, model_id(folder)
    bench.champion = ModelRef(model_id=bench.base_id, path=str(folder), generation=0)
    assert math.isfinite(evaluate(bench.attempt(heldout_rows(tiny, 4))).champion.nll), "both compute in float32"


def test_only_a_record_with_a_reference_that_loops_may_be_answered_by_a_loop(
    bench: Bench, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = heldout_rows(tiny, 4)
    rows[2]["references"] = ["once", "0, " * 20]
    own = [{**row, "output": "- " * 20 if n == 1 else row["output"]} for n, row in enumerate(tiny.rows(3, seed=9))]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    real, told = greedy_decoding.answers, []

    def answers(*given: Any) -> list[generation.Answer]:
        told.append([given[1][place] for place in given[4]])
        return real(*given)

    monkeypatch.setattr(greedy_decoding, "answers", answers)
    evaluate(bench.attempt(rows, general=(str(tmp_path / "own.jsonl"),)))
    tokenizer = load_tokenizer(bench.base)
    looping = [prompt_ids(tokenizer, "chat", fold(row["instruction"], row["input"])) for row in (rows[2], own[1])]
    assert told == [[looping[0]], [looping[1]]] * 2


# Cut off and gone on -------------------------------------------------------------------------------------------------


class StopsAfter(threading.Event):
    """Set once the logs of an attempt hold so many batches."""

    def __init__(self, attempt: Attempt, batches: int) -> None:
        super().__init__()
        self.attempt, self.batches = attempt, batches

    def is_set(self) -> bool:
        return sum(map(len, logged(self.attempt).values())) >= self.batches


def logged(attempt: Attempt) -> dict[str, list[str]]:
    """Return the lines of each model's log of batches."""
    paths = attempt.folder.glob("predictions/*.batches.jsonl")
    return {path.name: path.read_text(encoding="utf-8").splitlines() for path in paths}


def comparable(report: Evaluation) -> dict[str, Any]:
    """Return what must not depend on where an evaluation was cut off."""
    value = report.model_dump(exclude={"folder"})
    for role in ("candidate", "champion"):
        for timed in ("seconds", "resumed", "seconds_per_answer"):
            del value[role][timed]
    return value


#: Of ten records in batches of four, each model has three batches of likelihoods and one of answers.
BATCHES = 4


@pytest.mark.parametrize("cut", [1, 6])
def test_an_evaluation_that_was_stopped_goes_on_from_the_batches_that_it_has(
    bench: Bench,
    tiny: Any,
    cut: int,
    whole: tuple[dict[str, Any], list[dict[str, Any]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = heldout_rows(tiny)
    first = bench.attempt(rows)
    first.stop = StopsAfter(first, cut)
    with pytest.raises(Interrupted):
        evaluate(first)
    assert sum(map(len, logged(first).values())) == cut
    second = bench.attempt(rows)
    report = evaluate(second)
    assert sum(map(len, logged(second).values())) == 2 * BATCHES - cut, "only what was missing is computed"
    assert (comparable(report), lines(second, report)) == whole
    assert report.candidate.resumed == (RECORDS if cut >= BATCHES else 0)
    said = f"candidate: {report.candidate.resumed} of its {RECORDS} answers come from an interrupted attempt"
    assert (said in capsys.readouterr().err) == (report.candidate.resumed > 0)
    assert report.champion.resumed == 0


@pytest.fixture(scope="session")
def whole(
    tmp_path_factory: pytest.TempPathFactory, tiny: Any, tiny_llama: Path, candidate_folder: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return report and records of an evaluation that was never cut off."""
    root = tmp_path_factory.mktemp("whole")

    def make(step: str, *, config: RunConfig, inputs: Mapping[str, Any]) -> Attempt:
        folder = root / "attempt"
        folder.mkdir()
        for name, artifact in inputs.items():
            durable.write_json(root / f"{name}.json", artifact.model_dump(mode="json"))
        return Attempt(
            StepSpec(
                run=1,
                step=step,
                attempt=1,
                fence="f",
                root=str(root),
                folder="attempt",
                checkpoints="checkpoints",
                predictions="cache",
                env={},
                inputs={name: f"{name}.json" for name in inputs},
                drops=(),
                champion=ModelRef(model_id="m", path="m", generation=0),
                config=config,
            )
        )

    bench = Bench(root, make, tiny_llama, candidate_folder)
    attempt = bench.attempt(heldout_rows(tiny))
    report = evaluate(attempt)
    return comparable(report), lines(attempt, report)


def test_a_batch_that_is_torn_or_was_asked_otherwise_is_computed_again(
    bench: Bench, tiny: Any, whole: tuple[dict[str, Any], list[dict[str, Any]]]
) -> None:
    rows = heldout_rows(tiny)
    first = bench.attempt(rows)
    first.stop = StopsAfter(first, BATCHES)
    with pytest.raises(Interrupted):
        evaluate(first)
    (path,) = (first.folder / "predictions").glob("*.batches.jsonl")
    kept = path.read_text(encoding="utf-8").splitlines(keepends=True)
    other = json.dumps({**json.loads(kept[1]), "batch": "0" * 64}) + "\n"
    path.write_text("".join([kept[0], other, kept[2], "[]\n", "\0\0\n", kept[3][:-20]]), encoding="utf-8")
    second = bench.attempt(rows)
    report = evaluate(second)
    assert sum(map(len, logged(second).values())) == 2 * BATCHES - 2
    assert (comparable(report), lines(second, report)) == whole


def test_a_batch_in_hand_is_given_up_at_the_next_token_when_the_step_is_to_stop(bench: Bench, tiny: Any) -> None:
    attempt = bench.attempt(heldout_rows(tiny))
    asked: list[int] = []

    class StopsInBatch(threading.Event):
        """Set at the fourth look during the batch of answers."""

        def is_set(self) -> bool:
            if sum(map(len, logged(attempt).values())) == 3:
                asked.append(1)
            return len(asked) >= 4

    attempt.stop = StopsInBatch()
    with pytest.raises(Interrupted):
        evaluate(attempt)
    assert len(asked) == 4 < NEW_TOKENS
    assert sum(map(len, logged(attempt).values())) == 3, "and leaves no part of itself"


def test_all_answers_of_an_earlier_attempt_need_no_model(bench: Bench, tiny: Any) -> None:
    rows = heldout_rows(tiny)
    first = bench.attempt(rows)
    report = evaluate(first)
    weights = bench.root / "models/candidate/model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    second = bench.attempt(rows)
    again = evaluate(second)
    assert logged(second) == {}
    assert comparable(again) == comparable(report)
    assert (again.candidate.generated, again.candidate.resumed, again.candidate.cached) == (RECORDS, RECORDS, 0)


def test_progress_names_the_model_counts_to_the_end_and_tells_the_speed(bench: Bench, tiny: Any) -> None:
    attempt = bench.attempt(heldout_rows(tiny))
    told: list[dict[str, Any]] = []

    class Watched(Attempt):
        def progress(self, done: int, total: int, **fields: Any) -> None:
            super().progress(done, total, **fields)
            told.append({"done": done, "total": total, **fields})

    evaluate(Watched(attempt.spec))
    assert [step["phase"] for step in told] == sorted(step["phase"] for step in told)
    for role in ("candidate", "champion"):
        steps = [step for step in told if step["phase"] == role]
        assert [step["done"] for step in steps] == sorted(step["done"] for step in steps)
        assert steps[-1]["done"] == steps[-1]["total"] == 2 * RECORDS
        answering = [step for step in steps if step["tokens_per_second"]]
        assert answering[-1]["eta_seconds"] >= 0


def test_without_heldout_records_there_is_nothing_to_evaluate(bench: Bench) -> None:
    with pytest.raises(StepFailed, match="no held-out records"):
        evaluate(bench.attempt([]))


# What else a report says -------------------------------------------------------------------------------------------


def test_a_line_of_the_records_says_what_the_gate_and_the_card_need(bench: Bench, tiny: Any) -> None:
    rows = heldout_rows(tiny)
    rows[0] |= {"pinned": True, "tags": ["category:x", "urgent"]}
    attempt = bench.attempt(rows)
    # Grows with the data, and is nothing that is loaded.
    ids = bench.root / "models/candidate/trained-ids.txt"
    ids.write_text("f" * 32 + "\n")
    report = evaluate(attempt)
    first, second, *_ = lines(attempt, report)
    assert (first["pinned"], first["tags"]) == (True, ["category:x", "urgent"])
    assert (second["pinned"], second["tags"]) == (False, [])
    kept = {line.id: line for line in used(attempt, report.prediction_keys["cand"])}
    for line, row in zip(lines(attempt, report), rows, strict=True):
        assert {name: line[name] for name in ("instruction", "input", "references")} == {
            name: row[name] for name in ("instruction", "input", "references")
        }
        found = kept[row["id"]]
        said = line["candidate"]
        assert (said["text"], said["tokens"], said["nll_sum"], said["nll_tokens"]) == (
            found.text,
            found.tokens,
            found.nll_sum,
            found.nll_tokens,
        )
        # A random model does not end by itself.
        assert (found.tokens, found.ended) == (NEW_TOKENS, False)
        assert said["degenerate"] == degenerate(found.text, row["references"], ended=False)
    kinds = [line["candidate"]["degenerate"] for line in lines(attempt, report)]
    assert {name: rate / 100 * RECORDS for name, rate in report.candidate.rates.items()} == {
        name: pytest.approx(sum(name in some for some in kinds)) for name in ("empty", "truncated", "looping")
    }
    assert report.candidate.rates["truncated"] == 100
    assert report.candidate.answer_tokens == NEW_TOKENS
    assert report.candidate.seconds_per_answer == pytest.approx(sum(one.seconds for one in kept.values()) / RECORDS)
    assert min(one.seconds for one in kept.values()) > 0
    files = [path for path in (bench.root / "models/candidate").iterdir() if path.is_file() and path != ids]
    assert report.candidate.size_bytes == sum(path.stat().st_size for path in files)
    assert report.batch_size == 4
    assert report.versions["torch"] == torch.__version__
    assert report.versions["device"].startswith("cpu")


def test_json_is_scored_on_the_records_whose_references_are_json_and_on_all_as_the_primary_metric(
    bench: Bench, tiny: Any
) -> None:
    rows = [{**row, "output": '{"a": 1}', "references": ['{"a": 1}']} for row in heldout_rows(tiny, 4)]
    report = evaluate(bench.attempt(rows))
    assert {"json_valid", "json_f1"} <= report.candidate.metrics.keys()
    rows[0]["references"], rows[1]["references"] = ["none"], ['{"a": 1}', "none"]
    attempt = bench.attempt(rows)
    report = evaluate(attempt)
    scored = [set(line[role]["scores"]) for line in lines(attempt, report) for role in ("candidate", "champion")]
    assert scored == [set(METRICS) - {"json_valid", "json_f1"}] * 4 + [set(METRICS)] * 4
    assert report.candidate.metrics["json_valid"] == 0
    found = read_comparison(attempt.root, report, None)
    for name in ("json_f1", "json_valid"):
        assert np.isnan(found.scores[name]).all(axis=1).tolist() == [True, True, False, False]
    dataset = durable.read_json(bench.root / "runs/1/prepare.json")
    primary = bench.attempt(rows)
    durable.write_json(bench.root / "runs/1/prepare.json", {**dataset, "metric": "json_f1"})
    report = evaluate(primary)
    assert ["json_f1" in line["candidate"]["scores"] for line in lines(primary, report)] == [True] * 4
    assert ["json_valid" in line["candidate"]["scores"] for line in lines(primary, report)] == [False] * 2 + [True] * 2


def test_records_that_the_champion_was_trained_on_are_left_out_and_the_candidates_are_counted(
    bench: Bench, tiny: Any
) -> None:
    rows = heldout_rows(tiny)
    shutil.copytree(bench.base, bench.root / "models/old")
    bench.champion = ModelRef(model_id="old", path="models/old", generation=2)
    rows[4]["near"], rows[5]["near"] = ["a", "b"], ["c"]
    (bench.root / "models/old/trained-ids.txt").write_text(f"{rows[1]['id']}\nb\nfff\n")
    (bench.root / "models/candidate/trained-ids.txt").write_text(f"{rows[1]['id']}\n{rows[2]['id']}\n")
    attempt = bench.attempt(rows)
    report = evaluate(attempt)
    assert (report.records, report.records_seen_by_champion, report.records_seen_by_candidate) == (RECORDS - 2, 2, 1)
    assert [line["id"] for line in lines(attempt, report)] == [
        row["id"] for n, row in enumerate(rows) if n not in {1, 4}
    ]
    with pytest.raises(CannotTrain, match="trained on every held-out record, or on near-duplicates"):
        evaluate(bench.attempt(rows[1:2]))


def test_a_batch_that_memory_did_not_hold_is_halved_by_the_next_attempt(
    bench: Bench, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    join = greedy_decoding._Rows.join

    def joined(rows: Any, places: Sequence[int], prompts: Any) -> None:
        if len(places) > 4:
            raise torch.OutOfMemoryError
        join(rows, places, prompts)

    monkeypatch.setattr(greedy_decoding._Rows, "join", joined)
    rows = heldout_rows(tiny)
    for size in (16, 8):
        with pytest.raises(StartAgain, match=f"the next attempt uses batches of {size // 2} prompts, not {size}"):
            evaluate(bench.attempt(rows, batch_size=0))
    assert evaluate(bench.attempt(rows, batch_size=0)).batch_size == 4
    with pytest.raises(OutOfMemory, match="do not fit"):
        plan.go_on_with_smaller_batches(bench.root, 1, OutOfMemory("the model and one batch do not fit"))


# Suites ------------------------------------------------------------------------------------------------------------


def write_suite(path: Path, count: int) -> str:
    """Write questions of several lengths with two to four choices."""
    items = [
        {
            "id": f"q{n}",
            "category": f"c{n % 2}",
            "question": "Which? " * (1 + n % 3),
            "answer": n % 2,
            "choices": ["yes", "no, not at all", "billing", "a parcel"][: 2 + n % 3],
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


def items_of(attempt: Attempt, report: Evaluation, number: int = 0) -> list[dict[str, Any]]:
    return list(durable.read_jsonl(attempt.path(report.folder) / report.suites[number].file))


@pytest.mark.parametrize("cached", [True, False])
def test_a_choice_is_as_likely_as_it_is_alone(tiny_llama: Path, *, cached: bool) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    asked = generation.open_model(tiny_llama, tokenizer, "cpu")
    texts = [("Which?", ["yes", "no, not at all"]), ("Which of all these is it?", ["b", "a parcel", "x y z"])]
    questions = [
        (prompt_ids(tokenizer, "chat", question), [tokenizer(choice)["input_ids"] for choice in given])
        for question, given in texts
    ]
    if not cached:
        questions = [(prompt, [tokens[:1] for tokens in given]) for prompt, given in questions]
    found = generation.choice_likelihoods(asked, questions)
    for (prompt, given), means in zip(questions, found, strict=True):
        expected = [direct_nll(tiny_llama, prompt, tokens) / len(tokens) for tokens in given]
        assert means == pytest.approx(expected, rel=1e-4)


def test_both_models_are_asked_a_suite_and_paired_item_by_item(bench: Bench, tiny: Any, tmp_path: Path) -> None:
    name = write_suite(tmp_path / "own.jsonl", 9)
    attempt = bench.attempt(heldout_rows(tiny, 4), general=(name, name))
    report = evaluate(attempt)
    (suite,) = report.suites
    assert (suite.name, suite.records) == (name, 9)
    found = items_of(attempt, report)
    assert [item["id"] for item in found] == [f"q{n}" for n in range(9)]
    assert {item["category"] for item in found} == {"c0", "c1"}
    tokenizer = load_tokenizer(bench.base)
    given = [json.loads(line) for line in Path(name).read_text().splitlines()]
    for role, folder in (("candidate", bench.root / "models/candidate"), ("champion", bench.base)):
        for item, said in zip(given, found, strict=True):
            prompt = prompt_ids(tokenizer, "chat", item["question"])
            rows = [tokenizer(choice)["input_ids"] for choice in item["choices"]]
            means = [direct_nll(folder, prompt, tokens) / len(tokens) for tokens in rows]
            assert said[role] == (means.index(min(means)) == item["answer"])
        assert getattr(suite, role) == pytest.approx(100 * sum(item[role] for item in found) / 9)
    assert 0 < suite.candidate < 100


@pytest.fixture
def trained(bench: Bench) -> ModelRef:
    """Return a champion that was trained: the base model is a third one."""
    folder = bench.root / "models/old"
    shutil.copytree(bench.root / "models/candidate", folder)
    return ModelRef(model_id="old", path="models/old", generation=2)


def test_free_questions_are_answered_once_and_held_against_the_labels_of_the_training_rows(
    bench: Bench, tiny: Any, tmp_path: Path, trained: ModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(degenerate_module, "_LABEL_CHARACTERS", 10_000)
    questions = [f"What is {n} + 1?" for n in range(5)]
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"question": one, "answers": ["n"]}) + "\n" for one in questions))
    train = bench.root / "dataset/train.jsonl"
    train.write_text("")
    bench.champion = trained
    attempt = bench.attempt(heldout_rows(tiny, 4), general=(str(own),))
    report = evaluate(attempt)
    found = items_of(attempt, report)
    tokenizer = load_tokenizer(bench.base)
    prompts = [prompt_ids(tokenizer, "chat", one) for one in questions]
    models = {"candidate": bench.root / "models/candidate", "champion": bench.root / "models/old", "base": bench.base}
    for role, folder in models.items():
        asked = generation.open_model(folder, tokenizer, "cpu")
        answers = greedy_decoding.answers(asked, prompts, Decoding(32, 1.0, 4), lambda *_: None, ())
        assert [item["texts"][role] for item in found] == [one.text for one in answers]
    bench.publish(attempt, report)
    monkeypatch.setattr(generation, "open_model", lambda *_: pytest.fail("all answers are in the cache"))
    label = found[0]["texts"]["candidate"]
    rows = [*[{"output": label, "drop": 1}] * 3, *[{"output": found[1]["texts"]["base"]}] * 3]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = bench.attempt(heldout_rows(tiny, 4), general=(str(own),))
    (suite,) = read_comparison(again.root, evaluate(again), None).suites
    assert suite.collapsed is not None
    assert suite.collapsed["candidate"][0] == suite.collapsed["champion"][0] == "label"
    assert "label" not in suite.collapsed["base"], "general rows that were mixed in have no drop, and are no labels"


def test_the_base_model_that_no_longer_serves_is_asked_the_suites_once_and_the_champion_of_old_never_again(
    bench: Bench, tiny: Any, tmp_path: Path, trained: ModelRef
) -> None:
    name = write_suite(tmp_path / "own.jsonl", 9)
    served = bench.attempt(heldout_rows(tiny, 4), general=(name,))
    first = evaluate(served)
    assert (first.base_model_id, first.suites[0].base) == (None, None)
    base_key = first.prediction_keys[bench.base_id]
    bench.champion = trained
    alone = bench.attempt(heldout_rows(tiny, 4), general=(name,))
    measured = evaluate(alone)
    assert {item["id"]: item["base"] for item in items_of(alone, measured)} == {
        item["id"]: item["champion"] for item in items_of(served, first)
    }
    assert (measured.base_model_id, measured.suites[0].base) == (bench.base_id, first.suites[0].champion)
    assert measured.prediction_keys[bench.base_id] == base_key
    # It is asked the suite alone, and what it got is kept as a champion's is.
    kept = (alone.folder / f"predictions/{base_key}.jsonl").read_text().splitlines()
    assert len(kept) == 9
    assert all(line.startswith('{"suite":') for line in kept)
    bench.publish(alone, measured)
    weights = bench.base_copy() / "model.safetensors"
    weights.unlink()
    again = bench.attempt(heldout_rows(tiny, 4), general=(name,))
    assert evaluate(again).suites[0].base == first.suites[0].champion, "without weights only the cache can answer"


def test_a_base_model_is_not_asked_where_there_is_nothing_to_ask(bench: Bench, tiny: Any, trained: ModelRef) -> None:
    bench.champion = trained
    report = evaluate(bench.attempt(heldout_rows(tiny, 4)))
    assert (set(report.prediction_keys), report.suites) == ({"cand", "old"}, ())


def overwrite(folder: Path) -> None:
    """Put the weights of another training in place."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight.add_(1.0)
    model.save_pretrained(folder)


def round_off(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (shutil.rmtree, "it is not there"),
        (round_off, "its setup would differ"),
        (overwrite, "is not the one that the run trained from"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "it is damaged: the tokenizer in"),
        (lambda folder: (folder / "config.json").write_text("[]"), "it is damaged: "),
    ],
)
def test_a_base_model_that_is_not_what_it_was_is_not_measured_and_the_run_goes_on(
    bench: Bench,
    tiny: Any,
    tmp_path: Path,
    trained: ModelRef,
    change: Any,
    why: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = write_suite(tmp_path / "own.jsonl", 9)
    bench.champion = trained
    change(bench.base_copy())
    attempt = bench.attempt(heldout_rows(tiny, 4), general=(name,))
    report = evaluate(attempt)
    assert (report.base_model_id, report.suites[0].base) == (bench.base_id, None)
    assert set(report.prediction_keys) == {"cand", "old"}, "nothing is kept under its id"
    assert "base" not in items_of(attempt, report)[0]
    said = [line for line in capsys.readouterr().err.splitlines() if "base model" in line]
    assert len(said) == 1
    assert said[0].startswith("the base model is not evaluated on the general suites: ")
    assert why in said[0]


def test_scores_of_the_true_base_model_are_used_whatever_its_folder_holds_now(
    bench: Bench, tiny: Any, tmp_path: Path, trained: ModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write_suite(tmp_path / "own.jsonl", 9)
    bench.champion = trained
    first = bench.attempt(heldout_rows(tiny, 4), general=(name,))
    report = evaluate(first)
    bench.publish(first, report)
    overwrite(bench.base_copy())
    hashed: list[Path] = []
    monkeypatch.setattr(plan, "model_id", hashed.append)
    again = evaluate(bench.attempt(heldout_rows(tiny, 4), general=(name,)))
    assert (again.suites, again.prediction_keys) == (report.suites, report.prediction_keys)
    assert hashed == [], "reading a large model takes long"


def test_a_base_model_that_serves_and_was_replaced_is_not_asked_under_its_id(bench: Bench, tiny: Any) -> None:
    overwrite(bench.base_copy())
    bench.champion = bench.champion.model_copy(update={"path": str(bench.base)})
    attempt = bench.attempt(heldout_rows(tiny, 4))
    with pytest.raises(CannotTrain, match="is not the one that the run trained from"):
        evaluate(attempt)


def test_what_a_model_got_in_a_suite_is_paid_once_and_another_suite_again(
    bench: Bench, tiny: Any, tmp_path: Path
) -> None:
    rows = heldout_rows(tiny, 4)
    name = write_suite(tmp_path / "own.jsonl", 9)
    first = bench.attempt(rows, general=(name,))
    report = evaluate(first)
    bench.publish(first, report)
    for path in first.folder.glob("predictions/*.batches.jsonl"):
        path.unlink()
    second = bench.attempt(rows, general=(name,))
    weights = bench.root / "models/candidate/model.safetensors"
    kept = weights.read_bytes()
    weights.unlink()
    again = evaluate(second)
    assert logged(second) == {}
    assert (again.suites, items_of(second, again)) == (report.suites, items_of(first, report))
    assert (second.folder / f"predictions/{report.prediction_keys['cand']}.jsonl").read_text() == (
        first.folder / f"predictions/{report.prediction_keys['cand']}.jsonl"
    ).read_text(), "and it is there for the next time"
    weights.write_bytes(kept)
    write_suite(tmp_path / "own.jsonl", 10)
    third = bench.attempt(rows, general=(name,))
    assert evaluate(third).suites[0].records == 10
    assert {len(batches) for batches in logged(third).values()} == {3}, "ten items in batches of four, and no answer"


def test_records_of_the_users_own_are_answered_freely_and_scored(bench: Bench, tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    given = tiny.rows(6, seed=9)
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    attempt = bench.attempt(heldout_rows(tiny, 4), general=(str(path),))
    report = evaluate(attempt)
    assert report.suites[0].records == 6
    tokenizer = load_tokenizer(bench.base)
    asked = generation.open_model(bench.base, tokenizer, "cpu")
    for row, item in zip(given, items_of(attempt, report), strict=True):
        prompt = prompt_ids(tokenizer, "chat", fold(row["instruction"], row["input"]))
        (answer,) = greedy_decoding.answers(asked, [prompt], Decoding(16, 1.0, 1))
        assert [item["champion"]] == METRICS["token_f1"].scores([answer.text], [[row["output"]]])


def test_an_item_longer_than_the_window_is_left_out_for_both(
    bench: Bench, tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.jsonl"
    name = write_suite(path, 3)
    long = {"id": "long", "question": "Which? " * 1200, "choices": ["yes", "no"], "answer": 0}
    path.write_text(path.read_text() + json.dumps(long) + "\n")
    attempt = bench.attempt(heldout_rows(tiny, 4), general=(name,))
    assert [item["id"] for item in items_of(attempt, evaluate(attempt))] == ["q0", "q1", "q2"]
    assert "left out: 1 item of" in capsys.readouterr().err


# Former champions ------------------------------------------------------------------------------------------------


def test_former_champions_are_scored_from_what_they_answered_in_the_same_way_and_never_asked(
    bench: Bench, tiny: Any
) -> None:
    rows = heldout_rows(tiny)
    early = bench.attempt(rows[:7])
    report = evaluate(early)
    bench.publish(early, report)
    attempt = bench.attempt(rows)
    shutil.copytree(bench.root / "models/candidate", bench.root / "models/new")
    former = (
        ModelRef(model_id="cand", path="models/gone", generation=3),
        ModelRef(model_id=bench.base_id, path="gone", generation=2),
        ModelRef(model_id="none", path="gone", generation=1),
    )
    champion = ModelRef(model_id="new", path="models/new", generation=4)
    attempt = Attempt(attempt.spec.model_copy(update={"former": former, "champion": champion}))
    second = evaluate(attempt)
    assert [(one.generation, one.records) for one in second.former] == [(3, 7), (2, 7)]
    expected = [(line["id"], line["candidate"]["scores"]["exact_match"]) for line in lines(early, report)]
    found = list(durable.read_jsonl(attempt.path(second.folder) / second.former[0].file))
    assert second.former[0].file == "former-3.jsonl"
    assert [(line["id"], line["score"]) for line in found] == expected
    assert second.former[0].score == report.candidate.metrics["exact_match"]
    # Asked in another way, they are not to be compared.
    other = bench.attempt(rows, batch_size=2)
    assert evaluate(Attempt(other.spec.model_copy(update={"former": former}))).former == ()


def test_a_former_champion_is_not_scored_on_what_it_knows_by_heart(bench: Bench, tiny: Any) -> None:
    rows = heldout_rows(tiny)
    rows[2]["near"] = ["e", "f"]
    first = bench.attempt(rows)
    bench.publish(first, evaluate(first))
    (bench.root / "models/former").mkdir()
    (bench.root / "models/former/trained-ids.txt").write_text(f"f\n{rows[0]['id']}\n")
    former = (ModelRef(model_id=bench.base_id, path="models/former", generation=2),)
    attempt = Attempt(bench.attempt(rows).spec.model_copy(update={"former": former}))
    report = evaluate(attempt)
    assert (report.records, [one.records for one in report.former]) == (RECORDS, [RECORDS - 2])
    scored = [line["id"] for line in durable.read_jsonl(attempt.path(report.folder) / report.former[0].file)]
    assert scored == [row["id"] for place, row in enumerate(rows) if place not in {0, 2}]
