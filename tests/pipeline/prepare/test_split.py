"""Which drop a record belongs to: the one that last changed its answers, however its rows are exported."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.artifacts import ModelRef
from pipeline.config import EvaluateConfig, SplitConfig
from pipeline.data_words import warning_words
from tests.snapshot import Prepared, Rows, Snapshot, rows

HALF = SplitConfig(heldout=0.5, dev=0.1)
#: Trained on whatever the salt "s" makes of the others.
ANCHOR = rows(1, start=9000)


def prepared(root: Path, *drops: Rows, champion: tuple[int, ...] | None = None, accepted: bool = False) -> Prepared:
    snapshot = Snapshot(root, split=HALF)
    snapshot.champion = ModelRef(model_id="m", path="models/m", generation=1, drops=champion)
    for drop in drops:
        snapshot.drop(drop, accepted=accepted)
    return snapshot.prepare()


def drops_of(made: Prepared) -> set[int]:
    return {row["drop"] for row in [*made.train, *made.dev, *made.heldout]}


DROP = st.dictionaries(st.integers(0, 400), st.sampled_from([("yes",), ("no",), ("yes", "no")]), min_size=1)


def as_rows(content: dict[int, tuple[str, ...]]) -> list[dict[str, str]]:
    return [{"instruction": f"Question {n}?", "output": answer} for n, some in content.items() for answer in some]


@settings(max_examples=25, deadline=None)
@given(nights=st.lists(DROP, min_size=1, max_size=4), data=st.data())
def test_a_cumulative_export_is_split_like_one_of_the_new_rows_alone(
    tmp_path_factory: pytest.TempPathFactory, nights: list[dict[int, tuple[str, ...]]], data: st.DataObject
) -> None:
    """Also where answers are corrected: a drop holds what it changes, or all that holds by then, in any order."""
    root = tmp_path_factory.mktemp("exports")
    everything: dict[int, tuple[str, ...]] = {}
    changes, exports = [], []
    for night in nights:
        changes.append(as_rows({n: some for n, some in night.items() if everything.get(n) != some}))
        everything.update(night)
        exports.append(as_rows({n: everything[n] for n in data.draw(st.permutations(sorted(everything)))}))
    one, other = (prepared(root, [*ANCHOR, *some[0]], *some[1:]) for some in (changes, exports))
    assert (one.heldout, one.train, one.dev) == (other.heldout, other.train, other.dev)
    assert one.dataset.dataset_sha256 == other.dataset.dataset_sha256


def answers(*some: str) -> list[dict[str, str]]:
    return [{**row, "output": answer} for row in rows(30) for answer in some]


@pytest.mark.parametrize(
    ("history", "drop"),
    [
        (["yes", "no", "no"], 2),
        (["yes", "no", "yes"], 3),  # the champion may have been trained on the answer between
        (["yes", "yes no"], 2),  # one answer more is another yardstick
        (["yes no", "yes"], 2),  # one less, too
        (["yes no", "yes no yes"], 1),
    ],
)
def test_a_record_belongs_to_the_drop_that_last_changed_its_answers(
    tmp_path: Path, history: list[str], drop: int
) -> None:
    drops = [answers(*some.split()) for some in history]
    assert drops_of(prepared(tmp_path, *drops, accepted=True)) == {drop}
    assert drops_of(prepared(tmp_path, *drops)) == {1}, "no person accepted a change"


def test_a_drop_that_came_back_does_not_make_new_what_the_champion_knows_from_a_later_one(tmp_path: Path) -> None:
    """The first drop was withdrawn when the champion was trained; its rows stand in the second one as they are."""
    made = prepared(tmp_path, rows(300), rows(400), champion=(2,))
    assert {row["drop"] for row in made.heldout} == {2}
    assert {row["drop"] for row in made.train} == {1, 2}
    changed = prepared(tmp_path, rows(300), rows(300), rows(300, answer="no"), champion=(1, 2), accepted=True)
    assert drops_of(changed) == {3}


def test_a_pinned_record_belongs_to_the_pinned_drop_that_brought_its_answers(tmp_path: Path) -> None:
    snapshot = Snapshot(tmp_path).drop(rows(60)).drop(rows(30), "heldout").drop(rows(30), "heldout").drop(rows(60))
    assert {row["drop"] for row in snapshot.prepare().heldout} == {2}


def test_references_that_are_no_json_are_counted_where_field_f1_decides(tmp_path: Path) -> None:
    def exam(*answers: str) -> list[dict[str, str]]:
        return [{"instruction": f"Read {place}", "output": text} for place, text in enumerate(answers)]

    def prepare(metric: str, *answers: str) -> list[str]:
        snapshot = Snapshot(tmp_path, evaluate=EvaluateConfig.model_validate({"metric": metric}))
        return warning_words(snapshot.drop(rows(20)).drop(exam(*answers), "heldout").prepare().dataset)

    good = ['{"a": 1}'] * 9
    broken = [*good[:3], '{"a": 1', "42", *good[:3]]
    (said,) = prepare("json_f1", *broken)
    assert said.startswith("2 of 8 held-out references are no JSON object or array")
    assert "the first is record 4 of drop 2" in said
    assert prepare("json_f1", *good) == prepare("exact_match", *broken) == []
