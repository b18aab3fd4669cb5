"""
The gate's policy: every threshold with its reason, and every guard as one row.

Settings that a user may change have their defaults in `pipeline.config` (`GateConfig`, `GuardConfig`); here is what
nobody sets. Where a row of `bench/gate.py` shows what a number does, it is quoted. Numbers and texts only: the daemon
imports this module, so it loads neither numpy nor scipy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.artifacts import GuardResult, Preview, TrialScores, Verdict

# --- the gate

#: Largest p-value at which a loss counts as harm shown, whatever limit the gate has for a gain, and at which a failed
#: guard blames new drops if the candidate did not win. At .005, .01 and .02 a drop that cost an old one 15 points was
#: suspended in 26, 33 and 39 of 100 months, one that cost all 10 in 93, 96 and 97, with 3.8, 3.9 and 4.2 further runs.
#: Rows "-15 on one old drop" and "a -10 drop in night 5".
HARM_P_VALUE = 0.01
#: Largest p-value at which the drop of a trial is suspended, compared with its control. Where trainings differ in
#: quality by 2 points, .51 of thirty drops that teach nothing were suspended at .01, .36 at .005, .23 at .002; of drops
#: that cost 15 points on an old one 33, 28 and 24 of 100. Rows "drops that teach nothing, seeds differ by" and
#: "-15 on one old drop".
SUSPENSION_P_VALUE = 0.005
#: With one record of -1 added, a gain may have a p-value larger by this factor: .05 at a limit of .01. A sample may
#: hold none of the losses if they are rare and large. Row "200 records, 1.2 % lose all and the others gain as much".
WITH_ONE_LOSS_MORE = 5

# --- the guards

#: Level of the guards whose harm may be shown without a loss beyond the margin, and of the one-sided bounds.
LEVEL = 0.05
#: Level of the guards that fail only if the change is also beyond their margin. Without a test of its own such a guard
#: blocked 7 to 9 of 100 good candidates by noise.
SURE = 0.01
#: On fewer groups nothing is tested, only displayed; the exact test of a binary metric needs only `LEAST_EXACT`, with
#: which the smallest p-value is 1 / 256. Row "+5 on 39 drops of 25 records, -50 on one".
LEAST_TESTED = 30
LEAST_EXACT = 8
#: Fewest groups on which a slice's loss or a likelihood's rise beyond its margin fails without a test.
#: Row "five drops, a winner (+10) truly lost 10 on one".
LEAST_FOR_MARGIN = 100
#: From so many slices of 100 groups on, a loss beyond the margin must also be significant by itself: of many losses the
#: largest is often large by chance. Row "+5 everywhere, 20 drops of 100 records".
MANY = 6
#: Drops and tags with fewer than `LEAST_EXACT` records are listed up to this many: the newest drops, the largest tags.
MOST_SMALL = 50
#: Records of each drop in the core, which all champions answer: the anchor is tested on `LEAST_TESTED` of them, and
#: some are left out or change drops.
CORE_OF_DROP = 40
#: Largest share of the scored records in the core; the others change with each champion, which won on them by luck.
CORE_SHARE = 1 / 3

#: Former champions whose best is the anchor on each old drop.
FORMER = 3

# --- a champion on watch (`pipeline.decide.watch`, `bench/watch.py`)

#: Evidence at which a person is told, and a return is proposed: of 100 watches of equal champions one reaches 100.
WATCH_NOTICE, WATCH_RETURN = 20, 100
#: Nights between two starts of the count. A champion that was 5 points better for 60 nights and is 5 points worse since
#: is found after 134 nights, without further starts after 247.
WATCH_START = 30
#: A later former champion takes the place at this evidence, or after so many nights. With a new one for each champion a
#: loss of 10 points was found in 14 of 100 months at most, so in 94.
WATCH_END, WATCH_NIGHTS = 1 / 20, 90

# --- trials and previews of drops

#: Weight of the champion's score beside that of its control, which was trained on the same drops and, unlike the
#: champion, not chosen for its answers to these records. At 1/2 a drop of a new kind won after a champion that had just
#: won in 87 of 100 cases, at 1/4 in 91. Row "the champion has just won by 5 points".
CHAMPION_SHARE = 0.25

#: A drop's agreement is far below the usual if it is under this share of the champion's score on held-out records
#: of its own drops. If that is 50 or more, a drop of their kind is so by chance in one of 300 cases at most: binomial,
#: `LEAST_TESTED` records, fewer are not compared. A new kind of task is, too, so nothing but a warning follows.
FAR_BELOW = 0.5

# --- what the card states and advises

#: Share of the draws in which the smallest gain must be promoted. Row "true power at a card's smallest gain".
POWER = 0.8
#: Draws of the simulation of the smallest gain; the standard error of `POWER` is then 3 percentage points.
DRAWS = 200
#: Of the gain's interval: each side errs as often as the gate does at its default limit.
CONFIDENCE = 0.98
#: No advice asks for more held-out records than this, nor for more than this multiple of today's.
MOST_RECORDS = 1_000_000
MOST_TIMES = 10
#: Rows of general text that are a start against forgetting, as a share of the task's: what `train.replay` has of old
#: rows by default.
GENERAL_SHARE = 0.2


def exceeds(value: float, limit: float) -> bool:
    """Return whether a mean is above a limit by more than 1e-9, as a mean may miss its value in the last bits."""
    return value > limit + 1e-9


@dataclass(frozen=True)
class Guard:
    """What one guard tests, whether its failure blames the new drops, its words and its remedy."""

    reason: str
    """Its code among a verdict's reasons."""
    tests: str
    """What was measured; the fields are filled with a result's `about`."""
    remedy: str
    """Next steps, one a line; the report fills the fields in (`pipeline.report.next_steps`)."""
    command: str = ""
    """For the last step, with a field for the track."""
    level: float = SURE
    """Largest p-value at which harm counts as shown."""
    unit: Literal["points", "nats", "per cent", "records"] = "points"
    blames: Literal["never", "always", "with a win", "without a win"] = "never"
    """When a failure puts new drops under suspicion; otherwise the model was trained too much."""
    forgets: bool = False
    """Whether it fails if a model forgets, as one may that is trained from the champion."""
    compared_with: str = ""
    """The model that is compared in the champion's place."""
    words: str = ""
    """What was found, of a result's fields; by default the change and the limit."""
    heading: str = "What it loses"
    """Before these words; others where this model may have lost nothing itself."""

    @property
    def sign(self) -> int:
        """-1 for a guard in per cent, where less is better, else 1; `nll` and `collapse`, tested apart, use no sign."""
        return -1 if self.unit == "per cent" else 1


#: Each has a row of its name in `bench/gate.py`: what it costs good candidates, and how many bad ones it stops; only
#: `collapse`, which blocks nothing by default, has `bench/collapse.py`. docs/gate.md has the results.
GUARDS: Mapping[str, Guard] = {
    "slice": Guard(
        "slice_lost",
        "{}",
        "Drop more rows of that kind, or withdraw the drop that spoils it; guards.slices is the margin.",
        level=LEVEL,
        blames="always",
        forgets=True,
    ),
    "general": Guard(
        "general_lost",
        "{}",
        "General abilities fell: {fell} (the limit is {margin}, guards.general). Train less: lower "
        "train.epochs{epochs} or train.learning_rate{rate}.\n"
        "Or drop general questions with their answers beside your rows, one to each five (about {rows}): more rows of "
        "the task do not help.",
        forgets=True,
    ),
    "general_base": Guard(
        "general_below_base",
        "{} against the base model",
        "Add general rows: they bring back what was lost; guards.general_base is the margin. Or let the champion "
        "before today's serve again, if it lost less.",
        "dropforge rollback --track {track} --reason TEXT",
        forgets=True,
        compared_with="the base model",
        heading="What was lost since the base model, earlier champions included",
    ),
    "collapse": Guard(
        "collapsed",
        "{} without a real answer",
        f"Mix general rows into the training (train.general_rows = {GENERAL_SHARE:g}, or more).",
        unit="records",
        compared_with="the base model",
        words="{candidate:g} of {records}, {champion:g} of the base model's",
    ),
    "anchor": Guard(
        "anchor_lost",
        "{} against the champion of generation {}",
        "Drop more rows of that old kind to bring back what was lost; guards.anchor is the margin. Or let the champion "
        "that was better on it serve again.",
        "dropforge rollback --track {track} --to GENERATION --reason TEXT",
        level=LEVEL,
        blames="with a win",
        forgets=True,
        heading="What was lost since a former champion, by all since then",
    ),
    "nll": Guard(
        "nll_rose",
        "negative log-likelihood of the references",
        "Train less (train.epochs, train.learning_rate); guards.nll is the margin.",
        level=LEVEL,
        unit="nats",
        # Good data raises it, too, where a winner is trained too much.
        blames="without a win",
        forgets=True,
    ),
    **{
        kind: Guard(f"{kind}_rose", f"{kind} answers", remedy, unit="per cent")
        for kind, remedy in {
            "empty": "Look for empty answers in the new drops; guards.degenerate is the margin.",
            "truncated": "Look for long answers in the new drops, or raise evaluate.max_new_tokens.",
            "looping": "Train less or set evaluate.repetition_penalty; guards.degenerate is the margin.",
        }.items()
    },
    "floor": Guard(
        "below_floor",
        # It has the limit, which is the floor; the change is the distance to it.
        "{}, at least {:g}",
        "Drop more rows that the floor is scored on, lower it, or take it out (guards.floors).",
        words="{candidate:.1f} points",
        heading="What is not reached",
    ),
    "judge": Guard(
        "judge_prefers_champion",
        "answers that {} prefers",
        "Read the answers that changed, in the report, and see whether the judge is right.",
        level=LEVEL,
        unit="records",
        words="{candidate:g} of the new model's, {champion:g} of the champion's",
        heading="What the judge says",
    ),
}


#: After the label of a result, by its `note`.
NOTES: Mapping[str | None, str] = {
    None: "",
    "too_few": ", on too few records to decide",
    "not_below_champion": ", no further below it than the champion",
}


def label(result: GuardResult) -> str:
    """Return what a guard measured, in words, as `token F1` or `drop 3 (answers.jsonl)`, and its note, if any."""
    return GUARDS[result.guard].tests.format(*result.about) + NOTES[result.note]


def is_shown(result: GuardResult) -> bool:
    """Return whether a guard's result shows harm: its p-value is at most the guard's level."""
    return result.p_value is not None and result.p_value <= GUARDS[result.guard].level


def is_beyond(result: GuardResult) -> bool:
    """Return whether a guard's result is a loss beyond its margin."""
    return exceeds(-GUARDS[result.guard].sign * (result.change or 0.0), result.margin or 0.0)


def is_far_below(preview: Preview) -> bool:
    """Return whether an agreement is far below the usual score; false without both or `LEAST_TESTED` records."""
    if preview.points is None or preview.usual is None or preview.records < LEAST_TESTED:
        return False
    return preview.points < FAR_BELOW * preview.usual


def is_doubt(verdict: Verdict) -> bool:
    """Return whether the candidate won, and only guards of old drops failed."""
    wins = {"p_above_limit", "gain_below_minimum"}.isdisjoint(verdict.reasons)
    failed = [GUARDS[row.guard] for row in verdict.guards if row.state == "failed"]
    return (
        verdict.outcome == "guard_failed" and wins and all(guard.blames in {"always", "with a win"} for guard in failed)
    )


def suspends(scores: TrialScores) -> bool:
    """
    Return whether a drop is suspended: its trial was significantly worse than the control, too.

    If it was not, the champion may have been lucky on these records.
    """
    return scores.p_value <= SUSPENSION_P_VALUE
