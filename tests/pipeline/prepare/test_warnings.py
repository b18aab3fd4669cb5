"""What is wrong with a data set is told by count and by drop, and no more than is true."""

from pathlib import Path

import pytest

from pipeline.artifacts import ModelRef
from pipeline.errors import CannotTrain
from pipeline.models.manifest import write_trained_ids
from pipeline.records.heldout import prompt_id
from tests.snapshot import Snapshot, rows


def taught(snapshot: Snapshot, prompts: list[str], *drops: int) -> Snapshot:
    """Give the snapshot a champion that was trained on these prompts, of these drops."""
    folder = snapshot.root / "models" / "m"
    folder.mkdir(parents=True, exist_ok=True)
    write_trained_ids(folder, [prompt_id(prompt, "") for prompt in prompts])
    snapshot.champion = ModelRef(model_id="m", path="models/m", generation=1, drops=drops)
    return snapshot


def prompts(start: int, stop: int) -> list[str]:
    return [f"Question {number}?" for number in range(start, stop)]


def test_pinned_records_that_the_champion_was_trained_on_are_told_by_count_and_drop(tmp_path: Path) -> None:
    snapshot = Snapshot(tmp_path).drop(rows(60)).drop(rows(60, start=60)).drop(rows(9, start=500))
    snapshot.drop([*rows(30), *rows(20, start=60), *rows(50, start=900)], "heldout")
    known = [*prompts(0, 25), *prompts(60, 65), *prompts(900, 902)]
    made = taught(snapshot, known, 1, 2).prepare().dataset
    assert (made.seen_by_champion, made.heldout_rows) == (32, 68)
    (said,) = [warning for warning in made.warnings if "champion" in warning]
    assert said == (
        "32 held-out records are not scored because the champion was trained on them (25 of d.jsonl (drop 1) and 5 "
        "of d.jsonl (drop 2) and 2 of drops that are not used any more): hold out records that are in no training drop"
    )


def test_what_was_pinned_and_in_no_drop_is_never_called_trained_on(tmp_path: Path) -> None:
    """Only near-duplicates of them were."""
    copies = [f"Question number {n}, which is the {n}th of all the ones that were ever put to us" for n in range(20)]
    train = [{"instruction": f"{text} today", "output": "yes"} for text in copies]
    snapshot = Snapshot(tmp_path).drop([*train, *rows(9)])
    snapshot.drop([*({"instruction": text, "output": "yes"} for text in copies), *rows(50, start=900)], "heldout")
    made = taught(snapshot, [row["instruction"] for row in train], 1).prepare().dataset
    (said,) = [warning for warning in made.warnings if "champion" in warning]
    assert said == (
        f"{made.seen_by_champion} held-out records are not scored because the champion was trained on near-duplicates "
        "of them: hold out records that say other things"
    )
    assert made.seen_by_champion > 0


def test_a_drop_of_held_out_questions_is_named(tmp_path: Path) -> None:
    snapshot = Snapshot(tmp_path).drop(rows(100)).drop([*rows(21, start=900), *rows(79, start=200)])
    made = snapshot.drop(rows(20, start=300)).drop(rows(25, start=900), "heldout").prepare().dataset
    said = "21 of 100 rows are held-out questions and not trained on: if the file should not be there, "
    assert made.warnings == (f"d.jsonl: {said}dropforge drops withdraw 2 --reason TEXT",)
    few = Snapshot(tmp_path).drop([*rows(20, start=900), *rows(80, start=200)]).drop(rows(25, start=900), "heldout")
    assert few.prepare().dataset.warnings == ()


def test_a_run_with_nothing_but_held_out_questions_names_their_drop(tmp_path: Path) -> None:
    snapshot = Snapshot(tmp_path).drop(rows(250)).drop(rows(250), "heldout")
    with pytest.raises(CannotTrain, match="no training rows are left of 500") as caught:
        snapshot.prepare()
    assert "d.jsonl: 250 of 250 rows are held-out questions" in caught.value.message
    assert "dropforge drops withdraw 1 --reason TEXT" in caught.value.message
    assert "split.similarity" not in caught.value.hint
