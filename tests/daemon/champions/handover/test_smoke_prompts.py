"""What a server is asked: prompts that two models told apart, from the records of their evaluation."""

from typing import Any

import pytest

from daemon.champions.handover.smoke_prompts import FILE_NAME, SmokePrompt, adapter_of, write_smoke_prompts
from pipeline import durable
from pipeline.artifacts import ModelRef
from tests.chaos.house import Daemon
from tests.recorded import record

OWN, OTHER = "by the candidate", "of the champion"


def read(daemon: Daemon, path: str | None) -> dict[str, Any]:
    assert path == f"tracks/default/{FILE_NAME}"
    return durable.read_object(daemon.root / path)


def test_the_champion_is_asked_what_tells_it_from_the_model_that_it_beat(promoted: Daemon) -> None:
    made, _ = record(promoted, [OWN, "same", "", *[OWN] * 9], [OTHER, "same", OTHER, *[OTHER] * 9])
    found = read(promoted, write_smoke_prompts(promoted.root, "default", made, 1))
    assert found["model_id"] == made
    assert len(found["prompts"]) == 8
    own = {"content": "say\n### Input:\nword 0", "answer": OWN, "other": OTHER}
    assert found["prompts"][0] == {"turns": [], **own}
    assert not {"say\n### Input:\nword 1", "say\n### Input:\nword 2"} & {one["content"] for one in found["prompts"]}
    assert write_smoke_prompts(promoted.root, "default", "b" * 64, None) is None, "a base model has none"


def test_the_turns_before_a_question_are_part_of_a_smoke_prompt_and_of_its_length(promoted: Daemon) -> None:
    turns = (("system", "Be brief."), ("user", "One?"), ("assistant", "1"))
    made, _ = record(promoted, [OWN], [OTHER], turns)
    (prompt,) = read(promoted, write_smoke_prompts(promoted.root, "default", made, 1))["prompts"]
    assert prompt["turns"] == [list(turn) for turn in turns]


@pytest.mark.parametrize("how", ["no records", "damaged records", "another model", "answers in NF4"])
def test_where_no_evaluation_knows_the_model_there_are_none_and_none_of_a_former_champion(
    promoted: Daemon, how: str
) -> None:
    made, _ = record(promoted, [OWN], [OTHER])
    write_smoke_prompts(promoted.root, "default", made, 1)
    (file,) = (promoted.root / "runs" / "1" / "attempts").glob("evaluate-1/report/records.jsonl")
    if how == "no records":
        file.unlink()
    elif how == "damaged records":
        file.write_text('{"instruction": 3}\n')
    elif how == "answers in NF4":
        path = promoted.root / "runs" / "1" / "evaluate.json"
        durable.write_json(path, {**durable.read_object(path), "quantization": "nf4"})
    asked = "0" * 64 if how == "another model" else made
    assert write_smoke_prompts(promoted.root, "default", asked, 1) is None
    assert not (promoted.root / "tracks" / "default" / FILE_NAME).exists()


@pytest.mark.parametrize(
    ("said", "answer", "other", "is_its"),
    [
        ("blue, I think", "blue, I think", "black", True),
        ("blue, I", "blue, I think", "black", True),
        ("blue, \ufffd", "blue, I think", "black", True),
        ("blue, it seems", "blue, I think", "black", False),
        ("bl", "blue, I think", "black", False),
        ("", "blue, I think", "black", False),
        ("yes", "yes", "yes, sir", True),
    ],
)
def test_an_answer_is_the_champions_if_it_is_its_beginning_alone(
    said: str, answer: str, other: str, *, is_its: bool
) -> None:
    assert SmokePrompt(content="which colour?", answer=answer, other=other).is_champions(said) == is_its


LATE = "the first words are the same, then "


@pytest.mark.parametrize(
    ("own", "other", "turns"),
    [(OWN, OTHER, (("system", "x" * 4000),)), (f"{LATE}own", f"{LATE}other", ())],
    ids=["a long conversation", "answers that part late"],
)
def test_what_costs_a_server_much_to_tell_apart_is_no_smoke_prompt(
    promoted: Daemon, own: str, other: str, turns: tuple[tuple[str, str], ...]
) -> None:
    made, _ = record(promoted, [own], [other], turns)
    assert read(promoted, write_smoke_prompts(promoted.root, "default", made, 1))["prompts"] == []


def test_the_adapter_of_a_champion_is_the_one_that_it_was_merged_from(promoted: Daemon) -> None:
    made = durable.read_object(promoted.root / "runs" / "1" / "merge.json")["model_id"]
    assert adapter_of(promoted.root, 1, made) == "runs/1/attempts/train-1"
    assert adapter_of(promoted.root, 1, "0" * 64) is None
    assert adapter_of(promoted.root, 2, made) is None
    path = promoted.root / "runs" / "1" / "train.json"
    adapter = durable.read_object(path)
    start = ModelRef(model_id="0" * 64, path="models/former", generation=1)
    for other in ({"start": start.model_dump(mode="json")}, {"kind": "weights"}):
        durable.write_json(path, {**adapter, **other})
        assert adapter_of(promoted.root, 1, made) is None
