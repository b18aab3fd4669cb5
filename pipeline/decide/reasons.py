"""The reason code of each guard, and which guards speak against the drops that were new."""

from collections.abc import Mapping

#: Largest p-value of a loss that counts as harm shown, whatever the gate asks of a gain.
HARM_P_VALUE = 0.01

GUARD_REASONS: Mapping[str, str] = {
    "slice": "slice_lost",
    "general": "general_lost",
    "general_base": "general_below_base",
    "collapse": "collapsed",
    "anchor": "anchor_lost",
    "nll": "nll_rose",
    "empty": "empty_rose",
    "truncated": "truncated_rose",
    "looping": "looping_rose",
    "floor": "below_floor",
    "judge": "judge_prefers_champion",
}

#: Guards whose failure puts the drops under suspicion that the champion does not know. The others do not: general
#: abilities, cut off and looping answers come from training too much, and the rest from no data at all.
BLAMING = frozenset({"slice", "nll"})
