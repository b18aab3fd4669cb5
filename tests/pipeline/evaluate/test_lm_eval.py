"""
lm-eval's border, held by a stand-in of its package: the real one is not installed with the tests.

What the stand-in gives is what lm-eval 0.4.13 gave for a task of our own in a YAML file, run with transformers 5.24.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from pipeline.errors import CannotTrain
from pipeline.evaluate import lm_eval as harness
from pipeline.evaluate.suites import read_suite
from pipeline.models.generation import AskedModel

ASKED = AskedModel("the model", "the tokenizer", (0,))


class Request(NamedTuple):
    """One question as a loaded task puts it."""

    doc_id: int
    arguments: tuple[str, str]
    doc: dict[str, Any]
    request_type: str = "loglikelihood"


class Task:
    """A task that lm-eval has loaded: its questions are there once they are asked for."""

    def __init__(self, items: list[tuple[str, str]], version: object = 1.0) -> None:
        self.VERSION = version
        self._items = items
        self._config: dict[str, Any] = {"num_fewshot": None}
        self._seed = 0
        self.instances: list[Request] = []

    def get_config(self, key: str) -> Any:
        return self._config[key]

    def set_config(self, key: str, value: object) -> None:
        self._config[key] = value

    def set_fewshot_seed(self, *, seed: int) -> None:
        self._seed = seed

    def build_all_requests(self) -> None:
        assert (self._config["num_fewshot"], self._seed) == (0, 1234), "as simple_evaluate sets them"
        self.instances = [
            Request(place, (question, choice), {"question": question, "answer": answer, "picture": object()})
            for place, (question, answer) in enumerate(self._items)
            for choice in ("yes", "no")
        ]


class Harness:
    """What lm-eval was asked, and what it is to answer."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}
        self.samples: dict[str, list[dict[str, Any]]] = {}
        self.error: Exception | None = None
        self.tasks: dict[str, Task] = {"a": Task([("is it?", "yes")])}

    def load(self, names: list[str]) -> dict[str, Any]:
        self.asked["loaded"] = names
        if self.error:
            raise self.error
        return {"tasks": self.tasks}

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

    def manager(**given: Any) -> Harness:
        made.asked["manager"] = given
        return made

    module("lm_eval", simple_evaluate=made.simple_evaluate)
    module("lm_eval.models")
    module("lm_eval.models.huggingface", HFLM=recorded("hflm"))
    module("lm_eval.tasks", TaskManager=manager)
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
    assert lm_eval.asked["fewshot_random_seed"] == 1234
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
    with pytest.raises(CannotTrain, match="has no acc or exact_match score for every sample"):
        harness.run_task(ASKED, "a", 8)


def test_what_stands_in_the_key_of_a_tasks_scores(
    lm_eval: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("task: a\n")

    def digest(name: str = f"lm-eval:{path}") -> str:
        return read_suite(name).digest

    first = digest()
    suite = read_suite(f"lm-eval:{path}")
    assert (suite.task, suite.items, lm_eval.asked["loaded"]) == (str(path), (), ["a"])
    assert suite.digest == digest() == first, "the same task has the same key, also where an item holds what is no JSON"
    keys = {first, digest("lm-eval:a")}
    for tasks in (
        {"a": Task([("is it?", "yes")], version=2.0)},
        {"a": Task([("is it?", "no")])},
        {"a": Task([("was it?", "yes")])},
        {"a": Task([("is it?", "yes"), ("is it?", "yes")])},
        {"b": Task([("is it?", "yes")])},
        {"a": Task([("is it?", "yes")]), "b": Task([("is it?", "yes")])},
    ):
        lm_eval.tasks = tasks
        keys.add(digest())
    path.write_text("tag: t\ntask: a\n")
    keys.add(digest())
    monkeypatch.setattr(harness, "version", lambda _name: "0.4.14")
    keys.add(digest())
    assert len(keys) == 10


def test_a_task_whose_data_is_not_there_is_said_before_anything_is_asked(lm_eval: Harness) -> None:
    lm_eval.error = ConnectionError("no network")
    with pytest.raises(CannotTrain, match="lm-eval cannot run a: no network") as caught:
        read_suite("lm-eval:a")
    assert "its data must be on this machine already" in caught.value.hint
