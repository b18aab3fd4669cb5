"""
The table of steps, in their order: prepare, train, merge, evaluate, judge (optional), decide.

Each step is `step.py` in a folder of its name, with a function of the same name: from an `Attempt` (a spec and the
artifacts of earlier steps) to one artifact. Steps never import each other. To add one, write its folder, its artifact
and a line in `STEPS`.
"""

from collections.abc import Collection, Mapping

from pipeline.artifacts import Adapter, Dataset, Evaluation, Judgement, Model, Preview, Verdict
from pipeline.config import RunConfig
from pipeline.contract import Step

STEPS = (
    Step("prepare", Dataset),
    Step("train", Adapter, needs_gpu=True),
    Step("merge", Model),
    Step("evaluate", Evaluation, needs_gpu=True),
    Step("judge", Judgement, network=True, wanted=lambda config: bool(config.judge.url)),
    Step("decide", Verdict),
)
BY_NAME: Mapping[str, Step] = {step.name: step for step in STEPS}
#: It is in no run: the champion answers records of a drop that waits for one.
PREVIEW = Step("preview", Preview)


def next_step(published: Collection[str], dataset: Dataset | None, config: RunConfig) -> Step | None:
    """
    Return the first of the run's steps whose name is not in `published`, or `None` if all are.

    `judge` is a step only if `judge.url` is set. With too little data for any verdict (`dataset`, `None` before
    `prepare`) the run skips from `prepare` to `decide`, to save the training. With manual approval the model is made
    all the same, as it may be wanted without a verdict; it is evaluated if there are held-out rows.
    """
    wanted = tuple(step for step in STEPS if step.wanted(config))
    if dataset is not None and dataset.shortfall is not None:
        if config.gate.approval == "auto":
            wanted = (BY_NAME["prepare"], BY_NAME["decide"])
        elif dataset.heldout_rows == 0:
            wanted = tuple(BY_NAME[name] for name in ("prepare", "train", "merge", "decide"))
    return next((step for step in wanted if step.name not in published), None)
