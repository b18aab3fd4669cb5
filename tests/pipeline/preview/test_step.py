"""Previews by tiny models of two families: which records of a drop are answered, and how the answers are scored."""

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts import ModelRef, Preview
from pipeline.config import EvaluateConfig
from pipeline.errors import DropforgeError, Interrupted
from pipeline.metrics.registry import METRICS
from pipeline.models.generation import Decoding, load_template, open_model
from pipeline.models.greedy_decoding import answers
from pipeline.models.loading import load_tokenizer
from pipeline.models.manifest import model_id, write_manifest
from pipeline.models.template import History, conversation
from pipeline.preview.step import preview
from tests.model_families import make_family
from tests.snapshot import Snapshot

TOKENS = 6
Task = Callable[..., Snapshot]


def answers_of(folder: Path, prompts: Sequence[str], turns: Sequence[History] = (), tokens: int = TOKENS) -> list[str]:
    """Return a model's answers to prompts, each after its turns; "nothing" for an empty one."""
    template = load_template(folder, "chat")
    asked = [
        template.prompt(conversation(turns[number] if turns else (), prompt)) for number, prompt in enumerate(prompts)
    ]
    given = answers(open_model(folder, template, "cpu"), asked, Decoding(tokens, 1.0, 4))
    return [answer.text if answer.text.strip() else "nothing" for answer in given]


@pytest.fixture(scope="module", params=["llama3", "qwen3"])
def champion(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model."""
    folder = make_family(tmp_path_factory.mktemp("models") / request.param, request.param, load_tokenizer(tiny_llama))
    write_manifest(folder)
    return folder


@pytest.fixture
def task(champion: Path, tmp_path: Path) -> Task:
    """A track whose champion is the random model: task(metric=...)."""

    def make(**evaluate: Any) -> Snapshot:
        settings = {"metric": "exact_match", "max_new_tokens": TOKENS, "batch_size": 4, "general": (), **evaluate}
        base = {"base_model": str(champion), "base_model_id": model_id(champion)}
        made = Snapshot(tmp_path, evaluate=EvaluateConfig(**settings), **base)
        shutil.copytree(champion, made.root / "models/c")
        made.champion = ModelRef(model_id=model_id(champion), path="models/c", generation=1)
        return made

    return make


def questions(count: int, seed: int = 1) -> list[str]:
    dice = random.Random(seed)
    return [f"{number}: {' '.join(dice.choices(('when', 'where', 'who', 'why'), k=5))}" for number in range(count)]


def rows(asked: Sequence[str], outputs: Sequence[str]) -> list[dict[str, str]]:
    return [{"instruction": text, "output": output} for text, output in zip(asked, outputs, strict=True)]


def test_the_answers_are_scored_by_the_tracks_metric(champion: Path, task: Task) -> None:
    asked = questions(24)
    own = answers_of(champion, asked)
    wrong = [text if number % 4 else "something else" for number, text in enumerate(own)]
    expected = 100 * sum(METRICS["exact_match"].scores(own, [[text] for text in wrong])) / 24
    exact = preview(task().drop(rows(asked, wrong)).attempt())
    assert exact == Preview(records=24, points=exact.points, metric="exact_match")
    assert exact.points == pytest.approx(expected)
    longer = [f"{text} and so on" for text in own]
    free = preview(task(metric="rougeL").drop(rows(asked, longer)).attempt())
    scores = METRICS["rougeL"].scores(own, [[text] for text in longer])
    assert free.metric == "rougeL"
    assert free.points == pytest.approx(100 * sum(scores) / 24)


def test_of_a_conversation_each_learned_turn_is_answered_after_those_before_it(champion: Path, task: Task) -> None:
    first, second = questions(8), questions(8, seed=2)
    turns = [(("user", text), ("assistant", "yes")) for text in first]
    own = answers_of(champion, second, turns)
    talks = [
        {
            "messages": [
                {"role": "user", "content": one},
                {"role": "assistant", "content": "yes", **({"weight": 0} if number % 2 else {})},
                {"role": "user", "content": other},
                {"role": "assistant", "content": answer},
            ]
        }
        for number, (one, other, answer) in enumerate(zip(first, second, own, strict=True))
    ]
    found = preview(task().drop(talks).attempt())
    yes = answers_of(champion, first[::2])
    right = METRICS["exact_match"].scores([*own, *yes], [*([text] for text in own), *(["yes"] for _ in yes)])
    assert found.records == 12
    assert found.points == pytest.approx(100 * sum(right) / 12)


def test_only_new_records_that_a_run_would_use_are_answered_and_a_hundred_at_most(task: Task) -> None:
    asked = questions(130)
    old = rows(asked[:10], ["right"] * 10)
    other = rows(asked[10:20], ["right"] * 10)
    pinned = rows(asked[20:24], ["right"] * 4)
    again = [*old[:5], *rows(asked[5:10], ["wrong"] * 5)]
    long = rows(["Where? " * 5000, "ж" * 900], ["x"] * 2)
    few = task().drop(old).drop(other).drop(pinned, "heldout")
    few.drop([*again, *pinned, *long, *rows(asked[24:27], ["new"] * 3)])
    assert preview(few.attempt()).records == 3
    assert preview(task().drop(rows(asked, ["right"] * 130)).attempt()).records == 100
    chosen = [{**row, "tags": ["selected"]} for row in rows(asked[:10], ["right"] * 10)]
    for none in (task().drop(old).drop(again), task().drop(chosen)):
        with pytest.raises(DropforgeError, match="no new record of the drop fits"):
            preview(none.attempt())


def test_a_damaged_champion_or_drop_is_named_and_a_stop_is_obeyed(task: Task) -> None:
    made = task().drop(rows(questions(4), ["a"] * 4))
    attempt = made.attempt()
    attempt.stop.set()
    with pytest.raises(Interrupted):
        preview(attempt)
    weights = made.root / "models/c/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(DropforgeError, match=r"model\.safetensors"):
        preview(made.attempt())
    (made.root / made.drops[0].path).write_text("{}\n")
    with pytest.raises(DropforgeError, match="damaged"):
        preview(made.attempt())
