"""What somebody else put into the spool of the real `dropforge worker`: it is set aside, and an honest order runs."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemon.dispatch.executor import JobState
from daemon.dispatch.spool import LocalExecutor, Spool
from pipeline import durable
from pipeline.artifacts import ModelRef
from pipeline.config import RunConfig
from pipeline.contract import RESULT_NAME, SPEC_NAME, StepSpec

EXPECTED = "aside: True, lines: 1, ran: False, honest step: failed"
NO_MARKS = ["a named pipe", "a folder", "a link to nowhere", "a link to a device"]
#: A step that finds nothing to work on ends at once, and leaves a result.
STEP = "decide"


def spec_of(root: Path, run: int, folder: str | None = None) -> StepSpec:
    """Return a spec that names a program of its own, which nobody may start."""
    return StepSpec(
        run=run, step=STEP, attempt=1, fence=f"fence-{run}", root=str(root),
        folder=folder or f"runs/{run}/attempts/{STEP}-1", checkpoints="checkpoints", predictions="predictions",
        argv=("touch", str(root.parent / "pwned")), env={}, inputs={}, drops=(),
        champion=ModelRef(model_id="m", path="m", generation=0),
        config=RunConfig(track="default", base_model="m", base_model_id="m", salt="s"),
    )  # fmt: skip


def evil_spec(root: Path, run: int, folder: Path, said: str | None = None) -> None:
    """Write a spec in a folder of the attacker's that says of itself that it lies at `said`."""
    folder.mkdir(parents=True, exist_ok=True)
    durable.write_json(folder / SPEC_NAME, spec_of(root, run, said).model_dump(mode="json"))


def entry_of(run: int, folder: str | None = None, fence: str | None = None) -> str:
    """Return an entry as the daemon would have it, and a path, which none of its own names."""
    value = {"folder": folder or f"runs/{run}/attempts/{STEP}-1", "fence": fence or f"fence-{run}"}
    return json.dumps(value)


def a_path(root: Path, run: int, place: Path) -> None:
    evil_spec(root, run, root.parent / "evil", str(root.parent / "evil"))
    place.write_text(entry_of(run, str(root.parent / "evil")))


def a_link_to_a_folder(root: Path, run: int, place: Path) -> None:
    evil_spec(root, run, root.parent / "linked")
    (root / f"runs/{run}/attempts").mkdir(parents=True)
    (root / f"runs/{run}/attempts/{STEP}-1").symlink_to(root.parent / "linked")
    place.write_text(entry_of(run))


def a_link_to_a_spec(root: Path, run: int, place: Path) -> None:
    evil_spec(root, run, root.parent / "spec")
    home = root / f"runs/{run}/attempts/{STEP}-1"
    home.mkdir(parents=True)
    (home / SPEC_NAME).symlink_to(root.parent / "spec" / SPEC_NAME)
    place.write_text(entry_of(run))


def owned_by_another(what: str) -> Callable[[Path, int, Path], None]:
    def make(root: Path, run: int, place: Path) -> None:
        home = root / f"runs/{run}/attempts/{STEP}-1"
        home.mkdir(parents=True)
        durable.write_json(home / SPEC_NAME, spec_of(root, run).model_dump(mode="json"))
        place.write_text(entry_of(run))
        os.chown({"spec": home / SPEC_NAME, "folder": home, "entry": place}[what], 64201, 64201)

    return make


def another_fence(root: Path, run: int, place: Path) -> None:
    home = root / f"runs/{run}/attempts/{STEP}-1"
    home.mkdir(parents=True)
    durable.write_json(home / SPEC_NAME, spec_of(root, run).model_dump(mode="json"))
    place.write_text(entry_of(run, fence="guessed"))


def another_attempt(root: Path, run: int, place: Path) -> None:
    home = root / f"runs/{run}/attempts/{STEP}-1"
    home.mkdir(parents=True)
    durable.write_json(home / SPEC_NAME, spec_of(root, run + 1000).model_dump(mode="json"))
    place.write_text(entry_of(run, fence=f"fence-{run + 1000}"))


def another_root(root: Path, run: int, place: Path) -> None:
    home = root / f"runs/{run}/attempts/{STEP}-1"
    home.mkdir(parents=True)
    durable.write_json(home / SPEC_NAME, spec_of(root.parent, run).model_dump(mode="json"))
    place.write_text(entry_of(run))


def huge(_root: Path, _run: int, place: Path) -> None:
    with place.open("wb") as file:
        file.truncate(1 << 40)


def text(content: bytes) -> Callable[[Path, int, Path], object]:
    return lambda _root, _run, place: place.write_bytes(content)


FORGED: dict[str, Callable[[Path, int, Path], object]] = {
    "a path of the attacker's": a_path,
    "a link to the attacker's folder": a_link_to_a_folder,
    "a link to the attacker's spec": a_link_to_a_spec,
    "a spec that another user owns": owned_by_another("spec"),
    "a folder that another user owns": owned_by_another("folder"),
    "an entry that another user owns": owned_by_another("entry"),
    "a guessed fence": another_fence,
    "another attempt's spec": another_attempt,
    "another state folder's spec": another_root,
    "an attempt that nobody made": lambda _root, run, place: place.write_text(entry_of(run)),
    "an empty file": text(b""),
    "half a file": text(b'{"fence": "fen'),
    "bytes that are no text": text(b"\xff\xfe\x00"),
    "a list": text(b"[1]"),
    "four thousand brackets": text(b"[" * 4000),
    "a terabyte of nothing": huge,
    "a named pipe": lambda _root, _run, place: os.mkfifo(place),
    "a folder": lambda _root, _run, place: place.mkdir(),
    "a link to nowhere": lambda _root, _run, place: place.symlink_to("/nowhere"),
    "a link to a device": lambda _root, _run, place: place.symlink_to("/dev/zero"),
}
NAMES = ["x.json", "66-no_such_step-1.json", "-1-decide-1.json", "66-decide-01.json", "66-decide-1", "..json", ".x"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "state"
    made.mkdir(mode=0o700)
    return made


def wait_for(condition: Callable[[], object], worker: subprocess.Popen[bytes]) -> None:
    pause = threading.Event()
    while not condition():
        assert worker.poll() is None, "the worker died"
        pause.wait(0.02)


@pytest.fixture
def start(root: Path, tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Start the real worker as the daemon does."""
    begun = []

    def call() -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-P", "-m", "daemon", "worker", "--lifeline", "--state", str(root)]
        with (tmp_path / "worker.log").open("ab") as log:
            begun.append(subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=log, stderr=log))
        return begun[-1]

    yield call
    for worker in begun:
        worker.communicate(timeout=60)


def honest(root: Path, worker: subprocess.Popen[bytes], run: int = 7) -> str:
    """Order an honest attempt behind what is there; return how it ended."""
    executor, spec = LocalExecutor(root), spec_of(root, run)
    executor.submit(spec)
    wait_for(lambda: executor.poll(spec) is JobState.ENDED, worker)
    return str(durable.read_json(root / spec.folder / RESULT_NAME)["status"])


@pytest.mark.timeout(120)
@pytest.mark.parametrize("folder", ["queue", "running"])
def test_forged_orders_are_set_aside_each_with_a_line_and_an_honest_one_runs(
    root: Path, tmp_path: Path, start: Callable[[], subprocess.Popen[bytes]], folder: str,
    record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    spool = Spool(root)
    keys = {what: f"{number}-{STEP}-1" for number, what in enumerate(FORGED, 101)}
    for number, (what, forge) in enumerate(FORGED.items(), 101):
        forge(root, number, spool.folder / folder / f"{keys[what]}.json")
    ended = honest(root, start())
    told = (tmp_path / "worker.log").read_text()
    aside = [path.name for path in (spool.folder / "refused").iterdir()]
    found = []
    for what, key in keys.items():
        lines = sum("order_refused" in line and f"{folder}/{key}.json" in line for line in told.splitlines())
        ran = any(path.exists() for path in (tmp_path / "pwned", root / f"runs/{key[:3]}/attempts/{STEP}-1/log.txt"))
        gone = not os.path.lexists(spool.folder / folder / f"{key}.json")
        moved = sum(name.startswith(f"{key}.json.") for name in aside) == 1 and gone
        happened = f"aside: {moved}, lines: {lines}, ran: {ran}, honest step: {ended}"
        record_property("probe", [f"spool/{folder}: {what}", EXPECTED, happened])
        found.append((what, happened))
    assert found == [(what, EXPECTED) for what in FORGED]


@pytest.mark.timeout(120)
def test_names_that_are_no_attempts_are_set_aside_and_what_lies_in_cancel_stops_nothing(
    root: Path, tmp_path: Path, start: Callable[[], subprocess.Popen[bytes]],
    record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    spool = Spool(root)
    for name in NAMES:
        evil_spec(root, 66, root.parent / "evil", str(root.parent / "evil"))
        (spool.queue / name).write_text(entry_of(66, str(root.parent / "evil")))
    for number, what in enumerate(NO_MARKS, 7):
        FORGED[what](root, number, spool.cancelled / f"{number}-{STEP}-1")
    worker = start()
    ended = [honest(root, worker, number) for number in range(7, 7 + len(NO_MARKS))]
    left = {path.name for path in spool.queue.iterdir()}
    for name in NAMES:
        # A name that begins with a dot is being written: nobody looks at it.
        expected = f"left: {name.startswith('.')}, ran: False"
        happened = f"left: {name in left}, ran: {(tmp_path / 'pwned').exists()}"
        record_property("probe", [f"spool/queue/{name}", expected, happened])
        assert happened == expected
    for what, how in zip(NO_MARKS, ended, strict=True):
        record_property("probe", [f"spool/cancel: {what}", "the step runs: failed", f"the step runs: {how}"])
        assert how == "failed", "by itself, and not interrupted"


@pytest.mark.parametrize("what", NO_MARKS)
def test_a_cancel_is_heard_whatever_lies_at_its_place(
    root: Path, what: str, record_property: Callable[[str, object], None]
) -> None:
    spool, executor, spec = Spool(root), LocalExecutor(root), spec_of(root, 8)
    executor.submit(spec)
    (spool.queue / f"{spec.key}.json").rename(spool.running / f"{spec.key}.json")
    FORGED[what](root, 8, spool.cancelled / spec.key)
    executor.cancel(spec.key)
    record_property("probe", [f"cancel where there is {what}", "heard: True", f"heard: {spool.is_cancelled(spec.key)}"])
    assert spool.is_cancelled(spec.key)
