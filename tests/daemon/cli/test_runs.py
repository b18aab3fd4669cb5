"""The commands that read a state folder with a history, and those that act on it."""

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from daemon.champions import base_models
from daemon.inbox.watcher import Watcher
from daemon.state.database import transaction
from daemon.state.states import DropState
from daemon.state.tables import Drop, Run
from daemon.system.processes import FileLock
from daemon.web.server import make_app
from pipeline import durable

GOOD = '{"instruction": "a", "output": "b"}\n'
Command = Callable[..., Any]


def test_status_says_what_runs_what_waits_and_what_came_of_it(lived_in: Any, dropforge: Command) -> None:
    (lived_in.settings.inbox_folder / "late.jsonl").write_text(GOOD)
    note = {"waiting": [], "unknown_folders": [{"name": "suport", "nearest": "support"}], "full_tracks": ["default"]}
    durable.write_hint(lived_in.settings.state_folder / "watcher.json", note)
    ended = dropforge("status")
    assert ended.code == 69
    for words in (
        "daemon: not running",
        "not taken yet: late.jsonl",
        "suport/ is no declared track; did you mean support?",
        "track default: further files wait for a run, the limit is intake.max_waiting_drops",
        "generation 1, c0c0c0c0c0c0, promotion of run 1",
        "4 accepted, 1 duplicate, 1 rejected",
        "train 12/30, loss 0.500, dev loss 0.600, 250 tokens/s, 1 min 15 s left, about 2.3 GB of memory",
        "promoted: +40.0",
        "out of memory",
    ):
        assert words in ended.out
    found = dropforge("status", "--json").json
    assert found["daemon"] == {"alive": False, "pid": None}
    assert found["inbox"]["files"] == ["late.jsonl"]
    assert [(run["id"], run["progress"]["done"]) for run in found["runs"]] == [(3, 12)]
    assert [run["outcome"] for run in found["latest"]] == [None, "promoted"]
    assert found["tracks"][0]["champion"]["generation"] == 1
    assert (found["tracks"][1]["name"], found["tracks"][1]["champion"]) == ("support", None)


ALPACA = (
    '; the template makes "Below is an instruction that describes a task. Write a response that appropriately '
    'completes the request.\\n\\n### Instruction:\\n{message}\\n\\n### Response:\\n" of it'
)


@pytest.mark.parametrize(("form", "ends"), [("chat", ""), ("alpaca", ALPACA)])
def test_show_prints_the_exact_form_of_the_prompt(lived_in: Any, dropforge: Command, form: str, ends: str) -> None:
    path = lived_in.settings.state_folder / "runs" / "1" / "train.json"
    durable.write_json(path, {"format": form})
    how = "prompt: one user message through the model's chat template: "
    said = f'{how}"{{instruction}}", or with an input "{{instruction}}\\n### Input:\\n{{input}}"{ends}\n'
    assert said in dropforge("show", "1").out
    path.write_text("{")
    assert (dropforge("show", "1").code, how in dropforge("show", "1").out) == (0, False)


def test_status_names_the_files_that_a_writer_has_open(lived_in: Any, dropforge: Command) -> None:
    for name in ("open\x1b[31m.jsonl", "closed.jsonl", "~lock.jsonl", "Thumbs.db"):
        (lived_in.settings.inbox_folder / name).write_text(GOOD)
    lock = FileLock(lived_in.settings.state_folder / "daemon.lock")
    assert lock.acquire()
    watcher = Watcher(lived_in.settings, threading.Event())
    with (lived_in.settings.inbox_folder / "open\x1b[31m.jsonl").open("a"):
        for now in (0.0, 60.0):
            watcher.scan(now)
        note = {"waiting": watcher.waiting(), "unknown_folders": [], "full_tracks": []}
        durable.write_hint(lived_in.settings.state_folder / "watcher.json", note)
    said = [line.strip() for line in dropforge("status").out.splitlines() if "not taken yet" in line]
    assert said == ["not taken yet: closed.jsonl", r"not taken yet: open\x1b[31m.jsonl (still open for writing)"]
    lock.release()


def test_drops_and_runs_can_be_filtered(lived_in: Any, dropforge: Command) -> None:
    assert lived_in
    assert [drop["id"] for drop in dropforge("drops", "--json").json["drops"]] == [6, 5, 4, 3, 2, 1]
    assert [drop["id"] for drop in dropforge("drops", "--state", "rejected", "--json").json["drops"]] == [4]
    assert dropforge("drops", "--track", "support").out.startswith("no drops\ntrack support has 0 pinned records")
    table = dropforge("drops").out
    assert "the same as drop 2" in table
    assert "output is missing" in table
    assert [run["id"] for run in dropforge("runs", "--state", "failed", "--json").json["runs"]] == [2]
    assert dropforge("runs", "--track", "support").out == "no runs\n"
    assert len(dropforge("runs").out.splitlines()) == 4


def test_drops_and_runs_list_the_newest_fifty_unless_asked_for_all(lived_in: Any, dropforge: Command) -> None:
    with transaction(lived_in.engine) as session:
        dropped, run = session.get_one(Drop, 4).model_dump(), session.get_one(Run, 2).model_dump()
        session.add_all([Drop(**{**dropped, "id": number}) for number in range(7, 61)])
        session.add_all([Run(**{**run, "id": number}) for number in range(4, 61)])
    for name, failed in (("drops", "rejected"), ("runs", "failed")):
        listed, everything = dropforge(name, "--json").json, dropforge(name, "--all", "--json").json
        assert [one["id"] for one in listed[name]] == list(range(60, 10, -1))
        assert len(everything[name]) == 60
        assert dropforge(name).out.splitlines()[-1] == "the newest 50; all of them: --all"
        assert "the newest" not in dropforge(name, "--all").out
        assert dropforge(name, "--state", failed).out.splitlines()[-1] == "the newest 50; all of them: --all"


def test_a_run_that_is_queued_has_not_begun(lived_in: Any, dropforge: Command) -> None:
    lived_in.take("fourth.jsonl", GOOD)
    queued, running = dropforge("runs").out.splitlines()[1:3]
    assert re.match(r"4 +default +queued +begins in its turn", queued), queued
    assert re.match(r"3 +default +running +\d{4}-\d\d-\d\d \d\d:\d\d +train", running), running
    lived_in.take("first.jsonl", GOOD, track="support")
    assert re.search(r"\n5 +support +queued +begins in its turn\n", dropforge("status").out)


def test_show_tells_everything_about_a_run(lived_in: Any, dropforge: Command) -> None:
    out = dropforge("show", "1").out
    for words in (
        "run 1 of track default: succeeded, promoted",
        "exam.jsonl",
        "evaluate-1",
        "1 min 00 s",
        "p = 0.0001 (exact McNemar, one-sided)",
        "rank 16",
        'stop ["slice", "general", ',
        "slices 4.5, general 5.0, general_base 10.0, anchor 5.0, nll 0.1",
        "rslora false",
        "search.when always",
        str(lived_in.settings.state_folder / "runs" / "1"),
    ):
        assert words in out
    assert "'" not in out, "nothing is as Python has it"
    failed = dropforge("show", "2").out
    assert "error: out of memory\nhint: lower train.batch_size" in failed
    assert "failures: 1" in failed
    none = "\nreport: none, since the run ended without a verdict\n"
    assert (none in failed, none in dropforge("show", "3").out) == (True, False)
    found = dropforge("show", "3", "--json").json["run"]
    assert (found["state"], found["attempts"][1]["state"], found["verdict"]) == ("running", "submitted", None)


def test_champion_prints_the_link_that_a_server_loads(lived_in: Any, dropforge: Command) -> None:
    link = Path(dropforge("champion", "--path").out.removesuffix("\n"))
    assert link.is_symlink()
    assert link.resolve().name == "c0" * 32
    out = dropforge("champion").out
    assert "generation 1" in out
    assert "trained on: first.jsonl" in out
    assert dropforge("champion", "--json").json["champions"][0]["drops"] == ["first.jsonl"]
    assert [one["generation"] for one in dropforge("history", "--json").json["history"]] == [1, 0]
    assert "base model" in dropforge("history").out
    assert lived_in


def test_logs_name_the_attempts_and_show_a_progress_bars_last_state(lived_in: Any, dropforge: Command) -> None:
    folder = lived_in.settings.state_folder / "runs" / "2" / "attempts" / "train-1"
    (folder / "log.txt").write_bytes(b"one\n10%\r50%\r100%\n\x1b[31mred\xff\nunfinished")
    expected = ["==> prepare-1 <==", "prepare says hello", "second line", "==> train-1 <=="]
    expected += ["one", "100%", "\\x1b[31mred\ufffd", "unfinished"]
    assert dropforge("logs", "2").out.splitlines() == expected


# --- acting


def test_a_failed_run_is_retried_from_a_step_that_the_user_names(lived_in: Any, dropforge: Command) -> None:
    assert "use one of prepare, train" in dropforge("retry", "2", "--from", "training").err
    folder = lived_in.settings.state_folder / "runs" / "2"
    folder.mkdir(parents=True, exist_ok=True)
    for step in ("prepare", "train", "merge"):
        (folder / f"{step}.json").write_text("{}")
    assert dropforge("retry", "1", "--from", "train").code == 1
    assert dropforge("retry", "2", "--from", "train").out.startswith("run 2 goes on where it stopped")
    assert {path.name for path in folder.glob("*.json")} == {"prepare.json", "train.stale-1.json", "merge.stale-1.json"}


def test_a_failed_run_is_retried_and_a_running_one_asked_to_stop(lived_in: Any, dropforge: Command) -> None:
    assert dropforge("retry", "2").out == "run 2 goes on where it stopped, once the daemon runs: dropforge run\n"
    assert dropforge("cancel", "2").out == "run 2 was cancelled\n"
    assert "run 3 is asked to stop" in dropforge("cancel", "3").out
    found = dropforge("show", "3", "--json").json["run"]
    assert (found["state"], found["cancel_requested"]) == ("running", True)
    assert "to be cancelled" in dropforge("status").out
    assert lived_in


def test_a_drop_is_withdrawn_and_restored_with_a_reason(lived_in: Any, dropforge: Command) -> None:
    assert lived_in
    assert dropforge("drops", "withdraw", "2", "--reason", "wrong labels").code == 0
    drop = dropforge("drops", "--state", "withdrawn", "--json").json["drops"][0]
    assert (drop["id"], drop["state"], drop["reason"]) == (2, DropState.WITHDRAWN, "wrong labels")
    assert "wrong labels" in dropforge("drops").out
    assert dropforge("drops", "restore", "2", "--reason", "they were right").out == (
        "drop 2 (first.jsonl) is accepted again: the next run of track default uses it\n"
        "run 4 is queued: it begins next\n"
    )
    assert dropforge("drops", "--state", "withdrawn").out == "no drops\n"
    assert dropforge("runs", "--json").json["runs"][0]["state"] == "queued"


def test_a_held_out_file_that_waits_is_listed_and_accepted(lived_in: Any, dropforge: Command) -> None:
    path = lived_in.settings.inbox_folder / "heldout" / "theirs.jsonl"
    path.touch()
    path.chmod(0o666)
    lived_in.take(path.name, GOOD, "heldout")
    for words in (("drops",), ("drops", "--state", "proposed")):
        assert "dropforge drops accept 7" in dropforge(*words).out
    assert dropforge("drops", "accept", "7", "--reason", "I read it").code == 0
    assert dropforge("drops", "--state", "proposed").out == "no drops\n"
    assert "7 " in dropforge("drops", "--state", "accepted").out


def test_acting_without_a_database_makes_none(dropforge: Command, tmp_path: Path) -> None:
    dropforge("init")
    for arguments in (("retry", "1"), ("cancel", "1"), ("drops", "withdraw", "1", "--reason", "x")):
        ended = dropforge(*arguments)
        assert (ended.code, "there is no database" in ended.err) == (1, True)
    assert not (tmp_path / ".dropforge" / "dropforge.db").exists()


def test_a_track_that_was_taken_out_of_the_settings_is_still_asked_for_by_its_name(
    lived_in: Any, dropforge: Callable[..., Any]
) -> None:
    base = lived_in.folder / "base"
    base_models.ensure_base(
        lived_in.engine, lived_in.settings.state_folder, "support", base_models.Base(base, "ba" * 32), 1
    )
    path = lived_in.folder / "dropforge.toml"
    path.write_text(path.read_text().replace("[tracks.support]", ""))
    assert "generation 0, base" in dropforge("champion", "--track", "support").out
    assert "base model" in dropforge("history", "--track", "support").out
    assert dropforge("runs", "--track", "support").out == "no runs\n"
    assert dropforge("drops", "--track", "support").out == "no drops\n"
    back = dropforge("rollback", "--track", "support", "--reason", "x")
    assert (back.code, back.err.splitlines()[0]) == (1, "error: track support has had no other champion than today's")
    assert dropforge("runs", "--track", "suport").code == 2
    assert dropforge("submit", path.with_name("inbox") / "done/first.jsonl", "--track", "support").code == 2


def test_train_begins_a_run_and_says_what_it_will_hold(lived_in: Any, dropforge: Command) -> None:
    said = "run 4 trains on {} new; it begins next, once the daemon runs: dropforge run\n"
    assert dropforge("train").out == said.format("4 rows of 3 drops, 0 of them")
    lived_in.take("fourth.jsonl", '{"instruction": "say e", "output": "e"}\n')
    with transaction(lived_in.engine) as session:
        put_off = session.get_one(Run, 4).not_before = lived_in.now + 10**12
    assert dropforge("train").out == said.format("5 rows of 4 drops, 1 of them")
    with transaction(lived_in.engine) as session:
        run = session.get_one(Run, 4)
        assert (run.trigger, run.not_before < put_off) == ("hand", True)


def test_a_search_is_queued_and_says_how_much_it_tries(lived_in: Any, dropforge: Command) -> None:
    with (lived_in.folder / "dropforge.toml").open("a") as file:
        file.write("[train.search]\nwhen = 'asked'\nspace = { learning_rate = [1e-4, 4e-4], rank = [4, 8] }\n")
    ended = dropforge("search")
    said = "run 4 searches on 4 rows in 4 trials; it begins next, once the daemon runs: dropforge run\n"
    assert (ended.code, ended.out) == (0, said), ended.err
    with transaction(lived_in.engine) as session:
        assert session.get_one(Run, 4).purpose == "search"


def test_a_space_that_is_wrong_is_refused_by_each_command(lived_in: Any, dropforge: Command) -> None:
    with (lived_in.folder / "dropforge.toml").open("a") as file:
        file.write("[train.search.space]\nlearningrate = [1e-4, 2e-4]\n")
    ended = dropforge("status")
    assert ended.code == 2
    assert "train: search.space.learningrate: there is no setting train.learningrate; what can be tried: " in ended.err


def test_rows_and_records_are_two_numbers_wherever_drops_are_listed(lived_in: Any, dropforge: Command) -> None:
    said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    lived_in.take("talk.jsonl", json.dumps({"conversations": said * 3}) + "\n")
    for command in (("drops",), ("status",)):
        printed = dropforge(*command).out.splitlines()
        heads = next(line for line in printed if line.startswith("DROP ")).split()
        cells = next(line for line in printed if line.endswith("talk.jsonl")).split()
        assert (cells[heads.index("ROWS")], cells[heads.index("RECORDS")]) == ("1", "3"), command
    page = TestClient(make_app(lived_in.settings, "t" * 43), base_url="http://127.0.0.1:8765")
    for path in ("/", "/drops", "/inbox"):
        row = page.get(path).text.partition("talk.jsonl")[2].partition("</tr>")[0]
        assert re.findall(r'data-label="(R\w+)"><div>(\d+)<', row)[:2] == [("Rows", "1"), ("Records", "3")], path
    assert "DROP  ROLE     ROWS  RECORDS  NAME" in dropforge("show", "1").out
