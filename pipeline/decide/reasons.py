"""What a verdict's reason codes mean to a person, and what each guard says and advises where it fails."""

from collections.abc import Mapping
from dataclasses import dataclass

#: Largest p-value of a loss that counts as harm shown, whatever the gate asks of a gain.
HARM_P_VALUE = 0.01
#: Rows of general text that are a start against forgetting, as a share of the task's.
GENERAL_SHARE = 0.2


@dataclass(frozen=True)
class Failure:
    """What a failed guard means to a person."""

    reason: str
    remedy: str = ""
    command: str = ""
    """For the remedy; `{track}` is the option that names the track."""
    found: str = "What it loses"
    """What the guard found; other words where this model may have lost nothing itself."""
    blames: bool = False
    """Whether new drops come under suspicion; else training too much is to blame, or no data at all."""


GUARDS: Mapping[str, Failure] = {
    "slice": Failure(
        "slice_lost",
        "Drop more rows of that kind, or withdraw the drop that spoils it; guards.slices is the margin.",
        blames=True,
    ),
    "general": Failure("general_lost"),  # `pipeline.report.next_steps` has its remedy, with numbers
    "general_base": Failure(
        "general_below_base",
        "Add general rows: they bring back what was lost; guards.general_base is the margin. Or let the champion "
        "before today's serve again, if it lost less.",
        "dropforge rollback{track} --reason TEXT",
        "What was lost since the base model, earlier champions included",
    ),
    "collapse": Failure(
        "collapsed", f"Mix general rows into the training (train.general_rows = {GENERAL_SHARE:g}, or more)."
    ),
    "anchor": Failure(
        "anchor_lost",
        "Drop more rows of that old kind to bring back what was lost; guards.anchor is the margin. Or let the champion "
        "that was better on it serve again.",
        "dropforge rollback{track} --to GENERATION --reason TEXT",
        "What was lost since a former champion, by all since then",
    ),
    "nll": Failure(
        "nll_rose",
        "Train less or on cleaner answers (train.epochs, train.learning_rate); guards.nll is the margin.",
        blames=True,
    ),
    "empty": Failure("empty_rose", "Look for empty answers in the new drops; guards.degenerate is the margin."),
    "truncated": Failure("truncated_rose", "Look for long answers in the new drops, or raise evaluate.max_new_tokens."),
    "looping": Failure(
        "looping_rose", "Train less or set evaluate.repetition_penalty; guards.degenerate is the margin."
    ),
    "floor": Failure(
        "below_floor",
        "Drop more rows that the floor is scored on, lower it, or take it out (guards.floors).",
        found="What is not reached",
    ),
    "judge": Failure(
        "judge_prefers_champion",
        "Read the answers that changed, in the report, and see whether the judge is right.",
        found="What the judge says",
    ),
}

#: What each other code of a verdict's reasons means. `gain_from_new_data` is all that a promoted verdict can have.
REASONS: Mapping[str, str] = {
    "trained_on_heldout": "The new model was trained on records that it was to be judged on.",
    "no_pinned_heldout": "The gate is to judge on a held-out set of your own, and none was dropped.",
    "too_few_seen": "Too few held-out records of drops that the champion knows.",
    "too_few_records": "There are too few held-out records for a verdict.",
    "harm_shown": "The loss is larger than chance would explain.",
    "nll_not_finite": "The new model's likelihood of the expected answers is not a number: it is broken.",
    "p_above_limit": "The gain could well be chance.",
    "gain_below_minimum": "The gain is smaller than the settings ask for.",
    "gain_from_new_data": "The gain is only there on records of drops that the champion never saw.",
}
