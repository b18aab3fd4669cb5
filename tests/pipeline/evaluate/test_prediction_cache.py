import tracemalloc
from pathlib import Path

import pytest

from pipeline.errors import CannotTrain
from pipeline.evaluate.prediction_cache import (
    Prediction,
    PredictionCache,
    PredictionKey,
    Setup,
    comparable,
)

SETUP = Setup(
    template="t" * 64,
    max_new_tokens=16,
    repetition_penalty=1.0,
    batch_size=8,
    dtype="bfloat16",
    device="cpu AVX2",
    attention="sdpa",
    versions={"torch": "2.13.0", "transformers": "5.24.0", "tokenizers": "0.23.3"},
)
KEY = PredictionKey(model_id="m" * 64, setup=SETUP)
OTHER_VALUES = {
    "template": "u" * 64,
    "max_new_tokens": 32,
    "repetition_penalty": 1.1,
    "batch_size": 16,
    "engine": "vllm 1",
    "dtype": "float32",
    "device": "cuda NVIDIA H100",
    "attention": "eager",
    "versions": {"torch": "2.14.0", "transformers": "5.24.0", "tokenizers": "0.23.3"},
}


def prediction(**changed: object) -> Prediction:
    values = {
        "id": "ab",
        "prompt_hash": "p1",
        "text": "yes",
        "tokens": 2,
        "ended": True,
        "seconds": 0.5,
        "nll_sum": 1.5,
        "nll_tokens": 2,
        "reference_hash": "r1",
    }
    return Prediction.model_validate({**values, **changed})


def write(folder: Path, *lines: Prediction, name: str = "1.jsonl") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(line.model_dump_json() + "\n" for line in lines), encoding="utf-8")


def test_every_field_of_the_setup_is_tried() -> None:
    assert set(OTHER_VALUES) == set(Setup.model_fields)


@pytest.mark.parametrize("field", OTHER_VALUES)
def test_predictions_made_in_another_way_have_another_key_and_are_never_compared(field: str) -> None:
    other = PredictionKey(model_id="n" * 64, setup=SETUP.model_copy(update={field: OTHER_VALUES[field]}))
    assert other.digest != PredictionKey(model_id="n" * 64, setup=SETUP).digest
    with pytest.raises(CannotTrain, match=field) as caught:
        comparable(KEY, other)
    assert "train.format" in caught.value.hint


def test_several_likelihoods_of_a_prompt_are_all_found_and_the_answer_stays_the_first(tmp_path: Path) -> None:
    write(tmp_path, prediction(), name="run-1.jsonl")
    write(tmp_path, prediction(reference_hash="r2", nll_sum=9.0, text="other"), name="run-2.jsonl")
    cache = PredictionCache(tmp_path)
    assert cache.likelihood("p1", "r2") == (9.0, 2)
    assert cache.likelihood("p1", "r1") == (1.5, 2)
    found = cache.answer("p1")
    assert found is not None
    assert found.text == "yes"


def test_a_champion_of_many_nights_takes_no_more_memory_than_one_of_a_single_night(tmp_path: Path) -> None:
    def size_of(nights: int) -> int:
        folder = tmp_path / str(nights)
        for night in range(nights):
            answers = [prediction(prompt_hash=f"p{number}", text="long " * 100) for number in range(50)]
            write(folder, *answers, name=f"{night}.jsonl")
        tracemalloc.start()
        cache = PredictionCache(folder)
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert cache.answer("p49") is not None
        return size

    assert size_of(20) < 2 * size_of(1)


def test_a_torn_line_is_a_miss_and_the_rest_is_read(tmp_path: Path) -> None:
    write(tmp_path, prediction(), prediction(prompt_hash="p2"))
    path = tmp_path / "1.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    cache = PredictionCache(tmp_path)
    assert cache.answer("p1") is not None
    assert cache.answer("p2") is None
