"""
lm-eval's border, held by a stand-in of its package: the real one is not installed with the tests.

What the stand-in gives is what lm-eval 0.4.13 gave for a task of our own in a YAML file, run with transformers 5.24.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pipeline.errors import CannotTrain
from pipeline.qlora import harness
from pipeline.qlora.generation import AskedModel
from pipeline.suites import read_suite

ASKED = AskedModel("the model", "the tokenizer", (0,))


class Harness:
    """What lm-eval was asked, and what it is to answer."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}
        self.samples: dict[str, list[dict[str, Any]]] = {}
        self.error: Exception | None = None

    def simple_evaluate(self, model: Any, **asked: Any) -> dict[str, Any]:
        self.asked |= {"model": model, **asked}
        if self.error:
            raise self.error
        return {"results": {}, "samples": self.samples}


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> Harness:
    made = Harness()

    def module(name: str, **content: object) -> None:
        stand_in = ModuleType(name)
        vars(stand_in).update(content)
        monkeypatch.setitem(sys.modules, name, stand_in)

    def recorded(name: str) -> Callable[..., dict[str, Any]]:
        return lambda **given: made.asked.setdefault(name, given)

    module("lm_eval", simple_evaluate=made.simple_evaluate)
    module("lm_eval.models")
    module("lm_eval.models.huggingface", HFLM=recorded("hflm"))
    module("lm_eval.tasks", TaskManager=recorded("manager"))
    monkeypatch.setattr(harness, "find_spec", lambda _name: "there")
    monkeypatch.setattr(harness, "version", lambda _name: "0.4.13")
    return made


def test_every_samples_score_comes_back_by_task_and_number(lm_eval: Harness) -> None:
    lm_eval.samples = {
        "a": [{"doc_id": 0, "acc": 1.0, "acc_norm": 0.0}, {"doc_id": 1, "acc": 0.0}],
        "b": [{"doc_id": 0, "exact_match": 1}],
    }
    assert harness.run_task(ASKED, "group", 8) == {"a-0": 1.0, "a-1": 0.0, "b-0": 1.0}
    assert lm_eval.asked["hflm"] == {"pretrained": "the model", "tokenizer": "the tokenizer", "batch_size": 8}
    assert (lm_eval.asked["tasks"], lm_eval.asked["log_samples"]) == (["group"], True)
    assert lm_eval.asked["manager"] == {"include_path": None, "include_defaults": True}


def test_a_task_of_ones_own_is_found_by_the_name_in_its_file(lm_eval: Harness, tmp_path: Path) -> None:
    lm_eval.samples = {"plus": [{"doc_id": 0, "acc": 1.0}]}
    (tmp_path / "x.yaml").write_text("tag: t\ntask: 'plus'  # ours\n")
    assert harness.run_task(ASKED, str(tmp_path / "x.yaml"), 8) == {"plus-0": 1.0}
    assert lm_eval.asked["tasks"] == ["plus"]
    assert lm_eval.asked["manager"] == {"include_path": str(tmp_path), "include_defaults": False}
    (tmp_path / "x.yaml").write_text("tag: t\n")
    with pytest.raises(CannotTrain, match="no line that begins with task:"):
        harness.run_task(ASKED, str(tmp_path / "x.yaml"), 8)


@pytest.mark.parametrize("samples", [{}, {"a": [{"doc_id": 0, "acc": 1.0}, {"doc_id": 1, "bleu": 1.0}]}])
def test_a_task_without_a_score_for_each_sample_is_refused(lm_eval: Harness, samples: dict[str, Any]) -> None:
    lm_eval.samples = samples
    with pytest.raises(CannotTrain, match="scores no acc or exact_match for every sample"):
        harness.run_task(ASKED, "a", 8)


def test_what_lm_eval_cannot_do_is_said_with_its_words(lm_eval: Harness) -> None:
    lm_eval.error = ConnectionError("no network")
    with pytest.raises(CannotTrain, match="lm-eval cannot run a: no network") as caught:
        harness.run_task(ASKED, "a", 8)
    assert "lm_eval --model hf --tasks a" in caught.value.hint


def test_another_version_and_another_content_are_another_suite(
    lm_eval: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("task: a\n")
    first = read_suite(f"lm-eval:{path}")
    assert (first.task, first.items, lm_eval.asked) == (str(path), (), {})
    path.write_text("task: b\n")
    second = read_suite(f"lm-eval:{path}")
    monkeypatch.setattr(harness, "version", lambda _name: "0.4.14")
    assert len({one.digest for one in (first, second, read_suite(f"lm-eval:{path}"))}) == 3
