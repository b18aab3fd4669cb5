import importlib.metadata
import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from sqlalchemy.exc import OperationalError

from daemon.champions import base_models
from daemon.inbox.watcher import make_inbox
from daemon.settings.load import load
from daemon.settings.model import Settings
from daemon.settings.sections import ExecutorSettings
from daemon.state.database import create
from daemon.state.layout import DATABASE_NAME, LOCK_NAME, RESTORING, TROUBLES_NOTE
from daemon.storage.disk_estimate import needed_bytes
from daemon.system.processes import FileLock
from daemon.system.programs import user
from daemon.views import doctor
from daemon.views.doctor import examine
from daemon.views.overview import Overview
from daemon.views.preflight import Finding
from pipeline import durable
from pipeline.config import JudgeConfig
from pipeline.models import gpu_driver
from tests.daemon.conftest import BASE_ID, MODEL_ID
from tests.model_folder import write_model
from tests.stand_in_vllm import VERSION, install


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Give a workspace in which all is well, but that no daemon runs, on a machine without a GPU."""
    monkeypatch.setattr(gpu_driver, "NVIDIA", tmp_path / "no-driver")
    # It starts a process that takes seconds: see test_preflight.py.
    monkeypatch.setattr(doctor, "try_adapter", lambda _folder, _train: {})
    write_model(tmp_path / "base", b"weights")
    (tmp_path / "dropforge.toml").write_text('base_model = "base"\n')
    settings = load(tmp_path / "dropforge.toml", {})
    make_inbox(settings)
    settings.state_folder.mkdir(mode=0o700)
    create(settings.state_folder / DATABASE_NAME)
    return settings


def lines(settings: Settings) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(settings)}


def test_where_all_is_well_no_line_is_bad_and_each_thing_has_its_line(settings: Settings, tmp_path: Path) -> None:
    def files() -> list[Path]:
        return [path for path in sorted(tmp_path.rglob("*")) if not path.name.endswith(("-wal", "-shm"))]

    before = files()
    found = lines(settings)
    assert files() == before, "it changes nothing"
    assert {name for name, finding in found.items() if finding.level != "ok"} == {"daemon"}
    machine = {"database", "state", "inbox", "space", "training", "daemon"}
    assert set(found) == machine | {"base of default", "suites of default"}


def nfs(_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "file_system", lambda _path: "nfs4")


def insert(statement: str) -> Callable[[Settings, pytest.MonkeyPatch], None]:
    """Return what adds a row to the database, whatever its other rows are."""

    def add(settings: Settings, _monkeypatch: pytest.MonkeyPatch) -> None:
        with closing(sqlite3.connect(settings.state_folder / DATABASE_NAME, isolation_level=None)) as connection:
            connection.execute(f"INSERT INTO {statement}")

    return add


orphan = insert("attempt (run_id, step, number, fence, state, started_at) VALUES (7, 'train', 1, 'f', 'lost', 1)")
lost_drop = insert(
    '"drop" (track, role, state, name_bytes, name, sha256, size_bytes, rows, findings, warnings, received_at) '
    "VALUES ('default', 'train', 'accepted', x'61', 'a', 'h', 1, 1, 0, 0, 1)"
)


def no_torch(_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else known(name))


TROUBLES: dict[str, tuple[Callable[[Settings, pytest.MonkeyPatch], object], str, str, str]] = {
    "state on NFS": (nfs, "state", "bad", "local disk"),
    "inbox on NFS": (nfs, "inbox", "warn", "polling"),
    "a restore was cut off": (
        lambda settings, _: (settings.state_folder / RESTORING).write_text("{}"),
        "database",
        "bad",
        "dropforge restore",
    ),
    "no database": (
        lambda settings, _: (settings.state_folder / DATABASE_NAME).unlink(),
        "database",
        "warn",
        "dropforge run",
    ),
    "no database at all": (
        lambda settings, _: (settings.state_folder / DATABASE_NAME).write_text("hello" * 500),
        "database",
        "bad",
        "dropforge restore",
    ),
    "a row without its parent": (orphan, "database", "bad", "dropforge restore"),
    "a drop whose file is gone": (lost_drop, "drops", "bad", "from a backup"),
    "no torch": (no_torch, "training", "bad", "dropforge[train]"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_each_trouble_is_seen_and_has_its_remedy(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    make, name, level, remedy = TROUBLES[trouble]
    assert lines(settings).get(name, Finding(name=name, level="ok", text="")).level == "ok"
    make(settings, monkeypatch)
    found = lines(settings)[name]
    assert (found.level, remedy in found.remedy) == (level, True), found


def test_a_run_needs_the_room_that_the_daemon_asks_for(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = sum(needed_bytes(settings.track("default")).values()) + settings.disk.low_water_bytes
    for free, level, remedy in ((needed, "ok", ""), (needed - 1, "bad", "free some")):
        monkeypatch.setattr("daemon.storage.disk._free_bytes", lambda _path, free=free: free)
        found = lines(settings)["space"]
        assert (found.level, " free for the state folder; " in found.text) == (level, True)
        assert remedy in found.remedy
    shared = settings.model_copy(update={"executor": ExecutorSettings(shared=str(settings.inbox_folder))})
    assert f" free for {settings.inbox}; " in lines(shared)["space"].text


def said_of(settings: Settings, name: str) -> list[tuple[str, str]]:
    return [(one.level, one.text) for one in examine(settings) if one.name == name]


def test_vllms_program_is_looked_for_where_it_is_to_answer(settings: Settings, tmp_path: Path) -> None:
    def said(program: str) -> list[tuple[str, str]]:
        named = settings.evaluate.model_copy(update={"vllm": program})
        return said_of(settings.model_copy(update={"evaluate": named}), "vLLM of default")

    other = tmp_path / "other"
    other.write_text("#!/bin/sh\necho hello\n")
    assert said("") == []
    assert said(str(other)) == [("bad", f"there is no program {other} that user {user()} may execute")]
    other.chmod(0o755)
    assert said(str(other)) == [
        ("bad", f"vLLM's Python cannot be run: [Errno 2] No such file or directory: '{tmp_path}/python3'")
    ]
    there = install(tmp_path / "vllm", "fixed")
    assert said(there) == [("ok", f"{there}: version {VERSION}")]


def test_suites_are_read_as_a_run_reads_them(settings: Settings, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text('{"question": "q", "choices": ["a", "b"], "answer": 1}\n{"question": "q", "choices": ["a"]}\n')

    names = ("builtin", str(own), f"{own}.gone")
    evaluate = settings.evaluate.model_copy(update={"general": names})
    found = said_of(settings.model_copy(update={"evaluate": evaluate}), "suites of default")
    assert [level for level, _ in found] == ["ok", "bad", "bad"]
    assert [text.removeprefix("suite ") for _, text in found][1:] == [
        f"{own}, line 2: choices: must be two or more, and not be empty or repeat",
        f"there is no suite {own}.gone",
    ]
    own.write_text('{"instruction": "a", "output": "b"}\n')
    assert said_of(settings.model_copy(update={"evaluate": evaluate}), "suites of default")[1] == (
        "ok",
        f"{own}: 1 item",
    )


def test_a_judge_that_lacks_its_key_is_a_warning(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = JudgeConfig(url="http://127.0.0.1:9/v1", model="m", api_key_env="JUDGE_KEY")
    judged = settings.model_copy(update={"judge": judge})
    monkeypatch.setenv("JUDGE_KEY", "sk-hush")
    assert "judge" not in lines(judged)
    monkeypatch.delenv("JUDGE_KEY")
    assert (lines(judged)["judge"].level, lines(judged)["judge"].text) == ("warn", "JUDGE_KEY is not set in this shell")


#: What `pipeline.models.gpu_check` prints where all works.
GPU = {
    "driver": "580.65.06",
    "torch": "2.13.0",
    "cuda": "13.0",
    "gpus": [{"name": "RTX 4090", "capability": "8.9", "free": 20_000_000_000, "total": 24_000_000_000}],
    "bitsandbytes": True,
    "nf4": "",
    "packed_attention": "",
}
DESCRIBED = "RTX 4090 (compute capability 8.9, 20 GB of 24 GB free); driver 580.65.06, torch 2.13.0 for CUDA 13.0; "


def load_driver(settings: Settings, monkeypatch: pytest.MonkeyPatch, said: object = None, code: int = 0) -> None:
    """Load NVIDIA's driver; if `said` is given, let the child process print it and end with `code`."""
    driver = settings.state_folder.parent / "driver"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06")
    monkeypatch.setattr(gpu_driver, "NVIDIA", driver)
    if said is not None:
        program = settings.state_folder.parent / "program"
        program.write_text(f"#!/bin/sh\necho noise\ncat <<END\n{json.dumps(said)}\nEND\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setattr("sys.executable", str(program))


@pytest.mark.parametrize(
    ("said", "code", "level", "text", "remedy"),
    [
        (GPU, 0, "ok", f"{DESCRIBED}bf16, NF4 and attention over packed records work", ""),
        ({**GPU, "nf4": "RuntimeError: no kernel"}, 0, "warn", "NF4: RuntimeError: no kernel", "train.quantization"),
        ({**GPU, "bitsandbytes": False}, 0, "warn", "NF4: its library is built for the CPU", "--upgrade bitsandbytes"),
        ({**GPU, "packed_attention": "TypeError: x"}, 0, "warn", f"{DESCRIBED}attention over packed", "newer torch"),
        ({"error": "T4 cannot compute in bf16", "hint": "use Ampere"}, 65, "bad", "T4 cannot compute", "use Ampere"),
    ],
    ids=["works", "NF4", "library", "attention", "bf16"],
)
def test_the_gpu_is_tried_and_described_in_one_line(
    said: object,
    code: int,
    level: str,
    text: str,
    remedy: str,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load_driver(settings, monkeypatch, said, code)
    found = lines(settings)["GPU"]
    assert (found.level, text in found.text, remedy in found.remedy) == (level, True, True), found


def test_a_driver_with_a_torch_that_cannot_use_it_is_bad(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    load_driver(settings, monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "none")
    found = lines(settings)["GPU"]
    assert (found.level, found.text.startswith("torch cannot use the GPU: ")) == ("bad", True)
    assert found.remedy.endswith(', or set device = "cpu"')


def test_no_gpu_is_tried_where_no_step_may_use_it(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "try_gpu", Mock(side_effect=AssertionError))
    assert "GPU" not in lines(settings), "no driver is loaded"
    load_driver(settings, monkeypatch)
    assert lines(settings)["gpu"].level == "bad"
    assert not {"GPU", "gpu"} & lines(settings.model_copy(update={"device": "cpu"})).keys()


def test_a_running_daemon_is_seen(settings: Settings) -> None:
    lock = FileLock(settings.state_folder / LOCK_NAME)
    assert lock.acquire()
    assert lines(settings)["daemon"].level == "ok"
    durable.write_json(settings.state_folder / TROUBLES_NOTE, {"Slurm": "it has not answered since 14:05"})
    assert said_of(settings, "trouble") == [("warn", "Slurm: it has not answered since 14:05")]
    lock.release()
    assert said_of(settings, "trouble") == []


def test_the_command_ends_with_1_if_a_line_is_bad_and_says_the_same_as_json(
    settings: Settings, dropforge: Callable[..., Any]
) -> None:
    good = dropforge("doctor")
    assert good.code == 0, good.out
    assert dropforge("doctor", "--json").json["ok"] is True
    (Path(settings.base_model) / "tokenizer.json").unlink()
    bad = dropforge("doctor", "--json")
    assert (bad.code, bad.json["ok"]) == (1, False)
    assert [one["name"] for one in bad.json["findings"] if one["level"] == "bad"] == ["base of default"]
    assert "→ save the tokenizer" in dropforge("doctor").out


def test_a_check_that_raises_anything_is_a_line_and_the_others_are_made(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    cause = sqlite3.OperationalError("database is locked")
    cause.sqlite_errorcode = sqlite3.SQLITE_BUSY

    def wrong(_settings: Settings) -> None:
        raise KeyError("st_size")

    monkeypatch.setattr(doctor, "verify", Mock(side_effect=OperationalError("PRAGMA integrity_check", {}, cause)))
    monkeypatch.setattr(doctor, "_space", wrong)
    bad = {one.name: (one.text, one.remedy) for one in examine(settings) if one.level == "bad"}
    path = settings.state_folder / DATABASE_NAME
    assert bad["database"][0] == f"the state database {path} cannot be used: database is locked"
    assert bad["wrong"] == ("KeyError: 'st_size'", "this is a defect, please report it")
    assert [one.name for one in examine(settings)][-1] == "daemon"


def test_it_loads_no_torch(settings: Settings, tmp_path: Path) -> None:
    code = (
        "import json, sys; from pathlib import Path; from daemon.settings.load import load; "
        "from daemon.views.doctor import examine; "
        "examine(load(Path(sys.argv[1]), {})); print(json.dumps(sorted(sys.modules)))"
    )
    argv = [sys.executable, "-P", "-c", code, str(tmp_path / "dropforge.toml")]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert settings.base_model
    assert not {"torch", "transformers", "numpy"} & set(json.loads(done.stdout))


def test_a_champion_that_a_server_would_not_find_is_named(lived_in: Any) -> None:
    settings, state = lived_in.settings, lived_in.settings.state_folder
    folder, link = state / "models" / MODEL_ID, state / "tracks/default/champion"
    assert said_of(settings, "champion of support") == []
    assert said_of(settings, "champion of default") == [("ok", f"generation 1, {folder}")]
    link.unlink()
    (told,) = [one for one in examine(settings) if one.name == "champion of default"]
    assert (told.level, told.text) == ("bad", f"{link} does not lead to generation 1, {folder}")
    link.symlink_to(lived_in.folder / "base")
    assert said_of(settings, "champion of default") == [(told.level, told.text)]
    folder.rename(folder.with_name("elsewhere"))
    (told,) = [one for one in examine(settings) if one.name == "champion of default"]
    assert (told.level, told.text) == ("bad", f"the model of generation 1 is gone: {folder}")
    assert told.remedy.endswith("dropforge history --track default")


def test_a_base_model_that_moved_is_looked_for_at_its_new_place(lived_in: Any) -> None:
    settings, base = lived_in.settings, lived_in.folder / "base"
    for place in (base, base.rename(base.with_name("elsewhere"))):
        base_models.ensure_base(lived_in.engine, settings.state_folder, "support", base_models.Base(place, BASE_ID), 1)
    assert Overview.of(settings).history("support")[0].path == str(place)
    assert said_of(settings, "champion of support") == [("ok", f"generation 0, {place}")]


def test_an_inbox_in_which_members_can_replace_each_others_files_is_told(settings: Settings) -> None:
    settings.inbox_folder.chmod(0o2770)
    found = lines(settings)["inbox rights"]
    assert (found.level, "may take away and replace what others dropped" in found.text) == ("warn", True)
    assert found.remedy.startswith("chmod +t ")
    settings.inbox_folder.chmod(0o3770)
    assert "inbox rights" not in lines(settings), "as the README has it"


@pytest.mark.timeout(60)
def test_a_fifo_in_place_of_a_suite_is_told_and_not_waited_for(settings: Settings, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "own.jsonl")
    evaluate = settings.evaluate.model_copy(update={"general": (str(tmp_path / "own.jsonl"),)})
    ((level, text),) = said_of(settings.model_copy(update={"evaluate": evaluate}), "suites of default")
    assert (level, "own.jsonl" in text, "regular file" in text) == ("bad", True, True)
