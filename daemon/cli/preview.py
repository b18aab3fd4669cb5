"""What a run on one file alone would leave out, by the step that decides it: in a child process, before any drop."""

import json
import os
import subprocess
import sys
from hashlib import sha256
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from daemon.settings.model import Settings
from pipeline import durable
from pipeline.artifacts import Dataset, Drop, ModelRef
from pipeline.config import GateConfig, RunConfig
from pipeline.contract import RESULT_NAME, SPEC_NAME, StepResult, StepSpec
from pipeline.records.validate import MOST_COMPARED, Options, good_rows
from pipeline.words import left_out_words

#: Of fewer rows, chance decides what is held out.
LEAST_ROWS = 20
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def preview(file: Path, settings: Settings, track: str, options: Options) -> list[str]:
    """
    Prepare the first 10,000 good rows of a file, and return in sentences what is left out, and the warnings.

    The rows are split by another hash than a run's, so near-duplicates of held-out records are an estimate. Nothing
    outside a temporary folder is written. Returns an empty list if the step itself cannot run.
    """
    with TemporaryDirectory(prefix="dropforge-check-") as name:
        spec = _spec(file, Path(name), settings, track, options)
        path = Path(name, spec.folder, SPEC_NAME)
        durable.write_json(path, spec.model_dump(mode="json"))
        environment = {**os.environ, **_OFFLINE}
        argv = (sys.executable, "-P", "-m", "pipeline", spec.step, str(path))
        subprocess.run(argv, env=environment, capture_output=True, check=False)  # noqa: S603 - our own
        found = durable.read_object(path.with_name(RESULT_NAME))
    if not found:
        return []
    result = StepResult.model_validate(found)
    if result.artifact is None:
        return [] if result.error is None else [result.error.message]
    data = Dataset.model_validate(result.artifact)
    among = "" if spec.drops[0].rows < MOST_COMPARED else f"the first {MOST_COMPARED:,} rows of "
    left = left_out_words(data.model_copy(update={"duplicates": 0}))  # they are told with their line
    return [*([f"a run on {among}this file alone would leave out about {left}"] if left else []), *data.warnings]


def _spec(file: Path, root: Path, settings: Settings, track: str, options: Options) -> StepSpec:
    """Copy the good rows into `root`, and return the spec that prepares them there."""
    track_settings, rows = settings.track(track), root / "rows.jsonl"
    lines = [json.dumps(row.value) + "\n" for row in islice(good_rows(file, options), MOST_COMPARED)]
    rows.write_text("".join(lines), encoding="utf-8")
    digest = sha256(rows.read_bytes()).hexdigest()
    folder = root / "prepare"
    folder.mkdir()
    config = RunConfig(
        track=track,
        base_model=track_settings.base_model or str(root),
        base_model_id="",
        salt="check",
        train=track_settings.train.model_copy(update={"start": "base"}),
        gate=GateConfig(on=track_settings.gate.on),
        split=track_settings.split,
        evaluate=track_settings.evaluate.model_copy(update={"general": ()}),
    )
    return StepSpec(
        run=0,
        step="prepare",
        attempt=1,
        fence="",
        root=str(root),
        folder=folder.name,
        checkpoints="checkpoints",
        predictions="predictions",
        env={},
        inputs={},
        drops=(Drop(id=1, sha256=digest, name=file.name, path=rows.name, role="train", rows=len(lines)),),
        champion=ModelRef(model_id="", path=config.base_model, generation=0),
        config=config,
    )
