"""
Blind review: people compare both models' answers to held-out prompts, and do not know whose answer is whose.

In: the scored records of a run, and a choice for each pair. Out: an event a choice, and at the end the counts
with an exact sign test, on the run's card too. `pairs` draws and shuffles, `blind_review` counts and is what commands
and pages call. Open `blind_review` first.
"""
