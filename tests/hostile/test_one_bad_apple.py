"""One track in trouble, of each kind: the files and runs of the others go through to their verdict."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.hostile.people import ALICE, BOB, DAEMON, GROUP, Box, rows
from tests.model_folder import write_model

Record = Callable[[str, object], None]
#: `bad` is the one in trouble; too few rows for a verdict on a model are one all the same, without any training.
SETTINGS = """
[tracks.bad]
base_model = "bad-base"
[tracks.bad.hooks]
after_promotion = ["sh", "-c", "test ! -e hangs || sleep 1000; exit 3"]
[tracks.good]
base_model = "good-base"
[tracks.better]
base_model = "good-base"
"""
OTHERS = ("good", "better")
#: Enough for a run that trains, which this base cannot.
MANY = 800
#: Too few for a verdict, and so many that a track's random salt never holds all of them out.
FEW = 40
#: Seconds for what loads the training stack on a busy machine.
LONG = 200.0


@dataclass
class House:
    """An installation with three tracks, whose runs begin at once."""

    box: Box

    def runs(self, track: str) -> list[dict[str, object]]:
        """Return the runs of a track, the newest first."""
        said = self.box.cli(DAEMON, "runs", "--json")
        found = json.loads(said.stdout)["runs"] if said.returncode == 0 else []
        return [run for run in found if run["track"] == track]

    def ends(self, track: str, state: str) -> bool:
        """Whether the newest run of a track has ended so."""
        return any(run["state"] == state for run in self.runs(track)[:1])

    def left(self) -> str:
        """Return why a file of the track in trouble is still in the inbox."""
        return " ".join(one["why"] for one in self.box.status()["inbox"]["left"] if one["name"].startswith("bad/"))

    def refusal(self) -> str:
        """Return what is said of a file of the track in trouble that was given back; empty if none was."""
        return "".join(path.read_text() for path in (self.box.inbox / "rejected").glob("bad/*/*.errors.json"))

    def error(self) -> str:
        """Return what is wrong with the newest run of the track in trouble."""
        return str(self.runs("bad")[0]["error"])

    def hook(self) -> str:
        """Return what is said of the hook of the track in trouble."""
        lines = self.box.cli(DAEMON, "status").stdout.splitlines()
        return " ".join(line for line in lines if line.startswith("track bad") and "hooks." in line)

    def reaches_a_verdict(self, track: str) -> None:
        """Raise unless a track's run ends with a verdict and its file is filed."""
        self.box.until(lambda: self.ends(track, "succeeded"), LONG)
        assert self.runs(track)[0]["outcome"] == "insufficient_evidence"
        assert self.box.is_filed(f"{track}.jsonl")


#: The least that the library takes for a tokenizer.
TOKENIZER = (
    '{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'
)


@pytest.fixture
def house(new_box: Callable[..., Box]) -> House:
    box = new_box(SETTINGS)
    settings = box.folder / "dropforge.toml"
    settings.write_text(settings.read_text().replace("run_after_quiet_seconds = 3600", "run_after_quiet_seconds = 0"))
    for name in ("bad-base", "good-base"):
        write_model(box.folder / name, b"weights")
        # The step that counts tokens is the real one.
        (box.folder / name / "tokenizer.json").write_text(TOKENIZER)
    return House(box)


def unreadable(house: House) -> None:
    done = house.box.shell(ALICE, "printf x > bad/.x && chmod 000 bad/.x && mv bad/.x bad/closed.jsonl")
    assert done.returncode == 0, done.stderr


def huge(house: House) -> None:
    house.box.sparse(ALICE, "bad/huge.jsonl", 8 << 40)


def base_that_hangs(house: House) -> None:
    config = house.box.folder / "bad-base" / "config.json"
    config.unlink()
    os.mkfifo(config)
    os.chown(config, DAEMON.number, GROUP)
    house.box.until(lambda: "config.json, which is not a regular file" in house.box.said())
    house.box.drop(ALICE, "drop.jsonl", rows("one", "two"), "bad")


def damaged_artifact(house: House) -> None:
    """Let a run fail where its model is loaded, damage what it has published, and try it again."""
    house.box.drop(ALICE, "drop.jsonl", rows(*map(str, range(MANY))), "bad")
    house.box.until(lambda: house.ends("bad", "failed"), LONG)
    assert "the tokenizer in" in house.error()
    run = house.runs("bad")[0]["id"]
    (house.box.state / f"runs/{run}/prepare.json").write_text("[")
    assert house.box.cli(DAEMON, "retry", str(run)).returncode == 0


def failing_hook(house: House) -> None:
    """Let another base take the champion's place, which the hook is told of."""
    box = house.box
    box.until(lambda: '"good"' in box.cli(DAEMON, "champion", "--track", "good", "--json").stdout)
    shutil.rmtree(box.folder / "bad-base")
    write_model(box.folder / "bad-base", b"other weights")
    box.until(lambda: "hooks.after_promotion" in house.hook(), LONG)


def hanging_hook(house: House) -> None:
    (house.box.folder / "hangs").touch()
    failing_hook(house)


#: What makes it, what tells of it, and words of that.
TROUBLES: dict[str, tuple[Callable[[House], None], Callable[[House], str], str]] = {
    "a file that cannot be read": (unreadable, House.left, "cannot be opened"),
    "a file of 8 TiB": (huge, House.refusal, "too_large"),
    "a base whose config.json is a pipe": (base_that_hangs, House.error, "config.json, which is not a regular file"),
    "a damaged artifact": (damaged_artifact, House.error, "prepare.json"),
    "a hook that fails": (failing_hook, House.hook, "hooks.after_promotion failed: exit code 3"),
    "a hook that hangs": (hanging_hook, House.hook, "hooks.after_promotion is running"),
}


@pytest.mark.parametrize("what", TROUBLES)
@pytest.mark.timeout(600)
def test_the_other_tracks_go_through(house: House, what: str, record_property: Record) -> None:
    make, told, words = TROUBLES[what]
    house.box.start()
    make(house)
    for track in OTHERS:
        house.box.drop(BOB, f"{track}.jsonl", rows(*map(str, range(FEW))), track)
    for track in OTHERS:
        house.reaches_a_verdict(track)
    house.box.until(lambda: words in told(house))
    assert not house.box.ended
    assert "Traceback" not in house.box.said()
    record_property("probe", [f"{what}, in one of three tracks", "the others reach a verdict", "they did"])
