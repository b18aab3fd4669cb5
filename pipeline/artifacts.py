"""What steps hand over: frozen values, each a JSON file, written last; paths are relative to the state folder."""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.described import Frozen as Frozen  # noqa: PLC0414 - it is everybody's word for an artifact's parts
from pipeline.search_settings import Trial

Role = Literal["train", "heldout"]
Outcome = Literal["promoted", "worse", "not_shown_better", "insufficient_evidence", "guard_failed", "contaminated"]
PAGE_NAME, JSON_NAME, RECORDS_NAME, JUDGEMENTS_NAME = "report.html", "report.json", "records.jsonl", "judgements.jsonl"
#: The file with what was trained, by the kind of it.
TRAINED_FILES = {"adapter": "adapter_model.safetensors", "weights": "weights.safetensors"}


class Artifact(Frozen):
    """What one step gives to the later ones; published as `runs/<id>/<step>.json`, perhaps by an earlier version."""

    step: ClassVar[str]

    @model_validator(mode="before")
    @classmethod
    def _without_former_fields(cls, value: Any) -> Any:
        return {name: value[name] for name in value if name in cls.model_fields} if isinstance(value, dict) else value


class Drop(Frozen):
    """One accepted file in a run's snapshot."""

    id: int
    sha256: str
    name: str
    path: str
    role: Role
    rows: int


class ModelRef(Frozen):
    """A model folder; `path` is relative to the state folder, or absolute for a base model."""

    model_id: str
    path: str
    generation: int
    drops: tuple[int, ...] | None = None
    """Drops that it was trained on; `None` for a base model, and where that is not known."""


class Shortfall(Frozen):
    """Why no verdict is possible with this data, known before any training."""

    heldout_rows: int
    """What the records count as that the gate judges on: those that ask the same in other words are one."""
    needed_heldout_rows: int
    needed_rows: int  # about so many further ones of the same kind


class Overlap(Frozen):
    """A training row left out for being too near to a held-out record; of the compared texts the beginnings."""

    rule: Literal["prompt", "answer", "ngram", "minhash"]
    train_id: str
    heldout_id: str
    train_text: str
    heldout_text: str


class Dataset(Artifact):
    """What `prepare` made of the snapshot: `train.jsonl`, `dev.jsonl`, `heldout.jsonl` in `folder`."""

    step: ClassVar[str] = "prepare"

    folder: str
    start: ModelRef | None = None
    """The champion that the training goes on from; `None` is the base."""
    from_base: str = ""
    """Why it is the base, where the settings say champion."""
    train_rows: int
    old_rows: int = 0
    """Rows that `start` was trained on; `replayed_rows` of them are among the `train_rows`."""
    replayed_rows: int = 0
    general_rows: int = 0
    """Rows of ours in `train.jsonl` beside the `train_rows`, by `train.general_rows`."""
    train_rows_of: dict[str, int] = Field(default_factory=dict)
    """Rows behind the model, all `old_rows` too, by slice: `drop 3` and, of scored records' tags, `tag legal`."""
    dev_rows: int
    heldout_rows: int
    """Scored records: the cap applied."""
    heldout_groups: int
    """What they count as: records that ask the same in other words are one."""
    heldout_pinned: bool
    heldout_version: str
    """sha256 of the scored records' sorted ids."""
    dataset_sha256: str
    duplicates: int
    replaced: int
    """Answers replaced by a later drop's answer to the same prompt."""
    removed_heldout: int
    """Training rows left out because their prompt is in the held-out set."""
    rows_too_long: int = 0
    """Rows in no split because they do not fit into the window; training leaves out further ones."""
    rows_with_special_tokens: int = 0
    """Rows left out of every split because their text holds a special token of the base's tokenizer."""
    near_duplicates: int = 0
    """Training rows left out because they are too near to a held-out record; beside `removed_heldout`."""
    overlaps: tuple[Overlap, ...] = ()
    heldout_duplicates: int = 0
    """Held-out rows too near to another held-out record: neither scored nor trained on."""
    seen_by_champion: int = 0
    """Held-out records that are not scored because the champion was trained on them or on near copies."""
    warnings: tuple[str, ...] = ()
    """What a person should know about this data, a sentence each."""
    metric: str
    max_new_tokens: int
    shortfall: Shortfall | None = None
    drops: tuple[Drop, ...] = ()


class CurvePoint(Frozen):
    """One point of a loss curve."""

    step: int
    loss: float


class Adapter(Artifact):
    """What `train` made in `folder`, of the sha256 here: an adapter or trained tensors, over the base or a `start`."""

    step: ClassVar[str] = "train"

    folder: str
    kind: Literal["adapter", "weights"] = "adapter"
    adapter_sha256: str
    base_model_id: str
    start: ModelRef | None = None
    format: Literal["chat", "alpaca"]
    quantization: Literal["nf4", "none"]
    batch_tokens: int = 0
    activations: Literal["kept", "recomputed", "offloaded"] = "kept"
    device: str
    optimizer_steps: int
    resumed_from_step: int
    """Step of the checkpoint that the last attempt went on from; 0 if it began at the beginning."""
    trained_tokens: int
    loss_curve: tuple[CurvePoint, ...]
    dev_curve: tuple[CurvePoint, ...]
    trainable_parameters: int
    adapter_change: float
    """L2 norm of the change of all trained weights."""
    rows_too_long: int
    """Rows longer than the window, left out of training and counted here."""
    rows_with_special_tokens: int = 0
    """Training rows whose text holds a special token of the tokenizer: trained on as plain text."""
    versions: dict[str, str] = Field(default_factory=dict)
    estimated_memory: dict[str, int] = Field(default_factory=dict)
    """Bytes that the training was to take by arithmetic, by what takes them."""
    peak_memory_bytes: int = 0
    candidates: tuple[Trial, ...] = ()
    """Of a search, all that were tried; what stands above is the chosen one's, the seconds are those of all."""
    #: Models whose training rows are in this adapter, too: it was combined with theirs.
    also_trained_on: tuple[ModelRef, ...] = ()
    seconds: float


class Model(Artifact):
    """What `merge` made: a plain transformers folder with a manifest of hashes."""

    step: ClassVar[str] = "merge"

    folder: str
    model_id: str
    base_model_id: str
    dtype: str
    size_bytes: int
    format: Literal["chat", "alpaca"]
    seconds: float


class Scores(Frozen):
    """One model's numbers on the held-out records, means over records; in points (0 to 100) but for `nll`."""

    model_id: str
    metrics: dict[str, float]
    nll: float
    """Reference negative log-likelihood in nats a token, weighted by tokens."""
    generated: int
    resumed: int = 0
    """Of the answers that this run generated, the ones that an interrupted attempt had made before."""
    cached: int
    """Answers that an earlier run made."""
    seconds: float
    rates: dict[str, float] = Field(default_factory=dict)
    """Degenerate answers in per cent of the records: `empty`, `truncated`, `looping`."""
    length_ratio: float | None = None
    """Median of answer length over reference length, in words."""
    answer_tokens: float = 0.0
    seconds_per_answer: float | None = None
    """Mean time an answer took to generate, in its batch; cached answers count with the time that they took then."""
    size_bytes: int = 0


class SuiteScores(Frozen):
    """Both models on one suite of general abilities, in points; `file` in the report's folder holds a line an item."""

    name: str
    records: int
    candidate: float
    champion: float
    base: float | None = None
    """The base model's; `None` if it is the champion, or was not measured."""
    file: str


class FormerScores(Frozen):
    """A former champion's primary metric in points, from cached answers alone; `file` holds a line a record."""

    generation: int
    model_id: str
    records: int
    score: float
    file: str


class NoiseFloor(Frozen):
    """What generating twice with one model changes: answers, and the primary metric in `points`, mean and absolute."""

    records: int
    changed: int
    points: float


class Evaluation(Artifact):
    """What `evaluate` measured: `records.jsonl` in `folder` holds both models' scores, a line a record."""

    step: ClassVar[str] = "evaluate"

    folder: str
    metric: str
    heldout_version: str
    records: int
    records_too_long: int = 0
    """Held-out records that were left out because they do not fit into the window."""
    records_seen_by_champion: int = 0
    """Of these, held-out records that were left out because the champion was trained on them or on near copies."""
    records_seen_by_candidate: int = 0
    """Scored records that the candidate was trained on: with any, the verdict is `contaminated`."""
    batch_size: int = 0
    suites: tuple[SuiteScores, ...] = ()
    base_model_id: str | None = None
    """The base model that the suites are held against; `None` where it is the champion itself."""
    former: tuple[FormerScores, ...] = ()
    noise: NoiseFloor | None = None
    """Measured at the track's first evaluation."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Of the libraries that computed the answers, the device among them."""
    candidate: Scores
    champion: Scores
    champion_generation: int
    prediction_keys: dict[str, str]
    """Cache key of each model's predictions by model id; different keys are never compared."""

    def is_against(self, champion: ModelRef) -> bool:
        """Say whether the candidate was compared with this champion: the same model, at the same place in the line."""
        return (self.champion_generation, self.champion.model_id) == (champion.generation, champion.model_id)


class Judgement(Artifact):
    """What `judge` was told by a language model; an answer counts only if it is the same in both orders."""

    step: ClassVar[str] = "judge"

    folder: str
    model: str
    records: int
    wins: int
    losses: int
    ties: int
    """Neither, or another answer in the other order: the `inconsistent` ones."""
    inconsistent: int
    failed: int
    """Records that gave no answer that could be read."""


class GuardResult(Frozen):
    """One guard, a `pipeline.config.GuardName`: what it measured, and whether it stands against promotion."""

    guard: str
    label: str
    """Of what, in words for a person: `token F1`, `drop 3 (answers.jsonl)`."""
    unit: Literal["points", "nats", "times", "per cent", "records"]
    """`times`, of a cost, is that of older verdicts."""
    records: int | None = None
    """Groups of alike held-out records, or items of a suite."""
    candidate: float | None = None
    champion: float | None = None
    """Both in `unit`."""
    change: float | None = None
    """Candidate against champion in `unit`; harm is negative for scores, and positive for what is counted."""
    bound: float | None = None
    """One-sided 95 % bound of the change by itself, on the side of no harm; what is shown is decided by `p_value`."""
    p_value: float | None = None
    """Chance of such harm if there is none; adjusted over the guards of one kind (Holm)."""
    margin: float | None = None
    """Largest loss in `unit` that is let pass."""
    state: Literal["passed", "failed", "shown"]
    """`shown`: too few records, or the settings say so; it cannot stand against promotion."""
    drop: int | None = None
    parts: dict[str, float] = Field(default_factory=dict)
    """Of a suite, the change of each category of its items, in points; of `collapse`, the candidate's by kind."""


class SliceResult(Frozen):
    """The primary metric on a part of the held-out records, in points."""

    kind: Literal["seen", "unseen", "drop", "tag"]
    label: str
    records: int
    groups: int
    candidate: float
    champion: float
    gain: float
    interval: tuple[float, float] | None = None
    p_value: float | None = None
    """One-sided, for a gain."""


class DropLoss(Frozen):
    """The champion's negative log-likelihood of the references in one drop's held-out records, in nats a token."""

    drop: int
    nats: float
    known: bool
    stands_out: bool = False
    """Whether it is new, and above the known ones by more than these differ among each other."""


class Verdict(Artifact):
    """What `decide` concluded, with the numbers behind it; gains and intervals in points of the primary metric."""

    step: ClassVar[str] = "decide"

    outcome: Outcome
    reasons: tuple[str, ...]
    sentence: str
    """The verdict in one short line; the report's story has the rest."""
    metric: str
    records: int
    groups: int
    """Of paraphrases of each other, each one unit of the test; a record alone is a group, too."""
    candidate_score: float | None = None
    champion_score: float | None = None
    gain: float | None = None
    interval: tuple[float, float] | None = None
    """98 % interval of the gain."""
    p_value: float | None = None
    harm_p_value: float | None = None
    """One-sided, for a loss: what `worse` rests on; `p_value` is for a gain."""
    test: str | None = None
    wins: int = 0
    losses: int = 0
    ties: int = 0
    smallest_detectable_gain: float | None = None
    """What the whole decision promotes in eight of ten cases; only with `not_shown_better`, and `None` for no gain."""
    records_needed: int | None = None
    """Further groups with which the observed gain, if it is real, is promoted in about eight of ten cases."""
    guards: tuple[GuardResult, ...] = ()
    blames_new_drops: bool = False
    """Whether it speaks against drops that the champion does not know: by `worse`, an old drop or the likelihood."""
    lost_drops: tuple[int, ...] = ()
    """Drops that the champion knows and on which the candidate lost."""
    champion_losses: tuple[DropLoss, ...] = ()
    """By drop; they warn and stop nothing."""
    slices: tuple[SliceResult, ...] = ()
    slices_not_listed: int = 0
    """Further drops and tags, of too few records to decide anything."""
    uses: int = 0
    """Candidates of this track that were judged before this one."""
    same_set_uses: int = 0
    """Of those, the ones that were judged on exactly these records."""
    noise: NoiseFloor | None = None
    yardstick: str | None = None
    """How what this was judged on differs from the previous verdict's: what, by whom, and the champion's scores."""
    heldout_version: str | None = None
    """Of the records that both models answered: the data set's where `evaluate` had to leave none of them out."""
    report: str | None = None
    """Folder of report.json and report.html, relative to the state folder."""
    champion_generation: int | None = None
    candidate_model_id: str | None = None
    champion_model_id: str | None = None
