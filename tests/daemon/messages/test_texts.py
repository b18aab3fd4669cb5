"""What each kind of message says, from events that the daemon's own functions left."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlmodel import col, delete, select

from daemon.messages.texts import Text, text_of
from daemon.queue.attempt_ends import Then
from daemon.state.clauses import Suspension, drop_clauses
from daemon.state.database import transaction
from daemon.state.events import record_event
from daemon.state.states import AWAITING, PromotionKind
from daemon.state.tables import Drop, Event, Promotion, Run
from pipeline.artifacts import TrialScores
from pipeline.decide.explain import brief
from pipeline.errors import EXIT_UNFORESEEN
from tests import run_owner


def told(lived_in: Any) -> list[Text]:
    """Return what the workspace's events are told by at once."""
    with transaction(lived_in.engine) as session:
        events = session.exec(select(Event).order_by(col(Event.id))).all()
        texts = [text_of(session, event) for event in events]
    return [text for text in texts if text is not None]


def event(lived_in: Any, kind: str, **about: Any) -> Text:
    """Return the message of an event that is recorded now."""
    with transaction(lived_in.engine) as session:
        record_event(session, kind, lived_in.tick(), **about)
    (*_, text) = told(lived_in)
    return text


def changed(lived_in: Any, kind: str, about: PromotionKind, **fields: Any) -> Text:
    """Return the message of a change of champion that is recorded now, as generation 2 of the workspace's track."""
    with transaction(lived_in.engine) as session:
        session.exec(delete(Promotion).where(col(Promotion.generation) == 2))
        made = {"generation": 2, "model_id": "m", "model_path": "models/a", "created_at": 1, **fields}
        session.add(Promotion(track="default", kind=about, **made))
    return event(lived_in, kind, track="default", generation=2)


def test_a_promotion_says_what_was_gained_and_how_to_undo_it(lived_in: Any) -> None:
    promoted, *others = told(lived_in)
    assert [text.kind for text in others] == ["drop_rejected", "run_failed"], "the rest is left to the digest"
    assert promoted == Text(
        "promoted",
        "success",
        "[dropforge] PROMOTED: default, generation 1",
        "promoted: +40.0 points (+28.5 to +51.5)\n"
        "it is the model of run 1\n"
        "the evidence: dropforge report 1\n"
        "to go back to the model before: dropforge rollback --track default --reason TEXT",
    )

    with transaction(lived_in.engine) as session:
        change = session.exec(select(Promotion).where(Promotion.generation == 1)).one()
        change.approved_by, change.reason = "anna", "it is time"
        change.verdict = brief(run_owner.judged("promoted", 9.0, slices_not_listed=2))
    said = ["promoted: +9.0 points", "not guarded: 2 small drops or tags", "approved by anna", "it is time"]
    assert told(lived_in)[0].body.splitlines()[:4] == said


def test_a_rejected_drop_is_told_by_its_findings_and_no_row_of_it(lived_in: Any) -> None:
    lived_in.take(
        "odd.jsonl", '{"instruction": "SECRET ROW"}\n{"instruction": "SECRET", "output": 5}\n{broken SECRET\n'
    )
    (*_, rejected) = told(lived_in)
    assert (rejected.level, rejected.title) == ("warning", "[dropforge] REJECTED: default, odd.jsonl")
    first, found, wrong, what, where = rejected.body.splitlines()
    assert first.startswith("the file: odd.jsonl, drop 7, dropped by ")
    assert (wrong, what) == ("line 1: output is missing", 'what to do: add the key "output" with a text')
    assert found == "3 findings in 3 rows (1 missing, 1 type, 1 json)"
    assert where == "each with its line and what to do: beside the file, in rejected/"
    assert "SECRET" not in rejected.body


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ('{"instruction": "a", "output": 987123}', "output is a number, not a text"),
        ('"SECRET 987123"', "a record is an object, this is a text"),
        ('{"instruction": "a", "987123": 1, "987123": 2}', "a key stands twice in one object"),
        ('{"instruction": "a", "output": 1e987123}', "a number is too large"),
        ('{"prompt": "a", "output": "b"}', 'instruction is missing, but there is "prompt"'),
    ],
)
def test_the_message_on_a_rejected_drop_has_the_kind_of_its_error_without_its_data(
    new_workspace: Callable[[], Any], row: str, wrong: str
) -> None:
    made = new_workspace()
    made.take("odd.jsonl", f"{row}\n")
    (rejected,) = told(made)
    assert rejected.body.splitlines()[2] == f"line 1: {wrong}"
    assert "987123" not in rejected.body


def test_a_failed_run_says_where_why_and_what_to_do(lived_in: Any) -> None:
    failed = next(text for text in told(lived_in) if text.kind == "run_failed")
    assert failed.title == "[dropforge] FAILED: default, run 2"
    assert failed.body.splitlines() == [
        "it was given up at step train, after 1 failure, interruptions not counted",
        "the last error: out of memory",
        "more: dropforge show 2, dropforge logs 2",
        "to go on where it stopped: dropforge retry 2",
    ]


def test_the_text_of_an_exception_that_nobody_foresaw_is_not_told(new_workspace: Callable[[], Any]) -> None:
    made = new_workspace()
    made.take("a.jsonl", '{"instruction": "a", "output": "b"}\n')
    claim = made.claim()
    error = "ValueError: row 'SECRET' is too long"
    run_owner.leave(made.engine, claim, made.tick(), Then.FAIL, error=error, exit_code=EXIT_UNFORESEEN)
    (failed,) = told(made)
    assert "the last error: an unforeseen exception\n" in failed.body
    assert "SECRET" not in failed.body


def test_a_run_whose_processes_vanish_is_told_once_it_is_given_up(new_workspace: Callable[[], Any]) -> None:
    made = new_workspace()
    made.take("a.jsonl", '{"instruction": "a", "output": "b"}\n')
    claim = made.claim()
    made.attempt(claim, "train", None)
    run_owner.leave(made.engine, claim, made.tick(), Then.DIE, error="its process vanished", limit=1)
    (crashed,) = told(made)
    assert crashed.title == "[dropforge] CRASHED: default, run 1"
    assert crashed.body.startswith("at step train its processes vanished again and again\nthe last error: its process")


def test_a_win_that_waits_says_how_to_take_it_until_it_is_answered(new_workspace: Callable[[], Any]) -> None:
    made = new_workspace()
    made.take("a.jsonl", '{"instruction": "a", "output": "b"}\n')
    claim = made.claim()
    made.attempt(claim, "decide")
    verdict = run_owner.judged("promoted", 4.0, slices_not_listed=2)
    run_owner.finish(made.engine, claim, (AWAITING, verdict), made.tick())
    (waits,) = told(made)
    assert (waits.level, waits.title) == ("warning", "[dropforge] WAITS FOR APPROVAL: default, run 1")
    assert waits.body.splitlines() == [
        "won, waits for approval (dropforge promote 1): +4.0 points",
        "not guarded: 2 small drops or tags",
        "the evidence: dropforge report 1",
        "to take it: dropforge promote 1",
    ]

    with transaction(made.engine) as session:
        session.get_one(Run, 1).outcome = "promoted"
    assert told(made) == []


def test_a_rollback_by_the_daemon_itself_is_graver_than_a_persons(lived_in: Any) -> None:
    detail = {"run_id": None, "restored": 0, "reason": "health command failed: exit code 3"}
    history = "what serves now, and what did: dropforge history --track default"
    own = changed(lived_in, "rolled_back", PromotionKind.ROLLBACK, **detail)
    assert (own.level, own.title) == ("failure", "[dropforge] ROLLED BACK: default, generation 2")
    assert own.body == f"rolled back to generation 0: {detail['reason']}\n{history}"
    asked = changed(lived_in, "rolled_back", PromotionKind.ROLLBACK, **detail, approved_by="anna")
    assert asked.level == "warning"
    assert asked.body == f"rolled back to generation 0 by anna: {detail['reason']}\n{history}"


@pytest.mark.parametrize(
    ("kind", "title", "line"),
    [
        ("health_failed", "UNHEALTHY: default", "the former champion is being brought back"),
        ("rollback_failed", "NOT ROLLED BACK: default", "dropforge rollback --track default --to GENERATION"),
    ],
)
def test_trouble_with_the_server_says_what_it_means_and_what_to_do(
    lived_in: Any, kind: str, title: str, line: str
) -> None:
    text = event(lived_in, kind, track="default", run_id=1, error="exit code 3")
    assert (text.level, text.title) == ("failure", f"[dropforge] {title}")
    assert "exit code 3" in text.body.splitlines()[0]
    assert line in text.body


def test_low_disk_and_a_suspended_drop_are_told(lived_in: Any) -> None:
    low = event(lived_in, "disk_low", free_bytes=12_000_000)
    assert low.title == "[dropforge] LOW DISK: 12 MB free"
    with transaction(lived_in.engine) as session:
        scores = TrialScores(groups=9, wins=1, losses=8, p_value=0.01, lost_drops=(1,))
        found = Suspension(blamed_run=2, trial=3, tested=(2,), control=4, scores=scores)
        session.get_one(Drop, 2).suspension = found.model_dump(mode="json")
        why = drop_clauses(session.get_one(Drop, 2))
    suspended = event(lived_in, "drop_suspended", track="default", run_id=3, drop_id=2)
    assert suspended.title == "[dropforge] SUSPENDED: default, first.jsonl"
    assert suspended.body.splitlines() == [
        "the file: first.jsonl, drop 2",
        *why,
        "to train on it all the same: dropforge drops restore 2 --reason TEXT",
    ]
    detail = {"run_id": 2, "overrode": "failed", "reason": "it is urgent", "approved_by": "anna"}
    forced = changed(lived_in, "forced", PromotionKind.FORCED, **detail)
    assert "forced by anna over failed: it is urgent\nit is the model of run 2\n" in forced.body


#: Names that are markup, a mention, a link, a command or another line somewhere.
HOSTILE = (
    "<!channel> <@U123> <b>x</b>.jsonl",
    "@everyone @here.jsonl",
    "[click](http://evil.example).jsonl",
    "*bold* `code` ~s~ # head.jsonl",
    "https://evil.example/x",
    "www.evil.example",
    "a\nundo: rm -rf.jsonl",
    "\x1b[2Jred\x07.jsonl",
    "\u202egnp.jsonl",
    "&lt;script&gt;",
    "a|b||spoiler||",
    "\\u0041 \\n.jsonl",
    "x" * 500,
)


def test_a_hostile_name_or_reason_is_words_on_its_line_and_nothing_else(new_workspace: Callable[[], Any]) -> None:
    made = new_workspace()
    names = [name for name in HOSTILE if name.endswith(".jsonl") and "/" not in name]
    for name in names:
        made.take(name, '{"instruction": "x"}\n')
    texts = told(made)
    assert [text.kind for text in texts] == ["drop_rejected"] * len(names)
    texts += [changed(made, "forced", PromotionKind.FORCED, reason=reason, overrode="worse") for reason in HOSTILE]
    for text in texts:
        said = f"{text.title.removeprefix('[dropforge]')} {' '.join(text.body.split(chr(10)))}"
        assert not set(said) & set("<>@*`[]|~#\\&\n\r\x1b\x07\u202e"), said
        assert "://" not in said
        assert "evil.example" not in said
        lines = text.body.splitlines()
        assert len(lines) == (3 if text.kind == "forced" else 5)
        assert max(map(len, lines)) <= 220
