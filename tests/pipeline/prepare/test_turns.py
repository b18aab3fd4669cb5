"""Conversations: a row per answer, all on one side of the split, written by the base model's template."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import SplitConfig, TrainConfig
from pipeline.data_words import left_out_words, warning_words
from pipeline.errors import CannotTrain
from pipeline.records.heldout import HeldoutRecord, prompt_id
from tests.snapshot import PINNED, Prepared, Snapshot, rows

WORDS = [f"w{number}" for number in range(4000)]
HALF = SplitConfig(heldout=0.4, dev=0)
SYSTEM = {"role": "system", "content": "Be brief."}


def talks(count: int, turns: int, *, opening: str = "", seed: int = 1) -> list[dict[str, Any]]:
    """Return conversations of random words; each answer begins with the number of its conversation."""
    dice = random.Random(seed)

    def said(number: int, turn: int) -> list[dict[str, str]]:
        question = opening if opening and not turn else " ".join(dice.choices(WORDS, k=8))
        answer = f"{number} {' '.join(dice.choices(WORDS, k=9))}"
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    return [{"messages": [part for turn in range(turns) for part in said(number, turn)]} for number in range(count)]


def sides(made: Prepared) -> tuple[set[str], set[str]]:
    """Return the conversations that are trained on, and those that are held out, by their number."""
    trained, heldout = [*made.train, *made.dev], made.heldout
    numbers = ({row["output"].split()[0] for row in some} for some in (trained, heldout))
    return next(numbers), next(numbers)


def test_each_answer_is_a_row_with_the_turns_before_it(tmp_path: Path) -> None:
    (talk,) = talks(1, 3)
    turns = [(part["role"], part["content"]) for part in talk["messages"]]
    made = Snapshot(tmp_path).drop([talk], "heldout").drop(rows(9)).prepare()
    found = sorted(made.heldout, key=lambda row: len(row.get("turns", ())))
    assert [row.get("turns", []) for row in found] == [[], [*map(list, turns[:2])], [*map(list, turns[:4])]]
    assert [(row["instruction"], row["output"]) for row in found] == [
        (turns[number][1], turns[number + 1][1]) for number in (0, 2, 4)
    ]
    assert {row["group"] for row in found} == {min(row["id"] for row in found)}
    assert made.dataset.heldout_with_turns == 2
    record = HeldoutRecord.model_validate(found[2])
    assert record.messages("x") == [*talk["messages"][:5], {"role": "assistant", "content": "x"}]


def test_a_prompt_is_told_by_its_turns_and_by_who_says_them() -> None:
    ids = {
        prompt_id("Q", ""),
        prompt_id("Q", "", [("system", "a")]),
        prompt_id("Q", "", [("user", "a"), ("assistant", "b")]),
        prompt_id("Q", "", [("user", "a"), ("assistant", "c")]),
        prompt_id("b", "", [("user", "a"), ("assistant", "Q")]),
        prompt_id("Qsystema", ""),
    }
    assert len(ids) == 6
    assert prompt_id("q", "", [("user", " A ")]) == prompt_id("Q", "", [("user", "a")])


@pytest.mark.parametrize("opening", ["", "Hi"])
def test_all_answers_of_a_conversation_are_kept_and_on_one_side(tmp_path: Path, opening: str) -> None:
    content = talks(120, 5, opening=opening)
    made = Snapshot(tmp_path, split=HALF).drop(content).prepare()
    trained, heldout = sides(made)
    later = [row for row in (*made.train, *made.heldout) if "turns" in row]
    if opening:  # the one prompt that all begin with is on one side with all its answers
        trained, heldout = (
            {row["output"].split()[0] for row in later if row in some} for some in (made.train, made.heldout)
        )
    assert not trained & heldout
    assert len(trained) > 40
    assert len(heldout) > 30
    assert len(later) >= 0.95 * 120 * 4


def test_a_conversation_that_comes_again_with_more_turns_stays_on_its_side(tmp_path: Path) -> None:
    whole = talks(100, 4)
    begun = [{"messages": talk["messages"][:4]} for talk in whole]
    before = sides(Snapshot(tmp_path, split=HALF).drop(begun).prepare())
    made = Snapshot(tmp_path, split=HALF).drop(begun).drop(whole).prepare()
    assert sides(made) == before
    assert made.dataset.duplicates == 200
    assert made.dataset.proposed == 0


def begun(content: list[dict[str, Any]], exchanges: int) -> list[dict[str, Any]]:
    return [{"messages": talk["messages"][: 2 * exchanges]} for talk in content]


def greeted(count: int) -> list[dict[str, Any]]:
    content = talks(count, 4)
    for talk in content:
        talk["messages"][0]["content"], talk["messages"][1]["content"] = "Hi", "Hello! How can I help?"
    return content


@pytest.mark.parametrize("salt", "abcdefghijkl")
@pytest.mark.parametrize("parts", [(4,), (2, 4), (1, 4), ()], ids=str)
def test_conversations_that_all_begin_with_one_exchange_are_on_both_sides(
    tmp_path: Path, parts: tuple[int], salt: str
) -> None:
    content = greeted(120)
    world = Snapshot(tmp_path, split=HALF, salt=salt)
    for exchanges in parts:
        world.drop(begun(content, exchanges))
    if not parts:  # one ends after it
        world.drop([*begun(content[:1], 1), *content[1:]])
    made = world.prepare()
    trained, heldout = sides(made)
    assert trained & heldout <= {"Hello!"}
    assert len(trained) > 40
    assert len(heldout) > 30
    assert made.dataset.near_duplicates == 0
    assert "large_unit" not in {warning.code for warning in made.dataset.warnings}


@pytest.mark.parametrize(("count", "left_out"), [(3, 9), (4, 0)])
def test_a_pinned_greeting_takes_no_conversations_out_of_training(tmp_path: Path, count: int, left_out: int) -> None:
    """What at most three begin with may be one conversation that went on."""
    world = Snapshot(tmp_path, gate=PINNED).drop([*begun(greeted(1), 1), *rows(60)], "heldout")
    made = world.drop([*greeted(count), *rows(60, start=500)]).prepare()
    assert made.dataset.near_duplicates == left_out
    assert len([row for row in made.train if "turns" in row]) == 3 * count - left_out


@pytest.mark.parametrize("parts", [(1, 4), (2, 4), (4, 1), (1, 2, 3, 4)])
def test_no_held_out_question_is_trained_on_when_its_conversation_goes_on(tmp_path: Path, parts: tuple[int]) -> None:
    """After a short question the group changes with the second exchange."""
    content = talks(150, 4)
    for number, talk in enumerate(content):
        talk["messages"][0]["content"] = f"{WORDS[number]}?"
    drops, one = Snapshot(tmp_path, split=HALF), Snapshot(tmp_path, split=HALF)
    for exchanges in parts:
        drops.drop(begun(content, exchanges))
    one.drop([row for exchanges in parts for row in begun(content, exchanges)])
    for world in (drops, one):
        made = world.prepare()
        held = {(row["instruction"], row["output"]) for row in made.heldout}
        assert len(held) > 150
        for row in (*made.train, *made.dev):
            texts = [text for _, text in row.get("turns", ())] + [row["instruction"], row["output"]]
            assert not held & set(zip(texts[::2], texts[1::2], strict=True))


@pytest.mark.parametrize("held", ["alone", "later"])
def test_a_held_out_question_is_not_trained_on_after_other_turns(tmp_path: Path, held: str) -> None:
    """Its short answer, and few of the words before it, make no near-duplicate."""
    whole = talks(60, 4)
    for number, talk in enumerate(whole):
        talk["messages"][5]["content"] = f"yes {number}"
    asked = [talk["messages"][4:6] for talk in whole]
    alone = [{"instruction": question["content"], "output": answer["content"]} for question, answer in asked]
    first: list[Any] = (
        alone
        if held == "alone"
        else [{"messages": [*talk["messages"], *pair]} for talk, pair in zip(talks(60, 1, seed=2), asked, strict=True)]
    )
    made = Snapshot(tmp_path, split=HALF).drop(first).drop(whole).prepare()
    known = {(row["instruction"], row["output"]) for row in made.heldout}
    assert len(known) > 15
    assert not [row for row in made.train if (row["instruction"], row["output"]) in known]


def test_the_records_of_a_long_conversation_do_not_make_its_words_common(tmp_path: Path) -> None:
    """Its first question stands in each of its prompts; another conversation with it is still found."""
    text = " ".join(WORDS[:40])
    held, other = talks(2, 8, opening=text)
    made = Snapshot(tmp_path, gate=PINNED).drop([held], "heldout").drop([other, *rows(50)]).prepare()
    assert {row["output"] for row in made.train} == {"yes"}


def test_conversations_beyond_the_window_lose_their_later_answers(tmp_path: Path, tiny_llama: Path) -> None:
    content = talks(1, 140)
    config = {"base_model": str(tiny_llama), "train": TrainConfig(max_length=400)}
    made = Snapshot(tmp_path, split=SplitConfig(heldout=0, dev=0), gate=PINNED, **config)
    made.drop(rows(5, start=50), "heldout").drop([*content, *rows(20)])
    found = made.prepare()
    assert 0 < len([row for row in found.train if "turns" in row]) < 60
    assert found.dataset.rows_too_long > 70


def test_rows_that_share_a_line_are_not_lost_with_a_long_one(tmp_path: Path, tiny_llama: Path) -> None:
    """An array is one line where a program wrote it."""
    content = talks(30, 2)
    content[3]["messages"][1]["content"] *= 500
    config = {"base_model": str(tiny_llama), "train": TrainConfig(max_length=400)}
    world = Snapshot(tmp_path, split=SplitConfig(heldout=0, dev=0), gate=PINNED, **config)
    made = world.drop(rows(5, start=50), "heldout").drop(content, array=True).prepare()
    assert made.dataset.rows_too_long == 2
    assert len(made.train) == 58


def base(folder: Path, model: Path, template: str) -> Path:
    """Copy a model with another chat template."""
    made = Path(shutil.copytree(model, folder / "base"))
    path = made / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    (made / "chat_template.jinja").unlink(missing_ok=True)
    return made


TURN = "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
HEAD, TAIL = (
    "{% for message in messages %}",
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
)
REFUSING = HEAD + "{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURN + TAIL
LEAVING = HEAD + "{% if message['role'] != 'system' %}" + TURN + "{% endif %}" + TAIL
CHANGING = HEAD + "{% if message['role'] == 'assistant' and not loop.last %}-{% endif %}" + TURN + TAIL
SINGLE = HEAD + "{% if loop.length > 2 %}{{ raise_exception('one turn') }}{% endif %}" + TURN + TAIL


@pytest.mark.parametrize(
    ("template", "kept", "words"),
    [
        (HEAD + TURN + TAIL, 41, []),
        (REFUSING, 31, ["base model's chat template refuses system messages, and 10 records with one are left out"]),
        (LEAVING, 41, ["base model's chat template leaves system messages out: 10 records are used without theirs"]),
        (CHANGING, 41, ["chat template writes an earlier answer otherwise than the last one: 10 records have earlier"]),
        (SINGLE, 21, ["earlier turns, and 10 records with some are left out", "refuses system messages, and 10"]),
    ],
)
def test_what_the_template_makes_of_turns_is_said(
    tmp_path: Path, tiny_llama: Path, template: str, kept: int, words: list[str]
) -> None:
    told = [{"messages": [SYSTEM, *talk["messages"]]} for talk in talks(10, 1, seed=2)]
    world = Snapshot(
        tmp_path, base_model=str(base(tmp_path, tiny_llama, template)), split=SplitConfig(heldout=0, dev=0), gate=PINNED
    )
    made = world.drop(rows(9, start=500), "heldout").drop([*told, *talks(10, 2, seed=3), *rows(11)]).prepare()
    assert len(made.train) == kept
    said = [sentence for sentence in warning_words(made.dataset) if "template" in sentence]
    assert len(said) == len(words)
    assert all(any(some in sentence for sentence in said) for some in words), said
    assert made.dataset.rows_refused == 41 - kept
    assert ("records that the chat template refuses" in left_out_words(made.dataset)) == (kept < 41)


def test_if_the_template_refuses_all_rows_the_error_says_so(tmp_path: Path, tiny_llama: Path) -> None:
    told = [{"messages": [SYSTEM, *talk["messages"]]} for talk in talks(10, 1)]
    world = Snapshot(tmp_path, base_model=str(base(tmp_path, tiny_llama, REFUSING)), gate=PINNED)
    with pytest.raises(CannotTrain, match="refuses system messages, and 10 records"):
        world.drop(rows(9), "heldout").drop(told).prepare()
