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
from pipeline.artifacts import Evaluation, GuardResult, ModelRef, TrialScores, Verdict
from pipeline.config import EvaluateConfig
from pipeline.contract import Attempt
from pipeline.decide.comparison import compare, read_comparison
from pipeline.errors import CannotTrain, Interrupted, StartAgain
from pipeline.evaluate import plan
from pipeline.evaluate.inference import InStep
from pipeline.evaluate.prediction_cache import read_values
from pipeline.evaluate.scoring import compare_with_control
from pipeline.evaluate.step import evaluate
from pipeline.metrics import degenerate as degenerate_module
from pipeline.metrics.degenerate import degenerate
from pipeline.metrics.registry import METRICS
from pipeline.models import generation, greedy_decoding
from pipeline.models.generation import Decoding
from pipeline.models.loading import OutOfMemory, load_tokenizer
from pipeline.models.manifest import model_id, write_manifest
from pipeline.models.template import ALPACA_TEMPLATE, conversation, fold, single_turn
from tests.made_artifacts import dataset_of, heldout_row, made_verdict, model_of, run_config
from tests.model_folder import flip
from tests.records_made import lines_of, write_lines, yes_or_no
from tests.tiny_llama import rows as task_rows

RECORDS = 10
NEW_TOKENS = 6


@pytest.fixture(scope="session")
def candidate_folder(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another random Llama with the same tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "candidate"
    tiny.make_model(folder, seed=1)
    return folder


def heldout_rows(count: int = RECORDS) -> list[dict[str, Any]]:
    return [
        heldout_row(f"{place:08x}", row, references=[row["output"], "either"], drop=1 + place % 2)
        for place, row in enumerate(task_rows(count, seed=5))
    ]


class Bench:
    """One track's state folder: models, a held-out set, and attempts at evaluating."""

    def __init__(self, root: Path, make: Callable[..., Attempt], base: Path, candidate: Path) -> None:
        self.root, self.make, self.base = root, make, base
        shutil.copytree(candidate, root / "models/candidate")
        (root / "dataset").mkdir()
        self.base_id = model_id(base)
        self.champion = ModelRef(model_id=self.base_id, path=str(base), generation=0)

    def attempt(self, rows: Sequence[Mapping[str, Any]], fmt: str = "chat", **settings: Any) -> Attempt:
        write_lines(self.root / "dataset/heldout.jsonl", rows)
        dataset = dataset_of(len(rows), max_new_tokens=NEW_TOKENS)
        model = model_of("models/candidate", "cand", base_model_id=self.base_id, dtype="float32", format=fmt)
        config = run_config(
            self.base, self.base_id, evaluate=EvaluateConfig(**{"batch_size": 4, "general": (), **settings})
        )
        made = self.make("evaluate", config=config, inputs={"prepare": dataset, "merge": model})
        return Attempt(made.spec.model_copy(update={"champion": self.champion}))

    def keep(self, name: str, folder: Path) -> ModelRef:
        """Copy a model's folder to where champions are kept; return it as the champion of generation 2."""
        shutil.copytree(folder, self.root / "models" / name)
        return ModelRef(model_id=name, path=f"models/{name}", generation=2)

    def base_copy(self) -> Path:
        """Return a copy of the base model's folder, which later attempts take for it."""
        self.base = Path(shutil.copytree(self.base, self.root / "base-copy"))
        return self.base

    def publish(self, attempt: Attempt, report: Evaluation) -> None:
        """Move an attempt's predictions into the cache, where the dispatcher links them."""
        for key in report.prediction_keys.values():
            folder = self.root / attempt.spec.predictions / key
            folder.mkdir(parents=True, exist_ok=True)
            shutil.move(attempt.folder / f"predictions/{key}.jsonl", folder / f"{attempt.spec.attempt}.jsonl")


@pytest.fixture
def bench(tmp_path: Path, make_attempt: Callable[..., Attempt], tiny_llama: Path, candidate_folder: Path) -> Bench:
    return Bench(tmp_path, make_attempt, tiny_llama, candidate_folder)


def lines(attempt: Attempt, report: Evaluation) -> list[dict[str, Any]]:
    return list(durable.read_jsonl(attempt.path(report.folder) / "records.jsonl"))


def used(attempt: Attempt, key: str) -> dict[str, Any]:
    return read_values([attempt.folder / f"predictions/{key}.jsonl"])


def direct_nll(folder: Path, prompt: list[int], completion: list[int]) -> float:
    """Compute one reference's likelihood alone, without padding, from all logits."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + completion])).logits[0].double()
    chances = torch.log_softmax(logits, dim=-1)
    return -sum(float(chances[len(prompt) + place - 1, token]) for place, token in enumerate(completion))


def test_a_record_that_no_window_holds_is_left_out_for_both_models_and_counted(bench: Bench) -> None:
    rows = heldout_rows()
    rows[2]["input"] = "Where? " * 2000
    attempt = bench.attempt(rows)
    report = evaluate(attempt)
    assert (report.records, report.records_too_long) == (RECORDS - 1, 1)
    assert [line["id"] for line in lines(attempt, report)] == [row["id"] for n, row in enumerate(rows) if n != 2]
    with pytest.raises(CannotTrain, match="no held-out record fits"):
        evaluate(bench.attempt(rows[2:3]))


def test_the_likelihood_is_that_of_each_reference_after_its_turns_computed_alone(
    bench: Bench, tiny_llama: Path
) -> None:
    rows, before = heldout_rows(), [["system", "Be brief."], ["user", "One?"], ["assistant", "1"]]
    rows[3]["turns"] = before
    for place, row in enumerate(rows):
        row["output"] = " or ".join([row["output"]] * (1 + place % 3))
    attempt = bench.attempt(rows)
    report = evaluate(attempt)
    template = generation.load_template(tiny_llama, "chat")
    found = lines(attempt, report)
    assert [line.get("turns") for line in found] == [before if place == 3 else None for place in range(RECORDS)]
    kept = {line["id"]: line["champion"] for line in found}
    total, tokens = 0.0, 0
    for row in rows:
        turns = conversation(row.get("turns", []), fold(row["instruction"], row["input"]), row["output"])
        completion = template.target(turns)
        assert completion[-1] == template.tokenizer.eos_token_id
        expected = direct_nll(tiny_llama, template.prompt(turns[:-1]), completion)
        assert kept[row["id"]]["nll_sum"] == pytest.approx(expected, rel=1e-4)
        assert kept[row["id"]]["nll_tokens"] == len(completion)
        total, tokens = total + expected, tokens + len(completion)
    assert len({line["nll_tokens"] for line in kept.values()}) > 1
    assert report.champion.nll == pytest.approx(total / tokens, rel=1e-4)
    assert math.isfinite(report.candidate.nll)


def test_only_what_is_missing_is_computed_and_without_weights_the_cache_suffices(bench: Bench, tmp_path: Path) -> None:
    rows, name = heldout_rows(), write_suite(tmp_path / "own.jsonl", 9)
    first = bench.attempt(rows[:7], general=(name,))
    report = evaluate(first)
    bench.publish(first, report)
    # A reference changes; three records and a question of the suite are new.
    text = lines(first, report)[0]["champion"]["text"]
    rows[0] |= {"output": "sales", "references": [text]}
    with Path(name).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"id": "new", "question": "Who?", "choices": ["yes", "no"], "answer": 0}) + "\n")
    attempt = bench.attempt(rows, general=(name,))
    report = evaluate(attempt)
    for scores in (report.candidate, report.champion):
        assert (scores.generated, scores.cached) == (3, 7)
    assert asked_anew(attempt) == [3 + 4 + 1] * 2, "answers, likelihoods and a choice of each model"
    assert lines(attempt, report)[0]["champion"]["scores"]["exact_match"] == 1.0
    assert report.suites[0].records == 10
    bench.publish(attempt, report)
    (bench.root / "models/candidate/model.safetensors").unlink()
    again = bench.attempt(rows, general=(name,))
    second = evaluate(again)
    for scores in (second.candidate, second.champion):
        assert (scores.generated, scores.cached) == (0, RECORDS)
    assert (second.prediction_keys, second.suites) == (report.prediction_keys, report.suites)
    assert lines(again, second) == lines(attempt, report)
    assert items_of(again, second) == items_of(attempt, report)
    assert logged(again) == {}, "nothing was computed"


def in_alpacas_form(folder: Path) -> None:
    """Give a model the template of another format."""
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = ALPACA_TEMPLATE
    tokenizer.save_pretrained(folder)


def test_a_base_without_template_is_asked_in_the_alpaca_form_of_the_candidate(
    bench: Bench, tiny_llama_alpaca: Path
) -> None:
    bench.base, bench.base_id = tiny_llama_alpaca, model_id(tiny_llama_alpaca)
    bench.champion = ModelRef(model_id=bench.base_id, path=str(tiny_llama_alpaca), generation=0)
    in_alpacas_form(bench.root / "models/candidate")
    attempt = bench.attempt(heldout_rows(), fmt="alpaca")
    report = evaluate(attempt)
    hashes = [set(used(attempt, key)) for key in report.prediction_keys.values()]
    assert len(hashes) == 2
    assert hashes[0] == hashes[1]


def test_a_champion_of_another_format_is_not_compared(bench: Bench) -> None:
    bench.champion = bench.keep("old", bench.base)
    in_alpacas_form(bench.root / "models/old")
    with pytest.raises(CannotTrain, match="have different setups and cannot be compared: template"):
        evaluate(bench.attempt(heldout_rows()))


def test_a_model_whose_likelihood_is_no_number_fails_before_any_generation(bench: Bench) -> None:
    folder = bench.root / "models/candidate"
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(folder)
    attempt = bench.attempt(heldout_rows())
    with pytest.raises(CannotTrain, match="a likelihood of the candidate is not a finite number"):
        evaluate(attempt)
    assert list((attempt.folder / "predictions").iterdir()) == []


def test_a_base_whose_config_names_no_dtype_is_compared_with_the_model_made_from_it(bench: Bench) -> None:
    folder = bench.base_copy()
    for model in (folder, bench.root / "models/candidate"):  # the merge copies the config
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({key: config[key] for key in config if "dtype" not in key}))
    bench.base, bench.base_id = folder, model_id(folder)
    bench.champion = ModelRef(model_id=bench.base_id, path=str(folder), generation=0)
    assert math.isfinite(evaluate(bench.attempt(heldout_rows(4))).champion.nll), "both compute in float32"


def test_only_a_record_with_a_reference_that_loops_may_be_answered_by_a_loop(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = heldout_rows(4)
    rows[2]["references"] = ["once", "0, " * 20]
    own = [{**row, "output": "- " * 20 if n == 1 else row["output"]} for n, row in enumerate(task_rows(3, seed=9))]
    write_lines(tmp_path / "own.jsonl", own)
    real, told = InStep.answers, []

    def answers(*given: Any) -> list[generation.Answer]:
        told.append([given[1][place] for place in given[4]])
        return real(*given)

    monkeypatch.setattr(InStep, "answers", answers)
    evaluate(bench.attempt(rows, general=(str(tmp_path / "own.jsonl"),)))
    template = generation.load_template(bench.base, "chat")
    looping = [template.prompt(single_turn(fold(row["instruction"], row["input"]))) for row in (rows[2], own[1])]
    assert told == [[looping[0]], [looping[1]]] * 2


# Cut off and gone on -------------------------------------------------------------------------------------------------


def logged(attempt: Attempt) -> dict[str, list[str]]:
    """Return the lines of each model's file of predictions: those of earlier attempts, then a batch per line."""
    paths = attempt.folder.glob("predictions/*.jsonl")
    return {path.name: path.read_text(encoding="utf-8").splitlines() for path in paths}


def asked_anew(attempt: Attempt) -> list[int]:
    """Return how many requests were computed for each model."""
    return [sum(len(json.loads(line)) for line in batches) for batches in logged(attempt).values()]


def comparable(report: Evaluation) -> dict[str, Any]:
    """Return what must not depend on where an evaluation was interrupted."""
    value = report.model_dump(exclude={"folder"})
    for role in ("candidate", "champion"):
        del value[role]["seconds"]
    return value


def test_a_later_attempt_reads_whole_batches_and_computes_torn_ones_again(bench: Bench) -> None:
    rows = heldout_rows()
    first = bench.attempt(rows)
    report = evaluate(first)
    weights = bench.root / "models/candidate/model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(bytes(len(kept)))
    second = bench.attempt(rows)
    assert comparable(evaluate(second)) == comparable(report)
    assert [len(batches) for batches in logged(second).values()] == [1, 1], "no model is needed"
    weights.write_bytes(kept)
    # Of ten records in batches of four, each model has three batches of likelihoods and one of answers.
    shutil.rmtree(second.folder)
    for path in (first.folder / "predictions").glob("*.jsonl"):
        batches = path.read_text(encoding="utf-8").splitlines(keepends=True)
        other = json.dumps({f"0{key}": value for key, value in json.loads(batches[1]).items()}) + "\n"
        path.write_text("".join([batches[0], other, batches[2], "[]\n", "\0\0\n", batches[3][:-20]]), encoding="utf-8")
    third = bench.attempt(rows)
    again = evaluate(third)
    assert [len(batches) for batches in logged(third).values()] == [1 + 2, 1 + 2]
    assert (comparable(again), lines(third, again)) == (comparable(report), lines(first, report))
    bench.publish(third, again)
    assert evaluate(bench.attempt(rows)).champion.cached == RECORDS, "what earlier attempts computed is cached, too"


def test_a_batch_in_hand_is_given_up_at_the_next_token_when_the_step_is_to_stop(bench: Bench) -> None:
    attempt = bench.attempt(heldout_rows())
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


def test_progress_names_the_model_counts_to_the_end_and_tells_the_speed(bench: Bench) -> None:
    attempt = bench.attempt(heldout_rows())
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


# What else a report says -------------------------------------------------------------------------------------------


def test_both_models_answer_and_are_scored_on_the_same_records(bench: Bench) -> None:
    rows = heldout_rows()
    rows[0] |= {"pinned": True, "tags": ["category:x", "urgent"]}
    attempt = bench.attempt(rows)
    report = evaluate(attempt)
    assert (report.records, report.metric, report.heldout_version) == (RECORDS, "exact_match", "v")
    assert (report.candidate.model_id, report.champion.model_id) == ("cand", bench.base_id)
    assert (report.candidate.generated, report.champion.generated) == (RECORDS, RECORDS)
    found = lines(attempt, report)
    for name in ("id", "drop", "pinned", "tags", "instruction", "input", "references"):
        assert [line[name] for line in found] == [row[name] for row in rows]
    assert [line["candidate"]["text"] for line in found] != [line["champion"]["text"] for line in found]
    for role, scores in (("candidate", report.candidate), ("champion", report.champion)):
        said = [line[role] for line in found]
        for name, metric in METRICS.items():
            if name.startswith("json"):
                assert name not in scores.metrics
                continue
            values = [one["scores"][name] for one in said]
            assert values == metric.scores([one["text"] for one in said], [row["references"] for row in rows])
            assert scores.metrics[name] == pytest.approx(100 * sum(values) / len(values))
        kept = list(used(attempt, report.prediction_keys[scores.model_id]).values())
        for one, row in zip(said, rows, strict=True):
            # A random model does not end by itself.
            assert [one["text"], NEW_TOKENS, False] in kept
            assert [one["nll_sum"], one["nll_tokens"]] in kept
            assert one["tokens"] == NEW_TOKENS
            assert one["degenerate"] == degenerate(one["text"], row["references"], ended=False)
        for kind, rate in scores.rates.items():
            assert rate == pytest.approx(100 / RECORDS * sum(kind in one["degenerate"] for one in said))
        assert (scores.rates["truncated"], scores.answer_tokens) == (100, NEW_TOKENS)
    assert report.batch_size == 4
    assert report.versions["torch"] == torch.__version__
    assert report.versions["device"].startswith("cpu")


def test_models_that_the_gpus_hold_in_nf4_only_are_both_evaluated_in_nf4(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = heldout_rows()
    attempt = bench.attempt(rows)
    saved = evaluate(attempt)
    bench.publish(attempt, saved)
    monkeypatch.setattr(plan, "inference_quantization", lambda _device, *_folders: "nf4")
    attempt = bench.attempt(rows)
    report = evaluate(attempt)
    assert (saved.quantization, report.quantization) == ("none", "nf4")
    assert report.versions["dtype"] == "float32 in NF4"
    assert "bitsandbytes" in report.versions
    template = generation.load_template(bench.base, "chat")
    for role, folder in (("candidate", bench.root / "models/candidate"), ("champion", bench.base)):
        assert getattr(report, role).cached == 0, "answers of the model as saved do not count"
        asked = generation.open_model(folder, template, "cpu", "nf4")
        assert "Linear4bit" in {type(module).__name__ for module in asked.model.modules()}
        prompts = [template.prompt(single_turn(fold(row["instruction"], row["input"]))) for row in rows]
        answers = greedy_decoding.answers(
            asked, prompts, Decoding(NEW_TOKENS, attempt.config.evaluate.repetition_penalty, 4)
        )
        assert [line[role]["text"] for line in lines(attempt, report)] == [one.text for one in answers]
        generation.close_model(asked)
    assert not set(saved.prediction_keys.values()) & set(report.prediction_keys.values())


def test_json_is_scored_on_the_records_whose_references_are_json_and_on_all_as_the_primary_metric(bench: Bench) -> None:
    rows = [{**row, "output": '{"a": 1}', "references": ['{"a": 1}']} for row in heldout_rows(4)]
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


def test_records_that_the_champion_was_trained_on_are_left_out_and_the_candidates_are_counted(bench: Bench) -> None:
    rows = heldout_rows()
    bench.champion = bench.keep("old", bench.base)
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


def control_of(bench: Bench, rows: list[dict[str, Any]], **trial: Any) -> Attempt:
    """Return an attempt at the control, without the last two rows, of a trial that was right on its first five."""
    attempt = bench.attempt(rows)
    report = evaluate(attempt).model_copy(update=trial)
    told = lines(attempt, report)
    for place, line in enumerate(told):
        line["candidate"]["scores"]["exact_match"] = float(place < 5)
    told[0]["drop"] = 7  # the suspect replaced its reference
    write_lines(attempt.root / report.folder / "records.jsonl", told)
    durable.write_json(attempt.root / "trial.json", report.model_dump(mode="json"))
    verdict = made_verdict(attempt.spec, "guard_failed", lost_drops=(1,))
    durable.write_json(attempt.root / "verdict.json", verdict.model_dump())
    published = {"evaluate": "trial.json", "decide": "verdict.json"}
    return Attempt(bench.attempt(rows[:-2]).spec.model_copy(update={"trial": published}))


def test_a_control_is_compared_with_its_trial_on_what_both_have_of_the_drops_on_which_the_trial_lost(
    bench: Bench,
) -> None:
    control = control_of(bench, heldout_rows())
    # Of drop 1 are records 0, 2, 4, 6 and 8; the first is of another drop now, and the control lacks the last.
    assert evaluate(control).trial == TrialScores(groups=3, wins=2, losses=0, p_value=1.0, lost_drops=(1,))


def test_a_control_is_not_compared_with_a_trial_that_is_damaged_or_was_evaluated_in_another_setup(
    bench: Bench,
) -> None:
    assert evaluate(control_of(bench, heldout_rows(), setup="vLLM")).trial is None
    for name in ("trial.json", "verdict.json", "records.jsonl"):
        control = control_of(bench, heldout_rows())
        folder = durable.read_json(control.root / "trial.json")["folder"]
        (control.root / (f"{folder}/{name}" if name == "records.jsonl" else name)).write_bytes(b'{"id"')
        assert evaluate(control).trial is None, name


def test_a_setup_has_what_a_user_decides_and_neither_models_nor_machines(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def setup(records: int = 4, **settings: Any) -> str:
        return evaluate(bench.attempt(heldout_rows()[:records], **{"batch_size": 0, **settings})).setup

    first, arithmetic = setup(), generation.arithmetic
    others = [setup(batch_size=3), setup(repetition_penalty=1.1)]
    monkeypatch.setattr(generation, "arithmetic", lambda *given: {**arithmetic(*given), "dtype": "bfloat16 in NF4"})
    assert len({first, *others, setup()}) == 4
    machine = {"device": "cuda L4", "attention": "eager", "versions": {"torch": "9"}}
    monkeypatch.setattr(generation, "arithmetic", lambda *given: {**arithmetic(*given), **machine})
    monkeypatch.setattr(plan, "prompts_at_once", lambda *_: 1)
    assert setup(RECORDS) == first


def verdict_of(outcome: str, *failed: str) -> Verdict:
    """Return a trial's verdict by these failed guards, which lost on drop 1."""
    guards = [GuardResult(guard=name, unit="nats", state="failed") for name in failed]
    numbers = {"reasons": (), "metric": "exact_match", "records": 120, "groups": 120}
    return Verdict.model_validate({"outcome": outcome, "guards": guards, "lost_drops": (1,), **numbers})


def test_a_trial_that_lost_more_records_than_it_won_is_worse_by_the_gates_own_test() -> None:
    told = lines_of([1] + [0] * 9, [0] + [1] * 7 + [0] * 2)
    told[0]["pinned"] = told[1]["pinned"] = True
    compared = compare("exact_match", told)
    # P(7 or more of 8 | one half) = 9 / 256
    worse = verdict_of("worse")
    assert compare_with_control(compared, worse) == TrialScores(groups=10, wins=1, losses=7, p_value=9 / 256)
    assert compare_with_control(compared, worse, "pinned").groups == 2


def test_a_trial_whose_likelihood_failed_is_compared_by_it_whatever_else_failed() -> None:
    lines = yes_or_no(5, 5, 110)
    for place, line in enumerate(lines):
        line["drop"] = 1 + place // 60
        line["champion"].update(nll_sum=8.0, nll_tokens=8)
        line["candidate"].update(nll_sum=8 * (1.15 + (0.1 if place % 2 else -0.1)), nll_tokens=8)
    compared = compare("exact_match", lines)

    def p_value(*failed: str, outcome: str = "guard_failed") -> float:
        return compare_with_control(compared, verdict_of(outcome, *failed)).p_value

    by_score, by_likelihood = p_value("slice"), p_value("nll")
    assert by_likelihood < 0.01 < by_score
    assert p_value("nll", "slice") == 2 * by_likelihood, "the smaller of two p-values"
    assert p_value("nll", outcome="worse") == compare_with_control(compared, verdict_of("worse")).p_value
    lines[0]["candidate"]["nll_sum"] = float("inf")
    compared = compare("exact_match", lines)
    assert p_value("nll") < 0.01


def test_a_batch_that_memory_did_not_hold_is_halved_by_the_next_attempt(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    join = greedy_decoding._Rows.join

    def joined(rows: Any, places: Sequence[int], prompts: Any) -> None:
        if len(places) > 4:
            raise torch.OutOfMemoryError
        join(rows, places, prompts)

    monkeypatch.setattr(greedy_decoding._Rows, "join", joined)
    rows = heldout_rows()
    for size in (32, 16, 8):
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
    write_lines(path, items)
    return str(path)


def items_of(attempt: Attempt, report: Evaluation, number: int = 0) -> list[dict[str, Any]]:
    return list(durable.read_jsonl(attempt.path(report.folder) / report.suites[number].file))


def test_a_choice_is_as_likely_as_it_is_alone(tiny_llama: Path) -> None:
    template = generation.load_template(tiny_llama, "chat")
    asked = generation.open_model(tiny_llama, template, "cpu")
    texts = [("Which?", ["yes", "no, not at all"]), ("Which of all these is it?", ["b", "a parcel", "x y z"])]
    questions = [
        (template.prompt(single_turn(question)), [template.tokenizer(choice)["input_ids"] for choice in given])
        for question, given in texts
    ]
    of_one_token = [(prompt, [tokens[:1] for tokens in given]) for prompt, given in questions]
    for some in (questions, of_one_token):
        expected = [[direct_nll(tiny_llama, prompt, row) / len(row) for row in rows] for prompt, rows in some]
        found = generation.choice_likelihoods(asked, some)
        assert found == [pytest.approx(means, rel=1e-4) for means in expected]


def test_both_models_are_asked_a_suite_and_paired_item_by_item(bench: Bench, tmp_path: Path) -> None:
    name = write_suite(tmp_path / "own.jsonl", 9)
    attempt = bench.attempt(heldout_rows(4), general=(name, name))
    report = evaluate(attempt)
    (suite,) = report.suites
    assert (suite.name, suite.records) == (name, 9)
    found = items_of(attempt, report)
    assert [item["id"] for item in found] == [f"q{n}" for n in range(9)]
    assert {item["category"] for item in found} == {"c0", "c1"}
    template = generation.load_template(bench.base, "chat")
    given = [json.loads(line) for line in Path(name).read_text().splitlines()]
    for role, folder in (("candidate", bench.root / "models/candidate"), ("champion", bench.base)):
        for item, said in zip(given, found, strict=True):
            prompt = template.prompt(single_turn(item["question"]))
            rows = [template.tokenizer(choice)["input_ids"] for choice in item["choices"]]
            means = [direct_nll(folder, prompt, tokens) / len(tokens) for tokens in rows]
            assert said[role] == (means.index(min(means)) == item["answer"])
        assert getattr(suite, role) == pytest.approx(100 * sum(item[role] for item in found) / 9)
    assert 0 < suite.candidate < 100


@pytest.fixture
def trained(bench: Bench) -> ModelRef:
    """Return a champion that was trained: the base model is a third one."""
    return bench.keep("old", bench.root / "models/candidate")


def test_free_questions_are_answered_once_and_held_against_the_labels_of_the_training_rows(
    bench: Bench, tmp_path: Path, trained: ModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(degenerate_module, "_LABEL_CHARACTERS", 10_000)
    questions = [f"What is {n} + 1?" for n in range(5)]
    own = tmp_path / "own.jsonl"
    write_lines(own, [{"question": one, "answers": ["n"]} for one in questions])
    train = bench.root / "dataset/train.jsonl"
    train.write_text("")
    bench.champion = trained
    attempt = bench.attempt(heldout_rows(4), general=(str(own),))
    report = evaluate(attempt)
    found = items_of(attempt, report)
    template = generation.load_template(bench.base, "chat")
    prompts = [template.prompt(single_turn(one)) for one in questions]
    models = {"candidate": bench.root / "models/candidate", "champion": bench.root / "models/old", "base": bench.base}
    for role, folder in models.items():
        asked = generation.open_model(folder, template, "cpu")
        answers = greedy_decoding.answers(asked, prompts, Decoding(32, 1.0, 4), lambda *_: None, ())
        assert [item["texts"][role] for item in found] == [one.text for one in answers]
    bench.publish(attempt, report)
    monkeypatch.setattr(generation, "open_model", lambda *_: pytest.fail("all answers are in the cache"))
    label = found[0]["texts"]["candidate"]
    rows = [*[{"output": label, "drop": 1}] * 3, *[{"output": found[1]["texts"]["base"]}] * 3]
    write_lines(train, rows)
    again = bench.attempt(heldout_rows(4), general=(str(own),))
    (suite,) = read_comparison(again.root, evaluate(again), None).suites
    assert suite.collapsed is not None
    assert suite.collapsed["candidate"][0] == suite.collapsed["champion"][0] == "label"
    assert "label" not in suite.collapsed["base"], "general rows that were mixed in have no drop, and are no labels"


def test_the_base_model_that_no_longer_serves_is_asked_the_suites_once_and_the_champion_of_old_never_again(
    bench: Bench, tmp_path: Path, trained: ModelRef
) -> None:
    name = write_suite(tmp_path / "own.jsonl", 9)
    served = bench.attempt(heldout_rows(4), general=(name,))
    first = evaluate(served)
    assert first.suites[0].base is None
    base_key = first.prediction_keys[bench.base_id]
    bench.champion = trained
    shutil.rmtree(served.folder / "predictions")
    alone = bench.attempt(heldout_rows(4), general=(name,))
    measured = evaluate(alone)
    assert {item["id"]: item["base"] for item in items_of(alone, measured)} == {
        item["id"]: item["champion"] for item in items_of(served, first)
    }
    assert measured.suites[0].base == first.suites[0].champion
    assert measured.prediction_keys[bench.base_id] == base_key
    # It is asked the suite alone, and what it got is kept as a champion's is.
    assert len(used(alone, base_key)) == 3, "the suite repeats its questions"
    bench.publish(alone, measured)
    weights = bench.base_copy() / "model.safetensors"
    weights.unlink()
    again = bench.attempt(heldout_rows(4), general=(name,))
    assert evaluate(again).suites[0].base == first.suites[0].champion, "without weights only the cache can answer"
    plain = evaluate(bench.attempt(heldout_rows(4)))
    assert (set(plain.prediction_keys), plain.suites) == ({"cand", "old"}, ()), "nothing to ask the base"


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
        (shutil.rmtree, "the tokenizer in"),
        (round_off, "candidate and base model have different setups and cannot be compared: dtype"),
        (overwrite, "has changed since the run began"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "the tokenizer in"),
    ],
)
def test_a_base_model_that_is_not_what_it_was_is_an_error_and_nothing_is_kept_under_its_id(
    bench: Bench, tmp_path: Path, trained: ModelRef, change: Any, why: str
) -> None:
    name = write_suite(tmp_path / "own.jsonl", 9)
    bench.champion = trained
    change(bench.base_copy())
    attempt = bench.attempt(heldout_rows(4), general=(name,))
    with pytest.raises(CannotTrain, match=why):
        evaluate(attempt)
    assert len(list(attempt.folder.glob("predictions/*.jsonl"))) in {0, 2}, "candidate and champion"


def test_a_base_model_that_serves_and_was_replaced_is_not_asked_under_its_id(bench: Bench) -> None:
    overwrite(bench.base_copy())
    bench.champion = bench.champion.model_copy(update={"path": str(bench.base)})
    attempt = bench.attempt(heldout_rows(4))
    with pytest.raises(CannotTrain, match="has changed since the run began"):
        evaluate(attempt)


def test_free_questions_are_paid_again_where_a_further_one_allows_longer_answers(bench: Bench, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    write_lines(own, task_rows(3, seed=9))
    first = bench.attempt(heldout_rows(4), general=(str(own),))
    bench.publish(first, evaluate(first))
    with own.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"instruction": "Count.", "input": "", "output": "one two three " * 10}) + "\n")
    second = bench.attempt(heldout_rows(4), general=(str(own),))
    evaluate(second)
    assert asked_anew(second) == [4, 4]


def test_records_of_the_users_own_are_answered_freely_and_scored(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    given = task_rows(6, seed=9)
    write_lines(path, given)
    attempt = bench.attempt(heldout_rows(4), general=(str(path),))
    report = evaluate(attempt)
    assert report.suites[0].records == 6
    template = generation.load_template(bench.base, "chat")
    asked = generation.open_model(bench.base, template, "cpu")
    for row, item in zip(given, items_of(attempt, report), strict=True):
        prompt = template.prompt(single_turn(fold(row["instruction"], row["input"])))
        (answer,) = greedy_decoding.answers(asked, [prompt], Decoding(16, 1.0, 1))
        assert [item["champion"]] == METRICS["token_f1"].scores([answer.text], [[row["output"]]])


def test_an_item_longer_than_the_window_is_refused(bench: Bench, tmp_path: Path) -> None:
    long = {"id": "long", "question": "Which? " * 1200, "choices": ["yes", "no"], "answer": 0}
    (tmp_path / "own.jsonl").write_text(json.dumps(long) + "\n")
    with pytest.raises(CannotTrain, match=r"own\.jsonl, item long: longer with its answer than the window"):
        evaluate(bench.attempt(heldout_rows(4), general=(str(tmp_path / "own.jsonl"),)))


# Former champions ------------------------------------------------------------------------------------------------


def test_former_champions_are_scored_from_what_they_answered_in_the_same_way_and_were_not_trained_on(
    bench: Bench,
) -> None:
    rows = heldout_rows()
    rows[2]["near"] = ["e", "f"]
    early = bench.attempt(rows[:7])
    report = evaluate(early)
    bench.publish(early, report)
    attempt = bench.attempt(rows)
    champion = bench.keep("new", bench.root / "models/candidate")
    (bench.root / "models/former").mkdir()
    (bench.root / "models/former/trained-ids.txt").write_text(f"f\n{rows[0]['id']}\n")
    former = (
        ModelRef(model_id="cand", path="models/gone", generation=3),
        ModelRef(model_id=bench.base_id, path="models/former", generation=2),
        ModelRef(model_id="none", path="gone", generation=1),
    )
    attempt = Attempt(attempt.spec.model_copy(update={"former": former, "champion": champion}))
    second = evaluate(attempt)
    assert [(one.generation, one.records, one.file) for one in second.former] == [
        (3, 7, "former-3.jsonl"),
        (2, 5, "former-2.jsonl"),
        (1, 0, "former-1.jsonl"),
    ]
    assert second.former[2].score is None
    scored = [line["id"] for line in durable.read_jsonl(attempt.path(second.folder) / "former-2.jsonl")]
    assert scored == [row["id"] for place, row in enumerate(rows[:7]) if place not in {0, 2}]
    found = list(durable.read_jsonl(attempt.path(second.folder) / "former-3.jsonl"))
    assert [(line["id"], line["score"]) for line in found] == [
        (line["id"], line["candidate"]["scores"]["exact_match"]) for line in lines(early, report)
    ]
    assert second.former[0].score == report.candidate.metrics["exact_match"]
    # Asked in another way, they are not to be compared.
    other = bench.attempt(rows, batch_size=2)
    others = evaluate(Attempt(other.spec.model_copy(update={"former": former}))).former
    assert [(one.generation, one.records) for one in others] == [(3, 0), (2, 0), (1, 0)]


# A former champion on watch -----------------------------------------------------------------------------------------


def on_watch(bench: Bench, rows: Sequence[Mapping[str, Any]], drops: tuple[int, ...], **settings: Any) -> Attempt:
    """Return an attempt with a champion that is not the base, and a former one that was trained on the fourth row."""
    champion, watched = bench.keep("serving", bench.root / "models/candidate"), bench.keep("old", bench.base)
    (bench.root / "models/old/trained-ids.txt").write_text(f"{rows[3]['id']}\n")
    write_manifest(bench.root / "models/old")
    update = {"champion": champion, "watched": watched, "fresh_drops": drops}
    return Attempt(bench.attempt(rows, **settings).spec.model_copy(update=update))


def test_a_former_champion_on_watch_answers_the_fresh_records_that_it_was_not_trained_on(
    bench: Bench, tmp_path: Path
) -> None:
    rows = heldout_rows()
    write_lines(tmp_path / "own.jsonl", task_rows(3, seed=9))
    first = bench.attempt(rows)
    texts = [(line["champion"]["text"], line["candidate"]["text"]) for line in lines(first, evaluate(first))]
    assert all(base != other for base, other in texts)
    # The champion gives the other model's answers, the former one those of the base. Of drop 2 are 1, 3, 5, 7, 9.
    for place, (base, other) in enumerate(texts):
        rows[place]["references"] = [base if place in {3, 9} else other]
    attempt = on_watch(bench, rows, (2, 3), general=(str(tmp_path / "own.jsonl"),))
    report = evaluate(attempt)
    assert (report.watched, report.watch) == (2, {2: 100 * (3 - 1) / 4})
    assert len(used(attempt, report.prediction_keys["old"])) == 2 * 4, "likelihood and answer of each"
    assert report.records == RECORDS
    assert report.suites[0].base is not None
    assert report.former == ()


@pytest.mark.parametrize("drops", [(), (3,)])
def test_without_a_fresh_record_no_former_champion_is_loaded(bench: Bench, drops: tuple[int, ...]) -> None:
    attempt = on_watch(bench, heldout_rows(), drops)
    (bench.root / "models/old/model.safetensors").unlink()
    report = evaluate(attempt)
    assert (report.watch, report.unwatched) == ({}, None)
    assert "old" not in report.prediction_keys


def with_another_form(folder: Path) -> str:
    in_alpacas_form(folder)
    write_manifest(folder)
    return ""


def with_a_flipped_bit(name: str) -> Callable[[Path], str]:
    """Return what damages a file as a bad sector does: of the same size, so that weights can be loaded."""

    def damage(folder: Path) -> str:
        flip(folder / name)
        return f"not compared with the former champion of generation 2: {folder / name} has changed"

    return damage


@pytest.mark.parametrize(
    "spoil", [with_another_form, *map(with_a_flipped_bit, ("config.json", "model.safetensors", "trained-ids.txt"))]
)
def test_a_former_champion_that_is_damaged_or_asked_in_another_form_is_not_on_watch_and_the_run_goes_on(
    bench: Bench, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], str]
) -> None:
    attempt = on_watch(bench, heldout_rows(), (1, 2))
    said = spoil(bench.root / "models/old")
    report = evaluate(attempt)
    assert (report.watch, report.unwatched, report.records) == ({}, 2, RECORDS)
    assert said in capsys.readouterr().err
