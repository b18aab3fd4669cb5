import math
import tracemalloc
from pathlib import Path

import pytest

from pipeline.errors import CannotTrain
from pipeline.evaluate.prediction_cache import PredictionKey, append_values, comparable, read_values

KEY = PredictionKey(
    model_id="m" * 64,
    template="t" * 64,
    repetition_penalty=1.0,
    batch_size=8,
    dtype="bfloat16",
    device="cpu AVX2",
    attention="sdpa",
    versions={"torch": "2.13.0", "transformers": "5.24.0", "tokenizers": "0.23.3"},
)
OTHER_VALUES = {
    "template": "u" * 64,
    "repetition_penalty": 1.1,
    "batch_size": 16,
    "engine": "vllm 1",
    "dtype": "float32",
    "device": "cuda NVIDIA H100",
    "attention": "eager",
    "versions": {"torch": "2.14.0", "transformers": "5.24.0", "tokenizers": "0.23.3"},
}


def test_every_field_of_the_setup_is_tried() -> None:
    assert {"model_id", *OTHER_VALUES} == set(PredictionKey.model_fields)


@pytest.mark.parametrize("field", OTHER_VALUES)
def test_predictions_made_in_another_way_have_another_key_and_are_never_compared(field: str) -> None:
    same = KEY.model_copy(update={"model_id": "n" * 64})
    other = same.model_copy(update={field: OTHER_VALUES[field]})
    assert other.digest != same.digest
    with pytest.raises(CannotTrain, match=field) as caught:
        comparable(KEY, other, "champion")
    assert "train.format" in caught.value.hint


def test_of_a_value_that_is_there_twice_the_last_counts(tmp_path: Path) -> None:
    first, second = tmp_path / "run-1.jsonl", tmp_path / "run-2.jsonl"
    append_values(first, {"likelihood": [1.5, 2], "answer": ["yes", 2, True]})
    append_values(second, {"answer": ["other", 3, True]})
    append_values(second, {"another likelihood": [9.0, 2]})
    assert read_values([first, second]) == {
        "likelihood": [1.5, 2],
        "answer": ["other", 3, True],
        "another likelihood": [9.0, 2],
    }


def test_a_champion_of_many_nights_takes_no_more_memory_than_one_of_a_single_night(tmp_path: Path) -> None:
    def size_of(nights: int) -> int:
        paths = [tmp_path / f"{nights}-{night}.jsonl" for night in range(nights)]
        for path in paths:
            append_values(path, {f"p{number}": ["long " * 100, 100, True] for number in range(50)})
        tracemalloc.start()
        values = read_values(paths)
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert "p49" in values
        return size

    assert size_of(20) < 2 * size_of(1)


def test_a_value_that_is_no_number_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_values(tmp_path / "1.jsonl", {"a": [math.nan, 1]})
    assert not (tmp_path / "1.jsonl").exists()
