"""
Blind review: people compare both models' answers to held-out prompts without knowing which model gave which.

One hash draws the pairs, another one decides which answer is shown first. Each choice is an event; after the last one
the counts are shown with an exact sign test, and added to the run's report.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from daemon.state import run_files
from daemon.state.questions import CHOICES
from daemon.system.folders import WorkFolder
from pipeline import durable
from pipeline.artifacts import JSON_NAME, RECORDS_NAME, Evaluation, Frozen
from pipeline.errors import DropforgeError
from pipeline.models.template import transcript
from pipeline.report.facts import BlindReview
from pipeline.words import cut_start

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlmodel import Session

    from daemon.state.tables import Run

Side = Literal["candidate", "champion"]
_ID_CHARACTERS = 16
#: Most characters of the turns before a question that are shown.
MOST_CHARACTERS = 4000
#: Keys of a choice: the first answer is better, the second one is, neither is.
KEYS = ("1", "2", "0")
#: Key that takes a choice back; the pair is shown again.
UNDO = "u"
#: Number of pairs to judge if `gate.review` is not set.
ASKED = 20
#: `Event.kind` of a choice; its detail has the pair, the model whose answer was shown first, the key and the user.
CHOSEN = "answer_chosen"


class Pair(Frozen):
    """Both models' answers to one held-out prompt, without saying which model gave which."""

    id: str
    earlier: str = ""
    """The turns before the question; of a long text the end."""
    instruction: str
    input: str
    first: str
    second: str


class Review(Frozen):
    """Progress of a blind review: the pairs left to judge, and the result once all pairs are judged."""

    run: int
    asked: int
    """Number of pairs to judge: `gate.review` or `ASKED`, or fewer if fewer answers differ."""
    judged: int
    awaited: bool
    """Whether the run can be approved only after the review, since `gate.review` is set."""
    left: tuple[Pair, ...]
    """Pairs that are not judged yet, in the order in which they are shown."""
    last: str | None
    """Id of the pair that was judged last and not taken back; `None` if no pair is judged."""
    result: BlindReview | None = None


@dataclass(frozen=True)
class Choice:
    """A person's judgement of one pair."""

    pair: str
    key: str
    """One of `KEYS`, or `UNDO`."""
    at: int
    by: str


def review_of(
    work_folder: WorkFolder, run_id: int, config: Mapping[str, Any] | None, chosen: Iterable[Mapping[str, Any]]
) -> Review:
    """
    Return a run's review from its configuration `config` and the details `chosen` of its `CHOSEN` events, oldest first.

    It has a result only if no pair is left. Raises `DropforgeError` if the run's scored records are missing or damaged.
    """
    pairs = read_pairs(work_folder, run_id, str((config or {}).get("salt", "")))
    wanted = _wanted(config)
    asked = {pair.id: pair for pair in pairs[: wanted or ASKED]}
    made: dict[str, Mapping[str, Any]] = {}
    for choice in chosen:
        if choice["key"] == UNDO:
            made.pop(choice["pair"], None)
        elif choice["pair"] in asked:
            made[choice["pair"]] = choice
    left = tuple(pair for name, pair in asked.items() if name not in made)
    return Review(
        run=run_id,
        asked=len(asked),
        judged=len(made),
        awaited=wanted > 0,
        left=left,
        last=next(reversed(made), None),
        result=None if left else _result(list(made.values()), len(pairs)),
    )


def choose(engine: "Engine", work_folder: WorkFolder, run_id: int, choice: Choice) -> Review:
    """
    Record a choice and return the updated review; after the last choice add the result to the run's report.

    A second choice on the same pair is ignored until the first one is undone, an `UNDO` without a choice as well.
    Raises `DropforgeError` for an unknown run, pair or key, for a run that has not ended or has no scored records, for
    an `UNDO` after the last choice, and, with the choice recorded, if the report is damaged.
    """
    from daemon.queue.states import known_run  # noqa: PLC0415 - the views, which only read, load no SQLAlchemy
    from daemon.state.database import transaction  # noqa: PLC0415
    from daemon.state.events import record_event  # noqa: PLC0415

    undo = choice.key == UNDO
    if choice.key not in KEYS and not undo:
        message = f"{choice.key!r} is no choice"
        hint = "choose 1 (the first answer is better), 2 (the second is) or 0 (neither); u takes a choice back"
        raise DropforgeError(message, hint)
    with transaction(engine) as session:
        run = known_run(session, run_id)
        if run.ended_at is None:
            message = f"run {run_id} has not ended, and may still make other answers"
            raise DropforgeError(message, f"see how far it is: dropforge show {run_id}")
        review = _review(session, work_folder, run)
        is_left = choice.pair in {pair.id for pair in review.left}
        if not is_left and choice.pair not in {made["pair"] for made in _chosen(session, run_id)}:
            message = f"run {run_id} asks about no pair {choice.pair}"
            raise DropforgeError(message, f"see which pairs are left: dropforge review {run_id} --json")
        if undo and review.result is not None:
            message = f"the review of run {run_id} has told whose answers were whose: what was chosen stands"
            raise DropforgeError(message, f"see what came of it: dropforge review {run_id}")
        if is_left != undo:  # else it is sent a second time
            first = first_side(choice.pair, str((run.config or {})["salt"]))
            about: dict[str, Any] = {"pair": choice.pair, "first": first, "key": choice.key, "by": choice.by}
            record_event(session, CHOSEN, choice.at, track=run.track, run_id=run_id, **about)
            review = _review(session, work_folder, run)
    if review.result is not None:
        put_on_card(work_folder, run_id, review.result)
    return review


def require_reviewed(session: "Session", work_folder: WorkFolder, run: "Run") -> None:
    """Raise `DropforgeError` if `run` has `gate.review` set and its blind review is incomplete or cannot be read."""
    if not _wanted(run.config):
        return
    review = _review(session, work_folder, run)
    if review.left:
        message = f"run {run.id} waits for its blind review: {review.judged} of {review.asked} pairs are judged"
        raise DropforgeError(message, f"judge the others: dropforge review {run.id}")


def _wanted(config: Mapping[str, Any] | None) -> int:
    return int((config or {}).get("gate", {}).get("review", 0))


def put_on_card(work_folder: WorkFolder, run_id: int, result: BlindReview) -> None:
    """Add a review's result to the run's report, if there still is one. Raises `DropforgeError` if that is damaged."""
    from pipeline.report.page import add_review  # noqa: PLC0415 - a quick start

    verdict = run_files.load_verdict(work_folder, run_id)
    folder = work_folder / verdict.report if verdict is not None and verdict.report else None
    if folder is None or not (folder / JSON_NAME).exists():
        return  # it was cleared away
    try:
        add_review(folder, result)
    except ValueError as error:
        message = f"the data of the card of run {run_id} is damaged: {folder / JSON_NAME}"
        hint = f"bring it back from a backup, then: dropforge review {run_id}; all choices are kept"
        raise DropforgeError(message, hint) from error


def read_pairs(work_folder: WorkFolder, run_id: int, salt: str) -> list[Pair]:
    """
    Return the pairs of answers in which the two models differ, in the order in which they are to be judged.

    Order and sides follow from hashes, the sides also from the track's `salt`: they are the same every time. Raises
    `DropforgeError` if the run's scored records are missing or damaged.
    """
    scores = run_files.load_evaluation(work_folder, run_id)
    path = None if scores is None else work_folder / scores.folder / RECORDS_NAME
    if scores is None or path is None or not path.is_file():
        message = f"run {run_id} has no scored records" + ("" if scores is None else " any more")
        raise DropforgeError(message, f"see how far it is, and how it ended: dropforge show {run_id}")
    try:
        pairs = [pair for line in durable.read_jsonl(path) if (pair := _pair(scores, line, salt)).first != pair.second]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        message = f"the scored records of run {run_id} are damaged: {path}"
        raise DropforgeError(message, f"bring {path.relative_to(work_folder)} back from a backup") from error
    return sorted(pairs, key=lambda pair: pair.id)


def first_side(pair_id: str, salt: str) -> Side:
    """Return which model's answer is shown first in a pair, always the same for a pair id and a track's `salt`."""
    return "candidate" if _hash("side", pair_id, salt)[0] in "02468ace" else "champion"


def _pair(scores: Evaluation, line: Mapping[str, Any], salt: str) -> Pair:
    answers: dict[Side, str] = {"candidate": line["candidate"]["text"], "champion": line["champion"]["text"]}
    about = (scores.candidate.model_id, scores.champion.model_id, line["id"], *answers.values())
    name = _hash("pair", *about)[:_ID_CHARACTERS]
    first: Side = first_side(name, salt)
    second: Side = "champion" if first == "candidate" else "candidate"
    earlier = cut_start(transcript(line.get("turns", ())), MOST_CHARACTERS)
    shown = {"earlier": earlier, "instruction": line["instruction"], "input": line["input"]}
    return Pair(id=name, **shown, first=answers[first].strip(), second=answers[second].strip())


def _hash(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _result(chosen: list[Mapping[str, Any]], differing: int) -> BlindReview:
    decided = [choice for choice in chosen if choice["key"] != "0"]
    wins = sum((choice["key"] == "1") == (choice["first"] == "candidate") for choice in decided)
    losses = len(decided) - wins
    return BlindReview(
        differing=differing,
        candidate=wins,
        champion=losses,
        equal=len(chosen) - len(decided),
        p_value=sign_test(wins, losses),
        judged_by=tuple(sorted({str(choice["by"]) for choice in chosen})),
    )


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided p-value of the exact sign test (Arbuthnott 1710) without ties; 1 for no pairs."""
    pairs = wins + losses
    return min(1.0, 2 * sum(math.comb(pairs, k) for k in range(max(wins, losses), pairs + 1)) / (1 << pairs))


def _review(session: "Session", work_folder: WorkFolder, run: "Run") -> Review:
    return review_of(work_folder, run.id or 0, run.config, _chosen(session, run.id or 0))


def _chosen(session: "Session", run_id: int) -> list[Mapping[str, Any]]:
    from daemon.state.database import rows_of  # noqa: PLC0415 - as above
    from daemon.state.tables import Event  # noqa: PLC0415

    return [row.detail for row in rows_of(session, Event, CHOICES, run=run_id)]
