"""
What steps hand over: frozen values, each one JSON file, written last.

Every path in here is relative to the state folder, so the folder can be moved or restored elsewhere.
"""

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict

Role = Literal["train", "heldout"]
Outcome = Literal["promoted", "worse", "not_shown_better", "insufficient_evidence", "guard_failed", "contaminated"]


class Frozen(BaseModel):
    """A value that crosses a process border: unknown fields are a defect, not something to skip."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Artifact(Frozen):
    """What one step gives to the later ones; published as `runs/<id>/<step>.json`."""

    step: ClassVar[str]


class Drop(Frozen):
    """One accepted file in a run's snapshot."""

    id: int
    sha256: str
    name: str
    path: str
    role: Role
    rows: int


class ModelRef(Frozen):
    """A model folder somewhere under (or, for a base model, outside) the state folder."""

    model_id: str
    path: str
    """Relative to the state folder, or absolute for a base model."""
    generation: int


class Shortfall(Frozen):
    """Why no verdict is possible with this data, known before any training."""

    heldout_rows: int
    needed_heldout_rows: int
    needed_rows: int
    """About how many further rows of the same kind would have to be dropped."""


class Dataset(Artifact):
    """What `prepare` made of the snapshot: `train.jsonl`, `dev.jsonl`, `heldout.jsonl` in `folder`."""

    step: ClassVar[str] = "prepare"

    folder: str
    train_rows: int
    dev_rows: int
    heldout_rows: int
    """Scored records: the cap applied."""
    heldout_pinned: bool
    heldout_version: str
    """sha256 of the scored records' sorted ids."""
    dataset_sha256: str
    duplicates: int
    replaced: int
    """Answers replaced by a later drop's answer to the same prompt."""
    removed_heldout: int
    """Training rows left out because their prompt is in the held-out set."""
    rows_with_control_tokens: int = 0
    """Rows left out of every side because their text holds a control token of the base's tokenizer."""
    metric: str
    max_new_tokens: int
    shortfall: Shortfall | None = None
    drops: tuple[Drop, ...] = ()


class CurvePoint(Frozen):
    """One point of a loss curve."""

    step: int
    loss: float


class Adapter(Artifact):
    """What `train` made: a PEFT adapter in `folder`."""

    step: ClassVar[str] = "train"

    folder: str
    adapter_sha256: str
    base_model_id: str
    format: Literal["chat", "alpaca"]
    quantization: Literal["nf4", "none"]
    device: str
    optimizer_steps: int
    resumed_from_step: int
    """Step of the checkpoint that the last attempt went on from; 0 if it began at the beginning."""
    checkpoints_passed_over: tuple[str, ...] = ()
    """Newer checkpoints that it could not go on from, each with the reason."""
    trained_tokens: int
    train_loss: float
    loss_curve: tuple[CurvePoint, ...]
    dev_curve: tuple[CurvePoint, ...]
    trainable_parameters: int
    adapter_change: float
    """L2 norm of the change of all adapter weights since initialisation."""
    rows_too_long: int
    """Rows longer than the window, left out of training and counted here."""
    rows_with_control_tokens: int = 0
    """Training rows whose text holds a control token of the tokenizer: trained on as plain text."""
    seconds: float


class Model(Artifact):
    """What `merge` made: a plain transformers folder with a manifest of hashes."""

    step: ClassVar[str] = "merge"

    folder: str
    model_id: str
    base_model_id: str
    dtype: str
    size_bytes: int
    logits_difference: float
    """Largest relative L2 distance of next-token logits, merged model against adapter on the 16-bit base."""
    logits_tolerance: float
    format: Literal["chat", "alpaca"]
    seconds: float


class Scores(Frozen):
    """One model's numbers on the held-out records, means over records; in points (0 to 100) but for `nll`."""

    model_id: str
    metrics: dict[str, float]
    nll: float
    """Reference negative log-likelihood in nats a token, weighted by tokens."""
    generated: int
    """Answers that this run made."""
    resumed: int = 0
    """Of those, the ones that an interrupted attempt had made before."""
    cached: int
    """Answers that an earlier run made."""
    seconds: float


class Report(Artifact):
    """What `evaluate` measured: `records.jsonl` in `folder` holds both models' scores, a line a record."""

    step: ClassVar[str] = "evaluate"

    folder: str
    metric: str
    heldout_version: str
    records: int
    records_too_long: int = 0
    """Held-out records that were left out because they do not fit into the window."""
    candidate: Scores
    champion: Scores
    champion_generation: int
    prediction_keys: dict[str, str]
    """Cache key of each model's predictions by model id; different keys are never compared."""


class Verdict(Artifact):
    """What `decide` concluded, with the numbers behind it; gains and intervals in points of the primary metric."""

    step: ClassVar[str] = "decide"

    outcome: Outcome
    reasons: tuple[str, ...]
    sentence: str
    metric: str
    records: int
    candidate_score: float | None = None
    champion_score: float | None = None
    gain: float | None = None
    interval: tuple[float, float] | None = None
    """98 % interval of the gain."""
    p_value: float | None = None
    test: str | None = None
    wins: int = 0
    losses: int = 0
    ties: int = 0
    smallest_detectable_gain: float | None = None
    records_needed: int | None = None
    """Further held-out records that would show the observed gain, if it is real, with 80 % power."""
    champion_generation: int | None = None
    candidate_model_id: str | None = None
    champion_model_id: str | None = None
