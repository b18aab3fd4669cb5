"""Runs that end in each verdict, made of written artifacts: what the evidence card and its readers are tested on."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import durable
from pipeline.artifacts import (
    Adapter,
    Artifact,
    CurvePoint,
    Dataset,
    Drop,
    Evaluation,
    GuardResult,
    Judgement,
    Model,
    ModelRef,
    Overlap,
    Remark,
    Scores,
    Shortfall,
    SliceResult,
    Verdict,
)
from pipeline.config import GateConfig, RunConfig
from pipeline.contract import Attempt
from tests.made_artifacts import dataset_of, judgement_of, made_adapter, made_spec, model_of, report_of

BASE, OLD, NEW = "ba" * 32, "c1" * 32, "d2" * 32
HELDOUT, DATA = "4e" * 32, "da" * 32
DROPS = (
    Drop(id=1, sha256="01" * 32, name="reviews-2026-10.jsonl", path="drops/1", role="train", rows=1800, records=1800),
    Drop(id=3, sha256="03" * 32, name="bewertungen_ü.jsonl", path="drops/3", role="train", rows=600, records=600),
)
HOSTILE = (
    '<script>document.title = "owned"</script></style></pre></details><img src=x onerror="document.title=\'owned\'">'
    '<link rel="stylesheet" href="http://127.0.0.1:9/x.css"> &lt;b&gt; \x1b[31m \x00 "quoted" \'single\' \u202eevil'
)
LONG_WORD = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 4
SCRIPTS = ("مرحبا بالعالم: كم عدد النجوم؟", "这家餐厅很好吃，给几颗星？", "ร้านนี้อร่อยมาก")


def row(place: int, new: float, old: float, text: str = "") -> dict[str, Any]:
    """Return one line of records.jsonl; scores are 0 to 1 and the answers are stars."""
    stars = str(1 + place % 5)
    wrong = str(1 + (place + 2) % 5)

    def answered(score: float) -> dict[str, Any]:
        words = stars if score >= 1 else wrong
        return {
            "text": words,
            "tokens": 2,
            "scores": {"exact_match": score, "token_f1": score},
            "nll_sum": 1.2,
            "nll_tokens": 2,
            "degenerate": [],
        }

    return {
        "id": f"{place:032x}",
        "group": f"{place:032x}",
        "drop": 1 if place % 4 else 3,
        "pinned": False,
        "tags": ["category:food"],
        "instruction": "How many stars does this review give?",
        "input": text or f"Review number {place}: it was fine.",
        "references": [stars],
        "candidate": answered(new),
        "champion": answered(old),
    }


def rows(wins: int, losses: int, ties: int) -> list[dict[str, Any]]:
    """Return records of which the candidate has so many better, worse and equal."""
    pairs = [(1.0, 0.0)] * wins + [(0.0, 1.0)] * losses + [(1.0, 1.0)] * ties
    random.Random(1).shuffle(pairs)
    return [row(place, *pair) for place, pair in enumerate(pairs)]


def hostile(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return records whose every text is an attack, a word without end, or another script."""
    texts = [HOSTILE, LONG_WORD, *SCRIPTS]
    changed = []
    for place, line in enumerate(lines):
        text = texts[place % len(texts)]
        changed.append(
            {
                **line,
                "instruction": text,
                "input": text,
                "references": [text, text],
                "tags": [text[:60]],
                "candidate": {**line["candidate"], "text": text},
                "champion": {**line["champion"], "text": "\n" + text},
            }
        )
    return changed


def dataset(**changes: Any) -> Dataset:
    """Return what `prepare` would have published."""
    made = dataset_of(
        400,
        folder="runs/1/attempts/prepare-1/data",
        train_rows=1930,
        dev_rows=62,
        heldout_version=HELDOUT,
        dataset_sha256=DATA,
        duplicates=12,
        replaced=3,
        removed_heldout=2,
        near_duplicates=41,
        overlaps=(
            Overlap(
                rule="shingles",
                train_text="It was <great> food",
                heldout_text="it was great food!",
            ),
        ),
        heldout_duplicates=4,
        warnings=(Remark(code="groups", numbers={"units": 500, "groups": 300}),),
        drops=DROPS,
    )
    return made.model_copy(update=changes)


def adapter() -> Adapter:
    """Return what `train` would have published."""
    noise = random.Random(2)
    curve = [CurvePoint(step=step, loss=0.35 + 2 * 0.97**step + noise.uniform(0, 0.12)) for step in range(1, 242, 2)]
    dev = [CurvePoint(step=step, loss=0.45 + 2 * 0.965**step + step / 2400) for step in range(20, 242, 20)]
    return made_adapter(
        made_spec(Path(), "train"),
        folder="runs/1/attempts/train-1/adapter",
        adapter_sha256="ad" * 32,
        base_model_id=BASE,
        quantization="nf4",
        batch_tokens=4096,
        peak_memory_bytes=2_271_000_000,
        estimated_memory={"weights": 111_000_000, "activations": 1_251_000_000, "libraries": 629_000_000},
        epochs=2.5,
        optimizer_steps=241,
        trained_tokens=402_133,
        loss_curve=tuple(curve),
        dev_curve=tuple(dev),
        trainable_parameters=4_884_480,
        rows_too_long=7,
        versions={"torch": "2.10.0", "transformers": "5.17.0", "peft": "0.21.0"},
        seconds=4210.0,
    )


def model() -> Model:
    """Return what `merge` would have published."""
    return model_of("runs/1/attempts/merge-1/model", NEW, base_model_id=BASE, size_bytes=269_000_000, seconds=38.0)


def report(lines: Sequence[Mapping[str, Any]], **changes: Any) -> Evaluation:
    """Return what `evaluate` would have published of these records."""

    def scores(role: str, model_id: str, generated: int) -> Scores:
        means = {
            name: 100 * sum(line[role]["scores"][name] for line in lines) / max(len(lines), 1)
            for name in ("exact_match", "token_f1")
        }
        return Scores(
            model_id=model_id,
            metrics=means,
            nll=0.512 if role == "candidate" else 0.634,
            generated=generated,
            cached=len(lines) - generated,
            seconds=212.0 if generated else 0.4,
            rates={"empty": 0.0, "looping": 0.5},
            answer_tokens=2.1,
        )

    made = report_of(
        len(lines),
        folder="runs/1/attempts/evaluate-1/report",
        heldout_version=HELDOUT,
        records_too_long=1,
        batch_size=16,
        versions={"torch": "2.10.0", "device": "cpu AVX512, 2 threads"},
        candidate=scores("candidate", NEW, len(lines)),
        champion=scores("champion", OLD, 0),
        champion_generation=2,
        prediction_keys={NEW: "1f" * 32, OLD: "2f" * 32},
    )
    return made.model_copy(update=changes)


def guard(name: str, about: str, change: float | None = None, state: str = "passed", **more: Any) -> GuardResult:
    """Return a guard's result, in points unless it says otherwise."""
    fields = {
        "guard": name,
        "about": (about, 1),  # a drop and a generation, or a metric and a floor; other labels ignore the second
        "change": change,
        "state": state,
        "unit": "points",
        **more,
    }
    return GuardResult.model_validate(fields)


def _scores(champion: float, candidate: float, records: int = 400, margin: float | None = 5.0) -> dict[str, Any]:
    return {"champion": champion, "candidate": candidate, "records": records, "margin": margin}


def guards(*, failing: bool = False) -> tuple[GuardResult, ...]:
    """Return guards of every unit: passed, shown, and failed if asked."""
    lost = guard("general", "suite builtin", -27.6, "failed", **_scores(58.8, 31.2, 240), bound=-21.9, p_value=0.00001)
    return (
        guard("slice", "tag billing", 6.0, **_scores(65.0, 71.0), bound=8.1),
        guard("slice", "drop 3 (bewertungen_ü.jsonl)", -4.5, **_scores(65.5, 61.0, 100), bound=1.2, p_value=0.11),
        guard("nll", "", -0.122, **_scores(0.634, 0.512, margin=0.1), unit="nats"),
        guard("looping", "", 0.75, **_scores(0.5, 1.25, margin=2.0), unit="per cent"),
        guard("judge", "judge-7b", 20, **_scores(20, 40, 60, None), p_value=0.99, unit="records"),
        guard("general", "suite own", -7.5, "shown", **_scores(57.5, 50.0, 40)),
        guard("general_base", "suite builtin", -6.7, **_scores(56.7, 50.0, 120, 10.0), bound=-1.2, p_value=0.03),
        *([lost] if failing else []),
    )


def slices() -> tuple[SliceResult, ...]:
    """Return slices of every kind."""

    def made(kind: str, label: str, records: int, scores: tuple[float, float], **more: Any) -> SliceResult:
        new, old = scores
        fields = {"kind": kind, "label": label, "records": records, "groups": records, "candidate": new}
        return SliceResult.model_validate({**fields, "champion": old, "gain": new - old, **more})

    return (
        made("seen", "drops that the champion knows", 300, (72.0, 66.0), interval=(0.4, 11.5)),
        made("unseen", "new drops", 100, (61.0, 65.5), interval=(-15.2, 6.3)),
        made("drop", "drop 1 (reviews-2026-10.jsonl)", 300, (72.0, 66.0), interval=(0.4, 11.5)),
        made("tag", "category:food", 12, (75.0, 66.7)),
    )


def verdict(outcome: str, lines: Sequence[Mapping[str, Any]], **changes: Any) -> Verdict:
    """Return a verdict on these records, with numbers that could be true of it."""
    pairs = [tuple(line[role]["scores"]["exact_match"] for role in ("candidate", "champion")) for line in lines]
    gain = 100 * sum(new - old for new, old in pairs) / len(pairs)
    reasons = {
        "promoted": (),
        "worse": ("harm_shown", "p_above_limit", "gain_below_minimum"),
        "not_shown_better": ("p_above_limit",),
        "guard_failed": ("general_lost",),
        "contaminated": ("trained_on_heldout",),
    }
    made = Verdict.model_validate(
        {
            "outcome": outcome,
            "reasons": reasons.get(outcome, ("too_few_records",)),
            "metric": "exact_match",
            "records": len(pairs),
            "groups": len(pairs),
            "candidate_score": 100 * sum(new for new, _ in pairs) / len(pairs),
            "champion_score": 100 * sum(old for _, old in pairs) / len(pairs),
            "gain": gain,
            "interval": (gain - 5.6, gain + 5.4),
            "p_value": 0.0021 if gain > 5 else 0.21,
            "harm_p_value": 0.00001 if gain < -5 else 0.79,
            "test": "mcnemar",
            "wins": sum(new > old for new, old in pairs),
            "losses": sum(new < old for new, old in pairs),
            "ties": sum(new == old for new, old in pairs),
            "smallest_detectable_gain": 5.9,
            "records_needed": None if outcome == "promoted" else 1840,
            "guards": guards(failing=outcome == "guard_failed"),
            "blames_new_drops": outcome == "worse",
            "slices": slices(),
            "slices_not_listed": 12,
            "groups_needed": 100 if outcome == "insufficient_evidence" else None,
            "uses": 6,
            "same_set_uses": 2,
            "heldout_version": HELDOUT,
            "champion_generation": 2,
            "candidate_model_id": NEW,
            "champion_model_id": OLD,
        }
    )
    return made.model_copy(update=changes)


def early() -> tuple[Dataset, Verdict]:
    """Return data that is too little for any verdict, and the verdict that says so before training."""
    short = Shortfall(heldout_rows=31, needed_heldout_rows=100, needed_rows=460)
    data = dataset(
        shortfall=short, heldout_rows=31, heldout_groups=31, train_rows=170, dev_rows=0, warnings=(), overlaps=()
    )
    verdict = Verdict(
        outcome="insufficient_evidence",
        reasons=("too_few_records",),
        metric="exact_match",
        records=31,
        groups=31,
        groups_needed=100,
        champion_generation=0,
        champion_model_id=BASE,
    )
    return data, verdict


def judgement() -> Judgement:
    """Return what `judge` would have published."""
    other = {"records": 200, "ties": 99, "inconsistent": 22, "failed": 1}
    return judgement_of(61, 40, folder="runs/1/attempts/judge-1/judge", model="some-judge", **other)


def attempt(
    root: Path, published: Sequence[Artifact], lines: Sequence[Mapping[str, Any]] = (), run: int = 1, **gate: Any
) -> Attempt:
    """Return an attempt at `decide` in a state folder where `published` and the records lie."""
    home = root / "runs" / str(run)
    inputs = {}
    for artifact in published:
        value = json.loads(artifact.model_dump_json().replace("runs/1/", f"runs/{run}/"))
        inputs[artifact.step] = f"runs/{run}/{artifact.step}.json"
        home.mkdir(parents=True, exist_ok=True)
        durable.write_json(root / inputs[artifact.step], value)
    if any(artifact.step == "evaluate" for artifact in published):
        folder = home / "attempts" / "evaluate-1" / "report"
        folder.mkdir(parents=True)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        durable.write_bytes(folder / "records.jsonl", text.encode())
    folder = home / "attempts" / "decide-1"
    folder.mkdir(parents=True)
    config = RunConfig(track="default", base_model="/base", base_model_id=BASE, salt="s", gate=GateConfig(**gate))
    champion = ModelRef(model_id=OLD, path="models/old", generation=2)
    return Attempt(made_spec(root, "decide", config, run=run, inputs=inputs, drops=DROPS, champion=champion))


#: What each outcome's records are: how many are better, worse and equal.
FLIPS = {
    "promoted": (52, 26, 322),
    "worse": (9, 61, 330),
    "not_shown_better": (40, 33, 327),
    "guard_failed": (70, 24, 306),
    "contaminated": (160, 2, 238),
}


def case(
    root: Path,
    outcome: str,
    change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = list,
    run: int = 1,
    **gate: Any,
) -> tuple[Attempt, Verdict]:
    """Return an attempt and its verdict for `outcome`; `early` is the one without a model."""
    if outcome == "early":
        data, found = early()
        return attempt(root, [data], run=run, **gate), found
    lines = change(rows(*FLIPS[outcome]))
    seen = 38 if outcome == "contaminated" else 0
    published = [dataset(), adapter(), model(), report(lines, records_seen_by_candidate=seen), judgement()]
    return attempt(root, published, lines, run=run, **gate), verdict(outcome, lines)
