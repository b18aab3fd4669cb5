"""
Look at a file before it is a drop: what its bad rows mean (`intake.on_bad_rows`), and what a run would leave out.

A drop with bad rows is rejected, or accepted without these rows.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from daemon.settings.model import IntakeSettings, Settings
from pipeline import durable
from pipeline.artifacts import Dataset, Drop, ModelRef
from pipeline.config import GateConfig, RunConfig
from pipeline.contract import RESULT_NAME, SPEC_NAME, StepResult, StepSpec
from pipeline.data_words import left_out_words, warning_words
from pipeline.models.tokenizer_files import special_tokens
from pipeline.records.file_formats import HEAD_BYTES, foreign_format, name_file
from pipeline.records.records import FileFinding, records_of
from pipeline.records.validate import MOST_COMPARED, Options, Validation, good_rows, validate
from pipeline.words import count

_OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Ruling:
    """Whether a validated file is accepted, with the reason."""

    accepted: bool
    reason: str
    """One sentence, also for an accepted file."""
    ceiling: str = ""
    """The limit that the bad rows exceed, as text; empty if that is not the reason."""


def validation_options(settings: Settings, track: str, path: str, *, heldout: bool = False) -> Options:
    """
    Return the validation options of `track`, by the settings and the special tokens in its base model's folder.

    `path` is the file's path or name as its owner knows it, `heldout` whether it is to be held out. No special tokens
    are looked for if the folder's tokenizer cannot be read. Raises `SettingsError` if the track is not declared.
    """
    base, intake = settings.track(track).base_model, settings.intake
    tokens = special_tokens(Path(base)) if base else ()
    most = intake.max_bad_rows if intake.on_bad_rows == "quarantine" else 0
    return Options(special_tokens=tokens, path=path, most_bad_rows=most, is_heldout=heldout)


def examine(path: Path, options: Options) -> Validation:
    """Validate the file at `path`; if `options.path` ends neither in .json nor in .jsonl, that is the only finding."""
    if options.path.lower().endswith((".jsonl", ".json")):
        return validate(path, options)
    with path.open("rb") as file:
        foreign = foreign_format(file.read(HEAD_BYTES), options.path)
    if foreign is not None:
        return one_finding("format", f"the file is {foreign.name}", name_file(foreign.remedy, options.path))
    remedy = "if it holds records, rename it to end in .jsonl; if it is a table, convert it: dropforge convert FILE"
    return one_finding("name", "the name does not end in .jsonl or .json", name_file(remedy, options.path))


def one_finding(name: str, message: str, remedy: str) -> Validation:
    """Return the validation of a file that is not read: one finding about it, of the rule `name`."""
    finding = FileFinding(line=None, rule=name, message=message, remedy=remedy)
    return Validation(
        rows=0, good_rows=0, findings_total=1, findings=(finding,), rules={name: 1}, warnings=(), complete=False
    )


def rule(validation: Validation, intake: IntakeSettings) -> Ruling:
    """
    Decide whether a validated file is accepted, possibly without its bad rows; change no file.

    A file with findings is accepted only with `on_bad_rows = "quarantine"`, and only if it was read to its end, none is
    of the whole file, it has at most `max_bad_rows` bad rows and `max_bad_percent` of them, and a good row is left.
    """
    bad, rows = validation.bad_rows, validation.rows
    if validation.ok:
        return Ruling(accepted=True, reason=validation.reason)
    if intake.on_bad_rows == "reject" or not (validation.complete or validation.stopped):
        return Ruling(accepted=False, reason=validation.reason)
    faults = f"{bad:,} of {'the first ' * validation.stopped}{count(rows, 'row')} {'is' if bad == 1 else 'are'} bad"
    ceiling = ""
    if bad > intake.max_bad_rows:
        ceiling = f"intake.max_bad_rows allows {intake.max_bad_rows:,}"
    elif 100 * bad > intake.max_bad_percent * rows:
        ceiling = f"intake.max_bad_percent allows {intake.max_bad_percent:g} %, these are {100 * bad / rows:.3g} %"
    elif validation.good_rows == 0:
        ceiling = "no row is left"
    if ceiling or not validation.complete:
        return Ruling(accepted=False, reason=f"{faults}, {ceiling}; {validation.reason}", ceiling=ceiling)
    return Ruling(accepted=True, reason=f"{faults} and set aside; {validation.reason}")


def sift(path: Path, options: Options) -> str:
    """
    Replace the file at `path` by its good rows, fsynced and in JSON Lines; return its new sha256 in hexadecimal.

    The same bytes and options give the same file. Raises `OSError` and then leaves the file unchanged.
    """
    aside = path.with_suffix(".sifted.tmp")
    digest = sha256()
    try:
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            for row in good_rows(path, options):
                line = json.dumps(row.value, ensure_ascii=False, allow_nan=False).encode() + b"\n"
                digest.update(line)
                file.write(line)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)
    return digest.hexdigest()


def foresee(file: Path, settings: Settings, track: str) -> list[str]:
    """
    Prepare the first 10,000 records of a file for declared `track`; return what a run would leave out, and warnings.

    Returns sentences: only the error if the step fails, none if it cannot run. The rows are split by another hash
    than a run's, so near-duplicates of held-out records are an estimate. Writes only into a temporary folder.
    """
    with TemporaryDirectory(prefix="dropforge-check-") as name:
        spec = _spec(file, Path(name), settings, track)
        path = Path(name, spec.folder, SPEC_NAME)
        durable.write_json(path, spec.model_dump(mode="json"))
        environment = {**os.environ, **_OFFLINE}
        argv = (sys.executable, "-P", "-m", "pipeline", spec.step, str(path))
        subprocess.run(argv, env=environment, capture_output=True, check=False)  # noqa: S603 - our own
        written = durable.read_object(path.with_name(RESULT_NAME))
    if not written:
        return []
    result = StepResult.model_validate(written)
    if result.artifact is None:
        return [] if result.error is None else [result.error.message]
    data = Dataset.model_validate(result.artifact)
    among = "" if spec.drops[0].records < MOST_COMPARED else f"the first {MOST_COMPARED:,} records of "
    left = left_out_words(data.model_copy(update={"duplicates": 0}))  # reported with their lines
    return [*([f"a run on {among}this file alone would leave out about {left}"] if left else []), *warning_words(data)]


def _spec(file: Path, root: Path, settings: Settings, track: str) -> StepSpec:
    """Write the file's good rows, up to the 10,000th record, into `root`; return the spec of a prepare step on them."""
    track_settings, rows = settings.track(track), root / "rows.jsonl"
    lines: list[str] = []
    records = 0
    for row in good_rows(file, validation_options(settings, track, str(file))):
        lines.append(json.dumps(row.value) + "\n")
        records += sum(record.learned for record in records_of(row))
        if records >= MOST_COMPARED:
            break
    rows.write_text("".join(lines), encoding="utf-8")
    digest = sha256(rows.read_bytes()).hexdigest()
    (root / "prepare").mkdir()
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
        folder="prepare",
        checkpoints="checkpoints",
        predictions="predictions",
        env={},
        inputs={},
        drops=(
            Drop(id=1, sha256=digest, name=file.name, path=rows.name, role="train", rows=len(lines), records=records),
        ),
        champion=ModelRef(model_id="", path=config.base_model, generation=0),
        config=config,
    )
