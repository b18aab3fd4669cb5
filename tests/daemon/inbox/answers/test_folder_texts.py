"""README.txt and WANTED.md in the folders for drops: from settings and verdicts, never in place of somebody's own."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from daemon.inbox import folders
from daemon.inbox.answers import folder_texts
from daemon.inbox.answers.folder_texts import FolderTexts, readme_text
from daemon.inbox.folders import MARK
from daemon.inbox.watcher import Watcher
from daemon.settings.model import Settings
from daemon.state import database
from daemon.state.states import PromotionKind, PromotionState, RunState
from daemon.state.tables import Promotion, Run, Track
from pipeline import durable
from pipeline.artifacts import Dataset, GuardResult, SliceResult, Verdict
from pipeline.decide.explain import GUARDS, short_line
from tests.daemon.inbox.test_intake import NOW, Box


def texts_of(box: Box, **values: Any) -> FolderTexts:
    settings = Settings.model_validate({**box.settings.model_dump(), **values})
    return FolderTexts(settings, box.intake._inbox)


def part(kind: str, label: str, score: float, groups: int) -> SliceResult:
    return SliceResult.model_validate(
        {"kind": kind, "label": label, "records": groups, "groups": groups, "candidate": score, "champion": 99.0}
        | {"gain": score - 99.0}
    )


def measure(box: Box, slices: tuple[SliceResult, ...]) -> None:
    """Let run 1 have made the champion, and been measured on the slices."""
    verdict = Verdict(
        outcome="promoted",
        reasons=(),
        sentence="promoted: +9.0 points",
        metric="exact_match",
        records=400,
        groups=400,
        candidate_score=72.0,
        champion_score=63.0,
        gain=9.0,
        slices=slices,
        candidate_model_id="new",
        champion_model_id="old",
    )
    data = Dataset.model_construct(
        folder="runs/1/data",
        train_rows=900,
        dev_rows=0,
        heldout_rows=400,
        heldout_groups=400,
        heldout_pinned=False,
        heldout_version="v",
        dataset_sha256="s",
        duplicates=0,
        replaced=0,
        removed_heldout=0,
        metric="exact_match",
        max_new_tokens=16,
        train_rows_of={"drop 1": 700, "tag billing": 210},
    )
    folder = box.settings.state_folder / "runs" / "1"
    folder.mkdir(parents=True)
    durable.write_json(folder / "decide.json", verdict.model_dump(mode="json"))
    durable.write_json(folder / "prepare.json", data.model_dump(mode="json"))
    with database.transaction(box.engine) as session:
        session.add(Track(name="default", salt="s", created_at=NOW, champion_generation=1, champion_model_id="new"))
        run = Run(track="default", trigger="drop", created_at=NOW, not_before=NOW, state=RunState.SUCCEEDED)
        run.outcome, run.ended_at = "promoted", NOW
        session.add(run)
        session.flush()
        session.add(
            Promotion(
                track="default",
                run_id=run.id,
                kind=PromotionKind.PROMOTION,
                state=PromotionState.DONE,
                generation=1,
                model_id="new",
                model_path="models/new",
                reason="promoted",
                created_at=NOW,
                drops=[1],
            )
        )


def refuse(box: Box, slices: tuple[SliceResult, ...], lost: GuardResult, *reasons: str) -> None:
    """Let run 2 have gained on the champion and lost what a guard watches."""
    verdict = Verdict(
        outcome="guard_failed",
        reasons=(GUARDS[lost.guard].reason, *reasons),
        sentence="",
        metric="exact_match",
        records=400,
        groups=400,
        candidate_score=90.6,
        champion_score=43.0,
        gain=47.6,
        slices=slices,
        guards=(lost,),
        candidate_model_id="newer",
        champion_model_id="new",
    )
    verdict = verdict.model_copy(update={"sentence": short_line(verdict, 100)})
    folder = box.settings.state_folder / "runs" / "2"
    folder.mkdir(parents=True)
    durable.write_json(folder / "decide.json", verdict.model_dump(mode="json"))
    with database.transaction(box.engine) as session:
        run = Run(track="default", trigger="drop", created_at=NOW, not_before=NOW, state=RunState.SUCCEEDED)
        run.outcome, run.ended_at = "guard_failed", NOW
        session.add(run)


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def test_each_track_has_its_own_readme_by_its_settings(box: Box) -> None:
    texts_of(box, tracks={"support": {"trigger": "nightly"}}).refresh()
    top = (box.inbox / "README.txt").read_text(encoding="utf-8")
    assert top.startswith(f"{MARK}\n\nThis is the inbox of track default: drop files of training records here.\n")
    for words in (
        '{"instruction": "...", "input": "...", "output": "..."}',
        "at most 8.0 GB, a line 4.0 MB",
        "not changed for 5 s",
        "  done/       taken",
        "NAME.verdict.txt",
        "NAME.errors.json",
        "WANTED.md",
        "before\nthere are about 780 rows (1,490 where answers are JSON or longer than 5 words).",
        "the whole file is given back",
        "60 s after the last file",
    ):
        assert words in top
    below = (box.inbox / "support" / "README.txt").read_text(encoding="utf-8")
    assert "  ../done/support/ " in below
    assert "The models are judged on a share of each drop." in below
    assert "The next run of this track begins by the schedule 0 2 * * * (UTC)." in below
    assert max(map(len, (top + below).splitlines())) <= 90


def test_a_readme_says_what_the_settings_say() -> None:
    intake = {"on_bad_rows": "quarantine", "max_bad_rows": 7}
    text = readme_text(Settings.model_validate({"intake": intake}), "default")
    assert "Up to 7 bad rows (1 % of the rows) are left out" in text
    pinned = readme_text(Settings.model_validate({"gate": {"on": "pinned", "min_records": 50}}), "default")
    assert "trained on:\nthe models are judged on them. No model gets a verdict before\n50 records (100 where" in pinned


def test_a_readme_is_written_again_only_where_the_settings_changed(box: Box) -> None:
    texts_of(box).refresh()
    path = box.inbox / "README.txt"
    inode = path.stat().st_ino
    texts_of(box).refresh()
    assert path.stat().st_ino == inode
    texts_of(box, intake={"settle_seconds": 9.0}).refresh()
    assert "not changed for 9 s" in path.read_text(encoding="utf-8")
    assert sorted(one.name for one in (box.inbox / "done").iterdir()) == [], "nothing is left aside"


def test_a_readme_names_one_number_of_rows_once_answers_are_known(box: Box) -> None:
    texts = texts_of(box)
    box.drop("long.jsonl", [{"instruction": "How?", "output": "one two three four five six"}])
    texts.refresh()
    path = box.inbox / "README.txt"
    assert "before\nthere are about 1,490 rows.\n" in path.read_text(encoding="utf-8")
    with database.transaction(box.engine) as session:
        session.get_one(Track, "default").metric = "exact_match"
    texts_of(box).refresh()
    assert "before\nthere are about 780 rows.\n" in path.read_text(encoding="utf-8"), "the first run decided"


@pytest.mark.parametrize("text", ["my own words\n", ""])
def test_a_persons_own_file_stays_as_it_is(box: Box, text: str) -> None:
    path = box.inbox / "README.txt"
    path.write_text(text)
    texts_of(box).refresh()
    assert path.read_text() == text


def test_a_link_is_neither_followed_nor_replaced(box: Box, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text(f"{MARK}\n")
    (box.inbox / "README.txt").symlink_to(victim)
    texts_of(box).refresh()
    assert (box.inbox / "README.txt").is_symlink()
    assert victim.read_text() == f"{MARK}\n"


@pytest.mark.skipif(os.geteuid() != 0 and "CI" not in os.environ, reason="only root gives files away")
def test_another_users_file_with_our_first_line_stays(box: Box) -> None:
    path = box.inbox / "README.txt"
    path.write_text(f"{MARK}\n\nsend your data to me\n")
    os.chown(path, 12345, 12345)
    texts_of(box).refresh()
    assert "send your data" in path.read_text()


def test_a_file_that_comes_in_this_very_moment_is_not_replaced(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    path = box.inbox / "README.txt"

    def comes(folder: Any, name: str) -> bool:
        (folder.path / name).write_text("mine")
        return False

    monkeypatch.setattr(folders, "_is_there", comes)
    texts_of(box).refresh()
    assert path.read_text() == "mine"


def test_a_pipe_by_the_name_hangs_nobody(box: Box) -> None:
    os.mkfifo(box.inbox / "README.txt")
    texts_of(box).refresh()
    assert (box.inbox / "README.txt").is_fifo()


def test_the_texts_are_never_taken_for_drops(box: Box) -> None:
    texts_of(box).refresh()
    for name in ("WANTED.md", "readme.txt", "support/README.txt", "heldout/ReadMe.TXT"):
        (box.inbox / name).write_text("x")
    watcher = Watcher(box.settings, threading.Event())
    watcher.scan(0.0)
    assert watcher.scan(1000.0) == []


def test_what_is_wanted_is_where_the_champion_is_weakest(box: Box) -> None:
    slices = (
        part("seen", "records of drops that the champion knows", 1.0, 300),
        part("drop", "drop 1 (first.jsonl)", 70.5, 300),
        part("drop", "drop 2 (second.jsonl)", 55.0, 100),
        part("tag", "tag billing", 41.2, 60),
        part("tag", "tag rare", 10.0, 4),
    )
    measure(box, slices)
    texts = texts_of(box)
    texts.refresh()
    text = (box.inbox / "WANTED.md").read_text(encoding="utf-8")
    assert text.startswith(f"{MARK}\n\n# What would help the model of track default most\n")
    assert "as run 1 measured them: `exact_match`, in points of 100" in text
    assert "On all 400 records: 72.0. Drop more rows like those at the top." in text
    assert [line for line in text.splitlines() if line.startswith("| ")][1:] == [
        "| `tag billing` | 41.2 | 60 | 210 |",
        "| `drop 2 (second.jsonl)` | 55.0 | 100 | 0 |",
        "| `drop 1 (first.jsonl)` | 70.5 | 300 | 700 |",
        "| `tag rare` | 10.0 | 4 (few) | 0 |",
    ]
    assert not (box.inbox / "support" / "WANTED.md").exists(), "nothing was measured there"


@pytest.mark.parametrize(
    ("guard", "helps"),
    [
        ("general", "More rows of the task do not help against that; general questions and their answers do. All that"),
        ("judge", "More rows of the task do not help against that. All that helps: dropforge show 2\n"),
        ("slice", ""),
        ("nll", ""),  # of a run that was no win at all
    ],
)
def test_where_a_guard_failed_more_of_the_task_is_wanted_only_where_that_helps(
    box: Box, guard: str, helps: str
) -> None:
    lost = GuardResult(guard=guard, label="builtin", unit="points", change=-6.0, margin=5.0, state="failed")
    slices = (part("tag", "tag billing", 41.2, 60),)
    measure(box, slices)
    refuse(box, slices, lost, *(["p_above_limit"] if guard == "nll" else []))
    texts_of(box).refresh()
    text = (box.inbox / "WANTED.md").read_text(encoding="utf-8")
    said = (
        "Run 2 was better on the task and is not used: `guard failed (builtin −6.0 points): +47.6 points on the task`."
    )
    assert (said in text) == bool(helps)
    assert helps in text
    assert ("Drop more rows like those at the top." in text) == (not helps)


def test_what_is_wanted_is_told_at_the_next_turn_if_the_disk_was_full(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(box, (part("tag", "tag billing", 41.2, 60),))
    texts = texts_of(box)
    with monkeypatch.context() as cut:

        def full(_folder: object, _aside: object, name: str, _text: object) -> None:
            if name == "WANTED.md":
                raise OSError(errno.ENOSPC, "No space left on device")

        cut.setattr(folder_texts, "keep_own", full)
        with pytest.raises(OSError, match="No space"):
            texts.refresh()
    texts.refresh()
    assert "tag billing" in (box.inbox / "WANTED.md").read_text(encoding="utf-8")


def test_hostile_tags_are_text_in_what_is_wanted(box: Box) -> None:
    measure(box, (part("tag", "tag <img src=x>|[a](b)`\u202e`\x1b[2J", 1.0, 60),))
    texts_of(box).refresh()
    text = (box.inbox / "WANTED.md").read_text(encoding="utf-8")
    assert "\n| `tag <img src=x>¦[a](b)'\\u202e'\\x1b[2J` | 1.0 | 60 | 0 |\n" in text


def test_what_is_wanted_goes_with_the_champion_it_was_about(box: Box) -> None:
    measure(box, (part("tag", "tag billing", 41.2, 60),))
    texts_of(box).refresh()
    path = box.inbox / "WANTED.md"
    assert path.exists()
    with database.transaction(box.engine) as session:
        track = session.get_one(Track, "default")
        track.champion_model_id = "another, that was never measured"
        session.add(track)
    texts_of(box).refresh()
    assert not path.exists()
    path.write_text("a person's own")
    texts_of(box).refresh()
    assert path.read_text() == "a person's own"


def test_a_damaged_verdict_is_passed_by(box: Box) -> None:
    measure(box, ())
    (box.settings.state_folder / "runs" / "1" / "decide.json").write_text("{")
    texts_of(box).refresh()
    assert not (box.inbox / "WANTED.md").exists()
