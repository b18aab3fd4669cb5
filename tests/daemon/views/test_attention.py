"""What a person is told first."""

import json
import time
from typing import Any

import pytest

from daemon.queue.order import pause
from daemon.settings.model import DiskSettings, HookSettings
from daemon.state.database import transaction
from daemon.state.events import Word
from daemon.state.layout import LOCK_NAME, TROUBLES_NOTE
from daemon.state.tables import Run
from daemon.system.folders import StateFolder, WorkFolder
from daemon.system.processes import FileLock
from daemon.views.attention import Attention, attention, dismiss
from daemon.views.overview import Overview
from pipeline import durable
from pipeline.decide.explain import brief
from tests import run_owner
from tests.daemon.conftest import lines


@pytest.fixture
def lately(lived_in: Any) -> Any:
    """The workspace, a moment ago."""
    lived_in.now = round(time.time() * 1000) - 3_600_000
    with lived_in.engine.begin() as base:
        base.exec_driver_sql("UPDATE run SET ended_at = ? WHERE ended_at IS NOT NULL", (lived_in.now,))
        base.exec_driver_sql('UPDATE "drop" SET received_at = ?', (lived_in.now,))
    return lived_in


def told(lived_in: Any, **settings: Any) -> list[Attention]:
    state = lived_in.settings.state_folder
    return list(
        attention(lived_in.settings.model_copy(update=settings), Overview(StateFolder(state), WorkFolder(state)))
    )


def test_what_went_wrong_long_ago_is_history(lived_in: Any) -> None:
    assert [one.kind for one in told(lived_in)] == ["daemon"]


def test_a_failed_run_and_a_rejected_drop_are_told_with_why(lately: Any) -> None:
    failed, rejected = told(lately)[1:]
    assert (failed.kind, failed.run, failed.title) == ("failed", 2, "Run 2 failed")
    assert failed.detail == "out of memory; lower train.batch_size"
    assert (rejected.kind, rejected.drop, rejected.title) == ("rejected", 4, "bad.jsonl was rejected")
    assert rejected.detail == "output is missing"


def test_a_rejected_drop_leaves_once_its_owner_dropped_a_file_of_its_name_again(
    lately: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as other:
        other.setattr("daemon.inbox.intake.name_of", lambda _number: "bob")
        lately.take("bad.jsonl", lines("of", "bob"))
    assert [one.drop for one in told(lately) if one.kind == "rejected"] == [4], "another user's file"
    lately.take("bad.jsonl", '{"instruction": "y"}\n')
    assert [one.drop for one in told(lately) if one.kind == "rejected"] == [8], "the newer one stands for both"
    lately.take("bad.jsonl", lines("mended"), "heldout")
    assert [one.drop for one in told(lately) if one.kind == "rejected"] == [8], "another folder's file"
    lately.take("bad.jsonl", lines("mended", "too"))
    assert [one.drop for one in told(lately) if one.kind == "rejected"] == []


def test_findings_are_counted_by_kind_rare_ones_first(lately: Any) -> None:
    lately.take("mixed.jsonl", '{"instruction": "x"}\n' * 7 + "kaputt\n" + '{"output": "x"}\n' * 2)
    newest = next(one for one in told(lately) if one.kind == "rejected")
    assert newest.detail.endswith("instruction is missing (2 rows); output is missing (7 rows)")
    assert newest.detail.count("; ") == 2


def test_the_machine_comes_before_all_else(lately: Any) -> None:
    lock = FileLock(lately.settings.state_folder / LOCK_NAME)
    assert lock.acquire()
    durable.write_hint(lately.settings.state_folder / TROUBLES_NOTE, {"track default": "its base model is gone"})
    pause(lately.engine, "support", Word("a fair", lately.tick(), "ana"))
    found = told(lately, disk=DiskSettings(low_water_bytes=1 << 52))
    lock.release()
    assert [one.kind for one in found] == ["disk", "trouble", "paused", "failed", "rejected"]
    assert found[1].detail == "its base model is gone"
    assert "paused by ana: a fair" in found[2].detail
    assert found[2].track == "support"


def test_what_waits_for_a_word_is_told(lately: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.inbox.waiting_limit.WaitingLimit.why_it_waits", lambda *_: "it is bob's")
    lately.take("theirs.jsonl", '{"instruction": "q9", "output": "a"}\n', "heldout")
    with lately.engine.begin() as base:
        won = json.dumps(brief(run_owner.judged("promoted", 3.0)))
        base.exec_driver_sql("UPDATE run SET outcome = 'awaiting_approval', verdict = ? WHERE id = 2", (won,))
        base.exec_driver_sql(
            "UPDATE promotion SET hook_state = 'failed', hook_error = 'exit code 1' WHERE generation = 1"
        )
    by_kind = {one.kind: one for one in told(lately)}
    assert by_kind["approval"].run == 2
    assert by_kind["approval"].detail.endswith("(dropforge promote 2): +3.0 points")
    assert by_kind["proposed"].detail == "it is bob's"
    assert by_kind["hook"].detail == "exit code 1", "there is no command to run again any more"
    (again,) = [one for one in told(lately, hooks=HookSettings(after_promotion=("true",))) if one.kind == "hook"]
    assert again.detail == "exit code 1; to run it again: dropforge hook --track default"


def test_what_a_list_leaves_out_is_counted(lately: Any) -> None:
    for number in range(5):
        lately.take(f"bad{number}.jsonl", '{"instruction": "y"}\n')
    assert [one.title for one in told(lately) if one.kind == "rejected"][-1] == "1 more file was rejected"
    for number in (5, 6):
        lately.take(f"bad{number}.jsonl", '{"instruction": "y"}\n')
    found = [one for one in told(lately) if one.kind == "rejected"]
    assert [one.title for one in found] == [
        *(f"bad{number}.jsonl was rejected" for number in range(6, 1, -1)),
        "3 more files were rejected",
    ]
    assert sum(one.count for one in found) == 8
    assert found[-1].detail == "list them: dropforge drops --state rejected"


def test_the_rest_of_a_long_list_is_at_least_so_many_also_after_a_dismissal(lately: Any) -> None:
    run: dict[str, Any] = {"track": "support", "state": "failed", "trigger": "drop", "created_at": 1, "not_before": 1}
    with transaction(lately.engine) as session:
        session.add_all([Run(**run, id=100 + number, ended_at=lately.now) for number in range(150)])
    overview = Overview.of(lately.settings)
    for _ in range(2):
        first, *_, rest = [one for one in attention(lately.settings, overview) if one.kind == "failed"]
        assert rest.title.startswith("At least ")
        dismiss(lately.engine, lately.settings, overview, first.key, Word("", round(time.time() * 1000), "ana"))


def test_what_is_dismissed_is_left_out_until_it_happens_again(lately: Any) -> None:
    def away(key: str, at: int) -> None:
        dismiss(lately.engine, lately.settings, Overview.of(lately.settings), key, Word("", at, "ana"))

    now = round(time.time() * 1000)
    assert [one.key for one in told(lately)[1:]] == ["failed-2", "rejected-4"]
    away("rejected-4", now)
    away("failed-2", now)
    assert [one.kind for one in told(lately)] == ["daemon"]
    with lately.engine.begin() as base:
        base.exec_driver_sql("UPDATE run SET ended_at = ? WHERE id = 2", (now + 1000,))
    assert [one.key for one in told(lately)[1:]] == ["failed-2"], "it failed again"
    (daemon, _) = told(lately)
    away(daemon.key, now - 25 * 3_600_000)
    assert told(lately)[0].kind == "daemon", "what lasts is dismissed for a day"
    away(daemon.key, now)
    assert [one.key for one in told(lately)] == ["failed-2"]
