import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import BaseModel, SecretStr

from daemon.settings.load import load
from daemon.settings.model import Settings, SettingsError, TrackSettings
from daemon.system.programs import name_of
from pipeline.config import RunConfig, TrainConfig
from tests.schemas import field_docs

ROOT = Path(__file__).parents[3]
SAMPLE = (ROOT / "systemd" / "dropforge.toml").read_text(encoding="utf-8")
SCHEMA = json.loads((ROOT / "schemas" / "settings.schema.json").read_text(encoding="utf-8"))
#: What `load` makes absolute.
PATHS = ("inbox", "state", "base_model")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "dropforge.toml"


def refused(file: Path, text: str, environment: dict[str, str] | None = None) -> SettingsError:
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError) as caught:
        load(file, environment or {})
    return caught.value


def without_paths(settings: Settings) -> dict[str, Any]:
    """Return what does not depend on where the settings lie and whose they are."""
    return settings.model_dump(exclude={**dict.fromkeys(PATHS, True), "gate": {"pinned_by"}})


@pytest.mark.parametrize(
    ("text", "who"), [("", True), ("[gate]\npinned_by = []\n", True), ('gate.pinned_by = ["12"]', False)]
)
def test_pinned_files_are_those_of_the_owner_of_the_settings_unless_others_are_named(
    file: Path, text: str, who: bool
) -> None:
    file.write_text(text)
    if os.geteuid() == 0:
        os.chown(file, 12345, -1)  # of another user than who reads them
    owner = name_of(file.stat().st_uid)
    settings = load(file, {})
    assert settings.gate.pinned_by == settings.track("default").gate.pinned_by == ((owner,) if who else ("12",))


def leaves(model: BaseModel, place: str = "") -> dict[str, tuple[object, str]]:
    """Return value and docstring of every setting by its dotted name."""
    found: dict[str, tuple[object, str]] = {}
    docs = field_docs(type(model))
    for name in type(model).model_fields:
        value, shown = getattr(model, name), type(model).model_fields[name].alias or name
        if isinstance(value, BaseModel):
            found |= leaves(value, f"{place}{shown}.")
        elif name != "tracks":
            # TOML has lists alone, and no secrets.
            plain = value.get_secret_value() if isinstance(value, SecretStr) else value
            found[place + shown] = (list(plain) if isinstance(plain, tuple) else plain, docs.get(name, ""))
    return found


def sample_entries() -> dict[str, tuple[object, str]]:
    """Return the value and the comment above it of every setting that the sample shows before its example track."""
    found: dict[str, tuple[object, str]] = {}
    section = ""
    comment: list[str] = []
    for line in SAMPLE.partition("#[tracks.")[0].splitlines()[1:]:
        if header := re.fullmatch(r"\[([\w.]+)\]", line):
            section = f"{header[1]}."
        elif entry := re.fullmatch(r"#?(\w+ = .*)", line):
            ((name, value),) = tomllib.loads(entry[1]).items()
            found[section + name] = (value, " ".join(comment))
        comment = [*comment, line.removeprefix("# ")] if line.startswith("# ") else []
    return found


def uncommented() -> str:
    return re.sub(r"^#(?=[\w\[])", "", SAMPLE, flags=re.MULTILINE)


def test_without_a_file_the_defaults_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load(None, {})
    assert without_paths(settings) == without_paths(Settings())
    assert settings.inbox_folder == tmp_path / "inbox"
    assert settings.state_folder == tmp_path / ".dropforge"


def test_paths_are_relative_to_the_file(file: Path) -> None:
    file.write_text('base_model = "models/base"\n[tracks.a]\nbase_model = "/srv/base"\n[tracks.b]\n', encoding="utf-8")
    settings = load(file, {})
    assert settings.base_model == str(file.parent / "models/base")
    assert settings.track("a").base_model == "/srv/base"
    assert settings.track("b").base_model == settings.base_model


def test_suites_of_ones_own_are_relative_to_the_file_and_names_stay(file: Path) -> None:
    file.write_text(
        '[evaluate]\ngeneral = ["builtin", "own.jsonl", "own.txt"]\n'
        '[tracks.a.evaluate]\ngeneral = ["sets/mine.jsonl"]\n[tracks.b.evaluate]\nbatch_size = 2\n',
        encoding="utf-8",
    )
    settings = load(file, {})
    own = tuple(f"{file.parent}/{name}" for name in ("own.jsonl", "own.txt"))
    expected = ("builtin", *own)
    assert settings.evaluate.general == expected
    assert settings.track("a").evaluate.general == (f"{file.parent}/sets/mine.jsonl",)
    assert settings.track("b").evaluate.general == expected
    assert settings.evaluate.batch_size == 0
    for wrong in ("5", '"own.jsonl"'):
        refused(file, f"[tracks.a.evaluate]\ngeneral = {wrong}\n")
    refused(file, "[tracks.a]\nevaluate = 5\n")


def test_the_environment_names_the_file_and_overrides_it(file: Path) -> None:
    file.write_text("[train]\nrank = 8\nepochs = 2\n[tracks.a.train]\nrank = 4\n", encoding="utf-8")
    environment = {
        "DROPFORGE_CONFIG": str(file),
        "DROPFORGE_TRAIN__RANK": "32",
        "DROPFORGE_TRACKS__A__TRAIN__EPOCHS": "3",
        "DROPFORGE_INBOX": "/srv/inbox",
        "OTHER": "1",
    }
    settings = load(None, environment)
    assert (settings.train.rank, settings.train.epochs) == (32, 2)
    assert (settings.track("a").train.rank, settings.track("a").train.epochs) == (4, 3)
    assert settings.inbox == "/srv/inbox"


def test_a_track_can_have_a_preset_of_its_own(file: Path) -> None:
    file.write_text(
        '[train]\npreset = "quality"\nrank = 8\n'
        '[tracks.a.train]\npreset = "balanced"\nseed = 3\n[tracks.b.train]\nseed = 3\n',
        encoding="utf-8",
    )
    settings = load(file, {})
    own, other = settings.track("a").train, settings.track("b").train
    assert own == TrainConfig(preset="balanced", rank=8, seed=3)
    assert other == TrainConfig(preset="quality", rank=8, seed=3)


@pytest.mark.parametrize("method", ["galore", "full"])
def test_a_method_of_the_bases_own_weights_has_no_quantisation(file: Path, method: str) -> None:
    train = TrainConfig.model_validate({"method": method, "quantization": "auto"})
    assert train.quantization == "none"
    assert TrainConfig.model_validate_json(train.model_dump_json()) == train, "as a run's snapshot is read"
    RunConfig(track="default", base_model="b", base_model_id="b", salt="", train=train)
    assert train.quantization == "none", "whatever holds it validates it again"
    for written in ("", 'quantization = "auto"\n'):
        text = f'[train]\nmethod = "{method}"\n{written}[tracks.a.train]\nmethod = "dora"\n'
        file.write_text(text, encoding="utf-8")
        settings = load(file, {})
        assert settings.train.quantization == "none"
        assert settings.track("a").train.quantization == "auto", "a method's choice is not inherited"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('quantization = "nf4"', 'train.quantization = "nf4"'),
        ("rslora = true", "train.rslora"),
        ("dropout = 0.1", "train.dropout"),
        ('targets = ["mlp"]', "train.targets"),
    ],
)
def test_what_adapters_alone_have_is_refused_with_another_method(file: Path, line: str, named: str) -> None:
    error = refused(file, f'[train]\nmethod = "full"\n{line}\n')
    assert f'train.method = "full" trains weights of the 16-bit base itself and takes no {named}: ' in error.message
    assert 'leave that out, or set train.method = "lora"' in error.message
    load(file, {"DROPFORGE_TRAIN__METHOD": "lora"})


@pytest.mark.parametrize(
    ("text", "environment", "setting", "near"),
    [
        ('inbx = "x"', {}, "'inbx'", "'inbox'"),
        ("[train]\nepoch = 1", {}, "'train.epoch'", "'train.epochs'"),
        ("[tracks.a.gate]\nmin_gian = 1", {}, "'tracks.a.gate.min_gian'", "'tracks.a.gate.min_gain'"),
        ("", {"DROPFORGE_TRAIN__LERNING_RATE": "1"}, "'train.lerning_rate'", "'train.learning_rate'"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(
    file: Path, text: str, environment: dict[str, str], setting: str, near: str
) -> None:
    error = refused(file, text, environment)
    source = next(iter(environment), str(file))
    assert error.message == f"{source}: unknown setting {setting}"
    assert error.hint == f"did you mean {near}?"
    assert error.exit_code == 2


def test_an_unknown_key_that_is_like_nothing_lists_what_is_known(file: Path) -> None:
    assert "known here: limit, backoff_seconds" in refused(file, "[retry]\nzzzzzz = 1").hint


@pytest.mark.parametrize(
    ("text", "field", "problem"),
    [
        ("[train]\nepochs = -1", "train.epochs", "greater than or equal to 0.001"),
        ("[train]\nlearning_rate = 'fast'", "train.learning_rate", "valid number"),
        ("train = 5", "train", "valid dictionary"),
        ("[tracks.a.train]\nrank = 0", "tracks.a.train.rank", "greater than or equal to 1"),
        ('device = "tpu"', "device", "'auto', 'cpu' or 'cuda'"),
        ('timezone = "Mars/Base"', "timezone", "no such time zone: 'Mars/Base'"),
        ('timezone = "Europe"', "timezone", "no such time zone: 'Europe'"),
        ('[tracks.a]\nschedule = "each night"', "tracks.a.schedule", "not a cron expression"),
        ('schedule = "0 2 * * 1-5"', "schedule", "by their names, as mon-fri"),
        ("[guards.floors]\nexact_mach = 50", "guards.floors.exact_mach", "'exact_match', 'token_f1'"),
        ("[guards.floors]\nexact_match = nan", "guards.floors.exact_match", "less than or equal to 100"),
        ('[hooks]\nhealth = ["", "x"]', "hooks.health", "must begin with the name or path of a program"),
        ('[hooks]\nafter_promotion = ["a\\u0000b"]', "hooks.after_promotion", "must begin with the name or path"),
        ('[hooks]\nhealth = "true"', "hooks.health", 'should be a list, as ["one", "two"]'),
    ],
)
def test_a_wrong_value_names_file_and_field(file: Path, text: str, field: str, problem: str) -> None:
    error = refused(file, text)
    assert error.message.startswith(f"{file}: {field}: ")
    assert problem in error.message
    assert error.hint.startswith("found ")


ADAPTERS = '[hooks]\nafter_promotion = ["dropforge", "serve-hook", "http://h", "--adapter-name", "f"]\n'


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("[split]\nheldout = 0.6\ndev = 0.5", "split: ", "nothing is left to train on"),
        ("[split]\nscored_records = 99", "", "split.scored_records = 99 and gate.min_records = 100; raise"),
        ('[split]\nscored_records = 150\n[evaluate]\nmetric = "chrf"', "", "twice gate.min_records = 100"),
        ("[tracks.a.split]\nscored_records = 99", "tracks.a: ", "no verdict would ever be possible"),
        ('[tracks.a]\nsplit.heldout = 0\ngate.on = "seen"', "tracks.a: ", 'holds nothing out, and gate.on = "seen"'),
        (f'{ADAPTERS}[tracks.a.train]\nstart = "champion"', "tracks.a: ", "has none over the base"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(file: Path, text: str, place: str, problem: str) -> None:
    error = refused(file, text)
    assert error.message.startswith(f"{file}: {place}")
    assert problem in error.message
    assert error.hint == "the commented sample is systemd/dropforge.toml"


def test_a_verdict_that_is_possible_with_some_metric_is_not_refused(file: Path) -> None:
    file.write_text('[split]\nscored_records = 150\n[gate]\napproval = "manual"\nreview = 20', encoding="utf-8")
    assert load(file, {}).gate.review == 20


def test_no_share_is_held_out_where_pinned_records_judge(file: Path) -> None:
    file.write_text('[tracks.a]\nsplit.heldout = 0\ngate.on = "pinned"', encoding="utf-8")
    assert load(file, {}).track("a").split.heldout == 0


def test_variables_that_contradict_each_other_are_refused(file: Path) -> None:
    error = refused(file, "", {"DROPFORGE_TRAIN": "5", "DROPFORGE_TRAIN__RANK": "3"})
    assert error.message == "DROPFORGE_TRAIN__RANK: 'train' is set by another variable already"


@pytest.mark.parametrize(
    "text", ["tracks = 5", "[tracks]\na = 5", "[tracks.done]", '[tracks."a b"]', "[tracks.heldout]", "[tracks.-a]"]
)
def test_what_cannot_be_a_track_is_refused(file: Path, text: str) -> None:
    assert refused(file, text).message.startswith(f"{file}: ")


def test_what_is_not_toml_is_refused_with_its_line(file: Path) -> None:
    assert "line 2" in refused(file, 'inbox = "x"\nstate = \ndevice = "cpu"\n').message


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as folder:
        load(tmp_path, {})
    assert folder.value.message.startswith(f"cannot read the settings file {tmp_path}: ")


def test_the_sample_shows_every_setting_with_its_default_and_its_docstring() -> None:
    assert SAMPLE.startswith("#:schema ../schemas/settings.schema.json\n")
    service = Settings(inbox="/srv/dropforge/inbox", state="/var/lib/dropforge")
    assert sample_entries() == leaves(service)
    unit = (ROOT / "systemd" / "dropforge.service").read_text(encoding="utf-8")
    assert f"\nRequiresMountsFor={service.inbox} {service.state}\n" in unit


def test_the_sample_uncommented_gives_the_defaults_and_its_example_track(file: Path) -> None:
    file.write_text(uncommented(), encoding="utf-8")
    settings = load(file, {})
    assert settings.track_names == ("default", "support")
    assert without_paths(settings.model_copy(update={"tracks": {}})) == without_paths(Settings())


def test_the_schema_accepts_the_sample_and_every_default() -> None:
    jsonschema.validate(tomllib.loads(SAMPLE), SCHEMA)
    jsonschema.validate(tomllib.loads(uncommented()), SCHEMA)
    jsonschema.validate(Settings().model_dump(mode="json"), SCHEMA)


def test_every_setting_says_what_it_is() -> None:
    silent = [name for name, (_, docstring) in leaves(Settings()).items() if not docstring]
    assert silent == []
    assert set(TrackSettings.model_fields) < set(Settings.model_fields)


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000/v1",
        "https:///v1",
        "http://user:sk-secret@host/v1",
        "https://host/v1?key=sk-secret",
        "http://host:0/v1",
        "http://[::1/v1",
        "http://host/v1\\n",
    ],
)
def test_a_judge_at_no_usable_address_is_refused_without_repeating_it(file: Path, url: str) -> None:
    error = refused(file, f'[judge]\nurl = "{url}"\nmodel = "m"')
    assert error.message.startswith(f"{file}: judge.url: must be the http:// or https:// address")
    assert "sk-secret" not in error.message + error.hint


@pytest.mark.parametrize("name", ["sk-abc.secret", "two words", "1KEY", "DROPFORGE_KEY", "KEY\\n", "KEY=x"])
def test_a_key_that_stands_where_its_variables_name_should_is_refused_and_not_repeated(file: Path, name: str) -> None:
    error = refused(file, f'[judge]\napi_key_env = "{name}"')
    assert "not the key itself" in error.message
    assert name not in error.message + error.hint


def test_a_track_may_do_without_the_judge_of_the_others(file: Path) -> None:
    file.write_text('[judge]\nurl = "http://h/v1"\nmodel = "m"\n[tracks.a.judge]\nurl = ""', encoding="utf-8")
    settings = load(file, {})
    assert (settings.track("default").judge.url, settings.track("a").judge.url) == ("http://h/v1", "")
    assert "tracks.a.judge.url" in refused(file, '[tracks.a.judge]\nurl = "x"\nmodel = "m"').message


@pytest.mark.parametrize(("kind", "parallel", "here"), [("slurm", 200, 4), ("slurm", 2, 2), ("local", 8, 8)])
def test_beside_a_cluster_few_steps_run_on_this_machine(kind: str, parallel: int, here: int) -> None:
    executor = Settings.model_validate({"executor": {"kind": kind, "parallel": parallel, "shared": "/s"}}).executor
    assert executor.parallel_here == here
