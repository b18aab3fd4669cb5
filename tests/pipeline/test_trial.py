"""What is told of a search's candidates, a line each."""

from pipeline.trial import Candidate, candidate_words


def test_a_candidate_is_told_in_a_line() -> None:
    chosen = Candidate(
        number=2, settings={"learning_rate": 4e-4, "rslora": True, "targets": ["q_proj", "v_proj"]},
        outcome="finished", dev_score=61.25, scored_by="exact_match", dev_loss=0.5, seconds=70, chosen=True,
        why="the best on the dev rows",
    )  # fmt: skip
    assert candidate_words(chosen) == (
        "2. learning_rate 0.0004, rslora True, targets q_proj and v_proj: finished, 61.2 points on the dev rows, "
        "dev loss 0.500, 1 min 10 s, chosen; the best on the dev rows"
    )
    failed = Candidate(number=3, settings={"rank": 8}, outcome="failed", seconds=1, why="training diverged")
    assert candidate_words(failed) == "3. rank 8: failed, 1 s; training diverged"
    few = Candidate(number=1, settings={"rank": 8}, outcome="finished", dev_score=-1, scored_by="nll", seconds=1)
    assert "points" not in candidate_words(few)
