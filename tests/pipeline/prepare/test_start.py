"""Where a training begins: over the champion only where nothing stands against it, and then on what is new to it."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline import durable
from pipeline.artifacts import ModelRef, Remark
from pipeline.config import TrainConfig
from pipeline.data_words import remark_words, start_words
from pipeline.errors import CannotTrain
from pipeline.models.manifest import TRAINED_IDS, Lineage, require_start, write_manifest, write_trained_ids
from pipeline.prepare.start import GENERAL_ROWS
from tests.model_folder import write_model
from tests.snapshot import Prepared, Snapshot, rows

OF_BASE = Lineage("b", 1)


def going_on(root: Path, **settings: Any) -> Snapshot:
    return Snapshot(root, train=TrainConfig(start="champion", **settings))


def crown(snapshot: Snapshot, made: Prepared, lineage: Lineage | None = OF_BASE, generation: int = 3) -> None:
    """Let a model that was trained on what was prepared be the champion."""
    path = f"models/{generation}"
    identity = write_model(snapshot.root / path, f"weights {generation}".encode())
    write_trained_ids(snapshot.root / path, made.ids("train"))
    write_manifest(snapshot.root / path, lineage)
    drops = tuple(drop.id for drop in snapshot.drops)
    snapshot.champion = ModelRef(model_id=identity, path=path, generation=generation, drops=drops)


@pytest.mark.parametrize("replay", [0.2, 5.0])
def test_the_champion_is_trained_on_what_is_new_to_it_and_a_share_of_the_rest(tmp_path: Path, replay: float) -> None:
    snapshot = going_on(tmp_path, replay=replay).drop(rows(200))
    first = snapshot.prepare()
    assert (first.dataset.start, first.dataset.from_base) == (None, None), "the base is the champion"
    assert start_words(first.dataset) == f"from the base, on {len(first.train)} records"
    crown(snapshot, first)
    snapshot.drop(rows(100, start=200))
    second = snapshot.prepare()
    new = second.ids("train") - first.ids("train")
    share = min(round(replay * len(new)), len(first.train))
    found = second.dataset
    assert found.start == snapshot.champion
    assert (found.train_rows, found.replayed_rows, found.old_rows) == (len(new) + share, share, len(first.train))
    assert len(second.train) == len(second.ids("train")) == len(new) + share
    assert {row["drop"] for row in second.train if row["id"] in new} == {2}
    assert start_words(found) == (
        f"from the champion of generation 3, on {len(new)} new records and {share} of {len(first.train)} old ones"
    )
    snapshot.config = snapshot.config.model_copy(update={"train": TrainConfig()})
    plain = snapshot.prepare()
    assert (plain.dev, plain.heldout) == (second.dev, second.heldout)
    assert len(plain.train) == len(new) + len(first.train)


def test_the_sample_is_the_same_for_one_champion_and_another_one_over_the_next(tmp_path: Path) -> None:
    snapshot = going_on(tmp_path).drop(rows(300))
    first = snapshot.prepare()
    crown(snapshot, first)
    snapshot.drop(rows(150, start=300))
    one, again = snapshot.prepare(), snapshot.prepare()
    assert one.train == again.train
    assert one.dataset.dataset_sha256 == again.dataset.dataset_sha256
    drops = snapshot.champion.drops
    crown(snapshot, first, generation=4)
    snapshot.champion = snapshot.champion.model_copy(update={"drops": drops})
    other = snapshot.prepare()
    assert one.dataset.replayed_rows == other.dataset.replayed_rows > 10
    assert one.ids("train") & first.ids("train") != other.ids("train") & first.ids("train")


def test_a_row_whose_answer_changed_is_new_and_one_that_is_only_repeated_is_not(tmp_path: Path) -> None:
    snapshot = going_on(tmp_path, replay=0).drop(rows(200))
    first = snapshot.prepare()
    crown(snapshot, first)
    snapshot.drop([*rows(40, answer="no"), *rows(60, start=40)], accepted=True)
    second = snapshot.prepare()
    changed = {row["id"] for row in first.train if int(row["instruction"].split()[1].rstrip("?")) < 40}
    assert second.ids("train") == changed
    assert {row["output"] for row in second.train} == {"no"}


def test_the_answers_of_a_drop_that_were_accepted_since_are_new_to_the_champion_which_was_trained_on_the_drop(
    tmp_path: Path,
) -> None:
    snapshot = going_on(tmp_path, replay=0).drop(rows(200)).drop([*rows(40, answer="no"), *rows(90, start=200)])
    first = snapshot.prepare()
    crown(snapshot, first)
    corrected, snapshot.renewed = snapshot.drops[1].model_copy(update={"answers_accepted": True}), (2,)
    snapshot.drops[1] = corrected
    second = snapshot.prepare()
    assert {row["drop"] for row in second.train} == {2}
    assert {row["output"] for row in second.train} == {"no", "yes"}
    assert second.dataset.start == snapshot.champion


def test_what_the_champion_knew_of_a_drop_counts_and_not_that_it_had_the_drop(tmp_path: Path) -> None:
    snapshot = going_on(tmp_path, replay=0).drop(rows(200))
    first = snapshot.prepare()
    left_out = first.ids("train")
    first.train = first.train[: len(first.train) // 2]
    crown(snapshot, first)
    assert snapshot.prepare().ids("train") == left_out - first.ids("train")


def test_where_no_row_is_new_the_base_is_trained_on_all(tmp_path: Path) -> None:
    snapshot = going_on(tmp_path).drop(rows(200))
    first = snapshot.prepare()
    crown(snapshot, first)
    again = snapshot.prepare()
    assert again.dataset.start is None
    assert again.dataset.from_base == Remark(code="nothing_new", numbers={"generation": 3})
    assert (again.dataset.old_rows, again.dataset.replayed_rows) == (0, 0)
    assert again.train == first.train
    said = f"from the base, on {len(first.train)} records: no record is new to generation 3"
    assert start_words(again.dataset) == said


@pytest.mark.parametrize(
    ("lineage", "drops", "settings", "why"),
    [
        (OF_BASE, (1, 7, 9), {}, "generation 3 was made from drops that this run is not made from: 7, 9"),
        (OF_BASE, None, {}, "it is not known which drops generation 3 was made from"),
        (None, (1,), {}, "the manifest of generation 3 does not say that it was made from this base"),
        (
            Lineage("b", 10),
            (1,),
            {},
            "generation 3 is of 10 trainings in a row, and every tenth at least is from the base",
        ),
        (Lineage("b", 9), (1,), {}, ""),
        (OF_BASE, (1,), {"start": "base"}, ""),
    ],
)
def test_what_stands_against_the_champion_is_said_and_the_base_is_trained(
    tmp_path: Path, lineage: Lineage | None, drops: tuple[int, ...] | None, settings: dict[str, Any], why: str
) -> None:
    snapshot = Snapshot(tmp_path, train=TrainConfig(**{"start": "champion", **settings})).drop(rows(200))
    crown(snapshot, snapshot.prepare(), lineage)
    snapshot.champion = snapshot.champion.model_copy(update={"drops": drops})
    snapshot.drop(rows(100, start=200))
    found = snapshot.prepare().dataset
    assert ("" if found.from_base is None else remark_words(found.from_base)) == why
    from_champion = not why and settings.get("start") != "base"
    assert found.start == (snapshot.champion if from_champion else None)


@pytest.mark.parametrize("harm", ["no list", "another list", "another model", "gone"])
def test_a_champion_that_is_not_what_it_was_is_not_gone_on_from(tmp_path: Path, harm: str) -> None:
    snapshot = going_on(tmp_path).drop(rows(50))
    crown(snapshot, snapshot.prepare())
    base = {"base_model": str(tmp_path / "base"), "base_model_id": write_model(tmp_path / "base", b"base weights")}
    snapshot.config = snapshot.config.model_copy(update=base)
    start, attempt = snapshot.champion, snapshot.attempt()
    folder = snapshot.root / start.path
    assert require_start(attempt, start) == folder
    if harm == "no list":
        (folder / TRAINED_IDS).unlink()
    elif harm == "another list":
        write_trained_ids(folder, ["0" * 32])
    elif harm == "another model":
        start = start.model_copy(update={"model_id": "f" * 64})
    else:
        shutil.rmtree(folder)
    with pytest.raises(CannotTrain, match="starts from the champion of generation 3, and ") as caught:
        require_start(attempt, start)
    assert caught.value.hint.endswith('set train.start = "base"; then: dropforge retry RUN')


# General rows.


def own_and_general(made: Prepared) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return [row for row in made.train if "drop" in row], [row for row in made.train if "drop" not in row]


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_general_rows_are_the_share_that_the_settings_say_and_counted_by_themselves(
    tmp_path: Path, share: float
) -> None:
    plain = Snapshot(tmp_path).drop(rows(200)).prepare()
    made = Snapshot(tmp_path, train=TrainConfig(general_rows=share)).drop(rows(200)).prepare()
    own, general = own_and_general(made)
    assert (own, made.dev, made.heldout) == (plain.train, plain.dev, plain.heldout)
    found = made.dataset
    assert (found.train_rows, found.general_rows) == (len(own), len(general))
    assert len(general) == round(share * len(made.train))
    assert (
        start_words(found) == f"from the base, on {len(own)} records and {len(general):,} general ones of Dropforge's"
    )
    assert set(general[0]) == {"id", "instruction", "input", "output"}


def test_what_the_data_asks_itself_or_asks_held_out_in_like_words_is_no_general_row(tmp_path: Path) -> None:
    *mine, last = [row["instruction"] for row in durable.read_jsonl(GENERAL_ROWS)][-40:]
    held_out = "What is the capital of Portugal, please?"
    snapshot = Snapshot(tmp_path, train=TrainConfig(general_rows=0.9)).drop(rows(100))
    snapshot.drop([{"instruction": one, "output": "ours"} for one in mine])
    snapshot.drop([{"instruction": held_out, "output": "Lisbon"}], role="heldout")
    _, general = own_and_general(snapshot.prepare())
    asked = {row["instruction"] for row in general}
    assert not asked & {*mine, "What is the capital of Portugal?"}
    assert last in asked
