"""Continuous batching against plain batches, on tiny models; results that get lost, double or fail; whole attempts."""

import dataclasses
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.generation.continuous_batching.scheduler import FIFOScheduler

from pipeline import durable
from pipeline.artifacts import Dataset, Evaluation, Model, ModelRef, NoiseFloor
from pipeline.config import EvaluateConfig, RunConfig
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain, Interrupted, StepFailed
from pipeline.evaluation.prediction_cache import Prediction
from pipeline.model_folder.manifest import model_id
from pipeline.prompt import prompt_ids
from pipeline.qlora import continuous_batching, generation
from pipeline.qlora.generation import Answer, AskedModel, Decoding
from pipeline.qlora.loading import load_tokenizer
from pipeline.steps.evaluate import evaluate
from tests.made_artifacts import heldout_row

RECORDS = 10
NEW_TOKENS = 8
DECODING = Decoding(NEW_TOKENS, 1.0, 3)
#: The track's noise floor was measured before.
QUIET = NoiseFloor(records=1, changed=0, points=0.0)
Tamper = Callable[[Any], list[Any]]


def open_folder(folder: Path) -> AskedModel:
    return generation.open_model(folder, load_tokenizer(folder), "cpu")


def prompts_of(tiny: Any, folder: Path, count: int = RECORDS) -> list[list[int]]:
    """Return prompts of very different lengths."""
    tokenizer = load_tokenizer(folder)
    return [
        prompt_ids(tokenizer, "chat", "x " * 12 * (n % 4) + row["input"])
        for n, row in enumerate(tiny.rows(count, seed=3))
    ]


def in_batches(asked: AskedModel, prompts: list[list[int]], decoding: Decoding = DECODING) -> dict[int, Answer]:
    found: dict[int, Answer] = {}
    for batch in generation.answer_batches(prompts, decoding.batch_size):
        said = generation.answers(asked, [prompts[index] for index in batch], decoding)
        found.update(zip(batch, said, strict=True))
    return found


def continuously(
    asked: AskedModel, prompts: list[list[int]], decoding: Decoding = DECODING
) -> tuple[dict[int, Answer], list[int]]:
    """Return the answers by place, and the places in the order of what was given and taken back."""
    found: dict[int, Answer] = {}
    told: list[int] = []

    def keep(place: int, answer: Answer | None, seconds: float) -> None:
        told.append(place)
        assert seconds >= 0
        if answer is None:
            del found[place]
        else:
            assert place not in found
            found[place] = answer

    continuous_batching.answers(asked, prompts, decoding, keep, lambda: None)
    return found, told


@pytest.fixture(scope="session")
def ending_llama(tiny: Any, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, some of whose answers end early: an end token is one that it says in the middle of some."""
    folder = tmp_path_factory.mktemp("ending") / "model"
    shutil.copytree(tiny_llama, folder)
    asked = open_folder(folder)
    with torch.inference_mode():
        said = [
            asked.model.generate(torch.tensor([prompt]), max_new_tokens=3)[0, -1].item()
            for prompt in prompts_of(tiny, folder)
        ]
    durable.write_json(folder / "generation_config.json", {"eos_token_id": sorted(set(said[:2]))})
    return folder


def test_answers_are_those_of_plain_batches(tiny: Any, ending_llama: Path) -> None:
    asked = open_folder(ending_llama)
    prompts = prompts_of(tiny, ending_llama)
    expected = in_batches(asked, prompts)
    found, told = continuously(asked, prompts)
    assert found == expected, "text, tokens and whether it ended"
    assert sorted(told) == list(range(RECORDS))
    assert {answer.ended for answer in found.values()} == {True, False}
    assert in_batches(asked, prompts) == expected, "the model is left as it was"


def test_a_prompt_longer_than_a_pass_is_read_in_parts(
    tiny: Any, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuous_batching, "_PASS_TOKENS", 16)
    asked = open_folder(tiny_llama)
    prompts = prompts_of(tiny, tiny_llama)
    assert max(map(len, prompts)) > 2 * 16
    assert continuously(asked, prompts)[0] == in_batches(asked, prompts)


def save_small(folder: Path, config: Any, tokens_from: Path) -> Path:
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM
    model.from_config(config).save_pretrained(folder)
    load_tokenizer(tokens_from).save_pretrained(folder)
    return folder


def small(kind: Any, tokens_from: Path, **more: Any) -> Any:
    tokenizer = load_tokenizer(tokens_from)
    return kind(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id, initializer_range=0.1, **more,
    )  # fmt: skip


def test_a_sliding_window_is_kept_to(tiny: Any, tiny_llama: Path, tmp_path: Path) -> None:
    room = {"intermediate_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 512, "sliding_window": 16}
    config = small(transformers.Gemma2Config, tiny_llama, head_dim=16, bos_token_id=None, **room)
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    folder = save_small(tmp_path / "model", config, tiny_llama)
    continuous_batching.check(folder, 1.0)
    asked, prompts = open_folder(folder), prompts_of(tiny, tiny_llama)
    assert continuously(asked, prompts)[0] == in_batches(asked, prompts)


def test_a_model_without_a_cache_to_page_is_refused_without_its_weights(tiny_llama: Path, tmp_path: Path) -> None:
    config = transformers.MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1, eos_token_id=2)
    config.save_pretrained(tmp_path)
    with pytest.raises(CannotTrain, match="MambaForCausalLM does not keep keys and values") as caught:
        continuous_batching.check(tmp_path, 1.0)
    assert 'evaluate.engine = "batches"' in caught.value.hint
    continuous_batching.check(tiny_llama, 1.0)


def test_a_model_that_the_library_cannot_page_is_refused_after_one_short_answer(
    tiny: Any, tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = small(transformers.GPTNeoXConfig, tiny_llama, intermediate_size=128, max_position_embeddings=512)
    folder = save_small(tmp_path / "model", config, tiny_llama)
    continuous_batching.check(folder, 1.0)
    asked = open_folder(folder)
    with pytest.raises(CannotTrain, match=r"cannot ask this model: .*PagedAttentionCache") as caught:
        continuous_batching.prove(asked, prompts_of(tiny, tiny_llama)[0], DECODING, lambda: None)
    assert 'evaluate.engine = "batches"' in caught.value.hint
    assert "Traceback" not in capfd.readouterr().err


def test_a_repetition_penalty_is_refused_where_it_would_be_dropped(tiny_llama: Path) -> None:
    with pytest.raises(CannotTrain, match=r"no repetition penalty.*1\.2"):
        continuous_batching.check(tiny_llama, 1.2)
    with pytest.raises(ValidationError, match=r"no repetition penalty.*1\.2: set evaluate\.engine"):
        EvaluateConfig(engine="continuous", repetition_penalty=1.2)
    assert EvaluateConfig(repetition_penalty=1.2).engine == "batches"


# Results that are not as they should be ------------------------------------------------------------------------------


@pytest.fixture
def tamper(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tamper], list[str]]:
    """Let a function turn each result of the library's real manager into those that come; return all ids it made."""
    real = ContinuousBatchingManager.get_result
    made: list[str] = []

    def install(change: Tamper) -> list[str]:
        waiting: list[Any] = []

        def get_result(manager: Any, request_id: str | None = None, timeout: float | None = None) -> Any:
            if waiting:
                return waiting.pop(0)
            result = real(manager, request_id, timeout)
            if result is None:
                return None
            made.append(result.request_id)
            waiting.extend(change(result))
            return waiting.pop(0) if waiting else get_result(manager, request_id, timeout)

        monkeypatch.setattr(ContinuousBatchingManager, "get_result", get_result)
        return made

    return install


def failed(result: Any) -> Any:
    return dataclasses.replace(result, status=RequestStatus.FAILED, error="a page was lost")


ONCE: dict[str, Tamper] = {
    "lost": lambda _: [],
    "doubled": lambda result: [result, result],
    "failed": lambda result: [failed(result)],
    "failed and done": lambda result: [failed(result), result],
    "done and failed": lambda result: [result, failed(result)],
    "a part": lambda result: [dataclasses.replace(result, generated_tokens=result.generated_tokens[:1])],
    "empty": lambda result: [dataclasses.replace(result, generated_tokens=[])],
    "not over": lambda result: [dataclasses.replace(result, status=RequestStatus.DECODING)],
    "another's": lambda result: [dataclasses.replace(result, prompt_ids=result.prompt_ids[1:])],
    "unasked": lambda result: [dataclasses.replace(result, request_id="77")],
}


@pytest.mark.parametrize("change", ONCE.values(), ids=ONCE)
def test_a_request_without_exactly_one_whole_answer_is_asked_again(
    tiny: Any, tiny_llama: Path, tamper: Callable[[Tamper], list[str]], change: Tamper
) -> None:
    asked, prompts = open_folder(tiny_llama), prompts_of(tiny, tiny_llama)
    expected = in_batches(asked, prompts)
    spoilt: list[str] = []

    def fourth(result: Any) -> list[Any]:
        spoilt.append(result.request_id)
        return change(result) if len(spoilt) == 4 else [result]

    made = tamper(fourth)
    found, told = continuously(asked, prompts)
    assert found == expected
    assert len(made) == RECORDS + 1
    assert made[-1] == made[3], "it alone"
    assert told[-1] == int(made[3])


def test_answers_that_stay_away_fail_the_step_with_their_number(
    tiny: Any, tiny_llama: Path, tamper: Callable[[Tamper], list[str]]
) -> None:
    asked, prompts = open_folder(tiny_llama), prompts_of(tiny, tiny_llama)
    made = tamper(lambda result: [failed(result)] if result.request_id in {"2", "5"} else [result])
    with pytest.raises(StepFailed, match=r"2 of 10 answers are missing.*3 times: a page was lost") as caught:
        continuously(asked, prompts)
    assert 'evaluate.engine = "batches"' in caught.value.hint
    assert len(made) == RECORDS + 2 + 2


def test_a_thread_that_dies_is_told_by_its_error(tiny: Any, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, prompts = open_folder(tiny_llama), prompts_of(tiny, tiny_llama)

    def breaks(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(FIFOScheduler, "schedule_batch", breaks)
    error: Exception = RuntimeError("no block is free")
    with pytest.raises(StepFailed, match=r"10 of 10 answers are missing.*no block is free"):
        continuously(asked, prompts)
    error = torch.OutOfMemoryError("too little")
    with pytest.raises(StepFailed, match="memory does not hold") as caught:
        continuously(asked, prompts)
    assert "evaluate.batch_size" in caught.value.hint


def test_an_engine_that_makes_no_pass_any_more_is_given_up(
    tiny: Any, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuous_batching, "_STALL_SECONDS", 0.0)
    monkeypatch.setattr(FIFOScheduler, "schedule_batch", lambda *_: ([], False, 0, 0))
    with pytest.raises(StepFailed, match="10 of 10 answers are missing"):
        continuously(open_folder(tiny_llama), prompts_of(tiny, tiny_llama))


# Whole attempts ------------------------------------------------------------------------------------------------------


@pytest.fixture
def attempt(
    tmp_path: Path, make_attempt: Callable[..., Attempt], tiny: Any, tiny_llama: Path
) -> Callable[..., Attempt]:
    """A factory of attempts of one run: attempt(engine=..., noise=...)."""
    tiny.make_model(tmp_path / "models/candidate", seed=1)
    (tmp_path / "dataset").mkdir()
    base_id = model_id(tiny_llama)

    def make(noise: NoiseFloor | None = QUIET, **settings: Any) -> Attempt:
        rows = [heldout_row(f"{place:08x}", row) for place, row in enumerate(tiny.rows(RECORDS, seed=5))]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "dataset/heldout.jsonl").write_text(text, encoding="utf-8")
        dataset = Dataset(
            folder="dataset", train_rows=1, dev_rows=0, heldout_rows=RECORDS, heldout_groups=RECORDS,
            heldout_pinned=True,
            heldout_version="v", dataset_sha256="d", duplicates=0, replaced=0, removed_heldout=0,
            metric="exact_match", max_new_tokens=NEW_TOKENS,
        )  # fmt: skip
        model = Model.model_validate({
            "folder": "models/candidate", "model_id": "cand", "base_model_id": base_id, "dtype": "float32",
            "size_bytes": 1, "logits_difference": 0.0, "logits_tolerance": 1.0, "format": "chat", "seconds": 1.0,
        })  # fmt: skip
        config = RunConfig(
            track="default", base_model=str(tiny_llama), base_model_id=base_id, salt="s", noise=noise,
            evaluate=EvaluateConfig(**{"batch_size": 4, "general": (), "engine": "continuous", **settings}),
        )  # fmt: skip
        made = make_attempt("evaluate", config=config, inputs={"prepare": dataset, "merge": model})
        champion = ModelRef(model_id=base_id, path=str(tiny_llama), generation=0)
        return Attempt(made.spec.model_copy(update={"champion": champion}))

    return make


def used(attempt: Attempt, report: Evaluation, role: str) -> list[Prediction]:
    key = report.prediction_keys[role]
    text = (attempt.folder / f"predictions/{key}.jsonl").read_text(encoding="utf-8")
    return [Prediction.model_validate_json(line) for line in text.splitlines()]


def untimed(predictions: list[Prediction]) -> list[dict[str, Any]]:
    return [prediction.model_dump(exclude={"seconds"}) for prediction in predictions]


def answers_logged(attempt: Attempt) -> int:
    """Return how many answers the logs of an attempt hold: lists that begin with a text."""
    lines = [
        json.loads(line)["values"]
        for path in attempt.folder.glob("predictions/*.batches.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return sum(len(values) == 1 and isinstance(values[0][0], str) for values in lines)


def test_both_engines_predict_the_same_under_keys_of_their_own(attempt: Callable[..., Attempt]) -> None:
    plain, other = attempt(engine="batches"), attempt()
    reports = evaluate(plain), evaluate(other)
    for role in ("cand", plain.config.base_model_id):
        one, two = used(plain, reports[0], role), used(other, reports[1], role)
        assert untimed(one) == untimed(two)
        assert all(prediction.seconds > 0 for prediction in two)
        assert reports[0].prediction_keys[role] != reports[1].prediction_keys[role]
    assert "engine" not in reports[0].versions
    assert reports[1].versions["engine"] == continuous_batching.ENGINE
    assert reports[0].candidate.metrics == reports[1].candidate.metrics
    assert reports[1].candidate.generated == RECORDS
    assert answers_logged(other) == 2 * RECORDS


def test_an_evaluation_that_was_stopped_keeps_each_answer_that_it_has(
    attempt: Callable[..., Attempt], capsys: pytest.CaptureFixture[str], tamper: Callable[[Tamper], list[str]]
) -> None:
    whole = attempt()
    expected = evaluate(whole)
    # It is an earlier attempt of the same run, and by its log nothing would be left to ask.
    shutil.rmtree(whole.folder / "predictions")
    first = attempt()

    class Stops(threading.Event):
        """Set once the log holds seven answers."""

        def is_set(self) -> bool:
            return answers_logged(first) >= 7

    first.stop = Stops()
    with pytest.raises(Interrupted):
        evaluate(first)
    assert answers_logged(first) == 7
    second = attempt()
    made = tamper(lambda result: [result])
    report = evaluate(second)
    assert report.candidate.resumed == 7
    assert f"candidate: 7 of its {RECORDS} answers were there" in capsys.readouterr().err
    assert len(made) == (1 + 3) + (1 + RECORDS), "one to try each model, and what was missing"
    assert report.prediction_keys == expected.prediction_keys
    assert report.candidate.metrics == expected.candidate.metrics


def test_it_is_looked_whether_to_stop_before_the_first_answer_too(
    tiny: Any, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, prompts = open_folder(tiny_llama), prompts_of(tiny, tiny_llama)
    found: list[int] = []
    real, hard = ContinuousBatchingManager.stop, []

    def spied(manager: Any, *, hard_stop: bool = False, **more: Any) -> None:
        hard.append(hard_stop)
        real(manager, hard_stop=hard_stop, **more)

    monkeypatch.setattr(ContinuousBatchingManager, "stop", spied)

    def stop() -> None:
        message = "asked to stop"
        raise Interrupted(message)

    with pytest.raises(Interrupted):
        continuous_batching.answers(asked, prompts, DECODING, lambda place, *_: found.append(place), stop)
    assert found == []
    assert hard == [True], "what waits is not answered first"
    assert not [thread for thread in threading.enumerate() if "_run_generation_loop" in thread.name]
    assert continuously(asked, prompts)[0] == in_batches(asked, prompts), "the model can be asked again"


def test_an_answer_that_was_taken_back_is_not_resumed(
    attempt: Callable[..., Attempt], tamper: Callable[[Tamper], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuous_batching, "prove", lambda *_: None)
    tamper(lambda result: [result, result] if result.request_id == "2" else [result])
    first = attempt()
    with pytest.raises(StepFailed, match="1 of 10"):
        evaluate(first)
    tamper(lambda result: [result])
    assert evaluate(attempt()).candidate.resumed == RECORDS - 1


def test_the_noise_floor_is_measured_by_asking_some_again(attempt: Callable[..., Attempt]) -> None:
    made = attempt(noise=None)
    assert evaluate(made).noise == NoiseFloor(records=RECORDS, changed=0, points=0.0)
    assert answers_logged(made) == 3 * RECORDS


def test_progress_counts_every_answer_once(
    attempt: Callable[..., Attempt], tamper: Callable[[Tamper], list[str]]
) -> None:
    doubled: list[str] = []

    def change(result: Any) -> list[Any]:
        doubled.append(result.request_id)
        return [result, result] if len(doubled) == 3 else [result]

    tamper(change)
    told: list[tuple[int, int]] = []

    class Watched(Attempt):
        def progress(self, done: int, total: int, **fields: Any) -> None:
            super().progress(done, total, **fields)
            told.append((done, total))

    evaluate(Watched(attempt().spec))
    assert {total for _, total in told} == {2 * RECORDS}
    assert max(done for done, _ in told) == 2 * RECORDS
    assert told[-1] == (2 * RECORDS, 2 * RECORDS)


def test_a_model_that_cannot_be_asked_so_is_refused_before_its_likelihoods(
    attempt: Callable[..., Attempt], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: Any) -> Any:
        message = "no such cache"
        raise AttributeError(message)

    monkeypatch.setattr(FIFOScheduler, "schedule_batch", breaks)
    made = attempt()
    with pytest.raises(CannotTrain, match="cannot ask this model: no such cache"):
        evaluate(made)
    assert list(made.folder.glob("predictions/*.batches.jsonl")) == []
