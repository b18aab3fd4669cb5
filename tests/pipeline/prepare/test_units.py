"""Rows about one document, or of one group, are on one side of the split, and count as one."""

import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts import Dataset
from pipeline.config import GateConfig, SplitConfig
from pipeline.data_words import warning_words
from pipeline.errors import CannotTrain
from tests.snapshot import PINNED, Prepared, Rows, Snapshot, rows

WORDS = [f"w{number}" for number in range(4000)]
WHOLE = SplitConfig(dev=0)


def text(dice: random.Random, count: int) -> str:
    return " ".join(dice.choices(WORDS, k=count))


def passages(documents: int, questions: int, *, words: int = 120, seed: int = 1) -> list[dict[str, str]]:
    """Return questions on passages; the answer is the number of the passage."""
    dice, found = random.Random(seed), []
    for number in range(documents):
        passage = text(dice, words)
        asked = [f"what about {text(dice, 6)}?" for _ in range(questions)]
        found += [{"instruction": one, "input": passage, "output": f"{seed} {number}"} for one in asked]
    return found


def conversations(count: int, turns: int) -> list[dict[str, str]]:
    """Return each turn of conversations with all turns before it; the answer is the number of the conversation."""
    dice, found = random.Random(2), []
    for number in range(count):
        said = ""
        for _ in range(turns):
            said += f"user: {text(dice, 8)} assistant: {text(dice, 25)} "
            found.append({"instruction": said, "output": f"{number}", "group": f"chat {number}"})
    return found


def sides(made: Prepared) -> tuple[set[str], set[str]]:
    """Return the answers that are trained on, and those that are held out."""
    return {row["output"] for row in [*made.train, *made.dev]}, {row["output"] for row in made.heldout}


@pytest.mark.parametrize("content", [passages(240, 2), passages(120, 5), passages(110, 10), conversations(120, 5)])
def test_all_rows_on_a_document_are_kept_and_none_is_on_both_sides(tmp_path: Path, content: Rows) -> None:
    found = Snapshot(tmp_path).drop(content).prepare()
    trained, heldout = sides(found)
    assert not trained & heldout
    assert trained | heldout == {row["output"] for row in content}
    assert len(found.train) + len(found.dev) + len(found.heldout) == len(content)
    assert found.dataset.heldout_groups == len(heldout), "a document counts once"
    assert found.dataset.warnings == ()
    assert found.dataset.unit == "document"


def test_an_input_that_belongs_to_the_task_is_no_document(tmp_path: Path) -> None:
    def unit(*content: Mapping[str, str]) -> str:
        return Snapshot(tmp_path).drop(content).prepare().dataset.unit

    many, single = passages(1, 5), passages(195, 1, seed=3)
    assert unit(*many[:4], *single, *rows(1)) == "document", "4 of 200, a fiftieth"
    assert unit(*many, *single) == "prompt"
    assert unit(*many, *many, *single[:1], *rows(249)) == "document", "prompts are counted, not rows"
    short = passages(1, 50, words=12)
    assert unit(*short, *single) == "document", "12 words are no document"


def test_inputs_of_twelve_words_are_split_by_prompt_and_of_thirteen_as_a_whole(tmp_path: Path) -> None:
    for words, both in ((12, True), (13, False)):
        content = [row for number in range(200) for row in passages(1, 2, words=words, seed=number)]
        made = Snapshot(tmp_path, split=SplitConfig(heldout=0.4, similarity=1)).drop(content).prepare()
        trained, heldout = sides(made)
        assert bool(trained & heldout) == both
        assert made.dataset.near_duplicates == 0


def test_the_unit_that_a_track_has_fixed_holds(tmp_path: Path) -> None:
    content = passages(120, 4)
    document, prompt = (Snapshot(tmp_path, unit=unit).drop(content).prepare() for unit in ("document", "prompt"))
    assert (document.dataset.unit, prompt.dataset.unit) == ("document", "prompt")
    assert document.dataset.near_duplicates == 0 < prompt.dataset.near_duplicates
    # More prompts on one passage than a fiftieth, once the track has run.
    more = [*content, *passages(1, 20, seed=9)]
    assert Snapshot(tmp_path, unit="document").drop(more).prepare().dataset.unit == "document"
    grouped = Snapshot(tmp_path, unit="prompt").drop([{**row, "group": row["output"]} for row in content]).prepare()
    assert grouped.dataset.near_duplicates == 0, "a group is a unit in any case"


def test_a_later_drop_moves_no_row_to_another_side(tmp_path: Path) -> None:
    content = [{**row, "group": f"g{number % 40}"} for number, row in enumerate(rows(400))]
    before = Snapshot(tmp_path).drop(content).prepare()
    again = [{**row, "group": "all"} for row in content]
    for later in (again, rows(400)):
        after = Snapshot(tmp_path).drop(content).drop(later).prepare()
        assert (after.ids("train"), after.ids("heldout")) == (before.ids("train"), before.ids("heldout"))
    blank = Snapshot(tmp_path).drop([{**row, "group": " "} for row in content]).prepare()
    assert blank.ids("heldout") == Snapshot(tmp_path).drop(rows(400)).prepare().ids("heldout")


def test_a_group_goes_on_in_a_later_drop(tmp_path: Path) -> None:
    content = conversations(60, 6)
    made = Snapshot(tmp_path).drop(content[::2]).drop(content[1::2]).prepare()
    trained, heldout = sides(made)
    assert not trained & heldout
    assert made.dataset.heldout_groups == len(heldout)


def test_rows_of_a_pinned_group_or_document_are_not_trained_on(tmp_path: Path) -> None:
    chats, texts = conversations(30, 4), passages(30, 4)
    # No text of the later turns is shared: only the group says that they belong together.
    chats = [{**row, "instruction": f"Question {number}?"} for number, row in enumerate(chats)]
    pinned = [*chats[::4], *texts[::4]]
    train = [row for row in [*chats, *texts] if row not in pinned] + rows(20, start=900)
    made = Snapshot(tmp_path, gate=PINNED).drop(train).drop(pinned, "heldout").prepare()
    assert {row["output"] for row in [*made.train, *made.dev]} == {"yes"}
    assert (made.dataset.near_duplicates, made.dataset.heldout_rows) == (180, 60)
    assert made.dataset.overlaps[0].rule == "unit"
    assert all(len(row["near"]) == 3 for row in made.heldout), "a champion that was trained on these knows it"


def test_thirteen_equal_words_in_many_rows_are_a_warning_with_what_helps(tmp_path: Path) -> None:
    content = passages(120, 5)
    folded = [{"instruction": f"{row['instruction']}\n{row['input']}", "output": row["output"]} for row in content]
    made = Snapshot(tmp_path, split=WHOLE).drop(folded).prepare()
    lost, train = made.dataset.near_duplicates, made.dataset.near_duplicates + made.dataset.train_rows
    assert lost > 0.1 * train
    assert warning_words(made.dataset)[0] == (
        f"{lost} of {train} training records ({lost / train:.0%}) are left out because they have 13 words in a row in "
        'common with a held-out record: withdraw the drop, and drop it again with one "group" for all rows of a '
        "document or conversation"
    )
    assert not any("split.similarity" in words for words in warning_words(made.dataset))
    grouped = [{**row, "group": row["output"]} for row in folded]
    assert Snapshot(tmp_path, split=WHOLE).drop(grouped).prepare().dataset.warnings == ()


def test_a_group_that_is_a_kind_of_rows_is_a_warning(tmp_path: Path) -> None:
    def warnings(size: int, **more: Any) -> list[str]:
        kind = [{**row, "group": "animals"} for row in rows(size)]
        made = Snapshot(tmp_path, **more).drop(kind).drop(rows(1000 - size, start=5000)).prepare()
        return warning_words(made.dataset)

    assert warnings(20) == []
    (warning,) = warnings(25)
    assert warning.startswith('2% of the prompts have one "group" or input, and are all on one side of the split')
    # Once the track has run, a long input that belongs to a new task is one, too.
    content = [*passages(1, 60), *rows(940)]
    assert len(Snapshot(tmp_path, unit="document").drop(content).prepare().dataset.warnings) == 1
    assert Snapshot(tmp_path).drop(content).prepare().dataset.warnings == ()


def test_a_verdict_needs_documents_and_not_rows(tmp_path: Path) -> None:
    def dataset(documents: int, scored: int = 1000) -> Dataset:
        config = {"gate": GateConfig(min_records=20), "split": SplitConfig(scored_records=scored)}
        return Snapshot(tmp_path, **config).drop(passages(documents, 4, words=20)).prepare().dataset

    few = dataset(80)
    assert few.shortfall is not None
    assert few.shortfall.heldout_rows == few.heldout_groups < 20 < few.heldout_rows
    assert dataset(80 + few.shortfall.needed_rows // 4).shortfall is None
    # Documents are missing, whatever the cap of records.
    assert dataset(80, scored=20).shortfall == few.shortfall
    with pytest.raises(CannotTrain, match="no verdict is ever possible"):
        dataset(80, scored=19)


def test_a_sample_has_a_record_of_each_document_before_the_second_of_any(tmp_path: Path) -> None:
    def sample(scored: int) -> Counter[str]:
        split = SplitConfig(scored_records=scored)
        made = Snapshot(tmp_path, split=split).drop(passages(100, 4, words=20)).prepare()
        return Counter(row["output"] for row in made.heldout)

    documents = len(sample(1000))
    assert 10 < documents < 30
    assert set(sample(documents).values()) == {1}
    assert set(sample(2 * documents).values()) == {2}
    assert len(sample(5)) == 5


def test_a_third_of_the_sample_is_a_core_of_all_drops_that_each_champion_answers(tmp_path: Path) -> None:
    def core(drops: int, scored: int = 60) -> set[str]:
        """Return what all of four generations answer."""
        answered = []
        for generation in range(4):
            snapshot = Snapshot(tmp_path, split=SplitConfig(heldout=0.3, scored_records=scored))
            for number in range(drops):
                snapshot.drop(rows(300, start=300 * number, answer=f"{number}"))
            snapshot.champion = snapshot.champion.model_copy(update={"generation": generation})
            answered.append({row["id"]: row["output"] for row in snapshot.prepare().heldout})
        shared = set[str].intersection(*(set(one) for one in answered))
        assert Counter(answered[0][one] for one in shared) == {f"{n}": scored // 3 // drops for n in range(drops)}
        return shared

    # A drop more makes room by the last of each drop's: what former champions answered of a drop remains.
    assert len(core(4) & core(3)) == 15
