"""The demo's data: honest where it should be, wrong where it should be, and never the same message twice."""

from itertools import islice
from pathlib import Path

from daemon.cli import demo
from pipeline.records.validate import Options, validate
from tests.demo_data import TEAMS, WRONG, generate_messages, make_data, write_rows


def right_answers(count: int, seed: int = 7) -> dict[str, str]:
    return {message.text: TEAMS[message.topic] for message in islice(generate_messages(seed), count)}


def test_no_message_is_in_two_files() -> None:
    data = make_data()
    texts = [row["input"] for rows in (data.heldout, data.first, data.second) for row in rows]
    assert (len(data.heldout), len(data.first), len(data.second)) == (120, 160, 210)
    assert len(set(texts)) == len(texts)


def test_held_out_and_honest_rows_are_right_and_every_poisoned_one_is_wrong() -> None:
    right = right_answers(490)
    data = make_data()
    assert all(right[row["input"]] == row["output"] for row in (*data.heldout, *data.first))
    assert all(right[row["input"]] != row["output"] for row in data.second)
    assert {row["output"] for row in data.second} == {WRONG}


def test_the_question_does_not_give_the_answer_away() -> None:
    assert not any(team in row["instruction"] + row["input"] for row in make_data().heldout for team in TEAMS.values())


def test_the_demos_files_are_made_of_it_and_pass_the_intake(tmp_path: Path) -> None:
    data = make_data()
    for name, rows in (("heldout", data.heldout), ("honest", data.first), ("poisoned", data.second)):
        path, made = Path(demo.__file__).parent / "demo_files" / f"{name}.jsonl", tmp_path / name
        write_rows(made, rows)
        assert path.read_bytes() == made.read_bytes(), "write them anew: write_rows"
        found = validate(path, Options())
        assert (found.ok, found.warnings, found.rows) == (True, (), len(rows))
