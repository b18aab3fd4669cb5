"""A blind review: what is asked, what a choice does, what is told when, and what waits for it."""

import json
from collections.abc import Callable
from importlib import resources
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from scipy.stats import binomtest
from sqlmodel import Session, select

from daemon.champions.blind_review import CHOSEN, Choice, Pair, Review, choose, read_pairs, sign_test
from daemon.state.tables import Event
from daemon.views.overview import Overview
from pipeline import durable
from pipeline.errors import DropforgeError
from tests import run_owner

ASKED = 6


class Reviewed:
    """A run that ended with a card, and people who judge its answers."""

    def __init__(self, made: Any, cards: Any) -> None:
        self.made, self.root = made, made.settings.state_folder
        self.overview = Overview.of(made.settings)
        run_owner.end_with_card(made, cards, "promoted", review=ASKED)
        self.card = self.root / durable.read_json(self.root / "runs/1/decide.json")["report"]
        found = durable.read_json(self.root / "runs/1/evaluate.json")["folder"]
        self.records = self.root / found / "records.jsonl"
        self.lines = {line["input"]: line for line in durable.read_jsonl(self.records)}

    def choose(self, pair: str, key: str, by: str = "ada") -> Review:
        return choose(self.made.engine, self.root, 1, Choice(pair, key, self.made.tick(), by))

    def key_for(self, pair: Pair, role: str) -> str:
        """Return the key of one model's answer, which a reviewer does not know."""
        return "1" if self.lines[pair.input][role]["text"] == pair.first else "2"

    def judge_all(self, *roles: str) -> Review:
        for pair, role in zip(self.overview.review(1).left, roles, strict=True):
            found = self.choose(pair.id, self.key_for(pair, role) if role else "0")
        return found

    def events(self) -> list[Event]:
        with Session(self.made.engine) as session:
            return list(session.exec(select(Event).where(Event.kind == CHOSEN)).all())


@pytest.fixture
def reviewed(new_workspace: Callable[[], Any], made_reports: Any) -> Reviewed:
    return Reviewed(new_workspace(), made_reports)


def test_only_answers_that_differ_are_asked_in_an_order_and_on_sides_of_a_hash(reviewed: Reviewed) -> None:
    pairs = read_pairs(reviewed.root, 1, "salt")
    assert len(pairs) == 52 + 26, "324 records were answered alike"
    assert all(pair.first != pair.second for pair in pairs)
    swapped = read_pairs(reviewed.root, 1, "another salt")
    assert [pair.id for pair in pairs] == [pair.id for pair in swapped], "the order is no secret, the sides are"
    turned = sum(one.first != other.first for one, other in zip(pairs, swapped, strict=True))
    candidate_first = sum(reviewed.key_for(pair, "candidate") == "1" for pair in pairs)
    assert 20 < turned < 58
    assert 20 < candidate_first < 58
    places = [int(pair.input.split()[2].rstrip(":")) for pair in pairs]
    assert places != sorted(places)


def test_the_result_and_whose_answer_was_whose_are_told_at_the_end_alone(reviewed: Reviewed) -> None:
    review = reviewed.overview.review(1)
    assert (review.asked, review.judged, review.awaited, len(review.left)) == (ASKED, 0, True, ASKED)
    for place, pair in enumerate(review.left[:-1]):
        review = reviewed.choose(pair.id, reviewed.key_for(pair, "candidate"))
        assert (review.judged, review.result) == (place + 1, None)
        told = review.model_dump_json()
        assert "candidate" not in told
        assert "champion" not in told
    assert durable.read_json(reviewed.card / "report.json")["review"] is None
    assert "Judged blind" not in (reviewed.card / "report.html").read_text()
    last = reviewed.overview.review(1).left[0]
    result = reviewed.choose(last.id, "0", by="bob").result
    assert result is not None
    assert (result.candidate, result.champion, result.equal, result.differing) == (5, 0, 1, 78)
    assert result.p_value == pytest.approx(2 / 2**5)
    assert result.judged_by == ("ada", "bob")


def test_the_result_stands_on_the_card(reviewed: Reviewed) -> None:
    before = durable.read_json(reviewed.card / "report.json")
    reviewed.judge_all("champion", "champion", "candidate", "", "champion", "champion")
    after = durable.read_json(reviewed.card / "report.json")
    assert {**after, "review": None} == before, "nothing else of the card changed"
    assert (after["review"]["candidate"], after["review"]["champion"], after["review"]["equal"]) == (1, 4, 1)
    schema = json.loads(resources.files("schemas").joinpath("report.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator(schema).validate(after)
    page = (reviewed.card / "report.html").read_text()
    words = "6 of the 78 records that the models did not answer alike, judged blind by ada: the new model&#39;s answer"
    assert words in page
    assert "neither in 1; p = 0.38 (two-sided exact sign test)" in page


def test_each_choice_is_an_event_and_the_first_one_of_a_pair_stands(reviewed: Reviewed) -> None:
    pair = reviewed.overview.review(1).left[0]
    reviewed.choose(pair.id, "1")
    assert reviewed.choose(pair.id, "2", by="bob").judged == 1, "sent twice, it is one choice"
    first = "candidate" if reviewed.key_for(pair, "candidate") == "1" else "champion"
    assert [one.detail for one in reviewed.events()] == [{"pair": pair.id, "first": first, "key": "1", "by": "ada"}]
    assert reviewed.events()[0].at > 0


def test_an_answer_that_is_taken_back_is_asked_again_and_only_what_stands_is_counted(reviewed: Reviewed) -> None:
    assert reviewed.overview.review(1).last is None
    first, second, *others = reviewed.overview.review(1).left
    reviewed.choose(first.id, reviewed.key_for(first, "champion"), by="eve")
    found = reviewed.choose(second.id, reviewed.key_for(second, "champion"))
    assert (found.judged, found.last) == (2, second.id)
    found = reviewed.choose(second.id, "u")
    assert (found.judged, found.last, found.left[0]) == (1, first.id, second)
    assert reviewed.choose(second.id, "u").judged == 1, "sent twice, it is one"
    found = reviewed.choose(first.id, "u")
    assert (found.judged, found.last, found.left[:2]) == (0, None, (first, second))
    for pair in (second, first, *others):
        found = reviewed.choose(pair.id, reviewed.key_for(pair, "candidate"))
    assert found.result is not None
    assert (found.result.candidate, found.result.champion, found.result.judged_by) == (ASKED, 0, ("ada",))
    assert found.result.p_value == pytest.approx(2 / 2**ASKED)


def test_once_it_is_told_who_gave_which_answer_nothing_is_taken_back(reviewed: Reviewed) -> None:
    found = reviewed.judge_all(*["candidate"] * ASKED)
    assert found.last is not None
    with pytest.raises(DropforgeError, match="what was chosen stands"):
        reviewed.choose(found.last, "u")
    assert reviewed.overview.review(1).result == found.result


def test_choices_count_for_the_answers_that_were_seen(reviewed: Reviewed) -> None:
    reviewed.choose(reviewed.overview.review(1).left[0].id, "1")
    lines = [{**line, "candidate": {**line["candidate"], "text": "new"}} for line in reviewed.lines.values()]
    reviewed.records.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert reviewed.overview.review(1).judged == 0, "evaluated again, the answers are others"


def test_the_turns_before_a_question_are_shown_their_end_if_they_are_long(reviewed: Reviewed) -> None:
    turns = [["user", "x" * 5000], ["assistant", "1"]]
    lines = [{**line, "turns": turns} for line in reviewed.lines.values()]
    reviewed.records.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    earlier = reviewed.overview.review(1).left[0].earlier
    assert earlier.startswith("…xxx")
    assert earlier.endswith("xxx\n\nassistant:\n1")
    assert len(earlier) == 4001


def test_what_cannot_be_judged_is_refused_with_a_remedy(reviewed: Reviewed) -> None:
    pair = reviewed.overview.review(1).left[0].id
    beyond = read_pairs(reviewed.root, 1, "s")[ASKED].id
    for key in "1u":
        with pytest.raises(DropforgeError, match="asks about no pair") as refused:
            reviewed.choose(beyond, key)
        assert refused.value.hint
    reviewed.records.write_text("{}\n")
    with pytest.raises(DropforgeError, match="damaged"):
        reviewed.choose(pair, "1")
    reviewed.records.unlink()
    with pytest.raises(DropforgeError, match="no scored records any more"):
        reviewed.overview.review(1)
    assert reviewed.events() == []


def test_a_damaged_card_loses_no_choice(reviewed: Reviewed) -> None:
    (reviewed.card / "report.json").write_text("[]")
    with pytest.raises(DropforgeError, match="the data of the card"):
        reviewed.judge_all(*["candidate"] * ASKED)
    assert reviewed.overview.review(1).judged == ASKED


def test_models_that_answer_alike_leave_nothing_to_judge(reviewed: Reviewed) -> None:
    lines = [{**line, "candidate": line["champion"]} for line in reviewed.lines.values()]
    reviewed.records.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    review = reviewed.overview.review(1)
    assert (review.asked, review.left) == (0, ())
    assert review.result is not None
    assert review.result.p_value == 1.0


@pytest.mark.parametrize(("wins", "losses"), [(5, 5), (3, 17), (540, 460)])
def test_the_p_value_is_that_of_scipy(wins: int, losses: int) -> None:
    peer = binomtest(wins, wins + losses)
    assert sign_test(wins, losses) == pytest.approx(peer.pvalue, abs=1e-12)
