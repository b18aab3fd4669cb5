"""One track in trouble, of each kind: the files and runs of the others go through to their verdict."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.hostile.people import ALICE, BOB, DAEMON, GROUP, Box, rows
from tests.model_folder import write_model

#: Each track has a trouble of its own, but for the last two.
SETTINGS = """
[tracks.files]
base_model = "files-base"
[tracks.piped]
base_model = "piped-base"
[tracks.damaged]
base_model = "damaged-base"
[tracks.fails]
base_model = "fails-base"
[tracks.fails.hooks]
after_promotion = ["sh", "-c", "exit 3"]
[tracks.hangs]
base_model = "hangs-base"
[tracks.hangs.hooks]
after_promotion = ["sleep", "1000"]
[tracks.good]
base_model = "good-base"
[tracks.better]
base_model = "good-base"
"""
OTHERS = ("good", "better")
BASES = ("files", "piped", "damaged", "fails", "hangs", "good")
#: Enough for a run that trains, which this base cannot, whatever share of the rows the track's random salt holds out.
MANY = 2_000
#: Too few for a verdict, and so many that a track's random salt never holds all of them out.
FEW = 40
#: Seconds for what loads the training stack on a busy machine.
LONG = 200.0


@dataclass
class House:
    """An installation whose runs begin at once."""

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
        """Return why a file is still in the inbox."""
        return " ".join(one["why"] for one in self.box.status()["inbox"]["left"] if one["name"].startswith("files/"))

    def refusal(self) -> str:
        """Return what is said of a file that was given back; empty if none was."""
        return "".join(path.read_text() for path in (self.box.inbox / "rejected").glob("files/*/*.errors.json"))

    def error(self, track: str) -> str:
        """Return what is wrong with the newest run of a track."""
        return " ".join(str(run["error"]) for run in self.runs(track)[:1])

    def hook(self, track: str) -> str:
        """Return what is said of the hook of a track."""
        lines = self.box.cli(DAEMON, "status").stdout.splitlines()
        return " ".join(line for line in lines if line.startswith(f"track {track}") and "hooks." in line)

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
    for track in BASES:
        base = box.folder / f"{track}-base"
        write_model(base, b"weights")
        # The step that counts tokens is the real one.
        (base / "tokenizer.json").write_text(TOKENIZER)
    return House(box)


@pytest.mark.timeout(600)
def test_each_trouble_is_told_and_the_other_tracks_go_through(house: House) -> None:
    box = house.box
    box.start()
    for track in ("fails", "hangs"):
        # That this base serves is recorded, so another one is a change.
        box.until(lambda of=track: f'"{of}"' in box.cli(DAEMON, "champion", "--track", of, "--json").stdout)  # type: ignore[misc]
    done = box.shell(ALICE, "printf x > files/.x && chmod 000 files/.x && mv files/.x files/closed.jsonl")
    assert done.returncode == 0, done.stderr
    box.sparse(ALICE, "files/huge.jsonl", 8 << 40)
    config = box.folder / "piped-base" / "config.json"
    config.unlink()
    os.mkfifo(config)
    os.chown(config, DAEMON.number, GROUP)
    # Another base takes the champion's place, which the hook is told of.
    for track in ("fails", "hangs"):
        shutil.rmtree(box.folder / f"{track}-base")
        write_model(box.folder / f"{track}-base", b"other weights")
    box.until(lambda: "config.json, which is not a regular file" in box.said(), LONG)
    box.drop(ALICE, "drop.jsonl", rows("one", "two"), "piped")
    box.drop(ALICE, "drop.jsonl", rows(*map(str, range(MANY))), "damaged")
    # A run fails where its model is loaded; what it has published is damaged before it is tried again.
    box.until(lambda: house.ends("damaged", "failed"), LONG)
    assert "the tokenizer in" in house.error("damaged")
    run = house.runs("damaged")[0]["id"]
    (box.state / f"runs/{run}/prepare.json").write_text("[")
    assert box.cli(DAEMON, "retry", str(run)).returncode == 0
    for track in OTHERS:
        box.drop(BOB, f"{track}.jsonl", rows(*map(str, range(FEW))), track)
    for track in OTHERS:
        house.reaches_a_verdict(track)
    troubles: tuple[tuple[Callable[[], str], str], ...] = (
        (house.left, "cannot be opened"),
        (house.refusal, "too_large"),
        (lambda: house.error("piped"), "config.json, which is not a regular file"),
        (lambda: house.error("damaged"), "prepare.json"),
        (lambda: house.hook("fails"), "hooks.after_promotion failed: exit code 3"),
        (lambda: house.hook("hangs"), "hooks.after_promotion is running"),
    )
    for told, words in troubles:
        box.until(lambda told=told, words=words: words in told(), LONG)  # type: ignore[misc]
    assert not box.ended
    assert "Traceback" not in box.said()
