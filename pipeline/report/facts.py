"""
What the evidence card says, as data: `report.json`, which the page shows and nothing else.

`schemas/report.schema.json` is made from it (`make schemas`).
"""

from typing import Any, Literal

from pipeline.artifacts import Adapter, AnswerPair, Dataset, Drop, Evaluation, Frozen, Judgement, Model, Stored, Verdict


class NextStep(Frozen):
    """An action that a person may take now."""

    words: str
    command: str | None = None
    """Command line for the action; `None` if there is none."""

    @property
    def line(self) -> str:
        """The words, then a colon and the command if there is one."""
        return f"{self.words.rstrip('.')}: {self.command}" if self.command else self.words


class Story(Frozen):
    """The verdict for a person who does not read statistics."""

    headline: str
    why: tuple[str, ...]
    next_steps: tuple[NextStep, ...]


class Answer(Frozen):
    """One model's answer to one record."""

    text: str
    """The answer; a long one is cut to its beginning."""
    characters: int
    """Length of the whole answer, in characters."""
    score: float
    """Score by the primary metric, in points."""
    degenerate: tuple[str, ...] = ()
    """Kinds of degeneration found: empty, truncated, looping."""


class Example(Frozen):
    """One held-out record with both answers; long texts are cut to their beginning."""

    id: str
    drop: int
    tags: tuple[str, ...] = ()
    earlier: str = ""
    """The turns before the question, with the data's answers; of a long text the end."""
    instruction: str
    input: str
    references: tuple[str, ...]
    candidate: Answer
    champion: Answer
    difference: float
    """Score of the candidate's answer minus that of the champion's, in points."""


class BlindReview(Frozen):
    """The result of a blind review: which answers people preferred without knowing the model."""

    differing: int
    """Number of held-out records on which the answers differ; a hash draws the judged ones from them."""
    candidate: int
    """Number of judged records whose better answer is the candidate's."""
    champion: int
    """Number of judged records whose better answer is the champion's."""
    equal: int
    """Number of judged records with equally good answers."""
    p_value: float
    """P-value of the two-sided exact sign test; records judged equal are left out."""
    judged_by: tuple[str, ...]
    """Users who judged."""


class Report(Stored):
    """The evidence behind one verdict; steps that did not run are `None`."""

    version: Literal[1] = 1
    run: int
    track: str
    story: Story
    metric_title: str
    """Name of the primary metric in a sentence."""
    verdict: Verdict
    drops: tuple[Drop, ...]
    """Drops in the run's snapshot, with their hashes."""
    dataset: Dataset
    adapter: Adapter | None = None
    model: Model | None = None
    evaluation: Evaluation | None = None
    judgement: Judgement | None = None
    review: BlindReview | None = None
    """Result of the blind review; `None` until its last pair is judged."""
    regressions: tuple[Example, ...] = ()
    """Records that the candidate answered worse, the worst first."""
    gains: tuple[Example, ...] = ()
    """Records that the candidate answered better, the best first."""
    lost_pairs: tuple[AnswerPair, ...] = ()
    """Of a trial that was worse, older records that it lost, with the most similar rows of the drop that it tried."""
    settings: dict[str, Any]
    """The run's configuration, as its steps received it."""
