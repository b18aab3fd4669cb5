"""Settings of the steps, copied into the run when it is claimed."""

import ipaddress
import math
import re
from typing import Annotated, Literal, get_args
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from pipeline.artifacts import Frozen, Stored
from pipeline.search_settings import SearchConfig, check_search

Fraction = Annotated[float, Field(ge=0, lt=1)]
#: Upper limit of counts and points, to catch mistakes.
_MANY = 10_000_000
#: Fewer dev records are too few for a dev loss and go to training.
DEV_ROWS = 20
#: What is on one side of the split as a whole: all prompts on one long input, or each prompt by itself.
Unit = Literal["document", "prompt"]


class SplitConfig(Frozen):
    """How accepted records are divided; a track's first verdict fixes `heldout` and `dev`."""

    heldout: Fraction = 0.15
    """Share of prompts that only the gate ever sees; 0 needs gate.on = "pinned"."""
    dev: Fraction = 0.03
    """Share of prompts for the dev loss and a search's choice; under 20 records unused. The last step is kept."""
    scored_records: int = Field(default=1000, ge=1, le=_MANY)
    """Most held-out records scored in one evaluation; if there are more, a sample, two thirds new for each champion."""
    similarity: float = Field(default=0.5, gt=0, le=1)
    """Share of 3-word shingles in common (Jaccard) from which two records are near-duplicates."""

    @model_validator(mode="after")
    def _leaves_training_rows(self) -> "SplitConfig":
        if self.heldout + self.dev >= 1:
            raise ValueError("split.heldout and split.dev together must stay under 1, or nothing is left to train on")
        return self


#: Methods that train the base's own weights instead of an adapter.
FULL_WEIGHTS = ("galore", "spectrum", "full")

#: Settings of [train] that do not change what is learned.
_OF_THE_MACHINE = {"batch_tokens", "processes", "checkpoint_minutes"}
#: Settings that choose the starting model and its rows, used by `prepare`.
_OF_THE_BEGINNING = {"start", "replay", "general_rows"}
#: Settings that all trials of a search share: the data, and those that cannot be tried.
_OF_THE_SEARCH = {*_OF_THE_MACHINE, *_OF_THE_BEGINNING, "preset", "format", "max_length", "quantization", "search"}


class TrainConfig(Frozen):
    """Training, by QLoRA unless `method` says otherwise."""

    preset: Literal["fast", "balanced", "quality"] = "balanced"
    """Optimizer steps that `epochs = "auto"` aims at: `fast` 100, `balanced` 200, `quality` 400."""
    start: Literal["base", "champion"] = "base"
    """What a training starts from: the base with all records, or the champion with new ones and a share of old ones."""
    replay: float = Field(default=0.2, ge=0, le=10)
    """With `champion`, old records trained on again, as a share of the new ones: 0.2 is one per five new ones."""
    general_rows: Fraction = 0.0
    """Share of the training records that are built-in general questions, against collapse: 0.2 is a fifth."""
    format: Literal["auto", "chat", "alpaca"] = "auto"
    """Prompt format; `auto` is the tokenizer's chat template where there is one, else Alpaca's."""
    quantization: Literal["auto", "nf4", "none"] = "auto"
    """`none` trains over the 16-bit base, `nf4` over an NF4 base (QLoRA); `auto` is `none` if that fits into memory."""
    method: Literal["lora", "dora", "galore", "spectrum", "full"] = "lora"
    """An adapter (`lora`, `dora`), or full fine-tuning: linear layers by `galore`, the best of them, or all weights."""
    rank: int = Field(default=16, ge=1, le=65_536)
    """LoRA rank; with `galore` that of the gradients, from which Adam's moments are kept."""
    alpha: int = Field(default=32, ge=1, le=1_048_576)
    """LoRA's and GaLore's alpha: updates are scaled by alpha / rank, with `rslora` by alpha / sqrt(rank)."""
    share: float = Field(default=0.25, gt=0, le=1)
    """Share of the layers of each name that `spectrum` trains: those whose weights have most signal to noise."""
    rslora: bool = False
    """Scale by the root of the rank, so that a high rank learns as fast as a low one."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """LoRA dropout probability."""
    targets: tuple[str, ...] = Field(default=("all-linear",), min_length=1)
    """Layers that are trained: "all-linear", "mlp", or names of the base model's, as ["q_proj", "v_proj"]."""
    learning_rate: Literal["auto"] | Annotated[float, Field(gt=0, le=10)] = "auto"
    """Peak learning rate; `auto` chooses it by method and size of the base."""
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the optimizer steps spent warming up; then the learning rate falls to 0 along a cosine."""
    epochs: Literal["auto"] | Annotated[float, Field(ge=0.001, le=10_000)] = "auto"
    """Passes over the training records; `auto` takes one to four, so that there are about 200 optimizer steps."""
    batch_size: int = Field(default=8, ge=1, le=65_536)
    """Records per optimizer step."""
    batch_tokens: Literal["auto"] | Annotated[int, Field(ge=1, le=16_777_216)] = "auto"
    """Most tokens of a micro-batch; a longer record is one by itself. `auto`: 2048 on a GPU, 1024 on a CPU."""
    processes: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = "auto"
    """Processes that share each optimizer step's records, one per GPU; `auto`: as many as GPUs, but 1 in a search."""
    max_length: int = Field(default=2048, ge=16, le=16_777_216)
    """Window in tokens, prompt and answer together; longer records are left out, never cut."""
    checkpoint_minutes: float = Field(default=5.0, ge=1e-6, le=525_600)
    """Minutes between checkpoints."""
    seed: int = Field(default=42, ge=0, le=4_294_967_295)
    """Seed of initialisation and data order."""

    search: SearchConfig = SearchConfig()

    @property
    def trains_full_weights(self) -> bool:
        """Whether the base's own weights are trained instead of an adapter."""
        return self.method in FULL_WEIGHTS

    def chosen(self, layers: int) -> int:
        """Return how many of `layers` layers with the same name `spectrum` trains: `share` of them, rounded up."""
        return math.ceil(round(self.share * layers, 6))

    def decisive(self) -> dict[str, object]:
        """Return the settings, as JSON values, that determine what is learned from a given start and given rows."""
        return self.model_dump(mode="json", exclude=_OF_THE_MACHINE | _OF_THE_BEGINNING)

    def beginning(self) -> dict[str, object]:
        """Return, as JSON values, the settings that choose the start and its rows; `replay` only for the champion."""
        from_base = {"start", "general_rows"}
        return self.model_dump(mode="json", include=_OF_THE_BEGINNING if self.start == "champion" else from_base)

    @model_validator(mode="after")
    def _suits_the_method(self) -> "TrainConfig":
        if self.trains_full_weights:
            self._check_full_weights()
        check_search(self.search, self, _OF_THE_SEARCH)
        return self

    def _check_full_weights(self) -> None:
        # Not recorded as set: an "auto" of the top level leaves the choice to a track's own method.
        if self.quantization == "auto":
            object.__setattr__(self, "quantization", "none")
            self.model_fields_set.discard("quantization")
        of_adapters = {
            'train.quantization = "nf4"': self.quantization == "nf4",
            "train.rslora": self.rslora,
            "train.dropout": self.dropout > 0,
            "train.targets": self.method == "full" and self.targets != ("all-linear",),
        }
        for name, is_set in of_adapters.items():
            if is_set:
                msg = f'train.method = "{self.method}" trains weights of the 16-bit base itself and takes no {name}: '
                raise ValueError(f'{msg}leave that out, or set train.method = "lora"')


class EvaluateConfig(Frozen):
    """Generation and scoring on the held-out records."""

    metric: Literal["auto", "exact_match", "token_f1", "rouge1", "rouge2", "rougeL", "chrf", "json_f1"] = "auto"
    """Primary metric; `auto` is exact match for short references, field F1 for JSON, else ROUGE-L."""
    max_new_tokens: int = Field(default=0, ge=0, le=1_048_576)
    """Longest answer in tokens; 0: for the references that fit, fixed by the track's first verdict."""
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    """Greedy decoding's repetition penalty."""
    batch_size: int = Field(default=0, ge=0, le=65_536)
    """Prompts generated together, half as many once memory ran out; 0 is 32 on a CPU, up to 128 on a GPU."""
    general: tuple[str, ...] = ("builtin",)
    """Suites against forgetting: `builtin`, or its free `questions` alone, your own files; or []."""
    vllm: str = ""
    """Absolute path of vLLM's program, whose environment answers in place of transformers, as "/opt/vllm/bin/vllm"."""

    @model_validator(mode="after")
    def _vllm_is_a_path(self) -> "EvaluateConfig":
        if self.vllm and not self.vllm.startswith("/"):
            raise ValueError("evaluate.vllm must be the absolute path of the program, /opt/vllm/bin/vllm")
        return self


GuardName = Literal[
    "slice", "general", "general_base", "collapse", "anchor", "nll", "empty", "truncated", "looping", "floor", "judge"
]


#: The metrics of `pipeline.metrics.registry`.
MetricName = Literal["exact_match", "token_f1", "rouge1", "rouge2", "rougeL", "chrf", "json_valid", "json_f1"]
Points = Annotated[float, Field(ge=0, le=100)]


class GateConfig(Frozen):
    """When a candidate replaces the champion."""

    on: Literal["all", "seen", "pinned"] = "all"
    """Evaluation set: the drops' own held-out shares, those of drops that the champion knows, or pinned files."""
    approval: Literal["auto", "manual"] = "auto"
    """`manual`: a win waits for `dropforge promote RUN`; `auto`: it serves, unless its model was rolled back from."""
    review: int = Field(default=0, ge=0, le=1000)
    """With `manual`, pairs of answers to be judged blind by `dropforge review RUN` before it is promoted; 0: none."""
    p_value: float = Field(default=0.01, gt=0, le=0.5)
    """Largest one-sided p-value that promotes: at 0.01 one candidate in 100 that is no better, 0.5 at most."""
    min_gain: float = Field(default=1.0, ge=0, le=100)
    """Smallest mean gain in points that promotes."""
    min_records: int = Field(default=100, ge=1, le=_MANY)
    """Fewest held-out records for a verdict, twice as many without exact match; paraphrases, or one text's, are one."""

    def least_groups(self, metric: str) -> int:
        """Return the fewest groups of held-out records for a verdict: `min_records`, twice that without exact match."""
        return self.min_records if metric == "exact_match" else 2 * self.min_records

    @model_validator(mode="after")
    def _somebody_reviews(self) -> "GateConfig":
        if self.review and self.approval == "auto":
            raise ValueError(
                'gate.review is what a promotion by hand waits for: set gate.approval = "manual", or gate.review = 0'
            )
        return self


class GuardConfig(Frozen):
    """What a winning candidate must not lose: a guard fails if harm is shown."""

    stop: tuple[GuardName, ...] = tuple(name for name in get_args(GuardName) if name != "collapse")
    """Guards that block a promotion; the others are only shown in the report."""
    slices: float = Field(default=4.5, ge=0, le=_MANY)
    """Largest loss on a drop that the champion knows or a tag, in points, on 100 records or more."""
    general: float = Field(default=5.0, ge=0, le=_MANY)
    """Largest loss on a suite of general abilities, in points; what is beyond fails if it is shown at p = .01."""
    general_base: float = Field(default=10.0, ge=0, le=_MANY)
    """The same against the base model: the loss of a line of champions together."""
    anchor: float = Field(default=5.0, ge=0, le=_MANY)
    """Largest loss on a drop against the former champion that was best on it, in points, if shown at p = .05."""
    nll: float = Field(default=0.1, ge=0, le=_MANY)
    """Largest rise of the references' negative log-likelihood, in nats per token."""
    degenerate: float = Field(default=2.0, ge=0, le=_MANY)
    """Largest rise of empty, truncated or looping answers, each in per cent of the records, if shown at p = .01."""
    floors: dict[MetricName, Points] = Field(default_factory=dict)
    """Lowest score of a metric that is promoted, in points: floors.exact_match = 60."""


class JudgeConfig(Frozen):
    """A language model that compares answers; it can block a promotion, never cause one."""

    url: str = ""
    """OpenAI-compatible endpoint, as http://127.0.0.1:8000/v1; empty: no judge."""
    model: str = ""
    """Name of the model there."""
    api_key_env: str = ""
    """Variable that holds the key; its value is written nowhere."""
    records: int = Field(default=200, ge=1, le=10_000_000)
    """Most held-out records that are judged, those with the lowest hash."""
    timeout_seconds: float = Field(default=60.0, ge=0.01, le=86_400)
    """Longest wait for one answer."""

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not value or (usable and not re.search(r"[@?#\s\x00-\x1f]", value) and not value.endswith("/completions")):
            return value
        raise ValueError(
            "must be the http:// or https:// address of an OpenAI-compatible endpoint up to its version, without "
            "name, password, query and /chat/completions, such as http://127.0.0.1:8000/v1"
        )

    @field_validator("api_key_env")
    @classmethod
    def _is_a_variable(cls, value: str) -> str:
        if value and (not re.fullmatch(r"[A-Za-z_]\w*", value, re.ASCII) or value.upper().startswith("DROPFORGE_")):
            raise ValueError(
                "must be the name of an environment variable that holds the key, not the key itself, such as "
                "JUDGE_API_KEY; names with DROPFORGE_ are for settings"
            )
        return value

    @model_validator(mode="after")
    def _names_a_model(self) -> "JudgeConfig":
        if self.url and not self.model:
            raise ValueError("judge.url is set and judge.model is not: name the model that the endpoint is to ask")
        return self

    @property
    def on_this_machine(self) -> bool:
        """Whether the host in `url` is `localhost` or a loopback address; other names are not resolved."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"


class RunConfig(Stored):
    """The settings of a run's steps, fixed with its snapshot."""

    track: str
    base_model: str
    """Absolute path of the base model's folder."""
    base_model_id: str
    salt: str
    unit: Unit | None = None
    """The unit of the split that the track has fixed; `None` before."""
    split: SplitConfig = SplitConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    gate: GateConfig = GateConfig()
    guards: GuardConfig = GuardConfig()
    judge: JudgeConfig = JudgeConfig()
