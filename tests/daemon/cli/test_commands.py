"""The commands, on real state folders: what they print, what they leave, and how they end."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from daemon.cli.commands import COMMANDS
from daemon.settings.load import load
from daemon.settings.model import SettingsError
from daemon.views.overview import Overview
from pipeline.models.generation import load_template
from pipeline.models.template import fold, single_turn
from tests.daemon.conftest import SCRIPT
from tests.model_folder import write_model

STACK = {"accelerate", "bitsandbytes", "datasets", "evaluate", "numpy", "peft", "scipy", "torch", "transformers", "trl"}
GOOD = '{"instruction": "a", "output": "b"}\n'
BAD = GOOD + '{"instruction": "a", "outputs": "b"}\nkaputt\n'


Command = Callable[..., Any]


# --- the script itself


def test_the_script_says_its_version_and_its_commands(script: Command, tmp_path: Path) -> None:
    assert script("--version", folder=tmp_path).out.startswith("dropforge 0.")
    helped = script("--help", folder=tmp_path).out
    listed = [line.split()[0] for line in helped.partition("Commands:\n")[2].splitlines() if line.startswith("  ")]
    assert set(listed) >= set(COMMANDS)
    assert script(folder=tmp_path).out == helped


@pytest.mark.parametrize(
    "arguments", [("--help",), ("status", "--json"), ("runs",), ("show", "1"), ("history",), ("check", "good.jsonl")]
)
def test_a_question_needs_neither_training_stack_nor_tables(lived_in: Any, arguments: tuple[str, ...]) -> None:
    (lived_in.folder / "good.jsonl").write_text(GOOD)
    code = f"import sys; sys.argv[1:] = {list(arguments)!r}; from daemon.cli import main; main(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=lived_in.folder, capture_output=True, text=True, check=True)
    daemons = {"jinja2", "sqlalchemy", "sqlmodel", "structlog", "apscheduler", "watchdog", "jsonschema"}
    assert set(done.stdout.split("\n")[-2].split()) & (STACK | daemons) == set()


def test_the_shell_completes_commands(lived_in: Any, script: Command) -> None:
    asked = {"_DROPFORGE_COMPLETE": "complete_bash", "COMP_WORDS": "dropforge c", "COMP_CWORD": "1"}
    completed = script(folder=lived_in.folder, environment=asked).out.split()
    assert {"champion", "check", "cancel"} <= set(completed)


def test_a_reader_that_has_gone_is_no_error(lived_in: Any) -> None:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = subprocess.Popen(
        [SCRIPT, "show", "1", "--json"],
        cwd=lived_in.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=buffered,
    )
    assert command.stdout is not None
    assert command.stderr is not None
    command.stdout.close()
    assert command.stderr.read() == ""
    assert command.wait() == 1
    command.stderr.close()


# --- errors


ERRORS: tuple[tuple[tuple[str, ...], int, str, str], ...] = (
    (("nonsense",), 2, "No such command 'nonsense'", "dropforge --help"),
    (("statsu",), 2, "Did you mean 'status'?", "dropforge --help"),
    (("show", "x"), 2, "Invalid value for 'RUN'", "dropforge show --help"),
    (("show", "9"), 1, "there is no run 9", "dropforge runs"),
    (("show", "9" * 30), 1, "no number here is that large", "dropforge runs"),
    (("drops", "restore", "9" * 30, "--reason", "x"), 1, "no number here is that large", "dropforge drops"),
    (("rollback", "--reason", " "), 2, "Invalid value for '--reason': it is blank", "dropforge rollback --help"),
    (("logs", "9"), 1, "there is no run 9", "dropforge runs"),
    (("retry", "1"), 1, "only a failed, cancelled or crashed run", "dropforge show 1"),
    (("wait", "99"), 1, "there is no run 99", "dropforge runs"),
    (("wait", "9" * 5000), 1, "no number here is that large", "dropforge runs"),
    (("wait", "none.jsonl"), 1, "there is no drop of a file none.jsonl", "dropforge drops"),
    (("pause", "--reason", " "), 2, "Invalid value for '--reason': it is blank", "dropforge pause --help"),
    (("pause", "suport", "--reason", "why"), 2, "there is no track 'suport'", "did you mean 'support'?"),
    (("train", "suport"), 2, "there is no track 'suport'", "did you mean 'support'?"),
    (("train", "support"), 1, "track support has no drop to train on", "dropforge drops"),
    (
        ("search",),
        2,
        "track default has nothing to search: [train.search.space] is empty",
        "as space = { learning_rate = [2e-4, 5e-4, 1e-3], rank = [8, 32] }",
    ),
    (("runs", "--track", "suport"), 2, "there is no track 'suport'", "did you mean 'support'?"),
    (("runs", "--state", "done"), 2, "'done' is not one of 'queued', ", "dropforge runs --help"),
    (("drops", "--state", "gone"), 2, "'gone' is not one of 'accepted', ", "dropforge drops --help"),
    (("drops", "restore", "2", "--reason", "x"), 1, "drop 2 is accepted", "dropforge drops"),
    (("champion", "--track", "support"), 1, "track support has no champion yet", "dropforge run"),
    (("--config", "none.toml", "status"), 2, "there is no settings file none.toml", "dropforge init"),
    (("rollback", "--to", "9", "--reason", "x"), 1, "no champion of generation 9", "dropforge history --track default"),
    (("rollback", "--to", "1", "--reason", "x"), 1, "generation 1 is the champion of track default already", "history"),
    (("promote", "9"), 1, "there is no run 9", "dropforge runs"),
    (("promote", "1", "--force"), 2, "--force needs --reason TEXT", "dropforge promote --help"),
    (("promote", "3"), 1, "run 3 is running: no win of it waits for approval", "dropforge promote 3 --force"),
    (("promote", "3", "--force", "--reason", "x"), 1, "run 3 is running", "dropforge cancel 3"),
    (("hook",), 1, "track default has no command to run after a change of champion", "set hooks.after_promotion"),
    (("export", "--gguf", "--to", "out"), 1, "export.gguf is not set", "docs/serving.md"),
    (("export", "nowhere", "--to", "out"), 2, "there is no track 'nowhere'", "declared tracks: default, support"),
    (("serve-hook", "http://127.0.0.1:8000"), 1, "serve-hook is run by the daemon", "hooks.after_promotion"),
    (("serve-hook", "ftp://here"), 1, "'ftp://here' is no address of a server", "unix:/run/vllm/vllm.sock"),
    (("serve-hook", "http://[::1"), 1, "is no address of a server", "write http://127.0.0.1:8000"),
    (("serve-hook", "unix:/none", "--restart", "a", "--adapter-name", "b"), 2, "choose one", "serve-hook --help"),
    (("report", "2"), 1, "run 2 has no verdict, so there is no report: it failed: out of ", "lower train.batch_size"),
    (("report", "3"), 1, "run 3 has no verdict, so there is no report", "dropforge show 3"),
    (("report", "1"), 1, "the report of run 1 is not there", "dropforge show 1"),
    (("attention", "--dismiss", "failed-9"), 1, "nothing that needs attention is called failed-9", "attention"),
    (("history", "--at", "yesterday"), 2, "'yesterday' is no time in ISO 8601", "dropforge history --help"),
    (("init", "dropforge.toml"), 1, "dropforge.toml: File exists", "see whether it is there"),
    (("check", "none.jsonl"), 65, "there is no file none.jsonl", ".jsonl"),
    (("init", "--base-model", "none"), 65, "there is no base model folder", "base_model"),
)


def test_an_error_has_its_code_its_words_and_a_remedy_and_changes_nothing(lived_in: Any, dropforge: Command) -> None:
    def content() -> object:
        return Overview.of(lived_in.settings).runs(), sorted(lived_in.folder.iterdir())

    before = content()
    for arguments, code, error, hint in ERRORS:
        ended = dropforge(*arguments)
        assert (ended.code, ended.out) == (code, ""), arguments
        first, second = ended.err.splitlines()
        assert (first.startswith("error: "), error in first) == (True, True), first
        assert (second.startswith("hint: "), hint in second) == (True, True), second
    assert content() == before


@pytest.mark.parametrize(("arguments", "code"), [(("show", "9"), 1), (("show", "x"), 2), (("status",), 2)])
def test_with_json_an_error_is_an_object_too(dropforge: Command, arguments: tuple[str, ...], code: int) -> None:
    if code == 1:
        dropforge("init")
    ended = dropforge(*arguments, "--json")
    error = ended.json["error"]
    assert (ended.code, error["code"]) == (code, code)
    assert f"error: {error['message']}\nhint: {error['hint']}\n" == ended.err


#: What a terminal reorders, hides or obeys: bidi controls, zero widths, tags, separators, DEL, C0 and C1 controls.
UNSEEN = "\u202e\u202a\u2066\u2069\u061c\u200b\u200d\u2060\ufeff\u00ad\u180e\U000e0041\u2028\u2029\x7f\x85\x9b\x1b\t"


@pytest.mark.parametrize("option", [(), ("--json",)])
def test_nothing_that_reorders_or_hides_reaches_a_terminal(
    dropforge: Command, tmp_path: Path, option: tuple[str, ...]
) -> None:
    name = f"übung-日本{UNSEEN}\udce9.jsonl"  # the last one is half a character
    (tmp_path / name).write_text(json.dumps({"instruction": "x", "output": "y", f"ключ{UNSEEN}": 1}) + "\n")
    for words in (("check", name), ("check", f"no{name}")):
        ended = dropforge(*words, *option)
        assert not set(UNSEEN) & set(ended.out + ended.err)
        assert "übung-日本" in ended.out + ended.err, "what people read stays as it is"
    assert not option or dropforge("check", name, *option).json["file"] == name


def test_a_traceback_comes_only_when_asked_for(dropforge: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dropforge("status").code == 2
    monkeypatch.setenv("DROPFORGE_DEBUG", "1")
    with pytest.raises(SettingsError):
        dropforge("status")


def test_a_command_outside_of_a_workspace_makes_nothing(dropforge: Command, tmp_path: Path) -> None:
    for command in ("status", "drops", "runs", "history", "run", "worker"):
        ended = dropforge(command)
        assert ended.code == 2
        assert "there is no workspace" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_the_services_workspace_is_looked_at_where_no_other_one_is(dropforge: Command, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "dropforge.toml").write_text(f'inbox = "{tmp_path}/in"\nstate = "{tmp_path}/kept"\n')
    assert f"inbox: {tmp_path}/in\nstate: {tmp_path}/kept\n" in dropforge("status").out
    dropforge("init", ".")
    assert f"inbox: {tmp_path}/inbox\n" in dropforge("status").out


def test_status_names_the_next_night_of_each_track_that_has_one(dropforge: Command, tmp_path: Path) -> None:
    (tmp_path / "dropforge.toml").write_text(
        'trigger = "nightly"\nschedule = "30 2 1 1 *"\ntimezone = "Asia/Tokyo"\n'
        '[tracks.a]\ntrigger = "drop"\n[tracks.b]\nschedule = "0 0 30 2 *"\n'
    )
    year = datetime.now(ZoneInfo("Asia/Tokyo")).year + 1
    night = datetime(year, 1, 1, 2, 30, tzinfo=ZoneInfo("Asia/Tokyo"))
    lines = [line for line in dropforge("status").out.splitlines() if line.startswith("the next night")]
    assert len(lines) == 1
    assert lines[0].startswith("the next night of track default begins in ")
    assert lines[0].endswith(f", at {night.astimezone():%Y-%m-%d %H:%M}")
    nights = {one["name"]: one["next_night"] for one in dropforge("status", "--json").json["tracks"]}
    assert nights == {"default": night.astimezone(UTC).isoformat(), "a": None, "b": None}


# --- init, check, submit


def test_init_makes_a_workspace_that_can_be_read_and_changes_nothing_the_second_time(
    dropforge: Command, tmp_path: Path
) -> None:
    assert dropforge("init", "box").code == 0
    box = tmp_path / "box"
    assert {path.name for path in box.iterdir()} == {"dropforge.toml", "inbox", ".dropforge"}
    assert (box / "inbox" / "heldout").is_dir()
    assert (box / ".dropforge").stat().st_mode & 0o077 == 0
    (box / "dropforge.toml").write_text("run_after_quiet_seconds = 5\n[tracks.support]\n")
    ended = dropforge("init", "box")
    assert "is there already and stays as it is" in ended.out
    assert (box / "dropforge.toml").read_text() == "run_after_quiet_seconds = 5\n[tracks.support]\n"
    assert (box / "inbox" / "support" / "heldout").is_dir()


def test_init_names_the_base_model_and_refuses_one_that_it_would_not_write(dropforge: Command, tmp_path: Path) -> None:
    base = tmp_path / 'a "model"'
    write_model(base, b"weights")
    assert "name the base model in dropforge.toml" in dropforge("init").out
    ended = dropforge("init", "--base-model", base)
    assert (ended.code, "names another base model" in ended.err) == (2, True)
    (tmp_path / "shop").mkdir()
    ended = dropforge("init", "shop", "--base-model", f"{tmp_path}/shop/../{base.name}")
    assert (ended.code, "name the base model" in ended.out) == (0, False)
    assert load(tmp_path / "shop" / "dropforge.toml", {}).base_model == str(base)
    assert dropforge("init", "shop", "--base-model", base).code == 0


def test_check_tells_line_and_remedy_and_ends_with_65(dropforge: Command, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(BAD)
    ended = dropforge("check", "bad.jsonl")
    assert ended.code == 65
    assert 'bad.jsonl:2: output is missing, but there is "outputs"; did you mean "output"?' in ended.out
    assert "bad.jsonl:3: not JSON" in ended.out
    assert "3 rows = 1 record + 2 bad rows; it would be rejected" in ended.out
    found = dropforge("check", "bad.jsonl", "--json").json
    assert (found["ok"], found["rows"], [finding["line"] for finding in found["findings"]]) == (False, 3, [2, 3])
    (tmp_path / "good.jsonl").write_text(GOOD)
    assert dropforge("check", "good.jsonl").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "good.jsonl"]


def test_check_tells_of_a_question_that_is_not_read(dropforge: Command, tmp_path: Path) -> None:
    rows = [{"instruction": "Classify", "text": f"case {number}", "output": "yes"} for number in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    ended = dropforge("check", "a.jsonl")
    assert ended.code == 65
    assert ended.out.startswith('a.jsonl:1: 60 rows have only 1 prompt without the key "text", which is not read; ren')
    assert "a.jsonl: 60 rows = 60 records; it would be rejected\n" in ended.out


def test_check_tells_what_a_run_would_leave_out(dropforge: Command, tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "dropforge.toml").write_text(f'base_model = "{tiny_llama}"\n[train]\nmax_length = 256\n')
    rows = [{"instruction": f"Say {number}", "output": "word " * (999 if number < 40 else 1)} for number in range(100)]
    pairs = [" ".join(f"word{pair}{place}" for place in range(20)) for pair in range(50)]
    rows += [{"instruction": f"{pair} {end}", "output": "a"} for pair in pairs for end in ("one", "two")]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in [*rows, rows[-1]]))
    said = dropforge("check", "a.jsonl").out.splitlines()
    assert said[0].startswith("a.jsonl:201: warning: the same prompt and answer as in an earlier row: each pair is")
    assert said[1].startswith(
        "a.jsonl: warning: a run on this file alone would leave out about 40 records longer than the window, "
    )
    assert "near-duplicates of held-out records" in said[1]
    assert said[3].startswith("a.jsonl: warning: with this file, track default has 201 rows, and a verdict by exact_")
    assert said[2].startswith(
        "a.jsonl: warning: about 40 of 201 records are longer than 256 tokens and left out whole: "
    )
    assert said[-2:] == [
        "a.jsonl: 201 rows = 200 records + 1 duplicate; it would be accepted",
        "next: dropforge submit a.jsonl",
    ]
    found = dropforge("check", "a.jsonl", "--json").json["foreseen"]
    assert [f"a.jsonl: warning: {words}" for words in found] == said[1:-2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "dropforge.toml"]


def test_check_leaves_nothing_where_it_is_stopped(tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {number}", "output": "a"} for number in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch)}
    command = subprocess.Popen([SCRIPT, "check", "a.jsonl"], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    while not list(scratch.glob("dropforge-check-*/prepare/spec.json")):
        assert command.poll() is None
    command.terminate()
    assert (command.wait(), list(scratch.glob("dropforge-check-*"))) == (143, [])


def test_check_tells_a_kind_of_fault_once_and_the_rare_ones_first(dropforge: Command, tmp_path: Path) -> None:
    rows = [json.dumps({"instruction": f"What is {place}?", "out": "x"}) for place in range(246)]
    rows[100], rows[200] = '{"instruction": "x", ', "[1]"
    (tmp_path / "mixed.jsonl").write_text("\n".join(rows))
    lines = dropforge("check", "mixed.jsonl").out.splitlines()
    assert [line.split(": ")[0] for line in lines[:3]] == ["mixed.jsonl:101", "mixed.jsonl:201", "mixed.jsonl:1"]
    assert "output is missing (in 244 rows, first here); " in lines[2]
    assert lines[3].startswith("mixed.jsonl: 246 rows = 0 records + 246 bad rows; ")
    kinds = [json.dumps({"instruction": "x", "output": place}) for place in range(50)]
    (tmp_path / "bad.jsonl").write_text("\n".join(kinds))
    ended = dropforge("check", "bad.jsonl")
    assert ended.out.count("output is a number") == 20
    assert "... and 30 more; all of them: dropforge check --json bad.jsonl" in ended.out


def test_check_accounts_for_the_answers_of_conversations_and_names_a_bad_turn(
    dropforge: Command, tmp_path: Path
) -> None:
    said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    rows = [{"conversations": said * 3, "score": 1}, {"conversations": [*said, *said[:1]]}]
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    ended = dropforge("check", "chat.json")
    remedy = "end with the answer that the model should give, or leave the turn out"
    assert ended.out.splitlines() == [
        f"chat.json:1, turn 3: the last turn is not the assistant's; {remedy}",
        "chat.json:1: warning: ignored: score (1 row)",
        "chat.json: 2 rows and 2 further answers = 3 records + 1 bad row; it would be rejected",
    ]
    (tmp_path / "chat.json").write_text(json.dumps(rows[:1]))
    accepted = "1 row and 2 further answers = 3 records; it would be accepted\nnext: dropforge submit chat.json\n"
    assert dropforge("check", "chat.json").out.endswith(accepted)
    assert dropforge("check", "chat.json", "--json").json["answers"] == 3


def test_check_shows_the_first_records_as_the_model_sees_them(
    dropforge: Command, tmp_path: Path, tiny_llama: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(f"{GOOD}{{}}\n" + GOOD.replace('"output": "', '"output": "' + "word " * 1500))
    ended = dropforge("check", "a.jsonl", "--show", "2")
    assert (ended.code, "no base model is set" in ended.err, "set base_model" in ended.err) == (1, True, True)
    (tmp_path / "dropforge.toml").write_text(f'base_model = "{tiny_llama}"\n[train]\nmax_length = 256\n')
    ended = dropforge("check", "a.jsonl", "--show", "2")
    good = json.loads(GOOD)
    template = load_template(tiny_llama, "auto")
    turns = single_turn(fold(good["instruction"], ""), good["output"])
    prompt, target = template.prompt(turns[:-1]), template.target(turns)
    texts = [template.tokenizer.decode(part, skip_special_tokens=False) for part in (prompt, target)]
    head = f"a.jsonl:1: {len(prompt) + len(target)} tokens, of which the last {len(target)} are learned"
    assert ended.out.startswith(f"{head}, from ⟦ to ⟧:\n{texts[0]}⟦{texts[1]}⟧\n\na.jsonl:3: ")
    assert texts[1].endswith("<|im_end|>")
    assert "learned; it is longer than the window of 256 tokens and left out, from ⟦ to ⟧:\n" in ended.out
    assert " […] " in ended.out
    shown = dropforge("check", "a.jsonl", "--show", "1", "--json").json["shown"]
    assert [(record["line"], record["prompt"], record["learned"]) for record in shown] == [(1, *texts)]
    assert dropforge("check", "a.jsonl", "--json").json["shown"] == []
    (tmp_path / "dropforge.toml").write_text(f'base_model = "{tiny_llama}"\n[train]\nmax_length = 32768\n')
    assert "longer than the window of 1,024 tokens" in dropforge("check", "a.jsonl", "--show", "2").out


def test_check_shows_the_earlier_turns_of_a_record_and_its_last_answer_as_learned(
    dropforge: Command, tmp_path: Path, tiny_llama: Path
) -> None:
    said = [{"role": role, "content": text} for role, text in (("user", "One?"), ("assistant", "1"))]
    later = [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": said + later}))
    (tmp_path / "dropforge.toml").write_text(f'base_model = "{tiny_llama}"\n')
    first, second = dropforge("check", "a.jsonl", "--show", "2", "--json").json["shown"]
    assert (first["learned"], second["learned"]) == ("1<|im_end|>", "2<|im_end|>")
    whole = load_template(tiny_llama, "auto").tokenizer.apply_chat_template(said + later[:1], tokenize=False)
    assert second["prompt"].startswith(whole)


def test_check_tells_what_the_settings_make_of_bad_rows(dropforge: Command, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(BAD)
    settings = tmp_path / "dropforge.toml"
    settings.write_text('[intake]\non_bad_rows = "quarantine"\nmax_bad_percent = 70\n')
    ended = dropforge("check", "bad.jsonl")
    assert (ended.code, "3 rows = 1 record + 2 bad rows; it would be accepted without them" in ended.out) == (0, True)
    found = dropforge("check", "bad.jsonl", "--json").json
    assert (found["ok"], found["accepted"], found["findings_total"]) == (False, True, 2)
    assert dropforge("init").code == 0
    assert "2 of them are bad and will be set aside" in dropforge("submit", "bad.jsonl").out
    settings.write_text('[intake]\non_bad_rows = "quarantine"\nmax_bad_percent = 50\n')
    ended = dropforge("check", "bad.jsonl")
    assert ended.code == 65
    assert "it would be rejected: intake.max_bad_percent allows 50 %, these are 66.7 %" in ended.out


def test_check_knows_the_special_tokens_of_the_configured_base(dropforge: Command, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "a.jsonl").write_text('{"instruction": "a", "output": "b</s>"}\n')
    assert dropforge("check", "a.jsonl").code == 0
    (tmp_path / "dropforge.toml").write_text('base_model = "base"\n')
    ended = dropforge("check", "a.jsonl")
    assert ended.code == 65
    assert "a.jsonl:1: output holds </s>, a special token" in ended.out


def test_submit_copies_the_file_whole_and_replaces_nothing(dropforge: Command, tmp_path: Path) -> None:
    dropforge("init")
    (tmp_path / "good.jsonl").write_text(GOOD)
    ended = dropforge("submit", "good.jsonl")
    assert ended.code == 0
    assert "copied 1 row to " in ended.out
    assert "next:\n  dropforge status\n  dropforge wait good.jsonl\n" in ended.out
    assert "the daemon is not running" in ended.out
    assert (tmp_path / "inbox" / "good.jsonl").read_text() == GOOD
    (tmp_path / "good.jsonl").write_text(GOOD * 2)
    again = dropforge("submit", "good.jsonl")
    assert (again.code, "is there already" in again.err) == (1, True)
    assert (tmp_path / "inbox" / "good.jsonl").read_text() == GOOD
    assert dropforge("submit", "good.jsonl", "--heldout").code == 0
    assert (tmp_path / "inbox" / "heldout" / "good.jsonl").read_text() == GOOD * 2
    assert not list(tmp_path.rglob(".*.part"))


def test_submit_refuses_a_bad_file_and_a_name_that_would_never_be_taken(dropforge: Command, tmp_path: Path) -> None:
    dropforge("init")
    for name, text in (("bad.jsonl", BAD), (".hidden.jsonl", GOOD), ("rows.csv", GOOD)):
        (tmp_path / name).write_text(text)
        ended = dropforge("submit", name)
        assert ended.code in {1, 65}, name
        assert "hint: " in ended.err
    assert [path for path in (tmp_path / "inbox").rglob("*") if path.is_file()] == []


def test_status_says_what_a_track_without_a_champion_lacks(dropforge: Command, tmp_path: Path) -> None:
    assert dropforge("init").code == 0
    assert "none: set base_model in dropforge.toml" in dropforge("status").out
    settings = tmp_path / "dropforge.toml"
    assert settings.exists()
    settings.write_text('base_model = "models/not-there"\n')
    assert f"none: there is no folder {tmp_path / 'models' / 'not-there'}" in dropforge("status").out
