"""Beside each receipt stands what became of the drop, whenever that changes, whatever ended the daemon in between."""

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from daemon.inbox.answers import verdict_notes
from daemon.queue.attempt_ends import Then
from daemon.queue.drops import restore, withdraw
from daemon.state import database
from daemon.state.clauses import Suspension, drop_clauses
from daemon.state.events import Word, record_event
from daemon.state.layout import DATABASE_NAME
from daemon.state.states import OVERTAKEN, DropState, PromotionKind
from daemon.state.tables import Drop, Promotion, Run, Suspect, Track
from pipeline import durable
from pipeline.artifacts import GuardResult, Remark, TrialScores
from tests import run_owner
from tests.daemon.inbox.test_intake import NOW, Box, PowerCut, rows
from tests.made_artifacts import dataset_of

AGAIN = "It is trained on again, together with the next drops."
TRIED = (
    "It is tried when nothing else is to be run, on the data of the model that serves, this drop and those that were "
    "tried before it."
)
TOO_LITTLE = "36 held-out records, and a verdict needs 100, which about 430 more rows bring"
HEAD = "drop 1 of track default, 3 rows, received 2027-01-15T08:00:00+00:00"


class House:
    """An inbox with its texts, and the means to let runs end without training."""

    def __init__(self, root: Path, **values: Any) -> None:
        self.box = Box(root, **values)
        self.restart()

    def restart(self) -> None:
        engine = database.open_reader(self.box.settings.state_folder / DATABASE_NAME)
        self.notes = verdict_notes.VerdictNotes(engine, self.box.settings, self.box.intake._inbox)

    def drop(self, name: str, start: int = 0, folder: str = "") -> None:
        self.box.drop(name, rows(3, start), folder)

    def said(self, name: str = "a.jsonl", place: str = "done") -> list[str]:
        """Return the lines of a note once all texts are written."""
        while self.notes.refresh():
            pass
        path = self.box.inbox / place / f"{name}.verdict.txt"
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def serve(self, run: int | None, reason: str = "") -> None:
        """Let a run's model become the champion; `None` and the reason stand for a rollback to what knows nothing."""
        with database.transaction(self.box.engine) as session:
            track = session.get_one(Track, "default")
            track.champion_generation = (track.champion_generation or 0) + 1
            track.champion_model_id = f"model-{run}"
            facts: dict[str, Any] = {"kind": PromotionKind.ROLLBACK}
            if run is not None:
                row = session.get_one(Run, run)
                facts = {"run_id": run, "verdict": row.verdict, "drops": row.snapshot}
            facts |= {"generation": track.champion_generation, "model_id": f"model-{run}", "reason": reason}
            session.add_all([track, Promotion(track="default", model_path="models/x", created_at=NOW, **facts)])
            record_event(session, "promoted", NOW, track="default", run_id=run)


@pytest.fixture
def house(tmp_path: Path) -> House:
    made = House(tmp_path)
    made.drop("a.jsonl")
    return made


def test_an_accepted_drop_waits_for_a_run(house: House) -> None:
    assert house.said() == [
        f"a.jsonl: {HEAD}",
        "",
        "Accepted: it waits for the next run of track default, which begins 60 s after the last file.",
    ]


def test_a_promoted_drop_is_in_use_until_the_track_is_rolled_back(house: House) -> None:
    run = house.box.end("promoted", gain=12.3, interval=(8.1, 16.4))
    house.serve(run)
    assert house.said()[2:] == [
        "In use: the model that serves was trained on it.",
        f"Run {run} was trained on it, and its model was promoted: +12.3 points (+8.1 to +16.4).",
    ]
    house.serve(None, reason="it answered in French")
    assert house.said()[2:] == [
        "Not in use any more: the model that serves was not trained on it.",
        f"Run {run} was trained on it, and its model was promoted: +12.3 points (+8.1 to +16.4).",
        "It is trained on again, together with the next drops.",
    ]


def test_the_note_of_a_drop_that_was_left_out_says_what_it_is_worth(house: House) -> None:
    house.serve(house.box.end("promoted"))
    assert len(house.said()[2:]) == 2
    without = house.box.end("worse")
    with database.transaction(house.box.engine) as session:
        drop = session.get_one(Drop, 1)
        drop.worth_points, drop.worth_half_width, drop.worth_run = 1.8, 1.2, without
        record_event(session, "drop_worth", NOW, track="default", run_id=without, drop_id=1)
    assert house.said()[4:] == [
        f"It is worth +1.8 points ±1.2 of these two models: run {without} was trained without it.",
        "The champion's luck is in the worth of each drop. Compare it with the mean: dropforge drops.",
    ]


def test_the_note_says_before_any_run_how_well_the_champions_answers_agree(house: House) -> None:
    before = house.said()
    with database.transaction(house.box.engine) as session:
        drop = session.get_one(Drop, 1)
        drop.preview = {"records": 100, "points": 79.5, "metric": "exact_match", "usual": 81.3}
        record_event(session, "drop_previewed", NOW, track="default", drop_id=1)
    words = "Before any training: agreement 79.5 points: the champion's answers to 100 new records (exact match)."
    assert house.said() == [*before, words]


def test_a_drop_stays_in_use_over_later_runs_and_its_text_does_not_change(house: House) -> None:
    first = house.box.end("promoted")
    house.serve(first)
    before = house.said()
    path = house.box.inbox / "done" / "a.jsonl.verdict.txt"
    inode = path.stat().st_ino
    house.drop("b.jsonl", 10)
    second = house.box.end("promoted", gain=2.0, interval=(1.1, 2.9))
    house.serve(second, reason="it is time")
    assert house.said() == before
    assert path.stat().st_ino == inode, "it is not written again"
    assert house.said("b.jsonl")[3].endswith("its model was promoted: +2.0 points (+1.1 to +2.9); it is time.")


ENDS: dict[str, tuple[Callable[[House], object], list[str]]] = {
    "not shown better": (
        lambda house: house.box.end("not_shown_better", gain=0.4),
        [
            "Not in use: run 1 held it, and its model was not promoted: not shown better: +0.4 points.",
            f"{AGAIN} Why it was not, and what to do: dropforge report 1.",
        ],
    ),
    "insufficient evidence": (
        lambda house: house.box.end("insufficient_evidence", records=36, groups=36, groups_needed=100, rows_needed=430),
        [
            f"Not in use: run 1 held it, and its model was not promoted: insufficient evidence: {TOO_LITTLE}.",
            f"{AGAIN} Why it was not, and what to do: dropforge report 1.",
        ],
    ),
    "awaiting approval": (
        lambda house: house.box.end("awaiting_approval", gain=4.0, interval=(1, 7)),
        [
            "It won: run 1 was trained on it and is better: +4.0 points (+1.0 to +7.0).",
            "Its model serves once a person lets it: dropforge promote 1.",
        ],
    ),
    "overtaken": (
        lambda house: house.box.end(OVERTAKEN, gain=4.0, interval=(1, 7)),
        [
            "Not in use: run 1 was trained on it and won (+4.0 points (+1.0 to +7.0)), but another model came first.",
            AGAIN,
        ],
    ),
    "running": (lambda house: house.box.begin(), ["In run 1, which has not ended: what comes of it will stand here."]),
    "failed": (
        lambda house: run_owner.leave(house.box.engine, house.box.begin(), NOW, Then.FAIL, error="out of memory"),
        [
            "No verdict yet: run 1, which held it, failed: out of memory.",
            f"Whoever runs Dropforge can let it go on: dropforge retry 1. {AGAIN}",
        ],
    ),
    "cancelled": (
        lambda house: run_owner.leave(house.box.engine, house.box.begin(), NOW, Then.CANCEL),
        [f"No verdict yet: run 1, which held it, was cancelled. {AGAIN}"],
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_what_a_run_came_to_is_told(house: House, end: str) -> None:
    act, words = ENDS[end]
    act(house)
    assert house.said()[2:] == words


def test_what_a_run_left_out_is_told_once_its_data_is_prepared(house: House) -> None:
    claim = house.box.begin()
    run = claim.run_id
    assert len(house.said()) == 3
    data = dataset_of(
        9, duplicates=1, near_duplicates=2, warnings=(Remark(code="nothing_new", numbers={"generation": 2}),)
    )
    path = house.box.settings.state_folder / f"runs/{run}/prepare.json"
    path.parent.mkdir(parents=True)
    durable.write_json(path, data.model_dump(mode="json"))
    for step in ("train", "prepare"):
        assert len(house.said()) == 3, "the daemon looks at no file before it has an event"
        with database.transaction(house.box.engine) as session:
            record_event(session, "step_published", NOW, track="default", run_id=run, step=step, attempt=1)
    left = f"Run {run} left out, of 3 rows in all: 1 repeated record and 2 near-duplicates of held-out records."
    assert house.said()[3:] == [left, "No record is new to generation 2."]
    house.box.end("promoted", claim)
    house.serve(run)
    assert house.said()[-2:] == [left, "No record is new to generation 2."]
    with database.transaction(house.box.engine) as session:
        session.get_one(Drop, 1).records = 1200
    house.restart()
    assert house.said()[-2] == left.replace("3 rows", "3 rows with 1,200 records")
    assert house.said()[0] == f"a.jsonl: {HEAD}".replace("3 rows", "3 rows with 1,200 records")


def test_a_drop_on_trial_is_told_so_then_suspended(house: House) -> None:
    worse = house.box.end("worse")
    with database.transaction(house.box.engine) as session:
        session.add(Suspect(id=1, track="default", drop_id=1, blamed_run=worse))
        record_event(session, "drop_suspected", NOW, track="default", run_id=worse, drop_id=1)
    assert house.said()[2:] == [
        f"On trial: run {worse} was worse or lost on old drops, and this drop may be the reason.",
        TRIED,
        "Until this is decided no other run uses it.",
        "If the trial does so, too, a control without new drops is trained.",
        "If the trial is also worse than the control, the drop is suspended; if not, it is used as before.",
        "A trial that only guards of old drops stopped may serve after its control.",
        "Nothing needs to be done.",
    ]
    with database.transaction(house.box.engine) as session:
        session.get_one(Suspect, 1).trial_run = worse
        record_event(session, "drop_on_trial", NOW, track="default", run_id=worse, drop_id=1)
    assert house.said()[3] == TRIED.replace("It is tried when nothing else is to be run", f"Run {worse} is its trial")
    with database.transaction(house.box.engine) as session:
        drop = session.get_one(Drop, 1)
        scores = TrialScores(groups=9, wins=1, losses=8, p_value=0.01)
        found = Suspension(blamed_run=worse, trial=3, tested=(1,), control=4, scores=scores)
        drop.state, drop.suspension = DropState.SUSPENDED, found.model_dump(mode="json")
        why = drop_clauses(drop)
        session.add(drop)
        record_event(session, "drop_suspended", NOW, track="default", run_id=worse, drop_id=1)
    assert house.said()[2:] == [
        f"Suspended: {why[0]}.",
        *(f"{one[0].upper()}{one[1:].removesuffix('.')}." for one in why[1:]),
        "No later run uses it.",
        "If rows of it are wrong, mend them and drop the file again: that is a new drop.",
        "To bring it back as it is: dropforge drops restore 1 --reason TEXT.",
    ]


def test_a_persons_word_is_told(house: House) -> None:
    run = house.box.end("promoted")
    house.serve(run)
    withdraw(house.box.engine, 1, Word("the answers are last year's", NOW), house.box.settings)
    assert house.said()[2:] == [
        "Withdrawn: the answers are last year's.",
        "No later run uses it.",
        f"The model that serves was trained on it, since run {run}.",
        "To bring it back as it is: dropforge drops restore 1 --reason TEXT.",
    ]
    house.serve(None, reason="it knew them")
    restore(house.box.engine, 1, Word("they hold again", NOW), house.box.settings)
    assert house.said()[2].startswith("Accepted: it waits for the next run"), "it counts as new"


def test_held_out_files_say_what_they_are_for(tmp_path: Path) -> None:
    house = House(tmp_path, gate={"on": "pinned"})
    house.drop("exam.jsonl", folder="heldout")
    assert house.said("exam.jsonl")[2] == "Accepted: from the next run on it judges the candidates of track default."
    path = house.box.put("more.jsonl", rows(3, 10), "heldout")
    path.chmod(0o666)
    house.box.take(path)
    assert house.said("more.jsonl")[2] == "It waits for a person, who lets it count or not: dropforge drops accept 2."
    assert house.said("more.jsonl")[3].startswith("Why: ")


@pytest.mark.parametrize(
    ("place", "error"), [("durable.write_bytes", PowerCut), ("tell", sqlite3.OperationalError("database is locked"))]
)
def test_what_a_restart_or_a_locked_database_held_back_is_told_afterwards(
    house: House, monkeypatch: pytest.MonkeyPatch, place: str, error: Any
) -> None:
    house.said()
    house.serve(house.box.end("promoted"))
    with monkeypatch.context() as cut:
        cut.setattr(f"daemon.inbox.answers.verdict_notes.{place}", Mock(side_effect=error))
        with pytest.raises((PowerCut, sqlite3.OperationalError)):
            house.notes.refresh()
    if error is PowerCut:
        house.restart()
    assert house.said()[2] == "In use: the model that serves was trained on it."


def test_after_a_restart_nothing_is_written_that_stands_there(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.said()
    house.restart()
    monkeypatch.setattr("daemon.inbox.answers.verdict_notes.durable.write_bytes", pytest.fail)
    assert house.said()


def test_what_people_and_data_say_is_inert_in_a_terminal(house: House) -> None:
    lost = GuardResult(guard="slice", about=("tag a\n\x1b[2J\u202eb",), unit="points", p_value=0.001, state="failed")
    house.box.end("guard_failed", gain=1.0, guards=(lost,))
    said = "not promoted: guard failed (tag a\\n\\x1b[2J\\u202eb): +1.0 points on the task."
    assert house.said()[2].endswith(said)
    withdraw(house.box.engine, 1, Word("\x1b]0;x\x07", NOW), house.box.settings)
    assert house.said()[2] == "Withdrawn: \\x1b]0;x\\x07."


def test_all_drops_are_told_some_at_a_time(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict_notes, "_AT_ONCE", 2)
    for number in range(4):
        house.drop(f"b{number}.jsonl", 10 * (number + 1))
    assert house.notes.refresh(), "more is to be written"
    assert len(list((house.box.inbox / "done").glob("*.verdict.txt"))) == 2
    assert all(house.said(f"b{number}.jsonl") for number in range(4))


def test_a_drop_that_comes_in_has_no_other_ones_note_worded_again(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.said()
    worded, said = [], verdict_notes.tell

    def tell(*given: Any) -> str:
        worded.append(given[2].name)
        return said(*given)

    monkeypatch.setattr(verdict_notes, "tell", tell)
    house.drop("b.jsonl", 10)
    assert house.said("b.jsonl")
    assert worded == ["b.jsonl"]


def test_a_note_lies_beside_the_receipt_of_its_own_drop(house: House) -> None:
    house.drop("a.jsonl", 10)
    house.drop("a.jsonl", 20, "support")
    assert "drop 1 of track default" in house.said("a.jsonl")[0]
    assert "drop 2 of track default" in house.said("a-2.jsonl")[0]
    assert "drop 3 of track support" in house.said("a.jsonl", "done/support")[0]


def test_a_dropped_file_that_is_named_as_a_receipt_leads_no_note_astray(house: House) -> None:
    row = b'{"instruction": "a", "output": "b", "drop": 3}'
    house.box.drop("b.jsonl.receipt.json", row + b"\n")
    house.drop("b.jsonl", 30)
    house.box.drop("c.jsonl.receipt.json", b"[" * 100_000)
    house.drop("c.jsonl", 40)
    assert "drop 3" in house.said("b-2.jsonl")[0]
    assert house.said("b.jsonl") == []
    assert house.said("c.jsonl"), "the other one was given back, so it lies elsewhere"


@pytest.mark.skipif(os.geteuid() != 0 and "CI" not in os.environ, reason="only root gives files away")
def test_another_users_note_lies_where_only_that_user_reads_it(tmp_path: Path) -> None:
    house = House(tmp_path)
    path = house.box.put("a.jsonl", rows(3))
    os.chown(path, 12345, 12345)
    house.box.take(path)
    assert house.said() == []
    assert house.said(place="done/~12345")[0].startswith("a.jsonl: drop 1")
    assert (house.box.inbox / "done" / "~12345").stat().st_mode & 0o007 == 0


def test_rejected_and_duplicate_files_have_their_answer_already_and_a_drop_without_a_receipt_gets_none(
    house: House,
) -> None:
    house.drop("again.jsonl")
    house.box.drop("bad.jsonl", b'{"instruction": "x"}\n')
    (house.box.inbox / "done" / "a.jsonl.receipt.json").unlink()
    places = {"a.jsonl": "done", "again.jsonl": "done", "bad.jsonl": "rejected"}
    assert [house.said(name, place) for name, place in places.items()] == [[], [], []]


def test_a_link_in_place_of_a_note_is_replaced_and_not_followed(house: House, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (house.box.inbox / "done" / "a.jsonl.verdict.txt").symlink_to(victim)
    assert house.said()[0].startswith("a.jsonl")
    assert victim.read_text() == "mine"


def test_a_note_that_cannot_be_written_keeps_no_other_from_being(house: House) -> None:
    house.drop("b.jsonl", 10)
    (house.box.inbox / "done" / "a.jsonl.verdict.txt").mkdir()
    assert house.said("b.jsonl")
