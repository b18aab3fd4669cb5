"""
docs/walk.md: one drop followed from the rename to the served model, with the files, rows and log lines of `make demo`.

`python -m tests.walk demo` prints the page from a folder in which `dropforge demo` has ended (`make walk`). A test of
the whole loop makes it again from its own workspace: `shape` is what the two have in common.
"""

import json
import re
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

_LONGEST = 100
_PAGE = """\
# A walk: from a dropped file to the model that serves

One drop of `make demo`, followed through every folder and table that it enters. Log lines, files and rows are those of
that run; hashes and long values are cut off. [state.md](state.md) lists all files, [words.md](words.md) explains the
terms. `make walk` writes this page again.

## 1. A file comes into the inbox

The watcher (`daemon/inbox/watcher.py`) takes a file that has not changed for `intake.settle_seconds`; a file that was
renamed into the inbox at once, where the kernel tells that no process writes to it. Intake (`daemon/inbox/intake.py`)
copies it to `incoming/`, validates each row, stores the copy under its hash and commits the drop and its run in one
transaction; only then does the file leave the inbox. A crash before the commit leaves the file in the inbox, to be
taken again.

{intake}

## 2. The run is claimed

The drop's run was queued with it. `run_after_quiet_seconds` after the last drop the daemon claims it
(`daemon/dispatch/claimer.py`): the settings and the list of drops are written into its row and do not change any more.

{claim}

## 3. Prepare

Each step is a process that reads one `spec.json`, writes into one attempt's folder and ends with `result.json`
(`daemon/dispatch/attempt.py`). The dispatcher checks the hashes of its files, then publishes `runs/RUN/STEP.json`: a
step whose file exists is done. Prepare (`pipeline/prepare/`) splits the rows into training and held-out ones and
removes near-duplicates of held-out records from training.

{prepare}

## 4. Train

QLoRA on a GPU, LoRA on this processor (`pipeline/train/`). The adapter stays in the attempt's folder; checkpoints, from
which another attempt would resume, lie in `runs/RUN/checkpoints/` until the run ends.

{train}

## 5. Merge

The adapter is added to the base model's weights (`pipeline/merge/`). The result is a plain folder for transformers.
When it is published it moves to `models/`, named by the hash of its files.

{merge}

## 6. Evaluate

Candidate and champion answer the same held-out records (`pipeline/evaluate/`). Their answers are kept under
`predictions/`, so that the next run does not ask this champion again.

{evaluate}

## 7. Decide

The gate compares the two record by record and tests the guards (`pipeline/decide/`, [gate.md](gate.md)). Then
`pipeline/__main__.py` writes the evidence card.

{decide}

## 8. Promotion

The dispatcher applies the verdict (`daemon/dispatch/apply_verdict.py`, `daemon/champions/promotion.py`): in one
transaction it writes a row of `promotion` and replaces the link `tracks/TRACK/champion` by a rename. The row decides:
after a crash the next start makes the link what the row says. Then hooks tell the server, and the note next to the file
is written again.

{promotion}

## 9. The model serves

`tracks/TRACK/champion` always leads to a whole model: `dropforge ask "..."` uses it, and [serving.md](serving.md) shows
how vLLM and others do. Its files are those of the base model with other weights, and a manifest of their hashes:

{serving}
"""


def render(folder: Path, run: int = 1) -> str:
    """Return the page of the first drop of a run in a workspace; an exception says which part is missing."""
    return _PAGE.format_map(_Walk(folder, run).stations())


def shape(page: str) -> list[str]:
    """Return what two runs have in common: prose and titles without names, keys, and events with their keys."""
    lines, in_block = [], False
    for line in page.splitlines():
        if line == "```":
            in_block = not in_block
        elif not in_block:
            lines.append(re.sub(r"[^\s`/]+(?=\.jsonl)|\d+", "…", line))
        elif key := re.match(r"  (\w+): ", line):
            lines.append(key[1])
        elif re.match(r"\w+ \w+=", line):
            lines.append(" ".join([line.split()[0], *re.findall(r" (\w+)=", line)]))
    return lines


class _Walk:
    """Reads one run's files, rows and log lines."""

    def __init__(self, folder: Path, run: int) -> None:
        self.folder, self.state, self.run = folder.resolve(), folder.resolve() / ".dropforge", run
        lines = (folder / "daemon.log").read_text(encoding="utf-8").splitlines()
        self.log = [json.loads(line) for line in lines if line.startswith("{")]
        self.drop = next(one["drop"] for one in self.log if one["event"] == "file_taken" and one["run"] == run)

    def stations(self) -> dict[str, str]:
        name = self.row("drop", self.drop, "name")["name"]
        stored = self.row("drop", self.drop, "sha256")["sha256"]
        attempt = self.state / f"runs/{self.run}/attempts"
        model = self.artifact("merge")["folder"]
        columns = ("id", "track", "role", "state", "name", "sha256", "rows", "first_run")
        note = (self.folder / f"inbox/done/{name}.verdict.txt").read_text(encoding="utf-8")
        return {
            "intake": _blocks(
                self.events("file_taken"),
                _fields(f"row {self.drop} of table drop", self.row("drop", self.drop, *columns)),
                _text(f"drops/{stored}.jsonl, first line", self.first_line(f"drops/{stored}.jsonl")),
                _text("the inbox", f"done/{name}\ndone/{name}.receipt.json"),
            ),
            "claim": _blocks(
                self.events("run_claimed"),
                _fields(
                    f"row {self.run} of table run, when it has ended",
                    self.row("run", self.run, "id", "track", "state", "trigger", "purpose", "snapshot", "outcome"),
                ),
            ),
            "prepare": self.step(
                "prepare",
                "train_rows heldout_rows near_duplicates metric",
                _keys("spec.json", _read(attempt / "prepare-1/spec.json"), "run step attempt fence folder inputs"),
                _keys("claim.json", _read(attempt / "prepare-1/claim.json"), "node process"),
                _text("data/train.jsonl, first line", self.first_line(attempt / "prepare-1/data/train.jsonl")),
            ),
            "train": self.step(
                "train", "optimizer_steps learning_rate trained_tokens trainable_parameters adapter_sha256"
            ),
            "merge": self.step("merge", "folder model_id base_model_id dtype size_bytes"),
            "evaluate": self.step("evaluate", "metric records champion_generation"),
            "decide": self.step("decide", "outcome gain interval p_value wins losses ties candidate_model_id"),
            "promotion": _blocks(
                self.events("run_finished", keys="run outcome"),
                _fields(
                    "row of table promotion",
                    self.row(
                        "promotion",
                        self.run,
                        "kind",
                        "generation",
                        "model_id",
                        "previous_model_id",
                        "drops",
                        by="run_id",
                    ),
                ),
                _text("tracks/default/champion", f"-> {(self.state / 'tracks/default/champion').readlink()}"),
                _text(f"inbox/done/{name}.verdict.txt", note.splitlines()[2]),
            ),
            "serving": _text(
                "tracks/default/champion/", "\n".join(sorted(one.name for one in (self.state / model).iterdir()))
            ),
        }

    def step(self, name: str, keys: str, *further: str) -> str:
        """Return the log lines of a step, `further` parts, the files that it made and some values of its artifact."""
        folder = self.state / f"runs/{self.run}/attempts/{name}-1"
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        return _blocks(
            self.events("step_submitted", "step_started", "step_published", step=name),
            *further,
            _text(f"runs/{self.run}/attempts/{name}-1/", "\n".join(files)),
            _keys(f"runs/{self.run}/{name}.json", self.artifact(name), keys),
        )

    def artifact(self, step: str) -> dict[str, Any]:
        return _read(self.state / f"runs/{self.run}/{step}.json")

    def events(self, *names: str, step: str = "", keys: str = "") -> str:
        """Return a block of the run's first log line of each name; with `keys` these values alone."""
        lines = []
        for name in names:
            line = next(one for one in self.log if one["event"] == name and self._is_ours(one, step))
            chosen = keys.split() or [key for key in line if key not in {"event", "level", "timestamp"}]
            lines.append(" ".join([name, *(f"{key}={_short(line[key])}" for key in chosen)]))
        return _text("log", "\n".join(lines))

    def _is_ours(self, line: dict[str, Any], step: str) -> bool:
        if "key" in line:
            return bool(line["key"] == f"{self.run}-{step}-1")
        return line.get("run") == self.run and line.get("step", "") == step

    def row(self, table: str, key: int, *columns: str, by: str = "id") -> dict[str, Any]:
        with closing(sqlite3.connect(f"file:{self.state / 'dropforge.db'}?mode=ro", uri=True)) as base:
            values = base.execute(f'SELECT {", ".join(columns)} FROM "{table}" WHERE {by} = ?', (key,)).fetchone()
        return dict(zip(columns, values, strict=True))

    def first_line(self, path: str | Path) -> str:
        with (self.state / path).open(encoding="utf-8") as file:
            return _short(file.readline().strip())


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes()))


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    text = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{20,}", r"\1…", text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST].rstrip()}…"


def _keys(title: str, values: dict[str, Any], keys: str) -> str:
    return _fields(title, {key: values[key] for key in keys.split()})


def _fields(title: str, values: dict[str, Any]) -> str:
    return _text(title, "\n".join(f"  {key}: {_short(value)}" for key, value in values.items()))


def _text(title: str, text: str) -> str:
    return f"`{_short(title)}`\n\n```\n{_short_lines(text)}\n```"


def _short_lines(text: str) -> str:
    return "\n".join(re.sub(r"\b([0-9a-f]{12})[0-9a-f]{20,}", r"\1…", line) for line in text.splitlines())


def _blocks(*parts: str) -> str:
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(render(Path(sys.argv[1])))
