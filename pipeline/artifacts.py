"""The artifacts of steps: frozen values, each a JSON file, written last; paths are relative to the work folder."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Role = Literal["train", "heldout"]
Outcome = Literal["promoted", "worse", "not_shown_better", "insufficient_evidence", "guard_failed", "contaminated"]
PAGE_NAME, JSON_NAME, RECORDS_NAME, JUDGEMENTS_NAME = "report.html", "report.json", "records.jsonl", "judgements.jsonl"
#: The file of an adapter or of trained weights, by kind.
TRAINED_FILES = {"adapter": "adapter_model.safetensors", "weights": "weights.safetensors"}


class Frozen(BaseModel):
    """A frozen model for values between processes; unknown fields are errors."""

    # What has a default when it is made is written all the same.
    model_config = ConfigDict(frozen=True, extra="forbid", json_schema_serialization_defaults_required=True)


class Stored(Frozen):
    """A value that is read from a file or the database; fields unknown to this version are ignored at any depth."""

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Return `obj` as a value of this class. Raises pydantic's `ValidationError`."""
        return super().model_validate(obj, extra="ignore", **options)

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """Return the value that a JSON text is. Raises pydantic's `ValidationError`."""
        return super().model_validate_json(json_data, extra="ignore", **options)


class Artifact(Stored):
    """A step's output for later steps; published as `runs/<id>/<step>.json`."""

    step: ClassVar[str]


class Drop(Frozen):
    """One accepted file in a run's snapshot."""

    id: int
    sha256: str
    name: str
    path: str
    role: Role
    rows: int
    records: int
    """Answers to learn or to judge by, each once; of a conversation several."""
    answers_accepted: bool = False
    """Whether its new answers to prompts of earlier drops replace those."""


class ModelRef(Frozen):
    """A model folder; `path` is relative to the work folder, or absolute for a base model."""

    model_id: str
    path: str
    generation: int
    drops: tuple[int, ...] | None = None
    """Drops that it was trained on; `None` for a base model, and if unknown."""


class Shortfall(Frozen):
    """Why no verdict is possible with this data, found before any training."""

    heldout_rows: int
    """Groups of near-duplicate records that the gate judges on; each counts once."""
    needed_heldout_rows: int
    needed_rows: int  # estimate of further rows of the same kind


_Beginning = Annotated[str, AfterValidator(lambda text: text[:300])]


class Overlap(Frozen):
    """A training row left out as a near-duplicate of a held-out record, with the beginnings of both texts."""

    rule: Literal["unit", "answer", "ngram", "shingles"]
    train_text: _Beginning
    heldout_text: _Beginning


class Replacement(Frozen):
    """The rows of two drops that answer the same prompts differently; one of the answers counts."""

    old: int
    """The earlier drop."""
    new: int
    """The later drop."""
    rows: int


class AnswerPair(Frozen):
    """An answer of an older drop and one of a newer drop, with their prompts; each text is cut to its beginning."""

    old_drop: int
    old_prompt: _Beginning
    old_answer: _Beginning
    new_drop: int
    new_prompt: _Beginning = ""
    """Empty if it is the same prompt."""
    new_answer: _Beginning


class Remark(Frozen):
    """A fact about a run's data that a person should know, to be worded with its numbers."""

    code: str
    """A key of `pipeline.data_words.REMARKS`."""
    numbers: dict[str, int | float | str]


class Dataset(Artifact):
    """The data set that `prepare` wrote: `train.jsonl`, `dev.jsonl`, `heldout.jsonl` in `folder`."""

    step: ClassVar[str] = "prepare"

    folder: str
    start: ModelRef | None = None
    """The champion that the training starts from; `None` is the base."""
    from_base: Remark | None = None
    """Why it is the base although the settings say champion."""
    train_rows: int
    old_rows: int = 0
    """Rows that `start` was trained on; `replayed_rows` of them are among the `train_rows`."""
    replayed_rows: int = 0
    general_rows: int = 0
    """Built-in general rows in `train.jsonl` in addition to `train_rows`, by `train.general_rows`."""
    dev_rows: int
    heldout_rows: int
    """Scored records, after the limit."""
    heldout_groups: int
    """Groups of near-duplicates, and of records of one document or `group`, among them; each counts once."""
    heldout_with_turns: int = 0
    """Scored records whose question follows earlier turns, with the answers of the data, not the model's own."""
    unit: Literal["document", "prompt"] = "prompt"
    """The unit of the split, in addition to the records' groups."""
    heldout_pinned: bool
    heldout_version: str
    """sha256 of the scored records' sorted ids."""
    dataset_sha256: str
    duplicates: int
    replaced: int
    """Rows with answers that no longer count, as a person accepted a later drop's to the same prompts."""
    replacements: tuple[Replacement, ...] = ()
    """The same by pairs of drops."""
    proposals: tuple[Replacement, ...] = ()
    """Rows with other answers to prompts of earlier drops, which no person accepted: they are in no split."""
    proposed_answers: tuple[AnswerPair, ...] = ()
    """Up to 20 of each of the ten latest such drops, with the answers that count."""
    removed_heldout: int
    """Training records left out because their prompt is in the held-out set."""
    rows_too_long: int = 0
    """Rows in no split because they exceed the window; training may leave out more."""
    rows_over_window: int = 0
    """Rows that exceed the window, in any split or none, estimated by a sample."""
    rows_refused: int = 0
    """Rows left out of every split because the chat template refuses their system message or earlier turns."""
    rows_with_special_tokens: int = 0
    """Rows left out of every split because their text holds a special token of the base's tokenizer."""
    near_duplicates: int = 0
    """Training records left out as near-duplicates of a held-out record, in addition to `removed_heldout`."""
    overlaps: tuple[Overlap, ...] = ()
    heldout_duplicates: int = 0
    """Held-out records that are near-duplicates of another held-out record: neither scored nor trained on."""
    seen_by_champion: int = 0
    """Held-out records that are not scored because the champion was trained on them or on near-duplicates."""
    warnings: tuple[Remark, ...] = ()
    """What a person should know before trusting a verdict on this data."""
    metric: str
    max_new_tokens: int
    shortfall: Shortfall | None = None

    @property
    def proposed(self) -> int:
        """How many records have new answers to old questions that no person accepted."""
        return sum(drops.rows for drops in self.proposals)


class CurvePoint(Frozen):
    """One point of a loss curve."""

    step: int
    loss: float


class Trial(Frozen):
    """One training of a search, with its outcome."""

    number: int
    """From 1, in the order in which they ran."""
    settings: dict[str, Any]
    """The tried settings of [train]."""
    outcome: Literal["running", "finished", "failed"] = "running"
    dev_loss: float | None = None
    """The last measurement, in nats per token, by which one trial is chosen; only of one that finished."""
    seconds: float = 0.0
    """Those of all attempts, as far as they could record them."""
    chosen: bool = False
    """Whether it was merged and evaluated."""
    why: str = ""
    """Why it failed."""


class MemoryPlan(Frozen):
    """How a training fits into its device's memory; only `quantization` changes what is learned."""

    device: str
    """The GPU's name, or `cpu`."""
    quantization: Literal["nf4", "none"]
    batch_tokens: int
    """Most tokens of a micro-batch."""
    activations: Literal["kept", "half recomputed", "recomputed"]
    """Activation checkpointing: of no layer, of every second, of all."""


class Trained(MemoryPlan):
    """One finished training: its plan, steps, tokens, loss curves and memory."""

    learning_rate: float
    """The peak, chosen by the step if the setting is "auto"."""
    epochs: float
    """Passes over the training records, likewise."""
    optimizer_steps: int
    resumed_from_step: int
    """Step of the checkpoint from which the last attempt resumed; 0 if none."""
    trained_tokens: int
    loss_curve: tuple[CurvePoint, ...]
    dev_curve: tuple[CurvePoint, ...]
    trainable_parameters: int
    estimated_memory: dict[str, int]
    """Estimated memory of the training, in bytes by purpose."""
    peak_memory_bytes: int
    """Of the process that saved the adapter: reserved by torch on a GPU, else resident."""


class Adapter(Artifact, Trained):
    """The adapter or trained weights that `train` wrote to `folder`, for the base or for `start`."""

    step: ClassVar[str] = "train"

    folder: str
    kind: Literal["adapter", "weights"] = "adapter"
    adapter_sha256: str
    base_model_id: str
    start: ModelRef | None = None
    format: Literal["chat", "alpaca"]
    rows_too_long: int
    """Rows longer than the window, left out of training."""
    versions: dict[str, str] = Field(default_factory=dict)
    candidates: tuple[Trial, ...] = ()
    """All trials of a search; `Trained` is the chosen one, `seconds` is that of all."""
    seconds: float


class Model(Artifact):
    """The merged model: a transformers folder with a manifest of hashes."""

    step: ClassVar[str] = "merge"

    folder: str
    model_id: str
    base_model_id: str
    dtype: str
    size_bytes: int
    format: Literal["chat", "alpaca"]
    seconds: float


class Scores(Frozen):
    """One model's mean scores on the held-out records, in points (0 to 100) except `nll`."""

    model_id: str
    metrics: dict[str, float]
    nll: float
    """Negative log-likelihood of the references in nats per token, weighted by tokens."""
    generated: int
    cached: int
    """Answers from earlier runs."""
    seconds: float
    rates: dict[str, float] = Field(default_factory=dict)
    """Per cent of the answers that are `empty`, `truncated` or `looping`."""
    answer_tokens: float = 0.0


class SuiteScores(Frozen):
    """Both models' points on one general suite; `file` in the report's folder holds a line per item."""

    name: str
    records: int
    candidate: float
    champion: float
    base: float | None = None
    """The base model's points; `None` if it is the champion."""
    file: str


class FormerScores(Frozen):
    """A former champion's primary metric in points, from cached answers only; `file` holds a line per record."""

    generation: int
    model_id: str
    records: int
    """Scored records that it answered before, and was not trained on."""
    score: float | None
    """`None` without any."""
    file: str


class TrialScores(Frozen):
    """The comparison of a trial's candidate with that of its control, this run, by what the trial was blamed for."""

    groups: int
    """Groups of records that both answered; of `lost_drops` only, unless the trial's verdict is `worse`."""
    wins: int
    losses: int
    p_value: float
    """One-sided, for a loss of the trial's candidate."""
    lost_drops: tuple[int, ...] = ()
    """Drops on which the trial's candidate lost against the champion."""


class Evaluation(Artifact):
    """The evaluation's result: `records.jsonl` in `folder` holds both models' scores, a line per record."""

    step: ClassVar[str] = "evaluate"

    folder: str
    metric: str
    setup: str
    """Hash of metric, answer length, prompt format, engine, precision, batch size: runs compared have the same."""
    heldout_version: str
    records: int
    records_too_long: int = 0
    """Held-out records that were left out because they do not fit into the window."""
    records_seen_by_champion: int = 0
    """Held-out records that were left out because the champion was trained on them or on near-duplicates."""
    records_seen_by_candidate: int = 0
    """Scored records that the candidate was trained on: with any, the verdict is `contaminated`."""
    batch_size: int = 0
    quantization: Literal["nf4", "none"] = "none"
    """`nf4` if the models' weights did not fit on the GPUs as saved."""
    suites: tuple[SuiteScores, ...] = ()
    former: tuple[FormerScores, ...] = ()
    trial: TrialScores | None = None
    """Only of a control; `None` if its trial was evaluated in another setup, or what that published is damaged."""
    watched: int | None = None
    """Generation of the former champion on watch."""
    watch: dict[int, float] = Field(default_factory=dict)
    """By drop that is new to both: the champion's mean minus the former champion's, in points."""
    unwatched: int | None = None
    """`watched` if there were such drops, but its files are damaged, or its setup is another one."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of the libraries that computed the answers, and the device."""
    candidate: Scores
    champion: Scores
    champion_generation: int
    prediction_keys: dict[str, str]
    """Cache key of each model's predictions by model id."""

    def is_against(self, champion: ModelRef) -> bool:
        """Return whether the candidate was compared with this champion: the same model and generation."""
        return (self.champion_generation, self.champion.model_id) == (champion.generation, champion.model_id)


class Preview(Artifact):
    """The champion's mean score in points on `records` new records of a drop; 0, and no points, if that failed."""

    step: ClassVar[str] = "preview"

    records: int
    points: float | None = None
    metric: str = ""
    usual: float | None = None
    """Its score on held-out records of its own drops; `None` if unknown."""


class Judgement(Artifact):
    """The judge's results; a winner counts only if it is the same in both orders."""

    step: ClassVar[str] = "judge"

    folder: str
    model: str
    records: int
    wins: int
    losses: int
    ties: int
    """Ties, and the `inconsistent` ones, with different winners in the two orders."""
    inconsistent: int
    failed: int
    """Records without a readable reply."""


class GuardResult(Frozen):
    """One guard's result, by its `pipeline.config.GuardName`: its numbers, and whether it blocks the promotion."""

    guard: str
    about: tuple[str | int | float, ...] = ()
    """What was measured: a drop or tag, a suite, a metric and its floor, a drop and a generation."""
    unit: Literal["points", "nats", "per cent", "records"]
    records: int | None = None
    """Groups of near-duplicate held-out records, or items of a suite."""
    candidate: float | None = None
    champion: float | None = None
    """Both in `unit`."""
    change: float | None = None
    """Candidate minus champion in `unit`; harm is negative for scores, positive for counts."""
    bound: float | None = None
    """One-sided 95 % bound of the change, on the side of no harm; `p_value` decides whether harm is shown."""
    p_value: float | None = None
    """p-value for harm, adjusted over the guards of one kind (Holm)."""
    margin: float | None = None
    """Largest allowed loss in `unit`."""
    state: Literal["passed", "failed", "shown"]
    """`shown`: too few records, or not in guards.stop; it cannot block the promotion."""
    note: Literal["too_few", "not_below_champion"] | None = None
    """Why no harm is counted; `pipeline.decide.policy.NOTES` words it."""
    drop: int | None = None
    parts: dict[str, float] = Field(default_factory=dict)
    """For `collapse`, the number of the candidate's collapsed answers by kind."""


class Settlement(Frozen):
    """The guards of old drops on the means of trial and run, and of champion and control."""

    guards: tuple[GuardResult, ...]
    passed: bool
    """Whether none failed: then the trial serves, if it is not worse than the control."""


class SliceResult(Frozen):
    """The primary metric on a slice of the held-out records, in points."""

    kind: Literal["seen", "unseen", "drop", "tag"]
    label: str
    records: int
    groups: int
    candidate: float
    champion: float
    gain: float
    interval: tuple[float, float] | None = None
    p_value: float | None = None
    """One-sided p-value for a gain."""


class Verdict(Artifact):
    """The verdict, with its numbers; gains and intervals are in points of the primary metric."""

    step: ClassVar[str] = "decide"

    outcome: Outcome
    reasons: tuple[str, ...]
    metric: str
    records: int
    groups: int
    """Groups of paraphrases, the units of the test; a single record is a group, too."""
    candidate_score: float | None = None
    champion_score: float | None = None
    gain: float | None = None
    interval: tuple[float, float] | None = None
    """98 % interval of the gain."""
    p_value: float | None = None
    harm_p_value: float | None = None
    """One-sided p-value for a loss, on which `worse` is based; `p_value` is for a gain."""
    test: Literal["mcnemar", "t"] | None = None
    wins: int = 0
    losses: int = 0
    ties: int = 0
    smallest_detectable_gain: float | None = None
    """Gain, of single answers, that the decision promotes in 80 % of cases; only with `not_shown_better`, or `None`."""
    smallest_group_gain: float | None = None
    """The same if all answers of a group become right together; `None` if each group is a single record."""
    records_needed: int | None = None
    """Further groups with which the observed gain, if real, is promoted in about 80 % of cases."""
    groups_needed: int | None = None
    """Groups without which there is no verdict; only with `insufficient_evidence`."""
    rows_needed: int | None = None
    """About how many more rows bring these groups; `None` if rows bring none, or if a model was evaluated."""
    guards: tuple[GuardResult, ...] = ()
    blames_new_drops: bool = False
    """Whether new drops are suspected: by `worse`, or a failed guard of old drops or, without a win, the likelihood."""
    lost_drops: tuple[int, ...] = ()
    """Drops known to the champion on which the candidate lost."""
    pooled: bool = False
    """Whether old drops were guarded on the mean of this model, a trial's, and of the run before."""
    settlement: Settlement | None = None
    """Only of a control whose trial won but for guards of old drops."""
    settled_by: int | None = None
    """The control by which a trial that guards had stopped is promoted after all; in its run's row only."""
    unwatched: int | None = None
    """Generation of the former champion on watch that could not be compared on new drops."""
    slices: tuple[SliceResult, ...] = ()
    slices_not_listed: int = 0
    """Further drops and tags with too few records for a test."""
    uses: int = 0
    """Candidates of this track that were evaluated before."""
    same_set_uses: int = 0
    """Those of them that were evaluated on exactly these records."""
    heldout_version: str | None = None
    """Version of the records that both models answered; the data set's if `evaluate` left none out."""
    report: str | None = None
    """Folder of report.json and report.html, relative to the work folder."""
    champion_generation: int | None = None
    candidate_model_id: str | None = None
    champion_model_id: str | None = None

    @property
    def worth(self) -> tuple[float, float] | None:
        """
        Minus the gain and half of its interval's width, in points: the worth of a drop that the run left out.

        `None` if the models were not compared, or if the verdict is `contaminated`.
        """
        if self.gain is None or self.interval is None or self.outcome == "contaminated":
            return None
        return -self.gain, (self.interval[1] - self.interval[0]) / 2
